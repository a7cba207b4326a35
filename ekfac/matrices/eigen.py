"""Eigendecompositions of small matrices, and damping of their eigenvalues.

The damping rules of everything that damps a Kronecker-factored matrix are here: of the
optimizers' step, :meth:`KFACMatrix.solve`, the merging of tasks, the report and
Levenberg-Marquardt. To add a rule, edit one function here, its option in
``ekfac/curvature/options.py`` and its test in ``tests/test_damping.py``.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

DampingMode = Literal["adaptive", "relative", "absolute"]
# "equal" is "factored" without the ratio of traces (George 2023, A.4).
DampingSplit = Literal["exact", "factored", "equal"]
Number = TypeVar("Number", float, Tensor)


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[*, n]``, ascending, and eigenvectors ``[*, n, n]``.

    The matrix is symmetrised first, and eigenvalues that are no more than rounding
    become zero, so that a singular matrix is recognised as one.

    Args:
        matrix: ``[*, n, n]``, symmetric up to rounding.

    Raises:
        ValueError: If an entry is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(
            f"A matrix of shape {list(matrix.shape)} has entries that are not finite; "
            "estimate it again without the data that made them so."
        )
    if not matrix.shape[-1]:
        return matrix.sum(dim=-1), matrix
    if matrix.dim() == 3 and len(matrix) > 1 and matrix.stride(0) == 0:
        values, vectors = symmetric_eigh(matrix[0])  # a view that repeats one matrix
        return values.expand(matrix.shape[:2]), vectors.expand(matrix.shape)
    matrix = (matrix + matrix.mT) / 2
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # The single precision solver gives up on some ill-conditioned matrices.
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
        values, vectors = values.to(matrix), vectors.to(matrix)
    precision = 4 * torch.finfo(values.dtype).eps * values.shape[-1] ** 0.5
    noise = precision * values.abs().amax(dim=-1, keepdim=True)
    return torch.where(values.abs() <= noise, torch.zeros_like(values), values), vectors


class CachedEigh:
    """The eigendecomposition of a tensor, recomputed only if its values change.

    Factors that an optimizer keeps change in place, or are new tensors at every read.
    Comparing values costs ``n^2``, decomposing ``n^3``.
    """

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._version = -1
        self._result: tuple[Tensor, Tensor] | None = None

    def __call__(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``symmetric_eigh(matrix)``."""
        if self._result is None or not self._holds(matrix):
            self._result = symmetric_eigh(matrix)
            self._source, self._version = matrix, _version(matrix)
        return self._result

    def _holds(self, matrix: Tensor) -> bool:
        """Return whether ``matrix`` has the values that were decomposed."""
        source = self._source
        return (
            source is not None
            # The source is no copy: a change in place loses its old values.
            and -1 != self._version == _version(source)
            and (source.device, source.dtype) == (matrix.device, matrix.dtype)
            and (source is matrix or torch.equal(source, matrix))
        )


def _version(tensor: Tensor) -> int:
    """Return torch's count of in-place changes, -1 if torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def damped_power(values: Tensor, power: float, damping: float) -> Tensor:
    """Return ``(values + damping) ** power``.

    Raises:
        ValueError: If that is not a finite real number for some eigenvalue.
    """
    damped = values + damping
    if power < 0 and bool((damped == 0).any()):
        raise ValueError(
            f"The matrix is singular with {damping=}, so it has no power {power}; "
            "pass a larger damping."
        )
    if power == int(power):
        return damped ** int(power)
    _require_damped(damped >= 0, values, damping, f"The power {power}")
    return damped**power


def damped_log(values: Tensor, damping: float) -> Tensor:
    """Return ``log(values + damping)``.

    Raises:
        ValueError: If some damped eigenvalue is not positive.
    """
    damped = values + damping
    _require_damped(damped > 0, values, damping, "The log-determinant")
    return damped.log()


def _require_damped(good: Tensor, values: Tensor, damping: float, name: str) -> None:
    """Raise ``ValueError`` unless every damped eigenvalue is ``good``."""
    if not bool(good.all()):
        raise ValueError(
            f"{name} needs F + damping I positive definite; the smallest eigenvalue of "
            f"F is {float(values.min()):.3g} with {damping=}: pass a larger damping."
        )


def absolute_damping(
    damping: float,
    mean: Number,
    mode: DampingMode,
    factor: Number | float = 1.0,
) -> Number | float:
    """Return the damping that is added to a block's eigenvalues.

    Args:
        damping: The optimizer's option.
        mean: Mean eigenvalue of the block.
        mode: ``"relative"``: multiply the option by the mean. ``"adaptive"``: by the
            ``factor`` too. ``"absolute"``: return it as it is.
        factor: What the layer's gradients say, see ``damping_mode`` of
            :class:`ekfac.EKFAC`.
    """
    if mode == "absolute" or not damping:
        return damping
    relative: Number = damping * mean
    return relative * factor if mode == "adaptive" else relative


def damping_ratio(mean_A: Tensor, mean_G: Tensor) -> Tensor:
    """Return ``pi``, the root of the ratio of two factors' mean eigenvalues.

    Martens & Grosse 2015, section 6.3, with traces as norms: scaling one factor up and
    the other down by the same number leaves the factored damping unchanged. ``pi`` is 1
    where a factor is zero.
    """
    usable = (mean_A > 0) & (mean_G > 0)
    tiny = torch.finfo(mean_A.dtype).tiny
    return torch.where(usable, (mean_A / mean_G.clamp(min=tiny)).sqrt(), 1.0)


def cross_terms(values_A: Tensor, values_G: Tensor, pi: Tensor | float = 1.0) -> Tensor:
    """Return the cross terms of factored damping over its root: ``[b, d_out, d_in]``.

    Factored damping ``e`` damps both factors. Kronecker eigenvalues become ``(s_A + pi
    sqrt(e)) (s_G + sqrt(e) / pi)`` (Martens & Grosse 2015, section 6.3), other scalings
    ``s + e + sqrt(e) (s_A / pi + pi s_G)``, which is George 2023, A.4, for ``pi = 1``.
    The cross terms are the bracket.

    Args:
        values_A: ``[b or 1, d_in]``.
        values_G: ``[b, d_out]``.
        pi: See :func:`damping_ratio`; ``[b or 1, 1, 1]``.
    """
    return values_A.unsqueeze(-2) / pi + pi * values_G.unsqueeze(-1)


def nonzero_damping(damping: Tensor) -> Tensor:
    """Return relative dampings, 1 for a block all of whose eigenvalues are zero.

    A layer that was dead until now then gets the gradient itself.
    """
    tiny = torch.finfo(damping.dtype).tiny
    return damping.clamp(min=tiny).masked_fill_(damping <= 0, 1.0)


def floor_(eigenvalues: Tensor, damping: float) -> None:
    """Bound damped eigenvalues from below where the damping does not, in place.

    Eigenvalues below ``eps^2`` of the largest are squares of rounding errors, and a
    division by less would overflow.

    Args:
        eigenvalues: Damped ones, ``[b, d_out, d_in]``.
        damping: The optimizer's option; from ``eps`` on it is a bound itself.
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
        damping: Absolute damping; a tensor from :func:`nonzero_damping`.
        cross: See :func:`cross_terms`.

    Returns:
        A mask of the eigenvalues that stay zero, which a pseudo-inverse leaves out
        (they are set to the smallest number); ``None`` if the damping is positive.
    """
    tiny = torch.finfo(eigenvalues.dtype).tiny
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
