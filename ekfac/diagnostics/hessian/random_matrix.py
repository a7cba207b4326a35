"""Tests against random matrices: bulk edges, level spacings, random eigenvectors.

Sources: Haink (2023), chapter 4 and section 7.5.
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.hessian.eigenvectors import Directions, columns
from ekfac.diagnostics.spectra import null_space
from ekfac.progress import counted
from ekfac.spectral.eigensolvers import noise_edge, singular_value_density
from ekfac.spectral.operators import result
from ekfac.vectors import standard_normal


@result
class Edge:
    """The edge of the bulk of a weight matrix's singular values.

    Attributes:
        value: ``sigma (sqrt(n) + sqrt(m))``, where the largest singular value of a
            random ``n x m`` matrix lies.
        sigma: Standard deviation of the bulk's entries.
        singular_values: ``[r]``, descending.
        outliers: Number of singular values beyond the edge.
        shape: ``(n, m)``.
        converged: Whether the bulk stopped shrinking.
    """

    value: float
    sigma: float
    singular_values: Tensor
    outliers: int
    shape: tuple[int, int]
    converged: bool

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the singular values' histogram, law and edge; return the axes."""
        ax = axes_or_new(ax)
        values = self.singular_values
        ax.hist(values.tolist(), bins=40, density=True, alpha=0.5, label="measured")
        grid = torch.linspace(0, float(values.max()) * 1.05, 400, dtype=torch.float64)
        law = singular_value_density(grid, self.shape, self.sigma)
        ax.plot(grid, law, color="black", label="Marchenko-Pastur")
        ax.axvline(self.value, color="tab:red", ls="--", label="edge")
        ax.set(xlabel="singular value", ylabel="density")
        ax.legend()
        return ax


def marchenko_pastur_edge(
    matrix: Tensor, *, margin: float = 0.02, max_iterations: int = 100
) -> Edge:
    """Return the bulk's edge and the number of singular values beyond it.

    The variance of the bulk is that of the entries without the outliers' share, with
    outliers counted anew until nothing changes: the variance of a whole trained matrix
    contains its outliers and would hide them.

    Args:
        matrix: ``[n, m]``; a convolution's kernel through
            :func:`ekfac.diagnostics.hessian.as_matrix`.
        margin: How far beyond the edge, relative to it, an outlier must be: the largest
            singular value of a finite random matrix scatters around the edge.
        max_iterations: The most recounts.

    Raises:
        ValueError: If ``matrix`` has other than two dimensions.
    """
    if matrix.dim() != 2:
        raise ValueError(
            f"matrix must have two dimensions [n, m], got {list(matrix.shape)}."
        )
    n, m = matrix.shape
    values = torch.linalg.svdvals(matrix.double())
    squares = values.square()
    outliers, converged = 0, False
    sigma = edge = 0.0
    for _ in range(max_iterations):
        # Without its r outliers the matrix counts as one of r fewer rows and columns.
        entries = (n - outliers) * (m - outliers)
        sigma = sqrt(float(squares[outliers:].sum()) / max(entries, 1))
        edge = noise_edge((n, m), sigma)
        count = int((values > edge * (1 + margin)).sum())
        if count <= outliers:
            converged = True
            break
        outliers = count
    return Edge(edge, sigma, values, outliers, (n, m), converged)


