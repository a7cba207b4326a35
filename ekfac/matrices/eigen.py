"""Eigendecompositions of small matrices, and functions of their eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor


def symmetric_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[*, n]``, ascending, and eigenvectors ``[*, n, n]``.

    The matrix is symmetrised first, and eigenvalues that cannot be told from zero at
    its precision become zero: a singular matrix then shows as one.

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
    """The eigendecomposition of a tensor, computed again only if its values changed.

    Factors that an optimizer keeps change in place, or are new tensors at every read;
    comparing values costs a square where decomposing costs a cube.
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
            # The source is no copy: changed in place, it no longer tells what it was.
            and -1 != self._version == _version(source)
            and (source.device, source.dtype) == (matrix.device, matrix.dtype)
            and (source is matrix or torch.equal(source, matrix))
        )


def _version(tensor: Tensor) -> int:
    """Return torch's count of in-place changes, -1 where it keeps none."""
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


def _require_damped(good: Tensor, values: Tensor, damping: float, what: str) -> None:
    """Raise ``ValueError`` unless every damped eigenvalue is ``good``."""
    if not bool(good.all()):
        raise ValueError(
            f"{what} needs F + damping I positive definite; the smallest eigenvalue of "
            f"F is {float(values.min()):.3g} with {damping=}: pass a larger damping."
        )
