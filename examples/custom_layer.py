"""An adapter for a layer of one's own, checked against autograd and then trained.

    python examples/custom_layer.py

``BlockLinear`` cuts its input features into blocks and gives every block a matrix of
its own. Without an adapter the optimizers would train it by its diagonal second moment,
as Adam does. The four methods of ``BlockLinearAdapter`` say how it looks in the normal
form, and every use of the curvature follows from them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
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
from ekfac.layers import Adapter, register
from ekfac.testing import check_adapter

BATCH_SIZE = 128


class BlockLinear(nn.Module):
    """``y_b = W_b x_b + bias_b`` for each block ``b`` of the features.

    Maps ``[N, *, blocks * d_in]`` to ``[N, *, blocks * d_out]``.
    """

    def __init__(self, blocks: int, d_in: int, d_out: int) -> None:
        super().__init__()
        bound = d_in**-0.5
        self.weight = nn.Parameter(torch.empty(blocks, d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(blocks, d_out))
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, *, blocks * d_out]``."""
        blocks, _, d_in = self.weight.shape
        y = torch.einsum(
            "...bi,boi->...bo", x.unflatten(-1, (blocks, d_in)), self.weight
        )
        return (y + self.bias).flatten(-2)


@register(BlockLinear)
class BlockLinearAdapter(Adapter):
    """The normal form ``[N, S, b, d]``: examples, positions, blocks, features."""

    def blocks(self, x: Tensor) -> Tensor:
        """Return ``[N, *, b * d]`` as ``[N, S, b, d]``."""
        count = self.parameter(self.weight).shape[0]
        return x.reshape(len(x), -1, count, x.shape[-1] // count)

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, b, d_in + 1]``, the bias's constant input 1 last."""
        a = self.blocks(x)
        return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, b, d_out]``."""
        return self.blocks(grad)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[W | bias]`` as ``[b, d_out, d_in + 1]``."""
        assert bias is not None
        return torch.cat([weight, bias.unsqueeze(-1)], dim=-1)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight and the bias of what ``pack`` returned."""
        return matrix[..., :-1], matrix[..., -1]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "EKFAC": lambda model: EKFAC(model, lr=0.01),
}


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


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits as ``[N, 64]``, shuffled, and their labels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.tensor(x[order] / 16, dtype=torch.float32)
    return images, torch.tensor(y[order], dtype=torch.int64)


def network() -> nn.Module:
    """Return a network that reads each of the 8 rows of pixels by a map of its own.

    A ``ChannelShuffle`` hands every block of the second layer a share of all the rows.
    """
    return nn.Sequential(
        BlockLinear(8, 8, 32),
        nn.ReLU(),
        nn.Unflatten(1, (256, 1, 1)),
        nn.ChannelShuffle(8),
        nn.Flatten(),
        BlockLinear(8, 32, 32),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def train(name: str, args: argparse.Namespace) -> Run:
    """Return the record of one training run."""
    x, y = digits()
    (x, x_test), (y, y_test) = x.split([1437, 360]), y.split([1437, 360])
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = network()
    optimizer = OPTIMIZERS[name](model)
    run, spent = Run(name), 0.0
    for _ in tqdm(range(args.epochs), desc=f"{name:6s}", unit="epoch"):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH_SIZE)[
            :-1
        ]:
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            spent += time.perf_counter() - start
            run.losses.append(loss.item())
            run.seconds.append(spent)
    with torch.no_grad():
        run.accuracy = (model(x_test).argmax(1) == y_test).double().mean().item()
    if isinstance(optimizer, EKFAC):
        print(f"\n{optimizer.describe()}")
    return run


def print_table(runs: list[Run], epoch: int) -> None:
    """Print each run's end."""
    heading = (
        f"{'optimizer':10s} {'steps':>6s} {'ms/step':>8s} {'seconds':>8s} "
        f"{'train loss':>11s} {'test accuracy':>14s}"
    )
    print(f"\n{heading}\n{'-' * len(heading)}")
    for run in runs:
        steps, spent = len(run.losses), run.seconds[-1]
        print(
            f"{run.name:10s} {steps:>6d} {1e3 * spent / steps:>8.1f} {spent:>8.2f} "
            f"{run.smooth(epoch)[-1]:>11.5f} {run.accuracy:>14.4f}"
        )


def plot(runs: list[Run], epoch: int, path: Path) -> None:
    """Draw the training loss over steps and over seconds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in runs:
        smooth = run.smooth(epoch)
        left.plot(range(1, len(smooth) + 1), smooth, label=run.name)
        right.plot(run.seconds, smooth, label=run.name)
    left.set(xlabel="step", ylabel="training loss, mean of an epoch", yscale="log")
    right.set(xlabel="seconds of training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend()
    figure.suptitle("A network of BlockLinear layers on digits")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Check the adapter, train with it, print the table and save the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch, to try it")
    parser.add_argument("--output", type=Path, default=Path("output"))
    args = parser.parse_args()
    args.epochs = 1 if args.quick else args.epochs

    torch.manual_seed(args.seed)
    check_adapter(BlockLinear(3, 4, 2).double(), torch.randn(5, 12).double())
    check_adapter(BlockLinear(3, 4, 2).double(), torch.randn(5, 7, 12).double())
    print("the adapter agrees with autograd, for vectors and for sequences")

    runs = [train(name, args) for name in OPTIMIZERS]
    epoch = 1437 // BATCH_SIZE
    print_table(runs, epoch)
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "custom_layer.png"
    plot(runs, epoch, path)
    print(f"\ncurves: {path}")


if __name__ == "__main__":
    main()
