"""The Kronecker-factored eigenbasis: its decomposition, refresh and transport."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.basis_update import BasisUpdate, Counters
from ekfac.curvature.state import LayerCurvature, Placement
from ekfac.curvature.truncated import apply_truncated_, truncated_update
from ekfac.kernels.decomposition import eigh, follows, grouped, iterated
from ekfac.layers import Block

logger = logging.getLogger(__name__)

# A layer with its factors by side.
Factors = tuple[LayerCurvature, dict[str, Tensor]]
# Elements of new bases that exist at a time.
AT_A_TIME = 1 << 27


def decompose(
    factor: Tensor,
    counters: Counters,
    *,
    basis: Tensor | None = None,
    tolerance: float = 0.0,
) -> tuple[Tensor, Tensor] | None:
    """Return eigenvalues and eigenvectors of symmetric matrices, or ``None``.

    Training must not stop for a decomposition: after a failure it is tried with
    jitter, in float64, and on the CPU.

    Args:
        factor: ``[b, d, d]``.
        counters: Counts what was needed.
        basis: An old one, ``[b, d, d]``, from which it is found by matrix products
            where that is worth it.
        tolerance: Of what is off the diagonal, see :func:`off_diagonal`; what is found
            from ``basis`` holds half of it.

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
    scale = scale[..., 0]
    if basis is not None and follows(unit, tolerance / 2):
        found = iterated(unit, basis, bound=tolerance / 2)
        if found is not None:
            counters.followed += 1
            return found[0].clamp(min=0) * scale, found[1]
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
        return values.to(factor).clamp(min=0) * scale, vectors.to(factor)
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
class _Waiting:
    """A factor that needs a decomposition."""

    layer: LayerCurvature
    side: str
    factor: Tensor

    @property
    def basis(self) -> Tensor | None:
        """The old basis, if it is one."""
        return self.layer.basis(self.side) if self.layer.ready else None


def factors_of(layers: Sequence[LayerCurvature]) -> list[Factors]:
    """Return the layers that have factors, with copies of these."""
    found: list[Factors] = []
    for layer in layers:
        A, G = layer.A, layer.G
        if A is not None and G is not None:
            found.append((layer, {"A": A, "G": G}))
    return found


def basis_updates(
    layers: Sequence[Factors], step: int, tolerance: float, counters: Counters
) -> dict[str, BasisUpdate]:
    """Return the eigenvectors of the layers' factors; change nothing.

    A factor whose basis still fits, with off-diagonal mass below ``tolerance``, keeps
    it; so does one that cannot be decomposed. On a CUDA device factors of one size are
    decomposed together.

    Args:
        layers: From :func:`factors_of`.
        step: Number of the step.
        tolerance: Bound on :func:`off_diagonal`.
        counters: Counts what was needed.

    Returns:
        Proposals by layer.
    """
    updates: dict[str, BasisUpdate] = {}
    waiting: list[_Waiting] = []
    for layer, factors in layers:
        if layer.truncated:
            updates[layer.name] = truncated_update(layer, factors, step, counters)
            continue
        update = updates[layer.name] = BasisUpdate({}, {})
        for side, factor in factors.items():
            if not _stays(layer, side, factor, tolerance, counters, update):
                waiting.append(_Waiting(layer, side, factor))
    for group in _groups(waiting):
        results = _decomposed(group, tolerance, counters)
        for one, result in zip(group, results, strict=True):
            update = updates[one.layer.name]
            values, vectors = _kept(one) if result is None else result
            update.values[one.side], update.vectors[one.side] = values, vectors
    return updates


def _stays(
    layer: LayerCurvature,
    side: str,
    factor: Tensor,
    tolerance: float,
    counters: Counters,
    update: BasisUpdate,
) -> bool:
    """Return whether a side needs no decomposition; basis_updates what it has then."""
    basis = layer.basis(side)
    update.vectors[side] = None
    if basis is None:
        update.values[side] = factor
        return True
    diagonal = fits(factor, basis, tolerance) if layer.ready else None
    if diagonal is None:
        return False
    update.values[side] = diagonal.clamp(min=0)
    counters.skipped += 1
    return True


def _groups(waiting: Sequence[_Waiting]) -> Iterator[list[_Waiting]]:
    """Yield what is decomposed in one call."""
    groups: dict[object, list[_Waiting]] = {}
    for number, one in enumerate(waiting):
        factor = one.factor
        key: object = number
        if grouped(factor):
            known = one.layer.ready
            key = (factor.device, factor.dtype, factor.shape[-1], known)
        groups.setdefault(key, []).append(one)
    yield from groups.values()


