"""What ``python -m ekfac kernels`` shows."""

from __future__ import annotations

import torch

from ekfac.kernels import compiler, cusolver, dispatch, engine, sources


def _answer(question: str, *, compile_all: bool) -> str:
    """Return one line on one device."""
    device = torch.device(question)
    reason = dispatch.obstacle(device)
    if reason is not None:
        return f"not used: {reason}"
    shop = dispatch.workshop(device)
    if shop is None:
        return "not used: there is no compiler or no driver, see the warning"
    if compile_all:
        for variant in sources.every_variant(shop.engine.problems):
            shop.ready([variant])
    lines = [
        f"{len(shop.trusted)} variants ready, {len(shop.broken)} not to be used, "
        f"{sum(shop.used.values())} launches in this process"
    ]
    compiled = getattr(shop.engine, "compiled", {})
    for variant in sorted(shop.trusted):
        how = "compiled now" if compiled.get(variant) else "from the cache"
        lines.append(f"  {variant}: {how}")
    lines += [f"  {variant}: {why}" for variant, why in sorted(shop.broken.items())]
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
    cached = list(engine.cache_folder().glob("*.cubin"))
    variants = sources.every_variant()
    rows = [
        ("EKFAC_KERNELS", _described(dispatch.mode)),
        ("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("sources", _described(sources.folder)),
        ("kernels", f"{', '.join(sources.KERNELS)} in {len(variants)} variants"),
        ("NVRTC", _described(lambda: ".".join(map(str, compiler.version())))),
        ("cuSOLVER", "batched solver" if cusolver.available() else "no batched solver"),
        ("cache", f"{engine.cache_folder()}, {len(cached)} files"),
    ]
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for name in devices:
        title = f"{name} ({torch.cuda.get_device_name(name)})"
        rows.append((title, _answer(name, compile_all=compile_all)))
    if not devices:
        rows.append(("devices", "no CUDA device: the reference is used everywhere"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)
