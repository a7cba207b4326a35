"""Shortcuts of adapters: statistics of a layer's inputs without forming them.

An adapter's four methods say everything; a shortcut gives the same result for less.
It holds for the one adapter class that it is registered for. A subclass inherits none,
since what it overrides may contradict them: one that keeps to its parent's inputs
registers its parent's shortcuts for itself. ``ekfac.testing.check_adapter`` compares
every shortcut with :meth:`Adapter.inputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ekfac.kernels.correlation import Geometry
from ekfac.kernels.input_gram import InputPatches, InputRows
from ekfac.layers.attention import ProjectionAdapter
from ekfac.layers.base import Adapter
from ekfac.layers.conv import ConvAdapter, ConvTransposeAdapter
from ekfac.layers.linear import BilinearAdapter, LinearAdapter, positions

AdapterT = TypeVar("AdapterT", bound=Adapter)


class Shortcuts(Generic[AdapterT]):
    """Ways round :meth:`Adapter.inputs` of one adapter; each is optional.

    They are for adapters without a mask, and take the input as ``inputs`` does.

    Args:
        adapter: The adapter.
    """

    def __init__(self, adapter: AdapterT) -> None:
        self.adapter = adapter

    def elements_per_example(self, x: Tensor) -> int:
        """Return how many elements ``inputs`` makes of one example, 0 for no copy.

        Examples are then ``x``'s first dimension, and statistics are taken a few of
        them at a time.
        """
        return 0

    def input_gram(self, x: Tensor) -> Tensor | InputRows | InputPatches | None:
        """Return ``sum_ns a_ns a_ns^T`` of ``inputs``, ``[b, d_in, d_in]``, or None.

        Or what its ``gram`` is taken of.
        """
        return None

    def rotated_inputs(self, x: Tensor, basis: Tensor) -> Tensor | None:
        """Return ``inputs`` in a basis, ``[N, b, m, S]``, or ``None``.

        Args:
            x: The layer's input.
            basis: Columns of one, ``[b, d_in, m]``.
        """
        return None


ShortcutsT = TypeVar("ShortcutsT", bound=type[Shortcuts])  # type: ignore[type-arg]
# Adapter class -> its shortcuts; subclasses are not looked up.
_SHORTCUTS: dict[type[Adapter], type[Shortcuts]] = {}  # type: ignore[type-arg]


def shortcuts_for(*adapters: type[Adapter]) -> Callable[[ShortcutsT], ShortcutsT]:
    """Register the decorated shortcuts for these adapters, not for subclasses."""

    def decorate(shortcuts: ShortcutsT) -> ShortcutsT:
        _SHORTCUTS.update(dict.fromkeys(adapters, shortcuts))
        return shortcuts

    return decorate


def find_shortcuts(adapter: Adapter) -> Shortcuts[Adapter]:
    """Return the shortcuts of an adapter's own class; of others, none."""
    return _SHORTCUTS.get(type(adapter), Shortcuts)(adapter)


@shortcuts_for(LinearAdapter, ProjectionAdapter)
class LinearShortcuts(Shortcuts[LinearAdapter]):
    """Rows without a copy for the bias's ones, where a kernel takes them."""

    def input_gram(self, x: Tensor) -> InputRows | None:
        """Return the rows, on a CUDA device."""
        ones = self.adapter.bias is not None
        return InputRows(positions(x), ones) if x.is_cuda else None


@shortcuts_for(BilinearAdapter)
class BilinearShortcuts(Shortcuts[BilinearAdapter]):
    """Products of a few examples at a time."""

    def elements_per_example(self, x: Tensor) -> int:
        """Return how many products one example has."""
        module, x = self.adapter.module, positions(x)
        return module.in1_features * module.in2_features * x.shape[1]


@shortcuts_for(ConvAdapter, ConvTransposeAdapter)
class ConvShortcuts(Shortcuts[ConvAdapter | ConvTransposeAdapter]):
    """Patches' second moment and products from the image."""

    def elements_per_example(self, x: Tensor) -> int:
        """Return the size of one example's patch matrix."""
        adapter = self.adapter
        return prod(adapter.module.kernel_size) * adapter.batched(x)[0].numel()

    def input_gram(self, x: Tensor) -> InputPatches:
        """Return the image and where the kernel's taps fall on it."""
        adapter, module = self.adapter, self.adapter.module
        image, before, after = adapter.framed(adapter.batched(x))
        size = tuple(image.shape[2:])
        steps = tuple(adapter.steps())
        axes = zip(
            size, before, after, module.kernel_size, steps, module.dilation, strict=True
        )
        places = tuple(
            (n + lo + hi - d * (k - 1) - 1) // s + 1 for n, lo, hi, k, s, d in axes
        )
        kernel, dilation = tuple(module.kernel_size), tuple(module.dilation)
        geometry = Geometry(size, kernel, steps, dilation, tuple(before), places)
        return InputPatches(image, geometry, module.groups, adapter.bias is not None)

    def rotated_inputs(self, x: Tensor, basis: Tensor) -> Tensor:
        """Return the patches in a basis: a convolution with the basis as its kernels.

        Args:
            x: The layer's input.
            basis: Columns of one, ``[groups, d_in, m]``.

        Returns:
            ``[N, groups, m, S]``.
        """
        adapter, module = self.adapter, self.adapter.module
        image, before, after = adapter.framed(adapter.batched(x))
        if before != after:
            pairs = zip(reversed(before), reversed(after), strict=True)
            image = F.pad(image, [width for pair in pairs for width in pair])
            before = [0] * len(before)
        groups, _, m = basis.shape
        features = module.in_channels // groups * prod(module.kernel_size)
        turned = basis.new_empty(groups, m, features)
        for to, of in zip(turned, basis, strict=True):
            to.copy_(of[:features].t())  # of two dimensions: those are copied by tiles
        kernels = turned.reshape(groups * m, -1, *module.kernel_size)
        bias = None if adapter.bias is None else basis[:, -1].reshape(-1)
        steps, none = list(adapter.steps()), [0] * len(before)
        rotated = torch.convolution(
            image, kernels, bias, steps, before, module.dilation, False, none, groups
        )
        return rotated.reshape(len(image), groups, m, -1)
