"""From a layer's gradient to its direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature import LayerCurvature
from ekfac.curvature.collector import Collector
from ekfac.curvature.precondition import absolute_damping, precondition_
from ekfac.optim.settings import Settings
from ekfac.optim.update import graft_


class Preconditioner:
    """Preconditions gradients with the curvature that a collector keeps.

    Attributes:
        counts: Examples and loss terms of the last window that said how many it had.
    """

    def __init__(self, collector: Collector, settings: Settings) -> None:
        self.collector, self.settings = collector, settings
        self.counts: tuple[Tensor, Tensor] | None = None

    def add_direction(
        self,
        layer: LayerCurvature,
        group: dict[str, Any],
        step: int,
        directions: dict[Tensor, Tensor],
    ) -> Tensor | None:
        """Add the directions ``u`` of one layer's parameters.

        Args:
            layer: With a basis.
            group: Gives ``damping`` and ``kl_clip``.
            step: Number of the step.
            directions: Parameter -> direction; added to.

        Returns:
            ``u^T (F + damping) u``, for the KL clip if there is one.
        """
        block, chosen = layer.block, self.settings
        dtype = layer.averages["A"].total.dtype
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad for p in block.tensors()
        ]
        gradient = block.pack([g.to(dtype) for g in grads])
        left, right = layer.basis("G"), layer.basis("A")
        projected = self.collector.projected(layer, gradient)
        if projected is None:
            projected = kernels.rotate_matrix(gradient, left, right)
        scalings = self._scalings(layer, projected, step)
        damping = absolute_damping(scalings, group["damping"], chosen.damping_mode)
        split = chosen.damping_split
        if split == "factored" and chosen.scaling is not None:
            split = "equal"  # George 2023, A.4 has no pi
        eigenvalues = precondition_(
            layer, projected, scalings, damping, chosen.power, split
        )
        graft_(projected, gradient, chosen.grafting)  # the basis is orthogonal
        form: Tensor | None = None
        if group["kl_clip"] is not None:
            form = (projected.square() * eigenvalues).sum()
        direction = kernels.rotate_back(
            projected, left, right, precise=chosen.precision == "full"
        )
        _scatter(layer, direction, directions)
        return form

    def _scalings(self, layer: LayerCurvature, projected: Tensor, step: int) -> Tensor:
        """Return the block's eigenvalues, with this batch's share in them."""
        if self.settings.scaling is None:
            return layer.kronecker_scalings()
        average = layer.averages["s"]
        if self.settings.scaling == "running_average":
            examples, scale = self._window_scale(layer)
            factor = scale.square() / examples
            if average.empty:
                # One squared gradient is a poor guess of its expectation everywhere but
                # in its sum: the shape is at first that of the Kronecker eigenvalues.
                shape = layer.kronecker_scalings()
                tiny = torch.finfo(shape.dtype).tiny
                size = factor * projected.square().mean() / shape.mean().clamp(min=tiny)
                average.start_(shape * size)
            if self.settings.schedule.scalings_due(step):
                self.collector.update_squares(layer, projected, factor, step)
        scalings = average.read()
        assert scalings is not None
        return scalings

    def _window_scale(self, layer: LayerCurvature) -> tuple[Tensor, Tensor]:
        """Return examples and scale of the gradient in ``.grad``, which is unscaled."""
        if self.collector.examples is None and self.counts is not None:
            self.collector.examples, self.collector.terms = self.counts
        return self.collector.mean_scale(layer)


def _scatter(
    layer: LayerCurvature, direction: Tensor, directions: dict[Tensor, Tensor]
) -> None:
    """Put a block's direction to its parameters, of which it may have some rows."""
    block = layer.block
    slots, parts = block.adapter.slots(), block.unpack(direction)
    for parameter, slot, part in zip(block.tensors(), slots, parts, strict=True):
        if parameter.grad is None:
            continue
        if slot.rows is None:
            directions[parameter] = part.to(parameter.dtype)
            continue
        whole = directions.get(parameter)
        if whole is None:
            whole = directions[parameter] = torch.zeros_like(parameter)
        slot.of(whole).copy_(part)
