"""Eigenpairs, densities, determinants and solves, against the whole spectrum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import CASES
from spectra import SPECTRA, N, gen, matrix
from torch import Tensor

from ekfac import spectral
from ekfac.spectral import FunctionOperator, lanczos, lobpcg
from ekfac.spectral.operators import orthonormal

SOLVERS = {"lanczos": lanczos, "lobpcg": lobpcg}


@pytest.fixture(params=SPECTRA)
def values(request) -> Tensor:
    return SPECTRA[request.param].sort().values


# ----------------------------------------------------------------------- eigenpairs


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [1, 4])
def test_eigenpairs(values, solver, which, k):
    if solver == "lanczos" and len(values.unique()) < N and k > 1:
        pytest.skip("one Krylov vector sees one copy of a multiple eigenvalue")
    if solver == "lobpcg" and which == "smallest" and 0 < values[0] < 0.01:
        pytest.skip("needs a preconditioner: the gap is 1e-6 of the norm")
    A = matrix(values)
    pairs = SOLVERS[solver](A, k, which=which, generator=gen())
    assert pairs.converged
    expected = values.flip(0)[:k] if which == "largest" else values[:k]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-9, atol=1e-7)
    V = pairs.vectors
    torch.testing.assert_close(V.mT @ V, torch.eye(k).double(), rtol=0, atol=1e-12)
    residuals = torch.linalg.vector_norm(A @ V - V * pairs.values, dim=0)
    torch.testing.assert_close(pairs.residuals, residuals, rtol=1e-6, atol=1e-12)
    assert pairs.vectors.dtype == torch.float64


def test_lobpcg_finds_multiplicities():
    values = SPECTRA["clustered"]
    pairs = lobpcg(matrix(values), 4, generator=gen())
    expected = values.sort(descending=True).values[:4]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), data=st.data())
def test_small_matrices_are_solved_whole(n, seed, data):
    k = data.draw(st.integers(1, n))
    root = torch.randn(n, n, generator=gen(seed), dtype=torch.float64)
    A = root + root.mT
    for solver in SOLVERS.values():
        pairs = solver(A, k, tolerance=1e-9, generator=gen(seed))
        expected = torch.linalg.eigvalsh(A).flip(0)[:k]
        torch.testing.assert_close(pairs.values, expected, rtol=1e-8, atol=1e-8)


def test_lobpcg_stops_when_the_space_is_exhausted():
    A = matrix(torch.linspace(1, 2, 6, dtype=torch.float64))
    pairs = lobpcg(A, 4, tolerance=0.0, generator=gen())
    assert not pairs.converged
    assert pairs.num_products < 400
    expected = torch.linalg.eigvalsh(A).flip(0)[:4]
    torch.testing.assert_close(pairs.values, expected)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scalar", [0.0, 3.0])
def test_multiples_of_the_identity(solver, scalar):
    A = scalar * torch.eye(10, dtype=torch.float64)
    pairs = SOLVERS[solver](A, 3, generator=gen())
    assert pairs.converged
    torch.testing.assert_close(pairs.values, torch.full((3,), scalar).double())


def test_re_orthogonalisation_keeps_ghosts_out():
    """Without it, the converged largest eigenvalue comes back as copies."""
    values = torch.cat([torch.linspace(0, 1, 99), torch.tensor([100.0])]).double()
    pairs = lanczos(
        matrix(values), 3, tolerance=1e-10, max_products=80, generator=gen()
    )
    assert pairs.values[1] < 1.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_unfinished_eigenpairs_say_so(solver):
    limit = {"lanczos": {"max_products": 6}, "lobpcg": {"max_iterations": 2}}[solver]
    A = matrix(SPECTRA["uniform"])
    pairs = SOLVERS[solver](A, 3, tolerance=1e-12, generator=gen(), **limit)
    assert not pairs.converged
    # The bound that residuals give holds all the same.
    distance = (pairs.values[:, None] - SPECTRA["uniform"]).abs().min(dim=1).values
    assert (distance <= pairs.residuals).all()


def test_a_preconditioner_speeds_up_the_smallest():
    values = torch.linspace(1, 1e4, 400, dtype=torch.float64)
    A = matrix(values)
    inverse = torch.linalg.inv(A + matrix(torch.rand(400, generator=gen()).double()))
    plain = lobpcg(A, 2, which="smallest", tolerance=1e-9, generator=gen())
    better = lobpcg(
        A,
        2,
        which="smallest",
        preconditioner=lambda r: inverse @ r,
        tolerance=1e-9,
        generator=gen(),
    )
    assert better.converged
    assert better.num_products < plain.num_products / 2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("k", [0, 11])
def test_bad_counts(solver, k):
    with pytest.raises(ValueError, match=f"between 1 and 10, got {k}"):
        SOLVERS[solver](torch.eye(10), k)


def test_single_precision_stays_single():
    A = matrix(SPECTRA["decaying"]).float()
    for solver in SOLVERS.values():
        pairs = solver(A, 2, generator=gen())
        assert pairs.converged
        assert pairs.values.dtype == pairs.vectors.dtype == torch.float32
        expected = SPECTRA["decaying"][:2].float()
        torch.testing.assert_close(pairs.values, expected, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------ quadrature


def test_density_has_the_moments_and_the_shape_of_the_spectrum(values):
    A = matrix(values)
    density = spectral.spectral_density(A, num_steps=40, width=0.3, generator=gen())
    step = density.grid[1] - density.grid[0]
    mass = density.value.sum() * step
    assert abs(float(mass) - 1) < 1e-3
    bumps = torch.exp(-0.5 * ((density.grid - values[:, None]) / 0.3) ** 2)
    truth = bumps.mean(dim=0) / (0.3 * (2 * math.pi) ** 0.5)
    error = torch.linalg.vector_norm(density.value - truth)
    assert error <= 3 * torch.linalg.vector_norm(density.standard_error) + 1e-6
    torch.testing.assert_close(density.weights.sum(dim=1), torch.ones(10).double())


def test_density_gives_traces_of_functions():
    values = SPECTRA["decaying"]
    A = matrix(values)
    density = spectral.spectral_density(A, num_probes=20, generator=gen())
    dimension = density.trace_of(lambda x: x / (x + 0.1))
    truth = (values / (values + 0.1)).sum()
    assert (dimension.value - truth).abs() < 4 * dimension.standard_error


def test_density_on_a_given_grid_and_of_the_identity():
    grid = torch.linspace(0, 2, 11, dtype=torch.float64)
    A = torch.eye(30, dtype=torch.float64)
    density = spectral.spectral_density(A, grid=grid, width=0.1, generator=gen())
    assert density.value.argmax() == 5
    assert density.converged
    assert density.num_products == 10  # one step exhausts every probe
    assert spectral.spectral_density(A, generator=gen()).value.isfinite().all()


@pytest.mark.parametrize("damping", [0.1, 1.0])
def test_log_determinant(damping):
    values = SPECTRA["decaying"]
    estimate = spectral.log_determinant(
        matrix(values), damping, num_probes=20, num_steps=60, generator=gen()
    )
    truth = (values + damping).log().sum()
    assert (estimate.value - truth).abs() < 4 * estimate.standard_error


def test_log_determinant_of_an_indefinite_matrix():
    with pytest.raises(ValueError, match=r"eigenvalue near -1 with damping=0\.5"):
        spectral.log_determinant(matrix(SPECTRA["uniform"]), 0.5)
    with pytest.raises(ValueError, match="num_probes must be at least 2, got 1"):
        spectral.log_determinant(torch.eye(3), num_probes=1)


def test_no_steps_and_unknown_ends():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        spectral.spectral_density(torch.eye(3), num_steps=0)
    for solver in SOLVERS.values():
        with pytest.raises(ValueError, match=r"\('largest', 'smallest'\), got 'LA'"):
            solver(torch.eye(3), 1, which="LA")


@pytest.mark.parametrize("solver", SOLVERS)
def test_autocast_does_not_matter(solver):
    A = matrix(SPECTRA["decaying"]).float()
    expected = SOLVERS[solver](A, 3, generator=gen()).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SOLVERS[solver](operator=A, k=3, generator=gen())
    torch.testing.assert_close(found.values, expected)
    assert found.converged


def test_what_is_not_finite_is_said():
    A = torch.full((9, 9), torch.nan)
    for solver in SOLVERS.values():
        with pytest.raises(ValueError, match="products are not finite"):
            solver(A, 2)
    with pytest.raises(ValueError, match="products are not finite"):
        spectral.log_determinant(A)
    for estimator in (spectral.xtrace, spectral.hutchpp_trace, spectral.xdiag):
        assert not estimator(A).converged


# ---------------------------------------------------------------- conjugate gradients


def test_conjugate_gradients_of_small_numbers():
    """Squares of such right-hand sides underflow in single precision."""
    A = matrix(torch.linspace(1, 50, 40, dtype=torch.float64)).float()
    rhs = torch.randn(40, 2, generator=gen()) * torch.tensor([1e-25, 1.0])
    solution = spectral.conjugate_gradient(1e-10 * A, rhs, damping=1e-10)
    assert solution.converged
    eye = torch.eye(40, dtype=torch.float64)
    truth = torch.linalg.solve(1e-10 * (A.double() + eye), rhs.double())
    for found, expected in zip(solution.value.mT, truth.mT, strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 1)])
def test_right_hand_sides_are_columns(shape):
    with pytest.raises(ValueError, match=r"shape \[3, k\], got .*unsqueeze\(1\)"):
        spectral.conjugate_gradient(torch.eye(3), torch.ones(shape))


@settings(max_examples=15)
@given(n=st.integers(1, 30), k=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_conjugate_gradients_solve(n, k, seed):
    A = matrix(torch.linspace(0, 10, n, dtype=torch.float64), seed)
    rhs = torch.randn(n, k, generator=gen(seed), dtype=torch.float64)
    solution = spectral.conjugate_gradient(A, rhs, damping=0.5, tolerance=1e-12)
    assert solution.converged
    truth = torch.linalg.solve(A + 0.5 * torch.eye(n).double(), rhs)
    torch.testing.assert_close(solution.value, truth, rtol=1e-9, atol=1e-10)


def test_zero_right_hand_sides_need_no_iterations():
    solution = spectral.conjugate_gradient(torch.eye(3), torch.zeros(3, 2))
    assert solution.iterations == 0
    assert solution.converged
    assert (solution.value == 0).all()


def test_columns_that_converge_early_stand_still():
    A = torch.diag(torch.linspace(1, 50, 40, dtype=torch.float64))
    rhs = torch.randn(40, 2, generator=gen(), dtype=torch.float64)
    rhs[1:, 0] = 0  # an eigenvector: one iteration
    solution = spectral.conjugate_gradient(A, rhs, tolerance=1e-12)
    torch.testing.assert_close(solution.value, rhs / A.diagonal()[:, None])


def test_unfinished_conjugate_gradients_say_so():
    A = matrix(SPECTRA["decaying"])
    rhs = torch.randn(N, 1, generator=gen(), dtype=torch.float64)
    solution = spectral.conjugate_gradient(A, rhs, damping=1e-3, max_iterations=3)
    assert not solution.converged
    residual = rhs - A @ solution.value - 1e-3 * solution.value
    expected = torch.linalg.vector_norm(residual) / torch.linalg.vector_norm(rhs)
    torch.testing.assert_close(solution.residual[0], expected)


# -------------------------------------------------------------------------- operators


def test_callables_are_operators():
    A = matrix(SPECTRA["decaying"])
    operator = FunctionOperator(lambda v: A @ v, N, torch.float64, torch.device("cpu"))
    assert operator.shape == (N, N)
    one = spectral.xtrace(operator, 20, generator=gen())
    two = spectral.xtrace(A, 20, generator=gen())
    assert torch.equal(one.value, two.value)
    assert float(one) == float(one.value)


def test_curvature_matrices_are_operators():
    for name in ("dense", "kfac", "ekfac", "low_rank", "implicit"):
        case = CASES[name]()
        pairs = lobpcg(case.matrix, 2, generator=gen())
        expected = torch.linalg.eigvalsh(case.dense).flip(0)[:2]
        torch.testing.assert_close(pairs.values, expected)


def test_single_precision_over_millions_of_rows():
    """Sums of as many products keep their digits, so residuals are what they say."""
    n = 1_000_000
    generator = torch.Generator().manual_seed(0)
    entries = torch.rand(n, generator=generator)
    entries[:4] = torch.tensor([20.0, 12.0, 7.0, 4.0])
    operator = FunctionOperator(
        lambda columns: entries[:, None] * columns,
        n,
        torch.float32,
        torch.device("cpu"),
    )
    found = lanczos(operator, 2, tolerance=3e-6, generator=generator)
    assert found.converged  # by fresh products
    assert found.values.tolist() == pytest.approx([20, 12], rel=2e-6)
    exact = found.vectors.double()
    residuals = (entries[:, None] * exact - exact * found.values).norm(dim=0)
    assert float(residuals.max()) < 3e-6 * 20


def test_single_precision_bases_of_millions_of_rows():
    """Orthonormal to ``eps sqrt(k)`` at ResNet-18's size; noise is told from news."""
    n = 11_000_000
    columns = torch.randn(n, 2, generator=gen())
    basis = orthonormal(columns[:, :1])
    mixed = torch.stack([basis[:, 0], basis[:, 0] + 1e-4 * columns[:, 1] / n**0.5], 1)
    found = orthonormal(mixed, basis)  # one is in the span, one nearly
    assert found.shape == (n, 1)
    whole = torch.cat([basis, found], dim=1).double()
    assert (whole.mT @ whole - torch.eye(2)).abs().max() < 2e-7
    along = float(found[:, 0].double() @ columns[:, 1].double()) / n**0.5
    assert abs(along) > 0.999  # the direction itself, to the digits it came with


def test_lobpcg_in_single_precision_over_millions_of_rows():
    """The residuals' default tolerance is reached; values to single precision."""
    n = 2_000_000
    values = torch.linspace(0, 1, n)
    values[:4] = torch.tensor([30.0, 20.0, 20.0, 10.0])
    values = values[torch.randperm(n, generator=torch.Generator().manual_seed(0))]

    def multiply(columns: Tensor) -> Tensor:
        return values[:, None] * columns

    operator = FunctionOperator(multiply, n, torch.float32, torch.device("cpu"))
    pairs = lobpcg(operator, 3, generator=gen())
    assert pairs.converged
    assert pairs.num_products < 60
    expected = torch.tensor([30.0, 20.0, 20.0])
    torch.testing.assert_close(pairs.values, expected, rtol=1e-6, atol=0)
    assert (pairs.residuals < 30 * torch.finfo(torch.float32).eps ** 0.5).all()
    vectors = pairs.vectors.double()
    assert (vectors.mT @ vectors - torch.eye(3)).abs().max() < 2e-6
