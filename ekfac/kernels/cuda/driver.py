"""The CUDA driver, which loads and launches kernels, and cuSOLVER's batched solver."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock, RLock
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ekfac.kernels.cuda import compiler
from ekfac.kernels.cuda.compiler import Variant, library_folders, opened
from ekfac.kernels.cuda.launch import Launch

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(code: int) -> None:
    """Raise what a driver's call says; without memory ``torch.OutOfMemoryError``."""
    if not code:
        return
    words = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(words))
    text = words.value.decode() if words.value else "unknown error"
    kind = torch.OutOfMemoryError if code == OUT_OF_MEMORY else RuntimeError
    raise kind(f"the CUDA driver failed with code {code}: {text}")


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
        new = installed.value >= 12010 and compiler.version() >= (12, 1)
        self.problems = compiler.MANY if new else compiler.FEW
        # wgmma is in compilers from CUDA 12 on.
        hopper = (properties.major, properties.minor) == (9, 0)
        self.warpgroups = hopper and compiler.version() >= (12, 0)
        self.name = f"{properties.name}, driver {installed.value}"
        self.compiled: dict[Variant, bool] = {}
        self._functions: dict[tuple[Variant, str], ctypes.c_void_p] = {}
        self._lock = RLock()
        self._context = self._primary_context()

    def fingerprint(self) -> str:
        """Return a hash of what times depend on: device, driver, torch, sources."""
        sources = compiler.every_source()
        parts = (self.name, torch.__version__, str(compiler.version()), *sources)
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
            code, new = compiler.cached_code(variant, self.architecture)
            try:
                self._add(variant, code)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                if new:
                    raise
                compiler.discard_cached(compiler.cache_name(variant, self.architecture))
                code, new = compiler.cached_code(variant, self.architecture)
                self._add(variant, code)
            self.compiled[variant] = new

    def _add(self, variant: Variant, code: bytes) -> None:
        """Load machine code and look up its functions."""
        driver, module = _driver(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), code))
        functions = {}
        for kernel in compiler.kernel_names(variant.source):
            function = ctypes.c_void_p()
            name = kernel.encode()
            _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name))
            if compiler.has_dynamic_shared(variant):
                limit = self.shared
                _check(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, limit))
            functions[variant, kernel] = function
        self._functions.update(functions)

    def launch(self, call: Launch) -> None:
        """Run a kernel on the current stream."""
        function = self._functions[call.variant, call.kernel]
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(call.params))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        grid, block = (call.grid, 1, 1), (call.threads, 1, 1)
        with self._current():
            _check(
                _driver().cuLaunchKernel(
                    function, *grid, *block, call.shared, stream, arguments, None
                )
            )


# -- cuSOLVER --------------------------------------------------------------------------


Key = TypeVar("Key")
Value = TypeVar("Value")

VECTORS, LOWER, FLOAT32 = 1, 0, 0  # CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER
#                                    and CUDA_R_32F
NAMES = ("libcusolver.so.12", "libcusolver.so.11")


@cache
def _cusolver() -> ctypes.CDLL | None:
    """Return cuSOLVER if it has the batched solver (CUDA 12.6.2 and later)."""
    if sys.platform == "win32":
        return None
    for name in NAMES:
        candidates = [str(folder / name) for folder in library_folders()]
        for candidate in [*(path for path in candidates if Path(path).is_file()), name]:
            library = opened(candidate)
            if hasattr(library, "cusolverDnXsyevBatched"):
                return library
    return None


class _Handle:
    """A handle and its parameters, for one stream of one device."""

    def __init__(self, library: ctypes.CDLL, device: torch.device, stream: int) -> None:
        self.library = library
        self.handle, self.params = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            self.check(library.cusolverDnCreate(ctypes.byref(self.handle)))
            self.check(library.cusolverDnCreateParams(ctypes.byref(self.params)))
            stream_pointer = ctypes.c_void_p(stream)
            self.check(library.cusolverDnSetStream(self.handle, stream_pointer))

    @staticmethod
    def check(code: int) -> None:
        """Raise what cuSOLVER says; without memory ``torch.OutOfMemoryError``."""
        if code:
            memory = code == 2  # CUSOLVER_STATUS_ALLOC_FAILED
            kind = torch.OutOfMemoryError if memory else RuntimeError
            raise kind(f"cuSOLVER failed with status {code}")


class HandlePool(Generic[Key, Value]):
    """Objects that one thread at a time may use, made when none is free."""

    def __init__(self, make: Callable[[Key], Value]) -> None:
        self._make = make
        self._free: dict[Key, list[Value]] = {}
        self._lock = Lock()

    @contextmanager
    def lease(self, key: Key) -> Iterator[Value]:
        """Lend an object to this thread; one that failed is not lent again."""
        with self._lock:
            free = self._free.setdefault(key, [])
            handle = free.pop() if free else None
        if handle is None:
            handle = self._make(key)
        yield handle
        with self._lock:
            free.append(handle)


def _new_handle(key: tuple[int, int]) -> _Handle:
    index, stream = key
    library = _cusolver()
    assert library is not None
    return _Handle(library, torch.device("cuda", index), stream)


# By device and stream: the thread that searches for bases has a handle of its own.
_handles: HandlePool[tuple[int, int], _Handle] = HandlePool(_new_handle)


def has_batched_eigh() -> bool:
    """Return whether the library has the batched solver."""
    return _cusolver() is not None


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a decomposition of all matrices in one call, or ``None`` without one.

    Args:
        matrices: ``[n, d, d]`` float32 on a CUDA device, symmetric.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors in columns; what did not
        converge is not a number.

    Raises:
        RuntimeError: If cuSOLVER refuses.
    """
    device = matrices.device
    index = torch.cuda.current_device() if device.index is None else device.index
    if _cusolver() is None:
        return None
    stream: int = torch.cuda.current_stream(device).cuda_stream
    with _handles.lease((index, stream)) as handle:
        return _decomposed(handle, matrices)


def _decomposed(handle: _Handle, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Do what :func:`batched_eigh` says, with a handle."""
    device = matrices.device
    count, size = matrices.shape[:2]
    work = matrices.clone(memory_format=torch.contiguous_format)
    values = matrices.new_empty(count, size)
    info = torch.empty(count, dtype=torch.int32, device=device)
    on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
    n, batch = ctypes.c_int64(size), ctypes.c_int64(count)
    problem = (
        handle.handle,
        handle.params,
        ctypes.c_int(VECTORS),
        ctypes.c_int(LOWER),
        n,
        ctypes.c_int(FLOAT32),
        ctypes.c_void_p(work.data_ptr()),
        n,
        ctypes.c_int(FLOAT32),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_int(FLOAT32),
    )
    with torch.cuda.device(device):
        sizes = (ctypes.byref(on_device), ctypes.byref(on_host), batch)
        handle.check(handle.library.cusolverDnXsyevBatched_bufferSize(*problem, *sizes))
        space = torch.empty(on_device.value, dtype=torch.uint8, device=device)
        host = ctypes.create_string_buffer(max(1, on_host.value))
        handle.check(
            handle.library.cusolverDnXsyevBatched(
                *problem,
                ctypes.c_void_p(space.data_ptr()),
                on_device,
                host,
                on_host,
                ctypes.c_void_p(info.data_ptr()),
                batch,
            )
        )
    # The solver works on columns: what it leaves are eigenvectors in rows.
    failed = (info != 0).unsqueeze(-1)
    values = values.masked_fill(failed, float("nan"))
    return values, work.transpose(-1, -2)
