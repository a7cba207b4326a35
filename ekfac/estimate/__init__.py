"""From a model and data to a curvature matrix, a Jacobian or a tangent kernel."""

from ekfac.estimate.functions import fisher, ggn, hessian
from ekfac.estimate.products import Jacobian, TransposedJacobian
from ekfac.estimate.tangent_kernel import jacobian, ntk

__all__ = [
    "Jacobian",
    "TransposedJacobian",
    "fisher",
    "ggn",
    "hessian",
    "jacobian",
    "ntk",
]
