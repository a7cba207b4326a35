"""Trajectories of weights: recorder, principal components, drift and relaxation.

Haink (2023), sections 3.2, 6.2 to 6.4 and 7.1, with the misprints of 6.4 corrected: the
rate of a mode is ``eta (h + 2 lambda)`` for a penalty ``lambda |w|^2`` (eq. 6.11 prints
``lambda``, 6.9 a stray ``1/S``), the window has ``T`` samples (6.12 counts ``T + 1`` in
one place), and modes that relax together covary (6.13 lacks these terms).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.spectra import null_space
from ekfac.estimate.data import choose, space_of
from ekfac.spectral.operators import few_samples, result
from ekfac.vectors import VectorSpace


class TrajectoryRecorder:
    """Copies of some of a model's weights, taken while it trains.

    ``record()`` after a step copies the chosen parameters into one row of a buffer that
    is allocated once; updates are differences of rows. It is meant for one layer at
    every step. Record one layer while **all** are trained: training the recorded layer
    alone removes the drift (Haink 2023, 6.2).

    Args:
        model: The network being trained.
        parameters: Names of parameters or layers. Default: all that require a
            gradient.
        capacity: The most rows.
        every: Calls of ``record`` for each row that is taken.
        dtype: Of the buffer. Default: the parameters'. Updates are differences of
            nearly equal numbers, so half precision loses them.
        device: Of the buffer. Default: the parameters'.

    Attributes:
        space: Names and shapes of what is recorded.

    Raises:
        ValueError: If ``capacity`` or ``every`` is below 1.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> recorder = TrajectoryRecorder(model, capacity=3)
        >>> for _ in range(3):
        ...     recorder.record()
        >>> recorder.weights().shape, recorder.updates().shape
        (torch.Size([3, 3]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[str] | None = None,
        *,
        capacity: int = 1000,
        every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if capacity < 1 or every < 1:
            raise ValueError(
                f"capacity and every must be at least 1, got {capacity=}, {every=}."
            )
        self._parameters = choose(model, parameters)
        self.space = space_of(self._parameters)
        self.every, self._calls, self._rows = every, 0, 0
        first = next(iter(self._parameters.values()))
        self._buffer = torch.empty(
            capacity,
            self.space.size,
            dtype=first.dtype if dtype is None else dtype,
            device=first.device if device is None else device,
        )
        # Views of the rows, one per parameter, made once.
        self._views = list(self.space.split(self._buffer).values())

    def __len__(self) -> int:
        return self._rows

    def record(self) -> None:
        """Copy the weights as they are now.

        Raises:
            ValueError: If the buffer is full.
        """
        self._calls += 1
        if (self._calls - 1) % self.every:
            return
        if self._rows == len(self._buffer):
            raise ValueError(
                f"The recorder holds {self._rows} rows, its capacity; construct it "
                "with a larger capacity or with every > 1, or call clear()."
            )
        with torch.no_grad():
            for view, parameter in zip(
                self._views, self._parameters.values(), strict=True
            ):
                view[self._rows].copy_(parameter)
        self._rows += 1

    def clear(self) -> None:
        """Forget all rows."""
        self._calls = self._rows = 0

    def weights(self) -> Tensor:
        """Return the recorded weights ``[T, P]``, a view of the buffer."""
        return self._buffer[: self._rows]

    def updates(self) -> Tensor:
        """Return the differences of successive rows, ``[T - 1, P]``."""
        return self.weights().diff(dim=0)


@result
class PrincipalComponents:
    """Principal components of recorded weights or updates (Haink 2023, eqs. 3.3-3.5).

    Attributes:
        value: Variances along the components, ``[k]``, descending.
        vectors: The components ``[P, k]``, orthonormal columns.
        scores: ``theta_i(t) = w(t) . p_i``, ``[T, k]``, means included.
        mean: Mean of the rows, ``[P]``.
        total: Sum of all variances.
        space: Names and shapes of the parameters.
    """

    value: Tensor
    vectors: Tensor
    scores: Tensor
    mean: Tensor
    total: float
    space: VectorSpace

    def explained(self) -> Tensor:
        """Return the share of all variance in each component, ``[k]``."""
        return self.value / self.total

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the variances by component; return the axes."""
        ax = axes_or_new(ax)
        ax.loglog(range(1, len(self.value) + 1), self.value.tolist(), "o-", ms=3)
        ax.set(xlabel="component", ylabel="variance")
        ax.grid(alpha=0.3)
        return ax


def principal_components(
    rows: Tensor, k: int | None = None, space: VectorSpace | None = None
) -> PrincipalComponents:
    """Return the principal components of rows ``[T, P]``.

    Exact, from the smaller of the two Gram matrices, ``[T, T]`` or ``[P, P]``, in
    double precision, since weights vary by far less than their size.

    Args:
        rows: Recorded weights, or updates.
        k: Number of components. Default: ``min(T - 1, P)``, all that may have variance.
        space: Names and shapes of the parameters. Default: one called ``"weights"``.

    Raises:
        ValueError: If there are fewer than two rows, or ``k`` is too large.
    """
    count, size = rows.shape
    most = min(count - 1, size)
    k = most if k is None else k
    if not 1 <= k <= most:
        raise ValueError(
            f"{count} rows of {size} entries have between 1 and {most} components, got "
            f"{k=}; record more rows."
        )
    rows = rows.double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    if count <= size:
        values, left = torch.linalg.eigh(centred @ centred.mT / count)
        vectors = centred.mT @ left[:, -k:].flip(1)
        # Projections without variance are rounding errors, or zero; a QR makes them
        # orthonormal too.
        vectors, triangle = torch.linalg.qr(vectors)
        vectors = torch.where(triangle.diagonal() < 0, -vectors, vectors)
    else:
        values, right = torch.linalg.eigh(centred.mT @ centred / count)
        vectors = right[:, -k:].flip(1)
    return PrincipalComponents(
        values[-k:].flip(0).clamp_min(0),
        vectors,
        rows @ vectors,
        mean,
        float(centred.square().sum() / count),
        VectorSpace({"weights": (size,)}) if space is None else space,
    )


@result
class Drift:
    """The straight part of a trajectory (Haink 2023, eqs. 6.4 to 6.7).

    Attributes:
        direction: First principal component, in the sense of the motion, ``[P]``.
        value: Speed ``a`` along it per row.
        standard_error: Of ``value``, from the residuals of the linear fit as if they
            were independent. Those of successive steps are not: record with a large
            ``every`` for this number.
        offset: Fitted ``w . p_1`` at the first row.
        determination: R^2 of the fit.
        variance: Variance of the first component.
        predicted_variance: ``a^2 (T^2 - 1) / 12``, that of an exactly linear drift.
        dominance: First variance over the second.
        alignment: Cosine of the direction and the mean weights.
        growth: Change of ``|w . p_1|`` from the first to the last row.
        path: ``w . p_1`` of every row, ``[T]``.
    """

    direction: Tensor
    value: float
    standard_error: float
    offset: float
    determination: float
    variance: float
    predicted_variance: float
    dominance: float
    alignment: float
    growth: float
    path: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the path along the direction and its linear fit; return the axes."""
        ax = axes_or_new(ax)
        fit = self.offset + self.value * torch.arange(len(self.path))
        ax.plot(self.path.tolist(), ".", ms=3, label="weights along the direction")
        ax.plot(fit.tolist(), color="black", lw=1, label="linear fit")
        ax.set(xlabel="row", ylabel="w . p")
        ax.legend()
        ax.grid(alpha=0.3)
        return ax


def drift(rows: Tensor) -> Drift:
    """Return the drift mode of recorded weights ``[T, P]``.

    Raises:
        ValueError: For fewer than three rows.
    """
    count = len(rows)
    if count < 3:
        raise ValueError(f"A drift needs at least 3 rows, got {count}.")
    components = principal_components(rows, min(2, rows.shape[1]))
    theta = components.scores[:, 0]
    direction = components.vectors[:, 0]
    if theta[-1] < theta[0]:
        theta, direction = -theta, -direction
    time = torch.arange(count, dtype=theta.dtype, device=theta.device)
    centred = time - time.mean()
    squares = float(centred.square().sum())
    slope = float(centred @ theta) / squares
    residual = theta - theta.mean() - slope * centred
    variance = float((theta - theta.mean()).square().sum())
    error = float(residual.square().sum())
    second = float(components.value[1]) if len(components.value) > 1 else 0.0
    return Drift(
        direction,
        slope,
        (error / (count - 2) / squares) ** 0.5 * few_samples(count - 1),
        float(theta.mean()) - slope * (count - 1) / 2,
        1 - error / variance if variance else 1.0,
        float(components.value[0]),
        linear_drift_variance(slope, count),
        float(components.value[0]) / second if second > 0 else float("inf"),
        float(direction @ components.mean / components.mean.norm()),
        float(theta[-1].abs() - theta[0].abs()),
        theta,
    )


def linear_drift_variance(speed: float, count: int) -> float:
    """Return ``a^2 (T^2 - 1) / 12``, the variance of ``a t`` at ``t = 0 .. T - 1``."""
    return speed**2 * (count**2 - 1) / 12


@result
class PowerLaw:
    """A fit ``variance ~ curvature^exponent`` (Haink 2023, eq. 3.8).

    Attributes:
        value: The exponent.
        standard_error: Of the exponent, from the residuals of the fit; with Student's
            factor for few directions.
        prefactor: Variance at curvature one.
        curvature: What was fitted, ``[k]``.
        variance: Likewise.
    """

    value: float
    standard_error: float
    prefactor: float
    curvature: Tensor
    variance: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw variances over curvatures, and the fitted law; return the axes."""
        ax = axes_or_new(ax)
        ax.loglog(self.curvature.tolist(), self.variance.tolist(), "o", ms=3)
        law = self.prefactor * self.curvature**self.value
        label = f"exponent {self.value:.2f} ± {self.standard_error:.2f}"
        ax.loglog(self.curvature.tolist(), law.tolist(), color="black", label=label)
        ax.set(xlabel="curvature", ylabel="variance")
        ax.legend()
        return ax


def variance_curvature(rows: Tensor, vectors: Tensor, curvature: Tensor) -> PowerLaw:
    """Return how the variance of a trajectory grows with the curvature.

    Args:
        rows: Recorded weights ``[T, P]``.
        vectors: Directions ``[P, k]``, ``k >= 3``, such as eigenvectors of the Hessian.
        curvature: Curvature along each, ``[k]``; only positive ones outside the null
            space count.

    Raises:
        ValueError: If fewer than three curvatures are positive.
    """
    rows = rows.double()
    variance = ((rows - rows.mean(0)) @ vectors.double()).var(dim=0, correction=0)
    good = (curvature > 0) & (variance > 0) & ~null_space(curvature)
    if int(good.sum()) < 3:
        raise ValueError(
            f"A power law needs at least 3 directions of positive curvature, got "
            f"{int(good.sum())}."
        )
    x, y = curvature[good].double().log(), variance[good].log()
    centred = x - x.mean()
    slope = float(centred @ y / centred.square().sum())
    residual = y - y.mean() - slope * centred
    error = residual.square().sum() / (len(x) - 2) / centred.square().sum()
    return PowerLaw(
        slope,
        float(error.sqrt()) * few_samples(len(x) - 1),
        float((y.mean() - slope * x.mean()).exp()),
        x.exp(),
        y.exp(),
    )


def crossover_curvature(
    lr: float, batch_size: int, num_examples: int, momentum: float = 0.0
) -> float:
    """Return ``3 S (1 - beta) / (eta N)``, beyond which variance is constant.

    Haink (2023), eq. 3.9, after Kuehn & Rosenow.

    Args:
        lr: ``eta``.
        batch_size: ``S``.
        num_examples: ``N``.
        momentum: ``beta``, in [0, 1).
    """
    return 3 * batch_size * (1 - momentum) / (lr * num_examples)


@result
class SubspaceOverlaps:
    """Similarity of the spans of directions at different times.

    Attributes:
        value: ``[m, m]``, the sum of the squared cosines of the principal angles over
            the smaller dimension: one where the smaller span lies in the larger.
    """

    value: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the matrix as an image; return the axes."""
        ax = axes_or_new(ax)
        image = ax.imshow(self.value.tolist(), vmin=0, vmax=1)
        ax.figure.colorbar(image, ax=ax, label="overlap")
        ax.set(xlabel="snapshot", ylabel="snapshot")
        return ax


def subspace_overlaps(snapshots: list[Tensor]) -> SubspaceOverlaps:
    """Return the similarity of the spans of directions at different times.

    Args:
        snapshots: Orthonormal columns ``[P, k_t]`` at ``m`` times.
    """
    value = torch.ones(len(snapshots), len(snapshots), dtype=torch.float64)
    for i, first in enumerate(snapshots):
        for j, second in enumerate(snapshots[:i]):
            energy = (first.double().mT @ second.double()).square().sum()
            share = float(energy) / min(first.shape[1], second.shape[1])
            value[i, j] = value[j, i] = share
    return SubspaceOverlaps(value)


@result
class Relaxation:
    """Exponential relaxation of each mode of a quadratic loss.

    Attributes:
        rate: ``eta (h_i + 2 lambda)`` per step, ``[k]``.
        start: ``w . v_i`` at the beginning, ``[k]``.
        limit: Where the mode relaxes to, ``[k]``: its minimum, pulled towards zero by
            the weight decay.
    """

    rate: Tensor
    start: Tensor
    limit: Tensor

    def path(self, time: Tensor) -> Tensor:
        """Return the modes at times ``[T]``, ``[T, k]`` (eq. 6.11, corrected)."""
        decay = torch.exp(-time[:, None] * self.rate)
        return self.limit + (self.start - self.limit) * decay

    def discrete_path(self, steps: int) -> Tensor:
        """Return the modes at every step of gradient descent, ``[steps, k]``.

        The factor per step is ``1 - rate``; for small rates it tends to ``exp(-rate)``.
        """
        time = torch.arange(steps, dtype=self.rate.dtype, device=self.rate.device)
        return self.limit + (self.start - self.limit) * (1 - self.rate) ** time[:, None]

    def covariance(self, count: int) -> Tensor:
        """Return the modes' covariance over times ``0 .. count - 1``, ``[k, k]``.

        Its diagonal is eq. 6.12, corrected.
        """
        amplitude = self.start - self.limit
        both = self.rate[:, None] + self.rate
        product = _geometric(both, count) / count
        single = _geometric(self.rate, count) / count
        return amplitude[:, None] * amplitude * (product - single[:, None] * single)

    def drift_variance(self, direction: Tensor, count: int) -> Tensor:
        """Return the variance along a direction (eq. 6.13 with its cross terms).

        Args:
            direction: Its coordinates in the modes, ``[k]``.
            count: Number of samples.
        """
        return direction @ self.covariance(count) @ direction

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the modes' distance from their limits; return the axes."""
        ax = axes_or_new(ax)
        slowest = float(self.rate[self.rate > 0].min())
        time = torch.linspace(0, 3 / slowest, 200, dtype=self.rate.dtype)
        ax.plot(time.tolist(), (self.path(time) - self.limit).abs().tolist())
        ax.set(xlabel="step", ylabel="|distance from limit|", yscale="log")
        ax.set_ylim(bottom=1e-6 * float((self.start - self.limit).abs().max()))
        ax.grid(alpha=0.3)
        return ax


def quadratic_relaxation(
    curvature: Tensor,
    start: Tensor,
    minimum: Tensor,
    *,
    lr: float,
    penalty: float = 0.0,
    momentum: float = 0.0,
) -> Relaxation:
    """Return the relaxation of the modes of a quadratic loss under gradient descent.

    Args:
        curvature: Eigenvalues of the Hessian without the penalty, or EKFAC's scalings,
            ``[k]``.
        start: Coordinates of the weights in the eigenvectors, ``[k]``.
        minimum: Coordinates of the minimum without penalty, ``[k]``.
        lr: Learning rate of the mean loss.
        penalty: ``lambda`` of ``lambda |w|^2``: half of torch's ``weight_decay``.
        momentum: ``beta``; the effective learning rate is ``lr / (1 - beta)`` once
            the velocity has built up (:func:`effective_lr`).
    """
    damped = curvature + 2 * penalty
    limit = torch.where(
        damped != 0, curvature * minimum / damped, torch.zeros_like(damped)
    )
    return Relaxation(lr / (1 - momentum) * damped, start, limit)


def effective_lr(lr: float, momentum: float, step: int) -> float:
    """Return ``eta (1 - beta^(t+1)) / (1 - beta)``: the rate of constant gradients.

    Haink (2023), eq. 8.1.

    Args:
        lr: ``eta``.
        momentum: ``beta``, in [0, 1).
        step: ``t``, from 0.
    """
    return lr * (1 - momentum ** (step + 1)) / (1 - momentum)


def _geometric(rate: Tensor, count: int) -> Tensor:
    """Return ``sum_{t < count} exp(-rate t)``, also for rates near zero."""
    small = rate.abs() * count < 1e-12
    safe = torch.where(small, torch.ones_like(rate), rate)
    sum_ = torch.expm1(-safe * count) / torch.expm1(-safe)
    return torch.where(small, torch.full_like(rate, count), sum_)
