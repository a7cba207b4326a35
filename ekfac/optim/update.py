"""Parameter updates: AdamW where no block is, KL clip, weight decay, description."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature import Curvature
from ekfac.curvature.options import Grafting, Options
from ekfac.layers import Block, Coverage
from ekfac.layers.base import local, whole
from ekfac.layers.blocks import reason_unseen
from ekfac.optim.precondition import graft_factor, treatment

# Those of torch.optim.AdamW.
BETA2, EPS = 0.999, 1e-8


def adamw_directions(
    states: Sequence[dict[str, Any]],
    gradients: Sequence[Tensor],
    beta1: float,
    grafting: Grafting | None,
) -> list[Tensor]:
    """Return the directions of parameters that no block preconditions: AdamW's.

    Bias-corrected averages, the gradient's over the root of its square's (Loshchilov &
    Hutter 2019, algorithm 2, with torch's ``beta2`` and ``eps``); real and imaginary
    part have one each. Without ``"rms"`` grafting, where learning rates are in units of
    the gradient, they get the gradients' norms.

    Args:
        states: Of the parameters; their averages are updated.
        gradients: Of the loss; sparse ones are taken with their zeros.
        beta1: Decay of the gradients' averages.
        grafting: See :func:`ekfac.optim.precondition.graft_factor`.
    """
    dense = [g.to_dense() if g.is_sparse else g for g in gradients]
    dense = [in_average_type(g, g) for g in dense]
    # One call for many tensors: those of a kind.
    kinds: dict[object, list[int]] = {}
    for number, (state, gradient) in enumerate(zip(states, dense, strict=True)):
        _prepare(state, gradient)
        mesh = getattr(gradient, "device_mesh", None)
        kind = gradient.device, gradient.dtype, mesh
        kinds.setdefault(kind, []).append(number)
    directions: dict[int, Tensor] = {}
    for numbers in kinds.values():
        members = [states[n] for n in numbers], [dense[n] for n in numbers]
        directions |= zip(numbers, _adamw(*members, beta1), strict=True)
    if grafting != "rms":
        for number, gradient in enumerate(dense):
            direction = directions[number]
            length, norm = whole(direction.norm()), whole(gradient.norm())
            factor = graft_factor(length, direction.numel(), norm, "sgd")
            local(direction).mul_(factor)
    return [directions[n].to(g.dtype) for n, g in enumerate(gradients)]


def in_average_type(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor where a parameter is, in the type of its averages.

    That is float32 for types of half precision: in float16 small squares, and
    ``EPS``, are zero.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return tensor.to(parameter.device, dtype)


def _prepare(state: dict[str, Any], gradient: Tensor) -> None:
    """Begin a parameter's averages, or follow it to where it was moved or cast."""
    if not state:
        state["exp_avg"] = torch.zeros_like(gradient)
        state["exp_avg_sq"] = torch.zeros_like(gradient)
        # Numbers, since load_state_dict would cast tensors to the parameter's dtype.
        state["weights"] = [0.0, 0.0]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = state[key].to(gradient)


def _adamw(
    states: Sequence[dict[str, Any]], gradients: Sequence[Tensor], beta1: float
) -> list[Tensor]:
    """Return the directions of parameters of one kind."""
    for state in states:
        decays = zip(state["weights"], (beta1, BETA2), strict=True)
        state["weights"] = [w * decay + 1 - decay for w, decay in decays]
    first_weights, second_weights = zip(*(s["weights"] for s in states), strict=True)
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states]
    is_complex = gradients[0].is_complex()
    if is_complex:
        first, second = ([torch.view_as_real(t) for t in ts] for ts in (first, second))
        gradients = [torch.view_as_real(gradient) for gradient in gradients]
    own = [[local(t) for t in tensors] for tensors in (first, second, gradients)]
    torch._foreach_lerp_(own[0], own[2], 1 - beta1)
    torch._foreach_mul_(own[1], BETA2)
    torch._foreach_addcmul_(own[1], own[2], own[2], value=1 - BETA2)
    roots = torch._foreach_div(second, second_weights)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, EPS)
    directions = torch._foreach_div(first, first_weights)
    torch._foreach_div_(directions, roots)
    if is_complex:
        return [torch.view_as_complex(direction) for direction in directions]
    return list(directions)


