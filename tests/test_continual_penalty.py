"""Value, gradient, proximal step and state of penalties, against dense matrices."""

from __future__ import annotations

import copy
import io

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
)
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.continual import Penalty, QuadraticPenalty
from ekfac.errors import NotReadyError, StateMismatchError, UnsupportedOperationError
from ekfac.matrices import DenseMatrix
from ekfac.vectors import VectorSpace

FISHERS = ("diagonal", "block_diagonal", "kfac", "ekfac", "rotated")
STRUCTURES = (*FISHERS, "hessian_top_k", "singular_directions")


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)


def check(penalty, model, expected_value, expected_gradient):
    model.zero_grad()
    value = penalty()
    value.backward()
    close(value.detach(), expected_value)
    close(flat_grad(model), expected_gradient)
    close(penalty.gradient().flat(), expected_gradient)
    with torch.no_grad():
        assert penalty() == value


@pytest.mark.parametrize("structure", FISHERS)
def test_value_and_gradient_are_those_of_the_dense_quadratic_form(structure):
    model = network()
    x, _ = images()
    F = expected_matrix(structure, model, x)
    penalty = QuadraticPenalty(model, structure, strength=3.0)
    assert penalty() == 0
    penalty.consolidate(batches())
    anchor = flat(model)
    check(penalty, model, torch.zeros(()).double(), torch.zeros_like(anchor))
    move_(model)
    d = flat(model) - anchor
    check(penalty, model, 1.5 * d @ F @ d, 3 * F @ d)
    close(penalty.matrix().to_dense(), F)


def test_all_eigenpairs_of_the_hessian_make_the_quadratic_model():
    """Identity 8 of Haink's equation 7.10: layers of a ReLU network have PSD blocks."""
    model = network()
    H = block_diagonal(model, dense_hessian(model, *images()))
    penalty = QuadraticPenalty(model, "hessian_top_k", k=1.0)
    penalty.consolidate(batches())
    anchor = flat(model)
    move_(model)
    d = flat(model) - anchor
    check(penalty, model, d @ H @ d / 2, H @ d)
    values = []
    for k in range(1, 9):
        part = QuadraticPenalty(model, "hessian_top_k", k=k)
        move_(model, size=-0.1)
        part.consolidate(batches())
        move_(model)
        values.append(float(part().detach()))
    assert values == sorted(values)
    assert values[-1] < d @ H @ d / 2


def test_negative_curvature_is_left_out():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = images()
    H = dense_hessian(model, x, y)
    part = slice(0, 25)
    values, vectors = torch.linalg.eigh(H[part, part])
    assert values[0] < -1e-4
    positive = (vectors * values.clamp(min=0)) @ vectors.mT
    top = QuadraticPenalty(model, "hessian_top_k", k=1.0)
    top.consolidate([(x, y)])
    close(top.matrix().to_dense()[part, part], positive, 1e-7)
    blocks = QuadraticPenalty(model, "block_diagonal")
    blocks.consolidate([(x, y)], kind="hessian")
    close(blocks.matrix().to_dense()[part, part], positive, 1e-7)
    diagonal = QuadraticPenalty(model, "diagonal")
    diagonal.consolidate([(x, y)], kind="hessian")
    close(diagonal.matrix().diagonal().flat(), H.diagonal().clamp(min=0))


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_other_fisher_matrices(kind):
    model = network()
    x, y = images()
    penalty = QuadraticPenalty(model, "block_diagonal")
    generator = torch.Generator().manual_seed(0)
    penalty.consolidate([(x, y)], kind=kind, samples=4000, generator=generator)
    found = penalty.matrix().to_dense()
    if kind == "mc":
        F = block_diagonal(model, dense_fisher(model, x))
        assert (found - F).norm() < 0.05 * F.norm()
        return
    rows = []
    for a, b in zip(x, y, strict=True):
        model.zero_grad()
        cross_entropy(model(a[None]), b[None]).backward()
        rows.append(flat_grad(model))
    rows = torch.stack(rows)
    close(found, block_diagonal(model, rows.mT @ rows / len(x)))


