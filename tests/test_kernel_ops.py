"""The operators' references against plain loops in float64, and their registration."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from host_engine import HostEngine
from torch import Tensor
from torch.library import opcheck

from ekfac import kernels
from ekfac.kernels import decomposition, linalg, normal_form
from ekfac.kernels.convolution import Convolution, unfolded
from ekfac.kernels.cuda.gram import Gram
from ekfac.kernels.cuda.precondition import Preconditioned
from ekfac.kernels.cuda.tiles import in_chunks
from ekfac.kernels.input_gram import InputRows, dense
from ekfac.kernels.linalg import COEFFICIENTS

SIZES = (1, 31, 33, 129, 1000)
OPS = torch.ops.ekfac


def loop_gram(x: Tensor, weight: Tensor | None, bias: bool) -> Tensor:
    """Return ``sum w x x^T`` ``[b, d, d]``, row by row."""
    n, s, b, d = x.shape
    total = torch.zeros(b, d + bias, d + bias, dtype=torch.float64)
    for i in range(n):
        for t in range(s):
            for block in range(b):
                row = x[i, t, block].double()
                if bias:
                    row = torch.cat([row, torch.ones(1, dtype=torch.float64)])
                w = 1.0 if weight is None else float(weight[i, t])
                total[block] += w * torch.outer(row, row)
    return total


def ragged(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None], list[bool]]:
    """Return rows of all the odd sizes, one of them not contiguous."""
    rows = [torch.randn(3, 2, 1, d).to(dtype) for d in SIZES]
    rows[2] = torch.randn(33, 2, 2, 3).to(dtype).permute(3, 1, 2, 0)
    weights: list[Tensor | None] = [None, torch.rand(3, 2).double(), None, None, None]
    return rows, weights, [False, True, True, False, False]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


def test_gram_is_the_loop_over_rows() -> None:
    rows, weights, biases = ragged(torch.float64)
    outs = [
        torch.randn(x.shape[2], x.shape[3] + b, x.shape[3] + b, dtype=torch.float64)
        for x, b in zip(rows, biases, strict=True)
    ]
    outs[3].fill_(float("nan"))  # of no account where beta is zero
    old, betas = [out.clone() for out in outs], [0.5, 0.5, 0.5, 0.0, 1.0]
    OPS.gram_(outs, rows, weights, [2.0] * 5, betas, biases)
    diagonals = [torch.zeros(out.shape[:2], dtype=torch.float64) for out in outs]
    OPS.diagonal_gram_(diagonals, rows, weights, [1.0] * 5, [0.0] * 5, biases)
    for i, (x, w, bias) in enumerate(zip(rows, weights, biases, strict=True)):
        total = loop_gram(x, w, bias)
        close(outs[i], 2 * total + (betas[i] * old[i] if betas[i] else 0))
        close(diagonals[i], total.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize(("b", "d"), [(1, 48), (3, 27)])
def test_grams_of_rows_like_patches_need_no_copy(b: int, d: int) -> None:
    """Where a feature's positions are neighbours: one example after the other."""
    rows = torch.randn(3, b, d, 300, dtype=torch.float64).permute(0, 3, 1, 2)
    assert normal_form._by_example(rows)
    assert not normal_form._by_example(rows.contiguous())
    expected = torch.einsum("nsbi,nsbj->bij", rows, rows)
    close(kernels.gram(rows), expected)
    close(kernels.gram(rows.contiguous()), expected)


@pytest.mark.parametrize("d", [3, 128, 129, 260, 385])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_triangle_is_computed_and_copied_where_that_pays(
    d: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "TRIANGLE", 1)
    rows = torch.randn(7, 5, 1, d, dtype=torch.float64)
    weight = torch.rand(7, 5, dtype=torch.float64) if weighted else None
    close(kernels.gram(rows, weight), loop_gram(rows, weight, False))


@pytest.mark.parametrize("layout", ["columns apart", "columns together"])
def test_grams_of_two_features(layout: str) -> None:
    if layout == "columns apart":
        rows = torch.randn(2, 9, 5, dtype=torch.float64).permute(1, 2, 0).unsqueeze(1)
    else:
        rows = torch.randn(9, 1, 5, 2, dtype=torch.float64)
    for weight in (None, torch.rand(9, 1, dtype=torch.float64)):
        close(kernels.gram(rows, weight), loop_gram(rows, weight, False))


