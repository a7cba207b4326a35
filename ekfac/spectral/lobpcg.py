"""Locally optimal block preconditioned conjugate gradients for eigenpairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ekfac.spectral.lanczos import (
    Which,
    check_count,
    check_finite,
    default_tolerance,
    measured,
)
from ekfac.spectral.operators import (
    SymmetricOperator,
    gaussian_columns,
    in_full_precision,
    inner,
    orthonormal,
)
from ekfac.spectral.results import Eigenpairs


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
        # What of the new X does not come from the old one: the conjugate directions.
        step = best.clone()
        step[: self.width] = 0
        step = orthonormal(step, best)
        self.columns, self.columns_product = basis @ best, product @ best
        self.last, self.last_product = basis @ step, product @ step
