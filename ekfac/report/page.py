"""HTML page of a report: figures, tables, and a comparison with the exact curvature."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ekfac.diagnostics import (
    Health,
    LabelAlignment,
    LayerHealth,
    label_alignment,
)
from ekfac.diagnostics.drawing import pyplot
from ekfac.diagnostics.health import (
    LayerState,
    assemble,
    block_eigenvalues,
    in_basis,
)
from ekfac.errors import EkfacError
from ekfac.estimate import fisher
from ekfac.files import write_whole
from ekfac.report.report_input import Subject, require_other_file
from ekfac.vectors import VectorSpace, named_parameters

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


def figure(
    width: float, height: float, columns: int = 1, layout: Any = "constrained"
) -> tuple[Any, Any]:
    """Return a figure without a window, and its axes in one row."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(width, height), layout=layout)
        axes = canvas.subplots(1, columns, squeeze=False)[0]
    return canvas, axes


def image(canvas: Any, alt: str) -> str:
    """Return a figure as an ``<img>`` that contains its picture."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(alt, quote=True)
    return f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'


def spectrum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return ranks from 1 and descending values, at most ``POINTS`` of them."""
    ordered = values.flatten().double().cpu().sort(descending=True).values
    count = len(ordered)
    places = torch.logspace(0, torch.tensor(float(count)).log10(), POINTS)
    indices = places.round().long().clamp(1, count).unique() - 1
    return indices + 1, ordered[indices]


def layer_figure(layer: LayerState, damping: float) -> str:
    """Return the factors' spectra beside the scalings of one layer."""
    canvas, (left, right) = figure(9, 2.8, 2, layout=None)
    # Computing a layout takes as long as drawing: all layers share this one.
    canvas.subplots_adjust(0.08, 0.17, 0.98, 0.9, wspace=0.2)
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
    return image(canvas, f"spectra of the factors and of the block of {layer.name}")


def _log(axis: Any, which: str) -> None:
    """Make axes logarithmic, with plain numbers, since formulas take long to draw."""
    from matplotlib.ticker import FormatStrFormatter, NullLocator

    for side in which:
        getattr(axis, f"set_{side}scale")("log")
        ticks = getattr(axis, f"{side}axis")
        ticks.set_major_formatter(FormatStrFormatter("%g"))
        ticks.set_minor_locator(NullLocator())


def _curve(axis: Any, values: Tensor, label: str, style: str = "-") -> None:
    ranks, ordered = spectrum(values)
    # A logarithmic axis cannot show zero.
    floor = float(ordered[0]) * 1e-14
    positive = ordered > max(floor, 0.0)
    axis.plot(ranks[positive], ordered[positive], style, label=label, lw=1.4)


def overview_figure(health: Health) -> str:
    """Return staleness, distance to K-FAC and share above damping, by layer."""
    shown = {
        "basis: off-diagonal share": ("off_diagonal_A", "off_diagonal_G"),
        "relative distance to K-FAC": ("kfac_gap",),
        "share of directions above damping": ("effective_share",),
    }
    names = [layer.layer for layer in health.layers]
    canvas, axes = figure(10, 1.2 + 0.28 * len(names), len(shown))
    for axis, (title, attributes) in zip(axes, shown.items(), strict=True):
        height = 0.8 / len(attributes)
        for i, attribute in enumerate(attributes):
            values = [getattr(layer, attribute) for layer in health.layers]
            rows = [row + i * height for row in range(len(names))]
            axis.barh(rows, values, height, label=attribute[-1], align="edge")
        axis.set(title=title, xlim=(0, 1), ylim=(len(names), -0.2))
        axis.set_yticks([row + 0.4 for row in range(len(names))], names)
        if axis is not axes[0]:
            axis.set_yticklabels([])
        if len(attributes) > 1:
            axis.legend(fontsize=8, loc="lower right")
    return image(canvas, "staleness, distance to K-FAC and damping of every layer")


