"""Launches of ``precondition.cu`` and ``squares.cu``: one pass over all layers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.kernels import plans, sources, structures
from ekfac.kernels.engine import Engine
from ekfac.kernels.plans import Launch, pointer

SHARE = 4096  # elements of a piece of work


@dataclass(frozen=True)
class Preconditioned:
    """One layer: ``u <- u (s + damping)^power``.

    Attributes:
        projected: ``u`` ``[b, d_out, d_in]``.
        scalings: ``s`` of the same shape.
        damping: One number, on the device.
    """

    projected: Tensor
    scalings: Tensor
    damping: Tensor

    def supported(self) -> bool:
        """Return whether the kernel takes it."""
        return _alike(self.projected, self.scalings, self.damping)

    def problem(self, first: int) -> ctypes.Structure:
        """Return what the kernel is told, its first piece of work being ``first``."""
        u, s = self.projected, self.scalings
        return structures.PreconditionProblem(
            u=pointer(u),
            s=pointer(s),
            damping=pointer(self.damping),
            u_block=u.stride(0),
            u_row=u.stride(1),
            s_block=s.stride(0),
            s_row=s.stride(1),
            **_extent(u, first),
        )


@dataclass(frozen=True)
class Squares:
    """One layer: ``s <- keep s + rate u^2``.

    Attributes:
        scalings: ``s`` ``[b, d_out, d_in]``.
        projected: ``u`` of the same shape; not read where the rate is 0.
        scale: ``keep`` and ``rate``, on the device.
    """

    scalings: Tensor
    projected: Tensor
    scale: Tensor

    def supported(self) -> bool:
        """Return whether the kernel takes it."""
        return _alike(self.projected, self.scalings, self.scale)

    def problem(self, first: int) -> ctypes.Structure:
        """Return what the kernel is told, its first piece of work being ``first``."""
        u, s = self.projected, self.scalings
        return structures.SquaresProblem(
            s=pointer(s),
            u=pointer(u),
            scale=pointer(self.scale),
            s_block=s.stride(0),
            s_row=s.stride(1),
            u_block=u.stride(0),
            u_row=u.stride(1),
            **_extent(s, first),
        )


def _alike(u: Tensor, s: Tensor, numbers: Tensor) -> bool:
    """Return whether the kernels take these: alike, float32, with dense rows."""
    shape = tuple(u.shape)
    return (
        plans.writable(u, *shape)
        and plans.writable(s, *shape)
        and numbers.dtype == torch.float32
        and numbers.is_contiguous()
        and 0 < u.numel() < plans.INT_MAX // 2
        and u.device == s.device == numbers.device
    )


def _extent(tensor: Tensor, first: int) -> dict[str, int]:
    return {
        "rows": tensor.shape[1],
        "columns": tensor.shape[2],
        "elements": tensor.numel(),
        "first": first,
        "pieces": _pieces(tensor),
    }


def _pieces(tensor: Tensor) -> int:
    return -(-tensor.numel() // SHARE)


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
    return _plan(engine, "precondition", layers, sums, power=power)


def plan_squares(
    engine: Engine, layers: Sequence[Squares], sums: Tensor
) -> list[Launch]:
    """Return the launches for supported layers.

    Args:
        engine: What will run them.
        layers: All whose averages move.
        sums: ``[len(layers)]``, contiguous; receives ``sum s`` of each.
    """
    return _plan(engine, "squares", layers, sums)


def _plan(
    engine: Engine,
    kernel: str,
    layers: Sequence[Preconditioned] | Sequence[Squares],
    sums: Tensor,
    **values: float,
) -> list[Launch]:
    """Return the launches of one kernel and of what adds up its pieces."""
    variant = sources.plain_variant(kernel, engine.problems)
    launches: list[Launch] = []
    for batch in plans.batches(len(layers), engine.problems):
        problems: list[ctypes.Structure] = []
        keep: list[Tensor] = [sums]
        first = 0
        for layer in (layers[i] for i in batch):
            problems.append(layer.problem(first))
            keep += vars(layer).values()
            first += _pieces(layer.projected)
        each = sums[0].numel()  # sums of a piece, as many as of a layer
        space = torch.empty(each * first, device=sums.device)
        keep.append(space)
        params = structures.fill(
            problems,
            engine.problems,
            parts=pointer(space),
            sums=pointer(sums[batch.start :]),
            **values,
        )
        launches += [
            Launch(variant, kernel, params, first, 256, keep=keep),
            Launch(variant, f"{kernel}_finish", params, len(batch), 256, keep=keep),
        ]
    return launches
