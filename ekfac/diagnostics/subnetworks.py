"""Subnetworks: the parameters that a trained network needs, and pruning.

Sources: Ge (2025), chapter 3 and appendix A.1; the layer-wise experiments after Zhang,
Bengio & Singer (2022); lottery tickets of Frankle & Carbin (2019) as Ge describes them,
3.3.1. Pruning in the Kronecker eigenbasis is in :mod:`.eigen_pruning`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.hessian.eigenvectors import layer_groups
from ekfac.diagnostics.hessian.landscape import Curve, Metric, metric_at
from ekfac.estimate.data import choose
from ekfac.progress import shown
from ekfac.spectral.operators import few_samples, result
from ekfac.vectors import ParameterVector, named_parameters, standard_normal

Criterion = Literal["magnitude", "change", "random"]
Operation = Literal["prune", "reinitialise"]


# ------------------------------------------------------------------------ whole layers


@result
class LayerRobustness:
    """A metric with one layer at a time replaced.

    Attributes:
        names: The layers.
        value: The metric with each layer replaced, ``[layers]``, a mean over draws.
        standard_error: Over draws; zero for initial values, nan for a single draw.
        baseline: The metric of the trained network.
    """

    names: tuple[str, ...]
    value: Tensor
    standard_error: Tensor
    baseline: float

    @property
    def drop(self) -> Tensor:
        """Fall of the metric by each layer's replacement, ``[layers]``."""
        return self.baseline - self.value

    def critical(self, threshold: float) -> tuple[str, ...]:
        """Return the layers whose drop is larger than ``threshold``."""
        drops = zip(self.names, self.drop.tolist(), strict=True)
        return tuple(name for name, drop in drops if drop > threshold)

    def asymmetry(self) -> float:
        """Return the share of the largest drop in the sum of all.

        ``1 / layers`` where all drops are equal, one where a single layer has them all.
        Ge (2025, 3.1) gives the drops alone and no such number.
        """
        drops = self.drop.clamp_min(0)
        drop_sum = float(drops.sum())
        return float(drops.max()) / drop_sum if drop_sum > 0 else 1 / len(self.names)

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
    *,
    progress: bool = False,
) -> LayerRobustness:
    """Return the metric with each layer back at its initial values (Ge 2025, 3.1).

    Args:
        model: The trained network.
        initial: Its parameters at initialisation, by name.
        metric: Of the model.
        layers: Names of layers. Default: all with trained parameters.
        progress: Whether to show a bar, if tqdm is installed.
    """
    groups = layer_groups(choose(model, layers), model)
    replaced = ({name: initial[name] for name in names} for names in groups.values())
    value = metric_at(model, metric, replaced, len(groups), progress=progress)
    return LayerRobustness(tuple(groups), value, torch.zeros_like(value), metric(model))


