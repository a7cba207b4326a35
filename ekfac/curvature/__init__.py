"""Curvature statistics per layer: their state and their collector."""

from ekfac.curvature.average import Average
from ekfac.curvature.basis_update import Counters
from ekfac.curvature.stacked_storage import Curvature
from ekfac.curvature.state import LayerCurvature

__all__ = ["Average", "Counters", "Curvature", "LayerCurvature"]
