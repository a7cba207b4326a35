"""Scale and shift of the normalisation layers, as exact 2 x 2 blocks.

After the normalisation, feature ``j`` computes ``w_j xhat_j + b_j``: ``d`` independent
maps from ``(xhat_j, 1)`` to one output, so ``b = d``, ``d_out = 1`` and ``d_in = 2`` in
the normal form. A block is small enough to be kept exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ekfac.layers.base import FINE, Adapter, Shortcuts, register, shortcuts_for


class NormAdapter(Adapter):
    """A normalisation; subclasses implement it, and where its features are."""

    family = "exact"

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse a layer without scale."""
        if module._parameters.get("weight") is None:
            return f"it has no scale to train; {FINE}"
        return None

    @abstractmethod
    def normalised(self, x: Tensor) -> Tensor:
        """Return the normalised input, before scale and shift."""

    @abstractmethod
    def features_last(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[N, S, d]``."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, d, 2]``: normalised input and, with a bias, 1."""
        a = self.features_last(self.normalised(x)).unsqueeze(-1)
        return a if self.bias is None else F.pad(a, (0, 1), value=1.0)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, d, 1]``."""
        return self.features_last(grad).unsqueeze(-1)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[d, 1, 2]``."""
        columns = [t.reshape(-1) for t in (weight, bias) if t is not None]
        return torch.stack(columns, dim=-1).unsqueeze(1)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scale and shift in the layer's shape."""
        shape = self.parameter(self.weight).shape
        weight = matrix[:, 0, 0].reshape(shape)
        return weight, None if self.bias is None else matrix[:, 0, 1].reshape(shape)


class TrailingNormAdapter(NormAdapter):
    """A norm over the last dimensions, with one scale for each element of them."""

    def features_last(self, x: Tensor) -> Tensor:
        """Return ``[N, S, d]`` of ``[N, *, *normalized_shape]``."""
        shape = self.parameter(self.weight).shape
        lead = x.shape[: x.dim() - len(shape)]
        return x.reshape(lead[0] if lead else 1, -1, prod(shape))


@register(nn.LayerNorm)
class LayerNormAdapter(TrailingNormAdapter):
    """``torch.nn.LayerNorm``."""

    module: nn.LayerNorm

    def normalised(self, x: Tensor) -> Tensor:
        """Return the layer-normalised input."""
        shape = list(self.module.normalized_shape)
        return F.layer_norm(x, shape, None, None, self.module.eps)


@register(nn.RMSNorm)
class RMSNormAdapter(TrailingNormAdapter):
    """``torch.nn.RMSNorm``."""

    module: nn.RMSNorm

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input divided by its root mean square."""
        shape = list(self.module.normalized_shape)
        return F.rms_norm(x, shape, None, self.module.eps)


class ChannelNormAdapter(NormAdapter):
    """A norm of ``[N, C, *]`` with one scale for each channel."""

    def features_last(self, x: Tensor) -> Tensor:
        """Return ``[N, S, C]`` of ``[N, C, *]``."""
        return x.reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)


@register(nn.GroupNorm)
class GroupNormAdapter(ChannelNormAdapter):
    """``torch.nn.GroupNorm``."""

    module: nn.GroupNorm

    def normalised(self, x: Tensor) -> Tensor:
        """Return the group-normalised input."""
        return F.group_norm(x, self.module.num_groups, None, None, self.module.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNormAdapter(ChannelNormAdapter):
    """Batch normalisation.

    In training mode the batch statistics couple the examples. The gradient of scale and
    shift is still a sum over examples; its terms count as the examples' gradients.
    """

    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input normalised as in the layer's own forward."""
        mean, var = _running(self.module)
        eps = self.module.eps
        return F.batch_norm(x, mean, var, training=mean is None, eps=eps)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormAdapter(ChannelNormAdapter):
    """Instance normalisation with scale and shift."""

    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input normalised as in the layer's own forward."""
        mean, var = _running(self.module)
        eps, x = self.module.eps, self._batched(x)
        return F.instance_norm(x, mean, var, use_input_stats=mean is None, eps=eps)

    def features_last(self, x: Tensor) -> Tensor:
        """Return ``[N, S, C]`` of ``[N, C, *]``, or ``[1, S, C]`` of ``[C, *]``."""
        return super().features_last(self._batched(x))

    def _batched(self, x: Tensor) -> Tensor:
        """Add the batch dimension that an unbatched call lacks."""
        unbatched = x.dim() == self.module._get_no_batch_dim()
        return x.unsqueeze(0) if unbatched else x


@shortcuts_for(
    LayerNormAdapter,
    RMSNormAdapter,
    GroupNormAdapter,
    BatchNormAdapter,
    InstanceNormAdapter,
)
class NormShortcuts(Shortcuts[NormAdapter]):
    """Sums over positions, feature by feature, without the constant input 1."""

    def row_gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return ``[N, d, 2]``, each column in memory by itself."""
        adapter = self.adapter
        product = adapter.normalised(x).mul_(grad)
        columns = [adapter.features_last(product).sum(dim=1)]
        if adapter.bias is not None:
            columns.append(adapter.features_last(grad).sum(dim=1))
        return torch.stack(columns).permute(1, 2, 0)


def _running(module: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the running mean and variance if the module normalises by them."""
    if module.training:
        return None, None
    return module.running_mean, module.running_var
