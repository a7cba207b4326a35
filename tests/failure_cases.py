"""Ranks that differ, fail or fall out of step: what the others are told, and when."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import sys
import time
from copy import deepcopy
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from process_cases import Case, Small, build, expected_error, images, optimizer_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from ekfac import EKFAC, KFAC
from ekfac.curvature.distributed import allreduce, group
from ekfac.curvature.distributed.group import GRACE
from ekfac.errors import RankError
from ekfac.likelihoods import Categorical
from ekfac.optim import DistributedState
from ekfac.optim.optimizer import KroneckerOptimizer

# Option -> a value that the last rank has, and the others have not.
DIFFERENT: dict[str, Any] = {
    "lr": 2e-3,
    "momentum": 0.8,
    "nesterov": False,
    "direction": "spectral",
    "weight_decay": 0.1,
    "damping": 0.2,
    "damping_mode": "absolute",
    "damping_split": "factored",
    "grafting": None,
    "factor_decay": 0.9,
    "scaling_decay": 0.5,
    "factor_interval": 5,
    "basis_interval": 20,
    "basis_delay": 1,
    "scaling_interval": 2,
    "scaling": "per_example",
    "fisher": "mc",
    "loss_reduction": "sum",
    "likelihood": "gaussian",
    "sharing": "reduce",
    "power": -0.5,
    "kl_clip": 1e-3,
    "conv_factors": "spatially_uncorrelated",
    "max_dim": 3,
    "max_aspect": 2.0,
    "basis_tolerance": 0.1,
    "rank": 2,
    "precision": "full",
    "storage": "packed",
    "memory_budget": 10**6,
    "gradient_workers": 1.0,
}


def options_that_differ_are_refused(rank: int, world: int) -> None:
    """Every option of the constructor, on all ranks, before any group is made."""
    every = inspect.signature(EKFAC).parameters.keys()
    assert DIFFERENT.keys() == every - {"params", "model", "process_group"}
    model = nn.Linear(3, 2)
    groups = len(dist.distributed_c10d._world.pg_map)
    last = rank == world - 1
    for name, value in DIFFERENT.items():
        usual = {"gradient_workers": 1 / world, "direction": "natural"}
        options = {**usual, name: value} if last else usual
        named = f"Ranks 0 and {world - 1} construct different optimizers: {name}"
        with expected_error(ValueError, named):
            EKFAC(model, **options)
    with expected_error(ValueError, "likelihood is"):
        EKFAC(model, likelihood=Categorical(class_dim=1 if last else 2))
    with expected_error(ValueError, "the optimizer is 'EKFAC' on rank 0 and 'KFAC'"):
        (KFAC if last else EKFAC)(model)
    with expected_error(ValueError, "lr of param group 1 is 0.1 on rank 0 and 0.2"):
        rates = [{"params": [model.weight]}, {"params": [model.bias]}]
        rates[1]["lr"] = 0.2 if last else 0.1
        EKFAC(rates, model=model)
    with expected_error(ValueError, "params of group 0 is"):
        order = list(model.parameters())[:: -1 if last else 1]
        EKFAC(order, model=model)
    assert len(dist.distributed_c10d._world.pg_map) == groups


def groups_take_the_users_time_limit(rank: int, world: int) -> None:
    limit = timedelta(seconds=17)
    mine = dist.new_group(list(range(world)), timeout=limit)
    ranks = EKFAC(nn.Linear(3, 2), process_group=mine, gradient_workers=1 / world).ranks
    assert ranks is not None
    for one in (ranks.group, ranks.aside, ranks.row, ranks.column):
        assert one._get_backend(torch.device("cpu")).options._timeout == limit
        assert one is not mine


def averaged_by_hand(
    step: int,
    rank: int,
    model: nn.Module,
    optimizer: KroneckerOptimizer,
    group: Any = None,
) -> None:
    """Do a backward pass and average the gradients."""
    optimizer.zero_grad()
    x, y = images(7 * step + rank, 4)
    cross_entropy(model(x), y).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= dist.get_world_size()


def drifting_options_are_refused(rank: int, world: int) -> None:
    """Options of param groups that a scheduler makes different, at the next step."""
    last = rank == world - 1
    for key in ("lr", "momentum", "weight_decay", "damping", "kl_clip"):
        model = build(Small)
        optimizer = optimizer_of(EKFAC, model, kl_clip=0.1)
        averaged_by_hand(0, rank, model, optimizer)
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        averaged_by_hand(1, rank, model, optimizer)
        if last:
            optimizer.param_groups[0][key] *= 1 - 1e-12
            optimizer.param_groups[0][key] += 1e-12
        error = f"step 2: {key} of param group 0 is"
        with expected_error(RankError, error):
            optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, old)


def another_checkpoint_is_refused(rank: int, world: int) -> None:
    """One rank goes on from step 1, the others from step 2."""
    model = build(Small)
    optimizer = optimizer_of(EKFAC, model)
    states = []
    for step in range(2):
        averaged_by_hand(step, rank, model, optimizer)
        optimizer.step()
        states.append(optimizer.state_dict())
    optimizer.load_state_dict(states[0 if rank == world - 1 else 1])
    averaged_by_hand(2, rank, model, optimizer)
    named = f"Ranks 0 and {world - 1} are at different steps: 3 and 2"
    with expected_error(RankError, named):
        optimizer.step()


def another_run_is_refused(rank: int, world: int) -> None:
    """One rank goes on from the same step of another run."""
    last = rank == world - 1
    for what in ("model", "optimizer"):
        states = []
        for start in (0, 5):
            model = build(Small)
            optimizer = optimizer_of(EKFAC, model)
            for step in range(start, start + 2):
                averaged_by_hand(step, rank, model, optimizer)
                optimizer.step()
            states.append((deepcopy(model.state_dict()), optimizer.state_dict()))
        weights, state = states[0]
        model.load_state_dict(states[last and what == "model"][0])
        optimizer.load_state_dict(states[last and what == "optimizer"][1])
        averaged_by_hand(2, rank, model, optimizer)
        for p in model.parameters():  # as DDP would have them
            dist.broadcast(p.grad, 0)
        named = "parameter 'first.weight': its norm is between"
        with expected_error(
            ValueError, named if what == "model" else "layer 'first', A: its norm is"
        ):
            optimizer.step()
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        averaged_by_hand(2, rank, model, optimizer)
        optimizer.step()


def another_run_of_divided_curvature_is_refused(rank: int, world: int) -> None:
    """No two ranks have the same averages: what was loaded is compared."""
    states: list[Any] = []
    for start in (0, 5):
        model = build(Small)
        optimizer = optimizer_of(EKFAC, model, gradient_workers=1 / world)
        for step in range(start, start + 2):
            averaged_by_hand(step, rank, model, optimizer)
            optimizer.step()
        states.append(DistributedState(optimizer).state_dict())
    last = rank == world - 1
    DistributedState(optimizer).load_state_dict(deepcopy(states[last]))
    averaged_by_hand(2, rank, model, optimizer)
    with expected_error(ValueError, "the loaded state's checksum: its norm is"):
        optimizer.step()
    DistributedState(optimizer).load_state_dict(states[0])
    averaged_by_hand(2, rank, model, optimizer)
    optimizer.step()


class Doubled(nn.Linear):
    """A layer that has a block as ``Linear`` has, and does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * x.abs().amax()


