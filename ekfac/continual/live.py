"""From an optimizer's factors to the matrices of a task: copies, no data pass."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ekfac.continual.directions import truncated
from ekfac.continual.sources import TOP_K, Found, Request, by_block
from ekfac.continual.terms import snapshot
from ekfac.curvature import Curvature, LayerCurvature
from ekfac.errors import (
    EkfacWarning,
    NotReadyError,
    StateMismatchError,
    UnsupportedOperationError,
)
from ekfac.estimate.data import choose
from ekfac.estimate.functions import fisher_source
from ekfac.estimate.scalings import scalings as estimated_scalings
from ekfac.matrices import (
    BlockDiagonalMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    KFACMatrix,
    KroneckerFactors,
)
from ekfac.vectors import VectorSpace, named_parameters


def from_curvature(
    model: nn.Module,
    curvature: Curvature,
    request: Request,
    scalings: Literal["live", "kronecker"] | Iterable[Any],
    seen: Mapping[str, Tensor],
) -> Found:
    """Return copies of the matrices over an optimizer's factors.

    Args:
        model: The network.
        curvature: The optimizer's.
        request: The structure.
        scalings: See :meth:`QuadraticPenalty.consolidate`.
        seen: Fingerprints of what was consolidated before.
    """
    if request.structure in ("block_diagonal", "singular_directions"):
        raise UnsupportedOperationError(
            f"An optimizer's factors make no {request.structure!r}; consolidate from a "
            "loader, or choose 'kfac', 'ekfac', 'diagonal' or 'hessian_top_k' (the "
            "largest scalings)."
        )
    layers = _usable(model, curvature, request.parameters)
    unseen = {
        name: layer
        for name, layer in layers.items()
        if name not in seen or not torch.equal(seen[name], fingerprint(layer))
    }
    if not unseen:
        raise NotReadyError(
            "The curvature has no statistics that were not consolidated already; "
            "train on the task before consolidating."
        )
    if request.structure == "kfac":
        return {name: snapshot(KFACMatrix(la)) for name, la in unseen.items()}
    found = {
        name: snapshot(matrix)
        for name, matrix in _ekfac(model, unseen, request, scalings).items()
    }
    if request.structure == "diagonal":
        space = VectorSpace(
            {n: s for m in found.values() for n, s in m.space.shapes.items()}
        )
        return by_block(DiagonalMatrix(BlockDiagonalMatrix(space, found).diagonal()))
    if request.structure == "hessian_top_k":
        k = TOP_K if request.k is None else request.k
        return {
            name: truncated(m, k) if isinstance(m, EKFACMatrix) else m
            for name, m in found.items()
        }
    return found


def _ekfac(
    model: nn.Module,
    layers: Mapping[str, LayerCurvature],
    request: Request,
    scalings: Literal["live", "kronecker"] | Iterable[Any],
) -> dict[str, EKFACMatrix]:
    """Return EKFAC matrices in the layers' bases with the scalings asked for."""
    if isinstance(scalings, str) and scalings not in ("live", "kronecker"):
        raise ValueError(
            f"scalings must be 'live', 'kronecker' or data, got {scalings!r}."
        )
    not_ready = [name for name, layer in layers.items() if not layer.ready]
    if not_ready:
        raise NotReadyError(
            f"Layers {not_ready} have no eigenbasis yet; do a step of the optimizer "
            "before consolidating."
        )
    if isinstance(scalings, str) and scalings == "live":
        without = [name for name, layer in layers.items() if layer.s is None]
        if without:
            raise NotReadyError(
                f"Layers {without} have no scalings, which KFAC does not keep; pass "
                "scalings='kronecker' or a loader, or use structure='kfac'."
            )
        return {name: EKFACMatrix(layer) for name, layer in layers.items()}
    if isinstance(scalings, str):
        found = {name: _kronecker_scalings(layer) for name, layer in layers.items()}
    else:
        source = fisher_source(
            "exact" if request.kind == "hessian" else request.kind,
            request.likelihood,
            samples=request.samples,
            generator=request.generator,
            loss_fn=request.loss_fn,
            loss_reduction=request.loss_reduction,
        )
        found = estimated_scalings(
            model, scalings, layers, source, progress=request.progress
        )
    return {
        name: EKFACMatrix(
            KroneckerFactors(layer, Q_A=layer.Q_A, Q_G=layer.Q_G, s=found[name])
        )
        for name, layer in layers.items()
        if name in found
    }


def _kronecker_scalings(layer: LayerCurvature) -> Tensor:
    """Return the diagonal of ``G (x) A`` in the layer's basis."""
    sides = []
    for factor, basis in ((layer.G, layer.Q_G), (layer.A, layer.Q_A)):
        assert factor is not None
        if factor.dim() == 3:
            assert basis is not None
            factor = (basis * (factor @ basis)).sum(dim=-2).clamp(min=0)
        sides.append(factor)
    return sides[0].unsqueeze(-1) * sides[1].unsqueeze(-2)


def _usable(
    model: nn.Module, curvature: Curvature, parameters: tuple[str, ...] | None
) -> dict[str, LayerCurvature]:
    """Return the layers that have factors and belong to the model.

    Raises:
        StateMismatchError: If the curvature is of another model.
        NotReadyError: If no layer has factors.
    """
    named = named_parameters(model)
    chosen = choose(model, parameters)
    foreign = []
    layers = {}
    for name, layer in curvature.items():
        for parameter, tensor in zip(
            layer.parameter_names, layer.block.tensors(), strict=True
        ):
            own = named.get(parameter)
            if own is None or own.shape != tensor.shape:
                foreign.append(name)
        if set(layer.parameter_names) <= set(chosen) and layer.G is not None:
            layers[name] = layer
    if foreign:
        raise StateMismatchError(
            f"The curvature is of another model: layers {list(dict.fromkeys(foreign))} "
            f"do not fit {type(model).__name__}; pass the curvature of the optimizer "
            "that trains it."
        )
    if not layers:
        raise NotReadyError(
            f"No layer of the curvature ({list(curvature)}) has factors yet; train "
            "before consolidating."
        )
    covered = {n for layer in curvature.values() for n in layer.parameter_names}
    left = [name for name in chosen if name not in covered]
    if left:
        warnings.warn(
            f"Parameters {left} are in no Kronecker block of the optimizer, so they "
            "are not protected; consolidate from a loader to include them.",
            EkfacWarning,
            stacklevel=5,
        )
    return layers


def fingerprint(layer: LayerCurvature) -> Tensor:
    """Return numbers that change when the layer's factors do, ``[4]``.

    A layer that a task did not use, such as another task's head, still has that task's
    statistics, which would count twice.
    """
    numbers = [float(layer.version["factors"])]
    totals = (layer.averages[key].total for key in ("A", "G", "s"))
    numbers += [float(total.double().sum()) for total in totals]
    return torch.tensor(numbers, dtype=torch.float64)
