"""``fisher``, ``ggn`` and ``hessian``: from a model and data to a curvature matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ekfac.estimate.build import build
from ekfac.estimate.data import NO_TARGETS, predicted, space_of
from ekfac.estimate.layout import (
    Structure,
    StructureChoice,
    check_preconditioner,
    check_structure,
    owner_of,
)
from ekfac.estimate.losses import BatchLoss, Loss
from ekfac.estimate.output_hessians import (
    EmpiricalFisher,
    ExactFisher,
    LossHessian,
    SampledFisher,
    Source,
    check_finite,
)
from ekfac.estimate.products import (
    COLUMNS,
    HessianProducts,
    Problem,
    back_propagated,
    implicit_matrix,
    loss_gradients,
)
from ekfac.layers import ConvFactors
from ekfac.likelihoods import Gaussian, _real, resolve
from ekfac.matrices import (
    BlockDiagonalMatrix,
    CurvatureMatrix,
    DenseMatrix,
    DiagonalMatrix,
)
from ekfac.vectors import named_modules

Kind = Literal["exact", "mc", "empirical", "l2"]
HessianStructure = Literal["implicit", "dense", "block_diagonal", "diagonal"]


def fisher(
    model: nn.Module,
    data: Iterable[Any],
    structure: StructureChoice = "ekfac",
    kind: Kind = "exact",
    likelihood: Any = "categorical",
    *,
    sharing: str = "expand",
    samples: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
    parameters: Iterable[str] | None = None,
    loss_fn: Loss | None = None,
    loss_reduction: str | None = None,
    fallback: Structure | None = None,
    preconditioner: CurvatureMatrix | None = None,
    rank: float | None = None,
    conv_factors: ConvFactors = "patches",
) -> CurvatureMatrix:
    """Return the Fisher matrix of a model on data, in a structure.

    It is that of the loss averaged over the examples; the positions of one example are
    summed. Batches may be uneven. While it is taken the model is in eval mode, so that
    dropout is off and batch norms use their running statistics: a matrix of single
    examples exists only then. Modes, ``.grad``, ``requires_grad`` and the state of
    torch's random generators are left as they were found.

    Args:
        model: Any module that returns a tensor of predictions, or an object, mapping
            or tuple with one (``logits`` where there are).
        data: Any iterable of batches ``(x, y)``, of inputs ``x`` alone, or of mappings
            with targets under ``"labels"``. A mapping ``x`` is the model's keyword
            arguments, a tuple its arguments; ``docs/batches_and_losses.md`` has all
            forms. It is gone through once, for ``"ekfac"`` twice, for ``"implicit"`` at
            every product.
        structure: ``"dense"``, ``"block_diagonal"`` (a dense block per layer),
            ``"diagonal"``, ``"quasi_diagonal"``, ``"low_rank"``, ``"kfac"``,
            ``"ekfac"``, ``"implicit"``, or a mapping from layer name or type (the
            nearest counts, ``nn.Module`` is any) to one of these but the last.
        kind: ``"exact"`` is the expectation over the likelihood's targets, ``"mc"`` a
            mean over drawn ones, ``"empirical"`` has the targets of the data, ``"l2"``
            is the outputs' Jacobian squared, without likelihood.
        likelihood: ``"categorical"`` (targets of -100 are ignored), ``"bernoulli"``,
            ``"gaussian"``, or a callable from outputs to a ``torch.distributions``
            distribution.
        sharing: How K-FAC treats shared positions: ``"expand"`` or ``"reduce"``.
        samples: Targets drawn per example, for ``"mc"``.
        generator: Seeds the draws, once: an implicit matrix is the same at every
            product. Default: torch's global seed, which is not advanced. Other kinds
            draw signs: only where a layer's gradient sums over the examples (position
            embeddings) do they leave noise in ``"kfac"`` and ``"ekfac"``, of mean zero.
        progress: Whether to show a progress bar, if tqdm is installed.
        parameters: Names of parameters or layers to restrict the matrix to. Default:
            what requires a gradient.
        loss_fn: ``(outputs, y) -> loss`` of a batch, for ``"empirical"``. Default: the
            likelihood's.
        loss_reduction: Whether ``loss_fn`` is a ``"mean"`` over the batch's targets or
            a ``"sum"``. Default: as it is found to be.
        fallback: Structure of layers that have no adapter, with ``"kfac"`` and
            ``"ekfac"``. Default: they are an error.
        preconditioner: For the solves of ``"implicit"``: a matrix of another structure.
        rank: Of the eigenbases of ``"ekfac"``: ``None``, an integer or a share, as for
            :class:`ekfac.EKFAC`. The matrix is then that of a basis with these leading
            eigenvectors, in which the directions that are left out have equal scalings:
            the mean of theirs, so that the trace stays exact. No factor is decomposed
            in full.
        conv_factors: Input factors of convolutions with ``"kfac"`` and ``"ekfac"``:
            ``"patches"`` or ``"spatially_uncorrelated"``, see :class:`ekfac.EKFAC`.

    Returns:
        A :class:`~ekfac.matrices.CurvatureMatrix` in the flat order of
        ``model.named_parameters()``, in float32 at least.

    Raises:
        UnsupportedLayerError: If a layer has no adapter and ``fallback`` is ``None``.
        CaptureError: If a layer's parameters are used without calling it.
        ValueError: If the data are empty, not finite or without the targets needed.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> F = fisher(model, [(torch.randn(8, 3), None)], structure="kfac")
        >>> F.solve(torch.ones(8), damping=1.0).shape
        torch.Size([8])
    """
    source = fisher_source(
        kind,
        likelihood,
        samples=samples,
        generator=generator,
        loss_fn=loss_fn,
        loss_reduction=loss_reduction,
    )
    problem = Problem.of(model, data, source, parameters, progress)
    return build(
        problem, structure, fallback, sharing, preconditioner, rank, conv_factors
    )


def fisher_source(
    kind: Kind,
    likelihood: Any,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
    loss_fn: Loss | None = None,
    loss_reduction: str | None = None,
) -> Source:
    """Return the source of the pseudo-gradients of a Fisher matrix.

    The arguments are those of :func:`fisher`.

    Raises:
        ValueError: If they do not fit together.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {list(get_args(Kind))}, got {kind!r}.")
    if loss_fn is not None and kind != "empirical":
        raise ValueError(
            f"loss_fn is for kind='empirical', got {kind=}; use ekfac.ggn for the "
            "matrix that another loss defines."
        )
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an integer, at least 1, got {samples!r}.")
    seed = _seed(generator)
    if kind == "l2":
        return ExactFisher(Gaussian(), seed)
    if kind == "exact":
        return ExactFisher(resolve(likelihood), seed)
    if kind == "mc":
        return SampledFisher(resolve(likelihood), samples, seed)
    loss = None if loss_fn is None else BatchLoss(loss_fn, loss_reduction)
    return EmpiricalFisher(resolve(likelihood), loss, seed)


