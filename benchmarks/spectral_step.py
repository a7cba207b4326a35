"""What each part of the spectral step is worth: one part left out or changed at a time.

    python benchmarks/spectral_step.py                        # both problems, all rows
    python benchmarks/spectral_step.py --rows "this step" "no polar factor" --seeds 3
    python benchmarks/spectral_step.py --tables               # from the JSON

Problems: a character transformer, two blocks 64 wide with an untied head, on Python's
own manual (16 windows of 64 characters), and the auto-encoder of
examples/autoencoder.py with a quarter of the units, batch 200, on MNIST if
``--data-dir`` has it, else on scikit-learn's digits. Warm-up over 20 steps, then a
cosine; one learning rate for all rows of a problem. Printed are the mean training loss
of the last 20 steps, the held-out loss at the end, and processor time of a step. The
rows that change the step replace one function, ``ekfac.optim.precondition._full``, by
the one here.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import Store, example, has_mnist, parser, table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ekfac import EKFAC, KFAC, kernels
from ekfac.curvature.eigenbasis import ProjectedGradient
from ekfac.curvature.state import LayerCurvature
from ekfac.kernels.eigenspaces import degenerate
from ekfac.optim import precondition

WARM_UP, WINDOW = 20, 20


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        make: Makes the optimizer of a model and a learning rate.
        change: What of the step is different, see :func:`changed`; empty: nothing.
    """

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    change: Mapping[str, Any] = field(default_factory=dict)


