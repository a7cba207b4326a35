"""Gradients in their layers' eigenbases, layer by layer or in lists on a CUDA device.

In a list, layers of one shape are projected in one batched product, and the running
averages of all scalings are updated by one launch. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature.options import Options
from ekfac.curvature.sharded_tensor import whole
from ekfac.curvature.state import LayerCurvature
from ekfac.curvature.truncated import Coordinates, coordinates, norm_of
from ekfac.kernels import Workspace
from ekfac.kernels.cuda import dispatch

OPS = torch.ops.ekfac


@dataclass
class ProjectedGradient:
    """A layer's gradient in its eigenbasis.

    Attributes:
        layer: The layer.
        parts: The coordinates; of a full basis ``parts.kept`` has them all,
            ``[b, d_out, d_in]``. ``None`` where another rank works on the layer.
        norm: Of the gradient, where the step needs it.
        scalings_sum: Weighted sum of the layer's scalings; of members of a list alone.
    """

    layer: LayerCurvature
    parts: Coordinates | None = None
    norm: Tensor | None = None
    scalings_sum: Tensor | None = None


def gradients_of(layer: LayerCurvature) -> list[Tensor]:
    """Return the gradients of a layer's parameters, whole; zeros where there is none.

    Of sharded parameters, all ranks must call this.
    """
    return [
        torch.zeros(p.shape, dtype=layer.dtype, device=p.device)
        if p.grad is None
        else whole(p.grad)
        for p in layer.block.tensors()
    ]


def packed(layer: LayerCurvature, gradients: Sequence[Tensor]) -> Tensor:
    """Return ``[b, d_out, d_in]`` of the layer's gradients, in its type."""
    return layer.block.pack([g.to(layer.dtype) for g in gradients])


def project_truncated(
    layer: LayerCurvature,
    gradients: Sequence[Tensor],
    options: Options,
    workspace: Workspace,
) -> ProjectedGradient:
    """Return one layer's gradient in its truncated basis.

    Args:
        layer: With a basis that leaves directions out.
        gradients: Of its parameters.
        options: Say whether the gradient's norm is needed.
        workspace: Holds the gradient, which becomes the layer's direction.
    """
    like = layer.averages["A"].weight
    name = f"direction of {layer.name}"
    gradient = workspace.take_rows(name, layer.block.shape, like)
    layer.block.pack_into_(gradient, gradients)
    norm = norm_of(gradient) if options.grafting == "sgd" else None
    return ProjectedGradient(layer, coordinates(layer, gradient), norm)


def project(
    layer: LayerCurvature, gradient: Tensor, rotated: Tensor | None, options: Options
) -> ProjectedGradient:
    """Return one layer's gradient in its full basis.

    Args:
        layer: With a basis.
        gradient: ``[b, d_out, d_in]``.
        rotated: ``Q_G^T W Q_A``, if it is known already.
        options: Say whether the gradient's norm is needed.
    """
    norm = gradient.norm() if options.grafting == "sgd" else None
    if rotated is None:
        left, right = layer.basis("G"), layer.basis("A")
        rotated = kernels.rotate_matrix(gradient, left, right)
        if left is right is None:  # may be the parameter's own gradient
            rotated = rotated.clone()
    return ProjectedGradient(layer, Coordinates.of_full_basis(rotated), norm)


# -- lists -----------------------------------------------------------------------------


def available(layer: LayerCurvature) -> bool:
    """Return whether the layer's device has the kernels, and they take its type."""
    if layer.device.type != "cuda" or layer.dtype != torch.float32:
        return False
    return dispatch.kernel_cache(layer.device) is not None


def supports_list(layer: LayerCurvature, options: Options) -> bool:
    """Return whether a layer can be one of a list."""
    started = options.scaling is None or not layer.averages["s"].empty
    # Truncated bases, factored damping and the first scalings go layer by layer.
    plain = options.damping_split == "exact" and not layer.truncated
    return plain and started and available(layer)


def project_list(
    layers: Sequence[LayerCurvature], gradients: Mapping[str, Sequence[Tensor]]
) -> list[ProjectedGradient]:
    """Return the gradients of layers of one device in their bases.

    Layers of one shape come one after the other, their coordinates in one tensor.
    """
    found = []
    for stack in stacks(layers):
        left, right = stacked_bases(stack, "G"), stacked_bases(stack, "A")
        matrices = [packed(layer, gradients[layer.name]) for layer in stack]
        gradient = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        rotated = kernels.rotate_matrix(gradient, left, right)
        rotated = rotated.clone() if left is right is None else rotated
        parts = rotated.split(stack[0].block.shape[0])
        found += [
            ProjectedGradient(layer, Coordinates.of_full_basis(part))
            for layer, part in zip(stack, parts, strict=True)
        ]
    norms = torch._foreach_norm([kept_of(one) for one in found])
    for one, norm in zip(found, norms, strict=True):
        one.norm = norm  # the basis is orthogonal
    return found


def kept_of(gradient: ProjectedGradient) -> Tensor:
    """Return a gradient's coordinates in the kept directions."""
    assert gradient.parts is not None
    return gradient.parts.kept


def squares_sums(
    scalings: Sequence[Tensor], projected: Sequence[Tensor], keep: Tensor, rate: Tensor
) -> Tensor:
    """Do ``s <- keep s + rate u^2`` for a list of layers; return the sums of ``s``.

    Args:
        scalings: ``s`` of every layer; overwritten.
        projected: ``u`` of every layer; not read where the rate is 0.
        keep: One number for each layer.
        rate: Likewise.
    """
    scales = torch.stack([keep, rate], dim=1)
    sums: Tensor = OPS.squares_(list(scalings), list(projected), scales)
    return sums


def stacked(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors ``[b, m, n]`` as one ``[k b, m, n]``, if they lie at equal steps.

    Those of stacked storage do where the layers between them repeat.

    Args:
        tensors: Of one shape; ``b`` may exceed 1 where there is only one.
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


def stacked_bases(layers: Sequence[LayerCurvature], side: str) -> Tensor | None:
    """Return the layers' bases as one tensor without a copy, if there are any."""
    bases = [layer.basis(side) for layer in layers]
    present = [basis for basis in bases if basis is not None]
    return stacked(present) if present else None


def stacks(layers: Sequence[LayerCurvature]) -> list[list[LayerCurvature]]:
    """Return the layers in stacks: those of one shape whose bases lie well together."""
    shapes: dict[tuple[object, ...], list[LayerCurvature]] = {}
    for layer in layers:
        bare = (layer.basis("G") is None, layer.basis("A") is None)
        shapes.setdefault((*layer.block.shape, *bare), []).append(layer)
    found: list[list[LayerCurvature]] = []
    for alike in shapes.values():
        batched = len(alike) > 1 and alike[0].block.shape[0] == 1
        for side in ("G", "A"):
            some = alike[0].basis(side) is not None
            batched = batched and not (some and stacked_bases(alike, side) is None)
        found += [alike] if batched else [[layer] for layer in alike]
    return found
