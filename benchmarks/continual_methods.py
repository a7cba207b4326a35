"""The penalties that ``continual.py`` compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ekfac import EKFAC, ParameterVector
from ekfac.continual import (
    MemoryAwareSynapses,
    Penalty,
    QuadraticPenalty,
    SynapticIntelligence,
)
from ekfac.matrices import DiagonalMatrix

CONSOLIDATED = 1000  # images of a task that the loader gives


@dataclass(frozen=True)
class Method:
    """A penalty, what it is made of at the end of a task, and who trains.

    Attributes:
        name: In the table.
        kind: ``"none"``, ``"l2"``, ``"si"``, ``"mas"`` or a structure.
        source: ``"loader"`` or, from the optimizer, which scalings.
        optimizer: ``"Adam"`` or ``"EKFAC"``.
        options: Of ``QuadraticPenalty``.
    """

    name: str
    kind: str
    source: str = "loader"
    optimizer: str = "Adam"
    options: dict[str, Any] = field(default_factory=dict)

    def penalty(self, model: nn.Module, strength: float) -> Penalty | None:
        """Return the penalty for a network."""
        if self.kind == "none":
            return None
        if self.kind == "si":
            return SynapticIntelligence(model, strength)
        if self.kind == "mas":
            return MemoryAwareSynapses(model, strength)
        structure: Any = "diagonal" if self.kind == "l2" else self.kind
        return QuadraticPenalty(model, structure, strength, **self.options)

    def consolidate(
        self, penalty: Penalty | None, task: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add a task to the penalty."""
        x, y = task.x_train[:CONSOLIDATED], task.y_train[:CONSOLIDATED]
        data = list(zip(x.split(500), y.split(500), strict=True))
        if isinstance(penalty, SynapticIntelligence):
            penalty.consolidate()
        elif isinstance(penalty, MemoryAwareSynapses):
            penalty.consolidate(data)
        elif isinstance(penalty, QuadraticPenalty):
            if self.kind == "l2":
                ones = ParameterVector.from_model(penalty.model).map(torch.ones_like)
                penalty.consolidate(DiagonalMatrix(ones))
            elif self.source == "loader":
                penalty.consolidate(data)
            else:
                assert isinstance(optimizer, EKFAC)
                scalings: Any = data if self.source == "re-estimated" else self.source
                penalty.consolidate(optimizer.curvature, scalings=scalings)


METHODS = (
    Method("none", "none"),
    Method("L2", "l2"),
    Method("EWC", "diagonal"),
    Method("SI", "si"),
    Method("MAS", "mas"),
    Method("KFAC", "kfac"),
    Method("EKFAC", "ekfac"),
    Method("none", "none", optimizer="EKFAC"),
    Method("EKFAC", "ekfac", optimizer="EKFAC"),
    Method("KFAC, optimizer", "kfac", "live", "EKFAC"),
    Method("EKFAC, optimizer, live", "ekfac", "live", "EKFAC"),
    Method("EKFAC, optimizer, kronecker", "ekfac", "kronecker", "EKFAC"),
    Method("EKFAC, optimizer, re-estimated", "ekfac", "re-estimated", "EKFAC"),
)
UNITS = {"l2": 0.01, "diagonal": 10.0, "si": 0.1, "mas": 0.1, "kfac": 1.0, "ekfac": 1.0}
MERGES = {
    "kfac": ("exact", "pooled", "nearest", "optimal"),
    "ekfac": ("exact", "first_basis", "joint_basis"),
}
