"""The step bound of Karakida et al. 2020 as an experiment: gradient descent beside it.

Random tanh networks of three hidden layers learn random targets by gradient descent on
the squared error, at 0.95 and 1.05 times ``2 / lambda_max`` of the Fisher matrix at the
start (equation 23), linearised (:class:`~ekfac.diagnostics.tangent_kernel.Linearised`)
and as they are, also at 2 and 4 times. ``lambda_max`` is exact, by the dual; the
mean-field value stands beside it. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import torch
from common import bar
from torch import Tensor, nn

from ekfac.diagnostics import dual, step_bound
from ekfac.diagnostics.papers.karakida import mean_field_theory
from ekfac.diagnostics.tangent_kernel import Linearised

WEIGHT_VARIANCE, BIAS_VARIANCE = 3.0, 0.64
INPUTS, OUTPUTS, EXAMPLES = 50, 2, 60


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


def main() -> None:
    """Run all and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--widths", type=int, nargs="+", default=[50, 200])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--steps", type=int, default=500)
    options = arguments.parse_args()
    start = time.perf_counter()
    rows = [
        experiment(width, seed, options.steps)
        for width in bar(options.widths, "widths")
        for seed in options.seeds
    ]
    print("loss after descent over that before")
    print("  ".join(f"{name:>14}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>14.4g}" for value in row.values()))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
