"""Inputs and output gradients of the layers, for given gradients of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ekfac.capture import Capture, ForwardPass, LayerCall
from ekfac.errors import CaptureError
from ekfac.estimate.data import outputs_of
from ekfac.example_rows import EXACT
from ekfac.layers import Block
from ekfac.likelihoods import Gaussian, TargetMask

Receive = Callable[[Block, Sequence[LayerCall], TargetMask | None, bool], None]


class _Receiver:
    """A sink that hands on what arrives."""

    def __init__(self) -> None:
        self.receive: Receive = nothing

    def begin(self, terms: TargetMask | None, *, averaged: bool) -> bool:
        """Keep everything."""
        return False

    def complete(self, block: Block) -> None:
        """Wait for nothing."""

    def reject(self) -> None:
        """Leave it to the estimate to look at its outputs."""

    def separates(self, block: Block) -> bool:
        """Return whether its rows' examples matter; see :meth:`Recorder.mixing`."""
        return False

    def wants(self, block: Block) -> bool:
        """Take every block."""
        return True

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

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a fresh generator; nothing is drawn here."""
        return torch.Generator(device)


def nothing(*args: Any) -> None:
    """Take no notice."""


class Recorder(Capture):
    """A capture that is driven by hand, in whatever mode the model is.

    Its hooks stay until ``close``; ``with recorder:`` pauses it.

    Args:
        model: The module whose call is one forward pass.
        blocks: The blocks whose layers are recorded.
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

    def forward(self, model: nn.Module, inputs: Any) -> tuple[Tensor, ForwardPass]:
        """Return the outputs, with their graph, and what was recorded on the way."""
        outputs = outputs_of(model, inputs)
        self._check_called(outputs)
        return outputs, self._recorded

    def _check_called(self, outputs: Tensor) -> None:
        """Note the layers that nothing depends on; refuse those used unseen."""
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
            outputs: What ``forward`` returned.
            recorded: Likewise.
            pseudo: Gradients with the shape of ``outputs``.
            terms: Which targets count.
            receive: Is given, for each of ``pseudo``, the calls of every block, the
                terms, and whether the inputs came with an earlier one.
            blocks: The only blocks to follow the gradients to.
            apart: Those that are given the gradients of one example after another,
                since they mix them, see :meth:`mixing`.
        """
        root = get_gradient_edge(outputs)
        wanted = recorded.calls if blocks is None else blocks
        calls = {b: recorded.calls[b] for b in wanted if b in recorded.calls}
        alone = {b: calls.pop(b) for b in apart if b in calls}
        together = ForwardPass(calls=calls, terms=terms)
        single = ForwardPass(calls=alone, terms=terms)
        self._receiver.receive = receive
        seen: set[Block] = set()
        for h in pseudo:
            if calls:
                self._send_back(together, root, h.detach(), seen)
            for n in range(len(h) if alone else 0):
                one = torch.zeros_like(h)
                one[n] = h[n]
                if bool(one.any()):
                    self._send_back(single, root, one.detach(), seen)
        self._receiver.receive = nothing

    def mixing(
        self, outputs: Tensor, recorded: ForwardPass, blocks: Iterable[Block]
    ) -> set[Block]:
        """Return the blocks in whose recorded gradients examples meet.

        The rows of the others are told apart by example from then on. It takes a few
        backward passes, see :meth:`Capture.find_examples`.

        Args:
            outputs: What ``forward`` returned.
            recorded: Likewise.
            blocks: The blocks to look at.
        """
        calls = {b: recorded.calls.get(b, []) for b in blocks}
        size = len(outputs)
        edges = {
            call: call.edge
            for group in calls.values()
            for call in group
            if call.examples is None and not self._is_regular(call, size)
        }
        if edges and size > 1:
            self.find_examples(get_gradient_edge(outputs), outputs.detach(), edges)
        return {
            block
            for block, group in calls.items()
            if any(isinstance(call.examples, str) for call in group)
        }
