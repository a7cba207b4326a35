"""An engine that runs the kernels of ``csrc/`` on the CPU, compiled by g++."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from ekfac.kernels.cuda import nvrtc_sources as sources
from ekfac.kernels.cuda.nvrtc_sources import Variant

HOST = Path(__file__).parent / "host"
_libraries: dict[Variant, ctypes.CDLL] = {}


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ekfac-host-")


def _start(variant: Variant) -> tuple[Path, subprocess.Popen[str]]:
    """Start compiling a variant for the CPU."""
    compiler = shutil.which("g++")
    assert compiler is not None, "these tests need g++"
    name = hashlib.sha256(repr(variant).encode()).hexdigest()[:16]
    target = Path(_folder().name) / f"{name}.so"
    command = [compiler, "-std=c++17", "-O0", "-fPIC", "-shared", "-x", "c++"]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DEKFAC_HOST"]
    command += [f"-I{HOST}", *variant.flags(), "-o", str(target)]
    source = str(sources.folder() / f"{variant.source}.cu")
    process = subprocess.Popen([*command, source], stderr=subprocess.PIPE, text=True)
    return target, process


def compile_together(variants: Iterable[Variant]) -> None:
    """Compile the variants that are not yet, all at the same time."""
    started = {v: _start(v) for v in variants if v not in _libraries}
    for variant, (target, process) in started.items():
        _, words = process.communicate()
        assert process.returncode == 0, words
        _libraries[variant] = ctypes.CDLL(str(target))


class HostEngine:
    """Runs kernels on CPU tensors, thread by thread.

    Args:
        multiprocessors: What the plans are told; more of them split sums further.
        backwards: Let threads take turns in the opposite order.
        problems: Layers of one launch.
    """

    device = torch.device("cpu")
    shared = 160 << 10

    def __init__(
        self,
        multiprocessors: int = 2,
        *,
        backwards: bool = False,
        problems: int = sources.FEW,
    ) -> None:
        self.multiprocessors = multiprocessors
        self.backwards = backwards
        self.problems = problems
        self.launched: list[str] = []

    def load(self, variant: Variant) -> None:
        compile_together([variant])

    def launch(
        self,
        variant: Variant,
        kernel: str,
        params: ctypes.Structure,
        *,
        grid: int,
        threads: int,
        shared: int = 0,
    ) -> None:
        library = _libraries[variant]
        expected = getattr(library, f"{kernel}_bytes")()
        assert ctypes.sizeof(params) == expected, f"{kernel}: parameters differ in size"
        self.launched.append(kernel)
        function = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)
        backwards = int(self.backwards)
        library.host_launch(
            function, ctypes.byref(params), grid, threads, shared, backwards
        )
