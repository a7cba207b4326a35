"""The largest stable step of gradient descent, from the largest eigenvalue."""

from __future__ import annotations

from dataclasses import dataclass

from ekfac.diagnostics.spectra import Source, Spectrum, layer_spectra
from ekfac.matrices import BlockDiagonalMatrix


@dataclass(frozen=True)
class StepBound:
    """Where gradient descent on a quadratic loss stops converging.

    Attributes:
        safe: Below, it converges: ``2 / (sum of the blocks' largest eigenvalues)``.
        critical: Above, it diverges: ``2 / (the largest of them)``. The true limit
            ``2 / lambda_max`` lies between the two, and both are equal where the
            whole spectrum is known.
        source: ``"exact"``, or ``"factors"``: then only as good as the factors, which
            underestimate the blocks' largest eigenvalues.
    """

    safe: float
    critical: float
    source: Source


def step_bound(curvature: Spectrum | BlockDiagonalMatrix) -> StepBound:
    """Return the step sizes between which gradient descent turns unstable.

    For the loss whose Hessian the curvature is (Karakida et al. 2020, equation 23);
    between blocks and whole stands ``max_l <= lambda_max <= sum_l``. There is no such
    bound for the cross-entropy over training, whose curvature shrinks.

    Args:
        curvature: The whole spectrum, or a matrix of blocks of layers.
    """
    if isinstance(curvature, Spectrum):
        limit = 2 / curvature.maximum
        return StepBound(limit, limit, curvature.source)
    spectra = list(layer_spectra(curvature).values())
    tops = [found.maximum for found in spectra]
    sources = {found.source for found in spectra}
    source: Source = sources.pop() if len(sources) == 1 else "approximation"
    return StepBound(2 / sum(tops), 2 / max(tops), source)
