"""Scalings through refreshes of a turning basis: transported, reset, left alone.

    python benchmarks/transport.py

One layer of 20 inputs and 12 outputs. An example belongs to one of four classes; its
input and its output gradient are normal, with covariances of their class that have the
same eigenvectors and different eigenvalues (around ``k ** -exponent``, by default 0.5),
so the second moment of ``g a^T`` is not a Kronecker product. Both eigenbases turn
steadily, each plane of rotation at its own speed, the fastest at ``radians`` per step.
Factors, bases and scalings are kept by the package's own code on its default schedule:
averages with decay 0.95, factors every 10 steps, the basis every 50, batches of 64.
Three copies see the same batches and have the same bases; they differ in what a refresh
does to the average of the scalings:

- ``transported``: the diagonal of the old matrix in the new basis, as EKFAC does;
- ``reset``: to the Kronecker eigenvalues, as the published code does;
- ``unrotated``: nothing, as if the basis had not changed.

The error is ``||s - s_true|| / ||s_true||``; the true scalings, the expectation of
``(Q_G^T g a^T Q_A)^2``, are known in closed form. Given are its mean over the steps
from 100 on (``in use``) and over the moments right after a refresh, before the batch
enters (``refreshed``), over seeds 0 to 4.

A covariance that turns rigidly is the kindest case for unrotated scalings: in a basis
that turns with it the true ones do not change. What they miss is that eigenvectors of
close eigenvalues, estimated from batches, mix and change places at every refresh; with
``--exponent 1``, eigenvalues far apart, they are nearly as good as transported ones.
What transport misses is what is not on the old diagonal: in the old basis the scalings
have averaged over the turn already, and transport averages them over it once more. At
half a radian between refreshes the two errors are alike; at more, right after a
refresh, the Kronecker eigenvalues of the new factors are the better guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from ekfac import Curvature, LayerCurvature, kernels
from ekfac.curvature import Counters
from ekfac.curvature.eigenbasis import refresh_
from ekfac.curvature.options import Schedule
from ekfac.layers import find_blocks

D_OUT, D_IN, CLASSES, EXAMPLES = 12, 20, 4, 64
DECAY = 0.95
SCHEDULE = Schedule(factors=10, basis=50, scalings=1)
FIRST = 2 * SCHEDULE.basis
EARLY = ", ".join(
    str(step) for step in range(1, SCHEDULE.basis) if SCHEDULE.basis_due(step, 0, 1)
)
SHOWN = 0.003
COLOURS = {"transported": "tab:blue", "reset": "tab:red", "unrotated": "0.5"}


class Side:
    """Inputs or output gradients: normal in every class, in a basis that turns.

    Args:
        size: Dimension.
        exponent: How fast the eigenvalues decay.
        radians: Of the fastest plane of rotation, per step.
        generator: Source of the eigenvalues, bases and planes.
    """

    def __init__(
        self, size: int, exponent: float, radians: float, generator: torch.Generator
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        mean = torch.arange(1, size + 1, dtype=torch.float64) ** -exponent
        self.variances = mean * normal(CLASSES, size).exp()
        self.basis = torch.linalg.qr(normal(size, size)).Q
        planes = normal(size, size)
        planes = planes - planes.t()
        speed = radians / torch.linalg.matrix_norm(planes, 2)
        self.turn = torch.linalg.matrix_exp(speed * planes)

    def advance(self) -> None:
        """Turn by one step."""
        self.basis = self.turn @ self.basis

    def sample(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Return one vector for each example's class, as ``[N, 1, 1, size]``."""
        deviations = self.variances[classes].sqrt()
        normal = torch.randn(
            deviations.shape, generator=generator, dtype=deviations.dtype
        )
        vectors: Tensor = (normal * deviations) @ self.basis.t()
        return vectors[:, None, None]

    def second_moments(self, basis: Tensor) -> Tensor:
        """Return ``E[(q^T x)^2]`` of each class along a basis, ``[CLASSES, size]``."""
        moments: Tensor = self.variances @ (basis.t() @ self.basis).square().t()
        return moments


def transported(layer: LayerCurvature, step: int) -> None:
    """Refresh the basis; the scalings move with it."""
    refresh_([layer], step, 0.0, Counters())


def reset(layer: LayerCurvature, step: int) -> None:
    """Refresh the basis; the scalings become the Kronecker eigenvalues."""
    refresh_([layer], step, 0.0, Counters())
    average = layer.averages["s"]
    average.total.copy_(layer.kronecker_scalings() * average.weight)


def unrotated(layer: LayerCurvature, step: int) -> None:
    """Refresh the basis; the scalings stay."""
    before = layer.averages["s"].total.clone()
    refresh_([layer], step, 0.0, Counters())
    layer.averages["s"].total.copy_(before)


POLICIES: dict[str, Callable[[LayerCurvature, int], None]] = {
    "transported": transported,
    "reset": reset,
    "unrotated": unrotated,
}


