"""Lists of layers on the CPU: the way that CUDA tensors take, with the references.

What asks for a CUDA device is told that there is one; everything is compared with the
way layer by layer, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC
from ekfac.curvature import eigenbasis, stacks
from ekfac.errors import CaptureError
from ekfac.kernels.cuda import dispatch, operators
from ekfac.kernels.cuda.gram import Gram
from ekfac.kernels.cuda.operators import LaunchQueue
from ekfac.optim.optimizer import KroneckerOptimizer

Calls = list[tuple[str, int]]


@pytest.fixture
def calls() -> Calls:
    """Return where calls of the list operators are noted, with their lengths."""
    return []


def pretend(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    """Take the way of a CUDA device from now on."""
    run_ = operators.run_

    def noted(kind: str, items: Sequence[operators.Item]) -> None:
        calls.append((kind, len(items)))
        run_(kind, items)

    monkeypatch.setattr(operators, "applies", lambda _: True)
    monkeypatch.setattr(dispatch, "takes", lambda *_, **__: True)
    monkeypatch.setattr(eigenbasis, "available", lambda _: True)
    monkeypatch.setattr(operators, "run_", noted)


class Everything(nn.Module):
    """Equal layers, a layer used twice, convolutions, an embedding, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 5, padding_idx=0)
        self.image = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 2, stride=2, groups=2, bias=False)
        self.equal = nn.ModuleList(nn.Linear(9, 9) for _ in range(3))
        self.norm = nn.LayerNorm(9)
        self.sequence = nn.Linear(5, 5)
        self.bare = nn.Linear(9, 3, bias=False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        image = self.grouped(self.image(x).tanh()).tanh().flatten(1)
        words = self.sequence(self.tokens(index)).tanh()
        words = self.sequence(words).mean(dim=1)
        h = torch.cat([image, words], dim=1)
        for layer in self.equal:
            h = h + layer(h).tanh()
        return self.bare(self.norm(h))


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(6, 2, 2, 2, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 7, (6, 4), generator=generator)
    return x, index, torch.randint(0, 3, (6,), generator=generator)


def trained(
    method: Callable[..., KroneckerOptimizer], steps: int = 6, **options: Any
) -> tuple[nn.Module, KroneckerOptimizer]:
    """Train on two batches a step, from the same start."""
    torch.manual_seed(0)
    model = Everything()
    intervals = {"factor_interval": 3, "basis_interval": 4}
    optimizer = method(model, 1e-2, max_dim=10, **{**intervals, **options})
    for step in range(steps):
        optimizer.zero_grad()
        for number in (2 * step, 2 * step + 1):
            x, index, y = batch(number)
            (cross_entropy(model(x, index), y) / 2).backward()
        optimizer.step()
    return model, optimizer


def distances(
    found: tuple[nn.Module, KroneckerOptimizer],
    expected: tuple[nn.Module, KroneckerOptimizer],
) -> list[tuple[str, float]]:
    """Return relative distances of parameters and of what is kept of every layer."""
    pairs = {
        name: (p, q)
        for (name, p), q in zip(
            found[0].named_parameters(), expected[0].parameters(), strict=True
        )
    }
    for name, layer in found[1].curvature.items():
        other = expected[1].curvature[name]
        for key in ("A", "G", "s"):
            one, two = getattr(layer, key), getattr(other, key)
            assert (one is None) == (two is None)
            if one is not None:
                pairs[f"{name} {key}"] = (one, two)
        assert layer.version == other.version
    return [
        (name, float((one - two).detach().norm() / two.detach().norm()))
        for name, (one, two) in pairs.items()
    ]


ra, per_example = {"scaling": "running_average"}, {"scaling": "per_example"}
CASES: list[tuple[Callable[..., KroneckerOptimizer], dict[str, Any]]] = [
    (KFAC, {}),
    (KFAC, {"grafting": None, "damping_mode": "absolute", "kl_clip": 1e-3}),
    (EKFAC, ra),
    (EKFAC, {**ra, "grafting": "sgd", "kl_clip": 1e-3, "scaling_interval": 2}),
    (
        EKFAC,
        {**ra, "direction": "natural", "grafting": None, "power": -0.5, "damping": 0.3},
    ),
    (EKFAC, {**per_example, "kl_clip": 1e-3}),
    (EKFAC, {**per_example, "grafting": None, "damping_mode": "absolute"}),
    (EKFAC, {**per_example, "fisher": "exact", "sharing": "reduce"}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_lists_do_what_layers_do_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
    float64: torch.dtype,
    calls: Calls,
    method: Callable[..., KroneckerOptimizer],
    options: dict[str, Any],
) -> None:
    expected = trained(method, **options)
    pretend(monkeypatch, calls)
    found = trained(method, **options)
    for name, distance in distances(found, expected):
        assert distance < 1e-8, name
    kinds = {"gram_", "diagonal_gram_"}
    if options.get("sharing") != "reduce":
        kinds |= {"index_counts_", "patch_gram_"}
    if options.get("scaling") == "per_example":
        kinds.add("scalings_")
    assert kinds <= {kind for kind, _ in calls}
    assert max(length for kind, length in calls if kind == "gram_") >= 8


def test_equal_layers_are_projected_in_one_product(
    monkeypatch: pytest.MonkeyPatch, float64: torch.dtype, calls: Calls
) -> None:
    pretend(monkeypatch, calls)
    _, optimizer = trained(EKFAC)
    layers = [
        la for name, la in optimizer.curvature.items() if name.startswith("equal")
    ]
    (stack,) = stacks.Stacks().of({"equal": layers})["equal"]
    assert stack.layers == layers
    bases = stack.basis("G")
    assert bases is not None
    for layer, left in zip(layers, bases, strict=True):
        assert torch.equal(layer.basis("G")[0], left)
        assert layer.basis("G").data_ptr() == left.data_ptr()


def test_bases_that_lie_anyhow_are_taken_one_by_one() -> None:
    bank = torch.randn(6, 4, 4)
    views = [bank[i : i + 1] for i in range(6)]
    assert torch.equal(stacks.stacked([views[0], views[2], views[4]]), bank[::2])
    assert stacks.stacked([views[0], views[2], views[5]]) is None
    assert stacks.stacked([views[2], views[0]]) is None
    assert stacks.stacked([views[0], torch.randn(1, 4, 4)]) is None
    assert stacks.stacked([views[3]]) is views[3]


def test_a_gradient_that_is_not_finite_leaves_the_scalings(
    monkeypatch: pytest.MonkeyPatch, float64: torch.dtype, calls: Calls
) -> None:
    pretend(monkeypatch, calls)
    model, optimizer = trained(EKFAC, basis_interval=100)  # step 7 refreshes nothing
    layer = optimizer.curvature["bare"]
    before = layer.s.clone()
    x, index, y = batch(99)
    optimizer.zero_grad()
    cross_entropy(model(x, index), y).backward()
    model.bare.weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert torch.allclose(layer.s, before, rtol=1e-12)


def test_a_layer_without_curvature_gets_its_gradient(
    monkeypatch: pytest.MonkeyPatch, float64: torch.dtype, calls: Calls
) -> None:
    """All scalings zero: divided by one, not by zero."""
    results = []
    for listed in (False, True):
        if listed:
            pretend(monkeypatch, calls)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        optimizer = EKFAC(model, 1e-2, grafting=None)
        for step in range(4):
            optimizer.zero_grad()
            loss = cross_entropy(model(torch.ones(5, 3)), torch.zeros(5).long())
            (loss * float(step > 1)).backward()
            optimizer.step()
        results.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert torch.isfinite(results[1]).all()
    assert torch.allclose(*results, rtol=1e-8)


def test_sums_wait_until_the_backward_pass_ends(
    monkeypatch: pytest.MonkeyPatch, float64: torch.dtype, calls: Calls
) -> None:
    """All gradients' Gram matrices of a pass in one call, done when it returns."""
    pretend(monkeypatch, calls)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    optimizer = EKFAC(model)
    model(torch.randn(7, 4)).square().sum().backward()
    assert calls == [("gram_", 10)]
    sums = optimizer._collector.window.statistics["0"].sums[False]
    assert bool(torch.isfinite(sums.inputs).all())
    optimizer.step()


def test_many_bytes_do_not_wait(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    pretend(monkeypatch, calls)
    together = LaunchQueue(budget=4 * 50)
    rows = [torch.randn(5, 1, 1, d) for d in (4, 20, 4, 4)]
    totals = [
        together.add("gram_", Gram(torch.empty(1, x.shape[3], x.shape[3]), x), None)
        for x in rows
    ]
    assert calls == [("gram_", 1), ("gram_", 3)]  # the large one, then what is too much
    for x, total in zip(rows, totals, strict=True):
        assert torch.allclose(total[0], x[:, 0, 0].T @ x[:, 0, 0], atol=1e-5)


def test_sums_of_one_result_and_of_others(
    monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    pretend(monkeypatch, calls)
    together, x = LaunchQueue(), torch.randn(5, 1, 1, 3)
    gram = x[:, 0, 0].T @ x[:, 0, 0]

    def item() -> Gram:
        return Gram(torch.full((1, 3, 3), float("nan")), x)

    total = together.add("gram_", item(), None)
    assert together.add("gram_", item(), total) is total
    together.complete(total)
    assert torch.allclose(total[0], 2 * gram, atol=1e-5)
    other = together.add("gram_", item(), torch.ones(1, 3, 3))
    assert torch.allclose(other[0], 1 + gram, atol=1e-5)


def test_inputs_that_change_while_sums_wait_are_an_error(
    monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    pretend(monkeypatch, calls)
    together, x = LaunchQueue(), torch.randn(5, 1, 1, 3)
    together.add("gram_", Gram(torch.empty(1, 3, 3), x), None)
    x.zero_()
    with pytest.raises(CaptureError, match="changed in place during the backward"):
        together.flush()
    together.flush()  # nothing is left
    assert not calls
