"""Spectra of Fisher matrices, against dense ones from torch.func in double precision.

The identities of Karakida et al. 2020 and of Ge 2025, sections 4.1 to 4.3.
"""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch
from support import relative_error
from test_estimate import network
from test_exactness import (
    dense_fisher,
    gaussian_fisher,
    jacobians,
    softmax_fisher,
)
from torch import Tensor, nn

import ekfac
from ekfac.diagnostics import (
    Spectrum,
    dual,
    estimated_spectrum,
    layer_spectra,
    spectrum,
    step_bound,
)
from ekfac.diagnostics.papers.karakida import (
    feature_metric,
    feature_metric_of_factors,
    softmax_bounds,
    softmax_moments,
)
from ekfac.diagnostics.tangent_kernel import eigenfunctions
from ekfac.errors import UnsupportedOperationError
from ekfac.matrices import DenseMatrix
from ekfac.vectors import ParameterVector, VectorSpace

TIGHT = 1e-10
OUTPUTS = {"gaussian": gaussian_fisher, "categorical": softmax_fisher}
mpl.use("Agg")


def perceptron(activation: type[nn.Module] = nn.Tanh) -> tuple[nn.Module, Tensor]:
    """Return a network of widths 5, 8, 8, 3 and 12 examples, C N < P."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), activation(), nn.Linear(8, 8), activation()]
    model = nn.Sequential(*layers, nn.Linear(8, 3)).double()
    return model, torch.randn(12, 5, dtype=torch.float64)


def dense(values: list[float]) -> DenseMatrix:
    diagonal = torch.diag(torch.tensor(values, dtype=torch.float64))
    return DenseMatrix(VectorSpace({"w": (len(values),)}), diagonal)


def descending(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix).flip(0)


# -- the dual --------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", OUTPUTS)
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LayerNorm", "attention", "tied"])
def test_the_dual_has_the_dense_fishers_spectrum(name, likelihood):
    model, x = network(name)
    F = dense_fisher(model, x, OUTPUTS[likelihood])
    found = dual(model, x, likelihood)
    own = found.spectrum()
    expected = descending(F)
    assert found.size == own.size == len(F)
    count = min(len(own.values), len(F))
    scale = float(expected[0])
    assert float((own.values[:count] - expected[:count]).abs().max()) < TIGHT * scale
    assert float(expected[count:].abs().sum()) < TIGHT * scale
    assert own.source == "exact"
    assert own.trace == pytest.approx(float(F.trace()), rel=TIGHT)
    total = torch.stack(list(found.layers.values())).sum(dim=0)
    assert relative_error(total, found.gram) < TIGHT


@pytest.mark.parametrize("likelihood", OUTPUTS)
def test_layers_duals_have_the_blocks_spectra(likelihood):
    model, x = perceptron()
    blocks = ekfac.fisher(model, [(x, None)], "block_diagonal", likelihood=likelihood)
    expected = layer_spectra(blocks)
    found = dual(model, x, likelihood).layer_spectra()
    assert found.keys() == expected.keys()
    whole = dual(model, x, likelihood).spectrum().maximum
    for name, own in found.items():
        assert own.size == expected[name].size
        values = expected[name].values[: len(own.values)]
        assert relative_error(own.values, values) < 1e-9
        assert expected[name].source == own.source == "exact"
    tops = [own.maximum for own in found.values()]
    assert max(tops) <= whole * (1 + TIGHT)
    assert whole <= sum(tops) * (1 + TIGHT)


def test_eigenvectors_are_those_of_the_dense_fisher():
    model, x = perceptron()
    F = dense_fisher(model, x, softmax_fisher)
    pairs = dual(model, x).top_eigenpairs(5)
    v = pairs.vectors
    assert relative_error(v.mT @ v, torch.eye(5, dtype=torch.float64)) < TIGHT
    assert relative_error(F @ v, v * pairs.values) < TIGHT
    with pytest.raises(ValueError, match="rank"):
        dual(model, x).top_eigenpairs(36)


def test_mean_gradients():
    model, x = perceptron()
    expected = jacobians(model, x).mean(dim=0).mT
    assert relative_error(dual(model, x).mean_gradients(), expected) < TIGHT


def test_mean_subtraction_is_the_fisher_of_centred_outputs():
    model, x = perceptron()
    J = jacobians(model, x)
    centred = J - J.mean(dim=0)
    F = torch.einsum("nkp,nkq->pq", centred, centred) / len(x)
    found = dual(model, x, "gaussian", mean_subtracted=True)
    values = found.spectrum().values
    assert relative_error(values, descending(F)[: len(values)]) < TIGHT
    pairs = found.top_eigenpairs(3)
    assert relative_error(F @ pairs.vectors, pairs.vectors * pairs.values) < TIGHT
    plain = dual(model, x, "gaussian").spectrum().values
    # Taking a matrix of rank C off moves eigenvalues by at most C places.
    assert plain[3] * (1 - TIGHT) <= values[0] <= plain[0]


def test_label_expectation_gauss_newton_and_dual_agree():
    model, x = perceptron()
    with torch.no_grad():
        g = model(x).softmax(dim=1)
    J = jacobians(model, x)
    scores = torch.eye(3, dtype=torch.float64).unsqueeze(0) - g.unsqueeze(
        1
    )  # [N, y, k]
    grads = torch.einsum("nyk,nkp->nyp", scores, J)
    F = torch.einsum("ny,nyp,nyq->pq", g, grads, grads) / len(x)
    values = dual(model, x).spectrum().values
    assert relative_error(values, descending(F)[: len(values)]) < TIGHT
    y = torch.zeros(len(x), dtype=torch.long)
    G = ekfac.ggn(model, [(x, y)], nn.functional.cross_entropy, "dense")
    assert relative_error(values, spectrum(G).values[: len(values)]) < TIGHT


# -- what the metrics measure ----------------------------------------------------------


def moved(model: nn.Module, scale: float) -> tuple[Tensor, nn.Module]:
    """Return a random direction of a length, and the model moved along it."""
    v = ParameterVector.from_model(model).random_like(torch.Generator().manual_seed(1))
    v = v * (scale / float(v.norm()))
    other, _ = perceptron()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += v[name]
    return v.flat(), other


def test_quadratic_forms_are_changes_of_the_outputs():
    model, x = perceptron()
    d, other = moved(model, 1e-4)
    F = ekfac.fisher(model, [(x, None)], "dense", likelihood="gaussian")
    with torch.no_grad():
        change = (other(x) - model(x)).square().sum(dim=1).mean()
    assert float(change) == pytest.approx(float(F.quadratic(d)), rel=1e-3)
    F = ekfac.fisher(model, [(x, None)], "dense")
    with torch.no_grad():
        roots = other(x).softmax(dim=1).sqrt() - model(x).softmax(dim=1).sqrt()
    change = 4 * roots.square().sum(dim=1).mean()
    assert float(change) == pytest.approx(float(F.quadratic(d)), rel=1e-3)


def test_hessian_is_the_fisher_without_residuals():
    model, x = perceptron()
    with torch.no_grad():
        y = model(x)

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (outputs - y).square().sum(dim=1).mean()

    H = ekfac.hessian(model, [(x, y)], loss, "dense", loss_reduction="mean")
    F = dense_fisher(model, x, gaussian_fisher)
    assert relative_error(H.to_dense(), F) < 1e-8


def test_eigenfunctions_are_orthonormal_on_the_examples():
    model, x = perceptron()
    pairs = dual(model, x, "gaussian").top_eigenpairs(6)
    u = eigenfunctions(pairs, ekfac.jacobian(model, x)).flatten(0, 1)
    eye = torch.eye(6, dtype=torch.float64)
    assert relative_error(u.mT @ u / len(x), eye) < TIGHT


# -- softmax bounds --------------------------------------------------------------------


def test_softmax_matrices_and_their_moments():
    g = torch.rand(7, 4, dtype=torch.float64).softmax(dim=1)
    found = softmax_moments(g)
    Q = torch.stack([torch.diag(p) - torch.outer(p, p) for p in g])
    assert float(Q.sum(dim=2).abs().max()) < 1e-14
    n = len(g)
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    beta_2 = sum(
        (g[a] * g[b]).sum() - 2 * (g[a] ** 2 * g[b]).sum() + (g[a] * g[b]).sum() ** 2
        for a, b in pairs
    )
    beta_3 = ((1 - 2 * g) * g**2).sum(dim=1) + (g**2).sum(dim=1) ** 2
    assert found.beta_1 == pytest.approx(1 - float((g**2).sum(dim=1).mean()))
    assert found.beta_2 == pytest.approx(float(beta_2) / n**2)
    assert found.beta_3 == pytest.approx(float(beta_3.mean()))
    assert found.beta_4 == pytest.approx(float((g * (1 - g)).mean(dim=0).max()))
    assert relative_error(found.mean_values, descending(Q.mean(dim=0))) < TIGHT
    assert abs(float(found.mean_values[-1])) < 1e-14
    with pytest.raises(ValueError, match="softmax"):
        softmax_moments(2 * g)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_softmax_bounds_hold_at_every_size(activation):
    model, x = perceptron(activation)
    cross, linear = dual(model, x), dual(model, x, "gaussian")
    g = cross.outputs.softmax(dim=1)
    largest = softmax_moments(g).maximum
    ours, theirs = cross.spectrum(), linear.spectrum()
    slack = TIGHT * theirs.maximum
    assert largest <= float(g.max())
    assert bool((ours.values <= largest * theirs.values + slack).all())
    found = softmax_bounds(theirs, g)
    assert ours.mean <= found.mean
    assert ours.second_moment <= found.second_moment
    assert ours.maximum <= found.upper
    assert ours.maximum <= (ours.size * ours.second_moment) ** 0.5
    assert found.source == "exact"


# -- factors ---------------------------------------------------------------------------


def test_kfac_is_exact_for_the_last_layer_and_deep_linear_networks():
    model, x = perceptron()
    linear, _ = perceptron(nn.Identity)
    for net, names in ((model, ["4"]), (linear, ["0", "2", "4"])):
        exact = ekfac.fisher(net, [(x, None)], "block_diagonal", likelihood="gaussian")
        kfac = ekfac.fisher(net, [(x, None)], "kfac", likelihood="gaussian")
        for name in names:
            a, b = kfac.blocks[name].to_dense(), exact.blocks[name].to_dense()
            assert relative_error(a, b) < TIGHT


@pytest.mark.parametrize("likelihood", OUTPUTS)
def test_what_ekfac_keeps_of_a_block(likelihood):
    model, x = perceptron()
    data = [(x, None)]
    exact = ekfac.fisher(model, data, "block_diagonal", likelihood=likelihood)
    matrices = {
        s: ekfac.fisher(model, data, s, likelihood=likelihood)
        for s in ("ekfac", "kfac")
    }
    spectra = layer_spectra(matrices["ekfac"])
    for name, block in layer_spectra(exact).items():
        own = spectra[name]
        assert own.source == "factors"
        assert own.trace == pytest.approx(block.trace, rel=TIGHT)
        assert own.maximum <= block.maximum * (1 + TIGHT)
        assert own.second_moment <= block.second_moment * (1 + TIGHT)
        F = exact.blocks[name].to_dense()
        errors = {
            s: float((m.blocks[name].to_dense() - F).norm())
            for s, m in matrices.items()
        }
        size = float(F.norm())
        assert errors["ekfac"] <= errors["kfac"] + TIGHT * size
        expected = size**2 - own.frobenius_norm**2
        assert errors["ekfac"] ** 2 == pytest.approx(expected, abs=TIGHT * size**2)
    whole = spectrum(matrices["ekfac"])
    assert whole.source == "factors"
    assert whole.maximum <= dual(model, x, likelihood).spectrum().maximum


def test_spectra_say_where_they_come_from():
    model, x = perceptron()
    data = [(x, None)]
    sources = {
        "dense": "exact",
        "low_rank": "exact",
        "block_diagonal": "approximation",
        "diagonal": "approximation",
        "quasi_diagonal": "approximation",
        "kfac": "factors",
        "ekfac": "factors",
    }
    for structure, source in sources.items():
        assert spectrum(ekfac.fisher(model, data, structure)).source == source
    with pytest.raises(UnsupportedOperationError, match="dual"):
        spectrum(ekfac.fisher(model, data, "implicit"))
    with pytest.raises(UnsupportedOperationError, match="layer_spectra"):
        layer_spectra(ekfac.fisher(model, data, "dense"))


def test_step_bounds_enclose_the_limit():
    model, x = perceptron()
    data = [(x, None)]
    limit = 2 / spectrum(ekfac.fisher(model, data, "dense")).maximum
    blocks = step_bound(ekfac.fisher(model, data, "block_diagonal"))
    assert blocks.safe <= limit <= blocks.critical
    assert blocks.source == "exact"
    for structure in ("ekfac", "kfac", "diagonal"):
        F = ekfac.fisher(model, data, structure)
        found = step_bound(spectrum(F) if structure == "diagonal" else F)
        assert found.safe is found.critical is None, "nothing proven"
        assert found.estimate > 0
    dense = step_bound(ekfac.fisher(model, data, "dense"))
    assert dense.safe == dense.critical == pytest.approx(limit, rel=TIGHT)
    with pytest.raises(UnsupportedOperationError, match="dual"):
        step_bound(ekfac.fisher(model, data, "implicit"))
    estimated = step_bound(estimated_spectrum(ekfac.fisher(model, data, "dense"), 1))
    assert estimated.safe is None
    assert estimated.estimate == pytest.approx(limit, rel=1e-4)
    assert step_bound(dual(model, x)).safe == pytest.approx(limit, rel=TIGHT)
    whole = step_bound(dual(model, x).spectrum())
    assert whole.safe == whole.critical == pytest.approx(limit, rel=TIGHT)


def test_gradient_descent_on_the_linearised_loss_turns_at_the_bound():
    model, x = perceptron()
    F = ekfac.fisher(model, [(x, None)], "dense", likelihood="gaussian").to_dense()
    limit = step_bound(dual(model, x, "gaussian").spectrum()).critical
    top = torch.linalg.eigh(F).eigenvectors[:, -1]
    start = F @ torch.randn(len(F), dtype=torch.float64) + top
    for factor, converges in ((0.99, True), (1.01, False)):
        d = start.clone()
        for _ in range(2000):
            d = d - factor * limit * (F @ d)
        assert (float(top @ d) ** 2 < float(top @ start) ** 2) == converges


@pytest.mark.parametrize("seed", range(5))
def test_gradient_descent_at_the_safe_step_converges(seed):
    """On the quadratic model, from exact blocks; at EKFAC's estimate it may not."""
    torch.manual_seed(seed)
    width = 4 + 3 * seed
    model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)).double()
    data = [(torch.randn(12, 5, dtype=torch.float64), None)]
    F = ekfac.fisher(model, data, "dense").to_dense()
    bound = step_bound(ekfac.fisher(model, data, "block_diagonal"))
    start = F @ torch.randn(len(F), dtype=torch.float64)
    norms = {}
    for lr in (bound.safe, 1.01 * bound.critical):
        d = start.clone()
        for _ in range(500):
            d = d - lr * (F @ d)
        norms[lr] = float(d @ F @ d)
    assert norms[bound.safe] < float(start @ F @ start)
    assert norms[1.01 * bound.critical] > float(start @ F @ start)


