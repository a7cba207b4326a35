"""The operators: schemas, references for every device and type, fakes.

All write in place, on the current stream, without asking the device for a number. A
launch is tried first, see :mod:`ekfac.kernels.dispatch`; what cannot have one is done
by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ekfac.kernels import dispatch
from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.counts import Counts
from ekfac.kernels.elementwise import Preconditioned, Squares
from ekfac.kernels.grams import Gram
from ekfac.kernels.moments import Scalings
from ekfac.kernels.reference import (
    counts_reference_,
    diagonal_reference_,
    gram_reference_,
    precondition_reference_,
    scalings_reference_,
    squares_reference_,
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
    "index_counts_(Tensor(a!)[] outs, Tensor[] indices, Tensor?[] weights, "
    "float[] alphas, float[] betas) -> ()"
)
LIBRARY.define(
    "squares_(Tensor(a!)[] scalings, Tensor[] projected, Tensor scales) -> Tensor"
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


def _counts(
    outs: Sequence[Tensor],
    indices: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    alphas: Sequence[float],
    betas: Sequence[float],
) -> list[Counts]:
    columns = zip(outs, indices, weights, alphas, betas, strict=True)
    return [Counts(*column) for column in columns]


Item = Gram | Scalings | Counts
# What a list of items is, how it is launched, and what takes the place of a launch.
KINDS: dict[str, tuple[Callable[..., list[bool]], Callable[..., None]]] = {
    "gram_": (dispatch.grams, gram_reference_),
    "diagonal_gram_": (dispatch.diagonals, diagonal_reference_),
    "patch_gram_": (dispatch.grams, gram_reference_),
    "index_counts_": (dispatch.counts, counts_reference_),
    "scalings_": (dispatch.scalings, scalings_reference_),
}


def run_(kind: str, items: Sequence[Item]) -> None:
    """Do what the operator ``kind`` does, for items of one device."""
    launch, reference = KINDS[kind]
    for item, done in zip(items, launch(items), strict=True):
        if not done:
            reference(item)


def _register(name: str, prepare: Callable[..., Sequence[Item]]) -> None:
    """Register an operator that returns nothing."""

    def everywhere(*arguments: object) -> None:
        run_(name, prepare(*arguments))

    def fake(*arguments: object) -> None:
        prepare(*arguments)

    LIBRARY.impl(name, everywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ekfac::{name}", fake, lib=LIBRARY)


_register("gram_", _grams)
_register("diagonal_gram_", _grams)
_register("patch_gram_", _patch_grams)
_register("index_counts_", _counts)
_register("scalings_", _layers)


def _precondition_(
    projected: Sequence[Tensor],
    scalings: Sequence[Tensor],
    damping: Tensor,
    power: float,
) -> Tensor:
    columns = zip(projected, scalings, damping.unbind(), strict=True)
    layers = [Preconditioned(*column) for column in columns]
    if not layers:
        return damping.new_empty(0, 2)
    sums = dispatch.precondition(layers, power)
    if sums is not None:
        return sums
    return torch.stack([precondition_reference_(layer, power) for layer in layers])


def _precondition_fake(
    projected: Sequence[Tensor],
    scalings: Sequence[Tensor],
    damping: Tensor,
    power: float,
) -> Tensor:
    return damping.new_empty(len(projected), 2)


def _squares_(
    scalings: Sequence[Tensor], projected: Sequence[Tensor], scales: Tensor
) -> Tensor:
    columns = zip(scalings, projected, scales.unbind(), strict=True)
    layers = [Squares(*column) for column in columns]
    if not layers:
        return scales.new_empty(0)
    sums = dispatch.squares(layers)
    if sums is not None:
        return sums
    return torch.stack([squares_reference_(layer) for layer in layers])


def _squares_fake(
    scalings: Sequence[Tensor], projected: Sequence[Tensor], scales: Tensor
) -> Tensor:
    return scales.new_empty(len(scalings))


LIBRARY.impl("precondition_", _precondition_, "CompositeExplicitAutograd")
torch.library.register_fake("ekfac::precondition_", _precondition_fake, lib=LIBRARY)
LIBRARY.impl("squares_", _squares_, "CompositeExplicitAutograd")
torch.library.register_fake("ekfac::squares_", _squares_fake, lib=LIBRARY)
