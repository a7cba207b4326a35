"""A network, its batches and every kind of optimizer, for tests of training loops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC
from ekfac.optim.optimizer import KroneckerOptimizer

FISHERS = ("empirical", "mc", "exact")


@dataclass(frozen=True)
class Method:
    """An optimizer and its options; every interval ends within a few steps."""

    name: str
    optimizer: type[KroneckerOptimizer]
    options: dict[str, Any]

    def __call__(self, params: Any, lr: float = 1e-3, **own: Any) -> KroneckerOptimizer:
        torch.manual_seed(0)  # where the optimizer takes its own seed from
        intervals = {"factor_interval": 3, "basis_interval": 4}
        if self.optimizer is EKFAC:
            intervals["scaling_interval"] = 2
        return self.optimizer(params, lr, **{**intervals, **self.options, **own})


METHODS = [
    Method(f"{name} {fisher}", kind, {**options, "fisher": fisher})
    for fisher in FISHERS
    for name, kind, options in (
        ("KFAC", KFAC, {}),
        ("EKFAC-ra", EKFAC, {"scaling": "running_average"}),
        ("EKFAC", EKFAC, {"scaling": "per_example"}),
    )
] + [
    Method(
        f"{name} empirical delayed",
        kind,
        {**options, "fisher": "empirical", "basis_delay": 3},
    )
    for name, kind, options in (
        ("KFAC", KFAC, {}),
        ("EKFAC", EKFAC, {"scaling": "per_example"}),
    )
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
every_fisher = pytest.mark.parametrize("fisher", FISHERS)


def example_batch(number: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Return inputs ``[size, 6]`` and classes out of 4, always the same by number."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (size,), generator=generator)
    return x.to(torch.get_default_dtype()), y


def small_classifier(activation: nn.Module | None = None) -> nn.Sequential:
    """Return a network for :func:`example_batch`, always the same."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 16),
            nn.LayerNorm(16),
            nn.ReLU() if activation is None else activation,
            nn.Linear(16, 16),
            nn.Tanh(),
            nn.Linear(16, 4),
        )


def loss_of(model: nn.Module, number: int, size: int = 6) -> Tensor:
    """Return the loss on the batch with this number."""
    x, y = example_batch(number, size)
    return cross_entropy(model(x), y)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Iterable[int],
    size: int = 6,
) -> None:
    """Do one step on each batch."""
    for number in numbers:
        optimizer.zero_grad()
        loss_of(model, number, size).backward()
        optimizer.step()


# -- what tells two runs apart --------------------------------------------------------


def statistics(optimizer: KroneckerOptimizer) -> dict[str, Tensor]:
    """Return every tensor of the curvature that has been computed."""
    found = {}
    for name, layer in optimizer.curvature.items():
        for key in ("A", "G", "Q_A", "Q_G", "s"):
            value = getattr(layer, key)
            if value is not None:
                found[f"{name}.{key}"] = value
    return found


def flattened(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and sequences by path, tensors copied."""
    if isinstance(tree, Tensor):
        return {path: tree.detach().clone()}
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    else:
        return {path: tree}
    result: dict[str, Any] = {}
    for key, value in items:
        result |= flattened(value, f"{path}.{key}")
    return result


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return copies of all that a step may change."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return flattened(state)


def assert_identical(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compare two snapshots bit for bit."""
    assert found.keys() == expected.keys()
    differing = [
        key
        for key, value in expected.items()
        if not (
            torch.equal(found[key], value) and found[key].dtype == value.dtype
            if isinstance(value, Tensor)
            else found[key] == value
        )
    ]
    assert not differing


def hooks(model: nn.Module) -> int:
    """Return how many forward hooks the modules have."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    )
