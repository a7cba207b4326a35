"""What a penalty costs per step, and what consolidating a task costs.

    python benchmarks/continual_cost.py

Networks of two hidden layers of ``width`` on images of 28 x 28 random pixels, ten
classes, batch 128, Adam, one thread. ``step`` is the median time of a training step
(forward, backward, update) with the penalty of two consolidated tasks in the loss,
``five`` with five tasks, ``ratio`` that of ``step`` to a plain step, measured in turn
with it. ``consolidate`` takes 1,000 images, exact Fisher unless it says otherwise, or
the factors of an EKFAC optimizer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import bar, example, parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.continual import (
    MemoryAwareSynapses,
    Penalty,
    QuadraticPenalty,
    SynapticIntelligence,
)

MAKE: dict[str, Callable[[nn.Module], Penalty]] = {
    "EWC": lambda m: QuadraticPenalty(m, "diagonal"),
    "SI": lambda m: SynapticIntelligence(m),
    "MAS": lambda m: MemoryAwareSynapses(m),
    "KFAC": lambda m: QuadraticPenalty(m, "kfac"),
    "EKFAC": lambda m: QuadraticPenalty(m, "ekfac"),
    "KFAC, exact sum": lambda m: QuadraticPenalty(m, "kfac", merge="exact"),
    "KFAC, separate": lambda m: QuadraticPenalty(m, "kfac", mode="separate"),
    "EKFAC, separate": lambda m: QuadraticPenalty(m, "ekfac", mode="separate"),
}


def timed(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of functions that are called in turn."""
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number >= 2:  # the first calls allocate
                spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(times)) for name, times in spent.items()}


class Loop:
    """One network with its data, and steps of every kind on it.

    Args:
        width: Of the hidden layers.
        examples: To consolidate on.
    """

    def __init__(self, width: int, examples: int) -> None:
        torch.manual_seed(0)
        self.model = example("continual").Network(784, width=width)
        self.x = torch.randn(examples, 784)
        self.y = torch.randint(10, (examples,))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Return the batches to consolidate on."""
        return list(zip(self.x.split(500), self.y.split(500), strict=True))

    def step(self, penalty: Penalty | None = None) -> None:
        """Do one step."""
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(self.x[:128]), self.y[:128])
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        if isinstance(penalty, SynapticIntelligence):
            with penalty.path():
                self.optimizer.step()
        else:
            self.optimizer.step()

    def consolidate(self, penalty: Penalty) -> None:
        """Add a task."""
        if isinstance(penalty, SynapticIntelligence):
            with penalty.path():
                self.optimizer.step()
            penalty.consolidate()
        elif isinstance(penalty, (QuadraticPenalty, MemoryAwareSynapses)):
            penalty.consolidate(self.data())


def steps(
    loop: Loop, width: int, repeats: int, names: list[str]
) -> list[dict[str, Any]]:
    """Return the cost of a step with every penalty."""
    rows: list[dict[str, Any]] = []
    loop.step()
    for name in names:
        penalty = MAKE[name](loop.model)
        row: dict[str, Any] = {"width": width, "penalty": name}
        for tasks in (2, 5):
            while penalty.num_tasks < tasks:
                loop.consolidate(penalty)

            def with_penalty(penalty: Penalty = penalty) -> None:
                loop.step(penalty)

            found = timed({"plain": loop.step, "with": with_penalty}, repeats)
            if tasks == 2:
                row |= {"plain ms": found["plain"], "step ms": found["with"]}
                row["ratio"] = found["with"] / found["plain"]
            else:
                row |= {"five ms": found["with"]}
                row["five ratio"] = found["with"] / found["plain"]
        rows.append(row)
    return rows


def consolidations(loop: Loop, width: int, repeats: int) -> list[dict[str, Any]]:
    """Return the cost of consolidating, in steps as well."""
    model = loop.model
    optimizer = EKFAC(model, lr=1e-3, fisher="mc")
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(loop.x[:128]), loop.y[:128]).backward()
        optimizer.step()
    data = loop.data()

    def from_loader(structure: Any, kind: Any) -> None:
        QuadraticPenalty(model, structure).consolidate(data, kind=kind)

    def from_optimizer(structure: Any, scalings: Any) -> None:
        QuadraticPenalty(model, structure).consolidate(
            optimizer.curvature, scalings=scalings
        )

    cases: dict[str, Callable[[], None]] = {
        "EWC, loader": lambda: from_loader("diagonal", "exact"),
        "EWC, loader, mc": lambda: from_loader("diagonal", "mc"),
        "MAS, loader": lambda: MemoryAwareSynapses(model).consolidate(data),
        "KFAC, loader": lambda: from_loader("kfac", "exact"),
        "KFAC, loader, mc": lambda: from_loader("kfac", "mc"),
        "EKFAC, loader": lambda: from_loader("ekfac", "exact"),
        "EKFAC, loader, mc": lambda: from_loader("ekfac", "mc"),
        "KFAC, optimizer": lambda: from_optimizer("kfac", "live"),
        "EKFAC, optimizer, live": lambda: from_optimizer("ekfac", "live"),
        "EKFAC, optimizer, kronecker": lambda: from_optimizer("ekfac", "kronecker"),
        "EKFAC, optimizer, re-estimated": lambda: from_optimizer("ekfac", data),
    }
    plain = timed({"plain": loop.step}, 5 * repeats)["plain"]
    found = timed(cases, repeats)
    optimizer.close()
    return [
        {"width": width, "consolidate": name, "ms": ms, "plain steps": ms / plain}
        for name, ms in found.items()
    ]


def draw(rows: list[dict[str, Any]], widths: tuple[int, ...]) -> Figure:
    """Draw the ratio to a plain step."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    names = list(dict.fromkeys(row["penalty"] for row in rows))
    for i, width in enumerate(widths):
        own = [row for row in rows if row["width"] == width]
        place = np.arange(len(names)) + 0.2 * (2 * i - 1)
        for key, shade in (("five ratio", 0.4), ("ratio", 1.0)):
            label = f"width {width}, {'two' if key == 'ratio' else 'five'} tasks"
            values = [row[key] for row in own]
            axes.bar(place, values, 0.38, color=f"C{i}", alpha=shade, label=label)
    axes.axhline(1, color="0.3", lw=0.8)
    axes.set_xticks(np.arange(len(names)), names, rotation=25, ha="right")
    axes.set(ylabel="time of a step over a plain step")
    axes.legend()
    axes.grid(alpha=0.3, axis="y")
    return figure


def main() -> None:
    """Measure, print the tables, save results and figure."""
    args: argparse.Namespace = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    widths = (16, 32) if args.quick else (100, 400)
    examples, repeats = (40, 2) if args.quick else (1000, 30)
    names = list(MAKE)[:: 3 if args.quick else 1]
    stepped, consolidated = [], []
    for width in bar(widths, "widths"):
        loop = Loop(width, examples)
        stepped += steps(loop, width, repeats, names)
        consolidated += consolidations(loop, width, 1 if args.quick else 3)
    print(f"\n{table(stepped)}\n\n{table(consolidated)}")
    results = {"steps": stepped, "consolidate": consolidated}
    save(args.output, "continual_cost", results, draw(stepped, widths))


if __name__ == "__main__":
    main()
