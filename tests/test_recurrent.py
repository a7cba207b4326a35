"""``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and cells, which are one function each."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support import collect, parameters, relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from ekfac import EKFAC, KFAC, LayerCurvature
from ekfac.errors import EkfacWarning
from ekfac.layers import find_adapter
from ekfac.layers.recurrent import unroll
from ekfac.testing import check_adapter

pytestmark = pytest.mark.usefixtures("float64")

LAYERS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "LSTM, two layers, both directions": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True},
    ),
    "LSTM, projected, both directions": (
        nn.LSTM,
        {"proj_size": 2, "num_layers": 2, "bidirectional": True},
    ),
    "LSTM, no bias": (nn.LSTM, {"bias": False}),
    "GRU": (nn.GRU, {}),
    "GRU, two layers, both directions": (
        nn.GRU,
        {"num_layers": 2, "bidirectional": True},
    ),
    "GRU, no bias": (nn.GRU, {"bias": False}),
    "RNN": (nn.RNN, {"num_layers": 2}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


class Net(nn.Module):
    """A recurrent layer on sequences of any lengths, and a head on all positions."""

    def __init__(self, name: str, first: bool = True, **more: Any) -> None:
        super().__init__()
        kind, options = LAYERS[name]
        torch.manual_seed(0)
        self.layer = kind(3, 4, batch_first=first, **options, **more)

    def forward(self, x: Any, *state: Any) -> Tensor:
        output, last = self.layer(x, *state)
        if not isinstance(output, Tensor):
            output = pad_packed_sequence(output, batch_first=True)[0]
        output = output if self.layer.batch_first else output.transpose(0, 1)
        ends = last if isinstance(last, tuple) else (last,)
        ends = tuple(end.transpose(0, 1).flatten(1) for end in ends)
        return torch.cat([output.flatten(1), *ends], dim=1).sin()


def lengths_of(x: Any) -> list[int]:
    """Return how many positions each example has."""
    return [len(one) for one in x]


def scalings(net: nn.Module, layer: LayerCurvature, gradients: list[Any]) -> Tensor:
    """Return ``E[(Q_G^T dW Q_A)^2]`` of gradients of single examples."""
    packed = torch.stack([layer.pack(g) for g in gradients])
    assert layer.Q_G is not None
    assert layer.Q_A is not None
    return (layer.Q_G.mT @ packed @ layer.Q_A).square().mean(0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_they_agree_with_autograd(name: str, first: bool) -> None:
    layer = Net(name, first).layer
    assert check_adapter(layer, torch.randn(5, 2, 3))
    assert check_adapter(layer, torch.randn(5, 3))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_agree_with_autograd(kind: type[nn.Module], bias: bool) -> None:
    assert check_adapter(kind(3, 4, bias=bias), torch.randn(5, 3))
    if kind is nn.RNNCell:
        assert check_adapter(kind(3, 4, nonlinearity="relu"), torch.randn(5, 3))


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_scalings_are_those_of_the_examples_gradients(
    name: str, first: bool, fisher: str
) -> None:
    """The gradients are those of torch's own function, one example at a time."""
    net, x = Net(name, first), torch.randn(5, 4, 3)
    weights = torch.randn(net(x if first else x.transpose(0, 1)).shape)
    optimizer = collect(
        net,
        lambda: (net(x if first else x.transpose(0, 1)) * weights).sum(),
        loss_reduction="sum",
        scaling="per_example",
        **({"fisher": "mc", "likelihood": "gaussian"} if fisher == "mc" else {}),
    )
    assert len(optimizer.curvature) == sum("weight" in n for n in parameters(net))
    assert not [r for r in optimizer.describe().rows if r.method == "AdamW-like"]
    if fisher == "mc":
        assert all(layer.ready for layer in optimizer.curvature.values())
        return
    gradients = []
    for n in range(len(x)):
        one = x[n : n + 1]
        net.zero_grad()
        (net(one if first else one.transpose(0, 1)) * weights[n]).sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters()})
    for layer in optimizer.curvature.values():
        expected = scalings(net, layer, gradients)
        assert relative_error(layer.s, expected) < 1e-10, layer.name


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences(name: str, ordered: bool) -> None:
    """Each example has the positions that it has, in the order of the batch."""
    net = Net(name)
    sizes = [5, 4, 2, 2] if ordered else [2, 5, 2, 4]
    sequences = [torch.randn(size, 3) for size in sizes]
    packed = pack_sequence(sequences, enforce_sorted=ordered)
    weights = torch.randn(net(packed).shape)
    counted = torch.zeros_like(weights)
    width = net.layer(sequences[0])[0].shape[-1]
    for row, size in zip(counted, sizes, strict=True):
        row[: size * width] = 1
        row[max(sizes) * width :] = 1
    weights *= counted
    optimizer = collect(
        net,
        lambda: (net(packed) * weights).sum(),
        loss_reduction="sum",
        scaling="per_example",
    )
    gradients = []
    for n, sequence in enumerate(sequences):
        net.zero_grad()
        output = net(sequence[None])
        (output * weights[n][counted[n] > 0]).sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters()})
    for layer in optimizer.curvature.values():
        expected = scalings(net, layer, gradients)
        assert relative_error(layer.s, expected) < 1e-10, layer.name
    rows = torch.cat(sequences)
    if net.layer.bias:
        rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    first = optimizer.curvature["layer.weight_ih_l0"]
    expected = (rows.T @ rows / len(rows)).expand_as(first.A)
    assert relative_error(first.A, expected) < 1e-12


