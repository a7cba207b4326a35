"""Factor sums that leave before the step: when they do, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import process_cases
import torch
import torch.distributed as dist
from process_cases import (
    TOLERANCE,
    Case,
    Small,
    assert_same_on_all_ranks,
    build,
    compare,
    convolutions,
    difference,
    global_mean,
    images,
    joined_ranks,
    layer_on_one_rank_only,
    nan_on_one_rank,
    optimizer_of,
    share,
    tied_tokens,
)
from sharded_cases import compare_sharded, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ekfac import EKFAC, KFAC
from ekfac.curvature.distributed import group as distributed
from ekfac.curvature.distributed.group import Ranks, Sum, Term
from ekfac.optim.optimizer import KroneckerOptimizer


@contextmanager
def small_buffers() -> Iterator[None]:
    """Send every layer by itself."""
    size, distributed.BUCKET = distributed.BUCKET, 1
    try:
        yield
    finally:
        distributed.BUCKET = size


def begun(optimizer: KroneckerOptimizer) -> int:
    """Return how many rounds were begun, if they were all of use."""
    rounds = optimizer._collector.overlapped
    assert rounds is not None, "a round was of no use, and they ended"
    return rounds._begun


def ended(optimizer: KroneckerOptimizer) -> bool:
    """Return whether rounds are begun no more."""
    return optimizer._collector.overlapped is None


@contextmanager
def recorded(model: nn.Module, events: list[str]) -> Iterator[None]:
    """Write down asynchronous sums, and when the layers' output gradients arrive."""
    original = Ranks.begin_sum

    def noting(ranks: Ranks, terms: Sequence[Term], group: Any) -> Sum:
        events.append("sum")
        return original(ranks, terms, group)

    def called(name: str, out: Any) -> None:
        out.register_hook(lambda grad: events.append(name))

    handles = [
        layer.register_forward_hook(lambda m, x, out, name=name: called(name, out))
        for name, layer in model.named_children()
    ]
    try:
        with mock.patch.object(Ranks, "begin_sum", noting):
            yield
    finally:
        for handle in handles:
            handle.remove()


def events_of_a_step(
    rank: int, world: int, model: nn.Module, inner: nn.Module, **options: Any
) -> list[str]:
    """Return what happened in one step: gradients, sums, the pass's end, the step's."""
    optimizer = optimizer_of(EKFAC, model, **options)
    events: list[str] = []
    x, y = share(images(0, 4 * world), rank, [4] * world)
    with small_buffers(), recorded(inner, events):
        cross_entropy(model(x), y).backward()
        events.append("pass ends")
        optimizer.step()
        events.append("step ends")
    return events


def sent_during_the_backward_pass(rank: int, world: int) -> None:
    """The last layer's sums leave before the first layer's gradient is there."""
    mesh = init_device_mesh("cpu", (world,))
    for options in ({}, {"gradient_workers": 1 / world}, {"fisher": "mc"}):
        for shards in (False, True) if "fisher" not in options else (False,):
            inner = build(Small)
            model = sharded(inner, mesh) if shards else DDP(inner)
            events = events_of_a_step(rank, world, model, inner, **options)
            sums = [n for n, event in enumerate(events) if event == "sum"]
            grads = [n for n, event in enumerate(events) if event == "first"]
            assert len(sums) == 4, events  # head, norm, inner, first
            assert sums[-1] < events.index("pass ends"), events
            assert sums[0] < grads[-1], events
            if "fisher" in options:  # all leave when the loss's own gradients set out
                assert sums[-1] < grads[-1], events


def not_sent_before_the_step(rank: int, world: int) -> None:
    """Without gradients that are averaged in the pass, sums leave at the step."""
    inner = build(Small)
    model = DDP(inner)
    optimizer = optimizer_of(EKFAC, model)
    x, y = share(images(0, 4 * world), rank, [4] * world)
    events: list[str] = []
    with small_buffers(), recorded(inner, events):
        with model.no_sync():
            loss = cross_entropy(model(x), y)
        loss.backward()
        average(model)
        events.append("pass ends")
        optimizer.step()
    end = events.index("pass ends")
    assert "sum" not in events[:end], events
    assert events[end:].count("sum") == 8, events  # A and G of each layer
    assert begun(optimizer) == 0


def every_round_is_used(rank: int, world: int) -> None:
    """Where the pass averages gradients, every update of the factors is overlapped."""
    mesh = init_device_mesh("cpu", (world,))
    weighted = {"loss_reduction": "global_mean"}
    uneven = [5, 0, 3, 2][:world]
    with small_buffers():
        assert begun(compare(rank, KFAC, [4] * world)) == 20
        scaling = {"scaling": "per_example"}
        assert begun(compare(rank, EKFAC, uneven, **weighted, **scaling)) == 20
        fewer = {"gradient_workers": 1 / world}
        assert begun(compare(rank, EKFAC, uneven, **weighted, **fewer)) == 20
        assert begun(compare(rank, KFAC, [4] * world, fisher="exact")) == 20
        found = compare_sharded(rank, world, mesh, EKFAC)
        assert begun(found) == 20
        found = compare_sharded(rank, world, mesh, EKFAC, batches=2, **fewer)
        assert begun(found) == 20


Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module], Tensor]
Passes = Callable[[KroneckerOptimizer, DDP, list[Loss]], None]


