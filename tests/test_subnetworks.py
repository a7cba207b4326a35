"""Going back to the start, part by part (Ge 2025), and pruning."""

from __future__ import annotations

import copy

import pytest
import torch
from test_directions import dense_hessian, mlp, problem
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.diagnostics.eigen_pruning import (
    KroneckerBasis,
    eigen_pruned,
    kronecker_reconstruction,
)
from ekfac.diagnostics.hessian.landscape import with_parameters
from ekfac.diagnostics.subnetworks import (
    LayerRobustness,
    change_histogram,
    layer_rerandomisation,
    parameter_scores,
    replaced_parameters,
    select_parameters,
    selection_overlap,
    threshold_curve,
    threshold_reinitialised,
)
from ekfac.matrices import DiagonalMatrix
from ekfac.vectors import ParameterVector

pytestmark = pytest.mark.usefixtures("float64")


def moved() -> tuple[nn.Sequential, ParameterVector, d.Metric]:
    """A network away from its start, and a metric that is a fingerprint of it."""
    model = mlp(6, 5, 4, 3)
    initial = ParameterVector.from_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(8, 6)

    def metric(net: nn.Module) -> float:
        with torch.no_grad():
            return float(net(x).square().sum())

    return model, initial, metric


def at(model: nn.Module, values: ParameterVector, metric: d.Metric) -> float:
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.data.copy_(values[name])
    return metric(other)


def test_layers_go_back_one_at_a_time():
    model, initial, metric = moved()
    weights = ParameterVector.from_model(model)
    found = d.layer_reinitialisation(model, initial, metric)
    assert found.names == ("0", "2", "4")
    assert found.baseline == metric(model)
    for name, value in zip(found.names, found.value, strict=True):
        mixed = {
            n: initial[n] if n.startswith(f"{name}.") else w for n, w in weights.items()
        }
        assert float(value) == at(model, ParameterVector(mixed), metric)
    after = ParameterVector.from_model(model)
    assert torch.equal(after.flat(), weights.flat())
    assert len(d.layer_reinitialisation(model, initial, metric, ["2"]).names) == 1


def test_asymmetry_and_critical_layers():
    names, zero = ("a", "b"), torch.zeros(2)
    alike = LayerRobustness(names, torch.tensor([0.7, 0.7]), zero, 0.9)
    assert alike.asymmetry() == pytest.approx(0.5)
    one = LayerRobustness(names, torch.tensor([0.5, 0.9]), zero, 0.9)
    assert one.asymmetry() == pytest.approx(1)
    assert one.critical(0.1) == ("a",)
    none = LayerRobustness(names, torch.tensor([0.9, 0.95]), zero, 0.9)
    assert none.asymmetry() == 0.5


