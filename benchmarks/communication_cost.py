"""What ranks send each other and keep, as a pure function of the layers' shapes.

Counted are the elements that one rank hands to collectives, if one backward pass of a
step averages gradients. A ring all-reduce of ``n`` ranks moves ``2 (n - 1) / n`` times
as many through every rank, a reduction at most as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ekfac.curvature.distributed.assignment import Assignment, Grid, cost_of
from ekfac.curvature.state import truncates
from ekfac.layers import Block
from ekfac.layers.blocks import NARROW


@dataclass(frozen=True)
class Sizes:
    """Elements of one layer.

    Attributes:
        name: The layer.
        factors: Of ``A`` and ``G`` in memory.
        packed: Of ``A`` and ``G`` on the way: one half of a symmetric matrix. For a
            weight that is used both as it is and transposed there are two of each.
        bases: Of ``Q_A`` and ``Q_G``.
        eigenvalues: Of both factors.
        scalings: Of ``s``; as many as parameters unless bases are truncated.
        parameters: Of the layer's weight and bias.
        cost: Of its decompositions.
    """

    name: str
    factors: int
    packed: int
    bases: int
    eigenvalues: int
    scalings: int
    parameters: int
    cost: float

    @classmethod
    def of(cls, block: Block, rank: int | None = None) -> Sizes:
        """Return the sizes of a block.

        Args:
            block: The layer's.
            rank: How many eigenvectors are kept, if bases are truncated.
        """
        b, d_out, d_in = block.shape
        b_in = b if block.exact or b > 1 else 1
        factors = packed = bases = eigenvalues = 0
        scalings = b
        for count, d, diagonal in (
            (b_in, d_in, block.diagonal[0]),
            (b, d_out, block.diagonal[1]),
        ):
            kept = d
            if rank is not None and truncates(block, rank) and d > NARROW:
                kept = rank if 2 * rank < d else d
            entries = kept + int(kept < d)  # one for all others
            factors += count * d if diagonal else count * d * d
            packed += count * d if diagonal else count * d * (d + 1) // 2
            bases += 0 if diagonal else count * d * kept
            eigenvalues += count * entries
            scalings *= entries
        packed *= len({use.transposed for use in block.uses})
        return cls(
            name=block.name,
            factors=factors,
            packed=packed,
            bases=bases,
            eigenvalues=eigenvalues,
            scalings=scalings,
            parameters=b * d_out * d_in,
            cost=cost_of(block, rank),
        )


@dataclass(frozen=True)
class Traffic:
    """Elements that one rank keeps, and hands to collectives.

    Attributes:
        kept: In memory.
        factors: To the sum of factors, when they are updated.
        scalings: To the sum of per-example scalings, when they are updated.
        bases: Sent or received when every layer refreshes its basis.
        directions: Sent or received at every step.
    """

    kept: int
    factors: int
    scalings: int
    bases: int
    directions: int

    def through(self, ranks: int, factor_interval: int, basis_interval: int) -> float:
        """Return the elements through one rank in a mean step, by ring collectives.

        Args:
            ranks: How many there are.
            factor_interval: Steps between updates of the factors.
            basis_interval: Steps between refreshes of a layer's basis.
        """
        around = 2 * (ranks - 1) / ranks
        return (
            around * self.factors / factor_interval
            + around * self.scalings
            + self.bases / basis_interval
            + self.directions
        )


def traffic(
    layers: Sequence[Sizes],
    grid: Grid,
    rank: int,
    *,
    per_example: bool = False,
    scaled: bool = True,
) -> Traffic:
    """Return what one rank keeps and sends.

    Args:
        layers: Of the model.
        grid: The ranks.
        rank: Which one.
        per_example: Whether scalings are those of single examples' gradients.
        scaled: Whether there are scalings; K-FAC has none.
    """
    assignment = Assignment(grid, rank, {}, {})
    assignment.extend({layer.name: layer.cost for layer in layers})
    everyone = per_example or not assignment.divided
    kept = bases = directions = 0
    for layer in layers:
        owns, works = assignment.owns(layer.name), assignment.works(layer.name)
        kept += layer.factors if owns or not assignment.divided else 0
        kept += layer.bases + layer.eigenvalues if works or everyone else 0
        kept += layer.scalings if works and scaled else 0
        if grid.ranks > 1 and (everyone or (works and grid.workers > 1)):
            bases += layer.bases + layer.eigenvalues
        if assignment.divided:
            directions += layer.parameters
    alone = grid.ranks == 1
    return Traffic(
        kept,
        0 if alone else sum(layer.packed for layer in layers),
        sum(layer.scalings for layer in layers) if per_example and not alone else 0,
        bases,
        directions,
    )


class Counted:
    """Counts the elements that a rank hands to collectives, by the collective."""

    def __init__(self) -> None:
        self.elements: dict[str, list[int]] = {}
        self._original = {
            name: getattr(dist, name) for name in ("all_reduce", "reduce", "broadcast")
        }

    def __enter__(self) -> Counted:
        """Begin to count."""
        for name, function in self._original.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop."""
        for name, function in self._original.items():
            setattr(dist, name, function)

    def _counting(self, name: str, function: Any) -> Any:
        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype == torch.float32:  # the counts and decisions are not
                self.elements.setdefault(name, []).append(tensor.numel())
            return function(tensor, *args, **kwargs)

        return counting

    def total(self, *names: str) -> int:
        """Return how many went through these collectives."""
        return sum(sum(self.elements.get(name, [])) for name in names)
