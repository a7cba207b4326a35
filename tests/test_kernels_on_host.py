"""The code of ``csrc/`` on the CPU, thread by thread, against float64.

What is compiled is the kernels' own text, with the plans that launch it on a device:
the layouts, edges, splits, tables of rows and taps, and the fragments of the tensor
cores.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from host_engine import HostEngine, compile_together
from torch import Tensor

from ekfac import EKFAC
from ekfac.curvature import eigenbasis
from ekfac.errors import EkfacWarning
from ekfac.kernels import decomposition
from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.cuda import (
    compiler,
    dispatch,
    kernel,
    launch,
    operators,
    tiles,
)
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, HALF, TF32, Variant
from ekfac.kernels.cuda.counts import Counts, plan_counts
from ekfac.kernels.cuda.diagonal import diagonal_variant, plan_diagonals
from ekfac.kernels.cuda.dispatch import KernelCache
from ekfac.kernels.cuda.gram import (
    Gram,
    gram_choice,
    gram_launches,
    gram_variant,
    plan_grams,
)
from ekfac.kernels.cuda.jacobi import plan_jacobi
from ekfac.kernels.cuda.launch import Launch, execute, plain_variant, split_sums
from ekfac.kernels.cuda.precondition import Preconditioned, plan_precondition
from ekfac.kernels.cuda.scalings import (
    Scalings,
    plan_scalings,
    scalings_choice,
    scalings_launches,
    scalings_variant,
)
from ekfac.kernels.cuda.spectral import (
    Spectral,
    plan_spectral,
    spectral_reference_,
    spectral_variant,
)
from ekfac.kernels.cuda.squares import Squares, plan_squares
from ekfac.kernels.linalg import COEFFICIENTS
from ekfac.optim import update

TWO, FEW = 2, compiler.FEW  # layers of a launch

QUICK = [
    *(gram_variant(FLOAT, tile, False, TWO) for tile in (64, 128)),
    gram_variant(FLOAT, 64, True, TWO),
    gram_variant(TF32, 128, True, FEW),
    gram_variant(BFLOAT16, 64, False, FEW),
    gram_variant(TF32, 64, False, TWO, pipeline=True),
    gram_variant(BFLOAT16, 64, True, TWO, pipeline=True),
    gram_variant(HALF, 128, False, FEW, pipeline=True),
    scalings_variant(FLOAT, 64, False, TWO),
    scalings_variant(TF32, 64, True, FEW),
    scalings_variant(TF32, 64, True, TWO, pipeline=True),
    scalings_variant(TF32, 128, False, TWO, pipeline=True),
    scalings_variant(BFLOAT16, 64, False, FEW, pipeline=True),
    scalings_variant(HALF, 128, False, TWO, pipeline=True),
    scalings_variant(TF32, 128, True, TWO, pipeline=True, warpgroups=True),
    scalings_variant(BFLOAT16, 128, False, TWO, pipeline=True, warpgroups=True),
    diagonal_variant(BFLOAT16, FEW),
    diagonal_variant(FLOAT, TWO),
    *(plain_variant(n, TWO) for n in ("counts", "squares", "precondition")),
    spectral_variant(32, TWO),
    spectral_variant(64, FEW),
    Variant("jacobi"),
]
TOLERANCE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_together(QUICK)


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def engine(request: pytest.FixtureRequest) -> HostEngine:
    """Return engines that let threads take turns in either order."""
    return HostEngine(3, backwards=request.param, problems=TWO)


def poison(*shape: int) -> Tensor:
    return torch.full(shape, math.nan)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def exact_gram(gram: Gram, patches: Tensor | None = None) -> Tensor:
    """Return ``alpha sum w x x^T`` in float64, from rows or explicit patches."""
    x = (gram.x if patches is None else patches).double()
    if gram.bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    weight = torch.ones(x.shape[:2]) if gram.weight is None else gram.weight
    return gram.alpha * torch.einsum("ns,nsbi,nsbj->bij", weight.double(), x, x)


@pytest.mark.parametrize("variant", QUICK, ids=str)
def test_variants_are_right_whatever_the_order_of_threads(variant: Variant) -> None:
    """A result that depends on who comes first would show a missing barrier."""
    found = []
    for backwards in (False, True):
        limit = dict(variant.defines).get("PROBLEMS", 1)
        own = HostEngine(3, backwards=backwards, problems=limit)
        own.load(variant)
        found.append(dispatch.error_of(own, variant))
    assert found[0] <= kernel.tolerance(variant)
    assert found[0] == found[1]


@pytest.mark.parametrize("squares", [False, True])
def test_a_first_use_sees_words_that_are_cut_off(squares: bool) -> None:
    """Rounded they lose nothing that counts; cut off, in one factor, they are seen."""
    variant = scalings_variant(TF32, 64, squares, TWO)
    rows = kernel.Numbers(HostEngine(), variant).rows(200, 30)
    words = rows.square() if squares else rows
    exact, limit = words.double(), kernel.tolerance(variant)
    cut = torch.bitwise_and(words.view(torch.int32), -0x2000).view(torch.float32)
    rounded = as_tf32(words)
    assert relative_error(rounded.mT @ rounded, exact.mT @ exact) < limit / 5
    for one in (rounded, words):
        assert relative_error(one.mT @ cut, exact.mT @ exact) > 5 * limit
    assert float(rows.std()) == pytest.approx(1, rel=0.05)
    assert rows.unique().numel() > 1000


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Set torch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("source", list(dispatch.KERNELS))
def test_nothing_depends_on_the_default_type(default: torch.dtype, source: str) -> None:
    """Every buffer of every launch has the type that the kernel writes."""
    variant = next(v for v in QUICK if v.source == source)
    limit = dict(variant.defines).get("PROBLEMS", 1)
    own = HostEngine(132, problems=limit)  # many: sums are split
    assert dispatch.error_of(own, variant) <= kernel.tolerance(variant)
    assert torch.get_default_dtype() == default


def test_sums_are_float32_whatever_the_default_type(
    monkeypatch: pytest.MonkeyPatch, default: torch.dtype
) -> None:
    cache = KernelCache(HostEngine(problems=TWO))
    monkeypatch.setattr(dispatch, "kernel_cache", lambda _: cache)
    f32 = {"dtype": torch.float32}
    u, s = torch.full((1, 3, 4), 2.0, **f32), torch.ones(1, 3, 4, **f32)
    sums = torch.ops.ekfac.precondition_([u], [s], torch.ones(1, **f32), -1.0)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [[24.0, 12.0]]
    scales = torch.tensor([[0.5, 1.0]], **f32)
    sums = torch.ops.ekfac.squares_([s], [u], scales)
    assert sums.dtype == torch.float32
    assert sums.tolist() == [18.0]
    assert cache.used["precondition"] == cache.used["squares"] == 1
    rows = torch.ones(3, 1, 1, 2, **f32)
    monkeypatch.setattr(operators, "applies", lambda _: True)
    found = operators.launched("gram_", operators.gram_of(rows, None))
    assert found is not None
    assert found.dtype == torch.float32
    assert default != torch.float32


SWITCHES = {
    "matmul.fp32_precision = 'tf32'": TF32,
    "matmul.fp32_precision = 'ieee'": FLOAT,
    "matmul.allow_tf32 = True": TF32,
    "matmul.allow_tf32 = False": FLOAT,
    "torch.backends.fp32_precision = 'tf32'": TF32,
    "torch.backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'": FLOAT,
    "torch.set_float32_matmul_precision('high')": TF32,
    "torch.set_float32_matmul_precision('highest')": FLOAT,
    "matmul.fp32_precision = 'tf32'; "
    "torch.set_float32_matmul_precision('highest')": FLOAT,
}


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before 2.9"
)
def test_the_switches_of_tf32_are_read_old_and_new() -> None:
    """In processes of their own: the switches remember which of them was used."""
    lines = ["import os, torch", "from ekfac.kernels.cuda.tiles import input_kind"]
    for code, kind in SWITCHES.items():
        lines += [
            "if not os.fork():",
            "    matmul = torch.backends.cuda.matmul",
            f"    {code}",
            f"    os._exit(int(input_kind(torch.float32) != {kind}))",
            f"assert os.wait()[1] == 0, {code!r}",
        ]
    command = [sys.executable, "-W", "ignore", "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("weight", [1e-5, 0.3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weighted_rows_of_half_types(
    engine: HostEngine, dtype: torch.dtype, size: float, weight: float
) -> None:
    """Neither rounded to the half type once more, nor out of its range."""
    x = (size * torch.randn(64, 1, 1, 20)).to(dtype)
    weights = weight * (0.5 + torch.rand(64, 1))
    chosen = [Gram(poison(1, 21, 21), x, weights, bias=True)]
    image = (size * torch.randn(4, 3, 1, 4, 4)).to(dtype)
    conv = Convolution((1, 2, 2), (1, 1, 1), (1, 1, 1), (0, 0, 0), (1, 3, 3))
    chosen.append(Gram(poison(1, 12, 12), image, weights[:36].reshape(4, 9), conv=conv))
    execute(engine, plan_grams(engine, chosen))
    assert relative_error(chosen[0].out, exact_gram(chosen[0])) < TOLERANCE
    rows = torch.nn.functional.unfold(image[:, :, 0].double(), 2).mT.unsqueeze(2)
    assert relative_error(chosen[1].out, exact_gram(chosen[1], rows)) < TOLERANCE
    diagonal = Gram(poison(1, 20), x, weights)
    compile_together(
        [diagonal_variant(BFLOAT16 if dtype == torch.bfloat16 else HALF, TWO)]
    )
    execute(engine, plan_diagonals(engine, [diagonal]))
    expected = exact_gram(diagonal).diagonal(dim1=-2, dim2=-1)
    assert relative_error(diagonal.out, expected) < TOLERANCE


def test_small_weights_of_counts(engine: HostEngine) -> None:
    """Fixed-point sums are relative to the largest weight."""
    index = torch.randint(0, 7, (40, 60))
    for size in (1e-12, 1e-6, 1e9):
        weight = size * torch.rand(40, 60)
        one = Counts(poison(1, 7), index, weight)
        execute(engine, plan_counts(engine, [one]))
        expected = torch.bincount(index.flatten(), weight.flatten().double(), 7)
        assert relative_error(one.out[0], expected) < TOLERANCE
    none = Counts(poison(1, 7), index, torch.zeros(40, 60))
    execute(engine, plan_counts(engine, [none]))
    assert not none.out.any()


@pytest.mark.slow
@pytest.mark.parametrize("variant", dispatch.every_variant(), ids=str)
def test_every_variant_is_right(variant: Variant) -> None:
    own = HostEngine(3)
    own.load(variant)
    assert dispatch.error_of(own, variant) <= kernel.tolerance(variant)


@pytest.mark.parametrize("width", [1, 31, 33, 129])
def test_gram_of_odd_sizes(engine: HostEngine, width: int) -> None:
    chosen = [
        Gram(poison(1, width, width), torch.randn(1, 1, 1, width)),
        Gram(
            poison(1, width + 1, width + 1),
            torch.randn(33, 2, 1, width),
            torch.rand(33, 2),
            0.3,
            bias=True,
        ),
        Gram(poison(3, width, width), torch.randn(31, 1, 3, width)),
    ]
    execute(engine, plan_grams(engine, chosen))
    for gram in chosen:
        assert relative_error(gram.out, exact_gram(gram)) < TOLERANCE
        assert torch.equal(gram.out, gram.out.transpose(-1, -2))


def test_gram_of_many_rows_is_split_and_repeats(engine: HostEngine) -> None:
    x = torch.randn(1000, 1, 1, 33)
    engine.multiprocessors = 8
    once, twice = Gram(poison(1, 33, 33), x), Gram(poison(1, 33, 33), x)
    execute(engine, plan_grams(engine, [once]))
    execute(engine, plan_grams(engine, [twice]))
    assert "gram_finish" in engine.launched
    assert relative_error(once.out, exact_gram(once)) < TOLERANCE
    assert torch.equal(once.out, twice.out)


def test_gram_updates_what_is_there(engine: HostEngine) -> None:
    x, old = torch.randn(20, 1, 1, 40), torch.randn(1, 40, 40)
    old += old.transpose(-1, -2).clone()
    gram = Gram(old.clone(), x, None, 0.25, 0.75)
    execute(engine, plan_grams(engine, [gram]))
    expected = 0.75 * old.double() + exact_gram(gram)
    assert relative_error(gram.out, expected) < TOLERANCE


def test_gram_of_strided_rows(engine: HostEngine) -> None:
    """Feature steps of one, aligned or not, and positions side by side."""
    wide = torch.randn(9, 7, 2, 80)
    images = torch.randn(9, 37, 2, 11).permute(0, 3, 2, 1)  # [N, S, b, d], d strided
    bank = torch.full((3, 48, 64), math.nan)
    views = [wide[..., 3:40], wide[::2, :, :1, 4:68], images]
    outs = [poison(2, 37, 37), poison(1, 64, 64), bank[:2, :37, :37]]
    chosen = [Gram(out, x) for out, x in zip(outs, views, strict=True)]
    layouts = {
        tiles.layout_of(x, x.stride(3), x.stride()[:3], 4)
        for x in (wide[..., 3:40], wide[..., 4:68], images)
    }
    assert len(layouts) == 3
    execute(engine, plan_grams(engine, chosen))
    for gram in chosen:
        assert relative_error(gram.out, exact_gram(gram)) < TOLERANCE
    assert bank[2].isnan().all()
    assert bank[:, 37:].isnan().all()
    assert bank[..., 37:].isnan().all()


FAR = 2**31 + 64  # elements, more than 32 bits count


@pytest.fixture
def far(tmp_path: Path) -> Callable[[Tensor], Tensor]:
    """Return what copies a tensor's two halves to places that are far apart.

    In a file that is all hole but for what is written: memory is taken for that alone.
    """

    def copied(values: Tensor) -> Tensor:
        name = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        size = FAR + values[0].numel()
        store = torch.from_file(name, shared=True, size=size, dtype=values.dtype)
        result = store.as_strided(values.shape, (FAR, *values[0].stride()))
        result.copy_(values)
        return result

    return copied


def test_offsets_of_more_than_32_bits(
    far: Callable[[Tensor], Tensor], tensor_type: torch.dtype
) -> None:
    """Of rows, of results and of both operands, in every kernel that has strides."""
    engine = HostEngine(2, problems=TWO)
    x = torch.randn(2, 5, 1, 64).to(tensor_type)
    gram, diagonal = Gram(poison(1, 64, 64), far(x)), Gram(poison(1, 64), far(x))
    rows = torch.randn(9, 1, 2, 8)
    apart = Gram(far(poison(2, 8, 8)), rows)
    g = torch.randn(2, 3, 1, 8).to(tensor_type)
    scalings = Scalings(poison(1, 8, 64), far(g), far(x[:, :3]))
    launches = plan_grams(engine, [gram, apart]) + plan_diagonals(engine, [diagonal])
    execute(engine, launches + plan_scalings(engine, [scalings]))
    exact = exact_gram(gram)
    assert relative_error(gram.out, exact) < 2e-3
    assert relative_error(apart.out, exact_gram(apart)) < 2e-3
    assert relative_error(diagonal.out, exact.diagonal(dim1=1, dim2=2)) < TOLERANCE
    each = torch.einsum("nsbi,nsbj->nbij", g.double(), x[:, :3].double())
    assert relative_error(scalings.out, each.square().sum(0)) < 2e-3


def test_elements_further_apart_than_32_bits_count(
    far: Callable[[Tensor], Tensor],
) -> None:
    engine = HostEngine(2, problems=TWO)
    u, s = torch.randn(2, 4, 6), torch.rand(2, 4, 6) + 0.1
    here, there = far(u), far(s)
    layer = Preconditioned(here, there, torch.tensor(0.1))
    execute(engine, plan_precondition(engine, [layer], poison(1, 2), -1.0))
    torch.testing.assert_close(here, u / (s + 0.1))
    average = Squares(there, here, torch.tensor([0.9, 0.1]))
    execute(engine, plan_squares(engine, [average], poison(1)))
    torch.testing.assert_close(there, 0.9 * s + 0.1 * here.square())


def test_empty_inputs(engine: HostEngine) -> None:
    """No rows give zero, no features and no layers nothing."""
    assert plan_grams(engine, []) == []
    none = Gram(poison(1, 0, 0), torch.randn(4, 1, 1, 0))
    zero = Gram(poison(2, 5, 5), torch.randn(0, 3, 2, 5))
    kept = Gram(torch.ones(1, 5, 5), torch.randn(4, 0, 1, 5), beta=0.5)
    execute(engine, plan_grams(engine, [none, zero, kept]))
    assert torch.equal(zero.out, torch.zeros(2, 5, 5))
    assert torch.equal(kept.out, torch.full((1, 5, 5), 0.5))
    counts = Gram(poison(2, 5), torch.randn(0, 3, 2, 5))
    execute(engine, plan_diagonals(engine, [counts]))
    assert torch.equal(counts.out, torch.zeros(2, 5))


KINDS = {"tf32": torch.float32, "bf16": torch.bfloat16, "half": torch.float16}


@pytest.fixture(params=list(KINDS))
def tensor_type(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> torch.dtype:
    """Return types that tensor cores multiply, float32 as TF32."""
    monkeypatch.setattr(tiles, "uses_tf32", lambda: True)
    return KINDS[request.param]


def as_tf32(x: Tensor) -> Tensor:
    """Return float32 rounded to ten bits of mantissa, ties away from zero."""
    if x.dtype != torch.float32:
        return x
    shifted = x.view(torch.int32) + 0x1000
    return torch.bitwise_and(shifted, -0x2000).view(torch.float32)


def product_gram(gram: Gram, patches: Tensor | None = None) -> Tensor:
    """Return ``alpha sum x (w x)^T`` in float64 of operands rounded as they are."""
    x = gram.x if patches is None else patches
    if gram.bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    left, right = as_tf32(x), x
    if gram.weight is not None:
        right = x * gram.weight[..., None, None]
    right = as_tf32(right)
    total = torch.einsum("nsbi,nsbj->bij", left.double(), right.double())
    total = total.triu() + total.triu(1).mT  # above the diagonal the right is weighted
    if gram.bias and gram.weight is not None:
        total[:, -1, -1] = gram.weight.double().sum()
    return gram.alpha * total


def pipelined(chosen: list[Gram], problems: int = TWO) -> None:
    """Check that layers take the pipelined variants, and compile them."""
    own = HostEngine(problems=problems)
    variants = [gram_choice(own, gram)[0] for gram in chosen]
    assert all(dict(variant.defines).get("PIPELINE") for variant in variants)
    compile_together(variants)


def test_pipelined_grams(engine: HostEngine, tensor_type: torch.dtype) -> None:
    """Edges, a bias that is no feature, blocks, steps, weights, old values."""
    wide = torch.randn(90, 3, 2, 176).to(tensor_type)
    weight = torch.rand(90, 3) if tensor_type == torch.float32 else None
    bank = torch.full((3, 140, 160), math.nan)
    chosen = [
        Gram(poison(1, 65, 65), wide[:, :, :1, :64], weight, 0.5, bias=True),
        Gram(bank[:2, :131, :131], wide[:, :, :, 16:147], weight),
        Gram(poison(2, 34, 34), wide[::2, ::2, :, 8:41], bias=True),
        Gram(torch.ones(1, 130, 130), wide[:, :, 1:, :129], beta=-2.0, bias=True),
    ]
    pipelined(chosen)
    execute(engine, plan_grams(engine, chosen))
    for gram in chosen:
        expected = product_gram(gram) + gram.beta
        assert relative_error(gram.out, expected) < TOLERANCE
        assert torch.equal(gram.out, gram.out.mT)
    assert bank[2].isnan().all()
    assert bank[:, 131:].isnan().all()
    assert bank[..., 131:].isnan().all()


@pytest.mark.parametrize("rows", [1, 16, 31, 33, 1300])
def test_pipelined_sums_of_any_length(
    engine: HostEngine, tensor_type: torch.dtype, rows: int
) -> None:
    """Shorter than the pipeline, and split into parts, which give the same twice."""
    x = torch.randn(rows, 1, 1, 72).to(tensor_type)
    engine.multiprocessors = 8
    once, twice = (Gram(poison(1, 73, 73), x, bias=True) for _ in range(2))
    pipelined([once])
    execute(engine, plan_grams(engine, [once]))
    execute(engine, plan_grams(engine, [twice]))
    assert ("gram_finish" in engine.launched) == (rows == 1300)
    assert relative_error(once.out, product_gram(once)) < TOLERANCE
    assert once.out[0, 72, 72] == rows
    assert torch.equal(once.out, twice.out)


def test_pipelined_patches(engine: HostEngine, tensor_type: torch.dtype) -> None:
    """Channels last, with groups, strides, dilation and zeros around."""
    x = torch.randn(5, 32, 7, 6).to(tensor_type)
    last = with_depth(x.contiguous(memory_format=torch.channels_last))
    conv = Convolution((1, 3, 2), (1, 2, 1), (1, 1, 2), (0, 1, 1), (1, 4, 6), 2)
    unfold = torch.nn.Unfold((3, 2), (1, 2), (1, 1), (2, 1))
    patches = unfold(x.double()).unflatten(1, (2, 96)).permute(0, 3, 1, 2)
    gram = Gram(poison(2, 97, 97), last, bias=True, conv=conv)
    pipelined([gram])
    execute(engine, plan_grams(engine, [gram]))
    expected = product_gram(gram, patches.to(tensor_type))
    assert relative_error(gram.out, expected) < TOLERANCE


def warpgroup_launches(engine: HostEngine, grams: list[Gram]) -> list[Launch]:
    """Return the launches by products of warpgroups, of any width."""
    kind = tiles.input_kind(grams[0].x.dtype)
    patches = grams[0].conv is not None
    ways = {"pipeline": True, "warpgroups": True}
    variant = gram_variant(kind, tiles.WARPGROUP_TILE, patches, TWO, **ways)
    return gram_launches(engine, variant, tiles.WARPGROUP_TILE, grams)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow TF32 in products of float32."""
    monkeypatch.setattr(tiles, "uses_tf32", lambda: True)


