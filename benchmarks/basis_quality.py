"""Figure 2 of George et al. 2018: what a layer's eigenbasis does to its gradients.

A small convolutional network learns scikit-learn's digits with EKFAC. At the start and
after some epochs every layer's curvature stands beside the exact empirical Fisher
block: mean correlation of the gradients' coordinates as parameters and in the
eigenbasis, and the errors of K-FAC's and EKFAC's matrices.

    python benchmarks/basis_quality.py          # one thread, three seeds
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import basis_quality

PANELS = (
    (
        "mean correlation of gradients",
        ("correlation", "as parameters"),
        ("basis_correlation", "in the eigenbasis"),
    ),
    (
        "distance from the exact block",
        ("kfac_error", "K-FAC"),
        ("ekfac_error", "EKFAC"),
    ),
    (
        "distance from its spectrum",
        ("kfac_spectrum", "K-FAC"),
        ("ekfac_spectrum", "EKFAC"),
    ),
)
FIELDS = tuple(field for _, *pair in PANELS for field, _ in pair)


def network() -> nn.Sequential:
    """Return two convolutions and two linear layers, at most 650 weights each."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def measured(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    """Return the quality of each layer's curvature, estimated on the same examples."""
    data = [(x, y)]
    optimizer = ekfac.EKFAC(model, lr=0.0, scaling="per_example", fisher="empirical")
    cross_entropy(model(x), y).backward()
    optimizer.step()
    model.zero_grad()
    found = {}
    for name, layer in optimizer.curvature.items():
        block = ekfac.fisher(
            model, data, "dense", "empirical", parameters=layer.parameter_names
        ).to_dense()
        quality = basis_quality(layer, block)
        found[name] = {field: getattr(quality, field) for field in FIELDS}
    optimizer.close()
    return found


def trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train with EKFAC."""
    with ekfac.EKFAC(model, lr=1e-3) as optimizer:
        for _ in range(epochs):
            for index in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()


def figure_of(runs: list[dict[str, Any]]) -> Figure:
    """Return all seeds by layer, of the record's runs."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for (title, *pair), ax in zip(PANELS, axes, strict=True):
        for number, (field, label) in enumerate(pair):
            for place, each in enumerate(runs):
                values = [run[field] for run in each["runs"]]
                shifted = [place + 0.3 * number] * len(values)
                ax.plot(shifted, values, "o", color=f"C{number}", label=label)
                label = None
        names = [f"{each['stage']}\n{each['layer']}" for each in runs]
        ax.set_xticks(range(len(names)), names, fontsize=7)
        ax.set(title=title, xlabel="stage and layer")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=8)
    return figure


def main() -> None:
    """Run all seeds; print means with their spread and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=10)
    args = arguments.parse_args()
    count = 500
    if args.quick:
        args.seeds, args.epochs, count = [0], 1, 40
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in bar(args.seeds, "seeds"):
        torch.manual_seed(seed)
        model = network()
        for stage in ("start", "trained"):
            if stage == "trained":
                trained(model, x, y, args.epochs)
            for name, numbers in measured(model, x[:count], y[:count]).items():
                found.setdefault((stage, name), []).append(numbers)
    rows = [
        {"stage": stage, "layer": name}
        | {field: spread([run[field] for run in each]) for field in FIELDS}
        for (stage, name), each in found.items()
    ]
    print(table(rows))
    print_seconds()
    runs = [{"stage": s, "layer": n, "runs": each} for (s, n), each in found.items()]
    save(args.output, "basis_quality", {"rows": rows, "runs": runs}, figure_of(runs))


if __name__ == "__main__":
    main()
