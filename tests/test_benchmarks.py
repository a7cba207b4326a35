"""The benchmarks that train run with ``--quick`` and leave what they promise."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import matplotlib.image
import pytest
import scale
import support
import torch
from matplotlib.figure import Figure

from ekfac import EKFAC
from ekfac.matrices.eigen import DampingMode
from ekfac.optim import precondition

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("KFAC", "EKFAC", "EKFAC-ra")


def run(
    name: str, folder: Path, *options: str, result: str | None = None
) -> tuple[str, dict[str, Any]]:
    """Run a benchmark with ``--quick``; return what it printed and its JSON file."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    script = str(ROOT / "benchmarks" / f"{name}.py")
    done = subprocess.run(
        [sys.executable, script, *options, "--quick", "--output", "results"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    stem = folder / "results" / (name if result is None else result)
    text = stem.with_suffix(".json").read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(text)
    image = matplotlib.image.imread(stem.with_suffix(".png"))
    assert min(image.shape[:2]) >= 300
    assert image[..., :3].std() > 0.02, "the figure is blank"
    return done.stdout, results


def table(text: str, first: str) -> list[list[str]]:
    """Return the cells of the printed table whose heading starts with ``first``."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first + " "))
    assert set(lines[start + 1]) == {"-"}
    rest = [*lines[start + 2 :], ""]
    return [line.split() for line in rest[: rest.index("")]]


def test_amortisation(tmp_path: Path) -> None:
    text, results = run("amortisation", tmp_path)
    cells = [(row[0], int(row[1])) for row in table(text, "method")]
    assert cells == [(m, n) for m in METHODS for n in (1, 10, 50, 200)]
    assert [(row["method"], row["interval"]) for row in results["losses"]] == cells
    for row in results["losses"]:
        assert len(row["losses"]) == len(results["seeds"])
        assert all(0 < loss < 60 for loss in row["losses"])
        assert row["ratio"] == pytest.approx(1, abs=0.3)

    schedules = [(row[0], row[1]) for row in table(text, "basis")]
    assert schedules == [(s, m) for s in ("refreshed", "fixed") for m in METHODS]
    curves = {(c["schedule"], c["method"]): c for c in results["curves"]}
    assert set(curves) == set(schedules)
    for (_, method), curve in curves.items():
        assert curve["steps"][0] == 1
        # At the first step both are of the same batch, close to the fixed images.
        assert curve["shape"][0] < (1 if method == "EKFAC-ra" else 0.5)
        assert all(map(math.isfinite, curve["distance"]))


def test_defaults(tmp_path: Path) -> None:
    text, results = run("defaults", tmp_path)
    cells = [(p, o, float(lr)) for p, o, lr, *_ in table(text, "problem")]
    runs = results["runs"]
    assert [(r["problem"], r["optimizer"], r["lr"]) for r in runs] == cells
    assert len(set(cells)) == len(cells) == 3 * 2 * 4
    for row in runs:
        assert row["initial"] == row["losses"][0]
        assert row["diverged"] in ("yes", "no")
        assert all(map(math.isfinite, row["losses"]))
    digits = [row for row in runs if row["problem"] == "digits"]
    assert all(row["diverged"] == "no" for row in digits)


@pytest.mark.parametrize(
    "problem", [pytest.param("autoencoder", marks=pytest.mark.slow), "pinn"]
)
def test_peers(tmp_path: Path, problem: str) -> None:
    names = ("SGD", "EKFAC")
    options = (problem, "--only", *names)
    text, results = run("peers", tmp_path, *options, result=f"peers-{problem}")
    runs = results["runs"]
    for name in names:
        tried = {
            float(key.split("|")[2]): math.inf
            if found["train"] is None
            else found["train"]
            for key, found in runs.items()
            if key.startswith(f"tune|{name}|")
        }
        best, variant = runs[f"best|{name}"]
        assert variant == name
        assert tried[best] in sorted(tried.values())[:3]  # told apart by other seeds
        sums = {
            lr: loss
            + runs[f"again|{name}|{lr:g}"]["train"]
            + runs[f"third|{name}|{lr:g}"]["train"]
            for lr, loss in tried.items()
            if f"again|{name}|{lr:g}" in runs
        }
        assert len(sums) == 3
        assert sums[best] == min(sums.values())
        assert len(tried) >= 5
        assert runs[f"steps|{name}|1"]["ratio"] >= 1 or name == "SGD"
        for seed in (1, 2, 3):
            for kind in ("steps", "time"):
                found = runs[f"{kind}|{name}|{seed}"]
                assert math.isfinite(found["train"])
                assert math.isfinite(found["held_out"])
                assert found["curve"][0][-1] == found["steps"]
            assert found["steps"] <= runs[f"steps|{name}|{seed}"]["steps"]
    # The tables are made from the file alone.
    again, _ = run("peers", tmp_path, problem, "--tables", result=f"peers-{problem}")
    assert again in text
    rows = [line.split("|")[1].strip() for line in again.splitlines() if "±" in line]
    assert tuple(rows) == names
    # New prices: what was tuned, and the losses of the run that is timed, stay.
    options = (problem, "--retime", "--only", "EKFAC")
    _, timed = run("peers", tmp_path, *options, result=f"peers-{problem}")
    kept = [key for key in runs if not key.startswith("time|EKFAC|")]
    assert [key for key in kept if timed["runs"][key] == runs[key]] == [
        key for key in kept if key != "steps|EKFAC|1"
    ]
    new, old = timed["runs"]["steps|EKFAC|1"], runs["steps|EKFAC|1"]
    assert new["train"] == old["train"]
    assert new["ratio"] != old["ratio"]
    assert {key for key in timed["runs"] if "time|EKFAC" in key} == {
        f"time|EKFAC|{seed}" for seed in (1, 2, 3)
    }
    # Larger batches start from what was best on the plain ones.
    options = (problem, "--batch", "2", "--only", "SGD")
    _, larger = run(
        "peers", tmp_path, *options, result=f"peers-{problem}-batch-2-times"
    )
    assert {"autoencoder": "batch 400", "pinn": "512 points"}[problem] in larger[
        "runs"
    ]["about"]["note"]
    tried = [float(key.split("|")[2]) for key in larger["runs"] if "tune|" in key]
    assert tried[0] == pytest.approx(runs["best|SGD"][0] / 2, rel=1e-3)
    options = (problem, "--constant", "--only", "SGD")
    _, kept = run("peers", tmp_path, *options, result=f"peers-{problem}-constant")
    tried = [key for key in kept["runs"] if "tune|" in key and key in runs]
    assert tried
    for key in tried:  # the same rate without its decay ends elsewhere
        assert kept["runs"][key]["train"] != runs[key]["train"]


def test_seeds_of_two_optimizers_are_compared_in_order() -> None:
    """Runs that were done again stand last in the file."""
    import peers_report as report

    losses = {"A": {2: 2.0, 3: 3.0, 1: 1.0}, "B": {1: 1.5, 2: 2.5, 3: 3.5}}
    runs = {
        f"steps|{name}|{seed}": {"train": loss}
        for name, of_seeds in losses.items()
        for seed, loss in of_seeds.items()
    }
    ours, other = (report.finals(runs, "steps", name, "train") for name in losses)
    assert ours.tolist() == [1.0, 2.0, 3.0]
    assert report.verdict(ours, other) == "ahead"


def test_when_the_rivals_end_is_passed() -> None:
    """Half of the steps at twice the price, and three quarters of equal time."""
    import peers_report as report

    curves = {
        ("steps", "EKFAC"): [[1, 50, 100], [3.0, 1.5, 1.0]],
        ("steps", "Muon"): [[1, 50, 100], [3.0, 2.0, 1.5]],
        ("time", "EKFAC"): [[1, 30, 40], [3.0, 1.6, 1.4]],
        ("time", "Muon"): [[1, 40, 80], [3.0, 2.0, 1.6]],
    }
    runs: dict[str, Any] = {"best|EKFAC": [1.0, "EKFAC"], "best|Muon": [1.0, "Muon"]}
    for (kind, name), curve in curves.items():
        for seed in (1, 2, 3):
            runs[f"{kind}|{name}|{seed}"] = {
                "steps": curve[0][-1],
                "train": curve[1][-1],
                "curve": curve,
                "ratio": {"EKFAC": 2.0, "Muon": 1.0}[name],
            }
    reached = "50% of steps, 100% of time; 75% of equal time"
    assert report.reach(runs, "EKFAC") == report.reach(runs, "EKFAC", "Muon") == reached
    runs["time|EKFAC|2"]["curve"] = [[1, 30, 40], [3.0, 1.9, 1.7]]
    assert report.reach(runs, "EKFAC") == "50% of steps, 100% of time"
    runs["steps|EKFAC|3"]["train"] = None
    assert report.reach(runs, "EKFAC") == "-"


def test_gradients_rounded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import peers

    from ekfac.kernels import linalg

    monkeypatch.setattr(linalg, "multiplies_bfloat16", lambda device: True)
    matrix = torch.randn(1, 300, 310)
    bases = [torch.linalg.qr(torch.randn(1, d, d)).Q for d in (300, 310)]
    expected = bases[0].double().mT @ matrix.double() @ bases[1].double()
    for precise, least, most in ((True, 0.0, 1e-5), (False, 1e-3, 6e-3)):
        found = peers.rounded_whole(
            matrix, *bases, precise=precise, name="", workspace=None
        )
        assert least < float((found - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("mode", ["adaptive", "relative"])
def test_the_step_without_a_change_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, mode: DampingMode
) -> None:
    """What the ablation of the spectral step changes is otherwise the same step."""
    ablation = support.benchmark("spectral_step")
    ends = []
    for change in (None, {}):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(12, 13), torch.nn.Tanh(), torch.nn.Linear(13, 11)
        ).double()
        if change is not None:
            full = functools.partial(ablation.changed, change=change)
            monkeypatch.setattr(precondition, "_full", full)
        optimizer = EKFAC(model, lr=0.01, damping_mode=mode)
        for number in range(5):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(32, 12, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (model(x) - x[:, :11]).square().sum(dim=1).mean().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    import peers

    steps = (0, 4, 9, 50, 99)
    constant = [peers.schedule(step, 100, True) for step in steps]
    assert constant == pytest.approx([0.1, 0.5, 1, 1, 1])
    cosine = [peers.schedule(step, 100) for step in steps]
    assert cosine[:3] == constant[:3]
    assert 1 > cosine[3] > cosine[4] > 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
def test_muon_among_the_peers_is_torchs() -> None:
    pytest.importorskip("pytorch_optimizer", reason="of the extra 'benchmarks'")
    from peers_optimizers import OPTIMIZERS

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 5))
    twin = copy.deepcopy(model)
    ours = OPTIMIZERS["Muon"](model, 0.01, "1.weight")
    theirs = torch.optim.Muon(
        [twin[0].weight], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        x = torch.randn(20, 8)
        for net, optimizer in ((model, ours), (twin, theirs)):
            net[0].weight.grad = None
            net(x).square().sum().backward()
            optimizer.step()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            if a is not model[0].weight:
                b.data.copy_(a)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_normuons_average_may_look_ahead() -> None:
    """No step ahead it is NorMuon without Nesterov's form."""
    pytest.importorskip("pytorch_optimizer", reason="of the extra 'benchmarks'")
    from peers_optimizers import NORMUON, muons, normuon

    ends = []
    plain = muons("NorMuon", True, momentum=0.9, nesterov=False, **NORMUON)
    for make in (normuon(True, 0.9, 0), plain, normuon(True, 0.9, 2)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 5))
        optimizer = make(model, 0.01)
        for _ in range(4):
            x = torch.randn(20, 8)
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        ends.append(model[0].weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-7)
    assert (ends[2] - ends[1]).abs().max() > 1e-3


def test_width(tmp_path: Path) -> None:
    _, results = run("width", tmp_path)
    assert [(row["width"], row["depth"]) for row in results["rows"]] == [
        (66, 2),
        (80, 2),
        (66, 3),
    ]
    for row in results["rows"]:
        ratio = row["EKFAC, ms"] / row["SGD, ms"]
        assert row["EKFAC, x SGD"] == pytest.approx(ratio)
    slopes = {row["optimizer"]: row for row in results["exponents"]}
    first, second = (row["SGD, ms"] for row in results["rows"][:2])
    assert slopes["SGD"]["exponent, last two"] == pytest.approx(
        math.log(second / first) / math.log(80 / 66)
    )


def test_monitor_cost(tmp_path: Path) -> None:
    _, results = run("monitor_cost", tmp_path)
    rows = results["rows"]
    assert [(row["rank"], row["allowed share"]) for row in rows] == [
        (rank, share) for rank in ("full", "32") for share in (0.0, 0.01, 0.05)
    ]
    for row in rows:
        assert (row["records"] > 0) == (row["allowed share"] > 0)
        assert math.isfinite(row["cost"])


def test_schedules(tmp_path: Path) -> None:
    text, results = run("schedules", tmp_path)
    cells = [row for row in table(text, "network") if len(row) == 7]
    # Three optimizers at two batch sizes, then with and without a schedule.
    assert len(cells) == 3 * 2 + 3 * 2
    assert len(results["runs"]) == 2 * 3 * 2 + 3 * 2
    assert all(len(losses) in (2, 4) for losses in results["runs"].values())


def test_karakida2020(tmp_path: Path) -> None:
    text, results = run("karakida2020", tmp_path)
    assert set(results) == {"3", "4", "6", "7"}
    names = {row["quantity"] for row in results["3"]["rows"]}
    assert {"F maximum", "F^22 mean", "F_cross eigenvalue 1"} <= names
    rows = table(text, "activation")
    assert [(name, int(width)) for name, width, *_ in rows] == [
        (name, width) for name in ("tanh", "ReLU", "linear") for width in (20, 40)
    ]
    for row in results["4"]["rows"]:
        assert 0 < row["mean"] < row["maximum"]
        assert row["lower"] < row["upper"]


def test_zhang2021(tmp_path: Path) -> None:
    text, results = run("zhang2021", tmp_path)
    assert text.count("reported") == 3
    chains = results["figure 3"]
    assert chains
    assert all(row["kept"] == "yes" and row["|grad|_1"] < 1e-11 for row in chains)
    for row in results["figure 4"]:
        assert row["zero"] >= row["m - m_0"]
    assert all(0 < row["groups"][0] <= 60 for row in results["figure 5"]["rows"])


def test_factors_vs_exact(tmp_path: Path) -> None:
    text, results = run("factors_vs_exact", tmp_path)
    rows = {(r["network"], r["of"], r["matrix"]): r for r in results["rows"]}
    assert len(table(text, "matrix")) == len(rows) == 2 * (4 + 4 * 3)
    for when in ("initial", "trained"):
        exact, own = (rows[when, "whole", name] for name in ("exact", "EKFAC"))
        assert own["trace"] == pytest.approx(exact["trace"], rel=1e-4)
        assert own["maximum"] <= exact["maximum"]


def test_operations_are_collected_on_request() -> None:
    file = str(ROOT / "benchmarks" / "test_operations.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("test_gram", "test_rotate_matrix", "test_step[EKFAC-ra]"):
        assert name in result.stdout


def test_warm_start(tmp_path: Path) -> None:
    """Where the iteration reaches its bound it holds it, and is orthogonal."""
    script = str(ROOT / "benchmarks" / "warm_start.py")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, script, "--quick", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "warm_start.json").read_text(encoding="utf-8"))
    reached = [row for row in found["rows"] if row["off, new"] is not None]
    assert reached
    for row in reached:
        assert row["off, new"] <= 0.005
        assert row["skew"] < 1e-5
        assert min(row["iterated ms"], row["eigh ms"]) > 0


