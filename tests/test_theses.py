"""Statistical claims of Haink (2023) and Ge (2025), on seeds of their own.

The thresholds were proposed after other runs (seeds 0 and 1 of the scripts); claims
that failed there, or when measured here, are recorded beside the scripts instead.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("haink2023", "ge2025", "hessian_cost")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run(name: str, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = str(torch.get_num_threads())
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--output", "out"],
        cwd=tmp_path,
        env={
            **os.environ,
            "MPLBACKEND": "Agg",
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": threads,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out" / f"{name}.json").read_text("utf-8"))["rows"]
    if name == "hessian_cost":
        assert all(row["largest residual"] < 1e-3 for row in rows)
        assert all(
            row["fifth"] == pytest.approx(rows[0]["fifth"], rel=1e-3) for row in rows
        )
        assert rows[1]["products"] < rows[0]["products"]
    else:
        assert "reported" in result.stdout
        assert len(rows) > 40
        assert "nan" not in result.stdout
    image = matplotlib.image.imread(tmp_path / "out" / f"{name}.png")
    assert image[..., :3].std() > 0.02, "the figure is blank"


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in ("haink2023", "ge2025")}
    sys.path.remove(str(BENCHMARKS))


# ----------------------------------------------------------------------------- Haink


@pytest.fixture(scope="module", params=[(10, 0.0), (11, 0.0), (12, 5e-4)])
def haink(request: Any, scripts: dict[str, ModuleType]) -> dict[str, Any]:
    seed, penalty = request.param
    run = scripts["haink2023"].trained(seed, penalty, 150, 40)
    found: dict[str, Any] = scripts["haink2023"].measured(run)[0]
    found["penalty"] = penalty
    return found


@pytest.mark.slow
def test_haink_drift(haink: dict[str, Any]) -> None:
    assert haink["drift R^2"] > 0.99
    assert haink["drift var / a^2(T^2-1)/12"] == pytest.approx(1, abs=0.01)
    assert haink["pc1 / pc2 variance"] > 20
    assert (haink["|theta_1| grows by"] < 0) == bool(haink["penalty"])
    if not haink["penalty"]:
        assert 0.4 < abs(haink["cos(p_1, w)"]) < 0.95


@pytest.mark.slow
def test_haink_updates_know_the_hessian_better_than_weights(
    haink: dict[str, Any],
) -> None:
    for k in (5, 10, 20):
        updates = haink[f"PCs of updates in top {k}"]
        assert updates > 0.7
        assert updates > haink[f"PCs of weights in top {k}"]


@pytest.mark.slow
def test_haink_weights_avoid_the_very_top(haink: dict[str, Any]) -> None:
    assert haink["weight product, top 1 %"] < 0.6
    assert haink["weight product, 1-5 %"] > 3
    assert haink["accuracy, largest 20 % / full"] >= 0.97  # 0.9797 with seed 1
    assert haink["accuracy, smallest 80 %"] < 0.5


@pytest.mark.slow
def test_haink_directions(haink: dict[str, Any]) -> None:
    singular = haink["SV 1-5 in top 20 % of eigenvectors"]
    assert singular > 2.5 * haink["other SVs"]
    assert haink["share of last layer / null, top 10"] > 1.5
    assert haink["share of first layer / null, top 10"] < 1
    energy = haink["layer's top 10 in network's top 50"]
    assert energy > 10 * haink["the same by chance"]
    assert haink["layer's top 10: largest overlap"] < 0.98
    assert 0 < haink["|lambda_min| / lambda_max"] < 0.05
    assert haink["layer's |lambda_min| / lambda_max"] < 1e-12
    for end in ("top", "bottom"):
        assert haink[f"participation {end} 10"] > haink["participation middle"]


@pytest.mark.slow
def test_haink_loss_scaling(haink: dict[str, Any]) -> None:
    losses = [haink[f"log10 loss, layer x {f:g}"] for f in (1, 1.5, 2, 3)]
    if haink["penalty"]:
        assert losses[1] < losses[2] < losses[3]
    else:
        assert losses[0] > losses[1] > losses[2] > losses[3]


@pytest.mark.slow
def test_the_kronecker_basis_stands_in_for_the_layers(haink: dict[str, Any]) -> None:
    assert haink["EKFAC's top 5 in the layer's"] > 0.6
    full = haink["test accuracy"]
    assert haink["accuracy, Kronecker basis, largest 20 %"] >= 0.95 * full
    assert haink["accuracy, Kronecker basis, smallest 80 %"] < 0.5


# ------------------------------------------------------------------------------ Ge


@pytest.fixture(scope="module", params=[10, 11])
def ge(request: Any, scripts: dict[str, ModuleType]) -> dict[str, Any]:
    """Return the numbers on MNIST if ``EKFAC_DATA`` names a folder with its files."""
    import argparse

    script = scripts["ge2025"]
    folder = os.environ.get("EKFAC_DATA")
    if folder is None:
        pytest.skip("set EKFAC_DATA to a folder with MNIST's idx files")
    _, data = script.images(argparse.Namespace(data_dir=Path(folder), quick=False))
    run = script.trained(data, request.param, 40, 256)
    found: dict[str, Any] = script.measured(run, 100)[0]
    return found


@pytest.mark.slow
def test_ge_layers(ge: dict[str, Any]) -> None:
    assert all(ge[f"layer {i} re-randomised"] <= 0.25 for i in (1, 2, 3, 4))
    first, *rest = (ge[f"layer {i} re-initialised"] for i in (1, 2, 3, 4))
    assert first < min(rest) - 0.1
    assert ge["asymmetry of the layers"] > 0.5
    assert ge["whole model, changes <= 0.4 undone"] < first


@pytest.mark.slow
def test_ge_removals(ge: dict[str, Any]) -> None:
    assert ge["change, reinitialise, 0.8"] > ge["test accuracy"] - 0.01
    change, magnitude, random = (
        ge[f"{criterion}, reinitialise, 0.9"]
        for criterion in ("change", "magnitude", "random")
    )
    assert change > magnitude > random + 0.1
    assert 0.8 < ge["overlap of change and magnitude, 0.8"] < 0.88
    assert ge["standard deviations above chance"] > 50  # not independent


@pytest.mark.slow
def test_ge_anisotropy(ge: dict[str, Any]) -> None:
    ratio = {
        state: ge[f"T_100, probabilities, {state}"]
        for state in ("init", "trained", "0.9 of small changes undone")
    }
    assert ratio["trained"] > 0.99 > 0.9 > ratio["init"]  # 0.79 with seed 0
    assert ratio["0.9 of small changes undone"] > 0.95
    assert ge["T_100, logits, trained"] < 0.85
    damaged = ge["T_100, probabilities, 0.05 of large changes undone"]
    assert damaged < 0.95
    assert ge["accuracy, 0.05 of large changes undone"] < ge["test accuracy"] - 0.05
    assert ge["T_100, probabilities, 0.5 at random undone"] < ratio["trained"]
    support = [
        ge[f"support of top 100, {state}"]
        for state in ("init", "trained", "0.05 of large changes undone")
    ]
    assert support[1] < 0.8 * support[0]
    assert support[2] > 1.2 * support[1]
