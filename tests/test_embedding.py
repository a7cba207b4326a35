"""Splitting embeddings (Zhang et al. 2021): what they preserve, exactly."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib as mpl
import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import inertia
from ekfac.diagnostics.papers.zhang import (
    Embedding,
    check_embedding,
    embedded_factors,
    redundant_neurons,
    redundant_neurons_of_factors,
    split,
    split_equally,
)
from ekfac.errors import StateMismatchError, UnsupportedLayerError
from ekfac.vectors import ParameterVector, VectorSpace

TIGHT = 1e-10
mpl.use("Agg")
Loss = Callable[[Tensor, Tensor], Tensor]


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (outputs - y).square().sum(dim=1).mean()


def perceptron(
    activation: type[nn.Module] = nn.Tanh, outputs: int = 3
) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3), activation(), nn.Linear(3, 4), activation()]
    return nn.Sequential(*layers, nn.Linear(4, outputs)).double()


def convolutional() -> nn.Sequential:
    """Convolutions, batch norm with a history, pooling, flattening, PReLU."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2, bias=False),
        nn.PReLU(2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    model(torch.randn(9, 2, 5, 5, dtype=torch.float64))
    return model.eval()


class Residual(nn.Module):
    """A block whose inner layer feeds another one, and a sum after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 3), nn.Linear(3, 5)
        self.outer, self.head = nn.Linear(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + self.outer(torch.relu(self.inner(h)))
        found: Tensor = self.head(h)
        return found


class Branching(nn.Module):
    """One layer read by two, a transposed convolution on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose1d(2, 3, 2)
        self.left, self.right = nn.Conv1d(3, 2, 2), nn.ConvTranspose1d(3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.first(x))
        return self.left(h).mean(dim=2) * self.right(h).mean(dim=2)


NETWORKS: dict[
    str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[str, ...]]
] = {
    "tanh": (perceptron, (4,), ("0", "2")),
    "ReLU": (lambda: perceptron(nn.ReLU), (4,), ("2", "0")),
    "convolutions": (convolutional, (2, 5, 5), ("0", "3")),
    "residual": (lambda: Residual().double(), (4,), ("inner",)),
    "branches": (lambda: Branching().double(), (2, 4), ("first",)),
}


def build(name: str, examples: int = 7) -> tuple[nn.Module, Tensor, Embedding]:
    """Return a network, inputs and an embedding: a chain of odd shares."""
    make, shape, layers = NETWORKS[name]
    torch.manual_seed(1)
    model = make()
    x = torch.randn(examples, *shape, dtype=torch.float64)
    embedding, wide = Embedding(()), model
    for i, layer in enumerate(layers):
        for neuron, alpha in ((1, -1.3 + i), (0, 0.4), (1, 2.0)):
            step = split(wide, layer, neuron, alpha=alpha)
            embedding, wide = embedding.then(step), step.model(wide)
    return model, x, embedding


def targets(model: nn.Module, x: Tensor, loss: Loss) -> Tensor:
    with torch.no_grad():
        outputs = model(x)
    if loss is squared:
        return torch.randn_like(outputs)
    return torch.randint(outputs.shape[1], (len(x),))


def columns(
    mapped: Callable[[ParameterVector], ParameterVector], like: nn.Module
) -> Tensor:
    """Return a linear map of parameter vectors as a matrix."""
    space = VectorSpace.of(like)
    eye = torch.eye(space.size, dtype=torch.float64)
    return torch.stack([mapped(space.vector(row)).flat() for row in eye], dim=1)


def hessian(model: nn.Module, x: Tensor, y: Tensor, loss: Loss) -> Tensor:
    found = ekfac.hessian(model, [(x, y)], loss, "dense", loss_reduction="mean")
    return found.to_dense()


# -- what is kept at any parameters ----------------------------------------------------


