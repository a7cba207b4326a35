"""The spectral direction against dense algebra, and its two special cases."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import support
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC, kernels
from ekfac.kernels import linalg
from ekfac.kernels.decomposition import share_on_axes
from ekfac.kernels.eigenspaces import Spaces, degenerate
from ekfac.kernels.linalg import COEFFICIENTS
from ekfac.optim import precondition
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.usefixtures("float64")

PLAIN: dict[str, Any] = {"lr": 1.0, "momentum": 0.0, "direction": "spectral"}


def polynomial(values: Tensor, steps: int) -> Tensor:
    """Return what the polynomials make of singular values, the largest being 1."""
    for a, b, c in COEFFICIENTS[steps]:
        values = a * values + b * values**3 + c * values**5
    return values


def polar_by_svd(matrices: Tensor, steps: int = 3, margin: float = 0.0) -> Tensor:
    """Return the approximate polar factor from a singular value decomposition."""
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    bound = (1 + margin) * S.pow(8).sum(dim=-1, keepdim=True).pow(1 / 8)
    return (U * polynomial(S / bound, steps).unsqueeze(-2)) @ V


def network(width: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, 11)
    )


def batch(number: int = 0, count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(count, 10, generator=generator)
    return x, torch.randint(0, 11, (count,), generator=generator)


def step(
    model: nn.Module, optimizer: KroneckerOptimizer, number: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return gradients and by how much the step lowered the parameters."""
    x, y = batch(number)
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    return support.gradients(model), support.step_of(model, optimizer)


# -- the polar factor ------------------------------------------------------------------


@pytest.mark.parametrize("steps", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(1, 9, 9), (1, 5, 30), (1, 30, 5), (3, 7, 4)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_polar_is_the_polynomial_of_the_singular_values(
    shape: tuple[int, ...], scale: float, steps: int
) -> None:
    matrices = torch.randn(shape)
    found = kernels.polar(scale * matrices, steps)
    torch.testing.assert_close(found, polar_by_svd(matrices, steps), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "share", "error"),
    [
        (3, 0.02, 0.0935),
        (4, 0.01, 0.0127),
        (5, 0.003, 0.005),
    ],
)
def test_polar_factors_are_as_close_as_is_said(
    steps: int, share: float, error: float
) -> None:
    """Singular values above a share of the largest come close to 1."""
    values = torch.logspace(0, torch.log10(torch.tensor(share)).item(), 400)
    assert (polynomial(values, steps) - 1).abs().max() < error
    U, V = (torch.linalg.qr(torch.randn(20, 20)).Q for _ in range(2))
    # Within the share of the bound, which exceeds the largest value a little.
    S = torch.logspace(0, torch.log10(torch.tensor(2 * share)).item(), 20)
    found = kernels.polar(((U * S) @ V)[None], steps)[0]
    assert torch.linalg.matrix_norm(found - U @ V, 2) < error


