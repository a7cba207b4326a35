"""The kernels' parameters, as ``csrc/`` declares them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import cache

Fields = list[tuple[str, type]]


def _fields(kind: type, names: str) -> Fields:
    return [(name, kind) for name in names.split()]


class Source(ctypes.Structure):
    """Where plain rows lie; ``Source`` of ``tiles.cuh``."""

    _fields_ = [
        ("data", c_void_p),
        *_fields(c_longlong, "stride_n stride_block stride_feature"),
        *_fields(c_int, "features bias layout unused"),
        ("stride_s", c_longlong),
    ]


class PatchSource(ctypes.Structure):
    """Where patches lie; ``Source`` of ``tiles.cuh`` with ``PATCHES``."""

    _fields_ = [
        ("data", c_void_p),
        *_fields(c_longlong, "stride_n stride_block stride_feature"),
        *_fields(c_int, "features bias layout channels"),
        ("stride", c_longlong * 3),
        *_fields(c_int * 3, "size out kernel step pad dilation"),
    ]


_WORK = [*_fields(c_int, "first first_tile"), *_fields(c_float, "alpha beta")]


def _gram_fields(source: type) -> Fields:
    return [
        ("x", source),
        *_fields(c_void_p, "weight out"),
        *_fields(c_longlong, "out_block out_row"),
        *_fields(c_int, "positions rows blocks tiles splits steps"),
        *_WORK,
    ]


class GramProblem(ctypes.Structure):
    """``Problem`` of ``gram.cu``."""

    _fields_ = _gram_fields(Source)


class PatchGramProblem(ctypes.Structure):
    """``Problem`` of ``gram.cu`` with ``PATCHES``."""

    _fields_ = _gram_fields(PatchSource)


class ScalingsProblem(ctypes.Structure):
    """``Problem`` of ``scalings.cu``."""

    _fields_ = [
        *_fields(Source, "g a"),
        ("out", c_void_p),
        *_fields(c_longlong, "out_block out_row"),
        *_fields(c_int, "examples positions blocks tiles_g tiles_a splits share"),
        *_WORK,
    ]


class DiagonalProblem(ctypes.Structure):
    """``Problem`` of ``diagonal.cu``."""

    _fields_ = [
        *_fields(c_void_p, "x weight out"),
        *_fields(c_longlong, "stride_n stride_s stride_block stride_feature"),
        ("out_block", c_longlong),
        *_fields(c_int, "positions rows blocks features bias chunks"),
        *_fields(c_int, "splits share lanes"),
        *_WORK,
    ]


class PreconditionProblem(ctypes.Structure):
    """``Problem`` of ``precondition.cu``."""

    _fields_ = [
        *_fields(c_void_p, "u s damping"),
        *_fields(c_longlong, "u_block u_row s_block s_row"),
        *_fields(c_int, "rows columns elements first pieces"),
    ]


class SquaresProblem(ctypes.Structure):
    """``Problem`` of ``squares.cu``."""

    _fields_ = [
        *_fields(c_void_p, "s u scale"),
        *_fields(c_longlong, "s_block s_row u_block u_row"),
        *_fields(c_int, "rows columns elements first pieces"),
    ]


class CountsProblem(ctypes.Structure):
    """``Problem`` of ``counts.cu``."""

    _fields_ = [
        *_fields(c_void_p, "index weight out"),
        *_fields(c_longlong, "stride_n stride_s bins"),
        *_fields(c_int, "positions rows size"),
        *_WORK,
    ]


class JacobiParams(ctypes.Structure):
    """``Params`` of ``jacobi.cu``."""

    _fields_ = [
        *_fields(c_void_p, "matrix vectors"),
        *_fields(c_int, "n count"),
    ]


@cache
def table(problem: type[ctypes.Structure], limit: int) -> type[ctypes.Structure]:
    """Return the type of a kernel's ``Params`` that holds up to ``limit`` problems."""
    lead: Fields = [("count", c_int), ("padding", c_int)]
    if problem is PreconditionProblem:
        lead += [("power", c_float), ("unused", c_int)]
    lead += [("parts", c_void_p)]
    if problem in (PreconditionProblem, SquaresProblem):
        lead += [("sums", c_void_p)]
    fields = [*lead, ("problem", problem * limit)]
    return type(f"{problem.__name__}s", (ctypes.Structure,), {"_fields_": fields})


def fill(
    problems: Sequence[ctypes.Structure], limit: int, **values: object
) -> ctypes.Structure:
    """Return the parameters of one launch.

    Args:
        problems: At least one and at most ``limit``, of one type.
        limit: How many there could be.
        **values: Further fields.
    """
    kind = type(problems[0])
    params = table(kind, limit)(count=len(problems), **values)
    params.problem[: len(problems)] = list(problems)
    return params
