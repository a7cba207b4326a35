"""Damping, lengths by the agreement of gradients, and Levenberg-Marquardt's damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from ekfac import EKFAC, KFAC
from ekfac.errors import CaptureError
from ekfac.optim import LevenbergMarquardt, precondition
from ekfac.optim.levenberg_marquardt import quadratic_model
from ekfac.optim.optimizer import KroneckerOptimizer


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


# -- the agreement of gradients --------------------------------------------------------


def averaging_weights(momentum: float, nesterov: int, steps: int = 2000) -> Tensor:
    """Return the weight of each gradient, the newest first, by unit impulses.

    Those of an average that began with the first of them.
    """
    total = torch.zeros(steps, dtype=torch.float64)
    for number in range(steps):  # the average after each new gradient
        total *= momentum
        total[number] += 1 - momentum
    total /= total.sum()
    for _ in range(nesterov):  # the newest once more
        total *= momentum
        total[-1] += 1 - momentum
    return total.flip(0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("nesterov", [0, 1, 2, 5])
def test_squared_weights_of_averaged_gradients(momentum: float, nesterov: int) -> None:
    newest, *others = averaging_weights(momentum, nesterov).square().tolist()
    found = precondition.squared_weights(momentum, nesterov)
    assert found == pytest.approx((newest, sum(others)), rel=1e-10)
    if momentum:
        for steps in (1, 2, 7, 2000):
            every = averaging_weights(momentum, nesterov, steps).square().sum()
            weights = torch.tensor([1 - momentum**steps], dtype=torch.float64)
            total = precondition.sum_of_squared_weights(momentum, nesterov, weights)
            assert float(total) == pytest.approx(float(every), rel=1e-10), steps


def agreements(
    signs: Tensor | None,
    steps: int,
    nesterov: int = 1,
    odd: Mapping[int, int] | None = None,
    **options: Any,
) -> list[float]:
    """Return a layer's agreement at each step, for gradients that do not see weights.

    They are ``signs[t]`` times that of one example, or independent. Batches have 64
    examples, those of ``odd`` steps as many as it says.
    """
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(70, 80, bias=False).double()
    optimizer = EKFAC(layer, lr=1e-3, nesterov=nesterov, **options)
    x = torch.randn(1, 70, generator=generator).double().expand(64, 70)
    r = torch.randn(1, 80, generator=generator).double().expand(64, 80)
    found = []
    for step in range(steps):
        if signs is None:
            count = max(64, (odd or {}).get(step, 64))
            x = torch.randn(count, 70, generator=generator).double()
            r = torch.randn(count, 80, generator=generator).double()
        optimizer.zero_grad()
        sign = 1.0 if signs is None else float(signs[step])
        size = (odd or {}).get(step, 64)
        (layer(x[:size]) * r[:size]).sum(dim=1).mean().mul(sign).backward()
        optimizer.step()
        (curvature,) = optimizer.curvature.values()
        found.append(float(curvature.agreement))
    return found


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("nesterov", [0, 2])
def test_agreement_is_one_for_noise(nesterov: int, rank: int | None) -> None:
    """Of 5,600 independent entries, averaged over 40 steps."""
    noise = agreements(None, 100, nesterov, rank=rank)[60:]
    assert sum(noise) / len(noise) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("nesterov", [0, 2])
def test_agreement_of_gradients_that_repeat_or_alternate(
    nesterov: int, rank: int | None
) -> None:
    weights = averaging_weights(0.9, nesterov)
    independent = float(weights.square().sum())
    same = agreements(torch.ones(10), 10, nesterov, rank=rank)
    assert same == pytest.approx([1 / independent] * 10, rel=1e-6)
    turns = (-1.0) ** torch.arange(150)
    against = agreements(turns, 150, nesterov, rank=rank)[-1]
    left = float((weights * (-1.0) ** torch.arange(len(weights))).sum() ** 2)
    assert against == pytest.approx(max(left / independent, 0.01), rel=1e-5)


def lengths(
    gradients: Sequence[Tensor],
    kind: Callable[..., KroneckerOptimizer] = EKFAC,
    **options: Any,
) -> list[float]:
    """Return the root mean square of each step over ``lr``, for given gradients.

    Of a layer that is wide enough for a truncated basis, from 64 examples.
    """
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(70, 80, bias=False).double()
    optimizer = kind(layer, lr=1e-3, **options)
    x = torch.randn(64, 70, generator=generator).double()
    r = torch.randn(64, 80, generator=generator).double()
    found = []
    for gradient in gradients:
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (layer(x) * r).sum(dim=1).mean().backward()
        layer.weight.grad = gradient.clone()
        optimizer.step()
        moved = layer.weight.detach() - before
        found.append(float(moved.square().mean().sqrt()) / 1e-3)
    return found


def made_gradients(mean: float, steps: int) -> list[Tensor]:
    """Return gradients ``[80, 70]``: ``mean`` times one matrix, and noise."""
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(steps + 1, 80, 70, generator=generator).double()
    return list(mean * draws[0] + draws[1:])


def expected_lengths(
    gradients: Sequence[Tensor], momentum: float, nesterov: int
) -> list[float]:
    """Return the roots of ``r / n + 1 - r``.

    With ``r`` the share of each gradient along the average of those before, ``n`` the
    sum of the squared weights of all so far.
    """
    found, average = [], torch.zeros_like(gradients[0])
    for step, gradient in enumerate(gradients):
        share = 0.0
        if step:
            earlier = average / (1 - momentum**step)
            largest = max(float(gradient.norm()), float(earlier.norm()))
            share = max(0.0, float((gradient * earlier).sum()) / largest**2)
        average = momentum * average + (1 - momentum) * gradient
        n = float(averaging_weights(momentum, nesterov, step + 1).square().sum())
        found.append((share / n + 1 - share) ** 0.5)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": 0, "momentum": 0.95},
        {"direction": "natural", "damping_mode": "relative"},
        {"rank": 8},
        {"scaling": "per_example"},
        {"kind": KFAC},
    ],
    ids=lambda options: ", ".join(map(str, options.values())) or "default",
)
@pytest.mark.parametrize("mean", [0.0, 0.5, 1.0])
def test_steps_are_longer_where_gradients_lie_along_earlier_ones(
    mean: float, options: dict[str, Any]
) -> None:
    """In any basis, refreshed in between."""
    gradients = made_gradients(mean, 25)
    weights = options.get("momentum", 0.9), options.get("nesterov", 2)
    expected = expected_lengths(gradients, *weights)
    options = {"factor_interval": 3, "basis_interval": 6, **options}
    assert lengths(gradients, **options) == pytest.approx(expected, rel=1e-6)
    plain = lengths(gradients, grafting="rms", **options)
    assert plain == pytest.approx([1.0] * 25, rel=1e-6)


def test_steps_along_one_gradient_are_as_long_as_adamws_next_to_noise() -> None:
    """AdamW's are one, and the root of their weights' squares where all is noise."""
    (first, *_) = made_gradients(0.0, 1)
    same = lengths([first] * 40, nesterov=0)
    squares = [averaging_weights(0.9, 0, t).square().sum() for t in range(1, 41)]
    assert same == pytest.approx([float(s) ** -0.5 for s in squares], rel=1e-6)
    assert same[0] == pytest.approx(1)
    weight = nn.Parameter(torch.zeros(80, 70).double())
    adamw, moved = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0), []
    for gradient in made_gradients(0.0, 4000):
        before, weight.grad = weight.detach().clone(), gradient
        adamw.step()
        moved.append(float((weight.detach() - before).square().mean().sqrt()))
    noise = sum(moved[2000:]) / 2000
    assert same[-1] == pytest.approx(1 / noise, rel=0.02)
    assert sum(lengths(made_gradients(0.0, 60))[20:]) / 40 < 1.03


def test_steps_are_never_shorter_than_the_rate() -> None:
    """Not along gradients that turn, without an average, nor of extreme size."""
    gradients = made_gradients(0.5, 12)
    turns = [sign * gradients[0] for sign in 6 * (1.0, -1.0)]
    assert lengths(turns, damping_mode="relative") == pytest.approx([1.0] * 12)
    assert lengths(gradients, momentum=0.0) == pytest.approx([1.0] * 12)
    expected = expected_lengths(gradients, 0.9, 2)
    for size in (1e-9, 1e9):
        found = lengths([size * gradient for gradient in gradients])
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("nesterov", [0, 2])
@pytest.mark.parametrize("size", [1, 8, 512])
def test_a_batch_of_another_size_is_noise_as_well(size: int, nesterov: int) -> None:
    """Its gradient has more noise by as much as the others have more examples.

    The mean over steps: a batch of one example has the noise of few products.
    """
    found = agreements(None, 90, nesterov, odd={70: size})
    assert 0.6 < found[70] < 1.6
    assert sum(found[71:80]) / 9 == pytest.approx(1, abs=0.35)
    usual = agreements(None, 90, nesterov)
    assert sum(usual[71:80]) / 9 == pytest.approx(1, abs=0.1)


def test_agreement_is_not_below_a_hundredth() -> None:
    """Long plain averages of gradients that alternate leave half of that."""
    turns = (-1.0) ** torch.arange(200)
    found = agreements(turns, 200, nesterov=0, momentum=0.99)
    assert found[-1] == 0.01


@pytest.mark.parametrize("direction", ["spectral", "natural"])
@pytest.mark.parametrize("kind", ["per_example", "kfac"])
def test_other_scalings_have_relative_damping(kind: str, direction: str) -> None:
    steps = []
    for mode in ("adaptive", "relative"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 13), nn.Tanh(), nn.Linear(13, 9)).double()
        options: dict[str, Any] = {"damping_mode": mode, "direction": direction}
        optimizer: EKFAC | KFAC = (
            KFAC(model, **options)
            if kind == "kfac"
            else EKFAC(model, scaling="per_example", **options)
        )
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(20, 12, generator=generator, dtype=torch.float64)
            y = torch.randint(9, (20,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        steps.append([p.detach().clone() for p in model.parameters()])
        assert all(layer.agreement == 1 for layer in optimizer.curvature.values())
    assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))


@pytest.mark.parametrize("direction", ["spectral", "natural"])
@pytest.mark.parametrize("rank", [None, 8])
def test_damping_is_the_option_times_mean_and_agreement(
    direction: str, rank: int | None
) -> None:
    """A relative damping of as much makes the same step."""
    steps, last = [], 1.0
    for relative in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(70, 80, bias=False).double()
        optimizer = EKFAC(layer, lr=1.0, direction=direction, rank=rank)
        for number in range(6):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(32, 70, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            layer(x).square().sum(dim=1).mean().backward()
            before = layer.weight.detach().clone()
            if relative and number == 5:
                object.__setattr__(optimizer.options, "damping_mode", "relative")
                optimizer.param_groups[0]["damping"] = 0.1 * last
            optimizer.step()
        (curvature,) = optimizer.curvature.values()
        if not relative:
            last = float(curvature.agreement)
            assert abs(last - 1) > 0.1
        steps.append(layer.weight.detach() - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-9, atol=1e-12)


def test_a_resumed_run_knows_the_noise_of_earlier_batches() -> None:
    """After a batch of another size, to the last bit."""

    def trained(model: nn.Module, optimizer: EKFAC, sizes: list[int]) -> None:
        for number, size in enumerate(sizes):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (size,), generator=generator)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()

    model = classifier()
    optimizer = EKFAC(model, lr=0.01)
    trained(model, optimizer, [32, 32, 4])
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    state = optimizer.state_dict()
    other = classifier()
    other.load_state_dict(weights)
    resumed = EKFAC(other, lr=0.01)
    trained(other, resumed, [16] * 4)  # another history, which a load replaces
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert all(layer.agreement == 1 for layer in resumed.curvature.values())
    for run in (model, optimizer), (other, resumed):
        trained(*run, [32, 8, 32])
    for found, expected in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)
    pairs = zip(optimizer.curvature.values(), resumed.curvature.values(), strict=True)
    assert all(a.agreement == b.agreement for a, b in pairs)


@pytest.mark.parametrize("where", ["everything", "one call"])
def test_levenberg_marquardt_inside_autocast(where: str) -> None:
    """What autocast keeps of weights in bfloat16 is not that of other weights."""
    ratios = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5))
        optimizer = EKFAC(model, lr=0.01)
        method = LevenbergMarquardt(optimizer, interval=1)
        x, y = torch.randn(64, 20), torch.randint(5, (64,))

        def loss(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(x)
            return cross_entropy(outputs.float(), y)

        for _ in range(4):
            everything = inside and where == "everything"
            with torch.autocast("cpu", torch.bfloat16, enabled=everything):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
                with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                    judged = method.step(loss)
            assert judged is not None
            ratios.append(judged.ratio)
    assert ratios[4:] == pytest.approx(ratios[:4], rel=0.1)
    assert all(0.3 < ratio < 1.5 for ratio in ratios)


def test_a_step_that_only_initialises_on_the_meta_device() -> None:
    model = nn.Linear(5, 3, device="meta")
    EKFAC(model, lr=0.0).step()
    assert model.weight.grad is None
