"""Complexity measures, bounds and SuperNat against their definitions, in float64."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import mse_loss

import ekfac
from ekfac.diagnostics.papers.george import (
    ComplexityMeasure,
    feature_descent,
    margin_bound,
    margin_loss,
    multiclass_bound,
    optimal_rescaling,
    rademacher_complexity,
    tangent_trace,
)
from ekfac.errors import StateMismatchError

pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def squared_jacobian(model: nn.Module, x: Tensor) -> float:
    named = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, p, (x,)))(named)
    return sum(float(J.square().sum()) for J in found.values())


# -- the measure -----------------------------------------------------------------------


def test_trace_is_the_squared_jacobian() -> None:
    model, x = network(), torch.randn(9, 4)
    expected = squared_jacobian(model, x)
    assert tangent_trace(model, x) == pytest.approx(expected, rel=1e-10)
    metric = ekfac.fisher(model, [(x, None)], "ekfac", kind="l2")
    assert 9 * float(metric.trace()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("every", [1, 3])
def test_measure_is_the_sum_over_the_path(every: int) -> None:
    model, x, y = network(), torch.randn(9, 4), torch.randn(9, 3)
    measure = ComplexityMeasure(model, x, every=every)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    expected = length = trace = 0.0
    for step in range(7):
        if step % every == 0:
            trace = squared_jacobian(model, x)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        measure.update()
        pairs = zip(model.parameters(), before, strict=True)
        moved = sum(float((p - b).square().sum()) for p, b in pairs) ** 0.5
        expected, length = expected + moved * trace**0.5, length + moved
    found = measure.result()
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert found.per_example == pytest.approx(expected / 9, rel=1e-10)
    assert found.path_length == pytest.approx(length, rel=1e-10)
    assert found.updates == 7
    assert "over 7 updates" in str(found)


def test_measure_resumes() -> None:
    model, x = network(), torch.randn(9, 4)
    measure = ComplexityMeasure(model, x, every=2)
    with torch.no_grad():
        model[0].weight += 1
    measure.update()
    other = copy.deepcopy(model)
    resumed = ComplexityMeasure(other, x, every=2)
    resumed.load_state_dict(measure.state_dict())
    for net, one in ((model, measure), (other, resumed)):
        with torch.no_grad():
            net[2].weight.mul_(2)
        one.update()
    assert resumed.result() == measure.result()
    wider = ComplexityMeasure(nn.Linear(4, 2), x)
    with pytest.raises(StateMismatchError, match=r"'before\.weight' is missing"):
        wider.load_state_dict(measure.state_dict())
    with pytest.raises(ValueError, match="Invalid every: 0"):
        ComplexityMeasure(model, x, every=0)


# -- bounds ----------------------------------------------------------------------------


def test_rademacher_complexity_is_below_its_bound() -> None:
    """George 2023, section 4, T11; the expectation by all sign vectors."""
    features = torch.randn(8, 5)
    K = features @ features.mT
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)))
    # sup over |w| <= M of sigma^T Phi w / n is attained along Phi^T sigma.
    exact = 2.5 * (signs @ features).norm(dim=1).mean() / 8
    generator = torch.Generator().manual_seed(0)
    found = rademacher_complexity(K, 2.5, samples=4000, generator=generator)
    assert abs(found.value - float(exact)) < 4 * found.standard_error
    assert (
        float(exact) < found.bound == pytest.approx(2.5 / 8 * float(K.trace()) ** 0.5)
    )
    assert found.standard_error < 0.02
    bound = multiclass_bound(K, 2.5, classes=4, margin=0.5)
    assert bound == pytest.approx(8 / 0.5 * found.bound)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        rademacher_complexity(K, 1.0, samples=1)
    with pytest.raises(ValueError, match="Invalid margin: 0"):
        multiclass_bound(K, 1.0, classes=2, margin=0)


def test_no_rescaling_beats_the_optimal_one() -> None:
    """George 2023, proposition B.2.5, with the norms taken in feature space."""
    features, y = torch.randn(12, 8), torch.randn(12)
    n = len(y)
    found = optimal_rescaling(features @ features.mT, y)
    U, _, Vh = torch.linalg.svd(features, full_matrices=False)
    w = torch.linalg.lstsq(features, y[:, None]).solution[:, 0]

    def bound(nu: Tensor) -> float:
        A = Vh.mT @ torch.diag(nu.sqrt()) @ Vh
        rescaled = features @ torch.linalg.inv(A)
        return float((A.mT @ w).norm() * rescaled.norm()) / n

    parts = U.mT @ y
    assert found.euclidean == pytest.approx(bound(torch.ones(8)), rel=1e-9)
    assert found.bound == pytest.approx(bound(found.nu), rel=1e-9)
    assert found.bound == pytest.approx(float(parts.abs().sum()) / n, rel=1e-9)
    assert found.bound <= found.euclidean
    for _ in range(100):
        nu = torch.rand(8).exp() * found.nu * torch.rand(8)
        assert bound(nu) >= found.bound


def test_margins() -> None:
    outputs = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]])
    y = torch.tensor([0, 1, 0])  # margins 2, 0.5, -1
    assert margin_loss(outputs, y, 0) == pytest.approx(1 / 3)
    assert margin_loss(outputs, y, 1.0) == pytest.approx((0 + 0.5 + 1) / 3)
    expected = 0.5 + 2 * 0.1 + 3 * (float(torch.tensor(40.0).log()) / 200) ** 0.5
    assert margin_bound(0.5, 0.1, 100, delta=0.05) == pytest.approx(expected)
    with pytest.raises(ValueError, match="Invalid margin: -1"):
        margin_loss(outputs, y, -1)
    with pytest.raises(ValueError, match="Invalid delta: 1"):
        margin_bound(0.5, 0.1, 100, delta=1)


# -- SuperNat --------------------------------------------------------------------------


def test_supernat_is_descent_in_explicitly_rescaled_features() -> None:
    """The reparametrisation is carried out: ``w <- A^T w``, ``Phi <- Phi A^-1``."""
    features, y = torch.randn(10, 6), torch.randn(10)
    U, _, Vh = torch.linalg.svd(features, full_matrices=False)
    phi, w, metric = features.clone(), torch.zeros(6), torch.eye(6)
    for step in range(5):
        found = feature_descent(features, y, lr=0.3, steps=step)
        torch.testing.assert_close(found.outputs, phi @ w)
        torch.testing.assert_close(features @ found.weights, found.outputs)
        spectrum = torch.linalg.eigvalsh(U.mT @ phi @ phi.mT @ U)
        torch.testing.assert_close(found.eigenvalues[-1].sort().values, spectrum)
        slope = (phi @ w - y) * 2 / 10
        # The same step as natural gradient in the original features.
        natural = -0.3 * torch.linalg.solve(metric, features.mT @ slope)
        change = -0.3 * phi.mT @ slope
        torch.testing.assert_close(features @ natural, phi @ change)
        w = w + change
        parts = (U.mT @ slope).abs()
        A = Vh.mT @ torch.diag((parts.max() / parts).sqrt()) @ Vh
        phi, w, metric = phi @ torch.linalg.inv(A), A.mT @ w, metric @ A @ A.mT


def test_the_rescaling_minimises_the_step_s_complexity() -> None:
    """``|dw|_A |A^-1 Phi^T|`` of one step, against random ``nu`` (eq. 6.4.8)."""
    features, y = torch.randn(10, 6), torch.randn(10)
    U, roots, _ = torch.linalg.svd(features, full_matrices=False)
    slope = U.mT @ y * 2 / 10

    def product(nu: Tensor) -> float:
        change = (nu * roots.square() * slope.square()).sum()
        return float(change * (roots.square() / nu).sum())

    best = product(1 / slope.abs())
    assert all(product(torch.rand(6) + 0.01) >= best for _ in range(200))


def test_gradient_descent_is_torch_s() -> None:
    features, y, test = torch.randn(10, 6), torch.randn(10), torch.randn(7, 6)
    target = torch.randn(7)
    found = feature_descent(
        features, y, method="gd", lr=0.1, steps=25, test=(test, target)
    )
    w = torch.zeros(6, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(25):
        optimizer.zero_grad()
        mse_loss(features @ w, y).backward()
        optimizer.step()
    torch.testing.assert_close(found.weights, w.detach())
    assert found.test_loss is not None
    expected = mse_loss(test @ w, target).detach()
    torch.testing.assert_close(found.test_loss[-1], expected)
    assert found.loss.shape == (26,)
    assert len(found.plot().lines) == 2
    with pytest.raises(ValueError, match="got 'adam'"):
        feature_descent(features, y, method="adam")  # type: ignore[arg-type]


def test_supernat_generalises_better_than_descent() -> None:
    """George 2023, Figure 5 and section 4, T24: 18 of 20 seeds; these are fresh."""
    wins = 0
    for seed in range(1000, 1020):
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(150, 11, generator=generator) for _ in range(2)]
        scale = torch.tensor([1.0] + [10**-0.5] * 10)
        features = draws[0] * scale
        noise = features[:50, 1:]
        epsilon = draws[1][:50, 0] * 0.1**0.5
        y = features[:50, 0] + noise @ (noise.mT @ epsilon)
        test = (features[50:], features[50:, 0])
        found = [
            feature_descent(features[:50], y, method=method, test=test).test_loss
            for method in ("supernat", "gd")
        ]
        assert found[0] is not None
        assert found[1] is not None
        wins += int(found[0][-1] < found[1][-1])
    assert wins >= 18
