"""Damaged states: loaded with the same result, or refused with nothing changed.

States are damaged in every way at every key: what is loaded must train on as the run
that it was saved from, bit for bit; what is refused must leave everything as it was and
name the key. The reference is that run itself, not another reading of the schema.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from damage import Path, damaged, every_damage, read, unread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from training_cases import assert_identical, flattened, loss_of, small_classifier, train

from ekfac import EKFAC, KFAC, Monitor
from ekfac.diagnostics.papers.george import ComplexityMeasure
from ekfac.errors import StateMismatchError
from ekfac.optim import DistributedState, LevenbergMarquardt
from ekfac.state_schema import (
    CHECKSUMS,
    Choice,
    Items,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Record,
    Table,
    TensorField,
    Text,
    sealed,
)

STEPS, MORE = 8, 7  # when it is saved, and how long it goes on


# -- what is saved ---------------------------------------------------------------------


@dataclass
class Run:
    """A training run, and the part of it whose state is damaged.

    Attributes:
        model: The network.
        optimizer: Trains it.
        part: Has ``state_dict`` and ``load_state_dict``.
        after: What is done after every step, told its number.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    part: Any
    after: Callable[[int], object] = lambda number: None

    def train(self, numbers: range) -> None:
        """Do one step on each batch."""
        for number in numbers:
            train(self.model, self.optimizer, [number])
            self.after(number)

    def state(self) -> Any:
        """Return a copy of the part's state, bytes read."""
        return read(copy.deepcopy(self.part.state_dict()))

    def result(self) -> dict[str, Any]:
        """Return all that tells it from another run."""
        parts = [self.model.state_dict(), self.state()]
        if isinstance(self.part, Monitor):  # times are no result
            parts[1] = parts[1]["steps"]
        if self.part is not self.optimizer:
            parts.append(self.optimizer.state_dict())
        return flattened(parts)


def wide_classifier() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 80), nn.LayerNorm(80), nn.Linear(80, 4))


INTERVALS: dict[str, Any] = {"factor_interval": 3, "basis_interval": 6}


def convolutional_classifier() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (2, 3)),
            nn.Conv1d(2, 4, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 4),
        )


def optimizer_run(
    kind: type[Any],
    network: Callable[[], nn.Module] = small_classifier,
    **options: Any,
) -> Run:
    torch.manual_seed(0)
    model = network()
    optimizer = kind(model, lr=1e-2, **{**INTERVALS, **options})
    return Run(model, optimizer, optimizer)


def truncated_run(**options: Any) -> Run:
    return optimizer_run(EKFAC, wide_classifier, rank=5, basis_delay=3, **options)


def uncorrelated_run(kind: type[Any], **options: Any) -> Run:
    options["conv_factors"] = "spatially_uncorrelated"
    return optimizer_run(kind, convolutional_classifier, **options)


def checkpoint_run(**options: Any) -> Run:
    run = optimizer_run(EKFAC, **options)
    return Run(run.model, run.optimizer, DistributedState(run.optimizer))


def damping_run() -> Run:
    run = optimizer_run(KFAC, grafting=None)
    adaptation = LevenbergMarquardt(run.optimizer, interval=3)
    return Run(
        run.model,
        run.optimizer,
        adaptation,
        lambda number: adaptation.step(lambda: loss_of(run.model, number)),
    )


def monitor_run() -> Run:
    run = optimizer_run(KFAC)
    return Run(run.model, run.optimizer, Monitor(run.optimizer, every=3))


def measure_run() -> Run:
    run = optimizer_run(KFAC)
    measure = ComplexityMeasure(run.model, torch.randn(5, 6), every=3)
    return Run(run.model, run.optimizer, measure, lambda number: measure.update())


