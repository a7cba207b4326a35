"""Final losses beside every rival, at equal steps and at equal time, on nine problems.

    python benchmarks/peers.py transformer --data-dir FOLDER   # one problem, resumed
    python benchmarks/peers.py transformer --only Muon --redo  # one row, from nothing
    python benchmarks/peers.py all --retime   # prices of another machine, all rows
    python benchmarks/peers.py all --tables   # tables of peers.md and README
    python benchmarks/peers.py first-round                     # which rivals are in
    python benchmarks/peers.py damping                         # other dampings, seed 0
    python benchmarks/peers.py intervals                       # other intervals
    python benchmarks/peers.py decay                           # other scaling_decay
    python benchmarks/peers.py momentum                        # of EKFAC and NorMuon
    python benchmarks/peers.py nesterov            # averages so many steps ahead
    python benchmarks/peers.py adaptive            # relative damping, and adaptive
    python benchmarks/peers.py shares              # which layers are natural
    python benchmarks/peers.py rounding            # bases in bfloat16, in three ways
    python benchmarks/peers.py transformer --times 4 --only EKFAC Muon   # longer runs
    python benchmarks/peers.py vgg11 --batch 4 --only EKFAC Muon       # larger batches
    python benchmarks/peers.py vgg11 --constant                # no decay of the rate

Problems: benchmarks/peers_problems.py; optimizers: benchmarks/peers_optimizers.py.

- **Tuning.** Every optimizer has one number to tune and three values of it, a factor of
  2 apart, with seed 0 (Muon twice: with and without the output layer);
  judged by the final training loss over fixed examples. While
  the best is at an edge of what was tried, one more is tried beyond it, for everybody
  by the same rule, so that every best setting lies between two worse ones; then the two
  half way to these. The three best are told apart by the mean of seeds 0, 4 and 5.
- **Schedule.** Linear warm-up over a tenth of the steps, then a cosine to zero.
- **Equal steps.** The best setting with seeds 1, 2 and 3: the same weights at the start
  and the same batches for all.
- **Equal time.** The first of these runs takes turns with SGD, step by step, in the
  same process; the ratio of their processor times is the price of a step, refreshes
  included. Each optimizer is then trained again, with a schedule of its own, for as
  many steps as fit into the time of SGD's full run.
- **Judged** by training loss and held-out loss at the end, over fixed examples. One is
  ahead of another where it is better with all three seeds, else they are level.

``--times 4`` makes all runs four times as long, ``--batch 4`` all batches four times as
large, ``--constant`` keeps the rate after the warm-up, as George (2023) does with the
auto-encoder, VGG11 and a residual network. The first of three values of ``lr`` is then
half of the best one of the plain runs, and Muon has the output layer where it was
better there.

Run it with OMP_NUM_THREADS=1. Every run is kept in the JSON: a study that was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import platform
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import HERE, Store, parser
from peers_optimizers import (
    CANDIDATES,
    OPTIMIZERS,
    OURS,
    SETTINGS,
    VARIANTS,
    first_exponent,
    learning_rate,
    normuon,
    sgd,
)
from peers_problems import PROBLEMS, Problem, evaluate
from peers_report import (
    RIVALS,
    finish,
    first_round_report,
    into_records,
    overall,
    shares_table,
    stored,
    varied_table,
)
from torch import Tensor, nn
from tqdm import tqdm

from ekfac import EKFAC, kernels
from ekfac.errors import EkfacWarning

Make = Callable[[nn.Module], torch.optim.Optimizer]
SEEDS = (1, 2, 3)
TUNING = {"tune": 0, "again": 4, "third": 5}  # seeds: of all settings, of the best
EXTENSIONS = 6  # settings beyond the first window, at most
POINTS = 60  # of a curve in the JSON
MOMENTA = (0.8, 0.9, 0.95)
AHEAD = (0, 1, 2, 3)
STUDIES: dict[str, list[dict[str, Any]]] = {
    "damping": [{"damping": value} for value in (0.01, 0.03, 0.1, 0.3, 1.0)],
    "intervals": [
        {"factor_interval": factors, "basis_interval": bases}
        for factors, bases in ((10, 50), (20, 50), (20, 100))
    ],
    "decay": [{"scaling_decay": value} for value in (0.9, 0.95, 0.99)],
    "momentum": [{"momentum": value} for value in MOMENTA],
    "nesterov": [{"nesterov": value} for value in AHEAD],
    "adaptive": [
        {"damping_mode": "relative"},
        {"grafting": "rms"},
        {"damping_mode": "adaptive"},
    ],
}
# Momentum and look-ahead of NorMuon in some of them.
NORMUON: dict[str, dict[str, tuple[float, int]]] = {
    "momentum": {f"{value:g}": (value, 1) for value in MOMENTA},
    "nesterov": {str(value): (0.9, value) for value in AHEAD[:3]},
}
CHOSEN = ("vit", "transformer", "vgg11", "resnet18", "autoencoder")


class Training:
    """A model, its optimizer with a schedule, and the record of their steps.

    Args:
        problem: What is trained.
        make: Makes the optimizer of a model.
        steps: Of the schedule.
        seed: Of the weights.
    """

    def __init__(self, problem: Problem, make: Make, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.problem, self.steps = problem, steps
        self.model = problem.network()
        self.optimizer = make(self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.losses: list[float] = []
        self.seconds = 0.0

    def step(self, batch: Any) -> None:
        """Train on a batch, unless the loss has left the finite numbers."""
        if self.losses and not np.isfinite(self.losses[-1]):
            return
        factor = schedule(len(self.losses), self.steps, self.problem.constant)
        start = time.process_time()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.seconds += time.process_time() - start
        self.losses.append(loss.item())

    def result(self) -> dict[str, Any]:
        """Return the final losses (``None``: not finite) and the thinned curve."""
        ends = evaluate(self.problem, self.model)
        finite = np.isfinite([*ends, *self.losses]).all()
        rounded = [float(f"{end:.5g}") if finite else None for end in ends]
        places = np.unique(np.linspace(1, len(self.losses), POINTS).astype(int))
        curve = smooth(self.losses)[places - 1] if finite else []
        return {
            "steps": self.steps,
            "train": rounded[0],
            "held_out": rounded[1],
            "curve": [[int(i) for i in places], [float(f"{y:.4g}") for y in curve]],
        }


def schedule(step: int, steps: int, constant: bool = False) -> float:
    """Return the share of ``lr`` at a step, counted from 0."""
    warm = max(1, round(0.1 * steps))
    if step < warm:
        return (step + 1) / warm
    if constant:
        return 1.0
    return 0.5 * (1 + float(np.cos(np.pi * (step - warm) / (steps - warm))))


def smooth(losses: Sequence[float], window: int = 10) -> np.ndarray:
    """Return running means of the losses."""
    ends = range(1, len(losses) + 1)
    return np.array([np.mean(losses[max(0, end - window) : end]) for end in ends])


def train(
    problem: Problem, makes: Sequence[Make], steps: int, seed: int, label: str
) -> list[Training]:
    """Return runs that took turns, step by step, over the same batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)  # of what no block covers
        runs = [Training(problem, make, steps, seed) for make in makes]
    batches = problem.batches(torch.Generator().manual_seed(seed))
    # What was there before (torch, the results of all runs) is not looked through when
    # a step's objects are collected: it is no part of a step's price.
    gc.collect()
    gc.freeze()
    try:
        for number in tqdm(range(steps), desc=label, leave=False, mininterval=1.0):
            batch = next(batches)
            for run in runs if number % 2 else reversed(runs):
                run.step(batch)
    finally:
        gc.unfreeze()
    return runs


