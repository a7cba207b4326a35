"""Loops as projects write them: statistics are those of the pass that made ``.grad``.

The loops are in ``users_loops.py``. What they have to be comes from the same step
without what a loop does besides, or from leaves added to the layers' outputs.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from users_loops import (
    CLEARING,
    EXTRAS,
    LOSSES,
    ByHand,
    Cell,
    Loop,
    OwnLoss,
    batch,
    network,
    plain,
    unrolled,
)

from ekfac import EKFAC, KFAC, rows_of_examples
from ekfac.errors import CaptureError, EkfacWarning
from ekfac.optim.optimizer import KroneckerOptimizer

TEXTBOOK: dict[str, Any] = {
    "lr": 0.05,
    "momentum": 0.0,
    "damping": 1e-2,
    "damping_mode": "absolute",
    "grafting": None,
    "factor_decay": 0.0,
    "factor_interval": 1,
    "basis_interval": 1,
}
METHODS: dict[str, Callable[..., KroneckerOptimizer]] = {
    "KFAC": KFAC,
    "running average": EKFAC,
    "per example": lambda m, **kw: EKFAC(m, scaling="per_example", **kw),
}
FISHERS = ("empirical", "mc", "exact")
EVERY = list(itertools.product(METHODS, FISHERS, (1, 2)))
# Each method, each Fisher, with and without accumulation.
FEW = [EVERY[0], EVERY[9], EVERY[17]]


def after(
    loop: Loop, method: str, fisher: str, micro: int, clears: bool
) -> list[Tensor]:
    """Return curvature and parameters after three steps, the second without factors."""
    model = network()
    torch.manual_seed(7)
    optimizer = METHODS[method](
        model, fisher=fisher, **{**TEXTBOOK, "factor_interval": 2}
    )
    for number in range(3):
        optimizer.zero_grad()
        x, y = batch(number)
        for part, (some, targets) in enumerate(
            zip(x.chunk(micro), y.chunk(micro), strict=True)
        ):
            now = plain if clears and part else loop
            now(model, optimizer, some, targets, 1 / micro)
        optimizer.step()
    layers = optimizer.curvature.values()
    tensors = [t for layer in layers for t in (layer.A, layer.G, layer.s)]
    return [t for t in (*tensors, *model.parameters()) if t is not None]


def compare(name: str, method: str, fisher: str, micro: int) -> None:
    expected = after(plain, method, fisher, micro, False)
    found = after(EXTRAS[name], method, fisher, micro, name in CLEARING)
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("options", FEW, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("name", EXTRAS)
def test_what_a_loop_does_besides_leaves_no_trace(
    name: str, options: tuple[str, str, int]
) -> None:
    compare(name, *options)


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY, ids=lambda o: "-".join(map(str, o)))
def test_every_loop_with_every_option(options: tuple[str, str, int]) -> None:
    for name in EXTRAS:
        compare(name, *options)


def assert_factors(
    optimizer: KroneckerOptimizer,
    expected: dict[str, tuple[Tensor, Tensor]],
    layers: tuple[str, ...] | None = None,
) -> None:
    """Compare a step's factors with those by hand."""
    for name, (A, G) in expected.items():
        if layers is None or name in layers:
            layer = optimizer.curvature[name]
            assert layer.A is not None, name
            assert layer.G is not None, name
            torch.testing.assert_close(layer.A[0], A, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(layer.G[0], G, rtol=1e-8, atol=1e-12)


SLOW = {"KFAC": pytest.mark.slow, "running average": pytest.mark.slow}


@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=SLOW.get(m, ())) for m in METHODS]
)
@pytest.mark.parametrize("name", LOSSES)
def test_factors_are_those_by_hand(name: str, method: str) -> None:
    own: OwnLoss = LOSSES[name]
    model = own.model()
    optimizer = METHODS[method](model, **TEXTBOOK)
    for number in range(3):
        x, y = batch(number)
        hand = ByHand(model)
        loss = own.loss(hand.model, x, y)
        optimizer.zero_grad()
        own.run(model, optimizer, x, y)
        optimizer.step()
        expected = hand.factors(loss, int(own.passes * len(x)))
        assert_factors(optimizer, expected, own.layers)


