"""Which backward passes a step's statistics are of: those that add to ``.grad``.

The right factors are worked out from single examples' gradients by ``torch.func``, or
by the same step without the extra pass.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.functional import cross_entropy, relu_
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ekfac import EKFAC, KFAC
from ekfac.errors import CaptureError
from ekfac.optim.optimizer import KroneckerOptimizer

TEXTBOOK: dict[str, Any] = {
    "momentum": 0.0,
    "damping": 1e-2,
    "damping_mode": "absolute",
    "grafting": None,
    "factor_decay": 0.0,
}
METHODS: dict[str, Callable[..., KroneckerOptimizer]] = {
    "KFAC": lambda m, **kw: KFAC(m, lr=0.1, **TEXTBOOK, **kw),
    "running average": lambda m, **kw: EKFAC(m, lr=0.1, **TEXTBOOK, **kw),
    "per example": lambda m, **kw: EKFAC(
        m, lr=0.1, scaling="per_example", **TEXTBOOK, **kw
    ),
}
Extra = Callable[[nn.Module, Tensor, Tensor], None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def data(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.arange(count) % 3


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = cross_entropy(model(x), y)
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()


def gradient_norm(model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss = cross_entropy(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    loss.backward()


def one_output(model: nn.Module, x: Tensor, y: Tensor) -> None:
    out = model(x)
    torch.autograd.grad(1e3 * out[0, 0], model[0].weight, retain_graph=True)
    cross_entropy(out, y).backward()


def sum_with_graph(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    out = model(x)
    torch.autograd.grad(out.sum(), x, create_graph=True)
    cross_entropy(out, y).backward()


def inputs_alone(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = cross_entropy(model(x), y)
    loss.backward(inputs=[x], retain_graph=True)
    loss.backward()


def hessian_product(model: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()
    weights = list(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model(x), y), weights, create_graph=True)
    torch.autograd.grad(sum(g.sum() for g in grads), weights)


def attack_after_zeroing(model: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(2 * x), y).backward()
    model.zero_grad(set_to_none=False)
    delta = torch.zeros_like(x).requires_grad_()
    torch.autograd.grad(cross_entropy(model(x + delta), y), delta)
    cross_entropy(model(x), y).backward()


def attacks_between(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for part in (slice(0, 8), slice(8, 16)):
        delta = torch.zeros_like(x[part]).requires_grad_()
        torch.autograd.grad(cross_entropy(model(x[part] + delta), y[part]), delta)
        (cross_entropy(model(x[part]), y[part]) / 2).backward()


def transforms(model: nn.Module, x: Tensor, y: Tensor) -> None:
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], one: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, w, (one[None],)), target[None])

    vmap(grad(loss), (None, 0, 0))(weights, x, y)
    jacrev(lambda w: functional_call(model, w, (x,)))(weights)
    hessian(lambda b: loss({**weights, "2.bias": b}, x[0], y[0]))(weights["2.bias"])
    cross_entropy(model(x), y).backward()


def other_tensors(model: nn.Module, x: Tensor, y: Tensor) -> None:
    copies = {n: p.detach().clone() for n, p in model.named_parameters()}
    for copy in copies.values():
        copy.requires_grad_()
    cross_entropy(functional_call(model, copies, (x,)), y).backward()
    cross_entropy(model(x), y).backward()


def paused_pass(model: nn.Module, x: Tensor, y: Tensor) -> None:
    cross_entropy(model(x), y).backward()


EXTRAS: list[Extra] = [
    saliency,
    gradient_norm,
    one_output,
    sum_with_graph,
    inputs_alone,
    hessian_product,
    attack_after_zeroing,
    attacks_between,
    transforms,
    other_tensors,
]


def state_after(
    method: str, extra: Extra, **options: Any
) -> tuple[dict[str, Tensor], KroneckerOptimizer]:
    """Return the parameters after a step, and the optimizer."""
    model = network()
    optimizer = METHODS[method](model, **options)
    optimizer.zero_grad()
    extra(model, *data())
    optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, optimizer


def parts_alone(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for part in (slice(0, 8), slice(8, 16)):
        (cross_entropy(model(x[part]), y[part]) / 2).backward()


@pytest.mark.parametrize("fisher", ["empirical", "exact", "mc"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.__name__)
def test_passes_that_add_nothing_leave_no_trace(
    extra: Extra, method: str, fisher: str
) -> None:
    # Micro-batches draw other samples than one batch does.
    parts = fisher == "mc" and extra is attacks_between
    plain = parts_alone if parts else paused_pass
    expected, reference = state_after(method, plain, fisher=fisher)
    found, optimizer = state_after(method, extra, fisher=fisher)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-9, atol=1e-12)
    for name, layer in reference.curvature.items():
        other = optimizer.curvature[name]
        for key in ("A", "G", "s"):
            one, two = getattr(layer, key), getattr(other, key)
            if one is not None:
                torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


class InPlace(nn.Module):
    """A linear layer whose output is changed in place, on rows of any depth."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "relu_":
            h = relu_(h)
        elif self.how == "+=":
            h += x
        else:
            h.mul_(2)
        return self.last(h)


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("how", ["relu_", "+=", "mul_"])
@pytest.mark.parametrize("shape", [(8, 5), (8, 4, 5), (8, 2, 3, 5)])
def test_operations_in_place_on_a_layers_output(
    shape: tuple[int, ...], how: str, fisher: str
) -> None:
    torch.manual_seed(0)
    model, x = InPlace(how).double(), torch.randn(shape, dtype=torch.float64)
    y = torch.randint(0, 3, shape[:-1])
    optimizer = METHODS["KFAC"](model, fisher=fisher)
    cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    optimizer.step()
    layer = optimizer.curvature["first"]

    def loss(delta: Tensor, one: Tensor, target: Tensor) -> Tensor:
        """Return an example's loss with its first layer's output moved by delta."""
        h = nn.functional.linear(one, model.first.weight, model.first.bias) + delta
        h = {"relu_": h.relu(), "+=": h + one, "mul_": 2 * h}[how]
        logits = nn.functional.linear(h, model.last.weight, model.last.bias)
        return cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum")

    def logits_of(delta: Tensor, row: Tensor) -> Tensor:
        """Return one position's outputs with the first layer's moved by delta."""
        h = nn.functional.linear(row, model.first.weight, model.first.bias) + delta
        h = {"relu_": h.relu(), "+=": h + row, "mul_": 2 * h}[how]
        return nn.functional.linear(h, model.last.weight, model.last.bias)

    torch.manual_seed(0)
    model.load_state_dict(InPlace(how).double().state_dict())
    if fisher == "exact":
        rows = x.reshape(-1, 5)
        still = torch.zeros(5, dtype=torch.float64)
        jacobian = vmap(jacrev(logits_of), (None, 0))(still, rows)
        p = vmap(logits_of, (None, 0))(still, rows).softmax(-1)
        inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        expected = torch.einsum("nco,ncd,ndp->op", jacobian, inner, jacobian)
        assert layer.G is not None
        torch.testing.assert_close(layer.G[0], expected / shape[0])
    else:
        zero = torch.zeros(*shape[1:-1], 5, dtype=torch.float64)
        if zero.dim() == 1:
            zero, x1, y1 = zero[None], x[:, None], y[:, None]
        else:
            x1, y1 = x, y
        g = vmap(grad(loss), (None, 0, 0))(zero, x1, y1).reshape(-1, 5)
        assert layer.G is not None
        torch.testing.assert_close(layer.G[0], g.T @ g / shape[0])
    a = torch.cat([x.reshape(-1, 5), x.new_ones(x[..., 0].numel(), 1)], dim=1)
    assert layer.A is not None
    torch.testing.assert_close(layer.A[0], a.T @ a / len(a))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_hooks_that_replace_the_output(before: bool, fisher: str) -> None:
    """The layer's own gradient is that of a module in the hook's place."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(5 * x)

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.tanh(5 * out)

    found = []
    for as_module in (True, False):
        torch.manual_seed(0)
        first, last = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        parts = [first, Scaled(), last] if as_module else [first, last]
        model = nn.Sequential(*parts)
        if before and not as_module:
            first.register_forward_hook(hook)
        optimizer = METHODS["per example"](model, fisher=fisher)
        if not before and not as_module:
            first.register_forward_hook(hook)
        x, y = data()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_a_tensor_hook_that_scales_the_gradient() -> None:
    """The factor is of the gradient that the layer's weight gets."""
    model = network()
    optimizer = METHODS["KFAC"](model)

    def scaled(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda g: 3 * g)

    model[0].register_forward_hook(scaled)
    x, y = data()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    found = optimizer.curvature["0"].G
    _, plain = state_after("KFAC", paused_pass)
    expected = plain.curvature["0"].G
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, 9 * expected)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_another_thread_evaluates_the_model(fisher: str) -> None:
    def run(threaded: bool) -> list[Tensor]:
        model = network()
        optimizer = METHODS["KFAC"](model, fisher=fisher)
        stop = threading.Event()

        def actor() -> None:
            while not stop.is_set():
                with torch.no_grad():
                    model(torch.randn(64, 5, dtype=torch.float64))

        thread = threading.Thread(target=actor)
        if threaded:
            thread.start()
        try:
            for number in range(20):
                optimizer.zero_grad()
                x, y = data()
                cross_entropy(model(x + 0.1 * number), y).backward()
                optimizer.step()
        finally:
            stop.set()
            if threaded:
                thread.join()
        return [p.detach() for p in model.parameters()]

    torch.manual_seed(0)
    expected = run(False)
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        found = run(True)
    finally:
        sys.setswitchinterval(old)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_outputs_that_are_not_finite_are_counted_and_training_goes_on() -> None:
    model = network()
    optimizer = METHODS["KFAC"](model, fisher="mc", factor_interval=1)
    x, y = data()
    cross_entropy(model(x), y).backward()
    optimizer.step()
    before = optimizer.curvature["0"].state_dict()
    optimizer.zero_grad()
    with contextlib.suppress(RuntimeError):
        cross_entropy(model(x * float("inf")), y).backward()
    optimizer.zero_grad()
    assert optimizer.counters.rejected == 1
    after = optimizer.curvature["0"].state_dict()
    assert all(torch.equal(before[k], after[k]) for k in ("A", "G"))
    cross_entropy(model(x), y).backward()
    optimizer.step()


