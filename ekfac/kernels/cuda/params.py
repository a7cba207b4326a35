"""Structs of launch parameters: parts that several kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_void_p
from functools import cache

Field = tuple[str, type]


def fields(kind: type, names: str) -> list[Field]:
    """Return fields of one type, of a space-separated list of names."""
    return [(name, kind) for name in names.split()]


# A problem's place among the pieces of work of its launch, and its factors.
WORK = [*fields(c_int, "first first_tile"), *fields(c_float, "alpha beta")]


@cache
def table(
    problem: type[ctypes.Structure],
    limit: int,
    before: tuple[Field, ...] = (),
    after: tuple[Field, ...] = (),
) -> type[ctypes.Structure]:
    """Return the type of a kernel's ``Params`` that holds up to ``limit`` problems.

    Args:
        problem: Type of one problem.
        limit: How many there can be.
        before: The kernel's own fields before the pointer ``parts``.
        after: And after it.
    """
    lead = [("count", c_int), ("padding", c_int), *before, ("parts", c_void_p), *after]
    every = [*lead, ("problem", problem * limit)]
    return type(f"{problem.__name__}s", (ctypes.Structure,), {"_fields_": every})


def fill(
    problems: Sequence[ctypes.Structure],
    limit: int,
    before: tuple[Field, ...] = (),
    after: tuple[Field, ...] = (),
    **values: object,
) -> ctypes.Structure:
    """Return the parameters of one launch.

    Args:
        problems: At least one and at most ``limit``, of one type.
        limit: How many there could be.
        before: The kernel's own fields before ``parts``, see :func:`table`.
        after: And after it.
        **values: Of all fields but the count and the problems.
    """
    kind = type(problems[0])
    params = table(kind, limit, before, after)(count=len(problems), **values)
    params.problem[: len(problems)] = list(problems)
    return params
