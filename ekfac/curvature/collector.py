"""What is collected between two steps, and how it is committed at the step.

A discarded backward, an overflowed step of a gradient scaler or a pass in ``eval`` mode
leaves every average as it was: only :meth:`Collector.commit` writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.profiler import record_function

from ekfac.curvature.background import AsyncEigh
from ekfac.curvature.basis_update import Counters
from ekfac.curvature.distributed import Ranks
from ekfac.curvature.eigenbasis import apply_update_, refresh_
from ekfac.curvature.meeting import Meeting, meet_, refresh_together_, sum_scalings_
from ekfac.curvature.normal_form import Pair
from ekfac.curvature.overlap import Rounds
from ekfac.curvature.plan import Plan, Recipe
from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.state import Average, LayerCurvature
from ekfac.curvature.statistics import BatchStatistics, factors, probe_vectors
from ekfac.curvature.window import Window
from ekfac.kernels import accelerated
from ekfac.kernels.together import Together
from ekfac.layers import Block
from ekfac.likelihoods import Terms


class Collector(Window):
    """Sums the statistics of a window and commits them.

    Args:
        curvature: The averages.
        recipe: How statistics are taken.
        ranks: The processes that train together, or ``None`` for this one alone.

    Attributes:
        rows: How many rows the layers' inputs had in the last step that saw them.
        rounds: Send sums to the other ranks before the step, where that can be.
    """

    def __init__(
        self, curvature: Curvature, recipe: Recipe, ranks: Ranks | None = None
    ) -> None:
        self.curvature, self.recipe, self.ranks = curvature, recipe, ranks
        self.rounds = None if ranks is None else Rounds(ranks)
        self.meeting: Meeting | None = None
        self.plan = Plan(False, False, frozenset(), False)
        self.step = 0
        self.counters = Counters()
        self.background = AsyncEigh(recipe.tolerance)
        self.statistics: dict[str, BatchStatistics] = {}
        self.examples: Tensor | None = None
        self.terms: Tensor | None = None
        self.rows: dict[str, int] = {}
        self.together = Together()
        self._task = -1
        self._draws = 0

    # -- during forward and backward: capture.Sink ------------------------------------

    def begin(self, terms: Terms | None, *, averaged: bool) -> bool:
        """Note that a backward pass begins, over targets ``terms``.

        Gradients may be ``averaged`` over ranks in it.

        Returns:
            Whether what was collected before has been discarded.
        """
        task = torch._C._current_graph_task_id()
        discarded = task != self._task and self._gradients_cleared()
        if discarded:
            self.clear()
        self._task = task
        if terms is not None:
            if self.examples is None or self.terms is None:
                self.examples, self.terms = terms.examples, terms.terms
            else:
                self.examples = self.examples + terms.examples
                self.terms = self.terms + terms.terms
        if self.rounds is not None:
            self.rounds.note_pass(self, averaged=averaged)
        return discarded

    def complete(self, block: Block) -> None:
        """Note that this backward pass brings nothing more of ``block``."""
        if self.rounds is not None:
            self.rounds.note_complete(self, block.name)

    def _gradients_cleared(self) -> bool:
        """Return whether ``model.zero_grad()`` has discarded what was collected.

        Sharded parameters do not tell: without synchronisation theirs is elsewhere.
        """
        blocks = [self.curvature[n].block for n in self.statistics or self.curvature]
        if any(block.pinned for block in blocks):
            return False
        return all(p.grad is None for block in blocks for p in block.tensors())

    def wants(self, block: Block) -> bool:
        """Return whether the coming step takes statistics of ``block``."""
        if not block.tensors()[0].requires_grad:
            return False
        return self.plan.factors or self.plan.scalings or self._thin(block)

    def _thin(self, block: Block) -> bool:
        """Return whether the gradient is cheaper to project as two thin factors."""
        rows = self.rows.get(block.name)
        indexed = block.adapter.diagonal_input
        if not self.plan.projection or rows is None or indexed or block.mixed:
            return False
        if self.ranks is not None:  # the thin factors are those of this rank's share
            return False
        if block.tensors()[0].device.type != "cpu":  # see projected
            return False
        if block.exact or any(block.diagonal) or block.name in self.plan.refresh:
            return False
        if self.curvature[block.name].truncated:  # thin already
            return False
        _, d_out, d_in = block.shape
        thin = rows * (d_out**2 + d_in**2 + d_out * d_in)
        return thin < 0.8 * d_out * d_in * (d_out + d_in)

    def add(
        self,
        block: Block,
        pairs: Sequence[Pair],
        terms: Terms | None,
        *,
        repeated: bool = False,
    ) -> None:
        """Add the calls of one block in one backward pass."""
        weight = block.tensors()[0]
        layer = self.curvature[block.name]
        if layer.device != weight.device:
            self.curvature.follow_parameters()
            layer = self.curvature[block.name]
        statistics = self.statistics.get(block.name)
        if statistics is None:
            dtype = layer.dtype
            statistics = self.statistics[block.name] = BatchStatistics(
                layer,
                dtype,
                sketched=self._sketches(weight),
                together=self.together,
            )
        if self.rounds is not None:
            self.rounds.note_sums(block.name)
        if terms is None:
            statistics.examples += len(pairs[0][2])
        rows = sum(grad.numel() for _, _, grad in pairs)
        statistics.rows = rows // (block.shape[0] * block.shape[1])
        if self.plan.factors:
            with record_function("ekfac::factors"):
                statistics.add_factors(pairs, terms, self.recipe.sharing, repeated)
        if not layer.ready or block.name in self.plan.refresh:
            if self.plan.scalings:
                statistics.queue.append((list(pairs), terms))
        elif self.plan.scalings or self._thin(block):
            with record_function("ekfac::scalings"):
                statistics.add_scalings(pairs, terms, squares=self.plan.scalings)

    @staticmethod
    def _sketches(weight: Tensor) -> bool:
        """Return whether the gradient is kept in the basis; kernels give squares alone.

        See :meth:`projected`.
        """
        return weight.device.type == "cpu" and not accelerated.applies(weight)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a generator whose numbers depend on the seed and the step alone."""
        self._draws += 1
        generator = torch.Generator(device)
        seed = self.recipe.seed + 1_000_003 * self.step + 7_919 * self._draws
        if self.ranks is not None:
            seed += 15_485_863 * self.ranks.rank
        return generator.manual_seed(seed % 2**63)

    def clear(self) -> None:
        """Forget what was collected."""
        if self.rounds is not None:
            self.rounds.drop(self)
        self.statistics.clear()
        self.together.clear()
        self.examples = self.terms = self.meeting = None
        self._task, self._draws = -1, 0

    # -- at the step ------------------------------------------------------------------

    def meet(self, loss_scale: Tensor | float) -> None:
        """Add up the window's statistics over the ranks, if there are several."""
        self.together.flush()
        if self.ranks is not None:
            with record_function("ekfac::reduce"):
                self.meeting = meet_(self, self.ranks, loss_scale)

    def commit(self, step: int, loss_scale: Tensor | float) -> None:
        """Write the window's statistics into the averages and refresh bases."""
        for layer in self.curvature.values():
            if layer.device != layer.block.tensors()[0].device:
                self.curvature.follow_parameters()
                break
        self.rows |= {name: found.rows for name, found in self.statistics.items()}
        with record_function("ekfac::factors"):
            for name, statistics in self.statistics.items():
                if statistics.sums:
                    self._commit_factors(name, statistics, step, loss_scale)
                elif self.meeting is not None:
                    self._note_factors(name, step)
        with record_function("ekfac::basis"):
            due = [name for name in self.curvature if name in self.plan.refresh]
            if self.ranks is not None:
                refresh_together_(self, self.ranks, due, step)
            else:
                self._refresh([self.curvature[name] for name in due], step)
            self._begin(step)
        with record_function("ekfac::scalings"):
            self._commit_scalings(step, loss_scale)

    def _refresh(self, layers: Sequence[LayerCurvature], step: int) -> None:
        """Move the bases of layers: to what was begun for them, if it was."""
        begun = self.background.take(layers, self.counters)
        for layer in layers:
            if layer.name in begun:
                apply_update_(layer, begun[layer.name], step)
        others = [layer for layer in layers if layer.name not in begun]
        refresh_(others, step, self.recipe.tolerance, self.counters)

    def _begin(self, step: int) -> None:
        """Begin with the bases that are to be adopted later, those of this rank."""
        assigned = None if self.ranks is None else self.ranks.assignment
        layers = [
            layer
            for name, layer in self.curvature.items()
            if name in self.plan.begin and (assigned is None or assigned.owns(name))
        ]
        self.background.begin(layers, step)

    def _note_factors(self, name: str, step: int) -> None:
        """Note that the owner of a layer has added a sample to its factors."""
        assert self.meeting is not None
        if name in self.meeting.bad:
            self.counters.rejected += 1
        elif name in self.meeting.present:
            layer = self.curvature[name]
            layer.averages["A"].empty = layer.averages["G"].empty = False
            layer.version["factors"] = step

    def _commit_scalings(self, step: int, loss_scale: Tensor | float) -> None:
        if not self.plan.scalings:
            return
        names = [name for name in self.curvature if name in self.statistics]
        ready = [name for name in names if self.curvature[name].ready]
        for name in ready:
            statistics = self.statistics[name]
            for pairs, terms in statistics.queue:
                statistics.add_scalings(pairs, terms, squares=True)
        self.together.flush()
        if self.meeting is not None and self.ranks is not None:
            ready = [name for name in ready if name in self.meeting.scaled]
            sum_scalings_(self, self.ranks, ready, self.meeting)
        for name in names:
            layer, statistics = self.curvature[name], self.statistics[name]
            if statistics.scalings is not None:
                examples, scale = self.scale(layer, loss_scale)
                sample = statistics.scalings.mul_(scale.square() / examples)
                self.update_scalings(layer, sample, step)

    def _commit_factors(
        self,
        name: str,
        statistics: BatchStatistics,
        step: int,
        loss_scale: Tensor | float,
    ) -> None:
        layer = self.curvature[name]
        if self.meeting is not None and name in self.meeting.bad:
            self.counters.rejected += 1
            return
        a, g = factors(statistics, *self.scale(layer, loss_scale))
        finite = torch.isfinite(a.sum() + g.sum())
        if a.device.type == "cpu" and not bool(finite):
            self.counters.rejected += 1
            return
        for average, sample in ((layer.averages["A"], a), (layer.averages["G"], g)):
            self._update(average, sample, finite, self.recipe.factor_decay)
        layer.version["factors"] = step

    def update_scalings(self, layer: LayerCurvature, sample: Tensor, step: int) -> None:
        """Add one sample to the average of a layer's scalings."""
        finite = torch.isfinite(sample.sum())
        if sample.device.type == "cpu" and not bool(finite):
            self.counters.rejected += 1
            return
        self._update(layer.averages["s"], sample, finite, self.recipe.scaling_decay)
        layer.version["scalings"] = step

    def note_scalings(self, layer: LayerCurvature, step: int) -> None:
        """Note that another rank has added a sample to a layer's scalings."""
        layer.averages["s"].empty = False
        layer.version["scalings"] = step

    def update_squares(
        self, layer: LayerCurvature, root: Tensor, factor: Tensor, step: int
    ) -> None:
        """Add ``factor root^2`` to the average of a layer's scalings."""
        finite = torch.isfinite(root.sum())
        if root.device.type == "cpu" and not bool(finite):
            self.counters.rejected += 1
            return
        average, decay = layer.averages["s"], self.recipe.scaling_decay
        if root.device.type == "cpu":
            average.update_square_(root, float(factor), decay)
        else:
            self._update(average, root.square() * factor, finite, decay)
        layer.version["scalings"] = step

    @staticmethod
    def _update(average: Average, sample: Tensor, finite: Tensor, decay: float) -> None:
        if not average.held:
            average.empty = False
            return
        if sample.device.type != "cpu":
            # Without waiting for the device: what is not finite is replaced by the
            # average itself, which it then leaves as it is.
            present = average.total / average.weight.clamp(min=1e-30)
            sample = torch.where(finite, sample, present)
        average.update_(sample, decay)

    def reseed(self, seed: int) -> None:
        """Draw pseudo-gradients from another seed."""
        self.recipe = replace(self.recipe, seed=seed)

    def projected(self, layer: LayerCurvature, gradient: Tensor) -> Tensor | None:
        """Return the gradient in the basis from its thin factors, if they make it up.

        What was recorded is the gradient only if nothing else went into it: a penalty
        on the weights, another use of the parameter. Both sides are multiplied with
        probe vectors; where the results differ by more than rounding and one common
        factor (clipping, an unscaled loss), there is no answer.

        Args:
            layer: The layer.
            gradient: ``[b, d_out, d_in]``, as it stands in ``.grad``.
        """
        found = self.statistics.get(layer.name)
        if found is None or found.projected is None or not found.complete:
            return None
        if self.ranks is not None:  # all must take the same way
            return None
        if not self.recipe.empirical or gradient.device.type != "cpu" or found.queue:
            return None
        assert found.sketch is not None
        assert found.noise is not None
        expected = gradient @ probe_vectors(gradient.shape[-1], gradient)
        square = float(found.sketch.square().sum())
        if square == 0:
            return None
        factor = float((expected * found.sketch).sum()) / square
        difference = float((expected - factor * found.sketch).norm())
        eps = torch.finfo(gradient.dtype).eps
        rounding = 256 * eps * abs(factor) * float(found.noise.sqrt())
        return found.projected.mul_(factor) if difference <= rounding else None
