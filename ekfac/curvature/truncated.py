"""Truncated eigenbases: leading eigenvectors, and one direction for all the others.

Of a factor of width ``d`` the ``r`` leading eigenvectors ``U`` are kept. A full basis
has ``d`` entries, this one ``r + 1``: scalings ``s [b, 1 + r_G, 1 + r_A]`` have a first
row and column for the complement, whose entries are means over it. A gradient ``W`` is
divided into what lies in the kept directions of both sides, of one side and of neither.
Each part has its own multiplier, so that the step is

    D = m_c W + U_G X + Y U_A^T,

a scaled gradient and two thin products. The means over the complement come from the
norms of the residuals of every projected gradient, as fresh as the other scalings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.normal_form import Rows, example_gradients, joined, plus
from ekfac.curvature.state import BasisUpdate, Counters, LayerCurvature
from ekfac.kernels.decomposition import leading, with_random_columns
from ekfac.layers.blocks import NARROW

logger = logging.getLogger(__name__)

# Parts into which a complement is divided, and the largest power in its profile.
QUANTILES = 16
STEEPEST = 64.0


@dataclass(frozen=True)
class Coordinates:
    """A gradient ``W`` taken apart.

    Attributes:
        gradient: ``[*, b, d_out, d_in]``; the other parts have its leading dimensions.
            Of a full basis, the coordinates themselves.
        left: ``U_G^T W`` ``[*, b, r_G, d_in]``; ``None`` if all of the inputs are kept.
        right: ``W U_A`` ``[*, b, d_out, r_A]``; ``None`` if all of the outputs are.
        kept: ``U_G^T W U_A`` ``[*, b, r_G, r_A]``.
        roots: Root mean squares of the coordinates, in the shape of the scalings.
    """

    gradient: Tensor
    left: Tensor | None
    right: Tensor | None
    kept: Tensor
    roots: Tensor

    def tensors(self) -> list[Tensor]:
        """Return all parts that there are."""
        parts = self.gradient, self.left, self.right, self.kept, self.roots
        return [part for part in parts if part is not None]

    @classmethod
    def of_full_basis(cls, rotated: Tensor) -> Coordinates:
        """Return the coordinates ``Q_G^T W Q_A`` in a basis that leaves nothing out."""
        return cls(rotated, None, None, rotated, rotated)


def _bases(layer: LayerCurvature) -> tuple[Tensor, Tensor]:
    U_G, U_A = layer.basis("G"), layer.basis("A")
    assert U_G is not None
    assert U_A is not None
    return U_G, U_A


def coordinates(layer: LayerCurvature, gradient: Tensor) -> Coordinates:
    """Return a gradient ``[*, b, d_out, d_in]`` in the layer's truncated basis."""
    U_G, U_A = _bases(layer)
    left = right = None
    if layer.complement("A"):
        left = kernels.matmul(U_G.transpose(-1, -2), gradient)
    if layer.complement("G"):
        right = kernels.matmul(gradient, U_A)
    if left is not None:
        kept = kernels.matmul(left, U_A)
    else:
        images = kernels.matmul(gradient, U_A) if right is None else right
        kept = kernels.matmul(U_G.transpose(-1, -2), images)
    norms = None
    if left is not None and right is not None:
        # What is left of the whole in the complement is a difference.
        norms = row_norms(gradient).square().sum(dim=-1)
    squares = mean_squares(layer, norms, left, right, kept)
    return Coordinates(gradient, left, right, kept, squares.sqrt_())


def row_norms(matrices: Tensor) -> Tensor:
    """Return the norms of the rows, ``[*, d_out]``.

    The sum of their squares is exact to single precision. ``vector_norm`` over all of a
    matrix whose rows are not contiguous loses half of the digits.
    """
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=-1)
    return norms


def norm_of(matrices: Tensor) -> Tensor:
    """Return the norm of all elements, see :func:`row_norms`."""
    norm: Tensor = torch.linalg.vector_norm(row_norms(matrices))
    return norm


