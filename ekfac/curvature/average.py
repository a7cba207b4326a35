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


def update_squares_(
    averages: Sequence[Average],
    roots: list[Tensor],
    factors: Sequence[float],
    decay: float,
) -> None:
    """Add the sample ``factor root^2`` to each average, as :func:`update_` does."""
    weights = [average.weight for average in averages]
    totals = [average.total for average in averages]
    torch._foreach_mul_([*totals, *weights], decay)
    scales = [(1 - decay) * factor for factor in factors]
    torch._foreach_addcmul_(totals, roots, roots, scales)
    torch._foreach_add_(weights, 1 - decay)
    for average in averages:
        average.empty = False


def update_(averages: Sequence[Average], samples: list[Tensor], decay: float) -> None:
    """Add a sample to each average, all of one device and type, in one call."""
    weights = [average.weight for average in averages]
    torch._foreach_lerp_([average.total for average in averages], samples, 1 - decay)
    torch._foreach_mul_(weights, decay)
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
