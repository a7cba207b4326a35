"""The benchmarks that train run with ``--quick`` and leave what they promise."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("KFAC", "EKFAC", "EKFAC-ra")


def run(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run a benchmark with ``--quick``; return what it printed and its JSON file."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    script = str(ROOT / "benchmarks" / f"{name}.py")
    result = subprocess.run(
        [sys.executable, script, "--quick", "--output", "results"],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    text = (folder / "results" / f"{name}.json").read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(text)
    image = matplotlib.image.imread(folder / "results" / f"{name}.png")
    assert min(image.shape[:2]) >= 300
    assert image[..., :3].std() > 0.02, "the figure is blank"
    return result.stdout, results


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
    assert all(0 < row["groups"] <= 60 for row in results["figure 5"]["rows"])


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
    expected = {"gram", "one layer", "patches", "scalings", "precondition", "eigh"}
    assert kinds == expected
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
