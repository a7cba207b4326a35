"""Weights that are operands of operations, wherever those are called."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import collect, parameters, relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ekfac
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
    """Rows that are copied are taken there, views where they meet the examples."""

    class Model(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.own = own
            self.places = Positions(way) if own else nn.Embedding(7, 3)
            self.words = nn.Embedding(5, 3)

        def forward(self, ids: Tensor) -> Tensor:
            numbers = torch.arange(4) + 2
            if way != "rows":
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


class Inside(nn.Module):
    """A layer whose outputs are not linear in its weight."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sin()  # type: ignore[no-any-return]


class Parameter(nn.Module):
    """One parameter in one operation."""

    def __init__(self, shape: tuple[int, ...], code: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.code = code
        self.child = nn.Identity()  # modules with children are not probed as a whole


class Product(Parameter):
    """Code of products."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        return {
            "x @ W": lambda: x @ w,
            "x @ W.T": lambda: x @ w.T,
            "matmul": lambda: torch.matmul(x, w.transpose(0, 1)),
            "mm": lambda: torch.mm(x[:, 0], w).unsqueeze(1),
            "mat2": lambda: torch.mm(x[:, 0], mat2=w).unsqueeze(1),
            "W @ x": lambda: (w @ x.mT).mT,
            "x @ W, W.T": lambda: (x @ w).tanh() @ w.T,
            "addmm": lambda: torch.addmm(torch.ones(4), x[:, 0], w).unsqueeze(1),
            "linear": lambda: F.linear(x, w, torch.ones(4)),
            "linear of W.T": lambda: F.linear(x, w.t()),
            "view": lambda: x @ w.view(1, 5, 4)[0],
            "einsum": lambda: torch.einsum("nsi,io->nso", x, w),
            "einsum ...": lambda: torch.einsum("...i,oi->...o", x, w),
            "einsum first": lambda: torch.einsum("oi,nsi->nos", w, x).mT,
            "bmm": lambda: torch.bmm(x.transpose(0, 1), w).transpose(0, 1),
            "x @ stack": lambda: x.unsqueeze(2) @ w,
            "stack @ x": lambda: (w @ x.unsqueeze(-1)).squeeze(-1),
            "shared input": lambda: (x[:, :1].unsqueeze(1) @ w).squeeze(2),
            "heads": lambda: torch.einsum("nsi,hio->nsho", x, w),
            "heads in": lambda: torch.einsum("nhi,hio->no", x, w).unsqueeze(1),
            "experts": lambda: torch.einsum("nei,eoi->neo", x, w),
            "expert 1": lambda: torch.cat([x[:, :1] @ w[1], x[:, :1] @ w[0]], 1),
            "matrix, rows": lambda: w[(x[..., 0] > 0).long()] + (x @ w.T)[..., :1],
        }[self.code]()


class Folded(Parameter):
    """Code of matrices in three dimensions, as XLNet's attention has them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.code == "folded, made":
            return torch.einsum("nsi,iab->nsab", x, self.w).flatten(2)
        return torch.einsum("nsab,iab->nsi", x[..., :4].unflatten(-1, (2, 2)), self.w)


class Convolution(Parameter):
    """Code that knows of no matrices."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        return {
            "conv1d": lambda: F.conv1d(x.mT, w, stride=2, padding=1).mT,
            "conv1d, same": lambda: F.conv1d(x.mT, w, padding="same", dilation=2).mT,
        }[self.code]()


class Table(Parameter):
    """Code that takes and adds rows."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        return {
            "table": lambda: x + w,
            "table, slice": lambda: x + w[:, 2:5],
            "table, square": lambda: x.unsqueeze(1) + w,
            "table, times": lambda: (x * w).sin(),
            "table, both": lambda: (x * w.expand_as(x)) + x * w,
            "table, in place": lambda: x.sin().add_(w),
            "token": lambda: torch.cat([w.expand(len(x), -1, -1), x], 1),
            "token, repeat": lambda: torch.cat([w.repeat(len(x), 1, 1), x], 1),
            "token, added": lambda: x + w.expand_as(x),
            "rows": lambda: w[(x[..., 0] > 0).long()],
        }[self.code]()


