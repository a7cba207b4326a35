"""One matrix for several tasks, against dense sums and brute-force optima."""

from __future__ import annotations

import pytest
import torch
from continual_cases import batches, move_, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.continual import QuadraticPenalty, merge_error, merge_tasks
from ekfac.continual.merging import expanded
from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.matrices import (
    DiagonalMatrix,
    EKFACMatrix,
    IndexPacking,
    KFACMatrix,
    KroneckerFactors,
)
from ekfac.matrices.eigen import symmetric_eigh
from ekfac.vectors import ParameterVector, VectorSpace


def packing(b: int, d_out: int, d_in: int) -> IndexPacking:
    space = VectorSpace({"w": (b, d_out, d_in)}, ParameterVector)
    return IndexPacking(space, torch.arange(b * d_out * d_in).view(b, d_out, d_in))


def positive(count: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, size, dtype=torch.float64, generator=generator)
    return rows @ rows.mT


def kfac(seed: int, b: int = 1, d_out: int = 3, d_in: int = 4, shared: bool = False):
    A = positive(1 if shared else b, d_in, 2 * seed)
    G = positive(b, d_out, 2 * seed + 1)
    return KFACMatrix(KroneckerFactors(packing(b, d_out, d_in), A=A, G=G))


def ekfac_(seed: int, b: int = 1, d_out: int = 3, d_in: int = 4, shared: bool = False):
    found = kfac(seed, b, d_out, d_in, shared).layer
    s = torch.rand(b, d_out, d_in, dtype=torch.float64)
    Q_A, Q_G = symmetric_eigh(found.A)[1], symmetric_eigh(found.G)[1]
    factors = KroneckerFactors(packing(b, d_out, d_in), Q_A=Q_A, Q_G=Q_G, s=s)
    return EKFACMatrix(factors)


def dense(matrices):
    return sum(matrix.to_dense() for matrix in matrices)


def relative(matrices, merged):
    total = dense(matrices)
    return float((total - merged.to_dense()).norm() / total.norm())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("t", [2, 4])
def test_the_optimal_merge_is_the_best_kronecker_product(b, t, shared):
    """Van Loan & Pitsianis: the leading singular pair of the rearranged sum."""
    matrices = [kfac(i, b, shared=shared) for i in range(t)]
    merged = merge_tasks(matrices, "optimal")
    A = [m.layer.A.expand(b, -1, -1) for m in matrices]
    G = [m.layer.G for m in matrices]
    if shared:  # one A for all blocks: the blocks' G are one long vector
        R = sum(
            torch.outer(g.flatten(), a[0].flatten()) for a, g in zip(A, G, strict=True)
        )
        rest = torch.linalg.svdvals(R)[1:].square().sum()
    else:
        rest = torch.zeros(()).double()
        for i in range(b):
            R = sum(
                torch.outer(g[i].flatten(), a[i].flatten())
                for a, g in zip(A, G, strict=True)
            )
            rest = rest + torch.linalg.svdvals(R)[1:].square().sum()
    total = dense(matrices)
    found = (total - merged.to_dense()).norm()
    torch.testing.assert_close(found, rest.sqrt(), rtol=1e-8, atol=1e-10)
    for factor in (merged.layer.A, merged.layer.G):
        assert torch.linalg.eigvalsh(factor).min() > -1e-10


@pytest.mark.parametrize("method", ["optimal", "pooled", "nearest"])
def test_kfac_merges_of_equal_and_of_scaled_tasks(method):
    """All are exact for tasks in proportion, but the nearest doubles the sum."""
    F = kfac(0)
    merged = merge_tasks([F, 3.0 * F], method)
    expected = F.to_dense() * (4 if method != "nearest" else (1 + 3**0.5) ** 2)
    torch.testing.assert_close(merged.to_dense(), expected)
    twice = merge_tasks([F, F], method).to_dense()
    torch.testing.assert_close(twice, F.to_dense() * (4 if method == "nearest" else 2))


