"""Factors from a part of a large batch: what they estimate, and of which layers."""

from __future__ import annotations

from typing import Any

import pytest
import support
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.curvature import normal_form

CLASSES = 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Linear(64, 12),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    ).double()


def factors(
    model: nn.Module, x: Tensor, y: Tensor, **options: Any
) -> dict[str, dict[str, Tensor]]:
    """Return every layer's factors after one step."""
    optimizer = EKFAC(model, lr=0.0, **options)
    cross_entropy(model(x), y, ignore_index=-1).backward()
    optimizer.step()
    model.zero_grad()
    optimizer.close()
    return {
        name: {"A": layer.A, "G": layer.G}
        for name, layer in optimizer.curvature.items()
    }


def batch(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (size,), generator=generator)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_factors_of_equal_examples_are_those_of_all(
    monkeypatch: pytest.MonkeyPatch, fisher: str
) -> None:
    x, y = (t[:1].repeat_interleave(64, dim=0) for t in batch(1))
    found = factors(network(), x, y, fisher=fisher)
    monkeypatch.setattr(normal_form, "ROWS", 1 << 40)
    expected = factors(network(), x, y, fisher=fisher)
    for name, sides in expected.items():
        for side, factor in sides.items():
            assert support.relative_error(found[name][side], factor) < 1e-12


def test_every_fourth_example_counts_of_a_layer_with_many_positions() -> None:
    """64 positions an image: 16 images have the 1,024 rows that are enough."""
    x, y = batch(64)
    patches = nn.functional.unfold(x[::4], 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
    found = factors(network(), x, y)
    expected = rows.T @ rows / len(rows)
    assert support.relative_error(found["0"]["A"][0], expected) < 1e-12
    model = network()
    inputs: dict[str, Tensor] = {}
    for name in ("0", "5"):
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda module, args, out, name=name: inputs.update({name: out})
        )
    loss = cross_entropy(model(x), y, reduction="sum")
    first, last = torch.autograd.grad(loss, [inputs["0"], inputs["5"]])
    columns = first[::4].permute(1, 0, 2, 3).flatten(1)
    expected = columns @ columns.T / 16
    assert support.relative_error(found["0"]["G"][0], expected) < 1e-12
    # One row an example: all count.
    assert support.relative_error(found["5"]["G"][0], last.T @ last / 64) < 1e-12


def test_estimates_agree_with_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With targets that do not count, too."""
    x, y = batch(1024)
    y[::3] = -1
    found = factors(network(), x, y)
    monkeypatch.setattr(normal_form, "ROWS", 1 << 40)
    expected = factors(network(), x, y)
    for side in ("A", "G"):
        error = support.relative_error(found["0"][side], expected["0"][side])
        assert 0 < error < 0.3, side
