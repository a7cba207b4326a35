"""Chapters 3 and 4 of George 2023 at a size of seconds: matrices, bases, training.

    python benchmarks/george2023_factors.py --data-dir MNIST     # three seeds
    python benchmarks/george2023_factors.py --parts drift
    python benchmarks/george2023_factors.py --parts training --methods SGD "K-FAC, 50"
    python benchmarks/george2023_factors.py --quick

``representations`` (Figures 3.3 to 3.6): a 64-20-20-10 ReLU network on scikit-learn's
digits after ten epochs; the Fisher matrix of five drawn labels an example in several
structures beside the whole one, all of the same draws. ``drift`` (Figures 4.2, right,
and 4.4c): a network of four sigmoid layers trained by SGD while factors and basis of
one layer, of the batch of the moment, are taken every 100 steps or once, and scalings
at every step; distances to the exact empirical Fisher block of 1,000 images at the
steps between. ``training`` (Figures 4.3 and 4.4): the auto-encoder 196-100-50-20-50-
100-196, 300 steps of batch 200, algorithm 1 to the letter (natural direction, no
momentum, factors of the last batch, constant damping): the final training loss by
optimizer and interval of the bases, learning rate and damping the best of a grid with
the first seed. Without MNIST the last two are on the digits. What is not asked for
stays in the record as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from amortisation import FixedBasis, images
from common import (
    bar,
    digits,
    earlier,
    example,
    parser,
    print_seconds,
    save,
    set_schedule,
    spread,
    table,
)
from george2023_parts import load
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.curvature.options import Schedule
from ekfac.diagnostics import approximation_quality, basis_quality

STRUCTURES = ("diagonal", "quasi_diagonal", "kfac", "ekfac")
EVERY = 100  # steps between refreshes of the drift
# Without averages over batches, as algorithm 1: all of the batch of the moment.
TEXTBOOK: dict[str, Any] = {
    "direction": "natural",
    "momentum": 0.0,
    "nesterov": False,
    "grafting": None,
    "damping_mode": "absolute",
    "factor_decay": 0.0,
    "factor_interval": 1,
    "max_aspect": float("inf"),
    "basis_tolerance": 0.0,
}
GRID = (
    (0.01, 1e-5),
    (0.01, 1e-4),
    (0.01, 1e-2),
    (0.03, 1e-3),
    (0.03, 0.1),
    (0.1, 1e-3),
    (0.1, 1e-2),
    (0.1, 0.1),
    (0.3, 1e-2),
    (0.3, 1.0),
    (1.0, 0.1),
    (1.0, 1.0),
    (10.0, 10.0),
)
DIVERGED = "diverged"
METHOD = "optimizer, interval"
RATES = {"SGD": (0.01, 0.03, 0.1, 0.3, 1.0), "Adam": (0.003, 0.01, 0.03, 0.1)}
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Periodic(Schedule):
    """All layers refresh together, at the first step and every interval after it."""

    def basis_due(self, step: int, index: int, layers: int) -> bool:
        """Return whether it is the first step or an interval after it."""
        return step % self.basis == 1 or self.basis == 1


def layered(*widths: int, activation: type[nn.Module] = nn.Sigmoid) -> nn.Sequential:
    """Return linear layers with an activation between them, Xavier's weights."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        linear = nn.Linear(d_in, d_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


# -- chapter 3: representations --------------------------------------------------------


def representations(args: argparse.Namespace) -> tuple[Rows, Any]:
    """Return how each structure does in each operation, and all numbers."""
    data, runs = digits(), []
    x, y = data.x_train.flatten(1), data.y_train
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = layered(64, 20, 20, 10, activation=nn.ReLU)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(1 if args.quick else 10):
            for chosen in torch.randperm(len(x)).split(100):
                optimizer.zero_grad()
                cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
        drawn = functools.partial(
            ekfac.fisher, model, [(x[:500], None)], kind="mc", samples=5
        )
        F = drawn("dense", generator=torch.Generator().manual_seed(seed))
        dampings = [0.1 * float(F.trace()) / F.size, 0.1]
        run = {}
        for structure in STRUCTURES:
            quality = approximation_quality(
                drawn(structure, generator=torch.Generator().manual_seed(seed)),
                F,
                damping=dampings,
                num_vectors=8 if args.quick else 100,
                generator=torch.Generator().manual_seed(0),
            )
            cosines = [cosine.mean for cosine in quality.solve_cosine.values()]
            run[structure] = {
                "trace": quality.trace_error,
                "v'Fv": quality.quadratic_error.mean,
                "Fv, cosine": quality.product_cosine.mean,
                "solve, cosine, mean / 10": cosines[0],
                "solve, cosine, 0.1": cosines[1],
            }
        runs.append(run)
    rows = []
    for structure in STRUCTURES:
        row = {"structure": structure}
        for name in runs[0][structure]:
            row[name] = spread([run[structure][name] for run in runs])
        rows.append(row)
    return rows, runs


