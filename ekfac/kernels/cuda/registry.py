"""All kernels, their variants and their operators."""

from __future__ import annotations

from ekfac.kernels.cuda import (
    counts,
    diagonal,
    gram,
    jacobi,
    precondition,
    scalings,
    squares,
)
from ekfac.kernels.cuda.kernel import Kernel, MapOperator, SumOperator
from ekfac.kernels.cuda.launch import Engine
from ekfac.kernels.cuda.nvrtc_sources import FEW, Variant

KERNELS: dict[str, Kernel] = {
    kernel.source: kernel
    for kernel in (
        gram.KERNEL,
        scalings.KERNEL,
        diagonal.KERNEL,
        counts.KERNEL,
        squares.KERNEL,
        precondition.KERNEL,
        jacobi.KERNEL,
    )
}
SUMS: dict[str, SumOperator] = {
    operator.name: operator
    for operator in (
        *gram.OPERATORS,
        *diagonal.OPERATORS,
        *counts.OPERATORS,
        *scalings.OPERATORS,
    )
}
MAPS: dict[str, MapOperator] = {
    operator.name: operator
    for operator in (*precondition.OPERATORS, *squares.OPERATORS)
}


def every_variant(problems: int = FEW) -> list[Variant]:
    """Return all variants that the kernels can ask for.

    Args:
        problems: Layers of one launch, ``FEW`` or ``MANY``.
    """
    return [one for kernel in KERNELS.values() for one in kernel.variants(problems)]


def error_of(engine: Engine, variant: Variant) -> float:
    """Return the relative error of a loaded variant on a small problem."""
    return KERNELS[variant.source].check(engine, variant)
