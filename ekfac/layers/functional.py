"""Weights that a module of an unknown type uses in functions that are known.

Routers and fused experts ``[E, d_out, d_in]`` of mixtures, and embeddings that find
their indices themselves, hold a parameter and call ``linear``, ``grouped_mm`` or
``embedding`` with it. A context that is active during the module's forward sees those
calls. Which parameters are watched is decided by the names in the code of ``forward``;
statistics come from what is called. A weight that is never seen there is trained by its
diagonal, with a warning at the step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode

from ekfac.layers.base import Adapter, FunctionalAdapter, Report, Slot
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter


class _Watched(FunctionalAdapter):
    """What both functions have in common."""

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse nothing: the names in ``forward`` have been looked at."""
        return None

    @classmethod
    def tap(
        cls,
        module: nn.Module,
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        report: Report,
    ) -> FunctionTap:
        """Return what reports the functions of one call."""
        return FunctionTap(adapters, report)


class FunctionalLinearAdapter(_Watched, LinearAdapter):
    """``linear(x, W)`` or, of stacked matrices, ``linear(x, W[i])``: one block each.

    A bias is left to its diagonal.
    """

    def __init__(self, module: nn.Module, weight: Slot) -> None:
        super().__init__(module)
        self.weight, self.bias = weight, None

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the blocks by the parameters' names, and their numbers in a stack."""
        blocks: dict[str, Adapter] = {}
        for name in linear_weights(module):
            weight = module._parameters[name]
            assert weight is not None
            if weight.dim() == 2:
                blocks["" if name == "weight" else name] = cls(module, Slot(name))
                continue
            for i in range(len(weight)):
                blocks[f"{name}.{i}"] = cls(module, Slot(name, (i, i + 1)))
        return blocks

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d_out, d_in]``, also of a stack's ``[1, d_out, d_in]``."""
        return weight if weight.dim() == 3 else weight.unsqueeze(0)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight ``[d_out, d_in]``, in a stack ``[1, d_out, d_in]``."""
        return (matrix[0] if self.weight.rows is None else matrix), None


class FunctionalEmbeddingAdapter(_Watched, EmbeddingAdapter):
    """``embedding(indices, W)`` with indices that the module finds itself."""


class FunctionTap(TorchFunctionMode):
    """Reports the calls of known functions that use the given weights.

    Args:
        adapters: Of the weights.
        report: Is told of every call.
    """

    def __init__(self, adapters: Sequence[Adapter], report: Report) -> None:
        super().__init__()
        self.adapters, self.report = adapters, report

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` and report it, if it is one of those that are known."""
        result = func(*args, **(kwargs or {}))
        grouped = "grouped_mm" in getattr(func, "__name__", str(func))
        if func is Tensor.__getitem__:
            self._tell_rows(args[0], args[1], result)
        elif func is F.linear or func is F.embedding or grouped:
            names = ("input", "weight", "offs")
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            if grouped:
                self._tell_groups(given, result)
            else:
                self._tell(given, result, func is F.embedding)
        return result

    @_disable_dynamo
    def _tell(self, given: dict[str, Any], result: Tensor, lookup: bool) -> None:
        """Report a call to the adapters whose weight is in it."""
        for adapter in self.adapters:
            part = _is_part(given["weight"], adapter)
            if part and lookup == adapter.diagonal_input:
                self.report(adapter, given["input"], result, _unchanged, None)

    @_disable_dynamo
    def _tell_rows(self, weight: Tensor, index: Any, result: Tensor) -> None:
        """Report the rows of an embedding's weight that are taken by ``[]``."""
        if not isinstance(index, Tensor | slice):
            return
        for adapter in self.adapters:
            if adapter.diagonal_input and _is_part(weight, adapter):
                rows = torch.arange(len(weight), device=weight.device)[index]
                self.report(adapter, rows, result, _unchanged, None)

    @_disable_dynamo
    def _tell_groups(self, given: dict[str, Any], result: Tensor) -> None:
        """Report ``x W[i]^T`` of every group ``i`` of rows, from one's end to the next.

        Only of weights ``[E, d_out, d_in]``, which come transposed.
        """
        weight, offsets = given.get("weight"), given.get("offs")
        members = [a for a in self.adapters if _is_stack(weight, a)]
        if not members or offsets is None:
            return
        ends = [0, *offsets.tolist()]
        for adapter in members:
            assert adapter.weight.rows is not None
            i = adapter.weight.rows[0]
            rows = slice(ends[i], ends[i + 1])
            if rows.start < rows.stop:
                x = given["input"][rows]
                self.report(adapter, x, result, partial(_rows_of, rows), None)


def _is_part(weight: Tensor, adapter: Adapter) -> bool:
    """Return whether a tensor is an adapter's parameter, or its matrix in a stack."""
    parameter, rows = adapter.parameter(adapter.weight), adapter.weight.rows
    if rows is None:
        return weight is parameter
    start = parameter.storage_offset() + rows[0] * parameter.stride(0)
    return (
        weight.requires_grad
        and weight._base is parameter
        and weight.shape == parameter.shape[1:]
        and weight.stride() == parameter.stride()[1:]
        and weight.storage_offset() == start
    )


def _is_stack(weight: Tensor | None, adapter: Adapter) -> bool:
    """Return whether a tensor is the stack of an adapter's matrix, transposed."""
    parameter = adapter.parameter(adapter.weight)
    if weight is None or adapter.weight.rows is None or weight._base is not parameter:
        return False
    turned = parameter.detach().transpose(-2, -1)
    return (
        weight.requires_grad
        and weight.shape == turned.shape
        and weight.stride() == turned.stride()
    )


def _rows_of(rows: slice, grad: Tensor) -> Tensor:
    """Return a group's rows of a gradient."""
    return grad[rows]


def _unchanged(grad: Tensor) -> Tensor:
    """Return the gradient as it is."""
    return grad


def functional_adapter(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter of a module that calls functions with weights of its own."""
    lookup = isinstance(module, nn.Embedding) and type(module) is not nn.Embedding
    if lookup and EmbeddingAdapter.refusal(module) is None:
        return FunctionalEmbeddingAdapter
    return FunctionalLinearAdapter if linear_weights(module) else None


def linear_weights(module: nn.Module) -> list[str]:
    """Return the matrices and stacks of them that ``forward`` names with ``linear``."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "linear" not in code.co_names:
        return []
    lazy = nn.parameter.UninitializedParameter
    return [
        name
        for name, p in module._parameters.items()
        if p is not None
        and not isinstance(p, lazy)
        and p.dim() in (2, 3)
        and name in code.co_names
    ]
