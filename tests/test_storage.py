"""State stored by halves, bases in bfloat16: its size, its error, its choice."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training_cases import example_batch, small_classifier, train

from ekfac import EKFAC, KFAC
from ekfac.curvature.stacked_storage import state_bytes, storages_within
from ekfac.errors import EkfacWarning

INTERVALS: dict[str, Any] = {"factor_interval": 1, "basis_interval": 4}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def trained(storage: str, steps: int, kind: type[Any] = EKFAC, **options: Any) -> Any:
    """Return a network in double precision and its optimizer after some steps."""
    model = small_classifier().double()
    options = {"lr": 1e-2, **INTERVALS, "storage": storage, **options}
    optimizer = kind(model, **options)
    for number in range(steps):
        x, y = example_batch(number)
        optimizer.zero_grad()
        cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_halves_of_factors_train_as_the_whole(kind: type[Any]) -> None:
    """The other half is the same by symmetry; in double precision to rounding."""
    packed, expected = (trained(s, 12, kind)[0] for s in ("packed", "full"))
    for p, q in zip(packed.parameters(), expected.parameters(), strict=True):
        assert relative_error(p, q) < 1e-9


def test_what_is_read_is_within_bfloat16s_rounding() -> None:
    """One batch, so that factors and bases of both are of the same numbers."""
    low, full = (trained(s, 1)[1].curvature for s in ("bfloat16", "full"))
    for name, layer in full.items():
        for key in ("A", "G"):
            found = getattr(low[name], key)
            assert found.dtype == torch.float64
            assert relative_error(found, getattr(layer, key)) < 1e-12
        for Q in (low[name].Q_A, low[name].Q_G):
            if Q is not None:
                eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
                assert (Q.mT @ Q - eye).abs().max() < 2**-6


def test_scalings_and_momentum_keep_the_layers_type() -> None:
    _, optimizer = trained("bfloat16", 3)
    for layer in optimizer.curvature.values():
        state = layer.state_dict()
        for key, value in state.items():
            if isinstance(value, Tensor):
                low = key.startswith("Q_")
                assert value.dtype == (torch.bfloat16 if low else torch.float64), key


@pytest.mark.parametrize(("kind", "rank"), [(KFAC, None), (EKFAC, None), (EKFAC, 8)])
def test_bytes_are_what_is_predicted(kind: type[Any], rank: int | None) -> None:
    """K-FAC has no scalings; what moves as AdamW does no second momentum."""
    model = nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 4))
    sizes = {}
    for storage in ("full", "packed", "bfloat16"):
        own = {} if rank is None else {"rank": rank}
        optimizer = kind(model, storage=storage, **own, **INTERVALS)
        train(model, optimizer, range(2))
        for layer in optimizer.curvature.values():
            held = layer.held
            # Of the averages, and that of shares along the weights.
            weights = 4 * (2 + held.scalings + held.momentum + 2)
            predicted = state_bytes(layer.block, rank, layer.storage, held)
            assert layer.bytes() == predicted + weights
            assert held.scalings == (kind is EKFAC)
            assert held.momentum
        sizes[storage] = sum(layer.bytes() for layer in optimizer.curvature.values())
        optimizer.close()
    assert sizes["bfloat16"] < sizes["packed"] < sizes["full"]


def test_a_budget_is_kept_by_the_layers_that_save_most() -> None:
    """``describe()`` says which; the bytes are counted from the tensors."""
    full = sum(layer.bytes() for layer in EKFAC(small_classifier()).curvature.values())
    seen = []
    for share in (1.0, 0.9, 0.7):
        budget = int(full * share)
        optimizer = EKFAC(small_classifier(), memory_budget=budget)
        layers = optimizer.curvature.values()
        assert sum(layer.bytes() - 24 for layer in layers) <= budget
        seen.append({layer.name: layer.storage for layer in layers})
        table = str(optimizer.describe())
        for layer in layers:
            stored = f"stored {layer.storage}"
            dense = not all(layer.block.diagonal)
            assert (stored in table) or layer.storage == "full" or not dense
    assert set(seen[0].values()) == {"full"}
    assert seen[1]["3"] == "packed"  # the largest
    assert "bfloat16" in seen[2].values()


def test_a_budget_that_cannot_be_kept_is_warned_of() -> None:
    with pytest.warns(EkfacWarning, match="memory_budget.*rank="):
        optimizer = EKFAC(small_classifier(), memory_budget=1)
    stored = {layer.name: layer.storage for layer in optimizer.curvature.values()}
    assert stored["3"] == "bfloat16"


def test_the_choice_is_a_function_of_sizes_alone() -> None:
    sizes: Any = {
        "a": {"full": 100, "packed": 80, "bfloat16": 40},
        "b": {"full": 60, "packed": 45, "bfloat16": 20},
    }
    start: Any = {"a": "full", "b": "full"}
    for budget, expected in {
        160: ("full", "full"),
        159: ("packed", "full"),
        139: ("packed", "packed"),
        124: ("bfloat16", "packed"),
        84: ("bfloat16", "bfloat16"),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuple(storages_within(budget, start, sizes).values()) == expected


@pytest.mark.parametrize(
    "options", [{"storage": "half"}, {"memory_budget": 0}, {"memory_budget": 1.5}]
)
def test_impossible_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Invalid {next(iter(options))}"):
        EKFAC(nn.Linear(2, 2), **options)
