"""Against the K-FAC and EKFAC of curvlinops and NNGeometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from nngeometry.metrics import FIM
from nngeometry.object.pspace import PMatEKFAC, PMatKFAC
from support import block_of, collect, ekfac_blocks, kfac_blocks, relative_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ekfac.likelihoods import Categorical
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.usefixtures("float64")


class Pool(nn.Module):
    """Mean over the positions of ``[N, S, d]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ChannelsFirst(nn.Module):
    """``[N, S, C]`` as ``[N, C, S]``, the layout of ``nn.CrossEntropyLoss``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def linear() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4, 3)), torch.randn(7, 4)


def convolutional() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 1), dilation=(1, 2), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    # Enough examples that no eigenvalue is 0 twice: the basis is then the same.
    return model, torch.randn(24, 2, 6, 8)


def pooled() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), Pool(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(4, 3)), torch.randn(7, 6, 4)


def tokens() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), ChannelsFirst()]
    return nn.Sequential(*layers), torch.randn(7, 6, 4)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": linear,
    "convolutional": convolutional,
    "pooled": pooled,
    "tokens": tokens,
}
LOSSES: dict[str, type[nn.Module]] = {
    "categorical": nn.CrossEntropyLoss,
    "bernoulli": nn.BCEWithLogitsLoss,
    "gaussian": nn.MSELoss,
}


OPERATORS = (KFACLinearOperator, EKFACLinearOperator)


def targets(likelihood: str, outputs: Tensor) -> Tensor:
    if likelihood == "categorical":
        return torch.randint(outputs.shape[1], outputs[:, 0].shape)
    if likelihood == "bernoulli":
        return torch.randint(2, outputs.shape).to(outputs)
    return torch.randn_like(outputs)


def compare(
    optimizer: KroneckerOptimizer,
    model: nn.Module,
    kfac: Tensor,
    ekfac: Tensor | None,
) -> None:
    """Check every layer's products against dense matrices."""
    for layer in optimizer.curvature.values():
        theirs = block_of(kfac, model, layer)
        assert relative_error(kfac_blocks(layer), theirs) < 1e-10, layer.name
        if ekfac is not None:
            theirs = block_of(ekfac, model, layer)
            assert relative_error(ekfac_blocks(layer), theirs) < 1e-10, layer.name


CURVLINOPS = [
    pytest.param(
        name,
        likelihood,
        sharing,
        fisher,
        id=f"{name}, {likelihood}, {sharing}, {fisher}",
    )
    for name in NETWORKS
    for likelihood in LOSSES
    for sharing in ("expand", "reduce")
    for fisher in ("exact", "empirical")
    if likelihood == "categorical" or name != "tokens"
    # It sends the pseudo-gradients of all positions back at once and sums them.
    if (name, sharing, fisher) != ("tokens", "reduce", "exact")
]


@pytest.mark.parametrize(("name", "likelihood", "sharing", "fisher"), CURVLINOPS)
def test_curvlinops(name: str, likelihood: str, sharing: str, fisher: str) -> None:
    model, x = NETWORKS[name]()
    loss = LOSSES[likelihood](reduction="sum")
    y = targets(likelihood, model(x).detach())
    operators = [
        operator(
            model,
            loss,
            list(model.parameters()),
            [(x, y)],
            fisher_type={"exact": "type-2"}.get(fisher, fisher),
            kfac_approx=sharing,
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        # EKFAC is there for outputs [N, C] alone.
        for operator in OPERATORS[: 1 if name == "tokens" else 2]
    ]
    # Their matrices are those of the summed loss, in squared error without the half.
    scale = len(x)
    if likelihood == "gaussian" and fisher == "exact":
        scale *= 2
    dense = [op @ torch.eye(op.shape[1]) / scale for op in operators]
    options: dict[str, Any] = {"likelihood": likelihood}
    if name == "tokens":
        options["likelihood"] = Categorical(class_dim=1)
    optimizer = collect(
        model,
        lambda: loss(model(x), y),
        fisher=fisher,
        sharing=sharing,
        loss_reduction="sum",
        **options,
    )
    compare(optimizer, model, dense[0], dense[1] if len(dense) > 1 else None)


@pytest.mark.parametrize(
    ("likelihood", "variant"),
    [("categorical", "classif_logits"), ("gaussian", "regression")],
)
@pytest.mark.parametrize("name", ["linear", "convolutional"])
def test_nngeometry(name: str, likelihood: str, variant: str) -> None:
    model, x = NETWORKS[name]()
    y = torch.zeros(len(x), dtype=torch.long)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    kfac = FIM(model, loader, PMatKFAC, variant=variant)
    ekfac = FIM(model, loader, PMatEKFAC, variant=variant)
    ekfac.update_diag(loader)
    optimizer = collect(
        model, lambda: model(x).sum(), fisher="exact", likelihood=likelihood
    )
    compare(optimizer, model, kfac.to_torch(), ekfac.to_torch())
