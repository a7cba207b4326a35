"""Sums of one layer's factors over an accumulation window."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.rows import Pair, Rows, plus, reduced
from ekfac.kernels import accelerated
from ekfac.kernels.correlation import Geometry, PatchGram
from ekfac.kernels.counts import Counts
from ekfac.kernels.grams import Gram
from ekfac.kernels.together import Together
from ekfac.layers import Block


@dataclass
class FactorSums:
    """Sums of one block's factors over a window, for one orientation of its weight.

    Attributes:
        inputs: Sum of the input factor.
        grads: Sum of the output-gradient factor.
        rows: How many rows there were.
        patches: What convolutions leave for the end.
        together: Takes the sums that a kernel can do.
    """

    inputs: Tensor | None = None
    grads: Tensor | None = None
    rows: Tensor | int = 0
    patches: dict[Geometry, PatchGram] = field(default_factory=dict)
    together: Together = field(default_factory=lambda: Together(0))

    def settle(self) -> None:
        """Add what convolutions have left for the end to ``inputs``."""
        self.together.flush()
        while self.patches:
            self.inputs = plus(self.inputs, self.patches.popitem()[1].dense())

    def _add(self, inputs: bool, term: Tensor | Gram | Counts, kind: str = "") -> None:
        """Add a sum, or what is to be one by the operator ``kind``, to one side."""
        total = self.inputs if inputs else self.grads
        if isinstance(term, Tensor):
            self.together.complete(total)
            total = plus(total, term)
        else:
            total = self.together.add(kind, term, total)
        if inputs:
            self.inputs = total
        else:
            self.grads = total

    def _add_rows(
        self, inputs: bool, rows: Tensor, weight: Tensor | None, diagonal: bool
    ) -> None:
        """Add the Gram matrix of rows ``[N, S, b, d]``, or its diagonal."""
        item = accelerated.gram_of(rows, weight, diagonal=diagonal)
        if item is not None:
            self._add(inputs, item, "diagonal_gram_" if diagonal else "gram_")
        else:
            gram = kernels.diagonal_gram if diagonal else kernels.gram
            self._add(inputs, gram(rows, weight))

    def _add_counts(
        self,
        inputs: bool,
        index: Tensor,
        size: int,
        weight: Tensor | None,
        like: Tensor,
    ) -> None:
        """Add how often each index occurs."""
        item = accelerated.counts_of(index, size, weight, like)
        if item is not None:
            self._add(inputs, item, "index_counts_")
        else:
            self._add(inputs, kernels.index_counts(index, size, weight, like))

    def add_call(self, block: Block, pair: Pair, dtype: torch.dtype) -> bool:
        """Add a call whose input factor needs no rows, if there is a way."""
        use, x, grad = pair
        found = use.adapter.input_gram(x.to(dtype))
        if found is None:
            return False
        grads = use.adapter.output_gradients(grad.to(dtype))
        if isinstance(found, Gram):
            self._add(True, found, "patch_gram_" if found.conv else "gram_")
        elif isinstance(found, Tensor):
            self._add(True, found)
        else:
            before = self.patches.get(found.geometry)
            self.patches[found.geometry] = found if before is None else before + found
        self.add_grads(block, grads)
        self.rows = self.rows + grads.shape[0] * grads.shape[1]
        return True

    def add_grads(self, block: Block, grads: Tensor) -> None:
        """Add output gradients ``[N, S, b, d_out]`` that all count."""
        self._add_rows(False, grads, None, block.diagonal[1])

    def finite(self) -> Tensor:
        """Return whether the sums are finite, a tensor without dimensions."""
        assert self.inputs is not None
        assert self.grads is not None
        return torch.isfinite(self.inputs.sum() + self.grads.sum())

    def add(self, rows: Rows, block: Block, sharing: str, repeated: bool) -> None:
        """Add one use; of a ``repeated`` backward pass the gradients alone."""
        _, d_out, d_in = block.shape
        new_inputs = block.exact or not (repeated and not rows.transposed)
        new_grads = block.exact or not (repeated and rows.transposed)
        if block.exact:
            a = rows.inputs.sum(dim=1, keepdim=True)
            rows = Rows(a, torch.ones_like(a[..., :1]), None)
        elif sharing == "reduce" and not rows.transposed:
            rows = reduced(rows, d_in)
        if new_inputs:
            a_weight = None if rows.transposed else rows.weight
            if rows.indexed:
                self._add_counts(True, rows.inputs, d_in, a_weight, rows.grads)
            else:
                self._add_rows(True, rows.inputs, a_weight, block.diagonal[0])
        if new_grads:
            g_weight = rows.weight if rows.transposed else None
            if rows.transposed and rows.grads.dim() == 2:
                self._add_counts(False, rows.grads, d_out, g_weight, rows.inputs)
            else:
                self._add_rows(False, rows.grads, g_weight, block.diagonal[1])
        if new_inputs and new_grads:
            self.rows = self.rows + rows.count()
