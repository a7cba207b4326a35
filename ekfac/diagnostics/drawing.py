"""What the ``plot`` methods share; matplotlib is imported when something is drawn."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """Return ``matplotlib.pyplot``.

    Raises:
        ModuleNotFoundError: Saying how to install it.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Figures are drawn with matplotlib, which is not installed: "
            "pip install matplotlib, or this package with its [examples] extra."
        ) from error
    return plt


def axes_or_new(axis: Any = None) -> Any:
    """Return ``axis``, or the axes of a new figure."""
    if axis is not None:
        return axis
    return pyplot().subplots(layout="constrained")[1]
