"""Faults seeded in the kernels' sources, which the checks at every access must see.

Each is one change of the text, such as a barrier left out or a bound that is one too
large. What is left as it is must pass the same checks.
"""

from __future__ import annotations

import math
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from host_engine import HostEngine, KernelFault, compile_together
from torch import Tensor

from ekfac.kernels.cuda import compiler, dispatch, kernel, tiles
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, HALF, TF32, Variant
from ekfac.kernels.cuda.diagonal import diagonal_variant
from ekfac.kernels.cuda.gram import Gram, gram_launches, gram_variant
from ekfac.kernels.cuda.jacobi import VARIANT as JACOBI
from ekfac.kernels.cuda.launch import Launch, execute, plain_variant
from ekfac.kernels.cuda.scalings import scalings_variant
from ekfac.kernels.cuda.spectral import spectral_variant
from ekfac.kernels.cuda.tiles import SLICES

GRAM = gram_variant(FLOAT, 64, False, 2)
PATCHES = gram_variant(TF32, 64, True, 2)
PIPELINE = gram_variant(TF32, 64, False, 2, pipeline=True)
HALF_ROWS = gram_variant(HALF, 64, False, 2, pipeline=True)
PIPELINE_HALF = gram_variant(BFLOAT16, 64, True, 2, pipeline=True)
WARPGROUP = gram_variant(BFLOAT16, 192, False, 2, pipeline=True, warpgroups=True)
WORDS, WORD_PATCHES = (
    gram_variant(TF32, 192, patches, 2, pipeline=True, warpgroups=True)
    for patches in (False, True)
)
SCALINGS = scalings_variant(FLOAT, 64, True, 2)
SCALINGS_PIPELINE = scalings_variant(TF32, 64, True, 2, pipeline=True)
SCALINGS_HALF = scalings_variant(BFLOAT16, 64, False, 2, pipeline=True)
PAIR_WORDS, PAIR_SQUARES, PAIR_HALVES = (
    scalings_variant(kind, 128, square, 2, pipeline=True, warpgroups=True)
    for kind, square in ((TF32, False), (TF32, True), (BFLOAT16, False))
)
PAIRS = (PAIR_WORDS, PAIR_SQUARES, PAIR_HALVES)
DIAGONAL = diagonal_variant(FLOAT, 2)
SPECTRAL = spectral_variant(32, 2)
COUNTS, SQUARES, PRECONDITION = (
    plain_variant(source, 2) for source in ("counts", "squares", "precondition")
)
WHOLE = [
    GRAM,
    PATCHES,
    PIPELINE,
    PIPELINE_HALF,
    SCALINGS,
    SCALINGS_PIPELINE,
    SCALINGS_HALF,
    DIAGONAL,
    COUNTS,
    SQUARES,
    PRECONDITION,
    SPECTRAL,
    JACOBI,
]


@dataclass(frozen=True)
class Fault:
    """One change of a source.

    Attributes:
        variant: In which it shows.
        file: Of ``csrc/``.
        old: Text that stands there once.
        new: What takes its place.
        words: Of the message, or ``WRONG`` where only the result shows it.
    """

    variant: Variant
    file: str
    old: str
    new: str
    words: str

    def __str__(self) -> str:
        change = f"{self.file} {self.old.strip()[:30]}"
        return "".join(c if c.isalnum() else "-" for c in change)


