"""Adaptive damping by the reduction ratio."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac.curvature.distributed import Ranks
from ekfac.errors import CaptureError
from ekfac.layers.base import whole
from ekfac.optim.distributed import gathered
from ekfac.optim.optimizer import KroneckerOptimizer
from ekfac.optim.update import parameters_of
from ekfac.state_schema import Number, Sealed

STATE = Sealed({"steps": Number(int, 0)})


@dataclass(frozen=True)
class Reduction:
    """How well the quadratic model predicted a step.

    Attributes:
        ratio: ``actual / predicted``; near 1 if the model is good, minus infinity if
            it predicts no decrease.
        actual: Change of the loss on the batch.
        predicted: Change of the quadratic model.
        damping: The damping from now on, of the first param group.
    """

    ratio: float
    actual: float
    predicted: float
    damping: float


class LevenbergMarquardt:
    r"""Adapts ``damping`` to how far the quadratic model can be trusted.

    The rule is that of Martens & Grosse 2015, section 6.5. Every ``interval`` steps the
    change of the loss that the step brought is compared, on the step's own batch, with
    the change of

    .. math:: M(\delta) = \nabla L^T \delta + \tfrac12 \delta^T (F + \lambda I) \delta

    where :math:`\delta` is the whole update, momentum and weight decay included, and
    :math:`F` the exact generalised Gauss-Newton matrix of the loss, not its Kronecker
    approximation. A ratio below ``lower`` raises the damping, one above ``upper``
    lowers it, by the factor ``decay ** interval``.

    On several ranks every rank has one, calls :meth:`step` as often as the others, and
    passes a closure that returns the loss of its own share; the changes are those of
    all ranks' loss, so all have one damping. An adaptation gathers sharded parameters,
    all at once and in their own precision: every rank then holds the whole model.

    It is meant for the textbook step, ``direction="natural"`` and ``grafting=None``:
    with another the damping does not set the length of the step.

    Example::

        adaptation = LevenbergMarquardt(optimizer)
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            adaptation.step(lambda: criterion(model(x), y))

    Args:
        optimizer: A KFAC or EKFAC.
        interval: Steps between adaptations. One costs two more evaluations of the loss
            and about three backward passes.
        decay: Change of the damping per step.
        lower: Ratio below which the damping rises.
        upper: Ratio above which it falls.
        minimum: Smallest damping, above 0: a damping of 0 could not rise.
        maximum: Largest damping.

    Raises:
        ValueError: For values out of range or different on the ranks.
    """

    def __init__(
        self,
        optimizer: KroneckerOptimizer,
        *,
        interval: int = 5,
        decay: float = 19 / 20,
        lower: float = 0.25,
        upper: float = 0.75,
        minimum: float = 1e-8,
        maximum: float = 1e8,
    ) -> None:
        if interval < 1:
            raise ValueError(f"Invalid interval: {interval!r}; it must be >= 1.")
        if not 0 < decay < 1:
            raise ValueError(f"Invalid decay: {decay!r}; it must be in (0, 1).")
        if not lower < upper:
            raise ValueError(f"Invalid thresholds: {lower=} must be below {upper=}.")
        if not 0 < minimum <= maximum:
            raise ValueError(
                f"Invalid bounds: {minimum=} must be above 0, and at most {maximum=}."
            )
        _check_ranks(optimizer, (interval, decay, lower, upper, minimum, maximum))
        self.optimizer = optimizer
        self.interval, self.factor = interval, decay**interval
        self.lower, self.upper = lower, upper
        self.minimum, self.maximum = minimum, maximum
        self.steps = 0
        self.last: Reduction | None = None
        self._before: list[Tensor] | None = None
        self._handle = optimizer.register_step_pre_hook(self._remember)

    def _parameters(self) -> list[Tensor]:
        every = parameters_of(self.optimizer.param_groups)
        return [p for p in every if p.requires_grad]

    def _remember(self, *unused: Any) -> None:
        """Copy the parameters before a step that will be judged."""
        if (self.steps + 1) % self.interval == 0:
            self._before = [p.detach().clone() for p in self._parameters()]

    def step(self, closure: Callable[[], Tensor]) -> Reduction | None:
        """Judge the optimizer's last step if it is due, and adapt the damping.

        Args:
            closure: Returns the loss of the batch that the step was made with, as a
                tensor, without calling ``backward``.

        Returns:
            The reduction, or ``None`` if no adaptation was due.

        Raises:
            CaptureError: If the closure does not call the model.
        """
        self.steps += 1
        before, self._before = self._before, None
        if before is None:
            return None
        ranks = self.optimizer.ranks
        if ranks is None:
            linear, damped, actual = self._changes(closure, before)
        else:
            with ranks.failures.reported():
                own = self._changes(closure, before)
                linear, damped, actual = self._summed(ranks, own)
        predicted = linear + damped
        good = predicted < 0
        ratio = actual / predicted if good else float("-inf")
        change = 1.0
        if not ratio >= self.lower:  # NaN too
            change = 1 / self.factor
        elif ratio > self.upper:
            change = self.factor
        for group in self.optimizer.param_groups:
            damping = group["damping"] * change
            group["damping"] = min(max(damping, self.minimum), self.maximum)
        damping = self.optimizer.param_groups[0]["damping"]
        self.last = Reduction(ratio, actual, predicted, damping)
        return self.last

    def _changes(
        self, closure: Callable[[], Tensor], before: list[Tensor]
    ) -> tuple[float, float, float]:
        """Return the changes of the undamped model, of its damping, and of the loss.

        The damping's is that of the layers that this rank owns.
        """
        with gathered(self.optimizer.model, self._parameters()) as parameters:
            before = [whole(value) for value in before]
            after = [p.detach().clone() for p in parameters]
            steps = [a - b for a, b in zip(after, before, strict=True)]
            with self.optimizer.undisturbed(), torch.no_grad():
                new = float(closure())
            with self.optimizer.undisturbed():
                try:
                    self._set(parameters, before)
                    loss, linear, quadratic = self._model_at(closure, parameters, steps)
                finally:
                    self._set(parameters, after)
        damped = self._damping_term(steps)
        return linear + quadratic / 2, damped / 2, new - loss

    @staticmethod
    def _set(parameters: list[Tensor], values: list[Tensor]) -> None:
        """Overwrite the parameters, and what autocast keeps of the old values."""
        torch._foreach_copy_([p.detach() for p in parameters], values)
        torch.clear_autocast_cache()

    def _model_at(
        self,
        closure: Callable[[], Tensor],
        parameters: list[Tensor],
        steps: list[Tensor],
    ) -> tuple[float, float, float]:
        """Return the loss, and the two terms of its quadratic model at ``steps``."""
        seen: list[Tensor] = []
        capture = self.optimizer.capture
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            capture.outputs = seen.append
            try:
                loss = closure()
            finally:
                capture.outputs = None
            if not seen:
                raise CaptureError(
                    "the closure did not call the optimizer's model, or its output has "
                    "no gradient; return the loss of the model's output, without "
                    "torch.no_grad()."
                )
            terms = quadratic_model(loss, seen[-1], parameters, steps)
        return float(loss.detach()), *terms

    def _summed(
        self, ranks: Ranks, own: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        """Return the changes of the loss of all ranks.

        That is the average of the ranks' losses, or their sum if each is a sum. One
        rank counts the damping of each layer.
        """
        is_sum = self.optimizer.options.loss_reduction == "sum"
        weight = 1.0 if is_sum else 1 / ranks.size
        predicted, damped, actual = own
        values = torch.tensor(
            [predicted * weight, damped, actual * weight],
            dtype=torch.float64,
            device=ranks.device,
        )
        changes = ranks.total(values, "adding up the change of the loss").tolist()
        return changes[0], changes[1], changes[2]

    def _damping_term(self, steps: list[Tensor]) -> float:
        """Return ``sum_l lambda_l |delta_l|^2``, in units of the user's loss."""
        moved = {id(p): step for p, step in zip(self._parameters(), steps, strict=True)}
        term, ranks = 0.0, self.optimizer.ranks
        for layer, damping, share in self.optimizer.dampings():
            if ranks is not None and not ranks.assignment.owns(layer.name):
                continue
            block = layer.block
            for slot, parameter in zip(
                block.adapter.slots(), block.tensors(), strict=True
            ):
                step = moved.get(id(parameter))
                if step is not None:
                    square = float(slot.of(step).square().sum())
                    term += square * float(damping) * share
        return term

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; the damping is in the optimizer's groups."""
        return STATE.write({"steps": self.steps})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or change nothing and raise.

        Raises:
            StateMismatchError: If it is something else.
        """
        STATE.check(state_dict)
        self.steps, self._before = state_dict["steps"], None

    def close(self) -> None:
        """Remove the hook from the optimizer."""
        self._handle.remove()


def _check_ranks(optimizer: KroneckerOptimizer, options: tuple[float, ...]) -> None:
    """Raise on every rank if options differ."""
    ranks = optimizer.ranks
    if ranks is None:
        return
    states = ranks.agree(options)
    for rank, other in enumerate(states):
        if other != states[0]:
            raise ValueError(
                f"Ranks 0 and {rank} construct different LevenbergMarquardts: "
                f"(interval, decay, lower, upper, minimum, maximum) is {states[0]} and "
                f"{other}. Give all ranks the same."
            )


def quadratic_model(
    loss: Tensor, outputs: Tensor, parameters: list[Tensor], steps: list[Tensor]
) -> tuple[float, float]:
    """Return ``grad . delta`` and ``delta^T GGN delta`` of a loss.

    The product with the Jacobian is the derivative of the product with its transpose:
    two backward passes. The Hessian of the loss by the outputs acts on its result.

    Args:
        loss: 0-d, with its graph.
        outputs: What it is computed from.
        parameters: What the outputs are computed from.
        steps: ``delta``, in the parameters' shapes.
    """

    def derivative(
        of: Tensor, by: list[Tensor], weight: Tensor | None, graph: bool
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            of,
            by,
            weight,
            create_graph=graph,
            retain_graph=True,
            materialize_grads=True,
        )

    gradients = derivative(loss, parameters, None, graph=False)
    linear = sum(
        float((g * step).sum()) for g, step in zip(gradients, steps, strict=True)
    )
    probe = torch.zeros_like(outputs, requires_grad=True)
    pulled = derivative(outputs, parameters, probe, graph=True)
    product = sum((g * step).sum() for g, step in zip(pulled, steps, strict=True))
    assert isinstance(product, Tensor)
    moved = derivative(product, [probe], None, graph=False)[0].detach()
    slope = derivative(loss, [outputs], None, graph=True)[0]
    if not slope.requires_grad:  # a loss that is linear in the outputs
        return linear, 0.0
    bent = derivative((slope * moved).sum(), [outputs], None, graph=False)[0]
    return linear, float((bent * moved).sum())
