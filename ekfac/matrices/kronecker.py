"""K-FAC and EKFAC matrices: the factors of one layer, and the algebra on them.

A factor of rank 3 is dense, ``[b, d, d]``. One of rank 2 is diagonal, ``[b, d]``; its
basis is the identity, written ``None``. The input factor may have one block for all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac.errors import NotReadyError
from ekfac.kernels.linalg import rotate_matrix
from ekfac.matrices.base import Stack
from ekfac.matrices.dense import DiagonalisedMatrix
from ekfac.matrices.eigen import CachedEigh, cross_terms, damped_power, damping_ratio
from ekfac.matrices.packing import (
    IndexPacking,
    PackedMatrix,
    Packing,
    Positions,
    packed_shape,
)
from ekfac.state_schema import (
    Choice,
    Field,
    ListOf,
    Record,
    TensorField,
    entry,
    joined,
    sizes,
)
from ekfac.vectors import VectorSpace


class Factors(Protocol):
    """The factors of one layer; ``None``: not computed, or the identity basis."""

    @property
    def A(self) -> Tensor | None:
        """Input factor, ``[b or 1, d_in, d_in]`` or ``[b or 1, d_in]``."""

    @property
    def G(self) -> Tensor | None:
        """Output-gradient factor, ``[b, d_out, d_out]`` or ``[b, d_out]``."""

    @property
    def Q_A(self) -> Tensor | None:
        """Eigenvectors of ``A`` in columns."""

    @property
    def Q_G(self) -> Tensor | None:
        """Eigenvectors of ``G`` in columns."""

    @property
    def s(self) -> Tensor | None:
        """Scalings in the basis, ``[b, d_out, d_in]``."""


class LayerFactors(Factors, Packing, Protocol):
    """The factors of one layer and its packing: :class:`Factors`, :class:`Packing`."""


@dataclass(frozen=True)
class KroneckerFactors:
    """The factors of one layer as plain tensors, a :class:`LayerFactors`.

    Attributes:
        packing: How the layer's parameters fill the matrices.
        A: Input factor, ``[b or 1, d_in, d_in]``, or ``[b or 1, d_in]`` if diagonal.
        G: Output-gradient factor, ``[b, d_out, d_out]``, or ``[b, d_out]`` if diagonal.
        Q_A: Eigenvectors of ``A`` in columns.
        Q_G: Eigenvectors of ``G`` in columns.
        s: Scalings in the basis, ``[b, d_out, d_in]``.
    """

    packing: Packing
    A: Tensor | None = None
    G: Tensor | None = None
    Q_A: Tensor | None = None
    Q_G: Tensor | None = None
    s: Tensor | None = None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Qualified names of the layer's parameters."""
        return self.packing.parameter_names

    def pack(self, tensors: Mapping[str, Tensor], /) -> Tensor:
        """Return ``[b, d_out, d_in]`` of the parameters by name."""
        return self.packing.pack(tensors)

    def unpack(self, matrix: Tensor, /) -> dict[str, Tensor]:
        """Return the parameters by name of ``[b, d_out, d_in]``."""
        return self.packing.unpack(matrix)