# -- several optimizers and models -----------------------------------------------------


def discriminator() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()


@pytest.mark.parametrize("how", ["frozen", "cleared", "one graph"])
def test_two_networks_that_train_each_other(how: str) -> None:
    """The generator's step leaves gradients in the discriminator, or none."""
    G, D = network(), discriminator()
    first, second = KFAC(G, **TEXTBOOK), KFAC(D, **TEXTBOOK)
    for number in range(3):
        (x, _), real = batch(number), batch(number + 9)[0][:, :3]
        ones = torch.ones(16, dtype=torch.long)
        labels = torch.cat([ones, 0 * ones])
        if how == "frozen":
            D.requires_grad_(False)
        hand = ByHand(G)
        fake = G(x)
        first.zero_grad()
        loss = cross_entropy(D(fake), ones)
        by_hand = cross_entropy(ByHand(D).model(hand.model(x)), ones)
        loss.backward(retain_graph=how == "one graph")
        D.requires_grad_(True)
        again = G(x).detach() if how != "one graph" else fake.detach()
        first.step()
        assert_factors(first, hand.factors(by_hand, 16))
        hand = ByHand(D)
        both = torch.cat([real, again])
        second.zero_grad()
        cross_entropy(D(both), labels).backward()
        by_hand = cross_entropy(hand.model(both), labels)
        second.step()
        assert_factors(second, hand.factors(by_hand, 32))


@pytest.mark.parametrize("fisher", FISHERS)
def test_optimizers_of_parts_of_a_model(fisher: Any) -> None:
    """They step in turn; the other's statistics are of no pass that counts."""
    model = network()
    trunk = KFAC(model[0].parameters(), model=model, **TEXTBOOK)
    head = KFAC(model[2].parameters(), model=model, fisher=fisher, **TEXTBOOK)
    for number in range(4):
        x, y = batch(number)
        hand = ByHand(model)
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        expected = hand.factors(cross_entropy(hand.model(x), y), 16)
        optimizer = (trunk, head)[number % 2]
        optimizer.step()
        if optimizer is trunk or fisher == "empirical":
            assert_factors(optimizer, {"02"[number % 2]: expected["02"[number % 2]]})


