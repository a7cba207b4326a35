"""Every kind of layer: its adapter against autograd, its factors by definition."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import pytest
import torch
from support import collect, parameters, relative_error
from torch import Tensor, nn
from torch.func import functional_call

from ekfac import EKFAC, LayerCurvature
from ekfac.errors import EkfacWarning, UnsupportedLayerError
from ekfac.layers import Adapter, override
from ekfac.layers.linear import LinearAdapter
from ekfac.testing import check_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even")

# -- the definition --------------------------------------------------------------------


@dataclass
class Call:
    """One call of a layer: its inputs and the gradient of its output.

    ``features``: how many last dimensions of the output are features, or 0 for the
    channels of ``[N, C, *]``.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    grad: Tensor
    features: int = 1

    def rows(self, output: Tensor) -> Tensor:
        """Return ``[N, S, features]``."""
        if not self.features:
            return (
                output.flatten(2).transpose(1, 2)
                if output.dim() > 2
                else output[:, None]
            )
        size = output.shape[-self.features :].numel()
        return output.reshape(len(output), -1, size)

    def jacobian(self) -> Tensor:
        """Return ``[N, S, features, P]``, the output's derivatives in the parameters.

        The layer is linear in them: a column is its output with one element of them 1
        and all others 0.
        """
        module = copy.deepcopy(self.module)
        values = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        columns = []
        for flat in (value.view(-1) for value in values.values()):
            for i in range(len(flat)):
                flat[i] = 1
                with torch.no_grad():
                    output = functional_call(module, values, self.inputs)
                columns.append(self.rows(output))
                flat[i] = 0
        return torch.stack(columns, dim=-1)

    def vectors(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs ``[N, S, b, d_in]`` and gradients ``[N, S, b, d_out]``.

        ``index`` ``[b, d_out, d_in]`` says where in the layer's parameters the block's
        elements are. The input that an output sees is its derivative in its own row of
        the weight; the outputs of a block all see the same, and no other row.
        """
        b, d_out, _ = index.shape
        J = self.jacobian()
        J = J.reshape(*J.shape[:2], b, d_out, -1)
        where = index.expand(*J.shape[:2], -1, -1, -1)
        own = J.gather(-1, where)
        assert torch.equal(own, own[:, :, :, :1].expand_as(own))
        assert not J.scatter(-1, where, 0)[..., index.flatten()].any()
        return own[:, :, :, 0], self.rows(self.grad).unflatten(-1, (b, d_out))


def index_of(layer: LayerCurvature) -> Tensor:
    """Return ``[b, d_out, d_in]``: positions in the layer's flattened parameters."""
    tensors, start = {}, 0
    for name, parameter in zip(
        layer.parameter_names, layer.block.tensors(), strict=True
    ):
        count = parameter.numel()
        tensors[name] = torch.arange(start, start + count).reshape(parameter.shape)
        start += count
    return layer.pack(tensors)


def by_definition(
    calls: Sequence[Call],
    index: Tensor,
    *,
    sharing: str = "expand",
    exact: bool = False,
    ignored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``G`` by loops over examples and positions.

    ``exact``: the second moment of the examples' gradients and 1. ``ignored``: an index
    of an embedding that does not count.
    """
    pairs = [call.vectors(index) for call in calls]
    b, d_out, d_in = index.shape
    N = len(pairs[0][0])
    A = pairs[0][0].new_zeros(b, d_in, d_in)
    G = A.new_zeros(b, d_out, d_out)
    positions = 0
    for n in range(N):
        example = [
            (a[n, s], g[n, s])
            for a, g in pairs
            for s in range(a.shape[1])
            if ignored is None or not a[n, s, 0, ignored]
        ]
        if exact:
            gradient = sum(g * a for a, g in example)
            A += torch.einsum("bi,bj->bij", gradient, gradient) / N
            continue
        if sharing == "reduce" and example:
            mean = sum(a for a, _ in example) / len(example)
            example = [(mean, sum(g for _, g in example))]
        for a, g in example:
            A += torch.einsum("bi,bj->bij", a, a)
            G += torch.einsum("bi,bj->bij", g, g) / N
            positions += 1
    return (A, torch.ones_like(G)) if exact else (A / positions, G)


def observe(
    model: nn.Module, modules: Sequence[nn.Module], loss: Callable[[], Tensor]
) -> list[list[tuple[tuple[Any, ...], Tensor]]]:
    """Return each module's calls: what went in and the gradient of what came out."""
    seen: list[tuple[int, tuple[Any, ...], Tensor]] = []

    def note(i: int) -> Callable[..., None]:
        return lambda module, args, output: seen.append((i, args, output))

    handles = [m.register_forward_hook(note(i)) for i, m in enumerate(modules)]
    value = loss()
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(value, [output for _, _, output in seen])
    calls: list[list[tuple[tuple[Any, ...], Tensor]]] = [[] for _ in modules]
    for (i, args, _), grad in zip(seen, grads, strict=True):
        inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        calls[i].append((inputs, grad))
    return calls


def weighed(model: nn.Module, *inputs: Tensor) -> Callable[[], Tensor]:
    """Return a loss: a random linear functional of the output, a sum over examples."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        shape = copy.deepcopy(model)(*inputs).shape
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda: (model(*inputs) * weights).sum()


def check_factors(
    model: nn.Module,
    layer: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    features: int = 1,
    *,
    sharing: str = "expand",
    ignored: int | None = None,
) -> LayerCurvature:
    """Check the factors of one layer in a training step of ``model``."""
    loss = weighed(model, *inputs)
    (calls,) = observe(model, [module], loss)
    optimizer = collect(model, loss, loss_reduction="sum", sharing=sharing)
    found = optimizer.curvature[layer]
    A, G = by_definition(
        [Call(module, *call, features) for call in calls],
        index_of(found),
        sharing=sharing,
        exact=found.block.exact,
        ignored=ignored,
    )
    assert found.A is not None
    if found.A.dim() == 2:
        A = A.diagonal(dim1=-2, dim2=-1)
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10
    return found


# -- one layer, alone and in a network -------------------------------------------------


class Between(nn.Module):
    """A layer between nonlinearities, with a batch dimension where it has none."""

    def __init__(self, layer: nn.Module, batched: bool = True) -> None:
        super().__init__()
        self.layer, self.batched = layer, batched

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batched else x[0]
        y: Tensor = self.layer(torch.sin(x) if x.is_floating_point() else x).sin()
        return y if self.batched else y.unsqueeze(0)


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


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


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


def test_a_transposed_convolution_is_called_with_a_size() -> None:
    layer = nn.ConvTranspose1d(4, 3, 3, stride=2).double()
    model = Between(layer)
    assert check_adapter(layer, doubles(2, 4, 5), [11])
    x = doubles(2, 4, 5)
    optimizer = EKFAC(model)
    with pytest.raises(
        UnsupportedLayerError, match=r"\[12\].*give \[11\].*output_padd"
    ):
        layer(x, [12])
    optimizer.close()


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


# -- attention -------------------------------------------------------------------------


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


# -- several calls, several modules ----------------------------------------------------

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


class Stack(nn.Sequential):
    """Modules after one another with a nonlinearity between."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x).sin()
        return x


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
    assert reasons.get("head.bias") == (
        "its layer's weight is shared" if bias else None
    )


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


# -- layers that are left out ----------------------------------------------------------


def reasons(model: nn.Module) -> dict[str, str]:
    """Return the reasons of what no block covers, as ``describe`` lists them."""
    with pytest.warns(EkfacWarning) as record:
        optimizer = EKFAC(model)
    found = {
        row.layer: row.reason
        for row in optimizer.describe().rows
        if row.method == "AdamW-like"
    }
    for name, reason in found.items():
        assert f"{name} ({reason})" in str(record[0].message)
    optimizer.close()
    return found


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer under another name."""


class Constant(nn.Module):
    """A parameter of its own, of no known type."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize(
    ("layer", "parameters", "reason"),
    [
        (nn.Embedding(7, 3, scale_grad_by_freq=True), ["weight"], "scale_grad_by_freq"),
        (nn.Embedding(7, 3, sparse=True), ["weight"], "sparse"),
        (Doubled(3, 3), ["weight", "bias"], "Doubled overrides the forward of Linear"),
        (Constant(), ["shift"], "no adapter for Constant"),
        (nn.LSTM(3, 3), None, "no adapter for LSTM"),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            ["bias_k", "bias_v"],
            "the adapter of MultiheadAttention leaves it out",
        ),
        (nn.Bilinear(3, 3, 3), ["weight", "bias"], "no adapter for Bilinear"),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            ["bias", "parametrizations.weight.original"],
            "parametriz",
        ),
        (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 3, 1)),
            None,
            "parametriz",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_refused_layers_say_why(
    layer: nn.Module, parameters: list[str] | None, reason: str
) -> None:
    found = reasons(nn.Sequential(nn.Linear(2, 2), layer))
    names = parameters or [name for name, _ in layer.named_parameters()]
    assert sorted(found) == sorted(f"1.{name}" for name in names)
    assert all(reason in why for why in found.values()), found


