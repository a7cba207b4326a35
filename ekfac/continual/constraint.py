"""Updates that keep out of the directions of past tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ekfac.continual.penalty import Penalty
from ekfac.continual.tasks import part
from ekfac.matrices import CurvatureMatrix
from ekfac.vectors import ParameterVector, named_parameters


class UpdateConstraint:
    """Removes the part in conserved directions from every update of an optimizer.

    ``v <- v - strength sum_i (c_i / c_1) (v . e_i) e_i`` (Haink 2023, equation 7.12,
    with unit directions), layer by layer: with ``strength=1`` the part along the
    leading direction goes entirely, those along others by the ratio of their
    curvatures. In terms of a matrix with eigenpairs ``(c_i, e_i)`` that is ``v -
    strength F v / c_1``, for K-FAC and EKFAC a scaling in their eigenbasis. ``v`` is
    the whole change of the parameters, momentum and weight decay included. Several
    matrices of one layer take their parts in turn.

    It hooks the optimizer's ``step``; the optimizer is used as before, through
    schedulers, gradient scalers and frameworks. All other attributes are its own.

    Args:
        optimizer: Any optimizer of the model's parameters.
        memory: A penalty whose tasks give the directions, such as ``QuadraticPenalty
            (model, "singular_directions")``; it need not be added to the loss.
        strength: ``gamma``, between 0 and 1; may be set at any time.

    Raises:
        ValueError: If ``strength`` is not between 0 and 1.
    """

    def __init__(
        self, optimizer: Optimizer, memory: Penalty, strength: float = 1.0
    ) -> None:
        self.optimizer, self.memory = optimizer, memory
        self.strength = strength
        self._before: dict[str, Tensor] = {}
        self._largest: dict[int, tuple[CurvatureMatrix, float]] = {}
        self._handles = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
        ]

    @property
    def strength(self) -> float:
        """The share of the leading direction that is taken away."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        """Set it; ``ValueError`` unless it is between 0 and 1."""
        if not 0 <= value <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {value}.")
        self._strength = float(value)

    def __getattr__(self, name: str) -> Any:
        """Return the optimizer's own attribute."""
        if name.startswith("_") or name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def close(self) -> None:
        """Remove the hooks from the optimizer, as leaving a ``with`` block does."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> UpdateConstraint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _conserved(self) -> dict[str, Tensor]:
        """Return the parameters that the tasks have anchors for."""
        named = named_parameters(self.memory.model)
        names = {name for task in self.memory.tasks for name in task.anchor}
        return {name: p.detach() for name, p in named.items() if name in names}

    def _begin(self, *_: Any) -> None:
        self._before = {}
        if self.strength and self.memory.tasks:
            self._before = {n: p.clone() for n, p in self._conserved().items()}

    @torch.no_grad()
    def _end(self, *_: Any) -> None:
        if not self._before:
            return
        now = self._conserved()
        moves = {name: now[name] - old for name, old in self._before.items()}
        for task in self.memory.tasks:
            task.follow_(now, "The memory")
            for _layer, matrix in task.matrices():
                self._constrain_(moves, matrix)
        for name, old in self._before.items():
            now[name].copy_(old + moves[name])
        self._before = {}

    def _constrain_(self, moves: dict[str, Tensor], matrix: CurvatureMatrix) -> None:
        """Subtract ``strength F v / c_1`` from the moves of one layer."""
        largest = self._top(matrix)
        if largest <= 0:
            return
        inside = ParameterVector(
            {
                name: part(moves[name], shape, name).to(matrix.dtype)
                for name, shape in matrix.space.shapes.items()
            }
        )
        if not any(bool(tensor.any()) for tensor in inside.values()):
            return
        for key, lost in (matrix @ inside).items():
            move = part(moves[key], lost.shape, key)
            move.sub_((lost * (self.strength / largest)).to(move.dtype))

    def _top(self, matrix: CurvatureMatrix) -> float:
        """Return the matrix's largest eigenvalue."""
        cached = self._largest.get(id(matrix))
        if cached is None or cached[0] is not matrix:
            live = {id(m) for task in self.memory.tasks for _, m in task.matrices()}
            self._largest = {k: v for k, v in self._largest.items() if k in live}
            value = float(matrix.top_eigenpairs(1).values[0])
            self._largest[id(matrix)] = cached = (matrix, value)
        return cached[1]
