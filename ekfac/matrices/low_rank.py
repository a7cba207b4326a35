"""Low-rank matrices: a few rows, such as the gradients of single examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac.errors import StateMismatchError
from ekfac.matrices.base import CurvatureMatrix, Stack, VectorOrTensor
from ekfac.matrices.eigen import damped_log, damped_power, symmetric_eigh
from ekfac.spectral.operators import gaussian_columns, orthonormal
from ekfac.state_schema import Number, Record, TensorField, entry, joined
from ekfac.vectors import VectorSpace


class LowRankMatrix(CurvatureMatrix):
    """``U^T diag(weights) U + shift I``, ``r P`` numbers.

    The rows of ``U`` may be the outputs' Jacobian or the examples' gradients. The first
    operation that needs the spectrum takes a thin QR decomposition of ``U^T`` and an
    ``r x r`` eigenproblem, ``P r^2`` work and ``r P`` more numbers. The complement of
    the rows has the eigenvalue ``shift``; a solve is Woodbury's identity in that basis.

    Args:
        space: Names and shapes of the vectors it acts on.
        rows: ``U`` ``[r, P]``, in the flat order of ``space``.
        weights: ``[r]``, of any sign. Default: ones.
        shift: Eigenvalue on the complement: zero, unless the matrix is a power of a
            damped one.

    Raises:
        StateMismatchError: If the shapes do not fit.
    """

    kind = "low_rank"

    def __init__(
        self,
        space: VectorSpace,
        rows: Tensor,
        *,
        weights: Tensor | None = None,
        shift: float = 0.0,
    ) -> None:
        super().__init__(space)
        if rows.dim() != 2 or rows.shape[1] != space.size:
            raise StateMismatchError(
                f"The rows of a low-rank matrix over {space.size} parameters have "
                f"shape [r, {space.size}], got {list(rows.shape)}."
            )
        weights = rows.new_ones(rows.shape[0]) if weights is None else weights
        if weights.shape != rows.shape[:1]:
            raise StateMismatchError(
                f"{rows.shape[0]} rows need as many weights, got {list(weights.shape)}."
            )
        self.rows, self.weights, self.shift = rows, weights, shift
        self._basis: Tensor | None = None
        self._values: Tensor = weights

    def _tensor(self) -> Tensor:
        return self.rows

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues ``[m]`` without the shift, and eigenvectors ``[P, m]``.

        ``m = min(r, P)``; the other eigenvalues are zero.
        """
        if self._basis is None:
            orthonormal, triangle = torch.linalg.qr(self.rows.mT)
            values, vectors = symmetric_eigh((triangle * self.weights) @ triangle.mT)
            self._values, self._basis = values, orthonormal @ vectors
        return self._values, self._basis

    def with_spectrum(
        self, function: Callable[[Tensor], Tensor], vector: VectorOrTensor
    ) -> VectorOrTensor:
        """Return ``Q f(values) Q^T v``, the complement included.

        Args:
            function: ``f``, of all eigenvalues at once, entry by entry.
            vector: A vector, or columns ``[P, k]``.
        """
        return self._on_stack(lambda stack: self._apply(stack, function), vector)

    def _missing(self) -> int:
        """Return the dimension of the complement of the rows."""
        return max(self.size - self.rows.shape[0], 0)

    def _shift_value(self) -> Tensor:
        """Return the complement's eigenvalue, ``[1]``, or ``[0]`` without one."""
        value = torch.full((1,), self.shift, dtype=self.dtype, device=self.device)
        return value if self._missing() else value[:0]

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``f(values) - f(shift)`` ``[m]`` and ``f(shift)``, 0-d."""
        values = function(self._spectrum()[0] + self.shift)
        shift = function(self._shift_value()).sum()
        return values - shift, shift

    def _apply(self, stack: Stack, function: Callable[[Tensor], Tensor]) -> Stack:
        """Return ``Q f(values) Q^T v``."""
        (values, shift), basis = self._mapped(function), self._spectrum()[1]
        rows = self.space.join(stack)
        return self.space.split((rows @ basis * values) @ basis.mT + shift * rows)

    def _multiply(self, stack: Stack) -> Stack:
        rows = self.space.join(stack)
        product = (rows @ self.rows.mT * self.weights) @ self.rows
        return self.space.split(product + self.shift * rows)

    def _quadratic(self, stack: Stack) -> Tensor:
        rows = self.space.join(stack)
        value = ((rows @ self.rows.mT).square() * self.weights).sum(dim=1)
        return value + self.shift * rows.square().sum(dim=1)

    def _solve(self, stack: Stack, damping: float) -> Stack:
        return self._apply(stack, lambda values: damped_power(values, -1, damping))

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        return self._apply(stack, lambda values: damped_power(values, -0.5, damping))

    def _trace(self) -> Tensor:
        return self.rows.square().sum(dim=1) @ self.weights + self.shift * self.size

    def _squared_norm(self) -> Tensor:
        return self._eigenvalues().square().sum()

    def _logdet(self, damping: float) -> Tensor:
        complement = damped_log(self._shift_value(), damping).sum() * self._missing()
        return damped_log(self._spectrum()[0] + self.shift, damping).sum() + complement

    def _diagonal(self) -> Stack:
        entries = self.weights @ self.rows.square() + self.shift
        return self.space.split(entries.unsqueeze(0))

    def _eigenvalues(self) -> Tensor:
        complement = self._shift_value().expand(self._missing())
        return torch.cat([self._spectrum()[0] + self.shift, complement])

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        values, basis = self._spectrum()
        if self._missing():
            # Any direction orthogonal to the rows is an eigenvector of the shift.
            seeded = torch.Generator().manual_seed(0)
            probes = gaussian_columns(self, min(k, self._missing()), seeded)
            others = orthonormal(probes, basis)
            basis = torch.cat([basis, others], dim=1)
            values = torch.cat([values, values.new_zeros(others.shape[1])])
        best = values.topk(k)
        return best.values + self.shift, self.space.split(basis[:, best.indices].mT)

    def _power_matrix(self, exponent: float, damping: float) -> LowRankMatrix:
        powers, shift = self._mapped(lambda v: damped_power(v, exponent, damping))
        basis = self._spectrum()[1]
        return LowRankMatrix(self.space, basis.mT, weights=powers, shift=float(shift))

    def _sum(self, other: Self) -> Self:
        return type(self)(
            self.space,
            torch.cat([self.rows, other.rows]),
            weights=torch.cat([self.weights, other.weights]),
            shift=self.shift + other.shift,
        )

    def _scaled(self, scalar: float) -> Self:
        weights, shift = self.weights * scalar, self.shift * scalar
        return type(self)(self.space, self.rows, weights=weights, shift=shift)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        rows, weights = function(self.rows), function(self.weights)
        return type(self)(self.space, rows, weights=weights, shift=self.shift)

    def _state(self) -> dict[str, Any]:
        return {
            "rows": self.rows.detach().clone(),
            "weights": self.weights.detach().clone(),
            "shift": self.shift,
        }

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        rows = TensorField((None, space.size))
        rows.check(entry(state, key, "rows"), joined(key, "rows"))
        weights = TensorField((len(state["rows"]),))
        fields = {"rows": rows, "weights": weights, "shift": Number(float)}
        return Record(fields, same_dtype=[("rows", "weights")])

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        weights, shift = state["weights"], state["shift"]
        return cls(space, state["rows"], weights=weights, shift=shift)
