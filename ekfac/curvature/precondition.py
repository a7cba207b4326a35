"""From scalings to a preconditioned gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.curvature.state import LayerCurvature


def absolute_damping(
    layer: LayerCurvature, scalings: Tensor, damping: float, mode: str
) -> Tensor | float:
    """Return the damping that is added: relative to the mean scaling, or as given."""
    return damping * layer.mean(scalings) if mode == "relative" and damping else damping


def cross_terms(layer: LayerCurvature, split: str) -> Tensor | None:
    """Return what factored damping adds to the scalings, over ``sqrt(damping)``.

    ``"exact"`` adds the damping ``e`` to every eigenvalue of the block: ``None``.
    ``"factored"`` adds ``sqrt(e)`` to those of its factors: for Kronecker scalings that
    is ``(s_A + pi sqrt(e)) (s_G + sqrt(e) / pi)`` with Martens & Grosse's trace ratio
    ``pi`` (2015, section 6.3), for others its cross terms ``s + e + sqrt(e) (s_A/pi +
    pi s_G)``, which with ``pi = 1`` (``"equal"``) is George 2023, A.4.

    Args:
        layer: Gives the factors' eigenvalues.
        split: One of the three.
    """
    if split == "exact":
        return None
    a, g = layer.values("A").unsqueeze(-2), layer.values("G").unsqueeze(-1)
    if split == "equal":
        return a + g
    # Groups of a convolution, features of a norm are blocks of their own.
    spectra = (layer.eigenvalues_A, layer.eigenvalues_G)
    mean_a, mean_g = (x.mean(dim=-1)[:, None, None] for x in spectra)
    usable = (mean_a > 0) & (mean_g > 0)
    tiny = torch.finfo(a.dtype).tiny
    pi = torch.where(usable, (mean_a / mean_g.clamp(min=tiny)).sqrt(), 1.0)
    return a / pi + pi * g


def precondition_(
    projected: Tensor,
    scalings: Tensor,
    damping: Tensor | float,
    power: float,
    cross: Tensor | None = None,
) -> Tensor:
    """Apply ``F^power`` to a gradient in the basis, in place.

    Args:
        projected: The gradient in the basis, ``[b, d_out, d_in]``; overwritten.
        scalings: The block's eigenvalues there; overwritten.
        damping: What is added to them.
        power: -1 for the natural gradient, -0.5 for its square root.
        cross: See :func:`cross_terms`.

    Returns:
        The damped eigenvalues.
    """
    tiny = torch.finfo(scalings.dtype).tiny
    if isinstance(damping, Tensor):
        # A layer all of whose scalings are zero, dead until now: the gradient itself.
        damping = torch.where(damping > 0, damping.clamp(min=tiny), 1.0)
    if cross is None:
        denominator = scalings.add_(damping)
    else:
        root = scalings.new_zeros(()).add(damping).sqrt()
        denominator = scalings.add_(damping + root * cross)
    if not isinstance(damping, Tensor) and damping < tiny:
        # Directions never seen: 0 / 0 is 0, as for the pseudo-inverse.
        projected.masked_fill_(denominator <= 0, 0)
        denominator.clamp_(min=tiny)
    projected.div_(denominator if power == -1 else denominator.pow(-power))
    return denominator
