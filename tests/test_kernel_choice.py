"""The choice by measurement: with a clock that tests set, and kernels on the CPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_engine import HostEngine, compile_together
from torch import Tensor

from ekfac.errors import EkfacWarning
from ekfac.kernels import decomposition
from ekfac.kernels.cuda import compiler, dispatch
from ekfac.kernels.cuda.choice import ROUNDS, Chooser, Work, bucket, measured
from ekfac.kernels.cuda.compiler import FLOAT, Variant
from ekfac.kernels.cuda.dispatch import KernelCache
from ekfac.kernels.cuda.gram import Gram, gram_variant
from ekfac.kernels.cuda.launch import Launch
from ekfac.kernels.cuda.precondition import Preconditioned

TWO = 2


class FakeClock:
    """Time that passes only when somebody lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def elapsed(self, work: Work) -> float:
        start = self.now
        work()
        return self.now - start

    def work(self, *seconds: float) -> Work:
        """Return work that takes so long, call by call; the last stays."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


class Scripted:
    """Says of every candidate, in the order of a list, how long it took."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def elapsed(self, work: Work) -> float:
        work()
        self.calls += 1
        return self.seconds[(self.calls - 1) % len(self.seconds)]


def raising(error: Exception) -> Work:
    def call() -> None:
        raise error

    return call


# -- the harness -----------------------------------------------------------------------


def test_the_fastest_is_chosen() -> None:
    clock = FakeClock()
    works = {"torch": clock.work(2.0), "a": clock.work(3.0), "kernel": clock.work(1.0)}
    found = measured(works, clock)
    assert found.name == "kernel"
    assert found.seconds == pytest.approx({"torch": 2.0, "a": 3.0, "kernel": 1.0})


def test_the_first_call_does_not_count() -> None:
    """It compiles and allocates."""
    clock = FakeClock()
    works = {"torch": clock.work(2.0), "kernel": clock.work(1000.0, 1.0)}
    assert measured(works, clock).name == "kernel"


def test_disturbances_do_not_count() -> None:
    """Another program takes the device for all rounds of one candidate but one."""
    clock = FakeClock()
    works = {
        "torch": clock.work(2.0),
        "kernel": clock.work(1.0, 9.0, 9.0, 9.0, 1.0, 9.0),
    }
    assert measured(works, clock).name == "kernel"


def test_a_device_that_slows_down_slows_all() -> None:
    """Each round takes longer, and each candidate is first in some round."""
    clock, order = FakeClock(), []

    def slowing(name: str, factor: float) -> Work:
        def call() -> None:
            order.append(name)
            clock.now += factor * len(order)

        return call

    works = {name: slowing(name, 1.0) for name in ("torch", "a", "kernel")}
    measured(works, clock)
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]
    assert len(rounds) == ROUNDS
    assert {one[0] for one in rounds} == set(works)
    assert all(set(one) == set(works) for one in rounds)


def test_ties_go_to_torch() -> None:
    clock = FakeClock()
    works = {"torch": clock.work(1.0), "kernel": clock.work(1.0)}
    assert measured(works, clock).name == "torch"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("refused")]
)
def test_what_fails_is_not_chosen(error: Exception) -> None:
    clock = FakeClock()
    works = {"torch": clock.work(5.0), "kernel": raising(error)}
    assert measured(works, clock).name == "torch"
    nothing = {"torch": raising(error), "kernel": raising(error)}
    assert measured(nothing, clock).name == "torch"


def test_sizes_are_powers_of_two() -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 4, 5, 768, 1025)] == [
        *(0, 1, 2, 4, 4, 8, 1024, 2048)
    ]


# -- what is kept ----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EKFAC_CACHE", str(tmp_path))
    return tmp_path / "cubins"


def test_a_class_is_measured_once_and_kept(cache: Path) -> None:
    clock = FakeClock()
    works = {"torch": clock.work(2.0), "kernel": clock.work(1.0)}
    chooser = Chooser(clock, "choices.json")
    assert chooser.fastest("gram 1", works) == "kernel"
    before = clock.now
    assert chooser.fastest("gram 1", works) == "kernel"
    again = Chooser(clock, "choices.json")  # another process
    assert again.fastest("gram 1", works) == "kernel"
    assert clock.now == before
    assert again.table() == ["gram 1: kernel (torch 2000000.0, kernel 1000000.0 us)"]
    other = Chooser(clock, "other device.json")
    assert not other.choices


def test_processes_keep_each_others_choices(cache: Path) -> None:
    clock = FakeClock()
    works = {"torch": clock.work(2.0), "kernel": clock.work(1.0)}
    one, two = Chooser(clock, "choices.json"), Chooser(clock, "choices.json")
    one.fastest("a", works)
    two.fastest("b", works)
    assert set(Chooser(clock, "choices.json").choices) == {"a", "b"}


