"""Embedding of narrow networks in wide ones, and redundant neurons.

Zhang, Zhang, Luo & Xu 2021, definition 5: a neuron ``s`` is copied, and its output
weights are shared between the copies, ``1 - alpha`` and ``alpha``. That keeps outputs,
loss and features at any parameters, and critical points (Theorem 1). The linear maps
behind it are explicit here: ``theta' = T theta`` and ``grad' = B grad``, from which
``H' T = B H`` and ``T^T H' T = H`` follow for the Hessians. The channels of
convolutions are split in the same way. Kronecker factors embed too. Neurons that do
the same, in weights or in factors, are merged again (section 3.2 and Figure 5).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.diagnostics.papers.karakida import kfac_blocks
from ekfac.diagnostics.spectra import Source
from ekfac.errors import StateMismatchError, UnsupportedLayerError
from ekfac.estimate.build import packing_of
from ekfac.estimate.data import choose, outputs_of, prepared, space_of
from ekfac.estimate.layout import lay_out
from ekfac.matrices import BlockDiagonalMatrix, KFACMatrix, KroneckerFactors
from ekfac.spectral.operators import result
from ekfac.vectors import ParameterVector

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Modules that act on each neuron by itself, with one parameter or buffer entry each.
_PER_NEURON = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Modules that mix the neurons, with parameters or without.
_MIXING = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.Softmax,
    nn.LogSoftmax,
    nn.GLU,
    nn.PixelShuffle,
)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MAPS = (nn.Linear, *_CONV, *_TRANSPOSED)

Along = Callable[[Tensor, int], Tensor]


@result
class NeuronMap:
    """Positions of a layer's neurons (or channels) in a network's tensors.

    Attributes:
        layer: The layer's name.
        width: Number of neurons.
        outputs: Name of a parameter or buffer -> its dimension over the neurons.
        inputs: Name of a weight that reads the neurons -> its dimension over them and
            how many entries each has there (positions, after a flattened convolution).
    """

    layer: str
    width: int
    outputs: dict[str, int]
    inputs: dict[str, tuple[int, int]]

    def expanded(self, index: Tensor, block: int) -> Tensor:
        """Return entries of neurons ``[k]`` as entries of inputs ``[k block]``."""
        offsets = torch.arange(block, device=index.device)
        return (index.unsqueeze(1) * block + offsets).flatten()

    def rebuilt(self, model: nn.Module, outputs: Along, inputs: Along) -> nn.Module:
        """Return a copy of the model with other tensors at the neurons.

        Args:
            model: The model.
            outputs: New tensor of an old one and its dimension over the neurons.
            inputs: Likewise for weights that read them, ``[*, width block, *]`` seen as
                ``[*, width, block, *]`` with the dimension that of ``width``.
        """
        wide = copy.deepcopy(model)
        for name, dim in self.outputs.items():
            owner, last = _owner(wide, name)
            _replace(owner, last, outputs(getattr(owner, last).detach(), dim))
        for name, (dim, block) in self.inputs.items():
            owner, last = _owner(wide, name)
            old = getattr(owner, last).detach()
            new = inputs(old.unflatten(dim, (-1, block)), dim)
            _replace(owner, last, new.flatten(dim, dim + 1))
        return wide


def neuron_map(
    model: nn.Module, layer: str, into: str | Sequence[str] | None = None
) -> NeuronMap:
    """Return where the neurons of a layer stand.

    Args:
        model: A model that ``torch.fx`` can trace, unless ``into`` is given.
        layer: Name of a linear layer or a convolution.
        into: Names of the layers that read it, and of batch norms on the way. Default:
            found by tracing.

    Raises:
        UnsupportedLayerError: If the neurons cannot be told apart downstream.
    """
    modules = dict(model.named_modules())
    source = modules.get(layer)
    if not isinstance(source, _MAPS):
        linear = [name for name, m in modules.items() if isinstance(m, _MAPS)]
        found = "no such module" if source is None else type(source).__name__
        raise UnsupportedLayerError(
            f"layer {layer!r} is {found}; neurons are those of one of {linear}."
        )
    names = [into] if isinstance(into, str) else into
    followers = list(_traced(model, layer) if names is None else names)
    _require_untied(model, [layer, *followers])
    _require_ungrouped(layer, source)
    own = 1 if isinstance(source, _TRANSPOSED) else 0
    width = source.weight.shape[own]
    outputs = {f"{layer}.weight": own}
    if source.bias is not None:
        outputs[f"{layer}.bias"] = 0
    inputs: dict[str, tuple[int, int]] = {}
    for name in followers:
        module = modules[name]
        if isinstance(module, _MAPS):
            _require_ungrouped(name, module)
            dim = 0 if isinstance(module, _TRANSPOSED) else 1
            inputs[f"{name}.weight"] = dim, _block(name, module, dim, width)
        else:
            outputs |= {f"{name}.{key}": 0 for key in _entries(module, width)}
    if not inputs:
        raise UnsupportedLayerError(
            f"No layer reads layer {layer!r}: its neurons are the network's outputs; "
            "choose a hidden layer."
        )
    return NeuronMap(layer, width, outputs, inputs)


def _traced(model: nn.Module, layer: str) -> Iterator[str]:
    """Yield the modules with entries for the neurons, up to the next linear maps."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise UnsupportedLayerError(
            f"{type(model).__name__} cannot be traced ({error}); name the layers that "
            f"read {layer!r}, and batch norms on the way, with into=[...]."
        ) from error
    modules = dict(model.named_modules())
    starts = [n for n in graph.nodes if n.op == "call_module" and n.target == layer]
    if len(starts) != 1:
        raise UnsupportedLayerError(
            f"layer {layer!r} is called {len(starts)} times; only a layer that is "
            "called once can be given other neurons."
        )
    waiting, seen = list(starts[0].users), set()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.op == "output":
            raise UnsupportedLayerError(
                f"The neurons of layer {layer!r} are outputs of the network; choose a "
                "hidden layer."
            )
        if len(node.all_input_nodes) > 1:
            raise UnsupportedLayerError(
                f"The neurons of layer {layer!r} are combined with others in "
                f"{node.name!r}; choose a layer inside the branch."
            )
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _MIXING):
            raise UnsupportedLayerError(
                f"{type(module).__name__} {node.target!r} mixes the neurons of layer "
                f"{layer!r}; choose a layer that is not followed by it."
            )
        if isinstance(module, nn.Module) and [*module.parameters(), *module.buffers()]:
            _require_known(module)
            yield str(node.target)
        if not isinstance(module, _MAPS):
            waiting += list(node.users)


