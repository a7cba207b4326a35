"""Batches and losses in all the forms of ``docs/batches_and_losses.md``.

Judged by ``torch.func`` on the concatenated data, or by gradients of single examples.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import relative_error
from torch import Tensor, nn
from torch.func import functional_call

import ekfac
from ekfac.continual import QuadraticPenalty
from ekfac.diagnostics import accuracy_of, loss_of, top_directions
from ekfac.diagnostics.hessian import HessianProducts
from ekfac.errors import UnsupportedOperationError

pytestmark = pytest.mark.usefixtures("float64")


def dense_hessian(model: nn.Module, x: Any, loss: Any) -> Tensor:
    """Return the Hessian of ``loss(model(x))`` by torch.func."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]
    point = torch.cat([p.flatten() for p in named.values()])

    def value(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        parameters = {name: part.reshape(p.shape) for (name, p), part in parts}
        return loss(functional_call(model, parameters, (x,)))

    return torch.func.hessian(value)(point)


def rows_of(model: nn.Module, losses: Any) -> Tensor:
    """Return the gradients of single losses, ``[n, P]``."""
    chosen = list(model.parameters())
    grads = [torch.autograd.grad(v, chosen, retain_graph=True) for v in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])


def classifier() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 3), torch.randn(12, 4), torch.randint(3, (12,))


