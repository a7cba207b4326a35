"""Batches of unusual kinds, and what is said of arguments that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.func import functional_call, jacrev

import ekfac

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 0, 1])


class Two(NamedTuple):
    """Named inputs, as loaders collate them."""

    first: Tensor
    second: Tensor


class Sum(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        y: Tensor = self.layer(first + second)
        return y


class Attends(nn.Module):
    """Attention whose second argument, a mask, is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.leave = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.query(x)
        y: Tensor = self.leave((h @ h.mT + mask).softmax(-1) @ h).mean(1)
        return y


class Centred(nn.Module):
    """A network in which the examples of a batch see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        y: Tensor = self.leave(h - h.mean(0))
        return y


class Around(nn.Module):
    """A model with a child that is called ``module``, as in DataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("structure", ["dense", "kfac", "diagonal", "implicit"])
def test_named_tuples_are_arguments(structure: Any) -> None:
    model = Sum()
    named = ekfac.fisher(model, [(Two(X, 2 * X), Y)], structure)
    plain = ekfac.fisher(model.layer, [(3 * X, Y)], structure)
    assert relative_error(named.to_dense(), plain.to_dense()) < 1e-5


@pytest.mark.parametrize("structure", ["dense", "low_rank", "diagonal", "implicit"])
@pytest.mark.parametrize("name", ["a mask of as many rows", "examples that meet"])
def test_examples_that_cannot_be_taken_apart(name: str, structure: Any) -> None:
    """One example alone would have other outputs."""
    mask = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    x = torch.stack([X, -X, X.sin(), X.cos()])
    args, model = ((x, mask), Attends()) if "mask" in name else ((X,), Centred())
    weights = {n: p.detach() for n, p in model.named_parameters()}
    J = jacrev(lambda w: functional_call(model, w, args))(weights)
    rows = torch.cat([part.reshape(8, -1) for part in J.values()], dim=1)
    expected = rows.mT @ rows / 4
    if structure == "diagonal":
        expected = expected.diagonal().diag()
    inputs = args if len(args) > 1 else args[0]
    found = ekfac.fisher(model, [(inputs, None)], structure, kind="l2")
    assert relative_error(found.to_dense(), expected) < 1e-5
    kernel = ekfac.ntk(model, inputs).to_dense()
    assert relative_error(kernel, rows @ rows.mT) < 1e-5


@pytest.mark.parametrize(
    "structure", ["dense", "kfac", "ekfac", "diagonal", "implicit"]
)
def test_batches_without_examples_add_nothing(structure: Any) -> None:
    model, empty = linear(), (X[:0], Y[:0])
    data = [empty, (X[:3], Y[:3]), empty, (X[3:], Y[3:])]
    whole = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    for kind in ("exact", "mc"):
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        found, expected = (
            ekfac.fisher(model, batches, structure, kind, generator=generator)
            for batches, generator in zip((data, whole), generators, strict=True)
        )
        assert torch.equal(found.to_dense(), expected.to_dense())
    loss = nn.CrossEntropyLoss(reduction="sum")
    found, expected = (ekfac.ggn(model, b, loss, structure) for b in (data, whole))
    assert torch.equal(found.to_dense(), expected.to_dense())


def test_hessians_pass_over_batches_without_examples() -> None:
    model, loss = linear(), nn.CrossEntropyLoss()
    data = [(X[:0], Y[:0]), (X, Y)]
    for structure in ("dense", "implicit"):
        found = ekfac.hessian(model, data, loss, structure).to_dense()
        expected = ekfac.hessian(model, data[1:], loss, structure).to_dense()
        assert torch.equal(found, expected)


DATA = [(X, Y)]
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no data": (lambda: ekfac.fisher(linear(), None), TypeError, "got None; pass a"),  # type: ignore[arg-type]
    "a number": (lambda: ekfac.fisher(linear(), 3.0), TypeError, "got 3.0; pass a"),  # type: ignore[arg-type]
    "no examples": (
        lambda: ekfac.fisher(linear(), [(X[:0], Y[:0])]),
        ValueError,
        "no batches with examples",
    ),
    "kernel of nothing": (
        lambda: ekfac.ntk(linear(), X[:0]),
        ValueError,
        "one example or more",
    ),
    "structure list": (
        lambda: ekfac.fisher(linear(), DATA, ["kfac"]),  # type: ignore[arg-type]
        ValueError,
        r"structure must be one of .*, got \['kfac'\]",
    ),
    "samples": (
        lambda: ekfac.fisher(linear(), DATA, "kfac", "mc", samples=2.5),  # type: ignore[arg-type]
        ValueError,
        "samples must be an integer, at least 1, got 2.5",
    ),
    "power": (
        lambda: ekfac.fisher(linear(), DATA, "dense").power(float("inf"), 1.0),
        ValueError,
        "exponent must be finite, got inf",
    ),
    "scalar": (
        lambda: ekfac.fisher(linear(), DATA, "ekfac") * float("nan"),
        ValueError,
        "finite number, got nan",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_said(name: str) -> None:
    function, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        function()


@pytest.mark.parametrize(
    ("wrapped", "prefix"),
    [
        (Around, "module."),
        (lambda inner: nn.DataParallel(Around(inner)), "module."),
        (lambda inner: torch.compile(Around(inner), backend="eager"), "module."),
        (nn.DataParallel, ""),
        (lambda inner: nn.Sequential(checkpoint_wrapper(inner)), "0."),
    ],
)
def test_wrappers_do_not_show_and_children_do(
    wrapped: Callable[[nn.Module], nn.Module], prefix: str
) -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model, names = wrapped(inner), [f"{prefix}0", f"{prefix}2"]
    for structure in ("ekfac", "quasi_diagonal", "block_diagonal"):
        found = ekfac.fisher(model, [(X, Y)], structure)
        expected = ekfac.fisher(inner, [(X, Y)], structure)
        assert list(found.blocks) == names
        assert torch.equal(found.to_dense(), expected.to_dense())
    H = ekfac.hessian(model, [(X, Y)], nn.CrossEntropyLoss(), "block_diagonal")
    assert list(H.blocks) == names
    assert list(ekfac.ntk(model, X, layerwise=True)) == names
    with ekfac.EKFAC(model) as optimizer:
        assert list(optimizer.curvature) == names
