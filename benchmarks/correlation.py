"""Input factors of convolutions: by offsets, beside products of unfolded patches.

    python benchmarks/correlation.py                 # minutes
    python benchmarks/correlation.py --quick

For every convolution of ResNet-18 (32 x 32 stem), and for strides, dilations, groups
and other kernels, three ways to ``sum a a^T`` over patches ``a``: one product of all
patches, the sum image by image, and the products of the distinct offsets
(``ekfac.kernels.convolution``). The fourth is what the layer's adapter does: offsets
where its cost model says so, else patches of a few images at a time. Time is the
process's on its processors, the least of several repetitions in turn, error
the relative distance from the patches' product in float64. Memory is the peak resident
set of a process of its own beyond what it held before, less the result, in units of the
activations; it is given on Linux, for layers whose activations take 4 MiB or more.

At the end the numbers of the cost model are fitted to the times of the offsets and of
the faster unfolded form: what reading and writing a number, and starting a product,
take in multiplications.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import parser, save, table
from matplotlib.figure import Figure
from torch import Tensor, nn

from ekfac import kernels
from ekfac.kernels import convolution
from ekfac.kernels.convolution import Convolution, Geometry, PatchGram, frame, plan
from ekfac.layers import find_adapter, find_shortcuts

Ways = dict[str, Callable[[Tensor], Tensor]]


def resnet18() -> list[dict[str, Any]]:
    """Return the distinct convolutions of ResNet-18 on 32 x 32 images."""
    found = [layer("stem", 3, 64, 32)]
    for stage, (width, size) in enumerate(((64, 32), (128, 16), (256, 8), (512, 4)), 1):
        if stage > 1:
            found.append(
                layer(f"{stage}, first", width // 2, width, 2 * size, stride=2)
            )
            short = {"kernel_size": 1, "stride": 2, "padding": 0}
            found.append(layer(f"{stage}, short", width // 2, width, 2 * size, **short))
        found.append(layer(f"{stage}, others", width, width, size))
    return found


def variants() -> list[dict[str, Any]]:
    """Return convolutions of other kinds."""
    return [
        layer("stride 2", 64, 64, 32, stride=2),
        layer("dilation 2", 64, 64, 32, dilation=2, padding=2),
        layer("4 groups", 64, 64, 32, groups=4),
        layer("depthwise", 64, 64, 32, groups=64),
        layer("5 x 5", 32, 64, 32, kernel_size=5, padding=2),
        layer("no padding", 64, 64, 32, padding=0),
    ]


def layer(
    name: str, c_in: int, c_out: int, size: int, **options: Any
) -> dict[str, Any]:
    """Return one case."""
    chosen = {"kernel_size": 3, "padding": 1, "bias": False, **options}
    return {"name": name, "channels": (c_in, c_out), "size": size, "options": chosen}


def geometry(case: dict[str, Any]) -> Geometry:
    """Return where the taps fall."""
    two = {k: (v, v) for k, v in case["options"].items() if k not in ("bias", "groups")}
    size, kernel, padding = (case["size"],) * 2, two["kernel_size"], two["padding"]
    stride, dilation = two.get("stride", (1, 1)), two.get("dilation", (1, 1))
    numbers = zip(size, kernel, stride, dilation, padding, strict=True)
    positions = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in numbers
    )
    groups = case["options"].get("groups", 1)
    conv = Convolution(kernel, stride, dilation, padding, positions, groups)
    return Geometry(size, conv)


def ways(case: dict[str, Any]) -> Ways:
    """Return the functions from an input to the factor ``[b, d, d]``."""
    module = nn.Conv2d(*case["channels"], **case["options"])
    kind = find_adapter(module)
    assert isinstance(kind, type)
    adapter, taps = kind(module), geometry(case)

    def one_product(x: Tensor) -> Tensor:
        return kernels.gram(adapter.inputs(x))

    def by_image(x: Tensor) -> Tensor:
        total = kernels.gram(adapter.inputs(x[:1]))
        for image in x[1:].split(1):
            total += kernels.gram(adapter.inputs(image))
        return total

    def offsets(x: Tensor) -> Tensor:
        return PatchGram.of(x, taps, ones=False).dense()

    def chosen(x: Tensor) -> Tensor:
        found = find_shortcuts(adapter).input_gram(x).gram()
        assert isinstance(found, Tensor | PatchGram)
        return found if isinstance(found, Tensor) else found.dense()

    return {
        "one product": one_product,
        "by image": by_image,
        "offsets": offsets,
        "chosen": chosen,
    }


def images(case: dict[str, Any], count: int) -> Tensor:
    """Return random inputs, as behind a ReLU."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, case["channels"][0], case["size"], case["size"])
    return torch.randn(shape, generator=generator).relu()


def timed(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return times and errors of all ways."""
    x, found = images(case, args.images), ways(case)
    seconds = dict.fromkeys(found, float("inf"))
    exact = found["one product"](x.double())
    errors = {}
    for name, way in found.items():
        result = way(x).double()
        errors[name] = float((result - exact).norm() / exact.norm())
    for _ in range(args.repeats):
        for name, way in found.items():
            start = time.process_time()
            way(x)
            seconds[name] = min(seconds[name], time.process_time() - start)
    return {"seconds": seconds, "errors": errors}


def resident(key: str) -> float:
    """Return the resident size now (``VmRSS``) or its peak (``VmHWM``), in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) / 2**10


