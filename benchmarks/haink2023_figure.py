"""What Haink (2023) reports, and the figure of what haink2023.py measures."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

DEPTHS = (5, 10, 20, 50)  # numbers of components that are compared

REPORTED = {
    "accuracy, layer from p_1 alone": "substantial, plain [6.2]",
    "accuracy, layer from 500 PCs": "peak, penalty [6.2]",
    "p_1 in SV 1-5": "outliers plain, bulk penalty [6.1]",
    "drift R^2": "linear [6.3]",
    "drift var / a^2(T^2-1)/12": "1 [6.3]",
    "pc1 / pc2 variance": "first >> rest [6.3]",
    "|theta_1| grows by": "+ plain, - penalty [6.3]",
    "cos(p_1, w)": "0.7 plain [6.5]",
    "PCs of weights in top 10": "below updates' [7.1]",
    "PCs of updates in top 10": "above weights' [7.1]",
    "variance ~ curvature^alpha": "about 2 (cited) [3.2]",
    "weight product, top 1 %": "suppressed, plain [7.2]",
    "weight product, 1-5 %": "peak below the top [7.2]",
    "weight product, maximum at %": "6-25 (n=8192) [7.2]",
    "share of last layer / null, top 10": "> 1 [7.5]",
    "share of first layer / null, top 10": "< 1 [7.5]",
    "layer's top 10: best overlap": "similar, not equal [7.4]",
    "negative eigenvalues": "small fraction [7.5]",
    "layer's |lambda_min| / lambda_max": "none in layers [7.4]",
    "participation top 10": "large at both ends [7.6]",
    "participation bottom 10": "large at both ends [7.6]",
    "SV 1-5 in top 20 % of eigenvectors": "outliers at top [7.3]",
    "spacings' distance from Wigner": "not Wigner [7.5]",
    "Porter-Thomas p, mean": "0 [7.5]",
    "weight product at init, top 1 %": "smaller at the top [7.6]",
    "accuracy, largest 20 % / full": "full with 20 % [7.2]",
    "accuracy, smallest 80 %": "no information [7.4]",
    "log10 loss, layer x 3": "falls plain, rises penalty [6.5]",
    "top: quadratic up to step": "0.1 [7.4]",
    "top: loss rise when removed": "does not matter [7.4]",
    "largest product: loss rise when removed": "leaves quadratic [7.4]",
}


def figure_of(curves: dict[str, dict[str, list[float]]]) -> Figure:
    """Return the figure: spectrum, products, reconstruction, drift, participation."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for (name, curve), colour in zip(curves.items(), colours, strict=False):
        values = np.abs(curve["eigenvalues"])
        axes[0, 0].plot(np.arange(1, len(values) + 1), values, label=name, lw=1)
        product = np.asarray(curve["weight product"]) ** 2 * len(values)
        smooth = np.convolve(product, np.ones(25) / 25, "same")
        axes[0, 1].plot(np.arange(1, len(smooth) + 1), smooth, label=name, lw=1)
        axes[0, 2].plot(curve["counts"], curve["accuracy"], label=name)
        for i, style in enumerate(("-", "--", ":")):
            label = name if i == 0 else None
            score = curve[f"theta {i + 1}"]
            axes[1, 0].plot(score, style, color=colour, label=label, lw=1)
        spread = np.asarray(curve["participation"])
        axes[1, 1].plot(np.arange(1, len(spread) + 1), spread, ".", ms=2, label=name)
        for kind, style in (("updates", "o-"), ("weights", "x--")):
            values = curve[f"PCs of {kind}"]
            axes[1, 2].plot(
                DEPTHS[: len(values)],
                values,
                style,
                color=colour,
                label=f"{kind}, {name}",
            )
    axes[0, 0].set(title="|eigenvalues| of the network", xscale="log", yscale="log")
    axes[0, 0].set_ylim(bottom=1e-10)
    axes[0, 1].set(title="P c_i^2, mean of 25", xscale="log", yscale="log")
    axes[0, 1].axhline(1, color="0.5", ls="--")
    axes[0, 2].set(title="test accuracy of the first directions", xlabel="share")
    axes[1, 0].set(title="scores of the 32 x 32 layer (solid: first)", xlabel="step")
    axes[1, 1].set(title="inverse participation ratio", xlabel="index", yscale="log")
    axes[1, 2].set(title="first k components in the layer's top k", xlabel="k")
    axes[1, 2].set_ylim(0, 1)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
