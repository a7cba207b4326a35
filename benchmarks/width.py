"""Cost of a step against width and depth, with the exponent of each.

    python benchmarks/width.py                    # minutes; widths 256 to 4096
    python benchmarks/width.py --quick

Fully connected networks of equal layers, ReLU, mean squared error, random data. Steps
of the optimizers take turns; the mean is over a whole basis interval after the first,
so that refreshes are amortised in. With a full basis a layer is turned at a cost of the
width's cube and decomposed at ten times that; widths above ``--full`` are left out
there. The exponent is the slope of the logarithm of the seconds between the two largest
widths, which is what a larger one would go on with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import parser, save, table
from torch import nn
from torch.nn.functional import mse_loss
from tqdm import tqdm

from ekfac import EKFAC

COLOURS = {"SGD": "0.5", "EKFAC": "tab:blue", "EKFAC rank 32": "tab:red"}


def stepper(name: str, width: int, depth: int, batch: int) -> Callable[[], float]:
    """Return a function that does one step and returns its seconds."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers)
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    else:
        rank = 32 if name == "EKFAC rank 32" else None
        options: dict[str, Any] = {"rank": rank, "max_dim": 2 * width}
        optimizer = EKFAC(model, lr=1e-6, **options)
    # Inputs of a spectrum like that of images: what is kept is not a matter of chance.
    scale = torch.arange(1, width + 1) ** -1.0
    turn = torch.randn(width, width) / width**0.5
    x, y = torch.randn(batch, width) * scale @ turn, torch.randn(batch, width)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def measure(names: list[str], width: int, depth: int, args: Any) -> dict[str, float]:
    """Return each optimizer's mean seconds per step."""
    steppers = {n: stepper(n, width, depth, args.batch) for n in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(args.warm + args.steps), desc=f"{width} x {depth}"):
        for name, step in steppers.items():
            taken = step()
            if i >= args.warm:
                seconds[name].append(taken)
    return {name: statistics.fmean(values) for name, values in seconds.items()}


def rows_of(found: dict[tuple[int, int], dict[str, float]]) -> list[dict[str, Any]]:
    """Return the table, a row for every network."""
    rows = []
    for (width, depth), seconds in found.items():
        row: dict[str, Any] = {"width": width, "depth": depth}
        for name in COLOURS:
            value = seconds.get(name)
            row[f"{name}, ms"] = None if value is None else 1e3 * value
            if name != "SGD":
                ratio = None if value is None else value / seconds["SGD"]
                row[f"{name}, x SGD"] = ratio
        rows.append(row)
    return rows


def exponents(found: dict[tuple[int, int], dict[str, float]], depth: int) -> list[Any]:
    """Return each optimizer's exponent in the width, at one depth."""
    rows = []
    for name in COLOURS:
        points = sorted(
            (w, s[name]) for (w, d), s in found.items() if d == depth and name in s
        )
        if len(points) < 2:
            continue
        w, s = np.log(np.array(points)).T
        rows.append(
            {
                "optimizer": name,
                "exponent, all widths": float(np.polyfit(w, s, 1)[0]),
                "exponent, last two": float((s[-1] - s[-2]) / (w[-1] - w[-2])),
                "largest width": points[-1][0],
            }
        )
    return rows


def draw(found: dict[tuple[int, int], dict[str, float]], args: Any) -> plt.Figure:
    """Draw seconds against width and against depth."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key, other in ((axes[0], 0, args.depth), (axes[1], 1, args.widths[0])):
        for name, colour in COLOURS.items():
            points = sorted(
                (size[key], s[name])
                for size, s in found.items()
                if size[1 - key] == other and name in s
            )
            if points:
                x, y = np.array(points).T
                axis.plot(x, 1e3 * y, "o-", color=colour, label=name)
        label = ("width", "depth")[key]
        fixed = ("depth", "width")[key]
        axis.set(xlabel=f"{label} (at {fixed} {other})", xscale="log", yscale="log")
        axis.set(ylabel="ms per step")
        sizes = sorted({size[key] for size in found if size[1 - key] == other})
        axis.minorticks_off()
        axis.set_xticks(sizes, map(str, sizes))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return figure


def main() -> None:
    """Measure, print, save."""
    arguments = parser(__doc__)
    widths = [256, 512, 1024, 2048, 4096]
    arguments.add_argument("--widths", type=int, nargs="+", default=widths)
    arguments.add_argument("--depths", type=int, nargs="+", default=[2, 4, 8, 16])
    arguments.add_argument("--depth", type=int, default=2, help="with all widths")
    arguments.add_argument("--full", type=int, default=1024, help="widest full basis")
    arguments.add_argument("--batch", type=int, default=200)
    arguments.add_argument("--warm", type=int, default=50)
    arguments.add_argument("--steps", type=int, default=50)
    args: argparse.Namespace = arguments.parse_args()
    if args.quick:
        args.widths, args.depths, args.warm, args.steps = [66, 80], [2, 3], 1, 1
    sizes = [(w, args.depth) for w in args.widths]
    sizes += [(args.widths[0], d) for d in args.depths if d != args.depth]
    found = {}
    for width, depth in sizes:
        names = [n for n in COLOURS if n != "EKFAC" or width <= args.full]
        found[width, depth] = measure(names, width, depth, args)
    rows, slopes = rows_of(found), exponents(found, args.depth)
    print("\n" + table(rows) + "\n\n" + table(slopes))
    results = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": args.batch,
        "rows": rows,
        "exponents": slopes,
    }
    save(args.output, "width", results, draw(found, args))


if __name__ == "__main__":
    main()
