"""Penalties of single tasks: anchors, and the curvature around them.

Each is a quadratic form, ``1/2 d^T (sum_i F_i) d`` with ``d`` the displacement from an
anchor. Parameters may have grown since: new entries have no curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.errors import StateMismatchError
from ekfac.matrices import CurvatureMatrix
from ekfac.matrices.base import MatrixField, restored
from ekfac.state_schema import (
    ListOf,
    MapOf,
    Maybe,
    Number,
    Record,
    TensorField,
    check_same_dtype,
)
from ekfac.vectors import ParameterVector, VectorSpace, named_parameters

Tensors = Mapping[str, Tensor]
Blocks = dict[str, list[CurvatureMatrix]]
Roots = Callable[[Iterable[str]], Mapping[str, float]]


@dataclass
class TaskPenalty:
    """A quadratic form around one anchor.

    Attributes:
        anchor: The parameters of the matrices at the end of the task, by name.
        blocks: Matrices by layer, which are summed.
        weight: Weight of the matrices, summed over tasks.
        examples: Examples in the data per unit of weight, ``None`` if unknown.
    """

    anchor: dict[str, Tensor]
    blocks: Blocks
    weight: float = 1.0
    examples: float | None = None

    def matrices(self) -> Iterator[tuple[str, CurvatureMatrix]]:
        """Yield every matrix with its layer's name."""
        for name, matrices in self.blocks.items():
            for matrix in matrices:
                yield name, matrix

    def scale_(self, factor: float) -> None:
        """Multiply every matrix."""
        if factor != 1:
            self.blocks = {
                name: [matrix * factor for matrix in matrices]
                for name, matrices in self.blocks.items()
            }
            self.weight *= factor

    def follow_(self, parameters: Tensors, what: str) -> None:
        """Move everything to the parameters' devices, after :meth:`check`."""
        self.check(parameters, what)
        for matrices in self.blocks.values():
            for i, matrix in enumerate(matrices):
                device = parameters[matrix.space.names[0]].device
                if matrix.device != device:
                    matrices[i] = matrix.to(device=device)
        for name, tensor in self.anchor.items():
            if tensor.device != parameters[name].device:
                self.anchor[name] = tensor.to(parameters[name].device)

    def offset(self, matrix: CurvatureMatrix, parameters: Tensors) -> ParameterVector:
        """Return how far ``parameters`` are from the anchor, in the matrix's space."""
        dtype = matrix.dtype
        return ParameterVector(
            {
                name: part(parameters[name], shape, name).to(dtype)
                - part(self.anchor[name], shape, name).to(dtype)
                for name, shape in matrix.space.shapes.items()
            }
        )

    def product(
        self, matrix: CurvatureMatrix, parameters: Tensors, roots: Roots
    ) -> tuple[ParameterVector, ParameterVector]:
        """Return the displacement ``d`` and :func:`weighed` ``m F m d``."""
        offset = self.offset(matrix, parameters)
        return offset, weighed(matrix, offset, roots)

    def check(self, parameters: Tensors, what: str) -> None:
        """Raise unless the model has all parameters of the task.

        Args:
            parameters: The model's.
            what: Subject of the error's sentence.

        Raises:
            StateMismatchError: With the layers.
        """
        missing = [name for name in self.anchor if name not in parameters]
        if missing:
            raise StateMismatchError(
                f"{what} is about parameters that this model lacks, of layers "
                f"{layers_of(missing)}: {missing[:4]}; use it with the model it was "
                "made for."
            )
        for _, matrix in self.matrices():
            for name, shape in matrix.space.shapes.items():
                part(self.anchor[name], shape, name)
        for name, tensor in self.anchor.items():
            part(parameters[name], tensor.shape, name)

    def state_dict(self) -> dict[str, Any]:
        """Return copies as plain tensors and containers."""
        return {
            "anchor": {name: tensor.clone() for name, tensor in self.anchor.items()},
            "blocks": {
                name: [matrix.state_dict() for matrix in matrices]
                for name, matrices in self.blocks.items()
            },
            "weight": self.weight,
            "examples": self.examples,
        }

    @classmethod
    def schema(cls) -> Record:
        """Return the schema of :meth:`state_dict`."""
        return Record(
            {
                "anchor": MapOf(TensorField()),
                "blocks": MapOf(ListOf(MatrixField())),
                "weight": Number(float, minimum=0),
                "examples": Maybe(Number(float, minimum=0)),
            },
            rules=(_anchored,),
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TaskPenalty:
        """Return the task of a state that :meth:`schema` has checked."""
        blocks = {
            name: [restored(matrix) for matrix in matrices]
            for name, matrices in state["blocks"].items()
        }
        anchor = {name: tensor.clone() for name, tensor in state["anchor"].items()}
        return cls(anchor, blocks, float(state["weight"]), state["examples"])


def _anchored(state: Mapping[str, Any], key: str) -> None:
    """Raise unless the anchor has exactly the parameters of the matrices."""
    used = {
        name
        for matrices in state["blocks"].values()
        for matrix in matrices
        for name in matrix["shapes"]
    }
    for name in used ^ set(state["anchor"]):
        actual = "missing" if name in used else "present, but of no matrix"
        expected = "present" if name in used else "missing"
        raise StateMismatchError.at(f"{key}.anchor.{name}", actual, expected)


def check_precision(tasks: Iterable[TaskPenalty], parameters: Tensors) -> None:
    """Raise unless what is kept of parameters of one type is of one type.

    Raises:
        StateMismatchError: With the first entry of another.
    """
    by_type: dict[Any, dict[str, Tensor]] = {}
    for number, task in enumerate(tasks):
        for name, tensor in task.anchor.items():
            anchors = ("anchor", parameters[name].dtype)
            by_type.setdefault(anchors, {})[f"terms.{number}.anchor.{name}"] = tensor
        for i, (layer, matrix) in enumerate(task.matrices()):
            matrices = (number, matrix.kind, parameters[matrix.space.names[0]].dtype)
            like = torch.empty(0, dtype=matrix.dtype)
            key = f"terms.{number}.blocks.{layer} (matrix {i})"
            by_type.setdefault(matrices, {})[key] = like
    for tensors in by_type.values():
        check_same_dtype(tensors, "")


def part(tensor: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """Return the leading entries of a tensor that may have grown.

    Raises:
        StateMismatchError: If it shrank.
    """
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    if tensor.dim() != len(shape) or any(
        now < then for now, then in zip(tensor.shape, shape, strict=True)
    ):
        raise StateMismatchError(
            f"{name!r} of layer {layers_of([name])[0]!r} is {list(tensor.shape)}, and "
            f"was {list(shape)} when its task was consolidated; a parameter may grow "
            "but not shrink. Use the penalty with the model it was made for."
        )
    return tensor[tuple(slice(0, size) for size in shape)]


def weighed(
    matrix: CurvatureMatrix, vector: ParameterVector, roots: Roots
) -> ParameterVector:
    """Return ``m F m v``; ``roots`` gives ``m`` by name where it is not 1."""
    factors = roots(vector)
    if not factors:
        return matrix @ vector

    def multiplied(tensors: Tensors) -> ParameterVector:
        return ParameterVector({n: t * factors.get(n, 1.0) for n, t in tensors.items()})

    return multiplied(matrix @ multiplied(vector))


def grown(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor with zeros for new entries, in the shape of ``like``."""
    if tensor.shape == like.shape:
        return tensor
    result = tensor.new_zeros(like.shape)
    result[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return result


def add_(sums: dict[str, Tensor], name: str, tensor: Tensor, like: Tensor) -> None:
    """Add ``tensor`` to the leading entries of ``sums[name]``, in ``like``'s shape."""
    tensor = grown(tensor, like).to(like.dtype)
    sums[name] = sums[name] + tensor if name in sums else tensor


def layers_of(names: Iterable[str]) -> list[str]:
    """Return the layers that parameters belong to, without repetition."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def snapshot(matrix: CurvatureMatrix) -> CurvatureMatrix:
    """Return a copy that shares nothing with live factors or the model."""
    return restored(matrix.state_dict())


def check_task(blocks: Mapping[str, CurvatureMatrix], parameters: Tensors) -> None:
    """Raise unless the matrices of a task are finite and fit the parameters.

    Raises:
        StateMismatchError: If they are of another model; with the layer.
        ValueError: If they, or the parameters, which become an anchor, are not finite.
    """
    for name, matrix in blocks.items():
        for key, shape in matrix.space.shapes.items():
            current = parameters.get(key)
            if current is None or current.shape != shape:
                actual = (
                    "it lacks" if current is None else f"is {list(current.shape)} in it"
                )
                raise StateMismatchError(
                    f"The curvature of layer {name!r} is of another model than the "
                    f"penalty's: {key!r} of shape {list(shape)} {actual}."
                )
        if not matrix.is_finite():
            raise ValueError(
                f"The curvature of layer {name!r} is not finite; leave out or repair "
                "the examples that make it so, and consolidate again."
            )
    bad = [n for n, p in parameters.items() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ValueError(
            f"Parameters {bad} are not finite, so they cannot be an anchor; load a "
            "checkpoint from before that."
        )


def present(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters by name, detached, sharing memory."""
    return {name: p.detach() for name, p in named_parameters(model).items()}


def full_space(parameters: Tensors, names: Iterable[str]) -> VectorSpace:
    """Return the space of the parameters called ``names`` as they are now."""
    return VectorSpace({name: parameters[name].shape for name in names})
