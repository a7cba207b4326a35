"""Tables and the figure of benchmarks/peers.py, from its runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import table

COLOURS = {
    "SGD": "0.65",
    "Adam": "tab:orange",
    "LBFGS": "tab:pink",
    "SOAP": "tab:green",
    "Shampoo": "tab:olive",
    "Muon": "tab:brown",
    "KFAC": "tab:purple",
    "EKFAC": "tab:blue",
    "EKFAC rank 32": "tab:red",
    "EKFAC per example": "tab:cyan",
}
OURS = ("KFAC", "EKFAC", "EKFAC rank 32", "EKFAC per example")
Run = Mapping[str, Any]


def smooth(losses: list[float], window: int = 20) -> np.ndarray:
    """Return running means of the losses."""
    # Not differences of sums: a run that explodes and comes back would lose all digits.
    ends = range(1, len(losses) + 1)
    return np.array([np.mean(losses[max(0, end - window) : end]) for end in ends])


def collect(runs: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Return the runs of every optimizer, one per seed."""
    found: dict[str, list[Run]] = {}
    for key, run in runs.items():
        kind, _, rest = key.partition("|")
        if kind == "run":
            found.setdefault(rest.split("|")[0], []).append(run)
    return found


def reach(runs: list[Run], target: float) -> tuple[float, float]:
    """Return mean steps and seconds to a loss; infinity if a seed never does."""
    steps, seconds = [], []
    for run in runs:
        below = np.flatnonzero(np.array(run["losses"]) <= target)
        steps.append(run["steps"][below[0]] if len(below) else np.inf)
        seconds.append(run["seconds"][below[0]] if len(below) else np.inf)
    return float(np.mean(steps)), float(np.mean(seconds))


def final_table(runs: Mapping[str, Any]) -> str:
    """Return settings, pace and final losses."""
    rows = []
    every = collect(runs)
    base = None
    for name, found in every.items():
        pace = float(np.mean([r["seconds"][-1] / r["steps"][-1] for r in found]))
        base = base or pace
        finals = [run["losses"][-1] for run in found]
        rows.append(
            {
                "optimizer": name,
                "setting": ", ".join(f"{v:g}" for v in runs[f"best|{name}"]),
                "steps": int(np.mean([run["steps"][-1] for run in found])),
                "ms/step": 1e3 * pace,
                "x first": pace / base,
                "final loss": float(np.mean(finals)),
                "of seeds": " ".join(f"{value:.4g}" for value in finals),
            }
        )
    return table(rows)


def target_table(runs: Mapping[str, Any]) -> str:
    """Return how soon each optimizer of ours is at the lowest loss of a peer's runs."""
    every = collect(runs)
    rows = []
    for peer in (name for name in every if name not in OURS):
        target = min(min(run["losses"]) for run in every[peer])
        row: dict[str, Any] = {"lowest loss of": peer, "loss": target}
        for name in (name for name in every if name in OURS or name == peer):
            label = "itself" if name == peer else name
            steps, seconds = reach(every[name], target)
            row[label] = f"{steps:.0f} / {seconds:.1f} s"
        rows.append(row)
    heads = list(dict.fromkeys(key for row in rows for key in row))
    return table([{key: row[key] for key in heads} for row in rows]) if rows else ""


def step_table(runs: Mapping[str, Any]) -> str:
    """Return mean losses at equal steps, as far as the slowest went."""
    every = collect(runs)
    rows = []
    limit = min(run["steps"][-1] for found in every.values() for run in found)
    marks = [mark for mark in (50, 100, 200, 400, 800) if mark < limit] + [limit]
    for name, found in every.items():
        row: dict[str, Any] = {"optimizer": name}
        for mark in marks:
            values = [np.interp(mark, run["steps"], run["losses"]) for run in found]
            row[f"step {mark}"] = float(np.mean(values))
        rows.append(row)
    return table(rows)


def draw(runs: Mapping[str, Any], path: Path) -> None:
    """Draw the loss over steps and over seconds, all seeds."""
    every = collect(runs)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    low, high = np.inf, 0.0
    for name, found in every.items():
        for number, run in enumerate(found):
            style = {"color": COLOURS[name], "lw": 1.3, "alpha": 0.85}
            style["ls"] = "-" if name in OURS else "--"
            label = None if number else name
            axes[0].plot(run["steps"], run["losses"], label=label, **style)
            axes[1].plot(run["seconds"], run["losses"], **style)
            low = min(low, *run["losses"])
            high = max(high, run["losses"][min(20, len(run["losses"]) - 1)])
    axes[0].set(xlabel="step", xscale="log", ylabel="training loss (mean of 20 steps)")
    axes[1].set(xlabel="seconds of training")
    floor = max(low, high * 1e-4)
    axes[0].set(yscale="log", ylim=(0.9 * floor, 1.1 * high), xlim=(10, None))
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False, fontsize=9)
    about = runs["about"]
    figure.suptitle(f"{about['problem']} ({about['data']})")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def finish(runs: Mapping[str, Any], path: Path) -> None:
    """Print the tables and write them, with the figure, beside the JSON."""
    about = ", ".join(f"{key} {value}" for key, value in runs["about"].items())
    text = "\n".join(
        [
            about,
            "",
            final_table(runs),
            "",
            "mean steps and seconds to the lowest loss that a peer's runs reach:",
            "",
            target_table(runs),
            "",
            "mean loss at equal steps:",
            "",
            step_table(runs),
        ]
    )
    path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    draw(runs, path.with_suffix(".png"))
    print(f"\n{text}\n\nresults: {path}\nfigure: {path.with_suffix('.png')}")
