"""The benchmark of transported scalings runs, and shows what it is there to show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image

ROOT = Path(__file__).resolve().parent.parent


def test_transported_scalings_stay_closest(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "transport.py"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(script), "--quick", "--output", "results"],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    saved = tmp_path / "results" / "transport.json"
    rows = json.loads(saved.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 6
    for row in rows:
        assert f"{row['transported']:.4g}" in result.stdout
        # A turn of at most 0.15 radians from refresh to refresh.
        assert row["radians"] <= 0.003
        assert row["transported"] < 0.95 * row["unrotated"], row
        assert row["unrotated"] < 0.8 * row["reset"], row
    image = matplotlib.image.imread(saved.with_suffix(".png"))
    assert image[..., :3].std() > 0.02, "the figure is blank"
