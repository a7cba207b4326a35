"""The kernels on a CUDA device: right, clean, capturable, without waiting.

One command: ``python -m pytest -m gpu tests/test_gpu_kernels.py -s``.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ekfac import kernels
from ekfac.kernels import decomposition
from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.cuda import compiler, dispatch, kernel
from ekfac.kernels.cuda.diagonal import diagonal_reference_
from ekfac.kernels.cuda.dispatch import KernelCache
from ekfac.kernels.cuda.gram import Gram, gram_reference_
from ekfac.kernels.cuda.precondition import Preconditioned, precondition_reference_
from ekfac.kernels.cuda.scalings import Scalings, scalings_reference_
from ekfac.kernels.cuda.spectral import Spectral, spectral_reference_
from ekfac.kernels.cuda.squares import Squares, squares_reference_

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning"),
]
OPS = torch.ops.ekfac
CUDA = torch.device("cuda")
# Relative errors: float32 sums; ten bits of mantissa; products of half types are exact.
TOLERANCE = {"float32": 1e-5, "tf32": 2e-3, "bfloat16": 1e-5, "float16": 1e-5}
TYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("EKFAC_KERNELS", "own")  # whatever is faster
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # fresh inputs
    print(f"seed {torch.initial_seed()}")
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def cache() -> KernelCache:
    """Return the device's kernels, which there must be."""
    found = dispatch.kernel_cache(CUDA)
    assert found is not None, dispatch.why_unavailable(CUDA)
    return found


def poison(*shape: int) -> Tensor:
    return torch.full(shape, math.nan, device=CUDA)


def launched(cache: KernelCache, call: Callable[[], object], kernel: str) -> None:
    """Call, and make sure that it was no reference that answered."""
    before = cache.used[kernel]
    call()
    assert cache.used[kernel] > before


@pytest.mark.parametrize("problems", [compiler.FEW, compiler.MANY])
def test_every_variant(cache: KernelCache, problems: int) -> None:
    if problems > cache.engine.problems:
        pytest.skip("the driver takes no more than 4 KiB of parameters")
    for variant in dispatch.every_variant(problems):
        if variant.warpgroups and not cache.engine.warpgroups:
            continue
        cache.engine.load(variant)
        if problems == cache.engine.problems:
            error = dispatch.error_of(cache.engine, variant)
            print(f"{variant}: {error:.1e}")
            assert error <= kernel.tolerance(variant), variant


def gram_list(dtype: torch.dtype) -> list[Gram]:
    """Return ragged layers of every layout."""

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, device=CUDA).to(dtype)

    sizes = [1, 31, 33, 64, 129, 768, 1000]
    chosen = [Gram(poison(1, d, d), rows(257, 2, 1, d)) for d in sizes]
    weight = torch.rand(9, 33, device=CUDA).round()
    images = rows(9, 2, 40, 33).permute(0, 3, 1, 2)
    chosen += [
        Gram(poison(2, 41, 41), images, weight, 0.5, bias=True),
        Gram(poison(1, 3, 3), rows(300_000, 1, 1, 3)),
        Gram(poison(1, 70, 70), rows(50, 4, 2, 80)[:, ::2, 1:, 3:73], bias=False),
        Gram(poison(1, 5, 5), rows(0, 1, 1, 5)),
    ]
    return chosen * 2 + [
        Gram(torch.ones(1, 8, 8, device=CUDA), rows(5, 1, 1, 8), None, 1.0, 0.5)
    ]


def patch_list(dtype: torch.dtype) -> list[Gram]:
    """Return convolutions of every kind."""
    result = []
    for conv, shape, bias in [
        (Convolution((3,), (2,), (1,), (1,), (50,)), (7, 20, 99), True),
        (Convolution((3, 3), (1, 1), (1, 1), (1, 1), (32, 32)), (8, 64, 32, 32), False),
        (Convolution((3, 3), (2, 2), (1, 1), (1, 1), (7, 7), 4), (9, 32, 14, 14), True),
        (Convolution((2, 3), (1, 2), (2, 1), (0, 2), (9, 6), 8), (5, 8, 11, 10), True),
        (Convolution((1, 1), (2, 2), (1, 1), (0, 0), (8, 8)), (4, 128, 16, 16), False),
        (
            Convolution((7, 7), (2, 2), (1, 1), (3, 3), (56, 56)),
            (3, 3, 112, 112),
            False,
        ),
        (
            Convolution((3, 3, 3), (1, 1, 2), (1, 1, 1), (1, 1, 1), (4, 5, 3)),
            (2, 6, 4, 5, 6),
            True,
        ),
    ]:
        x = torch.randn(shape, device=CUDA).to(dtype)
        layouts = [x]
        if x.dim() == 4:
            layouts.append(x.contiguous(memory_format=torch.channels_last))
        for one in layouts:
            width = conv.features(shape[1]) + bias
            out = poison(conv.groups, width, width)
            deep = with_depth(one)
            result.append(Gram(out, deep, None, 1.0, 0.0, bias, conv.in_three()))
    return result


