"""Neurons of a layer: their positions in a network's tensors, and their exchange.

What follows the layer is found by ``torch.fx``, or named by the caller.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from ekfac.errors import UnsupportedLayerError
from ekfac.spectral.operators import result

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
        inputs: Name of a weight that reads the neurons -> its dimension over them, and
            the entries of each neuron there (positions, after a flattened convolution).
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
        copied = copy.deepcopy(model)
        for name, dim in self.outputs.items():
            owner, last = _owner(copied, name)
            _replace(owner, last, outputs(getattr(owner, last).detach(), dim))
        for name, (dim, block) in self.inputs.items():
            owner, last = _owner(copied, name)
            old = getattr(owner, last).detach()
            new = inputs(old.unflatten(dim, (-1, block)), dim)
            _replace(owner, last, new.flatten(dim, dim + 1))
        return copied


def neuron_map(
    model: nn.Module, layer: str, into: str | Sequence[str] | None = None
) -> NeuronMap:
    """Return the positions of a layer's neurons in the network's tensors.

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
        kind = "no such module" if source is None else type(source).__name__
        raise UnsupportedLayerError(
            f"layer {layer!r} is {kind}; neurons are those of one of {linear}."
        )
    names = [into] if isinstance(into, str) else into
    followers = list(_traced(model, layer) if names is None else names)
    _require_untied(model, [layer, *followers])
    _require_ungrouped(layer, source)
    dim_out = 1 if isinstance(source, _TRANSPOSED) else 0
    width = source.weight.shape[dim_out]
    outputs = {f"{layer}.weight": dim_out}
    if source.bias is not None:
        outputs[f"{layer}.bias"] = 0
    inputs: dict[str, tuple[int, int]] = {}
    for name in followers:
        if name not in modules:
            raise UnsupportedLayerError(
                f"into names {name!r}, which the model lacks; name modules that read "
                f"layer {layer!r}, from {[n for n in modules if n]}."
            )
        module = modules[name]
        if isinstance(module, _MAPS):
            _require_ungrouped(name, module)
            dim = 0 if isinstance(module, _TRANSPOSED) else 1
            inputs[f"{name}.weight"] = dim, _block(name, module, dim, width)
        else:
            outputs |= {f"{name}.{key}": 0 for key in _entries(name, module, width)}
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
            _require_known(str(node.target), module)
            yield str(node.target)
        if not isinstance(module, _MAPS):
            waiting += list(node.users)


def _require_known(name: str, module: nn.Module) -> None:
    """Raise unless the module can be given another number of neurons."""
    if not isinstance(module, (*_MAPS, *_PER_NEURON, nn.PReLU)):
        raise UnsupportedLayerError(
            f"{type(module).__name__} {name!r} reads the neurons; only linear layers, "
            "convolutions, batch norms and PReLU can be given other numbers of them."
        )


def _entries(name: str, module: nn.Module, width: int) -> list[str]:
    """Return the names of the tensors with an entry for every neuron."""
    _require_known(name, module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return [name for name, tensor in tensors.items() if tensor.shape == (width,)]


def _block(name: str, module: nn.Module, dim: int, width: int) -> int:
    """Return the number of inputs that each neuron is for a layer that reads it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    size = weight.shape[dim]
    if size % width or (size != width and not isinstance(module, nn.Linear)):
        raise UnsupportedLayerError(
            f"layer {name!r} has {size} inputs, no multiple of the {width} neurons: it "
            "reads other things as well; choose another layer."
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
    """Put a tensor of another shape into a module, and correct its size attributes."""
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
