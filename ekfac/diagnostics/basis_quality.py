"""What a layer's eigenbasis achieves, beside the layer's exact curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.errors import NotReadyError

if TYPE_CHECKING:
    from ekfac.curvature import LayerCurvature


@dataclass(frozen=True)
class BasisQuality:
    """A layer's factors, basis and scalings beside its exact block ``F``.

    George et al. 2018, Figures 2 and 4; George 2023, section 4.4. Numbers are over all
    ``b`` blocks of the layer; errors are relative.

    Attributes:
        correlation: Mean ``|C_ij| / sqrt(C_ii C_jj)`` off the diagonal, of the
            gradients' coordinates as parameters.
        basis_correlation: The same in the eigenbasis.
        kfac_error: ``|F - A (x) G|_F / |F|_F``.
        ekfac_error: ``|F - Q diag(s) Q^T|_F / |F|_F``; nan without scalings.
        kfac_spectrum: ``|spec(A (x) G) - spec(F)| / |spec(F)|``, both sorted.
        ekfac_spectrum: The same of the scalings; nan without.
    """

    correlation: float
    basis_correlation: float
    kfac_error: float
    ekfac_error: float
    kfac_spectrum: float
    ekfac_spectrum: float


def basis_quality(layer: LayerCurvature, block: Tensor) -> BasisQuality:
    """Return how well a layer's curvature stands in for the exact block.

    K-FAC's matrix has the factors' eigenvalues as of the last refresh of the basis, as
    the optimizer's steps do.

    Args:
        layer: With factors and basis.
        block: ``F``, ``[P, P]`` over the layer's parameters in their order:
            ``ekfac.fisher(model, data, "dense", kind, parameters=layer.parameter_names)
            .to_dense()``.

    Raises:
        NotReadyError: If the layer has no basis yet.
        ValueError: If ``block`` is of another size.
    """
    if not layer.ready:
        raise NotReadyError(f"Layer {layer.name!r} has no basis yet; do a step first.")
    b, d_out, d_in = layer.block.shape
    if block.shape != (size := b * d_out * d_in, size):
        raise ValueError(
            f"Layer {layer.name!r} has {size} parameters, so its block is [{size}, "
            f"{size}]; got {list(block.shape)}."
        )
    index = _packed_index(layer)
    F = block.double()[index.unsqueeze(2), index.unsqueeze(1)]
    Q = _basis(layer).to(F)
    turned = Q.mT @ F @ Q
    values = layer.eigenvalues_G.unsqueeze(-1) * layer.eigenvalues_A.unsqueeze(-2)
    kronecker = values.flatten(1).to(F)
    s = layer.s
    own = None if s is None else s.flatten(1).to(F)
    exact = torch.linalg.eigvalsh(F).flatten()
    return BasisQuality(
        correlation=_correlation(F),
        basis_correlation=_correlation(turned),
        kfac_error=_error(turned, kronecker),
        ekfac_error=float("nan") if own is None else _error(turned, own),
        kfac_spectrum=_spectrum(exact, kronecker),
        ekfac_spectrum=float("nan") if own is None else _spectrum(exact, own),
    )


def _packed_index(layer: LayerCurvature) -> Tensor:
    """Return where the entries of ``[b, d_out d_in]`` stand among the parameters."""
    start, tensors = 0, {}
    for name, tensor in zip(layer.parameter_names, layer.block.tensors(), strict=True):
        count = tensor.numel()
        tensors[name] = torch.arange(start, start + count).reshape(tensor.shape)
        start += count
    return layer.pack(tensors).flatten(1)


def _basis(layer: LayerCurvature) -> Tensor:
    """Return ``Q_G (x) Q_A`` of every block, row-major over ``[d_out, d_in]``."""
    b, d_out, d_in = layer.block.shape
    sides = []
    for Q, size in ((layer.Q_G, d_out), (layer.Q_A, d_in)):
        eye = torch.eye(size, device=layer.eigenvalues_A.device)
        sides.append((eye.expand(1, -1, -1) if Q is None else Q).double())
    left, right = (Q.expand(b, -1, -1) for Q in sides)
    return torch.einsum("bij,bkl->bikjl", left, right).reshape(b, d_out * d_in, -1)


def _correlation(C: Tensor) -> float:
    """Return the mean absolute correlation; coordinates without variance left out."""
    found = []
    for block in C:
        variance = block.diagonal()
        kept = variance > 1e-12 * variance.max()
        part = block[kept][:, kept]
        if len(part) < 2:
            continue
        root = part.diagonal().sqrt()
        correlation = (part / root / root[:, None]).abs()
        off = correlation.sum() - correlation.diagonal().sum()
        found.append(float(off) / (len(part) * (len(part) - 1)))
    return sum(found) / len(found) if found else float("nan")


def _error(turned: Tensor, diagonal: Tensor) -> float:
    """Return ``|F - Q diag(d) Q^T| / |F|`` from ``Q^T F Q``."""
    return float((turned - torch.diag_embed(diagonal)).norm() / turned.norm())


def _spectrum(exact: Tensor, values: Tensor) -> float:
    mine = values.flatten().sort().values
    return float((mine - exact.sort().values).norm() / exact.norm())
