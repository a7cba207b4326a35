"""Second moments of a layer's inputs, from rows or from an image's patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch.nn.functional as F
from torch import Tensor

from ekfac.kernels import normal_form
from ekfac.kernels.convolution import Convolution, Geometry, PatchGram
from ekfac.kernels.cuda import operators
from ekfac.kernels.cuda.gram import Gram

# Numbers of the patches that are unfolded at a time; they are to stay in the cache.
PATCHES = 1 << 20


@dataclass(frozen=True)
class InputRows:
    """Inputs that are in memory, but for the bias's constant input.

    Attributes:
        rows: ``[N, S, b, d]``.
        ones: Whether a one is to follow the features.
    """

    rows: Tensor
    ones: bool

    def gram(self) -> Gram | Tensor:
        """Return ``sum_ns a_ns a_ns^T``, or what a kernel will make it of."""
        launched = operators.gram_of(self.rows, bias=self.ones)
        if launched is not None:
            return launched
        rows = self.rows
        if self.ones:
            rows = F.pad(rows, (0, 1), value=1.0)
        return normal_form.gram(rows)


@dataclass(frozen=True)
class InputPatches:
    """Inputs that are the patches of an image.

    Attributes:
        image: ``[N, groups c, *size]``, without the zeros around it.
        geometry: Where the taps fall.
        groups: Groups of channels.
        ones: Whether a one is to follow a patch's features.
    """

    image: Tensor
    geometry: Geometry
    groups: int
    ones: bool

    def gram(self) -> PatchGram | Gram | Tensor:
        """Return ``sum_ns a_ns a_ns^T`` by offsets, where that is cheaper.

        Else from the patches where they lie, on a device that has the kernel, or from
        those of a few images at a time.
        """
        image, geometry = self.image, self.geometry
        channels = image.shape[1] // self.groups
        if geometry.pays(channels, self.groups * len(image)):
            return PatchGram.of(image, geometry, self.groups, self.ones)
        conv = Convolution(
            geometry.kernel_size,
            geometry.stride,
            geometry.dilation,
            geometry.before,
            geometry.positions,
            self.groups,
        )
        launched = operators.patch_gram_of(image, conv, bias=self.ones)
        return self._unfolded() if launched is None else launched

    def _unfolded(self) -> Tensor:
        """Return the sum from as many images' patches at a time as the cache holds.

        And no fewer patches than these have features, or writing results would take
        the time.
        """
        geometry, channels = self.geometry, self.image.shape[1]
        taps = prod(geometry.kernel_size)
        cached = PATCHES // max(1, taps * self.image[0].numel())
        features = channels // self.groups * taps
        step = max(1, cached, -(-features // max(1, prod(geometry.positions))))
        gram_sum: Tensor | None = None
        for part in self.image.split(step):
            gram = normal_form.gram(self._patches(part))
            gram_sum = gram if gram_sum is None else gram_sum.add_(gram)
        assert gram_sum is not None
        return gram_sum

    def _patches(self, image: Tensor) -> Tensor:
        """Return the patches of some images, ``[n, S, groups, d_in]``."""
        geometry = self.geometry
        widths: list[int] = []
        for size, k, s, d, before, positions in geometry.axes:
            behind = (positions - 1) * s + d * (k - 1) + 1 - before - size
            widths = [before, max(0, behind), *widths]  # the last axis first
        return patches(
            F.pad(image, widths) if any(widths) else image,
            geometry.kernel_size,
            geometry.stride,
            geometry.dilation,
            self.groups,
            ones=self.ones,
        )


def dense(source: InputRows | InputPatches) -> Tensor:
    """Return the second moment ``[b, d_in, d_in]``, whichever way it is taken."""
    gram = source.gram()
    if isinstance(gram, PatchGram):
        return gram.dense()
    if isinstance(gram, Gram):
        operators.run_("gram_" if gram.conv is None else "patch_gram_", [gram])
        return gram.out
    return gram


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
        ``[N, S, groups, d_in]``, features in the order of a convolution's weight. In
        memory a feature's positions are neighbours: so they are copied row by row.
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
