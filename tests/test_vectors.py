"""Vectors of parameter space and of function space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)

from ekfac import EKFAC
from ekfac.errors import StateMismatchError
from ekfac.layers import find_blocks
from ekfac.vectors import (
    FunctionVector,
    ParameterVector,
    VectorSpace,
    named_modules,
    named_parameters,
)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def vector(seed: int = 0) -> ParameterVector:
    generator = torch.Generator().manual_seed(seed)
    return ParameterVector.from_model(model().double()).random_like(generator)


@settings(max_examples=20)
@given(a=st.floats(-10, 10), b=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_the_algebra_is_that_of_flat_tensors(a, b, seed):
    u, v = vector(seed), vector(seed + 1)
    x, y = u.flat(), v.flat()
    pairs = [
        (u + v, x + y),
        (u - v, x - y),
        (-u, -x),
        (a * u, a * x),
        (u * a, a * x),
        (u / b, x / b),
        (u * v, x * y),
        (u / v, x / y),
        (torch.tensor(a, dtype=torch.float64) * u, a * x),
    ]
    for actual, expected in pairs:
        assert type(actual) is ParameterVector
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual.flat(), expected, rtol=1e-15, atol=0)
    torch.testing.assert_close(u.dot(v), x @ y)
    torch.testing.assert_close(u.norm(), x.norm())


def test_flat_order_is_that_of_named_parameters():
    net = model()
    v = ParameterVector.from_model(net)
    assert list(v) == [name for name, _ in net.named_parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert torch.equal(v.flat(), flat)
    back = ParameterVector.from_flat(flat, like=v)
    assert all(torch.equal(back[name], v[name]) for name in v)
    assert torch.equal(v.space.flat(v), flat)
    again = VectorSpace.of(net).vector(flat)
    assert type(again) is ParameterVector
    assert again.space == v.space


def test_from_model_copies_what_is_trained():
    net = model()
    net[0].bias.requires_grad_(False)
    v = ParameterVector.from_model(net)
    assert list(v) == ["0.weight", "2.weight"]
    v["0.weight"].zero_()
    assert net[0].weight.abs().max() > 0
    assert list(ParameterVector.from_model(net, "0.bias")) == ["0.bias"]
    twice = np.float64(2) * v
    torch.testing.assert_close(twice.flat(), 2 * v.flat())
    chosen = ParameterVector.from_model(net, ["0.bias"])
    assert list(chosen) == ["0.bias"]
    assert not chosen["0.bias"].requires_grad
    with pytest.raises(
        StateMismatchError, match=r"no parameters 'nope'; it has '0\.wei"
    ):
        ParameterVector.from_model(net, ["nope"])


def test_from_grad_is_zero_where_there_is_none():
    net = model()
    net[2](torch.ones(1, 4)).sum().backward()
    g = ParameterVector.from_grad(net)
    assert torch.equal(g["2.weight"], net[2].weight.grad)
    assert g["0.weight"].abs().max() == 0
    g["2.weight"].zero_()
    assert net[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers_do_not_show(wrap):
    net = model()
    assert list(ParameterVector.from_model(wrap(net))) == list(named_parameters(net))


def test_a_wrapped_child_does_not_show_either():
    net = model()
    names = list(named_parameters(net))
    net[0] = torch.compile(net[0])
    assert list(named_parameters(net)) == names


def test_a_child_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert list(named_parameters(Holder())) == ["module.weight", "module.bias"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"0.weight": torch.ones(4, 3)}, "it lacks '0.bias', '2.weight'"),
        ({**vector(), "x": torch.ones(1)}, "it has 'x', unknown here"),
        ({**vector(), "0.bias": torch.ones(5)}, r"its '0.bias' is \[5\], not \[4\]"),
    ],
)
def test_vectors_of_different_models_do_not_mix(other, message):
    v, other = vector(), ParameterVector(other)
    for mix in (v.__add__, v.__sub__, v.__mul__, v.dot):
        with pytest.raises(StateMismatchError, match=message):
            mix(other)


def test_order_of_the_names_does_not_matter():
    u, v = vector(), vector(1)
    shuffled = v.subset(reversed(list(v)))
    assert torch.equal((u + shuffled).flat(), (u + v).flat())
    assert list(shuffled + u) == list(shuffled)
    assert torch.equal(u.space.flat(shuffled), v.flat())


def test_only_vectors_add():
    with pytest.raises(TypeError):
        vector() + 1.0
    with pytest.raises(TypeError):
        vector() - torch.ones(3)
    with pytest.raises(TypeError, match=r"a tensor of shape \[24\]; make it a vector"):
        vector() * torch.ones(24)


def test_random_like_follows_the_generator():
    v = vector()
    draws = [v.random_like(torch.Generator().manual_seed(s)).flat() for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].dtype == torch.float64


def test_conversions():
    v = vector()
    assert v.to(dtype=torch.float32).dtype == torch.float32
    assert v.dtype == torch.float64
    assert v.device == torch.device("cpu")
    clone = v.clone()
    clone["0.bias"].zero_()
    assert v["0.bias"].abs().max() > 0


def test_gradients_flow_and_detach_stops_them():
    net = model()
    live = ParameterVector(dict(net.named_parameters()))
    anchor = live.detach().clone()
    (live - 2.0 * anchor).dot(live - 2.0 * anchor).backward()
    assert torch.allclose(net[0].weight.grad, -2 * net[0].weight.detach())
    assert not live.detach()["0.weight"].requires_grad


def test_equality_is_identity():
    v = vector()
    assert v == v
    assert v != vector()
    assert {v: 1}[v] == 1


def test_bad_constructions():
    with pytest.raises(ValueError, match="needs a tensor, got none"):
        ParameterVector({})
    with pytest.raises(StateMismatchError, match=r"shape \[24\], got \[3\]"):
        ParameterVector.from_flat(torch.ones(3), vector())
    with pytest.raises(ValueError, match=r"one \[n, c\] tensor, got \[3\]"):
        FunctionVector(torch.ones(3))


def test_function_vectors():
    outputs = torch.arange(6.0).view(3, 2)
    f = FunctionVector(outputs)
    assert torch.equal(f.flat(), torch.arange(6.0))
    assert torch.equal((2 * f).outputs, 2 * outputs)
    assert type(f + f) is FunctionVector
    assert torch.equal(FunctionVector.from_flat(f.flat(), f).outputs, outputs)
    with pytest.raises(StateMismatchError, match="lacks 'outputs'"):
        f + ParameterVector({"w": outputs})


def test_spaces():
    space = vector().space
    assert space == VectorSpace.of(vector(1))
    assert hash(space) == hash(VectorSpace.of(vector(1)))
    assert space != space.subspace(["0.bias"])
    assert space != "a space"
    assert space.subspace(["2.weight", "0.bias"]).size == 12
    assert "size=24" in repr(space)
    rows = torch.randn(5, 24)
    assert torch.equal(space.join(space.split(rows)), rows)
    many = VectorSpace({str(i): (1,) for i in range(9)})
    with pytest.raises(StateMismatchError, match="'0', '1', '2', '3' and 5 more"):
        many.require({"x": torch.ones(1)})


def test_repr_shows_names_and_shapes():
    assert (
        repr(ParameterVector({"w": torch.ones(2, 3)})) == "ParameterVector(w: [2, 3])"
    )


class _Named(nn.Module):
    """Layers that are named as the attributes of wrappers are."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 4)
        self.my_orig_mod = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        self._orig_mod = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._orig_mod(self.my_orig_mod(self.module(x)))
        return out


def test_wrappers_are_told_by_what_they_are_not_by_names() -> None:
    own = _Named()
    plain = list(dict(own.named_parameters()))
    layers = ["module", "my_orig_mod.0", "my_orig_mod.1", "_orig_mod"]
    part = _Named()
    inner = torch.compile(part.my_orig_mod[0], backend="eager")
    part.my_orig_mod[0] = checkpoint_wrapper(inner)  # type: ignore[assignment]
    around = nn.DataParallel(torch.compile(_Named(), backend="eager"))
    for wrapped in (own, part, around, nn.DataParallel(part)):
        assert list(named_parameters(wrapped)) == plain
        parameters = list(wrapped.parameters())
        blocks = find_blocks(wrapped, parameters, 99).blocks
        assert [block.name for block in blocks] == layers
        assert [n for block in blocks for n in block.parameters] == plain
        assert set(layers) < set(named_modules(wrapped))
    optimizer = EKFAC(own)
    own(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert set(optimizer.curvature) == set(layers)
    assert list(optimizer.curvature.matrix(parameters=own).space.names) == plain
