"""Batches of unusual kinds, and what is said of arguments that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
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
    "a structure as the loss": (
        lambda: ekfac.ggn(linear(), DATA, "ekfac"),  # type: ignore[arg-type]
        TypeError,
        "got 'ekfac'; pass the structure after it",
    ),
    "a loss of nothing": (
        lambda: ekfac.ggn(linear(), DATA, lambda outputs, y: torch.tensor(1.0)),
        ValueError,
        r"not depend on the outputs, for batch 0; .* without detach\(\)",
    ),
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
    "fallback": (
        lambda: ekfac.fisher(linear(), DATA, fallback="ekfac"),
        ValueError,
        "fallback must be one of .*, got 'ekfac'",
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


HALF: dict[torch.dtype, float] = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", HALF)
def test_models_in_half_precision_have_matrices_in_single(dtype: torch.dtype) -> None:
    """Against the same network with its rounded weights, computed in double."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    x = X.to(dtype)
    double = copy.deepcopy(half).double()

    def estimates(model: nn.Module, x: Tensor) -> Iterator[tuple[str, Any]]:
        mixed: Any = {nn.Linear: "kfac", "2": "block_diagonal"}
        for structure in ("dense", "low_rank", "diagonal", "implicit", mixed):
            yield f"{structure}", ekfac.fisher(model, [(x, Y)], structure)
        loss = nn.CrossEntropyLoss()
        for structure in ("dense", "implicit"):
            yield "GGN", ekfac.ggn(model, [(x, Y)], loss, structure)
            yield "Hessian", ekfac.hessian(model, [(x, Y)], loss, structure)
            yield "kernel", ekfac.ntk(model, x, structure=structure)

    exact = estimates(double, x.double())
    for (name, found), (_, expected) in zip(estimates(half, x), exact, strict=True):
        assert found.dtype == torch.float32, name
        dense = found.to_dense()
        assert dense.dtype == torch.float32
        assert relative_error(dense.double(), expected.to_dense()) < HALF[dtype], name
        assert found.eigenvalues().isfinite().all()
        v = torch.ones(found.size, dtype=dtype)
        assert (found @ v).dtype == torch.float32


@pytest.mark.parametrize("structure", ["dense", "kfac", "ekfac", "implicit"])
def test_inference_mode_does_not_matter(structure: Any) -> None:
    model = linear()
    expected = ekfac.fisher(model, [(X, Y)], structure).to_dense()
    kernel = ekfac.ntk(model, X).to_dense()
    with torch.inference_mode():
        made_here = X + 0
        found = ekfac.fisher(model, [(made_here, Y)], structure).to_dense()
        J = ekfac.jacobian(model, made_here)
        torch.testing.assert_close(found, expected)
        product = J @ (J.T @ torch.eye(J.shape[0]))
        torch.testing.assert_close(product, kernel)


@pytest.mark.parametrize("structure", ["dense", "block_diagonal", "ekfac"])
def test_sums_under_autocast_are_in_single_precision(structure: Any) -> None:
    """The model's own passes are in half; nothing else is."""
    model = linear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ekfac.fisher(model, [(X, Y)], structure)
        half = ekfac.fisher(model, [(X, Y)], "low_rank").to_dense()
    expected = ekfac.fisher(model, [(X, Y)], structure).to_dense()
    assert found.dtype == half.dtype == torch.float32
    assert relative_error(found.to_dense(), expected) < 1e-2
    if structure == "dense":
        torch.testing.assert_close(found.to_dense(), half, rtol=1e-5, atol=1e-7)


class OneNumber(nn.Module):
    """A regression model with outputs ``[N]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x).squeeze(-1)
        return y


def test_outputs_without_classes() -> None:
    model, y = OneNumber(), X[:, 0]
    loss = nn.MSELoss(reduction="sum")
    found = ekfac.fisher(model, [(X, y)], "dense", "empirical", loss_fn=loss)
    inputs = torch.cat([X, torch.ones(4, 1)], dim=1)
    rows = 2 * (model(X) - y).detach()[:, None] * inputs
    torch.testing.assert_close(found.to_dense(), rows.mT @ rows / 4)
    for structure in ("dense", "kfac", "implicit"):
        with pytest.raises(ValueError, match=r"\[4\]; use 'bernoulli' .*'gaussian'"):
            ekfac.fisher(model, [X], structure).trace()
    # The default optimizer does not ask for a likelihood.
    with ekfac.EKFAC(model) as optimizer:
        nn.functional.mse_loss(model(X), y).backward()
        optimizer.step()
        G = optimizer.curvature["layer"].G
        torch.testing.assert_close(G, rows[:, 3:].square().mean().reshape(1, 1, 1))


def test_models_without_values_are_refused() -> None:
    model = nn.Linear(3, 2, device="meta")
    for estimate in (ekfac.fisher, ekfac.jacobian, ekfac.ntk):
        with pytest.raises(ValueError, match=r"'weight', 'bias'.* on the meta device"):
            estimate(model, [X])
