"""Blocks of a model: its covered parameters, and why the others are not covered."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ekfac.layers.base import ADVICE, FINE, Adapter, because, is_sharded
from ekfac.layers.code_names import is_plain_linear, use_others
from ekfac.layers.conv import ConvAdapter, uncorrelated
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter
from ekfac.layers.norm import ChannelNormAdapter, TrailingNormAdapter
from ekfac.layers.operands import FunctionalLinearAdapter, OperandAdapter
from ekfac.layers.recognised import RowLinearAdapter, find_adapter
from ekfac.vectors import clean, named_parameters, unwrap

ConvFactors = Literal["patches", "spatially_uncorrelated"]

# Largest number of lines of a summary, and of parameters named in one line.
LINES = 8
NAMED = 3
NOWHERE = "it is in no module of the model; pass the one that holds it as model="
# Sides up to this width have a dense factor whatever the other side's width.
NARROW = 64


@dataclass(eq=False)
class Use:
    """A module that uses a block's weight.

    Attributes:
        name: The module's qualified name.
        adapter: The module's adapter.
        transposed: Whether the module uses the transpose of the block's matrix, as an
            output head tied to an embedding does; its inputs and output gradients then
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
        parameters: Qualified names of the weight and, if there is one, the bias.
        shape: ``(b, d_out, d_in)``.
        diagonal: Whether the input factor and the output factor are diagonal.
        exact: Whether the block is kept exactly, see :class:`Adapter`.
        turned: Whether operations may use the transpose of the block's matrix, see
            :class:`ekfac.layers.base.CallForm`.
        pinned: The parameters that an optimizer trains. The modules may hold others
            during a pass (``fully_shard``, ``functional_call``) or after the model was
            changed. ``None``: the modules' own.
        sizes: The shapes of the pinned parameters when they were pinned.
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
        """The adapter of the first use, which defines the block's form."""
        return self.uses[0].adapter

    @property
    def shared(self) -> bool:
        """Whether all blocks have the same two factors."""
        return self.adapter.shared_factors

    @property
    def factor_shape(self) -> tuple[int, int, int]:
        """``(b, d_out, d_in)`` of the factors; ``b`` is 1 if all blocks share them."""
        b, d_out, d_in = self.shape
        return 1 if self.shared else b, d_out, d_in

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the block's statistics: the weight's, at least float32."""
        return torch.promote_types(self.tensors()[0].dtype, torch.float32)

    @property
    def mixed(self) -> bool:
        """Whether some call uses, or may use, the transpose of the matrix."""
        return self.turned or any(use.transposed for use in self.uses)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return ``[b, d_out, d_in]`` of whole parameters, weight first."""
        slots = self.adapter.slots()
        views = [slot.of(tensor) for slot, tensor in zip(slots, tensors, strict=True)]
        return self.adapter.pack(views[0], views[1] if len(views) > 1 else None)

    def pack_into_(self, out: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write :meth:`pack` into ``out`` ``[b, d_out, d_in]`` with a single copy."""
        parts = self.unpack(out)
        memory = out.untyped_storage().data_ptr()
        if any(part.untyped_storage().data_ptr() != memory for part in parts):
            out.copy_(self.pack(tensors))  # the adapter's unpack makes no views
            return
        slots = self.adapter.slots()
        for part, slot, tensor in zip(parts, slots, tensors, strict=True):
            part.copy_(slot.of(tensor))

    def unpack(self, matrix: Tensor) -> list[Tensor]:
        """Return weight and, if there is one, bias of ``[b, d_out, d_in]``.

        Each has the shape of its :class:`~ekfac.layers.Slot`.
        """
        weight, bias = self.adapter.unpack(matrix)
        return [weight] if bias is None else [weight, bias]

    def tensors(self) -> list[nn.Parameter]:
        """Return the whole parameters, weight first."""
        if self.pinned is not None:
            return self.pinned
        return [self.adapter.parameter(slot) for slot in self.adapter.slots()]

    def pin(self) -> None:
        """Keep the present parameters as the trained ones."""
        self.pinned = self.tensors()
        self.sizes = tuple(parameter.shape for parameter in self.pinned)

    @property
    def sharded(self) -> bool:
        """Whether the pinned parameters are sharded."""
        return self.pinned is not None and any(map(is_sharded, self.pinned))

    @property
    def is_reached(self) -> bool:
        """Whether the weight has a gradient; a matrix of a stack, one that is not zero.

        The gradient of a stack of experts is zero for those that received no rows.
        """
        slot, grad = self.adapter.weight, self.tensors()[0].grad
        if grad is None or slot.rows is None or is_sharded(grad):
            return grad is not None
        return bool(slot.of(grad).any())

    def is_used_by(self, use: Use) -> bool:
        """Return whether a module still holds the block's weight as it was pinned.

        For sharded parameters, which others replace during a pass, return True.
        """
        if self.pinned is None or self.sharded:
            return True
        weight = use.adapter.held(use.adapter.weight)
        return weight is self.pinned[0] and weight.shape == self.sizes[0]


class Structure:
    """The modules and parameters of a model, to be compared later for changes.

    They are kept, so that others cannot take their identities.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._parts = [(m, list(m._modules.items()), *_held(m)) for m in modules]
        self._parameters = [list(m._parameters.values()) for m in modules]

    def is_that_of(self, model: nn.Module) -> bool:
        """Return whether a model has the same, under the same names and shapes."""
        if model is not self._parts[0][0]:
            return False
        for module, children, names, identities, shapes in self._parts:
            # Modules are equal if they are the same; tensors compare their elements.
            if list(module._modules.items()) != children:
                return False
            held = names, identities, shapes
            if (names or module._parameters) and _held(module) != held:
                return False
        return True


def _held(module: nn.Module) -> tuple[list[str], list[int], list[torch.Size | None]]:
    """Return names, identities and shapes of a module's own parameters."""
    own = module._parameters
    return list(own), list(map(id, own.values())), list(map(_shape, own.values()))


def _shape(parameter: nn.Parameter | None) -> torch.Size | None:
    """Return a parameter's shape, ``None`` if it has none or is lazy."""
    if parameter is None or is_lazy(parameter):
        return None
    return parameter.shape


# The places of a parameter: names of modules, the modules, and its names in them.
Places = frozenset[tuple[str, nn.Module, str]]


def places(model: nn.Module) -> dict[Tensor, Places]:
    """Return the places of each parameter of a model; a tied one has several."""
    result: dict[Tensor, set[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holder = clean(model, path), module, name
                result.setdefault(parameter, set()).add(holder)
    return {parameter: frozenset(holders) for parameter, holders in result.items()}


def shortened(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def grouped(reasons: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Return a line for each reason: names and their number of elements."""
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


def reason_unseen(block: Block) -> str:
    """Return why a block whose parameters have gradients has no statistics."""
    reason, advice = "it is used in no known operation, or by a function of it", ADVICE
    if not isinstance(block.adapter, OperandAdapter):
        reason = "it is not called in a training forward, or no watched output needs it"
        advice = "call the module, or register an adapter for what uses its weight"
    return because(block.adapter.module, reason, advice)


def unseen(blocks: Iterable[Block]) -> str:
    """Return why blocks have no statistics, a line for each reason."""
    by_name = {block.name: block for block in blocks}
    sizes = {name: math.prod(block.shape) for name, block in by_name.items()}
    return grouped({n: reason_unseen(block) for n, block in by_name.items()}, sizes)


@dataclass
class Coverage:
    """The blocks of a model, and why other parameters are in none.

    Attributes:
        blocks: The blocks, in the model's order.
        reasons: Name of every trained parameter in no block -> why.
        rest: Name of every such parameter -> the parameter.
    """

    blocks: list[Block] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    rest: dict[str, nn.Parameter] = field(default_factory=dict)

    def summary(self, names: Collection[str]) -> str:
        """Return why these parameters are in no block, a line for each reason."""
        sizes = {name: self.rest[name].numel() for name in names}
        return grouped({name: self.reasons[name] for name in names}, sizes)


@dataclass(frozen=True)
class Limits:
    """Widths from which a side of a block has a diagonal factor.

    Attributes:
        max_dim: A wider side has one.
        max_aspect: So has a side this many times as wide as the other, and wider than
            ``NARROW``.
    """

    max_dim: int
    max_aspect: float

    def exceeded(self, width: int, other: int) -> bool:
        """Return whether a side's factor is diagonal."""
        uneven = width > NARROW and width > self.max_aspect * other
        return width > self.max_dim or uneven

    def diagonal(self, adapter: Adapter) -> tuple[bool, bool]:
        """Return whether the input's and the output's factor are diagonal."""
        _, d_out, d_in = adapter.matrix_shape()
        if adapter.family == "exact":
            return False, False
        if adapter.uneven or adapter.diagonal_input:  # its aspect is no reason
            return adapter.diagonal_input or d_in > self.max_dim, d_out > self.max_dim
        return self.exceeded(d_in, d_out), self.exceeded(d_out, d_in)


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
        max_aspect: So does a side that many times as wide as the other.
        conv_factors: The input factors of convolutions, see :class:`ekfac.EKFAC`.

    Returns:
        The blocks and, for every other trained parameter, why it is in none.

    Raises:
        ValueError: If a layer is lazy and has no shape yet, or if two layers share a
            weight that they read as different matrices.
    """
    model = unwrap(model)
    finder = _Finder({id(p) for p in trained}, Limits(max_dim, max_aspect))
    skipped: set[str] = set()
    for path, module in model.named_modules():
        name = clean(model, path)
        if name in skipped:
            continue
        adapter = find_adapter(module)
        refused = isinstance(adapter, str)
        for parameter in module.parameters(recurse=refused):  # of parametrizations too
            reason = _left_out(module, adapter, parameter)
            finder.reasons.setdefault(id(parameter), reason)
        if adapter is None or isinstance(adapter, str):
            continue
        if conv_factors == "spatially_uncorrelated":
            adapter = uncorrelated(adapter, module)
        skipped |= {f"{name}.{child}".lstrip(".") for child in adapter.children}
        for suffix, part in adapter.build(module).items():
            finder.place(part, f"{name}.{suffix}".strip("."), name)
    coverage = Coverage(finder.blocks)
    names = {id(p): name for name, p in named_parameters(model).items()}
    covered = {id(p) for block in coverage.blocks for p in block.tensors()}
    for number, parameter in enumerate(trained):
        if id(parameter) not in covered:
            outside = f"(parameter {number}, outside the model)"
            name = names.get(id(parameter), outside)
            coverage.reasons[name] = finder.reasons.get(id(parameter), NOWHERE)
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


class _Finder:
    """The blocks found so far.

    Args:
        trained: Ids of the trained parameters.
        limits: Widths of dense factors.

    Attributes:
        blocks: The blocks.
        owners: Id of a parameter, and rows of it -> the block that has them.
        reasons: Id of a parameter -> why it is in no block if it is in none.
    """

    def __init__(self, trained: set[int], limits: Limits) -> None:
        self.trained, self.limits = trained, limits
        self.blocks: list[Block] = []
        self.owners: dict[tuple[int, tuple[int, int] | None], Block] = {}
        self.reasons: dict[int, str] = {}

    def place(self, adapter: Adapter, name: str, module_name: str) -> None:
        """Make a block of ``adapter``, or one more use of its weight's block."""
        weight = adapter.parameter(adapter.weight)
        rest = [id(adapter.parameter(slot)) for slot in adapter.slots()[1:]]
        if not self.trains(weight):
            frozen = "the weight beside it is not trained, or was covered before it"
            self.reasons |= dict.fromkeys(rest, because(adapter.module, frozen))
            return
        if isinstance(weight, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"layer {name!r} is lazy and has no shape yet; run one forward pass "
                "before constructing the optimizer."
            )
        owner = self.owners.get((id(weight), adapter.weight.rows))
        if owner is not None:
            self.share(owner, adapter, name)
            return
        self.keep_bias(adapter)
        reason = self.reason_against(adapter, weight)
        if reason is not None:
            self.reasons |= dict.fromkeys([id(weight), *rest], reason)
            return
        slots = adapter.slots()
        block = Block(
            name,
            [Use(name, adapter)],
            tuple(f"{module_name}.{slot.name}".lstrip(".") for slot in slots),
            adapter.matrix_shape(),
            self.limits.diagonal(adapter),
            adapter.family == "exact",
        )
        for slot in slots:
            self.owners[id(adapter.parameter(slot)), slot.rows] = block
        self.blocks.append(block)

    def trains(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter is trained."""
        return id(parameter) in self.trained and parameter.requires_grad

    def keep_bias(self, adapter: Adapter) -> None:
        """Leave out a bias that is not trained, or that other weights share."""
        if adapter.bias is None:
            return
        bias = adapter.parameter(adapter.bias)
        if not self.trains(bias):
            adapter.bias = None
        elif (id(bias), adapter.bias.rows) in self.owners:
            reason = "layers of different weights share it"
            self.reasons[id(bias)] = because(adapter.module, reason)
            self.drop_bias(self.owners[id(bias), adapter.bias.rows])
            adapter.bias = None

    def reason_against(self, adapter: Adapter, weight: nn.Parameter) -> str | None:
        """Return why a weight can have no block, ``None`` if it can."""
        if not weight.is_floating_point():
            reason = f"its dtype is {weight.dtype}"
            return because(adapter.module, reason, "blocks are for real numbers")
        if not weight.numel():
            return because(adapter.module, "its weight has no elements")
        if not all(self.limits.diagonal(adapter)):
            return None
        _, d_out, d_in = adapter.matrix_shape()
        reason = f"both {d_out} and {d_in} exceed"
        if adapter.diagonal_input:
            reason = f"one-hot inputs, and {d_out} exceeds"
        reason = f"{reason} max_dim={self.limits.max_dim}"
        return because(adapter.module, reason, "raise max_dim")

    def share(self, block: Block, adapter: Adapter, name: str) -> None:
        """Add a module that uses the weight of ``block``, too.

        Biases that differ are left out of the block.
        """
        if not _same_bias(block, adapter):
            for part in (adapter, block.adapter):
                if part.bias is not None:
                    reason = "layers with other biases share its weight"
                    bias = part.parameter(part.bias)
                    self.reasons[id(bias)] = because(part.module, reason)
            self.drop_bias(block)
            adapter.bias = None
        b, d_out, d_in = block.shape
        shape = adapter.matrix_shape()
        weight = adapter.parameter(adapter.weight).detach()
        probe = torch.arange(weight.numel(), device=weight.device).reshape(weight.shape)
        zeros = None if adapter.bias is None else probe.new_zeros(d_out)
        packed, other = block.adapter.pack(probe, zeros), adapter.pack(probe, zeros)
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

    def drop_bias(self, block: Block) -> None:
        """Leave the bias out of a block."""
        for use in block.uses:
            use.adapter.bias = None
        block.parameters = block.parameters[:1]
        block.shape = block.adapter.matrix_shape()
        block.diagonal = self.limits.diagonal(block.adapter)


def _same_bias(block: Block, adapter: Adapter) -> bool:
    """Return whether a block and a layer have the same bias, or neither has one."""
    own, other = block.adapter.bias, adapter.bias
    if own is None or other is None:
        return own is other
    parameters = block.adapter.parameter(own), adapter.parameter(other)
    return parameters[0] is parameters[1] and own.rows == other.rows


def _prefer_embedding(block: Block) -> None:
    """Let an embedding define the form of a block, since its input is an index."""
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

    Args:
        blocks: The model's blocks.
        modules: The model's modules, whose code tells whether they use others' weights.

    Returns:
        Each block with the use that defines its form.
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
    """Return whether the operations report every call of a block's layers."""
    norms = (TrailingNormAdapter, ChannelNormAdapter)
    return all(
        _reports_once(use.adapter) or isinstance(use.adapter, norms)
        for use in block.uses
    )


def _reports_once(adapter: Adapter) -> bool:
    """Return whether a layer's forward returns the result of its operation itself."""
    if type(adapter) is RowLinearAdapter:
        return is_plain_linear(type(adapter.module))
    return type(adapter) in (LinearAdapter, EmbeddingAdapter, ConvAdapter)
