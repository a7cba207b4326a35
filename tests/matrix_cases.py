"""Curvature matrices of every structure, each with its dense counterpart.

The dense counterparts are made of Kronecker products and sums in the open, not of the
package's own algebra. Everything is float64 while the default stays float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.matrices import (
    BlockDiagonalMatrix,
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    ImplicitMatrix,
    KFACMatrix,
    LowRankMatrix,
    QuasiDiagonalMatrix,
)
from ekfac.vectors import ParameterVector, VectorSpace

SPACE = VectorSpace(
    {
        "scale": (),
        "fc.weight": (3, 2),
        "fc.bias": (3,),
        "conv.weight": (4, 1, 1, 2),
        "attention.in_proj": (4, 2),
        "conv.bias": (4,),
        "token.weight": (5, 2),
        "norm.weight": (3,),
    }
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


def positive(*shape: int, seed: int = 0) -> Tensor:
    """Return random positive definite matrices, eigenvalues well above rounding."""
    root = randn(*shape, shape[-1] + 3, seed=seed)
    return root @ root.mT / shape[-1]


@dataclass
class Layer:
    """Factors and packing of a made-up layer."""

    parameter_names: tuple[str, ...]
    pack: Callable[[Mapping[str, Tensor]], Tensor]
    unpack: Callable[[Tensor], dict[str, Tensor]]
    A: Tensor | None
    G: Tensor | None
    Q_A: Tensor | None = None
    Q_G: Tensor | None = None
    s: Tensor | None = None

    def with_basis(self, seed: int) -> Layer:
        """Add the eigenbases and random scalings."""
        if self.A.dim() == 3:
            self.Q_A = torch.linalg.eigh(self.A).eigenvectors
        if self.G.dim() == 3:
            self.Q_G = torch.linalg.eigh(self.G).eigenvectors
        b, d_out = self.G.shape[:2]
        self.s = randn(b, d_out, self.A.shape[1], seed=seed).square() + 0.01
        return self


def linear_layer(seed: int = 1) -> Layer:
    def pack(t):
        return torch.cat([t["fc.weight"], t["fc.bias"][:, None]], 1)[None]

    def unpack(m):
        return {"fc.weight": m[0, :, :-1], "fc.bias": m[0, :, -1]}

    names = ("fc.weight", "fc.bias")
    layer = Layer(
        names, pack, unpack, positive(1, 3, seed=seed), positive(1, 3, seed=9 + seed)
    )
    return layer.with_basis(seed)


def conv_layer(seed: int = 2) -> Layer:
    """Two groups that share the input factor."""

    def pack(t):
        weight = t["conv.weight"].reshape(2, 2, 2)
        return torch.cat([weight, t["conv.bias"].reshape(2, 2, 1)], -1)

    def unpack(m):
        return {
            "conv.weight": m[..., :-1].reshape(4, 1, 1, 2),
            "conv.bias": m[..., -1].reshape(4),
        }

    names = ("conv.weight", "conv.bias")
    layer = Layer(
        names, pack, unpack, positive(1, 3, seed=seed), positive(2, 2, seed=9 + seed)
    )
    return layer.with_basis(seed)


def token_layer(seed: int = 3) -> Layer:
    """An embedding: diagonal input factor, transposed weight."""

    def pack(t):
        return t["token.weight"].mT[None]

    def unpack(m):
        return {"token.weight": m[0].mT}

    A = randn(1, 5, seed=seed).square() + 0.1
    layer = Layer(("token.weight",), pack, unpack, A, positive(1, 2, seed=9 + seed))
    return layer.with_basis(seed)


def half_layer(half: int, seed: int = 4) -> Layer:
    """Two of the four rows of a packed projection."""
    rows = slice(2 * half, 2 * half + 2)

    def pack(t):
        return t["attention.in_proj"][rows][None]

    def unpack(m):
        whole = m.new_zeros(4, 2)
        whole[rows] = m[0]
        return {"attention.in_proj": whole}

    layer = Layer(
        ("attention.in_proj",),
        pack,
        unpack,
        positive(1, 2, seed=seed + half),
        positive(1, 2, seed=19 + seed + half),
    )
    return layer.with_basis(seed + half)


def layers() -> dict[str, Layer]:
    return {
        "fc": linear_layer(),
        "conv": conv_layer(),
        "token": token_layer(),
        "attention.q": half_layer(0),
        "attention.k": half_layer(1),
    }


def embedded(layer: Layer, packed: Tensor, space: VectorSpace = SPACE) -> Tensor:
    """Return ``[P, P]`` of a layer's matrix over row-major ``[b, d_out, d_in]``."""
    shape = layer.pack({n: torch.zeros(s) for n, s in space.shapes.items()}).shape
    units = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    zeros = {n: torch.zeros(s, dtype=torch.float64) for n, s in space.shapes.items()}
    columns = [space.flat(zeros | layer.unpack(unit)) for unit in units]
    U = torch.stack(columns, dim=1)
    return U @ packed @ U.mT


