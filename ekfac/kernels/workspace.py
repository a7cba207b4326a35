"""Memory that a step leaves to the next."""

from __future__ import annotations

import torch
from torch import Tensor


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
        dtype = like.dtype if dtype is None else dtype
        if like.device.type != "cpu":
            return torch.empty(like.shape, dtype=dtype, device=like.device)
        kept = self._kept.get((name, dtype))
        if kept is None or kept.numel() < like.numel():
            kept = self._kept[name, dtype] = torch.empty(like.numel(), dtype=dtype)
        return kept[: like.numel()].view(like.shape)
