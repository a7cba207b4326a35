"""Every kernel compiles for the devices it is meant for, and what it takes there.

With nvcc, or NVRTC where that is what there is. The numbers are printed: ``-s`` shows
them.
"""

from __future__ import annotations

import locale
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from ekfac.kernels.cuda import compiler, dispatch
from ekfac.kernels.cuda.compiler import BFLOAT16, FLOAT, TF32, Variant
from ekfac.kernels.cuda.diagonal import diagonal_variant
from ekfac.kernels.cuda.gram import gram_variant
from ekfac.kernels.cuda.launch import plain_variant
from ekfac.kernels.cuda.scalings import scalings_variant
from ekfac.kernels.cuda.spectral import SIDES, spectral_variant

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
NVCC = shutil.which("nvcc")
# Registers of a thread beyond which a block of 256 does not fit into a multiprocessor.
MOST_REGISTERS = 255
STATIC_SHARED = 48 << 10
# What the quick test compiles: every source and each of its ways through the text.
FEW = compiler.FEW
QUICK = [
    gram_variant(FLOAT, 128, False, compiler.FEW),
    gram_variant(TF32, 128, True, compiler.FEW),
    gram_variant(BFLOAT16, 64, False, compiler.MANY),
    gram_variant(TF32, 128, True, compiler.FEW, pipeline=True),
    gram_variant(BFLOAT16, 128, False, compiler.MANY, pipeline=True),
    gram_variant(BFLOAT16, 192, False, compiler.FEW, pipeline=True, warpgroups=True),
    gram_variant(TF32, 192, False, compiler.MANY, pipeline=True, warpgroups=True),
    scalings_variant(TF32, 128, False, compiler.FEW),
    scalings_variant(FLOAT, 64, True, compiler.MANY),
    scalings_variant(BFLOAT16, 128, False, compiler.FEW, pipeline=True),
    *(
        scalings_variant(kind, 128, False, FEW, pipeline=True, warpgroups=True)
        for kind in (TF32, BFLOAT16)
    ),
    diagonal_variant(BFLOAT16, compiler.FEW),
    *(plain_variant(n, FEW) for n in ("counts", "squares", "precondition")),
    *(spectral_variant(side, FEW) for side in SIDES),
    Variant("jacobi"),
]


def has_nvrtc() -> bool:
    try:
        compiler.library()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    NVCC is None and not has_nvrtc(), reason="there is neither nvcc nor NVRTC"
)


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel; bytes but for the registers."""

    kernel: str
    registers: int
    shared: int
    stack: int
    spilled: int


def usage(variant: Variant, architecture: str) -> list[Usage]:
    """Compile with nvcc; return what the kernels take."""
    assert NVCC is not None
    path = compiler.source_folder() / f"{variant.source}.cu"
    command = [NVCC, "-std=c++17", f"-arch={variant.target(architecture)}", "-cubin"]
    command += ["-Xptxas", "-v", "-Werror", "all-warnings", *variant.flags()]
    command += ["-o", os.devnull]
    result = subprocess.run(
        [*command, str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (
        "serialized" not in result.stderr
    )  # products of warpgroups wait for each other
    found = []
    for part in result.stderr.split("Compiling entry function")[1:]:

        def number(pattern: str, text: str = part) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        found.append(
            Usage(
                part.split("'")[1],
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes smem"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes spill stores")
                + number(r"(\d+) bytes spill loads"),
            )
        )
    return found


def check(variants: Sequence[Variant], architecture: str) -> None:
    """Compile, print and assert what kernels may take."""
    if NVCC is None:
        for variant in variants:
            code, words = compiler.compile_variant(variant, architecture)
            print(f"{architecture} {variant}: {len(code)} bytes {words}")
            assert code
            assert "warning" not in words
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        every = list(pool.map(lambda v: usage(v, architecture), variants))
    for variant, kernels in zip(variants, every, strict=True):
        assert kernels, variant
        for one in kernels:
            print(
                f"{architecture} {variant!s:28} {one.kernel:20} "
                f"{one.registers:4} registers {one.shared:6} B shared "
                f"{one.stack:3} B stack {one.spilled:3} B spilled"
            )
            assert one.spilled == one.stack == 0, one
            assert one.registers <= MOST_REGISTERS
            assert one.shared <= STATIC_SHARED, one


def test_kernels_compile_without_spills() -> None:
    check(QUICK, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("problems", [compiler.FEW, compiler.MANY])
def test_every_variant_compiles_everywhere(architecture: str, problems: int) -> None:
    variants = dispatch.every_variant(problems)
    hopper = architecture == "sm_90"
    check([v for v in variants if hopper or not v.warpgroups], architecture)


def test_products_of_warpgroups_are_those_that_are_emulated() -> None:
    """What the compiler does not look at: sums, types, signs, and how operands lie."""
    text = compiler.source_text("warpgroup.cuh")
    for name, end, count in (("NARROW", "EKFAC_WIDE", 32), ("WIDE", "EKFAC_TYPES", 96)):
        sums = text[text.index(f"EKFAC_{name}_SUMS") :]
        found = re.findall(r"%(\d+)", sums[: sums.index(end)])
        assert [int(n) for n in found] == list(range(count))
    named = text[text.index("EKFAC_ALL_SUMS") : text.index("EKFAC_NARROW_SUMS")]
    assert [int(n) for n in re.findall(r"_SUMS\((\d+)\)", named)] == [*range(0, 96, 16)]
    defined = re.findall(r'#define EKFAC_(?:TYPES|SIGNS) "(.*)"', text)
    assert defined == [
        "k8.f32.tf32.tf32 ",
        "k16.f32.bf16.bf16 ",
        "k16.f32.f16.f16 ",
        "p, 1, 1; }",  # nothing is negated; words lie one way
        "p, 1, 1, 1; }",  # the right operand is transposed
        "p, 1, 1, 1, 1; }",  # both are
    ]
    products = [
        " ".join(one.split()) for one in text.split("DEVICE void start_product(")
    ]
    left = ': "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)'
    for words, product in zip(
        (
            '"{ .reg .pred p; setp.ne.s32 p, %37, 0; " '
            '"wgmma.mma_async.sync.aligned.m64n64" EKFAC_TYPES EKFAC_NARROW_SUMS '
            '"{%32, %33, %34, %35}, %36, " EKFAC_SIGNS '
            f': EKFAC_MORE_SUMS(0), EKFAC_MORE_SUMS(16) {left}, "r"((int)add)',
            '"{ .reg .pred p; setp.eq.u32 p, 0, 0; " '
            '"wgmma.mma_async.sync.aligned.m64n192" EKFAC_TYPES EKFAC_WIDE_SUMS '
            f'"{{%96, %97, %98, %99}}, %100, " EKFAC_SIGNS : EKFAC_ALL_SUMS {left}',
            '"{ .reg .pred p; setp.eq.u32 p, 0, 0; " '
            '"wgmma.mma_async.sync.aligned.m64n192" EKFAC_TYPES EKFAC_WIDE_SUMS '
            '"%96, %97, " EKFAC_SIGNS : EKFAC_ALL_SUMS : "l"(a), "l"(b)',
            '"{ .reg .pred p; setp.eq.u32 p, 0, 0; " '
            '"wgmma.mma_async.sync.aligned.m64n8" EKFAC_TYPES '
            '"{%0, %1, %2, %3}, %4, %5, " EKFAC_SIGNS : EKFAC_SUMS(0) : "l"(a), "l"(b)',
        ),
        products[1:],
        strict=True,
    ):
        assert f'{words} : "memory")' in product
    assert "host::start_product(c, a, b, 64, INPUT - INPUT_TF32, add);" in text
    assert "host::start_product(c, a, b, 192, 0, true);" in text
    assert "host::start_product(c, a, b, SIZE * 2, INPUT - INPUT_TF32);" in text


def test_sources_include_nothing_but_each_other() -> None:
    """NVRTC finds no header of PyTorch, CUDA or C++ on a user's machine."""
    names = [*compiler.HEADERS, *(f"{kernel}.cu" for kernel in dispatch.KERNELS)]
    for name in names:
        found = re.findall(r"#include\s+(\S+)", compiler.source_text(name))
        assert set(found) <= {*(f'"{h}"' for h in compiler.HEADERS), '"host.h"'}
    assert {path.name for path in compiler.source_folder().glob("*.cu*")} == set(names)


