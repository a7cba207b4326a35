"""Training as people do it: what a loop may do between two steps, and around one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import collect, parameters, relative_error, step_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler
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

from ekfac import EKFAC, KFAC
from ekfac.errors import EkfacWarning
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning")

# -- automatic mixed precision ---------------------------------------------------------


@every_method
def test_overflowed_steps_leave_no_trace(method: Method) -> None:
    """Powers of two scale without rounding, so all is equal to the last bit."""
    plain, scaled = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(scaled)
    train(plain, expected, range(15))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    for number in (0, 99, *range(1, 8), 98, 97, *range(8, 15)):
        overflows = number >= 97
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, number)).backward()
        if overflows:
            next(scaled.parameters()).grad[0, 0] = math.inf
        before = snapshot(scaled, optimizer)
        scaler.step(optimizer)
        if overflows:
            assert_identical(snapshot(scaled, optimizer), before)
        scaler.update()
    assert scaler.get_scale() != 2.0**12
    assert_identical(snapshot(scaled, optimizer), snapshot(plain, expected))


@every_method
@pytest.mark.parametrize("clear", ["optimizer", "model"])
def test_overflow_that_reaches_the_recorded_gradients(
    method: Method, clear: str
) -> None:
    plain, scaled = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(scaled)
    train(plain, expected, range(6))

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in (0, 1, 2, 99, 3, 4, 5):
        (optimizer if clear == "optimizer" else scaled).zero_grad()
        factor = math.inf if number == 99 else 1.0
        scaler.scale(factor * loss_of(scaled, number)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_identical(snapshot(scaled, optimizer), snapshot(plain, expected))


@every_method
def test_unscale_and_clip_with_a_scaler(method: Method) -> None:
    plain, scaled = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    for number in range(6):
        expected.zero_grad()
        loss_of(plain, number).backward()
        clip_grad_norm_(plain.parameters(), 0.1)
        expected.step()

        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, number)).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(scaled.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    assert_identical(snapshot(scaled, optimizer), snapshot(plain, expected))


def test_disabled_scaler() -> None:
    plain, scaled = small_classifier(), small_classifier()
    expected, optimizer = METHODS[2](plain), METHODS[2](scaled)
    train(plain, expected, range(3))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for number in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, number)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_identical(snapshot(scaled, optimizer), snapshot(plain, expected))


@every_fisher
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(fisher: str, dtype: torch.dtype) -> None:
    def loss(model: nn.Module) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            with torch.autocast("cpu", dtype):
                output = model(example_batch(0, 64)[0])
                assert output.dtype == dtype
                return cross_entropy(output, example_batch(0, 64)[1])

        return evaluate

    full, half = small_classifier(), small_classifier()
    torch.manual_seed(0)
    expected = collect(full, lambda: loss_of(full, 0, 64), fisher=fisher)
    torch.manual_seed(0)
    optimizer = collect(half, loss(half), fisher=fisher)
    found = statistics(optimizer)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for name in ("0", "1", "3", "5"):
        a, b = optimizer.curvature[name], expected.curvature[name]
        assert relative_error(a.A, b.A) < 0.02
        # A draw may fall the other way where the probabilities are rounded.
        assert relative_error(a.G, b.G) < (0.3 if fisher == "mc" else 0.02)


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_step_inside_autocast_is_the_same(method: Method, dtype: torch.dtype) -> None:
    """As some loops have it: everything is in one block."""
    outside, inside = small_classifier(), small_classifier()
    expected, optimizer = method(outside), method(inside)

    def evaluate(model: nn.Module, optimizer: Any, number: int) -> Tensor:
        with torch.autocast("cpu", dtype):
            x, y = example_batch(number)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
        return loss

    for number in range(4):
        evaluate(outside, expected, number)
        expected.step()
        with torch.autocast("cpu", dtype):
            evaluate(inside, optimizer, number)
            optimizer.step()
            assert torch.is_autocast_enabled("cpu")
    evaluate(outside, expected, 4)
    expected.step()
    with torch.autocast("cpu", dtype):
        optimizer.step(lambda: evaluate(inside, optimizer, 4))
    assert_identical(snapshot(inside, optimizer), snapshot(outside, expected))


@every_method
def test_bfloat16_parameters(method: Method) -> None:
    model = small_classifier().to(torch.bfloat16)
    optimizer = method(model, lr=2e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        x, y = example_batch(0, 32)
        loss = cross_entropy(model(x.to(torch.bfloat16)), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {v.dtype for v in statistics(optimizer).values()} == {torch.float32}
    assert losses[-1] < 0.8 * losses[0]


# -- clipping, accumulation, closures --------------------------------------------------


@pytest.mark.parametrize("scaling", [None, "per_example"])
def test_clipping_shortens_the_textbook_step(scaling: str | None) -> None:
    options: dict[str, Any] = {"direction": "natural", "momentum": 0.0}
    options |= {"grafting": None, "damping_mode": "absolute"}
    steps = []
    for clipped in (False, True):
        model = small_classifier().double()
        x, y = example_batch(0)
        if scaling is None:
            optimizer: KroneckerOptimizer = KFAC(model, 0.1, **options)
        else:
            optimizer = EKFAC(model, 0.1, scaling=scaling, **options)
        cross_entropy(model(x.double()), y).backward()
        norm = clip_grad_norm_(model.parameters(), 0.01) if clipped else 1.0
        steps.append(step_of(model, optimizer))
    for name, step in steps[0].items():
        assert relative_error(steps[1][name], step * (0.01 / norm)) < 1e-4


@every_method
def test_accumulation_with_a_scaler(method: Method) -> None:
    """Two backward passes of half the loss each, with and without a scaler."""
    plain, scaled = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number in range(0, 8, 2):
        expected.zero_grad()
        optimizer.zero_grad()
        for part in (number, number + 1):
            (loss_of(plain, part) / 2).backward()
            scaler.scale(loss_of(scaled, part) / 2).backward()
        expected.step()
        scaler.step(optimizer)
        scaler.update()
    assert_identical(snapshot(scaled, optimizer), snapshot(plain, expected))


@every_method
def test_closure(method: Method) -> None:
    plain, closed = small_classifier(), small_classifier()
    expected, optimizer = method(plain), method(closed)
    for number in range(5):
        expected.zero_grad()
        loss = loss_of(plain, number)
        loss.backward()
        expected.step()

        def closure(number: int = number) -> float:
            optimizer.zero_grad()
            loss = loss_of(closed, number)
            loss.backward()
            return float(loss.detach())

        assert optimizer.step(closure) == float(loss.detach())
    assert_identical(snapshot(closed, optimizer), snapshot(plain, expected))


# -- schedulers and groups -------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 6)],
        [3],
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


@pytest.mark.filterwarnings("error:.*lr_scheduler:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("method", METHODS[:3], ids=lambda m: m.name)
def test_scheduler(name: str, method: Method) -> None:
    """Scheduled training equals training with the same numbers set by hand."""
    scheduled, by_hand = small_classifier(), small_classifier()
    optimizer, other = method(scheduled), method(by_hand)
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for number in range(8):
        group = optimizer.param_groups[0]
        seen.add((group["lr"], group["momentum"]))
        other.param_groups[0].update(lr=group["lr"], momentum=group["momentum"])
        train(scheduled, optimizer, [number])
        train(by_hand, other, [number])
        with warnings.catch_warnings():
            # Of SequentialLR's own making.
            warnings.filterwarnings("ignore", message=".*epoch parameter")
            scheduler.step(*((1.0,) if name == "plateau" else ()))
    assert len(seen) > 3
    if name == "one cycle":
        assert len({momentum for _, momentum in seen}) > 3
    assert all(map(torch.equal, scheduled.parameters(), by_hand.parameters()))


def test_learning_rate_as_a_tensor(float64: torch.dtype) -> None:
    """The product rounds differently; factors of full rank do not mind."""
    plain, tensor = small_classifier(), small_classifier()
    expected = EKFAC(plain, 0.01)
    optimizer = EKFAC(tensor, torch.tensor(0.01))
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9)
    for number in range(4):
        group = optimizer.param_groups[0]
        expected.param_groups[0].update(
            lr=float(group["lr"]), momentum=group["momentum"]
        )
        train(plain, expected, [number], size=64)
        train(tensor, optimizer, [number], size=64)
        scheduler.step()
    for a, b in zip(plain.parameters(), tensor.parameters(), strict=True):
        assert relative_error(b.detach(), a.detach()) < 1e-12


@every_method
@pytest.mark.parametrize("reverse", [False, True])
def test_weights_and_biases_in_two_groups(method: Method, reverse: bool) -> None:
    plain, grouped = small_classifier(), small_classifier()
    weights = [p for p in grouped.parameters() if p.dim() > 1]
    biases = [p for p in grouped.parameters() if p.dim() == 1]
    groups = [{"params": weights}, {"params": biases}]
    expected = method(plain)
    optimizer = method(groups[::-1] if reverse else groups, model=grouped)
    train(plain, expected, range(6))
    train(grouped, optimizer, range(6))
    assert_identical(parameters(grouped), parameters(plain))
    assert list(optimizer.curvature) == list(expected.curvature)


@every_method
def test_groups_have_their_own_numbers(method: Method) -> None:
    """A group with a rate of zero stands still, the other moves as without it."""
    free, held = small_classifier(), small_classifier()
    weights = [[p for p in m.parameters() if p.dim() > 1] for m in (free, held)]
    biases = [[p for p in m.parameters() if p.dim() == 1] for m in (free, held)]
    steps = []
    for model, w, b, lr in zip((free, held), weights, biases, (1e-3, 0.0), strict=True):
        optimizer = method([{"params": w}, {"params": b, "lr": lr}], model=model)
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        steps.append(step_of(model, optimizer))
    for name, parameter in held.named_parameters():
        if parameter.dim() > 1:
            assert torch.equal(steps[0][name], steps[1][name])
        else:
            assert not steps[1][name].any()
            assert steps[0][name].any()


def test_weight_decay_of_a_group() -> None:
    """Decoupled: what is taken off is a share of the parameter and nothing else."""
    plain, decayed = small_classifier(), small_classifier()
    before = parameters(plain)
    steps = []
    for model, decay in ((plain, 0.0), (decayed, 0.1)):
        first, *rest = model.parameters()
        groups = [{"params": [first], "weight_decay": decay}, {"params": rest}]
        optimizer = EKFAC(groups, 0.01, model=model)
        loss_of(model, 0).backward()
        steps.append(step_of(model, optimizer))
    for i, (name, value) in enumerate(before.items()):
        share = 0.1 * 0.01 if i == 0 else 0.0
        extra = steps[1][name] - steps[0][name]
        assert torch.allclose(extra, share * value, atol=1e-7)


def test_damping_of_a_group(float64: torch.dtype) -> None:
    """A layer is damped by its weight's group."""
    options: dict[str, Any] = {"direction": "natural", "momentum": 0.0}
    options |= {"grafting": None, "damping_mode": "absolute"}
    moves = {}
    for damping in (1.0, 1e6):
        model = small_classifier()
        last = model[5]
        rest = [p for m in model[:5] for p in m.parameters()]
        groups = [
            {"params": rest},
            {"params": [last.weight], "damping": damping},
            {"params": [last.bias], "damping": 1.0},
        ]
        optimizer = KFAC(groups, 1.0, model=model, damping=1.0, **options)
        loss_of(model, 0).backward()
        moves[damping] = step_of(model, optimizer)
        gradient = last.weight.grad
    for name in moves[1.0]:
        same = torch.equal(moves[1.0][name], moves[1e6][name])
        assert same == (not name.startswith("5."))
    assert relative_error(1e6 * moves[1e6]["5.weight"], gradient) < 1e-3


