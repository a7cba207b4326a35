"""Whether a launch takes the place of the reference, and what happens if it cannot.

A kernel is compiled when it is first asked for and then tried on a small problem whose
answer is known; one that does not compile or gives a wrong answer is never used, the
reference takes its place, and one warning says so. ``EKFAC_KERNELS=reference`` does
without them from the start.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ekfac.errors import EkfacWarning
from ekfac.kernels import checks, elementwise, moments, plans
from ekfac.kernels import grams as grams_module
from ekfac.kernels.counts import Counts, plan_counts
from ekfac.kernels.elementwise import Preconditioned, Squares
from ekfac.kernels.engine import DeviceEngine, Engine
from ekfac.kernels.grams import Gram
from ekfac.kernels.moments import Scalings
from ekfac.kernels.plans import Launch
from ekfac.kernels.sources import Variant, plain_variant

MODES = ("auto", "reference")


def mode() -> str:
    """Return what ``EKFAC_KERNELS`` asks for.

    Raises:
        ValueError: If it is none of :data:`MODES`.
    """
    chosen = os.environ.get("EKFAC_KERNELS", "auto") or "auto"
    if chosen not in MODES:
        raise ValueError(
            f"EKFAC_KERNELS={chosen!r} is not one of {MODES}: 'reference' never uses "
            "compiled kernels, 'auto' (or unset) uses them on CUDA devices."
        )
    return chosen


def obstacle(device: torch.device) -> str | None:
    """Return why a device cannot have kernels, or ``None``."""
    if mode() == "reference":
        return "EKFAC_KERNELS=reference"
    if device.type != "cuda":
        return f"{device.type} is not a CUDA device"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        found = ".".join(map(str, capability))
        return f"compute capability {found}, and the kernels need 8.0"
    return None


class Workshop:
    """The kernels of one engine: which are ready, which are not to be used.

    Attributes:
        engine: Runs them.
        trusted: Variants that were tried and found right.
        broken: Variants that are not to be used, and why.
        used: How many launches there were of each kernel.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.trusted: set[Variant] = set()
        self.broken: dict[Variant, str] = {}
        self.used: Counter[str] = Counter()

    def ready(self, variants: Sequence[Variant]) -> bool:
        """Return whether all may be used, after compiling and trying the new ones."""
        for variant in sorted(set(variants) - self.trusted):
            if variant in self.broken:
                return False
            if _capturing():
                return False  # nothing can be loaded or tried now; perhaps later
            reason = self._try(variant)
            if reason is not None:
                self.broken[variant] = reason
                warnings.warn(
                    f"the CUDA kernel {variant} is not used, PyTorch's own operations "
                    f"take its place (EKFAC_KERNELS=reference silences this): {reason}",
                    EkfacWarning,
                    stacklevel=2,
                )
                return False
            self.trusted.add(variant)
        return True

    def _try(self, variant: Variant) -> str | None:
        """Return what is wrong with a variant, or ``None``."""
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
        try:
            if before:
                torch.cuda.set_sync_debug_mode(0)
            self.engine.load(variant)
            error = checks.error_of(self.engine, variant)
        except (RuntimeError, OSError) as problem:
            return f"{type(problem).__name__}: {problem}"
        finally:
            if before:
                torch.cuda.set_sync_debug_mode(before)
        limit = checks.tolerance(variant)
        if not error <= limit:
            return f"its result is off by {error:.1e}, allowed is {limit:.1e}"
        return None

    def run(self, launches: Sequence[Launch]) -> bool:
        """Run launches, or return ``False`` having run none."""
        if not self.ready([launch.variant for launch in launches]):
            return False
        plans.execute(self.engine, launches)
        self.used.update(launch.kernel for launch in launches)
        return True


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def _workshop_of(index: int) -> Workshop | None:
    """Return the workshop of a CUDA device, or ``None`` after a warning."""
    try:
        return Workshop(DeviceEngine(torch.device("cuda", index)))
    except (RuntimeError, OSError) as problem:
        warnings.warn(
            "there are no compiled kernels, PyTorch's own operations take their place: "
            f"{problem}",
            EkfacWarning,
            stacklevel=2,
        )
        return None


