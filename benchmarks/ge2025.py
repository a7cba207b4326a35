"""Ge (2025): sub-networks and spectral anisotropy, at a size for minutes.

    python benchmarks/ge2025.py --data-dir MNIST       # two runs, a few minutes
    python benchmarks/ge2025.py --quick                # digits, seconds

The thesis trains a 784-256-256-256-10 network once on MNIST (100 epochs, batch 128, SGD
with momentum, rate x 0.2 at epochs 30, 60 and 90). Here the same network, ReLU, learns
the first 8,000 images of MNIST's test file (2,000 to test), 40 epochs with the rate cut
at the same fractions, initial rate 0.1, momentum 0.9, weights N(0, 0.05^2), biases 0.
The thesis gives neither activation, rate, momentum nor the number of samples of its
Fisher matrix, nor whether ``f`` in it is logits or probabilities: both are measured, on
100 test images, by the exact dual (tangent kernel). Nothing is retrained after a change
but the lottery tickets, which the thesis describes and does not run, and pruning in
the Kronecker eigenbasis (EigenDamage), which it does not have. Without MNIST files the
digits of scikit-learn stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, digits, has_mnist, mnist, parser, print_seconds, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.diagnostics.eigen_pruning import eigen_pruned
from ekfac.diagnostics.hessian import Concentration, with_parameters
from ekfac.diagnostics.subnetworks import (
    change_histogram,
    layer_rerandomisation,
    parameter_scores,
    replaced_parameters,
    select_parameters,
    selection_overlap,
    threshold_curve,
)
from ekfac.vectors import ParameterVector

FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
CRITERIA: tuple[Any, ...] = ("change", "magnitude", "random")
OPERATIONS: tuple[Any, ...] = ("reinitialise", "prune")


@dataclass
class Run:
    """A trained network, its start and its data."""

    name: str
    model: nn.Sequential
    initial: ParameterVector
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    epochs: int

    @property
    def accuracy(self) -> d.Metric:
        """The test accuracy."""
        return d.accuracy_of([(self.x_test, self.y_test)])


def network(size: int, width: int) -> nn.Sequential:
    """Return the network with weights ``N(0, 0.05^2)`` and biases zero."""
    layers: list[nn.Module] = []
    for d_in, d_out in ((size, width), (width, width), (width, width), (width, 10)):
        layer = nn.Linear(d_in, d_out)
        nn.init.normal_(layer.weight, std=0.05)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def images(args: Any) -> tuple[str, tuple[Tensor, ...]]:
    """Return the name of the data and ``x, y, x_test, y_test`` with flat images."""
    is_mnist = has_mnist(args.data_dir) and not args.quick
    data = mnist(args.data_dir) if is_mnist else digits()
    # From standardised pixels back to [0, 1], as the thesis has no preprocessing.
    parts = [data.x_train.flatten(1), data.x_test.flatten(1)]
    low, high = parts[0].min(), parts[0].max()
    x, x_test = ((part - low) / (high - low) for part in parts)
    return "MNIST" if is_mnist else "digits", (x, data.y_train, x_test, data.y_test)


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Train the network."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    marks = [round(epochs * part) for part in (0.3, 0.6, 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, 0.2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x), generator=generator).split(128):
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            after_step()
        schedule.step()


def trained(data: tuple[Tensor, ...], seed: int, epochs: int, width: int) -> Run:
    """Return a trained network."""
    torch.manual_seed(seed)
    x, y, x_test, y_test = data
    model = network(x.shape[1], width)
    initial = ParameterVector.from_model(model)
    fit(model, x, y, epochs, seed)
    return Run(f"seed {seed}", model, initial, x, y, x_test, y_test, epochs)


def robustness(run: Run) -> dict[str, Any]:
    """Return what single layers are worth (E1, E2, E4)."""
    metric = run.accuracy
    reinitialised = d.layer_reinitialisation(run.model, run.initial, metric)
    size, width = run.model[0].in_features, run.model[0].out_features
    random = layer_rerandomisation(
        run.model,
        lambda: network(size, width),
        metric,
        generator=torch.Generator().manual_seed(0),
    )
    found: dict[str, Any] = {"test accuracy": reinitialised.baseline}
    for i in range(4):
        found[f"layer {i + 1} re-initialised"] = float(reinitialised.value[i])
    for i in range(4):
        found[f"layer {i + 1} re-randomised"] = float(random.value[i])
    found["asymmetry of the layers"] = reinitialised.asymmetry()
    small = threshold_curve(run.model, run.initial, metric, [0.05], ["0"])
    found["layer 1: share changed by <= 0.05"] = float(small.share[0])
    found["accuracy, these undone"] = float(small.value[0])
    whole = threshold_curve(run.model, run.initial, metric, [0.0, 0.4])
    found["whole model, changes <= 0.4 undone"] = float(whole.value[1])
    return found


def removals(run: Run) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return the accuracy by share replaced, criterion and operation (E5, E6)."""
    found, curves = {}, {}
    for operation in OPERATIONS:
        for criterion in CRITERIA:
            curve = d.removal_curve(
                run.model,
                run.initial,
                run.accuracy,
                FRACTIONS,
                criterion=criterion,
                operation=operation,
                generator=torch.Generator().manual_seed(0),
            )
            curves[f"{criterion}, {operation}"] = curve.value.tolist()
            for share in (0.6, 0.8, 0.9, 0.95):
                value = curve.value[FRACTIONS.index(share)]
                found[f"{criterion}, {operation}, {share:g}"] = float(value)
    weights = ParameterVector.from_model(run.model)
    masks = [
        select_parameters(parameter_scores(weights, run.initial, criterion), 0.8)
        for criterion in ("change", "magnitude")
    ]
    overlap = selection_overlap(*masks)
    found["overlap of change and magnitude, 0.8"] = overlap.value
    found["standard deviations above chance"] = overlap.deviations
    return found, curves


