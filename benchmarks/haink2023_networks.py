"""Haink (2023) on several networks: weight products, drift, variance and curvature.

    python benchmarks/haink2023_networks.py          # one thread, three seeds

Fully connected networks of two widths, a convolutional one and one with batch norm
learn 1,000 of scikit-learn's digits with SGD, batch 32, rate 0.05, 100 epochs; a linear
one, whose loss is convex, stands beside them. Of each:

- where the weight product is largest among the eigenvectors of the Hessian of 300
  examples by magnitude, null space left out, smoothed over a hundredth of them, and its
  mean in three bands; ranks are in percent of all parameters;
- section 6.3: the last layer is recorded while training goes on, from the same start,
  for a fixed number of steps ``T`` at three rates ``eta`` and for three ``T`` at one
  rate: exponents of the variance along the first principal component, which is
  ``a^2 (T^2 - 1) / 12`` with a speed ``a`` in proportion to ``eta``;
- equation 3.9: near a minimum (weight decay 0.002, momentum 0.9) the last layer is
  recorded for 120 epochs after 60. Its variance along an eigenvector of its Hessian,
  the line through time taken away, grows as the curvature below ``3 S (1 - beta) /
  (eta N)`` and is constant beyond, with epochs in which every example comes once; drawn
  at random it would be constant. Exponents on both sides, over directions that relax
  in a tenth of the recording at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.diagnostics.papers.haink import crossover_curvature, variance_curvature
from ekfac.vectors import ParameterVector

BATCH, RATE, MOMENTUM, DECAY = 32, 0.05, 0.9, 2e-3
BANDS = {"0-1 %": (0.0, 0.01), "1-5 %": (0.01, 0.05), "5-20 %": (0.05, 0.2)}


def mlp(width: int) -> nn.Module:
    """Return a ReLU network with two hidden layers."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def conv(normalised: bool) -> nn.Module:
    """Return two convolutions and a linear layer."""
    layers: list[nn.Module] = []
    for d_in, d_out in ((1, 6), (6, 12)):
        layers += [nn.Conv2d(d_in, d_out, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(d_out)] if normalised else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "MLP 10": lambda: mlp(10),
    "MLP 20": lambda: mlp(20),
    "conv": lambda: conv(False),
    "conv, batch norm": lambda: conv(True),
}


def steps(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    count: int,
    lr: float,
    *,
    momentum: float = 0.0,
    decay: float = 0.0,
    epochs: bool = True,
) -> Iterator[None]:
    """Do SGD steps and yield after each.

    Args:
        model: The network.
        data: Inputs and labels.
        count: Of steps.
        lr: Learning rate.
        momentum: Heavy ball's.
        decay: torch's weight decay.
        epochs: Whether every example comes once an epoch, or each is drawn at random.
    """
    x, y = data
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=decay
    )
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(count):
        if epochs and len(order) < BATCH:
            order = torch.randperm(len(x))
        index, order = order[:BATCH], order[BATCH:]
        if not epochs:
            index = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        yield


def recorded(
    model: nn.Module, data: tuple[Tensor, Tensor], count: int, lr: float, **options: Any
) -> Tensor:
    """Return the last layer's weights after each step, ``[T, P]``."""
    weight = list(model.parameters())[-2]
    return torch.stack(
        [
            weight.detach().flatten().clone()
            for _ in steps(model, data, count, lr, **options)
        ]
    )


