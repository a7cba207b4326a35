"""``check_adapter`` finds what is wrong with an adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from definitions import doubles
from support import collect, relative_error
from torch import Tensor, nn

from ekfac.layers import Adapter, Shortcuts, override, shortcuts_for
from ekfac.layers.conv import ConvAdapter, ConvShortcuts
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter
from ekfac.testing import check_adapter


class WrongPack(LinearAdapter):
    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().pack(weight, None)


class WrongUnpack(LinearAdapter):
    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().unpack(matrix)
        return weight.flip(0), bias


class ShortUnpack(LinearAdapter):
    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().unpack(matrix)[0], None


class NoOnes(LinearAdapter):
    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(x)[..., :-1]


class OnesFirst(LinearAdapter):
    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(x).roll(1, -1)


class Flipped(LinearAdapter):
    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(x.flip(-1))


class Shifted(LinearAdapter):
    def output_gradients(self, grad: Tensor) -> Tensor:
        return super().output_gradients(grad).roll(1, -1)


class Transposed(LinearAdapter):
    def output_gradients(self, grad: Tensor) -> Tensor:
        return super().output_gradients(grad).transpose(2, 3)


class Flat(LinearAdapter):
    """Every position as an example."""

    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(x.flatten(0, -2))

    def output_gradients(self, grad: Tensor) -> Tensor:
        return super().output_gradients(grad.flatten(0, -2))


class Single(LinearAdapter):
    """The whole batch as one example."""

    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(x).flatten(0, 1).unsqueeze(0)

    def output_gradients(self, grad: Tensor) -> Tensor:
        return super().output_gradients(grad).flatten(0, 1).unsqueeze(0)


class Rounded(LinearAdapter):
    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(x.float().double())


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        (WrongPack, ValueError, r"pack returned the shape \[1, 3, 4\].*15 elements"),
        (WrongUnpack, AssertionError, "unpack does not undo pack"),
        (ShortUnpack, ValueError, r"unpack returned None; expected \[3\]"),
        (NoOnes, ValueError, r"inputs returned the shape \[5, 2, 1, 4\]; expected \[5"),
        (OnesFirst, AssertionError, "Bias wrong"),
        (Flipped, AssertionError, "Bias right: the fault is in inputs"),
        (Shifted, AssertionError, "Bias wrong"),
        (
            Transposed,
            ValueError,
            r"output_gradients returned.*\[5, 2, 3, 1\]; expected",
        ),
        (Flat, ValueError, "inputs returned 10 examples; expected 5"),
        (Single, ValueError, "inputs returned 1 example for 2"),
        (Rounded, AssertionError, "of its norm; expected at most 1e-08"),
    ],
)
def test_check_adapter_finds_mistakes(
    adapter: type[Adapter], error: type[Exception], message: str
) -> None:
    layer = nn.Linear(4, 3)
    override(layer, adapter)
    with pytest.raises(error, match=f"Linear: .*{message}"):
        check_adapter(layer, doubles(5, 2, 4))


class DoubledConv(ConvAdapter):
    """Another input than the parent's, whose shortcuts it does not inherit."""

    def inputs(self, x: Tensor) -> Tensor:
        return super().inputs(2 * x)


class PointedConv(DoubledConv):
    """The same with shortcuts that contradict it."""


class Swapped(Shortcuts[ConvAdapter]):
    """A basis that is not used, and examples that are not by themselves."""

    def rotated_inputs(self, x: Tensor, basis: Tensor) -> Tensor:
        shortcut = ConvShortcuts(self.adapter)
        return shortcut.rotated_inputs(x, basis.flip(-1))


class Conv(nn.Conv2d):
    """A convolution of twice its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


def test_shortcuts_are_compared_with_inputs() -> None:
    x = doubles(5, 4, 6, 7)
    layer = Conv(4, 3, 3)
    override(layer, DoubledConv)
    assert check_adapter(layer, x)
    shortcuts_for(PointedConv)(ConvShortcuts)
    override(layer, PointedConv)
    with pytest.raises(AssertionError, match="Conv: input_gram is off what inputs"):
        check_adapter(layer, x)
    shortcuts_for(PointedConv)(Swapped)
    with pytest.raises(AssertionError, match="Conv: rotated_inputs is off what inputs"):
        check_adapter(layer, x)


def test_a_subclass_inherits_no_shortcut() -> None:
    """Factors are those of the adapter's own inputs, of many channels too."""
    x = doubles(6, 64, 6, 6)
    layer = Conv(64, 4, 3, padding=1)
    override(layer, DoubledConv)
    model = nn.Sequential(layer, nn.Flatten()).double()
    optimizer = collect(model, lambda: model(x).square().sum(1).mean())
    rows = nn.functional.unfold(2 * x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    expected = rows.T @ rows / len(rows)
    assert relative_error(optimizer.curvature["0"].A, expected[None]) < 1e-12


def test_check_adapter_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match=r"Softmax has no adapter.*register"):
        check_adapter(nn.Softmax(-1), doubles(5, 3))
    with pytest.raises(ValueError, match=r"Embedding has no adapter.*scale_grad"):
        check_adapter(nn.Embedding(3, 2, scale_grad_by_freq=True), torch.tensor([1, 2]))


def test_check_adapter_leaves_the_module_alone() -> None:
    layer = nn.BatchNorm1d(3)
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(4, 3)
    state = torch.get_rng_state()
    assert check_adapter(layer, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.weight.grad is None


class Lookup(nn.Module):
    """Rows of a table, in a class without the settings of ``nn.Embedding``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


def test_the_adapter_of_embeddings_fits_other_tables() -> None:
    table = Lookup()
    override(table, EmbeddingAdapter)
    assert check_adapter(table, torch.randint(7, (5, 4)))
