"""Batch sizes and learning-rate schedules (George 2023, appendix A.5).

    python benchmarks/schedules.py --data-dir CIFAR      # a quarter of an hour
    python benchmarks/schedules.py --quick

VGG11 and ResNet-34 without batch norm (examples/cifar.py, narrow) on the first images
of CIFAR-10, as many epochs at every batch size, bases refreshed every 50 steps: so a
smaller batch refreshes more often per epoch. ``lr`` is the better of the two that
``GRID`` lists, by the loss of the last epoch. Then, with that ``lr`` at the middle
batch size and twice the epochs, the schedule: constant, or halved every second epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Store, example, parser, save_figure, table
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC, KFAC

GRID = {"SGD": (0.01, 0.03), "KFAC": (1e-3, 3e-3), "EKFAC-ra": (1e-3, 3e-3)}
COLOURS = {"SGD": "0.5", "KFAC": "tab:purple", "EKFAC-ra": "tab:blue"}
MAKERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9),
    "KFAC": lambda m, lr: KFAC(m, lr=lr),
    "EKFAC-ra": lambda m, lr: EKFAC(m, lr=lr),
}
Key = tuple[str, str, int, float, bool]


def train(key: Key, epochs: int, args: argparse.Namespace) -> list[float]:
    """Return the mean training loss of every epoch.

    Args:
        key: Network, optimizer, batch size, learning rate, and whether it is halved
            every second epoch.
        epochs: How many.
        args: Width, number of images.
    """
    network, name, batch, lr, halved = key
    module = example("cifar")
    data = args.data
    torch.manual_seed(0)
    model = module.network(network, args.width)
    optimizer = MAKERS[name](model, lr)
    generator = torch.Generator().manual_seed(0)
    x, y = data.x_train[: args.images], data.y_train[: args.images]
    losses = []
    for epoch in tqdm(range(epochs), desc=str(key), leave=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 ** (epoch // 2) if halved else lr
        found = []
        for chosen in torch.randperm(len(x), generator=generator).split(batch):
            if len(chosen) == batch:
                optimizer.zero_grad()
                loss = cross_entropy(model(x[chosen]), y[chosen])
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        losses.append(float(np.mean(found)))
    return losses


def study(args: argparse.Namespace, store: Store) -> list[dict[str, Any]]:
    """Run both parts; return the rows of the table."""

    def run(key: Key, epochs: int) -> list[float]:
        found: list[float] = store.get(
            f"{key}|{epochs}", lambda: train(key, epochs, args)
        )
        return found

    def last(losses: list[float]) -> float:
        return losses[-1] if np.isfinite(losses[-1]) else float("inf")

    rows = []
    for network in args.networks:
        best: dict[tuple[str, int], float] = {}
        for batch in args.batches:
            for name, rates in GRID.items():
                tried = {
                    lr: run((network, name, batch, lr, False), args.epochs)
                    for lr in rates
                }
                lr = min(tried, key=lambda lr: last(tried[lr]))
                best[name, batch] = lr
                rows.append(_row(network, name, batch, lr, "constant", tried[lr]))
        batch = args.batches[len(args.batches) // 2]
        for name in GRID:
            for halved in (False, True):
                lr = best[name, batch]
                losses = run((network, name, batch, lr, halved), 2 * args.epochs)
                text = "halved" if halved else "constant"
                rows.append(_row(network, name, batch, lr, text, losses))
    return rows


def _row(
    network: str, name: str, batch: int, lr: float, schedule: str, losses: list[float]
) -> dict[str, Any]:
    return {
        "network": network,
        "optimizer": name,
        "batch": batch,
        "lr": lr,
        "schedule": schedule,
        "epochs": len(losses),
        "last epoch's loss": losses[-1],
        "losses": losses,
    }


def gains(rows: list[dict[str, Any]], epochs: int) -> list[dict[str, Any]]:
    """Return EKFAC-ra's loss over K-FAC's at every batch size."""
    result = []
    kept = {
        (r["network"], r["batch"], r["optimizer"]): r["last epoch's loss"]
        for r in rows
        if r["epochs"] == epochs
    }
    for network, batch, name in kept:
        if name == "KFAC":
            ours = kept[network, batch, "EKFAC-ra"]
            result.append(
                {
                    "network": network,
                    "batch": batch,
                    "EKFAC-ra over KFAC": ours / kept[network, batch, "KFAC"],
                    "EKFAC-ra over SGD": ours / kept[network, batch, "SGD"],
                }
            )
    return result


def draw(rows: list[dict[str, Any]], args: argparse.Namespace) -> plt.Figure:
    """Draw losses over epochs: a column for every batch size, one for the schedules."""
    columns = len(args.batches) + 1
    figure, axes = plt.subplots(
        len(args.networks),
        columns,
        figsize=(3.2 * columns, 3.0 * len(args.networks)),
        squeeze=False,
        layout="constrained",
    )
    for row in rows:
        line = args.networks.index(row["network"])
        short = row["epochs"] == args.epochs
        column = args.batches.index(row["batch"]) if short else columns - 1
        axis = axes[line][column]
        style = "--" if row["schedule"] == "halved" else "-"
        label = row["optimizer"] + (", halved" if style == "--" else "")
        epochs = np.arange(1, row["epochs"] + 1)
        axis.plot(
            epochs, row["losses"], style, color=COLOURS[row["optimizer"]], label=label
        )
        title = f"batch {row['batch']}" if short else "schedules"
        axis.set(title=f"{row['network']}, {title}", xlabel="epoch")
        axis.set(ylabel="training loss")
        axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    axes[0][-1].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Run what is not known, print, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--networks", nargs="+", default=["vgg11", "resnet34"])
    arguments.add_argument("--batches", type=int, nargs="+", default=[50, 200, 500])
    arguments.add_argument("--epochs", type=int, default=4)
    arguments.add_argument("--images", type=int, default=4000)
    arguments.add_argument("--width", type=int, default=8)
    args = arguments.parse_args()
    if args.quick:
        args.networks, args.batches, args.epochs = ["vgg11"], [20, 40], 2
        args.images, args.width = 80, 2
    args.data = example("cifar").load(args.data_dir, False)
    path = args.output / "schedules.json"
    store = Store(path)
    rows = study(args, store)
    shown = [{k: v for k, v in row.items() if k != "losses"} for row in rows]
    print("\n" + table(shown) + "\n\n" + table(gains(rows, args.epochs)))
    figure = draw(rows, args)
    save_figure(figure, path.with_suffix(".png"), dpi=110)
    print(f"\nresults: {path}\nfigure: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