def compare_passes(
    rank: int, world: int, passes: Passes, steps: int = 12, **options: Any
) -> KroneckerOptimizer:
    """Train on two batches per step; compare with one process on all of them.

    Args:
        rank: This one.
        world: How many.
        passes: Makes the gradient, from the optimizer, the network and the two losses.
        steps: How many.
        options: Of the optimizer.
    """
    reference, ddp = build(Small), DDP(build(Small))
    weighted = {"loss_reduction": "global_mean"}
    own = process_cases.ALONE
    single = optimizer_of(EKFAC, reference, process_group=own, **weighted)
    several = optimizer_of(EKFAC, ddp, **weighted, **options)

    def loss(batch: Batch, net: nn.Module) -> Tensor:
        return global_mean(net(batch[0]), batch[1], world, 8 * world)

    for step in range(steps):
        batches = [images(2 * step + half, 4 * world) for half in range(2)]
        single.zero_grad()
        for x, y in batches:
            global_mean(reference(x), y, 1, 8 * world).backward()
        single.step()
        several.zero_grad()
        shares = [share(batch, rank, [4] * world) for batch in batches]
        with small_buffers():
            passes(several, ddp, [partial(loss, batch) for batch in shares])
            several.step()
    assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)
    assert_same_on_all_ranks(ddp)
    return several


def average(model: nn.Module) -> None:
    """Average the gradients over the ranks."""
    for p in model.parameters():
        dist.all_reduce(p.grad)
        assert p.grad is not None
        p.grad /= dist.get_world_size()


def two_passes_that_average(rank: int, world: int) -> None:
    """The second round has the sums of both."""

    def passes(optimizer: KroneckerOptimizer, ddp: DDP, losses: list[Loss]) -> None:
        for loss in losses:
            loss(ddp).backward()

    assert begun(compare_passes(rank, world, passes)) == 2 * 12


def a_pass_after_the_round(rank: int, world: int) -> None:
    """What comes after the sums have left makes them travel again."""

    def on_all(optimizer: KroneckerOptimizer, ddp: DDP, losses: list[Loss]) -> None:
        losses[0](ddp).backward()
        losses[1](ddp.module).backward()
        average(ddp)

    def on_one(optimizer: KroneckerOptimizer, ddp: DDP, losses: list[Loss]) -> None:
        if rank == 0:
            on_all(optimizer, ddp, losses)
            return
        losses[1](ddp.module).backward()
        losses[0](ddp).backward()
        average(ddp)

    def as_one(optimizer: KroneckerOptimizer, ddp: DDP, losses: list[Loss]) -> None:
        (losses[0](ddp) + losses[1](ddp)).backward()

    for passes in (on_all, on_one, as_one):
        for options in ({}, {"gradient_workers": 1 / world}):
            assert ended(compare_passes(rank, world, passes, steps=6, **options))


def discarded_passes(rank: int, world: int) -> None:
    """A pass that no step follows leaves nothing behind."""

    def passes(optimizer: KroneckerOptimizer, ddp: DDP, losses: list[Loss]) -> None:
        (3 * losses[1](ddp)).backward()
        optimizer.zero_grad()
        for loss in losses:
            loss(ddp).backward()

    assert begun(compare_passes(rank, world, passes)) == 3 * 12


def a_pass_that_a_rank_has_missed(rank: int, world: int) -> None:
    """A rank that has begun fewer rounds makes up for it: no sum meets another."""

    def passes(optimizer: KroneckerOptimizer, ddp: DDP, losses: list[Loss]) -> None:
        with optimizer.capture.paused() if rank == world - 1 else nullcontext():
            (3 * losses[1](ddp)).backward()
        optimizer.zero_grad()
        for loss in losses:
            loss(ddp).backward()

    assert ended(compare_passes(rank, world, passes))


def scaled_losses(rank: int, world: int) -> None:
    """A scaler's scale goes out of the sums, and a step that it rejects leaves none."""
    reference, ddp = build(Small), DDP(build(Small))
    single = optimizer_of(EKFAC, reference, process_group=process_cases.ALONE)
    several = optimizer_of(EKFAC, ddp)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(12):
        x, y = images(step, 4 * world)
        several.zero_grad()
        own = share((x, y), rank, [4] * world)
        loss = cross_entropy(ddp(own[0]), own[1])
        rejected = step == 5  # of the steps that update the factors
        factor = float("inf") if rejected and rank == world - 1 else 1.0
        scaler.scale(loss * factor).backward()
        scaler.step(several)
        scaler.update()
        if not rejected:
            single.zero_grad()
            cross_entropy(reference(x), y).backward()
            single.step()
    assert scaler.get_scale() == 2.0**9
    assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)
    assert begun(several) == 12  # the rejected one too


def in_small_buffers(rank: int, world: int) -> None:
    """Layers that ranks lack, share, leave for the end or meet in another order."""
    with small_buffers():
        for case in (
            layer_on_one_rank_only,
            tied_tokens,
            convolutions,
            joined_ranks,
            nan_on_one_rank,
        ):
            case(rank, world)


OVERLAP_CASES: list[Case] = [
    sent_during_the_backward_pass,
    not_sent_before_the_step,
    every_round_is_used,
    two_passes_that_average,
    a_pass_after_the_round,
    discarded_passes,
    a_pass_that_a_rank_has_missed,
    scaled_losses,
    in_small_buffers,
]
SLOW_OVERLAP_CASES: list[Case] = [every_round_is_used, in_small_buffers]
