"""Vectors of parameter space and of function space, with names.

A vector is an ordered mapping from names to tensors with the algebra of a vector
space. A :class:`ParameterVector` has one tensor per parameter of a model, a
:class:`FunctionVector` the outputs ``[n, c]`` of ``n`` examples. A
:class:`VectorSpace` has the names and shapes of the vectors of one space, and converts
them to and from flat tensors.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ekfac.errors import StateMismatchError, listed

# Wrapper classes, and the attribute that holds the wrapped module. A wrapper whose
# module was never imported is not in use.
_WRAPPERS = (
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    (
        "torch.distributed.fsdp.fully_sharded_data_parallel",
        "FullyShardedDataParallel",
        "_fsdp_wrapped_module",
    ),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)


def standard_normal(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return independent standard normal numbers, drawn where the generator lives.

    The generator may be on another device than the result: a seeded CPU generator gives
    the same numbers on any device.
    """
    source = generator.device if generator is not None else device
    options: Any = {"generator": generator, "dtype": dtype, "device": source}
    return torch.randn(tuple(shape), **options).to(device)


def _wrapped(module: nn.Module) -> str | None:
    """Return the attribute that holds what ``module`` wraps, if it is a wrapper.

    The class decides, since users' modules may have the same names.
    """
    for module_name, kind, attribute in _WRAPPERS:
        wrapper = getattr(sys.modules.get(module_name), kind, None)
        if wrapper is not None and isinstance(module, wrapper):
            return attribute
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside ``DistributedDataParallel``, ``torch.compile`` etc."""
    while True:
        attribute = _wrapped(model)
        inner = None if attribute is None else model._modules.get(attribute)
        if inner is None:
            return model
        model = inner


def clean(model: nn.Module, name: str) -> str:
    """Return a name inside ``model`` without the parts that wrappers add."""
    parts = []
    module: nn.Module | None = model
    for part in name.split("."):
        # A wrapper's attribute may be missing in the name.
        while module is not None and _wrapped(module) and part not in module._modules:
            module = module._modules[str(_wrapped(module))]
        if module is None or part != _wrapped(module):
            parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by their names without wrappers."""
    model = unwrap(model)
    return {clean(model, name): module for name, module in model.named_modules()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by their names without wrappers.

    Names and order are those of ``named_parameters()`` of the model inside
    ``DataParallel``, ``DistributedDataParallel``, ``torch.compile`` and the wrappers of
    sharding and checkpointing.
    """
    model = unwrap(model)
    return {clean(model, name): p for name, p in model.named_parameters()}


def _mismatch(
    expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]]
) -> str | None:
    """Return how the names or shapes differ, or ``None`` where they agree."""
    missing = [name for name in expected if name not in actual]
    if missing:
        return f"it lacks {listed(missing)}"
    extra = [name for name in actual if name not in expected]
    if extra:
        return f"it has {listed(extra)}, unknown here"
    for name, shape in expected.items():
        if tuple(actual[name]) != tuple(shape):
            return f"its {name!r} is {list(actual[name])}, not {list(shape)}"
    return None


class VectorSpace:
    """Names and shapes of the tensors of a vector, in the order of its flat form.

    Args:
        shapes: Shape of every tensor by name.
        vector_type: Class of the space's vectors, :class:`ParameterVector` by default.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        vector_type: type[Vector] | None = None,
    ) -> None:
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.vector_type = ParameterVector if vector_type is None else vector_type

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor] | nn.Module) -> VectorSpace:
        """Return the space of ``tensors``, or of a model's trainable parameters."""
        if isinstance(tensors, nn.Module):
            tensors = _chosen(tensors, None)
        kind = type(tensors) if isinstance(tensors, Vector) else None
        return cls({name: tensor.shape for name, tensor in tensors.items()}, kind)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in order."""
        return tuple(self.shapes)

    @property
    def size(self) -> int:
        """Number of entries of a vector, ``P``."""
        return sum(prod(shape) for shape in self.shapes.values())

    def subspace(self, names: Iterable[str]) -> VectorSpace:
        """Return the space of the tensors called ``names``, in that order."""
        shapes = {name: self.shapes[name] for name in names}
        return VectorSpace(shapes, self.vector_type)

    def require(self, tensors: Mapping[str, Tensor], what: str = "The vector") -> None:
        """Raise unless names (in any order) and shapes are those of this space.

        Args:
            tensors: What is compared.
            what: Subject of the error's sentence.

        Raises:
            StateMismatchError: With the first differing names or shapes.
        """
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        difference = _mismatch(self.shapes, shapes)
        if difference is not None:
            raise StateMismatchError(
                f"{what} belongs to another model or another choice of parameters: "
                f"{difference}."
            )

    def vector(self, flat: Tensor) -> Vector:
        """Return the vector whose flat form is ``flat`` ``[P]``, as views of it.

        Raises:
            StateMismatchError: If ``flat`` has another shape.
        """
        if flat.shape != (self.size,):
            raise StateMismatchError(
                f"A flat vector of this space has shape [{self.size}], got "
                f"{list(flat.shape)}."
            )
        stack = self.split(flat.unsqueeze(0))
        return self.vector_type({name: rows[0] for name, rows in stack.items()})

    def flat(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Return ``vector`` as one tensor ``[P]`` in this space's order.

        Raises:
            StateMismatchError: If it is of another space.
        """
        self.require(vector)
        return torch.cat([vector[name].reshape(-1) for name in self.shapes])

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Return ``[k, P]`` as name -> ``[k, *shape]``."""
        parts = rows.split([prod(shape) for shape in self.shapes.values()], dim=1)
        return {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, stack: Mapping[str, Tensor]) -> Tensor:
        """Return name -> ``[k, *shape]`` as ``[k, P]``: the inverse of ``split``."""
        sizes = {name: prod(shape) for name, shape in self.shapes.items()}
        rows = [stack[n].reshape(len(stack[n]), size) for n, size in sizes.items()]
        return torch.cat(rows, dim=1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VectorSpace):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        """Return what makes two spaces equal: the order of the names, too."""
        return self.vector_type, *self.shapes.items()

    def __repr__(self) -> str:
        return f"VectorSpace(size={self.size}, names=[{listed(self.names)}])"


class Vector(Mapping[str, Tensor]):
    """An ordered mapping name -> tensor that adds, scales and multiplies.

    Operations between two vectors need the same names and shapes, in any order; the
    result has the order of the left one. Gradients flow through every operation.

    Args:
        tensors: Tensors by name; they are not copied.

    Raises:
        ValueError: If there are none.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        if not self._tensors:
            raise ValueError(f"{type(self).__name__} needs a tensor, got none.")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    __array_ufunc__ = None  # numpy's numbers leave the product to __rmul__
    # Mapping would compare tensors with ==, whose result has no truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {list(t.shape)}" for name, t in self.items())
        return f"{type(self).__name__}({shapes})"

    @property
    def space(self) -> VectorSpace:
        """Names and shapes of the tensors."""
        return VectorSpace.of(self)

    @property
    def dtype(self) -> torch.dtype:
        """Type that holds all tensors: that of :meth:`flat`."""
        return functools.reduce(torch.promote_types, (t.dtype for t in self.values()))

    @property
    def device(self) -> torch.device:
        """Device of the tensors (of the first one)."""
        return next(iter(self.values())).device

    @classmethod
    def from_flat(cls, flat: Tensor, like: Mapping[str, Tensor] | VectorSpace) -> Self:
        """Return ``flat`` ``[P]`` cut into the names and shapes of ``like``.

        Raises:
            StateMismatchError: If it has another length.
        """
        space = like if isinstance(like, VectorSpace) else VectorSpace.of(like)
        return cls(space.vector(flat))

    def flat(self) -> Tensor:
        """Return the entries as one tensor ``[P]``, in the order of the names."""
        return torch.cat([tensor.reshape(-1) for tensor in self.values()])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the vector of ``function`` of every tensor."""
        return type(self)({name: function(tensor) for name, tensor in self.items()})

    def subset(self, names: Iterable[str]) -> Self:
        """Return the vector of the tensors called ``names``, in that order."""
        return type(self)({name: self[name] for name in names})

    def detach(self) -> Self:
        """Return the same values without their graph, sharing memory."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        """Return a copy."""
        return self.map(Tensor.clone)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the vector on ``device`` and in ``dtype``."""
        return self.map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def random_like(self, generator: torch.Generator | None = None) -> Self:
        """Return independent standard normal entries in the same space."""
        return self.map(
            lambda t: standard_normal(
                t.shape, generator=generator, dtype=t.dtype, device=t.device
            )
        )

    def dot(self, other: Vector) -> Tensor:
        """Return the inner product with ``other``, a 0-d tensor.

        Raises:
            StateMismatchError: If ``other`` is of another space, as for ``+ - * /``.
        """
        return torch.stack([tensor.sum() for tensor in (self * other).values()]).sum()

    def norm(self) -> Tensor:
        """Return the Euclidean norm, a 0-d tensor."""
        norms = [torch.linalg.vector_norm(tensor) for tensor in self.values()]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def _combined(
        self, other: Vector | Tensor | float, operation: Callable[[Any, Any], Any]
    ) -> Self:
        """Return ``operation`` of the tensors and ``other``'s, or a number."""
        if isinstance(other, Vector):
            self.space.require(other)
            return type(self)({n: operation(t, other[n]) for n, t in self.items()})
        if isinstance(other, Tensor) and other.dim() > 0:
            raise TypeError(
                f"{type(self).__name__} takes numbers and vectors, got a tensor of "
                f"shape {list(other.shape)}; make it a vector with from_flat."
            )
        return self.map(lambda tensor: operation(tensor, other))

    def __add__(self, other: Vector) -> Self:
        if not isinstance(other, Vector):
            return NotImplemented
        return self._combined(other, operator.add)

    def __sub__(self, other: Vector) -> Self:
        if not isinstance(other, Vector):
            return NotImplemented
        return self._combined(other, operator.sub)

    def __mul__(self, other: Vector | Tensor | float) -> Self:
        """Scale by a number, or multiply entry by entry with a vector."""
        return self._combined(other, operator.mul)

    def __rmul__(self, other: Tensor | float) -> Self:
        return self * other

    def __truediv__(self, other: Vector | Tensor | float) -> Self:
        """Divide by a number, or entry by entry by a vector."""
        return self._combined(other, operator.truediv)

    def __neg__(self) -> Self:
        return self.map(torch.neg)


