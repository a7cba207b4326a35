"""Everything that is to be run when there is a CUDA device, in one command.

    tests      the tests marked gpu
    bench      ``benchmarks/bench_kernels.py``, with TF32 and without
    steps      a training step of ResNet-50, ViT-B and GPT-2 small (random weights and
               data, bfloat16 autocast) with EKFAC, with and without its kernels, beside
               AdamW, SOAP and Muon. Each round is ten steps of each in turn; the first
               rounds, which compile, measure and have the first refreshes, do not count
    choices    ``python -m ekfac kernels --compile``: variants, and the table of choices
               that the parts before have measured

One file, ``on_device.json``, is written anew after every part, with the device's name:
a machine that is taken away leaves what was done. A part or an optimizer that fails is
recorded with its words, and the next follows.

torch and numpy are enough; the part "tests" needs pytest, SOAP and Muon need
pytorch_optimizer (``pip install --no-deps --target FOLDER pytorch_optimizer``, and that
folder in ``PYTHONPATH``).

    python benchmarks/on_device.py
    python benchmarks/on_device.py --device cpu --quick   # tries it, and shows no speed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import HERE, parser, table
from device_models import PROBLEMS, Problem
from peers_optimizers import OPTIMIZERS

from ekfac.kernels.cuda.choice import Clock, DeviceClock

# Name -> the optimizer of peers_optimizers, and EKFAC_KERNELS.
CONTENDERS = {
    "AdamW": ("AdamW", "auto"),
    "Muon": ("Muon", "auto"),
    "SOAP": ("SOAP", "auto"),
    "EKFAC": ("EKFAC", "auto"),
    "EKFAC, all kernels": ("EKFAC", "own"),
    "EKFAC, no kernels": ("EKFAC", "reference"),
}
WARM, ROUNDS, STEPS = 4, 6, 10  # rounds that do not count, that do, steps of each
LR = 1e-4
SECONDS = 3600  # that a part may take
Result = dict[str, Any]


class WallClock:
    """Seconds that pass meanwhile, for a CPU."""

    def elapsed(self, work: Callable[[], object]) -> float:
        """Return the seconds that ``work`` takes."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


@contextmanager
def kernels_mode(mode: str) -> Iterator[None]:
    """Set ``EKFAC_KERNELS`` for a while."""
    before = os.environ.get("EKFAC_KERNELS")
    os.environ["EKFAC_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("EKFAC_KERNELS")
        if before is not None:
            os.environ["EKFAC_KERNELS"] = before


class Contender:
    """A network with an optimizer, and how long its rounds took.

    Args:
        name: One of :data:`CONTENDERS`.
        problem: The network and its loss.
        device: Where it is trained.
    """

    def __init__(self, name: str, problem: Problem, device: torch.device) -> None:
        kind, self.mode = CONTENDERS[name]
        torch.manual_seed(0)
        self.problem, self.device = problem, device
        self.model = problem.model().to(device)
        with kernels_mode(self.mode):
            self.optimizer = OPTIMIZERS[kind](self.model, LR, problem.head)
        self.data = problem.data(device)
        self.seconds: list[float] = []
        self.loss = float("nan")

    def round(self, steps: int) -> None:
        """Do some training steps."""
        half = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"
        )
        with kernels_mode(self.mode):
            for _ in range(steps):
                self.optimizer.zero_grad()
                with half:
                    loss = self.problem.loss(self.model, *self.data)
                loss.backward()
                self.optimizer.step()
        self.loss = float(loss.detach())


