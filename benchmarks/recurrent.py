"""Recurrent layers: what their steps cost in place of one function, and which blocks.

    python benchmarks/recurrent.py [--only gates] [--repeats 21] [--seeds 3]

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` are one function each, whose steps are written
out in forward passes with statistics (``ekfac.layers.recurrent``). Three tables:

- cost: processor time of a forward and a backward pass with the steps written out and
  reported, over one by torch's function, interleaved, medians; and what that adds to
  the mean pass if one in ten has statistics, the default;
- gates: blocks of one matrix for each gate, beside one of all gates (an ``nn.RNN`` has
  one gate): final losses of the model of characters of ``peers.py``, 128 hidden units,
  mean and standard deviation over seeds. Rates are a factor of 2 apart, tuned with seed
  0 until the best lies between two worse; steps are timed in turns with SGD's. "equal
  time" has as many steps as fit into the processor time of the other's equal steps;
- fit: how far the two are from the exact empirical Fisher of the hidden state's
  weight, in its norm, of a language model of 8 hidden units after training.

Writes ``recurrent.json``; tables that were not asked for stay.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from typing import Any

import coverage_models
import torch
from common import parser, table
from peers import Make, train
from peers_optimizers import sgd
from peers_problems import Problem, RecurrentModel, text
from torch import Tensor, nn

from ekfac import EKFAC
from ekfac.layers import Adapter, override
from ekfac.layers.recurrent import RecurrentAdapter

RATES = (8e-3, 16e-3, 32e-3)  # the first ones
WAYS = ("per gate", "fused")
SIZES = (128, 256)
INTERVAL = 10  # steps from statistics to statistics, by default


class GateAdapter(RecurrentAdapter):
    """A matrix ``[H, d_in]`` for each gate in place of one of all."""

    @property
    def count(self) -> int:
        """How many gates there are."""
        rows, size = self.parameter(self.weight).shape[0], self.module.hidden_size
        return max(1, int(rows // size))  # type: ignore[operator]

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


def characters(kind: type[nn.RNNBase], quick: bool) -> Problem:
    """Return the recurrent language model of characters of ``peers.py``."""
    hidden = 16 if quick else 128

    def network(letters: int, length: int) -> nn.Module:
        model = RecurrentModel(letters, 64, hidden)
        model.recurrent = kind(64, hidden, batch_first=True)  # type: ignore[assignment]
        return model

    size, steps = (4, 4) if quick else (16, 150)
    return text(network, quick, size, steps, f"{kind.__name__}, {hidden} hidden units")


def maker(blocks: str, lr: float) -> Make:
    """Return the making of EKFAC with a form of blocks."""

    def make(model: nn.Module) -> EKFAC:
        if blocks == "per gate":
            override(model.recurrent, GateAdapter)  # type: ignore[arg-type]
        return EKFAC(model, lr=lr)

    return make


def tuned(problem: Problem, blocks: str) -> float:
    """Return the rate of the lowest loss with seed 0, which lies between two worse."""
    losses: dict[float, float] = {}
    waiting = [*RATES]
    while waiting:
        for lr in waiting:
            label = f"{problem.note} {blocks} {lr:g}"
            (run,) = train(problem, [maker(blocks, lr)], problem.steps, 0, label)
            losses[lr] = run.result()["train"] or math.inf
        best = min(losses, key=lambda lr: losses[lr])
        waiting = [lr for lr in (best / 2, best * 2) if lr not in losses]
    return best


def gates(kind: type[nn.RNNBase], seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return losses and times with either form of blocks."""
    problem, rows = characters(kind, quick), []
    for blocks in WAYS:
        make = maker(blocks, tuned(problem, blocks))
        makes = [make, lambda model: sgd(model, 1e-3)]
        train(problem, makes, 3, 0, "warm-up")
        own, other = train(problem, makes, problem.steps, 1, "price of a step")
        lr, price = own.rates[0], own.seconds / other.seconds
        rows.append({"layer": kind.__name__, "blocks": blocks, "lr": lr, "step": price})
    slowest = max(row["step"] for row in rows)
    for row in rows:
        make = maker(row["blocks"], row["lr"])
        fitting = round(problem.steps * slowest / row["step"])
        for name, steps in (("equal steps", problem.steps), ("equal time", fitting)):
            runs = [
                train(problem, [make], steps, seed, name)[0].result()
                for seed in range(1, seeds + 1)
            ]
            for part in ("train", "held_out"):
                losses = [run[part] for run in runs]
                row[f"{name}, {part}"] = statistics.mean(losses)
                if part == "train" and seeds > 1:
                    row[f"{name}, deviation"] = statistics.stdev(losses)
            row[f"{name}, steps"] = steps
    return rows


def words(blocks: str, seed: int) -> coverage_models.Problem:
    """Return a language model of 8 hidden units, with blocks per gate or fused."""
    torch.manual_seed(seed)
    model = coverage_models.Recurrent()
    model.lstm, model.head = nn.LSTM(32, 8, 2), nn.Linear(8, 48)
    if blocks == "per gate":
        override(model.lstm, GateAdapter)
    return coverage_models.next_token(model)


def fit(kind: str, steps: int, seeds: int) -> dict[str, Any]:
    """Return the relative error of a block's factors and of its scalings."""
    errors: dict[str, list[float]] = {"Kronecker": [], "with scalings": []}
    for seed in range(seeds):
        task = words(kind, seed)
        optimizer = EKFAC(task.model, lr=1e-3)
        for number in range(steps):
            optimizer.zero_grad()
            task.loss(number).backward()
            optimizer.step()
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
        ids = torch.randint(3, 48, (256, 16))
        weight = task.model.lstm.weight_hh_l0  # type: ignore[union-attr]

        def loss(ids: Tensor, model: nn.Module = task.model) -> Tensor:
            logits = model(ids[:, :-1]).flatten(0, 1)
            return nn.functional.cross_entropy(
                logits, ids[:, 1:].flatten(), reduction="sum"
            )

        loss(ids).backward()
        statistic.step()
        rows = []
        for one in ids.split(1):
            (grad,) = torch.autograd.grad(loss(one), weight)
            rows.append(grad.flatten())
        stacked = torch.stack(rows)
        exact = stacked.T @ stacked / len(stacked)
        layer = statistic.curvature["lstm.weight_hh_l0"]
        assert layer.A is not None
        assert layer.G is not None
        assert layer.s is not None
        positions = ids.shape[1] - 1
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
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", choices=("cost", "gates", "fit"))
    arguments.add_argument("--repeats", type=int, default=21)
    arguments.add_argument("--seeds", type=int, default=3)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    path = args.output / "recurrent.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    asked = args.only or ("cost", "gates", "fit")
    if "cost" in asked:
        kinds = (nn.LSTM, nn.GRU, nn.RNN)
        results["cost"] = [cost(k, size, args.repeats) for k in kinds for size in SIZES]
    if "gates" in asked:
        both = [gates(kind, args.seeds, args.quick) for kind in (nn.LSTM, nn.GRU)]
        results["gates"] = [*both[0], *both[1]]
    if "fit" in asked:
        steps = 4 if args.quick else 120
        results["fit"] = [fit(way, steps, args.seeds) for way in WAYS]
    for name in asked:
        print(table(results[name]), end="\n\n")
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
