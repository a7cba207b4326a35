"""Faults seeded in the kernels' sources, which the checks at every access must see.

Each is one change of the text, such as a barrier left out or a bound that is one too
large. What is left as it is must pass the same checks.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from host_engine import HostEngine, KernelFault, compile_together

from ekfac.kernels.cuda import compiler, dispatch, kernel
from ekfac.kernels.cuda.compiler import FLOAT, TF32, Variant
from ekfac.kernels.cuda.diagonal import diagonal_variant
from ekfac.kernels.cuda.gram import gram_variant
from ekfac.kernels.cuda.jacobi import VARIANT as JACOBI
from ekfac.kernels.cuda.launch import plain_variant
from ekfac.kernels.cuda.scalings import scalings_variant

GRAM = gram_variant(FLOAT, 64, False, 2)
PATCHES = gram_variant(TF32, 64, True, 2)
SCALINGS = scalings_variant(FLOAT, 64, True, 2)
DIAGONAL = diagonal_variant(FLOAT, 2)
COUNTS, SQUARES, PRECONDITION = (
    plain_variant(source, 2) for source in ("counts", "squares", "precondition")
)
WHOLE = [GRAM, PATCHES, SCALINGS, DIAGONAL, COUNTS, SQUARES, PRECONDITION, JACOBI]


@dataclass(frozen=True)
class Fault:
    """One change of a source.

    Attributes:
        variant: In which it shows.
        file: Of ``csrc/``.
        old: Text that stands there once.
        new: What takes its place.
        words: Of the message.
    """

    variant: Variant
    file: str
    old: str
    new: str
    words: str

    def __str__(self) -> str:
        change = f"{self.file} {self.old.strip()[:30]}"
        return "".join(c if c.isalnum() else "-" for c in change)


BARRIER = "        __syncthreads();\n"
RACE, DIVERGED = "a race", "barrier|threads that do not come"
UNWRITTEN, OUTSIDE = "nobody wrote", "nothing is|between the elements|beyond the end"
FAULTS = [
    # Barriers left out, and where not all threads come.
    Fault(
        GRAM,
        "gram.cu",
        "    __syncthreads();\n    fetch(left",
        "    fetch(left",
        f"{UNWRITTEN}|{RACE}",
    ),
    Fault(GRAM, "gram.cu", BARRIER, "", f"{UNWRITTEN}|{RACE}"),
    Fault(SCALINGS, "scalings.cu", BARRIER, "", f"{UNWRITTEN}|{RACE}"),
    Fault(
        DIAGONAL,
        "diagonal.cu",
        "            __syncthreads();\n",
        "",
        f"{UNWRITTEN}|{RACE}",
    ),
    Fault(
        SQUARES,
        "common.cuh",
        "        __syncthreads();\n        if (threadIdx.x < half)",
        "        if (threadIdx.x < half)",
        f"{UNWRITTEN}|{RACE}",
    ),
    Fault(
        JACOBI,
        "jacobi.cu",
        "            __syncthreads();\n            for (int e = threadIdx.x; e < pair",
        "            for (int e = threadIdx.x; e < pair",
        f"{UNWRITTEN}|{RACE}",
    ),
    Fault(
        DIAGONAL,
        "diagonal.cu",
        "            __syncthreads();\n",
        "            if (threadIdx.x < 200) __syncthreads();\n",
        DIVERGED,
    ),
    Fault(
        PRECONDITION,
        "precondition.cu",
        "    int item = blockIdx.x;\n",
        "    int item = blockIdx.x;\n    if (threadIdx.x == 3) return;\n",
        DIVERGED,
    ),
    Fault(
        SQUARES,
        "squares.cu",
        "    int item = blockIdx.x;\n",
        "    int item = blockIdx.x;\n"
        "    if (threadIdx.x % 2)\n        __syncthreads();\n    else\n"
        "        __syncthreads();\n",
        DIVERGED,
    ),
    # Bounds of buffers.
    Fault(GRAM, "gram.cu", "r > c || c >= d", "r > c || c > d", f"{OUTSIDE}|{RACE}"),
    Fault(
        SCALINGS,
        "scalings.cu",
        "c >= q.a.features",
        "c > q.a.features",
        f"{OUTSIDE}|{RACE}",
    ),
    Fault(
        SQUARES,
        "squares.cu",
        "if (end > q.elements) end = q.elements;",
        "",
        OUTSIDE,
    ),
    Fault(
        COUNTS,
        "counts.cu",
        "value < 0 || value >= q.size",
        "value < 0",
        f"{OUTSIDE}|{RACE}",
    ),
    Fault(
        DIAGONAL,
        "diagonal.cu",
        "if (f >= q.features) return weight;",
        "if (f > q.features) return weight;",
        OUTSIDE,
    ),
    Fault(
        PATCHES,
        "tiles.cuh",
        "    if (!inside(q, r, f)) return 0;\n",
        "",
        OUTSIDE,
    ),
    Fault(
        PRECONDITION,
        "precondition.cu",
        "p.sums[2 * blockIdx.x + 1] = norm;",
        "p.sums[2 * blockIdx.x + 2] = norm;",
        f"{OUTSIDE}|{RACE}",
    ),
    # Bounds of shared memory.
    Fault(
        GRAM,
        "gram.cu",
        "for (int f = threadIdx.x; f < TILE; ",
        "for (int f = threadIdx.x; f < TILE + ROWS * 4 + 1; ",
        f"{OUTSIDE}|{RACE}",
    ),
    Fault(
        JACOBI,
        "jacobi.cu",
        "float* v = a + n * pitch;",
        "float* v = a + 2 * n * pitch;",
        OUTSIDE,
    ),
    # What has no value.
    Fault(
        JACOBI,
        "jacobi.cu",
        "        v[r * pitch + c] = r == c ? 1.0f : 0.0f;\n",
        "        if (r == c) v[r * pitch + c] = 1.0f;\n",
        UNWRITTEN,
    ),
    Fault(
        GRAM,
        "tiles.cuh",
        "    r.weight = weight;\n",
        "",
        UNWRITTEN,
    ),
    # Blocks, and words that do not start where they should.
    Fault(
        SQUARES,
        "squares.cu",
        "p.parts[item] = sum;",
        "p.parts[0] = sum;",
        "race between blocks",
    ),
    Fault(
        GRAM,
        "tiles.cuh",
        "constexpr int PITCH = TILE + 8;",
        "constexpr int PITCH = TILE + 7;",
        "not aligned",
    ),
]


@pytest.mark.parametrize("variant", WHOLE, ids=str)
def test_kernels_as_they_are_pass_every_check(variant: Variant) -> None:
    limit = dict(variant.defines).get("PROBLEMS", 1)
    engine = HostEngine(3, problems=limit, checked=True)
    engine.load(variant)
    assert dispatch.error_of(engine, variant) <= kernel.tolerance(variant)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_seeded_faults_are_seen(tmp_path: Path, fault: Fault) -> None:
    folder = tmp_path / "csrc"
    shutil.copytree(compiler.source_folder(), folder)
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.old) >= 1, "the source has changed: change the fault too"
    path.write_text(text.replace(fault.old, fault.new, 1), encoding="utf-8")
    limit = dict(fault.variant.defines).get("PROBLEMS", 1)
    engine = HostEngine(3, problems=limit, folder=folder, checked=True)
    compile_together([fault.variant], folder, checked=True)
    with pytest.raises(KernelFault, match=fault.words):
        dispatch.error_of(engine, fault.variant)
