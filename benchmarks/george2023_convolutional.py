"""George 2023 on convolutional networks: VGG and ResNet at small width.

    python benchmarks/george2023_convolutional.py --data-dir CIFAR      # three seeds
    python benchmarks/george2023_convolutional.py --quick               # digits
    python benchmarks/george2023_convolutional.py --parts scales        # printed alone

The thesis has VGG19, VGG11 and ResNet18 on CIFAR-10. Here a VGG of four convolutions
and a ResNet of two blocks, 8 and 16 channels, without normalisation, started as
appendix A.3 says, learn 500 images of CIFAR-10 averaged to 16 x 16 (the digits of
scikit-learn without it), SGD with momentum 0.9, rate 0.01, batch 50:

- Figures 6.2 and 6.3 (E6.3, E6.4): spectrum of the centred tangent kernel of 40 images
  and its alignment with the labels over 600 steps, without and with half of the labels
  drawn at random;
- Figure 5.2 (E5.3): the ResNet with 15 % wrong labels among 150 images, ordinary and
  lazy (``alpha = 100``, rate 0.05), compared at equal loss of the clean examples;
- Figure B.1 (E6.9): change of the outputs along singular vectors of the Jacobian;
- appendix A.3: scale of the outputs of ResNets of 2, 8 and 32 blocks at the start.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import bar, parser, print_seconds, save, split, spread, table
from common import digits as labelled_digits
from george2023_parts import Images, alignment, lazy, noisy_labels, spearman
from george2023_small import perturbation
from through_training import Residual
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ekfac.diagnostics.papers.george import (
    compare_at_equal_loss,
    initialise_residual_,
)

LEVELS = (1.75, 1.5, 1.25)


def load(folder: Path, count: int) -> Images:
    """Return images of CIFAR-10 at 16 x 16 pixels, or digits; ``[N, C, H, W]``."""
    archives = sorted(folder.glob("cifar10*.npz"))
    if not archives:
        data = labelled_digits()
        x, x_test, y, y_test = data.x_train, data.x_test, data.y_train, data.y_test
        return Images("digits, 8 x 8", x[:count], y[:count], x_test, y_test)
    with np.load(archives[0]) as archive:
        size = count + 500
        images = torch.from_numpy(archive["x_train"][:size]).permute(0, 3, 1, 2)
        labels = archive["y_train"][:size]
    small = avg_pool2d(images.float(), 2).numpy()
    data = split(small, labels, count)
    x, x_test = data.x_train.squeeze(1), data.x_test.squeeze(1)
    return Images("CIFAR-10, 16 x 16", x, data.y_train, x_test, data.y_test)


class Widening(nn.Module):
    """A residual block that halves the image, with a convolution beside."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(d_in, d_out, 3, stride=2, padding=1)
        self.last = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.skip = nn.Conv2d(d_in, d_out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, d_out, H / 2, W / 2]``."""
        return torch.relu(self.skip(x) + self.last(torch.relu(self.first(x))))


def vgg(x: Tensor, seed: int, *, width: int = 8) -> nn.Module:
    """Return four convolutions in two stages and two linear layers."""
    torch.manual_seed(seed)
    stages: list[nn.Module] = []
    d_in = x.shape[1]
    for d_out in (width, 2 * width):
        for side in (d_in, d_out):
            stages += [nn.Conv2d(side, d_out, 3, padding=1), nn.ReLU()]
        stages.append(nn.MaxPool2d(2))
        d_in = d_out
    features = nn.Sequential(*stages, nn.Flatten())
    size = features(x[:1]).shape[1]
    model = nn.Sequential(features, nn.Linear(size, 32), nn.ReLU(), nn.Linear(32, 10))
    initialise_residual_(model, x[:8])
    return model


def resnet(x: Tensor, seed: int, *, width: int = 8, blocks: int = 1) -> nn.Module:
    """Return residual blocks at one size, and one that widens."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(x.shape[1], width, 3, padding=1),
        nn.ReLU(),
        *[Residual(width) for _ in range(blocks)],
        Widening(width, 2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )
    last = [f"{2 + block}.last" for block in range(blocks + 1)]
    initialise_residual_(model, x[:8], last=last)
    return model