def _decomposed(
    group: Sequence[_Waiting], tolerance: float, counters: Counters
) -> list[tuple[Tensor, Tensor] | None]:
    """Return the decompositions of factors of one size, in one call if that works."""
    if len(group) > 1:
        stack = torch.cat([one.factor for one in group])
        bases = [one.basis for one in group]
        known = [basis for basis in bases if basis is not None]
        own = Counters()
        basis = torch.cat(known) if len(known) == len(group) else None
        found = decompose(stack, own, basis=basis, tolerance=tolerance)
        if found is not None and not own.retried:
            counters.decomposed += len(group) * own.decomposed
            counters.followed += len(group) * own.followed
            sizes = [len(one.factor) for one in group]
            parts = (part.split(sizes) for part in found)
            return list(zip(*parts, strict=True))
    # One bad matrix must not cost the others their decomposition.
    return [
        decompose(one.factor, counters, basis=one.basis, tolerance=tolerance)
        for one in group
    ]


def _kept(one: _Waiting) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues in the old basis, or in the identity if there is none."""
    layer, factor, basis = one.layer, one.factor, one.layer.basis(one.side)
    assert basis is not None
    vectors = None
    if not layer.ready:
        eye = torch.eye(factor.shape[-1], dtype=basis.dtype, device=basis.device)
        basis = vectors = eye.expand_as(basis)
    diagonal = off_diagonal(factor, basis)[1]
    before = layer.values(one.side)
    usable = torch.isfinite(diagonal)
    return torch.where(usable, diagonal.clamp(min=0), before), vectors


def apply_update_(layer: LayerCurvature, update: BasisUpdate, step: int) -> None:
    """Move the layer's basis to where ``update`` says, the scalings with it."""
    if layer.truncated:
        apply_truncated_(layer, update, step)
        return
    overlaps: dict[str, Tensor | None] = {}
    for side in ("A", "G"):
        eigenvalues = layer.values(side)
        vectors, basis = update.vectors[side], layer.basis(side)
        overlaps[side] = None
        if vectors is not None and basis is not None:
            if layer.ready:
                overlaps[side] = basis.transpose(-1, -2) @ vectors
            basis.copy_(vectors)
        eigenvalues.copy_(update.values[side])
    scalings = layer.averages["s"]
    if layer.ready and not scalings.empty and scalings.held:
        # Shared first: what one vector of a degenerate space had is chance, and would
        # go with it into a basis that is not.
        total = layer.share_(scalings.total)
        total.copy_(transport(total, overlaps["G"], overlaps["A"]))
    if layer.ready and layer.momentum is not None and not layer.momentum.empty:
        total = layer.momentum.total
        total.copy_(kernels.rotate_matrix(total, overlaps["G"], overlaps["A"]))
    layer.note_eigenvalues()
    layer.version["basis"] = step


def refresh_(
    layers: Sequence[LayerCurvature], step: int, tolerance: float, counters: Counters
) -> None:
    """Move the layers' bases to the eigenvectors of their present factors."""
    for batch in _batches(layers):
        updates = basis_updates(factors_of(batch), step, tolerance, counters)
        for layer in batch:
            if layer.name in updates:
                apply_update_(layer, updates[layer.name], step)


def _batches(layers: Sequence[LayerCurvature]) -> Iterator[list[LayerCurvature]]:
    """Yield the layers whose new bases exist at a time: one, unless it pays."""
    batch: list[LayerCurvature] = []
    size = 0
    for layer in layers:
        own = sum(layer.averages[side].total.numel() for side in ("A", "G"))
        pays = grouped(layer.values("A")) and size + own <= AT_A_TIME
        if batch and not pays:
            yield batch
            batch, size = [], 0
        batch.append(layer)
        size += own
    if batch:
        yield batch


def bases_alone(
    block: Block,
    factors: dict[str, Tensor],
    counters: Counters,
    rank: float | None = None,
) -> LayerCurvature:
    """Return a layer with the eigenbasis of given factors, and no place for these.

    Args:
        block: The layer.
        factors: ``"A"`` and ``"G"``; emptied, so that none outlives its decomposition.
        counters: Counts what was needed.
        rank: Of a truncated basis.
    """
    like = factors["G"]

    def bank(*shape: int) -> Tensor:
        return kernels.aligned_empty(shape, like).zero_()

    layer = LayerCurvature(block, bank, Placement(factors=False), rank)
    if layer.truncated:
        update = truncated_update(layer, factors, 1, counters)
        factors.clear()
        apply_update_(layer, update, 1)
        return layer
    update = BasisUpdate({}, {})
    for side in ("A", "G"):
        factor = factors.pop(side)
        vectors: Tensor | None = None
        if layer.basis(side) is None:
            values = factor
        else:
            found = decompose(factor, counters)
            values, vectors = found or _kept(_Waiting(layer, side, factor))
        update.values[side], update.vectors[side] = values, vectors
        del factor
    apply_update_(layer, update, 1)
    return layer