DEVICE = 132  # multiprocessors: sums are split as on a large device
WRONG = "a wrong result"
BARRIER = "        __syncthreads();\n"
RACE, DIVERGED = "a race", "barrier|threads that do not come"
COMING = "still on its way|nobody wrote"
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
    Fault(
        GRAM,
        "gram.cu",
        "        __syncthreads();\n        if (step + 1 < end) {",
        "        if (step + 1 < end) {",
        f"{UNWRITTEN}|{RACE}",
    ),
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
    Fault(GRAM, "gram.cu", "r <= c && c < d", "r <= c && c <= d", f"{OUTSIDE}|{RACE}"),
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
        "common.cuh",
        "q.sums[i] = sum;",
        "q.sums[i + 1] = sum;",
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
        "operands.cuh",
        "    r.weight = weight;\n",
        "",
        f"{UNWRITTEN}|{WRONG}",
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
    # Copies on their way.
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "wait_for_copies<STAGES - 2>();",
        "wait_for_copies<STAGES - 1>();",
        COMING,
    ),
    Fault(
        PIPELINE_HALF, "pipeline.cuh", "wait_for_copies<STAGES - 2>();\n", "", COMING
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "wait_for_copies<STAGES - 2>();\n        __syncthreads();\n",
        "wait_for_copies<STAGES - 2>();\n",
        f"{COMING}|{RACE}",
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "int ahead = step + STAGES - 1;",
        "int ahead = step + STAGES;",
        f"{COMING}|{RACE}",
    ),
    Fault(
        SCALINGS_PIPELINE,
        "pipeline.cuh",
        "        commit_copies();\n        rows(ahead + 1);",
        "        rows(ahead + 1);",
        COMING,
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "if (ahead < steps) copy(ahead);",
        "if (ahead < steps + 1) copy(ahead);",
        "copies on their way",
    ),
    Fault(PIPELINE, "pipeline.cuh", "rows(ahead + 1);", "rows(ahead + RING);", RACE),
    Fault(
        SCALINGS_PIPELINE,
        "pipeline.cuh",
        "    for (int s = 0; s < STAGES; s++) rows(s);\n    __syncthreads();\n",
        "    for (int s = 0; s < STAGES; s++) rows(s);\n",
        f"{UNWRITTEN}|{RACE}",
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "WARPGROUP ? 6 : 4;",
        "WARPGROUP ? 6 : 5;",
        OUTSIDE,
    ),
    Fault(
        PIPELINE,
        "operands.cuh",
        "thread < first ? ROWS : thread - first",
        "thread - first",
        f"{OUTSIDE}|{RACE}",
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "c.bytes = left <= 0 ? 0 : left >= CHUNK ? 16",
        "c.bytes = left <= 0 ? 0 : left >= 1 ? 16",
        OUTSIDE,
    ),
    Fault(
        SCALINGS_PIPELINE,
        "pipeline.cuh",
        "left.column.bytes % 16 || right.column.bytes % 16",
        "left.column.bytes % 16",
        OUTSIDE,
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "PATCHES ? inside(q, row, c.first)",
        "PATCHES ? row.at[0] > FAR",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "c.from + (i64)row.base * 16;",
        "c.from + (i64)row.base * 16 + 4;",
        "not aligned",
    ),
    # Warps, and whose element is whose.
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "    for (int n = 0; n < N; n += 2)\n        load_matrices",
        "    for (int n = threadIdx.x == 3 ? N : 0; n < N; n += 2)\n"
        "        load_matrices",
        "rest of its warp|do not come",
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "row = lane / 16 * 8 + lane % 8;",
        "row = lane / 8 % 2 * 8 + lane % 8;",
        WRONG,
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "rows.weight[row + threadIdx.x % 4]",
        "rows.weight[threadIdx.x % 4]",
        WRONG,
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "+ (threadIdx.x % 4 * 2 + odd) * 2 + n % 2;",
        "+ (threadIdx.x % 4 * 2 + odd) * 2 + 1 - n % 2;",
        WRONG,
    ),
    Fault(
        SCALINGS_PIPELINE,
        "pipeline.cuh",
        "+ lane / 4 % 2 * 8;",
        "+ lane / 4 % 2 * 4;",
        "not aligned",
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "half ? places.left[m] : places",
        "!half ? places.left[m] : places",
        WRONG,
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "column.to + i * APART * ROW_PITCH, q,",
        "column.to + i * THREADS + 1, q,",
        f"{OUTSIDE}|{RACE}|{COMING}|{WRONG}",
    ),
    # Two operands, and squares of sums.
    Fault(
        SCALINGS_PIPELINE,
        "scalings.cu",
        "own_column(q.a, tile.j), shared.others};",
        "own_column(q.a, tile.j), shared.rows};",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(SCALINGS_HALF, "scalings.cu", "++chunk < chunks", "chunk++ < chunks", WRONG),
    Fault(SCALINGS_HALF, "scalings.cu", "            sum[i] = 0;\n", "", WRONG),
    Fault(
        SCALINGS_HALF,
        "scalings.cu",
        "valid = n < end && s < q.positions;",
        "valid = n < end;",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        SCALINGS_PIPELINE,
        "pipeline.cuh",
        "if (SQUARE) x *= x;",
        "if (SQUARE && WITH_WEIGHT) x *= x;",
        WRONG,
    ),
    Fault(PIPELINE, "gram.cu", "if (f < d) put", "if (f <= d) put", RACE),
    Fault(
        PIPELINE,
        "gram.cu",
        "f = tile.i * TILE + m / M * HEIGHT",
        "f = m / M * HEIGHT",
        f"{WRONG}|{RACE}",
    ),
    # One matrix from beginning to end.
    Fault(
        SPECTRAL,
        "spectral.cu",
        "        __syncthreads();\n        multiply(sum, gram",
        "        multiply(sum, gram",
        f"{UNWRITTEN}|{RACE}",
    ),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "        shrink = 1.0f / sqrtf(bound);\n        __syncthreads();\n",
        "        shrink = 1.0f / sqrtf(bound);\n",
        RACE,
    ),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "own, at, 1, x.pitch, x.m);\n            __syncthreads();\n",
        "own, at, 1, x.pitch, x.m);\n",
        RACE,
    ),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "                    }\n        }\n        __syncthreads();\n",
        "                    }\n        }\n",
        RACE,
    ),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "own < end ? own : end - 1",
        "own",
        f"{OUTSIDE}|{UNWRITTEN}",
    ),
    Fault(SPECTRAL, "spectral.cu", "x.pitch = x.n | 1;", "x.pitch = x.n - 1;", RACE),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "tall ? column * pitch + row : row * pitch + column",
        "row * pitch + column",
        f"{OUTSIDE}|{UNWRITTEN}|{WRONG}",
    ),
    Fault(SPECTRAL, "spectral.cu", "step == 0", "step == 1", WRONG),
    Fault(SPECTRAL, "spectral.cu", "(sum[i][j] / bound)", "sum[i][j]", WRONG),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "own[x.in_shared(e)] * (1.0f / sqrtf(damped))",
        "own[x.in_shared(e)]",
        WRONG,
    ),
    Fault(
        PIPELINE,
        "gram.cu",
        "sum[2 * M * 4] = total;",
        "sum[2 * M * 4 + 1] = total;",
        WRONG,
    ),
    # Rows and examples at the end, and words that change places.
    Fault(
        PIPELINE_HALF,
        "gram.cu",
        "valid = k < last;",
        "valid = k <= last;",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(GRAM, "gram.cu", "valid = k < last;", "valid = k < last - 1;", WRONG),
    Fault(
        PIPELINE,
        "gram.cu",
        "end * ROWS < q.rows ? end * ROWS : q.rows;\n    float total",
        "end * ROWS;\n    float total",
        OUTSIDE,
    ),
    Fault(
        SCALINGS,
        "scalings.cu",
        "    if (end > q.examples) end = q.examples;\n",
        "",
        OUTSIDE,
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "c.to = chunk_at(threadIdx.x / CHUNKS, chunk);",
        "c.to = chunk_at(threadIdx.x / CHUNKS + 1, chunk) - CHUNKS;",
        WRONG,
    ),
    Fault(
        PIPELINE,
        "pipeline.cuh",
        "thread = i % APART, copy = i / APART;",
        "thread = i / COPIES, copy = i % COPIES;",
        WRONG,
    ),
    Fault(
        PIPELINE_HALF,
        "pipeline.cuh",
        "i % 2 * 2 + i / 2 % 2]",
        "i / 2 % 2 * 2 + i % 2]",
        WRONG,
    ),
    Fault(PIPELINE, "gram.cu", "same && warp_row()", "warp_row()", WRONG),
    Fault(HALF_ROWS, "pipeline.cuh", "0x3c003c00u", "0x3f803f80u", WRONG),
    Fault(
        DIAGONAL,
        "diagonal.cu",
        "n * q.stride_n + s * q.stride_s",
        "n * q.stride_s + s * q.stride_n",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        PRECONDITION,
        "precondition.cu",
        "block * q.s_block + row * q.s_row",
        "block * q.u_block + row * q.u_row",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        SQUARES,
        "squares.cu",
        "q.u[block * q.u_block + row * q.u_row",
        "q.u[block * q.s_block + row * q.s_row",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        GRAM,
        "gram.cu",
        "out[b * q.out_row + a]",
        "out[b * (q.x.features + q.x.bias) + a]",
        f"{OUTSIDE}|{RACE}|{WRONG}",
    ),
    # Two buffers in turn, and a sum that is asked for twice.
    Fault(GRAM, "gram.cu", "next = 1 - now;", "next = now;", f"{UNWRITTEN}|{RACE}"),
    Fault(
        PRECONDITION,
        "common.cuh",
        "    __syncthreads();\n    shared[threadIdx.x] = value;\n",
        "    shared[threadIdx.x] = value;\n",
        RACE,
    ),
    # What is there before, and numbers too large for their type.
    Fault(GRAM, "common.cuh", "beta == 0.0f ? update : ", "", f"{UNWRITTEN}|{WRONG}"),
    Fault(COUNTS, "counts.cu", "(i64)(weight * UNIT)", "(int)(weight * UNIT)", WRONG),
    Fault(JACOBI, "jacobi.cu", "m = (n + 1) / 2 * 2", "m = n / 2 * 2", WRONG),
    # Parts of a sum.
    Fault(GRAM, "operands.cuh", ", from += TILE * TILE", "", WRONG),
    Fault(
        PIPELINE,
        "operands.cuh",
        "    from += blockIdx.x % SLICES * SLICE * THREADS;\n",
        "",
        WRONG,
    ),
    Fault(
        SCALINGS_PIPELINE,
        "scalings.cu",
        "    if (q.splits == 1) return;\n",
        "",
        f"{UNWRITTEN}|{OUTSIDE}|{WRONG}",
    ),
    Fault(
        GRAM,
        "gram.cu",
        "first_tile <= tile_index",
        "first_tile < tile_index",
        f"{UNWRITTEN}|{OUTSIDE}|{RACE}|{WRONG}",
    ),
    Fault(
        DIAGONAL,
        "diagonal.cu",
        "split < q.splits;",
        "split < q.splits - 1;",
        WRONG,
    ),
    # Strides, and what lies beside the features.
    Fault(
        GRAM,
        "operands.cuh",
        "f.offset = (int)(feature * q.stride_feature);",
        "f.offset = feature;",
        WRONG,
    ),
    Fault(
        GRAM,
        "tiles.cuh",
        "column + width <= q.features;",
        "column + width <= q.features + 3;",
        OUTSIDE,
    ),
    Fault(
        SCALINGS,
        "scalings.cu",
        "make_row(row, q.a, block,",
        "make_row(row, q.a, 0,",
        WRONG,
    ),
    Fault(
        DIAGONAL,
        "diagonal.cu",
        "tile / q.chunks * q.out_block + f",
        "tile / q.chunks * (q.features + q.bias) + f",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        PRECONDITION,
        "precondition.cu",
        "q.u + block * q.u_block",
        "q.u + block * q.rows * q.u_row",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        SQUARES,
        "squares.cu",
        "q.s + block * q.s_block",
        "q.s + block * q.rows * q.s_row",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        SPECTRAL,
        "spectral.cu",
        "1.0f / (size < TINY ? TINY : size)",
        "1.0f / size",
        WRONG,
    ),
]
# Words that are cut off in place of rounded: nearly a thousandth of each.
FAULTS += [
    Fault(variant, file, "round_to_tf32(" + word, "(u32)(0xffffe000u & " + word, WRONG)
    for variant, file, word in (
        (PATCHES, "tiles.cuh", "word"),
        (PIPELINE, "pipeline.cuh", "bits(WITH_WEIGHT"),
        (SCALINGS_PIPELINE, "pipeline.cuh", "bits(WITH_WEIGHT"),
    )
]
UNSEEN, READ = "no fence has shown", "still reads it"
ON_THEIR_WAY = "products on their way"
LOOP = """        wait_for_copies<AHEAD - 1>();
        fence_writes();
        __syncthreads();
"""
PRODUCTS = """    fence_sums();
#pragma unroll
    for (int row = 0; row < ROWS; row += 16)
        start_product(sum, operand_descriptor(left, threadIdx.x / 128, row),
                      operand_descriptor(right, 0, row));
"""
# Of products of warpgroups: fences, waits, and where operands and sums lie.
OF_WARPGROUPS = [
    (LOOP, LOOP.replace("        fence_writes();\n", ""), UNSEEN),
    (
        LOOP,
        LOOP.replace("        fence_writes();\n", "") + "        fence_writes();\n",
        UNSEEN,
    ),
    (
        LOOP,
        "        fence_writes();\n" + LOOP.replace("        fence_writes();\n", ""),
        UNSEEN,
    ),
    (LOOP, LOOP.replace("        __syncthreads();\n", ""), f"{RACE}|{COMING}"),
    ("wait_for_copies<AHEAD - 1>();", "wait_for_copies<AHEAD>();", COMING),
    (
        PRODUCTS,
        PRODUCTS.replace("    fence_sums();\n", ""),
        "without a fence of its registers",
    ),
    ("        commit_products();\n", "", f"{ON_THEIR_WAY}|{READ}"),
    ("wait_for_products<1>();", "wait_for_products<2>();", READ),
    ("    wait_for_products<0>();\n", "", ON_THEIR_WAY),
    ("constexpr int AHEAD = STAGES - 2;", "constexpr int AHEAD = STAGES - 1;", READ),
    ("        commit_copies();\n        rows(ahead + 1);", "rows(ahead + 1);", COMING),
    ("8 * 8, SWIZZLED);", "8 * 8, PLAIN_ROWS);", f"{WRONG}|{UNWRITTEN}"),
    ("ROWS * 8, 8 * 8, SWIZZLED", "8 * 8, ROWS * 8, SWIZZLED", f"{WRONG}|{UNWRITTEN}"),
    ("(ROWS * 8) + row * 8", "(ROWS * 8) + row * 4", f"{WRONG}|{UNWRITTEN}"),
    ("0x3ffff) >> 4", "0x3ffff) >> 3", f"beyond|{WRONG}|{UNWRITTEN}|emulated"),
    (
        PRODUCTS,
        PRODUCTS.replace("threadIdx.x / 128", "threadIdx.x / 64"),
        f"than the rest of its warpgroup|{UNWRITTEN}",
    ),
    ("feature_of_row(0, i % 4 / 2)", "feature_of_row(0, i % 2)", f"{WRONG}|{RACE}"),
    (
        "i / 4 * 8 + threadIdx.x % 4 * 2",
        "i / 4 * 8 + threadIdx.x % 4",
        f"{WRONG}|{RACE}",
    ),
]
FAULTS_OF_WARPGROUPS = [
    *(Fault(WARPGROUP, "warpgroup.cuh", *one) for one in OF_WARPGROUPS),
    Fault(
        WARPGROUP,
        "gram.cu",
        "same ? stage.left : stage.right);\n        if (with_sums)",
        "stage.right);\n        if (with_sums)",
        UNWRITTEN,
    ),
    Fault(
        WARPGROUP,
        "gram.cu",
        "if (with_sums) add_sums",
        "if (with_sums && threadIdx.x % 128 < 96) add_sums",
        "rest of its warpgroup|part of a warpgroup left out",
    ),
    Fault(
        WARPGROUP, "gram.cu", "sum[3] = features[2];", "sum[3] = features[0];", WRONG
    ),
    Fault(
        WARPGROUP,
        "gram.cu",
        "if (threadIdx.x == 32) sum[0]",
        "if (threadIdx.x == 0) sum[0]",
        f"{WRONG}|{RACE}",
    ),
    Fault(WARPGROUP, "gram.cu", "begin * ROWS));\n", "begin));\n", WRONG),
    Fault(
        WARPGROUP,
        "gram.cu",
        "f = tile.i * TILE + warp_row() + feature",
        "f = warp_row() + feature",
        f"{WRONG}|{RACE}",
    ),
    Fault(
        WARPGROUP,
        "pipeline.cuh",
        "row < even.count ? ",
        "row < even.count + ROWS ? ",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        WARPGROUP,
        "operands.cuh",
        "if (apart && q.stride_n != positions * q.stride_s) pitch = 0;",
        "if (apart && false) pitch = 0;",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        WARPGROUP,
        "operands.cuh",
        "even.first = (int)(block * q.stride_block / CHUNK);",
        "even.first = 0;",
        WRONG,
    ),
    Fault(WARPGROUP, "gram.cu", "0x3f803f80u : ", "0x3c003c00u : ", WRONG),
    Fault(
        WARPGROUP,
        "pipeline.cuh",
        "i * APART * ROW_PITCH, q,",
        "i * APART * CHUNKS, q,",
        f"{OUTSIDE}|{WRONG}|{RACE}|{UNWRITTEN}",
    ),
    Fault(
        WARPGROUP,
        "pipeline.cuh",
        "(WARPGROUP ? chunk % 8 : chunk) ^ swizzle",
        "(WARPGROUP ? chunk % 8 : chunk) ^ swizzle / 2",
        WRONG,
    ),
]


