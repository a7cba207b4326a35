"""What a structure implements, and what it is given for that.

A structure acts on the entries of a vector that it covers, all of them or some. Its
operations are the methods here whose names begin with an underscore. Vectors travel
through them in stacks, name -> ``[k, *shape]``; results are zero outside of what is
covered. :class:`ekfac.matrices.base.CurvatureMatrix` makes the public operations of
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.matrices.eigen import damped_power
from ekfac.vectors import Vector, VectorSpace

if TYPE_CHECKING:
    from typing_extensions import Self

    from ekfac.matrices.base import CurvatureMatrix

Stack = dict[str, Tensor]
VectorOrTensor = TypeVar("VectorOrTensor", bound=Vector | Tensor)


class Structure(ABC):
    """The part of a curvature matrix that depends on its structure.

    Args:
        space: Names and shapes of the vectors it acts on.

    Attributes:
        kind: The structure's name.
        outside: The multiple of the identity that the matrix is on the entries that
            are not covered: zero, unless it is a power of a damped matrix.
    """

    kind: ClassVar[str]

    def __init__(self, space: VectorSpace) -> None:
        self.space = space
        self.outside = 0.0

    # ----------------------------------------------------------- what it is

    @property
    def structure(self) -> str:
        """The structure's name, as in ``ekfac.fisher(structure=...)``."""
        return self.kind

    @property
    def size(self) -> int:
        """Number of rows, ``P``."""
        return self.space.size

    @property
    def shape(self) -> torch.Size:
        """``[P, P]``."""
        return torch.Size((self.size, self.size))

    @property
    def covered(self) -> int:
        """Number of entries of a vector that the structure covers."""
        return self.size

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the results."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the matrix and of the vectors it takes."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.structure}, {self.size} x {self.size}, "
            f"covered={self.covered}, {self.dtype}, {self.device})"
        )

    # ------------------------------------------- what structures implement

    @abstractmethod
    def _multiply(self, stack: Stack) -> Stack:
        """Return the products, zero outside."""

    def _project(self, stack: Stack) -> Stack:
        """Return the part of ``stack`` in the covered entries."""
        return stack

    def _quadratic(self, stack: Stack) -> Tensor:
        """Return the quadratic forms, ``[k]``."""
        product = self._multiply(stack)
        terms = {name: rows * product[name] for name, rows in stack.items()}
        return self.space.join(terms).sum(dim=1)

    @abstractmethod
    def _solve(self, stack: Stack, damping: float) -> Stack:
        """Return the solutions, zero outside."""

    def _solve_factored(self, stack: Stack, damping: float) -> Stack:
        """Return the solutions with factored damping, zero outside."""
        self._unsupported("damping_split='factored'", "use structure='kfac'")

    @abstractmethod
    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        """Return ``R v``, zero outside, with ``R R^T = (F + damping I)^-1``."""

    @abstractmethod
    def _trace(self) -> Tensor:
        """Return the trace of the covered part, 0-d."""

    @abstractmethod
    def _squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the covered part, 0-d."""

    @abstractmethod
    def _logdet(self, damping: float) -> Tensor:
        """Return the log-determinant of the covered part, damped, 0-d."""

    @abstractmethod
    def _diagonal(self) -> Stack:
        """Return the diagonal as a stack of one, zero outside."""

    @abstractmethod
    def _eigenvalues(self) -> Tensor:
        """Return the eigenvalues of the covered part, in any order."""

    @abstractmethod
    def _top(self, k: int) -> tuple[Tensor, Stack]:
        """Return the ``k`` largest eigenvalues ``[k]`` and their eigenvectors."""

    @abstractmethod
    def _power_matrix(self, exponent: float, damping: float) -> CurvatureMatrix:
        """Return the power of the covered part."""

    @abstractmethod
    def _sum(self, other: Self) -> Self:
        """Return the sum with a matrix of the same structure and space."""

    @abstractmethod
    def _scaled(self, scalar: float) -> Self:
        """Return ``scalar`` times the covered part."""

    @abstractmethod
    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the matrix whose floating point tensors ``function`` maps."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return copies of the structure's own tensors."""

    @classmethod
    @abstractmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        """Return the matrix with the tensors of ``state``."""

    # -------------------------------------------------------------- helpers

    def _unsupported(self, operation: str, advice: str) -> NoReturn:
        """Raise the error for what this structure cannot do."""
        article = "An" if self.structure[0] in "aeiou" else "A"
        raise UnsupportedOperationError(
            f"{article} {self.structure} matrix has no {operation}; {advice}."
        )

    def _require_same_space(self, other: Structure) -> None:
        """Raise ``StateMismatchError`` unless ``other`` acts on the same vectors."""
        if self.space != other.space:
            probe = {
                n: torch.empty(s, device="meta") for n, s in other.space.shapes.items()
            }
            self.space.require(probe, "The other matrix")
            raise StateMismatchError(
                f"The matrices order their vectors differently: {self.space} and "
                f"{other.space}; build both from the same model."
            )

    def _outside_value(self) -> Tensor:
        """Return the eigenvalue outside, ``[1]``."""
        return torch.full((1,), self.outside, dtype=self.dtype, device=self.device)

    def _rest(self, stack: Stack) -> Stack:
        """Return the part of ``stack`` outside the covered entries."""
        inside = self._project(stack)
        return {name: rows - inside[name] for name, rows in stack.items()}

    def _with_rest(
        self, result: Stack, stack: Stack, exponent: float, damping: float
    ) -> Stack:
        """Add to ``result`` the power of what lies outside, times ``stack``."""
        if self.covered == self.size:
            return result
        factor = damped_power(self._outside_value(), exponent, damping)
        rest = self._rest(stack)
        return {name: rows + factor * rest[name] for name, rows in result.items()}

    def _multiply_all(self, stack: Stack) -> Stack:
        """Return the products, outside included."""
        product = self._multiply(stack)
        if not self.outside:
            return product
        return self._with_rest(product, stack, 1, 0.0)

    def _stack(self, vector: Vector | Tensor) -> Stack:
        """Return a vector or columns ``[P, k]`` as a stack in the matrix's dtype."""
        if not isinstance(vector, Vector | Tensor):
            raise TypeError(
                f"A curvature matrix is applied to a ParameterVector or a tensor, got "
                f"{type(vector).__name__}; products of matrices are F @ (G @ v)."
            )
        if torch.promote_types(vector.dtype, self.dtype) != self.dtype:
            raise TypeError(
                f"The vector is {vector.dtype} and the matrix {self.dtype}; convert "
                "one of them with .to(dtype=...)."
            )
        if isinstance(vector, Vector):
            self.space.require(vector)
            return {n: vector[n].to(self.dtype).unsqueeze(0) for n in self.space.names}
        if vector.dim() not in (1, 2) or vector.shape[0] != self.size:
            raise StateMismatchError(
                f"A flat vector for this matrix has shape [{self.size}] or "
                f"[{self.size}, k], got {list(vector.shape)}."
            )
        rows = vector.unsqueeze(0) if vector.dim() == 1 else vector.mT
        return self.space.split(rows.to(self.dtype))

    def _vector(self, stack: Stack) -> Vector:
        """Return the first vector of a stack, in the space's order."""
        return self.space.vector_type({n: stack[n][0] for n in self.space.names})

    def _on_stack(
        self, function: Callable[[Stack], Stack], vector: VectorOrTensor
    ) -> VectorOrTensor:
        """Apply ``function`` to a vector in whatever form, and return that form."""
        stack = function(self._stack(vector))
        result: Vector | Tensor
        if isinstance(vector, Vector):
            result = type(vector)({name: stack[name][0] for name in vector})
        else:
            rows = self.space.join(stack)
            result = rows[0] if vector.dim() == 1 else rows.mT
        return cast("VectorOrTensor", result)
