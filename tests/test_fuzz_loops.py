"""Drawn models, loops and options against algebra from single examples' gradients.

The model is run a second time as a function of its parameters and of a displacement of
every layer's output; ``torch.func`` gives the gradient of each example with respect to
these. Factors, scalings and the step are worked out from them with dense matrices.
Nothing of the package is called for it.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from ekfac import EKFAC, KFAC
from ekfac.optim.optimizer import KroneckerOptimizer

LR, DAMPING = 0.1, 1e-2
TEXTBOOK: dict[str, Any] = {
    "lr": LR,
    "momentum": 0.0,
    "damping": DAMPING,
    "damping_mode": "absolute",
    "grafting": None,
    "factor_decay": 0.0,
    "direction": "natural",
}


@dataclass
class Layer:
    """One layer: its kind, sizes, and what is done with its output."""

    kind: str
    d_in: int
    d_out: int
    bias: bool = True
    kernel: int = 1
    hook: float | None = None  # a user's forward hook multiplies the output
    scaled: float | None = None  # a tensor hook multiplies its gradient
    trained: bool = True


@dataclass
class Case:
    """A model as a list of operations, a loop, and options."""

    layers: list[Layer]
    operations: list[tuple[str, int]]
    positions: int
    batch: int
    micro: int
    classes: int
    first: str
    extras: list[str] = field(default_factory=list)
    method: str = "KFAC"
    fisher: str = "empirical"
    reduction: str = "mean"
    single: bool = False
    closure: bool = False
    seed: int = 0


def draw_case(seed: int) -> Case:
    r = random.Random(seed)
    positions = r.choice([0, 0, 1, 2, 3])
    width = r.randint(2, 4)
    layers: list[Layer] = []
    operations: list[tuple[str, int]] = []
    first = r.choice(["linear", "linear", "conv", "embedding"])
    if first == "conv":
        positions = max(1, positions)
        layers.append(Layer("conv", r.randint(1, 2), width, r.random() < 0.7, 2))
        operations.append(("layer", 0))
    elif first == "embedding":
        positions = max(1, positions)
        layers.append(Layer("embedding", r.randint(3, 5), width, False))
        operations.append(("layer", 0))
    for _ in range(r.randint(1, 3)):
        reusable = [
            i
            for i, layer in enumerate(layers)
            if layer.kind == "linear" and layer.d_in == layer.d_out == width
        ]
        if reusable and r.random() < 0.4:
            index = r.choice(reusable)
        else:
            out = r.choice([width, r.randint(2, 4)])
            layers.append(Layer("linear", width, out, r.random() < 0.8))
            index = len(layers) - 1
        operations.append(("layer", index))
        width = layers[index].d_out
        after = r.choice(["relu_", "tanh", "mul_", "+=", "none", "tanh_", "norm"])
        operations.append((after, 0))
    for layer in layers:
        if layer.kind != "embedding":
            layer.hook = r.choice([None, None, None, 1.5])
            layer.scaled = r.choice([None, None, None, 0.5])
    for place, (name, index) in enumerate(operations):
        # torch itself drops a tensor's hook where a view is then changed in place.
        follows = place + 1 < len(operations) and operations[place + 1][0] != "layer"
        if follows and name == "layer" and layers[index].scaled is not None:
            operations[place + 1] = ("tanh", 0)
    classes = r.randint(2, 3)
    layers.append(Layer("linear", width, classes, r.random() < 0.8))
    operations.append(("layer", len(layers) - 1))
    if len(layers) > 2 and r.random() < 0.3:
        r.choice(layers[1:-1]).trained = False
    batch = r.choice([2, 3, 5])
    extras = ["grad", "grad_output", "eval", "no_grad", "discarded", "functional"]
    extras += ["vmap", "inputs", "paused", "graph", "deleted"]
    fisher = "empirical" if positions else r.choice(["empirical", "exact"])
    return Case(
        layers,
        operations,
        positions,
        batch,
        r.choice([1, 1, 2, 3]),
        classes,
        first,
        r.sample(extras, r.randint(0, 3)),
        r.choice(["KFAC", "running average", "per example"]),
        fisher,
        r.choice(["mean", "mean", "sum"]),
        r.random() < 0.15,
        r.random() < 0.2,
        seed,
    )


class Net(nn.Module):
    """The case's model, as a user writes it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        kinds: dict[str, Any] = {
            "linear": lambda c: nn.Linear(c.d_in, c.d_out, bias=c.bias),
            "conv": lambda c: nn.Conv1d(c.d_in, c.d_out, c.kernel, bias=c.bias),
            "embedding": lambda c: nn.Embedding(c.d_in, c.d_out),
        }
        self.parts = nn.ModuleList(kinds[c.kind](c) for c in case.layers)
        for part, spec in zip(self.parts, case.layers, strict=True):
            part.requires_grad_(spec.trained)

    def hook_outputs(self) -> None:
        """Add the user's hooks."""
        for part, spec in zip(self.parts, self.case.layers, strict=True):
            if spec.hook is not None or spec.scaled is not None:
                part.register_forward_hook(UserHook(spec))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for name, index in self.case.operations:
            if name == "layer":
                h = self.parts[index](h)
                if self.case.layers[index].kind == "conv":
                    h = h.transpose(1, 2)
            elif name == "relu_":
                h = F.relu_(h)
            elif name == "tanh":
                h = torch.tanh(h)
            elif name == "tanh_":
                h = h.tanh_()
            elif name == "mul_":
                h.mul_(1.5)
            elif name == "+=":
                h += 0.3
            elif name == "norm":
                h = F.layer_norm(h, h.shape[-1:])
        return h