@every_method
def test_group_added_later(method: Method) -> None:
    model = small_classifier()
    head, body = list(model[5].parameters()), list(model[:5].parameters())
    optimizer = method(head, model=model)
    train(model, optimizer, range(3))
    assert list(optimizer.curvature) == ["5"]
    still = parameters(model)
    optimizer.add_param_group({"params": body, "lr": 1e-4, "damping": 0.1})
    assert set(optimizer.curvature) == {"0", "1", "3", "5"}
    train(model, optimizer, range(3, 9))
    assert all(layer.ready for layer in optimizer.curvature.values())
    now = parameters(model)
    assert not any(torch.equal(still[name], now[name]) for name in now)
    assert all(row.method != "AdamW-like" for row in optimizer.describe().rows)


def test_group_of_parameters_outside_the_model() -> None:
    """They are trained like all that no layer covers, and listed one by one."""
    model = small_classifier()
    optimizer = EKFAC(model)
    extra = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(()))]
    with pytest.warns(EkfacWarning, match="parameter 0, outside the model") as record:
        optimizer.add_param_group({"params": extra})
    assert [w.filename for w in record] == [__file__]
    x, y = example_batch(0)
    output = model(x) * extra[0].sum() + extra[1] ** 2 + extra[1]
    (cross_entropy(output, y) + extra[0].square().sum() + extra[1]).backward()
    optimizer.step()
    assert not torch.equal(extra[0], torch.ones(3))
    assert extra[1] != 0
    rows = [row for row in optimizer.describe().rows if row.method == "AdamW-like"]
    assert [row.block for row in rows] == ["3", "1"]


