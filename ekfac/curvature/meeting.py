"""Where ranks meet at a step: statistics are added, bases and directions shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.curvature.basis_update import BasisUpdate
from ekfac.curvature.distributed import Ranks, Term
from ekfac.curvature.eigenbasis import apply_update_, basis_updates, factors_of
from ekfac.curvature.overlap import Part, Round, of_gradients, terms_of
from ekfac.curvature.state import LayerCurvature
from ekfac.curvature.statistics import BatchStatistics, FactorSums

if TYPE_CHECKING:
    from ekfac.curvature.collector import Collector


@dataclass(frozen=True)
class Meeting:
    """What a rank knows of the others after they added their statistics.

    Attributes:
        spread: ``sum_r N_r / T_r^2`` over the ranks' examples and loss terms, ``None``
            where no rank saw outputs.
        scales: Layer -> what this rank's recorded gradients are multiplied with to be
            those of the examples' own losses.
        present: Layers of which some rank has factor sums.
        scaled: Layers of which some rank has sums for the scalings.
        bad: Layers of which some rank's sums are not finite.
    """

    spread: Tensor | None
    scales: Mapping[str, Tensor]
    present: frozenset[str]
    scaled: frozenset[str]
    bad: frozenset[str]


# What every rank says of a layer: has it factor sums as it is and transposed, over how
# many rows each, how many examples did it count, will it have scalings, is it finite.
FIELDS = 7


def meet_(collector: Collector, ranks: Ranks, loss_scale: Tensor | float) -> Meeting:
    """Replace the window's factor sums by those over all ranks, counts included.

    Recorded gradients are those of the rank's own loss: before they are added they are
    scaled to those of the examples' own losses.

    Returns:
        What is known of the others.
    """
    for statistics in collector.statistics.values():
        for sums in statistics.sums.values():
            sums.settle()  # what convolutions have left for the end travels too
    plan, curvature = collector.plan, collector.curvature
    taken = plan.factors or plan.scalings
    layers = list(curvature.values()) if taken else []
    local = {la.name: collector.scale(la, loss_scale)[1] for la in layers}
    rounds = collector.rounds
    reported = [] if rounds is None else rounds.report(collector)
    said = ranks.total(_statement(collector, ranks, reported, layers))
    seen, examples, terms, spread = said[:4].unbind()
    outputs = bool(seen > 0)
    common = 1 / loss_scale if collector.recipe.empirical else 1.0
    if collector.recipe.empirical and collector.recipe.reduction == "global_mean":
        common = terms.clamp(min=1) / (ranks.size * loss_scale)
        local = dict.fromkeys(local, common)
    begun, about = said[4:].split([len(reported), FIELDS * len(layers)])
    found = {
        la.name: row
        for la, row in zip(layers, about.view(-1, FIELDS).tolist(), strict=True)
    }
    early = None if rounds is None else rounds.agree(collector, begun.tolist())
    if early is None:
        summed = _sum(collector, ranks, found, local)
    else:
        summed = _finish(collector, ranks, early, common)
    _take_over(collector, ranks, found, summed)
    if outputs:
        collector.examples, collector.terms = examples, terms
    return Meeting(
        spread if outputs else None,
        local,
        frozenset(name for name, row in found.items() if any(row[:2])),
        frozenset(name for name, row in found.items() if row[5]),
        frozenset(name for name, row in found.items() if row[6]),
    )


def _statement(
    collector: Collector,
    ranks: Ranks,
    reported: Sequence[float],
    layers: Sequence[LayerCurvature],
) -> Tensor:
    """Return what this rank has: counts, rounds, ``FIELDS`` numbers for every layer."""
    values: list[Tensor | float] = [0.0] * 4
    if collector.examples is not None and collector.terms is not None:
        n, t = collector.examples.double(), collector.terms.double()
        values = [1.0, n, t, n / t.clamp(min=1).square()]
    values += reported
    for layer in layers:
        found = collector.statistics.get(layer.name)
        if found is None:
            values += [0.0] * FIELDS
            continue
        sums = [found.sums.get(transposed) for transposed in (False, True)]
        finite = [s.finite() for s in sums if s is not None]
        values += [
            *(float(s is not None) for s in sums),
            *(0.0 if s is None else s.rows for s in sums),
            found.examples,
            float(bool(found.queue) or found.scalings is not None),
            0.0 if not finite else 1 - torch.stack(finite).all().double(),
        ]
    return torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=ranks.device) for v in values]
    )


def _parts(found: Mapping[str, Sequence[float]]) -> Iterator[tuple[Part, float]]:
    """Yield the factor sums that some rank has, with their rows on all of them."""
    for name, row in found.items():
        for transposed in (False, True):
            if row[transposed]:
                yield Part(name, transposed), row[2 + transposed]


def _sum(
    collector: Collector,
    ranks: Ranks,
    found: Mapping[str, Sequence[float]],
    scales: Mapping[str, Tensor],
) -> dict[Part, tuple[Term, Term]]:
    """Add up the ranks' factor sums that any of them has."""
    pairs = {
        part: terms_of(collector, ranks, part, scales[part.name])
        for part, _ in _parts(found)
    }
    ranks.sum_([term for pair in pairs.values() for term in pair])
    return pairs


