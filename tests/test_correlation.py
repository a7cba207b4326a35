"""Second moments of patches by offsets, and rotation by a layer's own convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import collect, relative_error
from test_layers import BOTH_WAYS, FORWARD, TRANSPOSED
from torch import Tensor, nn
from torch.nn import functional as F

from ekfac import kernels
from ekfac.kernels import convolution
from ekfac.kernels import input_gram as input_gram_module
from ekfac.kernels.convolution import Convolution, Geometry, PatchGram, frame, plan
from ekfac.layers import find_adapter, find_shortcuts
from ekfac.layers.conv import ConvShortcuts

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
]
SIZES = {1: (9,), 2: (6, 5), 3: (5, 4, 6)}
CASES = [
    (f"Conv{dim}d", options)
    for dim in (1, 2, 3)
    for options in (BOTH_WAYS | FORWARD).values()
    if dim == 3 or not any(isinstance(value, tuple) for value in options.values())
] + [
    (f"ConvTranspose{dim}d", options)
    for dim in (1, 2)
    for options in (BOTH_WAYS | TRANSPOSED).values()
    if not any(isinstance(value, tuple) for value in options.values())
]


def layer_of(kind: str, options: dict[str, Any]) -> tuple[Any, Any, Tensor]:
    """Return a layer, its adapter and an input."""
    layer = getattr(nn, kind)(4, 4, **({"kernel_size": 3} | options))
    adapter = find_adapter(layer)
    assert isinstance(adapter, type)
    return layer, adapter(layer), torch.randn(3, 4, *SIZES[int(kind[-2])])


def input_gram(adapter: Any, x: Tensor) -> Any:
    """Return the second moment of the inputs as the adapter's shortcut takes it."""
    source: Any = find_shortcuts(adapter).input_gram(x)
    return source.gram()


