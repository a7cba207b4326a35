"""Layers that are called several times and weights of several layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import pytest
import torch
from definitions import (
    Call,
    Stack,
    by_definition,
    doubles,
    index_of,
    observe,
    weighed,
)
from support import collect, relative_error
from torch import Tensor, nn

from ekfac import EKFAC, LayerCurvature
from ekfac.errors import EkfacWarning

Uses = Sequence[tuple[nn.Module, Literal["straight", "transposed"]]]


def check_shared(
    model: nn.Module,
    layer: str,
    uses: Uses,
    *inputs: Tensor,
    sharing: str = "expand",
    ignored: int | None = None,
) -> LayerCurvature:
    """Check the factors of one weight that several modules use, or several calls."""
    loss = weighed(model, *inputs)
    seen = observe(model, [module for module, _ in uses], loss)
    found = collect(model, loss, loss_reduction="sum", sharing=sharing).curvature[layer]
    index, terms = index_of(found), []
    for turn in ("straight", "transposed"):
        calls = [
            Call(module, *call)
            for (module, way), own in zip(uses, seen, strict=True)
            for call in own
            if way == turn
        ]
        if calls and turn == "straight":
            terms.append(
                by_definition(
                    calls,
                    index,
                    sharing=sharing,
                    exact=found.block.exact,
                    ignored=ignored,
                )
            )
        elif calls:  # the weight's inputs are this module's gradients
            terms.append(by_definition(calls, index.transpose(1, 2))[::-1])
    A, G = product_of_traces(terms) if len(terms) > 1 else terms[0]
    assert found.A is not None
    if found.A.dim() == 2:
        A = A.diagonal(dim1=-2, dim2=-1)
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10
    return found


def product_of_traces(terms: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return ``A``, ``G`` of which ``A (x) G`` has the partial traces of a sum."""
    F = sum(torch.einsum("ij,kl->ikjl", A[0], G[0]) for A, G in terms)
    total = torch.einsum("ikik->", F)
    inner, outer = torch.einsum("ikjk->ij", F), torch.einsum("ikil->kl", F)
    return inner.unsqueeze(0) / total, outer.unsqueeze(0)