CHANGED, NOT_ROUNDED = "registers changed", "is not rounded"
FENCE = """                if (TRANSPOSED) fence_writes();
"""
TAKE = """                wait_for_products<GROUPS>();
                left_follows();
"""
# Of words that are transposed: fences, waits, roundings, and whose word lies where.
OF_LEFT = [
    (
        "            __syncthreads();\n            bool more",
        "            bool more",
        f"{RACE}|{UNWRITTEN}",
    ),
    (FENCE, "", UNSEEN),
    (TAKE, TAKE.replace("GROUPS", "GROUPS + 1"), f"{READ}|{CHANGED}"),
    (TAKE, "\n".join(TAKE.splitlines()[::-1]) + "\n", CHANGED),
    ("    if (TRANSPOSED) fence_writes();\n    prepare", "    prepare", UNSEEN),
    ("    wait_for_products<0>();\n}", "}", ON_THEIR_WAY),
    ("later = (now + AHEAD) % PARTS;", "later = now;", CHANGED),
    ("                prepare(left[next]);\n", "", NOT_ROUNDED),
    ("    prepare(left[0]);\n", "", NOT_ROUNDED),
    ("prepare(left[next]);", "prepare(left[now]);", f"{CHANGED}|{NOT_ROUNDED}"),
    ("i / 8 * 16 + (threadIdx.x", "i / 8 * 16 + 1 - (threadIdx.x", f"{WRONG}|{RACE}"),
    ("* 2 + i / 4 % 2;", "* 2 + 1 - i / 4 % 2;", WRONG),
    ("/ 4 * 2 + upper;", "/ 4 + upper * 8;", f"{WRONG}|not aligned"),
    ("rows(ahead + 1);", "rows(ahead);", f"{RACE}|{UNWRITTEN}"),
    ("rows(ahead + 1);", "rows(ahead + RING - 2);", f"{RACE}|{UNWRITTEN}"),
    ("s <= AHEAD; s++) rows(s);", "s < AHEAD; s++) rows(s);", UNWRITTEN),
    ("rows(s);\n    __syncthreads();\n", "rows(s);\n", f"{RACE}|{UNWRITTEN}"),
    ("if (step >= steps) break;", "", f"{UNWRITTEN}|{UNSEEN}|{OUTSIDE}|{WRONG}|{RACE}"),
    ("if (number < count) words", "words", f"{OUTSIDE}|{WRONG}"),
]
OF_WORDS = [
    ("    fence_sums();\n", "", "without a fence of its registers"),
    ("    commit_products();\n", "", f"{ON_THEIR_WAY}|{READ}|{CHANGED}"),
    ("pair.first.offset / 2;", "0;", WRONG),
    ("feature < q.features ? feature : 0", "feature", f"{OUTSIDE}|{WRONG}"),
    ("rounded(x[2 * i + feature])", "bits(x[2 * i + feature])", NOT_ROUNDED),
    (
        "constexpr int STAGES = PARTS;",
        "constexpr int STAGES = PARTS - 1;",
        f"{READ}|{OUTSIDE}|{RACE}",
    ),
    ("8 * CHUNKS, SWIZZLED_64", "8 * CHUNKS, SWIZZLED", f"{WRONG}|{UNWRITTEN}|beyond"),
    ("8 * CHUNKS, SWIZZLED_64", "4 * CHUNKS, SWIZZLED_64", WRONG),
    ("HALF_CHUNKS = 2;", "HALF_CHUNKS = 4;", f"{WRONG}|{UNWRITTEN}|{RACE}"),
    ("threadIdx.x / PAIRS ^ row / 2 % 4", "threadIdx.x / PAIRS ^ row % 4", WRONG),
    ("place + feature * 8 * CHUNKS", "place + feature * CHUNKS", f"{RACE}|{UNWRITTEN}"),
    ("pair / 8 * 16 + pair % 8;", "pair / 8 * 16 + pair % 8 * 2;", RACE),
    ("row < even.count ? ", "row < even.count + ROWS ? ", f"{OUTSIDE}|{WRONG}"),
    ("row.valid ? (u32)base : NOWHERE", "(u32)base", f"{OUTSIDE}|{WRONG}"),
    ("rows.left, i % 4, i / 4", "rows.left, i / 4, i % 4", WRONG),
    ("four * (x.is_left ? 1 : 4)", "four * 4", f"{OUTSIDE}|{WRONG}"),
    ("x.is_left ? 4 : 1)", "1)", f"{OUTSIDE}|{WRONG}"),
    ("(x.begin + step) * ROWS", "step * ROWS", WRONG),
    ("weight.v[i / 2]", "weight.v[i % 4]", WRONG),
    ("+= x[i];", "+= from_bits(part[i]);", WRONG),
]
SUMS_OF_WORDS = [
    (
        "feature = right_feature();\n    __syncthreads();",
        "feature = right_feature();",
        f"{RACE}|{READ}",
    ),
    ("own.weight;\n    __syncthreads();\n", "own.weight;\n", f"{RACE}|{UNWRITTEN}"),
    ("i < CHUNKS; i++) sum[0]", "i < CHUNKS - 1; i++) sum[0]", WRONG),
    ("own < TILE && f < d) put", "own < TILE && f <= d) put", f"{OUTSIDE}|{RACE}"),
    ("f = tile.i * TILE + own;", "f = own;", f"{WRONG}|{RACE}"),
    ("if (weighted) total = 0;", "total = 0;", WRONG),
    ("sum[1] = total;", "sum[0] = total;", WRONG),
    ("if (weighted) even.pitch = 0;", "", UNWRITTEN),
    ("with_sums = tile.i == tile.j && q.x.bias;", "with_sums = q.x.bias;", WRONG),
    ("constexpr int FIRST = 32;", "constexpr int FIRST = 0;", f"{WRONG}|{RACE}"),
    (
        "q.x, tile.i * TILE + left_feature()",
        "q.x, tile.j * TILE + left_feature()",
        WRONG,
    ),
    (
        "part, left, shared.rows[step % RING], step)",
        "part, left, shared.rows[(step + 1) % RING], step)",
        f"{RACE}|{UNWRITTEN}|{WRONG}",
    ),
    (
        "        multiply(sum, part, stages",
        "        if (threadIdx.x % 128 < 96) multiply(sum, part, stages",
        "part of a warpgroup left out|rest of its warpgroup|do not come",
    ),
    (
        "shared.stages[stage], part, shared.rows[step % RING]",
        "shared.stages[stage], part, shared.rows[(step + 1) % RING]",
        f"{RACE}|{UNWRITTEN}|{WRONG}",
    ),
    (
        "stages + stage * STAGE_CHUNKS",
        "stages + (stage + 1) % STAGES * STAGE_CHUNKS",
        f"{RACE}|{UNWRITTEN}|{UNSEEN}|{READ}",
    ),
]
FAULTS_OF_WORDS = [
    *(Fault(WORDS, "left.cuh", *one) for one in OF_LEFT),
    *(Fault(WORDS, "transposed.cuh", *one) for one in OF_WORDS),
    *(Fault(WORDS, "gram.cu", *one) for one in SUMS_OF_WORDS),
    Fault(
        WORD_PATCHES,
        "transposed.cuh",
        "base.v[i] = there[i] ? base.v[i] : NOWHERE;",
        "base.v[i] = base.v[i];",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        WORD_PATCHES,
        "transposed.cuh",
        "row.valid ? row.at[axis] : FAR",
        "row.at[axis]",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        WORD_PATCHES,
        "transposed.cuh",
        "at.v[i] + x.pair.first.at[axis]",
        "at.v[i]",
        f"{OUTSIDE}|{WRONG}",
    ),
]

