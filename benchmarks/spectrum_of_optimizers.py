"""The Fisher spectrum at one loss, under the spectral step, AdamW and Muon.

    python benchmarks/spectrum_of_optimizers.py          # one thread, three seeds

A 64-32-32-10 ReLU network and the transformer of ``transformer_curvature.py`` learn
scikit-learn's digits until the loss on all of them is 0.3 or less, looked at every ten
steps, with each optimizer at two learning rates. Of the exact Fisher matrix on 100
images, by the dual: largest eigenvalue, trace, and effective rank.
"""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import torch
from common import bar, parser, print_seconds, save, spread, table
from sklearn.datasets import load_digits
from through_training import Rows
from torch import nn
from transformer_curvature import BLOCKS, HEADS, RATES, trained

from ekfac.diagnostics import dual


def mlp() -> nn.Module:
    """Return a ReLU network on images ``[N, 1, 8, 8]``."""
    layers = [nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


NETWORKS = {"MLP": mlp, "transformer": lambda: Rows(heads=HEADS, blocks=BLOCKS)}


def main() -> None:
    """Train everything; print the table and save the figure."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--loss", type=float, default=0.3)
    arguments.add_argument("--limit", type=int, default=2500)
    args = arguments.parse_args()
    if args.quick:
        args.seeds, args.limit = [0], 10
    torch.set_num_threads(1)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    rows: list[dict[str, Any]] = []
    runs: dict[str, list[dict[str, Any]]] = {}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for ax, (network, make) in zip(axes, NETWORKS.items(), strict=True):
        for number, (kind, rate) in enumerate(RATES.items()):
            for factor, style in ((1.0, "-"), (0.3, "--")):
                each = runs.setdefault(f"{network}, {kind}, {factor * rate:g}", [])
                for seed in bar(args.seeds, "seeds"):
                    torch.manual_seed(seed)
                    model, steps, loss = trained(
                        kind, make(), factor, (x, y), args.loss, args.limit
                    )
                    spectrum = dual(model, x[:100], "categorical").spectrum()
                    run: dict[str, Any] = {"steps": float(steps), "loss": loss}
                    run |= {"largest": spectrum.maximum, "trace": spectrum.trace}
                    run["effective rank"] = spectrum.effective_rank
                    each.append(run)
                label = f"{kind}, {factor * rate:g}"
                ranks = range(1, len(spectrum.values) + 1)
                ax.loglog(
                    ranks, spectrum.values, style, color=f"C{number}", label=label
                )
                row = {"network": network, "optimizer": kind, "rate": factor * rate}
                rows.append(
                    row | {key: spread([run[key] for run in each]) for key in each[0]}
                )
        ax.set(title=network, xlabel="rank", ylabel="eigenvalue", ylim=(1e-6, None))
        ax.legend(fontsize=8)
    print(table(rows))
    print_seconds()
    save(args.output, "spectrum_of_optimizers", {"runs": runs}, figure)


if __name__ == "__main__":
    main()