@pytest.mark.parametrize("structure", FISHERS)
def test_modes_weights_and_decay(structure):
    """Separate: a form around each anchor. Online: all around the last."""
    model = network()
    merge = "exact" if structure in ("kfac", "ekfac", "rotated") else "auto"
    separate = QuadraticPenalty(model, structure, mode="separate", decay=0.5)
    online = QuadraticPenalty(model, structure, decay=0.5, merge=merge)
    anchors, matrices = [], []
    for task, weight in enumerate((1.0, 2.0, 1.0)):
        for penalty in (separate, online):
            penalty.consolidate(batches(task), weight=weight)
        factor = weight * 0.5 ** (2 - task)
        F = expected_matrix(structure, model, images(task)[0])
        matrices.append(factor * F)
        anchors.append(flat(model))
        move_(model, seed=task)
    assert separate.num_tasks == online.num_tasks == 3
    now = flat(model)
    forms = list(zip(matrices, anchors, strict=True))
    value = sum((now - a) @ F @ (now - a) / 2 for F, a in forms)
    check(separate, model, value, sum(F @ (now - a) for F, a in forms))
    total, d = sum(matrices), now - anchors[-1]
    check(online, model, d @ total @ d / 2, total @ d)
    close(online.matrix().to_dense(), total)
    close(separate.matrix().to_dense(), total)


@pytest.mark.parametrize("structure", FISHERS)
def test_strengths_of_layers(structure):
    model = network()
    penalty = QuadraticPenalty(model, structure, layer_strengths={"0": 0.25})
    penalty.consolidate(batches())
    anchor = flat(model)
    move_(model)
    d = flat(model) - anchor
    m = torch.ones_like(d)
    m[:25] = 0.5
    F = expected_matrix(structure, network(), images()[0])
    F = m[:, None] * F * m
    check(penalty, model, d @ F @ d / 2, F @ d)
    penalty.layer_strengths = {"0": 4.0, "0.bias": 0.0}
    penalty.strength = 2.0
    m[:20], m[20:25] = 2.0, 0.0
    F = expected_matrix(structure, network(), images()[0])
    F = m[:, None] * F * m
    check(penalty, model, d @ F @ d, 2 * F @ d)
    step = torch.linalg.solve(torch.eye(len(d)).double() + 0.6 * F, d)
    penalty.proximal_(0.3)
    close(flat(model) - anchor, step, 1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_proximal_step_solves_its_equation(structure, mode):
    """``theta' + lr grad penalty(theta') = theta``, whatever the penalty is made of."""
    model = network()
    penalty = QuadraticPenalty(model, structure, strength=5.0, mode=mode)
    for task in range(2):
        penalty.consolidate(batches(task))
        move_(model, seed=task)
    before = flat(model)
    penalty.proximal_(0.2)
    close(flat(model) + 0.2 * penalty.gradient().flat(), before, 1e-6)
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac", "block_diagonal"])
def test_the_proximal_step_is_stable_where_a_gradient_step_is_not(structure):
    model = network().float()
    x, y = images()
    penalty = QuadraticPenalty(model, structure)
    penalty.consolidate([(x.float(), y)])
    move_(model, size=1.0)
    start = float(penalty().detach())
    for strength in (1e3, 1e8, 1e15, 1e30):
        penalty.strength = strength
        penalty.proximal_(0.1)
        assert torch.isfinite(flat(model)).all()
        penalty.strength = 1.0
        assert float(penalty().detach()) <= start
    assert float(penalty().detach()) < 1e-6 * start  # single precision


def test_new_and_grown_parameters_are_free():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(x).relu())

    torch.manual_seed(0)
    model = Growing().double()
    for structure in ("diagonal", "kfac", "ekfac", "block_diagonal", "hessian_top_k"):
        penalty = QuadraticPenalty(model, structure, k=1.0)
        penalty.consolidate(batches())
        old = penalty.matrix().to_dense()
        wide = nn.Linear(5, 4).double()
        with torch.no_grad():
            wide.weight[:3], wide.bias[:3] = model.head.weight, model.head.bias
        grown = copy.deepcopy(model)
        grown.head, grown.extra = wide, nn.Linear(2, 2).double()
        penalty.model = grown
        assert penalty() == 0
        move_(grown)
        grown.zero_grad()
        value = penalty()
        value.backward()
        # The old entries' places among the parameters that were there before.
        place = torch.cat(
            [torch.arange(40), torch.arange(45, 48)]
        )  # body 25, head W 15 of 20, head b 3 of 4
        d = flat(grown)[:49][place] - flat(model)
        close(value.detach(), d @ old @ d / 2)
        expected = torch.zeros(55, dtype=torch.float64)
        expected[place] = old @ d
        assert grown.extra.weight.grad is None
        close(flat_grad(grown), expected)
        # A second task, on the grown network: the first keeps to its old entries.
        x, _ = images(3)
        new_y = torch.randint(4, (30,))
        frozen = [name for name, _ in grown.named_parameters() if "extra" not in name]
        again = QuadraticPenalty(grown, structure, k=1.0, parameters=frozen)
        again.consolidate([(x, new_y)])
        penalty.parameters = tuple(frozen)
        penalty.consolidate([(x, new_y)])
        total = torch.zeros(55, 55, dtype=torch.float64)
        total[place[:, None], place] = old
        new = again.matrix().to_dense()
        total[:49, :49] += new[:49, :49]
        found = penalty.matrix().to_dense()[:49, :49]
        if structure == "ekfac":
            close(found.trace(), total[:49, :49].trace())
        if structure not in ("kfac", "ekfac"):
            close(found, total[:49, :49], 1e-7)
        else:
            exact = QuadraticPenalty(model, structure, merge="exact")
            exact.consolidate(batches())
            exact.model, exact.parameters = grown, tuple(frozen)
            exact.consolidate([(x, new_y)])
            close(exact.matrix().to_dense()[:49, :49], total[:49, :49])


