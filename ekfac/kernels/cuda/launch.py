"""Launches: their parameters, their split over blocks, and passes over elements."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac.kernels.cuda.choice import bucket
from ekfac.kernels.cuda.compiler import Variant

Item = TypeVar("Item")
Key = TypeVar("Key")
Field = tuple[str, type]


def fields(kind: type, names: str) -> list[Field]:
    """Return fields of one type, of a space-separated list of names."""
    return [(name, kind) for name in names.split()]


# A problem's place among the pieces of work of its launch, and its factors.
WORK = [*fields(c_int, "first first_tile"), *fields(c_float, "alpha beta")]


@cache
def table(
    problem: type[ctypes.Structure],
    limit: int,
    before: tuple[Field, ...] = (),
) -> type[ctypes.Structure]:
    """Return the type of a kernel's ``Params`` that holds up to ``limit`` problems.

    Args:
        problem: Type of one problem.
        limit: How many there can be.
        before: The kernel's own fields before the pointer ``parts``.
    """
    lead = [("count", c_int), ("padding", c_int), *before, ("parts", c_void_p)]
    columns = [*lead, ("problem", problem * limit)]
    return type(f"{problem.__name__}s", (ctypes.Structure,), {"_fields_": columns})


def fill(
    problems: Sequence[ctypes.Structure],
    limit: int,
    before: tuple[Field, ...] = (),
    **values: object,
) -> ctypes.Structure:
    """Return the parameters of one launch.

    Args:
        problems: At least one and at most ``limit``, of one type.
        limit: How many there could be.
        before: The kernel's own fields before ``parts``, see :func:`table`.
        **values: Of all fields but the count and the problems.
    """
    kind = type(problems[0])
    params = table(kind, limit, before)(count=len(problems), **values)
    params.problem[: len(problems)] = list(problems)
    return params


# Blocks of threads that a multiprocessor runs at the same time.
RESIDENT = 2
# Waves of blocks that splitting may add: each block leaves a part in memory.
MORE = 4
# Steps of a sum that take as long as starting and ending a part of it.
STARTING = 8
# Steps of a sum below which splitting it costs more than it gains.
MIN_STEPS = 16
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One kernel call, ready to go.

    Attributes:
        variant: What must be loaded.
        kernel: The function's name.
        params: Its argument.
        grid: Blocks of threads.
        threads: Threads of a block.
        shared: Bytes of dynamic shared memory.
        keep: Tensors that it touches; they live until the call is on the stream.
        scratch: Those of ``keep`` that hold no value before the first launch.
    """

    variant: Variant
    kernel: str
    params: ctypes.Structure
    grid: int
    threads: int
    shared: int = 0
    keep: Sequence[Tensor] = field(default=(), repr=False)
    scratch: Sequence[Tensor] = field(default=(), repr=False)


class Engine(Protocol):
    """Runs kernels on tensors of one device.

    Attributes:
        device: Where the tensors are.
        multiprocessors: How many blocks of threads run at a time, about.
        problems: Layers of one launch.
        shared: Bytes of shared memory that a block may have.
        warpgroups: Whether variants with products of warpgroups are to be used.
    """

    device: torch.device
    multiprocessors: int
    problems: int
    shared: int
    warpgroups: bool

    def load(self, variant: Variant) -> None:
        """Make a variant ready to be launched."""

    def launch(self, call: Launch) -> None:
        """Run a kernel of a loaded variant on the current stream."""


class WithoutWarpgroups:
    """An engine that is not asked for variants with products of warpgroups.

    Args:
        engine: Loads and runs the variants.
    """

    warpgroups = False

    def __init__(self, engine: Engine) -> None:
        self.device = engine.device
        self.multiprocessors = engine.multiprocessors
        self.problems = engine.problems
        self.shared = engine.shared
        self.load, self.launch = engine.load, engine.launch


def execute(engine: Engine, launches: Sequence[Launch]) -> None:
    """Run loaded launches in order."""
    for launch in launches:
        engine.launch(launch)


def split_sums(
    engine: Engine,
    tiles: Sequence[int],
    steps: Sequence[int],
    least: int = MIN_STEPS,
    resident: int = RESIDENT,
) -> list[tuple[int, int]]:
    """Return for each problem how many parts its sums are split into, and their steps.

    Blocks of threads come in waves, as many at a time as the device is at: of all
    lengths of a part, that is taken which has the last wave done first. The shortest
    part has ``least`` steps.
    """
    slots = engine.multiprocessors * resident
    return list(_split(slots, tuple(tiles), tuple(steps), least))


