"""Choice between a launch and the reference, and what happens if a launch cannot be.

A kernel is compiled when it is first asked for and then tried on a small problem whose
answer is known; one that does not compile or gives a wrong answer is never used, the
reference takes its place, and one warning says so. ``EKFAC_KERNELS=reference`` does
without them from the start.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ekfac.errors import EkfacWarning
from ekfac.kernels.cuda import checking, jacobi, registry
from ekfac.kernels.cuda.driver import DeviceEngine
from ekfac.kernels.cuda.kernel import MapOperator, SumOperator
from ekfac.kernels.cuda.launch import Engine, Launch, execute
from ekfac.kernels.cuda.nvrtc_sources import Variant

logger = logging.getLogger(__name__)

# Of the device, and of the compiler.
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
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


def why_unavailable(device: torch.device) -> str | None:
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


class KernelCache:
    """The kernels of one engine: which are ready, which are not to be used.

    Attributes:
        engine: Runs them.
        verified: Variants that were tried and found right.
        broken: Variants that are not to be used, and why.
        used: How many launches there were of each kernel.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.verified: set[Variant] = set()
        self.broken: dict[Variant, str] = {}
        self.used: Counter[str] = Counter()
        self._lock = RLock()  # the background search for bases asks too

    def ready(self, variants: Sequence[Variant]) -> bool:
        """Return whether all may be used, after compiling and trying the new ones."""
        if self.verified.issuperset(variants):
            return True
        with self._lock:
            return self._try_new(variants)

    def _try_new(self, variants: Sequence[Variant]) -> bool:
        for variant in sorted(set(variants) - self.verified):
            if variant in self.broken:
                return False
            if _capturing():
                return False  # nothing can be loaded or tried now; perhaps later
            try:
                reason = self._try(variant)
            except OUT_OF_MEMORY as error:
                logger.info("no memory to try the CUDA kernel %s: %s", variant, error)
                return False  # not now; it says nothing of the kernel
            if reason is not None:
                self.broken[variant] = reason
                warnings.warn(
                    f"the CUDA kernel {variant} is not used, PyTorch's own operations "
                    f"take its place (EKFAC_KERNELS=reference silences this): {reason}",
                    EkfacWarning,
                    stacklevel=2,
                )
                return False
            self.verified.add(variant)
        return True

    def _try(self, variant: Variant) -> str | None:
        """Return what is wrong with a variant, or ``None``."""
        before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
        try:
            if before:
                torch.cuda.set_sync_debug_mode(0)
            self.engine.load(variant)
            error = registry.error_of(self.engine, variant)
        except OUT_OF_MEMORY:
            raise
        except (RuntimeError, OSError) as problem:
            return f"{type(problem).__name__}: {problem}"
        finally:
            if before:
                torch.cuda.set_sync_debug_mode(before)
        limit = checking.tolerance(variant)
        if not error <= limit:
            return f"its result is off by {error:.1e}, allowed is {limit:.1e}"
        return None

    def run(self, launches: Sequence[Launch]) -> bool:
        """Run launches, or return ``False`` having run none."""
        if not self.ready([launch.variant for launch in launches]):
            return False
        execute(self.engine, launches)
        with self._lock:
            self.used.update(launch.kernel for launch in launches)
        return True

    def run_planned(self, plan: Callable[[], list[Launch]]) -> bool:
        """Run the launches of a plan; ``False`` too if there is no memory for it."""
        try:
            launches = plan()
        except OUT_OF_MEMORY as error:
            logger.info("no memory for the workspace of a CUDA kernel: %s", error)
            return False
        return self.run(launches)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_caches: dict[int, KernelCache | None] = {}
_caches_lock = RLock()


def _cache_of(index: int) -> KernelCache | None:
    """Return the kernels of a CUDA device, or ``None``, the first time with a warning.

    Without memory it is ``None`` until there is some.
    """
    with _caches_lock:
        if index not in _caches:
            try:
                _caches[index] = _new_cache(index)
            except OUT_OF_MEMORY as error:
                logger.info("no memory for CUDA kernels: %s", error)
                return None
        return _caches[index]


def _new_cache(index: int) -> KernelCache | None:
    try:
        return KernelCache(DeviceEngine(torch.device("cuda", index)))
    except OUT_OF_MEMORY:
        raise
    except (RuntimeError, OSError) as problem:
        warnings.warn(
            "there are no compiled kernels, PyTorch's own operations take their place: "
            f"{problem}",
            EkfacWarning,
            stacklevel=2,
        )
        return None


def kernel_cache(device: torch.device) -> KernelCache | None:
    """Return the kernels of a device, or ``None`` if it can have none."""
    if why_unavailable(device) is not None:
        return None
    index = device.index
    return _cache_of(torch.cuda.current_device() if index is None else index)


def takes(operator: SumOperator, item: Any) -> bool:
    """Return whether a launch can do one sum, after compiling what it needs."""
    kernels = kernel_cache(item.out.device)
    if kernels is None or not operator.supported(item):
        return False
    if not item.out.numel():
        return True
    return kernels.ready([operator.variant(kernels.engine, item)])


def run_sums(operator: SumOperator, items: Sequence[Any]) -> list[bool]:
    """Launch what the kernel supports of items of one device; return which that was."""
    kernels = kernel_cache(items[0].out.device) if items else None
    if kernels is None:
        return [False] * len(items)
    supported = [operator.supported(item) for item in items]
    chosen = [item for item, good in zip(items, supported, strict=True) if good]
    engine = kernels.engine
    done = (
        kernels.run_planned(lambda: operator.plan(engine, chosen)) if chosen else True
    )
    return [good and done for good in supported]


def run_map(
    operator: MapOperator, layers: Sequence[Any], *values: float
) -> Tensor | None:
    """Launch an element-wise kernel for all layers; return their sums, or ``None``."""
    if not layers or not all(layer.supported() for layer in layers):
        return None
    device = layers[0].projected.device
    kernels = kernel_cache(device)
    if kernels is None:
        return None
    shape, engine = (len(layers), *operator.sums), kernels.engine
    sums = torch.empty(shape, dtype=torch.float32, device=device)
    done = kernels.run_planned(lambda: operator.plan(engine, layers, sums, *values))
    return sums if done else None


def eigenvectors(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Launch ``jacobi`` for symmetric matrices ``[n, d, d]``, if it supports them.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors in columns.
    """
    kernels = kernel_cache(matrices.device)
    if kernels is None or matrices.dtype != torch.float32 or not matrices.numel():
        return None
    if jacobi.jacobi_bytes(matrices.shape[-1]) > kernels.engine.shared:
        return None
    work = matrices.clone(memory_format=torch.contiguous_format)
    vectors = torch.empty_like(work)
    if not kernels.run(jacobi.plan_jacobi(work, vectors)):
        return None
    values, order = work.diagonal(dim1=-2, dim2=-1).sort(dim=-1)
    return values, vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
