"""The Kronecker-factored eigenbasis: its decomposition, refresh and transport."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.curvature.state import LayerCurvature
from ekfac.kernels.decomposition import eigh

logger = logging.getLogger(__name__)


@dataclass
class Counters:
    """What happened to the decompositions of one optimizer.

    Attributes:
        decomposed: Full decompositions.
        skipped: Refreshes that were not needed, the old basis still fitted.
        retried: Decompositions that succeeded only with jitter, in float64 or on the
            CPU.
        kept: Decompositions that failed altogether; the old basis was kept.
        rejected: Batches whose statistics were not finite and were left out.
    """

    decomposed: int = 0
    skipped: int = 0
    retried: int = 0
    kept: int = 0
    rejected: int = 0


def decompose(factor: Tensor, counters: Counters) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues and eigenvectors of symmetric matrices, or ``None``.

    Training must not stop for a decomposition: after a failure it is tried with
    jitter, in float64, and on the CPU.

    Args:
        factor: ``[b, d, d]``.
        counters: Counts what was needed.

    Returns:
        Eigenvalues ``[b, d]``, non-negative and ascending, and eigenvectors
        ``[b, d, d]`` in columns.
    """
    symmetric = (factor + factor.transpose(-1, -2)) / 2
    mean = symmetric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    if factor.device.type == "cpu" and not bool(torch.isfinite(mean).all()):
        counters.kept += 1
        return None
    unit = torch.where(mean > 0, symmetric / mean, symmetric)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    jitter = torch.finfo(factor.dtype).eps * factor.shape[-1]
    attempts: tuple[Callable[[], tuple[Tensor, Tensor]], ...] = (
        lambda: eigh(unit),
        lambda: torch.linalg.eigh(unit + jitter * eye),
        lambda: torch.linalg.eigh(unit.double()),
        lambda: torch.linalg.eigh(unit.double().cpu() + jitter * eye.double().cpu()),
    )
    for number, attempt in enumerate(attempts):
        try:
            values, vectors = attempt()
        except RuntimeError as error:
            logger.info("eigendecomposition attempt %d failed: %s", number, error)
            continue
        if factor.device.type == "cpu" and not bool(torch.isfinite(values).all()):
            continue
        counters.decomposed += 1
        counters.retried += int(number > 0)
        scale = torch.where(mean > 0, mean, torch.ones_like(mean))[..., 0]
        return values.to(factor).clamp(min=0) * scale, vectors.to(factor)
    counters.kept += 1
    return None


def off_diagonal(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far ``Q^T C Q`` is from diagonal, and its diagonal.

    Args:
        factor: ``C`` ``[b, d, d]``.
        basis: ``Q`` ``[b, d, d]``, orthogonal.

    Returns:
        The norm of the off-diagonal part over the norm of the whole, one number for
        all blocks, and the diagonal ``[b, d]``.
    """
    image = factor @ basis
    diagonal = (basis * image).sum(dim=-2)
    total = image.square().sum()
    rest = (total - diagonal.square().sum()).clamp(min=0)
    tiny = torch.finfo(factor.dtype).tiny
    return (rest / total.clamp(min=tiny)).sqrt(), diagonal


def fits(factor: Tensor, basis: Tensor, tolerance: float) -> Tensor | None:
    """Return the diagonal of ``Q^T C Q`` if the rest of it is small, else ``None``.

    Columns of large eigenvalues come last and hold most of what is off the diagonal;
    where they alone exceed the tolerance the others are not looked at.

    Args:
        factor: ``C`` ``[b, d, d]``.
        basis: ``Q`` ``[b, d, d]``.
        tolerance: Bound on :func:`off_diagonal`; 0 never fits.
    """
    if tolerance <= 0:
        return None
    largest = basis[..., -max(1, basis.shape[-1] // 8) :]
    image = factor @ largest
    rest = image.square().sum() - (largest * image).sum(dim=-2).square().sum()
    if bool(rest > tolerance**2 * factor.square().sum()):
        return None
    mass, diagonal = off_diagonal(factor, basis)
    return diagonal if bool(mass <= tolerance) else None


def transport(
    scalings: Tensor, overlap_G: Tensor | None, overlap_A: Tensor | None
) -> Tensor:
    """Return scalings in a new basis: ``(R_G o R_G)^T s (R_A o R_A)``.

    With ``R = Q_old^T Q_new`` this is the Frobenius-best diagonal in the new basis of
    the matrix that ``s`` stands for in the old one. It ignores signs, follows a
    permutation exactly and keeps the trace.

    Args:
        scalings: ``[b, d_out, d_in]``.
        overlap_G: ``R_G`` ``[b, d_out, d_out]`` or ``None`` for the identity.
        overlap_A: ``R_A`` ``[b or 1, d_in, d_in]`` or ``None``.
    """
    if overlap_G is not None:
        scalings = overlap_G.square().transpose(-1, -2) @ scalings
    if overlap_A is not None:
        scalings = scalings @ overlap_A.square()
    return scalings


def refresh_(
    layer: LayerCurvature, step: int, tolerance: float, counters: Counters
) -> bool:
    """Move the layer's basis to the eigenvectors of its present factors.

    Scalings are transported. A factor whose basis still fits, with off-diagonal mass
    below ``tolerance``, keeps it; so does one that cannot be decomposed.

    Returns:
        Whether the basis changed.
    """
    overlaps: dict[str, Tensor | None] = {}
    changed = False
    for side, eigenvalues in (("A", layer.eigenvalues_A), ("G", layer.eigenvalues_G)):
        factor, basis = layer.averages[side].read(), layer.basis(side)
        overlaps[side] = None
        if factor is None:
            return False
        if basis is None:
            eigenvalues.copy_(factor)
            continue
        first = not layer.ready
        diagonal = None if first else fits(factor, basis, tolerance)
        if diagonal is not None:
            eigenvalues.copy_(diagonal.clamp(min=0))
            counters.skipped += 1
            continue
        result = decompose(factor, counters)
        if result is None:
            if first:
                eye = torch.eye(
                    factor.shape[-1], dtype=basis.dtype, device=basis.device
                )
                basis.copy_(eye.expand_as(basis))
            diagonal = off_diagonal(factor, basis)[1]
            usable = torch.isfinite(diagonal)
            eigenvalues.copy_(torch.where(usable, diagonal.clamp(min=0), eigenvalues))
            continue
        values, vectors = result
        overlaps[side] = None if first else basis.transpose(-1, -2) @ vectors
        basis.copy_(vectors)
        eigenvalues.copy_(values)
        changed = True
    scalings = layer.averages["s"]
    if layer.ready and not scalings.empty:
        scalings.total.copy_(transport(scalings.total, overlaps["G"], overlaps["A"]))
    layer.version["basis"] = step
    return changed