LAST = """        wait_for_products<1>();
        add_squares(squares, sum);
        wait_for_products<0>();
        add_squares(squares + PART, sum + PART);
"""
# Of two operands: waits before squares, first products, walks over rows, edges.
OF_PAIRS = [
    (LAST, LAST.replace("        wait_for_products<1>();\n", ""), WRONG),
    (LAST, LAST.replace("        wait_for_products<0>();\n", ""), WRONG),
    (LAST, LAST.replace("<1>", "<2>"), WRONG),
    (LAST, LAST.replace("(squares + PART", "(squares"), WRONG),
    ("SQUARE || half || !first", "true", WRONG),
    ("SQUARE || half || !first", "SQUARE || !first", WRONG),
    ("chunk == chunks - 1", "chunk == chunks", WRONG),
    ("        chunk++;\n", "", WRONG),
    ("        chunk = 0;\n    };", "    };", WRONG),
    ("        fence_sums();\n", "", "without a fence of its registers"),
    ("        commit_products();\n", "", f"{ON_THEIR_WAY}|{READ}|{CHANGED}|{WRONG}"),
    ("group * COLUMNS * COLUMN_CHUNKS", "0", WRONG),
    ("half * HALF_CHUNKS", "0", WRONG),
    ("if (ends) there = rows;", "", WRONG),
    ("left.next(ends);", "left.next(false);", f"{OUTSIDE}|{WRONG}"),
    ("right.next(ends);", "right.next(false);", f"{OUTSIDE}|{WRONG}"),
    ("there <= 0;", "there < 0;", f"{OUTSIDE}|{WRONG}"),
    ("begin * q.stride_n + block", "block", WRONG),
    ("block * q.stride_block + row", "row", WRONG),
    ("+ row * pitch;", ";", WRONG),
    ("(chunks - 1) * step", "chunks * step", f"{OUTSIDE}|{WRONG}"),
    ("left.reader, there - first_row<true>()", "left.reader, there", OUTSIDE),
    ("feature < q.features ? feature : 0", "feature", f"{OUTSIDE}|{WRONG}"),
    ("q.g, tile.i * TILE + left_feature()", "q.g, left_feature()", WRONG),
    (
        "        start_products(sum, part, its, chunk == 0);\n",
        "        if (threadIdx.x < 96) start_products(sum, part, its, chunk == 0);\n",
        "part of a warpgroup left out|rest of its warpgroup|do not come",
    ),
]
OF_PAIR_WORDS = [
    ("right.reader, there - first_row<false>()", "right.reader, there", OUTSIDE),
    ("bool odd = last % 2 == 0 &&", "bool odd = last % 2 == 1 &&", OUTSIDE),
    ("alone = feature >= last", "alone = false", OUTSIDE),
    ("q.a, pair_of(q.a, feature)", "q.a, pair_of(q.a, right_feature())", WRONG),
    ("shared.stages[stage], part, place", "shared.stages[0], part, place", READ),
]
OF_PAIR_HALVES = [
    ("there - threadIdx.x / CHUNKS);", "there);", f"{OUTSIDE}|{WRONG}"),
    ("return i * APART; });", "return i; });", WRONG),
    (
        "start_copies(shared.stages[step % STAGES]",
        "start_copies(shared.stages[0]",
        f"{READ}|{COMING}",
    ),
]
FAULTS_OF_PAIRS = [
    *(Fault(PAIR_WORDS, "scalings.cu", *one) for one in OF_PAIRS + OF_PAIR_WORDS),
    *(Fault(PAIR_HALVES, "scalings.cu", *one) for one in OF_PAIR_HALVES),
    *(  # three steps of an example: two of them under way
        Fault(PAIR_WORDS, "left.cuh", *one)
        for one in (
            (TAKE, TAKE.replace("GROUPS", "GROUPS + 1"), f"{READ}|{CHANGED}"),
            (TAKE, "\n".join(TAKE.splitlines()[::-1]) + "\n", CHANGED),
        )
    ),
    *(
        Fault(PAIR_WORDS, "transposed.cuh", *one)
        for one in (
            ("if (alone && i < there)", "if (alone)", OUTSIDE),
            ("if (alone && i < there)", "if (false)", WRONG),
            ("alone ? 0 : there", "there", OUTSIDE),
            ("COLUMN_CHUNKS = CHUNKS,", "COLUMN_CHUNKS = 1,", WRONG),
        )
    ),
    *(
        Fault(PAIR_HALVES, "left.cuh", *one)
        for one in (
            ("                finish();\n", "", f"{WRONG}|{ON_THEIR_WAY}|{CHANGED}"),
            (
                "                right_follows();\n                left_follows();\n",
                "                right_follows();\n",
                f"{WRONG}|{OUTSIDE}",
            ),
            ("exchange_halves(part[i - 1], part[i]);", "{}", WRONG),
            ("high = a >> 16 | (b & 0xffff0000u)", "high = b", WRONG),
            ("i / 4 * 16 + i / 2 % 2 * 8 + i % 2", "i * 4", WRONG),
            ("threadIdx.x % 4 * PACK", "threadIdx.x % 4", WRONG),
            ("wait_for_copies<AHEAD - 1>();", "wait_for_copies<AHEAD>();", COMING),
            ("<AHEAD - 1>();\n    fence_writes();", "<AHEAD - 1>();", UNSEEN),
            (
                "            show_copies();\n            __syncthreads();\n",
                "            __syncthreads();\n            show_copies();\n",
                f"{COMING}|{UNSEEN}|{RACE}",
            ),
            ("                commit_right();\n", "", COMING),
            (
                "threadIdx.x % 4 * 2 + i % 2; }",
                "threadIdx.x % 4 + i % 2; }",
                f"{WRONG}|{RACE}",
            ),
        )
    ),
    *(
        Fault(PAIR_HALVES, "pipeline.cuh", *one)
        for one in (
            ("if (column.bytes == 16)", "if (true)", f"{OUTSIDE}|{WRONG}"),
            ("i * APART < there ? bytes : 0", "bytes", f"{OUTSIDE}|{WRONG}"),
            ("LEFT_IN_REGISTERS ? 8", "LEFT_IN_REGISTERS ? 4", READ),
        )
    ),
    Fault(
        PAIR_HALVES, "warpgroup.cuh", "HALF_CHUNKS = 16 * 8", "HALF_CHUNKS = 8", WRONG
    ),
    Fault(
        PAIR_HALVES,
        "warpgroup.cuh",
        "COLUMN_CHUNKS = ROWS * 8 / 64",
        "COLUMN_CHUNKS = 8",
        f"{WRONG}|{UNWRITTEN}|{COMING}",
    ),
    Fault(PAIR_SQUARES, "left.cuh", "bits(SQUARE ? x * x : x)", "bits(x)", WRONG),
    *(
        Fault(
            variant,
            "left.cuh",
            "return round_to_tf32(bits",
            "host::changed(); return (0xffffe000u & bits",
            WRONG,
        )
        for variant in (PAIR_WORDS, PAIR_SQUARES)
    ),
    Fault(
        PAIR_SQUARES,
        "scalings.cu",
        "int rows = SQUARE ? end - begin : q.positions",
        "int rows = SQUARE ? end : q.positions",
        f"{OUTSIDE}|{WRONG}",
    ),
    Fault(
        PAIR_SQUARES, "scalings.cu", "SQUARE ? q.stride_n", "SQUARE ? q.stride_s", WRONG
    ),
]


