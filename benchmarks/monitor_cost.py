"""What a Monitor costs a training run, beside the share that it is allowed.

    python benchmarks/monitor_cost.py --data-dir MNIST      # minutes
    python benchmarks/monitor_cost.py --quick

The deep auto-encoder of examples/autoencoder.py, EKFAC, without a monitor and with one
for each allowed share, writing a CSV file. Runs take turns, every one with the same
seed, and must end at the same parameters; ``cost`` is the seconds of the monitored runs
over those without, less one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, example, has_mnist, parser, save, table

import ekfac
from ekfac import EKFAC


def train(
    images: torch.Tensor, share: float, rank: int | None, args: argparse.Namespace
) -> tuple[float, int, torch.Tensor]:
    """Return seconds, number of records and the last layer's bias of one run."""
    module = example("autoencoder")
    torch.manual_seed(0)
    widths = (32, 16, 32) if args.quick else module.WIDTHS
    model = module.network(images.shape[1], widths)
    optimizer = EKFAC(model, rank=rank)
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        monitor = None
        if share:
            monitor = stack.enter_context(
                ekfac.Monitor(
                    optimizer,
                    every=args.every,
                    share=share,
                    writer=str(Path(folder) / "health.csv"),
                )
            )
        start = time.perf_counter()
        for _ in range(args.steps):
            chosen = torch.randperm(len(images), generator=generator)[:200]
            optimizer.zero_grad()
            module.reconstruction_loss(model, images[chosen]).backward()
            optimizer.step()
        seconds = time.perf_counter() - start
        steps = set() if monitor is None else {step for step, *_ in monitor.records}
    return seconds, len(steps), model[-1].bias.detach().clone()


def main() -> None:
    """Measure, print, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=300)
    arguments.add_argument("--every", type=int, default=100)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.05])
    args = arguments.parse_args()
    if args.quick:
        args.steps, args.every, args.repeats = 20, 5, 1
    module = example("autoencoder")
    mnist = has_mnist(args.data_dir)
    images = (module.mnist(args.data_dir) if mnist else module.digits())[0]
    rows = []
    for rank in (None, 32):
        seconds: dict[float, list[float]] = {}
        records: dict[float, int] = {}
        ends = []
        for _ in bar(range(args.repeats), "repeats"):
            for share in (0.0, *args.shares):
                taken, count, end = train(images, share, rank, args)
                seconds.setdefault(share, []).append(taken)
                records[share] = count
                ends.append(end)
        assert all(torch.equal(end, ends[0]) for end in ends)
        base = statistics.fmean(seconds[0.0])
        for share, values in seconds.items():
            row: dict[str, Any] = {
                "rank": "full" if rank is None else str(rank),
                "allowed share": share,
                "records": records[share],
                "ms per step": 1e3 * statistics.fmean(values) / args.steps,
                "cost": statistics.fmean(values) / base - 1,
            }
            rows.append(row)
    print(table(rows))
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for rank, colour in (("full", "tab:blue"), ("32", "tab:red")):
        chosen = [r for r in rows if r["rank"] == rank]
        x = [r["allowed share"] for r in chosen]
        axis.plot(x, [r["cost"] for r in chosen], "o-", color=colour, label=rank)
    axis.plot([0, max(args.shares)], [0, max(args.shares)], "--", color="0.6")
    axis.set(xlabel="share that the monitor may take", ylabel="share that it took")
    axis.legend(frameon=False, title="rank")
    save(args.output, "monitor_cost", {"rows": rows}, figure)


if __name__ == "__main__":
    main()
