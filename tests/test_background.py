"""Bases found in a thread: the same as those found within the step, later."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_cases import (
    assert_identical,
    example_batch,
    loss_of,
    small_classifier,
    snapshot,
    train,
)

from ekfac import EKFAC
from ekfac.curvature import background
from ekfac.curvature.options import Schedule
from ekfac.optim.optimizer import KroneckerOptimizer

INTERVALS: dict[str, Any] = {
    "factor_interval": 1,
    "basis_interval": 6,
    "basis_tolerance": 0.0,
}


def bases(optimizer: KroneckerOptimizer) -> dict[str, Tensor]:
    """Return copies of the eigenvectors and eigenvalues by layer and side."""
    found = {}
    for name, layer in optimizer.curvature.items():
        for side in ("A", "G"):
            basis = layer.basis(side)
            if basis is not None:
                found[f"{name}.Q_{side}"] = basis.clone()
            found[f"{name}.eigenvalues_{side}"] = layer.values(side).clone()
    return found


def history(steps: int, **options: Any) -> list[dict[str, Tensor]]:
    """Return the bases after every step of a model that does not move."""
    model = wide_network()
    optimizer = EKFAC(model, lr=0.0, **INTERVALS, **options)
    found = []
    for step in range(steps):
        train(model, optimizer, [step])
        found.append(bases(optimizer))
    optimizer.close()
    return found


def wide_network() -> nn.Sequential:
    """Return a network with a side that ``rank`` truncates."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 80), nn.Tanh(), nn.Linear(80, 4))


@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("delay", [1, 5])
def test_is_the_basis_of_the_step_that_it_began_with(
    scaling: str, rank: int | None, delay: int
) -> None:
    """Factors do not depend on the basis: with ``lr=0`` only the time differs."""
    options = {"scaling": scaling, "rank": rank}
    at_once = history(24, **options)
    late = history(24, **options, basis_delay=delay)
    for step in range(24):
        begun = step - delay if step + 1 - delay >= 6 else min(step, 4)
        for key, value in late[step].items():
            torch.testing.assert_close(value, at_once[begun][key], rtol=0, atol=0)
    changed = [
        any(not torch.equal(late[s][k], late[s - 1][k]) for k in late[s])
        for s in range(1, 24)
    ]
    assert sum(changed) >= 4, "bases have moved late"


def test_the_vectors_diagonalise_the_factors_of_their_step() -> None:
    model = small_classifier().double()
    optimizer = EKFAC(model, lr=0.0, **INTERVALS, basis_delay=3)
    layer = optimizer.curvature["0"]
    torch.set_default_dtype(torch.float64)
    try:
        train(model, optimizer, range(12))
        assert layer.A is not None
        expected = torch.linalg.eigvalsh(layer.A)
        before = layer.eigenvalues_A.clone()
        train(model, optimizer, range(12, 15))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(layer.eigenvalues_A, expected)


def test_nothing_depends_on_how_fast_the_thread_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshots = []
    for pause in (0.0, 0.05):
        model = small_classifier()
        original = background.basis_updates

        def slow(*args: Any, pause: float = pause, find: Any = original) -> Any:
            time.sleep(pause)
            return find(*args)

        with monkeypatch.context() as patch:
            patch.setattr(background, "basis_updates", slow)
            optimizer = EKFAC(model, lr=1e-2, **INTERVALS, basis_delay=2)
            train(model, optimizer, range(15))
            snapshots.append(snapshot(model, optimizer))
    assert_identical(snapshots[1], snapshots[0])


def test_a_copy_goes_on_with_what_was_on_its_way() -> None:
    model = small_classifier()
    optimizer = EKFAC(model, lr=1e-2, **INTERVALS, basis_delay=4)
    train(model, optimizer, range(13))
    begun = optimizer.state_dict()["progress"]["background"]
    assert begun, "layers wait for their bases"
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(13, 20))
    train(other_model, other, range(13, 20))
    assert_identical(snapshot(other_model, other), snapshot(model, optimizer))


@pytest.mark.parametrize("cut", [6, 7, 12, 13])
def test_a_saved_run_goes_on_with_what_was_on_its_way(cut: int) -> None:
    """Bit for bit, where products show in which order a basis lies in memory."""
    torch.manual_seed(0)
    widths = (12, 13, 13, 13, 6)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers).double()
    options: dict[str, Any] = {"factor_interval": 3, "basis_interval": 6}
    options |= {"basis_delay": 2, "lr": 1e-2}
    optimizer = EKFAC(model, **options)

    def go_on(model: nn.Module, optimizer: EKFAC, numbers: range) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    go_on(model, optimizer, range(cut))
    state = optimizer.state_dict()
    assert state["progress"]["background"]
    other_model = copy.deepcopy(model)
    other = EKFAC(other_model, **options)
    other.load_state_dict(state)
    go_on(model, optimizer, range(cut, cut + 8))
    go_on(other_model, other, range(cut, cut + 8))
    assert_identical(snapshot(other_model, other), snapshot(model, optimizer))


@pytest.mark.parametrize("rank", [None, 5])
def test_what_was_on_its_way_may_go_on_in_another_precision(rank: int | None) -> None:
    model = wide_network()
    options: dict[str, Any] = {**INTERVALS, "basis_delay": 4, "rank": rank, "lr": 0.0}
    optimizer = EKFAC(model, **options)
    train(model, optimizer, range(10))
    state = copy.deepcopy(optimizer.state_dict())
    assert state["progress"]["background"]
    before = bases(optimizer)
    train(model, optimizer, range(10, 13))
    wide = copy.deepcopy(model).double()
    other = EKFAC(wide, **options)
    other.load_state_dict(state)
    for number in range(10, 13):
        x, y = example_batch(number)
        nn.functional.cross_entropy(wide(x.double()), y).backward()
        other.step()
    expected = bases(optimizer)
    assert any(not torch.equal(expected[key], before[key]) for key in before)
    for key, value in bases(other).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value.float(), expected[key])


