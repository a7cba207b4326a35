"""Models that change after the optimizer was constructed.

Either the changed layer is covered, and its factors are those of the algebra below, or
one warning says how it is trained; ``describe()`` agrees with what happens.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import parametrizations, parametrize, prune

from ekfac import EKFAC, KFAC
from ekfac.errors import EkfacWarning
from ekfac.optim.optimizer import KroneckerOptimizer

Change = Callable[[nn.Module, KroneckerOptimizer], None]
PLAIN: dict[str, Any] = {"factor_decay": 0.0, "factor_interval": 1, "lr": 1e-3}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 11), nn.Tanh(), nn.Linear(11, 10)).double()


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(16) % 10


def train(model: nn.Module, optimizer: KroneckerOptimizer, steps: int) -> None:
    x, y = data(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]


def expected_factors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return A and G of a Linear, Tanh, Linear network, by hand."""
    (_, first), (_, last) = linears(model)
    x, y = data(first.weight.dtype)
    with torch.no_grad():
        h = torch.tanh(linear(x, first.weight, first.bias))
        logits = linear(h, last.weight, last.bias)
        target = torch.nn.functional.one_hot(y, logits.shape[1])
        g2 = torch.softmax(logits, 1) - target
        g1 = (g2 @ last.weight) * (1 - h**2)
        result = []
        for a, g in ((x, g1), (h, g2)):
            a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
            result.append((a.T @ a / len(a), g.T @ g / len(g)))
    return result


def add(optimizer: KroneckerOptimizer, *modules: nn.Module) -> None:
    every = [p for module in modules for p in module.parameters()]
    optimizer.add_param_group({"params": every})


def exchange_head(model: Any, optimizer: KroneckerOptimizer) -> None:
    model[2] = nn.Linear(11, 13).double()
    add(optimizer, model[2])


def exchange_first(model: Any, optimizer: KroneckerOptimizer) -> None:
    model[0] = nn.Linear(12, 11).double()
    add(optimizer, model[0])


def widen_by_parameter(model: Any, optimizer: KroneckerOptimizer) -> None:
    old = model[2]
    rows = torch.randn(3, 11, dtype=torch.float64)
    old.weight = nn.Parameter(torch.cat([old.weight.data, rows]))
    old.bias = nn.Parameter(torch.cat([old.bias.data, torch.zeros(3).double()]))
    add(optimizer, old)


def widen_in_place(model: Any, optimizer: KroneckerOptimizer) -> None:
    old = model[2]
    rows = torch.randn(3, 11, dtype=torch.float64)
    old.weight.data = torch.cat([old.weight.data, rows])
    old.bias.data = torch.cat([old.bias.data, torch.zeros(3).double()])


def rename(model: Any, optimizer: KroneckerOptimizer) -> None:
    model.insert(1, nn.Identity())


def nest(model: Any, optimizer: KroneckerOptimizer) -> None:
    model[2] = nn.Sequential(model[2])


def swap_names(model: Any, optimizer: KroneckerOptimizer) -> None:
    """A new first layer under the old one's name, which moves to another."""
    model.insert(0, nn.Identity())
    model[0], model[1] = model[1], nn.Identity()


def cast(model: Any, optimizer: KroneckerOptimizer) -> None:
    model.float()


CHANGES: list[Change] = [
    exchange_head,
    exchange_first,
    widen_by_parameter,
    widen_in_place,
    rename,
    nest,
    swap_names,
    cast,
]


@pytest.mark.parametrize("make", [KFAC, EKFAC], ids=lambda make: make.__name__)
@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_layers_are_covered(
    change: Change, scaling: str, make: type[KroneckerOptimizer]
) -> None:
    model = network()
    options: dict[str, Any] = {} if make is KFAC else {"scaling": scaling}
    optimizer = make(model, **PLAIN, **options)
    train(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkfacWarning)
        change(model, optimizer)
        train(model, optimizer, 2)
        found = expected_factors(model)  # before the next step moves the weights
        train(model, optimizer, 1)
    names = [name for name, _ in linears(model)]
    assert list(optimizer.curvature) == names or set(optimizer.curvature) == set(names)
    assert {row.layer for row in optimizer.describe().rows} == set(names)
    for name, (a, g) in zip(names, found, strict=True):
        layer = optimizer.curvature[name]
        assert layer.A is not None
        assert layer.G is not None
        tolerance = 1e-9 if a.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(layer.A[0], a, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.G[0], g, rtol=tolerance, atol=tolerance)
    handles = [len(m._forward_hooks) for _, m in linears(model)]
    assert handles == [1, 1]


