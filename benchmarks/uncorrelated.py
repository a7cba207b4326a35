"""Training with input factors over channels alone (SUA) beside those of patches.

    python benchmarks/uncorrelated.py          # one thread, three seeds

A small residual network without normalisation learns scikit-learn's digits with EKFAC,
with both kinds of factors at several learning rates: loss on all data after some steps,
and the memory of factors and bases.
"""

from __future__ import annotations

import statistics
import time
from typing import get_args

import matplotlib.pyplot as plt
import torch
from common import parser, save, table
from sklearn.datasets import load_digits
from through_training import memory, resnet
from torch import Tensor
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.layers import ConvFactors


def trained(
    way: ConvFactors, lr: float, seed: int, x: Tensor, y: Tensor, steps: int
) -> float:
    """Return the loss on all data after training."""
    torch.manual_seed(seed)
    model = resnet(x)
    with ekfac.EKFAC(model, lr=lr, conv_factors=way) as optimizer:
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
    arguments.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01])
    arguments.add_argument("--steps", type=int, default=60)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.rates, args.steps = [0], [0.003], 2
    torch.set_num_threads(1)
    start = time.process_time()
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    rows = []
    for way in get_args(ConvFactors):
        for lr in args.rates:
            losses = [trained(way, lr, s, x, y, args.steps) for s in args.seeds]
            rows.append(
                {
                    "factors": way,
                    "lr": lr,
                    "loss": statistics.mean(losses),
                    "deviation": statistics.pstdev(losses),
                    "bytes": memory(resnet(x), way),
                    "losses": " ".join(f"{loss:.4f}" for loss in losses),
                }
            )
    print(table(rows))
    print(f"{time.process_time() - start:.0f} s of one core")
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for place, row in enumerate(rows):
        ax.bar(place, row["loss"], yerr=row["deviation"])
    names = [f"{r['factors'][:9]}\n{r['lr']:g}" for r in rows]
    ax.set_xticks(range(len(rows)), names, fontsize=7)
    ax.set_ylabel(f"loss after {args.steps} steps")
    save(args.output, "uncorrelated", {"rows": rows}, figure)


if __name__ == "__main__":
    main()
