"""Helpers of the ``plot`` methods; matplotlib is imported when something is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
else:
    Axes = Any


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


def axes_or_new(axes: Axes | None = None) -> Axes:
    """Return ``axes``, or those of a new figure."""
    if axes is not None:
        return axes
    new_axes: Axes = pyplot().subplots(layout="constrained")[1]
    return new_axes