def transposed_gram(gram: Gram, patches: Tensor | None = None) -> Tensor:
    """Return what products of words sum to; the sums of a bias are not rounded."""
    total = exact_gram(gram, patches)
    d = gram.features
    plain = replace(gram, bias=False)
    total[:, :d, :d] = product_gram(plain, patches)
    return total


def check_by_warpgroups(
    engine: HostEngine,
    chosen: list[Gram],
    bank: Tensor,
    reference: Callable[[Gram], Tensor],
) -> None:
    """Compare four Gram matrices, launched in pairs; one is part of a ``bank``."""
    engine.multiprocessors = 8
    for pair in (chosen[:2], chosen[2:]):
        execute(engine, warpgroup_launches(engine, pair))
    for gram in chosen:
        assert relative_error(gram.out, reference(gram) + gram.beta) < TOLERANCE
        assert torch.equal(gram.out, gram.out.mT)
    assert bank[2].isnan().all()
    assert bank[:, 200:].isnan().all()
    assert bank[..., 200:].isnan().all()


def test_grams_of_words_by_warpgroups(engine: HostEngine, tf32: None) -> None:
    """Rows at even steps and not, weights, edges, blocks, a bias, parts of sums."""
    wide, weight = torch.randn(40, 3, 2, 400), torch.rand(40, 3)
    bank = torch.full((3, 210, 224), math.nan)
    chosen = [
        Gram(poison(1, 195, 195), wide[:, :, :1, :194], weight, 0.5, bias=True),
        Gram(bank[:2, :200, :200], wide[:1, :, :, 8:208]),
        Gram(torch.ones(1, 35, 35), wide[::2, :2, 1:, 8:42], beta=-2.0, bias=True),
        Gram(poison(1, 387, 387), wide[:, :1, :1, :386], weight[:, :1], bias=True),
    ]
    check_by_warpgroups(engine, chosen, bank, transposed_gram)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 17, 33, 49, 65, 550])
