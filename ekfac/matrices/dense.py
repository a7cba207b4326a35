"""Matrices known by their eigenvalues and eigenvectors; dense and diagonal ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Self

from ekfac.errors import StateMismatchError
from ekfac.matrices.base import CurvatureMatrix, Stack, VectorOrTensor
from ekfac.matrices.eigen import CachedEigh, damped_log, damped_power
from ekfac.state_schema import Record, TensorField
from ekfac.vectors import Vector, VectorSpace


class DiagonalisedMatrix(CurvatureMatrix):
    """A matrix ``Q diag(values) Q^T``, whose operations act on its eigenvalues.

    A structure implements the eigenvalues, of any shape ``[*e]``, and the maps between
    stacks and coordinates ``[k, *e]``.
    """

    @abstractmethod
    def _values(self) -> Tensor:
        """Return the eigenvalues, ``[*e]``."""

    def _resolved(self) -> Tensor:
        """Return the eigenvalues, zero where they are no more than rounding."""
        return self._values()

    @abstractmethod
    def coordinates(self, stack: Stack) -> Tensor:
        """Return ``Q^T v``, ``[k, *e]``."""

    @abstractmethod
    def _vectors(self, coordinates: Tensor) -> Stack:
        """Return ``Q c`` of coordinates ``[k, *e]``."""

    def with_spectrum(
        self, function: Callable[[Tensor], Tensor], vector: VectorOrTensor
    ) -> VectorOrTensor:
        """Return ``Q f(values) Q^T v``, zero on entries that are not covered.

        Args:
            function: ``f``, of all eigenvalues at once, entry by entry.
            vector: A vector, or columns ``[P, k]``.
        """
        multipliers = function(self._values())
        return self._on_stack(lambda stack: self._apply(stack, multipliers), vector)

    def _apply(self, stack: Stack, multipliers: Tensor) -> Stack:
        """Return ``Q diag(multipliers) Q^T v``."""
        return self._vectors(self.coordinates(stack) * multipliers)

    def _multiply(self, stack: Stack) -> Stack:
        return self._apply(stack, self._values())

    def _quadratic(self, stack: Stack) -> Tensor:
        return (self.coordinates(stack).square() * self._values()).flatten(1).sum(dim=1)

    def _solve(self, stack: Stack, damping: float) -> Stack:
        return self._apply(stack, damped_power(self._resolved(), -1, damping))

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        return self._apply(stack, damped_power(self._resolved(), -0.5, damping))

    def _trace(self) -> Tensor:
        return self._values().sum()

    def _squared_norm(self) -> Tensor:
        return self._values().square().sum()

    def _logdet(self, damping: float) -> Tensor:
        return damped_log(self._resolved(), damping).sum()

    def _eigenvalues(self) -> Tensor:
        return self._values().flatten()

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        values = self._values()
        best = values.flatten().topk(k)
        one_hot = values.new_zeros(k, values.numel())
        one_hot.scatter_(1, best.indices.unsqueeze(1), 1.0)
        return best.values, self._vectors(one_hot.view(k, *values.shape))


class DenseMatrix(DiagonalisedMatrix):
    """A matrix kept entry by entry, ``P^2`` numbers.

    The first solve, power or determinant takes its eigendecomposition, ``P^3`` work and
    ``P^2`` more numbers. The matrix may be indefinite, like a Hessian.

    Args:
        space: Names and shapes of the vectors it acts on.
        matrix: ``[P, P]``, symmetric, in the flat order of ``space``.

    Raises:
        StateMismatchError: If ``matrix`` has another shape.

    Example:
        >>> import torch
        >>> space = VectorSpace({"w": (2,)})
        >>> F = DenseMatrix(space, torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> F.eigenvalues()
        tensor([1., 3.])
        >>> F.solve(torch.tensor([4.0, 0.0]), damping=1.0)
        tensor([ 1.5000, -0.5000])
    """

    kind = "dense"

    def __init__(self, space: VectorSpace, matrix: Tensor) -> None:
        super().__init__(space)
        if matrix.shape != (space.size, space.size):
            raise StateMismatchError(
                f"A dense matrix over {space.size} parameters has shape "
                f"{[space.size, space.size]}, got {list(matrix.shape)}."
            )
        self.matrix = matrix
        self._eigh = CachedEigh()

    def clamped(self, smallest: float = 0.0) -> DenseMatrix:
        """Return the matrix with eigenvalues below ``smallest`` raised to it.

        Without such eigenvalues, return the matrix itself.
        """
        values, vectors = self._eigh(self.matrix)
        if bool((values >= smallest).all()):
            return self
        clamped = values.clamp(min=smallest)
        return DenseMatrix(self.space, (vectors * clamped) @ vectors.mT)

    def to_dense(self) -> Tensor:
        """Return a copy of the matrix ``[P, P]``."""
        return self.matrix.clone()

    def _tensor(self) -> Tensor:
        return self.matrix

    def _values(self) -> Tensor:
        return self._eigh(self.matrix)[0]

    def coordinates(self, stack: Stack) -> Tensor:
        """Return ``Q^T v``, ``[k, P]``."""
        return self.space.join(stack) @ self._eigh(self.matrix)[1]

    def _vectors(self, coordinates: Tensor) -> Stack:
        return self.space.split(coordinates @ self._eigh(self.matrix)[1].mT)

    def _multiply(self, stack: Stack) -> Stack:
        return self.space.split(self.space.join(stack) @ self.matrix.mT)

    def _quadratic(self, stack: Stack) -> Tensor:
        rows = self.space.join(stack)
        return (rows @ self.matrix * rows).sum(dim=1)

    def _trace(self) -> Tensor:
        return self.matrix.trace()

    def _squared_norm(self) -> Tensor:
        return self.matrix.square().sum()

    def _diagonal(self) -> Stack:
        return self.space.split(self.matrix.diagonal().unsqueeze(0))

    def _power_matrix(self, exponent: float, damping: float) -> DenseMatrix:
        values, vectors = self._eigh(self.matrix)
        powers = damped_power(values, exponent, damping)
        return DenseMatrix(self.space, (vectors * powers) @ vectors.mT)

    def _sum(self, other: Self) -> Self:
        return type(self)(self.space, self.matrix + other.matrix)

    def _scaled(self, scalar: float) -> Self:
        return type(self)(self.space, self.matrix * scalar)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.space, function(self.matrix))

    def _state(self) -> dict[str, Any]:
        return {"matrix": self.matrix.detach().clone()}

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        shape = (space.size, space.size)
        return Record({"matrix": TensorField(shape, symmetric=True, indefinite=True)})

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        return cls(space, state["matrix"])


class DiagonalMatrix(DiagonalisedMatrix):
    """A diagonal matrix, ``P`` numbers.

    Args:
        entries: The diagonal, as a vector.

    Example:
        >>> import torch
        >>> from ekfac.vectors import ParameterVector
        >>> F = DiagonalMatrix(ParameterVector({"w": torch.tensor([1.0, 3.0])}))
        >>> F.quadratic(torch.tensor([1.0, 2.0]))
        tensor(13.)
    """

    kind = "diagonal"

    def __init__(self, entries: Vector) -> None:
        super().__init__(entries.space)
        self.entries = entries

    def _tensor(self) -> Tensor:
        first = next(iter(self.entries.values()))
        return first.new_empty(0, dtype=self.entries.dtype)

    def _values(self) -> Tensor:
        return self.entries.flat()

    def coordinates(self, stack: Stack) -> Tensor:
        """Return ``Q^T v``, ``[k, P]``."""
        return self.space.join(stack)

    def _vectors(self, coordinates: Tensor) -> Stack:
        return self.space.split(coordinates)

    def _diagonal(self) -> Stack:
        return {name: entry.unsqueeze(0) for name, entry in self.entries.items()}

    def _power_matrix(self, exponent: float, damping: float) -> DiagonalMatrix:
        powers = damped_power(self._values(), exponent, damping)
        return DiagonalMatrix(self.space.vector(powers))

    def _sum(self, other: Self) -> Self:
        return type(self)(self.entries + other.entries)

    def _scaled(self, scalar: float) -> Self:
        return type(self)(self.entries * scalar)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(self.entries.map(function))

    def _state(self) -> dict[str, Any]:
        entries = {
            name: entry.detach().to(self.entries.dtype, copy=True)
            for name, entry in self.entries.items()
        }
        return {"entries": entries}

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        entries = {name: TensorField(tuple(s)) for name, s in space.shapes.items()}
        return Record({"entries": Record(entries, same_dtype=[list(entries)])})

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        return cls(space.vector_type(state["entries"]))
