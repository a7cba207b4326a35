"""Penalties as plugins of Avalanche's strategies (``pip install avalanche-lib``).

Avalanche calls whatever methods a plugin has, so nothing of it is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader

from ekfac.continual.importance import MemoryAwareSynapses, SynapticIntelligence
from ekfac.continual.penalty import Penalty
from ekfac.continual.quadratic import QuadraticPenalty
from ekfac.curvature import Curvature

Source = Literal["data", "optimizer"]


class PenaltyPlugin:
    """Adds a penalty to the loss of a strategy and consolidates every experience.

    Heads that appear or grow are penalised from their first experience on. One plugin
    serves all experiences::

        plugin = PenaltyPlugin(lambda model: QuadraticPenalty(model, "ekfac", 3.0))
        strategy = Naive(model=model, optimizer=optimizer, plugins=[plugin])

    Args:
        make: Returns the penalty of a model, of any class of ``ekfac.continual``.
        source: What :class:`QuadraticPenalty` is consolidated from: the experience's
            ``"data"``, or the ``"optimizer"``, which must be of this package.
        **options: For ``consolidate``, such as ``likelihood`` or ``scalings``.

    Attributes:
        penalty: The penalty, once training has begun.

    Raises:
        ValueError: For another ``source``.
    """

    supports_distributed = False

    def __init__(
        self,
        make: Callable[[nn.Module], Penalty],
        source: Source = "data",
        **options: Any,
    ) -> None:
        if source not in get_args(Source):
            raise ValueError(
                f"source must be one of {get_args(Source)}, got {source!r}."
            )
        self.make, self.source, self.options = make, source, options
        self.penalty: Penalty | None = None
        self._path: AbstractContextManager[None] | None = None

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Make the penalty, or give it the strategy's present model."""
        if self.penalty is None:
            self.penalty = self.make(strategy.model)
        self.penalty.model = strategy.model

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the penalty to the loss."""
        assert self.penalty is not None
        strategy.loss = strategy.loss + self.penalty()

    def before_update(self, strategy: Any, **_: Any) -> None:
        """Follow the step, for synaptic intelligence."""
        if isinstance(self.penalty, SynapticIntelligence):
            self._path = self.penalty.path()
            self._path.__enter__()

    def after_update(self, strategy: Any, **_: Any) -> None:
        """End following the step."""
        if self._path is not None:
            self._path.__exit__(None, None, None)
            self._path = None

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Consolidate the experience.

        Raises:
            TypeError: With ``source="optimizer"``, if that is none of this package.
        """
        penalty = self.penalty
        if isinstance(penalty, SynapticIntelligence):
            penalty.consolidate(**self.options)
        elif isinstance(penalty, QuadraticPenalty) and self.source == "optimizer":
            curvature = getattr(strategy.optimizer, "curvature", None)
            if not isinstance(curvature, Curvature):
                raise TypeError(
                    "source='optimizer' needs an optimizer of ekfac, got "
                    f"{type(strategy.optimizer).__name__}; use source='data'."
                )
            size = len(strategy.experience.dataset)
            penalty.consolidate(curvature, num_examples=size, **self.options)
        elif isinstance(penalty, (QuadraticPenalty, MemoryAwareSynapses)):
            penalty.consolidate(ExperienceData(strategy), **self.options)


class ExperienceData:
    """A strategy's present experience as batches: ``(x, y)`` or ``((x, task), y)``."""

    def __init__(self, strategy: Any) -> None:
        dataset = strategy.experience.dataset
        # With the transformations of evaluation: no random crops.
        self.dataset = dataset.eval() if hasattr(dataset, "eval") else dataset
        self.loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=strategy.train_mb_size,
            collate_fn=getattr(dataset, "collate_fn", None),
        )
        self.labelled = any(
            cls.__name__ == "MultiTaskModule"
            for module in strategy.model.modules()
            for cls in type(module).__mro__
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        for x, y, *rest in self.loader:
            yield ((x, rest[-1]) if self.labelled else x), y