def scatter_(block: Block, direction: Tensor, directions: dict[Tensor, Tensor]) -> None:
    """Put a block's direction to its parameters, of which it may have some rows.

    The direction is ``[b, d_out, d_in]``; those by parameter are added to.
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
    terms = []
    for group, own in zip(groups, forms, strict=True):
        if own:
            rest = (form.to(own[0]) for form in own[1:])
            terms.append(sum(rest, start=own[0]) * group["lr"] ** 2)
    if not terms:
        return
    divergence = torch.stack([term.to(terms[0]) for term in terms]).sum().abs()
    tiny = torch.finfo(divergence.dtype).tiny
    for group in groups:
        if group["kl_clip"] is None:
            continue
        factor = (group["kl_clip"] / divergence.clamp(min=tiny)).sqrt().clamp(max=1)
        for parameter in group["params"]:
            if parameter in directions:
                direction = local(directions[parameter])
                direction.mul_(factor.to(direction))


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


# -- the table -------------------------------------------------------------------------

LIKE_ADAMW, NOT_TRAINED = "AdamW-like", "not trained"
BLOCKS = (
    "block: b x d_out x d_in, b independent matrices [weight | bias] of a layer "
    "(d_in counts the bias); of a parameter in no block, its shape"
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        layer: Name of the layer, or of a parameter that is in no block.
        kind: The layer's type.
        block: ``b x d_out x d_in``, or the parameter's shape.
        method: How it is preconditioned.
        bytes: Memory of its curvature.
        reason: Why this method, where it is not the usual one.
    """

    layer: str
    kind: str
    block: str
    method: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Description:
    """The table; printing it shows it."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """Return the table as text."""
        head = ("layer", "kind", "block", "method", "bytes", "reason")
        lines = [head, *[tuple(str(getattr(r, h)) for h in head) for r in self.rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            )
            for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([BLOCKS, *(line.rstrip() for line in text)])

    def __repr__(self) -> str:
        """Return the table as text."""
        return str(self)


def describe(
    curvature: Curvature,
    coverage: Coverage,
    options: Options,
    unseen: Collection[str] = (),
    *,
    trained: Collection[Tensor],
) -> Description:
    """Return how every parameter is treated that is, or was, given to be trained.

    Layers that had gradients but no statistics so far are ``unseen``; ``trained`` are
    the parameters in the groups now.
    """
    given = {id(parameter) for parameter in trained}
    method = "K-FAC" if options.scaling is None else "EKFAC"
    rows = []
    for layer in curvature.values():
        block = layer.block
        modules = dict.fromkeys(use.adapter.module for use in block.uses)
        kinds = "+".join(type(module).__name__ for module in modules)
        name, reason = method, ""
        if block.exact:
            name, reason = "exact", "small blocks are kept exactly"
        elif any(block.diagonal):
            sides = zip(("input", "output"), block.diagonal, strict=True)
            which = " and ".join(side for side, diagonal in sides if diagonal)
            name = f"{method}, diagonal {which}"
            wide = f"wider than max_dim={options.max_dim}"
            if max(block.shape[1:]) <= options.max_dim:
                wide = f"wider than {options.max_aspect} times the other side"
            reason = "one-hot inputs" if block.adapter.diagonal_input else wide
        elif layer.truncated:
            sizes = zip(("G", "A"), block.shape[1:], strict=True)
            kept = [f"{d - layer.complement(side)} of {d}" for side, d in sizes]
            name, reason = f"{method}, {' x '.join(kept)}", "truncated bases"
        direction = treatment(layer, options)
        if direction == "adamw":
            reason = f"{reason}; moves as with AdamW".lstrip("; ")
        elif direction != options.direction:
            why = "outputs in their own axes" if layer.axis_aligned else "thin"
            reason = f"{reason}; {why}: natural direction".lstrip("; ")
        if layer.storage != "full" and not all(block.diagonal):
            reason = f"{reason}; stored {layer.storage}".lstrip("; ")
        if len(modules) > 1:
            reason = f"{reason}; shared weight".lstrip("; ")
        if layer.name in unseen:
            name = LIKE_ADAMW
            reason = f"no statistics: {reason_unseen(block)}"
        idle = {
            path: why
            for path, p in zip(block.parameters, block.tensors(), strict=True)
            if (why := _untrained(p, given))
        }
        if len(idle) == len(block.parameters):
            name, reason = NOT_TRAINED, " and ".join(dict.fromkeys(idle.values()))
        elif idle:
            parts = (f"{path} is not trained: {why}" for path, why in idle.items())
            reason = "; ".join([reason, *parts]).lstrip("; ")
        shape = "x".join(map(str, block.shape))
        rows.append(Row(layer.name, kinds, shape, name, layer.bytes(), reason))
    for name, parameter in coverage.rest.items():
        shape = "x".join(map(str, parameter.shape)) or "1"
        size = parameter.numel() * parameter.element_size()  # of its second moment
        why = _untrained(parameter, given)
        how, reason = (
            (NOT_TRAINED, why) if why else (LIKE_ADAMW, coverage.reasons[name])
        )
        rows.append(Row(name, "parameter", shape, how, size, reason))
    return Description(tuple(rows))


def _untrained(parameter: Tensor, given: Collection[int]) -> str:
    """Return why steps leave a parameter as it is, ``""`` if they do not."""
    if id(parameter) not in given:
        return "in no param group any more"
    frozen = not parameter.requires_grad and parameter.grad is None
    return "requires_grad is False" if frozen else ""
