"""George 2023: complexity of trained networks, and the order of learning."""

from ekfac.diagnostics.papers.george.complexity import (
    Complexity,
    ComplexityMeasure,
    FeatureDescent,
    OptimalRescaling,
    RademacherComplexity,
    feature_descent,
    margin_bound,
    margin_loss,
    multiclass_bound,
    optimal_rescaling,
    rademacher_complexity,
    tangent_trace,
)
from ekfac.diagnostics.papers.george.groups import (
    EqualLoss,
    GroupCurves,
    GroupRecorder,
    compare_at_equal_loss,
    consistency_scores,
    difficulty_groups,
    example_losses,
)

__all__ = [
    "Complexity",
    "ComplexityMeasure",
    "EqualLoss",
    "FeatureDescent",
    "GroupCurves",
    "GroupRecorder",
    "OptimalRescaling",
    "RademacherComplexity",
    "compare_at_equal_loss",
    "consistency_scores",
    "difficulty_groups",
    "example_losses",
    "feature_descent",
    "margin_bound",
    "margin_loss",
    "multiclass_bound",
    "optimal_rescaling",
    "rademacher_complexity",
    "tangent_trace",
]
