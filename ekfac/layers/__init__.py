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
from ekfac.layers.blocks import Block, ConvFactors, Coverage, Use, find_blocks
from ekfac.layers.recognised import find_adapter

__all__ = [
    "Adapter",
    "Block",
    "ConvFactors",
    "Coverage",
    "Shortcuts",
    "Slot",
    "Use",
    "find_adapter",
    "find_blocks",
    "find_shortcuts",
    "is_sharded",
    "override",
    "register",
    "shortcuts_for",
]
