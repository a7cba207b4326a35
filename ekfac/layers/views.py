"""Where an operand stands in a parameter, and how gradients of operations are laid.

An operand is a parameter, a view of one, or is made of one by a function that
multiplies its derivative by a number for every row: fake quantisation and other
straight-through functions, casts, scales of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, disable_saved_tensors_hooks

from ekfac.layers.base import Adapter, Arrange

# How many nodes of the graph are between an operand and the parameter it is made of.
NEAR = 16
# Share of elements that a function may cut off, as quantisation clips the largest of a
# row. They have no gradient; the block is that of a weight without the clipping.
CLIPPED = 0.2
# Relative error of a derivative, in the parameter's or the operand's precision.
ROUNDED = 0.01

# -- views -----------------------------------------------------------------------------


def owner_of(t: Tensor) -> Tensor:
    """Return what a tensor is a view of, or itself.

    What shows all of a computed tensor with fewer dimensions counts as one itself: rows
    that were quantised in groups.
    """
    base = t._base
    if base is None:
        return t
    whole = base.numel() == t.numel() and base.dim() > t.dim() and t.is_contiguous()
    return t if whole and base.grad_fn is not None else base


def _same(size: int, stride: int, other_size: int, other: int) -> bool:
    return size == other_size and (size == 1 or stride == other)


def is_whole(view: Tensor) -> bool:
    """Return whether a view shows all of its owner as it is."""
    owner = owner_of(view)
    if view.dim() != owner.dim():
        return False
    sides = zip(view.shape, view.stride(), owner.shape, owner.stride(), strict=True)
    start = view.storage_offset() == owner.storage_offset()
    return start and all(_same(*side) for side in sides)


def _turn(view: Tensor) -> bool | None:
    """Return whether the last two dimensions are the owner's, or turned: False."""
    owner = owner_of(view)
    shape, steps = owner.shape[-2:], owner.stride()[-2:]
    mine, strides = view.shape[-2:], view.stride()[-2:]
    for straight in (True, False):
        pairs = enumerate((0, 1) if straight else (1, 0))
        if all(_same(mine[i], strides[i], shape[o], steps[o]) for i, o in pairs):
            return straight
    return None


def matrix_way(view: Tensor, adapter: Adapter) -> bool | None:
    """Return whether a tensor is an adapter's whole matrix, False if transposed.

    ``None``: it is not. Vectors of one row or column are matrices as they are.
    """
    owner, rows = owner_of(view), adapter.weight.rows
    start = owner.storage_offset()
    if rows is not None:
        start += rows[0] * owner.stride(0)
    elif owner.dim() != 2:
        return None
    if view.dim() == 3 and view.shape[0] == 1:
        view = view[0]
    if view.dim() != 2 or view.storage_offset() != start:
        return None
    return _turn(view)


def stack_way(view: Tensor, adapter: Adapter) -> bool | None:
    """Return whether a tensor is the stack of an adapter's matrix, False if turned."""
    owner = owner_of(view)
    if adapter.weight.rows is None or view.dim() != 3 or len(view) != len(owner):
        return None
    if not _same(len(view), view.stride(0), len(owner), owner.stride(0)):
        return None
    if view.storage_offset() != owner.storage_offset():
        return None
    return _turn(view)


def is_bias(t: object, adapter: Adapter) -> bool:
    """Return whether a tensor is an adapter's bias, or a cast or copy of it."""
    assert adapter.bias is not None
    bias = adapter.parameter(adapter.bias)
    if t is bias or not isinstance(t, Tensor):
        return t is bias
    if t.shape != bias.shape or t.grad_fn is None:
        return False
    source, derivative = origin(t, [bias])
    return source is bias and bool((derivative == 1).all())


def adds_bias(t: object, adapter: Adapter, lay: Arrange, result: Tensor) -> bool:
    """Return whether a tensor adds an adapter's bias to the features of a result."""
    if not isinstance(t, Tensor) or not is_bias(owner := owner_of(t), adapter):
        return False
    numbers = torch.arange(len(owner), device=owner.device)
    place = numbers.as_strided(t.shape, t.stride()).expand(result.shape)
    return bool((lay(place) == numbers).all())


def is_spread(t: Tensor) -> bool:
    """Return whether a tensor shows the same elements several times."""
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def number_of(adapter: Adapter) -> int:
    """Return the number of an adapter's matrix in its stack."""
    return 0 if adapter.weight.rows is None else adapter.weight.rows[0]


# -- functions of a parameter ----------------------------------------------------------


def origin(
    t: Tensor, parameters: Collection[nn.Parameter]
) -> tuple[nn.Parameter | None, Tensor]:
    """Return the parameter that a tensor of its shape is made of, and the derivative.

    Returns:
        With the derivative of every element in the parameter's element of the same
        place. No parameter in a region whose saved tensors are not at hand, by
        activation checkpointing.
    """
    if not _saved_elsewhere():
        near = {id(leaf) for leaf in _leaves(t)}
        for parameter in parameters:
            derivative = _derivative(t, parameter) if id(parameter) in near else None
            if derivative is not None:
                return parameter, derivative
    return None, t


