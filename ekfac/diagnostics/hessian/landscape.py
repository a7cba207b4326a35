"""Products with the Hessian of a loss, and the loss around a trained network.

Torch writes the derivative of a convolution's weight gradient as a convolution with a
kernel as large as the image; :class:`FasterConvolutions` uses the kernels of the first
derivatives instead. Losses along directions, and of weights built up from them: Haink
(2023), sections 6.2, 6.3, 6.5, 7.2 and 7.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.estimate.data import (
    Batch,
    Data,
    choose,
    predicted,
    prepared,
    read,
    space_of,
)
from ekfac.estimate.losses import BatchLoss, Loss
from ekfac.estimate.output_hessians import LossHessian, check_finite
from ekfac.estimate.products import (
    back_propagated,
    loss_gradients,
    twice_differentiable,
)
from ekfac.likelihoods import Categorical
from ekfac.progress import shown
from ekfac.spectral.operators import result
from ekfac.vectors import (
    ParameterVector,
    VectorSpace,
    named_parameters,
    standard_normal,
)

_DIMENSIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


@dataclass(frozen=True)
class _Settings:
    """The arguments of a convolution, one number per dimension."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def _arguments(self) -> tuple[Any, ...]:
        """Return what torch's functions take after the tensors."""
        zeros = [0] * len(self.stride)
        return self.stride, self.padding, self.dilation, False, zeros, self.groups

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the convolution."""
        return torch.convolution(x, weight, bias, *self._arguments())

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and weight, those that are wanted."""
        wanted = *self._arguments(), [*needs, False]
        grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *wanted)
        return grads[0] if needs[0] else None, grads[1] if needs[1] else None


class _Convolution(torch.autograd.Function):
    """A convolution that is twice differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return settings.convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = _apply(_Gradients, grad, x, weight, ctx.settings, needs[:2])
        others = [0, *range(2, grad.dim())]
        return *grads, grad.sum(others) if needs[2] else None, None


class _Gradients(torch.autograd.Function):
    """The gradients of a convolution, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        settings: _Settings,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return settings.gradients(grad, x, weight, needs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, input_tangent: Any, weight_tangent: Any) -> Any:
        grad, x, weight = ctx.saved_tensors
        settings, (_, needs_x, needs_weight) = ctx.settings, ctx.needs_input_grad[:3]
        parts, x_grad, weight_grad = [], None, None
        if weight_tangent is not None:
            parts.append(settings.convolve(x, weight_tangent))
            if needs_x:
                x_grad, _ = settings.gradients(grad, x, weight_tangent, (True, False))
        if input_tangent is not None:
            parts.append(settings.convolve(input_tangent, weight))
            if needs_weight:
                _, weight_grad = settings.gradients(
                    grad, input_tangent, weight, (False, True)
                )
        grad_grad = sum(parts[1:], parts[0]) if parts else None
        return grad_grad, x_grad, weight_grad, None, None


