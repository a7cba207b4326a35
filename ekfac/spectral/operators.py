"""Symmetric operators, which estimators multiply with, and the results they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from textwrap import fill
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

from ekfac.progress import counted
from ekfac.vectors import standard_normal

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


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


@contextmanager
def watched(
    operator: SymmetricOperator,
    total: int,
    description: str = "products",
    *,
    progress: bool = True,
) -> Iterator[SymmetricOperator]:
    """Yield the operator with a progress bar over its products, if tqdm is installed.

    Args:
        operator: Given to any of the estimators.
        total: Number of products that are expected, or their limit.
        description: What the bar says.
        progress: Whether to show it.

    Example:
        >>> from ekfac.spectral import hutchinson_trace
        >>> with watched(torch.eye(50), 20, progress=False) as operator:
        ...     float(hutchinson_trace(operator, 20).value)
        50.0
    """
    if not progress:
        yield operator
        return
    with counted(total, description, progress=True) as advance:

        def product(columns: Tensor) -> Tensor:
            products = operator @ columns
            advance(columns.shape[1])
            return products

        yield FunctionOperator(
            product, operator.shape[0], operator.dtype, operator.device
        )


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
    full_rows = len(first) // _ROWS * _ROWS
    blocks = [part[:full_rows].unflatten(0, (-1, _ROWS)) for part in (first, second)]
    product = torch.bmm(blocks[0].mT, blocks[1]).double().sum(dim=0)
    product += first[full_rows:].mT @ second[full_rows:]
    return product.to(first.dtype)


def gram(columns: Tensor) -> Tensor:
    """Return ``X^T X`` of ``[n, k]`` in double, each product exact in single."""
    product = columns.new_zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    for part in columns.split(_COPIED):
        rows = part.double()
        product.addmm_(rows.mT, rows)
    return product


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

    The columns ``[n, k]`` were projected out of ``removed`` directions.
    """
    eps = torch.finfo(columns.dtype).eps
    if columns.dtype == torch.float64:
        left, singular, _ = torch.linalg.svd(columns, full_matrices=False)
        basis: Tensor = left[:, singular > eps * max(columns.shape)]
        return basis
    # The rounding of a row's sum over k products is in proportion to its entries: it
    # does not grow with the number of rows.
    noise = 4 * eps * (columns.shape[1] + removed) ** 0.5
    squares, vectors = torch.linalg.eigh(gram(columns))
    significant = squares > noise**2
    vectors = vectors[:, significant] / squares[significant].sqrt()
    spanned: Tensor = columns @ vectors.to(columns.dtype)
    return spanned


# How many entries of a tensor, sequence or mapping a result's repr shows.
_SHOWN = 6


@dataclass_transform(frozen_default=True)
def result(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose ``repr`` is a few lines.

    Large tensors are shown by their shapes, long sequences and mappings by their first
    entries.
    """
    frozen = dataclass(frozen=True, repr=False)(cls)
    frozen.__repr__ = _represented  # type: ignore[method-assign]
    return frozen


def _represented(self: Any) -> str:
    """Return the class with its public fields."""
    shown = [
        f"{field.name}={_short(getattr(self, field.name))}"
        for field in fields(self)
        if field.repr
    ]
    line = f"{type(self).__name__}({', '.join(shown)})"
    return line if len(line) <= 88 else fill(line, 88, subsequent_indent="    ")


def _short(value: Any) -> str:
    """Return the text of a value, of bounded length."""
    if isinstance(value, Tensor):
        if value.numel() <= _SHOWN and value.dim() < 2:
            return f"tensor({_short(value.tolist())})"
        return f"tensor{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        items = [f"{k!r}: {_short(v)}" for k, v in list(value.items())[:_SHOWN]]
        return "{" + ", ".join(items + _rest(len(value))) + "}"
    if isinstance(value, (list, tuple)):
        items = [_short(v) for v in value[:_SHOWN]] + _rest(len(value))
        return "[" + ", ".join(items) + "]"
    text = " ".join(repr(value).split())
    return text if len(text) <= 300 else f"{text[:200]}... <{type(value).__name__}>"


def _rest(count: int) -> list[str]:
    """Return what stands for the entries that are left out."""
    return [f"... ({count} in all)"] if count > _SHOWN else []


@result
class Estimate:
    """A random estimate.

    Attributes:
        value: The estimate, 0-d, or ``[n]`` for a diagonal.
        standard_error: Its estimated standard deviation, shaped as ``value``; larger
            for few samples, as Student's distribution has it: the truth is within twice
            of it in 95 % of all cases, if the samples are nearly normal. Those of a
            matrix with one large eigenvalue are not, and few of them say too little.
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
        error = samples.std(dim=0) / count**0.5 * few_samples(count)
        value = samples.mean(dim=0)
        return cls(value, error, num_products, within(error, value, tolerance))

    def __float__(self) -> float:
        return float(self.value)


def few_samples(count: int) -> float:
    """Return by how much a standard error of ``count`` samples is widened, above 1."""
    return student_quantile(count - 1) / student_quantile(10**9)


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's distribution.

    Exact for one and two degrees of freedom; from three on by the Cornish-Fisher
    expansion (Abramowitz & Stegun 26.7.5), within 1 % of it.
    """
    if degrees <= 2:
        return {1: 12.7062, 2: 4.30265}[degrees]
    z = 1.959964
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(degrees) ** i for i, term in enumerate(terms, 1))


def within(error: Tensor, value: Tensor, tolerance: float) -> bool:
    """Return whether ``|error| <= tolerance |value|``, in norm."""
    norm = torch.linalg.vector_norm
    return bool(norm(error) <= tolerance * norm(value))


@result
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


@result
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
