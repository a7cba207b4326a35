"""Sums of squared per-example gradients in a basis: ``scalings.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.choice import bucket
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, HALF, TF32, Variant
from ekfac.kernels.cuda.kernel import (
    Kernel,
    Numbers,
    SumOperator,
    accumulation,
    apart,
    items_of,
    largest,
    relative_error,
    update_,
)
from ekfac.kernels.cuda.launch import (
    INT_MAX,
    MIN_STEPS,
    WORK,
    Engine,
    Launch,
    execute,
    fields,
    fill,
    grouped,
    pointer,
    split_sums,
    steps_of,
    writable,
)
from ekfac.kernels.cuda.tiles import (
    SLICES,
    WARPGROUP_PAIR_TILE,
    Geometry,
    Source,
    in_chunks,
    input_kind,
    rows_source,
    tile_of,
)


class ScalingsProblem(ctypes.Structure):
    """``Problem`` of ``scalings.cu``."""

    _fields_ = [
        *fields(Source, "g a"),
        ("out", c_void_p),
        *fields(c_longlong, "out_block out_row"),
        *fields(c_int, "examples positions blocks tiles_g tiles_a splits share"),
        *WORK,
    ]


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

    def shape_class(self) -> str:
        """Return the class of shapes that the layer is measured in."""
        sizes = (*self.grads.shape, self.inputs.shape[-1])
        words = [str(self.grads.dtype).removeprefix("torch.")]
        words += map(str, map(bucket, sizes))
        words += [] if self.in_chunks() else ["strided"]
        return " ".join(words)

    def in_chunks(self) -> bool:
        """Return whether both operands lie in aligned chunks of 16 bytes."""
        return in_chunks(self.grads, None) and in_chunks(self.inputs, None)

    def supported(self) -> bool:
        """Return whether the kernel takes it."""
        kinds = (self.grads.dtype, self.inputs.dtype)
        shape = (self.grads.shape[2], self.grads.shape[3], self.inputs.shape[3])
        reach = 0
        for rows in (self.grads, self.inputs):
            extents = zip(rows.shape[1:], steps_of(rows)[1:], strict=True)
            reach = max(reach, sum((n - 1) * step for n, step in extents))
        return (
            kinds[0] == kinds[1]
            and kinds[0] in compiler.INPUTS
            and writable(self.out, *shape)
            and self.grads.device == self.inputs.device == self.out.device
            and max(reach, self.steps(1)) < INT_MAX // 2
        )

    def tiles(self, size: int) -> tuple[int, int]:
        """Return the tiles along ``d_out`` and ``d_in``."""
        return -(-self.grads.shape[3] // size), -(-self.inputs.shape[3] // size)

    def steps(self, rows: int) -> int:
        """Return the steps of a sum over all examples."""
        n, s = self.grads.shape[:2]
        return -(-n // rows) if s == 1 else n * -(-s // rows)


def scalings_variant(
    kind: int,
    tile: int,
    square: bool,
    problems: int,
    *,
    pipeline: bool = False,
    warpgroups: bool = False,
) -> Variant:
    """Return the variant for an input type.

    Args:
        kind: How elements are multiplied.
        tile: Size of tile.
        square: For one position.
        problems: Layers of a launch.
        pipeline: Copy rows asynchronously: for tensor cores, and features that lie in
            aligned chunks.
        warpgroups: Of a pipeline: multiply by whole warpgroups.
    """
    defines = {"INPUT": kind, "TILE": tile, "SQUARE": int(square)}
    defines |= {"PIPELINE": 1} if pipeline else {}
    defines |= {"WARPGROUP": 1} if warpgroups else {}
    return Variant("scalings", (*defines.items(), ("PROBLEMS", problems)))


# Input types with the ways there are for them: one position or several, a pipeline.
# Half types are multiplied as such in a pipeline alone, and their squares never: those
# would be rounded once more.
WAYS = (
    *((kind, square, False) for kind in (FLOAT, TF32) for square in (False, True)),
    *((TF32, square, True) for square in (False, True)),
    *((kind, False, True) for kind in (BFLOAT16, HALF)),
)


def every_variant(problems: int) -> list[Variant]:
    """Return all variants, for launches of up to ``problems`` layers."""
    wide = {"pipeline": True, "warpgroups": True}
    return [
        scalings_variant(kind, tile, square, problems, pipeline=pipeline)
        for tile in (64, 128)
        for kind, square, pipeline in WAYS
    ] + [
        scalings_variant(kind, WARPGROUP_PAIR_TILE, square, problems, **wide)
        for kind, square, pipeline in WAYS
        if pipeline
    ]


def scalings_choice(engine: Engine, layer: Scalings) -> tuple[Variant, int]:
    """Return the variant and the size of tile for a layer."""

    def area(size: int) -> int:
        along, across = layer.tiles(size)
        return along * across

    tile = tile_of(*layer.out.shape[1:], area=area)
    kind, single = input_kind(layer.grads.dtype), layer.grads.shape[1] == 1
    pipeline = layer.in_chunks()
    if kind in (BFLOAT16, HALF) and (single or not pipeline):
        kind, pipeline = input_kind(torch.float32), False  # of a copy
    pipeline &= kind != FLOAT
    # Features of the gradients are loaded two at a time. By counts a tile takes half as
    # long as without warpgroups (``csrc/README.md``).
    warpgroups = pipeline and engine.warpgroups and layer.grads.shape[3] % 2 == 0
    wide = WARPGROUP_PAIR_TILE
    if warpgroups and area(wide) * wide**2 <= 2 * area(tile) * tile**2:
        tile = wide
    else:
        warpgroups = False
    problems, ways = engine.problems, {"pipeline": pipeline, "warpgroups": warpgroups}
    return scalings_variant(kind, tile, single, problems, **ways), tile


def plan_scalings(engine: Engine, layers: Sequence[Scalings]) -> list[Launch]:
    """Return the launches for supported layers."""
    nonempty = [layer for layer in layers if layer.out.numel()]
    launches: list[Launch] = []
    for choice, group in grouped(engine, nonempty, partial(scalings_choice, engine)):
        launches += scalings_launches(engine, *choice, group)
    return launches


def scalings_launches(
    engine: Engine,
    variant: Variant,
    tile: int,
    layers: Sequence[Scalings],
    least: int = MIN_STEPS,
) -> list[Launch]:
    """Return the launches for layers of one variant, at most ``engine.problems``.

    The shortest part of a sum has ``least`` steps.
    """
    counts = [layer.tiles(tile) for layer in layers]
    tiles = [
        len(layer.out) * along * across
        for layer, (along, across) in zip(layers, counts, strict=True)
    ]
    geometry, kind = Geometry.of(variant), dict(variant.defines)["INPUT"]
    depth = geometry.depth
    steps = [layer.steps(depth) for layer in layers]
    splits = split_sums(engine, tiles, steps, least, geometry.resident)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = []
    first = first_tile = 0
    for i, layer in enumerate(layers):
        n, s, b = layer.grads.shape[:3]
        # Whole examples, or whole steps of them, to each part of the sum.
        unit = depth if s == 1 else 1
        share = unit * max(1, -(-n // (unit * splits[i][0])))
        parts = max(1, -(-n // share))
        rows = [layer.grads, layer.inputs]
        if kind in (FLOAT, TF32):
            rows = [x.float() for x in rows]
        keep += [layer.out, *rows]
        problems.append(
            ScalingsProblem(
                rows_source(rows[0], blocks=b),
                rows_source(rows[1], blocks=layer.inputs.shape[2]),
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
    size = first * tile**2 if split else 0
    space = torch.empty(size, dtype=torch.float32, device=layers[0].out.device)
    params = fill(problems, engine.problems, parts=pointer(space))
    keep.append(space)
    own, threads = (geometry.shared, keep, (space,)), geometry.threads
    launches = [Launch(variant, "scalings", params, first, threads, *own)]
    if split:
        grid = first_tile * SLICES
        finish = Launch(variant, "scalings_finish", params, grid, threads, keep=keep)
        launches.append(finish)
    return launches


def scalings_reference_(layer: Scalings) -> None:
    """Do what ``scalings.cu`` does, with torch, an example at a time if need be."""
    kind = accumulation(layer.grads)
    grads, inputs = layer.grads.to(kind), layer.inputs.to(kind)
    if grads.shape[1] == 1:
        g, a = grads[:, 0].square(), inputs[:, 0].square()
        a = a.expand(-1, g.shape[1], -1)
        squares = torch.einsum("nbi,nbj->bij", g, a)
    else:
        squares = grads.new_zeros(layer.out.shape)
        for g, a in zip(grads, inputs, strict=True):  # [S, b, d_out], [S, b or 1, d_in]
            squares += (g.permute(1, 2, 0) @ a.permute(1, 0, 2)).square()
    update_(layer.out, squares, layer.alpha, layer.beta)


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem.

    The first sum is left whole, the second is split: both ways to a result are tried.
    """
    numbers, defines = Numbers(engine, variant), dict(variant.defines)
    positions, step = 1 if defines["SQUARE"] else 39, defines["TILE"] + 8
    # Enough steps in the first for the pipeline to come round.
    examples, few = (88, 33) if positions == 1 else (40, 9)
    g = numbers.rows(examples, positions, 2, step)
    g[-5:] *= 4  # the last part of the sum is more than the tolerance
    g = g[..., :-5]
    a = numbers.rows(examples, positions, 2, 72)[..., :67]  # part of a chunk
    one = g[:few, :, :1]  # block, for both of the other operand
    if not defines.get("PIPELINE"):  # features side by side at odd steps, and strided
        one, g = one.contiguous(), g.transpose(1, 3).contiguous().transpose(1, 3)
    more = a[:few]
    if variant.warpgroups:  # two features of the first operand at a time
        g, more = g[..., :-1], more[..., :-1]
    out = numbers.poison(2, more.shape[-1], one.shape[-1]).fill_(5)
    layers = [
        Scalings(out, more, one, 1.0, 7.0),
        Scalings(apart(numbers.poison(2, g.shape[-1], 67)), g, a, 0.5),
    ]
    # Few positions: every step of a sum is an example's first and its last.
    depth = Geometry.of(variant).depth
    few_g, few_a = g[:, :depth], a[:, :depth]
    short = Scalings(numbers.poison(2, g.shape[-1], 67), few_g, few_a)
    tried = [(layers, layers[0].steps(depth)), ([short], MIN_STEPS)]
    errors = []
    for some, least in tried if positions > 1 else tried[:1]:
        old = [layer.out.double() for layer in some]
        launches = scalings_launches(engine, variant, defines["TILE"], some, least)
        execute(engine, launches)
        for layer, out in zip(some, old, strict=True):
            grads, inputs = layer.grads.double(), layer.inputs.double()
            scalings_reference_(Scalings(out, grads, inputs, layer.alpha, layer.beta))
            errors.append(relative_error(layer.out, out))
    return largest(errors)


KERNEL = Kernel("scalings", every_variant, check)
OPERATORS = [
    SumOperator(
        "scalings_",
        "(Tensor(a!)[] outs, Tensor[] grads, Tensor[] inputs, float[] alphas, "
        "float[] betas) -> ()",
        items_of(Scalings),
        Scalings.supported,
        lambda engine, layer: scalings_choice(engine, layer)[0],
        plan_scalings,
        scalings_reference_,
    )
]
