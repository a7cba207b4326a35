"""K-FAC and EKFAC: natural gradient in the Kronecker-factored eigenbasis."""

from ekfac.calls import rows_of_examples
from ekfac.curvature import Curvature, LayerCurvature
from ekfac.estimate import fisher, ggn, hessian, jacobian, ntk
from ekfac.monitor import Monitor
from ekfac.optim import EKFAC, KFAC
from ekfac.vectors import FunctionVector, ParameterVector

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "KFAC",
    "Curvature",
    "FunctionVector",
    "LayerCurvature",
    "Monitor",
    "ParameterVector",
    "fisher",
    "ggn",
    "hessian",
    "jacobian",
    "ntk",
    "rows_of_examples",
]
