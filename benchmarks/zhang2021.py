"""Zhang, Zhang, Luo & Xu 2021: Figure 3 in full; Figures 4 and 5 on data at hand.

    python benchmarks/zhang2021.py --data-dir data      # MNIST in data/*.gz
    python benchmarks/zhang2021.py --quick

Figure 3: critical points of two-layer tanh networks of width 2, found by training and
polished to ``|grad|_1 < 1e-12``, are embedded into widths 3 and 4 by equal splitting;
the Hessians' inertia is counted. The appendix with the text's data, losses and outputs
is missing: the one-dimensional data are our own, and for Iris every critical point
that the seeds found is listed, for three choices of outputs and loss. Figure 4:
degeneracy in width 3 of critical points of width 1 to 3. Figure 5: merging the neurons
of a wide ReLU network in training. Results are discussed in
``benchmarks/zhang2021.md``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import (
    bar,
    digits,
    has_mnist,
    mnist,
    parser,
    print_seconds,
    save,
    spread,
    table,
)
from matplotlib.figure import Figure
from sklearn.datasets import load_iris
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import ekfac
from ekfac.diagnostics import inertia
from ekfac.diagnostics.papers.zhang import (
    check_embedding,
    redundant_neurons,
    split_equally,
)
from ekfac.diagnostics.spectra import Inertia

# The text's line between zero and non-zero eigenvalues.
ZERO = 1e-11
# The largest L1 norm of the gradient at a critical point, and the largest parameter.
CRITICAL, BOUNDED = 1e-12, 30.0
Loss = Callable[[Tensor, Tensor], Tensor]


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    """Return half the squared error, summed over outputs, averaged over examples."""
    return 0.5 * (outputs - y).square().sum(dim=1).mean()


@dataclass(frozen=True, eq=False)
class Problem:
    """Data and loss.

    Attributes:
        name: What it is called in the tables.
        x: ``[N, d]``.
        y: Targets.
        outputs: How many the network has.
        loss: ``(outputs, y) -> loss``.
        deviations: Of all initial parameters, one after the other by seed.
        steps: Of Adam before polishing, likewise.
        tries: How many seeds.
    """

    name: str
    x: Tensor
    y: Tensor
    outputs: int
    loss: Loss
    deviations: tuple[float, ...]
    steps: tuple[int, ...]
    tries: int

    def network(self, width: int, seed: int) -> nn.Sequential:
        """Return a two-layer tanh network with normal parameters."""
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(self.x.shape[1], width),
            nn.Tanh(),
            nn.Linear(width, self.outputs),
        ).double()
        for parameter in model.parameters():
            deviation = self.deviations[seed % len(self.deviations)]
            nn.init.normal_(parameter, std=deviation, generator=generator)
        return model

    def value(self, model: nn.Module) -> Tensor:
        """Return the loss."""
        return self.loss(model(self.x), self.y)

    def hessian(self, model: nn.Module) -> Tensor:
        """Return the Hessian ``[P, P]``."""
        data = [(self.x, self.y)]
        found = ekfac.hessian(model, data, self.loss, "dense", loss_reduction="mean")
        return found.to_dense()

    def gradient(self, model: nn.Module) -> Tensor:
        """Return the gradient ``[P]``."""
        grads = torch.autograd.grad(self.value(model), list(model.parameters()))
        return parameters_to_vector(grads)


@functools.cache
def curve(tries: int) -> Problem:
    """Return 50 points of a function of one variable."""
    x = torch.linspace(-1, 1, 50, dtype=torch.float64).unsqueeze(1)
    y = torch.tanh(4 * x + 1) - 0.6 * torch.tanh(6 * x - 3) + 0.2 * torch.sin(5 * x)
    return Problem("1D", x, y, 1, squared, (0.5,), (1500,), tries)


def iris(tries: int) -> list[Problem]:
    """Return Iris, standardised, as three problems."""
    found = load_iris()
    x = torch.tensor(found.data)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    y = torch.tensor(found.target)
    number = (y - 1.0).double().unsqueeze(1)
    search = (0.1, 0.3, 1.0), (30, 60, 120, 250)
    return [
        Problem("Iris, class as a number", x, number, 1, squared, *search, 2 * tries),
        Problem("Iris, one-hot", x, one_hot(y, 3).double(), 3, squared, *search, tries),
        Problem("Iris, softmax", x, y, 3, cross_entropy, *search, tries),
    ]


def trained(problem: Problem, width: int, seed: int) -> nn.Sequential:
    """Return the network at the point of training with the smallest gradient."""
    model = problem.network(width, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    steps = problem.steps[seed % len(problem.steps)]
    least, best = float("inf"), parameters_to_vector(model.parameters()).detach()
    for step in range(steps):
        optimizer.zero_grad()
        problem.value(model).backward()
        parameters = list(model.parameters())
        size = sum(float(p.grad.abs().sum()) for p in parameters if p.grad is not None)
        if step > steps // 20 and size < least:
            least, best = size, parameters_to_vector(parameters).detach().clone()
        optimizer.step()
    vector_to_parameters(best, model.parameters())
    return model


def polish_(problem: Problem, model: nn.Module, steps: int) -> None:
    """Bring the gradient to zero in place, whatever the Hessian's signs.

    Levenberg-Marquardt on the gradient's norm: the step's part along an eigenvector of
    the Hessian is ``value / (value^2 + damping)`` times the gradient's.
    """
    damping = 1e-3
    gradient = problem.gradient(model)
    values, vectors = torch.linalg.eigh(problem.hessian(model))
    for _ in range(steps):
        if float(gradient.abs().sum()) < 1e-14 or damping > 1e6:
            break
        old = parameters_to_vector(model.parameters()).detach()
        along = vectors.mT @ gradient
        step = vectors @ (along * values / (values**2 + damping))
        vector_to_parameters(old - step, model.parameters())
        found = problem.gradient(model)
        if found.norm() < gradient.norm():
            gradient, damping = found, max(damping / 10, 1e-30)
            values, vectors = torch.linalg.eigh(problem.hessian(model))
        else:
            vector_to_parameters(old, model.parameters())
            damping *= 4


@dataclass
class Point:
    """A critical point that training and polishing found."""

    seed: int
    loss: float
    flat: Tensor
    model: nn.Sequential = field(default_factory=nn.Sequential)


def critical_points(
    problem: Problem, width: int, args: argparse.Namespace
) -> list[Point]:
    """Return the critical points of different losses that the seeds lead to.

    Those that the search meets at infinity (a saturated neuron) are left out. They are
    kept in a folder, so that an interrupted run goes on where it was.
    """
    name = f"{problem.name}, width {width}, {problem.tries} seeds"
    folder = args.output / ("networks-quick" if args.quick else "networks") / "zhang"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    found = torch.load(path) if path.exists() else {"tried": 0, "points": []}
    points = [Point(seed, loss, flat) for seed, loss, flat in found["points"]]
    for seed in bar(range(found["tried"], problem.tries), name):
        model = trained(problem, width, seed)
        polish_(problem, model, args.polish)
        loss = float(problem.value(model).detach())
        size = float(problem.gradient(model).abs().sum())
        flat = parameters_to_vector(model.parameters()).detach()
        new = all(abs(loss - point.loss) > 1e-8 for point in points)
        if size < CRITICAL and float(flat.abs().max()) < BOUNDED and new:
            points.append(Point(seed, loss, flat))
        kept = [(point.seed, point.loss, point.flat) for point in points]
        torch.save({"tried": seed + 1, "points": kept}, path)
    for point in points:
        point.model = problem.network(width, point.seed)
        vector_to_parameters(point.flat, point.model.parameters())
    return points


@dataclass
class Chain:
    """A critical point and its embeddings, one row of Figure 3's table."""

    problem: Problem
    seed: int
    neuron: int
    loss: float
    gradients: list[float]
    signs: list[Inertia]
    preserved: bool

    def row(self) -> dict[str, Any]:
        """Return the row."""
        arrow = "->".join
        return {
            "problem": self.problem.name,
            "seed": self.seed,
            "neuron": self.neuron,
            "loss": self.loss,
            "|grad|_1": max(self.gradients),
            "negative": arrow(str(s.negative) for s in self.signs),
            "zero": arrow(str(s.zero) for s in self.signs),
            "gap": min(s.gap for s in self.signs),
            "kept": "yes" if self.preserved else "no",
        }