def of_spectrum(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Return random matrices, also with singular values that decay or of low rank."""
    matrices = torch.randn(shape)
    if kind == "random":
        return matrices
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    S = torch.logspace(0, -3, S.shape[-1]).repeat(len(S), 1)
    rank = {"decaying": S.shape[-1], "low rank": 32, "rank 1": 1}[kind]
    S[:, rank:] = 0
    return (U * S.unsqueeze(-2)) @ V


@pytest.mark.parametrize(
    "shape",
    [
        (1, 300, 310),
        (2, 290, 700),
        (2, 700, 290),
        (1, 300, 910),
        (1, 910, 300),
        (1, 100, 900),
        (8, 128, 129),
    ],
)
@pytest.mark.parametrize(
    ("spectrum", "bound"),
    [("random", 0.04), ("decaying", 0.03), ("low rank", 0.08), ("rank 1", 0.14)],
)
def test_polar_factors_of_rounded_products(
    shape: tuple[int, ...],
    spectrum: str,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products in bfloat16 are off by less than is said, and never leave the range."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    matrices = of_spectrum(spectrum, shape)
    found = kernels.polar(matrices.float(), precise=False)
    assert found.dtype == torch.float32
    expected = polar_by_svd(matrices, 3, linalg.MARGIN)
    error = support.relative_error(found.double(), expected)
    if spectrum == "decaying" and shape == (1, 100, 900):  # longer than any before
        bound = 0.04  # as the documentation says
    assert 1e-3 < error < bound
    assert torch.linalg.matrix_norm(found, 2).max() < 1.5


@pytest.mark.parametrize(
    ("shape", "steps"),
    [((9, 70, 500), 3), ((9, 500, 70), 3), ((20, 64, 65), 3), ((1, 310, 300), 4)],
)
@pytest.mark.parametrize("spectrum", ["random", "decaying", "low rank", "rank 1"])
def test_polar_factors_that_are_not_rounded(
    shape: tuple[int, ...], steps: int, spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow, small ones, and steps that would amplify rounding, are in float32.

    The polynomials are steep at 1, where rounding errors grow a thousandfold.
    """
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    matrices = of_spectrum(spectrum, shape)
    found = kernels.polar(matrices.float(), steps, precise=False)
    error = support.relative_error(found.double(), polar_by_svd(matrices, steps))
    assert error < 1e-2


def test_polar_of_zero_and_of_low_rank() -> None:
    assert kernels.polar(torch.zeros(1, 4, 6)).abs().max() == 0
    left, right = torch.randn(8, 2), torch.randn(2, 9)
    found = kernels.polar((left @ right)[None], 4)[0]
    values = torch.linalg.svdvals(found)
    assert values[2:].max() < 1e-9
    assert ((values[:2] - 1).abs() < 0.02).all()


# -- the step --------------------------------------------------------------------------


def pooled_scalings(layer: Any) -> Tensor:
    """Return scalings with one mean for the eigenvectors below 0.1 of the mean.

    And for those that a truncated basis leaves out, by projectors on them and on single
    ones: ``P_G s P_A``.
    """
    s = layer.kronecker_scalings() if layer.s is None else layer.s
    for side in ("G", "A"):
        if layer.basis(side) is None:
            continue
        values = layer.eigenvalues_G if side == "G" else layer.eigenvalues_A
        small = (values < 0.1 * values.mean(dim=-1, keepdim=True)).double()
        small[:, : layer.complement(side)] = 1
        count = small.sum(dim=-1)[:, None, None].clamp(min=1)
        projector = small.unsqueeze(-1) * small.unsqueeze(-2) / count
        projector = projector + torch.diag_embed(1 - small)
        s = projector @ s if side == "G" else s @ projector
    return s


def on_axes(G: Tensor) -> float:
    """Return which share of ``[b, d, d]`` is in the differences of its diagonal."""
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(dim=-1, keepdim=True)
    return float((diagonal - mean).square().sum() / G.square().sum())


def expected_direction(
    layer: Any, gradient: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """Return ``s^-1/2 o polar(s^-1/2 o N)`` in the basis and outside, of rms 1.

    ``N / s`` where few outputs hold most of ``G``.
    """
    Q_G, Q_A = support.dense_basis(layer, "G"), support.dense_basis(layer, "A")
    rotated = Q_G.transpose(-1, -2) @ gradient @ Q_A
    G = Q_G @ torch.diag_embed(layer.eigenvalues_G) @ Q_G.transpose(-1, -2)
    if layer.basis("G") is not None and on_axes(G) > 0.5:
        s = layer.kronecker_scalings() if layer.s is None else layer.s
        inside = rotated / (s + damping * s.mean())
    else:
        s = pooled_scalings(layer)
        root = (s + damping * s.mean()).rsqrt()
        inside = root * polar_by_svd(root * rotated)
    inside = inside / inside.square().mean().sqrt()
    return inside, Q_G @ inside @ Q_A.transpose(-1, -2)


def expected_agreement(
    layer: Any, average: Tensor, count: int, momentum: float
) -> float:
    """Return the mean square of Nesterov's average over that of independent gradients.

    In the units of scalings of a mean loss over ``count`` targets, at least 0.01.
    """
    weights = torch.zeros(500)
    for age in range(500):
        weights[age] = momentum * (1 - momentum) * momentum**age
    weights[0] += 1 - momentum
    share = float(count * average.square().mean() / layer.s.mean())
    return max(min(1.0, share) / float(weights.square().sum()), 0.01)


@pytest.mark.parametrize("kind", ["kfac", "running average", "per example"])
def test_the_step_is_that_of_dense_algebra(kind: str) -> None:
    model = network()
    options = {**PLAIN, "damping": 0.1}
    optimizer: KroneckerOptimizer = (
        KFAC(model, **options)
        if kind == "kfac"
        else EKFAC(model, scaling=kind.replace(" ", "_"), **options)
    )
    for number in range(3):
        grads, moved = step(model, optimizer, number)
        for name in ("0", "3"):
            layer = optimizer.curvature[name]
            gradient = support.packed(layer, grads)
            _, direction = expected_direction(layer, gradient, 0.1)
            error = support.relative_error(support.packed(layer, moved), direction)
            assert error < 1e-8, (name, number)


def wide_network() -> nn.Sequential:
    """Return a network with sides wide enough for truncated bases."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 80), nn.Tanh(), nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 11)
    )


@pytest.mark.parametrize("rank", [5, 20, 0.3])
@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
def test_the_step_in_a_truncated_basis(rank: float, scaling: Any) -> None:
    """The complement is in the pool of the small eigenvalues."""
    model = wide_network()
    optimizer = EKFAC(
        model, **PLAIN, rank=rank, scaling=scaling, damping=0.1, max_aspect=99.0
    )
    for number in range(3):
        grads, moved = step(model, optimizer, number)
        layer = optimizer.curvature["2"]
        assert layer.complement("A")
        assert layer.complement("G")
        _, expected = expected_direction(layer, support.packed(layer, grads), 0.1)
        error = support.relative_error(support.packed(layer, moved), expected)
        assert error < 1e-7, number


@pytest.mark.parametrize("rank", [24, 5])
def test_share_of_a_factor_on_the_axes(rank: int) -> None:
    Q = torch.linalg.qr(torch.randn(2, 24, 24)).Q
    values = torch.rand(2, 24).sort(dim=-1).values
    values[:, : 24 - rank] = values[:, : 24 - rank].mean(-1, keepdim=True)
    kept = values if rank == 24 else torch.cat([values[:, :1], values[:, -rank:]], -1)
    for basis in (Q, 0.1 * Q + torch.eye(24)):
        basis = torch.linalg.qr(basis).Q
        G = basis @ torch.diag_embed(values) @ basis.mT
        found = share_on_axes(basis[..., -rank:], kept)
        assert found == pytest.approx(on_axes(G), rel=1e-9)
    assert share_on_axes(Q, torch.ones(2, 24)) < 1e-12
    assert share_on_axes(Q, torch.zeros(2, 24)) == 0
    axes = torch.eye(24).expand(2, 24, 24)
    found = share_on_axes(axes, values * 1e-200)
    assert found == pytest.approx(on_axes(torch.diag_embed(values)))
    one = torch.zeros(2, 24)
    one[:, -1] = 1
    assert share_on_axes(axes, one) == pytest.approx(23 / 24)


class Heads(nn.Module):
    """A trunk with two classifiers of uneven classes, a regression and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(30, 16)
        self.trunk = nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 16))
        self.words = nn.Linear(16, 30)
        self.topics = nn.Linear(16, 20, bias=False)
        self.pixels = nn.Linear(16, 12)
        self.tied = nn.Linear(16, 30, bias=False)
        self.tied.weight = self.token.weight

    def forward(self, codes: Tensor) -> list[Tensor]:
        x = torch.tanh(self.trunk(self.token(codes)))
        return [self.words(x), self.topics(x), self.tied(x), self.pixels(x)]


