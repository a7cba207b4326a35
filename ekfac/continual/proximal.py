"""Implicit steps on a penalty, which are stable for any strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ekfac.continual.terms import (
    Roots,
    Tensors,
    Term,
    add_,
    full_space,
    multiplied,
    part,
)
from ekfac.matrices import (
    CurvatureMatrix,
    EKFACMatrix,
    ImplicitMatrix,
    KFACMatrix,
    KroneckerFactors,
)
from ekfac.vectors import ParameterVector, Vector

Members = Sequence[tuple[Term, CurvatureMatrix]]


def proximal_moves(
    terms: Sequence[Term], values: Tensors, step: float, roots: Roots
) -> dict[str, Tensor]:
    """Return how the parameters move in an implicit step of size ``step``.

    Args:
        terms: The penalty.
        values: The parameters.
        step: Learning rate times strength, positive.
        roots: Multipliers by parameter name, see :meth:`Term.product`.
    """
    layers: dict[str, list[tuple[Term, CurvatureMatrix]]] = {}
    for term in terms:
        for key, matrix in term.matrices():
            layers.setdefault(key, []).append((term, matrix))
    moves: dict[str, Tensor] = {}
    for members in layers.values():
        names = dict.fromkeys(n for _, matrix in members for n in matrix.space.names)
        found = roots(names)
        factors = {found.get(name, 1.0) ** 2 for name in names}
        if len(members) == 1 and len(factors) == 1:
            move = _closed_form(members[0], values, step * factors.pop())
        else:
            move = _solved(members, values, step, roots)
        for name, tensor in move.items():
            add_(moves, name, tensor, values[name])
    return moves


def _closed_form(
    member: tuple[Term, CurvatureMatrix], values: Tensors, step: float
) -> Mapping[str, Tensor]:
    """Return ``-(F + I / step)^-1 F d``."""
    if step == 0:
        return {}
    term, matrix = member
    if isinstance(matrix, KFACMatrix):
        matrix = _non_negative(matrix)
    return -matrix.solve(matrix @ term.offset(matrix, values), 1 / step)


def _non_negative(matrix: KFACMatrix) -> EKFACMatrix:
    """Return a K-FAC matrix in its eigenbasis, without eigenvalues below zero.

    Rounding leaves some; divided by a tiny ``1 / step`` they would count.
    """
    found = matrix.power(1.0)
    assert isinstance(found, EKFACMatrix)
    layer, s = found.layer, found.factor("s").clamp(min=0)
    factors = KroneckerFactors(matrix.packing, Q_A=layer.Q_A, Q_G=layer.Q_G, s=s)
    return EKFACMatrix(factors, matrix.space)


def _solved(
    members: Members, values: Tensors, step: float, roots: Roots
) -> Mapping[str, Tensor]:
    """Return ``-(sum F + I / step)^-1 sum F d``, by conjugate gradients."""
    names = dict.fromkeys(n for _, matrix in members for n in matrix.space.names)
    space = full_space(values, names)
    first = members[0][1]
    like = {n: values[n].to(first.dtype) for n in names}
    gradient: dict[str, Tensor] = {}
    for term, matrix in members:
        for name, grad in term.product(matrix, values, roots)[1].items():
            add_(gradient, name, grad, like[name])

    def multiply(vector: Vector) -> ParameterVector:
        result: dict[str, Tensor] = {}
        for _, matrix in members:
            shapes = matrix.space.shapes.items()
            inside = ParameterVector({n: part(vector[n], s, n) for n, s in shapes})
            found = roots(inside)
            product = matrix @ multiplied(inside, found)
            for name, tensor in multiplied(product, found).items():
                add_(result, name, tensor, like[name])
        return ParameterVector({name: result[name] for name in names})

    total = ImplicitMatrix.from_matvec(
        space, multiply, dtype=first.dtype, device=first.device
    )
    return -total.solve(ParameterVector({n: gradient[n] for n in names}), 1 / step)
