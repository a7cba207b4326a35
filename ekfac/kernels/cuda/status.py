"""Status of the CUDA kernels, as ``python -m ekfac kernels`` prints it."""

from __future__ import annotations

import torch

from ekfac.kernels.cuda import cubin_cache, cusolver, dispatch, nvrtc, registry
from ekfac.kernels.cuda import nvrtc_sources as sources


def _answer(question: str, *, compile_all: bool) -> str:
    """Return one line on one device."""
    device = torch.device(question)
    reason = dispatch.why_unavailable(device)
    if reason is not None:
        return f"not used: {reason}"
    kernels = dispatch.kernel_cache(device)
    if kernels is None:
        return "not used: there is no compiler or no driver, see the warning"
    if compile_all:
        for variant in registry.every_variant(kernels.engine.problems):
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
    cached = list(cubin_cache.folder().glob("*.cubin"))
    variants = registry.every_variant()
    rows = [
        ("EKFAC_KERNELS", _described(dispatch.mode)),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("sources", _described(sources.folder)),
        ("kernels", f"{', '.join(registry.KERNELS)} in {len(variants)} variants"),
        ("NVRTC", _described(lambda: ".".join(map(str, nvrtc.version())))),
        ("cuSOLVER", "batched solver" if cusolver.available() else "no batched solver"),
        ("cache", f"{cubin_cache.folder()}, {len(cached)} files"),
    ]
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in devices:
        title = f"{name} ({torch.cuda.get_device_name(name)})"
        rows.append((title, _answer(name, compile_all=compile_all)))
    if not devices:
        rows.append(("devices", "no CUDA device: the reference is used everywhere"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)
