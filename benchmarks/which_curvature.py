"""Which curvature matters for not forgetting: structures, parts of the spectrum, PCA.

    python benchmarks/which_curvature.py          # one thread, three seeds

Three tasks, scikit-learn's digits with their pixels in another order each, are learnt
one after another by a 64-12-10 ReLU network (910 parameters; Adam at 3e-3, 150 steps of
64 a task), with ``strength / 2 d^T F d`` around every past solution. ``F`` is the exact
Fisher matrix of all parameters on 400 training images, or what a structure or a part of
its spectrum leaves of it, or principal components of 200 further steps' weights, with
the trace of ``F`` on them: by flatness ``F_i^-2`` (Haink 2023, equation 3.10, after
Feng and Tu: the width at ``e`` times the loss) or by the exact curvature. The
strength, of four, has the best mean accuracy over all tasks at the end with seed 10;
the table is of other seeds. What a structure keeps of the trace after the first task is
beside it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.continual import QuadraticPenalty
from ekfac.diagnostics.hessian import with_parameters
from ekfac.matrices import CurvatureMatrix, DenseMatrix, DiagonalMatrix, LowRankMatrix
from ekfac.vectors import ParameterVector

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
HIDDEN = 12
Data = tuple[Tensor, Tensor]


class Solution:
    """A network at the end of a task, and the curvature there.

    Args:
        model: The network, just trained.
        data: The task's training examples.
        rows: Weights of further steps, ``[T, P]``; for principal components.
    """

    def __init__(self, model: nn.Module, data: Data, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.few = data[0][:400], data[1][:400]
        self.whole = ekfac.fisher(model, [self.few], "dense")

    @functools.cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues, descending, and eigenvectors in columns."""
        values, vectors = torch.linalg.eigh(self.whole.to_dense().double())
        return values.flip(0).clamp(min=0), vectors.flip(1)

    def structure(self, name: str) -> CurvatureMatrix:
        """Return the Fisher matrix in a structure."""
        return ekfac.fisher(self.model, [self.few], name)

    def isotropic(self) -> CurvatureMatrix:
        """Return a multiple of the identity with the Fisher matrix's trace."""
        mean = self.whole.trace() / self.whole.space.size
        ones = ParameterVector.from_model(self.model).map(torch.ones_like)
        return DiagonalMatrix(ones * float(mean))

    def part(self, start: int, stop: int | None, *, equal: bool = False) -> Any:
        """Return the eigenpairs of a range of ranks, or one eigenvalue for all."""
        values, vectors = self.spectrum
        values, vectors = values[start:stop], vectors[:, start:stop]
        if equal:
            values = torch.full_like(values, float(values.mean()))
        return self._of(vectors, values)

    def components(self, *, flat: bool) -> CurvatureMatrix:
        """Return the first 50 principal components, weighted."""
        pcs = d.principal_components(self.rows, 50).vectors
        matrix = self.whole.to_dense().double()
        curvature = (pcs * (matrix @ pcs)).sum(dim=0)
        if not flat:
            return self._of(pcs, curvature)
        weights = torch.tensor([self.flatness(pc) ** -2 for pc in pcs.mT])
        weights = weights.double() * (curvature.sum() / weights.sum())
        return self._of(pcs, weights)

    def flatness(self, direction: Tensor) -> float:
        """Return the width along a direction within which the loss is below e times."""
        start = ParameterVector.from_model(self.model)
        unit = self.whole.space.vector(direction.to(torch.float32))
        x, y = self.few

        @torch.no_grad()
        def loss(step: float) -> float:
            with with_parameters(self.model, start + unit * step):
                return cross_entropy(self.model(x), y).item()

        height, width = 2.718281828 * loss(0.0), 0.0
        for sign in (-1.0, 1.0):
            inside, outside = 0.0, 0.05
            while loss(sign * outside) < height and outside < 100:
                inside, outside = outside, 2 * outside
            for _ in range(6):
                middle = (inside + outside) / 2
                if loss(sign * middle) < height:
                    inside = middle
                else:
                    outside = middle
            width += inside
        return width

    def _of(self, vectors: Tensor, values: Tensor) -> CurvatureMatrix:
        """Return the matrix with eigenvectors ``[P, k]``; dense if ``k`` is large."""
        vectors, values = vectors.float(), values.float()
        if len(values) > 200:
            return DenseMatrix(self.whole.space, vectors * values @ vectors.mT)
        return LowRankMatrix(self.whole.space, vectors.mT.contiguous(), weights=values)