class KroneckerMatrix(PackedMatrix, DiagonalisedMatrix):
    """The block of one layer in a Kronecker-factored eigenbasis.

    ``V -> Q_G (values * (Q_G^T V Q_A)) Q_A^T`` for the layer's parameters packed as
    ``V`` ``[b, d_out, d_in]``. Every operation reads the factors from ``layer``, so a
    matrix over live factors follows them; its powers, sums, multiples and conversions
    do not.

    Args:
        layer: The factors and the packing.
        space: The layer's parameters. Default: as ``layer`` unpacks them.

    Raises:
        NotReadyError: If the factors that the structure needs were not computed yet.
    """

    factor_names: ClassVar[tuple[str, ...]]

    def __init__(self, layer: LayerFactors, space: VectorSpace | None = None) -> None:
        self.layer = layer
        super().__init__(layer, self._shape_of_factors(), space)

    def factor(self, name: str) -> Tensor:
        """Return the layer's factor ``name``.

        Raises:
            NotReadyError: If it was not computed yet.
        """
        value = getattr(self.layer, name)
        if value is None:
            raise NotReadyError(
                f"{name} of the layer with parameters "
                f"{list(self.layer.parameter_names)} was not computed yet; take the "
                f"statistics that structure={self.kind!r} needs first."
            )
        assert isinstance(value, Tensor)
        return value

    @abstractmethod
    def _shape_of_factors(self) -> tuple[int, int, int]:
        """Return ``(b, d_out, d_in)``."""

    @abstractmethod
    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """Return ``Q_G`` and ``Q_A``."""

    def coordinates(self, stack: Stack) -> Tensor:
        """Return ``Q_G^T V Q_A``, ``[k, b, d_out, d_in]``."""
        Q_G, Q_A = self.bases()
        return rotate_matrix(self._pack(stack), Q_G, Q_A)

    def _vectors(self, coordinates: Tensor) -> Stack:
        """Return the stack of ``Q_G C Q_A^T``."""
        return self._unpack(rotate_matrix(coordinates, *self.bases(), back=True))

    def _diagonal(self) -> Stack:
        """Return ``(Q_G o Q_G) values (Q_A o Q_A)^T``, unpacked."""
        squares = [None if Q is None else Q.square() for Q in self.bases()]
        values = self._values().unsqueeze(0)
        return self._unpack(rotate_matrix(values, *squares, back=True))

    def _factors(self) -> dict[str, Tensor]:
        """Return the factors that the structure uses, by name.

        Live ones are copied: a matrix made of some of them and of new tensors must not
        follow those alone.
        """
        live = not isinstance(self.layer, KroneckerFactors)
        named = {name: getattr(self.layer, name) for name in self.factor_names}
        return {
            name: value.clone() if live else value
            for name, value in named.items()
            if value is not None
        }

    def with_factors(self, factors: Mapping[str, Tensor]) -> Self:
        """Return the matrix of the same layer with other factors."""
        return type(self)(KroneckerFactors(self.packing, **factors), self.space)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self.with_factors({n: function(f) for n, f in self._factors().items()})

    def _state(self) -> dict[str, Any]:
        factors = {n: factor.detach().clone() for n, factor in self._factors().items()}
        sides = zip(("G", "A"), self.bases(), strict=True)
        return {
            "factors": factors,
            "diagonal": [side for side, basis in sides if basis is None],
            "positions": self._positions(),
        }

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        shape = packed_shape(space, state, key)
        diagonal = ListOf(Choice("A", "G"))
        diagonal.check(entry(state, key, "diagonal"), joined(key, "diagonal"))
        factors = entry(state, key, "factors")
        Record({}, more=True).check(factors, joined(key, "factors"))
        fields: dict[str, Field] = {}
        for name in cls.factor_names:
            if name == "s":
                fields[name] = TensorField(shape)
                continue
            side, is_basis = name[-1], name.startswith("Q")
            d = shape[2] if side == "A" else shape[1]
            one_block = side == "A" and sizes(factors.get(name))[:1] == (1,)
            b = 1 if one_block else shape[0]
            if side not in state["diagonal"]:
                fields[name] = (
                    TensorField((b, d, d), orthonormal=True)
                    if is_basis
                    else TensorField((b, d, d), symmetric=True, indefinite=True)
                )
            elif not is_basis:
                fields[name] = TensorField((b, d))
        return Record(
            {
                "factors": Record(fields, same_dtype=[tuple(fields)]),
                "diagonal": diagonal,
                "positions": Positions(shape),
            }
        )

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        packing = IndexPacking(space, state["positions"])
        return cls(KroneckerFactors(packing, **state["factors"]), space)


class EKFACMatrix(KroneckerMatrix):
    """The block ``V -> Q_G (s * (Q_G^T V Q_A)) Q_A^T`` (George et al. 2018).

    With scalings estimated on the same examples its trace is exact and it is never
    further from the Fisher than K-FAC in Frobenius norm (ibid., Theorem 2). Matrices in
    the same basis add and merge.

    Args:
        layer: The basis ``Q_A``, ``Q_G``, the scalings ``s`` and the packing.
        space: The layer's parameters. Default: as ``layer`` unpacks them.

    Raises:
        NotReadyError: If the basis or the scalings were not computed yet.
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
        """Return the scalings, zero where they are just squares of rounding errors.

        In a direction that no gradient has, a gradient's coordinate is the rounding of
        a sum of ``d_out d_in`` products.
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
        bases, others = self.bases(), other.bases()
        if not all(same_basis(p, q) for p, q in zip(bases, others, strict=True)):
            self._unsupported(
                "sum with one in another basis",
                "estimate both in one basis, or use ImplicitMatrix.of(matrix), whose "
                "sums hold any structures",
            )
        return self.with_scalings(self._values() + other._values())

    def _scaled(self, scalar: float) -> Self:
        return self.with_scalings(self._values() * scalar)


