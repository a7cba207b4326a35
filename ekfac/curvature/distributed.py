"""Several ranks that train together, on ``torch.distributed``.

Statistics are sums until the step, so ranks meet by adding theirs. What they send goes
in flat buffers, one collective each, all started before the first is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ekfac.curvature.assignment import Assignment, decomposition_cost, grid
from ekfac.curvature.average import EVERYTHING, Held
from ekfac.layers import Block

# Elements of a buffer: the next one is packed while it travels.
BUCKET = 1 << 23


@dataclass(frozen=True)
class Term:
    """This rank's term of a sum over ranks.

    Attributes:
        tensor: Overwritten by the sum.
        symmetric: The last two dimensions are: one half travels.
        owner: The rank that needs the sum, or ``None`` if all do.
    """

    tensor: Tensor
    symmetric: bool = False
    owner: int | None = None

    def pack(self) -> Tensor:
        """Return the elements that travel."""
        return pack_symmetric(self.tensor) if self.symmetric else self.tensor.flatten()

    def size(self) -> int:
        """Return how many there are."""
        if not self.symmetric:
            return self.tensor.numel()
        d = self.tensor.shape[-1]
        return self.tensor.numel() // d * (d + 1) // 2

    def unpack_(self, flat: Tensor) -> None:
        """Overwrite the tensor by what arrived."""
        if self.symmetric:
            unpack_symmetric_(flat, self.tensor)
        else:
            self.tensor.copy_(flat.view_as(self.tensor))


def pack_symmetric(matrices: Tensor) -> Tensor:
    """Return one half of symmetric matrices ``[..., d, d]``, flat.

    Cut in the middle, the lower triangles of both diagonal blocks fill one rectangle,
    the second as its transpose: ``d (d + 1) / 2`` elements without an index.
    """
    d = matrices.shape[-1]
    h = (d + 1) // 2
    rectangle = matrices.new_zeros(*matrices.shape[:-2], h, d - h + 1)
    rectangle[..., : d - h, 1:] = matrices[..., h:, h:].triu()
    rectangle[..., :, : d - h + 1] += matrices[..., :h, : d - h + 1].tril()
    return torch.cat([rectangle.flatten(), matrices[..., h:, :h].flatten()])


def unpack_symmetric_(flat: Tensor, matrices: Tensor) -> None:
    """Overwrite ``matrices`` by what :func:`pack_symmetric` made of them."""
    d = matrices.shape[-1]
    h = (d + 1) // 2
    lead = matrices.shape[:-2]
    count = matrices.numel() // (d * d) * h * (d - h + 1)
    rectangle = flat[:count].view(*lead, h, d - h + 1)
    below = flat[count:].view(*lead, d - h, h)
    first = rectangle.new_zeros(*lead, h, h)
    first[..., :, : d - h + 1] = rectangle[..., :, :h].tril()
    second = rectangle[..., : d - h, 1:].triu()
    matrices[..., :h, :h] = first + first.tril(-1).transpose(-1, -2)
    matrices[..., h:, h:] = second + second.triu(1).transpose(-1, -2)
    matrices[..., h:, :h] = below
    matrices[..., :h, h:] = below.transpose(-1, -2)


class Ranks:
    """The processes of one group, and how they divide the work.

    Args:
        group: The process group, ``None`` for the default one.
        device: Where the curvature lies.
        workers: Fraction of the ranks that precondition the gradient of one layer.

    Raises:
        ValueError: If this process is not in the group, or for an impossible fraction.
    """

    def __init__(self, group: Any, device: torch.device, workers: float) -> None:
        self.group, self.device, self.fraction = group, device, workers
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError("Invalid process_group: this process is not in it.")
        self.assignment = Assignment(grid(self.size, workers), self.rank, {}, {})
        self.row = self._subgroup(self.assignment.grid.row_of(self.rank))
        self.column = self._subgroup(self.assignment.grid.column_of(self.rank))
        self.keep_bases = False

    def _subgroup(self, members: tuple[int, ...]) -> Any:
        """Return the group of some of the ranks; all belong to one such subset."""
        if len(members) in (1, self.size):
            return self.group
        return dist.new_group(
            [self._global(rank) for rank in members], use_local_synchronization=True
        )

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return itself: copies of an optimizer train in the same group."""
        return self

    def __str__(self) -> str:
        """Return how many there are."""
        return f"{self.size} ranks"

    # -- who has what -----------------------------------------------------------------

    def extend(self, blocks: Sequence[Block]) -> None:
        """Assign the layers of more blocks."""
        self.assignment.extend(
            {b.name: decomposition_cost(b.shape, b.diagonal, b.exact) for b in blocks}
        )

    def held(self, name: str) -> Held:
        """Return what of a layer this rank stores."""
        if not self.assignment.divided:
            return EVERYTHING
        works = self.assignment.works(name)
        return Held(self.assignment.owns(name), works or self.keep_bases, works)

    # -- collectives ------------------------------------------------------------------

    def total(self, values: Tensor) -> Tensor:
        """Return ``values`` summed over the ranks."""
        dist.all_reduce(values, group=self.group)
        return values

    def range(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the largest of ``values`` over the ranks."""
        both = torch.cat([-values, values])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return -both[: len(values)], both[len(values) :]

    def agree(self, value: Any) -> list[Any]:
        """Return what every rank passed, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def send(self, value: Any, source: int) -> Any:
        """Return what the rank ``source`` passed."""
        box = [value]
        to = self._global(source)
        dist.broadcast_object_list(box, to, group=self.group)
        return box[0]

    def sum_(self, terms: Sequence[Term]) -> None:
        """Overwrite every term by the sum over ranks, at its owner or everywhere."""
        sent = []
        for owner, bucket in _buckets(terms):
            flat = torch.cat([term.pack() for term in bucket])
            if owner is None:
                work = dist.all_reduce(flat, group=self.group, async_op=True)
            else:
                to = self._global(owner)
                work = dist.reduce(flat, to, group=self.group, async_op=True)
            sent.append((work, flat, owner, bucket))
        for work, flat, owner, bucket in sent:
            work.wait()
            if owner in (None, self.rank):
                parts = flat.split([term.size() for term in bucket])
                for term, part in zip(bucket, parts, strict=True):
                    term.unpack_(part)

    def exchange_(
        self, batches: Sequence[tuple[int, Sequence[Tensor]]], group: Any
    ) -> None:
        """Overwrite tensors by those of the rank that they are listed with.

        Args:
            batches: Ranks of the group with what they send, the same on all members up
                to the values; tensors of one rank and type travel together.
            group: The whole group, a row or a column.
        """
        kinds: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for source, tensors in batches:
            for tensor in tensors:
                kinds.setdefault((source, tensor.dtype), []).append(tensor)
        sent = []
        for (source, dtype), tensors in kinds.items():
            if source == self.rank:
                flat = torch.cat([tensor.flatten() for tensor in tensors])
            else:
                size = sum(tensor.numel() for tensor in tensors)
                flat = torch.empty(size, dtype=dtype, device=self.device)
            to = self._global(source)
            work = dist.broadcast(flat, to, group=group, async_op=True)
            sent.append((work, flat, source, tensors))
        for work, flat, source, tensors in sent:
            work.wait()
            if source != self.rank:
                parts = flat.split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))


def _buckets(terms: Sequence[Term]) -> Iterator[tuple[int | None, list[Term]]]:
    """Yield terms for one owner and of one type that make up one buffer."""
    kinds: dict[tuple[int | None, torch.dtype], list[Term]] = {}
    for term in terms:
        kinds.setdefault((term.owner, term.tensor.dtype), []).append(term)
    for (owner, _), members in kinds.items():
        bucket: list[Term] = []
        for term in members:
            bucket.append(term)
            if sum(t.size() for t in bucket) >= BUCKET:
                yield owner, bucket
                bucket = []
        if bucket:
            yield owner, bucket