def _saved_elsewhere() -> bool:
    """Return whether hooks on saved tensors are set, as activation checkpointing does.

    torch refuses to disable such hooks while there are any; torch 2.6 has no other way
    to ask.
    """
    try:
        with disable_saved_tensors_hooks("ekfac asks whether there are any"):
            return False
    except RuntimeError:
        return True


def _leaves(t: Tensor) -> list[Tensor]:
    """Return the leaves of a tensor's graph that are few nodes away."""
    waiting, leaves = [t.grad_fn], []
    seen: set[Node] = set()
    while waiting and len(seen) < NEAR:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _derivative(t: Tensor, parameter: nn.Parameter) -> Tensor | None:
    """Return ``d`` if the gradient ``h`` of a tensor is ``d h`` of the parameter.

    ``h`` has numbers of no order, which every precision has. That a derivative which
    is no product with single numbers looks like one, row by row, is as good as
    impossible: see :func:`row_factors`.
    """
    places = torch.arange(t.numel(), device=t.device).reshape(t.shape)
    h = 1 + (places * 40503 % 65536 // 8192) / 8
    hooks, parameter._backward_hooks = parameter._backward_hooks, None  # not for these
    try:
        (grad,) = torch.autograd.grad(
            t, parameter, h.to(t), retain_graph=True, allow_unused=True
        )
    finally:
        parameter._backward_hooks = hooks
    return None if grad is None else grad / h.to(grad)


def row_factors(derivative: Tensor, adapter: Adapter) -> Tensor | None:
    """Return the number that a derivative has in every place of a row, row by row.

    But for a few zeros; ``None`` if rows have several. Rows are those of the matrix, of
    the table, the output channels of kernels and the elements of vectors.
    """
    if adapter.weight.rows is not None:
        derivative = derivative[0]
    table = adapter.diagonal_input or derivative.dim() == 1
    width = derivative.shape[-1] if adapter.diagonal_input else 1
    rows = derivative.reshape(-1, width) if table else derivative.flatten(1)
    factors = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    cut = rows == 0
    equal = (rows - factors).abs() <= ROUNDED * factors.abs()
    if not bool((equal | cut).all()) or float(cut.float().mean()) > CLIPPED:
        return None
    return factors[:, 0]


# -- layouts of gradients --------------------------------------------------------------


def select(t: Tensor, e: int) -> Tensor:
    """Return the matrices ``e`` of ``[*, E, n, d]``, or what all are given."""
    if t.dim() < 3:
        return t
    return t.select(-3, e if t.shape[-3] > 1 else 0)


def selected_gradient(e: int, lay: Arrange | None, grad: Tensor) -> Tensor:
    """Return the gradient of the matrices ``e``, laid."""
    part = grad.select(-3, e)
    return part if lay is None else lay(part)


def flipped(grad: Tensor) -> Tensor:
    """Return a gradient with its last two dimensions exchanged."""
    return grad.mT


def permuted(
    at: tuple[int, int] | None, order: Sequence[int], last: int, grad: Tensor
) -> Tensor:
    """Return a part of a gradient in another order, its last dimensions as one."""
    grad = grad if at is None else grad.select(*at)
    return grad.permute(*order).flatten(-last)


def narrowed(dim: int, start: int, size: int, grad: Tensor) -> Tensor:
    """Return a part of a gradient along one dimension."""
    return grad.narrow(dim, start, size)


def scaled(x: Tensor, lay: Arrange, grad: Tensor) -> Tensor:
    """Return a gradient, laid, times a tensor."""
    return lay(grad) * x


def rows_of(rows: slice, grad: Tensor) -> Tensor:
    """Return a group's rows of a gradient."""
    return grad[rows]


def unchanged(grad: Tensor) -> Tensor:
    """Return the gradient as it is."""
    return grad


# -- arguments of operations -----------------------------------------------------------


def per_dimension(value: Any, like: Sequence[int]) -> tuple[int, ...] | str:
    """Return one number for each dimension; the name of a padding as it is."""
    if isinstance(value, str):
        return value
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(like) if len(values) == 1 else values


def letters_of(
    equation: str, operands: Sequence[Tensor]
) -> tuple[list[str], str | None]:
    """Return the letters of two operands and of the result; dots become letters."""
    left, out = equation.replace(" ", "").split("->")
    given = left.split(",")
    repeated = any(len(set(g)) < len(g) for g in (g.replace(".", "") for g in given))
    if len(given) != 2 or repeated:
        return given, None
    spare = "".join(chr(c) for c in range(0x3B1, 0x3C9))
    for i, operand in enumerate(operands):
        if "..." in given[i]:
            dots = operand.dim() - len(given[i].replace("...", ""))
            if "..." in given[1 - i] and dots:
                return given, None
            given[i] = given[i].replace("...", spare[:dots])
            out = out.replace("...", spare[:dots])
    return given, out


def parts_of(sides: Sequence[str], names: str, out: str) -> tuple[str, str]:
    """Return which side of a matrix an equation sums over and which one it makes.

    Args:
        sides: Letters of rows and columns.
        names: Letters of what the matrix is multiplied with.
        out: Letters of the result.

    Returns:
        Empty strings where a side is neither.
    """
    given, result = set(names), set(out)
    summed = [s for s in sides if given.issuperset(s) and result.isdisjoint(s)]
    made = [s for s in sides if result.issuperset(s) and given.isdisjoint(s)]
    return (summed or [""])[0], (made or [""])[0]