def unfolded(layer: Any, x: Tensor) -> Tensor:
    """Return the patches ``[N, S, groups, d_in]`` by differentiating the layer.

    The gradient of the first output of every group at one position is the patch there.
    """
    y = layer(x)
    n, channels, positions = len(x), layer.out_channels, y[0, 0].numel()
    parameters = list(layer.parameters())
    rows = []
    for row in range(n * positions):
        h = torch.zeros(n, channels, positions)
        h[row // positions, :: channels // layer.groups, row % positions] = 1
        grads = torch.autograd.grad(
            y, parameters, h.reshape(y.shape), retain_graph=True
        )
        rows.append((grads[0], grads[1] if len(grads) > 1 else None))
    return torch.stack([_packed(layer, *row) for row in rows])


def _packed(layer: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the first row of every group's matrix, ``[groups, d_in]``."""
    adapter = find_adapter(layer)
    assert isinstance(adapter, type)
    return adapter(layer).pack(weight, bias)[:, 0]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_offsets_give_the_second_moment(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, adapter, x = layer_of(kind, options)
    monkeypatch.setattr(Geometry, "pays", lambda *args: True)
    found = input_gram(adapter, x)
    a = unfolded(layer, x)
    assert relative_error(found.dense(), torch.einsum("rbi,rbj->bij", a, a)) < 1e-13
    assert found.rows == len(a)
    halves = input_gram(adapter, x[:1]) + input_gram(adapter, x[1:])
    assert relative_error(halves.dense(), found.dense()) < 1e-13


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_rotated_inputs_are_the_patches_in_the_basis(
    kind: str, options: dict[str, Any]
) -> None:
    layer, adapter, x = layer_of(kind, options)
    a = unfolded(layer, x)
    columns = torch.randn(a.shape[1], a.shape[2], 5)
    found = (
        find_shortcuts(adapter)
        .rotated_inputs(x, columns)
        .permute(0, 3, 1, 2)
        .flatten(0, 1)
    )
    assert relative_error(found, torch.einsum("rbi,bij->rbj", a, columns)) < 1e-13


def three_by_three(positions: int) -> Convolution:
    """Return a 3 x 3 convolution with padding 1."""
    return Convolution((3, 3), (1, 1), (1, 1), (1, 1), (positions, positions))


def test_few_offsets_and_little_beside_them() -> None:
    geometry = Geometry((32, 32), three_by_three(32))
    cells = plan(geometry)
    whole = [cell for cell in cells if all(segment.whole for segment in cell)]
    assert len({tuple(segment.shift for segment in cell) for cell in whole}) == 13
    assert len(whole) == 13
    assert frame(geometry).multiplied < 1.06 * 13 * 32**2


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"stride": 2, "padding": 2, "groups": 2},
        {"dilation": 2, "stride": 3, "padding": 3, "bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_images_in_parts_of_unequal_size(
    dim: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, adapter, _ = layer_of(f"Conv{dim}d", options)
    x = torch.randn(5, 4, *SIZES[dim])
    a = unfolded(layer, x)
    expected = torch.einsum("rbi,rbj->bij", a, a)
    monkeypatch.setattr(convolution, "CACHED", 2 * x[0].numel())
    monkeypatch.setattr(input_gram_module, "PATCHES", 3)
    monkeypatch.setattr(Geometry, "pays", lambda *args: True)
    assert relative_error(input_gram(adapter, x).dense(), expected) < 1e-13
    monkeypatch.setattr(Geometry, "pays", lambda *args: False)
    assert relative_error(input_gram(adapter, x), expected) < 1e-13


def test_single_precision_loses_no_more_than_the_product_of_patches() -> None:
    x = torch.randn(32, 32, 12, 12).relu()
    layer = nn.Conv2d(32, 8, 3, padding=1, bias=False)
    adapter = find_adapter(layer)
    assert isinstance(adapter, type)
    found = input_gram(adapter(layer), x.float())
    assert isinstance(found, PatchGram)
    a = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    assert relative_error(found.dense()[0].double(), a.T @ a) < 3e-7


def test_the_cost_model_takes_patches_where_they_are_small() -> None:
    wide = Geometry((8, 8), three_by_three(8))
    assert wide.pays(256, 50)
    assert not wide.pays(1, 50)
    grouped = Geometry((8, 8), replace(wide.conv, groups=64))
    assert grouped.pays(64 * 256, 1)  # as 64 images
    assert not grouped.pays(64, 1)
    unseen = Geometry((1,), Convolution((1,), (5,), (1,), (1,), (1,)))
    assert not unseen.pays(64, 50)
    x = torch.randn(2, 64, 8, 8)
    found = PatchGram.of(x, wide, ones=False).dense()
    a = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    assert relative_error(found[0], a.T @ a) < 1e-13


def test_both_orders_of_the_scalings_agree_with_the_definition() -> None:
    for positions in (3, 6, 40):
        g, a = torch.randn(4, positions, 2, 5), torch.randn(4, positions, 2, 7)
        left = torch.linalg.qr(torch.randn(2, 5, 5))[0]
        right = torch.linalg.qr(torch.randn(2, 7, 7))[0]
        gradients = torch.einsum("nsbo,nsbi->nboi", g, a)
        rotated = torch.einsum("bop,nboi,bij->nbpj", left, gradients, right)
        for budget in (1, 1 << 22):
            squares, total = kernels.second_moment(g, a, left, right, budget)
            assert relative_error(squares, rotated.square().sum(0)) < 1e-13
            assert relative_error(total, rotated.sum(0)) < 1e-13


def test_scalings_rotated_by_a_convolution_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Conv2d(3, 20, 3, stride=2)  # fewer positions than outputs
    model = nn.Sequential(layer, nn.Flatten())
    x, y = torch.randn(5, 3, 7, 7), torch.randint(180, (5,))
    called: list[int] = []
    rotated = ConvShortcuts.rotated_inputs

    def counting(self: Any, x: Tensor, basis: Tensor) -> Tensor:
        called.append(basis.shape[-1])
        return rotated(self, x, basis)

    monkeypatch.setattr(ConvShortcuts, "rotated_inputs", counting)
    optimizer = collect(model, lambda: F.cross_entropy(model(x), y))
    found = optimizer.curvature["0"]
    assert sum(called) == 28
    assert found.Q_G is not None
    assert found.Q_A is not None
    expected = torch.zeros(1, 20, 28)
    for n in range(5):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        gradients = torch.autograd.grad(loss, list(layer.parameters()))
        matrix = torch.cat([gradients[0].flatten(1), gradients[1][:, None]], dim=1)
        expected += (found.Q_G.mT @ matrix @ found.Q_A).square() / 5
    assert relative_error(found.s, expected) < 1e-12
