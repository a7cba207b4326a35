"""Attempts to launch a CUDA kernel; ``None`` if unavailable."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.cuda import dispatch
from ekfac.kernels.cuda.counts import Counts
from ekfac.kernels.cuda.gram import Gram
from ekfac.kernels.cuda.registry import SUMS
from ekfac.kernels.cuda.scalings import Scalings


def applies(rows: Tensor) -> bool:
    """Return whether tensors like this may be handed to a kernel at all."""
    if not rows.is_cuda or torch.compiler.is_compiling():
        return False
    # Nothing is recorded of a launch for a backward pass.
    return not (torch.is_grad_enabled() and rows.requires_grad)


def _result(rows: Tensor, *shape: int) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.empty(shape, dtype=dtype, device=rows.device)


def gram_of(
    rows: Tensor,
    weight: Tensor | None = None,
    *,
    diagonal: bool = False,
    bias: bool = False,
) -> Gram | None:
    """Return ``sum_ns w_ns x_ns x_ns^T`` or its diagonal, to be launched.

    Args:
        rows: ``[N, S, b, d]``.
        weight: ``[N, S]`` or ``None``.
        diagonal: The result is ``[b, d]`` in place of ``[b, d, d]``.
        bias: Whether rows end with a one that is not in memory.
    """
    if not applies(rows):
        return None
    b, d = rows.shape[2], rows.shape[3] + int(bias)
    out = _result(rows, b, d) if diagonal else _result(rows, b, d, d)
    one = Gram(out, rows, weight, bias=bias)
    operator = SUMS["diagonal_gram_" if diagonal else "gram_"]
    return one if dispatch.takes(operator, one) else None


def patch_gram_of(x: Tensor, conv: Convolution, *, bias: bool) -> Gram | None:
    """Return the Gram matrix of a convolution's patches, to be launched.

    Args:
        x: ``[N, C, *]``, without the zeros around it.
        conv: How the layer reads it.
        bias: Whether patches end with a one.
    """
    if not applies(x):
        return None
    width = conv.features(x.shape[1]) + int(bias)
    out = _result(x, conv.groups, width, width)
    one = Gram(out, with_depth(x), bias=bias, conv=conv.in_three())
    return one if dispatch.takes(SUMS["patch_gram_"], one) else None


def counts_of(
    index: Tensor, size: int, weight: Tensor | None, like: Tensor
) -> Counts | None:
    """Return how often each index occurs, ``[1, size]``, to be launched."""
    if not applies(index):
        return None
    one = Counts(_result(like, 1, size), index, weight)
    return one if dispatch.takes(SUMS["index_counts_"], one) else None


def squares_of(grads: Tensor, inputs: Tensor) -> Scalings | None:
    """Return ``sum_n (sum_s g_ns a_ns^T)^2``, ``[b, d_out, d_in]``, to be launched.

    Args:
        grads: ``[N, S, b, d_out]``, in the basis.
        inputs: ``[N, S, b or 1, d_in]``, in the basis.
    """
    if not applies(grads) or not applies(inputs):
        return None
    one = Scalings(_result(grads, *grads.shape[2:], inputs.shape[-1]), grads, inputs)
    return one if dispatch.takes(SUMS["scalings_"], one) else None


def _launched(name: str, item: Gram | Counts | Scalings | None) -> Tensor | None:
    """Return the result of one item, or ``None`` if it was not launched."""
    if item is None or dispatch.run_sums(SUMS[name], [item]) != [True]:
        return None
    return item.out


def gram(rows: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return ``sum_ns w_ns x_ns x_ns^T`` ``[b, d, d]`` of ``[N, S, b, d]``."""
    one = gram_of(rows, weight)
    return _launched("gram_", one)


def diagonal_gram(rows: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return the diagonal of :func:`gram`, ``[b, d]``."""
    one = gram_of(rows, weight, diagonal=True)
    return _launched("diagonal_gram_", one)


def counts(
    index: Tensor, size: int, weight: Tensor | None, like: Tensor
) -> Tensor | None:
    """Return how often each index occurs, ``[1, size]``."""
    one = counts_of(index, size, weight, like)
    return _launched("index_counts_", one)


def squares(grads: Tensor, inputs: Tensor) -> Tensor | None:
    """Return ``sum_n (sum_s g_ns a_ns^T)^2``, ``[b, d_out, d_in]``.

    Args:
        grads: ``[N, S, b, d_out]``, in the basis.
        inputs: ``[N, S, b or 1, d_in]``, in the basis.
    """
    one = squares_of(grads, inputs)
    return _launched("scalings_", one)


def add_squares_(squares: Tensor, grads: Tensor, inputs: Tensor) -> bool:
    """Add ``sum_n (sum_s g_ns a_ns^T)^2`` to ``squares``; return whether it was done.

    Args:
        squares: ``[b, d_out, d_in]``.
        grads: ``[N, b, d_out, S]``, in the basis.
        inputs: ``[N, b or 1, d_in, S]``, in the basis.
    """
    if not applies(grads) or not applies(inputs):
        return False
    order = (0, 3, 1, 2)
    one = Scalings(squares, grads.permute(order), inputs.permute(order), beta=1.0)
    return dispatch.run_sums(SUMS["scalings_"], [one]) == [True]
