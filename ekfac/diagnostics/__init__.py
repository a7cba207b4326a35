"""What training and trained networks look like: functions that return dataclasses."""

from ekfac.diagnostics.alignment import (
    Aligned,
    LabelAlignment,
    kernel_alignment,
    label_alignment,
)
from ekfac.diagnostics.basis_quality import (
    BasisQuality,
    basis_quality,
)
from ekfac.diagnostics.complexity import (
    Complexity,
    ComplexityMeasure,
    tangent_trace,
)
from ekfac.diagnostics.costs import (
    Costs,
    LayerCost,
    layer_costs,
)
from ekfac.diagnostics.directions import (
    Directions,
    layer_directions,
    top_directions,
)
from ekfac.diagnostics.duals import (
    Dual,
    dual,
)
from ekfac.diagnostics.eigenvectors import (
    Concentration,
    LayerShares,
    Overlap,
    WeightProduct,
    as_matrix,
    concentration,
    eigenfunctions,
    kronecker_concentration,
    layer_shares,
    overlap,
    principal_cosines,
    singular_directions,
    weight_product,
)
from ekfac.diagnostics.embedded import (
    embedded_factors,
)
from ekfac.diagnostics.embedding import (
    Embedding,
    EmbeddingCheck,
    check_embedding,
    split,
    split_equally,
)
from ekfac.diagnostics.features import (
    FeatureMetric,
    feature_metric,
    feature_metric_of_factors,
)
from ekfac.diagnostics.groups import (
    EqualLoss,
    GroupCurves,
    GroupRecorder,
    compare_at_equal_loss,
    consistency_scores,
    difficulty_groups,
    example_losses,
)
from ekfac.diagnostics.health import (
    Health,
    optimizer_health,
)
from ekfac.diagnostics.landscape import (
    Curve,
    LossProfile,
    accuracy_of,
    cumulative_reconstruction,
    loss_of,
    loss_profile,
    loss_scaling,
    with_parameters,
)
from ekfac.diagnostics.layer_state import (
    LayerHealth,
    layer_health,
)
from ekfac.diagnostics.lazy import (
    AlphaScaled,
    Linearised,
    Linearity,
    LinearityProbe,
)
from ekfac.diagnostics.mean_field import (
    MeanField,
    PredictedSpectrum,
    mean_field_theory,
)
from ekfac.diagnostics.overlaps import (
    OrderParameters,
    order_parameters,
    order_parameters_of_factors,
)
from ekfac.diagnostics.products import (
    HessianProducts,
)
from ekfac.diagnostics.pruning import (
    EigenPruned,
    KroneckerBasis,
    Tickets,
    eigen_pruned,
    kronecker_reconstruction,
    lottery_tickets,
)
from ekfac.diagnostics.quadratic_model import (
    QuadraticModel,
)
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
from ekfac.diagnostics.random_matrix import (
    Edge,
    PorterThomas,
    Spacings,
    level_spacings,
    marchenko_pastur_edge,
    porter_thomas,
)
from ekfac.diagnostics.reduction import (
    StepQuality,
    step_quality,
)
from ekfac.diagnostics.redundancy import (
    Redundancy,
    redundant_neurons,
    redundant_neurons_of_factors,
)
from ekfac.diagnostics.relaxation import (
    Relaxation,
    effective_lr,
    quadratic_relaxation,
)
from ekfac.diagnostics.signs import (
    Inertia,
    inertia,
)
from ekfac.diagnostics.softmax import (
    SoftmaxBounds,
    SoftmaxMoments,
    softmax_bounds,
    softmax_moments,
    softmax_prediction,
)
from ekfac.diagnostics.spectra import (
    EstimatedSpectrum,
    Spectrum,
    estimated_spectrum,
    layer_spectra,
    spectrum,
)
from ekfac.diagnostics.step_modes import (
    StepModes,
    step_modes,
)
from ekfac.diagnostics.steps import (
    StepBound,
    step_bound,
)
from ekfac.diagnostics.subnetworks import (
    LayerRobustness,
    SelectionOverlap,
    ThresholdCurve,
    layer_reinitialisation,
    layer_rerandomisation,
    parameter_scores,
    removal_curve,
    replaced_parameters,
    select_parameters,
    selection_overlap,
    threshold_curve,
    threshold_reinitialised,
)
from ekfac.diagnostics.supernat import (
    FeatureDescent,
    feature_descent,
)
from ekfac.diagnostics.trajectory import (
    Drift,
    PowerLaw,
    PrincipalComponents,
    TrajectoryRecorder,
    crossover_curvature,
    drift,
    linear_drift_variance,
    principal_components,
    subspace_overlaps,
    variance_curvature,
)
from ekfac.diagnostics.truncation import TruncationError, truncation_error
from ekfac.diagnostics.weight_change import (
    WeightChange,
    change_histogram,
    weight_changes,
)
from ekfac.spectral.singular import singular_value_density

