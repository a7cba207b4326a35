"""Matrices of a task: from its data, its weights, or an optimizer's factors.

Singular directions and top eigenvectors are those of Haink 2023, sections 3.3, 4 and
7.7. The penalties there have no factor 1/2: their ``lambda`` is half of ``strength``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ekfac.continual.tasks import layers_of, snapshot
from ekfac.curvature import Curvature, LayerCurvature
from ekfac.errors import (
    NotReadyError,
    StateMismatchError,
    UnsupportedOperationError,
    warn_outside,
)
from ekfac.estimate import fisher, hessian
from ekfac.estimate.build import scalings as estimated_scalings
from ekfac.estimate.data import Data, choose, predicted, prepared, read
from ekfac.estimate.functions import fisher_source
from ekfac.estimate.losses import ignored_by, is_classes, negative_log_likelihood
from ekfac.likelihoods import Categorical, resolve
from ekfac.matrices import (
    BlockDiagonalMatrix,
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
    EKFACMatrix,
    KFACMatrix,
    KroneckerFactors,
    LowRankMatrix,
)
from ekfac.spectral import eigensolvers
from ekfac.spectral.eigensolvers import singular_products
from ekfac.vectors import VectorSpace, named_parameters

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
Blocks = dict[str, CurvatureMatrix]
TOP_K, BIAS_SHARE = 20, 0.2


@dataclass(frozen=True)
class Request:
    """Options of an estimate: the penalty's and those of ``consolidate``."""

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
    """A loader that counts the examples of its last pass that have a counting target.

    Args:
        data: Any iterable of batches.
        ignored: The class that does not count, ``None`` where targets are no classes.
    """

    def __init__(self, data: Iterable[Any], ignored: int | None = None) -> None:
        self._data = list(data) if isinstance(data, Iterator) else data
        self._ignored = ignored
        self.examples = 0

    def __iter__(self) -> Iterator[Any]:
        self.examples = 0
        for batch in self._data:
            self.examples += self._count(batch)
            yield batch

    def _count(self, item: Any) -> int:
        batch = read(item, 0, torch.device("cpu"))
        size, y = _batch_size(batch.inputs), batch.targets
        if self._ignored is None or not isinstance(y, Tensor) or not size:
            return size
        if y.is_floating_point() or y.numel() % size:
            return size
        return int((y != self._ignored).reshape(size, -1).any(dim=1).sum())

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Return the loader's own attribute, such as its generator."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._data, name)


def _batch_size(tree: Any) -> int:
    """Return the length of the first tensor that has a dimension, else 0."""
    if isinstance(tree, Tensor):
        return len(tree) if tree.dim() else 0
    parts: Iterable[Any] = ()
    if isinstance(tree, Mapping):
        parts = tree.values()
    elif isinstance(tree, (tuple, list)):
        parts = tree
    return next((size for part in parts if (size := _batch_size(part))), 0)


# -- from data -------------------------------------------------------------------------


def from_data(model: nn.Module, data: Iterable[Any], request: Request) -> Blocks:
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
        groups: dict[str, list[str]] = {}
        for name in choose(model, request.parameters):
            groups.setdefault(layers_of([name])[0], []).append(name)
        return hessian_top(model, data, request, groups)
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


def ignored_class(request: Request) -> int | None:
    """Return the class that does not count, ``None`` where targets are no classes."""
    likelihood = resolve(request.likelihood)
    if not isinstance(likelihood, Categorical):
        return None
    ignore_index = ignored_by(request.loss_fn)
    return likelihood.ignore_index if ignore_index is None else ignore_index


def class_dim_of(model: nn.Module, data: Iterable[Any], request: Request) -> int | None:
    """Return the dimension over classes that the targets lack, if there is one."""
    likelihood = resolve(request.likelihood)
    if not isinstance(likelihood, Categorical) or likelihood.class_dim is not None:
        return getattr(likelihood, "class_dim", None)
    parameters = choose(model, request.parameters)
    device = next(iter(parameters.values())).device
    with prepared(model, parameters):
        outputs, batch = predicted(model, Data(data, device).first())
    if outputs.dim() < 3 or not is_classes(batch.targets):
        return None
    fitted = likelihood.fitted_to_targets(outputs, batch.targets)
    return fitted.class_dim if isinstance(fitted, Categorical) else None


def _loss(request: Request) -> tuple[Callable[[Tensor, Any], Tensor], str | None]:
    """Return the loss and its reduction: the user's or the likelihood's."""
    if request.loss_fn is not None:
        return request.loss_fn, request.loss_reduction
    likelihood = resolve(request.likelihood)

    def loss(outputs: Tensor, targets: Any) -> Tensor:
        return negative_log_likelihood(likelihood, outputs, targets)

    return loss, "sum"