OPERATIONS = {
    "x @ W": (5, 4),
    "x @ W.T": (4, 5),
    "matmul": (4, 5),
    "mm": (5, 4),
    "mat2": (5, 4),
    "W @ x": (4, 5),
    "x @ W, W.T": (5, 4),
    "addmm": (5, 4),
    "linear": (4, 5),
    "linear of W.T": (5, 4),
    "view": (5, 4),
    "einsum": (5, 4),
    "einsum ...": (4, 5),
    "einsum first": (4, 5),
    "bmm": (3, 5, 4),
    "x @ stack": (3, 5, 4),
    "stack @ x": (3, 4, 5),
    "shared input": (3, 5, 4),
    "heads": (2, 5, 4),
    "heads in": (3, 5, 4),
    "experts": (3, 4, 5),
    "expert 1": (2, 5, 4),
    "folded, made": (5, 2, 3),
    "folded, summed": (3, 2, 2),
    "conv1d": (4, 5, 3),
    "conv1d, same": (4, 5, 3),
    "table": (1, 3, 5),
    "table, slice": (1, 6, 5),
    "table, square": (1, 2, 3, 5),
    "table, times": (1, 3, 5),
    "table, both": (1, 3, 5),
    "table, in place": (1, 3, 5),
    "token": (1, 1, 5),
    "token, repeat": (1, 1, 5),
    "token, added": (1, 1, 5),
    "rows": (4, 5),
    "matrix, rows": (4, 5),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("code", OPERATIONS)
def test_gradients_of_examples_are_those_of_autograd(code: str) -> None:
    """Scalings are second moments of every example's gradient, in the basis."""
    torch.manual_seed(0)
    kinds: dict[str, type[Parameter]]
    kinds = {"conv": Convolution, "fold": Folded, "tabl": Table, "toke": Table}
    kinds["rows"] = Table
    layer = kinds.get(code[:4], Product)(OPERATIONS[code], code)
    model, x = Inside(layer), torch.randn(7, 3, 5)
    weights = torch.randn(model(x).shape)
    optimizer = collect(
        model,
        lambda: (model(x) * weights).sum(),
        loss_reduction="sum",
        scaling="per_example",
    )
    own = parameters(model)

    def loss(tensors: dict[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
        result = torch.func.functional_call(model, tensors, (x.unsqueeze(0),))
        return (result[0] * weights).sum()

    gradients = [torch.func.grad(loss)(own, x[n], weights[n]) for n in range(7)]
    blocks = [k for k in optimizer.curvature if k.startswith("layer")]
    assert blocks
    assert all(name.startswith("layer.w") for name in blocks)
    for name in blocks:
        state = optimizer.curvature[name]
        pack = state.block.pack
        every = torch.stack([pack([g["layer.w"]]) for g in gradients])
        left = torch.eye(every.shape[-2]) if state.Q_G is None else state.Q_G
        right = torch.eye(every.shape[-1]) if state.Q_A is None else state.Q_A
        expected = (left.mT @ every @ right).square().mean(0)
        assert relative_error(state.s, expected) < 1e-10, name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("code", ["x @ W", "x @ W.T", "einsum", "W @ x"])
def test_factors_of_a_matrix_are_moments_of_inputs_and_gradients(code: str) -> None:
    torch.manual_seed(0)
    layer = Product(OPERATIONS[code], code)
    x, weights = torch.randn(7, 3, 5), torch.randn(7, 3, 4)
    model = Inside(layer)
    optimizer = collect(model, lambda: (model(x) * weights).sum(), loss_reduction="sum")
    state = optimizer.curvature["layer.w"]
    with torch.no_grad():
        g = (weights * layer(x).cos()).flatten(0, 1)
    A = torch.einsum("nsi,nsj->ij", x, x) / 21
    G = g.T @ g / 7
    sides = (A, G) if OPERATIONS[code] == (5, 4) else (G, A)
    assert state.A is not None
    assert state.G is not None
    kron = torch.kron(state.G[0], state.A[0])
    assert relative_error(kron, torch.kron(*sides)) < 1e-12


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("way", ["linear", "transposed", "bias after"])
def test_weights_of_other_modules_are_seen(way: str) -> None:
    """A head ``linear(x, embedding.weight)``, a layer whose weight another uses."""

    class Model(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.own = own
            self.words, self.layer = nn.Embedding(7, 3), nn.Linear(3, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            h, weight = self.words(ids), self.words.weight
            if way == "bias after" and self.own:
                h = h @ self.layer.weight.T + self.layer.bias
            else:
                h = self.layer(h)
            if not self.own:
                return self.head(h.tanh())  # type: ignore[no-any-return]
            if way == "linear":
                return F.linear(h.tanh(), weight)
            return h.tanh() @ weight.T

    ids, weights = torch.randint(7, (6, 4)), torch.randn(6, 4, 7)
    found = []
    for own in (True, False):
        model = Model(own)
        if own:
            model.head = nn.Identity()
        found.append(
            collect(
                model,
                lambda model=model: (model(ids).sin() * weights).sum(),
                loss_reduction="sum",
                scaling="per_example",
            ).curvature
        )
    assert set(found[0]) == set(found[1]) == {"words", "layer"}
    for name, layer in found[1].items():
        for key in ("A", "G", "s"):
            expected = getattr(layer, key)
            assert relative_error(getattr(found[0][name], key), expected) < 1e-12


class Attention(nn.Module):
    """Projections that torch's attention function is given, as WavLM's and CLIP's."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = own
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.own:
            q, k, v = (
                layer(x).unflatten(-1, (2, 3)).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(y)  # type: ignore[no-any-return]
        x = x.transpose(0, 1)
        biases = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        y, _ = F.multi_head_attention_forward(
            *(x, x, x, 6, 2, torch.empty(0), biases, None, None, False, 0.0),
            *(self.out.weight, self.out.bias),
            use_separate_proj_weight=True,
            q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight,
        )
        return y.transpose(0, 1)


class Called(nn.Module):
    """Layers whose ``forward`` is called, as torch_geometric does, or they are."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.first, self.last = own, nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            return self.last.forward(self.first.forward(x).tanh())
        return self.last(self.first(x).tanh())  # type: ignore[no-any-return]


class Listed(nn.Module):
    """Matrices in a list and a table in a dict of parameters."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = own
        matrices = [nn.Parameter(torch.randn(6, 6)) for _ in range(2)]
        table = nn.Parameter(torch.randn(1, 3, 6))
        if own:
            self.matrices = nn.ParameterList(matrices)
            self.tables = nn.ParameterDict({"x": table})
        else:
            self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
            self.table = nn.Embedding(3, 6)
            for layer, matrix in zip(self.layers, matrices, strict=True):
                layer.weight = matrix
            self.table.weight = nn.Parameter(table.detach()[0])

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            x = x + self.tables["x"]
            return F.linear(F.linear(x, self.matrices[0]).tanh(), self.matrices[1])
        x = x + self.table(torch.arange(3).expand(x.shape[:2]))
        return self.layers[1](self.layers[0](x).tanh())  # type: ignore[no-any-return]


class Queries(nn.Module):
    """An embedding all of whose rows are repeated, as DETR's queries are."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own, self.queries = own, nn.Embedding(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.own:
            return x + self.queries.weight.unsqueeze(0).repeat(len(x), 1, 1)
        return x + self.queries(torch.arange(3).expand(x.shape[:2]))  # type: ignore[no-any-return]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [Attention, Called, Listed, Queries])
def test_statistics_are_those_of_modules_that_compute_the_same(kind: Any) -> None:
    x, weights = torch.randn(5, 3, 6), torch.randn(5, 3, 6)
    found = []
    for own in (True, False):
        model = Inside(kind(own))
        found.append(
            collect(
                model,
                lambda model=model: (model(x) * weights).sum(),
                loss_reduction="sum",
                scaling="per_example",
            ).curvature
        )
    assert len(found[0]) == len(found[1]) > 0
    names = {"layer.matrices.0": "layer.layers.0", "layer.matrices.1": "layer.layers.1"}
    names["layer.tables.x"] = "layer.table"
    for name, layer in found[0].items():
        for key in ("A", "G", "s"):
            expected = getattr(found[1][names.get(name, name)], key)
            error = relative_error(getattr(layer, key), expected)
            assert error < 1e-12, (name, key, error)


class Bare(nn.Module):
    """A product, a table and a stack, with a layer before them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 5)
        self.w = nn.Parameter(torch.randn(5, 4))
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.table = nn.Parameter(torch.randn(1, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) + self.table).tanh()
        heads = torch.einsum("nsi,sio->nso", x @ self.w, self.stack)
        return heads.sin()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "way", ["checkpoint", "compile", "autocast", "parallel", "without the root"]
)
def test_operations_are_seen_in_every_way_of_training(way: str) -> None:
    x, weights = torch.randn(7, 3, 5), torch.randn(7, 3, 4)
    found = []
    for plain in (True, False):
        model: nn.Module = Bare()
        call: Any = model
        if not plain and way == "checkpoint":
            call = partial(checkpoint, model, use_reentrant=False)
        elif not plain and way == "compile":
            call = model = torch.compile(model, backend="eager")  # type: ignore[assignment]
        elif not plain and way == "without the root":
            model = nn.Sequential(model)
        elif not plain and way == "parallel":
            dist.init_process_group(
                "gloo", rank=0, world_size=1, store=dist.HashStore()
            )
            call = model = nn.parallel.DistributedDataParallel(model)

        def loss(call: Any = call, low: bool = not plain) -> Tensor:
            with torch.autocast("cpu", enabled=low and way == "autocast"):
                return (call(x) * weights).sum()  # type: ignore[no-any-return]

        try:
            optimizer = collect(
                model, loss, loss_reduction="sum", scaling="running_average"
            )
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        found.append(dict(optimizer.curvature))
    limit = 0.05 if way == "autocast" else 1e-12
    names = {"w", "table", "first", *(f"stack.{i}" for i in range(3))}
    assert set(found[0]) == names
    for name, layer in found[0].items():
        other = found[1]["0." + name if way == "without the root" else name]
        for key in ("A", "G", "s"):
            expected = getattr(layer, key)
            assert relative_error(getattr(other, key), expected) < limit, name


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("structure", ["ekfac", "diagonal", "block_diagonal"])
def test_estimates_have_the_exact_trace(structure: str) -> None:
    """Blocks have the trace of the Fisher matrix that torch.func writes out."""
    model, x = nn.Sequential(Bare(), nn.Flatten()), torch.randn(7, 3, 5)
    data = [(x, torch.zeros(7, dtype=torch.long))]
    own = dict(model.named_parameters())

    def outputs(tensors: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, tensors, (x,))  # type: ignore[no-any-return]

    jacobian = torch.func.jacrev(outputs)(own)
    p = model(x).softmax(-1).detach()
    middle = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    for _ in range(2):  # a mode that is left on would count the second time
        matrix = ekfac.fisher(
            model, data, structure=structure, kind="exact", likelihood="categorical"
        )
        diagonal = matrix.diagonal()
        for name, j in jacobian.items():
            j = j.flatten(2)
            exact = torch.einsum(
                "nop,nop->", j, torch.einsum("nok,nkp->nop", middle, j)
            )
            if structure == "ekfac" and name.startswith("0.first"):
                continue  # weight and bias share a block
            assert relative_error(diagonal[name].sum(), exact / 7) < 1e-10, name


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
        elif self.way == "in part":
            weight = weight[:, :2].repeat(1, 2)
        else:
            weight = weight[:2]
        return (F.linear(x, weight),)


@pytest.mark.parametrize("way", ["detached", "normalised", "in part", "part"])
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
    with pytest.warns(EkfacWarning, match=r" odd \(test_functional_weights.Odd: it is"):
        optimizer.step()
    assert not optimizer.curvature["odd"].ready
    reasons = {row.layer: row.reason for row in optimizer.describe().rows}
    assert "no statistics" in reasons["odd"]
    assert "no statistics" not in reasons["first"]
    assert not torch.equal(layer.weight, before) or way == "detached"


def test_modules_without_such_code_fall_back_at_once() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x.div(self.weight.exp().sum(0))

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
