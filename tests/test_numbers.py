"""Gradients of any size, spikes and zeros: right, or skipped and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC
from ekfac.curvature.statistics import finite_ones, is_finite
from ekfac.optim import DistributedState
from ekfac.optim.optimizer import KroneckerOptimizer

Pair = tuple[nn.Module, KroneckerOptimizer]


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 11)]
    return nn.Sequential(*layers).to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(64) % 11


METHODS: dict[str, tuple[type[KroneckerOptimizer], dict[str, Any]]] = {
    "KFAC": (KFAC, {}),
    "KFAC spectral": (KFAC, {"direction": "spectral"}),
    "EKFAC": (EKFAC, {}),
    "natural": (EKFAC, {"direction": "natural"}),
    "per example": (EKFAC, {"scaling": "per_example"}),
    "mc": (EKFAC, {"fisher": "mc"}),
}


def moves(method: str, scales: list[float], dtype: torch.dtype) -> list[Tensor]:
    """Return the change of the weights in each step with losses times ``scales``."""
    model = network(dtype)
    make, options = METHODS[method]
    optimizer = make(model, lr=1e-3, damping=1e-2, **options)
    x, y = data(dtype)
    result = []
    for scale in scales:
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        (cross_entropy(model(x), y) * scale).backward()
        optimizer.step()
        after = zip(model.parameters(), before, strict=True)
        result.append(torch.cat([(p.detach() - b).flatten() for p, b in after]))
    assert optimizer.counters.rejected == 0
    return result


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(exponent=st.integers(-20, 15))
def test_steps_do_not_depend_on_the_scale_of_the_loss(
    method: str, exponent: int
) -> None:
    """With grafting the step is that of the unscaled loss, in double precision."""
    # With mc the curvature is not that of the scaled loss, and damping is relative. The
    # type decides what is drawn: on torch 2.6, other labels altogether.
    precise = torch.float32 if method == "mc" else torch.float64
    found = moves(method, [10.0**exponent] * 3, torch.float32)
    expected = moves(method, [1.0] * 3, precise)
    for one, two in zip(found, expected, strict=True):
        gap = (one.double() - two).norm() / two.norm()
        assert gap < 5e-3, (exponent, float(gap))


@pytest.mark.parametrize("exponent", [-20, -10, 15])
@pytest.mark.parametrize("method", ["KFAC", "EKFAC", "per example"])
def test_bases_and_scalings_of_small_gradients(method: str, exponent: int) -> None:
    """``A``, ``G`` and the scalings are the squares of the scale times the plain."""
    result = []
    for scale, dtype in ((10.0**exponent, torch.float32), (1.0, torch.float64)):
        model = network(dtype)
        make, options = METHODS[method]
        optimizer = make(model, lr=0.0, **options)
        x, y = data(dtype)
        for _ in range(2):
            optimizer.zero_grad()
            (cross_entropy(model(x), y) * scale).backward()
            optimizer.step()
        result.append(optimizer.curvature)
    small, plain = result
    for name, layer in plain.items():
        other = small[name]
        for key, power in (("A", 0), ("G", 2), ("s", 2)):
            one, two = getattr(layer, key), getattr(other, key)
            if one is None:
                continue
            two = two.double() / 10.0 ** (exponent * power)
            assert float((one - two).norm() / one.norm()) < 1e-3, (name, key)


BIG = 3e38  # near the end of single precision


@pytest.mark.parametrize(
    ("a", "g", "kept"),
    [
        ([[1.0, 0.5], [0.5, 2.0]], [[3.0]], True),
        ([[1e30, 0.0], [0.0, 0.0]], [[1e-30]], True),
        ([[BIG, -BIG], [-BIG, 0.0]], [[0.0]], True),  # the sum of its entries is finite
        ([[BIG, BIG], [BIG, 0.0]], [[0.0]], False),
        ([[1e30, 0.0], [0.0, 1.0]], [[1e10]], False),  # the traces' product is not
        ([[1.0, float("nan")], [float("nan"), 1.0]], [[1.0]], False),
        ([[float("inf"), 0.0], [0.0, 1.0]], [[0.0]], False),
        ([[1.0, 0.0], [0.0, 1.0]], [[float("nan")]], False),
    ],
)
def test_factors_out_of_range_are_left_out_alone(
    a: list[list[float]], g: list[list[float]], kept: bool
) -> None:
    """Whatever other layers have; as a sum of every entry and of the diagonals says."""
    layer = KFAC(network()).curvature["0"]
    good = layer, torch.eye(3)[None], torch.eye(2)[None]
    one = layer, torch.tensor([a]), torch.tensor([g])
    assert bool(is_finite(*one[1:])) == kept
    found = finite_ones([good, one, good])
    expected = [good, one, good] if kept else [good, good]
    assert [id(a) for _, a, _ in found] == [id(a) for _, a, _ in expected]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_spike_is_skipped_and_counted(method: str, first: bool) -> None:
    model = network()
    make, options = METHODS[method]
    optimizer = make(model, lr=1e-3, **options)
    x, y = data()
    for number in range(12):
        scale = 1e22 if number == (0 if first else 4) else 1.0
        optimizer.zero_grad()
        (cross_entropy(model(x), y) * scale).backward()
        optimizer.step()
        if scale > 1:
            assert optimizer.counters.rejected > 0
            rejected = optimizer.counters.rejected
    assert optimizer.counters.rejected == rejected
    for layer in optimizer.curvature.values():
        for key in ("A", "G", "s"):
            value = getattr(layer, key)
            assert value is None or bool(torch.isfinite(value).all())
            assert value is None or float(value.abs().max()) < 1e6
    loss = cross_entropy(model(x), y)
    torch.manual_seed(0)
    start = cross_entropy(network()(x), y)
    assert float(loss.detach()) < float(start.detach())


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_saturated_softmax_trains_on(fisher: str) -> None:
    """Its pseudo-gradients are zero; a penalty gives the weights a gradient."""
    model = network()
    with torch.no_grad():
        model[2].bias[0] = 1e4
    optimizer = EKFAC(model, lr=1e-3, fisher=fisher)
    x, _ = data()
    y = torch.zeros(64, dtype=torch.long)
    for _ in range(3):
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters() if p.dim() == 2)
        (cross_entropy(model(x), y) + 1e-3 * penalty).backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert not torch.equal(before, model[0].weight)


@pytest.mark.parametrize("direction", ["spectral", "natural"])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("width", [7, 80])
@pytest.mark.parametrize("start", ["zero head", "dead units"])
def test_a_penalty_alone_moves_a_layer_without_output_gradients(
    start: str, width: int, rank: int | None, direction: Any
) -> None:
    """Its first scalings have the trace of ``N W^2``, ``W`` the penalty's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))
    if start == "zero head":
        nn.init.zeros_(model[2].weight)
    else:
        nn.init.constant_(model[0].bias, -50.0)
    optimizer = EKFAC(model, lr=1e-3, rank=rank, direction=direction)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 12, generator=generator), torch.arange(64) % 3
    for number in range(3):
        optimizer.zero_grad()
        penalty = 0.1 * sum(p.square().sum() for p in model.parameters())
        (cross_entropy(model(x), y) + penalty).backward()
        before = [p.detach().clone() for p in model[0].parameters()]
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if number == 0:
            squares = torch.cat([0.2 * p.flatten() for p in before]).square()
            scalings = optimizer.curvature["0"].s
            assert scalings is not None
            torch.testing.assert_close(scalings.mean(), 64 * squares.mean())
        for old, new in zip(before, model[0].parameters(), strict=True):
            assert not torch.equal(old, new)


