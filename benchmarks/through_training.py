"""How far K-FAC, EKFAC, SUA and truncated bases are from the exact Fisher in training.

    python benchmarks/through_training.py            # a ResNet and a transformer
    python benchmarks/through_training.py --quick

Both learn scikit-learn's digits with EKFAC: a residual network without normalisation
(started as George 2023, A.3, says) and a transformer that reads an image's rows as
tokens. At several steps every layer's block of each structure stands beside the exact
one, of the same examples and all labels: the relative error in Frobenius norm, and the
cosine of a damped solve with the gradient to the exact one. Factors' memory is printed
too. Three seeds. The convolutions have 8 channels, which the spectral direction moves
as AdamW does; what is measured does not depend on the step's rule.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, table
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu, scaled_dot_product_attention

import ekfac
from ekfac.diagnostics.papers.george import initialise_residual_

SUA = "spatially_uncorrelated"
STRUCTURES: dict[str, dict[str, Any]] = {
    "K-FAC": {"structure": "kfac"},
    "EKFAC": {"structure": "ekfac"},
    "EKFAC, rank 8": {"structure": "ekfac", "rank": 8},
    "K-FAC, SUA": {"structure": "kfac", "conv_factors": SUA},
    "EKFAC, SUA": {"structure": "ekfac", "conv_factors": SUA},
}
COLOURS = ("tab:red", "tab:blue", "tab:cyan", "tab:orange", "tab:green")


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(x + last(relu(first(x))))``."""
        return relu(x + self.last(relu(self.first(x))))


class Attention(nn.Module):
    """Multi-head attention and a perceptron, each beside the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, S, width]``."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(
            scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return x + self.down(relu(self.up(x)))


class Rows(nn.Module):
    """A transformer over the rows of an image."""

    def __init__(self, width: int = 16, heads: int = 4, blocks: int = 1) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width), requires_grad=False)
        self.blocks = nn.Sequential(*[Attention(width, heads) for _ in range(blocks)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` of ``[N, 1, 8, 8]``."""
        return self.head(self.blocks(self.embed(x[:, 0]) + self.places).mean(dim=1))


def resnet(x: Tensor, channels: int = 8) -> nn.Module:
    """Return a small residual network, initialised."""
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1),
        nn.ReLU(),
        Residual(channels),
        Residual(channels),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, 10),
    )
    initialise_residual_(model, x[:8], last=["2.last", "3.last"])
    return model


def indices(model: nn.Module) -> dict[str, Tensor]:
    """Return which entries of the flat parameters each layer has."""
    found: dict[str, list[Tensor]] = {}
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stop = start + parameter.numel()
            layer = name.rpartition(".")[0]
            found.setdefault(layer, []).append(torch.arange(start, stop))
            start = stop
    return {name: torch.cat(parts) for name, parts in found.items()}