def test_the_bias_is_a_feature_of_ones() -> None:
    for b in (1, 3):
        rows = torch.randn(5, 4, b, 6, dtype=torch.float64)
        close(dense(InputRows(rows, ones=True)), loop_gram(rows, None, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(500, 1, 1, 7).to(dtype)
    out = torch.zeros(1, 7, 7)
    OPS.gram_([out], [x], [None], [1.0], [0.0], [False])
    # Sums in the half type itself would be off by more than a thousandth.
    close(out.double(), loop_gram(x, None, False), 1e-5)


def test_patch_gram_is_that_of_the_layers_patches() -> None:
    conv = Convolution((3, 2), (2, 1), (1, 2), (1, 0), (3, 4), 2)
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    # Stride (2, 1) has 3 x 4 positions; torch pads both sides alike.
    rows = F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1))
    rows = rows.unflatten(1, (2, -1)).permute(0, 3, 1, 2)
    assert rows.shape[1] == 12
    out = torch.zeros(2, 13, 13, dtype=torch.float64)
    OPS.patch_gram_([out], [x], [None], conv.flat(), [1.0], [0.0], [True])
    close(out, loop_gram(rows, None, True))
    assert torch.equal(unfolded(x, conv), rows)
    assert torch.equal(unfolded(x.unsqueeze(2), conv.in_three()), rows)
    fewer = Convolution((3, 2), (2, 1), (1, 2), (1, 0), (2, 3), 2)
    expected = rows.unflatten(1, (3, 4))[:, :2, :3].flatten(1, 2)
    assert torch.equal(unfolded(x, fewer), expected)


@pytest.mark.parametrize("positions", [1, 5])
def test_scalings_are_the_loop_over_examples(positions: int) -> None:
    outs, grads, inputs, expected = [], [], [], []
    for d_out, d_in in ((1, 33), (31, 129), (33, 1000)):
        g = torch.randn(3, positions, 2, d_out, dtype=torch.float64)
        a = torch.randn(d_in, positions, 1, 3, dtype=torch.float64).permute(3, 1, 2, 0)
        out = torch.rand(2, d_out, d_in, dtype=torch.float64)
        total = 0.5 * out
        for n in range(3):
            for b in range(2):
                single = sum(
                    torch.outer(g[n, s, b], a[n, s, 0]) for s in range(positions)
                )
                total[b] += 3 * single**2
        outs.append(out)
        grads.append(g)
        inputs.append(a)
        expected.append(total)
    OPS.scalings_(outs, grads, inputs, [3.0] * 3, [0.5] * 3)
    for found, total in zip(outs, expected, strict=True):
        close(found, total)


def test_preconditioning() -> None:
    u = [torch.randn(1, d, 3, dtype=torch.float64) for d in (1, 33)]
    s = [torch.rand(1, d, 3, dtype=torch.float64) for d in (1, 33)]
    damping = torch.tensor([0.1, 0.2], dtype=torch.float64)
    expected = [x / (y + d) for x, y, d in zip(u, s, damping, strict=True)]
    sums = OPS.precondition_(u, s, damping, -1.0)
    for i, image in enumerate(expected):
        close(u[i], image)
        close(sums[i, 0], (image**2 * (s[i] + damping[i])).sum())
        close(sums[i, 1], (image**2).sum())
    assert OPS.precondition_([], [], torch.empty(0), -1.0).shape == (0, 2)


def test_spectral_directions_of_unequal_layers() -> None:
    """Each as alone, in float64, by singular values; equal shapes are one batch."""
    shapes = [(1, 9, 12), (2, 12, 9), (1, 9, 12)]
    u = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    s = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    scales = torch.rand(3, 2, dtype=torch.float64)
    expected = []
    for x, y, (weight, damping) in zip(u, s, scales, strict=True):
        damped = y / weight + damping
        left, values, right = torch.linalg.svd(x / damped.sqrt(), full_matrices=False)
        values = values / values.pow(8).sum(dim=-1, keepdim=True).pow(1 / 8)
        for a, b, c in COEFFICIENTS[4]:
            values = a * values + b * values**3 + c * values**5
        expected.append(((left * values.unsqueeze(-2)) @ right / damped.sqrt(), damped))
    sums = OPS.spectral_(u, s, scales, 4, True)
    for x, own, (image, damped) in zip(u, sums, expected, strict=True):
        close(x, image)
        close(own, torch.stack([(image**2 * damped).sum(), (image**2).sum()]))
    assert OPS.spectral_([], [], torch.empty(0, 2), 3, True).shape == (0, 2)


