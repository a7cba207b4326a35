"""Sharded parameters (``fully_shard``): whole tensors of parts, and parts of whole.

Nothing here is done for plain tensors, which are returned as they are.
"""

from __future__ import annotations

from torch import Tensor

from ekfac.layers import is_sharded


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded or sparse tensor, dense.

    All ranks of a sharded one's mesh must call this.
    """
    if not is_sharded(tensor):
        return tensor.to_dense() if tensor.is_sparse else tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every rank has as a whole, sharded as ``like`` is."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    everywhere = [Replicate()] * mesh.ndim
    replicated = DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    return replicated.redistribute(mesh, placements)
