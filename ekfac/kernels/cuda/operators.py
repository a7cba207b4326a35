"""The operators of ``torch.ops.ekfac``: schemas, references, fakes.

All write in place, on the current stream, without asking the device for a number. A
launch is tried first, see :mod:`ekfac.kernels.cuda.dispatch`; what cannot have one is
done by the reference. Schemas and references are in the kernels' own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ekfac.kernels.cuda import dispatch, registry
from ekfac.kernels.cuda.kernel import MapOperator, SumOperator

LIBRARY = torch.library.Library("ekfac", "DEF")


def run_(name: str, items: Sequence[Any]) -> None:
    """Do what the operator ``name`` does, for items of one device."""
    operator = registry.SUMS[name]
    launched = dispatch.run_sums(operator, items)
    for item, done in zip(items, launched, strict=True):
        if not done:
            operator.reference_(item)


def _register_sum(operator: SumOperator) -> None:
    """Register an operator that returns nothing."""

    def everywhere(*arguments: object) -> None:
        run_(operator.name, operator.prepare(*arguments))

    def fake(*arguments: object) -> None:
        operator.prepare(*arguments)

    _register(operator, everywhere, fake)


def _register_map(operator: MapOperator) -> None:
    """Register an operator that returns sums of every layer."""

    def everywhere(
        first: Sequence[Tensor], second: Sequence[Tensor], rows: Tensor, *values: float
    ) -> Tensor:
        columns = zip(first, second, rows.unbind(), strict=True)
        layers = [operator.layer(*column) for column in columns]
        if not layers:
            return rows.new_empty(0, *operator.sums)
        sums = dispatch.run_map(operator, layers, *values)
        if sums is not None:
            return sums
        return torch.stack([operator.reference_(layer, *values) for layer in layers])

    def fake(
        first: Sequence[Tensor], second: Sequence[Tensor], rows: Tensor, *values: float
    ) -> Tensor:
        return rows.new_empty(len(first), *operator.sums)

    _register(operator, everywhere, fake)


def _register(operator: SumOperator | MapOperator, everywhere: Any, fake: Any) -> None:
    LIBRARY.define(f"{operator.name}{operator.schema}")
    LIBRARY.impl(operator.name, everywhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ekfac::{operator.name}", fake, lib=LIBRARY)


for _sum in registry.SUMS.values():
    _register_sum(_sum)
for _map in registry.MAPS.values():
    _register_map(_map)
