"""Stacks of layers: their views hold while nothing changes, and no longer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.curvature.eigenbasis import refresh_
from ekfac.curvature.stacks import Stack, Stacks, stacks_of
from ekfac.optim.optimizer import KroneckerOptimizer

Event = Callable[[nn.Sequential, KroneckerOptimizer], object]


def network() -> nn.Sequential:
    """Return a network in which several layers have one shape."""
    torch.manual_seed(0)
    equal = [layer for _ in range(4) for layer in (nn.Linear(7, 7), nn.Tanh())]
    return nn.Sequential(nn.Linear(5, 7), *equal, nn.Linear(7, 10))


def train(
    model: nn.Module, optimizer: KroneckerOptimizer, first: int, count: int
) -> None:
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(12, 5, generator=generator)
        y = torch.randint(0, 10, (12,), generator=generator)
        optimizer.zero_grad()
        weight = next(model.parameters())
        cross_entropy(model(x.to(weight)), y).backward()
        optimizer.step()


def load(model: nn.Sequential, optimizer: KroneckerOptimizer) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 50, 3)
    optimizer.load_state_dict(state)


def set_momentum(value: float) -> Event:
    def change(model: nn.Sequential, optimizer: KroneckerOptimizer) -> None:
        for group in optimizer.param_groups:
            group["momentum"] = value

    return change


def exchange(model: nn.Sequential, optimizer: KroneckerOptimizer) -> None:
    model[3].bias = None


def freeze(model: nn.Sequential, optimizer: KroneckerOptimizer) -> None:
    model[3].requires_grad_(False)


def widen(model: nn.Sequential, optimizer: KroneckerOptimizer) -> None:
    optimizer._collector.curvature.widen("3")


EVENTS: dict[str, list[Event]] = {
    "nothing": [],
    "a state is loaded": [load],
    "momentum is turned off and on": [set_momentum(0.0), set_momentum(0.9)],
    "a layer loses its bias": [exchange],
    "a layer is frozen": [freeze],
    "another type": [lambda model, optimizer: model.double()],
    "a layer in double precision": [widen],
    "a copy": [lambda model, optimizer: copy.deepcopy(optimizer)],
}


@pytest.mark.parametrize("options", [{}, {"direction": "natural"}, {"rank": 0.9}])
@pytest.mark.parametrize("name", EVENTS)
def test_kept_views_are_those_of_the_moment(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is the same, bit for bit, with views that are made at every step."""

    def run() -> dict[str, Tensor]:
        model = network().float()
        optimizer = EKFAC(model, lr=0.01, basis_interval=4, **options)
        train(model, optimizer, 0, 6)
        for number, event in enumerate(EVENTS[name]):
            event(model, optimizer)
            train(model, optimizer, 10 + 7 * number, 7)
        train(model, optimizer, 30, 5)
        return support.parameters(model)

    kept = run()
    monkeypatch.setattr(Stack, "_outdated", lambda self: True)
    of = Stacks.of

    def fresh(self: Stacks, *arguments: Any) -> dict[Any, list[Stack]]:
        self._kept.clear()
        return of(self, *arguments)

    monkeypatch.setattr(Stacks, "of", fresh)
    for parameter, value in run().items():
        assert torch.equal(value, kept[parameter]), parameter


def test_layers_that_are_gone_are_not_kept() -> None:
    """As those on a device that the model has left: their banks would stay."""
    model = network()
    optimizer = EKFAC(model, lr=0.01)
    train(model, optimizer, 0, 3)
    stacks, layers = Stacks(), list(optimizer.curvature.values())
    before = [weakref.ref(layer) for layer in layers]
    stacks.of({"cpu": layers[:3], "cuda": layers[3:]})
    optimizer._collector._stacks = stacks
    del layers
    model.double()  # everything moves to other banks
    train(model, optimizer, 3, 1)
    gc.collect()
    assert all(layer() is None for layer in before)


def test_views_are_made_once() -> None:
    model = network()
    optimizer = EKFAC(model, lr=0.01)
    train(model, optimizer, 0, 4)
    layers = [optimizer.curvature[str(number)] for number in (1, 3, 5, 7)]
    stack = Stack.of(layers)
    assert [id(layer) for layer in stack.layers] == [id(layer) for layer in layers]
    train(model, optimizer, 4, 4)
    assert Stack.of(layers) is stack
    gradients = [[p.grad for p in layer.block.tensors()] for layer in layers]
    matrices = stack.pack([[g for g in own if g is not None] for own in gradients])
    for layer, matrix in zip(layers, matrices.split(1), strict=True):
        weight, bias = (p.grad for p in layer.block.tensors())
        expected = torch.cat([weight, bias.unsqueeze(1)], dim=1)
        assert torch.equal(matrix[0], expected)
    train(model, optimizer, 8, 1)  # step 9 finds new bases
    assert Stack.of(layers) is not stack


@pytest.mark.usefixtures("float64")
def test_bases_of_a_stack_are_replaced_as_algebra_says() -> None:
    """Each layer's scalings and momentum move with its own two rotations.

    With ``R = Q_old^T Q_new`` they become ``(R o R)^T s (R o R)`` and ``R^T M R``.
    """
    model = network()
    optimizer = EKFAC(model, lr=1e-2, factor_interval=1)
    train(model, optimizer, 0, 4)
    names = [f"{number}" for number in (1, 3, 5, 7)]
    layers = [optimizer.curvature[name] for name in names]
    before = [
        {
            "A": layer.Q_A.clone(),
            "G": layer.Q_G.clone(),
            "s": layer.averages["s"].total.clone(),
            "M": layer.momentum.total.clone(),
        }
        for layer in layers
    ]
    (stack,) = stacks_of(layers, lambda layer: None)
    assert len(stack) == 4
    refresh_(layers, 5, 0.0, optimizer.counters)
    for layer, old in zip(layers, before, strict=True):
        factors = {"A": layer.A[0], "G": layer.G[0]}
        R = {}
        for side, new in (("A", layer.Q_A), ("G", layer.Q_G)):
            diagonal = new[0].T @ factors[side] @ new[0]
            assert support.relative_error(diagonal.diag().diag(), diagonal) < 1e-9
            R[side] = old[side].mT @ new
        turned = R["G"].square().mT @ old["s"] @ R["A"].square()
        moved = R["G"].mT @ old["M"] @ R["A"]
        assert support.relative_error(layer.averages["s"].total, turned) < 1e-9
        assert support.relative_error(layer.momentum.total, moved) < 1e-9
