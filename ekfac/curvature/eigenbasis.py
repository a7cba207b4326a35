"""The Kronecker-factored eigenbasis: its refresh, its transport, gradients in it.

Gradients of layers of one shape are projected in one batched product. On a CUDA device
all running averages of scalings take one launch, and nothing waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.options import Options
from ekfac.curvature.stacks import Stack, stacks_of
from ekfac.curvature.state import BasisUpdate, Counters, LayerCurvature, Placement
from ekfac.curvature.truncated import (
    Coordinates,
    apply_truncated_,
    coordinates,
    norm_of,
    truncated_update,
)
from ekfac.kernels import Workspace
from ekfac.kernels.cuda import dispatch
from ekfac.kernels.decomposition import eigh, follows, grouped, iterated
from ekfac.layers import Block
from ekfac.layers.base import whole

logger = logging.getLogger(__name__)
OPS = torch.ops.ekfac

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
        pair = iterated(unit, basis, bound=tolerance / 2)
        if pair is not None:
            counters.followed += 1
            return pair[0].clamp(min=0) * scale, pair[1]
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
        factor: ``C`` ``[*, b, d, d]``.
        basis: ``Q`` ``[*, b, d, d]``, orthogonal.

    Returns:
        The norm of the off-diagonal part over the norm of the whole, one number for
        all ``b`` blocks, and the diagonal ``[*, b, d]``.
    """
    image = factor @ basis
    diagonal = (basis * image).sum(dim=-2)
    squared_norm = image.square().sum(dim=(-3, -2, -1))
    rest = (squared_norm - diagonal.square().sum(dim=(-2, -1))).clamp(min=0)
    tiny = torch.finfo(factor.dtype).tiny
    return (rest / squared_norm.clamp(min=tiny)).sqrt(), diagonal


