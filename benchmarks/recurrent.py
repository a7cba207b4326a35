"""Recurrent layers: what their steps cost in place of one function, and which blocks.

    python benchmarks/recurrent.py [--repeats 21] [--steps 120] [--seeds 3]

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` are one function each, whose steps are written
out in forward passes with statistics (``ekfac.layers.recurrent``). Three tables:

- cost: processor time of a forward and a backward pass with the steps written out and
  reported, over one by torch's function, interleaved, medians; and what that adds to
  the mean pass if one in ten has statistics, the default;
- gates: blocks of one matrix for each gate, beside one of all gates: losses of a
  language model of two LSTM layers after ``--steps`` steps, mean and standard
  deviation over seeds, at the better of three learning rates each, and time of a step;
- fit: how far the two are from the exact empirical Fisher of the hidden state's
  weight, in its norm, of the same model at 8 hidden units after training.

Writes ``recurrent.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import table
from coverage_models import Problem, Recurrent, next_token
from torch import Tensor, nn

from ekfac import EKFAC
from ekfac.layers import Adapter, override
from ekfac.layers.recurrent import RecurrentAdapter

HERE = Path(__file__).resolve().parent
RATES = (3e-4, 1e-3, 3e-3)
SIZES = (128, 256)
INTERVAL = 10  # steps from statistics to statistics, by default


class GateAdapter(RecurrentAdapter):
    """A matrix ``[H, d_in]`` for each gate in place of one of all."""

    @property
    def count(self) -> int:
        """How many gates there are."""
        rows, size = self.parameter(self.weight).shape[0], self.module.hidden_size
        return int(rows // size)  # type: ignore[operator]

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, gates, H]``."""
        return super().output_gradients(grad)[:, :, 0].unflatten(-1, (self.count, -1))

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[gates, H, d_in]``."""
        return super().pack(weight, bias)[0].unflatten(0, (self.count, -1))

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``[gates H, d_in]`` and bias ``[gates H]``."""
        return super().unpack(matrix.flatten(0, 1).unsqueeze(0))


def passed(layer: nn.Module, x: Tensor, adapters: list[Adapter]) -> float:
    """Return the processor time of a pass, its steps reported if there are adapters."""
    reported: list[Tensor] = []
    layer.zero_grad()
    begin = time.process_time()
    if adapters:
        report = lambda *given: reported.append(given[2])  # noqa: E731
        with RecurrentAdapter.tap(layer, adapters, (x,), {}, report):
            output, _ = layer(x)
    else:
        output, _ = layer(x)
    output.square().mean().backward()
    return time.process_time() - begin


def cost(kind: type[nn.RNNBase], size: int, repeats: int) -> dict[str, Any]:
    """Return what a layer's passes cost, with its steps written out and without."""
    layer, x = kind(size, size), torch.randn(64, 32, size)
    adapters = list(RecurrentAdapter.build(layer).values())
    own, steps = [], []
    for _ in range(repeats):
        own.append(passed(layer, x, []))
        steps.append(passed(layer, x, adapters))
    ratio = statistics.median(steps[1:]) / statistics.median(own[1:])
    return {
        "layer": kind.__name__,
        "features": size,
        "own pass, ms": 1e3 * statistics.median(own[1:]),
        "written out": ratio,
        "mean of ten passes": 1 + (ratio - 1) / INTERVAL,
    }


def problem(gates: str, seed: int, hidden: int | None = None) -> Problem:
    """Return the language model, with blocks per gate or fused."""
    torch.manual_seed(seed)
    model = Recurrent()
    if hidden is not None:
        model.lstm, model.head = nn.LSTM(32, hidden, 2), nn.Linear(hidden, 48)
    if gates == "per gate":
        override(model.lstm, GateAdapter)
    return next_token(model)


def trained(task: Problem, lr: float, steps: int) -> tuple[float, float]:
    """Return the mean of the last losses, and the mean processor time of a step."""
    optimizer, losses, begin = EKFAC(task.model, lr=lr), [], time.process_time()
    for number in range(steps):
        optimizer.zero_grad()
        loss = task.loss(number)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    elapsed = time.process_time() - begin
    return statistics.mean(losses[-4:]), elapsed / steps


