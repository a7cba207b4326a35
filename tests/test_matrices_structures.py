"""What is particular to each structure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import (
    CASES,
    SPACE,
    arrow_dense,
    close,
    conv_layer,
    embedded,
    kfac_dense,
    layers,
    linear_layer,
    positive,
    quasi_entries,
    randn,
    token_layer,
    vector_of,
)

from ekfac.errors import (
    EkfacWarning,
    NotReadyError,
    StateMismatchError,
    UnsupportedOperationError,
)
from ekfac.matrices import (
    BlockDiagonalMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    ImplicitMatrix,
    KFACMatrix,
    KroneckerFactors,
    LowRankMatrix,
    QuasiDiagonalMatrix,
    eigen,
)
from ekfac.vectors import FunctionVector, ParameterVector, VectorSpace

LINEAR = SPACE.subspace(["fc.weight", "fc.bias"])
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
        VectorSpace({"w": (8,)}), rows, torch.tensor([1.0, -1.0]).double()
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
        LowRankMatrix(space, randn(2, 8), randn(3))


def test_repeated_rows_do_not_harm():
    rows = randn(2, 8)[[0, 1, 0, 1, 1]]
    F = LowRankMatrix(VectorSpace({"w": (8,)}), rows)
    v = randn(8)
    close(F.solve(v, 1e-3), torch.linalg.solve(rows.mT @ rows + 1e-3 * eye(8), v), 1e-9)


# ------------------------------------------------------------------ K-FAC and EKFAC


@settings(max_examples=20)
@given(scale=st.floats(1e-3, 1e3), damping=st.floats(1e-4, 10.0))
def test_factored_damping_is_that_of_martens_and_grosse(scale, damping):
    layer = linear_layer()
    A, G = layer.A[0], layer.G[0]
    pi = ((A.trace() / 3) / (G.trace() / 3)).sqrt()
    damped_A = A + pi * damping**0.5 * eye(3)
    damped_G = G + damping**0.5 / pi * eye(3)
    V = randn(1, 3, 3)
    expected = layer.unpack(torch.linalg.inv(damped_G) @ V @ torch.linalg.inv(damped_A))
    # Nothing depends on how the scale is divided between the factors.
    moved = KFACMatrix(replace(layer, A=layer.A * scale, G=layer.G / scale))
    solution = moved.solve(
        ParameterVector(layer.unpack(V)), damping, damping_split="factored"
    )
    close(solution.flat(), ParameterVector(expected).flat(), 1e-9)


def test_factored_damping_of_groups_and_diagonal_factors():
    for layer in (conv_layer(), token_layer()):
        F, damping = KFACMatrix(layer), 0.2
        A = layer.A if layer.A.dim() == 3 else torch.diag_embed(layer.A)
        blocks = []
        for G in layer.G:
            pi = ((A[0].trace() / len(A[0])) / (G.trace() / len(G))).sqrt()
            damped_A = A[0] + pi * damping**0.5 * eye(len(A[0]))
            damped_G = G + damping**0.5 / pi * eye(len(G))
            blocks.append(torch.linalg.inv(torch.kron(damped_G, damped_A)))
        inverse = embedded(layer, torch.block_diag(*blocks), F.space)
        v = vector_of(F.space)
        close(F.solve(v, damping, damping_split="factored").flat(), inverse @ v.flat())


def test_factored_damping_of_a_layer_that_never_fired():
    layer = linear_layer()
    F = KFACMatrix(replace(layer, A=torch.zeros_like(layer.A)))
    v = vector_of(F.space)
    solution = F.solve(v, 0.25, damping_split="factored")
    assert solution.flat().isfinite().all()


def test_diagonal_output_factor():
    layer = linear_layer()
    G = randn(1, 3).square() + 0.1
    F = KFACMatrix(replace(layer, G=G))
    dense = kfac_dense(replace(layer, G=torch.diag_embed(G)), F.space)
    close(F.to_dense(), dense)
    v = vector_of(F.space)
    close(F.solve(v, 0.1).flat(), torch.linalg.solve(dense + 0.1 * eye(9), v.flat()))
    close(F.trace(), dense.trace())
    close(F.frobenius_norm(), torch.linalg.matrix_norm(dense))


def test_the_power_of_a_kfac_matrix_is_in_its_eigenbasis():
    F = KFACMatrix(linear_layer())
    assert isinstance(F.power(-1, 0.1), EKFACMatrix)


def test_a_matrix_follows_live_factors():
    layer = linear_layer()
    F, E = KFACMatrix(layer), EKFACMatrix(layer)
    F.solve(vector_of(F.space), 0.1)  # fills the cache
    layer.A.mul_(2)
    layer.s.mul_(3)
    close(F.to_dense(), kfac_dense(layer, F.space))
    close(E.trace(), layer.s.sum())
    v = vector_of(F.space)
    expected = torch.linalg.solve(F.to_dense() + 0.1 * eye(9), v.flat())
    close(F.solve(v, 0.1).flat(), expected)


@pytest.mark.parametrize("missing", ["A", "G"])
def test_kfac_before_its_statistics(missing):
    layer = replace(linear_layer(), **{missing: None})
    with pytest.raises(NotReadyError, match=rf"{missing} of the layer .*'fc.weight'"):
        KFACMatrix(layer)


def test_ekfac_before_its_statistics():
    with pytest.raises(NotReadyError, match=r"s of the layer .*structure='ekfac'"):
        EKFACMatrix(replace(linear_layer(), s=None))
    for side in ("Q_A", "Q_G"):
        F = EKFACMatrix(replace(linear_layer(), **{side: None}))
        with pytest.raises(NotReadyError, match=f"{side} of the layer"):
            F @ vector_of(F.space)


@settings(max_examples=20)
@given(n=st.integers(1, 12), seed=seeds)
def test_ekfac_is_the_best_diagonal_in_its_basis(n, seed):
    """George et al. 2018, Theorem 2: never further than K-FAC, and the trace exact."""
    layer = linear_layer()
    a, g = randn(n, 3, seed=seed), randn(n, 3, seed=seed + 1)
    grads = g[:, :, None] * a[:, None, :]
    exact = torch.einsum("nij,nkl->ijkl", grads, grads).reshape(9, 9) / n
    layer.A, layer.G = (a.mT @ a / n)[None], (g.mT @ g / n)[None]
    layer.with_basis(0)
    layer.s = (layer.Q_G.mT @ grads @ layer.Q_A).square().mean(dim=0, keepdim=True)
    F, K = EKFACMatrix(layer), KFACMatrix(layer)
    truth = embedded(layer, exact, F.space)
    norm = torch.linalg.matrix_norm
    error, worse = norm(F.to_dense() - truth), norm(K.to_dense() - truth)
    assert error <= worse + 1e-10 * norm(truth)
    close(F.trace(), truth.trace())


def test_kron_damping_of_the_ekfac_paper_is_kfac_with_damped_factors():
    """George et al. 2018, A.4: the cross terms of the damped Kronecker product."""
    layer, eps = linear_layer(), 0.3
    eig_A, eig_G = torch.linalg.eigvalsh(layer.A), torch.linalg.eigvalsh(layer.G)
    cross = eps + eps**0.5 * (eig_G[..., None] + eig_A[:, None, :])
    layer.s = eig_G[..., None] * eig_A[:, None, :] + cross
    root = eps**0.5 * eye(3)
    damped = replace(layer, A=layer.A + root, G=layer.G + root)
    close(EKFACMatrix(layer).to_dense(), KFACMatrix(damped).to_dense())


# ------------------------------------------------------------------- quasi-diagonal


def quasi(seed: int = 5) -> tuple[QuasiDiagonalMatrix, torch.Tensor]:
    layer = linear_layer()
    diagonal, cross = quasi_entries(layer, seed)
    F = QuasiDiagonalMatrix(layer, diagonal, cross)
    return F, arrow_dense(layer, diagonal, cross, F.space)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_quasi_diagonal_solve_is_the_formula(damping):
    F, _ = quasi()
    v = vector_of(F.space)
    solution = F.solve(v, damping)
    for i in range(3):
        F00 = F.entries[0, i, 2] + damping
        for j in range(2):
            F0j, Fjj = F.cross[0, i, j], F.entries[0, i, j] + damping
            g0, gj = v["fc.bias"][i], v["fc.weight"][i, j]
            close(
                solution["fc.weight"][i, j],
                (gj - g0 * F0j / F00) / (Fjj - F0j**2 / F00),
            )
        bias = (v["fc.bias"][i] - F.cross[0, i] @ solution["fc.weight"][i]) / F00
        close(solution["fc.bias"][i], bias)


@settings(max_examples=20)
@given(seed=seeds, damping=st.sampled_from([0.0, 0.01, 1.0]))
def test_quasi_diagonal_inverse_completes_the_arrow(seed, damping):
    """It equals the arrow where that has entries, and its inverse is an arrow."""
    F, arrow = quasi(seed)
    inverse = F.solve(eye(9), damping)
    completion = torch.linalg.inv(inverse)
    support = arrow != 0
    damped = arrow + damping * eye(9)
    close(completion[support], damped[support], 1e-8)
    assert inverse[~support].abs().max() == 0
    assert torch.linalg.eigvalsh((inverse + inverse.mT) / 2).min() > 0
    logdet = torch.linalg.slogdet(completion).logabsdet
    assert torch.isclose(F.logdet(damping), logdet, rtol=1e-8, atol=1e-8)


def test_quasi_diagonal_inverse_where_the_arrow_is_indefinite():
    """Weights that follow their bias closely: an eigenvalue is negative."""
    layer = linear_layer()
    diagonal = torch.ones(1, 3, 3, dtype=torch.float64)
    cross = 0.9 * torch.ones(1, 3, 2, dtype=torch.float64)
    F = QuasiDiagonalMatrix(layer, diagonal, cross)
    assert F.eigenvalues().min() < 0
    assert torch.linalg.eigvalsh(F.solve(eye(9))).min() > 0


def test_quasi_diagonal_samples(monkeypatch):
    F, _ = quasi()
    units = iter(eye(9))
    monkeypatch.setattr(
        "ekfac.matrices.base.standard_normal", lambda *_, **__: next(units)[None]
    )
    root = torch.stack([F.sample(0.3).flat() for _ in range(9)], dim=1)
    close(root @ root.mT, F.solve(eye(9), 0.3))


@settings(max_examples=20)
@given(seed=seeds, scale=st.floats(0.1, 10.0), shift=st.floats(-3.0, 3.0))
def test_quasi_diagonal_step_is_invariant_to_affine_changes_of_inputs(
    seed, scale, shift
):
    """The step's effect on the layer's outputs does not depend on the inputs' units."""
    layer = linear_layer()
    x, delta = randn(20, 2, seed=seed), randn(20, 3, seed=seed + 1)
    units = torch.tensor([scale, 1.0], dtype=torch.float64)
    offset = torch.tensor([shift, 0.5], dtype=torch.float64)
    changes = []
    for inputs in (x, x * units + offset):
        a = torch.cat([inputs, torch.ones(20, 1, dtype=torch.float64)], dim=1)
        grads = delta[:, None, :, None] * a[:, None, None, :]
        diagonal = grads.square().mean(dim=0)
        cross = (grads[..., :-1] * grads[..., -1:]).mean(dim=0)
        F = QuasiDiagonalMatrix(layer, diagonal, cross)
        step = F.solve(ParameterVector(layer.unpack(grads.mean(dim=0))))
        changes.append(inputs @ step["fc.weight"].mT + step["fc.bias"])
    close(changes[0], changes[1], 1e-6)


