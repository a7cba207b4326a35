"""The second moment of a convolution's patches, without the patches.

Two taps of a kernel see the same image, one some pixels further on: their block of the
second moment is a sum over a window of the image of the channels' products at that
offset. Pairs of taps with one offset have overlapping windows. The windows are cut into
disjoint cells, each is multiplied once, and every pair of taps adds up its cells: of a
3 x 3 kernel with stride 1, 13 offsets are multiplied in place of 81 pairs of taps, and
no patch is copied. A stride leaves fewer pairs that share an offset, no other change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from math import prod

import torch
from torch import Tensor

# On one axis: the first pixel, one past the last, the step between pixels, and the
# offset of the second tap from the first.
Segment = tuple[int, int, int, int]
Cell = tuple[Segment, ...]
Pairs = tuple[tuple[int, int], ...]

# Multiplications that take as long as reading and writing one number, and as starting
# one product: fitted to measured times by benchmarks/correlation.py.
TRANSFER = 64
START = 1_250_000


@dataclass(frozen=True)
class Geometry:
    """Where the taps of a kernel fall on an image. All have one entry per axis.

    Attributes:
        size: Pixels of the image, without the zeros around it.
        kernel_size: Taps.
        stride: Step between positions.
        dilation: Step between taps.
        before: Zeros in front of the image.
        positions: Output positions.
    """

    size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    positions: tuple[int, ...]

    def pays(self, channels: int, examples: int) -> bool:
        """Return whether this takes less time than the patches' own product."""
        cells = plan(self)
        if not cells:  # no tap ever meets the image
            return False
        pixels = sum(prod(len(range(*s[:3])) for s in cell) for cell in cells)
        cost = pixels * channels * (channels + TRANSFER) * examples
        width = channels * prod(self.kernel_size)
        patches = prod(self.positions) * width * (width + TRANSFER) * examples
        return cost + START * len(cells) < patches


@lru_cache(maxsize=256)
def plan(geometry: Geometry) -> dict[Cell, Pairs]:
    """Return the cells, and which pairs of taps ``t <= t'`` are made of each."""
    fields = vars(geometry).values()
    axes = [_segments(*numbers) for numbers in zip(*fields, strict=True)]
    taps = list(product(*(range(k) for k in geometry.kernel_size)))
    found: dict[Cell, list[tuple[int, int]]] = {}
    for i, first in enumerate(taps):
        for j, second in enumerate(taps[i:], i):
            pairs = zip(axes, first, second, strict=True)
            for cell in product(*(axis[t, u] for axis, t, u in pairs)):
                found.setdefault(cell, []).append((i, j))
    return {cell: tuple(pairs) for cell, pairs in found.items()}


