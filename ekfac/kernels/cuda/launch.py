"""Launches: what an engine runs, and how sums are split over blocks of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ekfac.kernels.cuda.nvrtc_sources import Variant

# Blocks of threads for each multiprocessor, enough for the last ones to be few.
WAVES = 4
# Steps of a sum below which splitting it costs more than it gains.
MIN_STEPS = 16
INT_MAX = 2**31 - 1


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
        keep: Tensors that it touches; they live until the call is on the stream.
        scratch: Those of them that have no value before the first of its launches.
    """

    variant: Variant
    kernel: str
    params: ctypes.Structure
    grid: int
    threads: int
    shared: int = 0
    keep: Sequence[Tensor] = field(default=(), repr=False)
    scratch: Sequence[Tensor] = field(default=(), repr=False)


class Engine(Protocol):
    """Runs kernels on tensors of one device.

    Attributes:
        device: Where the tensors are.
        multiprocessors: How many blocks of threads run at a time, about.
        problems: Layers of one launch.
        shared: Bytes of shared memory that a block may have.
    """

    device: torch.device
    multiprocessors: int
    problems: int
    shared: int

    def load(self, variant: Variant) -> None:
        """Make a variant ready to be launched."""

    def launch(self, one: Launch) -> None:
        """Run a kernel of a loaded variant on the current stream."""


def execute(engine: Engine, launches: Sequence[Launch]) -> None:
    """Run loaded launches in order."""
    for one in launches:
        engine.launch(one)


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
