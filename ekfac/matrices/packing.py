"""Packing: the map from a layer's parameters to its matrices ``[b, d_out, d_in]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ekfac.errors import StateMismatchError
from ekfac.matrices.base import CurvatureMatrix, Stack
from ekfac.state_schema import TensorField, entry, joined
from ekfac.vectors import ParameterVector, VectorSpace


class Packing(Protocol):
    """How a layer's parameters fill ``b`` matrices ``[d_out, d_in]``.

    Every entry of the matrices is an entry of the parameters, none of them twice, so
    norms and inner products are the same on both sides. ``unpack`` is zero in
    parameters' entries that the matrices do not hold.
    """

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Qualified names of the layer's parameters."""

    def pack(self, tensors: Mapping[str, Tensor], /) -> Tensor:
        """Return ``[b, d_out, d_in]`` of the parameters by name."""

    def unpack(self, matrix: Tensor, /) -> dict[str, Tensor]:
        """Return the parameters by name of ``[b, d_out, d_in]``."""


class IndexPacking:
    """A packing given by positions, which can be saved.

    Args:
        space: Names and shapes of the layer's parameters.
        positions: ``[b, d_out, d_in]``, integers: the index in the flat parameters of
            every entry.
    """

    def __init__(self, space: VectorSpace, positions: Tensor) -> None:
        self.space = space
        self.positions = positions
        # Most layers are [W | b], for which views are several times faster.
        self._in_order = positions.device.type != "meta" and torch.equal(
            positions.cpu(), self._ordered(positions)
        )

    def _ordered(self, positions: Tensor) -> Tensor:
        """Return the positions of ``[W | b]``, empty if the shapes do not fit it."""
        shapes = list(self.space.shapes.values())
        sizes = [shape.numel() for shape in shapes]
        rows, columns = positions.shape[1], positions.shape[2]
        weight = rows * (columns - len(shapes) + 1)
        if len(positions) > 1 or sizes[0] != weight or sizes[1:] not in ([], [rows]):
            return positions.new_empty(0)
        index = torch.arange(positions.numel())
        parts = [part.view(rows, -1) for part in index.split(sizes)]
        return torch.cat(parts, dim=1).unsqueeze(0).to(positions.dtype)

    @classmethod
    def of(cls, packing: Packing, space: VectorSpace) -> IndexPacking:
        """Return ``packing`` as positions.

        Raises:
            StateMismatchError: If ``packing`` uses an entry twice.
        """
        if isinstance(packing, IndexPacking) and packing.space == space:
            return packing
        positions = packing.pack(space.vector(torch.arange(space.size)))
        if positions.unique().numel() != positions.numel():
            raise StateMismatchError(
                f"pack of {list(packing.parameter_names)} uses an entry twice; it must "
                "be a permutation of the parameters' entries."
            )
        return cls(space, positions)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Qualified names of the layer's parameters."""
        return self.space.names

    def pack(self, tensors: Mapping[str, Tensor], /) -> Tensor:
        """Return ``[b, d_out, d_in]`` of the parameters by name."""
        if self._in_order:
            rows = self.positions.shape[1]
            parts = [tensors[name].reshape(rows, -1) for name in self.space.names]
            return torch.cat(parts, dim=1).unsqueeze(0)
        flat = self.space.flat(tensors)
        return flat[self.positions.to(flat.device)]

    def unpack(self, matrix: Tensor, /) -> dict[str, Tensor]:
        """Return the parameters by name of ``[b, d_out, d_in]``."""
        if self._in_order:
            shapes = self.space.shapes
            rows = matrix.shape[1]
            widths = [shape.numel() // rows for shape in shapes.values()]
            pieces = zip(shapes.items(), matrix[0].split(widths, dim=1), strict=True)
            return {name: part.reshape(shape) for (name, shape), part in pieces}
        flat = matrix.new_zeros(self.space.size)
        index = self.positions.to(matrix.device).flatten()
        return dict(self.space.vector(flat.index_copy(0, index, matrix.flatten())))


@dataclass(frozen=True)
class Positions(TensorField):
    """The positions of an :class:`IndexPacking`, none of them twice."""

    dtype: torch.dtype | None = torch.int64
    minimum: float | None = 0

    def _wrong_values(self, value: Tensor) -> str:
        if value.unique().numel() != value.numel():
            return "that has an entry twice"
        return super()._wrong_values(value)


def packed_shape(
    space: VectorSpace, state: Mapping[str, Any], key: str
) -> tuple[int, int, int]:
    """Check the positions of a state, and return their shape ``(b, d_out, d_in)``."""
    positions = entry(state, key, "positions")
    schema = Positions((None, None, None), maximum=space.size - 1)
    schema.check(positions, joined(key, "positions"))
    b, d_out, d_in = positions.shape
    return b, d_out, d_in


class PackedMatrix(CurvatureMatrix):
    """A matrix over one layer, in the coordinates ``[b, d_out, d_in]``.

    Args:
        packing: How the layer's parameters fill the matrices.
        packed_shape: ``(b, d_out, d_in)``.
        space: The layer's parameters. Default: as ``packing`` unpacks them.
    """

    def __init__(
        self,
        packing: Packing,
        packed_shape: tuple[int, int, int],
        space: VectorSpace | None = None,
    ) -> None:
        if space is None:
            parameters = packing.unpack(torch.empty(packed_shape, device="meta"))
            shapes = {name: parameters[name].shape for name in packing.parameter_names}
            space = VectorSpace(shapes, ParameterVector)
        super().__init__(space)
        self.packing = packing
        self.packed_shape = packed_shape

    @property
    def covered(self) -> int:
        """Number of entries of a vector that the layer's matrices hold."""
        return prod(self.packed_shape)

    def _pack(self, stack: Stack) -> Tensor:
        """Return ``[k, b, d_out, d_in]`` of a stack of ``k`` vectors."""
        names = self.packing.parameter_names
        count = stack[names[0]].shape[0]
        vectors = [{name: stack[name][i] for name in names} for i in range(count)]
        packed = [self.packing.pack(vector) for vector in vectors]
        return torch.stack(packed) if count > 1 else packed[0].unsqueeze(0)

    def _unpack(self, matrices: Tensor) -> Stack:
        """Return the stack of ``[k, b, d_out, d_in]``: the inverse of ``_pack``."""
        parts = [self.packing.unpack(matrix) for matrix in matrices]
        names = self.packing.parameter_names
        if len(parts) == 1:
            return {name: parts[0][name].unsqueeze(0) for name in names}
        return {name: torch.stack([part[name] for part in parts]) for name in names}

    def _project(self, stack: Stack) -> Stack:
        """Return the part of ``stack`` that the layer's matrices hold."""
        if self.covered == self.size:
            return stack
        return self._unpack(self._pack(stack))

    def _positions(self) -> Tensor:
        """Return a copy of the packing's positions, to be saved."""
        return IndexPacking.of(self.packing, self.space).positions.clone()
