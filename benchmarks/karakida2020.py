"""Karakida, Akaho & Amari 2020, Figures 3, 4, 6 and 7: spectra of random networks.

    python benchmarks/karakida2020.py                # in full, half an hour of one core
    python benchmarks/karakida2020.py --figures 3 4
    python benchmarks/karakida2020.py --quick        # few small networks

Every measured number is of the exact matrix, by its dual; every predicted one is the
document's formula with its misprints corrected (see
``ekfac.diagnostics.papers.karakida``).
What was measured of each network is kept in a folder, so that an interrupted run goes
on where it was. The document has no tables and no numbers of results: "reported" below
is what its text says of the figures. Results are discussed in
``benchmarks/karakida2020.md``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import parser, print_seconds, save, table
from karakida2020_figures import draw_3, draw_4, draw_6, draw_7
from karakida2020_tables import table_3, table_4, table_6, table_7
from torch import Tensor, nn
from tqdm import tqdm

import ekfac
from ekfac.diagnostics import dual
from ekfac.diagnostics.papers.karakida import (
    MeanField,
    feature_metric,
    mean_field_theory,
    softmax_moments,
    softmax_prediction,
)
from ekfac.diagnostics.tangent_kernel.alignment import centred

ACTIVATIONS: dict[str, tuple[type[nn.Module], float, float]] = {
    "tanh": (nn.Tanh, 3.0, 0.64),
    "ReLU": (nn.ReLU, 2.0, 0.1),
    "linear": (nn.Identity, 1.0, 0.1),
}
DEPTH = 3
Measured = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """One kind of network.

    Attributes:
        name: Of its file of measurements.
        activation: A key of ``ACTIVATIONS``.
        width: ``M``, of inputs and hidden layers.
        outputs: ``C``.
        examples: ``N``.
        networks: How many are drawn.
        variances: Of weights and biases. Default: the activation's.
    """

    name: str
    activation: str
    width: int
    outputs: int
    examples: int
    networks: int
    variances: tuple[float, float] | None = None

    def initial(self) -> tuple[float, float]:
        """Return the variances of weights and biases."""
        return self.variances or ACTIVATIONS[self.activation][1:]

    @functools.lru_cache  # noqa: B019  (settings live as long as the run)
    def theory(self) -> MeanField:
        """Return the order parameters."""
        weight, bias = self.initial()
        widths = [self.width] * DEPTH + [self.outputs]
        function = ACTIVATIONS[self.activation][0]()
        return mean_field_theory(
            function, widths, weight_variance=weight, bias_variance=bias
        )

    def draw(self, seed: int) -> tuple[nn.Sequential, Tensor]:
        """Return a network and its inputs."""
        generator = torch.Generator().manual_seed(seed)
        weight, bias = self.initial()
        layers: list[nn.Module] = []
        for out in [self.width] * (DEPTH - 1) + [self.outputs]:
            linear = nn.Linear(self.width, out)
            nn.init.normal_(
                linear.weight, std=(weight / self.width) ** 0.5, generator=generator
            )
            nn.init.normal_(linear.bias, std=bias**0.5, generator=generator)
            layers += [linear, ACTIVATIONS[self.activation][0]()]
        x = torch.randn(self.examples, self.width, generator=generator)
        return nn.Sequential(*layers[:-1]), x


class Scaled(nn.Module):
    """Multiplies by a constant: with standard normal weights after it, the NTK's."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled input."""
        return self.factor * x


def as_kernel(model: nn.Sequential, setting: Setting) -> nn.Sequential:
    """Return the network in the parametrisation of the tangent kernel, no biases."""
    factor = (setting.initial()[0] / setting.width) ** 0.5
    layers: list[nn.Module] = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            free = nn.Linear(layer.in_features, layer.out_features, bias=False)
            free.weight = nn.Parameter(layer.weight.detach() / factor)
            layers += [Scaled(factor), free]
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


# -- what is measured of a network -----------------------------------------------------


def regression(setting: Setting, seed: int) -> Measured:
    """Return the eigenvalues of ``F`` and of its block of the second layer."""
    found = dual(*setting.draw(seed), "gaussian")
    return {
        "whole": found.spectrum().values,
        "block": found.layer_spectra()["2"].values,
        "size": torch.tensor([found.size, found.sizes["2"]]),
    }


def classification(setting: Setting, seed: int) -> Measured:
    """Return the eigenvalues of ``F_cross``, its second block, ``Q``, and of ``F``."""
    model, x = setting.draw(seed)
    found, linear = dual(model, x), dual(model, x, "gaussian")
    g = found.outputs.softmax(dim=1)
    Q = torch.diag_embed(g) - g.unsqueeze(2) * g.unsqueeze(1)
    return {
        "whole": found.spectrum().values,
        "block": found.layer_spectra()["2"].values,
        "Q": torch.linalg.eigvalsh(Q).flatten(),
        "linear": linear.spectrum().values[: setting.outputs],
        "mean_Q": softmax_moments(g).mean_values,
    }


def moments(setting: Setting, seed: int) -> Measured:
    """Return mean, second moment and maximum of ``F_cross``, and the predicted ones."""
    found = dual(*setting.draw(seed))
    spectrum = found.spectrum()
    theory = softmax_prediction(setting.theory(), found.outputs.softmax(dim=1))
    return {
        "measured": torch.tensor(
            [spectrum.mean, spectrum.second_moment, spectrum.maximum]
        ),
        "predicted": torch.tensor(
            [theory.mean, theory.second_moment, theory.lower, theory.upper]
        ),
    }


