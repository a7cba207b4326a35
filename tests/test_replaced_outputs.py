"""Layers whose output is not the one that their type's forward returned.

Users' hooks, another ``forward`` of the object and hooks of all modules change it. The
right statistics are those of the same network with a module in the hook's place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_users_loops import METHODS, TEXTBOOK
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode
from users_loops import batch, network

from ekfac import EKFAC
from ekfac.errors import CaptureError, EkfacWarning
from ekfac.layers import override
from ekfac.layers.linear import LinearAdapter


class Tripled(nn.Module):
    """What the hooks do, as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * x)


def tripled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return torch.tanh(3 * out)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 6),
    "convolution": lambda: nn.Conv1d(1, 6, 3, padding=1),
    "circular convolution": lambda: nn.Conv1d(
        1, 6, 3, padding=1, padding_mode="circular"
    ),
    "layer norm": lambda: nn.LayerNorm(5),
    "batch norm": lambda: nn.BatchNorm1d(5),
    "group norm": lambda: nn.GroupNorm(1, 1),
    "RMS norm": lambda: nn.RMSNorm(5),
    "embedding": lambda: nn.Embedding(7, 6),
    "transposed convolution": lambda: nn.ConvTranspose1d(1, 6, 3, padding=1),
    "bilinear": lambda: nn.Bilinear(5, 5, 6),
}
UNSEEN = ("transposed convolution", "bilinear")  # no operation tells of their calls