RUNS: dict[str, Callable[[], Run]] = {
    "EKFAC, pending bases": lambda: optimizer_run(EKFAC, basis_delay=3),
    "EKFAC, per example": lambda: optimizer_run(EKFAC, scaling="per_example"),
    "EKFAC, truncated": lambda: truncated_run(),
    "EKFAC, packed": lambda: optimizer_run(EKFAC, storage="packed", basis_delay=3),
    "EKFAC, bfloat16": lambda: optimizer_run(EKFAC, storage="bfloat16", basis_delay=3),
    "EKFAC, truncated in bfloat16": lambda: truncated_run(storage="bfloat16"),
    "EKFAC, uncorrelated": lambda: uncorrelated_run(EKFAC, basis_delay=3),
    "EKFAC, Monte Carlo": lambda: optimizer_run(EKFAC, fisher="mc"),
    "EKFAC, no momentum": lambda: optimizer_run(EKFAC, momentum=0.0),
    "KFAC": lambda: optimizer_run(KFAC, kl_clip=0.1),
    "KFAC, uncorrelated": lambda: uncorrelated_run(KFAC, storage="packed"),
    "distributed": lambda: checkpoint_run(basis_delay=3),
    "distributed, truncated": lambda: checkpoint_run(
        network=wide_classifier, rank=5, storage="bfloat16"
    ),
    "LevenbergMarquardt": damping_run,
    "Monitor": monitor_run,
    "ComplexityMeasure": measure_run,
}


