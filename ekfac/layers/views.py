"""Operands of operations: their place in a parameter, and their results' gradients.

An operand is a parameter, a view of one, or a function of one whose derivative is one
number in every row: fake quantisation and other straight-through functions, casts,
scales of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, disable_saved_tensors_hooks

from ekfac.layers.base import Adapter, Arrange

# Largest number of graph nodes between an operand and the parameter it is made of.
NEAR = 16
# Largest share of elements that a function may clip, as quantisation clips the largest
# of a row. They have no gradient; the block is that of the weight without clipping.
CLIPPED = 0.2
# Relative error of a derivative, in the parameter's or the operand's precision.
ROUNDED = 0.01

# -- views -----------------------------------------------------------------------------


def owner_of(t: Tensor) -> Tensor:
    """Return the tensor that ``t`` is a view of, or ``t`` itself.

    A view of all of a computed tensor with fewer dimensions counts as a tensor of its
    own: rows that were quantised in groups.
    """
    base = t._base
    if base is None:
        return t
    whole = base.numel() == t.numel() and base.dim() > t.dim() and t.is_contiguous()
    return t if whole and base.grad_fn is not None else base


def _same(size: int, stride: int, other_size: int, other: int) -> bool:
    return size == other_size and (size == 1 or stride == other)


def is_whole(view: Tensor) -> bool:
    """Return whether a view is all of its owner, in the same order."""
    owner = owner_of(view)
    if view.dim() != owner.dim():
        return False
    sides = zip(view.shape, view.stride(), owner.shape, owner.stride(), strict=True)
    start = view.storage_offset() == owner.storage_offset()
    return start and all(_same(*side) for side in sides)


def _turn(view: Tensor) -> bool | None:
    """Return whether the last two dimensions are the owner's, False if transposed.

    ``None`` if they are neither.
    """
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

    ``None`` if it is not.
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
    """Return whether a tensor is the stack with an adapter's matrix.

    False if its matrices are transposed, ``None`` if it is not.
    """
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


def adds_bias(t: object, adapter: Adapter, arrange: Arrange, result: Tensor) -> bool:
    """Return whether a tensor adds an adapter's bias to the features of a result."""
    if not isinstance(t, Tensor) or not is_bias(owner := owner_of(t), adapter):
        return False
    numbers = torch.arange(len(owner), device=owner.device)
    place = numbers.as_strided(t.shape, t.stride()).expand(result.shape)
    return bool((arrange(place) == numbers).all())


def is_spread(t: Tensor) -> bool:
    """Return whether a tensor repeats elements in memory, as ``expand`` does."""
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
        The parameter, and the derivative of every element with respect to the
        parameter's element at the same index. ``None`` and ``t`` if there is no such
        parameter, or under activation checkpointing, which drops saved tensors.
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

    torch refuses to disable such hooks while some are set; torch 2.6 has no other test.
    """
    try:
        with disable_saved_tensors_hooks("ekfac asks whether there are any"):
            return False
    except RuntimeError:
        return True


def _leaves(t: Tensor) -> list[Tensor]:
    """Return the leaves among the :data:`NEAR` nearest nodes of a tensor's graph."""
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
    """Return the parameter's gradient over ``h``, where ``h`` is the tensor's.

    That is the derivative if it is elementwise. ``h`` has irregular values that every
    precision represents, so that the result of another derivative is practically never
    one number in every row, which :func:`row_factors` tests.
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
    """Return the number that a derivative has throughout a row, for every row.

    A few zeros do not count. ``None`` if a row has several numbers. Rows are those of a
    matrix or a table, the output channels of kernels and the elements of vectors.
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


# -- arrangements of gradients ---------------------------------------------------------


def select(t: Tensor, e: int) -> Tensor:
    """Return the matrices ``e`` of ``[*, E, n, d]``, or ``t`` if all have the same."""
    if t.dim() < 3:
        return t
    return t.select(-3, e if t.shape[-3] > 1 else 0)


def selected_gradient(e: int, arrange: Arrange | None, grad: Tensor) -> Tensor:
    """Return the gradient of the matrices ``e``, arranged."""
    part = grad.select(-3, e)
    return part if arrange is None else arrange(part)


def permuted(
    at: tuple[int, int] | None, order: Sequence[int], last: int, grad: Tensor
) -> Tensor:
    """Return a gradient with permuted dimensions, the ``last`` ones flattened.

    Args:
        at: Dimension and index to select first, or ``None``.
        order: The permutation.
        last: Number of dimensions to flatten.
        grad: The gradient.
    """
    grad = grad if at is None else grad.select(*at)
    return grad.permute(*order).flatten(-last)


def scaled(x: Tensor, arrange: Arrange, grad: Tensor) -> Tensor:
    """Return a gradient, arranged, times a tensor."""
    return arrange(grad) * x


def unchanged(grad: Tensor) -> Tensor:
    """Return the gradient as it is."""
    return grad


# -- arguments of operations -----------------------------------------------------------


def per_dimension(value: Any, like: Sequence[int]) -> tuple[int, ...] | str:
    """Return one number for each dimension of ``like``, or the name of a padding."""
    if isinstance(value, str):
        return value
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(like) if len(values) == 1 else values


def letters_of(
    equation: str, operands: Sequence[Tensor]
) -> tuple[list[str], str | None]:
    """Return the letters of two operands and of the result; dots become letters.

    ``None`` in place of the result's if the equation is of another kind.
    """
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
    """Return the side of a matrix that an equation sums over, and the one it keeps.

    Args:
        sides: Letters of rows and columns.
        names: Letters of what the matrix is multiplied with.
        out: Letters of the result.

    Returns:
        The letters of each side, an empty string if there is none.
    """
    given, result = set(names), set(out)
    summed = [s for s in sides if given.issuperset(s) and result.isdisjoint(s)]
    made = [s for s in sides if result.issuperset(s) and given.isdisjoint(s)]
    return (summed or [""])[0], (made or [""])[0]
