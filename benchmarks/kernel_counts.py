"""Static counts of the tiled CUDA kernels, step by step, and the roofline of an H200.

No device is needed. The kernels' own text runs on the CPU as in the tests, where every
access of every lane is seen: from the addresses follow the wavefronts of shared memory
and the sectors of global memory that a step of a tile takes (the difference between
two lengths of the sum, over the steps between them; parameters are constant memory and
not counted). Instructions are those of the shortest way through a pipeline's loop in
the machine code for sm_90 that does all products and copies (:mod:`kernel_issue`), if
nvcc and nvdisasm (``nvidia-cuda-nvdisasm``) are there.

What bounds a step is the longest of three times: products at the rate of their
instruction, wavefronts at one a cycle, and instructions at one a cycle and scheduler.
Loads into registers pass the first-level cache, which is the same memory as shared
memory: they are wavefronts too, of 128 bytes each. None was measured, and latency is in
none. ``mma.sync`` does not reach the peak of Hopper's tensor cores, which only products
of warpgroups do: 62.9 % of it on average (Luo et al. 2024, arXiv 2402.13499, and 2025,
arXiv 2501.12084, on an H800).

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
from ekfac.kernels.cuda.tiles import WARPGROUP_TILE, Geometry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from host_engine import HostEngine

# NVIDIA H200 SXM, data sheet: dense rates at the boost clock, and memory.
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.83e9, 4.8e12
# Multiplications and additions of a multiprocessor in a cycle; of an A100 half of them.
RATES = {FLOAT: 128, TF32: 1024, BFLOAT16: 2048}
# Of the tensor cores' peak, what mma.sync reaches on Hopper.
MMA_SYNC = 0.629
TILE = 128
BASE, MORE = 8, 4  # steps of the two sums: the pipeline is full


@dataclass(frozen=True)
class Step:
    """What one step of one tile takes.

    Attributes:
        variant: Which kernel.
        tile: Rows and columns of a tile.
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
    tile: int
    depth: int
    threads: int
    reads: float
    writes: float
    sectors: float
    issue: float | None
    diagonal: bool = False

    @property
    def kind(self) -> int:
        """How elements are multiplied."""
        return dict(self.variant.defines)["INPUT"]

    @property
    def products(self) -> float:
        """Cycles of the products at the device's peak rate."""
        part = 0.75 if self.diagonal and not self.variant.warpgroups else 1
        return self.tile**2 * self.depth / RATES[self.kind] * part

    @property
    def multiplied(self) -> float:
        """Cycles of the products at the rate of their instruction."""
        peak = self.kind == FLOAT or self.variant.warpgroups
        return self.products if peak else self.products / MMA_SYNC

    @property
    def shared(self) -> float:
        """Cycles of shared memory."""
        return self.reads + self.writes

    @property
    def loads(self) -> float:
        """Wavefronts of loads into registers: of both operands, of one, or of none."""
        defines = dict(self.variant.defines)
        if not defines.get("PIPELINE"):
            part = 1.0
        elif not self.variant.warpgroups:
            part = 0.0
        elif self.kind == TF32:
            part = 1.0
        else:
            part = 0.5 * (self.variant.source == "scalings")
        return part * self.sectors * 32 / 128

    @property
    def bound(self) -> float:
        """Cycles of what takes longer."""
        memory = self.shared + self.loads
        return max(self.multiplied, memory, self.issue or 0.0)

    @property
    def on_a100(self) -> float | None:
        """Cycles of the products on an A100, where mma.sync reaches the peak."""
        return None if self.variant.warpgroups else 2 * self.products


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
    sizes = geometry.tile, geometry.depth, geometry.threads
    issue = None if diagonal else issue_cycles(variant, geometry.threads)
    return Step(variant, *sizes, reads, writes, sectors, issue, diagonal)


def gram_step(
    kind: int, *, pipeline: bool, warpgroups: bool = False, diagonal: bool = False
) -> Step:
    """Return the counts of a Gram matrix of plain aligned rows, of its second tile.

    Args:
        kind: How elements are multiplied.
        pipeline: Which variant.
        warpgroups: Multiplied by whole warpgroups.
        diagonal: Of the first tile.
    """
    tile = WARPGROUP_TILE if warpgroups else TILE
    ways = {"pipeline": pipeline, "warpgroups": warpgroups}
    variant = gram_variant(kind, tile, False, 2, **ways)
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32

    def run(engine: HostEngine, steps: int) -> list[Launch]:
        rows = torch.randn(steps * Geometry.of(variant).depth, 1, 1, 2 * tile)
        gram = Gram(torch.empty(1, 2 * tile, 2 * tile), rows.to(dtype))
        return gram_launches(engine, variant, tile, [gram])

    return per_step(run, variant, diagonal=diagonal)