@pytest.mark.parametrize("loss", [squared, cross_entropy])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_loss_and_gradient(name, loss):
    model, x, embedding = build(name)
    y = targets(model, x, loss)
    before = ParameterVector.from_model(model).flat()
    wide = embedding.model(model)
    assert relative_error(wide(x).detach(), model(x).detach()) < 1e-12
    found = check_embedding(model, embedding, x, y, loss)
    assert found.preserved
    assert max(found.output_error, found.loss_error, found.gradient_error) < 1e-12
    grads = []
    for net in (model, wide):
        grad = torch.autograd.grad(loss(net(x), y), list(net.parameters()))
        names = [n for n, _ in net.named_parameters()]
        grads.append(ParameterVector(dict(zip(names, grad, strict=True))))
    expected = embedding.gradients(grads[0])
    assert relative_error(grads[1].flat(), expected.flat()) < TIGHT
    assert found.wide_gradient == pytest.approx(float(expected.flat().abs().sum()))
    assert torch.equal(ParameterVector.from_model(model).flat(), before)
    assert embedding.num_neurons == len(embedding.splits)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_linear_maps(name):
    model, _, embedding = build(name)
    theta = ParameterVector.from_model(model)
    wide = ParameterVector.from_model(embedding.model(model))
    assert relative_error(embedding.parameters(theta).flat(), wide.flat()) < 1e-14
    T, B = columns(embedding.parameters, model), columns(embedding.gradients, model)
    eye = torch.eye(T.shape[1], dtype=torch.float64)
    assert relative_error(T.mT @ B, eye) < TIGHT


@pytest.mark.parametrize("loss", [squared, cross_entropy])
@pytest.mark.parametrize("name", ["tanh", "ReLU", "residual", "convolutions"])
def test_the_hessians_are_mapped(name, loss):
    model, x, embedding = build(name)
    y = targets(model, x, loss)
    T, B = columns(embedding.parameters, model), columns(embedding.gradients, model)
    H = hessian(model, x, y, loss)
    wide = hessian(embedding.model(model), x, y, loss)
    assert relative_error(wide @ T, B @ H) < TIGHT
    assert relative_error(T.mT @ wide @ T, H) < TIGHT


def test_features_and_backward_signals():
    """Lemma 1: features are repeated, the error vector is shared out."""
    model = perceptron()
    x = torch.randn(6, 4, dtype=torch.float64)
    alpha = 0.3
    wide = split(model, "0", 1, alpha=alpha).model(model)
    h, g = model[:2](x).detach(), wide[:2](x).detach()
    assert relative_error(g, h[:, [0, 1, 2, 1]]) < 1e-14
    z, w = h.requires_grad_(), g.requires_grad_()
    narrow = torch.autograd.grad(model[2:](z).square().sum(), z)[0]
    found = torch.autograd.grad(wide[2:](w).square().sum(), w)[0]
    share = torch.tensor([1, 1 - alpha, 1, alpha], dtype=torch.float64)
    assert relative_error(found, narrow[:, [0, 1, 2, 1]] * share) < 1e-12
    assert relative_error(wide[2:4](w).detach(), model[2:4](z).detach()) < 1e-14


def test_equal_splitting_gives_every_copy_the_same():
    model = perceptron()
    wide = split_equally(model, "2", 1, 4).model(model)
    old = model[4].weight[:, 1] / 4
    assert wide[2].out_features == wide[4].in_features == 7
    for column in (1, 4, 5, 6):
        assert relative_error(wide[4].weight[:, column].detach(), old.detach()) < 1e-14
    with pytest.raises(ValueError, match="at least 2"):
        split_equally(model, "2", 1, 1)


