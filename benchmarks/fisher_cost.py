"""Cost of an EKFAC Fisher matrix, and of a tangent kernel, beside other libraries.

    python benchmarks/fisher_cost.py                 # minutes; ResNet-18 at full width
    python benchmarks/fisher_cost.py --quick

The Monte-Carlo Fisher of ResNet-18 (32 x 32 stem, without batch norm) over 400 images,
of the small transformer of examples/transformer.py and of a plain convolutional network
that every library takes, as K-FAC and EKFAC: ours, curvlinops' (not of the
transformer), and on the last network NNGeometry's and BackPACK's, those that are
installed. Time is in gradient passes: one forward and backward pass of the same network
over the same images, measured in the same process. Every row is a process of its own,
so that peak memory is its own too: the resident set's largest size less what the
process had before (Linux). The tangent kernel is that of 300 images and 10 classes on a
convolutional network, beside the size that its Jacobian would have.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, example, parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac

Batches = list[tuple[Tensor, Tensor]]


def resnet18(args: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """Return the network and random images."""
    model = example("cifar").resnet((2, 2, 2, 2), args.width)
    x = torch.randn(args.images, 3, 32, 32)
    y = torch.randint(10, (args.images,))
    size = args.batch
    return model, list(zip(x.split(size), y.split(size), strict=True))


def transformer(args: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """Return the language model and random text; every position has a target."""
    length = 16 if args.quick else 64
    model = example("transformer").Transformer(65, length)
    x = torch.randint(65, (args.images, length))
    y = torch.randint(65, (args.images, length))
    size = args.batch
    return model, list(zip(x.split(size), y.split(size), strict=True))


def plain(args: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """Return the convolutional network and random images."""
    x = torch.randn(args.images, 3, 32, 32)
    y = torch.randint(10, (args.images,))
    size = args.batch
    return convolutional(args)[0], list(zip(x.split(size), y.split(size), strict=True))


NETWORKS = {"resnet18": resnet18, "transformer": transformer, "plain": plain}


def convolutional(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """Return a convolutional network and 300 random images."""
    layers: list[nn.Module] = []
    channels = 3
    for out in (args.width, 2 * args.width, 4 * args.width):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
        channels = out
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 10))
    return model, torch.randn(60 if args.quick else 300, 3, 32, 32)


def gradient_pass(model: nn.Module, data: Batches) -> None:
    """Do one forward and backward pass over the data."""
    parameters = list(model.parameters())
    for x, y in data:
        outputs = model(x)
        loss = cross_entropy(outputs.flatten(0, -2), y.flatten())
        torch.autograd.grad(loss, parameters)


def ours(
    structure: str, rank: int | None = None
) -> Callable[[nn.Module, Batches], None]:
    """Return the estimate to be timed."""

    def estimate(model: nn.Module, data: Batches) -> None:
        ekfac.fisher(model, data, structure, "mc", rank=rank)

    return estimate


def theirs(name: str) -> Callable[[nn.Module, Batches], None]:
    """Return curvlinops' estimate."""

    def estimate(model: nn.Module, data: Batches) -> None:
        import curvlinops

        operator = getattr(curvlinops, name)(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            data,
            fisher_type="mc",
            check_deterministic=False,
            separate_weight_and_bias=False,
        )
        operator.compute_kronecker_factors()
        if name.startswith("EKFAC"):
            operator.compute_eigenvalue_correction()

    return estimate


def nngeometry(name: str) -> Callable[[nn.Module, Batches], None]:
    """Return NNGeometry's estimate."""

    def estimate(model: nn.Module, data: Batches) -> None:
        from nngeometry.metrics import FIM_MonteCarlo
        from nngeometry.object import pspace

        x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=len(data[0][0])
        )
        FIM_MonteCarlo(
            model,
            loader,
            getattr(pspace, name),
            variant="classif_logits",
            trials=1,
            device="cpu",
        )

    return estimate


def backpack_kfac(model: nn.Module, data: Batches) -> None:
    """Take BackPACK's K-FAC factors, averaged over the batches."""
    from backpack import backpack, extend
    from backpack.extensions import KFAC

    model, loss = extend(model), extend(nn.CrossEntropyLoss())
    sums: dict[str, list[Tensor]] = {}
    for x, y in data:
        model.zero_grad()
        with backpack(KFAC(mc_samples=1)):
            loss(model(x), y).backward()
        for name, parameter in model.named_parameters():
            factors = [factor * (len(x) / len(data)) for factor in parameter.kfac]
            for total, factor in zip(
                sums.setdefault(name, factors), factors, strict=True
            ):
                if total is not factor:
                    total += factor


