"""The optimizer's health against dense matrices, definitions and provoked failures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    dense_basis,
    dense_factor,
    ekfac_blocks,
    gradients,
    kfac_blocks,
    kron,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ekfac import EKFAC, KFAC
from ekfac.diagnostics import (
    Health,
    optimizer_health,
    step_quality,
)
from ekfac.errors import NotReadyError

pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 3),
    )


def trained(
    kind: Callable[..., Any] = EKFAC, steps: int = 12, **options: Any
) -> tuple[nn.Sequential, Any]:
    model = network()
    intervals = {"factor_interval": 10, "basis_interval": 8}
    optimizer = kind(model, **{"lr": 1e-2, **intervals, **options})
    for _ in range(steps):
        x, y = torch.randn(16, 2, 4, 4), torch.randint(3, (16,))
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def test_staleness_and_gap_are_those_of_the_dense_matrices() -> None:
    _, optimizer = trained(scaling="per_example", basis_tolerance=0.0)
    found = optimizer_health(optimizer)
    assert [layer.layer for layer in found.layers] == list(optimizer.curvature)
    stale = 0
    for row in found.layers:
        layer = optimizer.curvature[row.layer]
        for side, share in (("A", row.off_diagonal_A), ("G", row.off_diagonal_G)):
            C = dense_factor(layer.A if side == "A" else layer.G)
            Q = dense_basis(layer, side)
            turned = Q.mT @ C @ Q
            off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
            assert share == pytest.approx(float(off.norm() / C.norm()), abs=1e-7)
            stale += share > 1e-3
        F, K = ekfac_blocks(layer), kfac_blocks(layer)
        nearest = (F * K).sum() / K.square().sum()
        gap = (F - nearest * K).norm() / F.norm()
        assert row.kfac_gap == pytest.approx(float(gap), rel=1e-6)
        traces = [M.diagonal(dim1=1, dim2=2).sum() for M in (K, F)]
        assert row.trace_ratio == pytest.approx(float(traces[0] / traces[1]))
        Q = kron(dense_basis(layer, "G"), dense_basis(layer, "A"))
        now = (Q * (K @ Q)).sum(dim=1)
        drift = (now - layer.kronecker_scalings().flatten(1)).norm() / now.norm()
        assert row.drift == pytest.approx(float(drift), rel=1e-6)
        assert row.bytes == layer.bytes()
    assert stale >= 3
    assert found.bytes == sum(layer.bytes() for layer in optimizer.curvature.values())


def test_a_fresh_basis_is_not_stale() -> None:
    _, optimizer = trained(basis_interval=1, factor_interval=1, basis_tolerance=0.0)
    for row in optimizer_health(optimizer).layers:
        assert row.off_diagonal_A < 1e-6
        assert row.off_diagonal_G < 1e-6
        assert row.drift < 1e-6
        assert (row.basis_age, row.factors_age, row.scalings_age) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["relative", "absolute"])
def test_damping_is_compared_with_the_eigenvalues(mode: str) -> None:
    _, optimizer = trained(damping=0.02, damping_mode=mode)
    for row in optimizer_health(optimizer).layers:
        layer = optimizer.curvature[row.layer]
        values = torch.linalg.eigvalsh(ekfac_blocks(layer)).flatten()
        damping = 0.02 * float(values.mean()) if mode == "relative" else 0.02
        assert row.damping == pytest.approx(damping)
        assert row.mean_scaling == pytest.approx(float(values.mean()))
        below = float((values < damping).double().mean())
        assert row.damped_share == pytest.approx(below, abs=1e-12)
        share = float((values / (values + damping)).mean())
        assert row.effective_share == pytest.approx(share, rel=1e-8)
        damped = values + damping
        condition = float(damped.max() / damped.min())
        assert row.condition == pytest.approx(condition, rel=1e-8)


def test_kfac_has_no_scalings() -> None:
    _, optimizer = trained(KFAC)
    for row in optimizer_health(optimizer).layers:
        layer = optimizer.curvature[row.layer]
        assert row.scalings_age == -1
        assert row.kfac_gap != row.kfac_gap
        assert row.mean_scaling == pytest.approx(
            float(layer.kronecker_scalings().mean())
        )


def test_ages_count_steps() -> None:
    intervals = {"basis_interval": 50, "factor_interval": 5}
    _, optimizer = trained(steps=23, direction="natural", **intervals)
    assert optimizer.steps == 23
    for row in optimizer_health(optimizer).layers:
        assert (row.basis_age, row.factors_age, row.scalings_age) == (8, 3, 0)


def test_update_norms() -> None:
    model, optimizer = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    x, y = torch.randn(16, 2, 4, 4), torch.randint(3, (16,))
    cross_entropy(model(x), y).backward()
    optimizer.step()
    for row in optimizer_health(optimizer, before).layers:
        names = optimizer.curvature[row.layer].parameter_names
        now = dict(model.named_parameters())
        weight = sum(now[n].detach().square().sum() for n in names) ** 0.5
        update = sum((now[n].detach() - before[n]).square().sum() for n in names) ** 0.5
        assert row.weight_norm == pytest.approx(float(weight))
        assert row.update_norm == pytest.approx(float(update))
        assert row.update_share == pytest.approx(float(update / weight))


def test_findings_name_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(factor_interval=1)
    assert optimizer_health(optimizer).counters["kept"] == 0

    def fail(*unused: Any) -> None:
        raise RuntimeError("eigh failed")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    for _ in range(10):
        optimizer.zero_grad()
        x, y = 100 * torch.randn(16, 2, 4, 4), torch.randint(3, (16,))
        cross_entropy(model(x), y).backward()
        optimizer.step()
    found = optimizer_health(optimizer)
    assert found.counters["kept"] == optimizer.counters.kept > 0
    assert any("decompositions failed" in text for text in found.findings)
    damped = optimizer_health(trained(damping=1e6)[1])
    assert any("almost as by gradient descent" in text for text in damped.findings)
    assert all(layer.effective_share < 1e-4 for layer in damped.layers)


def test_layers_without_a_basis_wait() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    optimizer = EKFAC(model)
    with pytest.raises(NotReadyError, match=r"\['used', 'unused'\]"):
        optimizer_health(optimizer)


def test_text_and_figure() -> None:
    found = optimizer_health(trained()[1])
    text = str(found)
    assert "curvature after 12 steps" in text
    assert all(layer.layer in text for layer in found.layers)
    assert found.by_layer("bytes")["3"] == found.layers[1].bytes
    assert len(found.plot().containers) == 4
    assert isinstance(found, Health)


def test_health_changes_nothing() -> None:
    model, optimizer = trained()
    twin_model, twin = copy.deepcopy((model, optimizer))
    optimizer_health(optimizer)
    x, y = torch.randn(16, 2, 4, 4), torch.randint(3, (16,))
    for net, one in ((model, optimizer), (twin_model, twin)):
        one.zero_grad()
        cross_entropy(net(x), y).backward()
        one.step()
    for mine, other in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(mine, other)


# -- the quadratic model ---------------------------------------------------------------


def test_quadratic_model_is_exact_for_linear_regression() -> None:
    """One layer, one output: the Fisher matrix is the Hessian, so the ratio is 1."""
    model, x, y = nn.Linear(4, 1), torch.randn(64, 4), torch.randn(64, 1)

    def closure() -> Tensor:
        return mse_loss(model(x), y) / 2

    optimizer = EKFAC(
        model, lr=0.3, momentum=0.0, fisher="exact", likelihood="gaussian",
        scaling="per_example", grafting=None, damping=1e-3, damping_mode="absolute",
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    closure().backward()
    optimizer.step()
    found = step_quality(optimizer, closure, before)
    assert found.ratio == pytest.approx(1, rel=1e-8)
    assert found.actual < 0
    assert found.predicted == pytest.approx(found.linear + found.quadratic)


def test_step_quality_by_definition_and_without_a_trace() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout())
    model.append(nn.Linear(8, 3))
    optimizer = EKFAC(model, scaling="per_example", grafting=None)
    x, y = torch.randn(32, 5), torch.randint(3, (32,))
    seed = torch.get_rng_state()

    def closure() -> Tensor:
        return cross_entropy(model(x), y)

    loss = closure()
    loss.backward()
    grads = gradients(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    torch.set_rng_state(seed)
    after = copy.deepcopy(model.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    found = step_quality(optimizer, closure, before)
    assert torch.equal(torch.get_rng_state(), seed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name])
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, grads[name])
    now = optimizer.state_dict()
    for name, layer in saved["curvature"].items():
        for key, value in layer.items():
            other = now["curvature"][name][key]
            if isinstance(value, Tensor):
                assert torch.equal(value, other)
            else:
                assert value == other
    step = {n: after[n] - before[n] for n in before}
    linear = sum(float((grads[n] * step[n]).sum()) for n in step)
    assert found.linear == pytest.approx(linear)
    quadratic = 0.0
    for layer in optimizer.curvature.values():
        flat = layer.pack({n: step[n] for n in layer.parameter_names}).flatten(1)
        product = (ekfac_blocks(layer) @ flat.unsqueeze(-1)).squeeze(-1)
        quadratic += float((flat * product).sum()) / 2
    assert found.quadratic == pytest.approx(quadratic)
    new = float(closure().detach())
    assert found.actual == pytest.approx(new - float(loss.detach()))


def test_an_error_in_the_closure_leaves_the_parameters() -> None:
    model, optimizer = trained()
    before = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    after = copy.deepcopy(model.state_dict())
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of data")
        return model(torch.randn(2, 2, 4, 4)).sum()

    with pytest.raises(RuntimeError, match="out of data"):
        step_quality(optimizer, closure, before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, after[name])
