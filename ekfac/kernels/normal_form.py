"""Sums over the normal form ``[N, S, b, d]``: Gram matrices, counts, second moments.

Every function runs on every device and dtype. On CUDA devices some launch a kernel of
``csrc/`` instead, see :mod:`ekfac.kernels.cuda.dispatch`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels.cuda import operators
from ekfac.kernels.linalg import SMALL, matmul, rotate, symmetric_product

# Number of elements that fit into a core's own cache.
CACHED = 1 << 17


def _by_example(rows: Tensor) -> bool:
    """Return whether a product for each example is cheaper than one of all rows.

    One product copies rows that are not contiguous over examples and positions, like
    patches. One for each example does not, but adds ``d x d`` numbers every time, which
    pays if an example has enough rows.
    """
    n, s, b, d = rows.shape
    apart = n > 1 and s > 1 and rows.stride(0) != s * rows.stride(1)
    enough = 4 * s >= d and s * b * d * d >= 8 * SMALL
    return apart and enough and rows.device.type == "cpu"


def gram(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ``sum_ns w_ns x_ns x_ns^T`` per block, ``[b, d, d]``.

    Args:
        rows: ``[N, S, b, d]``.
        weight: ``[N, S]``, or ``None`` for ones.
    """
    gram_sum = operators.launched("gram_", operators.gram_of(rows, weight))
    if gram_sum is not None:
        return gram_sum
    n, s, b, d = rows.shape
    if weight is None and _by_example(rows):
        sums = rows.new_zeros(b, d, d)
        for example in rows:
            sums.baddbmm_(example.permute(1, 2, 0), example.permute(1, 0, 2))
        return sums
    flat = rows.reshape(n * s, b, d)
    left = flat if weight is None else flat * weight.reshape(-1, 1, 1)
    if b == 1:
        return symmetric_product(left[:, 0].t(), flat[:, 0]).unsqueeze(0)
    columns, others = left.permute(2, 0, 1), flat.permute(2, 0, 1)
    if d == 1 or (d == 2 and columns.is_contiguous()):  # products of rows with rows
        return (columns.unsqueeze(1) * others).sum(dim=2).permute(2, 0, 1)
    return torch.bmm(left.permute(1, 2, 0), flat.permute(1, 0, 2))


