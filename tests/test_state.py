"""Saving, loading, copying and closing an optimizer, and what it keeps alive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training_cases import (
    METHODS,
    Method,
    assert_identical,
    every_method,
    example_batch,
    flattened,
    hooks,
    loss_of,
    small_classifier,
    snapshot,
    statistics,
    train,
)

from ekfac import EKFAC, KFAC
from ekfac.errors import StateMismatchError
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning")
some_methods = pytest.mark.parametrize("method", METHODS[::4], ids=lambda m: m.name)


def saved(state: object) -> io.BytesIO:
    """Return a file with what ``torch.save`` makes of ``state``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


# -- state dicts -----------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("steps", [0, 3, 14])
def test_resumes_bit_for_bit(method: Method, steps: int) -> None:
    """At 14 steps factors, bases and scalings are all within their intervals."""
    straight, first, second = (small_classifier() for _ in range(3))
    expected, stopped = method(straight), method(first)
    train(straight, expected, range(steps + 9))
    train(first, stopped, range(steps))
    file = saved({"model": first.state_dict(), "optimizer": stopped.state_dict()})
    state = torch.load(file, weights_only=True)

    torch.manual_seed(5)
    resumed = method(second, lr=0.5, damping=7.0, momentum=0.1)
    second.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(second, resumed, range(steps, steps + 9))
    assert_identical(snapshot(second, resumed), snapshot(straight, expected))


@some_methods
def test_resumes_layers_added_later(method: Method) -> None:
    """Layers refresh in turn, in an order that is part of the state."""

    def start(model: nn.Sequential) -> KroneckerOptimizer:
        return method(model[5].parameters(), model=model)

    def grow(model: nn.Sequential, optimizer: KroneckerOptimizer) -> None:
        optimizer.add_param_group({"params": model[:5].parameters()})

    straight, second = small_classifier(), small_classifier()
    expected = start(straight)
    train(straight, expected, range(2))
    grow(straight, expected)
    train(straight, expected, range(2, 6))
    state = torch.load(saved(expected.state_dict()), weights_only=True)
    second.load_state_dict(straight.state_dict())
    groups = [{"params": second[5].parameters()}, {"params": second[:5].parameters()}]
    resumed = method(groups, model=second)
    resumed.load_state_dict(state)
    for model, optimizer in ((straight, expected), (second, resumed)):
        train(model, optimizer, range(6, 16))
    assert_identical(snapshot(second, resumed), snapshot(straight, expected))


def test_state_is_plain() -> None:
    model = small_classifier()
    optimizer = EKFAC(model, kl_clip=0.1)
    train(model, optimizer, range(2))
    plain = (Tensor, int, float, bool, str, type(None))
    for path, value in flattened(optimizer.state_dict()).items():
        assert type(value) in plain, path


def test_state_is_a_copy() -> None:
    model = small_classifier()
    optimizer = EKFAC(model)
    train(model, optimizer, range(2))
    curvature = optimizer.state_dict()["curvature"]
    before = flattened(curvature)
    train(model, optimizer, range(2, 4))
    assert_identical(flattened(curvature), before)


def test_file_holds_each_number_once() -> None:
    """Layers view stacked tensors; a saved view would bring the whole stack along."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(12)])
    optimizer = EKFAC(model)
    x = torch.randn(64, 32)
    model(x).square().mean().backward()
    optimizer.step()
    state = flattened(optimizer.state_dict())
    size = sum(
        value.numel() * value.element_size()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    overhead = 512 * len(state)
    assert size < saved(optimizer.state_dict()).getbuffer().nbytes < size + overhead


@some_methods
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_load_across_dtypes(
    method: Method, before: torch.dtype, after: torch.dtype
) -> None:
    """Curvature is in float32 at least and never takes the parameters' precision."""

    def step(model: nn.Module, optimizer: KroneckerOptimizer, number: int) -> None:
        optimizer.zero_grad()
        x, y = example_batch(number)
        cross_entropy(model(x.to(next(model.parameters()))), y).backward()
        optimizer.step()

    first, second = small_classifier().to(before), small_classifier().to(after)
    stopped = method(first)
    for number in range(3):
        step(first, stopped, number)
    state = torch.load(saved(stopped.state_dict()), weights_only=True)
    optimizer = method(second)
    optimizer.load_state_dict(state)
    kept = torch.promote_types(after, torch.float32)
    expected = flattened(state["curvature"])
    found = flattened(optimizer.state_dict()["curvature"])
    for key, value in expected.items():
        if isinstance(value, Tensor):
            expected[key] = value.to(kept)
        if ".Q_" in key and kept == torch.float64 and value.dtype == torch.float32:
            # Orthonormal to the precision that they have now.
            assert float((found[key] - expected[key]).norm()) < 1e-5
            gram = found[key].mT @ found[key]
            assert torch.allclose(gram, torch.eye(len(gram[0])).to(gram), atol=1e-10)
            expected[key] = found[key]
    assert_identical(found, expected)
    second.load_state_dict(first.state_dict())
    step(second, optimizer, 3)
    assert all(torch.isfinite(p).all() for p in second.parameters())
    if before == after:
        step(first, stopped, 3)
        assert_identical(snapshot(second, optimizer), snapshot(first, stopped))


