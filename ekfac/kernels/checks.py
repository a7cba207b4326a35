"""A small problem with a known answer for every variant, tried before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels import elementwise, grams, moments, plans, sources
from ekfac.kernels.convolution import Convolution
from ekfac.kernels.counts import Counts, plan_counts
from ekfac.kernels.elementwise import Preconditioned, Squares
from ekfac.kernels.engine import Engine
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
from ekfac.kernels.sources import Variant

TYPES = {kind: dtype for dtype, kind in sources.INPUTS.items()}
TYPES[sources.TF32] = torch.float32


def tolerance(variant: Variant) -> float:
    """Return the relative error that a variant may have."""
    if dict(variant.defines).get("INPUT") == sources.TF32:
        return 3e-3  # ten bits of mantissa
    return 1e-5


def error_of(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    return CHECKS[variant.source](engine, variant)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ``|found - expected| / |expected|``, not a number if one is not."""
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm())


class _Numbers:
    """Random tensors of the type and on the device of a variant."""

    def __init__(self, engine: Engine, variant: Variant) -> None:
        self.generator = torch.Generator().manual_seed(0)
        kind = dict(variant.defines).get("INPUT", sources.FLOAT)
        self.dtype, self.device = TYPES[kind], engine.device

    def rows(self, *shape: int) -> Tensor:
        numbers = torch.randn(*shape, generator=self.generator)
        return numbers.to(device=self.device, dtype=self.dtype)

    def poison(self, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), device=self.device)

    def weight(self, *shape: int) -> Tensor:
        numbers = torch.rand(*shape, generator=self.generator).round()
        return numbers.to(self.device)


def _wide(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.float64)


