"""Recorded calls in the normal form ``[N, S, b, d]``, a few examples at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.calls import LayerCall, arranged, spread
from ekfac.layers import Block, find_shortcuts
from ekfac.likelihoods import TargetMask

# Elements of patch matrices that exist at a time.
CHUNK = 1 << 25
# The least examples and rows of a sample of a batch, and rows for each dimension of a
# factor.
EXAMPLES, ROWS, ROWS_PER_DIMENSION = 16, 1024, 4


@dataclass(frozen=True)
class Rows:
    """One use of a block in the normal form.

    Attributes:
        inputs: ``[N, S, b or 1, d_in]``, or indices ``[N, S]``.
        grads: ``[N, S, b, d_out]``.
        weight: ``[N, S]``, zero where a position does not count, or ``None``.
        transposed: Inputs and gradients have changed roles, see :class:`Use`.
    """

    inputs: Tensor
    grads: Tensor
    weight: Tensor | None
    transposed: bool = False

    @property
    def indexed(self) -> bool:
        """Whether the inputs are indices."""
        return self.inputs.dim() == 2

    def count(self) -> Tensor | int:
        """Return how many positions count."""
        if self.weight is None:
            return self.grads.shape[0] * self.grads.shape[1]
        return self.weight.sum()


def _chunks(
    pairs: Sequence[LayerCall], terms: TargetMask | None
) -> Iterator[tuple[Sequence[LayerCall], TargetMask | None]]:
    """Split a call into groups of examples whose patch matrices fit into memory."""
    use, x, grad, index = pairs[0]
    per_example = find_shortcuts(use.adapter).elements_per_example(x)
    if not per_example or len(pairs) > 1 or not len(grad) or index is not None:
        yield pairs, terms
        return
    examples = len(grad) if terms is None else terms.size
    if len(x) != len(grad) or len(grad) % examples:
        yield pairs, terms
        return
    ratio = len(grad) // examples
    step = max(1, CHUNK // (per_example * ratio))
    for start in range(0, examples, step):
        rows = slice(start * ratio, (start + step) * ratio)
        part = terms
        if terms is not None:
            mask = None if terms.mask is None else terms.mask[start : start + step]
            size = min(step, examples - start)
            part = TargetMask(size, terms.examples, terms.terms, mask)
        yield [LayerCall(use, x[rows], grad[rows])], part


def sampled(
    block: Block,
    pairs: Sequence[LayerCall],
    terms: TargetMask | None,
    sharing: str = "expand",
) -> tuple[Sequence[LayerCall], TargetMask | None]:
    """Return every k-th example of a call that has more rows than its factors need.

    The rows of an image or a text are much alike, and the sums over them cost more than
    the layer itself. Gradients are scaled so that sums over these examples estimate
    those over all.

    Returns:
        The calls, or the one with fewer examples, and the targets that go with them.
    """
    use, x, grad, index = pairs[0]
    if terms is None or len(pairs) > 1 or index is not None or block.exact:
        return pairs, terms
    if x.dim() == 0 or not len(x) == len(grad) == terms.size:
        return pairs, terms
    own, d_out, d_in = block.factor_shape
    rows = 1 if sharing == "reduce" else grad[0].numel() // (own * d_out)
    least = max(ROWS, ROWS_PER_DIMENSION * max(d_out, d_in)) / max(1, rows)
    k = int(len(x) // max(EXAMPLES, least))
    if k < 2:
        return pairs, terms
    sample = grad[::k]
    sample = sample * (len(grad) / len(sample)) ** 0.5
    mask = None if terms.mask is None else terms.mask[::k]
    counted = TargetMask(len(sample), terms.examples, terms.terms, mask)
    return [LayerCall(use, x[::k], sample)], counted


def regrouped(t: Tensor, size: int) -> Tensor:
    """Return ``[N', S', ...]`` as ``[size, S, ...]``, with the examples first.

    Rows that are not a multiple of the batch (a position embedding, whose gradient
    arrives summed over it) are taken as positions of one example: the square of a sum
    of independent gradients has the expectation of the sum of squares.
    """
    n, s = t.shape[:2]
    if n == size:
        return t
    if s == size:
        return t.transpose(0, 1)
    if size and n % size == 0:
        return t.reshape(size, n // size * s, *t.shape[2:])
    return t.reshape(1, n * s, *t.shape[2:])


def _counted(rows: Tensor, terms: TargetMask | None) -> Tensor | None:
    """Return the positions ``[N, S]`` with a target that counts or any gradient."""
    if terms is None or terms.mask is None or len(rows) != terms.size:
        return None
    mask = terms.mask
    if mask.shape[1] != rows.shape[1]:
        mask = mask.any(dim=1, keepdim=True)
    return mask | (rows != 0).flatten(2).any(dim=2)


def normal_form(
    pairs: Sequence[LayerCall], terms: TargetMask | None, dtype: torch.dtype
) -> Iterator[list[Rows]]:
    """Yield the calls of one block, a few examples at a time, in the normal form.

    Only calls with as many examples come together: they are those of the same examples.
    """
    for chunk, part in _chunks(pairs, terms):
        uses = [_rows(call, part, dtype) for call in chunk]
        for examples in dict.fromkeys(len(rows.grads) for rows in uses):
            yield [rows for rows in uses if len(rows.grads) == examples]


def _rows(call: LayerCall, terms: TargetMask | None, dtype: torch.dtype) -> Rows:
    """Return one call in the normal form."""
    (use, x, grad, index), adapter = call, call.use.adapter
    exact = adapter.family == "exact"
    if exact and (sums := _row_gradients(call, terms, dtype)) is not None:
        return Rows(sums, sums.new_ones(*sums.shape[:-1], 1), None)
    g = adapter.output_gradients(grad.to(dtype))
    a = adapter.inputs(x if adapter.diagonal_input else x.to(dtype))
    keep = adapter.mask(x)
    if isinstance(index, Tensor):
        a, g, keep = _by_example(a, g, keep, index, use.name, terms)
    elif terms is not None:
        size = 0 if index == "summed" else terms.size
        a, g = regrouped(a, size), regrouped(g, size)
        keep = None if keep is None else regrouped(keep, size)
    weight = _counted(g, terms)
    if keep is not None:
        g = g * keep[..., None, None]
        weight = keep if weight is None else keep & weight
    if exact:
        # The example's gradient itself: its second moment is the block.
        a = kernels.position_sum(g, a)[:, :, 0].unsqueeze(1)
        return Rows(a, torch.ones_like(a[..., :1]), None)
    if use.transposed:
        a, g = g, a
    return Rows(a, g, None if weight is None else weight.to(dtype), use.transposed)


def _row_gradients(
    call: LayerCall, terms: TargetMask | None, dtype: torch.dtype
) -> Tensor | None:
    """Return the examples' gradients of an exact block by a shortcut ``[N, 1, b, d]``.

    ``None`` if there is none, or if positions of one row are of different examples.
    """
    use, x, grad, index = call
    if isinstance(index, Tensor):
        return None
    size = 0 if index == "summed" or terms is None else terms.size
    n, s = use.adapter.output_gradients(grad).shape[:2]
    if n != size and s == size:
        return None
    sums = find_shortcuts(use.adapter).row_gradients(x.to(dtype), grad.to(dtype))
    if sums is None or (terms is None and index is None):
        return None if sums is None else sums.unsqueeze(1)
    return regrouped(sums.unsqueeze(1), size).sum(dim=1, keepdim=True)


def _by_example(
    a: Tensor,
    g: Tensor,
    keep: Tensor | None,
    index: Tensor,
    layer: str,
    terms: TargetMask | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, gradients and mask with the rows of each example together."""
    n, s = g.shape[:2]
    size = None if terms is None else terms.size
    index = spread(index, n, s, layer, size)
    if size is None:
        size = int(index.max()) + 1 if index.numel() else 1
    if keep is not None:
        index = index.masked_fill(~keep.to(index.device).reshape(n, s), -1)
    (a, g), rows = arranged([a, g], index, size)
    return a, g, rows


