"""Inputs and output gradients of the layers, for given gradients of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ekfac.capture import Capture
from ekfac.curvature.normal_form import Pair, regrouped
from ekfac.errors import CaptureError
from ekfac.estimate.data import outputs_of
from ekfac.layers import Block
from ekfac.likelihoods import Gaussian, TargetMask
from ekfac.passes import ForwardPass

Receive = Callable[[Block, Sequence[Pair], TargetMask | None, bool], None]


class _Receiver:
    """A sink that hands on what arrives."""

    def __init__(self) -> None:
        self.receive: Receive = nothing

    def begin(self, terms: TargetMask | None, *, averaged: bool) -> bool:
        """Keep everything."""
        return False

    def complete(self, block: Block) -> None:
        """Wait for nothing."""

    def wants(self, block: Block) -> bool:
        """Take every block."""
        return True

    def add(
        self,
        block: Block,
        pairs: Sequence[Pair],
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

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._receiver = _Receiver()
        self.blocks = list(blocks)
        self.unused: set[Block] = set()
        self._recorded = ForwardPass()
        super().__init__(model, blocks, self._receiver, Gaussian(), "exact")

    def _root_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth and self._pass is not None:
            self._recorded, self._pass = self._pass, None

    def _recording(self) -> bool:
        return not self._paused and torch.is_grad_enabled()

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
        """
        root = get_gradient_edge(outputs)
        calls = recorded.calls
        if blocks is not None:
            calls = {block: calls[block] for block in blocks if block in calls}
        chosen = ForwardPass(calls=calls, terms=terms)
        self._receiver.receive = receive
        seen: set[Block] = set()
        for h in pseudo:
            self._send_back(chosen, root, h.detach(), seen)
        self._receiver.receive = nothing

    def mixing(
        self,
        outputs: Tensor,
        recorded: ForwardPass,
        terms: TargetMask,
        receive: Receive,
    ) -> set[Block]:
        """Return the blocks in whose recorded gradients examples meet.

        Such a layer was called without the batch dimension (a position embedding). Its
        calls may look like others, with as many positions as there are examples: so
        gradients of every second example are back-propagated, which may reach no other.

        Args:
            outputs: What ``forward`` returned.
            recorded: Likewise.
            terms: Which targets count.
            receive: Is given the calls of every block as well.
        """
        found: set[Block] = set()
        h = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
        h[1::2] = 0

        def look(
            block: Block,
            pairs: Sequence[Pair],
            terms: TargetMask | None,
            repeated: bool,
        ) -> None:
            receive(block, pairs, terms, repeated)
            for use, _, grad in pairs:
                rows = regrouped(use.adapter.output_gradients(grad), len(outputs))
                if len(rows) != len(outputs) or bool((rows[1::2] != 0).any()):
                    found.add(block)

        self.send(outputs, recorded, [h.to(outputs)], terms, look)
        return found
