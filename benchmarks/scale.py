"""Memory, traffic and time of large models on many ranks, from shapes alone.

    python benchmarks/scale.py            # predictions, and the check on this machine
    python benchmarks/scale.py --quick    # the check on a smaller network

The predictions are arithmetic, nothing here has run on a GPU. Numbers of bytes and
elements are those of ``communication_cost`` and ``state_bytes``, which the check
compares with what gloo runs keep and hand to collectives; times are numbers of
operations over the rates in ``GPU``, which are assumptions and printed with the result.
They hold for EKFAC's defaults and data-parallel ranks that keep one layer's curvature
on one rank (``gradient_workers`` one over the ranks); nothing is taken to overlap but
the gradient's own all-reduce.

The check trains a small network in 2 processes by gloo, measures the rates of this
machine and compares the predicted with the measured processor time that EKFAC adds to
SGD in one process, without the collectives: on a machine that others use as well, the
time on the clock measures them.
"""

from __future__ import annotations

import inspect
import math
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing
from common import parser, save, table
from communication_cost import Counted, Sizes, traffic
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ekfac import EKFAC
from ekfac.curvature.distributed.assignment import Assignment, Grid
from ekfac.curvature.stacked_storage import state_bytes
from ekfac.curvature.state import Placement, Storage
from ekfac.layers import Block, find_blocks
from ekfac.optim.precondition import POLAR_STEPS, moves_as_adamw

GIB = 2**30
DEFAULTS = {k: p.default for k, p in inspect.signature(EKFAC).parameters.items()}
MAX_ASPECT = DEFAULTS["max_aspect"]
RANKS = (8, 64, 512)
FACTORS, BASIS = DEFAULTS["factor_interval"], DEFAULTS["basis_interval"]
# Rows to train on: tokens of GPT-2's and Llama's training, 300 epochs of ImageNet's
# images in patches.
ROWS = {"GPT-2 XL": 10e9, "Llama-7B": 1e12, "ViT-H": 300 * 1.28e6 * 257}


@dataclass(frozen=True)
class State:
    """Options that decide what is kept, and how often it is decomposed."""

    max_dim: int = 2048
    rank: int | None = None
    storage: Storage = "full"
    basis_interval: int = BASIS