def test_kernels_without_a_device(tmp_path: Path) -> None:
    """The script for the GPU runs, on the reference, and compares what it times."""
    script = str(ROOT / "benchmarks" / "bench_kernels.py")
    command = [sys.executable, script, "--device", "cpu", "--quick"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [*command, "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))
    assert found["device"] == "cpu"
    kinds = {row["what"].split(":")[0] for row in found["rows"]}
    assert kinds == {
        *("gram", "one layer", "patches", "scalings", "squares", "precondition"),
        *("counts", "eigh", "step"),
    }
    for row in found["rows"]:
        # Half types: the loop rounds its result; 'warm' has its own bound.
        loose = "bfloat16" in row["what"] or "warm" in row["what"]
        assert row["error"] < (1e-2 if loose else 1e-5)
        assert row["kernel ms"] > 0


def test_correlation(tmp_path: Path) -> None:
    text, results = run("correlation", tmp_path)
    rows = results["rows"]
    assert [row[0] for row in table(text, "layer")] == [
        row["case"]["name"].replace(" ", "_") for row in rows
    ]
    for row in rows:
        assert max(row["errors"].values()) < 1e-5  # of patches, of offsets
        assert all(seconds > 0 for seconds in row["seconds"].values())
    assert set(results["fit"]) == {"TRANSFER", "START", "GFLOP/s"}


def test_delay(tmp_path: Path) -> None:
    text, results = run("delay", tmp_path)
    cells = table(text, "delay")
    assert [float(row[0]) for row in cells] == [0, 5, 20]
    for row in results["rows"]:
        assert row["median, ms"] <= row["99 %, ms"]
        assert 0 < row["loss"] < 60, "an untrained network is above"


@pytest.mark.parametrize(
    "name",
    [
        "basis_quality",
        "ge2025_more",
        "karakida2020_figure5",
        "karakida2020_training",
        "step_bound",
        "uncorrelated",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "george2023_convolutional",
                "george2023_factors",
                "george2023_more",
                "haink2023_more",
                "haink2023_networks",
                "independent",
                "karakida2020_theorems",
                "spectrum_of_optimizers",
                "through_training",
                "transformer_curvature",
                "which_curvature",
                "zhang2021_training",
            )
        ),
    ],
)
def test_experiments_of_the_documents(name: str, tmp_path: Path) -> None:
    text, _ = run(name, tmp_path)
    assert "s of processor time" in text
    assert " nan" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ge2025", "ge2025_more", "zhang2021"])
