"""Targets, losses, loaders and models that an estimate meets, judged by torch.func."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
)

import ekfac
from ekfac.continual import QuadraticPenalty
from ekfac.errors import EkfacWarning, UnsupportedOperationError
from ekfac.likelihoods import Categorical

pytestmark = pytest.mark.usefixtures("float64")


def dense_ggn(model: nn.Module, x: Tensor, loss: Any) -> Tensor:
    """Return ``J^T H J`` of a sum of losses, ``H`` by torch.func."""
    named = {n: p.detach() for n, p in model.named_parameters()}

    def outputs(parameters: Any) -> Tensor:
        return functional_call(model, parameters, (x,)).flatten()

    J = torch.func.jacrev(outputs)(named)
    flat = torch.cat([j.reshape(len(j), -1) for j in J.values()], dim=1)
    shape = model(x).shape
    H = torch.func.hessian(lambda f: loss(f.reshape(shape)))(
        model(x).detach().flatten()
    )
    return flat.mT @ H @ flat


def sequence() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Conv1d(4, 3, 1), torch.randn(6, 4, 5), torch.randint(3, (6, 5))


@pytest.mark.parametrize("structure", ["dense", "ekfac", "implicit"])
@pytest.mark.parametrize("ignored", [-100, 255])
def test_targets_say_which_dimension_holds_the_classes(structure, ignored):
    model, x, y = sequence()
    y[0, 3:] = y[2] = ignored
    loss = functools.partial(
        F.cross_entropy, target=y, reduction="sum", ignore_index=ignored
    )
    expected = dense_ggn(model, x, loss) / 5
    kind = Categorical(ignore_index=ignored)
    found = ekfac.fisher(model, [(x, y)], structure, likelihood=kind)
    if structure == "ekfac":
        assert relative_error(found.trace(), expected.trace()) < 1e-12
    else:
        assert relative_error(found.to_dense(), expected) < 1e-12


def test_images_and_classes_last():
    model, y = nn.Conv2d(2, 3, 1), torch.randint(3, (4, 3, 2))
    x = torch.randn(4, 2, 3, 2)
    expected = dense_ggn(model, x, lambda f: F.cross_entropy(f, y, reduction="sum")) / 4
    found = ekfac.fisher(model, [(x, y)], "dense").to_dense()
    assert relative_error(found, expected) < 1e-12
    last, y = nn.Linear(4, 3), torch.randint(3, (6, 5))
    x = torch.randn(6, 5, 4)

    def loss(f: Tensor) -> Tensor:
        return F.cross_entropy(f.flatten(0, 1), y.flatten(), reduction="sum")

    for targets in (y, y.flatten()):
        found = ekfac.fisher(last, [(x, targets)], "dense").to_dense()
        assert relative_error(found, dense_ggn(last, x, loss) / 6) < 1e-12


def test_a_square_of_positions_and_classes_is_said():
    model, x, y = nn.Conv1d(4, 5, 1), torch.randn(6, 4, 5), torch.randint(5, (6, 5))
    with pytest.warns(EkfacWarning, match="classes in dimension 1 or 2"):
        ekfac.fisher(model, [(x, y)], "dense")
    ekfac.fisher(model, [(x, y)], "dense", likelihood=Categorical(class_dim=1))


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1, 2, 0]), "do not fit"),
        (torch.tensor([0, 1, 255, 2, 255, 0]), "from 0 to 255.*classes 0 to 2"),
        (torch.tensor([0, -1, 1, 2, 1, 0]), "ignore_index"),
    ],
)
def test_targets_that_contradict_the_outputs_are_refused(kind, targets, message):
    with pytest.raises(ValueError, match=message):
        ekfac.fisher(nn.Linear(4, 3), [(torch.randn(6, 4), targets)], "dense", kind)


def test_the_gradient_of_a_cross_entropy_tells_the_classes():
    """It sums to zero over them, with weights, smoothing and ignored targets."""
    for shape, dim in (((5, 4, 7), 1), ((5, 7, 4), 2), ((5, 4, 3, 2), 1)):
        f = torch.randn(shape, requires_grad=True)
        sizes = [n for i, n in enumerate(shape) if i != dim]
        y = torch.randint(4, sizes)
        y[0, 0] = -100
        loss = F.cross_entropy(
            f.movedim(dim, 1), y, weight=torch.rand(4), label_smoothing=0.1
        )
        grad = torch.autograd.grad(loss, f)[0]
        kind = Categorical().fitted_to_gradient(f, grad)
        assert kind == Categorical(class_dim=dim)
    mean_squared = torch.randn(5, 4, 7)
    assert Categorical().fitted_to_gradient(mean_squared, mean_squared) == Categorical()


def test_one_rule_counts_examples():
    """Fisher, Gauss-Newton and Hessian of a linear model agree with ignored targets."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(10, 4), torch.randint(3, (10,))
    y[3:] = -100
    kept = [(x[:3], y[:3])]
    expected = ekfac.fisher(model, kept, "dense").to_dense()
    loss = nn.CrossEntropyLoss()
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        for found in (
            ekfac.fisher(model, [(x, y)], "dense"),
            ekfac.ggn(model, [(x, y)], loss, "dense"),
            ekfac.ggn(model, [(x, y)], loss, "implicit"),
            ekfac.hessian(model, [(x, y)], loss, "implicit"),
            ekfac.hessian(model, [(x, y)], loss, "dense"),
        ):
            assert relative_error(found.to_dense(), expected) < 1e-10


