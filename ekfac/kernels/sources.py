"""The CUDA sources in ``csrc/`` and the variants they are compiled in."""

from __future__ import annotations

import hashlib
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

KERNELS = (
    "gram",
    "scalings",
    "diagonal",
    "counts",
    "squares",
    "precondition",
    "jacobi",
)
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


def every_variant(problems: int = FEW) -> list[Variant]:
    """Return all variants that the kernels can ask for.

    Args:
        problems: Layers of one launch, :data:`FEW` or :data:`MANY`.
    """
    found = []
    for tile in (64, 128):
        for kind in (FLOAT, TF32, BFLOAT16, HALF):
            found += [gram_variant(kind, tile, p, problems) for p in (False, True)]
        for kind in (FLOAT, TF32):
            found += [scalings_variant(kind, tile, s, problems) for s in (False, True)]
    found += [diagonal_variant(kind, problems) for kind in (FLOAT, BFLOAT16, HALF)]
    plain = [plain_variant(n, problems) for n in ("counts", "squares", "precondition")]
    return [*found, *plain, Variant("jacobi")]


def gram_variant(kind: int, tile: int, patches: bool, problems: int) -> Variant:
    """Return the variant of ``gram`` for an input type and a size of tile."""
    defines = {"INPUT": kind, "TILE": tile, "PATCHES": int(patches)}
    return Variant("gram", (*defines.items(), ("PROBLEMS", problems)))


def scalings_variant(kind: int, tile: int, square: bool, problems: int) -> Variant:
    """Return the variant of ``scalings``; ``square`` for one position."""
    defines = {"INPUT": kind, "TILE": tile, "SQUARE": int(square)}
    return Variant("scalings", (*defines.items(), ("PROBLEMS", problems)))


def diagonal_variant(kind: int, problems: int) -> Variant:
    """Return the variant of ``diagonal`` for an input type."""
    return Variant("diagonal", (("INPUT", kind), ("PROBLEMS", problems)))


def plain_variant(source: str, problems: int) -> Variant:
    """Return the variant of a source of which there is one: float32, no tiles."""
    return Variant(source, (("PROBLEMS", problems),))


@cache
def folder() -> Path:
    """Return where the sources are: inside the package, or beside it in a checkout.

    Raises:
        FileNotFoundError: If neither place has them.
    """
    package = Path(__file__).resolve().parent.parent
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
def fingerprint() -> str:
    """Return a hash of all the sources."""
    names = [*HEADERS, *(f"{kernel}.cu" for kernel in KERNELS)]
    return hashlib.sha256("\0".join(map(text, names)).encode()).hexdigest()