def mean_squares(
    layer: LayerCurvature,
    norms: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    kept: Tensor,
) -> Tensor:
    """Return mean squared coordinates, ``[*, b, 1 + r_G, 1 + r_A]``.

    Squares of what lies outside the kept directions are differences of norms. The
    gradient's squared ``norms`` ``[*, b]`` are needed if both sides leave directions
    out; the other parts are those of :class:`Coordinates`.
    """
    rest_G, rest_A = layer.complement("G"), layer.complement("A")
    squares = kept.square()
    shape = (*squares.shape[:-2], *layer.averages["s"].total.shape[-2:])
    result = squares.new_empty(shape)
    g, a = int(rest_G > 0), int(rest_A > 0)
    result[..., g:, a:] = squares
    if rest_A:
        assert left is not None
        rows = left.square().sum(dim=-1)
        result[..., g:, 0] = (rows - squares.sum(dim=-1)) / rest_A
    if rest_G:
        assert right is not None
        columns = right.square().sum(dim=-2)
        result[..., 0, a:] = (columns - squares.sum(dim=-2)) / rest_G
    if rest_A and rest_G:
        assert norms is not None
        inside = rows.sum(dim=-1) + columns.sum(dim=-1) - squares.sum(dim=(-2, -1))
        result[..., 0, 0] = (norms - inside) / (rest_G * rest_A)
    return result.clamp_(min=0)


def outer_squares(rows: Tensor, basis: Tensor, rest: int) -> Tensor:
    """Return mean squared coordinates of vectors ``[N, b, d]``: ``[b, N, 1 + r]``.

    Those of a gradient ``g a^T`` are the products of its factors'.
    """
    along = kernels.matmul(rows.transpose(0, 1), basis).square()
    if not rest:
        return along
    norms = rows.transpose(0, 1).square().sum(dim=-1, keepdim=True)
    others = (norms - along.sum(dim=-1, keepdim=True)).clamp_(min=0) / rest
    return torch.cat([others, along], dim=-1)


def combine_(layer: LayerCurvature, parts: Coordinates, multipliers: Tensor) -> Tensor:
    """Return the sum of the gradient's parts, each times its multiplier.

    It overwrites the gradient ``[b, d_out, d_in]``. Multipliers have the shape of the
    scalings.
    """
    U_G, U_A = _bases(layer)
    g, a = int(layer.complement("G") > 0), int(layer.complement("A") > 0)
    zero = multipliers.new_zeros(())
    of_left = multipliers[:, g:, :1] if a else zero
    of_right = multipliers[:, :1, a:] if g else zero
    of_both = multipliers[:, :1, :1] if g and a else zero
    inner = parts.kept * (multipliers[:, g:, a:] - of_left - of_right + of_both)
    inputs = U_A.transpose(-1, -2).expand(len(inner), -1, -1)
    across = kernels.matmul(inner, inputs)
    if parts.left is not None:
        across = across.addcmul_(parts.left, (of_left - of_both).expand_as(parts.left))
    thin, wide = [U_G.expand(len(inner), -1, -1)], [across]
    if parts.right is not None:
        thin.append(parts.right * (of_right - of_both))
        wide.append(inputs)
    step, keep = parts.gradient, int(parts.left is not None and parts.right is not None)
    if keep:
        step.mul_(of_both)
    return step.baddbmm_(torch.cat(thin, -1), torch.cat(wide, -2), beta=keep)


# -- the complement's spectrum --------------------------------------------------------


