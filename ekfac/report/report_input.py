"""Input of a report: a saved optimizer, or a script with one."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ekfac.curvature.radial import scale_factor
from ekfac.diagnostics.health import LayerState, block_eigenvalues, layer_health
from ekfac.errors import EkfacError
from ekfac.kernels import unpack_symmetric
from ekfac.kernels.decomposition import completed, places
from ekfac.matrices.eigen import DampingMode, absolute_damping

# Errors of reading a state with unexpected contents or shapes.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
SHOWN_SETTINGS = ("lr", "momentum", "weight_decay", "damping", "kl_clip")


class ReportError(EkfacError, ValueError):
    """The input of a report is unusable; the message says what is wanted."""


class SavedLayer:
    """One layer's curvature from a checkpoint, with the attributes of a live one.

    ``A`` and ``G`` are the factors ``[b or 1, d, d]`` (diagonal ones ``[b or 1, d]``),
    ``Q_A`` and ``Q_G`` their bases, ``s`` the scalings ``[b, d_out, d_in]``; ``None``:
    not in the checkpoint.

    Args:
        name: The layer's name.
        state: What ``LayerCurvature.state_dict()`` returned.

    Raises:
        KeyError: If the state lacks an entry.
    """

    def __init__(self, name: str, state: Mapping[str, Any]) -> None:
        self.name, self.state = name, state
        self.version: Mapping[str, int] = state["version"]
        self.ready = self.version["basis"] > 0
        dtype = state["A_weight"].dtype
        bases: dict[str, Any] = {s: state.get(f"Q_{s}") for s in ("A", "G")}
        self.A, self.G, self.s = map(self._average, ("A", "G", "s"))
        self.Q_A, self.Q_G = (
            None if basis is None else completed(basis.to(dtype))
            for basis in bases.values()
        )
        values = [state[f"eigenvalues_{side}"] for side in bases]
        if any(b is not None and b.shape[-1] < b.shape[-2] for b in bases.values()):
            # A truncated basis has one entry for the whole complement.
            a, g = (places(basis) for basis in bases.values())
            values = [values[0][..., a], values[1][..., g]]
            self.s = None if self.s is None else self.s[:, g][:, :, a]
        self.eigenvalues_A, self.eigenvalues_G = values
        self.scale_factor = float(scale_factor(state["radial"]))

    def _average(self, key: str) -> Tensor | None:
        if key not in self.state:  # K-FAC has no scalings
            return None
        sum_, weight = self.state[key], self.state[f"{key}_weight"]
        basis = self.state.get(f"Q_{key}")
        if basis is not None and sum_.dim() == 2:  # stored by halves
            sum_ = unpack_symmetric(sum_.to(weight.dtype))
        return sum_ / weight if float(weight) > 0 else None

    def bytes(self) -> int:
        """Return the memory of the layer's tensors."""
        tensors = [v for v in self.state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Subject:
    """Contents of a report.

    Attributes:
        origin: File that the subject comes from.
        steps: Steps that the optimizer has done.
        layers: Curvature by layer name.
        dampings: Absolute damping of the layers that have a basis.
        groups: Options of the param groups.
        counters: Counts of the decompositions; empty if not known.
        notes: Remarks for the reader.
        optimizer: The live optimizer, or ``None``.
        model: Its model, or ``None``.
        data: Batches ``(x, y)``, or ``None``.
        loss_fn: ``(outputs, y) -> loss``, or ``None``.
        monitor: An :class:`ekfac.Monitor` with records, or ``None``.
    """

    origin: str
    steps: int
    layers: dict[str, LayerState]
    dampings: dict[str, float]
    groups: list[dict[str, Any]]
    counters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    optimizer: Any = None
    model: nn.Module | None = None
    data: Any = None
    loss_fn: Callable[..., Tensor] | None = None
    monitor: Any = None


def require_other_file(subject: Path, output: Path) -> None:
    """Raise unless a report may be written to ``output``.

    Raises:
        ReportError: If that is the report's subject, under any name.
    """
    if subject.is_file() and output.exists() and output.samefile(subject):
        raise ReportError(
            f"{str(output)!r} is what the report is about and would be lost; choose "
            "another file with --output."
        )


def read_subject(
    path: Path, *, damping_mode: DampingMode = "adaptive", arguments: Sequence[str] = ()
) -> Subject:
    """Return the subject of a checkpoint or a script.

    Args:
        path: A file that ``torch.save`` wrote of ``optimizer.state_dict()``, or of
            anything nested that contains it; or a Python script that leaves an
            ``optimizer``, and optionally ``data``, ``loss_fn`` and ``monitor``, as
            global names. Without ``optimizer`` the last KFAC or EKFAC that it stepped
            is taken. The script runs as ``__main__``, and may end in ``sys.exit``.
        damping_mode: The optimizer's, which checkpoints do not say.
        arguments: Arguments of the script.

    Raises:
        ReportError: If there is no such file, no curvature in it, a damaged
            checkpoint, or a script that ends with an error status.
    """
    if not path.is_file():
        raise ReportError(f"{str(path)!r} is no file; give a checkpoint or a script.")
    if path.suffix == ".py":
        return _of_script(path, arguments)
    return _of_checkpoint(path, damping_mode)


# -- a checkpoint ----------------------------------------------------------------------


def _of_checkpoint(path: Path, damping_mode: DampingMode) -> Subject:
    if not is_zipfile(path):
        raise ReportError(
            f"{str(path)!r} was not written by torch.save; give a checkpoint, or a "
            "script whose name ends in .py."
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError) as error:
        raise ReportError(
            f"{str(path)!r} is damaged or was not written to its end; save it again. "
            f"({_first_line(error)})"
        ) from error
    except pickle.UnpicklingError as error:
        raise ReportError(
            f"{str(path)!r} holds more than tensors and plain values; it stays closed, "
            "since opening it could run code of others. Save optimizer.state_dict() in "
            f"a file of its own. ({_first_line(error)})"
        ) from error
    states = list(_optimizer_states(saved))
    if not states:
        keys = sorted(map(str, saved)) if isinstance(saved, Mapping) else type(saved)
        raise ReportError(
            f"{str(path)!r} has no state of a KFAC or EKFAC optimizer, which has the "
            f"keys 'curvature' and 'progress'; found {keys}. Save "
            "optimizer.state_dict()."
        )
    try:
        return _of_state(path, states, damping_mode)
    except _MALFORMED as error:
        raise ReportError(
            f"{str(path)!r} has the state of an optimizer, but not as KFAC and EKFAC "
            "save it: it is of another version, or edited. Save optimizer.state_dict() "
            f"again. ({type(error).__name__}: {_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, or else its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _of_state(
    path: Path, states: Sequence[Mapping[str, Any]], damping_mode: DampingMode
) -> Subject:
    """Return the subject of the first of a checkpoint's optimizers."""
    state = states[0]
    layers = {
        name: SavedLayer(name, layer) for name, layer in state["curvature"].items()
    }
    notes = [
        "Read from a checkpoint: no data, no weights. A script that has the model and "
        "data shows more.",
        f"Checkpoints do not say the damping mode; it is taken as {damping_mode} "
        "(--damping-mode). Nor do they say how far gradients agreed: 'adaptive' is "
        "shown as if they were mostly noise.",
    ]
    if len(states) > 1:
        notes.append(f"The file has {len(states)} optimizers; this is the first.")
    groups = [_settings(group) for group in state["param_groups"]]
    if len({group["damping"] for group in groups}) > 1:
        notes.append(
            "The param groups differ in damping, and checkpoints do not say which one "
            "a layer is in: the first one's is shown for all."
        )
    ready = [layer for layer in layers.values() if layer.ready]
    damping = float(groups[0]["damping"])
    means = {layer.name: float(block_eigenvalues(layer).mean()) for layer in ready}
    dampings = {
        layer.name: absolute_damping(
            damping, means[layer.name], damping_mode, layer.scale_factor
        )
        for layer in ready
    }
    steps = int(state["progress"]["steps"])
    for layer in ready:  # a malformed state must fail here, where errors are explained
        layer_health(layer, dampings[layer.name], steps)
    return Subject(str(path), steps, dict(layers), dampings, groups, notes=notes)


def _optimizer_states(saved: Any, depth: int = 4) -> Iterator[Mapping[str, Any]]:
    """Yield the optimizer states in nested mappings and sequences."""
    if isinstance(saved, Mapping):
        if {"curvature", "progress", "param_groups"} <= set(saved):
            yield saved
            return
        saved = list(saved.values())
    if isinstance(saved, (list, tuple)) and depth:
        for item in saved:
            yield from _optimizer_states(item, depth - 1)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: group[name] for name in SHOWN_SETTINGS if name in group}
    return {n: float(v) if isinstance(v, Tensor) else v for n, v in shown.items()}


