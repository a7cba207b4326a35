"""Collectives of one step: sum statistics, share bases and directions.

Factor sums are all-reduced at the step or, where a backward pass averages gradients
over the ranks, overlapped with it. A backward pass after which
``DistributedDataParallel`` or ``fully_shard`` has averaged the gradients sends a
*round*: the factor sums of all layers in a fixed sequence of buffers, the last layers
first, in a process group of its own. A buffer leaves as soon as this pass has brought
all calls of its layers and the buffers before it have left; what is left at the end of
the pass leaves then. So every rank sends the same sequence in every such pass,
whichever layers it called and in which order.

A round has the sums of the whole window up to then, so of several accumulated passes
the last one's round says all. At the step it is used if on every rank nothing was added
after it left. Otherwise the sums are sent again, as they are without rounds (gradients
averaged by hand, ``Join``), and no further round is begun, since such a training loop
(two losses of one forward pass, gradients of gradients) would always repeat them.

Sums of a mean loss's gradients leave multiplied with this rank's number of targets. The
scale of a ``GradScaler`` is applied to their sum: it is one number on all ranks, or the
averaged gradients would already be wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ekfac import kernels
from ekfac.curvature.distributed.group import PATIENCE, Ranks, Sum, Term, buckets
from ekfac.curvature.eigenbasis import apply_updates_, basis_updates, factors_of
from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.state import BasisUpdate, Counters, LayerCurvature
from ekfac.curvature.statistics import (
    BatchStatistics,
    FactorSums,
    ReducedCounts,
    Window,
)
from ekfac.errors import RankError
from ekfac.hooks import when_backward_ends


class Part(NamedTuple):
    """Name of the factor sums of one layer, for one orientation of its weight."""

    name: str
    transposed: bool


def layout(curvature: Curvature, ranks: Ranks) -> list[list[Part]]:
    """Return the parts of each buffer in the order of sending, alike on all ranks."""
    items = []
    for name, layer in reversed(list(curvature.items())):
        shapes = [layer.averages[side].shape for side in ("A", "G")]
        size = sum(kernels.packed_size(shape, len(shape) == 3) for shape in shapes)
        for transposed in (False, True) if layer.block.mixed else (False,):
            kind = (ranks.owner(name), layer.dtype)
            items.append((kind, size, Part(name, transposed)))
    return buckets(items)


def terms_of(
    window: Window, ranks: Ranks, part: Part, scale: Tensor | None
) -> tuple[Term, Term]:
    """Return this rank's sums of both factors as terms, zeros where it has none.

    The ``scale`` is the factor from the recorded gradients to those of the examples'
    own losses.
    """
    layer = window.curvature[part.name]
    mine = window.statistics.get(part.name)
    sums = None if mine is None else mine.sums.get(part.transposed)
    if sums is not None:
        sums.settle()
    values = (None, None) if sums is None else (sums.inputs, sums.grads)
    averages = (layer.averages["A"], layer.averages["G"])
    a, g = (
        torch.zeros(average.shape, dtype=layer.dtype, device=layer.device)
        if value is None
        else value.to(layer.dtype)
        for value, average in zip(values, averages, strict=True)
    )
    squared = None if scale is None else scale.square()
    first, second = (squared, None) if of_gradients(window, part) else (None, squared)
    owner = ranks.owner(part.name)
    return (
        Term(a, a.dim() == 3, owner, first, part.name),
        Term(g, g.dim() == 3, owner, second, part.name),
    )


def of_gradients(window: Window, part: Part) -> bool:
    """Return whether the factor ``A``, in place of ``G``, is made of gradients."""
    return part.transposed or window.curvature[part.name].block.exact


class Round:
    """The sequence of buffers of one backward pass.

    Attributes:
        buffers: The parts in each.
        terms: The terms that have been sent.
        sent: The sums that have been started.
        complete: Layers of which this pass will bring nothing more.
        stale: Something was added to terms that had been sent.
    """

    def __init__(self, buffers: list[list[Part]]) -> None:
        self.buffers = buffers
        self.terms: dict[Part, tuple[Term, Term]] = {}
        self.sent: list[Sum] = []
        self.complete: set[str] = set()
        self.stale = False

    def next_buffer(self) -> list[Part] | None:
        """Return the parts that leave next, ``None`` at the end."""
        number = len(self.sent)
        return self.buffers[number] if number < len(self.buffers) else None


class OverlappedAllReduce:
    """All-reduce of factor sums, overlapped with the backward pass.

    Ranks match what they send by the number of collectives alone. A rank that missed a
    pass sends the missing rounds at the step, where all compare how many they have
    begun.

    Attributes:
        given_up: Sums had to be sent again at a step, so no further round is begun.
        watches: The end of every round is waited for, and steps without factors have an
            empty one: a rank that fails in its backward is named before the sums of the
            gradients break. Not on a GPU, where waiting only orders streams.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.current: Round | None = None
        self.given_up = False
        self.watches = ranks.device.type == "cpu"
        self._begun = 0
        self._task = -1
        self._dropped: list[Sum] = []

    # -- during the backward pass -----------------------------------------------------

    def note_pass(self, window: Window, *, averaged: bool) -> None:
        """Note that the loss of a forward pass arrives; begin a round if it is due."""
        task = torch._C._current_graph_task_id()
        due = window.plan.factors or self.watches
        if averaged and due and task not in (-1, self._task):
            self._task = task
            end = partial(self._end_pass, window, self._begin(window))
            when_backward_ends(end)
        elif self.current is not None and self.current.sent:
            self.current.stale = True

    def note_sums(self, name: str) -> None:
        """Note that a layer's sums have grown."""
        now = self.current
        if now is not None and any(
            Part(name, way) in now.terms for way in (False, True)
        ):
            now.stale = True

    def note_complete(self, window: Window, name: str) -> None:
        """Note that this pass brings nothing more of a layer; send full buffers."""
        now = self.current
        if now is None or torch._C._current_graph_task_id() != self._task:
            return
        now.complete.add(name)
        while (parts := now.next_buffer()) and now.complete.issuperset(
            part.name for part in parts
        ):
            self._send(window, now)

    def _begin(self, window: Window) -> Round:
        self.drop(window)
        self._begun += 1
        factors = window.plan.factors
        self.current = Round(layout(window.curvature, self.ranks) if factors else [[]])
        self.current.complete |= {
            name
            for name, layer in window.curvature.items()
            if not layer.block.tensors()[0].requires_grad
        }
        return self.current

    def _end_pass(self, window: Window, now: Round) -> None:
        if now is not self.current:
            return
        failures, limit = self.ranks.failures, self.ranks.limit.total_seconds() / 2
        with failures.reported():
            self._send_rest(window)
            if self.watches:
                names = list(window.curvature)
                failures.watch(now.sent, names, min(PATIENCE, limit))

    def _send_rest(self, window: Window) -> None:
        now = self.current
        while now is not None and now.next_buffer() is not None:
            self._send(window, now)

    def _send(self, window: Window, now: Round) -> None:
        """Send the next buffer."""
        with (
            record_function("ekfac::reduce"),
            torch.no_grad(),
            torch.autocast(self.ranks.device.type, enabled=False),
        ):
            terms: list[Term] = []
            for part in now.next_buffer() or ():
                scale = window.rank_scale(window.curvature[part.name])
                pair = terms_of(window, self.ranks, part, scale)
                now.terms[part] = pair
                terms += pair
            now.sent.append(self.ranks.begin_sum(terms, self.ranks.aside))

    def drop(self, window: Window) -> None:
        """Discard the window's round, after sending what the other ranks wait for."""
        self._send_rest(window)
        if self.current is not None:
            self._dropped += self.current.sent
            self.current = None
        # Not waited for, since a rank may send its part later; buffers stay until then.
        self._dropped = [s for s in self._dropped if not s.work.is_completed()]

    # -- at the step ------------------------------------------------------------------

    def report(self, window: Window) -> list[float]:
        """Return what this rank reports of its rounds, to be summed over the ranks.

        Returns:
            The number of rounds that it has begun, at its place among the ranks;
            whether the window has one; whether that one is good.
        """
        self._send_rest(window)
        report = [0.0] * (self.ranks.size + 2)
        report[self.ranks.rank] = float(self._begun)
        if self.current is not None:
            report[-2:] = 1.0, float(not self.current.stale)
        return report

    def agree(
        self, window: Window, reports: Sequence[float], *, outdated: bool
    ) -> Round | None:
        """Return the round that has all ranks' sums, ``None`` if they are sent again.

        A round is ``outdated`` if layers have changed, or their type, since it was
        sent.
        """
        *begun, having, good = (int(value) for value in reports)
        alike = min(begun) == max(begun)  # else some have missed a pass
        while self._begun < max(begun):
            self._begin(window)
            self._send_rest(window)
        latest, self.current = self.current, None
        for buffer in [*self._dropped, *(latest.sent if latest is not None else ())]:
            self.ranks.failures.wait(buffer.work, "summing statistics", buffer.layers())
        self._dropped = []
        if outdated:
            return None
        if alike and good == self.ranks.size:
            return latest
        self.given_up = having > 0 or not alike
        return None


