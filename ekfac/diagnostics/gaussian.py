"""Expectations of functions of one or two Gaussian variables, by quadrature.

Gauss-Legendre rules on panels whose ends are multiples of 1/4 (or of a finer power of
two): a function with kinks or jumps there, as the common activations have at 0, 1 and
3, is integrated as precisely as a smooth one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]

# Standard deviations on each side; beyond, the density is below 1e-22.
_REACH = 10.0
# Points in a panel, whose width is at most one standard deviation.
_POINTS = 12
# The widest panel.
_PANEL = 0.25
# Correlations above are those of a variable with itself.
_SAME = 1 - 1e-9


def expectation(function: Function, variance: float) -> float:
    """Return ``E[function(u)]`` for ``u`` normal with mean 0.

    Args:
        function: Applied entry by entry in float64.
        variance: Of ``u``, 0 or more.
    """
    points, weights = _rule(variance, math.sqrt(variance))
    return float((weights * function(points)).sum())


def product_expectation(
    function: Function, variance: float, covariance: float
) -> float:
    """Return ``E[function(u) function(v)]`` for two normal variables with mean 0.

    The function ``I_phi`` of Karakida et al. 2020, equation 16: with ``y`` what the
    two have in common, it is the mean over ``y`` of the square of a mean.

    Args:
        function: Applied entry by entry in float64.
        variance: Of ``u`` and of ``v``.
        covariance: Of ``u`` and ``v``, from 0 to ``variance``.

    Raises:
        ValueError: If ``covariance`` is not within that range.
    """
    if not -1e-12 * variance <= covariance <= variance * (1 + 1e-12):
        raise ValueError(
            f"covariance must be between 0 and the variance {variance:g}, got "
            f"{covariance:g}."
        )
    covariance = max(covariance, 0.0)
    if covariance >= variance * _SAME:
        return expectation(lambda u: function(u) ** 2, variance)
    own = math.sqrt(variance - covariance)
    points, weights = _rule(variance, own, density=False)
    values = weights * function(points) / (own * math.sqrt(2 * math.pi))
    finest = own if covariance == 0 else min(own, math.sqrt(covariance))
    shared, shared_weights = _rule(covariance, finest)
    total = 0.0
    for centres, mass in zip(shared.split(128), shared_weights.split(128), strict=True):
        reach = torch.tensor([centres[0] - _REACH * own, centres[-1] + _REACH * own])
        first, last = torch.searchsorted(points, reach.double()).tolist()
        near = points[first:last] - centres.unsqueeze(1)
        means = torch.exp(-0.5 * (near / own) ** 2) @ values[first:last]
        total += float((mass * means**2).sum())
    return total


def derivative(function: Function) -> Function:
    """Return the derivative of a function that is applied entry by entry."""

    def differentiated(points: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = points.detach().clone().requires_grad_()
            outputs = function(inputs)
            if not outputs.requires_grad:
                return torch.zeros_like(points)
            return torch.autograd.grad(outputs.sum(), inputs)[0]

    return differentiated


def _rule(
    variance: float, finest: float, *, density: bool = True
) -> tuple[Tensor, Tensor]:
    """Return points and weights of an integral against a Gaussian.

    Args:
        variance: Of the Gaussian, whose range the points cover.
        finest: Smallest standard deviation that the panels have to resolve.
        density: Whether the weights contain the Gaussian's density.
    """
    if variance == 0:
        return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    deviation = math.sqrt(variance)
    width = min(_PANEL, 2.0 ** math.floor(math.log2(finest)))
    count = math.ceil(_REACH * deviation / width)
    nodes, masses = _legendre(_POINTS)
    starts = width * torch.arange(-count, count, dtype=torch.float64)
    points = (starts.unsqueeze(1) + width * (nodes + 1) / 2).flatten()
    weights = (masses * width / 2).repeat(2 * count)
    if density:
        scale = deviation * math.sqrt(2 * math.pi)
        weights = weights * torch.exp(-0.5 * (points / deviation) ** 2) / scale
    return points, weights


def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Legendre rule on ``[-1, 1]`` (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, 2 * vectors[0] ** 2
