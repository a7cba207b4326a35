"""Input factors over channels alone (SUA), against sums over examples and positions."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ekfac
from ekfac import EKFAC, KFAC
from ekfac.layers import override
from ekfac.layers.base import registered_adapter
from ekfac.layers.conv import uncorrelated
from ekfac.testing import check_adapter

SUA = "spatially_uncorrelated"


def convolutions() -> list[Any]:
    """Return convolutions of all kinds with images of theirs."""
    return [
        pytest.param(nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6), id="same"),
        pytest.param(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            (2, 8, 7),
            id="strided, dilated",
        ),
        pytest.param(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", bias=False),
            (2, 5, 5),
            id="reflected",
        ),
        pytest.param(nn.Conv1d(3, 2, 4, padding="same"), (3, 9), id="even"),
        pytest.param(nn.Conv3d(2, 3, (2, 1, 2)), (2, 3, 4, 3), id="3-D"),
        pytest.param(
            nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
            (3, 4, 3),
            id="transposed",
        ),
        pytest.param(
            nn.ConvTranspose1d(2, 3, 2, padding=1, bias=False), (2, 6), id="cropped"
        ),
    ]


@pytest.mark.parametrize(("conv", "size"), convolutions())
def test_adapters_agree_with_autograd(conv: nn.Module, size: tuple[int, ...]) -> None:
    kind = registered_adapter(conv)
    assert isinstance(kind, type)
    override(conv, uncorrelated(kind, conv))
    x = torch.randn(3, *size)
    assert check_adapter(conv, x)


def shifted_pixels(conv: nn.Module, x: Tensor) -> Tensor:
    """Return what each tap sees, ``[taps, N S, C]``: by a kernel that picks it."""
    shape, channels = conv.kernel_size, conv.in_channels
    picked = []
    for tap in itertools.product(*map(range, shape)):
        probe = type(conv)(
            channels,
            channels,
            shape,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            padding_mode=conv.padding_mode,
            bias=False,
            **(
                {"output_padding": conv.output_padding}
                if isinstance(conv, nn.modules.conv._ConvTransposeNd)
                else {}
            ),
        ).to(x)
        with torch.no_grad():
            probe.weight.zero_()
            for c in range(channels):
                probe.weight[(c, c, *tap)] = 1
            picked.append(probe(x).flatten(2).transpose(1, 2).flatten(0, 1))
    return torch.stack(picked)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("conv", "size"), convolutions())
def test_matrix_is_the_mean_over_taps(
    conv: nn.Module, size: tuple[int, ...], structure: str, sharing: str
) -> None:
    torch.manual_seed(0)
    conv = conv.double()
    model = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(6).double())
    x, y = torch.randn(7, *size).double(), torch.randint(6, (7,))
    model(x)
    matrix = ekfac.fisher(
        model,
        [(x[:4], y[:4]), (x[4:], y[4:])],
        structure=structure,
        kind="empirical",
        sharing=sharing,
        parameters=["0"],
        conv_factors=SUA,
    )
    out = conv(x).detach().requires_grad_()
    loss = F.cross_entropy(model[2](model[1](out)), y, reduction="sum")
    grads = torch.autograd.grad(loss, out)[0].flatten(2).transpose(1, 2)  # [N, S, o]
    seen = shifted_pixels(conv, x).unflatten(1, grads.shape[:2])  # [t, N, S, C]
    if sharing == "reduce":
        g_rows, a_rows = grads.sum(1), seen.mean(2)
    else:
        g_rows, a_rows = grads.flatten(0, 1), seen.flatten(1, 2)
    G = g_rows.T @ g_rows / 7
    A = torch.einsum("tnc,tnd->cd", a_rows, a_rows) / (
        a_rows.shape[0] * a_rows.shape[1]
    )
    examples = torch.einsum("nso,tnsc->ntoc", grads, seen)
    if structure == "kfac":
        blocks = [torch.kron(G, A)] * len(seen)
    else:
        Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
        s = (Q_G.T @ examples @ Q_A).square().mean(0)
        Q = torch.kron(Q_G, Q_A)
        blocks = [Q @ torch.diag(s_t.flatten()) @ Q.T for s_t in s]
    expected = torch.zeros(conv.weight.numel(), conv.weight.numel()).double()
    places = torch.arange(conv.weight.numel()).reshape(conv.weight.shape)
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        places = places.transpose(0, 1)
    places = places.flatten(2).permute(2, 0, 1).flatten(1)  # [t, o c]
    for index, block in zip(places, blocks, strict=True):
        expected[index[:, None], index] = block
    weight = matrix.blocks["0"].to_dense()
    assert torch.allclose(
        weight, expected, rtol=1e-8, atol=1e-12 * expected.abs().max()
    )
    if conv.bias is None:
        return
    summed = grads.sum(1)
    if structure == "kfac":
        bias = G
    else:
        bias = Q_G @ torch.diag((summed @ Q_G).square().mean(0)) @ Q_G.T
    found = matrix.blocks["0.bias"].to_dense()
    assert torch.allclose(found, bias, rtol=1e-8, atol=1e-12 * bias.abs().max())


def network() -> nn.Sequential:
    """Return a small convolutional network whose first layer's kernel is wide."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 9, (5, 1), padding=(2, 0)),
        nn.ReLU(),
        nn.Conv2d(9, 12, (3, 2), stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(12, 12, (3, 1), groups=3),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def test_pixels_of_white_noise_lose_nothing() -> None:
    """Without correlations both factors are one: a theorem of the assumption."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 2, stride=2, bias=False).double()
    # All 16 signs of a patch's four pixels, twice with the channels' correlation: the
    # second moment of the patches is exactly I (x) A.
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).double()
    white = signs.reshape(16, 1, 2, 2)
    pairs = torch.cat([white[:, [0]] * w for w in (1.0, 0.3)], 1)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(3, 4).double())
    parts = [
        ekfac.fisher(
            model, [(pairs, None)], structure="kfac", parameters=["0"], conv_factors=way
        ).to_dense()
        for way in ("patches", SUA)
    ]
    assert torch.allclose(*parts, rtol=1e-10, atol=1e-12)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> float:
    """Return the loss after some steps on fixed data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 2, 7, 6, generator=generator)
    y = torch.randint(5, (16,), generator=generator)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EKFAC, {}),
        (EKFAC, {"scaling": "per_example"}),
        (EKFAC, {"direction": "natural", "damping_split": "factored"}),
        (EKFAC, {"fisher": "exact", "sharing": "reduce"}),
        (EKFAC, {"kl_clip": 100.0}),
        (EKFAC, {"basis_interval": 4, "basis_delay": 2}),
        (KFAC, {}),
        (KFAC, {"direction": "spectral", "damping_split": "factored"}),
    ],
)
def test_trains_and_resumes(kind: Any, options: dict[str, Any]) -> None:
    model = network()
    model(torch.randn(1, 2, 7, 6))
    optimizer = kind(model, **{"lr": 1e-2, "conv_factors": SUA, **options})
    before = train(optimizer, model, 1)
    after = train(optimizer, model, 12)
    assert after < 0.7 * before
    layer = optimizer.curvature["0"]
    assert layer.block.shape == (5, 9, 2)
    assert layer.averages["A"].total.shape == (1, 2, 2)
    assert layer.averages["G"].total.shape == (1, 9, 9)
    assert layer.G.shape == (5, 9, 9)
    assert optimizer.curvature["4"].block.shape == (3, 4, 13)  # groups keep patches
    twin = network()
    twin(torch.randn(1, 2, 7, 6))
    twin.load_state_dict(model.state_dict())
    other = kind(twin, **{"lr": 1e-2, "conv_factors": SUA, **options})
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, model, 3)
    train(other, twin, 3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_a_step_is_the_solve_of_the_matrix(structure: str) -> None:
    """The textbook step of both, against the dense solve of the live matrix."""
    model = network().double()
    model(torch.randn(1, 2, 7, 6).double())
    kind = KFAC if structure == "kfac" else EKFAC
    optimizer = kind(
        model,
        lr=0.1,
        momentum=0.0,
        direction="natural",
        damping=0.05,
        damping_mode="absolute",
        grafting=None,
        conv_factors=SUA,
    )
    x, y = torch.randn(16, 2, 7, 6).double(), torch.randint(5, (16,))
    F.cross_entropy(model(x), y).backward()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    matrix = optimizer.curvature.matrix(structure, parameters=model).to_dense()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    damped = matrix + 0.05 * torch.eye(len(matrix)).double()
    expected = -0.1 * torch.linalg.solve(damped, gradient)
    moved = zip(model.parameters(), start, strict=True)
    found = torch.cat([(p.detach() - q).flatten() for p, q in moved])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_algebra_of_the_matrix_is_that_of_the_dense_one() -> None:
    model = network().double()
    x = torch.randn(6, 2, 7, 6).double()
    model(x)
    for structure in ("kfac", "ekfac"):
        F_hat = ekfac.fisher(model, [(x, None)], structure=structure, conv_factors=SUA)
        dense = F_hat.to_dense()
        v = torch.randn(len(dense)).double()
        damped = dense + 0.1 * torch.eye(len(dense)).double()
        close = {"rtol": 1e-7, "atol": 1e-9}
        assert torch.allclose(F_hat @ v, dense @ v, **close)
        assert torch.allclose(F_hat.trace(), dense.trace(), **close)
        assert torch.allclose(F_hat.frobenius_norm(), dense.norm(), **close)
        assert torch.allclose(F_hat.logdet(0.1), torch.logdet(damped), **close)
        solved = torch.linalg.solve(damped, v)
        assert torch.allclose(F_hat.solve(v, 0.1), solved, **close)
        eigenvalues = F_hat.eigenvalues().sort().values
        assert torch.allclose(eigenvalues, torch.linalg.eigvalsh(dense), **close)


def test_truncated_bases_with_all_directions_are_the_full_ones() -> None:
    """A wide layer whose basis keeps all that there is, and one that keeps less."""
    torch.manual_seed(0)
    losses = []
    for rank in (None, 0.99e-6, 8):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(70, 60, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()
        ).append(nn.Linear(60, 3))
        own = {"conv_factors": SUA, "max_aspect": float("inf")}
        optimizer = EKFAC(model, lr=3e-3, rank=rank, **own)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(24, 70, 4, 4, generator=generator)
        y = torch.randint(3, (24,), generator=generator)
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert optimizer.curvature["0"].truncated is (rank is not None)
        assert optimizer.curvature["0"].Q_A.shape == (1, 70, 70)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert max(losses) < 0.2


def test_memory_falls() -> None:
    model = nn.Conv2d(16, 16, 3)
    sizes = {
        way: EKFAC(model, conv_factors=way).curvature[""].averages["A"].total.numel()
        for way in ("patches", SUA)
    }
    assert sizes["patches"] / sizes[SUA] == (145 / 16) ** 2


def test_refusals_say_what_is_allowed() -> None:
    model = network()
    x = torch.randn(4, 2, 7, 6)
    model(x)
    with pytest.raises(ValueError, match="conv_factors: 'sua'; use one of 'patches'"):
        EKFAC(model, conv_factors="sua")
    with pytest.raises(ValueError, match="conv_factors: 'sua'"):
        ekfac.fisher(model, [(x, None)], structure="kfac", conv_factors="sua")
    with pytest.raises(ValueError, match="structure='kfac' and 'ekfac'"):
        ekfac.fisher(model, [(x, None)], structure="diagonal", conv_factors=SUA)


def test_saved_patches_do_not_load_as_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LazyLinear(2))
    x, y = torch.randn(4, 2, 5, 5), torch.randint(2, (4,))
    model(x)
    optimizers = [EKFAC(model, conv_factors=way) for way in ("patches", SUA)]
    F.cross_entropy(model(x), y).backward()
    optimizers[0].step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ekfac.errors.StateMismatchError):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
