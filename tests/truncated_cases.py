"""Truncated eigenbases on several processes."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
from overlap_cases import begun, small_buffers
from process_cases import (
    Case,
    Wide,
    accumulate,
    assert_same,
    assert_same_on_all_ranks,
    build,
    compare,
    dist_total,
    expected_error,
    go_on_from_copies,
    images,
    leave_out_nan,
    optimizer_of,
    share,
    train_joined,
)
from sharded_cases import compare_sharded, counted_bytes_of_truncated_bases
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ekfac import EKFAC
from ekfac.curvature import LayerCurvature
from ekfac.curvature import truncated as truncated_bases
from ekfac.errors import NotReadyError
from ekfac.optim.optimizer import KroneckerOptimizer

# Examples on each rank: so many that the first factors have more than the leading
# eigenvectors, which rounding errors would else choose.
SIZE = 16
UNEVEN = [12, 28, 4, 20]
VARIANTS: tuple[dict[str, Any], ...] = (
    {"rank": 6},
    {"rank": 0.5},
    {"rank": 6, "scaling": "per_example"},
    {"rank": 0.5, "scaling": "per_example"},
)


def workers(world: int) -> list[float]:
    """Return every fraction of gradient workers, the least first."""
    return [n / world for n in range(1, world + 1) if world % n == 0]


def wide(
    rank: int, sizes: list[int], /, steps: int = 9, **options: Any
) -> KroneckerOptimizer:
    """Compare with one process on the whole batch; look at what is kept where."""
    found = compare(rank, EKFAC, sizes, network=Wide, steps=steps, **options)
    for layer in found.curvature.values():
        assert layer.truncated == (layer.name != "norm")
        assert_held(layer)
    return found


def assert_held(layer: LayerCurvature) -> None:
    """Check that a rank has what it is to have, and the shapes of the rest."""
    keys = {key for key, _ in layer._tensors().items()}
    bases = {"Q_A", "Q_G", "eigenvalues_A", "eigenvalues_G"}
    assert keys & bases == (bases if layer.held.bases else set())
    assert ("s" in keys) == layer.held.scalings
    assert ("A" in keys) == ("G" in keys) == layer.held.factors
    shapes = [
        tensor.shape
        for tensor in (
            *(layer.basis(side) for side in ("A", "G")),
            *(layer.values(side) for side in ("A", "G")),
            layer.averages["s"].total,
        )
        if tensor is not None
    ]
    assert_same(torch.tensor([size for shape in shapes for size in shape]))
    if layer.truncated:
        assert layer.complement("A") + layer.complement("G") > 0
        assert layer.eigenvalues_A.shape[-1] == layer.block.shape[2]


def truncated(rank: int, world: int) -> None:
    for number, options in enumerate(VARIANTS):
        for fraction in workers(world)[number % 2 :: 2]:
            found = wide(rank, [SIZE] * world, **options, gradient_workers=fraction)
            layers = found.curvature.values()
            held = dist_total(sum(layer.held.scalings for layer in layers))
            assert held == fraction * world * len(layers)


def truncated_textbook_step(rank: int, world: int) -> None:
    clip = {"grafting": None, "damping_mode": "absolute", "kl_clip": 1e-3}
    for fraction in (1.0, 1 / world):
        options = {"rank": 6, "gradient_workers": fraction}
        wide(rank, [SIZE] * world, **options, **clip, steps=6)
        factored = {"damping_split": "factored", "power": -0.5, "direction": "natural"}
        wide(rank, [SIZE] * world, **options, **factored, steps=6)


def truncated_uneven(rank: int, world: int) -> None:
    weighted = {"loss_reduction": "global_mean"}
    for number, options in enumerate(VARIANTS):
        for sizes in (UNEVEN, [20, 0, 12, 8]):
            number += 1
            fraction = 1 / world if number % 2 else 1.0
            options = {**options, **weighted, "gradient_workers": fraction}
            wide(rank, sizes[:world], **options, steps=7)


def truncated_other_fishers(rank: int, world: int) -> None:
    for options in VARIANTS[1:3]:
        wide(rank, [SIZE] * world, **options, fisher="exact", steps=7)


def truncated_accumulation(rank: int, world: int) -> None:
    for options, fraction in zip(VARIANTS[1:3], (1.0, 1 / world), strict=True):
        options = {**options, "gradient_workers": fraction}
        accumulate(rank, world, Wide, EKFAC, **options, size=8, steps=8)


def truncated_fsdp(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    uneven = {"sizes": UNEVEN[:world], "loss_reduction": "global_mean"}
    even = {"sizes": [SIZE] * world}
    fewer = {"gradient_workers": 1 / world}
    ra, share_ra, each, share_each = VARIANTS
    for options in (
        {**ra, **even},
        {**share_ra, **even, **fewer, "batches": 2},
        {**each, **even, **fewer},
        {**share_each, **uneven, **fewer},
    ):
        own = {"network": Wide, "steps": 8, **options}
        compare_sharded(rank, world, mesh, EKFAC, **own)


def truncated_sums_leave_early(rank: int, world: int) -> None:
    with small_buffers():
        found = wide(rank, [SIZE] * world, rank=6, steps=20)
        assert begun(found) == 20


def truncated_nan_on_one_rank(rank: int, world: int) -> None:
    for options in VARIANTS[1:3]:
        leave_out_nan(rank, world, Wide, EKFAC, **options)


def truncated_joined_ranks(rank: int, world: int) -> None:
    for options in VARIANTS[1:3]:
        train_joined(rank, world, Wide, EKFAC, **options)


def trained(
    rank: int, world: int, model: DDP, optimizer: KroneckerOptimizer, steps: range
) -> None:
    """Do some steps."""
    for step in steps:
        optimizer.zero_grad()
        x, y = share(images(step, SIZE * world), rank, [SIZE] * world)
        cross_entropy(model(x), y).backward()
        optimizer.step()


def truncated_copies(rank: int, world: int) -> None:
    """States and deep copies have the shapes of then, also of what others hold."""
    for options in VARIANTS[1:3]:
        go_on_from_copies(rank, world, Wide, **options)
        for fraction in (1.0, 1 / world):
            ddp = DDP(build(Wide))
            optimizer = optimizer_of(EKFAC, ddp, **options, gradient_workers=fraction)
            trained(rank, world, ddp, optimizer, range(4))
            text, copied = str(optimizer.describe()), deepcopy(optimizer)
            for name, layer in optimizer.curvature.items():
                other = copied.curvature[name]
                assert_held(other)
                tensors, others = layer._tensors(), other._tensors()
                assert tensors.keys() == others.keys()
                assert all(torch.equal(t, others[key]) for key, t in tensors.items())
            trained(rank, world, ddp, optimizer, range(4, 7))
            assert str(copied.describe()) == text
            for layer in optimizer.curvature.values():
                assert_held(layer)
                if not layer.held.factors:
                    with expected_error(NotReadyError, "held by another rank"):
                        _ = layer.A


def truncated_failed_refresh(rank: int, world: int) -> None:
    """Where the owner's decomposition fails, every rank keeps what it has."""
    fails = mock.patch.object(
        truncated_bases,
        "subspace",
        side_effect=torch.linalg.LinAlgError("no convergence"),
    )
    for before in (0, 3):  # steps with a basis
        for fraction in (1.0, 1 / world):
            ddp = DDP(build(Wide))
            options = {"rank": 6, "gradient_workers": fraction}
            optimizer = optimizer_of(EKFAC, ddp, **options)
            trained(rank, world, ddp, optimizer, range(before))
            shapes = {
                layer.name: layer.averages["s"].total.shape
                for layer in optimizer.curvature.values()
            }
            assert optimizer.ranks is not None
            owners = optimizer.ranks.assignment.owners
            failing = owners["inner"]
            with fails if rank == failing else nullcontext():
                trained(rank, world, ddp, optimizer, range(before, before + 3))
            assert_same_on_all_ranks(ddp)
            assert (optimizer.counters.kept > 0) == (rank == failing)
            assert all(torch.isfinite(p).all() for p in ddp.parameters())
            for name, owner in owners.items():
                layer = optimizer.curvature[name]
                assert_held(layer)
                if owner == failing and layer.truncated:
                    assert layer.averages["s"].total.shape == shapes[name]
            trained(rank, world, ddp, optimizer, range(8, 13))
            assert_same_on_all_ranks(ddp)
            assert optimizer.curvature["inner"].complement("A") == 67 - 6


TRUNCATED_CASES: list[Case] = [
    truncated,
    truncated_textbook_step,
    truncated_uneven,
    truncated_other_fishers,
    truncated_accumulation,
    truncated_fsdp,
    truncated_sums_leave_early,
    truncated_nan_on_one_rank,
    truncated_joined_ranks,
    truncated_copies,
    truncated_failed_refresh,
    counted_bytes_of_truncated_bases,
]


def truncated_briefly(rank: int, world: int) -> None:
    """A few steps of what the slow cases do at length."""
    weighted = {"loss_reduction": "global_mean", "gradient_workers": 1 / world}
    wide(rank, [SIZE] * world, rank=6, steps=6)
    wide(rank, [20, 0], **VARIANTS[1], **weighted, steps=6)
    wide(rank, [20, 12], **VARIANTS[3], **weighted, steps=6)


QUICK_TRUNCATED_CASES: list[Case] = [
    truncated_briefly,
    truncated_failed_refresh,
    counted_bytes_of_truncated_bases,
]
