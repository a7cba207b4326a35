"""Models that change on several ranks after the optimizer was constructed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import process_cases
import torch
from process_cases import (
    KINDS,
    TOLERANCE,
    Case,
    Small,
    assert_same_on_all_ranks,
    build,
    difference,
    expected_error,
    images,
    optimizer_of,
    shard,
    share,
)
from sharded_cases import sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ekfac import EKFAC
from ekfac.optim.optimizer import KroneckerOptimizer

Change = Callable[[Any, KroneckerOptimizer], None]


def exchange(model: Any, optimizer: KroneckerOptimizer) -> None:
    """Another head, of more outputs."""
    torch.manual_seed(5)
    model.head = nn.Linear(4, 5)
    optimizer.add_param_group({"params": list(model.head.parameters())})


def exchange_by_parameter(model: Any, optimizer: KroneckerOptimizer) -> None:
    """Another weight in the layer that is called twice."""
    torch.manual_seed(5)
    model.inner.weight = nn.Parameter(torch.randn(4, 4))
    optimizer.add_param_group({"params": [model.inner.weight]})


def nest(model: Any, optimizer: KroneckerOptimizer) -> None:
    """Another name."""
    model.inner = nn.Sequential(model.inner)


def freeze(model: Any, optimizer: KroneckerOptimizer) -> None:
    model.first.requires_grad_(False)
    optimizer.zero_grad()


def cast(model: Any, optimizer: KroneckerOptimizer) -> None:
    model.float()


CHANGES: list[Change] = [exchange, exchange_by_parameter, nest, freeze, cast]


def train_changed(
    rank: int, world: int, change: Change, kind: Any, options: dict[str, Any]
) -> None:
    """Change a model on all ranks and in one process, and compare the training."""
    alone = {k: v for k, v in options.items() if k != "gradient_workers"}
    reference, model = build(Small), build(Small)
    single = optimizer_of(kind, reference, process_group=process_cases.ALONE, **alone)
    ddp = DDP(model)
    several = optimizer_of(kind, ddp, **options)
    for step in range(10):
        if step == 4:
            change(reference, single)
            change(model, several)
            ddp = DDP(model)
        x, y = images(step, 4 * world)
        x = x.to(next(model.parameters()).dtype)
        single.zero_grad()
        cross_entropy(reference(x), y).backward()
        single.step()
        x, y = share((x, y), rank, [4] * world)
        several.zero_grad()
        cross_entropy(ddp(x), y).backward()
        several.step()
    allowed = 1e-4 if change is cast else TOLERANCE
    gap = difference(model, reference)
    assert gap < allowed, (change.__name__, kind.__name__, options, gap)
    assert_same_on_all_ranks(model)
    names = {row.layer for row in several.describe().rows}
    assert names == {row.layer for row in single.describe().rows}


def layers_change_alike(rank: int, world: int) -> None:
    for change in CHANGES:
        train_changed(rank, world, change, EKFAC, {})
    for kind, options in KINDS:
        train_changed(rank, world, exchange, kind, options)
        fewer = {**options, "gradient_workers": 1 / world}
        train_changed(rank, world, exchange, kind, fewer)


def layers_change_on_one_rank(rank: int, world: int) -> None:
    """All ranks say so, and which parameter it is."""
    for change in (exchange, nest, cast, freeze):
        model = build(Small)
        ddp = DDP(model)
        optimizer = optimizer_of(EKFAC, ddp)
        x, y = share(images(0, 4 * world), rank, [4] * world)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(ddp(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        cross_entropy(ddp(x), y).backward()
        if rank == world - 1:
            change(model, optimizer)
            if change is freeze:
                cross_entropy(model(x), y).backward()
        text = "otherwise on rank" if change is not freeze else "no gradient"
        with expected_error(Exception, text):
            optimizer.step()


def gradients_of_a_new_layer_are_not_averaged(rank: int, world: int) -> None:
    """Where DistributedDataParallel was not put around the changed model again."""
    model = build(Small)
    ddp = DDP(model, find_unused_parameters=True)
    optimizer = optimizer_of(EKFAC, ddp)
    x, y = share(images(0, 4 * world), rank, [4] * world)
    for step in range(2):
        optimizer.zero_grad()
        cross_entropy(ddp(x), y).backward()
        if step:
            with expected_error(ValueError, "parameter 'head.weight': the norm of its"):
                optimizer.step()
        else:
            optimizer.step()
            exchange(model, optimizer)


def sharded_layers_change(rank: int, world: int) -> None:
    """A layer of a sharded model is exchanged and sharded."""
    mesh = init_device_mesh("cpu", (world,))
    for kind, options in KINDS:
        reference, model = build(Small), sharded(build(Small), mesh)
        own = process_cases.ALONE
        single = optimizer_of(kind, reference, process_group=own, **options)
        several = optimizer_of(kind, model, **options)
        for step in range(8):
            if step == 4:
                exchange(reference, single)
                torch.manual_seed(5)
                model.head = shard(nn.Linear(4, 5), mesh)
                several.add_param_group({"params": list(model.head.parameters())})
            x, y = images(step, 4 * world)
            single.zero_grad()
            cross_entropy(reference(x), y).backward()
            single.step()
            x, y = share((x, y), rank, [4] * world)
            several.zero_grad()
            cross_entropy(model(x), y).backward()
            several.step()
        gap = difference(model, reference)
        assert gap < TOLERANCE, (kind.__name__, options, gap)


def a_new_layer_is_not_sharded(rank: int, world: int) -> None:
    """Its gradients are not averaged, or it is refused."""
    mesh = init_device_mesh("cpu", (world,))
    model = sharded(build(Small), mesh)
    optimizer = optimizer_of(EKFAC, model)
    x, y = share(images(0, 4 * world), rank, [4] * world)
    for step in range(2):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if step:
            with expected_error(ValueError, "parameter 'head."):
                optimizer.step()
        else:
            optimizer.step()
            torch.manual_seed(5)
            model.head = nn.Linear(4, 5)
            head = list(model.head.parameters())
            with expected_error(ValueError, "parameter 'head."):
                optimizer.add_param_group({"params": head})


CHANGED_CASES: list[Case] = [
    layers_change_alike,
    layers_change_on_one_rank,
    gradients_of_a_new_layer_are_not_averaged,
    sharded_layers_change,
    a_new_layer_is_not_sharded,
]
QUICK_CHANGED_CASES: list[Case] = [
    layers_change_on_one_rank,
    gradients_of_a_new_layer_are_not_averaged,
    sharded_layers_change,
]
