"""Check of adapters against autograd, for the package's own and for users'."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ekfac import kernels
from ekfac.kernels.input_gram import dense
from ekfac.layers import Adapter, Shortcuts, find_adapter, find_shortcuts
from ekfac.layers.base import CallForm, FunctionalAdapter, MaskedAdapter
from ekfac.layers.views import unchanged


class _Call(NamedTuple):
    """One use of a block's weight.

    Attributes:
        adapter: The block's.
        inputs: Its input.
        output: Its output.
        arrange: From the gradient that arrives to that of ``output``.
        form: Adapter that reads this call; mostly the block's.
    """

    adapter: Adapter
    inputs: Tensor
    output: Tensor
    arrange: Callable[[Tensor], Tensor]
    form: Adapter

    @property
    def transposed(self) -> bool:
        """Whether inputs and output gradients exchange roles."""
        return isinstance(self.form, CallForm) and self.form.transposed


def check_adapter(module: nn.Module, *inputs: Any, tolerance: float = 1e-8) -> bool:
    """Return ``True`` if the adapter of ``module`` agrees with autograd, or raise.

    The check uses a float64 copy, as ``torch.autograd.gradcheck`` does for functions.
    ``pack`` and ``unpack`` must undo each other; ``inputs`` and ``output_gradients``
    must have the shapes that the ``[b, d_out, d_in]`` of ``pack`` implies; and for
    every single example ``sum_s g_s a_s^T`` must be autograd's packed gradient of a
    random linear functional of that example's output, and zero at the other examples.
    Every shortcut (:class:`ekfac.layers.Shortcuts`) must agree with ``inputs``.

    Examples are the first dimension of the output (for ``nn.MultiheadAttention``, as
    its ``batch_first`` says); an adapter may take a call without it as one example.

    Args:
        module: A layer whose type has an adapter, see :func:`ekfac.layers.register`.
        *inputs: What the layer is called with, in any precision. Several examples and
            positions, all of different sizes, show the most.
        tolerance: Largest error of a gradient, relative to its norm where that is
            above 1.

    Raises:
        ValueError: If there is no adapter, if it refuses the module, or if a method
            returns another shape than expected.
        AssertionError: If a method or a shortcut returns other numbers than expected.

    Example:
        >>> from torch import nn, randn
        >>> check_adapter(nn.Conv2d(4, 6, 3, groups=2), randn(5, 4, 7, 8))
        True
    """
    kind, adapter = type(module).__name__, find_adapter(module)
    if adapter is None or isinstance(adapter, str):
        reason = adapter or "its type has none; write one with ekfac.layers.register"
        raise ValueError(f"{kind} has no adapter to check: {reason}.")
    if _check(module, adapter, inputs, tolerance):
        # An input without a batch dimension is one example; two stacked ones are two.
        pairs = [torch.stack([x, x]) for x in inputs]
        if _check(module, adapter, pairs, tolerance):
            raise ValueError(f"{kind}: inputs returned 1 example for 2 stacked ones.")
    return True


def _check(
    module: nn.Module, kind: type[Adapter], inputs: Sequence[Any], tolerance: float
) -> bool:
    """Check one call; return whether the adapter took it as one example."""
    twin = copy.deepcopy(module).double().requires_grad_()
    values = [
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    name = type(module).__name__
    parts = {f"{name}.{key}".rstrip("."): a for key, a in kind.build(twin).items()}
    for key, adapter in parts.items():
        _check_packing(adapter, key)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        output, dim, calls = _run(twin, list(parts.values()), values)
        terms = output * torch.randn(output.shape, generator=generator).to(output)
        for key, adapter in parts.items():
            own_calls = [call for call in calls if call.adapter is adapter]
            count = _check_gradients(own_calls, key, terms, dim, tolerance)
            for call in own_calls:
                _check_shortcuts(call, key, tolerance)
    return count == 1 != output.shape[dim]


def _expect(name: str, what: str, value: Tensor | None, *shape: int) -> None:
    """Raise if a method's result has another shape than ``shape``."""
    if value is None or list(value.shape) != list(shape):
        size = "None" if value is None else f"the shape {list(value.shape)}"
        raise ValueError(f"{name}: {what} returned {size}; expected {list(shape)}.")


