"""Where a transformer's curvature lies, and its spectrum under three optimizers.

    python benchmarks/transformer_curvature.py          # one thread, three seeds

A transformer that reads the rows of scikit-learn's digits as tokens is trained with
EKFAC's spectral direction, with AdamW and with Muon (its matrices; the rest with AdamW)
to one loss or a limit of steps, each at one learning rate that was not tuned. Of the
exact Fisher matrix on 100 images, by the dual and the diagonal: trace, largest
eigenvalue, share of the ten largest; the trace's share of every layer, and the largest
head's share of the trace of query, key and value.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import parser, save
from sklearn.datasets import load_digits
from through_training import Rows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import dual


def optimizers(kind: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return what trains the model."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    if kind == "EKFAC":
        return [ekfac.EKFAC(chosen, lr=3e-3, model=model)]
    if kind == "AdamW":
        return [torch.optim.AdamW(chosen, lr=3e-3, weight_decay=0.0)]
    matrices = [p for p in chosen if p.dim() == 2]
    others = [p for p in chosen if p.dim() != 2]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, weight_decay=0.0),
    ]


def trained(
    kind: str, seed: int, x: Tensor, y: Tensor, stop: float, limit: int
) -> tuple[nn.Module, int, float]:
    """Train until the loss on all data, looked at every ten steps, is low."""
    torch.manual_seed(seed)
    model = Rows()
    every = optimizers(kind, model)
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
    values = dual(model, x, "categorical").top_eigenpairs(10).values
    diagonal = ekfac.fisher(model, [(x, None)], "diagonal").diagonal()
    trace = sum(float(part.sum()) for part in diagonal.values())
    layers: dict[str, float] = {}
    for name, part in diagonal.items():
        layer = name.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0.0) + float(part.sum()) / trace
    heads = {}
    for side in ("query", "key", "value"):
        rows = diagonal[f"blocks.0.{side}.weight"].sum(dim=1)
        each = rows.reshape(4, -1).sum(dim=1)
        heads[side] = float(each.max() / each.sum())
    found = {"trace": trace, "largest": float(values[0])}
    found["share of ten"] = float(values.sum()) / trace
    return {"spectrum": found, "layers": layers, "largest head": heads}


def shown(values: list[float]) -> str:
    """Return mean and deviation."""
    return f"{statistics.mean(values):.3g} ± {statistics.pstdev(values):.2g}"


def main() -> None:
    """Train with all optimizers and seeds; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--loss", type=float, default=0.3)
    arguments.add_argument("--limit", type=int, default=600)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.limit = [0], 10
    torch.set_num_threads(1)
    start = time.process_time()
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    runs: dict[str, list[dict[str, Any]]] = {}
    for kind in ("EKFAC", "AdamW", "Muon"):
        for seed in args.seeds:
            model, steps, loss = trained(kind, seed, x, y, args.loss, args.limit)
            found = measured(model, x[:100])
            runs.setdefault(kind, []).append({"steps": steps, "loss": loss, **found})
    rows = []
    for kind, every in runs.items():
        row: dict[str, Any] = {"optimizer": kind}
        for field in ("steps", "loss"):
            row[field] = shown([float(run[field]) for run in every])
        for part in ("spectrum", "largest head", "layers"):
            for field in every[0][part]:
                name = field.rpartition(".")[2]
                name = f"{name}, a head" if part == "largest head" else name
                row[name] = shown([run[part][field] for run in every])
        rows.append(row)
    for field in rows[0]:
        print("  ".join([f"{field:<14}", *(f"{row[field]:<18}" for row in rows)]))
    print(f"{time.process_time() - start:.0f} s of one core")
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for place, (kind, every) in enumerate(runs.items()):
        names = list(every[0]["layers"])
        means = [statistics.mean(run["layers"][n] for run in every) for n in names]
        at = [number + 0.25 * place for number in range(len(names))]
        spread = [statistics.pstdev([r["layers"][n] for r in every]) for n in names]
        ax.bar(at, means, width=0.25, yerr=spread, label=kind)
        ax.set_xticks(at, [name.rpartition(".")[2] for name in names])
    ax.set_ylabel("share of the Fisher matrix's trace")
    ax.legend()
    save(args.output, "transformer_curvature", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