def maker(name: str, lr: float, problem: Problem) -> Make:
    """Return the making of an optimizer at a learning rate."""
    return lambda model: OPTIMIZERS[name](model, lr, problem.head)


def tune(
    name: str, key: str, problem: Problem, steps: int, store: Store
) -> list[tuple[float, float]]:
    """Return losses with their learning rates; the lowest lies between two worse."""
    scores: dict[float, float] = {}

    def attempt(exponent: float) -> None:
        loss = attempted(
            "tune", name, key, problem, steps, learning_rate(exponent), store
        )
        scores[exponent] = loss

    first: float = first_exponent(name, key)
    for lr, variant in store.runs.get("shorter", {}).values():
        if variant == name:
            first = round(2 * np.log2(lr / learning_rate(0))) / 2 - 1
    for number in range(SETTINGS):
        attempt(first + number)
    for _ in range(EXTENSIONS):
        best = min(scores, key=scores.__getitem__)
        if scores[best] == float("inf") or best == min(scores):
            attempt(min(scores) - 1)
        elif best == max(scores):
            attempt(max(scores) + 1)
        else:
            break
    best = min(scores, key=scores.__getitem__)
    for exponent in (best - 0.5, best + 0.5):
        attempt(exponent)
    return sorted((loss, learning_rate(exponent)) for exponent, loss in scores.items())


