"""Layers whose loss does not depend on the scale of their weights, and their damping.

The oracle multiplies a layer's parameters by a number and looks at the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC
from ekfac.curvature.radial import FACTOR, averaged, is_free_of_scale, radial_share
from ekfac.errors import StateMismatchError
from ekfac.report.report_input import read_subject


class Pass(nn.Module):
    """Two paths, one of them normalised, and a group norm over channels in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 12, 3, padding=1)
        self.first_norm = nn.GroupNorm(3, 12)
        self.inner = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.inner_norm = nn.InstanceNorm2d(12)
        self.beside = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_norm(self.enter(x)).relu()
        x = self.inner_norm(self.inner(x)).relu() + self.beside(x)
        return self.head(x.mean(dim=(2, 3)))


def batch_normed(bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 11, 3, 2, bias=bias),
        nn.BatchNorm2d(11),
        nn.ReLU(),
        nn.Conv2d(11, 10, 3, bias=bias),
        nn.BatchNorm2d(10),
        nn.Tanh(),
        nn.Conv2d(10, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 10),
    )


def layer_normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 20),
        nn.LayerNorm(20),
        nn.GELU(),
        nn.LayerNorm(20),  # normalised again: the affine part before it is free too
        nn.Linear(20, 21, bias=False),
        nn.RMSNorm(21),
        nn.Linear(21, 22),
        nn.GELU(),
        nn.Linear(22, 10),
    )


def not_normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(250, 10, bias=False)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": batch_normed,
    "batch norm behind biases": lambda: batch_normed(bias=True),
    "layer and rms norm": layer_normed,
    "group and instance norm": Pass,
    "none": not_normed,
}


def batch(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(24, 3, 12, 12, generator=generator).to(dtype)
    return x, torch.randint(10, (24,), generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 4,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> None:
    dtype = next(model.parameters()).dtype
    for number in range(steps):
        x, y = batch(number, dtype)
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()


def free_by_trial(model: nn.Module, optimizer: EKFAC | KFAC) -> set[str]:
    """Return the layers whose parameters can be tripled and the loss stays."""
    x, y = batch(100, next(model.parameters()).dtype)

    def loss(model: nn.Module) -> float:
        return float(cross_entropy(model(x), y).detach())

    free = set()
    for name, layer in optimizer.curvature.items():
        other = copy.deepcopy(model)
        own = dict(other.named_parameters())
        with torch.no_grad():
            for path in layer.block.parameters:
                own[path].mul_(3)
        if abs(loss(other) - loss(model)) < 1e-3:
            free.add(name)
    return free


def damped_free(optimizer: EKFAC | KFAC, free: set[str]) -> set[str]:
    """Return those of the layers that the step damps: norms move as AdamW."""
    modules = dict(optimizer.model.named_modules())
    norms = nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm
    return {name for name in free if not isinstance(modules[name], norms)}


def found_free(optimizer: EKFAC | KFAC) -> set[str]:
    return {n for n, layer in optimizer.curvature.items() if layer.scale_free}


@pytest.mark.parametrize("make", [EKFAC, KFAC])
@pytest.mark.parametrize("network", NETWORKS)
def test_finds_the_layers_whose_scale_does_not_matter(network: str, make: Any) -> None:
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = make(model)
    expected = damped_free(optimizer, free_by_trial(model, optimizer))
    assert (network == "none") == (not expected)
    for _ in range(2):
        train(model, optimizer)
        assert found_free(optimizer) == expected


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float64"])
def test_finds_them_in_every_precision(kind: str) -> None:
    torch.manual_seed(0)
    model = batch_normed()
    if kind != "autocast":
        model.to(getattr(torch, kind))
    optimizer = EKFAC(model, factor_interval=1)
    expected = {"0", "3"}
    for number in range(12):
        x, y = batch(number, next(model.parameters()).dtype)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        assert found_free(optimizer) == (expected if number else set())


def test_statistics_that_are_frozen_do_not_free_a_layer() -> None:
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model, factor_interval=1)
    train(model, optimizer)
    assert found_free(optimizer)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    train(model, optimizer, 1)
    assert not found_free(optimizer)
    model.train()
    train(model, optimizer, 12)
    assert found_free(optimizer) == {"0", "3"}


def test_nor_does_a_penalty_on_the_weights_in_the_loss() -> None:
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return cross_entropy(outputs, y) + 0.1 * penalty

    train(model, optimizer, loss=loss)
    assert not found_free(optimizer)


def test_a_single_gradient_that_is_something_else_is_forgotten() -> None:
    """After as many as halve it to a thousandth."""
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model, factor_interval=1)
    train(model, optimizer)
    for number in range(12):
        x, y = batch(number)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if number == 0:
            for p in model.parameters():
                p.grad.add_(p.detach())
        optimizer.step()
        assert found_free(optimizer) == (set() if number < 9 else {"0", "3"})


