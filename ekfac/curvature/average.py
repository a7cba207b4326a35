"""Averages that carry their weight, and which of them a process stores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ekfac.errors import NotReadyError


class Held(NamedTuple):
    """What of a layer this process stores: all of it, unless ranks divide the work.

    Attributes:
        factors: The averages of ``A`` and ``G``.
        bases: ``Q_A`` and ``Q_G``, with the eigenvalues.
        scalings: The average of ``s``.
    """

    factors: bool = True
    bases: bool = True
    scalings: bool = True


EVERYTHING = Held()


def absent(*shape: int) -> Tensor:
    """Return a tensor of this shape without storage."""
    return torch.empty(shape, device="meta")


class Average:
    """An exponential average that carries its own weight.

    It starts at zero with weight zero and is divided by its weight when read, so it is
    unbiased from the first step, and two of them merge exactly.

    Attributes:
        total: The weighted sum, a view of a bank.
        weight: The sum of the weights, a view without dimensions.
    """

    def __init__(self, total: Tensor, weight: Tensor) -> None:
        self.total, self.weight = total, weight
        self.empty = True

    @property
    def held(self) -> bool:
        """Whether this process stores it; ``empty`` is known to all."""
        return not self.total.is_meta

    def start_(self, value: Tensor) -> None:
        """Start at ``value``, with the weight of a long history."""
        self.total.copy_(value)
        self.weight.fill_(1)
        self.empty = False

    def update_(self, sample: Tensor, decay: float) -> None:
        """Add ``sample`` with weight ``1 - decay``."""
        self.total.mul_(decay).add_(sample, alpha=1 - decay)
        self.weight.mul_(decay).add_(1 - decay)
        self.empty = False

    def update_square_(self, root: Tensor, factor: float, decay: float) -> None:
        """Add ``factor root^2`` with weight ``1 - decay``, without a copy of it."""
        self.total.mul_(decay).addcmul_(root, root, value=(1 - decay) * factor)
        self.weight.mul_(decay).add_(1 - decay)
        self.empty = False

    def read(self, out: Tensor | None = None) -> Tensor | None:
        """Return the average, or ``None`` before the first sample.

        Args:
            out: Where to put it.

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
        return torch.div(self.total, self.weight, out=out)

    def clear_(self) -> None:
        """Forget everything."""
        self.total.zero_()
        self.weight.zero_()
        self.empty = True
