"""Matrices known only through their products."""

from __future__ import annotations

import pytest
import torch
from matrix_cases import (
    CASES,
    SPACE,
    close,
    conv_layer,
    kfac_dense,
    linear_layer,
    randn,
    vector_of,
)

from ekfac.errors import (
    EkfacWarning,
    StateMismatchError,
    UnsupportedOperationError,
)
from ekfac.matrices import (
    BlockDiagonalMatrix,
    DiagonalMatrix,
    ImplicitMatrix,
    KFACMatrix,
)
from ekfac.vectors import VectorSpace

LINEAR = SPACE.subspace(["fc.weight", "fc.bias"])


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


# ------------------------------------------------------------------------ implicit

BIG = VectorSpace({"w": (20, 10), "b": (20,)})


def big(damping: float = 1e-2) -> tuple[ImplicitMatrix, torch.Tensor]:
    """Return a matrix that may not be formed, and its dense form."""
    spectrum = torch.logspace(2, -2, BIG.size, dtype=torch.float64)
    Q = torch.linalg.qr(randn(BIG.size, BIG.size)).Q
    D = (Q * spectrum) @ Q.mT
    F = ImplicitMatrix(
        BIG,
        lambda v: D @ v,
        dtype=torch.float64,
        dense_limit=0,
        tolerance=0.2,
        generator=torch.Generator().manual_seed(1),
    )
    return F, D


def test_implicit_solve_reaches_its_tolerance():
    F, D = big()
    v = randn(BIG.size, 2)
    close(F.solve(v, 0.1), torch.linalg.solve(D + 0.1 * eye(BIG.size), v), 1e-9)
    solution = F.solution(v, 0.1)
    assert solution.converged
    assert solution.residual.max() < 1e-11


def test_a_preconditioner_of_any_structure_saves_products():
    _, D = big()
    scales = torch.logspace(3, 0, BIG.size, dtype=torch.float64)
    D = D / 100 + torch.diag(scales)
    preconditioner = DiagonalMatrix(BIG.vector(D.diagonal()))
    plain = ImplicitMatrix(BIG, lambda v: D @ v, dtype=torch.float64)
    better = ImplicitMatrix(
        BIG, lambda v: D @ v, dtype=torch.float64, preconditioner=preconditioner
    )
    v = vector_of(BIG)
    one, two = plain.solution(v, 0.1), better.solution(v, 0.1)
    assert two.iterations < one.iterations / 3
    close(one.value, two.value)
    given_later = plain.solution(v, 0.1, preconditioner=preconditioner)
    assert given_later.iterations == two.iterations


def test_an_unfinished_solve_warns_with_its_residual():
    F, _ = big()
    with pytest.warns(
        EkfacWarning, match=r"stopped after 3 iterations at a relative"
    ) as caught:
        F.solve(vector_of(BIG), 1e-3, max_iterations=3)
    assert caught[0].filename == __file__


def test_conjugate_gradients_refuse_an_indefinite_matrix():
    D = torch.diag(torch.linspace(-1, 1, BIG.size, dtype=torch.float64))
    F = ImplicitMatrix(BIG, lambda v: D @ v, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"direction of curvature -.* damping=0\.1"):
        F.solve(vector_of(BIG), 0.1)


def test_a_preconditioner_of_another_model_is_refused():
    F, _ = big()
    with pytest.raises(StateMismatchError, match="The other matrix"):
        F.solve(vector_of(BIG), 0.1, preconditioner=CASES["dense"]().matrix)


@pytest.mark.parametrize("fits", [True, False])
def test_implicit_estimates_are_within_their_errors(fits, monkeypatch):
    if not fits:
        monkeypatch.setattr("ekfac.matrices.implicit._SKETCH_LIMIT", 0)
    F, D = big()
    pairs = [
        (F.estimate_trace(), D.trace()),
        (F.estimate_squared_norm(), D.square().sum()),
        (F.estimate_logdet(0.1), torch.logdet(D + 0.1 * eye(BIG.size))),
    ]
    for estimate, truth in pairs:
        assert (estimate.value - truth).abs() <= 4 * estimate.standard_error + 1e-8
        assert estimate.num_products <= F.num_products
    diagonal = F.estimate_diagonal()
    error = torch.linalg.vector_norm(diagonal.value - D.diagonal())
    assert error <= 2 * torch.linalg.vector_norm(diagonal.standard_error)
    close(F.trace(), D.trace(), 0.5)
    close(F.frobenius_norm(), torch.linalg.matrix_norm(D), 0.5)
    close(F.logdet(0.1), torch.logdet(D + 0.1 * eye(BIG.size)), 0.5)
    close(F.diagonal().flat(), D.diagonal(), 0.5)