def uneven(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the data in batches of five, one and the rest."""
    return [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])]


# -- mean or sum -----------------------------------------------------------------------

CE_SUM = functools.partial(F.cross_entropy, reduction="sum")
LOSSES: dict[str, Any] = {
    "lambda, mean": lambda f, y: F.cross_entropy(f, y),
    "lambda, sum": lambda f, y: F.cross_entropy(f, y, reduction="sum"),
    "partial, sum": CE_SUM,
    "module, sum": nn.CrossEntropyLoss(reduction="sum"),
    "a sum over the length": lambda f, y: CE_SUM(f, y) / len(y),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_a_mean_and_a_sum_are_told_apart(name, structure):
    model, x, y = classifier()
    expected = dense_hessian(model, x, lambda f: F.cross_entropy(f, y))
    for data in (
        [(x, y)],
        uneven(x, y),
        [(x[i : i + 1], y[i : i + 1]) for i in range(12)],
    ):
        for function in (ekfac.hessian, ekfac.ggn):
            found = function(model, data, LOSSES[name], structure).to_dense()
            assert relative_error(found, expected) < 1e-12
    if structure == "dense":
        H = HessianProducts(model, uneven(x, y), LOSSES[name])
        assert relative_error(H @ torch.eye(15), expected) < 1e-12
        rows = rows_of(model, F.cross_entropy(model(x), y, reduction="none"))
        found = ekfac.fisher(
            model, uneven(x, y), "dense", "empirical", loss_fn=LOSSES[name]
        ).to_dense()
        assert relative_error(found, rows.mT @ rows / 12) < 1e-12


def test_the_loss_of_the_data_is_read_in_the_same_way():
    model, x, y = classifier()
    expected = float(F.cross_entropy(model(x), y))
    for loss in LOSSES.values():
        assert abs(loss_of(uneven(x, y), loss)(model) - expected) < 1e-12
    y[2:5] = -100
    kept = y != -100
    hits = (model(x).argmax(1) == y)[kept].sum() / kept.sum()
    assert accuracy_of(uneven(x, y))(model) == pytest.approx(float(hits))


@pytest.mark.parametrize(
    ("loss", "reduction", "message"),
    [
        (LOSSES["lambda, mean"], "sum", "loss_reduction='sum', but loss_fn is a mean"),
        (LOSSES["lambda, sum"], "mean", "loss_reduction='mean', but loss_fn is a sum"),
        (
            lambda f, y: CE_SUM(f, y) / len(y) ** 0.5,
            None,
            "neither a mean nor a sum .* 0.707 times",
        ),
        (
            lambda f, y: (f @ f.mT).logsumexp(1).mean() + 0 * y.sum(),
            None,
            "gradient of an example depends on the others",
        ),
    ],
)
def test_losses_of_another_kind_are_refused(loss, reduction, message):
    model, x, y = classifier()
    with pytest.raises(ValueError, match=message):
        ekfac.ggn(model, [(x, y)], loss, "dense", loss_reduction=reduction)
    with pytest.raises(ValueError, match=message):
        ekfac.fisher(
            model,
            [(x, y)],
            "dense",
            "empirical",
            loss_fn=loss,
            loss_reduction=reduction,
        )


def test_a_hessian_takes_losses_of_the_whole_batch():
    model, x, y = classifier()

    def contrast(f: Tensor, y: Any = None) -> Tensor:
        return (f @ f.mT).logsumexp(1).mean()

    found = ekfac.hessian(model, [(x, y)], contrast, "dense").to_dense()
    assert relative_error(found, dense_hessian(model, x, contrast)) < 1e-12


# -- what a mean is over ---------------------------------------------------------------


def test_weights_of_classes_do_not_depend_on_the_batches():
    model, x, y = classifier()
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]))
    expected = dense_hessian(model, x, lambda f: loss(f, y))
    for structure in ("dense", "implicit"):
        for function in (ekfac.hessian, ekfac.ggn):
            found = function(model, uneven(x, y), loss, structure).to_dense()
            assert relative_error(found, expected) < 1e-12
    for structure in ("ekfac", "low_rank", "block_diagonal", "diagonal"):
        found = ekfac.ggn(model, uneven(x, y), loss, structure).trace()
        assert relative_error(found, expected.trace()) < 1e-12


@pytest.mark.parametrize("by_example", [False, True])
def test_ignored_positions_do_not_depend_on_the_batches(by_example):
    torch.manual_seed(0)
    model, x, y = nn.Conv1d(4, 3, 1), torch.randn(6, 4, 5), torch.randint(3, (6, 5))
    y[0, 1:], y[3] = -100, -100

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return CE_SUM(f, y) / len(y) if by_example else F.cross_entropy(f, y)

    expected = dense_hessian(model, x, lambda f: loss(f, y))
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    for structure in ("dense", "implicit"):
        for function in (ekfac.hessian, ekfac.ggn):
            found = function(model, data, loss, structure).to_dense()
            assert relative_error(found, expected) < 1e-12


def test_single_losses_of_a_mean_with_unknown_weights_are_refused():
    model, x, _ = classifier()
    y = torch.randn(12, 3)
    y[::3] = torch.nan

    def loss(f: Tensor, y: Tensor, mean: bool = True) -> Tensor:
        kept = ~y.isnan()
        total = ((f - y)[kept] ** 2).sum()
        return total / kept.sum() if mean else total

    with pytest.raises(ValueError, match="mean with weights"):
        ekfac.fisher(model, [(x, y)], "dense", "empirical", "gaussian", loss_fn=loss)
    own = ((model(x) - y).nan_to_num() ** 2).sum(1)
    rows = rows_of(model, own)
    found = ekfac.fisher(
        model,
        [(x, y)],
        "dense",
        "empirical",
        "gaussian",
        loss_fn=functools.partial(loss, mean=False),
    ).to_dense()
    assert relative_error(found, rows.mT @ rows / 12) < 1e-12


# -- targets ---------------------------------------------------------------------------


def one_output(flat: bool) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(4, 1)
    return nn.Sequential(linear, nn.Flatten(0)) if flat else linear


@pytest.mark.parametrize("flat", [False, True])
def test_one_output_beside_targets_of_the_other_shape(flat):
    model, x, y = one_output(flat), torch.randn(12, 4), torch.randn(12)
    own, other = (y, y[:, None]) if flat else (y[:, None], y)

    def squared(f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square().mean()

    for likelihood in ("gaussian", "bernoulli"):
        found = [
            ekfac.fisher(
                model, [(x, t.sigmoid().round())], "dense", "empirical", likelihood
            ).to_dense()
            for t in (own, other)
        ]
        assert relative_error(*found) < 1e-12
    for call in (
        lambda: ekfac.hessian(model, [(x, other)], squared),
        lambda: ekfac.hessian(model, [(x, other)], squared, "dense"),
        lambda: ekfac.ggn(model, [(x, other)], squared, "ekfac"),
        lambda: ekfac.fisher(
            model, [(x, other)], "dense", "empirical", "gaussian", loss_fn=squared
        ),
        lambda: HessianProducts(model, [(x, other)], squared),
        lambda: top_directions(model, [(x, other)], squared, k=1),
    ):
        with pytest.raises(ValueError, match=r"give both one shape"):
            call() @ torch.ones(5)  # implicit ones call the loss at a product
    expected = dense_hessian(model, x, lambda f: squared(f, own))
    found = ekfac.hessian(model, [(x, own)], squared, "dense").to_dense()
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_hinge_losses_of_signs_count_every_example(integer, flat):
    model, x = one_output(flat), torch.randn(12, 4)
    y = torch.randint(2, (12,)) * 2 - 1
    y = y if flat else y[:, None]

    def hinge(f: Tensor, y: Tensor) -> Tensor:
        return (1 - y * f).clamp(min=0).mean()

    own = (1 - y * model(x)).clamp(min=0).flatten()
    assert 0 < int((own == 0).sum()) < 12
    rows = rows_of(model, own)
    found = ekfac.fisher(
        model,
        [(x, y if integer else y.double())],
        "dense",
        "empirical",
        loss_fn=hinge,
    ).to_dense()
    assert relative_error(found, rows.mT @ rows / 12) < 1e-12


class LanguageModel(nn.Module):
    """Returns a loss beside its logits, of labels that it shifts or does not."""

    def __init__(self, shifts: int) -> None:
        super().__init__()
        self.shifts = shifts
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embed(input_ids).cumsum(1))
        if labels is None:
            return {"logits": logits}
        kept = logits[:, : logits.shape[1] - self.shifts].flatten(0, 1)
        y = labels[:, self.shifts :].flatten()
        return {"loss": F.cross_entropy(kept, y), "logits": logits}


@pytest.mark.parametrize("shifts", [0, 1])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_labels_that_the_model_shifts(shifts, kind):
    """As with the shifted targets beside the inputs."""
    torch.manual_seed(0)
    model, ids = LanguageModel(shifts), torch.randint(7, (4, 6))
    labels = ids.clone()
    labels[0, :3], labels[1, 4:] = -100, -100
    y = labels
    if shifts:
        y = torch.cat([labels[:, 1:], torch.full((4, 1), -100)], dim=1)
    data, expected = [{"input_ids": ids, "labels": labels}], [({"input_ids": ids}, y)]
    for structure in ("dense", "ekfac", "kfac", "implicit"):
        found = [ekfac.fisher(model, d, structure, kind) for d in (data, expected)]
        assert relative_error(*(F.trace() for F in found)) < 1e-12
    loss = lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())  # noqa: E731
    assert loss_of(data, loss)(model) == pytest.approx(
        float(model(ids, labels)["loss"])
    )
    penalty = QuadraticPenalty(model, "diagonal")
    penalty.consolidate(data)
    assert penalty.tasks[0].examples == 4


def test_a_loss_of_other_positions_is_refused():
    model, ids = LanguageModel(2), torch.randint(7, (4, 6))
    with pytest.raises(ValueError, match="neither those of its labels nor"):
        ekfac.fisher(model, [{"input_ids": ids, "labels": ids}], "dense")


# -- batches ---------------------------------------------------------------------------


class Graph:
    """An object that is moved and has targets, as PyTorch Geometric's are."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any) -> Graph:
        return Graph(self.x.to(device), self.y.to(device))


class OnGraphs(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, graph: Graph) -> Tensor:
        neighbours = torch.roll(graph.x, 1, 0)
        return self.linear(graph.x + neighbours)


@pytest.mark.parametrize("structure", ["dense", "diagonal", "kfac", "implicit"])
def test_objects_with_targets_are_batches(structure):
    linear, x, y = classifier()
    model, whole = OnGraphs(linear), x + torch.roll(x, 1, 0)
    for kind in ("exact", "empirical"):
        found = ekfac.fisher(model, [Graph(x, y)], structure, kind).to_dense()
        expected = ekfac.fisher(linear, [(whole, y)], structure, kind).to_dense()
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("batch", [tuple, list])
def test_batches_of_three_are_refused(batch):
    model, x, y = classifier()
    with pytest.raises(TypeError, match=r"\(\(x1, x2\), y\)"):
        ekfac.fisher(model, [batch((x, y, y))], "dense")
    with pytest.raises(TypeError, match="of 3"):
        QuadraticPenalty(model).consolidate([batch((x, y, y))])


def test_a_model_that_returns_its_loss_is_refused():
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.linear(x), y)

    _, x, y = classifier()
    with pytest.raises(ValueError, match="if it is the loss, let the model return"):
        ekfac.hessian(WithLoss(), [((x, y), y)], LOSSES["lambda, mean"], "dense")


