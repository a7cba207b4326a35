"""Synaptic intelligence, memory aware synapses and the update constraint."""

from __future__ import annotations

import warnings

import pytest
import torch
from continual_cases import batches, flat, images, move_, network
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.continual import (
    MemoryAwareSynapses,
    QuadraticPenalty,
    SynapticIntelligence,
    UpdateConstraint,
)
from ekfac.errors import EkfacWarning, NotReadyError, StateMismatchError


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-12)


def importance(penalty):
    return penalty.matrix().diagonal().flat()


# -- synaptic intelligence -------------------------------------------------------------


class Bowl(nn.Module):
    """A quadratic loss with a known diagonal Hessian, and one unused parameter."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.h = torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)

    def forward(self):
        return (self.h * self.w**2).sum() / 2


def descend(model, si, steps, rate=1e-3):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (model() + si()).backward()
        with si.path():
            optimizer.step()


def test_importance_of_a_quadratic_loss_is_its_curvature():
    """Zenke et al. 2017, section 4.1, with steps in place of a flow.

    The work of ``T`` steps is ``rate h^2 w^2 (1 - r^2T) / (1 - r^2)``, ``r = 1 - rate
    h``; at the minimum that makes an importance of ``h / (1 - rate h / 2)``.
    """
    model, rate = Bowl(), 0.04
    start = model.w.detach().clone()
    si = SynapticIntelligence(model, damping=0.0)
    descend(model, si, steps=30, rate=rate)
    r = 1 - rate * model.h
    work = rate * model.h**2 * start**2 * (1 - r**60) / (1 - r**2)
    close(si._work["w"], work)
    descend(model, si, steps=600, rate=rate)
    si.consolidate()
    expected = model.h / (1 - rate * model.h / 2)
    torch.testing.assert_close(importance(si)[:3], expected, rtol=1e-4, atol=0)
    assert not importance(si)[3:].any()
    with torch.no_grad():
        model.w.add_(1.0)
    close(si().detach(), (importance(si)[:3]).sum() / 2)


def test_the_work_is_that_of_the_task_alone():
    """The penalty's gradient, scaled and accumulated with the loss, is taken out."""
    found = []
    for strength in (0.0, 3.0):
        model = Bowl()
        si = SynapticIntelligence(model, strength)
        descend(model, si, steps=50)
        si.consolidate()
        with torch.no_grad():
            model.w.copy_(torch.tensor([1.0, 2.0, -1.0]))
        si._start = si._now()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.zero_grad()
        for _ in range(2):
            (0.25 * (model() + si())).backward()
        task = 0.5 * model.h * model.w.detach()
        before = model.w.detach().clone()
        with si.path():
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        close(si._work["w"], -task * (model.w.detach() - before))
        found.append(model.w.detach().clone())
    assert not torch.equal(*found)


def test_importance_is_never_negative():
    model = Bowl()
    si = SynapticIntelligence(model)
    # Uphill, the parameters raise the loss: their work is negative.
    optimizer = torch.optim.SGD([model.w], lr=0.01, maximize=True)
    model().backward()
    with si.path():
        optimizer.step()
    assert (si._work["w"] < 0).all()
    si._work["w"][1] *= -1
    si.consolidate()
    values = importance(si)
    assert values[0] == values[2] == 0 < values[1]


def test_paths_are_checked_and_restart_with_every_task():
    model = Bowl()
    si = SynapticIntelligence(model)
    with pytest.raises(NotReadyError, match="No step was followed"):
        si.consolidate()
    descend(model, si, steps=3)
    si.consolidate()
    with pytest.raises(NotReadyError, match="No step was followed"):
        si.consolidate()
    first = importance(si)
    descend(model, si, steps=3)
    si.consolidate()
    assert (importance(si)[:3] > first[:3]).all()
    with pytest.raises(ValueError, match="damping must be"):
        SynapticIntelligence(model, damping=-1.0)
    # A step that blew up adds nothing.
    optimizer = torch.optim.SGD(model.parameters(), lr=float("inf"))
    model().backward()
    with si.path():
        optimizer.step()
    assert si._work == {}