def attempted(
    kind: str,
    name: str,
    key: str,
    problem: Problem,
    steps: int,
    lr: float,
    store: Store,
) -> float:
    """Return the final training loss of a setting with the seed of this kind."""

    def compute() -> dict[str, Any]:
        label = f"{key} {name} lr={lr:g}"
        seed = TUNING[kind]
        result = train(problem, [maker(name, lr, problem)], steps, seed, label)[0]
        return {k: v for k, v in result.result().items() if k != "curve"}

    loss = store.get(f"{kind}|{name}|{lr:g}", compute)["train"]
    return float("inf") if loss is None else float(loss)


def compare(name: str, key: str, problem: Problem, steps: int, store: Store) -> None:
    """Tune an optimizer and train it at equal steps and at equal time."""
    kinds: tuple[str, ...] = VARIANTS.get(name, (name,))
    shorter = store.runs.get("shorter")
    if shorter:
        kinds = (shorter[f"best|{name}"][1],)
    elif name == "NorMuon":
        muon = store.runs["best|Muon"][1]
        kinds = (kinds[VARIANTS["Muon"].index(muon)],)
    settings = sorted(
        (loss, lr, kind)
        for kind in kinds
        for loss, lr in tune(kind, key, problem, steps, store)
    )

    def with_other_seeds(loss: float, lr: float, kind: str) -> float:
        others = [
            attempted(seed, kind, key, problem, steps, lr, store)
            for seed in ("again", "third")
        ]
        return loss + sum(others)

    _, lr, variant = min(
        (with_other_seeds(loss, lr, kind), lr, kind) for loss, lr, kind in settings[:3]
    )
    if store.runs.setdefault(f"best|{name}", [lr, variant]) != [lr, variant]:
        forget(store, name, tuned=False)
        store.runs[f"best|{name}"] = [lr, variant]
    make = maker(variant, lr, problem)

    def run(steps: int, seed: int, timed: bool = False) -> dict[str, Any]:
        makes = [make, lambda model: sgd(model, 1e-3)] if timed else [make]
        label = f"{key} {name} seed {seed}, {steps} steps"
        if timed:
            train(problem, makes, 3, seed, label)  # what only a first step costs
        runs = train(problem, makes, steps, seed, label)
        result = runs[0].result()
        if timed:
            result["ratio"] = round(runs[0].seconds / runs[1].seconds, 4)
            result["SGD_seconds"] = round(runs[1].seconds, 3)
        return result

    def same(seed: int) -> Any:
        return store.runs[f"steps|{name}|{seed}"]

    for seed in SEEDS:
        timed = seed == SEEDS[0]
        store.get(f"steps|{name}|{seed}", functools.partial(run, steps, seed, timed))
    ratio = store.runs[f"steps|{name}|{SEEDS[0]}"]["ratio"]
    fitting = steps if name == "SGD" else min(steps, max(2, int(steps / ratio)))
    for seed in SEEDS:
        if fitting == steps:
            store.get(f"time|{name}|{seed}", functools.partial(same, seed))
        else:
            store.get(f"time|{name}|{seed}", functools.partial(run, fitting, seed))


def forget(store: Store, name: str, tuned: bool = True) -> None:
    """Drop an optimizer's runs; with ``tuned`` those of the tuning too."""
    dropped = {"steps": (name,), "time": (name,)}
    if tuned:
        kinds = VARIANTS.get(name, (name,))
        dropped |= {"best": (name,)} | dict.fromkeys(TUNING, kinds)
    for run in list(store.runs):
        kind, *rest = run.split("|")
        if rest and rest[0] in dropped.get(kind, ()):
            del store.runs[run]


