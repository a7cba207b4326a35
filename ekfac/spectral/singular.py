"""Singular values of matrices: their directions, and those of pure noise.

Marchenko & Pastur (1967); Haink (2023), chapter 4 and equation 6.1.
"""

from __future__ import annotations

from functools import lru_cache
from math import pi, sqrt

import torch
from torch import Tensor


def singular_products(matrix: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Return singular values and the products ``u_i v_i^T``.

    The products are orthonormal, and with the singular values as coefficients they sum
    to the matrix.

    Args:
        matrix: ``[n, m]``.
        k: How many, the largest. Default: all.

    Returns:
        ``[k]``, descending, and ``[k, n, m]``.
    """
    U, values, Vh = torch.linalg.svd(matrix, full_matrices=False)
    products = torch.einsum("ni,im->inm", U[:, :k], Vh[:k])
    return values[:k].clone(), products.contiguous()


def noise_edge(shape: tuple[int, ...], sigma: float) -> float:
    """Return ``sigma (sqrt(n) + sqrt(m))``: how far the values of pure noise reach.

    Args:
        shape: ``(n, m)`` of the matrix.
        sigma: Standard deviation of its entries.
    """
    n, m = shape
    return sigma * (sqrt(n) + sqrt(m))


def singular_value_density(
    values: Tensor, shape: tuple[int, ...], sigma: float
) -> Tensor:
    """Return the Marchenko-Pastur density of the singular values of a random matrix.

    Haink (2023), eq. 4.2, is the density of ``lambda = nu^2 / n``; this one is of
    ``nu`` itself.

    Args:
        values: Where, ``[g]``.
        shape: ``(n, m)`` of the matrix.
        sigma: Standard deviation of its entries.
    """
    long, short = max(shape), min(shape)
    low, high = (sigma * (sqrt(long) + s * sqrt(short)) for s in (-1, 1))
    inside = (high**2 - values**2) * (values**2 - low**2)
    safe = values.clamp_min(1e-30) * (pi * sigma**2 * short)
    return inside.clamp_min(0).sqrt() / safe


@lru_cache(maxsize=256)
def noise_median(n: int, m: int) -> float:
    """Return the median singular value of an ``n x m`` matrix of unit variance."""
    # nu = centre - radius cos t removes the square roots at both ends.
    centre, radius = sqrt(max(n, m)), sqrt(min(n, m))
    steps = 20000
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) * (pi / steps)
    values = centre - radius * t.cos()
    share = (singular_value_density(values, (n, m), 1.0) * t.sin()).cumsum(0)
    return float(values[share >= share[-1] / 2][0])
