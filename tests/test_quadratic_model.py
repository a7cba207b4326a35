"""The closed forms of the quadratic model against integrated gradient flow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import benchmark
from torch import Tensor

MODEL = benchmark("quadratic_model")
QuadraticModel = MODEL.QuadraticModel
flipped_labels, spurious_feature = MODEL.flipped_labels, MODEL.spurious_feature
reversed_order = MODEL.reversed_order

pytestmark = pytest.mark.usefixtures("float64")


def flow(gradient: Callable[[Tensor], Tensor], w: Tensor, t: float, n: int) -> Tensor:
    """Integrate ``w' = -gradient(w)`` by Runge and Kutta's method."""
    h = t / n
    for _ in range(n):
        w = w.detach()
        a = gradient(w)
        b = gradient(w - h / 2 * a)
        c = gradient(w - h / 2 * b)
        d = gradient(w - h * c)
        w = w - h / 6 * (a + 2 * b + 2 * c + d)
    return w


def slope(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gradient(w: Tensor) -> Tensor:
        w = w.requires_grad_()
        return torch.autograd.grad(loss(w), w)[0]

    return gradient


@pytest.mark.parametrize("t", [0.3, 2.0, 5.0])
def test_closed_forms_are_the_flows(t: float) -> None:
    """George 2023, eq. 5.4.5 and, with its exponent corrected, 5.4.6 (T9)."""
    X, y = torch.randn(6, 4), torch.randn(6)
    model = QuadraticModel.of(X, y, sigma=0.05)
    v = model.v
    start = (2 * model.start).sqrt()

    def theta(w: Tensor) -> Tensor:
        return v @ (w.square() / 2)

    def linear(w: Tensor) -> Tensor:
        # d theta / d w_j = w_j v_j, taken at the start.
        return v @ (start * (w - start)) + theta(start)

    for function, closed in ((theta, model.theta), (linear, model.theta_linearised)):

        def loss(w: Tensor, f: Callable[[Tensor], Tensor] = function) -> Tensor:
            return (X @ f(w) - y).square().sum() / 2

        w = flow(slope(loss), start.clone(), t, 200).detach()
        found = closed(t)
        torch.testing.assert_close(v @ found, function(w), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(model.loss(found), loss(w))
        torch.testing.assert_close(model.outputs(found), X @ function(w))


def test_a_mode_without_target_decays() -> None:
    X = torch.diag(torch.tensor([2.0, 1.0]))
    model = QuadraticModel.of(X, torch.tensor([2.0, 0.0]), sigma=0.2)
    assert model.theta(0.0).tolist() == pytest.approx([0.1, 0.1])
    assert float(model.theta(10.0)[1]) == pytest.approx(0.1 / (1 + 2 * 0.1 * 10))
    assert str(float(model.times(0.01)[0][1])) == "nan"


def test_times_are_those_of_convergence_for_a_small_start() -> None:
    X, y = torch.randn(6, 4), torch.randn(6)
    model = QuadraticModel.of(X, y, sigma=1e-10)
    epsilon = 1e-5  # the times are to leading order in epsilon as well
    learned, lazy = model.times(epsilon)
    for j in (model.target > epsilon).nonzero().flatten().tolist():
        rest = model.target[j] - model.theta(float(learned[j]))[j]
        assert float(rest) == pytest.approx(epsilon, rel=0.01)
        rest = model.target[j] - model.theta_linearised(float(lazy[j]))[j]
        assert float(rest) == pytest.approx(epsilon, rel=0.01)


def test_example_1_reverses_the_order() -> None:
    model = QuadraticModel.of(*reversed_order([4.0, 3.0, 2.0, 1.0]), sigma=1e-6)
    learned, lazy = model.times(1e-2)
    assert model.mu.tolist() == pytest.approx([4, 3, 2, 1])
    assert model.speed.tolist() == pytest.approx([1, 2, 3, 4])
    assert learned.argsort().tolist() == [3, 2, 1, 0]
    assert lazy.argsort().tolist() == [0, 1, 2, 3]
    # Sequential: when the fastest is half learned, the slower ones have not begun.
    half = float(model.times(0.5 * float(model.target[3]))[0][3])
    assert float(model.theta(half)[0] / model.target[0]) < 1e-3
    assert len(model.plot().lines) == 8


def test_example_2_puts_the_true_labels_first() -> None:
    """The component of ``y`` is ``1 - 2 q / n``, the eigenvalue ``n + eta^2`` (T9)."""
    y = torch.tensor([1.0, -1.0]).repeat(10)
    flipped = torch.zeros(20, dtype=torch.bool)
    flipped[:3] = True
    X, labels = flipped_labels(y, flipped, eta=0.1)
    model = QuadraticModel.of(X, labels)
    assert float(model.mu[0]) == pytest.approx(20 + 0.01)
    assert float(model.projections[0]) / 20**0.5 == pytest.approx(1 - 2 * 3 / 20)
    true = torch.where(flipped, -y, y)
    torch.testing.assert_close(model.u[:, 0].abs(), true.abs() / 20**0.5)
    assert abs(float(model.u[:, 0] @ true)) == pytest.approx(20**0.5)


def test_example_3_has_the_spurious_feature_first() -> None:
    y = torch.tensor([1.0, -1.0]).repeat(10)
    minority = torch.zeros(20, dtype=torch.bool)
    minority[:2] = True
    X, labels = spurious_feature(y, minority, strength=0.3, eta=0.05)
    model = QuadraticModel.of(X, labels)
    assert X.shape == (20, 22)
    assert int(model.v[:, 0].abs().argmax()) == 0
    assert bool((X[minority, 0] * y[minority] < 0).all())
    assert bool((X[:, 1] * y > 0).all())
    with pytest.raises(ValueError, match="Invalid strength: 2"):
        spurious_feature(y, minority, strength=2, eta=0.1)
    with pytest.raises(ValueError, match="Invalid sigma: 0"):
        QuadraticModel.of(X, labels, sigma=0)