def _hessian(model: nn.Module, data: Iterable[Any], request: Request) -> Blocks:
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
    return {
        key: block.clamped() if isinstance(block, DenseMatrix) else block
        for key, block in by_block(matrix).items()
    }


def _singular(model: nn.Module, data: Iterable[Any] | None, request: Request) -> Blocks:
    """Return the weights' singular directions, and the top of the biases' Hessian."""
    parameters = choose(model, request.parameters)
    blocks: Blocks = {
        name: singular_directions(p, name, request.k)
        for name, p in parameters.items()
        if p.dim() > 1
    }
    vectors = {name: p for name, p in parameters.items() if p.dim() < 2}
    if data is not None and vectors:
        shared = replace(request, k=BIAS_SHARE)
        blocks |= hessian_top(model, data, shared, {name: [name] for name in vectors})
    return blocks


def from_weights(model: nn.Module, request: Request) -> Blocks:
    """Return the weights' singular directions, which need no data."""
    if request.structure != "singular_directions":
        raise ValueError(
            f"consolidate() needs data or a Curvature for structure="
            f"{request.structure!r}; only 'singular_directions' needs neither."
        )
    return _singular(model, None, request)


def by_block(matrix: CurvatureMatrix) -> Blocks:
    """Return the blocks of a matrix; a diagonal one has a block for each parameter."""
    if isinstance(matrix, BlockDiagonalMatrix):
        blocks: Blocks = {}
        for key, block in matrix.blocks.items():
            if isinstance(block, DiagonalMatrix):
                blocks |= by_block(block)
            else:
                blocks[key] = block
        return blocks
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


# Largest number of parameters of a layer whose Hessian is formed.
DENSE = 2048
FALLBACK = 5


# -- singular directions ---------------------------------------------------------------


def singular_directions(
    weight: Tensor, name: str, k: int | float | None = None
) -> LowRankMatrix:
    """Return ``sum_i nu_i w_i w_i^T`` with ``w_i = vec(u_i v_i^T)`` (Haink 2023, 7.11).

    The singular value decomposition is that of the weight ``[d_out, *]`` with all
    other dimensions merged, the matrix that K-FAC sees.

    Args:
        weight: ``[d_out, *]``, at least two-dimensional.
        name: Name of the parameter.
        k: Number of directions, or a share of all as a float. Default: as many as there
            are singular values beyond the edge of the noise, :func:`noise_edge`, or
            five where there are none.

    Raises:
        ValueError: If ``k`` is not positive, or a share above 1.
    """
    matrix = weight.detach().flatten(1)
    full_rank = min(matrix.shape)
    if k is None:
        beyond = int((torch.linalg.svdvals(matrix) > noise_edge(weight)).sum())
        count = beyond or min(FALLBACK, full_rank)
    else:
        count = counted(k, full_rank)
    values, products = singular_products(matrix, count)
    space = VectorSpace({name: weight.shape})
    return LowRankMatrix(space, products.flatten(1), weights=values)


def noise_edge(weight: Tensor) -> float:
    """Return the largest singular value of pure noise.

    It is ``sigma (sqrt(n) + sqrt(m))`` (Marchenko & Pastur 1967), with ``sigma`` from
    the median singular value, which a few large ones do not move (Gavish & Donoho 2014,
    section III.D). The standard deviation of the entries would count the signal as
    noise, and often leave nothing of a trained layer beyond the edge.

    Args:
        weight: ``[d_out, *]``, taken as a matrix ``[n, m]``.
    """
    matrix = weight.detach().flatten(1)
    median = float(torch.linalg.svdvals(matrix).median())
    sigma = median / eigensolvers.noise_median(*matrix.shape)
    return eigensolvers.noise_edge(matrix.shape, sigma)


def counted(k: int | float, limit: int) -> int:
    """Return a number of directions: ``k`` or, for a float, that share of ``limit``.

    Raises:
        ValueError: If ``k`` is not positive, or a share above 1.
    """
    count = round(k * limit) if isinstance(k, float) else k
    if not (k > 0 and (isinstance(k, int) or k <= 1)):
        raise ValueError(
            f"k must be a positive number of directions, or a share above 0 and at "
            f"most 1.0 as a float, got {k!r}."
        )
    return max(1, min(count, limit))


# -- the Hessian's top -----------------------------------------------------------------