def test_factors_of_a_gru_by_its_equations() -> None:
    """Inputs and pre-activations' gradients of both weights."""
    net, x = Net("GRU"), torch.randn(5, 4, 3)
    weights = torch.randn(net(x).shape)
    optimizer = collect(net, lambda: (net(x) * weights).sum(), loss_reduction="sum")
    own = parameters(net.layer)
    h, hidden, seen = torch.zeros(5, 4), [], []
    outputs = []
    for t in range(4):
        here = (x[:, t] @ own["weight_ih_l0"].T + own["bias_ih_l0"]).requires_grad_()
        hidden.append(h.detach())
        there = h @ own["weight_hh_l0"].T + own["bias_hh_l0"]
        there = there if there.requires_grad else there.requires_grad_()
        r, z, n = here.chunk(3, 1)
        r2, z2, n2 = there.chunk(3, 1)
        z, n = (z + z2).sigmoid(), (n + (r + r2).sigmoid() * n2).tanh()
        h = (1 - z) * n + z * h
        seen.append((here, there))
        outputs.append(h)
    total = torch.cat([torch.stack(outputs, 1).flatten(1), h], dim=1).sin()
    flat = [tensor for pair in seen for tensor in pair]
    grads = torch.autograd.grad((total * weights).sum(), flat)
    ones = torch.ones(5, 1)
    for side, inputs in enumerate((list(x.unbind(1)), hidden)):
        layer = optimizer.curvature[f"layer.weight_{'ih' if side == 0 else 'hh'}_l0"]
        rows = torch.cat([torch.cat([a, ones], 1) for a in inputs])
        assert relative_error(layer.A[0], rows.T @ rows / len(rows)) < 1e-12
        g = torch.cat(grads[side::2])
        assert relative_error(layer.G[0], g.T @ g / 5) < 1e-12
        assert layer.block.shape == (1, 12, 4 if side == 0 else 5)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(kind: type[nn.Module]) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            state = None
            for t in range(x.shape[1]):
                state = self.cell(x[:, t], state)
            return (state[0] if isinstance(state, tuple) else state).sin()

    torch.manual_seed(0)
    net, x, weights = Loop(), torch.randn(5, 4, 3), torch.randn(5, 4)
    optimizer = collect(
        net,
        lambda: (net(x) * weights).sum(),
        loss_reduction="sum",
        scaling="per_example",
    )
    gradients = []
    for n in range(5):
        net.zero_grad()
        (net(x[n : n + 1]) * weights[n]).sum().backward()
        gradients.append({k: p.grad.clone() for k, p in net.named_parameters()})
    assert len(optimizer.curvature) == 2
    for layer in optimizer.curvature.values():
        assert relative_error(layer.s, scalings(net, layer, gradients)) < 1e-10


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_computed_does_not_change(name: str) -> None:
    """Outputs, states, gradients and dropout's masks, with given states too."""
    kwargs = {"dropout": 0.5} if LAYERS[name][1].get("num_layers") else {}
    net, x = Net(name, **kwargs), torch.randn(5, 4, 3)
    twin = copy.deepcopy(net)
    optimizer = EKFAC(net, factor_interval=1)
    layer: nn.RNNBase = net.layer
    count = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(count, 5, layer.proj_size or 4)
    state: Any = (h, torch.randn(count, 5, 4)) if layer.mode == "LSTM" else h
    results = []
    for model in (net, twin):
        torch.manual_seed(3)
        output = model(x, state)
        output.sum().backward()
        results.append((output, torch.rand(1), [p.grad for p in model.parameters()]))
    (a, rng, grads), (b, twin_rng, twin_grads) = results
    assert relative_error(a, b) < 1e-14
    assert torch.equal(rng, twin_rng)
    for g, h in zip(grads, twin_grads, strict=True):
        assert relative_error(g, h) < 1e-13
    optimizer.step()