def reduced(rows: Rows, size_in: int) -> Rows:
    """Return one position per example: mean input, summed gradient ("reduce").

    Eschenhagen et al. 2023, section 3.2. Applied before roles change, so not to
    transposed uses, which are returned as they are.
    """
    weight = rows.weight
    inputs = rows.inputs
    if rows.indexed:
        counts = rows.grads.new_zeros(len(inputs), size_in)
        ones = torch.ones_like(inputs, dtype=counts.dtype) if weight is None else weight
        inputs = counts.scatter_add_(1, inputs, ones)[:, None, None]
    elif weight is None:
        inputs = inputs.sum(dim=1, keepdim=True)
    else:
        inputs = (inputs * weight[..., None, None]).sum(dim=1, keepdim=True)
    if weight is None:
        inputs = inputs / rows.grads.shape[1]
    else:
        count = weight.sum(dim=1).clamp(min=1)
        inputs = inputs / count[:, None, None, None]
        weight = (weight.sum(dim=1, keepdim=True) > 0).to(inputs.dtype)
    return Rows(inputs, rows.grads.sum(dim=1, keepdim=True), weight)


def shared(rows: Rows) -> Rows:
    """Return the rows for the one pair of factors that all blocks share.

    The blocks' inputs become positions of one block; their gradients are the same.
    """
    weight, blocks = rows.weight, rows.inputs.shape[2]
    if weight is not None:
        weight = weight.repeat_interleave(blocks, dim=1)
    return Rows(rows.inputs.flatten(1, 2).unsqueeze(2), rows.grads[:, :, :1], weight)


