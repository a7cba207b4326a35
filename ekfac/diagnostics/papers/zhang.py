"""Embedding of narrow networks in wide ones, and redundant neurons.

Zhang, Zhang, Luo & Xu 2021, definition 5: a neuron ``s`` is copied, and its output
weights are shared between the copies, ``1 - alpha`` and ``alpha``. That keeps outputs,
loss and features at any parameters, and critical points (Theorem 1). It is linear:
``theta' = T theta`` and ``grad' = B grad``, from which ``H' T = B H`` and
``T^T H' T = H`` follow for the Hessians. Channels of convolutions are split in the same
way, and so are Kronecker factors. Neurons that are equal in weights or in factors are
merged again (section 3.2 and Figure 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.neuron_map import NeuronMap, neuron_map
from ekfac.diagnostics.papers.karakida import kfac_blocks
from ekfac.diagnostics.spectra import Source
from ekfac.errors import StateMismatchError
from ekfac.estimate.build import packing_of
from ekfac.estimate.data import choose, outputs_of, prepared, space_of
from ekfac.estimate.layout import lay_out
from ekfac.estimate.losses import Loss
from ekfac.matrices import BlockDiagonalMatrix, KFACMatrix, KroneckerFactors
from ekfac.spectral.operators import result
from ekfac.vectors import ParameterVector


@result
class Split:
    """One neuron split in two (definition 5); the copy becomes the last neuron.

    Attributes:
        neuron_map: Where the layer's neurons stand in the narrow network.
        neuron: ``s``.
        alpha: The copy's share of the output weights, any real number.
    """

    neuron_map: NeuronMap
    neuron: int
    alpha: float

    def index(self, like: Tensor) -> Tensor:
        """Return the old neuron that every new one is a copy of, ``[m + 1]``."""
        neurons = [*range(self.neuron_map.width), self.neuron]
        return torch.tensor(neurons, device=like.device)

    def share(self, like: Tensor) -> Tensor:
        """Return every new neuron's share of the old one's outputs, ``[m + 1]``."""
        share = like.new_ones(self.neuron_map.width + 1)
        share[self.neuron], share[-1] = 1 - self.alpha, self.alpha
        return share

    def direction(self, like: Tensor) -> Tensor:
        """Return the derivative of ``share`` with respect to ``alpha``, ``[m + 1]``."""
        direction = like.new_zeros(self.neuron_map.width + 1)
        direction[self.neuron], direction[-1] = -1, 1
        return direction

    def copied(self, tensor: Tensor, dim: int) -> Tensor:
        """Return a tensor with the neuron's entry repeated, ``m + 1`` along ``dim``."""
        return tensor.index_select(dim, self.index(tensor))

    def scaled(self, tensor: Tensor, dim: int, factor: Tensor | None = None) -> Tensor:
        """Return :meth:`copied` times each neuron's factor, by default its share."""
        factor = self.share(tensor) if factor is None else factor
        shape = [-1 if i == dim else 1 for i in range(tensor.dim())]
        return self.copied(tensor, dim) * factor.reshape(shape)

    def mapped(self, tensors: Mapping[str, Tensor], which: str) -> dict[str, Tensor]:
        """Return ``T`` (``"parameters"``), ``B`` (``"gradients"``) or ``V`` of tensors.

        ``V`` (``"direction"``) is the derivative of ``T`` with respect to ``alpha``.
        """
        result = {}
        for name, tensor in tensors.items():
            if name in self.neuron_map.outputs:
                dim = self.neuron_map.outputs[name]
                if which == "gradients":
                    tensor = self.scaled(tensor, dim)
                else:
                    tensor = self.copied(tensor, dim)
                    tensor = tensor * (which == "parameters")
            elif name in self.neuron_map.inputs:
                dim, block = self.neuron_map.inputs[name]
                tensor = tensor.unflatten(dim, (-1, block))
                if which == "gradients":
                    tensor = self.copied(tensor, dim)
                else:
                    moved = which == "direction"
                    factor = self.direction(tensor) if moved else None
                    tensor = self.scaled(tensor, dim, factor)
                tensor = tensor.flatten(dim, dim + 1)
            elif which == "direction":
                tensor = torch.zeros_like(tensor)
            result[name] = tensor
        return result