def test_a_model_saved_with_hooks_loads_without_the_package(tmp_path: Path) -> None:
    model = network()
    optimizer = METHODS["KFAC"](model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'ekfac': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(model(torch.ones(2, 5, dtype=torch.float64)).sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = float(model(torch.ones(2, 5, dtype=torch.float64)).sum())
    optimizer.close()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-12)
    copied = pickle.loads(pickle.dumps(model))
    again = METHODS["KFAC"](copied)  # what stayed behind is removed
    assert len(copied[0]._forward_hooks) == 1
    again.close()
    assert not copied[0]._forward_hooks


class Selective(nn.Module):
    """Layers in a region of which matrix products are kept, the rest is recomputed."""

    def __init__(self, selective: bool) -> None:
        super().__init__()
        self.inside, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.selective = selective

    def region(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inside(x))

    def forward(self, x: Tensor) -> Tensor:
        if not self.selective:
            return self.last(self.region(x))
        context = partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default]
        )
        return self.last(
            checkpoint(self.region, x, use_reentrant=False, context_fn=context)
        )


@pytest.mark.parametrize("method", METHODS)
def test_selective_checkpoints_are_gone_through_once(method: str) -> None:
    found = []
    for selective in (False, True):
        torch.manual_seed(0)
        model = Selective(selective).double()
        optimizer = METHODS[method](model)
        x, y = data()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_selective_checkpoints_with_pseudo_gradients_say_what_to_do(
    fisher: str,
) -> None:
    model = Selective(True).double()
    optimizer = METHODS["KFAC"](model, fisher=fisher)
    x, y = data()
    with pytest.raises(CaptureError, match="without context_fn, or use fisher='emp"):
        cross_entropy(model(x), y).backward()
    assert not optimizer.curvature["inside"].G


