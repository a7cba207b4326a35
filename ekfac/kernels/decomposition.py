"""Eigendecomposition of a stack of symmetric matrices, by the fastest accurate solver.

On a CUDA device ``torch.linalg.eigh`` decomposes matrices of more than 32 rows one by
one (PyTorch issue 175585; newer versions may not). Here they are decomposed together:
small ones by Jacobi's method in shared memory, larger ones by cuSOLVER's batched solver
from the library that PyTorch ships, and where an old basis nearly fits by orthogonal
iteration, which consists of matrix products. Every result is checked by its residual;
``torch.linalg.eigh`` decomposes the matrices that fail the check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ekfac.kernels.cuda import dispatch
from ekfac.kernels.cuda.choice import TORCH, bucket
from ekfac.kernels.cuda.driver import batched_eigh

logger = logging.getLogger(__name__)

# Size up to which calls cost a CPU as much time as decompositions.
CALLS = 128
# torch decomposes matrices up to this size together itself.
TOGETHER = 32
# Largest size of Jacobi's method: its sweeps, of n^3 operations each, cost less than a
# reduction to tridiagonal form, and the matrix fits into shared memory.
JACOBI = 128
# Largest residual that is accepted, in units of eps sqrt(d): of |C - Q L Q^T| / |C| and
# |Q^T Q - I| / sqrt(d). LAPACK's own is about 1.
HELD = 30.0
# Smallest size at which iteration starts from an old basis, and the largest share of
# the columns that a decomposition may then have to finish.
WARM = 256
LEADING = 0.4


def misfit(matrices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Return ``|C - Q L Q^T| / |C|`` of every matrix, in Frobenius norms, ``[n]``.

    With orthogonal ``Q`` and ``L`` the diagonal of ``Q^T C Q`` it is the relative norm
    of the off-diagonal part of ``Q^T C Q``.
    """
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.transpose(-1, -2)
    tiny = torch.finfo(matrices.dtype).tiny
    size: Tensor = matrices.norm(dim=(-2, -1))
    off: Tensor = (matrices - rebuilt).norm(dim=(-2, -1))
    return off / size.clamp(min=tiny)


def skew(vectors: Tensor) -> Tensor:
    """Return ``|Q^T Q - I| / sqrt(d)`` of every ``Q``, ``[n]``."""
    gram = vectors.transpose(-1, -2) @ vectors
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    off: Tensor = gram.square().mean(dim=-1).sum(dim=-1).sqrt()
    return off


