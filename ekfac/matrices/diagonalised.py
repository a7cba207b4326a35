"""Matrices known by their eigenvalues and eigenvectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from torch import Tensor

from ekfac.matrices.base import CurvatureMatrix, Stack, VectorOrTensor
from ekfac.matrices.eigen import damped_log, damped_power


class DiagonalisedMatrix(CurvatureMatrix):
    """A matrix ``Q diag(values) Q^T``: every operation is one on its eigenvalues.

    Structures give the eigenvalues, in any shape ``[*e]``, and the changes between
    stacks and coordinates ``[k, *e]``.
    """

    @abstractmethod
    def _values(self) -> Tensor:
        """Return the eigenvalues, ``[*e]``."""

    def _resolved(self) -> Tensor:
        """Return the eigenvalues, those that cannot be told from zero as zeros."""
        return self._values()

    @abstractmethod
    def coordinates(self, stack: Stack) -> Tensor:
        """Return ``Q^T v``, ``[k, *e]``."""

    @abstractmethod
    def _vectors(self, coordinates: Tensor) -> Stack:
        """Return ``Q c`` of coordinates ``[k, *e]``."""

    def with_spectrum(
        self, function: Callable[[Tensor], Tensor], vector: VectorOrTensor
    ) -> VectorOrTensor:
        """Return ``Q f(values) Q^T v``, zero outside of what is covered.

        Args:
            function: ``f``, of all eigenvalues at once, entry by entry.
            vector: A vector, or columns ``[P, k]``.
        """
        multipliers = function(self._values())
        return self._on_stack(lambda stack: self._apply(stack, multipliers), vector)

    def _apply(self, stack: Stack, multipliers: Tensor) -> Stack:
        """Return ``Q diag(multipliers) Q^T v``."""
        return self._vectors(self.coordinates(stack) * multipliers)

    def _multiply(self, stack: Stack) -> Stack:
        return self._apply(stack, self._values())

    def _quadratic(self, stack: Stack) -> Tensor:
        return (self.coordinates(stack).square() * self._values()).flatten(1).sum(dim=1)

    def _solve(self, stack: Stack, damping: float) -> Stack:
        return self._apply(stack, damped_power(self._resolved(), -1, damping))

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        return self._apply(stack, damped_power(self._resolved(), -0.5, damping))

    def _trace(self) -> Tensor:
        return self._values().sum()

    def _squared_norm(self) -> Tensor:
        return self._values().square().sum()

    def _logdet(self, damping: float) -> Tensor:
        return damped_log(self._resolved(), damping).sum()

    def _eigenvalues(self) -> Tensor:
        return self._values().flatten()

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        values = self._values()
        best = values.flatten().topk(k)
        one_hot = values.new_zeros(k, values.numel())
        one_hot.scatter_(1, best.indices.unsqueeze(1), 1.0)
        return best.values, self._vectors(one_hot.view(k, *values.shape))
