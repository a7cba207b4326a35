"""Exact spectrum of a Fisher matrix from its dual, without a Jacobian.

``F = R R^T`` with ``R`` ``[P, N K]`` has the non-zero eigenvalues of the dual
``R^T R`` ``[N K, N K]`` (Karakida et al. 2020, appendix A.1; Ge 2025, equation 4.14),
which is made of what the layers saw: ``(a_n . a_m) (g_nk . g_mj)`` for a linear layer,
summed over layers. Blocks of layers have their summands as duals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.diagnostics.spectra import Spectrum, null_space
from ekfac.estimate import Jacobian, jacobian, ntk
from ekfac.estimate.data import outputs_of, prepared
from ekfac.estimate.layout import lay_out
from ekfac.likelihoods import resolve
from ekfac.spectral import Eigenpairs
from ekfac.spectral.operators import result


@result
class Dual:
    """The dual of a Fisher matrix, whole and by layer.

    Attributes:
        gram: ``[N K, N K]``, ``R^T R``, examples first.
        layers: Layer name -> its summand of ``gram``.
        sizes: Layer name -> number of parameters.
        roots: ``[N, C, K]``, with ``roots roots^T`` the outputs' Fisher matrix of each
            example, ``Q_n``.
        outputs: ``[N, C]``.
        source: Always ``"exact"``.
    """

    gram: Tensor
    layers: dict[str, Tensor]
    sizes: dict[str, int]
    roots: Tensor
    outputs: Tensor
    _pull_back: Callable[[Tensor], Tensor] = field(repr=False, compare=False)
    source: str = "exact"

    @property
    def size(self) -> int:
        """Number of parameters, ``P``."""
        return sum(self.sizes.values())

    @property
    def num_examples(self) -> int:
        """``N``."""
        return len(self.outputs)

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues of the Fisher matrix."""
        return _spectrum(self.gram, self.size)

    def layer_spectra(self) -> dict[str, Spectrum]:
        """Return the eigenvalues of every layer's block of it."""
        return {n: _spectrum(gram, self.sizes[n]) for n, gram in self.layers.items()}

    def top_eigenpairs(self, k: int) -> Eigenpairs:
        """Return the ``k`` largest eigenvalues and their eigenvectors ``[P, k]``.

        An eigenvector is ``R w / sqrt(lambda)`` for ``w`` one of the dual: ``k``
        backward passes through the model as it is now.

        Raises:
            ValueError: If ``k`` is not between 1 and the rank of the dual.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        rank = Spectrum(values.flip(0), len(values), "exact").rank
        if not 1 <= k <= rank:
            raise ValueError(f"k must be between 1 and the rank {rank}, got {k}.")
        values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        columns = self._pull_back(self._rooted(vectors))
        found = columns / (self.num_examples * values).sqrt()
        return Eigenpairs.exact(values, found)

    def mean_gradients(self) -> Tensor:
        """Return ``E[grad f_k]`` as columns ``[P, C]``.

        They span the eigenspace of the largest eigenvalues of a wide random network
        (Karakida et al. 2020, Theorem 3.2).
        """
        n, c = self.outputs.shape
        units = torch.eye(c).to(self.outputs).repeat(n, 1)
        return self._pull_back(units / n)

    def _rooted(self, vectors: Tensor) -> Tensor:
        """Return ``[N K, k]`` times the roots, ``[N C, k]``."""
        n, _, k = self.roots.shape
        parts = torch.bmm(self.roots, vectors.reshape(n, k, -1))
        return parts.flatten(0, 1)


def _spectrum(gram: Tensor, size: int) -> Spectrum:
    values = torch.linalg.eigvalsh((gram + gram.mT) / 2).flip(0)
    return Spectrum(values[:size], size, "exact")


def dual(
    model: nn.Module,
    x: Any,
    likelihood: Any = "categorical",
    *,
    mean_subtracted: bool = False,
) -> Dual:
    """Return the exact dual of the Fisher matrix on some inputs.

    Memory is that of one ``[N C, N C]`` matrix per layer. Eigenvectors and mean
    gradients are taken from the model when asked for: it must not have changed since.

    Args:
        model: The model, in eval mode while it is called.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        likelihood: As for :func:`ekfac.fisher`; ``"gaussian"`` is the metric of
            regression, the Gauss-Newton matrix of half the squared error.
        mean_subtracted: Whether the outputs' means over the examples are taken off,
            as a batch norm after the last layer does: the Fisher matrix of
            ``f_k - E[f_k]`` (Karakida et al. 2020, equation 22).

    Raises:
        ValueError: If outputs are not finite.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> found = dual(model, torch.randn(5, 3), "gaussian")
        >>> found.gram.shape, found.size
        (torch.Size([10, 10]), 8)
    """
    kernels = ntk(model, x, layerwise=True)
    J = jacobian(model, x)
    n, c = J.codomain.shapes["outputs"]
    with prepared(model, J.parameters):
        outputs = outputs_of(model, J.inputs).detach()
    pseudo = list(resolve(likelihood).exact(outputs))
    roots = torch.stack([h.flatten(1) for h in pseudo], dim=2).to(outputs.dtype)
    layers, total = {}, None
    for name in list(kernels):
        kernel = kernels.pop(name).to_dense()
        if mean_subtracted:
            kernel = centred(kernel, n, c)
        layers[name] = weighted(kernel, roots) / n
        total = layers[name] if total is None else total + layers[name]
    assert total is not None

    def pull_back(columns: Tensor) -> Tensor:
        if mean_subtracted:
            by_example = columns.reshape(n, c, -1)
            columns = (by_example - by_example.mean(dim=0)).reshape(n * c, -1)
        found = J.T @ columns
        assert isinstance(found, Tensor)
        return found

    sizes = _sizes(model, J.parameters)
    return Dual(total, layers, sizes, roots, outputs.flatten(1), pull_back)


def weighted(kernel: Tensor, roots: Tensor) -> Tensor:
    """Return ``B^T K B`` with ``B`` block-diagonal in the examples.

    Args:
        kernel: ``[N C, N C]``, examples first.
        roots: ``B`` ``[N, C, K]``.
    """
    n, c, k = roots.shape
    rows = torch.bmm(roots.mT, kernel.reshape(n, c, n * c))  # [N, K, N C]
    columns = rows.reshape(n * k, n, c).transpose(0, 1)  # [N, N K, C]
    return torch.bmm(columns, roots).transpose(0, 1).reshape(n * k, n * k)


def centred(kernel: Tensor, n: int, c: int) -> Tensor:
    """Return the kernel of the outputs without their means over the examples.

    Args:
        kernel: ``[N C, N C]``, examples first.
        n: ``N``.
        c: ``C``.
    """
    by_output = kernel.reshape(n, c, n, c)
    by_output = by_output - by_output.mean(dim=0, keepdim=True)
    by_output = by_output - by_output.mean(dim=2, keepdim=True)
    return by_output.reshape(n * c, n * c)


def _sizes(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """Return how many parameters every layer has, by the names of the kernels."""
    with prepared(model, parameters):
        layout = lay_out(model, parameters, {nn.Module: "diagonal"}, None)
    sizes: dict[str, int] = {}
    for block in layout.blocks:
        sizes[block.name] = sizes.get(block.name, 0) + prod(block.shape)
    for name, (_, members) in layout.groups.items():
        own = sum(parameters[member].numel() for member in members)
        sizes[name] = sizes.get(name, 0) + own
    return sizes


def eigenfunctions(pairs: Eigenpairs, J: Jacobian) -> Tensor:
    """Return ``u_i(x) = <v_i, grad f_k(x)> / sqrt(lambda_i)``, ``[N, C, k]``.

    Ge 2025, equation 4.24; George 2023, lemma 6.2.1. On the examples that the Fisher
    matrix of regression was taken on, ``(1/N) sum_nk u_i u_j`` is the identity.

    Args:
        pairs: Eigenpairs of a Fisher matrix; those of the null space, which have no
            function, are left out of the ``k``.
        J: The Jacobian at the examples ``x``.
    """
    kept = ~null_space(pairs.values)
    columns = J @ pairs.vectors[:, kept]
    assert isinstance(columns, Tensor)
    n, c = J.codomain.shapes["outputs"]
    return (columns / pairs.values[kept].sqrt()).reshape(n, c, -1)
