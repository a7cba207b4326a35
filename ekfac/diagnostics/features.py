"""How the outputs respond to a change of inputs and features.

Karakida et al. 2020, section 5: ``A = E[sum_k grad_h f_k grad_h f_k^T]`` for the
vectors ``h`` that the layers see. The block of a layer is ``W^T G W`` with the layer's
own K-FAC factor ``G``, an identity; the blocks between layers are not in the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.diagnostics.overlaps import kfac_blocks
from ekfac.diagnostics.spectra import Source, Spectrum
from ekfac.errors import UnsupportedOperationError
from ekfac.estimate.features import layer_features
from ekfac.likelihoods import resolve
from ekfac.matrices import BlockDiagonalMatrix
from ekfac.vectors import named_parameters


@dataclass(frozen=True)
class FeatureMetric:
    """The metric of the layers' inputs, by layer and whole.

    Attributes:
        blocks: Layer name -> ``[b, d_in, d_in]``, the first layer's that of the inputs.
            Shared positions are moved one at a time and summed over.
        source: ``"exact"``; ``"factors"`` if made of K-FAC factors, which gives the
            same blocks.
        gradients: ``[N K, sum d_in]``, whose second moment is the whole, or ``None``.
        num_examples: ``N``, what the second moment is divided by.
    """

    blocks: dict[str, Tensor]
    source: Source
    gradients: Tensor | None = None
    num_examples: int = 0

    def layer_spectra(self) -> dict[str, Spectrum]:
        """Return the eigenvalues of every layer's block."""
        found = {}
        for name, block in self.blocks.items():
            values = torch.linalg.eigvalsh(block).flatten().sort(descending=True).values
            found[name] = Spectrum(values, len(values), "exact")
        return found

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues of the whole, blocks between layers included.

        Raises:
            UnsupportedOperationError: From factors, or with shared positions.
        """
        if self.gradients is None:
            raise UnsupportedOperationError(
                "The whole metric is that of layers with one position per example, "
                "without groups, from feature_metric(model, x); Kronecker factors and "
                "convolutions give blocks: use layer_spectra()."
            )
        rows = self.gradients
        small = rows @ rows.mT if rows.shape[0] < rows.shape[1] else rows.mT @ rows
        values = torch.linalg.eigvalsh(small / self.num_examples).flip(0)
        return Spectrum(values, rows.shape[1], "exact")


def feature_metric(
    model: nn.Module, x: Any, likelihood: Any = "categorical"
) -> FeatureMetric:
    """Return the metric of inputs and features on some examples.

    Args:
        model: The model, in eval mode while it is called.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        likelihood: As for :func:`ekfac.fisher`; ``"gaussian"`` is the text's metric.
    """
    outputs, layers = layer_features(model, x)
    n = len(outputs)
    pseudo = [h.flatten(1) for h in resolve(likelihood).exact(outputs)]
    weights = torch.stack(pseudo, dim=1).to(outputs.dtype)  # [N, K, C]
    blocks, whole = {}, []
    for name, layer in layers.items():
        slopes = layer.input_grads
        rows = torch.bmm(weights, slopes.flatten(2)).unflatten(2, slopes.shape[2:])
        flat = rows.flatten(0, 2).transpose(0, 1)  # [b, N K S, d_in]
        blocks[name] = flat.mT @ flat / n
        if slopes.shape[2:4] == (1, 1):
            whole.append(rows.flatten(2))
    complete = len(whole) == len(layers)
    gradients = torch.cat(whole, dim=2).flatten(0, 1) if complete else None
    return FeatureMetric(blocks, "exact", gradients, n)


def feature_metric_of_factors(
    model: nn.Module, matrix: BlockDiagonalMatrix
) -> FeatureMetric:
    """Return ``W^T G W`` of every layer of a K-FAC matrix.

    Args:
        model: The model whose weights ``W`` are.
        matrix: Its K-FAC matrix.

    Raises:
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    parameters = named_parameters(model)
    blocks = {}
    for name, block in kfac_blocks(matrix).items():
        names = block.layer.parameter_names
        tensors = {n: parameters[n].detach().to(block.dtype) for n in names}
        weight = block.layer.pack(tensors)
        if len(names) > 1:
            weight = weight[..., :-1]
        blocks[name] = weight.mT @ block.factor("G") @ weight
    return FeatureMetric(blocks, "factors")
