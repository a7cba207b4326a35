"""The step bound of Karakida et al. 2020 as an experiment: gradient descent beside it.

Random tanh networks of three hidden layers learn random targets by gradient descent on
the squared error, at 0.95 and 1.05 times ``2 / lambda_max`` of the Fisher matrix at the
start (equation 23), linearised (:class:`~ekfac.diagnostics.tangent_kernel.Linearised`)
and as they are, also at 2 and 4 times. ``lambda_max`` is exact, by the dual; the
mean-field value stands beside it.

    python benchmarks/step_bound.py          # one thread, three seeds
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn

from ekfac.diagnostics import dual, step_bound
from ekfac.diagnostics.papers.karakida import mean_field_theory
from ekfac.diagnostics.tangent_kernel import Linearised

WEIGHT_VARIANCE, BIAS_VARIANCE = 3.0, 0.64
INPUTS, OUTPUTS, EXAMPLES = 50, 2, 60
DIVERGED = "diverged"
TOP = 1e3  # where the figure has it


def network(width: int) -> nn.Sequential:
    """Return a random network with the variances above."""
    widths = [INPUTS, width, width, width, OUTPUTS]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layer = nn.Linear(d_in, d_out)
        nn.init.normal_(layer.weight, std=(WEIGHT_VARIANCE / d_in) ** 0.5)
        nn.init.normal_(layer.bias, std=BIAS_VARIANCE**0.5)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def descended(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int) -> float:
    """Return the loss after gradient descent over that before."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    first = last = float("nan")
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = (model(x) - y).square().sum() / (2 * len(x))
        first, last = (loss.item() if step == 0 else first), loss.item()
        if not last < 1e12 * first:
            return float("inf")
        loss.backward()
        optimizer.step()
    return last / first


def experiment(width: int, seed: int, steps: int) -> dict[str, float]:
    """Return losses after descent, and the bound beside its mean-field value."""
    torch.manual_seed(seed)
    model = network(width)
    x = torch.randn(EXAMPLES, INPUTS, dtype=torch.float64)
    y = torch.randn(EXAMPLES, OUTPUTS, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    limit = step_bound(dual(model, x, "gaussian")).safe
    assert limit is not None
    theory = mean_field_theory(
        torch.tanh,
        [INPUTS, width, width, width, OUTPUTS],
        weight_variance=WEIGHT_VARIANCE,
        bias_variance=BIAS_VARIANCE,
    ).fisher(EXAMPLES)
    row = {"width": width, "seed": seed, "theory / exact": 2 / theory.maximum / limit}
    for factor in (0.95, 1.05, 2, 4):
        if factor < 2:
            linear = Linearised(model)
            row[f"linear {factor}"] = descended(linear, x, y, factor * limit, steps)
        row[f"real {factor}"] = descended(model, x, y, factor * limit, steps)
        model.load_state_dict(start)
    return row


def figure_of(rows: list[dict[str, Any]]) -> Figure:
    """Return the losses by multiple of the bound, of the record's rows."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, label, style in (("linear", "linearised", "s"), ("real", "network", "o")):
        keys = [key for key in rows[0] if key.startswith(kind)]
        colour = "tab:orange" if kind == "linear" else "tab:blue"
        for row in rows:
            # What diverges stands at the top.
            factors = [float(key.split()[1]) for key in keys]
            values = [TOP if row[key] == DIVERGED else row[key] for key in keys]
            ax.plot(factors, values, style, color=colour, label=label)
            label = None
    ax.axvline(1, color="0.5", linestyle=":")
    ax.axhline(TOP, color="0.5", linestyle=":")
    ax.text(1.4, 3 * TOP, DIVERGED, color="0.3")
    ax.set(yscale="log", xlabel="rate over the bound", ylabel="loss, last over first")
    ax.set_ylim(top=1e4 * TOP)
    ax.legend(loc="lower left")
    return figure


def main() -> None:
    """Run all; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--widths", type=int, nargs="+", default=[50, 200])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=500)
    args = arguments.parse_args()
    if args.quick:
        args.widths, args.seeds, args.steps = [20], [0], 20
    torch.set_num_threads(1)
    rows = [
        experiment(width, seed, args.steps)
        for width in bar(args.widths, "widths")
        for seed in args.seeds
    ]
    print("loss after descent over that before, by multiple of the bound")
    print(table(rows))
    print_seconds()
    kept = [
        {k: v if v < float("inf") else DIVERGED for k, v in row.items()} for row in rows
    ]
    save(args.output, "step_bound", {"rows": kept}, figure_of(kept))


if __name__ == "__main__":
    main()
