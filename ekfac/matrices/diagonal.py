"""The diagonal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ekfac.matrices.base import DiagonalisedMatrix, Stack
from ekfac.matrices.eigen import damped_power
from ekfac.vectors import Vector, VectorSpace

if TYPE_CHECKING:
    from typing_extensions import Self


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
        return next(iter(self.entries.values()))

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
        return {"entries": {n: e.detach().clone() for n, e in self.entries.items()}}

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        return cls(space.vector_type(state["entries"]))
