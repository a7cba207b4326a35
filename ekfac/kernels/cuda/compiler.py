"""Sources of csrc/, their compilation by NVRTC, and the cache of machine code.

CUDA builds of PyTorch bring NVRTC along; it is called through ctypes. The folder of
the cache belongs to the user alone. A file starts with a digest of its own name and of
what follows; one that does not match is removed, and made again by whoever asked for
it. Files appear whole or not at all, and a folder that cannot be written costs a
compilation in each process, nothing else.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ekfac.errors import EkfacWarning
from ekfac.files import write_whole

# The values of INPUT in csrc/common.cuh.
FLOAT, TF32, BFLOAT16, HALF = range(4)
INPUTS = {
    torch.float32: FLOAT,
    torch.bfloat16: BFLOAT16,
    torch.float16: HALF,
}
INPUT_NAMES = ("float32", "tf32", "bfloat16", "float16")

HEADERS = (
    "common.cuh",
    "operands.cuh",
    "tensor.cuh",
    "tiles.cuh",
    "pipeline.cuh",
    "warpgroup.cuh",
    "left.cuh",
    "transposed.cuh",
)

# Layers of one launch: what 4 KiB of launch parameters hold, and what 32 KiB do.
FEW, MANY = 16, 128


@dataclass(frozen=True, order=True)
class Variant:
    """One source with its compile-time constants.

    Attributes:
        source: Name of the file in ``csrc/``, without its ending.
        defines: Names and values of the constants.
    """

    source: str
    defines: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """Return a name for tables and messages."""
        words = [self.source]
        for name, value in self.defines:
            if name == "INPUT":
                words.append(INPUT_NAMES[value])
            elif name in ("TILE", "SIDE"):
                words.append(str(value))
            elif name != "PROBLEMS" and value:
                words.append(name.lower())
        return " ".join(words)

    @property
    def warpgroups(self) -> bool:
        """Whether products are those of warpgroups, for capability 9.0 and no other."""
        return bool(dict(self.defines).get("WARPGROUP"))

    def flags(self) -> list[str]:
        """Return the constants as compiler options."""
        return [f"-D{name}={value}" for name, value in self.defines]

    def target(self, architecture: str) -> str:
        """Return what the compiler is told: an architecture with all that it alone has.

        Args:
            architecture: For example ``"sm_90"``.
        """
        return f"{architecture}a" if self.warpgroups else architecture


@cache
def source_folder() -> Path:
    """Return where the sources are: inside the package, or beside it in a checkout.

    Raises:
        FileNotFoundError: If neither place has them.
    """
    package = Path(__file__).resolve().parent.parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"no csrc/common.cuh in {package} or beside it: the package was installed "
        "without its CUDA sources; install a wheel, or a checkout with csrc/."
    )


@cache
def source_text(name: str) -> str:
    """Return the text of one file of ``csrc/``."""
    return (source_folder() / name).read_text(encoding="utf-8")


@cache
def every_source() -> tuple[str, ...]:
    """Return the fingerprints of all sources."""
    names = sorted(path.stem for path in source_folder().glob("*.cu"))
    return tuple(map(fingerprint, names))


@cache
def kernel_names(source: str) -> tuple[str, ...]:
    """Return the functions that a source defines with ``KERNEL``."""
    text = source_text(f"{source}.cu")
    return tuple(re.findall(r"^KERNEL\((\w+),", text, re.MULTILINE))


@cache
def has_dynamic_shared(variant: Variant) -> bool:
    """Return whether a variant's kernels have dynamic shared memory, and no other.

    A source that can be compiled with a pipeline has it there alone; the static memory
    of its other variants leaves no room for as much as a device allows.
    """
    text = source_text(f"{variant.source}.cu")
    pipeline = dict(variant.defines).get("PIPELINE") or "PIPELINE" not in text
    return bool(pipeline) and "SHARED_BYTES(" in text


@cache
def fingerprint(source: str) -> str:
    """Return a hash of one source with its headers."""
    names = (f"{source}.cu", *HEADERS)
    return hashlib.sha256("\0".join(map(source_text, names)).encode()).hexdigest()


# -- NVRTC -----------------------------------------------------------------------------


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
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for pattern in ("cu1*/lib", "cuda_nvrtc/lib", "cu1*/bin", "cuda_nvrtc/bin"):
            yield from sorted(Path(location).glob(pattern))
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


def options(variant: Variant, architecture: str) -> list[str]:
    """Return the compiler's options for a variant, ``architecture`` as ``"sm_90"``."""
    target = variant.target(architecture)
    return [f"--gpu-architecture={target}", "--std=c++17", *variant.flags()]