def test_layers_are_drawn_anew():
    model, _, metric = moved()
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    found = layer_rerandomisation(
        model, lambda: mlp(6, 5, 4, 3), metric, draws=2, generator=generator
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = ParameterVector.from_model(model)
    generator, values = torch.Generator().manual_seed(3), []
    for _ in range(2):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        fresh = dict(mlp(6, 5, 4, 3).named_parameters())
        mixed = {n: fresh[n] if n[0] == "2" else w for n, w in weights.items()}
        values.append(at(model, ParameterVector(mixed), metric))
    drawn = torch.tensor(values)
    assert float(found.value[1]) == pytest.approx(float(drawn.mean()))
    # Student's 97.5 % quantile of one degree of freedom over the normal one.
    widened = float(drawn.std()) / 2**0.5 * 12.7062 / 1.95996
    assert float(found.standard_error[1]) == pytest.approx(widened, rel=1e-4)


def test_thresholds():
    """Ge, exact test 9: the identity at zero, the start at the largest change."""
    model, initial, metric = moved()
    weights = ParameterVector.from_model(model)
    weights["0.bias"][0] = initial["0.bias"][0]  # one that never changed
    undone = threshold_reinitialised(weights, initial, 0.0, 0.0)
    assert torch.equal(undone.flat(), weights.flat())
    change = (weights - initial).flat().abs()
    largest = float(change.max())
    undone = threshold_reinitialised(weights, initial, 0.0, largest)
    assert torch.equal(undone.flat(), initial.flat())
    nested = []
    for high in (0.1, 0.3, 0.5):
        undone = threshold_reinitialised(weights, initial, 0.0, high).flat()
        back = undone == initial.flat()
        assert torch.equal(back, change <= high)
        nested.append(back)
    assert bool((nested[0] <= nested[1]).all() and (nested[1] <= nested[2]).all())
    band = threshold_reinitialised(weights, initial, 0.1, 0.3).flat()
    expected = (change >= 0.1) & (change <= 0.3) | (change == 0)
    assert torch.equal(band == initial.flat(), expected)
    curve = threshold_curve(model, initial, metric, [0.0, largest], ["2"])
    assert float(curve.value[0]) == metric(model)
    layer = d.layer_reinitialisation(model, initial, metric, ["2"])
    assert float(curve.value[1]) == float(layer.value[0])
    assert float(curve.share[1]) == 1


@pytest.mark.parametrize("criterion", ["magnitude", "change", "random"])
def test_removals(criterion, generator):
    """Ge, exact test 9: nothing at zero, everything at one, round(p P) between."""
    model, initial, metric = moved()
    weights = ParameterVector.from_model(model)
    scores = parameter_scores(weights, initial, criterion, generator)
    size = weights.space.size
    for fraction in (0.0, 0.3, 1.0):
        mask = select_parameters(scores, fraction)
        assert int(mask.sum()) == round(fraction * size)
        if 0 < fraction < 1:
            assert float(scores[mask].max()) <= float(scores[~mask].min())
        pruned = replaced_parameters(weights, initial, mask, "prune").flat()
        assert torch.equal(pruned, weights.flat() * ~mask)
        back = replaced_parameters(weights, initial, mask, "reinitialise").flat()
        assert torch.equal(back, torch.where(mask, initial.flat(), weights.flat()))
    top = select_parameters(scores, 0.3, largest_first=True)
    assert float(scores[top].min()) >= float(scores[~top].max())
    curve = d.removal_curve(
        model,
        initial,
        metric,
        [0.0, 1.0],
        criterion=criterion,
        operation="reinitialise",
        generator=generator,
    )
    assert float(curve.value[0]) == metric(model)
    assert float(curve.value[1]) == at(model, initial, metric)
    assert torch.equal(select_parameters(torch.ones(10), 0.5), torch.arange(10) < 5)


def test_removals_refuse_nonsense():
    model, initial, _ = moved()
    weights = ParameterVector.from_model(model)
    with pytest.raises(ValueError, match="'size'"):
        parameter_scores(weights, initial, "size")
    with pytest.raises(ValueError, match=r"1\.5"):
        select_parameters(torch.ones(3), 1.5)
    mask = torch.zeros(weights.space.size, dtype=torch.bool)
    with pytest.raises(ValueError, match="'drop'"):
        replaced_parameters(weights, initial, mask, "drop")
    broken = torch.tensor([True, False])
    with pytest.raises(ValueError, match="1 and 2"):
        selection_overlap(broken, torch.tensor([True, True]))

    def fails(net: nn.Module) -> float:
        raise RuntimeError("no metric")

    with pytest.raises(RuntimeError, match="no metric"):
        d.removal_curve(model, initial, fails, [0.5])
    after = ParameterVector.from_model(model)
    assert torch.equal(after.flat(), weights.flat())


def test_overlap_of_selections():
    """Ge, exact test 10: equal, complementary and independent sets."""
    n = 20_000
    first, second = torch.rand(n), torch.rand(n)
    lowest = select_parameters(first, 0.3)
    same = selection_overlap(lowest, lowest)
    assert same.value == 1
    highest = select_parameters(first, 0.3, largest_first=True)
    assert selection_overlap(lowest, highest).value == 0
    for share in (0.2, 0.8):
        found = selection_overlap(
            select_parameters(first, share), select_parameters(second, share)
        )
        assert found.null == pytest.approx(share)
        assert abs(found.value - share) < 5 * (1 - share) / n**0.5
        assert abs(found.deviations) < 5
        assert found.standard_error == pytest.approx((1 - share) / (n - 1) ** 0.5)
    everything = torch.ones(5, dtype=torch.bool)
    assert selection_overlap(everything, everything).deviations == 0


def test_statistics_of_changes():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(100, 50, generator=generator) * 0.05
    step = torch.randn(100, 50, generator=generator) * 0.02 + 0.01
    initial, weights = (
        ParameterVector({"w": start}),
        ParameterVector({"w": start + step}),
    )
    found = d.weight_changes(weights, initial)["w"]
    pair = torch.stack([start.flatten(), (start + step).flatten()])
    assert found.initial_deviation == pytest.approx(float(pair[0].std(correction=0)))
    assert found.final_deviation == pytest.approx(float(pair[1].std(correction=0)))
    assert found.final_mean == pytest.approx(float(pair[1].mean()))
    assert found.correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]))
    # Ge's remark to Table A.1: the deviation of the change follows from the others.
    implied = found.final_deviation**2 + found.initial_deviation**2
    implied -= 2 * found.correlation * found.initial_deviation * found.final_deviation
    assert found.change_deviation == pytest.approx(implied**0.5)
    with pytest.raises(ValueError, match="Invalid width: 0"):
        change_histogram(weights, initial, 0)
    histogram = change_histogram(weights, initial)
    assert float(histogram.sum()) == pytest.approx(1)
    below = (step.abs() < 0.016).double().mean()
    assert float(histogram[:2].sum()) == pytest.approx(float(below))


