"""Comparison of optimizers on a user's model, ``python -m ekfac bench``."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.errors import EkfacError
from ekfac.optim import EKFAC
from ekfac.progress import shown

Loss = Callable[[Any, Any], Tensor]
Train = list[torch.optim.Optimizer]

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WARM_UP = 0.1  # share of a run in which the learning rate rises
MUON_RATIO = 5.0  # its step has a root mean square of 0.2 lr


class BenchError(EkfacError):
    """The problem cannot be compared; the message says what is wanted."""


@dataclass(frozen=True)
class Problem:
    """A model, batches ``(x, y)`` to go through repeatedly, ``loss_fn(outputs, y)``."""

    model: nn.Module
    batches: Sequence[Any]
    loss_fn: Loss

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of one batch."""
        x, y = batch
        return self.loss_fn(model(x), y)


@dataclass(frozen=True)
class Run:
    """One optimizer at one learning rate.

    Attributes:
        optimizer: Name of the optimizer.
        lr: Largest learning rate of the schedule.
        steps: Steps within the time.
        loss: Mean over the batches after training, in training mode; infinite if it
            diverged.
        seconds: Mean time of one step.
        state_bytes: Size of the optimizer's state.
    """

    optimizer: str
    lr: float
    steps: int
    loss: float
    seconds: float
    state_bytes: int


def read_problem(name: str) -> Problem:
    """Return the problem of ``MODULE:FACTORY``, or of ``FILE.py:FACTORY``.

    Raises:
        BenchError: If there is no such factory, or if it returns something else.
    """
    module_name, separator, factory_name = name.rpartition(":")
    if not separator or not module_name:
        raise BenchError(
            f"{name!r} is not MODULE:FACTORY, e.g. train:make or train.py:make."
        )
    path = Path(module_name)
    if path.suffix == ".py":
        if not path.is_file():
            raise BenchError(f"There is no file {module_name}.")
        folder, module_name = str(path.resolve().parent), path.stem
    else:
        folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise
        raise BenchError(f"There is no module {module_name} in {folder}.") from None
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise BenchError(f"{module_name} has no function {factory_name}.")
    return as_problem(factory(), f"{module_name}:{factory_name}")


def as_problem(returned: Any, name: str) -> Problem:
    """Return the problem that the factory called ``name`` returned.

    Raises:
        BenchError: If it is not a model, batches and a loss.
    """
    expected = "a model, batches (x, y), and a loss of (outputs, y)"
    if not (isinstance(returned, tuple) and len(returned) == 3):
        raise BenchError(
            f"{name} must return {expected}, not {type(returned).__name__}."
        )
    model, data, loss_fn = returned
    if not isinstance(model, nn.Module) or not callable(loss_fn):
        kinds = ", ".join(type(part).__name__ for part in returned)
        raise BenchError(f"{name} must return {expected}, not ({kinds}).")
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and all(isinstance(part, Tensor) for part in data)
    ):
        data = [data]  # one batch
    batches = list(itertools.islice(data, 1000))
    if not batches or any(
        not isinstance(batch, tuple | list) or len(batch) != 2 for batch in batches
    ):
        raise BenchError(f"{name}: batches must be pairs (x, y), at least one of them.")
    return Problem(model, batches, loss_fn)