def layer_rerandomisation(
    model: nn.Module,
    factory: Callable[[], nn.Module],
    metric: Metric,
    layers: Iterable[str] | None = None,
    *,
    draws: int = 3,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> LayerRobustness:
    """Return the metric with each layer drawn anew from its initial distribution.

    Args:
        model: The trained network.
        factory: Makes a freshly initialised network of the same architecture. Torch's
            global generators are seeded for it and left as they were.
        metric: Of the model.
        layers: Names of layers. Default: all with trained parameters.
        draws: Number of fresh networks to average over.
        generator: Source of the seeds.
        progress: Whether to show a bar, if tqdm is installed.
    """
    groups = layer_groups(choose(model, layers), model)
    values = torch.zeros(draws, len(groups), dtype=torch.float64)
    devices = list(range(torch.cuda.device_count()))
    for draw in range(draws):
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            fresh = named_parameters(factory())
        replaced = ({name: fresh[name] for name in names} for names in groups.values())
        values[draw] = metric_at(
            model, metric, replaced, len(groups), progress=progress
        )
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

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
        low: Smallest change that is set back.
        high: Largest change that is set back. ``low = high = 0`` changes nothing.
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
    """A metric as a function of the threshold up to which changes are undone.

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
    *,
    progress: bool = False,
) -> ThresholdCurve:
    """Return the metric with all changes up to each threshold undone (Ge 2025, 3.2).

    Args:
        model: The trained network.
        initial: Its parameters at initialisation.
        metric: Of the model.
        thresholds: Upper ends; the lower one is zero.
        parameters: Names of layers or parameters. Default: the whole model.
        progress: Whether to show a bar, if tqdm is installed.
    """
    names = list(choose(model, parameters))
    weights = ParameterVector.from_model(model, names)
    start = ParameterVector.of(initial, names)
    change = (weights - start).flat().abs()
    undone = (threshold_reinitialised(weights, start, 0.0, t) for t in thresholds)
    return ThresholdCurve(
        torch.tensor(thresholds, dtype=torch.float64),
        metric_at(model, metric, undone, len(thresholds), progress=progress),
        "largest undone change",
        torch.stack([(change <= t).double().mean().cpu() for t in thresholds]),
    )


def parameter_scores(
    weights: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    criterion: Criterion,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the score of each parameter, flat ``[P]``.

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
        criterion: ``"magnitude"`` of the trained value, ``"change"`` from the initial
            one, or ``"random"``.
        generator: Source of the random order.

    Raises:
        ValueError: For another ``criterion``.
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

    By rank, so equal scores do not change the number.

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
    """Return the weights with those in a mask pruned or reset to initialisation.

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
        mask: ``[P]``, true for the parameters to replace.
        operation: ``"prune"`` sets them to zero, ``"reinitialise"`` to ``initial``.

    Raises:
        ValueError: For another ``operation``.
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
    progress: bool = False,
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
        largest_first: Replace the highest scores first.
        generator: Source of the random order.
        progress: Whether to show a bar, if tqdm is installed.
    """
    weights = ParameterVector.from_model(model)
    ranked = parameter_scores(weights, initial, criterion, generator)
    masks = (
        select_parameters(ranked, fraction, largest_first=largest_first)
        for fraction in fractions
    )
    replaced = (replaced_parameters(weights, initial, m, operation) for m in masks)
    values = metric_at(model, metric, replaced, len(fractions), progress=progress)
    label = f"{criterion}, {operation}: share replaced"
    return Curve(torch.tensor(fractions, dtype=torch.float64), values, label)


@result
class SelectionOverlap:
    """The overlap of two selections of equal size (Ge 2025, eq. 3.1).

    Attributes:
        value: ``|S_1 and S_2| / |S_1|``.
        null: The expected value for independent selections, their share ``p``.
        standard_error: The standard deviation for independent selections,
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
        """Distance of the value from ``null``, in standard deviations."""
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
    """The change of a parameter in training (Ge 2025, Table A.1).

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
        ticks = torch.arange(len(self))
        for i, kind in enumerate(("initial", "final", "change")):
            heights = [getattr(change, f"{kind}_deviation") for change in self.values()]
            x, label = (ticks + 0.27 * (i - 1)).tolist(), f"{kind} deviation"
            ax.bar(x, heights, 0.27, label=label)
        ax.set_xticks(ticks.tolist(), list(self), rotation=45, ha="right")
        ax.set(ylabel="standard deviation")
        ax.legend(fontsize="small")
        return ax


def weight_changes(
    weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]
) -> WeightChanges:
    """Return the statistics of every parameter's change, by name (Ge 2025, Table A.1).

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
    """
    weights, initial = _both(weights, initial)
    changes = WeightChanges()
    for name, after in weights.items():
        w, w0 = after.double().flatten(), initial[name].double().flatten()
        centred = torch.stack([w0 - w0.mean(), w - w.mean()])
        norms = torch.linalg.vector_norm(centred, dim=1)
        deviations = norms / sqrt(len(w))
        changes[name] = WeightChange(
            float(w0.mean()),
            float(deviations[0]),
            float(w.mean()),
            float(deviations[1]),
            float(centred[0] @ centred[1] / norms.prod()),
            float((centred[1] - centred[0]).square().mean().sqrt()),
        )
    return changes


def change_histogram(
    weights: Mapping[str, Tensor], initial: Mapping[str, Tensor], width: float = 0.008
) -> Tensor:
    """Return the share of parameters by ``|change|``, in bins (Ge 2025, Table A.2).

    Args:
        weights: Trained parameters.
        initial: The same at initialisation.
        width: Width of a bin, in units of the parameters.

    Returns:
        ``[bins]``, up to the largest change; the shares sum to one.

    Raises:
        ValueError: If the width is not positive.
    """
    if not width > 0:
        raise ValueError(f"Invalid width: {width!r}; it must be > 0.")
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


# --------------------------------------------------------------------- lottery tickets

Train = Callable[[nn.Module, Callable[[], None]], None]


@result
class Tickets:
    """Rounds of iterative pruning.

    Attributes:
        kept: Share of the weights alive in each round, ``[rounds]``.
        value: The metric after each round's training, ``[rounds]``.
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
    progress: bool = False,
) -> Tickets:
    """Train, prune, rewind the survivors to the start, and again (Ge 2025, 3.3.1).

    The model's parameters at the call are the initial ones. It ends with those of the
    last round.

    Args:
        model: The network at initialisation.
        train: ``train(model, mask)`` trains it; it must call ``mask()`` after every
            step, which zeroes the dead weights in place.
        metric: Of the model.
        rounds: Number of trainings, the first of them unpruned.
        fraction: Share of the weights alive that each pruning removes.
        criterion: As for :func:`parameter_scores`; ``"random"`` is the control.
        generator: Source of the random order.
        progress: Whether to show a bar over the rounds, if tqdm is installed.

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
    for number in shown(range(rounds), "trainings", progress=progress):
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
