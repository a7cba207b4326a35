"""Chapters 5 and 6 of George 2023, redone small: reported beside measured.

    python benchmarks/george2023.py --data-dir MNIST            # MNIST at 14 x 14
    python benchmarks/george2023.py --parts lazy complexity     # some of it
    python benchmarks/george2023.py --quick

Parts: ``alignment`` (Figures 6.3 and 6.4: the tangent kernel turns towards the labels,
for easy examples first), ``depth`` (Figure B.7), ``noise`` and ``scores`` (Figure 5.2:
groups of examples in the lazy and the ordinary regime at equal loss), ``toys`` (Figures
5.4 and C.9: the closed-form examples), ``complexity`` (Figure 6.6), ``kernels``
(SuperNat, Figure 6.5; bounds, B.3; directions, B.1; frequencies, B.2; the disk, 6.1;
Lemma 6.2.1).
The thesis has VGG19 and ResNet18 on CIFAR-10 and trends without numbers in its text;
here it is small ReLU networks, MNIST at 14 x 14 pixels or the digits of scikit-learn.
A part that was run before stays in the file of results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from common import bar, parser, print_seconds, save, table
from george2023_figure import Part, figure_of
from george2023_parts import (
    Images,
    alignment,
    complexity,
    lazy,
    load,
    mlp,
    noisy_labels,
    scored_groups,
    spearman,
)
from george2023_small import (
    closed_form,
    disk,
    first_order,
    frequencies,
    perturbation,
    rescaled_bounds,
    supernat,
    toy,
)

from ekfac.diagnostics.papers.george import compare_at_equal_loss

# alpha -> learning rate in the outputs.
REGIMES = {1.0: 0.005, 100.0: 0.05}


def row(claim: str, reported: str, measured: str, holds: bool) -> dict[str, str]:
    """Return a line of the table."""
    return {
        "claim": claim,
        "reported": reported,
        "measured": measured,
        "holds": "yes" if holds else "NO",
    }


def spread(values: list[float], digits: int = 2) -> str:
    """Return the values of the seeds."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def part_alignment(images: Images, args: argparse.Namespace) -> Part:
    """Alignment, its layers and the spectrum while training."""
    points = (0, 10, 20) if args.quick else (0, 30, 60, 120, 180, 300, 500, 700, 900)
    early = 20 if args.quick else 180
    runs = [
        alignment(
            mlp(images.x.shape[1], *[80] * 6, 10, he=True, seed=seed),
            images, seed, points,
        )
        for seed in args.seeds
    ]  # fmt: skip
    at = points.index(early)
    easy = [run["easy"][at] for run in runs]
    hard = [run["difficult"][at] for run in runs]
    test = [max(run["test"]) / run["test"][0] for run in runs]
    inner = [max(list(run["layers"].values())[:-1]) for run in runs]
    top = [list(run["layers"].values())[-1] for run in runs]
    ranks = [min(run["effective rank"]) / run["effective rank"][0] for run in runs]
    growth = [max(run["largest"]) / run["largest"][0] for run in runs]
    pairs = zip(easy, hard, strict=True)
    rows = [
        row(
            f"easy aligned above difficult, step {early}",
            "easy rises faster and higher",
            f"easy {spread(easy, 3)}, difficult {spread(hard, 3)}",
            all(a >= 4 * b for a, b in pairs),
        ),
        row(
            "alignment grows on test examples",
            "increases",
            f"times {spread(test, 1)}",
            min(test) >= 3,
        ),
        row(
            "inner layers above the top one",
            "> 0.5 inside, top lower",
            f"inside {spread(inner)}, top {spread(top)}",
            all(a > b for a, b in zip(inner, top, strict=True)),
        ),
        row(
            "effective rank falls",
            "to < 0.1 of the start",
            f"to {spread(ranks)} of the start",
            max(ranks) < 0.1,
        ),
        row(
            "largest eigenvalue grows",
            "times > 100",
            f"times {spread(growth, 1)}",
            min(growth) > 100,
        ),
    ]
    return {"rows": rows, "runs": runs}


