"""Groups of examples by difficulty, and runs compared at equal loss."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac.diagnostics.papers.george import (
    GroupCurves,
    GroupRecorder,
    compare_at_equal_loss,
    consistency_scores,
    difficulty_groups,
    example_losses,
)


def test_losses_are_those_of_single_examples() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = torch.randn(2100, 4), torch.randint(3, (2100,))
    found = example_losses(model, x, y, partial(cross_entropy, reduction="none"))
    model.eval()
    expected = torch.stack(
        [cross_entropy(model(x[i : i + 1]), y[i : i + 1]) for i in range(0, 2100, 50)]
    )
    torch.testing.assert_close(found[::50], expected.detach())
    assert not found.requires_grad
    with pytest.raises(ValueError, match="one loss for each of 1000 examples"):
        example_losses(model, x, y, cross_entropy)


def test_consistency_scores_count_right_predictions_on_examples_left_out() -> None:
    """A nearest-neighbour learner, whose predictions are counted by hand."""
    x = torch.tensor([0.0, 0.1, 0.2, 1.0, 1.1, 0.15])
    y = torch.tensor([0, 0, 0, 1, 1, 1])  # the last one lies among the others
    seen: list[tuple[Tensor, Tensor]] = []

    def fit(chosen: Tensor) -> Tensor:
        nearest = (x[:, None] - x[chosen]).abs().argmin(dim=1)
        right = y[chosen][nearest] == y
        seen.append((chosen, right))
        return right

    generator = torch.Generator().manual_seed(0)
    scores = consistency_scores(fit, 6, (3, 5), repeats=60, generator=generator)
    for i in range(6):
        by_size = []
        for size in (3, 5):
            out = [r[i] for c, r in seen if len(c) == size and i not in c]
            by_size.append(torch.stack(out).double().mean())
        assert float(scores[i]) == pytest.approx(float(sum(by_size)) / 2, rel=1e-5)
    assert int(scores.argmin()) == 5
    with pytest.raises(ValueError, match=r"between 1 and 5, got \[6\]"):
        consistency_scores(fit, 6, [6])


def test_deciles_are_ordered_and_of_equal_size() -> None:
    scores = torch.rand(101)
    groups = difficulty_groups(scores)
    assert next(iter(groups)) == "1/10"
    assert {len(group) for group in groups.values()} == {10, 11}
    parts = list(groups.values())
    assert torch.cat(parts).sort().values.tolist() == list(range(101))
    for harder, easier in itertools.pairwise(parts):
        assert scores[harder].max() <= scores[easier].min()
    with pytest.raises(ValueError, match="got 101, 1 of them nan"):
        difficulty_groups(torch.cat([scores[:100], torch.tensor([float("nan")])]))


def curves(rate: float, ratio: float) -> GroupCurves:
    """Return runs in which the difficult loss is a function of the easy one."""
    steps = torch.arange(60)
    easy = 2 * torch.exp(-rate * steps.double())
    return GroupCurves(steps, easy, {"easy": easy, "hard": ratio * easy + 1})


def test_comparison_does_not_depend_on_speed() -> None:
    found = compare_at_equal_loss(curves(0.1, 0.5), curves(0.03, 0.7), [1.5, 1.0, 0.5])
    for level, hard, easy in zip(
        found.levels, found.difference["hard"], found.difference["easy"], strict=True
    ):
        assert float(hard) == pytest.approx(-0.2 * float(level), rel=1e-6)
        assert float(easy) == pytest.approx(0, abs=1e-9)
    assert "hard" in str(found)
    assert len(found.plot().lines) == 3
    assert len(curves(0.1, 0.5).plot().lines) == 2
    other = GroupCurves(torch.arange(2), torch.ones(2), {"easy": torch.ones(2)})
    with pytest.raises(ValueError, match="same groups"):
        compare_at_equal_loss(curves(0.1, 0.5), other, [1.0])


def test_a_level_counts_when_it_is_first_reached() -> None:
    progress = torch.tensor([2.0, 1.0, 1.4, 0.5])
    run = GroupCurves(torch.arange(4), progress, {"g": torch.tensor([10.0, 20, 5, 7])})
    assert run.at(1.5)["g"] == pytest.approx(15)
    assert run.at(1.0)["g"] == pytest.approx(20)
    assert run.at(2.0)["g"] == pytest.approx(10)
    assert str(run.at(0.4)["g"]) == "nan"
    assert str(run.at(2.5)["g"]) == "nan"


def test_recorder() -> None:
    groups = {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])}
    recorder = GroupRecorder(groups, reference="a")
    recorder.record(0, torch.tensor([1.0, 3.0, 5.0, 7.0]))
    recorder.record(5, torch.tensor([0.0, 2.0, 4.0, 8.0]))
    found = recorder.curves()
    assert found.steps.tolist() == [0, 5]
    assert found.progress.tolist() == [2.0, 1.0]
    assert found.losses["b"].tolist() == [6.0, 6.0]
    everyone = GroupRecorder(groups)
    everyone.record(0, torch.tensor([1.0, 3.0, 5.0, 7.0]))
    assert everyone.curves().progress.tolist() == [4.0]
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got 'c'"):
        GroupRecorder(groups, reference="c")
    with pytest.raises(ValueError, match="need examples"):
        GroupRecorder({"a": torch.tensor([])})
