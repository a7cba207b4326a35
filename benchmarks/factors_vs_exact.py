"""What may be read off Kronecker factors, and what may not.

    python benchmarks/factors_vs_exact.py --data-dir data     # MNIST in data/*.gz
    python benchmarks/factors_vs_exact.py --quick

The Fisher matrix of a classifier on the same images, before and after training: exact,
by its dual; its blocks of single layers, exact; EKFAC; K-FAC. Statistics of the
spectra, whole and by layer. Without MNIST the digits of scikit-learn take its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, digits, has_mnist, mnist, parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import (
    Spectrum,
    dual,
    layer_spectra,
    spectrum,
)

STYLES = {
    "exact": ("black", "-"),
    "exact blocks": ("tab:green", "--"),
    "EKFAC": ("tab:blue", "-"),
    "K-FAC": ("tab:red", "-"),
}
DAMPING = 1e-3
Found = dict[str, dict[str, Spectrum]]


def network(pixels: int, width: int) -> nn.Sequential:
    """Return the classifier of Ge 2025: three hidden ReLU layers."""
    layers: list[nn.Module] = []
    for d_in in (pixels, width, width):
        layers += [nn.Linear(d_in, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def measured(model: nn.Module, x: Tensor) -> Found:
    """Return the spectra by layer (``""``: whole) and by where they come from."""
    exact = dual(model, x)
    by_layer = exact.layer_spectra()
    pooled = torch.cat([s.values for s in by_layer.values()])
    values = pooled.sort(descending=True).values
    found: Found = {"": {"exact": exact.spectrum()}}
    found[""]["exact blocks"] = Spectrum(values, exact.size, "approximation")
    found |= {name: {"exact": own} for name, own in by_layer.items()}
    for label, structure in (("EKFAC", "ekfac"), ("K-FAC", "kfac")):
        matrix = ekfac.fisher(model, [(x, None)], structure)
        found[""][label] = spectrum(matrix)
        for name, own in layer_spectra(matrix).items():
            found[name][label] = own
    return found


def rows_of(when: str, found: Found) -> list[dict[str, Any]]:
    """Return the rows of one moment of training."""
    rows = []
    for layer, spectra in found.items():
        for label, own in spectra.items():
            row: dict[str, Any] = {"matrix": label, "of": layer or "whole"}
            row |= {"network": when, "trace": own.trace, "maximum": own.maximum}
            row |= {f"{k}.": float(own.values[k - 1]) for k in (2, 10)}
            row |= {f"T_{k}": own.trace_ratio(k) for k in (10, 100)}
            row["erank"] = own.effective_rank
            row["2nd moment"] = own.second_moment
            row["d_eff"] = own.effective_dimension(DAMPING)
            rows.append(row)
    return rows


def train(model: nn.Module, data: Any, epochs: int, seed: int) -> float:
    """Train by SGD with momentum and return the test accuracy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    for _ in bar(range(epochs), "epochs"):
        for x, y in data.batches(128, generator):
            optimizer.zero_grad()
            cross_entropy(model(x.flatten(1)), y).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        guesses = model(data.x_test.flatten(1)).argmax(dim=1)
    return float((guesses == data.y_test).double().mean())


def figure_of(name: str, moments: Mapping[str, Found]) -> Figure:
    """Return the figure: spectra before and after, and the trace ratio."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    for axis, (when, found) in zip(axes, moments.items(), strict=False):
        for label, own in found[""].items():
            own.plot(axis, label=label)
            colour, style = STYLES[label]
            axis.lines[-1].set(color=colour, linestyle=style)
        axis.set(title=when, xlim=(1, 3000), ylim=(1e-7, None))
        axis.legend()
    ks = range(1, 301)
    for when, width in (("initial", 0.8), ("trained", 2.0)):
        for label, own in moments[when][""].items():
            colour, style = STYLES[label]
            ratios = [own.trace_ratio(k) for k in ks]
            text = label if when == "trained" else None
            axes[2].plot(ks, ratios, color=colour, ls=style, lw=width, label=text)
    axes[2].set(title="share of the trace in the k largest (thin: initial)")
    axes[2].set(xlabel="k", ylabel="T_k", ylim=(0, 1.02))
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    figure.suptitle(f"The Fisher matrix and its Kronecker factors, {name}")
    return figure


def run(args: argparse.Namespace) -> tuple[str, float, dict[str, Found]]:
    """Measure before and after training."""
    on_mnist = has_mnist(args.data_dir) and not args.quick
    data = mnist(args.data_dir) if on_mnist else digits()
    torch.manual_seed(args.seed)
    model = network(data.x_train[0].numel(), args.width)
    x = data.x_test[: args.examples].flatten(1)
    moments = {"initial": measured(model, x)}
    accuracy = train(model, data, args.epochs, args.seed)
    moments["trained"] = measured(model, x)
    return "MNIST" if on_mnist else "digits", accuracy, moments


def main() -> None:
    """Run the comparison, print the table, save both."""
    arguments = parser(__doc__)
    arguments.add_argument("--examples", type=int, default=200)
    arguments.add_argument("--width", type=int, default=256)
    arguments.add_argument("--epochs", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    if args.quick:
        args.examples, args.width, args.epochs = 40, 32, 4
    name, accuracy, moments = run(args)
    rows = [row for when, found in moments.items() for row in rows_of(when, found)]
    print(f"{name}, {args.examples} images, test accuracy {accuracy:.3f}")
    print(f"d_eff: effective dimension at damping {DAMPING:g}\n{table(rows)}")
    results = {"data": name, "accuracy": accuracy, "rows": rows}
    save(args.output, "factors_vs_exact", results, figure_of(name, moments))


if __name__ == "__main__":
    main()
