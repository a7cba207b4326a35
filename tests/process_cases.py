"""What is checked on several processes, and how they are started: once for all cases.

Every case is a function of the rank and the number of ranks that raises if something is
wrong. Each ran in all processes; the tests look up how it ended. The reference is the
same optimizer in one process on the concatenated batch, trained by every rank alone (a
process group of its own).
"""

from __future__ import annotations

import os
import re
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel as DDP

from ekfac import EKFAC, KFAC
from ekfac.errors import EkfacWarning, NotReadyError, UnsupportedOperationError
from ekfac.kernels import convolution
from ekfac.kernels.convolution import PatchGram
from ekfac.layers.base import whole
from ekfac.likelihoods import Categorical
from ekfac.optim import LevenbergMarquardt
from ekfac.optim.optimizer import KroneckerOptimizer
from ekfac.optim.precondition import SMALL_SIDE

Case = Callable[[int, int], None]
KINDS: tuple[tuple[type[KroneckerOptimizer], dict[str, Any]], ...] = (
    (KFAC, {}),
    (EKFAC, {}),
    (EKFAC, {"scaling": "per_example"}),
)
TOLERANCE = 1e-10
ALONE: Any = None  # this process's group of one rank


class Unsupported(Exception):
    """This PyTorch cannot do what a case needs, with or without the package."""


UNSUPPORTED = "not supported"


def shard(module: nn.Module, mesh: Any) -> nn.Module:
    """Return ``fully_shard`` of a module, which torch has on a CPU since 2.7."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        raise Unsupported(f"fully_shard on a CPU in torch {torch.__version__}")
    return fully_shard(module, mesh=mesh)


def check(found: list[str]) -> None:
    """Fail with what went wrong on some rank; skip what this PyTorch cannot do."""
    if all(outcome.startswith(UNSUPPORTED) for outcome in found):
        pytest.skip(found[0])
    assert not any(found), "\n".join(found)


def run_cases(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    """Run the cases in one process and write down how each ended."""
    global ALONE
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore", EkfacWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    ALONE = [dist.new_group([r]) for r in range(world)][rank]
    for case in cases:
        torch.manual_seed(0)
        start, outcome = time.perf_counter(), ""
        try:
            case(rank, world)
        except Unsupported as error:
            outcome = f"{UNSUPPORTED}: {error}"
        except Exception:
            outcome = traceback.format_exc()
        if "TIMES" in os.environ and rank == 0:
            print(f"{case.__name__}: {time.perf_counter() - start:.1f} s")
        (Path(folder) / f"{case.__name__}.{rank}").write_text(outcome)
        failed = outcome and not outcome.startswith(UNSUPPORTED)
        if failed and "GO_ON" not in os.environ:
            return
    dist.destroy_process_group()


def start(
    world: int, folder: Path, cases: list[Case], *, may_die: bool = False
) -> dict[str, list[str]]:
    """Run cases on ``world`` processes; return what went wrong, by case and rank."""
    context = torch.multiprocessing.spawn(
        run_cases, (world, str(folder), cases), nprocs=world, join=False
    )
    assert context is not None
    ended, since = 0, time.monotonic()
    while not (join_all(context) if may_die else context.join(timeout=1)):
        now = len(list(folder.iterdir()))
        if now > ended:
            ended, since = now, time.monotonic()
        assert time.monotonic() < since + 170, "a case hangs"
    outcomes: dict[str, list[str]] = {}
    for case in cases:
        files = [folder / f"{case.__name__}.{rank}" for rank in range(world)]
        outcomes[case.__name__] = [
            file.read_text() if file.exists() else "did not run" for file in files
        ]
    return outcomes


def join_all(context: Any) -> bool:
    """Wait a second for the processes; torch ends all of them where one dies."""
    context.processes[0].join(timeout=1)
    return not any(process.is_alive() for process in context.processes)


# -- networks and batches --------------------------------------------------------------


class Small(nn.Module):
    """A convolution, a norm, a shared linear layer, a head.

    So narrow that a batch's factors have full rank: bases of a null space are
    arbitrary, and rounding errors would choose among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh().mean((2, 3))
        h = self.inner(h).tanh()
        h = self.norm(h + self.inner(h)).tanh()
        out: Tensor = self.head(h)
        return out