# -- a script --------------------------------------------------------------------------


def _of_script(path: Path, arguments: Sequence[str]) -> Subject:
    before = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    stepped: list[Any] = []

    def note(optimizer: Any, *_: Any) -> None:
        if hasattr(optimizer, "curvature"):
            stepped[:] = [optimizer]

    hook = register_optimizer_step_post_hook(note)
    try:
        names = _executed(path)
    finally:
        hook.remove()
        sys.argv, sys.path[:] = before
    optimizer = names.get("optimizer")
    if optimizer is None and stepped:  # local to a function of the script
        optimizer = stepped[0]
    if not hasattr(optimizer, "curvature"):
        optimizer_type = "none" if optimizer is None else type(optimizer).__name__
        raise ReportError(
            f"{str(path)!r} must leave a KFAC or EKFAC as the global name 'optimizer' "
            f"or step one, found {optimizer_type}; optionally 'data', 'loss_fn' and "
            "'monitor' as well."
        )
    notes = []
    if names.get("data") is None:
        notes.append("The script leaves no 'data': nothing is compared with them.")
    return subject_of(
        optimizer,
        origin=str(path),
        data=names.get("data"),
        loss_fn=names.get("loss_fn"),
        monitor=names.get("monitor"),
        notes=notes,
    )


def _executed(path: Path) -> dict[str, Any]:
    """Run a script as ``__main__``, which may end in ``sys.exit``; return its names."""
    module = ModuleType("__main__")
    module.__file__ = str(path)
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise ReportError(
                f"{str(path)!r} ended with status {end.code!r}; a report is made of "
                "scripts that succeed."
            ) from end
    finally:
        sys.modules["__main__"] = before
    return module.__dict__


def subject_of(
    optimizer: Any,
    *,
    origin: str = "",
    data: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    monitor: Any = None,
    notes: Sequence[str] = (),
) -> Subject:
    """Return the subject of a live optimizer."""
    dampings = {la.name: float(damping) for la, damping, _ in optimizer.dampings()}
    return Subject(
        origin=origin,
        steps=optimizer.steps,
        layers=dict(optimizer.curvature.items()),
        dampings=dampings,
        groups=[_settings(group) for group in optimizer.param_groups],
        counters=asdict(optimizer.counters),
        notes=list(notes),
        optimizer=optimizer,
        model=optimizer.model,
        data=data,
        loss_fn=loss_fn,
        monitor=monitor,
    )
