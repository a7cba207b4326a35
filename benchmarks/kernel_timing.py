"""Timing of the CUDA kernels: a device's ceilings, repetitions in turn, layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import table
from torch import Tensor

from ekfac.kernels.convolution import Convolution

Call = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """A device and its measured ceilings.

    Attributes:
        device: The device.
        bandwidth: Bytes per second, read and written.
        rates: Operations per second of a product, by type.
    """

    device: torch.device
    bandwidth: float
    rates: dict[torch.dtype, float]

    def floor(self, size: float, operations: float, dtype: torch.dtype) -> float:
        """Return the least time in seconds."""
        return max(size / self.bandwidth, operations / self.rates[dtype])


@dataclass(frozen=True)
class ConvLayer:
    """A convolution of a ResNet: channels, kernel, stride and size of the input."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int

    @property
    def positions(self) -> int:
        """Output positions along one axis."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def geometry(self) -> Convolution:
        """Return how it reads its input."""
        kernel, stride, before = self.kernel, self.stride, self.kernel // 2
        out = self.positions
        return Convolution(
            (kernel,) * 2, (stride,) * 2, (1, 1), (before,) * 2, (out,) * 2
        )


def resnet(depth: int, size: int) -> list[ConvLayer]:
    """Return the convolutions of ResNet-18 or ResNet-50 (He et al. 2016, Table 1)."""
    stem = ConvLayer(3, 64, 7, 2, size)
    layers, width, size = [stem], 64, (stem.positions + 1) // 2
    counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    for stage, count in enumerate(counts):
        inner = 64 * 2**stage
        outer = inner if depth == 18 else 4 * inner
        for number in range(count):
            stride = 2 if stage and not number else 1
            smaller = (size - 1) // stride + 1
            if depth == 18:
                layers.append(ConvLayer(width, inner, 3, stride, size))
                layers.append(ConvLayer(inner, inner, 3, 1, smaller))
            else:
                layers.append(ConvLayer(width, inner, 1, 1, size))
                layers.append(ConvLayer(inner, inner, 3, stride, size))
                layers.append(ConvLayer(inner, outer, 1, 1, smaller))
            if width != outer or stride > 1:
                layers.append(ConvLayer(width, outer, 1, stride, size))
            width, size = outer, smaller
    return layers


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Call, device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def medians(calls: Sequence[Call], device: torch.device, repeats: int) -> list[float]:
    """Return the median seconds of each, run in turn after two warm-ups."""
    for call in calls:
        for _ in range(2):
            call()
    synchronize(device)
    times = [[once(call, device) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def ceilings(device: torch.device, quick: bool) -> Device:
    """Measure bandwidth and rates."""
    size = 1 << (20 if quick else 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = medians([lambda: target.copy_(source)], device, 5)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        n = 256 if quick else 8192
        x = torch.randn(n, n, device=device).to(dtype)
        (product,) = medians([lambda x=x: x @ x], device, 5)  # type: ignore[misc]
        rates[dtype] = 2 * n**3 / product
    return Device(device, 2 * size / seconds, rates)


class Bench:
    """Collects rows of the table."""

    def __init__(self, machine: Device, repeats: int) -> None:
        self.machine, self.repeats = machine, repeats
        self.rows: list[dict[str, Any]] = []

    def add(
        self, what: str, ours: Call, theirs: Call, floor: float, error: float
    ) -> None:
        """Time both and add a row; ``error`` is the distance of their results."""
        device = self.machine.device
        own, other = medians([ours, theirs], device, self.repeats)
        peaks = [memory(call, device) for call in (ours, theirs)]
        self.rows.append(
            {
                "what": what,
                "kernel ms": own * 1e3,
                "torch ms": other * 1e3,
                "torch over kernel": other / own,
                "floor ms": floor * 1e3,
                "over floor": own / floor,
                "MiB": peaks[0],
                "torch MiB": peaks[1],
                "error": error,
            }
        )
        print(table(self.rows[-1:]), flush=True)


def memory(call: Call, device: torch.device) -> float:
    """Return what a call allocates at its peak, in MiB; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative distance of two lists of tensors."""
    pairs = zip(found, expected, strict=True)
    return max(
        float((f.double() - e.double()).norm() / e.double().norm()) for f, e in pairs
    )
