"""Sharded parameters, checkpoints and failures, on several processes."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import process_cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from communication_cost import Counted, Sizes, traffic
from damage import damaged, every_damage, read, unread
from process_cases import (
    KINDS,
    TOLERANCE,
    Case,
    DrawnByItself,
    Small,
    Tokens,
    Wide,
    adapt,
    adaptive_damping,
    build,
    compare,
    constructed_too_early,
    convolutions,
    difference,
    errors,
    expected_error,
    global_mean,
    images,
    nan_on_one_rank,
    optimizer_of,
    shard,
    share,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP
from training_cases import assert_identical, flattened

from ekfac import EKFAC, KFAC
from ekfac.curvature.distributed.assignment import grid
from ekfac.errors import StateMismatchError
from ekfac.optim import DistributedState, LevenbergMarquardt
from ekfac.optim.optimizer import KroneckerOptimizer


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """Shard the layers one by one, and the rest at the root."""
    for child in model.children():
        if isinstance(child, (nn.Linear, nn.Conv2d)) and child.weight.shape[0] != 7:
            shard(child, mesh)
    return shard(model, mesh)


def compare_sharded(
    rank: int,
    world: int,
    mesh: Any,
    kind: type[KroneckerOptimizer],
    /,
    *,
    sizes: list[int] | None = None,
    batches: int = 1,
    steps: int = 20,
    network: Callable[[], nn.Module] = Small,
    **options: Any,
) -> KroneckerOptimizer:
    """Train sharded on shares of every batch, and in one process on the whole."""
    sizes = sizes or [4] * world
    reference, model = build(network), sharded(build(network), mesh)
    alone = {k: v for k, v in options.items() if k != "gradient_workers"}
    own = process_cases.ALONE
    single = optimizer_of(kind, reference, process_group=own, **alone)
    several = optimizer_of(kind, model, **options)
    for step in range(steps):
        single.zero_grad()
        several.zero_grad()
        for number in range(batches):
            x, y = images(batches * step + number, sum(sizes))
            (cross_entropy(reference(x), y) / batches).backward()
            x, y = share((x, y), rank, sizes)
            model.set_requires_gradient_sync(number == batches - 1)
            loss = global_mean(model(x), y, world, sum(sizes))
            (loss / batches).backward()
        single.step()
        several.step()
    assert difference(model, reference) < TOLERANCE, difference(model, reference)
    assert difference(reference, build(network)) > 0.01
    return several


def fsdp(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind, options in KINDS:
        compare_sharded(rank, world, mesh, kind, **options)
    clip = {"grafting": None, "damping_mode": "absolute", "kl_clip": 1e-3}
    compare_sharded(rank, world, mesh, EKFAC, **clip, weight_decay=0.1, nesterov=True)


def fsdp_fewer_workers(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for workers in [n for n in range(1, world) if world % n == 0]:
        for kind, options in KINDS:
            options = {**options, "gradient_workers": workers / world}
            compare_sharded(rank, world, mesh, kind, **options)


def fsdp_accumulation(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind, options in KINDS:
        compare_sharded(rank, world, mesh, kind, batches=2, **options)


def fsdp_uneven(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    sizes = [3, 7, 1, 5][:world]
    options = {"loss_reduction": "global_mean"}
    for kind, others in KINDS:
        compare_sharded(rank, world, mesh, kind, sizes=sizes, **options, **others)


def fsdp_fisher(rank: int, world: int) -> None:
    """Pseudo-gradients go through the graph of sharded layers before the loss's own."""
    mesh = init_device_mesh("cpu", (world,))
    drawn = {"fisher": "mc", "likelihood": DrawnByItself()}
    for fisher in ({"fisher": "exact"}, drawn):
        for kind, options in KINDS:
            compare_sharded(rank, world, mesh, kind, **fisher, **options, steps=12)
        compare_sharded(rank, world, mesh, KFAC, **fisher, batches=2, steps=6)
        fewer = {"gradient_workers": 1 / world, "loss_reduction": "global_mean"}
        sizes = [3, 7, 1, 5][:world]
        compare_sharded(
            rank, world, mesh, EKFAC, **fisher, **fewer, sizes=sizes, steps=6
        )


