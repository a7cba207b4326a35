"""Names and operators in the code of modules: which operations it may call."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from itertools import pairwise
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
READ = ("LOAD_ATTR", "LOAD_METHOD")
# What is asked of a weight without using it.
ASKED = {"dtype", "device", "shape", "size", "dim", "requires_grad", "data", "is_meta"}
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
    """Return whether some module's forward gives another's ``weight`` to something."""
    kinds = {type(m) for m in modules if "weight" not in m._parameters}
    own = (kind for kind in kinds if not kind.__module__.startswith("torch.nn."))
    return any(_gives_weight(code) for kind in own for code in _forward_codes(kind))


def _forward_codes(kind: type) -> Iterator[CodeType]:
    """Yield the code of a class's forward and of the methods that it may call."""
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        method = inspect.unwrap(getattr(kind, waiting.pop(), None) or (lambda: None))
        if not inspect.isfunction(method):
            continue
        codes = [method.__code__]
        for code in codes:
            yield code
            codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
            waiting += [name for name in code.co_names if name not in seen]
            seen.update(code.co_names)


def _gives_weight(code: CodeType) -> bool:
    """Return whether a function takes a ``weight``, and not to ask for its type."""
    steps = [*dis.get_instructions(code)]
    return any(
        step.argval == "weight"
        and not (following.opname in READ and following.argval in ASKED)
        for step, following in pairwise(steps)
        if step.opname in READ
    )
