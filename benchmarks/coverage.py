"""Coverage, loss and cost of EKFAC on tiny models of other packages.

    python benchmarks/coverage.py [--models Llama T5 ...] [--steps 40]

For every model:

- blocks: the share of the weights' elements in Kronecker or exact blocks that have
  statistics after two steps; the rest is trained by its diagonal second moment;
- loss: the mean over the last pass through the data, with AdamW and with EKFAC at the
  same three learning rates; "same" is 1e-3, "best" the best of the three;
- step: processor time of a training step (forward, backward, update) over AdamW's;
- state: bytes of the optimizer's state over AdamW's;
- saved: whether training goes on bit for bit from a saved state, loaded by
  ``torch.load(weights_only=True)`` into a new optimizer;
- warned: lines of the warnings of construction and of the first steps.

Writes ``coverage.json`` and, for reading, ``coverage.md``, model by model: what was
measured before, with as many steps, stays.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from coverage_models import BATCHES, MODELS, Problem, torchvision_operators
from torch import Tensor, nn

from ekfac import EKFAC

HERE = Path(__file__).resolve().parent
RATES = (3e-4, 1e-3, 3e-3)
SAME = 1e-3
COLUMNS = (
    "model",
    "weights",
    "blocks",
    "AdamW same",
    "AdamW best",
    "EKFAC same",
    "EKFAC best",
    "step",
    "state",
    "saved",
    "warned",
    "largest of the rest",
)
Make = Callable[[], Problem]


def built(make: Make) -> Problem:
    """Return the problem with its own seed."""
    torch.manual_seed(0)
    problem = make()
    problem.model.train()
    return problem


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return torch's AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


def ekfac(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return EKFAC with its defaults."""
    return EKFAC(model, lr=lr)


def step(problem: Problem, optimizer: torch.optim.Optimizer, number: int) -> float:
    """Do one training step and return its loss."""
    optimizer.zero_grad()
    loss = problem.loss(number)
    loss.backward()
    optimizer.step()
    return float(loss)


def trained(
    make: Make,
    optimizer_of: Callable[..., torch.optim.Optimizer],
    lr: float,
    steps: int,
) -> tuple[float, float]:
    """Return the last losses' mean and the mean processor time of a step."""
    problem = built(make)
    optimizer = optimizer_of(problem.model, lr)
    losses, times = [], []
    for number in range(steps):
        begin = time.process_time()
        losses.append(step(problem, optimizer, number))
        times.append(time.process_time() - begin)
    # The first interval of statistics is left out: everything is new in it.
    late = times[10:] or times
    return sum(losses[-BATCHES:]) / BATCHES, sum(late) / len(late)


def tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state dict."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from tensors(value)