def hsdp(rank: int, world: int) -> None:
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        for kind, options in KINDS:
            compare_sharded(rank, world, mesh, kind, **options)
        compare_sharded(rank, world, mesh, EKFAC, gradient_workers=0.5)
        compare_sharded(rank, world, mesh, EKFAC, fisher="exact", steps=8)


def sharded_adaptive_damping(rank: int, world: int) -> None:
    """Quadratic model and damping are those of one rank with whole parameters."""
    mesh = init_device_mesh("cpu", (world,))
    clip: dict[str, Any] = {"direction": "natural", "grafting": None}
    clip |= {"damping_mode": "absolute", "damping": 0.3}

    def shard(model: nn.Module) -> nn.Module:
        return sharded(model, mesh)

    adapt(rank, EKFAC, [4] * world, shard, **clip)
    fewer = {"gradient_workers": 1 / world, "loss_reduction": "global_mean"}
    adapt(rank, KFAC, [3, 7, 1, 5][:world], shard, **fewer, **clip)
    adapt(rank, KFAC, [4] * world, shard, loss_reduction="sum", **clip)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        adapt(rank, EKFAC, [4] * world, shard, **clip)


class Parallel(nn.Module):
    """A network with all that :func:`parallelized` splits, and a layer that it leaves.

    The number of tokens does not divide by that of ranks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.columns = nn.Embedding(11, 6), nn.Linear(6, 12)
        self.rows, self.norm = nn.Linear(12, 9), nn.LayerNorm(9)
        self.head = nn.Linear(9, 4)

    def forward(self, codes: Tensor) -> Tensor:
        """Return ``[N, 4]`` for codes ``[N, S]``."""
        x = torch.tanh(self.columns(self.tokens(codes)))
        out: Tensor = self.head(self.norm(self.rows(x)).mean(dim=1))
        return out


def parallelized(model: nn.Module, mesh: Any) -> nn.Module:
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "columns": ColwiseParallel(),
        "rows": RowwiseParallel(),
    }
    return parallelize_module(model, mesh, plan)


class Sequences(nn.Module):
    """A network whose norms, and what is added up, see a part of every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.before = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.columns, self.rows = nn.Linear(6, 12), nn.Linear(12, 6)
        self.after, self.head = nn.RMSNorm(6), nn.Linear(6, 4)

    def forward(self, codes: Tensor) -> Tensor:
        """Return ``[N, 4]`` for codes ``[N, S]``."""
        x = self.tokens(codes)
        x = x + self.rows(torch.tanh(self.columns(self.before(x))))
        out: Tensor = self.head(self.after(x)).mean(dim=1)
        return out


def sequence_parallelized(model: nn.Module, mesh: Any) -> nn.Module:
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "before": SequenceParallel(),
        "columns": ColwiseParallel(input_layouts=Shard(1)),
        "rows": RowwiseParallel(output_layouts=Shard(1)),
        "after": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return parallelize_module(model, mesh, plan)


NETWORKS = {Parallel: parallelized, Sequences: sequence_parallelized}


def codes(step: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 11, (size, 4), generator=generator)
    return x, torch.randint(0, 4, (size,), generator=generator)


