"""Haink's two tasks: classes 0 to 4, then 5 to 9, one head; every penalty, constraint.

    python benchmarks/two_tasks.py                     # resumes where it stopped

The protocol of Haink 2023, section 7.7, on scikit-learn's digits, network
64-32-32-10, ReLU, plain SGD, batch 32:

- ``last layer``: the network is trained on all ten classes (60 epochs, rate 0.05), its
  last layer drawn anew and, alone, trained on task 1 and then on task 2.
- ``all layers``: the network is trained on task 1 from scratch, then on task 2.

Task 1 is trained for 40 epochs at rate 0.05 (all runs reach a training accuracy of 1),
task 2 for 20 epochs at rate 0.01 or 0.03, at which training without a penalty forgets
task 1. After every epoch the two test accuracies are summed; ``best`` is the largest
sum, as the thesis reports, ``final`` the last. Penalties take the proximal step
(``Penalty.proximal_``), stable at any strength. ``strength`` is 1 to 100,000 in
decades times the method's unit in ``METHODS``, twice Haink's ``lambda``; constraints
take 0.5 or 1. Rate and strength are chosen by the mean over seeds 10 and 11, for
``best`` and for ``final`` apart; the table is of seeds 0 to 4.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Store, bar, example, parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import ParameterVector
from ekfac.continual import (
    MemoryAwareSynapses,
    Penalty,
    QuadraticPenalty,
    SynapticIntelligence,
    UpdateConstraint,
)
from ekfac.matrices import DiagonalMatrix

SETTINGS = ("last layer", "all layers")
RATES, FACTORS, GAMMAS = (0.01, 0.03), (1.0, 10.0, 100.0, 1e3, 1e4, 1e5), (0.5, 1.0)
TUNING_SEEDS, SEEDS = (10, 11), (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Method:
    """A penalty or constraint.

    Attributes:
        name: In the table.
        kind: ``"none"``, ``"l2"``, ``"si"``, ``"mas"`` or a structure.
        unit: Of the strength, or 0 for a constraint.
        options: Of ``QuadraticPenalty``.
    """

    name: str
    kind: str
    unit: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def grid(self) -> list[tuple[float, float]]:
        """Return rates and strengths to choose from."""
        if self.kind == "none":
            return [(rate, 0.0) for rate in RATES]
        strengths = [self.unit * f for f in FACTORS] if self.unit else list(GAMMAS)
        return [(rate, strength) for rate in RATES for strength in strengths]


METHODS = (
    Method("none", "none"),
    Method("L2", "l2", 0.01),
    Method("EWC", "diagonal"),
    Method("SI", "si", 0.01),
    Method("MAS", "mas", 0.001),
    Method("KFAC", "kfac"),
    Method("EKFAC", "ekfac"),
    Method("Fisher blocks", "block_diagonal"),
    Method("Hessian, top 20 %", "hessian_top_k", 1.0, {"k": 0.2}),
    Method("singular, 5", "singular_directions", 0.01, {"k": 5}),
    Method("singular, beyond noise", "singular_directions", 0.01),
    Method("constraint: Hessian", "hessian_top_k", 0.0, {"k": 0.2}),
    Method("constraint: EKFAC", "ekfac", 0.0),
    Method("constraint: singular, 5", "singular_directions", 0.0, {"k": 5}),
)


@dataclass
class Start:
    """A network after task 1, and what comes next.

    Attributes:
        model: The network.
        tasks: Both.
        path: Synaptic intelligence that followed task 1.
        epochs: Of task 2.
        memories: Penalties with task 1 in them, by method.
    """

    model: nn.Sequential
    tasks: Sequence[Any]
    path: SynapticIntelligence
    epochs: int
    memories: dict[str, Penalty | None] = field(default_factory=dict)


def halves() -> tuple[Any, list[Any]]:
    """Return all digits, and those of the two tasks."""
    examples = example("continual")
    data = examples.digits()
    tasks = []
    for low, high in ((0, 5), (5, 10)):
        train = (data.y_train >= low) & (data.y_train < high)
        test = (data.y_test >= low) & (data.y_test < high)
        tasks.append(
            examples.Task(
                data.x_train[train],
                data.y_train[train],
                data.x_test[test],
                data.y_test[test],
            )
        )
    return data, tasks


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def fit(
    model: nn.Module,
    task: Any,
    rate: float,
    epochs: int,
    seed: int,
    path: SynapticIntelligence | None = None,
) -> None:
    """Train on one task without any penalty."""
    shuffle = torch.Generator().manual_seed(seed)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=rate)
    for _ in range(epochs):
        for x, y in task.batches(32, shuffle):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            if path is None:
                optimizer.step()
            else:
                with path.path():
                    optimizer.step()


def prepare(setting: str, seed: int, quick: bool) -> Start:
    """Return the network after task 1."""
    data, tasks = halves()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    if setting == "last layer":
        fit(model, data, 0.05, 2 if quick else 60, seed)
        model[4].reset_parameters()  # type: ignore[operator]
        model[:4].requires_grad_(False)
    path = SynapticIntelligence(model)
    fit(model, tasks[0], 0.05, 2 if quick else 40, seed + 1, path)
    if not quick:
        assert right(model, tasks[0].x_train, tasks[0].y_train) == 1
    return Start(model, tasks, path, 2 if quick else 20)


def memory_of(method: Method, model: nn.Module, start: Start) -> Penalty | None:
    """Return the penalty with task 1 in it."""
    task = start.tasks[0]
    data = [(task.x_train, task.y_train)]
    if method.kind == "none":
        return None
    if method.kind == "si":
        path = SynapticIntelligence(model)
        path.load_state_dict(start.path.state_dict())
        path.consolidate()
        return path
    if method.kind == "mas":
        sensitivity = MemoryAwareSynapses(model)
        sensitivity.consolidate(data)
        return sensitivity
    structure: Any = "diagonal" if method.kind == "l2" else method.kind
    penalty = QuadraticPenalty(model, structure, **method.options)
    if method.kind == "l2":
        ones = ParameterVector.from_model(model).map(torch.ones_like)
        penalty.consolidate(DiagonalMatrix(ones))
    else:
        penalty.consolidate(data)
    return penalty


def second(
    method: Method, rate: float, strength: float, start: Start, seed: int
) -> dict[str, Any]:
    """Return both test accuracies after every epoch of task 2."""
    model = start.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    if method.name not in start.memories:
        start.memories[method.name] = memory_of(method, model, start)
    memory = start.memories[method.name]
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=rate)
    if memory is not None and method.unit:
        memory.strength = strength
    elif memory is not None:
        UpdateConstraint(optimizer, memory, strength)
    shuffle = torch.Generator().manual_seed(seed + 2)
    curve = []
    for _ in range(start.epochs):
        for x, y in start.tasks[1].batches(32, shuffle):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            if memory is not None and method.unit:
                memory.proximal_(rate)
        curve.append([round(right(model, t.x_test, t.y_test), 4) for t in start.tasks])
    model.load_state_dict(before)
    return {"curve": curve}


def sums(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the best and the final sum of accuracies."""
    totals = [first + last for first, last in result["curve"]]
    return {"best": max(totals), "final": totals[-1]}


