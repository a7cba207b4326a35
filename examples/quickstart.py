"""EKFAC beside tuned SGD and Adam: a deep auto-encoder of handwritten digits.

    python examples/quickstart.py                # scikit-learn's digits, under a minute
    python examples/quickstart.py --data mnist   # MNIST, minutes

Images are squeezed through twelve numbers and drawn again by eight layers without any
normalisation. The loss is badly conditioned: SGD stays where it draws the mean image,
and Adam gets out of there late. This is where to choose EKFAC: networks on which
first-order methods stay on a plateau, or whose loss has to go down far. It does not pay
for a small classifier: where every optimizer reaches a training loss near zero, the
cheapest step is the best one; nor, on a CPU, for small transformers with small batches,
where a step costs two of AdamW's (benchmarks/peers.md).

SGD and Adam take six steps for each of EKFAC's, about as many as fit into its time. All
start from the same weights, see batches in the same order, and lower their learning
rate to 0 along a cosine. The rates are those of ``GRID`` with the lowest final training
loss for one seed; ``--tune`` looks for them with seeds 0 to 2. EKFAC's other arguments
are its defaults.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import struct
import time
from collections.abc import Callable
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

from ekfac import EKFAC

OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
    "Adam": lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr),
    "EKFAC": lambda model, lr: EKFAC(model, lr=lr),
}
GRID = {
    "SGD": (0.01, 0.03, 0.1, 0.3),
    "Adam": (0.001, 0.003, 0.01, 0.03),
    "EKFAC": (0.003, 0.01, 0.03, 0.1),
}
LEARNING_RATES = {"SGD": 0.1, "Adam": 0.01, "EKFAC": 0.01}
WIDTHS = (128, 64, 32, 12, 32, 64, 128)
EPOCHS = {"digits": 20, "mnist": 5}  # of EKFAC
MORE = 6  # epochs of SGD and Adam for one of EKFAC
WINDOW = 10  # steps over which the drawn losses are averaged


@dataclass
class Run:
    """The training loss and the seconds spent, after every step; losses at the end."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: float = float("nan")
    test_loss: float = float("nan")

    def smooth(self) -> np.ndarray:
        """Return the mean loss of the last ``WINDOW`` steps, at every step."""
        ends = range(1, len(self.losses) + 1)
        return np.array([np.mean(self.losses[max(0, i - WINDOW) : i]) for i in ends])


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

    Raises:
        SystemExit: Without such files and without torchvision.
    """
    files = [folder / f"{part}-images-idx3-ubyte.gz" for part in ("train", "t10k")]
    if any(file.exists() for file in files):
        parts = [read_idx(file) for file in files if file.exists()]
    else:
        try:
            from torchvision.datasets import MNIST
        except ImportError as error:
            raise SystemExit(
                f"no *-images-idx3-ubyte.gz in {folder}, and torchvision, which would "
                "download them, is not installed: pip install torchvision, name a "
                "folder with --data-dir, or leave out --data mnist"
            ) from error
        sets = [
            MNIST(str(folder), train=train, download=True) for train in (True, False)
        ]
        parts = [part.data.numpy() for part in sets]
    n_train = len(parts[0]) if len(parts) == 2 else len(parts[0]) * 4 // 5
    pixels = np.concatenate(parts).reshape(-1, 784)
    images = torch.tensor(pixels / 255, dtype=torch.float32)
    return images[:n_train], images[n_train:]


def network(pixels: int) -> nn.Module:
    """Return the auto-encoder; its last sigmoid is part of the loss."""
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise((pixels, *WIDTHS, pixels)):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def reconstruction_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Return the cross-entropy summed over pixels, averaged over images."""
    logits = model(x)
    return binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def train(
    name: str,
    learning_rate: float,
    data: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    seed: int,
) -> Run:
    """Return the record of one training run."""
    x_train, x_test = data
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    model = network(x_train.shape[1])
    optimizer = OPTIMIZERS[name](model, learning_rate)
    run = Run(name)
    epochs = args.epochs * (1 if name == "EKFAC" else MORE)
    steps = epochs * (len(x_train) // args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, desc=f"{name:6s} lr={learning_rate:g}", unit="step") as bar:
        for _ in range(epochs):
            order = torch.randperm(len(x_train), generator=shuffle)
            for chosen in order[: steps // epochs * args.batch_size].split(
                args.batch_size
            ):
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = reconstruction_loss(model, x_train[chosen])
                loss.backward()
                optimizer.step()
                schedule.step()
                spent = time.perf_counter() - start
                run.losses.append(loss.item())
                run.seconds.append((run.seconds or [0.0])[-1] + spent)
                bar.set_postfix(loss=f"{run.losses[-1]:.2f}", refresh=False)
                bar.update()
    with torch.no_grad():
        run.train_loss = reconstruction_loss(model, x_train).item()
        run.test_loss = reconstruction_loss(model, x_test).item()
    return run


def tune(data: tuple[Tensor, Tensor], args: argparse.Namespace) -> None:
    """Print the final losses of every learning rate of the grid."""
    rows = []
    for name, rates in GRID.items():
        for rate in rates:
            runs = [train(name, rate, data, args, seed) for seed in range(3)]
            ends = [np.mean([r.train_loss for r in runs])]
            ends.append(np.mean([r.test_loss for r in runs]))
            rows.append(f"{name:10s} {rate:>8g} {ends[0]:>12.3f} {ends[1]:>10.3f}")
    print("\noptimizer        lr   train loss  test loss", *rows, sep="\n")


def print_table(runs: list[Run]) -> None:
    """Print each run's end, and when it passed the best end of the baselines."""
    target = min(run.smooth()[-1] for run in runs if run.name != "EKFAC")
    heading = (
        f"{'optimizer':10s} {'lr':>8s} {'steps':>6s} {'ms/step':>8s} {'seconds':>8s} "
        f"{'train loss':>11s} {'test loss':>10s} "
        f"{'steps to ' + format(target, '.2f'):>15s} {'seconds':>8s}"
    )
    print(f"\n{heading}\n{'-' * len(heading)}")
    for run in runs:
        smooth, spent = run.smooth(), run.seconds[-1]
        passed = np.flatnonzero(smooth <= target)
        when = (
            f"{passed[0] + 1:>15d} {run.seconds[passed[0]]:>8.2f}"
            if len(passed)
            else f"{'-':>15s} {'-':>8s}"
        )
        print(
            f"{run.name:10s} {LEARNING_RATES[run.name]:>8g} {len(smooth):>6d} "
            f"{1e3 * spent / len(smooth):>8.1f} {spent:>8.2f} "
            f"{run.train_loss:>11.2f} {run.test_loss:>10.2f} {when}"
        )


def plot(runs: list[Run], path: Path, title: str) -> None:
    """Draw the training loss over steps and over seconds."""
    figure, both = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        smooth = run.smooth()
        both[0].plot(range(1, len(smooth) + 1), smooth, label=run.name)
        both[1].plot(run.seconds, smooth, label=run.name)
    both[0].set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps")
    both[0].set(yscale="log")
    both[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    both[0].yaxis.set_major_formatter("{x:g}")
    both[0].yaxis.set_minor_locator(NullLocator())
    both[1].set(xlabel="seconds of training")
    for axes in both:
        axes.grid(alpha=0.3)
        axes.legend()
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
    parser.add_argument("--epochs", type=int, help="of EKFAC: 20 (digits), 5 (mnist)")
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
        f"{args.data}: {len(data[0]):,} training images, {len(data[1]):,} test images"
    )
    if args.tune:
        tune(data, args)
        return
    runs = [train(name, LEARNING_RATES[name], data, args, args.seed) for name in GRID]
    print_table(runs)
    print(
        "\nA step of EKFAC costs more, most of all in layers as small as these; it"
        "\npays where the loss is hard to lower. Where SGD or Adam reach the loss that"
        "\nyou need, stay with them."
    )
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "quickstart.png"
    plot(
        runs, path, f"A deep auto-encoder of {args.data}, twelve numbers in the middle"
    )
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    main()