def compare_parallel(
    rank: int,
    tensor: Any,
    kind: type[KroneckerOptimizer],
    /,
    *,
    data: Any = None,
    shards: bool = False,
    network: type[nn.Module] = Parallel,
    adapts: bool = False,
    **options: Any,
) -> None:
    """Train a network whose layers are split, and a whole one; compare.

    Args:
        rank: This process.
        tensor: The mesh over which layers are split.
        kind: The optimizer.
        data: The mesh of ranks with the same part and a batch each; ``None``: of one.
        shards: Each of these has a shard of its part (``fully_shard``).
        network: The network.
        adapts: The damping is adapted.
        options: Of the optimizer.
    """
    options = {"lr": 1e-2, "factor_interval": 1, "basis_interval": 4, **options}
    reference, model = build(network), NETWORKS[network](build(network), tensor)
    if shards:
        for child in model.children():
            shard(child, data)
        shard(model, data)
    data = process_cases.ALONE if data is None else data.get_group()
    torch.manual_seed(0)
    single = kind(reference, process_group=process_cases.ALONE, **options)
    torch.manual_seed(rank)  # the first rank's holds
    several = kind(model, process_group=data, **options)
    seeds = process_cases.dist_range(several.own_state()["progress"]["seed"])
    assert seeds[0] == seeds[1]
    dampings = [LevenbergMarquardt(o, interval=2) for o in (single, several) if adapts]
    count, place = dist.get_world_size(data), dist.get_rank(data)
    for step in range(8):
        resumes = "gradient_workers" not in options and not adapts
        if step == 5 and resumes:  # a resumed run is the same
            state = deepcopy(several.state_dict())
            several.close()
            several = kind(model, process_group=data, **options)
            several.load_state_dict(state)
        x, y = codes(step, 8 * count)
        single.zero_grad()
        cross_entropy(reference(x), y).backward()
        single.step()
        own = x[8 * place : 8 * place + 8], y[8 * place : 8 * place + 8]
        several.zero_grad()
        cross_entropy(model(own[0]), own[1]).backward()
        for parameter in () if shards else model.parameters():
            grad = parameter.grad
            assert grad is not None
            if isinstance(grad, DTensor):
                grad = grad.redistribute(placements=parameter.placements)
                parameter.grad, grad = grad, grad.to_local()
            if count > 1:
                dist.all_reduce(grad, group=data)
                grad.div_(count)
        several.step()
        for adaptation, net, (u, v) in zip(
            dampings, (reference, model), ((x, y), own), strict=False
        ):
            adaptation.step(lambda net=net, u=u, v=v: cross_entropy(net(u), v))
        for a, b in pairwise(dampings):
            if a.last is not None and b.last is not None:
                changes = [(a.last.actual, b.last.actual), (a.last.ratio, b.last.ratio)]
                assert all(abs(u - v) <= 1e-8 * abs(u) for u, v in changes), changes
    assert difference(model, reference) < 1e-10, (options, difference(model, reference))
    assert difference(reference, build(network)) > 0.01


OF_SPLIT_LAYERS: tuple[dict[str, Any], ...] = (
    {},
    {"scaling": "per_example"},
    {"fisher": "exact"},
    {"fisher": "mc", "sharing": "reduce"},
    {"basis_delay": 2, "storage": "packed"},
)


def tensor_parallel(rank: int, world: int) -> None:
    """Split layers: factors are put together over the mesh, of every kind."""
    mesh = init_device_mesh("cpu", (world,))
    for network in NETWORKS:
        for options in OF_SPLIT_LAYERS:
            options = {"direction": "natural", "network": network, **options}
            compare_parallel(rank, mesh, EKFAC, **options)
        compare_parallel(rank, mesh, EKFAC, network=network)
        compare_parallel(rank, mesh, KFAC, network=network)


def data_and_tensor_parallel(rank: int, world: int) -> None:
    """A mesh of two dimensions: rows share batches, columns share parts."""
    if world < 4:
        return
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    for options in ({}, {"scaling": "per_example"}, {"gradient_workers": 0.5}):
        options = {"direction": "natural", "data": mesh["data"], **options}
        compare_parallel(rank, mesh["tensor"], EKFAC, **options)


