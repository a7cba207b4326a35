"""A few directions per layer: singular directions of weights, top of the Hessian.

Haink 2023, sections 3.3, 4 and 7.7. There the penalties have no factor 1/2, so that
``lambda`` is half of a penalty's ``strength``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.errors import EkfacWarning
from ekfac.estimate import hessian
from ekfac.estimate.data import choose
from ekfac.matrices import CurvatureMatrix, DenseMatrix, EKFACMatrix, LowRankMatrix
from ekfac.spectral import singular
from ekfac.spectral.singular import singular_products
from ekfac.vectors import VectorSpace

# Layers of at most so many parameters have their Hessian formed.
DENSE = 2048
FALLBACK = 5


# -- singular directions ---------------------------------------------------------------


def singular_directions(
    weight: Tensor, name: str, k: int | float | None = None
) -> LowRankMatrix:
    """Return ``sum_i nu_i w_i w_i^T`` with ``w_i = vec(u_i v_i^T)`` (Haink 2023, 7.11).

    The singular value decomposition is that of the weight ``[d_out, *]`` with all
    other dimensions merged, the matrix that K-FAC sees.

    Args:
        weight: At least two-dimensional.
        name: Of the parameter.
        k: How many directions, as a number or as a share of all. Default: the
            singular values beyond the edge of the noise, :func:`noise_edge`, or five
            where none is beyond.
    """
    matrix = weight.detach().flatten(1)
    total = min(matrix.shape)
    if k is None:
        beyond = int((torch.linalg.svdvals(matrix) > noise_edge(weight)).sum())
        count = beyond or min(FALLBACK, total)
    else:
        count = counted(k, total)
    values, products = singular_products(matrix, count)
    space = VectorSpace({name: weight.shape})
    return LowRankMatrix(space, products.flatten(1), weights=values)


def noise_edge(weight: Tensor) -> float:
    """Return the singular value up to which those of pure noise reach.

    ``sigma (sqrt(n) + sqrt(m))`` (Marchenko & Pastur 1967), with ``sigma`` from the
    median singular value, which a few large ones do not move (Gavish & Donoho 2014,
    section III.D). The standard deviation of the entries would count the signal as
    noise: of a trained layer often nothing is beyond that edge.

    Args:
        weight: ``[d_out, *]``, as one matrix ``n x m`` or ``m x n``.
    """
    matrix = weight.detach().flatten(1)
    median = float(torch.linalg.svdvals(matrix).median())
    sigma = median / singular.noise_median(*matrix.shape)
    return singular.noise_edge(matrix.shape, sigma)


def counted(k: int | float, total: int) -> int:
    """Return a number of directions: ``k`` or, for a float, that share of ``total``.

    Raises:
        ValueError: If it is not positive.
    """
    count = round(k * total) if isinstance(k, float) else k
    if not (k > 0 and (isinstance(k, int) or k <= 1)):
        raise ValueError(
            f"k must be a positive number of directions, or a share above 0 and at "
            f"most 1.0 as a float, got {k!r}."
        )
    return max(1, min(count, total))


# -- the Hessian's top -----------------------------------------------------------------


def hessian_top(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Callable[[Tensor, Any], Tensor],
    groups: Mapping[str, list[str]],
    k: int | float,
    *,
    loss_reduction: str | None = None,
    progress: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, CurvatureMatrix]:
    """Return ``sum_i h_i e_i e_i^T`` over the largest eigenpairs of every block.

    Haink 2023, equation 7.10. Eigenvalues that are not positive are left out: a penalty
    of negative curvature has no minimum. Blocks of up to ``DENSE`` parameters are
    formed, those of larger ones are found by products, ``k`` for every pass over the
    data and several dozen passes.

    Args:
        model: The model, at the solution.
        data: Batches with targets.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        groups: The blocks: name -> parameters.
        k: How many of each block, or which share (a float).
        loss_reduction: As for :func:`ekfac.hessian`.
        progress: Likewise.
        generator: Of the iteration's starting vectors.
    """
    chosen = choose(model, [name for names in groups.values() for name in names])
    options: dict[str, Any] = {"loss_reduction": loss_reduction, "progress": progress}
    found: dict[str, CurvatureMatrix] = {}
    for key, names in groups.items():
        size = sum(chosen[name].numel() for name in names)
        if size <= DENSE:
            H = hessian(model, data, loss_fn, "dense", parameters=names, **options)
        else:
            H = hessian(model, data, loss_fn, "implicit", parameters=names, **options)
            H.generator = generator  # type: ignore[attr-defined]
        pairs = H.top_eigenpairs(counted(k, size))
        if not pairs.converged:
            warnings.warn(
                f"The Hessian's top eigenvectors of layer {key!r} have relative "
                f"residuals up to {float(pairs.residuals.max() / pairs.values[0]):.2g};"
                " they are used as they are.",
                EkfacWarning,
                stacklevel=4,
            )
        positive = pairs.values > 0
        rows = pairs.vectors[:, positive].mT.contiguous()
        found[key] = LowRankMatrix(H.space, rows, weights=pairs.values[positive])
    return found


def truncated(matrix: EKFACMatrix, k: int | float) -> EKFACMatrix:
    """Return an EKFAC matrix with all but its ``k`` largest scalings zero."""
    s = matrix.factor("s")
    best = s.flatten().topk(counted(k, s.numel())).indices
    kept = torch.zeros_like(s).flatten().index_copy(0, best, s.flatten()[best])
    return matrix._with_scalings(kept.reshape(s.shape))


def positive_part(matrix: CurvatureMatrix) -> CurvatureMatrix:
    """Return a dense matrix without its negative eigenvalues."""
    if not isinstance(matrix, DenseMatrix):
        return matrix
    values, vectors = matrix._eigh(matrix.matrix)
    if bool((values >= 0).all()):
        return matrix
    return DenseMatrix(matrix.space, (vectors * values.clamp(min=0)) @ vectors.mT)
