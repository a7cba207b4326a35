"""Calls of layers: their records, who receives them, and the example of each row.

Per-example scalings, exact blocks and "reduce" sum the rows ``[n, s]`` of one example
before they square. Which rows those are is known in one of three ways: the model's
author says it (:func:`rows_of_examples`), a probe of the graph finds it (:func:`found`,
for gradients multiplied by another power of two at every example), or the first two
dimensions are what they look like (:func:`by_shape`), which the probe confirms.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ekfac.errors import CaptureError, warn_outside
from ekfac.layers import Block, Use
from ekfac.layers.base import type_name
from ekfac.layers.blocks import shortened
from ekfac.likelihoods import TargetMask

# An index of each row's example, or: the rows hold the sum over all examples.
Examples = Tensor | Literal["summed"]


@dataclass(eq=False)
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        block: Its block.
        use: Which of the modules that share the block's weight was called.
        inputs: What it was called with.
        version: How often the inputs had been changed in place by then.
        edge: Where the gradient of the output arrives in the graph, if it is needed.
        shape: Shape of the output; ``None`` for a nested tensor.
        leaf: The node that adds to the weight's ``.grad``; ``None``: not known.
        rearrange: From the output's gradient to the layer's own.
        examples: Which example each row belongs to; ``None``: as the shape says.
    """

    block: Block
    use: Use
    inputs: Tensor
    version: int
    edge: GradientEdge | None
    shape: torch.Size | None
    leaf: Node | None
    rearrange: Callable[[Tensor], Tensor] | None = None
    examples: Examples | None = None

    def own(self, grad: Tensor) -> Tensor:
        """Return the layer's own gradient from the one that arrived at its edge."""
        grad = grad if self.shape is None else grad.reshape(self.shape)
        return grad if self.rearrange is None else self.rearrange(grad)


