"""Layers in the normal form: one adapter per layer type, and their registry."""

from ekfac.layers import attention, conv, linear, norm, recurrent  # noqa: F401
from ekfac.layers.base import (
    Adapter,
    Shortcuts,
    Slot,
    find_shortcuts,
    is_sharded,
    override,
    register,
    shortcuts_for,
)
from ekfac.layers.blocks import (
    Block,
    ConvFactors,
    Coverage,
    Places,
    Structure,
    Use,
    find_blocks,
    places,
)
from ekfac.layers.recognised import find_adapter

__all__ = [
    "Adapter",
    "Block",
    "ConvFactors",
    "Coverage",
    "Places",
    "Shortcuts",
    "Slot",
    "Structure",
    "Use",
    "find_adapter",
    "find_blocks",
    "find_shortcuts",
    "is_sharded",
    "override",
    "places",
    "register",
    "shortcuts_for",
]