def test_named_merges_are_their_formulas():
    F, H = kfac(0), kfac(1)
    A, G, B, K = F.layer.A[0], F.layer.G[0], H.layer.A[0], H.layer.G[0]
    pooled = merge_tasks([F, H], "pooled", weights=[1.0, 3.0])
    expected = torch.kron(G + K, (A + 3 * B) / 4)
    torch.testing.assert_close(pooled.to_dense(), expected)
    pi = (G.trace() * B.trace() / (K.trace() * A.trace())) ** 0.5
    nearest = merge_tasks([F, H], "nearest").to_dense()
    torch.testing.assert_close(nearest, torch.kron(G + pi * K, A + B / pi))
    # An upper bound of the sum, as positive matrices.
    gap = nearest - dense([F, H])
    assert torch.linalg.eigvalsh(gap).min() > -1e-10


@pytest.mark.parametrize("b", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", ["joint_basis", "first_basis"])
def test_ekfac_merges_keep_the_diagonal_in_their_basis(method, b, shared):
    matrices = [ekfac_(i, b, shared=shared) for i in range(3)]
    merged = merge_tasks(matrices, method)
    total = dense(matrices).view(b, 12, b, 12)
    layer = merged.layer
    for i in range(b):
        Q_A = layer.Q_A[0 if shared else i]
        U = torch.kron(layer.Q_G[i], Q_A)
        diagonal = (U.mT @ total[i, :, i] @ U).diagonal()
        torch.testing.assert_close(layer.s[i].flatten(), diagonal)
    torch.testing.assert_close(merged.trace(), sum(m.trace() for m in matrices))
    if method == "first_basis":
        assert torch.equal(layer.Q_A, matrices[0].layer.Q_A)
        return
    # Its basis diagonalises the partial traces of the sum.
    for i in range(b):
        block = total[i, :, i].view(3, 4, 3, 4)
        part = torch.einsum("oipi->op", block)
        turned = layer.Q_G[i].mT @ part @ layer.Q_G[i]
        assert (turned - torch.diag(turned.diagonal())).norm() < 1e-9 * part.norm()


def test_merging_in_one_basis_is_exact():
    F = ekfac_(0)
    other = F.with_scalings(torch.rand(1, 3, 4, dtype=torch.float64))
    for method in ("joint_basis", "first_basis", "auto"):
        merged = merge_tasks([F, other], method)
        torch.testing.assert_close(merged.to_dense(), dense([F, other]))


def test_errors_are_the_dense_ones():
    for make, methods in (
        (kfac, ("optimal", "pooled", "nearest")),
        (ekfac_, ("joint_basis", "first_basis")),
    ):
        matrices = [make(i, 2, shared=True) for i in range(3)]
        for method in methods:
            merged = merge_tasks(matrices, method)
            expected = relative(matrices, merged)
            assert merge_error(matrices, merged) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UnsupportedOperationError, match="compares K-FAC with K-FAC"):
        merge_error([kfac(0)], ekfac_(0))


def test_the_defaults_have_the_smallest_error():
    for make, best, others in (
        (kfac, "optimal", ("pooled", "nearest")),
        (ekfac_, "joint_basis", ("first_basis",)),
    ):
        matrices = [make(i) for i in range(4)]
        error = relative(matrices, merge_tasks(matrices))
        assert error == relative(matrices, merge_tasks(matrices, best))
        assert all(
            error < relative(matrices, merge_tasks(matrices, other)) for other in others
        )


def test_diagonal_factors_merge_with_dense_ones():
    F = kfac(0)
    d = torch.rand(1, 4, dtype=torch.float64)
    layer = KroneckerFactors(packing(1, 3, 4), A=d, G=F.layer.G)
    merged = merge_tasks([F, KFACMatrix(layer)], "pooled")
    expected = torch.kron(2 * F.layer.G[0], (F.layer.A[0] + torch.diag(d[0])) / 2)
    torch.testing.assert_close(merged.to_dense(), expected)
    both = merge_tasks([KFACMatrix(layer), KFACMatrix(layer)], "optimal")
    assert both.layer.A.dim() == 2
    torch.testing.assert_close(both.to_dense(), 2 * KFACMatrix(layer).to_dense())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="at least one matrix"):
        merge_tasks([])
    with pytest.raises(ValueError, match="as many weights"):
        merge_tasks([kfac(0)], weights=[1.0, 2.0])
    with pytest.raises(UnsupportedOperationError, match="'joint_basis' is not for"):
        merge_tasks([kfac(0), kfac(1)], "joint_basis")
    with pytest.raises(StateMismatchError, match="is"):
        merge_tasks([kfac(0), kfac(1, d_in=5)])


