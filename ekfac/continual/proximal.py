"""Implicit steps on a penalty, which are stable for any strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ekfac.continual.terms import (
    Roots,
    Tensors,
    Term,
    add_,
    full_space,
    part,
)
from ekfac.matrices import CurvatureMatrix, ImplicitMatrix, LowRankMatrix
from ekfac.matrices.diagonalised import DiagonalisedMatrix
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
    """Return ``-(F + I / step)^-1 F d``, in the eigenbasis.

    A solve would amplify the rounding of ``F d`` where ``F`` is zero.
    """
    if step == 0:
        return {}
    term, matrix = member
    offset = term.offset(matrix, values)
    if isinstance(matrix, DiagonalisedMatrix):
        shares = -_shares(matrix._values(), step)
        return matrix._on_stack(lambda stack: matrix._apply(stack, shares), offset)
    if isinstance(matrix, LowRankMatrix):
        eigenvalues, basis = matrix._spectrum()
        inside = basis.mT @ matrix.space.flat(offset)
        return matrix.space.vector(-basis @ (_shares(eigenvalues, step) * inside))
    return -matrix.solve(matrix @ offset, 1 / step)


def _shares(eigenvalues: Tensor, step: float) -> Tensor:
    """Return ``s / (s + 1 / step)``, zero for rounding errors below zero."""
    s = eigenvalues.clamp(min=0)
    return torch.where(s > 0, s / (s + 1 / step), torch.zeros_like(s))


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
            for name, tensor in Term.weighed(matrix, inside, roots).items():
                add_(result, name, tensor, like[name])
        return ParameterVector({name: result[name] for name in names})

    total = ImplicitMatrix.from_matvec(
        space, multiply, dtype=first.dtype, device=first.device
    )
    return -total.solve(ParameterVector({n: gradient[n] for n in names}), 1 / step)
