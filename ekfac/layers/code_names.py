"""Names and operators in the code of modules: which operations it may call."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType

from torch import nn

PRODUCTS = {
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "grouped_mm",
    "_grouped_mm",
    "@",
}
TABLES = {
    "embedding",
    "expand",
    "expand_as",
    "broadcast_to",
    "repeat",
    "tile",
    "cat",
    "concat",
    "add",
    "add_",
    "+",
    "+=",
    "mul",
    "*",
    "[]",
}
# Of Python 3.10; later versions say the operator itself.
_OPERATORS = {
    "BINARY_MATRIX_MULTIPLY": "@",
    "BINARY_ADD": "+",
    "INPLACE_ADD": "+=",
    "BINARY_MULTIPLY": "*",
}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "_conv_forward"}


def code_names(kind: type) -> set[str]:
    """Return the names and the operators, ``@`` and such, of a class's methods.

    Of those that no class of ``torch.nn`` itself has.
    """
    names: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, function in vars(base).items():
            if name != "__init__" and inspect.isfunction(function):
                names.update(_names_in(inspect.unwrap(function).__code__))
    return names


def _names_in(code: CodeType | None) -> Iterator[str]:
    """Yield the names and operators of a function and of those within."""
    if code is None:
        return
    yield from code.co_names
    for step in dis.get_instructions(code):
        if step.opname in ("BINARY_SUBSCR", "BINARY_SLICE"):
            yield "[]"
        elif step.opname.startswith(("BINARY", "INPLACE")):
            yield _OPERATORS.get(step.opname, step.argrepr)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names_in(inner)


def use_others(modules: Iterable[nn.Module]) -> bool:
    """Return whether some module's code multiplies with another's ``weight``."""
    for kind in {type(m) for m in modules if "weight" not in m._parameters}:
        if kind.__module__.startswith("torch.nn."):
            continue
        names = set(_names_in(getattr(inspect.unwrap(kind.forward), "__code__", None)))
        if "weight" in names and names & PRODUCTS:
            return True
    return False
