"""Tables and figures of benchmarks/peers.py, from its JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from common import HERE, save_figure, table

Runs = Mapping[str, Any]
RIVALS = ("SGD", "AdamW", "SOAP", "Shampoo", "Muon", "NorMuon")
OURS = ("EKFAC", "EKFAC rank 32", "EKFAC natural", "KFAC")
COLOURS = {
    "SGD": "0.6",
    "AdamW": "tab:orange",
    "SOAP": "tab:green",
    "Shampoo": "tab:olive",
    "SPlus": "tab:pink",
    "Conda": "tab:pink",
    "Kron": "tab:pink",
    "EKFAC": "tab:blue",
    "EKFAC rank 32": "tab:red",
    "EKFAC natural": "tab:cyan",
    "KFAC": "tab:purple",
}
LARGER = "-batch-4-times"
COMPARISONS = {"steps": "equal steps", "time": "equal time"}
LOSSES = {"train": "training", "held_out": "held-out"}


def colour(name: str) -> str:
    """Return an optimizer's colour."""
    family = "black" if name.startswith(("NorMuon", "AdaMuon")) else "tab:brown"
    return COLOURS.get(name, family)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with equal keys as a Markdown table; the keys are the heading."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return "\n".join(lines)


def tuned(runs: Runs) -> dict[str, dict[float, float]]:
    """Return the tuning's training losses by optimizer and lr; infinity: diverged."""
    found: dict[str, dict[float, float]] = {}
    for key, run in runs.items():
        kind, _, rest = key.partition("|")
        if kind == "tune":
            name, lr = rest.split("|")
            loss = float("inf") if run["train"] is None else run["train"]
            found.setdefault(name, {})[float(lr)] = loss
    return {name: dict(sorted(losses.items())) for name, losses in found.items()}


def finals(runs: Runs, kind: str, name: str, loss: str) -> np.ndarray:
    """Return the final losses of an optimizer's seeds, in order; infinity: diverged."""
    found = [runs[key] for key in sorted(runs) if key.startswith(f"{kind}|{name}|")]
    values = [np.inf if run[loss] is None else run[loss] for run in found]
    return np.array(values, dtype=float)


def compared(runs: Runs) -> list[str]:
    """Return the optimizers that have all their runs, in order."""
    names = [key.split("|")[1] for key in runs if key.startswith("time|")]
    known = dict.fromkeys([*RIVALS, *OURS, *names])
    return [name for name in known if names.count(name) == 3]


def verdict(ours: np.ndarray, other: np.ndarray) -> str:
    """Return "ahead" or "behind" if every seed says so, else "level"."""
    if (ours < other).all():
        return "ahead"
    return "behind" if (ours > other).all() else "level"


def spread(values: np.ndarray) -> str:
    """Return the mean and the standard deviation over seeds."""
    if not np.isfinite(values).all():
        return "diverges"
    return f"{values.mean():.4g} ± {values.std(ddof=1):.2g}"


def problem_table(runs: Runs) -> str:
    """Return settings, price and final losses of every optimizer on a problem."""
    rows = []
    lowest = {
        (kind, loss): min(
            (finals(runs, kind, name, loss).mean(), name) for name in compared(runs)
        )[1]
        for kind in COMPARISONS
        for loss in LOSSES
    }
    for name in compared(runs):
        first = runs[f"steps|{name}|1"]
        lr, variant = runs[f"best|{name}"]
        row = {
            "optimizer": name if variant == name else f"{name} ({variant})",
            "lr": f"{lr:g}",
            "tried": len(tuned(runs)[variant]),
            "price": f"{first['ratio']:.2f}",
        }
        for kind, heading in COMPARISONS.items():
            for loss, kind_of_loss in LOSSES.items():
                cell = spread(finals(runs, kind, name, loss))
                bold = "**" if lowest[kind, loss] == name else ""
                row[f"{heading}: {kind_of_loss}"] = f"{bold}{cell}{bold}"
        row["steps in equal time"] = runs[f"time|{name}|1"]["steps"]
        rows.append(row)
    return markdown(rows)


def best_rival(runs: Runs, kind: str, loss: str) -> str:
    """Return the rival with the lowest mean final loss."""
    rivals = [name for name in compared(runs) if name not in OURS]
    return min(rivals, key=lambda name: finals(runs, kind, name, loss).mean())


