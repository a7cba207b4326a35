"""Single operations and whole steps, timed by pytest-benchmark.

    python -m pytest benchmarks/test_operations.py --benchmark-only

The sizes are those of the auto-encoder 784-1000-500-250-30 and back at batch 200 (its
widest layer, or the whole network), and a convolution's positions. Not collected by a
plain ``pytest``, whose ``testpaths`` leave this folder out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import example
from torch import Tensor, nn

from ekfac import EKFAC, KFAC, kernels
from ekfac.curvature import Counters
from ekfac.curvature.eigenbasis import decompose, refresh_

N, D_OUT, D_IN = 200, 1000, 785
INTERVAL = 50

# Positions and sides: the sum over positions of rotated vectors, or rotated sums.
POSITIONS = {"rotate vectors": (4, 128, 128), "rotate sums": (256, 32, 32)}

STEPS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
    "KFAC": lambda model: KFAC(model, lr=1e-5, basis_interval=INTERVAL),
    "EKFAC": lambda model: EKFAC(
        model, lr=1e-5, basis_interval=INTERVAL, scaling="per_example"
    ),
    "EKFAC-ra": lambda model: EKFAC(model, lr=1e-5, basis_interval=INTERVAL),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def basis(size: int) -> Tensor:
    """Return a random orthogonal ``[1, size, size]``."""
    result: Tensor = torch.linalg.qr(torch.randn(1, size, size)).Q
    return result


def test_gram(benchmark: Any) -> None:
    """The input factor's sum of outer products."""
    rows = torch.randn(N, 1, 1, D_OUT)
    result = benchmark(kernels.gram, rows)
    assert result.shape == (1, D_OUT, D_OUT)


def test_second_moment_one_position(benchmark: Any) -> None:
    """Scalings and projected gradient of a linear layer."""
    grads, inputs = torch.randn(N, 1, 1, D_OUT), torch.randn(N, 1, 1, D_IN)
    left, right = basis(D_OUT), basis(D_IN)
    squares, _ = benchmark(kernels.second_moment, grads, inputs, left, right)
    assert squares.shape == (1, D_OUT, D_IN)


@pytest.mark.parametrize("order", POSITIONS)
def test_second_moment_positions(benchmark: Any, order: str) -> None:
    """The same with shared positions, in both orders of contraction."""
    positions, d_out, d_in = POSITIONS[order]
    vectors = positions * (d_out**2 + d_in**2) < d_out * d_in * (d_out + d_in)
    assert vectors == (order == "rotate vectors")
    grads = torch.randn(N, positions, 1, d_out)
    inputs = torch.randn(N, positions, 1, d_in)
    left, right = basis(d_out), basis(d_in)
    squares, _ = benchmark(kernels.second_moment, grads, inputs, left, right)
    assert squares.shape == (1, d_out, d_in)


def test_rotate_matrix(benchmark: Any) -> None:
    """A gradient's rotation into the basis."""
    matrix, left, right = torch.randn(1, D_OUT, D_IN), basis(D_OUT), basis(D_IN)
    result = benchmark(kernels.rotate_matrix, matrix, left, right)
    assert result.shape == matrix.shape


def test_decompose(benchmark: Any) -> None:
    """The eigendecomposition of the widest factor."""
    factor = kernels.gram(torch.randn(N, 1, 1, D_OUT))
    result = benchmark.pedantic(decompose, args=(factor, Counters()), rounds=3)
    assert result is not None


def autoencoder(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> tuple[torch.optim.Optimizer, Callable[[], None]]:
    """Return an optimizer of the auto-encoder, and a function that does a step."""
    module = example("autoencoder")
    model, x = module.network(D_IN - 1), torch.rand(N, D_IN - 1)
    optimizer = make(model)

    def step() -> None:
        optimizer.zero_grad()
        module.reconstruction_loss(model, x).backward()
        optimizer.step()

    return optimizer, step


def test_refresh(benchmark: Any) -> None:
    """One layer's refresh: both decompositions and the transport."""
    optimizer, step = autoencoder(STEPS["EKFAC"])
    assert isinstance(optimizer, EKFAC)
    step()
    layer = next(iter(optimizer.curvature.values()))
    arguments = (layer, 1, 0.0, optimizer.counters)  # tolerance 0: never skipped
    assert benchmark.pedantic(refresh_, args=arguments, rounds=3)


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark: Any, name: str) -> None:
    """A whole step between two refreshes; step.py has them amortised in."""
    _, step = autoencoder(STEPS[name])
    # Refreshes are at steps 1, 3, 9, 20 and 60.
    benchmark.pedantic(step, rounds=10, warmup_rounds=20 if "KFAC" in name else 2)
