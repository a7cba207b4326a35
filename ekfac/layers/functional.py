"""Weights that are operands of known operations, wherever those are called.

Routers and fused experts of mixtures, class tokens, position embeddings, tables of
relative positions and layers of one's own hold a parameter and give it to an operation.
A :class:`TorchFunctionMode` sees the operations of a forward pass whose statistics are
taken, and reports those that have such a weight, or a view of it, as an operand:

- ``linear``, ``matmul``, ``@``, ``mm``, ``addmm``: one matrix, as it is or transposed;
- ``bmm``, ``matmul``, ``baddbmm``, ``einsum``, ``grouped_mm``: a stack of matrices
  ``[E, *, *]``, each a block; a single matrix of a stack too;
- ``conv1d`` to ``conv3d``;
- ``embedding``, ``[]``, ``+``, ``*``, ``cat``, ``expand``, ``repeat``: rows of a table.

Which parameters become blocks, and of which form, is decided by their shape and by the
names and operators in the code of their module; statistics come from what is called. A
weight that is never seen there is trained by its diagonal, with a warning at the step.
The weights of ``nn.Linear`` and ``nn.Embedding`` are watched too if another module's
code uses a ``weight`` in such operations: a head ``linear(x, embedding.weight)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode

from ekfac.layers.base import (
    Adapter,
    Arrange,
    CallForm,
    FunctionalAdapter,
    Report,
    Slot,
    shortcuts_for,
)
from ekfac.layers.code_names import CONVOLUTIONS, PRODUCTS, TABLES, code_names
from ekfac.layers.conv import ConvAdapter, ConvShortcuts
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter, positions

Conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class OperandAdapter(FunctionalAdapter):
    """A weight that operations are given; its kind is one of the subclasses."""

    costly = True

    def __init__(self, module: nn.Module, weight: Slot, bias: Slot | None = None):
        super().__init__(module)
        self.weight, self.bias = weight, bias

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse nothing: the code of the module has been looked at."""
        return None

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the blocks by the parameters' names, and their numbers in a stack."""
        blocks: dict[str, Adapter] = {}
        for name, kind in operands(module).items():
            parameter = module._parameters[name]
            assert parameter is not None
            suffix = "" if name == "weight" else name
            if kind is StackedAdapter:
                for i in range(len(parameter)):
                    blocks[f"{name}.{i}"] = kind(module, Slot(name, (i, i + 1)))
                continue
            bias = None
            if kind is FunctionalConvAdapter and isinstance(module, Conv):
                bias = None if module.bias is None else Slot("bias")
            blocks[suffix] = kind(module, Slot(name), bias)
        return blocks

    @classmethod
    def tap(
        cls,
        module: nn.Module,
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        report: Report,
    ) -> OperationTap:
        """Return what reports the operations of one call."""
        return OperationTap(adapters, report)


class FunctionalLinearAdapter(OperandAdapter, LinearAdapter):
    """A matrix ``[d_out, d_in]``; products with its transpose change the roles."""


