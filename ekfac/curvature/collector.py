"""Statistics between two steps, and their commit at the step.

:meth:`Collector.commit` is the only writer of factors, bases, scalings and counts. A
discarded backward, an overflowed step of a gradient scaler or a pass in ``eval`` mode
leaves every average as it was.
"""

from __future__ import annotations

import weakref
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.calls import LayerCall, Sink
from ekfac.curvature.average import Average, update_each_
from ekfac.curvature.background import AsyncEigh
from ekfac.curvature.distributed import Ranks
from ekfac.curvature.distributed.allreduce import (
    OverlappedAllReduce,
    Standing,
    announce_change,
    reduce_statistics_,
    refresh_on_owners_,
    statement_length,
    sum_scalings_,
)
from ekfac.curvature.eigenbasis import (
    Noise,
    ProjectedGradient,
    apply_updates_,
    gradients_of,
    project_list,
    project_truncated,
    refresh_,
    squares_sums,
    supports_list,
)
from ekfac.curvature.normal_form import sampled
from ekfac.curvature.options import Options
from ekfac.curvature.radial import averaged, radial_share, scale_factor
from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.stacks import Stack, Stacks, packed
from ekfac.curvature.state import Counters, LayerCurvature
from ekfac.curvature.statistics import (
    BatchStatistics,
    Window,
    factors,
    finite_ones,
    is_finite,
    passes_to_decompose,
)
from ekfac.curvature.truncated import Coordinates
from ekfac.hooks import in_backward, profiled, when_backward_ends
from ekfac.kernels import Workspace
from ekfac.kernels.cuda import operators
from ekfac.kernels.cuda.operators import LaunchQueue
from ekfac.layers import Block
from ekfac.layers.base import local, whole
from ekfac.likelihoods import TargetMask

# Sizes of gradients, and of factors, below which single precision has no room for the
# squares of the smaller entries.
TINY, TINY_FACTOR = 1e-12, 1e-24


class Square(NamedTuple):
    """A sample ``factor root^2`` for the scalings of the layers of a stack.

    Attributes:
        stack: The layers.
        roots: Of all of them in one tensor, ``[k b, *]``.
        scales: The factors, one for each layer.
    """

    stack: Stack
    roots: Tensor
    scales: list[Tensor]