def test_share_of_random_directions_is_one_in_the_mean() -> None:
    """And 1 of two numbers, whose squared cosine is a half in the mean."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 30), (2, 1)):
        weights = torch.randn(shape, generator=generator)
        gradients = torch.randn(4000, *shape, generator=generator)
        shares = torch.stack([radial_share([weights], [g]) for g in gradients])
        assert float(shares.mean()) == pytest.approx(1, abs=0.1)
    assert float(radial_share([weights], [3 * weights])) == pytest.approx(2)


def test_share_of_a_weight_and_a_bias_is_that_of_one_vector() -> None:
    w, b, g, h = torch.randn(30, 7), torch.randn(30), torch.randn(30, 7), torch.ones(30)
    found = radial_share([w.half(), b.double()], [g, h])
    vectors = [
        torch.cat([x.flatten().double(), y.double()]) for x, y in ((w, b), (g, h))
    ]
    expected = 240 * torch.cosine_similarity(*vectors, dim=0) ** 2
    assert float(found) == pytest.approx(float(expected), rel=1e-2)


@pytest.mark.parametrize("scale", [0.0, 1e25, math.inf, math.nan])
def test_what_has_no_length_says_nothing(scale: float) -> None:
    x, y = torch.randn(5, 6), scale * torch.randn(5, 6)
    for pair in (([x], [y]), ([y], [x])):
        assert radial_share(*pair).isnan()


def test_average_of_shares() -> None:
    """The weighted sum and its weight; it takes two shares."""
    average, found = torch.zeros(2, dtype=torch.float64), []
    for share in (4.0, math.nan, 0.5, 0.0, 0.0):
        (average,) = averaged([average], [torch.tensor(share)])
        found.append(average.tolist())
    assert found[:2] == [[0.5, 0.5]] * 2
    assert found[2:] == [[0.5, 0.75], [0.25, 0.875], [0.125, 0.9375]]
    sums = torch.tensor([[0.0, 0.5], [0.7e-3, 0.75], [0.8e-3, 0.75], [0.9e-3, 1.0]])
    assert is_free_of_scale(sums).tolist() == [False, True, False, True]


@pytest.mark.parametrize("direction", ["natural", "spectral"])
@pytest.mark.parametrize(
    ("scaling", "rank"),
    [
        ("running_average", None),
        ("running_average", 8),
        ("per_example", None),
        ("per_example", 8),
        (None, None),  # K-FAC
    ],
)
def test_their_damping_is_ten_times_as_large(
    scaling: str | None, direction: str, rank: int | None
) -> None:
    """The last step is that of the relative damping that it should have."""
    assert FACTOR == 10
    steps: list[Tensor] = []
    agreement = 1.0
    for relative in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(432, 70, bias=False), nn.LayerNorm(70)
        ).double()
        options: dict[str, Any] = {"lr": 0.01, "direction": direction}
        options["grafting"] = "rms"
        optimizer: EKFAC | KFAC = (
            KFAC(model, **options)
            if scaling is None
            else EKFAC(model, scaling=scaling, rank=rank, **options)
        )
        projection = torch.randn(70, 10, dtype=torch.float64)
        for number in range(5):
            x, y = batch(number, torch.float64)
            optimizer.zero_grad()
            cross_entropy(model(x) @ projection, y).backward()
            if relative and number == 4:
                object.__setattr__(optimizer.options, "damping_mode", "relative")
                optimizer.param_groups[0]["damping"] = 0.1 * 10 * agreement
            before = model[1].weight.detach().clone()
            optimizer.step()
        steps.append(model[1].weight.detach() - before)
        layer = optimizer.curvature["1"]
        if not relative:
            agreement = float(layer.agreement)
            assert (agreement == 1) == (scaling != "running_average")
            own = {la.name: float(added) for la, added, _ in optimizer.dampings()}
            s = layer.kronecker_scalings() if scaling is None else layer.s
            mean = float(s.mean()) if rank is None else own["1"] / agreement
            assert own["1"] == pytest.approx(0.1 * 10 * agreement * mean, rel=1e-9)
            table = str(optimizer.describe())
            assert "free of scale: 10 times the damping" in table
    assert support.relative_error(steps[0], steps[1]) < 1e-9


@pytest.mark.parametrize("make", [EKFAC, KFAC])
def test_their_steps_have_one_length(make: Any) -> None:
    """Those of the layer without a norm behind grow where gradients are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(432, 12, bias=False),
        nn.LayerNorm(12),
        nn.Linear(12, 10),
    ).double()
    optimizer, lengths = make(model, lr=1e-4), []
    x, y = batch(0, torch.float64)
    for _ in range(30):
        before = {n: model[n].weight.detach().clone() for n in (1, 3)}
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        moved = [model[n].weight.detach() - w for n, w in before.items()]
        lengths.append([float(m.square().mean().sqrt()) / 1e-4 for m in moved])
    free, other = zip(*lengths, strict=True)
    factors = [float(la.scale_factor) for la in optimizer.curvature.values()]
    assert factors[0] == 10
    assert factors[-1] == 1
    assert free[10:] == pytest.approx([1.0] * 20, rel=1e-5)
    assert min(other[10:]) > 2


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_other_damping_modes_do_not_look(mode: str) -> None:
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model, damping_mode=mode)
    train(model, optimizer)
    assert not any(layer.radial.any() for layer in optimizer.curvature.values())


