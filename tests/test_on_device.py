"""What runs when a CUDA device is lent: with a fake clock, and tiny on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import on_device

    yield on_device
    for name in ("on_device", "device_models", "peers_optimizers", "common"):
        sys.modules.pop(name, None)


class FakeClock:
    """Time that passes only when a contender lets it."""

    now = 0.0

    def elapsed(self, work: Callable[[], object]) -> float:
        start = self.now
        work()
        return self.now - start


class FakeContender:
    """Takes the seconds of a list, a round each, and notes the order of rounds."""

    def __init__(self, name: str, clock: FakeClock, order: list[str], *seconds: float):
        self.name, self.clock, self.order = name, clock, order
        self.left, self.seconds, self.loss = list(seconds), [], 0.5

    def round(self, steps: int) -> None:
        self.order.append(self.name)
        seconds = self.left.pop(0)
        if seconds < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.clock.now += steps * seconds


def test_contenders_take_turns_and_the_first_rounds_do_not_count(
    on_device: Any,
) -> None:
    clock, order = FakeClock(), []

    def maker(name: str, *seconds: float) -> Callable[[], FakeContender]:
        return lambda: FakeContender(name, clock, order, *seconds)

    def missing() -> FakeContender:
        raise ImportError("No module named 'pytorch_optimizer'")

    makers = {
        "AdamW": maker("AdamW", 9.0, 0.001, 0.001, 0.004),
        "SOAP": missing,
        "EKFAC": maker("EKFAC", 99.0, 0.002, 0.002, 0.008),
        "Muon": maker("Muon", 1.0, 0.001, -1.0),
    }
    found = on_device.compete(makers, clock, warm=1, rounds=3, steps=10)
    assert list(found) == list(makers)
    assert found["AdamW"]["ms"] == pytest.approx(1.0)
    assert found["AdamW"]["mean ms"] == pytest.approx(2.0)
    assert found["EKFAC"]["ratio"] == pytest.approx(2.0)
    assert found["EKFAC"]["loss"] == 0.5
    assert "pytorch_optimizer" in found["SOAP"]["error"]
    assert "out of memory" in found["Muon"]["error"]
    assert order == ["AdamW", "EKFAC", "Muon"] * 3 + ["AdamW", "EKFAC"]


def test_a_part_that_fails_is_recorded_and_the_next_follows(
    on_device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(on_device, "steps_part", broken)
    monkeypatch.setattr(on_device, "command_part", lambda *words: {"code": 0})
    options = Namespace(device="cpu", quick=True, output=tmp_path, parts=None)
    found = on_device.run(options, FakeClock())
    written = json.loads((tmp_path / "on_device.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(found))
    assert set(written) >= {"device", "torch", "tests", "bench", "steps", "choices"}
    assert written["steps"]["error"] == "RuntimeError: the device is gone"
    assert written["choices"] == {"code": 0}


def test_steps_on_the_cpu(
    on_device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All networks and optimizers, tiny."""
    monkeypatch.setenv("EKFAC_KERNELS", "reference")
    options = Namespace(device="cpu", quick=True, output=tmp_path, parts=["steps"])
    found = on_device.run(options, on_device.WallClock())["steps"]
    assert set(found) == {"ResNet-50", "ViT-B/16", "GPT-2 small"}
    for problem in found.values():
        assert set(problem) == set(on_device.CONTENDERS)
        for name, result in problem.items():
            if "pytorch_optimizer" in result.get("error", ""):
                continue  # not installed
            assert result["ms"] > 0, (name, result)
            assert 0 < result["loss"] < 20, (name, result)


def test_networks_have_the_published_sizes(on_device: Any) -> None:
    """Parameters in millions, with biases; GPT-2's second table for the untied head."""
    from device_models import PROBLEMS

    expected = {"ResNet-50": 25.557, "ViT-B/16": 86.567, "GPT-2 small": 163.037}
    for name, make in PROBLEMS.items():
        with torch.device("meta"):
            model = make(False).model()
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert count == pytest.approx(expected[name], rel=2e-4), name


BARE = """
import runpy, sys

class Missing:
    names = {"matplotlib", "sklearn", "scipy", "pandas", "torchvision", "hypothesis"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"no {name} on this machine")

sys.meta_path.insert(0, Missing())
sys.argv = ["on_device.py"]
runpy.run_path("benchmarks/on_device.py", run_name="__main__")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_torch_and_numpy_are_enough_and_a_device_is_asked_for() -> None:
    """The script is imported with nothing else, and says what it lacks."""
    root = BENCHMARKS.parent
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{BENCHMARKS}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("there is no CUDA device"), done.stderr
