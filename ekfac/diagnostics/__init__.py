"""What training and trained networks look like: functions that return dataclasses."""

from ekfac.diagnostics.alignment import (
    Aligned,
    LabelAlignment,
    kernel_alignment,
    label_alignment,
)
from ekfac.diagnostics.basis_quality import BasisQuality, basis_quality
from ekfac.diagnostics.complexity import Complexity, ComplexityMeasure, tangent_trace
from ekfac.diagnostics.costs import Costs, LayerCost, layer_costs
from ekfac.diagnostics.groups import (
    EqualLoss,
    GroupCurves,
    GroupRecorder,
    compare_at_equal_loss,
    consistency_scores,
    difficulty_groups,
    example_losses,
)
from ekfac.diagnostics.health import Health, optimizer_health
from ekfac.diagnostics.layer_state import LayerHealth, layer_health
from ekfac.diagnostics.lazy import AlphaScaled, Linearised, Linearity, LinearityProbe
from ekfac.diagnostics.quadratic_model import QuadraticModel
from ekfac.diagnostics.quality import (
    ApproximationQuality,
    Interval,
    approximation_quality,
)
from ekfac.diagnostics.rademacher import (
    OptimalRescaling,
    RademacherComplexity,
    margin_bound,
    margin_loss,
    multiclass_bound,
    optimal_rescaling,
    rademacher_complexity,
)
from ekfac.diagnostics.reduction import StepQuality, step_quality
from ekfac.diagnostics.step_modes import StepModes, step_modes
from ekfac.diagnostics.supernat import FeatureDescent, feature_descent

__all__ = [
    "Aligned",
    "AlphaScaled",
    "ApproximationQuality",
    "BasisQuality",
    "Complexity",
    "ComplexityMeasure",
    "Costs",
    "EqualLoss",
    "FeatureDescent",
    "GroupCurves",
    "GroupRecorder",
    "Health",
    "Interval",
    "LabelAlignment",
    "LayerCost",
    "LayerHealth",
    "Linearised",
    "Linearity",
    "LinearityProbe",
    "OptimalRescaling",
    "QuadraticModel",
    "RademacherComplexity",
    "StepModes",
    "StepQuality",
    "approximation_quality",
    "basis_quality",
    "compare_at_equal_loss",
    "consistency_scores",
    "difficulty_groups",
    "example_losses",
    "feature_descent",
    "kernel_alignment",
    "label_alignment",
    "layer_costs",
    "layer_health",
    "margin_bound",
    "margin_loss",
    "multiclass_bound",
    "optimal_rescaling",
    "optimizer_health",
    "rademacher_complexity",
    "step_modes",
    "step_quality",
    "tangent_trace",
]
