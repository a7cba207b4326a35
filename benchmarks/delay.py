"""Bases found by a thread of their own: time of the steps, and what it costs in loss.

    OMP_NUM_THREADS=1 python benchmarks/delay.py --data-dir MNIST     # two idle cores
    python benchmarks/delay.py --quick

The deep auto-encoder of examples/autoencoder.py, EKFAC with ``basis_interval`` 50 and
``basis_delay`` 0, 5 and 20, one run after the other, all with the same seeds. ``mean``
and the percentiles are of the steps after the first ``basis_interval``, in which bases
are found within the step whatever the delay. ``loss`` is the mean of the last 20 steps
over the seeds. With as many compute threads as cores, training and decompositions only
take turns.
"""

from __future__ import annotations

import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import example, has_mnist, parser, save, table
from tqdm import tqdm

from ekfac import EKFAC


def train(
    images: torch.Tensor, delay: int, seed: int, steps: int, widths: tuple[int, ...]
) -> tuple[list[float], list[float]]:
    """Return the seconds and the losses of all steps of one run."""
    module = example("autoencoder")
    torch.manual_seed(seed)
    model = module.network(images.shape[1], widths)
    generator = torch.Generator().manual_seed(seed)
    seconds, losses = [], []
    with EKFAC(model, lr=4e-3, basis_delay=delay) as optimizer:
        for _ in tqdm(range(steps), desc=f"delay {delay}, seed {seed}", leave=False):
            chosen = torch.randperm(len(images), generator=generator)[:200]
            start = time.perf_counter()
            optimizer.zero_grad()
            loss = module.reconstruction_loss(model, images[chosen])
            loss.backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            losses.append(float(loss))
    return seconds, losses


def main() -> None:
    """Measure, print, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=250)
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--delays", type=int, nargs="+", default=[0, 5, 20])
    args = arguments.parse_args()
    module = example("autoencoder")
    widths = module.WIDTHS
    if args.quick:
        args.steps, args.seeds, widths = 70, 1, (32, 16, 32)
    mnist = has_mnist(args.data_dir)
    images = (module.mnist(args.data_dir) if mnist else module.digits())[0]
    seconds: dict[int, list[float]] = {delay: [] for delay in args.delays}
    losses: dict[int, list[float]] = {delay: [] for delay in args.delays}
    for seed in range(args.seeds):
        for delay in args.delays:
            taken, found = train(images, delay, seed, args.steps, widths)
            seconds[delay] += taken[50:]
            losses[delay].append(float(np.mean(found[-20:])))
    rows: list[dict[str, Any]] = []
    first = np.mean(seconds[args.delays[0]])
    for delay in args.delays:
        percent = np.percentile(seconds[delay], [50, 90, 99])
        rows.append(
            {
                "delay": delay,
                "mean, ms": 1e3 * np.mean(seconds[delay]),
                "x no delay": np.mean(seconds[delay]) / first,
                "median, ms": 1e3 * percent[0],
                "90 %, ms": 1e3 * percent[1],
                "99 %, ms": 1e3 * percent[2],
                "loss": np.mean(losses[delay]),
            }
        )
    rows = [{k: float(v) for k, v in row.items()} for row in rows]
    print(f"{torch.get_num_threads()} thread(s)\n{table(rows)}")
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for delay in args.delays:
        ordered = 1e3 * np.sort(seconds[delay])
        axis.plot(np.linspace(0, 100, len(ordered)), ordered, label=str(delay))
    axis.set(xlabel="percent of the steps", ylabel="take at most, ms", ylim=(0, None))
    axis.legend(frameon=False, title="basis_delay")
    save(args.output, "delay", {"rows": rows, "losses": losses}, figure)


if __name__ == "__main__":
    main()
