"""Gram matrices of many layers in one launch: ``gram.cu``.

``C <- beta C + alpha sum_k w_k x_k x_k^T``, each layer of its own size. Rows are plain,
or the patches of a convolution, read where they lie.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from ekfac.kernels.convolution import Convolution, unfolded, with_depth
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
    Field,
    Launch,
    execute,
    fields,
    fill,
    grouped,
    pointer,
    split_sums,
    steps_of,
    weight_of,
    writable,
)
from ekfac.kernels.cuda.tiles import (
    SLICES,
    WARPGROUP_TILE,
    Geometry,
    PatchSource,
    Source,
    in_chunks,
    input_kind,
    patch_source,
    rows_source,
    tile_of,
)


def _problem_fields(source: type) -> list[Field]:
    return [
        ("x", source),
        *fields(c_void_p, "weight out"),
        *fields(c_longlong, "out_block out_row"),
        *fields(c_int, "positions rows blocks tiles splits steps"),
        *WORK,
    ]


class GramProblem(ctypes.Structure):
    """``Problem`` of ``gram.cu``."""

    _fields_ = _problem_fields(Source)


class PatchGramProblem(ctypes.Structure):
    """``Problem`` of ``gram.cu`` with ``PATCHES``."""

    _fields_ = _problem_fields(PatchSource)


@dataclass(frozen=True)
class Gram:
    """One layer: ``out <- beta out + alpha sum_k w_k x_k x_k^T`` or its diagonal.

    Attributes:
        out: ``[b, d, d]``, or ``[b, d]``.
        x: Rows ``[N, S, b, d]``, or the input ``[N, C, d, h, w]`` of a convolution.
        weight: ``[N, S]`` or ``None``.
        alpha: Factor of the new sum.
        beta: Factor of the old value; 0 does not read it.
        bias: Whether a column of ones follows the last.
        conv: The convolution that reads ``x``, in three dimensions.
    """

    out: Tensor
    x: Tensor
    weight: Tensor | None = None
    alpha: float = 1.0
    beta: float = 0.0
    bias: bool = False
    conv: Convolution | None = None

    @property
    def blocks(self) -> int:
        """Blocks, or groups."""
        return self.x.shape[2] if self.conv is None else self.conv.groups

    @property
    def features(self) -> int:
        """Width of the rows, without the bias."""
        if self.conv is None:
            return self.x.shape[3]
        return self.conv.features(self.x.shape[1])

    @property
    def width(self) -> int:
        """Width of the result."""
        return self.features + int(self.bias)

    @property
    def positions(self) -> int:
        """Positions of an example."""
        if self.conv is None:
            return self.x.shape[1]
        return prod(self.conv.positions)

    @property
    def rows(self) -> int:
        """Rows of the sum."""
        return self.x.shape[0] * self.positions

    def shape_class(self) -> str:
        """Return the class of shapes that the layer is measured in."""
        sizes = (self.blocks, self.rows, self.width)
        words = [
            str(self.x.dtype).removeprefix("torch."),
            *map(str, map(bucket, sizes)),
        ]
        if self.conv is not None:
            words.append(f"patches{prod(self.conv.kernel_size)}")
        last = self.x.stride(1 if self.conv is not None else 3)
        words += ["strided"] if last != 1 else []
        words += ["weighted"] if self.weight is not None else []
        return " ".join(words)

    def supported(self, *, diagonal: bool = False) -> bool:
        """Return whether the kernels take it."""
        shape = (self.blocks, self.width) + (() if diagonal else (self.width,))
        extents = zip(self.x.shape[1:], steps_of(self.x)[1:], strict=True)
        reach = sum((n - 1) * step for n, step in extents)
        return (
            self.x.dtype in compiler.INPUTS
            and writable(self.out, *shape)
            and self.x.device == self.out.device
            and max(reach, self.rows) < INT_MAX // 2
        )


def gram_variant(
    kind: int,
    tile: int,
    patches: bool,
    problems: int,
    *,
    pipeline: bool = False,
    warpgroups: bool = False,
) -> Variant:
    """Return the variant for an input type and a size of tile.

    Args:
        kind: How elements are multiplied.
        tile: Size of tile.
        patches: Whether rows are a convolution's patches.
        problems: Layers of a launch.
        pipeline: Copy rows asynchronously: for tensor cores, and features that lie in
            aligned chunks.
        warpgroups: Of a pipeline: multiply by whole warpgroups.
    """
    defines = {"INPUT": kind, "TILE": tile, "PATCHES": int(patches)}
    defines |= {"PIPELINE": 1} if pipeline else {}
    defines |= {"WARPGROUP": 1} if warpgroups else {}
    return Variant("gram", (*defines.items(), ("PROBLEMS", problems)))


def every_variant(problems: int) -> list[Variant]:
    """Return all variants, for launches of up to ``problems`` layers."""
    wide = {"pipeline": True, "warpgroups": True}
    return [
        gram_variant(kind, tile, patches, problems, pipeline=pipeline)
        for tile in (64, 128)
        for kind in range(len(compiler.INPUT_NAMES))
        for patches in (False, True)
        for pipeline in (False, True)
        if not (pipeline and kind == FLOAT)
    ] + [
        gram_variant(kind, WARPGROUP_TILE, patches, problems, **wide)
        for kind in (TF32, BFLOAT16, HALF)
        for patches in (False, True)
    ]


def gram_choice(engine: Engine, gram: Gram) -> tuple[Variant, int]:
    """Return the variant and the size of tile for a layer."""
    kind, patches = input_kind(gram.x.dtype), gram.conv is not None
    if gram.weight is not None and gram.x.element_size() == 2:
        kind = FLOAT  # weights of rows are rounded to the type of the operands
    pipeline = kind != FLOAT and gram.features > 0 and in_chunks(gram.x, gram.conv)
    width = gram.features if pipeline else gram.width
    tile = tile_of(width, area=lambda size: _pairs(-(-width // size)))
    whole = (
        kind != TF32 or width % 2 == 0
    )  # words are transposed two features at a time
    warpgroups = pipeline and engine.warpgroups and whole
    warpgroups = warpgroups and _warpgroups_pay(width, tile)
    if warpgroups:
        tile = WARPGROUP_TILE
    problems, ways = engine.problems, {"pipeline": pipeline, "warpgroups": warpgroups}
    return gram_variant(kind, tile, patches, problems, **ways), tile


def _warpgroups_pay(width: int, tile: int) -> bool:
    """Return whether products of warpgroups take less, by counts.

    An element of a tile takes two thirds of the time of one without them
    (``csrc/README.md``), and tiles are larger.

    Args:
        width: Width of the result.
        tile: Size of tile without warpgroups.
    """
    areas = [_pairs(-(-width // size)) * size**2 for size in (WARPGROUP_TILE, tile)]
    return 2 * areas[0] <= 3 * areas[1]


def _pairs(tiles: int) -> int:
    """Return how many tiles are on and above the diagonal."""
    return tiles * (tiles + 1) // 2


def plan_grams(engine: Engine, grams: Sequence[Gram]) -> list[Launch]:
    """Return the launches for supported layers: one, or two, for each kind of tile."""
    nonempty = [gram for gram in grams if gram.width and gram.blocks]
    launches: list[Launch] = []
    for choice, group in grouped(engine, nonempty, partial(gram_choice, engine)):
        launches += gram_launches(engine, *choice, group)
    return launches


def _problem(
    gram: Gram, x: Tensor, weight: Tensor | None, **fields_: float
) -> GramProblem | PatchGramProblem:
    """Return the struct that describes a layer to the kernel."""
    struct: type[GramProblem] | type[PatchGramProblem] = GramProblem
    source: Source | PatchSource
    if gram.conv is None:
        source = rows_source(x, bias=gram.bias, blocks=gram.blocks)
    else:
        struct = PatchGramProblem
        source = patch_source(x, gram.conv, bias=gram.bias)
    return struct(
        source,
        weight=pointer(weight),
        out=pointer(gram.out),
        out_block=gram.out.stride(0),
        out_row=gram.out.stride(1),
        positions=max(1, gram.positions),
        rows=gram.rows,
        blocks=gram.blocks,
        alpha=gram.alpha,
        beta=gram.beta,
        **fields_,
    )


def gram_launches(
    engine: Engine,
    variant: Variant,
    tile: int,
    grams: Sequence[Gram],
    least: int = MIN_STEPS,
) -> list[Launch]:
    """Return the launches for layers of one variant, at most ``engine.problems``.

    The shortest part of a sum has ``least`` steps.
    """
    geometry, kind = Geometry.of(variant), dict(variant.defines)["INPUT"]
    # A pipeline needs no tile for a bias.
    features = [gram.features if geometry.pipeline else gram.width for gram in grams]
    widths = [-(-width // tile) for width in features]
    tiles = [gram.blocks * _pairs(w) for gram, w in zip(grams, widths, strict=True)]
    steps = [-(-gram.rows // geometry.depth) for gram in grams]
    splits = split_sums(engine, tiles, steps, least, geometry.resident)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = []
    first = first_tile = 0
    for gram, width, count, (parts, share) in zip(
        grams, widths, tiles, splits, strict=True
    ):
        weight = weight_of(gram.weight)
        x = gram.x.float() if kind == FLOAT else gram.x
        keep += [x, gram.out, *([] if weight is None else [weight])]
        offsets = {"first": first, "first_tile": first_tile}
        divided = {"tiles": width, "splits": parts, "steps": share}
        problems.append(_problem(gram, x, weight, **offsets, **divided))
        first, first_tile = first + count * parts, first_tile + count
    split = any(parts > 1 for parts, _ in splits)
    size = first * tile**2 if split else 0
    space = torch.empty(size, dtype=torch.float32, device=grams[0].x.device)
    params = fill(problems, engine.problems, parts=pointer(space))
    keep.append(space)
    own, threads = (geometry.shared, keep, (space,)), geometry.threads
    launches = [Launch(variant, "gram", params, first, threads, *own)]
    if split:
        grid = first_tile * SLICES
        finish = Launch(variant, "gram_finish", params, grid, threads, keep=keep)
        launches.append(finish)
    return launches


# -- reference -----------------------------------------------------------------------


def wide_rows(gram: Gram) -> Tensor:
    """Return the rows ``[N, S, b, d]`` with the bias, in the type of the sum."""
    x = gram.x if gram.conv is None else unfolded(gram.x, gram.conv)
    x = x.to(accumulation(gram.x))
    if not gram.bias:
        return x
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def gram_reference_(gram: Gram) -> None:
    """Do what ``gram.cu`` does, with torch."""
    x = wide_rows(gram)
    left = x if gram.weight is None else x * gram.weight[..., None, None].to(x.dtype)
    gram_sum = torch.einsum("nsbi,nsbj->bij", left, x)
    update_(gram.out, gram_sum, gram.alpha, gram.beta)


def _operands(gram: Gram) -> tuple[Tensor, Tensor]:
    """Return ``[b, d, K]`` and ``[b, K, d]`` whose product is the sum."""
    x = wide_rows(gram)
    left = x if gram.weight is None else x * gram.weight[..., None, None].to(x.dtype)
    return left.flatten(0, 1).permute(1, 2, 0), x.flatten(0, 1).permute(1, 0, 2)


def gram_baddbmm_(gram: Gram) -> None:
    """Do what ``gram.cu`` does in one product that updates in place."""
    left, right = _operands(gram)
    gram.out.baddbmm_(left, right, beta=gram.beta, alpha=gram.alpha)


def gram_halves_(gram: Gram) -> None:
    """Do what ``gram.cu`` does in three products of half the width."""
    left, right = _operands(gram)
    half = gram.width // 2
    for rows, columns in (
        (slice(0, half), slice(0, half)),
        (slice(half, None), slice(half, None)),
        (slice(0, half), slice(half, None)),
    ):
        part = gram.out[:, rows, columns]
        a, b = left[:, rows], right[..., columns]
        part.baddbmm_(a, b, beta=gram.beta, alpha=gram.alpha)
    gram.out[:, half:, :half] = gram.out[:, :half, half:].mT


# -- check ---------------------------------------------------------------------------


def error_of(
    grams: list[Gram], reference_: Callable[[Gram], None], run: Callable[[], None]
) -> float:
    """Return the largest relative error of what ``run`` does, against float64."""
    old = [gram.out.clone() for gram in grams]
    run()
    errors = []
    for gram, before in zip(grams, old, strict=True):
        weight = None if gram.weight is None else gram.weight.double()
        exact = replace(gram, out=before.double(), x=gram.x.double(), weight=weight)
        reference_(exact)
        errors.append(relative_error(gram.out, exact.out))
    return largest(errors)


def _small_patches(
    numbers: Numbers, width: int, channels: int, weighted: bool, longest: int
) -> list[Gram]:
    """Return convolutions of two groups, channels first and last."""
    conv = Convolution((1, 3, 2), (1, 2, 1), (1, 1, 2), (0, 1, 1), (1, 4, 6), 2)
    images = -(-longest // 24)
    x = numbers.rows(images, 2 * channels, 1, 7, 6)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    features = conv.features(2 * channels)
    assert features >= width - 5
    weight = numbers.weight(images, 24) if weighted else None
    out = numbers.poison(2, features + 1, features + 1)
    first = Gram(out, x if channels % 8 else last, weight, bias=True, conv=conv)
    out = apart(numbers.poison(2, features, features).fill_(3))
    return [Gram(out, last[: images * 2 // 5], beta=0.5, conv=conv), first]


def _small_rows(
    numbers: Numbers, width: int, step: int, weighted: bool, longest: int, blocks: int
) -> list[Gram]:
    """Return rows at even steps and not, ``step`` apart if it is not zero."""
    positions, narrow = longest // 3, 66 + width % 2  # part of a chunk
    even = numbers.rows(3, positions, blocks, step or 68)[..., :narrow]
    odd = numbers.rows(longest // 5, 3, 2, step or width)[:, :2, :, :width]
    weight = numbers.weight(3, positions) if weighted else None
    return [
        Gram(apart(numbers.poison(2, width, width).fill_(2)), odd, beta=-3.0),
        Gram(
            numbers.poison(blocks, narrow + 1, narrow + 1), even, weight, 0.5, bias=True
        ),
    ]


def _strided_rows(numbers: Numbers, width: int) -> list[Gram]:
    """Return rows whose features do not lie side by side."""
    x = numbers.rows(3, 2, width, 20).permute(0, 3, 1, 2)
    return [Gram(numbers.poison(2, width + 1, width + 1), x, bias=True)]


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem.

    The first sum is left whole, the second is split: both ways to a result are tried.
    """
    numbers, defines = Numbers(engine, variant), dict(variant.defines)
    weighted = defines["INPUT"] not in (BFLOAT16, HALF)
    tile, pipeline = defines["TILE"], defines.get("PIPELINE")
    # An edge, and tiles off the diagonal; words are transposed two features at a time.
    width = tile + (6 if variant.warpgroups and weighted else 5)
    depth = Geometry.of(variant).depth
    longest = (21 if pipeline else 6) * depth - 5  # a pipeline comes round in each part
    if defines["PATCHES"]:
        channels = 8 * -(-width // 48) if pipeline else width // 6
        grams = _small_patches(numbers, width, channels, weighted, longest)
    else:
        step = tile + 16 if pipeline else 0  # rows that start at aligned chunks
        blocks = 2 if variant.warpgroups else 1
        grams = _small_rows(numbers, width, step, weighted, longest, blocks)
    least = min(-(-gram.rows // depth) for gram in grams)
    tried = [(grams, least)]
    if pipeline and not defines["PATCHES"]:
        # A bias of several tiles; rows at even steps, which weights would look up.
        odd, even = (replace(gram, weight=None, beta=0.0) for gram in grams)
        out = numbers.poison(2, width + 1, width + 1)
        tried.append(([replace(odd, out=out, bias=True), even], 4))
    if not pipeline and not defines["PATCHES"]:
        tried.append((_strided_rows(numbers, width), MIN_STEPS))
    errors = []
    for some, shortest in tried:
        launches = gram_launches(engine, variant, tile, some, shortest)
        run = partial(execute, engine, launches)
        errors.append(error_of(some, gram_reference_, run))
    return largest(errors)


# -- operators -----------------------------------------------------------------------


def _patch_grams(
    outs: Any, inputs: Any, weights: Any, geometry: Sequence[int], *numbers: Any
) -> list[Gram]:
    convs = [
        Convolution.from_flat(geometry[i : i + 16]) for i in range(0, len(geometry), 16)
    ]
    deep = [with_depth(x) for x in inputs]
    columns = zip(outs, deep, weights, *numbers, convs, strict=True)
    return [Gram(*column) for column in columns]


KERNEL = Kernel("gram", every_variant, check)
ROWS = SumOperator(
    "gram_",
    "(Tensor(a!)[] outs, Tensor[] rows, Tensor?[] weights, float[] alphas, "
    "float[] betas, bool[] biases) -> ()",
    items_of(Gram),
    Gram.supported,
    lambda engine, gram: gram_choice(engine, gram)[0],
    plan_grams,
    gram_reference_,
    {"baddbmm": gram_baddbmm_, "halves": gram_halves_},
)
PATCHES = replace(
    ROWS,
    name="patch_gram_",
    schema="(Tensor(a!)[] outs, Tensor[] inputs, Tensor?[] weights, int[] geometry, "
    "float[] alphas, float[] betas, bool[] biases) -> ()",
    prepare=_patch_grams,
)
OPERATORS = [ROWS, PATCHES]
