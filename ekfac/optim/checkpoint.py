"""Saved state of an optimizer: its schema, and its form for torch's own checkpoints.

A state has torch's two parts, ``"state"`` and ``"param_groups"``, and two more:
``"curvature"``, the layers' statistics, and ``"progress"``, all else that a run needs
to go on bit for bit. :func:`schema_of` describes all four; it writes them, and checks
them before anything of an optimizer is changed.

The optimizer that loads a state may differ from the one that saved it:

- In ``scaling``, K-FAC's none included: factors and bases are kept, scalings start
  again from the eigenvalues. ``torch.distributed.checkpoint`` does not load a state of
  K-FAC into EKFAC.
- In intervals or ``basis_delay``: pending bases are dropped, and found when due.
- In ``storage`` or ``memory_budget``: the state is converted, except by
  ``torch.distributed.checkpoint``, which needs the same form.
- In precision: curvature is converted to the layer's, the rest to the parameter's.
- In ``direction``, damping mode, decay, grafting, ``precision`` or number of
  eigenvectors of truncated bases: its own hold from then on.

Another ``fisher``, likelihood (where it is read), ``sharing``, model, order of
parameters, ``max_dim``, or a truncated basis for a full one is refused, since the
averages mean something else.

Every entry but those of the param groups has a checksum. A state that was changed on
purpose is loaded without ``state["progress"]["checksums"]``.

``torch.distributed.checkpoint.state_dict`` keeps only ``"state"`` and
``"param_groups"`` of an optimizer's state. The first group carries the whole state
through it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ekfac.curvature import Curvature
from ekfac.curvature.distributed import Ranks
from ekfac.curvature.options import CHOICES, GROUP_OPTIONS, Options, check
from ekfac.curvature.state import OPTIONAL, Counters, LayerCurvature
from ekfac.errors import StateMismatchError, UnsupportedOperationError
from ekfac.layers.base import shard_like, whole
from ekfac.likelihoods import Likelihood
from ekfac.optim.update import in_average_type, parameters_of
from ekfac.state_schema import (
    CHECKSUMS,
    SEAL,
    Choice,
    Field,
    Items,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Record,
    Table,
    TensorField,
    Text,
    check_seal,
    described,
    entry,
    sealed,
)

FORMAT = 3  # version of a state; raised when entries change their meaning
CARRIED = "ekfac"  # entry of the first param group that carries the whole state
PLAIN = ("version", "storage", "wide", "columns")  # a layer's entries without tensors
# A layer's entries whose shape changes with the width of truncated bases.
VARYING = {"Q_A", "Q_G", "eigenvalues_A", "eigenvalues_G", "s"}
PARTS = ("state", "param_groups", "curvature", "progress")
SCHEDULED = ("param_groups",)  # parts that may be changed in a saved state


class Checkpointed(Protocol):
    """Attributes of an optimizer that its saved state needs."""

    curvature: Curvature
    options: Options
    param_groups: list[dict[str, Any]]
    state: Any

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train together, or ``None`` for this one alone."""

    def own_state(self) -> dict[str, Any]:
        """Return the curvature that this process holds, and the progress."""

    def restore(self, curvature: dict[str, Any], progress: dict[str, Any]) -> None:
        """Load what :meth:`own_state` returned."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the model."""


# -- the schema ------------------------------------------------------------------------


