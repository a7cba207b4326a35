"""Statistics of one accumulation window, from recorded calls.

Everything taken between two steps is a plain sum over examples, so that accumulated
batches add up; the scale of the loss and the number of examples enter when the sums are
committed to the averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.calls import LayerCall
from ekfac.curvature.normal_form import (
    CHUNK,
    Rows,
    example_gradients,
    joined,
    normal_form,
    plus,
    reduced,
    shared,
)
from ekfac.curvature.options import Options, StepPlan
from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.state import LayerCurvature
from ekfac.curvature.truncated import summed_squares
from ekfac.kernels.convolution import Geometry, PatchGram
from ekfac.kernels.cuda import operators
from ekfac.kernels.cuda.counts import Counts
from ekfac.kernels.cuda.gram import Gram
from ekfac.kernels.cuda.operators import LaunchQueue
from ekfac.layers import Block, find_shortcuts
from ekfac.likelihoods import TargetMask


@dataclass
class FactorSums:
    """Sums of one block's factors over a window, for one orientation of its weight.

    Attributes:
        inputs: Sum of the input factor.
        grads: Sum of the output-gradient factor.
        rows: How many rows there were.
        patches: Products of convolutions whose sum :meth:`settle` takes, by geometry.
        launches: Queue of the sums that a kernel takes.
    """

    inputs: Tensor | None = None
    grads: Tensor | None = None
    rows: Tensor | int = 0
    patches: dict[Geometry, PatchGram] = field(default_factory=dict)
    launches: LaunchQueue = field(default_factory=lambda: LaunchQueue(0))

    def settle(self) -> None:
        """Finish the sums: run queued kernels, add the products of convolutions."""
        self.launches.flush()
        while self.patches:
            self.inputs = plus(self.inputs, self.patches.popitem()[1].dense())

    def _add(self, inputs: bool, term: Tensor | Gram | Counts, kind: str = "") -> None:
        """Add a sum to one side, or queue a launch of the operator ``kind`` for it."""
        sum_ = self.inputs if inputs else self.grads
        if isinstance(term, Tensor):
            self.launches.complete(sum_)
            sum_ = plus(sum_, term)
        else:
            sum_ = self.launches.add(kind, term, sum_)
        if inputs:
            self.inputs = sum_
        else:
            self.grads = sum_

    def _add_rows(
        self, inputs: bool, rows: Tensor, weight: Tensor | None, diagonal: bool
    ) -> None:
        """Add the Gram matrix of rows ``[N, S, b, d]``, or its diagonal."""
        item = operators.gram_of(rows, weight, diagonal=diagonal)
        if item is not None:
            self._add(inputs, item, "diagonal_gram_" if diagonal else "gram_")
        else:
            gram = kernels.diagonal_gram if diagonal else kernels.gram
            self._add(inputs, gram(rows, weight))

    def _add_counts(
        self,
        inputs: bool,
        index: Tensor,
        size: int,
        weight: Tensor | None,
        like: Tensor,
    ) -> None:
        """Add how often each index occurs."""
        item = operators.counts_of(index, size, weight, like)
        if item is not None:
            self._add(inputs, item, "index_counts_")
        else:
            self._add(inputs, kernels.index_counts(index, size, weight, like))

    def add_call(self, block: Block, pair: LayerCall, dtype: torch.dtype) -> bool:
        """Add a call by a shortcut that needs no rows; return whether it has one."""
        use, x, grad, _ = pair
        source = find_shortcuts(use.adapter).input_gram(x.to(dtype))
        if source is None:
            return False
        gram = source if isinstance(source, Tensor) else source.gram()
        grads = use.adapter.output_gradients(grad.to(dtype))
        if isinstance(gram, Gram):
            self._add(True, gram, "patch_gram_" if gram.conv else "gram_")
        elif isinstance(gram, Tensor):
            self._add(True, gram)
        else:
            before = self.patches.get(gram.geometry)
            self.patches[gram.geometry] = gram if before is None else before + gram
        self.add_grads(block, grads)
        self.rows = self.rows + grads.shape[0] * grads.shape[1]
        return True

    def add_grads(self, block: Block, grads: Tensor) -> None:
        """Add output gradients ``[N, S, b, d_out]``, none of them masked."""
        grads = grads[:, :, :1] if block.shared else grads
        self._add_rows(False, grads, None, block.diagonal[1])

    def finite(self) -> Tensor:
        """Return whether the sums are finite, a tensor without dimensions."""
        assert self.inputs is not None
        assert self.grads is not None
        return torch.isfinite(self.inputs.sum() + self.grads.sum())

    def add(self, rows: Rows, block: Block, sharing: str, repeated: bool) -> None:
        """Add the rows of one use; of a ``repeated`` backward only the gradients."""
        if block.exact:
            self._add_exact(rows)
            return
        _, d_out, d_in = block.shape
        new_inputs = not repeated or rows.transposed
        new_grads = not (repeated and rows.transposed)
        if sharing == "reduce" and not rows.transposed:
            rows = reduced(rows, d_in)
        counted = rows.count()
        rows = shared(rows) if block.shared else rows
        if new_inputs:
            a_weight = None if rows.transposed else rows.weight
            if rows.indexed:
                self._add_counts(True, rows.inputs, d_in, a_weight, rows.grads)
            else:
                self._add_rows(True, rows.inputs, a_weight, block.diagonal[0])
        if new_grads:
            g_weight = rows.weight if rows.transposed else None
            if rows.transposed and rows.grads.dim() == 2:
                self._add_counts(False, rows.grads, d_out, g_weight, rows.inputs)
            else:
                self._add_rows(False, rows.grads, g_weight, block.diagonal[1])
        if new_inputs and new_grads:
            self.rows = self.rows + counted

    def _add_exact(self, rows: Rows) -> None:
        """Add the second moment of examples' gradients, which ``rows.inputs`` hold."""
        gradients = rows.inputs
        if gradients.shape[1] > 1:  # of several calls
            gradients = gradients.sum(dim=1, keepdim=True)
        self._add_rows(True, gradients, None, diagonal=False)
        n, _, b, _ = gradients.shape
        self._add(False, gradients.new_full((b, 1, 1), n))
        self.rows = self.rows + n


