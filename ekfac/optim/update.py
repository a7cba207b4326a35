"""Parameter updates (AdamW without a block, KL clip, weight decay) and their table."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.curvature import Curvature, LayerCurvature
from ekfac.curvature.options import Grafting, Options
from ekfac.curvature.radial import FACTOR
from ekfac.layers import Coverage
from ekfac.layers.base import is_sharded, local, shard_like, whole
from ekfac.layers.blocks import reason_unseen
from ekfac.optim.precondition import Direction, graft_factor, treatment

# Those of torch.optim.AdamW.
BETA2, EPS = 0.999, 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")
CONTIGUOUS = torch.contiguous_format


def parameters_of(groups: Iterable[Mapping[str, Any]]) -> list[nn.Parameter]:
    """Return the parameters of param groups, in order."""
    return [parameter for group in groups for parameter in group["params"]]


def adamw_directions(
    states: Sequence[dict[str, Any]],
    gradients: Sequence[Tensor],
    beta1: float,
    grafting: Grafting | None,
) -> list[Tensor]:
    """Return AdamW's directions of parameters that no block preconditions.

    A direction is the bias-corrected average of the gradient over the root of that of
    its square (Loshchilov & Hutter 2019, algorithm 2, with torch's ``beta2`` and
    ``eps``); real and imaginary parts are numbers of their own. With ``"sgd"`` and
    without grafting learning rates are in units of the gradient: each direction then
    has its gradient's norm.

    Args:
        states: Of the parameters; their averages are updated.
        gradients: Of the parameters; a sparse one counts as dense.
        beta1: Decay of the gradients' averages.
        grafting: See :func:`ekfac.optim.precondition.graft_factor`.
    """
    dense = [in_average_type(g.to_dense() if g.is_sparse else g, g) for g in gradients]
    # One foreach call for the tensors of a kind.
    kinds: dict[object, list[int]] = {}
    for number, (state, gradient) in enumerate(zip(states, dense, strict=True)):
        _prepare(state, gradient)
        mesh = getattr(gradient, "device_mesh", None) if is_sharded(gradient) else None
        kind = gradient.device, gradient.dtype, mesh
        kinds.setdefault(kind, []).append(number)
    directions: dict[int, Tensor] = {}
    for numbers in kinds.values():
        members = [states[n] for n in numbers], [dense[n] for n in numbers]
        directions |= zip(numbers, _adamw(*members, beta1), strict=True)
    if grafting in ("sgd", None):
        for number, gradient in enumerate(dense):
            direction = directions[number]
            length, norm = whole(direction.norm()), whole(gradient.norm())
            factor = graft_factor(length, direction.numel(), norm, "sgd")
            local(direction).mul_(factor)
    for number, gradient in enumerate(gradients):
        if directions[number].dtype != gradient.dtype:
            directions[number] = directions[number].to(gradient.dtype)
    return [directions[number] for number in range(len(gradients))]


def in_average_type(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor on a parameter's device, in the type of its averages.

    That is float32 for half precision: small squares, and ``EPS``, are zero in float16.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if tensor.dtype == dtype and tensor.device == parameter.device:
        return tensor
    return tensor.to(parameter.device, dtype)


def _prepare(state: dict[str, Any], gradient: Tensor) -> None:
    """Begin a parameter's averages, or follow it to where it was moved or cast.

    Those of another shape, of a parameter that was resized, begin anew.
    """
    shape = gradient.shape
    if state and not (state["exp_avg"].shape == state["exp_avg_sq"].shape == shape):
        state.clear()
    if not state:
        # Numbers, since load_state_dict would cast tensors to the parameter's dtype.
        state["weights"] = [0.0, 0.0]
        for key in MOMENTS:
            state[key] = torch.zeros_like(gradient, memory_format=CONTIGUOUS)
    own = local(gradient)
    for key in MOMENTS:
        moment = state[key]
        part = local(moment)
        alike = part.dtype == own.dtype and part.device == own.device
        if not (alike and part.shape == own.shape and part.is_contiguous()):
            moment = shard_like(moment.to(gradient.device, gradient.dtype), gradient)
            state[key] = moment.clone(memory_format=CONTIGUOUS)


def _adamw(
    states: Sequence[dict[str, Any]], gradients: Sequence[Tensor], beta1: float
) -> list[Tensor]:
    """Return the directions of parameters of one kind, from torch's own kernel."""
    # Those of one age together, usually all.
    ages: dict[tuple[float, float], list[int]] = {}
    for number, state in enumerate(states):
        first, second = state["weights"]
        age = first * beta1 + 1 - beta1, second * BETA2 + 1 - BETA2
        state["weights"] = list(age)
        ages.setdefault(age, []).append(number)
    directions = [torch.zeros_like(g, memory_format=CONTIGUOUS) for g in gradients]
    moments = [[state[key] for state in states] for key in MOMENTS]
    # The kernel reads memory in its order.
    lists = [[_in_order(t) for t in ts] for ts in (directions, gradients, *moments)]
    for parts in zip(*lists, strict=True):  # it reads and writes what it is given
        shapes = [part.shape for part in parts]
        if shapes.count(shapes[0]) < len(shapes):
            raise ValueError(
                f"A parameter's gradient has the shape {list(shapes[1])} on this rank, "
                f"its averages {list(shapes[2])} and {list(shapes[3])}."
            )
    # So late that the kernel corrects no bias: averages may have begun at any decay.
    late = torch.full((), math.inf, dtype=torch.float32, device=lists[0][0].device)
    for (first, second), numbers in ages.items():
        steps, grads, *own = ([tensors[n] for n in numbers] for tensors in lists)
        torch._fused_adamw_(
            steps,
            grads,
            own[0],
            own[1],
            [],
            [late] * len(numbers),
            lr=-(second**0.5) / first,
            beta1=beta1,
            beta2=BETA2,
            weight_decay=0.0,
            eps=EPS * second**0.5,
            amsgrad=False,
            maximize=False,
        )
    return directions


