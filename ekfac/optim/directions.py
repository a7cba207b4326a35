"""From a layer's gradient to its direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature import LayerCurvature
from ekfac.curvature.collector import Collector
from ekfac.curvature.meeting import share_directions_
from ekfac.curvature.options import Settings
from ekfac.curvature.precondition import (
    absolute_damping,
    cross_terms,
    precondition_,
)
from ekfac.curvature.sharded import shard_like, whole
from ekfac.curvature.truncated import (
    collapsed,
    combine_,
    coordinates,
    norm_of,
    refined,
    spread,
)
from ekfac.optim import lists
from ekfac.optim.update import graft_, graft_factor


class Preconditioner:
    """Preconditions gradients with the curvature that a collector keeps.

    Attributes:
        counts: Examples and loss terms of the last window that said how many it had.
    """

    def __init__(self, collector: Collector, settings: Settings) -> None:
        self.collector, self.settings = collector, settings
        self.counts: tuple[Tensor, Tensor] | None = None
        self._workspace = kernels.Workspace()

    def add_directions(
        self,
        tasks: Sequence[tuple[LayerCurvature, int]],
        groups: Sequence[dict[str, Any]],
        step: int,
        directions: dict[Tensor, Tensor],
    ) -> list[Tensor | None]:
        """Add the directions ``u`` of the layers' parameters.

        Args:
            tasks: Layers with a basis, each with the number of its group.
            groups: Give ``damping`` and ``kl_clip``.
            step: Number of the step.
            directions: Parameter -> direction; added to.

        Returns:
            For each group, ``u^T (F + damping) u`` summed over its layers, for the KL
            clip if there is one.
        """
        listed = lists.directions(self, tasks, groups, step)
        found = [
            listed.get(layer.name) or self._result(layer, groups[n], step)
            for layer, n in tasks
        ]
        ranks = self.collector.ranks
        if ranks is not None:
            layers = [layer for layer, _ in tasks]
            share_directions_(ranks, list(zip(layers, found, strict=True)))
        products: list[Tensor | None] = [None] * len(groups)
        for (layer, number), (direction, *form) in zip(tasks, found, strict=True):
            _scatter(layer, direction, directions)
            if form:
                product = products[number]
                term = form[0] if product is None else form[0].to(product)
                products[number] = term if product is None else product + term
        for parameter, direction in directions.items():
            directions[parameter] = shard_like(direction, parameter)
        return products

    def _result(
        self, layer: LayerCurvature, group: dict[str, Any], step: int
    ) -> list[Tensor]:
        """Return a layer's direction and its form, without values if not worked on."""
        ranks, parameters = self.collector.ranks, layer.block.tensors()
        gradients = [None if p.grad is None else whole(p.grad) for p in parameters]
        if ranks is None or ranks.assignment.works(layer.name):
            direction, form = self.direction(layer, gradients, group, step)
            return [direction] if form is None else [direction, form]
        due = self.settings.schedule.scalings_due(step)
        if self.settings.scaling == "running_average" and due:
            self.collector.note_scalings(layer, step)
        like = layer.averages["A"].weight
        direction = like.new_empty(layer.block.shape)
        if group["kl_clip"] is None:
            return [direction]
        return [direction, like.new_empty(())]

    def direction(
        self,
        layer: LayerCurvature,
        gradients: Sequence[Tensor | None],
        group: dict[str, Any],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the direction ``u`` of one layer, and its form for the KL clip.

        Args:
            layer: With a basis.
            gradients: Of its parameters, whole.
            group: Gives ``damping`` and ``kl_clip``.
            step: Number of the step.

        Returns:
            ``[b, d_out, d_in]``, and ``u^T (F + damping) u`` if there is a clip.
        """
        block, chosen = layer.block, self.settings
        dtype = layer.dtype
        grads = [
            torch.zeros(p.shape, dtype=dtype, device=p.device) if g is None else g
            for p, g in zip(block.tensors(), gradients, strict=True)
        ]
        if layer.truncated and (layer.complement("G") or layer.complement("A")):
            like = layer.averages["A"].weight
            name = f"direction of {layer.name}"
            gradient = self._workspace.take_rows(name, block.shape, like)
            block.pack_into_(gradient, grads)
            return self._truncated(layer, gradient, group, step)
        gradient = block.pack([g.to(dtype) for g in grads])
        left, right = layer.basis("G"), layer.basis("A")
        projected = self.collector.projected(layer, gradient)
        if projected is None:
            projected = kernels.rotate_matrix(gradient, left, right)
        scalings = self._scalings(layer, projected, step)
        damping = absolute_damping(
            layer, scalings, group["damping"], chosen.damping_mode
        )
        eigenvalues = precondition_(
            projected, scalings, damping, chosen.power, self._cross(layer)
        )
        graft_(projected, gradient, chosen.grafting)  # the basis is orthogonal
        form: Tensor | None = None
        if group["kl_clip"] is not None:
            form = (projected.square() * eigenvalues).sum()
        direction = kernels.rotate_back(
            projected,
            left,
            right,
            precise=chosen.precision == "full",
            workspace=self._workspace,
            name=f"direction of {layer.name}",
        )
        return direction, form

    def _cross(self, layer: LayerCurvature) -> Tensor | None:
        """Return the cross terms of factored damping."""
        split = self.settings.damping_split
        if split == "factored" and self.settings.scaling is not None:
            split = "equal"  # George 2023, A.4 has no pi
        return cross_terms(layer, split)

    def _truncated(
        self,
        layer: LayerCurvature,
        gradient: Tensor,
        group: dict[str, Any],
        step: int,
    ) -> tuple[Tensor, Tensor | None]:
        """Turn the gradient into the :meth:`direction` in a truncated basis."""
        parts = coordinates(layer, gradient)
        scalings = self._scalings(layer, parts.roots, step)
        chosen, cross = self.settings, self._cross(layer)
        damping = absolute_damping(
            layer, scalings, group["damping"], chosen.damping_mode
        )
        finer, weights = refined(layer, scalings)
        factors = torch.ones_like(finer)
        if cross is not None:
            cross = spread(layer, cross)
        damped = precondition_(factors, finer, damping, chosen.power, cross)
        multipliers = collapsed(layer, factors, weights)
        target: Tensor | float | None = None
        if chosen.grafting is not None:
            rms = chosen.grafting == "rms"
            target = gradient.numel() ** 0.5 if rms else norm_of(gradient)
        form: Tensor | None = None
        if group["kl_clip"] is not None:
            eigenvalues = collapsed(layer, damped, weights)
            squares = (multipliers * parts.roots).square_().mul_(eigenvalues)
            form = layer.mean(squares) * gradient.numel()
        direction = combine_(layer, parts, multipliers)
        if target is not None:
            # Not from the coordinates' squares: what the complement has of them is a
            # difference, whose rounding error its multiplier would blow up.
            factor = graft_factor(norm_of(direction), target)
            direction.mul_(factor)
            form = None if form is None else form * factor.square()
        return direction, form

    def _scalings(self, layer: LayerCurvature, projected: Tensor, step: int) -> Tensor:
        """Return the block's eigenvalues, with this batch's share in them."""
        memory = self._workspace.take("scalings", projected)
        if self.settings.scaling is None:
            return layer.kronecker_scalings(memory)
        average = layer.averages["s"]
        if self.settings.scaling == "running_average":
            examples, scale = self.window_scale(layer)
            factor = scale.square() / examples
            if average.empty:
                # One squared gradient is a poor guess of its expectation everywhere but
                # in its sum: the shape is at first that of the Kronecker eigenvalues.
                shape = layer.kronecker_scalings()
                tiny = torch.finfo(shape.dtype).tiny
                mean = layer.mean(shape).clamp(min=tiny)
                size = factor * layer.mean(projected.square()) / mean
                average.start_(shape * size)
            if self.settings.schedule.scalings_due(step):
                self.collector.update_squares(layer, projected, factor, step)
        scalings = average.read(memory)
        assert scalings is not None
        return scalings

    def window_scale(self, layer: LayerCurvature) -> tuple[Tensor, Tensor]:
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
        rows = directions.get(parameter)
        if rows is None:
            shape = parameter.shape
            rows = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        directions[parameter] = rows = whole(rows)
        slot.of(rows).copy_(part)
