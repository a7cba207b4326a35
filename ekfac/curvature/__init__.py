"""Curvature statistics per layer: the state, and who writes it."""

from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.state import Average, Counters, LayerCurvature

__all__ = ["Average", "Counters", "Curvature", "LayerCurvature"]