def test_buffers_are_left_alone_and_norms_are_penalised():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    ).double()
    model(images()[0])
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    penalty = QuadraticPenalty(model, "ekfac")
    penalty.consolidate(batches())
    assert model.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    model[1].running_mean += 1
    assert penalty() == 0
    with torch.no_grad():
        model[1].weight += 0.1
    penalty().backward()
    assert model[1].weight.grad.abs().sum() > 0


def test_the_gradient_adds_to_that_of_the_loss_and_scales_with_it():
    model = network()
    penalty = QuadraticPenalty(model, "kfac", strength=2.0)
    penalty.consolidate(batches())
    move_(model)
    x, y = images(5)
    cross_entropy(model(x), y).backward()
    alone = flat_grad(model)
    model.zero_grad()
    (3 * (cross_entropy(model(x), y) + penalty())).backward()
    close(flat_grad(model), 3 * (alone + penalty.gradient().flat()))


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_second_derivative_is_the_matrix(mode):
    """Products with the Hessian of loss and penalty see the penalty too."""
    model = network()
    penalty = QuadraticPenalty(model, "kfac", strength=2.0, mode=mode)
    penalty.consolidate(batches())
    move_(model)
    penalty.consolidate(batches(1))
    move_(model)
    parameters = list(model.parameters())
    v = [torch.randn_like(p) for p in parameters]
    grads = torch.autograd.grad(3 * penalty(), parameters, create_graph=True)
    inner = sum((g * u).sum() for g, u in zip(grads, v, strict=True))
    found = torch.cat([t.flatten() for t in torch.autograd.grad(inner, parameters)])
    expected = 6 * penalty.matrix().to_dense() @ torch.cat([u.flatten() for u in v])
    close(found, expected)


def test_half_precision_and_autocast():
    x, y = images()
    model = network().float()
    penalty = QuadraticPenalty(model, "ekfac")
    penalty.consolidate([(x.float(), y)])
    move_(model, size=1e-3)
    exact = penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(penalty(), exact)
    half = network().bfloat16()
    penalty = QuadraticPenalty(half, "ekfac")
    penalty.consolidate([(x.bfloat16(), y)])
    move_(half)
    value = penalty()
    value.backward()
    assert value.dtype == torch.float32
    assert half[0].weight.grad.dtype == torch.bfloat16
    assert value > 0


def test_wrappers_and_compiled_models_share_names():
    model = network()
    penalty = QuadraticPenalty(nn.DataParallel(model), "kfac")
    penalty.consolidate(batches())
    move_(model)
    other = QuadraticPenalty(model, "kfac")
    other.load_state_dict(penalty.state_dict())
    assert other() == penalty() > 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_states_are_plain_and_restore_everything(structure):
    model = network()
    penalty = QuadraticPenalty(model, structure, strength=2.5, decay=0.9, mode="online")
    for task in range(2):
        penalty.consolidate(batches(task))
        move_(model, seed=task)
    penalty.layer_strengths = {"2": 3.0}
    file = io.BytesIO()
    torch.save(penalty.state_dict(), file)
    file.seek(0)
    other = QuadraticPenalty(model, structure)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(), penalty())
    assert torch.equal(other.gradient().flat(), penalty.gradient().flat())
    for p in (penalty, other):
        p.consolidate(batches(2))
    move_(model)
    assert torch.equal(other(), penalty())
    assert (other.strength, other.decay, other.num_tasks) == (2.5, 0.9, 3)