def evaluate(
    store: Store, setting: str, method: Method, quick: bool, starts: dict[Any, Start]
) -> dict[str, Any]:
    """Return one row of the table."""

    def result(rate: float, strength: float, seed: int) -> dict[str, Any]:
        key = f"{setting}: {method.name}, rate {rate}, strength {strength:g}, {seed=}"

        def compute() -> dict[str, Any]:
            if (setting, seed) not in starts:
                starts[setting, seed] = prepare(setting, seed, quick)
            return second(method, rate, strength, starts[setting, seed], seed)

        found: dict[str, Any] = store.get(key, compute)
        return found

    tuning, seeds = ((10,), (0,)) if quick else (TUNING_SEEDS, SEEDS)
    grid = method.grid()[:: 20 if quick else 1]
    row: dict[str, Any] = {"setting": setting, "method": method.name}
    for measure in ("best", "final"):
        chosen = max(
            grid,
            key=lambda c: np.mean([sums(result(*c, s))[measure] for s in tuning]),
        )
        found = [result(*chosen, seed) for seed in seeds]
        values = [sums(r)[measure] for r in found]
        error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        row |= {measure: float(np.mean(values)), f"{measure} +-": float(error)}
        row[f"rate, strength ({measure})"] = f"{chosen[0]:g}, {chosen[1]:g}"
        if measure == "final":
            row["task 1"] = float(np.mean([r["curve"][-1][0] for r in found]))
            row["task 2"] = float(np.mean([r["curve"][-1][1] for r in found]))
    return row


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw best and final sums."""
    figure, axes = plt.subplots(
        1, len(SETTINGS), figsize=(11, 4.8), sharey=True, layout="constrained"
    )
    for panel, setting in zip(axes, SETTINGS, strict=True):
        own = [row for row in rows if row["setting"] == setting][::-1]
        place = np.arange(len(own))
        for shift, measure, colour in ((0.2, "best", "0.7"), (-0.2, "final", "C0")):
            panel.barh(
                place + shift,
                [row[measure] for row in own],
                0.4,
                xerr=[row[f"{measure} +-"] for row in own],
                color=colour,
                label=measure,
            )
        panel.set(title=setting, xlabel="sum of the two test accuracies", xlim=(0.8, 2))
        panel.set_yticks(place, [row["method"] for row in own])
        panel.grid(alpha=0.3, axis="x")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2
    )
    return figure


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    return parser(__doc__).parse_args()


def main() -> None:
    """Compute what is missing, print the table, save results and figure."""
    args = parse()
    store = Store(args.output / "two_tasks_runs.json")
    methods: Sequence[Method] = METHODS[::5] if args.quick else METHODS
    starts: dict[Any, Start] = {}
    rows = [
        evaluate(store, setting, method, args.quick, starts)
        for setting in SETTINGS
        for method in bar(methods, "methods")
    ]
    print(f"\n{table(rows)}")
    save(args.output, "two_tasks", {"rows": rows}, draw(rows))


if __name__ == "__main__":
    main()
