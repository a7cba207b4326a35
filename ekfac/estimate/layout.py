"""Layers of an estimate: the structure of each, and the recorder of their calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ekfac.calls import EXACT, ForwardPass, LayerCall, Sink
from ekfac.capture import Capture
from ekfac.errors import CaptureError, UnsupportedLayerError
from ekfac.estimate.data import Batch, predicted
from ekfac.layers import Block, ConvFactors, find_blocks
from ekfac.likelihoods import Gaussian, TargetMask
from ekfac.matrices import CurvatureMatrix
from ekfac.vectors import named_modules

Structure = Literal[
    "dense",
    "block_diagonal",
    "diagonal",
    "quasi_diagonal",
    "low_rank",
    "kfac",
    "ekfac",
    "implicit",
]
StructureChoice = Structure | Mapping[str | type[nn.Module], Structure]

KRONECKER = ("kfac", "ekfac")
RECORDED = (*KRONECKER, "diagonal", "quasi_diagonal")


@dataclass
class Layout:
    """The layers of an estimate, by the way that they are treated.

    Attributes:
        blocks: The blocks of recorded layers, with their structure.
        groups: Layer name -> (structure, parameters), of those that are treated by the
            gradients of single examples.
    """

    blocks: dict[Block, Structure] = field(default_factory=dict)
    groups: dict[str, tuple[Structure, list[str]]] = field(default_factory=dict)


def check_structure(
    structure: object, allowed: tuple[str, ...], name: str = "structure"
) -> Structure:
    """Return ``structure`` if it is one of ``allowed``.

    Raises:
        ValueError: Otherwise, with the ``name`` of the argument.
    """
    if structure not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {structure!r}.")
    return cast("Structure", structure)


def check_preconditioner(
    preconditioner: CurvatureMatrix | None, structure: object
) -> None:
    """Raise ``ValueError`` for a preconditioner of another structure than implicit."""
    if preconditioner is not None and structure != "implicit":
        raise ValueError(
            "A preconditioner speeds up the solves of structure='implicit' alone, got "
            f"{structure=}; leave it out."
        )


def lay_out(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    structure: StructureChoice,
    fallback: Structure | None,
    conv_factors: ConvFactors = "patches",
) -> Layout:
    """Return the structure of every layer.

    Args:
        model: The model.
        parameters: The chosen parameters.
        structure: One for all layers, or by layer name or type.
        fallback: Of layers without an adapter, in place of a structure that needs one.
        conv_factors: Of convolutions, see :class:`ekfac.EKFAC`.

    Raises:
        UnsupportedLayerError: If a Kronecker structure meets a layer without adapter.
        ValueError: If a mapping does not fit the model.
    """
    tensors = list(parameters.values())
    coverage = find_blocks(model, tensors, 2**62, conv_factors=conv_factors)
    modules = named_modules(model)
    pick = _Picker(structure, set(modules) | {b.name for b in coverage.blocks})
    layout = Layout()
    decided: dict[str, set[Structure]] = {}
    for block in coverage.blocks:
        owner = owner_of(block.parameters[0], modules)
        kind = pick(block.name, owner, block.adapter.module)
        if kind in RECORDED:
            layout.blocks[block] = kind
        for name in block.parameters:
            decided.setdefault(name, set()).add(kind)
    for name, kinds in decided.items():
        if len(kinds) > 1 and not kinds <= {"kfac", "ekfac", "quasi_diagonal"}:
            raise ValueError(
                f"The layers that {name!r} holds were given {sorted(kinds)}; choose "
                "one structure for all of them."
            )
    uncovered = {}
    for name in parameters:
        owner = owner_of(name, modules)
        kind = next(iter(decided.get(name, {pick(owner, owner, modules[owner])})))
        if name in decided and kind in RECORDED:
            continue
        if kind in KRONECKER:
            uncovered[name] = coverage.reasons.get(name, "no adapter")
            kind = "diagonal" if fallback is None else fallback
        layout.groups.setdefault(owner, (kind, []))[1].append(name)
    if uncovered and fallback is None:
        listed = ", ".join(f"{name} ({why})" for name, why in uncovered.items())
        raise UnsupportedLayerError(
            f"No Kronecker structure for {listed}. Pass fallback='diagonal' (or "
            "another structure) for such layers, choose one for each with "
            "structure={layer name or type: ...}, leave them out with "
            "parameters=[...], or register an adapter with ekfac.layers.register."
        )
    pick.check_used()
    return layout


def owner_of(parameter: str, modules: Collection[str]) -> str:
    """Return the name of the module that a parameter belongs to."""
    owner = parameter.rpartition(".")[0]
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner


class _Picker:
    """The structure of a layer: by its name, else by the nearest of its types."""

    def __init__(self, structure: StructureChoice, names: set[str]) -> None:
        self.structure, self.names = structure, names
        self.used: set[str | type[nn.Module]] = set()
        if not isinstance(structure, str):
            allowed = tuple(name for name in get_args(Structure) if name != "implicit")
            for choice in structure.values():
                check_structure(choice, allowed)

    def __call__(self, name: str, owner: str, module: nn.Module) -> Structure:
        if isinstance(self.structure, str):
            return self.structure
        candidates: list[str | type[nn.Module]] = [name]
        while owner:
            candidates.append(owner)
            owner = owner.rpartition(".")[0]
        candidates += [t for t in type(module).__mro__ if issubclass(t, nn.Module)]
        for key in candidates:
            if key in self.structure:
                self.used.add(key)
                return self.structure[key]
        raise ValueError(
            f"structure has no entry for layer {name!r} ({type(module).__name__}); add "
            "its name or type, or torch.nn.Module for all that is left."
        )

    def check_used(self) -> None:
        """Raise ``ValueError`` for a name that the model lacks."""
        if isinstance(self.structure, str):
            return
        unknown = [
            key
            for key in self.structure
            if isinstance(key, str) and key not in self.names
        ]
        if unknown:
            raise ValueError(
                f"structure names layers that the model lacks: {unknown}; it has "
                f"{sorted(self.names - {''})}."
            )


Receive = Callable[[Block, Sequence[LayerCall], TargetMask | None, bool], None]


class _Receiver(Sink):
    """A sink that hands every call to the function ``receive``."""

    def __init__(self) -> None:
        self.receive: Receive = nothing

    def add(
        self,
        block: Block,
        pairs: Sequence[LayerCall],
        terms: TargetMask | None,
        *,
        repeated: bool = False,
    ) -> None:
        """Hand on the calls of one block."""
        self.receive(block, pairs, terms, repeated)


def nothing(*args: Any) -> None:
    """Ignore what arrives."""


class Recorder(Capture):
    """A capture whose backward passes are started by hand, in any mode of the model.

    Its hooks stay until ``close``.
    """

    tolerance = EXACT

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._receiver = _Receiver()
        self.blocks = list(blocks)
        self.unused: set[Block] = set()
        self._recorded = ForwardPass()
        super().__init__(model, blocks, self._receiver, Gaussian(), "exact")

    def _root_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self._state
        state.depth = max(0, state.depth - 1)
        if not state.depth and state.current is not None:
            self._recorded, state.current, state.edges = state.current, None, {}

    def _recording(self) -> bool:
        return not self._state.paused and torch.is_grad_enabled()

    def forward(
        self, model: nn.Module, batch: Batch
    ) -> tuple[Tensor, Batch, ForwardPass]:
        """Return outputs and batch, see :func:`predicted`, and the recorded pass."""
        outputs, batch = predicted(model, batch)
        self._check_called(outputs)
        return outputs, batch, self._recorded

    def _check_called(self, outputs: Tensor) -> None:
        """Raise ``CaptureError`` for a layer whose parameters are used unrecorded.

        Layers that the outputs do not depend on are noted, so as not to be asked again.
        """
        for block in self.blocks:
            if block in self._recorded.calls or block in self.unused:
                continue
            weights = block.tensors()
            grads = torch.autograd.grad(
                outputs.sum(), weights, retain_graph=True, allow_unused=True
            )
            if any(grad is not None for grad in grads):
                raise CaptureError(
                    f"layer {block.name!r} was not called, but the outputs depend on "
                    "its parameters; call the layer itself in forward, or choose "
                    f"structure={{{block.name!r}: 'block_diagonal', ...}} for it."
                )
            self.unused.add(block)

    def send(
        self,
        outputs: Tensor,
        recorded: ForwardPass,
        pseudo: Iterable[Tensor],
        terms: TargetMask,
        receive: Receive,
        blocks: Sequence[Block] | None = None,
        apart: Sequence[Block] = (),
    ) -> None:
        """Back-propagate gradients of the outputs to the recorded layers.

        Args:
            outputs: The model's, with their graph.
            recorded: The forward pass that made them.
            pseudo: Gradients of the outputs.
            terms: Which targets count.
            receive: Called with a block, its calls for one pseudo-gradient, the terms,
                and whether the same inputs came with an earlier one.
            blocks: Those to send gradients to. Default: all that were recorded.
            apart: Blocks that mix examples, see :meth:`mixing`. They get the gradients
                of one example after another.
        """
        root = get_gradient_edge(outputs)
        targets = recorded.calls if blocks is None else blocks
        calls = {b: recorded.calls[b] for b in targets if b in recorded.calls}
        alone = {b: calls.pop(b) for b in apart if b in calls}
        together = ForwardPass(calls=calls, terms=terms)
        single = ForwardPass(calls=alone, terms=terms)
        self._receiver.receive = receive
        seen: set[Block] = set()
        for h in pseudo:
            if calls:
                self._send_back(together, root, h.detach(), seen)
            for n in range(len(h) if alone else 0):
                example = torch.zeros_like(h)
                example[n] = h[n]
                if bool(example.any()):
                    self._send_back(single, root, example.detach(), seen)
        self._receiver.receive = nothing

    def mixing(
        self, outputs: Tensor, recorded: ForwardPass, blocks: Iterable[Block]
    ) -> set[Block]:
        """Return the blocks whose recorded gradients mix examples.

        From then on it is known which example each row of the others belongs to. It
        takes a few backward passes, see :meth:`Capture.find_examples`.
        """
        calls = {b: recorded.calls.get(b, []) for b in blocks}
        size = len(outputs)
        edges = {
            call: call.edge
            for group in calls.values()
            for call in group
            if call.examples is None and not self.examples.is_regular(call, size)
        }
        if edges and size > 1:
            self.find_examples(get_gradient_edge(outputs), outputs.detach(), edges)
        return {
            block
            for block, group in calls.items()
            if any(isinstance(call.examples, str) for call in group)
        }