@pytest.mark.parametrize("weighted", [False, True])
def test_counts_are_the_loop_over_positions(weighted: bool) -> None:
    outs, indices, expected = [], [], []
    weights: list[Tensor | None] = []
    for size in SIZES:
        index = torch.randint(0, size, (6, 5)).t()  # not contiguous
        weight = torch.rand(5, 6, dtype=torch.float64) if weighted else None
        out = torch.rand(1, size, dtype=torch.float64)
        total = 0.5 * out
        for n in range(5):
            for s in range(6):
                one = 1.0 if weight is None else float(weight[n, s])
                total[0, index[n, s]] += 2 * one
        outs.append(out)
        indices.append(index)
        weights.append(weight)
        expected.append(total)
    OPS.index_counts_(outs, indices, weights, [2.0] * 5, [0.5] * 5)
    for found, total in zip(outs, expected, strict=True):
        close(found, total)


def test_running_averages_and_their_sums() -> None:
    s = [torch.rand(1, d, 3, dtype=torch.float64) for d in SIZES]
    u = [torch.randn(1, d, 3, dtype=torch.float64) for d in SIZES]
    scales = torch.rand(5, 2, dtype=torch.float64)
    scales[2, 1] = 0  # what it is multiplied with is then not read
    u[2].fill_(float("nan"))
    expected = [
        keep * x + (rate * y**2 if rate else 0)
        for x, y, (keep, rate) in zip(s, u, scales, strict=True)
    ]
    sums = OPS.squares_(s, u, scales)
    for found, image, total in zip(s, expected, sums, strict=True):
        close(found, image)
        close(total, image.sum())
    assert OPS.squares_([], [], torch.empty(0, 2)).shape == (0,)


def test_empty_lists_do_nothing() -> None:
    OPS.gram_([], [], [], [], [], [])
    OPS.diagonal_gram_([], [], [], [], [], [])
    OPS.patch_gram_([], [], [], [], [], [], [])
    OPS.scalings_([], [], [], [], [])
    OPS.index_counts_([], [], [], [], [])


def test_lists_of_different_lengths_are_refused() -> None:
    out, x = torch.zeros(1, 2, 2), torch.randn(3, 1, 1, 2)
    with pytest.raises(ValueError, match="shorter"):
        OPS.gram_([out], [x], [], [1.0], [0.0], [False])
    with pytest.raises(ValueError, match="16 numbers, got 3"):
        OPS.patch_gram_([out], [x], [None], [1, 2, 3], [1.0], [0.0], [False])
    assert not out.any()


def test_results_that_overlap_are_no_kernels_work() -> None:
    """Torch refuses to write an element twice; a launch would race with itself."""
    once, x = torch.zeros(1, 5, 5), torch.randn(4, 1, 2, 5)
    assert Gram(once.repeat(2, 1, 1), x).supported()
    assert not Gram(once.expand(2, 5, 5), x).supported()
    one = torch.ones(())
    expanded = torch.ones(1, 1, 5).expand(1, 4, 5)
    engine = HostEngine()
    assert not Preconditioned(expanded, torch.ones(1, 4, 5), one).supported(engine)
    assert Preconditioned(torch.ones(1, 4, 5), expanded, one).supported(engine)


def test_rows_beyond_the_range_of_their_counts_are_no_pipelines_work() -> None:
    """Rows are counted in chunks of 16 bytes, by 32 bits; nothing is allocated."""
    for rows, fits in ((1 << 25, True), (1 << 27, False)):
        x = torch.empty(rows, 1, 1, 64, device="meta")
        assert in_chunks(x, None) == fits


def samples() -> dict[str, tuple[object, ...]]:
    """Return arguments for every operator."""
    x, image = torch.randn(3, 2, 1, 5), torch.randn(3, 2, 4, 4)
    weight = torch.rand(3, 2)
    conv = Convolution((3, 3), (1, 1), (1, 1), (1, 1), (4, 4))
    scalars = ([1.0, 0.5], [0.0, 0.5], [True, False])
    squares = torch.rand(1, 5, 6)
    pair = [torch.rand(1, 6, 6), torch.rand(1, 5, 5)]
    return {
        "gram_": (pair, [x, x], [None, weight], *scalars),
        "diagonal_gram_": (
            [torch.rand(1, 6), torch.rand(1, 5)],
            [x, x],
            [None, weight],
            *scalars,
        ),
        "patch_gram_": (
            [torch.rand(1, 19, 19)],
            [image],
            [None],
            conv.flat(),
            [1.0],
            [0.0],
            [True],
        ),
        "scalings_": ([squares], [x], [torch.randn(3, 2, 1, 6)], [1.0], [0.5]),
        "index_counts_": (
            [torch.rand(1, 7)],
            [torch.randint(0, 7, (3, 2))],
            [weight],
            [1.0],
            [0.5],
        ),
        "squares_": ([squares.clone()], [torch.randn(1, 5, 6)], torch.rand(1, 2)),
        "precondition_": (
            [torch.randn(1, 5, 6)],
            [squares.clone()],
            torch.ones(1),
            -1.0,
        ),
        "spectral_": (
            [torch.randn(1, 5, 6)],
            [squares.clone()],
            torch.ones(1, 2),
            3,
            True,
        ),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str) -> None:
    """Schema, fake and dispatch are as PyTorch wants them."""
    checked = opcheck(getattr(OPS, name).default, samples()[name])
    assert set(checked.values()) == {"SUCCESS"}