@result
class Embedding:
    """Splits one after the other, which add ``K`` neurons to a network.

    Attributes:
        splits: The splits, each of the network that the ones before it make.
    """

    splits: tuple[Split, ...]

    @property
    def num_neurons(self) -> int:
        """Number of neurons added, ``K``."""
        return len(self.splits)

    def then(self, other: Embedding) -> Embedding:
        """Return this embedding followed by one of the network that it makes."""
        return Embedding(self.splits + other.splits)

    def model(self, model: nn.Module) -> nn.Module:
        """Return the wide network; the narrow one stays as it is.

        Raises:
            StateMismatchError: If the layer's width is not that of the narrow network.
        """
        for split in self.splits:
            layer = split.neuron_map.layer
            dim = split.neuron_map.outputs[f"{layer}.weight"]
            width = model.get_parameter(f"{layer}.weight").shape[dim]
            if width != split.neuron_map.width:
                raise StateMismatchError(
                    f"layer {layer!r} has {width} neurons, the embedding is of one "
                    f"with {split.neuron_map.width}; pass the narrow network."
                )
            model = split.neuron_map.rebuilt(model, split.copied, split.scaled)
        return model

    def parameters(self, vector: Mapping[str, Tensor]) -> ParameterVector:
        """Return ``T theta``: the wide network's parameters."""
        return self._through(vector, "parameters")

    def gradients(self, vector: Mapping[str, Tensor]) -> ParameterVector:
        """Return ``B g``: the wide network's gradient, of the narrow one's.

        An identity at any parameters, for any loss of the outputs.
        """
        return self._through(vector, "gradients")

    def directions(self, vector: Mapping[str, Tensor]) -> list[ParameterVector]:
        """Return the ``K`` directions in which the outputs stay (Theorem 2).

        With ``theta`` critical, ``T theta`` plus any combination of them is.
        """
        directions = []
        for i in range(len(self.splits)):
            tensors = dict(vector)
            for j, split in enumerate(self.splits):
                tensors = split.mapped(tensors, "direction" if i == j else "parameters")
            directions.append(ParameterVector(tensors))
        return directions

    def _through(self, vector: Mapping[str, Tensor], which: str) -> ParameterVector:
        tensors = dict(vector)
        for split in self.splits:
            tensors = split.mapped(tensors, which)
        return ParameterVector(tensors)


def split(
    model: nn.Module,
    layer: str,
    neuron: int,
    *,
    alpha: float = 0.5,
    into: str | Sequence[str] | None = None,
) -> Embedding:
    """Return the embedding that splits one neuron or channel in two.

    Between the layer and those that read it, operations must act on every neuron by
    itself (activations, pooling, batch norm, flattening); :func:`check_embedding` tells
    whether they do.

    Args:
        model: The narrow network.
        layer: Name of a linear layer or a convolution.
        neuron: Number of the neuron or channel, from 0.
        alpha: The copy's share of the output weights, any real number.
        into: Names of the layers that read it, and of batch norms on the way. Default:
            found by tracing the model.

    Raises:
        UnsupportedLayerError: If the neurons cannot be told apart downstream.
        ValueError: If there is no such neuron.

    Example:
        >>> narrow = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> split(narrow, "0", 1).model(narrow)[0]
        Linear(in_features=1, out_features=3, bias=True)
    """
    neurons = neuron_map(model, layer, into)
    if not 0 <= neuron < neurons.width:
        raise ValueError(
            f"neuron must be from 0 to {neurons.width - 1} in layer {layer!r}, got "
            f"{neuron}."
        )
    return Embedding((Split(neurons, neuron, alpha),))


def split_equally(
    model: nn.Module,
    layer: str,
    neuron: int,
    copies: int,
    *,
    into: str | Sequence[str] | None = None,
) -> Embedding:
    """Return the embedding that splits one neuron into equal copies.

    Args:
        model: The narrow network.
        layer: Name of the layer whose neuron is split.
        neuron: Its number, from 0.
        copies: Number of neurons that take its place, at least 2.
        into: As for :func:`split`.

    Raises:
        ValueError: For fewer copies.
    """
    if copies < 2:
        raise ValueError(f"copies must be at least 2, got {copies}.")
    embedding, wide = Embedding(()), model
    for left in range(copies, 1, -1):
        step = split(wide, layer, neuron, alpha=1 / left, into=into)
        embedding, wide = embedding.then(step), step.model(wide)
    return embedding


