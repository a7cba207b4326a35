"""The deep auto-encoder of George (2023), section 4.4.1: KFAC and EKFAC beside others.

    python examples/autoencoder.py                # scikit-learn's digits
    python examples/autoencoder.py --data mnist   # MNIST, through torchvision
    python examples/autoencoder.py --data mnist --data-dir FOLDER_OF_IDX_GZ_FILES

Eight sigmoid layers, d-1000-500-250-30-250-500-1000-d, Xavier initialisation, batches
of 200, binary cross-entropy summed over an image's pixels and averaged over the batch.
Every optimizer gets the same seconds of training, the same weights and the same
batches. Learning rates: the best of ``GRID`` by the training loss on 8,000 images of
MNIST (``--tune``).
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from ekfac import EKFAC, KFAC

WIDTHS = (1000, 500, 250, 30, 250, 500, 1000)
BATCH_SIZE = 200
WINDOW = 20  # steps over which the printed and drawn losses are averaged

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "KFAC": lambda model, lr: KFAC(model, lr=lr, basis_interval=50),
    "EKFAC": lambda model, lr: EKFAC(
        model, lr=lr, scaling="per_example", basis_interval=50
    ),
    "EKFAC-ra": lambda model, lr: EKFAC(
        model, lr=lr, scaling="running_average", basis_interval=50
    ),
    "EKFAC-32": lambda model, lr: EKFAC(model, lr=lr, basis_interval=50, rank=32),
}
GRID = {
    "SGD": (0.003, 0.01, 0.03, 0.1),
    "Adam": (0.0003, 0.001, 0.003, 0.01),
    "KFAC": (0.003, 0.01, 0.03),
    "EKFAC": (0.003, 0.01, 0.03),
    "EKFAC-ra": (0.003, 0.01, 0.03),
    "EKFAC-32": (0.003, 0.01, 0.03),
}
LEARNING_RATES = {
    "SGD": 0.03,
    "Adam": 0.003,
    "KFAC": 0.01,
    "EKFAC": 0.01,
    "EKFAC-ra": 0.01,
    "EKFAC-32": 0.01,
}


@dataclass
class Run:
    """The training loss and the seconds spent, after every step."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    test_loss: float = float("nan")

    def smooth(self) -> np.ndarray:
        """Return the mean loss of the last ``WINDOW`` steps, at every step."""
        total = np.concatenate([[0.0], np.cumsum(self.losses)])
        ends = np.arange(1, len(total))
        starts = np.maximum(ends - WINDOW, 0)
        mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
        return mean


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits as ``[N, 64]`` in 0 to 1, split 4 to 1."""
    x, _ = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.tensor(x[order] / 16, dtype=torch.float32)
    return images[:1437], images[1437:]


def read_idx(path: Path) -> np.ndarray:
    """Return the array in a gzipped file of MNIST's own format."""
    with gzip.open(path) as file:
        dimensions = file.read(4)[3]
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """Return MNIST as ``[N, 784]`` in 0 to 1, from idx files or through torchvision.

    A folder with the 10,000 images of the t10k file alone gives 8,000 to train on.
    """
    files = [folder / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k")]
    if any(file.exists() for file in files):
        parts = [read_idx(file) for file in files if file.exists()]
    else:
        from torchvision.datasets import MNIST

        sets = [
            MNIST(str(folder), train=train, download=True) for train in (True, False)
        ]
        parts = [part.data.numpy() for part in sets]
    n_train = len(parts[0]) if len(parts) == 2 else len(parts[0]) * 4 // 5
    pixels = np.concatenate(parts).reshape(-1, 784)
    images = torch.tensor(pixels / 255, dtype=torch.float32)
    return images[:n_train], images[n_train:]


def network(pixels: int, widths: Sequence[int] = WIDTHS) -> nn.Module:
    """Return the auto-encoder; its last sigmoid is part of the loss."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise((pixels, *widths, pixels)):
        linear = nn.Linear(d_in, d_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


def reconstruction_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Return the cross-entropy summed over pixels, averaged over images."""
    logits = model(x)
    return binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def batches(x: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield shuffled batches of ``BATCH_SIZE`` without end."""
    while True:
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH_SIZE):
            if len(chosen) == BATCH_SIZE:
                yield x[chosen]


def train(
    name: str,
    learning_rate: float,
    data: tuple[Tensor, Tensor],
    args: argparse.Namespace,
) -> Run:
    """Return the record of one run of ``args.seconds``, or ``args.steps`` if sooner."""
    x_train, x_test = data
    torch.manual_seed(args.seed)
    model = network(x_train.shape[1], args.widths)
    optimizer = OPTIMIZERS[name](model, learning_rate)
    run, spent = Run(name), 0.0
    with tqdm(
        total=1.0,
        desc=f"{name:8s} lr={learning_rate:g}",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}",
    ) as bar:
        for x in batches(x_train, torch.Generator().manual_seed(args.seed)):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = reconstruction_loss(model, x)
            loss.backward()
            optimizer.step()
            spent += time.perf_counter() - start
            run.losses.append(loss.item())
            run.seconds.append(spent)
            step = len(run.losses)
            done = min(1.0, max(spent / args.seconds, step / args.steps))
            bar.set_postfix(step=step, loss=f"{run.losses[-1]:.1f}", refresh=False)
            bar.update(done - bar.n)
            if done == 1.0:
                break
    with torch.no_grad():
        run.test_loss = reconstruction_loss(model, x_test).item()
    return run


def tune(data: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Print the final training loss of every learning rate of the grid."""
    rows = []
    for name in args.optimizers:
        for rate in GRID[name]:
            run = train(name, rate, data, args)
            loss = run.smooth()[-1]
            rows.append(f"{name:10s} {rate:>8g} {len(run.losses):>8d} {loss:>12.2f}")
    print("\noptimizer        lr    steps   train loss", *rows, sep="\n")


def print_table(runs: list[Run]) -> None:
    """Print each run's end, and when it passed the best end of SGD and Adam."""
    baselines = [run for run in runs if "KFAC" not in run.name]
    target = min(run.smooth()[-1] for run in baselines or runs)
    heading = (
        f"{'optimizer':10s} {'lr':>8s} {'steps':>7s} {'ms/step':>8s} {'seconds':>8s} "
        f"{'train loss':>11s} {'test loss':>10s} "
        f"{'steps to ' + format(target, '.1f'):>15s} {'seconds':>8s}"
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
            f"{run.name:10s} {LEARNING_RATES[run.name]:>8g} {len(smooth):>7d} "
            f"{1e3 * spent / len(smooth):>8.1f} {spent:>8.1f} "
            f"{smooth[-1]:>11.2f} {run.test_loss:>10.2f} {when}"
        )


def plot(runs: list[Run], path: Path, title: str) -> None:
    """Draw the training loss over steps and over seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        smooth = run.smooth()
        left.plot(range(1, len(smooth) + 1), smooth, label=run.name)
        right.plot(run.seconds, smooth, label=run.name)
    left.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    left.set(xscale="log", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
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
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS]
    )
    parser.add_argument(
        "--seconds", type=float, default=40.0, help="for each optimizer"
    )
    parser.add_argument("--steps", type=float, default=float("inf"), help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="search the grid instead")
    parser.add_argument("--quick", action="store_true", help="four small steps")
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args()
    args.widths = WIDTHS
    if args.quick:
        args.steps, args.widths = 4, [width // 10 for width in WIDTHS]
    return args


def main() -> None:
    """Train with every optimizer, print the table and save the figure."""
    args = parse()
    data = digits() if args.data == "digits" else mnist(args.data_dir)
    print(
        f"{args.data}: {len(data[0]):,} training images, {len(data[1]):,} test images"
    )
    if args.tune:
        tune(data, args)
        return
    runs = [train(name, LEARNING_RATES[name], data, args) for name in args.optimizers]
    print_table(runs)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "autoencoder.png"
    plot(runs, path, f"Deep auto-encoder on {args.data}, batch {BATCH_SIZE}")
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    main()