def test_sums_of_words_by_warpgroups_of_any_length(
    engine: HostEngine, tf32: None, rows: int, weighted: bool
) -> None:
    """Every remainder of three steps, and parts, which give the same twice."""
    x = torch.randn(rows, 1, 1, 200)
    weight = torch.rand(rows, 1) if weighted else None
    engine.multiprocessors = 8
    once, twice = (Gram(poison(1, 201, 201), x, weight, bias=True) for _ in range(2))
    execute(engine, warpgroup_launches(engine, [once]))
    execute(engine, warpgroup_launches(engine, [twice]))
    assert ("gram_finish" in engine.launched) == (rows == 550)
    assert relative_error(once.out, transposed_gram(once)) < TOLERANCE
    total = rows if weight is None else weight.double().sum().item()
    assert once.out[0, 200, 200].item() == pytest.approx(total, rel=1e-6)
    assert torch.equal(once.out, twice.out)


@pytest.mark.slow
def test_patches_of_words_by_warpgroups(engine: HostEngine, tf32: None) -> None:
    """Padding, dilation, groups, weights and a bias; features of a pair share a tap."""
    x, weight = torch.randn(5, 72, 7, 6), torch.rand(5, 24)
    last = with_depth(x.contiguous(memory_format=torch.channels_last))
    conv = Convolution((1, 3, 2), (1, 2, 1), (1, 1, 2), (0, 1, 1), (1, 4, 6), 2)
    unfold = torch.nn.Unfold((3, 2), (1, 2), (1, 1), (2, 1))
    patches = unfold(x).unflatten(1, (2, 216)).permute(0, 3, 1, 2)
    # Tap by tap, as the kernel counts them: of a pair the later one is weighted.
    by_taps = torch.arange(216).view(36, 6).T.flatten()
    order = torch.cat([by_taps, torch.tensor([216])])
    for own in (None, weight):
        gram = Gram(poison(2, 217, 217), last, own, bias=True, conv=conv)
        execute(engine, warpgroup_launches(engine, [gram]))
        expected = transposed_gram(gram, patches[..., by_taps])
        assert relative_error(gram.out[:, order][..., order], expected) < TOLERANCE


