"""Layers in the normal form: one adapter per layer type, and their registry."""

from ekfac.layers import attention, conv, embedding, linear, norm  # noqa: F401
from ekfac.layers.base import (
    Adapter,
    Slot,
    find_adapter,
    is_sharded,
    override,
    register,
    registered_types,
)
from ekfac.layers.blocks import Block, Coverage, Use, clean, find_blocks, unwrap

__all__ = [
    "Adapter",
    "Block",
    "Coverage",
    "Slot",
    "Use",
    "clean",
    "find_adapter",
    "find_blocks",
    "is_sharded",
    "override",
    "register",
    "registered_types",
    "unwrap",
]