def _require_known(module: nn.Module) -> None:
    """Raise unless the module can be given another number of neurons."""
    if not isinstance(module, (*_MAPS, *_PER_NEURON, nn.PReLU)):
        raise UnsupportedLayerError(
            f"{type(module).__name__} reads the neurons; only linear layers, "
            "convolutions, batch norms and PReLU can be given other numbers of them."
        )


def _entries(module: nn.Module, width: int) -> list[str]:
    """Return the names of the tensors with an entry for every neuron."""
    _require_known(module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [name for name, tensor in tensors.items() if tensor.shape == (width,)]


def _block(name: str, module: nn.Module, dim: int, width: int) -> int:
    """Return how many inputs each neuron is for a layer that reads them."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    size = weight.shape[dim]
    if size % width or (size != width and not isinstance(module, nn.Linear)):
        raise UnsupportedLayerError(
            f"layer {name!r} has {size} inputs, no multiple of the {width} neurons; "
            "it reads something else as well."
        )
    return size // width


def _require_ungrouped(name: str, module: nn.Module) -> None:
    groups = getattr(module, "groups", 1)
    if groups != 1:
        raise UnsupportedLayerError(
            f"layer {name!r} has {groups} groups; only whole convolutions can be given "
            "other numbers of channels."
        )


def _require_untied(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise if a parameter of the layers belongs to another module as well."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for names in owners.values():
        if len(names) > 1 and any(n.rpartition(".")[0] in layers for n in names):
            raise UnsupportedLayerError(
                f"{names} are one parameter; tied layers cannot be given other neurons."
            )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor of another shape into a module and correct what it says of it."""
    if name in module._parameters:
        old = module._parameters[name]
        assert old is not None
        module._parameters[name] = nn.Parameter(tensor, old.requires_grad)
    else:
        module._buffers[name] = tensor
    if name != "weight" and not isinstance(module, _PER_NEURON):
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    elif isinstance(module, _CONV):
        module.out_channels, module.in_channels = tensor.shape[:2]
    elif isinstance(module, _TRANSPOSED):
        module.in_channels, module.out_channels = tensor.shape[:2]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(tensor)
    elif isinstance(module, _PER_NEURON):
        module.num_features = len(tensor)


Loss = Callable[[Tensor, Any], Tensor]


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
        """Return which old neuron every new one is, ``[m + 1]``."""
        neurons = [*range(self.neuron_map.width), self.neuron]
        return torch.tensor(neurons, device=like.device)

    def share(self, like: Tensor) -> Tensor:
        """Return every new neuron's share of the old one's outputs, ``[m + 1]``."""
        share = like.new_ones(self.neuron_map.width + 1)
        share[self.neuron], share[-1] = 1 - self.alpha, self.alpha
        return share

    def direction(self, like: Tensor) -> Tensor:
        """Return the derivative of ``share`` with respect to ``alpha``."""
        direction = like.new_zeros(self.neuron_map.width + 1)
        direction[self.neuron], direction[-1] = -1, 1
        return direction

    def copied(self, tensor: Tensor, dim: int) -> Tensor:
        """Return a tensor with the neuron's entry repeated."""
        return tensor.index_select(dim, self.index(tensor))

    def scaled(self, tensor: Tensor, dim: int, factor: Tensor | None = None) -> Tensor:
        """Return a tensor with the neuron's entry shared out."""
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
    """Splits one after the other: a network of ``K`` more neurons.

    Attributes:
        splits: The splits, each of the network that the ones before it make.
    """

    splits: tuple[Split, ...]

    @property
    def num_neurons(self) -> int:
        """How many neurons are added, ``K``."""
        return len(self.splits)

    def then(self, other: Embedding) -> Embedding:
        """Return this embedding followed by one of the network that it makes."""
        return Embedding(self.splits + other.splits)

    def model(self, model: nn.Module) -> nn.Module:
        """Return the wide network; the narrow one stays as it is.

        Raises:
            StateMismatchError: If the layer has not as many neurons as it had.
        """
        for split in self.splits:
            layer = split.neuron_map.layer
            dim = split.neuron_map.outputs[f"{layer}.weight"]
            found = model.get_parameter(f"{layer}.weight").shape[dim]
            if found != split.neuron_map.width:
                raise StateMismatchError(
                    f"layer {layer!r} has {found} neurons, the embedding is of one "
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
        found = []
        for i in range(len(self.splits)):
            tensors = dict(vector)
            for j, split in enumerate(self.splits):
                tensors = split.mapped(tensors, "direction" if i == j else "parameters")
            found.append(ParameterVector(tensors))
        return found

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

    Between the layer and those that read it every neuron must be treated for itself
    (activations, pooling, batch norm, flattening); :func:`check_embedding` tells.

    Args:
        model: The narrow network.
        layer: Name of a linear layer or a convolution.
        neuron: Which neuron or channel.
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
    found = neuron_map(model, layer, into)
    if not 0 <= neuron < found.width:
        raise ValueError(
            f"neuron must be from 0 to {found.width - 1} in layer {layer!r}, got "
            f"{neuron}."
        )
    return Embedding((Split(found, neuron, alpha),))


def split_equally(
    model: nn.Module,
    layer: str,
    neuron: int,
    copies: int,
    *,
    into: str | Sequence[str] | None = None,
) -> Embedding:
    """Return the embedding that splits one neuron into equal copies.

    The arguments are those of :func:`split`; ``copies`` is at least 2.
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
    """What an embedding preserves, measured.

    Attributes:
        output_error: Largest difference of the outputs, relative to the largest output.
        loss_error: Difference of the losses, relative to the narrow one's.
        gradient_error: ``|grad' - B grad| / |grad'|`` or, at a critical point, over 1.
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
    difference = (wide_gradient - expected).norm()
    output_error = float((wide_outputs - outputs).abs().max() / outputs.abs().max())
    loss_error = abs(wide_loss - loss) / (abs(loss) or 1.0)
    gradient_error = float(difference / wide_gradient.norm().clamp(max=1))
    if float(wide_gradient.norm()) < 1e-6:
        gradient_error = float(difference)
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
    chosen = choose(model, None)
    with prepared(model, chosen):
        outputs = outputs_of(model, x)
        loss = loss_fn(outputs, y)
        grads = torch.autograd.grad(loss, list(chosen.values()), materialize_grads=True)
    gradient = ParameterVector(dict(zip(chosen, grads, strict=True)))
    return outputs.detach(), float(loss.detach()), gradient


def embedded_factors(
    embedding: Embedding, model: nn.Module, matrix: BlockDiagonalMatrix
) -> BlockDiagonalMatrix:
    """Return the K-FAC matrix of the wide network, without data.

    ``A' = P A P^T`` repeats the row and column of the neuron's outputs, ``G' = S G
    S^T`` shares those of its gradient out. Exactly what an estimate on the same data
    gives; ranks stay, so that every split adds a null vector to ``A`` of the layers
    that read the neuron and one to ``G`` of its own. Scalings in an eigenbasis do not
    carry over: the repeated rows change the basis.

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
    chosen = choose(wide, matrix.space.names)
    with prepared(wide, chosen):
        layout = lay_out(wide, chosen, "kfac", None)
    space = space_of(chosen)
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
