"""Batched symmetric eigensolver of cuSOLVER, from the library that PyTorch ships."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ekfac.kernels.cuda.nvrtc import library_folders, opened

Key = TypeVar("Key")
Value = TypeVar("Value")

VECTORS, LOWER, FLOAT32 = 1, 0, 0  # CUSOLVER_EIG_MODE_VECTOR, CUBLAS_FILL_MODE_LOWER
#                                    and CUDA_R_32F
NAMES = ("libcusolver.so.12", "libcusolver.so.11")


@cache
def _library() -> ctypes.CDLL | None:
    """Return cuSOLVER if it has the batched solver (CUDA 12.6.2 and later)."""
    if sys.platform == "win32":
        return None
    for name in NAMES:
        found = [str(folder / name) for folder in library_folders()]
        for candidate in [*(path for path in found if Path(path).is_file()), name]:
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
            place = ctypes.c_void_p(stream)
            self.check(library.cusolverDnSetStream(self.handle, place))

    @staticmethod
    def check(code: int) -> None:
        """Raise what cuSOLVER says.

        Raises:
            torch.OutOfMemoryError: Without memory (CUSOLVER_STATUS_ALLOC_FAILED).
            RuntimeError: For everything else.
        """
        if code:
            kind = torch.OutOfMemoryError if code == 2 else RuntimeError
            raise kind(f"cuSOLVER failed with status {code}")


class HandlePool(Generic[Key, Value]):
    """Objects that one thread at a time may use, made when none is free.

    Args:
        make: Returns a new one for a key.
    """

    def __init__(self, make: Callable[[Key], Value]) -> None:
        self._make = make
        self._free: dict[Key, list[Value]] = {}
        self._lock = Lock()

    @contextmanager
    def lease(self, key: Key) -> Iterator[Value]:
        """Lend an object to this thread; one that failed is not lent again."""
        with self._lock:
            free = self._free.setdefault(key, [])
            one = free.pop() if free else None
        if one is None:
            one = self._make(key)
        yield one
        with self._lock:
            free.append(one)


def _new_handle(place: tuple[int, int]) -> _Handle:
    index, stream = place
    library = _library()
    assert library is not None
    return _Handle(library, torch.device("cuda", index), stream)


# By device and stream: the thread that searches for bases has a handle of its own.
_handles: HandlePool[tuple[int, int], _Handle] = HandlePool(_new_handle)


def available() -> bool:
    """Return whether the library has the batched solver."""
    return _library() is not None


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
    if _library() is None:
        return None
    stream: int = torch.cuda.current_stream(device).cuda_stream
    with _handles.lease((index, stream)) as own:
        return _decomposed(own, matrices)


def _decomposed(own: _Handle, matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Do what :func:`batched_eigh` says, with a handle."""
    device = matrices.device
    count, size = matrices.shape[:2]
    work = matrices.clone(memory_format=torch.contiguous_format)
    values = matrices.new_empty(count, size)
    info = torch.empty(count, dtype=torch.int32, device=device)
    on_device, on_host = ctypes.c_size_t(), ctypes.c_size_t()
    n, batch = ctypes.c_int64(size), ctypes.c_int64(count)
    problem = (
        own.handle,
        own.params,
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
        own.check(own.library.cusolverDnXsyevBatched_bufferSize(*problem, *sizes))
        space = torch.empty(on_device.value, dtype=torch.uint8, device=device)
        host = ctypes.create_string_buffer(max(1, on_host.value))
        own.check(
            own.library.cusolverDnXsyevBatched(
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
