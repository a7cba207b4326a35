"""Implicit matrices, given by their products alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac import spectral
from ekfac.errors import warn_outside
from ekfac.matrices.base import (
    CurvatureMatrix,
    DampingSplit,
    Stack,
    VectorOrTensor,
    check_damping,
)
from ekfac.matrices.dense import DenseMatrix
from ekfac.spectral import Eigenpairs, Estimate, Solution
from ekfac.spectral.operators import in_full_precision
from ekfac.state_schema import Record
from ekfac.vectors import Vector, VectorSpace

# Largest number of entries of a sketch that is kept; estimators of larger matrices take
# one block of products at a time.
_SKETCH_LIMIT = 2**27


class ImplicitMatrix(CurvatureMatrix):
    """A matrix given by a callable, nothing stored.

    Products are exact, ``solve`` uses preconditioned conjugate gradients, and
    ``top_eigenpairs`` LOBPCG. Other operations form the matrix, by ``P`` products, if
    ``P`` is at most ``dense_limit``. Beyond that, ``trace``, ``logdet``,
    ``frobenius_norm`` and ``diagonal`` are estimates from random products: the methods
    ``estimate_...`` return them with their standard errors, the plain ones warn if the
    error exceeds the tolerance. The rest raises ``UnsupportedOperationError``.

    Args:
        space: Names and shapes of the vectors it acts on.
        multiply: Maps columns ``[P, k]`` to their products. It must be the same
            symmetric matrix at every call; with a fresh sample for each call the
            solvers fail.
        dtype: Dtype of the columns.
        device: Device of the columns.
        preconditioner: A matrix over the same space, of any structure that has
            ``solve``, used in ``solve`` with the same damping.
        num_products: Number of products that an estimate may take.
        tolerance: Relative standard error beyond which an estimate warns.
        dense_limit: Largest ``P`` at which the matrix may be formed.
        generator: Source of the random vectors of estimates.

    Raises:
        StateMismatchError: If the preconditioner acts on other vectors.
    """

    kind = "implicit"

    def __init__(
        self,
        space: VectorSpace,
        multiply: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        preconditioner: CurvatureMatrix | None = None,
        num_products: int = 200,
        tolerance: float = 1e-2,
        dense_limit: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(space)
        if preconditioner is not None:
            self.require_same_space(preconditioner)
        self.multiply = multiply
        self.preconditioner = preconditioner
        self.num_products = num_products
        self.tolerance = tolerance
        self.dense_limit = dense_limit
        self.generator = generator
        self._like = torch.empty(0, dtype=dtype, device=device)

    @classmethod
    def of(cls, matrix: CurvatureMatrix) -> ImplicitMatrix:
        """Return ``matrix`` as an implicit one, whose sums hold any structures."""
        return cls(
            matrix.space,
            lambda columns: matrix @ columns,
            dtype=matrix.dtype,
            device=matrix.device,
        )

    @classmethod
    def from_matvec(
        cls, space: VectorSpace, matvec: Callable[[Vector], Vector], **options: Any
    ) -> ImplicitMatrix:
        """Return the matrix of a function from vectors to vectors.

        Args:
            space: Names and shapes of the vectors.
            matvec: The product with one vector.
            **options: As for the constructor.
        """

        def multiply(columns: Tensor) -> Tensor:
            products = [matvec(space.vector(c)) for c in columns.unbind(dim=1)]
            return torch.stack([space.flat(product) for product in products], dim=1)

        return cls(space, multiply, **options)

    def _tensor(self) -> Tensor:
        return self._like

    @property
    def small(self) -> bool:
        """Whether the matrix is small enough to be formed."""
        return self.size <= self.dense_limit

    def dense(self) -> DenseMatrix:
        """Return the matrix formed by ``P`` products."""
        return DenseMatrix(self.space, self.to_dense())

    def _multiply(self, stack: Stack) -> Stack:
        columns = self.space.join(stack).mT
        return self.space.split(self.multiply(columns).mT)

    # ----------------------------------------------------------------- solves

    @in_full_precision
    def solution(
        self,
        vector: Vector | Tensor,
        damping: float = 0.0,
        *,
        preconditioner: CurvatureMatrix | None = None,
        tolerance: float | None = None,
        max_iterations: int = 1000,
    ) -> Solution:
        """Return ``(F + damping I)^-1 v`` with its residual.

        Args:
            vector: A vector, or columns ``[P, k]``.
            damping: Added to every eigenvalue.
            preconditioner: Replaces the matrix's own.
            tolerance: Relative residual to stop at. Default: the precision to the
                power 3/4.
            max_iterations: Largest number of products.

        Raises:
            ValueError: If the damped matrix is found not to be positive definite.
        """
        check_damping(damping)
        matrix = self.preconditioner if preconditioner is None else preconditioner
        if matrix is not None:
            self.require_same_space(matrix)
        if tolerance is None:
            tolerance = float(torch.finfo(self.dtype).eps ** 0.75)
        return spectral.conjugate_gradient(
            self,
            self.space.join(self._stack(vector)).mT,
            damping=damping,
            preconditioner=(
                None if matrix is None else lambda r: matrix.solve(r, damping)
            ),
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    def solve(
        self,
        vector: VectorOrTensor,
        damping: float = 0.0,
        *,
        damping_split: DampingSplit = "exact",
        preconditioner: CurvatureMatrix | None = None,
        tolerance: float | None = None,
        max_iterations: int = 1000,
    ) -> VectorOrTensor:
        """Return ``(F + damping I)^-1 v`` by conjugate gradients.

        It warns if the residual is above the tolerance; :meth:`solution` returns it.

        Args:
            vector: A vector, or columns ``[P, k]``.
            damping: Added to every eigenvalue.
            damping_split: Only ``"exact"``.
            preconditioner: As for :meth:`solution`.
            tolerance: As for :meth:`solution`.
            max_iterations: As for :meth:`solution`.

        Raises:
            ValueError: If the damped matrix is found not to be positive definite.
            UnsupportedOperationError: If ``damping_split`` is not ``"exact"``.
        """
        if damping_split != "exact":
            self._solve_factored({}, damping)

        def apply(stack: Stack) -> Stack:
            solution = self.solution(
                self.space.join(stack).mT,
                damping,
                preconditioner=preconditioner,
                tolerance=tolerance,
                max_iterations=max_iterations,
            )
            if not solution.converged:
                warn_outside(
                    f"Implicit matrix: solve stopped after {solution.iterations} "
                    "iterations at a relative residual of "
                    f"{float(solution.residual.max()):.2g}; pass a preconditioner, a "
                    "larger damping or more max_iterations."
                )
            return self.space.split(solution.value.mT)

        return self._on_stack(apply, vector)

    def _solve(self, stack: Stack, damping: float) -> Stack:
        rows = self.space.join(stack)
        return self.space.split(self.solve(rows.mT, damping).mT)

    # -------------------------------------------------------------- estimates

    def estimate_trace(self) -> Estimate:
        """Return the trace and its standard error."""
        if self.small:
            return Estimate.exact(self.to_dense().trace(), self.size)
        estimator = spectral.xtrace if self._fits() else spectral.hutchinson_trace
        return estimator(self, self.num_products, **self._options())

    def estimate_logdet(self, damping: float = 0.0) -> Estimate:
        """Return ``log det(F + damping I)`` and its standard error."""
        check_damping(damping)
        if self.small:
            return Estimate.exact(self.dense().logdet(damping), self.size)
        probes = max(2, self.num_products // 50)
        steps = max(2, self.num_products // probes)
        return spectral.log_determinant(
            self, damping, num_probes=probes, num_steps=steps, **self._options()
        )

    def estimate_squared_norm(self) -> Estimate:
        """Return the squared Frobenius norm and its standard error."""
        if self.small:
            return Estimate.exact(self.to_dense().square().sum(), self.size)
        options = self._options()
        return spectral.squared_frobenius_norm(self, self.num_products, **options)

    def estimate_diagonal(self) -> Estimate:
        """Return the diagonal ``[P]`` and its standard error."""
        if self.small:
            return Estimate.exact(self.to_dense().diagonal(), self.size)
        estimator = spectral.xdiag if self._fits() else spectral.hutchinson_diagonal
        return estimator(self, self.num_products, **self._options())

    def _fits(self) -> bool:
        """Return whether a sketch ``[P, num_products]`` may be kept in memory."""
        return self.size * self.num_products <= _SKETCH_LIMIT

    def _options(self) -> dict[str, Any]:
        """Return the options of every estimator."""
        return {"tolerance": self.tolerance, "generator": self.generator}

    def _value(self, estimate: Estimate, quantity: str) -> Tensor:
        """Return the estimate's value; warn if its error is too large."""
        if not estimate.converged:
            norm = torch.linalg.vector_norm
            error = norm(estimate.standard_error) / norm(estimate.value)
            warn_outside(
                f"Implicit matrix: {quantity} has a relative standard error of "
                f"{float(error):.2g} after {estimate.num_products} products "
                f"(tolerance {self.tolerance:g}); "
                f"raise num_products, or read the error from estimate_{quantity}()."
            )
        return estimate.value

    def _trace(self) -> Tensor:
        return self._value(self.estimate_trace(), "trace")

    def _squared_norm(self) -> Tensor:
        return self._value(self.estimate_squared_norm(), "squared_norm")

    def _logdet(self, damping: float) -> Tensor:
        return self._value(self.estimate_logdet(damping), "logdet")

    def _diagonal(self) -> Stack:
        entries = self._value(self.estimate_diagonal(), "diagonal")
        return self.space.split(entries.unsqueeze(0))

    # --------------------------------------------------------------- spectrum

    @in_full_precision
    def top_eigenpairs(self, k: int) -> Eigenpairs:
        """Return the ``k`` largest eigenpairs, with their residuals, by LOBPCG."""
        if self.small:
            return self.dense().top_eigenpairs(k)
        return spectral.lobpcg(self, k, generator=self.generator)

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        pairs = self.top_eigenpairs(k)
        return pairs.values, self.space.split(pairs.vectors.mT)

    def _eigenvalues(self) -> Tensor:
        self._require_small(
            "list of all eigenvalues",
            "use top_eigenpairs(k), ekfac.spectral.spectral_density(matrix), or "
            "structure='ekfac'",
        )
        return self.dense().eigenvalues()

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        self._require_small("sample", "use structure='ekfac', 'kfac' or 'low_rank'")
        return self.dense()._inverse_root(stack, damping)

    def _power_matrix(self, exponent: float, damping: float) -> CurvatureMatrix:
        if exponent == -1:
            return self._derived(lambda columns: self.solve(columns, damping))
        if exponent >= 0 and exponent == int(exponent):
            return self._derived(
                lambda columns: self._repeated(columns, int(exponent), damping)
            )
        self._require_small(
            f"power {exponent}", "use structure='ekfac', 'kfac' or 'low_rank'"
        )
        return self.dense().power(exponent, damping)

    def _repeated(self, columns: Tensor, times: int, damping: float) -> Tensor:
        """Return ``(F + damping I)^times`` times the columns."""
        for _ in range(times):
            columns = self.multiply(columns) + damping * columns
        return columns

    def _require_small(self, operation: str, advice: str) -> None:
        """Raise ``UnsupportedOperationError`` unless the matrix may be formed."""
        if not self.small:
            self._unsupported(
                f"{operation} beyond dense_limit={self.dense_limit} rows", advice
            )

    # ---------------------------------------------------------------- algebra

    def __add__(self, other: CurvatureMatrix) -> CurvatureMatrix:
        """Return the sum with a matrix of any structure, implicit again."""
        if not isinstance(other, CurvatureMatrix):
            return NotImplemented
        self.require_same_space(other)
        dtype = torch.promote_types(self.dtype, other.dtype)
        return self.to(dtype=dtype)._sum(other.to(dtype=dtype))

    def _sum(self, other: CurvatureMatrix) -> Self:
        def multiply(columns: Tensor) -> Tensor:
            return self.multiply(columns) + other @ columns

        return self._derived(multiply, self.preconditioner)

    def _scaled(self, scalar: float) -> Self:
        scaled = None if self.preconditioner is None else self.preconditioner * scalar
        return self._derived(lambda columns: self.multiply(columns) * scalar, scaled)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        result = self._derived(
            lambda columns: function(self.multiply(columns.to(self._like)))
        )
        result._like = function(self._like)
        if self.preconditioner is not None:
            result.preconditioner = self.preconditioner._converted(function)
            result.preconditioner.outside = self.preconditioner.outside
        return result

    def _derived(
        self,
        multiply: Callable[[Tensor], Tensor],
        preconditioner: CurvatureMatrix | None = None,
    ) -> Self:
        """Return a matrix with other products and this one's settings."""
        return type(self)(
            self.space,
            multiply,
            dtype=self.dtype,
            device=self.device,
            preconditioner=preconditioner,
            num_products=self.num_products,
            tolerance=self.tolerance,
            dense_limit=self.dense_limit,
            generator=self.generator,
        )

    def _state(self) -> dict[str, Any]:
        self._unsupported(
            "state to save", "save dense() or an estimate in another structure"
        )

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        raise AssertionError("an implicit matrix has no state")  # pragma: no cover

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        raise AssertionError("an implicit matrix has no state")  # pragma: no cover
