"""Bars: shown when asked for, with the right totals, and without any effect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import (
    accuracy_of,
    cumulative_reconstruction,
    dual,
    eigen_pruning,
    hessian,
    label_alignment,
    layer_reinitialisation,
    loss_profile,
    lottery_tickets,
    porter_thomas,
    removal_curve,
    step_modes,
    subnetworks,
    threshold_curve,
    top_directions,
)
from ekfac.diagnostics.papers.george import consistency_scores
from ekfac.progress import shown


class Setting:
    """A small network, its data and what the sweeps take."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        x = torch.randn(24, 4)
        self.x, self.data = x, [(x, x[:, :3].argmax(1))]
        self.metric = accuracy_of(self.data)
        self.initial = {
            name: torch.zeros_like(p) for name, p in self.model.named_parameters()
        }
        self.directions = top_directions(self.model, self.data, cross_entropy, k=2)


def trained(model: nn.Module, mask: Callable[[], None]) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01
    mask()


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "dual": lambda s, **o: dual(s.model, s.x, **o).gram,
    "loss_profile": lambda s, **o: loss_profile(
        s.model, s.data, cross_entropy, s.initial | {"0.weight": torch.ones(5, 4)},
        [-1.0, 0.0, 1.0], **o
    ).value,
    "cumulative_reconstruction": lambda s, **o: cumulative_reconstruction(
        s.model, s.directions, s.metric, [0, 1, 2], **o
    ).value,
    "loss_scaling": lambda s, **o: hessian.loss_scaling(
        s.model, s.metric, [0.5, 1.0], **o
    ).value,
    "layer_reinitialisation": lambda s, **o: layer_reinitialisation(
        s.model, s.initial, s.metric, **o
    ).value,
    "layer_rerandomisation": lambda s, **o: subnetworks.layer_rerandomisation(
        s.model, lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        s.metric, generator=torch.Generator().manual_seed(0), **o
    ).value,
    "threshold_curve": lambda s, **o: threshold_curve(
        s.model, s.initial, s.metric, [0.1, 0.2], **o
    ).value,
    "removal_curve": lambda s, **o: removal_curve(
        s.model, s.initial, s.metric, [0.1, 0.2], **o
    ).value,
    "kronecker_reconstruction": lambda s, **o: eigen_pruning.kronecker_reconstruction(
        s.model, ekfac.fisher(s.model, s.data, "kfac"), s.metric, [0.1, 0.2], **o
    ).value,
    "lottery_tickets": lambda s, **o: lottery_tickets(
        s.model, trained, s.metric, **o
    ).value,
    "consistency_scores": lambda s, **o: consistency_scores(
        lambda chosen: torch.arange(24) % len(chosen) > 1, 24, [5, 9],
        generator=torch.Generator().manual_seed(0), **o
    ),
    "label_alignment": lambda s, **o: torch.tensor(label_alignment(
        s.model, *s.data[0], **o
    ).whole.value),
    "step_modes": lambda s, **o: step_modes(
        s.model, s.x, lambda f: f.square().sum(), lr=0.1, **o
    ).changes,
    "porter_thomas": lambda s, **o: porter_thomas(
        torch.eye(8), generator=torch.Generator().manual_seed(0), **o
    ).p_value,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sweeps_show_a_bar_when_asked_and_return_the_same(name, capsys):
    pytest.importorskip("tqdm")
    plain = FUNCTIONS[name](Setting())
    assert capsys.readouterr().err == ""
    watched = FUNCTIONS[name](Setting(), progress=True)
    assert "/" in capsys.readouterr().err
    assert torch.equal(plain, watched)


def test_the_total_is_the_length_or_what_is_given(capsys):
    pytest.importorskip("tqdm")
    assert list(shown([1, 2], "list", progress=True)) == [1, 2]
    assert "0/2" in capsys.readouterr().err
    assert list(shown(iter([1, 2]), "iterator", progress=True, total=5)) == [1, 2]
    assert "0/" in capsys.readouterr().err
    assert list(shown((n for n in range(2)), "other", progress=True)) == [0, 1]
    assert "other: 0it" in capsys.readouterr().err


def test_without_tqdm_nothing_is_shown(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert list(shown([1, 2], "list", progress=True)) == [1, 2]
    assert capsys.readouterr().err == ""
