"""New eigenbases, and counters of how they were computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Counters:
    """What happened to the decompositions of one optimizer.

    Attributes:
        decomposed: Full decompositions.
        skipped: Refreshes that were not needed, the old basis still fitted.
        retried: Decompositions that succeeded only with jitter, in float64 or on the
            CPU.
        kept: Decompositions that failed altogether; the old basis was kept.
        rejected: Batches whose statistics were not finite and were left out.
        followed: Decompositions found from the old basis by matrix products.
        repeated: Decompositions whose search in a thread raised or was lost in a fork,
            and that were done again within the step.
    """

    decomposed: int = 0
    skipped: int = 0
    retried: int = 0
    kept: int = 0
    rejected: int = 0
    followed: int = 0
    repeated: int = 0

    def add(self, other: Counters) -> None:
        """Add what others have counted."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class BasisUpdate:
    """A layer's new basis: what a rank that decomposes sends to the others.

    Attributes:
        values: Eigenvalues by side, ``"A"`` and ``"G"``.
        vectors: New eigenvectors by side, of whatever rank if the basis is truncated;
            ``None`` where the basis stays.
    """

    values: dict[str, Tensor]
    vectors: dict[str, Tensor | None]

    def tensors(self) -> list[Tensor]:
        """Return what travels from one rank to another, in a fixed order."""
        vectors = [self.vectors[side] for side in ("A", "G")]
        present = [v for v in vectors if v is not None]
        return [*present, self.values["A"], self.values["G"]]