class Wide(nn.Module):
    """Layers of which both sides, or one, have truncated bases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 66, 3, padding=1)
        self.inner = nn.Linear(66, 72)
        self.norm = nn.LayerNorm(72)
        self.head = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh().mean((2, 3))
        h = self.norm(self.inner(h)).tanh()
        out: Tensor = self.head(h)
        return out


class Convolutions(nn.Module):
    """Two convolutions whose input factors are made without patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(self.first(x).tanh()).tanh()
        out: Tensor = self.head(h.mean((2, 3)))
        return out


class Branches(nn.Module):
    """Two layers of which a batch goes through one, as its first number says."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, left: Tensor) -> Tensor:
        h = self.body(x).tanh()
        if bool(left.all()):
            h = self.left(h)
        elif not bool(left.any()):
            h = self.right(h)
        else:
            h = torch.where(left[:, None], self.left(h), self.right(h))
        out: Tensor = self.head(h.tanh())
        return out


class Tokens(nn.Module):
    """An embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.embed(x)).tanh())
        return out


def build(kind: Callable[[], nn.Module]) -> nn.Module:
    """Return a network, the same in every process."""
    torch.manual_seed(3)
    return kind()


def images(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Return a batch by its number."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, 3, 3, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def share(batch: Any, rank: int, sizes: list[int]) -> Any:
    """Return a rank's share of a batch: ``sizes[rank]`` examples."""
    start = sum(sizes[:rank])
    return tuple(t[start : start + sizes[rank]] for t in batch)


class DrawnByItself(Categorical):
    """Draws the class that the outputs' digits say: the same in whatever process."""

    def sampled(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        p = torch.softmax(outputs, -1)
        u = (outputs.sum(-1, keepdim=True) * 1e6).frac().abs()
        drawn = (p.cumsum(-1) < u).sum(-1).clamp(max=p.shape[-1] - 1)
        return p - torch.nn.functional.one_hot(drawn, p.shape[-1])


# -- training --------------------------------------------------------------------------

INTERVALS = {"factor_interval": 3, "basis_interval": 5}


def optimizer_of(
    kind: type[KroneckerOptimizer], model: nn.Module, **options: Any
) -> KroneckerOptimizer:
    """Return an optimizer whose intervals end within a few steps."""
    torch.manual_seed(11)
    own: dict[str, Any] = {"scaling_interval": 2} if kind is EKFAC else {}
    if max(side for p in model.parameters() for side in p.shape) <= SMALL_SIDE:
        own["direction"] = "natural"  # the spectral one is AdamW's on small sides
    return kind(model, 3e-3, **{**INTERVALS, **own, "precision": "full", **options})


def difference(model: nn.Module, reference: nn.Module) -> float:
    """Return the relative distance of two networks' parameters."""
    found = torch.cat([whole(p.detach()).flatten() for p in model.parameters()])
    expected = torch.cat([p.detach().flatten() for p in reference.parameters()])
    return float((found - expected).norm() / expected.norm())


def assert_same_on_all_ranks(model: nn.Module) -> None:
    """Compare the parameters of all ranks bit for bit."""
    assert_same(torch.cat([p.detach().flatten() for p in model.parameters()]))


def assert_same(flat: Tensor) -> None:
    """Compare a vector of all ranks bit for bit."""
    both = torch.cat([flat, -flat])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    assert torch.equal(both[: len(flat)], -both[len(flat) :])


def compare(
    rank: int,
    kind: type[KroneckerOptimizer],
    sizes: list[int],
    /,
    *,
    steps: int = 20,
    tolerance: float = TOLERANCE,
    network: Callable[[], nn.Module] = Small,
    **options: Any,
) -> KroneckerOptimizer:
    """Train on shares of every batch and on the whole; compare the parameters."""
    reference, ddp = build(network), DDP(build(network))
    alone = {k: v for k, v in options.items() if k != "gradient_workers"}
    single = optimizer_of(kind, reference, process_group=ALONE, **alone)
    several = optimizer_of(kind, ddp, **options)
    assert single.ranks is None
    assert several.ranks is not None
    for step in range(steps):
        batch = images(step, sum(sizes))
        single.zero_grad()
        cross_entropy(reference(batch[0]), batch[1]).backward()
        single.step()
        x, y = share(batch, rank, sizes)
        several.zero_grad()
        global_mean(ddp(x), y, len(sizes), sum(sizes)).backward()
        several.step()
    assert difference(ddp, reference) < tolerance, difference(ddp, reference)
    assert_same_on_all_ranks(ddp)
    assert difference(reference, build(network)) > 0.01
    return several


def global_mean(out: Tensor, y: Tensor, ranks: int, total: int) -> Tensor:
    """Return the loss whose gradients' average is that of the mean over all ranks."""
    loss = cross_entropy(out, y, reduction="sum")
    return loss * (ranks / total)


def expected_error(kind: type[BaseException], text: str) -> Any:
    """Expect an error whose message contains ``text``."""
    return pytest.raises(kind, match=re.escape(text))


# -- cases -----------------------------------------------------------------------------


def kfac(rank: int, world: int) -> None:
    compare(rank, KFAC, [4] * world)


def running_average(rank: int, world: int) -> None:
    compare(rank, EKFAC, [4] * world)


def per_example(rank: int, world: int) -> None:
    compare(rank, EKFAC, [4] * world, scaling="per_example")


def exact_fisher(rank: int, world: int) -> None:
    compare(rank, KFAC, [4] * world, fisher="exact")
    compare(rank, EKFAC, [4] * world, fisher="exact", steps=10)
    scaling = {"scaling": "per_example"}
    compare(rank, EKFAC, [4] * world, fisher="exact", **scaling, steps=10)


def sampled_fisher(rank: int, world: int) -> None:
    options = {"fisher": "mc", "likelihood": DrawnByItself()}
    compare(rank, KFAC, [4] * world, **options, steps=10)
    compare(rank, EKFAC, [4] * world, **options, steps=10)
    compare(rank, EKFAC, [4] * world, **options, scaling="per_example", steps=10)


def tiny_gradients(rank: int, world: int) -> None:
    """Squares of gradients below 1e-12 are kept, from the first step on or later."""
    fewer = {"gradient_workers": 1 / world}
    for (kind, options), start in product(KINDS, (0, 4)):
        for own in (options, {**options, **fewer}):
            train_on_tiny_gradients(rank, world, kind, own, start)


def train_on_tiny_gradients(
    rank: int,
    world: int,
    kind: type[KroneckerOptimizer],
    options: dict[str, Any],
    start: int,
) -> None:
    """Compare with one process; the loss is multiplied by 1e-20 from step ``start``."""
    reference, ddp = build(Small).float(), DDP(build(Small).float())
    alone = {k: v for k, v in options.items() if k != "gradient_workers"}
    single = optimizer_of(kind, reference, process_group=ALONE, **alone)
    several = optimizer_of(kind, ddp, **options)
    for step in range(8):
        scale = 1e-20 if step >= start else 1.0
        x, y = images(step, 4 * world)
        x = x.float()
        single.zero_grad()
        (scale * cross_entropy(reference(x), y)).backward()
        single.step()
        x, y = share((x, y), rank, [4] * world)
        several.zero_grad()
        (scale * cross_entropy(ddp(x), y)).backward()
        several.step()
    for optimizer in (single, several):
        dtypes = {layer.dtype for layer in optimizer.curvature.values()}
        assert dtypes == {torch.float64}, dtypes
        assert optimizer.counters.rejected == 0
    assert difference(ddp, reference) < 1e-5, difference(ddp, reference)
    assert difference(reference, build(Small)) > 1e-4
    assert_same_on_all_ranks(ddp)


def textbook_step(rank: int, world: int) -> None:
    options = {"grafting": None, "damping_mode": "absolute", "kl_clip": 1e-3}
    compare(rank, KFAC, [4] * world, **options)
    compare(rank, EKFAC, [4] * world, **options)


def uneven_weighted(rank: int, world: int) -> None:
    sizes = [3, 7, 1, 5][:world]
    options = {"loss_reduction": "global_mean"}
    compare(rank, KFAC, sizes, **options)
    compare(rank, EKFAC, sizes, **options)
    compare(rank, EKFAC, sizes, scaling="per_example", **options)


def rank_without_data(rank: int, world: int) -> None:
    sizes = [5, 0, 3, 2][:world]
    options = {"loss_reduction": "global_mean"}
    compare(rank, KFAC, sizes, **options)
    compare(rank, EKFAC, sizes, **options)
    compare(rank, EKFAC, sizes, scaling="per_example", **options)
    compare(rank, KFAC, sizes, fisher="exact", **options)


def uneven_means(rank: int, world: int) -> None:
    """Every rank its own mean: statistics are exact, the gradient is DDP's average."""
    sizes = [3, 7, 1, 5][:world]
    for kind, scaling in ((KFAC, {}), (EKFAC, {"scaling": "per_example"})):
        reference, ddp = build(Small), DDP(build(Small))
        options = {"momentum": 0.0, **scaling}
        single = optimizer_of(kind, reference, process_group=ALONE, **options)
        several = optimizer_of(kind, ddp, **options)
        for step in range(6):
            batch = images(step, sum(sizes))
            single.zero_grad()
            cross_entropy(reference(batch[0]), batch[1]).backward()
            shares = [share(batch, r, sizes) for r in range(world)]
            with single.capture.paused():
                losses = [cross_entropy(reference(x), y) for x, y in shares]
            grads = torch.autograd.grad(
                sum(losses) / world, list(reference.parameters())
            )
            for p, grad in zip(reference.parameters(), grads, strict=True):
                p.grad = grad
            single.step()
            x, y = shares[rank]
            several.zero_grad()
            cross_entropy(ddp(x), y).backward()
            several.step()
        assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)


def scale_of_an_average_of_means(rank: int, world: int) -> None:
    """The running average's scale: as many times the gradient's variance as examples.

    The gradients of the examples are independent of mean zero: noise of unit variance.
    """
    sizes = [4, 12, 2, 6][:world]
    model = DDP(nn.Linear(1, 1, bias=False))
    optimizer = EKFAC(model, 0.0, scaling_decay=0.0)
    generator = torch.Generator().manual_seed(rank)
    total = 0.0
    rounds = 300
    for _ in range(rounds):
        optimizer.zero_grad()
        x = torch.randn(sizes[rank], 1, generator=generator)
        (model(torch.ones_like(x)) * x).mean().backward()
        optimizer.step()
        s = optimizer.curvature["" if "" in optimizer.curvature else "module"].s
        assert s is not None
        total += float(s.sum())
    # Mean of squares of 300 normal numbers: 1 with a standard deviation of 0.08.
    assert abs(total / rounds - 1) < 0.25, total / rounds


def summed_loss(rank: int, world: int) -> None:
    """A sum on every rank: DDP's average is the sum over all divided by the ranks."""
    for kind, scaling in ((KFAC, {}), (EKFAC, {}), (EKFAC, {"scaling": "per_example"})):
        reference, ddp = build(Small), DDP(build(Small))
        options = {"grafting": None, "damping_mode": "absolute", **scaling}
        single = optimizer_of(
            kind, reference, process_group=ALONE, loss_reduction="sum", **options
        )
        several = optimizer_of(kind, ddp, loss_reduction="sum", **options)
        for group in (*single.param_groups, *several.param_groups):
            group["lr"] = 1e-3
        for group in several.param_groups:
            group["lr"] *= world  # of an average, not a sum
        for step in range(20):
            x, y = images(step, 4 * world)
            single.zero_grad()
            cross_entropy(reference(x), y, reduction="sum").backward()
            single.step()
            x, y = share((x, y), rank, [4] * world)
            several.zero_grad()
            cross_entropy(ddp(x), y, reduction="sum").backward()
            several.step()
        assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)