def compile_variant(variant: Variant, architecture: str) -> tuple[bytes, str]:
    """Return machine code for an architecture, and the compiler's remarks.

    Raises:
        CompilationError: With the compiler's words.
        FileNotFoundError: Without NVRTC, or without the sources.
        MemoryError: Without memory for the compiler.
    """
    # NVRTC leaves the locale "C" to the thread that calls it, in which open() reads
    # nothing but ASCII from then on: it gets a thread of its own.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_compile, variant, architecture).result()


def _compile(variant: Variant, architecture: str) -> tuple[bytes, str]:
    """Do what :func:`compile_variant` says."""
    nvrtc, program = library(), ctypes.c_void_p()
    name = f"{variant.source}.cu"
    headers = [source_text(header) for header in HEADERS]
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            source_text(name).encode(),
            name.encode(),
            len(headers),
            _strings(headers),
            _strings(HEADERS),
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


# -- cache -----------------------------------------------------------------------------


DIGEST = 32  # bytes of SHA-256


def cache_folder() -> Path:
    """Return where files are kept: under ``EKFAC_CACHE``, or the user's cache.

    A user without a home, as in many containers, has it among the temporary files.
    """
    folder = os.environ.get("EKFAC_CACHE")
    if folder:
        return Path(folder) / "cubins"
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return base.expanduser() / "ekfac" / "cubins"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"ekfac-{os.getuid()}" / "cubins"


def why_unsafe(path: Path) -> str | None:
    """Return why files of a folder may be somebody else's, or ``None``."""
    try:
        status = path.lstat()
    except OSError:
        return None  # there is none yet
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a folder"
    if not hasattr(os, "geteuid"):
        return None  # Windows: the profile's own rights hold
    if status.st_uid != os.geteuid():
        return f"it belongs to the user with number {status.st_uid}"
    if status.st_mode & 0o077:
        return f"others may enter it (mode {stat.S_IMODE(status.st_mode):03o})"
    for parent in path.absolute().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"others may exchange it: they can write to {parent}"
    return None


def _usable(path: Path) -> bool:
    """Return whether a folder may be used; warn if not."""
    reason = why_unsafe(path)
    if reason is not None:
        warnings.warn(
            f"compiled kernels are not kept in {path}: {reason}. Remove it or `chmod "
            "700` it, or set EKFAC_CACHE to another folder.",
            EkfacWarning,
            stacklevel=2,
        )
    return reason is None


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def read_cached(name: str) -> bytes | None:
    """Return a file's content, or ``None`` if it is missing, foreign or damaged."""
    path = cache_folder() / name
    if not path.is_file() or not _usable(path.parent):
        return None
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    content = raw[DIGEST:]
    if content and raw[:DIGEST] == _digest(name, content):
        return content
    discard_cached(name)
    return None


def write_cached(name: str, content: bytes) -> None:
    """Keep a file, if that is possible."""
    path = cache_folder() / name
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _usable(path.parent):
            write_whole(path, _digest(name, content) + content, 0o600)


def discard_cached(name: str) -> None:
    """Remove a file, if that is possible."""
    with suppress(OSError):
        (cache_folder() / name).unlink(missing_ok=True)


def cache_name(variant: Variant, architecture: str) -> str:
    """Return a variant's name in the cache.

    A hash of its source with the headers, the options with the architecture among them,
    and the compiler's version.
    """
    parts = (
        fingerprint(variant.source),
        *options(variant, architecture),
        variant.source,
        str(version()),
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{variant.source}-{key[:32]}.cubin"


def cached_code(variant: Variant, architecture: str) -> tuple[bytes, bool]:
    """Return machine code from the cache, or compiled and put there.

    Returns:
        The code and whether it had to be compiled.

    Raises:
        CompilationError: With the compiler's words.
        FileNotFoundError: Without NVRTC, or without the sources.
    """
    name = cache_name(variant, architecture)
    cached = read_cached(name)
    if cached is not None:
        return cached, False
    code, _ = compile_variant(variant, architecture)
    write_cached(name, code)
    return code, True
