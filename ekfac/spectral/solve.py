"""Preconditioned conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ekfac.spectral.operators import (
    Solution,
    SymmetricOperator,
    in_full_precision,
)


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
