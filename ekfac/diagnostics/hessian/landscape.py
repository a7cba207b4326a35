"""Loss landscapes: along directions, and of weights built up from them.

Sources: Haink (2023), sections 6.2, 6.3, 6.5, 7.2 and 7.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.diagnostics.hessian.hessian_products import HessianProducts
from ekfac.estimate.data import choose
from ekfac.estimate.output_hessians import Loss
from ekfac.spectral.operators import result
from ekfac.vectors import ParameterVector, VectorSpace, named_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Metric = Callable[[nn.Module], float]


@contextmanager
def with_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give some of the model's parameters other values, inside the context alone."""
    parameters = named_parameters(model)
    before = {name: parameters[name].detach().clone() for name in values}
    with torch.no_grad():
        try:
            for name, value in values.items():
                parameters[name].copy_(value)
            yield
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients; leave modes as they were."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def accuracy_of(data: Iterable[Any]) -> Metric:
    """Return a metric: the share of examples whose largest output is at their class.

    Args:
        data: ``(x, y)`` batches, ``y`` ``[N]`` class numbers.
    """
    batches = list(data)

    def measure(model: nn.Module) -> float:
        with evaluating(model):
            hits = [(model(x).argmax(1) == y).sum() for x, y in batches]
        return float(torch.stack(hits).sum()) / sum(len(y) for _, y in batches)

    return measure


def loss_of(data: Iterable[Any], loss_fn: Loss) -> Metric:
    """Return a metric: the mean loss over examples.

    Args:
        data: ``(x, y)`` batches.
        loss_fn: ``(outputs, y) -> loss``, a mean over the batch.
    """
    batches = list(data)

    def measure(model: nn.Module) -> float:
        with evaluating(model):
            total = sum(float(loss_fn(model(x), y)) * len(y) for x, y in batches)
        return total / sum(len(y) for _, y in batches)

    return measure


@result
class LossProfile:
    """The loss along a direction beside its quadratic prediction.

    Attributes:
        step: How far along the unit direction, ``[m]``; zero is where the weights are.
        value: The loss there, ``[m]``.
        prediction: ``L + slope step + curvature step^2 / 2``, ``[m]``.
        slope: Derivative of the loss along the direction at zero.
        curvature: Second derivative there.
        removed: The step at which the direction's share of the weights is gone,
            ``-w . v``.
    """

    step: Tensor
    value: Tensor
    prediction: Tensor
    slope: float
    curvature: float
    removed: float

    def validity(self, tolerance: float = 0.1) -> float:
        """Return the largest ``|step|`` up to which the prediction holds.

        Args:
            tolerance: Largest error relative to the predicted change of the loss.
        """
        change = (self.prediction - self.prediction[self.step.abs().argmin()]).abs()
        good = (self.value - self.prediction).abs() <= tolerance * change + 1e-12
        order = self.step.abs().argsort()
        bad = (~good[order]).nonzero()
        index = int(bad[0]) - 1 if len(bad) else len(order) - 1
        return float(self.step.abs()[order][max(index, 0)])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both, and the step that removes the direction; return the axes."""
        ax = axes_or_new(ax)
        ax.plot(self.step.tolist(), self.value.tolist(), label="loss")
        foretold = self.prediction.tolist()
        ax.plot(self.step.tolist(), foretold, "--", color="0.4", label="quadratic")
        if self.step.min() <= self.removed <= self.step.max():
            ax.axvline(self.removed, color="tab:red", lw=0.8, label="removed")
        low, high = float(self.value.min()), float(self.value.max())
        room = 0.1 * (high - low)
        ax.set(xlabel="step", ylabel="loss", ylim=(low - room, high + room))
        ax.legend()
        ax.grid(alpha=0.3)
        return ax


def loss_profile(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    direction: Mapping[str, Tensor],
    steps: Tensor | Sequence[float],
) -> LossProfile:
    """Return the loss along a direction (Haink 2023, eqs. 3.6 and 7.6).

    The prediction's slope and curvature are exact, from one gradient and one product
    with the Hessian, whatever the direction. Eq. 7.6 counts from where the direction
    is removed; here steps count from the weights.

    Args:
        model: Any module.
        data: ``(x, y)`` batches.
        loss_fn: ``(outputs, y) -> loss``, a mean over the batch.
        direction: Over some or all parameters; scaled to unit norm.
        steps: Where to evaluate.
    """
    batches = list(data)
    names = list(direction)
    unit = ParameterVector.of(direction)
    unit = unit / unit.norm()
    weights = ParameterVector.from_model(model, names)
    H = HessianProducts(model, batches, loss_fn, parameters=names)
    v = H.space.flat(unit).to(H.dtype)
    slope = float(H.gradient() @ v)
    curvature = float(v @ (H @ v.unsqueeze(1)).squeeze(1))
    step = torch.as_tensor(steps, dtype=torch.float64)
    measure = loss_of(batches, loss_fn)
    values = []
    for s in step.tolist():
        with with_parameters(model, weights + unit * s):
            values.append(measure(model))
    base = measure(model)
    return LossProfile(
        step,
        torch.tensor(values, dtype=torch.float64),
        base + slope * step + curvature * step**2 / 2,
        slope,
        curvature,
        -float(weights.dot(unit)),
    )


class Basis(Protocol):
    """Orthonormal directions: eigenvectors or principal components."""

    @property
    def vectors(self) -> Tensor:
        """``[P, k]``."""

    @property
    def space(self) -> VectorSpace:
        """Names and shapes of the parameters."""


@result
class Curve:
    """A metric over something that was varied.

    Attributes:
        position: ``[m]``, what was varied.
        value: The metric, ``[m]``.
        label: What ``position`` is.
    """

    position: Tensor
    value: Tensor
    label: str

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve; return the axes."""
        ax = axes_or_new(ax)
        ax.plot(self.position.tolist(), self.value.tolist(), "o-", ms=3)
        ax.set(xlabel=self.label, ylabel="metric")
        ax.grid(alpha=0.3)
        return ax


