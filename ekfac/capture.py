"""What each layer saw: inputs and output gradients, from forward and tensor hooks.

A forward hook on every covered layer records the call's input; a hook on the call's
output receives its gradient. Unlike full backward hooks this survives in-place
activations, non-reentrant checkpointing and layers that are called several times.
Nothing is recorded without a graph (``no_grad``), in ``eval`` mode, or in the
recomputation of a checkpoint.

With ``fisher="mc"`` or ``"exact"`` the root module's output is watched as well. When
the gradient of the user's loss arrives there, pseudo-gradients of the likelihood are
sent through the same graph first.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from ekfac.errors import CaptureError, EkfacWarning
from ekfac.example_rows import APPROXIMATE, found, probe_multipliers, said
from ekfac.layers import Adapter, Block, Use, is_sharded
from ekfac.layers.base import FunctionalAdapter, MaskedAdapter
from ekfac.layers.nested import padded_call
from ekfac.likelihoods import Likelihood, TargetMask, signed
from ekfac.passes import (
    REMEDIES,
    Call,
    ForwardPass,
    Hook,
    LayerCall,
    Sink,
    find_outputs,
    in_backward,
    in_own_backward,
    own_backward,
    remove,
    remove_inert,
)


class Capture:
    """Records the calls of a model's blocks and hands them to a sink.

    Args:
        model: The module whose call is one forward pass.
        blocks: The blocks whose layers are recorded.
        sink: Receives what was recorded.
        likelihood: Says which targets count; read by ``"mc"`` and ``"exact"``.
        fisher: ``"empirical"``, ``"mc"`` or ``"exact"``.

    Attributes:
        averaged: Says of a forward pass that begins whether its backward averages
            gradients over ranks.
    """

    # How much of other examples the rows may hold, see ``example_rows.found``.
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
        self._pass: ForwardPass | None = None
        # Calls outside a call of the root. Only their graph keeps them alive.
        self._orphans: Callable[[], ForwardPass | None] = lambda: None
        self._waiting: dict[int, ForwardPass] = {}
        self._depth = 0
        self._paused = 0
        self.eval_forwards = 0
        # Edges of calls whose rows' examples matter. Only the hook on the root's output
        # holds them: a hook on a layer's own node would keep its graph for ever.
        self._edges: dict[Call, GradientEdge | None] = {}
        # Layers whose first dimension was found to be the examples'.
        self._regular: set[tuple[str, int]] = set()
        self._warned: set[str] = set()
        self._class_dims: dict[int, Likelihood] = {}
        self._taps: dict[int, list[AbstractContextManager[Any]]] = {}
        self.outputs: Callable[[Tensor], None] | None = None
        self.averaged: Callable[[], bool] = bool
        self._handles: list[RemovableHandle] = []
        self._closed = False
        for module in model.modules():
            remove_inert(module)
        self._root = weakref.ref(model)
        self._sharded = any(hasattr(module, "unshard") for module in model.modules())
        self._handles.append(
            model.register_forward_pre_hook(Hook(self, "_root_begins"))
        )
        self._handles.append(
            model.register_forward_hook(Hook(self, "_root_ends"), always_call=True)
        )
        self.attach(blocks)
        weakref.finalize(self, remove, self._handles)

    def attach(self, blocks: Sequence[Block]) -> None:
        """Hook the layers of ``blocks``, unless closed."""
        if self._closed:
            return
        functional: dict[nn.Module, list[tuple[Block, Use]]] = {}
        for block in blocks:
            for use in block.uses:
                module = use.adapter.module
                if isinstance(use.adapter, FunctionalAdapter):
                    functional.setdefault(module, []).append((block, use))
                    continue
                hook = Hook(self, "_layer_called", block, use)
                # A root that is a layer itself is recorded before its pass ends.
                first = module is self._root()
                self._handles.append(
                    module.register_forward_hook(hook, with_kwargs=True, prepend=first)
                )
        for module, uses in functional.items():
            begins, ends = Hook(self, "_tap", uses), Hook(self, "_untap")
            self._handles.append(
                module.register_forward_pre_hook(begins, with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(ends, always_call=True))

    def close(self) -> None:
        """Remove every hook, for good."""
        self._closed = True
        remove(self._handles)

    def __enter__(self) -> None:
        """Pause: forward passes inside the ``with`` block are not recorded."""
        self._paused += 1

    def __exit__(self, *exc: object) -> None:
        """Resume."""
        self._paused -= 1

    # -- forward ---------------------------------------------------------------------

    def _root_begins(self, module: nn.Module, args: Any) -> None:
        self._depth += 1
        if self._depth == 1 and not in_backward():
            self._pass = ForwardPass(averaged=self.averaged())
            self._edges = {}

    def _root_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or in_backward():
            return
        current, self._pass = self._pass, None
        edges, self._edges = self._edges, {}
        outputs = find_outputs(output)
        if outputs is not None and self.outputs is not None:
            self.outputs(outputs)
        recording = module.training and not self._paused and torch.is_grad_enabled()
        self.eval_forwards += int(not module.training and torch.is_grad_enabled())
        if current is None or outputs is None or not recording:
            return
        if outputs.is_nested:  # its layers' rows say how many examples there are
            if self.fisher != "empirical":
                raise CaptureError(
                    f"fisher={self.fisher!r} needs a dense output of the model, it is "
                    "a nested tensor; return a padded one, or use fisher='empirical'."
                )
            return
        edge = get_gradient_edge(outputs)
        values = outputs.detach()
        for calls in current.calls.values():
            for call in calls:
                # The root's own node must not be held by a hook on it: a cycle that
                # the garbage collector cannot see.
                if call.edge is not None and call.edge.node is edge.node:
                    call.edge = None
        for call, its_edge in edges.items():
            if its_edge is not None and its_edge.node is edge.node:
                edges[call] = None
        hook = Hook(
            self,
            "_loss_arrives",
            current,
            values,
            values._version,
            edge.output_nr,
            edges,
        )
        outputs.register_hook(hook)
        current.watched = True

    def _recording(self) -> bool:
        root = self._root()
        return (
            root is not None
            and root.training
            and not self._paused
            and torch.is_grad_enabled()
        )

    def _layer_called(
        self,
        block: Block,
        use: Use,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        out: Any,
    ) -> None:
        if not (self._recording() and self.sink.wants(block)):
            return
        if not isinstance(out, Tensor) or not out.requires_grad:
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
        """Note one call and ask for the gradient of its output."""
        if is_sharded(inputs) or is_sharded(output):
            raise CaptureError(
                f"layer {use.name!r} was called with a DTensor: it is tensor-parallel, "
                "and a rank sees only a part of its inputs or outputs. Data-parallel "
                "models, DistributedDataParallel and fully_shard, can be trained."
            )
        inputs = inputs.detach()
        needs_edge = self.fisher != "empirical"
        edge = get_gradient_edge(output) if needs_edge else None
        call = Call(block, use, inputs, inputs._version, edge, rearrange, said())
        # Going backward twice through sharded modules would gather them twice.
        if call.examples is None and self._pass and not self._sharded:
            self._edges[call] = edge or get_gradient_edge(output)
        recomputed = in_backward()
        current = self._pass
        if not recomputed:
            if needs_edge and current is None:
                return
            current = current or self._outside_root()
            current.calls.setdefault(block, []).append(call)
            if needs_edge:
                return
        output.register_hook(Hook(self, "_gradient_arrives", call, current))

    def _outside_root(self) -> ForwardPass:
        """Return what collects the layers that are called without the root."""
        current = self._orphans()
        if current is None or current.backward_began:
            current = ForwardPass()
            self._orphans = weakref.ref(current)
        return current

    def _tap(
        self, uses: list[tuple[Block, Use]], module: nn.Module, args: Any, kwargs: Any
    ) -> None:
        """Watch the functions that a module uses its weights in until it returns."""
        stack = self._taps.setdefault(id(module), [])
        wanted = [(b, u) for b, u in uses if self.sink.wants(b)]
        by_adapter = {id(u.adapter): (b, u) for b, u in wanted}
        if not (wanted and self._recording()):
            stack.append(nullcontext())
            return

        def report(
            adapter: Adapter,
            x: Tensor,
            out: Tensor,
            rearrange: Callable[[Tensor], Tensor],
            keep: Tensor | None,
        ) -> None:
            if out.requires_grad:
                block, use = by_adapter[id(adapter)]
                if keep is not None:
                    masked = MaskedAdapter(adapter, keep)
                    use = Use(use.name, masked, use.transposed)
                self._record(block, use, x, out, rearrange)

        kind, adapters = wanted[0][1].adapter, [u.adapter for _, u in wanted]
        assert isinstance(kind, FunctionalAdapter)
        tap = kind.tap(module, adapters, args, kwargs, report)
        stack.append(tap)
        tap.__enter__()

    def _untap(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = self._taps.get(id(module))
        if stack:
            stack.pop().__exit__(None, None, None)

    # -- backward --------------------------------------------------------------------

    def _loss_arrives(
        self,
        current: ForwardPass,
        values: Tensor,
        version: int,
        nr: int,
        edges: dict[Call, GradientEdge | None],
        grad: Tensor,
    ) -> None:
        """Count the targets and, for "mc" and "exact", back-propagate first."""
        if self._paused or current.backward_began or in_own_backward():
            return
        if values._version != version:
            raise CaptureError(
                "the model's output was changed in place after the forward pass; use "
                "an out-of-place operation on it."
            )
        single = self._is_one_example(current, values)
        if single:
            values, grad = values.unsqueeze(0), grad.unsqueeze(0)
        likelihood = self._fitted(values, grad)
        with torch.no_grad():
            terms = likelihood.terms(values, grad)
        self._begin(current, terms)
        root = GradientEdge(torch._C._current_autograd_node(), nr)
        if terms.size > 1:
            asked = self._asked(edges, terms)
            self.find_examples(root, values, {c: edges[c] for c in asked})
        edges.clear()
        self._deliver_complete(current)
        if self.fisher == "empirical" or not current.calls:
            return
        if not len(values):  # a rank without data
            current.calls.clear()
            return
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
        # A layer behind the output would keep alive the graph that keeps this alive.
        current.calls.clear()

    @staticmethod
    def _is_one_example(current: ForwardPass, outputs: Tensor) -> bool:
        """Return whether a model was called on one example without a batch dimension.

        Then its outputs ``[C]`` are no ``C`` examples: some layer saw a vector, and
        none as many vectors.
        """
        if outputs.dim() != 1 or len(outputs) == 1:
            return False
        inputs = [call.inputs for calls in current.calls.values() for call in calls]
        vectors = [x for x in inputs if x.is_floating_point() and x.dim() < 3]
        batched = any(x.dim() == 2 and len(x) == len(outputs) for x in vectors)
        return not batched and any(x.dim() == 1 for x in vectors)

    def _fitted(self, outputs: Tensor, grad: Tensor) -> Likelihood:
        """Return the likelihood with what the loss's gradient says of it.

        It is asked until it says something: on a GPU one waits for the answer.
        """
        known = self._class_dims.get(outputs.dim())
        if known is None:
            known = self.likelihood.fitted_to_gradient(outputs, grad)
            if known is not self.likelihood:
                self._class_dims[outputs.dim()] = known
        return known

    def _asked(self, calls: Iterable[Call], terms: TargetMask) -> list[Call]:
        """Return the calls of which the rows' examples matter and are not known.

        A layer whose first dimension was once found to be the examples', and has their
        number again, is not asked again. Ignored targets need the rows that are theirs.
        """
        unknown = [call for call in calls if not self._is_regular(call, terms.size)]
        if unknown and terms.mask is not None and not bool(terms.mask.all()):
            return unknown
        return [call for call in unknown if self.sink.separates(call.block)]

    def find_examples(
        self,
        root: GradientEdge,
        outputs: Tensor,
        edges: Mapping[Call, GradientEdge | None],
    ) -> None:
        """Find which example each row of some calls belongs to, by going backward.

        See :mod:`ekfac.example_rows`.

        Args:
            root: Of the outputs.
            outputs: ``[N, *]``.
            edges: Of the calls' outputs; ``None`` for the root's output itself.
        """
        size = len(outputs)
        if not edges:
            return
        try:
            plain, *multiplied = self._probe(root, outputs, edges)
        except RuntimeError:  # a graph that one cannot go back through twice
            for call in edges:
                if len(call.inputs) != size:
                    self._warn_unknown(call, "its graph can be gone through once alone")
            return
        for number, call in enumerate(edges):
            grads = [rows[number] for rows in (plain, *multiplied)]
            if any(g is None for g in grads):
                continue
            adapter = call.use.adapter
            given = [
                adapter.output_gradients(
                    g if call.rearrange is None else call.rearrange(g)
                )
                for g in grads
                if g is not None
            ]
            call.examples = found(given[0], given[1:], size, self.tolerance)
            if call.examples is None and self._first_is(call, size):
                self._regular.add((call.use.name, call.inputs.dim()))
            elif isinstance(call.examples, str) and self.fisher == "empirical":
                self._warn_unknown(call, "each of them depends on several examples")

    def _probe(
        self,
        root: GradientEdge,
        outputs: Tensor,
        edges: Mapping[Call, GradientEdge | None],
    ) -> list[list[Tensor | None]]:
        """Return gradients of the calls' outputs, for each probe of the outputs."""
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        factors = probe_multipliers(len(outputs))
        probes = [h, *(h * f.reshape(-1, *[1] * (h.dim() - 1)) for f in factors)]
        inner = [edge for edge in edges.values() if edge is not None]
        results: list[list[Tensor | None]] = []
        for probe in (p.to(outputs) for p in probes):
            grads: Sequence[Tensor | None] = ()
            with self, own_backward():
                if inner:
                    grads = torch.autograd.grad(
                        [root], inner, [probe], retain_graph=True, allow_unused=True
                    )
            received = iter(grads)
            results.append(
                [probe if e is None else next(received) for e in edges.values()]
            )
        return results

    @staticmethod
    def _first_is(call: Call, size: int) -> bool:
        """Return whether the first dimension alone has the size of the batch."""
        shape = call.inputs.shape
        return shape[:1] == (size,) and shape[1:2] != (size,)

    def _is_regular(self, call: Call, size: int) -> bool:
        key = (call.use.name, call.inputs.dim())
        return key in self._regular and self._first_is(call, size)

    def _warn_unknown(self, call: Call, why: str) -> None:
        """Warn once that a layer's rows cannot be told apart by examples."""
        if call.use.name in self._warned:
            return
        self._warned.add(call.use.name)
        warnings.warn(
            f"Which example the rows of layer {call.use.name!r} belong to is unknown: "
            f"{why}. What needs it (scaling='per_example', sharing='reduce', blocks of "
            "norms) is taken by shape or over the whole batch. Say it with "
            "ekfac.rows_of_examples(index), or use fisher='mc' or "
            "scaling='running_average'.",
            EkfacWarning,
            stacklevel=2,
        )

    def _begin(self, current: ForwardPass, terms: TargetMask | None) -> None:
        current.backward_began, current.terms = True, terms
        if self.sink.begin(terms, averaged=current.averaged):
            self._waiting = {k: p for k, p in self._waiting.items() if p is current}

    def _send_back(
        self, current: ForwardPass, root: GradientEdge, h: Tensor, seen: set[Block]
    ) -> None:
        """Back-propagate one pseudo-gradient to every recorded call."""
        calls = [call for calls in current.calls.values() for call in calls]
        edges = [call.edge for call in calls if call.edge is not None]
        grads: Sequence[Tensor | None] = ()
        model = self._root() if self._sharded else None
        try:
            with self, own_backward(), _kept_gathered(model):
                if edges:
                    grads = torch.autograd.grad(
                        [root], edges, [h], retain_graph=True, allow_unused=True
                    )
        except RuntimeError as error:
            for sign, advice in REMEDIES.items():
                if sign in str(error):
                    raise CaptureError(advice) from error
            raise
        received = iter(grads)
        pairs: dict[Block, list[tuple[Call, Tensor]]] = {}
        for call in calls:
            # A call without an edge is the root's output itself.
            grad = h if call.edge is None else next(received)
            if grad is not None:
                pairs.setdefault(call.block, []).append((call, grad))
        for block, group in pairs.items():
            self._deliver(block, group, current.terms, repeated=block in seen)
        seen |= set(pairs)

    def _gradient_arrives(
        self, call: Call, current: ForwardPass | None, grad: Tensor
    ) -> None:
        """Take the gradient of the user's own loss ("empirical")."""
        if self._paused or in_own_backward():
            return
        if current is None:
            raise CaptureError(f"layer {call.use.name!r}: {REMEDIES['use_reentrant']}")
        if not current.backward_began and not current.watched:
            self._begin(current, None)
        current.arrived.setdefault(call.block, []).append((call, grad.detach()))
        if current.backward_began:
            self._deliver_complete(current)
        else:
            self._waiting[id(current)] = current

    def _deliver_complete(self, current: ForwardPass) -> None:
        """Deliver the layers of which every call has received its gradient."""
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
        """Deliver the layers of which only some calls received a gradient."""
        for current in list(self._waiting.values()):
            if current.arrived and not current.backward_began:
                self._begin(current, None)
            for block, arrived in current.arrived.items():
                self._deliver(block, arrived, current.terms)
            current.arrived.clear()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients that have arrived and were not delivered."""
        for current in self._waiting.values():
            current.arrived.clear()
        self._waiting.clear()
        # Between forward passes: left behind only by one that was interrupted.
        self._depth, self._pass = 0, None
        for stack in self._taps.values():
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
            grad = grad if call.rearrange is None else call.rearrange(grad)
            pairs.append(LayerCall(call.use, call.inputs, grad, call.examples))
        device = pairs[0].grads.device.type
        with (
            record_function("ekfac::capture"),
            torch.no_grad(),
            torch.autocast(device, enabled=False),
        ):
            self.sink.add(block, pairs, terms, repeated=repeated)


@contextmanager
def _kept_gathered(model: nn.Module | None) -> Iterator[None]:
    """Gather parameters again that a pass through the graph within has freed.

    ``fully_shard`` gathers a layer's parameters when a gradient arrives at its output
    and frees them when the gradients of its inputs are there. The loss's own gradient
    has arrived at some layers already and still needs theirs.
    """
    modules: Any = () if model is None else model.modules()
    sharded = [module for module in modules if hasattr(module, "unshard")]
    before = [m for m in sharded if not all(map(is_sharded, _own_parameters(m)))]
    try:
        yield
    finally:
        for module in before:
            module.unshard()


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module that no module within shards by itself."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not hasattr(child, "unshard"):
            yield from _own_parameters(child)
