"""The directions of many layers in a few launches, on devices that have the kernels.

What is done element by element is one call of a list operator for all layers: the
running average of the scalings with its sums, then the division by the damped scalings
with the sums that grafting and the KL clip ask for. Layers of one shape are projected
and projected back in one batched product. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature import LayerCurvature
from ekfac.curvature.options import Settings
from ekfac.curvature.sharded import whole
from ekfac.kernels import dispatch

if TYPE_CHECKING:
    from ekfac.optim.directions import Preconditioner

OPS = torch.ops.ekfac
Task = tuple[LayerCurvature, int]


def available(layer: LayerCurvature) -> bool:
    """Return whether the layer's device has the kernels, and they take its type."""
    if layer.device.type != "cuda" or layer.dtype != torch.float32:
        return False
    return dispatch.workshop(layer.device) is not None


def takes(layer: LayerCurvature, settings: Settings) -> bool:
    """Return whether a layer's direction can be one of a list."""
    average = layer.averages["s"]
    started = settings.scaling is None or not average.empty
    # Truncated bases, factored damping and the first scalings go layer by layer.
    plain = settings.damping_split == "exact" and not layer.truncated
    return plain and started and available(layer)


def directions(
    own: Preconditioner,
    tasks: Sequence[Task],
    groups: Sequence[dict[str, Any]],
    step: int,
) -> dict[str, list[Tensor]]:
    """Return the directions of the layers that can be taken in lists.

    Args:
        own: Gives settings, averages and the window's counts.
        tasks: Layers with a basis, each with the number of its group.
        groups: Give ``damping`` and ``kl_clip``.
        step: Number of the step.

    Returns:
        Layer -> its direction ``[b, d_out, d_in]``, and ``u^T (F + damping) u`` if
        there is a KL clip.
    """
    batches: dict[tuple[int, torch.device], list[LayerCurvature]] = {}
    ranks = own.collector.ranks
    for layer, number in tasks:
        if ranks is not None and not ranks.assignment.works(layer.name):
            continue
        if takes(layer, own.settings):
            batches.setdefault((number, layer.device), []).append(layer)
    found: dict[str, list[Tensor]] = {}
    for (number, _), layers in batches.items():
        found |= _Batch(own, layers, groups[number], step).directions()
    return found


@dataclass(frozen=True)
class _Stack:
    """Layers of one shape, of one block each, or a single layer.

    Attributes:
        layers: In the order of ``projected``.
        projected: Gradients in the basis, ``[n b, d_out, d_in]``; overwritten.
        left: ``[n b, d_out, d_out]``, or ``None`` for the identity.
        right: ``[n b, d_in, d_in]`` or ``None``.
    """

    layers: list[LayerCurvature]
    projected: Tensor
    left: Tensor | None
    right: Tensor | None

    @classmethod
    def of(cls, layers: list[LayerCurvature]) -> _Stack:
        """Return the stack with the layers' gradients."""
        left = _bases(layers, "G")
        right = _bases(layers, "A")
        packed = [_gradient(layer) for layer in layers]
        gradient = packed[0] if len(packed) == 1 else torch.cat(packed)
        projected = kernels.rotate_matrix(gradient, left, right)
        # The gradient itself, of parameters without a bias, is not to be overwritten.
        projected = projected.clone() if left is right is None else projected
        return cls(layers, projected, left, right)

    def parts(self) -> list[Tensor]:
        """Return every layer's part of ``projected``."""
        return list(self.projected.split(self.layers[0].block.shape[0]))


def _gradient(layer: LayerCurvature) -> Tensor:
    """Return ``[b, d_out, d_in]`` of the layer's gradients."""
    return layer.block.pack(
        [
            torch.zeros(p.shape, dtype=layer.dtype, device=layer.device)
            if p.grad is None
            else whole(p.grad).to(layer.dtype)
            for p in layer.block.tensors()
        ]
    )


def _bases(layers: Sequence[LayerCurvature], side: str) -> Tensor | None:
    """Return the layers' bases as one tensor without a copy, if there are any."""
    bases = [layer.basis(side) for layer in layers]
    present = [basis for basis in bases if basis is not None]
    return stacked(present) if present else None


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors ``[1, m, n]`` as one of ``[k, m, n]``, if they lie at equal steps.

    Those of a bank do where the layers between them repeat.

    Args:
        tensors: Of one shape; one alone may be ``[b, m, n]``.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    step = tensors[1].storage_offset() - first.storage_offset()
    for number, tensor in enumerate(tensors):
        place = first.storage_offset() + number * step
        alike = tensor.stride() == first.stride() and tensor.shape == first.shape
        same = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (alike and same and step > 0 and tensor.storage_offset() == place):
            return None
    size, strides = (len(tensors), *first.shape[1:]), (step, *first.stride()[1:])
    return first.as_strided(size, strides)


def stacks(layers: Sequence[LayerCurvature]) -> list[_Stack]:
    """Return the layers in stacks: those of one shape whose bases lie well together."""
    shapes: dict[tuple[object, ...], list[LayerCurvature]] = {}
    for layer in layers:
        bare = (layer.basis("G") is None, layer.basis("A") is None)
        shapes.setdefault((*layer.block.shape, *bare), []).append(layer)
    found = []
    for alike in shapes.values():
        together = len(alike) > 1 and alike[0].block.shape[0] == 1
        for side in ("G", "A"):
            some = alike[0].basis(side) is not None
            together = together and not (some and _bases(alike, side) is None)
        groups = [alike] if together else [[layer] for layer in alike]
        found += [_Stack.of(group) for group in groups]
    return found


