"""Which structure every layer of an estimate gets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from torch import nn

from ekfac.errors import UnsupportedLayerError
from ekfac.layers import Block, find_blocks
from ekfac.vectors import named_modules

Structure = Literal[
    "dense",
    "block_diagonal",
    "diagonal",
    "quasi_diagonal",
    "low_rank",
    "kfac",
    "ekfac",
    "implicit",
]
StructureChoice = Structure | Mapping[str | type[nn.Module], Structure]

RECORDED = ("kfac", "ekfac", "diagonal", "quasi_diagonal")
KRONECKER = ("kfac", "ekfac")


@dataclass
class Layout:
    """The layers of an estimate by what is done with them.

    Attributes:
        blocks: The blocks of recorded layers, with their structure.
        groups: Layer name -> (structure, parameters), for those treated by the
            gradients of single examples.
    """

    blocks: dict[Block, Structure] = field(default_factory=dict)
    groups: dict[str, tuple[Structure, list[str]]] = field(default_factory=dict)


def check_structure(structure: object, allowed: tuple[str, ...]) -> Structure:
    """Return ``structure`` if it is one of ``allowed``.

    Raises:
        ValueError: Otherwise.
    """
    if structure not in allowed:
        raise ValueError(
            f"structure must be one of {list(allowed)}, got {structure!r}."
        )
    return cast("Structure", structure)


def single_structure(structure: StructureChoice) -> Structure | None:
    """Return the structure if it is one over all parameters together."""
    if isinstance(structure, str) and structure in ("dense", "low_rank", "implicit"):
        return structure
    return None


def lay_out(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    structure: StructureChoice,
    fallback: Structure | None,
) -> Layout:
    """Return what is done with every layer.

    Args:
        model: The model.
        parameters: The chosen parameters.
        structure: One for all layers, or by layer name or type.
        fallback: Of layers without an adapter, in place of a structure that needs one.

    Raises:
        UnsupportedLayerError: If a Kronecker structure meets a layer without adapter.
        ValueError: If a mapping does not fit the model.
    """
    coverage = find_blocks(model, list(parameters.values()), 2**62)
    modules = named_modules(model)
    pick = _Picker(structure, set(modules) | {b.name for b in coverage.blocks})
    layout = Layout()
    decided: dict[str, set[Structure]] = {}
    for block in coverage.blocks:
        owner = owner_of(block.parameters[0], modules)
        found = pick(block.name, owner, block.adapter.module)
        if found in RECORDED:
            layout.blocks[block] = found
        for name in block.parameters:
            decided.setdefault(name, set()).add(found)
    _check_agree(decided)
    uncovered = {}
    for name in parameters:
        owner = owner_of(name, modules)
        found = next(iter(decided.get(name, {pick(owner, owner, modules[owner])})))
        if name in decided and found in RECORDED:
            continue
        if found in KRONECKER:
            uncovered[name] = coverage.reasons.get(name, "no adapter")
            found = "diagonal" if fallback is None else fallback
        layout.groups.setdefault(owner, (found, []))[1].append(name)
    if uncovered and fallback is None:
        listed = ", ".join(f"{name} ({why})" for name, why in uncovered.items())
        raise UnsupportedLayerError(
            f"No Kronecker structure for {listed}. Pass fallback='diagonal' (or "
            "another structure) for such layers, choose one for each with "
            "structure={layer name or type: ...}, leave them out with "
            "parameters=[...], or register an adapter with ekfac.layers.register."
        )
    pick.check_used()
    return layout


def owner_of(parameter: str, modules: Collection[str]) -> str:
    """Return the name of the module that a parameter belongs to."""
    owner = parameter.rpartition(".")[0]
    while owner not in modules:
        owner = owner.rpartition(".")[0]
    return owner


def _check_agree(decided: Mapping[str, set[Structure]]) -> None:
    """Raise if the layers inside one parameter have structures that do not mix."""
    for name, found in decided.items():
        if len(found) > 1 and not found <= {"kfac", "ekfac", "quasi_diagonal"}:
            raise ValueError(
                f"The layers that {name!r} holds were given {sorted(found)}; choose "
                "one structure for all of them."
            )


class _Picker:
    """The structure of a layer: by its name, else by the nearest of its types."""

    def __init__(self, structure: StructureChoice, names: set[str]) -> None:
        self.structure, self.names = structure, names
        self.used: set[str | type[nn.Module]] = set()
        if not isinstance(structure, str):
            allowed = tuple(name for name in get_args(Structure) if name != "implicit")
            for choice in structure.values():
                check_structure(choice, allowed)

    def __call__(self, name: str, owner: str, module: nn.Module) -> Structure:
        if isinstance(self.structure, str):
            return self.structure
        candidates: list[str | type[nn.Module]] = [name]
        while owner:
            candidates.append(owner)
            owner = owner.rpartition(".")[0]
        candidates += [t for t in type(module).__mro__ if issubclass(t, nn.Module)]
        for key in candidates:
            if key in self.structure:
                self.used.add(key)
                return self.structure[key]
        raise ValueError(
            f"structure says nothing of layer {name!r} ({type(module).__name__}); add "
            "its name or type, or torch.nn.Module for all that is left."
        )

    def check_used(self) -> None:
        """Raise for a name that the model lacks."""
        if isinstance(self.structure, str):
            return
        unknown = [
            key
            for key in self.structure
            if isinstance(key, str) and key not in self.names
        ]
        if unknown:
            raise ValueError(
                f"structure names layers that the model lacks: {unknown}; it has "
                f"{sorted(self.names - {''})}."
            )