def test_a_choice_that_is_no_longer_there_is_made_again(cache: Path) -> None:
    clock = FakeClock()
    chooser = Chooser(clock, "choices.json")
    works = {"torch": clock.work(2.0), "old": clock.work(1.0)}
    assert chooser.fastest("a", works) == "old"
    works = {"torch": clock.work(2.0), "new": clock.work(1.0)}
    assert Chooser(clock, "choices.json").fastest("a", works) == "new"


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"7", b'{"a": 3}', b'{"a": ["x", {"y": "z"}]}', b"\xff"]
)
def test_tables_that_make_no_sense_are_forgotten(cache: Path, content: bytes) -> None:
    compiler.write_cached("choices.json", content)
    chooser = Chooser(FakeClock(), "choices.json")
    assert not chooser.choices
    clock = FakeClock()
    chooser.fastest("a", {"torch": clock.work(1.0)})
    kept = compiler.read_cached("choices.json")
    assert kept is not None
    assert set(json.loads(kept)) == {"a"}


# -- the choice in use -----------------------------------------------------------------


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., KernelCache]:
    """Return what makes kernels on the CPU, measured by a given clock."""
    monkeypatch.delenv("EKFAC_KERNELS", raising=False)
    compile_together([gram_variant(FLOAT, 64, False, TWO)])

    def make(*seconds: float) -> KernelCache:
        found = KernelCache(HostEngine(problems=TWO), Chooser(Scripted(*seconds)))
        monkeypatch.setattr(dispatch, "kernel_cache", lambda _: found)
        return found

    return make


def gram_of(rows: Tensor, beta: float = 0.5) -> Gram:
    d = rows.shape[-1]
    return Gram(torch.ones(1, d, d), rows, torch.rand(rows.shape[:2]), 2.0, beta)


def exact(gram: Gram) -> Tensor:
    x = gram.x.double()
    assert gram.weight is not None
    total = torch.einsum("ns,nsbi,nsbj->bij", gram.weight.double(), x, x)
    return gram.alpha * total + gram.beta


# In each round the candidates take turns, and each stands first once.
NAMES = ["torch", "baddbmm", "halves", "kernel"]


@pytest.mark.parametrize("fastest", NAMES)
def test_sums_are_done_by_whatever_is_fastest(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Callable[..., KernelCache],
    fastest: str,
) -> None:
    """And once: what was measured wrote copies."""
    own = kernels()
    asked: list[str] = []

    def choose(key: str, candidates: dict[str, Work]) -> str:
        asked.append(key)
        assert list(candidates) == NAMES
        for work in candidates.values():
            work()
        return fastest

    monkeypatch.setattr(own, "fastest", choose)
    items = [gram_of(torch.randn(9, 3, 1, d)) for d in (5, 8, 33)]
    expected = [exact(item) for item in items]
    own.used.clear()
    assert dispatch.run_sums(dispatch.SUMS["gram_"], items) == [True] * 3
    for item, total in zip(items, expected, strict=True):
        assert float((item.out - total).norm() / total.norm()) < 1e-6
        assert torch.equal(item.out, item.out.mT) or fastest != "kernel"
    assert (own.used["gram"] > 0) == (fastest == "kernel")
    assert asked == [
        "gram_ 1 x [float32 1 32 64 weighted], 2 x [float32 1 32 8 weighted]"
    ]


