"""Modules of other packages and of one's own, recognised by what they compute."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definitions import Between, check_factors, doubles
from support import collect, relative_error
from torch import Tensor, nn

from ekfac import EKFAC
from ekfac.errors import EkfacWarning
from ekfac.layers import find_adapter
from ekfac.layers.operands import OperandAdapter
from ekfac.layers.recognised import (
    ColumnLinearAdapter,
    FeatureScaleAdapter,
    RowLinearAdapter,
    ScaledEmbeddingAdapter,
    recognise,
)
from ekfac.testing import check_adapter


def other_class(module: str, name: str) -> type[nn.Module]:
    """Return a class of transformers."""
    path = f"transformers.{module}"
    return getattr(__import__(path, fromlist=[name]), name)  # type: ignore[no-any-return]


class Linear(nn.Module):
    """A linear layer as torch_geometric has it."""

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))
        self.bias = nn.Parameter(torch.randn(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Named(nn.Module):
    """``x W + b`` of parameters under other names, in any order."""

    def __init__(self, d_in: int, d_out: int, order: int = 1) -> None:
        super().__init__()
        shapes = {"kernel": (d_in, d_out), "shift": (d_out,)}
        for name in list(shapes)[::order]:
            setattr(self, name, nn.Parameter(torch.randn(shapes[name])))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.kernel) + self.shift


class LayerNorm(nn.Module):
    """A layer norm with an optional bias, as nanoGPT has it."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class LayerNorm2d(nn.LayerNorm):
    """A layer norm over channels, as timm and torchvision have it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        y = F.layer_norm(y, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A scale of every feature, as vision transformers have it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-5 * torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def fresh(module: nn.Module) -> nn.Module:
    """Return the module with random parameters, in double precision."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return module


ROW, COLUMN = RowLinearAdapter, ColumnLinearAdapter
SCALE, LOOKUP = FeatureScaleAdapter, ScaledEmbeddingAdapter
# Name -> module, input, dimensions of features, adapter.
Case = tuple[nn.Module, Tensor, int, type]
CASES: dict[str, Callable[[], Case]] = {
    "torch_geometric": lambda: (Linear(4, 3), doubles(5, 2, 4), 1, ROW),
    "square": lambda: (Linear(4, 4), doubles(5, 2, 4), 1, ROW),
    "no bias": lambda: (Linear(4, 3, bias=False), doubles(5, 4), 1, ROW),
    "other names": lambda: (Named(4, 3), doubles(5, 2, 4), 1, COLUMN),
    "square, transposed": lambda: (Named(4, 4), doubles(5, 2, 4), 1, COLUMN),
    "GPT-2": lambda: (
        other_class("pytorch_utils", "Conv1D")(3, 4),
        doubles(5, 2, 4),
        1,
        COLUMN,
    ),
    "nanoGPT": lambda: (LayerNorm(4, True), doubles(5, 2, 4), 1, SCALE),
    "nanoGPT, no bias": lambda: (LayerNorm(4, False), doubles(5, 2, 4), 1, SCALE),
    "timm": lambda: (LayerNorm2d(4), doubles(5, 4, 2, 3), 0, SCALE),
    "LayerScale": lambda: (LayerScale(4), doubles(5, 2, 4), 1, SCALE),
}
# Those that compute in float32, or are not linear in their parameters.
OTHERS: dict[str, Callable[[], Case]] = {
    "PReLU": lambda: (nn.PReLU(4), doubles(5, 4, 2), 0, SCALE),
    "Llama": lambda: (
        other_class("models.llama.modeling_llama", "LlamaRMSNorm")(4),
        doubles(5, 2, 4),
        1,
        SCALE,
    ),
    "Gemma": lambda: (
        other_class("models.gemma.modeling_gemma", "GemmaRMSNorm")(4),
        doubles(5, 2, 4),
        1,
        SCALE,
    ),
    "T5": lambda: (
        other_class("models.t5.modeling_t5", "T5LayerNorm")(4),
        doubles(5, 2, 4),
        1,
        SCALE,
    ),
    "Mamba": lambda: (
        other_class("models.mamba.modeling_mamba", "MambaRMSNorm")(4),
        doubles(5, 2, 4),
        1,
        SCALE,
    ),
    "Bart": lambda: (
        other_class("models.bart.modeling_bart", "BartScaledWordEmbedding")(
            7, 3, 1, embed_scale=1.7
        ),
        torch.randint(7, (5, 4)),
        1,
        LOOKUP,
    ),
}