@pytest.mark.slow
def test_words_that_are_no_numbers_by_warpgroups(
    engine: HostEngine, tf32: None
) -> None:
    """They reach the rows and columns of their features, and no other."""
    x = torch.randn(40, 1, 1, 196)
    x[7, 0, 0, 3], x[20, 0, 0, 190] = math.nan, math.inf
    gram = Gram(poison(1, 197, 197), x, bias=True)
    execute(engine, warpgroup_launches(engine, [gram]))
    bad = ~gram.out[0].isfinite()
    expected = torch.zeros(197, 197, dtype=torch.bool)
    expected[[3, 190]] = expected[:, [3, 190]] = True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_grams_by_warpgroups(engine: HostEngine, dtype: torch.dtype) -> None:
    """Rows at even steps and not, edges, blocks, a bias, old values, parts of sums."""
    wide = torch.randn(40, 3, 2, 416).to(dtype)
    bank = torch.full((3, 210, 224), math.nan)
    chosen = [
        Gram(poison(1, 194, 194), wide[:, :, :1, :193], None, 0.5, bias=True),
        Gram(bank[:2, :200, :200], wide[:1, :, :, 8:208]),
        Gram(torch.ones(1, 34, 34), wide[::2, :2, 1:, 8:41], beta=-2.0, bias=True),
        Gram(poison(1, 385, 385), wide[:, 0:1, :1, :384], bias=True),
    ]
    check_by_warpgroups(engine, chosen, bank, product_gram)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 31, 33, 1100])
def test_sums_by_warpgroups_of_any_length(engine: HostEngine, rows: int) -> None:
    """Shorter than the pipeline, and split into parts, which give the same twice."""
    x = torch.randn(rows, 1, 1, 200).bfloat16()
    engine.multiprocessors = 8
    once, twice = (Gram(poison(1, 201, 201), x, bias=True) for _ in range(2))
    execute(engine, warpgroup_launches(engine, [once]))
    execute(engine, warpgroup_launches(engine, [twice]))
    assert ("gram_finish" in engine.launched) == (rows == 1100)
    assert relative_error(once.out, product_gram(once)) < TOLERANCE
    assert once.out[0, 200, 200] == rows
    assert torch.equal(once.out, twice.out)


@pytest.mark.slow
def test_patches_by_warpgroups(engine: HostEngine) -> None:
    x = torch.randn(5, 64, 7, 6).half()
    last = with_depth(x.contiguous(memory_format=torch.channels_last))
    conv = Convolution((1, 3, 2), (1, 2, 1), (1, 1, 2), (0, 1, 1), (1, 4, 6), 2)
    unfold = torch.nn.Unfold((3, 2), (1, 2), (1, 1), (2, 1))
    patches = unfold(x.double()).unflatten(1, (2, 192)).permute(0, 3, 1, 2)
    gram = Gram(poison(2, 193, 193), last, bias=True, conv=conv)
    execute(engine, warpgroup_launches(engine, [gram]))
    expected = product_gram(gram, patches.half())
    assert relative_error(gram.out, expected) < TOLERANCE


@pytest.mark.slow
def test_offsets_of_more_than_32_bits_by_warpgroups(
    far: Callable[[Tensor], Tensor], engine: HostEngine, tf32: None
) -> None:
    """Of rows at even steps, and of rows that are looked up."""
    single, several = torch.randn(2, 1, 1, 200), torch.randn(2, 5, 1, 200)
    for x in (single.bfloat16(), several.bfloat16(), single, several):
        gram = Gram(poison(1, 201, 201), far(x), bias=True)
        execute(engine, warpgroup_launches(engine, [gram]))
        expected = transposed_gram(gram)
        assert relative_error(gram.out, expected) < TOLERANCE


