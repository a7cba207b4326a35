"""Merging of the curvatures of several tasks into one matrix.

A sum of diagonal, dense or low-rank matrices has the same structure. A sum of
Kronecker products has not: it is approximated. Matrices of layers that have grown are
padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeGuard, get_args

import torch
from torch import Tensor

from ekfac.curvature.eigenbasis import transport
from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.matrices import (
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    ImplicitMatrix,
    IndexPacking,
    KFACMatrix,
    KroneckerFactors,
    LowRankMatrix,
)
from ekfac.matrices.eigen import damping_ratio, symmetric_eigh
from ekfac.vectors import VectorSpace

Merge = Literal[
    "auto", "exact", "pooled", "nearest", "optimal", "joint_basis", "first_basis"
]
_KFAC, _EKFAC = ("pooled", "nearest", "optimal"), ("joint_basis", "first_basis")


def merge_tasks(
    matrices: Sequence[CurvatureMatrix],
    method: Merge = "auto",
    *,
    weights: Sequence[float] | None = None,
) -> CurvatureMatrix:
    """Return one matrix in place of the sum of the matrices of one layer.

    Diagonal, dense and low-rank matrices are summed, whatever the method. For K-FAC:

    - ``"pooled"``: ``sum G_t`` and the weighted mean of the ``A_t``, the factors of the
      pooled data; exact for tasks with equal inputs, else with cross terms.
    - ``"nearest"``: ``(A_1 + A_2 / pi) (x) (G_1 + pi G_2)`` with
      ``pi^2 = tr G_1 tr A_2 / (tr G_2 tr A_1)``, the factored form of Martens & Grosse
      2015, section 6.3, task by task; an upper bound, twice the sum for two equal
      tasks.
    - ``"optimal"``: the Kronecker product nearest to the sum in Frobenius norm (Van
      Loan & Pitsianis 1993), through the ``t x t`` Gram matrices of the factors.

    For EKFAC the sum keeps its diagonal in one basis, and so its trace:

    - ``"joint_basis"``: the eigenvectors of the sum's two partial traces.
    - ``"first_basis"``: that of the first matrix.

    Args:
        matrices: Of one layer, structure and space, with their weights multiplied in.
        method: One of the names above, ``"auto"`` for ``"optimal"`` and
            ``"joint_basis"``. ``"exact"`` keeps all K-FAC or EKFAC matrices in an
            implicit matrix.
        weights: Weight of each ``A_t`` in the mean of ``"pooled"``. Default: equal.

    Raises:
        UnsupportedOperationError: If the structure has no such merge.
        ValueError: If there are no matrices, another number of weights, or no such
            method.
        StateMismatchError: If the matrices are over different parameters.
    """
    shares = [1.0] * len(matrices) if weights is None else [float(w) for w in weights]
    if not matrices or len(shares) != len(matrices):
        raise ValueError(
            "merge_tasks needs at least one matrix and as many weights, got "
            f"{len(matrices)} matrices and {len(shares)} weights."
        )
    first = matrices[0]
    for other in matrices[1:]:
        first.require_same_space(other)
    if len(matrices) == 1:
        return first
    if method != "exact" and _are_kfac(matrices):
        return _merge_kfac(matrices, check_merge(method, "kfac"), shares)
    if method != "exact" and _are_ekfac(matrices):
        return _merge_ekfac(matrices, check_merge(method, "ekfac"))
    kronecker = isinstance(first, (KFACMatrix, EKFACMatrix))
    merged = ImplicitMatrix.of(first) if kronecker else first
    for other in matrices[1:]:
        merged = merged + other
    return merged


def check_merge(method: str, structure: str) -> str:
    """Return the method that ``"auto"`` stands for, or ``method`` if it fits.

    Raises:
        ValueError: If there is no such method.
        UnsupportedOperationError: If it is one of another structure.
    """
    if method not in get_args(Merge):
        raise ValueError(
            f"merge must be one of {list(get_args(Merge))}, got {method!r}."
        )
    allowed = {"kfac": _KFAC, "ekfac": _EKFAC}.get(structure, ())
    if method == "auto":
        return {"kfac": "optimal", "ekfac": "joint_basis"}.get(structure, "auto")
    if method != "exact" and method not in allowed:
        raise UnsupportedOperationError(
            f"merge={method!r} is not for structure={structure!r}; it has "
            f"{['auto', 'exact', *allowed]}."
        )
    return method


def merge_error(matrices: Sequence[CurvatureMatrix], merged: CurvatureMatrix) -> float:
    """Return ``|sum_t F_t - M| / |sum_t F_t|`` in Frobenius norm.

    No matrix is formed.

    Args:
        matrices: ``F_t``, K-FAC or EKFAC matrices of one layer.
        merged: ``M``, which stands for their sum.

    Raises:
        UnsupportedOperationError: For other structures, or K-FAC beside EKFAC.
    """
    parts = [*matrices, merged]
    signs = torch.tensor([1.0] * len(matrices) + [-1.0], dtype=torch.float64)
    gram = torch.tensor(
        [[float(_inner(p, q)) for q in parts] for p in parts], dtype=torch.float64
    )
    squared_norm = gram[:-1, :-1].sum()
    return float((signs @ gram @ signs).clamp(min=0).sqrt() / squared_norm.sqrt())


# -- K-FAC -----------------------------------------------------------------------------


def _are_kfac(matrices: Sequence[CurvatureMatrix]) -> TypeGuard[Sequence[KFACMatrix]]:
    return all(isinstance(matrix, KFACMatrix) for matrix in matrices)


def _are_ekfac(matrices: Sequence[CurvatureMatrix]) -> TypeGuard[Sequence[EKFACMatrix]]:
    return all(isinstance(matrix, EKFACMatrix) for matrix in matrices)


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return diagonal factors as dense ones, if any is dense."""
    if len({factor.dim() for factor in factors}) == 1:
        return list(factors)
    return [torch.diag_embed(f) if f.dim() == 2 else f for f in factors]


