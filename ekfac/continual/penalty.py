"""Penalties around past solutions: value, gradient, proximal step, state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ekfac.continual.merging import Merge, expanded, merge_layer
from ekfac.continual.tasks import (
    Blocks,
    Roots,
    TaskPenalty,
    Tensors,
    add_,
    check_precision,
    check_task,
    full_space,
    layers_of,
    part,
    present,
    weighed,
)
from ekfac.errors import NotReadyError, StateMismatchError, UnsupportedOperationError
from ekfac.matrices import (
    BlockDiagonalMatrix,
    CurvatureMatrix,
    ImplicitMatrix,
    LowRankMatrix,
)
from ekfac.matrices.dense import DiagonalisedMatrix
from ekfac.state_schema import (
    Choice,
    Field,
    ListOf,
    MapOf,
    Number,
    Sealed,
    sealed,
)
from ekfac.vectors import ParameterVector, Vector, named_parameters

Mode = Literal["online", "separate"]
VERSION = 1  # of saved states


class Penalty:
    """A quadratic penalty around the solutions of past tasks.

    ``strength / 2 sum_t (theta - theta_t)^T F_t (theta - theta_t)`` over the tasks
    ``t`` that were consolidated; zero before the first. Calling it returns a scalar
    whose ``backward`` adds the closed-form gradient, ``strength sum_t F_t (theta -
    theta_t)``. Buffers are not penalised, nor are parameters that appear later and the
    new entries of parameters that grow.

    Subclasses decide what ``F_t`` is.

    Args:
        model: The network; wrappers do not show in the names.
        strength: Factor on the whole penalty; may be set at any time.
        mode: ``"separate"`` keeps an anchor ``theta_t`` for each task. ``"online"``
            moves one anchor along (Schwarz et al. 2018): the penalties of earlier tasks
            are taken around the last solution too, as in the Laplace approximation
            (Huszar 2018).
        decay: Factor on the matrices of earlier tasks at each new one.
        merge: How ``"online"`` makes one matrix of several, see
            :func:`ekfac.continual.merge_tasks`; ``"exact"`` keeps them all.
        layer_strengths: Layer or parameter name -> factor on ``strength`` there; the
            longest name counts. May be set at any time.

    Raises:
        ValueError: For another ``mode``, or numbers that are negative or not finite.
        StateMismatchError: If ``layer_strengths`` names what the model lacks.
    """

    structure = "diagonal"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        mode: Mode = "online",
        decay: float = 1.0,
        merge: Merge = "auto",
        layer_strengths: Mapping[str, float] | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}.")
        self.model = model
        self.mode, self.merge = mode, merge
        self.decay = nonnegative("decay", decay)
        self.tasks: list[TaskPenalty] = []
        self._tasks = 0
        self.strength = strength
        self.layer_strengths = layer_strengths or {}

    @property
    def strength(self) -> float:
        """The factor on the whole penalty."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        """Set it; ``ValueError`` unless it is finite and not negative."""
        self._strength = nonnegative("strength", value)

    @property
    def layer_strengths(self) -> dict[str, float]:
        """Layer or parameter name -> factor on the strength there."""
        return dict(self._layer_strengths)

    @layer_strengths.setter
    def layer_strengths(self, values: Mapping[str, float]) -> None:
        """Set them; ``StateMismatchError`` for a name that the model lacks."""
        self._layer_strengths = self._known_strengths(values)

    def _known_strengths(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the strengths as numbers, if the model has what they name."""
        names = list(named_parameters(self.model))
        unknown = [
            key
            for key in values
            if not any(name == key or name.startswith(f"{key}.") for name in names)
        ]
        if unknown:
            raise StateMismatchError(
                f"layer_strengths names {unknown}, which hold no parameter of "
                f"{type(self.model).__name__}; it has layers {layers_of(names)}."
            )
        return {
            key: nonnegative(f"layer_strengths[{key!r}]", v)
            for key, v in values.items()
        }

    @property
    def num_tasks(self) -> int:
        """How many tasks were consolidated."""
        return self._tasks

    # -- value and gradient -----------------------------------------------------------

    def __call__(self) -> Tensor:
        """Return the penalty at the model's parameters, 0-d, to add to the loss.

        Raises:
            StateMismatchError: If the model lacks a penalised parameter, or one shrank.
        """
        parameters = named_parameters(self.model)
        if not torch.is_grad_enabled():
            detached = {name: p.detach() for name, p in parameters.items()}
            return self._value_and_gradients(detached)[0]
        apply: Any = Quadratic.apply  # carries no hints
        value: Tensor = apply(self, list(parameters), *parameters.values())
        return value

    def gradient(self) -> ParameterVector:
        """Return the penalty's gradient, zero where nothing is penalised."""
        parameters = present(self.model)
        grads = self._value_and_gradients(parameters)[1]
        return (
            ParameterVector(
                {n: grads.get(n, torch.zeros_like(p)) for n, p in parameters.items()}
            )
            * self.strength
        )

    def _roots(self, names: Iterable[str]) -> dict[str, float]:
        """Return the roots of the ``layer_strengths`` of parameters that have one."""
        roots = {}
        for name in names:
            keys = [
                key
                for key in self._layer_strengths
                if name == key or name.startswith(f"{key}.")
            ]
            if keys:
                roots[name] = float(self._layer_strengths[max(keys, key=len)]) ** 0.5
        return roots

    @torch.no_grad()
    def _value_and_gradients(
        self, parameters: Tensors
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the value, and the gradients divided by the strength."""
        like = next(iter(parameters.values()))
        dtype = torch.promote_types(like.dtype, torch.float32)
        value = torch.zeros((), dtype=dtype, device=like.device)
        gradients: dict[str, Tensor] = {}
        # Half precision, which autocast would choose, is too coarse for small offsets.
        with torch.autocast(like.device.type, enabled=False):
            for task in self.tasks:
                task.follow_(parameters, "The penalty")
                for _, matrix in task.matrices():
                    offset, product = task.product(matrix, parameters, self._roots)
                    for name, grad in product.items():
                        inner = torch.dot(offset[name].reshape(-1), grad.reshape(-1))
                        value += inner.to(value)
                        add_(gradients, name, grad, parameters[name])
        return value * (self.strength / 2), gradients

    @torch.no_grad()
    def _products(self, parameters: Tensors, vectors: Tensors) -> dict[str, Tensor]:
        """Return the penalty's Hessian over its strength times some vectors."""
        matrices = [matrix for task in self.tasks for _, matrix in task.matrices()]
        return _products(matrices, vectors, parameters, self._roots)

    def _contributed(self, gradients: Tensors) -> None:
        """Note the gradients that a backward pass adds."""

    @torch.no_grad()
    def proximal_(self, lr: float) -> None:
        """Move the parameters by an implicit step on the penalty, in place.

        ``theta <- argmin |theta' - theta|^2 / (2 lr) + penalty(theta')``. Call it after
        ``optimizer.step()`` in place of adding the penalty to the loss. It is stable
        for any strength, where a gradient step needs ``lr strength s < 2`` for every
        eigenvalue ``s``. With one matrix and one anchor it divides by ``1 + lr strength
        s`` in the eigenbasis; for several it solves by conjugate gradients.

        Args:
            lr: The step size.

        Raises:
            ValueError: If ``lr`` is negative or not finite.
            StateMismatchError: If the model lacks a penalised parameter, or one shrank.
        """
        step = nonnegative("lr", lr) * self.strength
        if step == 0 or not self.tasks:
            return
        values = present(self.model)
        for task in self.tasks:
            task.follow_(values, "The penalty")
        for name, move in proximal_moves(self.tasks, values, step, self._roots).items():
            values[name].add_(move)

    # -- tasks ------------------------------------------------------------------------

    def _commit(
        self, blocks: Mapping[str, CurvatureMatrix], weight: float, examples: int | None
    ) -> None:
        """Add the matrices of a task to the penalty, or change nothing and raise."""
        parameters = present(self.model)
        check_task(blocks, parameters)
        per_weight = None if examples is None else examples / weight
        scaled: Blocks = {name: [matrix * weight] for name, matrix in blocks.items()}
        old = self.tasks
        if self.mode == "online" and old:
            scaled, per_weight = self._joined(old[0], scaled, weight, per_weight)
            weight += old[0].weight * self.decay
        names = {
            name
            for matrices in scaled.values()
            for matrix in matrices
            for name in matrix.space.names
        }
        anchor = {n: parameters[n].clone() for n in parameters if n in names}
        task = TaskPenalty(anchor, scaled, weight, per_weight)
        task.check(parameters, "The curvature")
        if self.mode == "online":
            self.tasks = [task]
        else:
            for earlier in old:
                earlier.scale_(self.decay)
            self.tasks = [*old, task]
        self._tasks += 1

    def _joined(
        self, old: TaskPenalty, new: Blocks, weight: float, examples: float | None
    ) -> tuple[Blocks, float | None]:
        """Return the matrices of the tasks so far together with new ones."""
        old.check(present(self.model), "The penalty")
        previous = TaskPenalty(old.anchor, dict(old.blocks), old.weight, old.examples)
        previous.scale_(self.decay)
        joined = dict(previous.blocks)
        for name, (matrix,) in new.items():
            before = joined.get(name, [])
            weights = (previous.weight, weight)
            joined[name] = merge_layer(before, matrix, self.merge, weights)
        if examples is None or previous.examples is None:
            return joined, None
        same_size = abs(examples - previous.examples) <= 1e-6 * examples
        return joined, examples if same_size else None

    def matrix(self) -> BlockDiagonalMatrix:
        """Return ``sum_t F_t``, without the strength, over the trainable parameters.

        The block of a layer that keeps several matrices is implicit.

        Raises:
            NotReadyError: Before anything was consolidated.
            UnsupportedOperationError: If a parameter has grown since.
        """
        return self._matrix(None)

    def _matrix(self, names: Iterable[str] | None) -> BlockDiagonalMatrix:
        """Return the matrix over ``names``, else what is trained, and all penalised."""
        if not self.tasks:
            raise NotReadyError("Nothing was consolidated yet; there is no matrix.")
        parameters = present(self.model)
        groups: Blocks = {}
        for task in self.tasks:
            task.follow_(parameters, "The penalty")
            for key, matrix in task.matrices():
                groups.setdefault(key, []).append(matrix)
        named = named_parameters(self.model)
        used = {n for ms in groups.values() for m in ms for n in m.space.names}
        if names is None:
            names = [n for n, p in named.items() if p.requires_grad]
        inside = used | set(names)
        space = full_space(parameters, [n for n in named if n in inside])
        blocks = {}
        for key, matrices in groups.items():
            summed = _summed(matrices)
            for name, shape in summed.space.shapes.items():
                if shape != space.shapes[name]:
                    raise UnsupportedOperationError(
                        f"{name!r} has grown since the last consolidate(); there is no "
                        "matrix over it until the next."
                    )
            blocks[key] = summed
        return BlockDiagonalMatrix(space, blocks)

    # -- state ------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain tensors and containers, copied.

        It loads with ``torch.load(..., weights_only=True)``.
        """
        return sealed(self._state())

    def _state(self) -> dict[str, Any]:
        """Return what is saved."""
        return {
            "version": VERSION,
            **self._identity(),
            "decay": self.decay,
            "strength": self.strength,
            "layer_strengths": self.layer_strengths,
            "tasks": self._tasks,
            "terms": [task.state_dict() for task in self.tasks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, or change nothing and raise.

        Raises:
            StateMismatchError: If it is of another kind of penalty or another network,
                or damaged; with the layers or entries.
        """
        self._take(state, self._checked(state))

    def _schema(self) -> dict[str, Field]:
        """Return the fields of :meth:`state_dict`."""
        same = {key: Choice(value) for key, value in self._identity().items()}
        number = Number(float, minimum=0)
        return {
            "version": Choice(VERSION),
            **same,
            "decay": number,
            "strength": number,
            "layer_strengths": MapOf(number),
            "tasks": Number(int, minimum=0),
            "terms": ListOf(TaskPenalty.schema()),  # as many as "tasks" says
        }

    def _checked(self, state: Any) -> list[TaskPenalty]:
        """Return the tasks of a state, or raise unless all of it fits this penalty."""
        advice = "Construct the penalty as the saved one was."
        Sealed(self._schema(), advice=advice).check(state)
        count, terms = state["tasks"], len(state["terms"])
        expected = count if self.mode == "separate" else min(count, 1)
        if terms != expected:
            raise StateMismatchError.at("terms", f"a list of {terms}", f"of {expected}")
        self._known_strengths(state["layer_strengths"])
        tasks = [TaskPenalty.from_state(task) for task in state["terms"]]
        parameters = present(self.model)
        for task in tasks:
            task.check(parameters, "The saved penalty")
        check_precision(tasks, parameters)
        return tasks

    def _take(self, state: Mapping[str, Any], tasks: list[TaskPenalty]) -> None:
        """Load a state that was checked."""
        self.layer_strengths = state["layer_strengths"]
        self.strength, self.decay = float(state["strength"]), float(state["decay"])
        self.tasks, self._tasks = tasks, int(state["tasks"])

    def _identity(self) -> dict[str, str]:
        """Return the entries in which a saved state and this penalty must agree."""
        return {
            "class": type(self).__name__,
            "structure": self.structure,
            "mode": self.mode,
        }


def nonnegative(name: str, value: float) -> float:
    """Return ``value``, finite and not negative.

    Raises:
        ValueError: Otherwise.
    """
    if not (value >= 0 and isfinite(value)):
        raise ValueError(f"{name} must be finite and at least 0, got {value}.")
    return float(value)


def _summed(matrices: list[CurvatureMatrix]) -> CurvatureMatrix:
    """Return the sum of a layer's matrices, implicit where their kinds differ."""
    newest = matrices[-1]
    grown = [expanded(m, newest) or m for m in matrices]
    try:
        return sum(grown[1:], start=grown[0])
    except UnsupportedOperationError:
        return sum(grown[1:], start=ImplicitMatrix.of(grown[0]))


class Quadratic(torch.autograd.Function):
    """Value of a penalty with its gradient in closed form; it keeps no graph."""

    @staticmethod
    def forward(ctx: Any, penalty: Penalty, names: list[str], *tensors: Tensor) -> Any:
        """Return the value and keep the gradients."""
        parameters = dict(zip(names, tensors, strict=True))
        value, gradients = penalty._value_and_gradients(parameters)
        ctx.penalty, ctx.strength = penalty, penalty.strength
        ctx.all_names, ctx.names = names, [n for n in names if n in gradients]
        ctx.save_for_backward(*tensors, *(gradients[name] for name in ctx.names))
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Scale the gradients."""
        saved, count = ctx.saved_tensors, len(ctx.all_names)
        derivatives: tuple[Tensor, ...] = saved[count:]
        if torch.is_grad_enabled():  # for a second derivative
            apply: Any = _Gradient.apply
            derivatives = apply(ctx.penalty, ctx.all_names, ctx.names, *saved[:count])
        factor = grad_output * ctx.strength
        grads = {
            name: grad * factor.to(grad)
            for name, grad in zip(ctx.names, derivatives, strict=True)
        }
        ctx.penalty._contributed(grads)
        return None, None, *(grads.get(name) for name in ctx.all_names)


class _Gradient(torch.autograd.Function):
    """Gradient of a penalty as a linear function of the parameters."""

    @staticmethod
    def forward(
        ctx: Any, penalty: Penalty, names: list[str], used: list[str], *tensors: Tensor
    ) -> Any:
        """Return the gradients of the parameters called ``used``."""
        parameters = dict(zip(names, tensors, strict=True))
        ctx.penalty, ctx.names, ctx.kept = penalty, names, used
        ctx.save_for_backward(*tensors)
        gradients = penalty._value_and_gradients(parameters)[1]
        return tuple(gradients[name] for name in used)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        """Multiply by the matrix, which is symmetric."""
        parameters = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        by_name = dict(zip(ctx.kept, vectors, strict=True))
        products = ctx.penalty._products(parameters, by_name)
        return None, None, None, *(products.get(name) for name in ctx.names)


Member = tuple[TaskPenalty, CurvatureMatrix]


def _products(
    matrices: Iterable[CurvatureMatrix], vectors: Tensors, like: Tensors, roots: Roots
) -> dict[str, Tensor]:
    """Return the sum of matrices times vectors, in the shapes of ``like``."""
    sums: dict[str, Tensor] = {}
    for matrix in matrices:
        shapes = matrix.space.shapes.items()
        inside = {n: part(vectors[n], s, n).to(matrix.dtype) for n, s in shapes}
        for name, tensor in weighed(matrix, ParameterVector(inside), roots).items():
            add_(sums, name, tensor, like[name])
    return sums


def proximal_moves(
    tasks: Sequence[TaskPenalty], values: Tensors, step: float, roots: Roots
) -> dict[str, Tensor]:
    """Return the moves of the parameters in an implicit step.

    Args:
        tasks: The penalty's.
        values: Of the parameters, by name.
        step: Learning rate times strength, positive.
        roots: Multipliers by parameter name, see :func:`weighed`.
    """
    layers: dict[str, list[Member]] = {}
    for task in tasks:
        for key, matrix in task.matrices():
            layers.setdefault(key, []).append((task, matrix))
    moves: dict[str, Tensor] = {}
    for members in layers.values():
        names = dict.fromkeys(n for _, matrix in members for n in matrix.space.names)
        root_weights = roots(names)
        factors = {root_weights.get(name, 1.0) ** 2 for name in names}
        if len(members) == 1 and len(factors) == 1:
            move = _in_eigenbasis(members[0], values, step * factors.pop())
        else:
            move = _solved(members, values, step, roots)
        for name, tensor in move.items():
            add_(moves, name, tensor, values[name])
    return moves


def _in_eigenbasis(
    member: Member, values: Tensors, step: float
) -> Mapping[str, Tensor]:
    """Return ``-(F + I / step)^-1 F d``, in the eigenbasis.

    A solve would amplify the rounding of ``F d`` where ``F`` is zero.
    """
    if step == 0:
        return {}
    task, matrix = member
    offset = task.offset(matrix, values)
    if isinstance(matrix, (DiagonalisedMatrix, LowRankMatrix)):
        return matrix.with_spectrum(lambda values: -_shares(values, step), offset)
    return -matrix.solve(matrix @ offset, 1 / step)


def _shares(eigenvalues: Tensor, step: float) -> Tensor:
    """Return ``s / (s + 1 / step)``, zero for rounding errors below zero."""
    s = eigenvalues.clamp(min=0)
    return torch.where(s > 0, s / (s + 1 / step), torch.zeros_like(s))


def _solved(
    members: Sequence[Member], values: Tensors, step: float, roots: Roots
) -> Mapping[str, Tensor]:
    """Return ``-(sum F + I / step)^-1 sum F d``, by conjugate gradients."""
    names = dict.fromkeys(n for _, matrix in members for n in matrix.space.names)
    space = full_space(values, names)
    first = members[0][1]
    like = {n: values[n].to(first.dtype) for n in names}
    gradient: dict[str, Tensor] = {}
    for task, matrix in members:
        for name, grad in task.product(matrix, values, roots)[1].items():
            add_(gradient, name, grad, like[name])

    def multiply(vector: Vector) -> ParameterVector:
        result = _products((matrix for _, matrix in members), vector, like, roots)
        return ParameterVector({name: result[name] for name in names})

    damped = ImplicitMatrix.from_matvec(
        space, multiply, dtype=first.dtype, device=first.device
    )
    return -damped.solve(ParameterVector({n: gradient[n] for n in names}), 1 / step)
