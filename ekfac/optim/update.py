"""From directions to parameters: AdamW for the rest, KL clip, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature.options import Grafting
from ekfac.curvature.sharded_tensor import local, whole
from ekfac.layers import Block
from ekfac.optim.precondition import graft_factor

# Those of torch.optim.AdamW.
BETA2, EPS = 0.999, 1e-8


def adamw_direction(
    state: dict[str, Any], gradient: Tensor, beta1: float, grafting: Grafting | None
) -> Tensor:
    """Return the direction of a parameter that no block preconditions: AdamW's.

    Bias-corrected averages, the gradient's over the root of its square's (Loshchilov &
    Hutter 2019, algorithm 2, with torch's ``beta2`` and ``eps``); real and imaginary
    part have one each. Without ``"rms"`` grafting, where learning rates are in units of
    the gradient, it gets the gradient's norm.

    Args:
        state: Of the parameter; its averages are updated.
        gradient: Of the loss; a sparse one is taken with its zeros.
        beta1: Decay of the gradient's average.
        grafting: See :func:`ekfac.optim.precondition.graft_factor`.
    """
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if not state:
        state["exp_avg"] = torch.zeros_like(gradient)
        state["exp_avg_sq"] = torch.zeros_like(gradient)
        # Numbers, since load_state_dict would cast tensors to the parameter's dtype.
        state["weights"] = [0.0, 0.0]
    decays = zip(state["weights"], (beta1, BETA2), strict=True)
    state["weights"] = weights = [w * decay + 1 - decay for w, decay in decays]
    parts = [gradient, state["exp_avg"], state["exp_avg_sq"]]
    if gradient.is_complex():
        parts = [torch.view_as_real(part) for part in parts]
    part, first, second = parts
    local(first).lerp_(local(part), 1 - beta1)
    local(second).mul_(BETA2).addcmul_(local(part), local(part), value=1 - BETA2)
    root = (second / weights[1]).sqrt_().add_(EPS)
    direction: Tensor = first / weights[0] / root
    if gradient.is_complex():
        direction = torch.view_as_complex(direction)
    if grafting != "rms":
        length, norm = whole(direction.norm()), whole(gradient.norm())
        local(direction).mul_(graft_factor(length, direction.numel(), norm, "sgd"))
    return direction


def scatter_(block: Block, direction: Tensor, directions: dict[Tensor, Tensor]) -> None:
    """Put a block's direction to its parameters, of which it may have some rows.

    Args:
        block: The layer's block.
        direction: ``[b, d_out, d_in]``.
        directions: Parameter -> direction; added to.
    """
    slots, parts = block.adapter.slots(), block.unpack(direction)
    for parameter, slot, part in zip(block.tensors(), slots, parts, strict=True):
        if parameter.grad is None:
            continue
        if slot.rows is None:
            directions[parameter] = part.to(parameter.dtype)
            continue
        rows = directions.get(parameter)
        if rows is None:
            shape = parameter.shape
            rows = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        directions[parameter] = rows = whole(rows)
        slot.of(rows).copy_(part)


def clip_kl_(
    groups: Sequence[dict[str, Any]],
    forms: Sequence[Sequence[Tensor]],
    directions: dict[Tensor, Tensor],
) -> None:
    """Bound the step's Kullback-Leibler divergence, in place.

    That of a step ``lr u`` is about half of ``lr^2 u^T F u``, which is ``lr^2 u^T g``
    for the textbook step; where the sum of that over all groups exceeds the group's
    ``kl_clip``, its directions shrink (Ba et al. 2017, section 5). Nothing here waits
    for the device.

    Args:
        groups: Give ``lr`` and ``kl_clip``.
        forms: ``u^T (F + damping) u`` of the blocks of each group that has a clip.
        directions: Parameter -> ``u``; multiplied.
    """
    terms = [
        _sum([form.to(some[0]) for form in some]) * group["lr"] ** 2
        for group, some in zip(groups, forms, strict=True)
        if some
    ]
    if not terms:
        return
    total = torch.stack([term.to(terms[0]) for term in terms]).sum().abs()
    tiny = torch.finfo(total.dtype).tiny
    for group in groups:
        if group["kl_clip"] is None:
            continue
        factor = (group["kl_clip"] / total.clamp(min=tiny)).sqrt().clamp(max=1)
        for parameter in group["params"]:
            if parameter in directions:
                direction = local(directions[parameter])
                direction.mul_(factor.to(direction))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """Return the sum, term after term."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def apply_(
    group: dict[str, Any], parameters: list[Tensor], directions: list[Tensor]
) -> None:
    """Move the parameters of one group along their directions, in place.

    Decoupled weight decay, in AdamW's units: ``p <- p - lr (u + weight_decay p)``.
    """
    lr, decay = group["lr"], group["weight_decay"]
    parameters = [local(p) for p in parameters]
    directions = [local(direction) for direction in directions]
    if decay != 0:
        torch._foreach_mul_(parameters, 1 - lr * decay)
    if isinstance(lr, Tensor):
        steps = [direction * lr.to(direction) for direction in directions]
        torch._foreach_sub_(parameters, steps)
    else:
        torch._foreach_add_(parameters, directions, alpha=-lr)
