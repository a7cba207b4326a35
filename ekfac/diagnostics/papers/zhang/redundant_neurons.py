"""Redundant neurons: those that do the same, in weights or factors, and their merging.

Zhang et al. 2021, section 3.2 and Figure 5: the inverse of a splitting embedding, up to
what "the same" leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.diagnostics.papers.karakida.order_parameters import kfac_blocks
from ekfac.diagnostics.papers.zhang.neuron_map import NeuronMap, neuron_map
from ekfac.diagnostics.spectra import Source
from ekfac.matrices import BlockDiagonalMatrix
from ekfac.spectral.operators import result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@result
class Redundancy:
    """Groups of neurons of a layer that can be merged.

    Attributes:
        neuron_map: Where the layer's neurons stand.
        groups: The neurons of each group; the first stands for all.
        negligible: Neurons of too small an amplitude, in no group.
        coefficients: ``[m]``: a neuron is about that many times its group's first.
        similarity: ``[m, m]``, cosines.
        source: ``"exact"`` from the weights, ``"factors"`` from an input factor.
    """

    neuron_map: NeuronMap
    groups: tuple[tuple[int, ...], ...]
    negligible: tuple[int, ...]
    coefficients: Tensor
    similarity: Tensor
    source: Source

    def merged(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with one neuron for every group.

        The first neuron's output weights become the group's sum, each times its
        coefficient.
        """
        kept = torch.tensor([group[0] for group in self.groups])
        weights = torch.zeros(len(self.groups), self.neuron_map.width)
        for i, group in enumerate(self.groups):
            for k in group:
                weights[i, k] = self.coefficients[k]

        def outputs(tensor: Tensor, dim: int) -> Tensor:
            return tensor.index_select(dim, kept.to(tensor.device))

        def inputs(tensor: Tensor, dim: int) -> Tensor:
            moved = tensor.movedim(dim, -1)
            return (moved @ weights.to(tensor).mT).movedim(-1, dim).contiguous()

        return self.neuron_map.rebuilt(model, outputs, inputs)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the cosines between neurons, group by group; return the axes."""
        ax = axes_or_new(ax)
        order = [k for group in sorted(self.groups, key=len)[::-1] for k in group]
        order += list(self.negligible)
        shown = self.similarity[order][:, order].cpu()
        image = ax.imshow(shown.tolist(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.figure.colorbar(image, ax=ax, label="cosine")
        ax.set(
            title=f"{self.neuron_map.layer}: {self.neuron_map.width} neurons, "
            f"{len(self.groups)} groups",
            xlabel="neuron, by group",
        )
        return ax


def redundant_neurons(
    model: nn.Module,
    layer: str,
    *,
    threshold: float = 0.9,
    amplitude: float = 0.02,
    activation: Literal["homogeneous", "any"] = "homogeneous",
    into: str | Sequence[str] | None = None,
) -> Redundancy:
    """Return neurons whose input weights point the same way.

    Groups are greedy: from the neuron of the largest amplitude down, each joins the
    first group whose first neuron it is similar to.

    Args:
        model: The model.
        layer: Name of a linear layer or a convolution.
        threshold: Least cosine of input weights and bias within a group.
        amplitude: Neurons up to this share of the largest product of input and output
            norm are negligible.
        activation: ``"homogeneous"`` for ReLU and its kin, where a longer weight is a
            larger neuron; with ``"any"`` coefficients are 1, right for equal weights.
        into: As for :func:`~ekfac.diagnostics.papers.zhang.split`.

    Raises:
        UnsupportedLayerError: If the neurons cannot be told apart downstream.
    """
    found = neuron_map(model, layer, into)
    parameters = dict(model.named_parameters())
    rows = []
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in found.outputs:
            tensor = parameters[name].detach().movedim(found.outputs[name], 0)
            rows.append(tensor.reshape(found.width, -1))
    inputs = torch.cat(rows, dim=1)
    norms = inputs.norm(dim=1)
    size = norms * _output_norms(parameters, found)
    units = inputs / norms.clamp(min=torch.finfo(norms.dtype).tiny).unsqueeze(1)
    ratios = norms if activation == "homogeneous" else torch.ones_like(norms)
    return _grouped(found, units @ units.mT, size, ratios, threshold, amplitude)


def redundant_neurons_of_factors(
    model: nn.Module,
    matrix: BlockDiagonalMatrix,
    layer: str,
    *,
    threshold: float = 0.99,
    amplitude: float = 0.02,
    into: str | Sequence[str] | None = None,
) -> Redundancy:
    """Return neurons whose outputs on the data go together.

    Read off the input factor ``A`` of the layer that reads them: what it says is
    functional, whatever the activation, and its near-null vectors are the differences
    of such neurons. Coefficients are those of least squares.

    Args:
        model: The model.
        matrix: A K-FAC matrix of it.
        layer: As for :func:`redundant_neurons`.
        threshold: Least cosine of the outputs within a group.
        amplitude: As for :func:`redundant_neurons`.
        into: As for :func:`~ekfac.diagnostics.papers.zhang.split`.

    Raises:
        UnsupportedLayerError: If the neurons cannot be told apart downstream.
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    found = neuron_map(model, layer, into)
    reader = next(iter(found.inputs)).rpartition(".")[0]
    A = kfac_blocks(matrix)[reader].factor("A")[0]
    block = (A.shape[0] // found.width) or 1
    size = block * found.width
    # A neuron's inner product is over all its entries: positions or kernel taps.
    moment = A[:size, :size].reshape(found.width, block, found.width, block)
    moment = moment.diagonal(dim1=1, dim2=3).sum(dim=-1)
    scale = moment.diagonal().clamp(min=0).sqrt()
    tiny = torch.finfo(scale.dtype).tiny
    similarity = moment / (scale.unsqueeze(0) * scale.unsqueeze(1)).clamp(min=tiny)
    amplitudes = scale * _output_norms(dict(model.named_parameters()), found)
    result = _grouped(found, similarity, amplitudes, scale, threshold, amplitude)
    coefficients = result.coefficients.clone()
    for group in result.groups:
        for k in group[1:]:
            coefficients[k] = moment[k, group[0]] / moment[group[0], group[0]]
    return Redundancy(
        found, result.groups, result.negligible, coefficients, similarity, "factors"
    )


def _output_norms(parameters: dict[str, nn.Parameter], found: NeuronMap) -> Tensor:
    """Return the norms ``[m]`` of the neurons' output weights."""
    squares = []
    for name, (dim, block) in found.inputs.items():
        tensor = parameters[name].detach().unflatten(dim, (-1, block)).movedim(dim, 0)
        squares.append(tensor.reshape(found.width, -1).square().sum(dim=1))
    return torch.stack(squares).sum(dim=0).sqrt()


def _grouped(
    found: NeuronMap,
    similarity: Tensor,
    size: Tensor,
    norms: Tensor,
    threshold: float,
    amplitude: float,
) -> Redundancy:
    """Return greedy groups of similar neurons, from the largest down."""
    limit = amplitude * float(size.max())
    groups: list[list[int]] = []
    negligible = []
    coefficients = torch.ones_like(norms)
    for k in size.argsort(descending=True).tolist():
        if float(size[k]) <= limit:
            negligible.append(k)
            continue
        group = next(
            (g for g in groups if float(similarity[k, g[0]]) >= threshold), None
        )
        if group is None:
            groups.append([k])
            continue
        group.append(k)
        coefficients[k] = norms[k] / norms[group[0]]
    return Redundancy(
        found,
        tuple(map(tuple, groups)),
        tuple(sorted(negligible)),
        coefficients,
        similarity,
        "exact",
    )