@pytest.mark.parametrize("change", [rename, nest])
def test_a_new_name_leaves_the_training_as_it_is(change: Change) -> None:
    found = []
    for renames in (False, True):
        model = network()
        optimizer = EKFAC(model, lr=1e-3)
        train(model, optimizer, 5)
        if renames:
            change(model, optimizer)
        train(model, optimizer, 1)
        found.append([p.detach().clone() for p in model.parameters()])
    # At the step itself: later ones may refresh in another order.
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def pruned(model: Any) -> list[nn.Parameter]:
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    return []


def weight_normed(model: Any) -> list[nn.Parameter]:
    parametrizations.weight_norm(model[0])
    return list(model[0].parametrizations.parameters())


def old_weight_normed(model: Any) -> list[nn.Parameter]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[0])
    return [model[0].weight_g, model[0].weight_v]


def spectral_normed(model: Any) -> list[nn.Parameter]:
    parametrizations.spectral_norm(model[0])
    return []


def parametrised(model: Any) -> list[nn.Parameter]:
    parametrize.register_parametrization(model[0], "weight", Half())
    return []


@pytest.mark.parametrize(
    "change",
    [pruned, weight_normed, old_weight_normed, spectral_normed, parametrised],
    ids=lambda change: change.__name__,
)
def test_weights_that_are_computed_are_trained_as_by_adamw(
    change: Callable[[Any], list[nn.Parameter]],
) -> None:
    model = network()
    optimizer = EKFAC(model, lr=1e-3, weight_decay=0.0)
    train(model, optimizer, 3)
    torch.manual_seed(1)
    new = change(model)
    twin: Any = network()
    copied = EKFAC(twin, lr=1e-3, weight_decay=0.0)
    train(twin, copied, 3)
    copied.close()
    torch.manual_seed(1)
    change(twin)
    torch.manual_seed(1)

    def go_on() -> None:
        if new:
            optimizer.add_param_group({"params": new})
        train(model, optimizer, 1)

    with pytest.warns(EkfacWarning, match=r"as AdamW would") as record:
        go_on()
    assert len([w for w in record if w.category is EkfacWarning]) == 1
    rows = {row.layer: row.method for row in optimizer.describe().rows}
    assert rows.pop("2") == "EKFAC"
    assert rows
    assert set(rows.values()) == {"AdamW-like"}
    reference = torch.optim.AdamW(twin[0].parameters(), lr=1e-3, weight_decay=0.0)
    x, y = data()
    twin.zero_grad()
    cross_entropy(twin(x), y).backward()
    reference.step()
    for (name, one), two in zip(
        twin[0].named_parameters(), model[0].parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9, msg=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkfacWarning)
        train(model, optimizer, 3)


def test_pruning_that_is_made_permanent_is_covered_again() -> None:
    model = network()
    optimizer = EKFAC(model, **PLAIN)
    train(model, optimizer, 2)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    with pytest.warns(EkfacWarning, match="as AdamW would"):
        train(model, optimizer, 1)
    prune.remove(model[0], "weight")
    train(model, optimizer, 2)
    found = expected_factors(model)
    train(model, optimizer, 1)
    for name, (a, g) in zip(("0", "2"), found, strict=True):
        layer = optimizer.curvature[name]
        assert layer.A is not None
        torch.testing.assert_close(layer.A[0], a)
        assert layer.G is not None
        torch.testing.assert_close(layer.G[0], g)


