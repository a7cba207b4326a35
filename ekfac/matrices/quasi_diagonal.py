"""Quasi-diagonal matrices: the diagonal, and each bias with its row of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ekfac.errors import StateMismatchError
from ekfac.matrices.base import Stack
from ekfac.matrices.packing import (
    IndexPacking,
    PackedMatrix,
    Packing,
    Positions,
    packed_shape,
)
from ekfac.state_schema import Record, TensorField
from ekfac.vectors import VectorSpace

# Largest number of entries of the rows that are decomposed together.
_CHUNK = 2**22


class QuasiDiagonalMatrix(PackedMatrix):
    """The quasi-diagonal reduction for a layer with biases (Ollivier 2015).

    For every row of ``[W | b]`` it keeps the diagonal and the entries between bias and
    weights, an arrow, about ``2 P`` numbers. Products, traces, norms and eigenvalues
    are those of the arrow, whose entries are exactly the full matrix's.

    **Its inverse is not the arrow's.** An arrow with the entries of a positive definite
    matrix may be indefinite, and its inverse useless. ``solve``, ``sample`` and
    ``logdet`` use the one positive definite matrix that agrees with the damped arrow
    wherever the arrow has entries and whose inverse has entries only there
    (weights ``i`` and ``j`` of a row interact as ``F_0i F_0j / F_00``). That is
    Ollivier's quasi-diagonal inverse (2015, section 2.3; Marceau-Caron & Ollivier
    2016), with ``0`` the bias and every ``F_ii`` damped:

        ``w_i = (g_i - g_0 F_0i / F_00) / (F_ii - F_0i^2 / F_00)``
        ``w_0 = (g_0 - sum_i F_0i w_i) / F_00``

    It is invariant to shifting and scaling single inputs of the layer. So
    ``F.solve(F @ v)`` is in general not ``v``.

    Args:
        packing: How the layer's parameters fill ``[b, d_out, d_in]``, bias last.
        diagonal: ``[b, d_out, d_in]``, the diagonal.
        cross: ``[b, d_out, d_in - 1]``, the entries between bias and weights.
        space: The layer's parameters. Default: as ``packing`` unpacks them.

    Raises:
        StateMismatchError: If ``cross`` has another shape.
    """

    kind = "quasi_diagonal"

    def __init__(
        self,
        packing: Packing,
        *,
        diagonal: Tensor,
        cross: Tensor,
        space: VectorSpace | None = None,
    ) -> None:
        b, d_out, d_in = diagonal.shape
        if cross.shape != (b, d_out, d_in - 1):
            raise StateMismatchError(
                f"cross must have shape {[b, d_out, d_in - 1]}, one entry per weight, "
                f"got {list(cross.shape)}."
            )
        super().__init__(packing, (b, d_out, d_in), space)
        self.entries, self.cross = diagonal, cross

    def _tensor(self) -> Tensor:
        return self.entries

    # ------------------------------------------------------- the arrow itself

    def _multiply(self, stack: Stack) -> Stack:
        packed = self._pack(stack)
        bias = packed[..., -1:]
        weights = self.entries[..., :-1] * packed[..., :-1] + self.cross * bias
        bias = self.entries[..., -1:] * bias + _row_sum(self.cross * packed[..., :-1])
        return self._unpack(torch.cat([weights, bias], dim=-1))

    def _trace(self) -> Tensor:
        return self.entries.sum()

    def _squared_norm(self) -> Tensor:
        return self.entries.square().sum() + 2 * self.cross.square().sum()

    def _diagonal(self) -> Stack:
        return self._unpack(self.entries.unsqueeze(0))

    def _arrows(self) -> list[Tensor]:
        """Return the rows' matrices, in groups ``[rows, d_in, d_in]``."""
        d_in = self.packed_shape[-1]
        diagonals = self.entries.reshape(-1, d_in)
        crosses = self.cross.reshape(-1, d_in - 1)
        rows = max(1, _CHUNK // d_in**2)
        arrows = []
        parts = zip(diagonals.split(rows), crosses.split(rows), strict=True)
        for entries, cross in parts:
            arrow = torch.diag_embed(entries)
            arrow[:, -1, :-1], arrow[:, :-1, -1] = cross, cross
            arrows.append(arrow)
        return arrows

    def _eigenvalues(self) -> Tensor:
        """Return the arrows' eigenvalues, ``d_in^3`` work for each row."""
        return torch.cat([torch.linalg.eigvalsh(a).flatten() for a in self._arrows()])

    def _top(self, k: int) -> tuple[Tensor, Stack]:
        parts = [torch.linalg.eigh(arrow) for arrow in self._arrows()]
        values = torch.cat([values for values, _ in parts])
        vectors = torch.cat([vectors for _, vectors in parts])
        best = values.flatten().topk(k)
        rows, columns = best.indices // values.shape[1], best.indices % values.shape[1]
        packed = values.new_zeros(k, *values.shape)
        packed[torch.arange(k, device=rows.device), rows] = vectors[rows, :, columns]
        return best.values, self._unpack(packed.view(k, *self.packed_shape))

    def _power_matrix(self, exponent: float, damping: float) -> Self:
        self._unsupported(
            f"power {exponent}",
            "solve(v, damping) applies its inverse; structure='block_diagonal' has "
            "powers",
        )

    # --------------------------------------------------- Ollivier's inverse

    def _pivots(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return ``F_0i / F_00`` ``[b, d_out, d_in - 1]`` and the pivots.

        The pivots ``[b, d_out, d_in]`` are ``F_ii - F_0i^2 / F_00`` and, last,
        ``F_00``: the matrix is ``L diag(pivots) L^T`` with the bias eliminated first.
        """
        damped = self.entries + damping
        bias = damped[..., -1:]
        ratio = self.cross / bias.where(bias > 0, torch.ones_like(bias))
        weights = damped[..., :-1] - self.cross * ratio
        noise = 4 * torch.finfo(damped.dtype).eps * damped[..., :-1]
        pivots = torch.cat([weights, bias], dim=-1)
        if not bool((weights > noise).all() and (damped[..., -1] > 0).all()):
            raise ValueError(
                "The quasi-diagonal inverse needs F_ii F_00 > F_0i^2 in every row, the "
                f"smallest pivot is {float(pivots.min()):.3g} with {damping=}; pass a "
                "larger damping."
            )
        return ratio, pivots

    def _solve(self, stack: Stack, damping: float) -> Stack:
        ratio, pivots = self._pivots(damping)
        packed = self._pack(stack)
        weights = packed[..., :-1] - ratio * packed[..., -1:]
        eliminated = torch.cat([weights, packed[..., -1:]], dim=-1)
        return self._back_substituted(eliminated / pivots, ratio)

    def _inverse_root(self, stack: Stack, damping: float) -> Stack:
        """Return ``L^-T diag(pivots)^-1/2 v``."""
        ratio, pivots = self._pivots(damping)
        return self._back_substituted(self._pack(stack) * pivots.rsqrt(), ratio)

    def _back_substituted(self, packed: Tensor, ratio: Tensor) -> Stack:
        """Return ``L^-T v``."""
        bias = packed[..., -1:] - _row_sum(ratio * packed[..., :-1])
        return self._unpack(torch.cat([packed[..., :-1], bias], dim=-1))

    def _logdet(self, damping: float) -> Tensor:
        return self._pivots(damping)[1].log().sum()

    # ---------------------------------------------------------------- algebra

    def _with(self, diagonal: Tensor, cross: Tensor) -> Self:
        """Return the matrix of the same layer with other entries."""
        entries = {"diagonal": diagonal, "cross": cross}
        return type(self)(self.packing, **entries, space=self.space)

    def _sum(self, other: Self) -> Self:
        return self._with(self.entries + other.entries, self.cross + other.cross)

    def _scaled(self, scalar: float) -> Self:
        return self._with(self.entries * scalar, self.cross * scalar)

    def _converted(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._with(function(self.entries), function(self.cross))

    def _state(self) -> dict[str, Any]:
        return {
            "diagonal": self.entries.detach().clone(),
            "cross": self.cross.detach().clone(),
            "positions": self._positions(),
        }

    @classmethod
    def _schema(cls, space: VectorSpace, state: Mapping[str, Any], key: str) -> Record:
        b, d_out, d_in = packed_shape(space, state, key)
        fields = {
            "diagonal": TensorField((b, d_out, d_in)),
            "cross": TensorField((b, d_out, d_in - 1)),
            "positions": Positions((b, d_out, d_in)),
        }
        return Record(fields, same_dtype=[("diagonal", "cross")])

    @classmethod
    def _from_state(cls, space: VectorSpace, state: Mapping[str, Any]) -> Self:
        packing = IndexPacking(space, state["positions"])
        diagonal, cross = state["diagonal"], state["cross"]
        return cls(packing, diagonal=diagonal, cross=cross, space=space)


def _row_sum(tensor: Tensor) -> Tensor:
    """Return the sums over the last dimension, kept."""
    return tensor.sum(dim=-1, keepdim=True)