def as_dense_factor(factor: Tensor) -> Tensor:
    return torch.diag_embed(factor) if factor.dim() == 2 else factor


def kfac_dense(layer: Layer, space: VectorSpace = SPACE) -> Tensor:
    A, G = as_dense_factor(layer.A), as_dense_factor(layer.G)
    A = A.expand(G.shape[0], -1, -1)
    blocks = [torch.kron(g, a) for g, a in zip(G, A, strict=True)]
    return embedded(layer, torch.block_diag(*blocks), space)


def ekfac_dense(layer: Layer, space: VectorSpace = SPACE) -> Tensor:
    b, _, d_in = layer.s.shape
    Q_A = torch.eye(d_in).double()[None] if layer.Q_A is None else layer.Q_A
    Q_A = Q_A.expand(b, -1, -1)
    blocks = []
    for q_g, q_a, s in zip(layer.Q_G, Q_A, layer.s, strict=True):
        Q = torch.kron(q_g.contiguous(), q_a.contiguous())
        blocks.append(Q @ torch.diag(s.flatten()) @ Q.mT)
    return embedded(layer, torch.block_diag(*blocks), space)


def arrow_dense(
    layer: Layer, diagonal: Tensor, cross: Tensor, space: VectorSpace = SPACE
) -> Tensor:
    rows = torch.diag_embed(diagonal)
    rows[..., -1, :-1], rows[..., :-1, -1] = cross, cross
    return embedded(layer, torch.block_diag(*rows.flatten(0, 1)), space)


@dataclass
class Case:
    """A matrix and what it should equal; whether its inverse is another matrix's."""

    matrix: CurvatureMatrix
    dense: Tensor
    inverse_is_its_own: bool = False


def dense_case() -> Case:
    D = positive(SPACE.size)
    return Case(DenseMatrix(SPACE, D), D)


def diagonal_case() -> Case:
    d = randn(SPACE.size).square() + 0.1
    return Case(DiagonalMatrix(SPACE.vector(d)), torch.diag(d))


def low_rank_case() -> Case:
    rows = randn(5, SPACE.size)
    return Case(LowRankMatrix(SPACE, rows), rows.mT @ rows)


def weighted_low_rank_case() -> Case:
    """A positive definite one of full rank, with more rows than columns."""
    rows = randn(SPACE.size + 4, SPACE.size)
    weights = randn(rows.shape[0], seed=1).square() + 0.5
    dense = rows.mT @ (weights[:, None] * rows) + 0.3 * torch.eye(SPACE.size).double()
    return Case(LowRankMatrix(SPACE, rows, weights=weights, shift=0.3), dense)


def block_case() -> Case:
    """Dense blocks whose parameters are not neighbours in the flat order."""
    groups = [("fc.bias", "fc.weight"), ("token.weight", "conv.bias")]
    blocks, dense = {}, torch.zeros(SPACE.size, SPACE.size).double()
    numbers = SPACE.split(torch.arange(SPACE.size)[None])
    for i, names in enumerate(groups):
        space = SPACE.subspace(names)
        D = positive(space.size, seed=i)
        blocks[str(i)] = DenseMatrix(space, D)
        index = torch.cat([numbers[name].flatten() for name in names])
        dense[index[:, None], index] = D
    return Case(BlockDiagonalMatrix(SPACE, blocks), dense)


