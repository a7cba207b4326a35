"""Layers and parameters that no block covers, or not in every step."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from definitions import (
    Between,
    Stack,
    check_factors,
    doubles,
    weighed,
)
from support import collect, parameters, relative_error
from torch import Tensor, nn

from ekfac import EKFAC, KFAC
from ekfac.errors import EkfacWarning
from ekfac.optim import update
from ekfac.testing import check_adapter


def reasons(model: nn.Module) -> dict[str, str]:
    """Return the reasons of what no block covers, as ``describe`` lists them."""
    with pytest.warns(EkfacWarning) as record:
        optimizer = EKFAC(model)
    found = {
        row.layer: row.reason
        for row in optimizer.describe().rows
        if row.method == "AdamW-like"
    }
    lines = str(record[0].message).splitlines()
    for name, reason in found.items():
        assert any(
            (name in line or " more (" in line) and f"({reason}):" in line
            for line in lines
        )
    optimizer.close()
    return found


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer under another name."""


class Constant(nn.Module):
    """A parameter of its own, of no known type."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift.sin()


class Table(nn.Module):
    """A matrix that no operation is given as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x.div(self.rows.exp().sum(1))


@pytest.mark.parametrize(
    ("layer", "parameters", "reason"),
    [
        (nn.Embedding(7, 3, scale_grad_by_freq=True), ["weight"], "scale_grad_by_freq"),
        (nn.Linear(0, 3), ["weight", "bias"], "its weight has no elements"),
        (nn.Conv1d(3, 0, 1), ["weight", "bias"], "its weight has no elements"),
        (nn.Linear(3, 3).to(torch.complex64), None, "its dtype is torch.complex64"),
        (
            Doubled(3, 3),  # of which ``linear`` is watched
            ["bias"],
            "test_uncovered_layers.Doubled: a vector by itself",
        ),
        (
            Constant(),
            ["shift"],
            "test_uncovered_layers.Constant: a vector by itself",
        ),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            ["bias_k", "bias_v"],
            "torch.nn.MultiheadAttention: a vector by itself",
        ),
        (nn.EmbeddingBag(7, 3, mode="max"), ["weight"], "mode='max'"),
        (
            Table(),
            ["rows"],
            "test_uncovered_layers.Table: it has no adapter; register an adapter",
        ),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            ["bias", "parametrizations.weight.original"],
            "parametriz",
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 1)),
            None,
            "parametriz",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refused_layers_say_why(
    layer: nn.Module, parameters: list[str] | None, reason: str
) -> None:
    found = reasons(nn.Sequential(nn.Linear(2, 2), layer))
    names = parameters or [name for name, _ in layer.named_parameters()]
    assert sorted(found) == sorted(f"1.{name}" for name in names)
    assert all(reason in why for why in found.values()), found
    for why in found.values():  # whose it is, why, and what to do
        assert re.fullmatch(r"(torch\.nn|test_uncovered_layers)[\w.]+: .+; .+", why), (
            why
        )


def test_refused_layers_are_trained() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3), Constant(), normed)
    with pytest.warns(EkfacWarning):
        optimizer = EKFAC(model, lr=0.1)
    before = parameters(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum(1).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_subclass_with_the_same_forward_is_covered() -> None:
    layer = Renamed(4, 3).double()
    assert check_adapter(layer, doubles(5, 4))
    check_factors(Between(layer), "layer", layer, [doubles(5, 4)])


def test_lazy_modules_need_a_forward_pass_first() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 2), nn.Flatten(), nn.LazyLinear(3)).double()
    with pytest.raises(ValueError, match=r"layer '0' is lazy.*one forward pass"):
        EKFAC(model)
    x = doubles(5, 2, 3, 3)
    model(x)
    check_factors(model, "0", model[0], [x], 0)
    check_factors(model, "2", model[2], [x])


def test_frozen_parameters() -> None:
    """Frozen layers have no block; a frozen bias leaves the column of ones out."""
    x = doubles(5, 3)
    model = Stack(*(nn.Linear(3, 3) for _ in range(4))).double()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    for name in ("1", "3"):
        found = check_factors(model, name, model[int(name)], [x])
        assert found.block.shape == (1, 3, 3 + (name == "3"))
    with pytest.warns(EkfacWarning, match=r"2\.bias .*the weight beside it is not"):
        optimizer = EKFAC(model, lr=0.1)
    assert list(optimizer.curvature) == ["1", "3"]
    before = parameters(model)
    weighed(model, x)().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"1.weight", "2.bias", "3.weight", "3.bias"}


