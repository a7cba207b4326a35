"""Truncated bases with the directions that they leave out, for whoever reads them.

A basis ``[*, d, r]`` leaves ``d - r`` directions to one entry, the first, of everything
that has an entry for each direction.
"""

from __future__ import annotations

import torch
from torch import Tensor


def completed(basis: Tensor) -> Tensor:
    """Return an orthogonal matrix whose last ``r`` columns are the basis.

    Args:
        basis: ``[*, d, r]``, orthonormal columns.

    Returns:
        ``[*, d, d]``.
    """
    rank = basis.shape[-1]
    if rank == basis.shape[-2]:
        return basis
    others = torch.linalg.qr(basis, mode="complete").Q[..., rank:]
    return torch.cat([others, basis], dim=-1)


def counts(basis: Tensor) -> Tensor:
    """Return how many directions each entry stands for, in the basis's type.

    Returns:
        ``[1 + r]``, or ``[d]`` if the basis is full.
    """
    d, rank = basis.shape[-2:]
    result = basis.new_ones(rank + int(rank < d))
    if rank < d:
        result[0] = d - rank
    return result


def places(basis: Tensor) -> Tensor:
    """Return where each direction of the completed basis has its entry, ``[d]``."""
    return torch.repeat_interleave(counts(basis).long())
