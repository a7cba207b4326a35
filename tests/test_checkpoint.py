"""``torch.distributed.checkpoint`` in one process, and hooks on state dicts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from training_cases import (
    METHODS,
    Method,
    assert_identical,
    loss_of,
    small_classifier,
    snapshot,
    train,
)

from ekfac import EKFAC
from ekfac.errors import CaptureError, StateMismatchError, UnsupportedOperationError
from ekfac.optim.optimizer import KroneckerOptimizer

OPTIONS = {
    "plain": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "on the CPU": StateDictOptions(cpu_offload=True),
}
VARIANTS = [*METHODS[::2], Method("no momentum", EKFAC, {"momentum": 0.0})]
variants = pytest.mark.parametrize("method", VARIANTS, ids=lambda m: m.name)


def trained(method: Method, steps: int = 6) -> tuple[nn.Module, KroneckerOptimizer]:
    """Return a network with its optimizer after some steps."""
    model = small_classifier()
    optimizer = method(model)
    train(model, optimizer, range(steps))
    return model, optimizer


def assert_goes_on(
    pair: tuple[nn.Module, KroneckerOptimizer],
    other: tuple[nn.Module, KroneckerOptimizer],
) -> None:
    """Compare two runs now, and after more steps, bit for bit."""
    for steps in (range(0), range(20, 29)):
        train(*pair, steps)
        train(*other, steps)
        assert_identical(snapshot(*other), snapshot(*pair))


# -- torch.distributed.checkpoint.state_dict -------------------------------------------


@pytest.mark.parametrize("in_files", [False, True])
def test_layers_in_double_precision_stay_so(tmp_path: Path, in_files: bool) -> None:
    """First gradients below 1e-12 are behind a weight of nearly zero, which grows."""

    def pair_of(steps: int) -> tuple[nn.Module, EKFAC]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        with torch.no_grad():
            model[2].weight *= 1e-20
        optimizer = EKFAC(model, lr=1e-2, factor_decay=0.5, basis_interval=3)
        train(model, optimizer, range(steps))
        return model, optimizer

    pair, other = pair_of(8), pair_of(0)
    first = pair[1].curvature["0"]
    assert first.dtype == torch.float64
    assert first.G is not None
    assert first.G.abs().max() > 1e-12
    if in_files:
        weights, state = get_state_dict(*pair)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        weights, state = get_state_dict(*other)
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=tmp_path)
        set_state_dict(
            *other,
            model_state_dict=both["model"],
            optim_state_dict=both["optimizer"],
        )
    else:
        other[0].load_state_dict(pair[0].state_dict())
        other[1].load_state_dict(pair[1].state_dict())
    assert_goes_on(pair, other)


@variants
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_goes_on_from_what_torch_gets_and_sets(
    method: Method, options: StateDictOptions
) -> None:
    pair, other = trained(method), trained(method, 0)
    weights, state = get_state_dict(*pair, options=options)
    set_state_dict(
        *other, model_state_dict=weights, optim_state_dict=state, options=options
    )
    assert other[1].steps == 6
    assert_goes_on(pair, other)


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("saved_steps", [0, 6])
def test_goes_on_from_files(tmp_path: Path, rank: int | None, saved_steps: int) -> None:
    """Into the state of an optimizer that has done no step, as torch's guide says."""

    def pair_of(steps: int) -> tuple[nn.Module, EKFAC]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 80), nn.LayerNorm(80), nn.Linear(80, 4))
        optimizer = EKFAC(model, rank=rank, basis_interval=4, basis_delay=2)
        train(model, optimizer, range(steps))
        return model, optimizer

    pair, other = pair_of(saved_steps), pair_of(0)
    weights, state = get_state_dict(*pair)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
    weights, state = get_state_dict(*other)
    both = {"model": weights, "optimizer": state}
    dcp.load(both, checkpoint_id=tmp_path)
    set_state_dict(
        *other,
        model_state_dict=both["model"],
        optim_state_dict=both["optimizer"],
    )
    assert_goes_on(pair, other)


@variants
def test_asking_before_the_first_step_changes_nothing(method: Method) -> None:
    pair, other = trained(method, 0), trained(method, 0)
    before = snapshot(*pair)
    get_state_dict(*pair)
    assert_identical(snapshot(*pair), before)
    assert_goes_on(other, pair)


def test_a_step_with_a_gradient_and_no_records_is_still_an_error() -> None:
    model, unseen = small_classifier(), small_classifier()
    optimizer = EKFAC(model, lr=0.0)
    loss_of(unseen, 0).backward()
    for p, other in zip(model.parameters(), unseen.parameters(), strict=True):
        p.grad = other.grad
    with pytest.raises(CaptureError, match="no statistics were recorded"):
        optimizer.step()


def test_a_flat_state_would_lose_the_curvature_and_is_refused() -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    with pytest.raises(UnsupportedOperationError, match="flatten_optimizer_state_dict"):
        get_state_dict(*trained(METHODS[0]), options=options)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = small_classifier()
    adam = torch.optim.AdamW(model.parameters())
    train(model, adam, range(2))
    _, state = get_state_dict(model, adam)
    pair = trained(METHODS[0])
    before = snapshot(*pair)
    with pytest.raises(StateMismatchError, match="no curvature"):
        set_state_dict(
            *pair, model_state_dict=pair[0].state_dict(), optim_state_dict=state
        )
    assert_identical(snapshot(*pair), before)


# -- hooks -----------------------------------------------------------------------------


def test_post_hooks_see_and_may_change_the_whole_state() -> None:
    _, optimizer = trained(METHODS[0])
    seen: list[set[str]] = []

    def note(own: Any, state: dict[str, Any]) -> None:
        assert own is optimizer
        seen.append(set(state))

    def pack(own: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {"packed": state}

    optimizer.register_state_dict_post_hook(note)
    handle = optimizer.register_state_dict_post_hook(pack)
    state = optimizer.state_dict()
    assert seen == [{"state", "param_groups", "curvature", "progress"}]
    assert state.keys() == {"packed"}
    handle.remove()
    assert "curvature" in optimizer.state_dict()


def test_pre_hooks_of_saving_come_before_the_state_is_read() -> None:
    _, optimizer = trained(METHODS[0])

    def forget(own: Any) -> None:
        own.curvature["0"].averages["A"].total.zero_()

    optimizer.register_state_dict_pre_hook(forget)
    assert not optimizer.state_dict()["curvature"]["0"]["A"].any()


def test_hooks_of_loading_see_the_whole_state() -> None:
    pair, other = trained(METHODS[0]), trained(METHODS[0], 0)
    steps = []

    def unpack(own: Any, state: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = state["packed"]
        return found

    other[1].register_load_state_dict_pre_hook(unpack)
    other[1].register_load_state_dict_post_hook(lambda own: steps.append(own.steps))
    other[0].load_state_dict(pair[0].state_dict())
    state = copy.deepcopy(pair[1].state_dict())
    other[1].load_state_dict({"packed": state})
    assert steps == [6]  # loaded by then
    assert_goes_on(pair, other)


def test_a_hook_that_raises_changes_nothing_and_stays() -> None:
    pair = trained(METHODS[0])
    before = snapshot(*pair)

    def refuse(own: Any, state: dict[str, Any]) -> None:
        raise KeyError("not mine")

    handle = pair[1].register_load_state_dict_pre_hook(refuse)
    for _ in range(2):
        with pytest.raises(KeyError, match="not mine"):
            pair[1].load_state_dict(pair[1].state_dict())
    handle.remove()
    assert_identical(snapshot(*pair), before)