def hessian_top(
    model: nn.Module,
    data: Iterable[Any],
    request: Request,
    groups: Mapping[str, list[str]],
) -> Blocks:
    """Return ``sum_i h_i e_i e_i^T`` over the largest eigenpairs of every block.

    Haink 2023, equation 7.10. Eigenvalues that are not positive are left out: a penalty
    of negative curvature has no minimum. Blocks of up to ``DENSE`` parameters are
    formed; larger ones take several dozen passes over the data, with ``k`` products
    each.
    """
    loss_fn, reduction = _loss(request)
    k = TOP_K if request.k is None else request.k
    parameters = choose(model, [name for names in groups.values() for name in names])
    options: dict[str, Any] = {
        "loss_reduction": reduction,
        "progress": request.progress,
    }
    blocks: Blocks = {}
    for key, names in groups.items():
        size = sum(parameters[name].numel() for name in names)
        if size <= DENSE:
            H = hessian(model, data, loss_fn, "dense", parameters=names, **options)
        else:
            H = hessian(model, data, loss_fn, "implicit", parameters=names, **options)
            H.generator = request.generator  # type: ignore[attr-defined]
        pairs = H.top_eigenpairs(counted(k, size))
        if not pairs.converged:
            warn_outside(
                f"The Hessian's top eigenvectors of layer {key!r} have relative "
                f"residuals up to {float(pairs.residuals.max() / pairs.values[0]):.2g};"
                " they are used as they are."
            )
        positive = pairs.values > 0
        rows = pairs.vectors[:, positive].mT.contiguous()
        blocks[key] = LowRankMatrix(H.space, rows, weights=pairs.values[positive])
    return blocks


def truncated(matrix: EKFACMatrix, k: int | float) -> EKFACMatrix:
    """Return an EKFAC matrix with all but its ``k`` largest scalings zero."""
    s = matrix.factor("s")
    best = s.flatten().topk(counted(k, s.numel())).indices
    largest = torch.zeros_like(s).flatten().index_copy(0, best, s.flatten()[best])
    return matrix.with_scalings(largest.reshape(s.shape))


def from_curvature(
    model: nn.Module,
    curvature: Curvature,
    request: Request,
    scalings: Literal["live", "kronecker"] | Iterable[Any],
    seen: Mapping[str, Tensor],
) -> Blocks:
    """Return copies of the matrices over an optimizer's factors.

    Layers whose :func:`fingerprint` is the one in ``seen`` are left out.
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
    matrices = {
        name: snapshot(matrix)
        for name, matrix in _ekfac(model, unseen, request, scalings).items()
    }
    if request.structure == "diagonal":
        space = VectorSpace(
            {n: s for m in matrices.values() for n, s in m.space.shapes.items()}
        )
        return by_block(DiagonalMatrix(BlockDiagonalMatrix(space, matrices).diagonal()))
    if request.structure == "hessian_top_k":
        k = TOP_K if request.k is None else request.k
        return {
            name: truncated(m, k) if isinstance(m, EKFACMatrix) else m
            for name, m in matrices.items()
        }
    return matrices


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
        values = {name: _kronecker_scalings(layer) for name, layer in layers.items()}
    else:
        source = fisher_source(
            "exact" if request.kind == "hessian" else request.kind,
            request.likelihood,
            samples=request.samples,
            generator=request.generator,
            loss_fn=request.loss_fn,
            loss_reduction=request.loss_reduction,
        )
        values = estimated_scalings(
            model, scalings, layers, source, progress=request.progress
        )
    return {
        name: EKFACMatrix(
            KroneckerFactors(layer, Q_A=layer.Q_A, Q_G=layer.Q_G, s=values[name])
        )
        for name, layer in layers.items()
        if name in values
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
    params = choose(model, parameters)
    foreign = []
    layers = {}
    for name, layer in curvature.items():
        for parameter, tensor in zip(
            layer.parameter_names, layer.block.tensors(), strict=True
        ):
            trained = named.get(parameter)
            if trained is None or trained.shape != tensor.shape:
                foreign.append(name)
        if set(layer.parameter_names) <= set(params) and layer.G is not None:
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
    left = [name for name in params if name not in covered]
    if left:
        warn_outside(
            f"Parameters {left} are in no Kronecker block of the optimizer, so they "
            "are not protected; consolidate from a loader to include them."
        )
    return layers


def fingerprint(layer: LayerCurvature) -> Tensor:
    """Return numbers that change when the layer's factors do, ``[4]``.

    A layer that a task did not use, such as another task's head, still has that task's
    statistics, which would count twice.
    """
    numbers = [float(layer.version["factors"])]
    for key in ("A", "G", "s"):
        average = layer.averages[key]  # K-FAC has no scalings
        numbers.append(float(average.total.double().sum()) if average.held else 0.0)
    return torch.tensor(numbers, dtype=torch.float64)
