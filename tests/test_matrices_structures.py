"""What is particular to the other structures, and properties of all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import (
    CASES,
    SPACE,
    close,
    half_layer,
    layers,
    linear_layer,
    positive,
    randn,
    vector_of,
)

from ekfac.errors import StateMismatchError
from ekfac.matrices import (
    BlockDiagonalMatrix,
    DenseMatrix,
    DiagonalMatrix,
    IndexPacking,
    KFACMatrix,
    KroneckerFactors,
    LowRankMatrix,
    QuasiDiagonalMatrix,
    eigen,
    from_state_dict,
)
from ekfac.vectors import FunctionVector, ParameterVector, VectorSpace

seeds = st.integers(0, 2**31)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


# ----------------------------------------------------------------------- every one


@settings(max_examples=10)
@given(name=st.sampled_from(sorted(CASES)), seed=seeds)
def test_symmetric_and_positive(name, seed):
    matrix = CASES[name]().matrix
    u, v = vector_of(matrix.space, seed), vector_of(matrix.space, seed + 1)
    close((matrix @ u).dot(v), u.dot(matrix @ v), 1e-9)
    if name != "quasi_diagonal":  # an arrow may be indefinite
        assert matrix.quadratic(u) >= 0


@settings(max_examples=10)
@given(name=st.sampled_from(sorted({*CASES} - {"quasi_diagonal"})), seed=seeds)
def test_solve_undoes_the_damped_product(name, seed):
    matrix = CASES[name]().matrix
    v = vector_of(matrix.space, seed)
    close(matrix.solve(matrix @ v + 0.7 * v, 0.7).flat(), v.flat())


# --------------------------------------------------------------------------- dense


def test_an_indefinite_matrix_solves_but_has_no_determinant_or_roots():
    H = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    F = DenseMatrix(VectorSpace({"w": (2,)}), H)
    v = torch.tensor([2.0, 2.0], dtype=torch.float64)
    close(F.solve(v), torch.tensor([1.0, -2.0], dtype=torch.float64))
    close(F.power(3).to_dense(), H**3)
    for call in (F.logdet, F.sample, lambda: F.power(0.5)):
        with pytest.raises(ValueError, match=r"smallest eigenvalue of F is -1 with"):
            call()
    assert F.logdet(1.5).isfinite()


def test_a_singular_matrix_needs_damping():
    row = randn(1, 6)
    F = DenseMatrix(VectorSpace({"w": (6,)}), row.mT @ row)
    v = randn(6)
    with pytest.raises(
        ValueError, match=r"singular with damping=0\.0, .* larger damping"
    ):
        F.solve(v)
    close(F.solve(v, 0.1), torch.linalg.solve(row.mT @ row + 0.1 * eye(6), v))
    assert (F.eigenvalues()[:-1] == 0).all()


def test_a_failed_decomposition_is_tried_in_double_precision(monkeypatch):
    original = torch.linalg.eigh

    def fails_in_single_precision(matrix):
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_single_precision)
    D = positive(4)
    values = DenseMatrix(VectorSpace({"w": (4,)}), D.float()).eigenvalues()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.linalg.eigvalsh(D).float())


def test_a_matrix_that_is_not_finite_is_refused():
    D = positive(3)
    D[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"\[3, 3\] has entries that are not finite"):
        DenseMatrix(VectorSpace({"w": (3,)}), D).eigenvalues()


def test_the_eigendecomposition_is_kept_until_the_matrix_changes(monkeypatch):
    calls = []
    original = eigen.symmetric_eigh
    monkeypatch.setattr(
        eigen, "symmetric_eigh", lambda matrix: calls.append(1) or original(matrix)
    )
    D = positive(4)
    F = DenseMatrix(VectorSpace({"w": (4,)}), D)
    v = randn(4)
    F.solve(v, 0.1), F.solve(v, 0.2), F.logdet(0.1), F.eigenvalues()
    assert len(calls) == 1
    D.mul_(2)
    close(F.solve(v, 0.1), torch.linalg.solve(D + 0.1 * eye(4), v))
    assert len(calls) == 2


def test_dense_matrix_of_the_wrong_size():
    with pytest.raises(StateMismatchError, match=r"\[3, 3\], got \[2, 2\]"):
        DenseMatrix(VectorSpace({"w": (3,)}), eye(2))


def test_a_gram_matrix_acts_on_function_space():
    outputs = FunctionVector(randn(3, 2))
    K = positive(6)
    kernel = DenseMatrix(outputs.space, K)
    product = kernel @ outputs
    assert isinstance(product, FunctionVector)
    close(product.outputs, (K @ outputs.outputs.flatten()).view(3, 2))
    assert isinstance(kernel.sample(0.1), FunctionVector)


# ------------------------------------------------------------------------ low rank


def test_eigenvectors_beyond_the_rank_are_orthogonal_to_the_rows():
    rows = randn(2, 8)
    F = LowRankMatrix(
        VectorSpace({"w": (8,)}), rows, weights=torch.tensor([1.0, -1.0]).double()
    )
    pairs = F.top_eigenpairs(8)
    close(pairs.values.flip(0), F.eigenvalues())
    close(pairs.vectors.mT @ pairs.vectors, eye(8))
    close(F.to_dense() @ pairs.vectors, pairs.vectors * pairs.values)


def test_low_rank_needs_damping_and_fitting_rows():
    space = VectorSpace({"w": (8,)})
    F = LowRankMatrix(space, randn(2, 8))
    with pytest.raises(ValueError, match=r"singular with damping=0\.0"):
        F.solve(randn(8))
    with pytest.raises(StateMismatchError, match=r"shape \[r, 8\], got \[2, 7\]"):
        LowRankMatrix(space, randn(2, 7))
    with pytest.raises(StateMismatchError, match=r"2 rows need as many weights"):
        LowRankMatrix(space, randn(2, 8), weights=randn(3))


def test_no_rows_are_a_zero_matrix():
    """As of a loss that is linear in the outputs."""
    F = LowRankMatrix(VectorSpace({"w": (4,)}), randn(0, 4))
    close(F.eigenvalues(), torch.zeros(4).double())
    close(F.solve(randn(4), 2.0), randn(4) / 2)
    close(F.logdet(0.5), 4 * torch.tensor(0.5).double().log())
    close(F.top_eigenpairs(2).values, torch.zeros(2).double())
    close(F.power(-0.5, 4.0).to_dense(), torch.eye(4).double() / 2)


def test_repeated_rows_do_not_harm():
    rows = randn(2, 8)[[0, 1, 0, 1, 1]]
    F = LowRankMatrix(VectorSpace({"w": (8,)}), rows)
    v = randn(8)
    close(F.solve(v, 1e-3), torch.linalg.solve(rows.mT @ rows + 1e-3 * eye(8), v), 1e-9)


# ------------------------------------------------------------------ block-diagonal


def test_the_structure_says_what_the_blocks_are():
    names = {name: CASES[name]().matrix.structure for name in CASES}
    assert names["block_diagonal"] == "block_diagonal"
    assert names["kfac"] == "kfac"
    assert names["ekfac"] == "ekfac"
    assert names["quasi_diagonal"] == "quasi_diagonal"
    assert names["mixed"] == "mixed"


def test_parameters_of_no_block_have_zero_curvature():
    F = BlockDiagonalMatrix(SPACE, {"fc": KFACMatrix(linear_layer())})
    v = vector_of(SPACE)
    assert (F @ v)["norm.weight"].abs().max() == 0
    (F @ v)["norm.weight"].add_(1)  # memory of its own
    close(F.solve(v, 0.5)["norm.weight"], v["norm.weight"] / 0.5)
    with pytest.raises(ValueError, match=r"singular with damping=0\.0"):
        F.solve(v)


def test_blocks_must_be_over_separate_parameters_of_the_space():
    fc = KFACMatrix(linear_layer())
    with pytest.raises(StateMismatchError, match=r"'two' holds entries of 'fc.weight'"):
        BlockDiagonalMatrix(SPACE, {"one": fc, "two": fc})
    other = VectorSpace({"fc.weight": (3, 2), "fc.bias": (4,)})
    with pytest.raises(
        StateMismatchError, match=r"'fc' is over 'fc.bias' of shape \[3\]"
    ):
        BlockDiagonalMatrix(other, {"fc": fc})
    half = KFACMatrix(half_layer(0))
    with pytest.raises(StateMismatchError, match="'two' holds entries of 'attention"):
        BlockDiagonalMatrix(SPACE, {"one": half, "two": half})
    with pytest.raises(StateMismatchError, match=r"'q' is 2 times the identity"):
        BlockDiagonalMatrix(SPACE, {"q": half.power(-1, 0.5)})
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonalMatrix(SPACE, {})


# --------------------------------------------------------------------- everything


def test_every_layer_of_a_model_at_once_equals_its_parts():
    """Blocks that hold different rows of one parameter solve as if they were alone."""
    whole = CASES["kfac"]().matrix
    v = vector_of(SPACE)
    solution = whole.solve(v, 0.1)
    for half in ("attention.q", "attention.k"):
        layer = layers()[half]
        part = KFACMatrix(layer).solve(v.subset(["attention.in_proj"]), 0.1)
        close(layer.pack(solution), layer.pack(part))


def test_factors_as_plain_tensors_are_a_layer():
    layer = linear_layer()
    factors = KroneckerFactors(layer, A=layer.A, G=layer.G)
    close(KFACMatrix(factors).to_dense(), KFACMatrix(layer).to_dense())
    assert factors.parameter_names == layer.parameter_names


def test_a_packing_is_saved_in_the_order_of_the_matrix():
    """A matrix may order the layer's parameters otherwise than its packing does."""
    own = VectorSpace({"weight": (2, 2), "bias": (2,)})
    other = VectorSpace({"bias": (2,), "weight": (2, 2)})
    packing = IndexPacking(own, torch.tensor([[[0, 1, 4], [2, 3, 5]]]))
    diagonal = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 2, 3)
    cross = torch.full((1, 2, 2), 0.1, dtype=torch.float64)
    matrix = QuasiDiagonalMatrix(packing, diagonal=diagonal, cross=cross, space=other)
    expected = torch.tensor([3.0, 6, 1, 2, 4, 5], dtype=torch.float64)
    close(matrix.to_dense().diagonal(), expected)
    close(from_state_dict(matrix.state_dict()).to_dense(), matrix.to_dense())


def test_a_diagonal_of_several_precisions_has_the_widest():
    entries = {"half": torch.ones(2).half(), "double": 3 * torch.ones(2).double()}
    matrix = DiagonalMatrix(ParameterVector(entries))
    assert matrix.dtype == from_state_dict(matrix.state_dict()).dtype == torch.float64
    product = matrix @ torch.full((4,), 2.0, dtype=torch.float64)
    close(product, torch.tensor([2.0, 2, 6, 6], dtype=torch.float64))
