"""Diagonals of Gram matrices, of many layers in one launch: ``diagonal.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_longlong, c_void_p
from functools import partial

import torch
from torch import Tensor

from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, HALF, Variant
from ekfac.kernels.cuda.gram import Gram, error_of, wide_rows
from ekfac.kernels.cuda.kernel import Kernel, Numbers, SumOperator, items_of, update_
from ekfac.kernels.cuda.launch import (
    WORK,
    Engine,
    Launch,
    execute,
    fields,
    fill,
    grouped,
    pointer,
    split_sums,
    steps_of,
    weight_of,
)

WIDTH = 32  # features of a piece of work


class DiagonalProblem(ctypes.Structure):
    """``Problem`` of ``diagonal.cu``."""

    _fields_ = [
        *fields(c_void_p, "x weight out"),
        *fields(c_longlong, "stride_n stride_s stride_block stride_feature"),
        ("out_block", c_longlong),
        *fields(c_int, "positions rows blocks features bias chunks"),
        *fields(c_int, "splits share lanes"),
        *WORK,
    ]


def diagonal_variant(kind: int, problems: int) -> Variant:
    """Return the variant for an input type."""
    return Variant("diagonal", (("INPUT", kind), ("PROBLEMS", problems)))


def every_variant(problems: int) -> list[Variant]:
    """Return all variants, for launches of up to ``problems`` layers."""
    return [diagonal_variant(kind, problems) for kind in (FLOAT, BFLOAT16, HALF)]


def diagonal_choice(engine: Engine, gram: Gram) -> Variant:
    """Return the variant for the diagonal of a layer."""
    return diagonal_variant(compiler.INPUTS[gram.x.dtype], engine.problems)


def plan_diagonals(engine: Engine, grams: Sequence[Gram]) -> list[Launch]:
    """Return the launches for the diagonals of supported layers of plain rows."""
    nonempty = [gram for gram in grams if gram.width and gram.blocks]
    launches: list[Launch] = []
    for variant, group in grouped(engine, nonempty, partial(diagonal_choice, engine)):
        launches += diagonal_launches(engine, variant, group)
    return launches


def diagonal_launches(
    engine: Engine, variant: Variant, grams: Sequence[Gram]
) -> list[Launch]:
    """Return the launches for layers of one variant, at most ``engine.problems``."""
    chunks = [-(-gram.width // WIDTH) for gram in grams]
    tiles = [g.blocks * c for g, c in zip(grams, chunks, strict=True)]
    lanes = [1 if steps_of(g.x)[3] > 1 else WIDTH for g in grams]
    along = [256 // lane for lane in lanes]
    steps = [-(-g.rows // a) for g, a in zip(grams, along, strict=True)]
    splits = split_sums(engine, tiles, steps)
    problems: list[ctypes.Structure] = []
    keep: list[Tensor] = []
    first = first_tile = 0
    for i, gram in enumerate(grams):
        parts, share = splits[i]
        weight = weight_of(gram.weight)
        keep += [gram.x, gram.out, *([] if weight is None else [weight])]
        n, s, b, f = steps_of(gram.x)
        problems.append(
            DiagonalProblem(
                x=pointer(gram.x),
                weight=pointer(weight),
                out=pointer(gram.out),
                stride_n=n,
                stride_s=s,
                stride_block=b,
                stride_feature=f,
                out_block=gram.out.stride(0),
                positions=max(1, gram.positions),
                rows=gram.rows,
                blocks=gram.blocks,
                features=gram.features,
                bias=int(gram.bias),
                chunks=chunks[i],
                splits=parts,
                share=share * along[i],
                lanes=lanes[i],
                first=first,
                first_tile=first_tile,
                alpha=gram.alpha,
                beta=gram.beta,
            )
        )
        first, first_tile = first + tiles[i] * parts, first_tile + tiles[i]
    split = any(parts > 1 for parts, _ in splits)
    size = first * WIDTH if split else 0
    space = torch.empty(size, dtype=torch.float32, device=grams[0].x.device)
    params = fill(problems, engine.problems, parts=pointer(space))
    keep.append(space)
    launches = [Launch(variant, "diagonal", params, first, 256, 0, keep, (space,))]
    if split:
        name = "diagonal_finish"
        launches.append(Launch(variant, name, params, first_tile, WIDTH, keep=keep))
    return launches


def diagonal_reference_(gram: Gram) -> None:
    """Do what ``diagonal.cu`` does, with torch."""
    x = wide_rows(gram).square()
    if gram.weight is not None:
        x = x * gram.weight[..., None, None].to(x.dtype)
    update_(gram.out, x.sum(dim=(0, 1)), gram.alpha, gram.beta)


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    numbers = Numbers(engine, variant)
    columns = numbers.rows(4, 2, 33, 70).permute(0, 3, 1, 2)
    out = numbers.poison(2, 36)[:, :33].fill_(1)
    layers = [
        Gram(out, columns, numbers.weight(4, 70), 2.0, -50.0),
        Gram(numbers.poison(1, 38), numbers.rows(900, 2, 1, 37), bias=True),
    ]
    launches = diagonal_launches(engine, variant, layers)
    return error_of(layers, diagonal_reference_, lambda: execute(engine, launches))


def supported(gram: Gram) -> bool:
    """Return whether the kernel takes it: plain rows."""
    return gram.conv is None and gram.supported(diagonal=True)


KERNEL = Kernel("diagonal", every_variant, check)
OPERATORS = [
    SumOperator(
        "diagonal_gram_",
        "(Tensor(a!)[] outs, Tensor[] rows, Tensor?[] weights, float[] alphas, "
        "float[] betas, bool[] biases) -> ()",
        items_of(Gram),
        supported,
        diagonal_choice,
        plan_diagonals,
        diagonal_reference_,
    )
]
