"""Which rank does what: a pure function of the layers' costs and the number of ranks.

Every layer is decomposed by one rank, its owner. The ranks form a grid with
``workers`` rows (KAISA, Pauloski et al. 2021, section 3.2); a column's ranks are the
gradient workers of the layers whose owner is in it: they keep the layers' bases and
precondition their gradients. The results go along the rows to the other columns. With
one column every rank does so for every layer and no gradient travels; with one row only
the owner does, which needs the least memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The ranks as ``workers`` rows and ``columns`` columns, counted along the rows.

    Attributes:
        ranks: How many there are.
        workers: How many precondition the gradient of one layer; divides ``ranks``.
    """

    ranks: int
    workers: int

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.ranks // self.workers

    def column(self, rank: int) -> int:
        """Return the column that ``rank`` is in."""
        return rank % self.columns

    def column_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of the column of ``rank``: the workers beside it."""
        return tuple(range(self.column(rank), self.ranks, self.columns))

    def row_of(self, rank: int) -> tuple[int, ...]:
        """Return the ranks of the row of ``rank``, one of every column."""
        start = rank - self.column(rank)
        return tuple(range(start, start + self.columns))


def grid(ranks: int, fraction: float) -> Grid:
    """Return the grid in which ``fraction`` of the ranks are workers of a layer.

    Raises:
        ValueError: If the fraction does not divide the ranks evenly.
    """
    workers = round(fraction * ranks)
    near = abs(workers - fraction * ranks) < 0.01
    if not (near and 1 <= workers <= ranks) or ranks % workers:
        allowed = [f"{n}/{ranks}" for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"Invalid gradient_workers: {fraction!r} of {ranks} ranks; they must form "
            f"a grid: use one of {', '.join(allowed)}."
        )
    return Grid(ranks, workers)


def decomposition_cost(
    shape: tuple[int, int, int], diagonal: tuple[bool, bool], exact: bool = False
) -> float:
    """Return the cost of a layer's decompositions, in multiplications.

    Args:
        shape: ``(b, d_out, d_in)``.
        diagonal: Whether the input's and the output's factor are diagonal.
        exact: Whether every block has an input factor of its own.
    """
    b, d_out, d_in = shape
    inputs = 0.0 if diagonal[0] else float(b if exact or b > 1 else 1) * d_in**3
    outputs = 0.0 if diagonal[1] else float(b) * d_out**3
    return inputs + outputs


def assign(
    costs: Mapping[str, float], ranks: int, loads: Sequence[float] = ()
) -> dict[str, int]:
    """Return the owner of every layer: longest processing time first.

    The next costliest layer goes to the rank with the least to do. The largest load is
    then at most ``4/3 - 1/(3 ranks)`` of the best possible (Graham 1969, theorem 2).

    Args:
        costs: Layer name -> cost.
        ranks: How many there are.
        loads: What the ranks have to do already.

    Returns:
        Layer name -> rank, in the order of ``costs``. Layers of equal cost, and ranks
        of equal load, are taken in order.
    """
    load = [*loads, *[0.0] * (ranks - len(loads))]
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owner = min(range(ranks), key=lambda rank: load[rank])
        owners[name] = owner
        load[owner] += costs[name]
    return {name: owners[name] for name in costs}


@dataclass
class Assignment:
    """Owner and workers of every layer, as seen from one rank.

    Attributes:
        grid: The ranks.
        rank: The one that asks.
        owners: Layer name -> the rank that decomposes it.
        costs: Layer name -> cost.
    """

    grid: Grid
    rank: int
    owners: dict[str, int]
    costs: dict[str, float]

    def extend(self, costs: Mapping[str, float]) -> None:
        """Assign more layers; those assigned before stay where they are.

        A copy of an optimizer, in the same ranks, has layers of the same names.
        """
        costs = {name: cost for name, cost in costs.items() if name not in self.owners}
        loads = [0.0] * self.grid.ranks
        for name, owner in self.owners.items():
            loads[owner] += self.costs[name]
        self.owners |= assign(costs, self.grid.ranks, loads)
        self.costs |= costs

    @property
    def divided(self) -> bool:
        """Whether some ranks are no workers of some layers."""
        return self.grid.columns > 1

    def owns(self, name: str) -> bool:
        """Return whether this rank decomposes the layer."""
        return self.owners[name] == self.rank

    def works(self, name: str) -> bool:
        """Return whether this rank preconditions the layer's gradient."""
        return self.grid.column(self.owners[name]) == self.grid.column(self.rank)

    def worker(self, name: str) -> int:
        """Return the rank in this rank's row that preconditions the layer."""
        return self.grid.row_of(self.rank)[self.grid.column(self.owners[name])]
