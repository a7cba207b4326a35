"""Spectral directions of many small layers of unequal shape: ``spectral.cu``.

``u <- r o polar(r o u)``, ``r = (s / weight + damping)^-1/2``: one launch for each
length of the shorter side, in place of 48 operations for each shape. A matrix and its
Gram matrix have to fit into the shared memory of one block of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.kernels.cuda.choice import bucket
from ekfac.kernels.cuda.compiler import Variant
from ekfac.kernels.cuda.kernel import (
    Kernel,
    MapOperator,
    Numbers,
    apart,
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
    plan_map,
)
from ekfac.kernels.linalg import COEFFICIENTS, polar

# Lengths of the shorter side that there are variants for, and the most polynomials.
SIDES, MOST_STEPS = (32, 64, 128), 5


class SpectralProblem(ctypes.Structure):
    """``Problem`` of ``spectral.cu``."""

    _fields_ = [
        *fields(c_void_p, "u s scale sums"),
        *fields(c_longlong, "u_block u_row s_block s_row"),
        *fields(c_int, "rows columns first pieces"),
    ]


POLYNOMIAL: tuple[Field, ...] = (
    ("polynomial", c_float * (3 * MOST_STEPS)),
    ("steps", c_int),
)


@dataclass(frozen=True)
class Spectral(MapLayer):
    """One layer: ``u <- r o polar(r o u)``, ``r = (s / weight + damping)^-1/2``.

    Attributes:
        projected: ``u`` ``[b, d_out, d_in]``.
        scalings: ``s`` of the same shape.
        scale: ``weight`` and ``damping``, on the device.
    """

    source = "spectral"
    struct = SpectralProblem
    projected: Tensor
    scalings: Tensor
    scale: Tensor

    def shape_class(self) -> str:
        """Return the class of shapes that the layer is measured in."""
        return " ".join(str(bucket(size)) for size in self.projected.shape)

    @property
    def side(self) -> int:
        """Longest shorter side that the layer's variant takes; 0 if none takes it."""
        shorter = min(self.projected.shape[1:])
        return next((side for side in SIDES if shorter <= side), 0)

    @property
    def threads(self) -> int:
        """Threads that have one matrix, as ``spectral.cu`` has it."""
        return 64 if self.side == SIDES[0] else 256

    @property
    def shared(self) -> int:
        """Bytes of shared memory: sums, the Gram matrix, the matrix itself."""
        m, n = sorted(self.projected.shape[1:])
        return 4 * (self.threads + m * (self.side + 1) + m * (n | 1))

    def supported(self, engine: Engine) -> bool:
        """Return whether the kernel takes it."""
        fits = self.side > 0 and self.shared <= engine.shared
        return fits and super().supported(engine)

    def damped(self) -> Tensor:
        """Return ``s / weight + damping``."""
        weight, damping = self.scale.to(self.scalings.dtype).unbind()
        return self.scalings / weight + damping

    def variant(self, problems: int) -> Variant:
        """Return the variant, for launches of up to so many layers."""
        return spectral_variant(self.side, problems)

    def work(self, first: int) -> tuple[int, ...]:
        """Return the last fields of a problem, its first matrix being ``first``."""
        return first, len(self.projected)


def spectral_variant(side: int, problems: int) -> Variant:
    """Return the variant for matrices whose shorter side is at most ``side``."""
    return Variant("spectral", (("SIDE", side), ("PROBLEMS", problems)))


def plan_spectral(
    engine: Engine, layers: Sequence[Spectral], sums: Tensor, steps: int, precise: bool
) -> list[Launch]:
    """Return the launches for supported layers.

    Args:
        engine: What will run them.
        layers: All that are to be given a direction.
        sums: ``[len(layers), 2]``, contiguous; receives ``sum u^2 (s / weight +
            damping)`` and ``sum u^2`` of each.
        steps: Polynomials of the polar factor, see :data:`COEFFICIENTS`.
        precise: Ignored: the kernel always multiplies in float32.
    """
    numbers = [number for factors in COEFFICIENTS[steps] for number in factors]
    values = {"polynomial": POLYNOMIAL[0][1](*numbers), "steps": steps}
    return plan_map(engine, layers, sums, before=POLYNOMIAL, **values)


def spectral_reference_(
    layers: Sequence[Spectral], steps: int, precise: bool
) -> Tensor:
    """Do what ``spectral.cu`` does, with torch: batched by shape."""
    stacks: dict[tuple[object, ...], list[int]] = {}
    for i, layer in enumerate(layers):
        u = layer.projected
        stacks.setdefault((u.shape, u.dtype, layer.scalings.dtype), []).append(i)
    sums: dict[int, Tensor] = {}
    for members in stacks.values():
        parts = [layers[i].projected for i in members]
        damped = torch.stack([layers[i].damped() for i in members])
        root = damped.rsqrt()
        factors = polar(
            torch.stack(parts).mul_(root).flatten(0, 1), steps, precise=precise
        )
        directions = factors.reshape(root.shape).mul_(root)
        for part, direction in zip(parts, directions, strict=True):
            part.copy_(direction)
        squares = directions.square()
        both = [(squares * damped).flatten(1).sum(dim=1), squares.flatten(1).sum(dim=1)]
        sums |= zip(members, torch.stack(both, dim=1), strict=True)
    return torch.stack([sums[i] for i in range(len(layers))])


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    numbers, side = Numbers(engine, variant), dict(variant.defines)["SIDE"]
    shapes = [(1, side - 3, side + 9), (3, side // 2 + 5, side // 2 + 1)]
    shapes.append((1, side, side // 2 + 1))
    scale = numbers.poison(len(shapes), 2)
    scale[:, 0], scale[:, 1] = 0.25, 0.1
    layers, exact = [], []
    for shape, row in zip(shapes, scale, strict=True):
        blocks, m, n = shape
        u = numbers.rows(blocks, m + 2, n + 9)[:, :m, :n]
        u[2:] = 0  # whose direction is zero, not NaN
        s = apart(numbers.rows(*shape).square())
        layers.append(Spectral(u, s, row))
        exact.append(Spectral(u.double(), s.double(), row.double()))
    sums = numbers.poison(len(shapes), 2)
    execute(engine, plan_spectral(engine, layers, sums, 3, True))
    expected = spectral_reference_(exact, 3, True)
    errors = [relative_error(sums, expected)]
    for layer, wide in zip(layers, exact, strict=True):
        errors.append(relative_error(layer.projected, wide.projected))
    return largest(errors)


KERNEL = Kernel("spectral", lambda n: [spectral_variant(s, n) for s in SIDES], check)
OPERATORS = [
    MapOperator(
        "spectral_",
        "(Tensor(a!)[] projected, Tensor[] scalings, Tensor scales, int steps, "
        "bool precise) -> Tensor",
        Spectral,
        (2,),
        plan_spectral,
        spectral_reference_,
    )
]