def diagonal_gram(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the diagonal of :func:`gram`, ``[b, d]``."""
    item = operators.gram_of(rows, weight, diagonal=True)
    if (sums := operators.launched("diagonal_gram_", item)) is not None:
        return sums
    squares = rows.square()
    if weight is not None:
        squares = squares * weight[..., None, None]
    return squares.sum(dim=(0, 1))


def index_counts(
    index: Tensor, size: int, weight: Tensor | None, like: Tensor
) -> Tensor:
    """Return how often each value of ``index`` ``[N, S]`` occurs, ``[1, size]``."""
    item = operators.counts_of(index, size, weight, like)
    if (occurrences := operators.launched("index_counts_", item)) is not None:
        return occurrences
    counts = torch.zeros(size, dtype=like.dtype, device=like.device)
    ones = torch.ones_like(index, dtype=like.dtype) if weight is None else weight
    return counts.index_add_(0, index.reshape(-1), ones.reshape(-1)).unsqueeze(0)


def position_sum(grads: Tensor, inputs: Tensor) -> Tensor:
    """Return ``sum_s g_ns a_ns^T``, per-example gradients ``[N, b, d_out, d_in]``.

    Args:
        grads: ``[N, S, b, d_out]``.
        inputs: ``[N, S, b or 1, d_in]``.
    """
    if grads.shape[-1] == 1 and inputs.shape[-1] <= 2:  # products of rows with rows
        return (grads * inputs).sum(dim=1).unsqueeze(-2)
    return grads.permute(0, 2, 3, 1) @ inputs.permute(0, 2, 1, 3)


def total_gradient(grads: Tensor, inputs: Tensor) -> Tensor:
    """Return ``sum_ns g_ns a_ns^T``, the gradient of all examples ``[b, d_out, d_in]``.

    Args:
        grads: ``[N, S, b, d_out]``.
        inputs: ``[N, S, b or 1, d_in]``.
    """
    g, a = grads.flatten(0, 1), inputs.flatten(0, 1)
    return matmul(g.permute(1, 2, 0), a.permute(1, 0, 2))


def rotates_vectors(
    grads: Tensor, inputs: Tensor, left: Tensor | None, right: Tensor | None
) -> bool:
    """Return whether rotating the vectors is cheaper than rotating their products.

    Args:
        grads: ``[N, S, b, d_out]``.
        inputs: ``[N, S, b or 1, d_in]``.
        left: Output basis or ``None``.
        right: Input basis or ``None``.
    """
    s = grads.shape[1]
    early_left = left is None or s <= inputs.shape[-1]
    return early_left and (right is None or s <= grads.shape[-1])


def second_moment(
    grads: Tensor,
    inputs: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    budget: int = 1 << 22,
) -> tuple[Tensor, Tensor]:
    """Return sums over examples of squared and plain gradients in a Kronecker basis.

    With one position the gradient is ``g a^T``, and its square in the basis is the
    outer product of squares. With several, the gradient is summed over positions before
    it is squared; each side rotates the ``S`` vectors before the sum or, if the other
    side has fewer than ``S`` features, the summed gradient.

    Args:
        grads: ``[N, S, b, d_out]``.
        inputs: ``[N, S, b or 1, d_in]``.
        left: Output basis ``[b, d_out, d_out]`` or ``None`` for the identity.
        right: Input basis ``[b or 1, d_in, d_in]`` or ``None``.
        budget: Number of elements of per-example gradients that may exist at a time.

    Returns:
        ``sum_n (Q_G^T dW_n Q_A)^2`` and ``sum_n Q_G^T dW_n Q_A``, both
        ``[b, d_out, d_in]``.
    """
    _, s, b, d_out = grads.shape
    d_in = inputs.shape[-1]
    early = rotates_vectors(grads, inputs, left, right)
    if early and operators.applies(grads):
        g, a = rotate(grads, left), rotate(inputs, right)
        item = operators.squares_of(g, a)
        if (squares_sum := operators.launched("scalings_", item)) is not None:
            return squares_sum, total_gradient(g, a)
    if s == 1:
        g = rotate(grads, left)[:, 0].permute(1, 2, 0)  # [b, d_out, N]
        a = rotate(inputs, right)[:, 0].permute(1, 0, 2)  # [b or 1, N, d_in]
        return matmul(g.square(), a.square()), matmul(g, a)
    squares = grads.new_zeros(b, d_out, d_in)
    sums = grads.new_zeros(b, d_out, d_in)
    # Each side rotates what is fewer: the vectors, or the rows of their sum.
    early_left = None if s > d_in else left
    early_right = None if s > d_out else right
    step = max(1, budget // (b * (s * (d_in + d_out) + d_out * d_in)))
    for g, a in zip(grads.split(step), inputs.split(step), strict=True):
        examples = position_sum(rotate(g, early_left), rotate(a, early_right))
        if early_right is None and right is not None:
            examples = _rotate_rows(examples, right)
        if early_left is None and left is not None:
            examples = left.mT @ examples
        sums += examples.sum(dim=0)
        add_squares_(squares, examples)
    return squares, sums


def _rotate_rows(matrices: Tensor, basis: Tensor) -> Tensor:
    """Return ``M Q`` of ``[N, b, d_out, d_in]``, one product if ``Q`` has one block."""
    if len(basis) > 1:
        return matrices @ basis
    return matmul(matrices.flatten(0, 2), basis[0]).reshape(matrices.shape)


def add_squares_(squares: Tensor, examples: Tensor) -> None:
    """Add ``sum_n E_n^2`` to ``squares``, without a copy of large examples.

    Args:
        squares: ``[b, d_out, d_in]``.
        examples: ``[N, b, d_out, d_in]``; its contents are lost.
    """
    if squares.numel() < SMALL:
        squares += examples.square_().sum(dim=0)
        return
    for example in examples:
        squares.addcmul_(example, example)


def add_squared_sums_(squares: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """Add ``sum_n (sum_s g_ns a_ns^T)^2`` of rotated vectors to ``squares``.

    A few columns of one example at a time, to keep them in the cache.

    Args:
        squares: ``[b, d_out, d_in]``.
        grads: ``[N, b, d_out, S]``.
        inputs: ``[N, b, d_in, S]``.
    """
    if operators.add_squares_(squares, grads, inputs):
        return
    width = max(1, CACHED // squares[..., 0].numel())
    for start in range(0, squares.shape[-1], width):
        part = squares[..., start : start + width]
        product = torch.empty_like(part)
        columns = inputs[:, :, start : start + width].mT
        for g, a in zip(grads, columns, strict=True):
            torch.bmm(g, a, out=product)
            part.addcmul_(product, product)


def indexed_second_moment(
    grads: Tensor, index: Tensor, size: int, left: Tensor | None
) -> Tensor:
    """Return the squares of :func:`second_moment` for one-hot inputs ``[1, d_out, V]``.

    Args:
        grads: ``[N, S, 1, d_out]``.
        index: ``[N, S]``, which input is 1.
        size: Number of inputs, ``V``.
        left: Output basis ``[1, d_out, d_out]`` or ``None``.
    """
    n = len(index)
    g = rotate(grads, left).reshape(-1, grads.shape[-1])
    example = torch.arange(n, device=index.device).unsqueeze(1)
    keys, where = _numbered((example * size + index).reshape(-1))
    sums = torch.zeros_like(g).index_add_(0, where, g)
    moment = g.new_zeros(size, g.shape[-1]).index_add_(0, keys % size, sums.square())
    return moment.t().unsqueeze(0)


def _numbered(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct keys ``[K]``, ascending, and each key's position in them.

    Like ``torch.unique``, which waits for the device to count them; here zeros fill up
    the result to ``[K]``, and no position points to those.
    """
    ordered, order = keys.sort(stable=True)
    fresh = torch.zeros_like(ordered)
    fresh[1:] = ordered[1:] != ordered[:-1]
    number = fresh.cumsum(0)
    where = torch.empty_like(order).scatter_(0, order, number)
    return torch.zeros_like(keys).scatter_(0, number, ordered), where
