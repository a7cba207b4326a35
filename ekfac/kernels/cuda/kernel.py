"""Records of a kernel and of its operators, and the check of its first use.

Every kernel's file has its own small problem with a known answer; here is what they
share. Nothing depends on torch's default type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ekfac.kernels.cuda.compiler import FLOAT, INPUTS, TF32, Variant
from ekfac.kernels.cuda.launch import Engine, Launch


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
        supported: Returns whether the kernel takes an item.
        variant: Returns the variant that an item needs.
        plan: Returns the launches for supported items.
        reference_: Does one item with torch, for every device and type.
        alternatives: Further functions that do a supported item with torch, by name.
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
        layer: Returns the item of a layer, from its columns of the first three.
        sums: Shape of one layer's sums.
        plan: Returns the launches for an engine, items, the sums to write, and values.
        reference_: Does all items with torch; returns their sums.
    """

    name: str
    schema: str
    layer: Callable[[Tensor, Tensor, Tensor], Any]
    sums: tuple[int, ...]
    plan: Callable[..., list[Launch]]
    reference_: Callable[..., Tensor]


def each(reference_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that applies ``reference_`` to items and stacks their sums."""

    def every(layers: Sequence[Any], *values: float) -> Tensor:
        return torch.stack([reference_(layer, *values) for layer in layers])

    return every


def items_of(item: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Return a function that makes one item for each layer of an operator's lists."""

    def prepare(*lists: Sequence[Any]) -> list[Any]:
        return [item(*row) for row in zip(*lists, strict=True)]

    return prepare


def accumulation(tensor: Tensor) -> torch.dtype:
    """Return the type that sums are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def update_(out: Tensor, value: Tensor, alpha: float, beta: float) -> None:
    """Set ``out`` to ``beta out + alpha value``; with ``beta`` 0 it is not read."""
    if beta == 0:
        out.copy_(alpha * value)
    else:
        out.mul_(beta).add_(value.to(out.dtype), alpha=alpha)


# -- first use -------------------------------------------------------------------------


TYPES = {kind: dtype for dtype, kind in INPUTS.items()}
TYPES[TF32] = torch.float32


def tolerance(variant: Variant) -> float:
    """Return the relative error that a variant may have.

    In TF32 :class:`Numbers` lose nothing if they are rounded, but are off by up to 1e-3
    if they are cut off, and their products by the sum of both.
    """
    return 1e-4 if dict(variant.defines).get("INPUT") == TF32 else 1e-5


# Bits of a float32 that TF32 does not have, and what they are a 256th of a step below
# the next: rounded it is that, cut off the one before.
LOWER_BITS, BELOW = 0x1FFF, 0x1FDF


def below_steps(x: Tensor, *, squares: bool) -> Tensor:
    """Return float32 like ``x``, just below a step of TF32, or whose squares are."""
    exact = x.square() if squares else x
    word = exact.view(torch.int32).bitwise_or(LOWER_BITS) - (LOWER_BITS - BELOW)
    steps = word.view(torch.float32)
    return steps.double().sqrt().float().copysign(x) if squares else steps


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ``|actual - expected| / |expected|``, NaN if either holds one."""
    distance = (actual.double() - expected.double()).norm()
    return float(distance / expected.double().norm())


def largest(errors: list[float]) -> float:
    """Return the largest error; NaN counts as larger than any number."""
    return max(errors, key=lambda e: float("inf") if e != e else e)


def apart(tensor: Tensor) -> Tensor:
    """Return a copy ``[*, m, n]`` whose rows and matrices do not follow each other."""
    m, n = tensor.shape[-2:]
    wide = tensor.new_full((*tensor.shape[:-2], m + 3, n + 5), float("nan"))
    return wide[..., :m, :n].copy_(tensor)


class Numbers:
    """Random tensors of the type and on the device of a variant.

    What products round to TF32 lies just below a step of it.
    """

    def __init__(self, engine: Engine, variant: Variant) -> None:
        self.generator = torch.Generator().manual_seed(0)
        defines = dict(variant.defines)
        self.kind = defines.get("INPUT", FLOAT)
        self.squares = bool(defines.get("SQUARE"))
        self.dtype, self.device = TYPES[self.kind], engine.device

    def rows(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        kind = torch.float32
        numbers = torch.randn(*shape, generator=self.generator, dtype=kind)
        if self.kind == TF32:
            numbers = below_steps(numbers, squares=self.squares)
        return numbers.to(device=self.device, dtype=self.dtype)

    def poison(self, *shape: int) -> Tensor:
        """Return a float32 tensor of NaN, which a kernel has to overwrite."""
        nan = float("nan")
        return torch.full(shape, nan, dtype=torch.float32, device=self.device)

    def weight(self, *shape: int) -> Tensor:
        """Return weights over eight orders of magnitude, of which a quarter is zero.

        In TF32 they are powers of two: weighted rows lie below steps too.
        """
        numbers = torch.rand(*shape, generator=self.generator, dtype=torch.float32)
        weights = 10 ** (8 * numbers - 4)
        if self.kind == TF32:
            weights = torch.exp2(weights.log2().round())
        return (weights * (numbers > 0.25)).to(self.device)
