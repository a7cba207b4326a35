"""State for ``torch.distributed.checkpoint``, and what its functions ask for.

``torch.distributed.checkpoint.state_dict`` keeps of an optimizer's state what stands
under ``"state"`` and ``"param_groups"`` alone. For it the whole state travels in the
first group.
"""

from __future__ import annotations

import io
import sys
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ekfac.curvature import Curvature
from ekfac.curvature.distributed import Ranks
from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.layers.base import shard_like, whole

BUFFER = "momentum_buffer"
CARRIED = "ekfac"  # the entry of the first param group
# What of a layer's state is no tensor, and whose shape changes if bases are truncated.
PLAIN = ("version", "columns")
VARYING = {"Q_A", "Q_G", "eigenvalues_A", "eigenvalues_G", "s"}


class Checkpointed(Protocol):
    """What is asked of an optimizer."""

    curvature: Curvature
    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train together, or ``None`` for this one alone."""

    def own_state(self) -> dict[str, Any]:
        """Return copies of the curvature that this process holds, and the progress."""

    def restore(self, curvature: dict[str, Any], progress: dict[str, Any]) -> None:
        """Take over what :meth:`own_state` returned."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the model."""


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

    def __init__(self, optimizer: Checkpointed) -> None:
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
        if optimizer.ranks is not None:
            every = optimizer.ranks.agree(own["progress"]["background"])
            merged = {name: one for some in every for name, one in some.items()}
            own["progress"]["background"] = merged
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
        saved_layers = state_dict["curvature"]
        # In the order in which the layers take turns.
        curvature = {
            name: {key: _from_bytes(v) for key, v in saved_layers[name].items()} | plain
            for name, plain in rest["layers"].items()
            if name in saved_layers
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


def asked_by_torch(depth: int = 4) -> bool:
    """Return whether ``torch.distributed.checkpoint.state_dict`` asks for the state.

    Raises:
        UnsupportedOperationError: If it would lose the curvature.
    """
    frame = sys._getframe(1)
    for _ in range(depth):
        if frame.f_back is None:
            return False
        frame = frame.f_back
        if frame.f_code.co_name == "_get_optim_state_dict":
            info = frame.f_locals.get("info")
            if getattr(info, "flatten_optimizer_state_dict", False):
                raise UnsupportedOperationError(
                    "flatten_optimizer_state_dict=True keeps tensors and numbers of "
                    "parameters alone, and would lose the curvature; leave it out, or "
                    "save ekfac.optim.DistributedState(optimizer)."
                )
            return True
    return False


def carry(state: dict[str, Any], optimizer: Checkpointed) -> dict[str, Any]:
    """Return torch's own state of an optimizer, the whole carried by the first group.

    Args:
        state: Of which the groups are taken.
        optimizer: Whose it is; all ranks must call this.
    """
    groups: list[dict[str, Any]] = [dict(group) for group in state["param_groups"]]
    groups[0][CARRIED] = DistributedState(optimizer).state_dict()
    # torch refuses parameters without an entry when it loads.
    entries: dict[int, Any] = {n: {} for group in groups for n in group["params"]}
    return {"state": entries, "param_groups": groups}


def carried(state: dict[str, Any]) -> dict[str, Any] | None:
    """Return what :func:`carry` has put into a state, ``None`` for another."""
    groups = state.get("param_groups") or [{}]
    whole_state: dict[str, Any] | None = groups[0].get(CARRIED)
    return whole_state


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
