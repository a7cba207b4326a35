"""Every result that draws: into given axes, which it returns, and a picture of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac import diagnostics as d
from ekfac.diagnostics.hessian import loss_scaling
from ekfac.diagnostics.papers import george, haink, karakida, zhang
from ekfac.diagnostics.quality import BasisQuality
from ekfac.diagnostics.subnetworks import Tickets, selection_overlap
from ekfac.vectors import ParameterVector

mpl.use("Agg")
import matplotlib.pyplot as plt


def drawing_classes() -> set[str]:
    """Return the names of all classes in the diagnostics that have ``plot``."""
    found = set()
    for info in pkgutil.walk_packages(d.__path__, "ekfac.diagnostics."):
        module = importlib.import_module(info.name)
        for name, each in inspect.getmembers(module, inspect.isclass):
            if hasattr(each, "plot") and each.__module__ == info.name:
                found.add(name)
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Return one result of every class that draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(24, 4), torch.randint(3, (24,))
    data = [(x, y)]
    optimizer = ekfac.EKFAC(model)
    cross_entropy(model(x), y).backward()
    optimizer.step()
    weights = ParameterVector.from_model(model)
    start = weights * 0.5
    metric = d.accuracy_of(data)
    F = ekfac.fisher(model, data, "dense")
    top = d.top_directions(model, data, cross_entropy, 5)
    rows = torch.randn(30, 8).cumsum(dim=0) + torch.arange(30.0)[:, None]
    losses = {"easy": torch.tensor([1.0, 0.5, 0.2]), "hard": torch.tensor([2, 1.5, 1])}
    curves = george.GroupCurves(torch.arange(3), torch.tensor([1.5, 1.0, 0.6]), losses)
    first, second = torch.rand(50) > 0.5, torch.zeros(50, dtype=torch.bool)
    second[: int(first.sum())] = True
    theory = karakida.mean_field_theory(
        torch.tanh, [8, 16, 16, 4], weight_variance=2.0, bias_variance=0.1
    )
    found = [
        d.spectrum(F),
        d.estimated_spectrum(F, 2, num_probes=2, num_steps=8),
        d.inertia(ekfac.hessian(model, data, cross_entropy, "dense").to_dense()),
        d.approximation_quality(ekfac.fisher(model, data, "kfac"), F, num_vectors=5),
        BasisQuality(0.12, 0.01, 0.6, 0.3, 0.4, 0.2),
        d.optimizer_health(optimizer),
        top,
        d.weight_product(top, weights),
        d.overlap(top.vectors[:, :3], top.vectors[:, 1:]),
        d.layer_shares(top),
        d.concentration(top.vectors),
        d.loss_profile(model, data, cross_entropy, top.vector(0), [-0.5, 0.0, 0.5]),
        loss_scaling(model, metric, [0.5, 1.0, 1.5]),
        d.marchenko_pastur_edge(torch.randn(30, 20)),
        d.level_spacings(torch.rand(60)),
        d.porter_thomas(top.vectors),
        d.label_alignment(model, x, y),
        d.step_modes(model, x, lambda f: cross_entropy(f, y), lr=0.1),
        d.layer_reinitialisation(model, start, metric),
        d.threshold_curve(model, start, metric, [0.0, 0.1]),
        d.weight_changes(weights, start),
        selection_overlap(first, second),
        Tickets(torch.tensor([1, 0.4]), torch.tensor([0.9, 0.8]), torch.ones(2, 3)),
        d.principal_components(rows),
        d.drift(rows),
        haink.variance_curvature(rows, torch.eye(8)[:, :4], torch.arange(1.0, 5.0)),
        haink.subspace_overlaps([torch.eye(5)[:, :2], torch.eye(5)[:, 1:3]]),
        haink.quadratic_relaxation(
            torch.tensor([1.0, 0.1]), torch.ones(2), torch.zeros(2), lr=0.1
        ),
        theory,
        karakida.order_parameters(model, x),
        zhang.redundant_neurons(model, "0"),
        curves,
        george.compare_at_equal_loss(curves, curves, [1.2, 0.9]),
        george.feature_descent(torch.randn(20, 5), torch.randn(20), steps=10),
    ]
    return {type(each).__name__: each for each in found}


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    plt.close("all")  # what other tests of this process left open
    yield
    plt.close("all")


def test_all_that_draw_are_here(results: dict[str, Any]) -> None:
    assert set(results) == drawing_classes()


@pytest.mark.parametrize("name", sorted(drawing_classes()))
def test_results_draw_into_given_axes(results: dict[str, Any], name: str) -> None:
    found = results[name]
    figure, (left, right) = plt.subplots(1, 2)
    blank = pixels(figure)
    assert found.plot(right) is right
    assert found.plot(ax=left) is left
    assert len(plt.get_fignums()) == 1, "no figure of its own"
    assert np.abs(pixels(figure) - blank).mean() > 0.5
    own = found.plot()
    assert own.figure is not figure


def pixels(figure: Any) -> Any:
    """Return the figure's colours."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)


def test_a_result_is_a_few_lines(results: dict[str, Any]) -> None:
    for name, found in results.items():
        lines = repr(found).splitlines()
        assert len(lines) <= 12, name
        assert max(map(len, lines)) <= 200, name
        assert repr(found).startswith((name, "{"))
