"""From directions to parameters: KL clip, momentum, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature.options import Grafting
from ekfac.curvature.sharded_tensor import local, whole
from ekfac.layers import Block
from ekfac.optim.precondition import graft_factor


def diagonal_direction(
    state: dict[str, Any], gradient: Tensor, decay: float, grafting: Grafting | None
) -> Tensor:
    """Return the direction of a parameter that no block covers, as AdamW's.

    The gradient over the root of its bias-corrected running second moment; real and
    imaginary part have one each. Without ``"rms"`` grafting, where learning rates are
    in units of the gradient, it gets the gradient's norm.

    Args:
        state: Of the parameter; its second moment is updated.
        gradient: Of the loss; a sparse one is taken with its zeros.
        decay: Of the second moment.
        grafting: See :func:`ekfac.optim.precondition.graft_factor`.
    """
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    if "second_moment" not in state:
        state["second_moment"] = torch.zeros_like(gradient)
        # A number, since load_state_dict would cast a tensor to the parameter's dtype.
        state["weight"] = 0.0
    state["weight"] = state["weight"] * decay + (1 - decay)
    if gradient.is_complex():
        parts = torch.view_as_real(gradient)
        moment = torch.view_as_real(state["second_moment"])
        direction = torch.view_as_complex(_scaled(parts, moment, decay, state))
    else:
        direction = _scaled(gradient, state["second_moment"], decay, state)
    if grafting != "rms":
        length, norm = whole(direction.norm()), whole(gradient.norm())
        local(direction).mul_(graft_factor(length, direction.numel(), norm, "sgd"))
    return direction


def _scaled(
    gradient: Tensor, moment: Tensor, decay: float, state: dict[str, Any]
) -> Tensor:
    """Return the gradient over the root of its second moment, which is updated."""
    part = local(gradient)
    local(moment).mul_(decay).addcmul_(part, part, value=1 - decay)
    root = (moment / state["weight"]).sqrt()
    scaled: Tensor = gradient / root.add_(1e-8)
    return scaled


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
    group: dict[str, Any],
    parameters: list[Tensor],
    directions: list[Tensor],
    states: Sequence[dict[str, Any]],
    nesterov: bool,
) -> None:
    """Move the parameters of one group along their directions, in place.

    Decoupled weight decay (Loshchilov & Hutter 2019), then heavy-ball momentum as in
    ``torch.optim.SGD``.
    """
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    if momentum != 0:
        for state, direction in zip(states, directions, strict=True):
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(direction)
    parameters, directions = (
        [local(p) for p in parameters],
        list(map(local, directions)),
    )
    if decay != 0:
        torch._foreach_mul_(parameters, 1 - lr * decay)
    if momentum != 0:
        buffers = [local(state["momentum_buffer"]) for state in states]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, directions)
        if nesterov:
            directions = list(torch._foreach_add(directions, buffers, alpha=momentum))
        else:
            directions = buffers
    if isinstance(lr, Tensor):
        steps = [direction * lr.to(direction) for direction in directions]
        torch._foreach_sub_(parameters, steps)
    else:
        torch._foreach_add_(parameters, directions, alpha=-lr)
