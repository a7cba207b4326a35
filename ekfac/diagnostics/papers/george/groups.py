"""Groups of easy and difficult examples, compared at equal loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.estimate.data import choose, moved, outputs_of, prepared
from ekfac.spectral.operators import result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Fit = Callable[[Tensor], Tensor]
# Examples of one forward pass.
BATCH = 1000


def consistency_scores(
    fit: Fit,
    num_examples: int,
    sizes: Sequence[int],
    *,
    repeats: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return each example's chance ``[n]`` to be learned from the others.

    The C-score (Jiang et al. 2021; George 2023, section 5.3.2): the mean, over random
    training sets of each size that do not contain the example, of whether the trained
    network gets it right, averaged over the sizes. nan for an example that was in every
    training set; more repeats make that rare.

    Args:
        fit: Trains on the examples of the given indices ``[k]`` and returns, for all
            ``n``, whether the prediction is right (or its probability).
        num_examples: ``n``.
        sizes: ``k``, each between 1 and ``n - 1``.
        repeats: Training sets per size.
        generator: Source of the training sets.

    Raises:
        ValueError: If a size is out of range.
    """
    wrong = [size for size in sizes if not 0 < size < num_examples]
    if wrong or not sizes:
        raise ValueError(
            f"Every size must be between 1 and {num_examples - 1}, got {list(sizes)}."
        )
    scores = []
    for size in sizes:
        total, count = torch.zeros(num_examples), torch.zeros(num_examples)
        for _ in range(repeats):
            order = torch.randperm(num_examples, generator=generator)
            left = order[size:]
            total[left] += fit(order[:size]).to(total)[left]
            count[left] += 1
        scores.append(total / count)
    return torch.stack(scores).nanmean(dim=0)


def difficulty_groups(scores: Tensor, count: int = 10) -> dict[str, Tensor]:
    """Return ``count`` groups of nearly equal size, the most difficult first.

    Args:
        scores: ``[n]``, high for easy examples.
        count: 10 for the deciles of George 2023, section 5.3.2.1.

    Returns:
        ``"1/10"``, ... -> indices.

    Raises:
        ValueError: If there are fewer examples than groups, or a score is nan.

    Example:
        >>> difficulty_groups(torch.tensor([0.9, 0.1, 0.8, 0.2]), 2)
        {'1/2': tensor([1, 3]), '2/2': tensor([2, 0])}
    """
    if not 0 < count <= len(scores) or bool(scores.isnan().any()):
        raise ValueError(
            f"{count} groups need as many examples with a score, got {len(scores)}, "
            f"{int(scores.isnan().sum())} of them nan."
        )
    parts = scores.argsort(stable=True).tensor_split(count)
    return {f"{i}/{count}": part for i, part in enumerate(parts, 1)}


