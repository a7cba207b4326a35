"""Launches of the element-wise kernels: one pass over all layers, with sums of each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_void_p
from typing import Protocol

import torch
from torch import Tensor

from ekfac.kernels.cuda.launch import (
    INT_MAX,
    Engine,
    Launch,
    batches,
    pointer,
    writable,
)
from ekfac.kernels.cuda.nvrtc_sources import Variant
from ekfac.kernels.cuda.params import Field, fill

SHARE = 4096  # elements of a piece of work
SUMS: tuple[Field, ...] = (("sums", c_void_p),)


class Layer(Protocol):
    """One layer of a launch."""

    @property
    def projected(self) -> Tensor:
        """The projected gradient ``[b, d_out, d_in]``."""

    def problem(self, first: int) -> ctypes.Structure:
        """Return what the kernel is told, its first piece of work being ``first``."""


def alike(u: Tensor, s: Tensor, numbers: Tensor) -> bool:
    """Return whether the kernels take these: alike, float32, with dense rows."""
    shape = tuple(u.shape)
    return (
        writable(u, *shape)
        and writable(s, *shape)
        and numbers.dtype == torch.float32
        and numbers.is_contiguous()
        and 0 < u.numel() < INT_MAX // 2
        and u.device == s.device == numbers.device
    )


def extent(tensor: Tensor, first: int) -> dict[str, int]:
    """Return the fields that every problem has."""
    return {
        "rows": tensor.shape[1],
        "columns": tensor.shape[2],
        "elements": tensor.numel(),
        "first": first,
        "pieces": pieces(tensor),
    }


def pieces(tensor: Tensor) -> int:
    """Return the pieces of work of a tensor."""
    return -(-tensor.numel() // SHARE)


def plan(
    engine: Engine,
    kernel: str,
    layers: Sequence[Layer],
    sums: Tensor,
    before: tuple[Field, ...] = (),
    **values: float,
) -> list[Launch]:
    """Return the launches of one kernel and of what adds up its pieces.

    Args:
        engine: What will run them.
        kernel: Its name.
        layers: All supported.
        sums: ``[len(layers), *]``, contiguous, float32; receives each layer's sums.
        before: The kernel's own fields of parameters.
        **values: And what they hold.
    """
    variant = plain_variant(kernel, engine.problems)
    launches: list[Launch] = []
    for batch in batches(len(layers), engine.problems):
        problems: list[ctypes.Structure] = []
        keep: list[Tensor] = [sums]
        first = 0
        for layer in (layers[i] for i in batch):
            problems.append(layer.problem(first))
            keep += vars(layer).values()
            first += pieces(layer.projected)
        each = sums[0].numel()  # sums of a piece, as many as of a layer
        space = torch.empty(each * first, dtype=torch.float32, device=sums.device)
        keep.append(space)
        params = fill(
            problems,
            engine.problems,
            before,
            SUMS,
            parts=pointer(space),
            sums=pointer(sums[batch.start :]),
            **values,
        )
        launches += [
            Launch(variant, kernel, params, first, 256, 0, keep, (space, sums)),
            Launch(variant, f"{kernel}_finish", params, len(batch), 256, keep=keep),
        ]
    return launches


def plain_variant(source: str, problems: int) -> Variant:
    """Return the variant of a source of which there is one: float32, no tiles."""
    return Variant(source, (("PROBLEMS", problems),))
