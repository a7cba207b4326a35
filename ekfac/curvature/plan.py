"""What a step takes from its batch, and how statistics are taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What the coming step takes from the batch.

    Attributes:
        factors: Whether factors are updated.
        scalings: Whether scalings are taken from the gradients of single examples.
        refresh: Names of the layers whose basis is refreshed.
        begin: Names of those for which the search for a later one begins.
        projection: Whether gradients may be projected as their two thin factors.
    """

    factors: bool
    scalings: bool
    refresh: frozenset[str]
    projection: bool
    begin: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Recipe:
    """How statistics are taken, for a whole training run.

    Attributes:
        sharing: ``"expand"`` or ``"reduce"``.
        empirical: The recorded gradients are those of the user's own loss.
        reduction: ``"mean"`` or ``"sum"`` of the targets' losses, on each rank, or
            ``"global_mean"``.
        factor_decay: Decay of the factors' averages.
        scaling_decay: Decay of the scalings' averages.
        tolerance: Off-diagonal mass below which a basis is kept.
        seed: Of the pseudo-gradients' random numbers.
    """

    sharing: str
    empirical: bool
    reduction: str
    factor_decay: float
    scaling_decay: float
    tolerance: float
    seed: int