class FasterConvolutions(TorchFunctionMode):
    """Inside the context, convolutions are those of this module.

    They give the same numbers and may be differentiated twice. Transposed convolutions
    and padding given as a string are left to torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        n = _DIMENSIONS.get(func)
        if n is None or kwargs or len(args) != 7:
            return func(*args, **kwargs)
        x, weight, bias, stride, padding, dilation, groups = args
        if isinstance(padding, str) or x.dim() != n + 2:
            return func(*args)
        settings = _Settings(
            _numbers(stride, n), _numbers(padding, n), _numbers(dilation, n), groups
        )
        return _apply(_Convolution, x, weight, bias, settings)


def _numbers(value: int | Sequence[int], n: int) -> list[int]:
    """Return one number per dimension."""
    return [value] * n if isinstance(value, int) else list(value)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)


class HessianProducts:
    """The Hessian of a loss at the present parameters, as an operator ``[P, P]``.

    ``ekfac.hessian(...)`` runs forward and backward at every product. Here the gradient
    is taken once and its graph kept, so that a product is one more backward pass
    through it: about two and a half gradient passes in place of more than three. The
    price is memory: the activations of all data and their gradients stay. The products
    are those at the parameters at construction; once parameters have changed, torch
    refuses the next product.

    Args:
        model: Any module; in eval mode while the graph is built.
        data: Iterable of ``(x, y)`` batches.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        parameters: Names of parameters or layers, for a diagonal block. Default: all
            that require a gradient.
        loss_reduction: Whether ``loss_fn`` is a ``"mean"`` or a ``"sum"`` over the
            batch. Default: measured.

    Attributes:
        space: Names and shapes of the vectors.
        num_products: Number of columns multiplied so far.

    Raises:
        ValueError: If the data are empty, not finite or without targets.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        loss_fn: Loss,
        *,
        parameters: Iterable[str] | None = None,
        loss_reduction: str | None = None,
    ) -> None:
        params = choose(model, parameters)
        self.space = space_of(params)
        self.num_products = 0
        self._parameters = list(params.values())
        self._grads: list[list[Tensor]] = []
        self._outputs: list[Tensor] = []
        source = LossHessian(BatchLoss(loss_fn, loss_reduction, coupled=True))
        count = 0.0
        batches = Data(data, self.device)
        with (
            twice_differentiable(model, params),
            FasterConvolutions(),
            batches.batches("graph") as items,
        ):
            for batch in items:
                outputs, batch = predicted(model, batch)
                check_finite(outputs, "The model's outputs", batch)
                self._grads.append(
                    loss_gradients(model, source, outputs, batch, self._parameters)
                )
                self._outputs.append(outputs)
                count += float(source.share(outputs.detach(), batch))
        self._count = count

    @property
    def shape(self) -> torch.Size:
        """``[P, P]``."""
        return torch.Size((self.space.size, self.space.size))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the columns."""
        return reduce(torch.promote_types, (p.dtype for p in self._parameters))

    @property
    def device(self) -> torch.device:
        """Device of the columns."""
        return self._parameters[0].device

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Return the products with columns ``[P, k]``, one after another."""
        self.num_products += columns.shape[1]
        products = []
        for row in columns.detach().mT:
            weights = list(self.space.split(row.unsqueeze(0)).values())
            parts = [
                back_propagated(grads, self._parameters, weights)
                for grads in self._grads
            ]
            products.append(torch.stack(parts).sum(dim=0)[0] / self._count)
        return torch.stack(products, dim=1)

    def gradient(self) -> Tensor:
        """Return the gradient of the loss averaged over the examples, ``[P]``."""
        rows = [torch.cat([g.reshape(-1) for g in grads]) for grads in self._grads]
        return torch.stack(rows).sum(dim=0).detach() / self._count

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """Return ``J^T u`` ``[P]`` of random ``u``, for one backward pass.

        It has no part in the null space of the Gauss-Newton matrix, so less of it lies
        in the bulk of the spectrum than of a random vector: two or three products fewer
        until the outliers have converged (benchmarks/hessian_cost.py).
        """
        gradient = torch.zeros(self.space.size, dtype=self.dtype, device=self.device)
        for outputs in self._outputs:
            noise = standard_normal(
                outputs.shape,
                generator=generator,
                dtype=outputs.dtype,
                device=outputs.device,
            )
            rows = back_propagated([outputs], self._parameters, [noise.unsqueeze(0)])
            gradient += rows[0]
        return gradient


Metric = Callable[[nn.Module], float]


@contextmanager
def with_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give some of the model's parameters other values, inside the context alone.

    Args:
        model: Its parameters have their own values again afterwards.
        values: Name of a parameter -> its value meanwhile, of the same shape.
    """
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


def metric_at(
    model: nn.Module,
    metric: Metric,
    candidates: Iterable[Mapping[str, Tensor]],
    count: int,
    *,
    progress: bool,
) -> Tensor:
    """Return the metric ``[count]`` with parameters replaced by each of ``candidates``.

    With ``progress`` a bar counts them, if tqdm is installed.
    """
    values = []
    for parameters in shown(candidates, "metric", progress=progress, total=count):
        with with_parameters(model, parameters):
            values.append(metric(model))
    return torch.tensor(values, dtype=torch.float64)


def accuracy_of(data: Iterable[Any]) -> Metric:
    """Return a metric: the share of targets whose largest output is at their class.

    Args:
        data: Batches with classes, as for :func:`ekfac.fisher`; targets of -100 do not
            count.
    """
    batches = list(data)

    def measure(model: nn.Module) -> float:
        hits = count = 0
        for outputs, batch in predictions(model, batches):
            kind = Categorical().fitted_to_targets(outputs, batch.targets)
            best = outputs.argmax(dim=kind.dim_of(outputs)).flatten()
            y = batch.targets.flatten()
            hits += int((best == y).sum())
            count += int((y != kind.ignore_index).sum())
        return hits / count

    return measure


def loss_of(data: Iterable[Any], loss_fn: Loss) -> Metric:
    """Return a metric: the loss averaged over the data.

    Args:
        data: Batches with targets, as for :func:`ekfac.hessian`.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
    """
    batches = list(data)
    source = LossHessian(BatchLoss(loss_fn, coupled=True))

    def measure(model: nn.Module) -> float:
        loss_sum = weight = 0.0
        for outputs, batch in predictions(model, batches):
            loss_sum += float(source.total(outputs, batch).detach())
            weight += float(source.share(outputs, batch))
        return loss_sum / weight

    return measure


def predictions(
    model: nn.Module, batches: Sequence[Any]
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield the outputs of batches, without graph, and the targets that fit them."""
    parameters = choose(model, None)
    device = next(iter(parameters.values())).device
    for number, item in enumerate(batches):
        with prepared(model, parameters):
            outputs, batch = predicted(model, read(item, number, device))
        yield outputs.detach().requires_grad_(), batch