def summary(problems: Mapping[str, Runs], name: str = "EKFAC") -> str:
    """Return how an optimizer of ours stands beside each problem's best rival."""
    rows = []
    for key, runs in problems.items():
        if name not in compared(runs):
            continue
        row: dict[str, Any] = {"problem": key}
        for kind, heading in COMPARISONS.items():
            for loss, kind_of_loss in LOSSES.items():
                row[f"{heading}, {kind_of_loss}"] = standing(runs, name, kind, loss)
        row["to the rival's end"] = reach(runs, name)
        rows.append(row)
    return markdown(rows) if rows else ""


def standing(runs: Runs, name: str, kind: str, loss: str) -> str:
    """Return an optimizer's mean final loss beside the best rival's."""
    rival = best_rival(runs, kind, loss)
    mine, theirs = (finals(runs, kind, n, loss) for n in (name, rival))
    verdict_ = verdict(mine, theirs)
    return f"{verdict_}: {mine.mean():.4g}, {rival} {theirs.mean():.4g}"


def both_batches(problems: Mapping[str, Runs], larger: Mapping[str, Runs]) -> str:
    """Return how EKFAC stands on batches of both sizes: training, held-out losses."""
    rows = []
    for key, small in problems.items():
        row = {"problem": key}
        sizes = {"": small, ", 4 times the batch": larger.get(f"{key}{LARGER}", {})}
        for size, runs in sizes.items():
            known = "EKFAC" in compared(runs)
            for kind, heading in COMPARISONS.items():
                cells = [
                    standing(runs, "EKFAC", kind, loss) for loss in LOSSES if known
                ]
                row[f"{heading}{size}"] = "; ".join(cells) or "-"
            row[f"to the rival's end{size}"] = reach(runs, "EKFAC") if known else "-"
        rows.append(row)
    return markdown(rows)


def passed(runs: Runs, name: str, kind: str, rival: str | None = None) -> float | None:
    """Return when the smoothed curve first passes the end of a rival's.

    As the mean share of an own run, ``None`` if a seed does not get there. Runs of
    equal time take as many seconds as the rival's. Without a ``rival`` it is the best.
    """
    rival = rival or best_rival(runs, kind, "train")
    shares = []
    for seed in (1, 2, 3):
        mine, theirs = (runs[f"{kind}|{n}|{seed}"] for n in (name, rival))
        if mine["train"] is None or theirs["train"] is None:
            return None
        steps, losses = mine["curve"]
        below = np.flatnonzero(np.array(losses) <= theirs["curve"][1][-1])
        if not len(below):
            return None
        shares.append(steps[below[0]] / mine["steps"])
    return float(np.mean(shares))


def reach(runs: Runs, name: str, rival: str | None = None) -> str:
    """Return when an optimizer passes a rival's ends, or those of the best.

    As shares of the rival's steps and of its time, at the mean price of a step, and of
    its seconds where both have schedules that end with SGD's time.
    """
    parts = []
    share = passed(runs, name, "steps", rival)
    if share is not None:
        names = name, rival or best_rival(runs, "steps", "train")
        price, other = (runs[f"steps|{n}|1"]["ratio"] for n in names)
        parts += [f"{share:.0%} of steps, {share * price / other:.0%} of time"]
    share = passed(runs, name, "time", rival)
    if share is not None:
        parts += [f"{share:.0%} of equal time"]
    return "; ".join(parts) or "-"


def muons_end(problems: Mapping[str, Runs]) -> str:
    """Return when EKFAC passes Muon's ends, problem by problem."""
    rows = [
        {"problem": key, "EKFAC passes Muon's end after": reach(runs, "EKFAC", "Muon")}
        for key, runs in problems.items()
        if {"EKFAC", "Muon"} <= set(compared(runs))
    ]
    return markdown(rows)


def rate_table(problems: Mapping[str, Runs]) -> str:
    """Return the tuned learning rates of AdamW and of ours."""
    rows = []
    for key, runs in problems.items():
        names = ["AdamW", *(name for name in OURS if f"best|{name}" in runs)]
        row = {"problem": key}
        row |= {name: f"{runs[f'best|{name}'][0]:g}" for name in names}
        if "best|EKFAC" in runs:
            ratio = runs["best|EKFAC"][0] / runs["best|AdamW"][0]
            row["EKFAC / AdamW"] = f"{ratio:.3g}"
        rows.append(row)
    heads = max(rows, key=len)
    return markdown([{head: row.get(head, "-") for head in heads} for row in rows])