class LayerCall(NamedTuple):
    """A call of a layer with the gradient that its backward brought.

    Attributes:
        use: The module.
        inputs: Its input.
        grads: Gradient of its output.
        examples: Which example each row belongs to; ``None``: as the shape says.
    """

    use: Use
    inputs: Tensor
    grads: Tensor
    examples: Examples | None = None


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of the root module, and what its backward has brought so far.

    Attributes:
        calls: The layers' calls, by block.
        arrived: The calls whose output gradient has arrived, with it.
        terms: Which targets count, known when the loss's gradient arrives.
        averaged: The backward pass averages gradients over ranks.
        size: How many examples the root's output has, or its input where the output
            has none (a loss); 0: not known, of layers that are called without the root.
        watched: The gradient of the root's output will be seen. What arrives before it
            (the output of the last layer, other heads) waits for the terms.
        backward_began: A backward pass through it has begun.
        task: Autograd's number of the last backward pass through it.
        once: Its graph allows one backward pass alone: it has selective checkpoints.
        previous: Returns the forward pass before it, if that is still there.
    """

    calls: dict[Block, list[Call]] = field(default_factory=dict)
    arrived: dict[Block, list[tuple[Call, Tensor]]] = field(default_factory=dict)
    terms: TargetMask | None = None
    averaged: bool = False
    size: int = 0
    watched: bool = False
    backward_began: bool = False
    task: int = -1
    once: bool = False
    previous: Callable[[], ForwardPass | None] = field(default=lambda: None)

    def every_call(self) -> list[Call]:
        """Return the calls of all blocks."""
        return [call for calls in self.calls.values() for call in calls]


class RootOutput(NamedTuple):
    """Output of the root module in a forward pass, for when the loss reaches it.

    Attributes:
        current: The forward pass.
        values: The output, detached.
        version: How often the output had been changed in place by then.
        edges: Of calls whose rows' examples matter; ``None`` for the root's own.
        nr: Which output of its node the gradient arrives at.
    """

    current: ForwardPass
    values: Tensor
    version: int
    edges: dict[Call, GradientEdge | None]
    nr: int = 0

    def held_at(self, edge: GradientEdge) -> RootOutput:
        """Return it for a hook at an edge of the root's output.

        A hook that held its own node would make a cycle that the garbage collector
        cannot see.
        """
        edges = {
            call: None if its is None or its.node is edge.node else its
            for call, its in self.edges.items()
        }
        return self._replace(edges=edges, nr=edge.output_nr)


@dataclass(eq=False)
class PassState(threading.local):
    """State of a thread's forward pass; threads that evaluate the model have their own.

    Attributes:
        current: The pass of the root module that is running.
        orphans: Calls outside a call of the root. Only their graph keeps them alive.
        last: The pass of the root that ended last. Only its graph keeps it alive.
        depth: How many calls of the root are running.
        paused: How many times the capture is paused.
        taps: Watchers of uses of weights in the modules that are running.
        reported: Output of a layer that was recorded where it was computed.
        edges: Of calls whose rows' examples matter. Only the hook on the root's output
            holds them: a hook on a layer's own node would keep its graph for ever.
    """

    current: ForwardPass | None = None
    orphans: Callable[[], ForwardPass | None] = field(default=lambda: None)
    last: Callable[[], ForwardPass | None] = field(default=lambda: None)
    depth: int = 0
    paused: int = 0
    taps: dict[int, list[AbstractContextManager[Any]]] = field(default_factory=dict)
    reported: Tensor | None = None
    edges: dict[Call, GradientEdge | None] = field(default_factory=dict)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave this thread's forward passes inside the ``with`` block unrecorded."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1


class Sink(ABC):
    """Receiver of what a capture records; by default the calls of all blocks."""

    @abstractmethod
    def add(
        self,
        block: Block,
        pairs: Sequence[LayerCall],
        terms: TargetMask | None,
        *,
        repeated: bool = False,
    ) -> None:
        """Add the calls of one block in one backward pass.

        A ``repeated`` pass is a further one through the graph of the same calls.
        """

    def begin(self, terms: TargetMask | None, *, averaged: bool) -> bool:
        """Note that a backward pass begins, over targets ``terms``.

        Gradients may be ``averaged`` over ranks in it.

        Returns:
            Whether what was recorded before it has been discarded.
        """
        return False

    def cleared(self) -> bool:
        """Return whether gradients were cleared since the last backward pass."""
        return False

    def miss(self, layer: str, why: str) -> bool:
        """Note that calls of a layer that are not recorded add to ``.grad``.

        Returns:
            Whether what was recorded before has been discarded.
        """
        return False

    def wants(self, block: Block) -> bool:
        """Return whether the current step takes statistics of ``block``."""
        return True

    def separates(self, block: Block) -> bool:
        """Return whether the statistics of ``block`` depend on its rows' examples."""
        return False

    def complete(self, block: Block) -> None:  # noqa: B027  (nothing to do)
        """Note that this backward pass brings nothing more of ``block``."""

    def reject(self) -> None:  # noqa: B027  (nothing to do)
        """Note that there are no pseudo-gradients, since outputs are not finite."""

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that pseudo-gradients are drawn with."""
        return torch.Generator(device)


# -- the example of each row -----------------------------------------------------------

_said: ContextVar[Tensor | None] = ContextVar("rows_of_examples", default=None)

# A probe multiplies by 2^-4 to 2^3, exact in every precision: one digit of an index.
BASE, SMALLEST = 8, -4
# Elements of gradients that are compared in double precision at a time.
COMPARED = 1 << 16
# Share of a gradient's square that other examples may have by rounding, and the share
# beyond which rows do not belong to one example even approximately (batch statistics).
EXACT, APPROXIMATE = 1e-4, 0.5


@contextmanager
def rows_of_examples(index: Tensor) -> Iterator[None]:
    """Say which example each row belongs to, for layers called inside the block.

    It is for models whose layers see rows that are packed, routed, or nodes of graphs::

        def forward(self, x, batch):                     # x: [nodes, d]
            with ekfac.rows_of_examples(batch):          # batch: [nodes]
                x = torch.relu(self.lin1(x))

    Without it a few more backward passes find the rows' examples where something
    depends on them.

    Args:
        index: ``[n]`` or ``[n, s]``, integers: the example, by its place in the model's
            output, of each row (and position) of the layers' inputs; -1 for none.

    Raises:
        TypeError: If it is no tensor of integers.
        CaptureError: At a layer whose rows it does not fit, or if it names an example
            that the model's output lacks.
    """
    is_tensor = isinstance(index, Tensor)
    if not is_tensor or index.dtype == torch.bool or index.dtype.is_floating_point:
        actual = f"a {index.dtype} tensor" if is_tensor else repr(index)
        raise TypeError(
            f"index must be a tensor of integers, one per row, got {actual}."
        )
    token = _said.set(index.detach())
    try:
        yield
    finally:
        _said.reset(token)


def said() -> Tensor | None:
    """Return the index of the innermost :func:`rows_of_examples` that is open."""
    return _said.get()


def by_shape(n: int, s: int, size: int) -> Tensor | None:
    """Return the index ``[n, s]`` that the shape suggests, or ``None``.

    The rows are the examples, or the positions are, or each example has several rows.
    """
    rows = torch.arange(n).unsqueeze(1).expand(n, s)
    if n == size:
        return rows
    if s == size:
        return torch.arange(s).expand(n, s)
    return rows // (n // size) if n and n % size == 0 else None


def probe_multipliers(size: int) -> Tensor:
    """Return powers of two ``[digits, size]``, with a different column per example."""
    digits, count = 1, BASE
    while count < size:
        digits, count = digits + 1, count * BASE
    index, step = torch.arange(size), _step(size)
    exponents = [
        index // BASE**digit % BASE * step + SMALLEST for digit in range(digits)
    ]
    return torch.stack(exponents).double().exp2()


def unlike_multipliers(size: int) -> Tensor:
    """Return factors ``[size]`` from 2^-4 to 2^3, no two alike, in a random order."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    return (SMALLEST + (BASE - 1) * order / max(1, size - 1)).exp2()


