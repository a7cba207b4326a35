"""Operands of tiled products, ``operands.cuh``: where rows and patches lie."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ekfac.kernels.convolution import Convolution
from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.compiler import BFLOAT16, HALF, TF32, Variant
from ekfac.kernels.cuda.launch import INT_MAX, RESIDENT, fields, pointer, steps_of

LAYOUT_ROWS, LAYOUT_FEATURES, LAYOUT_QUADS = range(3)
# Constants of ``pipeline.cuh``: steps in shared memory, and steps whose rows are known.
STAGES, RING = 4, 8
# Constants of ``warpgroup.cuh``: size of tile, steps in shared memory, bytes of ones.
WARPGROUP_TILE, WARPGROUP_STAGES, ONES = 192, 6, 256
# Constant of ``transposed.cuh``: steps of the right operand in shared memory.
TRANSPOSED_STAGES = 3
# The same of two operands, whose left one is in registers: of words, and of half types.
WARPGROUP_PAIR_TILE, TRANSPOSED_PAIR_STAGES, WARPGROUP_PAIR_STAGES = 128, 4, 8
# Constant of ``operands.cuh``: blocks that add up the parts of a tile.
SLICES = 8


@dataclass(frozen=True)
class Geometry:
    """How a variant of a tiled product divides its work, the same as ``operands.cuh``.

    Attributes:
        tile: Rows and columns of a tile.
        depth: Rows of a step of a sum.
        pipeline: Whether features have to lie in aligned chunks.
        threads: Threads of a block.
        shared: Bytes of dynamic shared memory: the operands of all stages, and rows.
        resident: Blocks that a multiprocessor runs at the same time.
    """

    tile: int
    depth: int
    pipeline: bool
    threads: int
    shared: int
    resident: int = RESIDENT

    @classmethod
    def of(cls, variant: Variant) -> Geometry:
        """Return the geometry of a variant."""
        defines = dict(variant.defines)
        tile, kind = defines["TILE"], defines["INPUT"]
        pair = variant.source == "scalings"  # two operands with rows of their own
        pipeline = bool(defines.get("PIPELINE"))
        depth = 32 if kind in (BFLOAT16, HALF) else 16
        wide = tile == 128 and (pair or not pipeline)
        weight, position = 4 * (kind == TF32), 12 * bool(defines.get("PATCHES"))
        rows = RING * depth * (4 + weight + position) * (1 + pair)
        if variant.warpgroups and pair:  # rows are not looked up
            stages = TRANSPOSED_PAIR_STAGES if kind == TF32 else WARPGROUP_PAIR_STAGES
            return cls(tile, depth, pipeline, 2 * tile, stages * 64 * tile, resident=1)
        if variant.warpgroups and kind == TF32:
            rows = RING * depth * (2 * (4 + position) + weight)  # in two orders
            shared = TRANSPOSED_STAGES * 64 * tile + rows
            return cls(tile, depth, pipeline, 2 * tile, shared, resident=1)
        if variant.warpgroups:
            shared = WARPGROUP_STAGES * 2 * 64 * tile + rows + ONES
            return cls(tile, depth, pipeline, 2 * tile, shared, resident=1)
        shared = STAGES * 2 * 64 * tile + rows if pipeline else 0
        return cls(tile, depth, pipeline, 256 if wide else 128, shared)


class Source(ctypes.Structure):
    """Where plain rows lie; ``Source`` of ``operands.cuh``."""

    _fields_ = [
        ("data", c_void_p),
        *fields(c_longlong, "stride_n stride_block stride_feature"),
        *fields(c_int, "features bias layout unused"),
        ("stride_s", c_longlong),
    ]


class PatchSource(ctypes.Structure):
    """Where patches lie; ``Source`` of ``operands.cuh`` with ``PATCHES``."""

    _fields_ = [
        ("data", c_void_p),
        *fields(c_longlong, "stride_n stride_block stride_feature"),
        *fields(c_int, "features bias layout channels"),
        ("stride", c_longlong * 3),
        *fields(c_int * 3, "size out kernel step pad dilation"),
    ]


def uses_tf32() -> bool:
    """Return whether torch's switch allows TF32 in products of float32.

    The switch is ``fp32_precision`` where PyTorch has it (2.9 and later): reading the
    older ``allow_tf32`` after it was set is an error there.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32 if precision is None else precision == "tf32")


