"""How a convolution reads its input, and its patches for the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Convolution:
    """Where taps fall on the input, along one to three dimensions, slowest first.

    Attributes:
        kernel_size: Taps.
        stride: Step between output positions.
        dilation: Step between taps.
        before: Zeros in front of the input; those behind follow.
        positions: Output positions.
        groups: Groups of channels.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    positions: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        """Check that all extents have the same number of dimensions.

        Raises:
            ValueError: If they have not, or there are more than three.
        """
        found = {len(extents) for extents in self._extents()}
        if found not in ({1}, {2}, {3}):
            raise ValueError(
                f"A convolution has 1 to 3 dimensions, the same in all its extents; "
                f"got {self}."
            )

    def _extents(self) -> tuple[tuple[int, ...], ...]:
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
        fillers = zip(self._extents(), (1, 1, 1, 0, 1), strict=True)
        extents = [(filler,) * more + own for own, filler in fillers]
        return replace(
            self,
            kernel_size=extents[0],
            stride=extents[1],
            dilation=extents[2],
            before=extents[3],
            positions=extents[4],
        )

    def flat(self) -> list[int]:
        """Return the 16 numbers that stand for it in the operator's schema."""
        own = self.in_three()
        return [n for extents in own._extents() for n in extents] + [self.groups]

    @classmethod
    def from_flat(cls, numbers: Sequence[int]) -> Convolution:
        """Return the three-dimensional convolution that :meth:`flat` stands for.

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


def unfolded(x: Tensor, conv: Convolution) -> Tensor:
    """Return the patches of ``x`` as rows of the normal form.

    Args:
        x: ``[N, C, d, h, w]``.
        conv: Three-dimensional.

    Returns:
        ``[N, S, groups, features]``, features in the order of the layer's weight.
    """
    axes = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    reach = [d * (k - 1) + 1 for k, _, d in axes]
    ends = zip(conv.positions, conv.stride, reach, conv.before, strict=True)
    behind = [
        max(0, (p - 1) * s + r - b - size)
        for (p, s, r, b), size in zip(ends, x.shape[2:], strict=True)
    ]
    widths = zip(reversed(conv.before), reversed(behind), strict=True)
    x = F.pad(x, [width for pair in widths for width in pair])
    for axis in range(3):
        x = x.unfold(2 + axis, reach[axis], conv.stride[axis])
        x = x.narrow(2 + axis, 0, conv.positions[axis])[..., :: conv.dilation[axis]]
    n, channels = x.shape[:2]
    own, taps = channels // conv.groups, prod(conv.kernel_size)
    x = x.reshape(n, conv.groups, own, prod(conv.positions), taps)
    return x.permute(0, 3, 1, 2, 4).flatten(3)