def damping_figure(
    layers: Mapping[str, LayerState], dampings: Mapping[str, float]
) -> str:
    """Return the range of every layer's eigenvalues, with the damping in it."""
    names = list(dampings)
    canvas, (axis,) = figure(10, 1.2 + 0.28 * len(names))
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for row, name in enumerate(names):
        values = block_eigenvalues(layers[name]).flatten().double().cpu()
        ordered = values[values > 0].sort().values
        if not len(ordered):
            continue
        at = (levels * (len(ordered) - 1)).round().long()
        low, q1, median, q3, high = ordered[at].tolist()
        axis.plot([low, high], [row, row], color="tab:blue", lw=1)
        axis.plot([q1, q3], [row, row], color="tab:blue", lw=5, alpha=0.6)
        axis.plot(median, row, "|", color="white", ms=7)
        axis.plot(float(values.mean()), row, "o", color="tab:blue", ms=4)
        axis.plot(float(ordered[-1]), row, ">", color="tab:gray", ms=4)
        axis.plot(dampings[name], row, "d", color="tab:red", ms=6)
    axis.set(ylim=(len(names) - 0.5, -0.5))
    _log(axis, "x")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(
        "eigenvalues: 5 to 95 % (line), 25 to 75 % (bar), mean (dot), largest "
        "(triangle); damping (red diamond)"
    )
    return image(canvas, "eigenvalues of every layer and its damping")


def trace_figure(traces: Sequence[tuple[str, float, float, float]]) -> str:
    """Return K-FAC's and EKFAC's trace over the exact one, by layer."""
    names = [name for name, *_ in traces]
    canvas, (axis,) = figure(7, 1.2 + 0.3 * len(names))
    for i, (label, marker) in enumerate((("K-FAC", "s"), ("EKFAC", "o"))):
        pairs = [(exact, approximate[i]) for _, exact, *approximate in traces]
        ratios = [trace / exact if exact > 0 else math.nan for exact, trace in pairs]
        axis.plot(ratios, range(len(names)), marker, label=label, ms=6)
    axis.axvline(1, color="black", lw=0.8)
    axis.set(ylim=(len(names) - 0.5, -0.5))
    _log(axis, "x")
    axis.set_xlabel("trace over the exact trace on the data")
    axis.set_yticks(range(len(names)), names)
    axis.legend(fontsize=8)
    return image(canvas, "traces of K-FAC and EKFAC relative to the exact ones")


def alignment_figure(alignment: LabelAlignment) -> str:
    """Return the alignment with the labels, by layer."""
    canvas, (axis,) = figure(7, 1.2 + 0.3 * (1 + len(alignment.layers)))
    import matplotlib

    with matplotlib.rc_context(STYLE):
        alignment.plot(axis)
    return image(canvas, "alignment of the tangent kernel with the labels, by layer")


def history_figure(
    series: Mapping[str, tuple[list[int], list[float]]], title: str
) -> str:
    """Return quantities over the steps."""
    canvas, (axis,) = figure(7, 2.6)
    for name, (steps, values) in series.items():
        axis.plot(steps, values, ".-", label=name, lw=1.2, ms=4)
    axis.set(title=title, xlabel="step")
    finite = [v for _, values in series.values() for v in values if not math.isnan(v)]
    if finite and min(finite) > 0 and max(finite) > 10 * min(finite):
        _log(axis, "y")
    if len(series) > 1:
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return image(canvas, f"{title} over the steps")


EXAMPLES = 1000  # about so many are compared at most
KERNEL = 1000  # rows of the tangent kernel, examples times outputs


@dataclass(frozen=True)
class Comparison:
    """Comparison of the factors with the data.

    Attributes:
        kind: Kind of the Fisher matrix that has the exact traces.
        examples: Number of examples.
        traces: ``(layer, exact, K-FAC's, EKFAC's)``; EKFAC's is nan without scalings.
        alignment: Alignment of the tangent kernel with the labels, or ``None``.
        notes: What could not be compared, and why.
    """

    kind: str
    examples: int
    traces: list[tuple[str, float, float, float]]
    alignment: LabelAlignment | None
    notes: list[str]


