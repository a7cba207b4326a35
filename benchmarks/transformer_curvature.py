"""Where a transformer's curvature lies, by layer and head, under three optimizers.

    python benchmarks/transformer_curvature.py          # one thread, three seeds

A transformer of two blocks with four heads that reads the rows of scikit-learn's digits
as tokens is trained with EKFAC's spectral direction, with AdamW and with Muon (its
matrices; the rest with AdamW) until the loss on all digits is 0.3, each at one learning
rate that was not tuned. Of the exact Fisher matrix on 100 images: its spectrum, by the
dual; the trace's share of every layer; and of every head in each block, the rows of
query, key and value and the columns of the output that belong to it.
"""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from through_training import Rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import dual

BLOCKS, HEADS = 2, 4
SIDES = ("query", "key", "value", "out")


# Learning rates, not tuned.
RATES = {"EKFAC": 3e-3, "AdamW": 3e-3, "Muon": 0.02}


def optimizers(
    kind: str, model: nn.Module, factor: float
) -> list[torch.optim.Optimizer]:
    """Return what trains the model, at a multiple of the learning rate."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    lr = factor * RATES[kind]
    if kind == "EKFAC":
        return [ekfac.EKFAC(chosen, lr=lr, model=model)]
    if kind == "AdamW":
        return [torch.optim.AdamW(chosen, lr=lr, weight_decay=0.0)]
    matrices = [p for p in chosen if p.dim() == 2]
    others = [p for p in chosen if p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
        torch.optim.AdamW(others, lr=factor * RATES["AdamW"], weight_decay=0.0),
    ]


def trained(
    kind: str,
    model: Any,
    factor: float,
    data: tuple[Tensor, Tensor],
    stop: float,
    limit: int,
) -> tuple[Any, int, float]:
    """Train until the loss on all data, looked at every ten steps, is low."""
    x, y = data
    every = optimizers(kind, model, factor)
    for step in range(limit + 1):
        if step % 10 == 0:
            model.eval()
            with torch.no_grad():
                loss = cross_entropy(model(x), y).item()
            model.train()
            if loss <= stop or step == limit:
                break
        index = torch.randint(len(x), (64,))
        model.zero_grad()
        cross_entropy(model(x[index]), y[index]).backward()
        for optimizer in every:
            optimizer.step()
    for optimizer in every:
        if isinstance(optimizer, ekfac.EKFAC):
            optimizer.close()
    return model, step, loss


def measured(model: Rows, x: Tensor) -> dict[str, Any]:
    """Return the spectrum, and where the trace is."""
    spectrum = dual(model, x, "categorical").spectrum()
    diagonal = ekfac.fisher(model, [(x, None)], "diagonal").diagonal()
    trace = sum(float(part.sum()) for part in diagonal.values())
    layers: dict[str, float] = {}
    for name, part in diagonal.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0.0) + float(part.sum()) / trace
    heads: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for side in SIDES:
        for block in range(BLOCKS):
            weight = diagonal[f"blocks.{block}.{side}.weight"]
            rows = weight.sum(dim=0 if side == "out" else 1)
            each = rows.reshape(HEADS, -1).sum(dim=1) / trace
            heads[side].append(each.tolist())
    numbers = {
        "trace": spectrum.trace,
        "largest": spectrum.maximum,
        "share of ten": spectrum.trace_ratio(10),
        "effective rank": spectrum.effective_rank,
    }
    values = spectrum.values.tolist()
    return {"numbers": numbers, "layers": layers, "heads": heads, "values": values}


def figure_of(runs: dict[str, Any]) -> Figure:
    """Return shares by layer and by head, and spectra."""
    figure, axes = plt.subplots(1, 3, figsize=(17, 4.5), layout="constrained")
    for place, (kind, each) in enumerate(runs.items()):
        names = list(each[0]["layers"])
        shares = [[run["layers"][name] for run in each] for name in names]
        at = [number + 0.25 * place for number in range(len(names))]
        deviations = [statistics.pstdev(share) for share in shares]
        means = [statistics.mean(share) for share in shares]
        axes[0].bar(at, means, width=0.25, yerr=deviations, label=kind)
        for number, run in enumerate(each):
            label = None if number else kind
            ranks = range(1, len(run["values"]) + 1)
            axes[2].loglog(ranks, run["values"], color=f"C{place}", lw=1, label=label)
    short = [name.removeprefix("blocks.") for name in names]
    axes[0].set_xticks(range(len(names)), short, rotation=60)
    axes[0].set(ylabel="share of the Fisher matrix's trace")
    axes[0].legend()
    heads = torch.tensor(
        [run["heads"][side] for side in SIDES for run in runs["EKFAC"]]
    )
    image = heads.reshape(len(SIDES), -1, BLOCKS * HEADS).mean(dim=1)
    shown = axes[1].imshow(image.log10(), aspect="auto")
    axes[1].set_yticks(range(len(SIDES)), SIDES)
    axes[1].set(
        xlabel="heads of the blocks, in order", title="EKFAC, log10 of the share"
    )
    figure.colorbar(shown, ax=axes[1])
    axes[2].set(xlabel="rank", ylabel="eigenvalue", ylim=(1e-6, None))
    axes[2].legend()
    return figure


def main() -> None:
    """Train with all optimizers and seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--loss", type=float, default=0.3)
    arguments.add_argument("--limit", type=int, default=1500)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.limit = [0], 10
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    runs: dict[str, list[dict[str, Any]]] = {}
    for kind in bar(RATES, "optimizers"):
        for seed in args.seeds:
            torch.manual_seed(seed)
            model = Rows(heads=HEADS, blocks=BLOCKS)
            model, steps, loss = trained(
                kind, model, 1.0, (x, y), args.loss, args.limit
            )
            run = {"steps": steps, "loss": loss, **measured(model, x[:100])}
            runs.setdefault(kind, []).append(run)
    lines: dict[str, list[str]] = {"optimizer": list(runs)}
    for field in ("steps", "loss"):
        lines[field] = [spread([run[field] for run in each]) for each in runs.values()]
    for part in ("numbers", "layers"):
        for field in runs["EKFAC"][0][part]:
            values = [[run[part][field] for run in each] for each in runs.values()]
            lines[field] = [spread(value) for value in values]
    for side in SIDES:
        for block in range(BLOCKS):
            largest = [
                [max(h) / sum(h) for h in (run["heads"][side][block] for run in each)]
                for each in runs.values()
            ]
            name = f"largest head of {side}, block {block}"
            lines[name] = [spread(value) for value in largest]
    for name, cells in lines.items():
        print("  ".join([f"{name:<32}", *(f"{cell:<18}" for cell in cells)]).rstrip())
    print_seconds()
    save(args.output, "transformer_curvature", {"runs": runs}, figure_of(runs))


if __name__ == "__main__":
    main()
