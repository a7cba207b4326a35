"""Agreement of the ranks at a step: its number, their options and gradients."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ekfac.curvature.distributed.group import Ranks
from ekfac.errors import RankError


@dataclass(frozen=True)
class Standing:
    """What one rank says of itself at a step, so that none goes on with another state.

    Attributes:
        step: Number of the step.
        trains: Whether it has data; ``Join`` lets the others shadow the step.
        options: What param groups hold, by a name for errors.
        gradients: Layer name -> whether its first parameter has a gradient.
    """

    step: int
    trains: bool
    options: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, bool] = field(default_factory=dict)

    def numbers(self, ranks: Ranks) -> list[float]:
        """Return what is summed over the ranks: three places each, and one per layer.

        The number of places depends on ranks and layers alone: ranks at different steps
        find that out by one and the same collective.
        """
        own = [float(self.step), float(self.trains), self._digest()]
        said = [0.0] * (3 * ranks.size)
        said[3 * ranks.rank : 3 * ranks.rank + 3] = own
        here = self.gradients if self.trains else {}
        layers = ranks.assignment.owners
        return said + [float(here.get(name, False)) for name in layers]

    def _digest(self) -> float:
        """Return a number that differs where options do; a double holds all of it."""
        values = list(self.options.values())
        packed = struct.pack(f"{len(values)}d", *values)
        return float(int.from_bytes(blake2b(packed, digest_size=6).digest(), "big"))

    @staticmethod
    def length(ranks: Ranks) -> int:
        """Return how many numbers there are."""
        return 3 * ranks.size + len(ranks.assignment.owners)

    def check(self, ranks: Ranks, said: Sequence[float]) -> None:
        """Raise on every rank if they are at different steps or would go apart.

        Args:
            ranks: The processes.
            said: The sum of what all have said.

        Raises:
            RankError: With two ranks and what is different there.
        """
        size = ranks.size
        steps, trains = said[: 3 * size : 3], said[1 : 3 * size : 3]
        for rank, step in enumerate(steps):
            if step != steps[0]:
                raise RankError(
                    f"Ranks 0 and {rank} are at different steps: {steps[0]:.0f} and "
                    f"{step:.0f}. All ranks call step() equally often and load the "
                    "same checkpoint; torch.distributed.algorithms.Join covers ranks "
                    "that run out of data."
                )
        digests = said[2 : 3 * size : 3]
        if len({d for d, has in zip(digests, trains, strict=True) if has}) > 1:
            self._refuse_options(ranks)
        training = sum(trains)
        names = ranks.assignment.owners
        for name, count in zip(names, said[3 * size :], strict=True):
            if count not in (0, training):
                self._refuse_gradients(ranks, name)

    def _refuse_options(self, ranks: Ranks) -> None:
        every: list[dict[str, float]] = ranks.agree(dict(self.options))
        for rank, other in enumerate(every):
            for key, value in every[0].items():
                if other.get(key, value) != value:
                    raise RankError(
                        f"step {self.step}: {key} is {value!r} on rank 0 and "
                        f"{other[key]!r} on rank {rank}: the replicas would drift "
                        "apart. Options of param groups must be equal on all ranks; "
                        "let schedulers depend on what all know."
                    )

    def _refuse_gradients(self, ranks: Ranks, name: str) -> None:
        every = ranks.agree(self.trains and self.gradients.get(name, False))
        without = [rank for rank, has in enumerate(every) if not has]
        raise RankError(
            f"step {self.step}: layer {name!r} has no gradient on ranks {without} and "
            "one on the others. All must have the averaged gradient: call backward() "
            "on every rank, within DistributedDataParallel or fully_shard."
        )
