"""Sums, merges and saved states."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from matrix_cases import (
    CASES,
    SPACE,
    close,
    half_layer,
    linear_layer,
    positive,
    randn,
    vector_of,
)

from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.matrices import (
    BlockDiagonalMatrix,
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    IndexPacking,
    KFACMatrix,
    LowRankMatrix,
    from_state_dict,
    merge,
)
from ekfac.vectors import FunctionVector, VectorSpace

SUMMABLE = [name for name in CASES if "kfac" not in name and name != "mixed"]


@pytest.mark.parametrize("name", [*SUMMABLE, "ekfac", "ekfac_power"])
def test_sums_and_differences(name):
    case = CASES[name]()
    other = 2.0 * case.matrix
    total = case.matrix + other
    close(total.to_dense(), 3 * case.dense)
    close(total.trace(), 3 * case.dense.trace())
    close((other - case.matrix).to_dense(), case.dense)
    assert type(total) is type(case.matrix)


@pytest.mark.parametrize("name", [*SUMMABLE, "ekfac", "ekfac_power"])
def test_sums_of_two_precisions_are_in_the_wider(name):
    case = CASES[name]()
    single = case.matrix.to(dtype=torch.float32)
    v = randn(case.matrix.size)
    # The bases of an EKFAC matrix in single precision are not those in double.
    double = single.to(dtype=torch.float64)
    expected = 2 * (double @ v)
    for total in (single + double, double + single):
        assert total.dtype == torch.float64
        close(total @ v, expected, tolerance=1e-6)


def test_low_rank_sums_concatenate():
    space = VectorSpace({"w": (6,)})
    one, two = randn(2, 6), randn(3, 6, seed=1)
    total = LowRankMatrix(space, one) + LowRankMatrix(space, two)
    assert total.rows.shape == (5, 6)
    close(total.to_dense(), one.mT @ one + two.mT @ two)


def test_sums_of_kronecker_products_are_refused():
    F = CASES["kfac"]().matrix
    with pytest.raises(UnsupportedOperationError, match=r"merge\(.*ImplicitMatrix\.of"):
        F + F


def test_ekfac_sums_need_one_basis():
    layer = linear_layer()
    F = EKFACMatrix(layer)
    turned = EKFACMatrix(replace(layer, Q_A=layer.Q_A.flip(-1)))
    with pytest.raises(UnsupportedOperationError, match="another basis; estimate both"):
        F + turned
    same = EKFACMatrix(replace(layer, Q_A=layer.Q_A.clone(), s=2 * layer.s))
    close((F + same).to_dense(), 3 * F.to_dense())


def test_sums_of_different_structures_are_refused():
    dense, diagonal = CASES["dense"]().matrix, CASES["diagonal"]().matrix
    with pytest.raises(UnsupportedOperationError, match=r"diagonal matrix; wrap one"):
        dense + diagonal
    with pytest.raises(UnsupportedOperationError, match="they differ in"):
        CASES["mixed"]().matrix + CASES["ekfac"]().matrix


def test_sums_of_different_spaces_are_refused():
    one = DenseMatrix(VectorSpace({"w": (2,)}), positive(2))
    other = DenseMatrix(VectorSpace({"v": (2,)}), positive(2))
    with pytest.raises(StateMismatchError, match=r"The other matrix .* lacks 'w'"):
        one + other
    ab = DenseMatrix(VectorSpace({"a": (1,), "b": (1,)}), positive(2))
    ba = DenseMatrix(VectorSpace({"b": (1,), "a": (1,)}), positive(2))
    with pytest.raises(StateMismatchError, match="order their vectors differently"):
        ab + ba


def test_only_matrices_add_and_only_numbers_scale():
    F = CASES["dense"]().matrix
    with pytest.raises(TypeError):
        F + 1.0
    with pytest.raises(TypeError):
        F * F
    with pytest.raises(TypeError, match=r"got DenseMatrix; .* F @ \(G @ v\)"):
        F @ F


# -------------------------------------------------------------------------- merging


@pytest.mark.parametrize("name", [*SUMMABLE, "ekfac"])
def test_merging_weighs_by_examples(name):
    case = CASES[name]()
    merged = merge([case.matrix, 4.0 * case.matrix], [10, 5])
    close(merged.to_dense(), case.dense * (10 + 20) / 15)


def test_merged_kfac_is_that_of_all_the_data():
    a, g = randn(9, 3), randn(9, 3, seed=1)
    parts = []
    for rows in (slice(0, 2), slice(2, 9)):
        n = len(a[rows])
        A, G = (a[rows].mT @ a[rows] / n)[None], (g[rows].mT @ g[rows] / n)[None]
        block = KFACMatrix(replace(linear_layer(), A=A, G=G))
        parts.append(BlockDiagonalMatrix(SPACE, {"fc": block}))
    merged = merge(parts, [2, 7])
    A, G = (a.mT @ a / 9)[None], (g.mT @ g / 9)[None]
    whole = KFACMatrix(replace(linear_layer(), A=A, G=G))
    close(merged.to_dense(), BlockDiagonalMatrix(SPACE, {"fc": whole}).to_dense())


def test_merging_what_does_not_fit():
    dense, diagonal = CASES["dense"]().matrix, CASES["diagonal"]().matrix
    with pytest.raises(ValueError, match="2 matrices and 1 counts"):
        merge([dense, dense], [1])
    with pytest.raises(ValueError, match="0 matrices"):
        merge([], [])
    with pytest.raises(ValueError, match=r"must be positive, got \[0, 0\]"):
        merge([dense, dense], [0, 0])
    for count in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"finite and at least 0.*{count}"):
            merge([dense, dense], [3, count])
    with pytest.raises(UnsupportedOperationError, match="with the same structure"):
        merge([dense, diagonal], [1, 1])


# --------------------------------------------------------------------------- states


def saved(state):
    """Return the state after a trip through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", sorted({*CASES} - {"implicit"}))