def muon(model: nn.Module, lr: float) -> Train:
    """Return Muon for hidden matrices, AdamW for the rest, as Muon's author has it.

    The rest are embeddings, vectors, and the last matrix.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters()
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in embeddings][:-1]
    ids = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in ids]
    optimizers: Train = []
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=MUON_RATIO * lr, adjust_lr_fn="match_rms_adamw"
            )
        )
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=lr))
    return optimizers


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Train]] = {
    "AdamW": lambda model, lr: [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    ],
    "Muon": muon,
    "EKFAC": lambda model, lr: [EKFAC(model, lr=lr)],
    "EKFAC, rank 32": lambda model, lr: [EKFAC(model, lr=lr, rank=32)],
}


def available() -> dict[str, Callable[[nn.Module, float], Train]]:
    """Return the optimizers that this torch has; Muon came with 2.9."""
    return {
        name: make
        for name, make in OPTIMIZERS.items()
        if name != "Muon" or hasattr(torch.optim, "Muon")
    }


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in nested mappings and sequences."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(tensor_bytes(value) for value in state.values())
    if isinstance(state, tuple | list):
        return sum(tensor_bytes(value) for value in state)
    return 0


def schedule(share: float) -> float:
    """Return the factor of the learning rate at a share of the run in [0, 1]."""
    if share < WARM_UP:
        return max(share / WARM_UP, 0.02)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def measure(problem: Problem, name: str, lr: float, seconds: float) -> Run:
    """Train a copy of the model for some seconds, on a schedule over that time."""
    torch.manual_seed(0)
    model = copy.deepcopy(problem.model).train()
    optimizers = available()[name](model, lr)
    rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    steps, start, finite = 0, time.perf_counter(), True
    for batch in itertools.cycle(problem.batches):
        share = (time.perf_counter() - start) / seconds
        if share >= 1 and steps > 0:
            break
        for optimizer, lrs in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = rate * schedule(min(share, 1.0))
            optimizer.zero_grad()
        loss = problem.loss(model, batch)
        if not math.isfinite(loss.item()):  # waits for the device, so the time is right
            finite = False
            break
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        steps += 1
    elapsed = time.perf_counter() - start
    state = sum(tensor_bytes(optimizer.state_dict()) for optimizer in optimizers)
    for optimizer in optimizers:
        if isinstance(optimizer, EKFAC):
            optimizer.close()
    with torch.no_grad():
        losses = [problem.loss(model, batch).item() for batch in problem.batches]
    final = sum(losses) / len(losses) if finite else math.inf
    return Run(
        name,
        lr,
        steps,
        final if math.isfinite(final) else math.inf,
        elapsed / max(steps, 1),
        state,
    )


def compare(
    problem: Problem, seconds: float = 60.0, rates: Iterable[float] = RATES
) -> list[Run]:
    """Return a run of every optimizer at every rate, with equal shares of the time.

    Args:
        problem: What is trained; its model is left as it is.
        seconds: Time of all runs together.
        rates: Learning rates in AdamW's units, the same for each optimizer.
    """
    settings = [(name, lr) for name in available() for lr in rates]
    return [
        measure(problem, name, lr, seconds / len(settings))
        for name, lr in shown(settings, "trainings", progress=sys.stderr.isatty())
    ]


def best_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the run with the lowest loss of every optimizer."""
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.optimizer, []).append(run)
    return [min(own, key=lambda run: run.loss) for own in by_name.values()]


def summary(runs: Sequence[Run]) -> str:
    """Return the table of the best runs, and the setting that they suggest."""
    best = best_runs(runs)
    heading = ("optimizer", "lr", "loss", "steps", "ms/step", "state MiB")
    rows = [heading] + [
        (
            run.optimizer,
            f"{run.lr:g}",
            f"{run.loss:.4g}",
            str(run.steps),
            f"{1e3 * run.seconds:.1f}",
            f"{run.state_bytes / 2**20:.3g}",
        )
        for run in best
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    first = min(best, key=lambda run: run.loss)
    rates = [run.lr for run in runs if run.optimizer == first.optimizer]
    note = f"Lowest loss at equal time: {first.optimizer} with lr={first.lr:g}."
    if math.isinf(first.loss):
        note = "Every run diverged: give smaller rates with --lr."
    elif len(rates) > 1 and first.lr in (min(rates), max(rates)):
        note += " It is an end of the rates that were tried: try further with --lr."
    ours = min(
        (run for run in best if run.optimizer.startswith("EKFAC")),
        key=lambda run: run.loss,
    )
    if ours is not first and math.isfinite(first.loss):
        rank = ", rank=32" if "rank" in ours.optimizer else ""
        call = f"EKFAC(model, lr={ours.lr:g}{rank})"
        note += f" {call} is at {ours.loss:.4g} in {ours.steps} steps."
    return "\n".join([*lines, "", note])