def _finish(
    collector: Collector, ranks: Ranks, early: Round, common: Tensor | float
) -> dict[Part, tuple[Term, Term]]:
    """Wait for sums that left before the step, and scale them."""
    for one in early.sent:
        ranks.end_sum_(one)
    for part, (a, g) in early.terms.items():
        scaled = (a if of_gradients(collector, part) else g).tensor
        scaled.mul_(torch.as_tensor(common).square().to(scaled))
    return early.terms


def _take_over(
    collector: Collector,
    ranks: Ranks,
    found: Mapping[str, Sequence[float]],
    summed: Mapping[Part, tuple[Term, Term]],
) -> None:
    """Put the sums over ranks in the place of this rank's own."""
    for name, row in found.items():
        if not any(row[:2]) and not row[5]:
            continue
        layer = collector.curvature[name]
        mine = collector.statistics.get(name)
        if mine is None:
            mine = BatchStatistics(layer, layer.dtype)
            collector.statistics[name] = mine
        mine.examples, mine.sums = int(row[4]), {}
    for part, rows in _parts(found):
        if ranks.owner(part.name) in (None, ranks.rank):
            a, g = summed[part]
            count = torch.as_tensor(rows).to(a.tensor)
            sums = FactorSums(a.tensor, g.tensor, count)
            collector.statistics[part.name].sums[part.transposed] = sums


def refresh_together_(
    collector: Collector, ranks: Ranks, names: Sequence[str], step: int
) -> None:
    """Refresh the bases of the layers, each decomposed by its owner, for all ranks."""
    layers = [collector.curvature[name] for name in names]
    outcome = torch.zeros(len(layers), 3, dtype=torch.int64, device=ranks.device)
    own = [layer for layer in layers if ranks.assignment.owns(layer.name)]
    counters = collector.counters
    updates = collector.background.take(own, counters)
    rest = factors_of([layer for layer in own if layer.name not in updates])
    updates |= basis_updates(rest, step, collector.recipe.tolerance, counters)
    for layer, row in zip(layers, outcome, strict=True):
        update = updates.get(layer.name)
        if update is not None:
            # Laid out as it arrives at the others, whose products then round alike.
            update.vectors = {
                side: None if vectors is None else vectors.contiguous()
                for side, vectors in update.vectors.items()
            }
            row.copy_(torch.tensor([True, *_columns(update)]))
    if not layers:
        return
    decided = [
        (layer, row)
        for layer, row in zip(layers, ranks.total(outcome).tolist(), strict=True)
        if row[0]
    ]
    for layer, (_, *columns) in decided:
        if layer.name not in updates:
            updates[layer.name] = _expected(layer, columns)
    _share_updates(ranks, [la for la, _ in decided], updates)
    for layer, _ in decided:
        apply_update_(layer, updates[layer.name], step)


def _columns(update: BasisUpdate) -> list[int]:
    """Return how many new eigenvectors there are of ``A`` and ``G``; 0: none."""
    vectors = (update.vectors[side] for side in ("A", "G"))
    return [0 if found is None else found.shape[-1] for found in vectors]


def _expected(layer: LayerCurvature, columns: Sequence[int]) -> BasisUpdate:
    """Return an empty update of the form that the owner has announced.

    Args:
        layer: Where its basis is not stored, the update is not either.
        columns: What :func:`_columns` returned there.
    """
    update = BasisUpdate({}, {})
    for side, count in zip(("A", "G"), columns, strict=True):
        values, basis = layer.values(side), layer.basis(side)
        shape, vectors = values.shape, None
        if count:
            assert basis is not None
            *lead, d = basis.shape[:-1]
            shape = torch.Size((*lead, count + int(count < d)))
            vectors = basis.new_empty(*lead, d, count)
        update.values[side] = values.new_empty(shape)
        update.vectors[side] = vectors
    return update


def _share_updates(
    ranks: Ranks,
    layers: Sequence[LayerCurvature],
    updates: Mapping[str, BasisUpdate],
) -> None:
    """Send every owner's updates to the ranks that keep the bases."""
    owners = ranks.assignment.owners
    everyone = ranks.keep_bases or not ranks.assignment.divided
    grid = ranks.assignment.grid
    members = range(ranks.size) if everyone else grid.column_of(ranks.rank)
    if len(members) == 1:
        return
    batches = [
        (owner, updates[layer.name].tensors())
        for layer in layers
        if (owner := owners[layer.name]) in members
    ]
    ranks.exchange_(batches, ranks.group if everyone else ranks.column)


def share_directions_(
    ranks: Ranks, found: Sequence[tuple[LayerCurvature, list[Tensor]]]
) -> None:
    """Send every layer's direction from its worker to the others of the row.

    Args:
        ranks: The processes.
        found: Layers with what was computed for them, or where another rank did, with
            tensors of the same shapes, which are overwritten.
    """
    if ranks.assignment.divided:
        batches = [(ranks.assignment.worker(la.name), tensors) for la, tensors in found]
        ranks.exchange_(batches, ranks.row)


def sum_scalings_(
    collector: Collector, ranks: Ranks, names: Sequence[str], meeting: Meeting
) -> None:
    """Replace the sums for the scalings by those over all ranks."""
    terms = []
    for name in names:
        statistics = collector.statistics[name]
        layer = statistics.layer
        total = statistics.scalings
        if total is None:
            shape = layer.averages["s"].total.shape
            total = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
        statistics.scalings = total.mul_(meeting.scales[name].square().to(total))
        terms.append(Term(statistics.scalings))
    ranks.sum_(terms)