def cross_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return G of two backward passes and of one, from examples' gradients."""
    both = first + second
    return (first.T @ first + second.T @ second) / len(both), both.T @ both / len(both)


@pytest.mark.parametrize(
    ("second", "off"),
    [("the same loss", 0.5), ("a regression", 0.17), ("other labels", 0.82)],
)
def test_two_backward_passes_through_one_forward(second: str, off: float) -> None:
    """They are two samples: ``g1 g1^T + g2 g2^T``, without the cross terms.

    docs/limits.md has the figures. The step's gradient, running averages of its
    square, and the statistics of mc and exact do not depend on it.
    """
    x, y = data()
    found = {}
    for passes in (1, 2):
        model = network()
        optimizer = METHODS["KFAC"](model)
        out = model(x)
        one = cross_entropy(out, y)
        two = {
            "the same loss": one,
            "a regression": (out**2).mean(),
            "other labels": cross_entropy(out, (y + 1) % 3),
        }[second]
        if passes == 1:
            (one + two).backward()
        else:
            one.backward(retain_graph=True)
            two.backward()
        optimizer.step()
        found[passes] = optimizer.curvature["2"].G
    out = network()(x).detach()
    p = out.softmax(1)
    g1 = p - nn.functional.one_hot(y, 3)
    g2 = {
        "the same loss": g1,
        "a regression": 2 * out / 3,
        "other labels": p - nn.functional.one_hot((y + 1) % 3, 3),
    }[second]
    expected = cross_terms(g1, g2)
    assert found[1] is not None
    assert found[2] is not None
    torch.testing.assert_close(found[2][0], expected[0])
    torch.testing.assert_close(found[1][0], expected[1])
    gap = float((expected[0] - expected[1]).norm() / expected[1].norm())
    print(f"{second}: G is off by {gap:.2f} of its norm")
    assert gap == pytest.approx(off, abs=0.01)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_two_backward_passes_do_not_change_pseudo_gradients(fisher: str) -> None:
    def twice(model: nn.Module, x: Tensor, y: Tensor) -> None:
        loss = cross_entropy(model(x), y)
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()

    expected, _ = state_after("per example", paused_pass, fisher=fisher)
    found, _ = state_after("per example", twice, fisher=fisher)
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-9, atol=1e-12)


