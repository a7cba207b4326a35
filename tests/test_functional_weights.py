"""Weights that modules give to ``linear``, ``grouped_mm`` and ``embedding``."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import collect, parameters, relative_error
from torch import Tensor, nn

from ekfac import EKFAC
from ekfac.errors import EkfacWarning
from ekfac.layers import find_adapter


class Experts(nn.Module):
    """A router and experts, as mixtures have them."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 4, 5))
        self.down = nn.Parameter(torch.randn(experts, 5, 4))
        self.act = nn.Tanh()

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(len(self.up)):
            rows = (chosen == i).nonzero()[:, 0]
            inner = self.act(F.linear(x[rows], self.up[i]))
            y.index_add_(0, rows, F.linear(inner, weight=self.down[i]))
        return y


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        return logits.softmax(-1), logits.argmax(-1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        shares, chosen = self.router(x)
        y: Tensor = self.experts(x, chosen)
        return torch.cat([y.sin(), shares], dim=1)


@pytest.mark.usefixtures("float64")
def test_experts_and_their_router() -> None:
    """An expert's inputs are the rows sent to it; gradients are over all examples."""
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(12, 5)
    weights = torch.randn(12, 8)
    optimizer = collect(
        model,
        lambda: (model(x) * weights).sum(),
        loss_reduction="sum",
        scaling="per_example",
    )
    names = [f"experts.{w}.{i}" for w in ("up", "down") for i in range(3)]
    assert list(optimizer.curvature) == ["router", *names]
    own = parameters(model)
    with torch.no_grad():
        chosen = model.router(x)[1]
    per_example = []
    for n in range(12):
        model.zero_grad()
        (model(x[n : n + 1]) * weights[n]).sum().backward()
        per_example.append({k: p.grad.clone() for k, p in model.named_parameters()})
    router = optimizer.curvature["router"]
    gradient = torch.stack([g["router.weight"] for g in per_example])[:, None]
    assert router.Q_G is not None
    assert router.Q_A is not None
    rotated = router.Q_G.mT @ gradient @ router.Q_A
    assert relative_error(router.s, rotated.square().mean(0)) < 1e-10
    for i in range(3):
        rows = x[chosen == i]
        inner = (rows @ own["experts.up"][i].T).tanh()
        for name, inputs in (("up", rows), ("down", inner)):
            layer = optimizer.curvature[f"experts.{name}.{i}"]
            assert relative_error(layer.A[0], inputs.T @ inputs / len(rows)) < 1e-12
            # One row an example: its gradient is g a^T.
            G = torch.zeros_like(layer.G[0])
            mine = (chosen == i).nonzero()[:, 0].tolist()
            for n, a in zip(mine, inputs, strict=True):
                g = per_example[n][f"experts.{name}"][i] @ a / (a @ a)
                G += torch.outer(g, g) / 12
            assert relative_error(layer.G[0], G) < 1e-12


def mixtral(implementation: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a small Mixtral."""
    with pytest.MonkeyPatch.context() as patch:
        if "torchvision" not in sys.modules:
            patch.setitem(sys.modules, "torchvision", None)
        import transformers

        config = transformers.MixtralConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=3,
            max_position_embeddings=16,
        )
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(config)
    model.config._experts_implementation = implementation
    torch.manual_seed(1)
    ids = torch.randint(16, (5, 7))
    return model, {"input_ids": ids, "labels": ids}


def test_mixtral_is_covered_whichever_way_it_calls_its_experts() -> None:
    found = []
    for implementation in ("eager", "grouped_mm"):
        model, batch = mixtral(implementation)
        with warnings.catch_warnings():
            warnings.simplefilter("error", EkfacWarning)
            optimizer = EKFAC(model, lr=0.0)
            model(**batch).loss.backward()
            optimizer.step()
        assert all(row.method != "AdamW-like" for row in optimizer.describe().rows)
        assert all(layer.ready for layer in optimizer.curvature.values())
        found.append(optimizer.curvature)
    for name, layer in found[0].items():
        assert relative_error(layer.A, found[1][name].A) < 1e-4, name
        assert relative_error(layer.G, found[1][name].G) < 1e-4, name


class Positions(nn.Embedding):
    """An embedding that finds its indices itself, as Bart's, OPT's and Whisper's."""

    def __init__(self, way: str) -> None:
        super().__init__(7, 3)
        self.way = way

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1]) + 2
        if self.way == "embedding":
            return super().forward(places.expand(ids.shape))
        return self.weight[places] if self.way == "rows" else self.weight[2:6]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("way", ["embedding", "rows", "slice"])
def test_positions_are_an_embedding_of_their_numbers(way: str) -> None:
    class Model(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.own = own
            self.places = Positions(way) if own else nn.Embedding(7, 3)
            self.words = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            numbers = torch.arange(4) + 2
            if way == "embedding":
                numbers = numbers.expand(ids.shape)
            places = self.places(ids if self.own else numbers)
            return (self.words(ids) + places).sin().flatten(1)

    ids, weights = torch.randint(5, (6, 4)), torch.randn(6, 12)
    found = []
    for own in (True, False):
        model = Model(own)
        found.append(
            collect(
                model,
                lambda model=model: (model(ids) * weights).sum(),
                loss_reduction="sum",
                scaling="per_example",
            ).curvature
        )
    for name, layer in found[1].items():
        for key in ("A", "G", "s"):
            expected = getattr(layer, key)
            assert relative_error(getattr(found[0][name], key), expected) < 1e-12


class Odd(nn.Module):
    """A module that names ``linear`` and its weight, and uses another matrix."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.way = way

    def forward(self, x: Tensor) -> tuple[Tensor]:
        weight = self.weight
        if self.way == "detached":
            weight = weight.detach() + 0 * weight
        elif self.way == "normalised":
            weight = F.normalize(weight)
        elif self.way == "transposed":
            weight = weight.t()
        else:
            weight = weight[:2]
        return (F.linear(x, weight),)


@pytest.mark.parametrize("way", ["detached", "normalised", "transposed", "part"])
def test_other_matrices_are_not_taken_for_the_weight(way: str) -> None:
    layer = Odd(way)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd = nn.Linear(4, 4), layer

        def forward(self, x: Tensor) -> Tensor:
            return self.odd(self.first(x))[0].sin()  # type: ignore[no-any-return]

    model = Model()
    optimizer = EKFAC(model, lr=0.1)
    before = layer.weight.detach().clone()
    model(torch.randn(6, 4)).square().sum().backward()
    with pytest.warns(EkfacWarning, match=r"\['odd'\] have gradients but no statist"):
        optimizer.step()
    assert not optimizer.curvature["odd"].ready
    assert not torch.equal(layer.weight, before) or way == "detached"


def test_modules_without_such_code_fall_back_at_once() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.exp()

    assert find_adapter(Other()) is None


def test_experts_that_no_row_was_sent_to_wait_without_a_warning() -> None:
    torch.manual_seed(0)
    model, x = Mixture(), torch.randn(30, 5)
    chosen = model.router(x)[1]
    optimizer = EKFAC(model, lr=0.1, weight_decay=0.0, factor_interval=1)
    before = parameters(model)["experts.up"]
    parts = [x[chosen == 0], x]
    for part, ready in zip(parts, ([True, False, False], [True] * 3), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("error", EkfacWarning)
            optimizer.zero_grad()
            model(part).square().sum().backward()
            optimizer.step()
        layers = [optimizer.curvature[f"experts.up.{i}"] for i in range(3)]
        assert [layer.ready for layer in layers] == ready
        moved = [not torch.equal(model.experts.up[i], before[i]) for i in range(3)]
        assert moved == ready
