"""Damping rules: what is added to eigenvalues, and how two factors share it.

Everything that damps a Kronecker-factored matrix uses these functions: the optimizers'
step, :meth:`KFACMatrix.solve`, merging of tasks, the report and Levenberg-Marquardt.
To add a rule, edit one function here, its option in ``ekfac/curvature/options.py`` and
its test in ``tests/test_damping.py``.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

DampingMode = Literal["relative", "absolute"]
# "equal" is "factored" without the ratio of traces (George 2023, A.4).
DampingSplit = Literal["exact", "factored", "equal"]
Number = TypeVar("Number", float, Tensor)


def absolute_damping(damping: float, mean: Number, mode: DampingMode) -> Number | float:
    """Return the damping that is added to a block's eigenvalues.

    Args:
        damping: The option.
        mean: Mean eigenvalue of the block.
        mode: ``"relative"``: times that mean. ``"absolute"``: as it is.
    """
    return damping * mean if mode == "relative" and damping else damping


def damping_ratio(mean_A: Tensor, mean_G: Tensor) -> Tensor:
    """Return ``pi``, the root of the ratio of two factors' mean eigenvalues.

    Martens & Grosse 2015, section 6.3, with traces as norms: the factored damping is
    then unchanged when one factor is scaled and the other unscaled. 1 where a factor
    is zero.
    """
    usable = (mean_A > 0) & (mean_G > 0)
    tiny = torch.finfo(mean_A.dtype).tiny
    return torch.where(usable, (mean_A / mean_G.clamp(min=tiny)).sqrt(), 1.0)


def cross_terms(values_A: Tensor, values_G: Tensor, pi: Tensor | float = 1.0) -> Tensor:
    """Return what factored damping ``e`` adds to eigenvalues, over ``sqrt(e)``.

    Factored damping adds ``sqrt(e)`` to the eigenvalues of both factors: for Kronecker
    eigenvalues that is ``(s_A + pi sqrt(e)) (s_G + sqrt(e) / pi)`` (Martens & Grosse
    2015, section 6.3), for others its cross terms ``s + e + sqrt(e) (s_A / pi + pi
    s_G)``, which with ``pi = 1`` is George 2023, A.4.

    Args:
        values_A: ``[b or 1, d_in]``.
        values_G: ``[b, d_out]``.
        pi: See :func:`damping_ratio`; ``[b or 1, 1, 1]``.

    Returns:
        ``[b, d_out, d_in]``.
    """
    return values_A.unsqueeze(-2) / pi + pi * values_G.unsqueeze(-1)


def nonzero_damping(damping: Tensor) -> Tensor:
    """Return relative dampings; 1 for a block all of whose eigenvalues are zero.

    Such a layer, dead until now, gets the gradient itself.
    """
    tiny = torch.finfo(damping.dtype).tiny
    return torch.where(damping > 0, damping.clamp(min=tiny), 1.0)


def floor_(eigenvalues: Tensor, damping: float) -> None:
    """Bound damped eigenvalues from below where the damping does not, in place.

    Squares of rounding errors, ``eps^2`` of the largest, are no curvature: dividing by
    less lets a direction overflow.

    Args:
        eigenvalues: Damped ones, ``[b, d_out, d_in]``.
        damping: The option; from ``eps`` on it is a bound itself.
    """
    eps = torch.finfo(eigenvalues.dtype).eps
    if damping < eps and eigenvalues.numel():
        floor = eigenvalues.amax() * eps**2
        eigenvalues.clamp_(min=floor.clamp(min=torch.finfo(eigenvalues.dtype).tiny))


def damp_(
    eigenvalues: Tensor, damping: Tensor | float, cross: Tensor | None = None
) -> Tensor | None:
    """Add the damping to eigenvalues, in place.

    Args:
        eigenvalues: ``[b, d_out, d_in]``, non-negative.
        damping: What is added; a tensor as :func:`nonzero_damping` has it.
        cross: See :func:`cross_terms`.

    Returns:
        Where eigenvalues were zero and nothing was added, so that the pseudo-inverse
        is meant (they are the smallest number now); ``None`` if that cannot be.
    """
    tiny = torch.finfo(eigenvalues.dtype).tiny
    if isinstance(damping, Tensor):
        damping = nonzero_damping(damping)
    if cross is None:
        eigenvalues.add_(damping)
    else:
        root = eigenvalues.new_zeros(()).add(damping).sqrt()
        eigenvalues.add_(damping + root * cross)
    if isinstance(damping, Tensor) or damping >= tiny:
        return None
    singular = eigenvalues <= 0
    eigenvalues.clamp_(min=tiny)
    return singular
