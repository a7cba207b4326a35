"""The compiler NVRTC, which CUDA builds of PyTorch bring along, through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from ekfac.kernels.cuda import nvrtc_sources as sources

OUT_OF_MEMORY = 1  # NVRTC_ERROR_OUT_OF_MEMORY


class CompilationError(RuntimeError):
    """The compiler refused a source; the message carries its words."""


def _library_names(major: str | None) -> Iterator[str]:
    """Yield what NVRTC may be called, the version that torch was built for first."""
    for version in [major] if major else ["13", "12", "11.2"]:
        if sys.platform == "win32":
            yield f"nvrtc64_{version.replace('.', '')}0_0.dll"
        else:
            yield f"libnvrtc.so.{'11.2' if version == '11' else version}"


def library_folders() -> Iterator[Path]:
    """Yield where pip puts NVIDIA's libraries, and torch its own."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("cu1*/lib", "cuda_nvrtc/lib", "cu1*/bin", "cuda_nvrtc/bin"):
            yield from sorted(Path(place).glob(pattern))
    yield Path(torch.__file__).parent / "lib"


def opened(name: str) -> ctypes.CDLL | None:
    """Return a shared library, or ``None`` if it cannot be loaded."""
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


@cache
def library() -> ctypes.CDLL:
    """Return NVRTC.

    Raises:
        FileNotFoundError: If it is nowhere.
    """
    cuda = torch.version.cuda
    names = list(_library_names(cuda.split(".")[0] if cuda else None))
    for name in names:
        candidates = [str(folder / name) for folder in library_folders()]
        for candidate in [*(c for c in candidates if Path(c).is_file()), name]:
            loaded = opened(candidate)
            if loaded is not None:
                return loaded
    raise FileNotFoundError(
        f"no NVRTC library ({', '.join(names)}): CUDA builds of PyTorch bring it; "
        "otherwise install nvidia-cuda-nvrtc."
    )


@cache
def version() -> tuple[int, int]:
    """Return NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def options(variant: sources.Variant, architecture: str) -> list[str]:
    """Return the compiler's options for a variant, ``architecture`` as ``"sm_90"``."""
    return [f"--gpu-architecture={architecture}", "--std=c++17", *variant.flags()]


def compile_variant(variant: sources.Variant, architecture: str) -> tuple[bytes, str]:
    """Return machine code for an architecture, and the compiler's remarks.

    Args:
        variant: What to compile.
        architecture: For example ``"sm_90"``.

    Raises:
        CompilationError: With the compiler's words.
        FileNotFoundError: Without NVRTC, or without the sources.
    """
    # NVRTC leaves the locale "C" to the thread that calls it, in which open() reads
    # nothing but ASCII from then on: it gets a thread of its own.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_compile, variant, architecture).result()


def _compile(variant: sources.Variant, architecture: str) -> tuple[bytes, str]:
    """Do what :func:`compile_variant` says."""
    nvrtc, program = library(), ctypes.c_void_p()
    name = f"{variant.source}.cu"
    headers = [sources.text(header) for header in sources.HEADERS]
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            sources.text(name).encode(),
            name.encode(),
            len(headers),
            _strings(headers),
            _strings(sources.HEADERS),
        )
    )
    try:
        flags = options(variant, architecture)
        result = nvrtc.nvrtcCompileProgram(program, len(flags), _strings(flags))
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        words = log.rstrip(b"\0").decode(errors="replace").strip()
        if result == OUT_OF_MEMORY:
            _check(result)
        if result:
            raise CompilationError(
                f"NVRTC {'.'.join(map(str, version()))} could not compile {name} "
                f"({' '.join(flags)}):\n{words or _words(result)}"
            )
        code = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return code, words
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def _read(
    size_of: Callable[..., int], read: Callable[..., int], program: object
) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(max(1, size.value))
    _check(read(program, buffer))
    return buffer.raw[: size.value]


def _words(code: int) -> str:
    function = library().nvrtcGetErrorString
    function.restype = ctypes.c_char_p
    return str(function(code).decode())


def _check(code: int) -> None:
    if code == OUT_OF_MEMORY:
        raise MemoryError("NVRTC is out of memory")
    if code:
        raise CompilationError(f"NVRTC failed: {_words(code)}")
