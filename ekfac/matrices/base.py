"""The interface of curvature matrices, and what a structure implements for it.

A structure covers all or some entries of a vector. Its operations are the methods of
:class:`Structure` that begin with an underscore. They take and return stacks of
vectors, name -> ``[k, *shape]``; results are zero on entries that are not covered.
:class:`CurvatureMatrix` makes the public operations of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from inspect import isabstract
from typing import (
    Any,
    ClassVar,
    Literal,
    NoReturn,
    TypeVar,
    cast,
    get_args,
)

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.matrices.eigen import damped_log, damped_power
from ekfac.spectral.operators import Eigenpairs, in_full_precision
from ekfac.state_schema import (
    Choice,
    Field,
    ListOf,
    MapOf,
    Number,
    Record,
    Sealed,
    entry,
    joined,
    sealed,
)
from ekfac.vectors import (
    FunctionVector,
    ParameterVector,
    Vector,
    VectorSpace,
    standard_normal,
)

Stack = dict[str, Tensor]
VectorOrTensor = TypeVar("VectorOrTensor", bound=Vector | Tensor)


class Structure(ABC):
    """The part of a curvature matrix that depends on its structure.

    Args:
        space: Names and shapes of the vectors it acts on.

    Attributes:
        kind: The structure's name.
        outside: The eigenvalue on the entries that are not covered: zero, unless the
            matrix is a power of a damped one.
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
    def dtype(self) -> torch.dtype:
        """Dtype of the results."""
        return self._tensor().dtype

    @property
    def device(self) -> torch.device:
        """Device of the matrix and of the vectors it takes."""
        return self._tensor().device

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.structure}, {self.size} x {self.size}, "
            f"covered={self.covered}, {self.dtype}, {self.device})"
        )

    # ------------------------------------------- what structures implement

    @abstractmethod
    def _tensor(self) -> Tensor:
        """Return a tensor of the matrix's dtype and device."""

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
        """Return the matrix with ``function`` applied to its floating-point tensors."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Return copies of the structure's own tensors."""

    @classmethod
    @abstractmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        """Return the matrix of a ``state`` that was checked."""

    @classmethod
    @abstractmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        """Return the schema of what ``_state`` writes."""

    # -------------------------------------------------------------- helpers

    def _unsupported(self, operation: str, advice: str) -> NoReturn:
        """Raise the error for an operation that this structure does not have."""
        article = "An" if self.structure[0] in "aeiou" else "A"
        raise UnsupportedOperationError(
            f"{article} {self.structure} matrix has no {operation}; {advice}."
        )

    def require_same_space(self, other: Structure) -> None:
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
        """Add to ``result`` the power of ``outside`` times the rest of ``stack``."""
        if self.covered == self.size:
            return result
        factor = damped_power(self._outside_value(), exponent, damping)
        outside = self._rest(stack)
        return {name: rows + factor * outside[name] for name, rows in result.items()}

    def _multiply_all(self, stack: Stack) -> Stack:
        """Return the products, outside included."""
        product = self._multiply(stack)
        if not self.outside:
            return product
        return self._with_rest(product, stack, 1, 0.0)

    def _stack(self, vector: Vector | Tensor) -> Stack:
        """Return a vector, or columns ``[P, k]``, as a stack in the matrix's dtype."""
        if not isinstance(vector, Vector | Tensor):
            raise TypeError(
                "A curvature matrix is applied to a ParameterVector or a tensor, got "
                f"{type(vector).__name__}; write a product of matrices as F @ (G @ v)."
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
        """Apply ``function`` to a vector of any form; the result has the same form."""
        stack = function(self._stack(vector))
        result: Vector | Tensor
        if isinstance(vector, Vector):
            result = type(vector)({name: stack[name][0] for name in vector})
        else:
            rows = self.space.join(stack)
            result = rows[0] if vector.dim() == 1 else rows.mT
        return cast("VectorOrTensor", result)


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

    Raises:
        StateMismatchError: By every operation on a vector: if its names or its shape
            are not the matrix's.
        TypeError: By every operation on a vector: if it is of higher precision than
            the matrix, or no vector.
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
            outside = self._rest(stack)
            value = value + self.outside * self.space.join(outside).square().sum(dim=1)
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
            ValueError: If the damped matrix is singular, or ``damping`` negative or
                not finite.
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
            generator: Source of the random numbers.

        Raises:
            ValueError: If the damped matrix is not positive definite.
            UnsupportedOperationError: If the matrix is implicit and too large.
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
        outside = self.outside**2 * (self.size - self.covered)
        return (self._squared_norm() + outside).sqrt()

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
            outside = self._rest(ones)
            stack = {n: rows + self.outside * outside[n] for n, rows in stack.items()}
        return self._vector(stack).clone()

    # ------------------------------------------------------------- spectrum

    @in_full_precision
    def eigenvalues(self) -> Tensor:
        """Return all eigenvalues, ``[P]``, ascending.

        Raises:
            UnsupportedOperationError: If the matrix is implicit and too large.
        """
        outside = self._outside_value().expand(self.size - self.covered)
        return torch.cat([self._eigenvalues(), outside]).sort().values

    @in_full_precision
    def top_eigenpairs(self, k: int) -> Eigenpairs:
        """Return the ``k`` largest eigenvalues, descending, and their eigenvectors.

        Returns:
            ``values`` ``[k]`` and ``vectors`` ``[P, k]``, orthonormal columns.

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
        """Return the sum, in the same structure and the wider dtype.

        Raises:
            StateMismatchError: If ``other`` acts on other vectors.
            UnsupportedOperationError: If the structures differ, or the structure has
                no sums.
        """
        if not isinstance(other, CurvatureMatrix):
            return NotImplemented
        if other.kind == "implicit" and self.kind != "implicit":
            return other + self
        self.require_same_space(other)
        if self.dtype != other.dtype:
            dtype = torch.promote_types(self.dtype, other.dtype)
            return self.to(dtype=dtype) + other.to(dtype=dtype)
        if self.kind != other.kind:
            self._unsupported(
                f"sum with a {other.structure} matrix",
                "wrap one of them as ImplicitMatrix.of(matrix), whose sums hold any "
                "structures",
            )
        added = self._sum(cast("Self", other))
        added.outside = self.outside + other.outside
        return added

    def __sub__(self, other: CurvatureMatrix) -> CurvatureMatrix:
        """Return the difference; it raises what the sum does."""
        if not isinstance(other, CurvatureMatrix):
            return NotImplemented
        return self + -1.0 * other

    def __mul__(self, scalar: float) -> Self:
        """Return ``scalar`` times the matrix.

        Raises:
            ValueError: If ``scalar`` is not finite.
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
        summed: CurvatureMatrix = self * weights[0]
        for other, weight in zip(others, weights[1:], strict=True):
            summed = summed + other * weight
        return cast("Self", summed)

    def is_finite(self) -> bool:
        """Return whether all tensors of the matrix are finite."""
        good = True

        def visit(tensor: Tensor) -> Tensor:
            nonlocal good
            good = good and bool(torch.isfinite(tensor).all())
            return tensor

        self._converted(visit)
        return good

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return copies as plain tensors and containers.

        ``torch.save`` saves them, and ``weights_only=True`` loads them.

        Raises:
            UnsupportedOperationError: If the matrix is implicit.
        """
        shapes = {name: list(shape) for name, shape in self.space.shapes.items()}
        return sealed(
            {
                "kind": self.kind,
                "space": self.space.vector_type.__name__,
                "shapes": shapes,
                "outside": self.outside,
                **self._state(),
            }
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the matrix that ``state_dict()`` was called on.

        Raises:
            StateMismatchError: If the state is of another structure, or damaged; the
                message names the entry.
        """
        Choice(cls.kind).check(entry(state, "", "kind"), "kind")
        check_state(state)
        return cast("Self", restored(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values and the dtype of ``state``; the device stays.

        Raises:
            StateMismatchError: If the state is of another structure or another space,
                or damaged; the message names the entry, and the matrix is unchanged.
        """
        loaded = self.from_state(state)
        self.require_same_space(loaded)
        if loaded.structure != self.structure:
            raise StateMismatchError(
                f"The state is of a {loaded.structure} matrix, this one is "
                f"{self.structure}; use ekfac.matrices.from_state_dict(state)."
            )
        # Attributes are replaced: live factors are not written to.
        self.__dict__.update(loaded.to(device=self.device).__dict__)


def check_damping(damping: float) -> None:
    """Raise ``ValueError`` unless ``damping`` is a finite number, zero or more."""
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be finite and at least 0, got {damping}.")


def merge(
    matrices: Sequence[CurvatureMatrix], num_examples: Sequence[float]
) -> CurvatureMatrix:
    """Return the estimate over all the examples of several estimates.

    Every matrix is a mean over examples, so the merged one is their mean weighted by
    the numbers of examples. K-FAC matrices merge by averaging their factors, which
    gives the factors of the union of the data, not a sum of Kronecker products. EKFAC
    matrices must share their basis.

    Args:
        matrices: Estimates of one structure over one space.
        num_examples: How many examples each was made of.

    Raises:
        ValueError: If there are no matrices, another number of counts, or a count is
            negative or not finite, or all are zero.
        StateMismatchError: If the matrices act on different vectors.
        UnsupportedOperationError: If the structures differ or do not merge.
    """
    weights = [float(count) for count in num_examples]
    if not matrices or len(matrices) != len(weights):
        raise ValueError(
            f"merge needs as many example counts as matrices and at least one, got "
            f"{len(matrices)} matrices and {len(weights)} counts."
        )
    finite = all(math.isfinite(weight) for weight in weights)
    if not finite or min(weights) < 0 or sum(weights) == 0:
        raise ValueError(
            "Example counts must be finite and at least 0, and their sum must be "
            f"positive, got {list(num_examples)}."
        )
    first, *others = matrices
    for other in others:
        first.require_same_space(other)
        if other.kind != first.kind:
            first._unsupported(
                f"merge with a {other.structure} matrix",
                "estimate all of them with the same structure",
            )
    merged = first._merged(others, [weight / sum(weights) for weight in weights])
    merged.outside = sum(
        matrix.outside * weight / sum(weights)
        for matrix, weight in zip(matrices, weights, strict=True)
    )
    return merged


def from_state_dict(state: Mapping[str, Any]) -> CurvatureMatrix:
    """Return the matrix that ``state_dict()`` was called on.

    Raises:
        StateMismatchError: If ``state`` is not the state of a curvature matrix, or
            damaged; the message names the entry.
    """
    check_state(state)
    return restored(state)


def restored(state: Mapping[str, Any]) -> CurvatureMatrix:
    """Return the matrix of a state that was checked."""
    cls = _kinds()[state["kind"]]
    matrix = cls._from_state(_space_of(state), state)
    matrix.outside = float(state["outside"])
    return matrix


def check_state(state: Any, key: str = "") -> None:
    """Check every entry of the state of a matrix.

    Raises:
        StateMismatchError: With the entry, its value and what is allowed.
    """
    kinds = _kinds()
    head: dict[str, Field] = {
        "kind": Choice(*sorted(set(kinds) - {"implicit"})),
        "space": Choice(*_VECTOR_TYPES),
        "shapes": MapOf(ListOf(Number(int, minimum=0))),
        "outside": Number(float),
    }
    Record(head, more=True).check(state, key)
    space = _space_of(state)
    schema = kinds[state["kind"]]._schema(space, state, key)
    fields = head | dict(schema.fields)
    Sealed(fields, same_dtype=schema.same_dtype, rules=schema.rules).check(state, key)
    if state["outside"] and _covered(state) == space.size:
        actual, expected = f"{state['outside']:g}", "0 where nothing is outside"
        raise StateMismatchError.at(joined(key, "outside"), actual, expected)


def _covered(state: Mapping[str, Any]) -> int:
    """Return the number of entries that the matrix of a checked state covers."""
    if "blocks" in state:
        return sum(map(_covered, state["blocks"].values()))
    positions = state.get("positions")
    return _space_of(state).size if positions is None else int(positions.numel())


def _space_of(state: Mapping[str, Any]) -> VectorSpace:
    """Return the vector space of a state."""
    return VectorSpace(state["shapes"], _VECTOR_TYPES[state["space"]])


class MatrixField(Field):
    """A field that holds the state of a matrix."""

    def check(self, value: Any, key: str = "") -> None:
        """Check it, see :func:`check_state`."""
        check_state(value, key)


def _kinds() -> dict[str, type[CurvatureMatrix]]:
    """Return the structures by their ``kind``."""
    kinds: dict[str, type[CurvatureMatrix]] = {}
    pending: list[Any] = [CurvatureMatrix]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if not isabstract(cls):
            kinds[cls.kind] = cls
    return kinds
