"""What training and trained networks look like: functions that return dataclasses."""

from ekfac.diagnostics.duals import Dual, dual
from ekfac.diagnostics.eigenvectors import (
    Concentration,
    concentration,
    eigenfunctions,
    kronecker_concentration,
)
from ekfac.diagnostics.embedded import embedded_factors
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
from ekfac.diagnostics.mean_field import MeanField, PredictedSpectrum, mean_field_theory
from ekfac.diagnostics.overlaps import (
    OrderParameters,
    order_parameters,
    order_parameters_of_factors,
)
from ekfac.diagnostics.quality import (
    ApproximationQuality,
    Interval,
    approximation_quality,
)
from ekfac.diagnostics.redundancy import (
    Redundancy,
    redundant_neurons,
    redundant_neurons_of_factors,
)
from ekfac.diagnostics.signs import Inertia, inertia
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
from ekfac.diagnostics.steps import StepBound, step_bound

__all__ = [
    "ApproximationQuality",
    "Concentration",
    "Dual",
    "Embedding",
    "EmbeddingCheck",
    "EstimatedSpectrum",
    "FeatureMetric",
    "Inertia",
    "Interval",
    "MeanField",
    "OrderParameters",
    "PredictedSpectrum",
    "Redundancy",
    "SoftmaxBounds",
    "SoftmaxMoments",
    "Spectrum",
    "StepBound",
    "approximation_quality",
    "check_embedding",
    "concentration",
    "dual",
    "eigenfunctions",
    "embedded_factors",
    "estimated_spectrum",
    "feature_metric",
    "feature_metric_of_factors",
    "inertia",
    "kronecker_concentration",
    "layer_spectra",
    "mean_field_theory",
    "order_parameters",
    "order_parameters_of_factors",
    "redundant_neurons",
    "redundant_neurons_of_factors",
    "softmax_bounds",
    "softmax_moments",
    "softmax_prediction",
    "spectrum",
    "split",
    "split_equally",
    "step_bound",
]
