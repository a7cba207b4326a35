"""Assignment of work to ranks: a pure function of the layers' costs and the ranks.

Every layer is decomposed by one rank, its owner. The ranks form a grid with
``workers`` rows (KAISA, Pauloski et al. 2021, section 3.2); a column's ranks are the
gradient workers of the layers whose owner is in it: they keep the layers' bases and
precondition their gradients. The results go along the rows to the other columns. With
one column every rank does so for every layer and no gradient travels; with one row only
the owner does, which needs the least memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ekfac.curvature.state import truncates
from ekfac.layers import Block
from ekfac.layers.blocks import NARROW


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
    shape: tuple[int, int, int],
    diagonal: tuple[bool, bool],
    wanted: int | None = None,
) -> float:
    """Return the cost of a layer's decompositions; a full one of size ``d`` is ``d^3``.

    Args:
        shape: ``(b, d_out, d_in)``, with the number ``b`` of factors of a side.
        diagonal: Whether the input's and the output's factor are diagonal.
        wanted: How many eigenvectors are found of a side that can be truncated.
    """
    b, d_out, d_in = shape
    inputs = 0.0 if diagonal[0] else b * _side_cost(d_in, wanted)
    outputs = 0.0 if diagonal[1] else b * _side_cost(d_out, wanted)
    return inputs + outputs


def _side_cost(d: int, wanted: int | None) -> float:
    """Return the cost of one factor: of block iteration, or of a full decomposition.

    Block iteration takes two products with the factor and an orthogonalisation. Beside
    a full decomposition an operation of its products costs a third, as measured on one
    core (d of 256 to 1,024, 8 to 100 eigenvectors).
    """
    if wanted is None or d <= NARROW:
        return float(d**3)
    size = wanted + max(8, wanted // 4)
    if 2 * size >= d:
        return float(d**3)
    return (2 * d**2 * size + 8 * d * size**2) / 3 + 3 * size**3


def cost_of(block: Block, rank: float | None) -> float:
    """Return the cost of a block's decompositions.

    Args:
        block: The layer's.
        rank: As for :class:`ekfac.EKFAC`. How many eigenvectors are above a share of
            the mean is not known beforehand: such layers count as full ones.
    """
    fixed = isinstance(rank, int) and truncates(block, rank)
    wanted = int(rank) if fixed and rank is not None else None
    return decomposition_cost(block.factor_shape, block.diagonal, wanted)


def assign(
    costs: Mapping[str, float], ranks: int, loads: Sequence[float] = ()
) -> dict[str, int]:
    """Return the owner of every layer: longest processing time first.

    The next costliest layer goes to the rank with the least load. The largest load is
    then at most ``4/3 - 1/(3 ranks)`` of the best possible (Graham 1969, theorem 2).
    The ranks begin with their present ``loads``.

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
        """Assign more layers; those assigned before keep their owner.

        So does a copy of an optimizer, whose layers have the same names.
        """
        costs = {name: cost for name, cost in costs.items() if name not in self.owners}
        loads = [0.0] * self.grid.ranks
        for name, owner in self.owners.items():
            loads[owner] += self.costs[name]
        self.owners |= assign(costs, self.grid.ranks, loads)
        self.costs |= costs

    def remove(self, names: Iterable[str]) -> None:
        """Forget layers."""
        for name in names:
            self.owners.pop(name, None)
            self.costs.pop(name, None)

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
