"""Stacks: layers of one shape whose tensors are worked on as one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ekfac.curvature.average import Average
from ekfac.curvature.state import LayerCurvature
from ekfac.kernels.eigenspaces import POOLED, Spaces, degenerate
from ekfac.kernels.linalg import SMALL

Averaged = Literal["s", "momentum"]
_Name = TypeVar("_Name", bound=Hashable)
# Elements of small matrices that are taken together on a CPU.
STACKED = 1 << 18
# Elements of matrices that are worked on together where a step needs copies of them.
AT_A_TIME = 1 << 24


class Stack:
    """Layers of one shape, and views of all their bases and averages.

    The views are found once: they hold until a layer's tensors or treatment may be
    others (:attr:`LayerCurvature.changes`). With several layers ``b`` is 1.

    Attributes:
        layers: ``k`` layers.
    """

    def __init__(self, layers: Sequence[LayerCurvature]) -> None:
        self.layers = list(layers)
        self._changes = [layer.changes for layer in layers]
        self._bases: dict[str, Tensor | None] = {}
        self._averages: dict[str, _Together] = {}
        self._spaces: dict[tuple[str, bool], Spaces | None] = {}
        self._packed: tuple[Tensor, list[Tensor] | None] | None = None
        self._unpacked: tuple[Tensor, list[list[Tensor]]] | None = None

    @classmethod
    def of(cls, layers: Sequence[LayerCurvature]) -> Stack:
        """Return the stack of some layers, the same as before if nothing changed."""
        last = layers[0].stack
        if not isinstance(last, Stack) or last.layers != layers or last._outdated():
            last = layers[0].stack = cls(layers)
        return last

    def _outdated(self) -> bool:
        return self._changes != [layer.changes for layer in self.layers]

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(k b, d_out, d_in)``."""
        b, d_out, d_in = self.layers[0].block.shape
        return len(self.layers) * b, d_out, d_in

    def pack(self, gradients: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return whole gradients of the layers' parameters as ``[k b, d_out, d_in]``.

        Of one layer it may be its parameter's own gradient, of several it is valid
        until the next call.
        """
        if len(self) == 1:
            return packed(self.layers[0], gradients[0])
        if self._packed is None:
            buffer = self.layers[0].values("A").new_empty(self.shape)
            found = buffer, _views(self.layers, buffer)
            if buffer.device.type == "cpu":  # elsewhere memory is scarce
                self._packed = found
        else:
            found = self._packed
        matrices, parts = found
        if parts is None:
            pairs = zip(self.layers, gradients, matrices.split(1), strict=True)
            for layer, own, part in pairs:
                layer.block.pack_into_(part, own)
            return matrices
        sources = [
            slot.of(gradient)
            for layer, own in zip(self.layers, gradients, strict=True)
            for slot, gradient in zip(layer.block.adapter.slots(), own, strict=True)
        ]
        torch._foreach_copy_(parts, sources)
        return matrices

    def unpack(self, matrices: Tensor) -> list[list[Tensor]]:
        """Return the parameters' parts of ``[k b, d_out, d_in]``, layer by layer."""
        if self._unpacked is not None and self._unpacked[0] is matrices:
            return self._unpacked[1]
        b = self.layers[0].block.shape[0]
        pairs = zip(self.layers, matrices.split(b), strict=True)
        parts = [layer.block.unpack(own) for layer, own in pairs]
        # Buffers of small matrices come again, see linalg.rotate_back.
        small = matrices.device.type == "cpu" and matrices[0].numel() < SMALL
        if small and _are_views(itertools.chain(*parts), matrices):
            self._unpacked = matrices, parts
        return parts

    def basis(self, side: Literal["A", "G"]) -> Tensor | None:
        """Return ``Q_A`` or ``Q_G`` of all layers, ``[k b or 1, d, d]``, if any."""
        first = self.layers[0]
        if first.storage == "bfloat16":  # a copy
            return first.basis(side)
        if side not in self._bases:
            bases = _bases(self.layers, side)
            self._bases[side] = stacked(bases) if bases else None
            assert not bases or self._bases[side] is not None, "no stack"
        return self._bases[side]

    @contextmanager
    def average(self, name: Averaged) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the layers' averages as one, to be read or changed in place.

        Yields:
            The weighted sums ``[k b, *]`` and their weights ``[k, 1, 1]``.
        """
        found = self._averages.get(name)
        if found is None:
            found = self._averages[name] = _Together(self._averages_of(name))
        yield found.read()
        found.write()

    def share_(self, scalings: Tensor, *, pooled: bool) -> None:
        """Overwrite the layers' scalings ``[k b, d_out, d_in]`` by their means.

        See :meth:`LayerCurvature.share_`.
        """
        if len(self) == 1:
            self.layers[0].share_(scalings, pooled=pooled)
            return
        for side, dim in (("G", -2), ("A", -1)):
            if (side, pooled) not in self._spaces:
                self._spaces[side, pooled] = self._spaces_of(side, pooled=pooled)
            if (spaces := self._spaces[side, pooled]) is not None:
                spaces.average_(scalings, dim)

    def _spaces_of(self, side: str, *, pooled: bool) -> Spaces | None:
        """Return the layers' spaces of equal eigenvalues as one, if there are any."""
        if self.layers[0].basis(side) is None:
            return None
        values = torch.cat([layer.values(side) for layer in self.layers])
        return degenerate(values, share=POOLED if pooled else 0.0)

    def _averages_of(self, name: Averaged) -> list[Average]:
        if name == "s":
            return [layer.averages["s"] for layer in self.layers]
        return [la.momentum for la in self.layers if la.momentum is not None]

    def add_squares_(
        self, roots: Tensor, factors: Sequence[float], decay: float
    ) -> None:
        """Add the sample ``factor root^2`` to the layers' scalings.

        Args:
            roots: ``[k b, d_out, d_in]``.
            factors: One for each layer.
            decay: Of the averages.
        """
        with self.average("s") as (totals, weights):
            totals.mul_(decay)
            scales = [(1 - decay) * factor for factor in factors]
            if len(set(scales)) == 1:
                totals.addcmul_(roots, roots, value=scales[0])
            else:
                totals.addcmul_(roots, roots * roots.new_tensor(scales).view(-1, 1, 1))
            weights.mul_(decay).add_(1 - decay)
        for layer in self.layers:
            layer.averages["s"].empty = False

    def add_to_momentum_(
        self, gradients: Tensor, decay: float
    ) -> tuple[Tensor, Tensor]:
        """Add gradients ``[k b, d_out, d_in]`` to the layers' momentum.

        Returns:
            What :meth:`average` gives of it.
        """
        with self.average("momentum") as (totals, weights):
            totals.lerp_(gradients, 1 - decay)
            weights.mul_(decay).add_(1 - decay)
        for average in self._averages_of("momentum"):
            average.empty = False
        return totals, weights


def packed(layer: LayerCurvature, gradients: Sequence[Tensor]) -> Tensor:
    """Return ``[b, d_out, d_in]`` of the layer's gradients, in its type."""
    return layer.block.pack([g.to(layer.dtype) for g in gradients])


def _views(layers: Sequence[LayerCurvature], matrices: Tensor) -> list[Tensor] | None:
    """Return the layers' parameters as views of ``[k, d_out, d_in]``, if they are."""
    pairs = zip(layers, matrices.split(1), strict=True)
    parts = [part for layer, own in pairs for part in layer.block.unpack(own)]
    return parts if _are_views(parts, matrices) else None


def _are_views(parts: Iterable[Tensor], matrices: Tensor) -> bool:
    """Return whether tensors share the memory of others."""
    memory = matrices.untyped_storage().data_ptr()
    return all(part.untyped_storage().data_ptr() == memory for part in parts)


class _Together:
    """Averages of one shape as one.

    Views, where they lie at equal steps in a bank, else copies that are written back.
    """

    def __init__(self, averages: Sequence[Average]) -> None:
        self._totals = [average.total for average in averages]
        self._weights = [average.weight for average in averages]
        self._total, weight = stacked(self._totals), stacked(self._weights)
        self._weight = None if weight is None else weight.view(-1, 1, 1)
        self._read: tuple[Tensor, Tensor] | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """Return the sums ``[k b, *]`` and their weights ``[k, 1, 1]``."""
        total, weight = self._total, self._weight
        if total is None:
            total = torch.cat(self._totals)
        if weight is None:
            weight = torch.stack(self._weights).view(-1, 1, 1)
        self._read = total, weight
        return self._read

    def write(self) -> None:
        """Write back what :meth:`read` copied."""
        assert self._read is not None
        (total, weight), self._read = self._read, None
        if self._total is None:
            torch._foreach_copy_(self._totals, list(total.split(len(self._totals[0]))))
        if self._weight is None:
            torch._foreach_copy_(self._weights, list(weight.view(-1).unbind()))


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors ``[1, *]``, or ``[]``, as one, if they lie at equal steps.

    Those of banks do where the layers between them repeat. A single tensor is returned
    as it is.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    start, shape, strides = first.storage_offset(), first.shape, first.stride()
    step = tensors[1].storage_offset() - start
    memory = first.untyped_storage().data_ptr()
    if step <= 0:
        return None
    for number, tensor in enumerate(tensors):
        alike = tensor.storage_offset() == start + number * step
        alike = alike and tensor.shape == shape and tensor.stride() == strides
        if not (alike and tensor.untyped_storage().data_ptr() == memory):
            return None
    return first.as_strided((len(tensors), *shape[1:]), (step, *strides[1:]))


def _bases(layers: Sequence[LayerCurvature], side: str) -> list[Tensor]:
    """Return the bases of the layers that have one."""
    return [basis for layer in layers if (basis := layer.basis(side)) is not None]


class Stacks:
    """Divides layers into stacks, and keeps them while nothing has changed."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[_Key], list[Stack]]] = {}

    def of(
        self,
        lists: Mapping[_Name, Sequence[LayerCurvature]],
        treatment: Callable[[LayerCurvature], Hashable] | None = None,
    ) -> dict[_Name, list[Stack]]:
        """Return the stacks of each list: layers of one shape whose bases are one view.

        On a CPU a stack of small matrices fits into a cache; large ones gain nothing
        from it and stay alone.

        Args:
            lists: Layers with full bases, those of one list on one device.
            treatment: Says what becomes of a layer, if that is not the same for all; a
                stack has one treatment.
        """
        before, self._kept = self._kept, {}  # nothing else keeps layers that are gone
        stacks: dict[_Name, list[Stack]] = {}
        for name, layers in lists.items():
            keys = [
                (layer, layer.changes, None if treatment is None else treatment(layer))
                for layer in layers
            ]
            last, stacks[name] = before.get(name, ([], []))
            if keys != last:
                stacks[name] = list(_divided(keys))
            self._kept[name] = keys, stacks[name]
        return stacks


def stacks_of(
    layers: Sequence[LayerCurvature], treatment: Callable[[LayerCurvature], Hashable]
) -> list[Stack]:
    """Return stacks of layers of one treatment that take little memory at a time."""
    keys = [(layer, layer.changes, treatment(layer)) for layer in layers]
    return list(_divided(keys, AT_A_TIME))


# A layer, how often its tensors may have become others, and its treatment.
_Key = tuple[LayerCurvature, int, Hashable]


def _divided(keys: Sequence[_Key], most: int | None = None) -> Iterator[Stack]:
    """Yield the stacks of layers, of at most so many elements."""
    shapes: dict[Hashable, list[LayerCurvature]] = {}
    for layer, _, treated in keys:
        bare = (layer.basis("G") is None, layer.basis("A") is None)
        key = (layer.dtype, *layer.block.shape, *bare, treated)
        shapes.setdefault(key, []).append(layer)
    for every in shapes.values():
        size, limit = math.prod(every[0].block.shape), len(every)
        if most is not None:
            limit = max(1, most // size)
        if every[0].device.type == "cpu":
            limit = max(1, STACKED // size) if size < SMALL else 1
        for start in range(0, len(every), limit):
            alike = every[start : start + limit]
            batched = len(alike) > 1 and alike[0].block.shape[0] == 1
            for side in ("G", "A") if batched else ():
                present = _bases(alike, side)
                batched = batched and not (present and stacked(present) is None)
            if batched:
                yield Stack.of(alike)
            else:
                yield from (Stack.of([layer]) for layer in alike)