@pytest.mark.parametrize("damping", [0.0, 1e-30])
@pytest.mark.parametrize("method", METHODS)
def test_damping_of_next_to_nothing_trains(method: str, damping: float) -> None:
    model = network()
    make, options = METHODS[method]
    optimizer = make(model, lr=3e-3, damping=damping, **options)
    x, y = data()
    start, lr = float(cross_entropy(model(x), y)), 3e-3
    for number in range(20):
        before = model[0].weight.detach().clone(), model[0].bias.detach().clone()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        moved = [
            (p.detach() - b).flatten()
            for p, b in zip(model[0].parameters(), before, strict=True)
        ]
        if number == 0:  # the grafted step, which has a root mean square of lr
            size = float(torch.cat(moved).square().mean().sqrt())
            assert size == pytest.approx(lr, rel=0.02)
    assert float(cross_entropy(model(x), y)) < start


def through_a_state_dict(pair: Pair, other: Pair, folder: Path) -> None:
    for one, two in zip(pair, other, strict=True):
        two.load_state_dict(one.state_dict())


def through_torch_in_memory(pair: Pair, other: Pair, folder: Path) -> None:
    weights, state = get_state_dict(*pair)
    set_state_dict(*other, model_state_dict=weights, optim_state_dict=state)


def through_files_of_torch(pair: Pair, other: Pair, folder: Path) -> None:
    weights, state = get_state_dict(*pair)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    weights, state = get_state_dict(*other)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(
        *other, model_state_dict=both["model"], optim_state_dict=both["optimizer"]
    )