def other_models() -> dict[str, tuple[nn.Module, str]]:
    """Return models that the state of :func:`small_classifier` does not fit."""
    wider = small_classifier()
    wider[3], wider[5] = nn.Linear(16, 20), nn.Linear(20, 4)
    longer = small_classifier()
    longer.append(nn.Linear(4, 4))
    renamed = nn.ModuleDict({"body": small_classifier()})
    unbiased = small_classifier()
    unbiased[5] = nn.Linear(16, 4, bias=False)
    return {
        "wider": (
            wider,
            r"'curvature\.3\.\w+' is .*16, 16.* not .*20, 20",
        ),
        "longer": (longer, r"without a saved state: \['6'\]"),
        "shorter": (small_classifier()[:5], r"this model lacks: \['5'\]"),
        "renamed": (renamed, r"without a saved state: \['body\.0', 'body\.1'"),
        "unbiased": (unbiased, r"'curvature\.5\.\w+' is .*17, 17.* not .*16, 16"),
    }


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("name", other_models())
def test_state_of_another_model(kind: type[KroneckerOptimizer], name: str) -> None:
    model = small_classifier()
    optimizer = kind(model)
    train(model, optimizer, range(2))
    other, message = other_models()[name]
    stranger = kind(other)
    before = snapshot(other, stranger)
    with pytest.raises(StateMismatchError, match=message):
        stranger.load_state_dict(optimizer.state_dict())
    assert_identical(snapshot(other, stranger), before)


