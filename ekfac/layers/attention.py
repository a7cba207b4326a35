"""``nn.MultiheadAttention``: four linear layers that it calls as functions.

Module hooks never see its projections, whether packed in one ``in_proj_weight`` or
separate. A :class:`ProjectionTap` is active during the module's forward; it runs
torch's own attention function, with the ``linear`` that this one calls replaced by one
that also reports the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode

from ekfac.layers.base import (
    Adapter,
    FunctionalAdapter,
    Report,
    Slot,
    register,
    shortcuts_for,
)
from ekfac.layers.linear import LinearAdapter, LinearShortcuts


@register(nn.MultiheadAttention)
class ProjectionAdapter(LinearAdapter, FunctionalAdapter):
    """One projection of an ``nn.MultiheadAttention``, in the form of a linear layer."""

    children = ("out_proj",)
    module: nn.MultiheadAttention

    def __init__(self, module: nn.MultiheadAttention, weight: Slot, bias: Slot | None):
        super().__init__(module)
        self.weight, self.bias = weight, bias

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Accept packed and separate projections."""
        return None

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the blocks of query, key, value and output projection."""
        assert isinstance(module, nn.MultiheadAttention)
        size, blocks = module.embed_dim, {}
        for i, letter in enumerate("qkv"):
            rows = (i * size, (i + 1) * size)
            if module.in_proj_weight is None:
                weight = Slot(f"{letter}_proj_weight")
            else:
                weight = Slot("in_proj_weight", rows)
            bias = None if module.in_proj_bias is None else Slot("in_proj_bias", rows)
            blocks[f"{letter}_proj"] = cls(module, weight, bias)
        out_bias = None if module.out_proj.bias is None else Slot("out_proj.bias")
        blocks["out_proj"] = cls(module, Slot("out_proj.weight"), out_bias)
        return dict(blocks)

    @classmethod
    def tap(
        cls,
        module: nn.Module,
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        report: Report,
    ) -> ProjectionTap:
        """Return what reports the projections of one call."""
        query = args[0] if args else kwargs["query"]
        batch = 0 if getattr(module, "batch_first", False) else 1
        examples = 1 if query.dim() == 2 else query.shape[batch]
        return ProjectionTap(adapters, examples, report)


shortcuts_for(ProjectionAdapter)(LinearShortcuts)


class ProjectionTap(TorchFunctionMode):
    """Reports the ``linear`` calls that use the given projections.

    Args:
        projections: The projections of one attention module.
        examples: How many sequences the module was called with; inside it, rows run
            over positions first and sequences second.
        report: Is told of every call.
    """

    def __init__(
        self,
        projections: Sequence[Adapter],
        examples: int,
        report: Report,
    ) -> None:
        super().__init__()
        self.projections = projections
        self.examples = examples
        self.report = report

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func``; the attention function with a reporting ``linear``."""
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @_disable_dynamo
    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        return attention_with(self._linear)(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``F.linear`` of the arguments, and report it."""
        result = F.linear(x, weight, bias)
        for projection, rows in self._users(weight):
            self.report(
                projection,
                examples_first(x, self.examples),
                result,
                partial(self._laid, rows),
                None,
            )
        return result

    def _laid(self, rows: slice, grad: Tensor) -> Tensor:
        """Return a projection's part of the gradient, examples first."""
        return examples_first(grad[..., rows], self.examples)

    def _users(self, weight: Tensor) -> list[tuple[Adapter, slice]]:
        """Return the projections whose rows lie in ``weight``, and where in it."""
        users = []
        for projection in self.projections:
            parameter = projection.parameter(projection.weight)
            if weight is not parameter and weight._base is not parameter:
                continue
            first, last = projection.weight.rows or (0, parameter.shape[0])
            start = (weight.storage_offset() - parameter.storage_offset()) // (
                parameter.stride(0)
            )
            if start <= first and last <= start + weight.shape[0]:
                users.append((projection, slice(first - start, last - start)))
        return users


_PROJECTORS = ("_in_projection", "_in_projection_packed")


def attention_with(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return torch's attention function with another ``linear``.

    Modes of ``__torch_function__`` are off inside the functions that they are given, so
    the calls within have to be reached by name. The copies share the code and differ
    in the names they look up; nothing of torch is changed.
    """

    def copy(function: Any, **names: Any) -> Callable[..., Any]:
        scope = {**function.__globals__, **names}
        new = FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__
        )
        new.__kwdefaults__ = function.__kwdefaults__
        return new

    return copy(
        F.multi_head_attention_forward,
        linear=linear,
        has_torch_function=lambda tensors: False,
        **{name: copy(getattr(F, name), linear=linear) for name in _PROJECTORS},
    )


def examples_first(x: Tensor, examples: int) -> Tensor:
    """Return ``[N, L, d]`` of ``[L, N, d]`` or ``[L N, d]``, as attention lays it."""
    return x.reshape(-1, examples, x.shape[-1]).transpose(0, 1)
