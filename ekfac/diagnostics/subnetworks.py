"""Subnetworks: which parameters a trained network needs, and pruning.

Sources: Ge (2025), chapter 3 and appendix A.1; the layer-wise experiments after Zhang,
Bengio & Singer (2022); lottery tickets of Frankle & Carbin (2019) as Ge describes them,
3.3.1; the Kronecker eigenbasis of EigenDamage, Wang, Grosse, Fidler & Zhang (2019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.diagnostics.hessian.eigenvectors import layer_groups
from ekfac.diagnostics.hessian.landscape import Curve, Metric, with_parameters
from ekfac.estimate.data import choose
from ekfac.matrices import BlockDiagonalMatrix, CurvatureMatrix
from ekfac.matrices.kronecker import KroneckerMatrix
from ekfac.spectral.operators import few_samples, result
from ekfac.vectors import ParameterVector, named_parameters, standard_normal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Criterion = Literal["magnitude", "change", "random"]
Operation = Literal["prune", "reinitialise"]


# ------------------------------------------------------------------------ whole layers


@result
class LayerRobustness:
    """A metric with one layer at a time replaced.

    Attributes:
        names: The layers.
        value: The metric with each layer replaced, ``[layers]``, a mean over draws.
        standard_error: Over draws, zero for what is no draw; nan for a single one.
        baseline: The metric of the trained network.
    """

    names: tuple[str, ...]
    value: Tensor
    standard_error: Tensor
    baseline: float

    @property
    def drop(self) -> Tensor:
        """What each layer costs, ``[layers]``."""
        return self.baseline - self.value

    def critical(self, threshold: float) -> tuple[str, ...]:
        """Return the layers that cost more than ``threshold``."""
        costs = zip(self.names, self.drop.tolist(), strict=True)
        return tuple(name for name, cost in costs if cost > threshold)

    def asymmetry(self) -> float:
        """Return the share of the costliest layer in all costs.

        Layers are alike at initialisation; after training one may carry the network.
        ``1 / layers`` where all cost the same, one where a single layer does. The
        document (Ge 2025, 3.1) has the costs alone and no such number.
        """
        costs = self.drop.clamp_min(0)
        cost_sum = float(costs.sum())
        return float(costs.max()) / cost_sum if cost_sum > 0 else 1 / len(self.names)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw bars by layer beside the trained network's level; return the axes."""
        ax = axes_or_new(ax)
        errors = self.standard_error.tolist()
        ax.bar(self.names, self.value.tolist(), yerr=errors, color="tab:blue")
        ax.axhline(self.baseline, color="0.4", ls="--", label="trained")
        ax.set(ylabel="metric", xlabel="replaced layer")
        ax.legend(loc="lower right")
        return ax


def layer_reinitialisation(
    model: nn.Module,
    initial: Mapping[str, Tensor],
    metric: Metric,
    layers: Iterable[str] | None = None,
) -> LayerRobustness:
    """Return the metric with each layer back at its initial values (Ge 2025, 3.1).

    Args:
        model: The trained network.
        initial: Its parameters at initialisation, by name.
        metric: Of the model.
        layers: Names of layers. Default: all with trained parameters.
    """
    groups = layer_groups(choose(model, layers), model)
    values = []
    for names in groups.values():
        with with_parameters(model, {name: initial[name] for name in names}):
            values.append(metric(model))
    costs = torch.tensor(values, dtype=torch.float64)
    return LayerRobustness(tuple(groups), costs, torch.zeros_like(costs), metric(model))


def layer_rerandomisation(
    model: nn.Module,
    factory: Callable[[], nn.Module],
    metric: Metric,
    layers: Iterable[str] | None = None,
    *,
    draws: int = 3,
    generator: torch.Generator | None = None,
) -> LayerRobustness:
    """Return the metric with each layer drawn anew from its initial distribution.

    Args:
        model: The trained network.
        factory: Makes a freshly initialised network of the same architecture. Torch's
            global generator is seeded around it and left as it was.
        metric: Of the model.
        layers: Names of layers. Default: all with trained parameters.
        draws: Fresh networks to average over.
        generator: Source of the seeds.
    """
    groups = layer_groups(choose(model, layers), model)
    values = torch.zeros(draws, len(groups), dtype=torch.float64)
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            fresh = named_parameters(factory())
        for column, names in enumerate(groups.values()):
            with with_parameters(model, {name: fresh[name] for name in names}):
                values[draw, column] = metric(model)
    error = torch.full_like(values[0], float("nan"))
    if draws > 1:
        error = values.std(dim=0) / sqrt(draws) * few_samples(draws)
    return LayerRobustness(tuple(groups), values.mean(dim=0), error, metric(model))


# ------------------------------------------------------------------- single parameters