def example_losses(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the loss ``[n]`` of every example, in eval mode.

    Args:
        model: Left as it was.
        x: Inputs ``[n, ...]``.
        y: Targets ``[n, ...]``.
        loss_fn: ``(outputs, targets) -> [k]``, such as
            ``partial(cross_entropy, reduction="none")``.

    Raises:
        ValueError: If the loss is not one number for each example.
    """
    parameters = choose(model, None)
    device = next(iter(parameters.values())).device
    found = []
    with prepared(model, ()):
        for inputs, targets in zip(x.split(BATCH), y.split(BATCH), strict=True):
            outputs = outputs_of(model, moved(inputs, device)).detach()
            losses = loss_fn(outputs, moved(targets, device)).detach().cpu()
            if losses.shape != (len(inputs),):
                raise ValueError(
                    f"loss_fn must return one loss for each of {len(inputs)} examples, "
                    f"got {list(losses.shape)}; use reduction='none'."
                )
            found.append(losses)
    return torch.cat(found)


@result
class GroupCurves:
    """Loss of groups of examples over training, and what progress is measured by.

    Attributes:
        steps: ``[T]``.
        progress: ``[T]``, the loss that says how far training is.
        losses: Name of the group -> its mean loss ``[T]``.
    """

    steps: Tensor
    progress: Tensor
    losses: dict[str, Tensor]

    def at(self, level: float) -> dict[str, float]:
        """Return every group's loss when ``progress`` first falls to ``level``.

        Between two records it is interpolated; nan if the level is not reached, or
        the first record is below it.
        """
        below = (self.progress <= level).nonzero()
        first = int(below[0]) if len(below) else 0
        if first == 0:
            exact = len(below) > 0 and float(self.progress[0]) == level
            return {n: float(v[0]) if exact else float("nan") for n, v in self._items()}
        high, low = self.progress[first - 1], self.progress[first]
        weight = (high - level) / (high - low)
        return {n: float(v[first - 1].lerp(v[first], weight)) for n, v in self._items()}

    def _items(self) -> list[tuple[str, Tensor]]:
        return list(self.losses.items())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the groups' losses against progress; return the axes."""
        ax = axes_or_new(ax)
        for name, values in self.losses.items():
            ax.plot(self.progress.tolist(), values.tolist(), label=name)
        ax.invert_xaxis()
        ax.set(xlabel="loss that measures progress", ylabel="loss of the group")
        ax.legend(fontsize="small")
        return ax


class GroupRecorder:
    """Collects :class:`GroupCurves` while training.

    Args:
        groups: Name -> indices into the examples.
        reference: The group whose mean loss is the progress: the clean examples, say.
            Default: the mean of all examples.

    Raises:
        ValueError: If a group is empty or the reference is none of them.
    """

    def __init__(
        self, groups: Mapping[str, Tensor], *, reference: str | None = None
    ) -> None:
        empty = [name for name, chosen in groups.items() if not len(chosen)]
        if empty or not groups:
            raise ValueError(f"Groups need examples; without any: {empty or 'all'}.")
        if reference is not None and reference not in groups:
            raise ValueError(
                f"reference must be None or one of {list(groups)}, got {reference!r}."
            )
        self.groups, self.reference = dict(groups), reference
        self._steps: list[int] = []
        self._progress: list[float] = []
        self._losses: dict[str, list[float]] = {name: [] for name in groups}

    def record(self, step: int, losses: Tensor) -> None:
        """Add the losses ``[n]`` of all examples, see :func:`example_losses`."""
        means = {n: float(losses[c].mean()) for n, c in self.groups.items()}
        self._steps.append(step)
        own = self.reference
        self._progress.append(float(losses.mean()) if own is None else means[own])
        for name, mean in means.items():
            self._losses[name].append(mean)

    def curves(self) -> GroupCurves:
        """Return what was recorded."""
        return GroupCurves(
            torch.tensor(self._steps),
            torch.tensor(self._progress, dtype=torch.float64),
            {n: torch.tensor(v, dtype=torch.float64) for n, v in self._losses.items()},
        )


@result
class EqualLoss:
    """Two runs compared where they are equally far (George 2023, section 5.3.1).

    Attributes:
        levels: Losses at which they are compared, ``[k]``.
        first: Group -> its losses in the first run, ``[k]``; nan where not reached.
        second: Likewise, in the second run.
        difference: Group -> first minus second.
    """

    levels: Tensor
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    difference: dict[str, Tensor]

    def __str__(self) -> str:
        width = max(len(name) for name in self.difference)
        lines = ["group".ljust(width) + "".join(f"{v:>9.3g}" for v in self.levels)]
        lines += [
            name.ljust(width) + "".join(f"{float(v):>+9.3f}" for v in values)
            for name, values in self.difference.items()
        ]
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the differences against the level; return the axes."""
        ax = axes_or_new(ax)
        for name, values in self.difference.items():
            ax.plot(self.levels.tolist(), values.tolist(), "o-", label=name, ms=3)
        ax.axhline(0, color="black", lw=0.8)
        ax.invert_xaxis()
        ax.set(xlabel="loss that measures progress", ylabel="difference of the loss")
        ax.legend(fontsize="small")
        return ax


def compare_at_equal_loss(
    first: GroupCurves, second: GroupCurves, levels: Sequence[float]
) -> EqualLoss:
    """Return the groups' losses in two runs at equal progress.

    Args:
        first: One run, say the network's.
        second: Another with the same groups, say its linearisation's.
        levels: Values of ``progress``.

    Raises:
        ValueError: If the groups differ.
    """
    if set(first.losses) != set(second.losses):
        raise ValueError(
            f"Both runs need the same groups, got {sorted(first.losses)} and "
            f"{sorted(second.losses)}."
        )
    a, b = (
        {n: torch.tensor([found[n] for found in runs]) for n in first.losses}
        for runs in ([run.at(v) for v in levels] for run in (first, second))
    )
    return EqualLoss(
        torch.tensor(levels), a, b, {name: a[name] - b[name] for name in a}
    )
