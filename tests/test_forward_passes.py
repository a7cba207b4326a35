"""Forward and backward passes of every sort, and what they leave behind: nothing.

A pass that does not end in a step leaves the state as it was; whatever is done to a
network's graph, its layers' factors are the same.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import collect, relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from training_cases import (
    METHODS,
    Method,
    assert_identical,
    every_fisher,
    every_method,
    example_batch,
    loss_of,
    small_classifier,
    snapshot,
    statistics,
    train,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ekfac import EKFAC
from ekfac.errors import CaptureError, EkfacWarning
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning")


# Each optimizer and each Fisher once, and the one whose gradients are recognised.
some_methods = pytest.mark.parametrize(
    "method", [*METHODS[::4], METHODS[1]], ids=lambda m: m.name
)

# -- passes that do not end in a step --------------------------------------------------

Event = Callable[[nn.Module, KroneckerOptimizer], object]


def without_grad(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    with torch.no_grad():
        loss_of(model, 50)
    with torch.inference_mode():
        loss_of(model, 50)


def evaluation(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    model.eval()
    loss_of(model, 50)  # with a graph: an attack or a saliency map needs one
    with torch.no_grad():
        loss_of(model, 51)
    model.train()


def forward_alone(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    loss_of(model, 50)


def child_alone(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    model[0](example_batch(50)[0])


def other_sizes(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    loss_of(model, 50, size=40)


def a_copy_trains(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    other = copy.deepcopy(model)
    loss_of(other, 50).backward()


class InterruptError(Exception):
    """What goes wrong within a forward pass."""


def raises(error: BaseException, *_: Any) -> None:
    raise error


def interrupted(
    model: nn.Module, optimizer: KroneckerOptimizer, error: BaseException
) -> None:
    handle = model[4].register_forward_pre_hook(partial(raises, error))
    try:
        loss_of(model, 50)
    except type(error):
        pass
    finally:
        handle.remove()


def interrupted_by_hand(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    """Torch runs no hook at the end of such a pass; ``step`` or this tidies up."""
    interrupted(model, optimizer, KeyboardInterrupt())
    optimizer.zero_grad()


def backward_in_eval(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    model.eval()
    loss_of(model, 50).backward()
    model.train()
    model.zero_grad()


def discarded(model: nn.Module, optimizer: KroneckerOptimizer, clear: str) -> None:
    loss_of(model, 50, size=9).backward()
    {"model": model, "optimizer": optimizer}[clear].zero_grad()


def discarded_zeros(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    loss_of(model, 50, size=9).backward()
    optimizer.zero_grad(set_to_none=False)


def discarded_beside(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    """The first layer is called by itself as well."""
    x, y = example_batch(50)
    model[0](x)
    cross_entropy(model(x), y).backward()
    model.zero_grad()


def input_gradient(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
    x, y = example_batch(50)
    x.requires_grad_()
    torch.autograd.grad(cross_entropy(model(x), y), x)


FORWARD_EVENTS: dict[str, Event] = {
    "no_grad": without_grad,
    "eval": evaluation,
    "forward without backward": forward_alone,
    "child alone": child_alone,
    "other batch size": other_sizes,
    "a copy of the model": a_copy_trains,
    "error": partial(interrupted, error=InterruptError()),
}
BACKWARD_EVENTS: dict[str, Event] = {
    "keyboard interrupt": interrupted_by_hand,
    "backward in eval": backward_in_eval,
    "discarded by the optimizer": partial(discarded, clear="optimizer"),
    "discarded by the model": partial(discarded, clear="model"),
    "set to zero by the optimizer": discarded_zeros,
    "discarded beside another call": discarded_beside,
    "gradient of the input": input_gradient,
}


def train_cleared_by_model(
    model: nn.Module, optimizer: KroneckerOptimizer, numbers: range
) -> None:
    """Train without ever calling ``optimizer.zero_grad``."""
    for number in numbers:
        model.zero_grad()
        loss_of(model, number).backward()
        optimizer.step()


@some_methods
@pytest.mark.parametrize("event", [*FORWARD_EVENTS, *BACKWARD_EVENTS])
def test_between_two_steps(method: Method, event: str) -> None:
    happens = {**FORWARD_EVENTS, **BACKWARD_EVENTS}[event]
    plain, disturbed = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(disturbed)
    for number in range(6):
        train_cleared_by_model(plain, expected, range(number, number + 1))
        happens(disturbed, optimizer)
        train_cleared_by_model(disturbed, optimizer, range(number, number + 1))
    assert_identical(snapshot(disturbed, optimizer), snapshot(plain, expected))


@some_methods
@pytest.mark.parametrize("event", FORWARD_EVENTS)
def test_between_backward_and_step(method: Method, event: str) -> None:
    plain, disturbed = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(disturbed)
    for number in range(6):
        train(plain, expected, [number])
        optimizer.zero_grad()
        loss_of(disturbed, number).backward()
        FORWARD_EVENTS[event](disturbed, optimizer)
        optimizer.step()
    assert_identical(snapshot(disturbed, optimizer), snapshot(plain, expected))


def test_zero_grad_between_forward_and_backward() -> None:
    plain, other = small_classifier(), small_classifier()
    expected, optimizer = METHODS[3](plain), METHODS[3](other)
    for number in range(4):
        train(plain, expected, [number])
        loss = loss_of(other, number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_identical(snapshot(other, optimizer), snapshot(plain, expected))


# -- activation checkpointing ----------------------------------------------------------


class Residual(nn.Module):
    """Attention and two linear layers, recomputed or not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 8)

    def body(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        return x + self.narrow(torch.tanh(self.wide(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


def residual_network(reentrant: bool | None) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Residual(reentrant) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 8), *blocks, nn.Linear(8, 4))


def sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (10, 3), generator=generator)


def sequence_loss(call: Callable[[Tensor], Tensor]) -> Tensor:
    x, y = sequences()
    return cross_entropy(call(x).flatten(0, 1), y.flatten())


@every_fisher
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
def test_checkpointing(fisher: str, whole: bool, float64: torch.dtype) -> None:
    plain = residual_network(None)
    torch.manual_seed(1)
    expected = collect(plain, lambda: sequence_loss(plain), fisher=fisher)
    model = residual_network(None if whole else False)
    call = partial(checkpoint, model, use_reentrant=False) if whole else model
    torch.manual_seed(1)
    optimizer = collect(model, lambda: sequence_loss(call), fisher=fisher)
    assert len(expected.curvature) == 2 + 2 * 7
    for name, layer in expected.curvature.items():
        found = optimizer.curvature[name]
        assert relative_error(found.A, layer.A) < 1e-12
        assert relative_error(found.G, layer.G) < 1e-12


@every_fisher
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole model"])
def test_reentrant_checkpointing(fisher: str, whole: bool) -> None:
    model = residual_network(None if whole else True).double()
    call = partial(checkpoint, model, use_reentrant=True) if whole else model
    optimizer = EKFAC(model, fisher=fisher)
    before = snapshot(model, optimizer)
    x = sequences()[0].requires_grad_()
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        call(x).sum().backward()
    assert_identical(snapshot(model, optimizer), before)


# -- what is done to the graph ---------------------------------------------------------


@every_fisher
@pytest.mark.parametrize(
    "kind", [nn.ReLU, nn.ELU, nn.LeakyReLU], ids=lambda k: k.__name__
)
def test_inplace_activations(
    fisher: str, kind: type[nn.Module], float64: torch.dtype
) -> None:
    found = []
    for inplace in (False, True):
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            kind(inplace=inplace),
            nn.BatchNorm2d(3),
            kind(inplace=inplace),
            nn.Flatten(),
            nn.Linear(27, 4),
            kind(inplace=inplace),
            nn.Linear(4, 4),
        )
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(i)
            nn.init.normal_(parameter, 0.5, 0.5, generator=generator)
        x = torch.randn(20, 1, 5, 5, generator=torch.Generator().manual_seed(0))
        y = torch.arange(20) % 4
        torch.manual_seed(1)
        loss = partial(lambda m, x, y: cross_entropy(m(x), y), model, x, y)
        found.append(statistics(collect(model, loss, fisher=fisher)))
    for name, value in found[0].items():
        if "Q" not in name:
            assert relative_error(found[1][name], value) < 1e-12, name


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_output_changed_in_place(fisher: str) -> None:
    """Sampled and exact gradients need what was returned."""
    optimizer = EKFAC(model := small_classifier(), fisher=fisher)
    x, y = example_batch(0)
    output = model(x)
    output += 1
    with pytest.raises(CaptureError, match="output was changed in place"):
        cross_entropy(output, y).backward()
    assert all(not layer.ready for layer in optimizer.curvature.values())


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
def test_output_changed_in_place_counts_its_targets(
    sequence: bool, scaling: str
) -> None:
    """Of a layer on rows of three dimensions it is a view, which loses its hooks."""
    shape = (8, 4, 6) if sequence else (8, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(x[..., 0].numel()).reshape(shape[:-1]) % 3
    y[1] = -100
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
        model.double()
        optimizer = EKFAC(model, scaling=scaling, factor_decay=0.0)
        output = model(x)
        if in_place:
            output /= 2
        else:
            output = output / 2
        cross_entropy(output.flatten(0, -2), y.flatten()).backward()
        optimizer.step()
        found.append(statistics(optimizer))
    for name, value in found[0].items():
        if "Q" not in name:
            assert relative_error(found[1][name], value) < 1e-12, name


def test_input_changed_in_place() -> None:
    """Autograd itself notices unless the weight is the only thing in its way."""
    layer = nn.Linear(6, 4)
    optimizer = EKFAC(layer)
    x, y = example_batch(0)
    loss = cross_entropy(layer(x), y)
    x.zero_()
    with pytest.raises((CaptureError, RuntimeError), match=r"in[- ]?place"):
        loss.backward()
    assert not optimizer.curvature[""].ready


@every_method
def test_two_forward_passes_before_one_backward(method: Method) -> None:
    """It is the same as two backward passes; their order makes no difference."""
    plain, other = small_classifier().double(), small_classifier().double()
    expected, optimizer = method(plain), method(other)
    for number in range(0, 8, 2):
        x, y = example_batch(number, 12)
        x = x.double()
        expected.zero_grad()
        (cross_entropy(plain(x[:6]), y[:6]) / 2).backward()
        (cross_entropy(plain(x[6:]), y[6:]) / 2).backward()
        expected.step()
        optimizer.zero_grad()
        if "mc" in method.name:  # draws in the order in which the passes come back
            second, first = other(x[6:]), other(x[:6])
        else:
            first, second = other(x[:6]), other(x[6:])
        ((cross_entropy(first, y[:6]) + cross_entropy(second, y[6:])) / 2).backward()
        optimizer.step()
    for name, value in statistics(expected).items():
        if name[-1] in "AG" and "Q" not in name:
            assert relative_error(statistics(optimizer)[name], value) < 1e-9, name


@every_method
def test_two_backward_passes_through_one_graph(method: Method) -> None:
    """The examples are counted once; each pass is a term of the loss of its own."""
    single, double = small_classifier(), small_classifier()
    expected, optimizer = method(single), method(double)
    loss_of(single, 0).backward()
    expected.step()
    loss = loss_of(double, 0)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    passes = 2 if "empirical" in method.name else 1
    for name, layer in expected.curvature.items():
        found = optimizer.curvature[name]
        if layer.block.exact:
            assert relative_error(found.A, passes * layer.A) < 1e-5
        else:
            assert relative_error(found.A, layer.A) < 1e-5
            assert relative_error(found.G, passes * layer.G) < 1e-5


def test_double_backward_of_a_penalty(float64: torch.dtype) -> None:
    """``create_graph`` leaves the recorded gradients without a graph of their own."""
    model = small_classifier(nn.Tanh())
    optimizer = EKFAC(model, scaling="per_example")
    for number in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        loss.backward(create_graph=True)
        optimizer.step()
    assert not any(v.requires_grad for v in statistics(optimizer).values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


class Twice(nn.Module):
    """One layer called twice; the second result may be thrown away."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x)
        second = self.layer(x.flip(-1)) if self.used else None
        self.unused = second
        return self.head(torch.tanh(first))


@every_method
def test_only_some_calls_receive_a_gradient(method: Method) -> None:
    """What counts is the call that the loss depends on."""
    single, double = Twice(used=False), Twice(used=True)
    expected, optimizer = method(single), method(double)
    train(single, expected, range(6))
    train(double, optimizer, range(6))
    for name, value in statistics(expected).items():
        assert relative_error(statistics(optimizer)[name], value) < 1e-6, name


@every_method
def test_half_received_gradients_are_discarded(method: Method) -> None:
    """A call that still waits for its sibling goes with ``model.zero_grad()``."""
    plain, disturbed = Twice(used=True), Twice(used=True)
    expected, optimizer = method(plain), method(disturbed)
    for number in range(4):
        plain.zero_grad()
        loss_of(plain, number).backward()
        expected.step()
        loss_of(disturbed, 50).backward()
        disturbed.zero_grad()
        loss_of(disturbed, number).backward()
        optimizer.step()
        disturbed.zero_grad()
    assert_identical(snapshot(disturbed, optimizer), snapshot(plain, expected))


class Skipping(nn.Module):
    """A middle layer that is left out now and then, as in stochastic depth."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
        self.middle, self.never = nn.Linear(6, 6), nn.Linear(6, 6)
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x if self.skip else torch.tanh(self.middle(x)))


@every_method
def test_layers_left_out_of_a_step(method: Method) -> None:
    model = Skipping()
    optimizer = method(model)
    for number in range(8):
        model.skip = number % 3 != 2
        before = snapshot(model, optimizer)
        train(model, optimizer, [number])
        after = snapshot(model, optimizer)
        if model.skip:
            same = [k for k in before if ".middle" in k]
            assert_identical({k: after[k] for k in same}, {k: before[k] for k in same})
    assert optimizer.curvature["middle"].ready
    assert not optimizer.curvature["never"].ready


# -- who is called, and in which mode --------------------------------------------------


@every_method
def test_eval_mode_is_an_error(method: Method) -> None:
    model = small_classifier().eval()
    optimizer = method(model)
    before = snapshot(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(CaptureError, match=r"training mode .*in eval mode: 1\)"):
        optimizer.step()
    assert_identical(snapshot(model, optimizer), before)
    model.train()
    train(model, optimizer, range(3))


@every_method
def test_eval_mode_after_some_steps_is_a_warning(method: Method) -> None:
    """Whoever forgets ``model.train()`` trains on with old statistics."""
    model = small_classifier()
    optimizer = method(model)
    train(model, optimizer, range(3))
    model.eval()
    with pytest.warns(EkfacWarning, match=r"no statistics .* training mode") as record:
        train(model, optimizer, range(3, 16))
    assert [w.filename for w in record] == [train.__code__.co_filename]


def test_frozen_normalisation_in_a_training_model() -> None:
    """Only the root has to be in training mode."""
    model = small_classifier()
    model[1].eval()
    optimizer = EKFAC(model)
    train(model, optimizer, range(2))
    assert all(layer.ready for layer in optimizer.curvature.values())


class Wrapped(nn.Module):
    """Its own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_classifier()

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("never called")


@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: m.name)
def test_root_that_is_never_called(method: Method) -> None:
    """Examples are then counted by the layers, and taken to be their rows."""
    plain, wrapped = small_classifier(), Wrapped()
    expected, optimizer = method(plain), method(wrapped)
    train(plain, expected, range(6))
    with pytest.warns(EkfacWarning, match="outside of the model's forward"):
        train(wrapped.net, optimizer, range(6))
    for name, value in statistics(expected).items():
        assert relative_error(statistics(optimizer)[f"net.{name}"], value) < 1e-5


@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if m.options["fisher"] != "empirical"],
    ids=lambda m: m.name,
)
def test_pseudo_gradients_need_the_root(method: Method) -> None:
    wrapped = Wrapped()
    optimizer = method(wrapped)
    loss_of(wrapped.net, 0).backward()
    with pytest.raises(
        CaptureError, match="must be the module whose forward is called"
    ):
        optimizer.step()


class Reporting(nn.Module):
    """A network that returns its logits in some container."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.pack = small_classifier(), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.net(x))


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda f: (f, f.detach()), lambda out: out[0]),
    "second of a tuple": (lambda f: (f.detach(), f), lambda out: out[1]),
    "dict": (lambda f: {"logits": f}, lambda out: out["logits"]),
    "dict with a loss": (
        lambda f: {"loss": f.sum(), "hidden": f.double(), "logits": f},
        lambda out: out["logits"],
    ),
    "ordered dict": (lambda f: OrderedDict(out=f), lambda out: out["out"]),
    "nested": (lambda f: {"a": [None, (f,)]}, lambda out: out["a"][1][0]),
    "model output": (
        lambda f: SequenceClassifierOutput(loss=f.mean(), logits=f),
        lambda out: out.logits,
    ),
}


@some_methods
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_of_outputs(method: Method, container: str) -> None:
    pack, unpack = CONTAINERS[container]
    plain, model = small_classifier(), Reporting(pack)
    expected, optimizer = method(plain), method(model)
    for number in range(4):
        train(plain, expected, [number])
        x, y = example_batch(number)
        optimizer.zero_grad()
        cross_entropy(unpack(model(x)), y).backward()
        optimizer.step()
    for p, q in zip(plain.parameters(), model.net.parameters(), strict=True):
        assert torch.equal(p, q)


# -- nothing is held -------------------------------------------------------------------
