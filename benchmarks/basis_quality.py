"""Figure 2 of George et al. 2018: what a layer's eigenbasis does to its gradients.

A small convolutional network learns scikit-learn's digits with EKFAC. At the start and
after some epochs every layer's curvature stands beside the exact empirical Fisher
block: mean correlation of the gradients' coordinates as parameters and in the
eigenbasis, and the errors of K-FAC's and EKFAC's matrices. Takes a minute on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import bar
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import basis_quality

FIELDS = (
    "correlation",
    "basis_correlation",
    "kfac_error",
    "ekfac_error",
    "kfac_spectrum",
    "ekfac_spectrum",
)


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


def main() -> None:
    """Run all seeds and print means with their spread."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=10)
    options = arguments.parse_args()
    start = time.perf_counter()
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in bar(options.seeds, "seeds"):
        torch.manual_seed(seed)
        model = network()
        for stage in ("start", f"{options.epochs} epochs"):
            if stage != "start":
                trained(model, x, y, options.epochs)
            for name, found in measured(model, x[:500], y[:500]).items():
                rows.setdefault((stage, name), []).append(found)
    print(f"{'stage':<11}{'layer':<7}" + "".join(f"{name:>20}" for name in FIELDS))
    for (stage, name), found in rows.items():
        cells = []
        for field in FIELDS:
            values = [each[field] for each in found]
            spread = statistics.pstdev(values)
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        print(f"{stage:<11}{name:<7}" + "".join(f"{cell:>20}" for cell in cells))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
