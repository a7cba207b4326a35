"""Adapters of weights that modules pass to operations, and the choice of them.

The shape of a parameter, and the names and operators in the code of its module, decide
whether it becomes a block and of which form. A call whose form differs from that of the
block has a :class:`ekfac.layers.base.CallForm`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ekfac.layers.base import (
    Adapter,
    Arrange,
    CallForm,
    FunctionalAdapter,
    Slot,
    shortcuts_for,
)
from ekfac.layers.code_names import (
    CONVOLUTIONS,
    PRODUCTS,
    TABLES,
    code_names,
    equations,
)
from ekfac.layers.conv import ConvAdapter, ConvShortcuts
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter, positions
from ekfac.layers.norm import ChannelNormAdapter, NormAdapter, TrailingNormAdapter
from ekfac.layers.views import parts_of

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Norm = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class OperandAdapter(FunctionalAdapter):
    """A weight that is an operand of operations; subclasses are its kinds."""

    costly = True

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the blocks by parameter name and, in a stack, the matrix's number."""
        blocks: dict[str, Adapter] = {}
        for name, kind in operands(module).items():
            parameter = module._parameters[name]
            assert parameter is not None
            suffix = "" if name == "weight" else name
            if kind is StackedAdapter:
                for i in range(len(parameter)):
                    blocks[f"{name}.{i}"] = kind(module, Slot(name, (i, i + 1)))
                continue
            with_bias = isinstance(module, Conv + Norm)
            bias = module._parameters.get("bias") if with_bias else None
            slot = None if bias is None else Slot("bias")
            blocks[suffix] = kind(module, Slot(name), slot)
        return blocks


class FunctionalLinearAdapter(OperandAdapter, LinearAdapter):
    """A matrix ``[d_out, d_in]``, or its transpose in calls that use that."""