# -- at the step -----------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """State of one rank at a step, compared by all ranks before they go on.

    Attributes:
        step: Number of the step.
        trains: Whether it has data; in ``Join`` a rank without takes part in the step.
        options: What param groups hold, by a name for errors.
        gradients: Layer name -> whether its first parameter has a gradient.
        tiny: Layers whose squares leave the range of single precision.
        checked: Its replicas have been compared with the others' since they were made.
    """

    step: int
    trains: bool
    options: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, bool] = field(default_factory=dict)
    tiny: frozenset[str] = frozenset()
    checked: bool = True

    def numbers(self, ranks: Ranks) -> list[float]:
        """Return the numbers that are summed: three per rank, two per layer, one more.

        Their count depends on ranks and layers alone, so that ranks at different steps
        still take part in one collective, which shows it.
        """
        own = [float(self.step), float(self.trains), self._digest()]
        numbers = [0.0] * (3 * ranks.size)
        numbers[3 * ranks.rank : 3 * ranks.rank + 3] = own
        gradients = self.gradients if self.trains else {}
        layers = ranks.assignment.owners
        numbers += [float(gradients.get(name, False)) for name in layers]
        numbers += [float(name in self.tiny) for name in layers]
        return [*numbers, float(not self.checked)]

    def _digest(self) -> float:
        """Return a hash of the options that a double holds exactly."""
        values = list(self.options.values())
        packed = struct.pack(f"{len(values)}d", *values)
        return float(int.from_bytes(blake2b(packed, digest_size=6).digest(), "big"))

    @staticmethod
    def length(ranks: Ranks) -> int:
        """Return how many numbers there are."""
        return 3 * ranks.size + 2 * len(ranks.assignment.owners) + 1

    @staticmethod
    def tiny_anywhere(ranks: Ranks, sums: Sequence[float]) -> list[str]:
        """Return the layers whose squares are too small on some rank."""
        names = ranks.assignment.owners
        last = sums[len(sums) - 1 - len(names) : -1]
        return [name for name, count in zip(names, last, strict=True) if count]

    def check(self, ranks: Ranks, sums: Sequence[float]) -> None:
        """Raise on every rank if the ranks differ in step, options or gradients.

        Raises:
            RankError: With two ranks and what is different there.
        """
        size = ranks.size
        steps, trains = sums[: 3 * size : 3], sums[1 : 3 * size : 3]
        for rank, step in enumerate(steps):
            if step != steps[0]:
                raise RankError(
                    f"Ranks 0 and {rank} are at different steps: {steps[0]:.0f} and "
                    f"{step:.0f}. All ranks call step() equally often and load the "
                    "same checkpoint; torch.distributed.algorithms.Join covers ranks "
                    "that run out of data."
                )
        digests = sums[2 : 3 * size : 3]
        if len({d for d, has in zip(digests, trains, strict=True) if has}) > 1:
            self._refuse_options(ranks)
        training = sum(trains)
        names = ranks.assignment.owners
        for name, count in zip(names, sums[3 * size :], strict=False):
            if count not in (0, training):
                self._refuse_gradients(ranks, name)

    def _refuse_options(self, ranks: Ranks) -> None:
        options: list[dict[str, float]] = ranks.agree(dict(self.options))
        for rank, other in enumerate(options):
            for key, value in options[0].items():
                if other.get(key, value) != value:
                    raise RankError(
                        f"step {self.step}: {key} is {value!r} on rank 0 and "
                        f"{other[key]!r} on rank {rank}: the replicas would drift "
                        "apart. Options of param groups must be equal on all ranks; "
                        "let schedulers depend on what all know."
                    )

    def _refuse_gradients(self, ranks: Ranks, name: str) -> None:
        having = ranks.agree(self.trains and self.gradients.get(name, False))
        without = [rank for rank, has in enumerate(having) if not has]
        raise RankError(
            f"step {self.step}: layer {name!r} has no gradient on ranks {without} and "
            "one on the others. All must have the averaged gradient: call backward() "
            "on every rank, within DistributedDataParallel or fully_shard."
        )


# Fields reduced over ranks for every layer: factor sums present (as it is, transposed),
# their rows (likewise), examples counted, sums for scalings present, sums not finite.
FIELDS = 7


def reduce_statistics_(
    window: Window,
    ranks: Ranks,
    loss_scale: Tensor | float,
    overlapped: OverlappedAllReduce | None,
    standing: Standing,
    widen: Callable[[Collection[str]], None],
    *,
    outdated: bool = False,
) -> ReducedCounts | None:
    """Replace a window's factor sums by those over all ranks, counts included.

    Recorded gradients are those of the rank's own loss: before they are added they are
    scaled to those of the examples' own losses. Layers whose squares are too small for
    single precision on any rank are widened on all, before sums are sent. Sums that
    were sent during the backward pass are ``outdated`` if layers have changed since.

    Returns:
        Counts of all ranks; ``None`` if the model of some rank has changed, on which
        the ranks have to agree first.

    Raises:
        RankError: If a rank takes no part, or with another state than the others.
    """
    for statistics in window.statistics.values():
        for sums in statistics.sums.values():
            sums.settle()
    per_example = window.options.scaling == "per_example"
    samples = window.plan.factors or (window.plan.scalings and per_example)
    layers = list(window.curvature.values()) if samples else []
    local = {layer.name: window.scale(layer, loss_scale)[1] for layer in layers}
    totals = _exchange(window, ranks, standing, overlapped, layers)
    if totals is None:
        return None
    standing.check(ranks, totals.standing)
    tiny = standing.tiny_anywhere(ranks, totals.standing)
    widen(tiny)
    common: Tensor | float = 1.0
    if window.options.empirical:
        common = 1 / loss_scale
        if window.options.loss_reduction == "global_mean":
            common = totals.terms.clamp(min=1) / (ranks.size * loss_scale)
            local = dict.fromkeys(local, common)
    early = None
    if overlapped is not None:
        stale = bool(tiny) or outdated
        early = overlapped.agree(window, totals.rounds, outdated=stale)
    if early is None:
        summed = _sum(window, ranks, totals.layers, local)
    else:
        summed = _finish(window, ranks, early, common)
    _take_over(window, ranks, totals.layers, summed)
    if totals.counted:
        window.examples, window.terms = totals.examples, totals.terms
    return ReducedCounts(
        totals.spread if totals.counted else None,
        local,
        frozenset(name for name, row in totals.layers.items() if any(row[:2])),
        frozenset(name for name, row in totals.layers.items() if row[5]),
        frozenset(name for name, row in totals.layers.items() if row[6]),
        unchecked=totals.standing[-1] > 0,
    )


class Exchange(NamedTuple):
    """Sums over the ranks of what each says at a step.

    Attributes:
        counted: Whether some rank has seen the model's outputs.
        examples: How many examples all have.
        terms: How many targets.
        spread: Sum of ``examples / targets^2``.
        standing: See :meth:`Standing.numbers`.
        rounds: See :meth:`OverlappedAllReduce.report`.
        layers: Layer name -> its ``FIELDS``; none if the step takes no statistics.
    """

    counted: bool
    examples: Tensor
    terms: Tensor
    spread: Tensor
    standing: list[float]
    rounds: list[float]
    layers: dict[str, list[float]]


def _exchange(
    window: Window,
    ranks: Ranks,
    standing: Standing,
    overlapped: OverlappedAllReduce | None,
    layers: Sequence[LayerCurvature],
) -> Exchange | None:
    """Return the sums over the ranks; ``None`` if some model has changed."""
    rounds = [0.0] * (ranks.size + 2)
    if overlapped is not None:
        rounds = overlapped.report(window)
    own = [*standing.numbers(ranks), *rounds]
    statement = _statement(window, ranks, own, layers)
    totals = ranks.total(statement, "exchanging the counts", list(window.curvature))
    changed, seen, examples, terms, spread = totals[:5].unbind()
    if bool(changed):
        return None
    rest, length = totals[5:].tolist(), Standing.length(ranks)
    rows = rest[len(own) :]
    return Exchange(
        bool(seen > 0),
        *(examples, terms, spread),
        rest[:length],
        rest[length : len(own)],
        {
            layer.name: rows[FIELDS * index : FIELDS * (index + 1)]
            for index, layer in enumerate(layers)
        },
    )


def statement_length(ranks: Ranks, layers: int) -> int:
    """Return how many numbers ranks exchange at a step with ``layers`` layers."""
    return 5 + Standing.length(ranks) + ranks.size + 2 + FIELDS * layers


def announce_change(ranks: Ranks, length: int) -> None:
    """Tell the ranks, in place of a statement, that this rank's model has changed.

    The ``length`` is that of a statement of the ranks whose model has not.
    """
    notice = torch.zeros(length, dtype=torch.float64, device=ranks.device)
    notice[0] = 1
    ranks.total(notice, "announcing a changed model")


def _statement(
    window: Window,
    ranks: Ranks,
    own: Sequence[float],
    layers: Sequence[LayerCurvature],
) -> Tensor:
    """Return counts, this rank's ``own`` numbers, and ``FIELDS`` for each layer.

    The ``layers`` are those that the step takes statistics of, all or none; the length
    is the same.
    """
    values: list[Tensor | float] = [0.0] * 5
    if window.examples is not None and window.terms is not None:
        n, t = window.examples.double(), window.terms.double()
        values = [0.0, 1.0, n, t, n / t.clamp(min=1).square()]
    values += own
    for layer in layers:
        statistics = window.statistics.get(layer.name)
        if statistics is None:
            values += [0.0] * FIELDS
            continue
        sums = [statistics.sums.get(transposed) for transposed in (False, True)]
        finite = [s.finite() for s in sums if s is not None]
        values += [
            *(float(s is not None) for s in sums),
            *(0.0 if s is None else s.rows for s in sums),
            statistics.examples,
            float(bool(statistics.queue) or statistics.scalings is not None),
            0.0 if not finite else 1 - torch.stack(finite).all().double(),
        ]
    values += [0.0] * (FIELDS * (len(window.curvature) - len(layers)))
    plain = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
    flat = torch.tensor(plain, dtype=torch.float64, device=ranks.device)
    places = [index for index, v in enumerate(values) if isinstance(v, Tensor)]
    if places:
        tensors = [v.to(flat) for v in values if isinstance(v, Tensor)]
        flat[torch.tensor(places, device=flat.device)] = torch.stack(tensors)
    return flat


def _parts(reported: Mapping[str, Sequence[float]]) -> Iterator[tuple[Part, float]]:
    """Yield the factor sums that some rank has, with their rows on all of them."""
    for name, row in reported.items():
        for transposed in (False, True):
            if row[transposed]:
                yield Part(name, transposed), row[2 + transposed]


def _sum(
    window: Window,
    ranks: Ranks,
    reported: Mapping[str, Sequence[float]],
    scales: Mapping[str, Tensor],
) -> dict[Part, tuple[Term, Term]]:
    """Sum the factor sums that any rank has over the ranks."""
    pairs = {
        part: terms_of(window, ranks, part, scales[part.name])
        for part, _ in _parts(reported)
    }
    ranks.sum_([term for pair in pairs.values() for term in pair])
    return pairs


def _finish(
    window: Window, ranks: Ranks, early: Round, common: Tensor | float
) -> dict[Part, tuple[Term, Term]]:
    """Wait for the sums that were sent before the step, and scale them."""
    for buffer in early.sent:
        ranks.end_sum_(buffer)
    for part, (a, g) in early.terms.items():
        scaled = (a if of_gradients(window, part) else g).tensor
        scaled.mul_(torch.as_tensor(common).square().to(scaled))
    return early.terms


def _take_over(
    window: Window,
    ranks: Ranks,
    reported: Mapping[str, Sequence[float]],
    summed: Mapping[Part, tuple[Term, Term]],
) -> None:
    """Replace this rank's sums by those over the ranks."""
    for name, row in reported.items():
        if not any(row[:2]) and not row[5]:
            continue
        layer = window.curvature[name]
        mine = window.statistics.get(name)
        if mine is None:
            mine = BatchStatistics(layer, layer.dtype)
            window.statistics[name] = mine
        mine.examples, mine.sums = int(row[4]), {}
    for part, rows in _parts(reported):
        if ranks.owner(part.name) in (None, ranks.rank):
            a, g = summed[part]
            count = torch.as_tensor(rows).to(a.tensor)
            sums = FactorSums(a.tensor, g.tensor, count)
            window.statistics[part.name].sums[part.transposed] = sums


