"""Launches of ``counts.cu``: how often each index occurs."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.kernels import plans, sources, structures
from ekfac.kernels.engine import Engine
from ekfac.kernels.plans import Launch, pointer

SHARE = 1024  # indices, or bins, of a piece of work


@dataclass(frozen=True)
class Counts:
    """One layer: ``out <- beta out + alpha sum_k w_k [index_k = v]``.

    The kernel adds weights as multiples of ``2^-32``, to less than ``2^31``.

    Attributes:
        out: ``[1, size]``.
        index: ``[N, S]``, non-negative; others count nowhere.
        weight: ``[N, S]`` or ``None``.
        alpha: Factor of the new sum.
        beta: Factor of the old value; 0 does not read it.
    """

    out: Tensor
    index: Tensor
    weight: Tensor | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def supported(self) -> bool:
        """Return whether the kernel takes it."""
        return (
            self.index.dtype in (torch.int64, torch.int32)
            and self.index.dim() == 2
            and plans.writable(self.out, 1, self.out.shape[-1])
            and self.index.device == self.out.device
            and max(self.index.numel(), self.out.numel()) < plans.INT_MAX // 2
        )


def plan_counts(engine: Engine, layers: Sequence[Counts]) -> list[Launch]:
    """Return the launches for supported layers."""
    variant = sources.plain_variant("counts", engine.problems)
    chosen = [layer for layer in layers if layer.out.numel()]
    launches: list[Launch] = []
    for batch in plans.batches(len(chosen), engine.problems):
        launches += _launches(engine, variant, [chosen[i] for i in batch])
    return launches


def _launches(
    engine: Engine, variant: sources.Variant, layers: Sequence[Counts]
) -> list[Launch]:
    """Return the launches for at most ``engine.problems`` layers."""
    sizes = [layer.out.shape[-1] for layer in layers]
    bins = torch.zeros(sum(sizes), dtype=torch.int64, device=layers[0].out.device)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = [bins]
    first = first_tile = before = 0
    for layer, size in zip(layers, sizes, strict=True):
        index, weight = layer.index.long(), plans.weight_of(layer.weight)
        keep += [layer.out, index, *([] if weight is None else [weight])]
        n, s = plans.steps_of(index)
        problems.append(
            structures.CountsProblem(
                index=pointer(index),
                weight=pointer(weight),
                out=pointer(layer.out),
                stride_n=n,
                stride_s=s,
                bins=before,
                positions=max(1, index.shape[1]),
                rows=index.numel(),
                size=size,
                first=first,
                first_tile=first_tile,
                alpha=layer.alpha,
                beta=layer.beta,
            )
        )
        first += -(-index.numel() // SHARE)
        first_tile += -(-size // SHARE)
        before += size
    params = structures.fill(problems, engine.problems, parts=pointer(bins))
    launches = [Launch(variant, "counts_finish", params, first_tile, 256, keep=keep)]
    if first:
        launches.insert(0, Launch(variant, "counts", params, first, 256, keep=keep))
    return launches
