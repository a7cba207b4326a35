"""Figures 1 and 5 of Zhang et al. 2021: training stays at narrower networks' optima.

Figure 1: a wide two-layer tanh network of small start learns a function of one
variable; counted are the steps with a loss within 5 % of the best constant's, the best
line's and the best networks' of one to three neurons. Figure 5: a wide ReLU network of
small start learns few images of scikit-learn's digits in two classes; its neurons
condense to few directions, which are merged.

    python benchmarks/zhang2021_training.py          # one thread, three seeds
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ekfac.diagnostics.papers.zhang import redundant_neurons


def wide(d_in: int, width: int, d_out: int, activation: nn.Module, std: float) -> Any:
    """Return a two-layer network of small start."""
    model = nn.Sequential(nn.Linear(d_in, width), activation, nn.Linear(width, d_out))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model


def fitted(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float
) -> list[float]:
    """Train by Adam on all data; return the losses."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimum(width: int, x: Tensor, y: Tensor, steps: int) -> float:
    """Return the lowest loss of a narrow network, over ten starts trained at once."""
    first = torch.randn(10, 1, width).requires_grad_()
    bias = torch.randn(10, 1, width).requires_grad_()
    last = torch.randn(10, width, 1).requires_grad_()
    shift = torch.zeros(10, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([first, bias, last, shift], lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = torch.tanh(x @ first + bias) @ last + shift
        loss = (outputs - y).square().mean(dim=(1, 2))
        loss.sum().backward()
        optimizer.step()
    return float(loss.detach().min())


def stays(losses: list[float], level: float) -> int:
    """Return for how many steps the loss is within 5 % of a level."""
    values = torch.tensor(losses)
    return int(((values - level).abs() < 0.05 * level).sum())


def figure_1(seed: int, steps: int) -> dict[str, Any]:
    """Return the losses of a wide network beside narrow networks' optima."""
    torch.manual_seed(seed)
    x = torch.linspace(-3, 3, 50).unsqueeze(1)
    y = 0.7 * torch.tanh(2 * x + 1) + 0.5 * torch.tanh(-4 * x + 6) * torch.sin(2 * x)
    model = wide(1, 200, 1, nn.Tanh(), 1e-3)
    losses = fitted(model, x, y, steps, 1e-3)
    line = torch.cat([x, torch.ones_like(x)], dim=1)
    fit = line @ torch.linalg.lstsq(line, y).solution
    narrow: dict[int | str, float] = {0: float(y.var(correction=0))}
    narrow["a line"] = float((fit - y).square().mean())
    narrow |= {width: optimum(width, x, y, 1500) for width in (1, 2, 3)}
    found = {width: stays(losses, level) for width, level in narrow.items()}
    return {"losses": losses, "narrow": narrow, "stays": found}


def figure_5(seed: int, steps: int) -> dict[str, Any]:
    """Return the groups of neurons while training, and the merged network's loss."""
    torch.manual_seed(seed)
    digits = load_digits()
    chosen = torch.tensor(digits.target) < 2
    images = torch.tensor(digits.data, dtype=torch.float32)[chosen] / 16
    labels = 2 * torch.tensor(digits.target)[chosen].float().unsqueeze(1) - 1
    x, y = images[:200], labels[:200]
    model = wide(64, 400, 1, nn.ReLU(), 1e-4)
    losses, found = [], []
    for _ in range(10):
        losses += fitted(model, x, y, steps // 10, 1e-3)
        redundancy = redundant_neurons(model, "0", threshold=0.9, amplitude=0.02)
        merged = redundancy.merged(model)
        with torch.no_grad():
            loss = float((merged(x) - y).square().mean())
            same = (merged(images[200:]) > 0) == (model(images[200:]) > 0)
        found.append(
            {
                "step": len(losses),
                "groups": len(redundancy.groups),
                "loss": losses[-1],
                "merged": loss,
                "agreement": float(same.float().mean()),
            }
        )
    return {"losses": losses, "found": found}


def main() -> None:
    """Run both with all seeds; print tables and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=5000)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.steps = [0], 200
    torch.set_num_threads(1)
    first = {seed: figure_1(seed, args.steps) for seed in bar(args.seeds, "Figure 1")}
    fifth = {
        seed: figure_5(seed, max(50, args.steps // 10))
        for seed in bar(args.seeds, "Figure 5")
    }
    print(
        table(
            [
                {
                    "seed": seed,
                    "last": run["losses"][-1],
                    **{f"optimum of {w}": v for w, v in run["narrow"].items()},
                    **{f"steps near {w}": v for w, v in run["stays"].items()},
                }
                for seed, run in first.items()
            ]
        )
    )
    lines = [{"seed": s, **line} for s, run in fifth.items() for line in run["found"]]
    print(table(lines))
    print_seconds()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in first.values():
        axes[0].loglog(run["losses"])
    for width, value in first[args.seeds[0]]["narrow"].items():
        axes[0].axhline(value, color="gray", linestyle="--")
        axes[0].annotate(f"optimum of {width}", (1, value), fontsize=8)
    axes[0].set(xlabel="step", ylabel="loss", title="Figure 1")
    for run in fifth.values():
        axes[1].plot(
            [line["step"] for line in run["found"]],
            [line["groups"] for line in run["found"]],
            "o-",
        )
    axes[1].set(xlabel="step", ylabel="groups of 400 neurons", title="Figure 5")
    runs = {"figure 1": first, "figure 5": fifth}
    save(args.output, "zhang2021_training", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