def refresh_on_owners_(
    layers: Sequence[LayerCurvature],
    own: Sequence[LayerCurvature],
    updates: dict[str, BasisUpdate],
    ranks: Ranks,
    step: int,
    tolerance: float,
    counters: Counters,
) -> None:
    """Refresh the bases of layers on all ranks, each decomposed by its owner.

    Args:
        layers: The same on all ranks. Those that their owner leaves out stay.
        own: Those of them that this rank decomposes now.
        updates: Those that it has found already; all the others are added.
        ranks: All of them.
        step: Number of the step.
        tolerance: See :func:`basis_updates`.
        counters: Count what is done.
    """
    outcome = torch.zeros(len(layers), 3, dtype=torch.int64, device=ranks.device)
    updates |= basis_updates(factors_of(own), step, tolerance, counters)
    for layer, row in zip(layers, outcome, strict=True):
        update = updates.get(layer.name)
        if update is not None:
            # Same layout as on the other ranks, so that products round alike.
            updates[layer.name] = update.mapped(Tensor.contiguous)
            row.copy_(torch.tensor([True, *_columns(update)]))
    if not layers:
        return
    names = [layer.name for layer in layers]
    announced = ranks.total(outcome, "announcing the new bases", names)
    rows = zip(layers, announced.tolist(), strict=True)
    decided = [(layer, row) for layer, row in rows if row[0]]
    for layer, (_, *columns) in decided:
        if layer.name not in updates:
            updates[layer.name] = _expected(layer, columns)
    _share_updates(ranks, [la for la, _ in decided], updates)
    apply_updates_([layer for layer, _ in decided], updates, step)


