"""Leading eigenvectors of symmetric matrices by block iteration from old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels.decomposition import orthonormal


def orthonormal_columns(matrices: Tensor) -> Tensor:
    """Return orthonormal columns that span those of ``[b, d, k]``, ``k <= d``.

    Cholesky-QR where the columns are independent enough, else Householder's.
    """
    tiny = torch.finfo(matrices.dtype).tiny
    unit = matrices / matrices.norm(dim=-2, keepdim=True).clamp(min=tiny)
    found = orthonormal(unit)
    return torch.linalg.qr(unit).Q if found is None else found


def leading(matrices: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return approximate leading eigenpairs: block iteration, then Rayleigh-Ritz.

    Golub & Van Loan, section 8.2. Any orthonormal columns serve an eigenbasis whose
    scalings are measured in it; these turn towards the eigenvectors by the ratio of
    eigenvalues at every step.

    Args:
        matrices: ``C`` ``[b, d, d]``, positive semi-definite.
        start: ``[b, d, k]``: earlier eigenvectors, or anything, in columns.
        steps: Products with ``C`` before the Rayleigh-Ritz projection.

    Returns:
        Ritz values ``[b, k]``, ascending, and vectors ``[b, d, k]``.
    """
    basis = orthonormal_columns(start)
    for _ in range(steps):
        basis = orthonormal_columns(matrices @ basis)
    inner = basis.transpose(-1, -2) @ (matrices @ basis)
    values, vectors = torch.linalg.eigh((inner + inner.transpose(-1, -2)) / 2)
    return values, basis @ vectors


def with_random_columns(basis: Tensor, count: int, seed: int) -> Tensor:
    """Return ``[b, d, k]`` with ``count`` more columns, normal and the same each time.

    Directions that have grown into the spectrum are found among them.
    """
    b, d, _ = basis.shape
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn(b, d, count, generator=generator, dtype=torch.float64)
    return torch.cat([basis, more.to(basis) / d**0.5], dim=-1)