def test_no_step_is_safe_where_curvature_is_negative():
    with pytest.raises(ValueError, match="step_bound"):
        step_bound(Spectrum(torch.tensor([1.0, -0.5]), 2, "exact"))


# -- statistics ------------------------------------------------------------------------


def test_statistics_are_their_definitions():
    values = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    own = Spectrum(values, 10, "exact")
    assert own.maximum == 4
    assert own.mean == pytest.approx(0.8)
    assert own.second_moment == pytest.approx(2.2)
    assert own.frobenius_norm == pytest.approx(22**0.5)
    assert own.rank == 4
    assert [own.trace_ratio(k) for k in (1, 2, 4, 9)] == [0.5, 0.75, 1, 1]
    shares = values / 8
    entropy = -(shares * shares.log()).sum()
    assert own.effective_rank == pytest.approx(float(entropy.exp()))
    assert own.effective_dimension(1.0) == pytest.approx(4 / 5 + 2 / 3 + 0.5 + 0.5)
    assert own.condition() == float("inf")
    assert own.condition(1.0) == pytest.approx(5)
    assert Spectrum(values, 4, "exact").condition() == 4
    assert Spectrum(values, 4, "exact").condition(1.0) == 2.5
    assert own.share_below(1.5) == pytest.approx(0.8)
    assert Spectrum(values, 4, "exact").share_below(1.5) == 0.5
    assert own.without(1).maximum == 2
    assert "exact" in str(own)
    equal = Spectrum(torch.ones(7, dtype=torch.float64), 7, "exact")
    assert equal.effective_rank == pytest.approx(7)
    tiny = Spectrum(torch.tensor([100.0, 1e-45]), 2, "factors")
    assert tiny.effective_rank == 1  # the share of the second is zero in float32