def compare(subject: Subject, *, progress: bool = False) -> Comparison | None:
    """Return the comparison, or ``None`` without a model and data.

    The exact traces are those of the Fisher matrix that the optimizer estimates, on the
    data and at the present weights; its averages are of the last batches.
    """
    if subject.model is None or subject.data is None:
        return None
    batches = _taken(subject.data)
    notes: list[str] = []
    settings = subject.optimizer.options
    kind = "empirical" if settings.fisher == "empirical" else "exact"
    traces: list[tuple[str, float, float, float]] = []
    try:
        diagonal = fisher(
            subject.model,
            batches,
            "diagonal",
            kind=kind,  # type: ignore[arg-type]
            likelihood=settings.likelihood,
            loss_fn=subject.loss_fn if kind == "empirical" else None,
            progress=progress,
        ).diagonal()
        traces = _traces(subject, VectorSpace.of(diagonal).flat(diagonal))
    except (EkfacError, ValueError, RuntimeError) as error:
        notes.append(f"No exact traces: {error}")
    alignment = None
    try:
        alignment = _alignment(subject, batches[0])
    except (EkfacError, ValueError, RuntimeError, TypeError) as error:
        notes.append(f"No alignment with the labels: {error}")
    count = sum(_size(batch) for batch in batches)
    return Comparison(kind, count, traces, alignment, notes)


def _taken(data: Iterable[Any]) -> list[Any]:
    """Return the first batches, up to about ``EXAMPLES`` examples."""
    batches, count = [], 0
    for batch in itertools.islice(data, EXAMPLES):
        batches.append(batch)
        count += _size(batch)
        if count >= EXAMPLES:
            break
    return batches


def _size(batch: Any) -> int:
    """Return how many examples a batch has."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if hasattr(batch, "values") else batch))
    return len(batch)


def _traces(
    subject: Subject, diagonal: Tensor
) -> list[tuple[str, float, float, float]]:
    assert subject.model is not None
    parameters = named_parameters(subject.model)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    exact = VectorSpace.of(trained).vector(diagonal)
    rows = []
    for name, layer in subject.optimizer.curvature.items():
        A, G = layer.A, layer.G
        if not layer.ready or A is None or G is None:
            continue
        vectors = {n: exact[n].detach() for n in layer.parameter_names}
        a, g = in_basis(A, layer.Q_A)[0], in_basis(G, layer.Q_G)[0]
        kfac = float((a.sum(dim=-1) * g.sum(dim=-1)).sum())
        s = layer.s
        ekfac = float("nan") if s is None else float(s.sum())
        rows.append((name, float(layer.pack(vectors).sum()), kfac, ekfac))
    return rows


def _alignment(subject: Subject, batch: Any) -> LabelAlignment:
    x, y = batch
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError("inputs and targets must be tensors")
    assert subject.model is not None
    with torch.no_grad(), subject.optimizer.capture.paused():
        device = next(subject.model.parameters()).device
        outputs = subject.model(x[:2].to(device))
    size = max(2, KERNEL // max(1, outputs[0].numel()))
    return label_alignment(subject.model, x[:size], y[:size])


CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem;
       margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; }
h2 { font-size: 1.2rem; margin-top: 2.4rem; border-bottom: 1px solid #ddd; }
p.origin { color: #666; margin-top: 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 0.8rem 0; }
th, td { padding: 0.25rem 0.55rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #eee; font-variant-numeric: tabular-nums; }
th { background: #f5f5f5; font-weight: 600; white-space: normal;
     vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
ul.findings { background: #fff6e5; border-left: 4px solid #e6a23c;
              padding: 0.6rem 1rem 0.6rem 2rem; }
dl { font-size: 13px; color: #444; columns: 2; column-gap: 2rem; }
dt { font-weight: 600; break-after: avoid; }
dd { margin: 0 0 0.4rem 0; }
img { max-width: 100%; height: auto; }
details { margin: 0.4rem 0; border: 1px solid #e4e4e4; border-radius: 4px;
          padding: 0.3rem 0.8rem; }
summary { cursor: pointer; font-weight: 600; }
"""