def input_kind(dtype: torch.dtype) -> int:
    """Return how elements are multiplied, by type and torch's switch for TF32."""
    kind = compiler.INPUTS[dtype]
    float32 = kind == compiler.FLOAT
    return compiler.TF32 if float32 and uses_tf32() else kind


def tile_of(*widths: int, area: Callable[[int], int]) -> int:
    """Return the size of tile, 64 or 128.

    Larger tiles read less for every product; smaller ones waste less at the edge.
    """
    if max(widths) <= 64:
        return 64
    return 64 if area(64) * 64**2 * 3 < area(128) * 128**2 * 2 else 128


def layout_of(tensor: Tensor, feature: int, others: Sequence[int], run: int) -> int:
    """Return what neighbouring threads read: rows, features or quads of features.

    Args:
        tensor: What is read.
        feature: Step from one feature to the next, in elements.
        others: The other steps.
        run: Features at equal steps, a multiple of which starts a run.
    """
    if feature != 1:
        return LAYOUT_ROWS
    size = 4 * tensor.element_size()
    in_fours = all(step % 4 == 0 for step in others) and run % 4 == 0
    aligned = in_fours and not tensor.data_ptr() % size
    return LAYOUT_QUADS if aligned else LAYOUT_FEATURES


def _row_steps(x: Tensor) -> tuple[int, ...]:
    """Return the steps of rows ``[N, S, b, d]`` but that of the features."""
    n, s, b, _ = steps_of(x)
    return n, s, b


def _patch_steps(x: Tensor, conv: Convolution) -> tuple[int, ...]:
    """Return the steps of patches of ``[N, C, d, h, w]`` but that of the channels."""
    n, c, *space = steps_of(x)
    return n, *space, x.shape[1] // conv.groups * c if conv.groups > 1 else 0


def in_chunks(x: Tensor, conv: Convolution | None) -> bool:
    """Return whether features lie in aligned chunks of 16 bytes.

    Args:
        x: Rows ``[N, S, b, d]``, or ``[N, C, d, h, w]`` for a convolution.
        conv: How it reads them.
    """
    chunk = 16 // x.element_size()
    steps = _row_steps(x) if conv is None else _patch_steps(x, conv)
    if x.data_ptr() % 16 or any(step % chunk for step in steps):
        return False
    extents = zip(x.shape, steps_of(x), strict=True)
    if sum((n - 1) * step for n, step in extents) // chunk >= INT_MAX // 2:
        return False  # rows are counted in chunks
    if conv is None:
        return steps_of(x)[3] <= 1
    channels = x.shape[1] // conv.groups
    # The features of a chunk belong to one tap.
    return steps_of(x)[1] == 1 and channels % chunk == 0


def rows_source(x: Tensor, *, bias: bool = False, blocks: int = 1) -> Source:
    """Return where rows ``[N, S, b or 1, d]`` lie."""
    n, s, b, f = steps_of(x)
    if x.shape[3] == 1:
        f = 1  # as good as any, and layouts ask for it
    return Source(
        data=pointer(x),
        stride_n=n,
        stride_block=b if blocks > 1 else 0,
        stride_feature=f,
        features=x.shape[3],
        bias=int(bias),
        layout=layout_of(x, f, _row_steps(x), 4),
        stride_s=s,
    )


def patch_source(x: Tensor, conv: Convolution, *, bias: bool) -> PatchSource:
    """Return where the patches of ``[N, C, d, h, w]`` lie."""
    n, c, *space = steps_of(x)
    channels = x.shape[1] // conv.groups
    single = prod(conv.kernel_size) == 1
    # With one channel in each group, taps are the features; they lie anywhere.
    run = 4 if single else channels
    return PatchSource(
        data=pointer(x),
        stride_n=n,
        stride_block=channels * c,
        stride_feature=c,
        features=conv.features(x.shape[1]),
        bias=int(bias),
        layout=layout_of(x, c if channels > 1 else 0, _patch_steps(x, conv), run),
        channels=channels,
        stride=tuple(space),
        size=tuple(x.shape[2:]),
        out=tuple(max(1, p) for p in conv.positions),
        kernel=conv.kernel_size,
        step=conv.stride,
        pad=conv.before,
        dilation=conv.dilation,
    )
