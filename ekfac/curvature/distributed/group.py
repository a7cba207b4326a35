"""The ranks that train together, and their collectives on ``torch.distributed``.

Statistics are sums until the step, so ranks add theirs. What they send goes in flat
buffers, one collective each, all started before the first is waited for. The process
groups are the package's own, so that its collectives never pair with the user's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ekfac.curvature.distributed.assignment import Assignment, cost_of, grid
from ekfac.curvature.distributed.failures import Failures
from ekfac.curvature.state import EVERYTHING, Placement
from ekfac.layers import Block

# Elements of a buffer: the next one is packed while it travels.
BUCKET = 1 << 23
Item = TypeVar("Item")


@dataclass(frozen=True)
class Term:
    """This rank's term of a sum over ranks.

    Attributes:
        tensor: Overwritten by the sum.
        symmetric: The last two dimensions are: one half travels.
        owner: The rank that needs the sum, or ``None`` if all do.
        scale: What this rank's term is multiplied with.
        layer: Whose it is, for errors.
    """

    tensor: Tensor
    symmetric: bool = False
    owner: int | None = None
    scale: Tensor | None = None
    layer: str = ""

    def pack(self) -> Tensor:
        """Return the elements that travel."""
        found = pack_symmetric(self.tensor) if self.symmetric else self.tensor.flatten()
        return found if self.scale is None else found * self.scale.to(found)

    def size(self) -> int:
        """Return how many there are."""
        return packed_size(self.tensor.shape, self.symmetric)

    def unpack_(self, flat: Tensor) -> None:
        """Overwrite the tensor by what arrived."""
        if self.symmetric:
            unpack_symmetric_(flat, self.tensor)
        else:
            self.tensor.copy_(flat.view_as(self.tensor))


@dataclass(frozen=True)
class Sum:
    """A sum over ranks that has been started.

    Attributes:
        work: torch's handle.
        flat: This rank's elements, then the sum's.
        terms: What they are made of, for one owner.
    """

    work: Any
    flat: Tensor
    terms: Sequence[Term]


def packed_size(shape: Sequence[int], symmetric: bool) -> int:
    """Return how many elements of a tensor travel."""
    count = math.prod(shape)
    return count // shape[-1] * (shape[-1] + 1) // 2 if symmetric else count


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
        group: The user's process group, ``None`` for the default one; this process is
            in it.
        device: Where the curvature lies.
        workers: Fraction of the ranks that precondition the gradient of one layer.

    Raises:
        ValueError: For an impossible fraction.
    """

    def __init__(self, group: Any, device: torch.device, workers: float) -> None:
        self.parent, self.device, self.fraction = group, device, workers
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.assignment = Assignment(grid(self.size, workers), self.rank, {}, {})
        self.group = self._new_group(range(self.size))
        self.row = self._subgroup(self.assignment.grid.row_of(self.rank))
        self.column = self._subgroup(self.assignment.grid.column_of(self.rank))
        # Of all once more: what is sent during a backward pass must not come between
        # the collectives of others, whose order is theirs.
        self.aside = self._new_group(range(self.size))
        name = self.group.group_name
        self.failures = Failures(name, self.rank, self.size, device)
        self.keep_bases = False

    def _subgroup(self, members: tuple[int, ...]) -> Any:
        """Return the group of some of the ranks; all belong to one such subset."""
        if len(members) in (1, self.size):
            return self.group
        return self._new_group(members)

    def _new_group(self, members: Iterable[int]) -> Any:
        """Return a group with the backend and the time limit of the user's own."""
        parent: Any = dist.group.WORLD if self.parent is None else self.parent
        return dist.new_group(
            [self._global(rank) for rank in members],
            timeout=parent._get_backend(self.device).options._timeout,
            backend=dist.get_backend_config(self.parent),
            use_local_synchronization=True,
        )

    def _global(self, rank: int) -> int:
        if self.parent is None:
            return rank
        return dist.get_global_rank(self.parent, rank)

    def members(self) -> list[int]:
        """Return the ranks by their numbers among all processes, sorted."""
        return sorted(self._global(rank) for rank in range(self.size))

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return itself: copies of an optimizer train in the same group."""
        return self

    def __str__(self) -> str:
        """Return how many there are."""
        return f"{self.size} ranks"

    # -- who has what -----------------------------------------------------------------

    def extend(self, blocks: Sequence[Block], rank: float | None) -> None:
        """Assign the layers of more blocks; ``rank``: as for :class:`ekfac.EKFAC`."""
        self.assignment.extend({b.name: cost_of(b, rank) for b in blocks})

    def owner(self, name: str) -> int | None:
        """Return the rank that alone needs a layer's factors, ``None`` if all do."""
        return self.assignment.owners[name] if self.assignment.divided else None

    def held(self, name: str) -> Placement:
        """Return what of a layer this rank stores."""
        if not self.assignment.divided:
            return EVERYTHING
        works = self.assignment.works(name)
        return Placement(self.assignment.owns(name), works or self.keep_bases, works)

    # -- collectives ------------------------------------------------------------------

    def total(self, values: Tensor, doing: str, layers: Sequence[str] = ()) -> Tensor:
        """Return ``values`` summed over the ranks; the rest is for errors."""
        work = dist.all_reduce(values, group=self.group, async_op=True)
        self.failures.wait(work, doing, layers)
        return values

    def range(self, values: Tensor, doing: str) -> tuple[Tensor, Tensor]:
        """Return the least and the largest of ``values`` over the ranks."""
        both = torch.cat([-values, values])
        largest = dist.ReduceOp.MAX
        work = dist.all_reduce(both, largest, group=self.group, async_op=True)
        self.failures.wait(work, doing)
        return -both[: len(values)], both[len(values) :]

    def agree(self, value: Any) -> list[Any]:
        """Return what every rank passed, by rank."""
        found: list[Any] = [None] * self.size
        with self.failures.collective("comparing the ranks"):
            dist.all_gather_object(found, value, group=self.group)
        return found

    def send(self, value: Any, source: int) -> Any:
        """Return what the rank ``source`` passed."""
        box = [value]
        with self.failures.collective("sending a rank's state"):
            to = self._global(source)
            dist.broadcast_object_list(box, to, group=self.group)
        return box[0]

    def sum_(self, terms: Sequence[Term]) -> None:
        """Overwrite every term by the sum over ranks, at its owner or everywhere."""
        kinds = [((t.owner, t.tensor.dtype), t.size(), t) for t in terms]
        for found in [self.begin_sum(b, self.group) for b in buckets(kinds)]:
            self.end_sum_(found)

    def begin_sum(self, terms: Sequence[Term], group: Any) -> Sum:
        """Send off terms for one owner and of one type, as one buffer."""
        flat, owner = torch.cat([term.pack() for term in terms]), terms[0].owner
        if owner is None:
            work = dist.all_reduce(flat, group=group, async_op=True)
        else:
            to = self._global(owner)
            work = dist.reduce(flat, to, group=group, async_op=True)
        return Sum(work, flat, terms)

    def end_sum_(self, found: Sum) -> None:
        """Wait for a sum and overwrite its terms, if they are for this rank."""
        layers = [term.layer for term in found.terms]
        self.failures.wait(found.work, "summing statistics", layers)
        if found.terms[0].owner in (None, self.rank):
            parts = found.flat.split([term.size() for term in found.terms])
            for term, part in zip(found.terms, parts, strict=True):
                term.unpack_(part)

    def exchange_(
        self, batches: Sequence[tuple[int, str, Sequence[Tensor]]], group: Any
    ) -> None:
        """Overwrite tensors by those of the rank that they are listed with.

        Args:
            batches: Ranks of the group with a layer and what they send of it, the same
                on all members up to the values; tensors of one rank and type travel
                together.
            group: The whole group, a row or a column.
        """
        kinds: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        layers: dict[int, list[str]] = {}
        for source, name, tensors in batches:
            layers.setdefault(source, []).append(name)
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
            doing = f"receiving from rank {source} the result"
            self.failures.wait(work, doing, layers[source])
            if source != self.rank:
                parts = flat.split([tensor.numel() for tensor in tensors])
                for tensor, part in zip(tensors, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))


def buckets(items: Iterable[tuple[Hashable, int, Item]]) -> list[list[Item]]:
    """Return what makes up one buffer each, in the order in which they are complete.

    Args:
        items: Of what kind each is, and how many elements it has; one buffer is of one
            kind.
    """
    ended: list[list[Item]] = []
    begun: dict[Hashable, tuple[int, list[Item]]] = {}
    for kind, size, item in items:
        before, members = begun.pop(kind, (0, []))
        members.append(item)
        if before + size >= BUCKET:
            ended.append(members)
        else:
            begun[kind] = (before + size, members)  # at the end of the dict
    return ended + [members for _, members in begun.values()]
