"""Matrices from saved states, and one matrix from several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import isabstract
from typing import Any

from ekfac.errors import StateMismatchError
from ekfac.matrices.base import CurvatureMatrix


def merge(
    matrices: Sequence[CurvatureMatrix], num_examples: Sequence[float]
) -> CurvatureMatrix:
    """Return the estimate over all the examples that several estimates were made of.

    Every matrix is a mean over examples, so the merged one is their mean weighted by
    the numbers of examples. Of K-FAC matrices the factors are averaged, which gives
    the factors of the union of the data, not a sum of Kronecker products. EKFAC
    matrices must share their basis.

    Args:
        matrices: Estimates of one structure over one space.
        num_examples: How many examples each was made of.

    Raises:
        ValueError: If the numbers do not fit.
        UnsupportedOperationError: If the structures differ or do not merge.
    """
    weights = [float(count) for count in num_examples]
    if not matrices or len(matrices) != len(weights):
        raise ValueError(
            f"merge needs as many example counts as matrices and at least one, got "
            f"{len(matrices)} matrices and {len(weights)} counts."
        )
    if min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"Example counts must be positive, got {list(num_examples)}.")
    first, *others = matrices
    for other in others:
        first.require_same_space(other)
        if other.kind != first.kind:
            first._unsupported(
                f"merge with a {other.structure} matrix",
                "estimate all of them with the same structure",
            )
    merged = first._merged(others, [weight / sum(weights) for weight in weights])
    merged.outside = sum(
        matrix.outside * weight / sum(weights)
        for matrix, weight in zip(matrices, weights, strict=True)
    )
    return merged


def from_state_dict(state: Mapping[str, Any]) -> CurvatureMatrix:
    """Return the matrix that ``state_dict()`` was called on.

    Raises:
        StateMismatchError: If ``state`` is not the state of a curvature matrix.
    """
    kinds, kind = _kinds(), state.get("kind")
    if kind not in kinds:
        raise StateMismatchError(
            f"Not the state of a curvature matrix: its 'kind' is {kind!r}, expected "
            f"one of {sorted(kinds)}."
        )
    return kinds[kind].from_state(state)


def _kinds() -> dict[str, type[CurvatureMatrix]]:
    """Return the structures by the names their states have."""
    kinds: dict[str, type[CurvatureMatrix]] = {}
    pending: list[Any] = [CurvatureMatrix]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if not isabstract(cls):
            kinds[cls.kind] = cls
    return kinds