def residuals(matrices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Return the larger of :func:`misfit` and :func:`skew`, ``[n]``; no device wait.

    Args:
        matrices: ``C`` ``[n, d, d]``.
        values: ``[n, d]``.
        vectors: ``Q`` ``[n, d, d]``, eigenvectors in columns.
    """
    return torch.maximum(misfit(matrices, values, vectors), skew(vectors))


def rounding(matrices: Tensor) -> float:
    """Return the largest residual that rounding explains."""
    return float(HELD * torch.finfo(matrices.dtype).eps * matrices.shape[-1] ** 0.5)


def orthonormal(matrices: Tensor) -> Tensor | None:
    """Return orthonormal columns of the same span, by CholeskyQR2.

    Yamamoto et al. 2015: one pass loses digits with the square of the condition number,
    the second restores them. It takes matrix products and triangular solves alone.

    Returns:
        ``[n, d, d]``, or ``None`` if a matrix is too close to singular.
    """
    for _ in range(2):
        gram = matrices.transpose(-1, -2) @ matrices
        lower, info = torch.linalg.cholesky_ex(gram)
        if bool(info.any()):
            return None
        matrices = torch.linalg.solve_triangular(
            lower.transpose(-1, -2), matrices, upper=True, left=False
        )
    return matrices


def follows(matrices: Tensor, bound: float) -> bool:
    """Return whether :func:`iterated` from an old basis may pay.

    On a CPU a decomposition takes less time than a single iteration
    (``benchmarks/warm_start.py``).
    """
    return (
        bound > 0
        and matrices.is_cuda
        and matrices.dtype == torch.float32
        and matrices.shape[-1] >= WARM
    )


def iterated(
    matrices: Tensor, basis: Tensor, *, bound: float, steps: int = 3
) -> tuple[Tensor, Tensor] | None:
    """Return a decomposition that starts from an old basis, if it reaches the bound.

    Orthogonal iteration, ``Q <- orth(C Q)``, and one Rayleigh-Ritz step (Golub & Van
    Loan, sections 8.2.4 and 8.1). Iteration moves new directions of ``C`` into the
    leading columns at once, but separates similar eigenvalues slowly. So the
    off-diagonal part that remains lies mostly among the leading columns, and a
    decomposition of ``Q^T C Q`` restricted to them removes it. Clustered eigenvalues
    need no care: ``Q^T C Q`` is diagonal with any basis of their span.

    Args:
        matrices: ``C`` ``[n, d, d]``, positive semi-definite.
        basis: ``[n, d, d]``, orthogonal.
        bound: On the off-diagonal part of ``Q^T C Q``, relative to ``|C|``. The basis
            is orthogonal up to rounding.
        steps: Largest number of iterations.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors; ``None`` if ``bound`` is
        not reached with at most ``LEADING`` of the columns.
    """
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    # The shift keeps C Q far enough from singular; eigenvectors stay.
    shift = mean * torch.finfo(matrices.dtype).eps ** 0.5
    # Orthogonalisation clears a column of those before it: dominant ones come first.
    values = (basis * (matrices @ basis)).sum(dim=-2)
    basis = _columns(basis, values.argsort(dim=-1, descending=True))
    for _ in range(steps):
        image = matrices @ basis + shift * basis
        # With columns of unit length the condition number is that of their angles.
        tiny = torch.finfo(matrices.dtype).tiny
        following = orthonormal(
            image / image.norm(dim=-2, keepdim=True).clamp(min=tiny)
        )
        if following is None:
            return None
        basis = following
        rotated = basis.transpose(-1, -2) @ (matrices @ basis)
        count = _leading(rotated, 0.9 * bound)  # 0.1 is left for rounding
        if count <= LEADING * matrices.shape[-1]:
            return _turned(matrices, basis, rotated, count, bound)
    return None


def _columns(basis: Tensor, order: Tensor) -> Tensor:
    """Return the columns of ``[n, d, d]`` in the order ``[n, d]``."""
    return basis.gather(-1, order.unsqueeze(-2).expand_as(basis))


def _leading(rotated: Tensor, bound: float) -> int:
    """Return the number of leading columns after which a matrix is nearly diagonal.

    Args:
        rotated: ``Q^T C Q`` ``[n, d, d]``.
        bound: On the off-diagonal part of the columns after them, relative to the norm.
    """
    square = rotated.square()
    above = 2 * square.triu(1).sum(dim=-2)  # of each column, and the same of its row
    after = above.flip(-1).cumsum(dim=-1).flip(-1)
    # A NaN counts as too large.
    small = after <= bound**2 * square.sum(dim=(-2, -1)).unsqueeze(-1)
    return int((~small).sum(dim=-1).max())


def _turned(
    matrices: Tensor, basis: Tensor, rotated: Tensor, count: int, bound: float
) -> tuple[Tensor, Tensor] | None:
    """Return the decomposition with the leading columns turned, if it is accurate."""
    values = rotated.diagonal(dim1=-2, dim2=-1).clone()
    if count:
        lead = rotated[:, :count, :count]
        try:
            eigenvalues, turn = eigh((lead + lead.transpose(-1, -2)) / 2)
        except RuntimeError:
            return None
        values[:, :count] = eigenvalues
        turned = basis[..., :count] @ turn
        basis = torch.cat([turned, basis[..., count:]], dim=-1)
    fits = (misfit(matrices, values, basis) <= bound).all()
    if not bool(fits & (skew(basis) <= rounding(matrices)).all()):
        return None
    values, order = values.sort(dim=-1)
    return values, _columns(basis, order)


def has_batched(matrices: Tensor) -> bool:
    """Return whether there are solvers that decompose a whole stack at a time."""
    return matrices.is_cuda and matrices.dtype == torch.float32


def grouped(matrices: Tensor) -> bool:
    """Return whether one call decomposes a stack of such matrices fastest."""
    small = matrices.device.type == "cpu" and matrices.shape[-1] <= CALLS
    return small or has_batched(matrices)


Solver = Callable[[Tensor], tuple[Tensor, Tensor] | None]


def solvers(matrices: Tensor) -> list[Solver]:
    """Return the solvers to try before ``torch.linalg.eigh``, the best first."""
    size = matrices.shape[-1]
    if not has_batched(matrices) or size <= TOGETHER:
        return []
    kernels = dispatch.kernel_cache(matrices.device)
    if kernels is None:
        return []
    solvers_by_name: dict[str, Solver] = {}
    if size <= JACOBI:
        solvers_by_name["jacobi"] = dispatch.eigenvectors
    if len(matrices) > 1:
        solvers_by_name["cusolver"] = batched_eigh
    if not solvers_by_name:
        return []
    return _fastest_first(kernels, matrices, solvers_by_name)


def _fastest_first(
    kernels: dispatch.KernelCache, matrices: Tensor, solvers: dict[str, Solver]
) -> list[Solver]:
    """Return solvers, the one measured to be fastest first; none if that is torch.

    The measured time includes the residuals, and torch for the matrices that miss them.
    """
    works: dict[str, Callable[[], object]] = {TORCH: partial(_solved, matrices, [])}
    for name, solver in solvers.items():
        works[name] = partial(_solved, matrices, [solver])
    key = f"eigh {bucket(len(matrices))} x {matrices.shape[-1]}"
    best = kernels.fastest(key, works)
    if best == TORCH:
        return []
    return sorted(solvers.values(), key=lambda solver: solver is not solvers.get(best))


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, as ``torch.linalg.eigh`` does.

    Matrices whose residual is too large with one solver go on to the next.

    Args:
        matrices: ``[n, d, d]``, symmetric and of about unit size.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors in columns.

    Raises:
        RuntimeError: If ``torch.linalg.eigh`` fails too.
    """
    return _solved(matrices, solvers(matrices))


def _solved(matrices: Tensor, chain: Sequence[Solver]) -> tuple[Tensor, Tensor]:
    """Return what :func:`eigh` does, trying the given solvers before torch's."""
    values = matrices.new_empty(matrices.shape[:-1])
    vectors = torch.empty_like(matrices)
    left = torch.arange(len(matrices), device=matrices.device)
    solution: tuple[Tensor, Tensor] | None
    for solver in chain:
        unsolved = matrices if len(left) == len(matrices) else matrices[left]
        try:
            solution = solver(unsolved)
        except RuntimeError as error:  # out of memory, or refused by the library
            logger.info("a batched eigensolver failed: %s", error)
            continue
        if solution is None:
            continue
        solved = residuals(unsolved, *solution) <= rounding(unsolved)  # False of a NaN
        if len(left) == len(matrices) and bool(solved.all()):
            return solution
        done = left[solved]
        values[done], vectors[done] = solution[0][solved], solution[1][solved]
        left = left[~solved]
        if not len(left):
            return values, vectors
    if len(left) == len(matrices):
        own_values, own_vectors = torch.linalg.eigh(matrices)
        return own_values, own_vectors
    values[left], vectors[left] = torch.linalg.eigh(matrices[left])
    return values, vectors


def orthonormal_columns(matrices: Tensor) -> Tensor:
    """Return orthonormal columns that span those of ``[b, d, k]``, ``k <= d``.

    CholeskyQR2 where the columns are independent enough, else Householder's QR.
    """
    tiny = torch.finfo(matrices.dtype).tiny
    unit = matrices / matrices.norm(dim=-2, keepdim=True).clamp(min=tiny)
    columns = orthonormal(unit)
    return torch.linalg.qr(unit).Q if columns is None else columns


def leading(matrices: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return approximate leading eigenpairs: block iteration, then Rayleigh-Ritz.

    Golub & Van Loan, section 8.2. Every step turns the columns towards the
    eigenvectors, by the ratio of eigenvalues. They need not arrive: scalings are
    measured in whatever orthonormal basis is used.

    Args:
        matrices: ``C`` ``[b, d, d]``, positive semi-definite.
        start: ``[b, d, k]``, earlier eigenvectors or any others, in columns.
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
    """Return ``[b, d, k]`` with ``count`` more columns, normal and reproducible.

    Block iteration finds new leading directions from them.
    """
    b, d, _ = basis.shape
    generator = torch.Generator().manual_seed(seed)
    more = torch.randn(b, d, count, generator=generator, dtype=torch.float64)
    return torch.cat([basis, more.to(basis) / d**0.5], dim=-1)


# -- eigenspaces -----------------------------------------------------------------------


def completed(basis: Tensor) -> Tensor:
    """Return an orthogonal ``[*, d, d]`` whose last ``r`` columns are the basis.

    Args:
        basis: ``[*, d, r]``, orthonormal columns.
    """
    rank = basis.shape[-1]
    if rank == basis.shape[-2]:
        return basis
    others = torch.linalg.qr(basis, mode="complete").Q[..., rank:]
    return torch.cat([others, basis], dim=-1)


def counts(basis: Tensor) -> Tensor:
    """Return how many directions each eigenvalue has: ``[1 + r]``, or ``[d]`` if full.

    The first of ``1 + r`` is that of the complement, which has ``d - r``.
    """
    d, rank = basis.shape[-2:]
    result = basis.new_ones(rank + int(rank < d))
    if rank < d:
        result[0] = d - rank
    return result


def places(basis: Tensor) -> Tensor:
    """Return the index of each completed direction in :func:`counts`, ``[d]``."""
    return torch.repeat_interleave(counts(basis).long())


def share_on_axes(basis: Tensor, values: Tensor) -> float:
    """Return the share of a factor that lies in the differences along its diagonal.

    ``|diag G - m|^2 / |G|^2``, with ``m`` the mean eigenvalue, summed over blocks: near
    1 if few coordinate axes hold the factor, 0 if its diagonal is constant.

    Args:
        basis: ``[b, d, r]``.
        values: ``[b, r]``, or ``[b, 1 + r]`` with the complement's in front.
    """
    d, rank = basis.shape[-2:]
    values = values / values.amax().clamp(min=torch.finfo(values.dtype).tiny)
    rest = values[:, :1] if rank < d else torch.zeros_like(values[:, :1])
    kept = (values[:, values.shape[-1] - rank :] - rest).unsqueeze(-1)
    diagonal = rest + (basis.square() @ kept).squeeze(-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    differences = float((diagonal - mean).square().sum())
    whole = float((values.square() * counts(basis)).sum())
    return differences / whole if whole else 0.0