def row(case: str, quantity: str, reported: str, values: list[float]) -> dict[str, str]:
    """Return a line of the table."""
    line = {"case": case, "quantity": quantity, "reported": reported}
    return line | {"measured": spread(values)}


NETWORKS = {"VGG": vgg, "ResNet": resnet}


def over(key: str, of: Callable[[list[float]], float]) -> Callable[[Any], float]:
    """Return what divides a quantity of a run's curve by its first value."""
    return lambda run: of(run[key]) / run[key][0]


# Quantity, what is reported, and how a run says it; of Figures 6.2 to 6.4.
KERNELS: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ("training accuracy at the end", "1", lambda run: run["accuracy, training"][-1]),
    ("largest eigenvalue, most over start", "> 100", over("largest", max)),
    ("mean eigenvalue, most over start", "> 100", over("mean", max)),
    (
        "effective rank, least over start",
        "< 0.1, half random < 0.2",
        over("effective rank", min),
    ),
    ("effective rank, end over start", "-", over("effective rank", lambda v: v[-1])),
    ("top 4 % of eigenvalues, most", "> 0.7", lambda run: max(run["top 4 %"])),
    ("test alignment, most over start", "increases", over("test", max)),
    (
        "inner layers' alignment, most",
        "> 0.5",
        lambda run: max(list(run["layers"].values())[:-1]),
    ),
    ("last layer's alignment", "lower", lambda run: list(run["layers"].values())[-1]),
    (
        "first over second half's alignment, end",
        "half random < 1",
        lambda run: run["difficult"][-1] / run["easy"][-1],
    ),
    (
        "rank correlation of effective rank and test accuracy",
        "half random < 0",
        lambda run: spearman(run["effective rank"], run["accuracy"]),
    ),
    (
        "test over training alignment, most of each",
        "half random > 1",
        lambda run: 2 * max(run["test"]) / max(training(run)),
    ),
)


def training(run: Any) -> list[float]:
    """Return the summed alignments of both kinds of training images, by step."""
    return [a + b for a, b in zip(run["easy"], run["difficult"], strict=True)]


