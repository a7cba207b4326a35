"""Permuted MNIST in ten tasks, every penalty tuned; how tasks merge; fifty tasks.

    python benchmarks/continual.py --data-dir MNIST           # resumes where it stopped
    python benchmarks/continual.py --data-dir MNIST --tasks 50

Data: MNIST's idx files in ``--data-dir`` (with the t10k files alone 8,000 images to
train on, 2,000 to test on), 2 x 2 pixels averaged to 14 x 14 (``--pool 1`` keeps
28 x 28); without them scikit-learn's digits. A task is all images with the pixels in an
order of its own; one head for all tasks. The network of ``examples/continual.py`` has
two hidden layers of 100 ReLUs. Every task: 3 epochs, batch 128, Adam at 1e-3 or EKFAC
(``fisher="mc"``, all else default) at 1e-3, a fresh optimizer. Penalties are
consolidated on the first 1,000 images of a task (exact Fisher, absolute sensitivities),
from the path (SI), or from the optimizer.

Tuning: ``strength`` by the average accuracy after ten tasks on seed 100, over 1 and 10
times the method's own unit (``UNITS``), continued by factors of ten while the best is
at an end, then at half a decade to both sides of the best. The table is of seeds 0, 1
and 2, which have other permutations, weights and batches; a run that
diverges counts as all wrong. The second table is of the
merges of tasks at the strength of the default merge (``"nearest"``, whose matrix is too
large, at the best of 0.1, 0.316 and 1 times that on seed 100), with the Frobenius error
of one merged matrix against the sum of the ten, mean over layers.

``--tasks 50`` is a reduced form of Ritter et al. 2018, figure 1: 50 tasks of 2,000
images, 10 epochs each, at 0.316 times the strengths tuned on ten, one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Store, bar, example, has_mnist, parser, save, table
from continual_methods import MERGES, METHODS, UNITS, Method
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.continual import (
    Penalty,
    QuadraticPenalty,
    SynapticIntelligence,
    merge_error,
    merge_tasks,
)

TUNING_SEED = 100
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Setting:
    """The data and the length of training.

    Attributes:
        data: All images, unpermuted.
        tasks: How many.
        epochs: Of every task.
        seeds: Of the table.
        methods: Which ones.
        factors: On the methods' units, the strengths to begin with.
    """

    data: Any
    tasks: int
    epochs: int
    seeds: tuple[int, ...]
    methods: tuple[Method, ...] = METHODS
    factors: tuple[float, ...] = (1.0, 10.0)


def train(method: Method, strength: float, setting: Setting, seed: int) -> Any:
    """Return the accuracy matrix and the penalty of one sequence of tasks."""
    examples = example("continual")
    tasks = examples.permuted(setting.data, setting.tasks, seed)
    torch.manual_seed(seed)
    model = examples.Network(setting.data.x_train.shape[1])
    penalty = method.penalty(model, strength)
    shuffle = torch.Generator().manual_seed(seed)
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    for t, task in enumerate(tasks):
        optimizer: torch.optim.Optimizer
        if method.optimizer == "EKFAC":
            optimizer = EKFAC(model, lr=1e-3, fisher="mc")
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(setting.epochs):
            for x, y in task.batches(128, shuffle):
                step(model, optimizer, penalty, x, y)
        try:
            method.consolidate(penalty, task, optimizer)
        except ValueError as error:  # what training left is not finite
            print(f"         {error}", flush=True)
            return np.where(np.tri(len(tasks)) > 0, 0.0, np.nan), penalty
        if isinstance(optimizer, EKFAC):
            optimizer.close()
        seen = [examples.accuracy(model, earlier) for earlier in tasks[: t + 1]]
        matrix[t, : t + 1] = seen
    return matrix, penalty


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    penalty: Penalty | None,
    x: Tensor,
    y: Tensor,
) -> None:
    """Do one training step, none where the loss is not finite any more."""
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    if penalty is not None:
        loss = loss + penalty()
    if not bool(torch.isfinite(loss)):
        return
    loss.backward()
    if isinstance(penalty, SynapticIntelligence):
        with penalty.path():
            optimizer.step()
    else:
        optimizer.step()


def run(
    store: Store, method: Method, strength: float, setting: Setting, seed: int
) -> np.ndarray:
    """Return the accuracy matrix of a sequence, from the store if it is there."""
    options = "".join(f" {k}={v}" for k, v in method.options.items())
    key = (
        f"{setting.tasks} tasks: {method.name}{options} by {method.optimizer}, "
        f"strength {strength:.4g}, seed {seed}"
    )

    def compute() -> list[list[float | None]]:
        matrix = train(method, strength, setting, seed)[0]
        return [[None if np.isnan(a) else float(a) for a in row] for row in matrix]

    return np.array(store.get(key, compute), dtype=float)


def tune(store: Store, method: Method, setting: Setting) -> dict[float, float]:
    """Return the average accuracy on the tuning seed, by strength."""
    unit = UNITS[method.kind]
    scores: dict[float, float] = {}

    def add(strength: float) -> None:
        strength = float(f"{strength:.3g}")
        if strength not in scores:
            scores[strength] = score(store, method, setting, strength)

    for factor in setting.factors:
        add(unit * factor)
    if len(setting.factors) < 2:
        return scores
    for _ in range(4):
        best = max(scores, key=lambda s: scores[s])
        if best in (min(scores), max(scores)):
            add(best / 10 if best == min(scores) else best * 10)
    best = max(scores, key=lambda s: scores[s])
    add(best / 10**0.5)
    add(best * 10**0.5)
    return scores


def summary(matrices: Sequence[np.ndarray]) -> dict[str, float]:
    """Return means and standard errors over seeds."""
    examples = example("continual")
    averages = [examples.average(m) for m in matrices]
    drops = [examples.forgetting(m) for m in matrices]
    root = max(1, len(matrices)) ** 0.5
    spread = float(np.std(averages, ddof=1)) if len(averages) > 1 else 0.0
    return {
        "average accuracy": float(np.mean(averages)),
        "+-": spread / root,
        "forgetting": float(np.mean(drops)),
        "last task": float(np.mean([m[-1, -1] for m in matrices])),
    }


def compare(store: Store, setting: Setting) -> list[dict[str, Any]]:
    """Return the table of all methods, each tuned."""
    rows = []
    for method in bar(setting.methods, "methods"):
        strength, grid = 0.0, {}
        if method.kind != "none":
            grid = tune(store, method, setting)
            strength = max(grid, key=lambda s: grid[s])
        found = [run(store, method, strength, setting, s) for s in setting.seeds]
        rows.append(
            {"method": method.name, "optimizer": method.optimizer}
            | {"strength": strength, **summary(found)}
            | {"grid": grid, "curve": [float(v) for v in curve(found)]}
        )
    return rows


def curve(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean accuracy on the tasks so far, after every task."""
    curves = [np.nanmean(m, axis=1) for m in matrices]
    mean: np.ndarray = np.mean(curves, axis=0)
    return mean