def sensitivity_table(problems: Mapping[str, Runs]) -> str:
    """Return what half and twice the best lr cost: the loss over the best one."""
    names = dict.fromkeys(name for runs in problems.values() for name in tuned(runs))
    rows = []
    for name in names:
        row = {"optimizer": name}
        for factor, heading in ((0.5, "lr / 2"), (2.0, "2 lr")):
            ratios = []
            for runs in problems.values():
                losses = {
                    lr: loss
                    for lr, loss in tuned(runs).get(name, {}).items()
                    if np.isclose(np.log2(lr / 1e-3) % 1, (0, 1), atol=1e-3).any()
                }  # the two half way between them have no others around
                if len(losses) >= 3:
                    lr = min(losses, key=losses.__getitem__)
                    near = [x for x in losses if np.isclose(x, factor * lr)]
                    ratios += [losses[x] / losses[lr] for x in near]
            finite = [ratio for ratio in ratios if np.isfinite(ratio)]
            gone = len(ratios) - len(finite)
            row[f"{heading}: median"] = f"{np.median(finite):.2f}" if finite else "-"
            worst = f"{max(finite):.2f}" if finite else "-"
            row[f"{heading}: worst"] = f"{worst}, {gone} diverge" if gone else worst
        rows.append(row)
    return markdown(rows)


def varied_table(runs: Runs) -> str:
    """Return EKFAC's training and held-out losses by problem and setting."""
    rows: dict[str, dict[str, Any]] = {}
    for key, run in runs.items():
        problem, value = key.split("|")
        row = rows.setdefault(problem, {"problem": problem})
        diverged = run["train"] is None
        row[value] = "-" if diverged else f"{run['train']:.4g} ({run['held_out']:.4g})"
    return markdown(list(rows.values()))