class _Batch:
    """Layers of one device and one group, in lists.

    Sums and factors are vectors with an entry for each layer.
    """

    def __init__(
        self,
        own: Preconditioner,
        layers: Sequence[LayerCurvature],
        group: dict[str, Any],
        step: int,
    ) -> None:
        self.own, self.group, self.step = own, group, step
        self.stacks = stacks(layers)
        self.layers = [layer for stack in self.stacks for layer in stack.layers]
        self.projected = [part for stack in self.stacks for part in stack.parts()]
        self.sizes = [float(part.numel()) for part in self.projected]
        self.norms = torch.stack(torch._foreach_norm(self.projected))

    def directions(self) -> dict[str, list[Tensor]]:
        """Return every layer's direction, and its form if there is a KL clip."""
        scalings, weights, totals = self._scalings()
        damping = self._damping(totals / weights)
        power = self.own.settings.power
        # Averages are divided by their weight: here what is added is multiplied.
        sums = OPS.precondition_(self.projected, scalings, damping * weights, power)
        factors = self._factors(sums[:, 1], weights.pow(-power))
        forms = sums[:, 0] * factors.square() / weights
        found, start = {}, 0
        for stack in self.stacks:
            some = slice(start, start + len(stack.layers))
            start = some.stop
            each = stack.projected.unflatten(0, (len(stack.layers), -1))
            each.mul_(factors[some].view(-1, 1, 1, 1))
            direction = kernels.rotate_back(
                stack.projected,
                stack.left,
                stack.right,
                precise=self.own.settings.precision == "full",
            )
            parts = direction.split(stack.layers[0].block.shape[0])
            columns = zip(stack.layers, parts, forms[some].unbind(), strict=True)
            for layer, part, form in columns:
                clipped = self.group["kl_clip"] is not None
                found[layer.name] = [part, form] if clipped else [part]
        return found

    def _scalings(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the blocks' eigenvalues times their weights, those, and the sums."""
        settings = self.own.settings
        if settings.scaling is None:
            scalings = [layer.kronecker_scalings() for layer in self.layers]
            return scalings, torch.ones_like(self.norms), self._sums(scalings)
        averages = [layer.averages["s"] for layer in self.layers]
        scalings = [average.total for average in averages]
        weights = [average.weight for average in averages]
        due = settings.schedule.scalings_due(self.step)
        if settings.scaling == "per_example" or not due:
            return scalings, torch.stack(weights), self._sums(scalings)
        decay = settings.scaling_decay
        finite, old = self.norms.isfinite(), torch.stack(weights)
        # A gradient that is not finite leaves the average, total over weight, as it is.
        keep = torch.where(finite, decay, decay + (1 - decay) / old.clamp(min=1e-30))
        rate = torch.where(finite, (1 - decay) * self._window(), 0.0)
        scales = torch.stack([keep, rate], dim=1)
        sums = OPS.squares_(scalings, self.projected, scales)
        torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, 1 - decay)
        for layer in self.layers:
            layer.version["scalings"] = self.step
        return scalings, torch.stack(weights), sums

    def _window(self) -> Tensor:
        """Return what squared gradients are multiplied with, for every layer."""
        collector = self.own.collector
        first = self.own.window_scale(self.layers[0])
        if collector.examples is not None:  # one number for all
            return first[1].square() / first[0]
        pairs = [self.own.window_scale(layer) for layer in self.layers]
        return torch.stack([scale.square() / examples for examples, scale in pairs])

    def _sums(self, scalings: list[Tensor]) -> Tensor:
        """Return the sums of scalings, by an update that leaves them as they are."""
        one = torch.ones_like(self.norms)
        stay = torch.stack([one, torch.zeros_like(one)], dim=1)
        sums: Tensor = OPS.squares_(scalings, self.projected, stay)
        return sums

    def _damping(self, sums: Tensor) -> Tensor:
        """Return the damping of every layer, from the sums of its scalings."""
        damping, tiny = self.group["damping"], torch.finfo(sums.dtype).tiny
        if self.own.settings.damping_mode != "relative" or not damping:
            return torch.full_like(sums, float(damping))
        added = damping * self._per_element(sums)
        # A layer all of whose scalings are zero, dead until now: the gradient itself.
        return torch.where(added > 0, added.clamp(min=tiny), 1.0)

    def _per_element(self, sums: Tensor) -> Tensor:
        """Return sums over the layers' elements, without copying how many there are."""
        return torch.stack(torch._foreach_div(list(sums.unbind()), self.sizes))

    def _factors(self, squares: Tensor, own: Tensor) -> Tensor:
        """Return what directions are multiplied with, see ``update.graft_``.

        Args:
            squares: Their sums of squares.
            own: Factors without grafting.
        """
        grafting = self.own.settings.grafting
        if grafting is None:
            return own
        if grafting == "rms":
            length, target = self._per_element(squares).sqrt(), torch.ones_like(squares)
        else:
            length, target = squares.sqrt(), self.norms  # the basis is orthogonal
        tiny = torch.finfo(squares.dtype).tiny
        return torch.where(length > tiny * target, target / length, 0.0)
