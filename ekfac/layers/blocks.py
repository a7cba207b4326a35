"""Blocks of a model: its covered parameters, and why the others are not covered."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ekfac.layers.base import (
    ADVICE,
    FINE,
    Adapter,
    because,
    is_sharded,
)
from ekfac.layers.code_names import is_plain_linear, use_others
from ekfac.layers.conv import ConvAdapter, uncorrelated
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter
from ekfac.layers.norm import ChannelNormAdapter, TrailingNormAdapter
from ekfac.layers.operands import FunctionalLinearAdapter, OperandAdapter
from ekfac.layers.recognised import RowLinearAdapter, find_adapter
from ekfac.vectors import clean, named_parameters, unwrap

ConvFactors = Literal["patches", "spatially_uncorrelated"]

# Of a summary: lines, and parameters named in one.
LINES = 8
NAMED = 3
NOWHERE = "it is in no module of the model; pass the one that holds it as model="
# Sides up to this width have a full basis: there is nothing to save.
NARROW = 64


@dataclass(eq=False)
class Use:
    """One module that a block's weight is used in.

    Attributes:
        name: The module's qualified name.
        adapter: How the module is read.
        transposed: The module uses the transpose of the block's matrix, as an output
            head tied to an embedding does; its inputs and output gradients then
            change roles.
    """

    name: str
    adapter: Adapter
    transposed: bool = False


@dataclass(eq=False)
class Block:
    """The parameters of one layer, as ``b`` matrices ``[d_out, d_in]``.

    Attributes:
        name: The layer's name: its first module's, without wrappers' prefixes.
        uses: The modules that share the weight.
        parameters: Qualified names of weight and, if there is one, bias.
        shape: ``(b, d_out, d_in)``.
        diagonal: Whether the input factor and the output factor are diagonal.
        exact: The block is kept exactly, see :class:`Adapter`.
        turned: Operations may use the transpose of the block's matrix, see
            :class:`ekfac.layers.base.CallForm`.
        pinned: The parameters that an optimizer trains, whatever the modules hold now:
            others for the time of a pass (``fully_shard``, ``functional_call``), or
            since the model was changed.
        sizes: Their shapes when they were pinned.
    """

    name: str
    uses: list[Use]
    parameters: tuple[str, ...]
    shape: tuple[int, int, int]
    diagonal: tuple[bool, bool]
    exact: bool
    turned: bool = False
    pinned: list[nn.Parameter] | None = None
    sizes: tuple[torch.Size, ...] = ()

    @property
    def adapter(self) -> Adapter:
        """The first use's adapter, which defines the block's form."""
        return self.uses[0].adapter

    @property
    def shared(self) -> bool:
        """Whether all blocks have the same two factors."""
        return self.adapter.shared_factors

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """``(b, d_out, d_in)`` of the matrices that have factors of their own."""
        b, d_out, d_in = self.shape
        return 1 if self.shared else b, d_out, d_in

    @property
    def dtype(self) -> torch.dtype:
        """In which type its statistics are kept: that of the weight, or float32."""
        return torch.promote_types(self.tensors()[0].dtype, torch.float32)

    @property
    def mixed(self) -> bool:
        """Whether the weight is used both as it is and transposed."""
        return self.turned or any(use.transposed for use in self.uses)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``[b, d_out, d_in]`` of whole parameters in ``parameters``' order."""
        slots = self.adapter.slots()
        views = [slot.of(tensor) for slot, tensor in zip(slots, tensors, strict=True)]
        return self.adapter.pack(views[0], views[1] if len(views) > 1 else None)

    def pack_into_(self, out: Tensor, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``out`` ``[b, d_out, d_in]`` by :meth:`pack`, at one copy."""
        parts = self.unpack(out)
        memory = out.untyped_storage().data_ptr()
        if any(part.untyped_storage().data_ptr() != memory for part in parts):
            out.copy_(self.pack(tensors))  # its form is not a view
            return
        slots = self.adapter.slots()
        for part, slot, tensor in zip(parts, slots, tensors, strict=True):
            part.copy_(slot.of(tensor))

    def unpack(self, matrix: Tensor) -> list[Tensor]:
        """Return weight and bias of ``[b, d_out, d_in]``, each of its slot's shape."""
        weight, bias = self.adapter.unpack(matrix)
        return [weight] if bias is None else [weight, bias]

    def tensors(self) -> list[nn.Parameter]:
        """Return the whole parameters, in ``parameters``' order."""
        if self.pinned is not None:
            return self.pinned
        return [self.adapter.parameter(slot) for slot in self.adapter.slots()]

    def pin(self) -> None:
        """Stay with the present parameters."""
        self.pinned = self.tensors()
        self.sizes = tuple(parameter.shape for parameter in self.pinned)

    @property
    def sharded(self) -> bool:
        """Whether the pinned parameters are sharded."""
        return self.pinned is not None and any(map(is_sharded, self.pinned))

    @property
    def is_reached(self) -> bool:
        """Whether the weight's gradient is there; of a stack's part, is not zero.

        The gradient of a stack of experts has zeros for those that no row was sent to.
        """
        slot, grad = self.adapter.weight, self.tensors()[0].grad
        if grad is None or slot.rows is None or is_sharded(grad):
            return grad is not None
        return bool(slot.of(grad).any())

    def is_used_by(self, use: Use) -> bool:
        """Return whether a module still holds the block's weight as it was pinned.

        Sharded parameters do not tell: others stand in for them during a pass.
        """
        if self.pinned is None or self.sharded:
            return True
        weight = use.adapter.held(use.adapter.weight)
        return weight is self.pinned[0] and weight.shape == self.sizes[0]


def unseen(blocks: Iterable[Block]) -> str:
    """Return why blocks have no statistics, a line for each reason."""
    by_name = {block.name: block for block in blocks}
    sizes = {name: math.prod(block.shape) for name, block in by_name.items()}
    return grouped({n: reason_unseen(block) for n, block in by_name.items()}, sizes)


def structure(model: nn.Module) -> list[object]:
    """Return what a model's blocks rest on, to notice by comparing that it changed.

    Its modules by their places, and each one's parameters by identity and shape.
    """
    result: list[object] = []
    waiting, seen = [model], set()
    while waiting:
        module = waiting.pop()
        result.append(id(module))
        if module in seen:
            continue
        seen.add(module)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                result += (name, id(parameter), _shape(parameter))
        for name, child in module._modules.items():
            if child is not None:
                result.append(name)
                waiting.append(child)
    return result


def _shape(parameter: nn.Parameter) -> torch.Size | None:
    """Return a parameter's shape, ``None`` if it is lazy and has none yet."""
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return None if lazy else parameter.shape


# Where a parameter is: names of modules, the modules, and its names in them.
Places = frozenset[tuple[str, nn.Module, str]]


def places(model: nn.Module) -> dict[Tensor, Places]:
    """Return where each parameter of a model is; a tied one is in several places."""
    result: dict[Tensor, set[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holder = clean(model, path), module, name
                result.setdefault(parameter, set()).add(holder)
    return {parameter: frozenset(holders) for parameter, holders in result.items()}


def shortened(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def grouped(reasons: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Return a line for each reason: whose it is, and of how many elements."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    elements = {
        reason: sum(sizes[name] for name in members)
        for reason, members in groups.items()
    }
    lines = [
        f"  {shortened(groups[reason])} ({reason}): {elements[reason]:,} elements"
        for reason in sorted(groups, key=lambda reason: -elements[reason])[:LINES]
    ]
    if len(groups) > LINES:
        lines.append(f"  and for {len(groups) - LINES} other reasons")
    return "\n".join(lines)


@dataclass
class Coverage:
    """The blocks of a model and the reasons of what is left.

    Attributes:
        blocks: The blocks, in the model's order.
        reasons: Name of every trained parameter in no block -> why.
        rest: Name of every such parameter -> the parameter.
    """

    blocks: list[Block] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    rest: dict[str, nn.Parameter] = field(default_factory=dict)

    def summary(self, names: Collection[str]) -> str:
        """Return why parameters are in no block, a line for each reason.

        Args:
            names: Which of them.
        """
        sizes = {name: self.rest[name].numel() for name in names}
        return grouped({name: self.reasons[name] for name in names}, sizes)


# Parameter and rows of it -> the block that they are the weight or bias of.
Owners = dict[tuple[int, tuple[int, int] | None], Block]


@dataclass(frozen=True)
class Limits:
    """Which sides of a block have a diagonal factor because of their width.

    Attributes:
        max_dim: Sides wider than this.
        max_aspect: Sides this many times as wide as the other, and wider than
            ``NARROW``.
    """

    max_dim: int
    max_aspect: float = math.inf

    def exceeded(self, width: int, other: int) -> bool:
        """Return whether a side's factor is to be diagonal."""
        uneven = width > NARROW and width > self.max_aspect * other
        return width > self.max_dim or uneven


def find_blocks(
    model: nn.Module,
    trained: Collection[nn.Parameter],
    max_dim: int,
    max_aspect: float = math.inf,
    conv_factors: ConvFactors = "patches",
) -> Coverage:
    """Find the blocks of ``model`` over the ``trained`` parameters.

    Args:
        model: The network, wrapped or not.
        trained: The parameters that the optimizer was given and that are in no block
            of it yet.
        max_dim: A side of a block wider than this gets a diagonal factor.
        max_aspect: A side that many times as wide as the other, too.
        conv_factors: What input factors of convolutions are over, see
            :class:`ekfac.EKFAC`.

    Returns:
        The blocks and, for every other trained parameter, why it is in none.
    """
    model = unwrap(model)
    coverage, limits = Coverage(), Limits(max_dim, max_aspect)
    ids = {id(p) for p in trained}
    owners: Owners = {}
    skipped: set[str] = set()
    why: dict[int, str] = {}
    for path, module in model.named_modules():
        name = clean(model, path)
        if name in skipped:
            continue
        adapter = find_adapter(module)
        refused = isinstance(adapter, str)
        for parameter in module.parameters(recurse=refused):  # of parametrizations too
            why.setdefault(id(parameter), _left_out(module, adapter, parameter))
        if adapter is None or isinstance(adapter, str):
            continue
        if conv_factors == "spatially_uncorrelated":
            adapter = uncorrelated(adapter, module)
        skipped |= {f"{name}.{child}".lstrip(".") for child in adapter.children}
        for suffix, part in adapter.build(module).items():
            part_name = f"{name}.{suffix}".strip(".")
            _place(part, part_name, name, ids, owners, why, limits, coverage)
    names = {id(p): name for name, p in named_parameters(model).items()}
    covered = {id(p) for block in coverage.blocks for p in block.tensors()}
    for number, parameter in enumerate(trained):
        if id(parameter) not in covered:
            outside = f"(parameter {number}, outside the model)"
            name = names.get(id(parameter), outside)
            coverage.reasons[name] = why.get(id(parameter), NOWHERE)
            coverage.rest[name] = parameter
    return coverage


def _left_out(
    module: nn.Module, adapter: type[Adapter] | str | None, parameter: nn.Parameter
) -> str:
    """Return why a parameter of a module is in no block if no adapter takes it."""
    if isinstance(adapter, str):
        reason, _, advice = adapter.partition("; ")
        return because(module, reason, advice or FINE)
    sizes = _shape(parameter)
    if sizes is not None and sum(size > 1 for size in sizes) <= 1:
        return because(module, "a vector by itself, which AdamW's rule suits")
    if adapter is None:
        return because(module, "it has no adapter", ADVICE)
    return because(module, "its adapter leaves it out", ADVICE)


def reason_unseen(block: Block) -> str:
    """Return why a block whose parameters have gradients has no statistics."""
    if isinstance(block.adapter, OperandAdapter):
        reason = "it is used in no known operation, or by a function of it"
        return because(block.adapter.module, reason, ADVICE)
    reason = "it is not called in a training forward, or no watched output needs it"
    advice = "call the module, or register an adapter for what uses its weight"
    return because(block.adapter.module, reason, advice)


def _place(
    adapter: Adapter,
    name: str,
    module_name: str,
    ids: set[int],
    owners: Owners,
    why: dict[int, str],
    limits: Limits,
    coverage: Coverage,
) -> None:
    """Make a block of ``adapter``, or one more use of the block that has its weight."""
    weight = adapter.parameter(adapter.weight)
    rest = [id(adapter.parameter(slot)) for slot in adapter.slots()[1:]]
    if id(weight) not in ids or not weight.requires_grad:
        frozen = "the weight beside it is not trained, or was before it"
        why.update(dict.fromkeys(rest, because(adapter.module, frozen)))
        return
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"layer {name!r} is lazy and has no shape yet; run one forward pass "
            "before constructing the optimizer."
        )
    shared = owners.get((id(weight), adapter.weight.rows))
    if shared is not None:
        _share(shared, adapter, name, why, limits)
        return
    _keep_bias(adapter, ids, owners, why, limits)
    reason = _reason_against(adapter, weight, limits)
    if reason is not None:
        why.update(dict.fromkeys([id(weight), *rest], reason))
        return
    slots = adapter.slots()
    block = Block(
        name,
        [Use(name, adapter)],
        tuple(f"{module_name}.{slot.name}".lstrip(".") for slot in slots),
        adapter.matrix_shape(),
        _diagonal(adapter, limits),
        adapter.family == "exact",
    )
    for slot in slots:
        owners[id(adapter.parameter(slot)), slot.rows] = block
    coverage.blocks.append(block)


def _keep_bias(
    adapter: Adapter, ids: set[int], owners: Owners, why: dict[int, str], limits: Limits
) -> None:
    """Leave out a bias that is not trained, or that layers of other weights share."""
    if adapter.bias is None:
        return
    bias = adapter.parameter(adapter.bias)
    if id(bias) not in ids or not bias.requires_grad:
        adapter.bias = None
    elif (id(bias), adapter.bias.rows) in owners:
        why[id(bias)] = because(adapter.module, "layers of different weights share it")
        _drop_bias(owners[id(bias), adapter.bias.rows], limits)
        adapter.bias = None


def _reason_against(
    adapter: Adapter, weight: nn.Parameter, limits: Limits
) -> str | None:
    """Return why a weight can have no block, ``None`` if it can."""
    if not weight.is_floating_point():
        reason = f"its dtype is {weight.dtype}"
        return because(adapter.module, reason, "blocks are for real numbers")
    if not weight.numel():
        return because(adapter.module, "its weight has no elements")
    if not all(_diagonal(adapter, limits)):
        return None
    _, d_out, d_in = adapter.matrix_shape()
    if adapter.diagonal_input:
        reason = f"one-hot inputs, and {d_out} exceeds max_dim={limits.max_dim}"
    else:
        reason = f"both {d_out} and {d_in} exceed max_dim={limits.max_dim}"
    return because(adapter.module, reason, "raise max_dim")


def _diagonal(adapter: Adapter, limits: Limits) -> tuple[bool, bool]:
    """Return which of the block's factors are diagonal: the input's, the output's."""
    _, d_out, d_in = adapter.matrix_shape()
    if adapter.family == "exact":
        return False, False
    if adapter.uneven or adapter.diagonal_input:  # one side is diagonal at any rate
        limits = Limits(limits.max_dim)
    wide_in = limits.exceeded(d_in, d_out)
    return adapter.diagonal_input or wide_in, limits.exceeded(d_out, d_in)


def _share(
    block: Block, adapter: Adapter, name: str, why: dict[int, str], limits: Limits
) -> None:
    """Add a module that uses the weight of ``block`` too.

    The modules' biases are then left out of the block: they are not shared.
    """
    if not _same_bias(block, adapter):
        for part in (adapter, block.adapter):
            if part.bias is not None:
                reason = "layers with other biases share its weight"
                why[id(part.parameter(part.bias))] = because(part.module, reason)
        _drop_bias(block, limits)
        adapter.bias = None
    b, d_out, d_in = block.shape
    shape = adapter.matrix_shape()
    weight = adapter.parameter(adapter.weight).detach()
    probe = torch.arange(weight.numel(), device=weight.device).reshape(weight.shape)
    bias = None if adapter.bias is None else probe.new_zeros(d_out)
    packed = block.adapter.pack(probe, bias)
    other = adapter.pack(probe, bias)
    if shape == block.shape and torch.equal(packed, other):
        block.uses.append(Use(name, adapter))
    elif shape == (b, d_in, d_out) and torch.equal(packed, other.transpose(1, 2)):
        block.uses.append(Use(name, adapter, transposed=True))
        _prefer_embedding(block)
    else:
        raise ValueError(
            f"layers {block.name!r} and {name!r} share a weight but read it as "
            f"different matrices, {block.shape} and {shape}; freeze it or untie it."
        )


def _same_bias(block: Block, adapter: Adapter) -> bool:
    """Return whether a block and a layer have one bias, or none both."""
    own, other = block.adapter.bias, adapter.bias
    if own is None or other is None:
        return own is other
    parameters = block.adapter.parameter(own), adapter.parameter(other)
    return parameters[0] is parameters[1] and own.rows == other.rows


def _drop_bias(block: Block, limits: Limits) -> None:
    """Leave the bias out of a block."""
    for use in block.uses:
        use.adapter.bias = None
    block.parameters = block.parameters[:1]
    block.shape = block.adapter.matrix_shape()
    block.diagonal = _diagonal(block.adapter, limits)


def _prefer_embedding(block: Block) -> None:
    """Let the embedding define the form of a block, since its input is an index."""
    if block.adapter.diagonal_input:
        return
    for i, use in enumerate(block.uses):
        if use.adapter.diagonal_input:
            block.uses.insert(0, block.uses.pop(i))
            for other in block.uses:
                other.transposed = not other.transposed
            block.shape = block.adapter.matrix_shape()
            block.diagonal = (True, block.diagonal[0])
            return


def watched(
    blocks: Iterable[Block], modules: Iterable[nn.Module]
) -> list[tuple[Block, Use]]:
    """Return the blocks whose weights are looked for in a model's operations.

    Each with the use that defines its form. Whether the code of ``modules`` uses
    others' weights is looked at.
    """
    others = use_others(modules)
    operands = [
        block
        for block in blocks
        if isinstance(block.adapter, OperandAdapter)
        or (others and all(_reports_once(use.adapter) for use in block.uses))
    ]
    for block in operands:  # known before the first call, and on every rank
        kinds = (FunctionalLinearAdapter, EmbeddingAdapter)
        block.turned = block.turned or isinstance(block.adapter, kinds)
    return [(block, block.uses[0]) for block in operands]


def is_watchable(block: Block) -> bool:
    """Return whether operations tell of every call of a block's layers."""
    norms = (TrailingNormAdapter, ChannelNormAdapter)
    return all(
        _reports_once(use.adapter) or isinstance(use.adapter, norms)
        for use in block.uses
    )


def _reports_once(adapter: Adapter) -> bool:
    """Return whether what a layer's forward returns is its operation's own result."""
    if type(adapter) is RowLinearAdapter:
        return is_plain_linear(type(adapter.module))
    return type(adapter) in (LinearAdapter, EmbeddingAdapter, ConvAdapter)