METHODS: dict[str, Callable[[Solution], CurvatureMatrix] | None] = {
    "none": None,
    "identity": Solution.isotropic,
    "diagonal": lambda s: s.structure("diagonal"),
    "K-FAC": lambda s: s.structure("kfac"),
    "EKFAC": lambda s: s.structure("ekfac"),
    "exact layers": lambda s: s.structure("block_diagonal"),
    "exact": lambda s: s.whole,
    "top 10": lambda s: s.part(0, 10),
    "top 50": lambda s: s.part(0, 50),
    "top 200": lambda s: s.part(0, 200),
    "top 200, one value": lambda s: s.part(0, 200, equal=True),
    "without top 10": lambda s: s.part(10, None),
    "without top 50": lambda s: s.part(50, None),
    "without top 200": lambda s: s.part(200, None),
    "50 PCs, curvature": lambda s: s.components(flat=False),
    "50 PCs, flatness": lambda s: s.components(flat=True),
}


def tasks() -> tuple[list[Data], list[Data]]:
    """Return training and test examples of three orders of the digits' pixels."""
    digits = load_digits()
    x = torch.from_numpy(digits.data).float() / 16
    y = torch.from_numpy(digits.target)
    test = torch.arange(len(x)) % 5 == 0
    orders = [
        torch.randperm(64, generator=torch.Generator().manual_seed(t)) for t in range(3)
    ]
    train = [(x[~test][:, order], y[~test]) for order in orders]
    return train, [(x[test][:, order], y[test]) for order in orders]


def learn(model: nn.Module, data: Data, penalty: Any, steps: int) -> Tensor:
    """Train on a task; return the weights after each step, ``[T, P]``."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = []
    for _ in range(steps):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        (cross_entropy(model(x[index]), y[index]) + penalty()).backward()
        optimizer.step()
        rows.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return torch.stack(rows) if rows else torch.empty(0)


def network() -> nn.Sequential:
    """Return the network of the study."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def first(seed: int, data: Data, steps: int) -> Solution:
    """Return the solution of the first task, to which no penalty belongs."""
    torch.manual_seed(seed)
    model = network()
    learn(model, data, QuadraticPenalty(model), steps)
    return solved(model, data, QuadraticPenalty(model), steps)


