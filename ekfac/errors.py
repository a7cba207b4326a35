"""Exceptions and warnings: what was found, what is allowed, what to do."""

import sys
import warnings
from collections.abc import Sequence


class EkfacError(Exception):
    """Base class of every error that this package raises on purpose."""


class CaptureError(EkfacError, RuntimeError):
    """A layer's inputs or output gradients could not be recorded."""


class UnsupportedLayerError(EkfacError, TypeError):
    """A layer has no adapter, or its adapter refuses its settings."""


class UnsupportedOperationError(EkfacError, NotImplementedError):
    """A structure lacks an operation; the message names one that has it."""


class NotReadyError(EkfacError, RuntimeError):
    """A statistic was asked for before it was computed."""


class StateMismatchError(EkfacError, ValueError):
    """A saved state belongs to another model or configuration, or is damaged.

    Attributes:
        key: Path of the entry, such as ``"curvature.fc.A"``; may be empty.
        found: What the entry is.
        expected: What it has to be.
    """

    key = found = expected = ""

    @classmethod
    def at(
        cls, key: str, found: str, expected: str, advice: str = ""
    ) -> "StateMismatchError":
        """Return the error about one entry.

        Args:
            key: Path of the entry.
            found: What the entry is.
            expected: What it has to be.
            advice: What to do, as a sentence.
        """
        entry = repr(key) if key else "it"
        message = f"the saved state does not fit: {entry} is {found}, not {expected}"
        error = cls(f"{message}. {advice}" if advice else message)
        error.key, error.found, error.expected = key, found, expected
        return error


class RankError(EkfacError, RuntimeError):
    """A rank takes no part in a step, or takes part with another state."""


class EkfacWarning(UserWarning):
    """Something works, but not as one would expect."""


def listed(names: Sequence[str]) -> str:
    """Return the first four names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def warn_outside(message: str) -> None:
    """Warn with ``message`` at the innermost line outside of ekfac and torch."""
    frame, level = sys._getframe(), 1
    inside = ("ekfac.", "torch.")
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, EkfacWarning, stacklevel=level)
