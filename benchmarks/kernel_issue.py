"""Instructions that a warp issues in a step, from the machine code of a kernel.

A multiprocessor has four schedulers, each of which issues one instruction in a cycle
for one of its warps: a loop with many instructions besides its products is bound by
them. The loop over steps is read as a graph without its way back; of all ways through
it that do the most products and start the most copies, the shortest is counted. What
the branches in between decide is not known from the code, so this is the least.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.compiler import TF32, Variant

SCHEDULERS = 4
PRODUCT, COPY, STORE = "HMMA", "LDGSTS", "STS"
OF_WARPGROUPS = "HGMMA"
# Of warpgroups, what brings operands: words of TF32 are loaded and stored by threads,
# of half types the left one of two operands is loaded. Where that is in registers, a
# round of the loop has several steps.
BRINGS = {
    ("gram", False): (COPY,),
    ("gram", True): ("STS.128", "LDG.E.64"),
    ("scalings", False): (COPY, "LDG.E"),
    ("scalings", True): ("STS.128", "LDG.E.64"),
}
ROUND = {("gram", True): 3, ("scalings", False): 4, ("scalings", True): 4}
Counted = tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """One kernel's instructions.

    Attributes:
        instructions: In order.
        labels: Where they lead to, as numbers of instructions.
    """

    instructions: list[str]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str, kernel: str) -> Code:
        """Return a kernel's code from what nvdisasm prints."""
        body = text.split(f".text.{kernel}:", 1)[1].split(".section", 1)[0]
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in body.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label.group(1)] = len(instructions)
            elif word := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                instructions.append(word.group(1))
        return cls(instructions, labels)

    def target(self, number: int) -> int | None:
        """Return where an instruction may branch to."""
        found = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", self.instructions[number])
        return self.labels[found.group(1)] if found else None

    def loop(self, product: str = PRODUCT) -> tuple[int, int] | None:
        """Return first and last instruction of the loop over steps, or ``None``.

        Of all loops it has the most products, and of those it is the smallest.
        """
        loops = []
        for end in range(len(self.instructions)):
            start = self.target(end)
            if start is None or start >= end:
                continue
            products = sum(product in one for one in self.instructions[start:end])
            loops.append((-products, end - start, start, end))
        return min(loops)[2:] if loops and min(loops)[0] else None

    def followers(self, number: int, last: int) -> list[int]:
        """Return what may come after an instruction inside of a loop."""
        target = self.target(number)
        guarded = self.instructions[number].startswith("@")
        found = [number + 1] if target is None or guarded else []
        if target is not None and number < target <= last:
            found.append(target)
        return found

    def issued(self, *wanted: str) -> int | None:
        """Return the least that a warp issues in a step, or ``None`` without a loop.

        Args:
            *wanted: Words of instructions of which a way has to have the most; the
                first ones count most.
        """
        ends = self.loop(wanted[0])
        if ends is None:
            return None
        first, last = ends
        best: dict[int, Counted] = {}
        for number in range(last, first - 1, -1):
            name = self.instructions[number]
            gains = (*(int(word in name) for word in wanted), -1)
            rest = [best[n] for n in self.followers(number, last) if n in best]
            if number == last:
                best[number] = gains
            elif rest:
                pairs = zip(gains, max(rest), strict=True)
                best[number] = tuple(a + b for a, b in pairs)
        return -best[first][-1]


def disassembly(variant: Variant) -> str | None:
    """Return a variant's machine code for sm_90 as text, or ``None`` without tools."""
    bundled = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin/nvdisasm")
    program = shutil.which("nvdisasm") or next(map(str, bundled), None)
    nvcc = shutil.which("nvcc")
    if program is None or nvcc is None:
        return None
    source = compiler.source_folder() / f"{variant.source}.cu"
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "code.cubin")
        command = [nvcc, "-std=c++17", f"-arch={variant.target('sm_90')}", "-cubin"]
        command += variant.flags()
        subprocess.run([*command, "-o", cubin, str(source)], check=True)
        result = subprocess.run(
            [program, "-c", cubin], check=True, capture_output=True, text=True
        )
    return result.stdout


def issue_cycles(variant: Variant, threads: int) -> float | None:
    """Return the cycles in which a pipeline's step is issued, or ``None`` if unknown.

    The rows of a step are found by one warp, and schedulers take turns with that. Other
    variants read without copies, so that the shortest way reads nothing.
    """
    text = disassembly(variant) if dict(variant.defines).get("PIPELINE") else None
    code = None if text is None else Code.parse(text, variant.source)
    product = OF_WARPGROUPS if variant.warpgroups else PRODUCT
    kind = variant.source, dict(variant.defines)["INPUT"] == TF32
    copies = BRINGS[kind] if variant.warpgroups else (COPY,)
    each = None if code is None else code.issued(product, *copies)
    rows = None if code is None else code.issued(product, *copies, STORE)
    if each is None or rows is None:
        return None
    steps = ROUND.get(kind, 1) if variant.warpgroups else 1
    return (each * threads / 32 + rows - each) / SCHEDULERS / steps
