"""Saved matrices, penalties and posteriors: damaged in every place, loaded or refused.

Whatever is damaged, a state is either refused, and what it was to be loaded into is bit
for bit as before, or it is loaded with the result of the undamaged one.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from damage import Path, at, damaged, every_damage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ekfac
from ekfac.continual import (
    LaplacePosterior,
    MemoryAwareSynapses,
    QuadraticPenalty,
    SynapticIntelligence,
)
from ekfac.errors import EkfacError, StateMismatchError
from ekfac.matrices import from_state_dict


class Words(nn.Module):
    """An embedding (a diagonal factor), and layers with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(5, 3), nn.Linear(3, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(x))))


def task(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(5, (12,), generator=generator)
    return [(x, torch.randint(3, (12,), generator=generator))]


def matrix(structure: str, seed: int) -> Any:
    torch.manual_seed(0)
    return ekfac.fisher(Words(), task(seed), structure)


def penalty(seed: int, **options: Any) -> Any:
    torch.manual_seed(0)
    found = QuadraticPenalty(Words(), **options)
    for number in range(2):
        found.consolidate(task(seed + number))
    return found


def path_followed(seed: int) -> SynapticIntelligence:
    torch.manual_seed(0)
    model = Words()
    found = SynapticIntelligence(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + 0.01 * seed)
    for number in range(4):
        optimizer.zero_grad()
        ((x, y),) = task(seed)
        (nn.functional.cross_entropy(model(x), y) + found()).backward()
        with found.path():
            optimizer.step()
        if number == 1:
            found.consolidate()
    return found


def sensitive(seed: int) -> MemoryAwareSynapses:
    torch.manual_seed(0)
    found = MemoryAwareSynapses(Words())
    found.consolidate(task(seed))
    return found


def posterior(seed: int) -> LaplacePosterior:
    torch.manual_seed(0)
    found = QuadraticPenalty(Words(), "kfac")
    found.consolidate(task(seed))
    return found.posterior(0.5)


MATRICES = ["dense", "block_diagonal", "diagonal", "quasi_diagonal", "low_rank"]
MAKERS: dict[str, Callable[[int], Any]] = {
    **{
        s: lambda seed, s=s: matrix(s, seed)  # type: ignore[misc]
        for s in [*MATRICES, "kfac", "ekfac"]
    },
    "penalty, diagonal": lambda seed: penalty(seed, structure="diagonal"),
    "penalty, ekfac": lambda seed: penalty(
        seed, structure="ekfac", layer_strengths={"head": 2.0}, parameters=["hidden"]
    ),
    "penalty, separate": lambda seed: penalty(seed, structure="kfac", mode="separate"),
    "penalty, top": lambda seed: penalty(seed, structure="singular_directions", k=2),
    "path": path_followed,
    "sensitivity": sensitive,
    "posterior": posterior,
}
SAVED = {name: make(3).state_dict() for name, make in MAKERS.items()}


def same(first: Any, second: Any) -> bool:
    """Return whether two states are equal bit for bit."""
    if isinstance(first, Tensor):
        if not isinstance(second, Tensor) or first.layout != second.layout:
            return False
        if first.is_nested or second.is_nested:  # torch 2.6 has no shape for them
            parts = [list(t.unbind()) if t.is_nested else [] for t in (first, second)]
            return same(*parts)
        kinds = [(t.dtype, t.device, t.shape) for t in (first, second)]
        return kinds[0] == kinds[1] and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def _wrong_columns(t: Tensor) -> Tensor:
    t = t.clone()
    t[..., 0] *= 1.5
    return t


TARGETS: dict[str, Any] = {}  # loaded into until one takes a state
COUNTS: Counter[str] = Counter()


def check(name: str, path: Path, kind: str) -> None:
    """Load a damaged state; judge what comes of it."""
    state = damaged(SAVED[name], path, kind, seed=0)
    if same(state, SAVED[name]):
        return
    if name not in TARGETS:
        TARGETS[name] = MAKERS[name](5)
    target = TARGETS[name]
    before = target.state_dict()
    try:
        target.load_state_dict(state)
    except EkfacError as error:
        COUNTS["refused"] += 1
        outcome, expected = f"half loaded after {error}", before
    else:
        COUNTS["loaded"] += 1
        outcome, expected = "silently wrong", SAVED[name]
        del TARGETS[name]
    assert same(target.state_dict(), expected), f"{outcome}: {path}, {kind}"


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_damaged_states_are_refused_wholly_or_loaded_rightly(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(MAKERS)))
    check(name, *data.draw(st.sampled_from(list(every_damage(SAVED[name])))))


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_every_damage_at_every_place(name: str) -> None:
    COUNTS.clear()
    for path, kind in every_damage(SAVED[name]):
        check(name, path, kind)
    print(name, dict(COUNTS))
    assert COUNTS["refused"] > 50


@pytest.mark.parametrize("name", MAKERS)
def test_undamaged_states_are_loaded_bit_for_bit(name: str) -> None:
    target = MAKERS[name](5)
    assert not same(target.state_dict(), SAVED[name])
    target.load_state_dict(copy.deepcopy(SAVED[name]))
    assert same(target.state_dict(), SAVED[name])


def test_bases_factors_and_positions_are_what_they_are_called() -> None:
    ekfac_state, kfac_state = SAVED["ekfac"], SAVED["kfac"]
    for state, path, change, message in (
        (ekfac_state, ("factors", "Q_A"), _wrong_columns, "from orthonormal"),
        (kfac_state, ("factors", "G"), _wrong_columns, "from its transpose"),
        (kfac_state, ("positions",), lambda t: t * 0, "an entry twice"),
        (ekfac_state, ("factors", "s"), Tensor.half, "as the others beside it"),
        (kfac_state, ("factors", "A"), Tensor.half, "as the others beside it"),
    ):
        state = copy.deepcopy(state)
        block = state["blocks"]["hidden"]
        holder = at(block, path[:-1])
        holder[path[-1]] = change(holder[path[-1]])
        with pytest.raises(StateMismatchError, match=message) as caught:
            from_state_dict(state)
        assert caught.value.key.startswith(".".join(("blocks", "hidden", path[0])))
