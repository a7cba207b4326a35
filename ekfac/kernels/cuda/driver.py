"""The CUDA driver: modules, functions and launches of one device."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

import torch

from ekfac.kernels.cuda import cubin_cache, nvrtc, nvrtc_sources
from ekfac.kernels.cuda.launch import Launch
from ekfac.kernels.cuda.nvrtc_sources import Variant

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(code: int) -> None:
    """Raise what a driver's call says.

    Raises:
        torch.OutOfMemoryError: Without memory on the device.
        RuntimeError: For everything else.
    """
    if not code:
        return
    words = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(words))
    text = words.value.decode() if words.value else "unknown error"
    kind = torch.OutOfMemoryError if code == OUT_OF_MEMORY else RuntimeError
    raise kind(f"the CUDA driver failed with code {code}: {text}")


def cache_name(variant: Variant, architecture: str) -> str:
    """Return a variant's name in the cache.

    A hash of its source with the headers, the options with the architecture among them,
    and the compiler's version.
    """
    parts = (
        nvrtc_sources.fingerprint(variant.source),
        *nvrtc.options(variant, architecture),
        variant.source,
        str(nvrtc.version()),
    )
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"{variant.source}-{key[:32]}.cubin"


def cached_code(variant: Variant, architecture: str) -> tuple[bytes, bool]:
    """Return machine code from the cache, or compiled and put there.

    Returns:
        The code and whether it had to be compiled.

    Raises:
        CompilationError: With the compiler's words.
        FileNotFoundError: Without NVRTC, or without the sources.
    """
    name = cache_name(variant, architecture)
    found = cubin_cache.read(name)
    if found is not None:
        return found, False
    code, _ = nvrtc.compile_variant(variant, architecture)
    cubin_cache.write(name, code)
    return code, True


class DeviceEngine:
    """An :class:`ekfac.kernels.cuda.launch.Engine` on a CUDA device.

    Every call of the driver has the device's primary context current, which PyTorch
    uses too: a thread may have none yet, or that of another device.

    Args:
        device: With compute capability 8.0 or more, and an index.
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
        self.name = f"{properties.name}, driver {installed.value}"
        self.compiled: dict[Variant, bool] = {}
        self._functions: dict[tuple[Variant, str], ctypes.c_void_p] = {}
        self._lock = RLock()
        self._context = self._primary_context()

    def fingerprint(self) -> str:
        """Return a hash of what times depend on: device, driver, torch, sources."""
        sources = nvrtc_sources.every_source()
        parts = (self.name, torch.__version__, str(nvrtc.version()), *sources)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def _primary_context(self) -> ctypes.c_void_p:
        """Return the device's primary context, made if there is none."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        _check(_driver().cuInit(0))
        _check(_driver().cuDeviceGet(ctypes.byref(handle), self.device.index))
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
        return context

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device's context that of this thread, for a while."""
        _check(_driver().cuCtxPushCurrent_v2(self._context))
        try:
            yield
        finally:
            _check(_driver().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))

    def load(self, variant: Variant) -> None:
        """Compile a variant, or take it from the cache, and load it.

        Code from the cache that the driver refuses is compiled again.

        Raises:
            CompilationError: With the compiler's words.
            FileNotFoundError: Without NVRTC, or without the sources.
            torch.OutOfMemoryError: Without memory on the device.
        """
        with self._lock, self._current():
            if variant in self.compiled:
                return
            code, new = cached_code(variant, self.architecture)
            try:
                self._add(variant, code)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if new:
                    raise
                cubin_cache.discard(cache_name(variant, self.architecture))
                code, new = cached_code(variant, self.architecture)
                self._add(variant, code)
            self.compiled[variant] = new

    def _add(self, variant: Variant, code: bytes) -> None:
        """Load machine code and look up its functions."""
        driver, module = _driver(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code))
        found = {}
        for kernel in nvrtc_sources.kernel_names(variant.source):
            function = ctypes.c_void_p()
            name = kernel.encode()
            _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name))
            if nvrtc_sources.has_dynamic_shared(variant.source):
                limit = self.shared
                _check(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, limit))
            found[variant, kernel] = function
        self._functions.update(found)

    def launch(self, one: Launch) -> None:
        """Run a kernel on the current stream."""
        function = self._functions[one.variant, one.kernel]
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(one.params))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        grid, block = (one.grid, 1, 1), (one.threads, 1, 1)
        with self._current():
            _check(
                _driver().cuLaunchKernel(
                    function, *grid, *block, one.shared, stream, arguments, None
                )
            )
