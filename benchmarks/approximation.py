"""How good the structures of a Fisher matrix are, for each use of it.

    python benchmarks/approximation.py --data-dir data     # CIFAR-10 in data/*.npz
    python benchmarks/approximation.py --quick

The comparison of George 2023, section 3.4.1, Figures 3 to 6, on a small convolutional
network at several points of its training: diagonal, quasi-diagonal, K-FAC and EKFAC
(with all eigenvectors, and with 32 of every factor wider than 64) beside the whole
Fisher matrix, cross-layer blocks included, which is only multiplied with. All are exact
expectations over the labels, on the same examples, so nothing but the structure
differs. Random vectors are the same for every structure and intervals are at 95 %.
Damping is relative to the mean eigenvalue of the Fisher matrix. Without CIFAR-10 the
digits of scikit-learn take its place.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, example, parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import ApproximationQuality, approximation_quality

STRUCTURES = {
    "diagonal": "tab:gray",
    "quasi_diagonal": "tab:olive",
    "kfac": "tab:red",
    "ekfac": "tab:blue",
    "ekfac rank 32": "tab:cyan",
}
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SHOWN = (1e-2, 1.0)  # in the table
Found = dict[int, dict[str, ApproximationQuality]]


def network(width: int) -> nn.Sequential:
    """Return three convolutions and a linear layer for 32 x 32 images."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (width, 2 * width, 2 * width):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 10))


def measured(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], vectors: int
) -> dict[str, ApproximationQuality]:
    """Return the quality of every structure on the data."""
    F = ekfac.fisher(model, data, "implicit")
    trace = float(ekfac.fisher(model, data, "diagonal").trace())
    dampings = [factor * trace / F.size for factor in DAMPINGS]
    found = {}
    for structure in STRUCTURES:
        kind, _, rank = structure.partition(" rank ")
        found[structure] = approximation_quality(
            ekfac.fisher(model, data, kind, rank=int(rank) if rank else None),
            F,
            damping=dampings,
            num_vectors=vectors,
            trace=trace,
            generator=torch.Generator().manual_seed(0),
        )
    return found


def run(args: argparse.Namespace) -> tuple[str, list[float], Found]:
    """Train, and measure at several points of the training."""
    cifar: Any = example("cifar")
    torch.manual_seed(0)
    images = cifar.load(args.data_dir, download=False)
    model = network(args.width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batches = images.batches(100, torch.Generator().manual_seed(0))
    chosen = slice(0, args.examples)
    x, y = images.x_train[chosen], images.y_train[chosen]
    data = list(zip(x.split(100), y.split(100), strict=True))
    found: Found = {}
    losses = []
    for step in bar(range(max(args.points) + 1), "steps"):
        if step in args.points:
            start = time.perf_counter()
            found[step] = measured(model, data, args.vectors)
            with torch.no_grad():
                losses.append(float(cross_entropy(model(x), y)))
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {losses[-1]:.3f}, measured in {seconds:.0f} s")
        inputs, targets = next(batches)
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return images.name, losses, found


def rows_of(found: Found) -> list[dict[str, Any]]:
    """Return the table."""
    rows = []
    for step, qualities in found.items():
        for structure, quality in qualities.items():
            row: dict[str, Any] = {"structure": structure, "step": step}
            row["trace err."] = quality.trace_error
            row["v'Fv err."] = quality.quadratic_error.mean
            row["Fv residual"] = quality.product_residual.mean
            row["Fv cosine"] = quality.product_cosine.mean
            residuals = list(quality.solve_residual.values())
            cosines = list(quality.solve_cosine.values())
            for factor in SHOWN:
                index = DAMPINGS.index(factor)
                row[f"solve res. {factor:g}"] = residuals[index].mean
                row[f"cosine {factor:g}"] = cosines[index].mean
            rows.append(row)
    return rows


def figure_of(name: str, found: Found) -> Figure:
    """Return the figure: forward operations by step, solves by damping."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    steps = list(found)
    measures = {
        "trace: relative error": "trace_error",
        "quadratic form: relative error": "quadratic_error",
        "product: residual": "product_residual",
        "product: cosine": "product_cosine",
    }
    for axis, (title, attribute) in zip(axes.flat, measures.items(), strict=False):
        for structure, colour in STRUCTURES.items():
            values = [getattr(found[step][structure], attribute) for step in steps]
            # A trace that is exact to the last digit has no place on a log axis.
            means = [max(v, 1e-8) if isinstance(v, float) else v.mean for v in values]
            axis.plot(
                range(len(steps)), means, "o-", color=colour, label=structure, ms=4
            )
            if not isinstance(values[0], float):
                low, high = [v.low for v in values], [v.high for v in values]
                axis.fill_between(
                    range(len(steps)), low, high, color=colour, alpha=0.2, lw=0
                )
        axis.set(title=title, xlabel="training step")
        axis.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes[0, 0].set_yscale("log")
    last = found[steps[-1]]
    solves = {"solve: residual": "solve_residual", "solve: cosine": "solve_cosine"}
    for axis, (title, attribute) in zip(axes.flat[4:], solves.items(), strict=True):
        for structure, colour in STRUCTURES.items():
            values = list(getattr(last[structure], attribute).values())
            axis.plot(DAMPINGS, [v.mean for v in values], "o-", color=colour, ms=4)
            axis.fill_between(
                DAMPINGS,
                [v.low for v in values],
                [v.high for v in values],
                color=colour,
                alpha=0.2,
                lw=0,
            )
        axis.set(title=f"{title}, step {steps[-1]}", xscale="log")
        axis.set_xlabel("damping / mean eigenvalue")
    axes[1, 1].set_yscale("log")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f"Structures of the Fisher matrix beside the whole one, {name}")
    return figure


def main() -> None:
    """Run the comparison, print the table, save both."""
    arguments = parser(__doc__)
    arguments.add_argument("--points", type=int, nargs="+", default=[0, 50, 200, 1000])
    arguments.add_argument("--examples", type=int, default=500)
    arguments.add_argument("--vectors", type=int, default=30)
    arguments.add_argument("--width", type=int, default=12)
    args = arguments.parse_args()
    if args.quick:
        args.points, args.examples, args.vectors, args.width = [0, 20], 100, 8, 4
    name, losses, found = run(args)
    rows = rows_of(found)
    print(f"\n{name}, {args.examples} examples, {args.vectors} random vectors")
    print(table(rows))
    results = {
        "data": name,
        "losses": losses,
        "dampings": DAMPINGS,
        "found": {
            step: {structure: asdict(quality) for structure, quality in q.items()}
            for step, q in found.items()
        },
    }
    save(args.output, "approximation", results, figure_of(name, found))


if __name__ == "__main__":
    main()