def changes(run: Run) -> dict[str, Any]:
    """Return how far the weights moved (E7, E8)."""
    weights = ParameterVector.from_model(run.model)
    found: dict[str, Any] = {}
    tables = d.weight_changes(weights, run.initial)
    kernels = [name for name in tables if name.endswith("weight")]
    for i, name in enumerate(kernels):
        found[f"layer {i + 1}: final SD"] = tables[name].final_deviation
        found[f"layer {i + 1}: correlation"] = tables[name].correlation
    found["changes below 0.008"] = float(change_histogram(weights, run.initial)[0])
    return found


class Spectrum:
    """The Fisher matrix ``(1/N) sum_k J_k J_k^T`` of a network, from its exact dual.

    Args:
        model: The network.
        x: The ``N`` images.
        probabilities: Whether its outputs are softmax probabilities, else logits.
    """

    def __init__(self, model: nn.Module, x: Tensor, probabilities: bool) -> None:
        whole = nn.Sequential(model, nn.Softmax(1)) if probabilities else model
        kernel = ekfac.ntk(whole, x).to_dense().double() / len(x)
        values, vectors = torch.linalg.eigh(kernel)
        self.values = values.flip(0).clamp_min(0)
        self._dual, self._x, self._model = vectors.flip(1), x, whole

    def ratio(self, k: int) -> float:
        """Return the share of the trace in the ``k`` largest eigenvalues."""
        return float(self.values[:k].sum() / self.values.sum())

    def concentration(self, k: int) -> Concentration:
        """Return that of the ``k`` first eigenvectors ``J w / sqrt(N lambda)``."""
        columns = self._dual[:, :k].to(self._x)
        vectors = ekfac.jacobian(self._model, self._x).T @ columns
        assert isinstance(vectors, Tensor)
        return d.concentration(vectors)


