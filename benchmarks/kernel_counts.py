"""Static counts of the tiled CUDA kernels, step by step, and the roofline of an H200.

No device is needed. The kernels' own text runs on the CPU as in the tests, where every
access of every lane is seen: from the addresses follow the wavefronts of shared memory
and the sectors of global memory that a step of a tile takes (the difference between
two lengths of the sum, over the steps between them; parameters are constant memory and
not counted). Instructions are those of the shortest way through a pipeline's loop in
the machine code for sm_90 that does all products and copies (:mod:`kernel_issue`), if
nvcc and nvdisasm (``nvidia-cuda-nvdisasm``) are there.

What bounds a step is the longest of three times: products at the device's rate,
wavefronts at one a cycle, and instructions at one a cycle and scheduler. None was
measured, and latency is in none.

    python benchmarks/kernel_counts.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import bar, table
from kernel_issue import issue_cycles

from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, HALF, TF32, Variant
from ekfac.kernels.cuda.gram import Gram, gram_launches, gram_variant
from ekfac.kernels.cuda.launch import Launch, execute
from ekfac.kernels.cuda.precondition import Preconditioned, plan_precondition
from ekfac.kernels.cuda.scalings import (
    WAYS,
    Scalings,
    scalings_launches,
    scalings_variant,
)
from ekfac.kernels.cuda.squares import Squares, plan_squares
from ekfac.kernels.cuda.tiles import Geometry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from host_engine import HostEngine

# NVIDIA H200 SXM, data sheet: dense rates at the boost clock, and memory.
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.83e9, 4.8e12
# Multiplications and additions of a multiprocessor in a cycle.
RATES = {FLOAT: 128, TF32: 1024, BFLOAT16: 2048}
TILE = 128
BASE, MORE = 8, 4  # steps of the two sums: the pipeline is full


@dataclass(frozen=True)
class Step:
    """What one step of one tile takes.

    Attributes:
        variant: Which kernel.
        depth: Rows of a step.
        threads: Of a block.
        reads: Wavefronts of reads in shared memory.
        writes: And of writes.
        sectors: Of 32 bytes, read from global memory.
        issue: Cycles in which its instructions are issued; ``None`` where nobody can
            say.
        diagonal: Whether the tile is on the diagonal, of which a pipeline multiplies
            three quarters.
    """

    variant: Variant
    depth: int
    threads: int
    reads: float
    writes: float
    sectors: float
    issue: float | None
    diagonal: bool = False

    @property
    def products(self) -> float:
        """Cycles of the products at the device's rate."""
        kind = dict(self.variant.defines)["INPUT"]
        return TILE * TILE * self.depth / RATES[kind] * (0.75 if self.diagonal else 1)

    @property
    def shared(self) -> float:
        """Cycles of shared memory."""
        return self.reads + self.writes

    @property
    def bound(self) -> float:
        """Cycles of what takes longer."""
        return max(self.products, self.shared, self.issue or 0.0)


def per_step(
    run: Callable[[HostEngine, int], list[Launch]],
    variant: Variant,
    *,
    diagonal: bool = False,
) -> Step:
    """Return the counts of a step, from runs of two lengths, the second tile's."""
    found = []
    geometry = Geometry.of(variant)
    for steps in (BASE, BASE + MORE):
        engine = HostEngine(1, problems=2, counted=True)
        execute(engine, run(engine, steps))
        found.append(engine.counts(variant)[0 if diagonal else 1])
    reads, writes, sectors, _, _ = ((b - a) / MORE for a, b in zip(*found, strict=True))
    sizes = geometry.depth, geometry.threads
    issue = None if diagonal else issue_cycles(variant, geometry.threads)
    return Step(variant, *sizes, reads, writes, sectors, issue, diagonal)


def gram_step(kind: int, *, pipeline: bool, diagonal: bool = False) -> Step:
    """Return the counts of a Gram matrix of plain aligned rows, of its second tile.

    Args:
        kind: How elements are multiplied.
        pipeline: Which variant.
        diagonal: Of the first tile.
    """
    variant = gram_variant(kind, TILE, False, 2, pipeline=pipeline)
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32

    def run(engine: HostEngine, steps: int) -> list[Launch]:
        rows = torch.randn(steps * Geometry.of(variant).depth, 1, 1, 2 * TILE)
        gram = Gram(torch.empty(1, 2 * TILE, 2 * TILE), rows.to(dtype))
        return gram_launches(engine, variant, TILE, [gram])

    return per_step(run, variant, diagonal=diagonal)