def ggn(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    structure: StructureChoice = "ekfac",
    *,
    sharing: str = "expand",
    progress: bool = False,
    parameters: Iterable[str] | None = None,
    loss_reduction: str | None = None,
    generator: torch.Generator | None = None,
    fallback: Structure | None = None,
    preconditioner: CurvatureMatrix | None = None,
    rank: float | None = None,
    conv_factors: ConvFactors = "patches",
) -> CurvatureMatrix:
    """Return the generalized Gauss-Newton matrix of any loss convex in the outputs.

    ``(1/N) sum_n J_n^T H_n J_n`` with ``H_n`` the Hessian of the loss with respect to
    the outputs of example ``n`` (Schraudolph 2002). The loss must be a mean or sum of
    losses of single examples, and is taken as it is: one that is a mean over positions
    or outputs as well gives a matrix that many times smaller. What losses and batches
    may be is written in ``docs/batches_and_losses.md``.

    Args:
        model: As for :func:`fisher`.
        data: As for :func:`fisher`, with targets.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        structure: As for :func:`fisher`. All but ``"implicit"`` take as many backward
            passes as an example has outputs.
        sharing: As for :func:`fisher`.
        progress: As for :func:`fisher`.
        parameters: As for :func:`fisher`.
        loss_reduction: Whether ``loss_fn`` is a ``"mean"`` over the examples of the
            batch or a ``"sum"``. Default: as it is found to be.
        generator: Of signs, as for :func:`fisher`.
        fallback: As for :func:`fisher`.
        preconditioner: As for :func:`fisher`.
        rank: As for :func:`fisher`.
        conv_factors: As for :func:`fisher`.

    Returns:
        As :func:`fisher`.

    Raises:
        ValueError: As :func:`fisher`; if the loss is not convex in the outputs, is no
            mean or sum of losses of single examples, or has weights that are not known.
    """
    source = LossHessian(BatchLoss(loss_fn, loss_reduction), _seed(generator))
    problem = Problem.of(model, data, source, parameters, progress)
    return build(
        problem, structure, fallback, sharing, preconditioner, rank, conv_factors
    )


