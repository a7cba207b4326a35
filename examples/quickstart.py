"""EKFAC beside tuned SGD and Adam: a small convolutional network on real digits.

    python examples/quickstart.py                # digits, under a minute
    python examples/quickstart.py --data mnist   # torchvision's MNIST, minutes

Every optimizer starts from the same weights, sees the same batches, and has its
learning rate lowered to 0 along a cosine. Each initial rate is the one of ``GRID`` with
the lowest training loss in the last epoch, mean of seeds 0 to 2; ``--tune`` repeats
that search. EKFAC's other arguments are its defaults.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "EKFAC": lambda model, lr: EKFAC(model, lr=lr),
}
GRID = {
    "SGD": (0.03, 0.1, 0.3, 1.0),
    "Adam": (0.003, 0.01, 0.03, 0.1),
    "EKFAC": (0.003, 0.01, 0.03, 0.1),
}
LEARNING_RATES = {
    "digits": {"SGD": 0.3, "Adam": 0.03, "EKFAC": 0.01},
    "mnist": {"SGD": 0.1, "Adam": 0.01, "EKFAC": 0.01},
}
EPOCHS = {"digits": 15, "mnist": 3}


@dataclass(frozen=True)
class Data:
    """Images ``[N, 1, H, W]`` and labels ``[N]``, for training and for testing."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Yield one epoch of shuffled training batches of equal size."""
        order = torch.randperm(len(self.x_train), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield [self.x_train[chosen], self.y_train[chosen]]


@dataclass
class Run:
    """The training loss and the seconds spent, after every step."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def smooth(self, window: int) -> np.ndarray:
        """Return the mean loss of the last ``window`` steps, at every step."""
        total = np.concatenate([[0.0], np.cumsum(self.losses)])
        ends = np.arange(1, len(total))
        starts = np.maximum(ends - window, 0)
        mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
        return mean


def split(x: np.ndarray, y: np.ndarray, n_train: int) -> Data:
    """Return images scaled to zero mean and unit deviation, the first for training."""
    images = torch.tensor(x, dtype=torch.float32).unsqueeze(1)
    images = (images - images[:n_train].mean()) / images[:n_train].std()
    labels = torch.tensor(y, dtype=torch.int64)
    return Data(images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])


def digits() -> Data:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, 1,437 of them to train on."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return split(x.reshape(-1, 8, 8)[order], y[order], 1437)


def read_idx(path: Path) -> np.ndarray:
    """Return the array in a gzipped file of MNIST's own format."""
    with gzip.open(path) as file:
        dimensions = file.read(4)[3]
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def mnist(folder: Path) -> Data:
    """Return MNIST from the idx files in ``folder``, else through torchvision.

    A folder with the 10,000 images of the t10k files alone gives 8,000 to train on.
    """
    parts = [part for part in ("train", "t10k") if [*folder.glob(f"{part}-*.gz")]]
    if parts:
        x = [read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in parts]
        y = [read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in parts]
    else:
        from torchvision.datasets import MNIST

        sets = [
            MNIST(str(folder), train=train, download=True) for train in (True, False)
        ]
        x = [part.data.numpy() for part in sets]
        y = [part.targets.numpy() for part in sets]
    n_train = len(x[0]) if len(x) == 2 else len(x[0]) * 4 // 5
    return split(np.concatenate(x), np.concatenate(y), n_train)


def network(size: int) -> nn.Module:
    """Return two convolutions and two linear layers for images of ``size`` pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, stride=1 if size < 16 else 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(
    name: str, learning_rate: float, data: Data, args: argparse.Namespace, seed: int
) -> Run:
    """Return the record of one training run."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    model = network(data.x_train.shape[-1])
    optimizer = OPTIMIZERS[name](model, learning_rate)
    run = Run(name)
    steps = args.epochs * (len(data.x_train) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, desc=f"{name:6s} lr={learning_rate:g}", unit="step") as bar:
        for _ in range(args.epochs):
            for x, y in data.batches(args.batch_size, shuffle):
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                schedule.step()
                spent = time.perf_counter() - start
                run.losses.append(loss.item())
                run.seconds.append((run.seconds or [0.0])[-1] + spent)
                bar.set_postfix(loss=f"{run.losses[-1]:.4f}", refresh=False)
                bar.update()
    with torch.no_grad():
        right = model(data.x_test).argmax(1) == data.y_test
    run.accuracy = right.double().mean().item()
    return run


def tune(data: Data, args: argparse.Namespace) -> None:
    """Print the last epoch's training loss of every learning rate of the grid."""
    epoch = len(data.x_train) // args.batch_size
    rows = []
    for name, rates in GRID.items():
        for rate in rates:
            runs = [train(name, rate, data, args, seed) for seed in range(3)]
            loss = np.mean([run.smooth(epoch)[-1] for run in runs])
            accuracy = np.mean([run.accuracy for run in runs])
            rows.append(f"{name:10s} {rate:>8g} {loss:>12.3g} {accuracy:>14.4f}")
    print("\noptimizer        lr   train loss  test accuracy", *rows, sep="\n")


def print_table(runs: list[Run], rates: dict[str, float], epoch: int) -> None:
    """Print each run's end, and when it passed the best end of the baselines."""
    target = min(run.smooth(epoch)[-1] for run in runs if run.name != "EKFAC")
    heading = (
        f"{'optimizer':10s} {'lr':>8s} {'ms/step':>8s} {'seconds':>8s} "
        f"{'train loss':>11s} {'test accuracy':>14s} "
        f"{'steps to ' + format(target, '.4f'):>16s} {'seconds':>8s}"
    )
    print(f"\n{heading}\n{'-' * len(heading)}")
    for run in runs:
        smooth, spent = run.smooth(epoch), run.seconds[-1]
        passed = np.flatnonzero(smooth <= target)
        when = (
            f"{passed[0] + 1:>16d} {run.seconds[passed[0]]:>8.2f}"
            if len(passed)
            else f"{'-':>16s} {'-':>8s}"
        )
        print(
            f"{run.name:10s} {rates[run.name]:>8g} {1e3 * spent / len(smooth):>8.1f} "
            f"{spent:>8.2f} {smooth[-1]:>11.5f} {run.accuracy:>14.4f} {when}"
        )


def plot(runs: list[Run], epoch: int, path: Path, title: str) -> None:
    """Draw the training loss over steps and over seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        smooth = run.smooth(epoch)
        left.plot(range(1, len(smooth) + 1), smooth, label=run.name)
        right.plot(run.seconds, smooth, label=run.name)
    left.set(xlabel="step", ylabel="training loss, mean of an epoch", yscale="log")
    left.set_ylim(bottom=max(left.get_ylim()[0], 1e-6))  # below it: rounding
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
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--epochs", type=int, help="default: 15 (digits), 3 (mnist)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="search the grid instead")
    parser.add_argument("--quick", action="store_true", help="one epoch, to try it")
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args()
    args.epochs = 1 if args.quick else args.epochs or EPOCHS[args.data]
    return args


def main() -> None:
    """Train with every optimizer, print the table and save the figure."""
    args = parse()
    data = digits() if args.data == "digits" else mnist(args.data_dir)
    print(
        f"{args.data}: {len(data.x_train):,} training images, "
        f"{len(data.x_test):,} test images, {args.epochs} epochs"
    )
    if args.tune:
        tune(data, args)
        return
    rates, epoch = LEARNING_RATES[args.data], len(data.x_train) // args.batch_size
    runs = [train(name, rates[name], data, args, args.seed) for name in OPTIMIZERS]
    print_table(runs, rates, epoch)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quickstart.png"
    plot(runs, epoch, path, f"A small convolutional network on {args.data}")
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    main()
