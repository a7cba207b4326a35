"""Launches of ``scalings.cu`` and ``jacobi.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.kernels import plans, sources, structures
from ekfac.kernels.engine import Engine
from ekfac.kernels.grams import rows_source
from ekfac.kernels.plans import Launch, pointer


@dataclass(frozen=True)
class Scalings:
    """One layer: ``out <- beta out + alpha sum_n (sum_s g_ns a_ns^T)^2``.

    Attributes:
        out: ``[b, d_out, d_in]``.
        grads: ``[N, S, b, d_out]``, in the basis.
        inputs: ``[N, S, b or 1, d_in]``, in the basis.
        alpha: Factor of the new sum.
        beta: Factor of the old value; 0 does not read it.
    """

    out: Tensor
    grads: Tensor
    inputs: Tensor
    alpha: float = 1.0
    beta: float = 0.0

    def supported(self) -> bool:
        """Return whether the kernel takes it."""
        shape = (self.grads.shape[2], self.grads.shape[3], self.inputs.shape[3])
        reach = 0
        for rows in (self.grads, self.inputs):
            extents = zip(rows.shape[1:], plans.steps_of(rows)[1:], strict=True)
            reach = max(reach, sum((n - 1) * step for n, step in extents))
        return (
            self.grads.dtype == self.inputs.dtype == torch.float32
            and plans.writable(self.out, *shape)
            and self.grads.device == self.inputs.device == self.out.device
            and max(reach, self.steps(1)) < plans.INT_MAX // 2
        )

    def tiles(self, size: int) -> tuple[int, int]:
        """Return the tiles along ``d_out`` and ``d_in``."""
        return -(-self.grads.shape[3] // size), -(-self.inputs.shape[3] // size)

    def steps(self, rows: int) -> int:
        """Return the steps of a sum over all examples."""
        n, s = self.grads.shape[:2]
        return -(-n // rows) if s == 1 else n * -(-s // rows)


def scalings_choice(engine: Engine, layer: Scalings) -> tuple[sources.Variant, int]:
    """Return the variant and the size of tile for a layer."""

    def area(size: int) -> int:
        along, across = layer.tiles(size)
        return along * across

    tile = plans.tile_of(*layer.out.shape[1:], area=area)
    kind, single = plans.input_kind(layer.grads), layer.grads.shape[1] == 1
    return sources.scalings_variant(kind, tile, single, engine.problems), tile


def plan_scalings(engine: Engine, layers: Sequence[Scalings]) -> list[Launch]:
    """Return the launches for supported layers."""
    groups: dict[tuple[sources.Variant, int], list[Scalings]] = {}
    for layer in layers:
        if layer.out.numel():
            groups.setdefault(scalings_choice(engine, layer), []).append(layer)
    launches: list[Launch] = []
    for (variant, tile), members in groups.items():
        for batch in plans.batches(len(members), engine.problems):
            chosen = [members[i] for i in batch]
            launches += scalings_launches(engine, variant, tile, chosen)
    return launches


def scalings_launches(
    engine: Engine, variant: sources.Variant, tile: int, layers: Sequence[Scalings]
) -> list[Launch]:
    """Return the launches for layers of one variant, at most ``engine.problems``."""
    counts = [layer.tiles(tile) for layer in layers]
    tiles = [
        len(layer.out) * along * across
        for layer, (along, across) in zip(layers, counts, strict=True)
    ]
    splits = plans.split_sums(engine, tiles, [layer.steps(16) for layer in layers])
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = []
    first = first_tile = 0
    for i, layer in enumerate(layers):
        n, s, b = layer.grads.shape[:3]
        # Whole examples, or whole steps of them, to each part of the sum.
        unit = 16 if s == 1 else 1
        share = unit * max(1, -(-n // (unit * splits[i][0])))
        parts = max(1, -(-n // share))
        keep += [layer.out, layer.grads, layer.inputs]
        problems.append(
            structures.ScalingsProblem(
                rows_source(layer.grads, blocks=b),
                rows_source(layer.inputs, blocks=layer.inputs.shape[2]),
                out=pointer(layer.out),
                out_block=layer.out.stride(0),
                out_row=layer.out.stride(1),
                examples=n,
                positions=s,
                blocks=b,
                tiles_g=counts[i][0],
                tiles_a=counts[i][1],
                splits=parts,
                share=share,
                first=first,
                first_tile=first_tile,
                alpha=layer.alpha,
                beta=layer.beta,
            )
        )
        first, first_tile = first + tiles[i] * parts, first_tile + tiles[i]
    split = first > first_tile
    space = torch.empty(first * tile**2 if split else 0, device=layers[0].out.device)
    params = structures.fill(problems, engine.problems, parts=pointer(space))
    keep.append(space)
    threads = 256 if tile == 128 else 128
    launches = [Launch(variant, "scalings", params, first, threads, keep=keep)]
    if split:
        name = "scalings_finish"
        launches.append(Launch(variant, name, params, first_tile, threads, keep=keep))
    return launches


JACOBI_THREADS = 512


def jacobi_bytes(size: int) -> int:
    """Return the shared memory that a matrix of this size takes."""
    pairs = (size + 1) // 2
    return 4 * (2 * size * (size | 1) + JACOBI_THREADS) + 16 * pairs


def plan_jacobi(matrices: Tensor, vectors: Tensor) -> list[Launch]:
    """Return the launch that diagonalises matrices ``[n, d, d]``.

    Args:
        matrices: Contiguous, float32; its diagonals become the eigenvalues, unordered.
        vectors: Of the same shape; receives eigenvectors in columns.
    """
    count, size = matrices.shape[:2]
    params = structures.JacobiParams(
        matrix=pointer(matrices), vectors=pointer(vectors), n=size, count=count
    )
    return [
        Launch(
            sources.Variant("jacobi"),
            "jacobi",
            params,
            count,
            JACOBI_THREADS,
            shared=jacobi_bytes(size),
            keep=(matrices, vectors),
        )
    ]
