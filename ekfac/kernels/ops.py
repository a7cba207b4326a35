"""The operators: schemas, references for every device and type, fakes.

All write in place, on the current stream, without asking the device for a number. On
CUDA devices a launch is tried first, see :mod:`ekfac.kernels.dispatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ekfac.kernels import dispatch
from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.grams import Gram
from ekfac.kernels.moments import Preconditioned, Scalings
from ekfac.kernels.reference import (
    diagonal_reference_,
    gram_reference_,
    precondition_reference_,
    scalings_reference_,
)

LIBRARY = torch.library.Library("ekfac", "DEF")

LIBRARY.define(
    "gram_(Tensor(a!)[] outs, Tensor[] rows, Tensor?[] weights, float[] alphas, "
    "float[] betas, bool[] biases) -> ()"
)
LIBRARY.define(
    "diagonal_gram_(Tensor(a!)[] outs, Tensor[] rows, Tensor?[] weights, "
    "float[] alphas, float[] betas, bool[] biases) -> ()"
)
LIBRARY.define(
    "patch_gram_(Tensor(a!)[] outs, Tensor[] inputs, Tensor?[] weights, "
    "int[] geometry, float[] alphas, float[] betas, bool[] biases) -> ()"
)
LIBRARY.define(
    "scalings_(Tensor(a!)[] outs, Tensor[] grads, Tensor[] inputs, float[] alphas, "
    "float[] betas) -> ()"
)
LIBRARY.define(
    "precondition_(Tensor(a!)[] projected, Tensor[] scalings, Tensor damping, "
    "float power) -> Tensor"
)


def _grams(
    outs: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    alphas: Sequence[float],
    betas: Sequence[float],
    biases: Sequence[bool],
) -> list[Gram]:
    columns = zip(outs, rows, weights, alphas, betas, biases, strict=True)
    return [Gram(*column) for column in columns]


def _patch_grams(
    outs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    geometry: Sequence[int],
    alphas: Sequence[float],
    betas: Sequence[float],
    biases: Sequence[bool],
) -> list[Gram]:
    convs = [
        Convolution.from_flat(geometry[i : i + 16]) for i in range(0, len(geometry), 16)
    ]
    deep = [with_depth(x) for x in inputs]
    columns = zip(outs, deep, weights, alphas, betas, biases, convs, strict=True)
    return [Gram(*column) for column in columns]


def _layers(
    outs: Sequence[Tensor],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> list[Scalings]:
    columns = zip(outs, grads, inputs, alphas, betas, strict=True)
    return [Scalings(*column) for column in columns]


def _preconditioned(
    projected: Sequence[Tensor], scalings: Sequence[Tensor], damping: Tensor
) -> list[Preconditioned]:
    columns = zip(projected, scalings, damping.unbind(), strict=True)
    return [Preconditioned(*column) for column in columns]


def _register(
    name: str,
    prepare: Callable[..., Sequence[Gram] | Sequence[Scalings]],
    reference: Callable[..., None],
    launch: Callable[..., Sequence[bool]],
) -> None:
    """Register an operator that returns nothing."""

    def everywhere(*arguments: object) -> None:
        for item in prepare(*arguments):
            reference(item)

    def on_cuda(*arguments: object) -> None:
        items = prepare(*arguments)
        for item, done in zip(items, launch(items), strict=True):
            if not done:
                reference(item)

    def fake(*arguments: object) -> None:
        prepare(*arguments)

    LIBRARY.impl(name, everywhere, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"ekfac::{name}", fake, lib=LIBRARY)


_register("gram_", _grams, gram_reference_, dispatch.grams)
_register("diagonal_gram_", _grams, diagonal_reference_, dispatch.diagonals)
_register("patch_gram_", _patch_grams, gram_reference_, dispatch.grams)
_register("scalings_", _layers, scalings_reference_, dispatch.scalings)


def _precondition_everywhere(
    projected: Sequence[Tensor],
    scalings: Sequence[Tensor],
    damping: Tensor,
    power: float,
) -> Tensor:
    layers = _preconditioned(projected, scalings, damping)
    if not layers:
        return damping.new_empty(0, 2)
    return torch.stack([precondition_reference_(layer, power) for layer in layers])


def _precondition_on_cuda(
    projected: Sequence[Tensor],
    scalings: Sequence[Tensor],
    damping: Tensor,
    power: float,
) -> Tensor:
    layers = _preconditioned(projected, scalings, damping)
    sums = dispatch.precondition(layers, power)
    if sums is None:
        return _precondition_everywhere(projected, scalings, damping, power)
    return sums


def _precondition_fake(
    projected: Sequence[Tensor],
    scalings: Sequence[Tensor],
    damping: Tensor,
    power: float,
) -> Tensor:
    return damping.new_empty(len(projected), 2)


LIBRARY.impl("precondition_", _precondition_everywhere, "CompositeExplicitAutograd")
LIBRARY.impl("precondition_", _precondition_on_cuda, "CUDA")
torch.library.register_fake("ekfac::precondition_", _precondition_fake, lib=LIBRARY)
