"""Haink (2023) on several networks: where the weight product peaks, and variances.

    python benchmarks/haink2023_networks.py          # one thread, three seeds

Fully connected networks of two widths, a convolutional one and one with batch norm
learn scikit-learn's digits. Of each, all eigenvectors of the Hessian: the rank at which
the weight product is largest, and its mean in three bands. Then the last layer's
weights are recorded while training goes on with several learning rates ``eta`` for
several numbers of steps ``T``: the exponents of the variance along the drift, which
grows as ``eta^2 T^2`` (equation 6.13), and of the variance with the curvature below the
crossover of equation 3.9, ``3 S / (eta N)`` without momentum.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import parser, save, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.vectors import ParameterVector

BATCH, RATE = 32, 0.05


def networks(quick: bool) -> dict[str, Any]:
    """Return how each network is made."""

    def mlp(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def conv(normalised: bool) -> nn.Module:
        layers: list[nn.Module] = []
        for d_in, d_out in ((1, 4), (4, 6)):
            layers += [nn.Conv2d(d_in, d_out, 3, stride=2, padding=1)]
            layers += [nn.BatchNorm2d(d_out)] if normalised else []
            layers += [nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 10))

    found = {
        "MLP 10": lambda: mlp(10),
        "MLP 20": lambda: mlp(20),
        "conv": lambda: conv(False),
        "conv, batch norm": lambda: conv(True),
    }
    return dict(list(found.items())[2:]) if quick else found


def steps(model: nn.Module, x: Tensor, y: Tensor, lr: float, count: int) -> Any:
    """Do SGD steps; yield after each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(count):
        index = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        yield


def peak(model: nn.Module, data: Any) -> dict[str, float]:
    """Return where the weight product peaks, in percent, and its bands."""
    model.eval()
    H = ekfac.hessian(model, data, cross_entropy, "dense")
    whole = d.Directions.of_matrix(H, order="magnitude")
    energy = d.weight_product(whole, ParameterVector.from_model(model))
    values = energy.relative_energy()
    n = len(values)
    smooth = values.unfold(0, max(1, n // 100), 1).mean(dim=1)
    bands = {"0-1 %": (0.0, 0.01), "1-5 %": (0.01, 0.05), "5-20 %": (0.05, 0.2)}
    found = {"peak at %": 100 * float(smooth.argmax()) / n}
    for name, (low, high) in bands.items():
        stop = max(int(high * n), int(low * n) + 1)
        found[name] = float(values[int(low * n) : stop].mean())
    return found


def recorded(model: nn.Module, x: Tensor, y: Tensor, lr: float, count: int) -> Tensor:
    """Return the last layer's weights after each step, ``[T, P]``."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    weight = list(model.parameters())[-2]
    taken = steps(model.train(), x, y, lr, count)
    rows = [weight.detach().flatten().clone() for _ in taken]
    model.load_state_dict(start)
    return torch.stack(rows)


def slope(xs: list[float], ys: list[float]) -> float:
    """Return the slope of a line through logarithms."""
    a, b = torch.tensor(xs).double().log(), torch.tensor(ys).double().log()
    a = a - a.mean()
    return float(a @ (b - b.mean()) / a.square().sum())


def variances(model: nn.Module, x: Tensor, y: Tensor, quick: bool) -> dict[str, float]:
    """Return the exponents of the variances."""
    long, short = (40, 20) if quick else (800, 200)
    rates, times = [RATE / 4, RATE / 2, RATE], [short, 2 * short, long]
    every = [recorded(model, x, y, lr, short) for lr in rates]
    by_rate = [d.drift(rows).variance for rows in every]
    rows = recorded(model, x, y, RATE, long)
    by_time = [d.drift(rows[:count]).variance for count in times]
    name = next(reversed([n for n, p in model.named_parameters() if p.dim() > 1]))
    H = ekfac.hessian(
        model.eval(), [(x[:100], y[:100])], cross_entropy, "dense", parameters=[name]
    )
    layer = d.Directions.of_matrix(H)
    crossover = 3 * BATCH / (RATE * len(x))
    found = {
        "exponent of eta": slope(rates, by_rate),
        "exponent of T": slope([float(t) for t in times], by_time),
        "crossover / largest": crossover / float(layer.value[0]),
    }
    centred = (rows - rows.mean(0)).to(layer.vectors) @ layer.vectors
    variance = centred.square().mean(dim=0)
    good = layer.value > 1e-4 * layer.value[0]
    below = good & (layer.value < crossover)
    found["alpha below"] = (
        slope(layer.value[below].tolist(), variance[below].tolist())
        if int(below.sum()) > 3
        else float("nan")
    )
    return found


def main() -> None:
    """Run all networks with all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=10)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.epochs = [0], 1
    torch.set_num_threads(1)
    start = time.process_time()
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    x, y = (x - x.mean()) / x.std(), torch.tensor(digits.target)
    x, y = x[:1000], y[:1000]
    runs: dict[str, list[dict[str, float]]] = {}
    for name, make in networks(args.quick).items():
        for seed in args.seeds:
            torch.manual_seed(seed)
            model = make()
            count = args.epochs * len(x) // BATCH
            list(steps(model, x, y, RATE, count))
            found = peak(model, [(x[:100], y[:100])]) | variances(
                model, x, y, args.quick
            )
            runs.setdefault(name, []).append(found)
    rows = []
    for name, every in runs.items():
        row: dict[str, Any] = {"network": name}
        for field in every[0]:
            values = [one[field] for one in every]
            mean, deviation = statistics.mean(values), statistics.pstdev(values)
            row[field] = f"{mean:.3g} ± {deviation:.2g}"
        rows.append(row)
    print(table(rows))
    print(f"{time.process_time() - start:.0f} s of one core")
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for place, every in enumerate(runs.values()):
        ax.plot([place] * len(every), [one["peak at %"] for one in every], "o")
    ax.set_xticks(range(len(runs)), list(runs))
    ax.set(ylabel="weight product peaks at % of the directions", ylim=(0, None))
    save(args.output, "haink2023_networks", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