@result
class Spacings:
    """The spacings of unfolded levels beside Wigner's surmise.

    Attributes:
        value: Spacings ``[s]``, of mean about one.
        statistic: Kolmogorov-Smirnov distance from Wigner's distribution.
        p_value: Probability of at least that distance if the spacings were independent
            draws from Wigner's distribution (asymptotic).
        poisson_statistic: Distance from the exponential distribution of independent
            levels.
    """

    value: Tensor
    statistic: float
    p_value: float
    poisson_statistic: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw a histogram with both distributions; return the axes."""
        ax = axes_or_new(ax)
        grid = torch.linspace(0, 4, 200)
        bins = torch.linspace(0, 4, 41).tolist()
        ax.hist(self.value.tolist(), bins=bins, density=True, alpha=0.5)
        wigner = pi * grid / 2 * torch.exp(-pi * grid**2 / 4)
        ax.plot(grid, wigner, color="black", label="Wigner")
        ax.plot(grid, torch.exp(-grid), color="0.5", ls="--", label="Poisson")
        ax.set(xlabel="spacing", ylabel="density")
        ax.legend()
        return ax


def level_spacings(
    eigenvalues: Tensor, *, neighbours: int = 10, cut: float | None = None
) -> Spacings:
    """Return the spacings of the unfolded spectrum (Haink 2023, eq. 4.3, Figure 7.16).

    Every level becomes a Gaussian step as wide as half the distance of its
    ``neighbours``-th neighbours; the sum of the steps, the smoothed count, is the new
    scale. ``2 neighbours`` levels at both ends are dropped.

    The null space is left out: its eigenvalues are rounding errors, whose spacings are
    those of a random matrix whatever the network.

    Args:
        eigenvalues: ``[n]``, in any order, more than ``4 neighbours + 2`` outside the
            null space.
        neighbours: Levels on each side that the count is smoothed over.
        cut: As for :func:`ekfac.diagnostics.spectra.null_space`. Eigenvalues given in a
            higher precision than they were computed in need a larger one.

    Raises:
        ValueError: If there are too few, or other exact degeneracies.
    """
    levels = eigenvalues[~null_space(eigenvalues, cut)].double().sort().values
    a = neighbours
    if len(levels) < 4 * a + 3:
        raise ValueError(
            f"level_spacings needs more than {4 * a + 2} eigenvalues with "
            f"{neighbours=} outside the null space, got {len(levels)} of "
            f"{len(eigenvalues)}."
        )
    widths = (levels[2 * a :] - levels[: -2 * a]) / 2
    if bool((widths <= 0).any()):
        raise ValueError(
            f"An eigenvalue is repeated more than {2 * a} times, so that its "
            "neighbourhood has no width; leave it out before unfolding."
        )
    inner = levels[a:-a]
    steps = torch.erf((levels[:, None] - inner) / (sqrt(2) * widths))
    unfolded = (0.5 * (1 + steps)).sum(dim=1)[2 * a : -2 * a]
    spacings = unfolded.diff()
    wigner = 1 - torch.exp(-pi * spacings.sort().values ** 2 / 4)
    statistic = _distance(wigner)
    return Spacings(
        spacings,
        statistic,
        _kolmogorov(statistic, len(spacings)),
        _distance(1 - torch.exp(-spacings.sort().values)),
    )


@result
class PorterThomas:
    """Test whether entries of eigenvectors look like independent Gaussians.

    Attributes:
        statistic: Kolmogorov-Smirnov distance of each vector, ``[k]``.
        p_value: Share of random unit vectors with at least that distance, ``[k]``;
            about one half on average for random vectors.
        standard_error: Of each ``p_value``, from the finite number of random vectors.
    """

    statistic: Tensor
    p_value: Tensor
    standard_error: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the p-values by index; return the axes."""
        ax = axes_or_new(ax)
        ax.plot(range(1, len(self.p_value) + 1), self.p_value.tolist(), "o", ms=3)
        ax.axhline(0.5, color="0.5", ls="--", label="random vectors")
        ax.set(xlabel="index", ylabel="p-value", ylim=(-0.02, 1.02))
        ax.legend()
        return ax


def porter_thomas(
    vectors: Tensor | Directions,
    *,
    num_samples: int = 200,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> PorterThomas:
    """Return the test of columns ``[P, k]`` (Haink 2023, eq. 7.7 with its brackets).

    The entries of a random unit vector are nearly ``N(0, 1/P)``. The null distribution
    of the distance is sampled with vectors of the same length.

    Args:
        vectors: Columns of unit norm; directions are taken without their null space.
        num_samples: Random vectors of the null distribution, at least 2.
        generator: Their source.
        progress: Whether to show a bar over the random vectors, if tqdm is installed.

    Raises:
        ValueError: If there are fewer than 2 random vectors.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2, got {num_samples}.")
    vectors = columns(vectors)
    size = len(vectors)
    distances = _normal_distance(vectors.double())
    samples = []
    with counted(num_samples, "random vectors", progress=progress) as advance:
        for start in range(0, num_samples, 32):
            count = min(32, num_samples - start)
            noise = standard_normal(
                (size, count),
                generator=generator,
                dtype=torch.float64,
                device=vectors.device,
            )
            samples.append(_normal_distance(noise))
            advance(count)
    null = torch.cat(samples)
    p = (null[None, :] >= distances[:, None]).double().mean(dim=1)
    # Agresti & Coull 1998: a share of 0 or 1 has an error too.
    shrunk = (p * num_samples + 2) / (num_samples + 4)
    error = (shrunk * (1 - shrunk) / (num_samples + 4)).sqrt()
    return PorterThomas(distances, p, error)


def _normal_distance(vectors: Tensor) -> Tensor:
    """Return each column's distance from the normal law of its own norm, ``[k]``."""
    size = len(vectors)
    scaled = vectors * (size**0.5 / torch.linalg.vector_norm(vectors, dim=0))
    law = torch.special.ndtr(scaled.sort(dim=0).values)
    index = torch.arange(1, size + 1, dtype=law.dtype, device=law.device)[:, None]
    above, below = (index / size - law).amax(0), (law - (index - 1) / size).amax(0)
    return torch.maximum(above, below)


def _distance(law: Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance from the law's values at the sample."""
    index = torch.arange(1, len(law) + 1, dtype=law.dtype, device=law.device)
    n = len(law)
    return float(torch.maximum(index / n - law, law - (index - 1) / n).max())


def _kolmogorov(statistic: float, count: int) -> float:
    """Return the asymptotic p-value (with Stephens's correction for finite counts)."""
    root = sqrt(count)
    x = (root + 0.12 + 0.11 / root) * statistic
    if x < 0.2:
        return 1.0
    terms = torch.arange(1, 101, dtype=torch.float64)
    signs = 1 - 2 * ((terms - 1) % 2)
    series = 2 * (signs * torch.exp(-2 * (terms * x) ** 2)).sum()
    return float(series.clamp(0, 1))