def test_operators_under_compile() -> None:
    """The fakes are enough for a graph without breaks."""

    def update(out: Tensor, x: Tensor) -> Tensor:
        OPS.gram_([out], [x], [None], [1.0], [0.5], [False])
        return out * 2

    x, out = torch.randn(9, 1, 1, 4), torch.rand(1, 4, 4)
    expected = update(out.clone(), x)
    compiled = torch.compile(update, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(out.clone(), x), expected)


def symmetric(*shape: int) -> Tensor:
    x = torch.randn(*shape, 2 * shape[-1])
    return x @ x.transpose(-1, -2) / x.shape[-1]


def test_decompositions_hold_their_residual() -> None:
    matrices = symmetric(3, 40)
    values, vectors = decomposition.eigh(matrices)
    expected = torch.linalg.eigvalsh(matrices.double())
    close(values.double(), expected, 1e-5)
    allowed = decomposition.rounding(matrices)
    assert bool((decomposition.residuals(matrices, values, vectors) <= allowed).all())
    wrong = vectors.clone()
    wrong[1, :, 0] *= 1.01
    held = decomposition.residuals(matrices, values, wrong) <= allowed
    assert held.tolist() == [True, False, True]
    held = decomposition.residuals(matrices, values * float("nan"), vectors) <= allowed
    assert not held.any()


