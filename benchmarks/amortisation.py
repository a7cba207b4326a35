"""How K-FAC and EKFAC bear an old eigenbasis (George 2023, Figure 4).

    python benchmarks/amortisation.py --data-dir FOLDER_OF_IDX_GZ_FILES

Network and loss: the auto-encoder 196-100-50-20-50-100-196, sigmoid, Xavier
initialisation, on MNIST averaged to 14 x 14 (without MNIST in ``--data-dir``:
64-100-...-64 on scikit-learn's digits); binary cross-entropy summed over pixels,
averaged over images; batches of 200.

**Loss against the interval.** KFAC, EKFAC (``per_example``) and EKFAC-ra
(``running_average``), each with ``basis_interval`` 1, 10, 50 and 200, for 300 steps.
``factor_interval`` is 1 throughout, so that only the age of the basis differs. Every
method has, at every interval, the best of the grid ``lr`` in 0.003, 0.01 and
``damping`` in 0.001, 0.003, 0.03 by the final training loss of seed 0; all else is
default (relative damping, grafting, momentum 0.9). Reported: the loss over all training
images after the last step, seeds 0, 1, 2, and its ratio to the same method's at
interval 1. When the results here were made all layers refreshed at steps 1, 2, 4, 8,
... below the interval (now at 1, 3, 9, ...), so interval 200 had the bases of steps 1
to 128.

**Distance of spectra.** EKFAC with ``basis_interval`` 50 (``lr`` 0.003, else default)
trains; optimizers with ``lr`` 0 watch the same model and the same batches, so that all
methods approximate the same matrix: ``G``, the empirical Fisher block of the layer into
the bottleneck (50 to 20) on 1,000 fixed training images. With the gradient of one
example ``g a^T``, the nonzero eigenvalues of ``G`` are those of the Gram matrix
``(A A^T) o (D D^T) / N``. The distance is ``||spectrum - spectrum(G)|| /
||spectrum(G)||``, both sorted, ``G``'s padded with zeros. KFAC's spectrum is that of
the products of its factors' eigenvalues, as of the last refresh; EKFAC's are its
scalings. EKFAC-ra's scalings estimate another quantity, the variance of an example's
gradient plus the batch size times its squared mean, so every distance is also given
after scaling the spectrum to the trace of ``G`` (``shape``): what is left is how the
trace is spread. Two schedules: the basis refreshed every 50 steps (the package's own
schedule), and the basis of step 1 kept. Given are medians over seeds 0, 1, 2: at step
1, over the run (steps 10, 20, ...) and at its end.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import COLOURS, example, has_mnist, parser, save, set_schedule, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits
from tqdm import tqdm

from ekfac import EKFAC, KFAC, LayerCurvature
from ekfac.curvature.options import Schedule
from ekfac.optim.optimizer import KroneckerOptimizer

WIDTHS = (100, 50, 20, 50, 100)
LAYER = "4"  # the third linear layer, 50 to 20
METHODS: dict[str, tuple[type[KroneckerOptimizer], dict[str, Any]]] = {
    "KFAC": (KFAC, {}),
    "EKFAC": (EKFAC, {"scaling": "per_example"}),
    "EKFAC-ra": (EKFAC, {"scaling": "running_average"}),
}
INTERVALS = (1, 10, 50, 200)
LEARNING_RATES = (0.003, 0.01)
DAMPINGS = (0.001, 0.003, 0.03)
SCHEDULES = ("refreshed", "fixed")


@dataclass(frozen=True)
class FixedBasis(Schedule):
    """Every layer keeps the basis of its first step."""

    def basis_due(self, step: int, index: int, layers: int) -> bool:
        """Return ``False``: a layer without a basis gets its first one regardless."""
        return False


@dataclass
class Distances:
    """One method's distances to ``spectrum(G)`` along one run."""

    method: str
    schedule: str
    seed: int
    steps: list[int] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    shape: list[float] = field(default_factory=list)


def images(args: argparse.Namespace) -> tuple[str, Tensor]:
    """Return the training images ``[N, pixels]`` and what they are."""
    module = example("autoencoder")
    if not has_mnist(args.data_dir):
        print(f"no MNIST in {args.data_dir}: training on scikit-learn's digits instead")
        return "digits", module.digits()[0]
    x, _ = module.mnist(args.data_dir)
    return "MNIST 14 x 14", avg_pool2d(x.reshape(-1, 1, 28, 28), 2).flatten(1)


def make(
    method: str, model: nn.Module, interval: int, **options: Any
) -> KroneckerOptimizer:
    """Return one method's optimizer."""
    kind, chosen = METHODS[method]
    options = {"basis_interval": interval, "factor_interval": 1, **chosen, **options}
    return kind(model, **options)


@dataclass(frozen=True)
class Job:
    """One training run of the first part."""

    method: str
    interval: int
    learning_rate: float
    damping: float
    seed: int
    steps: int


