"""From tensors to launches: how sums are split and problems laid out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ekfac.kernels import sources
from ekfac.kernels.engine import Engine
from ekfac.kernels.sources import Variant

# Blocks of threads for each multiprocessor, enough for the last ones to be few.
WAVES = 4
# Steps of a sum below which splitting it costs more than it gains.
MIN_STEPS = 16
INT_MAX = 2**31 - 1

LAYOUT_ROWS, LAYOUT_FEATURES, LAYOUT_QUADS = range(3)


@dataclass(frozen=True)
class Launch:
    """One kernel call, ready to go.

    Attributes:
        variant: What must be loaded.
        kernel: The function's name.
        params: Its argument.
        grid: Blocks of threads.
        threads: Threads of a block.
        shared: Bytes of dynamic shared memory.
        keep: Tensors that must live until the call is on the stream.
    """

    variant: Variant
    kernel: str
    params: ctypes.Structure
    grid: int
    threads: int
    shared: int = 0
    keep: Sequence[Tensor] = field(default=(), repr=False)


def execute(engine: Engine, launches: Sequence[Launch]) -> None:
    """Run loaded launches in order."""
    for one in launches:
        engine.launch(
            one.variant,
            one.kernel,
            one.params,
            grid=one.grid,
            threads=one.threads,
            shared=one.shared,
        )


def split_sums(
    engine: Engine, tiles: Sequence[int], steps: Sequence[int]
) -> list[tuple[int, int]]:
    """Return for each problem how many parts its sums are split into, and their steps.

    Parts are of about equal work, and enough of them for every multiprocessor.

    Args:
        engine: Says how many multiprocessors there are.
        tiles: Tiles of each problem's result.
        steps: Steps of each of its sums.
    """
    work = sum(t * s for t, s in zip(tiles, steps, strict=True))
    share = max(MIN_STEPS, -(-work // (engine.multiprocessors * WAVES)))
    result = []
    for length in steps:
        part = -(-length // max(1, round(length / share)))
        result.append((max(1, -(-length // max(1, part))), max(1, part)))
    return result


def batches(count: int, limit: int) -> list[range]:
    """Return ``range(count)`` in runs of at most ``limit``."""
    return [range(i, min(count, i + limit)) for i in range(0, count, limit)]


def input_kind(tensor: Tensor) -> int:
    """Return how elements are multiplied, by type and torch's switch for TF32."""
    kind = sources.INPUTS[tensor.dtype]
    if kind == sources.FLOAT and torch.backends.cuda.matmul.allow_tf32:
        return sources.TF32
    return kind


def tile_of(*widths: int, area: Callable[[int], int]) -> int:
    """Return the size of tile, 64 or 128.

    Larger tiles read less for every product; smaller ones waste less at the edge.

    Args:
        *widths: Extents of the result.
        area: Number of tiles of a given size.
    """
    if max(widths) <= 64:
        return 64
    return 64 if area(64) * 64**2 * 3 < area(128) * 128**2 * 2 else 128


def layout_of(tensor: Tensor, feature: int, others: Sequence[int], run: int) -> int:
    """Return how rows are best read.

    Args:
        tensor: What is read.
        feature: Step from one feature to the next, in elements.
        others: The other steps.
        run: Features at equal steps, a multiple of which starts a run.
    """
    if feature != 1:
        return LAYOUT_ROWS
    size = 4 * tensor.element_size()
    whole = all(step % 4 == 0 for step in others) and run % 4 == 0
    return LAYOUT_QUADS if whole and not tensor.data_ptr() % size else LAYOUT_FEATURES


def steps_of(tensor: Tensor) -> list[int]:
    """Return the strides, zero for dimensions of size one."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


def weight_of(weight: Tensor | None) -> Tensor | None:
    """Return weights ``[N, S]`` as the kernels read them."""
    return None if weight is None else weight.float().contiguous()


def writable(out: Tensor, *shape: int) -> bool:
    """Return whether a kernel can write ``out``: float32, of this shape, dense rows."""
    dense = out.shape[-1] == 1 or out.stride(-1) == 1
    return out.dtype == torch.float32 and tuple(out.shape) == shape and dense


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's first element, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