def shares_table(runs: Runs) -> str:
    """Return the layers of which few outputs hold most of ``G``, and the next ones.

    Layers with up to 8 outputs take the natural direction in any case.
    """
    rows = []
    for key, layers in runs.items():
        order = sorted(layers, key=lambda name: -layers[name][1])
        wide = [name for name in order if layers[name][0] > 8]
        above = [f"{name} {layers[name][1]}" for name in wide if layers[name][1] > 0.5]
        below = [f"{name} {layers[name][1]}" for name in wide if layers[name][1] <= 0.5]
        row = {"problem": key, "natural": ", ".join(above) or "-"}
        rows.append(row | {"the next": below[0], "median": below[len(below) // 2]})
    return markdown(rows)


def first_round_report(problems: Mapping[str, Runs]) -> str:
    """Return the candidates' best losses, and their mean ratio to the lowest."""
    best = {key: tuned(runs) for key, runs in problems.items()}
    lowest = {
        key: min(min(losses.values()) for losses in found.values())
        for key, found in best.items()
    }
    rows = []
    for name in dict.fromkeys(name for found in best.values() for name in found):
        row: dict[str, Any] = {"candidate": name}
        ratios = []
        for key, found in best.items():
            losses = found.get(name, {0.0: np.nan})
            lr = min(losses, key=losses.__getitem__)
            row[key] = f"{losses[lr]:.4g} (lr {lr:g}, {len(losses)} tried)"
            ratios.append(losses[lr] / lowest[key])
        row["mean of loss / lowest"] = float(np.mean(ratios))
        rows.append(row)
    rows.sort(key=lambda row: row["mean of loss / lowest"])
    return table(rows)


def band(
    axis: plt.Axes, x: np.ndarray, curves: np.ndarray, name: str, label: str | None
) -> None:
    """Draw the median of the seeds and the band between the lowest and the highest."""
    ours = name in OURS
    style = {"color": colour(name), "lw": 2.0 if ours else 1.2}
    style["ls"] = "-" if ours else "--"
    axis.plot(x, np.median(curves, 0), label=label, zorder=3 if ours else 2, **style)
    lowest, highest = curves.min(0), curves.max(0)
    axis.fill_between(x, lowest, highest, color=colour(name), alpha=0.15, lw=0)


def draw(runs: Runs, path: Path) -> None:
    """Draw training losses over steps, and over seconds in the runs of equal time."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), sharey=True)
    about = runs["about"]
    base = runs["steps|SGD|1"]["SGD_seconds"] / about["steps"]
    shown: list[float] = []
    for name in compared(runs):
        price = base * (1.0 if name == "SGD" else runs[f"steps|{name}|1"]["ratio"])
        for axis, kind, unit in zip(axes, COMPARISONS, (1.0, price), strict=True):
            found = [runs[f"{kind}|{name}|{seed}"]["curve"] for seed in (1, 2, 3)]
            if any(not curve[1] for curve in found):
                continue
            steps = np.array(found[0][0])
            curves = np.array([curve[1] for curve in found])
            band(axis, unit * steps, curves, name, name if kind == "steps" else None)
            shown += [curves.min(), curves[:, len(steps) // 8].max()]
    axes[0].set(xlabel="step", ylabel="training loss, mean of 10 batches")
    axes[1].set(xlabel="seconds of processor time (schedules that end with SGD's time)")
    low, high = min(shown), float(np.quantile(shown, 0.95))
    if high > 8 * low:
        axes[0].set(yscale="log", ylim=(0.8 * low, 1.3 * high))
    else:
        axes[0].set(ylim=(low - 0.04 * (high - low), high))
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(f"{about['problem']}: {about['note']}", fontsize=10)
    figure.legend(loc="lower center", ncols=6, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save_figure(figure, path, dpi=110)


def finish(runs: Runs, path: Path) -> None:
    """Print a problem's table and draw its figure beside the JSON."""
    about, found = runs["about"], runs if compared(runs) else None
    if found is None:
        return
    print(f"\n{about['problem']}: {about['note']}; {about['steps']} steps\n")
    print(problem_table(runs))
    if "SGD" in compared(runs):
        draw(runs, path.with_suffix(".png"))
        print(f"\nresults: {path}\nfigure: {path.with_suffix('.png')}")


def overall(problems: Mapping[str, Runs]) -> str:
    """Return all tables of the record."""
    beside = {name: summary(problems, name) for name in OURS}
    parts = [f"### {name}\n\n{part}" for name, part in beside.items() if part]
    larger = larger_batches(problems)
    parts += [f"### Muon's end\n\n{muons_end(problems | larger)}"]
    parts += [f"### Learning rates\n\n{rate_table(problems)}"]
    parts += [f"### What a wrong lr costs\n\n{sensitivity_table(problems)}"]
    path = HERE / "results" / "peers-shares.json"
    if path.exists():
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        parts += [f"### How much of G few outputs hold\n\n{shares_table(runs)}"]
    for kind, heading in (
        ("damping", "Other dampings"),
        ("adaptive", "Relative damping, steps of one length, and both adaptive"),
        ("intervals", "Intervals of factors and bases"),
        ("decay", "Decays of the scalings"),
        ("momentum", "Momenta of EKFAC and NorMuon"),
        ("nesterov", "Averages so many steps ahead"),
        ("rounding", "In float32, as it is, and with gradients rounded whole"),
    ):
        path = HERE / "results" / f"peers-{kind}.json"
        if path.exists():
            runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
            parts += [f"### {heading}\n\n{varied_table(runs)}"]
    longer = stored(HERE / "results", [f"{key}-4-times" for key in problems])
    if longer:
        parts += [f"### EKFAC, runs four times as long\n\n{summary(longer)}"]
    kept = stored(HERE / "results", [f"{key}-constant" for key in problems])
    if kept:
        parts += [f"### EKFAC, a constant rate after the warm-up\n\n{summary(kept)}"]
        parts += [problem_part(key, runs) for key, runs in kept.items()]
    for name in OURS:
        if part := summary(larger, name):
            parts += [f"### {name}, batches four times as large\n\n{part}"]
    parts += [problem_part(key, runs) for key, runs in (problems | larger).items()]
    return "\n\n".join(parts)


def larger_batches(keys: Iterable[str]) -> dict[str, Runs]:
    """Return the runs on batches four times as large of the problems that have them."""
    found = stored(HERE / "results", [f"{key}{LARGER}" for key in keys])
    return {key: runs for key, runs in found.items() if compared(runs)}


def problem_part(key: str, runs: Runs) -> str:
    """Return what the record says of one problem: its table and figure."""
    about = runs["about"]
    heading = f"### {key}\n\n{about['note']}; {about['steps']} steps."
    figure = f"![Training losses of {key}](results/peers-{key}.png)"
    return f"{heading}\n\n{problem_table(runs)}\n\n{figure}"


def stored(folder: Path, keys: Sequence[str]) -> dict[str, Runs]:
    """Return the runs of all problems that have results in a folder."""
    paths = {key: folder / f"peers-{key}.json" for key in keys}
    return {
        key: json.loads(path.read_text(encoding="utf-8"))["runs"]
        for key, path in paths.items()
        if path.exists()
    }


def into_records(problems: Mapping[str, Runs]) -> None:
    """Put the tables into benchmarks/peers.md and README.md, between their marks."""
    tables = {
        HERE / "peers.md": overall(problems),
        HERE.parent / "README.md": both_batches(problems, larger_batches(problems)),
    }
    start, end = "<!-- peers -->", "<!-- end of peers -->"
    for path, text in tables.items():
        before, _, rest = path.read_text(encoding="utf-8").partition(start)
        _, _, after = rest.partition(end)
        document = f"{before}{start}\n\n{text}\n\n{end}{after}"
        path.write_text(document, encoding="utf-8")