def call_grams(chosen: list[Gram]) -> None:
    """Call the operator for a list."""
    columns = zip(
        *((g.out, g.x, g.weight, g.alpha, g.beta, g.bias) for g in chosen), strict=True
    )
    outs, rows, weights, alphas, betas, biases = map(list, columns)
    if chosen[0].conv is None:
        OPS.gram_(outs, rows, weights, alphas, betas, biases)
    else:
        flat = [n for g in chosen if g.conv is not None for n in g.conv.flat()]
        OPS.patch_gram_(outs, rows, weights, flat, alphas, betas, biases)


def wide(gram: Gram, out: Tensor) -> Gram:
    """Return the same in float64."""
    weight = None if gram.weight is None else gram.weight.double()
    return Gram(
        out, gram.x.double(), weight, gram.alpha, gram.beta, gram.bias, gram.conv
    )


@pytest.mark.parametrize("kind", list(TYPES))
@pytest.mark.parametrize("make", [gram_list, patch_list])
def test_gram(
    cache: KernelCache, make: Callable[[torch.dtype], list[Gram]], kind: str
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    chosen = make(TYPES[kind])
    before = [gram.out.double() for gram in chosen]
    launched(cache, lambda: call_grams(chosen), "gram")
    for gram, old in zip(chosen, before, strict=True):
        expected = old.clone()
        gram_reference_(wide(gram, expected))
        assert torch.equal(gram.out, gram.out.transpose(-1, -2))
        error = float((gram.out - expected).norm())
        assert error <= TOLERANCE[kind] * float(expected.norm()), gram.x.shape
    again = [Gram(poison(*g.out.shape), *vars_of(g)) for g in chosen if not g.beta]
    call_grams(again)
    for first, second in zip((g for g in chosen if not g.beta), again, strict=True):
        assert torch.equal(first.out, second.out)  # repeats bit by bit


def vars_of(gram: Gram) -> tuple[object, ...]:
    """Return everything but the result."""
    return (gram.x, gram.weight, gram.alpha, gram.beta, gram.bias, gram.conv)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_diagonal_gram(cache: KernelCache, kind: str) -> None:
    chosen = [g for g in gram_list(TYPES[kind]) if not g.beta]
    outs = [poison(*gram.out.shape[:2]) for gram in chosen]
    count = len(chosen)
    arguments = (
        [g.x for g in chosen],
        [g.weight for g in chosen],
        [1.0] * count,
        [0.0] * count,
        [g.bias for g in chosen],
    )
    launched(cache, lambda: OPS.diagonal_gram_(outs, *arguments), "diagonal")
    for gram, out in zip(chosen, outs, strict=True):
        expected = out.double()
        one = wide(gram, expected)
        diagonal_reference_(Gram(expected, one.x, one.weight, bias=one.bias))
        assert float((out - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("kind", ["float32", "tf32"])
@pytest.mark.parametrize("positions", [1, 2, 49, 100])
def test_scalings(cache: KernelCache, kind: str, positions: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    shapes = [(1, 1, 1), (2, 31, 129), (1, 33, 1000), (1, 257, 64)]
    layers = []
    for b, d_out, d_in in shapes:
        g = torch.randn(37, positions, b, d_out, device=CUDA)
        a = torch.randn(37, positions, 1, d_in, device=CUDA)
        layers.append(Scalings(poison(b, d_out, d_in), g, a, 0.5))
    columns = ([la.out for la in layers], [la.grads for la in layers])
    inputs, count = [la.inputs for la in layers], len(layers)

    def call() -> None:
        OPS.scalings_(*columns, inputs, [0.5] * count, [0.0] * count)

    launched(cache, call, "scalings")
    for layer in layers:
        expected = layer.out.double()
        scalings_reference_(
            Scalings(expected, layer.grads.double(), layer.inputs.double(), 0.5)
        )
        error = float((layer.out - expected).norm())
        assert error <= 2 * TOLERANCE[kind] * float(expected.norm())


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_precondition(cache: KernelCache, power: float) -> None:
    shapes = [(1, 33, 129), (2, 31, 1), (1, 1000, 1001)] * 7
    u = [torch.randn(shape, device=CUDA) for shape in shapes]
    s = [torch.rand(shape, device=CUDA) for shape in shapes]
    damping = torch.rand(len(shapes), device=CUDA)
    expected = [x.double() for x in u]
    sums: list[Tensor] = []
    launched(
        cache,
        lambda: sums.append(OPS.precondition_(u, s, damping, power)),
        "precondition",
    )
    columns = zip(u, expected, s, damping, sums[0], strict=True)
    for found, exact, scale, add, pair in columns:
        layer = Preconditioned(exact, scale.double(), add.double())
        both = precondition_reference_(layer, power)
        assert float((found - exact).norm()) <= 1e-5 * float(exact.norm())
        assert torch.allclose(pair.double(), both, rtol=1e-5)


@pytest.mark.parametrize("steps", [3, 5])
def test_spectral(cache: KernelCache, steps: int) -> None:
    """Small layers by the kernel, one that no block holds by torch, in one call."""
    shapes = [(1, 9, 50), (3, 20, 11), (1, 64, 64), (1, 128, 100), (1, 300, 257)] * 4
    u = [torch.randn(shape, device=CUDA) for shape in shapes]
    s = [torch.rand(shape, device=CUDA) for shape in shapes]
    scales = torch.rand(len(shapes), 2, device=CUDA) + 0.1
    exact = [
        Spectral(x.double(), y.double(), z.double())
        for x, y, z in zip(u, s, scales, strict=True)
    ]
    sums: list[Tensor] = []

    def call() -> None:
        sums.append(OPS.spectral_(u, s, scales, steps, True))

    launched(cache, call, "spectral")
    expected = spectral_reference_(exact, steps, True)
    for found, wide in zip(u, exact, strict=True):
        error = float((found - wide.projected).norm())
        assert error <= 1e-4 * float(wide.projected.norm())
    assert torch.allclose(sums[0].double(), expected, rtol=1e-4)


def test_squares(cache: KernelCache) -> None:
    shapes = [(1, 33, 129), (2, 31, 1), (1, 1000, 1001)] * 7
    s = [torch.rand(shape, device=CUDA) for shape in shapes]
    u = [torch.randn(shape, device=CUDA) for shape in shapes]
    scales = torch.rand(len(shapes), 2, device=CUDA)
    scales[1, 1] = 0
    u[1].fill_(math.nan)
    wide = [
        Squares(x.double(), y.double(), z.double())
        for x, y, z in zip(s, u, scales, strict=True)
    ]
    sums: list[Tensor] = []
    launched(cache, lambda: sums.append(OPS.squares_(s, u, scales)), "squares")
    for found, exact, total in zip(s, wide, sums[0], strict=True):
        expected = squares_reference_(exact)
        error = float((found - exact.scalings).norm())
        assert error <= 1e-5 * float(exact.scalings.norm())
        assert torch.allclose(total.double(), expected, rtol=1e-5)


def test_index_counts(cache: KernelCache) -> None:
    """Exact for whole numbers, and the same every time for others."""
    sizes = [1, 31, 1025, 50_257] * 5
    indices = [torch.randint(0, size, (64, 512), device=CUDA) for size in sizes]
    indices[1] = indices[1].t()
    indices[2] = indices[2].int()
    weights = [None, torch.rand(512, 64, device=CUDA), None, None] * 5
    weights = [w if i == 1 else None for i, w in enumerate(weights)]

    def call() -> list[Tensor]:
        outs = [poison(1, size) for size in sizes]
        scalars = ([1.0] * len(sizes), [0.0] * len(sizes))
        OPS.index_counts_(outs, indices, weights, *scalars)
        return outs

    found: list[Tensor] = []
    launched(cache, lambda: found.extend(call()), "counts")
    for number, (out, index) in enumerate(zip(found, indices, strict=True)):
        weight = weights[number]
        flat = None if weight is None else weight.double().flatten()
        expected = torch.bincount(index.flatten(), flat, out.numel()).double()
        if weight is None:
            assert torch.equal(out[0].double(), expected)
        else:
            assert float((out[0] - expected).norm()) <= 1e-6 * float(expected.norm())
    assert all(map(torch.equal, found, call()))


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_old_bases_are_followed(size: int) -> None:
    """What is off the diagonal in the new basis, and its orthogonality."""
    scale = torch.logspace(0, -2, size, device=CUDA)
    directions = torch.linalg.qr(torch.randn(5, size, size, device=CUDA)).Q * scale
    factors = []
    for _ in range(2):
        x = directions @ torch.randn(5, size, 3 * size, device=CUDA)
        factors.append(x @ x.mT / (3 * size))
    new = 0.75 * factors[0] + 0.25 * factors[1]
    basis = torch.linalg.eigh(factors[0]).eigenvectors
    assert decomposition.follows(new, 0.005)
    found = decomposition.iterated(new, basis, bound=0.005)
    assert found is not None
    wide = found[1].double()
    rest = wide.mT @ new.double() @ wide - torch.diag_embed(found[0].double())
    off = rest.norm(dim=(-2, -1)) / new.double().norm(dim=(-2, -1))
    skew = float(decomposition.skew(wide).max())
    print(f"{size}: off the diagonal {float(off.max()):.1e}, skew {skew:.1e}")
    assert float(off.max()) <= 0.0051
    assert skew < 1e-5


@pytest.mark.parametrize("size", [2, 33, 64, 127, 128, 129, 256, 512])
def test_decomposition(size: int) -> None:
    x = torch.randn(20, size, size // 2 + 1, device=CUDA)
    matrices = x @ x.transpose(-1, -2) / size
    found = decomposition.eigh(matrices)
    residual = float(decomposition.residuals(matrices, *found).max())
    print(f"{size}: {residual:.1e}, cuSOLVER batched: {decomposition.batched_eigh}")
    assert residual < 1e-4
    expected = torch.linalg.eigvalsh(matrices.double())
    assert float((found[0] - expected).abs().max() / expected.max()) < 1e-4


def everything() -> Callable[[], None]:
    """Return a call of every operator on fixed tensors."""
    plain, images = gram_list(torch.float32), patch_list(torch.float32)
    plain = [g for g in plain if not g.beta]
    g, a = torch.randn(9, 5, 1, 70, device=CUDA), torch.randn(9, 5, 1, 40, device=CUDA)
    out, u = poison(1, 70, 40), torch.randn(1, 70, 40, device=CUDA)
    s, damping = torch.rand(1, 70, 40, device=CUDA), torch.ones(1, device=CUDA)
    thin = [g[:, :1], a[:, :1]]
    second, tokens = poison(1, 70, 40), poison(1, 100)
    index = torch.randint(0, 100, (9, 5), device=CUDA)
    scales = torch.ones(1, 2, device=CUDA)

    def call() -> None:
        call_grams(plain)
        call_grams(images)
        OPS.diagonal_gram_([out[:, 0]], [a], [None], [1.0], [0.0], [False])
        OPS.scalings_([out], [g], [a], [1.0], [0.0])
        OPS.scalings_([second], [thin[0]], [thin[1]], [1.0], [0.0])
        OPS.precondition_([u], [s], damping, -1.0)
        OPS.squares_([s], [u], scales)
        OPS.spectral_([u], [s], scales, 3, True)
        OPS.index_counts_([tokens], [index], [None], [1.0], [0.0])
        kernels.index_counts(index, 100, None, a)
        kernels.indexed_second_moment(g, index, 100, None)
        kernels.gram(a)
        kernels.diagonal_gram(a)
        kernels.second_moment(g[:, :1], a[:, :1], None, None)

    call.results = [x.out for x in plain + images] + [out, second, tokens]  # type: ignore[attr-defined]
    return call


def test_nothing_waits(cache: KernelCache) -> None:
    call = everything()
    call()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not cache.broken


def test_capture_and_replay() -> None:
    call = everything()
    call()
    torch.cuda.synchronize()
    expected = [x.clone() for x in call.results]  # type: ignore[attr-defined]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for result in call.results:  # type: ignore[attr-defined]
        result.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    for found, before in zip(call.results, expected, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(found, before)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_compute_sanitizer(tool: str) -> None:
    """Every variant's own check under the sanitizer, in a process of its own."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer")
    code = (
        "import torch\n"
        "from ekfac.kernels.cuda import dispatch, driver, kernel\n"
        "own = driver.DeviceEngine(torch.device('cuda', 0))\n"
        "for variant in dispatch.usable_variants(own):\n"
        "    own.load(variant)\n"
        "    assert dispatch.error_of(own, variant) <= kernel.tolerance(variant)\n"
    )
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    names = "|".join(f"{k}|{k}_finish" for k in dispatch.KERNELS)
    command = [program, f"--tool={tool}", "--error-exitcode=9"]
    command += [f"--kernel-regex=kns={name}" for name in names.split("|")]
    result = subprocess.run(
        [*command, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
