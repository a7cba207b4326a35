"""Monitor of a training run: diagnostics recorded within a share of its time."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from os import SEEK_END, PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ekfac.diagnostics import optimizer_health
from ekfac.errors import warn_outside
from ekfac.optim.optimizer import KroneckerOptimizer
from ekfac.state_schema import Items, MapOf, Number, Sealed
from ekfac.vectors import named_parameters

Measurement = Callable[[], Any]
# First characters that make a spreadsheet take a cell for a formula.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


class Writer(Protocol):
    """Receiver of scalars: a TensorBoard ``SummaryWriter``, or anything like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


class CsvWriter:
    """Appends ``step,name,value`` lines to a file, complete after every record.

    Args:
        path: The file; its folder must exist. An old file is continued.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        # The monitor closes it, after an error too.
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._csv = csv.writer(self._file)
        if self._file.tell() and not _ends_a_line(self.path):
            self._file.write("\r\n")  # the last was cut off
        if self._file.tell() == 0:
            self._csv.writerow(["step", "name", "value"])
            self._file.flush()

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write one line."""
        # A spreadsheet would evaluate a name such as "=..." as a formula.
        name = f"'{tag}" if tag.startswith(_FORMULAS) else tag
        self._csv.writerow([global_step, name, repr(float(scalar_value))])

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, SEEK_END)
        return file.read() in b"\r\n"