def anisotropy(run: Run, count: int) -> dict[str, Any]:
    """Return trace ratios and eigenvectors' support, at start, end and between."""
    x, model = run.x_test[:count], run.model
    weights = ParameterVector.from_model(model)
    k = min(100, count)
    ranked = parameter_scores(weights, run.initial, "change")
    generator = torch.Generator().manual_seed(0)
    random = parameter_scores(weights, run.initial, "random", generator)
    largest = select_parameters(ranked, 0.05, largest_first=True)
    states = {
        "init": run.initial,
        "trained": weights,
        "0.9 of small changes undone": replaced_parameters(
            weights, run.initial, select_parameters(ranked, 0.9), "reinitialise"
        ),
        "0.5 at random undone": replaced_parameters(
            weights, run.initial, select_parameters(random, 0.5), "reinitialise"
        ),
        "0.98 of small changes pruned": replaced_parameters(
            weights, run.initial, select_parameters(ranked, 0.98), "prune"
        ),
        "0.05 of large changes undone": replaced_parameters(
            weights, run.initial, largest, "reinitialise"
        ),
    }
    found: dict[str, Any] = {}
    for state, values in states.items():
        with with_parameters(model, values):
            spectrum = Spectrum(model, x, probabilities=True)
            spread = spectrum.concentration(k)
            accuracy = run.accuracy(model)
        found[f"T_{k}, probabilities, {state}"] = spectrum.ratio(k)
        found[f"lambda_max, {state}"] = float(spectrum.values[0])
        found[f"Frobenius norm, {state}"] = float(spectrum.values.norm())
        found[f"support of top {k}, {state}"] = float(spread.support.mean())
        found[f"kurtosis of top {k}, {state}"] = float(spread.kurtosis.mean())
        found[f"accuracy, {state}"] = accuracy
    for state in ("init", "trained"):
        with with_parameters(model, states[state]):
            logits = Spectrum(model, x, probabilities=False)
        found[f"T_{k}, logits, {state}"] = logits.ratio(k)
    return found


def eigenbasis(run: Run) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return pruning by saliency in the Kronecker eigenbasis beside magnitude's."""
    model, weights = run.model, ParameterVector.from_model(run.model)
    data = list(zip(run.x[:1000].split(250), run.y[:1000].split(250), strict=True))
    F = ekfac.fisher(model, data, "ekfac")
    found, curve = {}, []
    for share in FRACTIONS:
        pruned = eigen_pruned(weights, F, share)
        with with_parameters(model, pruned.value):
            curve.append(run.accuracy(model))
        if share in (0.9, 0.95, 0.98):
            found[f"Kronecker eigenbasis, prune, {share:g}"] = curve[-1]
    lines = eigen_pruned(weights, F, 0.5, granularity="row_column")
    with with_parameters(model, lines.value):
        found["half of rows and columns pruned"] = run.accuracy(model)
    found["coordinates left then"] = lines.kept
    return found, {"Kronecker eigenbasis, prune": curve}


def tickets(run: Run, epochs: int) -> dict[str, Any]:
    """Return the accuracy of three rounds of lottery tickets (1.7)."""
    model = network(run.model[0].in_features, run.model[0].out_features)
    model.load_state_dict(dict(run.initial))
    result = d.lottery_tickets(
        model,
        lambda net, mask: fit(net, run.x, run.y, epochs, 0, mask),
        run.accuracy,
        rounds=3,
        fraction=0.6,
    )
    pairs = zip(result.kept.tolist(), result.value.tolist(), strict=True)
    return {f"ticket with {kept:.2g} of the weights": value for kept, value in pairs}


