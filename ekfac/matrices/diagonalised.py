"""Structures whose eigenvectors form a basis that is cheap to change to."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ekfac.matrices.base import CurvatureMatrix
from ekfac.matrices.eigen import damped_log, damped_power
from ekfac.matrices.structure import Stack


class DiagonalisedMatrix(CurvatureMatrix):
    """A matrix ``Q diag(values) Q^T``: every operation is one on its eigenvalues.

    Structures give the eigenvalues, in any shape ``[*e]``, and the changes between
    stacks and coordinates ``[k, *e]``.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Type of the results."""
        return self._tensor().dtype

    @property
    def device(self) -> torch.device:
        """Device of the matrix and of the vectors it takes."""
        return self._tensor().device

    @abstractmethod
    def _tensor(self) -> Tensor:
        """Return any of the tensors."""

    @abstractmethod
    def _values(self) -> Tensor:
        """Return the eigenvalues, ``[*e]``."""

    @abstractmethod
    def _coordinates(self, stack: Stack) -> Tensor:
        """Return ``Q^T v``, ``[k, *e]``."""

    @abstractmethod
    def _vectors(self, coordinates: Tensor) -> Stack:
        """Return ``Q c`` of coordinates ``[k, *e]``."""

    def _apply(self, stack: Stack, multipliers: Tensor) -> Stack:
        """Return ``Q diag(multipliers) Q^T v``."""
        return self._vectors(self._coordinates(stack) * multipliers)

    def _multiply(self, stack: Stack) -> Stack:
        """Return the products."""
        return self._apply(stack, self._values())

    def _quadratic(self, stack: Stack) -> Tensor:
        """Return ``sum values coordinates^2``, ``[k]``."""
        return (
            (self._coordinates(stack).square() * self._values()).flatten(1).sum(dim=1)
        )

    def _solve(self, stack: Stack, damping: float) -> Stack:
        """Return the solutions."""
        return self._apply(stack, damped_power(self._values(), -1, damping))

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        """Return the symmetric inverse root times ``stack``."""
        return self._apply(stack, damped_power(self._values(), -0.5, damping))

    def _trace(self) -> Tensor:
        """Return the sum of the eigenvalues."""
        return self._values().sum()

    def _squared_norm(self) -> Tensor:
        """Return the sum of the squared eigenvalues."""
        return self._values().square().sum()

    def _logdet(self, damping: float) -> Tensor:
        """Return the sum of the damped eigenvalues' logarithms."""
        return damped_log(self._values(), damping).sum()

    def _eigenvalues(self) -> Tensor:
        """Return the eigenvalues, flat."""
        return self._values().flatten()

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        """Return the largest eigenvalues and their columns of ``Q``."""
        values = self._values()
        best = values.flatten().topk(k)
        one_hot = torch.zeros(
            k, values.numel(), dtype=values.dtype, device=values.device
        )
        one_hot.scatter_(1, best.indices.unsqueeze(1), 1.0)
        return best.values, self._vectors(one_hot.view(k, *values.shape))
