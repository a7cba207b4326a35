"""Choice of an implementation by measurement, once for each class of shapes.

The first time that a class meets a device, the kernel and torch's own operations are
timed in turn on that device, on copies of what they write. The fastest is kept, in the
process and in a file beside the cubins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import RLock
from typing import Protocol

import torch

from ekfac.kernels.cuda import compiler

Work = Callable[[], object]
ROUNDS = 5
# PyTorch's own operation, which needs no kernel: the others have to be faster.
TORCH = "torch"


class Clock(Protocol):
    """Measures the time that a device takes."""

    def elapsed(self, work: Work) -> float:
        """Do ``work`` and return the seconds that it took the device."""


class DeviceClock:
    """A clock of events on the current stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def elapsed(self, work: Work) -> float:
        """Return the seconds between two events; waits for the second."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Choice:
    """Measurements for a class of shapes.

    Attributes:
        name: The fastest.
        seconds: Time of every candidate; infinite for one that failed.
    """

    name: str
    seconds: dict[str, float]


def bucket(size: int) -> int:
    """Return the power of two that a size is rounded up to; 0 for 0."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def measured(candidates: Mapping[str, Work], clock: Clock) -> Choice:
    """Return the fastest candidate.

    All are run once before, which may compile or allocate. Then they take turns, each
    round beginning with another one, so that a device that slows down slows all; the
    shortest time counts, since disturbances only add. One that raises is out; if all
    do, the first is kept. A tie goes to the one that stands first.
    """
    seconds = dict.fromkeys(candidates, math.inf)
    running = [name for name, work in candidates.items() if _runs(work)]
    for turn in range(ROUNDS):
        for i in range(len(running)):
            name = running[(i + turn) % len(running)]
            seconds[name] = min(seconds[name], clock.elapsed(candidates[name]))
    return Choice(min(seconds, key=lambda name: seconds[name]), seconds)


def _runs(work: Work) -> bool:
    try:
        work()
    except RuntimeError:  # out of memory among them
        return False
    return True


class Chooser:
    """Choices of one device.

    Args:
        clock: Measures a candidate's time.
        file: Name of the file of the cache that keeps choices; ``None`` keeps none.
    """

    def __init__(self, clock: Clock, file: str | None = None) -> None:
        self.clock = clock
        self.file = file
        self._lock = RLock()
        self.choices: dict[str, Choice] = self._read()

    def fastest(self, key: str, candidates: Mapping[str, Work]) -> str:
        """Return the name of the fastest candidate for a class of shapes."""
        with self._lock:
            choice = self.choices.get(key)
            if choice is None or choice.name not in candidates:
                choice = self.choices[key] = measured(candidates, self.clock)
                self._write()
            return choice.name

    def _read(self) -> dict[str, Choice]:
        content = None if self.file is None else compiler.read_cached(self.file)
        if content is None:
            return {}
        try:
            table = json.loads(content)
            return {
                key: Choice(name, {k: float(v) for k, v in seconds.items()})
                for key, (name, seconds) in table.items()
            }
        except (ValueError, TypeError, AttributeError):
            return {}

    def _write(self) -> None:
        if self.file is None:
            return
        choices = {**self._read(), **self.choices}  # of other processes too
        table = {key: (choice.name, choice.seconds) for key, choice in choices.items()}
        compiler.write_cached(self.file, json.dumps(table).encode())

    def table(self) -> list[str]:
        """Return a line for each class: the choice, and all times in microseconds."""
        lines = []
        for key, choice in sorted(self.choices.items()):
            times = (f"{name} {t * 1e6:.1f}" for name, t in choice.seconds.items())
            lines.append(f"{key}: {choice.name} ({', '.join(times)} us)")
        return lines
