"""Convolutions and their transposes, in one to three dimensions.

A convolution is a linear map of the patches of its padded input, applied at every
output position (KFC, Grosse & Martens 2016); groups are independent blocks. A
transposed convolution is a convolution with the flipped kernel of the input with zeros
inserted between its elements. With ``conv_factors="spatially_uncorrelated"`` every tap
of the kernel is a block of its own, see :class:`UncorrelatedConv`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ekfac.errors import UnsupportedLayerError
from ekfac.kernels.convolution import Convolution, Geometry, patches
from ekfac.kernels.input_gram import InputPatches
from ekfac.layers.base import Adapter, Shortcuts, Slot, register, shortcuts_for

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class _ConvAdapter(Adapter):
    """A convolution or its transpose."""

    uneven = True
    module: Conv | ConvTranspose

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        # Has the kernel size, stride, padding, dilation and groups: the module, or a
        # namespace where a call gives them.
        self.settings: Any = module

    @abstractmethod
    def padded(self, x: Tensor) -> Tensor:
        """Return the padded input ``[N, C, *]``."""

    def steps(self) -> Sequence[int]:
        """Return the step between output positions in the padded input."""
        steps: Sequence[int] = self.settings.stride
        return steps

    def framed(self, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return an image, and the number of zeros before and after it on each axis.

        Together they are the padded input.
        """
        none = [0] * len(self.settings.kernel_size)
        return self.padded(x), none, none

    def taps(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """Return an image ``[N, C, *]``, and where the kernel's taps fall on it."""
        module = self.settings
        image, before, after = self.framed(self.batched(x))
        size, steps = tuple(image.shape[2:]), tuple(self.steps())
        axes = zip(
            size, before, after, module.kernel_size, steps, module.dilation, strict=True
        )
        places = tuple(
            (n + lo + hi - d * (k - 1) - 1) // s + 1 for n, lo, hi, k, s, d in axes
        )
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        conv = Convolution(
            kernel, steps, dilation, tuple(before), places, module.groups
        )
        return image, Geometry(size, conv)

    def batched(self, x: Tensor) -> Tensor:
        """Add the batch dimension that an unbatched call lacks."""
        return x.unsqueeze(0) if x.dim() == len(self.settings.kernel_size) + 1 else x

    def inputs(self, x: Tensor) -> Tensor:
        """Return the patches ``[N, S, groups, d_in]``."""
        module = self.settings
        return patches(
            self.padded(self.batched(x)),
            module.kernel_size,
            self.steps(),
            module.dilation,
            module.groups,
            ones=self.bias is not None,
        )

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, groups, d_out]`` of ``[N, C_out, *]``."""
        grad = self.batched(grad)
        n, channels, groups = grad.shape[0], grad.shape[1], self.settings.groups
        return grad.reshape(n, groups, channels // groups, -1).permute(0, 3, 1, 2)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[groups, d_out, d_in]`` of ``[C_out, C_in / groups, *kernel]``."""
        groups = self.settings.groups
        matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
        if bias is None:
            return matrix
        return torch.cat([matrix, bias.reshape(groups, -1, 1)], dim=-1)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``[C_out, C_in / groups, *kernel]`` and bias ``[C_out]``."""
        bias = None
        if self.bias is not None:
            matrix, bias = matrix[..., :-1], matrix[..., -1].reshape(-1)
        shape = (-1, self.settings.in_channels // self.settings.groups)
        return matrix.reshape(*shape, *self.settings.kernel_size), bias


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvAdapter(_ConvAdapter):
    """Convolutions with any stride, padding, dilation and groups."""

    module: Conv

    def padded(self, x: Tensor) -> Tensor:
        """Pad as the layer's own forward does, with any ``padding`` and mode."""
        widths = self._padding()
        if not any(widths):
            return x
        mode = self.settings.padding_mode
        return F.pad(x, widths, mode="constant" if mode == "zeros" else mode)

    def framed(self, x: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return the input and its zeros; other paddings belong to the image."""
        if self.settings.padding_mode != "zeros":
            return super().framed(x)
        widths = self._padding()
        return x, widths[-2::-2], widths[::-2]

    def _padding(self) -> list[int]:
        """Return the widths in the order of ``F.pad``: last dimension first."""
        module, widths = self.settings, []
        for axis in reversed(range(len(module.kernel_size))):
            if module.padding == "same":
                span = module.dilation[axis] * (module.kernel_size[axis] - 1)
                widths += [span // 2, span - span // 2]
            elif module.padding == "valid":
                widths += [0, 0]
            else:
                width = module.padding[axis]
                assert isinstance(width, int)
                widths += [width, width]
        return widths


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTransposeAdapter(_ConvAdapter):
    """Transposed convolutions, as convolutions of the input with zeros inserted."""

    module: ConvTranspose

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the input.

        Raises:
            UnsupportedLayerError: If ``output_size`` is not what the layer's own
                ``output_padding`` gives.
        """
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        x = super().input_of(args, kwargs)
        if size is not None:
            _, geometry = self.taps(torch.empty_like(x, device="meta"))
            natural = list(geometry.conv.positions)
            if list(size)[-len(natural) :] != natural:
                raise UnsupportedLayerError(
                    f"{type(self.module).__name__} was called with output_size="
                    f"{list(size)}, its own settings give {natural}; set "
                    "output_padding in its constructor instead of output_size."
                )
        return x

    def steps(self) -> Sequence[int]:
        """Return ones: the inserted zeros take the place of the stride."""
        return [1] * len(self.settings.kernel_size)

    def padded(self, x: Tensor) -> Tensor:
        """Insert the stride's zeros, and pad for the flipped kernel."""
        module = self.settings
        for axis, stride in enumerate(module.stride):
            x = _spread(x, 2 + axis, stride)
        widths: list[int] = []
        for axis in reversed(range(len(module.kernel_size))):
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
            padding = module.padding[axis]
            assert isinstance(padding, int)
            width = reach - padding
            widths += [width, width + module.output_padding[axis]]
        return F.pad(x, widths)  # a negative width crops

    def _turned(self, weight: Tensor) -> Tensor:
        """Return a weight ``[C, *, *kernel]`` with every kernel axis flipped."""
        return weight.flip(list(range(2, 2 + len(self.settings.kernel_size))))

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[groups, d_out, d_in]`` of ``[C_in, C_out / groups, *kernel]``."""
        groups = self.settings.groups
        w = self._turned(weight)
        w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2)
        return super().pack(w.reshape(-1, *w.shape[2:]), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``[C_in, C_out / groups, *kernel]`` and bias ``[C_out]``."""
        w, bias = super().unpack(matrix)
        groups = self.settings.groups
        w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:]).transpose(1, 2)
        return self._turned(w.reshape(-1, *w.shape[2:])), bias


