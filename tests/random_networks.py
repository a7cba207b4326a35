"""Random networks of Karakida et al. 2020, and means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ekfac.diagnostics.papers.karakida import MeanField, mean_field_theory

# Activation, weight variance, bias variance.
TANH = (nn.Tanh, 3.0, 0.64)
RELU = (nn.ReLU, 2.0, 0.1)
LINEAR = (nn.Identity, 1.0, 0.1)
UNBIASED = (nn.ReLU, 2.0, 0.0)
Kind = tuple[type[nn.Module], float, float]


def widths(width: int, outputs: int) -> list[int]:
    return [width, width, width, outputs]


def theory(kind: Kind, width: int, outputs: int) -> MeanField:
    return mean_field_theory(
        kind[0](),
        widths(width, outputs),
        weight_variance=kind[1],
        bias_variance=kind[2],
    )


def draw(
    kind: Kind, width: int, outputs: int, examples: int, seed: int
) -> tuple[nn.Sequential, Tensor]:
    """Return a network and its inputs."""
    _activation, _weight, _bias = kind
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for out in widths(width, outputs)[1:]:
        linear = nn.Linear(width, out)
        nn.init.normal_(
            linear.weight, std=(kind[1] / width) ** 0.5, generator=generator
        )
        nn.init.normal_(linear.bias, std=kind[2] ** 0.5, generator=generator)
        layers += [linear, kind[0]()]
    return nn.Sequential(*layers[:-1]), torch.randn(
        examples, width, generator=generator
    )


def mean_over(
    seeds: Sequence[int], measure: Callable[[int], Sequence[float]]
) -> list[float]:
    """Return the means over seeds of every number that ``measure`` returns."""
    columns = zip(*(measure(seed) for seed in seeds), strict=True)
    return [statistics.fmean(column) for column in columns]
