"""What training and trained networks look like: functions that return dataclasses."""

from ekfac.diagnostics.duals import Dual, dual
from ekfac.diagnostics.eigenvectors import (
    Concentration,
    concentration,
    eigenfunctions,
    kronecker_concentration,
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
    "EstimatedSpectrum",
    "FeatureMetric",
    "Interval",
    "MeanField",
    "OrderParameters",
    "PredictedSpectrum",
    "SoftmaxBounds",
    "SoftmaxMoments",
    "Spectrum",
    "StepBound",
    "approximation_quality",
    "concentration",
    "dual",
    "eigenfunctions",
    "estimated_spectrum",
    "feature_metric",
    "feature_metric_of_factors",
    "kronecker_concentration",
    "layer_spectra",
    "mean_field_theory",
    "order_parameters",
    "order_parameters_of_factors",
    "softmax_bounds",
    "softmax_moments",
    "softmax_prediction",
    "spectrum",
    "step_bound",
]
