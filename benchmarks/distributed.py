"""Several ranks: what they keep and send, and what a step costs beside one process.

    python benchmarks/distributed.py                # tables and overhead
    python benchmarks/distributed.py --parts tables

The tables are the cost model of ``communication_cost``, checked on 2 and 4
processes against what is handed to collectives (tests/test_process_group.py): memory of
the curvature on the fullest rank, and the bytes through the busiest rank in a mean step
by ring collectives, in float32 with the default intervals. DDP's own all-reduce of the
gradients is there to compare.

The overhead is the time of a step in 2 processes over that in 1, at the same batch per
process, one thread each, every process pinned to a core: medians, and the least and the
largest ratio, of rounds of one whole basis interval, in which one and two processes
take turns while the others sleep. SGD's is that of DDP alone. In the fourth row the
sums of the factors travel at the step in place of during the backward pass; in the last
each rank computes the steps of its own layers and sends them (``gradient_workers`` one
over the ranks).
"""

from __future__ import annotations

import inspect
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing
from common import example, parser, save, table
from communication_cost import Sizes, Traffic, traffic
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ekfac import EKFAC, KFAC
from ekfac.curvature.distributed.assignment import Grid
from ekfac.layers import find_blocks

RANKS = (8, 64, 512)
MIB = 2**20
WORKERS: dict[str, Callable[[int], int]] = {
    "all": lambda ranks: ranks,
    "half": lambda ranks: ranks // 2,
    "8": lambda ranks: 8,
    "1": lambda ranks: 1,
}
MARKERS = {"all": "o", "half": "s", "8": "^", "1": "v"}


class Layer(nn.Module):
    """One layer of a transformer of GPT-2's size, its projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])


def resnet50() -> nn.Module:
    """Return the layers of ResNet-50 (He et al. 2015, table 1), for their shapes."""
    layers: list[nn.Module] = []

    def convolution(before: int, after: int, size: int) -> None:
        layers.append(nn.Conv2d(before, after, size, bias=False))
        layers.append(nn.BatchNorm2d(after))

    with torch.device("meta"):
        convolution(3, 64, 7)
        channels = 64
        for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for number in range(count):
                convolution(channels, width, 1)
                convolution(width, width, 3)
                convolution(width, 4 * width, 1)
                if number == 0:
                    convolution(channels, 4 * width, 1)
                channels = 4 * width
        layers.append(nn.Linear(channels, 1000))
        return nn.Sequential(*layers)


def transformer() -> nn.Module:
    """Return 12 layers of width 768 without embeddings, for their shapes."""
    with torch.device("meta"):
        return nn.Sequential(*[Layer(768) for _ in range(12)])


NETWORKS = {"ResNet-50": resnet50, "transformer": transformer}
# EKFAC's own
DEFAULTS = {k: p.default for k, p in inspect.signature(EKFAC).parameters.items()}
INTERVALS = DEFAULTS["factor_interval"], DEFAULTS["basis_interval"]


def sizes_of(model: nn.Module, max_dim: int = 2048) -> list[Sizes]:
    """Return the sizes of a network's blocks."""
    blocks = find_blocks(model, list(model.parameters()), max_dim).blocks
    return [Sizes.of(block) for block in blocks]


def fractions(ranks: int) -> list[int]:
    """Return numbers of gradient workers: one, a node of eight, half, all."""
    return sorted({count(ranks) for count in WORKERS.values()})


def busiest(layers: Sequence[Sizes], grid: Grid) -> tuple[float, float, Traffic]:
    """Return the most that a rank keeps and sends, in MiB, and one rank's traffic."""
    found = [traffic(layers, grid, rank) for rank in range(grid.ranks)]
    kept = max(one.kept for one in found) * 4 / MIB
    sent = max(one.through(grid.ranks, *INTERVALS) for one in found) * 4 / MIB
    return kept, sent, found[0]


def tables() -> list[dict[str, Any]]:
    """Return one row for every network, number of ranks and of gradient workers."""
    rows = []
    for name, build in NETWORKS.items():
        model = build()
        layers = sizes_of(model)
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name}: {parameters} parameters, {len(layers)} blocks")
        for ranks in RANKS:
            for workers in fractions(ranks):
                kept, sent, one = busiest(layers, Grid(ranks, workers))
                gradient = 2 * (ranks - 1) / ranks * parameters * 4 / MIB
                rows.append(
                    {
                        "network": name,
                        "ranks": ranks,
                        "workers": f"{workers}/{ranks}",
                        "kept MiB": round(kept, 1),
                        "factors MiB": round(one.factors * 4 / MIB, 1),
                        "bases MiB": round(one.bases * 4 / MIB, 1),
                        "directions MiB": round(one.directions * 4 / MIB, 1),
                        "per step MiB": round(sent, 1),
                        "DDP MiB": round(gradient, 1),
                    }
                )
    return rows


# -- overhead --------------------------------------------------------------------------


def _at_the_step(model: nn.Module) -> EKFAC:
    """Return an optimizer whose statistics travel at the step alone."""
    optimizer = EKFAC(model, lr=1e-5)
    optimizer.capture.averaged = bool
    return optimizer


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
    "KFAC": lambda model: KFAC(model, lr=1e-5),
    "EKFAC-ra": lambda model: EKFAC(model, lr=1e-5),
    "EKFAC-ra, sums at the step": _at_the_step,
    "EKFAC-ra, one worker a layer": lambda model: EKFAC(
        model, lr=1e-5, gradient_workers=1 / dist.get_world_size()
    ),
}
WORLDS = (1, 2)


