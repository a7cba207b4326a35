"""How many examples a window of backward passes had, and the scale of its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ekfac.curvature.distributed import Ranks
from ekfac.curvature.state import LayerCurvature
from ekfac.curvature.statistics import BatchStatistics

if TYPE_CHECKING:
    from ekfac.curvature.meeting import Meeting
    from ekfac.curvature.plan import Recipe


class Window:
    """What was counted since the last step; a base of the collector.

    Attributes:
        recipe: How statistics are taken.
        ranks: The processes that train together, or ``None`` for this one alone.
        meeting: What is known of the other ranks, at the step.
        statistics: The layers' sums.
        examples: How many examples there were, where the model's output was seen.
        terms: How many terms their loss has.
    """

    recipe: Recipe
    ranks: Ranks | None
    meeting: Meeting | None
    statistics: dict[str, BatchStatistics]
    examples: Tensor | None
    terms: Tensor | None

    def window(self) -> tuple[Tensor, Tensor] | None:
        """Return the numbers of examples and of loss terms, or ``None`` if unknown.

        Where no output of the model was seen, examples are counted by the layers.
        """
        if self.examples is not None and self.terms is not None:
            return self.examples, self.terms
        counted = max((s.examples for s in self.statistics.values()), default=0)
        if not counted:
            return None
        layer = next(iter(self.statistics.values())).layer
        examples = layer.averages["A"].weight.new_full((), counted)
        return examples, examples

    def counts(self, layer: LayerCurvature) -> tuple[Tensor, Tensor]:
        """Return the numbers of examples and of loss terms of the window.

        Where no output of the model was seen, examples are counted by the layer.
        """
        examples, terms, like = self.examples, self.terms, layer.averages["A"].weight
        if examples is None or terms is None:
            found = self.statistics.get(layer.name)
            counted = 1 if found is None else found.examples
            examples = terms = like.new_full((), counted)
        return examples.to(like).clamp(min=1), terms.to(like).clamp(min=1)

    def mean_scale(self, layer: LayerCurvature) -> tuple[Tensor, Tensor]:
        """Return examples, and the factor from ``.grad`` to their losses' sum.

        The user's loss is ``1/T`` or 1 times the sum of ``T`` loss terms. Where ranks
        took means over unequal numbers of them, their average is no multiple of the
        sum; the factor is then such that the scaled gradient's variance is the sum's.
        """
        examples, terms = self.counts(layer)
        summed, met = self.recipe.reduction == "sum", self.meeting
        if self.ranks is None or met is None:
            return examples, torch.ones_like(terms) if summed else terms
        if summed:
            return examples, torch.full_like(terms, self.ranks.size)
        if self.recipe.reduction == "mean" and met.spread is not None:
            spread = met.spread.to(terms)
            return examples, self.ranks.size * (examples / spread).sqrt()
        return examples, terms

    def scale(
        self, layer: LayerCurvature, loss_scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return examples, and the factor from recorded gradients to their own losses'.

        Sampled and exact pseudo-gradients are those of the example's own loss already.
        """
        examples, terms = self.counts(layer)
        if not self.recipe.empirical or self.meeting is not None:
            return examples, torch.ones_like(terms)
        scale = torch.ones_like(terms) if self.recipe.reduction == "sum" else terms
        return examples, scale / loss_scale

    def own_scale(self, layer: LayerCurvature) -> Tensor | None:
        """Return the part of :meth:`scale` that differs between ranks."""
        alike = self.recipe.reduction != "mean" or not self.recipe.empirical
        return None if alike else self.scale(layer, 1.0)[1]