def scalings_step(kind: int, *, square: bool, pipeline: bool) -> Step:
    """Return the counts of per-example scalings, with one position or with many."""
    variant = scalings_variant(kind, TILE, square, 2, pipeline=pipeline)
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32

    def run(engine: HostEngine, steps: int) -> list[Launch]:
        rows = steps * Geometry.of(variant).depth
        shape = (rows, 1) if square else (1, rows)
        g, a = torch.randn(*shape, 1, TILE), torch.randn(*shape, 1, 2 * TILE)
        layer = Scalings(torch.empty(1, TILE, 2 * TILE), g.to(dtype), a.to(dtype))
        return scalings_launches(engine, variant, TILE, [layer])

    return per_step(run, variant)


def steps_table(steps: Sequence[Step]) -> str:
    """Return the table of steps."""
    return table(
        [
            {
                "step of a tile": f"{one.variant}{', diagonal' * one.diagonal}",
                "products": f"{one.products:.0f}",
                "shared": f"{one.reads:.0f} + {one.writes:.0f}",
                "issue": "-" if one.issue is None else f"{one.issue:.0f}",
                "KiB": f"{32 * one.sectors / 1024:.1f}",
                "of the peak": f"{one.products / one.bound:.0%}",
            }
            for one in steps
        ]
    )


def layer_row(one: Step, width: int, rows: int) -> dict[str, str]:
    """Return what bounds the Gram matrix of a layer, in microseconds."""
    kind = dict(one.variant.defines)["INPUT"]
    size = 2 if kind == BFLOAT16 else 4
    along = -(-width // TILE)
    steps = along * (along + 1) / 2 * -(-rows // one.depth) / MULTIPROCESSORS / CLOCK
    memory = (rows * width * size + width * width * 4) / BANDWIDTH
    whole = rows * width**2 / (RATES[kind] * MULTIPROCESSORS * CLOCK)
    times = {
        "whole product": whole,
        "upper half": steps * one.products,
        "memory": memory,
        "bound": max(steps * one.bound, memory),
    }
    words = {"width": str(width), "kernel": str(one.variant)}
    return {**words, **{name: f"{1e6 * t:.1f}" for name, t in times.items()}}


def pass_row(name: str) -> dict[str, str]:
    """Return the bytes that an element-wise kernel takes for an element."""
    engine, shape = HostEngine(1, problems=2, counted=True), (1, 128, 256)
    u, s = torch.randn(shape), torch.rand(shape) + 0.1
    if name == "precondition":
        layers = [Preconditioned(u, s, torch.tensor(0.1))]
        launches = plan_precondition(engine, layers, torch.empty(1, 2), -1.0)
    else:
        averages = [Squares(s, u, torch.tensor([0.9, 0.1]))]
        launches = plan_squares(engine, averages, torch.empty(1))
    execute(engine, launches)
    counted = engine.counts(launches[0].variant)
    each = 32 * sum(block[2] + block[3] for block in counted) / u.numel()
    return {
        "pass": name,
        "bytes an element": f"{each:.2f}",
        "us for 10^8 elements": f"{each * 1e8 / BANDWIDTH * 1e6:.0f}",
    }


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    grams = [
        gram_step(FLOAT, pipeline=False),
        gram_step(TF32, pipeline=False),
        gram_step(TF32, pipeline=True),
        gram_step(BFLOAT16, pipeline=False),
        gram_step(BFLOAT16, pipeline=True),
    ]
    scalings = [
        scalings_step(kind, square=square, pipeline=pipeline)
        for kind, square, pipeline in bar(WAYS, "scalings")
        if kind != HALF
    ]
    print("Cycles of a multiprocessor for one step of a tile of 128 x 128.\n")
    diagonals = [
        gram_step(kind, pipeline=True, diagonal=True) for kind in (TF32, BFLOAT16)
    ]
    print(steps_table([*grams, *diagonals, *scalings]))
    print("\nGram matrices of 16384 rows, microseconds on an H200, not measured.\n")
    widths = (256, 768, 1024, 4096)
    print(table([layer_row(one, d, 16384) for d in widths for one in grams]))
    print()
    print(table([pass_row(name) for name in ("precondition", "squares")]))


if __name__ == "__main__":
    main()