def _step(size: int) -> int:
    """Return the distance of two digits' exponents: the fewer digits, the wider."""
    return max(1, (BASE - 1) // max(1, min(size, BASE) - 1))


def found(
    plain: Tensor,
    multiplied: Sequence[Tensor],
    size: int,
    tolerance: float = APPROXIMATE,
) -> Examples | None:
    """Return the rows' examples, ``None`` if they are what :func:`by_shape` says.

    Args:
        plain: Gradients ``[n, s, *]`` of the layer for any gradients of the outputs.
        multiplied: For those times each row of :func:`probe_multipliers`.
        size: How many examples there are.
        tolerance: Share of the rows' gradients that may come from other examples,
            through batch statistics, if the shape is to be right.
    """
    n, s = plain.shape[:2]
    base = _flat(plain)
    squares = base.square().sum(dim=1)
    index, wrong = torch.zeros(n * s, dtype=torch.long), torch.zeros(())
    expected, away, elsewhere = by_shape(n, s, size), torch.zeros(()), torch.zeros(())
    factors, step = probe_multipliers(size), _step(size)
    for digit, other in enumerate(multiplied):
        rows = _flat(other)
        ratio = (rows * base).sum(dim=1) / squares.clamp(min=1e-300)
        value = ((ratio.clamp(min=1e-30).log2() - SMALLEST) / step).round()
        value = value.clamp(0, BASE - 1)
        index += (value.long() * BASE**digit).cpu()
        residual = rows - (value * step + SMALLEST).exp2().unsqueeze(1) * base
        wrong = torch.maximum(wrong, _share(residual, rows))
        if expected is not None:
            likely = factors[digit][expected.reshape(-1)].to(base).unsqueeze(1)
            residual = rows - likely * base
            away = torch.maximum(away, _share(residual, rows))
            # Every row in its own units: examples of small factors count as the others.
            elsewhere = torch.maximum(elsewhere, _share(residual / likely, base))
    silent = (squares == 0).cpu()
    if not bool(torch.isfinite(wrong)) or not bool(torch.isfinite(away)):
        return None
    if expected is not None and bool(elsewhere <= EXACT):
        return None
    index = index.masked_fill(silent, -1)
    if bool(wrong <= EXACT) and bool((index < size).all()):
        return _completed(index.reshape(n, s), size)
    if expected is not None and bool(away <= tolerance):
        return None
    return "summed"


def _share(residual: Tensor, rows: Tensor) -> Tensor:
    """Return the square of ``residual`` over that of ``rows``, on the CPU."""
    return (residual.square().sum() / rows.square().sum().clamp(min=1e-300)).cpu()


def confirmed(plain: Tensor, multiplied: Tensor, size: int) -> bool:
    """Return whether the rows' examples are certainly what :func:`by_shape` says.

    No two examples have the same factor, so that a row of another one shows: its
    gradient is no multiple by the factor that its place says. Examples that change
    places as a whole are found one by one, where they are few among many.

    Args:
        plain: Gradients ``[n, s, *]`` of the layer for any gradients of the outputs.
        multiplied: For those times :func:`unlike_multipliers`.
        size: How many examples there are.
    """
    n, s = plain.shape[:2]
    expected = by_shape(n, s, size)
    if expected is None:
        return False
    index = expected.reshape(-1).to(plain.device)
    factors = unlike_multipliers(size).to(plain.device)[index].unsqueeze(1)
    base, rows = plain.reshape(n * s, -1), multiplied.reshape(n * s, -1)
    step = max(1, COMPARED // max(1, base.shape[1]))
    sums = factors.new_zeros(3, size)
    for start in range(0, n * s, step):
        part = slice(start, start + step)
        a, b = base[part].double(), rows[part].double() / factors[part]
        own = a.square().sum(1), (a * b).sum(1), (b - a).square().sum(1)
        sums.index_add_(1, index[part], torch.stack(own))
    squares, products, residuals = sums
    if not bool(sums.isfinite().all()):
        return True  # no gradient that is multiplied would say more
    share = residuals.sum() / squares.sum().clamp(min=1e-300)
    # A quarter of the way to the nearest factor of another example.
    apart = 2 ** ((BASE - 1) / max(1, size - 1)) - 1
    away = (products - squares).abs() > apart / 4 * squares
    return bool(share <= EXACT) and not bool(away.any())


def _completed(index: Tensor, size: int) -> Tensor:
    """Return the regular index that an index agrees with, else the index.

    Rows without a gradient (-1) agree with any.
    """
    n, s = index.shape
    rows, positions = torch.arange(n).unsqueeze(1), torch.arange(s)
    regular = [rows % size + 0 * positions] if n % size == 0 else []
    if s % size == 0:
        regular += [positions % size + 0 * rows, positions // (s // size) + 0 * rows]
    for candidate in regular:
        if bool(((index == candidate) | (index < 0)).all()):
            return candidate
    return index


def _flat(gradients: Tensor) -> Tensor:
    """Return ``[n s, *]`` in double precision."""
    n, s = gradients.shape[:2]
    return gradients.detach().reshape(n * s, -1).double()


class ExampleFinder:
    """Finds each row's example by extra backward passes, where something depends on it.

    A layer whose first dimension was found to be the examples' is not probed again
    while it alone has their number, or the second has it too and the model computes
    what it computed then; nor is a layer whose rows mix examples.

    Args:
        fisher: Kind of the Fisher matrix; only for ``"empirical"`` different examples'
            signs are not independent.
        separates: Returns whether a block's statistics depend on its rows' examples.
        tolerance: Share of other examples in the rows, see :func:`found`.
    """

    def __init__(
        self,
        fisher: str,
        separates: Callable[[Block], bool],
        tolerance: float,
    ) -> None:
        self._fisher, self._separates = fisher, separates
        self._tolerance = tolerance
        # Layers whose first dimension was found to be the examples'.
        self._regular: set[tuple[str, int]] = set()
        # The same of passes in which the second dimension has their number as well: the
        # model's operations, and names and inputs' shapes of the calls, in order.
        self._square: set[Hashable] = set()
        # Layers in whose rows examples meet, with the inputs' shape and the batch size.
        self._mixing: set[tuple[str, torch.Size, int]] = set()
        self._warned: set[str] = set()  # types of layers, and what is wrong with them

    def undecided(self, calls: Iterable[Call], terms: TargetMask | None) -> list[Call]:
        """Return the calls whose rows' examples matter and are not known.

        They matter for ignored targets in any case.
        """
        unknown, size = [], -1 if terms is None else terms.size
        for call in calls:
            if call.examples is not None:
                continue
            if (call.use.name, call.inputs.shape, size) in self._mixing:
                call.examples = "summed"
            elif not self.is_regular(call, size):
                unknown.append(call)
        if terms and terms.mask is not None and not bool(terms.mask.all()):
            return unknown
        return [call for call in unknown if self._separates(call.block)]

    def is_regular(self, call: Call, size: int) -> bool:
        """Return whether the call's first dimension is known to be the examples'."""
        key = (call.use.name, call.inputs.dim())
        return key in self._regular and _first_is(call, size)

    def unknown(
        self, calls: Iterable[Call], root: GradientEdge, size: int
    ) -> tuple[list[Call], Hashable]:
        """Return the calls to probe, and what :meth:`find` knows them by.

        The others are square, ``[size, size, ...]``, and the pass is one of operations
        that were probed: their first dimension is the examples'.
        """
        calls = list(calls)
        square = _square(calls, size)
        if not square:
            return calls, None
        named = tuple((call.use.name, call.inputs.shape) for call in square)
        key = (_operations(root.node), named)
        if key in self._square:
            return [call for call in calls if call not in square], None
        return calls, key

    def find(
        self,
        calls: Sequence[Call],
        send: Callable[[Sequence[Call], Tensor], Sequence[Tensor | None]],
        outputs: Tensor,
        key: Hashable = None,
    ) -> None:
        """Find the example of each row of some calls.

        Where the shape suggests them one backward pass confirms it. Each further pass
        tells a digit of the others' indices.

        Args:
            calls: The calls.
            send: Returns the gradients that arrive at calls for one of the outputs.
            outputs: Of the model, ``[N, *]``.
            key: Of square calls, from :meth:`unknown`.
        """
        size = len(outputs)
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(outputs.shape, generator=generator).double()

        def arriving(calls: Sequence[Call], factors: Tensor) -> dict[Call, Tensor]:
            """Return the layers' gradients for those of the outputs times factors."""
            factors = factors.reshape(-1, *[1] * (h.dim() - 1))
            grads = send(calls, (h * factors).to(outputs))
            return {
                call: call.use.adapter.output_gradients(call.own(grad))
                for call, grad in zip(calls, grads, strict=True)
                if grad is not None and grad.numel()  # as of an expert without rows
            }

        plain = arriving(calls, torch.ones(size))
        every = [plain]
        examples: dict[Call, Examples | None] = {}
        if size > BASE:
            likely = [
                call
                for call, grads in plain.items()
                if by_shape(grads.shape[0], grads.shape[1], size) is not None
            ]
            once = arriving(likely, unlike_multipliers(size)) if likely else {}
            examples = {c: None for c in once if confirmed(plain[c], once[c], size)}
            every.append(once)
        others = [call for call in plain if call not in examples]
        passes = probe_multipliers(size) if others else ()
        digits = [arriving(others, factors) for factors in passes]
        every += digits
        for call in others:
            multiplied = [grads[call] for grads in digits]
            examples[call] = found(plain[call], multiplied, size, self._tolerance)
        self._note(examples, size)
        if key is not None and all(
            call in examples
            and examples[call] is None
            and all(_tells(grads[call]) for grads in every if call in grads)
            for call in _square(calls, size)
        ):
            self._square.add(key)

    def _note(self, examples: Mapping[Call, Examples | None], size: int) -> None:
        """Note what was found of calls, and warn of those that mix examples."""
        mixed = []
        for call, its in examples.items():
            call.examples = its
            if its is None and _first_is(call, size):
                self._regular.add((call.use.name, call.inputs.dim()))
            elif isinstance(its, str):
                self._mixing.add((call.use.name, call.inputs.shape, size))
                mixed.append(call)
        self._warn(mixed, "each of them depends on several examples")

    def take_by_shape(self, calls: Iterable[Call], size: int, why: str) -> None:
        """Warn of calls whose rows' examples are neither known nor in the shape.

        The warning says ``why`` they cannot be found. A size of 0 is not known.
        """
        self._warn([call for call in calls if call.inputs.shape[:1] != (size,)], why)

    def _warn(self, calls: Iterable[Call], why: str) -> None:
        """Warn, once for a type of layer, that rows cannot be told apart by examples.

        Sampled and exact gradients have independent signs: the square of their sum is,
        on average, the sum of their squares.
        """
        groups: dict[str, list[str]] = {}
        for call in calls if self._fisher == "empirical" else ():
            kind = type_name(call.use.adapter.module)
            if self._separates(call.block) and f"{kind} {why}" not in self._warned:
                groups.setdefault(kind, []).append(call.use.name)
        self._warned |= {f"{kind} {why}" for kind in groups}
        lines = [
            f"\n  {shortened(list(dict.fromkeys(names)))} ({kind})"
            for kind, names in groups.items()
        ]
        if lines:
            warn_outside(
                f"Which example the rows of layers belong to is unknown: {why}. What "
                "needs it (scaling='per_example', sharing='reduce', blocks of norms) "
                "is taken by shape or over the whole batch. Say it with "
                "ekfac.rows_of_examples(index), or use fisher='mc' or "
                f"scaling='running_average'.{''.join(lines)}"
            )


# What nodes that exchange dimensions have saved of them.
EXCHANGED = ("_saved_dim0", "_saved_dim1", "_saved_dims")


def _operations(root: Node) -> int:
    """Return a hash of the operations behind a node, in order.

    It is equal for graphs of the same operations that exchange the same dimensions.
    """
    seen, pending, found = {root}, [root], []
    while pending:
        node = pending.pop()
        found.append((node.name(), *(getattr(node, key, None) for key in EXCHANGED)))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return hash(tuple(found))


def _square(calls: Iterable[Call], size: int) -> list[Call]:
    """Return the calls whose first two dimensions both have the size of the batch."""
    return [call for call in calls if call.inputs.shape[:2] == (size, size)]


def _tells(gradients: Tensor) -> bool:
    """Return whether every row ``[n, s]`` has a finite gradient that is not zero.

    Others say nothing of where examples are: those behind a head of zeros, or of a pass
    that overflows.
    """
    squares = _flat(gradients).square().sum(dim=1)
    return bool(((squares > 0) & squares.isfinite()).all())


def _first_is(call: Call, size: int) -> bool:
    """Return whether only the first of two dimensions has the size of the batch."""
    shape = call.inputs.shape
    return shape[:1] == (size,) and shape[1:2] != (size,)


def is_one_example(outputs: Tensor, calls: Iterable[Iterable[Call]]) -> bool:
    """Return whether a model was called on one example without a batch dimension.

    Its outputs ``[C]`` are then one example's: some layer saw a vector, and none saw
    ``C`` vectors.
    """
    if outputs.dim() != 1 or len(outputs) == 1:
        return False
    inputs = [call.inputs for group in calls for call in group]
    vectors = [x for x in inputs if x.is_floating_point() and x.dim() < 3]
    batched = any(x.dim() == 2 and len(x) == len(outputs) for x in vectors)
    return not batched and any(x.dim() == 1 for x in vectors)


def spread(index: Tensor, n: int, s: int, layer: str, size: int | None) -> Tensor:
    """Return a user's index as ``[n, s]``.

    Args:
        index: ``n`` entries, or ``n s`` of them in any shape.
        n: Number of rows.
        s: Number of positions.
        layer: The layer's name, for errors.
        size: Number of examples, if known.

    Raises:
        CaptureError: If it has another number of entries, or names another example.
    """
    if index.numel() == n:
        index = index.reshape(n, 1).expand(n, s)
    elif index.numel() == n * s:
        index = index.reshape(n, s)
    else:
        raise CaptureError(
            f"rows_of_examples was given {list(index.shape)}, and layer {layer!r} has "
            f"{n} rows of {s} positions; give one example for each row, or leave the "
            "layer outside of the block."
        )
    if size is not None and index.numel() and int(index.max()) >= size:
        raise CaptureError(
            f"rows_of_examples names example {int(index.max())} for layer {layer!r}, "
            f"and the model's output has {size} examples; number them from 0 by their "
            "place in the output."
        )
    return index


def arranged(
    tensors: Sequence[Tensor], index: Tensor, size: int
) -> tuple[list[Tensor], Tensor]:
    """Return tensors ``[n, s, *]`` as ``[size, S, *]``, and where these have rows.

    Args:
        tensors: Of the same rows.
        index: The rows' examples, ``[n, s]``; rows of -1 are left out.
        size: Number of examples.
    """
    flat = index.reshape(-1).to(tensors[0].device)
    assigned = (flat >= 0).nonzero().squeeze(1)
    order = assigned[flat[assigned].argsort(stable=True)]
    example = flat[order]
    counts = torch.bincount(example, minlength=size)
    starts = counts.cumsum(0) - counts
    position = torch.arange(len(order), device=flat.device) - starts[example]
    width = max(int(counts.max()), 1) if len(order) else 1
    rows = torch.zeros(size, width, dtype=torch.bool, device=flat.device)
    rows[example, position] = True
    results = []
    for t in tensors:
        out = t.new_zeros(size, width, *t.shape[2:])
        out[example, position] = t.reshape(-1, *t.shape[2:])[order]
        results.append(out)
    return results, rows
