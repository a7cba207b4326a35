"""Process groups of ranks that train together: collectives, and reports of failures.

Statistics are sums until the step, so ranks add theirs, in flat buffers: one collective
each, all started before the first is waited for. The process groups are the package's
own, so that its collectives never pair with the user's.

A transport says that a connection was closed or a time limit passed, not which rank was
the cause. So a rank whose step raises leaves a report in ``torch.distributed``'s store,
and so does a rank whose collective fails: the rank without a report is the cause. On a
CPU a waiting rank looks every half second whether another has failed. It waits at the
end of its backward pass too, before the sums of ``DistributedDataParallel``, whose
errors name no rank.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.distributed.assignment import Assignment, cost_of, grid
from ekfac.curvature.state import EVERYTHING, Placement
from ekfac.errors import RankError, listed
from ekfac.layers import Block

# Seconds that a rank that has failed waits for the reports of the others.
GRACE = 2.0
LOOK = timedelta(seconds=0.5)
# Seconds that a backward pass waits at its end for the sums of ranks that send none:
# they may have had another pass, which the step finds out.
PATIENCE = 5.0
# Elements of a buffer: the next one is packed while it is sent.
BUCKET = 1 << 23
WAITED = (
    "every rank waited: for other ranks' other collectives, as of optimizers that are "
    "constructed in another order or with other process groups"
)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Term:
    """This rank's term of a sum over ranks.

    Attributes:
        tensor: Overwritten by the sum.
        symmetric: Its matrices are symmetric: one half is sent.
        owner: The rank that needs the sum, or ``None`` if all do.
        scale: The factor of this rank's term.
        layer: Name of its layer, for errors.
    """

    tensor: Tensor
    symmetric: bool = False
    owner: int | None = None
    scale: Tensor | None = None
    layer: str = ""

    def pack(self) -> Tensor:
        """Return the elements that are sent."""
        tensor = kernels.pack_symmetric(self.tensor) if self.symmetric else self.tensor
        elements = tensor.flatten()
        return elements if self.scale is None else elements * self.scale.to(elements)

    def size(self) -> int:
        """Return how many elements are sent."""
        return kernels.packed_size(self.tensor.shape, self.symmetric)

    def unpack_(self, flat: Tensor) -> None:
        """Overwrite the tensor by what arrived."""
        if self.symmetric:
            packed = flat.view(*self.tensor.shape[:-2], -1)
            self.tensor.copy_(kernels.unpack_symmetric(packed))
        else:
            self.tensor.copy_(flat.view_as(self.tensor))


@dataclass(frozen=True)
class Sum:
    """A sum over ranks that has been started.

    Attributes:
        work: torch's handle.
        flat: This rank's elements, then the sum's.
        terms: The terms that they are packed of, for one owner.
    """

    work: Any
    flat: Tensor
    terms: Sequence[Term]

    def layers(self) -> list[str]:
        """Return the names of the terms' layers, for errors."""
        return [term.layer for term in self.terms]


