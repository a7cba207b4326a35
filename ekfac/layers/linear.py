"""Linear layers, and those that are linear in the products of two inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.layers.base import Adapter, register


def positions(x: Tensor) -> Tensor:
    """Return ``[N, *, d]`` as ``[N, S, 1, d]``; a vector is one example."""
    x = x.unsqueeze(0) if x.dim() == 1 else x
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


def with_ones(a: Tensor) -> Tensor:
    """Append the bias's constant input 1 to the last dimension."""
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)


@register(nn.Linear)
class LinearAdapter(Adapter):
    """``y = x W^T + b`` with any number of leading dimensions."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_in]``."""
        a = positions(x)
        return a if self.bias is None else with_ones(a)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_out]``."""
        return positions(grad)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d_out, d_in]``."""
        if bias is None:
            return weight.unsqueeze(0)
        return torch.cat([weight, bias.unsqueeze(1)], dim=1).unsqueeze(0)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``[d_out, d_in]`` and bias ``[d_out]``."""
        if self.bias is None:
            return matrix[0], None
        return matrix[0, :, :-1], matrix[0, :, -1]


@register(nn.Bilinear)
class BilinearAdapter(LinearAdapter):
    """``y_o = x^T W_o z + b_o``: a linear layer of the products ``x_i z_j``.

    What is recorded is ``[x, z]``, from which the products are formed when needed.
    """

    module: nn.Bilinear

    def call_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
        """Return both inputs, features after features."""
        given = {**dict(zip(("input1", "input2"), args, strict=False)), **kwargs}
        return torch.cat([given["input1"], given["input2"]], dim=-1), None

    def inputs(self, x: Tensor) -> Tensor:
        """Return the products ``[N, S, 1, d_in]``."""
        size = self.module.in1_features
        products = x[..., :size, None] * x[..., None, size:]
        return super().inputs(products.flatten(-2))

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d_out, d_in]`` of ``[d_out, in1, in2]``."""
        return super().pack(weight.flatten(1), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``[d_out, in1, in2]`` and bias ``[d_out]``."""
        weight, bias = super().unpack(matrix)
        sides = self.module.in1_features, self.module.in2_features
        return weight.unflatten(-1, sides), bias