def test_warps_are_measured_beside_warpgroups_and_take_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Variants are those of an H200; nothing is compiled, and nothing launched."""
    monkeypatch.delenv("EKFAC_KERNELS", raising=False)
    wide = Gram(torch.empty(1, 768, 768), torch.empty(8, 1, 1, 768).bfloat16())
    narrow = Gram(torch.empty(1, 64, 64), torch.empty(8, 1, 1, 64).bfloat16())
    operator, ran = dispatch.SUMS["gram_"], []

    def kernels(broken: bool, fastest: str) -> KernelCache:
        own = KernelCache(HostEngine(warpgroups=True))

        def tried(variant: Variant) -> str | None:
            return "wrong" if broken and variant.warpgroups else None

        def choose(key: str, candidates: dict[str, Work]) -> str:
            assert fastest in candidates
            return fastest

        def run(launches: list[Launch]) -> bool:
            ran.append([one.variant.warpgroups for one in launches[:1]])
            return True

        monkeypatch.setattr(own, "_try", tried)
        monkeypatch.setattr(own, "fastest", choose)
        monkeypatch.setattr(own, "run", run)
        monkeypatch.setattr(dispatch, "kernel_cache", lambda _: own)
        return own

    assert list(kernels(False, "kernel").engines(operator, [narrow])) == ["kernel"]
    for fastest in (dispatch.KERNEL, dispatch.PLAIN):
        own = kernels(False, fastest)
        assert list(own.engines(operator, [wide, narrow])) == ["kernel", dispatch.PLAIN]
        assert dispatch.run_sums(operator, [wide]) == [True]
    own = kernels(True, dispatch.KERNEL)
    with pytest.warns(EkfacWarning, match="the kernel without warpgroups or PyTorch"):
        assert dispatch.takes(operator, wide)
    assert dispatch.run_sums(operator, [wide]) == [True]
    assert ran == [[True], [False], [False]]
    monkeypatch.setenv("EKFAC_KERNELS", "own")
    for broken in (False, True):
        own = kernels(broken, dispatch.KERNEL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (engine,) = own.engines(operator, [wide]).values()
        assert engine.warpgroups == (not broken)


@pytest.mark.parametrize(("torch_s", "kernel_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_element_wise_kernels_are_measured_too(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Callable[..., KernelCache],
    torch_s: float,
    kernel_s: float,
) -> None:
    own = kernels(torch_s, kernel_s, kernel_s, torch_s)
    u, s = torch.full((1, 3, 4), 2.0), torch.ones(1, 3, 4)
    calls = []
    for _ in range(2):
        v = u.clone()
        sums = torch.ops.ekfac.precondition_([v], [s], torch.ones(1), -1.0)
        calls.append(v)
        assert sums.tolist() == [[24.0, 12.0]]
    assert all(torch.equal(v, torch.ones_like(v)) for v in calls)
    assert own.used["precondition"] == (2 if kernel_s < torch_s else 0)
    assert own.chooser is not None
    assert isinstance(own.chooser.clock, Scripted)
    assert own.chooser.clock.calls == 2 * ROUNDS  # at the first call alone


def test_ranks_that_write_the_same_take_the_kernel(
    monkeypatch: pytest.MonkeyPatch, kernels: Callable[..., KernelCache]
) -> None:
    own = kernels(1.0)
    monkeypatch.setattr(dispatch, "several_ranks", lambda: True)
    layer = Preconditioned(torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.ones(()))
    operator = dispatch.MAPS["precondition_"]
    assert dispatch.run_map(operator, [layer], -1.0).tolist() == [[6.0, 3.0]]
    assert own.used["precondition"] == 1
    assert own.chooser is not None
    assert not own.chooser.choices


def test_the_environment_overrules(
    monkeypatch: pytest.MonkeyPatch, kernels: Callable[..., KernelCache]
) -> None:
    own = kernels(1.0)  # ties: torch
    operator = dispatch.SUMS["gram_"]
    dispatch.run_sums(operator, [gram_of(torch.randn(4, 1, 1, 5))])
    assert not own.used
    monkeypatch.setenv("EKFAC_KERNELS", "own")
    dispatch.run_sums(operator, [gram_of(torch.randn(4, 1, 1, 5))])
    assert own.used["gram"] == 1


def test_nothing_is_measured_while_a_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch, kernels: Callable[..., KernelCache]
) -> None:
    own = kernels(1.0, 2.0)
    own.ready([gram_variant(FLOAT, 64, False, TWO)])
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    item = gram_of(torch.randn(4, 1, 1, 5))
    expected = exact(item)
    assert dispatch.run_sums(dispatch.SUMS["gram_"], [item]) == [True]
    assert own.chooser is not None
    assert not own.chooser.choices
    assert not own.used
    assert float((item.out - expected).norm()) < 1e-5 * float(expected.norm())


def test_decompositions_are_measured_with_their_residual(
    monkeypatch: pytest.MonkeyPatch, kernels: Callable[..., KernelCache]
) -> None:
    """A solver that is fast and wrong is as slow as what repairs it."""
    kernels(1.0, 5.0)
    x = torch.randn(3, 40, 80)
    matrices, solved = x @ x.mT / 80, []

    def wrong(rest: Tensor) -> tuple[Tensor, Tensor]:
        solved.append(len(rest))
        return rest[..., 0], rest

    def choose(key: str, candidates: dict[str, Work]) -> str:
        assert key == "eigh 4 x 40"
        before = len(solved)
        candidates["jacobi"]()
        assert len(solved) == before + 1
        return "cusolver"

    monkeypatch.setattr(decomposition, "has_batched", lambda _: True)
    monkeypatch.setattr(dispatch, "eigenvectors", wrong)
    monkeypatch.setattr(KernelCache, "fastest", lambda _, *rest: choose(*rest))
    chain = decomposition.solvers(matrices)
    assert chain == [decomposition.batched_eigh, wrong]
    monkeypatch.setattr(KernelCache, "fastest", lambda *_: "torch")
    assert decomposition.solvers(matrices) == []
    monkeypatch.setattr(KernelCache, "fastest", lambda *_: "kernel")
    assert decomposition.solvers(matrices) == [wrong, decomposition.batched_eigh]
