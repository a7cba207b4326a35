"""Eigenspaces whose directions share one scaling, and means over them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

# Share of the mean eigenvalue below which all eigenvectors share one scaling.
POOLED = 0.1

# First and one-past-last index of neighbours in one block, with the block's number.
Range = tuple[int, int, int]

# Number of ranges from which they are averaged together.
MANY = 6
# Number of eigenvalues up to which a product with a matrix does that fastest on a CPU.
NARROW = 128


def degenerate(
    values: Tensor,
    first: int = 0,
    share: float = 0.0,
    weights: Tensor | None = None,
) -> Spaces | None:
    """Return the spaces of eigenvalues that are equal within rounding, if any.

    Neighbours are equal if their gap is at most 16 rounding errors of the largest, or
    1e-9 of it if that is more: in double precision, too, the data's rounding must not
    decide.

    Args:
        values: ``[b, e]``. From ``first`` on they ascend, but for those of a basis that
            was kept while its factor changed.
        first: Number of entries in front that stand for a complement and are left out.
        share: All eigenvalues of a block below this share of their mean are one space,
            too, the pool, with whatever equals one of them.
        weights: How many directions each has, ``[e]``; default: one.
    """
    tolerance = max(16 * torch.finfo(values.dtype).eps, 1e-9)
    gaps = values[:, first:].diff(dim=-1).abs()
    equal = pad(gaps <= tolerance * values.amax(dim=-1, keepdim=True), (first, 0))
    pool = None
    if share:
        mean = values.mean(dim=-1, keepdim=True)
        if weights is not None:
            mean = (values * weights).sum(dim=-1, keepdim=True) / weights.sum()
        number = pad((~equal).cumsum(dim=-1), (1, 0))  # of each eigenvalue's space
        small = (values < share * mean).to(values)
        held = torch.zeros_like(values).scatter_add_(1, number, small)
        pool = held.gather(1, number) > 0
        equal &= ~pool[:, 1:]
        pool = pool if bool((pool.sum(dim=-1) > 1).any()) else None
    ranges = _ranges(equal)
    return Spaces(pool, ranges, values, weights) if ranges or pool is not None else None


def _ranges(equal: Tensor) -> list[Range]:
    """Return the ranges of neighbours from ``[b, e]``: whether each equals the next."""
    ranges: list[Range] = []
    for block, index in equal.nonzero().tolist():
        if ranges and ranges[-1][::2] == (block, index + 1):
            ranges[-1] = (block, ranges[-1][1], index + 2)
        else:
            ranges.append((block, index, index + 2))
    return ranges


class Spaces:
    """Spaces of eigenvectors that share one scaling, in each of ``b`` blocks.

    Args:
        pool: ``[b, e]``, true for those of each block's first space; or there is none.
        ranges: Of the others.
        like: ``[b, e]``, gives device and dtype.
        weights: How many directions each entry has, ``[e]``; default: one. Only the
            first stands for several.

    Attributes:
        pool: The same.
        ranges: The same.
    """

    def __init__(
        self,
        pool: Tensor | None,
        ranges: list[Range],
        like: Tensor,
        weights: Tensor | None = None,
    ) -> None:
        self.pool, self.ranges = pool, ranges
        self._parts = list(_parts(pool, ranges, like, weights))

    def average_(self, values: Tensor, dim: int) -> None:
        """Overwrite values by their means over the spaces.

        Args:
            values: ``[b, *, *]``, with ``e`` entries in dimension ``dim``; of a single
                block ``[*, *, *]``, as the taps of a convolution have one factor.
            dim: -1 or -2.
        """
        for part in self._parts:
            part.average_(values, dim)


def _parts(
    pool: Tensor | None, ranges: list[Range], like: Tensor, weights: Tensor | None
) -> Iterator[_Ranges | _Index | _Mask | _Product]:
    """Yield what averages over the spaces fastest."""
    (blocks, width), cpu = like.shape, like.device.type == "cpu"
    if pool is not None:
        few = weights is None and (blocks < MANY if cpu else blocks == 1)
        own = _neighbours(pool) if few else None
        yield _Mask(pool, weights, like) if own is None else _Ranges(own, blocks)
    first = [] if weights is None else [r for r in ranges if r[1] == 0]
    ranges = [r for r in ranges if r not in first]
    if first:
        yield _Ranges(first, blocks, weights)
    if len(ranges) < MANY:
        yield _Ranges(ranges, blocks)
    elif not cpu or width <= NARROW:
        yield _Product(ranges, like)
    else:
        for block in sorted({block for block, _, _ in ranges}):
            yield _Index(block, [r[1:] for r in ranges if r[0] == block], like)


def _neighbours(pool: Tensor) -> list[Range] | None:
    """Return one range for each block's pool, or ``None`` where one lies scattered."""
    ranges = _ranges(pool[:, 1:] & pool[:, :-1])
    whole = sum(stop - start for _, start, stop in ranges) == int(pool.sum())
    single = len({block for block, _, _ in ranges}) == len(ranges)
    return ranges if whole and single else None


