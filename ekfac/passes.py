"""What one forward pass leaves behind for its backward, and who receives it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from ekfac.example_rows import Examples
from ekfac.layers import Block, Use
from ekfac.likelihoods import TargetMask


class LayerCall(NamedTuple):
    """A call of a layer with what its backward brought.

    Attributes:
        use: The module.
        inputs: Its input.
        grads: The gradient of its output.
        examples: Which example each row belongs to; ``None``: as the shape says.
    """

    use: Use
    inputs: Tensor
    grads: Tensor
    examples: Examples | None = None


class Sink(Protocol):
    """What receives the recorded statistics."""

    def begin(self, terms: TargetMask | None, *, averaged: bool) -> bool:
        """Note that a backward pass begins, over targets ``terms``.

        Gradients may be ``averaged`` over ranks in it.

        Returns:
            Whether what was recorded before it has been discarded.
        """

    def wants(self, block: Block) -> bool:
        """Return whether the current step takes statistics of ``block``."""

    def add(
        self,
        block: Block,
        pairs: Sequence[LayerCall],
        terms: TargetMask | None,
        *,
        repeated: bool = False,
    ) -> None:
        """Add the calls of one block in one backward pass.

        A ``repeated`` pass is a further one through the graph of the same calls.
        """

    def separates(self, block: Block) -> bool:
        """Return whether what is taken of ``block`` depends on its rows' examples."""

    def complete(self, block: Block) -> None:
        """Note that this backward pass brings nothing more of ``block``."""

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator that pseudo-gradients are drawn with."""


# What an error of autograd says, in a second backward through the graph -> what to do.
REMEDIES = {
    "use_reentrant": (
        "reentrant activation checkpointing leaves no graph to follow; call "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
    ),
    "donated_buffer": (
        "the compiled model's backward reuses the memory of its graph, through which "
        "fisher='mc' and 'exact' go twice; set torch._functorch.config.donated_buffer "
        "= False before the model is compiled, or use fisher='empirical'."
    ),
}


@dataclass(eq=False)
class Call:
    """One call of a layer in a forward pass."""

    block: Block
    use: Use
    inputs: Tensor
    version: int
    edge: GradientEdge | None
    rearrange: Callable[[Tensor], Tensor] | None = None
    examples: Examples | None = None


@dataclass(eq=False)
class ForwardPass:
    """One forward pass of the root module, and what its backward has brought so far.

    Attributes:
        calls: The layers' calls, by block.
        arrived: The calls whose output gradient has arrived, with it.
        terms: Which targets count, known when the loss's gradient arrives.
        averaged: The backward pass averages gradients over ranks.
        watched: The gradient of the root's output will be seen. What arrives before it
            (the output of the last layer, other heads) waits for the terms.
    """

    calls: dict[Block, list[Call]] = field(default_factory=dict)
    arrived: dict[Block, list[tuple[Call, Tensor]]] = field(default_factory=dict)
    terms: TargetMask | None = None
    averaged: bool = False
    watched: bool = False
    backward_began: bool = False


def in_backward() -> bool:
    """Return whether the autograd engine is running on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


# Passes that captures are in the middle of. Hooks run on threads of the engine, which
# know nothing of the thread that began the pass.
_own_passes: list[object] = []


@contextmanager
def own_backward() -> Iterator[None]:
    """Mark backward passes that no user asked for: nobody's hooks take notice."""
    token = object()
    _own_passes.append(token)
    try:
        yield
    finally:
        _own_passes.remove(token)


def in_own_backward() -> bool:
    """Return whether some capture goes backward by itself."""
    return bool(_own_passes)


def when_backward_ends(call: Callable[[], None]) -> None:
    """Have ``call`` called at the end of the backward pass that is running now."""
    Variable._execution_engine.queue_callback(call)


class Hook:
    """A hook that keeps nothing alive and stays behind when its module is copied."""

    def __init__(self, owner: object | None, method: str, *bound: Any) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._method, self._bound = method, bound

    # Compiled models break their graph here: what is recorded are real tensors. The
    # public torch.compiler.disable would import the compiler along with this module.
    @_disable_dynamo
    def __call__(self, *args: Any) -> None:
        """Call the owner's method, if there still is an owner."""
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            getattr(owner, self._method)(*self._bound, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """Return an inert hook: a copy of the model is not the optimizer's."""
        return Hook(None, self._method)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as an inert hook."""
        return Hook, (None, self._method)

    @property
    def inert(self) -> bool:
        """Whether it stayed behind on a copy, or its owner is gone."""
        return self._owner is None or self._owner() is None


def remove_inert(module: nn.Module) -> None:
    """Remove the hooks that were copied along with the module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, h in hooks.items() if isinstance(h, Hook) and h.inert]:
            del hooks[key]
            for mark in (
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
            ):
                mark.pop(key, None)


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and the handles from their list."""
    while handles:
        handles.pop().remove()


def find_outputs(output: Any) -> Tensor | None:
    """Return the tensor of predictions in what a model returned.

    A tensor is itself; of a mapping or an object, ``logits`` if there is one; else the
    first tensor with a gradient.
    """
    if isinstance(output, Tensor):
        usable = output.requires_grad and output.is_floating_point() and output.dim()
        return output if usable else None
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is not None:
        return find_outputs(logits)
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            found = find_outputs(item)
            if found is not None:
                return found
    return None
