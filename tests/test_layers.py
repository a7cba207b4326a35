"""Every kind of layer: its adapter against autograd, its factors by definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from definitions import (
    Between,
    Call,
    by_definition,
    check_factors,
    doubles,
    index_of,
    observe,
    weighed,
)
from support import collect, relative_error
from torch import Tensor, nn

from ekfac import EKFAC
from ekfac.curvature import normal_form
from ekfac.errors import UnsupportedLayerError
from ekfac.testing import check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")

Case = tuple[nn.Module, Tensor, int]

BOTH_WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1, "stride": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
}
FORWARD: dict[str, dict[str, Any]] = {
    "same": {"padding": "same"},
    "same, even": {"padding": "same", "kernel_size": 2},
    "same, dilated": {"padding": "same", "kernel_size": 2, "dilation": (2, 1, 3)},
    "valid": {"padding": "valid"},
    "all": {
        "kernel_size": (3, 2, 1),
        "stride": (2, 1, 2),
        "padding": (2, 1, 0),
        "dilation": (1, 2, 1),
        "groups": 2,
    },
}
for mode in ("reflect", "replicate", "circular"):
    FORWARD[mode] = {"padding": 1, "padding_mode": mode, "stride": 2}
    FORWARD[f"same, {mode}"] = {"padding": "same", "padding_mode": mode}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "output_padding": {"stride": 2, "output_padding": 1, "padding": 1},
    "cropped": {"padding": 3, "kernel_size": 2, "stride": 3},
    "all": {
        "kernel_size": (3, 2, 1),
        "stride": (2, 3, 2),
        "padding": (1, 0, 0),
        "output_padding": (1, 2, 1),
        "dilation": (2, 1, 1),
        "groups": 2,
    },
}


def convolution(kind: type[nn.Module], options: dict[str, Any]) -> Case:
    dims = int(kind.__name__[-2])
    size = [(6,), (5, 3), (3, 4, 3)][dims - 1]
    chosen: dict[str, Any] = {"kernel_size": 2 if dims == 3 else 3, **options}
    for key, value in chosen.items():
        chosen[key] = value[:dims] if isinstance(value, tuple) else value
    return kind(4, 8, **chosen).double(), doubles(3, 4, *size), 0


def linear(*lead: int, bias: bool = True) -> Case:
    return nn.Linear(4, 3, bias=bias).double(), doubles(*lead, 4), 1


def norm(
    kind: type[nn.Module], *args: Any, shape: Sequence[int], **options: Any
) -> Case:
    module = kind(*args, **options).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    trailing = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    return module, doubles(*shape), len(module.normalized_shape) if trailing else 0


def embedding(*shape: int, **options: Any) -> Case:
    return nn.Embedding(7, 3, **options).double(), torch.randint(7, shape), 1


CASES: dict[str, Callable[[], Case]] = {
    "Linear [N]": lambda: linear(5),
    "Linear [N, S]": lambda: linear(5, 3),
    "Linear [N, S, T]": lambda: linear(5, 3, 2),
    "Linear no bias": lambda: linear(5, 3, bias=False),
    "Embedding [N]": lambda: embedding(5),
    "Embedding [N, S]": lambda: embedding(5, 4),
    "Embedding [N, S, T]": lambda: embedding(5, 4, 3),
    "Embedding padding_idx": lambda: embedding(5, 6, padding_idx=2),
    "Embedding padding_idx -1": lambda: embedding(5, 6, padding_idx=-1),
    "LayerNorm": lambda: norm(nn.LayerNorm, 4, shape=(5, 4)),
    "LayerNorm [N, S, d]": lambda: norm(nn.LayerNorm, 4, shape=(5, 3, 4)),
    "LayerNorm [N, S, d, e]": lambda: norm(nn.LayerNorm, (4, 2), shape=(5, 3, 4, 2)),
    "LayerNorm no bias": lambda: norm(nn.LayerNorm, 4, bias=False, shape=(5, 3, 4)),
    "RMSNorm": lambda: norm(nn.RMSNorm, 4, shape=(5, 3, 4)),
    "RMSNorm [N, d, e]": lambda: norm(nn.RMSNorm, (4, 2), eps=0.1, shape=(5, 4, 2)),
    "GroupNorm": lambda: norm(nn.GroupNorm, 2, 4, shape=(5, 4)),
    "GroupNorm [N, C, L]": lambda: norm(nn.GroupNorm, 2, 4, shape=(5, 4, 3)),
    "GroupNorm [N, C, H, W]": lambda: norm(nn.GroupNorm, 1, 4, shape=(5, 4, 3, 2)),
    "BatchNorm1d": lambda: norm(nn.BatchNorm1d, 4, shape=(5, 4)),
    "BatchNorm1d [N, C, L]": lambda: norm(nn.BatchNorm1d, 4, shape=(5, 4, 3)),
    "BatchNorm2d": lambda: norm(nn.BatchNorm2d, 4, shape=(5, 4, 3, 2)),
    "BatchNorm3d": lambda: norm(nn.BatchNorm3d, 4, shape=(5, 4, 3, 2, 2)),
    "BatchNorm2d untracked": lambda: norm(
        nn.BatchNorm2d, 4, track_running_stats=False, shape=(5, 4, 3, 2)
    ),
}
for dims, tail in enumerate([(6,), (3, 2), (3, 2, 2)], start=1):
    for kind in (getattr(nn, f"Conv{dims}d"), getattr(nn, f"ConvTranspose{dims}d")):
        own = TRANSPOSED if "Transpose" in kind.__name__ else FORWARD
        for label, options in {**BOTH_WAYS, **own}.items():
            CASES[f"{kind.__name__} {label}"] = partial(convolution, kind, options)
    kind = getattr(nn, f"InstanceNorm{dims}d")
    for tracks in (False, True):
        CASES[f"InstanceNorm{dims}d tracking={tracks}"] = partial(
            norm, kind, 4, affine=True, track_running_stats=tracks, shape=(5, 4, *tail)
        )


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def test_check_adapter(case: Case) -> None:
    module, x, _ = case
    assert check_adapter(module, x)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_alone(case: Case, sharing: str) -> None:
    module, x, features = case
    ignored = getattr(module, "padding_idx", None)
    check_factors(module, "", module, [x], features, sharing=sharing, ignored=ignored)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_in_a_network(case: Case, sharing: str) -> None:
    module, x, features = case
    ignored = getattr(module, "padding_idx", None)
    model = Between(module)
    check_factors(
        model, "layer", module, [x], features, sharing=sharing, ignored=ignored
    )


@pytest.mark.parametrize(
    ("module", "shape", "features"),
    [
        (nn.Linear(4, 3), (4,), 1),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 6), 0),
        (nn.Conv2d(4, 6, (3, 2), padding=1), (4, 5, 3), 0),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 3, 2), 0),
        (nn.Embedding(7, 3), (), 1),
        (nn.LayerNorm(4), (4,), 1),
        (nn.InstanceNorm1d(4, affine=True), (4, 4), 0),
        (nn.InstanceNorm2d(3, affine=True), (3, 3, 5), 0),
        (nn.InstanceNorm3d(2, affine=True), (2, 3, 2, 2), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_calls_without_a_batch(
    module: nn.Module, shape: tuple[int, ...], features: int
) -> None:
    module.double()
    x = doubles(1, *shape)
    if isinstance(module, nn.Embedding):
        x = torch.tensor([3])
    assert check_adapter(module, x[0])
    model = Between(module, batched=False)
    loss = weighed(model, x)
    ((_, grad),) = observe(model, [module], loss)[0]
    found = collect(model, loss, loss_reduction="sum").curvature["layer"]
    inputs = torch.sin(x) if x.is_floating_point() else x
    call = Call(module, (inputs,), grad.unsqueeze(0), features)
    A, G = by_definition([call], index_of(found), exact=found.block.exact)
    found_A = torch.diag_embed(found.A) if found.A.dim() == 2 else found.A
    assert relative_error(found_A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_norms_with_frozen_statistics(kind: type[nn.Module]) -> None:
    module, x, _ = norm(
        kind, 4, affine=True, track_running_stats=True, shape=(5, 4, 3, 2)
    )
    module(x)
    module.eval()
    assert check_adapter(module, x)
    check_factors(Between(module), "layer", module, [x], 0)


@pytest.mark.parametrize("conv_factors", ["patches", "spatially_uncorrelated"])
def test_a_transposed_convolution_is_called_with_a_size(conv_factors: Any) -> None:
    layer = nn.ConvTranspose1d(4, 3, 3, stride=2).double()
    model = Between(layer)
    assert check_adapter(layer, doubles(2, 4, 5), [11])
    x = doubles(2, 4, 5)
    optimizer = EKFAC(model, conv_factors=conv_factors)
    layer(x, [11])
    with pytest.raises(
        UnsupportedLayerError, match=r"\[12\].*give \[11\].*output_padd"
    ):
        layer(x, [12])
    optimizer.close()


def bilinear(*lead: int, bias: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.Bilinear(3, 2, 4, bias=bias).double()
    return layer, doubles(*lead, 3), doubles(*lead, 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (5, 3), (5, 3, 2)])
def test_bilinear_layers(
    lead: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, z = bilinear(*lead, bias=bias)
    assert check_adapter(layer, x, z)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.layer(x.sin(), input2=z).sin()  # type: ignore[no-any-return]

    model = Both()
    loss = weighed(model, x, z)
    found = collect(model, loss, loss_reduction="sum").curvature["layer"]
    ((_, grad),) = observe(model, [layer], loss)[0]
    call = Call(layer, (x.sin(), z), grad, 1)
    A, G = by_definition([call], index_of(found))
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10
    monkeypatch.setattr(normal_form, "CHUNK", 13)
    again = collect(model, loss, loss_reduction="sum").curvature["layer"]
    assert relative_error(again.A, A) < 1e-10


def members(bag: nn.EmbeddingBag, *args: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the members of every bag that count, and their weights in its sum."""
    index, offsets, weights = (*args, None, None)[:3]
    weights = torch.ones(index.shape).double() if weights is None else weights
    if index.dim() == 2:
        pairs = list(zip(index, weights, strict=True))
    else:
        ends = offsets.tolist()
        ends = ends if bag.include_last_offset else [*ends, len(index)]
        pairs = [(index[i:j], weights[i:j]) for i, j in pairwise(ends)]
    kept = []
    for own, weight in pairs:
        keep = own != (-1 if bag.padding_idx is None else bag.padding_idx)
        count = int(keep.sum()) if bag.mode == "mean" else 1
        kept.append((own[keep], weight[keep] / max(1, count)))
    return kept


