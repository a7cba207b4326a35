"""Initialisation of networks without normalisation (George 2023, A.3)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ekfac.diagnostics.papers.george import initialise_residual_


class Branch(nn.Module):
    """A residual block with a convolution in its skip connection."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(d_in, d_out, 3, padding=1)
        self.last = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.skip = nn.Conv2d(d_out, d_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of branch and skip; the latter after no activation."""
        first = self.first(x)
        return torch.relu(self.last(first.relu()) + self.skip(first))


def network(width: int = 40, blocks: int = 1) -> nn.Sequential:
    """Return a residual network."""
    branches = [Branch(width, width) for _ in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        *branches,
        nn.Flatten(),
        nn.Linear(width * 16, 50),
    )


def test_variances_are_those_of_the_three_kinds() -> None:
    model, generator = network(), torch.Generator().manual_seed(0)
    inputs = torch.zeros(4, 3, 8, 8)
    found = initialise_residual_(model, inputs, last=["3.last"], generator=generator)
    width = 40
    expected = {
        "0": 1 / 27,  # of the noisy image
        "3.first": 2 / (9 * width),  # behind a ReLU and pooling
        "3.last": 0.2 / (9 * width),
        "3.skip": 1 / width,
        "5": 2 / (16 * width),
    }
    assert found == pytest.approx(expected)
    for name, variance in expected.items():
        layer = model.get_submodule(name)
        # The sample variance of m normal numbers has relative deviation sqrt(2 / m).
        spread = (2 / layer.weight.numel()) ** 0.5
        measured = float(layer.weight.var())
        assert measured == pytest.approx(variance, rel=4 * spread), name
        assert not layer.bias.any()


def test_outputs_of_a_deep_network_keep_their_scale() -> None:
    sizes = []
    for blocks in (1, 8):
        torch.manual_seed(0)
        model, names = network(24, blocks), [f"{3 + i}.last" for i in range(blocks)]
        x = torch.randn(16, 3, 8, 8)
        initialise_residual_(model, x, last=names)
        sizes.append(float(model(x).std()))
    assert 0.2 < sizes[0] < 5
    assert sizes[1] / sizes[0] < 20


def test_unknown_names_change_nothing() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"last names \['3.nothing'\].*'3.skip'"):
        initialise_residual_(model, torch.zeros(2, 3, 8, 8), last=["3.nothing"])
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert model.training