REPORTED = {
    "test accuracy": "0.988 (60,000 images)",
    "layer 1 re-initialised": "0.515",
    "layer 2 re-initialised": "robust",
    "layer 3 re-initialised": "robust",
    "layer 4 re-initialised": "robust",
    "layer 1 re-randomised": "0.1",
    "layer 2 re-randomised": "0.1",
    "layer 3 re-randomised": "0.1",
    "layer 4 re-randomised": "0.1",
    "layer 1: share changed by <= 0.05": "0.95",
    "accuracy, these undone": "no harm",
    "whole model, changes <= 0.4 undone": "< 0.2",
    "change, reinitialise, 0.6": "no decay",
    "change, reinitialise, 0.8": "about 0.9 or more",
    "change, reinitialise, 0.9": "best re-init",
    "magnitude, prune, 0.9": "best prune",
    "magnitude, prune, 0.6": "no decay",
    "random, reinitialise, 0.9": "worse than either",
    "overlap of change and magnitude, 0.8": "0.837",
    "standard deviations above chance": "'independent'; 107 by R=.837",
    "layer 1: final SD": "0.054",
    "layer 2: final SD": "0.058",
    "layer 3: final SD": "0.058",
    "layer 4: final SD": "0.158",
    "layer 1: correlation": "0.930",
    "layer 2: correlation": "0.906",
    "layer 3: correlation": "0.921",
    "layer 4: correlation": "0.753",
    "changes below 0.008": "0.540",
    "T_100, probabilities, init": "0.360 (space unstated)",
    "T_100, probabilities, trained": "0.999 (space unstated)",
    "T_100, probabilities, 0.9 of small changes undone": "unchanged",
    "T_100, probabilities, 0.5 at random undone": "falls from the start",
    "T_100, probabilities, 0.05 of large changes undone": "falls with accuracy",
    "T_100, probabilities, 0.98 of small changes pruned": "rises at the end",
    "lambda_max, 0.05 of large changes undone": "falls to init's",
    "support of top 100, trained": "falls in training",
    "support of top 100, 0.05 of large changes undone": "rises",
    "kurtosis of top 100, 0.05 of large changes undone": "falls",
}


def figure_of(curves: dict[str, list[float]], layers: dict[str, Any]) -> Figure:
    """Return the figure: accuracy by share replaced, and by replaced layer."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colours = {"change": "tab:blue", "magnitude": "tab:orange", "random": "tab:gray"}
    for name, values in curves.items():
        style = "--" if name.endswith("prune") else "-"
        colour = colours.get(name.split(",")[0], "tab:red")
        axes[0].plot(FRACTIONS, values, style, color=colour, marker="o", ms=3)
        axes[0].plot([], [], style, color=colour, label=name)
    axes[0].set(xlabel="share replaced, least important first", ylabel="test accuracy")
    axes[0].legend(fontsize=8)
    positions = torch.arange(4)
    for shift, kind in ((-0.2, "re-initialised"), (0.2, "re-randomised")):
        values = [layers[f"layer {i + 1} {kind}"] for i in range(4)]
        axes[1].bar(positions + shift, values, 0.4, label=kind)
    axes[1].axhline(layers["test accuracy"], color="0.4", ls="--", label="trained")
    axes[1].set_xticks(range(4), [f"layer {i + 1}" for i in range(4)])
    axes[1].set(ylabel="test accuracy")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure


def measured(run: Run, count: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Return all numbers of a run, and the curves of the figure."""
    removed, curves = removals(run)
    rotated, more = eigenbasis(run)
    found = {
        **robustness(run),
        **removed,
        **rotated,
        **changes(run),
        **anisotropy(run, count),
        **tickets(run, max(1, run.epochs // 4)),
    }
    return found, curves | more


def main() -> None:
    """Train, measure, print reported beside measured, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--epochs", type=int, default=40)
    args = arguments.parse_args()
    torch.set_num_threads(1)  # results follow from the seeds digit by digit
    width, count = (32, 20) if args.quick else (256, 100)
    epochs = 3 if args.quick else args.epochs
    name, data = images(args)
    found: dict[str, dict[str, Any]] = {}
    for seed in bar(args.seeds[:1] if args.quick else args.seeds, "seeds"):
        run = trained(data, seed, epochs, width)
        found[run.name], curves = measured(run, count)
        print(f"{name}, {run.name}: done", flush=True)
    rows = [
        {"quantity": key, "reported": REPORTED.get(key, "-")}
        | {run: float(values[key]) for run, values in found.items()}
        for key in next(iter(found.values()))
    ]
    print("\n" + table(rows))
    results = {"data": name, "rows": rows, "fractions": FRACTIONS, "curves": curves}
    print_seconds()
    save(args.output, "ge2025", results, figure_of(curves, found[run.name]))


if __name__ == "__main__":
    main()
