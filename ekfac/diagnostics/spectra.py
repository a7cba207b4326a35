"""Spectra of curvature matrices, their signs, and the step size that they allow.

A :class:`Spectrum` comes from a matrix's own structure or from the exact dual
(:func:`~ekfac.diagnostics.dual`), and says which; an :class:`EstimatedSpectrum` comes
from Lanczos. Kronecker factors underestimate the anisotropy of trained classifiers:
they lack the blocks between layers, and of a layer's block have only the best product.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.errors import UnsupportedOperationError
from ekfac.matrices import BlockDiagonalMatrix, CurvatureMatrix, ImplicitMatrix
from ekfac.spectral import Eigenpairs, Estimate, SpectralDensity, SymmetricOperator
from ekfac.spectral import lanczos as _lanczos
from ekfac.spectral import spectral_density as _spectral_density
from ekfac.spectral.operators import result, watched

Source = Literal["exact", "factors", "approximation", "lanczos"]
# Eigenvalues below so many rounding errors of the largest count as zero.
_ROUNDING = 100.0


def null_space(values: Tensor, cut: float | None = None) -> Tensor:
    """Return a mask ``[k]`` of the eigenvalues that are zero up to rounding.

    Their eigenvectors are the eigensolver's choice among infinitely many.

    Args:
        values: Eigenvalues ``[k]``, the largest among them.
        cut: Largest share of the largest magnitude. Default: the precision to the power
            2/3, 4e-11 in float64 and 2e-5 in float32. With 0 there is no null space.
    """
    share = _default_cut(values.dtype) if cut is None else cut
    if len(values) == 0 or share == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    magnitudes = values.abs()
    return magnitudes <= share * magnitudes.max()


def _default_cut(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps ** (2 / 3))


@result
class Spectrum:
    """The eigenvalues of a matrix.

    Attributes:
        values: ``[r]``, descending. The other ``size - r`` eigenvalues are zero.
        size: Number of eigenvalues.
        source: ``"exact"`` for the eigenvalues of the matrix meant, ``"factors"`` if
            they were read off Kronecker factors, ``"approximation"`` for those of
            another structure that leaves entries out.
    """

    values: Tensor
    size: int
    source: Source

    @property
    def maximum(self) -> float:
        """The largest eigenvalue, the spectral norm of a positive matrix."""
        return float(self.values[0])

    @property
    def trace(self) -> float:
        """The sum."""
        return float(self.values.sum())

    @property
    def mean(self) -> float:
        """The mean, zeros included."""
        return self.trace / self.size

    @property
    def second_moment(self) -> float:
        """The mean square, zeros included."""
        return float(self.values.square().sum()) / self.size

    @property
    def frobenius_norm(self) -> float:
        """The root of the sum of squares."""
        return float(self.values.square().sum().sqrt())

    @property
    def rank(self) -> int:
        """Number of eigenvalues above rounding errors."""
        noise = _ROUNDING * torch.finfo(self.values.dtype).eps
        return int((self.values.abs() > noise * self.values.abs().max()).sum())

    @property
    def effective_rank(self) -> float:
        """``exp(H)`` with ``H`` the entropy of the eigenvalues' shares of the trace.

        From 1 to the rank (Roy & Vetterli 2007).

        Raises:
            ValueError: If an eigenvalue is negative beyond rounding.
        """
        values = self._positive("effective_rank")
        shares = values / values.sum()
        return float(torch.exp(-torch.special.xlogy(shares, shares).sum()))

    def trace_ratio(self, k: int) -> float:
        """Return ``T_k``, the share of the trace in the ``k`` largest eigenvalues.

        Ge 2025, equation 4.22. It depends on the number of examples and outputs: 1
        once ``k`` reaches their product.

        Raises:
            ValueError: If ``k`` is below 1, or an eigenvalue negative beyond rounding.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}.")
        values = self._positive("trace_ratio")
        return float(values[:k].sum() / values.sum())

    def effective_dimension(self, damping: float) -> float:
        """Return ``sum values / (values + damping)``: directions above the damping.

        Raises:
            ValueError: If the damping is not positive, or an eigenvalue negative beyond
                rounding.
        """
        if damping <= 0:
            raise ValueError(f"damping must be positive, got {damping}.")
        values = self._positive("effective_dimension")
        return float((values / (values + damping)).sum())

    def condition(self, damping: float = 0.0) -> float:
        """Return the largest over the smallest eigenvalue, both plus ``damping``.

        Infinite for a zero eigenvalue without damping.

        Raises:
            ValueError: If the damping is negative, or an eigenvalue negative beyond
                rounding.
        """
        if damping < 0:
            raise ValueError(f"damping must be at least 0, got {damping}.")
        values = self._positive("condition")
        complete = self.rank == self.size
        smallest = float(values[-1]) if complete else 0.0
        lowest = smallest + damping
        return (self.maximum + damping) / lowest if lowest > 0 else float("inf")

    def share_below(self, threshold: float) -> float:
        """Return the share of eigenvalues below a number, zeros included."""
        below = int((self.values < threshold).sum())
        return (below + (self.size - len(self.values)) * (threshold > 0)) / self.size

    def without(self, k: int) -> Spectrum:
        """Return the spectrum without its ``k`` largest eigenvalues."""
        return Spectrum(self.values[k:], self.size - k, self.source)

    def _positive(self, operation: str) -> Tensor:
        """Return the values with rounding errors below zero removed."""
        noise = torch.finfo(self.values.dtype).eps * self.size**0.5 * _ROUNDING
        if float(self.values[-1]) < -noise * abs(self.maximum):
            raise ValueError(
                f"{operation} is for matrices without negative eigenvalues, got one of "
                f"{float(self.values[-1]):.3g}; use the Fisher or Gauss-Newton matrix."
            )
        return self.values.clamp(min=0)

    def __str__(self) -> str:
        return (
            f"{self.size} eigenvalues ({self.source}): mean {self.mean:.3g}, second "
            f"moment {self.second_moment:.3g}, maximum {self.maximum:.3g}"
        )

    def plot(self, ax: Axes | None = None, *, label: str | None = None) -> Axes:
        """Draw the eigenvalues above rounding by rank, log-log; return the axes."""
        ax = axes_or_new(ax)
        values = self.values.detach().cpu()[: self.rank]
        positive = values[values > 0]
        ranks = range(1, len(positive) + 1)
        ax.loglog(ranks, positive.tolist(), label=label or self.source, lw=1.5)
        ax.set(xlabel="rank", ylabel="eigenvalue")
        ax.grid(alpha=0.3)
        ax.legend()
        return ax