def study(key: str, args: argparse.Namespace) -> None:
    """Do what is missing of a problem, then its table and figure."""
    changed = variant_of(args)
    path = args.output / f"peers-{key}{changed}.json"
    store = Store(path)
    if not args.tables:
        problem = PROBLEMS[key](args.data_dir, args.quick, args.batch)
        problem = replace(problem, constant=args.constant)
        steps = 4 if args.quick else problem.steps * args.times
        store.get("about", lambda: about(key, problem, steps))
        if changed:
            short = stored(args.output, [key])[key]
            best = {run: value for run, value in short.items() if "best|" in run}
            store.get("shorter", lambda: best)
        for name in args.only or (*RIVALS, *OURS):
            if args.redo or args.retime:
                forget(store, name, tuned=args.redo)
            compare(name, key, problem, steps, store)
    finish(store.runs, path)


def variant_of(args: argparse.Namespace) -> str:
    """Return how the results' name says what is not as in the plain runs."""
    parts = {
        f"-{args.times}-times": args.times > 1,
        f"-batch-{args.batch}-times": args.batch > 1,
        "-constant": args.constant,
    }
    return "".join(part for part, given in parts.items() if given)


def first_round(args: argparse.Namespace) -> None:
    """Tune every candidate over half of the steps of two problems."""
    found = {}
    for key in ("transformer", "vgg11"):
        store = Store(args.output / f"peers-first-round-{key}.json")
        found[key] = store.runs
        if args.tables:
            continue
        problem = PROBLEMS[key](args.data_dir, args.quick)
        steps = 3 if args.quick else problem.steps // 2
        for name in args.only or CANDIDATES:
            tune(name, key, problem, steps, store)
    print(first_round_report(found))


def varied(
    key: str, problem: Problem, steps: int, make: Make, seeds: Sequence[int], text: str
) -> dict[str, Any]:
    """Return the mean final losses of an optimizer."""
    runs = [
        train(problem, [make], steps, seed, f"{key} {text} seed {seed}")[0].result()
        for seed in seeds
    ]
    losses = {name: [run[name] for run in runs] for name in ("train", "held_out")}
    if any(None in values for values in losses.values()):
        return dict.fromkeys(losses)
    return {name: float(np.mean(values)) for name, values in losses.items()}


def variants(args: argparse.Namespace) -> None:
    """Train EKFAC at its tuned lr with other options, see ``STUDIES``.

    Of NorMuon, the strongest rival, momentum and look-ahead too, at its own tuned lr.
    """
    store = Store(args.output / f"peers-{args.problem}.json")
    if args.redo and not args.tables:
        store.runs.clear()
    keys: Collection[str] = PROBLEMS
    if args.problem in ("damping", "momentum"):
        keys = CHOSEN
    seeds = (0,) if args.problem == "damping" else SEEDS
    for key in () if args.tables else keys:
        problem = PROBLEMS[key](args.data_dir, args.quick)
        steps = 3 if args.quick else problem.steps
        best = stored(args.output, [key])[key]
        lr = best["best|EKFAC"][0]
        makes: dict[str, Make] = {
            ", ".join(
                value if isinstance(value, str) else f"{value:g}"
                for value in options.values()
            ): functools.partial(EKFAC, lr=lr, **options)
            for options in STUDIES[args.problem]
        }
        if args.problem in NORMUON:
            makes = {f"EKFAC {name}": make for name, make in makes.items()}
        lr, variant = best["best|NorMuon"]
        for name, setting in NORMUON.get(args.problem, {}).items():
            of = normuon("head" in variant, *setting)
            makes[f"NorMuon {name}"] = functools.partial(of, lr=lr, head=problem.head)
        for name, make in makes.items():
            run = functools.partial(varied, key, problem, steps, make, seeds, name)
            store.get(f"{key}|{name}", run)
    print(varied_table(store.runs))


def rounded_whole(matrix: Tensor, *bases: Tensor | None, **options: Any) -> Tensor:
    """Return ``L^T M R`` as ``kernels.rotate_into``, but of all that is rounded."""
    rounds = kernels.rotates_rounded(matrix.shape, matrix.dtype, matrix.device)
    if options["precise"] or not rounds:
        return kernels.rotate_matrix(matrix, *bases)
    left, right = (None if basis is None else basis.mT for basis in bases)
    return kernels.rotate_back(matrix, left, right, precise=False)