def workshop(device: torch.device) -> Workshop | None:
    """Return the kernels of a device, or ``None`` if it can have none."""
    if obstacle(device) is not None:
        return None
    index = device.index
    return _workshop_of(torch.cuda.current_device() if index is None else index)


def _launched(
    items: Sequence[Gram] | Sequence[Scalings] | Sequence[Counts],
    supported: Sequence[bool],
    plan: Callable[..., list[Launch]],
) -> list[bool]:
    """Launch the supported items; return which were."""
    shop = workshop(items[0].out.device) if items else None
    if shop is None:
        return [False] * len(items)
    chosen = [item for item, good in zip(items, supported, strict=True) if good]
    done = shop.run(plan(shop.engine, chosen)) if chosen else True
    return [good and done for good in supported]


def takes(item: Gram | Scalings | Counts, *, diagonal: bool = False) -> bool:
    """Return whether a launch can do one sum, after compiling what it needs."""
    shop = workshop(item.out.device)
    if shop is None or not (
        item.supported(diagonal=diagonal)
        if isinstance(item, Gram)
        else item.supported()
    ):
        return False
    if not item.out.numel():
        return True
    engine = shop.engine
    if isinstance(item, Counts):
        variant = plain_variant("counts", engine.problems)
    elif isinstance(item, Scalings):
        variant, _ = moments.scalings_choice(engine, item)
    elif diagonal:
        variant = grams_module.diagonal_choice(engine, item)
    else:
        variant, _ = grams_module.gram_choice(engine, item)
    return shop.ready([variant])


def grams(items: Sequence[Gram]) -> list[bool]:
    """Launch ``gram`` for what it supports; return which that was."""
    return _launched(items, [i.supported() for i in items], grams_module.plan_grams)


def diagonals(items: Sequence[Gram]) -> list[bool]:
    """Launch ``diagonal`` for what it supports; return which that was."""
    supported = [item.supported(diagonal=True) for item in items]
    return _launched(items, supported, grams_module.plan_diagonals)


def scalings(items: Sequence[Scalings]) -> list[bool]:
    """Launch ``scalings`` for what it supports; return which that was."""
    return _launched(items, [i.supported() for i in items], moments.plan_scalings)


def counts(items: Sequence[Counts]) -> list[bool]:
    """Launch ``counts`` for what it supports; return which that was."""
    return _launched(items, [i.supported() for i in items], plan_counts)


def precondition(layers: Sequence[Preconditioned], power: float) -> Tensor | None:
    """Launch ``precondition`` for all layers; return their sums, or ``None``."""
    if not layers or not all(layer.supported() for layer in layers):
        return None
    shop = workshop(layers[0].projected.device)
    if shop is None:
        return None
    sums = torch.empty(len(layers), 2, device=layers[0].projected.device)
    plan = elementwise.plan_precondition(shop.engine, layers, sums, power)
    return sums if shop.run(plan) else None


def squares(layers: Sequence[Squares]) -> Tensor | None:
    """Launch ``squares`` for all layers; return their sums, or ``None``."""
    if not layers or not all(layer.supported() for layer in layers):
        return None
    shop = workshop(layers[0].scalings.device)
    if shop is None:
        return None
    sums = torch.empty(len(layers), device=layers[0].scalings.device)
    plan = elementwise.plan_squares(shop.engine, layers, sums)
    return sums if shop.run(plan) else None


def eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Launch ``jacobi`` for symmetric matrices ``[n, d, d]``, if it supports them.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors in columns.
    """
    shop = workshop(matrices.device)
    if shop is None or matrices.dtype != torch.float32 or not matrices.numel():
        return None
    if moments.jacobi_bytes(matrices.shape[-1]) > shop.engine.shared:
        return None
    work = matrices.clone(memory_format=torch.contiguous_format)
    vectors = torch.empty_like(work)
    if not shop.run(moments.plan_jacobi(work, vectors)):
        return None
    values, order = work.diagonal(dim1=-2, dim2=-1).sort(dim=-1)
    return values, vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