@pytest.mark.parametrize(
    "variant",
    [
        *WHOLE,
        *(pytest.param(v, marks=pytest.mark.slow) for v in (WARPGROUP, WORDS)),
        *(pytest.param(v, marks=pytest.mark.slow) for v in (WORD_PATCHES, *PAIRS)),
    ],
    ids=str,
)
def test_kernels_as_they_are_pass_every_check(variant: Variant) -> None:
    limit = dict(variant.defines).get("PROBLEMS", 1)
    engine = HostEngine(DEVICE, problems=limit, checked=True)
    engine.load(variant)
    assert dispatch.error_of(engine, variant) <= kernel.tolerance(variant)
    # The first use on a device tries every function, that which adds up parts too.
    assert set(engine.launched) == set(compiler.kernel_names(variant.source))


# Each is a compilation: every third one in the quick suite, all in the slow one.
SOME = [
    pytest.param(
        fault, marks=[] if number % 3 == 0 else pytest.mark.slow, id=str(fault)
    )
    for number, fault in enumerate(FAULTS)
]
SOME += [
    pytest.param(fault, marks=[pytest.mark.slow] * (number > 0), id=f"{name}-{number}")
    for name, faults in (
        ("wgmma", FAULTS_OF_WARPGROUPS),
        ("words", FAULTS_OF_WORDS),
        ("pairs", FAULTS_OF_PAIRS),
    )
    for number, fault in enumerate(faults)
]