def part_depth(images: Images, args: argparse.Namespace) -> Part:
    """Alignment of easy less that of difficult examples, by depth (Figure B.7)."""
    depths = (2, 4, 6)
    late = (0, 60, 180, 300, 500, 700, 900, 1200, 1500, 1800)
    points = (0, 10) if args.quick else late
    size = 20 if args.quick else 50
    rows, runs = [], {}
    for depth in depths:
        each = [
            alignment(
                mlp(images.x.shape[1], *[60] * depth, 10, he=True, seed=seed),
                images, seed, points, lr=0.01, size=size,
            )
            for seed in args.seeds
        ]  # fmt: skip
        runs[depth] = [
            [a - b for a, b in zip(run["easy"], run["difficult"], strict=True)]
            for run in each
        ]
    most = {depth: [max(gaps) for gaps in each] for depth, each in runs.items()}
    when = {
        depth: [points[gaps.index(max(gaps))] for gaps in each]
        for depth, each in runs.items()
    }
    for claim, values, digits in (
        ("easy less difficult, most", most, 3),
        ("step of it", when, 0),
    ):
        shown = [spread([float(v) for v in values[depth]], digits) for depth in depths]
        growing = zip(*values.values(), strict=True)
        rows.append(
            row(
                f"{claim}, {depths[0]}, {depths[1]}, {depths[2]} layers",
                "grows with the depth",
                "; ".join(shown),
                all(list(each) == sorted(each) for each in growing),
            )
        )
    return {"rows": rows, "points": list(points), "runs": runs}


def part_noise(images: Images, args: argparse.Namespace) -> Part:
    """Wrong labels in both regimes, compared at equal loss of the clean examples."""
    count, limit = (200, 40) if args.quick else (1000, 6000)
    levels = [2.2, 2.1] if args.quick else [1.75, 1.5, 1.25, 1.0]
    differences, linear, curves = [], [], {}
    for seed in bar(args.seeds, "seeds"):
        x, y, groups = noisy_labels(images, seed, count)
        found = {
            alpha: lazy(
                mlp(x.shape[1], 100, 100, 100, 10, seed=seed), x, y, groups,
                alpha=alpha, lr=lr, seed=seed, stop=levels[-1] * 0.98,
                reference="clean", limit=limit,
            )
            for alpha, lr in REGIMES.items()
        }  # fmt: skip
        equal = compare_at_equal_loss(found[1.0][0], found[100.0][0], levels)
        differences.append(equal.difference["noisy"].tolist())
        linear.append({alpha: run[1] for alpha, run in found.items()})
        curves = {
            str(alpha): {
                "progress": run[0].progress.tolist(),
                "noisy": run[0].losses["noisy"].tolist(),
            }
            for alpha, run in found.items()
        }
    last = [values[-2:] for values in differences]
    kernels = {a: [run[a]["kernel"][-1] for run in linear] for a in REGIMES}
    signs = {a: [run[a]["signs"][-1] for run in linear] for a in REGIMES}
    rows = [
        row(
            f"loss of wrong labels, ordinary - lazy, at clean loss {levels[-2]:g}",
            "higher in the ordinary regime",
            spread([values[0] for values in last]),
            all(values[0] > 0.2 for values in last),
        ),
        row(
            f"the same at clean loss {levels[-1]:g}",
            "higher in the ordinary regime",
            spread([values[1] for values in last]),
            all(values[1] > 0.2 for values in last),
        ),
        row(
            "kernel alignment with the start, alpha 1 and 100",
            "falls; stays at 1",
            f"{spread(kernels[1.0])}; {spread(kernels[100.0], 3)}",
            max(kernels[1.0]) < 0.85 and min(kernels[100.0]) > 0.98,
        ),
        row(
            "ReLUs as at the start, alpha 1 and 100",
            "falls; stays at 1",
            f"{spread(signs[1.0])}; {spread(signs[100.0])}",
            max(signs[1.0]) < min(signs[100.0]) and min(signs[100.0]) > 0.98,
        ),
    ]
    return {"rows": rows, "differences": differences, "levels": levels, "runs": curves}


