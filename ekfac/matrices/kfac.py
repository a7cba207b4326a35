"""K-FAC: the Kronecker product of two factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.matrices.base import Stack
from ekfac.matrices.damping import damping_ratio
from ekfac.matrices.eigen import CachedEigh, damped_power
from ekfac.matrices.ekfac import EKFACMatrix
from ekfac.matrices.kronecker import (
    KroneckerFactors,
    KroneckerMatrix,
    LayerFactors,
    factor_diagonal,
    scaled_by_factors,
)
from ekfac.vectors import VectorSpace

if TYPE_CHECKING:
    from typing_extensions import Self


class KFACMatrix(KroneckerMatrix):
    """The block ``V -> G V A`` of one layer (Martens & Grosse 2015).

    Damping is exact, through the eigenvalues of the factors: their product plus
    ``damping``. A sum of Kronecker products is not one, so K-FAC matrices do not add;
    estimates over several sets of examples merge by their factors
    (:func:`ekfac.matrices.merge`).

    Args:
        layer: The factors ``A`` and ``G`` and the packing.
        space: The layer's parameters. Default: as ``layer`` unpacks them.
    """

    kind = "kfac"
    factor_names = ("A", "G")

    def __init__(self, layer: LayerFactors, space: VectorSpace | None = None) -> None:
        super().__init__(layer, space)
        self._eigh_A, self._eigh_G = CachedEigh(), CachedEigh()

    def _shape_of_factors(self) -> tuple[int, int, int]:
        A, G = self.factor("A"), self.factor("G")
        return G.shape[0], G.shape[1], A.shape[1]

    def _tensor(self) -> Tensor:
        return self.factor("A")

    def _spectra(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of ``G`` and of ``A``, ``[b or 1, d]``."""
        A, G = self.factor("A"), self.factor("G")
        return (
            self._eigh_G(G)[0] if G.dim() == 3 else G,
            self._eigh_A(A)[0] if A.dim() == 3 else A,
        )

    def _values(self) -> Tensor:
        values_G, values_A = self._spectra()
        return values_G.unsqueeze(-1) * values_A.unsqueeze(-2)

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """Return ``Q_G`` and ``Q_A``, ``None`` for a diagonal factor's identity."""
        A, G = self.factor("A"), self.factor("G")
        return (
            self._eigh_G(G)[1] if G.dim() == 3 else None,
            self._eigh_A(A)[1] if A.dim() == 3 else None,
        )

    def _multiply(self, stack: Stack) -> Stack:
        packed = self._pack(stack)
        return self._unpack(
            scaled_by_factors(packed, self.factor("G"), self.factor("A"))
        )

    def _quadratic(self, stack: Stack) -> Tensor:
        packed = self._pack(stack)
        product = scaled_by_factors(packed, self.factor("G"), self.factor("A"))
        return (packed * product).flatten(1).sum(dim=1)

    def _solve_factored(self, stack: Stack, damping: float) -> Stack:
        """Return ``(G + sqrt(damping) / pi I)^-1 V (A + pi sqrt(damping) I)^-1``.

        ``pi`` is their :func:`ekfac.matrices.damping.damping_ratio`.
        """
        values_G, values_A = self._spectra()
        means = (values.mean(dim=-1, keepdim=True) for values in (values_A, values_G))
        pi = damping_ratio(*means)
        root = damping**0.5
        damped_G = values_G + root / pi
        damped_A = values_A + root * pi
        product = damped_G.unsqueeze(-1) * damped_A.unsqueeze(-2)
        return self._apply(stack, damped_power(product, -1, 0.0))

    def _trace(self) -> Tensor:
        diagonal_G = factor_diagonal(self.factor("G")).sum(dim=-1)
        return (diagonal_G * factor_diagonal(self.factor("A")).sum(dim=-1)).sum()

    def _squared_norm(self) -> Tensor:
        squared_G = self.factor("G").square().flatten(1).sum(dim=1)
        return (squared_G * self.factor("A").square().flatten(1).sum(dim=1)).sum()

    def _diagonal(self) -> Stack:
        diagonal_G = factor_diagonal(self.factor("G")).unsqueeze(-1)
        diagonal_A = factor_diagonal(self.factor("A")).unsqueeze(-2)
        return self._unpack((diagonal_G * diagonal_A).unsqueeze(0))

    def _power_matrix(self, exponent: float, damping: float) -> EKFACMatrix:
        Q_G, Q_A = self.bases()
        powers = damped_power(self._values(), exponent, damping)
        factors = KroneckerFactors(self.packing, Q_A=Q_A, Q_G=Q_G, s=powers)
        return EKFACMatrix(factors, self.space)

    def _sum(self, other: Self) -> Self:
        self._unsupported(
            "sum, for a sum of Kronecker products is not one",
            "merge(matrices, num_examples) averages the factors of estimates, and "
            "ImplicitMatrix.of(matrix) has sums that hold any structures",
        )

    def _merged(self, others: Sequence[Self], weights: Sequence[float]) -> Self:
        matrices = [self, *others]
        averages = {
            name: _weighted_sum([m.factor(name) for m in matrices], weights)
            for name in ("A", "G")
        }
        return self.with_factors(averages)

    def _scaled(self, scalar: float) -> Self:
        return self.with_factors(
            {"A": self.factor("A"), "G": self.factor("G") * scalar}
        )


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_i weights_i tensors_i``."""
    terms = [t * weight for t, weight in zip(tensors, weights, strict=True)]
    return torch.stack(terms).sum(dim=0)
