"""``python -m ekfac bench``: a user's problem beside other optimizers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from ekfac import bench
from ekfac.__main__ import main

SCRIPT = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    return model, [(x, x[:, :10])], nn.functional.mse_loss

def wrong():
    return make()[:2]

value = 3
"""


def problem() -> bench.Problem:
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))
    return bench.as_problem((model, (x, x[:, :10]), mse_loss), "here")


def test_every_optimizer_lowers_the_loss_and_leaves_the_model_as_it_was() -> None:
    made = problem()
    before = [p.clone() for p in made.model.parameters()]
    with torch.no_grad():
        start = made.loss(made.model, made.batches[0]).item()
    runs = bench.compare(made, seconds=2.0, rates=(1e-2,))
    assert [run.optimizer for run in runs] == list(bench.available())
    for run in runs:
        assert run.steps > 0
        assert run.seconds > 0
        assert run.loss < start, run
    for old, new in zip(before, made.model.parameters(), strict=True):
        assert torch.equal(old, new)
    text = bench.summary(runs)
    assert all(name in text for name in bench.available())
    assert "Lowest loss at equal time" in text


def test_state_of_adamw_is_two_moments_and_a_count_for_each_parameter() -> None:
    made = problem()
    run = bench.measure(made, "AdamW", 1e-3, 0.05)
    sizes = [p.numel() for p in made.model.parameters()]
    assert run.state_bytes == sum(2 * 4 * size + 4 for size in sizes)


def test_a_run_that_diverges_is_no_best_run() -> None:
    runs = [
        bench.Run("AdamW", 1e-3, 3, math.inf, 0.1, 8),
        bench.Run("EKFAC", 1e-3, 3, math.inf, 0.1, 8),
    ]
    assert "Every run diverged" in bench.summary(runs)
    runs.append(bench.Run("EKFAC", 3e-3, 3, 0.5, 0.1, 8))
    assert [run.lr for run in bench.best_runs(runs)] == [1e-3, 3e-3]
    assert "EKFAC with lr=0.003" in bench.summary(runs)
    assert "an end of the rates" in bench.summary(runs)


def test_muon_has_hidden_matrices_and_adamw_the_rest() -> None:
    if "Muon" not in bench.available():
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 3))
    first, second = bench.muon(model, 1e-3)
    assert [p.shape for p in first.param_groups[0]["params"]] == [(6, 4)]
    assert {p.shape for p in second.param_groups[0]["params"]} == {
        (5, 4),
        (6,),
        (3, 6),
        (3,),
    }


def test_the_command_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "bench_problem.py"
    script.write_text(SCRIPT, encoding="utf-8")
    assert main(["bench", f"{script}:make", "--seconds", "1", "--lr", "1e-2"]) == 0
    assert "ms/step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{script}", "MODULE:FACTORY"),
        ("{script}:missing", "no function missing"),
        ("{script}:value", "no function value"),
        ("{script}:wrong", "must return a model"),
        ("no_such_module_here:make", "no module"),
        ("/no/such/file.py:make", "no file"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "bench_refused.py"
    script.write_text(SCRIPT, encoding="utf-8")
    assert main(["bench", name.format(script=script)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
