"""Tasks one after another: what is forgotten without a penalty, and with three of them.

    python examples/continual.py                          # permuted digits, a minute
    python examples/continual.py --protocol split         # digits 0-1, 2-3, ...
    python examples/continual.py --data mnist --data-dir MNIST

``permuted``: every task shows the same images with their pixels in another order.
``split``: every task has two of the ten classes, told apart by a head of its own. After
each task the accuracy on all tasks so far is measured; the average over tasks at the
end and the forgetting (the mean drop from each task's best) are printed, the matrices
drawn. ``EKFAC, optimizer`` trains with EKFAC and takes the penalty from the optimizer's
factors, without a pass over data; the others train with Adam.
"""

from __future__ import annotations

import argparse
import gzip
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC
from ekfac.continual import QuadraticPenalty

METHODS = ("none", "EWC", "EKFAC", "EKFAC, optimizer")
STRENGTHS = {
    "permuted": {"EWC": 30.0, "EKFAC": 3.0, "EKFAC, optimizer": 3.0},
    "split": {"EWC": 300.0, "EKFAC": 30.0, "EKFAC, optimizer": 30.0},
}


@dataclass(frozen=True)
class Task:
    """Images ``[N, D]`` and labels ``[N]``, for training and for testing.

    Attributes:
        head: Which outputs are the task's.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    head: int = 0

    def batches(self, size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Yield one epoch of shuffled training batches."""
        order = torch.randperm(len(self.x_train), generator=generator)
        for chosen in order.split(size):
            yield [self.x_train[chosen], self.y_train[chosen]]


