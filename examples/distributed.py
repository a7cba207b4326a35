"""EKFAC on several processes: the same script on one and on many.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 4 examples/distributed.py --sharded --workers 0.25

Every process takes its share of each batch of scikit-learn's digits; the last batch of
an epoch is smaller and does not divide evenly. The losses printed are the same for any
number of processes, up to rounding. ``--sharded`` trains with ``fully_shard`` in place
of ``DistributedDataParallel``; ``--resume FOLDER`` saves a checkpoint there at the end
and goes on from it where there is one, whatever number of processes wrote it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ekfac import EKFAC
from ekfac.optim import DistributedState

LEARNING_RATES = {"SGD": 0.1, "EKFAC": 0.01}


@dataclass
class Run:
    """The loss of every step's whole batch, the seconds, the test accuracy."""

    name: str
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    accuracy: float = 0.0


@dataclass(frozen=True)
class Process:
    """This process among those that train together; one of one without torchrun."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> Process:
        """Join the others that torchrun has started, if it has."""
        cuda = torch.cuda.is_available()
        if "RANK" not in os.environ:
            return cls(0, 1, torch.device("cuda" if cuda else "cpu"))
        device = torch.device("cpu")
        if cuda:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def wrap(self, model: nn.Module, sharded: bool) -> nn.Module:
        """Return the model, its gradients averaged over the processes."""
        if self.size == 1:
            return model
        if not sharded:
            return DistributedDataParallel(model)
        for layer in model:  # type: ignore[attr-defined]
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
        return model

    def mean(self, value: Tensor) -> float:
        """Return the mean of a number over the processes."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return float(total) / self.size


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 1,437 training images ``[N, 64]`` and labels, then 360 for testing."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 16, dtype=torch.float32, device=device)
    y = torch.tensor(labels[order], device=device)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def network() -> nn.Sequential:
    """Return a network for the digits, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10)
    )


def batches(count: int, size: int, epochs: int) -> Iterator[Tensor]:
    """Yield the indices of whole batches, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(size)


def train(
    process: Process,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Run,
    options: argparse.Namespace,
) -> None:
    """Train, every process on its share of each batch."""
    x, y, x_test, y_test = digits(process.device)
    order = list(batches(len(x), options.batch_size, options.epochs))
    start = time.perf_counter()
    for batch in tqdm(order, run.name, disable=process.rank > 0, leave=False):
        share = batch[process.rank :: process.size].to(process.device)
        optimizer.zero_grad()
        # Gradients are averaged over processes: with this weight their average is the
        # gradient of the mean over the whole batch, however it was divided.
        loss = cross_entropy(model(x[share]), y[share], reduction="sum")
        loss = loss * (process.size / len(batch))
        loss.backward()
        optimizer.step()
        run.losses.append(process.mean(loss))
    run.seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        run.accuracy = float((model(x_test).argmax(1) == y_test).float().mean())


def resume(
    model: nn.Module, optimizer: EKFAC, folder: Path, action: Callable[..., Any]
) -> None:
    """Save or load network and optimizer, as ``action`` does."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    weights = inner.state_dict()
    state = {"model": weights, "optimizer": DistributedState(optimizer)}
    action(state, checkpoint_id=folder)
    inner.load_state_dict(weights)


def ekfac(
    process: Process, model: nn.Module, options: argparse.Namespace, run: Run
) -> None:
    """Train with EKFAC, from a checkpoint if there is one."""
    optimizer = EKFAC(
        model,
        lr=LEARNING_RATES["EKFAC"],
        loss_reduction="global_mean",
        gradient_workers=options.workers,
    )
    if options.resume is not None and (options.resume / ".metadata").exists():
        resume(model, optimizer, options.resume, load)
    train(process, model, optimizer, run, options)
    if options.resume is not None:
        resume(model, optimizer, options.resume, save)


def draw(runs: list[Run], path: Path) -> None:
    """Draw the losses of every step."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        axes.plot(run.losses, label=run.name)
    axes.set(xlabel="step", ylabel="training loss of the batch", yscale="log")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Train with SGD and with EKFAC and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128, help="of all processes")
    parser.add_argument("--workers", type=float, default=1.0, help="gradient_workers")
    parser.add_argument("--sharded", action="store_true", help="use fully_shard")
    parser.add_argument("--resume", type=Path, help="folder of the checkpoint")
    parser.add_argument("--quick", action="store_true", help="one epoch")
    parser.add_argument("--output", type=Path, default=Path("output"))
    options = parser.parse_args()
    if options.quick:
        options.epochs = 1
    process, runs = Process.start(), [Run("SGD"), Run("EKFAC")]
    for run in runs:
        model = process.wrap(network().to(process.device), options.sharded)
        if run.name == "EKFAC":
            ekfac(process, model, options, run)
            continue
        rate = LEARNING_RATES[run.name]
        sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        train(process, model, sgd, run, options)
    if process.rank == 0:
        print(f"digits on {process.size} processes, {len(runs[0].losses)} steps\n")
        heading = "optimizer  train loss (last step)  test accuracy  seconds"
        print(f"{heading}\n{'-' * len(heading)}")
        for run in runs:
            cells = f"{run.losses[-1]:21.10f}  {run.accuracy:13.3f}  {run.seconds:7.1f}"
            print(f"{run.name:9}  {cells}")
        draw(runs, options.output / "distributed.png")
        print(f"\nfigure: {options.output / 'distributed.png'}")
    if process.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