def threshold_reinitialised(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    low: float,
    high: float,
) -> ParameterVector:
    """Return the weights with ``low <= |change| <= high`` set back (Algorithm 1).

    Both ends count, so that ``low = high = 0`` changes nothing.
    """
    weights, initial = _both(weights, initial)
    change = (weights - initial).map(torch.abs)
    return ParameterVector(
        {
            name: torch.where((c >= low) & (c <= high), initial[name], weights[name])
            for name, c in change.items()
        }
    )


@result
class ThresholdCurve(Curve):
    """A metric over the threshold up to which changes are undone.

    Attributes:
        share: Share of the parameters that are undone at each threshold, ``[m]``.
    """

    share: Tensor


def threshold_curve(
    model: nn.Module,
    initial: Mapping[str, Tensor],
    metric: Metric,
    thresholds: Sequence[float],
    parameters: Iterable[str] | None = None,
) -> ThresholdCurve:
    """Return the metric with all changes up to each threshold undone (Ge 2025, 3.2).

    Args:
        model: The trained network.
        initial: Its parameters at initialisation.
        metric: Of the model.
        thresholds: Upper ends; the lower one is zero.
        parameters: Names of layers or parameters. Default: the whole model.
    """
    names = list(choose(model, parameters))
    weights = ParameterVector.from_model(model, names)
    start = ParameterVector.of(initial, names)
    change = (weights - start).flat().abs()
    values, shares = [], []
    for high in thresholds:
        undone = threshold_reinitialised(weights, start, 0.0, high)
        with with_parameters(model, undone):
            values.append(metric(model))
        shares.append(float((change <= high).double().mean()))
    return ThresholdCurve(
        torch.tensor(thresholds, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        "largest undone change",
        torch.tensor(shares, dtype=torch.float64),
    )


def parameter_scores(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    criterion: Criterion,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return how much each parameter counts, flat ``[P]``.

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
        criterion: ``"magnitude"`` of the trained value, ``"change"`` from the initial
            one, or ``"random"``.
        generator: Of the random order.
    """
    weights, initial = _both(weights, initial)
    if criterion == "magnitude":
        return weights.flat().abs()
    if criterion == "change":
        return (weights - initial).flat().abs()
    if criterion == "random":
        like = weights.flat()
        return standard_normal(
            like.shape, generator=generator, dtype=like.dtype, device=like.device
        )
    raise ValueError(
        f"criterion must be 'magnitude', 'change' or 'random', got {criterion!r}."
    )


def select_parameters(
    values: Tensor, fraction: float, *, largest_first: bool = False
) -> Tensor:
    """Return a mask ``[P]`` of the ``round(fraction P)`` lowest scores.

    By rank, so that equal scores do not change the number.

    Args:
        values: Scores ``[P]``.
        fraction: Between zero and one.
        largest_first: Take the highest instead.

    Raises:
        ValueError: If the fraction is out of range.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}.")
    order = values.argsort(descending=largest_first, stable=True)
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[order[: round(fraction * len(values))]] = True
    return mask


def replaced_parameters(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    mask: Tensor,
    operation: Operation,
) -> ParameterVector:
    """Return the weights with those of the mask pruned or at initialisation.

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
        mask: ``[P]``, which to replace.
        operation: ``"prune"`` sets them to zero, ``"reinitialise"`` to ``initial``.
    """
    if operation not in ("prune", "reinitialise"):
        raise ValueError(
            f"operation must be 'prune' or 'reinitialise', got {operation!r}."
        )
    weights, initial = _both(weights, initial)
    masks = weights.space.vector(mask)
    return ParameterVector(
        {
            name: torch.where(
                masks[name],
                torch.zeros_like(w) if operation == "prune" else initial[name].to(w),
                w,
            )
            for name, w in weights.items()
        }
    )


def removal_curve(
    model: nn.Module,
    initial: Mapping[str, Tensor],
    metric: Metric,
    fractions: Sequence[float],
    *,
    criterion: Criterion = "change",
    operation: Operation = "reinitialise",
    largest_first: bool = False,
    generator: torch.Generator | None = None,
) -> Curve:
    """Return the metric with a growing share of the parameters replaced (Ge, 3.3.2).

    The ranking is global, over all trained parameters of the model.

    Args:
        model: The trained network.
        initial: Its parameters at initialisation.
        metric: Of the model.
        fractions: Shares to replace.
        criterion: As for :func:`parameter_scores`.
        operation: As for :func:`replaced_parameters`.
        largest_first: Replace what counts most first.
        generator: Of the random order.
    """
    weights = ParameterVector.from_model(model)
    ranked = parameter_scores(weights, initial, criterion, generator)
    values = []
    for fraction in fractions:
        mask = select_parameters(ranked, fraction, largest_first=largest_first)
        with with_parameters(
            model, replaced_parameters(weights, initial, mask, operation)
        ):
            values.append(metric(model))
    return Curve(
        torch.tensor(fractions, dtype=torch.float64),
        torch.tensor(values, dtype=torch.float64),
        f"{criterion}, {operation}: share replaced",
    )


@result
class SelectionOverlap:
    """How much two selections of equal size have in common (Ge 2025, eq. 3.1).

    Attributes:
        value: ``|S_1 and S_2| / |S_1|``.
        null: Its expectation for independent selections, their share ``p``.
        standard_error: Its standard deviation for independent selections,
            hypergeometric: ``(1 - p) / sqrt(P - 1)``.
    """

    value: float
    null: float
    standard_error: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the overlap beside that of independent selections; return the axes."""
        ax = axes_or_new(ax)
        names, heights = ["measured", "independent"], [self.value, self.null]
        ax.bar(names, heights, yerr=[0, self.standard_error], color=["C0", "0.7"])
        ax.set(ylabel="common share of the selections", ylim=(0, 1))
        return ax

    @property
    def deviations(self) -> float:
        """How many standard deviations the value is above independence."""
        if self.standard_error == 0:
            return 0.0
        return (self.value - self.null) / self.standard_error


def selection_overlap(first: Tensor, second: Tensor) -> SelectionOverlap:
    """Return the overlap of two masks ``[P]`` of equal, positive size.

    Raises:
        ValueError: If the sizes differ or are zero.
    """
    size, other = int(first.sum()), int(second.sum())
    if size != other or size == 0:
        raise ValueError(
            f"The selections have {size} and {other} members; compare two of one "
            "positive size."
        )
    count = len(first)
    share = size / count
    return SelectionOverlap(
        int((first & second).sum()) / size, share, (1 - share) / sqrt(max(count - 1, 1))
    )


@result
class WeightChange:
    """How a layer's weights moved (Ge 2025, Table A.1).

    Attributes:
        initial_mean: Mean before training.
        initial_deviation: Standard deviation before.
        final_mean: Mean after.
        final_deviation: Standard deviation after.
        correlation: Pearson's, between before and after; NaN where one is constant.
        change_deviation: Standard deviation of the change.
    """

    initial_mean: float
    initial_deviation: float
    final_mean: float
    final_deviation: float
    correlation: float
    change_deviation: float


class WeightChanges(dict[str, WeightChange]):
    """The changes of a network's weights, by parameter."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the spreads before, after and of the change; return the axes."""
        ax = axes_or_new(ax)
        places = torch.arange(len(self))
        for i, name in enumerate(
            ("initial_deviation", "final_deviation", "change_deviation")
        ):
            heights = [getattr(change, name) for change in self.values()]
            label = name.replace("_", " ")
            ax.bar((places + 0.27 * (i - 1)).tolist(), heights, 0.27, label=label)
        ax.set_xticks(places.tolist(), list(self), rotation=45, ha="right")
        ax.set(ylabel="standard deviation")
        ax.legend(fontsize="small")
        return ax


def weight_changes(
    weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> WeightChanges:
    """Return the statistics of every parameter, by name."""
    weights, initial = _both(weights, initial)
    changes = WeightChanges()
    for name, after in weights.items():
        w, w0 = after.double().flatten(), initial[name].double().flatten()
        both = torch.stack([w0 - w0.mean(), w - w.mean()])
        norms = torch.linalg.vector_norm(both, dim=1)
        deviations = norms / sqrt(len(w))
        changes[name] = WeightChange(
            float(w0.mean()),
            float(deviations[0]),
            float(w.mean()),
            float(deviations[1]),
            float(both[0] @ both[1] / norms.prod()),
            float((both[1] - both[0]).square().mean().sqrt()),
        )
    return changes


def change_histogram(
    weights: Mapping[str, Tensor], initial: Mapping[str, Tensor], width: float = 0.008
) -> Tensor:
    """Return the share of parameters by ``|change|``, in bins of ``width`` (Table A.2).

    The bins run up to the largest change; the shares sum to one.
    """
    weights, initial = _both(weights, initial)
    change = (weights - initial).flat().abs().double()
    bins = (change / width).long()
    return torch.bincount(bins).double() / len(change)


def _both(
    weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> tuple[ParameterVector, ParameterVector]:
    """Return two mappings as vectors over the names of the first."""
    first = ParameterVector.of(weights)
    return first, ParameterVector.of(initial, first)


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
        coordinates = {}
        for name, block in self.blocks.items():
            own = ParameterVector.of(weights, block.space.names)
            rows = {n: w.to(block.dtype).unsqueeze(0) for n, w in own.items()}
            coordinates[name] = block.coordinates(rows)[0]
        return coordinates

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
            scores = {"saliency": s * c**2 / 2, "curvature": s, "magnitude": c.abs()}
            if score not in scores:
                raise ValueError(
                    f"score must be one of {sorted(scores)}, got {score!r}."
                )
            parts.append(scores[score].flatten())
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