def gates(kind: str, steps: int, seeds: int) -> dict[str, Any]:
    """Return losses and times with one form of blocks."""
    runs = {
        lr: [trained(problem(kind, seed), lr, steps) for seed in range(seeds)]
        for lr in RATES
    }
    means = {lr: statistics.mean(loss for loss, _ in run) for lr, run in runs.items()}
    best = min(means, key=lambda lr: means[lr])
    losses = [loss for loss, _ in runs[best]]
    return {
        "blocks": kind,
        "lr": best,
        "loss": means[best],
        "deviation": statistics.stdev(losses) if seeds > 1 else 0.0,
        "step, ms": 1e3 * statistics.mean(t for run in runs.values() for _, t in run),
    }


def fit(kind: str, steps: int, seeds: int) -> dict[str, Any]:
    """Return the relative error of a block's factors and of its scalings."""
    errors: dict[str, list[float]] = {"Kronecker": [], "with scalings": []}
    for seed in range(seeds):
        task = problem(kind, seed, hidden=8)
        trained(task, 1e-3, steps)
        options: dict[str, Any] = {"factor_decay": 0.0, "scaling_decay": 0.0}
        statistic = EKFAC(
            task.model,
            lr=0.0,
            loss_reduction="sum",
            scaling="per_example",
            factor_interval=1,
            basis_interval=1,
            basis_tolerance=0.0,
            **options,
        )
        words = torch.randint(3, 48, (256, 16))
        weight = task.model.lstm.weight_hh_l0  # type: ignore[union-attr]

        def loss(ids: Tensor, model: nn.Module = task.model) -> Tensor:
            logits = model(ids[:, :-1]).flatten(0, 1)
            return nn.functional.cross_entropy(
                logits, ids[:, 1:].flatten(), reduction="sum"
            )

        loss(words).backward()
        statistic.step()
        rows = []
        for one in words.split(1):
            (grad,) = torch.autograd.grad(loss(one), weight)
            rows.append(grad.flatten())
        stacked = torch.stack(rows)
        exact = stacked.T @ stacked / len(stacked)
        layer = statistic.curvature["lstm.weight_hh_l0"]
        assert layer.A is not None
        assert layer.G is not None
        assert layer.s is not None
        positions = words.shape[1] - 1
        # The hidden state's bias is left out: its column is the last.
        A = layer.A[..., :-1, :-1].expand(len(layer.G), -1, -1)
        dense = [torch.kron(g, a) * positions for g, a in zip(layer.G, A, strict=True)]
        factors = torch.block_diag(*dense) / positions
        scaled = []
        for b in range(len(layer.G)):
            left = layer.Q_G[b]  # type: ignore[index]
            right = layer.Q_A[b if len(layer.Q_A) > 1 else 0]  # type: ignore[index, arg-type]
            basis = torch.kron(left, right)
            full = basis @ torch.diag(layer.s[b].flatten()) @ basis.T
            size = right.shape[0]
            kept = torch.arange(len(full)) % size < size - 1
            scaled.append(full[kept][:, kept])
        for name, matrix in (
            ("Kronecker", factors),
            ("with scalings", torch.block_diag(*scaled)),
        ):
            errors[name].append(float((matrix - exact).norm() / exact.norm()))
    return {
        "blocks": kind,
        **{name: statistics.mean(found) for name, found in errors.items()},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds, ways = (nn.LSTM, nn.GRU, nn.RNN), ("per gate", "fused")
    results = {
        "cost": [cost(kind, size, given.repeats) for kind in kinds for size in SIZES],
        "gates": [gates(way, given.steps, given.seeds) for way in ways],
        "fit": [fit(way, given.steps, given.seeds) for way in ways],
    }
    for rows in results.values():
        print(table(rows), end="\n\n")
    given.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**vars(given), "output": None, **results}, indent=1)
    (given.output / "recurrent.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
