"""Counts of indices, weighted, of many layers in one launch: ``counts.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.kernels.cuda.choice import bucket
from ekfac.kernels.cuda.compiler import Variant
from ekfac.kernels.cuda.kernel import (
    Kernel,
    Numbers,
    SumOperator,
    accumulation,
    items_of,
    largest,
    relative_error,
    update_,
)
from ekfac.kernels.cuda.launch import (
    INT_MAX,
    WORK,
    Engine,
    Launch,
    execute,
    fields,
    fill,
    grouped,
    plain_variant,
    pointer,
    steps_of,
    weight_of,
    writable,
)

SHARE = 1024  # indices, or bins, of a piece of work


class CountsProblem(ctypes.Structure):
    """``Problem`` of ``counts.cu``."""

    _fields_ = [
        *fields(c_void_p, "index weight scale out"),
        *fields(c_longlong, "stride_n stride_s bins"),
        *fields(c_int, "positions rows size"),
        *WORK,
    ]


@dataclass(frozen=True)
class Counts:
    """One layer: ``out <- beta out + alpha sum_k w_k [index_k = v]``.

    The kernel adds weights as multiples of ``2^-32`` of the layer's largest.

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

    def shape_class(self) -> str:
        """Return the class of shapes that the layer is measured in."""
        return f"{bucket(self.index.numel())} {bucket(self.out.shape[-1])}"

    def supported(self) -> bool:
        """Return whether the kernel takes it."""
        return (
            self.index.dtype in (torch.int64, torch.int32)
            and self.index.dim() == 2
            and writable(self.out, 1, self.out.shape[-1])
            and self.index.device == self.out.device
            and max(self.index.numel(), self.out.numel()) < INT_MAX // 2
        )


def plan_counts(engine: Engine, layers: Sequence[Counts]) -> list[Launch]:
    """Return the launches for supported layers."""
    variant = plain_variant("counts", engine.problems)
    nonempty = [layer for layer in layers if layer.out.numel()]
    launches: list[Launch] = []
    for _, group in grouped(engine, nonempty, lambda _: variant):
        launches += _launches(engine, variant, group)
    return launches


def _launches(
    engine: Engine, variant: Variant, layers: Sequence[Counts]
) -> list[Launch]:
    """Return the launches for at most ``engine.problems`` layers."""
    sizes = [layer.out.shape[-1] for layer in layers]
    bins = torch.zeros(sum(sizes), dtype=torch.int64, device=layers[0].out.device)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = [bins]
    first = first_tile = before = 0
    for layer, size in zip(layers, sizes, strict=True):
        index, weight = layer.index.long(), weight_of(layer.weight)
        scale = None
        if weight is not None and weight.numel():
            tiny = torch.finfo(torch.float32).tiny
            scale = weight.abs().amax().clamp(min=tiny)
            weight = weight / scale
        keep += [layer.out, index]
        keep += [t for t in (weight, scale) if t is not None]
        n, s = steps_of(index)
        problems.append(
            CountsProblem(
                index=pointer(index),
                weight=pointer(weight),
                scale=pointer(scale),
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
    params = fill(problems, engine.problems, parts=pointer(bins))
    launches = [Launch(variant, "counts_finish", params, first_tile, 256, keep=keep)]
    if first:
        launches.insert(0, Launch(variant, "counts", params, first, 256, keep=keep))
    return launches


def counts_reference_(layer: Counts) -> None:
    """Do what ``counts.cu`` does, with torch."""
    kind, size = accumulation(layer.out), layer.out.shape[-1]
    index = layer.index.reshape(-1).long()
    weight = torch.ones_like(index, dtype=kind)
    if layer.weight is not None:
        weight = layer.weight.reshape(-1).to(kind)
    inside = (index >= 0) & (index < size)
    counts = torch.zeros(size, dtype=kind, device=layer.out.device)
    counts.index_add_(0, torch.where(inside, index, 0), weight * inside)
    update_(layer.out, counts.unsqueeze(0), layer.alpha, layer.beta)


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    numbers = Numbers(engine, variant)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-1, 1100, (70, 40), generator=generator).to(engine.device)
    first = Counts(numbers.poison(1, 1050), index, 1e-6 * numbers.weight(70, 40), 0.5)
    few = (index % 11 - 1)[:3, ::2]
    second = Counts(numbers.poison(1, 9).fill_(1), few, beta=2.0)
    execute(engine, plan_counts(engine, [first, second]))
    errors = []
    for layer in (first, second):
        expected = torch.ones_like(layer.out, dtype=torch.float64)
        weight = None if layer.weight is None else layer.weight.double()
        counts_reference_(
            Counts(expected, layer.index, weight, layer.alpha, layer.beta)
        )
        errors.append(relative_error(layer.out, expected))
    return largest(errors)


KERNEL = Kernel("counts", lambda n: [plain_variant("counts", n)], check)
OPERATORS = [
    SumOperator(
        "index_counts_",
        "(Tensor(a!)[] outs, Tensor[] indices, Tensor?[] weights, float[] alphas, "
        "float[] betas) -> ()",
        items_of(Counts),
        Counts.supported,
        lambda engine, _: plain_variant("counts", engine.problems),
        plan_counts,
        counts_reference_,
    )
]
