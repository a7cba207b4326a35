"""Linear and bilinear layers, and embeddings.

An embedding is a linear map of one-hot inputs, so its input factor is diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ekfac.kernels.input_gram import InputRows
from ekfac.layers.base import Adapter, Arrange, Shortcuts, register, shortcuts_for


def positions(x: Tensor) -> Tensor:
    """Return ``[N, *, d]`` as ``[N, S, 1, d]``; a vector ``[d]`` is one example."""
    x = x.unsqueeze(0) if x.dim() == 1 else x
    return x.reshape(x.shape[0], -1, 1, x.shape[-1])


@register(nn.Linear)
class LinearAdapter(Adapter):
    """``y = x W^T + b`` with any number of leading dimensions."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_in]``."""
        a = positions(x)
        if self.bias is None:
            return a
        return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)

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
        matrix = matrix[0]
        return matrix[:, :-1], matrix[:, -1]


@shortcuts_for(LinearAdapter)
class LinearShortcuts(Shortcuts[LinearAdapter]):
    """Rows without a copy for the bias's ones."""

    def input_gram(self, x: Tensor) -> InputRows:
        """Return the rows as they are in memory."""
        return InputRows(positions(x), self.adapter.bias is not None)


@register(nn.Bilinear)
class BilinearAdapter(LinearAdapter):
    """``y_o = x^T W_o z + b_o``: a linear layer of the products ``x_i z_j``.

    The recorded input is ``[x, z]``; the products are formed when they are needed.
    """

    module: nn.Bilinear

    def call_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Arrange | None]:
        """Return both inputs, concatenated along the features."""
        arguments = {**dict(zip(("input1", "input2"), args, strict=False)), **kwargs}
        return torch.cat([arguments["input1"], arguments["input2"]], dim=-1), None

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


@shortcuts_for(BilinearAdapter)
class BilinearShortcuts(Shortcuts[BilinearAdapter]):
    """The products of a few examples at a time."""

    def elements_per_example(self, x: Tensor) -> int:
        """Return the number of products of one example."""
        module, x = self.adapter.module, positions(x)
        return module.in1_features * module.in2_features * x.shape[1]


@register(nn.Embedding)
class EmbeddingAdapter(Adapter):
    """``y = W^T e_x``: the input factor is the tokens' frequency, never ``V x V``."""

    diagonal_input = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        padding = getattr(module, "padding_idx", None)
        self.padding_idx = padding if isinstance(padding, int) else None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse the setting under which gradients are not sums over positions."""
        if getattr(module, "scale_grad_by_freq", False):
            reason = "scale_grad_by_freq=True: its gradient is not a sum over examples"
            return f"{reason}; set it False"
        return super().refusal(module)

    def mask(self, x: Tensor) -> Tensor | None:
        """Return false at the padding token, which has no gradient."""
        if self.padding_idx is None:
            return None
        return self.inputs(x) != self.padding_idx

    def inputs(self, x: Tensor) -> Tensor:
        """Return the indices as ``[N, S]``."""
        x = x.unsqueeze(0) if x.dim() == 0 else x
        return x.reshape(x.shape[0], -1)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_out]``."""
        return positions(grad)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d_out, V]``."""
        return weight.t().unsqueeze(0)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the weight ``[V, d_out]``."""
        return matrix[0].t(), None


@register(nn.EmbeddingBag)
class EmbeddingBagAdapter(EmbeddingAdapter):
    """Sums and means over bags: an embedding, and the sum over its positions.

    A bag is an example and its members are positions. If ``g`` is the gradient of the
    bag's output, member ``s`` has the gradient ``w_s g``, where ``w_s`` is its weight
    in the sum: 1, its entry of ``per_sample_weights``, or one over the number of
    members. Bags are padded to the longest; the padding does not count.
    """

    module: nn.EmbeddingBag

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse maxima, and what an embedding refuses."""
        if module.mode == "max":
            return "mode='max': its gradient is not a sum over members; use 'sum'"
        return super().refusal(module)

    def call_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Arrange | None]:
        """Return indices ``[N, L]``, -1 behind a bag's end, and the members' gradient.

        The latter maps ``[N, d]`` to ``[N, L, d]``.
        """
        names = ("input", "offsets", "per_sample_weights")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        index = arguments["input"].detach().long()
        factors = arguments.get("per_sample_weights")
        factors = None if factors is None else factors.detach()
        if index.dim() == 1:
            bags = self._bags(arguments["offsets"], len(index))
            index = F.pad(index, (0, 1), value=-1)[bags]
            factors = None if factors is None else F.pad(factors, (0, 1))[bags]
        counts = self.mask(index)
        weight = counts.to(self.parameter(self.weight).dtype)
        if factors is not None:
            weight = weight * factors
        elif self.module.mode == "mean":
            weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)

        def spread(grad: Tensor) -> Tensor:
            return grad.unsqueeze(1) * weight.unsqueeze(-1).to(grad.dtype)

        return index, spread

    def _bags(self, offsets: Tensor, count: int) -> Tensor:
        """Return the members' indices in the input ``[N, L]``, ``count`` for none."""
        offsets = offsets.detach().long()
        if not self.module.include_last_offset:
            offsets = F.pad(offsets, (0, 1), value=count)
        start, end = offsets[:-1, None], offsets[1:, None]
        longest = int((end - start).max()) if len(start) else 0
        index = start + torch.arange(max(1, longest), device=offsets.device)
        return torch.where(index < end, index, count)

    def mask(self, x: Tensor) -> Tensor:
        """Return false at the padding token and behind a bag's end."""
        keep = x >= 0
        return keep if self.padding_idx is None else keep & (x != self.padding_idx)

    def inputs(self, x: Tensor) -> Tensor:
        """Return the indices as ``[N, L]``."""
        return x.clamp(min=0)