def profile(layer: LayerCurvature, side: str) -> Tensor:
    """Return how the eigenvalues outside the basis spread about their mean.

    They lie between zero and the smallest eigenvalue that is kept. At the quantile
    ``u`` they are taken to be ``u^p`` times that one, with the ``p`` of the right mean.

    Returns:
        ``[b or 1, q]``, mean 1: one number for each of ``q`` equal parts of the
        complement; ``q = 0`` without a complement.
    """
    values = layer.values(side)
    if not layer.complement(side):
        return values[..., :0]
    mean = values[..., 0]
    least = values[..., 1] if values.shape[-1] > 1 else mean
    tiny = torch.finfo(values.dtype).tiny
    power = (least / mean.clamp(min=tiny) - 1).clamp(min=0, max=STEEPEST)
    u = torch.arange(QUANTILES, dtype=values.dtype, device=values.device)
    curve = ((u + 0.5) / QUANTILES) ** power.unsqueeze(-1)
    return curve / curve.mean(dim=-1, keepdim=True)


def spread(layer: LayerCurvature, values: Tensor) -> Tensor:
    """Return values in the scalings' shape with ``q`` copies of each complement's."""
    for side, dim in (("G", -2), ("A", -1)):
        if layer.complement(side):
            repeats = values.new_ones(values.shape[dim]).long()
            repeats[0] = QUANTILES
            values = values.repeat_interleave(
                repeats, dim, output_size=values.shape[dim] - 1 + QUANTILES
            )
    return values


def refined(layer: LayerCurvature, scalings: Tensor) -> tuple[Tensor, Tensor]:
    """Return scalings that resolve the complement, and the weights to undo it.

    The complement's mean is measured. The spread about it is that of the factors'
    eigenvalues, as in K-FAC. Both results have ``q`` rows, or columns, in the place of
    the first of ``[b, e_G, e_A]``.
    """
    weights = torch.ones_like(spread(layer, scalings))
    for side, dim in (("G", -2), ("A", -1)):
        shape = profile(layer, side)
        if shape.shape[-1]:
            part = weights.narrow(dim, 0, QUANTILES)
            part *= shape.unsqueeze(-1 if side == "G" else -2)
    return spread(layer, scalings) * weights, weights


def collapsed(layer: LayerCurvature, values: Tensor, weights: Tensor) -> Tensor:
    """Return weighted means over the parts, in the scalings' shape.

    The weights are those of :func:`refined`. A gradient's squares are expected to be
    proportional to them, so means of multipliers have the least squared error of the
    step.
    """
    values = values * weights
    for side, dim in (("G", -2), ("A", -1)):
        if layer.complement(side):
            size = values.shape[dim] - QUANTILES
            first = values.narrow(dim, 0, QUANTILES).mean(dim, keepdim=True)
            values = torch.cat([first, values.narrow(dim, QUANTILES, size)], dim)
    return values


# -- refresh --------------------------------------------------------------------------


def truncated_update(
    layer: LayerCurvature, factors: Mapping[str, Tensor], step: int, counters: Counters
) -> BasisUpdate:
    """Return the truncated basis of the layer's factors; change nothing.

    The number of the step seeds the random directions.
    """
    assert layer.rank is not None
    update = BasisUpdate({}, {})
    for side, factor in factors.items():
        old = layer.basis(side)
        assert old is not None
        result = _attempted(factor, old, layer.rank, step, counters)
        values, vectors = (layer.values(side), None) if result is None else result
        if result is None and not layer.ready:  # all directions alike
            values = factor.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        update.values[side], update.vectors[side] = values, vectors
    return update


def apply_truncated_(layer: LayerCurvature, update: BasisUpdate, step: int) -> None:
    """Replace the layer's truncated basis; scalings and momentum move with it."""
    scalings, momentum = layer.averages["s"], layer.momentum
    if layer.ready and scalings.held:
        layer.share_(scalings.total)  # see eigenbasis.apply_updates_
    if momentum is not None and layer.complete:  # kept in the old basis
        U_G, U_A = _bases(layer)
        rotated = kernels.rotate_matrix(momentum.total, U_G, U_A, back=True)
        momentum.total.copy_(rotated)
    for side, vectors in update.vectors.items():
        old = layer.basis(side)
        assert old is not None
        if vectors is not None and scalings.held:
            change = overlap(old, vectors)
            weighted = scalings.total
            scalings.total = change.mT @ weighted if side == "G" else weighted @ change
        new = old if vectors is None else vectors
        layer.replace_basis(side, update.values[side], new)
    layer.version["basis"] = step
    layer.note_eigenvalues()
    if momentum is not None and layer.complete:
        momentum.total.copy_(kernels.rotate_matrix(momentum.total, *_bases(layer)))