def test_the_order_of_parameters_does_not_matter() -> None:
    assert check_adapter(Named(4, 3, order=-1), doubles(5, 2, 4))


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_they_agree_with_autograd(name: str) -> None:
    torch.manual_seed(0)
    module, x, _, adapter = (CASES | OTHERS)[name]()
    assert find_adapter(module) is adapter
    assert find_adapter(module.eval()) is adapter
    fresh(module)
    assert check_adapter(module, x, tolerance=1e-8 if name in CASES else 1e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_those_of_the_definition(name: str, sharing: str) -> None:
    torch.manual_seed(0)
    module, x, features, _ = CASES[name]()
    fresh(module)
    model = Between(module)
    check_factors(model, "layer", module, [x], features, sharing=sharing)


@pytest.mark.parametrize("name", OTHERS)
def test_blocks_are_the_second_moments_of_gradients(name: str) -> None:
    """Of one position an example, where a block is exact or its factors are known."""
    torch.manual_seed(0)
    module, x, _, _ = OTHERS[name]()
    fresh(module)
    x = x if module(x).shape == x.shape else x[:, :1]
    model = Between(module)
    (weight,) = module.parameters()
    weights = torch.randn(len(x), *model(x).shape[1:])
    per_example = torch.stack(
        [
            torch.autograd.grad((model(x[n : n + 1]) * weights[n]).sum(), weight)[0]
            for n in range(len(x))
        ]
    )
    layer = collect(
        model, lambda: (model(x) * weights).sum(), loss_reduction="sum"
    ).curvature["layer"]
    packed = torch.stack([layer.pack({"layer.weight": g}) for g in per_example])
    if layer.block.exact:
        moment = torch.einsum("nboi,nboj->bij", packed, packed) / len(x)
        assert relative_error(layer.A, moment) < 1e-6
        return
    counts = torch.bincount(x.flatten(), minlength=7).double()
    counts[1] = 0  # padding
    assert relative_error(layer.A, counts[None] / counts.sum()) < 1e-12
    G = torch.einsum("nboi,nbpi->bop", packed, packed) / len(x)
    assert relative_error(layer.G, G) < 1e-6


class Variant(Linear):
    """A linear layer with something else about it."""

    def __init__(self, what: str) -> None:
        super().__init__(4, 4)
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.what == "activation":
            return super().forward(x).tanh()
        if self.what == "twice":
            return 2 * super().forward(x)
        if self.what == "dropout":
            return F.dropout(super().forward(x), 0.1, self.training)
        if self.what == "normalised weight":
            return F.linear(x, weight / weight.norm(), bias)
        if self.what == "squared":
            return F.linear(x, weight.square(), bias)
        if self.what == "detached":
            return F.linear(x, weight.detach(), bias)
        if self.what == "another gradient":
            half = weight / 2
            return F.linear(x, half + half.detach(), bias)
        if self.what == "bias of the input":
            return F.linear(x, weight) + bias * x.mean(-1, keepdim=True)
        if self.what == "several":
            return (super().forward(x),)  # type: ignore[return-value]
        raise ValueError(self.what)


# Whether the weight itself is what ``linear`` is given; its gradient is then known.
VARIANTS = {
    "activation": True,
    "twice": True,
    "dropout": True,
    "bias of the input": True,
    "several": True,
    "normalised weight": False,
    "squared": False,
    "detached": False,
    "another gradient": True,
}


@pytest.mark.parametrize("what", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_what_follows_no_rule_is_not_taken_for_it(what: str, training: bool) -> None:
    """Its ``linear`` is watched, and has statistics if it is that of the weight."""
    layer = Variant(what).train(training)
    assert find_adapter(layer) is OperandAdapter
    if VARIANTS[what] and what != "dropout":
        assert check_adapter(layer, doubles(5, 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(self.first(x))
            return y[0] if isinstance(y, tuple) else y

    model = Model().train()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        optimizer = EKFAC(model)
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()
    assert optimizer.curvature["layer"].ready == VARIANTS[what]
    unseen = any("no statistics" in str(warning.message) for warning in record)
    assert unseen == (not VARIANTS[what] and what != "detached")


class LayerNormTanh(nn.LayerNorm):
    """A norm with what comes behind it, as timm has them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class RMSNormTwice(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin() + super().forward(2 + x)


class GroupNormTanh(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        shift = self.bias
        return F.group_norm(x, self.num_groups, bias=shift, weight=self.weight).tanh()


class InstanceNormTanh(nn.InstanceNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class BatchNormTanh(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def timm_norm(name: str, *args: Any) -> nn.Module:
    """Return a norm of timm, whose activation is not one of torch's norms."""
    layers = pytest.importorskip("timm.layers")
    return getattr(layers, name)(*args, act_layer=nn.SiLU)  # type: ignore[no-any-return]


# Batch norms as they are in evaluation: in training examples meet.
NORMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "LayerNorm": lambda: (LayerNormTanh(4), doubles(5, 3, 4)),
    "LayerNorm, no bias": lambda: (LayerNormTanh((3, 4), bias=False), doubles(5, 3, 4)),
    "RMSNorm": lambda: (RMSNormTwice(4), doubles(5, 3, 4)),
    "GroupNorm": lambda: (GroupNormTanh(2, 4), doubles(5, 4, 3)),
    "InstanceNorm": lambda: (InstanceNormTanh(4, affine=True), doubles(5, 4, 3)),
    "BatchNorm": lambda: (BatchNormTanh(4).eval(), doubles(5, 4, 2, 3)),
    "timm's BatchNormAct2d": lambda: (
        timm_norm("BatchNormAct2d", 4).eval(),
        doubles(5, 4, 2, 3),
    ),
    "timm's GroupNormAct": lambda: (
        timm_norm("GroupNormAct", 4, 2),
        doubles(5, 4, 2, 3),
    ),
    "timm's LayerNormAct": lambda: (timm_norm("LayerNormAct", 4), doubles(5, 3, 4)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NORMS)
def test_norms_that_do_more_have_the_blocks_of_their_gradients(name: str) -> None:
    """Second moments of scale's and shift's gradients, one example at a time."""
    torch.manual_seed(0)
    module, x = NORMS[name]()
    fresh(module)
    assert find_adapter(module) is OperandAdapter
    model = nn.Sequential(Scale(), module)
    model.training = True  # not its norm
    weights = torch.randn(model(x).shape)
    layer = collect(
        model, lambda: (model(x) * weights).sum(), loss_reduction="sum"
    ).curvature["1"]
    gradients = []
    for n in range(len(x)):
        model.zero_grad()
        (model(x[n : n + 1]) * weights[n]).sum().backward()
        own = {k: p.grad for k, p in model.named_parameters()}
        gradients.append(layer.pack(own))
    packed = torch.stack(gradients)
    moment = torch.einsum("nboi,nboj->bij", packed, packed) / len(x)
    assert relative_error(layer.A, moment) < 1e-10


class Scale(nn.Module):
    """A parameter before a layer, whose input then has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.c * x).sin()


def test_a_forward_that_raises_in_the_probe_follows_no_rule() -> None:
    class Shy(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("single precision only")
            return super().forward(x)

    assert recognise(Shy(4, 3)) is None


def test_an_instances_own_forward_is_not_probed() -> None:
    layer = Linear(4, 3)
    layer.forward = lambda x: pytest.fail("called")  # type: ignore[assignment]
    assert recognise(layer) is None


class Busy(Linear):
    """A linear layer that changes whatever it can reach, in every call."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.count, self.seen, self.table = 0, [1], {"calls": 0}
        self.scratch = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(len(x))
        self.table["calls"] += 1
        self.steps += 1
        self.scratch += 1
        self.extra = nn.Parameter(torch.rand(2))
        with torch.no_grad():
            self.weight += torch.randn(())
            self.weight -= 1
        print("called", random.random(), np.random.rand(), torch.randn(3))  # noqa: NPY002
        warnings.warn("called", stacklevel=1)
        return super().forward(x)


def test_probes_leave_everything_alone(capsys: pytest.CaptureFixture[str]) -> None:
    layer = Busy()
    calls: list[Any] = []
    layer.register_forward_hook(lambda *args: calls.append(args))
    layer.register_forward_pre_hook(lambda *args: calls.append(args))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    array = np.random.get_state()[1].copy()  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), array
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_adapter(layer)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002
    assert list(layer.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert (layer.count, layer.seen, layer.table) == (0, [1], {"calls": 0})
    assert not layer.scratch.any()
    assert not calls
    assert capsys.readouterr().out == ""


def test_statistics_run_no_hook_and_keep_buffers() -> None:
    """A scale's ``n(x)`` is the module's own forward with other parameters."""

    class Counting(LayerNorm):
        def __init__(self) -> None:
            super().__init__(4, bias=True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    layer = Counting()
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))
    optimizer = EKFAC(model, lr=1e-3, factor_interval=1, scaling="per_example")
    called: list[int] = []
    layer.register_forward_hook(lambda *args: called.append(1))
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum(1).mean().backward()
        optimizer.step()
        assert len(called) == float(layer.calls) == step + 1
    assert "1" in optimizer.curvature


def test_gpt2_is_covered_but_for_nothing() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=9
    )
    model = transformers.GPT2LMHeadModel(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkfacWarning)
        optimizer = EKFAC(model, lr=1e-3)
    assert all(row.method != "AdamW-like" for row in optimizer.describe().rows)
    ids = torch.randint(11, (4, 9))
    before = {n: p.clone() for n, p in model.named_parameters()}
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
