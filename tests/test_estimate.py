"""Curvature matrices from data, against torch.func and other libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import relative_error
from test_exactness import (
    NETWORKS,
    bernoulli_fisher,
    block_of,
    build,
    dense_fisher,
    gaussian_fisher,
    jacobians,
    softmax_fisher,
)
from torch import Tensor, nn

import ekfac
from ekfac.vectors import ParameterVector, VectorSpace

TIGHT = 1e-10


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with at most 400 parameters, in eval mode, and 5 examples."""
    model, x = build(name, examples=5)
    assert sum(p.numel() for p in model.parameters()) <= 400
    return model.eval(), x


def uneven(x: Tensor, y: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
    """Return the examples in batches of 3 and 2."""
    if y is None:
        return [(x[:3], None), (x[3:], None)]
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def same_layer(model: nn.Module) -> Tensor:
    """Return ``[P, P]``, true where two entries belong to one module."""
    names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
    owners = [layer_of(name) for name in names]
    return torch.tensor([[a == b for b in owners] for a in owners])


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_structures_equal_the_dense_fisher(name):
    model, x = network(name)
    F = dense_fisher(model, x, softmax_fisher)
    found = {
        structure: ekfac.fisher(model, uneven(x), structure).to_dense()
        for structure in ("dense", "low_rank", "implicit", "block_diagonal", "diagonal")
    }
    for structure in ("dense", "low_rank", "implicit"):
        assert relative_error(found[structure], F) < TIGHT, structure
    blocks = torch.where(same_layer(model), F, 0.0)
    assert relative_error(found["block_diagonal"], blocks) < TIGHT
    assert relative_error(found["diagonal"], F.diagonal().diag()) < TIGHT