def through_files(pair: Pair, other: Pair, folder: Path) -> None:
    own = {"model": pair[0].state_dict(), "optimizer": DistributedState(pair[1])}
    dcp.save(own, checkpoint_id=folder)
    weights = other[0].state_dict()
    state = {"model": weights, "optimizer": DistributedState(other[1])}
    dcp.load(state, checkpoint_id=folder)
    other[0].load_state_dict(weights)


@pytest.mark.parametrize(
    "way",
    [
        through_a_state_dict,
        through_torch_in_memory,
        through_files_of_torch,
        through_files,
    ],
)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (KFAC, {}),
        (EKFAC, {"scaling": "per_example", "storage": "bfloat16"}),
        (EKFAC, {"rank": 4, "basis_interval": 2, "basis_delay": 1}),
    ],
)
@pytest.mark.parametrize("scales", [(1.0, 1e-20), (1e-20, 1.0)])
def test_a_state_in_double_precision_is_saved_and_loaded(
    way: Callable[[Pair, Pair, Path], None],
    kind: type[KFAC | EKFAC],
    options: dict[str, Any],
    scales: tuple[float, float],
    tmp_path: Path,
) -> None:
    """Bit for bit, by an optimizer whose curvature is in single precision or not."""

    def pair_of(scale: float) -> Pair:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 11))
        pair = model, kind(model, lr=1e-3, factor_interval=1, **options)
        train(pair, 6, scale)
        return pair

    def train(pair: Pair, steps: int, scale: float) -> None:
        x, y = data()
        for _ in range(steps):
            pair[1].zero_grad()
            (cross_entropy(pair[0](x), y) * scale).backward()
            pair[1].step()

    pair, other = pair_of(scales[0]), pair_of(scales[1])
    way(pair, other, tmp_path)
    start = [p.detach().clone() for p in pair[0].parameters()]
    for one in (pair, other):
        dtypes = {layer.dtype for layer in one[1].curvature.values()}
        wide = min(scales) if one is other else scales[0]
        assert dtypes == {torch.float64 if wide < 1 else torch.float32}
        train(one, 4, scales[0])
    parameters = pair[0].parameters(), other[0].parameters()
    for p, q, before in zip(*parameters, start, strict=True):
        if scales[0] < 1:
            assert torch.equal(p, q)
        elif options.get("storage") == "bfloat16":
            # Equal eigenvalues leave their eigenvectors to chance, and these are stored
            # with an error of 2^-9 and less.
            assert (p - q).norm() < 2**-8 * (p - before).norm()
        else:
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-6)
