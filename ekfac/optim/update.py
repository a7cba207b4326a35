"""From directions to parameters: grafting, KL clip, momentum, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature.sharded import local, whole


def graft_(direction: Tensor, gradient: Tensor, grafting: str | None) -> None:
    """Give a layer's direction the length that ``grafting`` asks for, in place.

    ``"rms"``: a root mean square of 1, so that the learning rate is the change per
    weight and step. ``"sgd"``: the gradient's norm. ``None``: its own (Agarwal et al.
    2020, section 3).
    """
    if grafting is None:
        return
    target = direction.numel() ** 0.5 if grafting == "rms" else whole(gradient.norm())
    local(direction).mul_(graft_factor(whole(direction.norm()), target))


def graft_factor(length: Tensor, target: Tensor | float) -> Tensor:
    """Return what brings a direction of a length to another one.

    A direction of no length stays zero: the quotient would overflow, 0 inf is NaN.
    """
    tiny = torch.finfo(length.dtype).tiny
    return torch.where(length > tiny * target, target / length, 0.0)


def diagonal_direction(
    state: dict[str, Any], gradient: Tensor, decay: float, grafting: str | None
) -> Tensor:
    """Return the direction of a parameter that no block covers, as AdamW's.

    The gradient over the root of its bias-corrected running second moment. Without
    ``"rms"`` grafting, where learning rates are in units of the gradient, it gets the
    gradient's norm.

    Args:
        state: Of the parameter; its second moment is updated.
        gradient: Of the loss.
        decay: Of the second moment.
        grafting: See :func:`graft_`.
    """
    if "second_moment" not in state:
        state["second_moment"] = torch.zeros_like(gradient)
        # A number, since load_state_dict would cast a tensor to the parameter's dtype.
        state["weight"] = 0.0
    part = local(gradient)
    local(state["second_moment"]).mul_(decay).addcmul_(part, part, value=1 - decay)
    state["weight"] = state["weight"] * decay + (1 - decay)
    root = (state["second_moment"] / state["weight"]).sqrt()
    direction: Tensor = gradient / root.add_(1e-8)
    graft_(direction, gradient, None if grafting == "rms" else "sgd")
    return direction


def kl_factor(
    groups: Sequence[dict[str, Any]], products: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return what each group's directions are multiplied with to bound the step's KL.

    The Kullback-Leibler divergence of a step ``lr u`` is about half of
    ``lr^2 u^T F u``, which is ``lr^2 u^T g`` for the textbook step; where the sum of
    that over all groups exceeds the group's ``kl_clip``, its directions shrink (Ba et
    al. 2017, section 5). Nothing here waits for the device.

    Args:
        groups: Give ``lr`` and ``kl_clip``.
        products: ``u^T (F + damping) u``, summed over the blocks of each group.
    """
    terms = [
        product * group["lr"] ** 2
        for group, product in zip(groups, products, strict=True)
        if product is not None
    ]
    if not terms:
        return [None] * len(groups)
    total = torch.stack([term.to(terms[0]) for term in terms]).sum().abs()
    tiny = torch.finfo(total.dtype).tiny
    return [
        None
        if group["kl_clip"] is None
        else (group["kl_clip"] / total.clamp(min=tiny)).sqrt().clamp(max=1)
        for group in groups
    ]


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