def spectrum(matrix: CurvatureMatrix) -> Spectrum:
    """Return all eigenvalues of a matrix from its structure.

    Raises:
        UnsupportedOperationError: For an implicit matrix, which has only products.

    Example:
        >>> from ekfac.matrices import DenseMatrix
        >>> from ekfac.vectors import VectorSpace
        >>> F = DenseMatrix(VectorSpace({"w": (2,)}), torch.diag(torch.tensor([3., 1])))
        >>> spectrum(F).trace_ratio(1)
        0.75
    """
    if isinstance(matrix, ImplicitMatrix):
        raise UnsupportedOperationError(
            "An implicit matrix shows its eigenvalues through products alone; use "
            "estimated_spectrum(matrix), ekfac.diagnostics.dual(model, x), or a matrix "
            "of structure='dense' or 'low_rank'."
        )
    return Spectrum(matrix.eigenvalues().flip(0), matrix.size, source_of(matrix))


def layer_spectra(matrix: CurvatureMatrix) -> dict[str, Spectrum]:
    """Return the spectrum of every block of a block-diagonal matrix by layer.

    Raises:
        UnsupportedOperationError: If the matrix has no blocks.
    """
    if not isinstance(matrix, BlockDiagonalMatrix):
        raise UnsupportedOperationError(
            f"A {matrix.structure} matrix has no blocks of layers; use structure="
            "'block_diagonal', 'kfac' or 'ekfac', or dual(model, x).layer_spectra()."
        )
    spectra = {}
    for name, block in matrix.blocks.items():
        block_spectrum = spectrum(block)
        # A dense block is exact for its layer; only what is between layers was dropped.
        exact = block.structure in ("dense", "low_rank")
        source: Source = "exact" if exact else block_spectrum.source
        spectra[name] = Spectrum(block_spectrum.values, block_spectrum.size, source)
    return spectra


def source_of(matrix: CurvatureMatrix) -> Source:
    """Return the source of eigenvalues taken from the structure of a matrix."""
    if matrix.structure in ("dense", "low_rank"):
        return "exact"
    parts = matrix.blocks.values() if isinstance(matrix, BlockDiagonalMatrix) else ()
    kinds = {matrix.structure, *(part.structure for part in parts)}
    return "factors" if kinds & {"kfac", "ekfac"} else "approximation"


