"""A matrix known only through its products."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ekfac import spectral
from ekfac.errors import EkfacWarning
from ekfac.matrices.base import (
    CurvatureMatrix,
    DampingSplit,
    Stack,
    VectorOrTensor,
    check_damping,
)
from ekfac.matrices.dense import DenseMatrix
from ekfac.spectral import Eigenpairs, Estimate, Solution
from ekfac.vectors import Vector, VectorSpace

if TYPE_CHECKING:
    from typing_extensions import Self


class ImplicitMatrix(CurvatureMatrix):
    """A matrix given by a callable, nothing stored.

    Products are exact; ``solve`` is by preconditioned conjugate gradients and the
    largest eigenpairs by LOBPCG. Other operations form the matrix, by ``P`` products,
    if ``P`` is at most ``dense_limit``. Beyond that, ``trace``, ``logdet``,
    ``frobenius_norm`` and ``diagonal`` are estimates from random products; the methods
    ``estimate_...`` return them with their standard errors, and
    the plain ones warn when the error exceeds the tolerance.

    Args:
        space: Names and shapes of the vectors it acts on.
        multiply: Maps columns ``[P, k]`` to their products. It must be the same
            symmetric matrix at every call: a fresh sample per call breaks the
            solvers.
        dtype: Type of the columns.
        device: Device of the columns.
        preconditioner: A matrix over the same space, of any structure that has
            ``solve``, used in ``solve`` with the same damping.
        num_products: Products that an estimate may take.
        tolerance: Relative residual of solves and relative error of estimates beyond
            which a warning is given.
        dense_limit: Largest ``P`` at which the matrix may be formed.
        generator: Source of the random vectors of estimates.
    """

    kind = "implicit"

    def __init__(
        self,
        space: VectorSpace,
        multiply: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        preconditioner: CurvatureMatrix | None = None,
        num_products: int = 200,
        tolerance: float = 1e-2,
        dense_limit: int = 512,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(space)
        if preconditioner is not None:
            self._require_same_space(preconditioner)
        self.multiply = multiply
        self.preconditioner = preconditioner
        self.num_products = num_products
        self.tolerance = tolerance
        self.dense_limit = dense_limit
        self.generator = generator
        self._dtype, self._device = dtype, torch.device(device)
