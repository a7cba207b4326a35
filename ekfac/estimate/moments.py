"""Diagonals of Fisher matrices, from the recorded calls of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature import LayerCurvature
from ekfac.curvature.normal_form import Pair, example_gradients, joined, normal_form
from ekfac.layers import Block
from ekfac.likelihoods import Terms


def packing_of(block: Block) -> LayerCurvature:
    """Return the way between a block's parameters and ``[b, d_out, d_in]``, alone."""
    return LayerCurvature(block, lambda *shape: torch.empty(*shape, device="meta"))


class MomentSums:
    """Sums over examples of squared gradients, and of products with the bias's.

    Args:
        block: The layer.
        cross: Whether to sum the products of every weight with its row's bias.

    Attributes:
        squares: ``[b, d_out, d_in]``.
        products: ``[b, d_out, d_in - 1]``.
    """

    def __init__(self, block: Block, cross: bool) -> None:
        weight = block.tensors()[0]
        b, d_out, d_in = block.shape
        self.block, self.cross = block, cross
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        zeros = torch.zeros(b, d_out, d_in, dtype=self.dtype, device=weight.device)
        self.squares, self.products = zeros, zeros[..., 1:].clone()

    def fresh(self) -> MomentSums:
        """Return empty sums of the same kind."""
        return type(self)(self.block, self.cross)

    def add(self, pairs: Sequence[Pair], terms: Terms | None) -> bool:
        """Add the calls of one backward pass.

        Returns:
            Whether the examples could be told apart; if not, the sums are worthless.
            They cannot where the layer was called without a batch dimension.
        """
        count = 0
        for uses in normal_form(pairs, terms, self.dtype):
            if len({len(rows.grads) for rows in uses}) > 1:
                return False
            count += len(uses[0].grads)
            one = joined(uses)
            if one is None or self.cross:
                for gradients in example_gradients(uses, self.block.shape):
                    self.add_gradients(gradients)
            elif one.indexed:
                size = self.block.shape[2]
                self.squares += kernels.indexed_second_moment(
                    one.grads, one.inputs, size, None
                )
            else:
                moment, _ = kernels.second_moment(one.grads, one.inputs, None, None)
                self.squares += moment
        return terms is None or count == terms.size

    def add_gradients(self, gradients: Tensor) -> None:
        """Add gradients of examples, ``[n, b, d_out, d_in]``."""
        self.squares += gradients.square().sum(dim=0)
        if self.cross:
            self.products += (gradients[..., :-1] * gradients[..., -1:]).sum(dim=0)
