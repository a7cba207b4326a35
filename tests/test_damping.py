"""Levenberg-Marquardt damping: its quadratic model, its rule, its traces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from ekfac import EKFAC, KFAC
from ekfac.errors import CaptureError
from ekfac.optim import LevenbergMarquardt
from ekfac.optim.levenberg_marquardt import quadratic_model


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (32,), generator=generator)


@pytest.mark.parametrize("loss_name", ["cross_entropy", "mse"])
def test_quadratic_model_equals_the_dense_gauss_newton_matrix(loss_name: str) -> None:
    model, (x, y) = classifier(), batch()
    targets = torch.randn(32, 3, dtype=torch.float64)

    def loss_of(outputs: Tensor) -> Tensor:
        if loss_name == "mse":
            return mse_loss(outputs, targets)
        return cross_entropy(outputs, y)

    parameters = dict(model.named_parameters())
    steps = [torch.randn_like(p) for p in parameters.values()]
    outputs = model(x)
    linear, quadratic = quadratic_model(
        loss_of(outputs), outputs, list(parameters.values()), steps
    )
    jacobians = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    jacobian = torch.cat([j.flatten(2) for j in jacobians.values()], dim=2).flatten(
        0, 1
    )
    bend = hessian(loss_of)(outputs.detach()).reshape(96, 96)
    step = torch.cat([s.flatten() for s in steps])
    moved = jacobian @ step
    gradient = torch.autograd.grad(loss_of(model(x)), list(parameters.values()))
    flat = torch.cat([g.flatten() for g in gradient])
    assert linear == pytest.approx(float(flat @ step), rel=1e-10)
    assert quadratic == pytest.approx(float(moved @ bend @ moved), rel=1e-10)


def test_ratio_is_one_where_the_model_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x, y = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    optimizer = KFAC(
        model,
        lr=0.3,
        momentum=0,
        damping=1e-9,
        damping_mode="absolute",
        grafting=None,
        fisher="exact",
        likelihood="gaussian",
    )
    adaptation = LevenbergMarquardt(optimizer, interval=1, minimum=1e-12)

    def closure() -> Tensor:
        return 0.5 * (model(x) - y).square().sum(dim=1).mean()

    closure().backward()
    optimizer.step()
    reduction = adaptation.step(closure)
    assert reduction is not None
    assert reduction.ratio == pytest.approx(1, abs=1e-6)
    assert reduction.damping == pytest.approx(1e-9 * 19 / 20)


def test_damping_of_attention_counts_every_row_once() -> None:
    """Queries, keys and values are blocks of their own, of rows of two parameters."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True).double()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    options: dict[str, Any] = {"direction": "natural", "grafting": None}
    options |= {"damping": 0.3, "damping_mode": "absolute", "likelihood": "gaussian"}
    optimizer = KFAC(model, lr=0.1, momentum=0.0, **options)
    adaptation = LevenbergMarquardt(optimizer, interval=1)
    before = [p.detach().clone() for p in model.parameters()]

    def loss() -> Tensor:
        out: Tensor = model(x, x, x, need_weights=False)[0]
        return (out - 1).square().sum() / 12

    loss().backward()
    optimizer.step()
    steps = [
        p.detach() - old for p, old in zip(model.parameters(), before, strict=True)
    ]
    reduction = adaptation.step(loss)
    assert reduction is not None
    with torch.no_grad():
        for p, old in zip(model.parameters(), before, strict=True):
            p.copy_(old)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        outputs = model(x, x, x, need_weights=False)[0]
        linear, quadratic = quadratic_model(
            (outputs - 1).square().sum() / 12, outputs, list(model.parameters()), steps
        )
    damped = 0.3 * sum(float(step.square().sum()) for step in steps)
    expected = linear + quadratic / 2 + damped / 2
    assert reduction.predicted == pytest.approx(expected, rel=1e-9)


