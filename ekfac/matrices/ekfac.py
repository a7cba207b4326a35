"""EKFAC: scalings of their own in the Kronecker-factored eigenbasis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.matrices.eigen import damped_power
from ekfac.matrices.kronecker import KroneckerMatrix, same_basis

if TYPE_CHECKING:
    from typing_extensions import Self


class EKFACMatrix(KroneckerMatrix):
    """The block ``V -> Q_G (s * (Q_G^T V Q_A)) Q_A^T`` (George et al. 2018).

    With scalings estimated on the same examples its trace is exact and it is never
    further from the Fisher than K-FAC in Frobenius norm (ibid., Theorem 2). Matrices in
    the same basis add and merge.

    Args:
        layer: The basis ``Q_A``, ``Q_G``, the scalings ``s`` and the packing.
        space: The layer's parameters. Default: as ``layer`` unpacks them.
    """

    kind = "ekfac"
    factor_names = ("Q_A", "Q_G", "s")

    def _shape_of_factors(self) -> tuple[int, int, int]:
        b, d_out, d_in = self.factor("s").shape
        return b, d_out, d_in

    def _tensor(self) -> Tensor:
        return self.factor("s")

    def _values(self) -> Tensor:
        return self.factor("s")

    def _resolved(self) -> Tensor:
        """Return the scalings, zero where they are but the square of a rounding error.

        A gradient's coordinate along a direction that no gradient has is a sum of
        ``d_out d_in`` products of which each is rounded.
        """
        s = self.factor("s")
        rounding = 32 * torch.finfo(s.dtype).eps ** 2 * (s.shape[1] + s.shape[2])
        noise = rounding * s.abs().amax().clamp(min=torch.finfo(s.dtype).tiny)
        return torch.where(s.abs() <= noise, torch.zeros_like(s), s)

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """Return ``Q_G`` and ``Q_A``, ``None`` for a diagonal factor's identity."""
        Q_G, Q_A = self.layer.Q_G, self.layer.Q_A
        for basis, side in ((Q_G, "G"), (Q_A, "A")):
            factor = getattr(self.layer, side) if basis is None else None
            if factor is not None and factor.dim() == 3:
                self.factor(f"Q_{side}")  # only a diagonal factor has no basis
        return Q_G, Q_A

    def with_scalings(self, scalings: Tensor) -> Self:
        """Return the matrix with other scalings in the same basis."""
        return self.with_factors(self._factors() | {"s": scalings})

    def _power_matrix(self, exponent: float, damping: float) -> Self:
        return self.with_scalings(damped_power(self._resolved(), exponent, damping))

    def _sum(self, other: Self) -> Self:
        mine, theirs = self.bases(), other.bases()
        if not all(same_basis(p, q) for p, q in zip(mine, theirs, strict=True)):
            self._unsupported(
                "sum with one in another basis",
                "estimate both in one basis, or use ImplicitMatrix.of(matrix), whose "
                "sums hold any structures",
            )
        return self.with_scalings(self._values() + other._values())

    def _scaled(self, scalar: float) -> Self:
        return self.with_scalings(self._values() * scalar)
