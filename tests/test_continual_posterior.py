"""The Laplace approximation, where it is exact and where sampling can tell."""

from __future__ import annotations

import math

import pytest
import torch
from continual_cases import (
    batches,
    dense_fisher,
    flat,
    images,
    jacobians,
    move_,
    network,
)
from torch import nn
from torch.distributions import MultivariateNormal

from ekfac.continual import QuadraticPenalty
from ekfac.errors import NotReadyError, UnsupportedOperationError
from ekfac.likelihoods import Categorical

PRIOR = 0.7


def regression(count: int = 20) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Return the ridge solution of a linear model with unit noise."""
    x = torch.randn(count, 3, dtype=torch.float64)
    y = x @ torch.randn(3, 2).double() + torch.randn(count, 2).double()
    Z = torch.cat([x, torch.ones(count, 1).double()], dim=1)
    W = torch.linalg.solve(Z.mT @ Z + PRIOR * torch.eye(4).double(), Z.mT @ y)
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(W[:3].mT)
        model.bias.copy_(W[3])
    return model, x, y


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block_diagonal"])
def test_bayesian_linear_regression_is_exact(structure):
    """Evidence, posterior and predictive have closed forms there."""
    model, x, y = regression()
    n = len(x)
    penalty = QuadraticPenalty(model, structure)
    penalty.consolidate([(x[:5], y[:5]), (x[5:], y[5:])], likelihood="gaussian")
    posterior = penalty.posterior(PRIOR)
    Z = torch.cat([x, torch.ones(n, 1).double()], dim=1)
    # Evidence: every output is normal with covariance Z Z^T / prior + I.
    marginal = MultivariateNormal(
        torch.zeros(n).double(), Z @ Z.mT / PRIOR + torch.eye(n).double()
    )
    evidence = marginal.log_prob(y.mT).sum()
    residual = (y - model(x).detach()).square().sum()
    likelihood = -0.5 * residual - n * math.log(2 * math.pi)  # two outputs
    found = posterior.log_marginal_likelihood(likelihood)
    torch.testing.assert_close(found, evidence)
    # Predictive covariance of the outputs at new inputs.
    inputs = torch.randn(4, 3, dtype=torch.float64)
    prediction = posterior.predict(inputs, likelihood="gaussian")
    new = torch.cat([inputs, torch.ones(4, 1).double()], dim=1)
    S = torch.linalg.inv(Z.mT @ Z + PRIOR * torch.eye(4).double())
    variance = torch.einsum("ni,ij,nj->n", new, S, new)
    expected = variance[:, None, None] * torch.eye(2).double()
    torch.testing.assert_close(prediction.covariance, expected)
    torch.testing.assert_close(prediction.outputs, model(inputs).detach())
    assert prediction.probabilities is None
    assert prediction.standard_error is None
    generator = torch.Generator().manual_seed(0)
    sampled = posterior.predict(
        inputs, "sampling", likelihood="gaussian", num_samples=1000, generator=generator
    )
    error = (sampled.outputs - prediction.outputs) / sampled.standard_error
    assert error.abs().max() < 4
    gap = (sampled.covariance - expected).flatten(1).norm(dim=1)
    assert (gap < 0.15 * expected.flatten(1).norm(dim=1)).all()


def test_samples_have_the_posterior_covariance():
    model, (x, _) = network(), images()
    penalty = QuadraticPenalty(model, "block_diagonal")
    penalty.consolidate(batches())
    posterior = penalty.posterior(PRIOR)
    generator = torch.Generator().manual_seed(0)
    draws = posterior.sample(2000, generator)
    rows = torch.stack([draw.flat() for draw in draws])
    torch.testing.assert_close(posterior.mean.flat(), flat(model))
    precision = 30 * dense_fisher(model, x)
    precision[:25, 25:] = precision[25:, :25] = 0
    precision += PRIOR * torch.eye(43).double()
    whitened = (rows - flat(model)) @ torch.linalg.cholesky(precision)
    covariance = whitened.mT @ whitened / len(rows)
    # Expected from 2000 draws: (44 / 2000)^1/2 = 0.148.
    assert (covariance - torch.eye(43).double()).norm() / 43**0.5 < 0.18
    assert draws[0].keys() == dict(model.named_parameters()).keys()


def test_linearised_predictions_of_a_classifier():
    model, (x, _) = network(), images()
    penalty = QuadraticPenalty(model, "ekfac")
    penalty.consolidate(batches())
    posterior = penalty.posterior(PRIOR)
    found = posterior.predict(x[:5])
    precision = 30 * penalty.matrix().to_dense() + PRIOR * torch.eye(43).double()
    J = jacobians(model, x[:5])
    expected = J @ torch.linalg.inv(precision) @ J.mT
    torch.testing.assert_close(found.covariance, expected)
    variance = expected.diagonal(dim1=1, dim2=2)
    f = model(x[:5]).detach()
    probit = (f / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
    torch.testing.assert_close(found.probabilities, probit)
    sampled = posterior.predict(x[:5], "sampling", num_samples=50)
    assert (sampled.probabilities.sum(1) - 1).abs().max() < 1e-9
    assert sampled.standard_error.shape == (5, 3)
    assert all(p.grad is None for p in model.parameters())
    bernoulli = posterior.predict(x[:5], likelihood="bernoulli")
    assert (bernoulli.probabilities > 0).all()


def test_the_penalty_is_minus_the_log_posterior():
    model = network()
    penalty = QuadraticPenalty(model, "kfac")
    for task in range(2):
        penalty.consolidate(batches(task))
        move_(model, seed=task)
    posterior = penalty.posterior(1e-9)
    d = flat(model) - posterior.mean.flat()
    value = 0.5 * d @ posterior.precision.to_dense() @ d
    torch.testing.assert_close(value, 30 * penalty().detach())


def test_numbers_of_examples_have_to_be_known_and_consistent():
    model = network()
    penalty = QuadraticPenalty(model, "kfac")
    with pytest.raises(NotReadyError, match="Nothing was consolidated"):
        penalty.posterior()
    penalty.consolidate(batches())
    with pytest.raises(ValueError, match="prior_precision must be positive"):
        penalty.posterior(0.0)
    posterior = penalty.posterior()
    for options, text in (
        ({"method": "exact"}, "method must be"),
        ({"method": "sampling", "num_samples": 1}, "num_samples must be"),
    ):
        with pytest.raises(ValueError, match=text):
            posterior.predict(images()[0], **options)
    # A task of twice as many examples has twice the weight.
    penalty.consolidate(batches(1, count=60), weight=2.0)
    expected = 30 * penalty.matrix().to_dense()
    found = penalty.posterior().precision.to_dense()
    torch.testing.assert_close(found, expected)
    penalty.consolidate(batches(2, count=60))
    with pytest.raises(NotReadyError, match="weights in proportion"):
        penalty.posterior()
    separate = QuadraticPenalty(model, "kfac", mode="separate")
    for task in range(2):
        separate.consolidate(batches(task))
    with pytest.raises(UnsupportedOperationError, match="2 anchors"):
        separate.posterior()


class Scalar(nn.Module):
    """One output without a dimension of its own, ``[N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).squeeze(-1)


