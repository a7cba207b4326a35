"""Layers whose loss does not depend on how large their weights are.

Where a layer's outputs are normalised (batch, layer, group or instance norm follows
directly), the loss is a function of the direction of its weights ``W`` alone. By
Euler's theorem its gradient ``G`` is then orthogonal to them. The gradient shows it
whatever the model looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.state_schema import Number, Record

# A layer is free of scale below this average share. Rounding to bfloat16 leaves 1e-5;
# by chance one share in forty is below it, but hardly ever two that follow each other.
LIMIT = 1e-3
DECAY = 0.5
TWO_SHARES = 1 - DECAY**2
# What the damping of such layers is multiplied by, see docs/spectral_step.md.
FACTOR = 10.0
RADIAL = Record({"total": Number(float, 0), "weight": Number(float, 0, 1)})


@dataclass
class Radial:
    """Average of how much of a layer's gradients lies along its weights.

    A share is ``n <W, G>^2 / (|W|^2 |G|^2)`` for ``n`` weights, biases included: 1 is
    what a random direction has in the mean.

    Attributes:
        total: Weighted sum of shares.
        weight: Sum of the weights; 0 before the first share.
    """

    total: float = 0.0
    weight: float = 0.0

    def add(self, share: float) -> None:
        """Average over one more share; one that is not finite says nothing."""
        if 0 <= share < float("inf"):
            self.total += (1 - DECAY) * (share - self.total)
            self.weight += (1 - DECAY) * (1 - self.weight)

    @property
    def free(self) -> bool:
        """Whether the loss does not depend on the scale of the weights.

        It takes two shares to say so.
        """
        return self.weight >= TWO_SHARES and self.total < LIMIT * self.weight

    @property
    def damping_factor(self) -> float:
        """What the layer's damping is multiplied by."""
        return FACTOR if self.free else 1.0

    def state_dict(self) -> dict[str, float]:
        """Return what the state of a layer has of it."""
        return {"total": self.total, "weight": self.weight}


def share_along(weights: Tensor, gradient: Tensor) -> Tensor:
    """Return the share of a gradient that lies along weights of its shape.

    It is NaN where one of them is zero.
    """
    w, g = weights.flatten(), gradient.flatten()
    cosine = torch.dot(w / torch.linalg.vector_norm(w), g / torch.linalg.vector_norm(g))
    return w.numel() * cosine.square()