def test_state_of_other_groups() -> None:
    model, other = small_classifier(), small_classifier()
    optimizer = EKFAC(model)
    train(model, optimizer, range(2))
    halves = [{"params": other[:3].parameters()}, {"params": other[3:].parameters()}]
    grouped = EKFAC(halves, model=other)
    before = snapshot(other, grouped)
    with pytest.raises(ValueError, match="'param_groups' is a list of 1, not a"):
        grouped.load_state_dict(optimizer.state_dict())
    assert_identical(snapshot(other, grouped), before)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_state_of_another_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    model, other = small_classifier(), small_classifier()
    optimizer, torchs = EKFAC(model), kind(other.parameters(), lr=0.1)
    train(model, optimizer, range(2))
    train(other, torchs, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(StateMismatchError, match="saved by another optimizer"):
        optimizer.load_state_dict(torchs.state_dict())
    assert_identical(snapshot(model, optimizer), before)


def test_kfac_state_in_ekfac() -> None:
    """The factors are the same; scalings begin anew."""
    model, other = small_classifier(), small_classifier()
    kfac, ekfac = KFAC(model), EKFAC(other)
    train(model, kfac, range(3))
    other.load_state_dict(model.state_dict())
    ekfac.load_state_dict(kfac.state_dict())
    for name, value in statistics(kfac).items():
        assert torch.equal(statistics(ekfac)[name], value)
    train(other, ekfac, range(3, 9))  # norms have scalings with the factors, at step 9
    assert all(layer.s is not None for layer in ekfac.curvature.values())


def test_moved_banks_stay_in_use() -> None:
    """A model that is moved takes its curvature along at the next statistics."""
    plain, moved = small_classifier(), small_classifier()
    expected, optimizer = METHODS[2](plain), METHODS[2](moved)
    for number in range(6):
        train(plain, expected, [number])
        optimizer.curvature.follow_parameters()
        train(moved, optimizer, [number])
    assert_identical(snapshot(moved, optimizer), snapshot(plain, expected))


# -- copies ----------------------------------------------------------------------------


def copied_pair(
    model: nn.Module, optimizer: KroneckerOptimizer
) -> tuple[nn.Module, KroneckerOptimizer]:
    return copy.deepcopy((model, optimizer))


def pickled_pair(
    model: nn.Module, optimizer: KroneckerOptimizer
) -> tuple[nn.Module, KroneckerOptimizer]:
    pair: tuple[nn.Module, KroneckerOptimizer]
    pair = pickle.loads(pickle.dumps((model, optimizer)))
    return pair


def copied_optimizer(
    model: nn.Module, optimizer: KroneckerOptimizer
) -> tuple[nn.Module, KroneckerOptimizer]:
    """Return the copy and the model that came along with it."""
    other = copy.deepcopy(optimizer)
    return other.model, other


def pickled_optimizer(
    model: nn.Module, optimizer: KroneckerOptimizer
) -> tuple[nn.Module, KroneckerOptimizer]:
    other: KroneckerOptimizer = pickle.loads(pickle.dumps(optimizer))
    return other.model, other


COPIES = [copied_pair, pickled_pair, copied_optimizer, pickled_optimizer]


@some_methods
@pytest.mark.parametrize("duplicate", COPIES, ids=lambda f: f.__name__)
def test_copies_train_on(method: Method, duplicate: Callable[..., Any]) -> None:
    """The copy goes on as the original does, and neither disturbs the other."""
    model, plain = small_classifier(), small_classifier()
    optimizer, expected = method(model), method(plain)
    train(model, optimizer, range(5))
    train(plain, expected, range(5))
    other, again = duplicate(model, optimizer)
    assert type(again) is type(optimizer)
    assert_identical(snapshot(other, again), snapshot(model, optimizer))

    train(other, again, range(5, 14))
    assert_identical(snapshot(model, optimizer), snapshot(plain, expected))
    train(plain, expected, range(5, 14))
    assert_identical(snapshot(other, again), snapshot(plain, expected))
    train(model, optimizer, range(5, 14))
    assert_identical(snapshot(model, optimizer), snapshot(plain, expected))
    assert_identical(snapshot(other, again), snapshot(plain, expected))


def test_copy_with_its_groups_and_scheduler() -> None:
    model = small_classifier()
    groups = [{"params": model[:3].parameters(), "lr": 1e-4, "damping": 0.5}]
    optimizer = EKFAC(groups, model=model)
    optimizer.add_param_group({"params": model[3:].parameters(), "weight_decay": 0.1})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, range(2))
    scheduler.step()
    copies = copy.deepcopy((model, optimizer, scheduler))
    for m, o, s in (copies, (model, optimizer, scheduler)):
        train(m, o, range(2, 6))
        s.step()
    assert_identical(snapshot(*copies[:2]), snapshot(model, optimizer))
    assert copies[1].param_groups[0]["lr"] == 1e-4 / 4


def model_alone_copied(model: nn.Module, path: Path) -> nn.Module:
    return copy.deepcopy(model)


def model_alone_pickled(model: nn.Module, path: Path) -> nn.Module:
    other: nn.Module = pickle.loads(pickle.dumps(model))
    return other


def model_alone_saved(model: nn.Module, path: Path) -> nn.Module:
    torch.save(model, path / "model.pt")
    other: nn.Module = torch.load(path / "model.pt", weights_only=False)
    return other


def model_alone_averaged(model: nn.Module, path: Path) -> nn.Module:
    averaged: nn.Module = torch.optim.swa_utils.AveragedModel(model).module
    return averaged


