"""Training with input factors over channels alone (SUA) beside those of patches.

    python benchmarks/uncorrelated.py          # one thread, three seeds

A residual network of 12 channels without normalisation learns scikit-learn's digits
with EKFAC, with both kinds of factors and both directions: loss on all data after some
steps, and the memory of factors and bases. With up to 8 channels both directions would
be the natural one; that is checked.
"""

from __future__ import annotations

import statistics
from typing import Any, get_args

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, table
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
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--lr", type=float, default=0.01)
    arguments.add_argument("--steps", type=int, default=60)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.steps = [0], 2
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    rows = []
    for direction in get_args(Direction):
        for way in get_args(ConvFactors):
            losses = [
                trained(way, direction, args.lr, seed, x, y, args.steps)
                for seed in bar(args.seeds, "seeds")
            ]
            rows.append(
                {
                    "direction": direction,
                    "factors": way,
                    "loss": statistics.mean(losses),
                    "deviation": statistics.pstdev(losses),
                    "bytes": memory(resnet(x, CHANNELS), way),
                    "losses": " ".join(f"{loss:.4f}" for loss in losses),
                }
            )
    print(table(rows))
    print_seconds()
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for place, row in enumerate(rows):
        ax.bar(place, row["loss"], yerr=row["deviation"])
    names = [f"{r['direction']}\n{r['factors'][:9]}" for r in rows]
    ax.set_xticks(range(len(rows)), names, fontsize=7)
    ax.set_ylabel(f"loss after {args.steps} steps")
    save(args.output, "uncorrelated", {"rows": rows}, figure)


if __name__ == "__main__":
    main()