# Heading -> attribute of LayerHealth and what it means.
COLUMNS = {
    "layer": ("layer", ""),
    "block": ("block", "blocks x outputs x inputs, bias included"),
    "basis age": ("basis_age", "steps since the basis was refreshed or found to fit"),
    "off-diag. A": (
        "off_diagonal_A",
        "share of the input factor that its basis leaves off the diagonal",
    ),
    "off-diag. G": ("off_diagonal_G", "likewise of the output-gradient factor"),
    "drift": (
        "drift",
        "relative change of the factors' diagonals in the basis since its refresh: "
        "what K-FAC's eigenvalues have missed",
    ),
    "gap to K-FAC": (
        "kfac_gap",
        "relative distance of EKFAC's matrix to the nearest multiple of K-FAC's",
    ),
    "trace ratio": ("trace_ratio", "trace of K-FAC's matrix over EKFAC's"),
    "mean": ("mean_scaling", "mean eigenvalue of the block"),
    "damping": ("damping", "added to every eigenvalue"),
    "below damping": ("damped_share", "share of the eigenvalues below the damping"),
    "effective": (
        "effective_share",
        "mean of s / (s + damping): share of directions that curvature decides",
    ),
    "condition": ("condition", "largest damped eigenvalue over the smallest"),
    "|w|": ("weight_norm", "norm of the parameters"),
    "KiB": ("bytes", "memory of factors, bases and scalings"),
}
OPEN_LAYERS = 6
SERIES = {
    "off-diagonal share of A in its basis": "off_diagonal_A",
    "off-diagonal share of G in its basis": "off_diagonal_G",
    "relative distance to K-FAC": "kfac_gap",
    "mean scaling": "mean_scaling",
    "update over weight norm": "update_share",
}


def write_report(subject: Subject, output: Path, *, progress: bool = False) -> None:
    """Write the page.

    Args:
        subject: What it shows.
        output: The file; it is replaced in one step once the page is complete.
        progress: Whether to show a bar over the data.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ReportError: If ``output`` is the file that the subject comes from.
        OSError: If the file cannot be written.
    """
    require_other_file(Path(subject.origin), output)
    page = render(subject, progress=progress)
    write_whole(output.resolve(), page.encode())  # a link stays one


