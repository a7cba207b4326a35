"""Stochastic Lanczos quadrature: spectral densities and log-determinants."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ekfac.spectral.eigensolvers import LanczosProcess
from ekfac.spectral.operators import (
    Estimate,
    SymmetricOperator,
    few_samples,
    in_full_precision,
    result,
    sign_columns,
    watched,
    within,
)

_GRID_POINTS = 1024


@result
class SpectralDensity:
    """A smoothed density of the eigenvalues, of total mass one.

    Attributes:
        grid: ``[g]``, where the density is given.
        value: ``[g]``, the density.
        standard_error: ``[g]``, its standard error over the probes (not the bias of
            smoothing and of finitely many steps).
        converged: Whether the error is within the tolerance asked for.
        nodes: ``[probes, steps]``, the quadrature nodes of every probe.
        weights: ``[probes, steps]``, their weights; every row sums to one.
        size: Number of eigenvalues, ``n``.
        num_products: How many matrix-vector products were spent.
    """

    grid: Tensor
    value: Tensor
    standard_error: Tensor
    converged: bool
    nodes: Tensor
    weights: Tensor
    size: int
    num_products: int

    def trace_of(
        self, function: Callable[[Tensor], Tensor], *, tolerance: float = 1e-2
    ) -> Estimate:
        """Return the sum of ``function`` over the eigenvalues.

        Args:
            function: Applied to the nodes entry by entry.
            tolerance: Relative standard error of a converged estimate.
        """
        samples = self.size * (self.weights * function(self.nodes)).sum(dim=1)
        return Estimate.mean(samples, self.num_products, tolerance)


@in_full_precision
def spectral_density(
    operator: SymmetricOperator,
    *,
    num_probes: int = 10,
    num_steps: int = 50,
    grid: Tensor | None = None,
    width: float | None = None,
    tolerance: float = 0.1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    """Return the density of the eigenvalues (Lin, Saad & Yang 2016, section 3.2).

    For a random unit vector ``v`` the Lanczos process gives the Gauss quadrature of
    the spectral measure ``sum_i (v . v_i)^2 delta(lambda - lambda_i)``, whose mean
    over ``v`` is the density. Every node becomes a Gaussian of standard deviation
    ``width``. Costs ``num_probes * num_steps`` products and ``n * num_steps`` memory.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_probes: Random vectors, at least 2.
        num_steps: Lanczos steps for each.
        grid: Where to evaluate, ``[g]``. Default: 1024 points over the nodes' range.
        width: Smoothing. Default: a hundredth of the nodes' range.
        tolerance: Relative error, in the norm over the grid, of a converged density.
        generator: Source of the probes.
        progress: Whether to show a bar over the products, if tqdm is installed.
    """
    count = num_probes * num_steps
    with watched(operator, count, "Lanczos quadrature", progress=progress) as shown:
        nodes, weights, products = _quadrature(shown, num_probes, num_steps, generator)
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        # A multiple of the identity has no range of its own.
        width = (high - low or abs(high) or 1.0) / 100
    if grid is None:
        grid = torch.linspace(
            low - 4 * width,
            high + 4 * width,
            _GRID_POINTS,
            dtype=nodes.dtype,
            device=nodes.device,
        )
    bumps = torch.exp(-0.5 * ((grid - nodes.unsqueeze(-1)) / width) ** 2)
    bumps = bumps / (width * (2 * torch.pi) ** 0.5)
    samples = (weights.unsqueeze(-1) * bumps).sum(dim=1)
    value, error = samples.mean(dim=0), samples.std(dim=0) / num_probes**0.5
    error = error * few_samples(num_probes)
    return SpectralDensity(
        grid=grid,
        value=value,
        standard_error=error,
        converged=within(error, value, tolerance),
        nodes=nodes,
        weights=weights,
        size=operator.shape[0],
        num_products=products,
    )


@in_full_precision
def log_determinant(
    operator: SymmetricOperator,
    damping: float = 0.0,
    *,
    num_probes: int = 10,
    num_steps: int = 50,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """Return ``log det(F + damping I)`` (Ubaru, Chen & Saad 2017).

    The standard error is that over the probes; the quadrature's own error decays
    geometrically with ``num_steps``, at the rate of conjugate gradients.

    Args:
        operator: Symmetric matrix ``[n, n]``, positive definite once damped.
        damping: Added to every eigenvalue.
        num_probes: Random vectors, at least 2.
        num_steps: Lanczos steps for each.
        tolerance: Relative standard error of a converged estimate.
        generator: Source of the probes.
        progress: Whether to show a bar over the products, if tqdm is installed.

    Raises:
        ValueError: If a damped eigenvalue is found that is not positive.
    """
    count = num_probes * num_steps
    with watched(operator, count, "Lanczos quadrature", progress=progress) as shown:
        nodes, weights, products = _quadrature(shown, num_probes, num_steps, generator)
    lowest = float(nodes.min())
    if lowest + damping <= 0:
        raise ValueError(
            f"The log-determinant needs F + damping I positive definite, got an "
            f"eigenvalue near {lowest:.3g} with {damping=}; pass more damping."
        )
    samples = operator.shape[0] * (weights * torch.log(nodes + damping)).sum(dim=1)
    return Estimate.mean(samples, products, tolerance)


def _quadrature(
    operator: SymmetricOperator,
    num_probes: int,
    num_steps: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, int]:
    """Return nodes and weights ``[num_probes, num_steps]``, and the products spent.

    A probe whose Krylov space is exhausted early has fewer nodes, and its quadrature
    is exact; repeating its last node with no weight fills the row.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes must be at least 2, got {num_probes}.")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    nodes, weights, products = [], [], 0
    for start in sign_columns(operator, num_probes, generator).unbind(dim=1):
        process = LanczosProcess(operator, start, num_steps)
        process.step()
        while not process.finished and not process.broke_down:
            process.step()
        values, vectors = process.ritz()
        missing = num_steps - process.steps
        nodes.append(torch.cat([values, values[-1:].expand(missing)]))
        weights.append(torch.cat([vectors[0] ** 2, values.new_zeros(missing)]))
        products += process.steps
    return torch.stack(nodes), torch.stack(weights), products