METHODS: dict[str, Callable[[nn.Module, Batches], None]] = {
    "ekfac: K-FAC": ours("kfac"),
    "ekfac: EKFAC": ours("ekfac"),
    "ekfac: EKFAC rank 32": ours("ekfac", 32),
    "curvlinops: K-FAC": theirs("KFACLinearOperator"),
    "curvlinops: EKFAC": theirs("EKFACLinearOperator"),
    "nngeometry: K-FAC": nngeometry("PMatKFAC"),
    "nngeometry: EKFAC": nngeometry("PMatEKFAC"),
    "backpack: K-FAC": backpack_kfac,
}


def warm_up(method: str) -> None:
    """Pay for imports and first calls before anything is measured."""
    model, x = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten()), torch.randn(3, 1, 2, 2)
    y = torch.zeros(3, dtype=torch.long)
    if method in METHODS:
        METHODS[method](model, [(x, y)])
    else:
        ekfac.ntk(model, x)


def peak() -> float:
    """Return the largest resident size so far, in MiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row of the table, from a fresh process."""
    torch.manual_seed(0)
    warm_up(method)
    if method == "ekfac: tangent kernel":
        model, x = convolutional(args)
        before = peak()
        start = time.perf_counter()
        K = ekfac.ntk(model, x)
        seconds = time.perf_counter() - start
        count = sum(p.numel() for p in model.parameters())
        memory = peak() - before
        start = time.perf_counter()
        gradient_pass(model, [(x, torch.zeros(len(x), dtype=torch.long))])
        jacobian = K.size * count * 4 / 2**20
        return {
            "network": f"convolutional, Jacobian {jacobian:.0f} MiB",
            "method": method,
            "seconds": seconds,
            "passes": seconds / (time.perf_counter() - start),
            "MiB": memory,
        }
    model, data = NETWORKS[name](args)
    gradient_pass(model, data[:1])
    before = peak()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        gradient_pass(model, data)
        seconds.append(time.perf_counter() - start)
    plain = peak()
    start = time.perf_counter()
    METHODS[method](model, data)
    taken = time.perf_counter() - start
    return {
        "network": name,
        "method": method,
        "seconds": taken,
        "passes": taken / min(seconds),
        "MiB": peak() - min(before, plain),
    }


def applies(network: str, method: str) -> bool:
    """Return whether a method is there and has all of a network's layers."""
    library = method.partition(":")[0]
    if importlib.util.find_spec(library) is None:
        return False
    # curvlinops has no embeddings, layer norms or attention; BackPACK no sums of
    # branches, and NNGeometry's memory grows with examples times parameters.
    takes = {
        "ekfac": ("resnet18", "transformer", "plain"),
        "curvlinops": ("resnet18", "plain"),
    }
    return network in takes.get(library, ("plain",))


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Return bars of time and memory, one colour for each network."""
    size = (13, 1.5 + 0.28 * len(rows))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    networks = [row["network"].split(",")[0] for row in rows]
    order = list(dict.fromkeys(networks))
    colours = [f"C{order.index(network)}" for network in networks]
    names = [f"{n}   {row['method']}" for n, row in zip(networks, rows, strict=True)]
    units = {"passes": "gradient passes", "MiB": "peak memory, MiB"}
    for axis, (key, label) in zip(axes, units.items(), strict=True):
        axis.barh(names, [row[key] for row in rows], color=colours)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_xscale("log")
    axes[0].invert_yaxis()
    return figure


def main() -> None:
    """Measure, print the table, save it with its figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=400)
    arguments.add_argument("--batch", type=int, default=50)
    arguments.add_argument("--width", type=int, default=64)
    arguments.add_argument("--networks", nargs="+", default=list(NETWORKS))
    arguments.add_argument("--methods", nargs="+", default=list(METHODS))
    args = arguments.parse_args()
    if args.quick:
        args.images, args.batch, args.width = 40, 20, 8
    rows = []
    context = multiprocessing.get_context("spawn")
    jobs = [("convolutional", "ekfac: tangent kernel")]
    for network in args.networks:
        jobs += [(network, m) for m in args.methods if applies(network, m)]
    for name, method in bar(jobs, "estimates"):
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (name, method, args)))
        print(rows[-1], flush=True)
    print("\n" + table(rows))
    figure = draw(rows)
    save(args.output, "fisher_cost", {"rows": rows}, figure)


if __name__ == "__main__":
    main()