class Mixed(nn.Module):
    """Layers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).float(), nn.Linear(5, 3).double()
        self.c = nn.Linear(3, 3).float()

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(torch.tanh(self.a(x.float())).double())
        return self.c(h.float()).double() + h


STRUCTURES = ["dense", "block_diagonal", "diagonal", "low_rank", "kfac", "ekfac"]


@pytest.mark.parametrize("structure", [*STRUCTURES, "quasi_diagonal", "implicit"])
def test_models_of_mixed_types(structure):
    torch.manual_seed(0)
    model, (_, x, y) = Mixed(), classifier()
    matrix = ekfac.fisher(model, [(x, y)], structure)
    dense = matrix.to_dense()
    assert matrix.dtype == dense.dtype == torch.float64
    v = torch.ones(matrix.size)
    assert relative_error(matrix @ v, dense @ v) < 1e-5
    if structure != "quasi_diagonal":  # whose inverse is another matrix's
        damped = dense + 0.1 * torch.eye(matrix.size)
        solved = matrix.solve(v, 0.1)
        assert relative_error(damped @ solved, v) < 1e-4
    assert relative_error(matrix.trace(), dense.trace()) < 1e-5
    if structure == "dense":
        rows = ekfac.jacobian(model, x).to_dense()
        p = model(x).softmax(1).detach()
        H = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        rows = rows.reshape(12, 3, -1)
        assert relative_error(dense, (rows.mT @ H @ rows).mean(0)) < 1e-5


# -- second derivatives ----------------------------------------------------------------


class Swish(torch.autograd.Function):
    """A backward with the right second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class Constant(Swish):
    """A backward that takes what was saved for a constant."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            factor = Swish.backward(ctx, torch.ones_like(g))
        return g * factor


class SetUp(torch.autograd.Function):
    """Likewise, in torch's other style."""

    @staticmethod
    def forward(x: Tensor, power: int) -> Tensor:
        return x**power

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.x, ctx.power = inputs[0].detach(), inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.power * ctx.x ** (ctx.power - 1), None


