"""The panels of ``karakida2020.py``, one row of axes for each of its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

Found = Mapping[str, Sequence[Mapping[str, Any]]]
COLOURS = {"tanh": "tab:blue", "ReLU": "tab:red", "linear": "tab:green"}


def pooled(found: Sequence[Mapping[str, Any]], key: str, skip: int = 0) -> np.ndarray:
    """Return the eigenvalues of all networks, without each one's largest ``skip``."""
    return torch.cat([one[key][skip:] for one in found]).double().clamp(min=0).numpy()


def histogram(
    axes: Axes,
    found: Sequence[Mapping[str, Any]],
    key: str,
    outliers: int,
    *,
    title: str,
    theory: float | None,
) -> None:
    """Draw all eigenvalues in black and those without the outliers in dashed red."""
    everything = pooled(found, key)
    bins = np.linspace(0, max(everything.max(), theory or 0) * 1.02, 100).tolist()
    axes.hist(everything, bins, histtype="step", color="black", label="all")
    rest = pooled(found, key, outliers)
    label = f"without the largest {outliers}"
    axes.hist(rest, bins, histtype="step", color="tab:red", ls="--", label=label)
    if theory is not None:
        axes.axvline(theory, color="tab:blue", label="predicted maximum")
    axes.set(title=title, xlabel="eigenvalue", ylabel="number", yscale="log")
    axes.legend(fontsize=8)


def draw_3(line: Sequence[Axes], found: Found, chosen: Mapping[str, Any]) -> None:
    """Draw Figure 3: spectra of the Fisher matrices of regression and softmax."""
    a, b = chosen["3a"], chosen["3b"]
    theory = a.theory()
    whole, block = theory.fisher(a.examples), theory.layer(2, a.examples)
    for axes, key, title, predicted in zip(
        line, ("whole", "block"), ("F", "F²²"), (whole, block), strict=False
    ):
        histogram(
            axes,
            found["3a"],
            key,
            a.outputs,
            title=f"3a  {title}, M = {a.width}",
            theory=predicted.maximum,
        )
    histogram(
        line[2],
        found["3b"],
        "whole",
        b.outputs - 1,
        title=f"3b  F_cross, M = {b.width}",
        theory=None,
    )
    spread = torch.stack([one["whole"][: b.outputs] for one in found["3b"]]).numpy()
    inset = line[2].inset_axes((0.42, 0.3, 0.55, 0.3))
    inset.boxplot(spread, widths=0.6, showfliers=False)
    inset.set_title("largest, by rank", fontsize=7)
    inset.tick_params(labelsize=6)
    line[3].hist(pooled(found["3b"], "Q"), 100, histtype="step", color="black")
    line[3].set(title="3b  Q", xlabel="eigenvalue", ylabel="number", yscale="log")


def draw_4(line: Sequence[Axes], found: Found, chosen: Mapping[str, Any]) -> None:
    """Draw Figure 4: statistics of ``F_cross`` by width."""
    for i, what in enumerate(("mean", "second moment", "maximum")):
        axes = line[i]
        for name, colour in COLOURS.items():
            members = [s for s in chosen.values() if s.activation == name]
            widths = [s.width for s in members]
            values = [
                torch.stack([one["measured"][i] for one in found[s.name]])
                for s in members
            ]
            theory = [
                torch.stack([one["predicted"] for one in found[s.name]]).mean(dim=0)
                for s in members
            ]
            axes.errorbar(
                widths,
                [float(v.mean()) for v in values],
                [float(v.std()) for v in values],
                fmt="o",
                ms=4,
                color=colour,
                label=name,
            )
            axes.plot(widths, [float(t[i]) for t in theory], color=colour)
            if i == 2:
                upper = [float(t[3]) for t in theory]
                axes.plot(widths, upper, color=colour, ls="--")
        axes.set(title=f"4  F_cross: {what}", xlabel="M", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    line[0].legend()
    line[2].set_title("4  F_cross: maximum (lower –, upper - -)")
    line[3].axis("off")


def draw_6(line: Sequence[Axes], found: Found, chosen: Mapping[str, Any]) -> None:
    """Draw Figure 6: spectra of the tangent kernel by examples."""
    widest = max(s.width for s in chosen.values())
    many = [s for s in chosen.values() if s.width == widest]
    for setting in sorted(many, key=lambda s: s.examples):
        values = pooled(found[setting.name], "plain") / setting.examples
        bins = np.geomspace(1e-4, 3, 80).tolist()
        label = f"N = {setting.examples}"
        line[0].hist(values, bins, histtype="step", density=True, label=label)
    line[0].set(title=f"6  NTK / N, M = {widest}", xscale="log", yscale="log")
    for setting in chosen.values():
        if setting.examples != setting.width:
            continue
        for axes, key in ((line[1], "plain"), (line[2], "centred")):
            values = pooled(found[setting.name], key)
            bins = np.linspace(0, 25, 100).tolist()
            label = f"N = M = {setting.width}"
            axes.hist(values, bins, histtype="step", density=True, label=label)
            axes.set(yscale="log", title=f"6  NTK, {key}")
    for axes in line[:3]:
        axes.set(xlabel="eigenvalue", ylabel="density")
        axes.legend(fontsize=8)
    line[1].set_title("6  NTK (outliers beyond 25 not shown)")
    line[2].set_title("6  NTK, mean-subtracted")
    line[3].axis("off")


def draw_7(line: Sequence[Axes], found: Found, chosen: Mapping[str, Any]) -> None:
    """Draw Figure 7: spectra of the metric of inputs and features."""
    setting = chosen["7"]
    theory, n = setting.theory(), setting.examples
    predictions = {
        "whole": theory.feature_metric(n).maximum,
        "input": theory.layer_metric(0, n).maximum,
    }
    panels = [
        (kind, key) for kind in ("gaussian", "categorical") for key in predictions
    ]
    for axes, (kind, key) in zip(line, panels, strict=True):
        name = {"whole": "A", "input": "A⁰⁰"}[key]
        regression = kind == "gaussian"
        title = f"7a  {name}" if regression else f"7b  {name}, softmax"
        histogram(
            axes,
            found["7"],
            f"{kind} {key}",
            setting.outputs - (not regression),
            title=title,
            theory=predictions[key] if regression else None,
        )