def test_equal_copies_stay_equal_under_kfac():
    """Permutation symmetry: with equal shares, both copies get the same update."""
    model = perceptron()
    x = torch.randn(40, 4, dtype=torch.float64)
    y = torch.randint(3, (40,))
    wide = split_equally(model, "0", 1, 2).model(model)
    for structure in ("kfac", "ekfac"):
        F = ekfac.fisher(wide, [(x, y)], structure)
        cross_entropy(wide(x), y).backward()
        step = F.solve(ParameterVector.from_grad(wide), damping=1e-2)
        wide.zero_grad()
        assert bool(torch.isfinite(step.flat()).all())
        rows = step["0.weight"]
        assert relative_error(rows[3], rows[1]) < 1e-8
        reads = step["2.weight"]
        assert relative_error(reads[:, 3], reads[:, 1]) < 1e-8


def test_preservation_does_not_depend_on_the_scale_of_the_loss():
    model = perceptron().float()
    x, y = torch.randn(50, 4), torch.randn(50, 3)
    embedding = split(model, "0", 1, alpha=0.3)
    for scale in (1e-3, 1.0, 1e6):
        found = check_embedding(
            model, embedding, x, y, lambda f, t, c=scale: c * squared(f, t)
        )
        assert found.preserved, scale


# -- critical points -------------------------------------------------------------------


def critical(loss: Loss, outputs: int = 3) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a network, inputs and targets at which it is critical, without training.

    The residuals are in the null space of the Jacobian's transpose.
    """
    model = perceptron(outputs=outputs)
    n = 60 if outputs == 1 else 30
    x = torch.randn(n, 4, dtype=torch.float64)
    J = ekfac.jacobian(model, x).to_dense()
    with torch.no_grad():
        f = model(x)
    constraints = [J.mT]
    if loss is cross_entropy:  # soft labels have to sum to one
        constraints.append(torch.kron(torch.eye(n), torch.ones(1, outputs)).double())
    A = torch.cat(constraints)
    noise = torch.randn(n * outputs, dtype=torch.float64)
    r = noise - torch.linalg.lstsq(A, A @ noise, driver="gelsd").solution
    r = r.reshape(n, outputs)
    if loss is squared:
        return model, x, f - r
    g = f.softmax(dim=1)
    return model, x, g - 0.5 * r * float((g / r.abs()).min())


@pytest.mark.parametrize("loss", [squared, cross_entropy])
def test_critical_points_stay_critical_and_degenerate(loss):
    model, x, y = critical(loss)
    before = inertia(hessian(model, x, y, loss))
    assert before.zero == 0 or loss is cross_entropy
    wide: nn.Module = model
    for k, (layer, neuron) in enumerate((("0", 1), ("0", 1), ("2", 0), ("0", 2)), 1):
        step = split(wide, layer, neuron, alpha=0.3)
        found = check_embedding(wide, step, x, y, loss)
        assert found.preserved
        assert found.wide_gradient < 1e-12
        wide = step.model(wide)
        after = inertia(hessian(wide, x, y, loss))
        assert after.zero >= before.zero + k
        assert after.negative >= before.negative
        assert after.positive >= before.positive
        assert after.gap > 1e6


def test_two_layer_networks_with_one_output_get_one_zero_for_each_neuron():
    """Figure 4's rule: the degeneracy is the number of neurons added."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(30, 2, dtype=torch.float64)
    J = ekfac.jacobian(model, x).to_dense()
    noise = torch.randn(30, dtype=torch.float64)
    r = noise - J @ torch.linalg.lstsq(J, noise.unsqueeze(1)).solution.squeeze(1)
    y = model(x).detach() - r.unsqueeze(1)
    assert inertia(hessian(model, x, y, squared)).zero == 0
    for copies in (2, 3, 4):
        wide = split_equally(model, "0", 0, copies).model(model)
        found = inertia(hessian(wide, x, y, squared))
        assert found.zero == copies - 1
        assert found.gap > 1e6


