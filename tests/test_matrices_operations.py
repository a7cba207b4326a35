"""Every operation of every structure, against the same on the dense matrix."""

from __future__ import annotations

import warnings

import pytest
import torch
from matrix_cases import CASES, Case, close, randn, vector_of
from torch import Tensor

from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.vectors import ParameterVector

DAMPINGS = [0.1, 3.0]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture
def invertible(case) -> Case:
    """Cases whose solve is that of the matrix itself."""
    if case.inverse_is_its_own:
        pytest.skip("the quasi-diagonal inverse is tested on its own")
    return case


def damped(case: Case, damping: float) -> Tensor:
    return case.dense + damping * torch.eye(len(case.dense), dtype=torch.float64)


def test_to_dense(case):
    close(case.matrix.to_dense(), case.dense)
    assert case.matrix.shape == case.dense.shape


def test_product_with_every_form_of_vector(case):
    space = case.matrix.space
    v = vector_of(space)
    product = case.matrix @ v
    assert isinstance(product, ParameterVector)
    close(product.flat(), case.dense @ v.flat())
    close(case.matrix @ v.flat(), case.dense @ v.flat())
    columns = randn(space.size, 3)
    close(case.matrix @ columns, case.dense @ columns)


def test_product_keeps_the_order_of_the_vector(case):
    v = vector_of(case.matrix.space)
    reversed_v = v.subset(reversed(list(v)))
    product = case.matrix @ reversed_v
    assert list(product) == list(reversed_v)
    close(case.matrix.space.flat(product), case.dense @ v.flat())


def test_quadratic(case):
    v = vector_of(case.matrix.space)
    close(case.matrix.quadratic(v), v.flat() @ case.dense @ v.flat())
    columns = randn(case.matrix.size, 3)
    close(case.matrix.quadratic(columns), (columns * (case.dense @ columns)).sum(0))


def test_quadratic_has_the_gradient_of_a_penalty(case):
    v = vector_of(case.matrix.space).map(lambda t: t.clone().requires_grad_())
    case.matrix.quadratic(v).backward()
    gradient = v.map(lambda t: torch.zeros_like(t) if t.grad is None else t.grad)
    close(gradient.flat(), 2 * case.dense @ v.detach().flat())


@pytest.mark.parametrize("damping", DAMPINGS)
def test_solve(invertible, damping):
    matrix, v = invertible.matrix, vector_of(invertible.matrix.space)
    expected = torch.linalg.solve(damped(invertible, damping), v.flat())
    solution = matrix.solve(v, damping)
    assert isinstance(solution, ParameterVector)
    close(solution.flat(), expected)
    close(matrix.solve(v.flat(), damping), expected)
    columns = randn(matrix.size, 3)
    expected = torch.linalg.solve(damped(invertible, damping), columns)
    close(matrix.solve(columns, damping), expected)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_logdet(invertible, damping):
    expected = torch.linalg.slogdet(damped(invertible, damping)).logabsdet
    close(invertible.matrix.logdet(damping), expected)


def test_trace_and_norm_and_diagonal(case):
    close(case.matrix.trace(), case.dense.trace())
    close(case.matrix.frobenius_norm(), torch.linalg.matrix_norm(case.dense))
    diagonal = case.matrix.diagonal()
    assert isinstance(diagonal, ParameterVector)
    assert diagonal.space == case.matrix.space
    close(diagonal.flat(), case.dense.diagonal())
    for entries in diagonal.values():
        entries.add_(1)  # a copy
    close(case.matrix.to_dense(), case.dense)


def test_eigenvalues(case):
    close(case.matrix.eigenvalues(), torch.linalg.eigvalsh(case.dense))


@pytest.mark.parametrize("k", [1, 3, "P"])
def test_top_eigenpairs(case, k):
    k = case.matrix.size if k == "P" else k
    pairs = case.matrix.top_eigenpairs(k)
    close(pairs.values, torch.linalg.eigvalsh(case.dense).flip(0)[:k])
    close(pairs.vectors.mT @ pairs.vectors, torch.eye(k, dtype=torch.float64))
    residual = case.dense @ pairs.vectors - pairs.vectors * pairs.values
    assert torch.linalg.matrix_norm(residual) < 1e-10 * case.matrix.frobenius_norm()
    assert pairs.converged


@pytest.mark.parametrize("exponent", [-1, 0.5, -0.5, 2])
def test_power(invertible, exponent):
    values, vectors = torch.linalg.eigh(damped(invertible, 0.2))
    expected = (vectors * values**exponent) @ vectors.mT
    power = invertible.matrix.power(exponent, 0.2)
    close(power.to_dense(), expected)
    close(power.trace(), expected.trace())
    close(power.eigenvalues(), values.pow(exponent).sort().values)