class Rectifier(torch.autograd.Function):
    """Kinks are no second derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class FusedLoss(torch.autograd.Function):
    """A loss that computes its gradient on the way forward."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, y: Tensor) -> Tensor:
        ctx.grad = (f.softmax(1) - F.one_hot(y, f.shape[1])) / len(y)
        return F.cross_entropy(f, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.grad, None


class Activation(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(function: Any) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 6), Activation(function))
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), inner, nn.Linear(6, 3))


BOUND = Constant.apply  # as third parties keep it


@pytest.mark.parametrize(
    ("function", "name"), [(BOUND, "Constant"), (lambda x: SetUp.apply(x, 3), "SetUp")]
)
def test_backwards_of_constants_are_found_with_their_layer(function, name):
    model, (_, x, y) = network(function), classifier()
    data, loss = [(x, y)], nn.CrossEntropyLoss()
    for call in (
        lambda: ekfac.hessian(model, data, loss) @ torch.ones(93),
        lambda: ekfac.hessian(model, data, loss, "dense"),
        lambda: HessianProducts(model, data, loss),
        lambda: QuadraticPenalty(model, "hessian_top_k").consolidate(data),
    ):
        with pytest.raises(
            UnsupportedOperationError, match=rf"layer '2.1' calls .*{name}"
        ):
            call()
    # First derivatives are right, so that products with the Jacobian are.
    v = torch.ones(93)
    found = ekfac.fisher(model, data, "implicit") @ v
    assert relative_error(found, ekfac.fisher(model, data, "dense") @ v) < 1e-12
    assert "forward" not in vars(Constant)
    assert Constant.forward is Swish.forward


