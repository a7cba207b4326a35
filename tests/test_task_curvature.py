"""What a task's curvature is made of: optimizers, the Hessian, singular directions."""

from __future__ import annotations

import warnings

import pytest
import torch
from continual_cases import (
    batches,
    block_diagonal,
    dense_fisher,
    dense_hessian,
    expected_matrix,
    flat,
    flat_grad,
    images,
    move_,
    network,
    rows_of,
    slices,
)
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC
from ekfac.continual import QuadraticPenalty, noise_edge, singular_directions
from ekfac.errors import (
    EkfacWarning,
    NotReadyError,
    StateMismatchError,
    UnsupportedOperationError,
)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)


def trained(optimizer=EKFAC, steps=3, model=None, **options):
    model = network() if model is None else model
    x, y = images()
    found = optimizer(model, lr=1e-3, **options)
    for _ in range(steps):
        found.zero_grad()
        cross_entropy(model(x), y).backward()
        found.step()
    return model, found


# -- from the optimizer ----------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_an_optimizers_factors_are_copied(structure):
    """They move on with training, the penalty does not."""
    model, optimizer = trained()
    F = optimizer.curvature.matrix(structure, parameters=model).to_dense()
    penalty = QuadraticPenalty(model, structure, strength=2.0)
    penalty.consolidate(optimizer.curvature, num_examples=30)
    anchor = flat(model)
    x, y = images(9)
    for _ in range(6):  # factors are updated at steps 3 and 9
        optimizer.zero_grad()
        (cross_entropy(model(x), y) + penalty()).backward()
        optimizer.step()
    now = optimizer.curvature.matrix(structure, parameters=model).to_dense()
    assert not torch.allclose(now, F, rtol=1e-3)
    d = flat(model) - anchor
    model.zero_grad()
    value = penalty()
    value.backward()
    close(value.detach(), d @ F @ d)
    close(flat_grad(model), 2 * F @ d)


def test_the_optimizers_first_factors_are_the_data_s():
    """One step over all data with the exact Fisher matrix: K-FAC of the same data."""
    x, y = images()
    before = network()
    expected = expected_matrix("kfac", before, x)
    model, optimizer = trained(KFAC, 1, before, fisher="exact")
    penalty = QuadraticPenalty(model, "kfac")
    penalty.consolidate(optimizer.curvature, num_examples=30)
    close(penalty.matrix().to_dense(), expected)
    assert optimizer.curvature["0"].A is not None
    assert y.shape == (30,)


def test_scalings_are_estimated_again_in_the_optimizers_basis():
    model, optimizer = trained()
    penalty = QuadraticPenalty(model, "ekfac")
    modes = model.training
    penalty.consolidate(optimizer.curvature, scalings=batches())
    assert model.training is modes
    F = dense_fisher(model.eval(), images()[0])
    found = penalty.matrix().to_dense()
    for name, part in slices(model):
        layer = optimizer.curvature[name]
        U = torch.kron(layer.Q_G[0], layer.Q_A[0])
        index = part.start + rows_of(model.get_submodule(name))
        own = F[index[:, None], index]
        block = (U * (U.mT @ own @ U).diagonal()) @ U.mT
        close(found[index[:, None], index], block)


def test_kronecker_scalings_are_the_diagonal_of_the_factors():
    model, optimizer = trained(steps=4, basis_interval=1000)
    penalty = QuadraticPenalty(model, "ekfac")
    penalty.consolidate(optimizer.curvature, scalings="kronecker")
    found = penalty.matrix().to_dense()
    for name, part in slices(model):
        layer = optimizer.curvature[name]
        U = torch.kron(layer.Q_G[0], layer.Q_A[0])
        K = torch.kron(layer.G[0], layer.A[0])
        index = part.start + rows_of(model.get_submodule(name))
        close(found[index[:, None], index], (U * (U.mT @ K @ U).diagonal()) @ U.mT)


def test_other_structures_from_an_optimizer():
    model, optimizer = trained()
    F = optimizer.curvature.matrix("ekfac", parameters=model)
    diagonal = QuadraticPenalty(model, "diagonal")
    diagonal.consolidate(optimizer.curvature)
    close(diagonal.matrix().diagonal().flat(), F.to_dense().diagonal())
    top = QuadraticPenalty(model, "hessian_top_k", k=3)
    top.consolidate(optimizer.curvature)
    for key, block in F.blocks.items():
        values = top.matrix().blocks[key].eigenvalues()
        expected = block.eigenvalues()
        close(values[-3:], expected[-3:])
        assert not values[:-3].any()
    for structure in ("block_diagonal", "singular_directions"):
        penalty = QuadraticPenalty(model, structure)
        with pytest.raises(
            UnsupportedOperationError, match="consolidate from a loader"
        ):
            penalty.consolidate(optimizer.curvature)


