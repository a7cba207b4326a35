"""What a truncated eigenbasis costs a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.curvature.truncated import collapsed, combine_, coordinates, refined
from ekfac.errors import NotReadyError
from ekfac.matrices.damping import DampingMode, absolute_damping

if TYPE_CHECKING:
    from ekfac.curvature import LayerCurvature


@dataclass(frozen=True)
class TruncationError:
    """A layer's direction from its truncated basis beside that from a full one.

    Attributes:
        layer: Name of the layer.
        rank_G: Kept directions of the output side, of ``d_out``.
        rank_A: Of the input side, of ``d_in``.
        outside: Share of the gradient's square outside both sides' kept directions.
        error: ``|u - u_full| / |u_full|``, before grafting.
        cosine: Between the two.
    """

    layer: str
    rank_G: int
    rank_A: int
    outside: float
    error: float
    cosine: float


@torch.no_grad()
def truncation_error(
    layer: LayerCurvature,
    gradient: Tensor,
    damping: float,
    *,
    mode: DampingMode = "relative",
    power: float = -1,
) -> TruncationError:
    """Return how far a truncated step is from that of the full eigenbasis.

    The full one is that of the layer's present factors. Its scalings are not known,
    since none were measured in it: where both directions are kept they are taken as
    they are, and elsewhere the measured mean over the complement is spread like the
    eigenvalues of ``A (x) G``. So this is what the truncation leaves out if K-FAC is
    right about it.

    Args:
        layer: With factors and scalings; of :attr:`ekfac.EKFAC.curvature`.
        gradient: ``[b, d_out, d_in]``: ``layer.pack`` of the parameters' gradients.
        damping: As in :class:`ekfac.EKFAC`.
        mode: ``"relative"`` or ``"absolute"``.
        power: -1 or -0.5.

    Raises:
        NotReadyError: Before the layer has a basis and scalings.
        ValueError: If the layer's basis is not truncated, or the gradient has another
            shape than the layer.
    """
    if not layer.truncated:
        raise ValueError(
            f"Layer {layer.name!r} has a full basis: there is nothing to compare. "
            "Truncated ones come from EKFAC(..., rank=...), for sides wider than 64."
        )
    scalings = layer.averages["s"].read()
    if not layer.ready or scalings is None:
        raise NotReadyError(f"Layer {layer.name!r} has no scalings yet; do a step.")
    if tuple(gradient.shape) != tuple(layer.block.shape):
        raise ValueError(
            f"Layer {layer.name!r} has gradients of shape {list(layer.block.shape)}, "
            f"got {list(gradient.shape)}; layer.pack makes them of its parameters'."
        )
    gradient = gradient.to(scalings, copy=True)
    added = absolute_damping(damping, layer.mean(scalings), mode)
    parts = coordinates(layer, gradient)
    finer, weights = refined(layer, scalings)
    multipliers = collapsed(layer, (finer + added).pow(power), weights)
    Q_G, Q_A, s = _full(layer)
    full = Q_G @ ((Q_G.mT @ gradient @ Q_A) * (s + added).pow(power)) @ Q_A.mT
    total = gradient.square().sum()
    step = combine_(layer, parts, multipliers)
    tiny = torch.finfo(full.dtype).tiny
    size = full.norm().clamp(min=tiny)
    inside = parts.kept.square().sum() / total.clamp(min=tiny)
    cosine = (step * full).sum() / (size * step.norm().clamp(min=tiny))
    ranks = [gradient.shape[i] - layer.complement(s) for i, s in ((1, "G"), (2, "A"))]
    return TruncationError(
        layer.name,
        ranks[0],
        ranks[1],
        1 - float(inside),
        float((step - full).norm() / size),
        float(cosine),
    )


def _full(layer: LayerCurvature) -> tuple[Tensor, Tensor, Tensor]:
    """Return the completed bases, diagonal in the complement, and their scalings."""
    s = layer.s
    assert s is not None
    bases = []
    for side, dim in (("G", -2), ("A", -1)):
        Q = layer.Q_G if side == "G" else layer.Q_A
        factor = layer.averages[side].read()
        assert Q is not None
        assert factor is not None
        rest = layer.complement(side)
        if rest:
            others = Q[..., :rest]
            inner = others.mT @ factor @ others
            values, turn = torch.linalg.eigh((inner + inner.mT) / 2)
            values = values.clamp(min=0)
            mean = values.mean(dim=-1, keepdim=True)
            shape = torch.where(mean > 0, values / mean, 1.0)
            Q = torch.cat([others @ turn, Q[..., rest:]], dim=-1)
            ones = torch.ones_like(Q[..., 0, rest:])
            shape = torch.cat([shape, ones], dim=-1)
            s = s * shape.unsqueeze(-1 if dim == -2 else -2)
        bases.append(Q)
    return bases[0], bases[1], s
