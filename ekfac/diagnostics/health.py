"""The optimizer's own health: how good, how old and how costly its curvature is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import pyplot
from ekfac.diagnostics.layer_state import LayerHealth, Norms, layer_health
from ekfac.errors import NotReadyError

# What the table shows: heading -> attribute of LayerHealth.
COLUMNS = {
    "layer": "layer",
    "block": "block",
    "basis age": "basis_age",
    "off-diag. A": "off_diagonal_A",
    "off-diag. G": "off_diagonal_G",
    "drift": "drift",
    "gap to K-FAC": "kfac_gap",
    "trace ratio": "trace_ratio",
    "mean scaling": "mean_scaling",
    "damping": "damping",
    "damped": "damped_share",
    "effective": "effective_share",
    "update": "update_share",
    "KiB": "bytes",
}


@dataclass(frozen=True)
class Health:
    """The state of an optimizer's curvature; printing it shows a table.

    Attributes:
        steps: Steps done.
        layers: One entry for each layer with a basis, in the model's order.
        waiting: Layers without a basis yet.
        counters: What happened to the decompositions, see ``optimizer.counters``;
            empty if it is not known.
        bytes: Memory of all curvature.
        findings: What deserves attention, in words.
    """

    steps: int
    layers: tuple[LayerHealth, ...]
    waiting: tuple[str, ...]
    counters: dict[str, int]
    bytes: int
    findings: tuple[str, ...]

    def __str__(self) -> str:
        head = f"curvature after {self.steps} steps, {self.bytes / 2**20:.1f} MiB"
        counted = ", ".join(f"{name} {count}" for name, count in self.counters.items())
        lines = [head, *_table(self.layers)]
        if counted:
            lines.append(f"decompositions: {counted}")
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])

    def by_layer(self, attribute: str) -> dict[str, float]:
        """Return one number per layer, by the name of the attribute."""
        return {layer.layer: getattr(layer, attribute) for layer in self.layers}

    def plot(self) -> Any:
        """Draw the most telling numbers of every layer; return the figure."""
        shown = {
            "off_diagonal_A": "off-diagonal share of A in its basis",
            "off_diagonal_G": "off-diagonal share of G in its basis",
            "kfac_gap": "EKFAC: relative distance to K-FAC",
            "effective_share": "share of directions above the damping",
        }
        height = 1.5 + 0.25 * len(self.layers)
        figure, axes = pyplot().subplots(
            1, len(shown), figsize=(14, height), sharey=True, layout="constrained"
        )
        for axis, (attribute, title) in zip(axes, shown.items(), strict=True):
            found = self.by_layer(attribute)
            axis.barh(list(found), list(found.values()))
            axis.set_title(title, fontsize="small")
            axis.set_xlim(0, 1)
        axes[0].invert_yaxis()
        return figure


def _table(layers: tuple[LayerHealth, ...]) -> list[str]:
    """Return the lines of the table."""
    rows = [list(COLUMNS)]
    for layer in layers:
        values = (getattr(layer, attribute) for attribute in COLUMNS.values())
        rows.append(
            [_text(value, name) for value, name in zip(values, COLUMNS, strict=True)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _text(value: float | int | str, column: str) -> str:
    if column == "KiB":
        return f"{float(value) / 1024:.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def optimizer_health(
    optimizer: Any, before: Mapping[str, Tensor] | None = None
) -> Health:
    """Return the state of a K-FAC or EKFAC optimizer's curvature.

    Nothing is changed and no data are needed. It costs about one product of two
    matrices of the factor's size per factor, far less than a decomposition.

    Args:
        optimizer: Anything with ``curvature``, ``dampings()``, ``model`` and ``steps``
            as the package's optimizers have them, and ``counters`` if it counts.
        before: The parameters before the last step, by name; without them norms of
            updates are nan.

    Raises:
        NotReadyError: If no layer has a basis yet.

    Example:
        >>> import ekfac
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ekfac.EKFAC(model)
        >>> model(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer_health(optimizer).layers[0].block
        '1x2x4'
    """
    dampings = {
        layer.name: float(damping) for layer, damping, _ in optimizer.dampings()
    }
    found, waiting, total = [], [], 0
    with torch.no_grad():
        for name, layer in optimizer.curvature.items():
            total += layer.bytes()
            if not layer.ready or name not in dampings:
                waiting.append(name)
                continue
            norms = _norms(layer, before)
            found.append(layer_health(layer, dampings[name], optimizer.steps, norms))
    if not found:
        raise NotReadyError(
            "No layer has a basis yet: the optimizer has done no step with statistics. "
            f"Layers that wait: {waiting}."
        )
    counters = getattr(optimizer, "counters", None)
    counted = {} if counters is None else asdict(counters)
    return assemble(optimizer.steps, found, waiting, counted, total)


def assemble(
    steps: int,
    layers: list[LayerHealth],
    waiting: list[str],
    counters: dict[str, int],
    total: int,
) -> Health:
    """Return the health that the layers' states make up.

    Args:
        steps: Steps done.
        layers: State of every layer with a basis.
        waiting: Names of the others.
        counters: Of the decompositions.
        total: Bytes of all curvature.
    """
    findings = tuple(_findings(layers, waiting, counters))
    return Health(steps, tuple(layers), tuple(waiting), counters, total, findings)


def _norms(layer: Any, before: Mapping[str, Tensor] | None) -> Norms:
    """Return the norms of a layer's parameters and of their last change."""
    names, tensors = layer.parameter_names, layer.block.tensors()
    now = dict(zip(names, (t.detach() for t in tensors), strict=True))
    weight = float(layer.pack(now).double().norm())
    if before is None:
        return Norms(weight)
    change = {name: t - before[name].to(t) for name, t in now.items()}
    return Norms(weight, float(layer.pack(change).double().norm()))


def _findings(
    layers: list[LayerHealth], waiting: list[str], counters: Mapping[str, int]
) -> Iterator[str]:
    """Yield what deserves attention."""
    if waiting:
        yield f"no basis yet: {', '.join(waiting)}; diagonal second moment until then"
    if counters.get("kept", 0):
        yield (
            f"{counters['kept']} decompositions failed and the old basis was kept: "
            "raise the damping, or look for exploding gradients"
        )
    if counters.get("rejected", 0):
        yield (
            f"the statistics of {counters['rejected']} layers' batches were not finite "
            "and were left out"
        )
    rules: tuple[tuple[str, Callable[[LayerHealth], bool]], ...] = (
        (
            "the basis is far from the factors' eigenvectors (off-diagonal share above "
            "0.5); a smaller basis_interval or a larger factor_decay keeps it closer",
            lambda x: max(x.off_diagonal_A, x.off_diagonal_G) > 0.5,
        ),
        (
            "damping sets the step in over 95 % of the directions; the layer is "
            "trained almost as by gradient descent",
            lambda x: x.effective_share < 0.05,
        ),
        (
            "curvature is zero; the layer gets no gradient",
            lambda x: x.mean_scaling == 0,
        ),
    )
    for text, rule in rules:
        names = [layer.layer for layer in layers if rule(layer)]
        if names:
            yield f"{', '.join(names)}: {text}"