def test_an_estimate_with_a_large_error_warns():
    F, _ = big()
    F.tolerance = 1e-9
    with pytest.warns(
        EkfacWarning, match=r"trace has a relative standard error .* 200"
    ) as caught:
        F.trace()
    assert caught[0].filename == __file__


def test_implicit_top_eigenpairs():
    F, D = big()
    pairs = F.top_eigenpairs(3)
    assert pairs.converged
    close(pairs.values, torch.linalg.eigvalsh(D).flip(0)[:3])


def test_what_an_implicit_matrix_cannot_do_names_what_can():
    F, _ = big()
    for call in (F.eigenvalues, F.sample, lambda: F.power(0.5, 0.1)):
        with pytest.raises(UnsupportedOperationError, match="structure='ekfac'"):
            call()
    with pytest.raises(UnsupportedOperationError, match=r"dense\(\)"):
        F.state_dict()


def test_implicit_powers_are_implicit():
    F, D = big()
    v = randn(BIG.size)
    close(F.power(2, 0.1) @ v, (D + 0.1 * eye(BIG.size)) @ (D @ v + 0.1 * v))
    close(F.power(-1, 0.1) @ v, F.solve(v, 0.1))


def test_implicit_sums_hold_any_structure():
    cases = {name: make() for name, make in CASES.items() if name != "kfac_partial"}
    implicit = cases["implicit"]
    for case in cases.values():
        expected = case.dense + implicit.dense
        close((case.matrix + implicit.matrix).to_dense(), expected)
        close((implicit.matrix + case.matrix).to_dense(), expected)
        wrapped = ImplicitMatrix.of(case.matrix) - implicit.matrix
        close(wrapped.to_dense(), case.dense - implicit.dense)


def test_an_implicit_block():
    fc = kfac_dense(linear_layer(), LINEAR)
    implicit = ImplicitMatrix(LINEAR, lambda v: fc @ v, dtype=torch.float64)
    conv = KFACMatrix(conv_layer())
    F = BlockDiagonalMatrix(SPACE, {"fc": implicit, "conv": conv})
    D = kfac_dense(linear_layer()) + kfac_dense(conv_layer())
    v = vector_of(SPACE)
    close((F @ v).flat(), D @ v.flat())
    damped = D + 0.1 * eye(SPACE.size)
    close(F.solve(v, 0.1).flat(), torch.linalg.solve(damped, v.flat()), 1e-9)
    close(F.top_eigenpairs(3).values, torch.linalg.eigvalsh(D).flip(0)[:3])
    close(F.logdet(0.1), torch.logdet(damped))


def test_implicit_matrix_of_a_function_on_vectors():
    case = CASES["dense"]()
    F = ImplicitMatrix.from_matvec(
        SPACE, lambda v: case.matrix @ v, dtype=torch.float64
    )
    close(F.to_dense(), case.dense)


def test_implicit_matrix_keeps_its_preconditioner_when_scaled_and_converted():
    case = CASES["dense"]()
    F = ImplicitMatrix(
        SPACE,
        lambda v: case.dense @ v,
        dtype=torch.float64,
        preconditioner=DiagonalMatrix(case.matrix.diagonal()),
    )
    close((2 * F).preconditioner.trace(), 2 * case.dense.trace())
    assert F.to(dtype=torch.float32).preconditioner.dtype == torch.float32
    power = CASES["ekfac_power"]()  # not zero on what it does not cover
    F.preconditioner = power.matrix
    found = F.to(dtype=torch.float32).preconditioner.trace()
    close(found.double(), power.dense.trace(), 1e-6)
