"""How many eigenvalues of a Hessian are negative, zero and positive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.matrices import CurvatureMatrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Inertia:
    """The signs of a symmetric matrix's eigenvalues.

    Attributes:
        negative: How many are below ``-tolerance``: directions of descent from a
            critical point.
        zero: How many are within it: the degree of degeneracy (Zhang et al. 2021,
            definition 3).
        positive: How many are above it.
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

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the magnitudes by rank, coloured by sign, and return the axes."""
        axes = axes_or_new(axes)
        magnitudes = self.values.abs().clamp(min=1e-20)
        order = magnitudes.argsort(descending=True)
        ranks = torch.arange(1, len(order) + 1)
        values = self.values[order]
        zero = values.abs() <= self.tolerance
        for label, chosen, colour in (
            ("positive", ~zero & (values > 0), "tab:blue"),
            ("negative", ~zero & (values < 0), "tab:red"),
            ("zero", zero, "tab:gray"),
        ):
            heights = magnitudes[order][chosen].tolist()
            axes.semilogy(
                ranks[chosen].tolist(), heights, "o", color=colour, label=label, ms=4
            )
        axes.axhline(self.tolerance, color="black", lw=0.8, ls=":")
        axes.set(xlabel="rank", ylabel="|eigenvalue|")
        axes.legend()
        return axes


def inertia(
    matrix: CurvatureMatrix | Tensor, tolerance: float | None = None
) -> Inertia:
    """Return the inertia of a matrix, from all its eigenvalues.

    Args:
        matrix: A matrix that has them, such as ``ekfac.hessian(..., "dense")``, or a
            symmetric tensor. Take it in float64.
        tolerance: The largest magnitude of a zero. Default: the largest magnitude of
            all times the precision to the power 2/3, 4e-11 in float64.
    """
    # A structure's own eigenvalues have rounding errors removed, and with them the gap.
    dense = matrix if isinstance(matrix, Tensor) else matrix.to_dense()
    values = torch.linalg.eigvalsh((dense + dense.mT) / 2)
    magnitudes = values.abs()
    if tolerance is None:
        precision = torch.finfo(values.dtype).eps ** (2 / 3)
        tolerance = float(magnitudes.max()) * precision
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