def test_refused_layers_are_trained() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3), Constant(), normed)
    with pytest.warns(EkfacWarning):
        optimizer = EKFAC(model, lr=0.1)
    before = parameters(model)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().sum(1).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_subclass_with_the_same_forward_is_covered() -> None:
    layer = Renamed(4, 3).double()
    assert check_adapter(layer, doubles(5, 4))
    check_factors(Between(layer), "layer", layer, [doubles(5, 4)])


def test_lazy_modules_need_a_forward_pass_first() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 2), nn.Flatten(), nn.LazyLinear(3)).double()
    with pytest.raises(ValueError, match=r"layer '0' is lazy.*one forward pass"):
        EKFAC(model)
    x = doubles(5, 2, 3, 3)
    model(x)
    check_factors(model, "0", model[0], [x], 0)
    check_factors(model, "2", model[2], [x])


def test_frozen_parameters() -> None:
    """Frozen layers have no block; a frozen bias leaves the column of ones out."""
    x = doubles(5, 3)
    model = Stack(*(nn.Linear(3, 3) for _ in range(4))).double()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    for name in ("1", "3"):
        found = check_factors(model, name, model[int(name)], [x])
        assert found.block.shape == (1, 3, 3 + (name == "3"))
    with pytest.warns(EkfacWarning, match=r"2\.bias .*weight is not trained"):
        optimizer = EKFAC(model, lr=0.1)
    assert list(optimizer.curvature) == ["1", "3"]
    before = parameters(model)
    weighed(model, x)().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"1.weight", "2.bias", "3.weight", "3.bias"}


