"""The measures of an approximation's quality, against their definitions."""

from __future__ import annotations

import pytest
import torch
from matrix_cases import SPACE, positive, randn
from scipy.stats import t as student
from test_estimate import network, uneven

import ekfac
from ekfac.diagnostics import approximation_quality
from ekfac.diagnostics.quality import Interval
from ekfac.errors import StateMismatchError
from ekfac.matrices import DenseMatrix, DiagonalMatrix, ImplicitMatrix
from ekfac.vectors import VectorSpace


def pair() -> tuple[DenseMatrix, DiagonalMatrix]:
    F = DenseMatrix(SPACE, positive(SPACE.size))
    return F, DiagonalMatrix(F.diagonal())


def test_a_perfect_approximation():
    F, _ = pair()
    found = approximation_quality(F, F, generator=torch.Generator().manual_seed(0))
    assert found.trace_error == 0
    assert found.quadratic_error.high == 0
    assert found.product_residual.high == 0
    assert found.product_cosine.low == pytest.approx(1, abs=1e-12)
    for damping in (1e-4, 1e-2, 1.0):
        assert found.solve_residual[damping].high < 1e-8
        assert found.solve_cosine[damping].low == pytest.approx(1, abs=1e-8)


def test_every_measure_is_its_definition():
    F, D = pair()
    d, m = 0.1, 7
    found = approximation_quality(
        D, F, damping=d, num_vectors=m, generator=torch.Generator().manual_seed(5)
    )
    v = randn(SPACE.size, m, seed=5)
    v = v / v.norm(dim=0)
    A, B = D.to_dense(), F.to_dense()
    eye = torch.eye(SPACE.size, dtype=torch.float64)
    w = torch.linalg.solve(A + d * eye, (B + d * eye) @ v)
    forms = [torch.einsum("im,ij,jm->m", v, M, v) for M in (A, B)]
    products = [A @ v, B @ v]
    cosine = torch.nn.functional.cosine_similarity
    for interval, values in (
        (found.quadratic_error, ((forms[0] - forms[1]) / forms[1]).abs()),
        (
            found.product_residual,
            (products[0] - products[1]).norm(dim=0) / products[1].norm(dim=0),
        ),
        (found.product_cosine, cosine(*products, dim=0)),
        (found.solve_residual[d], (w - v).norm(dim=0)),
        (found.solve_cosine[d], cosine(w, v, dim=0)),
    ):
        assert interval.mean == pytest.approx(float(values.mean()), rel=1e-9)
        error = float(values.std()) / m**0.5
        assert interval.standard_error == pytest.approx(error, rel=1e-6)
        reach = student.ppf(0.975, m - 1) * error
        assert interval.high - interval.mean == pytest.approx(reach, rel=0.01)
    scaled = approximation_quality(2 * F, F, damping=d)
    assert scaled.trace_error == pytest.approx(1)
    assert str(d) in str(scaled)
    assert scaled.structure == "dense"


@pytest.mark.parametrize("count", [2, 3, 4, 6, 20, 100])
def test_intervals_are_students(count):
    values = randn(count)
    found = Interval.of(values)
    expected = student.interval(
        0.95, count - 1, float(values.mean()), float(values.std()) / count**0.5
    )
    half = (expected[1] - expected[0]) / 2
    assert found.low == pytest.approx(expected[0], abs=0.01 * half)
    assert found.high == pytest.approx(expected[1], abs=0.01 * half)


def test_ekfac_has_the_exact_trace_and_beats_kfac_in_products():
    model, x = network("Conv2d")
    F = ekfac.fisher(model, uneven(x), "implicit")
    blocks = ekfac.fisher(model, uneven(x), "block_diagonal")
    found = {
        structure: approximation_quality(
            ekfac.fisher(model, uneven(x), structure),
            F,
            num_vectors=200,
            generator=torch.Generator().manual_seed(0),
        )
        for structure in ("ekfac", "kfac", "diagonal")
    }
    assert found["ekfac"].trace_error < 1e-10
    assert found["diagonal"].trace_error < 1e-10
    assert found["kfac"].trace_error > 1e-3
    inside = [
        float((found_matrix.to_dense() - blocks.to_dense()).norm())
        for found_matrix in (
            ekfac.fisher(model, uneven(x), "ekfac"),
            ekfac.fisher(model, uneven(x), "kfac"),
        )
    ]
    assert inside[0] < inside[1]
    residuals = {s: q.product_residual.mean for s, q in found.items()}
    assert residuals["ekfac"] < residuals["diagonal"]


def test_an_implicit_matrix_is_only_multiplied_with():
    F, D = pair()
    products = []

    def multiply(columns: torch.Tensor) -> torch.Tensor:
        products.append(columns.shape[1])
        return F.matrix @ columns

    implicit = ImplicitMatrix(SPACE, multiply, dtype=torch.float64)
    approximation_quality(D, implicit, num_vectors=5, trace=float(F.trace()))
    assert products == [5]


@pytest.mark.parametrize("scale", [1e-12, 1e-18])
def test_small_matrices_are_judged_like_large_ones(scale):
    """Near a minimum the curvature of a network is small, in single precision."""
    F, D = (matrix.to(dtype=torch.float32) for matrix in pair())
    large, small = (
        approximation_quality(
            factor * D,
            factor * F,
            damping=factor,
            num_vectors=5,
            generator=torch.Generator().manual_seed(0),
        )
        for factor in (1.0, scale)
    )
    for name in ("quadratic_error", "product_residual", "product_cosine"):
        expected = getattr(large, name).mean
        assert getattr(small, name).mean == pytest.approx(expected, rel=1e-4)
    expected = large.solve_cosine[1.0].mean
    assert small.solve_cosine[scale].mean == pytest.approx(expected, rel=1e-4)


def test_errors_say_what_to_do():
    F, D = pair()
    with pytest.raises(ValueError, match="F has trace 0"):
        approximation_quality(D, 0.0 * F)
    other = DenseMatrix(VectorSpace({"w": (2,)}), positive(2))
    with pytest.raises(StateMismatchError, match="same parameters"):
        approximation_quality(other, F)
    for damping in (0.0, -1.0, float("inf"), [1.0, 0.0]):
        with pytest.raises(ValueError, match="positive"):
            approximation_quality(D, F, damping=damping)
    with pytest.raises(ValueError, match="at least 2"):
        approximation_quality(D, F, num_vectors=1)