class Failures:
    """Reports of the ranks of one group.

    The group's ``name`` is one that all its ranks and no other group have.

    Attributes:
        step: Number of the step that is being done, or that the backward is for.
    """

    def __init__(self, name: str, rank: int, size: int, device: torch.device) -> None:
        self.name, self.rank, self.size, self.device = name, rank, size, device
        self.step = 0
        self._attempt = 0  # tells the reports of one failure from those of the next
        self._old = 0  # reports of earlier groups of this name
        self._store: Any = dist.distributed_c10d._get_default_store()

    # -- reports ----------------------------------------------------------------------

    def _key(self, what: object) -> str:
        return f"ekfac/{self.name}/{self._attempt}/{what}"

    def _report(self, cause: str | None) -> None:
        """Leave a report: what this rank raised, or ``None`` if it only waited."""
        try:
            now = self._store.add(self._key("reports"), 1)
            self._store.set(self._key(self.rank), json.dumps([self.step, cause, now]))
            self._store.set(self._key("last"), str(now))
        except RuntimeError:
            pass  # the store's host has ended: see _explain

    def _failed(self) -> bool:
        """Return whether any rank has reported."""
        last = self._key("last")
        return self._store.check([last]) and int(self._store.get(last)) > self._old

    def forget(self) -> None:
        """Ignore the present reports, which an earlier group of this name has left."""
        with suppress(RuntimeError):  # there are stores that cannot
            self._old = self._store.add(self._key("reports"), 0)

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Report to the other ranks what is raised within."""
        try:
            yield
        except RankError:
            self._attempt += 1
            raise
        except BaseException as error:  # the end of the program too
            self._report(f"{type(error).__name__}: {error}")
            self._attempt += 1
            raise

    # -- collectives ------------------------------------------------------------------

    def wait(self, work: Any, doing: str, layers: Sequence[str] = ()) -> None:
        """Wait for a collective.

        Raises:
            RankError: If it fails, naming the ranks that did not take part.
        """
        with self.collective(doing, layers):
            while not self._arrived(work):
                pass

    def gather(self, value: Any, group: Any, doing: str) -> list[Any]:
        """Return what every rank of a group passed, by rank.

        Unlike ``all_gather_object`` it looks meanwhile whether another rank has failed,
        so that all ranks report within a moment of each other.

        Raises:
            RankError: If it fails, naming the ranks that did not take part.
        """
        data = bytearray(pickle.dumps(value))
        own = torch.frombuffer(data, dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(own)], device=self.device)
        sizes = self._gathered(size, group, doing)
        padded = own.new_zeros(max(int(n) for n in sizes))
        padded[: len(own)] = own
        every = self._gathered(padded, group, doing)
        pairs = zip(every, sizes, strict=True)
        return [pickle.loads(t[: int(n)].cpu().numpy().tobytes()) for t, n in pairs]

    def _gathered(self, tensor: Tensor, group: Any, doing: str) -> list[Tensor]:
        every = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.collective(doing):
            work = dist.all_gather(every, tensor, group=group, async_op=True)
        self.wait(work, doing)
        return every

    def watch(self, sums: Sequence[Sum], layers: Sequence[str], seconds: float) -> None:
        """Wait for sums that a backward pass has sent, ``seconds`` at most.

        Raises:
            RankError: If they fail, naming the ranks that did not take part.
        """
        end = time.monotonic() + seconds
        with self.collective("ending the backward pass", layers):
            for sum_ in sums:
                while not self._arrived(sum_.work) and time.monotonic() < end:
                    pass

    def _arrived(self, work: Any) -> bool:
        """Wait a moment and return whether a collective has ended.

        Raises:
            RuntimeError: If it has failed, or another rank has.
        """
        if self.device.type != "cpu":  # there, waiting only orders streams
            work.wait()
            return True
        try:
            work.wait(LOOK)
        except RuntimeError:
            if work.is_completed() or self._failed():
                raise
            return False
        return True

    @contextmanager
    def collective(self, doing: str, layers: Sequence[str] = ()) -> Iterator[None]:
        """Raise a :class:`RankError` where a collective within fails."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise self._explain(doing, layers, error) from error

    def _explain(
        self, doing: str, layers: Sequence[str], error: RuntimeError
    ) -> RankError:
        """Report, and return an error that names the ranks that were the cause."""
        what = (
            f"step {self.step}: {doing}{_of_layers(layers)} failed on rank {self.rank}"
        )
        self._report(None)
        try:
            reports = self._reports()
        except RuntimeError:
            return RankError(
                f"{what}: torch.distributed's store does not answer, the process that "
                f"hosts it (as a rule rank 0) has ended. Cause: {error}"
            )
        raised = [
            f"rank {rank} raised {cause} (at its step {step})"
            for rank, (step, cause) in sorted(reports.items())
            if cause is not None
        ]
        silent = [rank for rank in range(self.size) if rank not in reports]
        if silent:
            named = "rank" if len(silent) == 1 else "ranks"
            raised.append(
                f"{named} {', '.join(map(str, silent))} took no part and did not "
                "report: ended, stuck, without data, or a step behind or ahead"
            )
        return RankError(
            f"{what}: {'; '.join(raised) or WAITED}. All ranks call step() equally "
            "often (torch.distributed.algorithms.Join for unequal "
            f"numbers of batches); restart from a checkpoint. Cause: {error}"
        )

    def _reports(self) -> dict[int, tuple[int, str | None]]:
        """Return the reports by rank, once all have reported or time is over."""
        reports: dict[int, tuple[int, str | None]] = {}
        end = time.monotonic() + GRACE
        while True:
            for rank in range(self.size):
                if rank not in reports and self._store.check([self._key(rank)]):
                    step, cause, now = json.loads(self._store.get(self._key(rank)))
                    if now > self._old:
                        reports[rank] = step, cause
            if len(reports) == self.size or time.monotonic() > end:
                return reports
            time.sleep(0.05)


