"""What every curvature matrix can do, whatever its structure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from ekfac.errors import StateMismatchError
from ekfac.matrices.eigen import damped_log, damped_power
from ekfac.matrices.structure import Stack, Structure, VectorOrTensor
from ekfac.spectral.operators import Eigenpairs, in_full_precision
from ekfac.vectors import (
    FunctionVector,
    ParameterVector,
    Vector,
    VectorSpace,
    standard_normal,
)

if TYPE_CHECKING:
    from typing_extensions import Self

DampingSplit = Literal["exact", "factored"]
_VECTOR_TYPES = {cls.__name__: cls for cls in (Vector, ParameterVector, FunctionVector)}


class CurvatureMatrix(Structure):
    """A symmetric matrix over parameters (or outputs), in some structure.

    Vectors are :class:`~ekfac.vectors.Vector` or flat tensors ``[P]``, or ``[P, k]``
    for ``k`` columns at once; the result has the same form. A vector of lower
    precision is converted to the matrix's dtype. Gradients flow through products and
    quadratic forms.

    A structure may cover only some of the entries of a vector; on the others the
    matrix is ``outside`` times the identity, which is zero unless it is a power of a
    damped matrix.
    """

    # ------------------------------------------------------------- products

    @in_full_precision
    def __matmul__(self, vector: VectorOrTensor) -> VectorOrTensor:
        """Return the product with a vector or with the columns of ``[P, k]``."""
        return self._on_stack(self._multiply_all, vector)

    @in_full_precision
    def quadratic(self, vector: Vector | Tensor) -> Tensor:
        """Return ``v^T F v``, 0-d, or ``[k]`` for columns ``[P, k]``."""
        stack = self._stack(vector)
        value = self._quadratic(stack)
        if self.outside:
            rest = self._rest(stack)
            value = value + self.outside * self.space.join(rest).square().sum(dim=1)
        is_columns = isinstance(vector, Tensor) and vector.dim() == 2
        return value if is_columns else value.squeeze(0)

    @in_full_precision
    def solve(
        self,
        vector: VectorOrTensor,
        damping: float = 0.0,
        *,
        damping_split: DampingSplit = "exact",
    ) -> VectorOrTensor:
        """Return ``(F + damping I)^-1 v``.

        Args:
            vector: A vector, or columns ``[P, k]``.
            damping: Added to every eigenvalue.
            damping_split: ``"factored"`` damps the two Kronecker factors instead
                (K-FAC only; Martens & Grosse 2015, section 6.3).

        Raises:
            ValueError: If the damped matrix is singular.
            UnsupportedOperationError: If the structure has no such solve.
        """
        check_damping(damping)
        if damping_split not in get_args(DampingSplit):
            raise ValueError(
                f"damping_split must be one of {get_args(DampingSplit)}, got "
                f"{damping_split!r}."
            )
        solve = self._solve if damping_split == "exact" else self._solve_factored

        def apply(stack: Stack) -> Stack:
            return self._with_rest(solve(stack, damping), stack, -1, damping)

        return self._on_stack(apply, vector)

    @in_full_precision
    def sample(
        self, damping: float = 0.0, generator: torch.Generator | None = None
    ) -> Vector:
        """Return one draw of the normal distribution ``N(0, (F + damping I)^-1)``.

        Args:
            damping: Added to every eigenvalue: the precision of an isotropic prior.
            generator: Source of the numbers.

        Raises:
            ValueError: If the damped matrix is not positive definite.
        """
        check_damping(damping)
        noise = standard_normal(
            (1, self.size), generator=generator, dtype=self.dtype, device=self.device
        )
        stack = self.space.split(noise)
        draw = self._with_rest(self._inverse_root(stack, damping), stack, -0.5, damping)
        return self._vector(draw)

    # -------------------------------------------------------------- numbers

    @in_full_precision
    def trace(self) -> Tensor:
        """Return the sum of the eigenvalues, 0-d."""
        return self._trace() + self.outside * (self.size - self.covered)

    @in_full_precision
    def frobenius_norm(self) -> Tensor:
        """Return the square root of the sum of squared entries, 0-d."""
        rest = self.outside**2 * (self.size - self.covered)
        return (self._squared_norm() + rest).sqrt()

    @in_full_precision
    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(F + damping I)``, 0-d.

        Raises:
            ValueError: If the damped matrix is not positive definite.
        """
        check_damping(damping)
        value = self._logdet(damping)
        missing = self.size - self.covered
        if missing:
            value = value + missing * damped_log(self._outside_value(), damping).sum()
        return value

    @in_full_precision
    def diagonal(self) -> Vector:
        """Return a copy of the diagonal entries."""
        stack = self._diagonal()
        if self.outside:
            ones = {name: torch.ones_like(rows) for name, rows in stack.items()}
            rest = self._rest(ones)
            stack = {n: rows + self.outside * rest[n] for n, rows in stack.items()}
        return self._vector(stack).clone()

    # ------------------------------------------------------------- spectrum

    @in_full_precision
    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, ``[P]``, ascending."""
        rest = self._outside_value().expand(self.size - self.covered)
        return torch.cat([self._eigenvalues(), rest]).sort().values

    @in_full_precision
    def top_eigenpairs(self, k: int) -> Eigenpairs:
        """Return the ``k`` largest eigenvalues, descending, and their eigenvectors.

        Raises:
            ValueError: If ``k`` is not between 1 and ``P``.
        """
        if not 1 <= k <= self.size:
            raise ValueError(f"k must be between 1 and {self.size}, got {k}.")
        values, stack = self._top(min(k, self.covered))
        rows = self.space.join(stack)
        missing = min(k, self.size - self.covered)
        if missing:
            # Outside, every coordinate is an eigenvector of the same eigenvalue.
            ones = self.space.split(torch.ones_like(rows[:1]))
            free = self.space.join(self._rest(ones))[0].nonzero()[:missing]
            units = torch.zeros(
                missing, self.size, dtype=rows.dtype, device=rows.device
            )
            rows = torch.cat([rows, units.scatter(1, free, 1.0)])
            values = torch.cat([values, self._outside_value().expand(missing)])
        best = values.topk(k)
        return Eigenpairs.exact(best.values, rows[best.indices].mT)

    @in_full_precision
    def power(self, exponent: float, damping: float = 0.0) -> CurvatureMatrix:
        """Return ``(F + damping I)^exponent`` as a matrix.

        Args:
            exponent: Any number; an integer if eigenvalues are negative.
            damping: Added to every eigenvalue before the power is taken.

        Raises:
            ValueError: If some damped eigenvalue has no such power, or the exponent is
                not finite.
            UnsupportedOperationError: If the structure has no powers.
        """
        check_damping(damping)
        if not math.isfinite(exponent):
            raise ValueError(f"exponent must be finite, got {exponent}.")
        result = self._power_matrix(exponent, damping)
        if self.covered < self.size:
            outside = damped_power(self._outside_value(), exponent, damping)
            result.outside = float(outside)
        return result

    @in_full_precision
    def to_dense(self) -> Tensor:
        """Return the matrix ``[P, P]`` in the flat order of its space."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return self.space.join(self._multiply_all(self.space.split(eye))).mT

    # -------------------------------------------------------------- algebra

    def __add__(self, other: CurvatureMatrix) -> CurvatureMatrix:
        """Return the sum, where it has the same structure, in the wider type."""
        if not isinstance(other, CurvatureMatrix):
            return NotImplemented
        if other.kind == "implicit" and self.kind != "implicit":
            return other + self
        self._require_same_space(other)
        if self.dtype != other.dtype:
            dtype = torch.promote_types(self.dtype, other.dtype)
            return self.to(dtype=dtype) + other.to(dtype=dtype)
        if self.kind != other.kind:
            self._unsupported(
                f"sum with a {other.structure} matrix",
                "wrap one of them as ImplicitMatrix.of(matrix), whose sums hold any "
                "structures",
            )
        total = self._sum(cast("Self", other))
        total.outside = self.outside + other.outside
        return total

    def __sub__(self, other: CurvatureMatrix) -> CurvatureMatrix:
        """Return the difference, where it has the same structure."""
        if not isinstance(other, CurvatureMatrix):
            return NotImplemented
        return self + -1.0 * other

    def __mul__(self, scalar: float) -> Self:
        """Return ``scalar`` times the matrix.

        Raises:
            ValueError: If it is not finite.
        """
        if not isinstance(scalar, int | float):
            return NotImplemented
        if not math.isfinite(scalar):
            raise ValueError(f"A matrix is scaled by a finite number, got {scalar}.")
        result = self._scaled(float(scalar))
        result.outside = self.outside * scalar
        return result

    def __rmul__(self, scalar: float) -> Self:
        return self * scalar

    def __truediv__(self, scalar: float) -> Self:
        """Return the matrix divided by ``scalar``."""
        return self * (1 / scalar)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the matrix on ``device`` and in ``dtype``."""
        result = self._converted(lambda tensor: tensor.to(device=device, dtype=dtype))
        result.outside = self.outside
        return result

    def _merged(self, others: Sequence[Self], weights: Sequence[float]) -> Self:
        """Return the weighted sum of this matrix and ``others``."""
        total: CurvatureMatrix = self * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            total = total + other * weight
        return cast("Self", total)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return copies as plain tensors and containers.

        It can be saved with ``torch.save`` and loaded with ``weights_only=True``.
        """
        shapes = {name: list(shape) for name, shape in self.space.shapes.items()}
        return {
            "kind": self.kind,
            "space": self.space.vector_type.__name__,
            "shapes": shapes,
            "outside": self.outside,
            **self._state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the matrix that ``state_dict()`` was called on.

        Raises:
            StateMismatchError: If it is the state of another structure.
        """
        if state.get("kind") != cls.kind:
            raise StateMismatchError(
                f"The state is of a {state.get('kind')!r} matrix, {cls.__name__} takes "
                f"{cls.kind!r}; use ekfac.matrices.from_state_dict(state)."
            )
        space = VectorSpace(state["shapes"], _VECTOR_TYPES[state["space"]])
        matrix = cls._from_state(space, state)
        matrix.outside = state["outside"]
        return matrix

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values and the dtype of ``state``; the device stays.

        Raises:
            StateMismatchError: If it is of another structure or another space.
        """
        loaded = self.from_state(state)
        self._require_same_space(loaded)
        if loaded.structure != self.structure:
            raise StateMismatchError(
                f"The state is of a {loaded.structure} matrix, this one is "
                f"{self.structure}; use ekfac.matrices.from_state_dict(state)."
            )
        # A matrix is its attributes; live factors are replaced, not written to.
        self.__dict__.update(loaded.to(device=self.device).__dict__)


def check_damping(damping: float) -> None:
    """Raise ``ValueError`` unless ``damping`` is a finite number, zero or more."""
    if not (damping >= 0 and isfinite(damping)):
        raise ValueError(f"damping must be finite and at least 0, got {damping}.")
