"""Decompositions that never stop training, and scalings that move with their basis."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC, LayerCurvature
from ekfac.curvature import Counters, eigenbasis
from ekfac.curvature.eigenbasis import (
    decompose,
    fits,
    off_diagonal,
    refresh_,
    transport,
)
from ekfac.optim.optimizer import KroneckerOptimizer

ATTEMPTS = 4
few = settings(max_examples=15)
seeds = st.integers(0, 2**16)


def covariance(*shape: int) -> Tensor:
    rows = torch.randn(*shape, 3 * shape[-1])
    return rows @ rows.transpose(-1, -2) / rows.shape[-1]


def rotations(blocks: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(blocks, size, size)).Q


class Failing:
    """``torch.linalg.eigh`` that fails the first ``times`` calls."""

    def __init__(self, times: float) -> None:
        self.times, self.calls = times, 0
        self._original = torch.linalg.eigh

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return self._original(*args)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Failing]:
    def start(times: float) -> Failing:
        failing = Failing(times)
        monkeypatch.setattr(torch.linalg, "eigh", failing)
        return failing

    return start


# -- the ladder ------------------------------------------------------------------------


@pytest.mark.parametrize("failures", range(ATTEMPTS + 1))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ladder(
    failures: int, dtype: torch.dtype, fail: Callable[[float], Failing]
) -> None:
    factor, counters = 1e-6 * covariance(2, 5).to(dtype), Counters()
    failing = fail(failures)
    result = decompose(factor, counters)
    assert failing.calls == min(failures + 1, ATTEMPTS)
    if failures == ATTEMPTS:
        assert result is None
        assert counters == Counters(kept=1)
        return
    assert result is not None
    values, vectors = result
    assert counters == Counters(decomposed=1, retried=int(failures > 0))
    assert values.dtype == vectors.dtype == dtype
    assert (values[:, 1:] >= values[:, :-1]).all(), "eigenvalues ascend"
    again = (vectors * values.unsqueeze(-2)) @ vectors.transpose(-1, -2)
    eps = torch.finfo(dtype).eps
    assert support.relative_error(again, factor) < 100 * eps
    unit = vectors.transpose(-1, -2) @ vectors
    assert float((unit - torch.eye(5, dtype=dtype)).abs().max()) < 100 * eps


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_factor_that_is_not_finite_has_no_basis(
    value: float, place: tuple[int, int]
) -> None:
    factor, counters = covariance(1, 4), Counters()
    factor[0, place[0], place[1]] = factor[0, place[1], place[0]] = value
    assert decompose(factor, counters) is None
    assert counters == Counters(kept=1)


def test_a_zero_factor_has_a_basis() -> None:
    found = decompose(torch.zeros(2, 3, 3), Counters())
    assert found is not None
    values, vectors = found
    assert values.abs().max() == 0
    torch.testing.assert_close(
        vectors.transpose(-1, -2) @ vectors, torch.eye(3).expand(2, 3, 3)
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_an_ill_conditioned_factor_has_a_basis(scale: float) -> None:
    sizes = torch.logspace(-12, 0, 8) * scale
    Q = rotations(1, 8)[0]
    factor = ((Q * sizes) @ Q.t()).unsqueeze(0)
    found = decompose(factor, Counters())
    assert found is not None
    values, vectors = found
    assert torch.isfinite(values).all()
    assert (values >= 0).all(), "rounding leaves no negative eigenvalue"
    torch.testing.assert_close(values[0, -1], sizes[-1], rtol=1e-5, atol=0)
    mass, _ = off_diagonal(factor / scale, vectors)
    assert mass < 1e-6


@pytest.mark.parametrize("angle", [1e-3, 0.02, 0.3])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.usefixtures("float64")
def test_fits_decides_by_the_mass_of_the_whole(angle: float, order: int) -> None:
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(24, 24))
    generator = torch.randn(24, 24)
    turn = torch.linalg.matrix_exp(angle * (generator - generator.t()))
    values = torch.logspace(-6 * order, 2 * order, 24)
    factor = (basis @ turn * values) @ (basis @ turn).t()
    rotated = basis.t() @ factor @ basis
    mass = float((rotated - rotated.diag().diag()).norm() / rotated.norm())
    for tolerance in (1.01 * mass, 2 * mass):
        found = fits(factor[None, None], basis[None, None], tolerance)[0]
        assert found is not None
        torch.testing.assert_close(found[0], rotated.diag())
    for tolerance in (0.5 * mass, 0.99 * mass, 0.0):
        assert fits(factor[None, None], basis[None, None], tolerance) == [None]


@pytest.mark.usefixtures("float64")
def test_fits_decides_for_each_factor() -> None:
    """Of several factors, of very different sizes, each is judged for itself."""
    torch.manual_seed(0)
    bases = torch.linalg.qr(torch.randn(3, 2, 16, 16)).Q
    values = torch.rand(3, 2, 16).sort(dim=-1).values + 0.1
    values *= torch.tensor([1e-200, 1.0, 1e200])[:, None, None]
    factors = (bases * values.unsqueeze(-2)) @ bases.mT
    off = torch.randn(16, 16)
    factors[1, 1] += 0.1 * (off + off.t())  # in one block of one
    first, second, third = fits(factors, bases, 1e-3)
    assert second is None
    torch.testing.assert_close(first, values[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(third, values[2], rtol=1e-10, atol=0)


def test_off_diagonal_mass() -> None:
    factor = covariance(3, 4).double()
    values, vectors = torch.linalg.eigh(factor)
    mass, diagonal = off_diagonal(factor, vectors)
    assert mass < 1e-7  # the root of a difference of squares
    torch.testing.assert_close(diagonal, values)
    basis = rotations(3, 4).double()
    rotated = basis.transpose(-1, -2) @ factor @ basis
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    mass, diagonal = off_diagonal(factor, basis)
    assert mass == pytest.approx(float(rest.norm() / factor.norm()))
    torch.testing.assert_close(diagonal, rotated.diagonal(dim1=-2, dim2=-1))


# -- training goes on ------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


def batch(examples: int = 32) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 2, 4)
    return x, (x[:, 0, 0] > 0).long() + (x[:, 1, 1] > 0).long()


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor]
) -> float:
    optimizer.zero_grad()
    loss = cross_entropy(model(data[0]), data[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def bases(optimizer: KroneckerOptimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{side}": basis.clone()
        for name, layer in optimizer.curvature.items()
        for side in "AG"
        if (basis := layer.basis(side)) is not None
    }


METHODS: dict[str, Callable[..., KroneckerOptimizer]] = {
    "KFAC": KFAC,
    "EKFAC": EKFAC,
    "EKFAC per_example": lambda *args, **options: EKFAC(
        *args, scaling="per_example", **options
    ),
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_training_keeps_the_old_basis_where_decompositions_fail(
    method: str, fail: Callable[[float], Failing]
) -> None:
    model = network()
    optimizer = METHODS[method](model, lr=3e-2, basis_interval=1, basis_tolerance=0.0)
    losses = [step(model, optimizer, batch()) for _ in range(3)]
    before, counters = bases(optimizer), copy.copy(optimizer.counters)
    assert counters.kept == counters.retried == 0
    fail(float("inf"))
    losses += [step(model, optimizer, batch()) for _ in range(30)]
    assert optimizer.counters.kept == 30 * len(before)
    assert optimizer.counters.decomposed == counters.decomposed
    for name, basis in bases(optimizer).items():
        assert torch.equal(basis, before[name]), name
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@every_method
def test_training_survives_a_first_decomposition_that_fails(
    method: str, fail: Callable[[float], Failing]
) -> None:
    """The first basis is then the identity, and is left at the next refresh."""
    model = network()
    optimizer = METHODS[method](model, lr=3e-2, basis_interval=1)
    failing = fail(float("inf"))
    first = step(model, optimizer, batch())
    for name, basis in bases(optimizer).items():
        eye = torch.eye(basis.shape[-1]).expand_as(basis)
        assert torch.equal(basis, eye), name
    failing.times = 0
    losses = [step(model, optimizer, batch()) for _ in range(30)]
    assert optimizer.counters.decomposed > 0
    assert sum(losses[-3:]) / 3 < 0.8 * first


@every_method
@pytest.mark.parametrize("side", ["A", "G"])
def test_training_survives_a_factor_of_nans(method: str, side: str) -> None:
    model = network()
    optimizer = METHODS[method](model, lr=1e-2, basis_interval=1, factor_interval=50)
    for _ in range(12):
        step(model, optimizer, batch())
    layer, before = optimizer.curvature["4"], bases(optimizer)
    layer.averages[side].total.fill_(torch.nan)
    losses = [step(model, optimizer, batch()) for _ in range(20)]
    assert optimizer.counters.kept == 20
    assert torch.equal(bases(optimizer)[f"4.{side}"], before[f"4.{side}"])
    assert torch.isfinite(torch.tensor(losses)).all()
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
    assert losses[-1] < losses[0]


@every_method
@pytest.mark.parametrize("damping", [0.03, 0.0])
def test_training_survives_factors_of_zeros(method: str, damping: float) -> None:
    """A layer that is dead for some time: zero gradients, then it comes to life."""
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    alive = linear.bias.detach().clone()
    with torch.no_grad():
        linear.bias.fill_(-100.0)
    optimizer = METHODS[method](model, lr=2e-2, damping=damping, momentum=0.0)
    losses = []
    for i in range(40):
        if i == 3:
            with torch.no_grad():
                linear.bias.copy_(alive)
        x, y = batch()
        losses.append(step(model, optimizer, (x.flatten(1), y)))
        for parameter in model.parameters():
            assert torch.isfinite(parameter).all()
    assert sum(losses[-5:]) < 0.9 * sum(losses[3:8])


@every_method
def test_training_survives_ill_conditioned_inputs(method: str) -> None:
    model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    sizes = torch.logspace(-12, 4, 8)
    optimizer = METHODS[method](model, lr=3e-2, basis_interval=1)
    losses = []
    for _ in range(30):
        x, y = batch()
        losses.append(step(model, optimizer, (x.flatten(1) * sizes, y)))
    assert optimizer.counters.decomposed > 0
    for parameter in model.parameters():
        assert torch.isfinite(parameter).all()
    assert torch.isfinite(torch.tensor(losses)).all()


# -- batches that are not finite -------------------------------------------------------


@every_method
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_leaves_the_averages(
    method: str, fisher: str, value: float
) -> None:
    model = network()
    optimizer = METHODS[method](model, lr=1e-3, fisher=fisher, basis_interval=1)
    for _ in range(3):
        step(model, optimizer, batch())
    averages = {
        (name, key): (average.total.clone(), average.weight.clone())
        for name, layer in optimizer.curvature.items()
        for key, average in layer.averages.items()
    }
    x, y = batch()
    x[3, 1, 2] = value
    step(model, optimizer, (x, y))
    assert optimizer.counters.rejected > 0
    for name, layer in optimizer.curvature.items():
        if value == torch.inf and name != "0":
            continue  # its tanh is 1: the layers behind it see nothing of it
        for key, average in layer.averages.items():
            total, weight = averages[name, key]
            assert torch.equal(average.weight, weight), (name, key)
            if key != "s":
                assert torch.equal(average.total, total), (name, key)
    for bank in optimizer.curvature.banks:
        assert torch.isfinite(bank).all()


@every_method
def test_a_batch_that_is_not_finite_leaves_the_scalings(method: str) -> None:
    """Bit for bit, at a step that does not refresh the basis they are taken in."""
    model = network()
    optimizer = METHODS[method](model, lr=1e-3)
    for _ in range(3):  # the fourth step refreshes nothing
        step(model, optimizer, batch())
    banks = [bank.clone() for bank in optimizer.curvature.banks]
    x, y = batch()
    x[3, 1, 2] = torch.nan
    step(model, optimizer, (x, y))
    for found, bank in zip(optimizer.curvature.banks, banks, strict=True):
        assert torch.equal(found, bank)


@every_method
def test_an_overflowed_step_of_a_scaler_leaves_everything(method: str) -> None:
    """And the next step is that of a run that never saw the batch."""
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    data = [batch() for _ in range(15)]  # steps past the tenth take no factors
    runs = []
    for model, overflows in zip(models, (False, True), strict=True):
        optimizer = METHODS[method](model, lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for i, (x, y) in enumerate(data):
            if overflows and i in (0, 3, 12):
                before = copy.deepcopy(model.state_dict())
                banks = [bank.clone() for bank in optimizer.curvature.banks]
                loss = cross_entropy(model(torch.full_like(x, torch.inf)), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update(4.0)
                for name, value in model.state_dict().items():
                    assert torch.equal(value, before[name])
                for bank, old in zip(optimizer.curvature.banks, banks, strict=True):
                    assert torch.equal(bank, old)
                model.zero_grad()
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update(4.0)
        runs.append(optimizer)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    for mine, theirs in zip(
        runs[0].curvature.banks, runs[1].curvature.banks, strict=True
    ):
        assert torch.equal(mine, theirs)


# -- transport -------------------------------------------------------------------------


def dense(Q_G: Tensor, Q_A: Tensor, scalings: Tensor) -> Tensor:
    """Return ``Q diag(s) Q^T`` of every block."""
    Q = support.kron(Q_G, Q_A)
    return (Q * scalings.flatten(1).unsqueeze(-2)) @ Q.transpose(-1, -2)


@few
@given(
    seed=seeds,
    blocks=st.integers(1, 3),
    d_out=st.integers(1, 4),
    d_in=st.integers(1, 5),
    shared=st.booleans(),
)
@pytest.mark.usefixtures("float64")
def test_transport_is_the_diagonal_in_the_new_basis(
    seed: int, blocks: int, d_out: int, d_in: int, shared: bool
) -> None:
    """``diag(Q_new^T Q_old diag(s) Q_old^T Q_new)``; it keeps the trace."""
    torch.manual_seed(seed)
    blocks_in = 1 if shared else blocks
    old = rotations(blocks, d_out), rotations(blocks_in, d_in)
    new = rotations(blocks, d_out), rotations(blocks_in, d_in)
    scalings = torch.rand(blocks, d_out, d_in)
    R_G, R_A = (p.transpose(-1, -2) @ q for p, q in zip(old, new, strict=True))
    found = transport(scalings, R_G, R_A)
    Q = support.kron(*new)
    projected = Q.transpose(-1, -2) @ dense(*old, scalings) @ Q
    expected = projected.diagonal(dim1=-2, dim2=-1).reshape(scalings.shape)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.sum((1, 2)), scalings.sum((1, 2)))
    # The nearest diagonal: what is left is orthogonal to every diagonal matrix.
    rest = dense(*old, scalings) - dense(*new, found)
    other = dense(*new, torch.rand_like(found))
    assert float((rest * other).sum()) == pytest.approx(0, abs=1e-10)


@few
@given(seed=seeds, d_out=st.integers(1, 5), d_in=st.integers(1, 6))
def test_transport_follows_signs_and_order(seed: int, d_out: int, d_in: int) -> None:
    """To the bit, since the overlaps are zeros and signed ones."""
    torch.manual_seed(seed)
    scalings = torch.rand(1, d_out, d_in)
    orders = torch.randperm(d_out), torch.randperm(d_in)
    turns = [
        (torch.eye(len(order))[:, order] * (2.0 * torch.randint(2, order.shape) - 1))
        for order in orders
    ]
    found = transport(scalings, turns[0][None], turns[1][None])
    assert torch.equal(found, scalings[:, orders[0]][..., orders[1]])
    assert torch.equal(transport(scalings, None, None), scalings)


def refreshed(seed: int, tilt: float) -> tuple[LayerCurvature, Tensor, Tensor]:
    """Return a layer after a refresh, and its old and new blocks, materialised."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(18, 3))
    optimizer = EKFAC(model, scaling="per_example")
    x, y = torch.randn(40, 4, 4), torch.randint(3, (40,))
    step(model, optimizer, (x, y))
    layer = optimizer.curvature["0"]
    assert layer.s is not None
    before = support.ekfac_blocks(layer)
    for key in ("A", "G"):
        average = layer.averages[key]
        noise = covariance(*average.total.shape[:-1])
        scale = average.total.diagonal(dim1=-2, dim2=-1).mean()
        average.total.add_(tilt * scale * noise)
    refresh_([layer], 2, 0.0, Counters())
    return layer, before, support.ekfac_blocks(layer)