STATES = {
    "defaults": State(),
    "wide": State(16384, basis_interval=500),
    "wide, bfloat16": State(16384, storage="bfloat16", basis_interval=500),
    "rank 64": State(16384, rank=64),
    "rank 64, bfloat16": State(16384, rank=64, storage="bfloat16"),
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
        model: Its parameters need no storage.
        rows: Examples times positions that one rank has in a batch.
    """

    model: nn.Module
    rows: int

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(p.numel() for p in self.model.parameters())

    def blocks(self, state: State) -> Sequence[Block]:
        """Return the layers' blocks."""
        aspect = MAX_ASPECT if state.rank is None else math.inf
        parameters = list(self.model.parameters())
        return find_blocks(self.model, parameters, state.max_dim, aspect).blocks


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


def networks() -> dict[str, Network]:
    """Return the networks, on the meta device."""
    with torch.device("meta"):
        gpt = transformer(1600, 6400, 48, 50257, gated=False)
        llama = transformer(4096, 11008, 32, 32000, gated=True)
        vit = transformer(1280, 5120, 32, 0, gated=False)
    return {
        "GPT-2 XL": Network(gpt, 8 * 1024),
        "Llama-7B": Network(llama, 4 * 2048),
        "ViT-H": Network(vit, 32 * 257),
    }


@dataclass(frozen=True)
class Prediction:
    """What a mean step needs on the busiest rank, in bytes and seconds.

    Attributes:
        curvature: Bytes of it in memory.
        rest: Bytes of the averages of what moves as with AdamW.
        handed: Elements that a rank hands to collectives, beside the gradient's.
        sent: Bytes of them through its network connection, by ring collectives.
        products: Seconds of factors, rotations and polar factors.
        decompositions: Seconds of them.
        collectives: Seconds of the traffic, none of it hidden behind the computation.
    """

    curvature: int
    rest: int
    handed: float
    sent: float
    products: float
    decompositions: float
    collectives: float

    @property
    def seconds(self) -> float:
        """All that a step takes beside the gradient."""
        return self.products + self.decompositions + self.collectives


def predict(network: Network, ranks: int, rates: Rates, state: State) -> Prediction:
    """Return what the busiest rank needs.

    Args:
        network: The layers.
        ranks: How many there are.
        rates: Of one.
        state: What is kept of a layer, by one rank.
    """
    blocks = network.blocks(state)
    moves = {block.name: _moves(block) for block in blocks}
    sizes = [Sizes.of(block, state.rank) for block in blocks]
    # What moves as with AdamW has no direction to send.
    sizes = [s if moves[s.name] else replace(s, parameters=0) for s in sizes]
    assignment = Assignment(Grid(ranks, 1), 0, {}, {})
    assignment.extend({one.name: one.cost for one in sizes})
    # The share of gradients along weights is kept of every layer by all.
    kept = [8 * len(sizes)] * ranks
    cost, rotation = [0.0] * ranks, [0.0] * ranks
    for one, block in zip(sizes, blocks, strict=True):
        owner, held = assignment.owners[one.name], Placement(momentum=moves[one.name])
        weights = 4 * (2 + held.scalings + held.momentum)  # of the averages
        kept[owner] += state_bytes(block, state.rank, state.storage, held) + weights
        cost[owner] += one.cost
        rotation[owner] += _rotation(block, state.rank) * held.momentum
    said = traffic(sizes, Grid(ranks, 1), 0)
    sent = 4 * said.through(ranks, FACTORS, state.basis_interval)
    preconditioned = sum(math.prod(b.shape) for b in blocks if moves[b.name])
    grams = sum(_gram(block) for block in blocks) * network.rows / FACTORS
    calls = 0 if ranks == 1 else 2 + len(sizes) / state.basis_interval
    return Prediction(
        max(kept),
        8 * (network.parameters - preconditioned),
        said.factors / FACTORS + said.directions,
        sent,
        (grams + max(rotation)) / rates.products,
        max(cost) / state.basis_interval / rates.eigh,
        sent / rates.link + calls * rates.latency,
    )


def _moves(block: Block) -> bool:
    """Return whether a block gives its layer's direction."""
    options: Any = SimpleNamespace(direction="spectral")
    return not moves_as_adamw(block, options)


def _gram(block: Block) -> float:
    """Return the multiplications of a block's factors for one row."""
    b, d_out, d_in = block.shape
    inputs = 0 if block.diagonal[0] else d_in**2
    return float(b * (inputs + (0 if block.diagonal[1] else d_out**2)))


def _rotation(block: Block, rank: int | None) -> float:
    """Return the multiplications of a gradient's way into its basis and back.

    That of its polar factor is between, see :func:`ekfac.kernels.polar`.
    """
    b, d_out, d_in = block.shape
    kept = [
        0 if diagonal else min(d, d if rank is None else rank)
        for d, diagonal in zip((d_in, d_out), block.diagonal, strict=True)
    ]
    m, n = sorted((d_in, d_out))
    polar = POLAR_STEPS * (2.0 * m * m * n + m**3)
    return b * (2.0 * d_out * d_in * sum(kept) + polar)


def predictions() -> list[dict[str, Any]]:
    """Return one row for every network, state and number of ranks."""
    rows = []
    for name, network in networks().items():
        parameters = network.parameters
        gradient = 6 * parameters * network.rows / 2 / GPU.products
        for label, state in STATES.items():
            for ranks in RANKS:
                needs = predict(network, ranks, GPU, state)
                steps = ROWS[name] / network.rows / ranks
                rows.append(
                    {
                        "network": name,
                        "state": label,
                        "GPUs": ranks,
                        "state GiB": round((needs.curvature + needs.rest) / GIB, 2),
                        "AdamW GiB": round(8 * parameters / GIB, 2),
                        "sent GiB": round(needs.sent / GIB, 2),
                        "gradient ms": round(1e3 * gradient),
                        "products ms": round(1e3 * needs.products),
                        "eigh ms": round(1e3 * needs.decompositions),
                        "collectives ms": round(1e3 * needs.collectives),
                        "x gradient": round(1 + needs.seconds / gradient, 2),
                        "days": round(steps * (gradient + needs.seconds) / 86400, 1),
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


@dataclass(frozen=True)
class Measured:
    """One rank's steps through whole intervals, from the second of the basis on.

    Attributes:
        seconds: Mean processor time of a step.
        kept: Bytes of the curvature.
        handed: Elements of a mean step handed to collectives, beside the gradient's.
    """

    seconds: float
    kept: int = 0
    handed: float = 0.0


def train(width: int, rows: int, *, ekfac: bool) -> Measured:
    """Train the small network on this rank's own batch."""
    torch.manual_seed(0)
    model = DistributedDataParallel(small(width))
    workers = 1 / dist.get_world_size()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    if ekfac:
        own: Any = {"basis_tolerance": 0.0, "gradient_workers": workers}
        optimizer = EKFAC(model, lr=1e-6, **own)
    x, y = torch.randn(rows, width), torch.randint(0, width, (rows,))

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    steps(BASIS)
    whole = math.lcm(FACTORS, BASIS)
    begin = time.process_time()
    with Counted() as counted:
        steps(whole)
    seconds = (time.process_time() - begin) / whole
    if not isinstance(optimizer, EKFAC):
        return Measured(seconds)
    kept = sum(layer.bytes() for layer in optimizer.curvature.values())
    handed = counted.total("all_reduce", "reduce", "broadcast") / whole
    return Measured(seconds, kept, handed)


def check(rank: int, world: int, port: int, width: int, answers: Any) -> None:
    """Compare prediction and measurement in one process of several."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    rows = 2 * width
    rates = measured_rates(width)
    sgd, ekfac = (train(width, rows, ekfac=flag) for flag in (False, True))
    predicted = predict(Network(small(width), rows), world, rates, State())
    computed = predicted.products + predicted.decompositions
    kept = torch.tensor(ekfac.kept)
    dist.all_reduce(kept, dist.ReduceOp.MAX)
    if rank == 0:
        answers.put(
            {
                "width": width,
                "ranks": world,
                "kept": int(kept),
                "predicted": predicted.curvature,
                "handed": ekfac.handed,
                "predicted handed": predicted.handed,
                "SGD ms": round(1e3 * sgd.seconds, 2),
                "EKFAC ms": round(1e3 * ekfac.seconds, 2),
                "added ms": round(1e3 * (ekfac.seconds - sgd.seconds), 2),
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
            ranks, kept = zip(*((r["GPUs"], r["state GiB"]) for r in own), strict=True)
            ax.plot(ranks, kept, marker="o", label=state)
        ax.set(title=name, xlabel="GPUs", xscale="log", yscale="log")
    axes[0].set_ylabel("optimizer state on the fullest GPU, GiB")
    axes[0].legend()
    figure.tight_layout()
    return figure


def main() -> None:
    """Print and save predictions and check."""
    arguments = parser(__doc__)
    options = arguments.parse_args()
    rows = predictions()
    print(f"assumed of one GPU: {GPU}")
    print(table(rows))
    found = [checked(width) for width in ((128,) if options.quick else (256, 512))]
    print(table(found))
    results = {"assumed": vars(GPU), "predictions": rows, "check": found}
    save(options.output, "scale", results, draw(rows))


if __name__ == "__main__":
    main()