def test_states_of_other_networks_are_refused_with_their_layers():
    model = network()
    penalty = QuadraticPenalty(model, "ekfac")
    penalty.consolidate(batches())
    state = penalty.state_dict()
    shallow = QuadraticPenalty(nn.Sequential(nn.Linear(4, 5)).double(), "ekfac")
    with pytest.raises(StateMismatchError, match=r"layers \['2'\]"):
        shallow.load_state_dict(state)
    narrow = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)).double()
    smaller = QuadraticPenalty(narrow, "ekfac")
    with pytest.raises(StateMismatchError, match=r"layer '0' is \[3, 4\], and was"):
        smaller.load_state_dict(state)
    assert shallow.tasks == smaller.tasks == []
    with pytest.raises(StateMismatchError, match="'structure' is 'ekfac'"):
        QuadraticPenalty(model, "kfac").load_state_dict(state)
    with pytest.raises(StateMismatchError, match="'mode' is 'online'"):
        QuadraticPenalty(model, mode="separate").load_state_dict(state)
    missing = network()
    del missing[2]
    penalty.model = missing
    with pytest.raises(StateMismatchError, match=r"layers \['2'\]"):
        penalty()


def test_a_failed_consolidation_changes_nothing():
    model = network()
    penalty = QuadraticPenalty(model, "ekfac")
    penalty.consolidate(batches())
    move_(model)
    before = penalty.state_dict()
    x, y = images()
    bad = x.clone()
    bad[3] = float("nan")
    other = nn.Sequential(nn.Linear(4, 2)).double()
    space = VectorSpace.of(other)
    foreign = DenseMatrix(space, torch.eye(10).double())
    infinite = DenseMatrix(VectorSpace.of(model), torch.full((43, 43), torch.inf))
    cases = [
        ([(bad, y)], ValueError, "not finite"),
        ([], ValueError, "no batches"),
        (iter([]), ValueError, "no batches"),
        (None, ValueError, "needs data"),
        ((x, y), TypeError, r"\[\(x, y\)\]"),
        (x, TypeError, "iterable of batches"),
        (foreign, StateMismatchError, r"'0.weight' of shape \[2, 4\] is \[5, 4\]"),
        (infinite, ValueError, "not finite"),
    ]
    for source, error, text in cases:
        with pytest.raises(error, match=text):
            penalty.consolidate(source)
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        penalty.consolidate(batches())
    after = penalty.state_dict()
    assert str(before) == str(after)


def test_arguments_are_checked():
    model = network()
    cases = [
        ({"structure": "fisher"}, ValueError, "structure must be one of"),
        ({"mode": "both"}, ValueError, "mode must be one of"),
        ({"strength": -1.0}, ValueError, "strength must be finite"),
        ({"decay": float("nan")}, ValueError, "decay must be finite"),
        ({"merge": "sum"}, ValueError, "merge must be one of"),
        ({"merge": "pooled"}, UnsupportedOperationError, "not for structure='ekfac'"),
        ({"layer_strengths": {"7": 1.0}}, StateMismatchError, r"names \['7'\]"),
    ]
    for options, error, text in cases:
        with pytest.raises(error, match=text):
            QuadraticPenalty(model, **options)
    penalty = QuadraticPenalty(model)
    with pytest.raises(NotReadyError, match="Nothing was consolidated"):
        penalty.matrix()
    for options, text in (
        ({"kind": "l2"}, "kind must be one of"),
        ({"weight": 0.0}, "weight must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            penalty.consolidate(batches(), **options)
    with pytest.raises(UnsupportedOperationError, match="The Hessian has no structure"):
        penalty.consolidate(batches(), kind="hessian")
    with pytest.raises(ValueError, match="is of the Hessian"):
        QuadraticPenalty(model, "hessian_top_k").consolidate(batches(), kind="mc")
    with pytest.raises(ValueError, match="lr must be finite"):
        penalty.proximal_(-1.0)
    assert isinstance(penalty, Penalty)


def test_a_matrix_made_elsewhere_is_copied():
    model = network()
    M = ekfac.fisher(model, batches(), "dense")
    penalty = QuadraticPenalty(model, "block_diagonal")
    penalty.consolidate(M)
    anchor = flat(model)
    move_(model)
    d = flat(model) - anchor
    F = dense_fisher(network(), images()[0])
    M.matrix.zero_()
    check(penalty, model, d @ F @ d / 2, F @ d)


def test_dropout_and_modes_of_the_model_do_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    values = []
    for training in (True, False):
        model.train(training)
        penalty = QuadraticPenalty(model, "ekfac")
        penalty.consolidate(batches())
        assert model.training is training
        values.append(penalty.matrix().trace())
    assert values[0] == values[1]
