"""Hessian directions against dense matrices, and the identities of Haink (2023)."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import ekfac
from ekfac import diagnostics as d
from ekfac.diagnostics.hessian import (
    as_matrix,
    layer_directions,
    loss_scaling,
)
from ekfac.diagnostics.hessian.landscape import with_parameters
from ekfac.diagnostics.spectra import null_space
from ekfac.errors import StateMismatchError
from ekfac.matrices import DenseMatrix
from ekfac.spectral import Eigenpairs
from ekfac.vectors import ParameterVector, VectorSpace

pytestmark = pytest.mark.usefixtures("float64")


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


def problem(n: int = 17) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A ReLU classifier, weights scaled so that its outputs differ, uneven batches."""
    model = mlp(6, 5, 4, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    x, y = torch.randn(n, 6), torch.randint(3, (n,))
    return model, [(x[:10], y[:10]), (x[10:], y[10:])]


def whole(data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def dense_hessian(model, data, penalty=0.0) -> Tensor:
    """The Hessian by torch, in the flat order of the parameters."""
    x, y = whole(data)
    space = VectorSpace.of(ParameterVector.from_model(model))

    def loss(flat: Tensor) -> Tensor:
        outputs = functional_call(model, dict(space.vector(flat)), (x,))
        return cross_entropy(outputs, y) + penalty * flat.square().sum()

    flat = ParameterVector.from_model(model).flat()
    return torch.autograd.functional.hessian(loss, flat)


def test_products_are_those_of_the_dense_hessian():
    model, data = problem()
    H = d.HessianProducts(model, data, cross_entropy)
    expected = dense_hessian(model, data)
    columns = torch.randn(H.shape[0], 3)
    assert relative_error(H @ columns, expected @ columns) < 1e-12
    assert H.num_products == 3
    x, y = whole(data)
    grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
    flat = torch.cat([g.flatten() for g in grads])
    assert relative_error(H.gradient(), flat) < 1e-12


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1),
        lambda: nn.Conv2d(2, 4, 3, padding=(1, 0), groups=2, bias=False),
        lambda: nn.Conv2d(2, 2, 2, dilation=2, padding="same"),
        lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="circular"),
        lambda: nn.ConvTranspose2d(2, 2, 2, stride=2),
    ],
    ids=["strided", "grouped", "string", "circular", "transposed"],
)
@pytest.mark.parametrize("part", [None, ["0"], ["2"]], ids=["all", "first", "second"])
def test_products_of_convolutions(layer, part):
    """Two in a row, so that the second's input and weight both have tangents."""
    second = nn.Conv2d(layer().out_channels, 2, 2, padding=1)
    model = nn.Sequential(layer(), nn.Tanh(), second, nn.Tanh(), nn.Flatten())
    x = torch.randn(5, 2, 4, 4)
    model.append(nn.Linear(model(x).shape[1], 3))
    data = [(x[:2], torch.tensor([0, 2])), (x[2:], torch.tensor([1, 1, 0]))]
    found = d.HessianProducts(model, data, cross_entropy, parameters=part)
    dense = ekfac.hessian(model, data, cross_entropy, "dense", parameters=part)
    v = torch.randn(found.shape[0], 2)
    assert relative_error(found @ v, dense.to_dense() @ v) < 1e-12


def test_products_of_sequences():
    layers = [nn.Conv1d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)]
    model = nn.Sequential(*layers)
    data = [(torch.randn(4, 2, 3), torch.tensor([0, 1, 2, 0]))]
    found = d.HessianProducts(model, data, cross_entropy)
    v = torch.randn(found.shape[0], 1)
    assert relative_error(found @ v, dense_hessian(model, data) @ v) < 1e-12


def test_a_sum_is_averaged_and_the_mode_is_left():
    model, data = problem()
    model.insert(2, nn.Dropout(0.5))
    model.train()
    total = nn.CrossEntropyLoss(reduction="sum")
    H = d.HessianProducts(model, data, total)
    assert model.training
    expected = dense_hessian(copy.deepcopy(model).eval(), data)
    v = torch.randn(H.shape[0], 1)
    assert relative_error(H @ v, expected @ v) < 1e-12