def layers_that_differ_are_refused(rank: int, world: int) -> None:
    """The parameters are the same, what uses them is not."""
    model = build(Small)
    if rank == world - 1:
        model.inner.__class__ = Doubled
    with expected_error(ValueError, "layer 'inner' is"):
        EKFAC(model)


def a_rank_without_gradients_is_refused(rank: int, world: int) -> None:
    model = build(Small)
    optimizer = optimizer_of(EKFAC, model, gradient_workers=1 / world)
    averaged_by_hand(0, rank, model, optimizer)
    optimizer.step()
    averaged_by_hand(1, rank, model, optimizer)
    if rank == world - 1:
        model.inner.zero_grad()
    named = f"layer 'inner' has no gradient on ranks [{world - 1}]"
    with expected_error(RankError, named):
        optimizer.step()


# -- failures --------------------------------------------------------------------------

LIMIT = 5.0


def fails(rank: int, world: int, how: str) -> None:
    """Train; at step 3 the last rank fails; the others say which and where."""
    limit = timedelta(seconds=LIMIT)
    mine, theirs = (dist.new_group(list(range(world)), timeout=limit) for _ in "ab")
    model = build(Small)
    several: dict[str, Any] = {"process_group": mine, "gradient_workers": 1 / world}
    several["direction"] = "natural"  # all layers have directions to share
    optimizer = optimizer_of(EKFAC, model, **several)
    for step in range(3):
        averaged_by_hand(step, rank, model, optimizer, theirs)
        if step < 2:
            optimizer.step()
    begin, error = time.monotonic(), None
    if rank == world - 1:
        fail(how, rank, model, optimizer, theirs)
    else:
        try:
            optimizer.step()
        except RankError as caught:
            error = str(caught)
    took = time.monotonic() - begin
    if how == "is killed":
        time.sleep(GRACE)
    else:
        dist.barrier()
    if rank < world - 1:
        assert error is not None, "no error"
        assert re.search(r"of layers? '(first|inner|norm|head)'", error), error
        assert error.startswith("step 3: "), error
        at_once = how not in ("skips a step", "gets no data")
        assert took < (0.8 * LIMIT if at_once else LIMIT + GRACE + 1), (took, error)
        named = {
            "raises": "raised ValueError: bad batch",
            "raises in forward": "raised ValueError: bad input",
            "breaks": "raised KeyError",
            "ends": "raised SystemExit: 3",
        }
        expected = named.get(how, "took no part and did not report")
        assert f"rank {world - 1} {expected}" in error, error


