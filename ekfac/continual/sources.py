"""From data to the matrices of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ekfac.continual.directions import (
    hessian_top,
    positive_part,
    singular_directions,
)
from ekfac.continual.terms import layers_of
from ekfac.errors import UnsupportedOperationError
from ekfac.estimate import fisher, hessian
from ekfac.estimate.data import choose
from ekfac.estimate.sources import negative_log_likelihood
from ekfac.likelihoods import resolve
from ekfac.matrices import BlockDiagonalMatrix, CurvatureMatrix, DiagonalMatrix

Structure = Literal[
    "diagonal",
    "kfac",
    "ekfac",
    "rotated",
    "block_diagonal",
    "hessian_top_k",
    "singular_directions",
]
Kind = Literal["exact", "mc", "empirical", "hessian"]
Found = dict[str, CurvatureMatrix]
TOP_K, BIAS_SHARE = 20, 0.2


@dataclass(frozen=True)
class Request:
    """What is asked of an estimate; the fields are arguments of ``consolidate``.

    Attributes:
        structure: The penalty's.
        k: Likewise.
        parameters: Likewise.
        kind: Which matrix.
        likelihood: Of the outputs.
        loss_fn: For ``"empirical"`` and the Hessian.
        loss_reduction: Of ``loss_fn``.
        sharing: Of K-FAC.
        samples: Of ``"mc"``.
        generator: Of draws.
        progress: Whether to show bars.
    """

    structure: Structure
    k: int | float | None
    parameters: tuple[str, ...] | None
    kind: Kind
    likelihood: Any
    loss_fn: Callable[[Tensor, Any], Tensor] | None
    loss_reduction: str | None
    sharing: str
    samples: int
    generator: torch.Generator | None
    progress: bool


class CountedData:
    """A loader that knows how many examples its last pass had.

    Args:
        data: Any iterable of batches.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = list(data) if isinstance(data, Iterator) else data
        self.examples = 0

    def __iter__(self) -> Iterator[Any]:
        self.examples = 0
        for batch in self._data:
            self.examples += _batch_size(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Return the loader's own attribute, such as its generator."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._data, name)


def _batch_size(tree: Any) -> int:
    """Return the first dimension of the first tensor that has one."""
    if isinstance(tree, Tensor):
        return len(tree) if tree.dim() else 0
    parts: Iterable[Any] = ()
    if isinstance(tree, Mapping):
        parts = tree.values()
    elif isinstance(tree, (tuple, list)):
        parts = tree
    return next((size for part in parts if (size := _batch_size(part))), 0)


# -- from data -------------------------------------------------------------------------


def from_data(model: nn.Module, data: Iterable[Any], request: Request) -> Found:
    """Return the matrices of a task by layer, estimated on its data."""
    structure = request.structure
    if structure == "singular_directions":
        return _singular(model, data, request)
    if structure == "hessian_top_k":
        if request.kind != "hessian":
            raise ValueError(
                "structure='hessian_top_k' is of the Hessian, got kind="
                f"{request.kind!r}; 'ekfac' has the Fisher matrix."
            )
        groups = by_layer(choose(model, request.parameters))
        return _hessian_top(model, data, request, groups)
    if request.kind == "hessian":
        return _hessian(model, data, request)
    matrix = fisher(
        model,
        data,
        "ekfac" if structure == "rotated" else structure,
        request.kind,
        request.likelihood,
        sharing=request.sharing,
        samples=request.samples,
        generator=request.generator,
        progress=request.progress,
        parameters=request.parameters,
        loss_fn=request.loss_fn,
        loss_reduction=request.loss_reduction,
        fallback="diagonal" if structure in ("kfac", "ekfac", "rotated") else None,
    )
    return by_block(matrix)


def _loss(request: Request) -> tuple[Callable[[Tensor, Any], Tensor], str | None]:
    """Return the loss and its reduction: the user's or the likelihood's."""
    if request.loss_fn is not None:
        return request.loss_fn, request.loss_reduction
    likelihood = resolve(request.likelihood)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return negative_log_likelihood(likelihood, outputs, targets)

    return loss, "sum"


def _hessian(model: nn.Module, data: Iterable[Any], request: Request) -> Found:
    """Return the Hessian's positive part, diagonal or in blocks."""
    structure = request.structure
    if structure not in ("diagonal", "block_diagonal"):
        raise UnsupportedOperationError(
            f"The Hessian has no structure {structure!r}; use 'diagonal', "
            "'block_diagonal' or 'hessian_top_k' with kind='hessian'."
        )
    loss, reduction = _loss(request)
    matrix = hessian(
        model,
        data,
        loss,
        "diagonal" if structure == "diagonal" else "block_diagonal",
        progress=request.progress,
        parameters=request.parameters,
        loss_reduction=reduction,
    )
    if isinstance(matrix, DiagonalMatrix):
        matrix = DiagonalMatrix(matrix.entries.map(lambda t: t.clamp(min=0)))
    return {key: positive_part(block) for key, block in by_block(matrix).items()}


def _hessian_top(
    model: nn.Module,
    data: Iterable[Any],
    request: Request,
    groups: Mapping[str, list[str]],
) -> Found:
    loss, reduction = _loss(request)
    return hessian_top(
        model,
        data,
        loss,
        groups,
        TOP_K if request.k is None else request.k,
        loss_reduction=reduction,
        progress=request.progress,
        generator=request.generator,
    )


def _singular(model: nn.Module, data: Iterable[Any] | None, request: Request) -> Found:
    """Return the weights' singular directions, and the top of the biases' Hessian."""
    chosen = choose(model, request.parameters)
    found: Found = {
        name: singular_directions(p, name, request.k)
        for name, p in chosen.items()
        if p.dim() > 1
    }
    rest = {name: p for name, p in chosen.items() if p.dim() < 2}
    if data is not None and rest:
        shared = replace(request, k=BIAS_SHARE)
        found |= _hessian_top(model, data, shared, {name: [name] for name in rest})
    return found


def from_weights(model: nn.Module, request: Request) -> Found:
    """Return what is known without data: the weights' singular directions."""
    if request.structure != "singular_directions":
        raise ValueError(
            f"consolidate() needs data or a Curvature for structure="
            f"{request.structure!r}; only 'singular_directions' needs neither."
        )
    return _singular(model, None, request)


def by_layer(parameters: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return layer name -> parameter names."""
    groups: dict[str, list[str]] = {}
    for name in parameters:
        groups.setdefault(layers_of([name])[0], []).append(name)
    return groups


def by_block(matrix: CurvatureMatrix) -> Found:
    """Return the blocks of a matrix; of a diagonal one, each parameter."""
    if isinstance(matrix, BlockDiagonalMatrix):
        found: Found = {}
        for key, block in matrix.blocks.items():
            if isinstance(block, DiagonalMatrix):
                found |= by_block(block)
            else:
                found[key] = block
        return found
    if isinstance(matrix, DiagonalMatrix):
        return {
            name: DiagonalMatrix(matrix.entries.subset([name]))
            for name in matrix.space.names
        }
    return {"": matrix}


def check_structure(structure: str) -> None:
    """Raise ``ValueError`` unless there is such a structure."""
    if structure not in get_args(Structure):
        raise ValueError(
            f"structure must be one of {list(get_args(Structure))}, got {structure!r}."
        )
