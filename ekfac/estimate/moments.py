"""Diagonals of Fisher matrices, from the recorded calls of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature import LayerCurvature
from ekfac.curvature.factors import Pair, example_gradients, joined, normal_form
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

    def add(self, pairs: Sequence[Pair], terms: Terms | None) -> bool:
        """Add the calls of one backward pass.

        Returns:
            Whether the examples could be told apart. They cannot where the layer was
            called without a batch dimension.
        """
        for uses in normal_form(pairs, terms, self.dtype):

            if terms is not None and len(pairs[0][2]) and n not in _sizes(terms):
                return False
            one = joined(uses)
            if one is None or self.cross:
                for gradients in example_gradients(uses, self.block.shape):
                    self.add_gradients(gradients)
            elif one.indexed:
                size = self.block.shape[2]
                moment = kernels.indexed_second_moment(one.grads, one.inputs, size, None)
                self.squares += moment
            else:
                self.squares += kernels.second_moment(
                    one.grads, one.inputs, None, None
                )[0]
        return True

    def add_gradients(self, gradients: Tensor) -> None:
        """Add gradients of examples, ``[n, b, d_out, d_in]``."""
        self.squares += gradients.square().sum(dim=0)
        if self.cross:
            self.products += (gradients[..., :-1] * gradients[..., -1:]).sum(dim=0)
