"""Memory of the optimizer's state, and what a smaller one costs in loss and time.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --data-dir MNIST
    python benchmarks/memory.py --quick

Three problems of ``peers_problems.py``, each trained from the same seeds with the state
stored in full, by halves, in bfloat16, within budgets (of 85 and 70 % of the full
state), with truncated bases and, for convolutions, with input factors over channels
alone. Scalings in bfloat16, themselves or their logarithms, are not offered: a hook
rounds them after every step, and ``state`` counts two bytes for each. ``state`` is the
bytes of all tensors that the optimizer keeps between steps, over those of AdamW (two
per weight); ``loss`` the mean over the seeds of the final training loss, with the
standard error of its difference from the first row of the same optimizer, seed by seed;
``step`` the median process time over that of the same row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import parser, save, table
from peers_problems import PROBLEMS, Problem
from torch import Tensor, nn
from tqdm import tqdm

from ekfac import EKFAC, KFAC

Make = Callable[[nn.Module], torch.optim.Optimizer]
LRS = {"transformer": 3e-3, "resnet18": 3e-3, "autoencoder": 8e-3}
Round = Callable[[Tensor], Tensor]
ROUNDED: dict[str, Round] = {
    "EKFAC, s in bfloat16": lambda s: s.bfloat16(),
    "EKFAC, log s in bfloat16": lambda s: s.log2().bfloat16().float().exp2(),
}


def variants(lr: float, full: int, *, convolutional: bool) -> dict[str, Make]:
    """Return what is compared, by name; the first of each optimizer is its reference.

    Args:
        lr: Of KFAC and EKFAC; AdamW has a quarter of it.
        full: Bytes of EKFAC's state; budgets are shares of them.
        convolutional: Whether the network has convolutions.
    """
    made: dict[str, Make] = {
        "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr / 4),
        "EKFAC": lambda m: EKFAC(m, lr),
        "EKFAC, packed": lambda m: EKFAC(m, lr, storage="packed"),
        "EKFAC, bfloat16": lambda m: EKFAC(m, lr, storage="bfloat16"),
        "EKFAC, budget 85 %": lambda m: EKFAC(m, lr, memory_budget=full * 85 // 100),
        "EKFAC, budget 70 %": lambda m: EKFAC(m, lr, memory_budget=full * 70 // 100),
        **dict.fromkeys(ROUNDED, lambda m: EKFAC(m, lr)),
        "EKFAC, rank 32": lambda m: EKFAC(m, lr, rank=32),
        "EKFAC, rank 32, bfloat16": lambda m: EKFAC(m, lr, rank=32, storage="bfloat16"),
        "KFAC": lambda m: KFAC(m, lr),
        "KFAC, bfloat16": lambda m: KFAC(m, lr, storage="bfloat16"),
    }
    if convolutional:
        own: Any = {"conv_factors": "spatially_uncorrelated"}
        made["EKFAC, uncorrelated"] = lambda m: EKFAC(m, lr, **own)
        made["EKFAC, uncorrelated, bfloat16"] = lambda m: EKFAC(
            m, lr, storage="bfloat16", **own
        )
        made["KFAC, uncorrelated"] = lambda m: KFAC(m, lr, **own)
    return made


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors that an optimizer keeps between steps."""
    kept = [v for own in optimizer.state.values() for v in own.values()]
    tensors = [v for v in kept if isinstance(v, Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    if isinstance(optimizer, (EKFAC, KFAC)):
        size += sum(layer.bytes() for layer in optimizer.curvature.values())
    return size


def scalings_of(optimizer: Any) -> list[Tensor]:
    """Return the storage of all scalings."""
    averages = [layer.averages["s"] for layer in optimizer.curvature.values()]
    return [average.total for average in averages if average.held]


def train(
    problem: Problem, make: Make, seed: int, steps: int, rounded: Round | None
) -> dict[str, float]:
    """Return the final loss of one run, its bytes, and the median time of a step."""
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = make(model)
    batches = problem.batches(torch.Generator().manual_seed(seed))
    seconds = []
    for _, batch in zip(range(steps), batches, strict=False):
        start = time.process_time()
        optimizer.zero_grad()
        problem.loss(model, batch).backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
        for s in () if rounded is None else scalings_of(optimizer):
            s.copy_(rounded(s))
    saved = 0 if rounded is None else 2 * sum(s.numel() for s in scalings_of(optimizer))
    with torch.no_grad():
        losses = [float(problem.loss(model, batch)) for batch in problem.train]
    return {
        "loss": statistics.mean(losses),
        "bytes": state_size(optimizer) - saved,
        "seconds": statistics.median(seconds),
    }


def rows_of(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Return the table of one problem."""
    rows = []
    adamw = runs["AdamW"][0]["bytes"]
    for name, found in runs.items():
        first = runs[name.split(",")[0]]
        changes = [a["loss"] - b["loss"] for a, b in zip(found, first, strict=True)]
        spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
        step = statistics.median(run["seconds"] for run in found)
        rows.append(
            {
                "optimizer": name,
                "state, KiB": found[0]["bytes"] / 1024,
                "x AdamW": found[0]["bytes"] / adamw,
                "loss": statistics.mean(run["loss"] for run in found),
                "change": statistics.mean(changes),
                "+-": spread / len(changes) ** 0.5,
                "step": step / statistics.median(run["seconds"] for run in first),
            }
        )
    return rows


def measured(
    problem: Problem, name: str, seeds: int, steps: int
) -> list[dict[str, Any]]:
    """Return the table of one problem after training every variant on every seed."""
    full = state_size(EKFAC(problem.network()))
    convolutional = name == "resnet18"
    choices = variants(LRS[name], full, convolutional=convolutional)
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in choices}
    pairs = [(seed, variant) for seed in range(seeds) for variant in choices]
    for seed, variant in tqdm(pairs, desc=name):
        rounded = ROUNDED.get(variant)
        runs[variant].append(train(problem, choices[variant], seed, steps, rounded))
    return rows_of(runs)


def draw(tables: dict[str, list[dict[str, Any]]]) -> Any:
    """Draw loss over memory."""
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(4 * len(tables), 4),
        layout="constrained",
        squeeze=False,
    )
    for axis, (name, rows) in zip(axes[0], tables.items(), strict=True):
        for row in rows:
            axis.plot(row["x AdamW"], row["loss"], "o", label=row["optimizer"])
        axis.set(title=name, xlabel="bytes of state over AdamW's", ylabel="loss")
        axis.set_xlim(left=0)
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


def main() -> None:
    """Measure, print, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--problems", nargs="+", choices=LRS, default=list(LRS))
    args = arguments.parse_args()
    if args.quick:
        args.steps, args.seeds = 12, 1
    tables = {}
    for name in args.problems:
        problem = PROBLEMS[name](Path(args.data_dir), args.quick)
        tables[name] = measured(problem, name, args.seeds, args.steps)
        print(f"\n{name}: {problem.note}\n{table(tables[name])}", flush=True)
        results = {"steps": args.steps, "seeds": args.seeds, "tables": tables}
        save(args.output, "memory", results, draw(tables))


if __name__ == "__main__":
    main()
