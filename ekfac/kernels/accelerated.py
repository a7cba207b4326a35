"""The public functions' way to a launch: ``None`` where there is none to be had."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels import dispatch
from ekfac.kernels.convolution import Convolution, with_depth
from ekfac.kernels.grams import Gram
from ekfac.kernels.moments import Scalings


def applies(rows: Tensor) -> bool:
    """Return whether tensors like this may be handed to a kernel at all."""
    if not rows.is_cuda or torch.compiler.is_compiling():
        return False
    # Nothing is recorded of a launch for a backward pass.
    return not (torch.is_grad_enabled() and rows.requires_grad)


def _result(rows: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=rows.device)


def gram(rows: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return ``sum_ns w_ns x_ns x_ns^T`` ``[b, d, d]`` of ``[N, S, b, d]``."""
    if not applies(rows) or rows.dtype != torch.float32:
        return None
    _, _, b, d = rows.shape
    one = Gram(_result(rows, b, d, d), rows, weight)
    return one.out if dispatch.grams([one]) == [True] else None


def diagonal_gram(rows: Tensor, weight: Tensor | None) -> Tensor | None:
    """Return the diagonal of :func:`gram`, ``[b, d]``."""
    if not applies(rows) or rows.dtype != torch.float32:
        return None
    one = Gram(_result(rows, *rows.shape[2:]), rows, weight)
    return one.out if dispatch.diagonals([one]) == [True] else None


def patch_gram(
    x: Tensor, conv: Convolution, weight: Tensor | None, *, bias: bool
) -> Tensor | None:
    """Return the Gram matrix of a convolution's patches, ``[groups, d, d]``.

    Args:
        x: ``[N, C, *]``, without the zeros around it.
        conv: How the layer reads it.
        weight: ``[N, S]`` or ``None``.
        bias: Whether patches end with a one.
    """
    if not applies(x) or x.dtype != torch.float32:
        return None
    width = conv.features(x.shape[1]) + int(bias)
    out = _result(x, conv.groups, width, width)
    one = Gram(out, with_depth(x), weight, bias=bias, conv=conv.in_three())
    return one.out if dispatch.grams([one]) == [True] else None


def squares(grads: Tensor, inputs: Tensor) -> Tensor | None:
    """Return ``sum_n (sum_s g_ns a_ns^T)^2``, ``[b, d_out, d_in]``.

    Args:
        grads: ``[N, S, b, d_out]``, in the basis.
        inputs: ``[N, S, b or 1, d_in]``, in the basis.
    """
    if not applies(grads) or not applies(inputs) or grads.dtype != torch.float32:
        return None
    out = _result(grads, *grads.shape[2:], inputs.shape[-1])
    one = Scalings(out, grads, inputs)
    return one.out if dispatch.scalings([one]) == [True] else None


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
    return dispatch.scalings([one]) == [True]