def solved(model: nn.Module, data: Data, penalty: Any, steps: int) -> Solution:
    """Return the solution where the model is, with rows of further steps."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.random.fork_rng():
        rows = learn(model, data, penalty, 4 * steps // 3)
    model.load_state_dict(before)
    return Solution(model, data, rows)


def run(method: str, strength: float, start: Solution, seed: int, steps: int) -> Any:
    """Return the accuracy ``[tasks, tasks]``, and the share of the trace kept."""
    train, test = tasks()
    torch.manual_seed(seed)
    make, matrix, kept = METHODS[method], torch.zeros(len(train), len(train)), 0.0
    model = network()
    model.load_state_dict(start.model.state_dict())
    penalty = QuadraticPenalty(model, strength=strength, mode="separate")
    for task, data in enumerate(train):
        if task:
            learn(model, data, penalty, steps)
        if make is not None and task + 1 < len(train):
            further = steps if "PCs" in method else 0
            solution = solved(model, data, penalty, further) if task else start
            F = make(solution)
            penalty.consolidate(F)
            kept = float(F.trace() / solution.whole.trace()) if task == 0 else kept
        for past, (x, y) in enumerate(test):
            with torch.no_grad():
                right = (model(x).argmax(dim=1) == y).float()
            matrix[task, past] = right.mean()
    return matrix, kept


def damage(solution: Solution, seed: int, steps: int) -> dict[str, float]:
    """Return by rank in the spectrum where unpenalised training moves and hurts.

    The way from the first task's solution over a fifth of the second task's steps:
    shares of its squared length and of ``d^T F d``.
    """
    (_, data, _), _ = tasks()
    torch.manual_seed(seed)
    model = network()
    model.load_state_dict(solution.model.state_dict())
    x, y = solution.few
    start = ParameterVector.from_model(model).flat()
    before = cross_entropy(model(x), y).item()
    learn(model, data, QuadraticPenalty(model), max(1, steps // 5))
    way = (ParameterVector.from_model(model).flat() - start).double()
    values, vectors = solution.spectrum
    energy = (vectors.mT @ way).square()
    hurt = energy * values
    after = cross_entropy(model(x), y).item()
    numbers = {"loss rise": after - before, "predicted": float(hurt.sum()) / 2}
    for low, high in ((0, 10), (10, 50), (50, 200), (200, None)):
        name = f"{low + 1} to {high or len(energy)}"
        numbers[f"length, ranks {name}"] = float(energy[low:high].sum() / energy.sum())
        numbers[f"d^T F d, ranks {name}"] = float(hurt[low:high].sum() / hurt.sum())
    return numbers


def main() -> None:
    """Run all methods; print the tables and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = arguments.parse_args()
    steps, strengths, methods = 150, STRENGTHS, list(METHODS)
    if args.quick:
        args.seeds, steps, strengths, methods = [0], 60, (3.0,), methods[::5]
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    runs: dict[str, Any] = {}
    starts = {seed: first(seed, tasks()[0][0], steps) for seed in (10, *args.seeds)}
    for method in bar(methods, "methods"):
        grid = strengths if METHODS[method] else (0.0,)
        tuned = {s: run(method, s, starts[10], 10, steps)[0][-1].mean() for s in grid}
        strength = max(grid, key=lambda s: float(tuned[s]))
        found = [run(method, strength, starts[s], s, steps) for s in args.seeds]
        average = [float(matrix[-1].mean()) for matrix, _ in found]
        forgotten = [float((m.diagonal()[:-1] - m[-1, :-1]).mean()) for m, _ in found]
        new = [float(matrix.diagonal()[1:].mean()) for matrix, _ in found]
        runs[method] = {"strength": strength, "accuracy": average, "new tasks": new}
        runs[method]["tuning"] = {str(s): float(value) for s, value in tuned.items()}
        runs[method]["forgetting"] = forgotten
        rows.append(
            {
                "penalty": method,
                "share of the trace": spread([share for _, share in found]),
                "strength": f"{strength:g}",
                "average accuracy": spread(average),
                "forgetting": spread(forgotten),
                "new tasks when learnt": spread(new),
            }
        )
        print(f"{method}: done", flush=True)
    print("\n" + table(rows))
    hurt = [damage(starts[s], s, steps) for s in bar(args.seeds, "seeds")]
    print("\nwithout a penalty, after a fifth of the second task:")
    lines = [{"quantity": k, "found": spread([h[k] for h in hurt])} for k in hurt[0]]
    print(table(lines))
    print_seconds()
    figure, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for place, (_, found) in enumerate(reversed(runs.items())):
        ax.barh(place, statistics.mean(found["accuracy"]), color="0.8")
        ax.plot(found["accuracy"], [place] * len(found["accuracy"]), "k.")
    ax.set_yticks(range(len(runs)), list(runs)[::-1])
    ax.set(xlabel="accuracy over three tasks at the end", xlim=(0, 1))
    save(args.output, "which_curvature", {"runs": runs, "damage": hurt}, figure)


if __name__ == "__main__":
    main()
