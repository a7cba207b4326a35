"""The records of a kernel and of its operator, and what their references share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ekfac.kernels.cuda.launch import Engine, Launch
from ekfac.kernels.cuda.nvrtc_sources import Variant


@dataclass(frozen=True)
class Kernel:
    """One source of ``csrc/``.

    Attributes:
        source: Name of its file, without the ending.
        variants: All variants, for a number of layers of one launch.
        check: The relative error of a loaded variant on a small problem.
    """

    source: str
    variants: Callable[[int], list[Variant]]
    check: Callable[[Engine, Variant], float]


@dataclass(frozen=True)
class SumOperator:
    """An operator that adds sums to tensors, one for each layer of a list.

    Attributes:
        name: In ``torch.ops.ekfac``.
        schema: Its arguments, as :func:`torch.library.define` reads them.
        prepare: Returns one item for each layer, from the arguments.
        supported: Whether the kernel takes an item.
        variant: What an item needs.
        plan: The launches for supported items.
        reference_: Does one item with torch, for every device and type.
        alternatives: Further ways to do one that the kernel takes, by name.
    """

    name: str
    schema: str
    prepare: Callable[..., list[Any]]
    supported: Callable[[Any], bool]
    variant: Callable[[Engine, Any], Variant]
    plan: Callable[[Engine, Sequence[Any]], list[Launch]]
    reference_: Callable[[Any], None]
    alternatives: Mapping[str, Callable[[Any], None]] = field(default_factory=dict)


@dataclass(frozen=True)
class MapOperator:
    """An operator that maps tensors in place and returns sums, some for each layer.

    Attributes:
        name: In ``torch.ops.ekfac``.
        schema: Its arguments: two lists of tensors, a tensor with one row for each
            layer, and further values.
        kernel: Source of the kernel.
        layer: Returns the item of a layer, from its columns of the first three.
        sums: Shape of one layer's sums.
        plan: The launches, given an engine, items, the sums to write and the values.
        reference_: Does one item with torch; returns its sums.
    """

    name: str
    schema: str
    kernel: str
    layer: Callable[[Tensor, Tensor, Tensor], Any]
    sums: tuple[int, ...]
    plan: Callable[..., list[Launch]]
    reference_: Callable[..., Tensor]


def accumulation(tensor: Tensor) -> torch.dtype:
    """Return the type that sums are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def update_(out: Tensor, value: Tensor, alpha: float, beta: float) -> None:
    """Set ``out`` to ``beta out + alpha value``; with ``beta`` 0 it is not read."""
    if beta == 0:
        out.copy_(alpha * value)
    else:
        out.mul_(beta).add_(value.to(out.dtype), alpha=alpha)