def cumulative_reconstruction(
    model: nn.Module,
    directions: Basis,
    metric: Metric,
    counts: Sequence[int],
) -> Curve:
    """Return a metric of the weights rebuilt from the first directions.

    ``w_i = sum_{j <= i} (w . v_j) v_j`` (Haink 2023, eqs. 6.3 and 7.3); parameters
    outside the directions' space keep their values. With no direction the weights are
    zero, with a whole basis they are the trained ones.

    Args:
        model: The trained network.
        directions: :class:`Directions` or :class:`PrincipalComponents`, in the order of
            adding.
        metric: Of the model, see :func:`accuracy_of` and :func:`loss_of`.
        counts: How many directions, each between zero and their number.
    """
    size = directions.vectors.shape[1]
    wrong = [c for c in counts if not 0 <= c <= size]
    if wrong:
        raise ValueError(
            f"counts must be between 0 and the {size} directions, got {wrong}."
        )
    space = directions.space
    w = space.flat(ParameterVector.from_model(model, space.names))
    basis = directions.vectors.to(w)
    coordinates = basis.mT @ w
    values = []
    for count in counts:
        rebuilt = basis[:, :count] @ coordinates[:count]
        with with_parameters(model, space.vector(rebuilt)):
            values.append(metric(model))
    return Curve(
        torch.tensor(counts), torch.tensor(values, dtype=torch.float64), "directions"
    )


def loss_scaling(
    model: nn.Module,
    metric: Metric,
    factors: Sequence[float],
    parameters: Iterable[str] | None = None,
) -> Curve:
    """Return a metric with the weights multiplied by a factor (Haink 2023, 6.5).

    Args:
        model: The trained network.
        metric: Of the model.
        factors: What to multiply with.
        parameters: Names of parameters or layers. Default: all that require a
            gradient.
    """
    weights = ParameterVector.from_model(model, choose(model, parameters))
    values = []
    for factor in factors:
        with with_parameters(model, weights * factor):
            values.append(metric(model))
    return Curve(
        torch.tensor(factors), torch.tensor(values, dtype=torch.float64), "factor"
    )