def kernels(images: Images, args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Return rows on spectrum and alignment, and the runs (Figures 6.2 to 6.4)."""
    points = (0, 5) if args.quick else (0, 30, 100, 200, 400, 600)
    size = 10 if args.quick else 40
    rows, runs = [], {}
    for name, make in NETWORKS.items():
        for share in (0.0, 0.5):
            options: dict[str, Any] = {"lr": 0.01, "share": share, "batch": 50}
            each = [
                alignment(make(images.x, s), images, s, points, size=size, **options)
                for s in args.seeds
            ]
            case = f"{name}, {share:.0%} random"
            runs[case] = each
            rows += [
                row(case, quantity, reported, [of(run) for run in each])
                for quantity, reported, of in KERNELS
            ]
    return rows, runs


def regimes(images: Images, args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Return rows on wrong labels in both regimes (Figure 5.2)."""
    count, limit = (60, 10) if args.quick else (150, 600)
    levels = [2.5, 2.4] if args.quick else list(LEVELS)
    differences, runs = [], []
    for seed in bar(args.seeds, "seeds"):
        x, y, groups = noisy_labels(images, seed, count)
        found = {
            alpha: lazy(
                resnet(x, seed), x, y, groups, alpha=alpha, lr=lr, seed=seed,
                stop=levels[-1] * 0.98, reference="clean", limit=limit, batch=50,
            )
            for alpha, lr in ((1.0, 0.01), (100.0, 0.05))
        }  # fmt: skip
        equal = compare_at_equal_loss(found[1.0][0], found[100.0][0], levels)
        differences.append(equal.difference["noisy"].tolist())
        runs.append({str(alpha): run[1] for alpha, run in found.items()})
    rows = [
        row(
            "ResNet, 15 % wrong",
            f"wrong labels' loss, ordinary - lazy, at {level:g}",
            "> 0",
            [line[place] for line in differences],
        )
        for place, level in enumerate(levels)
    ]
    rows += [
        row(
            f"ResNet, alpha {float(alpha):g}",
            f"{key} as at the start, end",
            reported,
            [run[alpha][key][-1] for run in runs],
        )
        for alpha, reported in (("1.0", "falls"), ("100.0", "1"))
        for key in ("kernel", "signs", "representation")
    ]
    return rows, {"differences": differences, "linearity": runs}


def directions(images: Images, args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Return rows on the change of the outputs along directions (Figure B.1)."""
    steps = 2 if args.quick else 200
    rows, runs = [], {}
    for name, make in NETWORKS.items():
        each = [perturbation(make(images.x, s), images, s, steps) for s in args.seeds]
        runs[name] = each
        rows += [
            row(
                name,
                f"change along {kind} over random directions",
                "random: almost none",
                [run[kind] / run["random"] for run in each],
            )
            for kind in ("top 10", "41 to 50")
        ]
    return rows, runs


def scales(images: Images, args: argparse.Namespace) -> tuple[list[Any], Any]:
    """Return rows on the outputs' scale at the start (appendix A.3)."""
    rows, runs = [], {}
    for blocks in (2, 4) if args.quick else (2, 8, 32):
        for way in ("A.3", "He", "torch"):
            deviations = []
            for seed in bar(args.seeds, "seeds"):
                model = resnet(images.x, seed, blocks=blocks - 1)
                torch.manual_seed(seed)
                for layer in model.modules():
                    if not isinstance(layer, nn.Conv2d | nn.Linear) or way == "A.3":
                        continue
                    layer.reset_parameters()
                    if way == "He":
                        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                        assert layer.bias is not None
                        nn.init.zeros_(layer.bias)
                with torch.no_grad():
                    deviations.append(float(model(images.x[:100]).std()))
            runs[f"{blocks} blocks, {way}"] = deviations
            case = f"ResNet of {blocks} blocks, {way}"
            rows.append(row(case, "deviation of the first outputs", "-", deviations))
    return rows, runs


PARTS = {
    "kernels": kernels,
    "regimes": regimes,
    "directions": directions,
    "scales": scales,
}


def main() -> None:
    """Run the parts; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--parts", nargs="+", choices=list(PARTS), default=[*PARTS])
    args = arguments.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]
    torch.set_num_threads(1)
    images = load(args.data_dir, 100 if args.quick else 500)
    saved: dict[str, Any] = {}
    for name in bar(args.parts, "parts"):
        start = time.process_time()
        rows, saved[name] = PARTS[name](images, args)
        print(f"\n{name}, {images.name}, seeds {args.seeds}\n{table(rows)}")
        print(f"{time.process_time() - start:.0f} s", flush=True)
    print_seconds()
    if "kernels" not in saved:
        return
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for ax, key, title in zip(
        axes,
        ("effective rank", "largest", "test"),
        ("effective rank", "largest eigenvalue", "alignment with test labels"),
        strict=True,
    ):
        for number, (case, each) in enumerate(saved["kernels"].items()):
            for seed, run in enumerate(each):
                label = case if seed == 0 else None
                values = [value / run[key][0] for value in run[key]]
                ax.plot(run["steps"], values, color=f"C{number}", label=label, lw=1)
        ax.set(title=f"{title}, over the start's", xlabel="step", yscale="log")
    axes[0].legend(fontsize=8)
    results = {"data": images.name, "seeds": args.seeds, **saved}
    save(args.output, "george2023_convolutional", results, figure)


if __name__ == "__main__":
    main()