def accumulation(rank: int, world: int) -> None:
    """Two batches per step, the first under no_sync."""
    for kind, scaling in KINDS:
        accumulate(rank, world, Small, kind, **scaling)


def accumulate(
    rank: int,
    world: int,
    network: Callable[[], nn.Module],
    kind: type[KroneckerOptimizer],
    /,
    *,
    size: int = 4,
    steps: int = 20,
    **options: Any,
) -> None:
    """Train on two batches per step, of ``size`` examples on every rank."""
    reference, ddp = build(network), DDP(build(network))
    single = optimizer_of(kind, reference, process_group=ALONE, **options)
    several = optimizer_of(kind, ddp, **options)
    for step in range(steps):
        batches = [images(2 * step + half, size * world) for half in range(2)]
        single.zero_grad()
        several.zero_grad()
        for number, batch in enumerate(batches):
            (cross_entropy(reference(batch[0]), batch[1]) / 2).backward()
            x, y = share(batch, rank, [size] * world)
            with nullcontext() if number else ddp.no_sync():
                (cross_entropy(ddp(x), y) / 2).backward()
        single.step()
        several.step()
    assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)


def layer_on_one_rank_only(rank: int, world: int) -> None:
    for kind, scaling in ((KFAC, {}), (EKFAC, {}), (EKFAC, {"scaling": "per_example"})):
        reference = build(Branches)
        ddp = DDP(build(Branches), find_unused_parameters=True)
        single = optimizer_of(kind, reference, process_group=ALONE, **scaling)
        several = optimizer_of(kind, ddp, **scaling)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8 * world, 5, generator=generator)
            y = torch.randint(0, 3, (8 * world,), generator=generator)
            left = torch.arange(8 * world) < 8  # what rank 0 gets
            single.zero_grad()
            with single.capture.paused():
                pass
            sum_of_ranks = (
                sum(
                    cross_entropy(reference(*part[:2]), part[2]) / world
                    for part in (
                        (x[left], left[left], y[left]),
                        (x[~left], left[~left], y[~left]),
                    )
                )
                if world == 2
                else cross_entropy(reference(x, left), y)
            )
            sum_of_ranks.backward()
            single.step()
            part = share((x, left, y), rank, [8] * world)
            several.zero_grad()
            cross_entropy(ddp(*part[:2]), part[2]).backward()
            several.step()
        if world == 2:
            assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)
        assert_same_on_all_ranks(ddp)
        assert all(layer.ready for layer in several.curvature.values())


