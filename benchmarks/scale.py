"""Memory, traffic and time of large models on many ranks, from shapes alone.

    python benchmarks/scale.py            # predictions, and the check on this machine
    python benchmarks/scale.py --quick    # the check on a smaller network

The predictions are arithmetic, nothing here has run on a GPU: numbers of elements are
those of ``communication_cost`` (checked against what is handed to collectives, in
tests/test_process_group.py), times are numbers of operations over the rates in ``GPU``,
which are assumptions and printed with the result. They hold for data-parallel ranks
that keep one layer's curvature on one rank (``gradient_workers`` one over the ranks).
State in bfloat16 is not offered by the optimizer: its rows say what it would save.

The check trains a small network in 2 processes by gloo, measures the rates of this
machine and compares the predicted with the measured processor time that EKFAC adds to
SGD in one process, without the collectives: on a machine that others use as well, the
time on the clock measures them.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing
from common import parser, save, table
from communication_cost import Sizes, traffic
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ekfac import EKFAC
from ekfac.curvature.distributed.assignment import Assignment, Grid
from ekfac.layers import Block, find_blocks

GIB = 2**30
RANKS = (8, 64, 512)
FACTORS, BASIS = 10, 50  # the default intervals
STATES: dict[str, tuple[int | None, int]] = {  # rank, bytes of factors and bases
    "full": (None, 4),
    "rank 64": (64, 4),
    "bfloat16": (None, 2),
    "rank 64, bfloat16": (64, 2),
}


@dataclass(frozen=True)
class Rates:
    """What one rank does in a second.

    Attributes:
        products: Multiplications in matrix products.
        eigh: Of full decompositions, cubes of the size.
        link: Bytes through its network connection.
        latency: Seconds of one collective.
    """

    products: float
    eigh: float
    link: float
    latency: float


# Assumed: 100 TFLOP/s in mixed precision, a 2,048-wide decomposition in a third of a
# second, 400 Gbit/s for each GPU.
GPU = Rates(50e12, 2.5e10, 50e9, 5e-5)


@dataclass(frozen=True)
class Network:
    """A network's layers.

    Attributes:
        blocks: With their shapes.
        parameters: How many there are.
        rows: Examples times positions that one rank has in a batch.
    """

    blocks: Sequence[Block]
    parameters: int
    rows: int

    @classmethod
    def of(cls, model: nn.Module, rows: int, max_dim: int) -> Network:
        """Return the layers of a model, whose parameters need no storage."""
        parameters = list(model.parameters())
        blocks = find_blocks(model, parameters, max_dim).blocks
        return cls(blocks, sum(p.numel() for p in parameters), rows)


def transformer(
    width: int, hidden: int, depth: int, vocabulary: int, *, gated: bool
) -> nn.Module:
    """Return the matrices of a transformer: fused q, k, v; two or three of the MLP."""
    layers: list[nn.Module] = []
    if vocabulary:
        layers.append(nn.Embedding(vocabulary, width))
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=not gated) for _ in range(4)]
        ways = 2 if gated else 1
        layers += [nn.Linear(width, hidden, bias=not gated) for _ in range(ways)]
        layers.append(nn.Linear(hidden, width, bias=not gated))
    return nn.ModuleList(layers)


def networks(max_dim: int) -> dict[str, Network]:
    """Return the networks, on the meta device."""
    with torch.device("meta"):
        gpt = transformer(1600, 6400, 48, 50257, gated=False)
        llama = transformer(4096, 11008, 32, 32000, gated=True)
        vit = transformer(1280, 5120, 32, 0, gated=False)
    return {
        "GPT-2 XL": Network.of(gpt, 8 * 1024, max_dim),
        "Llama-7B": Network.of(llama, 4 * 2048, max_dim),
        "ViT-H": Network.of(vit, 32 * 257, max_dim),
    }


@dataclass(frozen=True)
class Prediction:
    """What a mean step needs on the busiest rank, in bytes and seconds.

    Attributes:
        kept: Bytes of the curvature in memory.
        sent: Bytes through the network, beside those of the gradient.
        products: Seconds of factors and rotations.
        decompositions: Seconds of them.
        collectives: Seconds of the traffic, none of it hidden behind the computation.
    """

    kept: float
    sent: float
    products: float
    decompositions: float
    collectives: float

    @property
    def seconds(self) -> float:
        """All that a step takes beside the gradient."""
        return self.products + self.decompositions + self.collectives


def predict(
    network: Network,
    grid: Grid,
    rates: Rates,
    rank: int | None = None,
    width: int = 4,
) -> Prediction:
    """Return what the busiest rank needs.

    Args:
        network: The layers.
        grid: The ranks.
        rates: Of one.
        rank: Eigenvectors that are kept, ``None`` for all.
        width: Bytes of an element of factors and bases; all else has four.
    """
    sizes = [Sizes.of(block, rank) for block in network.blocks]
    assignment = Assignment(grid, 0, {}, {})
    assignment.extend({one.name: one.cost for one in sizes})
    owners = assignment.owners
    factors, bases, rest, cost, rotation = ([0.0] * grid.ranks for _ in range(5))
    for one, block in zip(sizes, network.blocks, strict=True):
        owner = owners[one.name]
        column = grid.column_of(owner)
        for member in range(grid.ranks) if grid.columns == 1 else (owner,):
            factors[member] += one.factors
        for member in column:
            bases[member] += one.bases
            rest[member] += one.scalings + one.eigenvalues
            rotation[member] += _rotation(block, rank)
        cost[owner] += one.cost
    kept = max(width * (factors[n] + bases[n]) + 4 * rest[n] for n in range(grid.ranks))
    sent = 4 * traffic(sizes, grid, 0).through(grid.ranks, FACTORS, BASIS)
    grams = sum(_gram(block) for block in network.blocks) * network.rows / FACTORS
    calls = 0 if grid.ranks == 1 else 2 + len(sizes) / BASIS
    return Prediction(
        kept,
        sent,
        (grams + max(rotation)) / rates.products,
        max(cost) / BASIS / rates.eigh,
        sent / rates.link + calls * rates.latency,
    )


def _gram(block: Block) -> float:
    """Return the multiplications of a block's factors for one row."""
    b, d_out, d_in = block.shape
    inputs = 0 if block.diagonal[0] else d_in**2
    return float(b * (inputs + (0 if block.diagonal[1] else d_out**2)))


