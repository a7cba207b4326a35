"""Random-matrix diagnostics on matrices whose statistics are known (Haink 3A.10)."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from ekfac import diagnostics as d
from ekfac.spectral.eigensolvers import singular_value_density

pytestmark = pytest.mark.usefixtures("float64")


def gaussian_orthogonal(n: int) -> torch.Tensor:
    noise = torch.randn(n, n)
    return torch.linalg.eigvalsh((noise + noise.mT) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_edge_of_a_random_matrix(seed):
    torch.manual_seed(seed)
    found = d.marchenko_pastur_edge(0.3 * torch.randn(400, 200))
    assert found.converged
    assert found.outliers <= 1
    assert found.sigma == pytest.approx(0.3, rel=0.02)
    assert found.value == pytest.approx(0.3 * (400**0.5 + 200**0.5), rel=0.02)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_planted_spikes_stand_out(k):
    noise = torch.randn(300, 200)
    U, V = (
        torch.linalg.qr(torch.randn(300, k))[0],
        torch.linalg.qr(torch.randn(200, k))[0],
    )
    strength = torch.linspace(120, 60, k)
    found = d.marchenko_pastur_edge(noise + (U * strength) @ V.mT)
    assert found.outliers == k
    # The plain deviation, spikes included, would put the edge too high.
    assert found.sigma == pytest.approx(1, rel=0.02)


def test_density_of_singular_values():
    shape, sigma = (300, 100), 0.5
    grid = torch.linspace(0, 20, 20001)
    density = singular_value_density(grid, shape, sigma)
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-3)
    second = float(torch.trapezoid(density * grid**2, grid))
    assert second == pytest.approx(sigma**2 * 300, rel=1e-3)
    values = torch.linalg.svdvals(sigma * torch.randn(shape))
    share = float(torch.trapezoid(density[:8001], grid[:8001]))
    assert float((values < 8.0).double().mean()) == pytest.approx(share, abs=0.03)
    transposed = singular_value_density(grid, shape[::-1], sigma)
    assert torch.equal(density, transposed)
    with pytest.raises(ValueError, match="two dimensions"):
        d.marchenko_pastur_edge(torch.randn(3))


def test_levels_of_a_random_symmetric_matrix_repel():
    found = d.level_spacings(gaussian_orthogonal(600))
    assert float(found.value.mean()) == pytest.approx(1, abs=0.02)
    assert found.p_value > 0.01
    assert found.statistic < 0.06 < found.poisson_statistic


def test_independent_levels_do_not():
    found = d.level_spacings(torch.rand(600))
    assert found.p_value < 1e-6
    assert found.poisson_statistic < 0.08 < found.statistic


def test_distance_and_p_value_are_scipys():
    found = d.level_spacings(gaussian_orthogonal(300))
    scale = math.sqrt(2 / math.pi)  # Wigner's surmise is a Rayleigh distribution
    expected = stats.kstest(found.value.numpy(), stats.rayleigh(scale=scale).cdf)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.03)
    poisson = stats.kstest(found.value.numpy(), "expon").statistic
    assert found.poisson_statistic == pytest.approx(poisson, rel=1e-9)


def test_levels_that_cannot_be_unfolded():
    with pytest.raises(ValueError, match="more than 42"):
        d.level_spacings(torch.rand(42))
    with pytest.raises(ValueError, match="repeated"):
        d.level_spacings(torch.cat([torch.ones(50), torch.rand(50)]))


def test_the_null_space_has_no_levels():
    """Rounding errors of null directions look like a random matrix's spectrum."""
    levels = torch.rand(150) + 0.01
    basis = torch.linalg.qr(torch.randn(400, 400)).Q[:, :150]
    H = (basis * levels) @ basis.mT
    found = d.level_spacings(torch.linalg.eigvalsh((H + H.mT) / 2))
    expected = d.level_spacings(levels)
    assert len(found.value) == len(expected.value)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-6)
    single = d.level_spacings(torch.linalg.eigvalsh((H + H.mT).float() / 2))
    assert len(single.value) == len(expected.value)
    with pytest.raises(ValueError, match="got 20 of 70"):
        d.level_spacings(torch.cat([1e-15 * torch.randn(50), torch.rand(20) + 0.1]))


def test_random_eigenvectors_pass_porter_thomas(generator):
    basis = torch.linalg.qr(torch.randn(300, 300)).Q
    found = d.porter_thomas(basis, generator=generator)
    assert float(found.p_value.mean()) == pytest.approx(0.5, abs=0.06)
    expected = stats.kstest((basis[:, 0] * 300**0.5).numpy(), "norm").statistic
    assert float(found.statistic[0]) == pytest.approx(expected, rel=1e-9)
    p = (float(found.p_value[0]) * 200 + 2) / 204
    error = (p * (1 - p) / 204) ** 0.5
    assert float(found.standard_error[0]) == pytest.approx(error)
    with pytest.raises(ValueError, match="at least 2, got 0"):
        d.porter_thomas(basis, num_samples=0)


def test_structured_eigenvectors_fail_it(generator):
    n = 300
    waves = torch.linspace(0, 1, n)[:, None] * torch.arange(1, 20)
    found = d.porter_thomas((2 * math.pi * waves).sin(), generator=generator)
    assert float(found.p_value.max()) < 0.02
    assert float(d.porter_thomas(torch.eye(n)[:, :2]).p_value.max()) == 0