def test_a_refused_group_changes_nothing() -> None:
    model = small_classifier()
    optimizer = EKFAC(model[5].parameters(), model=model)
    with pytest.raises(ValueError, match="Invalid damping: -1"):
        optimizer.add_param_group({"params": model[0].parameters(), "damping": -1})
    assert len(optimizer.param_groups) == 1
    assert list(optimizer.curvature) == ["5"]


@every_method
def test_unfreezing(method: Method) -> None:
    model = small_classifier()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = method(model)
    assert "0" not in optimizer.curvature
    train(model, optimizer, range(3))
    frozen = model[0].weight.detach().clone()
    for parameter in model[0].parameters():
        parameter.requires_grad_(True)
    train(model, optimizer, range(3, 4))
    assert not torch.equal(model[0].weight, frozen)
    train(model, optimizer, range(4, 8))
    assert optimizer.curvature["0"].ready
    assert optimizer.curvature["0"].block.shape == (1, 16, 7)


@every_method
def test_freezing_and_unfreezing_again(method: Method) -> None:
    model = small_classifier()
    optimizer = method(model)
    train(model, optimizer, range(3))
    optimizer.zero_grad()
    model[3].requires_grad_(False)
    frozen = parameters(model[3])
    train(model, optimizer, range(3, 9))
    assert_identical(parameters(model[3]), frozen)
    model[3].requires_grad_(True)
    train(model, optimizer, range(9, 15))
    assert not torch.equal(model[3].weight, frozen["weight"])


def test_a_bias_unfrozen_later_is_described() -> None:
    model = small_classifier()
    model[0].bias.requires_grad_(False)
    optimizer = EKFAC(model)
    train(model, optimizer, range(2))
    bias = model[0].bias.detach().clone()
    model[0].bias.requires_grad_(True)
    with pytest.warns(EkfacWarning, match=r"0.bias .*the weight beside") as record:
        train(model, optimizer, range(2, 4))
    assert [w.filename for w in record] == [train.__code__.co_filename]
    assert not torch.equal(model[0].bias, bias)
    rows = {row.layer: row for row in optimizer.describe().rows}
    assert rows["0"].block == "1x16x6"
    assert rows["0.bias"].method == "AdamW-like"
    assert rows["0.bias"].block == "16"
