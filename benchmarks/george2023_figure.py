"""The figure of george2023.py."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Part = dict[str, Any]


def figure_of(name: str, parts: dict[str, Part]) -> Figure:
    """Return the figure of whatever parts there are."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    if "alignment" in parts:
        run = parts["alignment"]["runs"][0]
        for label in ("easy", "difficult", "test"):
            axes[0, 0].plot(run["steps"], run[label], "o-", label=label, ms=4)
        axes[0, 0].plot(run["steps"], run["accuracy"], "--", label="test accuracy")
        axes[0, 0].set(title="kernel alignment with the labels", xlabel="step")
    if "noise" in parts:
        for alpha, run in parts["noise"]["runs"].items():
            label = f"alpha {float(alpha):g}"
            axes[0, 1].plot(run["progress"], run["noisy"], label=label)
        axes[0, 1].invert_xaxis()
        axes[0, 1].set(title="15 % wrong labels", xlabel="loss of the clean examples")
        axes[0, 1].set_ylabel("loss of the wrongly labelled ones")
    if "complexity" in parts:
        for kind, marker in (("noise", "o"), ("width", "s")):
            for i, run in enumerate(parts["complexity"]["series"][kind]):
                axes[1, 0].plot(
                    [r["C/n"] for r in run],
                    [r["gap"] for r in run],
                    f"{marker}-",
                    label=f"{'label noise' if kind == 'noise' else 'width'}, seed {i}",
                    ms=4,
                )
        axes[1, 0].set(title="complexity measure", xlabel="C / n", ylabel="gap")
    if "scores" in parts:
        levels = parts["scores"]["levels"]
        for group, values in parts["scores"]["differences"][0].items():
            axes[1, 1].plot(levels, values, "o-", label=group, ms=4)
        axes[1, 1].invert_xaxis()
        axes[1, 1].axhline(0, color="black", lw=0.8)
        axes[1, 1].set(title="groups by C-score, most difficult first")
        axes[1, 1].set(xlabel="mean loss", ylabel="loss: ordinary - lazy")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    figure.suptitle(f"George 2023, chapters 5 and 6, on {name}")
    return figure
