"""From results to named numbers, and where the numbers go."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


class Writer(Protocol):
    """Where scalars go: a TensorBoard ``SummaryWriter``, or anything like it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number."""


class CsvWriter:
    """Appends ``step,name,value`` lines to a file, complete after every record.

    Args:
        path: The file; its folder must exist. An old file is continued.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)
        # Opened for as long as the monitor lives: closed by it, also after an error.
        self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._csv = csv.writer(self._file)
        if self._file.tell() == 0:
            self._csv.writerow(["step", "name", "value"])
            self._file.flush()

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write one line."""
        self._csv.writerow([global_step, tag, repr(float(scalar_value))])

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def scalars(result: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a result, by slash-separated names.

    Of dataclasses, mappings, sequences and tensors of one element, nested in any way;
    entries of a sequence are called by their ``layer`` or ``name`` where they have one,
    else by their place. What is no number (text, ``None``) is left out.

    Args:
        result: What a diagnostic returned.
        prefix: Before every name.

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
        for place, value in enumerate(result):
            name = getattr(value, "layer", getattr(value, "name", None))
            yield name if isinstance(name, str) else str(place), value