def kernels(setting: Setting, seed: int) -> Measured:
    """Return the eigenvalues of the tangent kernel, as it is and mean-subtracted."""
    model, x = setting.draw(seed)
    kernel = ekfac.ntk(as_kernel(model, setting), x).to_dense()
    result = {"plain": torch.linalg.eigvalsh(kernel).flip(0)}
    if "N = M" in setting.name:
        kernel = centred(kernel, setting.outputs, "examples")
        result["centred"] = torch.linalg.eigvalsh(kernel).flip(0)
    return result


def metrics(setting: Setting, seed: int) -> Measured:
    """Return the eigenvalues of ``A`` and ``A^00``, of regression and of softmax."""
    model, x = setting.draw(seed)
    result = {}
    for likelihood in ("gaussian", "categorical"):
        found = feature_metric(model, x, likelihood)
        result[f"{likelihood} whole"] = found.spectrum().values
        result[f"{likelihood} input"] = found.layer_spectra()["0"].values
    return result


def settings(args: argparse.Namespace) -> dict[str, list[Setting]]:
    """Return the settings of every figure."""
    quick = args.quick
    count, many = (2, 2) if quick else (100, 400)
    small, large, classes = (20, 40, 3) if quick else (200, 1000, 10)
    widths = (20, 40) if quick else (50, 100, 200, 400, 1000)
    sizes = (20, 40) if quick else (100, 300, 1000)
    relu = (2.0, 0.0)
    n = 20 if quick else 100
    top = sizes[-1]
    return {
        "3a": [Setting("3a", "tanh", small, classes, n, count)],
        "3b": [Setting("3b", "tanh", large, classes, n, count)],
        "4": [
            Setting(f"4 {name} {width}", name, width, classes, n, count)
            for name in ACTIVATIONS
            for width in widths
        ],
        "6": [
            Setting(f"6 N = {size}", "ReLU", top, 2, size, many, relu)
            for size in (10, *sizes[:-1])
        ]
        + [
            Setting(f"6 N = M = {size}", "ReLU", size, 2, size, many, relu)
            for size in sizes
        ],
        "7": [
            Setting("7", "tanh", 20 if quick else 500, classes, 10 * n, count),
        ],
    }


MEASURES: dict[str, Callable[[Setting, int], Measured]] = {
    "3a": regression,
    "3b": classification,
    "4": moments,
    "6": kernels,
    "7": metrics,
}


def measured(setting: Setting, figure: str, folder: Path, limit: int) -> list[Measured]:
    """Return the measurements of a setting's networks, old ones from the disk.

    Args:
        setting: The setting.
        figure: Key of ``MEASURES``.
        folder: Where they are kept.
        limit: No more networks are measured once there are as many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{setting.name}.pt"
    found: list[Measured] = torch.load(path) if path.exists() else []
    missing = range(len(found), min(limit, setting.networks))
    for seed in tqdm(missing, desc=setting.name, leave=False, disable=not missing):
        result = MEASURES[figure](setting, seed)
        found.append({k: v.detach().clone() for k, v in result.items()})
        if seed % 10 == 9 or seed == missing[-1]:
            torch.save(found, path)
    return found[: setting.networks]


TABLES = {"3": table_3, "4": table_4, "6": table_6, "7": table_7}
DRAWINGS = {"3": draw_3, "4": draw_4, "6": draw_6, "7": draw_7}
REPORTED = {
    "3": "two populations in F and F^22, the upper one the C largest eigenvalues "
    "around the prediction; F_cross with C largest eigenvalues widely spread",
    "4": "mean, second moment and maximum coincide with the theory at sufficiently "
    "large widths, the maximum between its bounds",
    "6": "with N most eigenvalues concentrate near 0 and outliers remain; mean-"
    "subtracted with N = M the spectrum stays O(1) and converges",
    "7": "A and A^00 are pathological as predicted; softmax spreads the outliers",
}


def main() -> None:
    """Measure, print what was reported beside what was measured, save and draw."""
    arguments = parser(__doc__)
    arguments.add_argument("--figures", nargs="+", default=list(TABLES))
    arguments.add_argument(
        "--limit", type=int, default=400, help="of networks for each setting"
    )
    args = arguments.parse_args()
    torch.set_num_threads(1)  # results follow from the seeds digit by digit
    folder = args.output / ("networks-quick" if args.quick else "networks")
    results: dict[str, Any] = {}
    shown: dict[str, tuple[Any, Any]] = {}
    for figure in args.figures:
        chosen, found = {}, {}
        for key, members in settings(args).items():
            if not key.startswith(figure):
                continue
            for setting in members:
                chosen[setting.name] = setting
                found[setting.name] = measured(
                    setting, key, folder / figure, args.limit
                )
        rows = TABLES[figure](found, chosen)
        count = {name: len(values) for name, values in found.items()}
        each = min(count.values()), max(count.values())
        print(f"\nFigure {figure}, {each[0]} to {each[1]} networks each")
        print(f"reported: {REPORTED[figure]}\nmeasured:\n{table(rows)}")
        # What was not predicted has no place in JSON as a number.
        kept = [{k: v if v == v else None for k, v in row.items()} for row in rows]
        results[figure] = {"networks": count, "rows": kept}
        shown[figure] = (found, chosen)
    figure_, axes = plt.subplots(
        len(shown),
        4,
        figsize=(16, 3.6 * len(shown)),
        layout="constrained",
        squeeze=False,
    )
    for line, (figure, (found, chosen)) in zip(axes, shown.items(), strict=True):
        DRAWINGS[figure](line, found, chosen)
    print_seconds()
    save(args.output, "karakida2020", results, figure_)


if __name__ == "__main__":
    main()
