"""What every layer saw, and the derivatives of every output with respect to it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.estimate.data import choose, prepared
from ekfac.estimate.kernel import Side
from ekfac.estimate.layers import lay_out
from ekfac.layers import Block


@dataclass(frozen=True)
class LayerFeatures:
    """One layer in the normal form, for a set of inputs of the model.

    Attributes:
        inputs: ``[N, S, b or 1, d_in]``; with a bias the last feature is 1.
        grads: ``[N, C, S, b, d_out]``, derivatives of the model's outputs with respect
            to the layer's.
        weight: ``[b, d_out, d_in]``, with the bias in the last column.
        has_bias: Whether there is that column.
    """

    inputs: Tensor
    grads: Tensor
    weight: Tensor
    has_bias: bool

    @property
    def features(self) -> Tensor:
        """The inputs without the bias's ones."""
        return self.inputs[..., :-1] if self.has_bias else self.inputs

    @property
    def input_grads(self) -> Tensor:
        """Derivatives with respect to ``features``, ``[N, C, S, b, d_in]``."""
        weight = self.weight[..., :-1] if self.has_bias else self.weight
        return torch.einsum("ncsbo,boi->ncsbi", self.grads, weight)


def layer_features(
    model: nn.Module, x: Any, *, parameters: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, LayerFeatures]]:
    """Return the outputs and every layer's inputs and output derivatives.

    Layers are those with Kronecker factors and vectors as inputs, in the order of the
    model; others (norms, embeddings, bare parameters) are left out. It takes ``C``
    backward passes.

    Args:
        model: The model, in eval mode while it is called. Its outputs ``[N, *]`` have
            ``C`` elements for each example.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        parameters: Names of parameters or layers. Default: what requires a gradient.

    Raises:
        ValueError: If outputs are not finite.
    """
    chosen = choose(model, parameters)
    with prepared(model, chosen):
        layout = lay_out(model, chosen, {nn.Module: "diagonal"}, None)
        blocks = [b for b in layout.blocks if not (b.exact or b.mixed)]
        side = Side(model, chosen, layout, x)
        with closing(side):
            found = side.features(blocks)
            outputs = side.outputs.detach()
    result = {}
    for block in blocks:
        parts = found.get(block)
        if parts is None or parts.inputs is None or parts.inputs.dim() < 4:
            continue
        assert parts.grads is not None
        has_bias = block.adapter.bias is not None
        weight = _packed(block)
        result[block.name] = LayerFeatures(
            parts.inputs.detach(), parts.grads.detach(), weight, has_bias
        )
    return outputs, result


def _packed(block: Block) -> Tensor:
    """Return the layer's weight and bias as ``[b, d_out, d_in]``."""
    return block.pack([tensor.detach() for tensor in block.tensors()]).detach()
