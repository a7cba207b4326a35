"""The table of ``benchmarks/coverage.py``, of a few models."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import pytest

from ekfac import EKFAC
from ekfac.errors import EkfacWarning

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


FURTHER = ("XLNet", "DETR", "SAM", "WavLM", "ChebConv", "DCN")


def further() -> list[object]:
    """Return the names of further models, most of them slow."""
    sys.path.insert(0, str(BENCHMARKS))
    from further_models import FURTHER as packages

    return [
        pytest.param(package, name, marks=[] if name in FURTHER else [pytest.mark.slow])
        for package, named in packages.items()
        for name in named
    ]


@pytest.mark.parametrize(("package", "name"), further())
def test_further_models_are_in_blocks_and_go_on_from_what_is_saved(
    coverage: object, package: str, name: str
) -> None:
    pytest.importorskip(package)
    from further_models import FURTHER as packages

    make = packages[package][name]
    known = coverage.shares(make)  # type: ignore[attr-defined]
    assert known["blocks"] >= 0.95, known
    assert known["warned"] <= 6
    assert coverage.goes_on(make)  # type: ignore[attr-defined]


QUICK = ("BEiT", "EfficientNet", "GCN", "Mamba")


def models() -> list[object]:
    """Return the names of all packages' models, most of them slow."""
    sys.path.insert(0, str(BENCHMARKS))
    from coverage_models import MODELS

    return [
        pytest.param(package, name, marks=[] if name in QUICK else [pytest.mark.slow])
        for package, named in MODELS.items()
        for name in named
    ]


@pytest.mark.parametrize(("package", "name"), models())
def test_warnings_are_a_few_lines_and_reasons_say_what_to_do(
    coverage: object, package: str, name: str
) -> None:
    pytest.importorskip(package)
    problem = coverage.built(coverage.MODELS[package][name])  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        optimizer = EKFAC(problem.model, lr=1e-3)
        for number in range(2):
            coverage.step(problem, optimizer, number)  # type: ignore[attr-defined]
    said = [str(w.message) for w in record if isinstance(w.message, EkfacWarning)]
    assert sum(len(text.splitlines()) for text in said) <= 6, said
    for row in optimizer.describe().rows:
        if row.method == "AdamW-like":  # class with its module's path: why; advice
            reason = row.reason.removeprefix("no statistics: ")
            assert re.fullmatch(r"(\w+\.)+\w+: [^;]+; .+", reason), row


def test_a_row_has_all_columns(coverage: object) -> None:
    make = coverage.MODELS["torch"]["DLRM"]  # type: ignore[attr-defined]
    row = coverage.row("torch: DLRM", make, 4)  # type: ignore[attr-defined]
    assert set(coverage.COLUMNS) <= set(row)  # type: ignore[attr-defined]
    assert row["saved"]
    assert row["blocks"] == 1.0
    losses = row["runs"]["ekfac"]
    best = min(losses, key=lambda lr: losses[lr])
    assert losses.keys() == row["runs"]["adamw"].keys()  # as many for either
    assert float(best) not in (min(map(float, losses)), max(map(float, losses)))
    assert "DLRM" in coverage.page([row], [], 4)  # type: ignore[attr-defined]


def test_recorded_table_keeps_its_promise() -> None:
    """At least 95 % of the weights are in blocks, of thirty models and more."""
    file = BENCHMARKS / "results" / "coverage.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    rows = [*record["rows"], *record["earlier"]]
    assert len(rows) > 30
    assert min(row["blocks"] for row in rows) >= 0.95
