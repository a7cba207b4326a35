"""The example and the benchmarks of continual learning run with ``--quick``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest
import test_benchmarks
import test_examples

METHODS = ("none", "EWC", "EKFAC", "EKFAC, optimizer")


@pytest.mark.parametrize(
    "protocol", ["permuted", pytest.param("split", marks=pytest.mark.slow)]
)
def test_example(protocol: str, tmp_path: Path) -> None:
    script = str(test_examples.ROOT / "examples" / "continual.py")
    options = ("--quick", "--protocol", protocol, "--output", str(tmp_path))
    result = test_examples.run(script, *options, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    # A matrix for each method, then the table.
    matrices, table = result.stdout.split("method ", 1)
    for method in METHODS:
        start = matrices.index(f"\n{method}\n")
        rows = matrices[start:].split("-" * 40)[1].strip().splitlines()[:2]
        cells = [[float(cell) for cell in row.split()] for row in rows]
        assert [len(row) for row in cells] == [2, 3]
        assert all(0 <= a <= 1 for row in cells for a in row[1:])
    lines = table.split("\n\n")[0].splitlines()[2:]
    assert [line[:18].strip() for line in lines] == list(METHODS)
    assert "step/s" in result.stderr
    image = matplotlib.image.imread(tmp_path / "continual.png")
    assert image[..., :3].std() > 0.02


def test_benchmark_of_permuted_images(tmp_path: Path) -> None:
    """It resumes: what is in the file of runs is not computed again."""
    text, results = test_benchmarks.run("continual", tmp_path)
    names = [row["method"] for row in results["methods"]]
    assert names == ["none", "MAS", "EKFAC", "EKFAC, optimizer, re-estimated"]
    for row in results["methods"]:
        assert 0 < row["average accuracy"] <= 1
        assert len(row["curve"]) == 2
    merges = [(row["structure"], row["merge"]) for row in results["merging"]]
    assert len(merges) == len(set(merges)) == 9
    errors = {row["merge"]: row["error"] for row in results["merging"]}
    assert errors["exact"] == errors["separate"] == 0
    assert 0 < errors["optimal"] <= errors["pooled"] < errors["nearest"]
    assert 0 < errors["joint_basis"] <= errors["first_basis"]
    assert " s  2 tasks: MAS" in text
    again, same = test_benchmarks.run("continual", tmp_path)
    assert " s  2 tasks" not in again
    assert same == results


def test_benchmark_of_two_tasks(tmp_path: Path) -> None:
    _, results = test_benchmarks.run("two_tasks", tmp_path)
    cells = [(row["setting"], row["method"]) for row in results["rows"]]
    names = ("none", "KFAC", "singular, beyond noise")
    assert cells == [(s, m) for s in ("last layer", "all layers") for m in names]
    assert all(row["final"] <= row["best"] <= 2 for row in results["rows"])


@pytest.mark.slow
def test_benchmark_of_costs(tmp_path: Path) -> None:
    _, results = test_benchmarks.run("continual_cost", tmp_path)
    assert {row["width"] for row in results["steps"]} == {16, 32}
    assert all(row["plain ms"] > 0 < row["step ms"] for row in results["steps"])
    found = {row["consolidate"] for row in results["consolidate"]}
    assert {"EKFAC, loader", "EKFAC, optimizer, live"} <= found