def test_matrices_that_a_solver_misses_go_alone_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first misses two of five, the second raises, the third misses one."""
    matrices, given = symmetric(5, 12), []

    def missing(*which: int) -> decomposition.Solver:
        def solver(rest: Tensor) -> tuple[Tensor, Tensor]:
            given.append(len(rest))
            values, vectors = torch.linalg.eigh(rest)
            for i in which:
                vectors[i, :, 0] *= 1.01 if i else float("nan")
            return values, vectors

        return solver

    def refused(rest: Tensor) -> tuple[Tensor, Tensor]:
        given.append(len(rest))
        raise torch.OutOfMemoryError("CUDA out of memory")

    def none(rest: Tensor) -> None:
        given.append(len(rest))

    chain = [missing(0, 3), refused, none, missing(1)]
    monkeypatch.setattr(decomposition, "solvers", lambda _: chain)
    values, vectors = decomposition.eigh(matrices)
    assert given == [5, 2, 2, 2]
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.mT
    assert float((rebuilt - matrices).norm() / matrices.norm()) < 1e-5
    eye = torch.eye(12).expand(5, -1, -1)
    assert float((vectors.mT @ vectors - eye).abs().max()) < 1e-5
    assert bool((values.diff(dim=-1) >= 0).all())


def test_cholesky_qr_is_orthonormal() -> None:
    x = torch.randn(2, 50, 50) @ torch.diag(torch.logspace(0, -2, 50))
    q = decomposition.orthonormal(x)
    assert q is not None
    assert float((q.transpose(-1, -2) @ q - torch.eye(50)).abs().max()) < 2e-6
    q_, r_ = torch.linalg.qr(x)
    signs = r_.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    assert float((q - q_ * signs).abs().max()) < 1e-2
    assert decomposition.orthonormal(torch.zeros(1, 4, 4)) is None


def test_orthogonal_iteration_follows_a_small_change() -> None:
    matrices = symmetric(2, 40).double()
    matrices = matrices @ matrices @ matrices  # eigenvalues far apart
    basis = torch.linalg.eigh(matrices).eigenvectors
    changed = matrices + 3e-3 * matrices.norm() * symmetric(2, 40).double() / 40
    stale = (basis * (changed @ basis)).sum(dim=-2)
    before = float(decomposition.residuals(changed, stale, basis).max())
    found = decomposition.iterated(changed, basis, bound=before / 10, steps=10)
    assert found is not None
    assert_follows(changed, found, before / 10)
    assert decomposition.iterated(changed, basis, bound=1e-12) is None


def assert_follows(
    matrices: Tensor, found: tuple[Tensor, Tensor], bound: float
) -> None:
    """Look at ``Q^T C Q`` and ``Q^T Q`` in float64."""
    values, wide = found[0].double(), found[1].double()
    rotated = wide.mT @ matrices.double() @ wide
    rest = rotated - torch.diag_embed(values)
    size = matrices.double().norm(dim=(-2, -1))
    assert bool((rest.norm(dim=(-2, -1)) <= bound * size).all())
    eye = torch.eye(values.shape[-1], dtype=torch.float64)
    rounding = 20 * torch.finfo(matrices.dtype).eps
    assert float((wide.mT @ wide - eye).abs().max()) < rounding
    assert bool((values.diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["decaying", "clusters", "low rank"])
def test_old_bases_are_followed(kind: str, dtype: torch.dtype) -> None:
    """Old and new covariance share three quarters of their samples' weight."""
    n, samples = 120, 400
    scale = {
        "decaying": torch.logspace(0, -2, n),
        "clusters": torch.tensor([3.0, 3.0, 1.0, 1.0, 1.0] + [1e-2] * (n - 5)),
        "low rank": torch.tensor([1.0] * 10 + [0.0] * (n - 10)),
    }[kind]
    directions = torch.linalg.qr(torch.randn(2, n, n)).Q * scale
    factors = []
    for _ in range(2):
        x = directions @ torch.randn(2, n, samples)
        factors.append((x @ x.mT / samples).to(dtype))
    new = 0.75 * factors[0] + 0.25 * factors[1]
    basis = torch.linalg.eigh(factors[0]).eigenvectors
    stale = (basis * (new @ basis)).sum(dim=-2)
    assert float(decomposition.misfit(new, stale, basis).max()) > 0.005
    found = decomposition.iterated(new, basis, bound=0.005)
    assert found is not None
    assert_follows(new, found, 0.005)
    expected = torch.linalg.eigvalsh(new.double())
    distance = (found[0] - expected).abs().amax(dim=-1)  # Weyl's inequality
    assert bool((distance <= 0.005 * new.double().norm(dim=(-2, -1))).all())


def test_a_basis_that_does_not_fit_is_not_followed() -> None:
    """A flat spectrum in another basis needs more columns than are worth it."""
    matrices = symmetric(1, 60)
    basis = torch.linalg.qr(torch.randn(1, 60, 60)).Q
    assert decomposition.iterated(matrices, basis, bound=0.005) is None
    nan = torch.full((1, 8, 8), float("nan"))
    eye = torch.eye(8).unsqueeze(0)
    assert decomposition.iterated(nan, eye, bound=0.005) is None
    assert not decomposition.follows(matrices, 0.005)  # not on a CPU


@pytest.mark.parametrize("size", [3, 50])
def test_embedded_squares_are_those_of_one_hot_rows(size: int) -> None:
    g = torch.randn(4, 6, 1, 5, dtype=torch.float64)
    index = torch.randint(0, size, (4, 6))
    basis = torch.linalg.qr(torch.randn(1, 5, 5, dtype=torch.float64)).Q
    hot = torch.nn.functional.one_hot(index, size).double()
    expected = torch.zeros(1, 5, size, dtype=torch.float64)
    for n in range(4):
        single = sum(torch.outer(basis[0].T @ g[n, s, 0], hot[n, s]) for s in range(6))
        expected[0] += single**2
    close(kernels.indexed_second_moment(g, index, size, basis), expected)
    none = kernels.indexed_second_moment(g[:0], index[:0], size, basis)
    assert torch.equal(none, torch.zeros_like(expected))


def test_public_functions_are_as_before_without_a_device() -> None:
    x = torch.randn(4, 2, 1, 6, dtype=torch.float64)
    close(kernels.gram(x), loop_gram(x, None, False))
    diagonal = loop_gram(x, None, False).diagonal(dim1=-2, dim2=-1)
    close(kernels.diagonal_gram(x), diagonal)


def test_the_command_shows_the_state() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ekfac", "kernels"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for words in ("EKFAC_KERNELS", "NVRTC", "cuSOLVER", "gram, scalings"):
        assert words in result.stdout