def example_gradients(
    uses: Sequence[Rows], shape: tuple[int, int, int], budget: int = 1 << 24
) -> Iterator[Tensor]:
    """Yield the gradients of single examples, ``[n, b, d_out, d_in]``, in order.

    Args:
        uses: The calls of one block, of whatever forms.
        shape: ``(b, d_out, d_in)``.
        budget: Elements of example gradients that may exist at a time.
    """
    b, d_out, d_in = shape
    step = max(1, budget // (b * d_out * d_in))
    for start in range(0, len(uses[0].grads), step):
        gradients: Tensor | None = None
        for rows in uses:
            part = slice(start, start + step)
            inputs, grads = rows.inputs[part], rows.grads[part]
            if inputs.dim() == 2:
                inputs = _one_hot(inputs, d_in, grads)
            if grads.dim() == 2:
                grads = _one_hot(grads, d_out, inputs)
            gradients = plus(gradients, kernels.position_sum(grads, inputs))
        assert gradients is not None
        yield gradients


def _one_hot(index: Tensor, size: int, like: Tensor) -> Tensor:
    """Return indices ``[N, S]`` as ``[N, S, 1, size]``."""
    hot = like.new_zeros(*index.shape, size)
    return hot.scatter_(-1, index.unsqueeze(-1), 1).unsqueeze(2)


def joined(uses: Sequence[Rows]) -> Rows | None:
    """Return several calls of the same examples as one with more positions.

    ``None`` if their forms differ.
    """
    if len(uses) == 1 and not uses[0].transposed:
        return uses[0]
    indexed = uses[0].indexed
    if any(rows.transposed or rows.indexed != indexed for rows in uses):
        return None
    weights = [
        torch.ones_like(rows.grads[..., 0, 0]) if rows.weight is None else rows.weight
        for rows in uses
    ]
    return Rows(
        torch.cat([rows.inputs for rows in uses], dim=1),
        torch.cat([rows.grads for rows in uses], dim=1),
        torch.cat(weights, dim=1),
    )


def plus(sum_: Tensor | None, term: Tensor) -> Tensor:
    """Return ``sum_ + term``, the term alone where there is no sum yet."""
    return term if sum_ is None else sum_ + term
