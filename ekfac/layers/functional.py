"""Weights that are operands of known operations, wherever those are called.

Routers and fused experts of mixtures, class tokens, position embeddings, tables of
relative positions and users' own layers hold a parameter and pass it to an operation.
In a forward pass whose statistics are taken, a :class:`TorchFunctionMode` reports the
operations that have such a weight, or a view of it, as an operand:

- ``linear``, ``matmul``, ``@``, ``mm``, ``addmm``: one matrix, as it is or transposed;
- ``bmm``, ``matmul``, ``baddbmm``, ``einsum``, ``grouped_mm``: a stack of matrices
  ``[E, *, *]``, each a block; a single matrix of a stack too;
- ``multi_head_attention_forward``: its projections, of whole matrices;
- ``conv1d`` to ``conv3d``;
- ``embedding``, ``[]``, ``+``, ``*``, ``cat``, ``expand``, ``repeat``: rows of a table;
- ``layer_norm``, ``rms_norm``, ``group_norm``, ``instance_norm``, ``batch_norm``, in
  classes that inherit from such a layer and have a forward of their own (norm and
  activation).

The operand may be a function of the weight whose derivative is one number in every row:
fake quantisation and other straight-through functions, casts, scales. That number is
measured, see :func:`ekfac.layers.views.row_factors`, and scales inputs or gradients.

:mod:`ekfac.layers.operands` decides which parameters become blocks, and of which form;
the reported calls give their statistics. A weight without a reported call is
preconditioned by its diagonal, with a warning at the step. The weights of ``nn.Linear``
and ``nn.Embedding`` are watched too if another module's code uses a ``weight`` in such
operations: a head ``linear(x, embedding.weight)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from functools import partial
from operator import attrgetter, itemgetter, methodcaller
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ekfac.layers import views
from ekfac.layers.attention import attention_with, examples_first
from ekfac.layers.base import Adapter, Arrange, Report, Tap
from ekfac.layers.conv import ConvAdapter
from ekfac.layers.linear import EmbeddingAdapter, LinearAdapter
from ekfac.layers.norm import NormAdapter
from ekfac.layers.operands import (
    ChannelNormCall,
    ConvCall,
    DenseCall,
    FoldedAdapter,
    FunctionalLinearAdapter,
    OneHotCall,
    OperandAdapter,
    TrailingNormCall,
    operands,
)


class OperationTap(Tap):
    """Reports the operations that have the adapters' weights as operands.

    Hooks of layers leave out the calls that it has reported.
    """

    def __init__(
        self, module: nn.Module, adapters: Any, args: Any, kwargs: Any, report: Report
    ) -> None:
        super().__init__(module, adapters, args, kwargs, report)
        weights = [adapter.parameter(adapter.weight) for adapter in self.adapters]
        self.shapes = {tuple(weight.shape) for weight in weights}
        # Ids of parameters -> adapters of their blocks; ids of other parameters.
        self.known: dict[int, list[Adapter]] = {}
        self.others: set[int] = set()
        # Ids of tensors -> the tensor, kept so that no other gets its id, and the
        # adapters of the weight that it is a function of, with the factors of its rows.
        self.made: dict[int, tuple[Tensor, dict[Adapter, Tensor]]] = {}
        # Expanded tables that were reported; the last product that lacks its bias.
        self.spread: list[Tensor] = []
        self.unbiased: tuple[Tensor, Adapter, Tensor, Arrange] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func`` and report it, if it is a known operation on a known weight."""
        if func is F.multi_head_attention_forward:
            return self.attention(*args, **(kwargs or {}))
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
        """Return whether some argument has :meth:`users`."""
        return any(
            self.concerned(x) if isinstance(x, list | tuple) else bool(self.users(x))
            for x in given
        )

    @_disable_dynamo
    def handle(self, tell: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        """Report one operation."""
        tell(self, result, *args, **kwargs)

    def users(self, t: object) -> Collection[Adapter]:
        """Return the adapters of the weight that a tensor is, or is made of."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return ()
        owner = views.owner_of(t)
        if not isinstance(owner, nn.Parameter):
            return self.made_of(t) if tuple(owner.shape) in self.shapes else ()
        number = id(owner)
        if number not in self.known and number not in self.others:
            # Sharded modules have whole parameters only while they run.
            self.others.add(number)
            for adapter in self.adapters:
                if adapter.parameter(adapter.weight) is owner:
                    self.known.setdefault(number, []).append(adapter)
        return self.known.get(number, ())

    @_disable_dynamo
    def made_of(self, t: Tensor) -> dict[Adapter, Tensor]:
        """Return the adapters of the weight that a tensor is a function of.

        With the factors of the rows, all 1 for an adapter that has a bias.
        """
        owner = views.owner_of(t)
        if id(owner) not in self.made:
            weights = [adapter.parameter(adapter.weight) for adapter in self.adapters]
            alike = [w for w in weights if w.shape == owner.shape]
            weight, derivative = views.origin(owner, alike)
            users: dict[Adapter, Tensor] = {}
            for adapter in self.users(weight):
                factors = views.row_factors(adapter.weight.of(derivative), adapter)
                ones = factors is not None and bool((factors == 1).all())
                if factors is not None and (ones or adapter.bias is None):
                    users[adapter] = factors
            self.made[id(owner)] = owner, users
        return self.made[id(owner)][1]

    def factors(self, operand: Tensor, adapter: Adapter) -> Tensor | None:
        """Return the factors of an operand's rows, ``None`` if all are 1."""
        made = self.made.get(id(views.owner_of(operand)))
        factors = None if made is None else made[1][adapter]
        return None if factors is None or bool((factors == 1).all()) else factors

    # -- products ----------------------------------------------------------------------

    @_disable_dynamo
    def attention(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run torch's attention function with a ``linear`` that reports."""
        examples = query.shape[1] if query.dim() == 3 else 1
        arrange = partial(examples_first, examples=examples)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            result = F.linear(x, weight, bias)
            if result.requires_grad:
                self.product(
                    result, arrange(x), weight, turned=True, bias=bias, arrange=arrange
                )
            return result

        return attention_with(linear)(query, *args, **kwargs)

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
            self.product(result, other.mT, input, turned=True, arrange=attrgetter("mT"))

    def rmatmul(self, result: Tensor, input: Any, other: Any) -> None:
        """Report ``other @ input``."""
        self.matmul(result, other, input)

    def addmm(
        self, result: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any
    ) -> None:
        """Report ``b + x W`` or ``b + W x`` and a table ``b``, unless scaled."""
        if scales.get("alpha", 1) == 1:
            self.matmul(result, mat1, mat2)
        if scales.get("beta", 1) == 1:
            self.places(result, input, lambda rows: rows.expand(result.shape))

    def product(
        self,
        result: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        turned: bool = False,
        bias: Tensor | None = None,
        arrange: Arrange | None = None,
    ) -> None:
        """Report ``x W``, or ``x W^T`` if the weight is given ``turned``."""
        for adapter in self.users(weight):
            way = views.matrix_way(weight, adapter)
            stack = views.stack_way(weight, adapter) if way is None else None
            if way is None and stack is None:
                continue
            if stack is None:
                arrange, as_it_is = arrange or views.unchanged, way is turned
                self.tell(adapter, weight, as_it_is, x, result, arrange, bias)
                continue
            e = views.number_of(adapter)
            part, as_it_is = (
                partial(views.selected_gradient, e, arrange),
                stack is turned,
            )
            self.tell(adapter, weight, as_it_is, views.select(x, e), result, part, bias)

    def tell(
        self,
        adapter: Adapter,
        operand: Tensor,
        as_it_is: bool,
        x: Tensor,
        result: Tensor,
        arrange: Arrange,
        bias: Tensor | None = None,
    ) -> None:
        """Report a product with the packed matrix of a block, or with its transpose.

        Args:
            adapter: The block's adapter.
            operand: The matrix as the operation takes it.
            as_it_is: Whether the product is ``x W^T`` with the parameter ``W``, not
                its transpose.
            x: ``[N, *, d]``.
            result: The operation's result.
            arrange: Arranges the gradient of ``result``.
            bias: The bias that the operation itself adds.
        """
        if x.is_nested or not x.is_floating_point():
            return
        factors = self.factors(operand, adapter)
        if factors is not None and as_it_is:
            arrange = partial(views.scaled, factors, arrange)
        elif factors is not None:
            x = x.detach() * factors
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
        if bias is None:
            self.unbiased = result, adapter, x, arrange
        elif views.is_bias(bias, adapter):
            self.report(adapter, x, result, arrange, None)

    def grouped(
        self,
        result: Tensor,
        input: Tensor,
        weight: Tensor,
        offs: Tensor | None = None,
        **_: Any,
    ) -> None:
        """Report ``x W[i]`` of every group ``i`` of consecutive rows of ``x``."""
        members = self.users(weight)
        if not members or offs is None:
            return
        ends = [0, *offs.tolist()]
        for adapter in members:
            way = views.stack_way(weight, adapter)
            if way is None:
                continue
            i = views.number_of(adapter)
            rows = slice(ends[i], ends[i + 1])
            if rows.start < rows.stop:
                arrange = itemgetter(rows)
                self.tell(adapter, weight, not way, input[rows], result, arrange)

    def einsum(self, result: Tensor, equation: Any, *operands: Any) -> None:
        """Report a sum over one letter of a matrix, or of each matrix of a stack."""
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
            return
        given, letters = views.letters_of(equation, operands)
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
        """Report an ``einsum`` if it is a product with the matrix of ``adapter``.

        ``out``, ``names`` and ``own`` are the letters of result, ``x`` and ``weight``.
        """
        way, at, sides = views.matrix_way(weight, adapter), None, (own[-2:-1], own[-1:])
        if isinstance(adapter, FoldedAdapter):
            sides = own[: adapter.split], own[adapter.split :]
            way = True if views.is_whole(weight) else None
        elif way is None and len(own) == 3:
            way, i = views.stack_way(weight, adapter), views.number_of(adapter)
            places = [s.index(own[0]) if own[0] in s else None for s in (names, out)]
            names, out = names.replace(own[0], ""), out.replace(own[0], "")
            x = x if places[0] is None else x.select(places[0], i)
            at = None if places[1] is None else (places[1], i)
        elif len(own) != 2:
            return
        summed, made = views.parts_of(sides, names, out)
        rest = [c for c in names if c not in summed]
        whole = sorted(rest) == sorted(c for c in out if c not in made)
        if way is None or not (summed and made and whole):
            return
        x = x.permute([names.index(c) for c in [*rest, *summed]]).flatten(-len(summed))
        arrange = partial(
            views.permuted, at, [out.index(c) for c in [*rest, *made]], len(made)
        )
        as_it_is = (summed == sides[1]) is way
        self.tell(adapter, weight, as_it_is, x, result, arrange)

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
            if not views.is_whole(weight) or groups != adapter.settings.groups:
                continue
            if adapter.bias is not None and not views.is_bias(bias, adapter):
                continue
            size = tuple(weight.shape[2:])
            settings = SimpleNamespace(
                kernel_size=size,
                stride=views.per_dimension(stride, size),
                padding=views.per_dimension(padding, size),
                dilation=views.per_dimension(dilation, size),
                groups=groups,
                padding_mode="zeros",
                in_channels=weight.shape[1] * groups,
            )
            factors, arrange = self.factors(weight, adapter), views.unchanged
            if factors is not None:
                arrange = partial(
                    views.scaled, factors.reshape(-1, *[1] * len(size)), arrange
                )
            self.report(ConvCall(adapter, settings), input, result, arrange, None)

    # -- norms -------------------------------------------------------------------------

    def norm(
        self, result: Tensor, *args: Any, func: Callable[..., Tensor], **kwargs: Any
    ) -> None:
        """Report the scale and shift of a normalisation ``func``."""
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        x, weight = given.pop("input"), given.pop("weight")
        bias = given.pop("bias", None)
        if given.get("training") or given.get("use_input_stats"):
            given["running_mean"] = given["running_var"] = None  # no second update
        form = TrailingNormCall if "normalized_shape" in given else ChannelNormCall
        for adapter in self.users(weight):
            own = adapter.bias and adapter.parameter(adapter.bias)
            plain = bias is own and self.factors(weight, adapter) is None
            if plain and isinstance(adapter, NormAdapter):
                normalised = form(adapter, partial(func, **given))
                self.report(normalised, x, result, views.unchanged, None)

    # -- rows of tables ----------------------------------------------------------------

    def embedding(
        self, result: Tensor, input: Any, weight: Any, *_: Any, **__: Any
    ) -> None:
        """Report rows taken by index."""
        for adapter in self.users(weight):
            if views.matrix_way(weight, adapter) is True:
                self.rows(adapter, weight, input, result, views.unchanged)

    def take(self, result: Tensor, weight: Any, index: Any) -> None:
        """Report rows that ``[]`` copies; a view is followed to where it is used."""
        if result._base is None:
            self.places(result, weight, lambda rows: rows[index])

    def expanded(self, result: Tensor, weight: Any, *sizes: Any, **_: Any) -> None:
        """Report a table that is expanded over a batch, before it is used."""
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
                _, adapter, x, arrange = self.unbiased
                if views.adds_bias(one, adapter, arrange, result):
                    self.unbiased = None
                    self.report(adapter, x, result, arrange, None)
                    return
            if not _is_made(result, one, rest):
                self.places(result, one, lambda rows: rows.expand(result.shape))

    def cast(self, result: Tensor, input: Tensor, *_: Any, **__: Any) -> None:
        """Follow the last product without its bias into another precision."""
        if self.unbiased is not None and input is self.unbiased[0]:
            self.unbiased = result, *self.unbiased[1:]

    def multiply(self, result: Tensor, input: Any, other: Any) -> None:
        """Report a table that an activation is multiplied by, element by element."""
        for table, x in ((input, other), (other, input)):
            if not isinstance(x, Tensor) or _is_made(result, table, x):
                continue
            if self.users(table):
                arrange = partial(views.scaled, x.detach(), views.unchanged)
                self.places(
                    result, table, lambda rows: rows.expand(result.shape), arrange
                )

    def cat(self, result: Tensor, tensors: Any, dim: int = 0, **named: Any) -> None:
        """Report a table that is concatenated with a sequence."""
        dim, start = named.get("axis", dim), 0
        for t in tensors:
            # An empty vector goes with tensors of any shape.
            size = t.shape[dim] if t.dim() == result.dim() else 0
            arrange = methodcaller("narrow", dim, start, size)
            self.places(result, t, lambda rows: rows, arrange)
            start += size

    def places(
        self,
        result: Tensor,
        table: Any,
        move: Arrange,
        arrange: Arrange | None = None,
    ) -> None:
        """Report rows of a table that an operation takes.

        Args:
            result: The operation's result.
            table: The table, or a function of it.
            move: Does to the indices of the table's elements what the operation does to
                the elements, which tells the rows.
            arrange: Arranges the gradient of ``result``.
        """
        kinds = (OperandAdapter, EmbeddingAdapter)
        members = [a for a in self.users(table) if isinstance(a, kinds)]
        if not members or any(t is table for t in self.spread):
            return
        owner = views.owner_of(table)
        if views.is_spread(table) or not owner.is_contiguous():
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
                self.rows(adapter, table, index, result, arrange or views.unchanged)

    def rows(
        self,
        adapter: Adapter,
        table: Tensor,
        index: Tensor,
        result: Tensor,
        arrange: Arrange,
    ) -> None:
        """Report rows to the block of a table or, as one-hots, to that of a matrix."""
        factors = self.factors(table, adapter)
        if factors is not None:
            arrange = partial(
                views.scaled, factors[index.long()].unsqueeze(-1), arrange
            )
        if adapter.diagonal_input:
            self.report(adapter, index, result, arrange, None)
        elif isinstance(adapter, FunctionalLinearAdapter):
            self.report(OneHotCall(adapter, True), index, result, arrange, None)


def _is_made(result: Tensor, table: Any, other: Any) -> bool:
    """Return whether an operation makes a table of a table, with no activation."""
    if not isinstance(table, Tensor) or table.shape != result.shape:
        return False
    computed = isinstance(other, Tensor) and other.grad_fn is not None
    return not (computed and other.shape == result.shape)


def _functions(names: str, *places: Any) -> list[Any]:
    """Return the functions of space-separated names in some modules or classes."""
    return [getattr(place, name) for place in places for name in names.split()]


_HANDLERS: dict[Any, Any] = {
    function: handler
    for handler, functions in (
        (OperationTap.linear, [F.linear]),
        (OperationTap.matmul, _functions("matmul mm bmm mv", torch, Tensor)),
        (OperationTap.matmul, [Tensor.__matmul__]),
        (OperationTap.rmatmul, [Tensor.__rmatmul__]),
        (OperationTap.addmm, _functions("addmm baddbmm", torch, Tensor)),
        (OperationTap.einsum, [torch.einsum]),
        (OperationTap.conv, _functions("conv1d conv2d conv3d", F)),
        (OperationTap.embedding, [F.embedding]),
        (OperationTap.take, [Tensor.__getitem__]),
        (OperationTap.expanded, _functions("broadcast_to", torch, Tensor)),
        (OperationTap.expanded, _functions("expand expand_as", Tensor)),
        (OperationTap.repeated, [Tensor.repeat]),
        (OperationTap.add, _functions("add", torch, Tensor)),
        (OperationTap.add, _functions("add_ __add__ __radd__ __iadd__", Tensor)),
        (OperationTap.multiply, _functions("mul", torch, Tensor)),
        (OperationTap.multiply, _functions("__mul__ __rmul__", Tensor)),
        (
            OperationTap.cast,
            _functions("to type_as float double half bfloat16", Tensor),
        ),
        (OperationTap.cat, _functions("cat concat concatenate", torch)),
    )
    for function in functions
}
_NORMS = "layer_norm rms_norm group_norm instance_norm batch_norm"
for _norm in _functions(_NORMS, F):
    _HANDLERS[_norm] = partial(OperationTap.norm, func=_norm)
OperandAdapter.tap = OperationTap


def functional_adapter(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter of a module that passes its own weights to operations."""
    return OperandAdapter if operands(module) else None