def final_loss(job: Job, x: Tensor) -> float:
    """Return the loss over all of ``x`` after the run's last step."""
    module = example("autoencoder")
    torch.manual_seed(job.seed)
    model = module.network(x.shape[1], WIDTHS)
    optimizer = make(
        job.method, model, job.interval, lr=job.learning_rate, damping=job.damping
    )
    batches = module.batches(x, torch.Generator().manual_seed(job.seed))
    for batch in itertools.islice(batches, job.steps):
        optimizer.zero_grad()
        module.reconstruction_loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        loss = module.reconstruction_loss(model, x).item()
    return loss if math.isfinite(loss) else math.inf


def run_all(jobs: Sequence[Job], x: Tensor, name: str, workers: int) -> list[float]:
    """Return the final loss of every job, in order."""
    runs = functools.partial(final_loss, x=x)
    if workers == 1:
        return [runs(job) for job in tqdm(jobs, desc=name, unit="run")]
    with ProcessPoolExecutor(
        workers, get_context("spawn"), torch.set_num_threads, (1,)
    ) as pool:
        return [*tqdm(pool.map(runs, jobs), desc=name, unit="run", total=len(jobs))]


def amortise(x: Tensor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of loss against interval."""
    first, *others = args.seeds
    grid = list(itertools.product(LEARNING_RATES, DAMPINGS))
    grid = grid[:1] if args.quick else grid
    cells = list(itertools.product(METHODS, INTERVALS))
    jobs = [
        Job(method, interval, learning_rate, damping, first, args.steps)
        for method, interval in cells
        for learning_rate, damping in grid
    ]
    tried = dict(zip(jobs, run_all(jobs, x, "grid", args.workers), strict=True))
    best = {
        cell: min(
            (job for job in jobs if (job.method, job.interval) == cell),
            key=lambda job: tried[job],
        )
        for cell in cells
    }
    again = [replace(best[cell], seed=seed) for cell in cells for seed in others]
    tried |= dict(zip(again, run_all(again, x, "seeds", args.workers), strict=True))
    return [_row(job, tried, best[job.method, INTERVALS[0]]) for job in best.values()]


def _row(job: Job, tried: dict[Job, float], base: Job) -> dict[str, Any]:
    """Return a job's losses over all seeds, beside those of the base."""
    losses, base_losses = (
        [loss for other, loss in tried.items() if replace(other, seed=one.seed) == one]
        for one in (job, base)
    )
    mean = float(np.mean(losses))
    return {
        "method": job.method,
        "interval": job.interval,
        "lr": job.learning_rate,
        "damping": job.damping,
        "losses": losses,
        "mean": mean,
        "ratio": mean / float(np.mean(base_losses)),
        "grid": [
            [other.learning_rate, other.damping, loss]
            for other, loss in tried.items()
            if (other.method, other.interval, other.seed)
            == (job.method, job.interval, job.seed)
        ],
    }


def fisher_spectrum(model: nn.Sequential, x: Tensor) -> Tensor:
    """Return the sorted eigenvalues of the layer's empirical Fisher block on ``x``."""
    modules, position = list(model), int(LAYER)
    # Through each module's forward, so that no optimizer's hook sees the pass.
    hidden = x
    with torch.no_grad():
        for module in modules[:position]:
            hidden = module.forward(hidden)
    inputs = torch.cat([hidden, torch.ones(len(x), 1)], dim=1)
    outputs = hidden = modules[position].forward(hidden)
    for module in modules[position + 1 :]:
        hidden = module.forward(hidden)
    loss = binary_cross_entropy_with_logits(hidden, x, reduction="sum")
    (grads,) = torch.autograd.grad(loss, outputs)
    inputs, grads = inputs.double(), grads.double()
    gram = (inputs @ inputs.t()) * (grads @ grads.t()) / len(x)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    size = inputs.shape[1] * grads.shape[1]
    padded = torch.zeros(max(size, len(values)), dtype=values.dtype)
    padded[: len(values)] = values
    return padded[:size]


def spectrum(method: str, layer: LayerCurvature) -> Tensor:
    """Return the sorted eigenvalues of a method's approximation."""
    values = layer.kronecker_scalings() if method == "KFAC" else layer.s
    assert values is not None
    return values.double().flatten().sort(descending=True).values


def watch(x: Tensor, seed: int, args: argparse.Namespace) -> list[Distances]:
    """Return the distances of all methods and schedules along one run."""
    module = example("autoencoder")
    torch.manual_seed(seed)
    model = module.network(x.shape[1], WIDTHS)
    driver = make("EKFAC", model, 50, lr=0.003)
    records, watchers = [], []
    for method, schedule in itertools.product(METHODS, SCHEDULES):
        watcher = make(method, model, 50, lr=0.0, momentum=0.0)
        if schedule == "fixed":
            set_schedule(watcher, FixedBasis(1, 1, 1))
        watchers.append(watcher)
        records.append(Distances(method, schedule, seed))
    optimizers = [*watchers, driver]  # the driver moves the weights, so it is last
    batches = module.batches(x, torch.Generator().manual_seed(seed))
    progress = tqdm(range(1, args.steps + 1), desc=f"spectra, seed {seed}")
    for step, batch in zip(progress, batches, strict=False):
        measured = step == 1 or step % args.every == 0
        if measured:  # of the weights that the step's own statistics belong to
            truth = fisher_spectrum(model, x[: args.images])
        for optimizer in optimizers:
            optimizer.zero_grad()
        module.reconstruction_loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        if measured:
            for record, watcher in zip(records, watchers, strict=True):
                found = spectrum(record.method, watcher.curvature[LAYER])
                record.steps.append(step)
                record.distance.append(_distance(found, truth))
                scaled = found * (truth.sum() / found.sum())
                record.shape.append(_distance(scaled, truth))
    for optimizer in optimizers:
        optimizer.close()
    return records


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def distance_rows(records: Sequence[Distances]) -> list[dict[str, Any]]:
    """Return the table of distances: medians over seeds, and over steps and seeds."""
    rows = []
    for schedule, method in itertools.product(SCHEDULES, METHODS):
        chosen = [r for r in records if (r.method, r.schedule) == (method, schedule)]
        row: dict[str, Any] = {"basis": schedule, "method": method}
        for prefix, key in (("", "distance"), ("shape, ", "shape")):
            values = np.array([getattr(record, key) for record in chosen])
            row[f"{prefix}step 1"] = float(np.median(values[:, 0]))
            row[f"{prefix}run"] = float(np.median(values[:, 1:]))
            row[f"{prefix}end"] = float(np.median(values[:, -1]))
        rows.append(row)
    return rows


def plot(
    rows: Sequence[dict[str, Any]], records: Sequence[Distances], title: str
) -> Figure:
    """Draw the loss against the interval, and the distances along training."""
    figure, panels = plt.subplot_mosaic(
        [["loss", "refreshed", "fixed"], ["loss", "refreshed shape", "fixed shape"]],
        figsize=(12, 6),
        width_ratios=(1.1, 1, 1),
    )
    for suffix, label in (
        ("", "distance of spectra"),
        (" shape", "the same at equal trace"),
    ):
        panels[f"fixed{suffix}"].sharey(panels[f"refreshed{suffix}"])
        panels[f"refreshed{suffix}"].set_ylabel(label)
    _plot_losses(panels["loss"], rows)
    for schedule, text in zip(
        SCHEDULES,
        ("basis refreshed every 50 steps", "basis of step 1 kept"),
        strict=True,
    ):
        chosen = [r for r in records if r.schedule == schedule]
        _plot_distances(panels[schedule], chosen, "distance")
        _plot_distances(panels[f"{schedule} shape"], chosen, "shape")
        panels[schedule].set_title(text, fontsize=10)
        panels[f"{schedule} shape"].set_xlabel("step")
    for axes in panels.values():
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    return figure


def _plot_losses(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for method in METHODS:
        losses = np.array([row["losses"] for row in rows if row["method"] == method])
        colour, low, high = COLOURS[method], losses.min(axis=1), losses.max(axis=1)
        axes.plot(INTERVALS, losses.mean(axis=1), "o-", color=colour, label=method)
        axes.fill_between(INTERVALS, low, high, color=colour, alpha=0.2)
    axes.set(xscale="log", xlabel="basis_interval", ylabel="final training loss")
    axes.set_xticks(INTERVALS, [str(interval) for interval in INTERVALS])
    axes.minorticks_off()
    axes.set_title("best of the grid, mean and range of seeds", fontsize=10)
    axes.legend()


def _plot_distances(axes: Axes, records: Sequence[Distances], key: str) -> None:
    for method in METHODS:
        chosen = [record for record in records if record.method == method]
        middle = np.median([getattr(record, key) for record in chosen], axis=0)
        axes.plot(chosen[0].steps, middle, color=COLOURS[method])
    axes.set(yscale="log")


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--images", type=int, default=1000, help="of the block G")
    options.add_argument("--every", type=int, default=10, help="steps between spectra")
    options.add_argument("--workers", type=int, default=1, help="processes, for losses")
    args = options.parse_args()
    if args.quick:
        args.steps, args.seeds, args.images, args.every = 3, [0], 100, 1
    return args


def main() -> None:
    """Train, print both tables, save rows, curves and figure."""
    args = parse()
    name, x = images(args)
    print(f"{name}: {len(x):,} images, {args.steps} steps, seeds {args.seeds}")
    records = [record for seed in args.seeds for record in watch(x, seed, args)]
    losses = amortise(x, args)
    distances = distance_rows(records)
    shown = [
        {
            **{key: row[key] for key in ("method", "interval", "lr", "damping")},
            "loss": row["mean"],
            "min": min(row["losses"]),
            "max": max(row["losses"]),
            "over interval 1": row["ratio"],
        }
        for row in losses
    ]
    print(f"\n{table(shown)}\n\n{table(distances)}")
    results = {
        "data": name,
        "steps": args.steps,
        "seeds": args.seeds,
        "losses": losses,
        "distances": distances,
        "curves": [vars(record) for record in records],
    }
    save(args.output, "amortisation", results, plot(losses, records, name))


if __name__ == "__main__":
    main()
