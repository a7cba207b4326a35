"""Pruning with and without retraining: lottery tickets and the Kronecker eigenbasis.

Sources: Frankle & Carbin (2019) as described by Ge (2025), 3.3.1; EigenDamage, Wang,
Grosse, Fidler & Zhang (2019), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.diagnostics.hessian.landscape import Curve, Metric, with_parameters
from ekfac.diagnostics.subnetworks.selection import Criterion, parameter_scores
from ekfac.matrices import BlockDiagonalMatrix, CurvatureMatrix
from ekfac.matrices.kronecker import KroneckerMatrix
from ekfac.spectral.operators import result
from ekfac.vectors import ParameterVector, named_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Literal["saliency", "curvature", "magnitude"]
Train = Callable[[nn.Module, Callable[[], None]], None]


# --------------------------------------------------------------------- lottery tickets


@result
class Tickets:
    """The rounds of iterative pruning.

    Attributes:
        kept: Share of the weights alive while training each round, ``[rounds]``.
        value: The metric after each round's training.
        masks: The weights alive in each round, flat ``[rounds, P]``.
    """

    kept: Tensor
    value: Tensor
    masks: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the metric over the share of weights alive; return the axes."""
        ax = axes_or_new(ax)
        ax.plot(self.kept.tolist(), self.value.tolist(), "o-")
        ax.set(xlabel="share of weights alive", ylabel="metric", xscale="log")
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        return ax


def lottery_tickets(
    model: nn.Module,
    train: Train,
    metric: Metric,
    *,
    rounds: int = 3,
    fraction: float = 0.6,
    criterion: Criterion = "magnitude",
    generator: torch.Generator | None = None,
) -> Tickets:
    """Train, prune, rewind the survivors to the start, and again (Ge 2025, 3.3.1).

    The model's parameters when this is called are the initial ones. It ends as the
    last round trained it.

    Args:
        model: The network at initialisation.
        train: ``train(model, mask)`` trains it; it must call ``mask()`` after every
            step, which zeroes the dead weights in place.
        metric: Of the model.
        rounds: Trainings, the first of them unpruned.
        fraction: Share of the weights alive that each pruning removes.
        criterion: ``"magnitude"``, ``"change"`` or, as a control, ``"random"``.
        generator: Of the random order.

    Raises:
        ValueError: If ``rounds`` or ``fraction`` is out of range.
    """
    if rounds < 1 or not 0 < fraction < 1:
        raise ValueError(
            f"rounds must be at least 1 and fraction between 0 and 1, got {rounds=}, "
            f"{fraction=}."
        )
    initial = ParameterVector.from_model(model)
    alive = torch.ones_like(initial.flat(), dtype=torch.bool)
    parameters = named_parameters(model)
    masks, values = [], []
    for number in range(rounds):
        if number:
            ranked = parameter_scores(
                ParameterVector.from_model(model), initial, criterion, generator
            )
            ranked = ranked.masked_fill(~alive, torch.inf)
            count = round(fraction * int(alive.sum()))
            alive = alive.clone()
            alive[ranked.argsort(stable=True)[:count]] = False
        by_name = initial.space.vector(alive)

        def mask(by_name: Mapping[str, Tensor] = by_name) -> None:
            with torch.no_grad():
                for name, keep in by_name.items():
                    parameters[name].mul_(keep)

        with torch.no_grad():
            for name, start in initial.items():
                parameters[name].copy_(start)
        mask()
        train(model, mask)
        masks.append(alive)
        values.append(metric(model))
    stacked = torch.stack(masks)
    return Tickets(
        stacked.double().mean(dim=1), torch.tensor(values, dtype=torch.float64), stacked
    )


# ------------------------------------------------------------- the Kronecker eigenbasis


