"""VGG11 and residual networks without batch norm on CIFAR-10 (George 2023, 4.4.2-3).

    python examples/cifar.py --data-dir FOLDER               # VGG11, a quarter as wide
    python examples/cifar.py --data-dir FOLDER --model resnet18 --steps 300
    python examples/cifar.py --data-dir data --download --model resnet34 --width 64

FOLDER holds a ``cifar10*.npz`` (arrays ``x_train [N, 32, 32, 3]``, ``y_train``,
``x_test``, ``y_test``) or what torchvision's CIFAR10 downloads. Without either,
scikit-learn's digits stand in, enlarged to 32 x 32. ``--width 64`` is the published
network; the default fits a laptop's CPU. Initialisation: George (2023), appendix A.3.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from ekfac import EKFAC

VGG11 = (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8, "pool")
RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
WINDOW = 20  # steps over which the printed and drawn losses are averaged

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "EKFAC": lambda model, lr: EKFAC(model, lr=lr),
}
GRID = {
    "SGD": (0.003, 0.01, 0.03, 0.1),
    "Adam": (0.0003, 0.001, 0.003, 0.01),
    "EKFAC": (0.0003, 0.001, 0.003, 0.01),
}
LEARNING_RATES = {
    "vgg11": {"SGD": 0.01, "Adam": 0.001, "EKFAC": 0.001},
    "resnet18": {"SGD": 0.1, "Adam": 0.0003, "EKFAC": 0.001},
    "resnet34": {"SGD": 0.1, "Adam": 0.0003, "EKFAC": 0.001},
}


@dataclass(frozen=True)
class Data:
    """Images ``[N, 3, 32, 32]`` and labels ``[N]``, for training and for testing."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def batches(
        self, size: int, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield shuffled training batches of equal size without end."""
        while True:
            order = torch.randperm(len(self.x_train), generator=generator)
            for chosen in order.split(size):
                if len(chosen) == size:
                    yield self.x_train[chosen], self.y_train[chosen]


@dataclass
class Run:
    """The training loss and the seconds spent, after every step."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def smooth(self) -> np.ndarray:
        """Return the mean loss of the last ``WINDOW`` steps, at every step."""
        total = np.concatenate([[0.0], np.cumsum(self.losses)])
        ends = np.arange(1, len(total))
        starts = np.maximum(ends - WINDOW, 0)
        mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
        return mean


def normalised(name: str, parts: list[np.ndarray]) -> Data:
    """Return ``x_train, y_train, x_test, y_test`` as tensors, channels standardised."""
    x_train, y_train, x_test, y_test = (torch.from_numpy(part) for part in parts)
    x_train, x_test = (x.permute(0, 3, 1, 2).float() for x in (x_train, x_test))
    mean = x_train.mean((0, 2, 3), keepdim=True)
    deviation = x_train.std((0, 2, 3), keepdim=True)
    return Data(
        name,
        (x_train - mean) / deviation,
        y_train.long(),
        (x_test - mean) / deviation,
        y_test.long(),
    )