# -- chapter 4: drift ------------------------------------------------------------------


def drifting(seed: int, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return a layer's quality between refreshes, by schedule."""
    data = load(args.data_dir)
    x, y = data.subset(len(data.x), seed)
    torch.manual_seed(seed)
    model = layered(x.shape[1], 20, 15, 15, 15, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps, size, often = (8, 60, 3) if args.quick else (6 * EVERY, 1000, 20)
    fixed = x[:size], y[:size]
    watchers = {}
    for name, kind in (("refreshed", Periodic), ("kept", FixedBasis)):
        options = TEXTBOOK | {"scaling": "per_example", "scaling_decay": 0.0}
        watcher = ekfac.EKFAC(model, lr=0.0, basis_interval=EVERY, **options)
        set_schedule(watcher, kind(1, EVERY, 1))
        watchers[name] = watcher
    found: dict[str, list[dict[str, float]]] = {name: [] for name in watchers}
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(x), (200,), generator=generator)
        model.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        for watcher in watchers.values():
            watcher.step()
        if step % often == 0:  # of the weights that the step's statistics belong to
            names = watchers["kept"].curvature["2"].parameter_names
            with contextlib.ExitStack() as stack:
                for watcher in watchers.values():
                    stack.enter_context(watcher.capture.paused())
                block = ekfac.fisher(
                    model, [fixed], "dense", "empirical", parameters=names
                ).to_dense()
            for name, watcher in watchers.items():
                quality = basis_quality(watcher.curvature["2"], block)
                found[name].append({"step": step, **vars(quality)})
        optimizer.step()
    for watcher in watchers.values():
        watcher.close()
    return found


def drift(args: argparse.Namespace) -> tuple[Rows, Any]:
    """Return EKFAC's distances over K-FAC's between refreshes, and all numbers."""
    runs = [drifting(seed, args) for seed in args.seeds]
    rows = []
    for name in runs[0]:
        row = {"basis": name}
        for kind in ("error", "spectrum"):
            pairs = [
                [(look[f"ekfac_{kind}"], look[f"kfac_{kind}"]) for look in run[name]]
                for run in runs
            ]
            ratios = [sum(a / b for a, b in run) / len(run) for run in pairs]
            nearer = [sum(a < b for a, b in run) / len(run) for run in pairs]
            row[f"{kind}, EKFAC / K-FAC"] = spread(ratios)
            row[f"{kind}, EKFAC nearer"] = spread(nearer)
            for end, label in ((0, "EKFAC"), (1, "K-FAC")):
                row[f"{kind} at the end, {label}"] = spread(
                    [run[-1][end] for run in pairs]
                )
        rows.append(row)
    shown = [
        {"distance": key} | {row["basis"]: row[key] for row in rows}
        for key in rows[0]
        if key != "basis"
    ]
    for key in ("correlation", "basis_correlation"):
        line = {"distance": f"{key}, mean over the run"}
        for name in runs[0]:
            means = [sum(look[key] for look in r[name]) / len(r[name]) for r in runs]
            line[name] = spread(means)
        shown.append(line)
    return shown, runs


# -- chapter 4: training ---------------------------------------------------------------

EKFAC_RA = {"scaling": "running_average", "scaling_decay": 0.9}
ALGORITHM = {"scaling": "per_example", "scaling_decay": 0.0}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "EKFAC, 50": (ekfac.EKFAC, TEXTBOOK | ALGORITHM | {"basis_interval": 50}),
    "EKFAC, 50, damping A.4": (
        ekfac.EKFAC,
        TEXTBOOK | ALGORITHM | {"basis_interval": 50, "damping_split": "factored"},
    ),
    "EKFAC-ra, 50": (ekfac.EKFAC, TEXTBOOK | EKFAC_RA | {"basis_interval": 50}),
    "K-FAC, 50": (
        ekfac.KFAC,
        TEXTBOOK | {"basis_interval": 50, "damping_split": "factored"},
    ),
    "K-FAC, 1": (
        ekfac.KFAC,
        TEXTBOOK | {"basis_interval": 1, "damping_split": "factored"},
    ),
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
}


def settings(method: str) -> list[dict[str, float]]:
    """Return the grid of a method."""
    if method in RATES:
        return [{"lr": lr} for lr in RATES[method]]
    return [{"lr": lr, "damping": damping} for lr, damping in GRID]