def test_trace_ratios_ignore_the_outputs_scale():
    model, x = perceptron()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.inner(x)

    one = dual(model, x, "gaussian").spectrum()
    two = dual(Scaled(), x, "gaussian").spectrum()
    assert relative_error(two.values, 9 * one.values) < 1e-9
    for k in (1, 5, 36):
        assert two.trace_ratio(k) == pytest.approx(one.trace_ratio(k), rel=1e-9)
    ratios = [one.trace_ratio(k) for k in range(1, 37)]
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1)


def test_what_a_hessian_has_no_share_of():
    own = spectrum(dense([3.0, -1.0]))
    assert own.maximum == 3
    for call in (
        lambda: own.effective_rank,
        lambda: own.trace_ratio(1),
        lambda: own.effective_dimension(1.0),
        lambda: own.condition(1.0),
    ):
        with pytest.raises(ValueError, match="negative"):
            call()
    positive = spectrum(dense([3.0, 1.0]))
    with pytest.raises(ValueError, match="at least 1"):
        positive.trace_ratio(0)
    with pytest.raises(ValueError, match="must be positive"):
        positive.effective_dimension(0.0)
    with pytest.raises(ValueError, match="at least 0"):
        positive.condition(-1.0)


def test_lanczos_estimates_what_the_dual_knows():
    model, x = perceptron()
    exact = dual(model, x).spectrum()
    F = ekfac.fisher(model, [(x, None)], "implicit")
    generator = torch.Generator().manual_seed(0)
    found = estimated_spectrum(F, 5, num_steps=30, generator=generator)
    assert relative_error(found.top.values, exact.values[:5]) < 1e-8
    assert found.maximum == pytest.approx(exact.maximum)
    for estimate, value in (
        (found.mean, exact.mean),
        (found.second_moment, exact.second_moment),
        (found.trace_ratio(5), exact.trace_ratio(5)),
        (found.effective_dimension(0.1), exact.effective_dimension(0.1)),
    ):
        assert float(estimate) == pytest.approx(value, rel=0.5)
        error = abs(float(estimate) - value)
        assert error < 4 * float(estimate.standard_error)
    assert found.size == exact.size
    with pytest.raises(ValueError, match="between 1 and 5"):
        found.trace_ratio(6)
    with pytest.raises(ValueError, match="must be positive"):
        found.effective_dimension(0.0)


