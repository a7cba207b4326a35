"""The algebra of curvature matrices: one interface, one file per structure.

It knows tensors and names; no modules, no hooks, no data.
"""

from ekfac.matrices.base import CurvatureMatrix
from ekfac.matrices.block_diagonal import BlockDiagonalMatrix
from ekfac.matrices.combine import from_state_dict, merge
from ekfac.matrices.dense import DenseMatrix
from ekfac.matrices.diagonal import DiagonalMatrix
from ekfac.matrices.ekfac import EKFACMatrix
from ekfac.matrices.implicit import ImplicitMatrix
from ekfac.matrices.kfac import KFACMatrix
from ekfac.matrices.kronecker import KroneckerFactors, LayerFactors
from ekfac.matrices.low_rank import LowRankMatrix
from ekfac.matrices.packing import IndexPacking, Packing
from ekfac.matrices.quasi_diagonal import QuasiDiagonalMatrix

__all__ = [
    "BlockDiagonalMatrix",
    "CurvatureMatrix",
    "DenseMatrix",
    "DiagonalMatrix",
    "EKFACMatrix",
    "ImplicitMatrix",
    "IndexPacking",
    "KFACMatrix",
    "KroneckerFactors",
    "LayerFactors",
    "LowRankMatrix",
    "Packing",
    "QuasiDiagonalMatrix",
    "from_state_dict",
    "merge",
]
