"""Hooks that keep nothing alive, and questions to autograd and to a gradient scaler."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.autograd.profiler import record_function
from torch.nn.modules.module import _global_forward_hooks
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack as dispatch_modes,
)
from torch.utils.checkpoint import _CachingTorchDispatchMode as Caching
from torch.utils.hooks import RemovableHandle

from ekfac.errors import CaptureError

SELECTIVE = "selective activation checkpoint"
# Words in autograd's error on a second backward through the graph -> advice.
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
    SELECTIVE: (
        "the graph of a selective checkpoint can be gone through once; fisher='mc' and "
        "'exact', and telling rows apart by example, go twice. Call checkpoint without "
        "context_fn, or use fisher='empirical' and scaling='running_average'."
    ),
}


@contextmanager
def advised(*signs: str) -> Iterator[None]:
    """Say what to do where autograd cannot go through a graph again.

    Args:
        signs: Which of ``REMEDIES`` apply.

    Raises:
        CaptureError: With the remedy, in the place of autograd's error.
    """
    try:
        yield
    except RuntimeError as error:
        for sign in signs:
            if sign in str(error):
                raise CaptureError(REMEDIES[sign]) from error
        raise


def profiled(name: str) -> AbstractContextManager[object]:
    """Name what runs inside the ``with`` block in a profile, if one is taken."""
    taken = torch.autograd.profiler._is_profiler_enabled
    return record_function(name) if taken else nullcontext()


@contextmanager
def without_autocast(devices: Iterable[str]) -> Iterator[None]:
    """Compute in the tensors' own types inside the ``with`` block.

    What autocast keeps of weights in lower precision is forgotten afterwards, since the
    block may have changed them. It keeps them in blocks that disable it, too.

    Args:
        devices: Types of devices, such as ``"cuda"``.
    """
    available = filter(torch.amp.is_autocast_available, devices)
    lowered = [device for device in available if torch.is_autocast_enabled(device)]
    with ExitStack() as block:
        for device in lowered:
            block.enter_context(torch.autocast(device, enabled=False))
        try:
            yield
        finally:
            torch.clear_autocast_cache()


def in_selective_checkpoint() -> bool:
    """Return whether a forward pass runs in a region that is checkpointed in part."""
    return any(isinstance(mode, Caching) for mode in dispatch_modes())


def in_backward() -> bool:
    """Return whether the autograd engine is running on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def when_backward_ends(call: Callable[[], None]) -> None:
    """Have ``call`` called at the end of the backward pass that is running now."""
    Variable._execution_engine.queue_callback(call)


class Hook:
    """A hook that keeps nothing alive and does nothing on a copy of its module."""

    def __init__(self, owner: object | None, method: str, *bound: Any) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._method, self._bound = method, bound

    # Compiled models break their graph here, since real tensors are recorded. The
    # public torch.compiler.disable would import the compiler along with this module.
    @_disable_dynamo
    def __call__(self, *args: Any) -> None:
        """Call the owner's method, if the owner is still there."""
        owner = None if self._owner is None else self._owner()
        if owner is not None and not torch._C._is_tracing():
            getattr(owner, self._method)(*self._bound, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """Return an inert hook: a copy of the model is not the optimizer's."""
        return Hook(None, self._method)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as something that does nothing and needs no package to be loaded."""
        return getattr, (nullcontext(), "__exit__")

    @property
    def inert(self) -> bool:
        """Whether it is on a copy of the module, or its owner is gone."""
        return self._owner is None or self._owner() is None


def put_first(module: nn.Module, number: int) -> bool:
    """Put a forward hook before those that are not ours; return whether it was so."""
    hooks: Any = module._forward_hooks
    for key, hook in hooks.items():
        if key == number:
            return True
        if not isinstance(hook, Hook):
            break
    if number in hooks:
        hooks.move_to_end(number, last=False)
    return False


def put_last(module: nn.Module, number: int) -> None:
    """Put a forward hook behind those that came after it."""
    hooks: Any = module._forward_hooks
    if number in hooks:
        hooks.move_to_end(number)


def hides_output(module: nn.Module, own_adapter: bool) -> bool:
    """Return whether hooks may see another output than the adapter's.

    A ``forward`` of the object, and hooks of all modules, change the output before
    them. An adapter of the object's own is for its ``forward``.
    """
    replaced = "forward" in vars(module) and not own_adapter
    return replaced or bool(_global_forward_hooks)


def remove_inert(module: nn.Module) -> None:
    """Remove the hooks that were copied along with the module."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [k for k, h in hooks.items() if _is_inert(h)]:
            del hooks[key]
            for mark in (
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
            ):
                mark.pop(key, None)


def _is_inert(hook: Any) -> bool:
    """Return whether a hook is one of ours that was copied or unpickled."""
    if isinstance(hook, Hook):
        return hook.inert
    return isinstance(getattr(hook, "__self__", None), nullcontext)


def remove(handles: list[RemovableHandle]) -> None:
    """Remove hooks, and the handles from their list."""
    while handles:
        handles.pop().remove()


def in_transform() -> bool:
    """Return whether a transform of ``torch.func`` is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor that wrappers of ``torch.func``'s transforms hold."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def output_edge(output: Tensor) -> GradientEdge:
    """Return where a layer's output gradient arrives, even if the output is changed.

    An operation in place on a view, such as the output of ``Linear`` on inputs of three
    or more dimensions, takes the view's own node out of the graph; that of its base
    stays.
    """
    base = None if output.is_nested else output._base
    covers = (
        base is not None
        and base.grad_fn is not None
        and base.numel() == output.numel()
        and base.is_contiguous()
        and output.is_contiguous()
    )
    return get_gradient_edge(base if covers and base is not None else output)


def adds_to_grad(leaf: Node | None) -> bool:
    """Return whether the backward pass that is running adds to a weight's ``.grad``.

    Passes of ``torch.autograd.grad`` and ``backward(inputs=...)`` may not. Where the
    ``leaf`` is not known, every pass counts; see :class:`ekfac.calls.Call`.
    """
    if leaf is None:
        return True
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # autograd.grad with respect to the weight itself
        return False


def loss_scale(depth: int = 16) -> Tensor | float:
    """Return the scale of the ``GradScaler`` whose ``step`` is being run, or 1.

    A scaler has divided ``.grad`` by its scale before it calls the optimizer, but the
    recorded output gradients still have it. The interface that passes the scale on
    (``_step_supports_amp_scaling``) leaves it out after ``unscale_`` and turns off
    gradient clipping in Lightning, so it is read from the calling scaler.
    """
    frame = sys._getframe(1)
    for _ in range(depth):
        caller = frame.f_back
        if caller is None:
            return 1.0
        frame = caller
        # Reading a frame's variables keeps them alive, so only likely frames are read.
        if frame.f_code.co_name not in ("step", "_maybe_opt_step"):
            continue
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            scale = getattr(scaler, "_scale", None)
            return scale if isinstance(scale, Tensor) else 1.0
    return 1.0