BAGS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "sum": ({"mode": "sum"}, (torch.tensor([[1, 2, 2], [0, 6, 5]]),)),
    "mean": ({}, (torch.tensor([[1, 2, 2], [0, 6, 5]], dtype=torch.int32),)),
    "offsets": (
        {"mode": "sum"},
        (torch.tensor([1, 2, 2, 4, 6]), torch.tensor([0, 3, 3])),
    ),
    "mean, offsets, padding": (
        {"padding_idx": 2},
        (torch.tensor([1, 2, 4, 2, 6, 3, 2]), torch.tensor([0, 3, 3, 6])),
    ),
    "last offset": (
        {"mode": "sum", "include_last_offset": True},
        (torch.tensor([1, 2, 2, 4, 6]), torch.tensor([0, 1, 5])),
    ),
    "weights": (
        {"mode": "sum"},
        (
            torch.tensor([1, 2, 2, 4, 6]),
            torch.tensor([0, 3]),
            torch.tensor([0.5, -2.0, 3.0, 0.0, 1.5]).double(),
        ),
    ),
    "weights of a matrix": (
        {"mode": "sum", "padding_idx": 0},
        (torch.tensor([[1, 2, 2], [0, 6, 5]]), None, doubles(2, 3)),
    ),
}


@pytest.mark.parametrize("name", BAGS)
def test_embedding_bags(name: str) -> None:
    """Factors are those of members as positions; scalings of the bags' gradients."""
    options, args = BAGS[name]
    bag = nn.EmbeddingBag(7, 3, **options).double()
    assert check_adapter(bag, *args)
    spelled = members(bag, *args)
    h = doubles(len(spelled), 3)

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = bag

        def forward(self) -> Tensor:
            return self.bag(*args).sin()  # type: ignore[no-any-return]

    model = Bags()
    optimizer = collect(
        model,
        lambda: (model() * h).sum(),
        loss_reduction="sum",
        scaling="per_example",
    )
    found = optimizer.curvature["bag"]
    counts, G, count = torch.zeros(7).double(), torch.zeros(3, 3).double(), 0
    gradients = []
    for n, (own, weights) in enumerate(spelled):
        total = (weights[:, None] * bag.weight.detach()[own]).sum(0)
        g = total.cos() * h[n]
        gradient = torch.zeros(3, 7).double()
        for i, w in zip(own.tolist(), weights, strict=True):
            counts[i] += 1
            G += w**2 * torch.outer(g, g)
            gradient[:, i] += w * g
            count += 1
        gradients.append(gradient)
    assert relative_error(found.A[0], counts / count) < 1e-12
    assert relative_error(found.G[0], G / len(spelled)) < 1e-12
    assert found.Q_G is not None
    rotated = found.Q_G[0].T @ torch.stack(gradients)
    assert relative_error(found.s[0], rotated.square().mean(0)) < 1e-12