def sharded_tensor_parallel(rank: int, world: int) -> None:
    """Parts of layers, sharded over the ranks that have the same part."""
    if world < 4:
        return
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    of_all = {"data": mesh["data"], "shards": True, "direction": "natural"}
    for network in NETWORKS:
        for options in (*OF_SPLIT_LAYERS, {"gradient_workers": 0.5}):
            options = {"likelihood": DrawnByItself(), **of_all, **options}
            options |= {"network": network}
            compare_parallel(rank, mesh["tensor"], EKFAC, **options)
        compare_parallel(rank, mesh["tensor"], KFAC, **of_all, network=network)
    model = parallelized(build(Parallel), mesh["tensor"])
    shard(model, mesh["data"])
    with expected_error(ValueError, "Give process_group those that have the same part"):
        EKFAC(model)
    EKFAC(model, process_group=mesh["data"].get_group())


def parallel_adaptive_damping(rank: int, world: int) -> None:
    """Dampings of split layers are those of one rank with the whole ones."""
    clip: dict[str, Any] = {"direction": "natural", "grafting": None}
    clip |= {"damping_mode": "absolute", "damping": 0.3, "lr": 0.3, "adapts": True}
    mesh = init_device_mesh("cpu", (world,))
    for network in NETWORKS:
        compare_parallel(rank, mesh, KFAC, network=network, **clip)
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        of_all = {"data": mesh["data"], "shards": True, **clip}
        for network in NETWORKS:
            compare_parallel(rank, mesh["tensor"], EKFAC, network=network, **of_all)


