"""More of Haink (2023): what is trained, for how long, batches, momentum, orders.

    python benchmarks/haink2023_more.py          # one thread, three seeds
    python benchmarks/haink2023_more.py --seeds 3    # beside those of the record

A 64-20-20-10 ReLU network learns scikit-learn's digits (1,400, each standardised) in
double precision with plain SGD, batch 32, rate 0.05 x 0.99^epoch, 100 epochs. Then

- section 6.2: 30 epochs more at the last rate while the middle layer is recorded, from
  the same start, with all layers trained and with the recorded one alone;
- figure 6.5: 600 epochs more at a rate of 0.05, one record an epoch, with the penalty
  ``0.0005 |w|^2``: how straight the drift is in its first 60 epochs and in all, and how
  well an exponential fits (6.11);
- figures 7.9 to 7.11: the network rebuilt of its Hessian's eigenvectors, by magnitude
  and by value: the share after which the test accuracy is 0.98 of the network's, and
  the largest loss on the way over that of guessing, ``ln 10``;
- chapter 8: the largest eigenvalue after 60 epochs with batches of 16, 64 and 256 at
  the same rate, and after training with momentum 0.9 at a tenth of the rate (8.1 makes
  it the same rate), with the weight product in the top 5 % of all directions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, earlier, parser, print_seconds, save, spread, table
from haink2023 import digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.vectors import ParameterVector

MIDDLE = "2.weight"
Data = tuple[Tensor, Tensor]


def network(width: int) -> nn.Sequential:
    """Return the network at its start."""
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def epochs(
    model: nn.Module,
    data: Data,
    count: int,
    *,
    lr: float = 0.05,
    decay: float = 0.99,
    batch: int = 32,
    momentum: float = 0.0,
    penalty: float = 0.0,
    only: str | None = None,
) -> Iterator[int]:
    """Train, and yield the epoch after every step.

    Args:
        model: The network.
        data: Inputs and labels.
        count: Of epochs.
        lr: Learning rate of the first epoch.
        decay: Its factor from epoch to epoch.
        batch: Size of a batch.
        momentum: Heavy ball's.
        penalty: Of ``penalty |w|^2`` on the weights, biases left out.
        only: Name of the one parameter that is trained. Default: all.
    """
    named = [(n, p) for n, p in model.named_parameters() if only in (None, n)]
    groups = [
        {"params": [p], "weight_decay": 2 * penalty * n.endswith("weight")}
        for n, p in named
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum)
    x, y = data
    for epoch in range(count):
        for group in optimizer.param_groups:
            group["lr"] = lr * decay**epoch
        order = torch.randperm(len(x))
        for index in order[: len(x) // batch * batch].split(batch):
            model.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            yield epoch


def trained(model: nn.Module, data: Data, count: int, **options: Any) -> nn.Module:
    """Train a network in place and return it."""
    for _ in epochs(model, data, count, **options):
        pass
    return model


def drifts(model: nn.Module, data: Data, count: int, lr: float) -> dict[str, float]:
    """Return the drift with all layers trained and with the recorded one alone."""
    found: dict[str, float] = {}
    for name, only in (("all layers", None), ("one layer", MIDDLE)):
        torch.manual_seed(0)
        net = copy.deepcopy(model)
        recorder = d.TrajectoryRecorder(net, [MIDDLE], capacity=count * 100)
        loss_of = d.loss_of([data], cross_entropy)
        before = loss_of(net)
        for _ in epochs(net, data, count, lr=lr, decay=1.0, only=only):
            recorder.record()
        after = loss_of(net)
        drift = d.drift(recorder.weights())
        variance = recorder.weights().var(dim=0, correction=0).sum()
        found |= {
            f"drift, {name}: first over second variance": drift.dominance,
            f"drift, {name}: share of the variance": float(drift.variance / variance),
            f"drift, {name}: R^2 of the line": drift.determination,
            f"drift, {name}: |cos(p_1, w)|": abs(drift.alignment),
            f"drift, {name}: loss after over before": after / before,
        }
    return found


def exponential(path: Tensor) -> float:
    """Return the R^2 of the best ``a + b exp(-c t)``."""
    time = torch.linspace(0, 1, len(path), dtype=path.dtype)
    best = 0.0
    variance = float((path - path.mean()).square().sum())
    for rate in torch.logspace(-2, 2, 81).tolist():
        columns = torch.stack([torch.ones_like(time), torch.exp(-rate * time)], dim=1)
        solution = torch.linalg.lstsq(columns, path.unsqueeze(1)).solution
        residual = float((columns @ solution).squeeze(1).sub(path).square().sum())
        best = max(best, 1 - residual / variance)
    return best


def long_drift(model: nn.Module, data: Data, count: int) -> dict[str, float]:
    """Return how straight the drift is at first and over a long time."""
    torch.manual_seed(0)
    net = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 0.05, "decay": 1.0, "penalty": 5e-4}
    recorder = d.TrajectoryRecorder(net, [MIDDLE], capacity=count)
    recorder.record()
    last = 0
    for epoch in epochs(net, data, count, **options):
        if epoch > last:
            recorder.record()
            last = epoch
    rows = recorder.weights()
    early, late = d.drift(rows[: max(3, count // 10)]), d.drift(rows)
    return {
        "long drift: R^2 of a line, first tenth": early.determination,
        "long drift: R^2 of a line, all": late.determination,
        "long drift: R^2 of an exponential, all": exponential(late.path),
        "long drift: |theta_1| grows by": late.growth,
    }


def orders(model: nn.Module, data: Data, test: Data) -> tuple[dict[str, float], Any]:
    """Return how many eigenvectors rebuild the network, in two orders, and curves."""
    H = ekfac.hessian(model, [data], cross_entropy, "dense")
    accuracy, loss = d.accuracy_of([test]), d.loss_of([data], cross_entropy)
    full, found, curves = accuracy(model), {}, {}
    for order in ("magnitude", "value"):
        directions = d.Directions.of_matrix(H, order=order, cut=0)
        n = len(directions)
        counts = sorted({round(n * share / 50) for share in range(51)})
        accuracies = d.cumulative_reconstruction(model, directions, accuracy, counts)
        losses = d.cumulative_reconstruction(model, directions, loss, counts)
        # From the end backwards: the share from which on it stays.
        stays = (accuracies.value.flip(0) >= 0.98 * full).int().cummin(0)[0].sum()
        found[f"by {order}: share for 0.98 of the accuracy"] = (
            counts[len(counts) - int(stays)] / n
        )
        found[f"by {order}: largest loss over ln 10"] = float(
            losses.value.max()
        ) / math.log(10)
        curves[order] = [c / n for c in counts], accuracies.value.tolist()
    return found, curves


def batches(seed: int, data: Data, count: int, width: int) -> dict[str, float]:
    """Return largest eigenvalues by batch size, and with momentum."""
    found: dict[str, float] = {}
    cases: dict[str, dict[str, Any]] = {
        f"batch {size}": {"batch": size, "lr": 0.05} for size in (16, 64, 256)
    }
    cases["batch 64, momentum 0.9"] = {"batch": 64, "lr": 0.005, "momentum": 0.9}
    for name, options in cases.items():
        torch.manual_seed(seed)
        model = trained(network(width), data, count, decay=1.0, **options)
        H = ekfac.hessian(model, [data], cross_entropy, "dense")
        directions = d.Directions.of_matrix(H, order="magnitude", cut=0)
        weights = ParameterVector.from_model(model)
        energy = d.weight_product(directions, weights).relative_energy()
        top = energy[: len(energy) // 20]
        found[f"{name}: largest eigenvalue"] = float(directions.value[0])
        found[f"{name}: weight product, top 5 %"] = float(top.mean())
        found[f"{name}: loss"] = d.loss_of([data], cross_entropy)(model)
    return found


def main() -> None:
    """Run all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = arguments.parse_args()
    width, first, more, long = 20, 100, 30, 600
    if args.quick:
        args.seeds, width, first, more, long = [0], 6, 1, 1, 12
    torch.set_num_threads(1)
    train, test = digits()
    saved = {"runs": {}, "curves": {}} | earlier(args.output, "haink2023_more")
    runs, curves = saved["runs"], saved["curves"]
    for seed in bar(args.seeds, "seeds"):
        torch.manual_seed(seed)
        model = trained(network(width), train[0], first)
        rebuilt, curves[str(seed)] = orders(model, train[0], test[0])
        runs[str(seed)] = (
            drifts(model, train[0], more, 0.05 * 0.99 ** (first - 1))
            | long_drift(model, train[0], long)
            | rebuilt
            | batches(seed, train[0], max(1, 6 * first // 10), width)
        )
        print(f"seed {seed}: done", flush=True)
    rows = [
        {"quantity": key, "found": spread([run[key] for run in runs.values()])}
        for key in next(iter(runs.values()))
    ]
    print(table(rows))
    print_seconds()
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for number, curve in enumerate(curves.values()):
        for colour, (order, (shares, accuracies)) in enumerate(curve.items()):
            label = f"by {order}" if number == 0 else None
            ax.plot(shares, accuracies, "-", color=f"C{colour}", label=label)
    ax.set(xlabel="share of the eigenvectors", ylabel="test accuracy, rebuilt")
    ax.legend()
    results = {"rows": rows, "runs": runs, "curves": curves}
    save(args.output, "haink2023_more", results, figure)


if __name__ == "__main__":
    main()
