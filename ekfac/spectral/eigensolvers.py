"""Krylov methods: Lanczos, LOBPCG, conjugate gradients; singular values.

The singular values of pure noise are those of Marchenko & Pastur (1967); Haink (2023),
chapter 4 and equation 6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import pi, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from ekfac.spectral.operators import (
    Eigenpairs,
    Solution,
    SymmetricOperator,
    gaussian_columns,
    in_full_precision,
    inner,
    length,
    orthonormal,
)

Which = Literal["largest", "smallest"]

# Products between two solutions of the small eigenproblem.
_CHECK_EVERY = 5
# Columns allocated at first; the number doubles when they are full.
_COLUMNS = 16


class LanczosProcess:
    """An orthonormal Krylov basis, grown one product at a time.

    After ``m`` steps ``F V = V T + beta_m v_{m+1} e_m^T`` with ``V`` ``[n, m]``
    orthonormal and ``T`` tridiagonal. Every new vector is orthogonalised against all
    others, twice: without it the process finds copies of eigenvalues that it already
    has (Paige 1972), harmless for densities and wrong for lists.
    """

    def __init__(self, operator: SymmetricOperator, start: Tensor, capacity: int):
        self.operator = operator
        self.capacity = min(capacity, start.shape[0])
        self.basis = start.new_empty(start.shape[0], min(self.capacity, _COLUMNS))
        self.basis[:, 0] = start / length(start)
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self._next: Tensor | None = None

    @property
    def steps(self) -> int:
        """How many products were taken."""
        return len(self.alphas)

    @property
    def finished(self) -> bool:
        """Whether the basis fills its capacity."""
        return self.steps == self.capacity

    @property
    def broke_down(self) -> bool:
        """Whether the basis spans an invariant subspace: nothing new to find in it."""
        scale = max(map(abs, [*self.alphas, *self.betas[:-1]]), default=0.0)
        noise = torch.finfo(self.basis.dtype).eps * self.basis.shape[0] ** 0.5
        return bool(self.betas) and self.betas[-1] <= 10 * noise * scale

    def step(self) -> None:
        """Multiply by the newest vector and orthogonalise the product."""
        m = self.steps
        if m == self.basis.shape[1]:
            more = min(m, self.capacity - m)
            room = self.basis.new_empty(self.basis.shape[0], more)
            self.basis = torch.cat([self.basis, room], dim=1)
        if self._next is not None:
            self.basis[:, m] = self._next
        newest = self.basis[:, m]
        product = (self.operator @ newest.unsqueeze(1)).squeeze(1)
        self.alphas.append(float(inner(newest[:, None], product[:, None])))
        check_finite(product)
        product, norm = self._orthogonalised(product, m + 1)
        self.betas.append(norm)
        self._next = product / norm if norm > 0 else product

    def restart(self, direction: Tensor) -> None:
        """Go on from a new ``direction`` ``[n]`` after a breakdown."""
        direction, norm = self._orthogonalised(direction, self.steps)
        self.betas[-1] = 0.0
        self._next = direction / norm

    def _orthogonalised(self, vector: Tensor, count: int) -> tuple[Tensor, float]:
        """Return ``vector`` without its part in the first ``count``, and its norm."""
        basis = self.basis[:, :count]
        for _ in range(2):
            vector = vector - basis @ inner(basis, vector[:, None]).squeeze(1)
        return vector, length(vector)

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues ``[m]``, ascending, and eigenvectors ``[m, m]`` of T."""
        alphas = torch.tensor(self.alphas, dtype=torch.float64)
        betas = torch.tensor(self.betas[:-1], dtype=torch.float64)
        tridiagonal = torch.diag(alphas)
        tridiagonal += torch.diag(betas, 1) + torch.diag(betas, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values.to(self.basis), vectors.to(self.basis)


@in_full_precision
def lanczos(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    tolerance: float | None = None,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Return the ``k`` largest or smallest eigenvalues with their eigenvectors.

    Keeps the whole Krylov basis, up to ``n * max_products`` numbers. A single starting
    vector sees one copy of an eigenvalue until its subspace is exhausted; for
    clusters and multiplicities :func:`ekfac.spectral.lobpcg` is the safer choice.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        k: How many pairs.
        which: The end of the spectrum.
        tolerance: Residual, relative to the largest eigenvalue in magnitude, below
            which a pair has converged. Default: the square root of the precision,
            which gives eigenvalues to about full precision.
        max_products: The most matrix-vector products. Default: ``20 k + 100``.
        generator: Source of the starting vector.

    Returns:
        The pairs, ``converged`` or with the residuals they have.

    Raises:
        ValueError: If ``k`` is not between 1 and ``n``, or ``which`` is unknown.
    """
    check_count(operator, k, which)
    capacity = max(k, 20 * k + 100 if max_products is None else max_products)
    threshold = default_tolerance(operator, tolerance)
    start = gaussian_columns(operator, 1, generator).squeeze(1)
    process = LanczosProcess(operator, start, capacity)
    while not process.finished:
        process.step()
        if not process.finished and process.broke_down:
            process.restart(gaussian_columns(operator, 1, generator).squeeze(1))
        elif process.steps >= k and process.steps % _CHECK_EVERY == 0:
            values, vectors = process.ritz()
            residuals = process.betas[-1] * vectors[-1, _end(which, k)].abs()
            if bool((residuals <= threshold * values.abs().max()).all()):
                break
    values, vectors = process.ritz()
    outermost = _end(which, k)
    ritz_vectors = process.basis[:, : process.steps] @ vectors[:, outermost]
    return measured(
        operator,
        values[outermost],
        ritz_vectors,
        threshold,
        process.steps,
        float(values.abs().max()),
    )


def _end(which: Which, k: int) -> list[int]:
    """Return the indices of the ``k`` outermost of ascending values."""
    return [-1 - i for i in range(k)] if which == "largest" else list(range(k))


def check_count(operator: SymmetricOperator, k: int, which: Which = "largest") -> None:
    """Raise ``ValueError`` unless ``1 <= k <= n`` and ``which`` is an end."""
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {get_args(Which)}, got {which!r}.")
    if not 1 <= k <= operator.shape[0]:
        raise ValueError(f"k must be between 1 and {operator.shape[0]}, got {k}.")


def check_finite(products: Tensor) -> None:
    """Raise ``ValueError`` unless all products of an operator are finite."""
    if not bool(torch.isfinite(products).all()):
        raise ValueError(
            "The operator's products are not finite; look for infinities or NaN in "
            "the matrix, or in the model and the data that it is of."
        )


def default_tolerance(operator: SymmetricOperator, tolerance: float | None) -> float:
    """Return ``tolerance``, or the square root of the operator's precision."""
    if tolerance is not None:
        return tolerance
    return float(torch.finfo(operator.dtype).eps ** 0.5)


def measured(
    operator: SymmetricOperator,
    values: Tensor,
    vectors: Tensor,
    tolerance: float,
    products: int,
    scale: float,
) -> Eigenpairs:
    """Return the pairs with residuals measured by fresh products.

    The ``scale`` is the largest eigenvalue in magnitude, as far as known.
    """
    residuals = torch.linalg.vector_norm(operator @ vectors - vectors * values, dim=0)
    converged = bool((residuals <= tolerance * scale).all())
    return Eigenpairs(values, vectors, residuals, converged, products + values.shape[0])


@in_full_precision
def lobpcg(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    which: Which = "largest",
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float | None = None,
    max_iterations: int = 200,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Return the ``k`` largest or smallest eigenvalues with their eigenvectors.

    The block finds eigenvalues with their multiplicities; a few guard vectors beyond
    ``k`` keep the last pairs from waiting for a close neighbour. The search space
    ``[X, P, W]`` is kept orthonormal and ``P`` is chosen orthogonal to ``X`` in
    coordinates (Knyazev 2001; Hetmaniuk & Lehoucq 2006), so that an iteration takes
    one product per column and no ill-conditioned Gram matrix is ever inverted.
    Memory: about ``8 n (k + 2)``. In single precision values are good to a few ``eps``
    of the largest and vectors orthonormal to ``1e-6``, at any ``n``.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        k: How many pairs.
        which: The end of the spectrum.
        preconditioner: Maps residuals ``[n, m]`` to search directions, an approximate
            inverse of the operator; of use for the smallest eigenvalues.
        tolerance: Residual, relative to the largest eigenvalue in magnitude in the
            search space, below which a pair has converged. Default: the square root
            of the precision.
        max_iterations: The most iterations.
        generator: Source of the starting block.

    Returns:
        The pairs, ``converged`` or with the residuals they have.

    Raises:
        ValueError: If ``k`` is not between 1 and ``n``, or ``which`` is unknown.
    """
    check_count(operator, k, which)
    threshold = default_tolerance(operator, tolerance)
    width = min(operator.shape[0], k + max(2, k // 4))
    columns = orthonormal(gaussian_columns(operator, width, generator))
    search = _Search(operator, columns, which)
    for _ in range(max_iterations):
        residual = search.residual()
        norms = torch.linalg.vector_norm(residual[:, :k], dim=0)
        if bool((norms <= threshold * search.scale).all()):
            break
        if preconditioner is not None:
            residual = preconditioner(residual)
        if not search.improve(residual):
            break
    return measured(
        operator,
        search.values[:k],
        search.columns[:, :k],
        threshold,
        search.products,
        search.scale,
    )


class _Search:
    """The current pairs and the directions of the last improvement.

    ``columns`` X and ``last`` P are orthonormal together; their products are carried
    along by the same linear combinations. ``scale`` is the largest Ritz value in
    magnitude so far, a lower bound of the operator's norm.
    """

    def __init__(
        self, operator: SymmetricOperator, columns: Tensor, which: Which
    ) -> None:
        self.operator = operator
        self.which = which
        self.products = columns.shape[1]
        self.width = columns.shape[1]
        self.scale = 0.0
        self._rotate(columns, operator @ columns)

    def residual(self) -> Tensor:
        """Return ``F X - X diag(values)``, ``[n, width]``."""
        residual: Tensor = self.columns_product - self.columns * self.values
        return residual

    def improve(self, directions: Tensor) -> bool:
        """Replace X by the best of ``span[X, P, directions]``; False: nothing new."""
        fresh = orthonormal(directions, self.columns, self.last)
        if fresh.shape[1] == 0:
            return False
        self.products += fresh.shape[1]
        self._rotate(
            torch.cat([self.columns, self.last, fresh], dim=1),
            torch.cat(
                [self.columns_product, self.last_product, self.operator @ fresh], dim=1
            ),
        )
        return True

    def _rotate(self, basis: Tensor, product: Tensor) -> None:
        """Take the outermost Ritz pairs of an orthonormal basis and its product."""
        check_finite(product)
        small = inner(basis, product)
        values, vectors = torch.linalg.eigh((small + small.mT) / 2)
        self.scale = max(self.scale, float(values.abs().max()))
        if self.which == "largest":
            values, vectors = values.flip(0), vectors.flip(1)
        self.values, best = values[: self.width], vectors[:, : self.width]
        # The part of the new X outside the span of the old one: conjugate directions.
        step = best.clone()
        step[: self.width] = 0
        step = orthonormal(step, best)
        self.columns, self.columns_product = basis @ best, product @ best
        self.last, self.last_product = basis @ step, product @ step


@in_full_precision
def conjugate_gradient(
    operator: SymmetricOperator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
) -> Solution:
    """Return the solutions of ``(F + damping I) X = rhs``.

    The columns are separate systems that share their products (Hestenes & Stiefel
    1952; preconditioned as Golub & Van Loan, Alg. 11.5.1); a column that has converged
    stands still.

    Args:
        operator: Symmetric matrix ``[n, n]``, positive definite once damped.
        rhs: ``[n, k]``.
        damping: Added to the diagonal.
        preconditioner: Maps residuals ``[n, k]`` to an approximate solution; symmetric
            and positive definite.
        tolerance: Norm of the residual relative to the right-hand side's.
        max_iterations: The most iterations.

    Returns:
        The solutions, ``converged`` or with the residuals they have, recomputed from
        the solution.

    Raises:
        ValueError: If a direction of non-positive curvature is met, or ``rhs`` has
            another shape.
    """
    if rhs.dim() != 2 or len(rhs) != operator.shape[0]:
        raise ValueError(
            f"rhs must have shape [{operator.shape[0]}, k], got {list(rhs.shape)}; "
            "make a single vector a column with unsqueeze(1)."
        )
    precondition = preconditioner if preconditioner is not None else Tensor.clone
    # Products of small right-hand sides would underflow in single precision.
    unit = rhs.abs().amax(dim=0)
    unit = unit.where(unit > 0, torch.ones_like(unit))
    rhs = rhs / unit
    target = tolerance * torch.linalg.vector_norm(rhs, dim=0)
    solution, residual = torch.zeros_like(rhs), rhs.clone()
    direction = precondition(residual)
    slope = _dots(residual, direction)
    iterations = 0
    while iterations < max_iterations:
        active = torch.linalg.vector_norm(residual, dim=0) > target
        if not bool(active.any()):
            break
        product = operator @ direction + damping * direction
        curvature = _dots(direction, product)
        _require_positive(curvature[active], direction[:, active], damping)
        step = _ratio(slope, curvature, active)
        solution = solution + step * direction
        residual = residual - step * product
        candidate = precondition(residual)
        new_slope = _dots(residual, candidate)
        direction = candidate + _ratio(new_slope, slope, active) * direction
        slope = new_slope
        iterations += 1
    residual = rhs - operator @ solution - damping * solution
    norms = torch.linalg.vector_norm(residual, dim=0)
    scale = torch.linalg.vector_norm(rhs, dim=0)
    relative = norms / scale.where(scale > 0, torch.ones_like(scale))
    # The recursion's residual drifts from the true one by rounding.
    converged = bool((relative <= 2 * tolerance).all())
    return Solution(solution * unit, relative, iterations, converged)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of the columns, ``[k]``."""
    return (a * b).sum(dim=0)


def _ratio(numerator: Tensor, denominator: Tensor, active: Tensor) -> Tensor:
    """Return the quotient in the active columns and zero in the others."""
    safe = denominator.where(active, torch.ones_like(denominator))
    return (numerator / safe).where(active, torch.zeros_like(denominator))


def _require_positive(curvature: Tensor, direction: Tensor, damping: float) -> None:
    """Raise unless the curvature along every direction is positive."""
    if bool((curvature <= 0).any()):
        quotient = float((curvature / _dots(direction, direction)).min())
        raise ValueError(
            "Conjugate gradients need F + damping I positive definite, met a direction "
            f"of curvature {quotient:.3g} with {damping=}; pass more damping, or a "
            "positive semi-definite matrix (a GGN or a Fisher) in place of a Hessian."
        )


def singular_products(matrix: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Return singular values ``[k]``, descending, and ``u_i v_i^T`` ``[k, n, m]``.

    The products are orthonormal, and with the singular values as coefficients they sum
    to the matrix.

    Args:
        matrix: ``[n, m]``.
        k: How many, the largest. Default: all.
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