def test_warpgroups_are_for_wide_matrices_on_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper, other = HostEngine(warpgroups=True), HostEngine()

    def chosen(
        engine: HostEngine, dtype: torch.dtype, width: int, *rest: Tensor
    ) -> int:
        gram = Gram(torch.empty(0), torch.empty(8, 1, 1, width, dtype=dtype), *rest)
        variant, tile = gram_choice(engine, gram)
        assert (tile == tiles.WARPGROUP_TILE) == variant.warpgroups
        assert tiles.Geometry.of(variant).tile == tile
        return tile

    assert chosen(hopper, torch.float32, 768) == 128
    monkeypatch.setattr(tiles, "uses_tf32", lambda: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        widths = (64, 256, 576, 768, 1024, 4096)
        found = [chosen(hopper, dtype, width) for width in widths]
        assert found == [64, 128, 192, 192, 192, 192]
        assert chosen(other, dtype, 768) == 128
        assert chosen(hopper, dtype, 767) != 192  # not in chunks
        odd = Gram(torch.empty(0), torch.empty(8, 1, 1, 776, dtype=dtype)[..., :775])
        half = dtype != torch.float32  # weighted rows of half types are float32
        assert gram_choice(hopper, odd)[0].warpgroups == half  # not two by two
        assert chosen(hopper, dtype, 768, torch.ones(8, 1)) == (128 if half else 192)


def test_what_is_no_number_is_seen(
    engine: HostEngine, tensor_type: torch.dtype
) -> None:
    """In rows and columns of its feature and in no others; also a NaN of all ones."""
    x = torch.randn(40, 1, 1, 64).to(tensor_type)
    x[7, 0, 0, 5] = math.nan
    if tensor_type == torch.float32:
        x.view(torch.int32)[7, 0, 0, 5] = 0x7FFFFFFF
    gram = Gram(poison(1, 65, 65), x, bias=True)
    pipelined([gram])
    execute(engine, plan_grams(engine, [gram]))
    lost = gram.out[0].isnan()
    assert lost[5].all()
    assert lost[:, 5].all()
    assert int(lost.sum()) == 2 * 65 - 1


@pytest.mark.parametrize("positions", [0, 1, 2, 17, 33, 70])
def test_pipelined_scalings(
    engine: HostEngine, tensor_type: torch.dtype, positions: int
) -> None:
    """Against products in float64 of operands rounded as they are; sums are split."""
    engine.multiprocessors = 8
    wide = torch.randn(37, positions, 2, 152).to(tensor_type)
    others = torch.randn(37, positions, 1, 136).to(tensor_type)
    bank = torch.full((2, 67, 144), math.nan)
    layers = [
        Scalings(bank[:1, :, :131], wide[:, :, :1, 8:75], others[..., :131], 0.5),
        Scalings(torch.rand(2, 129, 33), wide[..., :129], others[..., 8:41], 1.0, 0.5),
    ]
    half = tensor_type != torch.float32
    variants = [scalings_choice(engine, layer)[0] for layer in layers]
    for variant in variants:
        pipeline = bool(dict(variant.defines).get("PIPELINE"))
        assert pipeline == (not half or positions != 1)
    compile_together(variants)
    expected = [product_scalings(layer) for layer in layers]
    execute(engine, plan_scalings(engine, layers))
    for layer, image in zip(layers, expected, strict=True):
        assert_close(layer, image)
    assert bank[1].isnan().all()
    assert bank[..., 131:].isnan().all()


def product_scalings(layer: Scalings) -> Tensor:
    """Return what a layer's result is to be, of operands rounded as they are."""
    g, a = layer.grads.float(), layer.inputs.float()
    single = g.shape[1] == 1
    if single:
        g, a = g.square(), a.square()
    if single or layer.grads.dtype == torch.float32:
        g, a = as_tf32(g), as_tf32(a)
    a = a.expand(-1, -1, g.shape[2], -1)
    each = torch.einsum("nsbi,nsbj->nbij", g.double(), a.double())
    squares = (each if single else each.square()).sum(dim=0)
    old = layer.beta * layer.out.double() if layer.beta else 0
    return layer.alpha * squares + old


def assert_close(layer: Scalings, expected: Tensor) -> None:
    if layer.grads.numel():
        assert relative_error(layer.out, expected) < TOLERANCE
    else:
        assert torch.equal(layer.out.double(), expected)


def scalings_by_warpgroups(
    engine: HostEngine, layers: list[Scalings], least: int = launch.MIN_STEPS
) -> list[Launch]:
    """Return the launches by products of warpgroups, of any width."""
    kind = tiles.input_kind(layers[0].grads.dtype)
    single, tile = layers[0].grads.shape[1] == 1, tiles.WARPGROUP_PAIR_TILE
    ways = {"pipeline": True, "warpgroups": True}
    variant = scalings_variant(kind, tile, single, TWO, **ways)
    return scalings_launches(engine, variant, tile, layers, least)


# Steps are of 16 rows, or 32 of a half type; the pipeline comes round after four.
POSITIONS = [
    pytest.param(n, marks=[] if n in (1, 17) else pytest.mark.slow)
    for n in (0, 1, 2, 15, 16, 17, 32, 33, 64, 70, 129)
]


@pytest.mark.parametrize("positions", POSITIONS)
def test_scalings_by_warpgroups(
    engine: HostEngine, tensor_type: torch.dtype, positions: int
) -> None:
    """Edges, widths that are not even, blocks, old values, parts of sums."""
    if tensor_type != torch.float32 and positions == 1:
        pytest.skip("squares of half types would be rounded")
    engine.multiprocessors = 16
    wide = torch.randn(11, positions, 2, 152).to(tensor_type)
    others = torch.randn(11, positions, 1, 136).to(tensor_type)
    bank = torch.full((2, 66, 144), math.nan)
    layers = [
        Scalings(bank[:1, :, :131], wide[:, :, :1, 8:74], others[..., :131], 0.5),
        Scalings(torch.rand(2, 130, 33), wide[..., :130], others[..., 8:41], 1.0, 0.5),
    ]
    expected = [product_scalings(layer) for layer in layers]
    launches = scalings_by_warpgroups(engine, layers, 1)
    split = positions > 1
    assert len(launches) == 1 + split
    execute(engine, launches)
    for layer, image in zip(layers, expected, strict=True):
        assert_close(layer, image)
    assert bank[1].isnan().all()
    assert bank[..., 131:].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 2, 33])
def test_scalings_by_warpgroups_read_nothing_else(
    tensor_type: torch.dtype, positions: int
) -> None:
    """Every access is checked, of tensors that end with their last element."""
    if tensor_type != torch.float32 and positions == 1:
        pytest.skip("squares of half types would be rounded")
    engine = HostEngine(16, problems=TWO, checked=True)
    for d_out, d_in in ((2, 1), (4, 2), (66, 3), (128, 127), (130, 128), (254, 129)):
        g, a = (torch.randn(5, positions, 1, -(-d // 8) * 8) for d in (d_out, d_in))
        grads, inputs = g.to(tensor_type)[..., :d_out], a.to(tensor_type)[..., :d_in]
        layers = [Scalings(poison(1, d_out, d_in), grads, inputs)]
        single = Scalings(poison(1, d_out, d_in), grads[:1], inputs[:1], 2.0)
        layers += [single] * (positions > 1)
        expected = [product_scalings(layer) for layer in layers]
        execute(engine, scalings_by_warpgroups(engine, layers, 1))
        for layer, image in zip(layers, expected, strict=True):
            assert_close(layer, image)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [0, 1, 2, 3, 5, 40, 333])
@pytest.mark.parametrize("positions", [1, 40])
def test_scalings_by_warpgroups_of_any_number_of_examples(
    engine: HostEngine, tf32: None, positions: int, examples: int
) -> None:
    """None and fewer than steps that are loaded ahead; split, they repeat."""
    g, a = (
        torch.randn(examples, positions, 1, 8),
        torch.randn(examples, positions, 1, 5),
    )
    a = torch.nn.functional.pad(a, (0, 3))[..., :5]  # rows in chunks
    engine.multiprocessors = 8
    once, twice = (Scalings(poison(1, 8, 5), g, a) for _ in range(2))
    execute(engine, scalings_by_warpgroups(engine, [once]))
    execute(engine, scalings_by_warpgroups(engine, [twice]))
    assert_close(once, product_scalings(once))
    assert torch.equal(once.out, twice.out)


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 5])
def test_far_scalings_by_warpgroups(
    far: Callable[[Tensor], Tensor],
    engine: HostEngine,
    tensor_type: torch.dtype,
    positions: int,
) -> None:
    """Offsets of more than 32 bits, of examples and of positions."""
    if tensor_type != torch.float32 and positions == 1:
        pytest.skip("squares of half types would be rounded")
    g = far(torch.randn(2, positions, 1, 8).to(tensor_type))
    a = far(torch.randn(2, positions, 1, 40).to(tensor_type))
    pairs = [(g, a)]
    if positions > 1:
        pairs.append((g.transpose(0, 1), a.transpose(0, 1)))
    for grads, inputs in pairs:
        layer = Scalings(far(poison(2, 8, 40))[:1], grads, inputs)
        execute(engine, scalings_by_warpgroups(engine, [layer]))
        assert_close(layer, product_scalings(layer))


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 20])
def test_scalings_that_are_no_numbers_by_warpgroups(
    engine: HostEngine, tensor_type: torch.dtype, positions: int
) -> None:
    """They reach the rows and columns of their features, and no other."""
    if tensor_type != torch.float32 and positions == 1:
        pytest.skip("squares of half types would be rounded")
    g = torch.randn(9, positions, 1, 136).to(tensor_type)
    a = torch.randn(9, positions, 1, 136).to(tensor_type)
    g[7, 0, 0, 3], a[2, 0, 0, 132], a[2, 0, 0, 0] = math.nan, math.inf, math.nan
    layer = Scalings(poison(1, 136, 133), g, a[..., :133])
    execute(engine, scalings_by_warpgroups(engine, [layer]))
    expected = torch.zeros(136, 133, dtype=torch.bool)
    expected[3] = expected[:, [0, 132]] = True
    assert torch.equal(~layer.out[0].isfinite(), expected)


