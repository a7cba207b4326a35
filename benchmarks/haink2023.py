"""Haink (2023): Hessian eigenvectors and weight trajectories, at a size for minutes.

    python benchmarks/haink2023.py                   # six runs, a few minutes
    python benchmarks/haink2023.py --quick

The thesis trains MLPs and convolutional networks on MNIST and CIFAR-10 for days and
keeps Hessians of 42,310 rows. Here a 64-32-32-10 ReLU network learns scikit-learn's
digits (1,400 for training, each image standardised) in double precision with plain SGD,
batch 32, learning rate 0.05 x 0.99^epoch, 150 epochs, then 40 epochs at the last rate
while every step of the 32 x 32 layer is recorded. All 3,466 eigenvectors of the
Hessian are exact. Printed: what the thesis reports (section in brackets; figures only
exist there as images) beside what was measured, mean and deviation over three seeds, of
runs without penalty and with ``lambda |w|^2`` on the weights. The catastrophic
forgetting of section 7.7 belongs to the penalties of ``ekfac.continual``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import bar, parser, print_seconds, save, spread, table
from haink2023_figure import DEPTHS, REPORTED, figure_of
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.diagnostics.eigen_pruning import kronecker_reconstruction
from ekfac.diagnostics.hessian import loss_scaling, with_parameters
from ekfac.diagnostics.papers.haink import variance_curvature
from ekfac.vectors import ParameterVector

LAYER = "2"  # the 32 x 32 one
WEIGHT = f"{LAYER}.weight"
Batches = list[tuple[Tensor, Tensor]]


@dataclass
class Run:
    """A trained network, its data and what was recorded of it."""

    name: str
    penalty: float
    model: nn.Sequential
    initial: ParameterVector
    train: Batches
    test: Batches
    recorder: d.TrajectoryRecorder
    record_share: float  # of the time of a step


def digits() -> tuple[Batches, Batches]:
    """Return standardised digits: 1,400 to train on, 397 to test."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    images = torch.from_numpy(x[order])
    images = images - images.mean(1, keepdim=True)
    images = images / images.std(1, keepdim=True)
    labels = torch.from_numpy(y[order]).long()
    return [(images[:1400], labels[:1400])], [(images[1400:], labels[1400:])]


