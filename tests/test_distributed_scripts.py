"""The example through torchrun, and the benchmark's tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, folder: Path) -> str:
    """Return what a Python command printed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path}
    environment["OMP_NUM_THREADS"] = "1"
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def losses(printed: str) -> list[float]:
    """Return the last losses of the printed table, optimizer by optimizer."""
    rows = re.findall(r"^(?:SGD|EKFAC) +([0-9.]+) ", printed, re.MULTILINE)
    assert len(rows) == 2, printed
    return [float(row) for row in rows]


def torchrun(count: int, *options: str, folder: Path) -> str:
    """Run the example on ``count`` processes."""
    launcher = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
    )
    script = str(ROOT / "examples" / "distributed.py")
    return run(*launcher, script, "--quick", *options, folder=folder)


def test_the_example_trains_alike_on_one_process_and_on_two(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "distributed.py")
    alone = run(script, "--quick", folder=tmp_path)
    assert "digits on 1 processes, 12 steps" in alone
    several = torchrun(2, "--workers", "0.5", folder=tmp_path)
    assert "digits on 2 processes, 12 steps" in several
    assert losses(several) == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.slow
def test_the_example_trains_sharded_and_resumes(tmp_path: Path) -> None:
    save = ("--resume", "checkpoint")
    first = torchrun(4, "--sharded", *save, folder=tmp_path)
    second = torchrun(2, *save, folder=tmp_path)
    script = str(ROOT / "examples" / "distributed.py")
    third = run(script, "--quick", *save, folder=tmp_path)
    ekfac = [losses(printed)[1] for printed in (first, second, third)]
    assert ekfac[0] > ekfac[1] > ekfac[2]


@pytest.mark.slow
def test_overhead_of_the_benchmark(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "distributed.py")
    options = ("--quick", "--parts", "overhead", "--output", "results")
    printed = run(script, *options, folder=tmp_path)
    assert re.search(r"^SGD( +[0-9.]+){5}$", printed, re.MULTILINE), printed
    text = (tmp_path / "results" / "distributed.json").read_text(encoding="utf-8")
    rows = json.loads(text)["overhead"]
    assert len(rows) == 5
    assert all(row["least"] <= row["ratio"] <= row["largest"] for row in rows)


def test_tables_of_the_benchmark(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "distributed.py")
    options = ("--parts", "tables", "--output", "results")
    printed = run(script, *options, folder=tmp_path)
    # torchvision's ResNet-50; 12 (12 d^2 + 13 d) for width d.
    assert "ResNet-50: 25557032 parameters" in printed
    assert f"transformer: {12 * (12 * 768**2 + 13 * 768)} parameters" in printed
    text = (tmp_path / "results" / "distributed.json").read_text(encoding="utf-8")
    rows = json.loads(text)["tables"]
    assert {(row["network"], row["ranks"]) for row in rows} == {
        (name, n) for name in ("ResNet-50", "transformer") for n in (8, 64, 512)
    }
    for name in ("ResNet-50", "transformer"):
        kept = [row["kept MiB"] for row in rows if row["network"] == name]
        for ranks in (kept[:3], kept[3:7], kept[7:]):
            assert ranks == sorted(ranks)  # fewer workers keep less