def test_layers_with_few_frequent_outputs_take_the_natural_direction() -> None:
    """Several heads, a tied one, a head that is none, and no mark on any of them."""
    torch.manual_seed(0)
    model = Heads()
    optimizer = EKFAC(model, lr=1e-2)
    frequent = torch.arange(1, 31, dtype=torch.float64).reciprocal()
    mixing = torch.randn(12, 12)
    for _ in range(4):
        codes = torch.multinomial(frequent, 200, replacement=True)
        topics = torch.multinomial(frequent[:20], 200, replacement=True)
        words, second, tied, pixels = model(codes)
        optimizer.zero_grad()
        loss = cross_entropy(words, codes) + cross_entropy(second, topics)
        loss = loss + cross_entropy(tied, codes)
        loss = loss + (pixels - torch.randn(200, 12) @ mixing).square().mean()
        loss.backward()
        optimizer.step()
    options = optimizer.options
    kinds = {
        name: precondition.treatment(layer, options)
        for name, layer in optimizer.curvature.items()
    }
    assert kinds == {
        "token": "adamw",
        "trunk.0": "spectral",
        "trunk.2": "spectral",
        "words": "natural",
        "topics": "natural",
        "pixels": "spectral",
    }
    natural = [r.layer for r in optimizer.describe().rows if "natural" in r.reason]
    assert natural == ["words", "topics"]


