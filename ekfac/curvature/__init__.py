"""Curvature statistics per layer: the state, and who writes it."""

from ekfac.curvature.average import Average
from ekfac.curvature.eigenbasis import Counters
from ekfac.curvature.state import Curvature, LayerCurvature

__all__ = ["Average", "Counters", "Curvature", "LayerCurvature"]