def _in_order(tensor: Tensor) -> Tensor:
    """Return this rank's real numbers of a tensor in their order in memory."""
    part = local(tensor)
    if part._is_zerotensor() or not part.is_contiguous():
        part = part.clone(memory_format=CONTIGUOUS)  # of zeros, it has no memory
    return torch.view_as_real(part) if part.is_complex() else part


def scatter_(found: Iterable[Direction], directions: dict[Tensor, Tensor]) -> None:
    """Write directions of layers to their parameters, or to their rows of them.

    Args:
        found: Of the layers.
        directions: By parameter; gets those of the layers' parameters.
    """
    targets, sources = [], []
    for one in found:
        block, parts = one.layer.block, one.parts
        parts = block.unpack(one.matrix) if parts is None else parts
        slots = block.adapter.slots()
        for parameter, slot, part in zip(block.tensors(), slots, parts, strict=True):
            if parameter.grad is None:
                continue
            dtype = parameter.dtype
            if slot.rows is None:
                directions[parameter] = part if part.dtype == dtype else part.to(dtype)
                continue
            rows = directions.get(parameter)
            if rows is None:
                shape, device = parameter.shape, parameter.device
                rows = torch.zeros(shape, dtype=dtype, device=device)
            directions[parameter] = rows = whole(rows)
            targets.append(slot.of(rows))
            sources.append(part)
    if targets:
        torch._foreach_copy_(targets, sources)


