"""Theorems of Karakida et al. 2020 that Figures 3 to 7 do not show, on random networks.

    python benchmarks/karakida2020_theorems.py      # one thread, five seeds

Networks of three linear maps, 100 examples, tanh (3, 0.64) and ReLU (2, 0.1), exact
spectra by the dual. Widths 100 to 800, two outputs: exponents of the mean, the second
moment and the largest eigenvalue of ``F`` (Theorem 3.1), the mean of the C largest over
the prediction, for ``F``, its layers' blocks (section 3.2) and the tangent kernel
(section 4.1, ReLU without biases), the mean squared cosine of ``E[grad f_k]`` with the
C first eigenvectors (Theorem 3.2), and ``F``'s largest eigenvalue without the outputs'
means (equation 22). As many examples as the width: the next eigenvalue beside the
bounds of equation 21. Three and five classes, width 800: which eigenvalues of
``F_cross`` are outliers (Theorem 3.4), and the inequality of equation 28.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from karakida2020 import Setting, as_kernel

import ekfac
from ekfac.diagnostics import dual

EXAMPLES = 100
EXPONENTS = {
    "mean": "-1",
    "second moment": "0",
    "largest": "1",
    "largest, N = M": "1",
    "largest without means, N = M": "0",
}


def regression(setting: Setting, seed: int) -> dict[str, float]:
    """Return what Theorems 3.1 and 3.2 are about, of one network."""
    model, x = setting.draw(seed)
    found, theory = dual(model, x, "gaussian"), setting.theory()
    values, C, n = found.spectrum(), setting.outputs, setting.examples
    predicted = theory.fisher(n)
    numbers = {
        "mean": values.mean,
        "second moment": values.second_moment,
        "largest": values.maximum,
        "mean / predicted": values.mean / predicted.mean,
        "top C / predicted": float(values.values[:C].mean()) / predicted.maximum,
    }
    layers = found.layer_spectra().values()
    for i, layer in enumerate(layers, start=1):
        top = float(layer.values[:C].mean())
        numbers[f"block {i}, top C / predicted"] = top / theory.layer(i, n).maximum
    vectors = found.top_eigenpairs(C).vectors
    gradients = found.mean_gradients()
    gradients = gradients / gradients.norm(dim=0)
    numbers["eigenspace, cosine^2"] = float((vectors.mT @ gradients).square().sum() / C)
    return numbers


def kernels(setting: Setting, seed: int) -> dict[str, float]:
    """Return statistics of the tangent kernel over the predicted ones."""
    model, x = setting.draw(seed)
    kernel = ekfac.ntk(as_kernel(model, setting), x).to_dense().double()
    values = torch.linalg.eigvalsh(kernel).flip(0)
    predicted = setting.theory().kernel(setting.examples)
    top = float(values[: setting.outputs].mean())
    return {
        "kernel, mean / predicted": float(values.mean()) / predicted.mean,
        "kernel, top C / predicted": top / predicted.maximum,
    }


def without_means(setting: Setting, seed: int) -> dict[str, float]:
    """Return the largest eigenvalue without means, and the next one's bounds."""
    model, x = setting.draw(seed)
    values = dual(model, x, "gaussian").spectrum().values
    centred = dual(model, x, "gaussian", mean_subtracted=True).spectrum()
    theory, C = setting.theory(), setting.outputs
    # alpha (kappa_1 - kappa_2), of the dual's elements over M; rho = 1.
    gap = (theory.kappa(1) - theory.kappa(2)) / setting.width
    upper = (C * gap**2 * setting.width) ** 0.5
    value = float(values[C])
    return {
        "largest, N = M": float(values[0]),
        "largest without means, N = M": centred.maximum,
        "next over lower bound, N = M": value / gap,
        "next over upper bound, N = M": value / upper,
    }