def _merge_kfac(
    matrices: Sequence[KFACMatrix], method: str, weights: Sequence[float]
) -> KFACMatrix:
    A = _alike([matrix.factor("A") for matrix in matrices])
    G = _alike([matrix.factor("G") for matrix in matrices])
    if method == "pooled":
        total_weight = sum(weights)
        merged_A = torch.stack(
            [a * (w / total_weight) for a, w in zip(A, weights, strict=True)]
        ).sum(0)
        merged_G = torch.stack(G).sum(0)
    elif method == "nearest":
        merged_A, merged_G = A[0], G[0]
        for a, g in zip(A[1:], G[1:], strict=True):
            if not bool(_trace(a) * _trace(g) > 0):  # this task's matrix is zero
                continue
            if not bool(_trace(merged_A) * _trace(merged_G) > 0):  # so far all are
                merged_A, merged_G = a, g
                continue
            pi = damping_ratio(
                _trace(merged_G) * _trace(a), _trace(g) * _trace(merged_A)
            )
            merged_A, merged_G = merged_A + a / pi, merged_G + pi * g
    else:
        merged_A, merged_G = _optimal(A, G)
    return matrices[0].with_factors({"A": merged_A, "G": merged_G})


def _trace(factor: Tensor) -> Tensor:
    """Return the trace, over all blocks."""
    diagonal = factor if factor.dim() == 2 else factor.diagonal(dim1=-2, dim2=-1)
    return diagonal.sum()