@lru_cache(maxsize=256)
def _split(
    slots: int, tiles: tuple[int, ...], steps: tuple[int, ...], least: int
) -> tuple[tuple[int, int], ...]:
    """Do what :func:`split_sums` says, for blocks that run ``slots`` at a time."""
    longest = max(steps, default=1)
    most = sum(tiles) + MORE * slots
    lengths = {
        -(-longest // parts) for parts in range(1, min(longest // least, most) + 1)
    }

    def duration(length: int) -> tuple[bool, int, int]:
        parts = sum(t * -(-s // length) for t, s in zip(tiles, steps, strict=True))
        waves = -(-parts // slots)
        return parts > most, waves * (min(length, longest) + STARTING), parts

    length = min(sorted(lengths), key=duration, default=max(1, longest))
    counts = [max(1, -(-s // length)) for s in steps]
    return tuple((n, max(1, -(-s // n))) for n, s in zip(counts, steps, strict=True))


def grouped(
    engine: Engine, items: Iterable[Item], choice: Callable[[Item], Key]
) -> Iterator[tuple[Key, list[Item]]]:
    """Yield what items have in common, with as many of them as one launch takes."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(choice(item), []).append(item)
    for key, members in groups.items():
        for start in range(0, len(members), engine.problems):
            yield key, members[start : start + engine.problems]


def steps_of(tensor: Tensor) -> list[int]:
    """Return the strides, zero for dimensions of size one."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride if size > 1 else 0 for size, stride in pairs]


def weight_of(weight: Tensor | None) -> Tensor | None:
    """Return weights ``[N, S]`` as the kernels read them."""
    return None if weight is None else weight.float().contiguous()


def readable(tensor: Tensor, *shape: int) -> bool:
    """Return whether a kernel can read it: float32, of this shape, dense rows."""
    dense = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    return tensor.dtype == torch.float32 and tuple(tensor.shape) == shape and dense


def writable(out: Tensor, *shape: int) -> bool:
    """Return whether a kernel can write it: readable, and no element twice."""
    pairs = zip(out.shape, out.stride(), strict=True)
    return readable(out, *shape) and all(n == 1 or stride for n, stride in pairs)


def pointer(tensor: Tensor | None) -> int:
    """Return the address of a tensor's first element, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


# -- passes over elements --------------------------------------------------------------


SHARE = 4096  # elements of a piece of work


class MapLayer:
    """One layer of a launch that maps a tensor in place, given another and numbers.

    Subclasses are dataclasses of the three: what is written, ``[b, d_out, d_in]``, what
    is read, of the same shape, and numbers on the device.

    Attributes:
        source: Name of the kernel's source, without the ending.
        struct: What the kernel is told of a layer.
    """

    source: ClassVar[str]
    struct: ClassVar[type[ctypes.Structure]]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is written, what is read, and numbers."""
        written, read, numbers = vars(self).values()
        return written, read, numbers

    def copied(self) -> Self:
        """Return a layer of which what is written is a copy."""
        written, read, numbers = self.tensors
        return type(self)(written.clone(), read, numbers)  # type: ignore[call-arg]

    def shape_class(self) -> str:
        """Return the class of shapes that the layer is measured in."""
        return str(bucket(self.tensors[0].numel()))

    def supported(self, engine: Engine) -> bool:
        """Return whether the kernel takes it: alike, float32, with dense rows."""
        written, read, numbers = self.tensors
        shape = tuple(written.shape)
        return (
            writable(written, *shape)
            and readable(read, *shape)
            and numbers.dtype == torch.float32
            and numbers.is_contiguous()
            and 0 < written.numel() < INT_MAX // 2
            and written.device == read.device == numbers.device
        )

    @property
    def threads(self) -> int:
        """Threads of a block, which does one piece of work."""
        return 256

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a block."""
        return 0

    def variant(self, problems: int) -> Variant:
        """Return what must be loaded, for launches of up to so many layers."""
        return plain_variant(self.source, problems)

    def work(self, first: int) -> tuple[int, ...]:
        """Return the last fields of a problem, its first piece being ``first``."""
        elements = self.tensors[0].numel()
        return elements, first, -(-elements // SHARE)

    def problem(self, first: int, sums: Tensor) -> Any:
        """Return what the kernel is told: three tensors, where sums go, and strides."""
        written, read, _ = self.tensors
        addresses = map(pointer, (*self.tensors, sums))
        steps = (*written.stride()[:2], *read.stride()[:2])
        return self.struct(*addresses, *steps, *written.shape[1:], *self.work(first))


def plan_map(
    engine: Engine,
    layers: Sequence[MapLayer],
    sums: Tensor,
    before: tuple[Field, ...] = (),
    **values: object,
) -> list[Launch]:
    """Return the launches of one kernel and of what adds up its pieces.

    Args:
        engine: What will run them.
        layers: All supported, of one kernel.
        sums: ``[len(layers), *]``, contiguous, float32; receives each layer's sums.
        before: The kernel's own fields of parameters.
        **values: And what they hold.
    """
    launches: list[Launch] = []
    pairs = zip(layers, sums, strict=True)
    for variant, group in grouped(
        engine, pairs, lambda pair: pair[0].variant(engine.problems)
    ):
        problems: list[Any] = []
        keep: list[Tensor] = [sums]
        first = 0
        for layer, its_sums in group:
            problems.append(layer.problem(first, its_sums))
            keep += layer.tensors
            first += problems[-1].pieces
        each = sums[0].numel()  # sums of a piece, as many as of a layer
        space = torch.empty(each * first, dtype=torch.float32, device=sums.device)
        keep.append(space)
        params = fill(problems, engine.problems, before, parts=pointer(space), **values)
        threads = group[0][0].threads
        shared = max(layer.shared for layer, _ in group)
        name, scratch = variant.source, (space, sums)
        # What has dynamic shared memory has no other; a sum takes a word of a thread.
        finish = 4 * threads if shared else 0
        end = f"{name}_finish"
        launches += (
            Launch(variant, name, params, first, threads, shared, keep, scratch),
            Launch(variant, end, params, len(group), threads, finish, keep),
        )
    return launches


def plain_variant(source: str, problems: int) -> Variant:
    """Return the variant of a source of which there is one: float32, no tiles."""
    return Variant(source, (("PROBLEMS", problems),))