def _spread(x: Tensor, axis: int, stride: int) -> Tensor:
    """Insert ``stride - 1`` zeros between neighbours along ``axis``."""
    if stride == 1:
        return x
    shape = list(x.shape)
    shape[axis] = (shape[axis] - 1) * stride + 1
    spread = x.new_zeros(shape)
    index = [slice(None)] * x.dim()
    index[axis] = slice(None, None, stride)
    spread[tuple(index)] = x
    return spread


@shortcuts_for(ConvAdapter, ConvTransposeAdapter)
class ConvShortcuts(Shortcuts[ConvAdapter | ConvTransposeAdapter]):
    """The patches' second moment, and patches in a basis, from the image."""

    def elements_per_example(self, x: Tensor) -> int:
        """Return the size of one example's patch matrix."""
        adapter = self.adapter
        taps: int = prod(adapter.settings.kernel_size)
        return taps * adapter.batched(x)[0].numel()

    def input_gram(self, x: Tensor) -> InputPatches:
        """Return the image and where the kernel's taps fall on it."""
        return InputPatches(*self.adapter.taps(x), self.adapter.bias is not None)

    def rotated_inputs(self, x: Tensor, basis: Tensor) -> Tensor:
        """Return the patches in a basis, ``[N, groups, m, S]``: a convolution with it.

        Args:
            x: The layer's input.
            basis: ``[groups, d_in, m]``, some columns of the basis.
        """
        adapter, module = self.adapter, self.adapter.settings
        image, before, after = adapter.framed(adapter.batched(x))
        if before != after:
            pairs = zip(reversed(before), reversed(after), strict=True)
            image = F.pad(image, [width for pair in pairs for width in pair])
            before = [0] * len(before)
        groups, _, m = basis.shape
        features = module.in_channels // groups * prod(module.kernel_size)
        turned = basis.new_empty(groups, m, features)
        for to, of in zip(turned, basis, strict=True):
            to.copy_(of[:features].t())  # torch transposes two dimensions by tiles
        kernels = turned.reshape(groups * m, -1, *module.kernel_size)
        bias = None if adapter.bias is None else basis[:, -1].reshape(-1)
        steps, none = list(adapter.steps()), [0] * len(before)
        rotated = torch.convolution(
            image, kernels, bias, steps, before, module.dilation, False, none, groups
        )
        return rotated.reshape(len(image), groups, m, -1)