@cache
def saved(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return a run's weights and state at ``STEPS``, and its result after ``MORE``."""
    run = RUNS[name]()
    run.train(range(STEPS))
    whole = [run.model.state_dict(), run.optimizer.state_dict(), run.state()]
    weights, optimizer, state = copy.deepcopy(whole)
    run.train(range(STEPS, STEPS + MORE))
    return (weights, optimizer), state, run.result()


@cache
def other_run(name: str) -> tuple[Run, dict[str, Any]]:
    """Return a run at another point, to load into, with its result so far."""
    run = RUNS[name]()
    run.train(range(20, 25))
    return run, run.result()


# -- the test --------------------------------------------------------------------------

OUTCOMES: Counter[str] = Counter()


@st.composite
def draws(draw: st.DrawFn) -> tuple[str, Path, str, int]:
    """Draw a run, an entry of its state, a damage and a seed."""
    name = draw(st.sampled_from(sorted(RUNS)))
    state = saved(name)[1]
    path, kind = draw(st.sampled_from(list(every_damage(state))))
    return name, path, kind, draw(st.integers(0, 99))


def check_draw(name: str, path: Path, kind: str, seed: int) -> None:
    """Load one damaged state; it must go on as undamaged, or be refused."""
    (weights, optimizer), state, expected = saved(name)
    run, before = other_run(name)
    broken = unread(damaged(state, path, kind, seed))
    refusal = None
    try:
        run.part.load_state_dict(broken)
    except StateMismatchError as error:
        refusal = error
    if refusal is not None:
        assert all((refusal.key, refusal.found, refusal.expected)), refusal
        assert_identical(run.result(), before)
        OUTCOMES["refused"] += 1
        return
    other_run.cache_clear()
    run.model.load_state_dict(weights)
    if isinstance(run.part, (Monitor, LevenbergMarquardt, ComplexityMeasure)):
        run.optimizer.load_state_dict(optimizer)
    run.train(range(STEPS, STEPS + MORE))
    assert_identical(_shared(run.result()), _shared(expected))
    OUTCOMES["loaded"] += 1


def _shared(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without keys that a state may have more."""
    return {key: v for key, v in result.items() if not key.endswith(".more")}


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(draws())
def test_a_damaged_state_is_loaded_as_it_was_or_refused(
    draw: tuple[str, Path, str, int],
) -> None:
    check_draw(*draw)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(draws())
def test_thousands_of_damaged_states(draw: tuple[str, Path, str, int]) -> None:
    check_draw(*draw)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_entry_with_every_damage(name: str) -> None:
    """All pairs, each once; prints the counts."""
    OUTCOMES.clear()
    for path, kind in every_damage(saved(name)[1]):
        check_draw(name, path, kind, 0)
    print(f"{name}: {dict(OUTCOMES)}")
    assert OUTCOMES["refused"] > 10


@pytest.mark.parametrize("name", RUNS)
def test_an_undamaged_state_goes_on(name: str) -> None:
    (weights, optimizer), state, expected = saved(name)
    run, _ = other_run(name)
    other_run.cache_clear()
    run.part.load_state_dict(unread(copy.deepcopy(state)))
    run.model.load_state_dict(weights)
    if isinstance(run.part, (Monitor, LevenbergMarquardt, ComplexityMeasure)):
        run.optimizer.load_state_dict(optimizer)
    run.train(range(STEPS, STEPS + MORE))
    assert_identical(run.result(), expected)


# -- what a state was made with --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"fisher": "mc"}, "fisher"),
        ({"fisher": "exact"}, "fisher"),
        ({"sharing": "reduce"}, "sharing"),
    ],
    ids=str,
)
def test_statistics_of_another_meaning_are_refused(
    options: dict[str, Any], key: str
) -> None:
    run = optimizer_run(EKFAC, **options)
    before = run.result()
    with pytest.raises(StateMismatchError, match=f"made_with.{key}"):
        run.part.load_state_dict(saved("EKFAC, pending bases")[1])
    assert_identical(run.result(), before)


def test_another_likelihood_is_refused_where_it_is_read() -> None:
    run = optimizer_run(EKFAC, fisher="mc", likelihood="gaussian")
    with pytest.raises(StateMismatchError, match=r"likelihood.*Categorical.*Gaussian"):
        run.part.load_state_dict(saved("EKFAC, Monte Carlo")[1])


@pytest.mark.parametrize(
    ("source", "kind", "options"),
    [
        ("EKFAC, pending bases", KFAC, {"basis_delay": 3}),
        ("KFAC", EKFAC, {}),
        ("KFAC", EKFAC, {"scaling": "per_example"}),
        ("EKFAC, per example", EKFAC, {}),
        ("EKFAC, Monte Carlo", EKFAC, {"fisher": "mc", "scaling": "per_example"}),
    ],
    ids=str,
)
def test_scalings_of_another_kind_start_again(
    source: str, kind: type[Any], options: dict[str, Any]
) -> None:
    """Factors and bases are those of the state, bit for bit."""
    run, state = optimizer_run(kind, **options), saved(source)[1]
    run.part.load_state_dict(copy.deepcopy(state))
    kept = ("A", "G", "Q_A", "Q_G", "eigenvalues_A", "eigenvalues_G", "momentum")
    for name, layer in run.part.state_dict()["curvature"].items():
        for key in kept:
            before = state["curvature"][name]
            assert (key in layer) == (key in before), key
            assert key not in layer or torch.equal(layer[key], before[key]), key
        assert "s" not in layer or not layer["s"].any()
        assert run.part.curvature[name].s is None
    run.train(range(STEPS, STEPS + MORE))
    if kind is EKFAC:
        assert all(layer.s is not None for layer in run.part.curvature.values())
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


@pytest.mark.parametrize(
    "options", [{"basis_delay": 0}, {"basis_interval": 8}], ids=str
)
def test_pending_bases_of_another_schedule_are_dropped(options: dict[str, Any]) -> None:
    run = optimizer_run(EKFAC, **{"basis_delay": 3, **options})
    state = saved("EKFAC, pending bases")[1]
    assert state["progress"]["background"]
    run.part.load_state_dict(copy.deepcopy(state))
    assert not run.part.state_dict()["progress"]["background"]


def twins() -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 4)
        )


def test_parameters_in_another_order_are_refused() -> None:
    run = optimizer_run(EKFAC, twins)
    run.train(range(STEPS))
    state, model = run.state(), twins()
    first, _, second, last = model
    order = [*second.parameters(), *first.parameters(), *last.parameters()]
    other = EKFAC(order, model=model, lr=1e-2)
    before = flattened(other.state_dict())
    with pytest.raises(
        StateMismatchError, match=r"parameters\.0' is '0.weight', not '2"
    ):
        other.load_state_dict(state)
    assert_identical(flattened(other.state_dict()), before)


def test_exchanged_layers_and_turned_bits_are_refused_until_it_is_said() -> None:
    """A schema cannot tell them; without the checksums they are taken."""
    run = optimizer_run(EKFAC, twins)
    run.train(range(STEPS))
    state = run.state()
    swapped = copy.deepcopy(state)
    layers = swapped["curvature"]
    layers["0"], layers["2"] = layers["2"], layers["0"]
    turned = copy.deepcopy(state)
    turned["curvature"]["2"]["G"][0, 1, 1] *= 1 + 1e-6
    for broken, key in ((swapped, r"curvature\.0\."), (turned, r"curvature\.2\.G")):
        with pytest.raises(StateMismatchError, match=f"'{key}.*checksum.*on purpose"):
            run.part.load_state_dict(broken)
        assert_identical(flattened(run.state()), flattened(state))
        del broken["progress"]["checksums"]
        run.part.load_state_dict(broken)
        run.part.load_state_dict(state)


@pytest.mark.parametrize("source", ["full", "packed", "bfloat16"])
@pytest.mark.parametrize("target", ["full", "packed", "bfloat16"])
def test_another_storage_is_converted(source: str, target: str) -> None:
    """And back: exactly, unless it went through bfloat16."""
    first = optimizer_run(EKFAC, storage=source, rank=5, network=wide_classifier)
    first.train(range(STEPS))
    second = optimizer_run(EKFAC, storage=target, rank=5, network=wide_classifier)
    second.part.load_state_dict(copy.deepcopy(first.state()))
    third = optimizer_run(EKFAC, storage=source, rank=5, network=wide_classifier)
    third.part.load_state_dict(copy.deepcopy(second.state()))
    rough = 2**-8 if "bfloat16" in (source, target) and source != target else 1e-6
    for name, layer in first.part.curvature.items():
        for other in (second.part.curvature[name], third.part.curvature[name]):
            for key in ("A", "G", "s"):
                value, expected = getattr(other, key), getattr(layer, key)
                assert float((value - expected).norm()) <= rough * float(
                    expected.norm()
                )
    if rough == 1e-6:
        assert_identical(flattened(third.state()), flattened(first.state()))
    second.train(range(STEPS, STEPS + MORE))


def test_loading_copies() -> None:
    """Training on leaves what was loaded as it was."""
    for name in RUNS:
        _, state, _ = saved(name)
        run, _ = other_run(name)
        other_run.cache_clear()
        given_state = unread(copy.deepcopy(state))
        run.part.load_state_dict(given_state)
        run.train(range(3))
        assert_identical(flattened(read(given_state)), flattened(state))


# -- the schema itself -----------------------------------------------------------------


def test_writing_copies_what_the_schema_lists() -> None:
    bank = torch.arange(12.0).view(2, 3, 2)
    schema = Record(
        {"row": TensorField((3, 2)), "n": Number(int), "list": ListOf(Number())},
        optional=["n"],
    )
    state = schema.write({"row": bank[1], "unlisted": 3, "list": (1, 2.5)})
    assert state.keys() == {"row", "list"}
    assert state["row"].untyped_storage().nbytes() == 24
    bank.zero_()
    assert state["row"].sum() == 51
    schema.check(state)
    with pytest.raises(StateMismatchError, match="'list' is missing"):
        schema.write({"row": bank[1]})


def test_an_error_says_key_found_and_expected() -> None:
    schema = MapOf(
        Record({"Q": TensorField((2, 2), orthonormal=True), "w": Maybe(Number())})
    )
    state = {"fc": {"Q": torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "w": None}}
    with pytest.raises(StateMismatchError) as caught:
        schema.check(state, "curvature")
    assert caught.value.key == "curvature.fc.Q"
    assert caught.value.found == (
        "a float32 tensor [2, 2] whose columns are 1 from orthonormal"
    )
    assert caught.value.expected == (
        "a finite floating-point tensor [2, 2] with orthonormal columns"
    )


def test_what_cannot_be_shown_is_refused_too() -> None:
    """Python shows no integer of more than 4,300 digits."""
    with pytest.raises(StateMismatchError, match="'n' is of the type int, and cannot"):
        Record({"n": Number(int)}).check({"n": 10**5000})


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (Choice("a", None), ["a", None], ["b", 0, False]),
        (Choice(1), [1], [True, 1.0, "1"]),
        (Number(int, 0, 3), [0, 3], [-1, 4, 1.0, True, None]),
        (Number(), [1, 1.5], [float("nan"), float("inf"), "1", torch.ones(())]),
        (Number(), [2**63 - 1, -(2**63) + 1], [2**63, -(10**400)]),
        (Text(), ["", "a"], [1, None, b"a"]),
        (Items([Text(), Number()]), [["a", 1], ("a", 1)], [["a"], [1, "a"], "a1"]),
        (Table({"a": Text()}), [{}, {"a": "b"}], [{"b": "b"}, {"a": 1}, [], None]),
        (
            TensorField((None, 2), symmetric=False, minimum=0),
            [torch.ones(5, 2), torch.zeros(0, 2)],
            [
                torch.ones(2, 3),
                -torch.ones(1, 2),
                torch.ones(2),
                torch.ones(1, 2).to(torch.float8_e4m3fn),
            ],
        ),
        (
            TensorField((1, 2, 2), symmetric=True),
            [torch.eye(2)[None]],
            [-torch.eye(2)[None], torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])],
        ),
        (TensorField((1,), complex=True), [torch.ones(1) * 1j], [torch.ones(1)]),
    ],
    ids=repr,
)
def test_fields_take_what_they_describe(
    schema: Any, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        schema.check(value)
        schema.check(schema.write(value))
    for value in bad:
        with pytest.raises(StateMismatchError):
            schema.check(value)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128], ids=str
)
def test_checksums_tell_signs_and_places(dtype: torch.dtype) -> None:
    """Of matrices with signs in balance, and of permutations too."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=dtype)
    numbers = torch.arange(1, 5)
    balanced = torch.outer(signs * numbers, signs * (numbers + 1)).to(dtype)
    identity = torch.eye(4, dtype=dtype)
    turned = balanced.clone()
    turned[2, 1] *= -1
    different = [balanced, -balanced, balanced.mT, turned, turned.mT]
    different += [balanced.flip(dim) for dim in ((0,), (1,), (0, 1))]
    different += [identity, -identity, identity.flip(0)]
    different += [identity.roll(1, 0), identity.roll(-1, 0)]
    sums = [sealed({"Q": t})[CHECKSUMS]["Q"] for t in different]
    assert len(set(map(tuple, sums))) == len(sums)
    copied = balanced.mT.contiguous().mT
    assert not copied.is_contiguous()
    assert sealed({"Q": copied})[CHECKSUMS]["Q"] == sums[0]
    assert sealed({"Q": balanced.mT.conj().mT.conj()})[CHECKSUMS]["Q"] == sums[0]


def test_checksums_of_large_tensors_are_those_of_all_rows() -> None:
    """More elements than are in memory at a time, with one other in the last row."""
    tensor = torch.ones(3, 1 << 10, 600)
    before = sealed({"s": tensor})
    tensor[-1, -1, -1] += 1e-7
    assert sealed({"s": tensor})[CHECKSUMS] != before[CHECKSUMS]


def test_one_tensor_of_another_type_is_damage_all_are_a_conversion() -> None:
    pair = {"a": TensorField((2,)), "b": TensorField((2,)), "c": TensorField((2,))}
    schema = Record(pair, same_dtype=[("a", "b", "c")])
    schema.check({key: torch.ones(2, dtype=torch.float64) for key in "abc"})
    mixed = {"a": torch.ones(2), "b": torch.ones(2).double(), "c": torch.ones(2)}
    with pytest.raises(StateMismatchError, match="'b' is a float64"):
        schema.check(mixed)