def test_unfrozen_layers_get_blocks() -> None:
    model = Stack(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[0].requires_grad_(False)
    optimizer = EKFAC(model)
    x = doubles(5, 3)
    weighed(model, x)().backward()
    optimizer.step()
    assert list(optimizer.curvature) == ["1"]
    model[0].requires_grad_(True)
    # The first of them had no hooks yet in its forward pass; step 4 takes factors.
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EkfacWarning)
            weighed(model, x)().backward()
            optimizer.step()
    assert set(optimizer.curvature) == {"0", "1"}
    assert optimizer.curvature["0"].ready


def test_a_bias_shared_by_different_weights_is_in_no_block() -> None:
    layers = [nn.Linear(3, 3).double() for _ in range(3)]
    for layer in layers[1:]:
        layer.bias = layers[0].bias
    model, x = Stack(*layers), doubles(5, 3)
    why = (
        "torch.nn.Linear: layers of different weights share it; there is nothing to do"
    )
    assert reasons(model) == {"0.bias": why}
    for i, layer in enumerate(layers):
        assert check_factors(model, f"{i}", layer, [x]).block.shape == (1, 3, 3)


class Branches(nn.Module):
    """Two layers, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        y: Tensor = self.left(x).sin()
        return y if skip else y + self.right(x)


def test_a_layer_that_a_step_skips_keeps_its_state() -> None:
    model, x = Branches().double(), doubles(5, 3)
    optimizer = EKFAC(model, lr=0.1, factor_interval=1, basis_interval=1)
    weighed(model, x)().backward()
    optimizer.step()
    before, state = parameters(model), optimizer.curvature.state_dict()
    optimizer.zero_grad()
    model(x, skip=True).sum().backward()
    optimizer.step()
    after = optimizer.curvature.state_dict()
    for key, value in state["right"].items():
        kept = isinstance(value, Tensor) and key not in ("Q_A", "Q_G")
        if kept and not key.startswith("eigenvalues"):
            assert torch.equal(after["right"][key], value), key
    assert not torch.equal(after["left"]["A"], state["left"]["A"])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"left.weight", "left.bias"}


def test_calls_without_a_gradient_do_not_count() -> None:
    """Of two calls only one reaches the loss."""
    layer = nn.Linear(3, 3).double()

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x + self.layer(x.cos()).detach()).sin()
            return y

    model, x = Detached(), doubles(5, 3)
    found = collect(model, weighed(model, x), loss_reduction="sum").curvature["layer"]
    inputs = torch.cat([x + layer(x.cos()).detach(), doubles(5, 1) * 0 + 1], dim=1)
    assert relative_error(found.A, (inputs.t() @ inputs / 5).unsqueeze(0)) < 1e-10


def test_the_warning_is_a_few_lines_on_any_model() -> None:
    """Grouped by reason, the largest first, with what to do about it."""

    class Odd(Constant):
        pass

    layers = [*(Constant() for _ in range(40)), Odd()]
    many = [type(f"Kind{i}", (Constant,), {})() for i in range(20)]
    with pytest.warns(EkfacWarning) as record:
        EKFAC(nn.Sequential(nn.Linear(2, 2), *layers, *many))
    head, *lines = str(record[0].message).splitlines()
    assert "EKFAC trains 61 parameters with a diagonal second moment" in head
    assert len(lines) == 9
    assert lines[0].startswith("  1.shift, 2.shift, 3.shift and 37 more (")
    assert "37 more (test_uncovered_layers.Constant: a vector" in lines[0]
    assert lines[0].endswith("): 120 elements")
    assert lines[-1] == "  and for 14 other reasons"


class Turned(nn.Module):
    """Complex parameters: of a layer, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, dtype=torch.complex128)
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x.to(torch.complex128)) * self.phase).abs()


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
def test_complex_parameters_move_as_adamw_moves_them(
    kind: type[EKFAC | KFAC],
) -> None:
    model, x = Turned(), doubles(8, 5)
    twin = copy.deepcopy(model)
    ours = kind(model, lr=0.01, momentum=0.0, weight_decay=0.1, nesterov=False)
    betas = (0.0, 0.999)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=betas)
    theirs.param_groups[0]["weight_decay"] = 0.1
    for _ in range(4):
        for net, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            net(x).square().sum(1).mean().backward()
            optimizer.step()
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=0)