class UncorrelatedConv(Adapter):
    """A convolution whose patches' pixels are taken to be uncorrelated.

    Grosse & Martens 2016, SUA: ``E[a_t+d a_t+d'^T]`` is zero for taps ``d != d'`` and
    one matrix ``A`` ``[C_in, C_in]`` for all ``d = d'``. Every tap is then a block
    ``[C_out, C_in]``, and all have the same factors. ``A`` is the mean over taps of the
    blocks on the diagonal of the patches' second moment: the closest ``I (x) A`` to it
    in Frobenius norm. The bias is a block of its own, :class:`ConvBias`.

    Attributes:
        dense: The layer's adapter with patches.
    """

    module: Conv | ConvTranspose
    shared_factors = True
    uneven = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.bias = None
        self.dense = _with_patches(module)
        self.dense.bias = None

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the block of the weight and, if there is one, that of the bias."""
        blocks: dict[str, Adapter] = {"": cls(module)}
        if module._parameters.get("bias") is not None:
            blocks["bias"] = ConvBias(module)
        return blocks

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the input, as the adapter with patches does."""
        return self.dense.input_of(args, kwargs)

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, taps, C_in]``."""
        return self.by_tap(self.dense.inputs(x))

    def by_tap(self, rows: Tensor) -> Tensor:
        """Return patches ``[N, S, 1, C taps]`` as ``[N, S, taps, C]``."""
        taps = prod(self.module.kernel_size)
        n, s = rows.shape[:2]
        return rows.reshape(n, s, -1, taps).transpose(-1, -2)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, taps, C_out]``, the same for every tap."""
        rows = self.dense.output_gradients(grad)
        return rows.expand(-1, -1, prod(self.module.kernel_size), -1)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[taps, C_out, C_in]``."""
        matrix = self.dense.pack(weight, None)[0]
        rows, channels = len(matrix), self.module.in_channels
        return matrix.reshape(rows, channels, -1).permute(2, 0, 1)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight, and no bias."""
        return self.dense.unpack(matrix.permute(1, 2, 0).flatten(1).unsqueeze(0))


class ConvBias(Adapter):
    """The bias of a convolution, a linear map of the constant 1 at every position."""

    uneven = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.weight, self.bias = Slot("bias"), None
        self.dense = _with_patches(module)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the input, as the adapter with patches does."""
        return self.dense.input_of(args, kwargs)

    def inputs(self, x: Tensor) -> Tensor:
        """Return ones, ``[N, S, 1, 1]``."""
        image, geometry = self.dense.taps(x)
        return image.new_ones(len(image), prod(geometry.conv.positions), 1, 1)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, 1, C_out]``."""
        return self.dense.batched(grad).flatten(2).transpose(1, 2).unsqueeze(2)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, C_out, 1]``."""
        return weight.reshape(1, -1, 1)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the bias."""
        return matrix.reshape(-1), None


def _with_patches(module: nn.Module) -> _ConvAdapter:
    """Return the adapter with patches of a convolution or its transpose."""
    is_transpose = isinstance(module, ConvTranspose)
    return ConvTransposeAdapter(module) if is_transpose else ConvAdapter(module)


def uncorrelated(adapter: type[Adapter], module: nn.Module) -> type[Adapter]:
    """Return the adapter without correlations between pixels, or ``adapter``.

    Convolutions with groups keep theirs, since their factors are small already, and
    those whose kernel has one tap, since they have no such correlations.
    """
    if adapter not in (ConvAdapter, ConvTransposeAdapter):
        return adapter
    assert isinstance(module, Conv | ConvTranspose)
    fits = module.groups == 1 < prod(module.kernel_size)
    return UncorrelatedConv if fits else adapter


@shortcuts_for(UncorrelatedConv)
class UncorrelatedShortcuts(Shortcuts[UncorrelatedConv]):
    """The pixels' second moment, and patches in a basis, from the image."""

    def elements_per_example(self, x: Tensor) -> int:
        """Return the size of one example's patch matrix."""
        dense = self.adapter.dense
        return prod(self.adapter.module.kernel_size) * dense.batched(x)[0].numel()

    def input_gram(self, x: Tensor) -> Tensor:
        """Return the pixels' second moment, each weighted by the taps that read it."""
        image, geometry = self.adapter.dense.taps(x)
        weighted = image * _coverage(geometry, image)
        left, right = (t.transpose(0, 1).flatten(1) for t in (weighted, image))
        return (left @ right.t()).unsqueeze(0)

    def rotated_inputs(self, x: Tensor, basis: Tensor) -> Tensor:
        """Return patches of the image in the basis of channels, ``[N, taps, m, S]``.

        Args:
            x: The layer's input.
            basis: ``[1, C_in, m]``, some columns of the basis.
        """
        adapter, module = self.adapter, self.adapter.module
        image = adapter.dense.batched(x)
        rotated = torch.tensordot(image, basis[0], dims=([1], [0])).movedim(-1, 1)
        rows = patches(
            adapter.dense.padded(rotated),
            module.kernel_size,
            adapter.dense.steps(),
            module.dilation,
            1,
        )
        return adapter.by_tap(rows).permute(0, 2, 3, 1)


def _coverage(geometry: Geometry, like: Tensor) -> Tensor:
    """Return how often a tap at any position reads each pixel, ``[*size]``."""
    coverage = like.new_ones(())
    for size, k, s, d, before, positions in geometry.axes:
        counts = like.new_zeros(size)
        places = torch.arange(positions, device=like.device) * s - before
        for tap in range(k):
            index = places + tap * d
            inside = index[(index >= 0) & (index < size)]
            counts.index_add_(0, inside, torch.ones_like(inside, dtype=like.dtype))
        coverage = coverage.unsqueeze(-1) * counts
    return coverage
