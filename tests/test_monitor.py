"""The monitor: what it records, what it costs, and that training does not notice."""

from __future__ import annotations

import copy
import csv
import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import files_of_at_most
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC, Monitor, ntk
from ekfac.diagnostics import label_alignment
from ekfac.errors import CaptureError, EkfacWarning
from ekfac.monitor import CsvWriter, scalars


class Memory:
    """What a ``SummaryWriter`` does, without the files."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, float, int]] = []
        self.flushed = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.lines.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        self.flushed += 1


def setting(kind: Any = EKFAC, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 3)
    )
    return model, kind(model, lr=1e-3, **options)


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 1) -> list[Tensor]:
    """Train on random batches; return the losses."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 6, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses


def generous(optimizer: Any, every: int, **options: Any) -> Monitor:
    """Return a monitor that takes all the time it needs."""
    monitor = Monitor(optimizer, every, share=1.0, **options)
    monitor.share = 1e12
    return monitor


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
def test_training_does_not_notice(kind: Any) -> None:
    plain, optimizer = setting(kind)
    torch.manual_seed(5)
    train(plain, optimizer, 25)
    watched, optimizer = setting(kind)
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    torch.manual_seed(5)
    with generous(optimizer, 4) as monitor:
        monitor.add("alignment", lambda: label_alignment(watched, x, y))
        monitor.add("noise", lambda: torch.rand(()))
        monitor.add("kernel", lambda: ntk(watched, x).trace())
        # In training mode: batch normalisation would count it.
        monitor.add("loss", lambda: cross_entropy(watched(x), y))
        train(watched, optimizer, 25)
    assert len(monitor.series("alignment/whole/value")[0]) == 6
    state, other = plain.state_dict(), watched.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_records_at_the_interval_with_the_values_of_that_step() -> None:
    model, optimizer = setting()
    seen = []
    with generous(optimizer, 10) as monitor:
        weight = model[0].weight  # type: ignore[index]
        monitor.add("norm", lambda: float(weight.norm()))
        for step in range(1, 36):
            train(model, optimizer, 1, seed=step)
            if step % 10 == 0:
                seen.append(float(weight.norm()))
    assert monitor.series("norm") == ([10, 20, 30], seen)
    steps, _ = monitor.series("health/steps")
    assert steps == [10, 20, 30]
    shares = monitor.series("health/layers/0/update_share")[1]
    assert all(0 < share < 1 for share in shares)
    ages = monitor.series("health/layers/4/scalings_age")[1]
    assert ages == [0, 0, 0]
    with pytest.raises(KeyError, match="recorded were"):
        monitor.series("loss")


def test_logged_values_are_read_when_recorded() -> None:
    model, optimizer = setting()
    losses = []
    with generous(optimizer, 5) as monitor:
        generator = torch.Generator().manual_seed(0)
        for _ in range(11):
            x = torch.randn(16, 6, generator=generator)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            monitor.log(loss=loss, epoch=0)
            optimizer.step()
            losses.append(float(loss.detach()))
        assert not monitor._values["loss"].requires_grad
    assert monitor.series("loss") == ([5, 10], [losses[4], losses[9]])
    assert monitor.series("epoch")[1] == [0, 0]


def test_csv_has_every_record_even_if_training_fails(tmp_path: Path) -> None:
    model, optimizer = setting()
    path = tmp_path / "health.csv"

    def crash() -> None:
        with generous(optimizer, 5, writer=path) as monitor:
            monitors.append(monitor)
            train(model, optimizer, 7)
            with open(path, newline="", encoding="utf-8") as file:
                complete.append(len(list(csv.reader(file))))
            raise FloatingPointError("the loss is not finite")

    monitors: list[Monitor] = []
    complete: list[int] = []
    with pytest.raises(FloatingPointError):
        crash()
    (monitor,) = monitors
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "name", "value"]
    assert complete == [len(rows)] == [len(monitor.records) + 1]
    for row, (step, name, value) in zip(rows[1:], monitor.records, strict=True):
        assert row[:2] == [str(step), name]
        assert float(row[2]) == value or value != value
    recorded = len(monitor.records)
    train(model, optimizer, 10)
    assert len(monitor.records) == recorded, "closed monitors record nothing"
    monitor.close()
    with generous(optimizer, 1, writer=str(path)):
        train(model, optimizer, 1)
    with open(path, newline="", encoding="utf-8") as file:
        continued = list(csv.reader(file))
    assert continued[: len(rows)] == rows
    assert len(continued) > len(rows)
    assert sum(row[0] == "step" for row in continued) == 1


def test_training_goes_on_when_the_disc_is_full(tmp_path: Path) -> None:
    """What fitted is there, and a later monitor begins a line of its own."""
    path = tmp_path / "health.csv"
    model, optimizer = setting()
    with (
        files_of_at_most(100),
        pytest.warns(EkfacWarning, match="writes to .* no longer"),
        generous(optimizer, 1, writer=path) as monitor,
    ):
        train(model, optimizer, 4)
    assert monitor.records
    assert path.stat().st_size == 100
    cut = path.read_text(encoding="utf-8").splitlines()
    with generous(optimizer, 1, writer=path):
        train(model, optimizer, 2)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[: len(cut)] == cut
    assert all(line.count(",") == 2 for line in lines[len(cut) :])
    assert len(lines) > len(cut)


def test_summary_writers_are_flushed_and_left_open() -> None:
    model, optimizer = setting()
    writer = Memory()
    with generous(optimizer, 5, writer=writer) as monitor:
        train(model, optimizer, 12)
    assert [(n, s) for n, _, s in writer.lines] == [
        (n, s) for s, n, _ in monitor.records
    ]
    assert writer.flushed == 2
    for writers in (3, Path):
        with pytest.raises(ValueError, match=r"with add_scalar\(tag, value, step\)"):
            Monitor(optimizer, writer=writers)  # type: ignore[arg-type]


