"""Modules recognised by what they compute, whatever their class is called.

Libraries write their own linear layers, norms and scaled embeddings. If a type has no
adapter, the shapes of the module's own parameters tell which of these rules it may
follow, and a probe tests whether it does:

- ``x W^T (+ b)`` and ``x W (+ b)``, for one matrix and at most one vector;
- ``c W[x]``, a row of the matrix for every index;
- ``(w + c) n(x) (+ b)`` feature by feature, for one or two vectors, with any ``n`` that
  does not depend on them: users' own norms, scales of a layer.

A probe runs the module's ``forward`` on random numbers, in training and in evaluation
mode, on a stand-in: an object of the module's class whose parameters are random, whose
buffers, tensors, lists, dicts and sets are copies, and whose other attributes are the
module's. The module's own parameters take no part, and torch's, Python's and NumPy's
random states are restored. Modules with children, or with a forward of the object
itself, or with parameters that fit no rule are not probed; one that raises follows no
rule.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ekfac.errors import UnsupportedLayerError
from ekfac.layers.base import Adapter, Overridden, Slot, registered_adapter, type_name
from ekfac.layers.functional import functional_adapter
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter
from ekfac.layers.norm import NormAdapter

# Error relative to the largest expected number; layers may compute in float32.
TOLERANCE = 1e-4
# Number of elements beyond which a weight is probed in single precision.
LARGE = 1 << 20


class _OwnNames(Adapter):
    """An adapter of parameters of any names; the weight has the most dimensions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        names = _own_parameters(module)
        weight = max(names, key=lambda name: names[name].dim())
        self.weight = Slot(weight)
        rest = [Slot(name) for name in names if name != weight]
        self.bias = rest[0] if rest else None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse nothing: the probe has accepted the module."""
        return None


class RowLinearAdapter(_OwnNames, LinearAdapter):
    """``x W^T (+ b)``, as ``nn.Linear`` has it."""


class ColumnLinearAdapter(RowLinearAdapter):
    """``x W (+ b)``, with the weight ``[d_in, d_out]``."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d_out, d_in]``."""
        return super().pack(weight.t(), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight ``[d_in, d_out]`` and bias ``[d_out]``."""
        weight, bias = super().unpack(matrix)
        return weight.t(), bias


class ScaledEmbeddingAdapter(_OwnNames, EmbeddingAdapter):
    """``c W[x]``: the output's gradient is multiplied by ``c``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.scale = _embedding_scale(module) or 1.0

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_out]``."""
        return super().output_gradients(grad) * self.scale


class FeatureScaleAdapter(_OwnNames, NormAdapter):
    """``(w + c) n(x) (+ b)``; the module itself computes ``n(x)``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.axes, names = _feature_names(module)
        self.weight = Slot(names[0])
        self.bias = Slot(names[1]) if len(names) > 1 else None

    def normalised(self, x: Tensor) -> Tensor:
        """Return ``n(x)``: the output with ``w = 1``, less that with ``w = 0``."""
        own = _own_parameters(self.module)
        zeros = {name: x.new_zeros(p.shape) for name, p in own.items()}
        ones = {**zeros, self.weight.name: zeros[self.weight.name] + 1}
        with torch.no_grad():
            at_1, at_0 = (_StandIn(self.module, t)(x.clone()) for t in (ones, zeros))
        return at_1 - at_0

    def features_last(self, x: Tensor) -> Tensor:
        """Return ``[N, S, d]``."""
        axis = self.axes.get(x.dim())
        if axis is None and len(set(self.axes.values())) == 1:
            axis = next(iter(self.axes.values()))
        if axis is None:
            raise UnsupportedLayerError(
                f"{type_name(self.module)} was called with {x.dim()} dimensions; which "
                f"of them are the features is known of {sorted(self.axes)}. Register "
                "an adapter for it, see ekfac.layers.register."
            )
        x = x.unsqueeze(0) if x.dim() == 1 else x.movedim(axis, -1)
        return x.reshape(len(x), -1, x.shape[-1])


def find_adapter(module: nn.Module) -> type[Adapter] | str | None:
    """Return a module's adapter, why it is refused, or ``None`` if it has none.

    The adapter is that of the object or of its type; else that of the rule that the
    module follows, found by a probe; else that of the operations that the module's code
    passes its weights to.

    Args:
        module: A layer. A probe runs its ``forward`` on a copy of it.
    """
    adapter = registered_adapter(module)
    if not (adapter is None or isinstance(adapter, Overridden)):
        return adapter
    return recognise(module) or functional_adapter(module) or adapter