@dataclass
class BatchStatistics:
    """One block's sums over an accumulation window.

    Attributes:
        layer: The block's curvature, whose basis the scalings are taken in.
        sums: Factor sums, by whether the use is transposed.
        scalings: ``sum_n (Q_G^T dW_n Q_A)^2``, ``[b, d_out, d_in]``.
        projected: ``sum_n Q_G^T dW_n Q_A``: the gradient in the basis, from its thin
            factors.
        sketch: ``sum_n dW_n R`` for the layer's probe vectors ``R``, to recognise the
            gradient by, ``[b, d_out, 2]``.
        noise: Sum of the squared norms of the terms of ``sketch``, for its rounding.
        complete: Every call since the window began is in ``projected``.
        examples: How many examples there were, where no output said so.
        rows: How many rows the inputs of the last backward pass had.
        queue: Calls that wait for the basis to be refreshed.
        sketched: Whether ``projected`` is kept, with its sketch.
        launches: Queue of the sums that a kernel takes.
    """

    layer: LayerCurvature
    dtype: torch.dtype
    sums: dict[bool, FactorSums] = field(default_factory=dict)
    scalings: Tensor | None = None
    projected: Tensor | None = None
    sketch: Tensor | None = None
    noise: Tensor | None = None
    complete: bool = True
    examples: int = 0
    rows: int = 0
    queue: list[tuple[list[LayerCall], TargetMask | None]] = field(default_factory=list)
    sketched: bool = False
    launches: LaunchQueue = field(default_factory=lambda: LaunchQueue(0))

    def add_factors(
        self,
        pairs: Sequence[LayerCall],
        terms: TargetMask | None,
        sharing: str,
        repeated: bool = False,
    ) -> None:
        """Add the calls of one backward pass to the factor sums.

        If it is a ``repeated`` one, the inputs were added with an earlier pass.
        """
        block = self.layer.block
        summed = sharing == "reduce" or block.exact
        if not summed and (terms is None or terms.mask is None):
            pairs = [p for p in pairs if not self._add_call(p, repeated)]
        if not pairs:
            return
        for uses in normal_form(pairs, terms, self.dtype):
            thin = joined(uses) if summed else None
            for rows in uses if thin is None else [thin]:
                self._sums(rows.transposed).add(rows, block, sharing, repeated)

    def widen(self, layer: LayerCurvature | None = None) -> None:
        """Continue in double precision, with the new curvature ``layer`` if given."""
        self.layer, self.dtype = layer or self.layer, torch.float64
        self.complete = False  # what was projected is in single precision
        for sums in self.sums.values():
            sums.settle()
            sums.inputs, sums.grads = _double(sums.inputs), _double(sums.grads)
        self.launches.flush()
        self.scalings = _double(self.scalings)

    def _sums(self, transposed: bool) -> FactorSums:
        if transposed not in self.sums:
            self.sums[transposed] = FactorSums(launches=self.launches)
        return self.sums[transposed]

    def _add_call(self, pair: LayerCall, repeated: bool) -> bool:
        """Add one call to the factor sums without its rows; return whether it was."""
        block, use = self.layer.block, pair.use
        if use.transposed or block.diagonal[0] or use.adapter.diagonal_input:
            return False
        sums = self._sums(False)
        if repeated and use.adapter.mask(pair.inputs) is None:
            grads = use.adapter.output_gradients(pair.grads.to(self.dtype))
            sums.add_grads(block, grads)
            return True
        return sums.add_call(block, pair, self.dtype)

    def add_scalings(
        self, pairs: Sequence[LayerCall], terms: TargetMask | None, *, squares: bool
    ) -> None:
        """Add the calls of one backward pass to the scalings, or to the gradient alone.

        Without ``squares`` only ``projected`` and its sketch are summed.
        """
        truncated = self.layer.truncated
        if squares and not truncated and self._add_rotated(pairs, terms):
            return
        for uses in normal_form(pairs, terms, self.dtype):
            rows = joined(uses)
            left = self.layer.basis("G")
            if rows is not None and not (truncated or rows.indexed):
                self._add_joined(rows, squares)
                continue
            self.complete = False
            if truncated:
                self._add_squares(summed_squares(self.layer, uses))
            elif rows is None:  # of different form
                right = self.layer.basis("A")
                for gradients in example_gradients(uses, self.layer.block.shape):
                    rotated = kernels.rotate_matrix(gradients, left, right)
                    self._add_squares(rotated.square().sum(dim=0))
            else:
                size = self.layer.block.shape[2]
                moments = kernels.indexed_second_moment(
                    rows.grads, rows.inputs, size, left
                )
                self._add_squares(moments)

    def _add_rotated(
        self, pairs: Sequence[LayerCall], terms: TargetMask | None
    ) -> bool:
        """Add one call by the layer's own rotation of its inputs, if that is cheaper.

        Returns:
            Whether it was added.
        """
        (use, x, grad, index), block = pairs[0], self.layer.block
        right = self.layer.basis("A")
        if len(pairs) > 1 or use.transposed or block.exact or right is None:
            return False
        if index is not None:
            return False
        _, d_out, d_in = block.shape
        g = use.adapter.output_gradients(grad.to(self.dtype))
        examples = len(g) if terms is None else terms.size
        # Fewer positions than outputs; of one alone, vectors need no sum at all.
        if not 1 < g.shape[1] < d_out or len(g) != examples:
            return False
        x = x.to(self.dtype)
        g = kernels.rotate(g, self.layer.basis("G")).permute(0, 2, 3, 1)
        # A part of the basis, and the inputs in it, are copies.
        step = max(1, CHUNK // (8 * max(g[:, :, 0].numel(), right[..., 0].numel())))
        for start in range(0, d_in, step):
            part = slice(start, min(start + step, d_in))
            a = find_shortcuts(use.adapter).rotated_inputs(x, right[:, :, part])
            if a is None:
                return False
            self.launches.complete(self.scalings)
            if self.scalings is None:
                self.scalings = g.new_zeros(block.shape)
            kernels.add_squared_sums_(self.scalings[..., part], g, a)
        self.complete = False
        return True

    def _add_joined(self, rows: Rows, squares: bool) -> None:
        left, right = self.layer.basis("G"), self.layer.basis("A")
        if squares and not self.sketched:
            item = _launched(rows, left, right)
            if item is not None:
                self.scalings = self.launches.add("scalings_", item, self.scalings)
                self.complete = False
                return
        if squares:
            moment, sums = kernels.second_moment(rows.grads, rows.inputs, left, right)
            self._add_squares(moment)
        else:
            sums = kernels.total_gradient(
                kernels.rotate(rows.grads, left), kernels.rotate(rows.inputs, right)
            )
        if not self.sketched:
            return
        self.projected = plus(self.projected, sums)
        inputs = rows.inputs
        probes = probe_vectors(inputs.shape[-1], inputs.dtype, inputs.device)
        along = inputs @ probes
        sketch = kernels.total_gradient(rows.grads, along)
        self.sketch = plus(self.sketch, sketch)
        size = rows.grads.square().sum(-1) * rows.inputs.square().sum(-1)
        self.noise = plus(self.noise, size.sum())

    def _add_squares(self, squares: Tensor) -> None:
        self.launches.complete(self.scalings)
        self.scalings = plus(self.scalings, squares)

    def factor_to(self, gradient: Tensor) -> float | None:
        """Return the factor from the recorded sum to ``gradient`` (clipping, a scale).

        Both are multiplied with the probe vectors; ``None`` if the products differ by
        more than a factor and rounding.

        Args:
            gradient: ``[b, d_out, d_in]``.
        """
        assert self.sketch is not None
        assert self.noise is not None
        size, kind = gradient.shape[-1], (gradient.dtype, gradient.device)
        expected = gradient @ probe_vectors(size, *kind)
        square = float(self.sketch.square().sum())
        if square == 0:
            return None
        factor = float((expected * self.sketch).sum()) / square
        difference = float((expected - factor * self.sketch).norm())
        eps = torch.finfo(gradient.dtype).eps
        rounding = 256 * eps * abs(factor) * float(self.noise.sqrt())
        return factor if difference <= rounding else None  # NaN is not


def _launched(rows: Rows, left: Tensor | None, right: Tensor | None) -> Any:
    """Return a launch that squares vectors in the basis, ``None`` if no kernel does."""
    grads, inputs = rows.grads, rows.inputs
    if not operators.applies(grads):
        return None
    if not kernels.rotates_vectors(grads, inputs, left, right):
        return None
    rotated = kernels.rotate(grads, left), kernels.rotate(inputs, right)
    return operators.squares_of(*rotated)


def _double(sums: Tensor | None) -> Tensor | None:
    return None if sums is None else sums.double()


@lru_cache(maxsize=64)
def probe_vectors(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the vectors that sketch gradients of this input size, ``[size, 2]``.

    Two: of the gradient of a single output one product would show the length alone.
    """
    generator = torch.Generator().manual_seed(size)
    probes = torch.randn(size, 2, generator=generator, dtype=torch.float64)
    return probes.to(device=device, dtype=dtype)


def passes_to_decompose(statistics: BatchStatistics) -> float:
    """Return what decomposing a layer's factors costs, in passes of their rows.

    About ``9 d^3`` multiplications and additions for each factor, and for a pass
    forward and backward through the layer 6 for each row and element of its weight.
    The rows are those of all micro-batches and ranks.
    """
    block = statistics.layer.block
    blocks, d_out, d_in = block.shape
    diagonal_A, diagonal_G = block.diagonal
    cost = d_in**3 * (not diagonal_A) + d_out**3 * (not diagonal_G)
    cost *= block.factor_shape[0]  # the taps of a convolution may have one pair
    rows = sum(int(sums.rows) for sums in statistics.sums.values())
    return 9 * cost / (6 * max(1, rows) * blocks * d_out * d_in)


def factors(
    statistics: BatchStatistics, examples: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the window's ``A`` and ``G``.

    Args:
        statistics: The sums.
        examples: How many examples count, ``N``.
        scale: The factor from the recorded gradients to those of the examples' own
            losses.

    Returns:
        Samples for the averages. For a weight that is used both as it is and
        transposed, ``F = A1 (x) G1 + A2 (x) G2`` is replaced by the product of its
        partial traces over ``tr F``, which has the same partial traces.
    """
    squared = scale.square() / examples
    for sums in statistics.sums.values():
        sums.settle()
    if statistics.layer.block.exact:
        only = statistics.sums[False]
        assert only.inputs is not None
        assert only.grads is not None
        return only.inputs * squared, only.grads / only.rows
    terms = []
    for transposed, sums in statistics.sums.items():
        assert sums.inputs is not None
        assert sums.grads is not None
        rows = sums.rows if isinstance(sums.rows, Tensor) else max(sums.rows, 1)
        if isinstance(rows, Tensor):
            rows = rows.to(sums.inputs).clamp(min=1)
        if transposed:
            terms.append((sums.inputs * squared, sums.grads / rows))
        else:
            block = statistics.layer.block
            repeats = block.shape[0] // block.factor_shape[0]
            terms.append((sums.inputs / (rows * repeats), sums.grads * squared))
    if len(terms) == 1:
        return terms[0]
    (a1, g1), (a2, g2) = terms
    tr_a1, tr_g1, tr_a2, tr_g2 = (trace(factor) for factor in (a1, g1, a2, g2))
    total = tr_a1 * tr_g1 + tr_a2 * tr_g2
    tiny = torch.finfo(squared.dtype).tiny
    inner = tr_g1 * a1 + tr_g2 * a2
    return inner / total.clamp(min=tiny), tr_a1 * g1 + tr_a2 * g2


def trace(factor: Tensor) -> Tensor:
    """Return the trace of a dense or diagonal factor of one block."""
    if factor.dim() == 2:
        return factor.sum()
    return factor.diagonal(dim1=-2, dim2=-1).sum()


def is_finite(a: Tensor, g: Tensor) -> Tensor:
    """Return whether factors, and the products of their eigenvalues, are finite, 0-d.

    The largest product of eigenvalues is no larger than that of the traces.
    """
    return torch.isfinite(a.sum() + g.sum()) & torch.isfinite(trace(a) * trace(g))


def finite_ones(
    samples: Sequence[tuple[LayerCurvature, Tensor, Tensor]],
) -> list[tuple[LayerCurvature, Tensor, Tensor]]:
    """Return the layers on a CPU whose factors are finite, as :func:`is_finite` says.

    Norms bound everything that it adds and multiplies, and are taken in one call.
    """
    if not samples:
        return []
    norms = iter(torch._foreach_norm([f for _, a, g in samples for f in (a, g)]))
    kept = []
    for layer, a, g in samples:
        bounds = [f.numel() * float(next(norms)) for f in (a, g)]
        largest = torch.finfo(a.dtype).max
        bounded = all(value < largest for value in (*bounds, bounds[0] * bounds[1]))
        if bounded or bool(is_finite(a, g)):
            kept.append((layer, a, g))
    return kept


def _at_least_one(counts: tuple[Tensor, Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers of examples and of terms in the type of another tensor."""
    examples, terms = (count.to(like).clamp(min=1) for count in counts)
    return examples, terms


# -- the window between two steps ------------------------------------------------------


@dataclass(frozen=True)
class ReducedCounts:
    """Counts of all ranks, known once their statistics are summed.

    Attributes:
        spread: ``sum_r N_r / T_r^2`` over the ranks' examples and loss terms, ``None``
            where no rank saw outputs.
        scales: Layer -> the factor from this rank's recorded gradients to those of the
            examples' own losses.
        present: Layers of which some rank has factor sums.
        scaled: Layers of which some rank has sums for the scalings.
        bad: Layers of which some rank's sums are not finite.
        unchecked: Some rank has a model or a state that was not compared with the
            others'.
    """

    spread: Tensor | None
    scales: Mapping[str, Tensor]
    present: frozenset[str]
    scaled: frozenset[str]
    bad: frozenset[str]
    unchecked: bool


class Window:
    """Sums and counts of everything since the last step.

    Attributes:
        plan: What the coming step takes.
        statistics: The layers' sums.
        examples: How many examples there were, where the model's output was seen.
        terms: How many terms their loss has.
        reduced: What is known of the other ranks, from the step's reduction on.
        missed: Reason -> layers, of calls that add to ``.grad`` and are not recorded.
    """

    def __init__(self, curvature: Curvature, options: Options, ranks: int = 1) -> None:
        self.curvature, self.options, self.ranks = curvature, options, ranks
        self.plan = StepPlan()
        self.statistics: dict[str, BatchStatistics] = {}
        self.examples: Tensor | None = None
        self.terms: Tensor | None = None
        self.reduced: ReducedCounts | None = None
        self.missed: dict[str, list[str]] = {}
        self._square_factors: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        # Device and type -> the numbers as they were counted, and those of a layer.
        self._counts: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Forget what was collected."""
        self.statistics.clear()
        self.examples = self.terms = self.reduced = None
        self.missed.clear()
        self._square_factors.clear()
        self._counts.clear()

    def count(self, mask: TargetMask) -> None:
        """Add the examples and loss terms of one backward pass."""
        if self.examples is None or self.terms is None:
            self.examples, self.terms = mask.examples, mask.terms
        else:
            self.examples = self.examples + mask.examples
            self.terms = self.terms + mask.terms

    def known_counts(self) -> tuple[Tensor, Tensor] | None:
        """Return the numbers of examples and of loss terms, or ``None`` if unknown.

        Where no output of the model was seen, examples are counted by the layers.
        """
        if self.examples is not None and self.terms is not None:
            return self.examples, self.terms
        counted = max((s.examples for s in self.statistics.values()), default=0)
        if not counted:
            return None
        layer = next(iter(self.statistics.values())).layer
        examples = layer.averages["A"].weight.new_full((), counted)
        return examples, examples

    def counts(
        self, layer: LayerCurvature, last: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the numbers of examples and of loss terms of a layer, at least 1.

        Where no output of the model was seen they are those of the ``last`` window that
        knew them; without one, examples are counted by the layer.
        """
        counts, like = last, layer.averages["A"].weight
        if self.examples is not None and self.terms is not None:
            counts = self.examples, self.terms
            known, key = self._counts, (like.device, like.dtype)
            if key not in known or known[key][0] is not self.examples:
                known[key] = self.examples, *_at_least_one(counts, like)
            return known[key][1:]
        if counts is None:
            batch = self.statistics.get(layer.name)
            counted = like.new_full((), 1 if batch is None else batch.examples)
            counts = counted, counted
        return _at_least_one(counts, like)

    def mean_scale(
        self, layer: LayerCurvature, last: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return examples, and the factor from ``.grad`` to the sum of their losses.

        The user's loss is ``1/T`` or 1 times the sum of ``T`` loss terms. Where ranks
        took means over unequal numbers of them, their average is no multiple of the
        sum; the factor is then such that the scaled gradient's variance is the sum's.
        For ``last`` see :meth:`counts`.
        """
        examples, terms = self.counts(layer, last)
        summed, reduced = self.options.loss_reduction == "sum", self.reduced
        if reduced is None:
            return examples, torch.ones_like(terms) if summed else terms
        if summed:
            return examples, torch.full_like(terms, self.ranks)
        if self.options.loss_reduction == "mean" and reduced.spread is not None:
            spread = reduced.spread.to(terms)
            return examples, self.ranks * (examples / spread).sqrt()
        return examples, terms

    def square_factor(
        self, layer: LayerCurvature, last: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Return the factor from the square of a layer's ``.grad`` to its scalings.

        It is known at the step, when everything has been counted.
        """
        key = layer.device, layer.dtype
        factor = self._square_factors.get(key)
        if factor is None:
            examples, scale = self.mean_scale(layer, last)
            factor = scale.square() / examples
            if self.examples is not None or last is not None:  # not the layer's own
                self._square_factors[key] = factor
        return factor

    def scale(
        self, layer: LayerCurvature, loss_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return examples, and the factor from recorded gradients to their own losses'.

        Sampled and exact pseudo-gradients are those of the example's own loss already.
        """
        examples, terms = self.counts(layer)
        if not self.options.empirical or self.reduced is not None:
            return examples, torch.ones_like(terms)
        summed = self.options.loss_reduction == "sum"
        scale = torch.ones_like(terms) if summed else terms
        return examples, scale / loss_scale

    def rank_scale(self, layer: LayerCurvature) -> Tensor | None:
        """Return the part of :meth:`scale` that differs between ranks."""
        if self.options.loss_reduction != "mean" or not self.options.empirical:
            return None
        return self.scale(layer, 1.0)[1]
