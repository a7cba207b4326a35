"""Where the results' ``plot`` methods draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def axes_or_new(axes: Axes | None) -> Axes:
    """Return ``axes``, or the axes of a new figure.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if axes is not None:
        return axes
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib; install it with pip install matplotlib."
        ) from error
    return plt.subplots(layout="constrained")[1]
