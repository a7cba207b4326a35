"""Figure 5 of Karakida et al. 2020 at the document's size, with Theorem 3.4's bounds.

    python benchmarks/karakida2020_figure5.py       # one thread, three seeds

A random ReLU network of three linear maps of width 2000 (weight variance 2, no biases
at the start), 100 normal inputs, two classes that a second random network gives,
gradient descent on the cross-entropy. The document does not say activation, rate nor
steps: the activation is the one with these variances elsewhere in it, the rate half of
``2 / lambda_max`` of ``F_cross`` at the start. At some steps the largest eigenvalues of
``F`` and ``F_cross`` are exact, by the dual, beside the theorem's bounds with the
outputs of the moment and the order parameters of the start; the loss stands beside that
of the model that the tangent kernel at the start trains (equation 30).
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from karakida2020 import Setting
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import ekfac
from ekfac.diagnostics import dual
from ekfac.diagnostics.papers.karakida import softmax_prediction

POINTS = (0, 1, 3, 10, 30, 60, 100, 200)


def kernel_descent(
    kernel: Tensor, outputs: Tensor, y: Tensor, rate: float, steps: int
) -> list[float]:
    """Return the losses of descent in function space with a constant kernel.

    Args:
        kernel: The tangent kernel ``[N C, N C]``, examples first.
        outputs: ``[N, C]`` at the start.
        y: Classes ``[N]``.
        rate: Learning rate of the mean loss.
        steps: How many.
    """
    targets, losses = one_hot(y, outputs.shape[1]).to(outputs), []
    for _ in range(steps + 1):
        losses.append(float(cross_entropy(outputs, y)))
        residuals = (outputs.softmax(dim=1) - targets).flatten()
        outputs = outputs - rate / len(y) * (kernel @ residuals).view_as(outputs)
    return losses


def trained(setting: Setting, seed: int, points: tuple[int, ...]) -> dict[str, Any]:
    """Return losses, largest eigenvalues and bounds at some steps."""
    model, x = setting.draw(seed)
    teacher, _ = setting.draw(1000 + seed)
    with torch.no_grad():
        y = teacher(x).argmax(dim=1)
    theory = setting.theory()
    found: dict[str, Any] = {"step": list(points), "rate": 0.0}
    for step in range(points[-1] + 1):
        if step in points:
            cross, linear = dual(model, x), dual(model, x, "gaussian")
            largest = cross.spectrum().maximum
            if step == 0:
                found["rate"] = 1 / largest
                kernel = ekfac.ntk(model, x).to_dense()
                found["kernel's loss"] = kernel_descent(
                    kernel, cross.outputs, y, found["rate"], points[-1]
                )
            bounds = softmax_prediction(theory, cross.outputs.softmax(dim=1))
            numbers = {
                "loss": float(cross_entropy(cross.outputs, y)),
                "F": linear.spectrum().maximum,
                "F_cross": largest,
                "lower": bounds.lower,
                "upper": bounds.upper,
            }
            for name, value in numbers.items():
                found.setdefault(name, []).append(value)
        loss = cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= found["rate"] * gradient
    return found


def rows_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for every point: losses, eigenvalues over the start's, bounds."""
    rows = []
    for i, step in enumerate(runs[0]["step"]):
        inside = [
            run["lower"][i] <= run["F_cross"][i] <= run["upper"][i] for run in runs
        ]
        rows.append(
            {
                "step": step,
                "loss": spread([run["loss"][i] for run in runs]),
                "kernel's": spread([run["kernel's loss"][step] for run in runs]),
                "F / start": spread([run["F"][i] / run["F"][0] for run in runs], 4),
                "F_cross": spread([run["F_cross"][i] for run in runs]),
                "over lower": spread([r["F_cross"][i] / r["lower"][i] for r in runs]),
                "over upper": spread([r["F_cross"][i] / r["upper"][i] for r in runs]),
                "inside": f"{sum(inside)} of {len(runs)}",
            }
        )
    return rows


def figure_of(runs: list[dict[str, Any]]) -> Figure:
    """Return losses, and largest eigenvalues with their bounds, by step."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, run in enumerate(runs):
        steps, first = run["step"], number == 0
        label = {"label": "network"} if first else {}
        axes[0].plot(steps, run["loss"], "o-", color="tab:blue", ms=3, **label)
        label = {"label": "tangent kernel of the start"} if first else {}
        axes[0].plot(run["kernel's loss"], "--", color="tab:orange", **label)
        for name, style, colour in (
            ("F", "o-", "tab:blue"),
            ("F_cross", "o-", "tab:orange"),
            ("lower", ":", "0.4"),
            ("upper", "--", "0.4"),
        ):
            label = {
                "label": name if len(name) < 8 and name[0] == "F" else f"{name} bound"
            }
            axes[1].plot(
                steps, run[name], style, color=colour, ms=3, **(label if first else {})
            )
    axes[0].set(xlabel="step", ylabel="cross-entropy", yscale="log", xscale="symlog")
    axes[1].set(xlabel="step", ylabel="largest eigenvalue", yscale="log")
    axes[1].set_xscale("symlog")
    for ax in axes:
        ax.set_xlim(left=0)
        ax.legend(fontsize=8)
    return figure


def main() -> None:
    """Train with all seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--width", type=int, default=2000)
    args = arguments.parse_args()
    points, examples = POINTS, 100
    if args.quick:
        args.seeds, args.width, points, examples = [0], 30, POINTS[:3], 20
    torch.set_num_threads(1)
    setting = Setting("5", "ReLU", args.width, 2, examples, 0, (2.0, 0.0))
    runs = []
    for seed in bar(args.seeds, "seeds"):
        runs.append(trained(setting, seed, points))
        print(f"seed {seed}: loss {runs[-1]['loss'][-1]:.3g}", flush=True)
    predicted = setting.theory().fisher(examples).maximum
    measured = spread([run["F"][0] for run in runs])
    print(f"largest eigenvalue of F: predicted {predicted:.4g}, measured {measured}")
    print(table(rows_of(runs)))
    print_seconds()
    save(args.output, "karakida2020_figure5", {"runs": runs}, figure_of(runs))


if __name__ == "__main__":
    main()
