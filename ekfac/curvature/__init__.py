"""Curvature statistics per layer: the state, and who writes it."""

from ekfac.curvature.average import Average
from ekfac.curvature.banks import Curvature
from ekfac.curvature.proposals import Counters
from ekfac.curvature.state import LayerCurvature

__all__ = ["Average", "Counters", "Curvature", "LayerCurvature"]
