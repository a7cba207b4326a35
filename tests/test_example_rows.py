"""Rows by example: per-example statistics of any layout, judged by torch.func."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

import ekfac
from ekfac import EKFAC, KFAC
from ekfac.calls import (
    ExampleFinder,
    arranged,
    by_shape,
    confirmed,
    found,
    probe_multipliers,
    unlike_multipliers,
)
from ekfac.errors import CaptureError
from ekfac.likelihoods import Categorical

pytestmark = pytest.mark.usefixtures("float64")

N, S = 6, 6  # as many positions as examples: nothing tells them apart by number


class Layouts(nn.Module):
    """The same function of ``[N, S, 3]``, in layers that see other layouts of it."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.a, self.norm = nn.Linear(3, 5), nn.LayerNorm(5)
        self.b, self.o = nn.Linear(5, 4), nn.Linear(4, 3)

    def inner(self, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(z))))

    def forward(self, x: Tensor) -> Tensor:
        n, s = x.shape[:2]
        if self.layout == "batch first":
            z = self.inner(x)
        elif self.layout == "sequence first":
            z = self.inner(x.transpose(0, 1)).transpose(0, 1)
        elif self.layout == "examples major":
            z = self.inner(x.flatten(0, 1)).unflatten(0, (n, s))
        elif self.layout == "positions major":
            z = self.inner(x.transpose(0, 1).flatten(0, 1))
            z = z.unflatten(0, (s, n)).transpose(0, 1)
        elif self.layout == "two views":
            z = self.inner(torch.cat([x[:, : s // 2], x[:, s // 2 :]]))
            z = torch.cat([z[:n], z[n:]], dim=1)
        elif self.layout == "shuffled":
            order = torch.randperm(n * s, generator=torch.Generator().manual_seed(0))
            z = self.inner(x.flatten(0, 1)[order])[order.argsort()].unflatten(0, (n, s))
        else:  # the examples in another order
            order = torch.arange(n)
            if self.layout == "two exchanged":
                order[:2] = order[:2].flip(0)
            else:
                order = order.roll(4)
            z = self.inner(x[order])[order.argsort()]
        return self.o(torch.tanh(z).mean(1))


LAYOUTS = (
    "batch first",
    "sequence first",
    "examples major",
    "positions major",
    "two views",
    "shuffled",
    "two exchanged",
    "rolled",
)
COUNTS = (N, 12)  # more than one digit tells apart in one pass


def problem(count: int = N, positions: int = S) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(count, 1, 3) + 0.3 * torch.randn(count, positions, 3)
    return x, torch.randint(3, (count,))


def example_gradients(
    model: nn.Module, x: Tensor, y: Tensor
) -> list[dict[str, Tensor]]:
    """Return the gradient of every example's own loss, by torch.func."""
    named = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(parameters: Any, i: int) -> Tensor:
        out = functional_call(model, parameters, (x[i : i + 1],))
        return F.cross_entropy(out, y[i : i + 1])

    return [grad(lambda p, i=i: loss(p, i))(named) for i in range(len(x))]


def check(
    optimizer: Any, grads: list[dict[str, Tensor]], names: tuple[str, ...]
) -> None:
    """Compare scalings and exact blocks with their definitions."""
    for name in names:
        layer = optimizer.curvature[name]
        packed = [layer.pack({k: g[k] for k in layer.parameter_names}) for g in grads]
        if layer.block.exact:
            rows = torch.stack(packed).flatten(2)  # [N, b, d]
            expected = torch.einsum("nbi,nbj->bij", rows, rows) / len(rows)
            assert relative_error(layer.A, expected) < 1e-10
            continue
        squares = [(layer.Q_G.mT @ p @ layer.Q_A).square() for p in packed]
        assert relative_error(layer.s, torch.stack(squares).mean(0)) < 1e-9


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scalings_and_blocks_of_norms_in_every_layout(layout, count):
    torch.manual_seed(1)
    model = Layouts(layout)
    x, y = problem(count, count)
    reference = copy.deepcopy(model)
    optimizer = EKFAC(model, scaling="per_example", factor_interval=1, basis_interval=1)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    check(optimizer, example_gradients(reference, x, y), ("a", "norm", "b", "o"))


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_no_layout_changes_the_step(fisher, sharing):
    """Other than rows that are summed in another order."""
    x, y = problem()
    steps = []
    for layout in LAYOUTS:
        torch.manual_seed(1)
        model = Layouts(layout)
        optimizer = EKFAC(model, scaling="per_example", fisher=fisher, sharing=sharing)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for step in steps[1:]:
        assert relative_error(step, steps[0]) < 1e-6


class Routed(Layouts):
    """Tokens go to one of two calls, one of which may get none."""

    def __init__(self, none: bool) -> None:
        super().__init__("routed")
        self.bound = -100.0 if none else 0.0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        z = torch.zeros(len(rows), 4)
        for way in (rows[:, 0] > self.bound, rows[:, 0] <= self.bound):
            chosen = way.nonzero()[:, 0]
            z = z.index_add(0, chosen, self.inner(rows[chosen]))
        return self.o(torch.tanh(z.unflatten(0, x.shape[:2])).mean(1))


@pytest.mark.parametrize("none", [False, True])
def test_calls_without_rows_are_left_out(none):
    torch.manual_seed(1)
    model = Routed(none)
    x, y = problem()
    reference = copy.deepcopy(model)
    optimizer = EKFAC(model, scaling="per_example", factor_interval=1, basis_interval=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    check(optimizer, example_gradients(reference, x, y), ("a", "norm", "b", "o"))


class Graphs(nn.Module):
    """Nodes of graphs, summed graph by graph."""

    def __init__(self, said: bool = False) -> None:
        super().__init__()
        self.said = said
        self.l, self.n, self.h = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def inner(self, z: Tensor) -> Tensor:
        return torch.tanh(self.n(self.l(z)))

    def forward(self, z: Tensor, index: Tensor, count: int) -> Tensor:
        if self.said:
            with ekfac.rows_of_examples(index):
                rows = self.inner(z)
        else:
            rows = self.inner(z)
        return self.h(torch.zeros(count, 6).index_add(0, index, rows))


def graph_gradients(model: Graphs, z: Tensor, index: Tensor, y: Tensor) -> Any:
    named = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(parameters: Any, i: int) -> Tensor:
        part = z[index == i]
        zeros = torch.zeros(len(part), dtype=torch.long)
        return F.cross_entropy(
            functional_call(model, parameters, (part, zeros, 1)), y[i : i + 1]
        )

    return [grad(lambda p, i=i: loss(p, i))(named) for i in range(len(y))]


@pytest.mark.parametrize("said", [False, True])
def test_graphs_of_other_sizes_in_every_batch(said):
    """What was found in one batch is not taken for granted in the next."""
    sizes = [[3, 3, 3, 3], [2, 4, 3, 3], [2, 4, 3, 4], [1, 1, 1, 1], [1, 0, 2, 1]]
    torch.manual_seed(0)
    model = Graphs(said)
    optimizer = EKFAC(
        model,
        lr=1e-3,
        scaling="per_example",
        factor_interval=1,
        basis_interval=1,
        factor_decay=0.0,
        scaling_decay=0.0,
    )
    for counts in sizes:
        index = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
        index = index[torch.randperm(len(index))]
        z, y = torch.randn(len(index), 5), torch.arange(4) % 3
        reference = copy.deepcopy(model)
        optimizer.zero_grad()
        F.cross_entropy(model(z, index, 4), y).backward()
        optimizer.step()
        check(optimizer, graph_gradients(reference, z, index, y), ("l", "n", "h"))


class Said(nn.Module):
    """Says what it is told to of its layer's rows."""

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.index, self.inner = index, nn.Linear(5, 3)

    def forward(self, z: Tensor) -> Tensor:
        with ekfac.rows_of_examples(self.index):
            return self.inner(z)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 2, 3, 4, 5, 7], "names example 7 for layer 'inner'.* 7 examples"),
        ([0, 1], r"given \[2\], and layer 'inner' has 7 rows"),
    ],
)
def test_what_the_author_says_is_checked(index, message):
    model = Said(torch.tensor(index))
    optimizer = EKFAC(model, scaling="per_example")
    loss = F.cross_entropy(model(torch.randn(7, 5)), torch.randint(3, (7,)))

    def step() -> None:
        loss.backward()
        optimizer.step()

    with pytest.raises(CaptureError, match=message):
        step()


@pytest.mark.parametrize(
    "index", [[1, 2], torch.ones(2), torch.tensor([True, False])], ids=str
)
def test_only_integers_name_examples(index: Any) -> None:
    """A mask of rows would pass for the numbers 0 and 1."""
    with pytest.raises(TypeError, match="integers"), ekfac.rows_of_examples(index):
        pass


class Positions(nn.Module):
    """A position embedding: its gradient is summed over the examples."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.p, self.o = nn.Embedding(positions, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(x + self.p(torch.arange(x.shape[1]))).mean(1))


@pytest.mark.parametrize("positions", [2, 4, 6, 12])
def test_rows_that_mix_examples_are_said_once(positions):
    x, y = problem(N, positions)
    for fisher in ("empirical", "exact"):
        model = Positions(positions)
        optimizer = EKFAC(model, scaling="per_example", fisher=fisher)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        said = [w for w in seen if "\n  p (torch.nn.Embedding)" in str(w.message)]
        assert len(said) == (1 if fisher == "empirical" else 0)
        # By number alone they would be examples where there are as many.
        assert optimizer.curvature["p"].s is not None


@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": "per_example"}, {"fisher": "exact"}, {"sharing": "reduce"}],
)
def test_regular_layers_are_asked_once(options, monkeypatch):
    """Further steps go backward no more often than the gradient needs."""
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = EKFAC(model, **options)
    probes = []
    original = ExampleFinder.find

    def counted(self: Any, *args: Any) -> Any:
        probes.append(1)
        return original(self, *args)

    monkeypatch.setattr(ExampleFinder, "find", counted)
    for _ in range(4):
        x, y = torch.randn(8, 3), torch.randint(3, (8,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(probes) <= 2


class Axes(nn.Module):
    """One norm along both axes of square inputs, in an order that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.turned, self.axial = False, False
        self.a, self.norm, self.o = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        if self.axial or not self.turned:
            z = torch.tanh(self.norm(z))
        if self.axial or self.turned:
            z = torch.tanh(self.norm(z.transpose(0, 1))).transpose(0, 1)
        return self.o(z.mean(1))


def test_square_inputs_are_asked_again_where_the_model_computes_something_else(
    monkeypatch,
):
    """As many positions as examples: what was found holds for the same operations."""
    torch.manual_seed(0)
    model = Axes()
    optimizer = EKFAC(model, factor_decay=0.0, factor_interval=1)
    asked = []
    original = ExampleFinder.find

    def counted(self: Any, *args: Any) -> Any:
        asked.append(1)
        return original(self, *args)

    monkeypatch.setattr(ExampleFinder, "find", counted)
    counts = []
    for turned, axial in [(0, 0), (0, 0), (1, 0), (0, 0), (1, 1), (1, 0), (0, 0)]:
        model.turned, model.axial = bool(turned), bool(axial)
        x, y = problem()
        grads = example_gradients(model, x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        check(optimizer, grads, ("norm",))
        counts.append(len(asked))
    assert counts == [1, 1, 2, 2, 3, 4, 4]


def test_square_inputs_without_gradients_are_asked_again():
    """Behind a head of zeros, as at the start of many models, nothing tells them."""
    torch.manual_seed(0)
    model = Axes()
    model.turned = True
    nn.init.zeros_(model.o.weight)
    optimizer = EKFAC(model, lr=0.1, factor_decay=0.0, factor_interval=1)
    for number in range(3):
        x, y = problem()
        grads = example_gradients(model, x, y)
        assert bool(grads[0]["norm.weight"].any()) == (number > 0)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if number:
            check(optimizer, grads, ("norm",))


@pytest.mark.parametrize("Optimizer", [KFAC, EKFAC])
def test_one_example_without_a_batch_dimension(Optimizer):
    x, y = torch.randn(5), torch.tensor(1)
    found = []
    for batched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        optimizer = Optimizer(model)
        optimizer.zero_grad()
        inputs, target = (x[None], y[None]) if batched else (x, y)
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        found.append(optimizer.curvature["2"].G.clone())
    assert relative_error(*found) < 1e-12


def test_outputs_without_a_dimension_are_examples():
    """``[N]`` of a batch is no single example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    x, y = torch.randn(8, 5), torch.rand(8).round()
    optimizer = KFAC(model, likelihood="bernoulli", factor_interval=1)
    optimizer.zero_grad()
    f = model(x)
    F.binary_cross_entropy_with_logits(f, y).backward()
    optimizer.step()
    expected = (f.sigmoid() - y).square().mean()
    assert (
        relative_error(optimizer.curvature["0"].G.squeeze(), expected.detach()) < 1e-9
    )


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("shape", [(5, 4, 10), (5, 4, 4), (5, 4, 3, 2)])
def test_the_loss_says_which_dimension_holds_the_classes(fisher, shape):
    y = torch.randint(4, (shape[0], *shape[2:]))
    y[0] = -100
    x = torch.randn(shape[0], 3, *shape[2:])
    steps = []
    for likelihood in ("categorical", Categorical(class_dim=1)):
        torch.manual_seed(0)
        layer = nn.Conv1d if len(shape) == 3 else nn.Conv2d
        model = nn.Sequential(layer(3, 6, 1), nn.Tanh(), layer(6, 4, 1))
        optimizer = EKFAC(
            model, likelihood=likelihood, fisher=fisher, scaling="per_example"
        )
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative_error(*steps) < 1e-12


# -- estimates -------------------------------------------------------------------------


def dense_fisher(model: nn.Module, *inputs: Any) -> Tensor:
    """Return the exact Fisher matrix by torch.func, in eval mode."""
    model = copy.deepcopy(model).eval()
    named = {n: p.detach() for n, p in model.named_parameters()}
    J = jacrev(lambda p: functional_call(model, p, inputs))(named)
    flat = torch.cat([j.flatten(2) for j in J.values()], dim=2)
    p = model(*inputs).softmax(-1).detach()
    H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nci,ncd,ndj->ij", flat, H, flat) / len(p)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trace_of_ekfac_is_exact_in_every_layout(layout, count):
    torch.manual_seed(1)
    model = Layouts(layout)
    x, y = problem(count)
    expected = dense_fisher(model, x)
    matrix = ekfac.fisher(model, [(x[:2], y[:2]), (x[2:], y[2:])], "ekfac")
    assert relative_error(matrix.trace(), expected.trace()) < 1e-10
    diagonal = ekfac.fisher(model, [(x, y)], "diagonal").diagonal().flat()
    assert relative_error(diagonal, expected.diagonal()) < 1e-10
    kernel = ekfac.ntk(model, x).to_dense()
    J = ekfac.jacobian(model, x).to_dense()
    assert relative_error(kernel, J @ J.mT) < 1e-10


class Convolution(nn.Module):
    """A graph network: the output of a node depends on others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        return A @ self.b(torch.relu(A @ self.a(x)))


def test_rows_that_mix_examples_are_taken_apart_one_by_one():
    torch.manual_seed(0)
    A = (torch.rand(20, 20) < 0.15).double() + torch.eye(20)
    A, x, y = A / A.sum(1, keepdim=True), torch.randn(20, 3), torch.randint(3, (20,))
    model = Convolution()
    expected = dense_fisher(model, x, A)
    data = [((x, A), y)]
    matrix = ekfac.fisher(model, data, "ekfac")
    assert relative_error(matrix.trace(), expected.trace()) < 1e-10
    for structure in ("dense", "diagonal"):
        found = ekfac.fisher(model, data, structure)
        assert relative_error(found.trace(), expected.trace()) < 1e-10


@pytest.mark.parametrize("count", [7, 12])
def test_batch_statistics_are_taken_apart_one_by_one(count):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Tanh(),
        nn.Linear(5, 3),
    )
    x, y = torch.randn(count, 3), torch.randint(3, (count,))
    expected = dense_fisher(model, x)
    matrix = ekfac.fisher(model, [(x, y)], "ekfac")
    assert relative_error(matrix.trace(), expected.trace()) < 1e-10


# -- the rule on plain tensors ---------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 8, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_index_is_read_off_powers_of_two(size, dtype):
    generator = torch.Generator().manual_seed(size)
    index = torch.randint(size, (3 * size, 1), generator=generator)
    rows = torch.randn(3 * size, 1, 2, 4, generator=generator).to(dtype)
    factors = probe_multipliers(size).to(dtype)
    multiplied = [rows * f[index][..., None, None] for f in factors]
    result = found(rows, multiplied, size)
    assert isinstance(result, Tensor)
    assert torch.equal(result, index)
    mixed = [rows * (f[index] + f[index.roll(1)])[..., None, None] for f in factors]
    assert isinstance(found(2 * rows, mixed, size), str) or size == 2


def test_shapes_that_are_confirmed_need_no_index():
    rows = torch.randn(4, 3, 1, 2)
    for n, s, size in ((4, 3, 4), (3, 4, 4), (12, 1, 4), (4, 4, 4)):
        index = by_shape(n, s, size)
        assert index is not None
        rows = torch.randn(n, s, 1, 2)
        multiplied = [rows * f[index][..., None, None] for f in probe_multipliers(size)]
        assert found(rows, multiplied, size) is None
    assert by_shape(7, 3, 5) is None


SIZES = (9, 16, 24, 64, 71)


def noisy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradients with the rounding of a few operations."""
    rounding = torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0
    return (rows * (1 + rounding * torch.randn_like(rows))).to(dtype)


def is_confirmed(index: Tensor, size: int, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether rows of the examples ``index`` ``[n, s]`` pass for the shape's."""
    rows = torch.randn(*index.shape, 1, 3)
    multiplied = rows * unlike_multipliers(size)[index][..., None, None]
    return confirmed(noisy(rows, dtype), noisy(multiplied, dtype), size)


def suggested(n: int, s: int, size: int) -> Tensor:
    index = by_shape(n, s, size)
    assert index is not None
    return index


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_pass_confirms_the_shape(size, dtype):
    """In bfloat16 examples of few elements may be too inexact: then digits tell."""
    torch.manual_seed(size)
    for n, s in ((size, 5), (5, size), (7 * size, 1), (2 * size, 3), (size, size)):
        if dtype != torch.bfloat16 or size <= 24:
            assert is_confirmed(suggested(n, s, size), size, dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("s", [1, 6, "size"])
def test_no_other_order_of_examples_is_confirmed(size, s):
    """Rolled by any number, reversed, exchanged, shuffled: found for certain."""
    torch.manual_seed(size)
    positions = size if s == "size" else s
    apart = [k for k in range(1, size) if size <= 24 or k % 8 == 0 or k in (1, 2, 7)]
    orders = [torch.arange(size).roll(k) for k in apart]
    orders += [torch.arange(size).flip(0), torch.randperm(size)]
    for pair in torch.combinations(torch.arange(size))[:: size // 8]:
        order = torch.arange(size)
        order[pair] = pair.flip(0)
        orders.append(order)
    for order in orders:
        index = order[suggested(size, positions, size)]
        assert not is_confirmed(index, size)
        assert not is_confirmed(index.reshape(-1, 1), size)


@pytest.mark.parametrize("size", SIZES)
def test_no_other_grouping_of_rows_is_confirmed(size):
    torch.manual_seed(size)
    for s in (2, 3, 8, size):
        regular = torch.arange(size).unsqueeze(1).expand(size, s)
        by_position, count = regular.t().reshape(-1, 1), size * s
        rows = torch.arange(count)
        groupings = {
            "positions major": by_position,
            "reversed": by_position.flip(0),
            "shuffled": regular.reshape(-1, 1)[torch.randperm(count)],
            "rows rolled": regular.reshape(-1, 1).roll(1),
            "rows rolled by eight": regular.reshape(-1, 1).roll(8),
            "two views": (rows // (s // 2 or 1) % size).unsqueeze(1),
            "every position its own order": torch.stack(
                [torch.randperm(size) for _ in range(s)], dim=1
            ),
            "positions rolled": torch.stack(
                [torch.arange(size).roll(k) for k in range(s)], dim=1
            ),
        }
        for name, index in groupings.items():
            if torch.equal(index, suggested(*index.shape, size)):
                continue
            assert not is_confirmed(index, size), name
    assert not is_confirmed(torch.arange(size).expand(size, size), size)


@pytest.mark.parametrize("size", SIZES)
def test_rows_without_gradient_do_not_hide_the_others(size):
    """Whatever share of the rows is silent, as behind a token that alone is read."""
    torch.manual_seed(size)
    factors = unlike_multipliers(size)
    for kept in (1, 2, size):
        silent = torch.ones(size, size, 1, 1)
        silent[:, :kept] = 0
        for index in (suggested(size, size, size), torch.arange(size).roll(8)):
            index = index if index.dim() == 2 else index[:, None].expand(size, size)
            rows = torch.randn(size, size, 1, 3) * (1 - silent)
            multiplied = rows * factors[index][..., None, None]
            right = torch.equal(index, suggested(size, size, size))
            assert confirmed(rows, multiplied, size) == right
    zeros = torch.zeros(size, 1, 1, 3)
    assert confirmed(zeros, zeros, size)


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_several_examples_are_not_confirmed(size):
    """Neither those of all, as of a position embedding, nor of pairs."""
    torch.manual_seed(size)
    factors = unlike_multipliers(size)[:, None, None, None]
    own, other = torch.randn(2, size, 4, 1, 3)
    for mixed in (
        lambda f: (f * own).sum(0, keepdim=True).expand(size, 4, 1, 3),
        lambda f: f * own + f.roll(1, 0) * other,
        lambda f: f * own + 0.05 * (f * other).mean(0),
    ):
        assert not confirmed(mixed(torch.ones_like(factors)), mixed(factors), size)


def test_rows_are_arranged_with_those_of_their_example():
    index = torch.tensor([[2], [0], [2], [-1], [0], [0]])
    t = torch.arange(6.0).reshape(6, 1, 1)
    (out,), rows = arranged([t], index, 4)
    assert out[..., 0].tolist() == [[1, 4, 5], [0, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert rows.sum(1).tolist() == [3, 0, 2, 0]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("source", ["optimizer", "estimate"])
def test_ignored_examples_leave_the_factors_in_every_layout(layout, source, count):
    """The inputs of examples whose target is ignored are not in ``A``."""
    torch.manual_seed(1)
    model = Layouts(layout)
    x, y = problem(count)
    y[[1, 4]] = -100
    kept = x[y != -100].flatten(0, 1)
    rows = torch.cat([kept, torch.ones(len(kept), 1)], dim=1)
    expected = rows.mT @ rows / len(rows)
    if source == "estimate":
        matrix: Any = ekfac.fisher(
            model, [(x, y)], {"a": "kfac", nn.Module: "diagonal"}
        )
        A = matrix.blocks["a"].factor("A")
    else:
        optimizer = KFAC(model, factor_interval=1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        A = optimizer.curvature["a"].A
    assert relative_error(A.squeeze(0), expected) < 1e-10


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("Optimizer", [EKFAC, KFAC])
def test_a_micro_batch_of_no_sequences_adds_nothing(Optimizer, fisher):
    """The parameters move as they do without it, bit for bit."""

    def trained(empty: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.randn(4, 5, 3), torch.randint(2, (4, 5))
        optimizer = Optimizer(model, fisher=fisher, loss_reduction="sum")
        for _ in range(2):
            optimizer.zero_grad()
            for part in (slice(0, 4), slice(0, 0)) if empty else (slice(0, 4),):
                outputs = model(x[part]).movedim(-1, 1)
                F.cross_entropy(outputs, y[part], reduction="sum").backward()
            optimizer.step()
        return list(model.parameters())

    for a, b in zip(trained(True), trained(False), strict=True):
        assert torch.equal(a, b)
