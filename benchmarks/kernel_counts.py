"""Static counts of the tiled CUDA kernels, step by step, and the roofline of an H200.

No device is needed. The kernels' own text runs on the CPU as in the tests, where every
access of every lane is seen: from the addresses follow the wavefronts of shared memory
and the sectors of global memory that a step of a tile takes (the difference between
two lengths of the sum, over the steps between them; parameters are constant memory and
not counted). Instructions are those of the loop in the machine code for sm_90, with all
of its branches, if nvcc and nvdisasm (``nvidia-cuda-nvdisasm``) are there.

What bounds a step is the longer of two times: products at the device's rate, and
wavefronts at one a cycle. Neither was measured, and latency is in neither. Instructions
are not in the bound: a warp takes some of the branches only.

    python benchmarks/kernel_counts.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import table

from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, TF32, Variant
from ekfac.kernels.cuda.gram import Geometry, Gram, gram_launches, gram_variant
from ekfac.kernels.cuda.launch import Launch, execute
from ekfac.kernels.cuda.precondition import Preconditioned, plan_precondition
from ekfac.kernels.cuda.scalings import Scalings, scalings_launches, scalings_variant
from ekfac.kernels.cuda.squares import Squares, plan_squares

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
    """What one step of one tile off the diagonal takes.

    Attributes:
        variant: Which kernel.
        depth: Rows of a step.
        threads: Of a block.
        reads: Wavefronts of reads in shared memory.
        writes: And of writes.
        sectors: Of 32 bytes, read from global memory.
        instructions: Of a warp, in all branches; ``None`` where nobody can say.
    """

    variant: Variant
    depth: int
    threads: int
    reads: float
    writes: float
    sectors: float
    instructions: int | None

    @property
    def products(self) -> float:
        """Cycles of the products at the device's rate."""
        kind = dict(self.variant.defines)["INPUT"]
        return TILE * TILE * self.depth / RATES[kind]

    @property
    def shared(self) -> float:
        """Cycles of shared memory."""
        return self.reads + self.writes

    @property
    def bound(self) -> float:
        """Cycles of what takes longer."""
        return max(self.products, self.shared)


def per_step(run: Callable[[HostEngine, int], list[Launch]], variant: Variant) -> Step:
    """Return the counts of a step, from runs of two lengths."""
    found = []
    geometry = Geometry.of(variant)
    for steps in (BASE, BASE + MORE):
        engine = HostEngine(1, problems=2, counted=True)
        execute(engine, run(engine, steps))
        found.append(engine.counts(variant)[1])  # the second tile is off the diagonal
    reads, writes, sectors, _, _ = ((b - a) / MORE for a, b in zip(*found, strict=True))
    count = loop_instructions(variant)
    sizes = geometry.depth, geometry.threads
    return Step(variant, *sizes, reads, writes, sectors, count)


def gram_step(kind: int, *, pipeline: bool) -> Step:
    """Return the counts of a Gram matrix of plain aligned rows."""
    variant = gram_variant(kind, TILE, False, 2, pipeline=pipeline)
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float32

    def run(engine: HostEngine, steps: int) -> list[Launch]:
        rows = torch.randn(steps * Geometry.of(variant).depth, 1, 1, 2 * TILE)
        gram = Gram(torch.empty(1, 2 * TILE, 2 * TILE), rows.to(dtype))
        return gram_launches(engine, variant, TILE, [gram])

    return per_step(run, variant)


def scalings_step(kind: int, *, square: bool) -> Step:
    """Return the counts of per-example scalings, with one position or with many."""
    variant = scalings_variant(kind, TILE, square, 2)

    def run(engine: HostEngine, steps: int) -> list[Launch]:
        shape = (16 * steps, 1) if square else (1, 16 * steps)
        g, a = torch.randn(*shape, 1, TILE), torch.randn(*shape, 1, 2 * TILE)
        layer = Scalings(torch.empty(1, TILE, 2 * TILE), g, a)
        return scalings_launches(engine, variant, TILE, [layer])

    return per_step(run, variant)


def disassembly(variant: Variant) -> str | None:
    """Return a variant's machine code for sm_90 as text, or ``None`` without tools."""
    bundled = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/nvdisasm")
    program = shutil.which("nvdisasm") or next(map(str, bundled), None)
    nvcc = shutil.which("nvcc")
    if program is None or nvcc is None:
        return None
    source = compiler.source_folder() / f"{variant.source}.cu"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "code.cubin")
        command = [nvcc, "-std=c++17", "-arch=sm_90", "-cubin", *variant.flags()]
        subprocess.run([*command, "-o", cubin, str(source)], check=True)
        result = subprocess.run(
            [program, "-c", cubin], check=True, capture_output=True, text=True
        )
    return result.stdout


def loop_instructions(variant: Variant) -> int | None:
    """Return how many instructions the loop over the steps has, or ``None``.

    Of all loops it has the most products, and of those it is the smallest.
    """
    text = disassembly(variant)
    if text is None:
        return None
    code = text.split(f".text.{variant.source}:", 1)[1].split(".section", 1)[0]
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(instructions)
        elif word := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(word.group(1))
    products = [bool(re.search(r"\b(HMMA|FFMA)", one)) for one in instructions]
    loops = []
    for end, one in enumerate(instructions):
        target = re.search(r"BRA.*\((\.L_x_\d+)\)", one)
        start = labels.get(target.group(1), end) if target else end
        if start < end and any(products[start:end]):
            loops.append((-sum(products[start:end]), end + 1 - start))
    return min(loops)[1] if loops else None


def steps_table(steps: Sequence[Step]) -> str:
    """Return the table of steps."""
    return table(
        [
            {
                "step of a tile": str(one.variant),
                "products": f"{one.products:.0f}",
                "shared": f"{one.reads:.0f} + {one.writes:.0f}",
                "instructions": str(one.instructions or "-"),
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
        scalings_step(kind, square=square)
        for kind in (FLOAT, TF32)
        for square in (False, True)
    ]
    print("Cycles of a multiprocessor for one step of a tile of 128 x 128.\n")
    print(steps_table([*grams, *scalings]))
    print("\nGram matrices of 16384 rows, microseconds on an H200, not measured.\n")
    widths = (256, 768, 1024, 4096)
    print(table([layer_row(one, d, 16384) for d in widths for one in grams]))
    print()
    print(table([pass_row(name) for name in ("precondition", "squares")]))


if __name__ == "__main__":
    main()
