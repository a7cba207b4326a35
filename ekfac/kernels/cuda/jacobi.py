"""Eigenvectors of many small symmetric matrices by Jacobi's method: ``jacobi.cu``."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p

import torch
from torch import Tensor

from ekfac.kernels.cuda.compiler import Variant
from ekfac.kernels.cuda.kernel import Kernel, Numbers, largest, relative_error
from ekfac.kernels.cuda.launch import Engine, Launch, execute, fields, pointer

THREADS = 512
VARIANT = Variant("jacobi")


class JacobiParams(ctypes.Structure):
    """``Params`` of ``jacobi.cu``."""

    _fields_ = [
        *fields(c_void_p, "matrix vectors"),
        *fields(c_int, "n count"),
    ]


def jacobi_bytes(size: int) -> int:
    """Return the shared memory that a matrix of this size takes."""
    pairs = (size + 1) // 2
    return 4 * (2 * size * (size | 1) + THREADS) + 16 * pairs


def plan_jacobi(matrices: Tensor, vectors: Tensor) -> list[Launch]:
    """Return the launch that diagonalises matrices ``[n, d, d]``.

    Args:
        matrices: Contiguous, float32; its diagonals become the eigenvalues, unordered.
        vectors: Of the same shape; receives eigenvectors in columns.
    """
    count, size = matrices.shape[:2]
    params = JacobiParams(
        matrix=pointer(matrices), vectors=pointer(vectors), n=size, count=count
    )
    return [
        Launch(
            VARIANT,
            "jacobi",
            params,
            count,
            THREADS,
            shared=jacobi_bytes(size),
            keep=(matrices, vectors),
            scratch=(vectors,),
        )
    ]


def check(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    numbers = Numbers(engine, variant)
    errors = []
    for size, rank in ((2, 1), (21, 40), (40, 17)):  # the last has equal eigenvalues
        x = numbers.rows(2, size, rank).double()
        exact = x @ x.transpose(-1, -2)
        work, vectors = exact.float(), numbers.poison(2, size, size)
        execute(engine, plan_jacobi(work, vectors))
        values, wide = work.diagonal(dim1=-2, dim2=-1).double(), vectors.double()
        rebuilt = (wide * values.unsqueeze(-2)) @ wide.transpose(-1, -2)
        eye = torch.eye(size, dtype=torch.float64, device=engine.device)
        errors.append(relative_error(rebuilt, exact))
        errors.append(
            relative_error(wide.transpose(-1, -2) @ wide, eye.expand(2, -1, -1))
        )
    return largest(errors)


KERNEL = Kernel("jacobi", lambda _: [VARIANT], check)
