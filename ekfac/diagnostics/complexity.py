"""How complex the function is that training has arrived at, by the way it took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.errors import StateMismatchError
from ekfac.estimate import fisher
from ekfac.estimate.data import choose
from ekfac.vectors import ParameterVector


def tangent_trace(
    model: nn.Module, x: Tensor, *, parameters: Iterable[str] | None = None
) -> float:
    """Return ``Tr K = sum_i |J(x_i)|_F^2`` of the tangent kernel.

    From the diagonal of the outputs' metric, ``n`` times its trace: no kernel and no
    Jacobian. With factors whose gradients are those of the outputs (``kind="l2"``) it
    is ``n`` times the sum of EKFAC's scalings; with a loss's gradients it is not.

    Args:
        model: In eval mode meanwhile.
        x: Inputs ``[n, ...]``, one tensor.
        parameters: Names of parameters or layers. Default: what requires a gradient.
    """
    metric = fisher(
        model, [(x, None)], "diagonal", kind="l2", parameters=parameters
    ).trace()
    return len(x) * float(metric)


@dataclass(frozen=True)
class Complexity:
    """A complexity measure along a training run.

    Attributes:
        value: ``C = sum_t |dw_t| |Phi_t|_F`` with ``|Phi_t|_F = sqrt(Tr K_t)``.
        per_example: ``C / n``, comparable between samples of different size.
        path_length: ``sum_t |dw_t|``.
        trace: The last ``Tr K_t``.
        updates: How many updates it is of.
        num_examples: ``n``.
    """

    value: float
    per_example: float
    path_length: float
    trace: float
    updates: int
    num_examples: int

    def __str__(self) -> str:
        return (
            f"C = {self.value:.4g} ({self.per_example:.4g} per example) over "
            f"{self.updates} updates of total length {self.path_length:.4g}"
        )


class ComplexityMeasure:
    """Adds up ``C = sum_t |dw_t|_2 sqrt(Tr K_t)`` while training.

    George 2023, eq. 6.4.11: the learning-flow bound of section 6.4.2 as a heuristic for
    networks, with the updates as they are and the tangent kernel on a sample.

    Args:
        model: The network, before training.
        x: The sample, ``[n, ...]``; part of the training inputs.
        every: Updates between evaluations of the trace. One costs as many backward
            passes as there are outputs; in between the last value is used.
        parameters: Names of parameters or layers. Default: what requires a gradient.

    Raises:
        ValueError: If ``every`` is less than 1.

    Example::

        measure = ComplexityMeasure(model, x[:500])
        for x, y in loader:
            ...
            optimizer.step()
            measure.update()
        print(measure.result())
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        every: int = 10,
        parameters: Iterable[str] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every!r}; it must be >= 1.")
        self.model, self.x, self.every = model, x, every
        self._parameters = choose(model, parameters)
        self._before = self._weights()
        self._trace = self._tangent_trace()
        self._value = self._length = 0.0
        self._updates = 0

    def _weights(self) -> ParameterVector:
        return ParameterVector(self._parameters).detach().clone()

    def _tangent_trace(self) -> float:
        return tangent_trace(self.model, self.x, parameters=self._parameters)

    def update(self) -> None:
        """Take in the update made since the last call; call it after every step."""
        now = self._weights()
        length = float((now - self._before).norm())
        self._value += length * self._trace**0.5
        self._length += length
        self._before = now
        self._updates += 1
        if self._updates % self.every == 0:
            self._trace = self._tangent_trace()

    def result(self) -> Complexity:
        """Return the measure so far."""
        n = len(self.x)
        return Complexity(
            self._value,
            self._value / n,
            self._length,
            self._trace,
            self._updates,
            n,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain tensors and numbers."""
        return {
            "before": dict(self._before),
            "trace": self._trace,
            "value": self._value,
            "length": self._length,
            "updates": self._updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            StateMismatchError: If it is of other parameters.
        """
        self._before.space.require(state["before"], "The saved measure")
        if not all(torch.is_tensor(t) for t in state["before"].values()):
            raise StateMismatchError("The saved measure's weights are not tensors.")
        saved = {n: state["before"][n].to(t) for n, t in self._before.items()}
        self._before = ParameterVector(saved).clone()
        self._trace, self._value = float(state["trace"]), float(state["value"])
        self._length, self._updates = float(state["length"]), int(state["updates"])
