"""Order parameters: quadrature against closed forms, measurements against loops."""

from __future__ import annotations

import math

import matplotlib as mpl
import pytest
import torch
from random_networks import LINEAR, RELU, TANH, UNBIASED, Kind, draw, theory
from torch import Tensor, nn

import ekfac
from ekfac.diagnostics.papers.karakida import (
    derivative,
    expectation,
    feature_metric,
    mean_field_theory,
    order_parameters,
    order_parameters_of_factors,
    product_expectation,
    softmax_moments,
    softmax_prediction,
)
from ekfac.errors import UnsupportedOperationError

mpl.use("Agg")


# -- expectations ----------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.0, 1e-4, 0.3, 1.0, 3.7, 40.0])
def test_moments_of_a_gaussian(variance):
    assert expectation(torch.ones_like, variance) == pytest.approx(1, abs=1e-12)
    assert expectation(torch.square, variance) == pytest.approx(variance, rel=1e-11)
    fourth = expectation(lambda u: u**4, variance)
    assert fourth == pytest.approx(3 * variance**2, rel=1e-11)
    cosine = expectation(torch.cos, variance)
    assert cosine == pytest.approx(math.exp(-variance / 2), abs=1e-11)


@pytest.mark.parametrize("share", [0.0, 1e-3, 0.2, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("variance", [0.04, 1.0, 3.64])
def test_closed_forms_of_two_gaussians(variance, share):
    b, c = share * variance, share
    relu = variance / (2 * math.pi)
    relu *= math.sqrt(1 - c**2) + c * (math.pi / 2 + math.asin(c))
    step = (math.pi / 2 + math.asin(c)) / (2 * math.pi)
    erf = 2 / math.pi * math.asin(b / (0.5 + variance))
    found = {
        "relu": product_expectation(torch.relu, variance, b),
        "step": product_expectation(derivative(torch.relu), variance, b),
        "erf": product_expectation(torch.erf, variance, b),
        "linear": product_expectation(lambda u: u, variance, b),
        "sine": product_expectation(torch.sin, variance, b),
    }
    assert found["relu"] == pytest.approx(relu, rel=1e-10)
    assert found["step"] == pytest.approx(step, rel=1e-9)
    assert found["erf"] == pytest.approx(erf, abs=1e-11)
    assert found["linear"] == pytest.approx(b, abs=1e-11)
    sine = (math.exp(b - variance) - math.exp(-b - variance)) / 2
    assert found["sine"] == pytest.approx(sine, abs=1e-11)


def test_a_covariance_that_no_pair_has():
    with pytest.raises(ValueError, match="between 0 and the variance"):
        product_expectation(torch.tanh, 1.0, 1.1)
    with pytest.raises(ValueError, match="between 0 and the variance"):
        product_expectation(torch.tanh, 1.0, -0.1)


# -- the recursions --------------------------------------------------------------------


# Forward and backward parameters and the kappas that two independent implementations
# of the recursions gave (Gauss-Hermite with 161 nodes, a trapezoid of 4001 points).
TABLE = {
    "tanh": (
        TANH,
        (
            0.620601,
            0.558945,
            0.092454,
            0.180951,
            0.762268,
            0.950419,
            0.265714,
            0.608737,
        ),
        (0.955522, 0.118615, 3.734626, 0.955670, 2.712688, 1.874451),
    ),
    "ReLU": (
        RELU,
        (1.05, 1.10, 0.359604, 0.579511, 1, 1, 0.320150, 0.621454),
        (1.575, 0.401494, 3.3, 0.900069, 2, 1.294403),
    ),
    "linear": (
        LINEAR,
        (1.1, 1.2, 0.1, 0.2, 1, 1, 1, 1),
        (1.65, 0.15, 1.8, 0.3, 1, 1),
    ),
    "ReLU unbiased": (
        UNBIASED,
        (1, 1, 0.318310, 0.493731, 1, 1, 0.301558, 0.603115),
        (1.5, 0.342854, 3.0, 0.685709, 2, 1.269782),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_recursions(name):
    kind, parameters, kappas = TABLE[name]
    found = theory(kind, 100, 1)
    order = (
        *found.forward_1[1:],
        *found.forward_2[1:],
        *found.backward_1[:2],
        *found.backward_2[:2],
    )
    assert order == pytest.approx(parameters, abs=2e-6)
    alpha, total = 2, 3  # of equal widths, relative to M
    feature = found.weight_variance / total
    assert (
        found.kappa(1) / (alpha * 100),
        found.kappa(2) / (alpha * 100),
        found.kernel_kappa(1) / alpha,
        found.kernel_kappa(2) / alpha,
        feature * sum(found.backward_1),
        feature * sum(found.backward_2),
    ) == pytest.approx(kappas, abs=3e-6)


@pytest.mark.parametrize("kind", [TANH, RELU, LINEAR])
def test_the_layers_maxima_sum_to_the_wholes(kind):
    found = theory(kind, 200, 10)
    for n in (1, 100):
        total = sum(found.layer(i, n).maximum for i in (1, 2, 3))
        assert total == pytest.approx(found.fisher(n).maximum, rel=1e-12)


def test_reference_values_of_the_figures():
    """Of Karakida et al. 2020, Figures 3 and 7, from the formulas."""
    found = theory(TANH, 200, 10)
    assert found.fisher(100).maximum == pytest.approx(50.794, abs=1e-3)
    assert found.layer(2, 100).maximum == pytest.approx(12.323, abs=1e-3)
    assert found.layer(3, 100).maximum == pytest.approx(36.946, abs=1e-3)
    metric = theory(TANH, 500, 10)
    assert metric.feature_metric(1000).mean == pytest.approx(0.05425, abs=1e-5)
    assert metric.feature_metric(1000).maximum == pytest.approx(5.626, abs=1e-3)
    assert metric.layer_metric(0, 1000).mean == pytest.approx(0.04574, abs=1e-5)
    assert metric.layer_metric(0, 1000).maximum == pytest.approx(0.7986, abs=1e-4)
    kernel = theory(UNBIASED, 1000, 2)
    assert kernel.kernel(100).maximum / 100 == pytest.approx(1.4177, abs=1e-4)
    assert kernel.kernel(1000).maximum / 1000 == pytest.approx(1.3760, abs=1e-4)


def test_every_layer_may_have_its_activation():
    mixed = mean_field_theory(
        [torch.tanh, torch.relu], [9, 9, 9, 1], weight_variance=2.0, bias_variance=0.3
    )
    tanh = mean_field_theory(
        torch.tanh, [9, 9, 1], weight_variance=2.0, bias_variance=0.3
    )
    assert mixed.forward_1[:2] == tanh.forward_1
    a = 2 * mixed.forward_1[1] + 0.3
    assert mixed.forward_1[2] == pytest.approx(a / 2)
    assert mixed.backward_1[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="as many activations"):
        mean_field_theory(
            [torch.tanh], [9, 9, 9, 1], weight_variance=2.0, bias_variance=0.3
        )
    with pytest.raises(ValueError, match="inputs and outputs"):
        mean_field_theory(torch.tanh, [9], weight_variance=2.0, bias_variance=0.3)
    with pytest.raises(ValueError, match="need as many activations, got 0"):
        mean_field_theory([], [9, 9, 9], weight_variance=2.0, bias_variance=0.3)
    with pytest.raises(ValueError, match="1 or 2"):
        tanh.kappa(3)
    last = tanh.depth
    for statistics, first in ((tanh.layer, 1), (tanh.layer_metric, 0)):
        for layer in (first - 1, first + last):
            with pytest.raises(ValueError, match=f"from {first} to .*got {layer}"):
                statistics(layer, 10)
    with pytest.raises(ValueError, match="got 0"):
        tanh.kernel_element(1, 0)


# -- measured --------------------------------------------------------------------------


def by_loops(model: nn.Sequential, x: Tensor) -> dict[str, dict[str, float]]:
    """Return the order parameters by their definitions."""
    N = len(x)
    found: dict[str, dict[str, float]] = {k: {} for k in ("f1", "f2", "b1", "b2")}
    for i, layer in enumerate(model):
        if not isinstance(layer, nn.Linear):
            continue
        h = model[:i](x).detach()
        u = layer(h).detach()
        delta = torch.stack(
            [torch.autograd.functional.jacobian(model[i + 1 :], one) for one in u]
        )  # [N, C, d]
        pairs = [(n, m) for n in range(N) for m in range(N) if n != m]
        d, C = h.shape[1], delta.shape[1]
        name = str(i)
        found["f1"][name] = float((h * h).sum()) / (N * d)
        found["f2"][name] = sum(float(h[n] @ h[m]) for n, m in pairs) / len(pairs) / d
        found["b1"][name] = float((delta**2).sum()) / (N * C)
        overlap = sum(float((delta[n] * delta[m]).sum()) for n, m in pairs)
        found["b2"][name] = overlap / len(pairs) / C
    return found


def test_measured_order_parameters_are_their_definitions():
    model, x = draw(TANH, 6, 3, 5, 0)
    model, x = model.double(), x.double()
    expected, found = by_loops(model, x), order_parameters(model, x)
    for key, values in (
        ("f1", found.forward_1),
        ("f2", found.forward_2),
        ("b1", found.backward_1),
        ("b2", found.backward_2),
    ):
        assert values == pytest.approx(expected[key], rel=1e-10)
    assert found.source == "exact"
    with pytest.raises(ValueError, match="two examples"):
        order_parameters(model, x[:1])


def test_what_the_factors_hold_of_them():
    model, x = draw(TANH, 6, 3, 5, 0)
    model, x = model.double(), x.double()
    exact = order_parameters(model, x)
    data = [(x, None)]
    F = ekfac.fisher(model, data, "kfac", "l2")
    found = order_parameters_of_factors(F, num_examples=5, num_outputs=3)
    assert found.source == "factors"
    assert found.forward_1 == pytest.approx(exact.forward_1, rel=1e-10)
    assert found.forward_2 == pytest.approx(exact.forward_2, rel=1e-9)
    assert found.backward_1 == pytest.approx(exact.backward_1, rel=1e-10)
    assert found.backward_2 == {}
    with pytest.raises(UnsupportedOperationError, match="kfac"):
        order_parameters_of_factors(
            ekfac.fisher(model, data, "ekfac", "l2"), num_examples=5, num_outputs=3
        )
    axes = exact.plot(theory=theory(TANH, 6, 3))
    assert len(axes.lines) == 8
    mpl.pyplot.close("all")


def test_softmax_prediction_is_the_theorem():
    found = theory(TANH, 100, 4)
    g = torch.rand(30, 4, dtype=torch.float64).softmax(dim=1)
    moments, n, P = softmax_moments(g), 30, found.num_parameters
    predicted = softmax_prediction(found, g)
    one, two = found.kappa(1), found.kappa(2)
    assert P == 2 * 100 * 101 + 4 * 101
    assert predicted.mean == pytest.approx(moments.beta_1 * one / P)
    second = (moments.beta_2 * two**2 + moments.beta_3 * one**2 / n) / P
    assert predicted.second_moment == pytest.approx(second)
    assert predicted.upper == pytest.approx((P * second) ** 0.5)
    largest = ((n - 1) * two + one) / n
    assert predicted.lower == pytest.approx(moments.beta_4 * largest)
    assert predicted.outliers.tolist() == pytest.approx(
        (moments.mean_values[:3] * largest).tolist()
    )


@pytest.mark.parametrize("kind", [TANH, RELU])
def test_wide_networks_have_the_predicted_order_parameters(kind: Kind):
    predicted = theory(kind, 1000, 2)
    found = [
        order_parameters(*draw(kind, 1000, 2, 50, seed)) for seed in range(100, 105)
    ]
    for name, tolerance in (
        ("forward_1", 0.05),
        ("forward_2", 0.05),
        ("backward_1", 0.05),
        ("backward_2", 0.10),
    ):
        for i, layer in enumerate(("0", "2", "4")):
            mean = sum(getattr(one, name)[layer] for one in found) / len(found)
            expected = getattr(predicted, name)[i]
            assert mean == pytest.approx(expected, rel=tolerance, abs=0.005)


def test_feature_metric_of_the_factors_is_softmaxed_too():
    """Figure 7(b) from the factors: ``A^00 = W^T G W`` with the softmax ``G``."""
    model, x = draw(TANH, 20, 3, 30, 0)
    F = ekfac.fisher(model, [(x, None)], "kfac")
    exact = feature_metric(model, x).layer_spectra()["0"].maximum
    weight = model[0].weight.detach()
    G = F.blocks["0"].factor("G")[0]
    own = float(torch.linalg.eigvalsh(weight.mT @ G @ weight)[-1])
    assert own == pytest.approx(exact, rel=1e-4)