def figure_3(args: argparse.Namespace) -> list[Chain]:
    """Return the chains of all isolated critical points that were found."""
    chains: list[Chain] = []
    for problem in [curve(args.seeds), *iris(args.tries)]:
        for point in critical_points(problem, 2, args):
            if inertia(problem.hessian(point.model), ZERO).zero:
                continue  # itself embedded, or with a dead neuron
            chains += [chain_of(problem, point, neuron) for neuron in (0, 1)]
    return chains


def chain_of(problem: Problem, point: Point, neuron: int) -> Chain:
    """Return a critical point with its embeddings of one and two neurons more."""
    model = point.model
    chain = Chain(problem, point.seed, neuron, point.loss, [], [], True)
    for copies in (1, 2, 3):
        wide: nn.Module = model
        if copies > 1:
            embedding = split_equally(model, "0", neuron, copies)
            wide = embedding.model(model)
            check = check_embedding(
                model, embedding, problem.x, problem.y, problem.loss
            )
            chain.preserved &= check.preserved
        chain.gradients.append(float(problem.gradient(wide).abs().sum()))
        chain.signs.append(inertia(problem.hessian(wide), ZERO))
    return chain


def figure_4(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the degeneracy in width 3 of critical points born in widths 1 to 3."""
    problem, rows = curve(args.seeds), []
    narrower: list[float] = []
    for width in (1, 2, 3):
        for point in critical_points(problem, width, args):
            if any(abs(point.loss - loss) < 1e-8 for loss in narrower):
                continue  # embedded in this width, born in a narrower one
            narrower.append(point.loss)
            model: nn.Module = point.model
            if width < 3:
                model = split_equally(model, "0", 0, 4 - width).model(model)
            signs = inertia(problem.hessian(model), ZERO)
            row = {"born in width": width, "loss": point.loss}
            row |= {"negative": signs.negative, "zero": signs.zero}
            rows.append(row | {"m - m_0": 3 - width})
    return rows


def figure_5(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """Return the table of a wide ReLU network merged at several points of training."""
    on_mnist = has_mnist(args.data_dir) and not args.quick
    name = "MNIST" if on_mnist else "digits"
    data = mnist(args.data_dir) if on_mnist else digits()
    x, y = data.x_train[:1000].flatten(1), data.y_train[:1000]
    x_test = data.x_test[:10000].flatten(1)
    targets = one_hot(y, 10).float()
    found: dict[int, list[dict[str, float]]] = {}
    for seed in range(1 if args.quick else 3):
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(x.shape[1], args.neurons), nn.ReLU(), nn.Linear(args.neurons, 10)
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=1e-4, generator=generator)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in bar(range(max(args.points) + 1), "steps"):
            if step in args.points:
                redundancy = redundant_neurons(
                    model, "0", threshold=0.9, amplitude=0.02
                )
                merged = redundancy.merged(model)
                with torch.no_grad():
                    losses = [float(squared(m(x), targets)) for m in (model, merged)]
                    wide, narrow = (m(x_test).argmax(dim=1) for m in (model, merged))
                row = {"groups": float(len(redundancy.groups)), "loss": losses[0]}
                row["merged"] = losses[1]
                row["agreement"] = float((wide == narrow).double().mean())
                found.setdefault(step, []).append(row)
            optimizer.zero_grad()
            squared(model(x), targets).backward()
            optimizer.step()
    return name, [
        {"step": step, "neurons": args.neurons}
        | {key: [row[key] for row in each] for key in each[0]}
        for step, each in found.items()
    ]


def draw(chains: list[Chain]) -> Figure:
    """Return the figure: the spectra of one chain of each kind of data."""
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    first = [c for c in chains if c.problem.name == "1D"]
    second = [c for c in chains if c.problem.name.startswith("Iris")]
    for line, chosen in zip(grid, (first[:1], second[:1]), strict=True):
        for axes, width in zip(line, (2, 3, 4), strict=True):
            if not chosen:
                axes.axis("off")
                continue
            signs = chosen[0].signs[width - 2]
            signs.plot(axes)
            name = chosen[0].problem.name
            counts = f"{signs.negative} negative, {signs.zero} zero"
            axes.set_title(f"{name}, m = {width}: {counts}", fontsize=9)
    return figure


def shown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table, if there are any."""
    return table(rows) if rows else "none was found"


def main() -> None:
    """Run everything, print what was reported beside what was measured, save."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=6)
    arguments.add_argument("--tries", type=int, default=24, help="seeds for Iris")
    arguments.add_argument("--polish", type=int, default=150)
    arguments.add_argument("--neurons", type=int, default=400)
    arguments.add_argument(
        "--points", type=int, nargs="+", default=[10, 20, 40, 80, 120, 200, 400]
    )
    args = arguments.parse_args()
    torch.set_num_threads(1)  # results follow from the seeds digit by digit
    if args.quick:
        args.seeds, args.tries, args.neurons, args.points = 2, 1, 60, [20, 60]
    chains = figure_3(args)
    print("\nFigure 3: widths 2 -> 3 -> 4 by equal splitting")
    print("reported: 1D |grad|_1 7.15e-15, negative 0->1->2, one more zero each;")
    print("          Iris |grad|_1 3.72e-13, negative 3->5->7, one more zero each")
    print(f"measured:\n{shown([chain.row() for chain in chains])}")
    born = figure_4(args)
    print("\nFigure 4: degeneracy in width 3 (reported: the smallest m - m_0)")
    print(f"measured:\n{shown(born)}")
    name, merged = figure_5(args)
    print(
        f"\nFigure 5 on {name} (reported on MNIST: 400 -> 58 groups, agreement 0.985)"
    )
    shown_rows = [
        {k: spread(v, 4) if isinstance(v, list) else v for k, v in row.items()}
        for row in merged
    ]
    print(f"measured, three seeds:\n{table(shown_rows)}")
    results = {
        "figure 3": [chain.row() for chain in chains],
        "figure 4": born,
        "figure 5": {"data": name, "rows": merged},
    }
    print_seconds()
    save(args.output, "zhang2021", results, draw(chains))


if __name__ == "__main__":
    main()