def classification(setting: Setting, seed: int) -> dict[str, float]:
    """Return the steps of the spectrum of ``F_cross``, and equation 28's ratio."""
    model, x = setting.draw(seed)
    cross = dual(model, x)
    values = cross.spectrum().values
    linear = dual(model, x, "gaussian").spectrum().values[: len(values)]
    g = cross.outputs.softmax(dim=1)
    largest = torch.linalg.eigvalsh(torch.diag_embed(g) - g[:, :, None] * g[:, None, :])
    kept = linear > 1e-6 * linear[0]
    C = setting.outputs
    return {
        "lambda_C-1 / lambda_C": float(values[C - 2] / values[C - 1]),
        "lambda_C / lambda_C+1": float(values[C - 1] / values[C]),
        "most of lambda_i(F_cross) / lambda_max(Q) lambda_i(F)": float(
            (values[kept] / (largest.max() * linear[kept])).max()
        ),
    }


def slope(widths: list[int], values: list[float]) -> float:
    """Return the exponent of the width."""
    a = torch.tensor(widths).double().log()
    b = torch.tensor(values).double().log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


def exponents(
    name: str, widths: list[int], each: list[list[dict[str, float]]]
) -> list[dict[str, str]]:
    """Return rows of exponents of the width, of networks by width and seed."""
    rows = []
    for key, reported in EXPONENTS.items():
        by_seed = zip(*[[run[key] for run in runs] for runs in each], strict=True)
        measured = spread([slope(widths, list(values)) for values in by_seed])
        row = {"network": name, "quantity": f"exponent of the width: {key}"}
        rows.append(row | {"reported": reported, "found": measured})
    return rows


def main() -> None:
    """Measure all networks; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = arguments.parse_args()
    widths, examples = [100, 200, 400, 800], EXAMPLES
    if args.quick:
        args.seeds, widths, examples = [0, 1], [20, 40], 20
    torch.set_num_threads(1)
    rows: list[dict[str, str]] = []
    saved: dict[str, Any] = {}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour in (("tanh", "tab:blue"), ("ReLU", "tab:orange")):
        each = []
        for width in bar(widths, f"{name}, widths"):
            fixed = Setting("", name, width, 2, examples, 0)
            square = Setting("", name, width, 2, width, 0)
            each.append(
                [
                    regression(fixed, seed) | without_means(square, seed)
                    for seed in args.seeds
                ]
            )
        saved[name] = {"widths": widths, "runs": each}
        rows += exponents(name, widths, each)
        last: dict[str, list[float]] = defaultdict(list)
        for number, seed in enumerate(args.seeds):
            for key, value in each[-1][number].items():
                if key not in EXPONENTS:
                    last[key].append(value)
            if name == "ReLU":
                plain = Setting("", name, widths[-1], 2, examples, 0, (2.0, 0.0))
                for key, value in kernels(plain, seed).items():
                    last[key].append(value)
            for classes in (3, 5):
                many = Setting("", name, widths[-1], classes, examples, 0)
                for key, value in classification(many, seed).items():
                    last[f"C = {classes}: {key}"].append(value)
        saved[name]["largest width"] = last
        for key, values in last.items():
            rows.append(
                {
                    "network": f"{name}, M = {widths[-1]}",
                    "quantity": key,
                    "reported": "1" if "predicted" in key or "cosine" in key else "-",
                    "found": spread(values),
                }
            )
        lines = {"largest, N = M": "o-", "largest without means, N = M": "s--"}
        for key, style in lines.items():
            values = [math.fsum(r[key] for r in runs) / len(runs) for runs in each]
            axes[0].loglog(widths, values, style, color=colour, label=f"{name}, {key}")
        for i, style in ((1, "^:"), (2, "o-"), (3, "s--")):
            key = f"block {i}, top C / predicted"
            values = [math.fsum(r[key] for r in runs) / len(runs) for runs in each]
            axes[1].plot(
                widths, values, style, color=colour, label=f"{name}, layer {i}"
            )
    axes[0].set(xlabel="width", ylabel="largest eigenvalue of F")
    axes[1].set(xlabel="width", ylabel="C largest of the block over predicted")
    axes[1].set_xscale("log")
    for ax in axes:
        ax.legend(fontsize=7)
    print(table(rows))
    print_seconds()
    save(args.output, "karakida2020_theorems", saved, figure)


if __name__ == "__main__":
    main()