def ours(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Return EKFAC."""
    return EKFAC(model, lr=lr, **options)


def kfac(model: nn.Module, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Return K-FAC."""
    return KFAC(model, lr=lr, **options)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(model.parameters(), lr=lr)


ROWS: dict[str, Row] = {
    "this step": Row(ours),
    "no polar factor, root of s": Row(ours, {"polar": 0, "post": False}),
    "no polar factor (natural)": Row(partial(ours, direction="natural")),
    "nothing after the polar factor": Row(ours, {"post": False}),
    "nothing before the polar factor": Row(ours, {"pre": False}),
    "scalings of the input side only": Row(ours, {"side": "A"}),
    "five polar steps": Row(ours, {"polar": 5}),
    "head: natural direction": Row(ours, {"head": "natural"}),
    "head: spectral direction": Row(ours, {"head": "spectral"}),
    "head: nothing after the polar factor": Row(ours, {"head": "muon"}),
    "not shared": Row(ours, {"share": 0.0}),
    "shared below 0.01 of the mean": Row(ours, {"share": 0.01}),
    "shared below 1 of the mean": Row(ours, {"share": 1.0}),
    "half way to Kronecker eigenvalues": Row(ours, {"share": 0.0, "shrink": 0.5}),
    "damping relative to the scalings alone": Row(
        partial(ours, damping_mode="relative")
    ),
    "steps of one length": Row(partial(ours, grafting="rms")),
    "averages one step ahead (Nesterov)": Row(partial(ours, nesterov=1)),
    "averages as they are": Row(partial(ours, nesterov=0)),
    "bases of wide sides": Row(partial(ours, max_aspect=math.inf)),
    "K-FAC, spectral": Row(kfac),
    "K-FAC, natural": Row(partial(kfac, direction="natural")),
    "AdamW": Row(adamw),
}


# -- the step with a change ------------------------------------------------------------


def changed_scalings(
    layer: LayerCurvature, options: Any, change: Mapping[str, Any]
) -> Tensor:
    """Return a layer's scalings with other pools, shrunk, or of one side."""
    s = layer.averages["s"].read()
    s = layer.kronecker_scalings() if s is None else s.clone()
    share = change.get("share", 0.1)
    for side, dim in (("G", -2), ("A", -1)):
        if layer.basis(side) is not None:
            spaces = degenerate(layer.values(side), 0, share)
            if spaces is not None:
                spaces.average_(s, dim)
    if weight := change.get("shrink", 0.0):
        kronecker = layer.kronecker_scalings()
        kronecker *= s.mean() / kronecker.mean()
        tiny = 1e-12 * s.mean()
        s = (s + tiny) ** (1 - weight) * (kronecker + tiny) ** weight
    if change.get("side") == "A":
        s = s.mean(dim=-2, keepdim=True).expand_as(s).clone()
    return s


def changed(
    one: ProjectedGradient,
    group: Mapping[str, Any],
    options: Any,
    workspace: Any,
    change: Mapping[str, Any],
) -> list[precondition.Direction]:
    """Return directions of layers of one shape with full bases.

    ``change`` has the number of ``polar`` steps, whether there is a scaling ``pre`` and
    ``post`` the polar factor, and what :func:`changed_scalings` reads; ``head`` is what
    the last layer gets.
    """
    longer = precondition.average_(one.stack, one.kept, group["momentum"], options)
    spectra = []
    for layer, projected in zip(one.layers, one.by_layer(), strict=True):
        way = "natural" if layer.concentrated else "spectral"
        if layer.name in ("head", LAST):
            way = change.get("head", way)
        unshared = {"share": 0.0} if way == "natural" else {}
        s = changed_scalings(layer, options, {**change, **unshared})
        squares = precondition.mean_squares(projected.unsqueeze(0))
        s += precondition.added_damping(
            [layer], one.noise, squares, s.mean().unsqueeze(0), group, options
        )
        root = s.rsqrt()
        if way == "natural":
            projected.div_(s)
        else:
            if change.get("pre", True):
                projected.mul_(root)
            steps = change.get("polar", precondition.POLAR_STEPS)
            if steps:
                projected.copy_(kernels.polar(projected, steps))
            if change.get("post", True) and way != "muon":
                projected.mul_(root)
        spectra.append(s)
    scalings = torch.cat(spectra)
    return precondition.rotated(
        one, one.kept, scalings, longer, group, options, workspace
    )


# -- problems --------------------------------------------------------------------------

LAST = "14"  # the auto-encoder's output layer


class Characters(nn.Module):
    """The transformer of examples/transformer.py, narrow and with a head of its own."""

    def __init__(self, letters: int, length: int, width: int) -> None:
        super().__init__()
        block = example("transformer").Block
        self.token = nn.Embedding(letters, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(block(width, 4), block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits ``[N, length, letters]``."""
        places = self.position.weight[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.token(codes) + places)))
        return logits


@dataclass(frozen=True)
class Problem:
    """A network with its data.

    Attributes:
        network: Makes the model.
        loss: Of a model on a batch.
        batches: Endless batches, from a generator.
        held_out: One batch.
        steps: How long a run is.
        rate: The learning rate of all rows, between the best ones of ``peers.py``.
    """

    network: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[torch.Generator], Iterator[Any]]
    held_out: Any
    steps: int
    rate: float


def characters(args: argparse.Namespace) -> Problem:
    """Return the character transformer."""
    module = example("transformer")
    text = module.Text()

    def batches(generator: torch.Generator) -> Iterator[Any]:
        while True:
            yield module.windows(text.train, 16, 64, generator)

    return Problem(
        lambda: Characters(len(text.alphabet), 64, 16 if args.quick else 64),
        lambda model, batch: cross_entropy(model(batch[0]).mT, batch[1]),
        batches,
        module.windows(text.test, 256, 64, torch.Generator().manual_seed(99)),
        3 if args.quick else 150,
        0.004,
    )


def autoencoder(args: argparse.Namespace) -> Problem:
    """Return the auto-encoder with a quarter of the units."""
    module = example("autoencoder")
    mnist = has_mnist(args.data_dir)
    train, test = module.mnist(args.data_dir) if mnist else module.digits()
    widths = tuple(max(15, width // 4) for width in module.WIDTHS)

    def batches(generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield from (
                train[part]
                for part in torch.randperm(len(train), generator=generator).split(200)
                if len(part) == 200
            )

    return Problem(
        lambda: module.network(train.shape[1], widths),
        module.reconstruction_loss,
        batches,
        test,
        3 if args.quick else 120,
        0.016,
    )


PROBLEMS = {"characters": characters, "autoencoder": autoencoder}


# -- runs ------------------------------------------------------------------------------


def train(problem: Problem, row: Row, seed: int, label: str) -> dict[str, float]:
    """Return the losses and the time of one run."""
    torch.manual_seed(seed)
    model = problem.network()
    optimizer = row.make(model, problem.rate)
    batches = problem.batches(torch.Generator().manual_seed(seed))
    losses: list[float] = []
    seconds = 0.0
    step = precondition._full
    if row.change:
        step = partial(changed, change=row.change)
    with mock.patch.object(precondition, "_full", step):
        for i in tqdm(range(problem.steps), desc=label, unit="step", leave=False):
            share = min(1.0, (i + 1) / WARM_UP)
            for group in optimizer.param_groups:
                cosine = (1 + math.cos(math.pi * i / problem.steps)) / 2
                group["lr"] = problem.rate * share * cosine
            batch, start = next(batches), time.process_time()
            optimizer.zero_grad()
            loss = problem.loss(model, batch)
            loss.backward()
            optimizer.step()
            seconds += time.process_time() - start
            losses.append(float(loss.detach()))
    with torch.no_grad():
        held_out = float(problem.loss(model.eval(), problem.held_out))
    return {
        "train": statistics.fmean(losses[-WINDOW:]),
        "held out": held_out,
        "seconds": seconds / problem.steps,
    }


def lines(runs: Mapping[str, Any], problem: str, seeds: int) -> list[dict[str, Any]]:
    """Return the table of one problem: means over the seeds and half their range."""
    found = []
    for name in ROWS:
        own = [runs.get(f"{problem}|{name}|{seed}") for seed in range(seeds)]
        if any(run is None for run in own):
            continue
        cells: dict[str, Any] = {problem: name}
        for key in ("train", "held out"):
            values = [run[key] for run in own]
            cells[key] = statistics.fmean(values)
            cells[f"{key} +-"] = (max(values) - min(values)) / 2
        cells["ms a step"] = 1e3 * statistics.fmean(run["seconds"] for run in own)
        found.append(cells)
    return found


def main() -> None:
    """Run what is not known yet and print the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    arguments.add_argument("--rows", nargs="+", default=list(ROWS))
    arguments.add_argument("--seeds", type=int, default=2)
    arguments.add_argument("--tables", action="store_true", help="from the JSON only")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    path: Path = args.output / "spectral_step.json"
    store = Store(path)
    for kind in [] if args.tables else args.problems:
        problem = PROBLEMS[kind](args)
        for seed in range(args.seeds):
            for name in args.rows:
                key = f"{kind}|{name}|{seed}"
                run = partial(train, problem, ROWS[name], seed, f"{kind} {name}")
                store.get(key, run)
    for kind in args.problems:
        rows = lines(store.runs, kind, args.seeds)
        if rows:
            print("", table(rows), sep="\n")


if __name__ == "__main__":
    main()
