"""Operands made of weights: fake quantisation, casts, scales; adapters over int8."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.nn.intrinsic.qat as fused
import torch.nn.functional as F
from support import collect, relative_error
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.utils.checkpoint import checkpoint

from ekfac import EKFAC, LayerCurvature
from ekfac.errors import EkfacWarning
from ekfac.layers.views import row_factors


class Rounded(torch.autograd.Function):
    """Numbers rounded to eighths, with the gradient of the numbers themselves."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:  # type: ignore[override]
        return (8 * w).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def straight(w: Tensor) -> Tensor:
    """Return rounded numbers that pass the gradient on, without a function for it."""
    return w + ((8 * w).round() / 8 - w).detach()


ROWS = torch.linspace(1, 2, 4)
# Functions whose derivative is a number for every row of a matrix [4, 5].
MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "straight-through function": Rounded.apply,
    "straight-through difference": straight,
    "cast": lambda w: w.double().to(w.dtype),
    "one scale": lambda w: 0.37 * w,  # as equalised learning rates are
    "a scale a row": lambda w: w * ROWS.to(w).unsqueeze(1),
    "scaled, rounded, scaled back": lambda w: Rounded.apply(w / 3) * 3,
    "shifted": lambda w: w - 1,
    "rounded in groups": lambda w: straight(w.reshape(4, 1, -1)).reshape(w.shape),
    "one element clipped": lambda w: w.clamp(max=float(w.max()) - 1e-3),
}
OTHER: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda w: w / w.norm(dim=1, keepdim=True),
    "a scale a column": lambda w: w * torch.linspace(1, 2, w.shape[1]).to(w),
    "half of it pruned": lambda w: w * (torch.arange(w.numel()) % 2).view_as(w),
    "tanh": torch.tanh,
}


class Made(nn.Linear):
    """A linear layer whose matrix is made of its weight."""

    def __init__(self, function: Callable[[Tensor], Tensor], turned: bool) -> None:
        super().__init__(4 if turned else 5, 5 if turned else 4)
        self.function, self.turned = function, turned
        if turned:
            self.weight, self.bias = nn.Parameter(torch.randn(4, 5)), None

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.function(self.weight)
        if self.turned:
            return x @ matrix
        return F.linear(x, matrix, self.bias)


class Net(nn.Module):
    """A layer behind another and before a nonlinearity."""

    def __init__(self, layer: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = first, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x)).sin().flatten(1)  # type: ignore[no-any-return]


def statistics(model: nn.Module, x: Tensor, **options: Any) -> tuple[Any, list[Any]]:
    """Return the optimizer after a step, and the gradients of single examples."""
    weights = torch.randn(model(x).shape)
    loss = lambda: (model(x) * weights).sum()  # noqa: E731
    optimizer = collect(model, loss, loss_reduction="sum", **options)
    gradients = []
    for n in range(len(x)):
        model.zero_grad()
        (model(x[n : n + 1]) * weights[n]).sum().backward()
        own = model.named_parameters()
        gradients.append({k: p.grad.clone() for k, p in own if p.grad is not None})
    return optimizer, gradients


def error(layer: LayerCurvature, gradients: list[Any]) -> float:
    """Return how far scalings are from the second moments of examples' gradients."""
    packed = torch.stack([layer.pack(g) for g in gradients])
    left = torch.eye(packed.shape[-2]) if layer.Q_G is None else layer.Q_G
    right = torch.eye(packed.shape[-1]) if layer.Q_A is None else layer.Q_A
    expected = (left.mT @ packed @ right).square().mean(0)
    return relative_error(layer.s, expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_a_matrix_made_of_the_weight_is_covered(name: str, turned: bool) -> None:
    torch.manual_seed(0)
    layer = Made(MADE[name], turned)
    hooked: list[Tensor] = []
    layer.weight.register_hook(hooked.append)
    model = Net(layer, nn.Linear(3, 4 if turned else 5))
    optimizer, gradients = statistics(model, torch.randn(7, 2, 3))
    assert len(hooked) == 8  # the user's hooks see the user's gradients alone
    state = optimizer.curvature["layer"]
    if "clipped" in name:
        assert state.ready
    else:
        assert error(state, gradients) < 1e-10


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OTHER)
def test_matrices_of_other_functions_have_no_statistics(name: str) -> None:
    """They are trained by their diagonal, which is said with what to do."""
    model = Net(Made(OTHER[name], False), nn.Linear(3, 5))
    optimizer = EKFAC(model, lr=0.1)
    model(torch.randn(7, 2, 3)).sum().backward()
    before = model.layer.weight.detach().clone()
    reason = r"  layer \(test_quantised_weights.Made: .* by a function of it"
    with pytest.warns(EkfacWarning, match=reason):
        optimizer.step()
    assert not optimizer.curvature["layer"].ready
    assert not torch.equal(before, model.layer.weight)


def test_a_bias_that_is_added_in_another_precision_is_in_the_block() -> None:
    """As Mamba's time step, of a layer that another module multiplies with."""

    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = (self.layer.weight @ x.mT).double()
            return (y + self.layer.bias.double()[:, None]).float().mT

    torch.manual_seed(0)
    model = Net(Outside(), nn.Linear(3, 5))
    optimizer, gradients = statistics(model, torch.randn(7, 2, 3))
    layer = optimizer.curvature["layer.layer"]
    assert layer.block.shape == (1, 4, 6)
    assert error(layer, gradients) < 1e-5


