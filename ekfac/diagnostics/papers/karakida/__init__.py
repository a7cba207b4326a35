"""Karakida, Akaho & Amari 2020: mean-field theory of the Fisher matrix."""

from ekfac.diagnostics.papers.karakida.mean_field import (
    MeanField,
    PredictedSpectrum,
    SoftmaxBounds,
    SoftmaxMoments,
    mean_field_theory,
    softmax_bounds,
    softmax_moments,
    softmax_prediction,
)
from ekfac.diagnostics.papers.karakida.order_parameters import (
    FeatureMetric,
    OrderParameters,
    feature_metric,
    feature_metric_of_factors,
    order_parameters,
    order_parameters_of_factors,
)

__all__ = [
    "FeatureMetric",
    "MeanField",
    "OrderParameters",
    "PredictedSpectrum",
    "SoftmaxBounds",
    "SoftmaxMoments",
    "feature_metric",
    "feature_metric_of_factors",
    "mean_field_theory",
    "order_parameters",
    "order_parameters_of_factors",
    "softmax_bounds",
    "softmax_moments",
    "softmax_prediction",
]