def _of_block(values: Tensor, block: int, blocks: int) -> Tensor:
    """Return a block's values; all of them if it is the only one."""
    return values if blocks == 1 else values[block]


class _Ranges:
    """A few spaces, one after the other."""

    def __init__(
        self, ranges: list[Range], blocks: int, weights: Tensor | None = None
    ) -> None:
        self._ranges, self._blocks, self._weights = ranges, blocks, weights

    def average_(self, values: Tensor, dim: int) -> None:
        for block, start, stop in self._ranges:
            own = _of_block(values, block, self._blocks)
            part = own.narrow(dim, start, stop - start)
            if self._weights is None:
                part.copy_(part.mean(dim, keepdim=True))
                continue
            weights = self._weights[start:stop]
            column = weights if dim == -1 else weights.unsqueeze(-1)
            part.copy_((part * column).sum(dim, keepdim=True) / weights.sum())


class _Index:
    """Many spaces of one block; on a GPU sums over an index come in any order."""

    def __init__(self, block: int, ranges: list[tuple[int, int]], like: Tensor) -> None:
        self._block, self._blocks = block, len(like)
        self._first, self._last = ranges[0][0], ranges[-1][1]
        begins = torch.ones(self._last - self._first, dtype=torch.long)
        for start, stop in ranges:
            begins[start + 1 - self._first : stop - self._first] = 0
        self._index = begins.cumsum(0) - 1
        self._counts = self._index.bincount().to(like)

    def average_(self, values: Tensor, dim: int) -> None:
        own = _of_block(values, self._block, self._blocks)
        part = own.narrow(dim, self._first, self._last - self._first)
        shape = list(part.shape)
        shape[dim] = len(self._counts)
        sums = part.new_zeros(shape).index_add_(dim, self._index, part)
        counts = self._counts if dim == -1 else self._counts.unsqueeze(-1)
        part.copy_(sums.div_(counts).index_select(dim, self._index))


class _Mask:
    """The pools of all blocks."""

    def __init__(self, pool: Tensor, weights: Tensor | None, like: Tensor) -> None:
        shares = pool.to(like) if weights is None else pool * weights
        shares /= shares.sum(dim=-1, keepdim=True).clamp(min=1)
        self._rows, self._columns = pool.unsqueeze(-1), pool.unsqueeze(-2)
        self._left, self._right = shares.unsqueeze(-2), shares.unsqueeze(-1)

    def average_(self, values: Tensor, dim: int) -> None:
        if dim == -2:
            mask, means = self._rows, self._left @ values
        else:
            mask, means = self._columns, values @ self._right
        torch.where(mask, means, values, out=values)


class _Product:
    """Many spaces of many blocks."""

    def __init__(self, ranges: list[Range], like: Tensor) -> None:
        blocks, width = like.shape
        matrices = torch.eye(width, dtype=like.dtype, device="cpu").repeat(blocks, 1, 1)
        for block, start, stop in ranges:
            matrices[block, start:stop, start:stop] = 1 / (stop - start)
        self._matrices = matrices.to(like.device)

    def average_(self, values: Tensor, dim: int) -> None:
        matrices = self._matrices
        values.copy_(matrices @ values if dim == -2 else values @ matrices)