def trained(
    seed: int, penalty: float, epochs: int, explored: int, width: int = 32
) -> Run:
    """Train a network, and record its middle layer for some epochs more."""
    torch.manual_seed(seed)
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10)).double()
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    initial = ParameterVector.from_model(model)
    train, test = digits()
    ((x, y),) = train
    kernels = [p for n, p in model.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    # torch's weight decay is half of the thesis's: the gradient of lambda |w|^2.
    groups = [{"params": kernels, "weight_decay": 2 * penalty}, {"params": biases}]
    optimizer = torch.optim.SGD(groups, lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    steps = len(x) // 32
    recorder = d.TrajectoryRecorder(model, [WEIGHT], capacity=max(1, explored * steps))
    stepped = recorded = 0.0
    for epoch in range(epochs + explored):
        lr = 0.05 * 0.99 ** min(epoch, epochs - 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for chosen in torch.randperm(len(x), generator=generator).split(32)[:steps]:
            start = time.perf_counter()
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            end = time.perf_counter()
            if epoch >= epochs:
                recorder.record()
                recorded += time.perf_counter() - end
                stepped += end - start
    name = f"{'penalty' if penalty else 'plain'}, seed {seed}"
    share = recorded / stepped
    return Run(name, penalty, model, initial, train, test, recorder, share)


def band(values: Tensor, n: int, low: float, high: float) -> float:
    """Return the mean of the values whose rank is in ``[low, high)`` of all ``n``."""
    return float(values[int(low * n) : max(int(high * n), int(low * n) + 1)].mean())


def trajectory(run: Run, layer: d.Directions) -> dict[str, Any]:
    """Return the drift, and how principal components compare with the Hessian."""
    weights, updates = run.recorder.weights(), run.recorder.updates()
    drift = d.drift(weights)
    test, space = d.accuracy_of(run.test), run.recorder.space
    components = d.principal_components(weights, min(500, *weights[1:].shape), space)
    ends = [1, components.vectors.shape[1]]
    cumulated = d.cumulative_reconstruction(run.model, components, test, ends)
    _, singular = d.singular_directions(ParameterVector.from_model(run.model)[WEIGHT])
    mutual = d.overlap(components.vectors[:, :5], singular[:, :5]).captured()
    found: dict[str, Any] = {
        "recording, share of a step": run.record_share,
        "accuracy, layer from p_1 alone": float(cumulated.value[0]),
        "accuracy, layer from 500 PCs": float(cumulated.value[1]),
        "p_1 in SV 1-5": float(mutual[0]),
        "p_2 to p_5 in SV 1-5": float(mutual[1:].mean()),
        "drift R^2": drift.determination,
        "drift var / a^2(T^2-1)/12": drift.variance / drift.predicted_variance,
        "pc1 / pc2 variance": drift.dominance,
        "|theta_1| grows by": drift.growth,
        "cos(p_1, w)": drift.alignment,
    }
    pcs = {"weights": weights, "updates": updates}
    for name, rows in pcs.items():
        components = d.principal_components(rows, min(50, rows.shape[1]))
        for k in DEPTHS:
            if k > components.vectors.shape[1]:
                continue
            overlap = d.overlap(components.vectors[:, :k], layer.vectors[:, :k])
            found[f"PCs of {name} in top {k}"] = overlap.similarity()
    top = layer.top(len(layer) // 5)
    fit = variance_curvature(weights, top.vectors, top.value)
    found["variance ~ curvature^alpha"] = fit.value
    return found


def hessian_of(run: Run) -> tuple[d.Directions, d.Directions]:
    """Return all directions of the network by magnitude and of the layer by value."""
    H = ekfac.hessian(run.model, run.train, cross_entropy, "dense")
    block = ekfac.hessian(
        run.model, run.train, cross_entropy, "dense", parameters=[WEIGHT]
    )
    return (
        d.Directions.of_matrix(H, order="magnitude", cut=0),
        d.Directions.of_matrix(block, cut=0),
    )


def eigenvectors(run: Run, whole: d.Directions, layer: d.Directions) -> dict[str, Any]:
    """Return weight products, shares, overlaps and concentration."""
    weights = ParameterVector.from_model(run.model)
    energy = d.weight_product(whole, weights).relative_energy()
    shares = d.layer_shares(whole)
    top, null = shares.value[:10].mean(dim=0), shares.null
    padded = layer.top(10).in_space(whole.space)
    mutual = d.overlap(padded.vectors, whole.vectors[:, :50])
    spread = d.concentration(whole).participation
    n, values = len(whole), whole.value
    _, directions = d.singular_directions(weights[WEIGHT])
    part = d.overlap(directions, layer.vectors[:, : len(layer) // 5]).captured()
    noise = 1e-12 * values.abs().max()
    generator = torch.Generator().manual_seed(0)
    with with_parameters(run.model, run.initial):
        early = d.top_directions(
            run.model, run.train, cross_entropy, 10, parameters=[WEIGHT]
        )
    spacings = d.level_spacings(values)
    test = d.porter_thomas(whole.vectors[:, :200], generator=generator)
    return {
        "weight product, top 1 %": band(energy, n, 0, 0.01),
        "weight product, 1-5 %": band(energy, n, 0.01, 0.05),
        "weight product, 5-20 %": band(energy, n, 0.05, 0.2),
        "weight product, maximum at %": 100 * int(energy.argmax()) / n,
        "share of last layer / null, top 10": float(top[-1] / null[-1]),
        "share of first layer / null, top 10": float(top[0] / null[0]),
        "layer's top 10: best overlap": float(mutual.value.amax(dim=1).mean()),
        "layer's top 10: largest overlap": float(mutual.value.max()),
        "layer's top 10 in network's top 50": mutual.similarity(),
        "the same by chance": mutual.chance,
        "lambda_max layer / network": float(layer.value[0] / values[0]),
        "negative eigenvalues": float((values < -noise).double().mean()),
        "|lambda_min| / lambda_max": float(-values.min() / values.max()),
        "layer's |lambda_min| / lambda_max": float(-layer.value[-1] / layer.value[0]),
        "participation top 10": float(spread[:10].mean()),
        "participation middle": float(spread[n // 4 : n // 2].median()),
        "participation bottom 10": float(spread[-10:].mean()),
        "null space, share of directions": 1 - len(spread) / n,
        "SV 1-5 in top 20 % of eigenvectors": float(part[:5].mean()),
        "other SVs": float(part[5:].mean()),
        "last five SVs": float(part[-5:].mean()),
        "outliers beyond the Marchenko-Pastur edge": d.marchenko_pastur_edge(
            weights[WEIGHT]
        ).outliers,
        "spacings' distance from Wigner": spacings.statistic,
        "its p-value": spacings.p_value,
        "spacings' distance from Poisson": spacings.poisson_statistic,
        "layer's top 10 at init in trained": d.overlap(
            early.vectors, layer.vectors[:, :10]
        ).similarity(),
        "layer's lambda_max at init": float(early.value[0]),
        "layer's lambda_max": float(layer.value[0]),
        "Porter-Thomas p, mean": float(test.p_value.mean()),
        "weight product at init, top 1 %": band(
            d.weight_product(whole, run.initial).relative_energy(), n, 0, 0.01
        ),
    }


def losses(run: Run, whole: d.Directions) -> dict[str, Any]:
    """Return reconstruction, loss scaling and the profiles along two directions."""
    model, n = run.model, len(whole)
    test, loss = d.accuracy_of(run.test), d.loss_of(run.train, cross_entropy)
    full = test(model)
    found: dict[str, Any] = {"test accuracy": full}

    def added(order: Tensor, share: float) -> float:
        part = d.Directions(
            whole.value[order],
            whole.vectors[:, order],
            whole.residual[order],
            True,
            0,
            whole.space,
        )
        count = [int(share * n)]
        return float(d.cumulative_reconstruction(model, part, test, count).value[0])

    index = torch.arange(n)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(n, generator=generator)
    found["accuracy, largest 10 % / full"] = added(index, 0.1) / full
    found["accuracy, largest 20 % / full"] = added(index, 0.2) / full
    found["accuracy, smallest 80 %"] = added(index.flip(0), 0.8)
    found["accuracy, random 80 %"] = added(shuffled, 0.8)
    factors = (1.0, 1.5, 2.0, 3.0)
    scaled = loss_scaling(model, _with_penalty(loss, run), factors, [WEIGHT])
    for factor, value in zip(factors, scaled.value, strict=True):
        found[f"log10 loss, layer x {factor:g}"] = float(value.log10())
    weights = ParameterVector.from_model(model)
    energy = d.weight_product(whole, weights).relative_energy()
    for name, i in (("top", 0), ("largest product", int(energy.argmax()))):
        vector = whole.vector(i)
        step = torch.linspace(-0.3, 0.3, 25)
        profile = d.loss_profile(model, run.train, cross_entropy, vector, step)
        removed = torch.tensor([profile.removed])
        gone = d.loss_profile(model, run.train, cross_entropy, vector, removed)
        found[f"{name}: quadratic up to step"] = profile.validity()
        found[f"{name}: loss rise when removed"] = float(gone.value[0]) - loss(model)
        found[f"{name}: predicted rise"] = float(gone.prediction[0]) - loss(model)
    return found


def _with_penalty(loss: Callable[[nn.Module], float], run: Run) -> d.Metric:
    """Return the loss with the penalty that was trained."""

    def measure(model: nn.Module) -> float:
        kernels = [p for n, p in model.named_parameters() if n.endswith("weight")]
        return loss(model) + run.penalty * float(sum(p.square().sum() for p in kernels))

    return measure


def factors(run: Run, layer: d.Directions) -> dict[str, Any]:
    """Return how the Kronecker eigenbasis does in place of the layer's."""
    F = ekfac.fisher(run.model, run.train, "ekfac", parameters=[WEIGHT])
    found: dict[str, Any] = {}
    for k in (5, 10):
        pairs = F.top_eigenpairs(k)
        mutual = d.overlap(pairs.vectors, layer.vectors[:, :k])
        found[f"EKFAC's top {k} in the layer's"] = mutual.similarity()
    largest = F.top_eigenpairs(1).values[0]
    found["lambda_max EKFAC / layer"] = float(largest / layer.value[0])
    whole = ekfac.fisher(run.model, run.train, "ekfac")
    test = d.accuracy_of(run.test)
    for name, share, first in (("largest 20 %", 0.2, True), ("smallest 80 %", 0.8, 0)):
        curve = kronecker_reconstruction(
            run.model, whole, test, [share], largest_first=bool(first)
        )
        found[f"accuracy, Kronecker basis, {name}"] = float(curve.value[0])
    return found


# What the thesis says, with its section; "-" where only an image would tell.
def measured(run: Run) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return all numbers of a run, and the curves of the figure."""
    whole, layer = hessian_of(run)
    found = {
        **trajectory(run, layer),
        **eigenvectors(run, whole, layer),
        **losses(run, whole),
        **factors(run, layer),
    }
    weights = ParameterVector.from_model(run.model)
    counts = sorted({int(f * len(whole)) for f in np.linspace(0, 0.3, 31)})
    curve = d.cumulative_reconstruction(
        run.model, whole, d.accuracy_of(run.test), counts
    )
    rows = run.recorder.weights()
    components = d.principal_components(rows, 3)
    scores = components.scores - components.scores[0]
    return found, {
        "eigenvalues": whole.value.tolist(),
        "weight product": d.weight_product(whole, weights).value.abs().tolist(),
        "participation": d.concentration(whole).participation.tolist(),
        "counts": [c / len(whole) for c in counts],
        "accuracy": curve.value.tolist(),
        **{
            f"PCs of {kind}": [
                found[key] for key in found if key.startswith(f"PCs of {kind}")
            ]
            for kind in ("weights", "updates")
        },
        **{f"theta {i + 1}": scores[:, i].tolist() for i in range(3)},
    }


def main() -> None:
    """Train, measure, print reported beside measured, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args: argparse.Namespace = arguments.parse_args()
    epochs, explored, width = (1, 2, 6) if args.quick else (150, 40, 32)
    seeds = args.seeds[:1] if args.quick else args.seeds
    torch.set_num_threads(1)
    groups: dict[str, list[dict[str, Any]]] = {"plain": [], "penalty": []}
    curves = {}
    for (kind, found), penalty in zip(groups.items(), (0.0, 5e-4), strict=True):
        for seed in bar(seeds, "seeds"):
            run = trained(seed, penalty, epochs, explored, width)
            numbers, curve = measured(run)
            found.append({key: float(value) for key, value in numbers.items()})
            if seed == seeds[0]:
                curves[kind] = curve
            print(f"{run.name}: done", flush=True)
    rows = [
        {"quantity": key, "reported": REPORTED.get(key, "-")}
        | {kind: spread([run[key] for run in found]) for kind, found in groups.items()}
        for key in groups["plain"][0]
    ]
    print("\n" + table(rows))
    print_seconds()
    results = {"rows": rows, "runs": groups}
    save(args.output, "haink2023", results, figure_of(curves))


if __name__ == "__main__":
    main()