def rounding(args: argparse.Namespace) -> None:
    """Train EKFAC in float32, as it is, and with gradients rounded whole: six seeds."""
    store = Store(args.output / "peers-rounding.json")
    if args.redo and not args.tables:
        store.runs.clear()
    for key in () if args.tables else ("autoencoder", "vgg11", "resnet18"):
        problem = PROBLEMS[key](args.data_dir, args.quick)
        steps = 3 if args.quick else problem.steps
        lr = stored(args.output, [key])[key]["best|EKFAC"][0]
        for name, precision in (("full", "full"), ("auto", "auto"), ("all", "auto")):
            make = functools.partial(EKFAC, lr=lr, precision=precision)
            rotate = rounded_whole if name == "all" else kernels.rotate_into
            seeds = (*SEEDS, 6, 7, 8)
            run = functools.partial(varied, key, problem, steps, make, seeds, name)
            with mock.patch.object(kernels, "rotate_into", rotate):
                store.get(f"{key}|{name}", run)
    print(varied_table(store.runs))


def shares(args: argparse.Namespace) -> None:
    """Say of each layer how much of ``G`` lies in the differences of its diagonal.

    At the end of a run of EKFAC with bases of wide sides, at its tuned lr.
    """
    store = Store(args.output / "peers-shares.json")
    if args.redo and not args.tables:
        store.runs.clear()

    def found(key: str) -> dict[str, list[float]]:
        problem = PROBLEMS[key](args.data_dir, args.quick)
        lr = stored(args.output, [key])[key]["best|EKFAC"][0]
        make = functools.partial(EKFAC, lr=lr, max_aspect=float("inf"))
        steps = 3 if args.quick else problem.steps
        optimizer = train(problem, [make], steps, SEEDS[0], f"{key} shares")[
            0
        ].optimizer
        assert isinstance(optimizer, EKFAC)
        return {
            name: [layer.block.shape[1], round(share_on_axes(layer.G), 3)]
            for name, layer in optimizer.curvature.items()
            if layer.G is not None and layer.G.dim() == 3 and not layer.block.exact
        }

    for key in () if args.tables else PROBLEMS:
        store.get(key, functools.partial(found, key))
    print(shares_table(store.runs))


def share_on_axes(G: Tensor) -> float:
    """Return ``|diag G - m|^2 / |G|^2``, with ``m`` the mean eigenvalue."""
    diagonal = G.double().diagonal(dim1=-2, dim2=-1)
    differences = diagonal - diagonal.mean(dim=-1, keepdim=True)
    return float(differences.square().sum() / G.double().square().sum())


def about(key: str, problem: Problem, steps: int) -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "problem": key,
        "note": problem.note,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Run what is not known yet, print the tables, draw the figures."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "problem",
        choices=[*PROBLEMS, "all", "first-round", "shares", "rounding", *STUDIES],
    )
    names = list(dict.fromkeys([*RIVALS, *OURS, *OPTIMIZERS]))
    arguments.add_argument("--only", nargs="+", choices=names, metavar="OPTIMIZER")
    arguments.add_argument("--times", type=int, default=1, help="how much longer runs")
    arguments.add_argument("--batch", type=int, default=1, help="how much larger")
    arguments.add_argument("--constant", action="store_true", help="no decay of lr")
    arguments.add_argument("--redo", action="store_true", help="forget the rows first")
    arguments.add_argument("--retime", action="store_true", help="keep what was tuned")
    arguments.add_argument("--tables", action="store_true", help="from the JSON only")
    args = arguments.parse_args()
    others = {"first-round": first_round, "shares": shares, "rounding": rounding}
    others |= dict.fromkeys(STUDIES, variants)
    if args.problem in others:
        if args.retime:
            arguments.error(f"--retime is of rows; {args.problem} has no prices")
        others[args.problem](args)
        return
    for key in PROBLEMS if args.problem == "all" else [args.problem]:
        study(key, args)
    if args.problem == "all":
        problems = stored(args.output, list(PROBLEMS))
        print(overall(problems))
        if args.output == HERE / "results":
            into_records(problems)


if __name__ == "__main__":
    main()
