"""Hooks that record what each layer saw: its inputs and its output gradients.

A forward hook on every covered layer records the call's input; a hook on the node of
the graph that made the call's output receives the gradient that the layer itself gets.
Unlike full backward hooks this survives in-place activations, hooks that replace the
output or scale its gradient, non-reentrant checkpointing and layers that are called
several times. Nothing is recorded without a graph (``no_grad``), in ``eval`` mode, in a
transform of ``torch.func``, or in the recomputation of a checkpoint. Calls in eval
mode, in transforms, and with computed weights (``functional_call``) are reported if
they add to ``.grad``.

The statistics are those of the backward passes that add to ``.grad``. A pass that adds
nothing to a layer's weight (``torch.autograd.grad``, ``backward(inputs=...)``) leaves
no trace. In a double backward (a gradient penalty, a PINN) the pass that adds to
``.grad`` counts, with its whole gradient with respect to each layer's output, second
derivatives included. Two backward passes through one forward are two samples: factors
and per-example scalings lack the cross terms that one backward of the sum of the losses
has.

The root module's output is watched as well: the gradient of the user's loss shows there
which targets count. With ``fisher="mc"`` or ``"exact"`` pseudo-gradients of the
likelihood are sent through the same graph first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ekfac.calls import (
    APPROXIMATE,
    Call,
    ExampleFinder,
    ForwardPass,
    LayerCall,
    PassState,
    RootOutput,
    Sink,
    is_one_example,
    said,
)
from ekfac.errors import CaptureError, warn_outside
from ekfac.hooks import (
    REMEDIES,
    SELECTIVE,
    Hook,
    adds_to_grad,
    advised,
    hides_output,
    in_backward,
    in_selective_checkpoint,
    in_transform,
    output_edge,
    profiled,
    put_first,
    put_last,
    remove,
    remove_inert,
    unwrapped,
)
from ekfac.layers import Adapter, Block, Use, is_sharded
from ekfac.layers.base import (
    CallForm,
    FunctionalAdapter,
    MaskedAdapter,
    assembled_call,
    has_own_adapter,
    kept_gathered,
    padded_call,
)
from ekfac.layers.blocks import is_watchable, watched
from ekfac.layers.functional import OperationTap
from ekfac.layers.operands import OperandAdapter
from ekfac.likelihoods import Likelihood, TargetMask, find_outputs, signed

BEHIND = (
    "whose output may be another than the layer's own: its forward was replaced, or a "
    "hook of all modules is registered"
)
ONCE = "the graph can be gone through once alone"


class GoneError(Exception):
    """A graph cannot be gone through twice."""


def gradients_at(
    root: GradientEdge, edges: Iterable[GradientEdge | None], h: Tensor
) -> list[Tensor | None]:
    """Return the gradients that arrive at some edges, for ``h`` at the root.

    ``None`` stands for the root itself. The gradients are those that the nodes receive:
    ``torch.autograd.grad`` returns inner nodes' gradients without the effect of
    tensors' hooks.
    """
    edges = list(edges)
    inner = [edge for edge in edges if edge is not None]
    received: dict[int, Tensor | None] = {}

    def receive(number: int, grads: Sequence[Tensor | None]) -> None:
        received[number] = grads[inner[number].output_nr]

    handles = [
        edge.node.register_prehook(partial(receive, number))
        for number, edge in enumerate(inner)
    ]
    returned: Sequence[Tensor | None] = ()
    try:
        if inner:
            returned = torch.autograd.grad(
                [root], inner, [h], retain_graph=True, allow_unused=True
            )
    finally:
        remove(handles)
    arrived = iter([received.get(n, grad) for n, grad in enumerate(returned)])
    return [h if edge is None else next(arrived) for edge in edges]


class Capture:
    """Records the calls of a model's blocks and hands them to a sink.

    Args:
        model: The module whose call is one forward pass.
        blocks: The blocks whose layers are recorded.
        sink: Receives the records.
        likelihood: Gives pseudo-gradients, and says which targets count.
        fisher: ``"empirical"``, ``"mc"`` or ``"exact"``.

    Attributes:
        averaged: Callable: will the backward of the forward pass that begins average
            gradients over ranks?
        outputs: Called with the outputs of every forward pass, if not ``None``.
        eval_forwards: Number of forward passes with a graph in eval mode.
    """

    # Share of other examples that rows may have, see ``calls.found``.
    tolerance = APPROXIMATE

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        sink: Sink,
        likelihood: Likelihood,
        fisher: str,
    ) -> None:
        self.sink, self.likelihood, self.fisher = sink, likelihood, fisher
        self._state = PassState()
        self._waiting: dict[int, ForwardPass] = {}
        # torch.utils.swap_tensors refuses tensors with weak references.
        self._weights: list[tuple[Block, nn.Parameter]] = []
        self._layer_handles: list[RemovableHandle] = []
        # Uses -> their block and the number of their hook; blocks whose operations are
        # watched, since hooks may see other outputs than the layers' own.
        self._hooked: dict[Use, tuple[Block, int]] = {}
        self._hidden: dict[Block, None] = {}
        self.eval_forwards = 0
        self.examples = ExampleFinder(fisher, sink.separates, self.tolerance)
        self._class_dims: dict[int, Likelihood] = {}
        self.outputs: Callable[[Tensor], None] | None = None
        self.averaged: Callable[[], bool] = bool
        self._closed = False
        for module in model.modules():
            remove_inert(module)
        self._root = weakref.ref(model)
        # Uses whose weights are looked for in every operation of a forward pass.
        self._operands: list[tuple[Block, Use]] = []
        self._sharded = False
        self._chained = False  # whether the warning of a chain was given
        begins, ends = Hook(self, "_root_begins"), Hook(self, "_root_ends")
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(begins, with_kwargs=True),
            model.register_forward_hook(Hook(self, "_untap"), always_call=True),
            model.register_forward_hook(ends, always_call=True),
        ]
        self._last_hook = self._handles[-1].id
        self.attach(blocks)
        weakref.finalize(self, remove, self._handles)
        weakref.finalize(self, remove, self._layer_handles)

    def attach(self, blocks: Sequence[Block]) -> None:
        """Hook the layers of ``blocks``, unless closed."""
        if self._closed:
            return
        root = self._root()
        modules: Any = [] if root is None else list(root.modules())
        if root is not None:
            self._sharded = any(map(is_sharded, root.parameters()))
        self._operands += watched(blocks, modules)
        functional: dict[nn.Module, list[tuple[Block, Use]]] = {}
        for block in blocks:
            self._weights.append((block, block.tensors()[0]))
            for use in block.uses:
                module = use.adapter.module
                if isinstance(use.adapter, FunctionalAdapter):
                    functional.setdefault(module, []).append((block, use))
                    continue
                hook = Hook(self, "_layer_called", block, use)
                # First, so that it sees the layer's own output, and a root that is a
                # layer is recorded before its pass ends.
                handle = module.register_forward_hook(
                    hook, with_kwargs=True, prepend=True
                )
                self._layer_handles.append(handle)
                self._hooked[use] = block, handle.id
        for module, uses in functional.items():
            begins, ends = Hook(self, "_tap", uses), Hook(self, "_untap")
            self._layer_handles += [
                module.register_forward_pre_hook(begins, with_kwargs=True),
                module.register_forward_hook(ends, always_call=True),
            ]

    def detach(self) -> None:
        """Remove the hooks of all layers."""
        self._weights.clear()
        self._operands.clear()
        self._hooked.clear()
        self._hidden.clear()
        remove(self._layer_handles)

    def close(self) -> None:
        """Remove every hook, for good."""
        self._closed = True
        self.detach()
        remove(self._handles)

    def paused(self) -> AbstractContextManager[None]:
        """Leave forward passes of this thread inside the ``with`` block unrecorded."""
        return self._state.pausing()

    # -- forward ---------------------------------------------------------------------

    def _root_begins(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        state = self._state
        state.depth += 1
        put_last(module, self._last_hook)
        self._watch(self._to_watch() if state.depth == 1 else [], module, args, {})
        if state.depth == 1 and not in_backward():
            inputs = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            size = next((len(v) for v in inputs if v.dim() and not v.is_nested), 0)
            state.current = ForwardPass(
                averaged=self.averaged(), size=size, previous=state.last
            )
            state.edges = {}

    def _root_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self._state
        state.depth = max(0, state.depth - 1)
        if state.depth or in_backward() or in_transform():
            return
        current, state.current = state.current, None
        edges, state.edges = state.edges, {}
        outputs = find_outputs(output)
        if outputs is not None and self.outputs is not None:
            self.outputs(outputs)
        self.eval_forwards += int(not module.training and torch.is_grad_enabled())
        if current is None or outputs is None or not self._recording():
            return
        if outputs.is_nested:  # its layers' rows say how many examples there are
            if self.fisher != "empirical":
                raise CaptureError(
                    f"fisher={self.fisher!r} needs a dense output of the model, got a "
                    "nested tensor; return a padded one, or use fisher='empirical'."
                )
            current.size = outputs.size(0)
            return
        edge = get_gradient_edge(outputs)
        values = outputs.detach()
        if is_one_example(values, current.calls.values()):
            values = values.unsqueeze(0)
        current.size = len(values)
        state.last = weakref.ref(current)
        for call in current.every_call():
            if call.edge is not None and call.edge.node is edge.node:
                call.edge = None
        returned = RootOutput(current, values, values._version, edges).held_at(edge)
        outputs.register_hook(Hook(self, "_loss_arrives", returned))
        base = output_edge(outputs)
        if base.node is not edge.node and self.fisher == "empirical":
            # A view that is changed in place loses its hook.
            hook = Hook(self, "_loss_reaches_base", returned.held_at(base))
            base.node.register_prehook(hook)
        current.watched = True

    def _recording(self) -> bool:
        root = self._root()
        return (
            root is not None
            and root.training
            and not self._state.paused
            and torch.is_grad_enabled()
            and not in_transform()
        )

    def _to_watch(self) -> list[tuple[Block, Use]]:
        """Return the uses to look for in the operations of a call of the root.

        Hooks of layers whose calls are recorded go back before those that users have
        put before them.
        """
        hidden: dict[Block, None] = {}
        for use, (block, number) in self._hooked.items():
            if not self.sink.wants(block):
                continue
            module = use.adapter.module
            put_first(module, number)
            if hides_output(module, has_own_adapter(module)) and is_watchable(block):
                hidden[block] = None
        self._hidden = hidden
        known = {block for block, _ in self._operands}
        return self._operands + [(b, b.uses[0]) for b in hidden if b not in known]

    def _layer_called(
        self,
        block: Block,
        use: Use,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        out: Any,
    ) -> None:
        if not isinstance(out, Tensor) or not self.sink.wants(block):
            return
        if not self._recording():
            self._watch_unrecorded(block, use, out)
            return
        if not out.requires_grad or out is self._state.reported:
            return
        first = put_first(module, self._hooked[use][1])
        if not first or hides_output(module, has_own_adapter(module)):
            if not (self._state.depth and block in self._hidden):
                self._watch_unrecorded(block, use, out, BEHIND)
            return
        inputs, rearrange = use.adapter.call_of(args, kwargs)
        if inputs.is_nested:
            masked, inputs, rearrange = padded_call(use.adapter, inputs, rearrange)
            use = Use(use.name, masked, use.transposed)
        self._record(block, use, inputs, out, rearrange)

    def _record(
        self,
        block: Block,
        use: Use,
        inputs: Tensor,
        output: Tensor,
        rearrange: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Record one call, and register for the gradient of its output."""
        if not block.is_used_by(use):  # functional_call, or the model was changed
            weight_now = use.adapter.held(use.adapter.weight)
            if weight_now is not None and not weight_now.is_leaf:
                self._watch_unrecorded(block, use, output)
            return
        weight = use.adapter.parameter(use.adapter.weight)
        inputs, rearrange = assembled_call(
            use.adapter, use.name, inputs, output, rearrange
        )
        inputs = inputs.detach()
        needs_edge = self.fisher != "empirical"
        edge = output_edge(output)
        call = Call(
            block,
            use,
            inputs,
            inputs._version,
            edge if needs_edge else None,
            None if output.is_nested else output.shape,
            get_gradient_edge(weight).node if weight.requires_grad else None,
            rearrange,
            said(),
        )
        recomputed = in_backward()
        current = self._state.current
        # Going backward twice through sharded modules would gather them twice.
        if call.examples is None and current and not self._sharded:
            self._state.edges[call] = edge
        if not recomputed:
            if needs_edge and current is None:
                return
            current = current or self._outside_root()
            current.calls.setdefault(block, []).append(call)
            current.once = current.once or in_selective_checkpoint()
            if needs_edge:
                return
        hook = Hook(self, "_gradient_arrives", call, current, edge.output_nr)
        edge.node.register_prehook(hook)

    def _watch_unrecorded(
        self,
        block: Block,
        use: Use,
        output: Tensor,
        why: str = "with weights that are computed, as by functional_call",
    ) -> None:
        """Watch whether a call that is not recorded adds to ``.grad``."""
        root = self._root()
        if root is None or self._state.paused or not torch.is_grad_enabled():
            return
        if in_transform():
            why, output = "in a transform of torch.func", unwrapped(output)
        elif not root.training:
            why = "in eval mode"
        if output.requires_grad:
            hook = Hook(self, "_unrecorded_arrives", block, use.name, why)
            get_gradient_edge(output).node.register_prehook(hook)

    def _unrecorded_arrives(
        self, block: Block, layer: str, why: str, grads: Sequence[Tensor | None]
    ) -> None:
        weight = block.tensors()[0]
        if not weight.requires_grad or not adds_to_grad(get_gradient_edge(weight).node):
            return
        if self.sink.miss(layer, why):
            self._waiting.clear()

    def _outside_root(self) -> ForwardPass:
        """Return the forward pass of layers that are called without the root."""
        current = self._state.orphans()
        if current is None or current.backward_began:
            current = ForwardPass()
            self._state.orphans = weakref.ref(current)
        return current

    def _tap(
        self, uses: list[tuple[Block, Use]], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        """Watch the functions that a module gives its weights to until it returns."""
        seen = self._state.depth and isinstance(uses[0][1].adapter, OperandAdapter)
        self._watch([] if seen else uses, module, args, kwargs)

    def _watch(
        self, uses: list[tuple[Block, Use]], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        """Watch for uses of weights until a module returns."""
        stack = self._state.taps.setdefault(id(module), [])
        self._state.reported = None
        wanted = [(b, u) for b, u in uses if self.sink.wants(b)]
        if not (wanted and self._recording()):
            stack.append(nullcontext())
            return
        by_adapter = {id(u.adapter): (b, u) for b, u in wanted}
        adapters = [u.adapter for _, u in wanted]

        def report(
            adapter: Adapter,
            x: Tensor,
            out: Tensor,
            rearrange: Callable[[Tensor], Tensor],
            keep: Tensor | None,
        ) -> None:
            """Record a use of a weight as the tap has seen it."""
            if not out.requires_grad:
                return
            block_adapter = adapter.of if isinstance(adapter, CallForm) else adapter
            block, use = by_adapter[id(block_adapter)]
            if isinstance(adapter, CallForm):
                use = Use(use.name, adapter, adapter.transposed)
                block.turned = block.turned or adapter.transposed
            if not isinstance(block_adapter, FunctionalAdapter):
                self._state.reported = out
            if keep is not None:
                use = Use(use.name, MaskedAdapter(adapter, keep), use.transposed)
            self._record(block, use, x, out, rearrange)

        kind = adapters[0]
        tap = kind.tap if isinstance(kind, FunctionalAdapter) else OperationTap
        watching: Any = tap(module, adapters, args, kwargs, report)  # has no hints
        watching.__enter__()
        stack.append(watching)

    def _untap(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = self._state.taps.get(id(module))
        if stack:
            stack.pop().__exit__(None, None, None)

    # -- backward --------------------------------------------------------------------

    def _loss_arrives(self, returned: RootOutput, grad: Tensor) -> None:
        """Count the targets and, for "mc" and "exact", back-propagate first."""
        current, values, version, edges, nr = returned
        if not self._adds_to_grad(current):
            return
        self._renew(current)
        if current.backward_began:
            return
        if values._version != version and self.fisher != "empirical":
            raise CaptureError(
                "the model's output was changed in place after the forward pass, and "
                f"fisher={self.fisher!r} needs it; use an out-of-place operation on it."
            )
        if current.once and current.calls and self.fisher != "empirical":
            raise CaptureError(REMEDIES[SELECTIVE])
        shape, single = grad.shape, values.dim() > grad.dim()
        grad = grad.reshape(values.shape)
        likelihood = self._fitted(values, grad)
        with torch.no_grad():
            terms = likelihood.terms(values, grad)
        self._begin(current, terms)
        root = GradientEdge(torch._C._current_autograd_node(), nr)
        if terms.size > 1:
            asked = self.examples.undecided(edges, terms)
            if current.once:
                self.examples.take_by_shape(asked, terms.size, ONCE)
            else:
                self.find_examples(root, values, {c: edges[c] for c in asked}, shape)
        edges.clear()
        self._deliver_complete(current)
        if self.fisher == "empirical" or not current.calls:
            return
        if not len(values):  # a rank without data
            current.calls.clear()
            return
        if not bool(torch.isfinite(values).all()):
            self.sink.reject()
            current.calls.clear()
            return
        self._warn_of_chain(current, root, grad[0] if single else grad)
        generator = self.sink.generator(values.device)
        if self.fisher == "mc":
            pseudo = iter([likelihood.sampled(values, generator)])
        else:
            pseudo = signed(likelihood.exact(values), generator)
        seen: set[Block] = set()
        for h in pseudo:
            h = likelihood.masked(h, grad)
            self._send_back(current, root, h[0] if single else h, seen)
        for block in current.calls:
            self.sink.complete(block)
        # Calls of layers behind the output would form a reference cycle with the graph.
        current.calls.clear()

    def _loss_reaches_base(
        self, returned: RootOutput, grads: Sequence[Tensor | None]
    ) -> None:
        """Receive the gradient of an output that was changed in place, at its base."""
        grad = grads[returned.nr]
        if grad is not None:
            self._loss_arrives(returned, grad)

    def find_examples(
        self,
        root: GradientEdge,
        outputs: Tensor,
        edges: Mapping[Call, GradientEdge | None],
        shape: torch.Size | None = None,
    ) -> None:
        """Find the example of each row of some calls, if that is possible.

        Args:
            root: Of the outputs.
            outputs: ``[N, *]``.
            edges: Of the calls' outputs; ``None`` for the root's output itself.
            shape: Of gradients at the root, if it is another than that of the outputs.

        Raises:
            CaptureError: If the graph has regions of selective checkpoints.
        """
        calls, key = self.examples.unknown(edges, root, len(outputs))
        if not calls:
            return

        def send(calls: Sequence[Call], h: Tensor) -> list[Tensor | None]:
            """Return the gradients that arrive at calls for one of the outputs."""
            h = h if shape is None else h.reshape(shape)
            try:
                with self.paused(), advised(SELECTIVE):
                    return gradients_at(root, [edges[call] for call in calls], h)
            except CaptureError:  # a selective checkpoint without covered layers
                raise
            except RuntimeError as error:
                raise GoneError(ONCE) from error

        try:
            self.examples.find(calls, send, outputs, key)
        except GoneError:
            self.examples.take_by_shape(calls, len(outputs), ONCE)

    def _warn_of_chain(
        self, current: ForwardPass, root: GradientEdge, grad: Tensor
    ) -> None:
        """Warn, once, if the model was called on what an earlier call returned."""
        earlier = current.previous()
        if self._chained or earlier is None or earlier.backward_began:
            return
        calls = earlier.every_call()
        edges = [call.edge for call in calls if call.edge is not None]
        with self.paused():
            reached = gradients_at(root, edges, grad)
        if any(g is not None for g in reached):
            self._chained = True
            warn_outside(
                "The model was called on what it had returned before. "
                f"fisher={self.fisher!r} takes the outputs of every call for "
                "predictions with targets. Construct the optimizer for a module whose "
                "forward makes all the calls, or use fisher='empirical'."
            )

    def _fitted(self, outputs: Tensor, grad: Tensor) -> Likelihood:
        """Return the likelihood with the settings that the loss's gradient decides.

        A decision is kept: on a GPU it has to be waited for.
        """
        fitted = self._class_dims.get(outputs.dim())
        if fitted is None:
            fitted = self.likelihood.fitted_to_gradient(outputs, grad)
            if fitted is not self.likelihood:
                self._class_dims[outputs.dim()] = fitted
        return fitted

    def _adds_to_grad(self, current: ForwardPass) -> bool:
        """Return whether this backward pass adds to the ``.grad`` of any layer."""
        if current.calls:
            return any(adds_to_grad(call.leaf) for call in current.every_call())
        for block, weight in self._weights:
            if block.sharded:  # fully_shard exchanges parameters during a pass
                return True
            if not weight.requires_grad:
                continue
            if adds_to_grad(get_gradient_edge(weight).node):
                return True
        return False

    def _renew(self, current: ForwardPass) -> None:
        """Forget an earlier backward pass whose gradients have been cleared.

        The one that runs now then counts as the first through its forward pass.
        Pseudo-gradients do not depend on the loss and stay.
        """
        task = torch._C._current_graph_task_id()
        if not current.backward_began or task == current.task:
            return
        current.task = task
        if self.fisher == "empirical" and self.sink.cleared():
            current.backward_began, current.terms = False, None
            current.arrived.clear()

    def _begin(self, current: ForwardPass, terms: TargetMask | None) -> None:
        current.backward_began, current.terms = True, terms
        current.task = torch._C._current_graph_task_id()
        if self.sink.begin(terms, averaged=current.averaged):
            self._waiting = {k: p for k, p in self._waiting.items() if p is current}

    def _begin_unseen(self, current: ForwardPass) -> None:
        """Begin a backward pass of a loss that does not come from the root's output.

        All examples count, and their rows are known by the shape alone.
        """
        size, calls = current.size, current.every_call()
        terms = TargetMask.full(size) if size else None
        self._begin(current, terms)
        asked = [] if self._sharded else self.examples.undecided(calls, terms)
        why = "the loss is not of an output of the model (return the logits beside it)"
        if not size:
            why = "they are called outside of the model's forward (call the model)"
        self.examples.take_by_shape(asked, size, why)

    def _send_back(
        self, current: ForwardPass, root: GradientEdge, h: Tensor, seen: set[Block]
    ) -> None:
        """Back-propagate one pseudo-gradient to every recorded call."""
        calls = current.every_call()
        model = self._root() if self._sharded else None
        with advised(*REMEDIES), self.paused(), kept_gathered(model):
            grads = gradients_at(root, [call.edge for call in calls], h)
        pairs: dict[Block, list[tuple[Call, Tensor]]] = {}
        for call, grad in zip(calls, grads, strict=True):
            if grad is not None:
                pairs.setdefault(call.block, []).append((call, grad))
        for block, group in pairs.items():
            self._deliver(block, group, current.terms, repeated=block in seen)
        seen |= set(pairs)

    def _gradient_arrives(
        self,
        call: Call,
        current: ForwardPass | None,
        number: int,
        grads: Sequence[Tensor | None],
    ) -> None:
        """Take the gradient of the user's own loss ("empirical")."""
        grad = grads[number]
        if grad is None or not adds_to_grad(call.leaf):
            return
        if current is None:
            raise CaptureError(f"layer {call.use.name!r}: {REMEDIES['use_reentrant']}")
        self._renew(current)
        if not current.backward_began and not current.watched:
            self._begin_unseen(current)
        current.arrived.setdefault(call.block, []).append((call, grad.detach()))
        if current.backward_began:
            self._deliver_complete(current)
        else:
            self._waiting[id(current)] = current

    def _deliver_complete(self, current: ForwardPass) -> None:
        """Deliver the layers all of whose calls have received their gradient."""
        for block, arrived in list(current.arrived.items()):
            if len(arrived) >= len(current.calls[block]):
                del current.arrived[block]
                self._deliver(block, arrived, current.terms)
                self.sink.complete(block)
        if current.arrived:
            self._waiting[id(current)] = current
        else:
            self._waiting.pop(id(current), None)

    def flush(self) -> None:
        """Deliver the layers only some of whose calls received a gradient."""
        for current in list(self._waiting.values()):
            if current.arrived and not current.backward_began:
                self._begin_unseen(current)
            for block, arrived in current.arrived.items():
                self._deliver(block, arrived, current.terms)
            current.arrived.clear()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients that have arrived but were not delivered."""
        for current in self._waiting.values():
            current.arrived.clear()
        self._waiting.clear()
        # Between forward passes only an interrupted one can have left these behind.
        self._state.depth, self._state.current = 0, None
        for stack in self._state.taps.values():
            while stack:
                stack.pop().__exit__(None, None, None)

    def _deliver(
        self,
        block: Block,
        group: list[tuple[Call, Tensor]],
        terms: TargetMask | None,
        repeated: bool = False,
    ) -> None:
        pairs = []
        group = [(call, grad) for call, grad in group if grad.numel()]
        if not group:  # a rank without data
            return
        for call, grad in group:
            if call.inputs._version != call.version:
                raise CaptureError(
                    f"the input of layer {call.use.name!r} was changed in place after "
                    "the layer was called; use an out-of-place operation on it."
                )
            pairs.append(
                LayerCall(call.use, call.inputs, call.own(grad), call.examples)
            )
        device = pairs[0].grads.device.type
        exact = (
            torch.autocast(device, enabled=False)
            if torch.is_autocast_enabled(device)
            else nullcontext()
        )
        with profiled("ekfac::capture"), torch.no_grad(), exact:
            self.sink.add(block, pairs, terms, repeated=repeated)
