"""Choice between a launch and the reference, and the handling of failed launches.

A kernel is compiled when it is first asked for and then tried on a small problem whose
answer is known; one that does not compile or gives a wrong answer is never used, the
reference takes its place, and one warning says so. ``EKFAC_KERNELS=reference`` does
without them from the start.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ekfac.errors import EkfacWarning
from ekfac.kernels.cuda import (
    compiler,
    counts,
    diagonal,
    gram,
    jacobi,
    precondition,
    scalings,
    spectral,
    squares,
)
from ekfac.kernels.cuda.choice import TORCH, Chooser, DeviceClock, Work
from ekfac.kernels.cuda.compiler import FEW, Variant
from ekfac.kernels.cuda.driver import DeviceEngine, has_batched_eigh
from ekfac.kernels.cuda.kernel import Kernel, MapOperator, SumOperator, tolerance
from ekfac.kernels.cuda.launch import Engine, Launch, WithoutWarpgroups, execute
from ekfac.kernels.cuda.tiles import uses_tf32
from ekfac.progress import shown

KERNELS: dict[str, Kernel] = {
    kernel.source: kernel
    for kernel in (
        gram.KERNEL,
        scalings.KERNEL,
        diagonal.KERNEL,
        counts.KERNEL,
        squares.KERNEL,
        precondition.KERNEL,
        spectral.KERNEL,
        jacobi.KERNEL,
    )
}
SUMS: dict[str, SumOperator] = {
    operator.name: operator
    for operator in (
        *gram.OPERATORS,
        *diagonal.OPERATORS,
        *counts.OPERATORS,
        *scalings.OPERATORS,
    )
}
MAPS: dict[str, MapOperator] = {
    operator.name: operator
    for operator in (
        *precondition.OPERATORS,
        *squares.OPERATORS,
        *spectral.OPERATORS,
    )
}


def every_variant(problems: int = FEW) -> list[Variant]:
    """Return all variants that the kernels can ask for."""
    return [v for kernel in KERNELS.values() for v in kernel.variants(problems)]


def usable_variants(engine: Engine) -> list[Variant]:
    """Return the variants that an engine can be asked for."""
    variants = every_variant(engine.problems)
    return [v for v in variants if engine.warpgroups or not v.warpgroups]


def error_of(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    return KERNELS[variant.source].check(engine, variant)


logger = logging.getLogger(__name__)

# What the device raises without memory, and what the compiler does.
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
KERNEL = "kernel"
# The kernel without products of warpgroups, where it is chosen with them otherwise.
PLAIN = "kernel of warps"
MODES = ("auto", "own", "reference")


def mode() -> str:
    """Return what ``EKFAC_KERNELS`` asks for.

    Raises:
        ValueError: If it is none of :data:`MODES`.
    """
    setting = os.environ.get("EKFAC_KERNELS", "auto") or "auto"
    if setting not in MODES:
        raise ValueError(
            f"EKFAC_KERNELS={setting!r} is not one of {MODES}: 'reference' never uses "
            "compiled kernels, 'own' uses all of them on CUDA devices, 'auto' (or "
            "unset) those that are measured to be faster there."
        )
    return setting


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
        version = ".".join(map(str, capability))
        return f"compute capability {version}, and the kernels need 8.0"
    return None


class KernelCache:
    """The kernels of one engine: which are ready, which are not to be used.

    Attributes:
        engine: Runs them.
        chooser: Measures whether they are faster; ``None`` uses them all.
        verified: Variants that were tried and found right.
        broken: Variants that are not to be used, and why.
        used: How many launches there were of each kernel.
    """

    def __init__(self, engine: Engine, chooser: Chooser | None = None) -> None:
        self.engine = engine
        self.chooser = chooser
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
                others = "the kernel without warpgroups or " * variant.warpgroups
                warnings.warn(
                    f"the CUDA kernel {variant} is not used, {others}PyTorch's own "
                    "operations take its place (EKFAC_KERNELS=reference silences "
                    f"this): {reason}",
                    EkfacWarning,
                    stacklevel=2,
                )
                return False
            self.verified.add(variant)
        return True

    def _try(self, variant: Variant) -> str | None:
        """Return what is wrong with a variant, or ``None``."""
        try:
            with _waiting_allowed():
                self.engine.load(variant)
                error = error_of(self.engine, variant)
        except OUT_OF_MEMORY:
            raise
        except (RuntimeError, OSError) as problem:
            return f"{type(problem).__name__}: {problem}"
        limit = tolerance(variant)
        if not error <= limit:
            return f"its result is off by {error:.1e}, allowed is {limit:.1e}"
        return None

    def engines(self, operator: SumOperator, items: Sequence[Any]) -> dict[str, Engine]:
        """Return what can launch supported items, after compiling what they need.

        That is :data:`KERNEL`; where it multiplies by warpgroups :data:`PLAIN` too,
        which takes its place if that is not to be used.
        """

        def needed(engine: Engine) -> list[Variant]:
            return [operator.variant(engine, item) for item in items]

        variants, engines = needed(self.engine), dict[str, Engine]()
        if self.ready(variants):
            engines[KERNEL] = self.engine
            if mode() == "own":
                return engines
        if any(variant.warpgroups for variant in variants):
            plain = WithoutWarpgroups(self.engine)
            if self.ready(needed(plain)):
                engines[PLAIN if engines else KERNEL] = plain
        return engines

    def run(self, launches: Sequence[Launch]) -> bool:
        """Run launches, or return ``False`` having run none."""
        if not self.ready([launch.variant for launch in launches]):
            return False
        execute(self.engine, launches)
        with self._lock:
            self.used.update(launch.kernel for launch in launches)
        return True

    def fastest(self, key: str, candidates: Mapping[str, Work]) -> str:
        """Return the fastest candidate, or the kernel if that is not to be measured.

        Nothing can be measured while a CUDA graph is captured; what is not known then
        is done by torch. Candidates are :data:`TORCH`, :data:`KERNEL` and others,
        without effect on what is in use.
        """
        chooser = self.chooser
        if chooser is None or mode() == "own":
            return KERNEL
        choice = chooser.choices.get(key)
        if choice is not None and choice.name in candidates:
            return choice.name
        if _capturing():
            return TORCH
        with _waiting_allowed(), torch.no_grad():
            return chooser.fastest(key, candidates)

    def run_planned(self, plan: Callable[[], list[Launch]]) -> bool:
        """Run the launches of a plan; ``False`` too if there is no memory for it."""
        try:
            launches = plan()
        except OUT_OF_MEMORY as error:
            logger.info("no memory for the workspace of a CUDA kernel: %s", error)
            return False
        return self.run(launches)


@contextmanager
def _waiting_allowed() -> Iterator[None]:
    """Switch torch's warnings of synchronisation off for a while."""
    before = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    if before:
        torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        if before:
            torch.cuda.set_sync_debug_mode(before)


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
        engine = DeviceEngine(torch.device("cuda", index))
        file = f"choices-{engine.fingerprint()}.json"
        return KernelCache(engine, Chooser(DeviceClock(engine.device), file))
    except OUT_OF_MEMORY:
        raise
    except (RuntimeError, OSError) as problem:
        warnings.warn(
            "there are no compiled kernels, PyTorch's own operations take their place "
            f"(EKFAC_KERNELS=reference silences this): {problem}",
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
    return bool(kernels.engines(operator, [item]))


def run_sums(operator: SumOperator, items: Sequence[Any]) -> list[bool]:
    """Do the items, of one device, that the kernel supports; return which were done.

    The kernel does them, or what was measured to be faster for such a list.
    """
    kernels = kernel_cache(items[0].out.device) if items else None
    if kernels is None:
        return [False] * len(items)
    supported = [operator.supported(item) for item in items]
    launched = [item for item, good in zip(items, supported, strict=True) if good]
    done = _run_supported(kernels, operator, launched) if launched else True
    return [good and done for good in supported]


def _run_supported(
    kernels: KernelCache, operator: SumOperator, items: Sequence[Any]
) -> bool:
    """Do supported items the fastest way; return whether it was done."""
    engines = kernels.engines(operator, [item for item in items if item.out.numel()])
    if not engines:
        return False
    ways = {TORCH: operator.reference_, **operator.alternatives}

    def copies() -> list[Any]:
        return [replace(item, out=item.out.clone()) for item in items]

    def launched(engine: Engine) -> None:
        execute(engine, operator.plan(engine, copies()))

    works: dict[str, Work] = {name: partial(_each, ways[name], copies) for name in ways}
    works |= {name: partial(launched, engine) for name, engine in engines.items()}
    name = kernels.fastest(_key(operator.name, items), works)
    if name in engines:
        return kernels.run_planned(lambda: operator.plan(engines[name], items))
    _each(ways[name], lambda: items)
    return True


def _each(way_: Callable[[Any], None], items: Callable[[], Sequence[Any]]) -> None:
    for item in items():
        way_(item)


def _key(name: str, items: Sequence[Any]) -> str:
    """Return the class of a list of items: how many there are of each class."""
    classes = Counter(item.shape_class() for item in items)
    parts = (f"{count} x [{label}]" for label, count in sorted(classes.items()))
    tf32 = " tf32" if uses_tf32() else ""
    return f"{name}{tf32} {', '.join(parts)}"


def run_map(operator: MapOperator, layers: Sequence[Any], *values: float) -> Tensor:
    """Map tensors of layers of one device in place; return the layers' sums.

    The kernel does the layers that it supports, unless torch was measured to be faster.
    Ranks that train together have to write the same numbers: they do not measure, and
    take the kernel.
    """
    kernels = kernel_cache(layers[0].projected.device)
    if kernels is None:
        return operator.reference_(layers, *values)
    launched = [layer.supported(kernels.engine) for layer in layers]
    supported = [layer for layer, good in zip(layers, launched, strict=True) if good]
    sums = _mapped(kernels, operator, supported, *values) if supported else None
    if sums is None:
        return operator.reference_(layers, *values)
    if len(supported) == len(layers):
        return sums
    others = [layer for layer, good in zip(layers, launched, strict=True) if not good]
    rows = iter(sums), iter(operator.reference_(others, *values).to(sums.dtype))
    return torch.stack([next(rows[not good]) for good in launched])


def _mapped(
    kernels: KernelCache, operator: MapOperator, layers: Sequence[Any], *values: float
) -> Tensor | None:
    """Launch for supported layers; return their sums, or ``None`` if torch is to."""
    engine = kernels.engine
    if not kernels.ready([layer.variant(engine.problems) for layer in layers]):
        return None

    def planned(items: Sequence[Any], sums: Tensor) -> list[Launch]:
        return operator.plan(engine, items, sums, *values)

    def empty() -> Tensor:
        shape, device = (len(layers), *operator.sums), layers[0].projected.device
        return torch.empty(shape, dtype=torch.float32, device=device)

    def copies() -> list[Any]:
        return [layer.copied() for layer in layers]

    def by_torch() -> None:
        operator.reference_(copies(), *values)

    def launched() -> None:
        execute(engine, planned(copies(), empty()))

    if not several_ranks():
        works: dict[str, Work] = {TORCH: by_torch, KERNEL: launched}
        if kernels.fastest(_key(operator.name, layers), works) == TORCH:
            return None
    sums = empty()
    return sums if kernels.run_planned(lambda: planned(layers, sums)) else None


def several_ranks() -> bool:
    """Return whether ranks train together."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size() > 1


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


# -- status ----------------------------------------------------------------------------


def _answer(question: str, *, compile_all: bool) -> str:
    """Return one line on one device."""
    device = torch.device(question)
    reason = why_unavailable(device)
    if reason is not None:
        return f"not used: {reason}"
    kernels = kernel_cache(device)
    if kernels is None:
        return "not used: there is no compiler or no driver, see the warning"
    if compile_all:
        variants = usable_variants(kernels.engine)
        for variant in shown(variants, question, progress=sys.stderr.isatty()):
            kernels.ready([variant])
    lines = [
        f"{len(kernels.verified)} variants ready, {len(kernels.broken)} not used, "
        f"{sum(kernels.used.values())} launches in this process"
    ]
    compiled = getattr(kernels.engine, "compiled", {})
    for variant in sorted(kernels.verified):
        how = "compiled now" if compiled.get(variant) else "from the cache"
        lines.append(f"  {variant}: {how}")
    if kernels.chooser is not None:
        lines += [f"  {line}" for line in kernels.chooser.table()]
    lines += [f"  {variant}: {why}" for variant, why in sorted(kernels.broken.items())]
    return "\n".join(lines)


def _described(function: object) -> str:
    try:
        return str(function() if callable(function) else function)
    except (RuntimeError, OSError, ValueError) as problem:
        return f"none: {problem}"


def status(*, compile_all: bool = False) -> str:
    """Return what kernels are available, compiled, used, and why not.

    Args:
        compile_all: Compile and try every variant first, on every device.
    """
    cached = list(compiler.cache_folder().glob("*.cubin"))
    variants = every_variant()
    rows = [
        ("EKFAC_KERNELS", _described(mode)),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("sources", _described(compiler.source_folder)),
        ("kernels", f"{', '.join(KERNELS)} in {len(variants)} variants"),
        ("NVRTC", _described(lambda: ".".join(map(str, compiler.version())))),
        ("cuSOLVER", "batched solver" if has_batched_eigh() else "no batched solver"),
        ("cache", f"{compiler.cache_folder()}, {len(cached)} files"),
    ]
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in devices:
        title = f"{name} ({torch.cuda.get_device_name(name)})"
        rows.append((title, _answer(name, compile_all=compile_all)))
    if not devices:
        rows.append(("devices", "no CUDA device: the reference is used everywhere"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)