def render(subject: Subject, *, progress: bool = False) -> str:
    """Return the page as HTML that needs no other files.

    Args:
        subject: What it shows.
        progress: Whether to show a bar over the data.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    pyplot()
    health = assemble(subject.layers, subject.dampings, subject.steps, subject.counters)
    comparison = compare(subject, progress=progress)
    parts = [
        *_head(subject, health),
        *_health(subject, health),
        *([] if comparison is None else _comparison(comparison)),
        *_history(subject),
        *_layers(subject),
        "</body></html>",
    ]
    return "\n".join(parts)


def _head(subject: Subject, health: Health) -> Iterable[str]:
    title = "Curvature report"
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f"<style>{CSS}</style></head><body>"
    yield f"<h1>{title}</h1>"
    yield (
        f'<p class="origin">{_escape(subject.origin)}: {subject.steps} steps, '
        f"{len(subject.layers)} layers, {_bytes(health.bytes)} of curvature</p>"
    )
    for note in subject.notes:
        yield f"<p>{_escape(note)}</p>"
    if subject.groups:
        names = list(dict.fromkeys(name for group in subject.groups for name in group))
        rows = [
            [str(i), *(_number(group.get(name)) for name in names)]
            for i, group in enumerate(subject.groups)
        ]
        yield _table(["param group", *names], rows)
    if subject.counters:
        yield _table(
            ["decompositions", *subject.counters],
            [["count", *map(str, subject.counters.values())]],
        )


def _health(subject: Subject, health: Health) -> Iterable[str]:
    yield "<h2>Health of the curvature</h2>"
    if health.findings:
        items = "".join(f"<li>{_escape(text)}</li>" for text in health.findings)
        yield f'<ul class="findings">{items}</ul>'
    if not health.layers:
        yield "<p>No layer has a basis yet; the optimizer has done no step.</p>"
        return
    shown = {
        heading: (attribute, text)
        for heading, (attribute, text) in COLUMNS.items()
        if not all(_missing(getattr(row, attribute)) for row in health.layers)
    }
    rows = [
        [_cell(row, attribute) for attribute, _ in shown.values()]
        for row in health.layers
    ]
    yield _table(list(shown), rows)
    terms = [
        f"<dt>{_escape(heading)}</dt><dd>{_escape(text)}</dd>"
        for heading, (_, text) in shown.items()
        if text
    ]
    yield f"<dl>{''.join(terms)}</dl>"
    yield overview_figure(health)
    yield "<h2>Damping and spectrum</h2>"
    yield (
        "<p>The step treats directions whose eigenvalue is below the damping alike, as "
        "if they had no curvature; in those above it the curvature decides.</p>"
    )
    yield damping_figure(subject.layers, subject.dampings)


def _comparison(comparison: Comparison) -> Iterable[str]:
    yield "<h2>Beside the data</h2>"
    for note in comparison.notes:
        yield f"<p>{_escape(note)}</p>"
    if comparison.traces:
        yield (
            f"<p>Exact traces of the {comparison.kind} Fisher matrix on "
            f"{comparison.examples} examples at the present weights. The optimizer's "
            "are averages over its last batches, and running-average scalings are of "
            "mean gradients: while the loss falls they lie above the present value. At "
            "rest EKFAC's per-example scalings have the exact trace; K-FAC's factors "
            "have not.</p>"
        )
        rows = [
            [name, *map(_number, (*traces, *(_over(t, traces[0]) for t in traces[1:])))]
            for name, *traces in comparison.traces
        ]
        heads = ["layer", "exact", "K-FAC", "EKFAC", "K-FAC / exact", "EKFAC / exact"]
        yield _table(heads, rows)
        yield trace_figure(comparison.traces)
    if comparison.alignment is not None:
        yield (
            "<p>Centred alignment of the tangent kernel, whole and of each layer, with "
            f"the labels of {comparison.alignment.num_examples} examples.</p>"
        )
        yield alignment_figure(comparison.alignment)


def _history(subject: Subject) -> Iterable[str]:
    """Yield figures of a monitor's records."""
    monitor = subject.monitor
    if monitor is None or not monitor.records:
        return
    yield "<h2>While training</h2>"
    names = monitor.names()
    for name in names:
        if not name.startswith("health/"):
            yield history_figure({name: monitor.series(name)}, name)
    for title, attribute in SERIES.items():
        series = {
            layer: monitor.series(f"health/layers/{layer}/{attribute}")
            for layer in subject.layers
            if f"health/layers/{layer}/{attribute}" in names
        }
        recorded = {n: s for n, s in series.items() if not all(map(math.isnan, s[1]))}
        if recorded:
            yield history_figure(recorded, title)


def _layers(subject: Subject) -> Iterable[str]:
    yield "<h2>Layer by layer</h2>"
    for index, (name, layer) in enumerate(subject.layers.items()):
        opened = " open" if index < OPEN_LAYERS else ""
        title = f"{name}: {_kind(layer)}" if _kind(layer) else name
        yield f"<details{opened}><summary>{_escape(title)}</summary>"
        if name in subject.dampings:
            yield layer_figure(layer, subject.dampings[name])
        else:
            yield "<p>No basis yet.</p>"
        yield "</details>"


# -- pieces ----------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{line(heads, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def _kind(layer: LayerState) -> str:
    """Return the types of the layer's modules, ``""`` for a saved layer."""
    uses = getattr(getattr(layer, "block", None), "uses", ())
    return ", ".join(type(use.adapter.module).__name__ for use in uses)


def _cell(row: LayerHealth, attribute: str) -> str:
    value = getattr(row, attribute)
    return f"{value / 1024:.0f}" if attribute == "bytes" else _number(value)


def _number(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return "none" if value is None else str(value)


def _missing(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _over(value: float, denominator: float) -> float:
    return value / denominator if denominator > 0 else float("nan")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
