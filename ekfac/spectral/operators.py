"""What the estimators need of a matrix: its size and its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from ekfac.vectors import standard_normal

Function = TypeVar("Function", bound=Callable[..., Any])


def in_full_precision(function: Function) -> Function:
    """Return a function of an operator, or a method, that autocast leaves alone.

    The half precision that it would choose for products is too coarse for curvature.
    """

    @wraps(function)
    def precise(*args: Any, **options: Any) -> Any:
        operator = args[0] if args else options["operator"]
        with torch.autocast(operator.device.type, enabled=False):
            return function(*args, **options)

    return cast("Function", precise)


class SymmetricOperator(Protocol):
    """A symmetric matrix ``[n, n]`` known through its products with columns."""

    @property
    def shape(self) -> torch.Size:
        """``[n, n]``."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the products."""

    @property
    def device(self) -> torch.device:
        """Device of the products."""

    def __matmul__(self, columns: Tensor, /) -> Tensor:
        """Return the products with the columns of ``[n, k]``."""


@dataclass(frozen=True)
class FunctionOperator:
    """A callable as a symmetric operator.

    Attributes:
        function: Maps columns ``[n, k]`` to their products ``[n, k]``.
        size: ``n``.
        dtype: Type of the columns.
        device: Device of the columns.
    """

    function: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        """``[n, n]``."""
        return torch.Size((self.size, self.size))

    def __matmul__(self, columns: Tensor, /) -> Tensor:
        """Return the products with the columns of ``[n, k]``."""
        return self.function(columns)


def identity(operator: SymmetricOperator) -> Tensor:
    """Return the identity ``[n, n]`` in the operator's dtype and device."""
    n = operator.shape[0]
    return torch.eye(n, dtype=operator.dtype, device=operator.device)


def gaussian_columns(
    operator: SymmetricOperator, count: int, generator: torch.Generator | None
) -> Tensor:
    """Return ``[n, count]`` standard normal columns."""
    return standard_normal(
        (operator.shape[0], count),
        generator=generator,
        dtype=operator.dtype,
        device=operator.device,
    )


def sign_columns(
    operator: SymmetricOperator, count: int, generator: torch.Generator | None
) -> Tensor:
    """Return ``[n, count]`` columns of independent signs (Rademacher)."""
    normal = gaussian_columns(operator, count, generator)
    return torch.where(normal < 0, -1.0, 1.0).to(normal)


# Rows whose products are summed in the columns' own precision.
_ROWS = 1 << 10
# Rows that are copied in double precision at a time.
_COPIED = 1 << 16


def inner(first: Tensor, second: Tensor) -> Tensor:
    """Return ``first^T second``, ``[k, m]``, blocks of rows summed in double.

    A single-precision sum over millions of rows, as networks have parameters, loses
    three digits and more; blocks of rows do not.

    Args:
        first: ``[n, k]``.
        second: ``[n, m]``.
    """
    if first.dtype == torch.float64 or len(first) <= _ROWS:
        return first.mT @ second
    whole = len(first) // _ROWS * _ROWS
    blocks = [part[:whole].unflatten(0, (-1, _ROWS)) for part in (first, second)]
    total = torch.bmm(blocks[0].mT, blocks[1]).double().sum(dim=0)
    total += first[whole:].mT @ second[whole:]
    return total.to(first.dtype)


def gram(columns: Tensor) -> Tensor:
    """Return ``X^T X`` of ``[n, k]`` in double, each product exact in single."""
    total = columns.new_zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for part in columns.split(_COPIED):
        rows = part.double()
        total.addmm_(rows.mT, rows)
    return total


def length(vector: Tensor) -> float:
    """Return the Euclidean norm of ``[n]``, summed like :func:`inner`."""
    column = vector.unsqueeze(1)
    return float(inner(column, column).item() ** 0.5)


def orthonormal(columns: Tensor, *against: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns' span, orthogonal to ``against``.

    Directions that are rounding noise after the projection are dropped, so the result
    may have fewer columns.

    In double precision by a singular value decomposition. Narrower types take the
    eigenvectors of a Gram matrix in double (Stathopoulos & Wu 2002), whose rounding is
    below that of the columns: what the result lacks of orthonormality is some
    ``eps sqrt(k)``, however many rows there are, where sums in the columns' own type
    grow with them. That loses sight of directions below ``sqrt(eps)`` in double.

    Args:
        columns: ``[n, k]``.
        against: Tensors ``[n, m]`` with orthonormal columns.
    """
    norms = torch.linalg.vector_norm(columns, dim=0)
    # The second pass removes what cancellation left of the first ("twice is enough").
    columns = columns / norms.where(norms > 0, torch.ones_like(norms))
    for _ in range(2):
        for basis in against:
            columns = columns - basis @ inner(basis, columns)
        columns = _spanned(columns, sum(basis.shape[1] for basis in against))
    return columns


def _spanned(columns: Tensor, removed: int) -> Tensor:
    """Return an orthonormal basis of the span of columns of at most unit length.

    Args:
        columns: ``[n, k]``.
        removed: How many directions they were projected out of.
    """
    eps = torch.finfo(columns.dtype).eps
    if columns.dtype == torch.float64:
        left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
        whole: Tensor = left[:, singular > eps * max(columns.shape)]
        return whole
    # The rounding of a row's sum over k products is in proportion to its entries: it
    # does not grow with the number of rows.
    noise = 4 * eps * (columns.shape[1] + removed) ** 0.5
    squares, vectors = torch.linalg.eigh(gram(columns))
    kept = squares > noise**2
    vectors = vectors[:, kept] / squares[kept].sqrt()
    found: Tensor = columns @ vectors.to(columns.dtype)
    return found