@few
@given(seed=seeds, tilt=st.sampled_from([0.0, 1e-3, 0.1, 10.0]))
@pytest.mark.usefixtures("float64")
def test_refresh_transports(seed: int, tilt: float) -> None:
    """The new scalings are the old matrix's diagonal in the new basis."""
    layer, old, new = refreshed(seed, tilt)
    Q = support.kron(support.dense_basis(layer, "G"), support.dense_basis(layer, "A"))
    projected = (Q.transpose(-1, -2) @ old @ Q).diagonal(dim1=-2, dim2=-1)
    assert layer.s is not None
    torch.testing.assert_close(
        layer.s.flatten(1), projected, rtol=1e-11, atol=float(1e-13 * projected.max())
    )
    traces = (blocks.diagonal(dim1=-2, dim2=-1).sum(-1) for blocks in (old, new))
    torch.testing.assert_close(*traces)
    if tilt == 0:  # the same factors: the same basis up to signs, nothing is lost
        torch.testing.assert_close(old, new)


@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.usefixtures("float64")
def test_scalings_stay_the_second_moment_through_refreshes(interval: int) -> None:
    """At fixed weights and data every refresh only turns signs: nothing is lost."""
    model, (x, y) = network(), batch()
    optimizer = EKFAC(
        model,
        lr=0.0,
        scaling="per_example",
        basis_interval=interval,
        basis_tolerance=0.0,
    )
    for _ in range(9):
        step(model, optimizer, (x, y))
    for layer in optimizer.curvature.values():
        with support.paused(optimizer):
            examples = support.example_gradients(
                model, layer, lambda: cross_entropy(model(x), y, reduction="none")
            )
        Q_G, Q_A = support.dense_basis(layer, "G"), support.dense_basis(layer, "A")
        projected = (Q_G.transpose(-1, -2) @ examples @ Q_A).square().mean(dim=0)
        assert layer.s is not None
        assert support.relative_error(layer.s, projected) < 1e-10, layer.name


