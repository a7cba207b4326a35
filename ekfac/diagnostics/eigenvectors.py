"""Over how many parameters an eigenvector spreads (Ge 2025, section 4.3.4).

The closed forms for Kronecker eigenvectors need the two short vectors alone. They are
no substitute for the exact eigenvectors' values: those spread over all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac.estimate import Jacobian
from ekfac.spectral import Eigenpairs


@dataclass(frozen=True)
class Concentration:
    """Measures of vectors, large kurtosis and small support for few large entries.

    Attributes:
        kurtosis: ``[k]``, excess kurtosis of the entries (equation 4.25).
        entropy: ``[k]``, Shannon entropy of ``|v_i| / sum_j |v_j|`` (4.26).
        support: ``[k]``, ``exp(entropy)``, from 1 to ``n``; Gaussian entries have
            0.753 ``n`` (4.28, called the effective rank there).
    """

    kurtosis: Tensor
    entropy: Tensor
    support: Tensor


def concentration(vectors: Tensor) -> Concentration:
    """Return the measures of the columns of ``[n, k]``."""
    deviations = vectors - vectors.mean(dim=0)
    variance = deviations.square().mean(dim=0)
    fourth = deviations.pow(4).mean(dim=0)
    entropy = _entropy(vectors)
    return Concentration(fourth / variance**2 - 3, entropy, entropy.exp())


def kronecker_concentration(left: Tensor, right: Tensor, size: int) -> Concentration:
    """Return the measures of ``left (x) right`` among zeros, columns by columns.

    Entropies add, supports multiply, and the raw moments are products.

    Args:
        left: ``[m, k]``.
        right: ``[n, k]``.
        size: Number of entries in all, zeros included: the parameters of the network.

    Raises:
        ValueError: If ``size`` is below ``m n``.
    """
    filled = left.shape[0] * right.shape[0]
    if size < filled:
        raise ValueError(f"size must be at least {filled}, got {size}.")
    entropy = _entropy(left) + _entropy(right)

    def moment(power: int) -> Tensor:
        means = left.pow(power).mean(dim=0) * right.pow(power).mean(dim=0)
        return means * filled / size

    first, second, third = moment(1), moment(2), moment(3)
    central = moment(4) - 4 * first * third + 6 * first**2 * second - 3 * first**4
    variance = second - first**2
    return Concentration(central / variance**2 - 3, entropy, entropy.exp())


def eigenfunctions(pairs: Eigenpairs, J: Jacobian) -> Tensor:
    """Return ``u_i(x) = <v_i, grad f_k(x)> / sqrt(lambda_i)``, ``[N, C, k]``.

    Ge 2025, equation 4.24; George 2023, lemma 6.2.1. On the examples that the Fisher
    matrix of regression was taken on, ``(1/N) sum_nk u_i u_j`` is the identity.

    Args:
        pairs: Eigenpairs of a Fisher matrix.
        J: The Jacobian at the examples ``x``.
    """
    columns = J @ pairs.vectors
    assert isinstance(columns, Tensor)
    n, c = J.codomain.shapes["outputs"]
    return (columns / pairs.values.sqrt()).reshape(n, c, -1)


def _entropy(vectors: Tensor) -> Tensor:
    shares = vectors.abs() / vectors.abs().sum(dim=0)
    entropy: Tensor = -torch.special.xlogy(shares, shares).sum(dim=0)
    return entropy
