"""HTML page of a report."""

from __future__ import annotations

import html
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ekfac.diagnostics import (
    Health,
    LayerHealth,
    layer_health,
)
from ekfac.diagnostics.health import LayerState, Norms, assemble
from ekfac.report import figures
from ekfac.report.comparison import Comparison, compare
from ekfac.report.report_input import Subject, require_other_file

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
    """
    require_other_file(Path(subject.origin), output)
    page = render(subject, progress=progress)
    output = output.resolve()  # a link stays one
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        if output.exists():
            shutil.copymode(output, partial)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def render(subject: Subject, *, progress: bool = False) -> str:
    """Return the page as HTML that needs no other file.

    Args:
        subject: What it shows.
        progress: Whether to show a bar over the data.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figures.require_matplotlib()
    health = health_of(subject)
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


def health_of(subject: Subject) -> Health:
    """Return the state of every layer, of a live optimizer or a saved one."""
    layers, waiting, total = [], [], 0
    for name, layer in subject.layers.items():
        total += layer.bytes()
        if name in subject.dampings:
            norms = _norms(layer)
            damping = subject.dampings[name]
            layers.append(layer_health(layer, damping, subject.steps, norms))
        else:
            waiting.append(name)
    return assemble(subject.steps, layers, waiting, subject.counters, total)


def _norms(layer: LayerState) -> Norms:
    block, pack = getattr(layer, "block", None), getattr(layer, "pack", None)
    if block is None or pack is None:
        return Norms()
    tensors = [t.detach() for t in block.tensors()]
    packed = pack(dict(zip(block.parameters, tensors, strict=True)))
    return Norms(weight=float(packed.double().norm()))


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
    yield figures.overview_figure(health)
    yield "<h2>Damping and spectrum</h2>"
    yield (
        "<p>Directions whose eigenvalue is below the damping are stepped in as by "
        "gradient descent; those above it as by the natural gradient.</p>"
    )
    yield figures.damping_figure(subject.layers, subject.dampings)


def _comparison(found: Comparison) -> Iterable[str]:
    yield "<h2>Beside the data</h2>"
    for note in found.notes:
        yield f"<p>{_escape(note)}</p>"
    if found.traces:
        yield (
            f"<p>Exact traces of the {found.kind} Fisher matrix on {found.examples} "
            "examples at the present weights. The optimizer's are averages over its "
            "last batches, and running-average scalings are of mean gradients: while "
            "the loss still falls they lie above the present value. At rest EKFAC's "
            "per-example scalings have the exact trace, K-FAC's factors do not.</p>"
        )
        rows = [
            [name, *map(_number, (*traces, *(_over(t, traces[0]) for t in traces[1:])))]
            for name, *traces in found.traces
        ]
        heads = ["layer", "exact", "K-FAC", "EKFAC", "K-FAC / exact", "EKFAC / exact"]
        yield _table(heads, rows)
        yield figures.trace_figure(found.traces)
    if found.alignment is not None:
        yield (
            "<p>Centred alignment of the tangent kernel, whole and of each layer, with "
            f"the labels of {found.alignment.num_examples} examples.</p>"
        )
        yield figures.alignment_figure(found.alignment)


def _history(subject: Subject) -> Iterable[str]:
    """Yield what a monitor has recorded."""
    monitor = subject.monitor
    if monitor is None or not monitor.records:
        return
    yield "<h2>While training</h2>"
    names = monitor.names()
    for name in names:
        if not name.startswith("health/"):
            yield figures.history_figure({name: monitor.series(name)}, name)
    for title, attribute in SERIES.items():
        found = {
            layer: monitor.series(f"health/layers/{layer}/{attribute}")
            for layer in subject.layers
            if f"health/layers/{layer}/{attribute}" in names
        }
        known = {n: s for n, s in found.items() if not all(map(math.isnan, s[1]))}
        if known:
            yield figures.history_figure(known, title)


def _layers(subject: Subject) -> Iterable[str]:
    yield "<h2>Layer by layer</h2>"
    for place, (name, layer) in enumerate(subject.layers.items()):
        opened = " open" if place < OPEN_LAYERS else ""
        title = f"{name}: {_kind(layer)}" if _kind(layer) else name
        yield f"<details{opened}><summary>{_escape(title)}</summary>"
        if name in subject.dampings:
            yield figures.layer_figure(layer, subject.dampings[name])
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
    """Return the types of the layer's modules; a saved layer has none."""
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


def _over(value: float, whole: float) -> float:
    return value / whole if whole > 0 else float("nan")


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
