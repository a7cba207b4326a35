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
