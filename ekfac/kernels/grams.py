"""Launches of ``gram.cu`` and ``diagonal.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ekfac.kernels import plans, sources, structures
from ekfac.kernels.convolution import Convolution
from ekfac.kernels.engine import Engine
from ekfac.kernels.plans import Launch, pointer, steps_of

WIDTH = 32  # features of a piece of work in diagonal.cu


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

    def supported(self, *, diagonal: bool = False) -> bool:
        """Return whether the kernels take it."""
        shape = (self.blocks, self.width) + (() if diagonal else (self.width,))
        extents = zip(self.x.shape[1:], steps_of(self.x)[1:], strict=True)
        reach = sum((n - 1) * step for n, step in extents)
        return (
            self.x.dtype in sources.INPUTS
            and plans.writable(self.out, *shape)
            and self.x.device == self.out.device
            and max(reach, self.rows) < plans.INT_MAX // 2
        )


def gram_choice(engine: Engine, gram: Gram) -> tuple[sources.Variant, int]:
    """Return the variant and the size of tile for a layer."""

    def pairs(tile: int) -> int:
        tiles = -(-gram.width // tile)
        return tiles * (tiles + 1) // 2

    tile = plans.tile_of(gram.width, area=pairs)
    kind, patches = plans.input_kind(gram.x), gram.conv is not None
    return sources.gram_variant(kind, tile, patches, engine.problems), tile


def plan_grams(engine: Engine, grams: Sequence[Gram]) -> list[Launch]:
    """Return the launches for supported layers: one, or two, for each kind of tile."""
    groups: dict[tuple[sources.Variant, int], list[Gram]] = {}
    for gram in grams:
        if gram.width and gram.blocks:
            groups.setdefault(gram_choice(engine, gram), []).append(gram)
    launches: list[Launch] = []
    for (variant, tile), members in groups.items():
        for batch in plans.batches(len(members), engine.problems):
            launches += gram_launches(
                engine, variant, tile, [members[i] for i in batch]
            )
    return launches


def gram_launches(
    engine: Engine, variant: sources.Variant, tile: int, grams: Sequence[Gram]
) -> list[Launch]:
    """Return the launches for layers of one variant, at most ``engine.problems``."""
    half = grams[0].x.element_size() == 2
    widths = [-(-gram.width // tile) for gram in grams]
    tiles = [
        gram.blocks * (w * (w + 1) // 2) for gram, w in zip(grams, widths, strict=True)
    ]
    steps = [-(-gram.rows // (32 if half else 16)) for gram in grams]
    splits = plans.split_sums(engine, tiles, steps)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = []
    first = first_tile = 0
    for gram, width, count, (parts, share) in zip(
        grams, widths, tiles, splits, strict=True
    ):
        weight = plans.weight_of(gram.weight)
        keep += [gram.x, gram.out, *([] if weight is None else [weight])]
        kind = structures.GramProblem
        source = _rows_source if gram.conv is None else _patch_source
        if gram.conv is not None:
            kind = structures.PatchGramProblem  # type: ignore[assignment]
        problems.append(
            kind(
                source(gram),
                weight=pointer(weight),
                out=pointer(gram.out),
                out_block=gram.out.stride(0),
                out_row=gram.out.stride(1),
                positions=max(1, gram.positions),
                rows=gram.rows,
                blocks=gram.blocks,
                tiles=width,
                splits=parts,
                steps=share,
                first=first,
                first_tile=first_tile,
                alpha=gram.alpha,
                beta=gram.beta,
            )
        )
        first, first_tile = first + count * parts, first_tile + count
    split = any(parts > 1 for parts, _ in splits)
    size = first * tile**2 if split else 0
    space = torch.empty(size, dtype=torch.float32, device=grams[0].x.device)
    params = structures.fill(problems, engine.problems, parts=pointer(space))
    threads = 256 if tile == 128 else 128
    keep.append(space)
    launches = [Launch(variant, "gram", params, first, threads, keep=keep)]
    if split:
        finish = Launch(variant, "gram_finish", params, first_tile, threads, keep=keep)
        launches.append(finish)
    return launches


def rows_source(x: Tensor, *, bias: bool = False, blocks: int = 1) -> structures.Source:
    """Return where rows ``[N, S, b or 1, d]`` lie."""
    n, s, b, f = steps_of(x)
    if x.shape[3] == 1:
        f = 1  # as good as any, and layouts ask for it
    return structures.Source(
        data=pointer(x),
        stride_n=n,
        stride_block=b if blocks > 1 else 0,
        stride_feature=f,
        features=x.shape[3],
        bias=int(bias),
        layout=plans.layout_of(x, f, (n, s, b), 4),
        stride_s=s,
    )


def _rows_source(gram: Gram) -> structures.Source:
    return rows_source(gram.x, bias=gram.bias, blocks=gram.blocks)


def _patch_source(gram: Gram) -> structures.PatchSource:
    conv, x = gram.conv, gram.x
    assert conv is not None
    n, c, *space = steps_of(x)
    channels = x.shape[1] // conv.groups
    single = prod(conv.kernel_size) == 1
    strides = (n, *space, channels * c if conv.groups > 1 else 0)
    # With one channel in each group, taps are the features; they lie anywhere.
    run = 4 if single else channels
    return structures.PatchSource(
        data=pointer(x),
        stride_n=n,
        stride_block=channels * c,
        stride_feature=c,
        features=gram.features,
        bias=int(gram.bias),
        layout=plans.layout_of(x, c if channels > 1 else 0, strides, run),
        channels=channels,
        stride=tuple(space),
        size=tuple(x.shape[2:]),
        out=tuple(max(1, p) for p in conv.positions),
        kernel=conv.kernel_size,
        step=conv.stride,
        pad=conv.before,
        dilation=conv.dilation,
    )


def diagonal_choice(engine: Engine, gram: Gram) -> sources.Variant:
    """Return the variant for the diagonal of a layer."""
    return sources.diagonal_variant(sources.INPUTS[gram.x.dtype], engine.problems)


def plan_diagonals(engine: Engine, grams: Sequence[Gram]) -> list[Launch]:
    """Return the launches for the diagonals of supported layers of plain rows."""
    groups: dict[sources.Variant, list[Gram]] = {}
    for gram in grams:
        if gram.width and gram.blocks:
            groups.setdefault(diagonal_choice(engine, gram), []).append(gram)
    launches: list[Launch] = []
    for variant, members in groups.items():
        for batch in plans.batches(len(members), engine.problems):
            chosen = [members[i] for i in batch]
            launches += diagonal_launches(engine, variant, chosen)
    return launches


def diagonal_launches(
    engine: Engine, variant: sources.Variant, grams: Sequence[Gram]
) -> list[Launch]:
    """Return the launches for layers of one variant, at most ``engine.problems``."""
    chunks = [-(-gram.width // WIDTH) for gram in grams]
    tiles = [g.blocks * c for g, c in zip(grams, chunks, strict=True)]
    lanes = [1 if steps_of(g.x)[3] > 1 else WIDTH for g in grams]
    along = [256 // lane for lane in lanes]
    steps = [-(-g.rows // a) for g, a in zip(grams, along, strict=True)]
    splits = plans.split_sums(engine, tiles, steps)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = []
    first = first_tile = 0
    for i, gram in enumerate(grams):
        parts, share = splits[i]
        weight = plans.weight_of(gram.weight)
        keep += [gram.x, gram.out, *([] if weight is None else [weight])]
        n, s, b, f = steps_of(gram.x)
        problems.append(
            structures.DiagonalProblem(
                x=pointer(gram.x),
                weight=pointer(weight),
                out=pointer(gram.out),
                stride_n=n,
                stride_s=s,
                stride_block=b,
                stride_feature=f,
                out_block=gram.out.stride(0),
                positions=max(1, gram.positions),
                rows=gram.rows,
                blocks=gram.blocks,
                features=gram.features,
                bias=int(gram.bias),
                chunks=chunks[i],
                splits=parts,
                share=share * along[i],
                lanes=lanes[i],
                first=first,
                first_tile=first_tile,
                alpha=gram.alpha,
                beta=gram.beta,
            )
        )
        first, first_tile = first + tiles[i] * parts, first_tile + tiles[i]
    split = any(parts > 1 for parts, _ in splits)
    space = torch.empty(first * WIDTH if split else 0, device=grams[0].x.device)
    params = structures.fill(problems, engine.problems, parts=pointer(space))
    keep.append(space)
    launches = [Launch(variant, "diagonal", params, first, 256, keep=keep)]
    if split:
        name = "diagonal_finish"
        launches.append(Launch(variant, name, params, first_tile, WIDTH, keep=keep))
    return launches