@dataclass
class Errors:
    """Relative errors of the scalings.

    Attributes:
        in_use: At every step, with the step's batch in them.
        refreshed: Right after each refresh, without it.
    """

    in_use: list[float]
    refreshed: list[float]

    def means(self) -> tuple[float, float]:
        """Return the mean errors from step ``FIRST`` on."""
        settled = self.in_use[FIRST - 1 :]
        count = len(settled) // SCHEDULE.basis + 1
        late = self.refreshed[-count:]
        return sum(settled) / len(settled), sum(late) / len(late)


def new_layer() -> LayerCurvature:
    """Return the empty curvature of a linear layer."""
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False, dtype=torch.float64))
    (layer,) = Curvature(
        find_blocks(model, list(model.parameters()), 1000).blocks
    ).values()
    return layer


def run(exponent: float, radians: float, steps: int, seed: int) -> dict[str, Errors]:
    """Return the errors of every policy on one sequence of batches."""
    generator = torch.Generator().manual_seed(seed)
    inputs, grads = (Side(d, exponent, radians, generator) for d in (D_IN, D_OUT))
    layers = {name: new_layer() for name in POLICIES}
    errors = {name: Errors([], []) for name in POLICIES}
    for step in range(1, steps + 1):
        inputs.advance()
        grads.advance()
        classes = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
        a = inputs.sample(classes, generator)
        g = grads.sample(classes, generator)
        for name, layer in layers.items():
            s = layer.averages["s"]
            if SCHEDULE.factors_due(step):
                layer.averages["A"].update_(kernels.gram(a) / EXAMPLES, DECAY)
                layer.averages["G"].update_(kernels.gram(g) / EXAMPLES, DECAY)
            refreshed = SCHEDULE.basis_due(step, 0, 1)
            if refreshed:
                POLICIES[name](layer, step)
            Q_G, Q_A = layer.Q_G, layer.Q_A
            assert Q_G is not None
            assert Q_A is not None
            true = (
                grads.second_moments(Q_G[0]).t() @ inputs.second_moments(Q_A[0])
            ) / CLASSES
            if refreshed and not s.empty:
                errors[name].refreshed.append(distance(layer, true))
            s.update_(kernels.second_moment(g, a, Q_G, Q_A)[0] / EXAMPLES, DECAY)
            errors[name].in_use.append(distance(layer, true))
    return errors


def distance(layer: LayerCurvature, true: Tensor) -> float:
    """Return the relative error of the layer's scalings."""
    assert layer.s is not None
    return float((layer.s[0] - true).norm() / true.norm())


def draw(rows: Sequence[dict[str, Any]], curves: dict[str, list[float]]) -> Figure:
    """Return errors over the steps and over the speeds of rotation."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, curve in curves.items():
        left.plot(range(1, len(curve) + 1), curve, color=COLOURS[name], label=name)
    left.set(
        title=f"{SHOWN:g} radians a step: the error over the steps",
        xlabel=f"step (refreshes at {EARLY}, then every {SCHEDULE.basis})",
        ylabel="relative error of the scalings",
        ylim=(0, max(curves["reset"][5:]) * 1.25),
    )
    for name, colour in COLOURS.items():
        for kind, style in (("in use", "o-"), ("refreshed", "s:")):
            chosen = [row for row in rows if row["error"] == kind]
            turns = [row["radians"] * SCHEDULE.basis for row in chosen]
            errors = [row[name] for row in chosen]
            right.plot(turns, errors, style, color=colour, label=f"{name}, {kind}")
    right.set_xscale("symlog", linthresh=turns[1])
    right.set(
        title="Mean error: in use, and right after a refresh",
        xlabel="radians that the fastest plane turns between two refreshes",
        ylim=(0, 1.4 * max(row[name] for row in rows for name in COLOURS)),
    )
    right.set_xticks(turns, [f"{turn:g}" for turn in turns])
    right.minorticks_off()
    for axes in (left, right):
        columns = 3 if axes is left else 2
        axes.legend(frameon=False, fontsize="small", loc="upper center", ncols=columns)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Compare the policies at every speed; print a table, save it and the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--exponent", type=float, default=0.5)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    speeds = (0.0, 0.001, SHOWN) if options.quick else (0.0, 0.001, SHOWN, 0.01, 0.03)
    steps, seeds = (201, 2) if options.quick else (601, 5)
    rows: list[dict[str, Any]] = []
    curves: dict[str, list[float]] = {}
    for radians in tqdm(speeds, desc="speeds", leave=False):
        runs = [run(options.exponent, radians, steps, seed) for seed in range(seeds)]
        for index, kind in enumerate(("in use", "refreshed")):
            row: dict[str, Any] = {"radians": radians, "error": kind}
            for name in POLICIES:
                means = [errors[name].means()[index] for errors in runs]
                row[name] = sum(means) / len(means)
            rows.append(row)
        if radians == SHOWN:
            for name in ("reset", "unrotated", "transported"):
                every = torch.tensor([errors[name].in_use for errors in runs])
                curves[name] = every.mean(dim=0).tolist()
    print(table(rows))
    results = {"steps": steps, "seeds": seeds, "rows": rows, "curves": curves}
    save(options.output, "transport", results, draw(rows, curves))


if __name__ == "__main__":
    main()
