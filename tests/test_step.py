"""The update against explicit solves, and every option that shapes it."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import support
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC, LayerCurvature, kernels
from ekfac.curvature.eigenbasis import ProjectedGradient
from ekfac.curvature.options import REPLACED, Schedule
from ekfac.errors import EkfacWarning
from ekfac.kernels import linalg
from ekfac.optim.optimizer import KroneckerOptimizer
from ekfac.optim.precondition import graft_factor, moves_as_adamw

TEXTBOOK: dict[str, Any] = {
    "direction": "natural",
    "damping_mode": "absolute",
    "grafting": None,
    "momentum": 0.0,
    "factor_decay": 0.0,
}
EXACT: dict[str, Any] = {**TEXTBOOK, "scaling_decay": 0.0}
DAMPING = 0.07

Make = Callable[[nn.Module], KroneckerOptimizer]


class Mixed(nn.Module):
    """Embedding, norm, convolutions with and without groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 4, 2, groups=2)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens)).transpose(1, 2)
        x = torch.tanh(self.grouped(torch.tanh(self.conv(x))))
        logits: Tensor = self.head(x.flatten(1))
        return logits


def mixed_batch(seed: int = 0, examples: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(6, (examples, 5), generator=generator)
    return x, torch.randint(3, (examples,), generator=generator)


def perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batches(
    count: int, sizes: tuple[int, int], examples: int = 12, seed: int = 3
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(examples, sizes[0], generator=generator),
            torch.randint(sizes[1], (examples,), generator=generator),
        )
        for _ in range(count)
    ]


