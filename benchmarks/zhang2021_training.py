"""Figures 1 and 5 of Zhang et al. 2021: training stays at narrower networks' optima.

Figure 1: a wide two-layer tanh network of small start learns a function of one
variable, by gradient descent as in the text and by Adam; counted are the steps with a
loss within 5 % of the best constant's, the best line's and the best networks' of one to
three neurons, and how far the outputs are from theirs when the losses are nearest.
Figure 5: a wide ReLU network of small start learns few images of scikit-learn's digits
in two classes; its neurons condense to few directions, which are merged, and the merged
network is trained on.

    python benchmarks/zhang2021_training.py          # one thread, three seeds
"""

from __future__ import annotations

import copy
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
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
    model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, adam: bool = True
) -> tuple[list[float], list[Tensor]]:
    """Train on all data; return the losses, and the outputs before every tenth step."""
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=lr)
    losses, outputs = [], []
    for step in range(steps):
        optimizer.zero_grad()
        output = model(x)
        loss = (output - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            outputs.append(output.detach())
    return losses, outputs


def optimum(width: int, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Return the outputs of the best narrow network of ten, trained at once."""
    first = torch.randn(10, 1, width).requires_grad_()
    bias = torch.randn(10, 1, width).requires_grad_()
    last = torch.randn(10, width, 1).requires_grad_()
    shift = torch.zeros(10, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([first, bias, last, shift], lr=0.03)
    for _ in range(steps + 1):
        optimizer.zero_grad()
        outputs = torch.tanh(x @ first + bias) @ last + shift
        loss = (outputs - y).square().mean(dim=(1, 2))
        loss.sum().backward()
        optimizer.step()
    return outputs.detach()[loss.argmin()]


def beside(
    losses: list[float], outputs: list[Tensor], narrow: dict[str, Tensor], y: Tensor
) -> dict[str, list[float]]:
    """Return, by narrow network, the steps near its loss and the outputs' distance.

    The distance is the root mean square difference of the outputs, over the range of
    the targets, when the losses are nearest.
    """
    values, found = torch.tensor(losses), {}
    for name, output in narrow.items():
        level = float((output - y).square().mean())
        near = int(((values - level).abs() < 0.05 * level).sum())
        nearest = outputs[int((values[::10] - level).abs().argmin())]
        apart = float((nearest - output).square().mean().sqrt() / (y.max() - y.min()))
        found[name] = [level, near, apart]
    return found


RULES = {"descent": (500, 0.02, 6, False), "Adam": (200, 1e-3, 1, True)}


def figure_1(seed: int, steps: int) -> dict[str, Any]:
    """Return the losses of wide networks beside narrow networks' optima."""
    torch.manual_seed(seed)
    x = torch.linspace(-3, 3, 50).unsqueeze(1)
    y = 0.7 * torch.tanh(2 * x + 1) + 0.5 * torch.tanh(-4 * x + 6) * torch.sin(2 * x)
    line = torch.cat([x, torch.ones_like(x)], dim=1)
    narrow = {"constant": y.mean().expand_as(y)}
    narrow["line"] = line @ torch.linalg.lstsq(line, y).solution
    narrow |= {str(width): optimum(width, x, y, 1500) for width in (1, 2, 3)}
    found = {}
    for rule, (width, lr, longer, adam) in RULES.items():
        model = wide(1, width, 1, nn.Tanh(), 1e-3)
        losses, outputs = fitted(model, x, y, longer * steps, lr, adam)
        found[rule] = {
            "losses": losses[::10],
            "narrow": beside(losses, outputs, narrow, y),
        }
    return found


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
        losses += fitted(model, x, y, steps // 10, 1e-3)[0]
        redundancy = redundant_neurons(model, "0", threshold=0.9, amplitude=0.02)
        merged = redundancy.merged(model)
        with torch.no_grad():
            loss = float((merged(x) - y).square().mean())
            same = (merged(images[200:]) > 0) == (model(images[200:]) > 0)
        # On from there, both for as many steps: the text's "a few".
        later = [
            fitted(copy.deepcopy(net), x, y, 21, 1e-3)[0][-1] for net in (model, merged)
        ]
        found.append(
            {
                "step": len(losses),
                "groups": len(redundancy.groups),
                "loss": losses[-1],
                "merged": loss,
                "agreement": float(same.float().mean()),
                "loss 20 later": later[0],
                "merged 20 later": later[1],
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
    rows = []
    for rule in RULES:
        for name in first[args.seeds[0]][rule]["narrow"]:
            runs = [run[rule]["narrow"][name] for run in first.values()]
            level, near, apart = zip(*runs, strict=True)
            row = {"rule": rule, "optimum of": name, "its loss": spread(level)}
            row["steps near it"] = ", ".join(f"{count:.0f}" for count in near)
            rows.append(row | {"outputs' distance": spread(apart)})
    print(table(rows))
    lines = [{"seed": s, **line} for s, run in fifth.items() for line in run["found"]]
    print(table(lines))
    print_seconds()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for rule, colour in (("descent", "tab:blue"), ("Adam", "tab:orange")):
        for number, run in enumerate(first.values()):
            losses = run[rule]["losses"]
            label = rule if number == 0 else None
            steps = range(1, 10 * len(losses), 10)
            axes[0].loglog(steps, losses, color=colour, label=label)
    for name, (value, *_) in first[args.seeds[0]]["Adam"]["narrow"].items():
        axes[0].axhline(value, color="gray", linestyle="--", linewidth=0.8)
        text = f"{name} neurons" if name.isdigit() else name
        axes[0].annotate(text, (1, value), fontsize=8)
    axes[0].legend()
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