@pytest.mark.parametrize("name", ["LSTM, two layers, both directions", "GRU", "RNN"])
def test_types_under_autocast_are_those_without_statistics(name: str) -> None:
    net = Net(name).float()
    twin, x = copy.deepcopy(net), torch.randn(5, 4, 3, dtype=torch.float32)
    optimizer = EKFAC(net, factor_interval=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (a, ends), (b, twin_ends) = net.layer(x), twin.layer(x)
        net(x).sum().backward()
    assert a.dtype == b.dtype
    assert relative_error(a.double(), b.double()) < 0.02
    pairs = zip(
        ends if isinstance(ends, tuple) else [ends],
        twin_ends if isinstance(twin_ends, tuple) else [twin_ends],
        strict=True,
    )
    assert all(mine.dtype == other.dtype for mine, other in pairs)
    optimizer.step()
    assert all(layer.ready for layer in optimizer.curvature.values())


def test_only_passes_that_take_statistics_are_unrolled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ekfac.layers import recurrent

    calls: list[int] = []
    step = recurrent.STEPS["LSTM"]
    monkeypatch.setitem(
        recurrent.STEPS, "LSTM", lambda *args: calls.append(1) or step(*args)
    )
    net, x = Net("LSTM"), torch.randn(5, 4, 3)
    optimizer = EKFAC(net, lr=1e-3, factor_interval=3)
    counts = []
    for _ in range(16):
        calls.clear()
        net(x).square().sum().backward()
        counts.append(len(calls))
        calls.clear()
        with torch.no_grad():
            net(x)
        net.eval()(x)
        net.train()
        assert not calls
        optimizer.step()
        optimizer.zero_grad()
    # Step 1, then one in three.
    assert counts == [4, 0, 4] + [0, 0, 4] * 4 + [0]


def test_checkpointed_layers() -> None:
    net, x = Net("LSTM, two layers, both directions"), torch.randn(5, 4, 3)
    weights = torch.randn(net(x).shape)

    class Saved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)  # type: ignore[no-any-return]

    saved = Saved()
    found = [
        collect(model, lambda model=model: (model(x) * weights).sum()).curvature
        for model in (net, saved)
    ]
    for name, layer in found[0].items():
        assert relative_error(found[1][f"net.{name}"].G, layer.G) < 1e-12
        assert relative_error(found[1][f"net.{name}"].A, layer.A) < 1e-12


def test_frozen_weights() -> None:
    """Each weight has its statistics whatever else is frozen."""
    net, x = Net("LSTM"), torch.randn(5, 4, 3)
    net.layer.weight_ih_l0.requires_grad_(False)
    net.layer.bias_ih_l0.requires_grad_(False)
    weights = torch.randn(net(x).shape)
    found = collect(net, lambda: (net(x) * weights).sum(), loss_reduction="sum")
    whole = Net("LSTM")
    expected = collect(whole, lambda: (whole(x) * weights).sum(), loss_reduction="sum")
    assert list(found.curvature) == ["layer.weight_hh_l0"]
    name = "layer.weight_hh_l0"
    assert relative_error(found.curvature[name].G, expected.curvature[name].G) < 1e-12


def test_computed_weights_are_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert "parametrization" in str(find_adapter(layer))
    with pytest.warns(EkfacWarning, match="parametrization"):
        EKFAC(nn.Sequential(nn.Linear(3, 3), layer))


def test_layers_on_a_gpu_ask_first() -> None:
    """By the parameters' device alone, which a fake device stands for here."""

    class OnGpu(nn.Parameter):
        is_cuda = True

    layer = nn.LSTM(3, 4)
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, OnGpu(parameter.detach()))
    assert "cuDNN runs it; ekfac.layers.recurrent.unroll(model)" in str(
        find_adapter(layer)
    )
    unroll(nn.Sequential(layer))
    assert not isinstance(find_adapter(layer), str)


@pytest.mark.parametrize("kind", [EKFAC, KFAC])
def test_a_language_model_learns(kind: type[EKFAC | KFAC]) -> None:
    """A sequence that repeats is learnt, and more so than by the first steps' SGD."""
    torch.manual_seed(0)

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 8), nn.Linear(8, 6)
            self.layer = nn.LSTM(8, 8, num_layers=2, dropout=0.1, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(ids))[0]).flatten(0, 1)  # type: ignore[no-any-return]

    model = Language()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkfacWarning)
        optimizer = kind(model, lr=3e-2)
    ids = (torch.arange(12) + torch.arange(6)[:, None]) % 6
    loss = torch.zeros(())
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids[:, :-1]), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_functional_calls_are_not_disturbed() -> None:
    net, x = Net("LSTM"), torch.randn(5, 4, 3)
    expected = net(x)
    EKFAC(net)
    result = functional_call(net, parameters(net), (x,))
    assert relative_error(result, expected) < 1e-14
