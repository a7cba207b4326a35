"""Not forgetting: penalties around the solutions of past tasks."""

from ekfac.continual.constraint import UpdateConstraint
from ekfac.continual.importance import MemoryAwareSynapses, SynapticIntelligence
from ekfac.continual.merging import merge_error, merge_tasks
from ekfac.continual.penalty import Penalty
from ekfac.continual.quadratic import LaplacePosterior, Prediction, QuadraticPenalty
from ekfac.continual.task_curvature import noise_edge, singular_directions

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
