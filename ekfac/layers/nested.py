"""Calls with nested tensors, filled up with positions that do not count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ekfac.layers.base import Adapter, MaskedAdapter

Arrange = Callable[[Tensor], Tensor]


def padded(nested: Tensor) -> Tensor:
    """Return ``[N, L, *]`` of a nested ``[N, lengths, *]``, zero behind the ends."""
    dense: Tensor = torch.nested.to_padded_tensor(nested, 0)
    return dense


def padded_call(
    adapter: Adapter, x: Tensor, arrange: Arrange | None
) -> tuple[MaskedAdapter, Tensor, Arrange]:
    """Return a call with a nested input as one with a dense input.

    Args:
        adapter: The layer's.
        x: Its input, ``[N, lengths, *]``.
        arrange: Lays the gradient of its output, see :meth:`Adapter.call_of`.

    Returns:
        An adapter that leaves out what was filled up, the input and what lays the
        gradient.
    """
    x = x.detach()
    keep = padded(torch.ones_like(x))
    keep = keep.flatten(2)[..., 0] if keep.dim() > 2 else keep
    dense = padded(x)
    positions = adapter.inputs(dense).shape[1]
    keep = (keep > 0).repeat_interleave(positions // max(1, keep.shape[1]), dim=1)
    return MaskedAdapter(adapter, keep), dense, partial(_dense_gradient, arrange)


def _dense_gradient(arrange: Arrange | None, grad: Tensor) -> Tensor:
    """Return a gradient's nested tensor filled up, and laid."""
    grad = padded(grad) if grad.is_nested else grad
    return grad if arrange is None else arrange(grad)