def recognise(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter whose rule ``module`` follows, or ``None``."""
    if "forward" in vars(module) or any(True for _ in module.children()):
        return None
    own = _own_parameters(module)
    shapes = [tuple(p.shape) for p in own.values()]
    if not shapes or not all(p.is_floating_point() for p in own.values()):
        return None
    if any(0 in shape for shape in shapes):
        return None
    dims = sorted((len(shape) for shape in shapes), reverse=True)
    if dims in ([1], [1, 1]):
        same = len(set(shapes)) == 1 and shapes[0][0] > 1
        return FeatureScaleAdapter if same and _feature_names(module)[0] else None
    if dims not in ([2], [2, 1]):
        return None
    for adapter in (RowLinearAdapter, ColumnLinearAdapter):
        if _is_linear(module, transposed=adapter is ColumnLinearAdapter):
            return adapter
    if len(shapes) == 1 and _embedding_scale(module) is not None:
        return ScaledEmbeddingAdapter
    return None


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's own parameters that have a shape, by name."""
    lazy = nn.parameter.UninitializedParameter
    own = {n: p for n, p in module._parameters.items() if p is not None}
    return {} if any(isinstance(p, lazy) for p in own.values()) else own


class _StandIn:
    """A module's ``forward`` on an object with other parameters."""

    COPIED: ClassVar[tuple[type, ...]] = (Tensor, list, dict, set)

    def __init__(
        self,
        module: nn.Module,
        tensors: dict[str, Tensor],
        training: bool | None = None,
    ) -> None:
        kind = type(module)
        self.object: nn.Module = kind.__new__(kind)
        state: dict[str, Any] = {}
        for key, value in vars(module).items():
            state[key] = _copied(value) if isinstance(value, self.COPIED) else value
        absent = {n: None for n, p in module._parameters.items() if p is None}
        state["_parameters"] = {**absent, **tensors}
        state["_buffers"] = {n: _copied(b) for n, b in module._buffers.items()}
        if training is not None:
            state["training"] = training
        vars(self.object).update(state)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the result of ``forward``; hooks are not called."""
        result = self.object.forward(x)
        if not isinstance(result, Tensor):
            raise TypeError(f"forward returned a {type(result).__name__}")
        return result


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Restore random states, and suppress output and warnings."""
    numpy = sys.modules.get("numpy")
    python, array = random.getstate(), numpy and numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)


Parameters = dict[str, Tensor]


class _Probe:
    """A module on random parameters."""

    def __init__(self, module: nn.Module) -> None:
        own = _own_parameters(module)
        self.module = module
        first = next(iter(own.values()))
        self.device = torch.device("cpu") if first.is_meta else first.device
        large = max(p.numel() for p in own.values()) > LARGE
        self.dtype = torch.float32 if large else torch.float64
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.tensors = {name: self.random(*p.shape) for name, p in own.items()}

    def random(self, *shape: int) -> Tensor:
        """Return normal random numbers."""
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        return torch.randn(*shape, generator=self.generator, **options)

    def output(
        self, x: Tensor, tensors: dict[str, Tensor], *, training: bool
    ) -> Tensor | None:
        """Return the output with other parameters, ``None`` if the module raises."""
        with _undisturbed(self.device):
            try:
                return _StandIn(self.module, tensors, training)(x.clone())
            except Exception:  # whatever the module's code may raise
                return None

    def follows(
        self, x: Tensor, rule: Callable[[Parameters], Tensor], *, training: bool
    ) -> bool | None:
        """Return whether output and gradients are the rule's, ``None`` if it raises."""
        with torch.enable_grad():
            leaves = {n: t.clone().requires_grad_() for n, t in self.tensors.items()}
            output, expected = self.output(x, leaves, training=training), rule(leaves)
            if output is None:
                return None
            if output.shape != expected.shape or not output.requires_grad:
                return False
            h = self.random(*expected.shape)
            tensors = list(leaves.values())
            grads = torch.autograd.grad(
                output, tensors, h.to(output), allow_unused=True
            )
            wanted = torch.autograd.grad(expected, tensors, h, allow_unused=True)
        pairs = zip((output, *grads), (expected, *wanted), strict=True)
        return all(a is not None and b is not None and _agree(a, b) for a, b in pairs)

    def always_follows(
        self, inputs: Iterable[Tensor], rule: Callable[[Tensor, Parameters], Tensor]
    ) -> bool:
        """Return whether it follows a rule on all inputs that it takes, if any."""
        verdicts = [
            self.follows(x, partial(rule, x), training=training)
            for x in inputs
            for training in (True, False)
        ]
        return True in verdicts and False not in verdicts