def test_a_resumed_run_knows_them() -> None:
    """To the last bit, in steps that do not look."""
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model, factor_interval=4)
    train(model, optimizer, 5)
    other = copy.deepcopy(model)
    resumed = EKFAC(other, factor_interval=4)
    resumed.load_state_dict(optimizer.state_dict())
    assert found_free(resumed) == {"0", "3"}
    for run in ((model, optimizer), (other, resumed)):
        train(*run, 2)
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_another_mode_after_a_load_says_nothing_of_it() -> None:
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model)
    train(model, optimizer)
    assert "free of scale" in str(optimizer.describe())
    other = EKFAC(model, damping_mode="relative")
    other.load_state_dict(optimizer.state_dict())
    assert "free of scale" not in str(other.describe())
    for layer, added, _ in other.dampings():
        assert float(added) == pytest.approx(0.1 * float(layer.s.mean()), rel=1e-5)


def test_norms_are_not_said_to_be_damped_more() -> None:
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = EKFAC(model)
    train(model, optimizer)
    layer = optimizer.curvature["1"]
    assert "1" in free_by_trial(model, optimizer)
    assert float(layer.damping_factor) == 1


def test_a_report_of_a_checkpoint_knows_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = batch_normed()
    optimizer = KFAC(model)  # no agreement, which checkpoints do not say
    train(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    found = read_subject(tmp_path / "run.pt").dampings
    expected = {la.name: float(added) for la, added, _ in optimizer.dampings()}
    assert found == pytest.approx(expected, rel=1e-5)
    mean = float(optimizer.curvature["0"].kronecker_scalings().mean())
    assert found["0"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("value", [-1.0, 1.1, math.nan])
def test_states_that_make_no_sense_are_refused(value: float) -> None:
    model = batch_normed()
    optimizer = EKFAC(model)
    train(model, optimizer)
    state = optimizer.state_dict()
    state["curvature"]["0"]["radial"] = torch.tensor([value, 1.0])
    with pytest.raises(StateMismatchError, match=r"0\.radial"):
        optimizer.load_state_dict(state)
    assert found_free(optimizer) == {"0", "3"}
