"""Operators of ``torch.ops.ekfac``, attempts to launch them, and a queue of sums.

All write in place, on the current stream, without asking the device for a number. A
launch is tried first, see :mod:`ekfac.kernels.cuda.dispatch`; what cannot have one is
done by the reference. Schemas and references are in the kernels' own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from ekfac.errors import CaptureError
from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.cuda import dispatch
from ekfac.kernels.cuda.counts import Counts
from ekfac.kernels.cuda.gram import Gram
from ekfac.kernels.cuda.kernel import MapOperator, SumOperator
from ekfac.kernels.cuda.scalings import Scalings

LIBRARY = torch.library.Library("ekfac", "DEF")


def run_(name: str, items: Sequence[Any]) -> None:
    """Do what the operator ``name`` does, for items of one device."""
    operator = dispatch.SUMS[name]
    launched = dispatch.run_sums(operator, items)
    for item, done in zip(items, launched, strict=True):
        if not done:
            operator.reference_(item)


def _register_sum(operator: SumOperator) -> None:
    """Register an operator that returns nothing."""

    def everywhere(*arguments: object) -> None:
        run_(operator.name, operator.prepare(*arguments))

    def fake(*arguments: object) -> None:
        operator.prepare(*arguments)

    _register(operator, everywhere, fake)


def _register_map(operator: MapOperator) -> None:
    """Register an operator that returns sums of every layer."""

    def everywhere(
        first: Sequence[Tensor], second: Sequence[Tensor], rows: Tensor, *values: float
    ) -> Tensor:
        columns = zip(first, second, rows.unbind(), strict=True)
        layers = [operator.layer(*column) for column in columns]
        if not layers:
            return rows.new_empty(0, *operator.sums)
        return dispatch.run_map(operator, layers, *values)

    def fake(
        first: Sequence[Tensor], second: Sequence[Tensor], rows: Tensor, *values: float
    ) -> Tensor:
        return rows.new_empty(len(first), *operator.sums)

    _register(operator, everywhere, fake)


def _register(operator: SumOperator | MapOperator, everywhere: Any, fake: Any) -> None:
    LIBRARY.define(f"{operator.name}{operator.schema}")
    LIBRARY.impl(operator.name, everywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ekfac::{operator.name}", fake, lib=LIBRARY)


for _sum in dispatch.SUMS.values():
    _register_sum(_sum)
for _map in dispatch.MAPS.values():
    _register_map(_map)


# -- attempts: None if there is no kernel ----------------------------------------------


def applies(rows: Tensor) -> bool:
    """Return whether tensors like this may be handed to a kernel at all."""
    if not rows.is_cuda or torch.compiler.is_compiling():
        return False
    # Nothing is recorded of a launch for a backward pass.
    return not (torch.is_grad_enabled() and rows.requires_grad)


def _result(rows: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=rows.device)


def gram_of(
    rows: Tensor,
    weight: Tensor | None = None,
    *,
    diagonal: bool = False,
    bias: bool = False,
) -> Gram | None:
    """Return ``sum_ns w_ns x_ns x_ns^T`` or its diagonal, to be launched.

    Args:
        rows: ``[N, S, b, d]``.
        weight: ``[N, S]`` or ``None``.
        diagonal: The result is ``[b, d]`` in place of ``[b, d, d]``.
        bias: Whether rows end with a one that is not in memory.
    """
    if not applies(rows):
        return None
    b, d = rows.shape[2], rows.shape[3] + int(bias)
    out = _result(rows, b, d) if diagonal else _result(rows, b, d, d)
    item = Gram(out, rows, weight, bias=bias)
    operator = dispatch.SUMS["diagonal_gram_" if diagonal else "gram_"]
    return item if dispatch.takes(operator, item) else None


def patch_gram_of(x: Tensor, conv: Convolution, *, bias: bool) -> Gram | None:
    """Return the Gram matrix of a convolution's patches, to be launched.

    The input ``[N, C, *]`` comes without the zeros around it.
    """
    if not applies(x):
        return None
    width = conv.features(x.shape[1]) + int(bias)
    out = _result(x, conv.groups, width, width)
    item = Gram(out, with_depth(x), bias=bias, conv=conv.in_three())
    return item if dispatch.takes(dispatch.SUMS["patch_gram_"], item) else None


def counts_of(
    index: Tensor, size: int, weight: Tensor | None, like: Tensor
) -> Counts | None:
    """Return how often each index occurs, ``[1, size]``, to be launched."""
    if not applies(index):
        return None
    item = Counts(_result(like, 1, size), index, weight)
    return item if dispatch.takes(dispatch.SUMS["index_counts_"], item) else None


def squares_of(grads: Tensor, inputs: Tensor) -> Scalings | None:
    """Return ``sum_n (sum_s g_ns a_ns^T)^2``, ``[b, d_out, d_in]``, to be launched.

    Args:
        grads: ``[N, S, b, d_out]``, in the basis.
        inputs: ``[N, S, b or 1, d_in]``, in the basis.
    """
    if not applies(grads) or not applies(inputs):
        return None
    item = Scalings(_result(grads, *grads.shape[2:], inputs.shape[-1]), grads, inputs)
    return item if dispatch.takes(dispatch.SUMS["scalings_"], item) else None


def launched(name: str, item: Gram | Counts | Scalings | None) -> Tensor | None:
    """Return the result of what an attempt returned; ``None``: not launched."""
    if item is None or dispatch.run_sums(dispatch.SUMS[name], [item]) != [True]:
        return None
    return item.out


def add_squares_(squares: Tensor, grads: Tensor, inputs: Tensor) -> bool:
    """Add ``sum_n (sum_s g_ns a_ns^T)^2`` to ``squares``; return whether it was done.

    Args:
        squares: ``[b, d_out, d_in]``.
        grads: ``[N, b, d_out, S]``, in the basis.
        inputs: ``[N, b or 1, d_in, S]``, in the basis.
    """
    if not applies(grads) or not applies(inputs):
        return False
    order = (0, 3, 1, 2)
    item = Scalings(squares, grads.permute(order), inputs.permute(order), beta=1.0)
    return dispatch.run_sums(dispatch.SUMS["scalings_"], [item]) == [True]


# -- queue -----------------------------------------------------------------------------


Item = Gram | Scalings | Counts
# Bytes of inputs from which a sum keeps a device busy by itself, and that may wait.
LARGE = 1 << 25
BUDGET = 1 << 28


@dataclass(frozen=True)
class _Waiting:
    """One sum, and the versions of its inputs when it came."""

    kind: str
    item: Item
    versions: tuple[int, ...]


def _inputs(item: Item) -> list[Tensor]:
    """Return what a sum reads."""
    if isinstance(item, Gram):
        tensors = [item.x, item.weight]
    elif isinstance(item, Counts):
        tensors = [item.index, item.weight]
    else:
        tensors = [item.grads, item.inputs]
    return [tensor for tensor in tensors if tensor is not None]


class LaunchQueue:
    """Takes sums one by one and has them done in one call for each operator.

    Inside a backward pass the last ones are done at its end, elsewhere when
    :meth:`flush` is called, and in between when too many bytes wait.

    Args:
        budget: Bytes of inputs that may wait; 0 does every sum at once.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self._waiting: list[_Waiting] = []
        self._results: dict[int, Tensor] = {}
        self._unfinished: set[int] = set()
        self._bytes = 0
        self._task = -1
        self._stream: torch.cuda.Stream | None = None

    def add(self, kind: str, item: Item, result: Tensor | None) -> Tensor:
        """Return ``result`` with the sum of ``item``, once it is done.

        The item's ``out`` is new; a result that came from here is written in place.
        """
        queued = result is not None and self._results.get(id(result)) is result
        if result is not None and not queued:
            run_(kind, [item])
            return result + item.out
        if result is not None:
            item = replace(item, out=result, beta=1.0)
        self._wait(kind, item)
        self._results[id(item.out)] = item.out
        return item.out

    def complete(self, result: Tensor | None) -> None:
        """Make sure that a result is there, if it is one of these."""
        if id(result) in self._unfinished:
            self.flush()

    def _wait(self, kind: str, item: Item) -> None:
        inputs = _inputs(item)
        size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
        self.complete(item.out)  # one launch must not write it twice
        if size > min(LARGE, self.budget):
            with torch.no_grad():
                run_(kind, [item])
            return
        out = item.out
        stream = torch.cuda.current_stream(out.device) if out.is_cuda else None
        task = torch._C._current_graph_task_id()
        if self._waiting and (stream != self._stream or task != self._task):
            self.flush()
        if task != -1 and not self._waiting:
            Variable._execution_engine.queue_callback(self.flush)
        self._stream, self._task = stream, task
        versions = tuple(tensor._version for tensor in inputs)
        self._waiting.append(_Waiting(kind, item, versions))
        self._unfinished.add(id(item.out))
        self._bytes += size
        if self._bytes > self.budget:
            self.flush()

    def flush(self) -> None:
        """Do what waits.

        Raises:
            CaptureError: If a layer's inputs have been overwritten since.
        """
        waiting, stream = self._waiting, self._stream
        if not waiting:  # on a CPU this is asked for layer by layer
            return
        self._waiting, self._stream, self._bytes = [], None, 0
        self._unfinished.clear()
        for item in waiting:
            if tuple(t._version for t in _inputs(item.item)) != item.versions:
                raise CaptureError(
                    "the inputs or output gradients of a layer were changed in place "
                    "during the backward pass; use an out-of-place operation on them, "
                    "or set EKFAC_KERNELS=reference."
                )
        lists: dict[tuple[str, torch.device], list[Item]] = {}
        for item in waiting:
            lists.setdefault((item.kind, item.item.out.device), []).append(item.item)
        with torch.no_grad(), torch.cuda.stream(stream):
            for (kind, _), items in lists.items():
                run_(kind, items)
        if stream is not None:
            current = torch.cuda.current_stream(stream.device)
            if current != stream:
                current.wait_stream(stream)

    def clear(self) -> None:
        """Forget what waits, and what came from here."""
        self._waiting, self._stream, self._bytes = [], None, 0
        self._unfinished.clear()
        self._results.clear()
