"""Random inputs and errors for the first use of a kernel, which tries it.

Every kernel's file has its own small problem with a known answer; here is what they
share. Nothing depends on torch's default type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels.cuda import nvrtc_sources
from ekfac.kernels.cuda.launch import Engine
from ekfac.kernels.cuda.nvrtc_sources import Variant

TYPES = {kind: dtype for dtype, kind in nvrtc_sources.INPUTS.items()}
TYPES[nvrtc_sources.TF32] = torch.float32


def tolerance(variant: Variant) -> float:
    """Return the relative error that a variant may have."""
    if dict(variant.defines).get("INPUT") == nvrtc_sources.TF32:
        return 3e-3  # ten bits of mantissa
    return 1e-5


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return ``|found - expected| / |expected|``, not a number if one is not."""
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm())


def largest(errors: list[float]) -> float:
    """Return the largest; a number that is none counts as that."""
    return max(errors, key=lambda e: float("inf") if e != e else e)


class Numbers:
    """Random tensors of the type and on the device of a variant."""

    def __init__(self, engine: Engine, variant: Variant) -> None:
        self.generator = torch.Generator().manual_seed(0)
        kind = dict(variant.defines).get("INPUT", nvrtc_sources.FLOAT)
        self.dtype, self.device = TYPES[kind], engine.device

    def rows(self, *shape: int) -> Tensor:
        """Return normal numbers."""
        kind = torch.float32
        numbers = torch.randn(*shape, generator=self.generator, dtype=kind)
        return numbers.to(device=self.device, dtype=self.dtype)

    def poison(self, *shape: int) -> Tensor:
        """Return float32 results that are not there yet."""
        nan = float("nan")
        return torch.full(shape, nan, dtype=torch.float32, device=self.device)

    def weight(self, *shape: int) -> Tensor:
        """Return weights over eight orders of magnitude, of which a quarter is zero."""
        numbers = torch.rand(*shape, generator=self.generator, dtype=torch.float32)
        return (10 ** (8 * numbers - 4) * (numbers > 0.25)).to(self.device)
