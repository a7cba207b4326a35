"""Figure 5 of Karakida et al. 2020: largest eigenvalues of both metrics in training.

A random tanh network of three linear maps learns random labels of random inputs by
gradient descent at half of the step bound, once with the squared error and once, from
the same start, with the softmax's cross-entropy. In both trainings the largest
eigenvalues of both metrics, ``F`` and ``F_cross``, are exact, by the dual.

    python benchmarks/karakida2020_training.py          # one thread, three seeds
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from ekfac.diagnostics import dual

INPUTS, CLASSES, EXAMPLES = 30, 3, 40


def network(width: int) -> nn.Sequential:
    """Return a random network with weight variance 3 and bias variance 0.64."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise([INPUTS, width, width, CLASSES]):
        layer = nn.Linear(d_in, d_out)
        nn.init.normal_(layer.weight, std=(3 / d_in) ** 0.5)
        nn.init.normal_(layer.bias, std=0.8)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def largest(model: nn.Module, x: Tensor, likelihood: str) -> float:
    """Return the largest eigenvalue of the Fisher matrix."""
    return float(dual(model, x, likelihood).top_eigenpairs(1).values[0])


def trained(width: int, seed: int, likelihood: str, steps: int) -> dict[str, list[Any]]:
    """Return loss and largest eigenvalue at some steps of gradient descent."""
    torch.manual_seed(seed)
    model, x = network(width), torch.randn(EXAMPLES, INPUTS)
    y = torch.randint(CLASSES, (EXAMPLES,))
    targets = one_hot(y, CLASSES).float()
    points = sorted({0, *(round(steps * 2.0**-k) for k in range(8))})
    found: dict[str, list[Any]] = {"step": [], "loss": [], "largest": [], "other": []}
    other = "categorical" if likelihood == "gaussian" else "gaussian"
    rate = 0.0
    for step in range(steps + 1):
        if step in points:
            found["step"].append(step)
            found["largest"].append(largest(model, x, likelihood))
            found["other"].append(largest(model, x, other))
            # Half of the bound at the start.
            rate = rate or 1 / found["largest"][0]
        outputs = model(x)
        if likelihood == "gaussian":
            loss = (outputs - targets).square().sum() / (2 * EXAMPLES)
        else:
            loss = cross_entropy(outputs, y)
        if step in points:
            found["loss"].append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= rate * parameter.grad
    return found


def main() -> None:
    """Train at all widths with all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--widths", type=int, nargs="+", default=[30, 100, 300])
    arguments.add_argument("--steps", type=int, default=300)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.widths, args.steps = [0], [20], 8
    torch.set_num_threads(1)
    rows, runs = [], []
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for likelihood, ax in zip(("gaussian", "categorical"), axes, strict=True):
        for width, shade in zip(args.widths, (0.3, 0.6, 1.0), strict=False):
            every = [
                trained(width, s, likelihood, args.steps)
                for s in bar(args.seeds, "seeds")
            ]
            runs += [{"metric": likelihood, "width": width, **run} for run in every]
            ratios = [run["largest"][-1] / run["largest"][0] for run in every]
            others = [run["other"][-1] / run["other"][0] for run in every]
            F, cross = (
                (ratios, others) if likelihood == "gaussian" else (others, ratios)
            )
            losses = [run["loss"][-1] / run["loss"][0] for run in every]
            rows.append(
                {
                    "training": "squared" if likelihood == "gaussian" else "cross",
                    "width": width,
                    "loss, last / first": " ".join(f"{v:.2g}" for v in losses),
                    "F, last / first": spread(F),
                    "F_cross, last / first": spread(cross),
                }
            )
            for number, run in enumerate(every):
                own, last = run["largest"], run["other"]
                for values, style in ((own, "o-"), (last, "x--")):
                    relative = [value / values[0] for value in values]
                    cross = (values is own) == (likelihood == "categorical")
                    label = f"{'F_cross' if cross else 'F'}, width {width}"
                    ax.plot(
                        run["loss"],
                        relative,
                        style,
                        color=plt.get_cmap("Oranges" if cross else "Blues")(shade),
                        label=label if number == 0 else None,
                    )
        ax.set(xscale="log", xlabel="loss", ylabel="largest eigenvalue over the first")
        ax.set_title("squared error" if likelihood == "gaussian" else "cross-entropy")
        ax.invert_xaxis()
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7)
    print(table(rows))
    print_seconds()
    save(args.output, "karakida2020_training", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
