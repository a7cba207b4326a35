"""What a step of the tiled kernels asks of a multiprocessor, by counts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from ekfac.kernels.cuda.compiler import BFLOAT16, TF32

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script that counts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_counts

    yield kernel_counts
    for name in ("kernel_counts", "kernel_issue", "common"):
        sys.modules.pop(name, None)


CODE = """
.section .text.gram
.text.gram:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;
        /*0020*/              @P0 BRA `(.L_x_2) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0040*/                   IADD3 R9, R1, 0x1, RZ ;
.L_x_2:
        /*0050*/              @P1 BRA `(.L_x_3) ;
        /*0060*/                   IADD3 R9, R1, 0x1, RZ ;
        /*0070*/                   IADD3 R9, R1, 0x1, RZ ;
        /*0080*/                   STS [R9], R1 ;
.L_x_3:
        /*0090*/              @P2 BRA `(.L_x_4) ;
        /*00a0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00b0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*00c0*/                   BRA `(.L_x_5) ;
.L_x_4:
        /*00d0*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
.L_x_5:
        /*00e0*/             @!P3 BRA `(.L_x_1) ;
        /*00f0*/                   EXIT ;
.section .text.other
"""


def test_the_shortest_way_with_all_products_is_counted(counts: ModuleType) -> None:
    """Of three branches: over the copy, over the rows, to fewer products."""
    import kernel_issue

    code = kernel_issue.Code.parse(CODE, "gram")
    assert code.loop() == (1, 14)
    assert code.issued("HMMA") == 8  # neither copies nor rows
    assert code.issued("HMMA", "LDGSTS") == 10
    assert code.issued("HMMA", "LDGSTS", "STS") == 13
    assert kernel_issue.Code.parse(CODE.replace("HMMA", "FADD"), "gram").loop() is None


@pytest.mark.parametrize("kind", [TF32, BFLOAT16])
def test_bookkeeping_takes_less_shared_memory_than_operands(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """Of a pipeline: reads of operands by four warps, writes of tiles, and rows."""
    monkeypatch.setattr(counts, "issue_cycles", lambda *_: None)
    step = counts.gram_step(kind, pipeline=True)
    operands = 4 * 2 * 64 * 64 // 128  # 64 bytes of 64 features, 128 to a wavefront
    tiles = 2 * 128 * 64 // 128
    assert operands <= step.reads <= operands + 16
    assert tiles <= step.writes <= tiles + 4
    assert step.sectors * 32 == 2 * 128 * 64  # nothing is read twice
    assert step.products / step.bound > 0.6


@pytest.mark.parametrize("kind", [TF32, BFLOAT16])
def test_a_diagonal_tile_has_one_operand(counts: ModuleType, kind: int) -> None:
    """Two warps read theirs once, one reads two, one none; half is written."""
    step = counts.gram_step(kind, pipeline=True, diagonal=True)
    operands, tiles = (1 + 1 + 2) * 64 * 64 // 128, 128 * 64 // 128
    assert operands <= step.reads <= operands + 16
    assert tiles <= step.writes <= tiles + 4
    assert step.sectors * 32 == 128 * 64


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", [False, True])
def test_words_are_transposed_without_bank_conflicts(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch, diagonal: bool
) -> None:
    """Three warpgroups read the right operand, which is written once."""
    monkeypatch.setattr(counts, "issue_cycles", lambda *_: None)
    step = counts.gram_step(TF32, pipeline=True, warpgroups=True, diagonal=diagonal)
    assert step.reads == 3 * 192 * 64 // 128
    assert step.writes == 192 * 64 // 128
    loaded = step.sectors * 32 // 128  # into registers, through the same memory
    assert loaded == 2 * 192 * 64 // 128
    assert step.shared + loaded <= step.products


def test_warpgroups_ask_no_more_of_shared_memory_than_tensor_cores_take(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands of three warpgroups, and the tiles' writes; even rows take nothing."""
    monkeypatch.setattr(counts, "issue_cycles", lambda *_: None)
    step = counts.gram_step(BFLOAT16, pipeline=True, warpgroups=True)
    operands = 3 * 2 * (64 + 192) * 16 * 2 // 128
    assert step.reads == operands
    assert step.writes == 2 * 192 * 64 // 128
    assert step.sectors * 32 == 2 * 192 * 64  # nothing is read twice
    assert step.shared <= step.products
    assert step.products == step.bound


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TF32, BFLOAT16])
def test_scalings_by_warpgroups_are_bound_by_products_or_loads(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """Two warpgroups read the right operand, written once; no rows are looked up."""
    monkeypatch.setattr(counts, "issue_cycles", lambda *_: None)
    ways = {"pipeline": True, "warpgroups": True}
    step = counts.scalings_step(kind, square=False, **ways)
    assert step.reads == 2 * 128 * 64 // 128
    assert step.writes == 128 * 64 // 128
    assert step.sectors * 32 == 2 * 128 * 64  # nothing is read twice
    assert step.loads == (2 if kind == TF32 else 1) * 128 * 64 // 128
    assert step.shared <= step.products
    assert step.products / step.bound >= (0.8 if kind == TF32 else 1)
    row = counts.example_row(step)
    assert row["squares"] == "64"
    assert int(row["64 positions"].rstrip("%")) > 60


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TF32, BFLOAT16])
def test_bookkeeping_of_other_tiles_takes_less_than_operands(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    """Rows that lie anywhere: operands are read four times, lookups take less."""
    monkeypatch.setattr(counts, "issue_cycles", lambda *_: None)
    step = counts.gram_step(kind, pipeline=False)
    operands, tiles = 8 * 2 * 24, 2 * 128 * 64 // 128
    assert step.shared - operands - tiles < operands


@pytest.mark.slow
def test_pipelines_are_not_bound_by_instructions(counts: ModuleType) -> None:
    """Issue takes less than shared memory; of bfloat16 less than the products."""
    for kind in (TF32, BFLOAT16):
        step = counts.gram_step(kind, pipeline=True)
        if step.issue is None:
            pytest.skip("there is no nvcc, or no nvdisasm")
        assert step.issue < step.shared
        assert step.issue < step.products or kind == TF32
    ways = {"pipeline": True, "warpgroups": True}
    wide = counts.gram_step(TF32, **ways)
    assert wide.issue < wide.products
    for kind in (TF32, BFLOAT16):
        pair = counts.scalings_step(kind, square=False, **ways)
        assert pair.issue < pair.products