class _GroupOption(Field):
    """An option of a param group, with the values that the constructor allows."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, value: Any, key: str = "") -> None:
        """Raise unless the constructor would take it; a tensor has one finite value."""
        if isinstance(value, Tensor):
            TensorField((), value.dtype).check(value, key)
        elif value is not None or self.name != "kl_clip":
            Number(float).check(value, key)
        try:
            check(self.name, value)
        except ValueError as error:
            text = f"as allowed. {error}"
            raise StateMismatchError.at(key, described(value), text) from error


def made_with(options: Options) -> dict[str, Any]:
    """Return the options that decide what a saved state means."""
    reads_likelihood = options.fisher != "empirical"
    return {
        "scaling": options.scaling,
        "fisher": options.fisher,
        "likelihood": likelihood_name(options.likelihood) if reads_likelihood else None,
        "sharing": options.sharing,
        "basis_interval": options.basis_interval,
        "basis_delay": options.basis_delay,
    }


def parameter_names(optimizer: Checkpointed) -> list[str]:
    """Return the parameters' names, group by group; numbers where there is none."""
    names = {id(p): name for name, p in optimizer.named_parameters().items()}
    ordered = parameters_of(optimizer.param_groups)
    return [names.get(id(p), f"{number}") for number, p in enumerate(ordered)]


def likelihood_name(likelihood: Likelihood) -> str:
    """Return a likelihood's type and those of its attributes that can be compared."""
    plain = (int, float, str, bool, type(None))
    held = {
        name: value if isinstance(value, plain) else getattr(value, "__qualname__", "")
        for name, value in sorted(getattr(likelihood, "__dict__", {}).items())
    }
    return f"{type(likelihood).__qualname__}({held or ''})"


def schema_of(optimizer: Checkpointed, state: Any) -> Record:
    """Return the schema of an optimizer's state.

    The shapes of truncated bases are read from the state.

    Raises:
        StateMismatchError: If the state does not have them.
    """
    for part in PARTS:
        entry(state, "", part)
    progress = entry(state, "", "progress")
    Record({"steps": Number(int, 0)}, more=True).check(progress, "progress")
    groups = optimizer.param_groups
    moments = map(_moments, parameters_of(groups))
    return Record(
        {
            "curvature": optimizer.curvature.schema(
                state["curvature"], "curvature", progress["steps"]
            ),
            "param_groups": _param_groups([len(group["params"]) for group in groups]),
            "state": Table(dict(enumerate(moments))),
            "progress": _progress(optimizer, progress),
        }
    )


def _moments(parameter: Tensor) -> Record:
    """Return the schema of the state of :func:`ekfac.optim.update.adamw_directions`."""
    shape, is_complex = tuple(parameter.shape), parameter.is_complex()
    averages: dict[str, Field] = {
        "exp_avg": TensorField(shape, complex=is_complex),
        "exp_avg_sq": TensorField(shape, complex=is_complex, minimum=0),
    }
    weights = ListOf(Number(float, 0, 1), 2)
    names = tuple(averages)
    return Record({**averages, "weights": weights}, same_dtype=(names,))


def _param_groups(sizes: list[int]) -> Items:
    """Return the schema of param groups of these numbers of parameters.

    Unknown entries are allowed: schedulers keep numbers in the groups.
    """
    options: dict[str, Field] = {name: _GroupOption(name) for name in GROUP_OPTIONS}
    groups = []
    start = 0
    for size in sizes:
        numbers = Items([Choice(number) for number in range(start, start + size)])
        groups.append(Record({**options, "params": numbers}, more=True))
        start += size
    return Items(groups)


def _progress(optimizer: Checkpointed, progress: Mapping[str, Any]) -> Record:
    own, count = made_with(optimizer.options), Number(int, 0)
    advice = "Construct the optimizer as the one that was saved."
    choices: dict[str, Field] = {
        key: Choice(own[key]) for key in ("fisher", "likelihood", "sharing")
    }
    choices["scaling"] = Choice(*CHOICES["scaling"], None)  # type: ignore[arg-type]
    choices |= dict.fromkeys(("basis_interval", "basis_delay"), count)
    saved = entry(progress, "progress", "background")
    MapOf(Record({}, more=True)).check(saved, "progress.background")
    pending = {
        name: _pending(layer, saved[name], f"progress.background.{name}")
        for name, layer in optimizer.curvature.items()
        if name in saved
    }
    return Record(
        {
            "format": Choice(FORMAT),
            "made_with": Record(choices, advice=advice),
            "steps": count,
            "seed": Number(int, 0, 2**62),
            "rows": Table(dict.fromkeys(optimizer.curvature, count)),
            "counts": Maybe(ListOf(Number(float, 0), 2)),
            "noise": Maybe(Number(float, 0)),
            "background": Table(pending),
            "parameters": Items([Choice(n) for n in parameter_names(optimizer)]),
            **SEAL,
        },
        optional=SEAL,
        advice="A state of an earlier version cannot be loaded.",
    )


