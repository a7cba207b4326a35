"""Training on several ranks equals training on one with the concatenated batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from changed_cases import CHANGED_CASES, QUICK_CHANGED_CASES
from failure_cases import (
    FAILURES,
    REFUSALS,
    constructs_again,
    constructs_in_another_group,
    is_killed_in_its_backward,
    raises_in_its_backward,
)
from overlap_cases import OVERLAP_CASES, SLOW_OVERLAP_CASES
from process_cases import PROCESS_CASES, Case, check, start, tiny_gradients
from sharded_cases import (
    CHECKPOINT_CASES,
    PARALLEL_CASES,
    QUICK_CASES,
    SHARDED_CASES,
    a_rank_dies,
    load_alone,
    load_and_train,
    train_and_save,
)
from torch import nn
from truncated_cases import QUICK_TRUNCATED_CASES, TRUNCATED_CASES

from ekfac import KFAC

Outcomes = dict[str, list[str]]
# Cases that run in processes of their own, group by group.
GROUPS = {
    "plain": PROCESS_CASES,
    "sharded": SHARDED_CASES,
    "parallel": PARALLEL_CASES,
    "checkpoint": CHECKPOINT_CASES,
    "overlap": OVERLAP_CASES,
    "truncated": TRUNCATED_CASES,
    "changed": CHANGED_CASES,
    "refusal": REFUSALS,
}
IN_BACKWARD = [is_killed_in_its_backward, raises_in_its_backward]
CASES = [(group, case) for group, cases in GROUPS.items() for case in cases]
QUICK = [
    *QUICK_CASES,
    *(c for c in OVERLAP_CASES if c not in SLOW_OVERLAP_CASES),
    *QUICK_TRUNCATED_CASES,
    *QUICK_CHANGED_CASES,
    tiny_gradients,
    *REFUSALS,
]


@pytest.fixture(scope="module")
def quick_cases(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(2, tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, int], Outcomes]:
    """Return what runs a group of cases on so many ranks, once."""

    @cache
    def run(group: str, world: int) -> Outcomes:
        return start(world, tmp_path_factory.mktemp(f"{group}-{world}"), GROUPS[group])

    return run


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """Make one test of every case."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.__name__)


@each(QUICK)
def test_quickly_on_two_processes(case: Case, quick_cases: Outcomes) -> None:
    check(quick_cases[case.__name__])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4], ids=["two", "four"])
@pytest.mark.parametrize(
    ("group", "case"), CASES, ids=[f"{group}-{c.__name__}" for group, c in CASES]
)
def test_on_processes(
    group: str, case: Case, world: int, outcomes: Callable[[str, int], Outcomes]
) -> None:
    """``-k "sharded and four"`` runs one group on so many ranks."""
    check(outcomes(group, world)[case.__name__])


@pytest.mark.slow
def test_checkpoints_of_four_ranks_are_loaded_on_two_and_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKFAC_CHECKPOINTS", str(tmp_path))
    for world, case in ((4, train_and_save), (2, load_and_train), (1, load_alone)):
        folder = tmp_path / f"on {world}"
        folder.mkdir()
        assert start(world, folder, [case])[case.__name__] == [""] * world


def assert_told(case: Case, outcomes: Outcomes) -> None:
    """Look up a case whose last rank fails; a killed one writes nothing."""
    found = outcomes[case.__name__]
    dead = "did not run" if case.__name__ == "is_killed" else ""
    assert found == [""] * (len(found) - 1) + [dead], "\n".join(found)


@pytest.fixture(scope="module")
def two_failing(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(2, tmp_path_factory.mktemp("failing"), FAILURES, may_die=True)


@pytest.fixture(scope="module")
def four_failing(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return start(4, tmp_path_factory.mktemp("failing"), FAILURES, may_die=True)


@each(FAILURES)
def test_a_rank_that_fails_is_named_on_the_other(
    case: Case, two_failing: Outcomes
) -> None:
    assert_told(case, two_failing)


@pytest.mark.slow
@each(FAILURES)
def test_a_rank_that_fails_is_named_on_three_others(
    case: Case, four_failing: Outcomes
) -> None:
    assert_told(case, four_failing)


def test_a_rank_that_dies_leaves_the_others_with_an_error(tmp_path: Path) -> None:
    outcomes = start(2, tmp_path, [a_rank_dies])["a_rank_dies"]
    assert outcomes == ["", "did not run"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@each(IN_BACKWARD)
def test_a_rank_that_fails_in_its_backward_is_named(
    case: Case, world: int, tmp_path: Path
) -> None:
    dead = "did not run" if case is is_killed_in_its_backward else ""
    outcomes = start(world, tmp_path, [case], may_die=True)[case.__name__]
    assert outcomes == [""] * (world - 1) + [dead], "\n".join(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@each([constructs_again, constructs_in_another_group])
def test_constructions_that_do_not_meet_are_told(
    case: Case, world: int, tmp_path: Path
) -> None:
    check(start(world, tmp_path, [case])[case.__name__])


def test_a_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(ValueError, match="process_group"):
        KFAC(nn.Linear(2, 2), process_group=object())
