"""Bounds on the Fisher matrix of a classifier from that of its logits.

Karakida et al. 2020, section 3.3, with the factor of the number of classes of Theorem
3.3 removed (its own proof, B.4, has none) and one outlier fewer than Theorem 3.4: every
``Q_n = diag(g) - g g^T`` has the constant vector in its null space, and so does their
mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.diagnostics.mean_field import MeanField
from ekfac.diagnostics.spectra import Spectrum


@dataclass(frozen=True)
class SoftmaxMoments:
    """What the bounds need of the probabilities ``g`` of ``N`` examples.

    Attributes:
        beta_1: ``mean_n tr Q_n``.
        beta_2: ``(1 / N^2) sum_{n != m} tr Q_n Q_m``.
        beta_3: ``mean_n tr Q_n^2``.
        beta_4: The largest diagonal entry of the mean of ``Q_n``.
        mean_values: ``[C]``, eigenvalues of the mean of ``Q_n``, descending; the last
            is zero.
        maximum: The largest eigenvalue of any ``Q_n``.
    """

    beta_1: float
    beta_2: float
    beta_3: float
    beta_4: float
    mean_values: Tensor
    maximum: float


def softmax_moments(probabilities: Tensor) -> SoftmaxMoments:
    """Return the moments of probabilities ``[N, C]``.

    Raises:
        ValueError: If the rows are not probabilities.
    """
    g = probabilities
    sums = g.sum(dim=-1)
    if g.dim() != 2 or bool((g < 0).any()) or bool(((sums - 1).abs() > 1e-4).any()):
        raise ValueError(
            f"probabilities must be [N, C] with rows that sum to 1, got "
            f"{list(g.shape)} with sums from {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}; pass the softmax of the outputs."
        )
    Q = torch.diag_embed(g) - g.unsqueeze(2) * g.unsqueeze(1)
    mean = Q.mean(dim=0)
    beta_3 = float(Q.square().sum(dim=(1, 2)).mean())
    return SoftmaxMoments(
        beta_1=float(1 - g.square().sum(dim=1).mean()),
        beta_2=float(mean.square().sum()) - beta_3 / len(g),
        beta_3=beta_3,
        beta_4=float(mean.diagonal().max()),
        mean_values=torch.linalg.eigvalsh(mean).flip(0),
        maximum=float(torch.linalg.eigvalsh(Q)[:, -1].max()),
    )


@dataclass(frozen=True)
class SoftmaxBounds:
    """What is known of a classifier's Fisher matrix without forming it.

    Attributes:
        mean: The mean eigenvalue: predicted, or at most this.
        second_moment: Likewise.
        lower: Of the largest eigenvalue, in the limit of great width.
        upper: Of the largest eigenvalue.
        outliers: ``[C - 1]``, estimates of the largest eigenvalues.
        source: ``"exact"`` where mean, second moment and upper bound hold for the
            finite network, ``"approximation"`` for limits of great width.
    """

    mean: float
    second_moment: float
    lower: float
    upper: float
    outliers: Tensor
    source: str


def softmax_prediction(
    theory: MeanField, probabilities: Tensor, num_examples: int | None = None
) -> SoftmaxBounds:
    """Return the limit of great width (Theorem 3.3).

    The probabilities may be those of any time in training, as long as the tangent
    kernel stays what it was (section 3.4).

    Args:
        theory: Order parameters of the network.
        probabilities: ``[N, C]``.
        num_examples: ``N``. Default: as there are probabilities.
    """
    n = len(probabilities) if num_examples is None else num_examples
    moments, size = softmax_moments(probabilities), theory.num_parameters
    one, two = theory.kappa(1), theory.kappa(2)
    second = (moments.beta_2 * two**2 + moments.beta_3 * one**2 / n) / size
    largest = theory.fisher(n).maximum
    return SoftmaxBounds(
        mean=moments.beta_1 * one / size,
        second_moment=second,
        lower=moments.beta_4 * largest,
        upper=(size * second) ** 0.5,
        outliers=moments.mean_values[:-1] * largest,
        source="approximation",
    )


def softmax_bounds(linear: Spectrum, probabilities: Tensor) -> SoftmaxBounds:
    """Return bounds from the Fisher matrix of the logits as regression outputs.

    ``lambda_i(F) <= max_n lambda_max(Q_n) lambda_i(F_linear)`` holds exactly for every
    ``i`` (equation 28). The lower bound and the outliers are asymptotic, with the mean
    of the ``C`` largest eigenvalues in place of the limit's.

    Args:
        linear: The eigenvalues of the logits' Fisher matrix, ``likelihood="gaussian"``.
        probabilities: ``[N, C]``.
    """
    moments = softmax_moments(probabilities)
    classes = probabilities.shape[1]
    largest = float(linear.values[:classes].mean())
    return SoftmaxBounds(
        mean=moments.maximum * linear.mean,
        second_moment=moments.maximum**2 * linear.second_moment,
        lower=moments.beta_4 * largest,
        upper=moments.maximum * linear.maximum,
        outliers=moments.mean_values[:-1] * largest,
        source=linear.source,
    )