def one_step(
    model: nn.Module, optimizer: KroneckerOptimizer, batch: tuple[Tensor, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients and by how much the step lowered the parameters."""
    x, y = batch
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    return support.gradients(model), support.step_of(model, optimizer)


# -- the solve -------------------------------------------------------------------------


def solved(blocks: Tensor, gradient: Tensor, power: float) -> Tensor:
    """Return ``blocks^power gradient`` by dense linear algebra."""
    flat = gradient.flatten(1).unsqueeze(-1)
    if power == -1:
        return torch.linalg.solve(blocks, flat).reshape(gradient.shape)
    values, vectors = torch.linalg.eigh(blocks)
    root = (vectors * values.pow(power).unsqueeze(-2)) @ vectors.transpose(-1, -2)
    return (root @ flat).reshape(gradient.shape)


def identity(size: int) -> Tensor:
    return torch.eye(size)


def damped_kfac(layer: LayerCurvature, damping: float, split: str) -> Tensor:
    """Return ``G (x) A`` with damping, the textbook's way."""
    if split == "exact":
        blocks = support.kfac_blocks(layer)
        return blocks + damping * identity(blocks.shape[-1])
    G = support.dense_factor(layer.G)
    A = support.dense_factor(layer.A).expand(len(G), -1, -1)
    result = []
    for g, a in zip(G, A, strict=True):
        pi = math.sqrt(a.trace() / len(a) / (g.trace() / len(g)))
        root = math.sqrt(damping)
        damped_g = g + root / pi * identity(len(g))
        damped_a = a + root * pi * identity(len(a))
        result.append(torch.kron(damped_g, damped_a))
    return torch.stack(result)


def damped_ekfac(
    layer: LayerCurvature, scalings: Tensor, damping: float, split: str
) -> Tensor:
    """Return ``Q diag(s) Q^T`` with damping; factored as in George 2023, A.4."""
    blocks = support.ekfac_blocks(layer, scalings)
    blocks = blocks + damping * identity(blocks.shape[-1])
    if split == "exact":
        return blocks
    G = support.dense_factor(layer.G)
    A = support.dense_factor(layer.A).expand(len(G), -1, -1)
    sums = [
        torch.kron(identity(len(g)), a) + torch.kron(g, identity(len(a)))
        for g, a in zip(G, A, strict=True)
    ]
    return blocks + math.sqrt(damping) * torch.stack(sums)


SETTINGS = [
    pytest.param(split, power, id=f"{split}{power}")
    for split in ("exact", "factored")
    for power in (-1, -0.5)
]


@pytest.mark.parametrize(("split", "power"), SETTINGS)
@pytest.mark.usefixtures("float64")
def test_kfac_step_is_the_solve(split: str, power: float) -> None:
    model = Mixed()
    optimizer = KFAC(
        model, lr=1.0, damping=DAMPING, damping_split=split, power=power, **TEXTBOOK
    )
    grads, moved = one_step(model, optimizer, mixed_batch())
    assert len(optimizer.curvature) == 5
    for layer in optimizer.curvature.values():
        expected = solved(
            damped_kfac(layer, DAMPING, split), support.packed(layer, grads), power
        )
        error = support.relative_error(support.packed(layer, moved), expected)
        assert error < 1e-10, layer.name


@pytest.mark.parametrize("scaling", ["per_example", "running_average"])
@pytest.mark.parametrize(("split", "power"), SETTINGS)
@pytest.mark.usefixtures("float64")
def test_ekfac_step_is_the_solve(scaling: str, split: str, power: float) -> None:
    """Also the scalings are computed again, from single examples' gradients."""
    model, (x, y) = Mixed(), mixed_batch()
    optimizer = EKFAC(
        model,
        lr=1.0,
        damping=DAMPING,
        damping_split=split,
        power=power,
        scaling=scaling,
        **EXACT,
    )
    examples = {}
    with support.paused(optimizer):
        for layer in optimizer.curvature.values():
            examples[layer.name] = support.example_gradients(
                model, layer, lambda: cross_entropy(model(x), y, reduction="none")
            )
    grads, moved = one_step(model, optimizer, (x, y))
    for layer in optimizer.curvature.values():
        Q_G, Q_A = support.dense_basis(layer, "G"), support.dense_basis(layer, "A")
        rotated = Q_G.transpose(-1, -2) @ examples[layer.name] @ Q_A
        if scaling == "per_example":
            scalings = rotated.square().mean(dim=0)
        else:
            scalings = len(x) * rotated.mean(dim=0).square()
        expected = solved(
            damped_ekfac(layer, scalings, DAMPING, split),
            support.packed(layer, grads),
            power,
        )
        error = support.relative_error(support.packed(layer, moved), expected)
        assert error < 1e-10, layer.name


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.usefixtures("float64")
def test_relative_damping_is_that_share_of_the_mean_scaling(
    optimizer_type: type[KroneckerOptimizer],
) -> None:
    model = Mixed()
    options = {**TEXTBOOK, "damping_mode": "relative"}
    optimizer = optimizer_type(model, lr=1.0, damping=0.3, **options)
    grads, moved = one_step(model, optimizer, mixed_batch())
    for layer in optimizer.curvature.values():
        scalings = layer.kronecker_scalings() if layer.s is None else layer.s
        blocks = support.ekfac_blocks(layer, scalings)
        blocks = blocks + 0.3 * scalings.mean() * identity(blocks.shape[-1])
        expected = solved(blocks, support.packed(layer, grads), -1)
        moved_layer = support.packed(layer, moved)
        assert support.relative_error(moved_layer, expected) < 1e-10


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("float64")
def test_the_exact_step_lands_on_the_minimum_of_a_quadratic(
    optimizer_type: type[KroneckerOptimizer], bias: bool
) -> None:
    options: dict[str, Any] = dict(TEXTBOOK)
    if optimizer_type is EKFAC:
        options |= {"scaling": "per_example", "scaling_decay": 0.0}
    x, y = torch.randn(40, 6), torch.randn(40, 3)
    inputs = torch.cat([x, torch.ones(40, 1)], dim=1) if bias else x
    minimum = torch.linalg.lstsq(inputs, y).solution.t()
    start = nn.Linear(6, 3, bias=bias)
    distances = []
    for damping in (1e-1, 1e-3, 1e-5, 0.0):
        model = copy.deepcopy(start)
        optimizer = optimizer_type(
            model,
            lr=1.0,
            damping=damping,
            fisher="exact",
            likelihood="gaussian",
            **options,
        )
        loss = 0.5 * (model(x) - y).square().sum(dim=1).mean()
        loss.backward()
        optimizer.step()
        (layer,) = optimizer.curvature.values()
        reached = support.packed(layer, dict(model.named_parameters()))[0]
        distances.append(support.relative_error(reached.detach(), minimum))
    assert distances[-1] < 1e-12
    # The distance is of first order in the damping.
    assert distances[1] < 0.02 * distances[0]
    assert distances[2] == pytest.approx(0.01 * distances[1], rel=0.05)


# -- grafting --------------------------------------------------------------------------


@pytest.mark.parametrize("grafting", ["adaptive", "rms", "sgd"])
@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.usefixtures("float64")
def test_grafting_sets_the_length_alone(
    grafting: str, optimizer_type: type[KroneckerOptimizer]
) -> None:
    plain, model = Mixed(), Mixed()
    model.load_state_dict(plain.state_dict())
    options = {**TEXTBOOK, "damping": DAMPING, "lr": 1.0}
    _, own = one_step(plain, optimizer_type(plain, **options), mixed_batch())
    options["grafting"] = grafting
    optimizer = optimizer_type(model, **options)
    grads, moved = one_step(model, optimizer, mixed_batch())
    for layer in optimizer.curvature.values():
        own_layer, found = (support.packed(layer, parts) for parts in (own, moved))
        gradient = support.packed(layer, grads)
        length = gradient.norm() if grafting == "sgd" else math.sqrt(found.numel())
        expected = own_layer * (length / own_layer.norm())
        assert support.relative_error(found, expected) < 1e-12, layer.name


@pytest.mark.parametrize("grafting", ["adaptive", "rms", "sgd", None])
def test_a_layer_without_gradient_stays(grafting: str | None) -> None:
    """Zero gradients, as those of a bias before batch normalisation, move nothing."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # every unit is dead
    for optimizer_type in (KFAC, EKFAC):
        optimizer = optimizer_type(model, grafting=grafting)
        for batch in batches(3, (4, 2)):
            _, moved = one_step(model, optimizer, batch)
            assert moved["0.weight"].abs().max() == 0
            assert moved["0.bias"].abs().max() == 0
            assert torch.isfinite(moved["2.bias"]).all()
        optimizer.close()


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
def test_a_layer_whose_curvature_was_zero_takes_a_grafted_step(
    optimizer_type: type[KroneckerOptimizer],
) -> None:
    """Between two refreshes K-FAC knows nothing of a layer that comes to life."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    first = model[0]
    assert isinstance(first, nn.Linear)
    alive = first.bias.detach().clone()
    with torch.no_grad():
        first.bias.fill_(-100.0)
    optimizer = optimizer_type(model, lr=1.0, momentum=0.0, direction="natural")
    data = batches(2, (4, 2))
    one_step(model, optimizer, data[0])
    with torch.no_grad():
        first.bias.copy_(alive)
    grads, moved = one_step(model, optimizer, data[1])  # nothing is refreshed here
    layer = optimizer.curvature["0"]
    gradient, direction = (support.packed(layer, parts) for parts in (grads, moved))
    assert direction.square().mean().sqrt() == pytest.approx(1, rel=1e-5)
    assert (direction * gradient).sum() > 0
    if optimizer_type is KFAC:
        expected = gradient / gradient.square().mean().sqrt()
        torch.testing.assert_close(direction, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grafting", ["adaptive", "rms", "sgd"])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-30, 1.0, 1e15])
def test_grafting_of_extreme_lengths_is_finite(
    grafting: Literal["adaptive", "rms", "sgd"], size: float
) -> None:
    direction, gradient = size * torch.randn(1, 50, 50), torch.randn(1, 50, 50)
    factor = graft_factor(direction.norm(), 2500, gradient.norm(), grafting)
    direction.mul_(factor)
    assert torch.isfinite(direction).all()
    if size in (1.0, 1e15):
        expected = float(gradient.square().mean()) if grafting == "sgd" else 1.0
        assert direction.square().mean() == pytest.approx(expected, rel=1e-5)


def test_a_gradient_whose_norm_overflows_grafts_no_step() -> None:
    direction = torch.ones(1, 2, 2)
    factor = graft_factor(direction.norm(), 4, torch.tensor(torch.inf), "sgd")
    assert not (factor * direction).any()


# -- momentum, weight decay, KL clip ---------------------------------------------------


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay"),
    [(0.0, 2, 0.1), (0.9, 0, 0.0), (0.9, True, 0.0), (0.8, 2, 0.05), (0.7, 3, 0.0)],
)
@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.usefixtures("float64")
def test_momentum_is_an_average_before_the_solve(
    momentum: float,
    nesterov: int,
    weight_decay: float,
    optimizer_type: type[KroneckerOptimizer],
) -> None:
    """Averaged in the parameters' coordinates here, while the basis changes there."""
    lr, model = 0.05, perceptron(5, 4, 3)
    optimizer = optimizer_type(
        model,
        lr=lr,
        nesterov=nesterov,
        weight_decay=weight_decay,
        damping=DAMPING,
        basis_interval=2,
        **{**TEXTBOOK, "momentum": momentum, "factor_decay": 0.5},
    )
    averages: dict[str, Tensor] = {}
    for step, batch in enumerate(batches(6, (5, 3)), 1):
        before = support.parameters(model)
        grads, moved = one_step(model, optimizer, batch)
        decayed = {name: lr * weight_decay * p for name, p in before.items()}
        for layer in optimizer.curvature.values():
            gradient = support.packed(layer, grads)
            old = averages.get(layer.name, torch.zeros_like(gradient))
            new = averages[layer.name] = momentum * old + (1 - momentum) * gradient
            average = new / (1 - momentum**step)
            for _ in range(nesterov):  # as if the gradient stayed
                average = momentum * average + (1 - momentum) * gradient
            scalings = layer.kronecker_scalings() if layer.s is None else layer.s
            blocks = support.ekfac_blocks(layer, scalings)
            blocks = blocks + DAMPING * identity(blocks.shape[-1])
            expected = lr * solved(blocks, average, -1)
            expected = expected + support.packed(layer, decayed)
            error = support.relative_error(support.packed(layer, moved), expected)
            assert error < 1e-9, (layer.name, step)


def quadratic_form(
    optimizer: KroneckerOptimizer, moved: dict[str, Tensor], damping: float
) -> float:
    """Return ``u^T (F + damping) u`` of the update, blocks materialised."""
    total = 0.0
    for layer in optimizer.curvature.values():
        kronecker = optimizer.options.scaling is None
        blocks = (support.kfac_blocks if kronecker else support.ekfac_blocks)(layer)
        blocks = blocks + damping * identity(blocks.shape[-1])
        u = support.packed(layer, moved).flatten(1)
        total += float(torch.einsum("bi,bij,bj->", u, blocks, u))
    return total


@pytest.mark.parametrize("power", [-1, -0.5])
@pytest.mark.parametrize("grafting", [None, "sgd", "rms", "adaptive"])
@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.usefixtures("float64")
def test_kl_clip_bounds_the_step_and_follows_the_learning_rate(
    optimizer_type: type[KroneckerOptimizer], grafting: str | None, power: float
) -> None:
    model, data = perceptron(5, 4, 3), batches(1, (5, 3))
    options = {**TEXTBOOK, "grafting": grafting, "power": power}
    optimizer = optimizer_type(model, lr=1.0, damping=DAMPING, **options)
    (batch,) = data
    start = copy.deepcopy(model.state_dict())
    one_step(model, optimizer, batch)
    _, own = one_step(model, optimizer, batch)

    # At a learning rate of 1 the step is clipped to the bound, at 1e-3 it is not.
    model.load_state_dict(start)
    bound = 1e-3 * quadratic_form(optimizer, own, DAMPING)
    clipped = optimizer_type(model, lr=1.0, damping=DAMPING, kl_clip=bound, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(clipped, lambda i: 1e-3**i)
    one_step(model, optimizer_type(model, lr=0.0), batch)  # other hooks do not disturb
    _, moved = one_step(model, clipped, batch)
    assert quadratic_form(clipped, moved, DAMPING) == pytest.approx(bound, rel=1e-9)
    scheduler.step()
    _, moved = one_step(model, clipped, batch)
    assert 0 < quadratic_form(clipped, moved, DAMPING) < 0.1 * bound


@pytest.mark.usefixtures("float64")
def test_kl_clip_sums_over_param_groups() -> None:
    """One number for the whole step: its ``lr^2 u^T g`` where nothing is grafted."""
    batch = batches(1, (5, 3))[0]

    def run(bound: float | None) -> tuple[float, KroneckerOptimizer]:
        torch.manual_seed(0)
        model = perceptron(5, 4, 3)
        groups = [
            {"params": model[0].parameters(), "lr": 0.5},
            {"params": model[2].parameters(), "lr": 0.25},
        ]
        optimizer = KFAC(
            groups, model=model, damping=DAMPING, kl_clip=bound, **TEXTBOOK
        )
        grads, moved = one_step(model, optimizer, batch)
        product = sum(
            (lr * moved[name] * grads[name]).sum()
            for name, lr in [
                ("0.weight", 0.5),
                ("0.bias", 0.5),
                ("2.weight", 0.25),
                ("2.bias", 0.25),
            ]
        )
        assert isinstance(product, Tensor)
        return float(product), optimizer

    free, _ = run(None)
    for bound in (0.3 * free, 3 * free):
        found, _ = run(bound)
        # The step shrinks by nu, u^T F u = u^T g of the whole step by nu^2.
        assert found == pytest.approx(free * min(1.0, math.sqrt(bound / free)))


# -- param groups and learning rates ---------------------------------------------------


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.usefixtures("float64")
def test_every_group_has_its_own_numbers(
    optimizer_type: type[KroneckerOptimizer],
) -> None:
    """Blocks do not touch one another, so each layer moves as it would alone."""
    first = {"lr": 0.1, "weight_decay": 0.1, "damping": 0.5, "momentum": 0.5}
    second = {"lr": 0.02, "weight_decay": 0.0, "damping": 0.01, "momentum": 0.0}
    both = perceptron(5, 4, 3)
    groups = [
        {"params": list(both[0].parameters()), **first},
        {"params": list(both[2].parameters()), **second},
    ]
    optimizer = optimizer_type(groups, model=both)
    for batch in batches(4, (5, 3)):
        singles = [copy.deepcopy(both) for _ in range(2)]
        copies = [copy.deepcopy((both, optimizer)) for _ in range(2)]
        one_step(both, optimizer, batch)
        for (model, other), values in zip(copies, (first, second), strict=True):
            for group in other.param_groups:
                group.update(values)
            one_step(model, other, batch)
        for index, (model, _) in zip((0, 2), copies, strict=True):
            assert torch.equal(both[index].weight, model[index].weight)
            assert torch.equal(both[index].bias, model[index].bias)
            assert not torch.equal(both[index].weight, singles[0][index].weight)


def test_a_bias_in_a_group_of_its_own_keeps_its_learning_rate() -> None:
    model = perceptron(5, 3)
    groups = [
        {"params": [model[0].bias], "lr": 0.5, "weight_decay": 0.0},
        {"params": [model[0].weight]},
    ]
    optimizer = EKFAC(groups, lr=0.25, model=model, momentum=0.0)
    _, moved = one_step(model, optimizer, batches(1, (5, 3))[0])
    twin = perceptron(5, 3)
    torch.manual_seed(0)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter += moved[name]
    _, joint = one_step(twin, EKFAC(twin, lr=0.25, momentum=0.0), batches(1, (5, 3))[0])
    torch.testing.assert_close(moved["0.weight"], joint["0.weight"])
    torch.testing.assert_close(moved["0.bias"], 2 * joint["0.bias"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kl_clip", [None, 1e-4])
def test_lr_may_be_a_tensor(weight_decay: float, kl_clip: float | None) -> None:
    models = [perceptron(5, 4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    rates: list[float | Tensor] = [0.0625, torch.tensor(0.0625)]
    for model, lr in zip(models, rates, strict=True):
        optimizer = EKFAC(model, lr=lr, weight_decay=weight_decay, kl_clip=kl_clip)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for batch in batches(4, (5, 3)):
            one_step(model, optimizer, batch)
            scheduler.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)


# -- constructor -----------------------------------------------------------------------

ERRORS: dict[str, tuple[list[Any], str]] = {
    "lr": ([-0.1, math.nan], ">= 0"),
    "momentum": ([-0.5, 1.0], r"\[0, 1\)"),
    "weight_decay": ([-1e-4], ">= 0"),
    "damping": ([-1e-8, math.nan], ">= 0"),
    "kl_clip": ([0, -1.0, math.nan], "None or a number > 0"),
    "direction": (["muon", None], "'spectral', 'natural'"),
    "nesterov": (["yes", None, -1, 1.5], "steps to look ahead: 0 or False, 1 or True"),
    "damping_mode": (["mean"], "'relative', 'absolute'"),
    "damping_split": (["pi"], "'exact', 'factored'"),
    "grafting": (["adam"], "'adaptive', 'rms', 'sgd', None"),
    "factor_decay": ([1.0, -0.1], r"\[0, 1\)"),
    "factor_interval": ([0, 2.5], "integer >= 1"),
    "basis_interval": ([0, None], "integer >= 1"),
    "basis_delay": ([-1, 0.5], "integer >= 0"),
    "fisher": (["true"], "'empirical', 'mc', 'exact'"),
    "loss_reduction": (["none"], "'mean', 'sum'"),
    "likelihood": (["softmax", 3], "'bernoulli', 'categorical', 'gaussian'"),
    "sharing": (["average"], "'expand', 'reduce'"),
    "precision": (["half"], "'auto', 'full'"),
    "power": ([1, -0.25], "-1, -0.5"),
    "max_dim": ([0, 1e3], "integer >= 1"),
    "conv_factors": (["pixels", None], "use one of 'patches'"),
    "storage": (["half", None], "use one of 'full'"),
    "memory_budget": ([0, -1, "much", True], "None or bytes >= 1"),
    "max_aspect": ([0.5, float("nan")], "number >= 1"),
    "basis_tolerance": ([-0.1, math.nan], ">= 0"),
    "gradient_workers": ([0.0, 1.5, math.nan, "half"], r"\(0, 1\]"),
}
ONLY_EKFAC: dict[str, tuple[list[Any], str]] = {
    "scaling_decay": ([1.0], r"\[0, 1\)"),
    "scaling_interval": ([0], "integer >= 1"),
    "scaling": (["ra", None], "'running_average', 'per_example'"),
    "rank": ([0, 1.0, True, "all"], "integer >= 1"),
}
WRONG = [
    pytest.param(optimizer_type, name, value, allowed, id=f"{name}={value}-{label}")
    for label, optimizer_type, table in (
        ("KFAC", KFAC, ERRORS),
        ("EKFAC", EKFAC, ERRORS | ONLY_EKFAC),
    )
    for name, (values, allowed) in table.items()
    for value in values
]


@pytest.mark.parametrize(("optimizer_type", "name", "value", "allowed"), WRONG)
def test_constructor_errors_say_what_was_found_and_what_is_allowed(
    optimizer_type: type[KroneckerOptimizer], name: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ValueError, match=allowed) as caught:
        optimizer_type(perceptron(3, 2), **{name: value})
    message = str(caught.value)
    assert message.startswith(f"Invalid {name}: {value!r}; "), message


@pytest.mark.parametrize(
    "name", ["lr", "momentum", "damping", "kl_clip", "max_aspect", "factor_decay"]
)
def test_what_is_no_number_is_named_with_its_option(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"Invalid {name}: 'fast'; it must be a number"
    ):
        EKFAC(perceptron(3, 2), **{name: "fast"})


def test_every_option_has_an_error_test() -> None:
    options = set(inspect.signature(EKFAC).parameters)
    tested = {*ERRORS, *ONLY_EKFAC}
    assert options - tested == {"params", "model", "process_group"}
    assert set(inspect.signature(KFAC).parameters) == (options - set(ONLY_EKFAC))


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
@pytest.mark.parametrize("name", REPLACED)
def test_options_of_other_optimizers_say_what_stands_in_their_place(
    optimizer_type: type[KroneckerOptimizer], name: str
) -> None:
    model = perceptron(3, 2)
    advice = re.escape(f"{name} ({REPLACED[name]})")
    with pytest.raises(TypeError, match=f"{optimizer_type.__name__} .*{advice}"):
        optimizer_type(model, lr=1e-3, **{name: True})
    with pytest.raises(TypeError, match=advice):
        optimizer_type([{"params": model.parameters(), name: True}], model=model)
    named = set(re.findall("give ([a-z_]+)", REPLACED[name]))
    assert named <= set(inspect.signature(KFAC).parameters)


def test_all_options_of_first_order_optimizers_are_taken_or_answered() -> None:
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        options = set(inspect.signature(optimizer).parameters)
        assert options <= {*REPLACED, *inspect.signature(EKFAC).parameters}
    with pytest.raises(TypeError, match=r"betas \(.*\); fused \("):
        EKFAC(perceptron(3, 2), betas=(0.9, 0.999), fused=True)  # type: ignore[call-arg]


def test_the_signature_is_that_of_the_constructor() -> None:
    assert "damping_mode" in inspect.signature(EKFAC).parameters
    assert "given" not in inspect.signature(KFAC).parameters


@pytest.mark.parametrize("name", ["damping_mode", "rank", "basis_interval"])
def test_param_groups_cannot_set_what_is_fixed_for_the_run(name: str) -> None:
    model = perceptron(3, 2)
    with pytest.raises(TypeError, match=f"cannot set {name}, only lr, momentum"):
        EKFAC([{"params": model.parameters(), name: 1}], model=model)
    EKFAC([{"params": model.parameters(), "name": "all"}], model=model).close()


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "damping"])
def test_param_groups_are_checked_too(name: str) -> None:
    model = perceptron(3, 2)
    groups = [{"params": model.parameters(), name: -1.0}]
    with pytest.raises(ValueError, match=f"Invalid {name}: -1.0"):
        EKFAC(groups, model=model)


@pytest.mark.parametrize("optimizer_type", [KFAC, EKFAC])
def test_parameters_without_their_model_are_a_type_error(
    optimizer_type: type[KroneckerOptimizer],
) -> None:
    model, name = perceptron(3, 2), optimizer_type.__name__
    with pytest.raises(TypeError) as caught:
        optimizer_type(model.parameters())
    assert f"{name}(model, ...)" in str(caught.value)
    assert f"{name}(params, ..., model=model)" in str(caught.value)


# -- what no block covers --------------------------------------------------------------


class Partly(nn.Module):
    """A covered layer, a parameter of no layer and a layer wider than ``max_dim``."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.full((5,), 0.1))
        self.wide = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.wide(x + self.shift)))
        return logits


@pytest.mark.parametrize("grafting", ["adaptive", "rms", "sgd", None])
@pytest.mark.usefixtures("float64")
def test_uncovered_parameters_follow_adamw(grafting: str | None) -> None:
    model = Partly()
    names = ["shift", "wide.weight", "wide.bias"]
    with pytest.warns(EkfacWarning, match=r"(?s)wide\.weight, wide\.bias.*shift"):
        optimizer = EKFAC(
            model, lr=0.1, momentum=0.8, weight_decay=0.2, grafting=grafting, max_dim=4
        )
    twin = {
        name: nn.Parameter(p.clone()) for name, p in support.parameters(model).items()
    }
    adamw = torch.optim.AdamW(
        [twin[name] for name in names], lr=0.1, betas=(0.8, 0.999), weight_decay=0.2
    )
    for batch in batches(4, (5, 3)):
        before = support.parameters(model)
        grads, moved = one_step(model, optimizer, batch)
        for name in names:
            twin[name].data.copy_(before[name])
            twin[name].grad = grads[name]
        adamw.step()
        for name in names:
            theirs = before[name] - twin[name].detach()
            if grafting in ("sgd", None):
                direction = theirs - 0.1 * 0.2 * before[name]
                length = 0.1 * grads[name].norm() / direction.norm()
                theirs = direction * length + 0.1 * 0.2 * before[name]
            torch.testing.assert_close(moved[name], theirs, rtol=1e-7, atol=1e-12)


def test_describe_lists_every_trained_parameter() -> None:
    model = Partly()
    outside = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3, 2))]
    groups = [{"params": model.parameters()}, {"params": outside}]
    with pytest.warns(EkfacWarning, match="outside the model"):
        optimizer = EKFAC(groups, model=model, max_dim=4)
    rows = {row.layer: row for row in optimizer.describe().rows}
    assert rows["head"].method == "EKFAC, diagonal input"
    assert "max_dim=4" in rows["head"].reason
    assert rows["shift"].method == "AdamW-like"
    assert rows["wide.weight"].block == "7x5"
    assert "exceed max_dim=4" in rows["wide.weight"].reason
    shapes = [row.block for row in optimizer.describe().rows]
    assert {"2", "3x2"} <= set(shapes)
    assert "AdamW-like" in str(optimizer.describe())


def test_frozen_parameters_get_neither_step_nor_row() -> None:
    model = perceptron(5, 4, 3)
    model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = EKFAC(model)
    _, moved = one_step(model, optimizer, batches(1, (5, 3))[0])
    assert list(optimizer.curvature) == ["2"]
    assert moved["0.weight"].abs().max() == 0
    assert [row.layer for row in optimizer.describe().rows] == ["2"]


# -- averages and schedule -------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_averages_start_at_the_first_batch_without_a_trace_of_an_identity() -> None:
    first, second = batches(2, (5, 3))
    model = perceptron(5, 4, 3)
    start = copy.deepcopy(model.state_dict())

    def alone(batch: tuple[Tensor, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        model.load_state_dict(start)
        with EKFAC(model, lr=0.0, factor_decay=0.0, scaling_decay=0.0) as optimizer:
            one_step(model, optimizer, batch)
        return averages(optimizer)

    def averages(optimizer: KroneckerOptimizer) -> dict[str, tuple[Tensor, ...]]:
        layers = optimizer.curvature.items()
        return {name: (la.A, la.G) for name, la in layers}  # type: ignore[misc]

    expected = [alone(first), alone(second)]
    model.load_state_dict(start)
    optimizer = EKFAC(model, lr=0.0, factor_decay=0.9, factor_interval=1)
    one_step(model, optimizer, first)
    for name, factors in averages(optimizer).items():
        for found, batch in zip(factors, expected[0][name], strict=True):
            torch.testing.assert_close(found, batch, rtol=1e-13, atol=0)
    one_step(model, optimizer, second)
    for name, factors in averages(optimizer).items():
        for found, a, b in zip(
            factors, expected[0][name], expected[1][name], strict=True
        ):
            mean = (0.9 * a + b) / 1.9
            torch.testing.assert_close(found, mean, rtol=1e-12, atol=1e-14)


class TestSchedule:
    @pytest.mark.parametrize(
        ("factors", "basis", "expected"),
        [
            (20, 100, [1, 3, 9, 20, 60]),
            (10, 50, [1, 3, 10, 30]),
            (1, 50, [1, 3, 9, 27]),
            (100, 50, [1, 3, 9, 27]),
            (5, 200, [1, 5, 15, 45, 135]),
            (20, 10, [1, 3, 9]),
        ],
    )
    def test_first_bases_are_of_new_factors(
        self, factors: int, basis: int, expected: list[int]
    ) -> None:
        schedule = Schedule(factors=factors, basis=basis, scalings=1)
        for index in range(5):
            due = [s for s in range(1, basis) if schedule.basis_due(s, index, 5)]
            assert due == expected
            assert all(map(schedule.factors_due, due))

    @pytest.mark.parametrize(("basis", "layers"), [(50, 7), (10, 10), (3, 8), (1, 4)])
    def test_layers_take_turns(self, basis: int, layers: int) -> None:
        schedule = Schedule(factors=10, basis=basis, scalings=1)
        steps = range(4 * basis, 5 * basis)
        loads = [
            sum(schedule.basis_due(step, i, layers) for i in range(layers))
            for step in steps
        ]
        assert sum(loads) == layers, "every layer once in an interval"
        assert max(loads) == math.ceil(layers / basis), (
            "no step has more than its share"
        )

    def test_is_a_function_of_the_step_alone(self) -> None:
        first, second = (Schedule(factors=7, basis=20, scalings=3) for _ in range(2))
        forward = [first.basis_due(s, 1, 4) for s in range(1, 100)]
        backward = [second.basis_due(s, 1, 4) for s in reversed(range(1, 100))]
        assert forward == backward[::-1]
        assert first == second

    def test_factors_and_scalings(self) -> None:
        schedule = Schedule(factors=10, basis=50, scalings=4)
        factors = [s for s in range(1, 51) if schedule.factors_due(s)]
        assert factors == [1, 3, 10, 20, 30, 40, 50]
        scalings = [s for s in range(1, 25) if schedule.scalings_due(s)]
        assert scalings == [*range(1, 11), 12, 16, 20, 24]


@pytest.mark.parametrize(
    ("make", "options", "rows", "expected"),
    [
        # 9 * (181^3 + 4^3) / (6 * 8 * 4 * 181) = 1536, and 60 since the first
        (EKFAC, {}, 8, {1}),
        (EKFAC, {}, 1024, {1, 3, 9, 20, 60}),  # 12
        (EKFAC, {}, 512, {1, 60}),  # 24, and 59
        (EKFAC, {"factor_interval": 30}, 512, {1, 3, 9, 30, 90}),
        # One pair of factors of all taps: 9 * (21^3 + 4^3) / (6 * 8 * 9 * 4 * 21) = 2.3
        (EKFAC, {"conv_factors": "spatially_uncorrelated"}, 8, {1, 3, 9, 20, 60}),
        (EKFAC, {"rank": 8}, 8, {1, 3, 9, 20, 60}),
        (KFAC, {}, 8, {1, 3, 9, 20, 60}),
    ],
)
def test_dear_bases_wait(
    make: Any, options: dict[str, Any], rows: int, expected: set[int]
) -> None:
    """Those that cost more than all passes since the last were found, at least 20."""
    model = nn.Sequential(nn.Conv2d(20, 4, 3, padding=1), nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(16, 2))
    optimizer = make(model, lr=1e-4, basis_tolerance=0.0, **options)
    generator = torch.Generator().manual_seed(0)
    convolution = next(iter(optimizer.curvature.values()))
    found = set()
    for step in range(1, 91 if "factor_interval" in options else 61):
        x = torch.randn(rows // 4, 20, 2, 2, generator=generator)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if convolution.version["basis"] == step:
            found.add(step)
        assert convolution.version["factors"] == max(
            s for s in range(1, step + 1) if optimizer.options.schedule.factors_due(s)
        )
    assert found == expected


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_which_bases_are_dear_does_not_depend_on_micro_batches(
    sharing: Literal["expand", "reduce"],
) -> None:
    """The rows of all of them count: here 64 and 4, and 20 passes are the limit."""
    found = []
    for count in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(8, 10, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).double()
        optimizer = EKFAC(model, lr=1e-3, sharing=sharing)
        convolution = next(iter(optimizer.curvature.values()))
        refreshed = []
        generator = torch.Generator().manual_seed(1)
        for step in range(1, 5):
            x = torch.randn(4, 8, 4, 4, generator=generator).double()
            y = torch.randint(0, 10, (4,), generator=generator)
            optimizer.zero_grad()
            for inputs, targets in zip(x.chunk(count), y.chunk(count), strict=True):
                (cross_entropy(model(inputs), targets) / count).backward()
            optimizer.step()
            refreshed.append(convolution.version["basis"] == step)
        found.append((refreshed, model[0].weight.detach()))
    # 9 * (73^3 + 10^3) / (6 * rows * 10 * 73) = 12.5, and 200 of 4 rows.
    assert found[0][0] == [True, False, sharing == "expand", False]
    assert found[1][0] == found[0][0]
    assert support.relative_error(found[1][1], found[0][1]) < 1e-9


@pytest.mark.parametrize("direction", ["natural", "spectral"])
def test_the_optimizer_keeps_to_the_schedule(
    direction: Literal["natural", "spectral"],
) -> None:
    """Layers that move as with AdamW, as norms, have scalings with the factors."""
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = EKFAC(
        model,
        lr=1e-3,
        direction=direction,
        factor_interval=4,
        basis_interval=12,
        scaling_interval=3,
        basis_tolerance=0.0,
    )
    schedule = optimizer.options.schedule
    for step, batch in enumerate(batches(40, (5, 3)), start=1):
        one_step(model, optimizer, batch)
        for index, layer in enumerate(optimizer.curvature.values()):
            found = {key: version == step for key, version in layer.version.items()}
            assert found == {
                "factors": schedule.factors_due(step),
                "basis": schedule.basis_due(step, index, 3),
                "scalings": schedule.scalings_due(step)
                and (
                    schedule.factors_due(step)
                    or not moves_as_adamw(layer.block, optimizer.options)
                ),
            }


@pytest.mark.parametrize("scaling", ["per_example", "running_average"])
def test_a_basis_that_still_fits_is_kept(scaling: str) -> None:
    model, batch = perceptron(5, 4, 3), batches(1, (5, 3))[0]
    optimizer = EKFAC(model, lr=0.0, basis_interval=1, scaling=scaling)
    one_step(model, optimizer, batch)
    bases = {
        name: (layer.Q_A.clone(), layer.Q_G.clone())  # type: ignore[union-attr]
        for name, layer in optimizer.curvature.items()
    }
    assert optimizer.counters.decomposed == 4
    for _ in range(3):
        one_step(model, optimizer, batch)  # the weights stay: so do the factors
    assert optimizer.counters.decomposed == 4
    assert optimizer.counters.skipped == 3 * 4
    for name, layer in optimizer.curvature.items():
        assert layer.Q_A is not None
        assert layer.Q_G is not None
        assert torch.equal(layer.Q_A, bases[name][0])
        assert torch.equal(layer.Q_G, bases[name][1])
    for batch in batches(5, (5, 3), seed=8):
        one_step(model, optimizer, (batch[0] * torch.arange(1.0, 6.0), batch[1]))
    assert optimizer.counters.decomposed > 4, "other data move the basis"


# -- precision -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 200, 120), (2, 130, 150), (1, 3, 400)])
def test_rotation_back_is_off_by_rounding_to_bfloat16(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    b, d_out, d_in = shape
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left = torch.linalg.qr(torch.randn(b, d_out, d_out)).Q
    right = torch.linalg.qr(torch.randn(b, d_in, d_in)).Q
    exact = left.double() @ matrix.double() @ right.double().transpose(-1, -2)
    found = kernels.rotate_back(matrix, left, right, precise=False)
    assert found.dtype == torch.float32
    assert support.relative_error(found.double(), exact) < 6e-3
    full = kernels.rotate_back(matrix, left, right, precise=True)
    assert support.relative_error(full.double(), exact) < 1e-5
    wide = kernels.rotate_back(
        matrix.double(), left.double(), right.double(), precise=False
    )
    assert support.relative_error(wide, exact) < 1e-12
    one_sided = kernels.rotate_back(matrix, None, right, precise=False)
    assert support.relative_error(one_sided, matrix @ right.transpose(-1, -2)) < 6e-3


@pytest.mark.parametrize("sides", ["both", "left", "right"])
@pytest.mark.parametrize("shape", [(1, 300, 250), (3, 210, 220), (1, 20, 1000)])
def test_rotation_into_a_basis_keeps_a_large_coordinate_out_of_the_others(
    shape: tuple[int, int, int], sides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row and column are a hundred times as large; they are exact."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    b, d_out, d_in = shape
    torch.manual_seed(0)
    expected = torch.randn(shape, dtype=torch.float64)
    if sides != "right":
        expected[:, -1, :] *= 100
    if sides != "left":
        expected[:, :, -1] *= 100
    left, right = (
        torch.linalg.qr(torch.randn(b, d, d, dtype=torch.float64)).Q
        for d in (d_out, d_in)
    )
    matrix = expected
    matrix = matrix if sides == "right" else left @ matrix
    matrix = matrix if sides == "left" else matrix @ right.mT
    single = matrix.float()
    bases = (
        None if sides == "right" else left.float(),
        None if sides == "left" else right.float(),
    )
    before = single.clone()
    found = kernels.rotate_into(single, *bases, precise=False)
    assert torch.equal(single, before)
    assert found.dtype == torch.float32
    rows = slice(None) if sides == "right" else slice(-1)
    columns = slice(None) if sides == "left" else slice(-1)
    rest = found[:, rows, columns].double()
    assert 1e-3 < support.relative_error(rest, expected[:, rows, columns]) < 6e-3
    if sides != "right":
        last = found[:, -1].double()
        assert support.relative_error(last, expected[:, -1]) < 1e-5
    if sides != "left":
        last = found[..., -1].double()
        assert support.relative_error(last, expected[..., -1]) < 1e-5
    full = kernels.rotate_into(single, *bases, precise=True).double()
    assert support.relative_error(full, expected) < 1e-5


def test_rounding_changes_the_step_of_an_auto_encoder_by_less_than_a_fifth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The means of sigmoid units and of the inputs hold most of its gradients."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(400, 300), nn.Sigmoid(), nn.Linear(300, 200), nn.Sigmoid()
    ).append(nn.Linear(200, 400))
    mixed = torch.randn(20, 400)
    optimizer = EKFAC(model, lr=3e-3, precision="full")
    for _ in range(12):
        x = torch.sigmoid(torch.randn(200, 20) @ mixed / 2 - 1)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), x)
        loss.backward()
        optimizer.step()
    state = optimizer.state_dict()
    moves = {}
    for precision in ("auto", "full"):
        twin = copy.deepcopy(model)
        other = EKFAC(twin, lr=3e-3, precision=precision)  # type: ignore[arg-type]
        other.load_state_dict(copy.deepcopy(state))
        nn.functional.binary_cross_entropy_with_logits(twin(x), x).backward()
        moves[precision] = support.step_of(twin, other)
    for name in ("0.weight", "2.weight", "4.weight"):
        error = support.relative_error(moves["auto"][name], moves["full"][name])
        assert 1e-3 < error < 0.2, name


def test_only_the_spectral_direction_rounds_gradients_into_their_bases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The natural one divides by scalings that rounding would hide."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    scalings = {}
    for direction, precision in itertools.product(
        ("natural", "spectral"), ("auto", "full")
    ):
        torch.manual_seed(0)
        model = perceptron(250, 220, 10)
        optimizer = EKFAC(
            model,
            lr=0.0,
            precision=precision,  # type: ignore[arg-type]
            direction=direction,  # type: ignore[arg-type]
        )
        for _ in range(3):
            x = torch.rand(200, 250)
            one_step(model, optimizer, (x, torch.arange(200) % 10))
        found = optimizer.curvature["0"].averages["s"].read()
        assert found is not None
        scalings[direction, precision] = found
    exact = scalings["natural", "full"]
    assert torch.equal(scalings["natural", "auto"], exact)
    assert torch.equal(scalings["spectral", "full"], exact)
    assert 0 < support.relative_error(scalings["spectral", "auto"], exact) < 5e-3


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "full"}, {"rank": 20}, {"rank": 20, "momentum": 0.0}],
)
@pytest.mark.parametrize("entries", ["one", "all"])
def test_finite_gradients_whose_coordinates_overflow_are_left_out(
    entries: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One above bfloat16's largest number, or the sum of many above float32's."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model = perceptron(250, 220, 10)
    optimizer = EKFAC(model, lr=1e-3, **options)
    for step in range(4):
        optimizer.zero_grad()
        cross_entropy(model(torch.rand(60, 250)), torch.arange(60) % 10).backward()
        weight = model[0].weight
        assert weight.grad is not None
        before = optimizer.counters.rejected
        if step == 2:
            if entries == "one":
                weight.grad[0, 0] = 3.39e38
            else:
                weight.grad.fill_(1e38)
        old = weight.detach().clone()
        optimizer.step()
        assert optimizer.counters.rejected - before == (step == 2)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        if step == 2 and options.get("momentum") == 0:
            assert torch.equal(weight, old)


@pytest.mark.parametrize("native", [False, True])
def test_thin_factors_are_rotated_where_that_is_cheaper(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the whole gradient costs a third, so fewer rows are worth it."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: native)
    for examples, pays in ((60, not native), (20, True)):
        model = perceptron(300, 250, 2)
        optimizer = EKFAC(model, lr=1e-3, basis_interval=16)
        watch = Watch(optimizer, rtol=1e-4)
        for _ in range(8):
            x = torch.rand(examples, 300)
            one_step(model, optimizer, (x, torch.arange(examples) % 2))
        names = {name for name, used in watch.layers if used}
        assert ("0" in names) == pays
        optimizer.close()


@pytest.mark.parametrize("direction", ["natural", "spectral"])
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_precision_changes_a_step_by_rounding_alone(
    kind: type[KroneckerOptimizer],
    direction: Literal["natural", "spectral"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By that of the rotation back, and of the polar factor of a matrix of rank 32."""
    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    moves = {}
    for precision in ("auto", "full"):
        torch.manual_seed(0)
        model = perceptron(150, 200, 10)
        optimizer = kind(model, lr=1e-3, precision=precision, direction=direction)
        cross_entropy(model(torch.randn(32, 150)), torch.arange(32) % 10).backward()
        moves[precision] = support.step_of(model, optimizer)["0.weight"]
    error = support.relative_error(moves["auto"], moves["full"])
    assert 0 < error < {"natural": 6e-3, "spectral": 0.08}[direction]


# -- the gradient from its thin factors ------------------------------------------------


class Watch:
    """Counts how often the thin projection was used, and checks it where it was."""

    def __init__(self, optimizer: KroneckerOptimizer, rtol: float) -> None:
        self.used, self.refused = 0, 0
        self.layers: set[tuple[str, bool]] = set()
        self.rtol = rtol
        self._original = optimizer._collector.thin_projection
        optimizer._collector.thin_projection = self  # type: ignore[method-assign,assignment]

    def __call__(
        self, layer: LayerCurvature, gradients: Sequence[Tensor]
    ) -> ProjectedGradient | None:
        thin = self._original(layer, gradients)
        self.layers.add((layer.name, thin is not None))
        if thin is None:
            self.refused += 1
            return None
        self.used += 1
        gradient = layer.block.pack(gradients)
        full = kernels.rotate_matrix(gradient, layer.basis("G"), layer.basis("A"))
        assert thin.parts is not None
        assert support.relative_error(thin.parts.kept, full) < self.rtol, layer.name
        return thin


def l2(model: nn.Module) -> Tensor:
    return sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


def l1(model: nn.Module) -> Tensor:
    return sum((p.abs().sum() for p in model.parameters()), torch.zeros(()))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: perceptron(30, 40, 24),
    "one output": lambda: perceptron(30, 40, 1),
    "two outputs": lambda: perceptron(30, 2),
    "one input": lambda: perceptron(1, 30),
}


def thin_batches(model: nn.Module, examples: int) -> list[tuple[Tensor, Tensor]]:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sizes = layers[0].in_features, layers[-1].out_features
    return [
        (torch.rand(examples, sizes[0]), torch.randn(examples, sizes[1]))
        for _ in range(8)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("penalty", [None, l1, l2])
@pytest.mark.parametrize("network", NETWORKS)
def test_thin_projection(
    network: str,
    penalty: Callable[[nn.Module], Tensor] | None,
    clip: bool,
    dtype: torch.dtype,
) -> None:
    """Used only where it is the gradient: a clipped one is, one with a penalty not."""
    for scaling in ("per_example", "running_average"):
        model = NETWORKS[network]().to(dtype)
        examples = 3
        # A layer that is not refreshed at a step may be projected thinly there.
        optimizer = EKFAC(model, lr=1e-3, scaling=scaling, basis_interval=16)
        watch = Watch(optimizer, rtol=1e-4 if dtype is torch.float32 else 1e-12)
        for x, y in thin_batches(model, examples):
            x, y = x.to(dtype), y.to(dtype)
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            if penalty is not None:
                loss = loss + 1e-2 * penalty(model).to(dtype)
            loss.backward()
            if clip:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                assert norm > 1e-2
            optimizer.step()
        if penalty is not None:
            assert watch.used == 0
        elif scaling == "per_example" or network == "wide":
            assert watch.used > 0
        optimizer.close()


def test_thin_projection_over_accumulated_batches() -> None:
    model = perceptron(30, 40, 24)
    optimizer = EKFAC(model, lr=1e-3)
    watch = Watch(optimizer, rtol=1e-4)
    for i, sizes in enumerate([(2, 3), (3, 2), (2, 30), (30, 2), (1, 1)] * 3):
        optimizer.zero_grad()
        for size in sizes:
            x, y = torch.rand(size, 30), torch.randint(24, (size,))
            loss = cross_entropy(model(x), y, reduction="sum") / sum(sizes)
            loss.backward()
        optimizer.step()
        assert i > 0 or watch.used == 0
    assert watch.used > 0
    assert watch.refused > 0


def test_a_profile_names_the_parts_of_a_step() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = EKFAC(model, scaling="per_example")
    with torch.profiler.profile() as profile:
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model(torch.randn(5, 3)), torch.arange(5) % 2).backward()
            optimizer.step()
    parts = ("capture", "factors", "basis", "scalings", "precondition")
    names = {event.key for event in profile.key_averages()}
    assert names.issuperset(f"ekfac::{part}" for part in parts)
