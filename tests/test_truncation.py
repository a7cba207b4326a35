"""Truncated eigenbases, against dense projections in double precision."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import EKFAC, KFAC
from ekfac.curvature import LayerCurvature, truncated
from ekfac.curvature.truncated import coordinates, overlap, profile, subspace
from ekfac.diagnostics import basis_quality, truncation_error
from ekfac.errors import NotReadyError, StateMismatchError
from ekfac.kernels import Workspace
from ekfac.kernels.decomposition import counts, leading, orthonormal_columns
from ekfac.optim import DistributedState
from ekfac.report.report_input import read_subject
from ekfac.vectors import ParameterVector

OPTIONS: dict[str, Any] = {"lr": 1e-3, "factor_interval": 1, "basis_interval": 4}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(80, 70), nn.Tanh(), nn.Linear(70, 66), nn.Tanh(), nn.Linear(66, 5)
    ).double()


def convolutional(width: int = 66) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, width, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(width * 9, 5),
    ).double()


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> EKFAC:
    """Return an optimizer whose scalings are those of this batch alone."""
    optimizer = EKFAC(
        model, lr=0.0, rank=9, scaling="per_example", scaling_decay=0.0, momentum=0.0
    )
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def data(count: int = 40, width: int = 80) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(0, -2, width, dtype=torch.float64)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64) * scale
    return x, torch.randint(5, (count,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    x, y = data()
    losses = []
    for i in range(steps):
        part = slice(8 * (i % 5), 8 * (i % 5) + 8)
        optimizer.zero_grad()
        loss = cross_entropy(model(x[part]), y[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def projectors(layer: LayerCurvature, side: str) -> list[Tensor]:
    """Return the projectors on the kept directions one by one, then on the rest."""
    basis = layer.basis(side)
    assert basis is not None
    basis = basis[0]
    whole = torch.eye(len(basis), dtype=basis.dtype) - basis @ basis.mT
    first = [whole] if layer.complement(side) else []
    return first + [torch.outer(u, u) for u in basis.mT]


def dense_roots(layer: LayerCurvature, gradient: Tensor) -> Tensor:
    """Return root mean squares of a gradient's parts from dense projections."""
    rows = []
    for P in projectors(layer, "G"):
        parts = [P @ gradient @ R for R in projectors(layer, "A")]
        sizes = [float(P.trace() * R.trace()) for R in projectors(layer, "A")]
        rows.append(
            torch.stack(
                [
                    (p.square().sum() / c).sqrt()
                    for p, c in zip(parts, sizes, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def example_gradients(hooked: nn.Sequential, name: str, x: Tensor, y: Tensor) -> Tensor:
    """Return ``[N, d_out, d_in]`` of one layer with its bias, from torch.func."""
    wide = isinstance(hooked[0], nn.Conv2d)
    model = convolutional(hooked[0].out_channels) if wide else network()
    model.load_state_dict(hooked.state_dict())
    values = {k: v.detach() for k, v in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, values, (x[None],)), y[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y)
    weight = found[f"{name}.weight"].flatten(2)
    return torch.cat([weight.flatten(2), found[f"{name}.bias"].unsqueeze(-1)], dim=-1)


@pytest.fixture
def trained() -> tuple[nn.Sequential, EKFAC]:
    model = network()
    optimizer = EKFAC(model, rank=12, scaling_decay=0.95, **OPTIONS)
    train(model, optimizer, 9)
    return model, optimizer


def test_coordinates_are_those_of_dense_projections(
    trained: tuple[nn.Sequential, EKFAC],
) -> None:
    _, optimizer = trained
    for layer in optimizer.curvature.values():
        gradient = torch.randn(layer.block.shape, dtype=torch.float64)
        expected = dense_roots(layer, gradient[0])
        found = coordinates(layer, gradient)
        assert relative_error(found.roots[0], expected) < 1e-10
        many = torch.outer(*(counts(layer.basis(side)) for side in ("G", "A")))
        total = (many * found.roots[0].square()).sum()
        assert relative_error(total, gradient.square().sum()) < 1e-12
    assert {layer.complement("A") for layer in optimizer.curvature.values()} == {
        69,
        59,
        55,
    }
    assert optimizer.curvature["4"].complement("G") == 0  # a side of 5


@pytest.mark.parametrize("power", [-1, -0.5])
@pytest.mark.parametrize("grafting", [None, "adaptive", "rms", "sgd"])
def test_the_step_multiplies_each_projection(power: float, grafting: str) -> None:
    model = network()
    options = {**OPTIONS, "momentum": 0.0, "power": power, "grafting": grafting}
    optimizer = EKFAC(model, rank=10, damping=0.1, direction="natural", **options)
    train(model, optimizer, 6)
    before = copy.deepcopy(model)
    x, y = data()
    optimizer.zero_grad()
    cross_entropy(model(x[:8]), y[:8]).backward()
    layer = optimizer.curvature["2"]
    weights = [model[2].weight.grad, model[2].bias.grad]
    gradient = torch.cat([weights[0], weights[1][:, None]], dim=1)
    optimizer.step()
    change = torch.cat(
        [
            model[2].weight - before[2].weight,
            (model[2].bias - before[2].bias)[:, None],
        ],
        dim=1,
    ).detach()
    u = -change / OPTIONS["lr"]
    s = layer.averages["s"].read()
    assert s is not None
    many = torch.outer(*(counts(layer.basis(side)) for side in ("G", "A")))
    damping = 0.1 * (many * s[0]).sum() / many.sum()
    # In every part the step is a multiple of the gradient; where both directions are
    # kept, the multiple is the power of the damped scaling.
    left, right = projectors(layer, "G"), projectors(layer, "A")
    multiples = torch.empty(len(left), len(right), dtype=torch.float64)
    for i, P in enumerate(left):
        for j, R in enumerate(right):
            part, image = P @ gradient @ R, P @ u @ R
            multiples[i, j] = (part * image).sum() / part.square().sum()
            assert (image - multiples[i, j] * part).norm() < 1e-9 * u.norm()
    expected = (s[0, 1:, 1:] + damping) ** power
    if grafting is None:
        assert relative_error(multiples[1:, 1:], expected) < 1e-7
    else:
        ratio = multiples[1:, 1:] / expected
        assert relative_error(ratio, ratio.mean().expand_as(ratio)) < 1e-7
        target = gradient.norm() if grafting == "sgd" else u.numel() ** 0.5
        assert relative_error(u.norm(), u.new_tensor(float(target))) < 1e-9
    # Those of the complement lie between what the mean and what nothing gives.
    largest = multiples[1:, 1:].max() / expected.max() * damping**power
    assert multiples[0, 0] <= largest * (1 + 1e-9)


def test_the_complements_multiplier_has_the_least_error() -> None:
    """Compared with all others, on gradients whose squares spread as is assumed."""
    model = network()
    optimizer = EKFAC(model, rank=10, damping=0.1, grafting=None, **OPTIONS)
    train(model, optimizer, 6)
    layer = optimizer.curvature["0"]
    least, mean = float(layer.values("A")[0, 1]), float(layer.values("A")[0, 0])
    shape = profile(layer, "A")[0]
    assert relative_error(shape.mean(), torch.ones(()).double()) < 1e-12
    power = least / mean - 1
    u = (torch.arange(16).double() + 0.5) / 16
    curve = u**power
    assert relative_error(shape, curve / curve.mean()) < 1e-12
    assert (shape[1:] >= shape[:-1]).all()
    assert shape[-1] * mean <= least * 1.1


@pytest.mark.parametrize("rank", [12, 0.3])
def test_per_example_scalings_are_means_over_the_parts(rank: float) -> None:
    x, y = data()
    model = network()
    optimizer = EKFAC(
        model, rank=rank, scaling="per_example", scaling_decay=0.0, **OPTIONS
    )
    train(model, optimizer, 6)
    for name in ("0", "2", "4"):
        gradients = example_gradients(model, name, x[:8], y[:8])
        layer = optimizer.curvature[name]
        expected = torch.stack([dense_roots(layer, g).square() for g in gradients])
        optimizer.zero_grad()
        before = copy.deepcopy(model.state_dict())
        cross_entropy(model(x[:8]), y[:8]).backward()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.param_groups[0]["momentum"] = 0.0
        bases = [layer.basis(side).clone() for side in ("G", "A")]
        optimizer.step()
        after = [layer.basis(side) for side in ("G", "A")]
        model.load_state_dict(before)
        if all(torch.equal(p, q) for p, q in zip(bases, after, strict=True)):
            found = layer.averages["s"].read()
            assert relative_error(found[0], expected.mean(dim=0)) < 1e-10
            break
    else:
        pytest.fail("every basis was refreshed at the step that was looked at")


def test_the_complement_is_measured_to_single_precision() -> None:
    """Of a gradient nearly all of which is in the kept directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 500))
    intervals: dict[str, Any] = {"factor_interval": 1, "basis_interval": 1}
    optimizer = EKFAC(model, lr=0.0, rank=4, grafting="sgd", **intervals)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(50, 700)).square().sum().backward()
        optimizer.step()
    layer = optimizer.curvature["0"]
    U_G, U_A = layer.basis("G"), layer.basis("A")
    inside = U_G @ torch.randn(1, 4, 4) @ U_A.mT
    rows = Workspace().take_rows("gradient", layer.block.shape, inside)
    rows.copy_(inside + 2e-5 * torch.randn(layer.block.shape))
    found = coordinates(layer, rows).roots
    left, right = U_G[0].double(), U_A[0].double()
    one = torch.eye(500) - left @ left.mT, torch.eye(701) - right @ right.mT
    part = one[0] @ rows[0].double() @ one[1]
    expected = part.square().sum() / (496 * 697)
    # A difference of sums of squares: their rounding is that of the whole.
    whole = float(rows.double().square().sum()) / (496 * 697)
    rounding = 16 * torch.finfo(torch.float32).eps * whole
    assert rounding < 0.3 * float(expected)
    assert float(found[0, 0, 0].square()) == pytest.approx(
        float(expected), abs=rounding
    )


def test_grafted_steps_have_their_length_in_single_precision() -> None:
    """Also where nothing but rounding errors of the gradient lies in the complement."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(500, 400))
    optimizer = EKFAC(model, lr=1.0, rank=8, momentum=0.0, damping=1e-4)
    x = torch.randn(2, 500)  # gradients of rank 2
    for _ in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        moved = [
            p.detach() - b for p, b in zip(model.parameters(), before, strict=True)
        ]
        size = torch.cat([m.flatten() for m in moved]).double().square().mean().sqrt()
        assert float(size) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("width", [66, 6])
def test_shared_positions_are_summed_before_squaring(
    thin: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the gradients of the examples, and without them."""
    monkeypatch.setattr(truncated, "_thin_is_cheaper", lambda *_: thin)
    monkeypatch.setattr(truncated, "BUDGET", 2000)  # a few examples at a time
    torch.manual_seed(0)
    model = convolutional(width)
    x, y = torch.randn(6, 8, 3, 3, dtype=torch.float64), torch.randint(5, (6,))
    optimizer = per_example(model, x, y)
    layer = optimizer.curvature["0"]
    gradients = example_gradients(model, "0", x, y)
    expected = torch.stack([dense_roots(layer, g).square() for g in gradients])
    found = layer.averages["s"].read()
    assert found is not None
    assert relative_error(found[0], expected.mean(dim=0)) < 1e-10


def test_all_directions_kept_is_the_full_basis() -> None:
    """A share so small that none is left out."""
    losses = []
    # So many that the factors have full rank from the first step, and that no full
    # basis is too dear to be found as early as a truncated one.
    x, y = data(3000)
    for rank in (None, 1e-12):
        model, losses_of = network(), []
        options = {**OPTIONS, "basis_tolerance": 0.0, "precision": "full"}
        optimizer = EKFAC(model, rank=rank, max_aspect=math.inf, **options)
        for _ in range(12):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses_of.append(loss.detach())
        losses.append(torch.stack(losses_of))
    assert relative_error(losses[1], losses[0]) < 1e-8


def test_groups_have_bases_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(140, 132, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(528, 5)
    ).double()
    x, y = torch.randn(6, 140, 2, 2, dtype=torch.float64), torch.randint(5, (6,))
    optimizer = per_example(model, x, y)
    layer = optimizer.curvature["0"]
    gradients = []
    for n in range(6):
        model.zero_grad()
        with optimizer.capture.paused():
            cross_entropy(model(x[n : n + 1]), y[n : n + 1]).backward()
        weight = model[0].weight.grad.flatten(1).reshape(2, 66, 70)
        bias = model[0].bias.grad.reshape(2, 66, 1)
        gradients.append(torch.cat([weight, bias], dim=-1))
    found = layer.averages["s"].read()
    assert found is not None
    assert found.shape == (2, 10, 10)
    for block in range(2):
        left, right = (layer.basis(side)[block] for side in ("G", "A"))
        whole = [Q @ Q.mT for Q in (left, right)]
        inner = [(left.mT @ g[block] @ right).square() for g in gradients]
        assert relative_error(found[block, 1:, 1:], torch.stack(inner).mean(0)) < 1e-10
        rest = [torch.eye(len(P)).double() - P for P in whole]
        outer = [
            (rest[0] @ g[block] @ rest[1]).square().sum() / (57 * 62) for g in gradients
        ]
        assert relative_error(found[block, 0, 0], torch.stack(outer).mean()) < 1e-10


@pytest.mark.parametrize("ready", [False, True])
def test_a_failed_refresh_keeps_the_basis_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, ready: bool
) -> None:
    model = network()
    optimizer = EKFAC(model, rank=12, scaling_decay=0.95, **OPTIONS)
    if ready:
        train(model, optimizer, 3)
    before = [layer.basis("A").clone() for layer in optimizer.curvature.values()]

    def fails(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(truncated, "subspace", fails)
    losses = train(model, optimizer, 5)
    assert losses.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.counters.kept > 0
    after = [layer.basis("A") for layer in optimizer.curvature.values()]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    monkeypatch.undo()
    train(model, optimizer, 4)
    assert optimizer.curvature["0"].basis("A").shape == (1, 81, 12)


def test_a_refresh_that_fails_in_single_precision_is_done_in_double(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network().float()
    optimizer = EKFAC(model, rank=12, scaling_decay=0.95, **OPTIONS)
    whole = truncated.subspace

    def fails(factor: Tensor, *rest: Any) -> Any:
        if factor.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return whole(factor, *rest)

    monkeypatch.setattr(truncated, "subspace", fails)
    x, y = data()
    cross_entropy(model(x.float()), y).backward()
    optimizer.step()
    assert optimizer.counters.retried == optimizer.counters.decomposed == 6
    assert optimizer.curvature["0"].basis("A").dtype == torch.float32


def test_diagnostics_see_a_completed_basis(
    trained: tuple[nn.Sequential, EKFAC], tmp_path: Path
) -> None:
    model, optimizer = trained
    x, y = data()
    layer = optimizer.curvature["4"]
    names = layer.parameter_names
    with optimizer.capture.paused():
        F = ekfac.fisher(model, [(x, y)], "dense", "empirical", parameters=names)
    found = basis_quality(layer, F.to_dense())
    assert 0 < found.ekfac_error < 1
    F_hat = optimizer.curvature.matrix("ekfac").to_dense()
    size = layer.block.shape[1] * layer.block.shape[2]
    error = relative_error(F_hat[-size:, -size:], F.to_dense())
    assert abs(found.ekfac_error - error) < 1e-9
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    subject = read_subject(tmp_path / "state.pt")
    for name, live in optimizer.curvature.items():
        saved = subject.layers[name]
        assert torch.equal(saved.s, live.s)
        assert torch.equal(saved.eigenvalues_A, live.eigenvalues_A)
        assert relative_error(saved.Q_A, live.Q_A) < 1e-12
        assert relative_error(saved.Q_G, live.Q_G) < 1e-12


def test_scalings_move_like_the_matrix_they_stand_for() -> None:
    generator = torch.Generator().manual_seed(0)
    d = 9

    def columns(r: int) -> Tensor:
        start = torch.randn(1, d, r, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(start).Q

    for before, after in ((3, 4), (0, 2), (4, 2), (9, 3), (3, 9)):
        old, new = columns(before), columns(after)
        s = torch.rand(before + int(before < d), generator=generator).double()
        rest = torch.eye(d).double() - old[0] @ old[0].mT
        C = old[0] @ torch.diag(s[int(before < d) :]) @ old[0].mT
        C = C + (s[0] * rest if before < d else 0)
        moved = s @ overlap(old, new)[0]
        kept = (new[0].mT @ C @ new[0]).diagonal()
        assert relative_error(moved[int(after < d) :], kept) < 1e-12
        if after < d:
            others = (C.trace() - kept.sum()) / (d - after)
            assert relative_error(moved[0], others) < 1e-12


def test_block_iteration_finds_leading_eigenvectors() -> None:
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(2, 50, 50, dtype=torch.float64)).Q
    values = torch.logspace(0, -6, 50, dtype=torch.float64)
    C = Q * values @ Q.mT
    start = torch.randn(2, 50, 12, dtype=torch.float64)
    found, vectors = leading(C, start, 8)
    assert relative_error(found[:, -5:], values[:5].flip(0).expand(2, -1)) < 1e-8
    assert (
        relative_error(vectors.mT @ vectors, torch.eye(12).double().expand(2, -1, -1))
        < 1e-12
    )
    assert (C @ vectors[..., -5:] - vectors[..., -5:] * found[:, None, -5:]).norm() < (
        1e-4 * C.norm()
    )
    # Dependent columns still give orthonormal ones.
    twice = torch.cat([start[..., :3], start[..., :3]], dim=-1)
    basis = orthonormal_columns(twice)
    assert (
        relative_error(basis.mT @ basis, torch.eye(6).double().expand(2, -1, -1))
        < 1e-10
    )


@pytest.mark.parametrize("rank", [0.9, 0.5, 7])
def test_the_rank_follows_the_spectrum(rank: float) -> None:
    d = 200
    values = torch.logspace(0, -3, d, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    C = (Q * values @ Q.mT)[None]
    old = C.new_zeros(1, d, 0)
    for seed in range(12):
        found, old = subspace(C, old, rank, seed)
    above = int((values > rank * values.mean()).sum())
    count = old.shape[-1]
    if isinstance(rank, int):
        assert count == rank
    else:  # at the threshold itself the iteration may miss one or the other
        assert abs(count - above) <= 0.05 * above
    top = values[:count].flip(0)
    assert relative_error(found[0, 1:], top) < 2e-2
    assert relative_error(
        found[0, 1:].sum() + found[0, 0] * (d - count), C[0].trace()
    ) < (1e-10)


@pytest.mark.parametrize("rank", [10, 0.2])
def test_it_resumes_bit_for_bit(rank: float) -> None:
    model = network()
    optimizer = EKFAC(model, rank=rank, **OPTIONS)
    train(model, optimizer, 7)
    other, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    resumed = EKFAC(other, rank=rank, **OPTIONS)
    resumed.load_state_dict(state)
    first, second = train(model, optimizer, 9), train(other, resumed, 9)
    assert torch.equal(first, second)
    assert all(
        torch.equal(p, q)
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("rank", [10, 0.2])
def test_a_distributed_checkpoint_is_loaded_in_the_saved_shapes(
    rank: float, tmp_path: Path
) -> None:
    model = network()
    optimizer = EKFAC(model, rank=rank, **OPTIONS)
    train(model, optimizer, 7)
    dcp.save({"all": DistributedState(optimizer)}, checkpoint_id=tmp_path)
    other = copy.deepcopy(model)
    resumed = EKFAC(other, rank=rank, **OPTIONS)
    assert resumed.curvature["0"].basis("A").shape == (1, 81, 0)
    dcp.load({"all": DistributedState(resumed)}, checkpoint_id=tmp_path)
    assert str(resumed.describe()) == str(optimizer.describe())
    assert torch.equal(train(model, optimizer, 9), train(other, resumed, 9))
    full = EKFAC(network(), max_aspect=99.0, **OPTIONS)
    with pytest.raises(StateMismatchError, match=r"curvature\.0\..*rank"):
        dcp.load({"all": DistributedState(full)}, checkpoint_id=tmp_path)
    assert not any(layer.ready for layer in full.curvature.values())


def test_a_state_of_another_kind_is_refused(
    trained: tuple[nn.Sequential, EKFAC],
) -> None:
    _, optimizer = trained
    full = EKFAC(network(), **OPTIONS)
    kept = {
        k: v.clone() for k, v in full.curvature["0"].state_dict().items() if k == "A"
    }
    with pytest.raises(StateMismatchError, match=r"curvature\.0\..*rank"):
        full.load_state_dict(optimizer.state_dict())
    assert torch.equal(full.curvature["0"].averages["A"].total, kept["A"])
    broken = copy.deepcopy(optimizer.state_dict())
    broken["curvature"]["2"]["s"] = broken["curvature"]["2"]["s"][:, 1:]
    with pytest.raises(StateMismatchError, match=r"'curvature\.2\.s'"):
        EKFAC(network(), rank=12, **OPTIONS).load_state_dict(broken)


def test_the_matrix_completes_the_basis(trained: tuple[nn.Sequential, EKFAC]) -> None:
    _, optimizer = trained
    layer = optimizer.curvature["0"]
    s = layer.averages["s"].read()
    assert s is not None
    left, right = projectors(layer, "G"), projectors(layer, "A")
    F = optimizer.curvature.matrix("ekfac", parameters=optimizer.model)
    gradient = torch.randn(70, 81, dtype=torch.float64)
    tensors = {n: torch.zeros_like(p) for n, p in optimizer.model.named_parameters()}
    tensors["0.weight"], tensors["0.bias"] = gradient[:, :-1], gradient[:, -1]
    vector = ParameterVector(tensors)
    image = F @ vector
    found = torch.cat([image["0.weight"], image["0.bias"][:, None]], dim=1)
    expected = sum(
        s[0, i, j] * P @ gradient @ R
        for i, P in enumerate(left)
        for j, R in enumerate(right)
    )
    assert relative_error(found, expected) < 1e-10


def test_it_needs_less_memory_and_says_so(trained: tuple[nn.Sequential, EKFAC]) -> None:
    _, optimizer = trained
    full = EKFAC(network(), **OPTIONS)
    assert optimizer.curvature["0"].bytes() < 0.7 * full.curvature["0"].bytes()
    text = str(optimizer.describe())
    assert "EKFAC, 12 of 70 x 12 of 81" in text
    assert "EKFAC, 5 of 5 x 12 of 67" in text


@pytest.mark.parametrize("rank", [0, -1, 1.0, 1.5, True, "all"])
def test_other_ranks_are_refused(rank: Any) -> None:
    with pytest.raises(ValueError, match="Invalid rank"):
        EKFAC(network(), rank=rank)


def test_kfac_has_no_rank() -> None:
    with pytest.raises(TypeError, match="rank"):
        KFAC(network(), rank=3)  # type: ignore[call-arg]


def test_truncation_error_is_zero_where_nothing_is_left_out() -> None:
    model = network()
    # The bound below is of scalings averaged over twenty steps.
    optimizer = EKFAC(model, rank=1e-12, scaling_decay=0.95, **OPTIONS)
    train(model, optimizer, 6)
    layer = optimizer.curvature["0"]
    gradient = torch.randn(layer.block.shape, dtype=torch.float64)
    found = truncation_error(layer, gradient, 0.03)
    if layer.complement("A") == 0:
        assert found.error < 1e-9
        assert found.outside < 1e-9
    else:  # directions that no input ever had
        assert found.rank_A < 81
        assert found.error < 0.5


def test_truncation_error_falls_with_the_rank() -> None:
    errors = []
    for rank in (2, 8, 24):
        model = network()
        optimizer = EKFAC(model, rank=rank, **OPTIONS)
        train(model, optimizer, 9)
        layer = optimizer.curvature["0"]
        x, y = data()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        gradient = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        found = truncation_error(layer, gradient[None], 0.03)
        assert (found.rank_G, found.rank_A) == (rank, rank)
        errors.append(found.error)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5
    with pytest.raises(ValueError, match=r"\[1, 70, 81\], got \[70, 81\]"):
        truncation_error(layer, gradient, 0.03)
    full = EKFAC(network(), **OPTIONS)
    with pytest.raises(ValueError, match="full basis"):
        truncation_error(full.curvature["0"], gradient[None], 0.03)
    with pytest.raises(NotReadyError, match="no scalings"):
        truncation_error(EKFAC(network(), rank=4).curvature["0"], gradient[None], 0.03)


# -- matrices estimated in truncated bases ---------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("width", [66, 6])
def test_an_estimate_is_exact_in_the_directions_that_it_keeps(
    kind: str, width: int
) -> None:
    torch.manual_seed(0)
    model = convolutional(width)
    x, y = torch.randn(12, 8, 3, 3, dtype=torch.float64), torch.randint(5, (12,))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    chosen: dict[str, Any] = {"kind": kind, "parameters": ["0"]}
    found = ekfac.fisher(model, batches, "ekfac", rank=4, **chosen)
    exact = ekfac.fisher(model, batches, "dense", **chosen).to_dense()
    block = found.blocks["0"]
    basis = {side: block.factor(f"Q_{side}")[0] for side in "GA"}
    last = {side: basis[side][:, -4:] for side in "GA"}
    assert not torch.allclose(block.factor("s")[0, 0, 0], block.factor("s")[0, -1, -1])
    for i in range(4):
        for j in range(4):
            kept = torch.outer(last["G"][:, i], last["A"][:, j])
            names = ("0.weight", "0.bias")
            parts = (kept[:, :-1].reshape(width, 8, 3, 3), kept[:, -1])
            flat = torch.cat([p.flatten() for p in parts])
            expected = flat @ exact @ flat
            vector = ParameterVector(dict(zip(names, parts, strict=True)))
            assert float(found.quadratic(vector)) == pytest.approx(float(expected))
    assert float(found.trace()) == pytest.approx(float(exact.trace()), rel=1e-10)
    entries = block.factor("s")[0]
    if width > 64:  # all directions that a side leaves out have one scaling
        assert torch.equal(entries[0], entries[width - 5])
    assert torch.equal(entries[:, 0], entries[:, 73 - 5])
    error = torch.linalg.matrix_norm(found.to_dense() - exact)
    full = ekfac.fisher(model, batches, "ekfac", **chosen).to_dense()
    assert error < torch.linalg.matrix_norm(exact)
    assert error >= torch.linalg.matrix_norm(full - exact)
    damped = found.solve(flat, 0.1)
    torch.testing.assert_close(found @ damped + 0.1 * damped, flat)


def test_an_estimate_that_keeps_all_is_the_full_one() -> None:
    x, y = data(300)
    model = network()
    found = ekfac.fisher(model, [(x, y)], "ekfac", rank=1e-12)
    full = ekfac.fisher(model, [(x, y)], "ekfac")
    vector = torch.randn(full.shape[0], dtype=torch.float64)
    torch.testing.assert_close(found @ vector, full @ vector)


def test_a_ggn_takes_a_rank() -> None:
    x, y = data()
    model = network()
    found = ekfac.ggn(model, [(x, y)], nn.CrossEntropyLoss(), rank=5)
    expected = ekfac.ggn(model, [(x, y)], nn.CrossEntropyLoss(), "diagonal")
    assert float(found.trace()) == pytest.approx(float(expected.trace()), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1.5, "all"])
def test_an_estimate_refuses_other_ranks(rank: Any) -> None:
    with pytest.raises(ValueError, match="Invalid rank"):
        ekfac.fisher(network(), [data()], rank=rank)


def test_a_rank_needs_an_eigenbasis() -> None:
    with pytest.raises(ValueError, match="structure='ekfac' alone"):
        ekfac.fisher(network(), [data()], "kfac", rank=3)
