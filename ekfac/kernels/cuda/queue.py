"""A queue of sums of many layers, launched together in one call per operator.

While gradients arrive, layer by layer, small sums wait for one another: a launch each
would cost more than the sums. Results are uninitialised until the queue is flushed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd import Variable

from ekfac.errors import CaptureError
from ekfac.kernels.cuda import operators
from ekfac.kernels.cuda.counts import Counts
from ekfac.kernels.cuda.gram import Gram
from ekfac.kernels.cuda.scalings import Scalings

Item = Gram | Scalings | Counts
# Bytes of inputs from which a sum keeps a device busy by itself, and that may wait.
LARGE = 1 << 25
BUDGET = 1 << 28


@dataclass(frozen=True)
class _Waiting:
    """One sum, and what its inputs were when it came."""

    kind: str
    item: Item
    versions: tuple[int, ...]


def _inputs(item: Item) -> list[Tensor]:
    """Return what a sum reads."""
    if isinstance(item, Gram):
        found = [item.x, item.weight]
    elif isinstance(item, Counts):
        found = [item.index, item.weight]
    else:
        found = [item.grads, item.inputs]
    return [tensor for tensor in found if tensor is not None]


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

    def add(self, kind: str, item: Item, total: Tensor | None) -> Tensor:
        """Return ``total`` with the sum of ``item``, once it is done.

        Args:
            kind: Which operator does it.
            item: Its ``out`` is new.
            total: What there is so far; written in place if it came from here.
        """
        own = total is not None and self._results.get(id(total)) is total
        if total is not None and not own:
            operators.run_(kind, [item])
            return total + item.out
        if total is not None:
            item = replace(item, out=total, beta=1.0)
        self._wait(kind, item)
        self._results[id(item.out)] = item.out
        return item.out

    def complete(self, total: Tensor | None) -> None:
        """Make sure that a result is there, if it is one of these."""
        if id(total) in self._unfinished:
            self.flush()

    def _wait(self, kind: str, item: Item) -> None:
        inputs = _inputs(item)
        size = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
        self.complete(item.out)  # one launch must not write it twice
        if size > min(LARGE, self.budget):
            with torch.no_grad():
                operators.run_(kind, [item])
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
        self._waiting, self._stream, self._bytes = [], None, 0
        self._unfinished.clear()
        for one in waiting:
            if tuple(t._version for t in _inputs(one.item)) != one.versions:
                raise CaptureError(
                    "the inputs or output gradients of a layer were changed in place "
                    "during the backward pass; use an out-of-place operation on them, "
                    "or set EKFAC_KERNELS=reference."
                )
        lists: dict[tuple[str, torch.device], list[Item]] = {}
        for one in waiting:
            lists.setdefault((one.kind, one.item.out.device), []).append(one.item)
        with torch.no_grad(), torch.cuda.stream(stream):
            for (kind, _), items in lists.items():
                operators.run_(kind, items)
        if stream is not None:
            here = torch.cuda.current_stream(stream.device)
            if here != stream:
                here.wait_stream(stream)

    def clear(self) -> None:
        """Forget what waits, and what came from here."""
        self._waiting, self._stream, self._bytes = [], None, 0
        self._unfinished.clear()
        self._results.clear()