def scalings_step(
    kind: int, *, square: bool, pipeline: bool, warpgroups: bool = False
) -> Step:
    """Return the counts of per-example scalings, with one position or with many."""
    ways = {"pipeline": pipeline, "warpgroups": warpgroups}
    variant = scalings_variant(kind, TILE, square, 2, **ways)
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
                "as issued": f"{one.multiplied:.0f}",
                "A100": "-" if one.on_a100 is None else f"{one.on_a100:.0f}",
                "shared": f"{one.reads:.0f} + {one.writes:.0f}",
                "loads": f"{one.loads:.0f}",
                "issue": "-" if one.issue is None else f"{one.issue:.0f}",
                "KiB": f"{32 * one.sectors / 1024:.1f}",
                "of the peak": f"{one.products / one.bound:.0%}",
            }
            for one in steps
        ]
    )


def layer_row(one: Step, diagonal: Step, width: int, rows: int) -> dict[str, str]:
    """Return what bounds the Gram matrix of a layer, in microseconds.

    Args:
        one: Counts of a tile off the diagonal.
        diagonal: And of one on it.
        width: Of the matrix.
        rows: Of the sum.
    """
    size = 2 if one.kind == BFLOAT16 else 4
    along = -(-width // one.tile)
    steps = -(-rows // one.depth) / MULTIPROCESSORS / CLOCK
    off = along * (along - 1) / 2
    memory = (rows * width * size + width * width * 4) / BANDWIDTH
    peak = RATES[one.kind] * MULTIPROCESSORS * CLOCK
    bound = steps * (off * one.bound + along * diagonal.bound)
    times = {
        "whole product": rows * width**2 / peak,
        "upper half": rows * width * (width + 1) / 2 / peak,
        "memory": memory,
        "bound": max(bound, memory),
    }
    shared = off * one.shared + along * diagonal.shared
    wanted = off * one.multiplied + along * diagonal.multiplied
    words = {"width": str(width), "kernel": str(one.variant)}
    table_row = {**words, **{name: f"{1e6 * t:.1f}" for name, t in times.items()}}
    return {**table_row, "shared of products": f"{shared / wanted:.2f}"}


def example_row(one: Step) -> dict[str, str]:
    """Return the products' share of the time that examples take, by their positions.

    An example's sums are squared by fused multiply-adds, of products of warpgroups one
    half while the other half is multiplied.
    """
    squares = one.tile**2 / RATES[FLOAT] / (2 if one.variant.warpgroups else 1)
    shares = {}
    for positions in (16, 64, 256, 1024):
        steps = -(-positions // one.depth)
        products = positions * one.tile**2 / RATES[one.kind]
        share = products / (steps * one.bound + squares)
        shares[f"{positions} positions"] = f"{share:.0%}"
    return {"step of a tile": str(one.variant), "squares": f"{squares:.0f}", **shares}


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
    ways: list[tuple[int, dict[str, bool]]] = [
        (FLOAT, {"pipeline": False}),
        (TF32, {"pipeline": False}),
        (TF32, {"pipeline": True}),
        (TF32, {"pipeline": True, "warpgroups": True}),
        (BFLOAT16, {"pipeline": False}),
        (BFLOAT16, {"pipeline": True}),
        (BFLOAT16, {"pipeline": True, "warpgroups": True}),
    ]
    grams = [gram_step(kind, **way) for kind, way in ways]
    # Without a pipeline a tile on the diagonal is as any other.
    diagonals = [
        gram_step(kind, diagonal=True, **way) if way["pipeline"] else gram
        for (kind, way), gram in zip(ways, grams, strict=True)
    ]
    pairs_of = [
        scalings_step(kind, square=square, pipeline=pipeline, warpgroups=warpgroups)
        for kind, square, pipeline in bar(WAYS, "scalings")
        for warpgroups in ((False, True) if pipeline else (False,))
        if kind != HALF
    ]
    print("Cycles of a multiprocessor for one step of a tile.\n")
    print(steps_table([*grams, *(one for one in diagonals if one.diagonal), *pairs_of]))
    print("\nOf the peak, with an example's squares, in cycles, by its positions.\n")
    several = [one for one in pairs_of if not dict(one.variant.defines)["SQUARE"]]
    print(table([example_row(one) for one in several]))
    print("\nGram matrices of 16384 rows, microseconds on an H200, not measured.\n")
    widths = (256, 768, 1024, 4096)
    pairs = list(zip(grams, diagonals, strict=True))
    print(table([layer_row(*pair, d, 16384) for d in widths for pair in pairs]))
    print()
    print(table([pass_row(name) for name in ("precondition", "squares")]))


if __name__ == "__main__":
    main()