def fail(
    how: str,
    rank: int,
    model: nn.Module,
    optimizer: KroneckerOptimizer,
    group: Any,
) -> None:
    """Fail in the way of this name."""

    def bad() -> float:
        raise ValueError("bad batch")

    def forward() -> float:
        x, y = images(7 * 3 + rank, 4)
        loss = cross_entropy(model(x), y)
        loss.backward()
        return float(loss)

    if how == "raises in forward":
        with (
            mock.patch.object(
                model.norm, "forward", side_effect=ValueError("bad input")
            ),
            expected_error(ValueError, "bad input"),
        ):
            optimizer.step(forward)
    elif how == "raises":
        with expected_error(ValueError, "bad batch"):
            optimizer.step(bad)
    elif how == "breaks":
        with (
            mock.patch.object(allreduce, "basis_updates", side_effect=KeyError("bad")),
            expected_error(KeyError, "bad"),
        ):
            optimizer.step()
    elif how == "ends":
        with expected_error(SystemExit, "3"):
            optimizer.step(lambda: sys.exit(3))
    elif how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "skips a step":
        with contextlib.suppress(RuntimeError):  # the others have given up by then
            averaged_by_hand(3, rank, model, optimizer, group)


def is_killed(rank: int, world: int) -> None:
    fails(rank, world, "is killed")


def skips_a_step(rank: int, world: int) -> None:
    fails(rank, world, "skips a step")


def gets_no_data(rank: int, world: int) -> None:
    fails(rank, world, "gets no data")


def raises(rank: int, world: int) -> None:
    fails(rank, world, "raises")


def raises_in_forward(rank: int, world: int) -> None:
    fails(rank, world, "raises in forward")


def breaks(rank: int, world: int) -> None:
    fails(rank, world, "breaks")


def ends(rank: int, world: int) -> None:
    fails(rank, world, "ends")


def one_constructs_none(rank: int, world: int) -> None:
    """The others wait for the time limit and say who is missing."""
    mine = dist.new_group(list(range(world)), timeout=timedelta(seconds=LIMIT))
    if rank < world - 1:
        with expected_error(RankError, f"rank {world - 1} took no part"):
            EKFAC(build(Small), process_group=mine)
    dist.barrier()


# Reports of all that wait arrive, however busy the machine is.
patiently = mock.patch.object(group, "GRACE", 15.0)


@patiently
def constructs_again(rank: int, world: int) -> None:
    """First the last rank is missing, then the first: each is named."""
    last = world - 1
    for missing in (last, 0):
        mine = dist.new_group(list(range(world)), timeout=timedelta(seconds=LIMIT))
        dist.barrier()  # they begin together, and so wait equally long
        if rank != missing:
            with expected_error(RankError, f"rank {missing} took no part"):
                EKFAC(build(Small), process_group=mine)
        dist.barrier()


@patiently
def constructs_in_another_group(rank: int, world: int) -> None:
    groups = [
        dist.new_group(list(range(world)), timeout=timedelta(seconds=LIMIT))
        for _ in range(2)
    ]
    dist.barrier()
    with expected_error(RankError, "with other process groups"):
        EKFAC(build(Small), process_group=groups[rank == world - 1])
    dist.barrier()


def fails_in_its_backward(rank: int, world: int, how: str, steps: int) -> None:
    """The last rank fails amid a backward pass of DDP, after so many steps.

    The others say so before DDP finds its own sums broken.
    """
    mine = dist.new_group(list(range(world)), timeout=timedelta(seconds=LIMIT))
    model = DistributedDataParallel(build(Small))
    optimizer = optimizer_of(EKFAC, model, process_group=mine)

    def fail_now(grad: Tensor) -> None:
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("bad gradient")

    for step in range(steps):
        averaged(step, rank, model, optimizer)
        optimizer.step()
    if rank == world - 1:
        model.module.inner.weight.register_hook(fail_now)
        with expected_error(ValueError, "bad gradient"):
            averaged(steps, rank, model, optimizer)
        return
    begin = time.monotonic()
    named = f"'norm', 'head' failed on rank {rank}: rank {world - 1} took no part"
    with expected_error(RankError, named) as caught:
        averaged(steps, rank, model, optimizer)
    assert str(caught.value).startswith(f"step {steps + 1}: ending the backward pass")
    assert time.monotonic() - begin < LIMIT


def averaged(
    step: int, rank: int, model: nn.Module, optimizer: KroneckerOptimizer
) -> None:
    """Do a backward pass of DDP."""
    optimizer.zero_grad()
    x, y = images(7 * step + rank, 4)
    cross_entropy(model(x), y).backward()


def is_killed_in_its_backward(rank: int, world: int) -> None:
    fails_in_its_backward(rank, world, "is killed", 2)


def raises_in_its_backward(rank: int, world: int) -> None:
    """At a step without factors."""
    fails_in_its_backward(rank, world, "raises", 3)


REFUSALS: list[Case] = [
    options_that_differ_are_refused,
    groups_take_the_users_time_limit,
    drifting_options_are_refused,
    another_checkpoint_is_refused,
    another_run_is_refused,
    another_run_of_divided_curvature_is_refused,
    layers_that_differ_are_refused,
    a_rank_without_gradients_is_refused,
]
FAILURES: list[Case] = [
    raises,
    raises_in_forward,
    breaks,
    ends,
    skips_a_step,
    gets_no_data,
    one_constructs_none,
    is_killed,  # the last: its process runs no more
]