class LSTM(nn.Module):
    """An LSTM cell made of linear layers, unrolled over ``[N, T, d]``."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(size, 4 * hidden)
        self.from_state = nn.Linear(hidden, 4 * hidden, bias=False)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden)
        for step in x.unbind(1):
            gates = self.from_input(step) + self.from_state(h)
            i, f, g, o = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


class GRU(nn.Module):
    """A GRU cell made of linear layers, unrolled over ``[N, T, d]``."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.from_input = nn.Linear(size, 3 * hidden)
        self.from_state = nn.Linear(hidden, 3 * hidden)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.hidden)
        states = []
        for step in x.unbind(1):
            r, z, n = self.from_input(step).chunk(3, dim=-1)
            r_h, z_h, n_h = self.from_state(h).chunk(3, dim=-1)
            z = (z + z_h).sigmoid()
            h = (1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * h
            states.append(h)
        return torch.stack(states, dim=1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [LSTM, GRU])
@pytest.mark.parametrize("layer", ["from_input", "from_state"])
def test_recurrent_cells(kind: type[nn.Module], layer: str, sharing: str) -> None:
    model = kind(3, 2).double()
    module = getattr(model, layer)
    check_shared(
        model, layer, [(module, "straight")], doubles(4, 5, 3), sharing=sharing
    )


class Twice(nn.Module):
    """Calls one module on a sequence and again, pooled, as a matrix."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x).sin().mean(1)).sin()
        return y


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_module_called_several_times(kind: type[nn.Module], sharing: str) -> None:
    layer = (nn.Linear(3, 3) if kind is nn.Linear else nn.LayerNorm(3)).double()
    uses: Uses = [(layer, "straight")]
    check_shared(Twice(layer), "layer", uses, doubles(4, 5, 3), sharing=sharing)
    model = Stack(layer, layer, nn.Linear(3, 2).double())
    check_shared(model, "0", uses, doubles(4, 3), sharing=sharing)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", ["none", "own", "shared"])
def test_tied_linear_layers(bias: str, sharing: str) -> None:
    first = nn.Linear(3, 3, bias=bias != "none").double()
    second = nn.Linear(3, 3, bias=bias != "none").double()
    second.weight = first.weight
    if bias == "shared":
        second.bias = first.bias
    model = Stack(first, nn.Linear(3, 3).double(), second)
    uses: Uses = [(first, "straight"), (second, "straight")]
    found = check_shared(model, "0", uses, doubles(4, 5, 3), sharing=sharing)
    names = {"none": ("0.weight",), "own": ("0.weight",)}
    assert found.parameter_names == names.get(bias, ("0.weight", "0.bias"))


def test_tied_convolutions() -> None:
    first = nn.Conv1d(3, 3, 2, bias=False).double()
    second = nn.Conv1d(3, 3, 2, bias=False, stride=2).double()
    second.weight = first.weight
    model = Stack(first, second)
    loss = weighed(model, doubles(4, 3, 6))
    calls = observe(model, [first, second], loss)
    found = collect(model, loss, loss_reduction="sum").curvature["0"]
    A, G = by_definition(
        [Call(m, *call, 0) for m, (call,) in zip(model, calls, strict=True)],
        index_of(found),
    )
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10


class Tied(nn.Module):
    """A language model whose output head has the embedding's weight."""

    def __init__(self, bias: bool, head_first: bool, padding: int | None) -> None:
        super().__init__()
        embedding = nn.Embedding(6, 3, padding_idx=padding)
        head = nn.Linear(3, 6, bias=bias)
        head.weight = embedding.weight
        parts = {"embedding": embedding, "body": nn.Linear(3, 3), "head": head}
        for name in reversed(parts) if head_first else parts:
            setattr(self, name, parts[name])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.embedding(x).sin()).sin())
        return y


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("padding", [None, 2], ids=["", "padding_idx"])
@pytest.mark.parametrize("head_first", [True, False], ids=["head first", "head last"])
def test_an_embedding_tied_to_its_head(
    bias: bool, padding: int | None, head_first: bool, sharing: str
) -> None:
    model = Tied(bias, head_first, padding).double()
    uses: Uses = [(model.embedding, "straight"), (model.head, "transposed")]
    x = torch.randint(6, (4, 5))
    name = "head" if head_first else "embedding"
    found = check_shared(model, name, uses, x, sharing=sharing, ignored=padding)
    assert found.parameter_names == (f"{name}.weight",)
    assert found.block.shape == (1, 3, 6)
    with pytest.warns(EkfacWarning) if bias else nullcontext():
        rows = EKFAC(model).describe().rows
    reasons = {row.layer: row.reason for row in rows}
    assert "shared weight" in reasons[name]
    reason = "torch.nn.Linear: layers with other biases share its weight; there is"
    assert ("head.bias" in reasons) == bias
    assert reasons.get("head.bias", reason).startswith(reason)


def test_a_convolution_tied_to_its_transpose() -> None:
    def tied(kernel: int) -> Stack:
        down = nn.Conv1d(2, 3, kernel, bias=False)
        up = nn.ConvTranspose1d(3, 2, kernel, bias=False)
        up.weight = down.weight
        return Stack(down, up).double()

    model = tied(1)
    loss = weighed(model, doubles(4, 2, 5))
    (down,), (up,) = observe(model, list(model), loss)
    found = collect(model, loss, loss_reduction="sum").curvature["0"]
    index = index_of(found)
    straight = by_definition([Call(model[0], *down, 0)], index)
    turned = by_definition([Call(model[1], *up, 0)], index.transpose(1, 2))
    A, G = product_of_traces([straight, turned[::-1]])
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10
    with pytest.raises(ValueError, match=r"'0' and '1' share a weight.*untie"):
        EKFAC(tied(2))