def scalars(result: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a result, by slash-separated names.

    They may be in dataclasses, mappings, sequences and tensors of one element, nested
    in any way. Entries of a sequence are called by their ``layer`` or ``name``, else by
    their place. What is no number (text, ``None``) is left out.

    Example:
        >>> import torch
        >>> dict(scalars({"a": 1, "b": [True, torch.tensor(2.5)]}, "x"))
        {'x/a': 1.0, 'x/b/0': 1.0, 'x/b/1': 2.5}
    """
    if isinstance(result, Tensor):
        if result.numel() == 1:
            yield prefix, float(result)
    elif isinstance(result, (int, float)):
        yield prefix, float(result)
    else:
        for name, value in _items(result):
            yield from scalars(value, f"{prefix}/{name}" if prefix else str(name))


def _items(result: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(result) and not isinstance(result, type):
        for each in fields(result):
            yield each.name, getattr(result, each.name)
    elif isinstance(result, Mapping):
        yield from ((str(key), value) for key, value in result.items())
    elif isinstance(result, (list, tuple)):
        for index, value in enumerate(result):
            name = getattr(value, "layer", getattr(value, "name", None))
            yield name if isinstance(name, str) else str(index), value


@dataclass
class Schedule:
    """Schedule and cost of one measurement.

    Attributes:
        measure: The measurement.
        last: Step of the last record.
        seconds: Time of the last record; 0 before the first.
        spent: Time of all records.
        since: Training time when it was added.
        taken: Number of records.
        postponed: Whether it is due and waits for time.
        error: The error that ended it, or ``None``.
    """

    measure: Measurement
    last: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    since: float = 0.0
    taken: int = 0
    postponed: bool = False
    error: str | None = None


_COUNT, _SECONDS = Number(int, 0), Number(float, 0)
STATE = Sealed(
    {
        "steps": _COUNT,
        "training": _SECONDS,
        "own": _SECONDS,
        # Of a measurement: last, seconds, spent, since, taken.
        "schedules": MapOf(Items([_COUNT, _SECONDS, _SECONDS, _SECONDS, _COUNT])),
    }
)


@dataclass
class _Clock:
    """Time of training without the monitor, and the monitor's own."""

    training: float = 0.0
    own: float = 0.0
    last: float = field(default_factory=time.perf_counter)

    def tick(self) -> None:
        """Count the time since the last tick as training."""
        now = time.perf_counter()
        self.training += now - self.last
        self.last = now

    def skip(self) -> float:
        """Count the time since the last tick as the monitor's own; return it."""
        now = time.perf_counter()
        spent, self.last = now - self.last, now
        self.own += spent
        return spent


class Monitor:
    """Records the optimizer's health, and whatever else is asked for, while training.

    It hooks the optimizer's ``step``; the loop needs no change. A step without a record
    costs at most two clock readings. A record leaves training as it was, bit for bit:
    the optimizer takes no statistics of it, random generators and buffers are put back.

    Records are kept in :attr:`records`; :meth:`series` gives one quantity over time.

    Example::

        with ekfac.Monitor(optimizer, every=100, writer="health.csv") as monitor:
            monitor.add("alignment", lambda: label_alignment(model, x[:100], y[:100]))
            for x, y in loader:
                ...
                optimizer.step()

    Args:
        optimizer: A KFAC or EKFAC.
        every: Least number of steps between two records of one quantity.
        writer: Receiver of the numbers besides :attr:`records`: the path of a CSV file,
            or an object with ``add_scalar(tag, value, step)`` such as TensorBoard's
            ``SummaryWriter``, which the caller closes. ``None``: no other.
        share: Share of the training time that the records may take. Measurements have
            equal parts of it, so that a costly one does not delay the others; a record
            that is due waits until the cost of the last one fits. The first may take
            more, and later ones wait the longer.
        updates: Whether to keep a copy of the parameters before a step that will be
            recorded, for the norms of the updates.

    Attributes:
        records: ``(step, name, value)`` in the order of recording.
        before: Name -> parameter before the step that is recorded, else ``None``.

    Raises:
        ValueError: For values out of range, or a writer that cannot write.
        OSError: If the CSV file cannot be opened.
    """

    def __init__(
        self,
        optimizer: KroneckerOptimizer,
        every: int = 100,
        *,
        writer: str | PathLike[str] | Writer | None = None,
        share: float = 0.05,
        updates: bool = True,
    ) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every!r}; it must be >= 1.")
        if not 0 < share <= 1:
            raise ValueError(f"Invalid share: {share!r}; it must be in (0, 1].")
        self._owned: CsvWriter | None = None
        if isinstance(writer, (str, PathLike)):
            writer = self._owned = CsvWriter(writer)
        elif writer is not None and not hasattr(writer, "add_scalar"):
            raise ValueError(
                f"Invalid writer: {writer!r}; give the path of a CSV file or an object "
                "with add_scalar(tag, value, step)."
            )
        self.writer: Writer | None = writer
        self.optimizer, self.every, self.share = optimizer, every, share
        self.updates = updates
        self.records: list[tuple[int, str, float]] = []
        self.before: dict[str, Tensor] | None = None
        self._schedules: dict[str, Schedule] = {}
        self._clock = _Clock()
        self._steps, self._due = 0, every
        self._chosen: list[str] = []
        self._values: dict[str, Any] = {}
        self.add("health", lambda: optimizer_health(self.optimizer, self.before))
        self._handles = [
            optimizer.register_step_pre_hook(self._step_begins),
            optimizer.register_step_post_hook(self._step_ends),
        ]

    # -- what is recorded --------------------------------------------------------------

    def add(self, name: str, measure: Measurement) -> None:
        """Record the numbers in what ``measure()`` returns, too: see :func:`scalars`.

        It is called after a step, with gradients enabled. If it raises, one warning
        says so, it is not called again, and training goes on.

        Args:
            name: The first part of the names of its numbers.
            measure: Takes no arguments; :attr:`before` has the parameters before the
                step.

        Raises:
            ValueError: If there is a measurement of that name.
        """
        if name in self._schedules:
            raise ValueError(
                f"There is a measurement called {name!r} already; remove it first or "
                "choose another name."
            )
        self._schedules[name] = Schedule(
            measure, last=self._steps, since=self._clock.training
        )

    def remove(self, name: str) -> None:
        """Record a measurement no longer.

        Raises:
            KeyError: If there is none of that name.
        """
        if name not in self._schedules:
            raise KeyError(f"{name!r}; measurements are {list(self._schedules)}")
        del self._schedules[name]

    def log(self, **values: float | Tensor) -> None:
        """Add numbers of the coming step, such as the loss: ``log(loss=loss)``.

        They are recorded if a measurement is at that step; at other steps nothing waits
        for a tensor on a device.
        """
        for name, value in values.items():
            self._values[name] = value.detach() if isinstance(value, Tensor) else value

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return steps and values of one quantity.

        Raises:
            KeyError: If nothing of that name was recorded; with the names that were.
        """
        points = [(step, value) for step, other, value in self.records if other == name]
        if not points:
            raise KeyError(f"{name!r}; recorded were {self.names()}")
        return [step for step, _ in points], [value for _, value in points]

    def names(self) -> list[str]:
        """Return the names of what was recorded."""
        return list(dict.fromkeys(name for _, name, _ in self.records))

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Schedule, cost and error of each measurement, by name."""
        return self._schedules

    @property
    def overhead(self) -> float:
        """Time of the records over the training time without them, so far."""
        clock = self._clock
        return clock.own / clock.training if clock.training > 0 else 0.0

    # -- the hooks ---------------------------------------------------------------------

    def _step_begins(self, *unused: Any) -> None:
        if self._steps + 1 < self._due:
            return
        self._clock.tick()
        self._chosen = self._affordable(self._steps + 1)
        if self._chosen and self.updates:
            parameters = named_parameters(self.optimizer.model)
            self.before = {name: p.detach().clone() for name, p in parameters.items()}
            self._schedules[self._chosen[0]].spent += self._clock.skip()

    def _step_ends(self, *unused: Any) -> None:
        self._clock.tick()
        self._steps += 1
        if self._chosen:
            self._record()
            self._clock.skip()

    def _affordable(self, step: int) -> list[str]:
        """Return the measurements that are due and fit; set the next step to look."""
        affordable = []
        live = {n: s for n, s in self._schedules.items() if s.error is None}
        part = self.share / max(1, len(live))
        for name, schedule in live.items():
            if step < schedule.last + self.every:
                continue
            room = part * (self._clock.training - schedule.since) - schedule.spent
            schedule.postponed = room <= 0 or schedule.seconds > room
            if not schedule.postponed:
                affordable.append(name)
        dues = (step if n in affordable else s.last for n, s in live.items())
        self._due = max(min(dues, default=step) + self.every, step + 1)
        return affordable

    def _record(self) -> None:
        """Take the chosen measurements and write their numbers."""
        for name in self._chosen:
            if name in self._schedules:
                self._take(name, self._schedules[name])
        for name, value in self._values.items():
            self._write(scalars(value, name))
        with self._writing():
            getattr(self.writer, "flush", bool)()
        self._values.clear()
        self._chosen, self.before = [], None

    def _take(self, name: str, schedule: Schedule) -> None:
        try:
            with self.optimizer.undisturbed(), torch.enable_grad():
                self._write(list(scalars(schedule.measure(), name)))
        except Exception as error:
            schedule.error = f"{type(error).__name__}: {error}"
            self._warn(f"gives up {name!r}", error)
        schedule.last, schedule.taken = self._steps, schedule.taken + 1
        schedule.seconds = self._clock.skip()
        schedule.spent += schedule.seconds

    def _write(self, numbers: Iterable[tuple[str, float]]) -> None:
        for name, value in numbers:
            self.records.append((self._steps, name, value))
            if self.writer is not None:
                with self._writing():
                    self.writer.add_scalar(name, value, self._steps)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Give up the writer, with a warning, if it raises inside the block."""
        try:
            yield
        except Exception as error:
            self._warn(f"writes to {self.writer!r} no longer", error)
            self.writer = None

    def _warn(self, what: str, error: Exception) -> None:
        warn_outside(
            f"The monitor {what} after an error at step {self._steps}: "
            f"{type(error).__name__}: {error}. Training goes on."
        )

    # -- its life ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: steps and times, without the records."""
        schedules = {
            name: (s.last, s.seconds, s.spent, s.since, s.taken)
            for name, s in self._schedules.items()
        }
        clock = self._clock
        return STATE.write(
            {
                "steps": self._steps,
                "training": clock.training,
                "own": clock.own,
                "schedules": schedules,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or change nothing and raise.

        Measurements are matched by name.

        Raises:
            StateMismatchError: If it is something else.
        """
        STATE.check(state)
        self._steps = state["steps"]
        self._clock = _Clock(state["training"], state["own"])
        for name, schedule in self._schedules.items():
            if name in state["schedules"]:
                last, seconds, spent, since, count = state["schedules"][name]
                schedule.last, schedule.seconds, schedule.taken = last, seconds, count
                schedule.spent, schedule.since = spent, since
        self._due = self._steps + 1

    def close(self) -> None:
        """Remove the hooks and close the CSV file, as leaving a ``with`` block does.

        The records stay readable.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._owned is not None:
            with self._writing():
                self._owned.close()
            self._owned = self.writer = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