@pytest.mark.parametrize(
    "duplicate",
    [model_alone_copied, model_alone_pickled, model_alone_saved, model_alone_averaged],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("method", METHODS[::4], ids=lambda m: m.name)
def test_hooks_of_a_copied_model_are_inert(
    method: Method, duplicate: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model, plain = small_classifier(), small_classifier()
    optimizer, expected = method(model), method(plain)
    train(model, optimizer, range(2))
    train(plain, expected, range(2))
    other = duplicate(model, tmp_path)
    loss_of(other, 77).backward()
    train(model, optimizer, range(2, 4))
    loss_of(other, 78).backward()
    train(plain, expected, range(2, 4))
    assert_identical(snapshot(model, optimizer), snapshot(plain, expected))
    new = method(other)
    train(other, new, range(3))
    assert all(layer.ready for layer in new.curvature.values())


def test_hooks_do_not_pile_up_on_copies() -> None:
    model = small_classifier()
    optimizer = EKFAC(model)
    count = hooks(model)
    for _ in range(3):
        model, optimizer = copied_pair(model, optimizer)
        assert hooks(model) == count


# -- closing ---------------------------------------------------------------------------


class Everything(nn.Module):
    """One of each way to be hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embedding(x)
        return self.head(self.norm(self.attention(z, z, z)[0]))


def test_close_removes_every_hook() -> None:
    model = Everything()
    optimizer = EKFAC(model)
    assert hooks(model) > 0
    optimizer.close()
    assert hooks(model) == 0
    optimizer.close()
    assert len(optimizer.describe().rows) > 0
    optimizer.state_dict()


def test_leaving_the_with_block_removes_every_hook() -> None:
    model = Everything()
    with KFAC(model) as optimizer:
        assert isinstance(optimizer, KFAC)
        assert hooks(model) > 0
    assert hooks(model) == 0
    with pytest.raises(ZeroDivisionError), EKFAC(model):
        raise ZeroDivisionError
    assert hooks(model) == 0


def test_closing_one_of_two() -> None:
    model = small_classifier()
    first, second = EKFAC(model), EKFAC(model)
    first.close()
    train(model, second, range(2))
    assert all(layer.ready for layer in second.curvature.values())
    assert not any(layer.ready for layer in first.curvature.values())


def test_closed_is_closed() -> None:
    """A group added after closing does not bring hooks back."""
    model = small_classifier()
    optimizer = EKFAC(model[0].parameters(), model=model)
    optimizer.close()
    optimizer.add_param_group({"params": model[5].parameters()})
    assert hooks(model) == 0


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("trained", [False, True])
@some_methods
def test_a_collected_optimizer_leaves_no_hooks(method: Method, trained: bool) -> None:
    model = small_classifier()
    optimizer = method(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if trained:
        train(model, optimizer, range(3))
        loss_of(model, 9).backward()
    gone = weakref.ref(optimizer)
    del optimizer, scheduler
    gc.collect()
    assert gone() is None
    assert hooks(model) == 0
    loss_of(model, 0).backward()


# -- what is kept alive ----------------------------------------------------------------


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Keep the garbage collector to what the test makes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_tensors() -> int:
    """Return how many tensors Python can reach."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


class Auxiliary(nn.Module):
    """Layers behind the output, which the loss may or may not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = small_classifier(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.body(x)
        return logits, self.aux(logits)


def auxiliary_step(model: nn.Module, optimizer: KroneckerOptimizer, i: int) -> None:
    x, y = example_batch(i)
    optimizer.zero_grad()
    logits, aux = model(x)
    (cross_entropy(logits, y) + cross_entropy(aux, y)).backward()
    with warnings.catch_warnings():
        # Pseudo-gradients start from the first output and never come by.
        warnings.filterwarnings(
            "ignore", message="layers have gradients but no statistics"
        )
        optimizer.step()


def plain_step(model: nn.Module, optimizer: KroneckerOptimizer, i: int) -> None:
    train(model, optimizer, [i])


def abandoned_pass(model: nn.Module, optimizer: KroneckerOptimizer, i: int) -> None:
    loss_of(model, i)
    train(model, optimizer, [i])


def passes_without_the_root(
    model: nn.Module, optimizer: KroneckerOptimizer, i: int
) -> None:
    model[0](example_batch(i)[0])
    with warnings.catch_warnings():  # rows of a norm called by itself
        warnings.filterwarnings("ignore", message="Which example the rows")
        model[:2](example_batch(i)[0]).sum().backward()
    train(model, optimizer, [i])


def never_a_step(model: nn.Module, optimizer: KroneckerOptimizer, i: int) -> None:
    model.zero_grad()
    model[0](example_batch(i)[0])
    loss_of(model, i).backward()


@pytest.mark.usefixtures("only_new_objects")
@some_methods
@pytest.mark.parametrize(
    ("build", "step"),
    [
        (small_classifier, plain_step),
        (small_classifier, abandoned_pass),
        (small_classifier, passes_without_the_root),
        (small_classifier, never_a_step),
        (Auxiliary, auxiliary_step),
    ],
    ids=lambda f: f.__name__,
)
def test_tensors_do_not_pile_up(
    method: Method, build: Callable[[], nn.Module], step: Callable[..., None]
) -> None:
    model = build()
    optimizer = method(model)
    counts = []
    for i in range(36):
        step(model, optimizer, i)
        if i in (11, 23, 35):  # all intervals end
            counts.append(live_tensors())
    assert counts[0] == counts[1] == counts[2]


@every_method
def test_a_pass_without_backward_is_freed(method: Method) -> None:
    """By reference counting alone: a cycle through the graph would never be found."""
    model = small_classifier()
    optimizer = method(model)
    x = example_batch(0)[0].requires_grad_()
    freed = []
    handle = model[3].register_forward_hook(
        lambda module, args, out: freed.append(weakref.ref(args[0]))
    )
    model(x)
    handle.remove()
    assert len(freed) == 1
    assert freed[0]() is None
    assert optimizer.curvature["0"].A is None
