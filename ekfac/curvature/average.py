"""Exponential averages that carry their own weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.errors import NotReadyError


class Average:
    """An exponential average that carries its own weight.

    It starts at zero with weight zero and is divided by its weight when read, so it is
    unbiased from the first step, and two of them merge exactly.

    Attributes:
        total: The weighted sum as it is stored, a view of a bank.
        weight: The sum of the weights, a view without dimensions.
        empty: Whether there is no sample yet; known also where it is not stored.
    """

    def __init__(self, total: Tensor, weight: Tensor) -> None:
        self.total, self.weight = total, weight
        self.empty = True

    @property
    def held(self) -> bool:
        """Whether this process stores it."""
        return not self.total.is_meta

    @property
    def shape(self) -> torch.Size:
        """The shape of the average."""
        return self.total.shape

    def value(self) -> Tensor:
        """Return the weighted sum in the average's shape."""
        return self.total

    def stored(self, value: Tensor) -> Tensor:
        """Return a value of the average's shape in the form of ``total``."""
        return value

    def set_(self, value: Tensor) -> None:
        """Overwrite the weighted sum."""
        self.total.copy_(self.stored(value))

    def start_(self, value: Tensor) -> None:
        """Start at ``value``, with the weight of a long history."""
        self.total.copy_(value)
        self.weight.fill_(1)
        self.empty = False

    def update_(self, sample: Tensor, decay: float) -> None:
        """Add ``sample`` with weight ``1 - decay``."""
        self.total.mul_(decay).add_(self.stored(sample), alpha=1 - decay)
        self.weight.mul_(decay).add_(1 - decay)
        self.empty = False

    def read(self, out: Tensor | None = None) -> Tensor | None:
        """Return the average, or ``None`` before the first sample.

        Raises:
            NotReadyError: If another rank holds it.
        """
        if self.empty:
            return None
        if not self.held:
            raise NotReadyError(
                "this statistic is held by another rank; with gradient_workers=1.0 "
                "every rank has all of them."
            )
        return torch.div(self.value(), self.weight, out=out)

    def clear_(self) -> None:
        """Forget everything."""
        self.total.zero_()
        self.weight.zero_()
        self.empty = True


# -- averages of many layers -----------------------------------------------------------


def update_each_(
    averages: Sequence[Average], samples: Sequence[Tensor], decay: float
) -> None:
    """Add a sample to each average of any shape that is held here, on a CPU."""
    pairs = [(a, s) for a, s in zip(averages, samples, strict=True) if a.held]
    if pairs:
        totals = [average.total for average, _ in pairs]
        weights = [average.weight for average, _ in pairs]
        stored = [average.stored(sample) for average, sample in pairs]
        torch._foreach_mul_([*totals, *weights], decay)
        torch._foreach_add_(totals, stored, alpha=1 - decay)
        torch._foreach_add_(weights, 1 - decay)
    for average in averages:
        average.empty = False


class PackedAverage(Average):
    """An average of symmetric matrices that stores one half of each.

    Args:
        total: Storage ``[b, d (d + 1) / 2]``.
        weight: As for :class:`Average`.
        size: ``d``.
    """

    def __init__(self, total: Tensor, weight: Tensor, size: int) -> None:
        super().__init__(total, weight)
        self.size = size

    @property
    def shape(self) -> torch.Size:
        """The shape of the average."""
        return torch.Size((*self.total.shape[:-1], self.size, self.size))

    def value(self) -> Tensor:
        """Return the weighted sum in the average's shape."""
        return kernels.unpack_symmetric(self.total)

    def stored(self, value: Tensor) -> Tensor:
        """Return a value of the average's shape in the form of ``total``."""
        return kernels.pack_symmetric(value)
