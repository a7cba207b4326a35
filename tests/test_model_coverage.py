"""The table of ``benchmarks/model_coverage.py``, on models that are fully covered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["llama", "opt", "resnet"])
def test_all_weights_are_in_blocks(name: str) -> None:
    script = str(ROOT / "benchmarks" / "model_coverage.py")
    done = subprocess.run(
        [sys.executable, script, "--models", name],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert f"{name} " in done.stdout
    assert "100.0%" in done.stdout
