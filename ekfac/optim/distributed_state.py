"""Checkpoints of several ranks: the state for ``torch.distributed.checkpoint``."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature.sharded_tensor import shard_like, whole
from ekfac.errors import StateMismatchError
from ekfac.optim.optimizer import KroneckerOptimizer

BUFFER = "momentum_buffer"
# What of a layer's state is no tensor, and whose shape changes if bases are truncated.
PLAIN = ("version", "columns")
VARYING = {"Q_A", "Q_G", "eigenvalues_A", "eigenvalues_G", "s"}


class DistributedState:
    """An optimizer as ``torch.distributed.checkpoint`` saves and loads it.

    Saved on some ranks, it is loaded on as many or as few as there are then, whatever
    they hold of it::

        weights = model.state_dict()
        state = {"model": weights, "optimizer": DistributedState(optimizer)}
        dcp.save(state, checkpoint_id=folder)
        dcp.load(state, checkpoint_id=folder)  # of a new model and optimizer
        model.load_state_dict(weights)

    Every tensor is saved once, by a rank that holds it; parameters go by their names in
    the model. Truncated bases are loaded with as many eigenvectors as were saved.

    Args:
        optimizer: Constructed on all ranks, for the same model.
    """

    def __init__(self, optimizer: KroneckerOptimizer) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return copies of what this rank holds; all ranks must call this."""
        optimizer = self.optimizer
        own, parameters = optimizer.own_state(), optimizer.named_parameters()
        plain = {
            name: {key: layer.pop(key) for key in PLAIN if key in layer}
            for name, layer in own["curvature"].items()
        }
        for name, layer in own["curvature"].items():
            if optimizer.curvature[name].truncated:
                # Their shapes at loading are not those at saving: bytes stay whole.
                kept = VARYING & layer.keys()
                layer.update({key: _to_bytes(layer[key].cpu()) for key in kept})
        others = {
            name: {k: whole(v) if isinstance(v, Tensor) else v for k, v in kept.items()}
            for name, parameter in parameters.items()
            if (kept := _without_buffer(optimizer.state.get(parameter, {})))
        }
        buffers = {
            name: optimizer.state.get(parameter, {}).get(BUFFER)
            for name, parameter in parameters.items()
        }
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        rest = {
            "layers": plain,
            "progress": own["progress"],
            "groups": groups,
            "state": others,
            "moved": [name for name, buffer in buffers.items() if buffer is not None],
        }
        return {
            "curvature": own["curvature"],
            BUFFER: {
                name: torch.zeros_like(parameters[name])
                if buffer is None
                else buffer.clone()
                for name, buffer in buffers.items()
            },
            "rest": _to_bytes(rest),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what was saved, or change nothing and raise.

        Raises:
            StateMismatchError: If it is the state of another model or optimizer.
        """
        optimizer = self.optimizer
        parameters = optimizer.named_parameters()
        rest = _from_bytes(state_dict["rest"])
        groups = optimizer.param_groups
        if len(groups) != len(rest["groups"]):
            raise StateMismatchError(
                f"the saved optimizer has {len(rest['groups'])} param groups, this one "
                f"has {len(groups)}; construct it as the one that was saved."
            )
        found = state_dict["curvature"]
        # In the order in which the layers take turns.
        curvature = {
            name: {key: _from_bytes(v) for key, v in found[name].items()} | plain
            for name, plain in rest["layers"].items()
            if name in found
        }
        optimizer.curvature.check_state(curvature)
        for group, saved in zip(groups, rest["groups"], strict=True):
            group.update(saved)
        optimizer.state.clear()
        for name in rest["moved"]:
            optimizer.state[parameters[name]][BUFFER] = state_dict[BUFFER][name]
        for name, kept in rest["state"].items():
            parameter = parameters[name]
            optimizer.state[parameter] |= {
                key: shard_like(value.to(parameter.device), parameter)
                if isinstance(value, Tensor)
                else value
                for key, value in kept.items()
            }
        optimizer.restore(curvature, rest["progress"])


def _without_buffer(state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's state without its momentum."""
    return {key: value for key, value in state.items() if key != BUFFER}


def _to_bytes(value: Any) -> bytes:
    """Return plain tensors and numbers as bytes, which the checkpoint leaves whole."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _from_bytes(value: Any) -> Any:
    """Return what :func:`_to_bytes` made bytes of, and anything else as it is."""
    if not isinstance(value, bytes):
        return value
    return torch.load(io.BytesIO(value), weights_only=True)