class ParameterVector(Vector):
    """A vector of parameter space: one tensor per parameter, by name.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> w = ParameterVector.from_model(model)
        >>> w
        ParameterVector(weight: [1, 2], bias: [1])
        >>> torch.isclose((w + w).dot(w), 2 * w.norm() ** 2)
        tensor(True)
    """

    @classmethod
    def of(
        cls, values: Mapping[str, Tensor], names: Iterable[str] | None = None
    ) -> Self:
        """Return tensors by name as a vector, detached, sharing memory.

        Args:
            values: A vector, ``dict(model.named_parameters())`` or a ``state_dict``.
            names: Which of them. Default: all.

        Raises:
            StateMismatchError: If one of ``names`` is missing.
        """
        selected = list(values if names is None else names)
        missing = [name for name in selected if name not in values]
        if missing:
            raise StateMismatchError(
                f"Values of {missing} are needed, got those of {list(values)[:8]}; "
                "take them from the same model, by the names in "
                "model.named_parameters()."
            )
        return cls({name: values[name].detach() for name in selected})

    @classmethod
    def from_model(cls, model: nn.Module, names: Iterable[str] | None = None) -> Self:
        """Return a detached copy of the model's parameters.

        Args:
            model: The model; wrappers do not show in the names.
            names: Which parameters. Default: those that require a gradient.

        Raises:
            StateMismatchError: If the model lacks one of ``names``.
        """
        parameters = _chosen(model, names)
        return cls({name: p.detach().clone() for name, p in parameters.items()})

    @classmethod
    def from_grad(cls, model: nn.Module, names: Iterable[str] | None = None) -> Self:
        """Return a copy of the parameters' ``.grad``, zero where it is ``None``.

        The arguments are those of :meth:`from_model`.
        """
        parameters = _chosen(model, names)
        return cls(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                for name, p in parameters.items()
            }
        )


class FunctionVector(Vector):
    """A vector of function space: the outputs ``[n, c]`` of ``n`` examples.

    Its flat form has ``c`` entries for each example, one after the other.

    Args:
        outputs: ``[n, c]``, or the mapping ``{"outputs": [n, c]}``.

    Raises:
        ValueError: For another shape, or more tensors.
    """

    def __init__(self, outputs: Tensor | Mapping[str, Tensor]) -> None:
        if isinstance(outputs, Tensor):
            outputs = {"outputs": outputs}
        super().__init__(outputs)
        shape = list(self.outputs.shape)
        if len(self) != 1 or len(shape) != 2:
            raise ValueError(f"FunctionVector needs one [n, c] tensor, got {shape}.")

    @property
    def outputs(self) -> Tensor:
        """The values, ``[n, c]``."""
        return self["outputs"]


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters called ``names``, or all that require a gradient."""
    parameters = named_parameters(model)
    if names is None:
        return {name: p for name, p in parameters.items() if p.requires_grad}
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in parameters]
    if unknown:
        raise StateMismatchError(
            f"{type(model).__name__} has no parameters {listed(unknown)}; it has "
            f"{listed(list(parameters))}."
        )
    return {name: parameters[name] for name in names}