POSITIONS = {
    "tagging": (nn.Linear(4, 3), (8, 5, 4), (8, 5), "categorical", -1),
    "segmentation": (nn.Conv2d(4, 3, 1), (8, 4, 2, 2), (8, 2, 2), "categorical", 1),
    "sequence": (nn.Conv1d(4, 3, 1), (8, 4, 5), (8, 5), "categorical", 1),
    # As many positions as classes: the dimension has to be said.
    "square": (
        nn.Conv1d(4, 3, 1),
        (8, 4, 3),
        (8, 3),
        Categorical(class_dim=1),
        1,
    ),
    "scalar": (Scalar(), (8, 4), (8,), "bernoulli", None),
}


@pytest.mark.parametrize("method", ["linearised", "sampling"])
@pytest.mark.parametrize("name", POSITIONS)
def test_every_position_has_its_own_softmax(name, method):
    """A narrow posterior predicts what the network itself does."""
    model, shape, labels, likelihood, dim = POSITIONS[name]
    torch.manual_seed(0)
    x, y = torch.randn(shape), torch.randint(2, labels)
    penalty = QuadraticPenalty(model, "kfac")
    penalty.consolidate([(x, y)], likelihood=likelihood)
    outputs = model(x[:2]).detach()
    expected = outputs.sigmoid() if dim is None else outputs.softmax(dim)
    found = penalty.posterior(1e8).predict(x[:2], method, likelihood=likelihood)
    assert found.probabilities is not None
    torch.testing.assert_close(
        found.probabilities, expected.reshape(2, -1), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("structure", ["kfac", "block_diagonal", "diagonal"])
@pytest.mark.parametrize("ignored", [-100, 7])
def test_examples_without_a_label_do_not_count(structure, ignored):
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    y[3:] = ignored
    likelihood = Categorical(ignore_index=ignored)
    precisions = []
    for data in ([(x, y)], [(x[:2], y[:2]), (x[2:3], y[2:3])]):
        penalty = QuadraticPenalty(model, structure)
        penalty.consolidate(data, likelihood=likelihood)
        precisions.append(penalty.posterior(1.0).precision.to_dense())
    torch.testing.assert_close(*precisions)


def test_the_posterior_of_the_last_layer_is_over_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    penalty = QuadraticPenalty(model, "block_diagonal", parameters=["2"])
    penalty.consolidate([(x, y)])
    posterior = penalty.posterior(0.5)
    assert list(posterior.precision.space.names) == ["2.weight", "2.bias"]
    features = torch.cat([model[:2](x), torch.ones(9, 1).double()], dim=1).detach()
    p = model(x).softmax(-1).detach()
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    # [W | b] row by row is not the flat order, in which the bias comes last.
    F = torch.einsum("ncd,ni,nj->cidj", H, features, features).reshape(18, 18)
    order = [6 * c + i for c in range(3) for i in range(5)] + [5, 11, 17]
    F = F[order][:, order]
    torch.testing.assert_close(posterior.precision.to_dense(), F)
    J = torch.einsum("ni,cd->ncdi", features[:2], torch.eye(3).double()).reshape(6, 18)
    J = J[:, order]
    prior = 0.5 * torch.eye(18).double()
    covariance = J @ torch.linalg.inv(F + prior) @ J.mT
    found = posterior.predict(x[:2]).covariance
    for i in range(2):
        part = slice(3 * i, 3 * i + 3)
        torch.testing.assert_close(found[i], covariance[part, part])


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block_diagonal"])
def test_the_evidence_has_a_gradient_in_the_prior(structure):
    model, x, _ = regression()
    penalty = QuadraticPenalty(model, structure)
    penalty.consolidate([(x, None)], likelihood="gaussian")

    def evidence(prior: torch.Tensor) -> torch.Tensor:
        return penalty.posterior(prior).log_marginal_likelihood(-3.0)

    prior = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(evidence, prior)
    torch.testing.assert_close(
        evidence(prior).detach(),
        penalty.posterior(0.4).log_marginal_likelihood(torch.tensor(-3.0).double()),
    )
