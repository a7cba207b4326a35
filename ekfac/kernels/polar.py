"""Polar factors of matrices by matrix products alone.

The polar factor of ``X = U S V^T`` is ``U V^T``: all singular values become 1. An odd
polynomial of ``X`` acts on its singular values; a few quintic ones, each the best
approximation of 1 on the interval that the one before has left, bring all values above
a share of the largest close to 1 (Amsel et al. 2025, "The Polar Express"; the
coefficients here are our own, see ``benchmarks/polar_coefficients.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels.linalg import aligned_empty

# Steps -> (a, b, c) of p(x) = a x + b x^3 + c x^5: singular values between 0.03, 0.01
# and 0.003 of the largest and 1 end within 4 %, 1.3 % and 0.5 % of 1.
COEFFICIENTS: dict[int, tuple[tuple[float, float, float], ...]] = {
    3: (
        (7.362528, -20.7434, 15.16055),
        (2.917538, -2.182405, 0.4755292),
        (2.04631, -1.429475, 0.3933524),
    ),
    4: (
        (8.093369, -23.62043, 17.44615),
        (3.636586, -2.721927, 0.5365463),
        (2.6613, -1.977154, 0.4526164),
        (1.956172, -1.337508, 0.3838527),
    ),
    5: (
        (8.383674, -24.76591, 18.35708),
        (4.04342, -3.011405, 0.5695122),
        (3.505571, -2.626654, 0.5257195),
        (2.490116, -1.834275, 0.4368347),
        (1.917776, -1.29675, 0.379705),
    ),
}


def polar(matrices: Tensor, steps: int = 4) -> Tensor:
    """Return approximate polar factors.

    Costs ``steps (4 m^2 n + 2 m^3)`` multiplications and additions for ``m <= n``.
    Small singular values stay smaller than 1, those of zero stay zero, so the polar
    factor of a matrix of low rank is that of its row and column space.

    Args:
        matrices: ``[b, m, n]``, of any scale.
        steps: One of those in ``COEFFICIENTS``.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    size = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
    gram = _product(x, x.mT)
    fourth = _product(gram, gram)
    # The eighth root of the sum of the singular values' eighth powers: as sure a bound
    # of the largest as the Frobenius norm, and much closer. Its products are needed.
    eighth = torch.linalg.vector_norm(fourth, dim=(-2, -1), keepdim=True)
    bound = eighth.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    x = x / bound.sqrt()
    gram, fourth = gram.div_(bound), fourth.div_(bound.square())
    for number, (a, b, c) in enumerate(COEFFICIENTS[steps]):
        if number:
            gram = _product(x, x.mT)
            fourth = _product(gram, gram)
        x = _add_product(x, gram.mul_(b).add_(fourth, alpha=c), a)
    return x.mT if tall else x


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` with aligned rows."""
    out = aligned_empty((*left.shape[:-1], right.shape[-1]), left)
    if len(left) == 1:
        torch.mm(left[0], right[0], out=out[0])
        return out
    return torch.bmm(left, right, out=out)


def _add_product(x: Tensor, left: Tensor, scale: float) -> Tensor:
    """Return ``scale x + left x``."""
    out = aligned_empty(tuple(x.shape), x)
    if len(x) == 1:
        torch.addmm(x[0], left[0], x[0], beta=scale, out=out[0])
        return out
    return torch.baddbmm(x, left, x, beta=scale, out=out)
