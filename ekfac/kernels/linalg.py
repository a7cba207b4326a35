"""Products, rotations and polar factors of matrices, and buffers that steps share.

Matrix products are faster on rows that start at multiples of 64 bytes, and the column
of a bias makes widths odd. So results are allocated with aligned rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt, prod

import torch
from torch import Tensor

# Number of elements in 64 bytes of float32.
ALIGNMENT = 16
# Number of elements of a matrix from which aligned rows pay.
SMALL = 1 << 16


def aligned_width(columns: int) -> int:
    """Return the distance of aligned rows of ``columns`` elements, in elements."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


class Workspace:
    """Buffers that every step overwrites and that stay allocated in between.

    A CPU returns large freed memory to the operating system, which clears it page by
    page when it is asked for again: a fifth of a step's time. Allocators of other
    devices keep it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor, valid until ``name`` is taken again.

        Args:
            name: Names the buffer.
            like: Gives shape and device.
            dtype: Default: that of ``like``.
        """
        return self._take(name, tuple(like.shape), dtype or like.dtype, like.device)

    def take_rows(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor whose rows start at aligned addresses.

        Args:
            name: Names the buffer.
            shape: Of the tensor.
            like: Gives dtype and device.
        """
        *lead, columns = shape
        wide = (*lead, aligned_width(columns))
        return self._take(name, wide, like.dtype, like.device)[..., :columns]

    def _take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        view = self._views.get((name, dtype, shape))
        if view is None:
            size = prod(shape)
            buffer = self._kept.get((name, dtype))
            if buffer is None or buffer.numel() < size:
                buffer = self._kept[name, dtype] = torch.empty(size, dtype=dtype)
                # Views of the old buffer would keep it.
                old = [key for key in self._views if key[:2] == (name, dtype)]
                for key in old:
                    del self._views[key]
            view = self._views[name, dtype, shape] = buffer[:size].view(shape)
        return view


def aligned_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised tensor whose rows start at aligned addresses."""
    *lead, last = shape
    full = torch.empty(*lead, aligned_width(last), dtype=like.dtype, device=like.device)
    return full[..., :last]


def _aligned(matrix: Tensor) -> Tensor:
    """Return the matrix, or a copy with aligned rows where that pays."""
    rows, columns = matrix.stride(-2), matrix.stride(-1)
    if matrix.numel() < SMALL or min(rows, columns) != 1:
        return matrix
    if max(rows, columns) % ALIGNMENT == 0:
        return matrix
    if rows == 1:
        return _aligned(matrix.transpose(-1, -2)).transpose(-1, -2)
    return aligned_empty(tuple(matrix.shape), matrix).copy_(matrix)


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``left @ right`` of stacks of matrices, with aligned rows.

    Args:
        left: ``[*, m, k]``.
        right: ``[*, k, n]``.
        out: Takes the result of small matrices, if there is one.
    """
    single = left.dim() == right.dim() == 3 and len(left) == len(right) == 1
    if left.shape[-2] * right.shape[-1] < SMALL or not (single or left.dim() == 2):
        equal = left.dim() == right.dim() == 3 and len(left) == len(right)
        product = torch.bmm if equal else torch.matmul  # in one operation
        return product(left, right, out=out)
    if single:
        return matmul(left[0], right[0]).unsqueeze(0)
    result = aligned_empty((left.shape[0], right.shape[1]), left)
    return torch.mm(_aligned(left), _aligned(right), out=result)


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products ``[k]`` of ``[k, *]`` and ``[k, *]``."""
    if left[0].numel() < SMALL:
        return (left * right).flatten(1).sum(dim=1)
    rows, columns = left.flatten(1).unsqueeze(1), right.flatten(1).unsqueeze(2)
    return torch.bmm(rows, columns).view(-1)


# Rows of a symmetric product that are computed together, and the number of
# multiplications from which on leaving out one triangle pays on a CPU.
SLAB, TRIANGLE = 128, 1 << 25


def symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right`` of ``[d, n]`` and ``[n, d]``, known to be symmetric.

    Where it pays only one triangle is computed, slab by slab, and copied to the other.
    """
    n, d = right.shape
    if right.device.type != "cpu" or d <= SLAB or n * d * d < TRIANGLE:
        return matmul(left, right)
    product = aligned_empty((d, d), right)
    for start in range(0, d, SLAB):
        rows = slice(start, start + SLAB)
        torch.mm(left[rows], right[:, start:], out=product[rows, start:])
        product[rows, :start] = product[:start, rows].t()
    return product


def rotate(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Return ``Q^T x`` of ``[N, S, b or 1, d]``; a basis of ``None`` is the identity.

    Args:
        rows: Vectors; the result has the larger of the two ``b``.
        basis: ``[b or 1, d, d]`` with basis vectors in columns.
    """
    if basis is None:
        return rows
    if len(basis) == 1:
        flat = matmul(rows.reshape(-1, rows.shape[-1]), basis[0])
        return flat.reshape(rows.shape)
    return torch.einsum("nsbd,bde->nsbe", rows.expand(-1, -1, len(basis), -1), basis)


def rotate_matrix(
    matrix: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    back: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``L^T M R``, or ``L M R^T`` with ``back``; ``None`` is the identity.

    Args:
        matrix: ``[*, b, d_out, d_in]``.
        left: ``[b, d_out, d_out]``.
        right: ``[b or 1, d_in, d_in]``.
        back: Rotate from the basis to the coordinates of the parameters.
        out: Takes the result of small matrices, if there is one and a basis.
    """
    if left is not None:
        own = out if right is None else None
        matrix = matmul(left if back else left.transpose(-1, -2), matrix, own)
    if right is not None:
        matrix = matmul(matrix, right.transpose(-1, -2) if back else right, out)
    return matrix


@lru_cache(maxsize=8)
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for products in bfloat16.

    Without them bfloat16 is emulated and slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(native) and torch.backends.mkldnn.is_available()


def rotate_into(
    matrix: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    *,
    precise: bool,
    workspace: Workspace | None = None,
    name: str = "rotated",
) -> Tensor:
    """Return ``L^T M R``, unless ``precise`` from factors rounded to bfloat16.

    A rounded basis is not quite orthogonal: a little of every coordinate is in all the
    others, at every step the same, and the one that holds most of a gradient, as the
    inputs' mean does, hides the smallest. What lies along the last columns of the
    bases, the eigenvectors of the largest eigenvalues, is therefore taken out before
    rounding and computed as it is: the last row and the last column of the result.
    Without that the auto-encoder of ``benchmarks/peers.md`` ends 9 % higher
    (``peers.py rounding``).

    Args:
        matrix: ``[b, d_out, d_in]``, in the coordinates of the parameters.
        left: ``[b, d_out, d_out]`` or ``None`` for the identity.
        right: ``[b or 1, d_in, d_in]`` or ``None``.
        precise: Whether to compute in the dtype of ``matrix``.
        workspace: Holds what is rounded, and the result.
        name: Name of the result's buffer.
    """
    bare = left is None and right is None
    kind = matrix.shape, matrix.dtype, matrix.device
    if precise or bare or not rotates_rounded(*kind):
        return rotate_matrix(matrix, left, right)
    memory = Workspace() if workspace is None else workspace
    # With p, q the leading eigenvectors, M - (M q) q^T - p (p^T M - (p^T M q) q^T).
    outer, inner = [], []
    row = column = None
    if right is not None:
        q = right[..., -1:].expand(len(matrix), -1, -1)
        column = matrix @ q
        outer.append(column)
        inner.append(q.mT)
    if left is not None:
        p = left[..., -1:]
        row = p.mT @ matrix
        outer.append(p)
        inner.append(row if column is None else row - (p.mT @ column) @ q.mT)
    rest = memory.take(name, matrix)
    torch.baddbmm(
        matrix, torch.cat(outer, -1), torch.cat(inner, -2), alpha=-1, out=rest
    )
    result = rest.copy_(_rounded_rotation(rest, _transposed(left), right, memory))
    if row is not None:
        result[..., -1:, :] = row if right is None else row @ right
    if column is not None:
        result[..., -1:] = column if left is None else left.mT @ column
    return result


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
    less; the error is about 0.4 % of the norm, spread evenly over the elements. Other
    dtypes, small matrices and devices that emulate bfloat16 are not rounded.

    Args:
        matrix: ``[b, d_out, d_in]``.
        left: ``[b, d_out, d_out]`` or ``None`` for the identity.
        right: ``[b or 1, d_in, d_in]`` or ``None``.
        precise: Whether to compute in the dtype of ``matrix``.
        workspace: Holds the rounded factors, the intermediate products and the result.
        name: Name of the result's buffer.
    """
    kind = matrix.shape, matrix.dtype, matrix.device
    if precise or not rotates_rounded(*kind, back=True):
        out = None
        if workspace is not None and matrix.shape[-2] * matrix.shape[-1] < SMALL:
            out = workspace.take(name, matrix)
        return rotate_matrix(matrix, left, right, back=True, out=out)
    memory = Workspace() if workspace is None else workspace
    rounded = _rounded_rotation(matrix, left, _transposed(right), memory)
    return memory.take(name, matrix).copy_(rounded)


def _transposed(basis: Tensor | None) -> Tensor | None:
    return None if basis is None else basis.mT


def _rounded_rotation(
    matrix: Tensor, left: Tensor | None, right: Tensor | None, memory: Workspace
) -> Tensor:
    """Return ``L M R`` in bfloat16, of rounded factors; ``None`` is the identity."""

    def half(what: str, tensor: Tensor) -> Tensor:
        return memory.take(what, tensor, torch.bfloat16)

    rounded = half("matrix", matrix).copy_(matrix)
    if left is not None:
        factor = _rounded_basis(left, "left", memory)
        rounded = _rounded_product(factor, rounded, half("product", matrix))
    if right is not None:
        factor = _rounded_basis(right, "right", memory)
        rounded = _rounded_product(rounded, factor, half("second product", matrix))
    return rounded


def _rounded_basis(basis: Tensor, name: str, memory: Workspace) -> Tensor:
    """Return a basis in bfloat16, copied in the order in which it lies in memory."""
    if basis.stride(-1) != 1:
        return memory.take(name, basis.mT, torch.bfloat16).copy_(basis.mT).mT
    return memory.take(name, basis, torch.bfloat16).copy_(basis)


# How many times faster a rotation is in bfloat16, where it pays at all.
GAIN = 2.5


def rotates_rounded(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    back: bool = False,
) -> bool:
    """Return whether rounding a matrix ``[*, d_out, d_in]`` and its bases pays.

    On a CPU that depends on the number of multiplications; the way into a basis takes
    some more passes over the matrix than the way ``back``.
    """
    *_, rows, columns = shape
    if device.type == "cpu":
        large = rows * columns * (rows + columns) >= (1 << 22 if back else 1 << 24)
    else:
        large = rows * columns * min(rows, columns) >= 1 << 21
    return large and dtype == torch.float32 and multiplies_bfloat16(device)


def rotation_cost(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, precise: bool
) -> float:
    """Return how many unrounded multiplications :func:`rotate_into` is worth."""
    *_, rows, columns = shape
    rounded = not precise and rotates_rounded(shape, dtype, device)
    return rows * columns * (rows + columns) / (GAIN if rounded else 1)


def _rounded_product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Return ``left @ right`` of stacks of matrices in bfloat16, in ``out``.

    A stack of one is multiplied as a matrix: as a stack a CPU takes up to three times
    as long, where one of the two is transposed.
    """
    if len(left) == len(right) == 1:
        torch.mm(left[0], right[0], out=out[0])
        return out
    return torch.matmul(left, right, out=out)


# Steps -> (a, b, c) of p(x) = a x + b x^3 + c x^5, fitted as best approximations in the
# manner of Amsel et al. 2025 (Polar Express). Singular values from 0.02 of the largest
# on end within 9.3 % of 1 after three steps, those from 0.01 on within 1.3 % after
# four, those from 0.003 on within 0.5 % after five. Small singular values matter more
# than the ripple: three steps that take those from 0.03 on to within 4 % of 1 are worse
# on most problems of benchmarks/peers.md, by 4 % on the auto-encoder; those that take
# them from 0.01 on to within 27 % are better there and worse on residual networks.
COEFFICIENTS: dict[int, tuple[tuple[float, float, float], ...]] = {
    3: (
        (7.710969, -22.11376, 16.24874),
        (3.215276, -2.411172, 0.5013),
        (2.218308, -1.59399, 0.410748),
    ),
    4: (
        (8.093369, -23.62043, 17.44615),
        (3.636586, -2.721927, 0.5365463),
        (2.6613, -1.977154, 0.4526164),
        (1.956172, -1.337508, 0.3838527),
    ),
    5: (
        (8.383674, -24.76591, 18.35708),
        (4.04342, -3.011405, 0.5695122),
        (3.505571, -2.626654, 0.5257195),
        (2.490116, -1.834275, 0.4368347),
        (1.917776, -1.29675, 0.379705),
    ),
}


# Ratio of the longer side to the shorter from which polynomials are multiplied first.
LONG = 2.0
# In bfloat16 single steps are faster than that on CPUs that have instructions for it,
# from so many multiplications ``m^2 n`` on, but for matrices both narrow and long. What
# is worked on together does not count: a layer's step must not depend on the others.
HALVES, NARROW, LONG_NARROW = 1 << 21, 96, 3.0
# Relative to the largest singular value: the polynomials are steep at 1, and products
# in bfloat16 would leave it at 1.3 for a matrix of rank 1, after more steps anywhere.
MARGIN = 0.01


def polar(matrices: Tensor, steps: int = 3, *, precise: bool = True) -> Tensor:
    """Return approximate polar factors by quintic Newton-Schulz steps.

    The cost is ``steps (4 m^2 n + 2 m^3)`` multiplications and additions for ``m <=
    n``. From ``n = LONG m`` on the polynomials of all steps are multiplied before they
    are applied to the matrix: ``4 m^2 n + 6 steps m^3``. Small singular values stay
    below 1 and zeros stay zero, so the result for a matrix of low rank is the polar
    factor on its row and column space.

    Args:
        matrices: ``[b, m, n]``, of any scale.
        steps: Number of steps, a key of ``COEFFICIENTS``.
        precise: Whether to compute in the dtype of ``matrices``. If not, three steps of
            float32 matrices are multiplied in bfloat16 on devices that have
            instructions for it, where that is faster: a third to two thirds of the
            time, and an error of 2 to 4 % of the norm, of a matrix of low rank 7 to
            14 %: what rounding adds outside of its space is amplified.
    """
    # Of tall matrices the products on the other side, in the same memory order: with
    # transposed ones every operation on elements takes five times as long on a CPU.
    tall = matrices.shape[-2] > matrices.shape[-1]
    size = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x: Tensor = matrices / size.clamp(min=torch.finfo(matrices.dtype).tiny)
    half = not precise and steps == 3 and _halves(x)
    x = x.bfloat16() if half else x
    gram = _square(x, tall)
    fourth = _square(gram)
    # The eighth root of the sum of the singular values' eighth powers bounds the
    # largest as the Frobenius norm does, but more closely, and its products are needed.
    eighth = torch.linalg.vector_norm(fourth, dim=(-2, -1), keepdim=True)
    bound = eighth.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    if half:
        bound = bound * (1 + MARGIN) ** 2
    x = x.div_(bound.sqrt())
    gram, fourth = gram.div_(bound), fourth.div_(bound.square())
    if max(x.shape[1:]) >= LONG * min(x.shape[1:]) and not half:
        product = _polynomial(gram, fourth, steps)
        return _product(x, product.mT) if tall else _product(product, x)
    for number, (a, b, c) in enumerate(COEFFICIENTS[steps]):
        if number:
            gram = _square(x, tall)
            fourth = _square(gram)
        # Not ``alpha=c``: that rounds a tensor's last elements in bfloat16 otherwise.
        step = gram.mul_(b).add_(fourth.mul_(c))
        left, right = (x, step) if tall else (step, x)
        x = _add_product(x, left, right, a)
    return x.to(matrices.dtype)


def _halves(x: Tensor) -> bool:
    """Return whether steps with ``[b, m, n]`` are faster in bfloat16.

    On a GPU they always are, by an order of magnitude.
    """
    m, n = sorted(x.shape[1:])
    if x.device.type == "cpu":
        large = m * m * n >= HALVES and (m >= NARROW or n < LONG_NARROW * m)
    else:
        large = m * m * n >= 1 << 24
    return large and x.dtype == torch.float32 and multiplies_bfloat16(x.device)


def _polynomial(gram: Tensor, fourth: Tensor, steps: int) -> Tensor:
    """Return the product of the polynomials of all steps of :func:`polar`.

    ``fourth``, the square of ``gram``, is overwritten.
    """
    product: Tensor | None = None
    for number, (a, b, c) in enumerate(COEFFICIENTS[steps]):
        if number:  # as it is: errors that one triangle would mirror grow faster
            fourth = _product(gram, gram.mT)
        factor = fourth.mul_(c).add_(gram, alpha=b)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else _product(factor, product)
        if number < steps - 1:  # x -> factor x, and the factor commutes with gram
            gram = _product(_product(factor, factor), gram)
    assert product is not None
    return product


def _square(x: Tensor, tall: bool = False) -> Tensor:
    """Return ``x x^T`` of ``[b, m, n]``, or of ``tall`` ones ``x^T x``."""
    left, right = (x.mT, x) if tall else (x, x.mT)
    if len(x) == 1:
        return symmetric_product(left[0], right[0]).unsqueeze(0)
    return _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, with aligned rows where that pays."""
    if left.shape[-2] * right.shape[-1] < SMALL:
        return torch.bmm(left, right)
    out = aligned_empty((*left.shape[:-1], right.shape[-1]), left)
    if len(left) == 1:
        torch.mm(left[0], right[0], out=out[0])
        return out
    return torch.bmm(left, right, out=out)


def _add_product(x: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ``scale x + left right``, with aligned rows where that pays."""
    if x.shape[-2] * x.shape[-1] < SMALL:
        return torch.baddbmm(x, left, right, beta=scale)
    out = aligned_empty(tuple(x.shape), x)
    if len(x) == 1:
        torch.addmm(x[0], left[0], right[0], beta=scale, out=out[0])
        return out
    return torch.baddbmm(x, left, right, beta=scale, out=out)


# -- symmetric matrices ----------------------------------------------------------------


def packed_size(shape: Sequence[int], symmetric: bool) -> int:
    """Return the number of elements of a tensor, or of packed symmetric matrices."""
    count = prod(shape)
    return count // shape[-1] * (shape[-1] + 1) // 2 if symmetric else count


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Return one half of symmetric matrices ``[..., d, d]``: ``[..., d (d + 1) / 2]``.

    The matrix is cut in the middle; the triangles of the two diagonal blocks, the
    second transposed, fill one rectangle. So everything is copied in blocks, without
    index arithmetic for single elements.
    """
    d = matrices.shape[-1]
    h = (d + 1) // 2
    rectangle = matrices.new_zeros(*matrices.shape[:-2], h, d - h + 1)
    rectangle[..., : d - h, 1:] = matrices[..., h:, h:].triu()
    rectangle[..., :, : d - h + 1] += matrices[..., :h, : d - h + 1].tril()
    below = matrices[..., h:, :h]
    return torch.cat([rectangle.flatten(-2), below.flatten(-2)], dim=-1)


def unpack_symmetric(packed: Tensor) -> Tensor:
    """Return the matrices ``[..., d, d]`` that :func:`pack_symmetric` packed."""
    *lead, size = packed.shape
    d = isqrt(2 * size)
    h = (d + 1) // 2
    count = h * (d - h + 1)
    rectangle = packed[..., :count].unflatten(-1, (h, d - h + 1))
    below = packed[..., count:].unflatten(-1, (d - h, h))
    matrices = packed.new_empty(*lead, d, d)
    first = rectangle[..., :h].tril()
    second = rectangle[..., : d - h, 1:].triu()
    matrices[..., :h, :h] = first + first.tril(-1).mT
    matrices[..., h:, h:] = second + second.triu(1).mT
    matrices[..., h:, :h] = below
    matrices[..., :h, h:] = below.mT
    return matrices