def _check_packing(adapter: Adapter, name: str) -> None:
    views = [slot.of(adapter.parameter(slot)) for slot in adapter.slots()]
    sent = [torch.arange(v.numel()).reshape(v.shape).to(v) for v in views]
    packed = adapter.pack(sent[0], sent[1] if len(sent) > 1 else None)
    size = sum(t.numel() for t in sent)
    if packed.dim() != 3 or packed.numel() != size:
        raise ValueError(
            f"{name}: pack returned the shape {list(packed.shape)}; expected "
            f"[b, d_out, d_in] with the {size} elements of weight and bias."
        )
    for got, tensor in zip(adapter.unpack(packed), sent, strict=False):
        _expect(name, "unpack", got, *tensor.shape)
        if got is None or not torch.equal(got, tensor):
            raise AssertionError(f"{name}: unpack does not undo pack.")


def _run(
    module: nn.Module, adapters: Sequence[Adapter], inputs: Sequence[Any]
) -> tuple[Tensor, int, list[_Call]]:
    """Return the module's output, the examples' dimension in it, and the calls."""
    first = adapters[0]
    if not isinstance(first, FunctionalAdapter):
        output: Tensor = module(*inputs)
        x, arrange = first.call_of(tuple(inputs), {})
        laid = arrange or unchanged
        return output, 0, [_Call(a, x.detach(), output, laid, a) for a in adapters]
    calls: list[_Call] = []

    def report(
        adapter: Adapter,
        x: Tensor,
        out: Tensor,
        arrange: Callable[[Tensor], Tensor],
        keep: Tensor | None,
    ) -> None:
        form = adapter if keep is None else MaskedAdapter(adapter, keep)
        own_adapter = adapter.of if isinstance(adapter, CallForm) else adapter
        calls.append(_Call(own_adapter, x.detach(), out, arrange, form))

    with first.tap(module, adapters, tuple(inputs), {}, report):
        output = module(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    # Cells and unbatched calls have the examples in the first dimension.
    dim = 0 if output.dim() == 2 or getattr(module, "batch_first", True) else 1
    unbatched = inputs[0].dim() == 2 and hasattr(module, "batch_first")
    return (output.unsqueeze(0) if unbatched else output), dim, calls


def _inputs(call: _Call, name: str, shape: tuple[int, int, int]) -> Tensor:
    """Return a call's inputs ``[N, S, b or 1, d_in]``, zero where masked."""
    form, size = call.form, shape[1] if call.transposed else shape[2]
    a = form.inputs(call.inputs)
    if form.diagonal_input:
        _expect(name, "inputs", a, *a.shape[:2])
        a = nn.functional.one_hot(a, size).unsqueeze(2)
    a = a.double()
    blocks = 1 if a.dim() == 4 and a.shape[2] == 1 else shape[0]
    _expect(name, "inputs", a, *a.shape[:2], blocks, size)
    mask = form.mask(call.inputs)
    return a if mask is None else a * mask[..., None, None]


def _check_gradients(
    calls: Sequence[_Call], name: str, terms: Tensor, dim: int, tolerance: float
) -> int:
    """Check a block's gradients, example by example; return the number of examples."""
    adapter = calls[0].adapter
    slots, shape = adapter.slots(), adapter.matrix_shape()
    inputs = [_inputs(call, name, shape) for call in calls]
    n, size = len(inputs[0]), terms.shape[dim]
    if n not in (1, size):
        raise ValueError(f"{name}: inputs returned {n} examples; expected {size}.")
    wanted = [call.output for call in calls] + [adapter.parameter(s) for s in slots]
    for i, term in enumerate([terms] if n == 1 else terms.unbind(dim)):
        grads = torch.autograd.grad(term.sum(), wanted, retain_graph=True)
        gradients = terms.new_zeros(n, *shape)
        for call, a, grad in zip(calls, inputs, grads, strict=False):
            g = call.form.output_gradients(call.arrange(grad))
            size = shape[2] if call.transposed else shape[1]
            _expect(name, "output_gradients", g, *a.shape[:2], shape[0], size)
            term = kernels.position_sum(g, a)
            gradients += term.mT if call.transposed else term
        parts = [s.of(g) for s, g in zip(slots, grads[len(calls) :], strict=True)]
        expected = torch.zeros_like(gradients)
        expected[i] = adapter.pack(parts[0], parts[1] if len(parts) > 1 else None)
        error = float((gradients - expected).norm()) / max(1.0, float(expected.norm()))
        if not error <= tolerance:
            bias = adapter.unpack(gradients[i])[1]
            right = bias is not None and torch.allclose(bias, parts[-1])
            where = "inputs, or pack's order of features" if right else "either"
            raise AssertionError(
                f"{name}: sum_s g_s a_s^T of inputs and output_gradients is off the "
                f"gradient of example {i} by {error:.1e} of its norm; expected at most "
                f"{tolerance:.0e}. Bias {'right' if right else 'wrong or absent'}: the "
                f"fault is in {where}."
            )
    return n


def _check_shortcuts(call: _Call, name: str, tolerance: float) -> None:
    """Compare the results of an adapter's shortcuts with those of its inputs."""
    adapter, x = call.form, call.inputs
    shortcuts = find_shortcuts(adapter)
    if type(shortcuts) is Shortcuts:
        return
    a = _inputs(call, name, call.adapter.matrix_shape())
    with torch.no_grad():
        source = shortcuts.input_gram(x)
        if source is not None:
            gram = source if isinstance(source, Tensor) else dense(source)
            expected = kernels.gram(a)
            if adapter.shared_factors:
                expected = expected.sum(dim=0, keepdim=True)
            _compare(name, "input_gram", gram, expected, tolerance)
        generator = torch.Generator().manual_seed(1)
        blocks = 1 if adapter.shared_factors else a.shape[2]
        columns = torch.randn(blocks, a.shape[3], 3, generator=generator).to(a)
        rotated = shortcuts.rotated_inputs(x, columns)
        if rotated is not None:
            expanded = columns.expand(a.shape[2], -1, -1)
            expected = torch.einsum("nsbi,bim->nbms", a, expanded)
            _compare(name, "rotated_inputs", rotated, expected, tolerance)
        if call.form.family == "exact":
            _check_row_gradients(call, a, name, tolerance)
        if shortcuts.elements_per_example(x) and len(a) == len(x):
            alone = torch.cat([adapter.inputs(example) for example in x.split(1)])
            what = "elements_per_example allows for examples one at a time: inputs"
            _compare(name, what, alone, adapter.inputs(x), tolerance)


def _check_row_gradients(call: _Call, a: Tensor, name: str, tolerance: float) -> None:
    """Compare the sums over positions of an exact block with those of its rows."""
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(call.output.shape, generator=generator).to(a)
    sums = find_shortcuts(call.form).row_gradients(call.inputs, grad)
    if sums is not None:
        g = call.form.output_gradients(grad)
        expected = kernels.position_sum(g, a).squeeze(-2)
        _compare(name, "row_gradients", sums, expected, tolerance)


def _compare(
    name: str, what: str, result: Tensor, expected: Tensor, tolerance: float
) -> None:
    """Raise if a shortcut's result differs from that of the adapter's inputs."""
    _expect(name, what, result, *expected.shape)
    error = float((result - expected).norm()) / max(1.0, float(expected.norm()))
    if not error <= tolerance:
        raise AssertionError(
            f"{name}: {what} is off what inputs gives by {error:.1e} of its norm; "
            f"expected at most {tolerance:.0e}. Register no shortcuts for this "
            "adapter, or correct them."
        )