class Collector(Sink):
    """Sums the statistics of a window and commits them.

    Attributes:
        window: What was collected since the last step.
        step: Number of the coming step.
        rows: How many rows the layers' inputs had in the last step that saw them.
        counts: Examples and loss terms of the last window that knew them.
        noise: Average of the inverse factors from squared gradients to scalings: how
            large the square of a batch's gradient is by noise alone, next to the
            scalings. Batches of few examples have more of it.
        overlapped: Sends sums to the other ranks before the step; ``None`` if that
            cannot be.
        counters: What happened to the decompositions.
        background: Bases that are being computed for later steps.
        changed: The layers are others than the ranks have agreed on.

    Args:
        rounds: Says whether a layer's gradient may be rounded on the way into its
            basis, see :func:`ekfac.kernels.rotate_into`: the same for all layers of one
            treatment.
        damps: Says whether the step damps a layer.
    """

    def __init__(
        self,
        curvature: Curvature,
        options: Options,
        seed: int,
        ranks: Ranks | None,
        rounds: Callable[[LayerCurvature], bool],
        damps: Callable[[LayerCurvature], bool],
    ) -> None:
        self.curvature, self.options, self.ranks = curvature, options, ranks
        self.window = Window(curvature, options, 1 if ranks is None else ranks.size)
        self.overlapped = None if ranks is None else OverlappedAllReduce(ranks)
        self.seed, self.step = seed, 0
        self._rounds, self._damps = rounds, damps
        self.counters = Counters()
        self.background = AsyncEigh(options.basis_tolerance)
        self.rows: dict[str, int] = {}
        self.counts: tuple[Tensor, Tensor] | None = None
        self.noise: Tensor | None = None
        self.launches = LaunchQueue()
        self._workspace, self._stacks = Workspace(), Stacks()
        self._task = -1
        self._draws = 0
        self.changed = False
        self._places = 0
        self._wanted_thin: dict[str, bool] = {}
        self._dear: set[str] = set()
        self._left: list[tuple[Tensor, weakref.ref[Tensor], int]] = []

    def plan_step(self, step: int) -> None:
        """Decide what the step of this number takes from its batch."""
        ready = {name: layer.ready for name, layer in self.curvature.items()}
        self.window.plan = self.options.schedule.plan(step, ready)
        self.step = step
        self._wanted_thin.clear()
        if self.ranks is not None:
            self.ranks.failures.step = step

    @property
    def _per_example(self) -> bool:
        """Whether the coming step takes scalings from the gradients of examples."""
        return self.window.plan.scalings and self.options.scaling == "per_example"

    # -- during forward and backward: capture.Sink ------------------------------------

    def begin(self, terms: TargetMask | None, *, averaged: bool) -> bool:
        """Note that a backward pass begins; see :meth:`Sink.begin`."""
        discarded = self._discard_cleared()
        if terms is not None:
            self.window.count(terms)
        if self.overlapped is not None:  # what is sent depends on the layers
            averaged = averaged and not self.changed
            self.overlapped.note_pass(self.window, averaged=averaged)
        return discarded

    def _discard_cleared(self) -> bool:
        """Forget what was collected if its gradients have been cleared since.

        Returns:
            Whether they have. It is looked up once for every backward pass.
        """
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return False
        discarded = self._gradients_cleared()
        if discarded:
            self.clear()
        self._task = task
        if in_backward():
            when_backward_ends(self._note_gradients)
        return discarded

    def _note_gradients(self) -> None:
        """Note the gradients as a backward pass has left them."""
        self._left = [
            (p, weakref.ref(grad), grad._version)
            for layer in self.curvature.values()
            for p in layer.block.tensors()
            if (grad := p.grad) is not None
        ]

    def _as_left(self) -> bool:
        """Return whether the gradients are those that the last pass has left.

        A flat loss leaves zeros, which nobody has set. What counts are the gradients
        that parameters have, not those that a user keeps elsewhere.
        """
        return bool(self._left) and all(
            (grad := p.grad) is not None and grad is ref() and grad._version == version
            for p, ref, version in self._left
        )

    def miss(self, layer: str, why: str) -> bool:
        """Note calls that are not recorded; see :meth:`Sink.miss`."""
        discarded = self._discard_cleared()
        self.window.missed.setdefault(why, []).append(layer)
        return discarded

    def cleared(self) -> bool:
        """Return whether gradients were cleared since the last backward pass."""
        return self.window.examples is None or self._gradients_cleared()

    def complete(self, block: Block) -> None:
        """Note that this backward pass brings nothing more of ``block``."""
        if self.overlapped is not None:
            self.overlapped.note_complete(self.window, block.name)

    def reject(self) -> None:
        """Count a batch whose outputs are not finite, of which nothing is taken."""
        self.counters.rejected += 1

    def _gradients_cleared(self) -> bool:
        """Return whether gradients were set to zero or ``None`` since they were made.

        Sharded parameters do not show it: without synchronisation their gradients are
        elsewhere.
        """
        if self._as_left():
            return False
        if self.window.statistics:
            blocks = [self.curvature[name].block for name in self.window.statistics]
        else:
            blocks = [layer.block for layer in self.curvature.values()]
        if any(block.sharded for block in blocks):
            return False
        return not any(
            (grad := p.grad) is not None and bool(grad.any())
            for block in blocks
            for p in block.tensors()
        )

    def wants(self, block: Block) -> bool:
        """Return whether the coming step takes statistics of ``block``."""
        if not (self.window.plan.factors or self._per_example):
            thin = self._wanted_thin.get(block.name)
            if thin is None:  # the same until the step has been made
                thin = self._wanted_thin[block.name] = self._thin(block)
            if not thin:
                return False
        return block.tensors()[0].requires_grad and self._knows(block)

    def _knows(self, block: Block) -> bool:
        """Return whether the block is still one of the model's."""
        layer = self.curvature.get(block.name)
        return layer is not None and layer.block is block

    def separates(self, block: Block) -> bool:
        """Return whether what is taken of ``block`` depends on its rows' examples."""
        whole = block.exact or self.options.sharing == "reduce"
        return self._per_example or (self.window.plan.factors and whole)

    def _thin(self, block: Block) -> bool:
        """Return whether the gradient is cheaper to project as two thin factors."""
        rows = self.rows.get(block.name)
        if rows is None:
            return False
        _, d_out, d_in = block.shape
        layer = self.curvature[block.name]
        dense = kernels.rotation_cost(
            block.shape, layer.dtype, layer.device, precise=not self._rounds(layer)
        )
        if rows * (d_out**2 + d_in**2 + d_out * d_in) >= 0.8 * dense:
            return False
        unfit = block.adapter.diagonal_input or block.adapter.costly or block.mixed
        if unfit or not self._takes_thin(block.tensors()[0].device):
            return False
        if block.exact or any(block.diagonal) or block.name in self.window.plan.refresh:
            return False
        return not layer.truncated  # thin already

    def _takes_thin(self, device: torch.device) -> bool:
        """Return whether the recorded calls may be the gradient, and have no kernel.

        Those of one of several ranks are the gradient of its share alone.
        """
        return self.options.empirical and self.ranks is None and device.type == "cpu"

    def add(
        self,
        block: Block,
        pairs: Sequence[LayerCall],
        terms: TargetMask | None,
        *,
        repeated: bool = False,
    ) -> None:
        """Add the calls of one block in one backward pass."""
        if not self._knows(block):
            return
        weight, layer = block.tensors()[0], self.curvature[block.name]
        if layer.misplaced:
            self._follow_parameters()
            layer = self.curvature[block.name]
        statistics = self.window.statistics.get(block.name)
        if statistics is None:
            dtype = layer.dtype
            # Kernels give squares alone, without the gradient in the basis.
            sketched = weight.device.type == "cpu" and not operators.applies(weight)
            statistics = self.window.statistics[block.name] = BatchStatistics(
                layer, dtype, sketched=sketched, launches=self.launches
            )
        first = layer.averages["G"].empty and statistics.dtype != torch.float64
        if first and any(_is_tiny(pair.grads, TINY) for pair in pairs):
            statistics.widen()
        if self.overlapped is not None:
            self.overlapped.note_sums(block.name)
        if terms is None:
            statistics.examples += len(pairs[0].grads)
        rows = sum(pair.grads.numel() for pair in pairs)
        statistics.rows = rows // (block.factor_shape[0] * block.shape[1])
        if self.window.plan.factors:
            with profiled("ekfac::factors"):
                sharing = self.options.sharing
                some, counted = sampled(block, pairs, terms, sharing)
                statistics.add_factors(some, counted, sharing, repeated)
        if not layer.ready or block.name in self.window.plan.refresh:
            if self._per_example:
                statistics.queue.append((list(pairs), terms))
        elif self._per_example or self._thin(block):
            with profiled("ekfac::scalings"):
                statistics.add_scalings(pairs, terms, squares=self._per_example)

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a generator whose numbers depend on the seed and the step alone."""
        self._draws += 1
        generator = torch.Generator(device)
        seed = self.seed + 1_000_003 * self.step + 7_919 * self._draws
        if self.ranks is not None:
            seed += 15_485_863 * self.ranks.rank
        return generator.manual_seed(seed % 2**63)

    def clear(self) -> None:
        """Forget what was collected."""
        if self.overlapped is not None:
            self.overlapped.drop(self.window)
        self.window.clear()
        self.launches.clear()
        self._task, self._draws = -1, 0
        self._left = []

    def forget(self, names: Collection[str]) -> None:
        """Forget layers that the model no longer has as they were covered."""
        if self.overlapped is not None:
            self.overlapped.drop(self.window)
        self._wanted_thin.clear()
        self._workspace = Workspace()  # of other shapes than are needed now
        for name in names:
            self.window.statistics.pop(name, None)
            self.rows.pop(name, None)
        self.background.drop(names)
        if self.ranks is not None:
            self.ranks.assignment.remove(names)
        self.curvature.keep([name for name in self.curvature if name not in names])

    def _follow_parameters(self) -> None:
        """Move averages to the parameters' devices; on all ranks, or they disagree."""
        self.curvature.follow_parameters()
        self.changed = True

    # -- at the step ------------------------------------------------------------------

    def reduce(
        self, loss_scale: Tensor | float, standing: Standing | None, again: bool = False
    ) -> bool:
        """Sum the window's statistics over the ranks, if there are several.

        A second try, after the ranks have agreed on their layers, is one ``again``.

        Returns:
            Whether they are summed: not if the model of some rank has changed.
        """
        self.launches.flush()
        if any(layer.misplaced for layer in self.curvature.values()):
            self._follow_parameters()
        tiny = self._narrow()
        if self.ranks is None or standing is None:
            self._widen(tiny)
            return True
        if self.changed:
            announce_change(self.ranks, self._places)
            return False
        with profiled("ekfac::reduce"):
            self.window.reduced = reduce_statistics_(
                self.window,
                self.ranks,
                loss_scale,
                self.overlapped,
                replace(standing, tiny=frozenset(tiny)),
                self._widen,
                outdated=again,
            )
        if self.overlapped is not None and self.overlapped.given_up:
            self.overlapped = None
        return self.window.reduced is not None

    def note_agreement(self) -> None:
        """Note that all ranks have the layers that this one has."""
        self.changed = False
        if self.ranks is not None:
            self._places = statement_length(self.ranks, len(self.curvature))

    def _narrow(self) -> list[str]:
        """Return the layers whose squares would leave the range of their type.

        Their first statistics show it, the eigenvalues of the last step and, on a CPU,
        the present gradients; on a GPU the step would have to wait for those.
        """
        narrow: list[str] = []
        present: list[LayerCurvature] = []
        for name, layer in self.curvature.items():
            if layer.dtype == torch.float64:
                continue
            statistics = self.window.statistics.get(name)
            new = layer.version["basis"] == self.step - 1 > 0
            new = new and not layer.values("G").is_meta
            if (statistics is not None and statistics.dtype != layer.dtype) or (
                new and _is_tiny(layer.values("G"), TINY_FACTOR)
            ):
                narrow.append(name)
            elif layer.device.type == "cpu":
                present.append(layer)
        return narrow + _with_tiny_entries(present)

    def _widen(self, names: Collection[str]) -> None:
        """Keep layers in double precision from now on, the same ones on all ranks."""
        self.background.drop(names)
        for name in names:
            layer = self.curvature.widen(name)
            statistics = self.window.statistics.get(name)
            if statistics is not None:
                statistics.widen(layer)

    def commit(
        self,
        step: int,
        loss_scale: Tensor | float,
        layers: Sequence[LayerCurvature] = (),
        treatment: Callable[[LayerCurvature], Hashable] | None = None,
    ) -> list[ProjectedGradient]:
        """Write the window's statistics into the averages and refresh bases.

        The recorded gradients carry the scale of a ``GradScaler``, ``.grad`` does not.

        Returns:
            The gradients of those ``layers`` that are :meth:`usable`, in their bases,
            in stacks of one ``treatment`` each.
        """
        statistics = self.window.statistics
        self.rows |= {name: batch.rows for name, batch in statistics.items()}
        with profiled("ekfac::factors"):
            self._commit_factors(step, loss_scale)
        with profiled("ekfac::basis"):
            self._refresh(step)
            self._begin_searches(step)
        with profiled("ekfac::scalings"):
            self._commit_per_example(step, loss_scale)
        self.counts = self.window.known_counts() or self.counts
        with profiled("ekfac::precondition"):
            current = [self.curvature[layer.name] for layer in layers]
            return self._project(current, step, treatment)

    def _refresh(self, step: int) -> None:
        """Refresh the bases that are due, from the background where they were begun."""
        plan, tolerance = self.window.plan, self.options.basis_tolerance
        due = [la for name, la in self.curvature.items() if name in plan.refresh]
        ranks = self.ranks
        own = [la for la in due if ranks is None or ranks.assignment.owns(la.name)]
        begun = self.background.take(own, self.counters)
        rest = [la for la in own if not (la.name in begun or la.name in self._dear)]
        if ranks is not None:
            refresh_on_owners_(due, rest, begun, ranks, step, tolerance, self.counters)
            return
        apply_updates_([la for la in due if la.name in begun], begun, step)
        refresh_(rest, step, tolerance, self.counters)

    def _begin_searches(self, step: int) -> None:
        """Begin to compute the bases of later steps that this rank decomposes."""
        assigned = None if self.ranks is None else self.ranks.assignment
        begin = self.window.plan.begin
        layers = [
            layer
            for name, layer in self.curvature.items()
            if name in begin and (assigned is None or assigned.owns(name))
        ]
        self.background.begin(layers, step)

    def _commit_factors(self, step: int, loss_scale: Tensor | float) -> None:
        """Add the window's factors to their averages, on a CPU all at once."""
        window, decay = self.window, self.options.factor_decay
        on_cpu: list[tuple[LayerCurvature, Tensor, Tensor]] = []
        self._dear = {n for n, s in window.statistics.items() if self._waits(s, step)}
        for name, statistics in window.statistics.items():
            if not statistics.sums:
                self._note_factors(name, step)
                continue
            if window.reduced is not None and name in window.reduced.bad:
                self.counters.rejected += 1
                continue
            layer = self.curvature[name]
            a, g = factors(statistics, *window.scale(layer, loss_scale))
            statistics.sums.clear()  # of all layers, these take as much again
            if a.device.type == "cpu":
                on_cpu.append((layer, a, g))
                continue
            layer.version["factors"] = step
            finite = is_finite(a, g)
            _update(layer.averages["A"], a, finite, decay)
            _update(layer.averages["G"], g, finite, decay)
        kept = finite_ones(on_cpu)
        self.counters.rejected += len(on_cpu) - len(kept)
        averages = [la.averages[side] for la, _, _ in kept for side in ("A", "G")]
        update_each_(averages, [f for _, a, g in kept for f in (a, g)], decay)
        for layer, _, _ in kept:
            layer.version["factors"] = step

    def _waits(self, statistics: BatchStatistics, step: int) -> bool:
        """Return whether a layer's basis is too dear to be replaced in this step.

        A truncated one is cheap, and K-FAC takes its eigenvalues along with bases.
        """
        layer, schedule = statistics.layer, self.options.schedule
        if step >= schedule.basis or not statistics.sums or not layer.ready:
            return False
        if layer.truncated or self.options.scaling is None:
            return False
        age = step - layer.version["basis"]
        return schedule.too_dear(age, passes_to_decompose(statistics))

    def _note_factors(self, name: str, step: int) -> None:
        """Note what the owner of a layer has done with the sums of its factors."""
        reduced = self.window.reduced
        if reduced is None:
            return
        if name in reduced.bad:
            self.counters.rejected += 1
        elif name in reduced.present:
            layer = self.curvature[name]
            layer.averages["A"].empty = layer.averages["G"].empty = False
            layer.version["factors"] = step

    # -- scalings ---------------------------------------------------------------------

    def _commit_per_example(self, step: int, loss_scale: Tensor | float) -> None:
        """Add the squared gradients of single examples to the scalings."""
        if not self._per_example:
            return
        window = self.window
        names = [name for name in self.curvature if name in window.statistics]
        ready = [name for name in names if self.curvature[name].ready]
        for name in ready:
            statistics = window.statistics[name]
            for pairs, terms in statistics.queue:
                statistics.add_scalings(pairs, terms, squares=True)
        self.launches.flush()
        if window.reduced is not None and self.ranks is not None:
            ready = [name for name in ready if name in window.reduced.scaled]
            sum_scalings_(window, self.ranks, ready)
        for name in names:
            layer, statistics = self.curvature[name], window.statistics[name]
            if statistics.scalings is None:
                continue
            examples, scale = window.scale(layer, loss_scale)
            sample = statistics.scalings.mul_(scale.square() / examples)
            finite = torch.isfinite(sample.sum())
            if sample.device.type == "cpu" and not bool(finite):
                self.counters.rejected += 1
                continue
            decay = self.options.scaling_decay
            _update(layer.averages["s"], sample, finite, decay)
            layer.version["scalings"] = step

    def _project(
        self,
        layers: Sequence[LayerCurvature],
        step: int,
        treatment: Callable[[LayerCurvature], Hashable] | None,
    ) -> list[ProjectedGradient]:
        """Return the layers' gradients in their bases, and update their scalings."""
        one_by_one: list[ProjectedGradient] = []
        gradients: dict[str, list[Tensor]] = {}
        shares: dict[str, Tensor] = {}
        full: dict[tuple[torch.device, bool], list[LayerCurvature]] = {}
        for layer in layers:
            if not self.usable(layer):
                continue
            gradient = gradients_of(layer)  # of sharded parameters: on all ranks
            if self._looks_along(layer):
                shares[layer.name] = _radial_share(layer, gradient)
            if self.ranks is not None and not self.ranks.assignment.works(layer.name):
                one_by_one.append(self._elsewhere(layer, step))
                continue
            if not layer.complete:
                one_by_one.append(
                    project_truncated(layer, gradient, self.options, self._workspace)
                )
                continue
            gradients[layer.name] = gradient
            if (thin := self.thin_projection(layer, gradient)) is not None:
                one_by_one.append(thin)
            else:
                key = layer.device, supports_list(layer, self.options)
                full.setdefault(key, []).append(layer)
        self._note_shares(shares)
        listed: list[ProjectedGradient] = []
        for (_, as_list), stacks in self._stacks.of(full, treatment).items():
            projections = project_list(stacks, gradients, self._rounds, self._workspace)
            if as_list:
                self._track_list(projections, step)
                listed += projections
            else:
                one_by_one += projections
        self._track(one_by_one, gradients, step)
        projections = one_by_one + listed
        if self._running and projections:
            noise = self._measure_noise(layers[0])
            for one in projections:
                one.noise = noise
        return projections

    def _measure_noise(self, layer: LayerCurvature) -> Noise:
        """Return the noise of this and of earlier steps, and average over both.

        The decay is that of squared weights in the average of the gradients, where this
        has the decay of the scalings. All layers have one factor to scalings.
        """
        newest = self.window.square_factor(layer, self.counts).reciprocal()
        earlier = newest if self.noise is None else self.noise.to(newest)
        kept = self.options.scaling_decay**2
        self.noise = newest + kept * (earlier - newest)
        return Noise(newest, earlier)

    def _looks_along(self, layer: LayerCurvature) -> bool:
        """Whether the step looks how much of a gradient lies along the weights."""
        adaptive = self.options.damping_mode == "adaptive"
        return adaptive and self.window.plan.factors and self._damps(layer)

    def _note_shares(self, shares: Mapping[str, Tensor]) -> None:
        """Note the layers whose gradients were orthogonal to their weights."""
        alike: dict[tuple[torch.device, torch.dtype], list[LayerCurvature]] = {}
        for layer in map(self.curvature.__getitem__, shares):
            alike.setdefault((layer.device, layer.dtype), []).append(layer)
        for layers in alike.values():
            own = [shares[layer.name] for layer in layers]
            averages = averaged([layer.radial for layer in layers], own)
            torch._foreach_copy_([layer.radial for layer in layers], averages)
            factors = scale_factor(torch.stack(averages)).unbind()
            for layer, factor in zip(layers, factors, strict=True):
                layer.scale_factor = factor

    def usable(self, layer: LayerCurvature) -> bool:
        """Return whether a layer has what preconditioning needs."""
        if not layer.ready:
            return False
        per_example = self.options.scaling == "per_example"
        return not (per_example and layer.averages["s"].empty)

    @property
    def _running(self) -> bool:
        """Whether scalings are averages of the squares of mean gradients."""
        return self.options.scaling == "running_average"

    @property
    def _tracks(self) -> bool:
        """Whether the coming step adds its mean gradient's square to the scalings."""
        return self._running and self.window.plan.scalings

    def _elsewhere(self, layer: LayerCurvature, step: int) -> ProjectedGradient:
        """Return the empty gradient of a layer that another rank preconditions."""
        if self._tracks:
            layer.averages["s"].empty = False
            layer.version["scalings"] = step
        return ProjectedGradient(Stack.of([layer]))

    def _track(
        self,
        projections: Sequence[ProjectedGradient],
        gradients: Mapping[str, Sequence[Tensor]],
        step: int,
    ) -> None:
        """Add the squares of projected gradients to the scalings."""
        squares: list[Square] = []
        for one in projections:
            if one.parts is None:
                continue
            every = [self.window.square_factor(la, self.counts) for la in one.layers]
            samples = [Square(one.stack, one.parts.roots, every)]
            if one.parts.roots.device.type == "cpu":
                samples = self._finite(one, samples[0], gradients)
            squares += samples if self._running else []
        for stack, roots, scales in squares:
            for number, layer in enumerate(stack.layers):
                if layer.averages["s"].empty:
                    own = roots if len(stack) == 1 else roots[number : number + 1]
                    mean = scales[number] * layer.mean(own.square())
                    self._start_scalings(layer, mean)
        if self._tracks:
            self._add_squares(squares, step)

    def _finite(
        self,
        one: ProjectedGradient,
        sample: Square,
        gradients: Mapping[str, Sequence[Tensor]],
    ) -> list[Square]:
        """Return the sample, without the layers whose squares are not finite.

        Their gradients are rejected.
        """
        stack, roots, scales = sample
        sizes = (roots.norm().unsqueeze(0) if one.norms is None else one.norms).tolist()
        most = torch.finfo(roots.dtype).max
        pairs = zip(sizes, scales, strict=True)
        finite = [size * size * float(scale) <= most for size, scale in pairs]
        if all(finite):
            return [sample]
        assert one.parts is not None
        if len(stack) == 1:
            entries = gradients.get(stack.layers[0].name, [one.parts.gradient])
            self._reject_gradient(one.parts, entries)
            return []
        kept = []
        columns = zip(stack.layers, one.by_layer(), scales, finite, strict=True)
        for layer, part, scale, good in columns:
            if good:
                kept.append(Square(Stack.of([layer]), part, [scale]))
            else:
                whole = Coordinates.of_full_basis(part)
                self._reject_gradient(whole, gradients[layer.name])
        return kept

    def _reject_gradient(self, parts: Coordinates, entries: Sequence[Tensor]) -> None:
        """Count a gradient whose square is not finite; zero it if its entries are.

        NaN and infinity go on into the parameters, as with any optimizer. Coordinates
        of finite entries may overflow.
        """
        self.counters.rejected += 1
        if all(bool(part.isfinite().all()) for part in entries):
            for part in parts.tensors():
                part.zero_()

    @staticmethod
    def _start_scalings(layer: LayerCurvature, mean: Tensor) -> None:
        """Start a layer's scalings: proportional to the Kronecker eigenvalues.

        One squared gradient estimates little more than their ``mean`` well. Where the
        eigenvalues are zero (the gradient is a penalty's) all scalings are equal.
        """
        shape = layer.kronecker_scalings()
        size, tiny = layer.mean(shape), torch.finfo(shape.dtype).tiny
        shape = torch.where(size > tiny, shape / size.clamp(min=tiny), 1.0)
        layer.averages["s"].start_(shape * mean)

    def _add_squares(self, squares: Sequence[Square], step: int) -> None:
        """Add ``factor root^2`` to the averages of layers' scalings."""
        decay = self.options.scaling_decay
        for stack, roots, scales in squares:
            if roots.device.type == "cpu":
                stack.add_squares_(roots, [float(f) for f in scales], decay)
            else:
                parts = roots.split(len(roots) // len(stack))
                for layer, part, factor in zip(
                    stack.layers, parts, scales, strict=True
                ):
                    sample, average = part.square() * factor, layer.averages["s"]
                    _update(average, sample, torch.isfinite(sample.sum()), decay)
            for layer in stack.layers:
                layer.version["scalings"] = step

    def _track_list(self, gradients: Sequence[ProjectedGradient], step: int) -> None:
        """Add the squares of a list of gradients to the scalings, in one launch.

        Each gradient gets the sums of its layers' new scalings.
        """
        layers = [layer for one in gradients for layer in one.layers]
        projected = [part for one in gradients for part in one.by_layer()]
        norms = torch.cat([one.norms for one in gradients if one.norms is not None])
        ones, zeros = torch.ones_like(norms), torch.zeros_like(norms)
        if self.options.scaling is None:
            scalings = [layer.kronecker_scalings() for layer in layers]
            sums = squares_sums(scalings, projected, ones, zeros)
        else:
            averages = [layer.averages["s"] for layer in layers]
            scalings = [average.total for average in averages]
            keep, rate = ones, zeros
            if self._tracks:
                decay, finite = self.options.scaling_decay, norms.isfinite()
                weights = [average.weight for average in averages]
                old = torch.stack(weights).clamp(min=1e-30)
                # A gradient that is not finite leaves total over weight as it is.
                keep = torch.where(finite, decay, decay + (1 - decay) / old)
                factors = [self.window.square_factor(la, self.counts) for la in layers]
                rate = torch.where(finite, (1 - decay) * torch.stack(factors), 0.0)
                torch._foreach_mul_(weights, decay)
                torch._foreach_add_(weights, 1 - decay)
                for layer in layers:
                    layer.version["scalings"] = step
            sums = squares_sums(scalings, projected, keep, rate)
        sizes = [len(one.layers) for one in gradients]
        for one, own in zip(gradients, sums.split(sizes), strict=True):
            one.scalings_sums = own

    # -- gradients from thin factors --------------------------------------------------

    def thin_projection(
        self, layer: LayerCurvature, gradients: Sequence[Tensor]
    ) -> ProjectedGradient | None:
        """Return the projected sum of outer products, if that is the gradient.

        It is, but for a factor (see :meth:`BatchStatistics.factor_to`), if nothing else
        went into ``.grad``: no penalty on the weights, no other use of the parameter.
        The ``gradients`` are as they stand in ``.grad``.
        """
        statistics = self.window.statistics.get(layer.name)
        if statistics is None or statistics.projected is None or statistics.queue:
            return None
        if not (statistics.complete and self._takes_thin(layer.device)):
            return None
        gradient = packed(layer, gradients)
        factor = statistics.factor_to(gradient)
        if factor is None:
            return None
        norms = gradient.norm()[None] if self.options.grafting == "sgd" else None
        rotated = statistics.projected.mul_(factor)
        parts = Coordinates.of_full_basis(rotated)
        return ProjectedGradient(Stack.of([layer]), parts, norms)


def _radial_share(layer: LayerCurvature, gradients: Sequence[Tensor]) -> Tensor:
    """Return the share of a layer's gradient along its weights, whole ones."""
    block = layer.block
    every = zip(block.adapter.slots(), block.tensors(), gradients, strict=True)
    parts = [
        (slot.of(whole(weight.detach())), slot.of(gradient).to(layer.dtype))
        for slot, weight, gradient in every
    ]
    return radial_share(*zip(*parts, strict=True))


def _is_tiny(values: Tensor, limit: float) -> bool:
    """Return whether the largest absolute value is below ``limit`` and not zero."""
    return values.numel() > 0 and 0 < float(values.abs().amax()) < limit


def _with_tiny_entries(layers: Iterable[LayerCurvature]) -> list[str]:
    """Return the names of the layers whose gradients, on a CPU, are tiny, not zero."""
    gradients = {
        layer.name: found
        for layer in layers
        if (found := [g for p in layer.block.tensors() if (g := p.grad) is not None])
    }
    # A norm costs a tenth of the largest entry, and shows most not to be tiny. Blocks
    # may have one parameter in common.
    first = {id(own[0]): _entries(own[0]) for own in gradients.values()}
    norms = torch._foreach_norm(list(first.values())) if first else ()
    limits = (TINY * entries.numel() ** 0.5 for entries in first.values())
    small = {
        key
        for key, norm, limit in zip(first, norms, limits, strict=True)
        if float(norm) < limit or not limit
    }
    return [
        name
        for name, own in gradients.items()
        if id(own[0]) in small and 0 < _largest(map(_entries, own)) < TINY
    ]


def _largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest absolute value in some tensors, 0 if they are empty."""
    sizes = (float(t.abs().amax()) for t in tensors if t.numel())
    return max(sizes, default=0.0)


def _entries(gradient: Tensor) -> Tensor:
    """Return the stored entries of this rank's part of a gradient."""
    gradient = local(gradient)
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _update(average: Average, sample: Tensor, finite: Tensor, decay: float) -> None:
    """Add a sample to an average that is held here, if it is finite."""
    if not average.held:
        average.empty = False
        return
    if sample.device.type != "cpu":
        # Without waiting for the device: in the place of a sample that is not finite
        # comes the average itself, which it leaves as it is.
        present = average.value() / average.weight.clamp(min=1e-30)
        sample = torch.where(finite, sample, present)
    average.update_(sample, decay)
