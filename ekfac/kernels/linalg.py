"""Products of matrices and vectors with bases, on every device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ekfac.kernels.workspace import ALIGNMENT, Workspace, aligned_width

# Elements of a matrix from which aligned rows pay.
SMALL = 1 << 16


def aligned_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised tensor whose rows start at aligned addresses."""
    *lead, last = shape
    full = torch.empty(*lead, aligned_width(last), dtype=like.dtype, device=like.device)
    return full[..., :last]


def _aligned(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy of it with aligned rows if that is worth it."""
    rows, columns = matrix.stride(-2), matrix.stride(-1)
    if matrix.numel() < SMALL or min(rows, columns) != 1:
        return matrix
    if max(rows, columns) % ALIGNMENT == 0:
        return matrix
    if rows == 1:
        return _aligned(matrix.transpose(-1, -2)).transpose(-1, -2)
    return aligned_empty(tuple(matrix.shape), matrix).copy_(matrix)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of stacks of matrices, with aligned rows.

    Args:
        left: ``[*, m, k]``.
        right: ``[*, k, n]``.
    """
    one = left.dim() == right.dim() == 3 and len(left) == len(right) == 1
    if left.shape[-2] * right.shape[-1] < SMALL or not (one or left.dim() == 2):
        return left @ right
    if one:
        return matmul(left[0], right[0]).unsqueeze(0)
    result = aligned_empty((left.shape[0], right.shape[1]), left)
    return torch.mm(_aligned(left), _aligned(right), out=result)


def rotate(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Return ``Q^T x`` of ``[N, S, b or 1, d]``; a basis of ``None`` is the identity.

    Args:
        rows: Vectors.
        basis: ``[b or 1, d, d]`` with basis vectors in columns.

    Returns:
        ``[N, S, b, d]``, with the larger of the two ``b``.
    """
    if basis is None:
        return rows
    if len(basis) == 1:
        flat = matmul(rows.reshape(-1, rows.shape[-1]), basis[0])
        return flat.reshape(rows.shape)
    return torch.einsum("nsbd,bde->nsbe", rows.expand(-1, -1, len(basis), -1), basis)


def rotate_matrix(
    matrix: Tensor, left: Tensor | None, right: Tensor | None, *, back: bool = False
) -> Tensor:
    """Return ``L^T M R``, or ``L M R^T`` with ``back``; ``None`` is the identity.

    Args:
        matrix: ``[*, b, d_out, d_in]``.
        left: ``[b, d_out, d_out]``.
        right: ``[b or 1, d_in, d_in]``.
        back: From the basis to the coordinates of the parameters.
    """
    if left is not None:
        matrix = matmul(left if back else left.transpose(-1, -2), matrix)
    if right is not None:
        matrix = matmul(matrix, right.transpose(-1, -2) if back else right)
    return matrix


@lru_cache(maxsize=8)
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for products in bfloat16.

    Where they are emulated they are slower than those in float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    found = torch.cpu.get_capabilities()
    native = found.get("avx512_bf16") or found.get("amx_bf16")
    return bool(native) and torch.backends.mkldnn.is_available()


def rotate_back(
    matrix: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    precise: bool,
    workspace: Workspace | None = None,
    name: str = "rotated",
) -> Tensor:
    """Return ``L M R^T``, unless ``precise`` from factors rounded to bfloat16.

    Products of rounded float32 matrices are summed in float32 and take half the time or
    less; the result is off by about 0.4 % of its norm, evenly over its elements. Not
    done for other types, small matrices, or devices that would only emulate it.

    Args:
        matrix: ``[b, d_out, d_in]``.
        left: ``[b, d_out, d_out]`` or ``None`` for the identity.
        right: ``[b or 1, d_in, d_in]`` or ``None``.
        precise: Use the type of ``matrix``.
        workspace: Holds the result of rounded factors, and what lies between.
        name: Of the result there.
    """
    rows, columns = matrix.shape[-2:]
    small = rows * columns * min(rows, columns) < SMALL * 16
    if (
        precise
        or small
        or matrix.dtype != torch.float32
        or not multiplies_bfloat16(matrix.device)
    ):
        return rotate_matrix(matrix, left, right, back=True)
    memory = Workspace() if workspace is None else workspace

    def half(what: str, tensor: Tensor) -> Tensor:
        return memory.take(what, tensor, torch.bfloat16)

    rounded = half("matrix", matrix).copy_(matrix)
    if left is not None:
        factor = half("left", left).copy_(left)
        rounded = torch.matmul(factor, rounded, out=half("product", matrix))
    if right is not None:
        factor = half("right", right).copy_(right).transpose(-1, -2)
        rounded = torch.matmul(rounded, factor, out=half("second product", matrix))
    return memory.take(name, matrix).copy_(rounded)
