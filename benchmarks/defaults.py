"""No argument but ``lr``: EKFAC and KFAC with their defaults over learning rates.

    python benchmarks/defaults.py --data-dir FOLDER     # with a cifar10*.npz in it

Problems, with the networks and the data of the examples:

- ``digits``: two convolutions and two linear layers on scikit-learn's digits, batch
  128, 150 steps.
- ``cifar``: VGG11 without batch norm of ``cifar.py``, 8 channels in its first layer (64
  are the published network), batch 64, 200 steps; without CIFAR-10 in ``--data-dir``,
  digits enlarged to 32 x 32.
- ``transformer``: the character transformer of ``transformer.py``, 16 windows of 64
  characters, 150 steps.

Grid: ``lr`` in 3e-4, 1e-3, 3e-3, 1e-2, constant over the run, the same weights and
batches (seed 0) for all. ``final`` is the mean loss of the last 20 steps, ``worst`` the
largest loss after the first 20, over the loss at the first step. A run ``diverged`` if
a loss was not finite, if ``final`` is above the loss at the first step, or if ``worst``
is above 2. ``constant`` is the loss of the best prediction that ignores the input (the
entropy of the targets); a run ``learns`` if ``final`` is below it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import digits, example, parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC, KFAC

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "EKFAC": lambda model, lr: EKFAC(model, lr=lr),
    "KFAC": lambda model, lr: KFAC(model, lr=lr),
}
WARM_UP = 20
WINDOW = 20
SMOOTH = 10  # steps over which the drawn losses are averaged
SEED = 0

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A network, its batches and the entropy of its targets."""

    network: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Batches]
    constant: float
    steps: int


def entropy(targets: Tensor) -> float:
    """Return the entropy of class frequencies."""
    counts = np.array([*Counter(targets.tolist()).values()])
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def convolutions() -> nn.Module:
    """Return two convolutions and two linear layers for images of 8 x 8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def small_convolutions(args: argparse.Namespace) -> Problem:
    """Return a small convolutional network on digits."""
    data = digits()

    def batches(generator: torch.Generator) -> Batches:
        while True:
            yield from data.batches(128, generator)

    return Problem(convolutions, batches, entropy(data.y_train), 150)


def cifar(args: argparse.Namespace) -> Problem:
    """Return a narrow VGG11 on CIFAR-10."""
    module = example("cifar")
    data = module.load(args.data_dir, False)
    size = 16 if args.quick else 64
    return Problem(
        lambda: module.vgg11(8),
        lambda generator: data.batches(size, generator),
        entropy(data.y_train),
        200,
    )


def transformer(args: argparse.Namespace) -> Problem:
    """Return the character transformer."""
    module = example("transformer")
    text, length = module.Text(), 16 if args.quick else 64

    def batches(generator: torch.Generator) -> Batches:
        while True:
            yield module.windows(text.train, 16, length, generator)

    letters = len(text.alphabet)
    network = module.Transformer
    constant = entropy(text.train)
    return Problem(lambda: network(letters, length), batches, constant, 150)


PROBLEMS = {"digits": small_convolutions, "cifar": cifar, "transformer": transformer}


def losses(
    make: Callable[[nn.Module, float], torch.optim.Optimizer],
    learning_rate: float,
    problem: Problem,
    steps: int,
) -> list[float]:
    """Return the training loss at every step, up to the first that is not finite."""
    torch.manual_seed(SEED)
    model = problem.network()
    optimizer = make(model, learning_rate)
    result: list[float] = []
    batches = problem.batches(torch.Generator().manual_seed(SEED))
    for _, (x, y) in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        loss = cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        result.append(loss.item())
        if not math.isfinite(result[-1]):
            break
    return result


def summary(curve: list[float], constant: float) -> dict[str, Any]:
    """Return the columns of one run."""
    initial, final = curve[0], float(np.mean(curve[-WINDOW:]))
    finite = all(map(math.isfinite, curve))
    worst = max(curve[min(WARM_UP, len(curve) - 1) :]) if finite else math.inf
    final = final if finite else math.inf
    return {
        "initial": initial,
        "final": final,
        "worst": worst / initial,
        "diverged": "yes" if final > initial or worst > 2 * initial else "no",
        "constant": constant,
        "learns": "yes" if final < constant else "no",
    }


def plot(curves: dict[tuple[str, str, float], list[float]]) -> Figure:
    """Draw the losses, one column per problem, one row per optimizer."""
    figure, grid = plt.subplots(
        len(OPTIMIZERS), len(PROBLEMS), figsize=(11, 6), sharex="col", sharey="col"
    )
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(LEARNING_RATES)))
    for (problem, optimizer, rate), curve in curves.items():
        axes = grid[[*OPTIMIZERS].index(optimizer), [*PROBLEMS].index(problem)]
        ends = range(1, len(curve) + 1)
        smooth = [np.mean(curve[max(0, end - SMOOTH) : end]) for end in ends]
        colour = colours[LEARNING_RATES.index(rate)]
        axes.plot(ends, smooth, color=colour, label=f"lr={rate:g}")
    for row, optimizer in zip(grid, OPTIMIZERS, strict=True):
        for axes, problem in zip(row, PROBLEMS, strict=True):
            axes.grid(alpha=0.3)
            axes.set_title(f"{optimizer}, {problem}", fontsize=10)
            drawn = [c for (p, _, _), c in curves.items() if p == problem]
            if max(map(max, drawn)) > 2 * drawn[0][0]:
                axes.set_ylim(0, 1.3 * drawn[0][0])
            if problem == "digits" and axes.get_ylim()[0] < 0.5:
                axes.set(yscale="log")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    for axes in grid[:, 0]:
        axes.set_ylabel(f"training loss, mean of {SMOOTH} steps")
    grid[0, -1].legend()
    figure.suptitle("Defaults, no argument but lr")
    figure.tight_layout()
    return figure


def main() -> None:
    """Train, print the table, save table, curves and figure."""
    args = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    curves: dict[tuple[str, str, float], list[float]] = {}
    for problem_name, make_problem in PROBLEMS.items():
        problem = make_problem(args)
        steps = 3 if args.quick else problem.steps
        grid = [(o, rate) for o in OPTIMIZERS for rate in LEARNING_RATES]
        for optimizer, rate in tqdm(grid, desc=problem_name, unit="run"):
            start = time.perf_counter()
            curve = losses(OPTIMIZERS[optimizer], rate, problem, steps)
            seconds = time.perf_counter() - start
            curves[problem_name, optimizer, rate] = curve
            row = {"problem": problem_name, "optimizer": optimizer, "lr": rate}
            row |= summary(curve, problem.constant)
            rows.append(row | {"seconds": round(seconds, 1)})
    print(table(rows))
    for row, curve in zip(rows, curves.values(), strict=True):
        row["losses"] = curve
    save(args.output, "defaults", {"seed": SEED, "runs": rows}, plot(curves))


if __name__ == "__main__":
    main()
