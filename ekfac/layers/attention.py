"""``nn.MultiheadAttention``: four linear layers that it calls as functions.

Module hooks never see its projections, whether packed in one ``in_proj_weight`` or
separate. A :class:`ProjectionTap`, active during the module's forward, runs torch's own
attention function with a ``linear`` that reports its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ekfac.layers.base import (
    Adapter,
    FunctionalAdapter,
    Slot,
    Tap,
    register,
    shortcuts_for,
)
from ekfac.layers.linear import LinearAdapter, LinearShortcuts


class ProjectionTap(Tap):
    """Reports the ``linear`` calls of an attention module's projections."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``, the attention function with a ``linear`` that reports."""
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @_disable_dynamo
    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        # The query is [L, N, d] here, or [L, d]: the first dimension is positions.
        examples = args[0].shape[1] if args[0].dim() == 3 else 1
        return attention_with(partial(self._linear, examples))(*args, **kwargs)

    def _linear(
        self, examples: int, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Return ``F.linear`` of the arguments, and report it."""
        result = F.linear(x, weight, bias)
        for projection, rows in self._users(weight):
            inputs = examples_first(x, examples)
            arrange = partial(_projection_gradient, rows, examples)
            self.report(projection, inputs, result, arrange, None)
        return result

    def _users(self, weight: Tensor) -> list[tuple[Adapter, slice]]:
        """Return the projections whose rows ``weight`` has, and which rows they are."""
        users = []
        for projection in self.adapters:
            parameter = projection.parameter(projection.weight)
            if weight is not parameter and weight._base is not parameter:
                continue
            first, last = projection.weight.rows or (0, parameter.shape[0])
            offset = weight.storage_offset() - parameter.storage_offset()
            start = offset // parameter.stride(0)
            if start <= first and last <= start + weight.shape[0]:
                users.append((projection, slice(first - start, last - start)))
        return users


def _projection_gradient(rows: slice, examples: int, grad: Tensor) -> Tensor:
    """Return a projection's part of the gradient, examples first."""
    return examples_first(grad[..., rows], examples)


@register(nn.MultiheadAttention)
class ProjectionAdapter(FunctionalAdapter, LinearAdapter):
    """One projection of an ``nn.MultiheadAttention``, in the form of a linear layer."""

    children = ("out_proj",)
    tap = ProjectionTap
    module: nn.MultiheadAttention

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


shortcuts_for(ProjectionAdapter)(LinearShortcuts)


_PROJECTORS = ("_in_projection", "_in_projection_packed")


def attention_with(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return torch's attention function with another ``linear``.

    A mode of ``__torch_function__`` is off inside the functions that it intercepts, so
    the calls within are reached by name. The copies share torch's code and differ in
    the globals that they look up; torch itself is unchanged.
    """

    def copy(function: Any, **names: Any) -> Callable[..., Any]:
        """Return the function with other globals."""
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
    """Return attention's ``[L, N, d]`` or ``[L N, d]`` as ``[N, L, d]``."""
    return x.reshape(-1, examples, x.shape[-1]).transpose(0, 1)
