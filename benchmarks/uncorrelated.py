"""Training with input factors over channels alone (SUA) beside those of patches.

    python benchmarks/uncorrelated.py          # one thread, five seeds

A residual network of 12 channels without normalisation learns scikit-learn's digits
with EKFAC, with both kinds of factors and both directions: loss on all data after some
steps at three learning rates, in how many seeds factors over channels end lower than
those of patches at the same rate, and the memory of factors and bases. With up to 8
channels both directions would be the natural one; that is checked.
"""

from __future__ import annotations

import statistics
from typing import Any, get_args

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from sklearn.datasets import load_digits
from through_training import memory, resnet
from torch import Tensor
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.curvature.options import Direction
from ekfac.layers import ConvFactors
from ekfac.optim.precondition import treatment

CHANNELS = 12


def trained(
    way: ConvFactors,
    direction: Direction,
    lr: float,
    seed: int,
    x: Tensor,
    y: Tensor,
    steps: int,
) -> float:
    """Return the loss on all data after training."""
    torch.manual_seed(seed)
    model = resnet(x, CHANNELS)
    options: dict[str, Any] = {"lr": lr, "conv_factors": way, "direction": direction}
    with ekfac.EKFAC(model, **options) as optimizer:
        for name in ("2.first", "2.last", "3.first", "3.last"):
            layer = optimizer.curvature[name]
            assert treatment(layer, optimizer.options) == direction, name
        for _ in range(steps):
            index = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    with torch.no_grad():
        return cross_entropy(model(x), y).item()


def main() -> None:
    """Run everything, print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    arguments.add_argument("--steps", type=int, default=60)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.steps = [0], 2
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    rows, runs = [], {}
    for direction in get_args(Direction):
        for lr in args.lr:
            for way in get_args(ConvFactors):
                losses = [
                    trained(way, direction, lr, seed, x, y, args.steps)
                    for seed in bar(args.seeds, "seeds")
                ]
                runs[f"{direction}, {way}, {lr:g}"] = losses
                patches = runs[f"{direction}, patches, {lr:g}"]
                lower = sum(a < b for a, b in zip(losses, patches, strict=True))
                rows.append(
                    {
                        "direction": direction,
                        "rate": lr,
                        "factors": way,
                        "loss": spread(losses),
                        "below patches": f"{lower} of {len(losses)}",
                        "bytes": memory(resnet(x, CHANNELS), way),
                    }
                )
    print(table(rows))
    print_seconds()
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for direction, colour in zip(get_args(Direction), ("C0", "C1"), strict=True):
        for way, style in zip(get_args(ConvFactors), ("o-", "s--"), strict=True):
            each = [runs[f"{direction}, {way}, {lr:g}"] for lr in args.lr]
            means = [statistics.mean(losses) for losses in each]
            errors = [statistics.pstdev(losses) for losses in each]
            label = f"{direction}, {way}"
            ax.errorbar(args.lr, means, errors, fmt=style, color=colour, label=label)
    ax.set(
        xscale="log", xlabel="learning rate", ylabel=f"loss after {args.steps} steps"
    )
    ax.legend(fontsize=8)
    save(args.output, "uncorrelated", {"rows": rows, "runs": runs}, figure)


if __name__ == "__main__":
    main()