def nan_on_one_rank(rank: int, world: int) -> None:
    """A batch that is not finite on one rank leaves every rank's state as it was."""
    for kind, scaling in KINDS:
        leave_out_nan(rank, world, Small, kind, **scaling)


def leave_out_nan(
    rank: int,
    world: int,
    network: Callable[[], nn.Module],
    kind: type[KroneckerOptimizer],
    /,
    **options: Any,
) -> None:
    """Train, then do a step with a batch that is not finite on the last rank."""
    ddp = DDP(build(network))
    optimizer = optimizer_of(kind, ddp, **options)
    for step in range(8):  # at the next one no basis is refreshed
        optimizer.zero_grad()
        x, y = share(images(step, 4 * world), rank, [4] * world)
        cross_entropy(ddp(x), y).backward()
        optimizer.step()
    before = {
        f"{name}.{key}": value.clone()
        for name, layer in optimizer.curvature.items()
        for key in ("A", "G", "s")
        if (value := getattr(layer, key)) is not None
    }
    optimizer.zero_grad()
    x, y = share(images(5, 4 * world), rank, [4] * world)
    loss = cross_entropy(ddp(x), y)
    (loss * (float("nan") if rank == world - 1 else 1.0)).backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for name, layer in optimizer.curvature.items():
        for key in ("A", "G", "s"):
            value = getattr(layer, key)
            if value is not None and f"{name}.{key}" in before:
                found, expected = value, before[f"{name}.{key}"]
                assert torch.allclose(found, expected), f"{name}.{key}"
    counted = dist_range(optimizer.counters.rejected)
    assert counted[0] == counted[1] > 0


