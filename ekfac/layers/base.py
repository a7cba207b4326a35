"""Adapters: the normal form of one type of layer, and the registry of adapters.

The whole package works on one form of a layer's data, ``[N, S, b, d]``:
``N`` examples, ``S`` shared positions (sequence steps, image positions, calls),
``b`` independent blocks (groups of a convolution, features of a norm) and ``d``
features. In that form every layer is ``b`` linear maps ``W_b`` of shape
``[d_out, d_in]`` applied at every position, and the gradient of one example is

    ``dW_b = sum_s g_{sb} a_{sb}^T``

with inputs ``a`` (the last feature is the constant 1 of the bias) and gradients
``g`` of the example's loss with respect to the layer's outputs.

An adapter is four methods: :meth:`Adapter.inputs`, :meth:`Adapter.output_gradients`,
:meth:`Adapter.pack` and :meth:`Adapter.unpack`. ``ekfac.testing.check_adapter`` checks
them against autograd. Cheaper ways to the same statistics are in :class:`Shortcuts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ekfac.errors import CaptureError, UnsupportedLayerError
from ekfac.kernels.input_gram import InputPatches, InputRows

Family = Literal["kronecker", "exact"]

# Why a layer is refused whose weight is no parameter of its own.
COMPUTED = (
    "its weight is absent or computed (a parametrization); "
    "torch.nn.utils.parametrize.remove_parametrizations gives it one"
)


@dataclass(frozen=True)
class Slot:
    """Place of a block's weight or bias: a parameter, or some rows of one.

    Attributes:
        name: The parameter's name within its module.
        rows: First and one-past-last row, or ``None`` for the whole parameter.
    """

    name: str
    rows: tuple[int, int] | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """Return the view of ``parameter`` that this slot covers."""
        return parameter if self.rows is None else parameter[slice(*self.rows)]


class Adapter(ABC):
    """One layer in the normal form.

    Attributes:
        family: ``"kronecker"``: the block is approximated by ``A (x) G``.
            ``"exact"``: blocks with ``d_out = 1`` that are small enough to be kept
            exactly (``A`` is then the second moment of the per-example gradients and
            ``G`` is 1).
        children: Names of child modules whose parameters the adapter takes over.
        diagonal_input: The input is an index per position, not a vector, and its
            factor is diagonal (:class:`torch.nn.Embedding`).
        uneven: One side is a multiple of the other by nature, as the patches of a
            convolution are, so a wide side gets a basis all the same.
        costly: Recording a call changes how the layer runs. Calls are then recorded
            for statistics alone, not to save the rotation of the gradient.
        shared_factors: All blocks share one input factor and one output factor, the
            means over the blocks.
        module: The layer.
        weight: Place of the weight.
        bias: Place of the bias, or ``None``.

    Args:
        module: The layer.
    """

    family: ClassVar[Family] = "kronecker"
    uneven: ClassVar[bool] = False
    children: ClassVar[tuple[str, ...]] = ()
    diagonal_input: ClassVar[bool] = False
    costly: ClassVar[bool] = False
    shared_factors: ClassVar[bool] = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weight = Slot("weight")
        has_bias = module._parameters.get("bias") is not None
        self.bias: Slot | None = Slot("bias") if has_bias else None

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Return why this adapter cannot treat ``module``, or ``None`` if it can.

        A semicolon separates the reason from what to do about it.
        """
        return COMPUTED if module._parameters.get("weight") is None else None

    @classmethod
    def build(cls, module: nn.Module) -> dict[str, Adapter]:
        """Return the module's blocks by name suffix; most modules have one, ``""``."""
        return {"": cls(module)}

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the argument of a call that :meth:`inputs` takes.

        Raises:
            UnsupportedLayerError: If the first argument is no tensor.
        """
        value = args[0] if args else next(iter(kwargs.values()))
        if not isinstance(value, Tensor):
            raise UnsupportedLayerError(
                f"{type(self.module).__name__} was called with a "
                f"{type(value).__name__} where its adapter expects a Tensor; override "
                "Adapter.input_of."
            )
        return value

    def call_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Arrange | None]:
        """Return what :meth:`inputs` takes of a call, and how its gradient is arranged.

        Returns:
            The tensor, and the function that maps the gradient of the call's output to
            what :meth:`output_gradients` takes; ``None`` for the gradient itself.
        """
        return self.input_of(args, kwargs), None

    def mask(self, x: Tensor) -> Tensor | None:
        """Return ``[N, S]``, true where a position trains the weight, or None: all."""
        return None

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[N, S, b or 1, d_in]``, the bias's column of ones last.

        With ``diagonal_input``, return the indices as ``[N, S]``.
        """

    @abstractmethod
    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return the gradient of the layer's output as ``[N, S, b, d_out]``."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``[W | b]`` as ``[b, d_out, d_in]``, entries permuted at most."""

    @abstractmethod
    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of ``[b, d_out, d_in]``: the inverse of ``pack``."""

    def parameter(self, slot: Slot) -> nn.Parameter:
        """Return the parameter that ``slot`` names."""
        parameter = self.held(slot)
        assert parameter is not None, f"{slot.name} is no parameter any more"
        return parameter

    def held(self, slot: Slot) -> nn.Parameter | None:
        """Return the parameter that ``slot`` names, ``None`` if it was removed."""
        owner: nn.Module | None = self.module
        *path, last = slot.name.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        return None if owner is None else owner._parameters.get(last)

    def slots(self) -> list[Slot]:
        """Return the weight's slot and, if there is one, the bias's."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix_shape(self) -> tuple[int, int, int]:
        """Return ``(b, d_out, d_in)``."""
        tensors = [slot.of(_shaped(self.parameter(slot))) for slot in self.slots()]
        packed = self.pack(tensors[0], tensors[1] if self.bias is not None else None)
        b, d_out, d_in = packed.shape
        return b, d_out, d_in