def size(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state."""
    return sum(t.numel() * t.element_size() for t in tensors(optimizer.state_dict()))


def shares(make: Make) -> dict[str, Any]:
    """Return the share in blocks, what is left and why, and the warnings' lines."""
    problem = built(make)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        optimizer = EKFAC(problem.model, lr=SAME)
        for number in range(2):
            step(problem, optimizer, number)
    said = [str(w.message) for w in record if "Ekfac" in w.category.__name__]
    own = {n: p for n, p in problem.model.named_parameters() if p.grad is not None}
    total = sum(p.numel() for p in own.values())
    inside = {
        name
        for layer in optimizer.curvature.values()
        if layer.ready
        for name in layer.parameter_names
    }
    rest = {n: p.numel() for n, p in own.items() if n not in inside}
    worst = max(rest, key=lambda name: rest[name], default="")
    reasons = {row.layer: row.reason for row in optimizer.describe().rows}
    why = f"{worst}: {reasons.get(worst) or 'no statistics'}" if worst else ""
    return {
        "weights": total,
        "blocks": 1 - sum(rest.values()) / total,
        "warned": sum(len(text.splitlines()) for text in said),
        "largest of the rest": why,
    }


def goes_on(make: Make) -> bool:
    """Return whether a saved and loaded run goes on bit for bit."""
    results = []
    for interrupted in (False, True):
        problem = built(make)
        optimizer = ekfac(problem.model, SAME)
        for number in range(6):
            if interrupted and number == 3:
                file = io.BytesIO()
                torch.save([problem.model.state_dict(), optimizer.state_dict()], file)
                file.seek(0)
                weights, state = torch.load(file, weights_only=True)
                problem = built(make)
                problem.model.load_state_dict(weights)
                optimizer = ekfac(problem.model, SAME)
                optimizer.load_state_dict(state)
            torch.manual_seed(number)
            step(problem, optimizer, number)
        results.append([p.detach() for p in problem.model.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def row(name: str, make: Make, steps: int) -> dict[str, Any]:
    """Return what the table says of one model."""
    known = shares(make)
    runs = {
        kind.__name__: {lr: trained(make, kind, lr, steps) for lr in RATES}
        for kind in (adamw, ekfac)
    }
    states = {}
    for kind in (adamw, ekfac):
        problem = built(make)
        optimizer = kind(problem.model, SAME)
        step(problem, optimizer, 0)
        states[kind.__name__] = size(optimizer)
    ours = runs["ekfac"]
    times = {k: min(t for _, t in found.values()) for k, found in runs.items()}
    return {
        "model": name,
        **known,
        "AdamW same": runs["adamw"][SAME][0],
        "AdamW best": best(runs["adamw"]),
        "EKFAC same": ours[SAME][0],
        "EKFAC best": best(ours),
        "step": times["ekfac"] / times["adamw"],
        "state": states["ekfac"] / states["adamw"],
        "saved": goes_on(make),
        "runs": {k: {str(lr): v[0] for lr, v in r.items()} for k, r in runs.items()},
    }


def best(runs: dict[float, tuple[float, float]]) -> float:
    """Return the lowest last loss."""
    losses = [loss for loss, _ in runs.values() if math.isfinite(loss)]
    return min(losses, default=math.nan)


def at_edge(rows: list[dict[str, Any]], kind: str) -> int:
    """Return in how many models the largest learning rate is the best."""
    runs = [row["runs"][kind] for row in rows]
    return sum(min(run, key=lambda lr: run[lr]) == str(max(RATES)) for run in runs)


def text(key: str, value: Any) -> str:
    """Return a cell."""
    if key == "weights":
        return f"{value:,}"
    if key == "blocks":
        return f"{100 * value:.1f} %"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2f}" if key in ("step", "state") else f"{value:.4f}"
    return str(value)


def page(rows: list[dict[str, Any]], steps: int) -> str:
    """Return the table as markdown."""
    packages = [p for p in MODELS if p != "torch" and importlib.util.find_spec(p)]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    lines = [
        "# Coverage of other packages' models",
        "",
        f"`python benchmarks/coverage.py --steps {steps}`, torch {torch.__version__}, "
        f"{versions}; one thread. Columns are explained in the script.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join(" --- " for _ in COLUMNS) + "|",
    ]
    lines += [
        "| " + " | ".join(text(key, each[key]) for key in COLUMNS) + " |"
        for each in rows
    ]
    low = [each["model"] for each in rows if each["blocks"] < 0.95]
    ahead = sum(each["EKFAC same"] < each["AdamW same"] for each in rows)
    tuned = sum(each["EKFAC best"] < each["AdamW best"] for each in rows)
    against = sum(each["EKFAC same"] < each["AdamW best"] for each in rows)
    behind = [r["model"] for r in rows if r["EKFAC best"] > 1.1 * r["AdamW best"]]
    lines += [
        "",
        f"Of {len(rows)} models, {len(rows) - len(low)} have at least 95 % of their "
        f"weights in blocks{': not ' + ', '.join(low) if low else ''}. After {steps} "
        f"steps EKFAC is ahead of AdamW at the same learning rate in {ahead}, untuned "
        f"ahead of tuned AdamW in {against}, with both tuned in {tuned}. The best rate "
        f"is the largest of the three in {at_edge(rows, 'adamw')} models with AdamW, "
        f"in {at_edge(rows, 'ekfac')} with EKFAC: larger ones may be better.",
        "",
        "EKFAC's best loss is more than a tenth above AdamW's in "
        f"{', '.join(behind) or 'none'}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the models that are asked for, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="*", help="names in the table; all by default"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--shares", action="store_true", help="the shares alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    library = torchvision_operators()
    target = given.output / "coverage.json"
    for package, models in MODELS.items():
        for short, make in models.items():
            name = f"{package}: {short}"
            if given.models and not {short, name} & set(given.models):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = shares(make) if given.shares else row(name, make, given.steps)
            keys = [key for key in COLUMNS if key in found and key != "model"]
            cells = ", ".join(f"{key} {text(key, found[key])}" for key in keys)
            print(f"{name}: {cells}", flush=True)
            if not given.shares:
                write(target, found, given.steps)
    del library


def write(target: Path, found: dict[str, Any], steps: int) -> None:
    """Put a row into the record, in place of the model's old one, and its page."""
    target.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    if target.exists():
        document = json.loads(target.read_text(encoding="utf-8"))
        if document["steps"] == steps:
            rows = {each["model"]: each for each in document["rows"]}
    rows[found["model"]] = found
    every = [f"{package}: {name}" for package in MODELS for name in MODELS[package]]
    kept = [rows[name] for name in every if name in rows]
    document = {"steps": steps, "rates": RATES, "rows": kept}
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    written = target.with_suffix(".md")
    written.write_text(page(kept, steps), encoding="utf-8")


if __name__ == "__main__":
    main()
