"""Running averages of squared projected gradients, with their sums: ``squares.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_void_p
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
    Launch,
    MapLayer,
    execute,
    fields,
    plain_variant,
    plan_map,
)


class SquaresProblem(ctypes.Structure):
    """``Problem`` of ``squares.cu``."""

    _fields_ = [
        *fields(c_void_p, "s u scale sums"),
        *fields(c_longlong, "s_block s_row u_block u_row"),
        *fields(c_int, "rows columns elements first pieces"),
    ]


@dataclass(frozen=True)
class Squares(MapLayer):
    """One layer: ``s <- keep s + rate u^2``.

    Attributes:
        scalings: ``s`` ``[b, d_out, d_in]``.
        projected: ``u`` of the same shape; not read where the rate is 0.
        scale: ``keep`` and ``rate``, on the device.
    """

    source = "squares"
    struct = SquaresProblem
    scalings: Tensor
    projected: Tensor
    scale: Tensor


def plan_squares(
    engine: Engine, layers: Sequence[Squares], sums: Tensor
) -> list[Launch]:
    """Return the launches for supported layers.

    Args:
        engine: What will run them.
        layers: All whose averages move.
        sums: ``[len(layers)]``, contiguous; receives ``sum s`` of each.
    """
    return plan_map(engine, layers, sums)


def squares_reference_(layer: Squares) -> Tensor:
    """Do what ``squares.cu`` does, with torch."""
    keep, rate = layer.scale.to(layer.scalings.dtype).unbind()
    # What is not read may be anything, a number that is not finite among them.
    update = torch.where(rate != 0, rate * layer.projected.square(), 0.0)
    layer.scalings.mul_(keep).add_(update)
    return layer.scalings.sum()


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    numbers = Numbers(engine, variant)
    s = numbers.rows(2, 50, 81).square()[:, :45, :70]
    u = apart(numbers.rows(2, 45, 70))
    before, unread = s.clone(), numbers.poison(2, 45, 70)
    values = [[0.9, 0.3], [0.5, 0.0]]
    scales = torch.tensor(values, dtype=torch.float32, device=engine.device)
    layers = [Squares(s, u, scales[0]), Squares(before, unread, scales[1])]
    wide = [Squares(s.double(), u.double(), scales[0].double())]
    wide.append(
        Squares(before.double(), torch.zeros_like(wide[0].projected), scales[1])
    )
    sums = numbers.poison(2)
    execute(engine, plan_squares(engine, layers, sums))
    errors = []
    for layer, exact, sum_ in zip(layers, wide, sums, strict=True):
        expected = squares_reference_(exact)
        errors += [relative_error(layer.scalings, exact.scalings)]
        errors += [relative_error(sum_, expected)]
    return largest(errors)


KERNEL = Kernel("squares", lambda n: [plain_variant("squares", n)], check)
OPERATORS = [
    MapOperator(
        "squares_",
        "(Tensor(a!)[] scalings, Tensor[] projected, Tensor scales) -> Tensor",
        Squares,
        (),
        plan_squares,
        each(squares_reference_),
    )
]