class KFACMatrix(KroneckerMatrix):
    """The block ``V -> G V A`` of one layer (Martens & Grosse 2015).

    Damping is exact: it is added to the products of the factors' eigenvalues. A sum of
    Kronecker products is not one, so K-FAC matrices do not add; estimates over several
    sets of examples merge by their factors (:func:`ekfac.matrices.merge`).

    Args:
        layer: The factors ``A`` and ``G`` and the packing.
        space: The layer's parameters. Default: as ``layer`` unpacks them.

    Raises:
        NotReadyError: If a factor was not computed yet.
    """

    kind = "kfac"
    factor_names = ("A", "G")

    def __init__(self, layer: LayerFactors, space: VectorSpace | None = None) -> None:
        super().__init__(layer, space)
        self._eigh = {"A": CachedEigh(), "G": CachedEigh()}

    def _shape_of_factors(self) -> tuple[int, int, int]:
        A, G = self.factor("A"), self.factor("G")
        return G.shape[0], G.shape[1], A.shape[1]

    def _tensor(self) -> Tensor:
        return self.factor("A")

    def _spectrum(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the eigenvalues ``[b or 1, d]`` and the basis of a factor."""
        factor = self.factor(name)
        return self._eigh[name](factor) if factor.dim() == 3 else (factor, None)

    def _values(self) -> Tensor:
        values_G, values_A = self._spectrum("G")[0], self._spectrum("A")[0]
        return values_G.unsqueeze(-1) * values_A.unsqueeze(-2)

    def bases(self) -> tuple[Tensor | None, Tensor | None]:
        """Return ``Q_G`` and ``Q_A``, ``None`` for a diagonal factor's identity."""
        return self._spectrum("G")[1], self._spectrum("A")[1]

    def _multiply(self, stack: Stack) -> Stack:
        packed = self._pack(stack)
        product = scaled_by_factors(packed, self.factor("G"), self.factor("A"))
        return self._unpack(product)

    def _quadratic(self, stack: Stack) -> Tensor:
        packed = self._pack(stack)
        product = scaled_by_factors(packed, self.factor("G"), self.factor("A"))
        return (packed * product).flatten(1).sum(dim=1)

    def _solve_factored(self, stack: Stack, damping: float) -> Stack:
        """Return ``(G + sqrt(damping) / pi I)^-1 V (A + pi sqrt(damping) I)^-1``.

        ``pi`` is :func:`ekfac.matrices.eigen.damping_ratio` of the factors.
        """
        values_G, values_A = self._spectrum("G")[0], self._spectrum("A")[0]
        means = (values.mean(dim=-1, keepdim=True) for values in (values_A, values_G))
        cross = cross_terms(values_A, values_G, damping_ratio(*means).unsqueeze(-1))
        damped = self._values() + damping + damping**0.5 * cross
        return self._apply(stack, damped_power(damped, -1, 0.0))

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
        averages = {}
        for name in ("A", "G"):
            terms = [m.factor(name) * w for m, w in zip(matrices, weights, strict=True)]
            averages[name] = torch.stack(terms).sum(dim=0)
        return self.with_factors(averages)

    def _scaled(self, scalar: float) -> Self:
        A, G = self.factor("A"), self.factor("G") * scalar
        return self.with_factors({"A": A, "G": G})


def scaled_by_factors(matrices: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """Return ``G @ matrices @ A`` for dense or diagonal symmetric factors.

    Args:
        matrices: ``[k, b, d_out, d_in]``.
        G: ``[b, d_out, d_out]`` or ``[b, d_out]``.
        A: ``[b or 1, d_in, d_in]`` or ``[b or 1, d_in]``.
    """
    matrices = G @ matrices if G.dim() == 3 else G.unsqueeze(-1) * matrices
    return matrices @ A if A.dim() == 3 else matrices * A.unsqueeze(-2)


def factor_diagonal(factor: Tensor) -> Tensor:
    """Return the diagonal ``[b, d]`` of a dense or diagonal factor."""
    return factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)


def same_basis(first: Tensor | None, second: Tensor | None) -> bool:
    """Return whether two bases are equal entry by entry."""
    if first is None or second is None:
        return first is second
    return first is second or torch.equal(first, second)