def other_shardings_are_refused(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Sequential(nn.Linear(4, 4 * world), nn.Tanh())
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    with expected_error(ValueError, "is split by tensor parallelism over ranks"):
        EKFAC(model)
    model = sharded(build(Small), mesh)
    with expected_error(ValueError, "and 1 train together"):
        EKFAC(model, process_group=process_cases.ALONE)
    model.eval()(images(0, 2)[0])
    with expected_error(ValueError, "is gathered at the moment"):
        EKFAC(model)


def counted_bytes(rank: int, world: int) -> None:
    """What a step hands to collectives and keeps is what the cost model says."""
    compare_counts(rank, world, (Small, Tokens))


def counted_bytes_of_truncated_bases(rank: int, world: int) -> None:
    compare_counts(rank, world, (Wide,), columns=6)


def compare_counts(
    rank: int,
    world: int,
    networks: tuple[type[nn.Module], ...],
    columns: int | None = None,
) -> None:
    """Compare what a step sends and keeps with the cost model."""
    for kind, fraction, scaling in (
        (KFAC, 1.0, {}),
        (EKFAC, 1.0, {"scaling": "per_example"}),
        (EKFAC, 0.5, {}),
        (EKFAC, 0.5, {"scaling": "per_example"}),
        (EKFAC, 1 / world, {}),
    ):
        if columns is not None and kind is KFAC:
            continue
        for network in networks:
            ddp = DDP(build(network).float())
            own = {"basis_tolerance": 0.0, "factor_interval": 5, "basis_interval": 5}
            own |= {} if columns is None else {"rank": columns}
            own |= {"direction": "natural", "momentum": 0.0}
            optimizer = optimizer_of(
                kind, ddp, gradient_workers=fraction, **scaling, **own
            )
            sizes = [Sizes.of(block, columns) for block in optimizer.blocks()]
            per_example = bool(scaling)
            said = traffic(
                sizes,
                grid(world, fraction),
                rank,
                per_example=per_example,
                scaled=kind is EKFAC,
            )
            if network is not Tokens:
                x, y = share(images(0, 4 * world), rank, [4] * world)
                loss = cross_entropy(ddp(x.float()), y)
            else:
                out = ddp(torch.randint(0, 7, (4, 6)))
                loss = out.square().mean()
            with Counted() as counted:
                loss.backward()
                optimizer.step()
            sums = counted.total("all_reduce", "reduce")
            assert sums == said.factors + said.scalings, (fraction, scaling)
            assert counted.total("broadcast") == said.bases + said.directions
            kept = sum(layer.bytes() for layer in optimizer.curvature.values()) / 4
            # One number for every average that is kept, and two of the shares' own.
            weights = kept - said.kept
            assert 2 * len(sizes) <= weights <= 5 * len(sizes)


def briefly(rank: int, world: int) -> None:
    """A few steps of what the slow cases do at length."""
    mesh = init_device_mesh("cpu", (world,))
    compare(rank, KFAC, [4] * world, steps=8)
    compare(rank, EKFAC, [4] * world, steps=12)
    weighted = {"loss_reduction": "global_mean", "gradient_workers": 1 / world}
    compare(rank, EKFAC, [3, 5], **weighted, steps=8)
    compare(rank, EKFAC, [8, 0], scaling="per_example", **weighted, steps=8)
    compare(rank, KFAC, [4] * world, fisher="exact", steps=4)
    compare_sharded(rank, world, mesh, EKFAC, steps=12)
    compare_sharded(rank, world, mesh, KFAC, fisher="exact", steps=4)


# -- checkpoints -----------------------------------------------------------------------

STEPS, MORE = 9, 8


def curve(
    model: nn.Module,
    optimizer: KroneckerOptimizer,
    rank: int,
    sizes: list[int],
    steps: range,
    scale: float = 1.0,
) -> list[float]:
    """Train on multiples of the loss; return it on the whole batch of every step."""
    losses, dtype = [], next(model.parameters()).dtype
    for step in steps:
        x, y = images(step, sum(sizes))
        x = x.to(dtype)
        with torch.no_grad(), optimizer.capture.paused():
            losses.append(float(cross_entropy(model(x), y)))
        optimizer.zero_grad()
        x, y = share((x, y), rank, sizes)
        (scale * global_mean(model(x), y, len(sizes), sum(sizes))).backward()
        optimizer.step()
    return losses


class Variant(NamedTuple):
    """What is saved and loaded.

    Attributes:
        name: Of the folder.
        kind: The optimizer.
        options: Of the optimizer.
        shards: Whether the model is sharded.
        network: The model.
    """

    name: str
    kind: type[KroneckerOptimizer]
    options: dict[str, Any]
    shards: bool
    network: type[nn.Module] = Small


def variants(world: int) -> list[Variant]:
    """Return what is saved and loaded."""
    fewer = {"gradient_workers": 1 / world}
    each = {"scaling": "per_example", **fewer}
    return [
        Variant("ddp", EKFAC, {}, False),
        Variant("ddp fewer", EKFAC, fewer, False),
        Variant("kfac fewer", KFAC, fewer, False),
        Variant("fsdp", EKFAC, each, True),
        Variant("ddp truncated", EKFAC, {"rank": 5}, False, Wide),
        Variant("ddp truncated fewer", EKFAC, {"rank": 0.5, **fewer}, False, Wide),
        Variant("fsdp truncated", EKFAC, {"rank": 0.5, **each}, True, Wide),
    ]


def train_and_save(rank: int, world: int) -> None:
    """Train, save in the middle, and write down the curve."""
    folder = Path(os.environ["EKFAC_CHECKPOINTS"])
    for name, kind, options, shards, network in variants(world):
        model = wrapped(network, shards, world)
        optimizer = optimizer_of(kind, model, **options)
        sizes = [8 // world] * world
        curve(model, optimizer, rank, sizes, range(STEPS))
        save(model, optimizer, folder / name)
        rest = curve(model, optimizer, rank, sizes, range(STEPS, STEPS + MORE))
        if rank == 0:
            torch.save(rest, folder / f"{name}.pt")


def load_and_train(rank: int, world: int) -> None:
    """Load what other ranks saved, go on, and compare the curves."""
    folder = Path(os.environ["EKFAC_CHECKPOINTS"])
    for name, kind, options, shards, network in variants(world):
        for sharded_now in (False, True) if shards else (False,):
            model = wrapped(network, sharded_now, world)
            optimizer = optimizer_of(kind, model, **options)
            load(model, optimizer, folder / name)
            sizes = [8 // world] * world
            found = curve(model, optimizer, rank, sizes, range(STEPS, STEPS + MORE))
            expected = torch.load(folder / f"{name}.pt")
            error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
            assert error < 1e-9, (name, sharded_now, found, expected)


def load_alone(rank: int, world: int) -> None:
    """Load in every process what several saved, without the others."""
    folder = Path(os.environ["EKFAC_CHECKPOINTS"])
    for name, kind, options, _, network in variants(world):
        options = {k: v for k, v in options.items() if k != "gradient_workers"}
        model = build(network)
        optimizer = optimizer_of(
            kind, model, **options, process_group=process_cases.ALONE
        )
        load(model, optimizer, folder / name, process_cases.ALONE)
        found = curve(model, optimizer, 0, [8], range(STEPS, STEPS + MORE))
        expected = torch.load(folder / f"{name}.pt")
        error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        assert error < 1e-9, (name, found, expected)


def wrapped(network: type[nn.Module], shards: bool, world: int) -> nn.Module:
    """Return the network for these ranks."""
    if shards:
        return sharded(build(network), init_device_mesh("cpu", (world,)))
    return DDP(build(network))


def save(model: nn.Module, optimizer: KroneckerOptimizer, folder: Path) -> None:
    """Save network and optimizer."""
    weights = getattr(model, "module", model).state_dict()
    state = {"model": weights, "optimizer": DistributedState(optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load(
    model: nn.Module, optimizer: KroneckerOptimizer, folder: Path, group: Any = None
) -> None:
    """Load what :func:`save` saved."""
    inner = getattr(model, "module", model)
    weights = inner.state_dict()
    state = {"model": weights, "optimizer": DistributedState(optimizer)}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    inner.load_state_dict(weights)


def pending_bases_are_saved(rank: int, world: int) -> None:
    """Saved while searches go on, each rank's or a checkpoint: bit for bit."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    sizes = [4] * world
    for number, (kind, scaling) in enumerate(KINDS):
        for fraction in (1.0, 1 / world):
            options = {**scaling, "basis_delay": 2, "gradient_workers": fraction}
            model, network = DDP(build(Small)), Small
            optimizer = optimizer_of(kind, model, **options)
            curve(model, optimizer, rank, sizes, range(7))
            pending = list(optimizer.own_state()["progress"]["background"])
            assert process_cases.dist_total(len(pending)) >= 2, "searches go on"
            where = Path(folder[0]) / f"{number} {fraction}"
            save(model, optimizer, where)
            states = [None if fraction < 1 else deepcopy(optimizer.state_dict())]
            weights = deepcopy(model.state_dict())
            curve(model, optimizer, rank, sizes, range(7, 16))
            for state in ["checkpoint", *(s for s in states if s is not None)]:
                other = DDP(build(network))
                again = optimizer_of(kind, other, **options)
                for _ in range(2):  # see go_on_from_copies
                    x, y = share(images(99, 4 * world), rank, sizes)
                    cross_entropy(other(x), y).backward()
                again.zero_grad()
                if state == "checkpoint":
                    load(other, again, where)
                else:
                    other.load_state_dict(weights)
                    again.load_state_dict(state)
                curve(other, again, rank, sizes, range(7, 16))
                assert difference(other, model) == 0, difference(other, model)


def tiny_gradients_are_saved(rank: int, world: int) -> None:
    """Curvature in double precision is loaded by an optimizer that has none yet."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder, 0)
    sizes = [4] * world
    for number, (kind, scaling) in enumerate(KINDS):
        for fraction in (1.0, 1 / world):
            options = {**scaling, "gradient_workers": fraction}
            runs = []
            for _ in range(2):
                model = DDP(build(Small).float())
                runs.append((model, optimizer_of(kind, model, **options)))
            where = Path(folder[0]) / f"{number} {fraction}"
            for other in (False, True):
                if other:
                    for _ in range(2):  # see go_on_from_copies
                        x, y = share(images(99, 4 * world), rank, sizes)
                        cross_entropy(runs[1][0](x.float()), y).backward()
                    runs[1][1].zero_grad()
                    load(*runs[1], where)
                else:
                    curve(*runs[0], rank, sizes, range(6), 1e-20)
                    save(*runs[0], where)
                layers = runs[other][1].curvature.values()
                assert {layer.dtype for layer in layers} == {torch.float64}, other
            for run in runs:
                curve(*run, rank, sizes, range(6, 12), 1e-20)
            gap = difference(runs[0][0], runs[1][0])
            assert gap == 0, (kind, options, gap)


def damaged_checkpoints(rank: int, world: int) -> None:
    """One rank's part is damaged: all load it as it was, or all refuse it.

    After a refusal everything is as it was, bit for bit, on every rank.
    """
    sizes, outcomes = [4] * world, Counter[str]()
    for options in (
        {"gradient_workers": 1 / world, "basis_delay": 2},
        {"scaling": "per_example", "storage": "bfloat16"},
        {"rank": 5, "gradient_workers": 1 / world},
    ):
        network = Wide if "rank" in options else Small
        runs = []
        for start in (0, 20):
            model = DDP(build(network))
            optimizer = optimizer_of(EKFAC, model, **options)
            curve(model, optimizer, rank, sizes, range(start, start + 7))
            runs.append(optimizer)
        saved = read(DistributedState(runs[0]).state_dict())
        into = DistributedState(runs[1])
        damages = list(every_damage(saved))
        rng = random.Random(rank)
        for draw in range(300 // world):
            before, state = read(into.state_dict()), deepcopy(saved)
            if rank == draw % world:
                state = damaged(saved, *rng.choice(damages), seed=draw)
            refusal = None
            try:
                into.load_state_dict(unread(state))
            except StateMismatchError as error:
                refusal = error
            least, most = process_cases.dist_range(float(refusal is not None))
            assert least == most, (rank, refusal)
            after = read(into.state_dict())
            expected = saved if refusal is None else before
            assert_identical(*map(without_additions, (after, expected)))
            outcomes["loaded" if refusal is None else "refused"] += 1
            if refusal is None:
                into.load_state_dict(unread(before))
    if rank == 0:
        print(f"a checkpoint of {world} ranks: {dict(outcomes)}")


def without_additions(state: Any) -> dict[str, Any]:
    """Return the entries of a state that are not one more key of a param group."""
    return {k: v for k, v in flattened(state).items() if not k.endswith(".more")}


# -- failures --------------------------------------------------------------------------


def a_rank_dies(rank: int, world: int) -> None:
    """The last rank is gone at its third step; the others get an error."""
    model = DDP(build(Small))
    optimizer = optimizer_of(EKFAC, model, gradient_workers=1 / world)
    for step in range(5):
        optimizer.zero_grad()
        x, y = share(images(step, 4 * world), rank, [4] * world)
        cross_entropy(model(x), y).backward()
        if step == 2 and rank == world - 1:
            os._exit(0)
        if step == 2:
            begin = time.monotonic()
            try:
                optimizer.step()
            except (RuntimeError, dist.DistBackendError):
                waited = time.monotonic() - begin
                assert waited < 40  # not torch's time limit, which is 60 here
                return
            raise AssertionError("no error")
        optimizer.step()


SHARDED_CASES: list[Case] = [
    fsdp,
    fsdp_fewer_workers,
    fsdp_accumulation,
    fsdp_uneven,
    fsdp_fisher,
    hsdp,
    sharded_adaptive_damping,
    other_shardings_are_refused,
    counted_bytes,
]
PARALLEL_CASES: list[Case] = [
    tensor_parallel,
    data_and_tensor_parallel,
    sharded_tensor_parallel,
    parallel_adaptive_damping,
]
CHECKPOINT_CASES: list[Case] = [
    pending_bases_are_saved,
    tiny_gradients_are_saved,
    damaged_checkpoints,
]

QUICK_CASES: list[Case] = [
    tiny_gradients_are_saved,
    briefly,
    convolutions,
    nan_on_one_rank,
    adaptive_damping,
    constructed_too_early,
    other_shardings_are_refused,
    counted_bytes,
    pending_bases_are_saved,
    errors,
]
