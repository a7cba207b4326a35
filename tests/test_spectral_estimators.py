"""Trace and diagonal estimators, against the truth."""

from __future__ import annotations

import pytest
import torch
from spectra import SPECTRA, N, gen, matrix
from torch import Tensor

from ekfac import spectral

TRACES = {
    "hutchinson": spectral.hutchinson_trace,
    "hutchpp": spectral.hutchpp_trace,
    "xtrace": spectral.xtrace,
}
DIAGONALS = {"hutchinson": spectral.hutchinson_diagonal, "xdiag": spectral.xdiag}


@pytest.fixture(params=SPECTRA)
def values(request) -> Tensor:
    return SPECTRA[request.param].sort().values


# --------------------------------------------------------------- traces and diagonals


@pytest.mark.parametrize("estimator", TRACES)
def test_traces_are_within_their_errors(values, estimator):
    A = matrix(values)
    truth = values.sum()
    scores = []
    for seed in range(20):
        estimate = TRACES[estimator](A, 60, generator=gen(seed))
        assert estimate.num_products <= 60
        error = (estimate.value - truth).abs()
        scores.append(float(error / (estimate.standard_error + 1e-9)))
    # Student's t of a few samples has wider tails than the normal distribution.
    assert sorted(scores)[len(scores) // 2] < 2
    assert max(scores) < 6


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace"])
def test_the_sketching_estimators_beat_hutchinson_on_decaying_spectra(estimator):
    A = matrix(torch.logspace(2, -8, N, dtype=torch.float64))

    def error(function):
        estimates = [function(A, 60, generator=gen(s)).value for s in range(10)]
        return (torch.stack(estimates) - A.trace()).square().mean().sqrt()

    assert error(TRACES[estimator]) < error(spectral.hutchinson_trace) / 10


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace"])
def test_low_rank_traces_are_exact(estimator):
    A = matrix(SPECTRA["low_rank"])
    estimate = TRACES[estimator](A, 60, generator=gen())
    torch.testing.assert_close(estimate.value, A.trace(), rtol=1e-10, atol=0)
    assert estimate.converged


@pytest.mark.parametrize("estimator", [*TRACES, "norm"])
def test_zero_is_zero(estimator):
    functions = {**TRACES, "norm": spectral.squared_frobenius_norm}
    zero = torch.zeros(50, 50, dtype=torch.float64)
    estimate = functions[estimator](zero, 20, generator=gen())
    assert estimate.value == 0
    assert estimate.converged


@pytest.mark.parametrize("estimator", ["hutchpp", "xtrace"])
def test_enough_products_give_the_exact_trace(estimator):
    A = matrix(SPECTRA["uniform"])
    estimate = TRACES[estimator](A, N, generator=gen())
    torch.testing.assert_close(estimate.value, A.trace())
    assert estimate.standard_error == 0


def test_hutchinson_has_its_known_variance():
    A = matrix(SPECTRA["uniform"])
    off = A - torch.diag(A.diagonal())
    known = (2 * off.square().sum() / 1000).sqrt()
    estimate = spectral.hutchinson_trace(A, 1000, generator=gen())
    torch.testing.assert_close(estimate.standard_error, known, rtol=0.1, atol=0)


def test_squared_frobenius_norm(values):
    A = matrix(values)
    estimate = spectral.squared_frobenius_norm(A, 100, generator=gen())
    assert (
        estimate.value - A.square().sum()
    ).abs() < 5 * estimate.standard_error + 1e-9


@pytest.mark.parametrize("estimator", DIAGONALS)
def test_diagonals_are_within_their_errors(values, estimator):
    A = matrix(values)
    estimate = DIAGONALS[estimator](A, 80, generator=gen())
    assert estimate.value.shape == estimate.standard_error.shape == (N,)
    error = (estimate.value - A.diagonal()).abs()
    scores = error / (estimate.standard_error + 1e-9)
    assert scores.median() < 1.5
    assert scores.square().mean() < 4
    exact = DIAGONALS[estimator](torch.diag(values), 20, generator=gen())
    if estimator == "hutchinson":
        torch.testing.assert_close(exact.value, values)


def test_xdiag_beats_hutchinson_on_decaying_spectra():
    A = matrix(torch.logspace(2, -8, N, dtype=torch.float64))

    def error(function):
        estimate = function(A, 60, generator=gen())
        return torch.linalg.vector_norm(estimate.value - A.diagonal())

    assert error(spectral.xdiag) < error(spectral.hutchinson_diagonal) / 10


def test_xdiag_of_low_rank_and_with_enough_products():
    A = matrix(SPECTRA["low_rank"])
    estimate = spectral.xdiag(A, 40, generator=gen())
    torch.testing.assert_close(estimate.value, A.diagonal(), rtol=1e-8, atol=1e-10)
    assert estimate.converged
    exact = spectral.xdiag(A, N, generator=gen())
    torch.testing.assert_close(exact.value, A.diagonal(), rtol=1e-12, atol=1e-14)


def naive_xtrace(A: Tensor, count: int, seed: int) -> Tensor:
    """Return the mean over probes, each left out of a range of its own."""
    normal = torch.randn(len(A), count, generator=gen(seed), dtype=A.dtype)
    probes = torch.where(normal < 0, -1.0, 1.0).double()
    samples = []
    for i in range(count):
        rest = [j for j in range(count) if j != i]
        Q = torch.linalg.qr(A @ probes[:, rest]).Q
        z = probes[:, i] - Q @ (Q.mT @ probes[:, i])
        samples.append((Q.mT @ A @ Q).trace() + z @ A @ z)
    return torch.stack(samples)


def jackknife(values: Tensor) -> Tensor:
    """Return the standard error from estimates with one sample left out each."""
    count = len(values)
    # Student's 97.5 % quantile of nine degrees of freedom over the normal one.
    assert count == 10
    return (values.var(dim=0, correction=0) * (count - 1)).sqrt() * (
        2.262157 / 1.959964
    )


def test_xtrace_is_the_leave_one_out_mean():
    A = matrix(SPECTRA["uniform"])
    samples = naive_xtrace(A, 10, seed=3)
    estimate = spectral.xtrace(A, 20, generator=gen(3))
    torch.testing.assert_close(estimate.value, samples.mean())
    normal = torch.randn(N, 10, generator=gen(3), dtype=A.dtype)
    probes = torch.where(normal < 0, -1.0, 1.0).double()
    without = []
    for j in range(10):
        rest = []
        for i in (i for i in range(10) if i != j):
            Q = torch.linalg.qr(
                A @ probes[:, [k for k in range(10) if k not in (i, j)]]
            ).Q
            z = probes[:, i] - Q @ (Q.mT @ probes[:, i])
            rest.append((Q.mT @ A @ Q).trace() + z @ A @ z)
        without.append(torch.stack(rest).mean())
    torch.testing.assert_close(
        estimate.standard_error, jackknife(torch.stack(without)), rtol=1e-3, atol=0
    )


def test_xdiag_is_the_leave_one_out_mean():
    A = matrix(SPECTRA["uniform"])
    normal = torch.randn(N, 10, generator=gen(3), dtype=A.dtype)
    probes = torch.where(normal < 0, -1.0, 1.0).double()
    samples = []
    for i in range(10):
        rest = [j for j in range(10) if j != i]
        Q = torch.linalg.qr(A @ probes[:, rest]).Q
        product = A @ probes[:, i]
        outside = product - Q @ (Q.mT @ product)
        samples.append((Q * (A @ Q)).sum(dim=1) + probes[:, i] * outside)
    estimate = spectral.xdiag(A, 20, generator=gen(3))
    torch.testing.assert_close(estimate.value, torch.stack(samples).mean(dim=0))
    without = []
    for j in range(10):
        rest = []
        for i in (i for i in range(10) if i != j):
            Q = torch.linalg.qr(
                A @ probes[:, [k for k in range(10) if k not in (i, j)]]
            ).Q
            product = A @ probes[:, i]
            outside = product - Q @ (Q.mT @ product)
            rest.append((Q * (A @ Q)).sum(dim=1) + probes[:, i] * outside)
        without.append(torch.stack(rest).mean(dim=0))
    torch.testing.assert_close(
        estimate.standard_error, jackknife(torch.stack(without)), rtol=1e-3, atol=0
    )


SCATTER = {
    "power law": 1 / torch.arange(1, 61, dtype=torch.float64),
    "flat": torch.linspace(1, 2, 60, dtype=torch.float64),
    "outliers": torch.cat([torch.tensor([100.0, 50, 20]), torch.linspace(0, 1, 57)]),
    "exponential": torch.logspace(2, -4, 60, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SCATTER)
@pytest.mark.parametrize("name", [*TRACES, "norm", "density", "logdet"])
def test_stated_errors_cover_what_they_say(spectrum, name):
    """Over 300 seeds: twice the standard error, at the numbers of products below."""
    values = SCATTER[spectrum].double()
    turn = torch.linalg.qr(torch.randn(60, 60, generator=gen(1), dtype=values.dtype)).Q
    A = (turn * values) @ turn.mT

    def estimate(seed: int) -> spectral.Estimate:
        g = gen(seed)
        if name == "norm":
            return spectral.squared_frobenius_norm(A, 20, generator=g)
        if name == "density":
            found = spectral.spectral_density(
                A, num_probes=20, num_steps=2, generator=g
            )
            return found.trace_of(lambda t: t)
        if name == "logdet":
            return spectral.log_determinant(
                A, 1.0, num_probes=10, num_steps=8, generator=g
            )
        return TRACES[name](A, 30, generator=g)

    truth = {"norm": (values**2).sum(), "logdet": (values + 1).log().sum()}
    scores = torch.stack(
        [
            (e.value - truth.get(name, values.sum())) / e.standard_error
            for e in map(estimate, range(300))
        ]
    )
    assert float((scores.abs() < 2).double().mean()) >= 0.9


@pytest.mark.parametrize("spectrum", SCATTER)
@pytest.mark.parametrize("name", DIAGONALS)
def test_stated_errors_of_diagonals_cover_what_they_say(spectrum, name):
    values = SCATTER[spectrum].double()
    turn = torch.linalg.qr(torch.randn(60, 60, generator=gen(1), dtype=values.dtype)).Q
    A = (turn * values) @ turn.mT
    inside = torch.zeros(60, dtype=values.dtype)
    for seed in range(300):
        found = DIAGONALS[name](A, 24, generator=gen(seed))
        error = (found.value - A.diagonal()).abs()
        inside += error < 2 * found.standard_error
    assert float(inside.mean()) / 300 >= 0.9
    assert float(inside.min()) / 300 >= 0.8


def test_estimates_follow_the_generator():
    A = matrix(SPECTRA["uniform"])
    functions = [*TRACES.values(), *DIAGONALS.values(), spectral.log_determinant]
    for function in functions:
        options = {"damping": 2.0} if function is spectral.log_determinant else {}
        one, two = (function(A, generator=gen(5), **options).value for _ in range(2))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("function", "least"),
    [
        (spectral.hutchinson_trace, 2),
        (spectral.squared_frobenius_norm, 2),
        (spectral.hutchinson_diagonal, 2),
        (spectral.xtrace, 4),
        (spectral.xdiag, 4),
        (spectral.hutchpp_trace, 6),
    ],
)
def test_too_few_products(function, least):
    with pytest.raises(ValueError, match=f"at least {least}, got {least - 1}"):
        function(torch.eye(40), least - 1)
    assert function(torch.eye(40), least).value.isfinite().all()


@pytest.mark.parametrize(
    "function", [spectral.spectral_density, spectral.log_determinant]
)
def test_long_estimates_show_progress(function, capsys):
    pytest.importorskip("tqdm")
    A = matrix(SPECTRA["uniform"])
    options = {"damping": 1.0} if function is spectral.log_determinant else {}
    plain = function(A, num_probes=3, num_steps=5, generator=gen(), **options)
    assert capsys.readouterr().err == ""
    shown = function(
        A, num_probes=3, num_steps=5, generator=gen(), progress=True, **options
    )
    assert "Lanczos quadrature" in capsys.readouterr().err
    assert torch.equal(plain.value, shown.value)


def test_any_estimator_can_be_watched(capsys):
    pytest.importorskip("tqdm")
    A = matrix(SPECTRA["uniform"])
    with spectral.watched(A, 20, "trace") as operator:
        found = spectral.xtrace(operator, 20, generator=gen())
    assert "trace:" in capsys.readouterr().err
    assert torch.equal(found.value, spectral.xtrace(A, 20, generator=gen()).value)
