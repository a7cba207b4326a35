"""Curvature statistics per layer: their state and their collector."""

from ekfac.curvature.average import Average
from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.state import Counters, LayerCurvature

__all__ = ["Average", "Counters", "Curvature", "LayerCurvature"]
