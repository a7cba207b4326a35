"""An engine that runs the kernels of ``csrc/`` on the CPU, compiled by g++."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.compiler import Variant
from ekfac.kernels.cuda.launch import Launch

HOST = Path(__file__).parent / "host"
Build = tuple[Variant, Path, str]  # a variant, its sources, one of MODES
MODES = ("plain", "checked", "counted")
_libraries: dict[Build, ctypes.CDLL] = {}


class KernelFault(AssertionError):
    """A kernel did what no device allows; the message says where."""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ekfac-host-")


def _start(build: Build) -> tuple[Path, subprocess.Popen[str]]:
    """Start compiling a variant for the CPU.

    To be checked, accesses are instrumented as for the detection of data races; what
    that calls is in ``host/checks.h``, not the compiler's library.
    """
    variant, folder, mode = build
    compiler = shutil.which("g++")
    assert compiler is not None, "these tests need g++"
    name = hashlib.sha256(repr(build).encode()).hexdigest()[:16]
    target = Path(_folder().name) / f"{name}.so"
    flags = ["-std=c++17", "-fPIC", "-fno-gnu-unique", "-x", "c++"]
    flags += ["-Wall", "-Werror", "-Wno-unknown-pragmas", "-DEKFAC_HOST"]
    flags += [f"-I{HOST}", *variant.flags()]
    if mode != "plain":
        flags += ["-O1", "-DEKFAC_CHECKED", "-fsanitize=thread"]
    if mode == "counted":
        flags += ["-DEKFAC_COUNTED"]
    words = [compiler, *flags, "-c", str(folder / f"{variant.source}.cu")]
    object_file = target.with_suffix(".o")
    linked = [compiler, "-shared", str(object_file), "-o", str(target)]
    script = 'n=$1; shift; "${@:1:n}" && "${@:n+1}"'
    command = [*words, "-o", str(object_file)]
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", str(len(command)), *command, *linked],
        stderr=subprocess.PIPE,
        text=True,
    )
    return target, process


def _open(target: Path, *, checked: bool) -> ctypes.CDLL:
    """Return a compiled library, told where its shared memory is."""
    library = ctypes.CDLL(str(target))
    library.host_launch.restype = ctypes.c_char_p
    if not checked:
        return library
    table = subprocess.run(
        ["objdump", "-t", str(target)], capture_output=True, text=True, check=True
    ).stdout
    shared = re.findall(r"^(\w+) .*\bekfac_shared\t(\w+) +_ZZ", table, re.MULTILINE)
    for offset, size in shared:
        library.host_shared(
            ctypes.c_long(int(offset, 16)), ctypes.c_long(int(size, 16))
        )
    return library


def compile_together(
    variants: Iterable[Variant],
    folder: Path | None = None,
    *,
    checked: bool = False,
    counted: bool = False,
) -> list[ctypes.CDLL]:
    """Compile the variants that are not yet, all at the same time.

    Args:
        variants: What to compile.
        folder: Of the sources; ``None`` for those that there are.
        checked: With checks at every access.
        counted: With counts of what is asked of memory too.
    """
    mode = "counted" if counted else "checked" if checked else "plain"
    builds = [(v, folder or compiler.source_folder(), mode) for v in variants]
    started = {b: _start(b) for b in dict.fromkeys(builds) if b not in _libraries}
    for build, (target, process) in started.items():
        _, words = process.communicate()
        assert process.returncode == 0, words
        _libraries[build] = _open(target, checked=build[2] != "plain")
    return [_libraries[build] for build in builds]


def _mask(tensor: Tensor) -> Tensor:
    """Return which bytes of a tensor's extent are elements of it."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    reach = sum((n - 1) * step for n, step in extents) + 1
    mask = torch.zeros(reach, tensor.element_size(), dtype=torch.uint8)
    steps = [step * tensor.element_size() for step in tensor.stride()]
    shape = (*tensor.shape, tensor.element_size())
    mask.as_strided(shape, (*steps, 1)).fill_(1)
    return mask.flatten()


class HostEngine:
    """Runs kernels on CPU tensors, thread by thread.

    Args:
        multiprocessors: What the plans are told; more of them split sums further.
        backwards: Let threads take turns in the opposite order.
        problems: Layers of one launch.
        folder: Of the sources; ``None`` for those that there are.
        checked: Check every access to memory.
        counted: Count too what every block asks of memory.
        warpgroups: Use variants with products of warpgroups.
    """

    device = torch.device("cpu")
    shared = 160 << 10

    def __init__(
        self,
        multiprocessors: int = 2,
        *,
        backwards: bool = False,
        problems: int = compiler.FEW,
        folder: Path | None = None,
        checked: bool = False,
        counted: bool = False,
        warpgroups: bool = False,
    ) -> None:
        self.warpgroups = warpgroups
        self.multiprocessors = multiprocessors
        self.backwards = backwards
        self.problems = problems
        self.folder = folder
        self.checked = checked or counted
        self.counted = counted
        self.launched: list[str] = []

    def load(self, variant: Variant) -> None:
        self._library(variant)

    def _library(self, variant: Variant) -> ctypes.CDLL:
        (library,) = compile_together(
            [variant], self.folder, checked=self.checked, counted=self.counted
        )
        return library

    def counts(self, variant: Variant) -> list[list[int]]:
        """Return what every block has asked of memory since the last call.

        Wavefronts of reads and of writes in shared memory, sectors of 32 bytes read and
        written in global memory, and requests of warps.
        """
        limit = 4096
        table = (ctypes.c_long * (5 * limit))()
        found = self._library(variant).host_counts(table, ctypes.c_long(limit))
        return [table[5 * i : 5 * i + 5] for i in range(found)]

    def _tell(self, library: ctypes.CDLL, one: Launch) -> None:
        """Tell a library what a launch may touch."""
        library.host_forget()
        scratch = {id(tensor) for tensor in one.scratch}
        for tensor in one.keep:
            if not tensor.numel():
                continue
            mask = _mask(tensor)
            filled = id(tensor) not in scratch
            library.host_buffer(
                f"tensor {tuple(tensor.shape)}".encode(),
                ctypes.c_void_p(tensor.data_ptr()),
                ctypes.c_long(mask.numel()),
                ctypes.c_void_p(mask.data_ptr()),
                int(filled),
            )

    def launch(self, one: Launch) -> None:
        library = self._library(one.variant)
        expected = getattr(library, f"{one.kernel}_bytes")()
        size = ctypes.sizeof(one.params)
        assert size == expected, f"{one.kernel}: parameters differ in size"
        self.launched.append(one.kernel)
        if self.checked:
            self._tell(library, one)
        function = ctypes.cast(getattr(library, one.kernel), ctypes.c_void_p)
        words = library.host_launch(
            function,
            ctypes.byref(one.params),
            size,
            one.grid,
            one.threads,
            one.shared,
            int(self.backwards),
        )
        if words is not None:
            raise KernelFault(f"{one.variant}, {one.kernel}: {words.decode()}")