def test_two_threads_train_two_models() -> None:
    def run(model: nn.Module, optimizer: KroneckerOptimizer) -> None:
        for number in range(8):
            x, y = batch(number)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    expected, found = (
        [
            (m, make(m, **TEXTBOOK))
            for m, make in zip((network(), network()), METHODS.values(), strict=False)
        ]
        for _ in range(2)
    )
    threads = [threading.Thread(target=run, args=pair) for pair in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (one, optimizer), (two, _) in zip(expected, found, strict=True):
        run(one, optimizer)
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(p, q)


def test_steps_inside_of_the_backward_pass() -> None:
    """An optimizer that steps in the hook of the last gradient."""
    model = network()
    optimizer = KFAC(model, **TEXTBOOK)
    arrived = []

    def step(p: Tensor) -> None:
        arrived.append(p)
        if len(arrived) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for number in range(3):
        x, y = batch(number)
        hand = ByHand(model)
        cross_entropy(model(x), y).backward()
        expected = hand.factors(cross_entropy(hand.model(x), y), 16)
        assert_factors(optimizer, expected)


def test_sharpness_aware_steps() -> None:
    """The gradient is that at the perturbed weights, the step is from the own ones."""
    model = network()
    optimizer = EKFAC(model, **TEXTBOOK)
    for number in range(3):
        x, y = batch(number)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        own = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.add_(0.05 * p.grad)
        optimizer.zero_grad()
        hand = ByHand(model)
        cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p, before in zip(model.parameters(), own, strict=True):
                p.copy_(before)
        expected = hand.factors(cross_entropy(hand.model(x), y), 16)
        optimizer.step()
        assert_factors(optimizer, expected)


class Equilibrium(nn.Module):
    """A fixed point; a hook solves for its gradient by backward passes of its own."""

    def __init__(self, by_weights: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.i, self.f, self.o = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        nn.init.normal_(self.f.weight, std=0.05)
        self.by_weights = by_weights
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.i(x), x.new_zeros(len(x), 7)
        with torch.no_grad():
            for _ in range(60):
                z = torch.tanh(self.f(z) + u)
        z = torch.tanh(self.f(z) + u)
        leaf = z.detach().requires_grad_()
        if self.by_weights:  # a call that no hook sees
            weights = self.f.weight.detach(), self.f.bias.detach()
            once = torch.tanh(F.linear(leaf, *weights) + u.detach())
        else:
            once = torch.tanh(self.f(leaf) + u)

        def solve(g: Tensor) -> Tensor:
            h = g
            for _ in range(60):
                h = torch.autograd.grad(once, leaf, h, retain_graph=True)[0] + g
            return h

        z.register_hook(solve)
        return self.o(z)


def test_backward_passes_inside_of_a_backward_pass() -> None:
    found = []
    for by_weights in (False, True):
        model = Equilibrium(by_weights)
        optimizer = KFAC(model, **TEXTBOOK)
        cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
        layers = optimizer.curvature.values()
        found.append([t for layer in layers for t in (layer.A, layer.G)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


# -- what is only a part of the gradient, or cannot be known, is said ------------------


def adapted(m: nn.Module, x: Tensor, y: Tensor, *, inner: str) -> Tensor:
    """MAML: the loss of weights after a step of gradient descent."""
    weights = dict(m.named_parameters())

    def loss(w: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(m, w, (x,)), y)

    if inner == "torch.func":
        slopes = grad(loss)(weights)
    else:
        values = list(weights.values())
        graph = torch.autograd.grad(loss(weights), values, create_graph=True)
        slopes = dict(zip(weights, graph, strict=True))
    moved = {n: p - 0.1 * slopes[n] for n, p in weights.items()}
    return cross_entropy(functional_call(m, moved, (2 * x,)), y)


def residual(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A PINN by ``torch.func``."""
    return vmap(grad(lambda one: m(one).sum()))(x).square().mean()


def evaluated(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    m.eval()
    out = m(x)
    m.train()
    return out.square().mean()


UNRECORDED = {
    "MAML": (lambda *a: adapted(*a, inner="autograd"), "computed, as by functional"),
    "MAML by torch.func": (
        lambda *a: adapted(*a, inner="torch.func"),
        "computed, as by functional",
    ),
    "PINN by torch.func": (residual, "in a transform of torch.func"),
    "evaluation mode": (evaluated, "in eval mode"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", UNRECORDED)
def test_gradients_of_calls_without_statistics_are_warned_of(
    name: str, method: str
) -> None:
    """Beside a loss that has some; the factors are those of that loss."""
    loss, message = UNRECORDED[name]
    model = network()
    optimizer = METHODS[method](model, **TEXTBOOK)
    x, y = batch()
    (cross_entropy(model(x), y) + loss(model, x, y)).backward()
    with pytest.warns(EkfacWarning, match=f"only a part.*\n.*{message}"):
        optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (cross_entropy(model(x), y) + loss(model, x, y)).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["MAML by torch.func", "PINN by torch.func"])
def test_calls_without_statistics_alone_are_an_error(name: str) -> None:
    loss, message = UNRECORDED[name]
    model = network()
    optimizer = EKFAC(model, **TEXTBOOK)
    loss(model, *batch()).backward()
    with pytest.raises(CaptureError, match=f"no statistics.*\n.*{message}"):
        optimizer.step()


@pytest.mark.parametrize("name", UNRECORDED)
@pytest.mark.parametrize("cleared", ["not made", "by the optimizer", "by the model"])
def test_gradients_that_were_cleared_are_not_warned_of(
    name: str, cleared: str, recwarn: pytest.WarningsRecorder
) -> None:
    loss, _ = UNRECORDED[name]
    model = network()
    optimizer = KFAC(model, **TEXTBOOK)
    x, y = batch()
    other = loss(model, x, y)
    if cleared == "not made":
        torch.autograd.grad(other, model[0].weight)
    else:
        other.backward()
        (optimizer if cleared == "by the optimizer" else model).zero_grad()
    hand = ByHand(model)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    assert not [w for w in recwarn if w.category is EkfacWarning]
    assert_factors(optimizer, hand.factors(cross_entropy(hand.model(x), y), 16))


class Tokens(nn.Module):
    """A loss of sequences that layers see in some layout, and whose mean it returns."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
        self.last, self.layout = nn.Linear(7, 3), layout
        self.double()

    def outputs(self, x: Tensor) -> Tensor:
        size = x.shape
        if self.layout == "positions first":
            x = x.transpose(0, 1)
        elif self.layout == "flat":
            x = x.flatten(0, 1)
        out = self.last(torch.tanh(self.norm(self.first(x))))
        out = out.transpose(0, 1) if self.layout == "positions first" else out
        return out.reshape(*size[:2], 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.outputs(x).flatten(0, 1), y.flatten())


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6, 4), generator=generator)


@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
@pytest.mark.parametrize("layout", ["positions first", "flat"])
def test_rows_of_a_loss_made_inside_of_the_model(layout: str, scaling: Any) -> None:
    """The batch is its input's; other layouts are taken by shape, and that is said."""
    states = []
    for now in ("batch first", layout):
        model = Tokens(now)
        optimizer = EKFAC(model, scaling=scaling, **TEXTBOOK)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.zero_grad()
                model(*tokens()).backward()
                optimizer.step()
        layers = optimizer.curvature.values()
        tensors = [t for layer in layers for t in (layer.A, layer.G, layer.s)]
        states.append([t for t in (*tensors, *model.parameters()) if t is not None])
        text = "".join(str(w.message) for w in record)
        assert ("is not of an output of the model" in text) == (now == layout)
        assert ("norm (torch.nn.LayerNorm)" in text) == (now == layout)
        assert len(record) == (now == layout)
    for one, two in zip(*states, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("said", [False, True])
def test_rows_of_layers_called_outside_of_the_model(said: bool) -> None:
    """Each is taken for an example, with a warning, unless its example is said."""
    x, y = tokens()
    model = Tokens("flat")
    optimizer = EKFAC(model, **TEXTBOOK)
    index = torch.arange(6).repeat_interleave(4)
    context = rows_of_examples(index) if said else contextlib.nullcontext()
    with context:
        out = model.outputs(x)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        cross_entropy(out.flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    assert len(record) == (not said)
    assert said or "called outside of the model's forward" in str(record[0].message)
    if said:
        expected = EKFAC(model := Tokens("batch first"), **TEXTBOOK)
        model(x, y).backward()
        expected.step()
        found = optimizer.curvature["norm"].eigenvalues_A
        ratio = found / expected.curvature["norm"].eigenvalues_A
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_model_called_on_its_own_output(fisher: Any) -> None:
    """Sampled and exact gradients are those of outputs that have targets."""
    model = Cell()
    optimizer = KFAC(model, fisher=fisher, **TEXTBOOK)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for number in range(2):
            optimizer.zero_grad()
            unrolled(model, *batch(number)).backward()
            optimizer.step()
    assert len(record) == (fisher != "empirical")
    if record:
        assert "called on what it had returned before" in str(record[0].message)


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_model_called_twice_on_two_inputs_is_not_warned_of(fisher: Any) -> None:
    model = network()
    optimizer = KFAC(model, fisher=fisher, **TEXTBOOK)
    (x, y), (z, _) = batch(), batch(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (cross_entropy(model(x), y) + cross_entropy(model(z), y)).backward()
        optimizer.step()