@result
class EmbeddingCheck:
    """Errors of an embedding in what it should preserve.

    Attributes:
        output_error: Largest difference of the outputs, relative to the largest output.
        loss_error: Difference of the losses, relative to the narrow one's.
        gradient_error: ``|grad' - B grad| / |grad'|``; undivided at a critical point,
            where ``|grad'| < 1e-6``.
        gradient: ``|grad|_1`` of the narrow network.
        wide_gradient: ``|grad|_1`` of the wide one.
        preserved: Whether the errors are rounding errors.
    """

    output_error: float
    loss_error: float
    gradient_error: float
    gradient: float
    wide_gradient: float
    preserved: bool


def check_embedding(
    model: nn.Module, embedding: Embedding, x: Any, y: Any, loss_fn: Loss
) -> EmbeddingCheck:
    """Return how well an embedding of a network keeps outputs, loss and gradient.

    Args:
        model: The narrow network, in eval mode while it is called.
        embedding: An embedding of it.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        y: Targets.
        loss_fn: ``(outputs, y) -> loss``.
    """
    wide = embedding.model(model)
    outputs, loss, narrow_gradient = _measure(model, x, y, loss_fn)
    wide_outputs, wide_loss, wide_gradient = _measure(wide, x, y, loss_fn)
    expected = embedding.gradients(narrow_gradient)
    difference, size = float((wide_gradient - expected).norm()), wide_gradient.norm()
    output_error = float((wide_outputs - outputs).abs().max() / outputs.abs().max())
    loss_error = abs(wide_loss - loss) / (abs(loss) or 1.0)
    gradient_error = difference if size < 1e-6 else difference / float(size)
    tolerance = 1e3 * torch.finfo(outputs.dtype).eps
    return EmbeddingCheck(
        output_error,
        loss_error,
        gradient_error,
        float(narrow_gradient.flat().abs().sum()),
        float(wide_gradient.flat().abs().sum()),
        max(output_error, loss_error, gradient_error) < tolerance,
    )


def _measure(
    model: nn.Module, x: Any, y: Any, loss_fn: Loss
) -> tuple[Tensor, float, ParameterVector]:
    """Return outputs, loss and gradient."""
    params = choose(model, None)
    with prepared(model, params):
        outputs = outputs_of(model, x)
        loss = loss_fn(outputs, y)
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    gradient = ParameterVector(dict(zip(params, grads, strict=True)))
    return outputs.detach(), float(loss.detach()), gradient


def embedded_factors(
    embedding: Embedding, model: nn.Module, matrix: BlockDiagonalMatrix
) -> BlockDiagonalMatrix:
    """Return the K-FAC matrix of the wide network, without data.

    ``A' = P A P^T`` repeats the row and column of the neuron's outputs, ``G' = S G
    S^T`` divides those of its gradient between the copies: exactly the estimate on the
    same data. Ranks stay, so every split adds a null vector to ``A`` of the layers that
    read the neuron and one to ``G`` of its own. Scalings do not carry over, since the
    repeated rows change the eigenbasis.

    Args:
        embedding: An embedding of the model.
        model: The narrow network.
        matrix: Its K-FAC matrix.

    Raises:
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    factors = {
        name: (block.factor("A"), block.factor("G"))
        for name, block in kfac_blocks(matrix).items()
    }
    for split in embedding.splits:
        readers = {name.rpartition(".")[0] for name in split.neuron_map.inputs}
        for name, (A, G) in factors.items():
            if name in readers:
                A = _repeated(A, split)
            if name == split.neuron_map.layer:
                G = split.scaled(split.scaled(G, 1), 2)
            factors[name] = A, G
    wide = embedding.model(model)
    params = choose(wide, matrix.space.names)
    with prepared(wide, params):
        layout = lay_out(wide, params, "kfac", None)
    space = space_of(params)
    blocks = {}
    for block in layout.blocks:
        A, G = factors[block.name]
        layer = KroneckerFactors(packing_of(block), A=A, G=G)
        blocks[block.name] = KFACMatrix(layer, space.subspace(block.parameters))
    return BlockDiagonalMatrix(space, blocks)


def _repeated(A: Tensor, split: Split) -> Tensor:
    """Return ``[b, d, d]`` with the neuron's rows and columns repeated.

    The bias's, where there is one, stays last.
    """
    width = split.neuron_map.width
    block = A.shape[-1] // width
    index = split.neuron_map.expanded(split.index(A), block)
    index = torch.cat([index, torch.arange(block * width, A.shape[-1]).to(index)])
    return A.index_select(1, index).index_select(2, index)


@result
class Redundancy:
    """Groups of neurons of a layer that can be merged.

    Attributes:
        neuron_map: Where the layer's neurons stand.
        groups: The neurons of each group; the first stands for all.
        negligible: Neurons whose amplitude is too small, in no group.
        coefficients: ``[m]``, each neuron as a multiple of its group's first.
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
        representatives = torch.tensor([group[0] for group in self.groups])
        weights = torch.zeros(len(self.groups), self.neuron_map.width)
        for i, group in enumerate(self.groups):
            for k in group:
                weights[i, k] = self.coefficients[k]

        def outputs(tensor: Tensor, dim: int) -> Tensor:
            return tensor.index_select(dim, representatives.to(tensor.device))

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
    neurons = neuron_map(model, layer, into)
    parameters = dict(model.named_parameters())
    rows = []
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in neurons.outputs:
            tensor = parameters[name].detach().movedim(neurons.outputs[name], 0)
            rows.append(tensor.reshape(neurons.width, -1))
    inputs = torch.cat(rows, dim=1)
    norms = inputs.norm(dim=1)
    size = norms * _output_norms(parameters, neurons)
    units = inputs / norms.clamp(min=torch.finfo(norms.dtype).tiny).unsqueeze(1)
    ratios = norms if activation == "homogeneous" else torch.ones_like(norms)
    return _grouped(neurons, units @ units.mT, size, ratios, threshold, amplitude)


