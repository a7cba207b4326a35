"""From scalings to a preconditioned gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.curvature.state import LayerCurvature


def absolute_damping(scalings: Tensor, damping: float, mode: str) -> Tensor | float:
    """Return the damping that is added: relative to the mean scaling, or as given."""
    return damping * scalings.mean() if mode == "relative" and damping else damping


def damped_(
    layer: LayerCurvature, scalings: Tensor, damping: Tensor | float, split: str
) -> Tensor:
    """Add the damping ``e`` to scalings ``[b, d_out, d_in]``, in place; return them.

    ``"exact"`` adds ``e`` to every eigenvalue of the block. ``"factored"`` adds
    ``sqrt(e)`` to those of its factors: for Kronecker scalings that is
    ``(s_A + pi sqrt(e)) (s_G + sqrt(e) / pi)`` with Martens & Grosse's trace ratio
    ``pi`` (2015, section 6.3), for others its cross terms ``s + e + sqrt(e) (s_A/pi +
    pi s_G)``, which with ``pi = 1`` is George 2023, A.4.
    """
    if split == "exact":
        return scalings.add_(damping)
    root = scalings.new_zeros(()).add(damping).sqrt()
    a, g = layer.eigenvalues_A.unsqueeze(-2), layer.eigenvalues_G.unsqueeze(-1)
    pi = torch.ones_like(root)
    if split == "factored":
        # Groups of a convolution, features of a norm are blocks of their own.
        mean_a, mean_g = (x.mean(dim=(-2, -1), keepdim=True) for x in (a, g))
        usable = (mean_a > 0) & (mean_g > 0)
        tiny = torch.finfo(scalings.dtype).tiny
        pi = torch.where(usable, (mean_a / mean_g.clamp(min=tiny)).sqrt(), pi)
    cross = root * (a / pi + pi * g)
    return scalings.add_(damping + cross)


def precondition_(
    layer: LayerCurvature,
    projected: Tensor,
    scalings: Tensor,
    damping: Tensor | float,
    power: float,
    split: str,
) -> Tensor:
    """Apply ``F^power`` to a gradient in the basis, in place.

    Args:
        layer: Gives the factors' eigenvalues.
        projected: The gradient in the basis, ``[b, d_out, d_in]``; overwritten.
        scalings: The block's eigenvalues there; overwritten.
        damping: What is added to them.
        power: -1 for the natural gradient, -0.5 for its square root.
        split: See :func:`damped_`.

    Returns:
        The damped eigenvalues.
    """
    tiny = torch.finfo(scalings.dtype).tiny
    if isinstance(damping, Tensor):
        # A layer all of whose scalings are zero, dead until now: the gradient itself.
        damping = torch.where(damping > 0, damping.clamp(min=tiny), 1.0)
    denominator = damped_(layer, scalings, damping, split)
    if not isinstance(damping, Tensor) and damping < tiny:
        # Directions never seen: 0 / 0 is 0, as for the pseudo-inverse.
        projected.masked_fill_(denominator <= 0, 0)
        denominator.clamp_(min=tiny)
    projected.div_(denominator if power == -1 else denominator.pow(-power))
    return denominator
