"""The package's exceptions: what was found, what is allowed, what to do."""

import sys
import warnings


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
    """A saved state belongs to another model or another configuration."""


class RankError(EkfacError, RuntimeError):
    """A rank takes no part in a step any more, or takes part with another state."""


class EkfacWarning(UserWarning):
    """Something works, but not in the way one would expect."""


def warn_outside(message: str) -> None:
    """Warn with ``message`` at the line outside of this package that led here."""
    frame, level = sys._getframe(), 1
    while frame.f_back and str(frame.f_globals.get("__name__")).startswith("ekfac."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, EkfacWarning, stacklevel=level)