def _columns(update: BasisUpdate) -> list[int]:
    """Return the numbers of new eigenvectors of ``A`` and ``G``; 0: the basis stays."""
    vectors = (update.vectors[side] for side in ("A", "G"))
    return [0 if basis is None else basis.shape[-1] for basis in vectors]


def _expected(layer: LayerCurvature, columns: Sequence[int]) -> BasisUpdate:
    """Return an update to receive into, of the form that the owner has announced.

    On a rank that does not store the basis it has no storage either.
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
        (owner, layer.name, updates[layer.name].tensors())
        for layer in layers
        if (owner := owners[layer.name]) in members
    ]
    ranks.exchange_(batches, ranks.group if everyone else ranks.column)


def sum_scalings_(window: Window, ranks: Ranks, names: Sequence[str]) -> None:
    """Replace the sums for the scalings by those over all ranks."""
    assert window.reduced is not None
    scales, terms = window.reduced.scales, []
    for name in names:
        statistics = window.statistics[name]
        layer = statistics.layer
        scalings = statistics.scalings
        if scalings is None:
            shape = layer.averages["s"].total.shape
            scalings = torch.zeros(shape, dtype=layer.dtype, device=layer.device)
        statistics.scalings = scalings.mul_(scales[name].square().to(scalings))
        terms.append(Term(statistics.scalings, layer=name))
    ranks.sum_(terms)