class UserHook:
    """Multiplies a layer's output, and the gradient that comes back to it."""

    def __init__(self, spec: Layer) -> None:
        self.spec = spec

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if self.spec.scaled is not None and out.requires_grad:
            factor = self.spec.scaled
            out.register_hook(lambda g: g * factor)
        return out if self.spec.hook is None else out * self.spec.hook


def run(
    case: Case, params: dict[str, Tensor], deltas: list[Tensor], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return one example's outputs ``[S, C]`` and each call's inputs ``[S, d_in]``."""
    h, seen, calls = x, [], iter(deltas)
    if case.first == "linear" and not case.positions:
        h = h.unsqueeze(0)
    for name, index in case.operations:
        if name == "layer":
            spec = case.layers[index]
            weight = params[f"parts.{index}.weight"]
            bias = params.get(f"parts.{index}.bias")
            if spec.kind == "conv":
                patches = h.unfold(-1, spec.kernel, 1).permute(1, 0, 2).flatten(1)
                a, out = patches, patches @ weight.flatten(1).T
            elif spec.kind == "embedding":
                a = torch.eye(spec.d_in).to(weight)[h]
                out = a @ weight
            else:
                a, out = h, h @ weight.T
            out = out if bias is None else out + bias
            seen.append(a)
            h = out + next(calls)
            if spec.scaled is not None:
                h = spec.scaled * h + ((1 - spec.scaled) * h).detach()
            h = h if spec.hook is None else h * spec.hook
        elif name == "relu_":
            h = h.relu()
        elif name in ("tanh", "tanh_"):
            h = h.tanh()
        elif name == "mul_":
            h = h * 1.5
        elif name == "+=":
            h = h + 0.3
        elif name == "norm":
            h = F.layer_norm(h, h.shape[-1:])
    return h, seen


@dataclass
class Expected:
    """What the algebra says of one layer, ``d_in`` with the bias."""

    A: Tensor
    G: Tensor
    examples: Tensor  # single examples' gradients [N, d_out, d_in]


def expected(
    case: Case, params: dict[str, Tensor], x: Tensor, y: Tensor
) -> dict[int, Expected]:
    """Return the statistics of all trained layers."""
    calls = [i for name, i in case.operations if name == "layer"]
    count = max(1, case.positions)
    like = next(iter(params.values()))
    zero = [like.new_zeros(count, case.layers[i].d_out) for i in calls]

    def outputs(deltas: list[Tensor], one: Tensor) -> Tensor:
        return run(case, params, deltas, one)[0]

    def loss(deltas: list[Tensor], one: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs(deltas, one), target, reduction="sum")

    targets = y.reshape(len(x), -1)
    own = vmap(grad(loss), (None, 0, 0))(zero, x, targets)
    inputs = vmap(lambda one: run(case, params, zero, one)[1])(x)
    squares = [torch.einsum("nso,nsp->op", g, g) / len(x) for g in own]
    if case.fisher == "exact":
        jacobians = vmap(jacrev(outputs), (None, 0))(zero, x)
        p = vmap(outputs, (None, 0))(zero, x)[:, 0].softmax(-1)
        hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        squares = [
            torch.einsum("nco,ncd,ndp->op", j[:, 0, :, 0], hessian, j[:, 0, :, 0])
            / len(x)
            for j in jacobians
        ]
    result: dict[int, Expected] = {}
    for index in set(calls):
        spec = case.layers[index]
        if not spec.trained:
            continue
        uses = [k for k, i in enumerate(calls) if i == index]
        rows = [inputs[k] for k in uses]
        if spec.bias:
            rows = [torch.cat([a, torch.ones_like(a[..., :1])], -1) for a in rows]
        every = torch.cat(rows, dim=1).flatten(0, 1)
        single = sum(
            torch.einsum("nso,nsi->noi", own[k], a)
            for k, a in zip(uses, rows, strict=True)
        )
        assert isinstance(single, Tensor)
        G = torch.stack([squares[k] for k in uses]).sum(0)
        result[index] = Expected(every.T @ every / len(every), G, single)
    return result


def dense_step(case: Case, want: Expected, gradient: Tensor) -> Tensor | None:
    """Return the textbook step of one layer, ``None`` where no theorem gives it."""
    if case.method == "KFAC":
        d_out, d_in = gradient.shape
        F_ = torch.kron(want.G, want.A) + DAMPING * torch.eye(d_out * d_in).double()
        return torch.linalg.solve(F_, gradient.flatten()).reshape(d_out, d_in)
    if case.method == "per example" and case.fisher == "empirical":
        q_g, q_a = torch.linalg.eigh(want.G)[1], torch.linalg.eigh(want.A)[1]
        s = (q_g.T @ want.examples @ q_a).square().mean(dim=0)
        return q_g @ ((q_g.T @ gradient @ q_a) / (s + DAMPING)) @ q_a.T
    return None


def extra(
    case: Case, name: str, net: Net, optimizer: Any, x: Tensor, y: Tensor
) -> None:
    """Do a pass that must leave no trace."""
    params = [p for p in net.parameters() if p.requires_grad]

    def loss() -> Tensor:
        return F.cross_entropy(net(x).flatten(0, -2), y.flatten()) * 7

    if name == "grad":
        torch.autograd.grad(loss(), params)
    elif name == "grad_output":
        torch.autograd.grad(net(x).flatten()[0] * 100, params[-1])
    elif name == "graph":
        first = torch.autograd.grad(loss(), params, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), params)
    elif name == "eval":
        net.eval()
        torch.autograd.grad(loss(), params)
        net.train()
    elif name == "no_grad":
        with torch.no_grad():
            net(x)
    elif name == "discarded":
        loss().backward()
        optimizer.zero_grad(set_to_none=bool(case.seed % 2))
    elif name == "deleted":
        loss()
    elif name == "inputs" and x.is_floating_point():
        leaf = x.clone().requires_grad_()
        F.cross_entropy(net(leaf).flatten(0, -2), y.flatten()).backward(inputs=[leaf])
    elif name == "paused":
        with optimizer.capture.paused():
            torch.autograd.grad(loss(), params)
    elif name == "functional":
        copies = {n: p.detach().clone() for n, p in net.named_parameters()}
        for copied in copies.values():
            copied.requires_grad_()
        functional_call(net, copies, (x,)).sum().backward()
    elif name == "vmap" and not any(c.scaled or c.hook for c in case.layers):
        fixed = {n: p.detach() for n, p in net.named_parameters()}
        in_place = ("relu_", "tanh_", "mul_", "+=")
        if not any(op in in_place for op, _ in case.operations):
            vmap(lambda one: functional_call(net, fixed, (one[None],)))(x)


def batch(case: Case) -> tuple[Tensor, Tensor]:
    """Return inputs and targets."""
    generator = torch.Generator().manual_seed(case.seed)
    n, spec = case.batch * case.micro, case.layers[0]
    shape = [n, case.positions] if case.positions else [n]
    y = torch.randint(0, case.classes, shape, generator=generator)
    if case.first == "embedding":
        return torch.randint(0, spec.d_in, shape, generator=generator), y
    if case.first == "conv":
        shape = [n, spec.d_in, case.positions + spec.kernel - 1]
    else:
        shape = [*shape, spec.d_in]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, y


def check(seed: int) -> None:
    """Run one case and compare it with the algebra."""
    case = draw_case(seed)
    torch.manual_seed(seed)
    net = Net(case).double()
    if case.seed % 3 == 0:
        net.hook_outputs()
    options = dict(TEXTBOOK, fisher=case.fisher, loss_reduction=case.reduction)
    make: type[KroneckerOptimizer] = KFAC
    if case.method != "KFAC":
        make = EKFAC
        options["scaling"] = case.method.replace(" ", "_")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = make(net, **options)
    if case.seed % 3:
        net.hook_outputs()
    x, y = batch(case)
    params = {n: p.detach().clone() for n, p in net.named_parameters()}
    want = expected(case, params, x, y)

    def total(weights: dict[str, Tensor]) -> Tensor:
        calls = [i for name, i in case.operations if name == "layer"]
        count = max(1, case.positions)
        zero = [x.new_zeros(count, case.layers[i].d_out).double() for i in calls]
        out = vmap(lambda one: run(case, weights, zero, one)[0])(x)
        return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction=case.reduction)

    gradients = grad(total)(params)

    def backward() -> Tensor:
        optimizer.zero_grad()
        parts = zip(x.chunk(case.micro), y.chunk(case.micro), strict=True)
        for number, (some, target) in enumerate(parts):
            for name in case.extras:
                if name != "discarded" or number == 0:
                    extra(case, name, net, optimizer, some, target)
            out = net(some)
            loss = F.cross_entropy(
                out.flatten(0, -2), target.flatten(), reduction=case.reduction
            )
            loss = loss if case.reduction == "sum" else loss / case.micro
            loss.backward()
        return loss.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.closure:
            optimizer.step(backward)  # type: ignore[arg-type]
        else:
            backward()
            optimizer.step()
    for name, parameter in net.named_parameters():  # the algebra is of this loop
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, gradients[name], msg=f"gradient of {name}: {case}"
            )
    optimizer.close()
    if not any(bool(g.any()) for g in gradients.values()):
        return  # gradients that are all zero cannot be told from cleared ones
    compare(case, net, optimizer, params, gradients, want)


def compare(
    case: Case,
    net: Net,
    optimizer: KroneckerOptimizer,
    params: dict[str, Tensor],
    gradients: dict[str, Tensor],
    want: dict[int, Expected],
) -> None:
    """Assert that factors and step are those of the algebra."""
    assert set(optimizer.curvature) == {f"parts.{index}" for index in want}, case
    for index, one in want.items():
        layer, name = optimizer.curvature[f"parts.{index}"], f"parts.{index}"
        assert layer.A is not None, case
        assert layer.G is not None, case
        A = torch.diag(layer.A[0]) if layer.A.dim() == 2 else layer.A[0]
        near = {"rtol": 1e-8, "atol": 1e-11}
        A_ = torch.diag(torch.diag(one.A)) if layer.A.dim() == 2 else one.A
        torch.testing.assert_close(A, A_, **near, msg=f"A of {name}: {case}")
        torch.testing.assert_close(
            layer.G[0], one.G, **near, msg=f"G of {name}: {case}"
        )
        spec = case.layers[index]
        weight = gradients[f"{name}.weight"]
        gradient = weight.T if spec.kind == "embedding" else weight.flatten(1)
        moved = params[f"{name}.weight"] - net.get_parameter(f"{name}.weight").detach()
        found = moved.T if spec.kind == "embedding" else moved.flatten(1)
        if spec.bias:
            gradient = torch.cat([gradient, gradients[f"{name}.bias"][:, None]], 1)
            bias = net.get_parameter(f"{name}.bias").detach()
            change = params[f"{name}.bias"] - bias
            found = torch.cat([found, change[:, None]], 1)
        step = dense_step(case, one, gradient)
        if step is not None and spec.kind != "embedding":
            torch.testing.assert_close(
                found / LR, step, rtol=1e-6, atol=1e-8, msg=f"step of {name}: {case}"
            )


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 10**6))
def test_drawn_loops(seed: int) -> None:
    note(str(draw_case(seed)))
    check(seed)


@pytest.mark.slow
def test_many_drawn_loops() -> None:
    """1,500 cases, one after the other; failures are listed together."""
    failures = [text for seed in range(1500) if (text := outcome(seed))]
    assert not failures, "\n".join(failures[:20])


def outcome(seed: int) -> str:
    """Return what a case says that fails, nothing of one that does not."""
    try:
        check(seed)
    except Exception as error:
        return f"{seed}: {type(error).__name__} {str(error)[:200]}"
    return ""