def _agree(result: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors of one shape are equal to rounding."""
    error = (result.to(expected) - expected).abs().max()
    return bool(error <= TOLERANCE * expected.abs().max())


def _is_linear(module: nn.Module, *, transposed: bool) -> bool:
    """Return whether a module computes ``x W^T (+ b)``; ``x W`` if ``transposed``."""
    probe = _Probe(module)
    weight, *bias = sorted(probe.tensors, key=lambda n: -probe.tensors[n].dim())
    d_out, d_in = probe.tensors[weight].shape
    if transposed:
        d_out, d_in = d_in, d_out
    if bias and probe.tensors[bias[0]].shape[0] != d_out:
        return False

    def rule(x: Tensor, tensors: Parameters) -> Tensor:
        matrix = tensors[weight] if transposed else tensors[weight].t()
        return x @ matrix + (tensors[bias[0]] if bias else 0)

    inputs = (probe.random(*lead, d_in) for lead in ((5,), (3, 4)))
    return probe.always_follows(inputs, rule)


def _embedding_scale(module: nn.Module) -> float | None:
    """Return ``c`` if the module computes ``c W[x]`` of indices ``x``, else None."""
    if getattr(module, "scale_grad_by_freq", False):
        return None
    probe = _Probe(module)
    ((name, matrix),) = probe.tensors.items()
    padding = getattr(module, "padding_idx", None)
    options: dict[str, Any] = {"generator": probe.generator, "device": probe.device}
    x = torch.randint(len(matrix), (5,), **options)
    output = probe.output(x, probe.tensors, training=False)
    if output is None or output.shape != matrix[x].shape:
        return None
    scale = float((output.to(matrix) * matrix[x]).sum() / matrix[x].square().sum())

    def rule(x: Tensor, tensors: Parameters) -> Tensor:
        return scale * F.embedding(x, tensors[name], padding)

    inputs = (torch.randint(len(matrix), s, **options) for s in ((5,), (3, 4)))
    return scale if scale and probe.always_follows(inputs, rule) else None


def _feature_axes(module: nn.Module, names: list[str]) -> dict[int, int]:
    """Return the number of dimensions -> the one that ``names`` (scale, shift) act on.

    Empty if the module is no such scale.
    """
    probe = _Probe(module)
    size = len(probe.tensors[names[0]])
    first, second = [n for n in (3, 4, 5) if n != size][:2]
    axes: dict[int, int] = {}
    for shape, axis in (
        ((first, size), -1),
        ((2, first, size), -1),
        ((2, size, first), 1),
        ((2, first, second, size), -1),
        ((2, size, first, second), 1),
    ):
        x = probe.random(*shape)
        verdicts = [_scales(probe, names, x, axis, t) for t in (True, False)]
        if False in verdicts:
            return {}
        if verdicts == [True, True]:
            axes[len(shape)] = axis
    return axes


def _feature_names(module: nn.Module) -> tuple[dict[int, int], list[str]]:
    """Return :func:`_feature_axes`, and the names of scale and shift in this order."""
    names = list(_own_parameters(module))
    for order in (names, names[::-1]):
        axes = _feature_axes(module, order)
        if axes:
            return axes, order
    return {}, names


def _scales(
    probe: _Probe, names: list[str], x: Tensor, axis: int, training: bool
) -> bool | None:
    """Return whether the output is ``(w + c) n(x) + b`` along ``axis``.

    ``None`` if the module does not take such an input.
    """
    zeros = {name: torch.zeros_like(t) for name, t in probe.tensors.items()}
    ones = {**zeros, names[0]: torch.ones_like(zeros[names[0]])}
    with torch.no_grad():
        without = probe.output(x, zeros, training=training)
        with_one = probe.output(x, ones, training=training)
    if without is None or with_one is None:
        return None
    if not x.shape == without.shape == with_one.shape:
        return False
    rest = without.to(x)
    n = with_one.to(x) - rest
    shape = [1] * x.dim()
    shape[axis] = -1

    def rule(tensors: Parameters) -> Tensor:
        w, *shift = (tensors[name].reshape(shape) for name in names)
        return rest + w * n + (shift[0] if shift else 0)

    return probe.follows(x, rule, training=training)
