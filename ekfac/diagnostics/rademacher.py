"""Rademacher complexity and margin bounds of linear classes in the tangent features."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from ekfac.matrices import CurvatureMatrix


@dataclass(frozen=True)
class RademacherComplexity:
    """Of ``f(x) = <w, Phi(x)>`` with ``|w| <= M``, on a sample.

    Attributes:
        value: ``(M / n) E sqrt(sigma^T K sigma)``, a mean over random signs.
        standard_error: Of that mean.
        bound: ``(M / n) sqrt(Tr K)``, above the expectation (George 2023, eq. 6.4.3).
    """

    value: float
    standard_error: float
    bound: float


def rademacher_complexity(
    K: Tensor | CurvatureMatrix,
    radius: float,
    *,
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> RademacherComplexity:
    """Return the empirical Rademacher complexity of a ball in feature space.

    George 2023, section 6.4.1 and eq. B.2.9. For a ball in a rescaled norm give the
    rescaled kernel.

    Args:
        K: Gram matrix of the features, ``[n, n]``.
        radius: ``M``.
        samples: Sign vectors, at least 2.
        generator: Source of the signs.

    Raises:
        ValueError: If there are fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}.")
    K = _dense(K)
    n = len(K)
    signs = torch.randint(2, (samples, n), generator=generator).to(K) * 2 - 1
    roots = (signs * (signs @ K)).sum(dim=1).clamp(min=0).sqrt() * radius / n
    return RademacherComplexity(
        float(roots.mean()),
        float(roots.std()) / samples**0.5,
        radius / n * float(K.trace().sqrt()),
    )


def multiclass_bound(
    K: Tensor | CurvatureMatrix, radius: float, *, classes: int, margin: float
) -> float:
    """Return the bound on the complexity of the margin loss of ``c`` such functions.

    ``c^(3/2) M / (gamma n) sqrt(Tr K)`` (George 2023, theorem B.2.4).

    Args:
        K: As for :func:`rademacher_complexity`.
        radius: ``M``.
        classes: ``c``.
        margin: ``gamma``, positive.

    Raises:
        ValueError: If the margin is not positive.
    """
    K = _dense(K)
    if not margin > 0:
        raise ValueError(f"Invalid margin: {margin!r}; it must be > 0.")
    bound: float = classes**1.5 * radius / (margin * len(K)) * float(K.trace().sqrt())
    return bound


def margin_loss(outputs: Tensor, y: Tensor, margin: float) -> float:
    """Return the mean ramp loss of the margins: 1 below 0, 0 above ``margin``.

    The margin of an example is its class's output minus the largest other (George 2023,
    B.2). At ``margin = 0`` it is the error rate.

    Args:
        outputs: ``[n, c]``.
        y: Classes ``[n]``.
        margin: ``gamma``, not negative.
    """
    own = outputs.gather(1, y[:, None]).squeeze(1)
    others = outputs.scatter(1, y[:, None], float("-inf")).amax(dim=1)
    margins = own - others
    if margin == 0:
        return float((margins <= 0).double().mean())
    return float((1 - margins.double() / margin).clamp(0, 1).mean())


def margin_bound(loss: float, complexity: float, n: int, *, delta: float) -> float:
    """Return the bound on the error that holds with probability ``1 - delta``.

    ``L_gamma + 2 R + 3 sqrt(log(2 / delta) / (2 n))`` (George 2023, eq. B.2.5).

    Args:
        loss: The margin loss on the sample, see :func:`margin_loss`.
        complexity: Of the margin loss, see :func:`multiclass_bound`.
        n: Size of the sample.
        delta: In (0, 1).

    Raises:
        ValueError: If ``delta`` is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"Invalid delta: {delta!r}; it must be in (0, 1).")
    deviation: float = (log(2 / delta) / (2 * n)) ** 0.5
    return loss + 2 * complexity + 3 * deviation


@dataclass(frozen=True)
class OptimalRescaling:
    """The rescaled norm in which interpolating the targets costs least.

    Attributes:
        nu: ``[r]``, by which the kernel's squared singular values are divided.
        bound: ``(1 / n) sum_j |u_j^T y|``, the complexity bound in that norm.
        euclidean: ``(1 / n) |w| sqrt(Tr K)``, the bound in the Euclidean norm.
        eigenvalues: ``[r]``, of the kernel, descending; zero ones are left out.
    """

    nu: Tensor
    bound: float
    euclidean: float
    eigenvalues: Tensor


def optimal_rescaling(
    K: Tensor | CurvatureMatrix, y: Tensor, *, tolerance: float | None = None
) -> OptimalRescaling:
    """Return the best norm ``|A_nu^T w|`` for the least-norm fit of the targets.

    George 2023, proposition B.2.5: ``nu_j = lambda_j / |u_j^T y|`` (to a factor)
    minimises ``|w|_A sqrt(Tr K_A)``; the minimum is ``sum_j |u_j^T y|`` by the
    inequality of Cauchy and Schwarz.

    Args:
        K: Gram matrix of the features, ``[n, n]``.
        y: Targets ``[n]``; their part outside the features' span cannot be fitted and
            is left out.
        tolerance: Eigenvalues below this share of the largest are zero. Default: ``n``
            times the rounding unit.
    """
    K = _dense(K)
    n = len(K)
    values, vectors = torch.linalg.eigh((K + K.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    cut = n * torch.finfo(K.dtype).eps if tolerance is None else tolerance
    kept = values > cut * values[0]
    values, parts = values[kept], (vectors[:, kept].mT @ y.to(K)).abs()
    tiny = torch.finfo(K.dtype).tiny
    norm = (parts.square() / values).sum().sqrt()
    return OptimalRescaling(
        nu=values / parts.clamp(min=tiny),
        bound=float(parts.sum()) / n,
        euclidean=float(norm * values.sum().sqrt()) / n,
        eigenvalues=values,
    )


def rescaled_bound(eigenvalues: Tensor, parts: Tensor, nu: Tensor, n: int) -> float:
    """Return ``(1 / n) |w|_A sqrt(Tr K_A)`` of the least-norm fit for given ``nu``.

    ``|w|_A^2 = sum_j nu_j (u_j^T y)^2 / lambda_j`` and ``Tr K_A = sum_j lambda_j /
    nu_j``.

    Args:
        eigenvalues: ``lambda`` ``[r]``, positive.
        parts: ``u_j^T y`` ``[r]``.
        nu: ``[r]``, positive.
        n: Size of the sample.
    """
    norm = (nu * parts.square() / eigenvalues).sum()
    return float((norm * (eigenvalues / nu).sum()).sqrt()) / n


def _dense(K: Tensor | CurvatureMatrix) -> Tensor:
    dense: Tensor = K if isinstance(K, Tensor) else K.to_dense()
    return dense