class Network(nn.Module):
    """Two hidden layers and a head, or several.

    Args:
        inputs: Pixels of an image.
        classes: Outputs of a head.
        heads: How many.
        width: Of the hidden layers.
    """

    def __init__(
        self, inputs: int, classes: int = 10, heads: int = 1, width: int = 100
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        self.head = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the present head."""
        logits: Tensor = self.heads[self.head](self.body(x))
        return logits


# -- data ------------------------------------------------------------------------------


def split(x: np.ndarray, y: np.ndarray, n_train: int) -> Task:
    """Return images of zero mean and unit deviation, the first ones for training."""
    images = torch.tensor(x, dtype=torch.float32).flatten(1)
    images = (images - images[:n_train].mean()) / images[:n_train].std()
    labels = torch.tensor(y, dtype=torch.int64)
    return Task(images[:n_train], labels[:n_train], images[n_train:], labels[n_train:])


def digits() -> Task:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, 1,437 of them to train on."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return split(x[order], y[order], 1437)


def read_idx(path: Path) -> np.ndarray:
    """Return the array in a gzipped file of MNIST's own format."""
    with gzip.open(path) as file:
        dimensions = file.read(4)[3]
        shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def mnist(folder: Path, pool: int = 1) -> Task:
    """Return MNIST from the gzipped idx files in ``folder``.

    Args:
        folder: With those of t10k alone, 8,000 of its images are to train on.
        pool: Side of the squares of pixels that are averaged.
    """
    parts = [part for part in ("train", "t10k") if [*folder.glob(f"{part}-*.gz")]]
    if not parts:
        raise SystemExit(f"{folder} has no *-images-idx3-ubyte.gz; pass --data-dir.")
    x = [read_idx(folder / f"{part}-images-idx3-ubyte.gz") for part in parts]
    y = [read_idx(folder / f"{part}-labels-idx1-ubyte.gz") for part in parts]
    n_train = len(x[0]) if len(x) == 2 else len(x[0]) * 4 // 5
    images = np.concatenate(x).astype(np.float32)
    n, height, width = images.shape
    squares = images.reshape(n, height // pool, pool, width // pool, pool)
    return split(squares.mean(axis=(2, 4)), np.concatenate(y), n_train)


def permuted(data: Task, count: int, seed: int) -> list[Task]:
    """Return ``count`` tasks, each with its own order of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for _ in range(count):
        order = torch.randperm(data.x_train.shape[1], generator=generator)
        train, test = data.x_train[:, order], data.x_test[:, order]
        tasks.append(Task(train, data.y_train, test, data.y_test))
    return tasks


def pairs(data: Task) -> list[Task]:
    """Return five tasks of two classes each, with a head for each."""
    tasks = []
    for first in range(0, 10, 2):
        train = data.y_train // 2 == first // 2
        test = data.y_test // 2 == first // 2
        tasks.append(
            Task(
                data.x_train[train],
                data.y_train[train] - first,
                data.x_test[test],
                data.y_test[test] - first,
                head=first // 2,
            )
        )
    return tasks


# -- training --------------------------------------------------------------------------


@torch.no_grad()
def accuracy(model: Network, task: Task) -> float:
    """Return the share of a task's test images that is classified right."""
    model.head = task.head
    right = model(task.x_test).argmax(1) == task.y_test
    return float(right.double().mean())


def average(matrix: np.ndarray) -> float:
    """Return the mean accuracy over all tasks after the last."""
    return float(matrix[-1].mean())


def forgetting(matrix: np.ndarray) -> float:
    """Return the mean drop of the earlier tasks from their best accuracy."""
    if len(matrix) < 2:
        return 0.0
    best = np.nanmax(matrix[:-1, :-1], axis=0)
    return float((best - matrix[-1, :-1]).mean())


def learn(
    method: str,
    tasks: Sequence[Task],
    model: Network,
    strength: float,
    args: argparse.Namespace,
    bar: Callable[[float], None] = lambda loss: None,
) -> np.ndarray:
    """Return accuracies ``[T, T]``: after every task, on all tasks so far.

    Args:
        method: One of ``METHODS``.
        tasks: In order.
        model: The network.
        strength: Of the penalty.
        args: ``epochs``, ``batch_size`` and ``seed``.
        bar: Is told the loss after every step.
    """
    structure = "diagonal" if method == "EWC" else "ekfac"
    penalty = QuadraticPenalty(model, structure, strength)  # type: ignore[arg-type]
    shuffle = torch.Generator().manual_seed(args.seed)
    matrix = np.full((len(tasks), len(tasks)), np.nan)
    for t, task in enumerate(tasks):
        model.head = task.head
        if method == "EKFAC, optimizer":
            optimizer: torch.optim.Optimizer = EKFAC(model, lr=1e-3, fisher="mc")
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(args.epochs):
            for x, y in task.batches(args.batch_size, shuffle):
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y) + penalty()
                loss.backward()
                optimizer.step()
                bar(loss.item())
        if isinstance(optimizer, EKFAC):
            penalty.consolidate(
                optimizer.curvature,
                num_examples=len(task.x_train),
                scalings="kronecker",
            )
            optimizer.close()
        elif method != "none":
            penalty.consolidate([(task.x_train, task.y_train)])
        matrix[t, : t + 1] = [accuracy(model, earlier) for earlier in tasks[: t + 1]]
    return matrix


# -- showing ---------------------------------------------------------------------------


def show(name: str, matrix: np.ndarray) -> None:
    """Print an accuracy matrix: a row after every task, a column for every task."""
    print(f"\n{name}\nafter task  accuracy on task 1, 2, ...\n{'-' * 40}")
    for t, row in enumerate(matrix):
        print(f"{t + 1:>10d}  " + " ".join(f"{a:.3f}" for a in row[: t + 1]))


def plot(results: dict[str, np.ndarray], path: Path, title: str) -> None:
    """Draw the matrices, and the mean accuracy over the tasks seen so far."""
    figure, axes = plt.subplots(
        1, len(results) + 1, figsize=(3 * len(results) + 4, 3.4), layout="constrained"
    )
    for panel, (name, matrix) in zip(axes, results.items(), strict=False):
        image = panel.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        ticks = range(len(matrix))
        panel.set(title=name, xlabel="on task", xticks=ticks, yticks=ticks)
        panel.set_xticklabels([t + 1 for t in ticks])
        panel.set_yticklabels([t + 1 for t in ticks])
        axes[-1].plot(
            range(1, len(matrix) + 1), np.nanmean(matrix, axis=1), "o-", label=name
        )
    axes[0].set(ylabel="after task")
    figure.colorbar(image, ax=list(axes[:-1]), label="test accuracy", shrink=0.9)
    axes[-1].set(xlabel="tasks learned", ylabel="mean accuracy on them", ylim=(0, 1.02))
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--protocol", choices=("permuted", "split"), default="permuted")
    parser.add_argument("--tasks", type=int, default=5, help="of permuted images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two tasks, to try it")
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.epochs = 2, 3
    return args


def main() -> None:
    """Train with every method, print the tables and save the figure."""
    args = parse()
    data = digits() if args.data == "digits" else mnist(args.data_dir)
    if args.protocol == "permuted":
        tasks = permuted(data, args.tasks, args.seed)
    else:
        tasks = pairs(data)[: 2 if args.quick else 5]
    heads = 1 + max(task.head for task in tasks)
    steps = args.epochs * sum(-(-len(t.x_train) // args.batch_size) for t in tasks)
    results = {}
    for method in METHODS:
        torch.manual_seed(args.seed)
        model = Network(data.x_train.shape[1], 10 if heads == 1 else 2, heads)
        strength = STRENGTHS[args.protocol].get(method, 0.0)
        with tqdm(total=steps, desc=f"{method:16s}", unit="step") as bar:

            def step(loss: float, bar: tqdm = bar) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            results[method] = learn(method, tasks, model, strength, args, step)
    for method, matrix in results.items():
        show(method, matrix)
    heading = f"{'method':18s} {'strength':>8s} {'average accuracy':>17s} "
    print(f"\n{heading}{'forgetting':>11s}\n{'-' * 56}")
    for method, matrix in results.items():
        strength = STRENGTHS[args.protocol].get(method, 0.0)
        print(
            f"{method:18s} {strength:>8g} {average(matrix):>17.4f} "
            f"{forgetting(matrix):>11.4f}"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "continual.png"
    plot(results, path, f"{args.protocol} {args.data}, {len(tasks)} tasks")
    print(f"\nfigure: {path}")


if __name__ == "__main__":
    main()
