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

# Rounding to bfloat16 leaves shares of 1e-5. One in forty of random ones is below this
# limit, two that follow each other hardly ever.
LIMIT = 1e-3
NEEDED = 2
# What the damping of such layers is multiplied by, see docs/spectral_step.md.
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


def count_small(counts: Sequence[Tensor], shares: Sequence[Tensor]) -> list[Tensor]:
    """Return how many of a layer's last shares were below the limit, for each layer.

    Args:
        counts: Those so far, up to ``NEEDED``.
        shares: New ones; NaN says nothing.
    """
    before, share = torch.stack(list(counts)), torch.stack(list(shares))
    after = torch.where(share < LIMIT, (before + 1).clamp(max=NEEDED), 0.0)
    return list(torch.where(share.isnan(), before, after.to(before)).unbind())


def damping_factor(count: Tensor) -> Tensor:
    """Return what a layer's damping is multiplied by after ``count`` small shares."""
    return torch.where(count >= NEEDED, FACTOR, 1.0)