def test_the_critical_affine_subspace():
    """Theorem 2: any combination of the K directions stays critical, equal in loss."""
    model, x, y = critical(squared)
    _, _, embedding = build("tanh")
    theta = ParameterVector.from_model(model)
    directions = embedding.directions(theta)
    V = torch.stack([v.flat() for v in directions], dim=1)
    assert int(torch.linalg.matrix_rank(V)) == embedding.num_neurons == 6
    wide = embedding.model(model)
    base = ParameterVector.from_model(wide)
    with torch.no_grad():
        loss = float(squared(model(x), y))
    for _ in range(3):
        moved = base.flat() + V @ torch.randn(6, dtype=torch.float64)
        torch.nn.utils.vector_to_parameters(moved, wide.parameters())
        value = squared(wide(x), y)
        grads = torch.autograd.grad(value, list(wide.parameters()))
        assert float(value.detach()) == pytest.approx(loss, rel=1e-12)
        assert sum(float(g.abs().sum()) for g in grads) < 1e-11


# -- factors ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tanh", "ReLU", "convolutions", "residual"])
def test_the_wide_networks_factors(name):
    model, x, embedding = build(name, examples=40)
    wide = embedding.model(model)
    own = [m for m in ("1", "4") if name == "convolutions"]
    names = [n for n, _ in model.named_parameters() if n.partition(".")[0] not in own]
    narrow = ekfac.fisher(model, [(x, None)], "kfac", parameters=names)
    expected = ekfac.fisher(wide, [(x, None)], "kfac", parameters=names)
    found = embedded_factors(embedding, model, narrow)
    assert found.space == expected.space
    for key, block in found.blocks.items():
        for side in ("A", "G"):
            exact = expected.blocks[key].factor(side)
            assert relative_error(block.factor(side), exact) < TIGHT
            rank = torch.linalg.matrix_rank
            before = narrow.blocks[key].factor(side)
            assert int(rank(exact).sum()) == int(rank(before).sum())
    assert relative_error(found.to_dense(), expected.to_dense()) < TIGHT


# -- inertia ---------------------------------------------------------------------------


def test_inertia_counts_signs():
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    values = torch.tensor([-2.0, -1e-3, 1e-14, 0.0, 1e-3, 5.0], dtype=torch.float64)
    found = inertia((Q * values) @ Q.mT)
    assert (found.negative, found.zero, found.positive) == (2, 2, 2)
    assert found.gap > 1e9
    assert "2 negative, 2 zero, 2 positive" in str(found)
    loose = inertia((Q * values) @ Q.mT, 1e-2)
    assert (loose.negative, loose.zero, loose.positive) == (1, 4, 1)
    definite = inertia(torch.eye(3, dtype=torch.float64))
    assert (definite.positive, definite.gap) == (3, float("inf"))
    axes = found.plot()
    assert len(axes.get_legend_handles_labels()[1]) == 3
    mpl.pyplot.close("all")


# -- redundant neurons -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["tanh", "convolutions"])
def test_merging_undoes_an_embedding(name):
    model, x, embedding = build(name)
    layer = NETWORKS[name][2][0]
    step = Embedding(tuple(s for s in embedding.splits if s.neuron_map.layer == layer))
    wide = step.model(model)
    found = redundant_neurons(
        wide, layer, threshold=1 - 1e-9, amplitude=0.0, activation="any"
    )
    assert found.source == "exact"
    assert sorted(map(len, found.groups)) == [1, 2, 3]
    merged = found.merged(wide)
    assert merged.get_parameter(f"{layer}.weight").shape[0] == 3
    assert relative_error(merged(x).detach(), model(x).detach()) < 1e-12
    found.plot()
    mpl.pyplot.close("all")


def test_longer_weights_are_larger_neurons_of_a_relu():
    model = perceptron(nn.ReLU)
    x = torch.randn(20, 4, dtype=torch.float64)
    wide = split(model, "0", 1, alpha=0.6).model(model)
    with torch.no_grad():
        wide[0].weight[3] *= 5
        wide[0].bias[3] *= 5
        wide[2].weight[:, 3] /= 5
    found = redundant_neurons(wide, "0", threshold=1 - 1e-9, amplitude=0.0)
    assert len(found.groups) == 3
    assert relative_error(found.merged(wide)(x).detach(), model(x).detach()) < 1e-12