def products(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return where the weight product peaks, in percent, and its bands."""
    H = ekfac.hessian(model.eval(), [data], cross_entropy, "dense")
    model.train()
    directions = d.Directions.of_matrix(H, order="magnitude")
    weights = ParameterVector.from_model(model)
    energy = d.weight_product(directions, weights).relative_energy()
    n = sum(p.numel() for p in model.parameters())
    smooth = energy.unfold(0, max(1, n // 100), 1).mean(dim=1)
    numbers = {
        "parameters": float(n),
        "outside the null space, %": 100 * len(energy) / n,
    }
    numbers["peak at %"] = 100 * int(smooth.argmax()) / n
    for name, (low, high) in BANDS.items():
        numbers[name] = float(energy[int(low * n) : int(high * n) + 1].mean())
    return numbers


def exponent(xs: list[float], ys: list[float]) -> float:
    """Return the slope of a line through logarithms."""
    a, b = torch.tensor(xs).double().log(), torch.tensor(ys).double().log()
    a = a - a.mean()
    return float(a @ b / a.square().sum())


def drifts(
    model: nn.Module, data: tuple[Tensor, Tensor], count: int
) -> dict[str, float]:
    """Return how the drift's variance grows with rate and time."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for factor in (0.25, 0.5, 1.0):
        model.load_state_dict(start)
        size = count if factor < 1 else 4 * count
        runs.append(recorded(model, data, size, factor * RATE))
    model.load_state_dict(start)
    rates = [0.25, 0.5, 1.0]
    by_rate = [d.drift(rows[:count]).variance for rows in runs]
    times = [count, 2 * count, 4 * count]
    by_time = [d.drift(runs[-1][:size]).variance for size in times]
    return {
        "variance ~ eta^": exponent(rates, by_rate),
        "variance ~ T^": exponent([float(time) for time in times], by_time),
        "R^2 of the line": d.drift(runs[-1]).determination,
    }


def straightened(rows: Tensor) -> Tensor:
    """Return rows without each column's line through time."""
    time = torch.arange(len(rows), dtype=torch.float64)
    time = (time - time.mean()) / (time - time.mean()).norm()
    rows = rows.double() - rows.double().mean(dim=0)
    return rows - torch.outer(time, time @ rows)


def noise(
    model: nn.Module, data: tuple[Tensor, Tensor], epochs: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return exponents of the variance with the curvature, and what was fitted."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    crossover = crossover_curvature(RATE, BATCH, len(data[0]), MOMENTUM)
    numbers: dict[str, float] = {"crossover": crossover}
    points: dict[str, list[float]] = {}
    name = [n for n, p in model.named_parameters() if p.dim() > 1][-1]
    per_epoch = len(data[0]) // BATCH
    for kind, once in (("epochs", True), ("drawn", False)):
        model.load_state_dict(start)
        options: dict[str, Any] = {"momentum": MOMENTUM, "decay": DECAY, "epochs": once}
        for _ in steps(model, data, epochs // 2 * per_epoch, RATE, **options):
            pass
        rows = straightened(recorded(model, data, epochs * per_epoch, RATE, **options))
        H = ekfac.hessian(
            model.eval(), [data], cross_entropy, "dense", parameters=[name]
        )
        model.train()
        layer = d.Directions.of_matrix(H)
        value = layer.value + DECAY
        slowest = 10 * (1 - MOMENTUM) / (RATE * len(rows))
        kept = value > slowest
        for side, chosen in (
            ("below", kept & (value < crossover)),
            ("above", kept & (value >= crossover)),
        ):
            numbers[f"{kind}, {side}: directions"] = float(chosen.sum())
            if int(chosen.sum()) >= 5:
                fit = variance_curvature(rows, layer.vectors[:, chosen], value[chosen])
                numbers[f"{kind}, {side}: exponent"] = fit.value
        points[f"{kind}, curvature"] = value[kept].tolist()
        variance = (rows @ layer.vectors[:, kept].double()).var(dim=0)
        points[f"{kind}, variance"] = variance.tolist()
    model.load_state_dict(start)
    return numbers, points


def figure_of(runs: dict[str, Any], points: dict[str, Any]) -> Figure:
    """Return peaks by network and seed, and variances of the last seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for place, each in enumerate(runs.values()):
        axes[0].plot([place] * len(each), [run["peak at %"] for run in each], "o")
    axes[0].set_xticks(range(len(runs)), list(runs), rotation=15)
    axes[0].set(title="weight product peaks at", ylabel="% of the directions")
    axes[0].set_ylim(bottom=0)
    for ax, kind in zip(axes[1:], ("epochs", "drawn"), strict=True):
        for name, kept in points.items():
            ax.loglog(
                kept[f"{kind}, curvature"],
                kept[f"{kind}, variance"],
                "o",
                ms=3,
                label=name,
            )
        ax.axvline(next(iter(runs.values()))[0]["crossover"], color="0.5", ls="--")
        title = "each example once an epoch" if kind == "epochs" else "drawn at random"
        ax.set(title=title, xlabel="curvature", ylabel="variance of the last layer")
    axes[1].legend(fontsize=8)
    return figure


def main() -> None:
    """Run all networks with all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=100)
    args = arguments.parse_args()
    count, examples, after = 200, 300, 120
    if args.quick:
        args.seeds, args.epochs, count, examples, after = [0], 1, 10, 50, 2
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    data = ((x - x.mean()) / x.std())[:1000], torch.tensor(digits.target)[:1000]
    some = data[0][:examples], data[1][:examples]
    names = list(NETWORKS)[3:] if args.quick else list(NETWORKS)
    runs: dict[str, list[dict[str, float]]] = {}
    points: dict[str, dict[str, list[float]]] = {}
    for name in names:
        for seed in bar(args.seeds, f"seeds of {name}"):
            torch.manual_seed(seed)
            model = NETWORKS[name]()
            for _ in steps(model, data, args.epochs * len(x[:1000]) // BATCH, RATE):
                pass
            numbers = products(model, some) | drifts(model, data, count)
            exponents, points[name] = noise(model, data, after)
            runs.setdefault(name, []).append(numbers | exponents)
            print(f"{name}, seed {seed}: done", flush=True)
    fields = dict.fromkeys(field for each in runs.values() for field in each[0])
    rows: list[dict[str, Any]] = []
    for field in fields:
        row: dict[str, Any] = {"quantity": field}
        for name, each in runs.items():
            values = [run[field] for run in each if field in run]
            row[name] = spread(values) if values else "-"
        rows.append(row)
    print(table(rows))
    print_seconds()
    figure = figure_of(runs, points)
    save(args.output, "haink2023_networks", {"runs": runs, "points": points}, figure)


if __name__ == "__main__":
    main()
