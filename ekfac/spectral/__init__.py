"""Eigenvalues, traces and diagonals of matrices known through their products.

Every function takes an operator, anything symmetric with ``shape``, ``dtype``,
``device`` and ``@`` on columns ``[n, k]``: a curvature matrix, a plain tensor, or a
:class:`FunctionOperator` around a callable. Every function takes a generator and
returns a frozen dataclass that says how far to trust the value.
"""

from ekfac.spectral.eigensolvers import conjugate_gradient, lanczos, lobpcg
from ekfac.spectral.operators import (
    Eigenpairs,
    Estimate,
    FunctionOperator,
    Solution,
    SymmetricOperator,
    watched,
)
from ekfac.spectral.trace import (
    SpectralDensity,
    hutchinson_diagonal,
    hutchinson_trace,
    hutchpp_trace,
    log_determinant,
    spectral_density,
    squared_frobenius_norm,
    xdiag,
    xtrace,
)

__all__ = [
    "Eigenpairs",
    "Estimate",
    "FunctionOperator",
    "Solution",
    "SpectralDensity",
    "SymmetricOperator",
    "conjugate_gradient",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp_trace",
    "lanczos",
    "lobpcg",
    "log_determinant",
    "spectral_density",
    "squared_frobenius_norm",
    "watched",
    "xdiag",
    "xtrace",
]