def _rotation(block: Block, rank: int | None) -> float:
    """Return the multiplications of a gradient's way into its basis and back."""
    b, d_out, d_in = block.shape
    kept = [
        0 if diagonal else min(d, d if rank is None else rank)
        for d, diagonal in zip((d_in, d_out), block.diagonal, strict=True)
    ]
    return 2.0 * b * d_out * d_in * sum(kept)


def predictions(max_dim: int) -> list[dict[str, Any]]:
    """Return one row for every network, state and number of ranks."""
    rows = []
    for name, network in networks(max_dim).items():
        gradient = 6 * network.parameters * network.rows / 2 / GPU.products
        for state, (rank, width) in STATES.items():
            for ranks in RANKS:
                found = predict(network, Grid(ranks, 1), GPU, rank, width)
                rows.append(
                    {
                        "network": name,
                        "max_dim": max_dim,
                        "state": state,
                        "GPUs": ranks,
                        "curvature GiB": round(found.kept / GIB, 2),
                        "AdamW GiB": round(8 * network.parameters / GIB, 2),
                        "sent GiB": round(found.sent / GIB, 2),
                        "DDP GiB": round(8 * network.parameters / GIB, 2),
                        "gradient ms": round(1e3 * gradient, 1),
                        "products ms": round(1e3 * found.products, 1),
                        "eigh ms": round(1e3 * found.decompositions, 1),
                        "collectives ms": round(1e3 * found.collectives, 1),
                    }
                )
    return rows


# -- the check -------------------------------------------------------------------------


def small(width: int) -> nn.Module:
    """Return the network that the check trains."""
    layers = [nn.Linear(width, width) for _ in range(4)]
    return nn.Sequential(*(part for one in layers for part in (one, nn.Tanh())))