def test_numbers_follow_from_the_seeds_on_one_thread(name: str, tmp_path: Path) -> None:
    every = []
    for turn in ("first", "second"):
        folder = tmp_path / turn
        folder.mkdir()
        every.append(run(name, folder)[1])
    assert every[0] == every[1]


@pytest.mark.slow
@pytest.mark.parametrize("width", [24, 48])
def test_predicted_memory_and_traffic_are_those_of_gloo_runs(width: int) -> None:
    """To the byte and the element, with the optimizer's defaults."""
    row = scale.checked(width)
    assert row["kept"] == row["predicted"]
    assert row["handed"] == row["predicted handed"]


def test_predictions_for_large_models_are_those_of_the_record_and_the_page() -> None:
    folder, rows = ROOT / "benchmarks", scale.predictions()
    assert (
        rows
        == json.loads((folder / "results" / "scale.json").read_text())["predictions"]
    )
    printed = {tuple(line.split()) for line in scale.table(rows).splitlines()}
    page = (folder / "README.md").read_text(encoding="utf-8")
    _, _, after = page.partition("`scale.py`: large models")
    shown = after.split("```")[1].strip().splitlines()
    assert len(shown) > 10
    for line in shown[2:]:
        assert tuple(line.split()) in printed, line


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path) -> None:
    path, figure = tmp_path / "curve.png", Figure((1, 1))
    common.save_figure(figure, path, dpi=50)
    before = path.read_bytes()
    assert matplotlib.image.imread(path).shape[:2] == (50, 50)
    figure.text(0, 0, r"$\unknown$")
    with pytest.raises(ValueError, match="unknown"):
        common.save_figure(figure, path, dpi=50)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_may_write_into_one_store(tmp_path: Path) -> None:
    """Each keeps what the other adds, replaces and drops."""
    path = tmp_path / "folder" / "results.json"
    first = common.Store(path)
    for key in "abc":
        first.get(key, lambda: 0)
    second = common.Store(path)
    del second.runs["a"]
    second.runs["b"] = 2
    second.get("d", lambda: 2)
    del first.runs["c"]
    assert first.get("c", lambda: 1) == 1
    del first.runs["c"]
    first.get("e", lambda: 1)
    expected = {"b": 2, "d": 2, "e": 1}
    assert first.runs == common.Store(path).runs == expected
    second.get("f", lambda: 2)
    assert second.runs == common.Store(path).runs == {**expected, "f": 2}
    assert first.get("f", lambda: 3) == 2