def test_layers_that_a_task_did_not_use_are_not_counted_twice():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 5)
            self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
            self.head = 0

        def forward(self, x):
            return self.heads[self.head](self.body(x).relu())

    torch.manual_seed(0)
    model, optimizer = trained(model=Heads().double())
    penalty = QuadraticPenalty(model, "kfac", merge="exact")
    penalty.consolidate(optimizer.curvature)
    first = penalty.matrix()
    assert set(first.blocks) == {"body", "heads.0"}
    restored = QuadraticPenalty(model, "kfac", merge="exact")
    restored.load_state_dict(penalty.state_dict())
    with pytest.raises(NotReadyError, match="not consolidated already"):
        restored.consolidate(optimizer.curvature)
    model.head = 1
    x, y = images(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)
        for _ in range(6):  # factors are updated at steps 3 and 9
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    for p in (penalty, restored):
        p.consolidate(optimizer.curvature)
        (term,) = p.tasks
        counts = {name: len(matrices) for name, matrices in term.blocks.items()}
        assert counts == {"body": 2, "heads.0": 1, "heads.1": 1}
        head = term.blocks["heads.0"][0].to_dense()
        assert torch.equal(head, first.blocks["heads.0"].to_dense())


def test_a_curvature_that_does_not_fit_is_refused():
    model, optimizer = trained()
    other = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    penalty = QuadraticPenalty(other, "kfac")
    with pytest.raises(StateMismatchError, match=r"layers \['0', '2'\] do not fit"):
        penalty.consolidate(optimizer.curvature)
    shorter = nn.Sequential(nn.Linear(4, 5)).double()
    with pytest.raises(StateMismatchError, match=r"layers \['2'\] do not fit"):
        QuadraticPenalty(shorter, "kfac").consolidate(optimizer.curvature)
    fresh = EKFAC(network(), lr=1e-3)
    with pytest.raises(NotReadyError, match="train before consolidating"):
        QuadraticPenalty(fresh.model, "ekfac").consolidate(fresh.curvature)
    with pytest.raises(TypeError, match=r"pass its \.curvature"):
        QuadraticPenalty(model).consolidate(optimizer)
    _, kfac = trained(KFAC, model=network())
    with pytest.raises(NotReadyError, match="which KFAC does not keep"):
        QuadraticPenalty(kfac.model, "ekfac").consolidate(kfac.curvature)
    with pytest.raises(ValueError, match="scalings must be"):
        QuadraticPenalty(model).consolidate(optimizer.curvature, scalings="other")
    before = QuadraticPenalty(model)
    optimizer.curvature["0"].averages["s"].total.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer '0' is not finite"):
        before.consolidate(optimizer.curvature)
    assert before.tasks == []
    assert before.num_tasks == 0
    assert before.state_dict()["seen"] == {}


def test_parameters_outside_of_the_blocks_are_named():
    class WithScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.linear(x) * self.scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)
        model, optimizer = trained(model=WithScale().double())
    penalty = QuadraticPenalty(model)
    with pytest.warns(EkfacWarning, match=r"\['scale'\] are in no Kronecker block"):
        penalty.consolidate(optimizer.curvature)
    loader = QuadraticPenalty(model)
    loader.consolidate(batches())
    with torch.no_grad():
        model.scale += 1
    assert penalty() == 0
    assert loader() > 0


def test_a_penalty_in_the_loss_leaves_the_factors_alone():
    """Its gradient does not pass through the layers' outputs."""
    found = []
    for strength in (0.0, 100.0):
        model, optimizer = trained(EKFAC, 1, network(), fisher="exact")
        penalty = QuadraticPenalty(model, "kfac", strength)
        penalty.consolidate(batches())
        move_(model)
        optimizer = EKFAC(model, lr=0.0, fisher="exact", factor_interval=1)
        x, y = images()
        (cross_entropy(model(x), y) + penalty()).backward()
        optimizer.step()
        found.append(optimizer.curvature.matrix("kfac").to_dense())
    close(found[0], found[1])


# -- rotated EWC -----------------------------------------------------------------------


def test_rotated_ewc_is_the_ekfac_penalty():
    """Turn a network into its eigenbases, take the diagonal there, and compare."""
    model, (x, _) = network(bias=False), images()
    penalty = QuadraticPenalty(model, "rotated")
    penalty.consolidate(batches())
    layers = {n: blocks[0].layer for n, blocks in penalty.tasks[0].blocks.items()}
    turned = nn.Sequential()
    for name, module in model.named_children():
        if not isinstance(module, nn.Linear):
            turned.append(module)
            continue
        Q_A, Q_G = layers[name].Q_A[0], layers[name].Q_G[0]
        parts = [
            nn.Linear(*reversed(m.shape), bias=False).double()
            for m in (Q_A, module.weight, Q_G)
        ]
        with torch.no_grad():
            for part, m in zip(
                parts, (Q_A.mT, Q_G.mT @ module.weight @ Q_A, Q_G), strict=True
            ):
                part.weight.copy_(m)
        parts[0].requires_grad_(False)
        parts[2].requires_grad_(False)
        turned.extend(parts)
    close(turned(x), model(x))
    diagonal = QuadraticPenalty(turned, "diagonal")
    diagonal.consolidate(batches())
    old = {n: m.weight.detach().clone() for n, m in model.named_children() if n != "1"}
    move_(model, size=1.0)
    inner = [m for m in turned if isinstance(m, nn.Linear) and m.weight.requires_grad]
    with torch.no_grad():
        for module, name in zip(inner, old, strict=True):
            Q_A, Q_G = layers[name].Q_A[0], layers[name].Q_G[0]
            module.weight += (
                Q_G.mT @ (model.get_submodule(name).weight - old[name]) @ Q_A
            )
    close(diagonal(), penalty())