def _cores() -> list[int]:
    """Return the cores that processes may be pinned to, none where that is unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def _serve(rank: int, world: int, port: int, orders: Any, answers: Any) -> None:
    """Do the steps that are ordered, in one of ``world`` processes."""
    cores = _cores()
    if len(cores) >= max(WORLDS):
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(rank)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    trained = {}
    for name, build in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(example("cifar").network("resnet18", 16))
        trained[name] = (model, build(model))
    while (order := orders[rank].get()) is not None:
        name, steps = order
        model, optimizer = trained[name]
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        answers.put((time.perf_counter() - start) / steps)
    dist.destroy_process_group()


class Processes:
    """Some processes that train together when they are told to, and sleep otherwise."""

    def __init__(self, world: int) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.orders = [context.Queue() for _ in range(world)]
        self.answers = context.Queue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.running = torch.multiprocessing.spawn(
            _serve, (world, port, self.orders, self.answers), world, join=False
        )

    def time(self, name: str, steps: int) -> float:
        """Return the seconds of a step on the slowest rank, its mean over ``steps``."""
        for queue in self.orders:
            queue.put((name, steps))
        found: list[float] = []
        while len(found) < len(self.orders):
            if self.answers.empty():
                time.sleep(0.05)
                self.running.join(timeout=0)  # raises what a process raised
            else:
                found.append(self.answers.get())
        return max(found)

    def end(self) -> None:
        """Let them go."""
        for queue in self.orders:
            queue.put(None)
        while not self.running.join():
            pass


def overhead(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Return the time of a step in 1 and in 2 processes, for every optimizer.

    In every round each optimizer does ``steps`` in one process and then in two, so that
    what else goes on in the machine meets both; the first round is not counted.
    """
    if len(_cores()) < max(WORLDS):
        print("processes are not pinned: there are fewer cores than processes")
    groups = {world: Processes(world) for world in WORLDS}
    times: dict[tuple[str, int], list[float]] = {}
    for number in tqdm(range(rounds + 1), "rounds"):
        for name in OPTIMIZERS:
            for world in WORLDS if number % 2 else reversed(WORLDS):
                seconds = groups[world].time(name, steps)
                if number:
                    times.setdefault((name, world), []).append(seconds * 1e3)
    for group in groups.values():
        group.end()
    rows = []
    for name in OPTIMIZERS:
        one, two = (times[name, world] for world in WORLDS)
        ratios = [b / a for a, b in zip(one, two, strict=True)]
        rows.append(
            {
                "optimizer": name,
                "1 process ms": round(statistics.median(one), 1),
                "2 processes ms": round(statistics.median(two), 1),
                "ratio": round(statistics.median(ratios), 3),
                "least": round(min(ratios), 3),
                "largest": round(max(ratios), 3),
            }
        )
    return rows


def draw(rows: Sequence[dict[str, Any]]) -> plt.Figure:
    """Draw memory against bytes per step, over the number of gradient workers."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name in zip(axes, NETWORKS, strict=True):
        for ranks, colour in zip(
            RANKS, ("tab:blue", "tab:red", "tab:green"), strict=True
        ):
            chosen = [r for r in rows if r["network"] == name and r["ranks"] == ranks]
            for row in chosen:
                workers = int(row["workers"].split("/")[0])
                kind = next(
                    k for k, count in WORKERS.items() if count(ranks) == workers
                )
                x, y = row["kept MiB"], row["per step MiB"]
                axis.plot(x, y, MARKERS[kind], color=colour, markersize=8, alpha=0.7)
        axis.set(
            title=name,
            xlabel="curvature kept by the fullest rank, MiB",
            ylabel="through the busiest rank per step, MiB",
            xscale="log",
        )
        axis.minorticks_off()
        ticks = (10, 20, 50, 100, 200, 500, 1000)
        axis.set_xticks(ticks, map(str, ticks))
        gradient = chosen[-1]["DDP MiB"]
        axis.axhline(gradient, color="grey", linestyle=":")
        axis.set_ylim(bottom=0)
    for kind, marker in MARKERS.items():
        axes[0].plot([], [], marker, color="grey", label=f"gradient workers: {kind}")
    axes[0].plot([], [], ":", color="grey", label="gradients of DDP, 512 ranks")
    for ranks, colour in zip(RANKS, ("tab:blue", "tab:red", "tab:green"), strict=True):
        axes[0].plot([], [], "-", color=colour, label=f"{ranks} ranks")
    figure.legend(loc="outside right upper")
    return figure


def main() -> None:
    """Print the tables and the overhead."""
    options_of = parser(__doc__)
    parts = ("tables", "overhead")
    options_of.add_argument("--parts", nargs="+", choices=parts, default=parts)
    options_of.add_argument("--rounds", type=int, default=5, help="of the overhead")
    options = options_of.parse_args()
    results: dict[str, Any] = {}
    rows = tables()
    if "tables" in options.parts:
        results["tables"] = rows
        print(table(rows), end="\n\n")
    if "overhead" in options.parts:
        results["overhead"] = overhead(
            *((1, 1) if options.quick else (options.rounds, INTERVALS[1]))
        )
        print(table(results["overhead"]), end="\n\n")
    save(options.output, "distributed", results, draw(rows))


if __name__ == "__main__":
    main()