def test_unfrozen_layers_get_blocks() -> None:
    model = Stack(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[0].requires_grad_(False)
    optimizer = EKFAC(model)
    x = doubles(5, 3)
    weighed(model, x)().backward()
    optimizer.step()
    assert list(optimizer.curvature) == ["1"]
    model[0].requires_grad_(True)
    for _ in range(2):  # the first of them had no hooks yet in its forward pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EkfacWarning)
            weighed(model, x)().backward()
            optimizer.step()
    assert set(optimizer.curvature) == {"0", "1"}
    assert optimizer.curvature["0"].ready


def test_a_bias_shared_by_different_weights_is_in_no_block() -> None:
    layers = [nn.Linear(3, 3).double() for _ in range(3)]
    for layer in layers[1:]:
        layer.bias = layers[0].bias
    model, x = Stack(*layers), doubles(5, 3)
    assert reasons(model) == {"0.bias": "layers of different weights share it"}
    for i, layer in enumerate(layers):
        assert check_factors(model, f"{i}", layer, [x]).block.shape == (1, 3, 3)


class Branches(nn.Module):
    """Two layers, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        y: Tensor = self.left(x).sin()
        return y if skip else y + self.right(x)


def test_a_layer_that_a_step_skips_keeps_its_state() -> None:
    model, x = Branches().double(), doubles(5, 3)
    optimizer = EKFAC(model, lr=0.1, factor_interval=1, basis_interval=1)
    weighed(model, x)().backward()
    optimizer.step()
    before, state = parameters(model), optimizer.curvature.state_dict()
    optimizer.zero_grad()
    model(x, skip=True).sum().backward()
    optimizer.step()
    after = optimizer.curvature.state_dict()
    for key, value in state["right"].items():
        if key not in ("version", "Q_A", "Q_G") and not key.startswith("eigenvalues"):
            assert torch.equal(after["right"][key], value), key
    assert not torch.equal(after["left"]["A"], state["left"]["A"])
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"left.weight", "left.bias"}


def test_calls_without_a_gradient_do_not_count() -> None:
    """Of two calls only one reaches the loss."""
    layer = nn.Linear(3, 3).double()

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x + self.layer(x.cos()).detach()).sin()
            return y

    model, x = Detached(), doubles(5, 3)
    found = collect(model, weighed(model, x), loss_reduction="sum").curvature["layer"]
    inputs = torch.cat([x + layer(x.cos()).detach(), doubles(5, 1) * 0 + 1], dim=1)
    assert relative_error(found.A, (inputs.t() @ inputs / 5).unsqueeze(0)) < 1e-10


# -- check_adapter itself --------------------------------------------------------------


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


def test_check_adapter_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match=r"Constant has no adapter.*register"):
        check_adapter(Constant(), doubles(5, 3))
    with pytest.raises(ValueError, match=r"Embedding has no adapter.*sparse=True"):
        check_adapter(nn.Embedding(3, 2, sparse=True), torch.tensor([1, 2]))


def test_check_adapter_leaves_the_module_alone() -> None:
    layer = nn.BatchNorm1d(3)
    before = copy.deepcopy(layer.state_dict())
    state = torch.get_rng_state()
    assert check_adapter(layer, torch.randn(4, 3))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer.weight.grad is None
    torch.set_rng_state(state)
