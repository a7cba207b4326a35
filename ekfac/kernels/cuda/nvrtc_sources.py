"""The CUDA sources in ``csrc/`` and the variants they are compiled in."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

# The values of INPUT in csrc/common.cuh.
FLOAT, TF32, BFLOAT16, HALF = range(4)
INPUTS = {
    torch.float32: FLOAT,
    torch.bfloat16: BFLOAT16,
    torch.float16: HALF,
}
INPUT_NAMES = ("float32", "tf32", "bfloat16", "float16")

HEADERS = ("common.cuh", "tiles.cuh")

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
            elif name == "TILE":
                words.append(str(value))
            elif name != "PROBLEMS" and value:
                words.append(name.lower())
        return " ".join(words)

    def flags(self) -> list[str]:
        """Return the constants as compiler options."""
        return [f"-D{name}={value}" for name, value in self.defines]


@cache
def folder() -> Path:
    """Return where the sources are: inside the package, or beside it in a checkout.

    Raises:
        FileNotFoundError: If neither place has them.
    """
    package = Path(__file__).resolve().parent.parent.parent
    for place in (package / "csrc", package.parent / "csrc"):
        if (place / "common.cuh").is_file():
            return place
    raise FileNotFoundError(
        f"no csrc/common.cuh in {package} or beside it: the package was installed "
        "without its CUDA sources; install a wheel, or a checkout with csrc/."
    )


@cache
def text(name: str) -> str:
    """Return the text of one file of ``csrc/``."""
    return (folder() / name).read_text(encoding="utf-8")


@cache
def every_source() -> tuple[str, ...]:
    """Return the fingerprints of all sources."""
    names = sorted(path.stem for path in folder().glob("*.cu"))
    return tuple(map(fingerprint, names))


@cache
def kernel_names(source: str) -> tuple[str, ...]:
    """Return the functions that a source defines with ``KERNEL``."""
    return tuple(re.findall(r"^KERNEL\((\w+),", text(f"{source}.cu"), re.MULTILINE))


@cache
def has_dynamic_shared(source: str) -> bool:
    """Return whether a source's kernels have dynamic shared memory."""
    return "SHARED_BYTES(" in text(f"{source}.cu")


@cache
def fingerprint(source: str) -> str:
    """Return a hash of one source with its headers."""
    names = (f"{source}.cu", *HEADERS)
    return hashlib.sha256("\0".join(map(text, names)).encode()).hexdigest()