def clip_kl_(
    groups: Sequence[dict[str, Any]],
    forms: Sequence[Sequence[Tensor]],
    directions: dict[Tensor, Tensor],
) -> None:
    """Bound the step's Kullback-Leibler divergence, in place.

    A step ``lr u`` has a divergence of about half of ``lr^2 u^T F u``, which is
    ``lr^2 u^T g`` for the textbook step. Where the sum of that over all groups exceeds
    a group's ``kl_clip``, the group's directions shrink (Ba et al. 2017, section 5).
    Nothing here waits for the device.

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

    __repr__ = __str__


def describe(
    curvature: Curvature,
    coverage: Coverage,
    options: Options,
    unseen: Collection[str] = (),
    *,
    trained: Collection[Tensor],
) -> Description:
    """Return how every parameter is treated that is, or was, given to be trained.

    Args:
        curvature: The layers.
        coverage: Says which parameters are in no block.
        options: The optimizer's.
        unseen: Layers that had gradients but no statistics so far.
        trained: The parameters in the groups now.
    """
    given = {id(parameter) for parameter in trained}
    rows = []
    for layer in curvature.values():
        block = layer.block
        modules = dict.fromkeys(use.adapter.module for use in block.uses)
        kinds = "+".join(type(module).__name__ for module in modules)
        method, reasons = _method_of(layer, options)
        if len(modules) > 1:
            reasons.append("shared weight")
        if layer.name in unseen:
            method, reasons = LIKE_ADAMW, [f"no statistics: {reason_unseen(block)}"]
        idle = {
            path: why
            for path, p in zip(block.parameters, block.tensors(), strict=True)
            if (why := _untrained(p, given))
        }
        if len(idle) == len(block.parameters):
            method, reasons = NOT_TRAINED, [" and ".join(dict.fromkeys(idle.values()))]
        else:
            reasons += [f"{path} is not trained: {why}" for path, why in idle.items()]
        shape, reason = "x".join(map(str, block.shape)), "; ".join(reasons)
        rows.append(Row(layer.name, kinds, shape, method, layer.bytes(), reason))
    for name, parameter in coverage.rest.items():
        shape = "x".join(map(str, parameter.shape)) or "1"
        size = parameter.numel() * parameter.element_size()  # of its second moment
        why = _untrained(parameter, given)
        method = NOT_TRAINED if why else LIKE_ADAMW
        reason = why or coverage.reasons[name]
        rows.append(Row(name, "parameter", shape, method, size, reason))
    return Description(tuple(rows))


def _method_of(layer: LayerCurvature, options: Options) -> tuple[str, list[str]]:
    """Return how a layer is preconditioned, and why so."""
    block, reasons = layer.block, []
    method = "K-FAC" if options.scaling is None else "EKFAC"
    if block.exact:
        method, reasons = "exact", ["small blocks are kept exactly"]
    elif any(block.diagonal):
        sides = zip(("input", "output"), block.diagonal, strict=True)
        which = " and ".join(side for side, diagonal in sides if diagonal)
        method = f"{method}, diagonal {which}"
        if block.adapter.diagonal_input:
            reasons.append("one-hot inputs")
        elif max(block.shape[1:]) > options.max_dim:
            reasons.append(f"wider than max_dim={options.max_dim}")
        else:
            reasons.append(f"wider than {options.max_aspect} times the other side")
    elif layer.truncated:
        sizes = zip(("G", "A"), block.shape[1:], strict=True)
        kept = [f"{d - layer.complement(side)} of {d}" for side, d in sizes]
        method, reasons = f"{method}, {' x '.join(kept)}", ["truncated bases"]
    direction = treatment(layer, options)
    if direction == "adamw":
        reasons.append("moves as with AdamW")
    elif direction != options.direction:
        why = "few outputs hold most of G" if layer.concentrated else "thin"
        reasons.append(f"{why}: natural direction")
    adaptive = options.damping_mode == "adaptive" and direction != "adamw"
    if adaptive and layer.scale_free:
        reasons.append(f"free of scale: {FACTOR:g} times the damping")
    if layer.storage != "full" and not all(block.diagonal):
        reasons.append(f"stored {layer.storage}")
    return method, reasons


def _untrained(parameter: Tensor, given: Collection[int]) -> str:
    """Return why steps leave a parameter as it is, ``""`` if they move it."""
    if id(parameter) not in given:
        return "in no param group any more"
    frozen = not parameter.requires_grad and parameter.grad is None
    return "requires_grad is False" if frozen else ""