def dist_range(value: float) -> tuple[float, float]:
    """Return the least and the largest of a number over the ranks."""
    both = torch.tensor([-value, value])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return -float(both[0]), float(both[1])


def fewer_workers(rank: int, world: int) -> None:
    """Every fraction of gradient workers makes the same step."""
    for workers in [n for n in range(1, world) if world % n == 0]:
        fraction = workers / world
        several = compare(rank, KFAC, [4] * world, gradient_workers=fraction)
        layers = several.curvature.values()
        assert sum(layer.held.factors for layer in layers) < len(layers)
        assert dist_total(sum(layer.held.factors for layer in layers)) == len(layers)
        held = dist_total(sum(layer.held.bases for layer in layers))
        assert held == workers * len(layers)
        compare(rank, EKFAC, [4] * world, gradient_workers=fraction)
        scaling = {"scaling": "per_example"}
        compare(rank, EKFAC, [4] * world, gradient_workers=fraction, **scaling)
        clip = {"grafting": None, "damping_mode": "absolute", "kl_clip": 1e-3}
        compare(rank, EKFAC, [4] * world, gradient_workers=fraction, **clip)
        other = next(la for la in layers if not la.held.factors)
        with expected_error(NotReadyError, "held by another rank"):
            _ = other.A
        with expected_error(UnsupportedOperationError, "DistributedState"):
            several.state_dict()