def _of_layers(names: Sequence[str]) -> str:
    """Return ``" of layers ..."`` for an error."""
    unique = list(dict.fromkeys(names))
    plural = "s" if len(unique) > 1 else ""
    return f" of layer{plural} {listed(unique)}" if unique else ""


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
        # A second group of all ranks: collectives of a backward pass must not come
        # between other collectives, which have an order of their own.
        self.aside = self._new_group(range(self.size))
        name = self.group.group_name
        self.failures = Failures(name, self.rank, self.size, device)
        self.keep_bases = False

    def _subgroup(self, members: tuple[int, ...]) -> Any:
        """Return the group of some ranks; every rank is in one such subset."""
        if len(members) in (1, self.size):
            return self.group
        return self._new_group(members)

    def _new_group(self, members: Iterable[int]) -> Any:
        """Return a group with the backend and the time limit of the user's own."""
        parent: Any = dist.group.WORLD if self.parent is None else self.parent
        self.limit = parent._get_backend(self.device).options._timeout
        return dist.new_group(
            [self._global(rank) for rank in members],
            timeout=self.limit,
            backend=dist.get_backend_config(self.parent),
            use_local_synchronization=True,
        )

    def _global(self, rank: int) -> int:
        if self.parent is None:
            return rank
        return dist.get_global_rank(self.parent, rank)

    def members(self) -> list[int]:
        """Return the ranks' numbers among all processes, sorted."""
        return sorted(self._global(rank) for rank in range(self.size))

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return itself: copies of an optimizer train in the same group."""
        return self

    def __str__(self) -> str:
        """Return their number, for errors."""
        return f"{self.size} ranks"

    # -- who has what -----------------------------------------------------------------

    def extend(self, blocks: Sequence[Block], rank: float | None) -> None:
        """Assign the layers of more blocks; ``rank``: as for :class:`ekfac.EKFAC`."""
        self.assignment.extend({b.name: cost_of(b, rank) for b in blocks})

    def owner(self, name: str) -> int | None:
        """Return the rank that alone needs a layer's factors, ``None`` if all do."""
        return self.assignment.owners[name] if self.assignment.divided else None

    def held(self, name: str) -> Placement:
        """Return the parts of a layer that this rank stores."""
        if not self.assignment.divided:
            return EVERYTHING
        works = self.assignment.works(name)
        owns = self.assignment.owns(name)
        return Placement(owns, works or self.keep_bases, works, works)

    # -- collectives ------------------------------------------------------------------

    def total(self, values: Tensor, doing: str, layers: Sequence[str] = ()) -> Tensor:
        """Return ``values`` summed over the ranks, in place.

        Errors say what it was ``doing``, and for which layers.
        """
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
        return self.failures.gather(value, self.group, "comparing the ranks")

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
        for begun in [self.begin_sum(b, self.group) for b in buckets(kinds)]:
            self.end_sum_(begun)

    def begin_sum(self, terms: Sequence[Term], group: Any) -> Sum:
        """Begin to sum terms for one owner and of one type, as one buffer.

        Without terms the buffer is one number, which shows that this rank lives.
        """
        packed = [term.pack() for term in terms]
        alive = torch.zeros(1, dtype=torch.uint8, device=self.device)
        flat = torch.cat(packed or [alive])
        owner = terms[0].owner if terms else None
        layers = [term.layer for term in terms]
        with self.failures.collective("summing statistics", layers):
            if owner is None:
                work = dist.all_reduce(flat, group=group, async_op=True)
            else:
                to = self._global(owner)
                work = dist.reduce(flat, to, group=group, async_op=True)
        return Sum(work, flat, terms)

    def end_sum_(self, begun: Sum) -> None:
        """Wait for a sum and overwrite its terms, if they are for this rank."""
        self.failures.wait(begun.work, "summing statistics", begun.layers())
        if begun.terms and begun.terms[0].owner in (None, self.rank):
            parts = begun.flat.split([term.size() for term in begun.terms])
            for term, part in zip(begun.terms, parts, strict=True):
                term.unpack_(part)

    def exchange_(
        self, batches: Sequence[tuple[int, str, Sequence[Tensor]]], group: Any
    ) -> None:
        """Broadcast tensors: overwrite them by those of the rank they are listed with.

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
    """Return the items of each buffer, in the order in which buffers become full.

    Items come with their kind, the same for all of a buffer, and their number of
    elements.
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
