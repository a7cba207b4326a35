"""Squared coordinates of examples with many positions, in a truncated basis.

The gradient of an example with positions ``s`` is ``sum_s g_s a_s^T``. Its parts in the
kept directions are products of the vectors' own few coordinates, and its norm is that
of two Gram matrices over positions: where these are fewer than the layer is wide, the
gradient need not be formed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ekfac import kernels
from ekfac.curvature.rows import Rows, example_gradients, joined, plus
from ekfac.curvature.state import LayerCurvature
from ekfac.curvature.truncation import coordinates, mean_squares, outer_squares

# Elements of products of single examples that exist at a time.
BUDGET = 1 << 24


def summed_squares(layer: LayerCurvature, uses: Sequence[Rows]) -> Tensor:
    """Return ``sum_n`` of the mean squared coordinates of the examples' gradients.

    Args:
        layer: With a truncated basis.
        uses: The calls of the layer, each with the same examples.

    Returns:
        ``[b, 1 + r_G, 1 + r_A]``.
    """
    rows = joined(uses)
    if rows is not None and not rows.indexed:
        if rows.grads.shape[1] == 1:
            return _of_vectors(layer, rows)
        if _thin_is_cheaper(layer, rows):
            return _of_positions(layer, rows)
    total: Tensor | None = None
    for gradient in example_gradients(uses, layer.block.shape, BUDGET):
        squares = coordinates(layer, gradient).roots.square().sum(dim=0)
        total = plus(total, squares)
    assert total is not None
    return total


def _bases(layer: LayerCurvature) -> tuple[Tensor, Tensor]:
    U_G, U_A = layer.basis("G"), layer.basis("A")
    assert U_G is not None
    assert U_A is not None
    return U_G, U_A


def _of_vectors(layer: LayerCurvature, rows: Rows) -> Tensor:
    """Return the sum for examples of one position each."""
    U_G, U_A = _bases(layer)
    along = outer_squares(rows.grads[:, 0], U_G, layer.complement("G"))
    across = outer_squares(rows.inputs[:, 0], U_A, layer.complement("A"))
    return along.transpose(-1, -2) @ across


def _thin_is_cheaper(layer: LayerCurvature, rows: Rows) -> bool:
    """Compare the multiplications of both ways, for one example."""
    _, d_out, d_in = layer.block.shape
    s = rows.grads.shape[1]
    r_G, r_A = (basis.shape[-1] for basis in _bases(layer))
    formed = d_out * d_in * (s + r_G + r_A)
    thin = s * (d_out + d_in) * (r_G + r_A + s)
    return thin < formed


def _of_positions(layer: LayerCurvature, rows: Rows) -> Tensor:
    """Return the sum without the examples' gradients."""
    U_G, U_A = _bases(layer)
    _, d_out, d_in = layer.block.shape
    both = layer.complement("G") and layer.complement("A")
    s = rows.grads.shape[1]
    each = (U_G.shape[-1] + s) * d_in + (U_A.shape[-1] + s) * d_out
    total: Tensor | None = None
    step = max(1, BUDGET // (len(U_G) * each))
    for start in range(0, len(rows.grads), step):
        part = slice(start, start + step)
        g = rows.grads[part].transpose(1, 2)  # [n, b, s, d_out]
        a = rows.inputs[part].transpose(1, 2)
        few_g, few_a = kernels.matmul(g, U_G), kernels.matmul(a, U_A)
        left = right = whole = None
        if layer.complement("A"):
            left = few_g.transpose(-1, -2) @ a
        if layer.complement("G"):
            right = g.transpose(-1, -2) @ few_a
        if both:
            whole = (g @ g.transpose(-1, -2)).mul(a @ a.transpose(-1, -2))
            whole = whole.sum(dim=(-2, -1)).clamp(min=0)
        kept = few_g.transpose(-1, -2) @ few_a
        squares = mean_squares(layer, whole, left, right, kept)
        total = plus(total, squares.sum(dim=0))
    assert total is not None
    return total