# ------------------------------------------------------------------------------ tickets


def test_tickets_keep_dead_weights_dead():
    torch.manual_seed(1)
    model, data = problem()
    initial = ParameterVector.from_model(model)
    starts = []

    def train(net: nn.Module, mask) -> None:
        starts.append(ParameterVector.from_model(net).flat())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            for x, y in data:
                optimizer.zero_grad()
                cross_entropy(net(x), y).backward()
                optimizer.step()
                mask()
        ends.append(ParameterVector.from_model(net).flat())

    ends: list[Tensor] = []
    measure = d.loss_of(data, cross_entropy)
    found = d.lottery_tickets(model, train, measure, rounds=3, fraction=0.5)
    size = initial.space.size
    assert found.masks.sum(dim=1).tolist() == [size, 37, 19]  # 18.5 rounds to even
    assert found.kept.tolist() == pytest.approx([1, 37 / size, 19 / size])
    for mask, start, end in zip(found.masks, starts, ends, strict=True):
        assert torch.equal(start, initial.flat() * mask)  # rewound
        assert not bool(end[~mask].any())
    for i in (0, 1):
        alive, kept = found.masks[i], found.masks[i + 1]
        assert bool((kept <= alive).all())
        removed = alive & ~kept
        assert float(ends[i][removed].abs().max()) <= float(ends[i][kept].abs().min())
    assert float(found.value[-1]) == measure(model)
    with pytest.raises(ValueError, match="fraction=1"):
        d.lottery_tickets(model, train, measure, fraction=1)


# --------------------------------------------------------- Kronecker eigenbasis


@pytest.mark.parametrize("structure", ["ekfac", "kfac"])
def test_coordinates_are_a_rotation(structure):
    model, data = problem()
    F = ekfac.fisher(model, data, structure)
    basis = KroneckerBasis(F)
    weights = ParameterVector.from_model(model)
    coordinates = basis.coordinates(weights)
    flat = torch.cat([c.flatten() for c in coordinates.values()])
    assert float(flat.norm()) == pytest.approx(float(weights.norm()))
    again = basis.weights(coordinates, weights).flat()
    assert float((again - weights.flat()).abs().max()) < 1e-12
    # What pruning everything would cost is the quadratic form itself.
    total = float(basis.scores(weights, "saliency").sum())
    dense = F.to_dense()
    assert total == pytest.approx(float(weights.flat() @ dense @ weights.flat()) / 2)
    s = torch.cat([v.flatten() for v in basis.curvature().values()])
    assert float(s.sum()) == pytest.approx(float(dense.trace()))
    assert torch.equal(basis.scores(weights, "curvature"), s)
    assert torch.equal(basis.scores(weights, "magnitude"), flat.abs())