def test_bags_without_members() -> None:
    bag = nn.EmbeddingBag(7, 3, mode="sum")
    model = nn.Sequential(bag, nn.Linear(3, 2))
    optimizer = EKFAC(model, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        y = model[1](bag(torch.tensor([], dtype=torch.long), torch.tensor([0, 0])))
        y.square().sum().backward()
        optimizer.step()


def test_largest_members_of_bags_are_refused() -> None:
    with pytest.raises(ValueError, match="mode='max'"):
        check_adapter(nn.EmbeddingBag(7, 3, mode="max"), torch.tensor([[1, 2]]))


class Relaid(nn.Module):
    """Calls a layer on ``[S, N, *]`` or ``[N S, *]`` in a model over ``[N, S, *]``."""

    def __init__(self, layer: nn.Module, layout: str) -> None:
        super().__init__()
        self.layer, self.layout = layer, layout

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "sequence first":
            y: Tensor = self.layer(x.transpose(0, 1)).transpose(0, 1)
        else:
            y = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return y.sin()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("Conv1d", "merged"),
        *product(["Linear", "Embedding", "LayerNorm"], ["sequence first", "merged"]),
    ],
)
def test_batches_laid_otherwise(name: str, layout: str, sharing: str) -> None:
    case = {
        "Linear": linear(4, 5),
        "Embedding": embedding(4, 5),
        "LayerNorm": norm(nn.LayerNorm, 4, shape=(4, 5, 4)),
        "Conv1d": (nn.Conv1d(2, 3, 2).double(), doubles(4, 5, 2, 3), 0),
    }
    module, x, features = case[name]
    model = Relaid(module, layout)
    loss = weighed(model, x)
    ((_, grad),) = observe(model, [module], loss)[0]
    if layout == "sequence first":
        calls = [Call(module, (x,), grad.transpose(0, 1), features)]
    else:
        grads = grad.unflatten(0, (4, 5)).unbind(1)
        parts = zip(x.unbind(1), grads, strict=True)
        calls = [Call(module, (part,), g, features) for part, g in parts]
    found = collect(model, loss, loss_reduction="sum", sharing=sharing).curvature[
        "layer"
    ]
    A, G = by_definition(
        calls, index_of(found), sharing=sharing, exact=found.block.exact
    )
    assert found.A is not None
    if found.A.dim() == 2:
        A = A.diagonal(dim1=-2, dim2=-1)
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10