@result
class EstimatedSpectrum:
    """A spectrum estimated from matrix-vector products.

    Attributes:
        top: The largest eigenpairs, with residuals.
        density: The density of all eigenvalues, by stochastic Lanczos quadrature.
        size: Number of eigenvalues.
        converged: Whether the pairs have converged and the trace is known within 5 %.
        source: ``"exact"``: an unbiased estimate for the matrix multiplied with.
    """

    top: Eigenpairs
    density: SpectralDensity
    size: int
    converged: bool
    source: Source = "exact"

    @property
    def maximum(self) -> float:
        """The largest eigenvalue."""
        return float(self.top.values[0])

    @property
    def mean(self) -> Estimate:
        """The mean eigenvalue, with its standard error."""
        return self._over(self.density.trace_of(lambda t: t))

    @property
    def second_moment(self) -> Estimate:
        """The mean squared eigenvalue, with its standard error."""
        return self._over(self.density.trace_of(torch.square))

    def trace_ratio(self, k: int) -> Estimate:
        """Return ``T_k``, the share of the trace in the ``k`` largest eigenvalues.

        Raises:
            ValueError: If ``k`` is above the number of pairs that were computed.
        """
        if not 1 <= k <= len(self.top.values):
            raise ValueError(
                f"k must be between 1 and {len(self.top.values)}, the number of "
                f"eigenpairs that were computed, got {k}."
            )
        trace = self.density.trace_of(lambda t: t)
        value = self.top.values[:k].sum() / trace.value
        error = value * trace.standard_error / trace.value
        return Estimate(value, error, trace.num_products, self.converged)

    def effective_dimension(self, damping: float) -> Estimate:
        """Return ``sum values / (values + damping)``, with its standard error.

        Raises:
            ValueError: If the damping is not positive.
        """
        if damping <= 0:
            raise ValueError(f"damping must be positive, got {damping}.")
        return self.density.trace_of(lambda t: t.clamp(min=0) / (t + damping))

    def _over(self, sum_: Estimate) -> Estimate:
        """Return an estimate of a sum as one of the mean."""
        return Estimate(
            sum_.value / self.size,
            sum_.standard_error / self.size,
            sum_.num_products,
            sum_.converged,
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density and the largest eigenvalues; return the axes."""
        ax = axes_or_new(ax)
        grid = self.density.grid.cpu()
        value, error = self.density.value.cpu(), self.density.standard_error.cpu()
        ax.semilogy(grid, value.clamp(min=1e-12), label="density (Lanczos)")
        ax.fill_between(
            grid, (value - error).clamp(min=1e-12), value + error, alpha=0.3, lw=0
        )
        for i, top in enumerate(self.top.values.tolist()):
            label = None if i else "largest eigenvalues"
            ax.axvline(top, color="tab:red", lw=0.8, label=label)
        lowest = float(value[value > 0].min()) if bool((value > 0).any()) else 1e-12
        ax.set(xlabel="eigenvalue", ylabel="density", ylim=(max(lowest, 1e-8), None))
        ax.legend()
        return ax


def estimated_spectrum(
    matrix: SymmetricOperator,
    k: int = 1,
    *,
    num_probes: int = 10,
    num_steps: int = 50,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> EstimatedSpectrum:
    """Return an estimate by Lanczos of the spectrum of a matrix known by products.

    Args:
        matrix: An implicit matrix, or any symmetric operator.
        k: Number of largest eigenpairs.
        num_probes: Random vectors for the density, at least 2.
        num_steps: Lanczos steps for each.
        generator: Source of the vectors.
        progress: Whether to show bars over the products, if tqdm is installed.
    """
    with watched(matrix, 20 * k + 100, "Lanczos", progress=progress) as shown:
        top = _lanczos(shown, k, generator=generator)
    density = _spectral_density(
        matrix,
        num_probes=num_probes,
        num_steps=num_steps,
        generator=generator,
        progress=progress,
    )
    trace = density.trace_of(lambda t: t, tolerance=0.05)
    converged = top.converged and trace.converged
    return EstimatedSpectrum(top, density, matrix.shape[0], converged)


@result
class Inertia:
    """The signs of a symmetric matrix's eigenvalues.

    Attributes:
        negative: Number below ``-tolerance``: directions of descent from a critical
            point.
        zero: Number within the tolerance: the degree of degeneracy (Zhang et al. 2021,
            definition 3).
        positive: Number above the tolerance.
        values: All eigenvalues, ascending.
        tolerance: The largest magnitude of a zero.
        gap: The smallest magnitude of the others over the largest of the zeros;
            infinite where there are none. Counts with a small gap are not to be
            trusted.
        source: Always ``"exact"``: Fisher and Kronecker matrices have no negative
            eigenvalues.
    """

    negative: int
    zero: int
    positive: int
    values: Tensor
    tolerance: float
    gap: float
    source: str = "exact"

    def __str__(self) -> str:
        return (
            f"{self.negative} negative, {self.zero} zero, {self.positive} positive "
            f"(gap {self.gap:.1g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the magnitudes by rank, coloured by sign; return the axes."""
        ax = axes_or_new(ax)
        magnitudes = self.values.abs().clamp(min=1e-20)
        order = magnitudes.argsort(descending=True)
        ranks = torch.arange(1, len(order) + 1)
        values = self.values[order]
        zero = values.abs() <= self.tolerance
        for label, mask, colour in (
            ("positive", ~zero & (values > 0), "tab:blue"),
            ("negative", ~zero & (values < 0), "tab:red"),
            ("zero", zero, "tab:gray"),
        ):
            heights = magnitudes[order][mask].tolist()
            ax.semilogy(
                ranks[mask].tolist(), heights, "o", color=colour, label=label, ms=4
            )
        ax.axhline(self.tolerance, color="black", lw=0.8, ls=":")
        ax.set(xlabel="rank", ylabel="|eigenvalue|")
        ax.legend()
        return ax


def inertia(
    matrix: CurvatureMatrix | Tensor, tolerance: float | None = None
) -> Inertia:
    """Return the inertia of a matrix, from all its eigenvalues.

    Args:
        matrix: A matrix that has them, such as ``ekfac.hessian(..., "dense")``, or a
            symmetric tensor. Take it in float64.
        tolerance: The largest magnitude of a zero. Default: the share of the largest
            magnitude that :func:`null_space` takes.
    """
    # A structure's own eigenvalues lack rounding errors, and with them the gap.
    dense = matrix if isinstance(matrix, Tensor) else matrix.to_dense()
    values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    magnitudes = values.abs()
    if tolerance is None:
        tolerance = float(magnitudes.max()) * _default_cut(values.dtype)
    zeros, others = (
        magnitudes[magnitudes <= tolerance],
        magnitudes[magnitudes > tolerance],
    )
    gap = float("inf")
    if len(zeros) and len(others) and float(zeros.max()) > 0:
        gap = float(others.min() / zeros.max())
    return Inertia(
        negative=int((values < -tolerance).sum()),
        zero=len(zeros),
        positive=int((values > tolerance).sum()),
        values=values,
        tolerance=tolerance,
        gap=gap,
    )


@result
class StepBound:
    """Step sizes at which gradient descent on a quadratic loss turns unstable.

    The limit is ``2 / lambda_max``: below it converges, above it diverges.

    Attributes:
        safe: A proven lower bound of the limit: ``2 / lambda_max``, or 2 over the sum
            of the blocks' largest eigenvalues. ``None`` unless these are exact.
        critical: A proven upper bound of the limit: ``2 / lambda_max``, or 2 over the
            largest of the blocks' eigenvalues. ``None`` unless these are exact.
        estimate: 2 over the sum of the blocks' largest eigenvalues, from any source: no
            bound. Kronecker factors underestimate these eigenvalues, so descent may
            diverge at the estimate.
        source: ``"exact"``; ``"factors"``, ``"approximation"`` or ``"lanczos"`` if
            there is the estimate alone.
    """

    safe: float | None
    critical: float | None
    estimate: float
    source: Source


class HasSpectrum(Protocol):
    """An object with a whole spectrum, such as a :class:`~ekfac.diagnostics.Dual`."""

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues."""


def step_bound(
    curvature: Spectrum | EstimatedSpectrum | CurvatureMatrix | HasSpectrum,
) -> StepBound:
    """Return the step sizes between which gradient descent turns unstable.

    For the loss whose Hessian the curvature is (Karakida et al. 2020, equation 23);
    for positive matrices ``max_l <= lambda_max <= sum_l`` over the blocks' largest
    eigenvalues. The bound does not hold over training with the cross-entropy, whose
    curvature shrinks.

    Args:
        curvature: The whole spectrum, an object that has one, or a matrix.

    Raises:
        UnsupportedOperationError: If the matrix is implicit.
        ValueError: If an eigenvalue is negative beyond rounding: descent along its
            direction diverges at every step size.
    """
    if isinstance(curvature, EstimatedSpectrum):
        # A Ritz value is at most the largest eigenvalue, so it proves no safe step.
        return StepBound(None, None, _limit(curvature.maximum), "lanczos")
    if isinstance(curvature, BlockDiagonalMatrix):
        spectra = list(layer_spectra(curvature).values())
    elif isinstance(curvature, CurvatureMatrix):
        spectra = [spectrum(curvature)]
    elif isinstance(curvature, Spectrum):
        spectra = [curvature]
    else:
        spectra = [curvature.spectrum()]
    tops = [float(s._positive("step_bound")[0]) for s in spectra]
    sources = {s.source for s in spectra}
    source: Source = sources.pop() if len(sources) == 1 else "approximation"
    safe, critical = _limit(sum(tops)), _limit(max(tops))
    if source != "exact":
        return StepBound(None, None, safe, source)
    return StepBound(safe, critical, safe, source)


def _limit(largest: float) -> float:
    """Return ``2 / largest``, infinite without curvature."""
    return 2 / largest if largest > 0 else float("inf")
