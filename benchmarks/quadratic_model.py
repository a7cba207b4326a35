"""A model solved in closed form, in the feature-learning and the lazy regime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class QuadraticModel:
    """``f(x) = theta^T x`` with ``theta = 1/2 sum_j w_j^2 v_j``, under gradient flow.

    George 2023, section 5.4: ``v_j`` and ``u_j`` are the singular vectors of the data
    ``X = sum_j sqrt(mu_j) u_j v_j^T``, the loss is ``1/2 |X theta - y|^2``, the flow is
    in ``w``. Every mode moves on its own,

        theta_j' = -2 mu_j theta_j (theta_j - theta*_j)             (C.1.4),

    and in the linearised model ``theta_j' = -2 mu_j theta_j(0) (theta_j - theta*_j)``.
    The published eq. 5.4.6 lacks the 2.

    Attributes:
        mu: Squared singular values ``[r]``, positive.
        projections: ``u_j^T y`` ``[r]``, not negative.
        start: ``theta_j(0)`` ``[r]``, positive.
        u: ``u_j`` in columns, ``[n, r]``.
        v: ``v_j`` in columns, ``[d, r]``.
        rest: ``|y|^2`` outside the span of the data.
    """

    mu: Tensor
    projections: Tensor
    start: Tensor
    u: Tensor
    v: Tensor
    rest: float

    @classmethod
    def of(cls, X: Tensor, y: Tensor, *, sigma: float = 1e-3) -> QuadraticModel:
        """Return the model on data, from ``w = sqrt(sigma) (1, ..., 1)``.

        Args:
            X: ``[n, d]``.
            y: ``[n]``.
            sigma: Positive and small.

        Raises:
            ValueError: If ``sigma`` is not positive.
        """
        if not sigma > 0:
            raise ValueError(f"Invalid sigma: {sigma!r}; it must be > 0.")
        u, roots, vh = torch.linalg.svd(X, full_matrices=False)
        kept = roots > roots[0] * torch.finfo(X.dtype).eps * max(X.shape)
        u, roots, vh = u[:, kept], roots[kept], vh[kept]
        projections = u.mT @ y
        signs = torch.where(projections < 0, -1.0, 1.0).to(X)
        start = torch.full_like(roots, sigma / 2)
        rest = float((y.square().sum() - projections.square().sum()).clamp(min=0))
        mu, projections = roots.square(), projections * signs
        return cls(mu, projections, start, u * signs, vh.mT * signs, rest)

    @property
    def target(self) -> Tensor:
        """``theta*_j`` ``[r]``: where the flow ends."""
        return self.projections / self.mu.sqrt()

    @property
    def speed(self) -> Tensor:
        """``mu_j theta*_j`` ``[r]``: the order in which modes are learned."""
        return self.mu.sqrt() * self.projections

    def theta(self, t: Tensor | float) -> Tensor:
        """Return ``theta_j(t)`` ``[*t, r]`` in the feature-learning regime (5.4.5)."""
        t = torch.as_tensor(t, dtype=self.mu.dtype).unsqueeze(-1)
        start, target = self.start, self.target
        decay = torch.exp(-2 * self.speed * t)
        ends = target > 0
        safe = torch.where(ends, start - decay * (start - target), 1.0)
        zero = start / (1 + 2 * self.mu * start * t)
        return torch.where(ends, start * target / safe, zero)

    def theta_linearised(self, t: Tensor | float) -> Tensor:
        """Return ``theta_j(t)`` ``[*t, r]`` in the lazy regime (5.4.6, corrected)."""
        t = torch.as_tensor(t, dtype=self.mu.dtype).unsqueeze(-1)
        decay = torch.exp(-2 * self.mu * self.start * t)
        return self.target + decay * (self.start - self.target)

    def times(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return when each mode is within ``epsilon`` of its target, in both regimes.

        To leading order in ``theta_j(0)`` (eq. 5.4.7 with its constants corrected):
        ``log(theta*^2 / (epsilon theta(0))) / (2 mu theta*)`` and
        ``log(theta* / epsilon) / (2 mu theta(0))``, ``[r]`` each; of modes with a
        target above ``epsilon``, the others' are nan.
        """
        target = self.target
        wanted = target > epsilon
        safe = torch.where(wanted, target, 1.0)
        learned = (safe.square().log() - self.start.log() - log(epsilon)) / (
            2 * self.mu * safe
        )
        lazy = (safe.log() - log(epsilon)) / (2 * self.mu * self.start)
        none = torch.full_like(target, float("nan"))
        return torch.where(wanted, learned, none), torch.where(wanted, lazy, none)

    def outputs(self, theta: Tensor) -> Tensor:
        """Return ``f(x_i)`` ``[..., n]`` of coordinates ``theta_j`` ``[..., r]``."""
        return (theta * self.mu.sqrt()) @ self.u.mT

    def loss(self, theta: Tensor) -> Tensor:
        """Return ``1/2 |X theta - y|^2`` ``[...]`` of coordinates ``[..., r]``."""
        residual = theta * self.mu.sqrt() - self.projections
        return (residual.square().sum(dim=-1) + self.rest) / 2

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the learned share of every mode against the loss; return the axes.

        Full lines are the feature-learning regime, dashed ones the lazy one.
        """
        ax = axes_or_new(ax)
        for method, style in ((self.theta, "-"), (self.theta_linearised, "--")):
            last = self.times(1e-3)[0 if style == "-" else 1].nan_to_num(0).max()
            t = torch.linspace(0, 1, 400, dtype=self.mu.dtype).square() * last * 1.1
            theta = method(t)
            loss = self.loss(theta)
            for j in (self.target > 0).nonzero().flatten().tolist():
                share = theta[:, j] / self.target[j]
                ax.plot(loss, share, style, color=f"C{j % 10}", lw=1)
        ax.invert_xaxis()
        ax.set(xlabel="loss", ylabel="learned share of each mode")
        return ax


def reversed_order(mu: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Return Example 1: data whose modes are learned in opposite order.

    ``x_i = sqrt(mu_i) e_i``, ``y_i = mu_(n-i+1) / sqrt(mu_i)``: feature learning goes
    by ``mu theta*``, which is ``mu`` reversed, the lazy regime by ``mu``.

    Args:
        mu: ``[n]``, positive and descending.

    Returns:
        ``X`` ``[n, n]`` and ``y`` ``[n]``.
    """
    mu = torch.as_tensor(mu)
    return torch.diag(mu.sqrt()), mu.flip(0) / mu.sqrt()