def test_another_state_takes_the_place_of_what_was_on_its_way() -> None:
    model = small_classifier()
    optimizer = EKFAC(model, lr=1e-2, **INTERVALS, basis_delay=4)
    train(model, optimizer, range(8))
    early = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(8, 13))
    expected = snapshot(model, optimizer)
    train(model, optimizer, range(13, 16))
    model.load_state_dict(early[0])
    optimizer.load_state_dict(early[1])
    train(model, optimizer, range(8, 13))
    assert_identical(snapshot(model, optimizer), expected)


def test_a_failed_decomposition_keeps_the_old_basis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_classifier()
    optimizer = EKFAC(model, lr=1e-2, **INTERVALS, basis_delay=2)
    train(model, optimizer, range(5))  # no search has begun yet
    before = bases(optimizer)

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    train(model, optimizer, range(5, 12))
    assert optimizer.counters.kept > 0
    after = bases(optimizer)
    for key in before:
        if ".Q_" in key:
            assert torch.equal(after[key], before[key])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def assert_decomposed_in_the_step(model: nn.Module, optimizer: EKFAC) -> None:
    """Do step 9, where the first layer adopts what was begun at step 6; compare.

    The present factors were decomposed, not those of step 6, and that is counted.
    """
    train(model, optimizer, [8])
    layer = optimizer.curvature["0"]
    assert layer.A is not None
    expected = torch.linalg.eigvalsh(layer.A)
    torch.testing.assert_close(layer.eigenvalues_A, expected)
    assert optimizer.counters.repeated == 1


@pytest.fixture
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, AssertionError])
def test_a_search_that_raises_is_done_again_in_the_step(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    model = small_classifier()
    optimizer = EKFAC(model, lr=0.0, **INTERVALS, basis_delay=3)
    train(model, optimizer, range(5))

    def fails(*args: Any) -> Any:
        raise error("in the thread")

    with monkeypatch.context() as patch:
        patch.setattr(background, "basis_updates", fails)
        train(model, optimizer, range(5, 8))
        saved = optimizer.state_dict()["progress"]["background"]
    assert not saved, "what raised is not saved"
    assert_decomposed_in_the_step(model, optimizer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("use", ["step", "state_dict", "load", "close"])
def test_a_forked_child_goes_on(monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    """The fork comes during a search, and while the thread holds the search's lock."""
    model = small_classifier()
    optimizer = EKFAC(model, lr=0.0, **INTERVALS, basis_delay=3)
    train(model, optimizer, range(5))
    state = optimizer.state_dict()
    go_on, original = threading.Event(), background.basis_updates

    def waits(*args: Any) -> Any:
        assert go_on.wait(60)
        return original(*args)

    monkeypatch.setattr(background, "basis_updates", waits)
    train(model, optimizer, range(5, 8))
    pending = optimizer._collector.background._pending["0"]
    with pending._condition, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
        child = os.fork()
        if child == 0:
            status = 1
            try:
                go_on.set()
                use_in_child(use, model, optimizer, state)
                status = 0
            finally:
                os._exit(status)
    assert exit_status(child) == 0
    go_on.set()  # and in the parent nothing has changed
    train(model, optimizer, [8])
    assert optimizer.counters.repeated == 0


def use_in_child(use: str, model: nn.Module, optimizer: EKFAC, state: Any) -> None:
    """Use an optimizer in a process that was forked during a search."""
    if use == "state_dict":
        assert not optimizer.state_dict()["progress"]["background"]
        copy.deepcopy(optimizer)
    elif use == "load":
        optimizer.load_state_dict(state)
        train(model, optimizer, range(5, 12))
        assert optimizer.counters.repeated == 0
        return
    elif use == "close":
        optimizer.close()
        return
    assert_decomposed_in_the_step(model, optimizer)
    train(model, optimizer, range(9, 20))  # with a thread of its own
    assert optimizer.counters.repeated < 4


def exit_status(child: int) -> int:
    """Wait for a process; end it if it hangs."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


def begun_since(before: list[threading.Thread]) -> int:
    """Return how many threads are at work that were not there before."""
    threads = [t for t in threading.enumerate() if t not in before]
    return sum(t.name.startswith("ekfac-basis") for t in threads)


def test_close_ends_the_thread() -> None:
    model, before = small_classifier(), threading.enumerate()
    with EKFAC(model, **INTERVALS, basis_delay=2) as optimizer:
        train(model, optimizer, range(7))
        assert begun_since(before) == 1
    deadline = time.monotonic() + 5
    while begun_since(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert begun_since(before) == 0


def test_must_be_shorter_than_the_interval() -> None:
    with pytest.raises(ValueError, match=r"Invalid basis_delay: 5; .*basis_interval"):
        EKFAC(small_classifier(), basis_interval=5, basis_delay=5)


def test_steps_without_a_thread_have_none() -> None:
    model, before = small_classifier(), threading.enumerate()
    optimizer = EKFAC(model, **INTERVALS)
    loss_of(model, 0).backward()
    optimizer.step()
    assert begun_since(before) == 0


def test_schedule() -> None:
    schedule = Schedule(factors=1, basis=10, scalings=1, delay=4)
    for index in range(3):
        due = [s for s in range(1, 60) if schedule.basis_due(s, index, 3)]
        adopted = [s for s in range(1, 60) if schedule.basis_adopted(s, index, 3)]
        late = [s + 4 for s in due if s >= 10 and s + 4 < 60]
        assert adopted == [s for s in due if s < 10] + late
