"""Damped powers of scalings applied to projected gradients: ``precondition.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.kernels.cuda.compiler import Variant
from ekfac.kernels.cuda.kernel import (
    Kernel,
    MapOperator,
    Numbers,
    apart,
    each,
    largest,
    relative_error,
)
from ekfac.kernels.cuda.launch import (
    Engine,
    Field,
    Launch,
    MapLayer,
    execute,
    fields,
    plain_variant,
    plan_map,
)


class PreconditionProblem(ctypes.Structure):
    """``Problem`` of ``precondition.cu``."""

    _fields_ = [
        *fields(c_void_p, "u s damping sums"),
        *fields(c_longlong, "u_block u_row s_block s_row"),
        *fields(c_int, "rows columns elements first pieces"),
    ]


POWER: tuple[Field, ...] = (("power", c_float), ("unused", c_int))


@dataclass(frozen=True)
class Preconditioned(MapLayer):
    """One layer: ``u <- u (s + damping)^power``.

    Attributes:
        projected: ``u`` ``[b, d_out, d_in]``.
        scalings: ``s`` of the same shape.
        damping: One number, on the device.
    """

    source = "precondition"
    struct = PreconditionProblem
    projected: Tensor
    scalings: Tensor
    damping: Tensor


def plan_precondition(
    engine: Engine, layers: Sequence[Preconditioned], sums: Tensor, power: float
) -> list[Launch]:
    """Return the launches for supported layers.

    Args:
        engine: What will run them.
        layers: All that are to be preconditioned.
        sums: ``[len(layers), 2]``, contiguous; receives ``sum u^2 (s + damping)`` and
            ``sum u^2`` of each.
        power: Exponent of the damped scalings.
    """
    return plan_map(engine, layers, sums, before=POWER, power=power)


def precondition_reference_(layer: Preconditioned, power: float) -> Tensor:
    """Do what ``precondition.cu`` does, with torch."""
    u, damped = layer.projected, layer.scalings + layer.damping
    usable = damped > 0
    factor = torch.where(usable, damped, 1.0).pow(power)
    # What is not finite stays so.
    u.mul_(torch.where(usable | damped.isnan(), factor, 0.0))
    return torch.stack([(u.square() * damped).sum(), u.square().sum()])


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    numbers = Numbers(engine, variant)
    errors = []
    for power, damping in ((-1.0, 0.1), (-0.5, 0.0)):
        u = numbers.rows(2, 50, 81)[:, :45, :70]
        s = apart(numbers.rows(2, 45, 70).square())
        s[1, 3] = 0  # without damping: the pseudo-inverse
        added = numbers.poison(1).fill_(damping)
        layers = [
            Preconditioned(u, s, added),
            Preconditioned(s[:1].clone(), s[:1], added),
        ]
        exact = [
            Preconditioned(x.projected.double(), x.scalings.double(), added.double())
            for x in layers
        ]
        sums = numbers.poison(2, 2)
        execute(engine, plan_precondition(engine, layers, sums, power))
        for layer, double, own in zip(layers, exact, sums, strict=True):
            expected = precondition_reference_(double, power)
            errors.append(relative_error(own, expected))
            errors.append(relative_error(layer.projected, double.projected))
    return largest(errors)


KERNEL = Kernel("precondition", lambda n: [plain_variant("precondition", n)], check)
OPERATORS = [
    MapOperator(
        "precondition_",
        "(Tensor(a!)[] projected, Tensor[] scalings, Tensor damping, float power) "
        "-> Tensor",
        Preconditioned,
        (2,),
        plan_precondition,
        each(precondition_reference_),
    )
]