def part_scores(images: Images, args: argparse.Namespace) -> Part:
    """Groups by C-score in both regimes, compared at equal mean loss."""
    count, limit, repeats = (160, 30, 2) if args.quick else (800, 4000, 12)
    levels = [2.2, 2.1] if args.quick else [1.5, 1.0, 0.7, 0.5]
    x, y, groups = scored_groups(images, 0, count, repeats)
    spreads, differences = [], []
    for seed in bar(args.seeds, "seeds"):
        runs = [
            lazy(
                mlp(x.shape[1], 100, 100, 100, 10, seed=seed), x, y, groups,
                alpha=alpha, lr=lr, seed=seed, stop=levels[-1] * 0.98,
                reference=None, limit=limit,
            )[0]
            for alpha, lr in REGIMES.items()
        ]  # fmt: skip
        equal = compare_at_equal_loss(runs[0], runs[1], levels)
        first, last = "1/5", "5/5"
        spreads.append(
            [float((v[first] - v[last])[-1]) for v in (equal.first, equal.second)]
        )
        differences.append({n: v.tolist() for n, v in equal.difference.items()})
    ordinary, flat = ([pair[i] for pair in spreads] for i in (0, 1))
    rows = [
        row(
            "easy groups are learned first",
            "in both regimes",
            f"most difficult - easiest: {spread(ordinary)} and {spread(flat)}",
            min(ordinary + flat) > 0,
        ),
        row(
            f"spread between groups at mean loss {levels[-1]:g}, ordinary > lazy",
            "larger in the ordinary regime",
            spread([a - b for a, b in spreads]),
            all(a > b for a, b in spreads),
        ),
    ]
    return {"rows": rows, "levels": levels, "differences": differences}


def part_toys(images: Images, args: argparse.Namespace) -> Part:
    """Examples 2 and 3, in closed form and with a two-layer network."""
    steps, levels = (40, [0.9]) if args.quick else (1500, [0.8])
    rows = []
    names = {2: "wrong labels", 3: "the minority without the spurious feature"}
    for number, name in names.items():
        exact, trained = [], []
        for seed in bar(args.seeds, "seeds"):
            runs = [toy(number, seed, alpha, steps) for alpha in (1.0, 100.0)]
            for found, pair in ((exact, closed_form(number, seed)), (trained, runs)):
                equal = compare_at_equal_loss(pair[0], pair[1], levels)
                found.append(float(equal.difference["odd"][0]))
        for found, kind in ((exact, "closed form"), (trained, "2-layer network")):
            claim = f"loss of {name}, ordinary - lazy, at {levels[0]:g}, {kind}"
            higher = all(value > 0 for value in found)
            rows.append(
                row(claim, "higher in the ordinary regime", spread(found, 3), higher)
            )
    return {"rows": rows}


def part_complexity(images: Images, args: argparse.Namespace) -> Part:
    """The measure beside the generalisation gap."""
    settings: dict[str, Any] = (
        {"count": 200, "limit": 60} if args.quick else {"count": 1000, "limit": 6000}
    )
    noises = [0.0, 0.4, 0.8] if args.quick else [0.0, 0.2, 0.4, 0.6, 0.8]
    widths = [16, 32, 64] if args.quick else [16, 32, 64, 128, 256, 512]
    series: dict[str, list[Any]] = {"noise": [], "width": []}
    for seed in bar(args.seeds, "seeds"):
        for name, values in (("noise", noises), ("width", widths)):
            series[name].append(
                [
                    complexity(
                        images,
                        width=int(value) if name == "width" else 128,
                        noise=value if name == "noise" else 0.0,
                        seed=seed,
                        **settings,
                    )
                    for value in values
                ]
            )
    orders = {
        name: [
            spearman([r["C/n"] for r in run], [r["gap"] for r in run]) for run in runs
        ]
        for name, runs in series.items()
    }
    measured = {
        name: "; ".join(spread([r["C/n"] for r in run], 0) for run in runs)
        for name, runs in series.items()
    }
    rows = [
        row(
            f"C/n goes with the gap over {what}: rank correlation",
            "same shape",
            f"{spread(orders[name])} (C/n {measured[name]})",
            min(orders[name]) >= least,
        )
        for name, what, least in (
            ("noise", "label noise", 0.999),
            ("width", "width", 0.8),
        )
    ]
    return {"rows": rows, "series": series}


