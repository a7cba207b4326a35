"""Not forgetting: penalties around the solutions of past tasks."""

from ekfac.continual.base import Penalty
from ekfac.continual.constraint import UpdateConstraint
from ekfac.continual.directions import noise_edge, singular_directions
from ekfac.continual.importance import MemoryAwareSynapses, SynapticIntelligence
from ekfac.continual.merging import merge_error, merge_tasks
from ekfac.continual.penalty import QuadraticPenalty
from ekfac.continual.posterior import LaplacePosterior, Prediction

__all__ = [
    "LaplacePosterior",
    "MemoryAwareSynapses",
    "Penalty",
    "Prediction",
    "QuadraticPenalty",
    "SynapticIntelligence",
    "UpdateConstraint",
    "merge_error",
    "merge_tasks",
    "noise_edge",
    "singular_directions",
]