def test_a_failing_measurement_is_given_up() -> None:
    model, optimizer = setting()
    calls = 0

    def fail() -> float:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError("no examples")

    with generous(optimizer, 3) as monitor:
        monitor.add("broken", fail)
        with pytest.warns(EkfacWarning, match=r"gives up 'broken'.*no examples"):
            train(model, optimizer, 10)
    assert calls == 1
    assert monitor.schedules["broken"].error == "ZeroDivisionError: no examples"
    assert monitor.series("health/steps")[0] == [3, 6, 9]


def test_a_failing_writer_is_given_up() -> None:
    class Full(Memory):
        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            raise OSError("no space left")

    model, optimizer = setting()
    warned = pytest.warns(EkfacWarning, match="no space left")
    with generous(optimizer, 3, writer=Full()) as monitor, warned:
        train(model, optimizer, 10)
    assert monitor.series("health/steps")[0] == [3, 6, 9]


def test_it_stays_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def goes_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("ekfac.monitor.time", clock)
    model, optimizer = setting()
    with Monitor(optimizer, every=1, share=0.2) as monitor:
        monitor._clock.last = now
        monitor.add("slow", lambda: goes_by(0.01))
        for step in range(80):
            goes_by(0.01)
            train(model, optimizer, 1, seed=step)
    slow, quick = monitor.schedules["slow"], monitor.schedules["health"]
    # Each has half of the share; neither starves the other, and what did not fit
    # before the cost was known is made up for.
    assert slow.taken in (7, 8)
    assert quick.taken == 80
    assert slow.seconds == pytest.approx(0.01)
    assert slow.spent <= 0.1 * monitor._clock.training + 1e-9
    assert monitor.overhead <= 0.2


def test_steps_without_records_are_cheap() -> None:
    model, optimizer = setting()
    train(model, optimizer, 1)
    monitor = Monitor(optimizer, every=10**9)
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(event))
    monitor._step_begins()
    monitor._step_ends()
    sys.setprofile(None)
    assert sum(event.endswith("call") for event in calls) < 20
    assert monitor.before is None
    monitor.close()


def test_parameters_are_copied_for_recorded_steps_alone() -> None:
    model, optimizer = setting()
    with generous(optimizer, 4) as monitor:
        copies = []
        handle = optimizer.register_step_post_hook(
            lambda *unused: copies.append(monitor.before)
        )
        monitor.add("before", lambda: float(monitor.before is not None))
        train(model, optimizer, 9)
        handle.remove()
    assert monitor.series("before") == ([4, 8], [1.0, 1.0])
    assert copies == [None] * 9, "given back after the record"
    with generous(optimizer, 4, updates=False) as monitor:
        monitor.add("before", lambda: float(monitor.before is not None))
        train(model, optimizer, 4)
    assert monitor.series("before")[1] == [0.0]


def test_it_resumes() -> None:
    model, optimizer = setting()
    with generous(optimizer, 4) as monitor:
        train(model, optimizer, 6)
        saved = copy.deepcopy(monitor.state_dict())
    with generous(optimizer, 4) as resumed:
        resumed.load_state_dict(saved)
        train(model, optimizer, 7)
    assert resumed.series("health/steps")[0] == [8, 12]
    assert resumed.schedules["health"].taken == saved["schedules"]["health"][-1] + 2


def test_a_failed_step_is_no_step() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = EKFAC(model)
    with generous(optimizer, 1) as monitor:
        model.eval()
        model(torch.randn(4, 6)).sum().backward()
        with pytest.raises(CaptureError):
            optimizer.step()
        assert monitor.records == []
        model.train()
        train(model, optimizer, 2)
    assert monitor.series("health/steps")[0] == [1, 2]


def test_names_and_limits() -> None:
    _, optimizer = setting()
    with Monitor(optimizer) as monitor:
        with pytest.raises(ValueError, match="called 'health' already"):
            monitor.add("health", dict)
        monitor.remove("health")
        assert not monitor.schedules
    with pytest.raises(ValueError, match="Invalid every: 0"):
        Monitor(optimizer, 0)
    with pytest.raises(ValueError, match=r"Invalid share: 1\.5"):
        Monitor(optimizer, share=1.5)


def test_scalars() -> None:
    nested = {"a": [1, {"b": torch.tensor(2.0)}], "text": "no", "none": None}
    nested["many"] = torch.zeros(2)
    assert dict(scalars(nested)) == {"a/0": 1.0, "a/1/b": 2.0}
    assert dict(scalars(3, "x")) == {"x": 3.0}


def test_a_closed_monitor_is_collected() -> None:
    model, optimizer = setting()
    monitor = Monitor(optimizer)
    train(model, optimizer, 1)
    monitor.close()
    reference = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert reference() is None


def test_names_are_no_formulas(tmp_path: Path) -> None:
    writer = CsvWriter(tmp_path / "cells.csv")
    for name in ("=1+1", "+a", "-a", "@a", "a=b", "layer/0"):
        writer.add_scalar(name, -0.5, 1)
    writer.close()
    text = (tmp_path / "cells.csv").read_text(encoding="utf-8")
    names = [row[1] for row in csv.reader(text.splitlines())]
    assert names == ["name", "'=1+1", "'+a", "'-a", "'@a", "a=b", "layer/0"]
    assert text.count("-0.5") == 6, "numbers stay numbers"
