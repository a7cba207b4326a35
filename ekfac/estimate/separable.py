"""Which outputs of an example a loss takes together.

Most losses are sums over positions, or over single outputs: their Hessians fall into
blocks, which need fewer products and smaller decompositions than the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# How often random halves of the outputs are tried against each other.
PROBES = 3


@dataclass(frozen=True)
class Blocks:
    """A layout of outputs ``[N, *]`` as blocks ``[N, S, C]``.

    Attributes:
        shape: Of one example's outputs.
        dim: The dimension within a block, from 1; 0: all outputs are one block;
            ``None``: every output is one.
    """

    shape: tuple[int, ...]
    dim: int | None

    def split(self, outputs: Tensor) -> Tensor:
        """Return ``[*, S, C]`` of ``[*, *shape]``."""
        lead = outputs.shape[: outputs.dim() - len(self.shape)]
        if self.dim is None:
            return outputs.reshape(*lead, -1, 1)
        if self.dim:
            outputs = outputs.movedim(len(lead) + self.dim - 1, -1)
            return outputs.reshape(*lead, -1, outputs.shape[-1])
        return outputs.reshape(*lead, 1, -1)

    def join(self, blocks: Tensor) -> Tensor:
        """Return ``[*, *shape]`` of ``[*, S, C]``: the inverse of ``split``."""
        lead = blocks.shape[:-2]
        if not self.dim:
            return blocks.reshape(*lead, *self.shape)
        rest = [n for i, n in enumerate(self.shape, 1) if i != self.dim]
        moved = blocks.reshape(*lead, *rest, blocks.shape[-1])
        return moved.movedim(-1, len(lead) + self.dim - 1)


def blocks_of(outputs: Tensor, product: Callable[[Tensor], Tensor]) -> Blocks:
    """Return the finest layout in whose blocks a Hessian is block-diagonal.

    Products of vectors that are zero in a random half of the blocks, another half for
    every example, have to be zero there exactly.

    Args:
        outputs: ``[N, *]``.
        product: Of the examples' Hessians with ``[k, N, *]``.
    """
    shape = tuple(outputs.shape[1:])
    candidates: list[int | None] = [None]
    if len(shape) > 1:
        candidates += [len(shape), 1]
    generator = torch.Generator().manual_seed(0)
    for dim in candidates:
        layout = Blocks(shape, dim)
        size = (PROBES, *layout.split(outputs).shape)
        mask = torch.rand(size[:-1], generator=generator).unsqueeze(-1) < 0.5
        vectors = torch.randn(size, generator=generator) * mask
        found = layout.split(product(layout.join(vectors.to(outputs))))
        if not bool((found * ~mask.to(outputs.device)).any()):
            return layout
    return Blocks(shape, 0)