CLEARINGS: dict[str, Callable[[nn.Module, KroneckerOptimizer], None]] = {
    "model, to None": lambda model, _: model.zero_grad(),
    "model, in place": lambda model, _: model.zero_grad(set_to_none=False),
    "optimizer, to None": lambda _, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda _, optimizer: optimizer.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("fisher", "watched", "clearing"),
    [("empirical", watched, way) for watched in (True, False) for way in CLEARINGS]
    + [("exact", True, way) for way in CLEARINGS if way.startswith("model")],
)
def test_gradients_cleared_between_passes_through_one_forward(
    method: str, fisher: str, watched: bool, clearing: str
) -> None:
    """Only the last pass counts, with its own targets: a step of its loss alone."""
    x, y = data()
    last = y.clone()
    if fisher == "empirical":
        last[::4] = -100
    results = []
    for discarded in (False, True):
        model = network()
        optimizer = METHODS[method](model, fisher=fisher)
        # Unwatched: the loss is of a layer called outside the model's forward.
        logits = model(x) if watched else model[2](model[:2](x))
        if discarded:
            (100 * cross_entropy(logits, y)).backward(retain_graph=True)
            CLEARINGS[clearing](model, optimizer)
        cross_entropy(logits, last).backward()
        optimizer.step()
        layers = optimizer.curvature.values()
        state = [t for layer in layers for t in (layer.A, layer.G, layer.s)]
        state += [p.detach() for p in model.parameters()]
        results.append([t for t in state if t is not None])
    for found, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fisher", ["exact", "mc"])
def test_pseudo_gradients_thrown_away_are_missed(fisher: str) -> None:
    """They are taken once, in the first pass through a forward."""
    x, y = data()
    model = network()
    optimizer = METHODS["KFAC"](model, fisher=fisher)
    loss = cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    with pytest.raises(CaptureError, match="no statistics were recorded"):
        optimizer.step()


def test_the_curvature_of_a_loss_of_derivatives() -> None:
    """Of a PINN, G is that of the residual's whole gradient at the layers' outputs."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(1, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    optimizer = METHODS["KFAC"](model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None].requires_grad_()
    u = model(x)
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    (slope + u.square() - 1).square().mean().backward()
    optimizer.step()

    def solution(one: Tensor, first: Tensor, last: Tensor) -> Tensor:
        h = torch.tanh(before["0.weight"][:, 0] * one + before["0.bias"] + first)
        return before["2.weight"][0] @ h + before["2.bias"][0] + last

    def residual(first: Tensor, last: Tensor, one: Tensor) -> Tensor:
        value = solution(one, first, last)
        return (grad(solution)(one, first, last) + value**2 - 1) ** 2

    zeros = torch.zeros(7, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    derivative = vmap(grad(residual, argnums=(0, 1)), (None, None, 0))
    first, last = derivative(*zeros, x.detach()[:, 0])
    for name, g in (("0", first), ("2", last[:, None])):
        found = optimizer.curvature[name].G
        assert found is not None
        torch.testing.assert_close(found[0], g.T @ g / len(g))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cleared", [None, "zeroed", "dropped"])
def test_micro_batches_without_a_gradient_count(
    method: str, cleared: str | None
) -> None:
    """Zeros that dead units have left are not those of a cleared gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))
    model.double()
    nn.init.constant_(model[0].bias, -1.0)
    optimizer = METHODS[method](model, factor_interval=1)
    x, y = data(8)
    dead, x, share = 0.01 * x, 10 * x, 1.0 if cleared else 0.5
    (share * cross_entropy(model(dead), y)).backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    if cleared:
        optimizer.zero_grad(set_to_none=cleared == "dropped")
    inputs = x if cleared else torch.cat([dead, x])
    examples = torch.cat([inputs, torch.ones(len(inputs), 1).double()], dim=1)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    (share * cross_entropy(model(x), y)).backward()
    optimizer.step()

    def loss(bias: Tensor, one: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, {**parameters, "0.bias": bias}, (one[None],))
        return cross_entropy(logits, target[None])

    rows = vmap(grad(loss), (None, 0, 0))(parameters["0.bias"], x, y)
    layer = optimizer.curvature["0"]
    assert layer.A is not None
    assert layer.G is not None
    torch.testing.assert_close(layer.A[0], examples.mT @ examples / len(examples))
    torch.testing.assert_close(layer.G[0], rows.mT @ rows / len(inputs))
