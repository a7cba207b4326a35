"""Recorded weights, their components, the drift and the quadratic potential."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from sklearn.decomposition import PCA
from support import relative_error
from torch import nn

from ekfac import diagnostics as d
from ekfac.diagnostics.papers.haink import (
    Relaxation,
    crossover_curvature,
    effective_lr,
    linear_drift_variance,
    quadratic_relaxation,
    subspace_overlaps,
    variance_curvature,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_the_recorder_keeps_what_was_there():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    recorder = d.TrajectoryRecorder(model, ["0"], capacity=3, every=2)
    seen = []
    for call in range(5):
        with torch.no_grad():
            model[0].weight.add_(1.0)
            model[1].weight.add_(1.0)
        recorder.record()
        if call % 2 == 0:
            seen.append(
                torch.cat([p.detach().flatten() for p in model[0].parameters()])
            )
    assert len(recorder) == 3
    assert torch.equal(recorder.weights(), torch.stack(seen))
    expected = torch.stack([seen[1] - seen[0], seen[2] - seen[1]])
    assert torch.equal(recorder.updates(), expected)
    assert list(recorder.space.shapes) == ["0.weight", "0.bias"]
    recorder.record()  # the sixth call takes no row
    with pytest.raises(ValueError, match="capacity"):
        recorder.record()
    assert len(recorder) == 3
    recorder.clear()
    recorder.record()
    assert len(recorder) == 1
    with pytest.raises(ValueError, match="every=0"):
        d.TrajectoryRecorder(model, every=0)


@pytest.mark.parametrize("shape", [(12, 30), (40, 9)])
def test_components_are_scikit_learns(shape):
    rows = torch.randn(shape) * torch.logspace(0, -2, shape[1]) + 5
    found = d.principal_components(rows, 5)
    expected = PCA(5, svd_solver="full").fit(rows.numpy())
    count = len(rows)
    variances = torch.from_numpy(expected.explained_variance_) * (count - 1) / count
    assert relative_error(found.value, variances) < 1e-10
    components = torch.from_numpy(expected.components_).mT
    cosines = d.overlap(found.vectors, components).value.diagonal()
    assert relative_error(cosines, torch.ones(5)) < 1e-10
    assert relative_error(found.vectors.mT @ found.vectors, torch.eye(5)) < 1e-10
    assert relative_error(found.scores, rows @ found.vectors) < 1e-12
    ratio = torch.from_numpy(expected.explained_variance_ratio_)
    assert relative_error(found.explained(), ratio) < 1e-10
    everything = d.principal_components(rows)
    assert float(everything.explained().sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="record more rows"):
        d.principal_components(rows, 40)


def test_components_without_variance_are_orthonormal_too():
    rows = torch.zeros(6, 9)
    rows[:, 2] = torch.arange(6.0)
    for constant in (rows, torch.ones(6, 9)):
        found = d.principal_components(constant)
        assert relative_error(found.vectors.mT @ found.vectors, torch.eye(5)) < 1e-12
    assert d.drift(rows).value == pytest.approx(1)


@pytest.mark.parametrize("count", [10, 1000])
def test_variance_of_a_linear_drift(count):
    """Haink 3A.7: a^2 (T^2 - 1) / 12."""
    speed = 0.3
    samples = speed * torch.arange(count) + 7.0
    expected = float(samples.var(correction=0))
    assert linear_drift_variance(speed, count) == pytest.approx(expected, rel=1e-12)


def test_the_drift_of_a_straight_line_in_noise():
    direction = torch.zeros(20)
    direction[:2] = torch.tensor([0.6, -0.8])
    start, speed = torch.randn(20), 0.01
    time = torch.arange(500)[:, None]
    rows = start + speed * time * direction + 0.02 * torch.randn(500, 20)
    found = d.drift(rows)
    assert float(found.direction @ direction) > 0.999
    assert abs(found.value - speed) < 4 * found.standard_error < 1e-4
    assert found.determination > 0.99
    assert found.variance / found.predicted_variance == pytest.approx(1, abs=0.01)
    assert found.dominance > 100
    mean = rows.mean(dim=0)
    cosine = float(found.direction @ mean / mean.norm())
    assert found.alignment == pytest.approx(cosine)
    theta = rows @ found.direction
    assert found.growth == pytest.approx(float(theta[-1].abs() - theta[0].abs()))
    assert found.offset == pytest.approx(float(theta[0]), abs=0.1)
    with pytest.raises(ValueError, match="at least 3"):
        d.drift(rows[:2])


def test_a_power_law_is_found():
    curvature = torch.logspace(-2, 1, 12)
    vectors = torch.linalg.qr(torch.randn(12, 12)).Q
    noise = torch.randn(20_000, 12)
    rows = (0.3 * noise * curvature) @ vectors.mT
    found = variance_curvature(rows, vectors, curvature)
    assert found.value == pytest.approx(2, abs=5 * found.standard_error + 1e-3)
    assert found.prefactor == pytest.approx(0.09, rel=0.05)
    with pytest.raises(ValueError, match="at least 3"):
        variance_curvature(rows, vectors, -curvature)


def test_crossover_values_of_the_thesis():
    """Haink 3.9 at the final learning rates of Table 5.1: MLP 50 and ResNet 20."""
    assert crossover_curvature(0.01, 32, 60_000) == pytest.approx(0.16, abs=0.005)
    resnet = crossover_curvature(1e-5, 128, 50_000, momentum=0.9)
    assert resnet == pytest.approx(76.8, rel=1e-3)


def test_subspaces_at_different_times():
    basis = torch.linalg.qr(torch.randn(10, 6)).Q
    first, second = basis[:, :2], basis[:, :4]
    third = basis[:, 4:6]
    found = subspace_overlaps([first, second, third])
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]])
    assert relative_error(found.value, expected) < 1e-12


@pytest.mark.parametrize("count", [8, 40])
def test_the_stated_error_of_a_drift_covers_it(count):
    """Over 300 seeds, with independent noise."""
    inside = 0
    for seed in range(300):
        noise = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
        rows = 0.3 * noise.double()
        rows[:, 0] += torch.arange(count)
        found = d.drift(rows)
        inside += abs(found.value - 1) < 2 * found.standard_error
    assert inside / 300 >= 0.9


@pytest.mark.parametrize("count", [3, 5, 20])
def test_the_stated_error_of_a_power_law_covers_it(count):
    curvature = torch.logspace(0, 2, count, dtype=torch.float64)
    inside = 0
    for seed in range(300):
        noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        deviation = (curvature**1.5 * torch.exp(0.3 * noise.double())).sqrt()
        rows = torch.stack([deviation, -deviation])
        vectors = torch.eye(count, dtype=torch.float64)
        found = variance_curvature(rows, vectors, curvature)
        inside += abs(found.value - 1.5) < 2 * found.standard_error
    assert inside / 300 >= 0.9


# ---------------------------------------------------------------- quadratic potential

H = torch.tensor([2.0, 0.7, 0.05], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
MINIMUM = torch.tensor([0.3, 0.5, -1.0], dtype=torch.float64)


def test_the_path_solves_the_flow():
    """Haink 3A.7: the rate is eta (h + 2 lambda); not eta (h + lambda)."""
    lr, penalty = 0.1, 0.02
    found = quadratic_relaxation(H, START, MINIMUM, lr=lr, penalty=penalty)
    h, m = H.numpy(), MINIMUM.numpy()
    times = np.linspace(0, 40, 9)
    flow = solve_ivp(
        lambda _, w: -lr * ((h + 2 * penalty) * w - h * m),
        (0, 40),
        START.numpy(),
        t_eval=times,
        rtol=1e-11,
        atol=1e-12,
    )
    expected = torch.from_numpy(flow.y.T.copy())
    assert relative_error(found.path(torch.from_numpy(times)), expected) < 1e-9
    printed = Relaxation(lr * (H + penalty), found.start, found.limit)
    assert relative_error(printed.path(torch.from_numpy(times)), expected) > 1e-3


def test_gradient_descent_takes_the_discrete_path():
    lr, penalty = 0.05, 0.01
    found = quadratic_relaxation(H, START, MINIMUM, lr=lr, penalty=penalty)
    w = START.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=lr)
    rows = []
    for _ in range(30):
        rows.append(w.detach().clone())
        optimizer.zero_grad()
        quadratic = (H * (w - MINIMUM).square()).sum() / 2
        (quadratic + penalty * w.square().sum()).backward()
        optimizer.step()
    assert relative_error(found.discrete_path(30), torch.stack(rows)) < 1e-12
    time = torch.arange(30.0)
    assert relative_error(found.path(time), torch.stack(rows)) < 0.02


@pytest.mark.parametrize("count", [10, 300])
def test_covariance_of_relaxing_modes(count):
    """Haink 3A.7: eq. 6.12 with T samples, and the cross terms that 6.13 lacks."""
    found = quadratic_relaxation(H, START, MINIMUM, lr=0.1, penalty=0.02)
    path = found.path(torch.arange(float(count)))
    expected = torch.cov(path.mT, correction=0)
    assert relative_error(found.covariance(count), expected) < 1e-10
    direction = torch.tensor([0.2, 0.3, 0.9])
    variance = float((path @ direction).var(correction=0))
    assert float(found.drift_variance(direction, count)) == pytest.approx(variance)
    diagonal = float((direction.square() * expected.diagonal()).sum())
    assert abs(diagonal - variance) > 0.05 * variance


def test_modes_without_curvature_stay():
    found = quadratic_relaxation(
        torch.tensor([0.0]), torch.tensor([2.0]), torch.tensor([5.0]), lr=0.1
    )
    assert found.path(torch.tensor([0.0, 100.0])).flatten().tolist() == [2, 2]
    assert float(found.covariance(50)) == 0


def test_effective_learning_rate_of_a_constant_gradient():
    """Haink 3A.7, eq. 8.1: eta (1 - beta^(t+1)) / (1 - beta)."""
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    for step in range(5):
        before = w.item()
        w.grad = torch.ones(1)
        optimizer.step()
        expected = effective_lr(0.1, 0.9, step)
        assert before - w.item() == pytest.approx(expected, rel=1e-12)
    late = quadratic_relaxation(H, START, MINIMUM, lr=0.1, momentum=0.9)
    assert relative_error(late.rate, H) < 1e-12