def trained(
    method: str, setting: dict[str, float], seed: int, x: Tensor, steps: int
) -> float:
    """Return the loss over all images after the last step, or infinity."""
    module, (kind, options) = example("autoencoder"), METHODS[method]
    torch.manual_seed(seed)
    model = module.network(x.shape[1], (100, 50, 20, 50, 100))
    batches = module.batches(x, torch.Generator().manual_seed(seed))
    if method in RATES:
        optimizer = kind(model.parameters(), **options, **setting)
    else:
        optimizer = kind(model, **options, **setting)
        set_schedule(optimizer, Periodic(1, options["basis_interval"], 1))
    for batch in itertools.islice(batches, steps):
        optimizer.zero_grad()
        loss = module.reconstruction_loss(model, batch)
        if not loss < 1e4:
            return float("inf")
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = float(module.reconstruction_loss(model, x))
    return found if found < 1e4 else float("inf")


def noted(losses: list[float]) -> list[float | str]:
    """Return losses as a record has them: infinity is not JSON."""
    return [loss if loss < math.inf else DIVERGED for loss in losses]


def training(args: argparse.Namespace) -> tuple[Rows, Any]:
    """Return the final losses by method, and all numbers."""
    name, x = images(args)
    first, *others = args.seeds
    rows, runs = [], {"data": name}
    for method in args.methods:
        grid = settings(method)[:2] if args.quick else settings(method)
        steps = 4 if args.quick else 300
        tried = [trained(method, setting, first, x, steps) for setting in grid]
        best = grid[tried.index(min(tried))]
        losses = [min(tried)]
        losses += [trained(method, best, seed, x, steps) for seed in others]
        runs[method] = {"grid": grid, "tried": noted(tried), "losses": noted(losses)}
        chosen = ", ".join(f"{key} {value:g}" for key, value in best.items())
        row = {METHOD: method, "best": chosen}
        row["loss"] = spread(losses) if max(losses) < math.inf else DIVERGED
        row["by seed"] = ", ".join(f"{loss:.1f}" for loss in losses)
        rows.append(row)
        print(" ".join(row.values()), flush=True)
    return rows, runs


LABELS = {"kfac": "K-FAC", "ekfac": "EKFAC"}
PARTS = {
    "representations": representations,
    "drift": drift,
    "training": training,
}


def figure_of(runs: dict[str, Any]) -> Figure:
    """Return errors and distances of spectra by step, and losses by optimizer."""
    trained = {k: v for k, v in runs.get("training", {}).items() if k != "data"}
    columns = 3 if trained else 2
    figure, axes = plt.subplots(
        2, columns, figsize=(5 * columns, 7), layout="constrained"
    )
    for number, run in enumerate(runs.get("drift", [])):
        for column, (schedule, looks) in enumerate(run.items()):
            for line, kind in enumerate(("error", "spectrum")):
                ax = axes[line, column]
                for name, colour in (("kfac", "tab:red"), ("ekfac", "tab:blue")):
                    ax.plot(
                        [look["step"] for look in looks],
                        [look[f"{name}_{kind}"] for look in looks],
                        color=colour,
                        label=LABELS[name] if number == 0 else None,
                    )
                ax.set(title=f"basis {schedule}", xlabel="step", yscale="log")
                ax.set_ylabel(f"distance of the {'matrix' if line == 0 else kind}")
                ax.legend()
    if not trained:
        return figure
    for place, found in enumerate(trained.values()):
        for ax, key, style in ((axes[0, 2], "losses", "o"), (axes[1, 2], "tried", "x")):
            values = [loss for loss in found[key] if loss != DIVERGED]
            ax.plot(values, [place] * len(values), style, color="tab:blue")
    for ax, title in ((axes[0, 2], "at the best setting"), (axes[1, 2], "whole grid")):
        ax.set_yticks(range(len(trained)), list(trained))
        ax.invert_yaxis()
        ax.set(xlabel="loss after 300 steps", title=title)
    axes[1, 2].set_xscale("log")
    return figure


def main() -> None:
    """Run the parts; print the tables and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    names = [*METHODS]
    arguments.add_argument("--methods", nargs="+", choices=names, default=names)
    args = arguments.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]
    torch.set_num_threads(1)
    saved = {"rows": {}, "runs": {}} | earlier(args.output, "george2023_factors")
    for part in bar(args.parts, "parts"):
        rows, runs = PARTS[part](args)
        print(f"\n{part}\n{table(rows)}", flush=True)
        if part == "training" and part in saved["rows"]:
            # Methods that were not asked for.
            kept = {row[METHOD]: row for row in [*saved["rows"][part], *rows]}
            rows, runs = [*kept.values()], saved["runs"][part] | runs
        saved["rows"][part], saved["runs"][part] = rows, runs
    print_seconds()
    figure = figure_of(saved["runs"])
    save(args.output, "george2023_factors", saved, figure)


if __name__ == "__main__":
    main()