def score(store: Store, method: Method, setting: Setting, strength: float) -> float:
    """Return the average accuracy on the tuning seed."""
    matrix = run(store, method, strength, setting, TUNING_SEED)
    return float(example("continual").average(matrix))


def merging(
    store: Store, setting: Setting, strengths: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the table of merges: error against the sum, and what it costs."""
    rows = []
    for kind, names in MERGES.items():
        label = kind.upper()
        exact = Method(label, kind, options={"merge": "exact"})
        errors = store.get(
            f"{setting.tasks} tasks: Frobenius errors of merged {label}",
            lambda exact=exact, kind=kind: frobenius(
                train(exact, strengths[kind], setting, 0)[1], MERGES[kind][1:]
            ),
        )
        variants: list[tuple[str, dict[str, Any]]] = [
            (name, {"merge": name}) for name in names
        ]
        variants.append(("separate", {"mode": "separate"}))
        for name, options in bar(variants, "merging"):
            method = Method(label, kind, options=options)
            factors = (0.1, 0.316, 1.0) if name == "nearest" else (1.0,)
            tried = [float(f"{strengths[kind] * f:.3g}") for f in factors]
            best = max(tried, key=partial(score, store, method, setting))
            found = [run(store, method, best, setting, s) for s in setting.seeds]
            rows.append(
                {"structure": label, "merge": name, "strength": best}
                | {"error": errors.get(name, 0.0), **summary(found)}
            )
    return rows


def frobenius(penalty: QuadraticPenalty, names: Sequence[str]) -> dict[str, float]:
    """Return the mean over layers of every merge's relative error.

    Tasks are merged one by one, as the penalty does.
    """
    (term,) = penalty.tasks
    errors: dict[str, float] = {}
    for name in bar(names, "methods"):
        found = []
        for matrices in term.blocks.values():
            total = matrices[0]
            for count, matrix in enumerate(matrices[1:], 1):
                weights = (float(count), 1.0)
                total = merge_tasks([total, matrix], name, weights=weights)  # type: ignore[arg-type]
            found.append(merge_error(matrices, total))
        errors[name] = float(np.mean(found))
    return errors


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the mean accuracy over tasks, and accuracy against forgetting."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    seen = {"Adam": 0, "EKFAC": 0}
    for row in rows:
        style = "-" if row["optimizer"] == "Adam" else "--"
        name = f"{row['method']} ({row['optimizer']}, {row['strength']:.3g})"
        colour = plt.get_cmap("tab10")(seen[row["optimizer"]])
        seen[row["optimizer"]] += 1
        tasks = range(1, len(row["curve"]) + 1)
        axes[0].plot(tasks, row["curve"], style, color=colour, label=name)
        marker = "o" if row["optimizer"] == "Adam" else "s"
        axes[1].plot(
            row["forgetting"], row["average accuracy"], marker, color=colour, ms=8
        )
    axes[0].set(xlabel="tasks learned", ylabel="mean accuracy on them", title=title)
    axes[1].set_xscale("symlog", linthresh=0.01)
    ticks = [0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    axes[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[1].set(xlabel="forgetting", ylabel="average accuracy after the last task")
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    return figure


def fifty(
    store: Store, setting: Setting, strengths: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the table of many tasks, at strengths below those tuned on ten."""
    rows = []
    for method in METHODS[:7]:
        if method.kind in ("none", "diagonal", "kfac"):
            strength = 0.316 * strengths.get(method.kind, 0.0)
            found = [run(store, method, strength, setting, 0)]
            rows.append(
                {"method": method.name, "optimizer": method.optimizer}
                | {"strength": strength, **summary(found)}
                | {"curve": [float(v) for v in curve(found)]}
            )
    return rows


def first(data: Any, count: int) -> Any:
    """Return the data with the first ``count`` images to train on."""
    train = data.x_train[:count], data.y_train[:count]
    return example("continual").Task(*train, data.x_test, data.y_test)


def shown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table without what is only drawn."""
    hidden = ("grid", "curve")
    return table([{k: v for k, v in r.items() if k not in hidden} for r in rows])


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    result = parser(__doc__)
    result.add_argument("--pool", type=int, default=2, help="pixels averaged, a side")
    result.add_argument("--tasks", type=int, default=10)
    return result.parse_args()


def main() -> None:
    """Compute what is missing, print the tables, save results and figure."""
    args, examples = parse(), example("continual")
    real = has_mnist(args.data_dir) and not args.quick
    data = examples.mnist(args.data_dir, args.pool) if real else examples.digits()
    ten = Setting(data, 10, 3, SEEDS)
    if args.quick:
        data = first(data, 200)
        ten = Setting(data, 2, 1, (0,), METHODS[::4], (1.0,))
    store = Store(args.output / "continual_runs.json")
    strengths = {"diagonal": 100.0, "kfac": 1.0, "ekfac": 1.0}
    rows = compare(store, ten)
    for row, method in zip(rows, ten.methods, strict=True):
        if method.optimizer == "Adam":
            strengths[method.kind] = row["strength"]
    source = "permuted MNIST" if real else "permuted digits"
    print(f"\n{shown(rows)}")
    results: dict[str, Any] = {"seeds": list(ten.seeds), "methods": rows}
    results["merging"] = merging(store, ten, strengths)
    print(f"\n{shown(results['merging'])}")
    save(args.output, "continual", results, draw(rows, source))
    if args.tasks != 10:
        many = Setting(first(data, 2000), args.tasks, 10, (0,))
        rows = fifty(store, many, strengths)
        print(f"\n{shown(rows)}")
        results = {"tasks": args.tasks, "methods": rows}
        save(args.output, "continual_fifty", results, draw(rows, source))


if __name__ == "__main__":
    main()