def dist_total(value: float) -> float:
    """Return the sum of a number over the ranks."""
    total = torch.tensor(float(value))
    dist.all_reduce(total)
    return float(total)


def convolutions(rank: int, world: int) -> None:
    """Input factors that convolutions leave for the end are added up too."""
    convolution.START = convolution.TRANSFER = 0  # worth it for small images too
    size = 16
    for kind, scaling in ((KFAC, {}), (EKFAC, {}), (EKFAC, {"scaling": "per_example"})):
        reference, ddp = build(Convolutions), DDP(build(Convolutions))
        single = optimizer_of(kind, reference, process_group=ALONE, **scaling)
        several = optimizer_of(kind, ddp, **scaling)
        deferred = False
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(4 * world, 2, size, size, generator=generator)
            y = torch.randint(0, 3, (4 * world,), generator=generator)
            single.zero_grad()
            cross_entropy(reference(x), y).backward()
            single.step()
            x, y = share((x, y), rank, [4] * world)
            several.zero_grad()
            dense = {"autospec": True, "side_effect": PatchGram.dense}
            with mock.patch.object(PatchGram, "dense", **dense) as made:
                cross_entropy(ddp(x), y).backward()
                several.step()
            deferred |= made.called
        assert deferred, "no input factor was made without patches"
        assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)


def late_bases(rank: int, world: int) -> None:
    """Bases that a thread finds, adopted at the same later step by all."""
    for kind, scaling in KINDS:
        for workers in (1.0, 1 / world):
            options = {**scaling, "basis_delay": 2, "gradient_workers": workers}
            compare(rank, kind, [5] * world, steps=14, **options)


def tied_tokens(rank: int, world: int) -> None:
    """A diagonal factor, and a weight used as it is and transposed."""
    for kind, fraction in ((KFAC, 1.0), (EKFAC, 1.0), (EKFAC, 1 / world)):
        reference, ddp = build(Tokens), DDP(build(Tokens))
        single = optimizer_of(kind, reference, process_group=ALONE)
        several = optimizer_of(kind, ddp, gradient_workers=fraction)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            x = torch.randint(0, 7, (4 * world, 6), generator=generator)
            y = torch.randint(0, 7, (4 * world, 6), generator=generator)
            single.zero_grad()
            cross_entropy(reference(x).flatten(0, 1), y.flatten()).backward()
            single.step()
            x, y = share((x, y), rank, [4] * world)
            several.zero_grad()
            cross_entropy(ddp(x).flatten(0, 1), y.flatten()).backward()
            several.step()
        assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)


def joined_ranks(rank: int, world: int) -> None:
    """Ranks that run out of data shadow the others and end with the same state."""
    for kind, scaling in KINDS:
        train_joined(rank, world, Small, kind, **scaling)


def train_joined(
    rank: int,
    world: int,
    network: Callable[[], nn.Module],
    kind: type[KroneckerOptimizer],
    /,
    **options: Any,
) -> None:
    """Train with ``Join``, the first ranks for fewer steps."""
    ddp = DDP(build(network))
    optimizer = optimizer_of(kind, ddp, **options)
    reference = build(network)
    single = optimizer_of(
        kind, reference, process_group=ALONE, loss_reduction="sum", **options
    )
    with Join([ddp, optimizer]):
        for step in range(3 + 2 * rank):
            optimizer.zero_grad()
            x, y = share(images(step, 8 * world), rank, [8] * world)
            cross_entropy(ddp(x), y).backward()
            optimizer.step()
    for step in range(3 + 2 * (world - 1)):
        x, y = images(step, 8 * world)
        first = next(r for r in range(world) if 3 + 2 * r > step)
        single.zero_grad()
        out = reference(x[8 * first :])
        cross_entropy(out, y[8 * first :], reduction="sum").backward()
        for p in reference.parameters():  # DDP's average, for AdamW's epsilon
            assert p.grad is not None
            p.grad /= 8 * world
        single.step()
    assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)
    assert_same_on_all_ranks(ddp)
    layers = optimizer.state_dict()["curvature"].values()
    tensors = [t for la in layers for t in la.values() if isinstance(t, Tensor)]
    assert_same(torch.cat([t.flatten() for t in tensors]))
    assert optimizer.own_state()["progress"]["steps"] == 3 + 2 * (world - 1)
    # And the ranks go on together.
    optimizer.zero_grad()
    x, y = share(images(99, 4 * world), rank, [4] * world)
    cross_entropy(ddp(x), y).backward()
    optimizer.step()
    assert_same_on_all_ranks(ddp)