def test_a_step_that_is_too_long_raises_the_damping_of_every_group() -> None:
    model, (x, y) = classifier(), batch()
    optimizer = EKFAC(
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}],
        lr=300.0,
        model=model,
        damping=0.1,
        damping_mode="absolute",
        grafting=None,
        momentum=0,
    )
    adaptation = LevenbergMarquardt(optimizer, interval=2)
    for step in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        reduction = adaptation.step(lambda: cross_entropy(model(x), y))
        assert (reduction is None) == (step == 0)
    for group in optimizer.param_groups:
        assert group["damping"] == pytest.approx(0.1 / (19 / 20) ** 2)


def test_evaluation_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()
    x, y = batch()
    optimizer = EKFAC(model, lr=1e-3)
    adaptation = LevenbergMarquardt(optimizer, interval=1)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    curvature = optimizer.state_dict()["curvature"]
    noise = torch.random.get_rng_state()
    assert adaptation.step(lambda: cross_entropy(model(x), y)) is not None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(grads, after, strict=True))
    assert torch.equal(noise, torch.random.get_rng_state())
    for name, layer in optimizer.state_dict()["curvature"].items():
        for key, value in layer.items():
            same = curvature[name][key]
            equal = torch.equal(value, same) if isinstance(value, Tensor) else None
            assert equal or value == same


def test_mini_batches_adapt_and_train() -> None:
    model = classifier()
    x, y = batch()
    textbook: dict[str, Any] = {"direction": "natural", "grafting": None}
    optimizer = KFAC(
        model, lr=1.0, momentum=0, damping=10.0, damping_mode="absolute", **textbook
    )
    adaptation = LevenbergMarquardt(optimizer, interval=1)
    first = float(cross_entropy(model(x), y))
    for step in range(40):
        part = slice(8 * (step % 4), 8 * (step % 4) + 8)
        optimizer.zero_grad()
        cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        adaptation.step(lambda part=part: cross_entropy(model(x[part]), y[part]))
    assert float(cross_entropy(model(x), y)) < 0.8 * first
    assert optimizer.param_groups[0]["damping"] < 10.0


def test_errors_and_state() -> None:
    model, (x, y) = classifier(), batch()
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match="interval: 0"):
        LevenbergMarquardt(optimizer, interval=0)
    with pytest.raises(ValueError, match=r"decay: 1\.5"):
        LevenbergMarquardt(optimizer, decay=1.5)
    with pytest.raises(ValueError, match=r"lower=0\.9"):
        LevenbergMarquardt(optimizer, lower=0.9)
    for bounds in ({"minimum": 0.0}, {"minimum": 2.0, "maximum": 1.0}):
        with pytest.raises(ValueError, match=rf"minimum={bounds['minimum']}"):
            LevenbergMarquardt(optimizer, **bounds)
    adaptation = LevenbergMarquardt(optimizer, interval=1)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    parameters = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CaptureError, match="did not call"):
        adaptation.step(lambda: torch.zeros((), requires_grad=True))
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(parameters, after, strict=True))
    other = LevenbergMarquardt(optimizer)
    other.load_state_dict(adaptation.state_dict())
    assert other.steps == adaptation.steps == 1
    other.close()


@pytest.mark.parametrize("damping", [0.0, 1e-30])
@pytest.mark.parametrize("direction", ["natural", "spectral"])
@pytest.mark.parametrize("scaling", ["per_example", "running_average"])
def test_every_parameter_moves_without_damping(
    scaling: Any, direction: Any, damping: float
) -> None:
    """Scalings that are squares of rounding errors do not make a step overflow."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10))
        optimizer = EKFAC(model, damping=damping, scaling=scaling, direction=direction)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(
                model(torch.randn(2, 6)), torch.randint(0, 10, (2,))
            ).backward()
            optimizer.step()
        for p, q in zip(model.parameters(), before, strict=True):
            assert torch.isfinite(p).all()
            assert not torch.equal(p, q)
