"""Gram matrices of one layer's Jacobian, from its inputs and output gradients."""

from __future__ import annotations

from torch import Tensor

# Elements of intermediate products that exist at a time.
WORK = 1 << 25


def by_positions(inputs: Tensor, grads: Tensor) -> bool:
    """Return whether Gram matrices of positions are cheaper than example gradients.

    Per pair of rows of the kernel: ``S^2 (d_in + d_out)`` against ``d_in d_out``.
    """
    _, _, s, b, d_out = grads.shape
    if inputs.dim() == 2:
        return True
    return b == 1 and s**2 * (inputs.shape[-1] + d_out) < inputs.shape[-1] * d_out


def add_hadamard(
    kernel: Tensor, a: Tensor, g: Tensor, other_a: Tensor, other_g: Tensor
) -> None:
    """Add ``sum_st (a_is . a_jt) (g_iks . g_jlt)``, a few examples at a time."""
    n, c, s, _, _ = g.shape
    m, d, t = other_g.shape[:3]
    columns = other_g.squeeze(3).reshape(m * d * t, -1)
    step = max(1, WORK // (c * s * m * d * t))
    for start in range(0, n, step):
        rows = g[start : start + step].squeeze(3)
        part = a[start : start + step]
        k = len(part)
        if a.dim() == 2:
            inner = (part.reshape(-1, 1) == other_a.reshape(1, -1)).to(g.dtype)
        else:
            inner = part.reshape(k * s, -1) @ other_a.reshape(m * t, -1).mT
        outer = rows.reshape(k * c * s, -1) @ columns.mT
        outer = outer.reshape(k, c, s, m, d, t)
        outer *= inner.reshape(k, 1, s, m, 1, t)
        found = outer.sum(dim=(2, 5)).reshape(k * c, m * d)
        kernel[start * c : start * c + k * c] += found


def add_products(
    kernel: Tensor, a: Tensor, g: Tensor, other_a: Tensor, other_g: Tensor
) -> None:
    """Add the inner products of example gradients, some of a layer's rows at a time."""
    _, _, _, b, d_out = g.shape
    same = other_g is g
    width = max(1, WORK // (len(kernel) * b * a.shape[-1]))
    for start in range(0, d_out, width):
        rows = _weight_gradients(a, g[..., start : start + width])
        others = (
            rows
            if same
            else _weight_gradients(other_a, other_g[..., start : start + width])
        )
        kernel += rows @ others.mT


def _weight_gradients(a: Tensor, g: Tensor) -> Tensor:
    """Return ``sum_s g_s a_s^T`` as ``[n c, b d_out d_in]``.

    Args:
        a: ``[n, S, b or 1, d_in]``.
        g: ``[n, c, S, b, d_out]``.
    """
    n, c, s, b, d_out = g.shape
    grads = g.permute(0, 3, 1, 4, 2).reshape(n, b, c * d_out, s)
    product = grads @ a.permute(0, 2, 1, 3)
    found = product.reshape(n, b, c, d_out, -1).transpose(1, 2)
    return found.reshape(n * c, -1)
