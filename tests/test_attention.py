"""``nn.MultiheadAttention`` against attention made of linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definitions import (
    Call,
    by_definition,
    doubles,
    observe,
    weighed,
)
from support import collect, relative_error
from torch import Tensor, nn

from ekfac.testing import check_adapter


class PlainAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, with a linear layer per projection."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        weights: list[Tensor | None] = [attention.in_proj_weight]
        if attention.in_proj_weight is None:
            letters = "qkv"
            weights = [getattr(attention, f"{c}_proj_weight") for c in letters]
        else:
            weights = list(attention.in_proj_weight.chunk(3))
        biases: list[Tensor | None] = [None] * 3
        if attention.in_proj_bias is not None:
            biases = list(attention.in_proj_bias.chunk(3))
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            linear_of(w, b)
            for w, b in zip(
                [*weights, attention.out_proj.weight],
                [*biases, attention.out_proj.bias],
                strict=True,
            )
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return ``[N, L, E]`` of ``[N, L, E]``; ``mask`` ``[N, S]`` hides keys."""
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], -torch.inf)
        y = scores.softmax(-1) @ v
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class Attention(nn.Module):
    """Attention in a layout of ``"NLE"``, ``"LNE"``, ``"LE"``, over ``[N, L, E]``."""

    def __init__(self, layout: str, weights: bool, **options: Any) -> None:
        super().__init__()
        first = layout == "NLE"
        self.attention = nn.MultiheadAttention(4, 2, batch_first=first, **options)
        self.layout, self.weights = layout, weights
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def laid(self, x: Tensor) -> Tensor:
        if self.layout == "LE":
            return x[0] if x.dim() == 3 else x.unsqueeze(0)
        return x if self.layout == "NLE" else x.transpose(0, 1)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        laid = {id(x): self.laid(x) for x in (query, key, value)}
        inputs = [laid[id(x)] for x in (query, key, value)]  # the same stay the same
        if mask is not None and self.layout == "LE":
            mask = mask[0]
        y, _ = self.attention(*inputs, key_padding_mask=mask, need_weights=self.weights)
        return self.laid(y)


ATTENTION: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 3, "vdim": 5},
    "separate, no bias": {"kdim": 3, "bias": False},
}


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("layout", ["NLE", "LNE", "LE"])
@pytest.mark.parametrize(
    ("across", "options"),
    [
        pytest.param(across, options, id=f"{across}, {name}")
        for name, options in ATTENTION.items()
        for across in ("self", "cross", "memory", "masked")
        if not (across == "self" and "kdim" in options)
    ],
)
def test_attention(
    across: str, options: dict[str, Any], layout: str, weights: bool, sharing: str
) -> None:
    model = Attention(layout, weights, **options).double()
    attention = model.attention
    N = 1 if layout == "LE" else 3
    query = doubles(N, 4, 4)
    key = value = query
    if across != "self":
        key, value = doubles(N, 5, attention.kdim), doubles(N, 5, attention.vdim)
    if across == "memory" and attention.kdim == attention.vdim:
        value = key
    inputs = [query, key, value]
    if across == "masked":
        inputs.append(torch.arange(5) >= torch.tensor([[2], [5], [4]])[:N])

    plain = PlainAttention(attention)
    torch.testing.assert_close(model(*inputs), plain(*inputs))
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    modules = [getattr(plain, name) for name in names]
    calls = observe(plain, modules, weighed(plain, *inputs))
    optimizer = collect(
        model, weighed(model, *inputs), loss_reduction="sum", sharing=sharing
    )
    assert list(optimizer.curvature) == [f"attention.{name}" for name in names]
    for name, module, ((args, grad),) in zip(names, modules, calls, strict=True):
        found = optimizer.curvature[f"attention.{name}"]
        index = linear_index(module)
        A, G = by_definition([Call(module, args, grad)], index, sharing=sharing)
        assert relative_error(found.A, A) < 1e-10, name
        if name == "k_proj" and sharing == "reduce":
            # A shift of all keys changes nothing: their gradients sum to zero.
            assert max(found.G.abs().max(), G.abs().max()) < 1e-28
        else:
            assert relative_error(found.G, G) < 1e-10, name


def linear_index(module: nn.Linear) -> Tensor:
    """Return :func:`index_of` for a linear layer."""
    index = torch.arange(module.weight.numel()).reshape(module.weight.shape)
    if module.bias is not None:
        biases = torch.arange(module.weight.numel(), index.numel() + len(module.bias))
        index = torch.cat([index, biases.unsqueeze(1)], dim=1)
    return index.unsqueeze(0)


@pytest.mark.parametrize("layout", ["NLE", "LNE", "LE"])
@pytest.mark.parametrize("options", ATTENTION.values(), ids=ATTENTION)
def test_check_adapter_of_attention(options: dict[str, Any], layout: str) -> None:
    model = Attention(layout, False, **options)
    sizes = (4, model.attention.kdim, model.attention.vdim)
    inputs = [torch.randn(3, 4 + (i > 0), size) for i, size in enumerate(sizes)]
    assert check_adapter(model.attention, *map(model.laid, inputs))