def _pending(layer: LayerCurvature, saved: Any, key: str) -> Record:
    """Return the schema of a pending basis of a layer."""
    count, columns = Number(int, 0), entry(saved, key, "columns")
    widths = Table(dict.fromkeys(("A", "G"), count))
    widths.check(columns, f"{key}.columns")
    counters: dict[str, Field] = {f.name: count for f in fields(Counters)}
    return Record(
        {
            "tensors": layer.update_schema(columns),
            "columns": widths,
            "counters": Record(counters),
        }
    )


def written(optimizer: Checkpointed, state: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the entries of a live state that the schema lists.

    The curvature is taken as it is: its layers have copied it by their own schemas.
    """
    schema = schema_of(optimizer, state)
    copied = {
        part: state[part] if part == "curvature" else field.write(state[part])
        for part, field in schema.fields.items()
    }
    copied["progress"][CHECKSUMS] = sealed(copied, SCHEDULED)[CHECKSUMS]
    return copied


def check_state(optimizer: Checkpointed, state: Any) -> Record:
    """Raise unless an optimizer can load a state; change nothing; return the schema.

    Raises:
        StateMismatchError: With the first entry that does not fit.
    """
    if isinstance(state, Mapping) and not {"curvature", "progress"} <= state.keys():
        raise StateMismatchError.at(
            "curvature",
            f"missing: there is no curvature (the keys: {sorted(map(str, state))})",
            "there with 'progress'",
            "It was saved by another optimizer; load what state_dict() of a KFAC or "
            "EKFAC returned.",
        )
    schema = schema_of(optimizer, state)
    schema.check(state)
    _check_kind(state)
    layers = optimizer.curvature

    def elsewhere(path: str) -> bool:
        """Return whether an entry may be missing: another rank's, or K-FAC's scalings.

        The schema has found all that a layer has to have.
        """
        part, _, rest = path.partition(".")
        name, _, key = rest.rpartition(".")
        if part != "curvature" or name not in layers:
            return False
        held = layers[name].held
        kept = held.momentum if "momentum" in key else held.scalings
        return key not in OPTIONAL or not kept

    sums = state["progress"].get(CHECKSUMS)
    check_seal(state, sums, skip=SCHEDULED, elsewhere=elsewhere)
    return schema


def _check_kind(state: Mapping[str, Any]) -> None:
    """Raise if the state of a KFAC has scalings."""
    if state["progress"]["made_with"]["scaling"] is None:
        for name, layer in state["curvature"].items():
            if "s" in layer:
                found = f"None, while layer {name!r} has scalings"
                kinds = f"one of {CHOICES['scaling']}"
                raise StateMismatchError.at("progress.made_with.scaling", found, kinds)


def converted(optimizer: Checkpointed, state: dict[str, Any]) -> dict[str, Any]:
    """Return a checked state as that of an optimizer with these options."""
    own, saved = made_with(optimizer.options), state["progress"]["made_with"]
    state = dict(state)
    if saved["scaling"] != own["scaling"]:
        state["curvature"] = {
            name: _without_scalings(layer) for name, layer in state["curvature"].items()
        }
    if any(saved[key] != own[key] for key in ("basis_interval", "basis_delay")):
        state["progress"] = {**state["progress"], "background": {}}
    return state


def _without_scalings(layer: Mapping[str, Any]) -> dict[str, Any]:
    rest = {k: value for k, value in layer.items() if k not in ("s", "s_weight")}
    return {**rest, "version": {**layer["version"], "scalings": 0}}


# -- torch.distributed.checkpoint ------------------------------------------------------


class DistributedState:
    """An optimizer as ``torch.distributed.checkpoint`` saves and loads it.

    A state that some ranks saved loads on any number of ranks, whatever part of it each
    holds::

        weights = model.state_dict()
        state = {"model": weights, "optimizer": DistributedState(optimizer)}
        dcp.save(state, checkpoint_id=folder)
        dcp.load(state, checkpoint_id=folder)  # of a new model and optimizer
        model.load_state_dict(weights)

    One rank that holds a tensor saves it; parameters go by their names in the model.
    Truncated bases load with as many eigenvectors as were saved.

    Args:
        optimizer: A KFAC or EKFAC, constructed on all ranks for the same model.
    """

    def __init__(self, optimizer: Checkpointed) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return copies of what this rank holds; all ranks must call this.

        Returns:
            ``"curvature"``: tensors, or bytes, by layer and key. ``"rest"``: bytes.
        """
        optimizer, parameters = self.optimizer, self._parameters()
        moments = {
            number: {
                k: whole(v) if isinstance(v, Tensor) else v for k, v in own.items()
            }
            for number, parameter in enumerate(parameters.values())
            if (own := optimizer.state.get(parameter, {}))
        }
        numbers = iter(range(len(parameters)))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]}
            for group in optimizer.param_groups
        ]
        state = {"state": moments, "param_groups": groups, **optimizer.own_state()}
        state = written(optimizer, state)
        curvature, progress = state["curvature"], state["progress"]
        plain = {
            name: {key: layer.pop(key) for key in PLAIN if key in layer}
            for name, layer in curvature.items()
        }
        # torch's checkpoint may read tensors into single precision.
        wide = {
            name: {key: tensor.cpu() for key, tensor in layer.items()}
            for name, layer in curvature.items()
            if plain[name]["wide"]
        }
        for name, layer in curvature.items():
            if optimizer.curvature[name].truncated:
                # Bytes load whatever shape the tensors have when they are loaded.
                kept = VARYING & layer.keys()
                layer.update({key: _to_bytes(layer[key].cpu()) for key in kept})
        if optimizer.ranks is not None:
            sums = progress[CHECKSUMS]
            own = progress["background"], sums, wide
            for background, others, held in optimizer.ranks.agree(own):
                progress["background"] |= background
                for path, other in others.items():
                    sums[path] = sorted({*sums.get(path, ()), *other})
                wide = {name: layer | held[name] for name, layer in wide.items()}
        names = list(parameters)
        for group in state["param_groups"]:
            group["params"] = [names[number] for number in group["params"]]
        rest = {
            "layers": plain,
            "wide": wide,
            "progress": progress,
            "groups": state["param_groups"],
            "state": {names[number]: own for number, own in state["state"].items()},
        }
        return {"curvature": curvature, "rest": _to_bytes(rest)}

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name, group by group."""
        ordered = parameters_of(self.optimizer.param_groups)
        return dict(zip(parameter_names(self.optimizer), ordered, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what was saved, or change nothing and raise, on all ranks.

        Raises:
            StateMismatchError: If it is the state of another model or optimizer.
        """
        optimizer, refusal = self.optimizer, None
        try:
            state = self._unpacked(state_dict)
            check_state(optimizer, state)
        except StateMismatchError as error:
            refusal = error
        if optimizer.ranks is not None:
            every = optimizer.ranks.agree(None if refusal is None else str(refusal))
            for rank, text in enumerate(every):
                if refusal is None and text is not None:
                    refusal = StateMismatchError(f"rank {rank} refuses: {text}")
        if refusal is not None:
            raise refusal
        state = converted(optimizer, state)
        for group, saved in zip(
            optimizer.param_groups, state["param_groups"], strict=True
        ):
            group.update({k: v for k, v in saved.items() if k != "params"})
        optimizer.state.clear()
        take_moments(optimizer, state["state"])
        optimizer.restore(state["curvature"], state["progress"])

    def _unpacked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state in the form that :func:`check_state` takes.

        Raises:
            StateMismatchError: If the parts that were saved as bytes cannot be read.
        """
        saved_layers = entry(state_dict, "", "curvature")
        rest = _from_bytes(entry(state_dict, "", "rest"), "rest")
        Record(
            {
                "layers": MapOf(Record({}, more=True)),
                "wide": MapOf(Record({}, more=True)),
                "progress": Record({}, more=True),
                "groups": ListOf(Record({"params": ListOf(Text())}, more=True)),
                "state": MapOf(Record({}, more=True)),
            }
        ).check(rest, "rest")
        MapOf(Record({}, more=True)).check(saved_layers, "curvature")
        numbers = {name: n for n, name in enumerate(self._parameters())}
        curvature, layers = {}, self.optimizer.curvature
        for name, plain in rest["layers"].items():  # in the order of their refreshes
            layer = {
                key: _from_bytes(value, f"curvature.{name}.{key}")
                for key, value in saved_layers.get(name, {}).items()
            }
            if name in rest["wide"]:
                layer |= {k: v for k, v in rest["wide"][name].items() if k in layer}
            elif name in layers and layers[name].wide:  # and was not when it was saved
                layer = {k: v.float() if _is_double(v) else v for k, v in layer.items()}
            curvature[name] = layer | plain
        return {
            "state": {numbers.get(name, name): m for name, m in rest["state"].items()},
            "param_groups": [
                {**g, "params": [numbers.get(name, name) for name in g["params"]]}
                for g in rest["groups"]
            ],
            "curvature": curvature,
            "progress": rest["progress"],
        }


def take_moments(optimizer: Checkpointed, moments: Mapping[int, Any]) -> None:
    """Load the parameters' AdamW averages, in the averages' own type."""
    parameters = parameters_of(optimizer.param_groups)
    for number, own in moments.items():
        like = parameters[number]
        optimizer.state[like] = {
            key: shard_like(in_average_type(value, like), like)
            if isinstance(value, Tensor)
            else value
            for key, value in own.items()
        }


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
    """Return torch's own state of an optimizer; its first group carries the whole.

    All ranks must call this.
    """
    groups: list[dict[str, Any]] = [dict(group) for group in state["param_groups"]]
    groups[0][CARRIED] = DistributedState(optimizer).state_dict()
    # torch refuses parameters without an entry when it loads.
    entries: dict[int, Any] = {n: {} for group in groups for n in group["params"]}
    return {"state": entries, "param_groups": groups}


def carried(state: Mapping[str, Any]) -> Any:
    """Return the state that :func:`carry` put into a state, ``None`` if it did not."""
    groups = state.get("param_groups")
    first = groups[0] if isinstance(groups, list) and groups else None
    return first.get(CARRIED) if isinstance(first, Mapping) else None


def _is_double(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def _to_bytes(value: Any) -> bytes:
    """Return tensors and plain values as bytes, which a checkpoint does not divide."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _from_bytes(value: Any, key: str) -> Any:
    """Return what :func:`_to_bytes` made bytes of; anything else as it is.

    Raises:
        StateMismatchError: If they cannot be read.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return torch.load(io.BytesIO(value), weights_only=True)
    except (RuntimeError, EOFError, KeyError, ValueError, UnpicklingError) as error:
        found = f"damaged ({type(error).__name__})"
        raise StateMismatchError.at(key, found, "what torch.save writes") from error


@contextmanager
def hooks_taken(optimizer: Optimizer, name: str) -> Iterator[list[Callable[..., Any]]]:
    """Yield hooks of torch's ``Optimizer``, which are removed inside the block.

    It would call them too early.
    """
    hooks = getattr(optimizer, name)
    setattr(optimizer, name, type(hooks)())
    try:
        yield list(hooks.values())
    finally:
        setattr(optimizer, name, hooks)