def test_quasi_diagonal_of_a_single_example_needs_damping():
    layer = linear_layer()
    grads = randn(1, 3, 3)
    F = QuasiDiagonalMatrix(layer, grads.square(), grads[..., :-1] * grads[..., -1:])
    v = vector_of(F.space)
    with pytest.raises(ValueError, match=r"smallest pivot is .* with damping=0\.0"):
        F.solve(v)
    assert F.solve(v, 0.1).flat().isfinite().all()


def test_quasi_diagonal_refuses_powers_and_wrong_shapes():
    F, _ = quasi()
    with pytest.raises(UnsupportedOperationError, match="structure='block_diagonal'"):
        F.power(-0.5, 0.1)
    with pytest.raises(
        StateMismatchError, match=r"shape \[1, 3, 2\].* got \[1, 3, 3\]"
    ):
        QuasiDiagonalMatrix(linear_layer(), F.entries, F.entries)


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
    close(F.solve(v, 0.5)["norm.weight"], v["norm.weight"] / 0.5)
    with pytest.raises(ValueError, match=r"singular with damping=0\.0"):
        F.solve(v)


def test_blocks_must_be_over_separate_parameters_of_the_space():
    fc = KFACMatrix(linear_layer())
    with pytest.raises(StateMismatchError, match="Two blocks hold the parameter 'fc"):
        BlockDiagonalMatrix(SPACE, {"one": fc, "two": fc})
    other = VectorSpace({"fc.weight": (3, 2), "fc.bias": (4,)})
    with pytest.raises(
        StateMismatchError, match=r"'fc' is over 'fc.bias' of shape \[3\]"
    ):
        BlockDiagonalMatrix(other, {"fc": fc})
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonalMatrix(SPACE, {})


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
    with pytest.warns(EkfacWarning, match=r"stopped after 3 iterations at a relative"):
        F.solve(vector_of(BIG), 1e-3, max_iterations=3)


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
    ):
        F.trace()


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
