"""K-FAC and EKFAC: natural gradient in the Kronecker-factored eigenbasis."""

from ekfac.curvature import Curvature, LayerCurvature
from ekfac.optim import EKFAC, KFAC

__version__ = "0.1.0"

__all__ = ["EKFAC", "KFAC", "Curvature", "LayerCurvature"]