def hessian(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    structure: HessianStructure = "implicit",
    *,
    progress: bool = False,
    parameters: Iterable[str] | None = None,
    loss_reduction: str | None = None,
    preconditioner: CurvatureMatrix | None = None,
) -> CurvatureMatrix:
    """Return the Hessian of a loss averaged over the examples.

    Args:
        model: As for :func:`fisher`; in eval mode meanwhile.
        data: As for :func:`fisher`, with targets.
        loss_fn: ``(outputs, y) -> loss`` of a batch, also one that couples examples.
        structure: ``"implicit"``, ``"dense"``, ``"block_diagonal"`` or ``"diagonal"``.
            The last three take a product per parameter, in one pass over the data.
        progress: As for :func:`fisher`.
        parameters: As for :func:`fisher`.
        loss_reduction: As for :func:`ggn`.
        preconditioner: As for :func:`fisher`; the damped Hessian has to be positive
            definite for solves.

    Returns:
        As :func:`fisher`.

    Raises:
        UnsupportedOperationError: If a layer calls a function that is not twice
            differentiable; the layer is named.
        ValueError: If the data are empty, not finite or without targets.
    """
    single = check_structure(structure, get_args(HessianStructure))
    check_preconditioner(preconditioner, single)
    source = LossHessian(BatchLoss(loss_fn, loss_reduction, coupled=True))
    problem = Problem.of(model, data, source, parameters, progress)
    problem.data.first()
    if single == "implicit":
        return implicit_matrix(HessianProducts(problem), preconditioner)
    return _HessianBlocks(problem, source, single).matrix()


class _HessianBlocks:
    """Sums over batches of the Hessian's blocks, by a product per row."""

    def __init__(self, problem: Problem, source: LossHessian, structure: str) -> None:
        self.problem, self.source, self.structure = problem, source, structure
        self.groups: dict[str, list[str]] = {}
        modules = named_modules(problem.model)
        for name in problem.parameters:
            owner = "" if structure == "dense" else owner_of(name, modules)
            self.groups.setdefault(owner, []).append(name)
        self.sums: dict[str, Tensor] = {}

    def matrix(self) -> CurvatureMatrix:
        """Return the matrix."""
        problem, count = self.problem, 0.0
        with problem.passes("Hessian", twice=True) as batches:
            for batch in batches:
                outputs, batch = predicted(problem.model, batch)
                check_finite(outputs, "The model's outputs", batch)
                params = list(problem.parameters.values())
                model, source = problem.model, self.source
                grads = loss_gradients(model, source, outputs, batch, params)
                by_name = dict(zip(problem.parameters, grads, strict=True))
                for group, names in self.groups.items():
                    self._add(group, names, by_name)
                count += float(self.source.share(outputs.detach(), batch))
        if not count:
            raise ValueError(NO_TARGETS)
        space = problem.space
        if self.structure == "diagonal":
            entries: dict[str, Tensor] = {}
            for group, names in self.groups.items():
                part = space.subspace(names)
                entries.update(part.vector(self.sums[group] / count))
            ordered = {name: entries[name] for name in space.names}
            return DiagonalMatrix(space.vector_type(ordered))
        if self.structure == "dense":
            return DenseMatrix(space, self.sums[""] / count)
        blocks = {
            group: DenseMatrix(space.subspace(names), self.sums[group] / count)
            for group, names in self.groups.items()
        }
        return BlockDiagonalMatrix(space, blocks)

    def _add(self, group: str, names: list[str], grads: dict[str, Tensor]) -> None:
        """Add the rows of one block."""
        params = {name: self.problem.parameters[name] for name in names}
        outputs, space = [grads[name] for name in names], space_of(params)
        like = outputs[0]
        parts = []
        for start in range(0, space.size, COLUMNS):
            index = torch.arange(start, min(start + COLUMNS, space.size))
            units = torch.zeros(len(index), space.size).to(like)
            units[torch.arange(len(index)), index] = 1
            weights = list(space.split(units).values())
            rows = back_propagated(outputs, list(params.values()), weights)
            if self.structure == "diagonal":
                rows = rows[torch.arange(len(index)), index]
            parts.append(_real(rows.detach()))
        block = torch.cat(parts)
        if self.structure != "diagonal":
            block = (block + block.mT) / 2
        self.sums[group] = self.sums[group] + block if group in self.sums else block


def _seed(generator: torch.Generator | None) -> int:
    """Return a seed from ``generator``, or the global one without advancing it."""
    if generator is None:
        return torch.initial_seed() % 2**62
    drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return int(drawn)
