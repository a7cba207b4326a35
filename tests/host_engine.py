"""An engine that runs the kernels of ``csrc/`` on the CPU, compiled by g++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from ekfac.kernels import sources
from ekfac.kernels.sources import Variant

HOST = Path(__file__).parent / "host"


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ekfac-host-"))


@cache
def compiled(variant: Variant) -> ctypes.CDLL:
    """Return a variant as a library for the CPU."""
    target = _folder() / f"{str(variant).replace(' ', '-')}-{len(list(_folder().iterdir()))}.so"
    compiler = shutil.which("g++")
    assert compiler is not None, "these tests need g++"
    command = [compiler, "-std=c++17", "-O0", "-fPIC", "-shared", "-x", "c++"]
    command += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DEKFAC_HOST"]
    command += [f"-I{HOST}", *variant.flags(), "-o", str(target)]
    source = sources.folder() / f"{variant.source}.cu"
    result = subprocess.run(
        [*command, str(source)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(target))


class HostEngine:
    """Runs kernels on CPU tensors, thread by thread.

    Args:
        multiprocessors: What the plans are told; more of them split sums further.
        backwards: Let threads take turns in the opposite order.
    """

    device = torch.device("cpu")
    problems = sources.FEW
    shared = 48 << 10

    def __init__(self, multiprocessors: int = 2, *, backwards: bool = False) -> None:
        self.multiprocessors = multiprocessors
        self.backwards = backwards
        self.launched: list[str] = []

    def load(self, variant: Variant) -> None:
        compiled(variant)

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
        library = compiled(variant)
        expected = getattr(library, f"{kernel}_bytes")()
        assert ctypes.sizeof(params) == expected, f"{kernel}: parameters differ in size"
        self.launched.append(kernel)
        function = ctypes.cast(getattr(library, kernel), ctypes.c_void_p)
        library.host_launch(
            function,
            ctypes.byref(params),
            grid,
            threads,
            shared,
            int(self.backwards),
        )