def _optimal(A: Sequence[Tensor], G: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the Kronecker product nearest to ``sum_t G_t (x) A_t``.

    With the factors as the rows of ``X`` and ``Y``, the sum is ``X^T Y``, rearranged.
    Its leading singular vectors are ``X^T a`` and ``Y^T b``, with ``b`` the leading
    eigenvector of ``(X X^T) (Y Y^T)``. Products of positive matrices have positive
    traces, so ``a`` and ``b`` are positive (Perron) and the factors stay positive
    semi-definite.
    """
    if A[0].shape[0] > 1:  # blocks that share no input factor, one by one
        pairs = [
            _optimal([a[i : i + 1] for a in A], [g[i : i + 1] for g in G])
            for i in range(A[0].shape[0])
        ]
        return torch.cat([a for a, _ in pairs]), torch.cat([g for _, g in pairs])
    Y = torch.stack([a.flatten() for a in A]).double()
    X = torch.stack([g.flatten() for g in G]).double()
    # Rows of unit length, so that no task is lost to rounding.
    size_X, size_Y = X.norm(dim=1), Y.norm(dim=1)
    nonzero = (size_X > 0) & (size_Y > 0)
    if not bool(nonzero.any()):
        return A[0].clone(), torch.zeros_like(G[0])
    X, Y, size = X[nonzero], Y[nonzero], (size_X * size_Y)[nonzero]
    X, Y = X / size_X[nonzero, None], Y / size_Y[nonzero, None]
    # sum_t size_t x_t y_t^T: with S = diag(size), b is the leading eigenvector of
    # S (X X^T) S (Y Y^T), which is similar to a symmetric matrix.
    K, L = X @ X.mT, Y @ Y.mT
    values, vectors = torch.linalg.eigh(L)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    scaled = size[:, None] * K * size
    b = scaled @ root @ torch.linalg.eigh(root @ scaled @ root)[1][:, -1]
    right = (b * torch.sign(b.sum())) @ Y
    right = right / right.norm()
    left = (size * (Y @ right)) @ X  # the best partner of the right one, with its size
    scale = size_Y[nonzero].mean()
    return (
        (right * scale).reshape(A[0].shape).to(A[0]),
        (left / scale).reshape(G[0].shape).to(G[0]),
    )


# -- EKFAC -----------------------------------------------------------------------------


def _merge_ekfac(matrices: Sequence[EKFACMatrix], method: str) -> EKFACMatrix:
    bases = [matrix.bases() for matrix in matrices]
    s = [matrix.factor("s") for matrix in matrices]
    if method == "first_basis":
        Q_G, Q_A = bases[0]
    else:
        traces_G = [
            _rotated(q, v.sum(dim=-1), len(v))
            for (q, _), v in zip(bases, s, strict=True)
        ]
        traces_A = [
            _rotated(q, v.sum(dim=-2), 1 if q is None else len(q))
            for (_, q), v in zip(bases, s, strict=True)
        ]
        Q_G, Q_A = _eigenbasis(traces_G), _eigenbasis(traces_A)
    scalings = [
        transport(values, _overlap(old_G, Q_G), _overlap(old_A, Q_A))
        for values, (old_G, old_A) in zip(s, bases, strict=True)
    ]
    factors = {"Q_G": Q_G, "Q_A": Q_A, "s": torch.stack(scalings).sum(0)}
    return matrices[0].with_factors({n: t for n, t in factors.items() if t is not None})


def _rotated(basis: Tensor | None, values: Tensor, blocks: int) -> Tensor:
    """Return ``Q diag(values) Q^T``, or the diagonal where there is no basis."""
    if blocks == 1 and len(values) > 1:
        values = values.sum(dim=0, keepdim=True)
    return values if basis is None else (basis * values.unsqueeze(-2)) @ basis.mT


def _eigenbasis(factors: Sequence[Tensor]) -> Tensor | None:
    aligned = _alike(factors)
    weighted_mean = sum(aligned[1:], start=aligned[0])
    return None if weighted_mean.dim() == 2 else symmetric_eigh(weighted_mean)[1]


def _overlap(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """Return ``Q_old^T Q_new``, ``None`` for the identity."""
    if old is None:
        return new
    return old.mT if new is None else old.mT @ new


def _inner(first: CurvatureMatrix, second: CurvatureMatrix) -> Tensor:
    """Return ``<F, F'>`` in double precision."""
    if isinstance(first, KFACMatrix) and isinstance(second, KFACMatrix):
        A = _alike([first.factor("A"), second.factor("A")])
        G = _alike([first.factor("G"), second.factor("G")])
        inner_A = (A[0].double() * A[1].double()).flatten(1).sum(1)
        return (inner_A * (G[0].double() * G[1].double()).flatten(1).sum(1)).sum()
    if isinstance(first, EKFACMatrix) and isinstance(second, EKFACMatrix):
        (G1, A1), (G2, A2) = first.bases(), second.bases()
        transported = transport(first.factor("s"), _overlap(G1, G2), _overlap(A1, A2))
        return (transported.double() * second.factor("s").double()).sum()
    raise UnsupportedOperationError(
        "merge_error compares K-FAC with K-FAC and EKFAC with EKFAC matrices, got "
        f"{first.structure} and {second.structure}."
    )


# -- one task after another -----------------------------------------------------------


def merge_layer(
    old: Sequence[CurvatureMatrix],
    new: CurvatureMatrix,
    method: Merge,
    weights: tuple[float, float],
) -> list[CurvatureMatrix]:
    """Return the matrices of a layer after another task: one where they merge.

    A matrix of another structure, or of a smaller layer that cannot be padded, stays
    beside the others: the sum is then exact. ``"exact"`` keeps all K-FAC and EKFAC
    matrices.
    """
    kronecker = isinstance(new, (KFACMatrix, EKFACMatrix))
    unmerged: list[CurvatureMatrix] = []
    for matrix in old:
        same = type(matrix) is type(new) and matrix.space.names == new.space.names
        grown = expanded(matrix, new) if same else None
        if grown is None or (kronecker and method == "exact"):
            unmerged.append(matrix)
            continue
        try:
            new = merge_tasks([grown, new], method, weights=weights)
        except StateMismatchError:
            unmerged.append(matrix)
    return [*unmerged, new]


def expanded(matrix: CurvatureMatrix, like: CurvatureMatrix) -> CurvatureMatrix | None:
    """Return ``matrix`` in the larger space of ``like``, with zeros for new entries.

    ``None`` if its rows and columns are not rows and columns of the larger layer.
    """
    if matrix.space == like.space:
        return matrix
    positions = _positions(matrix.space, like.space)
    if positions is None or type(matrix) is not type(like):
        return None
    space = like.space
    if isinstance(matrix, DiagonalMatrix):
        flat = matrix.entries.flat()
        values = flat.new_zeros(space.size).index_copy(
            0, positions.to(flat.device), flat
        )
        return DiagonalMatrix(space.vector(values))
    if isinstance(matrix, DenseMatrix):
        old, index = matrix.matrix, positions.to(matrix.device)
        dense = old.new_zeros(space.size, space.size)
        dense[index.unsqueeze(1), index] = old
        return DenseMatrix(space, dense)
    if isinstance(matrix, LowRankMatrix):
        rows = matrix.rows.new_zeros(len(matrix.rows), space.size)
        rows[:, positions.to(rows.device)] = matrix.rows
        return LowRankMatrix(space, rows, weights=matrix.weights)
    if isinstance(matrix, (KFACMatrix, EKFACMatrix)):
        assert isinstance(like, (KFACMatrix, EKFACMatrix))
        return _expanded_kronecker(matrix, like, positions)
    return None


def _positions(old: VectorSpace, new: VectorSpace) -> Tensor | None:
    """Return the places of ``old`` flat vectors' entries in ``new`` ones.

    ``None`` if some entry has none.
    """
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
    matrix: KFACMatrix | EKFACMatrix, like: KFACMatrix | EKFACMatrix, positions: Tensor
) -> CurvatureMatrix | None:
    new = IndexPacking.of(like.packing, like.space)
    old = IndexPacking.of(matrix.packing, matrix.space)
    where = torch.full((like.size,), -1)
    where[new.positions.flatten().cpu()] = torch.arange(new.positions.numel())
    entries = where[positions[old.positions.cpu()]]
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
    """Return a factor of ``count`` blocks; new ones are zero or the identity."""
    spread = factor.new_zeros(count, *factor.shape[1:])
    if identity:
        spread += torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    spread[blocks.to(factor.device)] = factor
    return spread


def _padded(factor: Tensor, index: Tensor, size: int, *, identity: bool) -> Tensor:
    """Return a larger factor with the old one at ``index``, else zero or identity."""
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