@pytest.mark.parametrize("granularity", ["entry", "row_column"])
def test_pruning_in_the_eigenbasis(granularity):
    model, data = problem()
    F = ekfac.fisher(model, data, "ekfac")
    weights = ParameterVector.from_model(model)
    basis = KroneckerBasis(F)
    nothing = eigen_pruned(weights, F, 0.0, granularity=granularity)
    assert float((nothing.value - weights).norm()) < 1e-12
    assert nothing.kept == 1
    assert nothing.predicted_increase == 0
    found = eigen_pruned(weights, F, 0.4, granularity=granularity)
    change = (found.value - weights).flat()
    expected = float(change @ F.to_dense() @ change) / 2
    assert found.predicted_increase == pytest.approx(expected)
    before, after = basis.coordinates(weights), basis.coordinates(found.value)
    dead = 0
    for name, c in after.items():
        gone = c.abs() < 1e-12
        dead += int(gone.sum())
        assert float((c - before[name])[~gone].abs().max()) < 1e-12
        if granularity == "row_column":
            assert found.ranks is not None
            rows, columns = found.ranks[name]
            assert int(torch.linalg.matrix_rank(c[0])) <= min(rows, columns)
            alive = (~gone[0].all(dim=1)).sum() * (~gone[0].all(dim=0)).sum()
            assert int(alive) == rows * columns
    assert found.kept == pytest.approx(1 - dead / weights.space.size)
    if granularity == "entry":
        assert dead == round(0.4 * weights.space.size)
        # No other choice of as many coordinates costs less in the quadratic model.
        cheapest = basis.scores(weights).sort().values[:dead].sum()
        assert found.predicted_increase == pytest.approx(float(cheapest))
    everything = eigen_pruned(weights, F, 1.0, granularity=granularity)
    alive = everything.kept * weights.space.size
    assert alive == pytest.approx(0 if granularity == "entry" else 3)


def test_the_quadratic_model_is_the_hessians_for_one_layer():
    """At a minimum of the loss the predicted rise is the rise to second order."""
    model, data = problem()
    F = ekfac.fisher(model, data, "ekfac", parameters=["2"])
    weights = ParameterVector.from_model(model, ["2.weight", "2.bias"])
    found = eigen_pruned(weights, F, 1 / 24)  # one coordinate
    change = (found.value - weights).flat()
    block = dense_hessian(model, data)[35:59, 35:59]
    assert found.predicted_increase == pytest.approx(float(change @ block @ change) / 2)


def test_reconstruction_in_the_kronecker_basis():
    model, data = problem()
    F = ekfac.fisher(model, data, "ekfac")
    measure = d.loss_of(data, cross_entropy)
    curve = kronecker_reconstruction(model, F, measure, [0.0, 0.5, 1.0])
    assert float(curve.value[0]) == pytest.approx(float(torch.tensor(3.0).log()))
    assert float(curve.value[2]) == pytest.approx(measure(model))
    weights = ParameterVector.from_model(model)
    basis = KroneckerBasis(F)
    mask = torch.zeros(74, dtype=torch.bool)
    mask[basis.scores(weights, "curvature").argsort(descending=True)[:37]] = True
    with with_parameters(model, basis.kept(weights, mask)):
        assert float(curve.value[1]) == pytest.approx(measure(model))


def test_blocks_without_an_eigenbasis_and_wrong_options():
    model, data = problem()
    weights = ParameterVector.from_model(model)
    with pytest.raises(TypeError, match="kfac"):
        KroneckerBasis(DiagonalMatrix(weights))
    F = ekfac.fisher(model, data, "ekfac")
    with pytest.raises(ValueError, match=r"-0\.1"):
        eigen_pruned(weights, F, -0.1)
    with pytest.raises(ValueError, match="'layer'"):
        eigen_pruned(weights, F, 0.1, granularity="layer")
    with pytest.raises(ValueError, match="'best'"):
        eigen_pruned(weights, F, 0.1, score="best")