@pytest.mark.parametrize(("largest", "expected"), [(1.3, "spectral"), (9.0, "natural")])
def test_independent_outputs_of_like_size_are_no_reason(
    largest: float, expected: str
) -> None:
    """``G`` is diagonal in both, as those of convolutions before ReLUs nearly are."""
    torch.manual_seed(0)
    model = nn.Linear(20, 12)
    optimizer = EKFAC(model, lr=1e-3)
    sizes = torch.linspace(0.7, 1.3, 12)
    sizes[0] = largest
    for _ in range(2):
        optimizer.zero_grad()
        out = model(torch.randn(4000, 20))
        (out * sizes * torch.randn_like(out)).sum(dim=1).mean().backward()
        optimizer.step()
    (layer,) = optimizer.curvature.values()
    assert layer.G is not None
    diagonal = torch.diag_embed(layer.G.diagonal(dim1=-2, dim2=-1))
    assert support.relative_error(diagonal, layer.G) < 0.1
    assert precondition.treatment(layer, optimizer.options) == expected


def test_the_step_has_the_norm_that_is_bounded() -> None:
    """``|| s^1/2 o (Q_G^T D Q_A) ||_op`` is one number for all well-seen directions."""
    model = network()
    optimizer = EKFAC(model, grafting=None, **PLAIN, damping=0.3)
    for number in range(3):
        _, moved = step(model, optimizer, number)
    layer = optimizer.curvature["3"]
    s = pooled_scalings(layer)
    Q_G, Q_A = support.dense_basis(layer, "G"), support.dense_basis(layer, "A")
    inside = Q_G.transpose(-1, -2) @ support.packed(layer, moved) @ Q_A
    weighted = (s + 0.3 * s.mean()).sqrt() * inside
    error = 0.0935  # of three polar steps, see above
    assert torch.linalg.matrix_norm(weighted, 2).max() == pytest.approx(1, abs=error)


def test_with_equal_scalings_it_is_muons() -> None:
    """A damping that drowns the scalings leaves the polar factor of the gradient."""
    model = network()
    optimizer = EKFAC(model, **PLAIN, damping=1e12)
    grads, moved = step(model, optimizer)
    layer = optimizer.curvature["0"]
    polar = polar_by_svd(support.packed(layer, grads))
    expected = polar / polar.square().mean().sqrt()
    assert support.relative_error(support.packed(layer, moved), expected) < 1e-8


def test_of_a_single_output_it_is_the_natural_direction() -> None:
    """The polar factor of a vector is the vector, of length 1."""
    row = torch.randn(1, 1, 7)
    s = torch.rand(1, 1, 7) + 0.1
    spectral = s.rsqrt() * kernels.polar(s.rsqrt() * row)
    natural = row / s
    cosine = torch.nn.functional.cosine_similarity(spectral, natural, dim=-1)
    assert cosine == pytest.approx(1, abs=1e-12)


def test_momentum_is_averaged_before() -> None:
    model = network()
    options: dict[str, Any] = {"grafting": "rms", "damping": 0.1, "basis_interval": 2}
    optimizer = EKFAC(model, lr=1.0, momentum=0.8, nesterov=True, **options)
    average: dict[str, Tensor] = {}
    for number in range(5):
        grads, moved = step(model, optimizer, number)
        for name in ("0", "3"):
            layer = optimizer.curvature[name]
            gradient = support.packed(layer, grads)
            old = average.get(name, torch.zeros_like(gradient))
            average[name] = 0.8 * old + 0.2 * gradient
            corrected = average[name] / (1 - 0.8 ** (number + 1))
            mixed = 0.8 * corrected + 0.2 * gradient
            agreement = expected_agreement(layer, mixed, 40, 0.8)
            _, direction = expected_direction(layer, mixed, 0.1 * agreement)
            error = support.relative_error(support.packed(layer, moved), direction)
            assert error < 1e-7, (name, number)