def compete(
    makers: Mapping[str, Callable[[], Any]],
    clock: Clock,
    *,
    warm: int = WARM,
    rounds: int = ROUNDS,
    steps: int = STEPS,
) -> dict[str, Result]:
    """Return milliseconds a step of each contender, and their ratios to the first.

    Args:
        makers: Return objects with ``round(steps)``, ``seconds`` and ``loss``.
        clock: Measures rounds.
        warm: Rounds that do not count.
        rounds: Rounds that do, in turn.
        steps: Of a round.
    """
    running: dict[str, Any] = {}
    failed: dict[str, Result] = {}

    def attempt(name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:  # whatever it is, the others go on
            failed[name] = {"error": f"{type(error).__name__}: {error}"}
            running.pop(name, None)
            return False
        return True

    for name, make in makers.items():
        attempt(name, lambda name=name, make=make: running.update({name: make()}))
    for turn in range(warm + rounds):
        for name, contender in list(running.items()):
            taken: list[float] = []

            def one(contender: Any = contender, taken: list[float] = taken) -> None:
                taken.append(clock.elapsed(lambda: contender.round(steps)))

            if attempt(name, one) and turn >= warm:
                contender.seconds += taken
    results = dict(failed)
    for name, contender in running.items():
        each = [1e3 * seconds / steps for seconds in contender.seconds]
        results[name] = {
            "ms": statistics.median(each),
            "mean ms": statistics.fmean(each),
            "loss": contender.loss,
        }
    first = results.get(next(iter(makers)), {}).get("ms")
    for result in results.values():
        if first and "ms" in result:
            result["ratio"] = result["ms"] / first
    return {name: results[name] for name in makers}


def steps_part(options: argparse.Namespace, clock: Clock) -> Result:
    """Return the times of all contenders on all problems."""
    device, results = torch.device(options.device), {}
    rounds = {"warm": 1, "rounds": 2, "steps": 2} if options.quick else {}
    for name, make in PROBLEMS.items():
        problem = make(options.quick)
        makers = {
            one: lambda one=one, problem=problem: Contender(one, problem, device)
            for one in CONTENDERS
        }
        results[name] = compete(makers, clock, **rounds)
        rows = [{"optimizer": k, **v} for k, v in results[name].items() if "ms" in v]
        print(f"\n{name}\n{table(rows) if rows else results[name]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def command_part(*command: str) -> Result:
    """Run a command in the checkout; return how it ended and its last words."""
    root = HERE.parent
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=root,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        code, words = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        code, words = None, f"no end after {SECONDS} s"
    seconds = time.perf_counter() - start
    return {"code": code, "seconds": seconds, "output": words[-20_000:]}


def bench_part(options: argparse.Namespace) -> Result:
    """Return the tables of ``bench_kernels.py``."""
    results: Result = {}
    for suffix, more in (("", []), ("_tf32", ["--tf32"])):
        command = ["benchmarks/bench_kernels.py", "--device", options.device, *more]
        command += ["--quick"] if options.quick else []
        folder = options.output.resolve()
        done = command_part(*command, "--output", str(folder))
        file = folder / f"kernels{suffix}.json"
        if done["code"] == 0 and file.exists():
            done["output"] = json.loads(file.read_text(encoding="utf-8"))
        results[f"kernels{suffix}"] = done
    return results


def machine(device: torch.device) -> Result:
    """Return what the numbers belong to."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "devices": torch.cuda.device_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
    }


def run(options: argparse.Namespace, clock: Clock) -> Result:
    """Run the parts that are asked for; return, and write, what they give."""
    parts: dict[str, Callable[[], Result]] = {
        "tests": lambda: command_part(
            *("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"),
            *("tests/test_gpu.py", "tests/test_gpu_kernels.py"),
        ),
        "bench": lambda: bench_part(options),
        "steps": lambda: steps_part(options, clock),
        "choices": lambda: command_part("-m", "ekfac", "kernels", "--compile"),
    }
    results: Result = machine(torch.device(options.device))
    options.output.mkdir(parents=True, exist_ok=True)
    path: Path = options.output / "on_device.json"
    for name in options.parts or parts:
        try:
            results[name] = parts[name]()
        except Exception as error:  # the next part may do
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: done, see {path}", flush=True)
    return results


def main() -> None:
    """Run on the device that is asked for."""
    options = parser(__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument(
        "--parts", nargs="*", choices=["tests", "bench", "steps", "choices"]
    )
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device; --device cpu --quick tries the script"
        )
    run(chosen, DeviceClock(device) if device.type == "cuda" else WallClock())


if __name__ == "__main__":
    main()