def test_products_refuse_changed_parameters():
    model, data = problem()
    H = d.HessianProducts(model, data, cross_entropy)
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[2].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        H @ torch.randn(H.shape[0], 1)


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("parameters", [None, ["2"]])
def test_top_directions_are_those_of_the_dense_hessian(method, parameters, generator):
    model, data = problem()
    found = d.top_directions(
        model,
        data,
        cross_entropy,
        4,
        method=method,
        parameters=parameters,
        tolerance=1e-9,
        generator=generator,
    )
    H = dense_hessian(model, data)
    if parameters:
        H = H[35:59, 35:59]
    values, vectors = (t.flip(-1) for t in torch.linalg.eigh(H))
    assert found.converged
    assert relative_error(found.value, values[:4]) < 1e-12
    eye = torch.eye(4)
    assert relative_error(found.vectors.mT @ found.vectors, eye) < 1e-10
    cosines = d.overlap(found.vectors, vectors[:, :4]).value
    assert relative_error(cosines, eye) < 1e-6
    residuals = (H @ found.vectors - found.vectors * found.value).norm(dim=0)
    assert bool((residuals <= 1.5e-9 * values[0]).all())
    total = float(residuals.norm())  # of all together: each holds a share of the check
    assert total / 3 <= float(found.residual.norm()) + 1e-12 <= 3 * total + 2e-11
    first = found.vector(0)
    assert list(first) == list(found.space.names)


def test_preconditioned_search_and_its_errors(generator):
    model, data = problem()
    F = ekfac.fisher(model, data, "ekfac")
    found = d.top_directions(
        model,
        data,
        cross_entropy,
        2,
        method="lobpcg",
        preconditioner=lambda r: F.solve(r, 1.0),
        tolerance=1e-8,
        generator=generator,
    )
    expected = torch.linalg.eigvalsh(dense_hessian(model, data)).flip(0)[:2]
    assert relative_error(found.value, expected) < 1e-10
    with pytest.raises(ValueError, match="lobpcg"):
        d.top_directions(model, data, cross_entropy, preconditioner=lambda r: r)
    with pytest.raises(ValueError, match="'power'"):
        d.top_directions(model, data, cross_entropy, method="power")
    with pytest.raises(ValueError, match="between 1 and 74"):
        d.top_directions(model, data, cross_entropy, 75)


def test_a_budget_that_is_too_small_says_so(generator):
    model, data = problem()
    found = d.top_directions(
        model, data, cross_entropy, 3, max_products=4, generator=generator
    )
    assert not found.converged
    assert found.num_products == 5  # one to check the residuals


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("order", ["largest", "smallest", "magnitude", "both"])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_ends_of_the_spectrum(method, order, k, generator):
    model, data = problem()
    H = dense_hessian(model, data)
    values, vectors = torch.linalg.eigh(H)
    best = {
        "largest": list(range(-1, -k - 1, -1)),
        "smallest": list(range(k)),
        "magnitude": values.abs().argsort(descending=True)[:k].tolist(),
        "both": ends(k),
    }[order]
    found = d.top_directions(
        model,
        data,
        cross_entropy,
        k,
        method=method,
        order=order,
        tolerance=1e-9,
        max_products=2000,
        generator=generator,
    )
    assert found.converged
    assert relative_error(found.value, values[best]) < 1e-8
    cosines = (found.vectors * vectors[:, best]).sum(dim=0).abs()
    assert float(cosines.min()) > 1 - 1e-6