@pytest.mark.parametrize("assign", [False, True])
def test_parameters_that_were_not_given_are_named(assign: bool) -> None:
    model = network()
    optimizer = EKFAC(model, lr=1e-3)
    train(model, optimizer, 2)
    if assign:
        state = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        names = r"\['0.weight', '0.bias', '2.weight', '2.bias'\]"
    else:
        model[2] = nn.Linear(11, 10).double()
        names = r"\['2.weight', '2.bias'\]"
    with pytest.warns(EkfacWarning, match=rf"{names}.*add_param_group"):
        train(model, optimizer, 1)
    listed = {row.layer for row in optimizer.describe().rows}
    assert listed == (set() if assign else {"0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkfacWarning)
        train(model, optimizer, 1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12)
        self.two.weight = self.one.weight
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("way", ["untie", "tie"])
def test_weights_tied_and_untied(way: str) -> None:
    torch.manual_seed(0)
    model = Tied().double()
    own = nn.Parameter(model.one.weight.detach().clone())
    if way == "tie":
        model.two.weight = own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)
        optimizer = EKFAC(model, **PLAIN)
        train(model, optimizer, 2)
        if way == "untie":
            model.two.weight = own
            optimizer.add_param_group({"params": [own]})
        else:
            model.two.weight = model.one.weight
        train(model, optimizer, 2)
    uses = {n: len(layer.block.uses) for n, layer in optimizer.curvature.items()}
    if way == "untie":
        assert uses == {"one": 1, "two": 1, "head": 1}
    else:
        assert uses == {"one": 2, "head": 1}
    assert all(layer.ready for layer in optimizer.curvature.values())


def test_a_graph_from_before_the_change_brings_nothing() -> None:
    model: Any = network()
    optimizer = EKFAC(model, lr=1e-3)
    train(model, optimizer, 2)
    x, y = data()
    optimizer.zero_grad()
    loss = cross_entropy(model(x), y)
    exchange_head(model, optimizer)
    loss.backward()
    optimizer.step()
    train(model, optimizer, 2)
    assert optimizer.curvature["2"].block.shape == (1, 13, 12)


def test_a_state_saved_after_the_change_loads_into_the_changed_model() -> None:
    model = network()
    optimizer = EKFAC(model, lr=1e-3)
    train(model, optimizer, 2)
    exchange_head(model, optimizer)
    train(model, optimizer, 3)
    other: Any = network()
    other[2] = nn.Linear(11, 13).double()
    other.load_state_dict(model.state_dict())
    fresh = EKFAC(
        [
            {"params": [*other[0].parameters(), *network()[2].parameters()]},
            {"params": list(other[2].parameters())},
        ],
        lr=1e-3,
        model=other,
    )
    fresh.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2)
    train(other, fresh, 2)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_layer_that_is_not_called_is_described_as_trained_by_adamw() -> None:
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(12, 12) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            b = (h.unsqueeze(1) * self.b.weight).sum(-1)  # no operation with a block
            return self.c(torch.tanh(b + self.b.bias))

    model = Uses().double()
    optimizer = EKFAC(model, lr=1e-3)
    assert {row.method for row in optimizer.describe().rows} == {"EKFAC"}
    reason = r"  b \(torch.nn.Linear: it is not called.*; call the module"
    with pytest.warns(EkfacWarning, match=reason):
        train(model, optimizer, 3)
    methods = {row.layer: row.method for row in optimizer.describe().rows}
    assert methods == {"a": "EKFAC", "b": "AdamW-like", "c": "EKFAC"}


def test_what_is_frozen_or_left_out_later_is_described_so() -> None:
    """As it moves: a step leaves these parameters bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)), nn.LayerNorm(12))
    model.register_parameter("lone", nn.Parameter(torch.zeros(3, 3, 3)))
    optimizer = EKFAC(model, lr=1e-2)

    def train() -> None:
        optimizer.zero_grad()
        loss = model(torch.randn(16, 12)).square().sum()
        (loss + model.lone.exp().sum()).backward()
        optimizer.step()

    train()
    optimizer.zero_grad()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model.lone.requires_grad_(False)
    out = [id(p) for p in model[2].parameters()]
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in out]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    train()
    stays = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert stays == {"0.weight", "0.bias", "1.bias", "2.weight", "2.bias", "lone"}
    rows = {row.layer: row for row in optimizer.describe().rows}
    frozen, left_out = "requires_grad is False", "in no param group any more"
    for name, why in (("0", frozen), ("2", left_out), ("lone", frozen)):
        assert (rows[name].method, rows[name].reason) == ("not trained", why)
    assert rows["1"].method == "EKFAC"
    assert rows["1"].reason.endswith(f"1.bias is not trained: {frozen}")
    assert rows["3"].method == "exact"


@pytest.mark.parametrize("rank", [None, 8])
def test_memory_of_layers_that_are_gone_is_free(rank: int | None) -> None:
    """Of all tensors, those of the working buffers included."""
    kinds = (Tensor, nn.Parameter)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 907), nn.Tanh(), nn.Linear(907, 10)).double()
    optimizer = EKFAC(model, rank=rank)
    train(model, optimizer, 3)
    model[0], model[2] = nn.Linear(12, 11).double(), nn.Linear(11, 10).double()
    optimizer.param_groups.clear()
    optimizer.state.clear()
    add(optimizer, model[0], model[2])
    train(model, optimizer, 2)
    gc.collect()
    wide = [t for t in gc.get_objects() if type(t) in kinds and 907 in t.shape]
    assert not wide