def test_scalings_by_warpgroups_are_for_even_gradients_on_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hopper, other = HostEngine(warpgroups=True), HostEngine()

    def chosen(
        engine: HostEngine, d_out: int, d_in: int, s: int, dtype: torch.dtype
    ) -> tuple[int, bool]:
        g, a = (
            torch.empty(8, s, 1, -(-d // 8) * 8, dtype=dtype) for d in (d_out, d_in)
        )
        layer = Scalings(torch.empty(1, d_out, d_in), g[..., :d_out], a[..., :d_in])
        variant, tile = scalings_choice(engine, layer)
        geometry = tiles.Geometry.of(variant)
        assert geometry.tile == tile
        assert (geometry.resident == 1) == variant.warpgroups
        return tile, variant.warpgroups

    assert chosen(hopper, 768, 769, 64, torch.float32) == (128, False)
    monkeypatch.setattr(tiles, "uses_tf32", lambda: True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert chosen(hopper, 768, 769, 64, dtype) == (128, True)
        assert chosen(other, 768, 769, 64, dtype) == (128, False)
        assert chosen(hopper, 767, 768, 64, dtype) == (128, False)
        assert chosen(hopper, 64, 64, 64, dtype) == (64, False)
        assert chosen(hopper, 64, 1024, 64, dtype) == (128, True)
        assert chosen(other, 64, 1024, 64, dtype) == (64, False)
        single = chosen(hopper, 768, 769, 1, dtype)
        assert single == (128, dtype == torch.float32)


def test_which_layers_are_pipelined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on tensor cores whose features lie in aligned chunks of 16 bytes."""
    monkeypatch.setattr(tiles, "uses_tf32", lambda: True)
    wide, own = torch.randn(4, 3, 2, 48), HostEngine()
    image = torch.randn(2, 8, 5, 6)
    conv = Convolution((1, 3, 3), (1, 1, 1), (1, 1, 1), (0, 1, 1), (1, 5, 6))
    last = with_depth(image.contiguous(memory_format=torch.channels_last))
    expected = [
        (wide, None, True),
        (wide.bfloat16(), None, True),
        (wide[..., 3:], None, False),  # starts between chunks
        (wide[..., 4:], None, True),
        (wide.bfloat16()[..., 4:], None, False),
        (wide[..., ::2], None, False),  # features apart
        (wide.transpose(1, 3), None, False),
        (torch.randn(4, 3, 2, 47), None, False),  # rows start between chunks
        (wide[..., :47], None, True),
        (last, conv, True),
        (last[:, :4], conv, True),
        (last.bfloat16()[:, :4], conv, False),  # chunks of two taps
        (with_depth(image), conv, False),  # channels first
    ]
    for x, how, yes in expected:
        b, d = (1, how.features(x.shape[1])) if how else x.shape[2:]
        gram = Gram(poison(b, d, d), x, conv=how)
        variant, _ = gram_choice(own, gram)
        assert bool(dict(variant.defines).get("PIPELINE")) == yes, (x.shape, how)
    monkeypatch.setattr(tiles, "uses_tf32", lambda: False)
    variant, _ = gram_choice(own, Gram(poison(2, 48, 48), wide))
    assert "PIPELINE" not in dict(variant.defines)


def test_a_bias_costs_a_pipeline_no_tiles() -> None:
    own = HostEngine(132)
    for width, count in ((768, 21), (769, 28)):
        rows = torch.empty(1, 1, 1, 784).bfloat16()[..., :width]
        gram = Gram(torch.empty(1, width + 1, width + 1), rows, bias=True)
        (one,) = plan_grams(own, [gram])
        assert one.grid == count


@pytest.mark.parametrize("count", [1, 8, 132])
def test_sums_are_split_into_whole_waves(count: int) -> None:
    """Against all other lengths of parts, and never into more than memory is for."""
    own = HostEngine(count)
    slots = count * launch.RESIDENT
    for tiles_, steps in [([21], [256]), ([3, 21, 300], [100, 5000, 30]), ([1], [0])]:
        found = split_sums(own, tiles_, steps)
        for (parts, share), length in zip(found, steps, strict=True):
            assert parts * share >= length > (parts - 1) * share or length == 0

        def duration(length: int, tiles_: list[int], steps: list[int]) -> float:
            parts = [max(1, -(-s // length)) for s in steps]
            items = sum(t * n for t, n in zip(tiles_, parts, strict=True))
            if items > sum(tiles_) + launch.MORE * slots:
                return math.inf
            waves = -(-items // slots)
            return waves * (min(length, max(steps)) + launch.STARTING)

        taken = max(max(share for _, share in found), 1)
        every = range(launch.MIN_STEPS, max(steps) + 1)
        best = min((duration(n, tiles_, steps) for n in every), default=launch.STARTING)
        assert duration(taken, tiles_, steps) <= max(best, launch.STARTING + 1) * 1.1


CONVOLUTIONS = [
    (torch.nn.Conv1d(5, 4, 3, stride=2, padding=1), (9,)),
    (torch.nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), (5, 6)),
    (torch.nn.Conv2d(4, 4, (3, 2), (2, 1), (2, 0), (1, 2), groups=4), (6, 5)),
    (torch.nn.Conv2d(8, 4, 1), (3, 4)),
    (torch.nn.Conv3d(3, 2, (2, 3, 1), (1, 2, 1), (1, 1, 0)), (3, 5, 4)),
]


@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "-last"])
@pytest.mark.parametrize(("layer", "size"), CONVOLUTIONS, ids=str)
def test_patches_are_those_of_torch(
    engine: HostEngine, layer: torch.nn.Conv2d, size: tuple[int, ...], last: bool
) -> None:
    """The patches are read off the convolution itself, with unit kernels."""
    x = torch.randn(3, layer.in_channels, *size)
    own, taps = layer.in_channels // layer.groups, math.prod(layer.kernel_size)
    d = own * taps
    units = torch.eye(d).reshape(d, own, *layer.kernel_size)
    weight = units.repeat(layer.groups, *[1] * (units.dim() - 1))
    function = getattr(torch.nn.functional, f"conv{len(size)}d")
    image = function(
        x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    positions = tuple(image.shape[2:])
    patches = image.reshape(3, layer.groups, d, -1).permute(0, 3, 1, 2)
    conv = Convolution(
        layer.kernel_size,
        layer.stride,
        layer.dilation,
        layer.padding,
        positions,
        layer.groups,
    )
    if last and len(size) > 1:
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(size)])
    width = d + (layer.bias is not None)
    gram = Gram(
        poison(layer.groups, width, width),
        with_depth(x),
        torch.rand(3, math.prod(positions)),
        bias=layer.bias is not None,
        conv=conv.in_three(),
    )
    assert gram.supported()
    execute(engine, plan_grams(engine, [gram]))
    assert relative_error(gram.out, exact_gram(gram, patches)) < TOLERANCE


@pytest.mark.parametrize("positions", [1, 2, 17, 33])
def test_scalings_are_squares_of_example_gradients(
    engine: HostEngine, positions: int
) -> None:
    if positions == 1:
        compile_together([scalings_variant(FLOAT, 64, True, TWO)])
    g, a = torch.randn(7, positions, 2, 33), torch.randn(7, positions, 1, 31)
    old = torch.rand(2, 33, 31)
    layer = Scalings(old.clone(), g, a, 0.5, 2.0)
    more = Scalings(poison(1, 1, 65), g[:, :, :1, :1], torch.randn(7, positions, 1, 65))
    execute(engine, plan_scalings(engine, [layer, more]))
    for one, before in ((layer, 2 * old), (more, 0)):
        expected = torch.zeros(one.out.shape, dtype=torch.float64) + before
        for n in range(7):
            for b in range(one.out.shape[0]):
                single = one.grads[n, :, b].double().T @ one.inputs[n, :, 0].double()
                expected[b] += one.alpha * single.square()
        assert relative_error(one.out, expected) < TOLERANCE


def test_diagonals(engine: HostEngine) -> None:
    images = torch.randn(5, 40, 2, 30).permute(0, 3, 2, 1)
    chosen = [
        Gram(poison(1, 34), torch.randn(1000, 1, 1, 33), bias=True),
        Gram(poison(2, 40), images, torch.rand(5, 30), 3.0),
        Gram(torch.ones(1, 129), torch.randn(31, 1, 1, 129), beta=0.5),
    ]
    engine.multiprocessors = 16
    execute(engine, plan_diagonals(engine, chosen))
    assert "diagonal_finish" in engine.launched
    for gram in chosen:
        expected = exact_gram(gram).diagonal(dim1=-2, dim2=-1) + gram.beta
        assert relative_error(gram.out, expected) < TOLERANCE


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_preconditioning_and_its_sums(engine: HostEngine, power: float) -> None:
    shapes = [(1, 33, 129), (2, 31, 1), (1, 70, 65)]
    layers, expected = [], []
    for shape in shapes:
        u, s = torch.randn(shape), torch.randn(shape).square()
        s[0, 0] = 0
        layers.append(Preconditioned(u, s, torch.tensor(0.0)))
        damped = s.double()
        image = torch.where(damped > 0, u.double() * damped.pow(power), 0.0)
        expected.append((image, (image**2 * damped).sum(), (image**2).sum()))
    sums = poison(3, 2)
    execute(engine, plan_precondition(engine, layers, sums, power))
    for layer, found, (image, form, norm) in zip(layers, sums, expected, strict=True):
        assert relative_error(layer.projected, image) < TOLERANCE
        assert relative_error(found, torch.stack([form, norm])) < 1e-5


def test_running_averages_and_their_sums(engine: HostEngine) -> None:
    shapes = [(1, 33, 129), (2, 31, 1), (1, 70, 65)]
    s, u = ([torch.rand(shape) for shape in shapes] for _ in range(2))
    bank = torch.full((2, 33, 144), math.nan)
    s[0] = bank[:1, :, :129].copy_(s[0])
    u[1].fill_(math.nan)
    scales = torch.tensor([[0.9, 0.2], [0.5, 0.0], [1.0, 3.0]])
    expected = [
        keep * x.double() + (rate * y.double().square() if rate else 0)
        for x, y, (keep, rate) in zip(s, u, scales.double(), strict=True)
    ]
    sums = poison(3)
    layers = [Squares(*column) for column in zip(s, u, scales, strict=True)]
    assert all(layer.supported(engine) for layer in layers)
    execute(engine, plan_squares(engine, layers, sums))
    for found, image, total in zip(s, expected, sums, strict=True):
        assert relative_error(found, image) < TOLERANCE
        assert relative_error(total, image.sum()) < TOLERANCE
    assert bank[1].isnan().all()
    assert bank[..., 129:].isnan().all()


@pytest.mark.parametrize("size", [1, 31, 1025])
def test_counts(engine: HostEngine, size: int) -> None:
    index = torch.randint(0, size, (40, 60))
    half = torch.rand(40, 60).round()
    chosen = [
        Counts(poison(1, size), index),
        Counts(torch.ones(1, size), index[:, ::3].int(), half[:, ::3], 0.5, 2.0),
        Counts(poison(1, size), index[:0]),
        Counts(poison(1, 0), index),
        Counts(poison(1, size), index.t(), half.t() / 3),
    ]
    assert all(one.supported() for one in chosen)
    execute(engine, plan_counts(engine, chosen))
    once = torch.bincount(index.flatten(), minlength=size)
    assert torch.equal(chosen[0].out[0], once.float())  # whole numbers, exactly
    third = torch.bincount(index[:, ::3].flatten(), half[:, ::3].flatten(), size)
    assert torch.equal(chosen[1].out[0], 2 + 0.5 * third.float())
    assert torch.equal(chosen[2].out, torch.zeros(1, size))
    weighed = torch.bincount(index.flatten(), half.flatten().double() / 3, size)
    assert relative_error(chosen[4].out[0], weighed) < TOLERANCE


@pytest.mark.parametrize("size", [2, 7, 16, 33])
def test_jacobi(engine: HostEngine, size: int) -> None:
    x = torch.randn(3, size, size // 2 + 1)  # of half rank: many equal eigenvalues
    matrices = x @ x.transpose(-1, -2)
    work, vectors = matrices.clone(), poison(3, size, size)
    execute(engine, plan_jacobi(work, vectors))
    values = work.diagonal(dim1=-2, dim2=-1).sort(dim=-1).values
    expected = torch.linalg.eigvalsh(matrices.double())
    assert float((values - expected).abs().max() / expected.max()) < 1e-5
    wide = vectors.double()
    rotated = wide.transpose(-1, -2) @ matrices.double() @ wide
    off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert float(off.norm() / rotated.norm()) < 1e-5
    skew = wide.transpose(-1, -2) @ wide - torch.eye(size)
    assert float(skew.abs().max()) < 1e-5


def spectra(size: int) -> dict[str, Tensor]:
    """Return eigenvalues that Jacobi's method may find hard."""
    tail = torch.full((size - 3,), 1e-3)
    return {
        "flat": torch.linspace(0.3, 1, size),
        "decaying": torch.logspace(0, -6, size),
        "near the identity": 1 + 1e-6 * torch.rand(size),
        "low rank": torch.cat([torch.tensor([3.0, 2.0, 2.0]), 0 * tail]),
        "clusters": torch.cat([torch.tensor([1.0, 1.0, 0.5]), tail]),
    }


@pytest.mark.parametrize("size", [97, 127, 128])
def test_jacobi_holds_its_residual_up_to_the_largest(size: int) -> None:
    """Ten times below what is allowed, in float64: rounding does not add up."""
    engine = HostEngine(2)
    exact = []
    for values in spectra(size).values():
        q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
        exact.append((q * values.double()) @ q.mT)
    matrices = torch.stack(exact).float()
    work, vectors = matrices.clone(), poison(*matrices.shape)
    execute(engine, plan_jacobi(work, vectors))
    values = work.diagonal(dim1=-2, dim2=-1).double()
    found = decomposition.residuals(matrices.double(), values, vectors.double())
    assert float(found.max()) < decomposition.rounding(matrices) / 10


def polar_by_svd(matrices: Tensor, steps: int) -> Tensor:
    """Return the steps' polynomials of the singular values, in float64."""
    U, S, V = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = S / S.pow(8).sum(dim=-1, keepdim=True).pow(1 / 8)
    for a, b, c in COEFFICIENTS[steps]:
        values = a * values + b * values**3 + c * values**5
    return (U * values.unsqueeze(-2)) @ V


def spectral_by_svd(layer: Spectral, steps: int) -> tuple[Tensor, Tensor]:
    """Return ``r o polar(r o u)`` and its two sums, in float64."""
    weight, damping = layer.scale.double()
    damped = layer.scalings.double() / weight + damping
    root = damped.rsqrt()
    image = root * polar_by_svd(root * layer.projected.double(), steps)
    return image, torch.stack([(image**2 * damped).sum(), (image**2).sum()])


def spectral_layer(*shape: int, damping: float = 0.1) -> Spectral:
    b, m, n = shape
    bank = torch.full((b, m, n + 3), math.nan)  # rows that are not neighbours
    u = bank[..., :n].copy_(torch.randn(shape))
    s = torch.randn(shape).square() * 10 ** (2 * torch.rand(shape) - 1)
    return Spectral(u, s, torch.tensor([0.5, damping]))


@pytest.mark.parametrize("steps", sorted(COEFFICIENTS))
def test_spectral_directions_of_a_list(engine: HostEngine, steps: int) -> None:
    """Wide, tall, square, of several blocks, of every variant; two layers a launch."""
    shapes = [(1, 9, 50), (3, 20, 11), (1, 33, 34), (2, 32, 32), (1, 70, 65)]
    shapes += [(1, 65, 130)] if steps == 3 else []
    layers = [spectral_layer(*shape) for shape in shapes]
    expected = [spectral_by_svd(layer, steps) for layer in layers]
    sums = poison(len(layers), 2)
    assert all(layer.supported(engine) for layer in layers)
    execute(engine, plan_spectral(engine, layers, sums, steps, True))
    assert len(engine.launched) < 2 * len(layers)
    for layer, own, (image, both) in zip(layers, sums, expected, strict=True):
        assert relative_error(layer.projected, image) < 1e-5
        assert relative_error(own, both) < 1e-5
        around = layer.projected.as_strided((3,), (1,), layer.projected.shape[2])
        assert around.isnan().all()


def test_spectral_directions_of_zero_low_rank_and_no_numbers(
    engine: HostEngine,
) -> None:
    """As the reference: nothing stays nothing, and one NaN is the whole matrix."""
    zero, broken, infinite = (spectral_layer(1, 12, 17) for _ in range(3))
    zero.projected.zero_()
    broken.projected[0, 3, 4] = math.nan
    infinite.projected[0, 0, 0] = math.inf
    thin = spectral_layer(1, 40, 20)
    left, right = torch.randn(40, 3), torch.randn(3, 20)
    thin.projected.copy_(left @ right / (thin.scalings / 0.5 + 0.1).rsqrt())
    layers = [zero, broken, infinite, thin]
    wide = [
        Spectral(x.projected.double(), x.scalings.double(), x.scale.double())
        for x in layers
    ]
    expected = spectral_reference_(wide, 3, True)
    sums = poison(4, 2)
    execute(engine, plan_spectral(engine, layers, sums, 3, True))
    assert torch.equal(zero.projected, torch.zeros(1, 12, 17))
    assert broken.projected.isnan().all()
    assert infinite.projected.isnan().all()
    assert relative_error(thin.projected, wide[3].projected) < 1e-4
    assert torch.equal(sums[:3].isnan(), expected[:3].isnan())


def test_what_a_block_cannot_hold_is_left_to_torch() -> None:
    """By the shared memory of the device: of an A100, and of a 4090."""
    large, small = HostEngine(), HostEngine()
    large.shared, small.shared = 163 << 10, 99 << 10
    fits = {
        (1, 128, 128): (True, False),
        (1, 128, 200): (False, False),
        (1, 64, 257): (True, True),
        (1, 512, 64): (True, False),
        (1, 129, 129): (False, False),
    }
    for shape, expected in fits.items():
        layer = Spectral(torch.empty(shape), torch.empty(shape), torch.empty(2))
        assert (layer.supported(large), layer.supported(small)) == expected
        if expected[0]:
            (first, _) = plan_spectral(large, [layer], torch.empty(1, 2), 3, True)
            assert first.shared <= large.shared


@pytest.mark.parametrize("fastest", ["torch", "kernel"])
def test_lists_of_small_and_large_layers(
    monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    """What is too large is done by torch, in the same call; sums keep their order."""
    cache = KernelCache(HostEngine(problems=TWO))
    monkeypatch.setattr(cache, "fastest", lambda *_: fastest)
    monkeypatch.setattr(dispatch, "kernel_cache", lambda _: cache)
    shapes = [(1, 20, 33), (1, 130, 140), (1, 20, 33), (1, 50, 40)]
    layers = [spectral_layer(*shape) for shape in shapes]
    expected = [spectral_by_svd(layer, 3) for layer in layers]
    sums = torch.ops.ekfac.spectral_(
        [layer.projected for layer in layers],
        [layer.scalings for layer in layers],
        torch.stack([layer.scale for layer in layers]),
        3,
        True,
    )
    for layer, own, (image, both) in zip(layers, sums, expected, strict=True):
        assert relative_error(layer.projected, image) < 1e-5
        assert relative_error(own, both) < 1e-5
    assert (cache.used["spectral"] > 0) == (fastest == "kernel")


class Wrong(HostEngine):
    """Forgets to launch."""

    def launch(self, one: Launch) -> None:
        self.launched.append("nothing")


class Refused(HostEngine):
    """Compiles nothing."""

    def load(self, variant: Variant) -> None:
        raise RuntimeError("gram.cu(7): error: expected a ';'")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("kind", "words"), [(Wrong, "off by"), (Refused, "a ';'")])
def test_kernels_that_fail_are_not_used_and_said_once(
    kind: type[HostEngine], words: str
) -> None:
    cache = KernelCache(kind(problems=TWO))
    gram = Gram(torch.ones(1, 5, 5), torch.randn(4, 1, 1, 5), beta=1.0)
    launches = plan_grams(cache.engine, [gram])
    with pytest.warns(EkfacWarning, match=words) as caught:
        assert not cache.run(launches)
    assert len(caught) == 1
    assert not cache.run(launches)  # an unexpected warning would be an error
    assert torch.equal(gram.out, torch.ones(1, 5, 5))
    assert not cache.verified
    assert list(cache.broken) == [launches[0].variant]


def test_the_cache_tries_kernels_once() -> None:
    cache = KernelCache(HostEngine(problems=TWO))
    gram = Gram(poison(1, 5, 5), torch.randn(4, 1, 1, 5))
    launches = plan_grams(cache.engine, [gram])
    assert cache.run(launches)
    before = len(cache.engine.launched)
    assert cache.run(launches)
    assert len(cache.engine.launched) == before + len(launches)
    assert cache.used["gram"] == 2


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setenv("EKFAC_KERNELS", "reference")
    assert dispatch.why_unavailable(device) == "EKFAC_KERNELS=reference"
    monkeypatch.setenv("EKFAC_KERNELS", "never")
    with pytest.raises(ValueError, match="'never' is not one of"):
        dispatch.mode()
    monkeypatch.delenv("EKFAC_KERNELS")
    assert "not a CUDA device" in str(dispatch.why_unavailable(torch.device("cpu")))


class Net(torch.nn.Module):
    """Convolutions of which one is strided and one grouped, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = torch.nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.flatten(1))


@pytest.mark.parametrize("scaling", ["per_example", "running_average"])
@pytest.mark.parametrize("max_dim", [8192, 20], ids=["dense", "diagonal"])
def test_the_optimizer_gets_the_same_from_the_kernels(
    monkeypatch: pytest.MonkeyPatch, max_dim: int, scaling: str
) -> None:
    """Three steps of EKFAC with every launch on the CPU, against PyTorch's operations.

    The parameters stay: where a direction was never seen, steps magnify rounding.
    """
    results, directions, cache = [], [], KernelCache(HostEngine(problems=TWO))
    compile_together([scalings_variant(FLOAT, 64, True, TWO)])
    for kernels_used in (False, True):
        if kernels_used:
            monkeypatch.setattr(operators, "applies", lambda _: True)
            monkeypatch.setattr(dispatch, "kernel_cache", lambda _: cache)
            monkeypatch.setattr(eigenbasis, "available", lambda _: True)
        torch.manual_seed(0)
        model = Net()
        options = {"scaling": scaling, "basis_interval": 2, "max_dim": max_dim}
        options |= {"direction": "natural"}
        optimizer = EKFAC(model, 0.0, kl_clip=1.0, **options)
        moved: list[list[Tensor]] = []
        monkeypatch.setattr(
            update, "apply_", lambda *args, to=moved: to.append(args[2])
        )
        for _ in range(3):
            optimizer.zero_grad()
            x, y = torch.randn(24, 3, 7, 7), torch.randint(5, (24,))  # full rank
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        results.append(
            {name: la.state_dict() for name, la in optimizer.curvature.items()}
        )
        directions.append(torch.cat([m.flatten() for m in moved[-1]]))
    launched = {name for name in cache.used if not name.endswith("_finish")}
    per_example = scaling == "per_example"
    assert {"gram", "precondition", "squares"} <= launched
    assert ("scalings" in launched) == per_example
    assert ("diagonal" in launched) == (max_dim < 100)
    assert max_dim < 100 or any("patches" in str(v) for v in cache.verified)
    for name, expected in results[0].items():
        for key in ("A", "G"):
            found = results[1][name][key]
            assert relative_error(found, expected[key].double()) < 1e-5
        total = expected["s"].double().sum()
        assert relative_error(results[1][name]["s"].sum(), total) < 1e-3
    # Factors agree to 1e-5; a damping of 0.03 lets that grow thirtyfold.
    assert relative_error(directions[1], directions[0].double()) < 1e-3


def test_spectral_steps_get_the_same_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers of three shapes, one of them too large for a block of threads."""
    cache, moved = KernelCache(HostEngine(problems=TWO)), []
    monkeypatch.setattr(update, "apply_", lambda *args: moved.append(args[2]))
    for kernels_used in (False, True):
        if kernels_used:
            monkeypatch.setattr(dispatch, "kernel_cache", lambda _: cache)
            monkeypatch.setattr(eigenbasis, "available", lambda _: True)
        torch.manual_seed(0)
        widths = (140, 150, 20, 12, 20, 12, 10)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        model = torch.nn.Sequential(*layers, torch.nn.Tanh())
        optimizer = EKFAC(model, 0.0, direction="spectral")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(300, 140)).square().sum(dim=1).mean().backward()
            optimizer.step()
    assert cache.used["spectral"] > 0
    reference, launched = moved[1], moved[3]
    for expected, own in zip(reference, launched, strict=True):
        assert relative_error(own, expected.double()) < 1e-3