def _check_gram(engine: Engine, variant: Variant) -> float:
    numbers, defines = _Numbers(engine, variant), dict(variant.defines)
    width = defines["TILE"] + 5  # an edge, and tiles off the diagonal
    if defines["PATCHES"]:
        conv = Convolution((1, 3, 2), (1, 2, 1), (1, 1, 2), (0, 1, 1), (1, 4, 6), 2)
        channels = 2 * (width // 6)
        x = numbers.rows(3, channels, 1, 7, 6)
        features = conv.features(channels)
        first = Gram(
            numbers.poison(2, features + 1, features + 1), x, bias=True, conv=conv
        )
        last = x.contiguous(memory_format=torch.channels_last_3d)
        other = Gram(numbers.poison(2, features, features), last, conv=conv)
        chosen = [first, other]
    else:
        even, odd = numbers.rows(3, 40, 1, 68), numbers.rows(50, 2, 2, width)
        weight = numbers.weight(3, 40)
        chosen = [
            Gram(numbers.poison(1, 69, 69), even, weight, 0.5, bias=True),
            Gram(numbers.poison(2, width, width), odd),
        ]
    launches = grams.gram_launches(engine, variant, defines["TILE"], chosen)
    plans.execute(engine, launches)
    return _gram_error(chosen)


def _gram_error(chosen: list[Gram], *, diagonal: bool = False) -> float:
    errors = []
    for gram in chosen:
        expected = _wide(gram.out)
        wide = Gram(
            expected,
            gram.x.double(),
            None if gram.weight is None else gram.weight.double(),
            gram.alpha,
            gram.beta,
            gram.bias,
            gram.conv,
        )
        (diagonal_reference_ if diagonal else gram_reference_)(wide)
        errors.append(relative_error(gram.out, expected))
    return _largest(errors)


def _largest(errors: list[float]) -> float:
    """Return the largest; a number that is none counts as that."""
    return max(errors, key=lambda e: float("inf") if e != e else e)


def _check_diagonal(engine: Engine, variant: Variant) -> float:
    numbers = _Numbers(engine, variant)
    columns = numbers.rows(4, 2, 33, 70).permute(0, 3, 1, 2)
    chosen = [
        Gram(numbers.poison(1, 38), numbers.rows(900, 2, 1, 37), bias=True),
        Gram(numbers.poison(2, 33), columns, numbers.weight(4, 70), 2.0),
    ]
    plans.execute(engine, grams.diagonal_launches(engine, variant, chosen))
    return _gram_error(chosen, diagonal=True)


def _check_scalings(engine: Engine, variant: Variant) -> float:
    numbers, defines = _Numbers(engine, variant), dict(variant.defines)
    positions = 1 if defines["SQUARE"] else 19
    g = numbers.rows(40, positions, 2, defines["TILE"] + 3)
    a = numbers.rows(40, positions, 1, 68)
    layer = Scalings(numbers.poison(2, g.shape[-1], 68), g, a, 0.5)
    tile = defines["TILE"]
    plans.execute(engine, moments.scalings_launches(engine, variant, tile, [layer]))
    expected = _wide(layer.out)
    scalings_reference_(Scalings(expected, g.double(), a.double(), 0.5))
    return relative_error(layer.out, expected)


def _check_precondition(engine: Engine, variant: Variant) -> float:
    numbers = _Numbers(engine, variant)
    u, s = numbers.rows(2, 45, 70), numbers.rows(2, 45, 70).square()
    damping = torch.full((), 0.1, device=engine.device)
    wide = Preconditioned(u.double(), s.double(), damping.double())
    sums = numbers.poison(1, 2)
    layer = Preconditioned(u, s, damping)
    plans.execute(engine, elementwise.plan_precondition(engine, [layer], sums, -1.0))
    expected = precondition_reference_(wide, -1.0)
    errors = [relative_error(u, wide.projected), relative_error(sums[0], expected)]
    return _largest(errors)


def _check_squares(engine: Engine, variant: Variant) -> float:
    numbers = _Numbers(engine, variant)
    s, u = numbers.rows(2, 45, 70).square(), numbers.rows(2, 45, 70)
    kept, unread = s.clone(), numbers.poison(2, 45, 70)
    scales = torch.tensor([[0.9, 0.3], [0.5, 0.0]], device=engine.device)
    layers = [Squares(s, u, scales[0]), Squares(kept, unread, scales[1])]
    wide = [Squares(s.double(), u.double(), scales[0].double())]
    wide.append(Squares(kept.double(), torch.zeros_like(wide[0].projected), scales[1]))
    sums = numbers.poison(2)
    plans.execute(engine, elementwise.plan_squares(engine, layers, sums))
    errors = []
    for layer, exact, total in zip(layers, wide, sums, strict=True):
        expected = squares_reference_(exact)
        errors += [relative_error(layer.scalings, exact.scalings)]
        errors += [relative_error(total, expected)]
    return _largest(errors)


def _check_counts(engine: Engine, variant: Variant) -> float:
    numbers = _Numbers(engine, variant)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(-1, 1100, (70, 40), generator=generator).to(engine.device)
    first = Counts(numbers.poison(1, 1050), index, numbers.weight(70, 40), 0.5)
    second = Counts(torch.ones(1, 9, device=engine.device), index[:3, ::2], beta=2.0)
    plans.execute(engine, plan_counts(engine, [first, second]))
    errors = []
    for one in (first, second):
        expected = torch.ones_like(one.out, dtype=torch.float64)
        weight = None if one.weight is None else one.weight.double()
        counts_reference_(Counts(expected, one.index, weight, one.alpha, one.beta))
        errors.append(relative_error(one.out, expected))
    return _largest(errors)


def _check_jacobi(engine: Engine, variant: Variant) -> float:
    numbers = _Numbers(engine, variant)
    x = numbers.rows(2, 21, 40)
    matrices = x @ x.transpose(-1, -2)
    work, vectors = matrices.clone(), numbers.poison(2, 21, 21)
    plans.execute(engine, moments.plan_jacobi(work, vectors))
    values = work.diagonal(dim1=-2, dim2=-1)
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.transpose(-1, -2)
    eye = torch.eye(21, device=engine.device).expand(2, 21, 21)
    errors = [
        relative_error(rebuilt, matrices),
        relative_error(vectors.transpose(-1, -2) @ vectors, eye),
    ]
    return _largest(errors)


CHECKS = {
    "gram": _check_gram,
    "diagonal": _check_diagonal,
    "scalings": _check_scalings,
    "counts": _check_counts,
    "squares": _check_squares,
    "precondition": _check_precondition,
    "jacobi": _check_jacobi,
}
