"""Comparison for a report with data: the exact curvature beside the factors'."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ekfac.diagnostics import LabelAlignment, label_alignment
from ekfac.diagnostics.health import in_basis
from ekfac.errors import EkfacError
from ekfac.estimate import fisher
from ekfac.report.report_input import Subject
from ekfac.vectors import VectorSpace, named_parameters

# Examples that are compared, at most about so many.
EXAMPLES = 1000
# Rows of the tangent kernel, examples times outputs.
KERNEL = 1000


@dataclass(frozen=True)
class Comparison:
    """The factors beside the data.

    Attributes:
        kind: Which Fisher matrix the exact traces are of.
        examples: On how many examples.
        traces: ``(layer, exact, K-FAC's, EKFAC's)``; EKFAC's is nan without scalings.
        alignment: Of the tangent kernel with the labels, or ``None``.
        notes: What could not be compared, and why.
    """

    kind: str
    examples: int
    traces: list[tuple[str, float, float, float]]
    alignment: LabelAlignment | None
    notes: list[str]


def compare(subject: Subject, *, progress: bool = False) -> Comparison | None:
    """Return the comparison, or ``None`` without a model and data.

    The exact traces are of the Fisher matrix that the optimizer estimates, on the data
    and at the weights of now; its averages are of the last batches.

    Args:
        subject: With ``optimizer``, ``model`` and ``data``.
        progress: Whether to show a bar.
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
    every = named_parameters(subject.model)
    trained = {name: p for name, p in every.items() if p.requires_grad}
    exact = VectorSpace.of(trained).vector(diagonal)
    rows = []
    for name, layer in subject.optimizer.curvature.items():
        A, G = layer.A, layer.G
        if not layer.ready or A is None or G is None:
            continue
        mine = {n: exact[n].detach() for n in layer.parameter_names}
        a, g = in_basis(A, layer.Q_A)[0], in_basis(G, layer.Q_G)[0]
        kfac = float((a.sum(dim=-1) * g.sum(dim=-1)).sum())
        s = layer.s
        ekfac = float("nan") if s is None else float(s.sum())
        rows.append((name, float(layer.pack(mine).sum()), kfac, ekfac))
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