def test_every_step_moves_layers_whose_parameters_are_no_views() -> None:
    """Matrices of transposed convolutions are copied: never those of an old step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose1d(10, 11, 3), nn.Flatten(), nn.Linear(11 * 6, 12)
    )
    optimizer = EKFAC(model, **PLAIN)
    layer = optimizer.curvature["0"]
    for number in range(3):
        x, y = torch.randn(30, 10, 4), torch.randint(0, 12, (30,))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        gradient = support.packed(layer, support.gradients(model))
        moved = support.packed(layer, support.step_of(model, optimizer))
        _, direction = expected_direction(layer, gradient, 0.1)
        assert support.relative_error(moved, direction) < 1e-7, number


@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
def test_norms_and_embeddings_move_as_adamw_moves_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 3)
    )
    twin = nn.ParameterList(p.detach().clone() for p in model.parameters())
    optimizer = EKFAC(model, lr=0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(twin, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        x = torch.randint(0, 9, (16,), generator=generator)
        y = torch.randint(0, 3, (16,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        for p, q in zip(model.parameters(), twin, strict=True):
            q.data.copy_(p.detach())
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
        for index, name in enumerate(dict(model.named_parameters())):
            mine, theirs = model.get_parameter(name).detach(), twin[index].detach()
            equal = torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
            assert equal == (not name.startswith(("2.", "3."))), name


def test_wide_sides_stay_in_their_own_axes() -> None:
    """Their step is that of the dense algebra with the identity for a basis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 80), nn.Tanh(), nn.Linear(80, 11))
    optimizer = EKFAC(model, **PLAIN, damping=0.1)
    assert [block.diagonal for block in optimizer.blocks()] == [
        (False, True),
        (True, False),
    ]
    for number in range(3):
        grads, moved = step(model, optimizer, number)
    for name, layer in optimizer.curvature.items():
        _, expected = expected_direction(layer, support.packed(layer, grads), 0.1)
        error = support.relative_error(support.packed(layer, moved), expected)
        assert error < 1e-7, name
    convolution = nn.Sequential(nn.Conv2d(9, 16, 3), nn.Flatten())
    layer = EKFAC(convolution).curvature["0"]
    assert layer.block.diagonal == (False, False)
    assert not precondition.moves_as_adamw(layer.block, EKFAC(convolution).options)
    narrow = EKFAC(convolution, max_dim=70)
    assert precondition.moves_as_adamw(narrow.curvature["0"].block, narrow.options)
    assert EKFAC(network(80), max_aspect=99.0).blocks()[0].diagonal == (False, False)


# -- degenerate eigenspaces ------------------------------------------------------------


def test_ranges_of_equal_eigenvalues() -> None:
    values = torch.tensor([[0.0, 1e-18, 1e-17, 0.5, 1.0, 1.0 + 1e-12, 3.0]])
    found = degenerate(values)
    assert found is not None
    assert found.ranges == [(0, 0, 3), (0, 4, 6)]
    assert found.pool is None
    assert degenerate(torch.tensor([[0.0, 1.0, 2.0]])) is None
    assert degenerate(torch.tensor([[0.0, 5.0, 9.0]]), share=0.1) is None
    found = degenerate(torch.tensor([[0.0, 1.0, 2.0, 97.0]]), share=0.1)
    assert found is not None
    assert found.ranges == []
    assert found.pool is not None
    assert found.pool.tolist() == [[True, True, True, False]]
    both = degenerate(torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]]))
    assert both is not None
    assert both.ranges == [(0, 0, 2)]


def test_what_equals_a_small_eigenvalue_is_in_their_pool() -> None:
    """The second and the third differ by rounding, and lie on either side of 0.1."""
    values = torch.tensor([[0.01, 0.0999999999, 0.1000000001, 3.8, 1.0, 0.99]])
    found = degenerate(values, share=0.1)
    assert found is not None
    assert found.ranges == []
    assert found.pool is not None
    assert found.pool.tolist() == [[True, True, True, False, False, False]]


def averaging(values: Tensor, share: float, weights: Tensor | None = None) -> Tensor:
    """Return matrices that average over the spaces, written down entry by entry."""
    weights = torch.ones(values.shape[-1]) if weights is None else weights
    matrices = []
    for block in values.tolist():
        limit = (
            share
            * sum(v * float(w) for v, w in zip(block, weights, strict=True))
            / float(weights.sum())
        )
        gap = 1e-9 * max(block)
        spaces = [{0}]
        for i in range(1, len(block)):
            if abs(block[i] - block[i - 1]) <= gap:
                spaces[-1].add(i)
            else:
                spaces.append({i})
        small = {i for i, v in enumerate(block) if v < limit}
        pool = set().union(*(space for space in spaces if space & small), set())
        spaces = [space for space in spaces if not space & small] + [pool]
        matrix = torch.zeros(len(block), len(block))
        for space in spaces:
            for i in space:
                for j in space:
                    whole = sum(float(weights[k]) for k in space)
                    matrix[i, j] = float(weights[j]) / whole
        matrices.append(matrix)
    return torch.stack(matrices)


