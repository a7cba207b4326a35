"""Sequences of tasks: exact resumption, less forgetting, what a loop needs."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.continual import (
    MemoryAwareSynapses,
    QuadraticPenalty,
    SynapticIntelligence,
    UpdateConstraint,
)
from ekfac.errors import EkfacWarning

MAKE = {
    "diagonal": lambda m: QuadraticPenalty(m, "diagonal", 30.0),
    "kfac": lambda m: QuadraticPenalty(m, "kfac", 3.0),
    "ekfac": lambda m: QuadraticPenalty(m, "ekfac", 3.0),
    "separate": lambda m: QuadraticPenalty(m, "ekfac", 3.0, mode="separate"),
    "live": lambda m: QuadraticPenalty(m, "ekfac", 3.0),
    "si": lambda m: SynapticIntelligence(m, 1.0),
    "mas": lambda m: MemoryAwareSynapses(m, 0.3),
}


def task(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return three clusters, turned differently in every task."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 6, generator=generator)
    y = torch.arange(60) % 3
    x = centres[y] + torch.randn(60, 6, generator=generator)
    turn = torch.randn(6, 6, generator=generator.manual_seed(number))
    return x @ torch.linalg.qr(turn)[0], y


class Run:
    """Everything that a script would save."""

    def __init__(self, name: str) -> None:
        self.name = name
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        self.penalty = MAKE[name](self.model)
        self.optimizer = EKFAC(self.model, lr=5e-3)

    def steps(self, number: int, count: int) -> None:
        x, y = task(number)
        for i in range(count):
            self.optimizer.zero_grad()
            part = slice(20 * (i % 3), 20 * (i % 3) + 20)
            (cross_entropy(self.model(x[part]), y[part]) + self.penalty()).backward()
            if isinstance(self.penalty, SynapticIntelligence):
                with self.penalty.path():
                    self.optimizer.step()
            else:
                self.optimizer.step()

    def finish(self, number: int) -> None:
        if isinstance(self.penalty, SynapticIntelligence):
            self.penalty.consolidate()
        elif self.name == "live":
            self.penalty.consolidate(self.optimizer.curvature, num_examples=60)
        else:
            self.penalty.consolidate([task(number)])

    def accuracy(self, number: int) -> float:
        x, y = task(number)
        return float((self.model(x).argmax(1) == y).float().mean())

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.model, self.penalty, self.optimizer)
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        parts = (self.model, self.penalty, self.optimizer)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("name", MAKE)
def test_resuming_in_the_middle_of_a_sequence_is_exact(name):
    whole = Run(name)
    whole.steps(0, 10)
    whole.finish(0)
    whole.steps(1, 5)
    again = Run(name)
    again.load(whole.saved())
    for run in (whole, again):
        run.steps(1, 5)
        run.finish(1)
        run.steps(2, 5)
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(whole.penalty(), again.penalty())
    assert whole.penalty.num_tasks == again.penalty.num_tasks == 2


@pytest.mark.parametrize("name", ["kfac", "ekfac", "live"])
def test_penalties_prevent_forgetting(name):
    """At the end of training the exact Fisher matrix is small, the averages not yet.

    Those of the scalings are over ten steps, so they are below those of the start.
    """
    forgotten, kept = Run(name), Run(name)
    forgotten.penalty.strength = 0.0
    kept.penalty.strength = 30.0 if name == "live" else 100.0
    for run in (forgotten, kept):
        run.steps(0, 40)
        assert run.accuracy(0) > 0.95
        run.finish(0)
        run.steps(2, 40)
        assert run.accuracy(2) > 0.8
    assert kept.accuracy(0) > forgotten.accuracy(0) + 0.15


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradient_scalers_and_accumulation(scale):
    """Scaled and split losses add the same gradient."""
    run = Run("kfac")
    run.steps(0, 5)
    run.finish(0)
    run.steps(1, 3)
    x, y = task(1)
    run.optimizer.zero_grad()
    (cross_entropy(run.model(x), y) + run.penalty()).backward()
    whole = [p.grad.clone() for p in run.model.parameters()]
    run.optimizer.zero_grad()
    for part in (slice(0, 30), slice(30, 60)):
        loss = cross_entropy(run.model(x[part]), y[part]) + run.penalty()
        (scale * loss / 2).backward()
    for p, expected in zip(run.model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad / scale, expected, rtol=1e-4, atol=1e-6)


def test_proximal_training_survives_a_strength_that_gradients_do_not():
    found = {}
    for proximal in (True, False):
        run = Run("kfac")
        run.steps(0, 40)
        run.finish(0)
        run.penalty.strength = 1e5
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05)
        x, y = task(1)
        for _ in range(30):
            optimizer.zero_grad()
            loss = cross_entropy(run.model(x), y)
            (loss if proximal else loss + run.penalty()).backward()
            optimizer.step()
            if proximal:
                run.penalty.proximal_(0.05)
        found[proximal] = (run.accuracy(0), run.penalty().item())
    assert found[True][0] > 0.95
    assert found[True][1] < 1e3
    assert not np.isfinite(found[False][1]) or found[False][1] > 1e6


def test_a_constraint_and_a_penalty_share_their_memory():
    run = Run("ekfac")
    run.steps(0, 20)
    run.finish(0)
    run.optimizer.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)
        optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    constraint = UpdateConstraint(optimizer, run.penalty)
    x, y = task(1)
    for _ in range(3):
        constraint.zero_grad()
        (cross_entropy(run.model(x), y) + run.penalty()).backward()
        constraint.step()
    run.finish(1)
    assert run.penalty.num_tasks == 2
    before = run.model[0].weight.detach().clone()
    constraint.zero_grad()
    cross_entropy(run.model(x), y).backward()
    constraint.step()
    assert not torch.equal(before, run.model[0].weight)
    assert len(constraint._largest) == 2