def adaptive_damping(rank: int, world: int) -> None:
    """Dampings and reductions are those of one rank with the concatenated batch."""
    clip: dict[str, Any] = {"direction": "natural", "grafting": None}
    clip |= {"damping_mode": "absolute", "damping": 0.3}
    uneven = [3, 7, 1, 5][:world]
    for sizes, options in (
        ([4] * world, {}),
        (uneven, {"loss_reduction": "global_mean"}),
        ([4] * world, {"gradient_workers": 1 / world}),
    ):
        for kind in (KFAC, EKFAC):
            adapt(rank, kind, sizes, **options, **clip)
    adapt(rank, KFAC, [4] * world, loss_reduction="sum", **clip)


def adapt(
    rank: int,
    kind: type[KroneckerOptimizer],
    sizes: list[int],
    /,
    wrap: Callable[[nn.Module], nn.Module] = DDP,
    **options: Any,
) -> None:
    """Train with adaptive damping on shares and on the whole; compare."""
    reference, ddp = build(Small), wrap(build(Small))
    alone = {k: v for k, v in options.items() if k != "gradient_workers"}
    single = optimizer_of(kind, reference, process_group=ALONE, **alone)
    several = optimizer_of(kind, ddp, **options)
    summed = options.get("loss_reduction") == "sum"
    for group in (*single.param_groups, *several.param_groups):
        group["lr"] = 0.3 / sum(sizes) if summed else 0.3
    for group in several.param_groups:
        group["lr"] *= len(sizes) if summed else 1  # of an average, not a sum
    adaptations = [
        LevenbergMarquardt(one, interval=2, minimum=1e-3) for one in (single, several)
    ]
    dampings = set()
    for step in range(10):
        x, y = images(step, sum(sizes))
        own = share((x, y), rank, sizes)
        reduction = "sum" if summed else "mean"

        def whole(x: Tensor = x, y: Tensor = y, reduction: str = reduction) -> Tensor:
            return cross_entropy(reference(x), y, reduction=reduction)

        def part(own: Any = own) -> Tensor:
            if summed:
                return cross_entropy(ddp(own[0]), own[1], reduction="sum")
            return global_mean(ddp(own[0]), own[1], len(sizes), sum(sizes))

        for optimizer, loss in ((single, whole), (several, part)):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        expected = adaptations[0].step(whole)
        found = adaptations[1].step(part)
        assert (expected is None) == (found is None)
        if expected is None or found is None:
            continue
        for name in ("ratio", "actual", "predicted", "damping"):
            a, b = getattr(found, name), getattr(expected, name)
            assert a == b or abs(a - b) <= 1e-8 * abs(b), (name, a, b)
        dampings.add(found.damping)
    assert len(dampings) > 1, "the damping has adapted itself"
    assert difference(ddp, reference) < TOLERANCE, difference(ddp, reference)


def errors(rank: int, world: int) -> None:
    with expected_error(ValueError, "Ranks 0 and 1 construct different optimizers"):
        EKFAC(nn.Linear(2 + rank, 2))
    with expected_error(
        ValueError, "damping_mode is 'relative' on rank 0 and 'absolute' on"
    ):
        EKFAC(nn.Linear(2, 2), damping_mode="absolute" if rank == 1 else "relative")
    with expected_error(ValueError, "rank is 1 on rank 0 and 2 on rank 1"):
        EKFAC(nn.Linear(2, 2), rank=1 + rank)
    with expected_error(ValueError, "must form a grid"):
        EKFAC(nn.Linear(2, 2), gradient_workers=0.7)
    torch.manual_seed(rank)
    model = nn.Linear(2, 2)
    optimizer = EKFAC(model)
    model(torch.randn(4, 2)).square().mean().backward()
    with expected_error(ValueError, "wrap the model in DistributedDataParallel"):
        optimizer.step()
    with expected_error(ValueError, "construct different LevenbergMarquardts"):
        LevenbergMarquardt(optimizer, interval=1 + rank)
    ddp = DDP(build(Small))
    optimizer = EKFAC(ddp)
    x, y = share(images(0, 4 * world), rank, [4] * world)
    with ddp.join():
        cross_entropy(ddp(x), y).backward()
        with expected_error(ValueError, "Join([model, optimizer])"):
            optimizer.step()
    optimizer = EKFAC(ddp, gradient_workers=1 / world)
    with expected_error(ValueError, "Join needs gradient_workers=1.0"):
        Join([ddp, optimizer])


