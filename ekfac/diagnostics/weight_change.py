"""How far training moved the weights (Ge 2025, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from ekfac.vectors import Vector


@dataclass(frozen=True)
class WeightChange:
    """How a layer's weights moved (Ge 2025, Table A.1).

    Attributes:
        initial_mean: Mean before training.
        initial_deviation: Standard deviation before.
        final_mean: Mean after.
        final_deviation: Standard deviation after.
        correlation: Pearson's, between before and after; NaN where one is constant.
        change_deviation: Standard deviation of the change.
    """

    initial_mean: float
    initial_deviation: float
    final_mean: float
    final_deviation: float
    correlation: float
    change_deviation: float


def weight_changes(weights: Vector, initial: Vector) -> dict[str, WeightChange]:
    """Return the statistics of every parameter, by name."""
    found = {}
    for name, after in weights.items():
        w, w0 = after.double().flatten(), initial[name].double().flatten()
        both = torch.stack([w0 - w0.mean(), w - w.mean()])
        norms = torch.linalg.vector_norm(both, dim=1)
        deviations = norms / sqrt(len(w))
        found[name] = WeightChange(
            float(w0.mean()),
            float(deviations[0]),
            float(w.mean()),
            float(deviations[1]),
            float(both[0] @ both[1] / norms.prod()),
            float((both[1] - both[0]).square().mean().sqrt()),
        )
    return found


def change_histogram(weights: Vector, initial: Vector, width: float = 0.008) -> Tensor:
    """Return the share of parameters by ``|change|``, in bins of ``width`` (Table A.2).

    The bins run up to the largest change; the shares sum to one.
    """
    change = (weights - initial).flat().abs().double()
    bins = (change / width).long()
    return torch.bincount(bins).double() / len(change)