class StackedAdapter(FunctionalLinearAdapter):
    """One matrix of a stack ``[E, d_out, d_in]``."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``weight``: it is ``[1, d_out, d_in]``."""
        return weight

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``matrix``, and no bias."""
        return matrix, None


class FoldedAdapter(FunctionalLinearAdapter):
    """A matrix one of whose sides is two of three dimensions, as in ``ibh,hnd``."""

    def __init__(self, module: nn.Module, weight: Slot, bias: Slot | None = None):
        super().__init__(module, weight, bias)
        self.split = fold(type(module)) or 1
        self.shape = self.parameter(weight).shape

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, rows, columns]``."""
        return weight.flatten(self.split).flatten(0, self.split - 1).unsqueeze(0)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the parameter in its shape."""
        return matrix.reshape(self.shape), None


class FunctionalConvAdapter(OperandAdapter, ConvAdapter):
    """Kernels ``[C_out, C_in / groups, *kernel]``; calls give stride and padding."""

    def __init__(self, module: nn.Module, weight: Slot, bias: Slot | None = None):
        super().__init__(module, weight, bias)
        if not isinstance(module, Conv):
            _, channels, *kernel = self.parameter(weight).shape
            self.settings = SimpleNamespace(
                kernel_size=tuple(kernel), groups=1, in_channels=channels
            )


class TableAdapter(OperandAdapter, EmbeddingAdapter):
    """Rows ``[*, d]`` that operations take by index or add to a sequence."""

    def __init__(self, module: nn.Module, weight: Slot, bias: Slot | None = None):
        EmbeddingAdapter.__init__(self, module)
        self.weight, self.bias = weight, None
        if not isinstance(module, nn.Embedding):
            self.padding_idx = None

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d, rows]``."""
        return super().pack(weight.reshape(-1, weight.shape[-1]), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows in the parameter's shape."""
        rows, bias = super().unpack(matrix)
        return rows.reshape(self.parameter(self.weight).shape), bias


class FunctionalNormAdapter(OperandAdapter, ChannelNormAdapter):
    """Scale and shift of a norm whose class has a forward of its own."""

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input: a call gives the normalisation."""
        return x


class DenseCall(CallForm, LinearAdapter):
    """A product with a block's matrix."""


class OneHotCall(CallForm, LinearAdapter):
    """Rows of a matrix taken by index: a product with one-hot vectors."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_out]`` of indices ``[N, *]``."""
        rows = self.of.matrix_shape()[1]
        return positions(F.one_hot(x.long(), rows).to(x.dtype))


class ConvCall(CallForm, ConvAdapter):
    """A convolution with the settings of one call."""

    def __init__(self, of: ConvAdapter, settings: Any) -> None:
        CallForm.__init__(self, of)
        self.settings = settings


shortcuts_for(ConvCall)(ConvShortcuts)


class ChannelNormCall(CallForm, ChannelNormAdapter):
    """A normalisation with one scale per channel.

    Args:
        of: The block's adapter.
        normalise: The call's function, without scale and shift.
    """

    def __init__(self, of: NormAdapter, normalise: Arrange) -> None:
        CallForm.__init__(self, of)
        self.normalise = normalise

    def normalised(self, x: Tensor) -> Tensor:
        """Return the call's normalisation of ``x``."""
        return self.normalise(x)


class TrailingNormCall(ChannelNormCall):
    """A normalisation over the last dimensions, with one scale per element of them."""

    features_last = TrailingNormAdapter.features_last


def fold(kind: type) -> int | None:
    """Return the number of first dimensions of a weight that are one matrix side.

    It is about weights of three dimensions that a class passes to ``einsum`` as the
    second operand. ``None`` if they are stacks of matrices.
    """
    for equation in equations(kind):
        left, out = equation.split("->")
        names, own = left.split(",")
        if len(own) != 3 or "." in own or all(parts_of((own[1], own[2]), names, out)):
            continue
        for k in (1, 2):
            if all(parts_of((own[:k], own[k:]), names, out)):
                return k
    return None


def operands(module: nn.Module) -> dict[str, type[OperandAdapter]]:
    """Return the parameters that a module passes to operations -> their kinds."""
    if isinstance(module, nn.Embedding) and EmbeddingAdapter.refusal(module):
        return {}
    lists = (nn.ParameterList, nn.ParameterDict)
    of_torch = type(module).__module__.startswith("torch.nn.")
    if of_torch and not isinstance(module, lists):  # these have adapters of their own
        return {}
    if isinstance(module, Norm):
        has_scale = module._parameters.get("weight") is not None
        return {"weight": FunctionalNormAdapter} if has_scale else {}
    lazy = nn.parameter.UninitializedParameter
    own = {
        n: p
        for n, p in module._parameters.items()
        if p is not None and not isinstance(p, lazy) and p.dim() > 1
    }
    if not own:
        return {}
    names = code_names(type(module))
    named = own if isinstance(module, lists) else own.keys() & names
    kinds = {n: _kind(module, p, names) for n, p in own.items() if n in named}
    return {n: kind for n, kind in kinds.items() if kind is not None}


def _kind(
    module: nn.Module, parameter: Tensor, names: set[str]
) -> type[OperandAdapter] | None:
    """Return the kind of a parameter, by its shape and the names in its module."""
    sizes, multiplies = parameter.shape, bool(names & PRODUCTS)
    if isinstance(module, Conv):
        return FunctionalConvAdapter
    if isinstance(module, nn.Embedding):
        return TableAdapter
    if len(sizes) == 3 and sizes[0] == 1 and names & TABLES:
        return TableAdapter
    if len(sizes) == 2 and multiplies and sizes[0] > 0:
        return FunctionalLinearAdapter
    if len(sizes) == 3 and multiplies and sizes[0] > 0 and min(sizes[1:]) > 1:
        return FoldedAdapter if fold(type(module)) else StackedAdapter
    if 3 <= len(sizes) <= 5 and names & CONVOLUTIONS:
        return FunctionalConvAdapter
    rows = len(sizes) == 2 or sizes[0] == 1  # of positions in one or more dimensions
    return TableAdapter if rows and sizes[-1] > 1 and names & TABLES else None
