"""What is particular to K-FAC, EKFAC and quasi-diagonal matrices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_cases import (
    arrow_dense,
    close,
    conv_layer,
    embedded,
    kfac_dense,
    linear_layer,
    quasi_entries,
    randn,
    token_layer,
    vector_of,
)

import ekfac
from ekfac.errors import (
    NotReadyError,
    StateMismatchError,
    UnsupportedOperationError,
)
from ekfac.matrices import (
    EKFACMatrix,
    IndexPacking,
    KFACMatrix,
    KroneckerFactors,
    QuasiDiagonalMatrix,
)
from ekfac.vectors import ParameterVector, VectorSpace

seeds = st.integers(0, 2**31)


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


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


def test_damping_is_split_in_known_ways_only():
    F = KFACMatrix(linear_layer())
    with pytest.raises(ValueError, match=r"\('exact', 'factored'\), got 'half'"):
        F.solve(vector_of(F.space), 0.1, damping_split="half")


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
    F = QuasiDiagonalMatrix(layer, diagonal=diagonal, cross=cross)
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
    F = QuasiDiagonalMatrix(layer, diagonal=diagonal, cross=cross)
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
        F = QuasiDiagonalMatrix(layer, diagonal=diagonal, cross=cross)
        step = F.solve(ParameterVector(layer.unpack(grads.mean(dim=0))))
        changes.append(inputs @ step["fc.weight"].mT + step["fc.bias"])
    close(changes[0], changes[1], 1e-6)


def test_quasi_diagonal_of_a_single_example_needs_damping():
    layer = linear_layer()
    grads = randn(1, 3, 3)
    F = QuasiDiagonalMatrix(
        layer, diagonal=grads.square(), cross=grads[..., :-1] * grads[..., -1:]
    )
    v = vector_of(F.space)
    with pytest.raises(ValueError, match=r"smallest pivot is .* with damping=0\.0"):
        F.solve(v)
    assert F.solve(v, 0.1).flat().isfinite().all()
    with pytest.raises(ValueError, match=r"smallest pivot is 0 with damping=0\.0"):
        (0.0 * F).solve(v)


def test_quasi_diagonal_refuses_powers_and_wrong_shapes():
    F, _ = quasi()
    with pytest.raises(UnsupportedOperationError, match="structure='block_diagonal'"):
        F.power(-0.5, 0.1)
    with pytest.raises(
        StateMismatchError, match=r"shape \[1, 3, 2\].* got \[1, 3, 3\]"
    ):
        QuasiDiagonalMatrix(linear_layer(), diagonal=F.entries, cross=F.entries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", ["dense", "kfac", "ekfac"])
@pytest.mark.parametrize("shape", [(4, 3, 50), (40, 10, 500), (20, 10, 9000)])
def test_a_singular_matrix_is_one_in_every_structure(shape, structure, dtype):
    """Rows of a softmax layer's Fisher matrix sum to zero: rounding hides it."""
    torch.manual_seed(0)
    d_in, d_out, n = shape
    model = torch.nn.Linear(d_in, d_out).to(dtype)
    data = [(torch.randn(n, d_in, dtype=dtype), torch.randint(d_out, (n,)))]
    F, v = ekfac.fisher(model, data, structure), torch.ones(d_out * (d_in + 1))
    for operation in (lambda: F.solve(v.to(dtype)), F.logdet, F.sample):
        with pytest.raises(ValueError, match="damping"):
            operation()
    damped = F.to_dense() + 1e-3 * torch.eye(F.size, dtype=dtype)
    torch.testing.assert_close(F.logdet(1e-3), torch.logdet(damped), rtol=1e-3, atol=0)


def test_small_scalings_are_no_rounding():
    """Only what is far below a squared rounding error counts as zero."""
    s = torch.tensor([[[1.0, 1e-4], [1e-8, 1e-10]]])
    eyes = torch.eye(2).unsqueeze(0)
    space = VectorSpace({"w": (2, 2)}, ParameterVector)
    packing = IndexPacking(space, torch.arange(4).view(1, 2, 2))
    F = EKFACMatrix(KroneckerFactors(packing, Q_A=eyes, Q_G=eyes, s=s))
    torch.testing.assert_close(F.solve(torch.ones(4)), 1 / s.flatten())