@pytest.mark.usefixtures("float64")
def test_tables_and_stacks_made_of_weights_are_covered() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.randn(6, 4))
            self.experts = nn.Parameter(torch.randn(3, 4, 5))
            self.scale = nn.Parameter(torch.rand(3, 4, 1) + 0.5)  # as LSQ trains it

        def forward(self, ids: Tensor) -> Tensor:
            x = F.embedding(ids, 2 * straight(self.words)).tanh()
            y = torch.einsum("nsi,eio->neso", x, straight(self.experts) * self.scale)
            return y.sin().flatten(1)

    torch.manual_seed(0)
    ids = torch.randint(6, (7, 3))
    optimizer, gradients = statistics(nn.Sequential(Tables()), ids)
    names = ["0.words", *(f"0.experts.{i}" for i in range(3))]
    for name in names:
        assert error(optimizer.curvature[name], gradients) < 1e-10, name


def frozen(layer: nn.Module) -> nn.Module:
    """Return a layer whose ranges of quantisation stay as they are."""
    for module in layer.modules():
        if hasattr(module, "disable_observer"):
            module.disable_observer()
    return layer


CONFIG = get_default_qat_qconfig("fbgemm")
QAT: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: qat.Linear(5, 4, qconfig=CONFIG),
    "Linear, no bias": lambda: qat.Linear(5, 4, bias=False, qconfig=CONFIG),
    "LinearReLU": lambda: fused.LinearReLU(5, 4, qconfig=CONFIG),
    "Conv1d": lambda: qat.Conv1d(5, 4, 3, padding=1, stride=2, qconfig=CONFIG),
    "Conv2d": lambda: qat.Conv2d(5, 4, (1, 3), qconfig=CONFIG),
    "Conv2d, groups": lambda: qat.Conv2d(4, 4, (3, 1), groups=2, qconfig=CONFIG),
    "ConvBn2d": lambda: fused.ConvBn2d(5, 4, 3, qconfig=CONFIG, padding=1).eval(),
}


@pytest.mark.parametrize("name", QAT)
def test_layers_of_quantisation_aware_training(name: str) -> None:
    """Torch's own: their fake quantisers cut off next to nothing of these weights."""
    torch.manual_seed(0)
    layer = QAT[name]()
    kernel = layer.weight.shape[1:]
    x = torch.randn(7, 3, 5)
    first: nn.Module = nn.Linear(5, 5)
    if len(kernel) > 1:
        channels = layer.in_channels
        x = torch.randn(7, channels, *(6 for _ in kernel[1:]))
        first = nn.Conv1d(channels, channels, 1) if x.dim() == 3 else first
        first = nn.Conv2d(channels, channels, 1) if x.dim() == 4 else first
    model = Net(layer, first)
    model(x)
    frozen(layer)
    model.train()
    if "Bn" in name:  # normalised by buffers: examples do not meet
        layer.freeze_bn_stats()
    optimizer, gradients = statistics(model, x)
    assert error(optimizer.curvature["layer"], gradients) < 1e-4


def test_checkpoints_leave_functions_of_weights_uncovered() -> None:
    """Their saved tensors are not there to be asked; the model trains all the same."""

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Made(straight, False)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(3, 5), Region())
    optimizer = EKFAC(model, lr=0.1)
    model(torch.randn(7, 3)).square().sum().backward()
    with pytest.warns(EkfacWarning, match="no statistics"):
        optimizer.step()
    assert optimizer.curvature["0"].ready
    assert not optimizer.curvature["1.layer"].ready


def test_row_factors_are_those_of_rows_alone() -> None:
    adapter = next(iter(EKFAC(nn.Linear(3, 2)).curvature.values())).block.adapter
    rows = torch.tensor([[2.0, 2.0, 2.0], [-3.0, -3.0, -3.0]])
    torch.testing.assert_close(row_factors(rows, adapter), torch.tensor([2.0, -3.0]))
    rows[0, 1] = 0  # one in six
    torch.testing.assert_close(row_factors(rows, adapter), torch.tensor([2.0, -3.0]))
    rows[1, 1] = 0
    assert row_factors(rows, adapter) is None
    assert row_factors(torch.tensor([[2.0, 2.2, 2.0]]), adapter) is None


# -- frozen int8 weights beside trained ones -------------------------------------------


class Int8Linear(nn.Module):
    """A frozen matrix in eight bits, scaled row by row, with trained LoRA matrices."""

    def __init__(self, d_in: int, d_out: int, rank: int = 2) -> None:
        super().__init__()
        weight = torch.randn(d_out, d_in)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.lora_A = nn.Linear(d_in, rank, bias=False)
        self.lora_B = nn.Parameter(torch.randn(rank, d_out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype) * self.scale)
        return y + self.lora_A(x) @ self.lora_B  # type: ignore[no-any-return]


@pytest.mark.usefixtures("float64")
def test_lora_over_int8_is_covered_and_the_base_left_alone() -> None:
    torch.manual_seed(0)
    model = Net(Int8Linear(5, 4), nn.Linear(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkfacWarning)
        EKFAC(model)
    optimizer, gradients = statistics(model, torch.randn(7, 2, 3))
    assert set(optimizer.curvature) == {"first", "layer.lora_B", "layer.lora_A"}
    for name, state in optimizer.curvature.items():
        assert error(state, gradients) < 1e-10, name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_peft(dora: bool) -> None:
    """LoRA's and DoRA's matrices, of whose products DoRA takes norms besides."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh())
    config = peft.LoraConfig(
        r=2,
        target_modules=["0", "2"],
        use_dora=dora,
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config).double()
    optimizer, gradients = statistics(model, torch.randn(7, 3))
    lora = {name: s for name, s in optimizer.curvature.items() if "lora_" in name}
    assert len(lora) == 4
    for name, state in lora.items():
        assert error(state, gradients) < 1e-10, name
    rest = [r for r in optimizer.describe().rows if r.method == "AdamW-like"]
    assert len(rest) == (2 if dora else 0)  # magnitudes, which are vectors
