"""Layers in the normal form: one adapter per layer type, and their registry."""

from ekfac.layers import attention, conv, embedding, linear, norm, recurrent  # noqa: F401
from ekfac.layers.base import (
    Adapter,
    Slot,
    is_sharded,
    override,
    register,
)
from ekfac.layers.blocks import Block, Coverage, Use, find_blocks
from ekfac.layers.recognised import find_adapter
from ekfac.layers.shortcuts import Shortcuts, find_shortcuts, shortcuts_for

__all__ = [
    "Adapter",
    "Block",
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
