"""Layers whose loss does not depend on how large their weights are.

Where a layer's outputs are normalised (batch, layer, group or instance norm follows
directly), the loss is a function of the direction of its weights ``W`` alone. By
Euler's theorem its gradient ``G`` is then orthogonal to them. The gradient shows it
whatever the model looks like: the share ``n <W, G>^2 / (|W|^2 |G|^2)`` of ``n`` weights
and biases is 1 in the mean for a random direction, and of such a layer no more than
rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Of an average share: rounding to bfloat16 leaves 1e-5. One in forty of random ones is
# below the limit, an average over several (they may be alike) hardly ever.
LIMIT = 1e-3
DECAY = 0.5
TWO_SHARES = 1 - DECAY**2
# What the damping of layers that are free of scale is multiplied by, see
# docs/spectral_step.md.
FACTOR = 10.0


def radial_share(weights: Iterable[Tensor], gradients: Iterable[Tensor]) -> Tensor:
    """Return the share of a gradient that lies along a layer's weights.

    Args:
        weights: The layer's weight and bias.
        gradients: Of both, in their shapes and one type.

    Returns:
        A number, without waiting for the device; NaN where weights or gradients are
        zero, not finite or too large for their squares.
    """
    ws = [weight.reshape(-1) for weight in weights]
    gs = [gradient.reshape(-1) for gradient in gradients]
    pairs = [(w.to(g), g) for w, g in zip(ws, gs, strict=True)]
    dot, of_weights, of_gradients = (
        torch.stack([torch.dot(a, b) for a, b in products]).sum()
        for products in (pairs, [(w, w) for w, _ in pairs], [(g, g) for _, g in pairs])
    )
    lengths = of_weights.sqrt() * of_gradients.sqrt()
    share = sum(len(w) for w in ws) * (dot / lengths).square()
    return torch.where(lengths.isfinite(), share, torch.nan)


def averaged(averages: Sequence[Tensor], shares: Sequence[Tensor]) -> list[Tensor]:
    """Return the averages of shares, of at most 1 each, over one more of each layer.

    Args:
        averages: Of each layer the weighted sum and its weight, ``[2]``.
        shares: New ones; NaN says nothing.
    """
    before = torch.stack(list(averages))
    share = torch.stack(list(shares)).to(before)
    sample = torch.stack([share.clamp(max=1), torch.ones_like(share)], dim=1)
    after = before.lerp(sample, 1 - DECAY)
    return list(torch.where(share.isnan().unsqueeze(1), before, after).unbind())


def is_free_of_scale(average: Tensor) -> Tensor:
    """Return whether the loss does not depend on the scale of the weights, ``[*]``.

    Args:
        average: Of :func:`averaged`, ``[*, 2]``; it takes two shares.
    """
    total, weight = average.unbind(-1)
    return (weight >= TWO_SHARES) & (total < LIMIT * weight)


def scale_factor(average: Tensor) -> Tensor:
    """Return what a layer's damping is multiplied by, see :func:`is_free_of_scale`."""
    return torch.where(is_free_of_scale(average), FACTOR, 1.0)