def memory(case: dict[str, Any], name: str, args: argparse.Namespace) -> float:
    """Return what a way takes beyond its result, in units of the activations."""
    x = images(case, args.images)
    way = ways(case)[name]
    way(x[:1].clone())  # pays for first calls
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = resident("VmRSS")
    result = way(x)
    beyond = resident("VmHWM") - before
    beyond -= result.numel() * result.element_size() / 2**20
    return max(0.0, beyond) / (x.numel() * x.element_size() / 2**20)


def terms(case: dict[str, Any], images: int) -> tuple[list[float], list[float]]:
    """Return multiplications, numbers moved and starts, by offsets and of patches."""
    taps = geometry(case)
    channels = case["channels"][0] // taps.conv.groups
    each = taps.conv.groups * images
    pixels = frame(taps).multiplied * each
    width = channels * prod(taps.conv.kernel_size)
    rows = prod(taps.conv.positions) * each
    return (
        [pixels * channels**2, pixels * channels, len(plan(taps))],
        [rows * width**2, rows * width, 0],
    )


def fitted(rows: list[dict[str, Any]], images: int) -> dict[str, float]:
    """Return the cost model's numbers, by least squares of relative errors."""
    left = []
    for row in rows:
        offsets, patches = terms(row["case"], images)
        for counts, seconds in (
            (offsets, row["seconds"]["offsets"]),
            (patches, unfolded(row)),
        ):
            left.append([count / seconds for count in counts])
    A = torch.tensor(left, dtype=torch.float64)
    scale = A.norm(dim=0)
    ones = torch.ones(len(A), 1, dtype=torch.float64)
    one, moved, start = (
        torch.linalg.lstsq(A / scale, ones).solution[:, 0] / scale
    ).tolist()
    return {"TRANSFER": moved / one, "START": start / one, "GFLOP/s": 2e-9 / one}


def row_of(case: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return everything about one case."""
    context = multiprocessing.get_context("spawn")
    x = args.images * case["channels"][0] * case["size"] ** 2 * 4 / 2**20
    names = ("one product", "offsets", "chosen")
    found: dict[str, float | None] = dict.fromkeys(names)
    linux = Path("/proc/self/clear_refs").exists()
    for name in names[-1:] if args.quick else names:
        if linux and x >= (1 if args.quick else 4):
            with context.Pool(1) as pool:
                found[name] = pool.apply(memory, (case, name, args))
    pays = geometry(case).pays(case["channels"][0], args.images)
    return {"case": case, **timed(case, args), "memory": found, "chosen": pays}


def unfolded(row: dict[str, Any]) -> float:
    """Return the seconds of the faster form that unfolds patches."""
    return float(min(row["seconds"]["one product"], row["seconds"]["by image"]))


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the printed table."""
    seconds, case = row["seconds"], row["case"]
    unfold = unfolded(row)

    def units(name: str) -> str:
        value = row["memory"][name]
        return "-" if value is None else f"{value:.1f}"

    return {
        "layer": case["name"].replace(" ", "_"),
        "channels": case["channels"][0],
        "size": case["size"],
        "one product, ms": 1e3 * seconds["one product"],
        "by image, ms": 1e3 * seconds["by image"],
        "offsets, ms": 1e3 * seconds["offsets"],
        "ratio": seconds["offsets"] / unfold,
        "chosen": "offsets" if row["chosen"] else "patches",
        "its ratio": seconds["chosen"] / unfold,
        "error": row["errors"]["offsets"],
        "error of patches": row["errors"]["one product"],
        "memory of patches": units("one product"),
        "of offsets": units("offsets"),
        "of the choice": units("chosen"),
    }


def drawn(rows: list[dict[str, Any]]) -> Figure:
    """Return the times beside the faster unfolded form's."""
    figure, axis = plt.subplots(figsize=(8, 6), layout="constrained")
    names = [
        f"{r['layer'].replace('_', ' ')}\n{r['channels']} x {r['size']}²" for r in rows
    ]
    axis.barh(names, [r["ratio"] for r in rows], color="tab:blue", label="offsets")
    axis.plot([r["its ratio"] for r in rows], names, "k|", ms=14, mew=2, label="chosen")
    axis.axvline(1, color="black", lw=0.8)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=8)
    ticks = [0.1, 0.25, 0.5, 1, 2, 4, 8]
    axis.set(xscale="log", xlabel="time / time of the faster unfolded form")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend()
    return figure


def main() -> None:
    """Measure, print the table and the fit, save both with a figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--images", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=5)
    args = arguments.parse_args()
    cases = [*resnet18(), *variants()]
    if args.quick:
        args.images, args.repeats = 4, 1
        cases = [cases[0], variants()[2]]
    rows = []
    for case in cases:
        rows.append(row_of(case, args))
        print(shown(rows[-1]), flush=True)
    lines = [shown(row) for row in rows]
    print("\n" + table(lines))
    fit = fitted(rows, args.images)
    used = {"TRANSFER": convolution.TRANSFER, "START": convolution.START}
    print(
        "\ncost model, fitted:", {k: round(v, 1) for k, v in fit.items()}, "used:", used
    )
    results = {"images": args.images, "rows": rows, "fit": fit, "used": used}
    save(args.output, "correlation", results, drawn(lines))


if __name__ == "__main__":
    main()
