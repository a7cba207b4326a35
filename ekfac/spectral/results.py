"""What the estimators return: a value and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A random estimate.

    Attributes:
        value: The estimate, 0-d, or ``[n]`` for a diagonal.
        standard_error: Its estimated standard deviation, shaped as ``value``.
        num_products: How many matrix-vector products were spent.
        converged: Whether the standard error is within the tolerance asked for.
    """

    value: Tensor
    standard_error: Tensor
    num_products: int
    converged: bool

    @classmethod
    def exact(cls, value: Tensor, num_products: int) -> Estimate:
        """Return ``value`` as an estimate without error, if it is finite."""
        finite = bool(torch.isfinite(value).all())
        return cls(value, torch.zeros_like(value), num_products, finite)

    @classmethod
    def mean(cls, samples: Tensor, num_products: int, tolerance: float) -> Estimate:
        """Return the mean of independent samples, with its standard error.

        Args:
            samples: ``[m]`` or ``[m, n]``, ``m >= 2``.
            num_products: How many products they took.
            tolerance: Relative standard error below which the mean has converged.
        """
        count = samples.shape[0]
        error = samples.std(dim=0) / count**0.5
        value = samples.mean(dim=0)
        return cls(value, error, num_products, within(error, value, tolerance))

    def __float__(self) -> float:
        return float(self.value)


def within(error: Tensor, value: Tensor, tolerance: float) -> bool:
    """Return whether ``|error| <= tolerance |value|``, in norm."""
    norm = torch.linalg.vector_norm
    return bool(norm(error) <= tolerance * norm(value))


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues and their eigenvectors.

    Attributes:
        values: ``[k]``, from the end that was asked for inwards: descending for the
            largest, ascending for the smallest.
        vectors: ``[n, k]``, orthonormal columns.
        residuals: ``[k]``, the norms ``|F v - value v|``. Each value is within its
            residual of an eigenvalue, though not always the one meant.
        converged: Whether every residual is within the tolerance asked for.
        num_products: How many matrix-vector products were spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    num_products: int

    @classmethod
    def exact(cls, values: Tensor, vectors: Tensor) -> Eigenpairs:
        """Return pairs that a closed form gave, exact to rounding."""
        return cls(values, vectors, torch.zeros_like(values), True, 0)


@dataclass(frozen=True)
class Solution:
    """Solutions of linear systems.

    Attributes:
        value: ``[n, k]``, one solution per column.
        residual: ``[k]``, the norms of the residuals relative to the right-hand sides.
        iterations: How many products with ``k`` columns were spent.
        converged: Whether every residual is within the tolerance asked for.
    """

    value: Tensor
    residual: Tensor
    iterations: int
    converged: bool
