"""Lazy training: exact identities, the linearised limit, and measures of linearity."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy, mse_loss

from ekfac import EKFAC
from ekfac.diagnostics import LinearityProbe
from ekfac.diagnostics.tangent_kernel import AlphaScaled, Linearised

pytestmark = pytest.mark.usefixtures("float64")


def network(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 16),
        activation(),
        nn.Linear(16, 16),
        activation(),
        nn.Linear(16, 3),
    )


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 5), torch.randint(3, (32,))


def train(
    model: nn.Module, lr: float, steps: int, x: Tensor, y: Tensor, momentum: float = 0.0
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 3.0, 1000.0])
def test_at_the_start_it_is_the_model(alpha: float) -> None:
    """George 2023, section 4, T12."""
    model, (x, _) = network(), data()
    assert torch.equal(AlphaScaled(model, alpha)(x), model(x))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_alpha_one_is_ordinary_training_bit_for_bit(momentum: float) -> None:
    model, (x, y) = network(), data()
    plain = copy.deepcopy(model)
    train(AlphaScaled(model, 1.0), 0.1, 20, x, y, momentum)
    train(plain, 0.1, 20, x, y, momentum)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_outputs_are_those_of_the_formula() -> None:
    model, (x, y) = network(), data()
    scaled = AlphaScaled(model, 7.0)
    before = model(x).detach()
    train(scaled, 0.01, 3, x, y)
    torch.testing.assert_close(scaled(x), before + 7 * (model(x) - before))
    names = [name for name, p in scaled.named_parameters() if p.requires_grad]
    assert all(name.startswith("model.") for name in names)


def test_the_limit_is_the_linearised_model() -> None:
    """The distance to it falls like 1 / alpha, where no ReLU stands on its kink."""
    start, (x, y) = network(nn.Tanh), data()
    linear = Linearised(start)
    train(linear, 0.1, 30, x, y)
    distances = []
    for alpha in (10.0, 100.0, 1000.0):
        scaled = AlphaScaled(copy.deepcopy(start), alpha)
        train(scaled, 0.1 / alpha**2, 30, x, y)
        difference = (scaled(x) - linear(x)).detach()
        distances.append(float(difference.norm() / linear(x).detach().norm()))
    assert distances[2] < 1e-3
    for wide, close in itertools.pairwise(distances):
        assert 5 < wide / close < 20


def test_linearised_model_is_the_first_order_expansion() -> None:
    model, (x, _) = network(), data()
    linear = Linearised(model)
    named = {n: p.detach() for n, p in model.named_parameters()}
    J = jacrev(lambda p: functional_call(model, p, (x,)))(named)
    change = {n: torch.randn_like(p) for n, p in named.items()}
    with torch.no_grad():
        for w, delta in zip(linear.weights, change.values(), strict=True):
            w += delta
    moved = sum(torch.tensordot(J[n], d, dims=d.dim()) for n, d in change.items())
    torch.testing.assert_close(linear(x), model(x) + moved)
    assert not linear.train().initial.training


def test_a_natural_gradient_step_shrinks_by_itself() -> None:
    """With damping times ``alpha^2`` the step is exactly ``1 / alpha`` of the plain."""
    alpha, (x, y) = 50.0, data()
    steps = []
    for factor in (1.0, alpha):
        torch.manual_seed(0)
        model = network()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = EKFAC(
            AlphaScaled(model, factor),
            lr=0.1,
            damping=1e-2 * factor**2,
            damping_mode="absolute",
            grafting=None,
            scaling="per_example",
            direction="natural",
        )
        optimizer.model.zero_grad()
        cross_entropy(optimizer.model(x), y).backward()
        optimizer.step()
        after = model.parameters()
        steps.append([b - a for b, a in zip(before, after, strict=True)])
    for plain, lazy in zip(*steps, strict=True):
        torch.testing.assert_close(lazy * alpha, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["batch norm", "dropout"])
def test_randomness_is_refused(kind: str) -> None:
    layer = nn.Dropout(0.1) if kind == "dropout" else nn.BatchNorm1d(16)
    model = nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 3))
    scaled = AlphaScaled(model, 2.0)
    with pytest.raises(ValueError, match=r"\['1'\] depend on the batch or on chance"):
        scaled(torch.randn(4, 5))
    assert scaled.eval()(torch.randn(4, 5)).shape == (4, 3)
    with pytest.raises(ValueError, match="Invalid alpha: 0"):
        AlphaScaled(model, 0)


def test_measures_are_those_of_their_definitions() -> None:
    model, (x, y) = network(), data()
    first, then = copy.deepcopy(model), LinearityProbe(model, x)
    unchanged = then.measure()
    assert unchanged.signs == 1
    assert unchanged.kernel == pytest.approx(1, abs=1e-12)
    assert unchanged.representation == pytest.approx(1, abs=1e-12)
    train(model, 0.5, 40, x, y)
    found = then.measure()

    def signs(net: nn.Module) -> Tensor:
        assert isinstance(net, nn.Sequential)
        return torch.cat([(net[:1](x) > 0).flatten(), (net[:3](x) > 0).flatten()])

    def gram(net: nn.Module) -> Tensor:
        assert isinstance(net, nn.Sequential)
        hidden = net[:4](x)
        return hidden @ hidden.mT

    def kernel(net: nn.Module) -> Tensor:
        named = {n: p.detach() for n, p in net.named_parameters()}
        J = jacrev(lambda p: functional_call(net, p, (x,)))(named)
        rows = torch.cat([j.flatten(0, 1).flatten(1) for j in J.values()], dim=1)
        return rows @ rows.mT

    def alignment(of: Callable[[nn.Module], Tensor]) -> float:
        K, L = of(model).detach(), of(first).detach()
        return float((K * L).sum() / (K.norm() * L.norm()))

    same = (signs(model) == signs(first)).double().mean()
    assert found.signs == pytest.approx(float(same), rel=1e-9)
    assert found.signs < 1
    assert found.kernel == pytest.approx(alignment(kernel), rel=1e-9)
    assert found.representation == pytest.approx(alignment(gram), rel=1e-9)
    assert "tangent kernel" in str(found)


def test_relu_is_seen_wherever_it_is_called() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.first(x))
            return self.last(nn.functional.relu_(hidden - 0.1))

    x = torch.randn(7, 4)
    probe = LinearityProbe(Functional(), x)
    assert [tuple(sign.shape) for sign in probe._signs] == [(7, 6), (7, 6)]
    smooth = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    assert str(LinearityProbe(smooth, x).measure().signs) == "nan"


def test_a_probe_leaves_the_model_alone() -> None:
    model, (x, y) = network(), data()
    mse_loss(model(x), torch.zeros(32, 3)).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model[2].eval()  # type: ignore[index]
    modes = [module.training for module in model.modules()]
    LinearityProbe(model, x).measure()
    assert [module.training for module in model.modules()] == modes
    for p, grad in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)
    assert y.shape == (32,)