def test_small_neurons_are_dropped():
    model = perceptron()
    with torch.no_grad():
        model[0].weight[2] *= 1e-6
        model[0].bias[2] *= 1e-6
    found = redundant_neurons(model, "0")
    assert found.negligible == (2,)
    assert found.merged(model)[0].out_features == 2


@pytest.mark.parametrize("name", ["tanh", "ReLU", "convolutions"])
def test_factors_find_neurons_that_do_the_same(name):
    """The input factor of the layer that reads them knows what weights do not."""
    model, x, embedding = build(name, examples=40)
    layer = NETWORKS[name][2][0]
    step = Embedding(tuple(s for s in embedding.splits if s.neuron_map.layer == layer))
    wide = step.model(model)
    own = [m for m in ("1", "4") if name == "convolutions"]
    names = [n for n, _ in wide.named_parameters() if n.partition(".")[0] not in own]
    F = ekfac.fisher(wide, [(x, None)], "kfac", parameters=names)
    found = redundant_neurons_of_factors(
        wide, F, layer, threshold=1 - 1e-9, amplitude=0.0
    )
    assert found.source == "factors"
    silent = set(found.negligible)  # on these examples, behind a ReLU
    copies = [g - silent for g in _copies(step) if g - silent]
    assert copies
    assert {frozenset(g) for g in found.groups} == {frozenset(g) for g in copies}
    assert relative_error(found.merged(wide)(x).detach(), model(x).detach()) < 1e-9


def _copies(embedding: Embedding) -> list[set[int]]:
    """Return the neurons that are copies of one."""
    source = list(range(embedding.splits[0].neuron_map.width))
    for step in embedding.splits:
        source.append(source[step.neuron])
    return [{i for i, s in enumerate(source) if s == k} for k in set(source)]


# -- errors ----------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(self.first(x)))
        return found


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        found: Tensor = self.second(h if h.sum() > 0 else 2 * h)
        return found


ERRORS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "unknown layer": (perceptron, "9", "no such module"),
    "no linear map": (perceptron, "1", "Tanh"),
    "last layer": (perceptron, "4", "hidden layer"),
    "residual stream": (Residual, "first", "inside the branch"),
    "tied": (Tied, "first", "tied"),
    "called twice": (Twice, "first", "2 times"),
    "cannot be traced": (Untraceable, "first", "into="),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2)),
        "0",
        "mixes the neurons",
    ),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(2, 2, 1, groups=2), nn.Conv1d(2, 2, 1)),
        "0",
        "groups",
    ),
    "recurrent": (lambda: nn.Sequential(nn.Linear(3, 2), nn.GRU(2, 2)), "0", "GRU"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_layer_and_say_what_to_do(name):
    make, layer, message = ERRORS[name]
    with pytest.raises(UnsupportedLayerError, match=message):
        split(make(), layer, 0)


def test_naming_the_readers():
    model = Untraceable().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    wide = split(model, "first", 1, into="second").model(model)
    assert relative_error(wide(x).detach(), model(x).detach()) < 1e-12
    with pytest.raises(UnsupportedLayerError, match="no multiple"):
        split(perceptron(), "0", 0, into="4")
    with pytest.raises(
        UnsupportedLayerError, match=r"names 'third'.*'first', 'second'"
    ):
        split(model, "first", 1, into="third")


def test_wrong_neurons_and_wrong_networks():
    model = perceptron()
    with pytest.raises(ValueError, match="from 0 to 2"):
        split(model, "0", 3)
    embedding = split(model, "0", 0)
    with pytest.raises(StateMismatchError, match="4 neurons"):
        embedding.model(embedding.model(model))
