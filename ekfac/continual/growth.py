"""Matrices of layers that have grown since: new rows and columns without curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.matrices import (
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    IndexPacking,
    KFACMatrix,
    KroneckerFactors,
    LowRankMatrix,
)
from ekfac.vectors import VectorSpace


def expanded(matrix: CurvatureMatrix, like: CurvatureMatrix) -> CurvatureMatrix | None:
    """Return ``matrix`` in the larger space of ``like``, zero for what is new.

    Args:
        matrix: Of a layer before it grew.
        like: Of the same structure, of the layer as it is now.

    Returns:
        ``None`` if its rows and columns are not rows and columns of the larger layer.
    """
    if matrix.space == like.space:
        return matrix
    place = _positions(matrix.space, like.space)
    if place is None or type(matrix) is not type(like):
        return None
    space = like.space
    if isinstance(matrix, DiagonalMatrix):
        flat = matrix.entries.flat()
        whole = flat.new_zeros(space.size).index_copy(0, place.to(flat.device), flat)
        return DiagonalMatrix(space.vector(whole))
    if isinstance(matrix, DenseMatrix):
        old, index = matrix.matrix, place.to(matrix.device)
        dense = old.new_zeros(space.size, space.size)
        dense[index.unsqueeze(1), index] = old
        return DenseMatrix(space, dense)
    if isinstance(matrix, LowRankMatrix):
        rows = matrix.rows.new_zeros(len(matrix.rows), space.size)
        rows[:, place.to(rows.device)] = matrix.rows
        return LowRankMatrix(space, rows, weights=matrix.weights)
    if isinstance(matrix, (KFACMatrix, EKFACMatrix)):
        assert isinstance(like, (KFACMatrix, EKFACMatrix))
        return _expanded_kronecker(matrix, like, place)
    return None


def _positions(old: VectorSpace, new: VectorSpace) -> Tensor | None:
    """Return where the entries of the flat ``old`` vectors are in ``new`` ones."""
    index = new.vector(torch.arange(new.size))
    parts = []
    for name, shape in old.shapes.items():
        if name not in new.shapes or index[name].dim() != len(shape):
            return None
        if any(now < then for now, then in zip(new.shapes[name], shape, strict=True)):
            return None
        parts.append(index[name][tuple(slice(0, n) for n in shape)].reshape(-1))
    return torch.cat(parts)


def _expanded_kronecker(
    matrix: KFACMatrix | EKFACMatrix, like: KFACMatrix | EKFACMatrix, place: Tensor
) -> CurvatureMatrix | None:
    new = IndexPacking.of(like.packing, like.space)
    old = IndexPacking.of(matrix.packing, matrix.space)
    where = torch.full((like.size,), -1)
    where[new.positions.flatten().cpu()] = torch.arange(new.positions.numel())
    entries = where[place[old.positions.cpu()]]
    b, d_out, d_in = new.positions.shape
    block, row = entries // (d_out * d_in), entries // d_in % d_out
    column = entries % d_in
    blocks, rows, columns = block[:, 0, 0], row[0, :, 0], column[0, 0, :]
    regular = (
        bool((entries >= 0).all())
        and torch.equal(block, blocks[:, None, None].expand_as(block))
        and torch.equal(row, rows[None, :, None].expand_as(row))
        and torch.equal(column, columns[None, None, :].expand_as(column))
    )
    if not regular:
        return None
    sides = {"A": (columns, d_in), "G": (rows, d_out)}
    factors = {}
    for name, factor in matrix._factors().items():
        if name == "s":
            grown = factor.new_zeros(len(factor), d_out, d_in)
            grown[:, rows[:, None], columns] = factor
        else:
            index, size = sides[name[-1]]
            grown = _padded(factor, index, size, identity=name.startswith("Q"))
        shared = len(factor) == 1 < len(blocks)
        if b > len(blocks) and not shared:
            grown = _spread(grown, blocks, b, identity=name.startswith("Q"))
        factors[name] = grown
    packing = IndexPacking(like.space, new.positions)
    return type(matrix)(KroneckerFactors(packing, **factors), like.space)


def _spread(factor: Tensor, blocks: Tensor, count: int, *, identity: bool) -> Tensor:
    """Return a factor of ``count`` blocks, zero or the identity in new ones."""
    whole = factor.new_zeros(count, *factor.shape[1:])
    if identity:
        whole += torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    whole[blocks.to(factor.device)] = factor
    return whole


def _padded(factor: Tensor, index: Tensor, size: int, *, identity: bool) -> Tensor:
    """Return a factor or basis at ``index``, with zeros or the identity elsewhere."""
    index = index.to(factor.device)
    if factor.dim() == 2:
        grown = factor.new_zeros(len(factor), size)
        grown[:, index] = factor
        return grown
    grown = factor.new_zeros(len(factor), size, size)
    if identity:
        grown += torch.eye(size, dtype=factor.dtype, device=factor.device)
    grown[:, index[:, None], index] = factor
    return grown