# -- together, as on a CUDA device -----------------------------------------------------


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of CUDA tensors: factors of one size at once, from old bases."""
    monkeypatch.setattr(eigenbasis, "grouped", lambda _: True)
    monkeypatch.setattr(eigenbasis, "follows", lambda _, bound: bound > 0)


def off(optimizer: KroneckerOptimizer) -> dict[str, float]:
    """Return what is off the diagonal of ``Q^T C Q``, in float64."""
    found = {}
    for name, layer in optimizer.curvature.items():
        for side in ("A", "G"):
            C, Q = (getattr(layer, key).double() for key in (side, f"Q_{side}"))
            rotated = Q.mT @ C @ Q
            rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
            found[f"{name}.{side}"] = float(rest.norm() / C.norm())
    return found


def equal_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(6, 6, bias=i == 2) for i in range(4)))


def equal_step(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(40, 6)).square().sum(dim=1).mean().backward()
    optimizer.step()


@pytest.mark.usefixtures("together")
def test_factors_of_one_size_are_decomposed_together(
    fail: Callable[[float], Failing],
) -> None:
    model = equal_layers()
    optimizer = EKFAC(model, basis_tolerance=0.0)
    counted = fail(0)
    equal_step(model, optimizer)
    assert counted.calls == 2  # seven factors of 6 x 6, one of 7 x 7
    assert optimizer.counters == Counters(decomposed=8)
    assert max(off(optimizer).values()) < 1e-5


@pytest.mark.usefixtures("together")
def test_a_factor_that_cannot_be_decomposed_does_not_stop_the_others() -> None:
    model = equal_layers()
    optimizer = EKFAC(model, basis_interval=1, factor_interval=1000)
    equal_step(model, optimizer)
    before = bases(optimizer)
    for layer in optimizer.curvature.values():
        turn = torch.linalg.qr(torch.randn(6, 6)).Q
        layer.averages["G"].total.copy_(turn @ torch.diag(torch.rand(6)) @ turn.T)
    optimizer.curvature["1"].averages["G"].total.fill_(torch.nan)
    own = Counters()
    refresh_(list(optimizer.curvature.values()), 2, 0.0, own)
    assert own.kept == 1
    after, rest = bases(optimizer), off(optimizer)
    assert torch.equal(after["1.G"], before["1.G"])
    assert not torch.equal(after["0.G"], before["0.G"])
    assert max(value for name, value in rest.items() if name != "1.G") < 1e-5


@pytest.mark.usefixtures("together")
def test_refreshes_follow_the_old_basis() -> None:
    """And leave no more off the diagonal than is tolerated."""
    model = network()
    optimizer = EKFAC(model, lr=3e-2, basis_interval=1, factor_interval=1)
    losses = []
    for _ in range(30):
        losses.append(step(model, optimizer, batch()))
        assert max(off(optimizer).values()) < 0.0101  # the tolerance, of what is kept
    assert optimizer.counters.followed > 5
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    for basis in bases(optimizer).values():
        eye = torch.eye(basis.shape[-1])
        assert float((basis.mT @ basis - eye).abs().max()) < 1e-5