class Turning(nn.Module):
    """Two parameters whose gradients lie in memory as the form of the loss has them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 3))
        self.spread = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.matrix.flatten(), self.spread.flatten()]) * x


@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
@pytest.mark.usefixtures("float64")
def test_adamw_follows_gradients_and_states_of_any_strides() -> None:
    """Kernels read memory in its order; gradients and loaded states have their own."""
    torch.manual_seed(0)
    model = Turning()
    twin = copy.deepcopy(model)
    ours = EKFAC(model, lr=0.01, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        gradients = [torch.randn(5, 3, generator=generator)]
        gradients.append(torch.randn(4, 6, generator=generator))
        for p, q, gradient in zip(
            model.parameters(), twin.parameters(), gradients, strict=True
        ):
            if number % 3 == 1:
                gradient = gradient.t().contiguous().t()
            elif number % 3 == 2:
                gradient = gradient.repeat_interleave(2, dim=1)[:, ::2]
            p.grad, q.grad = gradient, gradient.clone()
        ours.step()
        theirs.step()
        for state in ours.state.values():
            if number == 2:
                state["exp_avg"] = state["exp_avg"].t().contiguous().t()
            elif number == 3:
                wide = state["exp_avg_sq"].repeat_interleave(2, dim=1)
                state["exp_avg_sq"] = wide[:, ::2]
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
@pytest.mark.usefixtures("float64")
def test_a_parameter_outside_of_the_model_may_be_resized() -> None:
    """Its averages begin anew: the kernel would write behind those of another shape."""
    torch.manual_seed(0)
    model, extra = nn.Linear(8, 4), nn.Parameter(torch.ones(3))
    ours = EKFAC([*model.parameters(), extra], model=model, lr=0.01)
    theirs: torch.optim.Optimizer | None = None
    for number in range(6):
        if number == 3:
            extra.data = torch.ones(200)
            twin = nn.Parameter(torch.ones(200))
            theirs = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
        ours.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean()
        (loss + (extra - 3).square().sum()).backward()
        ours.step()
        if theirs is not None:
            theirs.zero_grad()
            (twin - 3).square().sum().backward()
            theirs.step()
    torch.testing.assert_close(extra, twin, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("float64")
def test_averages_that_do_not_fit_are_refused() -> None:
    state = {"exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    state["weights"] = [0.1, 0.001]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"shape \[3, 4\].*averages \[4, 3\]"):
        update._adamw([state], [torch.ones(3, 4)], 0.9)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1 - 1e-10])
@pytest.mark.usefixtures("float64")
def test_adamw_directions_for_any_momentum(momentum: float) -> None:
    """The bias of averages is that of their own weights."""
    state: dict[str, Any] = {}
    first, second = torch.zeros(5), torch.zeros(5)
    weights = [0.0, 0.0]
    for _ in range(4):
        gradient = torch.randn(5)
        (found,) = update.adamw_directions([state], [gradient], momentum, "rms")
        first = momentum * first + (1 - momentum) * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        weights = [
            momentum * weights[0] + 1 - momentum,
            0.999 * weights[1] + 0.001,
        ]
        expected = first / weights[0] / ((second / weights[1]).sqrt() + 1e-8)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
@pytest.mark.usefixtures("float64")
def test_adamw_of_parameters_of_different_ages() -> None:
    """A parameter that joins later has averages of its own age."""
    torch.manual_seed(0)
    model = Turning()
    twin = copy.deepcopy(model)
    ours = EKFAC(model, lr=0.01, momentum=0.9)
    theirs = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    for number in range(6):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = None if p.shape == (4, 6) and number < 3 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"scaling": "per_example"}, {"max_dim": 2}])
@pytest.mark.filterwarnings("ignore::ekfac.errors.EkfacWarning")
def test_sparse_gradients_are_dense_ones_with_zeros(options: dict[str, Any]) -> None:
    ids, after = torch.randint(9, (16, 4)), []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(9, 5, sparse=sparse), nn.Flatten(), nn.Linear(20, 3)
        )
        optimizer = EKFAC(model, lr=1e-2, factor_interval=1, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids).square().sum(1).mean().backward()
            assert model[0].weight.grad.is_sparse == sparse
            optimizer.step()
        after.append(parameters(model))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
def test_layers_of_no_width_change_nothing_else(width: int, scaling: str) -> None:
    """The rest is trained as without them; a bias with no weight by its diagonal."""

    class Empty(nn.Module):
        def __init__(self, present: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(5, 3)
            self.b = nn.Linear(5, 0) if present else None
            self.c = nn.Linear(0, width) if present else None

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            if self.b is None or self.c is None:
                return y
            return torch.cat([y + self.c(self.b(x)).sum(1, keepdim=True), self.b(x)], 1)

    x, results = torch.randn(16, 5), []
    for present in (True, False):
        model = Empty(present)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EkfacWarning)
            optimizer = EKFAC(model, lr=1e-2, scaling=scaling, loss_reduction="sum")
        assert list(optimizer.curvature) == ["a"]
        before = parameters(model)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        results.append(model.a.weight.detach().clone())
        if present and width:
            assert not torch.equal(model.c.bias, before["c.bias"])
    assert torch.equal(*results) or width
