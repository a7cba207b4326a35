"""Descent in a quadratic potential: what a drift should look like.

Haink (2023), section 6.4, with its misprints corrected: the rate of a mode is
``eta (h + 2 lambda)`` for a penalty ``lambda |w|^2`` (eq. 6.11 prints ``lambda``, 6.9 a
stray ``1/S``), the window has ``T`` samples (6.12 counts ``T + 1`` in one place), and
modes that relax together covary (6.13 leaves that out).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
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
        """Return what gradient descent does, step by step, ``[steps, k]``.

        The factor per step is ``1 - rate``, of which ``exp(-rate)`` is the limit for
        small learning rates.
        """
        time = torch.arange(steps, dtype=self.rate.dtype)
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

    def plot(self) -> Figure:
        """Return a figure of the modes' distance from their limits."""
        figure: Figure
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        slowest = float(self.rate[self.rate > 0].min())
        time = torch.linspace(0, 3 / slowest, 200, dtype=self.rate.dtype)
        axis.plot(time, (self.path(time) - self.limit).abs())
        axis.set(xlabel="step", ylabel="|distance from limit|", yscale="log")
        axis.set_ylim(bottom=1e-6 * float((self.start - self.limit).abs().max()))
        axis.grid(alpha=0.3)
        return figure


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
        curvature: Eigenvalues of the Hessian without the penalty, ``[k]``; or EKFAC
            scalings.
        start: Coordinates of the weights in the eigenvectors, ``[k]``.
        minimum: Coordinates of the minimum without penalty, ``[k]``.
        lr: Learning rate of the mean loss.
        penalty: ``lambda`` of ``lambda |w|^2``: half of torch's ``weight_decay``.
        momentum: ``beta``; the effective learning rate is ``lr / (1 - beta)`` once
            the velocity has built up (eq. 8.1).
    """
    total = curvature + 2 * penalty
    limit = torch.where(
        total != 0, curvature * minimum / total, torch.zeros_like(total)
    )
    return Relaxation(lr / (1 - momentum) * total, start, limit)


def effective_lr(lr: float, momentum: float, step: int) -> float:
    """Return ``eta (1 - beta^(t+1)) / (1 - beta)``, constant gradients' step (8.1)."""
    return lr * (1 - momentum ** (step + 1)) / (1 - momentum)


def _geometric(rate: Tensor, count: int) -> Tensor:
    """Return ``sum_{t < count} exp(-rate t)``, also for rates near zero."""
    small = rate.abs() * count < 1e-12
    safe = torch.where(small, torch.ones_like(rate), rate)
    found = torch.expm1(-safe * count) / torch.expm1(-safe)
    return torch.where(small, torch.full_like(rate, count), found)
