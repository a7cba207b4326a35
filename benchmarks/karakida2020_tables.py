"""The tables of ``karakida2020.py``: what was predicted beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac.diagnostics import Spectrum

Measured = Mapping[str, Tensor]
Found = Mapping[str, Sequence[Measured]]


def row(what: str, predicted: float, values: Sequence[float]) -> dict[str, Any]:
    """Return one row: a prediction, the mean and deviation over networks, the ratio."""
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {
        "quantity": what,
        "predicted": float(predicted),
        "measured": mean,
        "deviation": deviation,
        "ratio": mean / predicted,
    }


def rows_of_spectra(
    what: str, theory: Any, spectra: Sequence[Spectrum], outputs: int
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one matrix."""
    yield row(f"{what} mean", theory.mean, [s.mean for s in spectra])
    second = [s.second_moment for s in spectra]
    yield row(f"{what} second moment", theory.second_moment, second)
    yield row(f"{what} maximum", theory.maximum, [s.maximum for s in spectra])
    tops = [float(s.values[:outputs].mean()) for s in spectra]
    yield row(f"{what} mean of top C", theory.maximum, tops)


def of(values: Tensor, size: int) -> Spectrum:
    """Return measured eigenvalues as a spectrum."""
    return Spectrum(values.double(), size, "exact")


def table_3(found: Found, chosen: Mapping[str, Any]) -> Any:
    """Return the rows of Figure 3."""
    rows = []
    a, b = chosen["3a"], chosen["3b"]
    theory = a.theory()
    for key, name, prediction in (
        ("whole", "F", theory.fisher(a.examples)),
        ("block", "F^22", theory.layer(2, a.examples)),
    ):
        index = int(key == "block")
        spectra = [of(m[key], int(m["size"][index])) for m in found["3a"]]
        rows += rows_of_spectra(name, prediction, spectra, a.outputs)
    for r in range(b.outputs + 1):
        predicted = [
            float(m["mean_Q"][r] * m["linear"].mean()) if r < b.outputs - 1 else 0.0
            for m in found["3b"]
        ]
        values = [float(m["whole"][r]) for m in found["3b"]]
        mean = statistics.fmean(predicted)
        line = row(f"F_cross eigenvalue {r + 1}", mean or float("nan"), values)
        rows.append(line)
    return rows


def table_4(found: Found, chosen: Mapping[str, Any]) -> Any:
    """Return the rows of Figure 4."""
    rows = []
    for name, setting in chosen.items():
        both = torch.stack([m["measured"] for m in found[name]]).double()
        theory = torch.stack([m["predicted"] for m in found[name]]).double()
        line: dict[str, Any] = {"activation": setting.activation, "M": setting.width}
        for i, what in enumerate(("mean", "second")):
            line[what] = float(both[:, i].mean())
            line[f"{what} predicted"] = float(theory[:, i].mean())
        line["lower"] = float(theory[:, 2].mean())
        line["maximum"] = float(both[:, 2].mean())
        line["deviation"] = float(both[:, 2].std())
        line["upper"] = float(theory[:, 3].mean())
        inside = (both[:, 2] >= theory[:, 2]) & (both[:, 2] <= theory[:, 3])
        line["inside"] = float(inside.double().mean())
        rows.append(line)
    return rows


def table_6(found: Found, chosen: Mapping[str, Any]) -> Any:
    """Return the rows of Figure 6."""
    rows = []
    for name, setting in chosen.items():
        n, c = setting.examples, setting.outputs
        theory = setting.theory().kernel(n).maximum / n
        plain = [m["plain"].double() for m in found[name]]
        line: dict[str, Any] = {"M": setting.width, "N": n}
        line["networks"] = len(plain)
        line["max/N predicted"] = theory
        line["max/N"] = statistics.fmean(float(v[0]) / n for v in plain)
        line["top C/N"] = statistics.fmean(float(v[:c].mean()) / n for v in plain)
        line["median/N"] = statistics.fmean(float(v.median()) / n for v in plain)
        line["centred max"] = float("nan")
        line["centred median"] = float("nan")
        if "centred" in found[name][0]:
            without = [m["centred"].double() for m in found[name]]
            line["centred max"] = statistics.fmean(float(v[0]) for v in without)
            medians = [float(v.median()) for v in without]
            line["centred median"] = statistics.fmean(medians)
        rows.append(line)
    return rows


def table_7(found: Found, chosen: Mapping[str, Any]) -> Any:
    """Return the rows of Figure 7."""
    setting = chosen["7"]
    theory, n, c = setting.theory(), setting.examples, setting.outputs
    rows: list[dict[str, Any]] = []
    for key, name, prediction in (
        ("whole", "A", theory.feature_metric(n)),
        ("input", "A^00", theory.layer_metric(0, n)),
    ):
        spectra = [
            of(m[f"gaussian {key}"], len(m[f"gaussian {key}"])) for m in found["7"]
        ]
        rows += rows_of_spectra(name, prediction, spectra, c)
        for r in (0, c - 2, c - 1, c):
            values = [float(m[f"categorical {key}"][r]) for m in found["7"]]
            what = f"{name} softmax eigenvalue {r + 1}"
            rows.append(row(what, float("nan"), values))
    return rows