@result
class LossProfile:
    """The loss along a direction beside its quadratic prediction.

    Attributes:
        step: Distances along the unit direction, ``[m]``; the weights are at zero.
        value: The loss there, ``[m]``.
        prediction: ``L + slope step + curvature step^2 / 2``, ``[m]``.
        slope: Derivative of the loss along the direction at zero.
        curvature: Second derivative there.
        removed: The step that removes the direction from the weights, ``-w . v``.
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

    def plot(self, ax: Axes | None = None, *, label: str = "loss") -> Axes:
        """Draw both, and the step that removes the direction.

        Args:
            ax: Several profiles fit into one pair of axes. Default: a new one.
            label: What the legend calls the loss.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        known = set(ax.get_legend_handles_labels()[1])
        bottom, top = ax.get_ylim() if known else (math.inf, -math.inf)
        names = [n if n not in known else None for n in ("quadratic", "removed")]
        (line,) = ax.plot(self.step.tolist(), self.value.tolist(), label=label)
        foretold = self.prediction.tolist()
        ax.plot(self.step.tolist(), foretold, "--", color="0.4", label=names[0])
        if self.step.min() <= self.removed <= self.step.max():
            color = line.get_color()
            ax.axvline(self.removed, color=color, lw=0.8, ls=":", label=names[1])
        low, high = float(self.value.min()), float(self.value.max())
        room = 0.1 * (high - low)
        limits = (min(bottom, low - room), max(top, high + room))
        ax.set(xlabel="step", ylabel="loss", ylim=limits)
        ax.legend()
        ax.grid(alpha=0.3)
        return ax


def loss_profile(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    direction: Mapping[str, Tensor],
    steps: Tensor | Sequence[float],
    *,
    progress: bool = False,
) -> LossProfile:
    """Return the loss along a direction (Haink 2023, eqs. 3.6 and 7.6).

    The prediction's slope and curvature are exact, from one gradient and one product
    with the Hessian. Eq. 7.6 counts steps from where the direction is removed; here
    they count from the weights.

    Args:
        model: Any module.
        data: ``(x, y)`` batches.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        direction: Over some or all parameters; scaled to unit norm.
        steps: Where to evaluate, ``[m]``.
        progress: Whether to show a bar, if tqdm is installed.
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
    moved = (weights + unit * s for s in step.tolist())
    values = metric_at(model, measure, moved, len(step), progress=progress)
    base = measure(model)
    return LossProfile(
        step,
        values,
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
    """A metric as a function of what ``label`` names.

    Attributes:
        position: ``[m]``, the values of the variable.
        value: The metric, ``[m]``.
        label: Name of the variable.
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
    *,
    progress: bool = False,
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
        counts: Numbers of directions, each between zero and all.
        progress: Whether to show a bar, if tqdm is installed.

    Raises:
        ValueError: For a count out of that range.
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
    rebuilt = (space.vector(basis[:, :k] @ coordinates[:k]) for k in counts)
    values = metric_at(model, metric, rebuilt, len(counts), progress=progress)
    return Curve(torch.tensor(counts), values, "directions")


def loss_scaling(
    model: nn.Module,
    metric: Metric,
    factors: Sequence[float],
    parameters: Iterable[str] | None = None,
    *,
    progress: bool = False,
) -> Curve:
    """Return a metric with the weights multiplied by a factor (Haink 2023, 6.5).

    Args:
        model: The trained network.
        metric: Of the model.
        factors: Multipliers of the weights, ``[m]``.
        parameters: Names of parameters or layers. Default: all that require a
            gradient.
        progress: Whether to show a bar, if tqdm is installed.
    """
    weights = ParameterVector.from_model(model, choose(model, parameters))
    scaled = (weights * factor for factor in factors)
    values = metric_at(model, metric, scaled, len(factors), progress=progress)
    return Curve(torch.tensor(factors), values, "factor")