def kfac_case() -> Case:
    blocks = {name: KFACMatrix(layer) for name, layer in layers().items()}
    dense = sum(kfac_dense(layer) for layer in layers().values())
    return Case(BlockDiagonalMatrix(SPACE, blocks), dense)


def ekfac_case() -> Case:
    blocks = {name: EKFACMatrix(layer) for name, layer in layers().items()}
    dense = sum(ekfac_dense(layer) for layer in layers().values())
    return Case(BlockDiagonalMatrix(SPACE, blocks), dense)


def partial_case() -> Case:
    """One layer alone, which holds half of its parameter."""
    layer, space = half_layer(1), SPACE.subspace(["attention.in_proj"])
    return Case(KFACMatrix(layer), kfac_dense(layer, space))


def quasi_entries(layer: Layer, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Return diagonal and cross entries of a positive definite matrix."""
    b, d_out, d_in = layer.s.shape
    full = positive(b, d_out, d_in, seed=seed)
    return full.diagonal(dim1=-2, dim2=-1), full[..., -1, :-1]


def quasi_diagonal_case() -> Case:
    blocks, dense = {}, torch.zeros(SPACE.size, SPACE.size).double()
    for name, layer in {"fc": linear_layer(), "conv": conv_layer()}.items():
        diagonal, cross = quasi_entries(layer)
        blocks[name] = QuasiDiagonalMatrix(layer, diagonal=diagonal, cross=cross)
        dense += arrow_dense(layer, diagonal, cross)
    return Case(BlockDiagonalMatrix(SPACE, blocks), dense, inverse_is_its_own=True)


def mixed_case() -> Case:
    """A different structure for every layer."""
    fc, conv = linear_layer(), conv_layer()
    token, norm = SPACE.subspace(["token.weight"]), SPACE.subspace(["norm.weight"])
    rows = randn(3, token.size)
    entries = randn(3, seed=6).square() + 0.1
    blocks = {
        "fc": KFACMatrix(fc),
        "conv": EKFACMatrix(conv),
        "token": LowRankMatrix(token, rows),
        "norm": DiagonalMatrix(norm.vector(entries)),
    }
    dense = kfac_dense(fc) + ekfac_dense(conv)
    # The last two parameters of the space, in this order.
    first = SPACE.size - norm.size - token.size
    dense[first:, first:] += torch.block_diag(rows.mT @ rows, torch.diag(entries))
    return Case(BlockDiagonalMatrix(SPACE, blocks), dense)


def implicit_case() -> Case:
    D = positive(SPACE.size, seed=7)
    return Case(ImplicitMatrix(SPACE, lambda v: D @ v, dtype=torch.float64), D)


def power_case() -> Case:
    """A power of a damped matrix: not zero where no block is."""
    case = ekfac_case()
    eye = torch.eye(SPACE.size).double()
    return Case(case.matrix.power(-1, 0.5), torch.linalg.inv(case.dense + 0.5 * eye))


CASES: dict[str, Callable[[], Case]] = {
    "dense": dense_case,
    "diagonal": diagonal_case,
    "low_rank": low_rank_case,
    "low_rank_weighted": weighted_low_rank_case,
    "block_diagonal": block_case,
    "kfac": kfac_case,
    "kfac_partial": partial_case,
    "ekfac": ekfac_case,
    "ekfac_power": power_case,
    "quasi_diagonal": quasi_diagonal_case,
    "mixed": mixed_case,
    "implicit": implicit_case,
}


def vector_of(space: VectorSpace, seed: int = 0) -> ParameterVector:
    vector = space.vector(randn(space.size, seed=100 + seed))
    assert isinstance(vector, ParameterVector)
    return vector


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert a relative error in norm."""
    assert actual.dtype == torch.float64, actual.dtype
    assert actual.shape == expected.shape
    error = torch.linalg.vector_norm(actual - expected)
    scale = torch.linalg.vector_norm(expected)
    assert error <= tolerance * scale, f"relative error {error / scale:.2e}"
