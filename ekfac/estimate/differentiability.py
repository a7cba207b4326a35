"""Functions whose backward cannot be differentiated, found before a product is wrong.

A product with a Jacobian or a Hessian differentiates the backward of every function on
the way. Torch's own can be; a function written in Python (a third-party kernel, a
custom activation) may hide from torch that its backward depends on what it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.module_tracker import ModuleTracker

from ekfac.errors import UnsupportedOperationError
from ekfac.vectors import clean

Function = type[torch.autograd.Function]
Rerun = Callable[[], object]
# Layers in which a function is tried; entries of a derivative that may differ (kinks).
TRIED, KINKS = 3, 0.1


@dataclass(frozen=True)
class Call:
    """A call of an autograd function.

    Attributes:
        function: The function.
        layer: Name of the module that made it, empty for the model itself.
        arguments: What it was given, detached; which required a gradient still does.
    """

    function: Function
    layer: str
    arguments: tuple[Any, ...]


def check_jacobian(outputs: Tensor, model: nn.Module | None, rerun: Rerun) -> None:
    """Raise if a function on the way to ``outputs`` has no differentiable backward.

    Functions marked ``once_differentiable`` have none. The backward of others that are
    written in Python is tried: its result must be linear in the gradient that it is
    given.

    Args:
        outputs: With their graph.
        model: Whose layers are named; ``None``: ``outputs`` are a loss of the user's.
        rerun: Computes ``outputs`` once more, to find the layer, before an error.

    Raises:
        UnsupportedOperationError: Naming the function and the layers.
    """
    for node in _python_nodes(outputs):
        function = type(node)._forward_cls
        if _once_differentiable(function) or not _is_linear(node):
            calls = _calls_of([function], model, rerun)
            _refuse(function, [call.layer for call in calls])


def check_hessian(
    loss: Tensor, model: nn.Module | None, rerun: Rerun, verified: set[Function]
) -> None:
    """Raise if second derivatives of ``loss`` would be wrong.

    Besides what :func:`check_jacobian` finds, it finds a backward that treats saved
    tensors as constants. A model that calls functions written in Python is run once
    more, and the derivative of each function's backward is compared with a finite
    difference, at the arguments of up to three layers. That costs one forward pass and
    some six calls of each such function, once for every Hessian. Functions that were
    found right before are ``verified``; the present ones are added.

    Raises:
        UnsupportedOperationError: Naming the function and the layers.
    """
    check_jacobian(loss, model, rerun)
    functions = {type(node)._forward_cls for node in _python_nodes(loss)} - verified
    functions = {f for f in functions if "Checkpoint" not in f.__name__}
    calls = _calls_of(functions, model, rerun) if functions else []
    for function in functions:
        wrong = [
            call.layer
            for call in [c for c in calls if c.function is function][:TRIED]
            if not _is_twice_differentiable(call)
        ]
        if wrong:
            _refuse(function, wrong)
    verified |= functions


def _refuse(function: Function, layers: Iterable[str]) -> NoReturn:
    name = f"{function.__module__}.{function.__qualname__}"
    listed = ", ".join(repr(layer) for layer in dict.fromkeys(layers) if layer)
    where = f"layer {listed} calls" if listed else "the model or the loss calls"
    raise UnsupportedOperationError(
        f"{where} {name}, whose backward cannot be differentiated: products with the "
        "Jacobian, the Hessian and implicit matrices would be wrong. Use "
        "structure='dense', 'block_diagonal', 'ekfac' or another of ekfac.fisher that "
        "takes gradients alone, or write the function's backward (of a loss: the loss) "
        "with differentiable operations on saved tensors."
    )


# -- what the graph shows --------------------------------------------------------------


def has_python_functions(outputs: Sequence[Tensor]) -> bool:
    """Return whether the graph has a function whose backward is written in Python."""
    return any(True for output in outputs for _ in _python_nodes(output))


def _python_nodes(outputs: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph whose backward is written in Python."""
    pending, seen = [outputs.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield node
        pending += [parent for parent, _ in node.next_functions]


def _once_differentiable(function: Any) -> bool:
    """Return whether the backward of an autograd function bears torch's mark."""
    for name in ("backward", "vjp"):
        attribute = vars(function).get(name)
        inner = getattr(attribute, "__func__", attribute)
        source = getattr(getattr(inner, "__code__", None), "co_filename", None)
        if hasattr(inner, "__wrapped__") and source == torch.autograd.function.__file__:
            return True
    return False


def _is_linear(node: Any) -> bool:
    """Return whether a node's backward can be differentiated by what it is given.

    A backward is linear: its transposed derivative at ``w``, multiplied with the
    gradient that it is given, equals ``w`` multiplied with its result.
    """
    if "Checkpoint" in type(node).__name__:  # goes backward itself, into ``.grad``
        return False
    parents = [GradientEdge(p, nr) for p, nr in node.next_functions if p is not None]
    generator = torch.Generator().manual_seed(0)
    grad_outputs = [
        torch.randn(tuple(meta.shape), generator=generator, dtype=torch.float64)
        .to(device=meta.device, dtype=meta.dtype)
        .requires_grad_()
        for meta in node._input_metadata
        if not meta.is_nested_tensor
    ]
    edges = [GradientEdge(node, i) for i in range(len(grad_outputs))]
    grads = torch.autograd.grad(
        edges, parents, grad_outputs, create_graph=True, allow_unused=True
    )
    results = [g for g in grads if g is not None]
    values = [g.detach() for g in results]
    if not all(g.requires_grad for g in results if bool(g.any())):
        return False
    w = [torch.randn_like(g) for g in results]
    inner = sum(float((g * v).sum()) for g, v in zip(values, w, strict=True))
    used = [(g, v) for g, v in zip(results, w, strict=True) if g.requires_grad]
    if not used:
        return True
    back = torch.autograd.grad(
        [g for g, _ in used], grad_outputs, [v for _, v in used], allow_unused=True
    )
    other = sum(
        float((b * u.detach()).sum())
        for b, u in zip(back, grad_outputs, strict=True)
        if b is not None
    )
    size = sum(float((g * v).abs().sum()) for g, v in zip(values, w, strict=True))
    return abs(inner - other) <= 1e-2 * size


# -- what a call shows -----------------------------------------------------------------


def _calls_of(
    functions: Iterable[Function], model: nn.Module | None, rerun: Rerun
) -> list[Call]:
    """Return the first call of each function in every layer, by running once more."""
    calls: list[Call] = []
    seen: set[tuple[Function, str]] = set()
    with ModuleTracker() as tracker, _watched(functions) as watchers:

        def note(function: Function, arguments: tuple[Any, ...]) -> None:
            inside = max(tracker.parents - {"Global"}, key=len, default="")
            root, _, name = inside.partition(".")
            named = model is not None and root == type(model).__name__
            layer = clean(model, name) if model is not None and named else inside
            if (function, layer) not in seen:
                seen.add((function, layer))
                calls.append(Call(function, layer, _detached(arguments)))

        watchers.append(note)
        with torch.enable_grad():
            rerun()
    return calls


@contextmanager
def _watched(functions: Iterable[Function]) -> Iterator[list[Any]]:
    """Report every call of some autograd functions to the callables of a list."""
    watchers: list[Any] = []
    before: list[tuple[Any, Any]] = []

    def watch(function: Any) -> None:
        forward = function.forward
        base = torch.autograd.Function.setup_context
        skipped = 0 if function.setup_context is not base else 1  # the context

        @functools.wraps(forward)
        def reported(*arguments: Any) -> Any:
            for watcher in watchers:
                watcher(function, arguments[skipped:])
            return forward(*arguments)

        before.append((function, vars(function).get("forward")))
        function.forward = staticmethod(reported)

    try:
        for function in functions:
            watch(function)
        yield watchers
    finally:
        for function, forward in before:
            if forward is None:
                del function.forward
            else:
                function.forward = forward


def _detached(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        a.detach().clone().requires_grad_(a.requires_grad)
        if isinstance(a, Tensor)
        else a
        for a in arguments
    )


def _is_twice_differentiable(call: Call) -> bool:
    """Return whether the derivative of a function's backward is a finite difference.

    In double precision if the function takes it. A function that cannot be called on
    its own counts as right.
    """
    refusals = (RuntimeError, TypeError, ValueError, AssertionError)
    try:
        return _derivatives_agree(call, torch.float64, 1e-4)
    except refusals:  # a kernel for single precision
        pass
    try:
        return _derivatives_agree(call, None, 1e-2)
    except refusals:
        return True


def _derivatives_agree(call: Call, dtype: torch.dtype | None, step: float) -> bool:
    """Return whether derivatives of the gradient are its differences over ``step``."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return drawn.to(like)

    def convert(a: Any) -> Any:
        floating = isinstance(a, Tensor) and a.is_floating_point()
        return a.detach().to(dtype=dtype) if floating else a

    places = [
        i
        for i, a in enumerate(call.arguments)
        if isinstance(a, Tensor) and a.requires_grad
    ]
    arguments = [convert(a) for a in call.arguments]
    if not places:
        return True
    scales = [arguments[i].square().mean().sqrt().clamp(min=1e-3) for i in places]
    # Off the points where functions have kinks, such as zero.
    for i, scale in zip(places, scales, strict=True):
        arguments[i] = arguments[i] + 1e-2 * scale * noise(arguments[i])
    directions = [noise(arguments[i]) * s for i, s in zip(places, scales, strict=True)]
    gradients: list[Tensor] = []

    def pulled(distance: float) -> tuple[list[Tensor], list[Tensor]]:
        """Return leaves at ``distance`` along the directions, and their gradients."""
        moved = list(arguments)
        for i, d in zip(places, directions, strict=True):
            moved[i] = (arguments[i] + distance * d).requires_grad_()
        leaves = [moved[i] for i in places]
        results = call.function.apply(*moved)
        results = results if isinstance(results, tuple) else (results,)
        used = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if not gradients:
            gradients.extend(noise(r) for r in used)
        grads = torch.autograd.grad(
            used, leaves, gradients, create_graph=True, allow_unused=True
        )
        zipped = zip(grads, leaves, strict=True)
        return leaves, [torch.zeros_like(x) if g is None else g for g, x in zipped]

    above, below = pulled(step)[1], pulled(-step)[1]
    agree = functools.partial(_agree, above=above, below=below, step=step)
    # The derivative of a gradient is symmetric; that of a surrogate's need not be.
    if agree(_pulled_back(*pulled(0.0), directions)):
        return True
    try:
        return agree(_pushed(*pulled(0.0), directions))
    except RuntimeError:  # not three times differentiable, which nothing asks for
        return False


def _agree(
    derivative: Sequence[Tensor],
    above: Sequence[Tensor],
    below: Sequence[Tensor],
    step: float,
) -> bool:
    """Return whether a derivative is the difference of values at ``+-step``.

    A share ``KINKS`` of the elements may differ; those that are not finite do not
    count.
    """
    wrong = count = 0
    for exact, up, down in zip(derivative, above, below, strict=True):
        difference = (up - down).detach() / (2 * step)
        rounding = 16 * torch.finfo(up.dtype).eps * up.detach().abs().max() / step
        away = (exact - difference).abs()
        bad = away > 0.05 * (exact.abs() + difference.abs()) + rounding
        finite = torch.isfinite(away)
        wrong, count = wrong + int((bad & finite).sum()), count + int(finite.sum())
    return wrong <= KINKS * count


def _pulled_back(
    leaves: Sequence[Tensor], grads: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Return the transposed derivatives of ``grads``, applied to the directions."""
    used = [(g, d) for g, d in zip(grads, directions, strict=True) if g.requires_grad]
    if not used:
        return [torch.zeros_like(x) for x in leaves]
    back = torch.autograd.grad(
        [g for g, _ in used], leaves, [d for _, d in used], allow_unused=True
    )
    zipped = zip(back, leaves, strict=True)
    return [torch.zeros_like(x) if b is None else b for b, x in zipped]


def _pushed(
    leaves: Sequence[Tensor], grads: Sequence[Tensor], directions: Sequence[Tensor]
) -> list[Tensor]:
    """Return the derivatives of ``grads`` along directions of their leaves.

    The transposed derivative is linear in its vector: its own transposed derivative is
    the one that is wanted.
    """
    used = [g for g in grads if g.requires_grad]
    vectors = [torch.zeros_like(g, requires_grad=True) for g in used]
    tangents: Sequence[Tensor | None] = [None] * len(used)
    if used:
        back = torch.autograd.grad(
            used, leaves, vectors, create_graph=True, allow_unused=True
        )
        parts = [
            (b * d).sum()
            for b, d in zip(back, directions, strict=True)
            if b is not None and b.requires_grad
        ]
        if parts:
            tangents = torch.autograd.grad(
                torch.stack(parts).sum(), vectors, allow_unused=True
            )
    remaining = iter(tangents)
    results = []
    for g in grads:
        product = next(remaining) if g.requires_grad else None
        results.append(torch.zeros_like(g) if product is None else product.detach())
    return results