# Maps the gradient of a call's output to what Adapter.output_gradients takes.
Arrange = Callable[[Tensor], Tensor]
# Takes an adapter, its input, the tensor whose gradient is wanted, how that gradient is
# arranged, and which positions count (None: all).
Report = Callable[[Adapter, Tensor, Tensor, Arrange, Tensor | None], None]


class Tap(TorchFunctionMode):
    """Reports the uses of weights in the functions of one call of a module."""

    def __init__(
        self,
        module: nn.Module,
        adapters: Sequence[Adapter],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        report: Report,
    ) -> None:
        super().__init__()
        self.module, self.adapters, self.report = module, adapters, report


class FunctionalAdapter(Adapter):
    """An adapter of weights that a module passes to functions, which call no hooks.

    A :class:`Tap` that is active during the module's forward reports its calls.
    """

    tap: ClassVar[type[Tap]]

    def __init__(
        self, module: nn.Module, weight: Slot, bias: Slot | None = None
    ) -> None:
        super().__init__(module)
        self.weight, self.bias = weight, bias

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Refuse nothing."""
        return None


class MaskedAdapter(Adapter):
    """The adapter of one call some of whose positions do not count.

    Args:
        adapter: The layer's adapter.
        keep: ``[N, S]``, true where a position counts.
    """

    def __init__(self, adapter: Adapter, keep: Tensor) -> None:
        self.module, self.adapter, self.keep = adapter.module, adapter, keep
        self.weight, self.bias = adapter.weight, adapter.bias
        self.family = adapter.family  # type: ignore[misc]
        self.diagonal_input = adapter.diagonal_input  # type: ignore[misc]

    def mask(self, x: Tensor) -> Tensor:
        """Return ``[N, S]``, true where a position counts."""
        own = self.adapter.mask(x)
        return self.keep if own is None else self.keep & own

    def inputs(self, x: Tensor) -> Tensor:
        """Return what the layer's adapter does."""
        return self.adapter.inputs(x)

    def output_gradients(self, grad: Tensor) -> Tensor:
        """Return what the layer's adapter does."""
        return self.adapter.output_gradients(grad)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the layer's adapter does."""
        return self.adapter.pack(weight, bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the layer's adapter does."""
        return self.adapter.unpack(matrix)


class CallForm(Adapter):
    """The adapter of one call whose form differs from that of its block.

    Args:
        of: The block's adapter.
        transposed: Whether the call uses the transpose of the block's matrix.
    """

    def __init__(self, of: Adapter, transposed: bool = False) -> None:
        self.module, self.of, self.transposed = of.module, of, transposed
        self.weight, self.bias = of.weight, None if transposed else of.bias


def padded(nested: Tensor) -> Tensor:
    """Return a nested ``[N, lengths, *]`` as ``[N, L, *]``, zero behind the ends."""
    dense: Tensor = torch.nested.to_padded_tensor(nested, 0)
    return dense


def padded_call(
    adapter: Adapter, x: Tensor, arrange: Arrange | None
) -> tuple[MaskedAdapter, Tensor, Arrange]:
    """Return a call with a nested input as one with a padded input.

    Returns:
        An adapter that masks the padding, the padded input and how the gradient is
        arranged.
    """
    x = x.detach()
    keep = padded(torch.ones_like(x))
    keep = keep.flatten(2)[..., 0] if keep.dim() > 2 else keep
    dense = padded(x)
    positions = adapter.inputs(dense).shape[1]
    keep = (keep > 0).repeat_interleave(positions // max(1, keep.shape[1]), dim=1)
    return MaskedAdapter(adapter, keep), dense, partial(_padded_gradient, arrange)


def _padded_gradient(arrange: Arrange | None, grad: Tensor) -> Tensor:
    """Return a gradient, padded if it is nested, and arranged."""
    grad = padded(grad) if grad.is_nested else grad
    return grad if arrange is None else arrange(grad)


OwnerT = TypeVar("OwnerT", bound=Adapter)


class Shortcuts(Generic[OwnerT]):
    """Statistics of a layer's inputs without forming them; each method is optional.

    An adapter's four methods define the result; a shortcut computes it at lower cost.
    It applies to the adapter class that it is registered for and to no subclass, since
    what a subclass overrides may contradict it. A subclass with its parent's inputs
    registers its parent's shortcuts for itself. Shortcuts are for adapters without a
    mask and take the argument of :meth:`Adapter.inputs`;
    ``ekfac.testing.check_adapter`` compares the two.

    Args:
        adapter: The adapter.
    """

    def __init__(self, adapter: OwnerT) -> None:
        self.adapter = adapter

    def elements_per_example(self, x: Tensor) -> int:
        """Return the number of elements of one example's ``inputs``, 0 for no copy.

        If not 0, the first dimension of ``x`` has to be the examples, and statistics
        are taken of a few examples at a time.
        """
        return 0

    def input_gram(self, x: Tensor) -> Tensor | InputRows | InputPatches | None:
        """Return ``sum_ns a_ns a_ns^T`` of ``inputs``, ``[b, d_in, d_in]``, or None.

        In its place, what computes it: an object with ``gram()``. With
        ``shared_factors``, return the sum over blocks, ``[1, d_in, d_in]``.
        """
        return None

    def row_gradients(self, x: Tensor, grad: Tensor) -> Tensor | None:
        """Return ``sum_s g_ns a_ns^T`` of an exact block, ``[N, b, d_in]``, or None.

        Args:
            x: The layer's input.
            grad: The gradient of its output.
        """
        return None

    def rotated_inputs(self, x: Tensor, basis: Tensor) -> Tensor | None:
        """Return ``inputs`` in a basis, ``[N, b, m, S]``, or ``None``.

        Args:
            x: The layer's input.
            basis: ``[b, d_in, m]``, some columns of the basis.
        """
        return None


ShortcutsT = TypeVar("ShortcutsT", bound=type[Shortcuts])  # type: ignore[type-arg]
# Adapter class -> its shortcuts; subclasses are not looked up.
_SHORTCUTS: dict[type[Adapter], type[Shortcuts]] = {}  # type: ignore[type-arg]


def shortcuts_for(*adapters: type[Adapter]) -> Callable[[ShortcutsT], ShortcutsT]:
    """Register the decorated shortcuts for ``adapters``, not for their subclasses."""

    def decorate(shortcuts: ShortcutsT) -> ShortcutsT:
        _SHORTCUTS.update(dict.fromkeys(adapters, shortcuts))
        return shortcuts

    return decorate


def find_shortcuts(adapter: Adapter) -> Shortcuts[Adapter]:
    """Return the shortcuts of an adapter's own class, or :class:`Shortcuts`."""
    return _SHORTCUTS.get(type(adapter), Shortcuts)(adapter)


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is a ``DTensor``, split over ranks."""
    # To look for what is not there takes several times as long.
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return not plain and hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded or sparse tensor, dense.

    All ranks of a sharded tensor's mesh must call this.
    """
    if not is_sharded(tensor):
        return tensor.to_dense() if tensor.is_sparse else tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def assembled(tensor: Tensor, mesh: Any, width: int | None) -> Tensor:
    """Return the whole input or output of a tensor-parallel layer.

    All ranks of its mesh must call this.

    Args:
        tensor: A ``DTensor``, or this rank's part of one, split along the last
            dimension if that is not ``width``.
        mesh: The mesh of the layer's weight.
        width: The whole's last dimension; ``None`` if nothing is split.
    """
    if is_sharded(tensor) or width in (None, tensor.shape[-1]):
        return whole(tensor)
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((*tensor.shape[:-1], width))
    stride = torch.empty(shape, device="meta").stride()
    part = tensor.detach().contiguous()
    split = DTensor.from_local(
        part, mesh, [Shard(tensor.dim() - 1)], shape=shape, stride=stride
    )
    return whole(split)


def assembled_call(
    adapter: Adapter, name: str, inputs: Tensor, output: Tensor, arrange: Arrange | None
) -> tuple[Tensor, Arrange | None]:
    """Return the whole inputs of a call, and how its output gradient is arranged.

    Inputs and gradients of a tensor-parallel layer are gathered: all ranks of its mesh
    must call this and the returned function, layer by layer in the same order.
    Parameters that ``fully_shard`` has split are whole while the layer is called.

    Raises:
        CaptureError: If positions are split over the ranks, or a layer with a plain
            weight was called with a DTensor.
    """
    weight = adapter.parameter(adapter.weight)
    if not is_sharded(weight):
        if is_sharded(inputs) or is_sharded(output):
            raise CaptureError(
                f"layer {name!r} was called with a DTensor and has a plain weight: a "
                "rank sees only a part of its inputs or outputs. Split the layer by "
                "parallelize_module as well, or give it the whole tensor "
                "(full_tensor())."
            )
        return inputs, arrange
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    rows, columns = weight.shape[0], weight.shape[-1]  # equal for a norm's scale
    if adapter.diagonal_input:  # an embedding's indices
        inputs, width = assembled(inputs, mesh, None), columns
        positions = inputs.shape
    else:
        inputs, width = assembled(inputs, mesh, columns), rows
        positions = inputs.shape[:-1]
    if output.shape[:-1] != positions:
        raise CaptureError(
            f"layer {name!r}: its inputs have the positions {list(positions)}, its "
            f"outputs {list(output.shape[:-1])}: they are split over the ranks. Use "
            "output_layouts that keep positions whole (Replicate, or Shard(-1))."
        )

    def gathered(grad: Tensor) -> Tensor:
        grad = assembled(grad, mesh, width)
        return grad if arrange is None else arrange(grad)

    return inputs, gathered


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor sharded as ``like`` is.

    Args:
        tensor: Whole on every rank, or sharded in any other way, pending sums included.
        like: A sharded tensor; with any other, ``tensor`` is returned as it is.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if isinstance(tensor, DTensor):
        if tensor.placements == placements:
            return tensor
        return tensor.redistribute(mesh, placements)
    everywhere = [Replicate()] * mesh.ndim
    replicated = DTensor.from_local(tensor, mesh, everywhere, run_check=False)
    return replicated.redistribute(mesh, placements)


@contextmanager
def kept_gathered(model: nn.Module | None) -> Iterator[None]:
    """Gather parameters again that a backward pass in the context has freed.

    ``fully_shard`` gathers a layer's parameters when a gradient arrives at its output
    and frees them when the gradients of its inputs are there. Layers at which the
    loss's own gradient has arrived before still need theirs.
    """
    modules: Any = () if model is None else model.modules()
    sharded = [module for module in modules if hasattr(module, "unshard")]
    before = [m for m in sharded if not all(map(is_sharded, _own_parameters(m)))]
    try:
        yield
    finally:
        for module in before:
            module.unshard()


def _own_parameters(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a module that no child shards by itself."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not hasattr(child, "unshard"):
            yield from _own_parameters(child)


def _shaped(parameter: nn.Parameter) -> Tensor:
    """Return a tensor of the whole parameter's shape, without gathering it."""
    if is_sharded(parameter):
        return torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return parameter.detach()


AdapterT = TypeVar("AdapterT", bound=type[Adapter])
_REGISTRY: dict[type[nn.Module], type[Adapter]] = {}
_PER_OBJECT: WeakKeyDictionary[nn.Module, type[Adapter]] = WeakKeyDictionary()


def register(*module_types: type[nn.Module]) -> Callable[[AdapterT], AdapterT]:
    """Register the decorated adapter for ``module_types`` and their subclasses.

    A subclass with a ``forward`` of its own computes something else and is not covered
    by its parent's adapter.
    """

    def decorate(adapter: AdapterT) -> AdapterT:
        for module_type in module_types:
            _REGISTRY[module_type] = adapter
        return adapter

    return decorate


def override(module: nn.Module, adapter: type[Adapter]) -> None:
    """Use ``adapter`` for the object ``module``, whatever its type's adapter is."""
    _PER_OBJECT[module] = adapter


def has_own_adapter(module: nn.Module) -> bool:
    """Return whether :func:`override` has given the object ``module`` an adapter."""
    return module in _PER_OBJECT


def type_name(module: nn.Module) -> str:
    """Return the name of a module's class with the path that it is imported from."""
    kind = type(module)
    path = "torch.nn" if kind.__module__.startswith("torch.nn.") else kind.__module__
    return f"{path}.{kind.__qualname__}"


# What to do about a type without adapter, and about parameters that need no block.
ADVICE = "register an adapter for it, ekfac.layers.register"
FINE = "there is nothing to do"


def because(module: nn.Module, reason: str, advice: str = FINE) -> str:
    """Return why parameters of a module are in no block, and what to do."""
    return f"{type_name(module)}: {reason}; {advice}"


class Overridden(str):
    """The reason against an adapter whose module type has another ``forward``."""


def registered_adapter(module: nn.Module) -> type[Adapter] | str | None:
    """Return the adapter of an object or its type, why it is refused, or ``None``."""
    adapter = _PER_OBJECT.get(module)
    if adapter is None:
        for module_type in type(module).__mro__:
            if module_type in _REGISTRY:
                if type(module).forward is not module_type.forward:
                    return Overridden(
                        f"it overrides the forward of {module_type.__name__}; {ADVICE}"
                    )
                adapter = _REGISTRY[module_type]
                break
    if adapter is None:
        return None
    return adapter.refusal(module) or adapter