def test_a_path_is_saved_with_the_penalty():
    """Saved in the middle of a task, it goes on as if nothing had happened."""
    x, y = images()

    def steps(model, si, count):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(count):
            optimizer.zero_grad()
            (cross_entropy(model(x), y) + si()).backward()
            with si.path():
                optimizer.step()

    model = network()
    si = SynapticIntelligence(model, 2.0)
    steps(model, si, 3)
    si.consolidate()
    steps(model, si, 2)
    saved, weights = si.state_dict(), flat(model)
    copy = network()
    nn.utils.vector_to_parameters(weights, copy.parameters())
    other = SynapticIntelligence(copy)
    other.load_state_dict(saved)
    for m, p in ((model, si), (copy, other)):
        steps(m, p, 2)
        p.consolidate()
        steps(m, p, 1)
    assert torch.equal(flat(model), flat(copy))
    assert torch.equal(importance(si), importance(other))
    with pytest.raises(StateMismatchError, match="this model lacks"):
        SynapticIntelligence(Bowl()).load_state_dict(saved)


# -- memory aware synapses -------------------------------------------------------------


def mas_by_definition(model, inputs):
    total = 0
    for x in inputs:
        model.zero_grad()
        model(x.unsqueeze(0)).square().sum().backward()
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad
            for p in model.parameters()
        ]
        total = total + torch.cat([g.abs().flatten() for g in grads])
    model.zero_grad()
    return total / len(inputs)