def redundant_neurons_of_factors(
    model: nn.Module,
    matrix: BlockDiagonalMatrix,
    layer: str,
    *,
    threshold: float = 0.99,
    amplitude: float = 0.02,
    into: str | Sequence[str] | None = None,
) -> Redundancy:
    """Return neurons whose outputs on the data are proportional.

    Read off the input factor ``A`` of the layer that reads them, the second moment of
    their outputs, whatever the activation. Coefficients are those of least squares.

    Args:
        model: The model.
        matrix: A K-FAC matrix of it, with the layer that reads the neurons.
        layer: As for :func:`redundant_neurons`.
        threshold: Least cosine of the outputs within a group.
        amplitude: As for :func:`redundant_neurons`.
        into: As for :func:`~ekfac.diagnostics.papers.zhang.split`.

    Raises:
        UnsupportedLayerError: If the neurons cannot be told apart downstream.
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    neurons = neuron_map(model, layer, into)
    reader = next(iter(neurons.inputs)).rpartition(".")[0]
    A = kfac_blocks(matrix)[reader].factor("A")[0]
    block = (A.shape[0] // neurons.width) or 1
    size = block * neurons.width
    # A neuron's inner product is over all its entries: positions or kernel taps.
    moment = A[:size, :size].reshape(neurons.width, block, neurons.width, block)
    moment = moment.diagonal(dim1=1, dim2=3).sum(dim=-1)
    scale = moment.diagonal().clamp(min=0).sqrt()
    tiny = torch.finfo(scale.dtype).tiny
    similarity = moment / (scale.unsqueeze(0) * scale.unsqueeze(1)).clamp(min=tiny)
    amplitudes = scale * _output_norms(dict(model.named_parameters()), neurons)
    found = _grouped(neurons, similarity, amplitudes, scale, threshold, amplitude)
    for first, *others in found.groups:
        for k in others:
            found.coefficients[k] = moment[k, first] / moment[first, first]
    return replace(found, source="factors")


def _output_norms(parameters: dict[str, nn.Parameter], neurons: NeuronMap) -> Tensor:
    """Return the norms ``[m]`` of the neurons' output weights."""
    squares = []
    for name, (dim, block) in neurons.inputs.items():
        tensor = parameters[name].detach().unflatten(dim, (-1, block)).movedim(dim, 0)
        squares.append(tensor.reshape(neurons.width, -1).square().sum(dim=1))
    return torch.stack(squares).sum(dim=0).sqrt()


def _grouped(
    neurons: NeuronMap,
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
        neurons,
        tuple(map(tuple, groups)),
        tuple(sorted(negligible)),
        coefficients,
        similarity,
        "exact",
    )
