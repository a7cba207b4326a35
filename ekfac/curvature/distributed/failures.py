"""Failures of one rank, told to the others through ``torch.distributed``'s store.

A transport says that a connection was closed or a time limit passed, not which rank was
the cause. So a rank whose step raises leaves a report in the store, and a rank whose
collective fails leaves one too: whoever reported nothing is the cause. On a CPU a rank
that waits looks every half second whether another has failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ekfac.errors import RankError

# How long a rank that has failed waits for the reports of the others, in seconds.
GRACE = 2.0
LOOK = timedelta(seconds=0.5)


class Failures:
    """Reports of the ranks of one group.

    Args:
        name: Of the group, the same on its ranks and of no other.
        rank: This one.
        size: How many there are.
        device: Where collectives run.

    Attributes:
        step: Number of the step that is being done.
    """

    def __init__(self, name: str, rank: int, size: int, device: torch.device) -> None:
        self.name, self.rank, self.size, self.device = name, rank, size, device
        self.step = 0
        self._attempt = 0  # a report of an earlier failure is none of the next
        self._store: Any = dist.distributed_c10d._get_default_store()

    # -- reports ----------------------------------------------------------------------

    def _key(self, what: object) -> str:
        return f"ekfac/{self.name}/{self._attempt}/{what}"

    def _report(self, cause: str | None) -> None:
        """Leave a report: what this rank raised, or ``None`` if it only waited."""
        try:
            self._store.set(self._key(self.rank), json.dumps([self.step, cause]))
            self._store.set(self._key("any"), str(self.rank))
        except RuntimeError:
            pass  # the store's host has ended: see _explain

    def _failed(self) -> bool:
        """Return whether any rank has reported."""
        return bool(self._store.check([self._key("any")]))

    @contextmanager
    def reported(self, step: int) -> Iterator[None]:
        """Report to the other ranks what is raised within."""
        self.step = step
        try:
            yield
        except RankError:
            self._attempt += 1
            raise
        except Exception as error:
            self._report(f"{type(error).__name__}: {error}")
            self._attempt += 1
            raise

    # -- collectives ------------------------------------------------------------------

    def wait(self, work: Any, doing: str, layers: Sequence[str] = ()) -> None:
        """Wait for a collective.

        Args:
            work: torch's handle.
            doing: What it does, for the error.
            layers: Of which layers.

        Raises:
            RankError: If it fails, naming the ranks that did not take part.
        """
        with self.collective(doing, layers):
            while not self._arrived(work):
                pass

    def _arrived(self, work: Any) -> bool:
        """Wait a moment; raise if the collective has failed, or another rank has."""
        if self.device.type != "cpu":  # there, waiting only orders streams
            work.wait()
            return True
        try:
            work.wait(LOOK)
        except RuntimeError:
            if work.is_completed() or self._failed():
                raise
            return False
        return True

    @contextmanager
    def collective(self, doing: str, layers: Sequence[str] = ()) -> Iterator[None]:
        """Raise a :class:`RankError` where a collective within fails."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise self._explain(doing, layers, error) from error

    def _explain(
        self, doing: str, layers: Sequence[str], error: RuntimeError
    ) -> RankError:
        """Return an error that names the ranks that were the cause."""
        what = f"step {self.step}: {doing}{_listed(layers)} failed on rank {self.rank}"
        self._report(None)
        try:
            found = self._reports()
        except RuntimeError:
            return RankError(
                f"{what}: torch.distributed's store does not answer, the process that "
                f"hosts it (as a rule rank 0) has ended. Cause: {error}"
            )
        raised = [
            f"rank {rank} raised {cause} (at its step {step})"
            for rank, (step, cause) in sorted(found.items())
            if cause is not None
        ]
        silent = [rank for rank in range(self.size) if rank not in found]
        if silent:
            named = "rank" if len(silent) == 1 else "ranks"
            raised.append(
                f"{named} {', '.join(map(str, silent))} took no part and did not "
                "report: ended, stuck, without data, or a step behind or ahead"
            )
        return RankError(
            f"{what}: {'; '.join(raised) or 'no rank reported a cause'}. All ranks "
            "call step() equally often (torch.distributed.algorithms.Join for unequal "
            f"numbers of batches); restart from a checkpoint. Cause: {error}"
        )

    def _reports(self) -> dict[int, tuple[int, str | None]]:
        """Return what the ranks have reported, once all have or time is over."""
        found: dict[int, tuple[int, str | None]] = {}
        end = time.monotonic() + GRACE
        while True:
            for rank in range(self.size):
                if rank not in found and self._store.check([self._key(rank)]):
                    step, cause = json.loads(self._store.get(self._key(rank)))
                    found[rank] = step, cause
            if len(found) == self.size or time.monotonic() > end:
                return found
            time.sleep(0.05)


def _listed(names: Sequence[str]) -> str:
    """Return layers' names for an error, not all if there are many."""
    if not names:
        return ""
    unique = list(dict.fromkeys(names))
    shown = ", ".join(repr(name) for name in unique[:4])
    rest = f" and {len(unique) - 4} more" if len(unique) > 4 else ""
    return f" of layer{'s' if len(unique) > 1 else ''} {shown}{rest}"