def test_figures():
    model, x = perceptron()
    axes = dual(model, x).spectrum().plot(label="whole")
    assert axes.get_legend_handles_labels()[1] == ["whole"]
    own = spectrum(ekfac.fisher(model, [(x, None)], "ekfac")).plot(axes)
    assert own is axes
    assert axes.get_legend_handles_labels()[1] == ["whole", "factors"]
    F = ekfac.fisher(model, [(x, None)], "implicit")
    density = estimated_spectrum(F, 2, num_probes=2, num_steps=10).plot()
    assert len(density.lines) == 3
    mpl.pyplot.close("all")


# -- the metric of inputs and features -------------------------------------------------


def feature_jacobian(model: nn.Sequential, x: Tensor) -> Tensor:
    """Return ``[N, C, sum d]``: the outputs by the inputs of every linear layer."""
    rows = []
    for one in x:
        h, parts = one, []
        for i, layer in enumerate(model):
            if isinstance(layer, nn.Linear):
                rest = model[i:]
                parts.append(torch.autograd.functional.jacobian(rest, h))
            h = layer(h).detach()
        rows.append(torch.cat(parts, dim=1))
    return torch.stack(rows)


@pytest.mark.parametrize("likelihood", OUTPUTS)
def test_feature_metric(likelihood):
    model, x = perceptron()
    J = feature_jacobian(model, x)
    with torch.no_grad():
        Q = torch.stack([OUTPUTS[likelihood](f) for f in model(x)])
    A = torch.einsum("nkp,nkl,nlq->pq", J, Q, J) / len(x)
    found = feature_metric(model, x, likelihood)
    own = found.spectrum()
    assert own.size == len(A) == 21
    assert relative_error(own.values, descending(A)) < TIGHT
    kfac = ekfac.fisher(model, [(x, None)], "kfac", likelihood=likelihood)
    factors = feature_metric_of_factors(model, kfac)
    for i, name in enumerate(("0", "2", "4")):
        rows = slice((0, 5, 13)[i], (5, 13, 21)[i])
        assert relative_error(found.blocks[name][0], A[rows, rows]) < TIGHT
        assert relative_error(factors.blocks[name][0], A[rows, rows]) < TIGHT
    assert (found.source, factors.source) == ("exact", "factors")
    spectra = found.layer_spectra()
    assert spectra["0"].maximum == pytest.approx(float(descending(A[:5, :5])[0]))
    with pytest.raises(UnsupportedOperationError, match="layer_spectra"):
        factors.spectrum()


@pytest.mark.parametrize("name", ["Conv2d", "Conv2d groups", "Linear, positions"])
def test_feature_metric_of_layers_with_positions(name):
    """The blocks are ``W^T G W`` of the factors, whose ``G`` sums over positions."""
    model, x = network(name)
    layers = [n for n, m in model.named_modules() if hasattr(m, "bias") and len(n) < 3]
    kfac = ekfac.fisher(model, [(x, None)], "kfac", parameters=layers)
    found = feature_metric(model, x)
    factors = feature_metric_of_factors(model, kfac)
    assert found.blocks.keys() == factors.blocks.keys()
    for key, block in found.blocks.items():
        assert relative_error(factors.blocks[key], block) < TIGHT
    kept = ekfac.fisher(model, [(x, None)], "ekfac", parameters=layers)
    with pytest.raises(UnsupportedOperationError, match="kfac"):
        feature_metric_of_factors(model, kept)