def layer_blocks(matrix: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return every layer's block of a block-diagonal matrix, dense, in float64."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names.setdefault(name.rpartition(".")[0], []).append(name)
    found = {
        layer: torch.zeros(2 * (sum(sizes[n] for n in members),), dtype=torch.float64)
        for layer, members in names.items()
    }
    for part in matrix.blocks.values():
        layer = part.space.names[0].rpartition(".")[0]
        places, start = {}, 0
        for name in names[layer]:
            places[name] = torch.arange(start, start + sizes[name])
            start += sizes[name]
        index = torch.cat([places[name] for name in part.space.names])
        found[layer][index[:, None], index] = part.to_dense().double()
    return found


def distances(
    model: nn.Module, x: Tensor, y: Tensor, structures: list[str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Return, by structure and layer, the error and the cosine of the solve."""
    data = [(x, None)]
    exact = layer_blocks(ekfac.fisher(model, data, "block_diagonal"), model)
    loss = cross_entropy(model(x), y)
    chosen = [p for p in model.parameters() if p.requires_grad]
    grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)])
    layers = indices(model)
    solved = {}
    for name, index in layers.items():
        block = exact[name]
        solved[name] = block, _damped(block, block, grad[index].double())
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for kind in structures:
        approximate = layer_blocks(ekfac.fisher(model, data, **STRUCTURES[kind]), model)
        found[kind] = {}
        for name, index in layers.items():
            block, direction = solved[name]
            own = approximate[name]
            step = _damped(own, block, grad[index].double())
            cosine = torch.nn.functional.cosine_similarity(step, direction, dim=0)
            error = (own - block).norm() / block.norm()
            found[kind][name] = float(error), float(cosine)
    return found


def _damped(matrix: Tensor, scale: Tensor, vector: Tensor) -> Tensor:
    """Return the solve with a tenth of the exact block's mean eigenvalue added."""
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    damping = 0.1 * scale.trace() / len(scale)
    return torch.linalg.solve(matrix + damping * eye, vector)


def memory(model: nn.Module, conv_factors: Any) -> int:
    """Return the bytes of all factors and bases that an optimizer keeps."""
    with ekfac.KFAC(model, conv_factors=conv_factors) as optimizer:
        return sum(layer.bytes() for layer in optimizer.curvature.values())


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train both networks with all seeds; return an entry for each measurement."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    entries = []
    for network in ("ResNet", "transformer"):
        kinds = [k for k in STRUCTURES if network == "ResNet" or "SUA" not in k]
        for seed in bar(args.seeds, f"seeds of {network}"):
            start = time.process_time()
            torch.manual_seed(seed)
            model = resnet(x) if network == "ResNet" else Rows()
            optimizer = ekfac.EKFAC(
                [p for p in model.parameters() if p.requires_grad],
                lr=3e-3,
                model=model,
            )
            for step in range(max(args.points) + 1):
                if step in args.points:
                    chosen = slice(0, args.examples)
                    with optimizer.capture.paused():
                        found = distances(model, x[chosen], y[chosen], kinds)
                        loss = cross_entropy(model(x), y).item()
                    entries.append(
                        {
                            "network": network,
                            "seed": seed,
                            "step": step,
                            "loss": loss,
                            "found": found,
                        }
                    )
                index = torch.randint(len(x), (64,))
                optimizer.zero_grad()
                cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
            optimizer.close()
            seconds = time.process_time() - start
            print(f"{network}, seed {seed}: {seconds:.0f} s", flush=True)
    sizes = {way: memory(resnet(x), way) for way in ("patches", SUA)}
    wide = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    large = {way: memory(wide, way) for way in ("patches", SUA)}
    print(
        f"bytes of the ResNet's factors: {sizes}; of a 64 x 64 x 3 x 3 layer: {large}"
    )
    return entries


def rows_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the table: means over layers, then means and spread over seeds."""
    rows = []
    keys = dict.fromkeys((e["network"], e["step"]) for e in entries)
    for network, step in keys:
        members = [e for e in entries if (e["network"], e["step"]) == (network, step)]
        for kind in members[0]["found"]:
            columns: list[list[float]] = [[], []]
            for entry in members:
                values = list(entry["found"][kind].values())
                for column, part in zip(
                    columns, zip(*values, strict=True), strict=True
                ):
                    column.append(statistics.mean(part))
            rows.append(
                {
                    "network": network,
                    "step": step,
                    "loss": statistics.mean(e["loss"] for e in members),
                    "structure": kind,
                    "error": statistics.mean(columns[0]),
                    "± ": statistics.pstdev(columns[0]),
                    "cosine of the solve": statistics.mean(columns[1]),
                    "±": statistics.pstdev(columns[1]),
                }
            )
    return rows


def figure_of(entries: list[dict[str, Any]]) -> Figure:
    """Return errors by step: the mean over seeds, thin lines for single layers."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, network in zip(axes, ("ResNet", "transformer"), strict=True):
        members = [e for e in entries if e["network"] == network]
        steps = sorted({e["step"] for e in members})
        for kind, colour in zip(STRUCTURES, COLOURS, strict=True):
            if kind not in members[0]["found"]:
                continue
            lines = {
                layer: [
                    statistics.mean(
                        e["found"][kind][layer][0] for e in members if e["step"] == step
                    )
                    for step in steps
                ]
                for layer in members[0]["found"][kind]
            }
            for values in lines.values():
                ax.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            means = [
                statistics.mean(part) for part in zip(*lines.values(), strict=True)
            ]
            ax.plot(steps, means, color=colour, marker="o", label=kind)
        ax.set(title=network, xlabel="step", xscale="symlog", ylim=(0, 1.4))
        ax.set_ylabel("distance from the exact block, relative")
        ax.legend(fontsize=8)
    return figure


def main() -> None:
    """Run, print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--points", type=int, nargs="+", default=[0, 30, 300])
    arguments.add_argument("--examples", type=int, default=100)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.points, args.examples = [0], [0, 2], 20
    torch.set_num_threads(1)
    entries = run(args)
    print(table(rows_of(entries)))
    print_seconds()
    save(args.output, "through_training", {"runs": entries}, figure_of(entries))


if __name__ == "__main__":
    main()