def part_kernels(images: Images, args: argparse.Namespace) -> Part:
    """What needs a kernel and little training."""
    quick = args.quick
    wins, errors = supernat(range(100, 104 if quick else 120))
    mine, other = (sum(e[i] for e in errors) / len(errors) for i in (0, 1))
    bounds = rescaled_bounds(150 if quick else 400, (0.0, 0.5, 0.9, 1.0), 0)
    moved = [
        perturbation(
            mlp(images.x.shape[1], 40, 40, 10, seed=seed),
            images, seed, 30 if quick else 500,
        )
        for seed in args.seeds
    ]  # fmt: skip
    times = [m["top 10"] / m["random"] for m in moved]
    ordered = [frequencies(seed) for seed in args.seeds]
    disks = [disk(seed, 20 if quick else 1000) for seed in args.seeds]
    modes = [first_order(images, seed) for seed in args.seeds]

    def both(name: str, digits: int = 2) -> str:
        ends = (
            spread([d[f"{name}, {w}"] for d in disks], digits) for w in ("start", "end")
        )
        return " -> ".join(ends)

    rows = [
        row(
            "SuperNat below gradient descent on test",
            "lower test error",
            f"{wins} of {len(errors)} seeds; {mine:.3f} and {other:.3f}",
            wins >= 0.9 * len(errors),
        ),
        row(
            "norm bound loose as c -> 1, optimal one not",
            "yes",
            "; ".join(f"c={c:g}: {a:.3g}, {b:.2f}" for c, a, b, _ in bounds),
            bounds[-1][1] > 1 > max(b for _, _, b, _ in bounds),
        ),
        row(
            "outputs change along top singular vectors, not random ones",
            "random: almost no effect",
            f"top 10 over random: {spread(times, 1)}",
            min(times) >= 5,
        ),
        row(
            "1-D: eigenvectors in order of frequency (correlation)",
            "increasing frequency",
            spread(ordered),
            min(ordered) > 0.7,
        ),
        row(
            "disk: lambda 20 / lambda 1",
            "0.015 -> 0.002",
            both("lambda 20 / lambda 1", 3),
            all(
                d["lambda 20 / lambda 1, end"] < 0.3 * d["lambda 20 / lambda 1, start"]
                for d in disks
            ),
        ),
        row(
            "disk: labels in the top 20 eigenvectors",
            "class structure appears",
            both("labels in top 20"),
            all(d["labels in top 20, end"] >= 0.6 for d in disks),
        ),
        row(
            "a step's change, mode by mode: error to 1st order, to the change",
            "Lemma 6.2.1, exact to 1st order",
            "; ".join(f"{a:.0e}, {b:.0e}" for a, b in modes),
            max(a for a, _ in modes) < 1e-9,
        ),
    ]
    return {"rows": rows, "bounds": bounds, "disks": disks}


PARTS: dict[str, Callable[[Images, argparse.Namespace], Part]] = {
    "alignment": part_alignment,
    "depth": part_depth,
    "noise": part_noise,
    "scores": part_scores,
    "toys": part_toys,
    "complexity": part_complexity,
    "kernels": part_kernels,
}


def main() -> None:
    """Run the parts, print the table, save both."""
    arguments = parser(__doc__)
    arguments.add_argument("--parts", nargs="+", choices=list(PARTS), default=[*PARTS])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    args = arguments.parse_args()
    torch.set_num_threads(1)  # results follow from the seeds digit by digit
    if args.quick:
        args.seeds = args.seeds[:1]
    torch.set_default_dtype(torch.float32)
    images = load(args.data_dir)
    saved = args.output / "george2023.json"
    parts: dict[str, Part] = {}
    if saved.exists():
        found = json.loads(saved.read_text(encoding="utf-8"))
        if found["data"] == images.name and found["seeds"] == args.seeds:
            parts = found["parts"]
    for name in bar(args.parts, "parts"):
        start = time.process_time()
        parts[name] = PARTS[name](images, args)
        parts[name]["seconds"] = time.process_time() - start
        print(f"{name}: {parts[name]['seconds']:.0f} s", flush=True)
    parts = {name: parts[name] for name in PARTS if name in parts}
    print(f"\n{images.name}, {len(images.x)} training images, seeds {args.seeds}")
    print(table([line for part in parts.values() for line in part["rows"]]))
    results = {"data": images.name, "seeds": args.seeds, "parts": parts}
    print_seconds()
    save(args.output, "george2023", results, figure_of(images.name, parts))


if __name__ == "__main__":
    main()
