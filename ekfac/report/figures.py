"""Figures of a report, as images inside the page."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac.diagnostics import Health, LabelAlignment
from ekfac.diagnostics.health import LayerState, block_eigenvalues

# Points of a curve; a longer spectrum is thinned.
POINTS = 300
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ekfac",
}


def require_matplotlib() -> None:
    """Raise unless there is matplotlib.

    Raises:
        ModuleNotFoundError: Saying how to install it.
    """
    from ekfac.diagnostics.drawing import pyplot

    pyplot()


def figure(
    width: float, height: float, columns: int = 1, layout: Any = "constrained"
) -> tuple[Any, Any]:
    """Return a figure without a window, and its axes in one row."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=(width, height), layout=layout)
        axes = made.subplots(1, columns, squeeze=False)[0]
    return made, axes


def image(made: Any, alt: str) -> str:
    """Return a figure as an ``<img>`` that needs no other file.

    Args:
        made: The figure.
        alt: What it shows, in words.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(alt, quote=True)
    return f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'


def spectrum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ranks from 1 and descending values, at most ``POINTS`` of them."""
    ordered = values.flatten().double().cpu().sort(descending=True).values
    count = len(ordered)
    places = torch.logspace(0, torch.tensor(float(count)).log10(), POINTS)
    chosen = places.round().long().clamp(1, count).unique() - 1
    return chosen + 1, ordered[chosen]


def layer_figure(layer: LayerState, damping: float) -> str:
    """Return the factors' spectra beside the scalings of one layer."""
    made, (left, right) = figure(9, 2.8, 2, layout=None)
    # Finding a layout takes as long as drawing, and all layers have the same.
    made.subplots_adjust(0.08, 0.17, 0.98, 0.9, wspace=0.2)
    for name, values in (("A", layer.eigenvalues_A), ("G", layer.eigenvalues_G)):
        _curve(left, values, f"{name}, {values.shape[-1]} dimensions")
    left.set(title="eigenvalues of the factors", xlabel="rank")
    kronecker = layer.eigenvalues_G.unsqueeze(-1) * layer.eigenvalues_A.unsqueeze(-2)
    if layer.s is not None:
        _curve(right, block_eigenvalues(layer), "EKFAC scalings")
    _curve(right, kronecker, "products of the factors' (K-FAC)", style="--")
    if damping > 0:
        right.axhline(damping, color="tab:red", lw=1, label="damping")
    right.set(title="eigenvalues of the block", xlabel="rank")
    for axis in (left, right):
        _log(axis, "xy")
        axis.legend(fontsize=8)
    return image(made, f"spectra of the factors and of the block of {layer.name}")


def _log(axis: Any, which: str) -> None:
    """Make axes logarithmic; formulas as labels would take most of the time."""
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    for side in which:
        getattr(axis, f"set_{side}scale")("log")
        ticks = getattr(axis, f"{side}axis")
        ticks.set_major_formatter(FormatStrFormatter("%g"))
        ticks.set_minor_locator(NullLocator())


def _curve(axis: Any, values: Tensor, label: str, style: str = "-") -> None:
    ranks, ordered = spectrum(values)
    # What is zero, or as good as zero, has no place on a log axis.
    floor = float(ordered[0]) * 1e-14
    kept = ordered > max(floor, 0.0)
    axis.plot(ranks[kept], ordered[kept], style, label=label, lw=1.4)


