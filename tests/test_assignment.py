"""Which rank does what: properties of the assignment, for any costs and ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ekfac.curvature.distributed.assignment import (
    Assignment,
    Grid,
    assign,
    cost_of,
    decomposition_cost,
    grid,
)
from ekfac.curvature.distributed.group import (
    BUCKET,
    buckets,
)
from ekfac.kernels import pack_symmetric, unpack_symmetric
from ekfac.layers import find_blocks

costs_of_layers = st.lists(st.integers(0, 10**9), max_size=40).map(
    lambda costs: {f"layer{i}": float(cost) for i, cost in enumerate(costs)}
)
shapes = st.integers(1, 96).flatmap(
    lambda ranks: st.tuples(
        st.just(ranks),
        st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]),
    )
)


def loads(costs: dict[str, float], owners: dict[str, int], ranks: int) -> list[float]:
    """Return what every rank has to do."""
    return [sum(c for n, c in costs.items() if owners[n] == r) for r in range(ranks)]


@given(costs_of_layers, st.integers(1, 64))
def test_every_layer_has_one_owner_and_the_load_is_bounded(
    costs: dict[str, float], ranks: int
) -> None:
    owners = assign(costs, ranks)
    assert list(owners) == list(costs)
    assert all(0 <= owner < ranks for owner in owners.values())
    found = loads(costs, owners, ranks)
    assert sum(found) == sum(costs.values())
    # List scheduling: no load exceeds the mean by more than the last layer placed.
    largest = max(costs.values(), default=0.0)
    assert max(found) <= sum(costs.values()) / ranks + largest * (1 - 1 / ranks) + 1e-6
    assert assign(dict(costs), ranks) == owners


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=7).map(
        lambda costs: {f"layer{i}": float(c) for i, c in enumerate(costs)}
    ),
    st.integers(1, 3),
)
def test_the_largest_load_is_within_grahams_bound_of_the_best(
    costs: dict[str, float], ranks: int
) -> None:
    best = min(
        max(loads(costs, dict(zip(costs, owners, strict=True)), ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )
    found = max(loads(costs, assign(costs, ranks), ranks))
    assert found <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


@given(costs_of_layers, costs_of_layers, st.integers(1, 16))
def test_layers_that_come_later_move_none(
    first: dict[str, float], later: dict[str, float], ranks: int
) -> None:
    later = {f"late {name}": cost for name, cost in later.items()}
    assignment = Assignment(Grid(ranks, ranks), 0, {}, {})
    assignment.extend(first)
    before = dict(assignment.owners)
    assignment.extend(later)
    assert assignment.owners.items() >= before.items()
    found = loads({**first, **later}, assignment.owners, ranks)
    largest = max([*first.values(), *later.values()], default=0.0)
    assert max(found) - min(found) <= largest + 1e-6
    # Layers that are there already change nothing, as those of a copied optimizer.
    after = dict(assignment.owners)
    assignment.extend({**later, **first})
    assert assignment.owners == after


@given(shapes)
def test_columns_and_rows_are_partitions_that_meet_once(shape: tuple[int, int]) -> None:
    ranks, workers = shape
    cells = Grid(ranks, workers)
    columns = {cells.column_of(rank) for rank in range(ranks)}
    rows = {cells.row_of(rank) for rank in range(ranks)}
    for parts, size in ((columns, workers), (rows, ranks // workers)):
        assert sorted(itertools.chain(*parts)) == list(range(ranks))
        assert {len(part) for part in parts} == {size}
    for column, row in itertools.product(columns, rows):
        assert len(set(column) & set(row)) == 1


@given(shapes, costs_of_layers)
def test_every_rank_works_or_receives_from_one_that_does(
    shape: tuple[int, int], costs: dict[str, float]
) -> None:
    ranks, workers = shape
    views = []
    for rank in range(ranks):
        view = Assignment(Grid(ranks, workers), rank, {}, {})
        view.extend(costs)
        views.append(view)
    for name in costs:
        assert sum(view.owns(name) for view in views) == 1
        assert sum(view.works(name) for view in views) == workers
        assert all(view.works(name) for view in views if view.owns(name))
        for view in views:
            assert views[view.worker(name)].works(name)
            assert (view.worker(name) == view.rank) == view.works(name)


@pytest.mark.parametrize(
    ("ranks", "fraction", "workers"),
    [(4, 1.0, 4), (4, 0.5, 2), (4, 0.25, 1), (6, 1 / 3, 2), (1, 1.0, 1)],
)
def test_fractions(ranks: int, fraction: float, workers: int) -> None:
    assert grid(ranks, fraction) == Grid(ranks, workers)


@pytest.mark.parametrize(
    ("ranks", "fraction"), [(4, 0.75), (3, 0.5), (8, 0.3), (4, 0.0)]
)
def test_a_fraction_that_makes_no_grid_is_refused(ranks: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"use one of 1/{ranks}, .*{ranks}/{ranks}"):
        grid(ranks, fraction)


def test_cost_of_decompositions() -> None:
    assert decomposition_cost((1, 10, 20), (False, False)) == 10**3 + 20**3
    assert decomposition_cost((1, 10, 20), (True, False)) == 10**3
    assert decomposition_cost((4, 10, 20), (False, True)) == 4 * 20**3
    assert decomposition_cost((8, 1, 2), (False, False)) == 8 * (1 + 2**3)


def test_cost_of_truncated_decompositions() -> None:
    """Fewer eigenvectors cost less, never more than all; narrow sides stay full."""
    full = decomposition_cost((1, 60, 1024), (False, False))
    costs = [
        decomposition_cost((1, 60, 1024), (False, False), wanted=wanted)
        for wanted in (8, 32, 64, 100, 300, 600)
    ]
    assert costs == sorted(costs)
    assert costs[-1] == full == 60**3 + 1024**3
    assert costs[0] > 60**3
    assert decomposition_cost((1, 60, 64), (False, False), wanted=4) == 60**3 + 64**3


def test_a_layer_counts_by_what_its_basis_keeps() -> None:
    model = nn.ModuleDict(
        {"wide": nn.Linear(1023, 1024), "narrow": nn.Linear(19, 30), "both": both()}
    )
    blocks = find_blocks(model, list(model.parameters()), 2048).blocks
    full = {b.name: cost_of(b, None) for b in blocks}
    assert full == {"wide": 2 * 1024**3, "narrow": 20**3 + 30**3, "both": 4**3 + 512**3}
    kept = {b.name: cost_of(b, 16) for b in blocks}
    assert kept["wide"] < 0.05 * full["wide"]
    assert kept["narrow"] == full["narrow"]
    assert 4**3 < kept["both"] < 0.1 * full["both"]
    # By the number of eigenvectors above a share, which is not known beforehand.
    assert {b.name: cost_of(b, 0.5) for b in blocks} == full


def both() -> nn.Linear:
    """Return a layer of which one side is truncated."""
    return nn.Linear(4, 512, bias=False)


@pytest.mark.parametrize("d", range(1, 9))
@pytest.mark.parametrize("b", [1, 3])
def test_one_half_of_symmetric_matrices_travels(
    b: int, d: int, generator: torch.Generator
) -> None:
    half = torch.randn(b, d, d, generator=generator)
    matrices: Tensor = half + half.transpose(1, 2)
    packed = pack_symmetric(matrices)
    assert packed.shape == (b, d * (d + 1) // 2)
    assert torch.equal(unpack_symmetric(packed), matrices)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2 * BUCKET)), max_size=60))
def test_buffers_are_of_one_kind_and_in_order(items: list[tuple[int, int]]) -> None:
    numbered = [(kind, size, number) for number, (kind, size) in enumerate(items)]
    found = buckets(numbered)
    assert sorted(n for members in found for n in members) == list(range(len(items)))
    for members in found:
        assert len({items[n][0] for n in members}) == 1
        # Without its last item it was not yet full.
        assert sum(items[n][1] for n in members[:-1]) < BUCKET
    ended = [m for m in found if sum(items[n][1] for n in m) >= BUCKET]
    rest = found[len(ended) :]
    assert found[: len(ended)] == ended
    assert len({items[m[0]][0] for m in rest}) == len(rest)  # one of a kind
    for part in (ended, rest):
        last = [members[-1] for members in part]
        assert last == sorted(last)
