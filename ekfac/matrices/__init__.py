"""The algebra of curvature matrices: one interface, one file per structure.

It knows tensors and names; no modules, no hooks, no data.
"""

from ekfac.matrices.base import CurvatureMatrix, from_state_dict, merge
from ekfac.matrices.block_diagonal import BlockDiagonalMatrix
from ekfac.matrices.dense import DenseMatrix, DiagonalMatrix
from ekfac.matrices.implicit import ImplicitMatrix
from ekfac.matrices.kronecker import (
    EKFACMatrix,
    KFACMatrix,
    KroneckerFactors,
    LayerFactors,
)
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