def overview_figure(health: Health) -> str:
    """Return what can be compared between layers."""
    shown = {
        "basis: off-diagonal share": ("off_diagonal_A", "off_diagonal_G"),
        "relative distance to K-FAC": ("kfac_gap",),
        "share of directions above damping": ("effective_share",),
    }
    names = [layer.layer for layer in health.layers]
    made, axes = figure(10, 1.2 + 0.28 * len(names), len(shown))
    for axis, (title, attributes) in zip(axes, shown.items(), strict=True):
        height = 0.8 / len(attributes)
        for i, attribute in enumerate(attributes):
            values = [getattr(layer, attribute) for layer in health.layers]
            places = [place + i * height for place in range(len(names))]
            axis.barh(places, values, height, label=attribute[-1], align="edge")
        axis.set(title=title, xlim=(0, 1), ylim=(len(names), -0.2))
        axis.set_yticks([place + 0.4 for place in range(len(names))], names)
        if axis is not axes[0]:
            axis.set_yticklabels([])
        if len(attributes) > 1:
            axis.legend(fontsize=8, loc="lower right")
    return image(made, "staleness, distance to K-FAC and damping of every layer")


def damping_figure(
    layers: Mapping[str, LayerState], dampings: Mapping[str, float]
) -> str:
    """Return the range of every layer's eigenvalues, with the damping in it."""
    names = list(dampings)
    made, (axis,) = figure(10, 1.2 + 0.28 * len(names))
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for place, name in enumerate(names):
        values = block_eigenvalues(layers[name]).flatten().double().cpu()
        ordered = values[values > 0].sort().values
        if not len(ordered):
            continue
        at = (levels * (len(ordered) - 1)).round().long()
        low, q1, median, q3, high = ordered[at].tolist()
        axis.plot([low, high], [place, place], color="tab:blue", lw=1)
        axis.plot([q1, q3], [place, place], color="tab:blue", lw=5, alpha=0.6)
        axis.plot(median, place, "|", color="white", ms=7)
        axis.plot(float(values.mean()), place, "o", color="tab:blue", ms=4)
        axis.plot(float(ordered[-1]), place, ">", color="tab:gray", ms=4)
        axis.plot(dampings[name], place, "d", color="tab:red", ms=6)
    axis.set(ylim=(len(names) - 0.5, -0.5))
    _log(axis, "x")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(
        "eigenvalues: 5 to 95 % (line), 25 to 75 % (bar), mean (dot), largest "
        "(triangle); damping (red diamond)"
    )
    return image(made, "eigenvalues of every layer and its damping")


def trace_figure(traces: Sequence[tuple[str, float, float, float]]) -> str:
    """Return K-FAC's and EKFAC's trace over the exact one, by layer."""
    names = [name for name, *_ in traces]
    made, (axis,) = figure(7, 1.2 + 0.3 * len(names))
    for i, (label, marker) in enumerate((("K-FAC", "s"), ("EKFAC", "o"))):
        found = [(exact, approximate[i]) for _, exact, *approximate in traces]
        ratios = [trace / exact if exact > 0 else math.nan for exact, trace in found]
        axis.plot(ratios, range(len(names)), marker, label=label, ms=6)
    axis.axvline(1, color="black", lw=0.8)
    axis.set(ylim=(len(names) - 0.5, -0.5))
    _log(axis, "x")
    axis.set_xlabel("trace over the exact trace on the data")
    axis.set_yticks(range(len(names)), names)
    axis.legend(fontsize=8)
    return image(made, "traces of K-FAC and EKFAC relative to the exact ones")


def alignment_figure(found: LabelAlignment) -> str:
    """Return the alignment with the labels, by layer."""
    made, (axis,) = figure(7, 1.2 + 0.3 * (1 + len(found.layers)))
    import matplotlib

    with matplotlib.rc_context(STYLE):
        found.plot(axis)
    return image(made, "alignment of the tangent kernel with the labels, by layer")


def history_figure(
    series: Mapping[str, tuple[list[int], list[float]]], title: str
) -> str:
    """Return quantities over the steps."""
    made, (axis,) = figure(7, 2.6)
    for name, (steps, values) in series.items():
        axis.plot(steps, values, ".-", label=name, lw=1.2, ms=4)
    axis.set(title=title, xlabel="step")
    every = [v for _, values in series.values() for v in values if not math.isnan(v)]
    if every and min(every) > 0 and max(every) > 10 * min(every):
        _log(axis, "y")
    if len(series) > 1:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return image(made, f"{title} over the steps")
