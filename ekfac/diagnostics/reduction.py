"""How well the optimizer's quadratic model foresaw a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ekfac.vectors import ParameterVector, named_parameters


@dataclass(frozen=True)
class StepQuality:
    """How well the optimizer's quadratic model foresaw its last step.

    Attributes:
        ratio: ``actual / predicted``: near 1 where the model is good; nan if no
            decrease was predicted.
        actual: Change of the loss.
        predicted: ``linear + quadratic``.
        linear: ``grad . delta``.
        quadratic: ``1/2 delta^T F delta``.
    """

    ratio: float
    actual: float
    predicted: float
    linear: float
    quadratic: float


def step_quality(
    optimizer: Any,
    closure: Callable[[], Tensor],
    before: Mapping[str, Tensor],
    *,
    examples_per_term: float = 1.0,
) -> StepQuality:
    """Return the reduction ratio of the last step (Martens & Grosse 2015, 6.5).

    With the curvature that the optimizer itself preconditions with, damping left out:
    :class:`ekfac.optim.LevenbergMarquardt` uses the exact Gauss-Newton matrix instead.
    The loss is evaluated twice and differentiated once. The optimizer records nothing
    of it, and random numbers, ``.grad``, buffers and parameters are left as they were.

    Args:
        optimizer: A K-FAC or EKFAC optimizer, after the step.
        closure: Returns the loss on the step's batch, without calling ``backward``.
        before: The parameters before the step, by name.
        examples_per_term: Examples over terms of a mean loss, where they differ: the
            curvature is that of the loss averaged over examples.
    """
    every = named_parameters(optimizer.model)
    named = {name: p for name, p in every.items() if name in before}
    after = {name: p.detach().clone() for name, p in named.items()}
    step = ParameterVector({n: after[n] - before[n].to(after[n]) for n in named})
    scaled = all(layer.s is not None for layer in optimizer.curvature.values())
    structure = "ekfac" if scaled else "kfac"
    F = optimizer.curvature.matrix(structure, parameters=named)
    with _undisturbed(optimizer, named, after):
        with _repeated(named):
            new = float(closure().detach())
        _set_(named, before)
        with _repeated(named):
            loss = closure()
            grads = torch.autograd.grad(
                loss, list(named.values()), materialize_grads=True
            )
    linear = float(ParameterVector(dict(zip(named, grads, strict=True))).dot(step))
    quadratic = float(F.quadratic(step)) / 2 * examples_per_term
    predicted, actual = linear + quadratic, new - float(loss.detach())
    ratio = actual / predicted if predicted < 0 else float("nan")
    return StepQuality(ratio, actual, predicted, linear, quadratic)


@torch.no_grad()
def _set_(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Set parameters."""
    for name, parameter in named.items():
        parameter.copy_(values[name])


def _repeated(named: Mapping[str, Tensor]) -> Any:
    """Return a context whose random numbers leave no trace."""
    devices = {p.device for p in named.values() if p.device.type == "cuda"}
    return torch.random.fork_rng(list(devices))


@contextmanager
def _undisturbed(
    optimizer: Any, named: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> Iterator[None]:
    """Evaluate the model with gradients; parameters end as ``after``."""
    buffers = [(b, b.clone()) for b in optimizer.model.buffers()]
    try:
        with optimizer.capture, torch.enable_grad():
            yield
    finally:
        _set_(named, after)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