class Odd(nn.Module):
    """Layers with positions, a shared layer, and a module without adapter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 2)
        self.norm = nn.LayerNorm(3)
        self.twice = nn.Linear(3, 3)
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x):
        x = self.norm(self.conv(x.unsqueeze(1)))
        x = self.twice(self.twice(x).relu())
        return self.lstm(x)[0][:, -1] * self.scale


@pytest.mark.parametrize("model", [network(), Odd().double()], ids=["linear", "odd"])
def test_sensitivities_are_of_single_examples(model):
    x, _ = images(count=9)
    mas = MemoryAwareSynapses(model, strength=3.0)
    mas.consolidate([x[:4], x[4:]])
    omega = mas_by_definition(model.eval(), x)
    close(importance(mas), 2 * omega)
    old = flat(model)
    move_(model)
    close(mas().detach(), 3 * (omega * (flat(model) - old).square()).sum())


def test_no_mode_or_statistic_changes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)
    ).double()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    mas = MemoryAwareSynapses(model)
    mas.consolidate(batches())
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="no batches"):
        mas.consolidate([])
    assert mas.num_tasks == 1


# -- the constraint --------------------------------------------------------------------


def memory(model, structure="ekfac", **options):
    penalty = QuadraticPenalty(model, structure, **options)
    penalty.consolidate(batches())
    return penalty


def update_of(model, optimizer, penalty=None, gamma=1.0):
    """Return how one step moves the parameters, constrained or not."""
    x, y = images(4)
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    before = flat(model)
    if penalty is None:
        optimizer.step()
        return flat(model) - before
    with UpdateConstraint(optimizer, penalty, gamma) as constraint:
        constraint.step()
    return flat(model) - before


@pytest.mark.parametrize("structure", ["ekfac", "kfac", "hessian_top_k", "diagonal"])
def test_the_constraint_is_haink_s(structure):
    """Identity 9: the leading direction goes, the others by their ratio."""
    gamma = 0.7
    model = network()
    penalty = memory(model, structure)
    plain = update_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    other = network()
    found = update_of(
        other,
        torch.optim.SGD(other.parameters(), lr=0.1),
        memory(other, structure),
        gamma,
    )
    expected, start = plain.clone(), 0
    F = penalty.matrix()
    place = {}
    for name, shape in F.space.shapes.items():
        place[name] = torch.arange(start, start + shape.numel())
        start += shape.numel()
    for block in F.blocks.values():
        index = torch.cat([place[name] for name in block.space.names])
        values, vectors = torch.linalg.eigh(block.to_dense())
        v = plain[index]
        for c, e in zip(values, vectors.mT, strict=True):
            v = v - gamma * c / values[-1] * (plain[index] @ e) * e
        expected[index] = v
    close(found, expected, 1e-7)


def test_equal_directions_are_projected_out_once_and_for_all():
    model = network()
    penalty = memory(model, "singular_directions", k=3)
    for _, matrix in penalty.tasks[0].matrices():
        matrix.weights = torch.ones_like(matrix.weights)
    moved = update_of(model, torch.optim.Adam(model.parameters(), lr=0.1), penalty)
    assert moved.norm() > 0
    F = penalty.matrix().to_dense()
    assert (F @ moved).norm() < 1e-12
    complement = torch.eye(len(F)).double() - F
    close(complement @ moved, moved)


def test_other_parameters_and_skipped_steps_are_left_alone():
    model = network()
    penalty = memory(model, parameters=["0"])
    free = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    plain = torch.optim.SGD(free.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    found, expected = update_of(model, sgd, penalty), update_of(free, plain)
    close(found[25:], expected[25:])
    assert not torch.allclose(found[:25], expected[:25])
    empty = QuadraticPenalty(free)
    a = update_of(free, plain, empty)
    assert a.norm() > 0
    with pytest.raises(ValueError, match="strength must be between"):
        UpdateConstraint(plain, empty, 1.5)


def test_it_wraps_any_optimizer_schedulers_and_closures_included():
    model = network()
    x, y = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)
        optimizer = EKFAC(model, lr=1e-2)
    penalty = memory(model, "ekfac")
    constraint = UpdateConstraint(optimizer, penalty)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    start = flat(model)
    top = {
        k: b[0].top_eigenpairs(1).vectors[:, 0]
        for k, b in penalty.tasks[0].blocks.items()
    }

    def closure():
        constraint.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        assert constraint.step(closure) > 0
        schedule.step()
    assert constraint.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)
    moved = flat(model) - start
    for (_, direction), part in zip(
        top.items(), (slice(0, 25), slice(25, 43)), strict=True
    ):
        assert (moved[part] @ direction).abs() < 1e-6 * moved[part].norm()
    constraint.close()
    before = flat(model)
    closure()
    optimizer.step()
    later = flat(model) - before
    assert (later[:25] @ top["0"]).abs() > 1e-6 * later[:25].norm()


@pytest.mark.parametrize(
    "extra", ["discarded", "zeroed", "grad", "inputs", "no penalty", "accumulated"]
)
def test_only_what_is_in_grad_is_taken_out(extra):
    """The work of a step is ``-g_task dtheta``, whatever other passes there were."""
    model = Bowl()
    si = SynapticIntelligence(model, 3.0)
    descend(model, si, steps=50)
    si.consolidate()
    with torch.no_grad():
        model.w.copy_(torch.tensor([1.0, 2.0, -1.0]))
    si._start = si._now()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    times = 1.0
    if extra in ("discarded", "zeroed", "no penalty"):
        (model() + si()).backward()
        optimizer.zero_grad(set_to_none=extra != "zeroed")
    elif extra == "grad":
        optimizer.zero_grad()
        torch.autograd.grad(model() + si(), [model.w])
    elif extra == "inputs":
        x = torch.ones((), requires_grad=True)
        (x * (model() + si())).backward(inputs=[x])
        optimizer.zero_grad()
    if extra == "accumulated":
        optimizer.zero_grad()
        (model() + si()).backward()
        times = 2.0
    (model() + (0.0 if extra == "no penalty" else 1.0) * si()).backward()
    task = times * model.h * model.w.detach()
    before = model.w.detach().clone()
    with si.path():
        optimizer.step()
    close(si._work["w"], -task * (model.w.detach() - before))
