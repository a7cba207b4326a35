"""The Kronecker-factored eigenbasis: its decomposition, refresh and transport."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.average import Held
from ekfac.curvature.state import LayerCurvature
from ekfac.kernels.decomposition import eigh
from ekfac.layers import Block

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
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    if factor.device.type == "cpu" and not bool(torch.isfinite(mean).all()):
        counters.kept += 1
        return None
    scale = torch.where(mean > 0, mean, torch.ones_like(mean))
    # In one piece of memory: wide layers have factors of a hundred megabytes.
    unit = (factor + factor.transpose(-1, -2)).div_(2).div_(scale)
    jitter = torch.finfo(factor.dtype).eps * factor.shape[-1]
    attempts: tuple[Callable[[], tuple[Tensor, Tensor]], ...] = (
        lambda: eigh(unit),
        lambda: torch.linalg.eigh(_shifted(unit, jitter)),
        lambda: torch.linalg.eigh(unit.double()),
        lambda: torch.linalg.eigh(_shifted(unit.double().cpu(), jitter)),
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
        return values.to(factor).clamp(min=0) * scale[..., 0], vectors.to(factor)
    counters.kept += 1
    return None


def _shifted(matrices: Tensor, jitter: float) -> Tensor:
    """Return a copy with ``jitter`` added to the diagonals."""
    copied = matrices.clone()
    copied.diagonal(dim1=-2, dim2=-1).add_(jitter)
    return copied


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


@dataclass
class Proposal:
    """Where a layer's basis is to move: what a rank that decomposes tells the others.

    Attributes:
        values: Eigenvalues by side, ``"A"`` and ``"G"``.
        vectors: New eigenvectors by side, ``None`` where the basis stays.
    """

    values: dict[str, Tensor]
    vectors: dict[str, Tensor | None]

    def tensors(self) -> list[Tensor]:
        """Return what travels from one rank to another, in a fixed order."""
        vectors = [self.vectors[side] for side in ("A", "G")]
        present = [v for v in vectors if v is not None]
        return [*present, self.values["A"], self.values["G"]]


def propose(
    layer: LayerCurvature,
    tolerance: float,
    counters: Counters,
    factors: dict[str, Tensor] | None = None,
) -> Proposal | None:
    """Return the eigenvectors of the layer's present factors; change nothing.

    A factor whose basis still fits, with off-diagonal mass below ``tolerance``, keeps
    it; so does one that cannot be decomposed.

    Args:
        layer: The layer.
        tolerance: Bound on :func:`off_diagonal`.
        counters: Counts what was needed.
        factors: ``"A"`` and ``"G"``, in place of the layer's averages; emptied, so that
            none outlives its decomposition.

    Returns:
        The proposal, or ``None`` before there are factors.
    """
    proposal = Proposal({}, {})
    for side, eigenvalues in (("A", layer.eigenvalues_A), ("G", layer.eigenvalues_G)):
        basis = layer.basis(side)
        factor = layer.averages[side].read() if factors is None else factors.pop(side)
        if factor is None:
            return None
        proposal.vectors[side] = None
        if basis is None:
            proposal.values[side] = factor
            continue
        first = not layer.ready
        diagonal = None if first else fits(factor, basis, tolerance)
        if diagonal is not None:
            proposal.values[side] = diagonal.clamp(min=0)
            counters.skipped += 1
            continue
        result = decompose(factor, counters)
        if result is not None:
            proposal.values[side], proposal.vectors[side] = result
            continue
        if first:
            eye = torch.eye(factor.shape[-1], dtype=basis.dtype, device=basis.device)
            basis = proposal.vectors[side] = eye.expand_as(basis)
        diagonal = off_diagonal(factor, basis)[1]
        usable = torch.isfinite(diagonal)
        proposal.values[side] = torch.where(usable, diagonal.clamp(min=0), eigenvalues)
    return proposal


def adopt_(layer: LayerCurvature, proposal: Proposal, step: int) -> None:
    """Move the layer's basis to where ``proposal`` says, the scalings with it."""
    overlaps: dict[str, Tensor | None] = {}
    for side, eigenvalues in (("A", layer.eigenvalues_A), ("G", layer.eigenvalues_G)):
        vectors, basis = proposal.vectors[side], layer.basis(side)
        overlaps[side] = None
        if vectors is not None and basis is not None:
            if layer.ready:
                overlaps[side] = basis.transpose(-1, -2) @ vectors
            basis.copy_(vectors)
        eigenvalues.copy_(proposal.values[side])
    scalings = layer.averages["s"]
    if layer.ready and not scalings.empty and scalings.held:
        scalings.total.copy_(transport(scalings.total, overlaps["G"], overlaps["A"]))
    layer.version["basis"] = step


def refresh_(
    layer: LayerCurvature, step: int, tolerance: float, counters: Counters
) -> None:
    """Move the layer's basis to the eigenvectors of its present factors."""
    proposal = propose(layer, tolerance, counters)
    if proposal is not None:
        adopt_(layer, proposal, step)


def bases_alone(
    block: Block, factors: dict[str, Tensor], counters: Counters
) -> LayerCurvature:
    """Return a layer with the eigenbasis of given factors, and no place for these.

    Args:
        block: The layer.
        factors: ``"A"`` and ``"G"``; emptied.
        counters: Counts what was needed.
    """
    like = factors["G"]

    def bank(*shape: int) -> Tensor:
        return kernels.aligned_empty(shape, like).zero_()

    layer = LayerCurvature(block, bank, Held(factors=False))
    proposal = propose(layer, 0.0, counters, factors)
    assert proposal is not None
    adopt_(layer, proposal, 1)
    return layer
