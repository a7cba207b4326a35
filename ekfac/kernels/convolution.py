"""Convolutions: their patches, and the second moment of patches without forming them.

Two taps of a kernel read the same image at a fixed offset. Their block of the patches'
second moment is the sum, over a window of the image, of the channels' products at that
offset. Pairs of taps with the same offset have overlapping windows, each nearly the
whole image. So the whole image is multiplied once for each offset, the few rows and
columns that only some windows contain once each, and every pair of taps subtracts those
that its window lacks. For a 3 x 3 kernel with stride 1 that is 13 offsets instead of 81
pairs of taps, and no patch is copied. With a stride fewer pairs share an offset.

The images are copied a few at a time, the channels of a pixel next to one another and
zeros between the rows. An image and its shifted self are then matrices without a
further copy, and stay in the cache until all products are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """Positions of taps on the input, along one to three dimensions, slowest first.

    Attributes:
        kernel_size: Number of taps.
        stride: Step between output positions.
        dilation: Step between taps.
        before: Number of zeros in front of the input; the number behind it follows.
        positions: Number of output positions.
        groups: Number of groups of channels.

    Raises:
        ValueError: If the extents differ in dimensions or have more than three.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    positions: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        """Check the numbers of dimensions."""
        dimensions = {len(extents) for extents in self.extents()}
        if dimensions not in ({1}, {2}, {3}):
            raise ValueError(
                "A convolution has 1 to 3 dimensions, the same in all its extents, "
                f"got {self}."
            )

    def extents(self) -> tuple[tuple[int, ...], ...]:
        """Return everything but the groups, in the order of the attributes."""
        return (
            self.kernel_size,
            self.stride,
            self.dilation,
            self.before,
            self.positions,
        )

    def in_three(self) -> Convolution:
        """Return the same convolution with three dimensions."""
        more = 3 - len(self.kernel_size)
        fillers = zip(self.extents(), (1, 1, 1, 0, 1), strict=True)
        kernel, stride, dilation, before, positions = (
            (filler,) * more + extent for extent, filler in fillers
        )
        return Convolution(kernel, stride, dilation, before, positions, self.groups)

    def flat(self) -> list[int]:
        """Return the 16 numbers that describe it in the operator's schema."""
        three = self.in_three()
        return [n for extents in three.extents() for n in extents] + [self.groups]

    @classmethod
    def from_flat(cls, numbers: Sequence[int]) -> Convolution:
        """Return the three-dimensional convolution of the numbers of :meth:`flat`.

        Raises:
            ValueError: Unless there are 16 numbers.
        """
        if len(numbers) != 16:
            raise ValueError(
                f"A convolution is 16 numbers, got {len(numbers)}; Convolution.flat() "
                "gives them."
            )
        kernel, stride, dilation, before, positions = (
            (numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, 15, 3)
        )
        return cls(kernel, stride, dilation, before, positions, numbers[15])

    def features(self, channels: int) -> int:
        """Return the width of one group's patches."""
        return channels // self.groups * prod(self.kernel_size)


def with_depth(x: Tensor) -> Tensor:
    """Return ``[N, C, *]`` with three dimensions of space, as a view."""
    while x.dim() < 5:
        x = x.unsqueeze(2)
    return x


def unfolded(x: Tensor, conv: Convolution, *, ones: bool = False) -> Tensor:
    """Return the patches of an input ``[N, C, *]`` without its zeros: :func:`patches`.

    Args:
        x: The input.
        conv: Of the input's dimensions.
        ones: Whether to append the bias's constant input 1.
    """
    widths: list[int] = []
    axes = zip(x.shape[2:], *conv.extents(), strict=True)
    for size, k, s, d, before, positions in axes:
        behind = (positions - 1) * s + d * (k - 1) + 1 - before - size
        widths = [before, behind, *widths]  # the last axis first
    x = F.pad(x, widths) if any(widths) else x  # a negative width crops
    return patches(
        x, conv.kernel_size, conv.stride, conv.dilation, conv.groups, ones=ones
    )


def patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    ones: bool = False,
) -> Tensor:
    """Return the patches of a padded input.

    Args:
        x: ``[N, C, *]``, already padded.
        kernel_size: Extent of the kernel in each of the ``k`` dimensions.
        stride: Step between output positions.
        dilation: Step between the kernel's taps.
        groups: Number of groups of channels.
        ones: Whether to append the bias's constant input 1.

    Returns:
        ``[N, S, groups, d_in]``, features in the order of a convolution's weight. A
        feature's positions are adjacent in memory, so that rows of pixels are copied.
    """
    spatial = len(kernel_size)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        # [..., positions, ..., window]: the window is appended as a last dimension.
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    n, channels = x.shape[:2]
    out = x.shape[2 : 2 + spatial]
    windows = x.reshape(n, groups, channels // groups, *out, *kernel_size)
    kernel = range(3 + spatial, 3 + 2 * spatial)
    windows = windows.permute(0, 1, 2, *kernel, *range(3, 3 + spatial))
    features = channels // groups * prod(kernel_size)
    result = x.new_ones(n, groups, features + ones, prod(out))
    result[:, :, :features].view(windows.shape).copy_(windows)
    return result.permute(0, 3, 1, 2)


# The cost, in multiplications, of reading and writing one number and of starting one
# product: fitted to measured times by benchmarks/correlation.py.
TRANSFER = 32
START = 3_000_000
# Number of elements that a CPU copies at a time, to keep them in its cache.
CACHED = 1 << 20


class Segment(NamedTuple):
    """Pixels of one axis that one tap reads, and those that a second tap reads.

    Attributes:
        phase: Pixel number modulo the stride.
        start: First pixel, in strides.
        stop: One past the last.
        other: The second tap's phase.
        shift: How many strides further on the second tap is.
        whole: Whether these are all the pixels at which both taps are inside the image.
    """

    phase: int
    start: int
    stop: int
    other: int
    shift: int
    whole: bool


Cell = tuple[Segment, ...]
Pairs = dict[tuple[int, int], int]


@dataclass(frozen=True)
class Geometry:
    """Positions of a kernel's taps on an image.

    Attributes:
        size: Number of pixels along every axis, without the zeros around the image.
        conv: The convolution.
    """

    size: tuple[int, ...]
    conv: Convolution

    @property
    def axes(self) -> Iterator[tuple[int, ...]]:
        """The size and the extents of the convolution on every axis."""
        return zip(self.size, *self.conv.extents(), strict=True)

    def pays(self, channels: int, images: int) -> bool:
        """Return whether :class:`PatchGram` is cheaper than the product of patches.

        Args:
            channels: Number of channels of an image.
            images: Number of images.
        """
        cells = plan(self)
        if not cells:  # no tap ever meets the image
            return False
        channels, images = channels // self.conv.groups, images * self.conv.groups
        rows = frame(self).multiplied * images
        cost = rows * channels * (channels + TRANSFER) + START * len(cells)
        width = channels * prod(self.conv.kernel_size)
        return cost < prod(self.conv.positions) * images * width * (width + TRANSFER)


@lru_cache(maxsize=256)
def plan(geometry: Geometry) -> dict[Cell, Pairs]:
    """Return the cells: the products taken, and each one's sign in pairs of taps.

    Pairs are of taps ``t <= t'``; the sign is 1 for the whole of an offset and -1 for a
    part that the pair's window lacks.
    """
    axes = [_segments(*numbers) for numbers in geometry.axes]
    taps = list(product(*(range(k) for k in geometry.conv.kernel_size)))
    cells: dict[Cell, Pairs] = {}
    for i, first in enumerate(taps):
        for j, second in enumerate(taps[i:], i):
            pairs = zip(axes, first, second, strict=True)
            for cell in product(*(axis[t, u] for axis, t, u in pairs)):
                sign = prod(1 if segment.whole else -1 for segment in cell)
                cells.setdefault(cell, {})[i, j] = sign
    return cells


def _seen(
    tap: int,
    size: int,
    taps: int,
    stride: int,
    dilation: int,
    before: int,
    positions: int,
) -> tuple[int, int, int]:
    """Return a tap's pixel at position 0, and the range of positions inside the image.

    The pixel at position 0 may lie outside.
    """
    first = dilation * tap - before
    last = (size - 1 - first) // stride
    return first, max(0, -(first // stride)), min(positions, last + 1)


def _segments(*numbers: int) -> dict[tuple[int, int], list[Segment]]:
    """Return the segments of every pair of taps on one axis, the whole one first.

    Args:
        *numbers: Those of :attr:`Geometry.axes`.
    """
    size, taps, stride, *_ = numbers
    windows: dict[tuple[int, int], list[tuple[tuple[int, int], int, int]]] = {}
    seen = [_seen(tap, *numbers) for tap in range(taps)]
    pairs = [(t, u) for t in range(taps) for u in range(taps)]
    for pair in pairs:
        (first, *one), (second, *two) = (seen[tap] for tap in pair)
        start, stop = max(one[0], two[0]), min(one[1], two[1])
        if start < stop:
            turn, phase = divmod(first, stride)
            window = (pair, start + turn, stop + turn)
            windows.setdefault((phase, second - first), []).append(window)
    segments: dict[tuple[int, int], list[Segment]] = {pair: [] for pair in pairs}
    for (phase, offset), members in windows.items():
        shift, other = divmod(phase + offset, stride)
        low = max(0, -shift)
        high = min(_extent(size, stride, phase), _extent(size, stride, other) - shift)
        ends = {low, high}.union(*(window for _, *window in members))
        for pair, start, stop in members:
            segments[pair].append(Segment(phase, low, high, other, shift, True))
            segments[pair] += [
                Segment(phase, a, z, other, shift, False)
                for a, z in pairwise(sorted(ends))
                if z <= start or a >= stop
            ]
    return segments


def _extent(size: int, stride: int, phase: int) -> int:
    """Return the number of pixels of an axis with a given phase."""
    return len(range(phase, size, stride))


@dataclass(frozen=True)
class Frame:
    """Layout of images for the products: a phase, a row of pixels, the next row.

    Attributes:
        phases: The phases that products read.
        extents: Number of pixels along every axis, with the zeros behind them.
        margin: Number of zeros before the first pixel and behind the last.
        multiplied: Number of rows of all products of one image.
    """

    phases: tuple[tuple[int, ...], ...]
    extents: tuple[int, ...]
    margin: int
    multiplied: int

    @property
    def pixels(self) -> int:
        """Number of pixels of one image with all zeros."""
        return len(self.phases) * (prod(self.extents) + 2 * self.margin)

    def steps(self) -> list[int]:
        """Return the distance of neighbours along every axis, in pixels."""
        return [prod(self.extents[axis + 1 :]) for axis in range(len(self.extents))]

    def block(self, cell: Cell) -> tuple[int, int] | None:
        """Return first pixel and number of pixels of a contiguous cell, else None."""
        if not all(segment.whole for segment in cell[1:]):
            return None
        row = self.steps()[0]
        return self.margin + cell[0].start * row, (cell[0].stop - cell[0].start) * row


@lru_cache(maxsize=256)
def frame(geometry: Geometry) -> Frame:
    """Return the layout of a geometry that has cells."""
    cells = plan(geometry)
    phases = {tuple(s.phase for s in cell) for cell in cells}
    phases |= {tuple(s.other for s in cell) for cell in cells}
    reach = [max(abs(s.shift) for s in axis) for axis in zip(*cells, strict=True)]
    reach[0] = 0  # along the first axis cells leave out whole rows instead
    extents = tuple(
        _extent(size, stride, 0) + beyond
        for size, stride, beyond in zip(
            geometry.size, geometry.conv.stride, reach, strict=True
        )
    )
    empty = Frame(tuple(sorted(phases)), extents, 0, 0)
    margin = sum(a * b for a, b in zip(reach, empty.steps(), strict=True))
    rows = 0
    for cell in cells:
        block = empty.block(cell)
        rows += block[1] if block else prod(s.stop - s.start for s in cell)
    return replace(empty, margin=margin, multiplied=rows)


class _Images:
    """A few images in their frame: ``[phases, b, pixels, images, channels]``."""

    def __init__(self, x: Tensor, geometry: Geometry, count: int) -> None:
        self.conv, self.frame = geometry.conv, frame(geometry)
        groups = self.conv.groups
        outer = len(self.frame.phases), groups
        pixels = self.frame.pixels // len(self.frame.phases)
        self.all = x.new_zeros(*outer, pixels, count, x.shape[1] // groups)
        inner = self.all[:, :, self.frame.margin : pixels - self.frame.margin]
        self.inner = inner.unflatten(2, self.frame.extents)

    def fill_(self, x: Tensor) -> None:
        """Copy images ``[N, groups c, *size]`` in, zeros in place of missing ones."""
        # Matrices are transposed by tiles; other permutations are a few times slower.
        lines = x.reshape(x.shape[0] * x.shape[1], -1).t().contiguous()
        groups = self.conv.groups
        shape = *x.shape[2:], len(x), groups, x.shape[1] // groups
        pixels = lines.view(shape).movedim(-2, 0)
        for inner, phase in zip(self.inner, self.frame.phases, strict=True):
            places = zip(phase, self.conv.stride, strict=True)
            index = (slice(None), *(slice(r, None, s) for r, s in places))
            visible = pixels[index]
            index = (slice(None), *(slice(n) for n in visible.shape[1:-2]))
            part = inner[index]
            part[..., : len(x), :].copy_(visible)
            part[..., len(x) :, :].zero_()

    def pair(self, cell: Cell) -> tuple[Tensor, Tensor]:
        """Return the pixels that both taps read, ``[b, rows, c]`` each."""
        left = self.frame.phases.index(tuple(s.phase for s in cell))
        right = self.frame.phases.index(tuple(s.other for s in cell))
        block = self.frame.block(cell)
        if block is not None:
            start, length = block
            shifts = zip(cell, self.frame.steps(), strict=True)
            right_start = start + sum(segment.shift * step for segment, step in shifts)
            return (
                self.all[left, :, start : start + length].flatten(1, 2),
                self.all[right, :, right_start : right_start + length].flatten(1, 2),
            )
        groups = slice(None)
        first = (left, groups, *(slice(s.start, s.stop) for s in cell))
        shifted = (slice(s.start + s.shift, s.stop + s.shift) for s in cell)
        second = (right, groups, *shifted)
        return self.inner[first].flatten(1, -2), self.inner[second].flatten(1, -2)


@dataclass(frozen=True)
class PatchGram:
    """``sum_ns a_ns a_ns^T`` of the patches ``a``, as the products of the cells.

    Attributes:
        geometry: Where the patches lie.
        cells: The products in the order of :func:`plan`, ``[cells, b, c, c]``.
        image: The sum of the images, ``[b c, *size]``, if patches end with the bias's
            constant input 1; else ``None``.
        examples: Number of images.
    """

    geometry: Geometry
    cells: Tensor
    image: Tensor | None
    examples: int

    @classmethod
    def of(cls, x: Tensor, geometry: Geometry, *, ones: bool) -> PatchGram:
        """Return the sum over images ``[N, groups c, *size]``."""
        (n, channels), groups = x.shape[:2], geometry.conv.groups
        c, cells = channels // groups, plan(geometry)
        products = x.new_zeros(len(cells), groups, c, c)
        most = n
        if x.device.type == "cpu":
            # No fewer rows than columns, or writing results would take the time.
            numbers = max(CACHED, channels * c)
            most = numbers // (frame(geometry).pixels * channels)
        parts = max(1, -(-n // max(1, most)))
        count = max(1, -(-n // parts))  # as even as can be
        images = _Images(x, geometry, count)
        for part in x.split(count):
            images.fill_(part)
            for cell_sum, cell in zip(products, cells, strict=True):
                _add_product_(cell_sum, *images.pair(cell))
        return cls(geometry, products, x.sum(dim=0) if ones else None, n)

    @property
    def rows(self) -> int:
        """Number of patches."""
        return self.examples * prod(self.geometry.conv.positions)

    def __add__(self, other: PatchGram) -> PatchGram:
        """Return the sum over the images of both."""
        image = self.image
        if image is not None and other.image is not None:
            image = image + other.image
        return replace(
            self,
            cells=self.cells + other.cells,
            image=image,
            examples=self.examples + other.examples,
        )

    def dense(self) -> Tensor:
        """Return ``[b, d_in, d_in]``, features as in the weight."""
        _, b, c, _ = self.cells.shape
        taps = prod(self.geometry.conv.kernel_size)
        width, ones = c * taps, int(self.image is not None)
        out = self.cells.new_zeros(b, width + ones, width + ones)
        split = out[:, :width, :width].unflatten(2, (c, taps)).unflatten(1, (c, taps))
        blocks = self._blocks()
        # A few rows of one tap at a time, to keep them in the cache until complete.
        step = max(1, CACHED // (4 * b * width))
        for i, start, j in product(range(taps), range(0, c, step), range(taps)):
            rows = slice(start, start + step)
            for sign, number in blocks.get((min(i, j), max(i, j)), []):
                cell = self.cells[number] if i <= j else self.cells[number].mT
                split[:, rows, i, :, j].add_(cell[:, rows], alpha=sign)
        if self.image is not None:
            sums = self._sums(self.image).reshape(b, width)
            out[:, width, :width] = out[:, :width, width] = sums
            out[:, width, width] = self.rows
        return out

    def _blocks(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Return the signs and numbers of the cells of every pair of taps."""
        blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for number, pairs in enumerate(plan(self.geometry).values()):
            for pair, sign in pairs.items():
                blocks.setdefault(pair, []).append((sign, number))
        return blocks

    def _sums(self, image: Tensor) -> Tensor:
        """Return the sum over the pixels that every tap reads, ``[b c, K]``."""
        axes = list(self.geometry.axes)
        sums = []
        for taps in product(*(range(k) for k in self.geometry.conv.kernel_size)):
            seen = [_seen(t, *numbers) for t, numbers in zip(taps, axes, strict=True)]
            window = image
            for axis, (first, start, stop) in enumerate(seen, 1):
                step = self.geometry.conv.stride[axis - 1]
                pixels = range(first + start * step, first + stop * step, step)
                # A tap that never meets the image has stop < start.
                inside = slice(pixels.start, max(pixels.stop, pixels.start), step)
                index = *[slice(None)] * axis, inside
                window = window[index]
            sums.append(window.flatten(1).sum(dim=1))
        return torch.stack(sums, dim=1)


def _add_product_(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``L^T R`` of ``[b, rows, c]``; ``addmm`` splits one product over cores."""
    if len(out) == 1:
        out[0].addmm_(left[0].t(), right[0])
    else:
        out.baddbmm_(left.mT, right)