@pytest.mark.parametrize("fault", SOME)
def test_seeded_faults_are_seen(tmp_path: Path, fault: Fault) -> None:
    folder = tmp_path / "csrc"
    shutil.copytree(compiler.source_folder(), folder)
    path = folder / fault.file
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.old) >= 1, "the source has changed: change the fault too"
    path.write_text(text.replace(fault.old, fault.new, 1), encoding="utf-8")
    limit = dict(fault.variant.defines).get("PROBLEMS", 1)
    engine = HostEngine(DEVICE, problems=limit, folder=folder, checked=True)
    compile_together([fault.variant], folder, checked=True)
    words = WRONG
    try:
        error = dispatch.error_of(engine, fault.variant)
        assert not error <= kernel.tolerance(fault.variant)
    except KernelFault as seen:
        words = str(seen)
    assert re.search(fault.words, words), words


class LeavesOut(HostEngine):
    """An engine whose launches of one kernel lack their last tile, or piece."""

    kernel = ""

    def launch(self, one: Launch) -> None:
        if one.kernel == self.kernel:
            tiled = one.kernel in ("gram_finish", "scalings_finish")
            one = replace(one, grid=max(0, one.grid - (SLICES if tiled else 1)))
        super().launch(one)


@pytest.mark.parametrize(
    "variant",
    [
        *WHOLE,
        *(pytest.param(v, marks=pytest.mark.slow) for v in (WARPGROUP, WORDS, *PAIRS)),
    ],
    ids=str,
)
def test_a_grid_that_is_too_small_is_seen(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are poisoned before: whoever leaves one out is off."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)  # parts of an earlier sum are right
    limit = dict(variant.defines).get("PROBLEMS", 1)
    engine = LeavesOut(DEVICE, problems=limit, checked=True)
    engine.load(variant)
    for name in compiler.kernel_names(variant.source):
        engine.kernel = name
        with suppress(KernelFault):  # sums of parts read what nobody wrote
            error = dispatch.error_of(engine, variant)
            assert not error <= kernel.tolerance(variant), name


def test_chunks_and_quads_that_are_not_aligned_are_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Odd widths, and a first element anywhere: what the plans look at."""
    monkeypatch.setattr(tiles, "layout_of", lambda *_: tiles.LAYOUT_QUADS)
    engine = HostEngine(DEVICE, problems=2, checked=True)
    whole = torch.randn(32, 1, 1, 80)
    for variant, x in (
        (GRAM, whole[..., 1:65]),
        (GRAM, torch.randn(32, 1, 1, 67)),
        (PIPELINE, whole[..., 1:65]),
    ):
        width = x.shape[-1]
        gram = Gram(torch.empty(1, width, width), x)
        with pytest.raises(KernelFault, match="not aligned"):
            execute(engine, gram_launches(engine, variant, 64, [gram]))
