"""
How good the approximations are, layer by layer, through training
=================================================================

Every layer's exact Fisher block beside K-FAC's, EKFAC's, EKFAC's in truncated bases and
EKFAC's with convolution factors over channels alone (SUA), while a residual network and
a transformer learn digits. The distance is ``|F_hat - F| / |F|``: at one an
approximation is as far as zero is. K-FAC starts far away wherever positions share a
weight, EKFAC's scalings repair much of that, more in the transformer, and lose it as
training goes on: the Fisher matrix becomes that of a few examples, which no Kronecker
basis fits. Three seeds and more images are in ``benchmarks/through_training.py``.
"""

from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

import ekfac
from ekfac.diagnostics.papers.george import initialise_residual_

digits = load_digits()
x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
y = torch.from_numpy(digits.target)


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, channels, H, W]``."""
        return relu(x + self.last(relu(self.first(x))))


class Rows(nn.Module):
    """One block of a transformer over the rows of an image."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(8, width)
        self.register_buffer("places", 0.1 * torch.randn(8, width))
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` of images ``[N, 1, 8, 8]``."""
        h = self.embed(x[:, 0]) + self.places
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.out(mixed)
        logits: Tensor = self.head((h + self.down(relu(self.up(h)))).mean(dim=1))
        return logits


def resnet() -> nn.Module:
    """Return a small residual network without normalisation."""
    layers = [nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU()]
    layers += [Residual(8), Residual(8), nn.AvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(32, 10))
    initialise_residual_(model, x[:8], last=["2.last", "3.last"])
    return model


# %%
# Distances of one moment, on 20 images and all labels.
STRUCTURES: dict[str, dict[str, Any]] = {
    "K-FAC": {"structure": "kfac"},
    "EKFAC": {"structure": "ekfac"},
    "EKFAC, rank 8": {"structure": "ekfac", "rank": 8},
    "EKFAC, SUA": {"structure": "ekfac", "conv_factors": "spatially_uncorrelated"},
}


def blocks_of(matrix: ekfac.matrices.CurvatureMatrix) -> dict[str, Tensor]:
    """Return every layer's block, dense; SUA has one for the bias apart."""
    assert isinstance(matrix, ekfac.matrices.BlockDiagonalMatrix)
    parts: dict[str, list[Tensor]] = {}
    for block in matrix.blocks.values():
        layer = block.space.names[0].rpartition(".")[0]
        parts.setdefault(layer, []).append(block.to_dense())
    return {layer: torch.block_diag(*blocks) for layer, blocks in parts.items()}


def distances(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the distance by structure and layer."""
    data = [(x[:20], None)]
    exact = blocks_of(ekfac.fisher(model, data, "block_diagonal"))
    return {
        kind: {
            layer: float((block - exact[layer]).norm() / exact[layer].norm())
            for layer, block in blocks_of(ekfac.fisher(model, data, **how)).items()
        }
        for kind, how in STRUCTURES.items()
    }


# %%
# Training, with a look at steps 0, 20 and 200.
POINTS = (0, 20, 200)
figure, plots = plt.subplots(2, 4, figsize=(13, 6), sharey=True, layout="constrained")
for line, (network, make) in zip(
    plots, (("ResNet", resnet), ("transformer", Rows)), strict=True
):
    torch.manual_seed(0)
    model = make()
    optimizer = ekfac.EKFAC(model, lr=3e-3)
    records = []
    for step in range(POINTS[-1] + 1):
        if step in POINTS:
            with optimizer.capture.paused():
                records.append(distances(model))
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    for axes, kind in zip(line, STRUCTURES, strict=True):
        if network == "transformer" and "SUA" in kind:  # it has no convolution
            axes.set_axis_off()
            continue
        for layer in records[0][kind]:
            axes.plot(POINTS, [r[kind][layer] for r in records], "o-", label=layer)
        axes.set(title=f"{network}, {kind}", xscale="symlog", xlabel="step")
        axes.axhline(1, color="0.6", ls="--", lw=1)
    line[0].set_ylabel("distance from the exact block")
    handles, layers = line[0].get_legend_handles_labels()
    place = line[-1] if network == "transformer" else line[0]
    place.legend(handles, layers, fontsize=7, ncols=2)
