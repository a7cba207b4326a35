"""What the kernels compute, with torch: for every device and every type."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels.convolution import unfolded
from ekfac.kernels.counts import Counts
from ekfac.kernels.elementwise import Preconditioned, Squares
from ekfac.kernels.grams import Gram
from ekfac.kernels.moments import Scalings


def accumulation(tensor: Tensor) -> torch.dtype:
    """Return the type that sums are taken in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def update_(out: Tensor, value: Tensor, alpha: float, beta: float) -> None:
    """Set ``out`` to ``beta out + alpha value``; with ``beta`` 0 it is not read."""
    if beta == 0:
        out.copy_(alpha * value)
    else:
        out.mul_(beta).add_(value.to(out.dtype), alpha=alpha)


def _wide_rows(gram: Gram) -> Tensor:
    """Return the rows ``[N, S, b, d]`` with the bias, in the type of the sum."""
    x = gram.x if gram.conv is None else unfolded(gram.x, gram.conv)
    x = x.to(accumulation(gram.x))
    if not gram.bias:
        return x
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


def gram_reference_(gram: Gram) -> None:
    """Do what ``gram.cu`` does, with torch."""
    x = _wide_rows(gram)
    left = x if gram.weight is None else x * gram.weight[..., None, None].to(x.dtype)
    total = torch.einsum("nsbi,nsbj->bij", left, x)
    update_(gram.out, total, gram.alpha, gram.beta)


def diagonal_reference_(gram: Gram) -> None:
    """Do what ``diagonal.cu`` does, with torch."""
    x = _wide_rows(gram).square()
    if gram.weight is not None:
        x = x * gram.weight[..., None, None].to(x.dtype)
    update_(gram.out, x.sum(dim=(0, 1)), gram.alpha, gram.beta)


def counts_reference_(layer: Counts) -> None:
    """Do what ``counts.cu`` does, with torch."""
    kind, size = accumulation(layer.out), layer.out.shape[-1]
    index = layer.index.reshape(-1).long()
    weight = torch.ones_like(index, dtype=kind)
    if layer.weight is not None:
        weight = layer.weight.reshape(-1).to(kind)
    inside = (index >= 0) & (index < size)
    total = torch.zeros(size, dtype=kind, device=layer.out.device)
    total.index_add_(0, torch.where(inside, index, 0), weight * inside)
    update_(layer.out, total.unsqueeze(0), layer.alpha, layer.beta)


def squares_reference_(layer: Squares) -> Tensor:
    """Do what ``squares.cu`` does, with torch."""
    keep, rate = layer.scale.to(layer.scalings.dtype).unbind()
    # What is not read may be anything, a number that is not finite among them.
    update = torch.where(rate != 0, rate * layer.projected.square(), 0.0)
    layer.scalings.mul_(keep).add_(update)
    return layer.scalings.sum()


def scalings_reference_(layer: Scalings) -> None:
    """Do what ``scalings.cu`` does, with torch, an example at a time if need be."""
    kind = accumulation(layer.grads)
    grads, inputs = layer.grads.to(kind), layer.inputs.to(kind)
    if grads.shape[1] == 1:
        g, a = grads[:, 0].square(), inputs[:, 0].square()
        a = a.expand(-1, g.shape[1], -1)
        total = torch.einsum("nbi,nbj->bij", g, a)
    else:
        total = grads.new_zeros(layer.out.shape)
        for g, a in zip(grads, inputs, strict=True):  # [S, b, d_out], [S, b or 1, d_in]
            total += (g.permute(1, 2, 0) @ a.permute(1, 0, 2)).square()
    update_(layer.out, total, layer.alpha, layer.beta)


def precondition_reference_(layer: Preconditioned, power: float) -> Tensor:
    """Do what ``precondition.cu`` does, with torch."""
    u, damped = layer.projected, layer.scalings + layer.damping
    usable = damped > 0
    factor = torch.where(usable, damped, 1.0).pow(power)
    # A number that is not finite stays one.
    u.mul_(torch.where(usable | damped.isnan(), factor, 0.0))
    return torch.stack([(u.square() * damped).sum(), u.square().sum()])