__all__ = [
    "Aligned",
    "AlphaScaled",
    "ApproximationQuality",
    "BasisQuality",
    "Complexity",
    "ComplexityMeasure",
    "Concentration",
    "Costs",
    "Curve",
    "Directions",
    "Drift",
    "Dual",
    "Edge",
    "EigenPruned",
    "Embedding",
    "EmbeddingCheck",
    "EqualLoss",
    "EstimatedSpectrum",
    "FeatureDescent",
    "FeatureMetric",
    "GroupCurves",
    "GroupRecorder",
    "Health",
    "HessianProducts",
    "Inertia",
    "Interval",
    "KroneckerBasis",
    "LabelAlignment",
    "LayerCost",
    "LayerHealth",
    "LayerRobustness",
    "LayerShares",
    "Linearised",
    "Linearity",
    "LinearityProbe",
    "LossProfile",
    "MeanField",
    "OptimalRescaling",
    "OrderParameters",
    "Overlap",
    "PorterThomas",
    "PowerLaw",
    "PredictedSpectrum",
    "PrincipalComponents",
    "QuadraticModel",
    "RademacherComplexity",
    "Redundancy",
    "Relaxation",
    "SelectionOverlap",
    "SoftmaxBounds",
    "SoftmaxMoments",
    "Spacings",
    "Spectrum",
    "StepBound",
    "StepModes",
    "StepQuality",
    "ThresholdCurve",
    "Tickets",
    "TrajectoryRecorder",
    "TruncationError",
    "WeightChange",
    "WeightProduct",
    "accuracy_of",
    "approximation_quality",
    "as_matrix",
    "basis_quality",
    "change_histogram",
    "check_embedding",
    "compare_at_equal_loss",
    "concentration",
    "consistency_scores",
    "crossover_curvature",
    "cumulative_reconstruction",
    "difficulty_groups",
    "drift",
    "dual",
    "effective_lr",
    "eigen_pruned",
    "eigenfunctions",
    "embedded_factors",
    "estimated_spectrum",
    "example_losses",
    "feature_descent",
    "feature_metric",
    "feature_metric_of_factors",
    "inertia",
    "kernel_alignment",
    "kronecker_concentration",
    "kronecker_reconstruction",
    "label_alignment",
    "layer_costs",
    "layer_directions",
    "layer_health",
    "layer_reinitialisation",
    "layer_rerandomisation",
    "layer_shares",
    "layer_spectra",
    "level_spacings",
    "linear_drift_variance",
    "loss_of",
    "loss_profile",
    "loss_scaling",
    "lottery_tickets",
    "marchenko_pastur_edge",
    "margin_bound",
    "margin_loss",
    "mean_field_theory",
    "multiclass_bound",
    "optimal_rescaling",
    "optimizer_health",
    "order_parameters",
    "order_parameters_of_factors",
    "overlap",
    "parameter_scores",
    "porter_thomas",
    "principal_components",
    "principal_cosines",
    "quadratic_relaxation",
    "rademacher_complexity",
    "redundant_neurons",
    "redundant_neurons_of_factors",
    "removal_curve",
    "replaced_parameters",
    "select_parameters",
    "selection_overlap",
    "singular_directions",
    "singular_value_density",
    "softmax_bounds",
    "softmax_moments",
    "softmax_prediction",
    "spectrum",
    "split",
    "split_equally",
    "step_bound",
    "step_modes",
    "step_quality",
    "subspace_overlaps",
    "tangent_trace",
    "threshold_curve",
    "threshold_reinitialised",
    "top_directions",
    "truncation_error",
    "variance_curvature",
    "weight_changes",
    "weight_product",
    "with_parameters",
]
