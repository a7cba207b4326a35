"""Stochastic estimators: trace, diagonal, density of eigenvalues, log-determinant."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ekfac.spectral.eigensolvers import LanczosProcess
from ekfac.spectral.operators import (
    Estimate,
    SymmetricOperator,
    few_samples,
    identity,
    in_full_precision,
    result,
    sign_columns,
    watched,
    within,
)

# Probes are multiplied in blocks of at most this many columns.
_BLOCK = 16


@in_full_precision
def hutchinson_trace(
    operator: SymmetricOperator,
    num_products: int = 100,
    *,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the mean of ``z^T F z`` over random signs ``z`` (Hutchinson 1989).

    The standard error falls as the square root of ``num_products``, from
    ``sqrt(2) |offdiag F|_F`` for one.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 2.
        tolerance: Relative standard error of a converged estimate.
        generator: Source of the probes.
    """
    samples = [
        (probes * (operator @ probes)).sum(dim=0)
        for probes in _blocks(operator, num_products, generator)
    ]
    return Estimate.mean(torch.cat(samples), num_products, tolerance)


@in_full_precision
def squared_frobenius_norm(
    operator: SymmetricOperator,
    num_products: int = 100,
    *,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the mean of ``|F z|^2`` over random signs ``z``: the trace of ``F^2``.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 2.
        tolerance: Relative standard error of a converged estimate.
        generator: Source of the probes.
    """
    samples = [
        ((operator @ probes) ** 2).sum(dim=0)
        for probes in _blocks(operator, num_products, generator)
    ]
    return Estimate.mean(torch.cat(samples), num_products, tolerance)


@in_full_precision
def hutchpp_trace(
    operator: SymmetricOperator,
    num_products: int = 99,
    *,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the trace by Hutch++ (Meyer, Musco, Musco & Woodruff 2021, Alg. 1).

    A third of the products finds the range of the largest eigenvalues, a third its
    exact trace, and Hutchinson's estimator does the rest on the complement. The error
    falls as ``1 / num_products``; the standard error is that of the last third.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 6.
        tolerance: Relative standard error of a converged estimate.
        generator: Source of the probes.
    """
    _check_products(num_products, 6)
    if num_products >= operator.shape[0]:
        return _exact_trace(operator)
    third = num_products // 3
    sketch = operator @ sign_columns(operator, third, generator)
    basis = torch.linalg.qr(sketch).Q
    captured = (basis * (operator @ basis)).sum()
    probes = sign_columns(operator, num_products - 2 * third, generator)
    probes = probes - basis @ (basis.mT @ probes)
    samples = (probes * (operator @ probes)).sum(dim=0)
    estimate = Estimate.mean(samples, num_products, tolerance)
    value = captured + estimate.value
    converged = within(estimate.standard_error, value, tolerance)
    return Estimate(value, estimate.standard_error, num_products, converged)


@in_full_precision
def xtrace(
    operator: SymmetricOperator,
    num_products: int = 100,
    *,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the trace by XTrace (Epperly, Tropp & Webber 2024, Alg. 1).

    Every probe in turn is the Hutchinson sample of the complement of the range that
    the other probes found; the mean over the probes wastes none of them. Since ``F``
    is symmetric, all of it happens in ``m x m`` matrices, ``m = num_products // 2``.
    The ``m`` samples share their ranges and are not independent, so the standard error
    is the jackknife's, from the estimates with one probe less and the same products: on
    average it is not below the true one (Efron & Stein 1981).

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 4; an odd one is left unused.
        tolerance: Relative standard error of a converged estimate.
        generator: Source of the probes.
    """
    _check_products(num_products, 4)
    if num_products >= operator.shape[0]:
        return _exact_trace(operator)
    ranges = LeaveOneOut(operator, num_products // 2, generator)
    core = ranges.basis.mT @ ranges.basis_product
    value = _trace_samples(ranges, core).mean()
    error = _jackknife(_traces_without_one(ranges, core))
    converged = within(error, value, tolerance)
    return Estimate(value, error, 2 * ranges.count, converged)


def _trace_samples(ranges: LeaveOneOut, core: Tensor) -> Tensor:
    """Return each probe's estimate from the range of the others, ``[m]``.

    The ``core`` is ``Q^T F Q``, ``[m, m]``.
    """
    # Each probe's projection on the range of the others, in the basis, [m, m].
    inside = ranges.basis.mT @ ranges.probes
    inside = inside - ranges.missing * (ranges.missing * inside).sum(dim=0)
    samples: Tensor = (
        core.trace()
        - (ranges.missing * (core @ ranges.missing)).sum(dim=0)
        + (ranges.probes * ranges.sketch).sum(dim=0)
        - 2 * (inside * ranges.triangle).sum(dim=0)
        + (inside * (core @ inside)).sum(dim=0)
    )
    return samples


def _traces_without_one(ranges: LeaveOneOut, core: Tensor) -> Tensor:
    """Return what XTrace makes of all probes but one, ``[m]``.

    That is the mean over ``i`` of the sample of probe ``i`` from the range without
    ``i`` and ``j``. Its complement is spanned by ``s_i`` and ``t = s_j - c s_i``.
    Entries ``[i, j]`` of the matrices below belong to that pair.
    """
    s, first = ranges.missing, ranges.missing.mT
    cosines, inverse = ranges.pairs()
    inside = ranges.basis.mT @ ranges.probes  # w
    s_core_s = first @ core @ s
    s_core = s_core_s.diagonal()[:, None]
    t_core_t = (s_core.mT - 2 * cosines * s_core_s + cosines**2 * s_core) * inverse

    def along(columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``s_i . x_i`` and ``t . x_i`` of columns ``x_i``."""
        products = first @ columns
        own_product = products.diagonal()[:, None]
        return own_product, products.mT - cosines * own_product

    s_w, t_w = along(inside)
    s_r, t_r = along(ranges.triangle)
    s_core_w, t_core_w = along(core @ inside)
    s_core_t = s_core_s - cosines * s_core
    product = (inside * ranges.triangle).sum(dim=0)[:, None]
    product = product - s_w * s_r - t_w * t_r * inverse
    square = (
        (inside * (core @ inside)).sum(dim=0)[:, None]
        - 2 * (s_w * s_core_w + t_w * t_core_w * inverse)
        + s_w**2 * s_core
        + 2 * s_w * t_w * s_core_t * inverse
        + t_w**2 * t_core_t * inverse
    )
    forms = (ranges.probes * ranges.sketch).sum(dim=0)[:, None]
    samples = core.trace() - s_core - t_core_t + forms - 2 * product + square
    # The mean of each column without its diagonal entry.
    means: Tensor = (samples.sum(dim=0) - samples.diagonal()) / (len(samples) - 1)
    return means


def _jackknife(values: Tensor) -> Tensor:
    """Return the standard error from the estimates without one probe, ``[m]`` first."""
    deviations = values - values.mean(dim=0)
    count = len(values)
    variance: Tensor = deviations.square().sum(dim=0) * (count - 1) / count
    return variance.sqrt() * few_samples(count)


class LeaveOneOut:
    """A sketch of the range, and how the range changes without each of its probes.

    Without probe ``i`` the projector ``Q Q^T`` becomes ``Q (I - s_i s_i^T) Q^T``, with
    ``s_i`` the unit vector orthogonal to all columns of the triangle but the i-th
    (Epperly, Tropp & Webber 2024, section 2.2).

    Args:
        operator: Symmetric matrix ``[n, n]``.
        count: Number of probes, ``m``.
        generator: Source of the probes.

    Attributes:
        probes: Random signs, ``[n, m]``.
        sketch: Their products, ``[n, m]``.
        basis: ``Q`` ``[n, m]``, orthonormal, of the range of the sketch.
        basis_product: Products with the basis, ``[n, m]``.
        triangle: ``R`` ``[m, m]`` with ``sketch = Q R``.
        missing: ``s`` ``[m, m]``, one column per probe.
    """

    def __init__(
        self, operator: SymmetricOperator, count: int, generator: torch.Generator | None
    ) -> None:
        self.probes = sign_columns(operator, count, generator)
        self.sketch = operator @ self.probes
        self.basis, self.triangle = torch.linalg.qr(self.sketch)
        self.basis_product = operator @ self.basis
        # An operator of smaller rank leaves zeros on the diagonal; any direction of
        # the surplus basis will then do, and a tiny pivot picks one.
        pivots = self.triangle.diagonal().abs()
        tiny = torch.finfo(pivots.dtype).eps * pivots.max().clamp_min(1e-30)
        lift = torch.where(pivots <= tiny, tiny, torch.zeros_like(pivots))
        invertible = self.triangle + torch.diag(lift)
        eye = torch.eye(count, dtype=pivots.dtype, device=pivots.device)
        inverse = torch.linalg.solve_triangular(invertible, eye, upper=True)
        self.missing = inverse.mT / torch.linalg.vector_norm(inverse, dim=1)

    @property
    def count(self) -> int:
        """Number of probes, ``m``."""
        return self.probes.shape[1]

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return ``c_ij = s_i . s_j`` and ``1 / |s_j - c_ij s_i|^2``, ``[m, m]``.

        Where two directions are the same, of an operator of smaller rank, the inverse
        is zero: there is nothing more to leave out.
        """
        cosines = self.missing.mT @ self.missing
        squares = 1 - cosines**2
        tiny = torch.finfo(squares.dtype).eps ** 0.5
        inverse = torch.where(squares > tiny, 1 / squares, torch.zeros_like(squares))
        return cosines, inverse


def _check_products(num_products: int, least: int) -> None:
    if num_products < least:
        raise ValueError(f"num_products must be at least {least}, got {num_products}.")


def _exact_trace(operator: SymmetricOperator) -> Estimate:
    """Return the trace from all ``n`` products, when they are within the budget."""
    value = (operator @ identity(operator)).trace()
    return Estimate.exact(value, operator.shape[0])


def _blocks(
    operator: SymmetricOperator, count: int, generator: torch.Generator | None
) -> list[Tensor]:
    """Return ``count`` columns of random signs, in blocks."""
    _check_products(count, 2)
    widths = [min(_BLOCK, count - start) for start in range(0, count, _BLOCK)]
    return [sign_columns(operator, width, generator) for width in widths]


@in_full_precision
def hutchinson_diagonal(
    operator: SymmetricOperator,
    num_products: int = 100,
    *,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the mean of ``z * (F z)`` over random signs ``z``.

    Bekas, Kokiopoulou & Saad 2007. One probe at a time, so the memory is a few vectors.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 2.
        tolerance: Standard error of a converged estimate, relative in norm.
        generator: Source of the probes.
    """
    _check_products(num_products, 2)
    # Welford's running mean and sum of squared deviations.
    mean = torch.zeros(operator.shape[0], dtype=operator.dtype, device=operator.device)
    deviation = torch.zeros_like(mean)
    for count in range(1, num_products + 1):
        probe = sign_columns(operator, 1, generator)
        sample = (probe * (operator @ probe)).squeeze(1)
        change = sample - mean
        mean = mean + change / count
        deviation = deviation + change * (sample - mean)
    error = (deviation / (num_products * (num_products - 1))).sqrt()
    error = error * few_samples(num_products)
    return Estimate(mean, error, num_products, within(error, mean, tolerance))


@in_full_precision
def xdiag(
    operator: SymmetricOperator,
    num_products: int = 100,
    *,
    tolerance: float = 1e-2,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return the diagonal by XDiag (Epperly, Tropp & Webber 2024, section 2.4).

    As :func:`ekfac.spectral.xtrace`: what the other probes' range holds is taken
    exactly, each probe estimates the diagonal of the rest, and the standard error is
    the jackknife's. Memory: a handful of matrices ``[n, num_products / 2]``.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 4; an odd one is left unused.
        tolerance: Standard error of a converged estimate, relative in norm.
        generator: Source of the probes.
    """
    _check_products(num_products, 4)
    n = operator.shape[0]
    if num_products >= n:
        return Estimate.exact((operator @ identity(operator)).diagonal(), n)
    ranges = LeaveOneOut(operator, num_products // 2, generator)
    # Column i: what the range loses without probe i, [n, m], and its product.
    direction = ranges.basis @ ranges.missing
    direction_product = ranges.basis_product @ ranges.missing
    slopes = (ranges.missing * ranges.triangle).sum(dim=0)
    range_diagonal = (ranges.basis * ranges.basis_product).sum(dim=1, keepdim=True)
    samples = (
        range_diagonal
        - direction * direction_product
        + ranges.probes * direction * slopes
    )
    value = samples.mean(dim=1)
    # The same without probe j: s_j leaves the range as well, then t = s_i - c s_j.
    cosines, inverse = ranges.pairs()
    without = []
    for j in range(ranges.count):
        others = torch.arange(ranges.count, device=value.device) != j
        c = cosines[others, j]
        remainder = direction[:, others] - c * direction[:, j : j + 1]
        rest_product = direction_product[:, others]
        rest_product = rest_product - c * direction_product[:, j : j + 1]
        drawn = ranges.probes[:, others] * slopes[others] - rest_product
        parts = range_diagonal.squeeze(1) - direction[:, j] * direction_product[:, j]
        without.append(parts + (remainder * drawn * inverse[others, j]).mean(dim=1))
    error = _jackknife(torch.stack(without))
    converged = within(error, value, tolerance)
    return Estimate(value, error, 2 * ranges.count, converged)


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
        # All nodes of a multiple of the identity are equal.
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
