"""Compiled models: layers break the graph, and what they record is what they computed.

A model is compiled at its first call. From then on torch looks at its hooks no more, so
that call has to come after the optimizer was constructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from support import relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training_cases import METHODS, Method, every_fisher

from ekfac import EKFAC
from ekfac.errors import CaptureError, EkfacWarning
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning")


@pytest.fixture(autouse=True)
def _forget_compiled_code(float64: torch.dtype) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_donated_buffers() -> Iterator[None]:
    """Let a compiled graph be gone through twice, as "mc" and "exact" do."""
    with functorch_config.patch(donated_buffer=False):
        yield


def network() -> nn.Sequential:
    """Return a network whose batches of 24 give factors of full rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    )


def train_on(
    call: Callable[[Tensor], Tensor], optimizer: KroneckerOptimizer, steps: range
) -> None:
    """Train on batches of 24 examples."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(24, 6, generator=generator)
        y = torch.randint(0, 4, (24,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(call(x), y).backward()
        optimizer.step()


def assert_same_curvature(
    found: KroneckerOptimizer, expected: KroneckerOptimizer, tolerance: float
) -> None:
    assert list(found.curvature) == list(expected.curvature)
    for name, layer in expected.curvature.items():
        other = found.curvature[name]
        assert relative_error(other.A, layer.A) < tolerance, name
        assert relative_error(other.G, layer.G) < tolerance, name
        if layer.s is not None:
            assert relative_error(other.s.sum(), layer.s.sum()) < tolerance, name


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


WAYS: dict[str, Callable[..., Any]] = {
    "model.compile": in_place,
    "torch.compile": torch.compile,
}
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.mark.usefixtures("no_donated_buffers")
@every_way
@pytest.mark.parametrize("order", ["optimizer first", "model", "compiled model"])
@pytest.mark.parametrize("method", METHODS[::4], ids=lambda m: m.name)
def test_compiled_model(method: Method, way: str, order: str) -> None:
    """``order``: what is constructed first, or what the optimizer is given."""
    plain, model = network(), network()
    expected = method(plain)
    if order == "optimizer first":
        optimizer = method(model)
        call = WAYS[way](model, backend="aot_eager")
    else:
        call = WAYS[way](model, backend="aot_eager")
        optimizer = method(model if order == "model" else call)
    train_on(plain, expected, range(5))
    train_on(call, optimizer, range(5))
    assert_same_curvature(optimizer, expected, 1e-10)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert relative_error(q.detach(), p.detach()) < 1e-10


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_training_steps(whole: bool) -> None:
    """The whole of a step, or the optimizer's alone."""
    plain, model = network(), network()
    expected, optimizer = METHODS[0](plain), METHODS[0](model)
    step = torch.compile(optimizer.step, backend="eager")

    def train(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if whole:
            optimizer.step()
        else:
            step()

    train = torch.compile(train, backend="eager") if whole else train
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(24, 6, generator=generator)
        y = torch.randint(0, 4, (24,), generator=generator)
        train(x, y)
    train_on(plain, expected, range(3))
    assert_same_curvature(optimizer, expected, 1e-10)


class Sequence(nn.Module):
    """Attention, an embedding tied to the head, and functions between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.wide = nn.Linear(8, 16)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        z = self.norm(h)
        h = h + self.attention(z, z, z, need_weights=False)[0]
        a, b = self.wide(h).chunk(2, dim=-1)
        gate: Tensor = torch.softmax(b, dim=-1) * torch.sigmoid(a)
        return self.head(nn.functional.layer_norm(h + gate, (8,)))


@pytest.mark.usefixtures("no_donated_buffers")
@every_fisher
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_attention(fisher: str, backend: str) -> None:
    optimizers = []
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 7, (2, 12, 5), generator=generator)
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Sequence()
        call = torch.compile(model, backend=backend) if compiled else model
        optimizer = EKFAC(call, fisher=fisher, scaling="per_example", lr=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(call(x).transpose(1, 2), y).backward()
            optimizer.step()
        optimizers.append(optimizer)
    assert len(optimizers[0].curvature) == 7
    assert_same_curvature(optimizers[1], optimizers[0], 1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("no_donated_buffers")
@pytest.mark.parametrize("method", METHODS[::4], ids=lambda m: m.name)
def test_inductor(method: Method) -> None:
    plain, model = network(), network()
    expected, optimizer = method(plain), method(model)
    model.compile()
    train_on(plain, expected, range(14))
    train_on(model, optimizer, range(14))
    assert_same_curvature(optimizer, expected, 1e-10)


def test_model_called_before_the_optimizer_was_constructed() -> None:
    model = network()
    call = torch.compile(model, backend="eager")
    call(torch.zeros(24, 6)).sum().backward()
    model.zero_grad()
    optimizer = EKFAC(call)
    with pytest.raises(CaptureError, match=r"call torch\._dynamo\.reset\(\)"):
        train_on(call, optimizer, range(1))
    torch._dynamo.reset()
    train_on(call, optimizer, range(2))
    plain = network()
    expected = EKFAC(plain)
    train_on(plain, expected, range(2))
    assert_same_curvature(optimizer, expected, 1e-10)


def test_compiled_part_called_before_the_optimizer_was_constructed() -> None:
    """Then the part's layers are named."""
    model = network()
    model[3] = torch.compile(model[3], backend="eager")
    model[0] = torch.compile(model[0], backend="eager")
    model(torch.zeros(24, 6))
    optimizer = EKFAC(model)
    assert list(optimizer.curvature) == ["0", "1", "3", "5"]
    with pytest.warns(EkfacWarning, match=r"_dynamo\.reset\(\)\.\n  0, 3 \(torch.nn.L"):
        train_on(model, optimizer, range(1))
    torch._dynamo.reset()
    train_on(model, optimizer, range(1, 3))
    assert all(layer.ready for layer in optimizer.curvature.values())


def test_whole_graphs_are_refused() -> None:
    """Without graph breaks nothing could be recorded; torch says where it broke."""
    model = network()
    EKFAC(model)
    kept = EKFAC(model)
    call = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Hook\.__call__"):
        train_on(call, kept, range(1))


class Mixing(nn.Module):
    """Results between the layers that only the backward pass needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(torch.tanh(torch.softmax(h, -1) @ h.t() @ h))


def test_donated_buffers() -> None:
    """A graph compiled for one backward cannot be gone through twice."""

    def start(steps: int) -> tuple[nn.Module, KroneckerOptimizer]:
        torch.manual_seed(0)
        model = Mixing()
        optimizer = EKFAC(model, fisher="mc", factor_interval=20)
        train_on(model, optimizer, range(steps))
        return model, optimizer

    def resumed() -> KroneckerOptimizer:
        torch._dynamo.reset()
        model, optimizer = start(12)  # the statistics are not due before step 20
        call = torch.compile(model, backend="aot_eager")
        train_on(call, optimizer, range(12, 22))
        return optimizer

    with pytest.raises(CaptureError, match=r"config\.donated_buffer = False"):
        resumed()
    with functorch_config.patch(donated_buffer=False):
        optimizer = resumed()
    _, expected = start(22)
    assert_same_curvature(optimizer, expected, 1e-8)


def test_compiled_model_stays_compiled() -> None:
    """Hooks break its graph at the layers; the rest is compiled all the same."""
    counter = torch._dynamo.testing.CompileCounter()
    model = Sequence()
    optimizer = EKFAC(model)
    call = torch.compile(model, backend=counter)
    x = torch.zeros(4, 5, dtype=torch.long)
    for _ in range(3):
        call(x).sum().backward()
        optimizer.step()
    compiled = counter.frame_count
    assert compiled >= 2
    call(x).sum().backward()
    assert counter.frame_count == compiled