def test_hinge_losses_count_examples_without_a_gradient():
    """Where a margin is kept the gradient is zero, and the example counts."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(20, 4), torch.randint(3, (20,))
    with torch.no_grad():
        model.weight.mul_(10)
    loss = nn.MultiMarginLoss(reduction="mean")
    rows = []
    for i in range(20):
        grads = torch.autograd.grad(
            loss(model(x[i : i + 1]), y[i : i + 1]), [*model.parameters()]
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    rows = torch.stack(rows)
    assert (rows == 0).all(dim=1).any()
    found = ekfac.fisher(model, [(x, y)], "dense", "empirical", loss_fn=loss)
    assert relative_error(found.to_dense(), rows.mT @ rows / 20) < 1e-12


def test_weights_of_classes_are_no_mean():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    weight = torch.tensor([0.2, 1.0, 3.0])
    found = [
        ekfac.fisher(
            model,
            [(x, y)],
            "dense",
            "empirical",
            loss_fn=nn.CrossEntropyLoss(weight=weight, reduction=reduction),
        ).to_dense()
        for reduction in ("mean", "sum")
    ]
    assert relative_error(*found) < 1e-12


def test_partial_functions_say_their_reduction():
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(3, (8,))
    total = functools.partial(F.cross_entropy, reduction="sum")
    found = ekfac.ggn(model, [(x, y)], total, "dense").to_dense()
    expected = ekfac.ggn(model, [(x, y)], nn.CrossEntropyLoss(), "dense").to_dense()
    assert relative_error(found, expected) < 1e-12


def test_targets_beside_a_distribution_of_another_shape():
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    x, y = torch.randn(8, 4), torch.rand(8).round()

    def family(f: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Bernoulli(logits=f)

    found = [
        ekfac.fisher(model, [(x, t)], "dense", "empirical", family).to_dense()
        for t in (y, y[:, None])
    ]
    assert relative_error(*found) < 1e-12


# -- loaders ---------------------------------------------------------------------------


class Augmented(Dataset[Any]):
    """Noise of one of the global generators."""

    def __init__(self, x: Tensor, y: Tensor, draw: Any) -> None:
        self.x, self.y, self.draw = x, y, draw

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] * (1 + float(self.draw())), self.y[i]


def loaders() -> dict[str, DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 4, generator=generator)
    y = torch.randint(3, (23,), generator=generator)
    data, own = TensorDataset(x, y), torch.Generator().manual_seed(3)
    order = BatchSampler(RandomSampler(data, generator=own), 5, True)
    return {
        "batch sampler": DataLoader(data, batch_sampler=order),
        "numpy": DataLoader(Augmented(x, y, np.random.rand), 5),
        "python": DataLoader(Augmented(x, y, random.random), 5),
        "persistent": DataLoader(
            data,
            5,
            shuffle=True,
            drop_last=True,
            num_workers=1,
            persistent_workers=True,
        ),
    }


@pytest.mark.parametrize("name", ["batch sampler", "numpy", "python", "persistent"])
def test_passes_repeat_whatever_draws(name):
    loader = loaders()[name]
    torch.manual_seed(0)
    model, v = nn.Linear(4, 3), torch.ones(15)
    states = (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    F_implicit = ekfac.fisher(model, loader, "implicit")
    assert torch.equal(F_implicit @ v, F_implicit @ v)
    traces = [ekfac.fisher(model, loader, s).trace() for s in ("ekfac", "dense")]
    assert relative_error(*traces) < 1e-12
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


def test_data_that_change_are_refused():
    class Other:
        def __iter__(self):
            generator = torch.Generator()
            generator.seed()
            yield torch.randn(4, 4, generator=generator), torch.randint(3, (4,))

    with pytest.raises(ValueError, match="other batches at every pass"):
        ekfac.fisher(nn.Linear(4, 3), Other(), "ekfac")


# -- models ----------------------------------------------------------------------------


class Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class Detached(Marked):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (g * (ctx.saved_tensors[0] > 0)).detach()


class Differentiable(Marked):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class Net(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))


PRODUCTS = {
    "jacobian": lambda m, x, y, v: ekfac.jacobian(m, x) @ v,
    "ntk": lambda m, x, y, v: ekfac.ntk(m, x, structure="implicit").to_dense(),
    "fisher": lambda m, x, y, v: ekfac.fisher(m, [(x, y)], "implicit") @ v,
    "hessian": lambda m, x, y, v: ekfac.hessian(m, [(x, y)], F.cross_entropy) @ v,
    "dense": lambda m, x, y, v: ekfac.fisher(m, [(x, y)], "dense") @ v,
    "ekfac": lambda m, x, y, v: ekfac.fisher(m, [(x, y)], "ekfac") @ v,
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("function", [Marked, Detached, Differentiable])
def test_backwards_that_cannot_be_differentiated_are_named(name, function):
    torch.manual_seed(0)
    own, plain = Net(function.apply), Net(torch.relu)
    plain.load_state_dict(own.state_dict())
    x, y, v = torch.randn(7, 4), torch.randint(3, (7,)), torch.randn(43)
    if function is not Differentiable and name not in ("dense", "ekfac"):
        with pytest.raises(UnsupportedOperationError, match=function.__name__):
            PRODUCTS[name](own, x, y, v)
        return
    found = PRODUCTS[name](own, x, y, v)
    assert relative_error(found, PRODUCTS[name](plain, x, y, v)) < 1e-12


def test_compiled_models_are_taken_as_they_are_written():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    expected = ekfac.fisher(model, [(x, y)], "ekfac").to_dense()
    compiled: Any = torch.compile(model, backend="eager")
    for _ in range(2):
        F.cross_entropy(compiled(x), y).backward()
    with torch.no_grad():
        compiled.eval()(x)
    compiled.train()
    found = ekfac.fisher(compiled, [(x, y)], "ekfac").to_dense()
    assert relative_error(found, expected) < 1e-12
    penalty = QuadraticPenalty(compiled, "ekfac")
    penalty.consolidate([(x, y)])
    assert relative_error(penalty.matrix().to_dense(), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_classes_are_integers_of_any_type(dtype):
    torch.manual_seed(0)
    model, x, y = nn.Conv1d(4, 3, 1), torch.randn(6, 4, 5), torch.randint(3, (6, 5))
    for kind in ("exact", "empirical"):
        found = [
            ekfac.fisher(model, [(x, t)], "dense", kind).to_dense()
            for t in (y, y.to(dtype))
        ]
        assert torch.equal(*found)