def _segments(
    size: int, taps: int, stride: int, dilation: int, before: int, positions: int
) -> dict[tuple[int, int], list[Segment]]:
    """Return the segments of every pair of taps on one axis."""
    windows: dict[tuple[int, int], list[tuple[tuple[int, int], int, int]]] = {}
    every = [(t, u) for t in range(taps) for u in range(taps)]
    for pair in every:
        # The first tap is at stride p + first; both have to be inside the image.
        first, offset = dilation * pair[0] - before, dilation * (pair[1] - pair[0])
        nearest, farthest = first + min(0, offset), first + max(0, offset)
        start = max(0, -(nearest // stride))
        stop = min(positions, (size - 1 - farthest) // stride + 1)
        if start < stop:
            turn, phase = divmod(first, stride)
            window = (pair, start + turn, stop + turn)
            windows.setdefault((phase, offset), []).append(window)
    found: dict[tuple[int, int], list[Segment]] = {pair: [] for pair in every}
    for (phase, offset), alike in windows.items():
        ends = sorted({end for _, *window in alike for end in window})
        for low, high in pairwise(ends):
            pixels = (phase + stride * low, phase + stride * (high - 1) + 1)
            for pair, start, stop in alike:
                if start <= low and high <= stop:
                    found[pair].append((*pixels, stride, offset))
    return found


@dataclass(frozen=True)
class PatchGram:
    """``sum_ns a_ns a_ns^T`` of the patches ``a``, as the products of the cells.

    Attributes:
        geometry: Where the patches lie.
        cells: The products in the order of :func:`plan`, ``[cells, b, c, c]``.
        image: The sum of the images, ``[b c, *size]``.
        examples: How many images there were.
        ones: The patches end with the bias's constant input 1.
    """

    geometry: Geometry
    cells: Tensor
    image: Tensor
    examples: int
    ones: bool

    @classmethod
    def of(cls, x: Tensor, geometry: Geometry, groups: int, ones: bool) -> PatchGram:
        """Return the sum over images ``[N, groups c, *size]``."""
        n, channels = x.shape[:2]
        split = x.reshape(n, groups, channels // groups, *geometry.size)
        axes = range(3, split.dim())
        # With the images next to one another, a row of a cell is one matrix.
        pixels = split.permute(1, *axes, 0, 2).contiguous()
        cells = torch.stack([_product(pixels, cell) for cell in plan(geometry)])
        return cls(geometry, cells, x.sum(dim=0), n, ones)

    @property
    def rows(self) -> int:
        """How many patches there were."""
        return self.examples * prod(self.geometry.positions)

    def __add__(self, other: PatchGram) -> PatchGram:
        """Return the sum over the images of both, which have one size."""
        return replace(
            self,
            cells=self.cells + other.cells,
            image=self.image + other.image,
            examples=self.examples + other.examples,
        )

    def dense(self) -> Tensor:
        """Return ``[b, d_in, d_in]``, features as in the weight."""
        _, b, c, _ = self.cells.shape
        taps = prod(self.geometry.kernel_size)
        width = c * taps
        out = self.cells.new_zeros(b, width + self.ones, width + self.ones)
        split = out[:, :width, :width].unflatten(2, (c, taps)).unflatten(1, (c, taps))
        for (i, j), block in self._blocks():
            split[:, :, i, :, j] = block
            if i != j:
                split[:, :, j, :, i] = block.mT
        if self.ones:
            sums = self._sums(taps).reshape(b, width)
            out[:, width, :width] = out[:, :width, width] = sums
            out[:, width, width] = self.rows
        return out

    def _sums(self, taps: int) -> Tensor:
        """Return the sum of what every tap sees, ``[b c, K]``."""
        sums = self.image.new_zeros(len(self.image), taps)
        for cell, pairs in plan(self.geometry).items():
            for i, j in pairs:
                if i == j:
                    window = [slice(None), *(slice(*segment[:3]) for segment in cell)]
                    sums[:, i] += self.image[tuple(window)].flatten(1).sum(dim=1)
        return sums

    def _blocks(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield every pair of taps and its block ``[b, c, c]``."""
        members: dict[tuple[int, int], list[int]] = {}
        for number, pairs in enumerate(plan(self.geometry).values()):
            for pair in pairs:
                members.setdefault(pair, []).append(number)
        for pair, numbers in members.items():
            yield pair, self.cells[numbers].sum(dim=0)


def _product(pixels: Tensor, cell: Cell) -> Tensor:
    """Return one cell's product ``[b, c, c]`` of ``[b, *size, N, c]``."""
    here = [slice(None), *(slice(a, z, step) for a, z, step, _ in cell)]
    there = [slice(None), *(slice(a + o, z + o, step) for a, z, step, o in cell)]
    left, right = pixels[tuple(here)], pixels[tuple(there)]
    b, n, c = len(left), left.shape[-2], left.shape[-1]
    row = left.shape[-3] * n
    # Rows one by one need no copy, but a result each: only where they are long.
    length = row if row >= c else left[0, ..., 0].numel()
    left, right = left.reshape(-1, length, c), right.reshape(-1, length, c)
    return torch.bmm(left.mT, right).reshape(b, -1, c, c).sum(dim=1)