def constructed_too_early(rank: int, world: int) -> None:
    model = nn.Linear(2, 2)
    optimizer = EKFAC(model, process_group=ALONE)
    assert optimizer.ranks is None
    model(torch.randn(4, 2)).square().mean().backward()
    copy = deepcopy(optimizer)
    optimizer.step()
    copy.step()
    optimizer._by_itself = False  # as if there had been no ranks then
    with expected_error(ValueError, "constructed before torch.distributed"):
        optimizer.step()


def copied(rank: int, world: int) -> None:
    go_on_from_copies(rank, world, Small)


def go_on_from_copies(
    rank: int, world: int, network: Callable[[], nn.Module], /, **options: Any
) -> None:
    """A state dict or a deep copy goes on as the original does."""
    ddp = DDP(build(network))
    optimizer = optimizer_of(EKFAC, ddp, **options)
    for step in range(3):
        optimizer.zero_grad()
        x, y = share(images(step, 4 * world), rank, [4] * world)
        cross_entropy(ddp(x), y).backward()
        optimizer.step()
    other = DDP(build(network))
    again = optimizer_of(EKFAC, other, **options)
    # DDP lays its buckets out anew after its first backward pass, and with them the
    # order in which more than two ranks' gradients are added.
    x, y = share(images(99, 4 * world), rank, [4] * world)
    for _ in range(2):
        cross_entropy(other(x), y).backward()
    again.zero_grad()
    other.load_state_dict(ddp.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for step in range(3, 9):
        for model, one in ((ddp, optimizer), (other, again)):
            one.zero_grad()
            x, y = share(images(step, 4 * world), rank, [4] * world)
            cross_entropy(model(x), y).backward()
            one.step()
    assert difference(other, ddp) == 0, difference(other, ddp)
    assert deepcopy(optimizer).ranks is optimizer.ranks
    fewer = optimizer_of(EKFAC, DDP(build(network)), gradient_workers=1 / world)
    assert fewer.ranks is not None
    owners = dict(fewer.ranks.assignment.owners)
    again = deepcopy(fewer)
    assert fewer.ranks.assignment.owners == owners
    for name, layer in fewer.curvature.items():
        assert again.curvature[name].held == layer.held


def stored_by_halves(rank: int, world: int) -> None:
    """Factors stored in another form are summed and divided as the others."""
    options = {"storage": "packed", "scaling": "per_example", "steps": 8}
    for fraction in (1.0, 1 / world):
        compare(rank, EKFAC, [4] * world, **options, gradient_workers=fraction)


def stored_in_bfloat16(rank: int, world: int) -> None:
    """Rounding differs where sums do; the ranks still have one model bit for bit."""
    for fraction in (1.0, 1 / world):
        options = {"storage": "bfloat16", "gradient_workers": fraction}
        compare(rank, EKFAC, [4] * world, **options, steps=8, tolerance=0.05)


PROCESS_CASES: list[Case] = [
    kfac,
    running_average,
    per_example,
    exact_fisher,
    sampled_fisher,
    textbook_step,
    tiny_gradients,
    uneven_weighted,
    rank_without_data,
    uneven_means,
    scale_of_an_average_of_means,
    summed_loss,
    accumulation,
    layer_on_one_rank_only,
    nan_on_one_rank,
    fewer_workers,
    stored_by_halves,
    stored_in_bfloat16,
    convolutions,
    tied_tokens,
    late_bases,
    joined_ranks,
    adaptive_damping,
    errors,
    constructed_too_early,
    copied,
]