def _attempted(
    factor: Tensor, old: Tensor, rank: float, seed: int, counters: Counters
) -> tuple[Tensor, Tensor] | None:
    """Return :func:`subspace`, if need be from double precision, or ``None``.

    Training must not stop for a decomposition.
    """
    for number, dtype in enumerate((factor.dtype, torch.float64)):
        try:
            values, vectors = subspace(factor.to(dtype), old.to(dtype), rank, seed)
        except RuntimeError as error:
            logger.info("block iteration attempt %d failed: %s", number, error)
            continue
        if values.device.type == "cpu" and not bool(torch.isfinite(values).all()):
            continue
        counters.decomposed += 1
        counters.retried += int(number > 0)
        return values.to(factor), vectors.to(factor)
    counters.kept += 1
    return None


def subspace(
    factor: Tensor, old: Tensor, rank: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors of a factor, and its eigenvalues.

    Args:
        factor: ``C`` ``[b, d, d]``.
        old: Earlier ones, ``[b, d, r]``; ``r`` may be 0.
        rank: An integer: how many. A number below 1: those with eigenvalues above this
            share of the mean eigenvalue.
        seed: Of the random directions that the iteration tries.

    Returns:
        ``[b, 1 + r]``: the mean eigenvalue of the others, and those of the vectors,
        ascending; and the vectors ``[b, d, r]``. If half of all directions or more are
        wanted: ``[b, d]`` and ``[b, d, d]``, all of them.
    """
    d = factor.shape[-1]
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    unit = factor / torch.where(trace > 0, trace / d, 1.0)[:, None, None]
    columns = old.shape[-1]
    wanted = rank if isinstance(rank, int) else columns
    # One iteration follows the factor; a share also needs the eigenvalues to count.
    steps = 1 if columns and isinstance(rank, int) else 3
    size = max(wanted, columns) + max(8, max(wanted, columns) // 4)
    basis = old
    while 2 * size < d and d > NARROW:
        start = with_random_columns(basis, size - basis.shape[-1], seed)
        values, vectors = leading(unit, start, steps)
        count = _count(values, rank)
        if count < size:
            return _with_rest(values, vectors, trace, count)
        basis, size = vectors, 2 * size
    values, vectors = torch.linalg.eigh((unit + unit.transpose(-1, -2)) / 2)
    count = _count(values, rank)
    if 2 * count < d and d > NARROW:
        return _with_rest(values, vectors, trace, count)
    return values.clamp(min=0) * (trace / d)[:, None], vectors


def _count(values: Tensor, rank: float) -> int:
    """Return how many directions to keep of those with these eigenvalues, mean 1."""
    if isinstance(rank, int):
        return min(rank, values.shape[-1])
    return max(1, int((values > rank).sum(dim=-1).max()))


def _with_rest(
    values: Tensor, vectors: Tensor, trace: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return the last ``count`` pairs, with the mean of the other values put first."""
    d = vectors.shape[-2]
    values = values[..., -count:].clamp(min=0)
    rest = (d - values.sum(dim=-1, keepdim=True)).clamp(min=0) / (d - count)
    mean = torch.where(trace > 0, trace / d, 0.0)[:, None]
    return torch.cat([rest, values], dim=-1) * mean, vectors[..., -count:].contiguous()


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """Return ``T [b, e_old, e_new]``: scalings move to a new basis by ``T_G^T s T_A``.

    It has the squared cosines between directions, those of the complement spread evenly
    over it; ``e = 1 + r`` or, of a full basis, ``d``. As with full bases the trace is
    kept, and a permutation is followed exactly.

    Args:
        old: ``[b, d, r_old]``.
        new: ``[b, d, r_new]``.
    """
    d = old.shape[-2]
    squares = (old.transpose(-1, -2) @ new).square()
    before, after = d - old.shape[-1], d - new.shape[-1]
    out = (1 - squares.sum(dim=-1, keepdim=True)).clamp(min=0)  # of kept to others
    into = (1 - squares.sum(dim=-2, keepdim=True)).clamp(min=0)  # of others to kept
    if after:
        squares = torch.cat([out / after, squares], dim=-1)
    if before:
        if after:
            stay = (before - into.sum(dim=-1, keepdim=True)).clamp(min=0) / after
            into = torch.cat([stay, into], dim=-1)
        squares = torch.cat([into, squares], dim=-2)
    return squares


# Elements of products of single examples that exist at a time.
BUDGET = 1 << 24


def summed_squares(layer: LayerCurvature, uses: Sequence[Rows]) -> Tensor:
    """Return the sum over examples of the mean squared coordinates of their gradients.

    It is ``[b, 1 + r_G, 1 + r_A]``. All uses have the same examples.
    """
    rows = joined(uses)
    if rows is not None and not rows.indexed:
        if rows.grads.shape[1] == 1:
            U_G, U_A = _bases(layer)
            along = outer_squares(rows.grads[:, 0], U_G, layer.complement("G"))
            across = outer_squares(rows.inputs[:, 0], U_A, layer.complement("A"))
            return along.transpose(-1, -2) @ across
        if _thin_is_cheaper(layer, rows):
            return _of_positions(layer, rows)
    sums: Tensor | None = None
    for gradient in example_gradients(uses, layer.block.shape, BUDGET):
        squares = coordinates(layer, gradient).roots.square().sum(dim=0)
        sums = plus(sums, squares)
    assert sums is not None
    return sums


def _thin_is_cheaper(layer: LayerCurvature, rows: Rows) -> bool:
    """Return whether :func:`_of_positions` takes fewer multiplications."""
    _, d_out, d_in = layer.block.shape
    s = rows.grads.shape[1]
    r_G, r_A = (basis.shape[-1] for basis in _bases(layer))
    formed = d_out * d_in * (s + r_G + r_A)
    thin = s * (d_out + d_in) * (r_G + r_A + s)
    return thin < formed


def _of_positions(layer: LayerCurvature, rows: Rows) -> Tensor:
    """Return :func:`summed_squares` without forming the examples' gradients."""
    U_G, U_A = _bases(layer)
    _, d_out, d_in = layer.block.shape
    both = layer.complement("G") and layer.complement("A")
    s = rows.grads.shape[1]
    each = (U_G.shape[-1] + s) * d_in + (U_A.shape[-1] + s) * d_out
    sums: Tensor | None = None
    step = max(1, BUDGET // (layer.block.shape[0] * each))
    for start in range(0, len(rows.grads), step):
        part = slice(start, start + step)
        g = rows.grads[part].transpose(1, 2)  # [n, b, s, d_out]
        a = rows.inputs[part].transpose(1, 2)
        few_g, few_a = kernels.matmul(g, U_G), kernels.matmul(a, U_A)
        left = right = squared_norms = None
        if layer.complement("A"):
            left = few_g.transpose(-1, -2) @ a
        if layer.complement("G"):
            right = g.transpose(-1, -2) @ few_a
        if both:
            squared_norms = (g @ g.transpose(-1, -2)).mul(a @ a.transpose(-1, -2))
            squared_norms = squared_norms.sum(dim=(-2, -1)).clamp(min=0)
        kept = few_g.transpose(-1, -2) @ few_a
        squares = mean_squares(layer, squared_norms, left, right, kept)
        sums = plus(sums, squares.sum(dim=0))
    assert sums is not None
    return sums
