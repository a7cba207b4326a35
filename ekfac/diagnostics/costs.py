"""What every layer's curvature costs: memory, and time measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCost:
    """What one layer's curvature costs.

    Attributes:
        layer: The layer's name.
        curvature_bytes: Factors, bases, scalings.
        state_bytes: Momentum and the like of its parameters.
        decompose_seconds: One decomposition of both factors.
        precondition_seconds: Rotating a gradient there and back, and dividing.
        step_seconds: Both, the decomposition spread over its interval.
    """

    layer: str
    curvature_bytes: int
    state_bytes: int
    decompose_seconds: float
    precondition_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Costs:
    """Memory and time of every layer; printing it shows a table."""

    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        names = [field.name for field in fields(LayerCost)]
        width = max(len(layer.layer) for layer in self.layers)
        heads = ["KiB curvature", "KiB state", "ms decompose", "ms precond.", "ms step"]
        lines = ["layer".ljust(width) + "".join(f"{head:>15}" for head in heads)]
        for layer in self.layers:
            values = [getattr(layer, name) for name in names[1:]]
            cells = [v / 1024 if isinstance(v, int) else v * 1e3 for v in values]
            lines.append(
                layer.layer.ljust(width) + "".join(f"{v:15.3f}" for v in cells)
            )
        return "\n".join(lines)


def layer_costs(optimizer: Any, *, repeats: int = 3, basis_interval: int = 50) -> Costs:
    """Return the memory and the time that every layer costs, measured here and now.

    The optimizer's own tensors are decomposed and multiplied, and the results thrown
    away; the least of several times counts. Updating the factors is not in it: it
    depends on the batch.

    Args:
        optimizer: A K-FAC or EKFAC optimizer after a step.
        repeats: How often each operation is timed.
        basis_interval: Over how many steps a decomposition is spread.
    """
    found = []
    for name, layer in optimizer.curvature.items():
        if not layer.ready:
            continue
        factors = [f for f in (layer.A, layer.G) if f is not None and f.dim() == 3]
        decompose = sum(
            _seconds(partial(torch.linalg.eigh, f), repeats) for f in factors
        )
        rotate = _seconds(partial(_precondition, layer), repeats)
        state = sum(
            value.numel() * value.element_size()
            for parameter in layer.block.tensors()
            for value in optimizer.state.get(parameter, {}).values()
            if isinstance(value, Tensor)
        )
        step = rotate + decompose / basis_interval
        found.append(LayerCost(name, layer.bytes(), state, decompose, rotate, step))
    return Costs(tuple(found))


def _precondition(layer: Any) -> Tensor:
    matrix: Tensor = layer.eigenvalues_G.unsqueeze(-1) * layer.eigenvalues_A.unsqueeze(
        -2
    )
    Q_G, Q_A = layer.Q_G, layer.Q_A
    for back in (False, True):
        if Q_G is not None:
            matrix = (Q_G if back else Q_G.mT) @ matrix
        if Q_A is not None:
            matrix = matrix @ (Q_A.mT if back else Q_A)
        matrix = matrix if back else matrix / (matrix.abs() + 1)
    return matrix


@torch.no_grad()
def _seconds(function: Callable[[], Any], repeats: int) -> float:
    """Return the least time of several calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
