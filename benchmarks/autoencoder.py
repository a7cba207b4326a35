"""The deep auto-encoder: loss over steps and over seconds, every optimizer tuned.

    python benchmarks/autoencoder.py --data mnist            # torchvision's MNIST
    python benchmarks/autoencoder.py --data mnist --data-dir FOLDER_OF_IDX_GZ_FILES

Network, data and loss of examples/autoencoder.py (784-1000-500-250-30 and back,
sigmoid, Xavier initialisation, batch 200, cross-entropy summed over pixels). Every
optimizer is tuned by the training loss after ``--tune-seconds`` with seed 0 over the
grid below (four learning rates each; for the Kronecker methods three and two relative
dampings), then trained for ``--seconds`` with three seeds. Evaluation and data
loading are outside the clock. With pytorch_optimizer installed, its SOAP is a baseline.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ekfac import EKFAC, KFAC

ROOT = Path(__file__).resolve().parents[1]
KRONECKER = tuple((lr, d) for lr in (5e-4, 1e-3, 2e-3) for d in (0.03, 0.1))
GRID: dict[str, tuple[tuple[float, ...], ...]] = {
    "SGD": ((1e-3,), (3e-3,), (1e-2,), (3e-2,)),
    "Adam": ((3e-4,), (1e-3,), (3e-3,), (1e-2,)),
    "SOAP": ((3e-4,), (1e-3,), (3e-3,), (1e-2,)),
    "KFAC": KRONECKER,
    "EKFAC-ra": KRONECKER,
    "EKFAC": KRONECKER,
}
COLOURS = {
    "SGD": "0.6",
    "Adam": "tab:orange",
    "SOAP": "tab:green",
    "KFAC": "tab:purple",
    "EKFAC-ra": "tab:cyan",
    "EKFAC": "tab:blue",
}
Maker = Callable[[nn.Module, float], torch.optim.Optimizer]


def example() -> Any:
    """Return the module of the example."""
    path = ROOT / "examples/autoencoder.py"
    spec = importlib.util.spec_from_file_location("autoencoder_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["autoencoder_example"] = module
    spec.loader.exec_module(module)
    return module


def maker(name: str, setting: tuple[float, ...]) -> Maker:
    """Return the constructor of an optimizer with a setting of the grid."""
    lr = setting[0]
    if name == "SGD":
        return lambda m, _: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9)
    if name == "Adam":
        return lambda m, _: torch.optim.Adam(m.parameters(), lr=lr)
    if name == "SOAP":
        from pytorch_optimizer import SOAP

        return lambda m, _: SOAP(m.parameters(), lr=lr, weight_decay=0.0)
    damping = setting[1]
    if name == "KFAC":
        return lambda m, _: KFAC(m, lr=lr, damping=damping, basis_interval=50)
    scaling = "running_average" if name == "EKFAC-ra" else "per_example"
    return lambda m, _: EKFAC(
        m, lr=lr, damping=damping, scaling=scaling, basis_interval=50
    )


def smooth(losses: list[float], window: int = 20) -> np.ndarray:
    """Return running means of the losses."""
    sums = np.cumsum([0.0, *losses])
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - window)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


class Study:
    """Runs of all optimizers on one data set."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.module = args, example()
        if args.data == "mnist":
            self.data = self.module.mnist(args.data_dir)
        else:
            self.data = self.module.digits()
        self.best: dict[str, tuple[float, ...]] = {}
        self.tuning: dict[str, dict[str, float]] = {}
        self.runs: dict[str, list[dict[str, list[float]]]] = {}

    def train(
        self, name: str, setting: tuple[float, ...], seconds: float, seed: int
    ) -> dict[str, list[float]]:
        """Return losses and times of one run."""
        self.module.OPTIMIZERS[name] = maker(name, setting)
        options = argparse.Namespace(
            seed=seed, widths=self.args.widths, seconds=seconds, steps=10**9
        )
        run = self.module.train(name, setting[0], self.data, options)
        return {"losses": run.losses, "seconds": run.seconds}

    def tune(self, name: str) -> None:
        """Choose the setting with the lowest loss."""
        scores = {}
        for setting in GRID[name]:
            run = self.train(name, setting, self.args.tune_seconds, 0)
            value = float(smooth(run["losses"])[-1])
            scores[setting] = value if np.isfinite(value) else float("inf")
        self.best[name] = min(scores, key=scores.__getitem__)
        self.tuning[name] = {str(k): v for k, v in scores.items()}
        print(f"{name}: {self.tuning[name]}", flush=True)

    def measure(self, name: str) -> None:
        """Run the chosen setting with every seed."""
        self.runs[name] = [
            self.train(name, self.best[name], self.args.seconds, seed)
            for seed in range(self.args.seeds)
        ]

    def final(self, name: str) -> list[float]:
        """Return the loss at the end of every seed's run."""
        return [float(smooth(run["losses"])[-1]) for run in self.runs[name]]

    def reach(self, name: str, target: float) -> tuple[float, float]:
        """Return mean steps and seconds to a loss; infinity if a seed never does."""
        steps, seconds = [], []
        for run in self.runs[name]:
            below = np.flatnonzero(smooth(run["losses"]) <= target)
            steps.append(below[0] + 1.0 if len(below) else np.inf)
            seconds.append(run["seconds"][below[0]] if len(below) else np.inf)
        return float(np.mean(steps)), float(np.mean(seconds))

    def report(self) -> str:
        """Return the tables."""
        names = list(self.runs)
        lines = ["optimizer  setting            steps  ms/step  x SGD  loss (per seed)"]
        pace = {
            n: float(np.mean([r["seconds"][-1] / len(r["losses"]) for r in runs]))
            for n, runs in self.runs.items()
        }
        for name in names:
            best = self.best[name]
            setting = f"lr {best[0]:g}"
            if len(best) > 1:
                setting += f", damping {best[1]:g}"
            steps = np.mean([len(r["losses"]) for r in self.runs[name]])
            finals = "  ".join(f"{loss:6.1f}" for loss in self.final(name))
            lines.append(
                f"{name:10s} {setting:22s} {steps:5.0f} {1e3 * pace[name]:8.1f} "
                f"{pace[name] / pace[names[0]]:6.2f}  {finals}"
            )
        lines += ["", "mean steps and seconds to a baseline's best final loss:"]
        for baseline in [n for n in ("SGD", "Adam", "SOAP") if n in names]:
            target = min(self.final(baseline))
            cells = [
                f"{n} {self.reach(n, target)[0]:.0f} / {self.reach(n, target)[1]:.1f} s"
                for n in names
            ]
            lines.append(f"  {baseline} {target:.1f}: " + ", ".join(cells))
        shared = min(len(r["losses"]) for n in names for r in self.runs[n])
        lines += ["", f"loss after {shared} steps (mean over seeds):"]
        lines += [
            f"  {n:10s} "
            f"{np.mean([smooth(r['losses'])[shared - 1] for r in self.runs[n]]):.1f}"
            for n in names
        ]
        return "\n".join(lines)

    def plot(self, path: Path) -> None:
        """Draw the loss over steps and over seconds."""
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
        longest = max(len(r["losses"]) for n, rs in self.runs.items() for r in rs)
        for name, runs in self.runs.items():
            for i, run in enumerate(runs):
                label = name if i == 0 else None
                style = {"color": COLOURS[name], "lw": 1.3, "alpha": 0.8}
                curve = smooth(run["losses"])
                axes[0].plot(np.arange(1, len(curve) + 1), curve, label=label, **style)
                axes[1].plot(run["seconds"], curve, **style)
        axes[0].set(xlabel="step", xscale="log", xlim=(10, longest))
        axes[1].set(xlabel="seconds of training")
        axes[0].set(ylabel="training loss per image", yscale="log", ylim=(50, 300))
        for axis in axes:
            axis.set_yticks([50, 70, 100, 140, 200, 300])
            axis.set_yticklabels(["50", "70", "100", "140", "200", "300"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0].legend(frameon=False)
        figure.suptitle(f"Deep auto-encoder, {self.args.data}, batch 200")
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def main() -> None:
    """Tune, measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--optimizers", nargs="+", default=list(GRID), choices=GRID)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--tune-seconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    study = Study(args)
    args.widths = args.widths or study.module.WIDTHS
    for name in args.optimizers:
        study.tune(name)
    for name in args.optimizers:
        study.measure(name)
    report = study.report()
    args.output.mkdir(parents=True, exist_ok=True)
    result = {
        "data": args.data,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tuning": study.tuning,
        "best": study.best,
        "runs": {
            name: [
                {
                    "losses": [round(v, 2) for v in smooth(run["losses"])[::10]],
                    "seconds": [round(v, 2) for v in run["seconds"][::10]],
                    "final": round(float(smooth(run["losses"])[-1]), 2),
                    "steps": len(run["losses"]),
                }
                for run in runs
            ]
            for name, runs in study.runs.items()
        },
    }
    (args.output / "autoencoder.json").write_text(json.dumps(result) + "\n")
    (args.output / "autoencoder.txt").write_text(report + "\n")
    study.plot(args.output / "autoencoder.png")
    print("", report, f"\nwrote {args.output}/autoencoder.{{json,txt,png}}", sep="\n")


if __name__ == "__main__":
    main()
