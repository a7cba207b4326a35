"""Factor sums that set out while the backward pass still runs.

A backward pass after which ``DistributedDataParallel`` or ``fully_shard`` has averaged
the gradients sends a *round*: the factor sums of all layers in a fixed sequence of
buffers, the last layers first, in a process group of its own. A buffer leaves as soon
as this pass has brought all calls of its layers and the buffers before it have left;
what is left at the end of the pass leaves then. So every rank sends the same sequence
in every such pass, whichever layers it called and in which order.

A round has the sums of the whole window up to then, so of several accumulated passes
the last one's round says all. At the step it is used if on every rank nothing was added
after it left. Otherwise the sums travel again, as they do without rounds (gradients
averaged by hand, ``Join``), and no further round is begun: such a training loop (two
losses of one forward pass, gradients of gradients) would make that the rule.

Sums of a mean loss's gradients leave multiplied with this rank's number of targets. The
scale of a ``GradScaler`` is applied to their sum: it is one number on all ranks, or the
averaged gradients would already be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from ekfac.curvature.distributed import Ranks, Sum, Term, buckets, packed_size
from ekfac.curvature.stacked_storage import Curvature
from ekfac.passes import when_backward_ends

if TYPE_CHECKING:
    from ekfac.curvature.collector import Collector


class Part(NamedTuple):
    """The factor sums of one layer, for one orientation of its weight."""

    name: str
    transposed: bool


def layout(curvature: Curvature, ranks: Ranks) -> list[list[Part]]:
    """Return which parts are sent together, in which order: the same on all ranks."""
    items = []
    for name, layer in reversed(list(curvature.items())):
        shapes = [layer.averages[side].total.shape for side in ("A", "G")]
        size = sum(packed_size(shape, len(shape) == 3) for shape in shapes)
        for transposed in sorted({use.transposed for use in layer.block.uses}):
            kind = (ranks.owner(name), layer.dtype)
            items.append((kind, size, Part(name, transposed)))
    return buckets(items)


def terms_of(
    collector: Collector, ranks: Ranks, part: Part, scale: Tensor | None
) -> tuple[Term, Term]:
    """Return this rank's sums of both factors as terms, zeros where it has none.

    Args:
        collector: Has the sums.
        ranks: Say who needs them.
        part: Which.
        scale: What gradients are multiplied with to be those of the examples' losses.
    """
    layer = collector.curvature[part.name]
    mine = collector.statistics.get(part.name)
    sums = None if mine is None else mine.sums.get(part.transposed)
    if sums is not None:
        sums.settle()
    values = (None, None) if sums is None else (sums.inputs, sums.grads)
    averages = (layer.averages["A"], layer.averages["G"])
    a, g = (
        torch.zeros(average.total.shape, dtype=layer.dtype, device=layer.device)
        if value is None
        else value
        for value, average in zip(values, averages, strict=True)
    )
    squared = None if scale is None else scale.square()
    first, second = (
        (squared, None) if of_gradients(collector, part) else (None, squared)
    )
    owner = ranks.owner(part.name)
    return Term(a, a.dim() == 3, owner, first), Term(g, g.dim() == 3, owner, second)


def of_gradients(collector: Collector, part: Part) -> bool:
    """Return whether it is the factor ``A`` that is made of gradients."""
    return part.transposed or collector.curvature[part.name].block.exact


class Round:
    """One pass's sequence of buffers.

    Attributes:
        buffers: What is in each.
        terms: What has left.
        sent: The sums on their way.
        complete: Layers of which this pass will bring nothing more.
        stale: Something was added after it had left.
    """

    def __init__(self, buffers: list[list[Part]]) -> None:
        self.buffers = buffers
        self.terms: dict[Part, tuple[Term, Term]] = {}
        self.sent: list[Sum] = []
        self.complete: set[str] = set()
        self.stale = False

    def next_buffer(self) -> list[Part]:
        """Return the parts that leave next, none at the end."""
        number = len(self.sent)
        return self.buffers[number] if number < len(self.buffers) else []


class Rounds:
    """The rounds that this rank takes part in.

    What a rank has sent is matched by the number of collectives alone. Should a rank
    have missed a pass, it makes up for it at the step, where all say how many rounds
    they have begun.

    Args:
        ranks: The processes that train together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.current: Round | None = None
        self._begun = self._met = 0
        self._task = -1
        self._dropped: list[Sum] = []

    # -- during the backward pass -----------------------------------------------------

    def note_pass(self, collector: Collector, *, averaged: bool) -> None:
        """Note that the loss of a forward pass arrives; begin a round if it is due.

        Args:
            collector: Has the sums.
            averaged: Gradients are averaged over the ranks in this backward pass.
        """
        task = torch._C._current_graph_task_id()
        if averaged and collector.plan.factors and task not in (-1, self._task):
            self._task = task
            end = partial(self._end_pass, collector, self._begin(collector))
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

    def note_complete(self, collector: Collector, name: str) -> None:
        """Note that this pass brings nothing more of a layer; send what can be."""
        now = self.current
        if now is None or torch._C._current_graph_task_id() != self._task:
            return
        now.complete.add(name)
        while (parts := now.next_buffer()) and now.complete.issuperset(
            part.name for part in parts
        ):
            self._send(collector, now)

    def _begin(self, collector: Collector) -> Round:
        self.drop(collector)
        self._begun += 1
        self.current = Round(layout(collector.curvature, self.ranks))
        self.current.complete |= {
            name
            for name, layer in collector.curvature.items()
            if not layer.block.tensors()[0].requires_grad
        }
        return self.current

    def _end_pass(self, collector: Collector, now: Round) -> None:
        if now is self.current:
            self._send_rest(collector)

    def _send_rest(self, collector: Collector) -> None:
        now = self.current
        while now is not None and now.next_buffer():
            self._send(collector, now)

    def _send(self, collector: Collector, now: Round) -> None:
        """Send the next buffer."""
        with (
            record_function("ekfac::reduce"),
            torch.no_grad(),
            torch.autocast(self.ranks.device.type, enabled=False),
        ):
            terms: list[Term] = []
            for part in now.next_buffer():
                scale = collector.own_scale(collector.curvature[part.name])
                pair = terms_of(collector, self.ranks, part, scale)
                now.terms[part] = pair
                terms += pair
            now.sent.append(self.ranks.begin_sum(terms, self.ranks.aside))

    def drop(self, collector: Collector) -> None:
        """Discard the window's round; the other ranks still get what they wait for."""
        self._send_rest(collector)
        if self.current is not None:
            self._dropped += self.current.sent
            self.current = None
        # Not waited for: a rank may send its part later. Until then buffers stay.
        self._dropped = [s for s in self._dropped if not s.work.is_completed()]

    # -- at the step ------------------------------------------------------------------

    def report(self, collector: Collector) -> list[float]:
        """Return what this rank says, to be summed: its rounds, is the last one good.

        Returns:
            One number for each rank, and one more.
        """
        self._send_rest(collector)
        said = [0.0] * (self.ranks.size + 1)
        said[self.ranks.rank] = float(self._begun)
        said[-1] = float(self.current is not None and not self.current.stale)
        return said

    def agree(self, collector: Collector, said: Sequence[float]) -> Round | None:
        """Return the round that has all ranks' sums, or ``None`` if they travel again.

        Args:
            collector: Has the sums.
            said: The sum of what all ranks reported.
        """
        *begun, good = (int(value) for value in said)
        before, most = self._met, max(begun)
        usable = min(begun) == most > before and good == self.ranks.size
        while self._begun < most:
            self._begin(collector)
            self._send_rest(collector)
        self._met = most
        found, self.current = self.current, None
        for one in [*self._dropped, *(found.sent if found is not None else ())]:
            one.work.wait()
        self._dropped = []
        if usable:
            return found
        if most > before:
            collector.rounds = None
        return None