def test_a_task_without_curvature_changes_nothing():
    zero = kfac(0) * 0.0
    F = kfac(1)
    for pair in ([zero, F], [F, zero]):
        torch.testing.assert_close(merge_tasks(pair).to_dense(), F.to_dense())
    torch.testing.assert_close(merge_tasks([zero, zero]).to_dense(), zero.to_dense())


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (nn.Linear(3, 2), nn.Linear(5, 4)),
        (nn.Conv2d(2, 3, 2), nn.Conv2d(4, 5, 2)),
        (nn.Embedding(4, 3), nn.Embedding(6, 3)),
        (nn.LayerNorm(3), nn.LayerNorm(5)),
    ],
)
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block_diagonal"])
def test_layers_that_grew(small, large, structure):
    """Old curvature at the old entries, nothing anywhere else."""

    def matrix(layer):
        layer = layer.double()
        if isinstance(layer, nn.Conv2d):
            x = torch.randn(6, layer.in_channels, 3, 3).double()
        elif isinstance(layer, nn.Embedding):
            x = torch.randint(layer.num_embeddings, (6, 2))
        else:
            width = layer.weight.shape[-1]
            x = torch.randn(6, width, dtype=torch.float64)
        data = [(x, None)]
        model = nn.Sequential(layer, nn.Flatten())
        return ekfac.fisher(model, data, structure, "l2")

    old, new = matrix(small), matrix(large)
    if structure != "diagonal":
        (old,), (new,) = old.blocks.values(), new.blocks.values()
    grown = expanded(old, new)
    assert grown is not None
    place, start = [], 0
    for name, shape in new.space.shapes.items():
        index = torch.arange(shape.numel()).view(shape) + start
        place.append(
            index[tuple(slice(0, n) for n in old.space.shapes[name])].flatten()
        )
        start += shape.numel()
    place = torch.cat(place)
    expected = torch.zeros(new.size, new.size, dtype=torch.float64)
    expected[place[:, None], place] = old.to_dense()
    torch.testing.assert_close(grown.to_dense(), expected)
    assert expanded(new, old) is None
    other = DiagonalMatrix(ParameterVector({"z": torch.ones(2)}))
    assert expanded(other, new) is None


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_online_penalties_merge_task_by_task(structure):
    model = network()
    penalty = QuadraticPenalty(model, structure, decay=0.5)
    exact = QuadraticPenalty(model, structure, decay=0.5, merge="exact")
    for task in range(3):
        for p in (penalty, exact):
            p.consolidate(batches(task))
        move_(model, seed=task)
    for name, (merged,) in penalty.tasks[0].blocks.items():
        matrices = exact.tasks[0].blocks[name]
        assert len(matrices) == 3
        step = merge_tasks(
            [0.5 * merge_tasks([matrices[0] * 2, matrices[1] * 2]), matrices[2]]
        )
        torch.testing.assert_close(merged.to_dense(), step.to_dense())
        assert merge_error(matrices, merged) < 0.5
    model.zero_grad()
    (cross_entropy(model(batches()[0][0]), batches()[0][1]) + penalty()).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_an_exact_merge_keeps_every_matrix(structure):
    """Or it would be the best approximation, a quarter of the sum away."""
    matrices = [kfac(seed) for seed in (1, 2, 3)]
    if structure == "ekfac":
        matrices = [matrix.power(1.0) for matrix in matrices]
    total = sum(matrix.to_dense() for matrix in matrices)
    merged = merge_tasks(matrices, "exact")
    torch.testing.assert_close(merged.to_dense(), total)
    v = torch.randn(12, dtype=torch.float64)
    expected = torch.linalg.solve(total + torch.eye(12), v)
    torch.testing.assert_close(merged.solve(v, 1.0), expected)