def test_state_round_trip(name):
    case = CASES[name]()
    state = saved(case.matrix.state_dict())
    loaded = from_state_dict(state)
    assert type(loaded) is type(case.matrix)
    assert loaded.space == case.matrix.space
    close(loaded.to_dense(), case.dense)
    v = vector_of(loaded.space)
    assert torch.equal(loaded.solve(v, 0.1).flat(), case.matrix.solve(v, 0.1).flat())
    again = saved(loaded.state_dict())
    assert again.keys() == state.keys()


@pytest.mark.parametrize("name", sorted({*CASES} - {"implicit"}))
def test_load_state_dict_replaces_the_values(name):
    case = CASES[name]()
    state = case.matrix.state_dict()
    other = 3.0 * case.matrix
    v = vector_of(case.matrix.space)
    other.solve(v, 1.0)  # fills the caches
    other.load_state_dict(state)
    close(other.to_dense(), case.dense)
    assert torch.equal(other.solve(v, 0.1).flat(), case.matrix.solve(v, 0.1).flat())


@pytest.mark.parametrize("name", sorted({*CASES} - {"implicit"}))
def test_a_state_is_a_copy(name):
    state = CASES[name]().matrix.state_dict()
    before = from_state_dict(state).to_dense()

    def spoil(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.mul_(2)
        elif isinstance(value, dict):
            for item in value.values():
                spoil(item)

    matrix = from_state_dict(state)
    copy = matrix.state_dict()
    spoil(copy)
    close(matrix.to_dense(), before)


def test_states_of_views_do_not_carry_their_bank():
    bank = torch.zeros(100, 3, 3, dtype=torch.float64)
    layer = linear_layer()
    bank[0] = layer.A[0]
    state = KFACMatrix(replace(layer, A=bank[:1])).state_dict()
    assert state["factors"]["A"].untyped_storage().nbytes() == 9 * 8


def test_loading_the_wrong_state():
    dense, diagonal = CASES["dense"]().matrix, CASES["diagonal"]().matrix
    with pytest.raises(StateMismatchError, match="'kind' is 'diagonal', not 'dense'"):
        dense.load_state_dict(diagonal.state_dict())
    small = DenseMatrix(VectorSpace({"w": (2,)}), positive(2))
    with pytest.raises(StateMismatchError, match="The other matrix"):
        dense.load_state_dict(small.state_dict())
    layer = linear_layer()
    kfac = BlockDiagonalMatrix(SPACE, {"fc": KFACMatrix(layer)})
    ekfac = BlockDiagonalMatrix(SPACE, {"fc": EKFACMatrix(layer)})
    with pytest.raises(StateMismatchError, match="of a kfac matrix, this one is ekfac"):
        ekfac.load_state_dict(kfac.state_dict())
    with pytest.raises(StateMismatchError, match="'kind' is missing"):
        from_state_dict({"weight": torch.zeros(1)})


def test_a_kernel_matrix_keeps_its_space():
    outputs = FunctionVector(randn(3, 2))
    kernel = DiagonalMatrix(outputs)
    loaded = from_state_dict(saved(kernel.state_dict()))
    assert isinstance(loaded @ outputs, FunctionVector)
    assert isinstance(loaded.diagonal(), FunctionVector)


def test_a_packing_that_uses_an_entry_twice_is_refused():
    layer = half_layer(0)
    twice = replace(layer, pack=lambda t: t["attention.in_proj"][:1].expand(2, 2)[None])
    with pytest.raises(StateMismatchError, match="uses an entry twice"):
        KFACMatrix(twice).state_dict()


def test_an_index_packing_is_a_packing():
    layer = linear_layer()
    space = SPACE.subspace(layer.parameter_names)
    packing = IndexPacking.of(layer, space)
    v = vector_of(space)
    assert torch.equal(packing.pack(v), layer.pack(v))
    for name, tensor in packing.unpack(layer.pack(v)).items():
        assert torch.equal(tensor, v[name])


def test_every_structure_is_a_curvature_matrix():
    assert all(isinstance(make().matrix, CurvatureMatrix) for make in CASES.values())