@pytest.fixture
def needs_nvrtc() -> None:
    if not has_nvrtc():
        pytest.skip("no NVRTC")


@pytest.mark.usefixtures("needs_nvrtc")
def test_nvrtc_compiles_and_the_cache_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKFAC_CACHE", str(tmp_path / "kernels"))
    variant = diagonal_variant(FLOAT, compiler.FEW)
    code, compiled = compiler.cached_code(variant, "sm_90")
    assert compiled
    assert code[:4] == b"\x7fELF"
    assert compiler.cached_code(variant, "sm_90") == (code, False)
    other, compiled = compiler.cached_code(variant, "sm_80")
    assert compiled
    assert other != code


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=pytest.mark.slow if i else ())
        for i, v in enumerate(
            sorted(
                (v for v in dispatch.every_variant() if v.warpgroups),
                key=lambda v: v.source != "scalings",
            )
        )
    ],
    ids=str,
)
def test_nvrtc_takes_products_of_warpgroups(variant: Variant) -> None:
    """It knows less than nvcc: of lambdas without types, for example."""
    code, words = compiler.compile_variant(variant, "sm_90")
    assert code
    assert "warning" not in words


@pytest.mark.usefixtures("needs_nvrtc")
def test_the_compiler_leaves_the_locale_alone(tmp_path: Path) -> None:
    """What ``open()`` reads by default is the thread's locale, which NVRTC changes."""
    (tmp_path / "text").write_text("\u2013", encoding="utf-8")
    before = locale.getpreferredencoding(False)
    compiler.compile_variant(diagonal_variant(FLOAT, compiler.FEW), "sm_90")
    assert locale.getpreferredencoding(False) == before
    with open(tmp_path / "text") as file:
        assert file.encoding == before


@pytest.mark.usefixtures("needs_nvrtc")
def test_a_failure_carries_the_compilers_words() -> None:
    variant = Variant("gram", (("TILE", 65),))
    with pytest.raises(compiler.CompilationError, match="the layouts below are for"):
        compiler.compile_variant(variant, "sm_90")


@pytest.mark.slow
def test_an_installed_wheel_has_the_sources(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(".git", "build", "*.egg-info", "results", "data")
    shutil.copytree(root, copy, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    target = tmp_path / "site"
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(target), str(copy)], check=True
    )
    shutil.rmtree(copy)
    code = (
        "from ekfac.kernels.cuda import compiler\nprint(compiler.fingerprint('gram'))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == compiler.fingerprint("gram"), result.stderr