def check_means(found: Spaces, expected: Tensor, scalings: Tensor) -> None:
    """Compare means over columns and rows with products with averaging matrices."""
    columns, rows = scalings.clone(), scalings.mT.contiguous()
    found.average_(columns, -1)
    found.average_(rows, -2)
    torch.testing.assert_close(columns, scalings @ expected.mT, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows, expected @ scalings.mT, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kept", [False, True], ids=["fresh basis", "kept basis"])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("pairs", [0, 2, 30])
@pytest.mark.parametrize("width", [90, 150])
@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_means_over_spaces(
    blocks: int, width: int, pairs: int, share: float, kept: bool
) -> None:
    """Few spaces and many, of one block and several, with a pool and without.

    The diagonal in a basis that was kept does not ascend: the pool lies scattered.
    """
    generator = torch.Generator().manual_seed(blocks + width + pairs)
    values = torch.rand(blocks, width, generator=generator).sort(dim=-1).values
    values = values.square() + 1e-4
    for block in range(blocks):
        for i in torch.randperm(width - 1, generator=generator)[:pairs].tolist():
            values[block, i + 1] = values[block, i]
    if kept:
        order = torch.randperm(width // 3, generator=generator)
        values[:, : width // 3] = values[:, order]
    expected = averaging(values, share)
    found = degenerate(values, share=share)
    if found is None:
        assert torch.equal(expected, torch.eye(width).expand(blocks, -1, -1))
        return
    scalings = torch.rand(blocks, 4, width, generator=generator)
    check_means(found, expected, scalings)


@pytest.mark.parametrize(
    "values",
    [[0.01, 0.02, 0.03, 9.0], [0.01, 9.0, 0.02, 8.0], [1.0, 1.0, 2.0, 3.0]],
    ids=["pool", "scattered pool", "pair"],
)
def test_taps_of_a_convolution_share_the_spaces_of_one_factor(
    values: list[float],
) -> None:
    found = degenerate(torch.tensor([values]), share=0.1)
    assert found is not None
    expected = averaging(torch.tensor([values]), 0.1)
    check_means(found, expected, torch.rand(9, 4, 4))


def test_a_complement_that_equals_others_has_its_weight() -> None:
    """All eigenvalues of a layer without gradients are zero, none below their mean."""
    weights = torch.tensor([30.0, 1.0, 1.0])
    found = degenerate(torch.zeros(1, 3), share=0.1, weights=weights)
    assert found is not None
    scalings = torch.tensor([[[1.0, 2.0, 4.0]]])
    found.average_(scalings, -1)
    torch.testing.assert_close(scalings, torch.full((1, 1, 3), 36 / 32))


@pytest.mark.parametrize("shape", [(3, 150, 200), (4, 95, 250), (5, 127, 131)])
def test_a_rounded_polar_factor_does_not_depend_on_the_others(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    matrices = torch.randn(shape).float()
    rounded = matrices.bfloat16()
    products = rounded @ rounded.mT
    equal = all(
        torch.equal(p, r @ r.mT) for p, r in zip(products, rounded, strict=True)
    )
    bound = 1e-4 if equal else 1e-2  # where a processor multiplies stacks otherwise
    together = kernels.polar(matrices, precise=False)
    for matrix, found in zip(matrices, together, strict=True):
        alone = kernels.polar(matrix[None].clone(), precise=False)[0]
        assert support.relative_error(found, alone) < bound


def test_a_pool_in_two_places_beside_a_block_without_one() -> None:
    """As many neighbourhoods as blocks are not one in each."""
    values = torch.tensor([[0.01, 0.02, 5.0, 0.03, 0.04], [1.0, 2.0, 3.0, 4.0, 5.0]])
    found = degenerate(values, share=0.1)
    assert found is not None
    scalings = torch.rand(2, 3, 5)
    expected = scalings.clone()
    small = [0, 1, 3, 4]
    expected[0, :, small] = scalings[0, :, small].mean(dim=-1, keepdim=True)
    found.average_(scalings, -1)
    torch.testing.assert_close(scalings, expected)


@pytest.mark.parametrize("pairs", [0, 2, 30])
def test_means_over_spaces_with_a_complement(pairs: int) -> None:
    """Its entry stands for 30 directions, and is in the pool."""
    weights = torch.ones(40)
    weights[0] = 30.0
    values = torch.cat([torch.zeros(1), torch.linspace(0.01, 1, 39)])[None]
    for i in range(pairs):
        values[0, 6 + i] = values[0, 5 + i // 2 * 2]
    expected = averaging(values, 0.1, weights)
    assert expected[0, 1, 0] > 0.5
    found = degenerate(values, share=0.1, weights=weights)
    assert found is not None
    check_means(found, expected, torch.rand(1, 4, 40))


@pytest.mark.parametrize("direction", ["spectral", "natural"])
@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_the_step_does_not_depend_on_the_basis_of_a_degenerate_space(
    make: Callable[..., KroneckerOptimizer], direction: str
) -> None:
    """Fewer examples than inputs, and inputs that are copies of one another."""

    def run(turned: bool) -> list[dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(20, 12, bias=False), nn.Tanh(), nn.Linear(12, 9)
        )
        optimizer = make(
            model, lr=0.02, direction=direction, basis_interval=3, basis_tolerance=0.0
        )
        found = []
        for number in range(7):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(6, 20, generator=generator)
            x[:, 10:15] = 0  # dead inputs
            x[:, 15:] = x[:, :5]
            y = torch.randint(0, 9, (6,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            found.append({n: p.detach().clone() for n, p in model.named_parameters()})
            if turned:
                for layer in optimizer.curvature.values():
                    turn(layer)
        return found

    def turn(layer: Any) -> None:
        """Turn every degenerate space at random, scalings and momentum with it."""
        for side in ("A", "G"):
            basis = layer.basis(side)
            spaces = layer.spaces(side, pooled=False)
            for _, start, stop in [] if spaces is None else spaces.ranges:
                R = torch.linalg.qr(torch.randn(stop - start, stop - start)).Q
                basis[0, :, start:stop] = basis[0, :, start:stop] @ R
                whole = torch.eye(basis.shape[-1])
                whole[start:stop, start:stop] = R
                s, momentum = layer.averages["s"].total, layer.momentum.total
                if side == "A":
                    s.copy_(s @ whole.square())
                    momentum.copy_(momentum @ whole)
                else:
                    s.copy_(whole.square().T @ s)
                    momentum.copy_(whole.T @ momentum)

    plain, turned = run(False), run(True)
    for one, two in zip(plain, turned, strict=True):
        for name, parameter in one.items():
            assert support.relative_error(two[name], parameter) < 1e-9, name


@pytest.mark.parametrize("direction", ["spectral", "natural"])
def test_two_ways_to_a_basis_are_one_training(direction: str) -> None:
    """A truncated basis that keeps everything is found by other decompositions.

    The first has fewer examples than directions, the later ones have more.
    """
    found = []
    for rank in (None, 40):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 70), nn.Tanh(), nn.Linear(70, 11))
        options: dict[str, Any] = {"basis_interval": 2, "basis_tolerance": 0.0}
        options["max_aspect"] = 99.0
        optimizer = EKFAC(model, lr=0.01, rank=rank, direction=direction, **options)
        for number in range(5):
            step(model, optimizer, number)
        found.append(support.parameters(model))
    for name, parameter in found[0].items():
        assert support.relative_error(found[1][name], parameter) < 1e-9, name


def test_power_is_refused_with_the_spectral_direction() -> None:
    with pytest.raises(ValueError, match=r"Invalid power: -0\.5 with direction="):
        EKFAC(network(), power=-0.5)


def test_training_resumes_with_its_momentum() -> None:
    model = network()
    optimizer = EKFAC(model, lr=0.01, basis_interval=2)
    for number in range(4):
        step(model, optimizer, number)
    twin = network()
    twin.load_state_dict(model.state_dict())
    resumed = EKFAC(twin, lr=0.01, basis_interval=2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(4, 8):
        step(model, optimizer, number)
        step(twin, resumed, number)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)


# -- batches of layers, and the first steps --------------------------------------------


def test_layers_of_one_shape_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each moves as dense algebra says, whatever is taken together with it."""
    torch.manual_seed(2)
    middle = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(10, 12), *middle, nn.Linear(12, 11))
    batches: list[int] = []
    polar = kernels.polar

    def counted(matrices: Tensor, *rest: Any, **options: Any) -> Tensor:
        batches.append(len(matrices))
        return polar(matrices, *rest, **options)

    monkeypatch.setattr(kernels, "polar", counted)
    options = {**PLAIN, "damping": 0.1, "damping_mode": "relative"}
    optimizer = EKFAC(model, **options, scaling_decay=0.99)
    for number in range(3):
        # Long steps would saturate the units until few outputs hold most of G.
        optimizer.param_groups[0]["lr"] = 1.0 if number == 2 else 1e-2
        grads, moved = step(model, optimizer, number)
    assert sorted(batches[-3:]) == [1, 1, 3]
    for name, layer in optimizer.curvature.items():
        _, expected = expected_direction(layer, support.packed(layer, grads), 0.1)
        error = support.relative_error(support.packed(layer, moved), expected)
        assert error < 1e-7, name


@pytest.mark.parametrize("natural", [{1}, {0, 1}, {1, 2}, {3}, {0, 3}])
def test_layers_of_one_shape_and_two_treatments(natural: set[int]) -> None:
    """What lies between two layers of a stack may take the other direction."""
    torch.manual_seed(0)
    hidden = [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4)]
    model = nn.Sequential(*hidden)
    optimizer = EKFAC(model, **PLAIN, damping=0.1, scaling_decay=0.0)
    for number in range(2):  # the second step refreshes no basis
        for place, layer in enumerate(optimizer.curvature.values()):
            layer.concentrated = place in natural
        x = torch.randn(30, 12, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().sum(dim=1).mean().backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
    for place, layer in enumerate(optimizer.curvature.values()):
        names = layer.parameter_names
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        moved = {n: before[n] - p.detach() for n, p in model.named_parameters()}
        gradient = layer.block.pack([grads[name] for name in names])
        direction = layer.block.pack([moved[name] for name in names])
        if place in natural:
            assert layer.s is not None
            s = layer.s + 0.1 * layer.s.mean()
            expected = layer.Q_G @ ((layer.Q_G.mT @ gradient @ layer.Q_A) / s)
            expected = expected @ layer.Q_A.mT
            expected = expected / expected.square().mean().sqrt()
        else:
            _, expected = expected_direction(layer, gradient, 0.1)
        assert support.relative_error(direction, expected) < 1e-5, layer.name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grafting", ["adaptive", "rms"])
def test_no_early_step_is_longer_than_the_averages_allow(
    grafting: Literal["adaptive", "rms"], seed: int
) -> None:
    """Nor longer than ``lr`` with a fixed length, whatever the averages have seen."""
    torch.manual_seed(seed)
    model = network()
    optimizer = EKFAC(model, lr=0.01, grafting=grafting)
    longest = 0.0
    for number in range(20):
        weights = 0.9 ** torch.arange(number + 1, dtype=torch.float64)
        weights *= 0.9**2 / weights.sum()
        weights[0] += 1 - 0.9**2
        most = float(weights.square().sum()) ** -0.5  # of gradients that are the same
        _, moved = step(model, optimizer, number)
        for layer in optimizer.curvature.values():
            change = support.packed(layer, moved)
            length = float(change.square().mean().sqrt())
            if min(layer.block.shape[1:]) > 8:
                bound = most if grafting == "adaptive" else 1.0
                assert 1 - 1e-6 < length / 0.01 < bound * (1 + 1e-6)
                longest = max(longest, length)
            else:  # AdamW's may exceed it by what its averages differ
                assert length < 0.02
    assert (longest > 0.011) == (grafting == "adaptive")


@pytest.mark.parametrize("method", [EKFAC, KFAC])
@pytest.mark.parametrize("direction", ["spectral", "natural"])
def test_no_setting_makes_a_number_that_is_none(method: Any, direction: str) -> None:
    """Decades of learning rates and dampings, in single precision."""
    for rate in (1e-4, 1e-2, 1.0, 10.0):
        for damping in (0.0, 1e-6, 1e-2, 1.0, 1e3):
            model = network().float()
            optimizer = method(model, lr=rate, damping=damping, direction=direction)
            for number in range(8):
                x, y = batch(number)
                optimizer.zero_grad()
                cross_entropy(model(x.float()), y).backward()
                optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters()), (rate, damping)
