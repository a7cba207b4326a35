"""Rows of a layer by the example that each belongs to: said, found, or unknown.

Per-example scalings, exact blocks and "reduce" sum the rows ``[n, s]`` of one example
before they square. Which rows those are is known in one of three ways: the model's
author says it (:func:`rows_of_examples`), a probe of the graph finds it (:func:`found`,
for gradients multiplied by another power of two at every example), or the first two
dimensions are what they look like (:func:`by_shape`), which the probe confirms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from ekfac.errors import CaptureError

# An index of each row's example, or: the rows hold the sum over all examples.
Examples = Tensor | Literal["summed"]

_said: ContextVar[Tensor | None] = ContextVar("rows_of_examples", default=None)

# A probe multiplies by 2^-4 to 2^3, exact in every precision: one digit of an index.
BASE, SMALLEST = 8, -4
# Share of a gradient's square that may be that of other examples, by rounding; and
# beyond which rows are not those of an example even approximately (batch statistics).
EXACT, APPROXIMATE = 1e-4, 0.5


@contextmanager
def rows_of_examples(index: Tensor) -> Iterator[None]:
    """Say which example each row belongs to, in layers called inside the block.

    For models whose layers see rows that are packed, routed or of graphs::

        def forward(self, x, batch):                     # x: [nodes, d]
            with ekfac.rows_of_examples(batch):          # batch: [nodes]
                x = torch.relu(self.lin1(x))

    Without it the rows' examples are found by going back through the graph, a few times
    more than for the gradient, where something depends on them.

    Args:
        index: ``[n]`` or ``[n, s]``, integers: the example, by its place in the model's
            output, of each row (and position) of the layers' inputs; -1 for none.

    Raises:
        TypeError: If it is no tensor of integers.
    """
    if not isinstance(index, Tensor) or index.is_floating_point():
        found = f"a {index.dtype} tensor" if isinstance(index, Tensor) else repr(index)
        raise TypeError(
            f"index must be a tensor of integers, one per row, got {found}."
        )
    token = _said.set(index.detach())
    try:
        yield
    finally:
        _said.reset(token)


def said() -> Tensor | None:
    """Return the index of the block of :func:`rows_of_examples` that is open."""
    return _said.get()


def by_shape(n: int, s: int, size: int) -> Tensor | None:
    """Return the index ``[n, s]`` that the shape suggests, ``None`` for no example.

    Rows are examples, positions are, or rows are examples times positions.
    """
    rows = torch.arange(n).unsqueeze(1).expand(n, s)
    if n == size:
        return rows
    if s == size:
        return torch.arange(s).expand(n, s)
    return rows // (n // size) if n and n % size == 0 else None


def probe_multipliers(size: int) -> Tensor:
    """Return powers of two, ``[digits, size]``: another column for every example."""
    digits, count = 1, BASE
    while count < size:
        digits, count = digits + 1, count * BASE
    index, step = torch.arange(size), _step(size)
    exponents = [
        index // BASE**digit % BASE * step + SMALLEST for digit in range(digits)
    ]
    return torch.stack(exponents).double().exp2()


def _step(size: int) -> int:
    """Return the distance of two digits' exponents: the wider, the fewer there are."""
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
        tolerance: Share of what reaches the rows that may be other examples', through
            batch statistics, if the shape is to be right.
    """
    n, s = plain.shape[:2]
    base = _flat(plain)
    squares = base.square().sum(dim=1)
    index, wrong = torch.zeros(n * s, dtype=torch.long), torch.zeros(())
    expected, away = by_shape(n, s, size), torch.zeros(())
    factors, step = probe_multipliers(size), _step(size)
    for digit, other in enumerate(multiplied):
        rows = _flat(other)
        ratio = (rows * base).sum(dim=1) / squares.clamp(min=1e-300)
        value = ((ratio.clamp(min=1e-30).log2() - SMALLEST) / step).round()
        value = value.clamp(0, BASE - 1)
        index += (value.long() * BASE**digit).cpu()
        total = rows.square().sum().clamp(min=1e-300)
        rest = rows - (value * step + SMALLEST).exp2().unsqueeze(1) * base
        wrong = torch.maximum(wrong, (rest.square().sum() / total).cpu())
        if expected is not None:
            likely = factors[digit][expected.reshape(-1)].to(base).unsqueeze(1)
            rest = rows - likely * base
            away = torch.maximum(away, (rest.square().sum() / total).cpu())
    silent = (squares == 0).cpu()
    if not bool(torch.isfinite(wrong)) or not bool(torch.isfinite(away)):
        return None
    if expected is not None and bool(away <= EXACT):
        return None
    index = index.masked_fill(silent, -1)
    if bool(wrong <= EXACT) and bool((index < size).all()):
        return _completed(index.reshape(n, s), size)
    if expected is not None and bool(away <= tolerance):
        return None
    return "summed"


def _completed(index: Tensor, size: int) -> Tensor:
    """Return an index with rows that have no gradient where a regular one has them."""
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


def spread(index: Tensor, n: int, s: int, layer: str, size: int | None) -> Tensor:
    """Return an index that somebody gave as ``[n, s]``.

    Args:
        index: ``[n]``, or ``n s`` in any shape.
        n: Rows.
        s: Positions.
        layer: The layer's name, for errors.
        size: How many examples there are, if known.

    Raises:
        CaptureError: If it does not fit.
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
            f"and the model's output has {size} examples."
        )
    return index


def arranged(
    tensors: Sequence[Tensor], index: Tensor, size: int
) -> tuple[list[Tensor], Tensor]:
    """Return tensors ``[n, s, *]`` as ``[size, S, *]``, and which entries are rows.

    Args:
        tensors: Of the same rows.
        index: Their examples, ``[n, s]``; rows of -1 are left out.
        size: How many examples there are.
    """
    flat = index.reshape(-1).to(tensors[0].device)
    kept = (flat >= 0).nonzero().squeeze(1)
    order = kept[flat[kept].argsort(stable=True)]
    example = flat[order]
    counts = torch.bincount(example, minlength=size)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(order), device=flat.device) - starts[example]
    width = max(int(counts.max()), 1) if len(order) else 1
    rows = torch.zeros(size, width, dtype=torch.bool, device=flat.device)
    rows[example, place] = True
    results = []
    for t in tensors:
        out = t.new_zeros(size, width, *t.shape[2:])
        out[example, place] = t.reshape(-1, *t.shape[2:])[order]
        results.append(out)
    return results, rows