def median(function: Any, clock: Any, times: int = 7) -> float:
    """Return the median time of a call."""
    function()
    found = []
    for _ in range(times):
        begin = clock()
        function()
        found.append(clock() - begin)
    return statistics.median(found)


def measured_rates(width: int) -> Rates:
    """Return the rates of this process; all ranks call this."""
    a = torch.randn(width, width)
    products = width**3 / median(lambda: a @ a, time.process_time)
    symmetric = a @ a.T
    eigh = width**3 / median(lambda: torch.linalg.eigh(symmetric), time.process_time)
    flat, one = torch.zeros(4 * width * width), torch.zeros(1)
    seconds = median(lambda: dist.all_reduce(flat), time.perf_counter)
    latency = median(lambda: dist.all_reduce(one), time.perf_counter)
    through = 2 * (dist.get_world_size() - 1) / dist.get_world_size() * 4 * len(flat)
    return Rates(products, eigh, through / seconds, latency)


def mean_step(width: int, rows: int, steps: int, *, ekfac: bool) -> float:
    """Return the mean time of a step over whole basis intervals, from the second on."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small(width))
    world = dist.get_world_size()
    if ekfac:
        options = {"basis_tolerance": 0.0, "gradient_workers": 1 / world}
        optimizer: torch.optim.Optimizer = EKFAC(model, lr=1e-6, **options)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    x, y = torch.randn(rows, width), torch.randint(0, width, (rows,))
    begin = 0.0
    for step in range(BASIS + steps):
        if step == BASIS:
            begin = time.process_time()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return (time.process_time() - begin) / steps


def check(rank: int, world: int, port: int, width: int, answers: Any) -> None:
    """Compare prediction and measurement in one process of several."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    rows = 2 * width
    rates = measured_rates(width)
    times = {ekfac: mean_step(width, rows, BASIS, ekfac=ekfac) for ekfac in (0, 1)}
    network = Network.of(small(width), rows, 2048)
    predicted = predict(network, Grid(world, 1), rates)
    computed = predicted.products + predicted.decompositions
    if rank == 0:
        answers.put(
            {
                "width": width,
                "ranks": world,
                "SGD ms": round(1e3 * times[0], 2),
                "EKFAC ms": round(1e3 * times[1], 2),
                "added ms": round(1e3 * (times[1] - times[0]), 2),
                "predicted ms": round(1e3 * computed, 2),
                "of it products": round(1e3 * predicted.products, 2),
                "eigh": round(1e3 * predicted.decompositions, 2),
                "beside it collectives": round(1e3 * predicted.collectives, 2),
            }
        )
    dist.destroy_process_group()


def checked(width: int, world: int = 2) -> dict[str, Any]:
    """Run the check in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(
        check, (world, port, width, answers), nprocs=world, join=True
    )
    found: dict[str, Any] = answers.get()
    return found


def draw(rows: Sequence[dict[str, Any]]) -> plt.Figure:
    """Return memory by number of GPUs, one panel for each network."""
    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.5))
    for ax, name in zip(axes, names, strict=True):
        for state in STATES:
            own = [r for r in rows if (r["network"], r["state"]) == (name, state)]
            own = [r for r in own if r["max_dim"] == own[-1]["max_dim"]]
            ranks, kept = zip(
                *((r["GPUs"], r["curvature GiB"]) for r in own), strict=True
            )
            ax.plot(ranks, kept, marker="o", label=state)
        ax.set(title=name, xlabel="GPUs", xscale="log", yscale="log")
    axes[0].set_ylabel("curvature on the fullest GPU, GiB")
    axes[0].legend()
    figure.tight_layout()
    return figure


def main() -> None:
    """Print and save predictions and check."""
    arguments = parser(__doc__)
    options = arguments.parse_args()
    rows = [row for max_dim in (2048, 16384) for row in predictions(max_dim)]
    print(f"assumed of one GPU: {GPU}")
    print(table(rows))
    found = [checked(width) for width in ((128,) if options.quick else (256, 512))]
    print(table(found))
    results = {"assumed": vars(GPU), "predictions": rows, "check": found}
    save(options.output, "scale", results, draw(rows))


if __name__ == "__main__":
    main()
