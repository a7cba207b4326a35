"""The table of ``benchmarks/coverage.py``, of a few models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def coverage(monkeypatch: pytest.MonkeyPatch) -> object:
    """Return the script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import coverage_models

    name = "ekfac_benchmark_coverage"
    if name not in sys.modules:
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location(name, BENCHMARKS / "coverage.py")
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    assert coverage_models.MODELS
    return sys.modules[name]


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "ViT"])
def test_all_weights_of_models_of_transformers_are_in_blocks(
    coverage: object, name: str
) -> None:
    make = coverage.MODELS["transformers"][name]  # type: ignore[attr-defined]
    found = coverage.shares(make)  # type: ignore[attr-defined]
    assert found["blocks"] == 1.0
    assert found["warned"] == 0


def test_a_row_has_all_columns(coverage: object) -> None:
    make = coverage.MODELS["torch"]["DLRM"]  # type: ignore[attr-defined]
    row = coverage.row("torch: DLRM", make, 4)  # type: ignore[attr-defined]
    assert set(coverage.COLUMNS) <= set(row)  # type: ignore[attr-defined]
    assert row["saved"]
    assert row["blocks"] == 1.0
    torch.testing.assert_close(row["EKFAC same"], row["runs"]["ekfac"]["0.001"])
    assert "DLRM" in coverage.page([row], 4)  # type: ignore[attr-defined]


def test_recorded_table_keeps_its_promise() -> None:
    """At least 95 % of the weights are in blocks, of thirty models and more."""
    file = BENCHMARKS / "results" / "coverage.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 30
    assert min(row["blocks"] for row in rows) >= 0.95