class StackedAdapter(FunctionalLinearAdapter):
    """One matrix of a stack ``[E, d_out, d_in]``."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d_out, d_in]`` as it is."""
        return weight

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``[1, d_out, d_in]`` as it is."""
        return matrix, None


class FunctionalConvAdapter(OperandAdapter, ConvAdapter):
    """Kernels ``[C_out, C_in / groups, *kernel]``; a call says stride and padding."""

    def __init__(self, module: nn.Module, weight: Slot, bias: Slot | None = None):
        super().__init__(module, weight, bias)
        if not isinstance(module, Conv):
            _, channels, *kernel = self.parameter(weight).shape
            self.settings = SimpleNamespace(
                kernel_size=tuple(kernel), groups=1, in_channels=channels
            )


class TableAdapter(OperandAdapter, EmbeddingAdapter):
    """Rows ``[*, d]`` that operations take by index or add to a sequence."""

    def __init__(self, module: nn.Module, weight: Slot, bias: Slot | None = None):
        EmbeddingAdapter.__init__(self, module)
        self.weight, self.bias = weight, None
        if not isinstance(module, nn.Embedding):
            self.padding_idx = None

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[1, d, rows]``."""
        return super().pack(weight.reshape(-1, weight.shape[-1]), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rows in the parameter's shape."""
        rows, bias = super().unpack(matrix)
        return rows.reshape(self.parameter(self.weight).shape), bias


class DenseCall(CallForm, LinearAdapter):
    """A product with a block's matrix, whatever the block's adapter is."""


class OneHotCall(CallForm, LinearAdapter):
    """Rows of a matrix taken by index: a product of its transpose with one-hots."""

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``[N, S, 1, d_out]`` of indices ``[N, *]``."""
        rows = self.of.matrix_shape()[1]
        return positions(F.one_hot(x.long(), rows).to(x.dtype))


class ConvCall(CallForm, ConvAdapter):
    """A convolution with the settings of one call."""

    def __init__(self, of: ConvAdapter, settings: Any) -> None:
        CallForm.__init__(self, of)
        self.settings = settings


shortcuts_for(ConvCall)(ConvShortcuts)


class OperationTap(TorchFunctionMode):
    """Reports the operations that the given weights are operands of.

    Args:
        adapters: Of the weights. Of an ``nn.Linear`` and an ``nn.Embedding``, what
            their own forward does is left to hooks.
        report: Is told of every call.
    """

    def __init__(self, adapters: Sequence[Adapter], report: Report) -> None:
        super().__init__()
        self.adapters, self.report = adapters, report
        # Parameters -> adapters of their blocks; ids of other parameters.
        self.known: dict[int, list[Adapter]] = {}
        self.others: set[int] = set()
        # What has been reported when it was spread; the last product without its bias.
        self.spread: list[Tensor] = []
        self.unbiased: tuple[Tensor, Adapter, Tensor, Arrange] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` and report it, if it is one of those that are known."""
        result = func(*args, **(kwargs or {}))
        tell = _HANDLERS.get(func)
        if tell is None and "grouped_mm" in getattr(func, "__name__", ""):
            tell = _HANDLERS[func] = OperationTap.grouped
        if tell is not None and isinstance(result, Tensor) and result.requires_grad:
            given = (*args, *(kwargs or {}).values())
            if self.unbiased is not None or self.concerned(given):
                self.handle(tell, args, kwargs or {}, result)
        return result

    def concerned(self, given: Iterable[Any]) -> bool:
        """Return whether some argument is a known parameter or a view of one."""
        return any(
            self.concerned(x) if isinstance(x, list | tuple) else bool(self.users(x))
            for x in given
        )

    @_disable_dynamo
    def handle(self, tell: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        """Report one operation, if it has a known weight."""
        tell(self, result, *args, **kwargs)

    def users(self, t: object) -> Sequence[Adapter]:
        """Return the adapters of the parameter that a tensor is, or is a view of."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return ()
        owner = t if t._base is None else t._base
        if not isinstance(owner, nn.Parameter):
            return ()
        number = id(owner)
        if number not in self.known and number not in self.others:
            # Sharded modules have their whole parameters while they run alone.
            self.others.add(number)
            for adapter in self.adapters:
                if adapter.parameter(adapter.weight) is owner:
                    self.known.setdefault(number, []).append(adapter)
        return self.known.get(number, ())

    # -- products ----------------------------------------------------------------------

    def linear(
        self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        """Report ``x W^T + b``."""
        self.product(result, input, weight, turned=True, bias=bias)

    def matmul(
        self, result: Tensor, input: Any, other: Any = None, **named: Any
    ) -> None:
        """Report ``x W`` and ``W x``, of matrices and stacks of them."""
        other = other if other is not None else named.get("mat2", named.get("vec"))
        if other is None:
            return
        self.product(result, input, other)
        if self.users(input) and other.dim() == 1:
            self.product(result, other, input, turned=True)
        elif self.users(input):  # (W x)^T = x^T W^T
            self.product(result, other.mT, input, turned=True, lay=_flipped)

    def rmatmul(self, result: Tensor, input: Any, other: Any) -> None:
        """Report ``other @ input``."""
        self.matmul(result, other, input)

    def addmm(
        self, result: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any
    ) -> None:
        """Report ``b + x W`` or ``b + W x``, unless it is scaled."""
        if scales.get("alpha", 1) == 1:
            self.matmul(result, mat1, mat2)

    def product(
        self,
        result: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        turned: bool = False,
        bias: Tensor | None = None,
        lay: Arrange | None = None,
    ) -> None:
        """Report ``x W``, or ``x W^T`` if the weight is given ``turned``."""
        for adapter in self.users(weight):
            way = matrix_way(weight, adapter)
            stack = stack_way(weight, adapter) if way is None else None
            if way is None and stack is None:
                continue
            if stack is None:
                self.tell(adapter, way is turned, x, result, lay or _unchanged, bias)
                continue
            e = _number(adapter)
            part = partial(_selected_gradient, e, lay)
            self.tell(adapter, stack is turned, _select(x, e), result, part, bias)

    def tell(
        self,
        adapter: Adapter,
        as_it_is: bool,
        x: Tensor,
        result: Tensor,
        arrange: Arrange,
        bias: Tensor | None = None,
    ) -> None:
        """Report a product with the packed matrix of a block, or with its transpose.

        Args:
            adapter: The block's.
            as_it_is: The product is ``x W^T``, with ``W`` as the parameter has it.
            x: ``[N, *, d]``.
            result: The operation's.
            arrange: Lays its gradient.
            bias: What the operation adds itself.
        """
        if x.is_nested or not x.is_floating_point():
            return
        if adapter.diagonal_input:  # its matrix is the transpose of the parameter
            if as_it_is:
                self.report(DenseCall(adapter, True), x, result, arrange, None)
            return
        if not isinstance(adapter, LinearAdapter):
            return
        if adapter.bias is None or not as_it_is:
            if adapter.bias is None:
                form = adapter if as_it_is else DenseCall(adapter, True)
                self.report(form, x, result, arrange, None)
            return
        if bias is adapter.parameter(adapter.bias):
            self.report(adapter, x, result, arrange, None)
        elif bias is None:
            self.unbiased = result, adapter, x, arrange

    def grouped(
        self,
        result: Tensor,
        input: Tensor,
        weight: Tensor,
        offs: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Report ``x W[i]`` of every group ``i`` of rows, which follow one another."""
        members = self.users(weight)
        if not members or offs is None:
            return
        ends = [0, *offs.tolist()]
        for adapter in members:
            way = stack_way(weight, adapter)
            if way is None:
                continue
            i = _number(adapter)
            rows = slice(ends[i], ends[i + 1])
            if rows.start < rows.stop:
                lay = partial(_rows_of, rows)
                self.tell(adapter, not way, input[rows], result, lay)

    def einsum(self, result: Tensor, equation: Any, *operands: Any) -> None:
        """Report a sum over one letter of a matrix, or of each matrix of a stack."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
            return
        given, letters = _letters(equation, operands)
        if letters is None:
            return
        for x, weight, names, own in (
            (operands[0], operands[1], given[0], given[1]),
            (operands[1], operands[0], given[1], given[0]),
        ):
            for adapter in self.users(weight):
                self._einsum(result, letters, x, names, weight, own, adapter)

    def _einsum(
        self,
        result: Tensor,
        out: str,
        x: Tensor,
        names: str,
        weight: Tensor,
        own: str,
        adapter: Adapter,
    ) -> None:
        """Report an ``einsum`` to one adapter, if it is a product with its matrix."""
        way, at, matrix = matrix_way(weight, adapter), None, own[-2:]
        if way is None or len(own) != 2:
            way, i = stack_way(weight, adapter), _number(adapter)
            if way is None or len(own) != 3:
                return
            places = [s.index(own[0]) if own[0] in s else None for s in (names, out)]
            names, out = names.replace(own[0], ""), out.replace(own[0], "")
            x = x if places[0] is None else x.select(places[0], i)
            at = None if places[1] is None else (places[1], i)
        summed = [c for c in matrix if c in names and c not in out]
        made = [c for c in matrix if c in out and c not in names]
        rest = names.replace("".join(summed), "")
        if len(summed) != 1 or len(made) != 1:
            return
        if sorted(rest) != sorted(out.replace(made[0], "")):
            return
        order = [names.index(c) for c in rest + summed[0]]
        lay = partial(_permuted, at, [out.index(c) for c in rest + made[0]])
        as_it_is = (summed[0] == matrix[1]) is way
        self.tell(adapter, as_it_is, x.permute(order), result, lay)

    # -- convolutions ------------------------------------------------------------------

    def conv(
        self,
        result: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        """Report a convolution with a known kernel."""
        for adapter in self.users(weight):
            if not isinstance(adapter, ConvAdapter):
                continue
            own = adapter.parameter(adapter.weight)
            if not _is_whole(weight, own) or groups != adapter.settings.groups:
                continue
            mine = adapter.bias
            if mine is not None and bias is not adapter.parameter(mine):
                continue
            size = tuple(own.shape[2:])
            settings = SimpleNamespace(
                kernel_size=size,
                stride=_each(stride, size),
                padding=padding if isinstance(padding, str) else _each(padding, size),
                dilation=_each(dilation, size),
                groups=groups,
                padding_mode="zeros",
                in_channels=own.shape[1] * groups,
            )
            form = ConvCall(adapter, settings)
            self.report(form, input, result, _unchanged, None)

    # -- rows of tables ----------------------------------------------------------------

    def embedding(
        self, result: Tensor, input: Any, weight: Any, *_: Any, **__: Any
    ) -> None:
        """Report rows taken by index."""
        for adapter in self.users(weight):
            whole = isinstance(adapter, OperandAdapter)
            if whole and matrix_way(weight, adapter) is True:
                self.rows(adapter, input, result, _unchanged)

    def take(self, result: Tensor, weight: Any, index: Any) -> None:
        """Report what ``[]`` copies; views are followed to where they are used."""
        if result._base is None:
            self.places(result, weight, lambda rows: rows[index])

    def expanded(self, result: Tensor, weight: Any, *sizes: Any, **_: Any) -> None:
        """Report a table that is spread over a batch, before it is used."""
        if self.users(weight):
            self.places(result, weight, lambda rows: rows.expand(result.shape))
            self.spread.append(result)

    def repeated(self, result: Tensor, weight: Any, *sizes: Any, **named: Any) -> None:
        """Report a table that is repeated."""
        self.places(result, weight, lambda rows: rows.repeat(*sizes, **named))

    def add(self, result: Tensor, input: Any, other: Any, **scale: Any) -> None:
        """Report a table that is added, or the bias of the last product."""
        if scale.get("alpha", 1) != 1:
            return
        for one, rest in ((input, other), (other, input)):
            if self.unbiased is not None and rest is self.unbiased[0]:
                _, adapter, x, lay = self.unbiased
                if _adds_bias(one, adapter, lay, result):
                    self.unbiased = None
                    self.report(adapter, x, result, lay, None)
                    return
            self.places(result, one, lambda rows: rows.expand(result.shape))

    def multiply(self, result: Tensor, input: Any, other: Any) -> None:
        """Report a table that multiplies element by element."""
        for table, x in ((input, other), (other, input)):
            if isinstance(x, Tensor) and self.users(table):
                lay = partial(_scaled, x.detach())
                self.places(result, table, lambda rows: rows.expand(result.shape), lay)

    def cat(self, result: Tensor, tensors: Any, dim: int = 0, **named: Any) -> None:
        """Report a table that is set before or behind a sequence."""
        dim, start = named.get("axis", dim), 0
        for t in tensors:
            # An empty vector goes with tensors of any shape.
            size = t.shape[dim] if t.dim() == result.dim() else 0
            lay = partial(_narrowed, dim, start, size)
            self.places(result, t, lambda rows: rows, lay)
            start += size

    def places(
        self,
        result: Tensor,
        table: Any,
        move: Arrange,
        lay: Arrange | None = None,
    ) -> None:
        """Report rows of a table, found by moving the elements' places as they are.

        Args:
            result: The operation's.
            table: The parameter or a view of it.
            move: What the operation does with the elements.
            lay: Lays the result's gradient.
        """
        members = [a for a in self.users(table) if isinstance(a, OperandAdapter)]
        if not members or any(t is table for t in self.spread):
            return
        owner = table if table._base is None else table._base
        if _is_spread(table) or not owner.is_contiguous():
            return
        place = torch.arange(owner.numel(), device=owner.device).as_strided(
            table.shape, table.stride(), table.storage_offset() - owner.storage_offset()
        )
        place = move(place)
        features = owner.shape[-1]
        columns = torch.arange(features, device=owner.device)
        if place.dim() < 2 or place.shape[-1] != features:
            return
        if not bool((place % features == columns).all()):
            return
        index = place[..., 0] // features
        for adapter in members:
            if adapter.weight.rows is None:
                self.rows(adapter, index, result, lay or _unchanged)

    def rows(
        self,
        adapter: Adapter,
        index: Tensor,
        result: Tensor,
        lay: Arrange,
    ) -> None:
        """Report rows to a table's block or, as one-hots, to a matrix's."""
        if adapter.diagonal_input:
            self.report(adapter, index, result, lay, None)
        elif isinstance(adapter, FunctionalLinearAdapter):
            self.report(OneHotCall(adapter, True), index, result, lay, None)


_HANDLERS: dict[Any, Any] = {
    F.linear: OperationTap.linear,
    **dict.fromkeys(
        (
            torch.matmul,
            Tensor.matmul,
            Tensor.__matmul__,
            torch.mm,
            Tensor.mm,
            torch.bmm,
            Tensor.bmm,
            torch.mv,
            Tensor.mv,
        ),
        OperationTap.matmul,
    ),
    Tensor.__rmatmul__: OperationTap.rmatmul,
    **dict.fromkeys(
        (torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), OperationTap.addmm
    ),
    torch.einsum: OperationTap.einsum,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), OperationTap.conv),
    F.embedding: OperationTap.embedding,
    Tensor.__getitem__: OperationTap.take,
    **dict.fromkeys(
        (Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to),
        OperationTap.expanded,
    ),
    Tensor.repeat: OperationTap.repeated,
    **dict.fromkeys(
        (
            torch.add,
            Tensor.add,
            Tensor.add_,
            Tensor.__add__,
            Tensor.__radd__,
            Tensor.__iadd__,
        ),
        OperationTap.add,
    ),
    **dict.fromkeys(
        (
            torch.mul,
            Tensor.mul,
            Tensor.__mul__,
            Tensor.__rmul__,
        ),
        OperationTap.multiply,
    ),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), OperationTap.cat),
}


# -- views -----------------------------------------------------------------------------


def _same(size: int, stride: int, other_size: int, other: int) -> bool:
    return size == other_size and (size == 1 or stride == other)


def _is_whole(view: Tensor, parameter: Tensor) -> bool:
    """Return whether a view shows all of a parameter as it is."""
    if view.dim() != parameter.dim():
        return False
    sides = zip(
        view.shape, view.stride(), parameter.shape, parameter.stride(), strict=True
    )
    start = view.storage_offset() == parameter.storage_offset()
    return start and all(_same(*side) for side in sides)


def _turn(view: Tensor, parameter: Tensor) -> bool | None:
    """Return whether the last two dimensions are the parameter's, or turned: False."""
    shape, steps = parameter.shape[-2:], parameter.stride()[-2:]
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
    parameter, rows = adapter.parameter(adapter.weight), adapter.weight.rows
    start = parameter.storage_offset()
    if rows is not None:
        start += rows[0] * parameter.stride(0)
    elif parameter.dim() != 2:
        return None
    if view.dim() == 3 and view.shape[0] == 1:
        view = view[0]
    if view.dim() != 2 or view.storage_offset() != start:
        return None
    return _turn(view, parameter)


def stack_way(view: Tensor, adapter: Adapter) -> bool | None:
    """Return whether a tensor is the stack of an adapter's matrix, False if turned."""
    parameter = adapter.parameter(adapter.weight)
    if adapter.weight.rows is None or view.dim() != 3 or len(view) != len(parameter):
        return None
    if not _same(len(view), view.stride(0), len(parameter), parameter.stride(0)):
        return None
    if view.storage_offset() != parameter.storage_offset():
        return None
    return _turn(view, parameter)


def _adds_bias(t: object, adapter: Adapter, lay: Arrange, result: Tensor) -> bool:
    """Return whether a tensor adds an adapter's bias to the features of a result."""
    assert adapter.bias is not None
    bias = adapter.parameter(adapter.bias)
    if not isinstance(t, Tensor) or not (t is bias or t._base is bias):
        return False
    place = torch.arange(len(bias), device=bias.device)
    place = place.as_strided(t.shape, t.stride()).expand(result.shape)
    return bool((lay(place) == torch.arange(len(bias), device=bias.device)).all())


def _is_spread(t: Tensor) -> bool:
    """Return whether a tensor shows the same elements several times."""
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def _number(adapter: Adapter) -> int:
    """Return the number of an adapter's matrix in its stack."""
    return 0 if adapter.weight.rows is None else adapter.weight.rows[0]


def _select(t: Tensor, e: int) -> Tensor:
    """Return the matrices ``e`` of ``[*, E, n, d]``, or what all are given."""
    if t.dim() < 3:
        return t
    return t.select(-3, e if t.shape[-3] > 1 else 0)


def _selected_gradient(e: int, lay: Arrange | None, grad: Tensor) -> Tensor:
    """Return the gradient of the matrices ``e``, laid."""
    part = grad.select(-3, e)
    return part if lay is None else lay(part)


def _flipped(grad: Tensor) -> Tensor:
    """Return a gradient with its last two dimensions exchanged."""
    return grad.mT


def _permuted(at: tuple[int, int] | None, order: Sequence[int], grad: Tensor) -> Tensor:
    """Return a part of a gradient with its dimensions in another order."""
    grad = grad if at is None else grad.select(*at)
    return grad.permute(*order)


def _narrowed(dim: int, start: int, size: int, grad: Tensor) -> Tensor:
    """Return a part of a gradient along one dimension."""
    return grad.narrow(dim, start, size)


def _scaled(x: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient times what the table was multiplied with."""
    return grad * x


def _rows_of(rows: slice, grad: Tensor) -> Tensor:
    """Return a group's rows of a gradient."""
    return grad[rows]


def _unchanged(grad: Tensor) -> Tensor:
    """Return the gradient as it is."""
    return grad


def _each(value: Any, like: Sequence[int]) -> tuple[int, ...]:
    """Return one number for each dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(like) if len(values) == 1 else values


def _letters(equation: str, operands: Sequence[Tensor]) -> tuple[list[str], str | None]:
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


# -- which parameters ------------------------------------------------------------------


def functional_adapter(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter of a module that gives weights of its own to operations."""
    return OperandAdapter if operands(module) else None


def operands(module: nn.Module) -> dict[str, type[OperandAdapter]]:
    """Return the parameters that the module's code gives to operations, with kinds."""
    if isinstance(module, nn.Embedding) and EmbeddingAdapter.refusal(module):
        return {}
    if type(module).__module__.startswith("torch.nn."):  # those have adapters, or none
        return {}
    lazy = nn.parameter.UninitializedParameter
    own = {
        n: p
        for n, p in module._parameters.items()
        if p is not None and not isinstance(p, lazy) and p.dim() > 1
    }
    if not own:
        return {}
    names = code_names(type(module))
    kinds = {n: _kind(module, p, names) for n, p in own.items() if n in names}
    return {n: kind for n, kind in kinds.items() if kind is not None}


def _kind(
    module: nn.Module, parameter: Tensor, names: set[str]
) -> type[OperandAdapter] | None:
    """Return the form of a parameter's block, by its shape and its module's code."""
    rows, multiplies = parameter.shape[:-1], bool(names & PRODUCTS)
    if isinstance(module, Conv):
        return FunctionalConvAdapter
    if isinstance(module, nn.Embedding):
        return TableAdapter
    if parameter.dim() == 3 and rows[0] == 1 and names & TABLES:
        return TableAdapter
    if parameter.dim() in (2, 3) and multiplies and rows[0] > 0:
        return FunctionalLinearAdapter if parameter.dim() == 2 else StackedAdapter
    if 3 <= parameter.dim() <= 5 and names & CONVOLUTIONS:
        return FunctionalConvAdapter
    return TableAdapter if parameter.dim() == 2 and names & TABLES else None
