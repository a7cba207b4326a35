"""Stochastic estimators of a matrix's diagonal."""

from __future__ import annotations

import torch

from ekfac.spectral.operators import (
    SymmetricOperator,
    identity,
    in_full_precision,
    sign_columns,
)
from ekfac.spectral.results import Estimate, within
from ekfac.spectral.trace import LeaveOneOut


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
    if num_products < 2:
        raise ValueError(f"num_products must be at least 2, got {num_products}.")
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
    exactly and each probe estimates the diagonal of the rest. Memory: a handful of
    matrices ``[n, num_products / 2]``.

    Args:
        operator: Symmetric matrix ``[n, n]``.
        num_products: Matrix-vector products, at least 4; an odd one is left unused.
        tolerance: Standard error of a converged estimate, relative in norm.
        generator: Source of the probes.
    """
    if num_products < 4:
        raise ValueError(f"num_products must be at least 4, got {num_products}.")
    n = operator.shape[0]
    if num_products >= n:
        return Estimate.exact((operator @ identity(operator)).diagonal(), n)
    found = LeaveOneOut(operator, num_products // 2, generator)
    # Column i is what leaves the range with probe i, and its product, both [n, m].
    direction = found.basis @ found.missing
    direction_product = found.basis_product @ found.missing
    outside = direction * (found.missing * found.triangle).sum(dim=0)
    samples = (
        (found.basis * found.basis_product).sum(dim=1, keepdim=True)
        - direction * direction_product
        + found.probes * outside
    )
    return Estimate.mean(samples.mT, 2 * samples.shape[1], tolerance)