@pytest.mark.parametrize("function", [Swish, Rectifier, Rounded])
def test_backwards_that_are_right_are_used(function):
    model, (_, x, y) = network(function.apply), classifier()
    loss = nn.CrossEntropyLoss()
    H = ekfac.hessian(model, [(x, y)], loss, "dense").to_dense()
    v, step = torch.randn(93), 1e-6
    point = torch.cat([p.detach().flatten() for p in model.parameters()])

    def gradient(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, model.parameters())
        grads = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    difference = (gradient(point + step * v) - gradient(point - step * v)) / (2 * step)
    if function is not Rounded:  # whose gradient jumps
        assert relative_error(H @ v, difference) < 1e-5


@pytest.mark.parametrize("structure", ["dense", "ekfac", "implicit"])
def test_losses_without_second_derivatives_are_refused(structure):
    model, x, y = classifier()
    with pytest.raises(UnsupportedOperationError, match="FusedLoss"):
        ekfac.ggn(model, [(x, y)], FusedLoss.apply, structure) @ torch.ones(15)
    found = ekfac.fisher(
        model, [(x, y)], "dense", "empirical", loss_fn=FusedLoss.apply
    ).to_dense()
    expected = ekfac.fisher(model, [(x, y)], "dense", "empirical").to_dense()
    assert relative_error(found, expected) < 1e-12


WEIGHT = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def weighted_mean(f: Tensor, y: Tensor) -> Tensor:
    """A mean by weights that nobody but it knows."""
    return F.cross_entropy(f, y, weight=WEIGHT)


@pytest.mark.parametrize("labels", [(0, 1, 2, 1, 0, 2), (1, 1, 1, 0, 1, 2)])
def test_weights_that_are_said_weigh_the_batches_and_others_are_refused(labels):
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(6, 4).double(), torch.tensor(labels)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    expected = dense_hessian(model, x, lambda f: weighted_mean(f, y))
    for said in (
        nn.CrossEntropyLoss(weight=WEIGHT),
        functools.partial(F.cross_entropy, weight=WEIGHT),
    ):
        for function in (ekfac.hessian, ekfac.ggn):
            found = function(model, batches, said, structure="dense").to_dense()
            assert relative_error(found, expected) < 1e-12
    for function in (ekfac.hessian, ekfac.ggn):
        whole = function(model, [(x, y)], weighted_mean, structure="dense").to_dense()
        assert relative_error(whole, expected) < 1e-12
        with pytest.raises(ValueError, match="mean with weights"):
            function(model, batches, weighted_mean, structure="dense")
    with pytest.raises(ValueError, match="mean with weights"):
        ekfac.fisher(model, batches, "dense", "empirical", loss_fn=weighted_mean)
    with pytest.raises(ValueError, match="mean with weights"):
        loss_of(batches, weighted_mean)(model)