class KroneckerBasis:
    """Weights as coordinates ``Q_G^T W Q_A`` in the layers' Kronecker eigenbases.

    Args:
        matrix: A ``"kfac"`` or ``"ekfac"`` matrix, of one layer or of several.

    Raises:
        TypeError: If a block is of another structure.
    """

    def __init__(self, matrix: CurvatureMatrix) -> None:
        blocks = (
            matrix.blocks if isinstance(matrix, BlockDiagonalMatrix) else {"": matrix}
        )
        self.blocks: dict[str, KroneckerMatrix] = {}
        for name, block in blocks.items():
            if not isinstance(block, KroneckerMatrix):
                raise TypeError(
                    f"Layer {name!r} has a {block.structure} block, which has no "
                    "Kronecker eigenbasis; estimate it with structure='kfac' or "
                    "'ekfac'."
                )
            self.blocks[name] = block

    def coordinates(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each layer's weights in its basis, ``[b, d_out, d_in]``."""
        found = {}
        for name, block in self.blocks.items():
            own = ParameterVector.of(weights, block.space.names)
            rows = {n: w.to(block.dtype).unsqueeze(0) for n, w in own.items()}
            found[name] = block.coordinates(rows)[0]
        return found

    def curvature(self) -> dict[str, Tensor]:
        """Return each layer's eigenvalues or scalings, ``[b, d_out, d_in]``."""
        return {name: block._values() for name, block in self.blocks.items()}

    def weights(
        self, coordinates: dict[str, Tensor], like: Mapping[str, Tensor]
    ) -> ParameterVector:
        """Return the parameters with these coordinates; others as in ``like``.

        Entries of a covered parameter that no block covers keep their values too.
        """
        result = {name: tensor.detach().clone() for name, tensor in like.items()}
        before = self.coordinates(like)
        for name, block in self.blocks.items():
            change = (coordinates[name] - before[name]).unsqueeze(0)
            for parameter, rows in block._vectors(change).items():
                result[parameter] += rows[0].to(result[parameter])
        return ParameterVector(result)

    def scores(
        self, weights: Mapping[str, Tensor], score: Score = "saliency"
    ) -> Tensor:
        """Return how much each coordinate counts, flat over the layers, ``[C]``.

        Args:
            weights: The trained parameters.
            score: ``"saliency"`` is ``s c^2 / 2``, by how much the loss rises without
                the coordinate if its quadratic model holds (Wang et al. 2019, eq. 9);
                ``"curvature"`` is ``s`` alone, ``"magnitude"`` is ``|c|``.
        """
        parts = []
        for name, c in self.coordinates(weights).items():
            s = self.blocks[name]._values()
            chosen = {"saliency": s * c**2 / 2, "curvature": s, "magnitude": c.abs()}
            if score not in chosen:
                raise ValueError(
                    f"score must be one of {sorted(chosen)}, got {score!r}."
                )
            parts.append(chosen[score].flatten())
        return torch.cat(parts)

    def kept(self, weights: Mapping[str, Tensor], mask: Tensor) -> ParameterVector:
        """Return the weights with the coordinates outside ``mask`` ``[C]`` zero."""
        coordinates, start = self.coordinates(weights), 0
        for name, c in coordinates.items():
            part = mask[start : start + c.numel()].to(c.device)
            coordinates[name] = c * part.view_as(c)
            start += c.numel()
        return self.weights(coordinates, weights)


@result
class EigenPruned:
    """Weights pruned in the Kronecker eigenbasis.

    Attributes:
        value: The parameters after pruning.
        kept: Share of the coordinates that are not zero.
        predicted_increase: Rise of the loss by the quadratic model,
            ``sum s c^2 / 2`` over what was pruned.
        ranks: Layer -> ``(d_out, d_in)`` left of its core, ``None`` without blocks of
            rows and columns.
    """

    value: ParameterVector
    kept: float
    predicted_increase: float
    ranks: dict[str, tuple[int, int]] | None = None


def eigen_pruned(
    weights: Mapping[str, Tensor],
    matrix: CurvatureMatrix,
    fraction: float,
    *,
    granularity: Literal["entry", "row_column"] = "entry",
    score: Score = "saliency",
) -> EigenPruned:
    """Return the weights with coordinates pruned by their saliency.

    In the eigenbasis the quadratic model of the loss is nearly diagonal, so what one
    coordinate costs hardly depends on the others: the assumption of optimal brain
    damage, met by rotation (Wang et al. 2019).

    Args:
        weights: The trained parameters.
        matrix: A ``"kfac"`` or ``"ekfac"`` matrix at them, Fisher or GGN.
        fraction: Share of coordinates (or of rows and columns) to prune, all layers
            ranked together.
        granularity: ``"entry"``, or ``"row_column"``: whole rows and columns of the
            cores, which leaves a layer as ``Q_G[:, r] C[r, c] Q_A[:, c]^T``, a
            bottleneck of smaller matrices (ibid., Algorithm 1).
        score: As for :meth:`KroneckerBasis.scores`.

    Raises:
        ValueError: If the fraction or the granularity is out of range.
        TypeError: If a layer has no Kronecker eigenbasis.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    if granularity not in ("entry", "row_column"):
        raise ValueError(
            f"granularity must be 'entry' or 'row_column', got {granularity!r}."
        )
    basis = KroneckerBasis(matrix)
    values = basis.scores(weights, score)
    ranks = None
    if granularity == "entry":
        mask = torch.ones_like(values, dtype=torch.bool)
        order = values.argsort(stable=True)
        mask[order[: round(fraction * len(values))]] = False
    else:
        mask, ranks = _rows_and_columns(basis, values, fraction)
    increase = float(basis.scores(weights, "saliency")[~mask].sum())
    share = float(mask.double().mean())
    return EigenPruned(basis.kept(weights, mask), share, increase, ranks)


def _rows_and_columns(
    basis: KroneckerBasis, values: Tensor, fraction: float
) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Return the mask of what is left, and the cores' sizes.

    Every layer keeps its best row and column, or it would cut the network.
    """
    sizes = {name: s.shape for name, s in basis.curvature().items()}
    parts = dict(
        zip(
            sizes,
            values.split([shape.numel() for shape in sizes.values()]),
            strict=True,
        )
    )
    lines = []
    for name, shape in sizes.items():
        score = parts[name].view(shape)
        lines += [score.sum(dim=2).flatten(), score.sum(dim=1).flatten()]
    ranked = torch.cat(lines)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    keep[ranked.argsort(stable=True)[: round(fraction * len(ranked))]] = False
    pieces = keep.split([len(line) for line in lines])
    masks, ranks = [], {}
    for i, (name, (b, d_out, d_in)) in enumerate(sizes.items()):
        rows, columns = pieces[2 * i].view(b, d_out), pieces[2 * i + 1].view(b, d_in)
        best_rows = lines[2 * i].view(b, d_out).argmax(dim=1, keepdim=True)
        best_columns = lines[2 * i + 1].view(b, d_in).argmax(dim=1, keepdim=True)
        rows = rows.scatter(1, best_rows, True)
        columns = columns.scatter(1, best_columns, True)
        masks.append((rows[:, :, None] & columns[:, None, :]).flatten())
        ranks[name] = (int(rows.sum()), int(columns.sum()))
    return torch.cat(masks), ranks


def kronecker_reconstruction(
    model: nn.Module,
    matrix: CurvatureMatrix,
    metric: Metric,
    fractions: Sequence[float],
    *,
    score: Score = "curvature",
    largest_first: bool = True,
) -> Curve:
    """Return a metric of the weights rebuilt in the Kronecker eigenbasis.

    As :func:`ekfac.diagnostics.cumulative_reconstruction`, with a basis that costs no
    eigenvectors of the Hessian.

    Args:
        model: The trained network.
        matrix: A ``"kfac"`` or ``"ekfac"`` matrix of it.
        metric: Of the model.
        fractions: Shares of all coordinates that are kept.
        score: What the coordinates are ordered by.
        largest_first: Whether those that count most are kept.
    """
    basis = KroneckerBasis(matrix)
    weights = ParameterVector.from_model(model, matrix.space.names)
    order = basis.scores(weights, score).argsort(descending=largest_first)
    values = []
    for fraction in fractions:
        mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        mask[order[: round(fraction * len(order))]] = True
        with with_parameters(model, basis.kept(weights, mask)):
            values.append(metric(model))
    return Curve(
        torch.tensor(fractions, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        "share of coordinates kept",
    )