def fits(factors: Tensor, bases: Tensor, tolerance: float) -> list[Tensor | None]:
    """Return the diagonal of each ``Q^T C Q`` that has little beside it, or ``None``.

    Columns of large eigenvalues come last and hold most of what is off the diagonal;
    where they alone exceed the tolerance the others are not looked at.

    Args:
        factors: ``C`` ``[n, b, d, d]``.
        bases: ``Q`` ``[n, b, d, d]``.
        tolerance: Bound on :func:`off_diagonal`; 0 never fits.
    """
    found: list[Tensor | None] = [None] * len(factors)
    if tolerance <= 0:
        return found
    # Squares of small or large factors leave the range; powers of two scale exactly.
    unit = factors.diagonal(dim1=-2, dim2=-1).amax(dim=(-2, -1)).clamp(min=0)
    exponent = torch.frexp(unit).exponent
    scale = torch.ldexp(torch.ones_like(unit), -exponent)  # of numbers: it is slow
    factors = factors * scale[:, None, None, None]
    largest = bases[..., -max(1, bases.shape[-1] // 8) :]
    image = factors @ largest
    squares = (largest * image).sum(dim=-2).square().sum(dim=(-2, -1))
    rest = image.square().sum(dim=(-3, -2, -1)) - squares
    bound = tolerance**2 * factors.square().sum(dim=(-3, -2, -1))
    likely = [number for number, more in enumerate((rest > bound).tolist()) if not more]
    if not likely:
        return found
    every = len(likely) == len(factors)
    chosen = (factors, bases) if every else (factors[likely], bases[likely])
    mass, diagonals = off_diagonal(*chosen)
    columns = zip(likely, (mass <= tolerance).tolist(), diagonals, strict=True)
    for number, good, diagonal in columns:
        if good:
            found[number] = torch.ldexp(diagonal, exponent[number])
    return found


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
    factors: list[Factors] = []
    for layer in layers:
        A, G = (layer.averages[side].read() for side in ("A", "G"))
        if A is not None and G is not None:
            factors.append((layer, {"A": A, "G": G}))
    return factors


def basis_updates(
    layers: Sequence[Factors], step: int, tolerance: float, counters: Counters
) -> dict[str, BasisUpdate]:
    """Return the eigenvectors of the layers' factors; change nothing.

    A factor whose basis still fits, with :func:`off_diagonal` mass below ``tolerance``,
    keeps it; so does one that cannot be decomposed. Factors of one size are decomposed
    together where :func:`grouped` says that it pays.
    """
    updates: dict[str, BasisUpdate] = {}
    waiting: list[_Waiting] = []
    for layer, factors in layers:
        if layer.truncated:
            updates[layer.name] = truncated_update(layer, factors, step, counters)
            continue
        update = updates[layer.name] = BasisUpdate({}, {})
        for side, factor in factors.items():
            update.values[side], update.vectors[side] = factor, None
            if layer.basis(side) is not None:  # the factor is not a diagonal one
                waiting.append(_Waiting(layer, side, factor))
    for group in _groups(waiting):
        results = _solutions(group, tolerance, counters)
        for item, result in zip(group, results, strict=True):
            update = updates[item.layer.name]
            values, vectors = _kept(item) if result is None else result
            update.values[item.side], update.vectors[item.side] = values, vectors
    return updates


def _groups(waiting: Sequence[_Waiting]) -> Iterator[list[_Waiting]]:
    """Yield the factors that are decomposed in one call."""
    groups: dict[object, list[_Waiting]] = {}
    for number, item in enumerate(waiting):
        factor = item.factor
        key: object = number
        if grouped(factor):
            ready = item.layer.ready
            key = (factor.device, factor.dtype, factor.shape, ready)
        groups.setdefault(key, []).append(item)
    yield from groups.values()


# Eigenvalues and eigenvectors, if these are new; ``None``: there are none to be found.
_Solution = tuple[Tensor, Tensor | None] | None


def _solutions(
    group: Sequence[_Waiting], tolerance: float, counters: Counters
) -> list[_Solution]:
    """Return the eigenvalues of a group's factors, and the bases that do not fit."""
    factors = _stack([item.factor for item in group])
    bases = [basis for item in group if (basis := item.basis) is not None]
    diagonals: list[Tensor | None] = [None] * len(group)
    if bases:
        diagonals = fits(factors, _stack(bases), tolerance)
    waiting = [n for n, diagonal in enumerate(diagonals) if diagonal is None]
    results: list[_Solution] = [
        None if diagonal is None else (diagonal.clamp(min=0), None)
        for diagonal in diagonals
    ]
    counters.skipped += len(group) - len(waiting)
    rest = factors if len(waiting) == len(group) else factors[waiting]
    solutions = _decomposed([group[n] for n in waiting], rest, tolerance, counters)
    for number, solution in zip(waiting, solutions, strict=True):
        results[number] = solution
    return results


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one; without a copy if it is a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _decomposed(
    group: Sequence[_Waiting], factors: Tensor, tolerance: float, counters: Counters
) -> list[tuple[Tensor, Tensor] | None]:
    """Return the decompositions of a group's factors, in one call if that works."""
    if len(group) > 1:
        bases = [basis for item in group if (basis := item.basis) is not None]
        attempt = Counters()
        basis = torch.cat(bases) if bases and follows(factors, tolerance / 2) else None
        solution = decompose(
            factors.flatten(0, 1), attempt, basis=basis, tolerance=tolerance
        )
        if solution is not None and not attempt.retried:
            counters.decomposed += len(group) * attempt.decomposed
            counters.followed += len(group) * attempt.followed
            parts = (part.split(factors.shape[1]) for part in solution)
            return list(zip(*parts, strict=True))
    # One bad matrix must not cost the others their decomposition.
    return [
        decompose(item.factor, counters, basis=item.basis, tolerance=tolerance)
        for item in group
    ]


def _kept(item: _Waiting) -> tuple[Tensor, Tensor | None]:
    """Return the diagonal of a factor in the old basis, or at first in the identity."""
    layer, factor, basis = item.layer, item.factor, item.layer.basis(item.side)
    assert basis is not None
    vectors = None
    if not layer.ready:
        eye = torch.eye(factor.shape[-1], dtype=basis.dtype, device=basis.device)
        basis = vectors = eye.expand_as(basis)
    diagonal = off_diagonal(factor, basis)[1]
    before = layer.values(item.side)
    usable = torch.isfinite(diagonal)
    return torch.where(usable, diagonal.clamp(min=0), before), vectors


def apply_updates_(
    layers: Sequence[LayerCurvature], updates: Mapping[str, BasisUpdate], step: int
) -> None:
    """Replace layers' bases by new ones; scalings and momentum move with them."""
    full = []
    for layer in layers:
        if layer.truncated:
            apply_truncated_(layer, updates[layer.name], step)
        else:
            full.append(layer)

    def kind(layer: LayerCurvature) -> Hashable:
        """Return what layers that are updated together have in common."""
        scalings, momentum = layer.averages["s"], layer.momentum
        scaled = not scalings.empty and scalings.held
        averaged = momentum is not None and not momentum.empty
        vectors = updates[layer.name].vectors
        new = tuple(side for side in ("A", "G") if vectors[side] is not None)
        return layer.device, layer.ready, scaled, averaged, new

    for stack in stacks_of(full, kind):
        _apply_(stack, [updates[layer.name] for layer in stack.layers], step)


def _apply_(stack: Stack, updates: Sequence[BasisUpdate], step: int) -> None:
    """Apply the updates of alike layers."""
    layers, first = stack.layers, stack.layers[0]
    scalings, momentum = first.averages["s"], first.momentum
    moved = first.ready and not scalings.empty and scalings.held
    if moved:
        # Within a degenerate space scalings belong to an arbitrary basis, which must
        # not be transported.
        with stack.average("s") as (totals, _):
            stack.share_(totals, pooled=False)
    overlaps: dict[str, Tensor | None] = {"A": None, "G": None}
    for side in ("A", "G"):
        vectors = [new for one in updates if (new := one.vectors[side]) is not None]
        basis = stack.basis(side)
        if vectors and basis is not None:
            together = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
            # Found, its columns lie side by side, out of a state its rows: products
            # would differ in their last digits.
            together = together.contiguous()
            if first.ready:
                overlaps[side] = basis.transpose(-1, -2) @ together
            for layer, own in zip(layers, vectors, strict=True):
                layer.set_basis_(side, own)
        for layer, one in zip(layers, updates, strict=True):
            layer.values(side).copy_(one.values[side])
    if moved:
        with stack.average("s") as (totals, _):
            totals.copy_(transport(totals, overlaps["G"], overlaps["A"]))
    if first.ready and momentum is not None and not momentum.empty:
        with stack.average("momentum") as (totals, _):
            totals.copy_(kernels.rotate_matrix(totals, overlaps["G"], overlaps["A"]))
    for layer in layers:
        layer.note_eigenvalues()
        layer.version["basis"] = step


def refresh_(
    layers: Sequence[LayerCurvature], step: int, tolerance: float, counters: Counters
) -> None:
    """Replace the layers' bases by the eigenvectors of their present factors."""
    for batch in _batches(layers):
        updates = basis_updates(factors_of(batch), step, tolerance, counters)
        known = [layer for layer in batch if layer.name in updates]
        apply_updates_(known, updates, step)


def _batches(layers: Sequence[LayerCurvature]) -> Iterator[list[LayerCurvature]]:
    """Yield the layers in batches whose new bases exist at the same time.

    A batch is one layer, unless factors are small enough to be decomposed together.
    """
    batch: list[LayerCurvature] = []
    size = 0
    for layer in layers:
        own = sum(layer.averages[side].shape.numel() for side in ("A", "G"))
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
    """Return a layer with the eigenbasis of given factors, without storage for them.

    The dict of factors is emptied, so that none outlives its decomposition.
    """
    like = factors["G"]

    def bank(*shape: int) -> Tensor:
        return kernels.aligned_empty(shape, like).zero_()

    layer = LayerCurvature(block, bank, Placement(factors=False), rank)
    if layer.truncated:
        update = truncated_update(layer, factors, 1, counters)
        factors.clear()
        apply_updates_([layer], {layer.name: update}, 1)
        return layer
    update = BasisUpdate({}, {})
    for side in ("A", "G"):
        factor = factors.pop(side)
        vectors: Tensor | None = None
        if layer.basis(side) is None:
            values = factor
        else:
            solution = decompose(factor, counters)
            values, vectors = solution or _kept(_Waiting(layer, side, factor))
        update.values[side], update.vectors[side] = values, vectors
        del factor
    apply_updates_([layer], {layer.name: update}, 1)
    return layer


# -- gradients in the basis ------------------------------------------------------------


class Noise(NamedTuple):
    """How large a gradient's square is by noise alone, next to the scalings.

    Attributes:
        newest: Of this step's batch: one over the number of its examples, for a loss
            that is their mean.
        earlier: The average over the batches of earlier steps.
    """

    newest: Tensor
    earlier: Tensor


@dataclass
class ProjectedGradient:
    """The gradients of a layer, or of a stack of layers, in their eigenbases.

    Attributes:
        stack: The layers.
        parts: The coordinates; of full bases ``parts.kept`` has them all,
            ``[k b, d_out, d_in]``. ``None`` where another rank works on the layer.
        norms: Of the layers' gradients, ``[k]``, where the step needs them.
        scalings_sums: The weighted sums of the layers' scalings, ``[k]``; ``None``
            outside of lists.
        noise: Of the gradients, if scalings are averages of their squares.
    """

    stack: Stack
    parts: Coordinates | None = None
    norms: Tensor | None = None
    scalings_sums: Tensor | None = None
    noise: Noise | None = None

    @property
    def layers(self) -> list[LayerCurvature]:
        """The layers of the stack."""
        return self.stack.layers

    @property
    def kept(self) -> Tensor:
        """The coordinates in the kept directions."""
        assert self.parts is not None
        return self.parts.kept

    def by_layer(self) -> list[Tensor]:
        """Return :attr:`kept` layer by layer, each ``[b, d_out, d_in]``."""
        kept = self.kept
        return [kept] if len(self.layers) == 1 else list(kept.split(1))


def gradients_of(layer: LayerCurvature) -> list[Tensor]:
    """Return the gradients of a layer's parameters, whole; zeros where there is none.

    Of sharded parameters, all ranks must call this.
    """
    return [
        torch.zeros(p.shape, dtype=layer.dtype, device=p.device)
        if p.grad is None
        else whole(p.grad)
        for p in layer.block.tensors()
    ]


def project_truncated(
    layer: LayerCurvature,
    gradients: Sequence[Tensor],
    options: Options,
    workspace: Workspace,
) -> ProjectedGradient:
    """Return one layer's gradient in its truncated basis.

    The ``workspace`` holds the gradient, which becomes the layer's direction.
    """
    like = layer.averages["A"].weight
    name = f"direction of {layer.name}"
    gradient = workspace.take_rows(name, layer.block.shape, like)
    layer.block.pack_into_(gradient, gradients)
    norms = norm_of(gradient).unsqueeze(0) if options.grafting == "sgd" else None
    return ProjectedGradient(Stack.of([layer]), coordinates(layer, gradient), norms)


# -- lists -----------------------------------------------------------------------------


def available(layer: LayerCurvature) -> bool:
    """Return whether the package's CUDA kernels take the layer."""
    if layer.device.type != "cuda" or layer.dtype != torch.float32:
        return False
    return dispatch.kernel_cache(layer.device) is not None


def supports_list(layer: LayerCurvature, options: Options) -> bool:
    """Return whether a layer can be one of a list.

    Truncated bases, packed or bfloat16 storage, factored damping and the first scalings
    go layer by layer.
    """
    started = options.scaling is None or not layer.averages["s"].empty
    plain = options.damping_split == "exact" and not layer.truncated
    plain = plain and layer.storage == "full"
    return plain and started and available(layer)


def project_list(
    stacks: Sequence[Stack],
    gradients: Mapping[str, Sequence[Tensor]],
    rounds: Callable[[LayerCurvature], bool],
    workspace: Workspace,
) -> list[ProjectedGradient]:
    """Return the gradients of stacks of one device in their full bases.

    Args:
        stacks: The layers.
        gradients: Whole, of their parameters.
        rounds: Says whether a layer's may be rounded on the way.
        workspace: Holds what is rounded, and the coordinates.
    """
    projections = []
    for stack in stacks:
        gradient = stack.pack([gradients[layer.name] for layer in stack.layers])
        left, right = stack.basis("G"), stack.basis("A")
        rotated = kernels.rotate_into(
            gradient,
            left,
            right,
            precise=not rounds(stack.layers[0]),
            workspace=workspace,
            name=f"coordinates of {stack.layers[0].name}",
        )
        if left is right is None:  # may be the parameter's own gradient
            rotated = rotated.clone()
        projections.append(ProjectedGradient(stack, Coordinates.of_full_basis(rotated)))
    parts = [part for projection in projections for part in projection.by_layer()]
    norms = iter(torch._foreach_norm(parts))
    for projection in projections:  # the basis is orthogonal
        projection.norms = torch.stack([next(norms) for _ in projection.layers])
    return projections


def squares_sums(
    scalings: Sequence[Tensor], projected: Sequence[Tensor], keep: Tensor, rate: Tensor
) -> Tensor:
    """Overwrite ``s`` by ``keep s + rate u^2`` for a list of layers; return its sums.

    Each layer has its numbers ``keep`` and ``rate``; with a rate of 0 its ``u`` is not
    read.
    """
    scales = torch.stack([keep, rate], dim=1)
    sums: Tensor = OPS.squares_(list(scalings), list(projected), scales)
    return sums
