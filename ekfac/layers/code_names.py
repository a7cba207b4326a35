"""Names and operators in the code of modules: the operations that it may call."""

from __future__ import annotations

import dis
import inspect
import re
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
    "multi_head_attention_forward",
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
# Opcodes of Python 3.10; later versions have the operator as an argument.
_OPERATORS = {
    "BINARY_MATRIX_MULTIPLY": "@",
    "BINARY_ADD": "+",
    "INPLACE_ADD": "+=",
    "BINARY_MULTIPLY": "*",
}
READ = ("LOAD_ATTR", "LOAD_METHOD")
# Attributes of a weight that are read without using its values.
ASKED = {"dtype", "device", "shape", "size", "dim", "requires_grad", "data", "is_meta"}
PLAIN = {"F", "torch", "nn", "functional", "linear", "weight", "bias"}
EQUATION = re.compile(r"[a-zA-Z. ]+,[a-zA-Z. ]+->[a-zA-Z. ]+")
NEARBY = 5  # instructions from a parent's name, super(Class, self), to its method
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "_conv_forward"}


def code_names(kind: type) -> set[str]:
    """Return the names and the operators, such as ``@``, of a class's methods.

    For lists of parameters, which other modules use, return all operations.
    """
    if issubclass(kind, nn.ParameterList | nn.ParameterDict):
        return PRODUCTS | TABLES
    return {name for code in _methods(kind) for name in _names_in(code)}


def equations(kind: type) -> set[str]:
    """Return the ``einsum`` equations of two operands in a class's methods."""
    texts = {text for code in _methods(kind) for text in _texts_in(code)}
    return {text.replace(" ", "") for text in texts if EQUATION.fullmatch(text)}


def _methods(kind: type) -> Iterator[CodeType]:
    """Yield the code of a class's methods, without those of ``nn.Module``."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, function in vars(base).items():
            if name != "__init__" and inspect.isfunction(function):
                yield inspect.unwrap(function).__code__


def _texts_in(code: CodeType) -> Iterator[str]:
    """Yield the strings among the constants of a function and of those within."""
    for value in code.co_consts:
        if isinstance(value, str):
            yield value
        elif isinstance(value, CodeType):
            yield from _texts_in(value)


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names and operators of a function and of those within."""
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
    """Return whether some module uses a layer of another in a way that hooks miss.

    Its forward reads another's ``weight``, or calls another's ``forward``.
    """
    kinds = {type(m) for m in modules if "weight" not in m._parameters}
    own = (kind for kind in kinds if not kind.__module__.startswith("torch.nn."))
    return any(_uses_another(code) for kind in own for code in _forward_codes(kind))


def is_plain_linear(kind: type) -> bool:
    """Return whether a class's forward is ``F.linear`` of its weight alone."""
    forward = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    return inspect.isfunction(forward) and PLAIN.issuperset(forward.__code__.co_names)


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


def _uses_another(code: CodeType) -> bool:
    """Return whether a function reads a ``weight`` or calls a ``forward``.

    Reading the weight's dtype and the like does not count, nor does the forward of the
    parent class.
    """
    steps = [*dis.get_instructions(code)]
    for i, (step, following) in enumerate(pairwise(steps)):
        if step.opname not in READ:
            continue
        asks = following.opname in READ and following.argval in ASKED
        if step.argval == "weight" and not asks:
            return True
        before = {earlier.argval for earlier in steps[max(0, i - NEARBY) : i]}
        if step.argval == "forward" and "super" not in before:
            return True
    return False