def test_root_squares_to_the_matrix(invertible):
    root = invertible.matrix.power(0.5).to_dense()
    close(root @ root, invertible.dense)


def test_samples_have_the_inverse_as_covariance(invertible, monkeypatch):
    """A sample is linear in its noise: unit noise gives the columns of the root."""
    matrix = invertible.matrix
    units = iter(torch.eye(matrix.size, dtype=torch.float64))
    monkeypatch.setattr(
        "ekfac.matrices.base.standard_normal", lambda *_, **__: next(units)[None]
    )
    samples = [matrix.sample(0.3).flat() for _ in range(matrix.size)]
    root = torch.stack(samples, dim=1)
    close(root @ root.mT, torch.linalg.inv(damped(invertible, 0.3)))


def test_samples_follow_the_generator(case):
    draws = [
        case.matrix.sample(1.0, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert isinstance(draws[0], ParameterVector)
    assert torch.equal(draws[0].flat(), draws[1].flat())
    assert not torch.equal(draws[0].flat(), draws[2].flat())


def test_autocast_does_not_matter(invertible):
    F = invertible.matrix.to(dtype=torch.float32)
    v = vector_of(F.space).to(dtype=torch.float32).flat()
    operations = [
        lambda: F @ v,
        lambda: F.quadratic(v),
        lambda: F.solve(v, 0.1),
        lambda: F.logdet(0.1),
        lambda: F.diagonal().flat(),
        lambda: F.top_eigenpairs(3).values,
        F.to_dense,
        F.trace,
        F.eigenvalues,
    ]
    for operation in operations:
        expected = operation()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = operation()
        torch.testing.assert_close(found, expected)


def test_scaling(case):
    close((2.5 * case.matrix).to_dense(), 2.5 * case.dense)
    close((case.matrix * 2.5).trace(), 2.5 * case.dense.trace())
    close((case.matrix / 4).to_dense(), case.dense / 4)


def test_to_another_precision(case):
    single = case.matrix.to(dtype=torch.float32)
    v = vector_of(case.matrix.space).to(dtype=torch.float32)
    product = single @ v
    assert product.dtype == single.dtype == torch.float32
    expected = (case.dense @ v.flat().double()).float()
    torch.testing.assert_close(product.flat(), expected, rtol=1e-4, atol=1e-4)
    assert case.matrix.dtype == torch.float64


def test_a_vector_of_lower_precision_is_raised(case):
    v = vector_of(case.matrix.space).to(dtype=torch.bfloat16)
    product = case.matrix @ v
    close(product.flat(), case.dense @ v.flat().double())


def test_a_vector_of_higher_precision_is_refused(case):
    single = case.matrix.to(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"float64 and the matrix torch\.float32"):
        single @ vector_of(case.matrix.space)


def test_vectors_of_another_model_are_refused(case):
    v = vector_of(case.matrix.space)
    name = list(v)[-1]
    with pytest.raises(StateMismatchError, match=f"it lacks '{next(iter(v))}'"):
        case.matrix @ ParameterVector({"other": v[name]})
    with pytest.raises(StateMismatchError, match="it has 'other', unknown here"):
        case.matrix @ ParameterVector({**v, "other": v[name]})
    wrong = ParameterVector({**v, name: v[name][:1, ...]})
    with pytest.raises(StateMismatchError, match=name):
        case.matrix.solve(wrong, 1.0)
    with pytest.raises(StateMismatchError, match=rf"\[{case.matrix.size}\]"):
        case.matrix @ torch.ones(case.matrix.size + 1, dtype=torch.float64)


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_bad_damping_is_refused(case, damping):
    v = vector_of(case.matrix.space)
    for call in (
        case.matrix.logdet,
        case.matrix.sample,
        lambda d: case.matrix.solve(v, d),
    ):
        with pytest.raises(ValueError, match=f"damping must be .* got {damping}"):
            call(damping)


@pytest.mark.parametrize("k", [0, -1, 1000])
def test_bad_counts_are_refused(case, k):
    with pytest.raises(ValueError, match=f"between 1 and {case.matrix.size}, got {k}"):
        case.matrix.top_eigenpairs(k)


def test_factored_damping_is_refused_by_all_but_kfac(case):
    v = vector_of(case.matrix.space)
    if case.matrix.structure == "kfac":
        case.matrix.solve(v, 0.1, damping_split="factored")
        return
    with pytest.raises(UnsupportedOperationError, match="structure='kfac'"):
        case.matrix.solve(v, 0.1, damping_split="factored")


def test_nothing_warns_and_repr_says_what_it_is(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = repr(case.matrix)
        case.matrix.solve(vector_of(case.matrix.space), 1.0)
    assert f"{case.matrix.size} x {case.matrix.size}" in text
    assert case.matrix.structure in text