def flipped_labels(y: Tensor, flipped: Tensor, *, eta: float) -> tuple[Tensor, Tensor]:
    """Return Example 2: label noise.

    ``x_i = kappa_i y_i e_1 + eta e_(i+1)`` with ``kappa_i = -1`` for flipped labels.
    The first left singular vector is ``kappa_i y_i / sqrt(n)``, the true labels, on
    which ``y / sqrt(n)`` has the component ``1 - 2 q / n`` (``q`` of ``n`` flipped).

    Args:
        y: Labels of -1 and 1 ``[n]``, the flipped ones included.
        flipped: Which are flipped, boolean ``[n]``.
        eta: Size of the noise that tells examples apart.

    Returns:
        ``X`` ``[n, n + 1]`` and ``y``.
    """
    true = torch.where(flipped, -y, y)
    noise = eta * torch.eye(len(y), dtype=y.dtype)
    return torch.cat([true[:, None], noise], dim=1), y


def spurious_feature(
    y: Tensor, minority: Tensor, *, strength: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Return Example 3: a strong feature that misleads on a minority.

    ``x_i = kappa_i y_i e_1 + strength y_i e_2 + eta e_(i+2)`` with ``kappa_i = -1`` on
    the minority: ``e_1`` is spurious, ``e_2`` is right everywhere but weaker.

    Args:
        y: Labels of -1 and 1 ``[n]``.
        minority: Where the spurious feature is wrong, boolean ``[n]``.
        strength: Of the right feature, in (0, 1).
        eta: Size of the noise that tells examples apart.

    Returns:
        ``X`` ``[n, n + 2]`` and ``y``.

    Raises:
        ValueError: If ``strength`` is not in (0, 1).
    """
    if not 0 < strength < 1:
        raise ValueError(f"Invalid strength: {strength!r}; it must be in (0, 1).")
    wrong = torch.where(minority, -y, y)
    noise = eta * torch.eye(len(y), dtype=y.dtype)
    return torch.cat([wrong[:, None], strength * y[:, None], noise], dim=1), y
