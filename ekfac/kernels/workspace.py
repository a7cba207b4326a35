"""Memory that a step leaves to the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

# Matrix products on rows that start at multiples of 64 bytes are faster; the column of
# the bias makes widths odd.
ALIGNMENT = 16


def aligned_width(columns: int) -> int:
    """Return how many elements apart the rows of a matrix start."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


class Workspace:
    """Tensors that are written anew at every step and stay allocated in between.

    Large memory that is freed goes back to the operating system, which clears it page
    by page when it is asked for again: a fifth of a step's time. Devices other than the
    CPU have allocators that keep it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor, valid until ``name`` is taken again.

        Args:
            name: Of the use.
            like: Gives shape and device.
            dtype: Default: that of ``like``.
        """
        return self._take(name, tuple(like.shape), dtype or like.dtype, like.device)

    def take_rows(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised tensor whose rows start at aligned addresses.

        Args:
            name: Of the use.
            shape: Of the tensor.
            like: Gives type and device.
        """
        *lead, columns = shape
        wide = (*lead, aligned_width(columns))
        return self._take(name, wide, like.dtype, like.device)[..., :columns]

    def _take(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = prod(shape)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[name, dtype] = torch.empty(size, dtype=dtype)
        return kept[:size].view(shape)
