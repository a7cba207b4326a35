"""Eigendecompositions running in a worker thread, beside the training.

A refresh begins with a copy of the factors as they are; a thread finds their
eigenvectors while steps go on with the old basis, and some steps later the layer moves.
The step at which it moves depends on the schedule alone, not on the thread's speed.

A thread does not survive a fork, and its locks may stay held in the child, which
therefore drops all pending searches without touching them. A search that was dropped or
raised is repeated within the step that was to adopt its basis, and counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature.eigenbasis import Factors, basis_updates, factors_of
from ekfac.curvature.state import BasisUpdate, Counters, LayerCurvature

Found = tuple[BasisUpdate, Counters]


class AsyncEigh:
    """Eigenbases that are being computed for later steps, by layer name.

    Args:
        tolerance: Bound on what is off the diagonal of a basis that is kept.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._pool: ThreadPoolExecutor | None = None
        self._pending: dict[str, Future[Found]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lost: set[str] = set()  # names of those that were pending at a fork
        self._process = os.getpid()

    def _notice_fork(self) -> None:
        """Drop, in a forked child, the parent's thread and its pending searches."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._lost |= self._pending.keys()
            self._pool, self._pending, self._streams = None, {}, {}

    def begin(self, layers: Sequence[LayerCurvature], step: int) -> None:
        """Begin to compute the layers' new bases from their present factors."""
        self._notice_fork()
        if self._pool is None and layers:
            self._pool = ThreadPoolExecutor(1, "ekfac-basis")
        for layer, factors in factors_of(layers):
            assert self._pool is not None
            event = None
            if layer.device.type == "cuda":
                event = torch.cuda.current_stream(layer.device).record_event()
            self._pending[layer.name] = self._pool.submit(
                self._find, (layer, factors), step, event
            )

    @torch.no_grad()
    def _find(self, sides: Factors, step: int, event: torch.cuda.Event | None) -> Found:
        """Return a layer's new basis, and counts of how it was computed."""
        layer, _ = sides
        own = Counters()
        if event is None:
            return basis_updates([sides], step, self.tolerance, own)[layer.name], own
        stream = self._streams.get(layer.device)
        if stream is None:
            stream = self._streams[layer.device] = torch.cuda.Stream(layer.device)
        stream.wait_event(event)
        with torch.cuda.stream(stream):
            update = basis_updates([sides], step, self.tolerance, own)[layer.name]
        stream.synchronize()
        return update, own

    def take(
        self, layers: Sequence[LayerCurvature], counters: Counters
    ) -> dict[str, BasisUpdate]:
        """Wait for the pending bases of some layers and return them.

        Layers whose search raised or was lost in a fork are left out, and counted.
        """
        self._notice_fork()
        updates = {}
        for layer in layers:
            if layer.name in self._lost:
                self._lost.remove(layer.name)
                counters.repeated += 1
            elif layer.name in self._pending:
                outcome = _outcome(self._pending.pop(layer.name))
                if outcome is None:
                    counters.repeated += 1
                    continue
                counters.add(outcome[1])
                updates[layer.name] = _arrived(outcome[0], layer)
        return updates

    def drop(self, names: Iterable[str] | None = None) -> None:
        """Forget the pending bases of these layers, or all of them."""
        self._notice_fork()
        for name in list(self._pending) if names is None else names:
            if name in self._pending:
                self._pending.pop(name).cancel()
            self._lost.discard(name)
        if names is None:
            self._lost.clear()

    def close(self) -> None:
        """Forget all pending bases and end the thread."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None

    def state_dict(self) -> dict[str, Any]:
        """Wait for the pending bases and return copies, by layer name.

        A search that raised is left out: it is repeated when its basis is due.
        """
        self._notice_fork()
        state: dict[str, Any] = {}
        for name, future in self._pending.items():
            outcome = _outcome(future)
            if outcome is None:
                continue
            update, counters = outcome
            vectors = {s: q for s, q in update.vectors.items() if q is not None}
            tensors = {f"eigenvalues_{s}": v for s, v in update.values.items()}
            tensors |= {f"Q_{side}": q for side, q in vectors.items()}
            state[name] = {
                "tensors": {key: tensor.clone() for key, tensor in tensors.items()},
                "columns": {side: q.shape[-1] for side, q in vectors.items()},
                "counters": dict(vars(counters)),
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over copies of what was pending when the state was saved."""
        self.drop()
        for name, saved in state.items():
            tensors = saved["tensors"]
            update = BasisUpdate(
                {side: tensors[f"eigenvalues_{side}"] for side in ("A", "G")},
                {side: tensors.get(f"Q_{side}") for side in ("A", "G")},
            ).mapped(Tensor.clone)
            future: Future[Found] = Future()
            future.set_result((update, Counters(**saved["counters"])))
            self._pending[name] = future


def _outcome(future: Future[Found]) -> Found | None:
    """Wait for a search and return its result, ``None`` if it raised."""
    return future.result() if future.exception() is None else None


def _arrived(update: BasisUpdate, layer: LayerCurvature) -> BasisUpdate:
    """Return an update on the layer's device and in its type, safe to be used there.

    Its memory may be freed by this thread's stream only after that has used it. One
    that was loaded may be of another device or type.
    """

    def moved(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor.to(layer.device, layer.dtype)

    return update.mapped(moved)