def digits() -> Data:
    """Return scikit-learn's digits as 32 x 32 images of three equal channels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    small = torch.tensor(x[order].reshape(-1, 1, 8, 8), dtype=torch.float32)
    large = interpolate(small, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    images = large.permute(0, 2, 3, 1).numpy()
    labels = y[order].astype(np.int64)
    return normalised(
        "digits", [images[:1437], labels[:1437], images[1437:], labels[1437:]]
    )


def load(folder: Path, download: bool) -> Data:
    """Return CIFAR-10 from ``folder``, or the digits if it is not there."""
    archives = sorted(folder.glob("cifar10*.npz"))
    if archives:
        with np.load(archives[0]) as archive:
            names = ("x_train", "y_train", "x_test", "y_test")
            return normalised("CIFAR-10", [archive[name] for name in names])
    if not (download or (folder / "cifar-10-batches-py").is_dir()):
        print(f"no CIFAR-10 in {folder}: training on scikit-learn's digits instead")
        return digits()
    from torchvision.datasets import CIFAR10

    parts: list[np.ndarray] = []
    for train in (True, False):
        part = CIFAR10(str(folder), train=train, download=download)
        parts += [part.data, np.asarray(part.targets, dtype=np.int64)]
    return normalised("CIFAR-10", parts)


def weighted(layer: nn.Conv2d | nn.Linear, gain: float) -> nn.Conv2d | nn.Linear:
    """Return the layer with weights of variance ``gain / fan_in`` and zero biases.

    Appendix A.3: a gain of 2 after a ReLU, 1 after anything else, and 0.2 for the last
    convolution of a residual block.
    """
    nn.init.normal_(layer.weight, std=(gain / layer.weight[0].numel()) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def vgg11(width: int) -> nn.Module:
    """Return VGG11 for 32 x 32 images, ``width`` channels in its first layer."""
    layers: list[nn.Module] = []
    channels = 3
    for item in VGG11:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
            continue
        gain = 2.0 if layers else 1.0
        convolution = nn.Conv2d(channels, item * width, 3, padding=1)
        layers += [weighted(convolution, gain), nn.ReLU()]
        channels = item * width
    return nn.Sequential(*layers, nn.Flatten(), weighted(nn.Linear(channels, 10), 2.0))


class Block(nn.Module):
    """A residual block, its ReLUs before the convolutions.

    The skip connection is thus not preceded by an activation, as A.3 has it.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
        last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.first, self.last = weighted(first, 2.0), weighted(last, 0.2)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.skip = weighted(nn.Conv2d(c_in, c_out, 1, stride=stride), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, c_out, H / stride, W / stride]``."""
        residual: Tensor = self.last(self.first(x.relu()).relu())
        shortcut: Tensor = self.skip(x)
        return residual + shortcut


def resnet(blocks: tuple[int, ...], width: int) -> nn.Module:
    """Return a residual network for 32 x 32 images, ``blocks`` of them per stage."""
    layers: list[nn.Module] = [weighted(nn.Conv2d(3, width, 3, padding=1), 1.0)]
    channels = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(Block(channels, width * 2**stage, stride))
            channels = width * 2**stage
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, weighted(nn.Linear(channels, 10), 1.0))


def network(name: str, width: int) -> nn.Module:
    """Return the network of that name."""
    return vgg11(width) if name == "vgg11" else resnet(RESNETS[name], width)


def train(name: str, learning_rate: float, data: Data, args: argparse.Namespace) -> Run:
    """Return the record of one training run."""
    torch.manual_seed(args.seed)
    model = network(args.model, args.width)
    optimizer = OPTIMIZERS[name](model, learning_rate)
    batches = data.batches(args.batch_size, torch.Generator().manual_seed(args.seed))
    run, spent = Run(name), 0.0
    bar = tqdm(range(args.steps), desc=f"{name:6s} lr={learning_rate:g}", unit="step")
    for (x, y), _ in zip(batches, bar, strict=False):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        spent += time.perf_counter() - start
        run.losses.append(loss.item())
        run.seconds.append(spent)
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", refresh=False)
    with torch.no_grad():
        guesses = torch.cat([model(x).argmax(1) for x in data.x_test.split(500)])
    run.accuracy = (guesses == data.y_test).double().mean().item()
    return run


def tune(data: Data, args: argparse.Namespace) -> None:
    """Print the final training loss of every learning rate of the grid."""
    rows = []
    for name in args.optimizers:
        for rate in GRID[name]:
            run = train(name, rate, data, args)
            loss = run.smooth()[-1]
            rows.append(f"{name:10s} {rate:>8g} {loss:>12.4f} {run.accuracy:>14.4f}")
    print("\noptimizer        lr   train loss  test accuracy", *rows, sep="\n")


def print_table(runs: list[Run], rates: dict[str, float]) -> None:
    """Print each run's end, and when it passed the best end of SGD and Adam."""
    baselines = [run for run in runs if "KFAC" not in run.name]
    target = min(run.smooth()[-1] for run in baselines or runs)
    heading = (
        f"{'optimizer':10s} {'lr':>8s} {'ms/step':>8s} {'seconds':>8s} "
        f"{'train loss':>11s} {'test accuracy':>14s} "
        f"{'steps to ' + format(target, '.3f'):>15s} {'seconds':>8s}"
    )
    print(f"\n{heading}\n{'-' * len(heading)}")
    for run in runs:
        smooth, spent = run.smooth(), run.seconds[-1]
        passed = np.flatnonzero(smooth <= target)
        when = (
            f"{passed[0] + 1:>15d} {run.seconds[passed[0]]:>8.1f}"
            if len(passed)
            else f"{'-':>15s} {'-':>8s}"
        )
        print(
            f"{run.name:10s} {rates[run.name]:>8g} {1e3 * spent / len(smooth):>8.1f} "
            f"{spent:>8.1f} {smooth[-1]:>11.4f} {run.accuracy:>14.4f} {when}"
        )


def plot(runs: list[Run], path: Path, title: str) -> None:
    """Draw the training loss over steps and over seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        smooth = run.smooth()
        left.plot(range(1, len(smooth) + 1), smooth, label=run.name)
        right.plot(run.seconds, smooth, label=run.name)
    left.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--download", action="store_true", help="through torchvision")
    parser.add_argument("--model", choices=("vgg11", *RESNETS), default="vgg11")
    parser.add_argument("--width", type=int, default=16, help="first layer's channels")
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS]
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="search the grid instead")
    parser.add_argument("--quick", action="store_true", help="a few steps, to try it")
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args()
    if args.quick:
        args.steps, args.batch_size, args.width = 3, 32, 8
    return args


def main() -> None:
    """Train with every optimizer, print the table and save the figure."""
    args = parse()
    data = load(args.data_dir, args.download)
    n_train, n_test = len(data.x_train), len(data.x_test)
    print(f"{args.model} on {data.name}: {n_train:,} training, {n_test:,} test images")
    if args.tune:
        tune(data, args)
        return
    rates = LEARNING_RATES[args.model]
    runs = [train(name, rates[name], data, args) for name in args.optimizers]
    print_table(runs, rates)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"cifar_{args.model}.png"
    plot(runs, path, f"{args.model} without batch norm on {data.name}")
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    main()
