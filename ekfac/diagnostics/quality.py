"""How good an approximation of a curvature matrix is, for each use of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from ekfac.errors import StateMismatchError
from ekfac.matrices import CurvatureMatrix
from ekfac.vectors import standard_normal


@dataclass(frozen=True)
class Interval:
    """The mean of a quantity over random vectors, and where the expectation lies.

    Attributes:
        mean: The mean.
        standard_error: Its estimated standard deviation.
        low: Lower end of the 95 % confidence interval.
        high: Upper end.
    """

    mean: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Return the interval of independent values ``[m]``, ``m >= 2``.

        Student's: for few vectors it is wider than the normal one.
        """
        count = len(values)
        mean = float(values.mean())
        error = float(values.std()) / count**0.5
        reach = _student_quantile(count - 1) * error
        return cls(mean, error, mean - reach, mean + reach)

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class ApproximationQuality:
    """How ``F_hat`` compares with ``F`` (George 2023, section 3.4.1).

    The random vectors ``v`` are uniform on the unit sphere. All errors are relative, 0
    for a perfect approximation; cosines are 1.

    Attributes:
        structure: The structure of ``F_hat``.
        trace_error: ``|tr F_hat - tr F| / |tr F|``.
        quadratic_error: ``|v^T F_hat v - v^T F v| / |v^T F v|``.
        product_residual: ``|F_hat v - F v| / |F v|``.
        product_cosine: Between ``F_hat v`` and ``F v``.
        solve_residual: By damping ``d``, ``|v' - v|``, where
            ``v' = (F_hat + d I)^-1 (F + d I) v`` should be ``v``.
        solve_cosine: By damping, between ``v'`` and ``v``.
        num_vectors: How many random vectors there were.
    """

    structure: str
    trace_error: float
    quadratic_error: Interval
    product_residual: Interval
    product_cosine: Interval
    solve_residual: dict[float, Interval]
    solve_cosine: dict[float, Interval]
    num_vectors: int

    def __str__(self) -> str:
        lines = [
            f"{self.structure}, {self.num_vectors} random vectors (95 % intervals)",
            f"  trace            relative error {self.trace_error:.3g}",
            f"  quadratic form   relative error {self.quadratic_error}",
            f"  product          residual {self.product_residual}, "
            f"cosine {self.product_cosine}",
        ]
        lines += [
            f"  solve, d={damping:<8.2g} residual {self.solve_residual[damping]}, "
            f"cosine {self.solve_cosine[damping]}"
            for damping in self.solve_residual
        ]
        return "\n".join(lines)


def approximation_quality(
    F_hat: CurvatureMatrix,
    F: CurvatureMatrix,
    *,
    damping: float | Sequence[float] = (1e-4, 1e-2, 1.0),
    num_vectors: int = 20,
    trace: float | None = None,
    generator: torch.Generator | None = None,
) -> ApproximationQuality:
    """Return how well ``F_hat`` stands in for ``F``, with confidence intervals.

    The solve is judged without one of ``F``: ``(F_hat + d I)^-1 (F + d I) v`` is ``v``
    for a perfect approximation, and needs a product with ``F`` alone. So ``F`` may be
    implicit; it is only multiplied with, once with each vector, and asked for its
    trace.

    Args:
        F_hat: The approximation, of a structure that has ``solve``.
        F: The matrix itself.
        damping: One or several values of ``d``, each positive.
        num_vectors: How many random vectors, at least 2.
        trace: The trace of ``F``, if it is known. An implicit matrix estimates it.
        generator: Source of the vectors. The same seed gives the same ones, whatever
            the matrices: comparisons of several ``F_hat`` are then paired.

    Raises:
        StateMismatchError: If the matrices are of different spaces.
        ValueError: If a damping or ``num_vectors`` is too small, or ``F`` is zero.

    Example:
        >>> from ekfac.matrices import DiagonalMatrix
        >>> from ekfac.vectors import ParameterVector
        >>> F = DiagonalMatrix(ParameterVector({"w": torch.tensor([1.0, 3.0])}))
        >>> approximation_quality(2 * F, F, damping=1.0).quadratic_error.mean
        1.0
    """
    if F_hat.space != F.space:
        raise StateMismatchError(
            f"F_hat is over {F_hat.space} and F over {F.space}; make both of the same "
            "parameters of the same model."
        )
    dampings = [damping] if isinstance(damping, (int, float)) else list(damping)
    if not all(value > 0 and isfinite(value) for value in dampings):
        raise ValueError(f"Every damping must be finite and positive, got {dampings}.")
    if num_vectors < 2:
        raise ValueError(f"num_vectors must be at least 2, got {num_vectors}.")
    v = standard_normal(
        (F.size, num_vectors), generator=generator, dtype=F.dtype, device=F.device
    )
    v = v / v.norm(dim=0)
    Fv, approximate = F @ v, F_hat @ v
    forms = (v * Fv).sum(dim=0)
    errors = (v * (approximate - Fv)).sum(dim=0)
    residuals, cosines = {}, {}
    for value in dampings:
        solved = F_hat.solve(Fv + value * v, value)
        residuals[float(value)] = Interval.of((solved - v).norm(dim=0))
        cosines[float(value)] = Interval.of(_cosine(solved, v))
    true_trace = float(F.trace()) if trace is None else trace
    if not true_trace:
        raise ValueError(
            "F has trace 0, so there are no errors relative to it; the outputs of this "
            "model do not depend on its parameters, or it fits its data exactly."
        )
    return ApproximationQuality(
        structure=F_hat.structure,
        trace_error=abs(float(F_hat.trace()) - true_trace) / abs(true_trace),
        quadratic_error=Interval.of((errors / forms).abs()),
        product_residual=Interval.of((approximate - Fv).norm(dim=0) / Fv.norm(dim=0)),
        product_cosine=Interval.of(_cosine(approximate, Fv)),
        solve_residual=residuals,
        solve_cosine=cosines,
        num_vectors=num_vectors,
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines between columns, 0 where one is zero."""
    return (_unit(a) * _unit(b)).sum(dim=0)


def _unit(columns: Tensor) -> Tensor:
    """Return columns of norm 1; zero stays zero.

    First of largest entry 1: curvature may be so small that its squares underflow.
    """
    tiny = torch.finfo(columns.dtype).tiny
    columns = columns / columns.abs().amax(dim=0).clamp(min=tiny)
    norms: Tensor = columns.norm(dim=0)
    return columns / norms.clamp(min=tiny)


def _student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's distribution.

    Exact for one and two degrees of freedom; from three on by the Cornish-Fisher
    expansion (Abramowitz & Stegun 26.7.5), within 1 % of it.
    """
    if degrees <= 2:
        return {1: 12.7062, 2: 4.30265}[degrees]
    z = 1.959964
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(degrees) ** i for i, term in enumerate(terms, 1))