def ends(k):
    """Return indices of half of ``k`` from each end, descending."""
    top = [-1 - i for i in range((k + 1) // 2)]
    return top + [k // 2 - 1 - i for i in range(k // 2)]


def test_an_unknown_end_is_refused():
    model, data = problem()
    with pytest.raises(ValueError, match="order must be one of"):
        d.top_directions(model, data, cross_entropy, 1, order="value")


def test_all_directions_of_a_layer_without_gap():
    """The process breaks down on the null space and goes on from a new vector."""
    model, data = problem(3)
    found = layer_directions(model, data, cross_entropy, 30, layers=["0", "4"])
    assert list(found) == ["0", "4"]
    H = dense_hessian(model, data)
    first, last = (torch.linalg.eigvalsh(b).flip(0) for b in (H[:35, :35], H[59:, 59:]))
    assert relative_error(found["0"].value, first[:30]) < 1e-8
    assert relative_error(found["4"].value, last) < 1e-8  # all fifteen


def test_layers_of_relu_classifiers_have_the_fishers_blocks():
    """Haink 3A.1: piecewise linear in one layer's parameters."""
    model, data = problem()
    H = dense_hessian(model, data)
    fisher = ekfac.fisher(model, data, "dense").to_dense()
    for part in (slice(0, 35), slice(35, 59), slice(59, 74)):
        block = H[part, part]
        assert float((block - fisher[part, part]).abs().max()) < 1e-14
        assert float(torch.linalg.eigvalsh(block)[0]) > -1e-14
    assert float((H - fisher).abs().max()) > 1e-3  # between layers they differ
    curved = mlp(6, 5, 4, 3, activation=nn.Tanh)
    part = slice(0, 35)
    difference = dense_hessian(curved, data)[part, part]
    difference = difference - ekfac.fisher(curved, data, "dense").to_dense()[part, part]
    assert float(difference.abs().max()) > 1e-4


def test_scalings_are_the_diagonal_of_the_layers_hessian():
    """Haink 3A.2: in the Kronecker eigenbasis, with the trace."""
    model, data = problem()
    H = dense_hessian(model, data)
    for name, part in (("0", slice(0, 35)), ("2", slice(35, 59)), ("4", slice(59, 74))):
        F = ekfac.fisher(model, data, "ekfac", parameters=[name])
        pairs = F.top_eigenpairs(F.size)
        block = H[part, part]
        inside = (pairs.vectors * (block @ pairs.vectors)).sum(dim=0)
        assert relative_error(pairs.values, inside) < 1e-10
        assert float(pairs.values.sum()) == pytest.approx(float(block.trace()))


def test_a_penalty_shifts_every_eigenvalue():
    """Haink 3A.4: by 2 lambda, with the same eigenvectors."""
    model, data = problem()
    penalty = 0.05

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        squares = sum(p.square().sum() for p in model.parameters())
        return cross_entropy(outputs, y) + penalty * squares

    plain = d.top_directions(model, data, cross_entropy, 3, tolerance=1e-10)
    shifted = d.top_directions(model, data, loss, 3, tolerance=1e-10)
    assert relative_error(shifted.value, plain.value + 2 * penalty) < 1e-10
    same = d.overlap(plain.vectors, shifted.vectors).value
    assert relative_error(same, torch.eye(3)) < 1e-6


@pytest.fixture
def everything():
    model, data = problem()
    H = ekfac.hessian(model, data, cross_entropy, "dense")
    return model, data, d.Directions.of_matrix(H, order="magnitude", cut=0)


def test_a_whole_basis(everything):
    """Haink 3A.3: squares sum to one over directions and over layers."""
    model, data, found = everything
    values = found.value
    assert bool((values.abs().diff() <= 1e-12).all())
    expected = torch.linalg.eigvalsh(dense_hessian(model, data))
    assert relative_error(values.sort().values, expected) < 1e-10
    weights = ParameterVector.from_model(model)
    product = d.weight_product(found, weights)
    inside = ~null_space(values)
    assert 0 < int(inside.sum()) <= len(values)
    null = found.vectors[:, ~inside].mT @ found.space.flat(weights)
    assert product.outside == pytest.approx(
        float((null / weights.norm()).square().sum())
    )
    assert float(product.value.square().sum()) + product.outside == pytest.approx(1)
    shares = d.layer_shares(found)
    assert shares.names == ("0", "2", "4")
    assert relative_error(shares.value.sum(dim=1), inside[inside].double()) < 1e-12
    assert relative_error(shares.null.double(), torch.tensor([35, 24, 15]) / 74) < 1e-6
    direct = found.vectors[:35, inside].square().sum(dim=0)
    assert relative_error(shares.value[:, 0], direct) < 1e-12
    spread = d.concentration(found.vectors).participation
    assert float(spread.min()) >= 1 / 74 - 1e-12
    assert float(spread.max()) <= 1 + 1e-12


def test_statistics_do_not_depend_on_the_basis_of_the_null_space(generator):
    """Two equal Hessians whose null spaces an eigensolver fills differently."""
    turn = torch.linalg.qr(torch.randn(80, 80, generator=generator)).Q
    values = torch.cat([torch.rand(30, generator=generator) + 0.1, torch.zeros(50)])
    values[30:] = 1e-16 * torch.randn(50, generator=generator)
    mixed = turn.clone()
    mixed[:, 30:] = (
        turn[:, 30:] @ torch.linalg.qr(torch.randn(50, 50, generator=generator)).Q
    )
    space = VectorSpace({"a.weight": (5, 10), "b.weight": (30,)})
    weights = ParameterVector(
        {"a.weight": torch.ones(5, 10), "b.weight": -torch.ones(30)}
    )
    one, two = (
        d.Directions.of(Eigenpairs.exact(values, vectors), space)
        for vectors in (turn, mixed)
    )
    assert len(one.without_null_space()) == 30
    for statistic in (
        lambda x: d.concentration(x).participation,
        lambda x: d.concentration(x).entropy,
        lambda x: d.layer_shares(x).value,
        lambda x: d.weight_product(x, weights).value,
        lambda x: torch.tensor(d.weight_product(x, weights).outside),
        lambda x: d.overlap(x, turn[:, :3]).value,
        lambda x: d.porter_thomas(x, num_samples=20).statistic,
    ):
        assert relative_error(statistic(one), statistic(two)) < 1e-12
    H = DenseMatrix(space, (turn * values) @ turn.mT)
    assert len(d.Directions.of_matrix(H)) == 30
    assert len(d.Directions.of_matrix(H, cut=0)) == 80
    with pytest.raises(ValueError, match=r"\('value', 'magnitude'\), got 'smallest'"):
        d.Directions.of_matrix(H, order="smallest")


def test_reconstruction_ends_at_the_weights(everything):
    """Haink 3A.5."""
    model, data, found = everything
    measure = d.loss_of(data, cross_entropy)
    before = ParameterVector.from_model(model)
    curve = d.cumulative_reconstruction(model, found, measure, [0, 10, 74])
    assert float(curve.value[0]) == pytest.approx(float(torch.tensor(3.0).log()))
    assert float(curve.value[-1]) == pytest.approx(measure(model), rel=1e-10)
    w = before.flat()
    part = found.vectors[:, :10]
    with with_parameters(model, found.space.vector(part @ (part.mT @ w))):
        assert float(curve.value[1]) == pytest.approx(measure(model))
    after = ParameterVector.from_model(model)
    assert torch.equal(after.flat(), w)
    with pytest.raises(ValueError, match="74 directions"):
        d.cumulative_reconstruction(model, found, measure, [75])


def test_layers_padded_into_the_network(everything):
    model, data, found = everything
    layer = layer_directions(model, data, cross_entropy, 3, layers=["2"])["2"]
    padded = layer.in_space(found.space)
    assert torch.equal(padded.vectors[35:59], layer.vectors)
    assert float(padded.vectors[:35].abs().sum() + padded.vectors[59:].abs().sum()) == 0
    mutual = d.overlap(padded.vectors, found.vectors)
    assert relative_error(mutual.captured(), torch.ones(3)) < 1e-10
    part = d.overlap(padded.vectors, found.vectors[:, :5])
    assert part.chance == pytest.approx(5 / 74)
    direct = (layer.vectors.mT @ found.vectors[35:59, :5]).abs()
    assert relative_error(part.value, direct) < 1e-12
    with pytest.raises(StateMismatchError, match="in_space"):
        d.overlap(layer.vectors, found.vectors)
    with pytest.raises(StateMismatchError, match=r"2\.weight"):
        layer.in_space(VectorSpace({"2.weight": (1,)}))


def test_profiles_touch_the_loss_and_keep_the_parameters(everything):
    model, data, found = everything
    w = ParameterVector.from_model(model).flat()
    steps = torch.tensor([-1e-3, 0.0, 1e-3, 0.5])
    direction = found.vector(0) * 3.0  # of any length
    profile = d.loss_profile(model, data, cross_entropy, direction, steps)
    x, y = whole(data)
    v = found.vectors[:, 0]
    for step, value in zip(steps, profile.value, strict=True):
        moved = dict(found.space.vector(w + step * v))
        outputs = functional_call(model, moved, (x,))
        assert float(value) == pytest.approx(float(cross_entropy(outputs, y)))
    assert profile.curvature == pytest.approx(float(found.value[0]))
    # Third order: the prediction has slope and curvature.
    assert float((profile.value - profile.prediction)[:3].abs().max()) < 1e-7
    assert profile.removed == pytest.approx(-float(w @ v))
    assert 1e-3 <= profile.validity(0.1) <= 0.5
    assert torch.equal(ParameterVector.from_model(model).flat(), w)


def test_loss_scaling_is_that_of_the_weights():
    model, data = problem()
    measure = d.loss_of(data, cross_entropy)
    curve = loss_scaling(model, measure, [0.0, 1.0, 2.0], ["4"])
    assert float(curve.value[0]) == pytest.approx(float(torch.tensor(3.0).log()))
    assert float(curve.value[1]) == pytest.approx(measure(model))
    x, y = whole(data)
    expected = float(
        cross_entropy(2 * model(x), y).detach()
    )  # the last layer, with its bias
    assert float(curve.value[2]) == pytest.approx(expected)
    accuracy = d.accuracy_of(data)(model)
    hits = (model(x).argmax(1) == y).double().mean()
    assert accuracy == pytest.approx(float(hits))


# ---------------------------------------------------------- vectors by themselves


@pytest.mark.parametrize("reading", ["kfac", "spatial"])
@pytest.mark.parametrize("shape", [(5, 7), (6, 4, 3, 3)])
def test_singular_directions_are_a_basis_of_the_weight(shape, reading):
    """Haink 3A.6."""
    weight = torch.randn(shape)
    values, vectors = d.singular_directions(weight, reading)
    assert relative_error(vectors.mT @ vectors, torch.eye(len(values))) < 1e-12
    assert relative_error((vectors @ values).view(shape), weight) < 1e-12
    matrix = as_matrix(weight, reading)
    if len(shape) == 4:
        assert matrix.shape == ((6, 36) if reading == "kfac" else (9, 24))
    assert relative_error(values, torch.linalg.svdvals(matrix)) < 1e-12
    with pytest.raises(ValueError, match="two dimensions"):
        as_matrix(torch.randn(3))
    with pytest.raises(ValueError, match=r"\('kfac', 'spatial'\), got 'flat'"):
        d.singular_directions(weight, "flat")


def test_concentration_of_known_vectors():
    """Ge, exact test 8: one-hot, constant magnitude, Gaussian."""
    n = 1000
    one_hot = torch.zeros(n)
    one_hot[3] = -2.0
    flat = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0)
    gaussian = torch.randn(200_000)
    found = d.concentration(torch.stack([one_hot, flat], dim=1))
    assert found.participation.tolist() == pytest.approx([1, 1 / n])
    assert found.entropy.tolist() == pytest.approx([0, torch.tensor(n).log().item()])
    assert found.support.tolist() == pytest.approx([1, n])
    assert float(found.kurtosis[0]) == pytest.approx((n**2 - 3 * n + 3) / (n - 1) - 3)
    assert float(found.kurtosis[1]) == pytest.approx(-2)
    random = d.concentration(gaussian[:, None])
    assert float(random.kurtosis) == pytest.approx(0, abs=0.05)
    assert float(random.support) / len(gaussian) == pytest.approx(0.753, abs=0.002)
    assert float(random.participation) * len(gaussian) == pytest.approx(3, rel=0.02)
    scaled = d.concentration(-7 * gaussian[torch.randperm(200_000)][:, None])
    assert float(scaled.kurtosis) == pytest.approx(float(random.kurtosis))
    assert float(scaled.entropy) == pytest.approx(float(random.entropy))


def test_progress_is_shown_when_asked(capsys, generator):
    model, data = problem()
    plain = d.top_directions(model, data, cross_entropy, 1, generator=generator)
    assert capsys.readouterr().err == ""
    generator.manual_seed(0)
    shown = d.top_directions(
        model, data, cross_entropy, 1, generator=generator, progress=True
    )
    assert "Hessian products" in capsys.readouterr().err
    assert torch.equal(shown.value, plain.value)


def test_residuals_travel_with_the_pairs():
    space = VectorSpace({"w": (3,)})
    pairs = Eigenpairs.exact(torch.tensor([2.0, 1.0]), torch.eye(3)[:, :2])
    found = d.Directions.of(pairs, space)
    assert len(found) == 2
    assert found.top(1).value.tolist() == [2]
    assert found.converged
    assert found.vector(1)["w"].tolist() == [0, 1, 0]


def test_regression_at_zero_residual_has_its_fisher():
    """Ge, exact test 6: Hessian = GGN when the labels are the outputs."""
    model = mlp(4, 5, 2, activation=nn.Tanh)
    x = torch.randn(9, 4)
    y = model(x).detach()

    def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets) * outputs.shape[1] / 2

    F = ekfac.fisher(model, [(x, y)], "dense", "l2").to_dense()
    H = d.HessianProducts(model, [(x, y)], half_squares)
    eye = torch.eye(F.shape[0])
    assert relative_error(H @ eye, F) < 1e-10
    off = d.HessianProducts(model, [(x, y + 1)], half_squares) @ eye - F
    # R = the mean over examples of residual times second derivatives.
    space = VectorSpace.of(ParameterVector.from_model(model))

    def output(flat: Tensor) -> Tensor:
        return -functional_call(model, dict(space.vector(flat)), (x,)).sum() / len(x)

    flat = ParameterVector.from_model(model).flat()
    expected = torch.autograd.functional.hessian(output, flat)
    assert relative_error(off, expected) < 1e-10
