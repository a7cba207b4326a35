"""The CUDA driver: modules, functions and launches of one device; the cubin cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from ekfac.kernels.cuda import nvrtc, nvrtc_sources
from ekfac.kernels.cuda.nvrtc_sources import Variant

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(code: int) -> None:
    if code:
        words = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(words))
        text = words.value.decode() if words.value else "unknown error"
        raise RuntimeError(f"the CUDA driver failed with code {code}: {text}")


def cache_folder() -> Path:
    """Return where compiled kernels are kept, ``EKFAC_CACHE`` or the user's cache."""
    chosen = os.environ.get("EKFAC_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ekfac"


def cached_code(variant: Variant, architecture: str) -> tuple[bytes, bool]:
    """Return machine code from the cache, or compiled and put there.

    The name in the cache is a hash of the sources, the options with the architecture
    among them, and the compiler's version.

    Returns:
        The code and whether it had to be compiled.

    Raises:
        CompilationError: With the compiler's words.
        FileNotFoundError: Without NVRTC, or without the nvrtc_sources.
    """
    parts = (
        nvrtc_sources.fingerprint(variant.source),
        *nvrtc.options(variant, architecture),
        variant.source,
        str(nvrtc.version()),
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = cache_folder() / f"{variant.source}-{key[:32]}.cubin"
    try:
        return path.read_bytes(), False
    except OSError:
        code, _ = nvrtc.compile_variant(variant, architecture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)  # at once, for processes that start together
    except OSError:
        pass  # a folder that cannot be written costs a compilation in each process
    return code, True


class DeviceEngine:
    """An :class:`ekfac.kernels.cuda.launch.Engine` on a CUDA device.

    Args:
        device: With compute capability 8.0 or more.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self.multiprocessors: int = properties.multi_processor_count
        # Every device of capability 8.0 or more has this much, besides the reserve.
        optin = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
        self.shared = int(optin)
        installed = ctypes.c_int()
        _check(_driver().cuDriverGetVersion(ctypes.byref(installed)))
        new = installed.value >= 12010 and nvrtc.version() >= (12, 1)
        self.problems = nvrtc_sources.MANY if new else nvrtc_sources.FEW
        self.compiled: dict[Variant, bool] = {}
        self._modules: dict[Variant, ctypes.c_void_p] = {}
        self._functions: dict[tuple[Variant, str], ctypes.c_void_p] = {}

    def load(self, variant: Variant) -> None:
        """Compile a variant, or take it from the cache, and load it.

        Raises:
            CompilationError: With the compiler's words.
            FileNotFoundError: Without NVRTC, or without the nvrtc_sources.
        """
        if variant in self._modules:
            return
        code, new = cached_code(variant, self.architecture)
        module = ctypes.c_void_p()
        with torch.cuda.device(self.device):
            _check(_driver().cuModuleLoadData(ctypes.byref(module), code))
        self._modules[variant], self.compiled[variant] = module, new

    def _function(self, variant: Variant, kernel: str, shared: int) -> ctypes.c_void_p:
        key = (variant, kernel)
        if key not in self._functions:
            function = ctypes.c_void_p()
            module = self._modules[variant]
            name = kernel.encode()
            _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, name))
            if shared:
                limit = self.shared
                _check(
                    _driver().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, limit)
                )
            self._functions[key] = function
        return self._functions[key]

    def launch(
        self,
        variant: Variant,
        kernel: str,
        params: ctypes.Structure,
        *,
        grid: int,
        threads: int,
        shared: int = 0,
    ) -> None:
        """Run a kernel on the current stream."""
        function = self._function(variant, kernel, shared)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        with torch.cuda.device(self.device):
            _check(
                _driver().cuLaunchKernel(
                    function, grid, 1, 1, threads, 1, 1, shared, stream, arguments, None
                )
            )