# -- the Hessian and singular directions -----------------------------------------------


def test_the_top_of_large_and_small_layers(monkeypatch):
    """Formed and iterated alike."""
    model = network()
    x, y = images()
    H = dense_hessian(model, x, y)
    found = []
    for limit in (2048, 1):
        monkeypatch.setattr("ekfac.continual.task_curvature.DENSE", limit)
        penalty = QuadraticPenalty(model, "hessian_top_k", k=2)
        penalty.consolidate(batches(), generator=torch.Generator().manual_seed(0))
        found.append(penalty.matrix().to_dense())
    expected = torch.zeros_like(H)
    for _, part in slices(model):
        values, vectors = torch.linalg.eigh(H[part, part])
        top = vectors[:, -2:] * values[-2:].sqrt()
        expected[part, part] = top @ top.mT
    close(found[0], expected)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6)


def test_singular_directions_are_haink_s():
    """Equation 7.11 for the weights, the top of the Hessian for the biases."""
    model = network()
    x, y = images()
    penalty = QuadraticPenalty(model, "singular_directions", k=2, strength=2.0)
    penalty.consolidate(batches())
    weights = QuadraticPenalty(model, "singular_directions", k=2, strength=2.0)
    weights.consolidate()
    old = [p.detach().clone() for p in model.parameters()]
    H = block_diagonal(model, dense_hessian(model, x, y))
    move_(model)
    expected, biases = torch.zeros(()).double(), torch.zeros(()).double()
    for p, w in zip(model.parameters(), old, strict=True):
        if p.dim() == 2:
            U, nu, Vh = torch.linalg.svd(w)
            for i in range(2):
                expected = expected + nu[i] * (U[:, i] @ (p - w) @ Vh[i]) ** 2
    for start, stop, p, w in ((20, 25, 1, 1), (40, 43, 3, 3)):
        values, vectors = torch.linalg.eigh(H[start:stop, start:stop])
        d = list(model.parameters())[p] - old[w]
        biases = biases + values[-1] * (vectors[:, -1] @ d) ** 2
    close(weights(), expected)
    close(penalty(), expected + biases)


def test_singular_directions_sum_to_the_weight():
    """Identity 6 of Haink: orthonormal, and ``sum nu_i w_i = vec W``."""
    W = torch.randn(6, 2, 3, dtype=torch.float64)
    F = singular_directions(W, "w", k=1.0)
    close(F.rows @ F.rows.mT, torch.eye(6).double())
    close(F.weights @ F.rows, W.flatten())


def test_the_edge_of_noise():
    """Few singular values of noise beyond, planted ones all (identity 10)."""
    generator = torch.Generator().manual_seed(0)
    for n, m in ((400, 200), (100, 100), (60, 300)):
        noise = 0.3 * torch.randn(n, m, generator=generator, dtype=torch.float64)
        values = torch.linalg.svdvals(noise)
        edge = noise_edge(noise)
        assert edge == pytest.approx(0.3 * (n**0.5 + m**0.5), rel=0.03)
        assert int((values > edge).sum()) <= 2
        U = torch.linalg.qr(torch.randn(n, 4, generator=generator).double())[0]
        V = torch.linalg.qr(torch.randn(m, 4, generator=generator).double())[0]
        planted = noise + 3 * edge * U @ V.mT
        assert len(singular_directions(planted, "w").weights) in (4, 5)
    # Of a layer without anything beyond, five.
    assert len(singular_directions(torch.eye(8), "w").weights) == 5


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5])
def test_numbers_of_directions_are_checked(k):
    penalty = QuadraticPenalty(network(), "singular_directions", k=k)
    with pytest.raises(ValueError, match="k must be a positive number"):
        penalty.consolidate()


def test_only_chosen_layers_are_penalised():
    model = network()
    penalty = QuadraticPenalty(model, "ekfac", parameters=["2"])
    penalty.consolidate(batches())
    assert set(penalty.tasks[0].anchor) == {"2.weight", "2.bias"}
    with torch.no_grad():
        model[0].weight += 1
    assert penalty() == 0
