"""Second moments of a layer's inputs, from rows or from an image's patches."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from ekfac.kernels import normal_form
from ekfac.kernels.convolution import Geometry, PatchGram, unfolded
from ekfac.kernels.cuda import operators
from ekfac.kernels.cuda.gram import Gram

# Number of elements of the patches that are formed at a time, to stay in the cache.
PATCHES = 1 << 20


@dataclass(frozen=True)
class InputRows:
    """Inputs in memory, without the bias's constant input.

    Attributes:
        rows: ``[N, S, b, d]``.
        ones: Whether the bias's constant input 1 follows the features.
    """

    rows: Tensor
    ones: bool

    def gram(self) -> Gram | Tensor:
        """Return ``sum_ns a_ns a_ns^T``, or the operands of its CUDA kernel."""
        launched = operators.gram_of(self.rows, bias=self.ones)
        if launched is not None:
            return launched
        rows = self.rows
        products = normal_form.gram(rows)
        return with_ones(products, rows) if self.ones else products


def with_ones(gram: Tensor, rows: Tensor) -> Tensor:
    """Return the Gram matrix of rows followed by a one, from that of the rows.

    Args:
        gram: ``[b, d, d]``.
        rows: ``[N, S, b, d]``.
    """
    n, s, b, d = rows.shape
    full = gram.new_empty(b, d + 1, d + 1)
    full[:, :d, :d] = gram
    full[:, d, :d] = rows.sum(dim=(0, 1))
    full[:, :d, d] = full[:, d, :d]
    full[:, d, d] = n * s
    return full


@dataclass(frozen=True)
class InputPatches:
    """Inputs that are the patches of an image.

    Attributes:
        image: ``[N, groups c, *size]``, without the zeros around it.
        geometry: Where the taps fall on it.
        ones: Whether the bias's constant input 1 follows a patch's features.
    """

    image: Tensor
    geometry: Geometry
    ones: bool

    def gram(self) -> PatchGram | Gram | Tensor:
        """Return ``sum_ns a_ns a_ns^T`` by offsets, where that is cheaper.

        Else return the operands of the CUDA kernel that reads patches in place or,
        without a kernel, the sum over patches of a few images at a time.
        """
        image, geometry = self.image, self.geometry
        if geometry.pays(image.shape[1], len(image)):
            return PatchGram.of(image, geometry, ones=self.ones)
        launched = operators.patch_gram_of(image, geometry.conv, bias=self.ones)
        return self._by_patches() if launched is None else launched

    def _by_patches(self) -> Tensor:
        """Return the sum, from the patches of as many images as the cache holds.

        At least as many patches as they have features, or most of the time would go
        into writing results.
        """
        conv = self.geometry.conv
        cached = PATCHES // max(1, prod(conv.kernel_size) * self.image[0].numel())
        features = conv.features(self.image.shape[1])
        step = max(1, cached, -(-features // max(1, prod(conv.positions))))
        first, *others = self.image.split(step)
        gram_sum = normal_form.gram(unfolded(first, conv, ones=self.ones))
        for part in others:
            gram_sum.add_(normal_form.gram(unfolded(part, conv, ones=self.ones)))
        return gram_sum


def dense(source: InputRows | InputPatches) -> Tensor:
    """Return the second moment ``[b, d_in, d_in]``, whichever way it is taken."""
    gram = source.gram()
    if isinstance(gram, PatchGram):
        return gram.dense()
    if isinstance(gram, Gram):
        operators.run_("gram_" if gram.conv is None else "patch_gram_", [gram])
        return gram.out
    return gram