class Net(nn.Module):
    """A layer, something behind it and a head."""

    def __init__(self, kind: str, after: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind, self.after = LAYERS[kind](), kind, after
        self.head = nn.LazyLinear(3)
        self.double()(batch()[0])

    def forward(self, x: Tensor) -> Tensor:
        if "convolution" in self.kind or self.kind == "group norm":
            h = self.layer(x[:, None])
        elif self.kind == "embedding":
            h = self.layer((10 * x).long().abs() % 7)
        elif self.kind == "bilinear":
            h = self.layer(x, x.flip(1))
        else:
            h = self.layer(x)
        h = h if self.after is None else self.after(h)
        h = h if h.dim() == 2 else h.flatten(1)
        return self.head(torch.tanh(h))


def hook_first(layer: nn.Module) -> None:
    layer.register_forward_hook(tripled, prepend=True)


def hook_last(layer: nn.Module) -> None:
    layer.register_forward_hook(tripled)


def own_forward(layer: Any) -> None:
    before = layer.forward
    layer.forward = lambda *args: torch.tanh(3 * before(*args))


WAYS = {"hook first": hook_first, "hook last": hook_last, "forward": own_forward}


@contextmanager
def hook_of_all_modules(layer: nn.Module) -> Iterator[None]:
    """Change the output of one of them."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        return tripled(module, args, out) if module is layer else None

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def after_steps(
    model: Any, make: Any, way: str, when: str = "late", fisher: Any = "empirical"
) -> tuple[list[Tensor], list[str]]:
    """Return curvature and parameters after two steps, and what was warned of."""
    if when == "early" and way in WAYS:
        WAYS[way](model.layer)
    optimizer = make(model, fisher=fisher, **TEXTBOOK)
    if when == "late" and way in WAYS:
        WAYS[way](model.layer)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for number in range(2):
            optimizer.zero_grad()
            x, y = batch(number)
            if way == "all modules":
                with hook_of_all_modules(model.layer):
                    loss = cross_entropy(model(x), y)
            else:
                loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    layers = optimizer.curvature.values()
    tensors = [t for layer in layers for t in (layer.A, layer.G, layer.s)]
    state = [t for t in (*tensors, *model.parameters()) if t is not None]
    return state, [str(w.message) for w in record if w.category is EkfacWarning]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


SEEN = [(kind, way) for kind in LAYERS if kind not in UNSEEN for way in (*WAYS, "")]
TRIES = [("KFAC", "empirical", "late"), ("running average", "mc", "early")]
TRIES += [("per example", "exact", "late")]
# One try of each kind and way, all of them slow.
EVERY = [
    pytest.param(*one, *TRIES[k], marks=() if k == i % 3 else pytest.mark.slow)
    for i, one in enumerate(SEEN)
    for k in range(3)
]


@pytest.mark.parametrize(("kind", "way", "method", "fisher", "when"), EVERY)
def test_statistics_are_of_the_layers_own_output(
    kind: str, way: str, method: str, fisher: str, when: str
) -> None:
    make = METHODS[method]
    expected, _ = after_steps(Net(kind, Tripled()), make, "", "", fisher)
    found, said = after_steps(Net(kind), make, way or "all modules", when, fisher)
    assert_alike(found, expected)
    assert not said


@pytest.mark.parametrize("way", ["hook first", "hook last"])
@pytest.mark.parametrize("kind", UNSEEN)
def test_hooks_of_layers_whose_operations_tell_nothing(kind: str, way: str) -> None:
    make = METHODS["per example"]
    expected, _ = after_steps(Net(kind, Tripled()), make, "")
    assert_alike(after_steps(Net(kind), make, way)[0], expected)


@pytest.mark.parametrize("way", ["forward", "all modules"])
@pytest.mark.parametrize("kind", UNSEEN)
def test_layers_that_cannot_be_seen_are_named(kind: str, way: str) -> None:
    _, said = after_steps(Net(kind), EKFAC, way)
    assert "layer (whose output may be another than the layer's own" in said[0]


def test_a_hook_put_first_outside_of_the_model_is_noticed() -> None:
    """Hooks are put in order when the model is called, else at the first call."""
    model = network()
    optimizer = EKFAC(model, **TEXTBOOK)
    model[0].register_forward_hook(tripled, prepend=True)
    x, y = batch()
    cross_entropy(model[2](torch.tanh(model[0](x))), y).backward()
    with pytest.warns(EkfacWarning, match=r"0 \(whose output may be another"):
        optimizer.step()


class TwiceAdapter(LinearAdapter):
    """Of a layer whose object's forward returns twice what its type's does."""

    def output_gradients(self, grad: Tensor) -> Tensor:
        return super().output_gradients(2 * grad)


def test_an_adapter_of_the_object_is_for_its_forward() -> None:
    results = []
    for own in (False, True):
        model: Any = network()
        before = model[0].forward
        model[0].forward = lambda x, before=before: 2 * before(x)
        if own:
            override(model[0], TwiceAdapter)
        optimizer = EKFAC(model, **TEXTBOOK)
        x, y = batch()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        layers = optimizer.curvature.values()
        results.append([t for layer in layers for t in (layer.A, layer.G, layer.s)])
    assert_alike(*results)


def test_an_unseen_layer_alone_is_an_error() -> None:
    model: Any = nn.Bilinear(5, 5, 3).double()
    optimizer = EKFAC(model, **TEXTBOOK)
    own_forward(model)
    x, y = batch()
    cross_entropy(model(x, x), y).backward()
    with pytest.raises(CaptureError, match="output may be another"):
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_pseudo_gradients_are_of_what_the_model_returns(fisher: Any, way: str) -> None:
    states = []
    for replaced in (False, True):
        model = network() if replaced else nn.Sequential(*network(), Tripled())
        optimizer = METHODS["per example"](model, fisher=fisher, **TEXTBOOK)
        if replaced:
            WAYS[way](model)
        for number in range(2):
            optimizer.zero_grad()
            x, y = batch(number)
            cross_entropy(model(x), y).backward()
            optimizer.step()
        layers = optimizer.curvature.values()
        states.append([t for layer in layers for t in (layer.A, layer.G, layer.s)])
    assert_alike(*states)


def test_counting_operations_and_tracing_leave_no_trace() -> None:
    results = []
    for extra in (False, True):
        model = Net("convolution")
        optimizer = EKFAC(model, **TEXTBOOK)
        for number in range(2):
            x, y = batch(number)
            optimizer.zero_grad()
            if extra:
                torch.jit.trace(model, x)
            with FlopCounterMode(display=False) if extra else warnings.catch_warnings():
                cross_entropy(model(x), y).backward()
            optimizer.step()
        layers = optimizer.curvature.values()
        tensors = [t for layer in layers for t in (layer.A, layer.G, layer.s)]
        results.append([*tensors, *model.parameters()])
    assert_alike(*results)
