"""Hessians of losses by the blocks that they fall into, against torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import ekfac
from ekfac.estimate.data import Batch
from ekfac.estimate.losses import BatchLoss
from ekfac.estimate.output_hessians import LossHessian, OutputBlocks, output_blocks

Loss = Callable[[Tensor, Tensor], Tensor]


def by_class(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y, reduction="sum")


def by_last(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f.flatten(0, -2), y.flatten(), reduction="sum")


def squares(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().sum() / 2


def pooled(f: Tensor, y: Tensor) -> Tensor:
    """Every output meets every other."""
    return f.flatten(1).logsumexp(1).sum() + 0 * y.sum()


def neighbours(f: Tensor, y: Tensor) -> Tensor:
    """Each output meets the next alone, across rows and columns."""
    flat = f.flatten(1)
    return (flat[:, 1:] - flat[:, :-1]).square().sum() + 0 * y.sum()


def classes(n: int, *shape: int) -> Tensor:
    return torch.randint(3, (n, *shape), generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[Loss, tuple[int, ...], Tensor, int | None]] = {
    "classes": (by_class, (3,), classes(4), 0),
    "classes of positions": (by_class, (3, 5), classes(4, 5), 1),
    "classes of pixels": (by_class, (3, 2, 2), classes(4, 2, 2), 1),
    "classes last": (by_last, (5, 3), classes(4, 5), 2),
    "squares": (squares, (2, 3), torch.zeros(4, 2, 3), None),
    "squares, flat": (squares, (6,), torch.zeros(4, 6), None),
    "pooled": (pooled, (2, 3), torch.zeros(4), 0),
    "neighbours": (neighbours, (2, 3), torch.zeros(4), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_pseudo_gradients_are_those_of_the_dense_hessians(name: str) -> None:
    loss, shape, y, dim = CASES[name]
    outputs = torch.randn(
        4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    source = LossHessian(BatchLoss(loss))
    batch = Batch(0, None, y)
    found = list(source.pseudo_gradients(outputs, batch))
    h = torch.stack(found).flatten(2)
    dense = torch.func.vmap(
        torch.func.hessian(lambda f, t: loss(f[None], t[None])), randomness="error"
    )(outputs, y)
    k = outputs[0].numel()
    moments = torch.einsum("kni,knj->nij", h, h)
    assert relative_error(moments, dense.reshape(4, k, k)) < 1e-12

    def product(vectors: Tensor) -> Tensor:
        return source.product(outputs, batch, vectors)

    layout = output_blocks(outputs, product)
    block = layout.split(outputs).shape[-1]
    expected = {None: 1, 0: k}.get(dim, shape[dim - 1] if dim else 0)
    assert block == expected


@pytest.mark.parametrize("dim", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("lead", [(2,), (5, 2)])
def test_layouts_are_joined_as_they_were_split(
    dim: int | None, lead: tuple[int, ...]
) -> None:
    outputs = torch.randn(*lead, 3, 4, 2)
    layout = OutputBlocks((3, 4, 2), dim)
    blocks = layout.split(outputs)
    assert blocks.shape[:-2] == lead
    assert torch.equal(layout.join(blocks), outputs)
    if dim:
        assert blocks.shape[-1] == outputs.shape[len(lead) + dim - 1]
        column = outputs.select(len(lead) + dim - 1, 1)
        assert torch.equal(blocks[..., 1], column.reshape(*lead, -1))


def test_single_numbers_are_outputs_too() -> None:
    """A model that returns ``[N]``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    x, y = torch.randn(5, 3).double(), torch.zeros(5).double()
    G = ekfac.ggn(model, [(x, y)], nn.MSELoss(reduction="sum"), "dense").to_dense()
    J = torch.cat([x, torch.ones(5, 1)], dim=1)
    assert relative_error(G, 2 * J.mT @ J / 5) < 1e-12
