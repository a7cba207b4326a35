"""Embeddings: a linear map of one-hot inputs, whose input factor is diagonal."""

from __future__ import annotations

from torch import Tensor, nn

from ekfac.layers.base import Adapter, register
from ekfac.layers.linear import positions


@register(nn.Embedding)
class EmbeddingAdapter(Adapter):
    """``y = W^T e_x``: the input factor is the tokens' frequency, never ``V x V``."""

    diagonal_input = True

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        self.padding_idx = module.padding_idx

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse the settings under which gradients are not sums over positions."""
        assert isinstance(module, nn.Embedding)
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq=True: its gradient is not a sum over examples"
        if module.sparse:
            return "sparse=True: its gradient is sparse"
        return super().refusal(module)

    def mask(self, x: Tensor) -> Tensor | None:
        """Leave out the padding token, which has no gradient."""
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
