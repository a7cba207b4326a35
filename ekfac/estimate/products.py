"""Matrices known through their products: Jacobian, Fisher and Gauss-Newton, Hessian.

Derivatives are taken with reverse mode alone: the product with the Jacobian is the
derivative of the transposed product, which is linear, with respect to its vector. It
asks nothing of the modules but a differentiable backward. Products with single examples
are their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac.errors import StateMismatchError
from ekfac.estimate.data import (
    NO_TARGETS,
    Batch,
    Data,
    choose,
    example_of,
    moved,
    outputs_of,
    precision_of,
    predicted,
    prepared,
    space_of,
)
from ekfac.estimate.differentiability import (
    check_hessian,
    check_jacobian,
    has_python_functions,
)
from ekfac.estimate.output_hessians import LossHessian, Source, check_finite
from ekfac.likelihoods import _real
from ekfac.matrices import CurvatureMatrix, ImplicitMatrix
from ekfac.vectors import FunctionVector, Vector, VectorSpace

# Columns that are multiplied at a time.
COLUMNS = 16


@dataclass
class Problem:
    """Model, parameters, data and source of an estimate."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    data: Data
    source: Source

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Iterable[Any],
        source: Source,
        parameters: Iterable[str] | None,
        progress: bool,
    ) -> Problem:
        """Return the problem of a user's arguments."""
        params = choose(model, parameters)
        device = next(iter(params.values())).device
        return cls(model, params, Data(data, device, progress), source)

    @property
    def space(self) -> VectorSpace:
        """The space of the chosen parameters."""
        return space_of(self.parameters)

    @contextmanager
    def passes(self, purpose: str, *, twice: bool = False) -> Iterator[Iterator[Batch]]:
        """Open a pass over the data with the model prepared, to differentiate twice."""
        prepare = twice_differentiable if twice else prepared
        with (
            prepare(self.model, self.parameters),
            self.data.batches(purpose) as batches,
        ):
            yield batches


@contextmanager
def twice_differentiable(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Prepare the model, with the attention kernel that differentiates twice."""
    with prepared(model, parameters), sdpa_kernel(SDPBackend.MATH):
        yield


def pushed_forward(
    outputs: Tensor, parameters: Sequence[nn.Parameter], rows: Tensor
) -> Tensor:
    """Return ``J v`` for every row ``v`` of ``[k, P]``, as ``[k, *outputs.shape]``."""
    u = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(
        outputs, parameters, u, create_graph=True, allow_unused=True
    )
    parts = zip(pulled, _split(rows, parameters), strict=True)
    used = [(g, v) for g, v in parts if g is not None]
    if not used:
        return outputs.new_zeros(len(rows), *outputs.shape)
    tangents = back_propagated([g for g, _ in used], [u], [v for _, v in used])
    return tangents.reshape(len(rows), *outputs.shape)


def _split(rows: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return rows ``[k, P]`` as ``[k, *]`` for every parameter."""
    parts = rows.split([p.numel() for p in parameters], dim=1)
    pairs = zip(parts, parameters, strict=True)
    return [part.reshape(-1, *p.shape).to(p.dtype) for part, p in pairs]


class FisherProducts:
    """Products of columns with ``(1/N) sum_n J_n^T M_n J_n``, sums over batches."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.model
        self.parameters, self.source = problem.parameters, problem.source

    def __call__(self, columns: Tensor) -> Tensor:
        """Return the products with columns ``[P, k]``."""
        count = 0.0
        with self.problem.passes("product", twice=True) as batches:
            rows = moved(columns, columns.device).detach().mT
            products = torch.zeros_like(rows)
            for batch in batches:
                outputs, batch = predicted(self.model, batch)
                check_finite(outputs, "The model's outputs", batch)
                count += float(self.source.share(outputs.detach(), batch))
                start = 0
                for part in self.of_batch(outputs, batch, rows):
                    products[start : start + len(part)] += part
                    start += len(part)
        if not count:
            raise ValueError(NO_TARGETS)
        return (products / count).mT

    def of_batch(self, outputs: Tensor, batch: Batch, rows: Tensor) -> Iterator[Tensor]:
        """Yield the products of a batch's sum with rows ``[k, P]``, some at a time."""
        params = list(self.parameters.values())
        rerun = partial(outputs_of, self.model, batch.inputs)
        check_jacobian(outputs, self.model, rerun)
        for part in rows.split(COLUMNS):
            tangents = pushed_forward(outputs, params, part)
            weights = self.source.product(outputs.detach(), batch, tangents)
            yield back_propagated([outputs], params, [weights])


class HessianProducts(FisherProducts):
    """Products of columns with the Hessian of the loss itself."""

    source: LossHessian

    def of_batch(self, outputs: Tensor, batch: Batch, rows: Tensor) -> Iterator[Tensor]:
        """Yield the products of a batch's sum with rows ``[k, P]``, some at a time."""
        params = list(self.parameters.values())
        grads = loss_gradients(self.model, self.source, outputs, batch, params)
        for part in rows.split(COLUMNS):
            yield back_propagated(grads, params, _split(part, params))


def _batched(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Sequence[Tensor | None]:
    """Return ``J^T`` of several vectors, ``[k, *]`` for every input.

    Where a third-party function cannot go back through several at once they go one by
    one.
    """
    grad = partial(
        torch.autograd.grad, outputs, inputs, retain_graph=True, allow_unused=True
    )
    try:
        return grad(weights, is_grads_batched=True)
    except RuntimeError:
        if not has_python_functions(outputs):
            raise
    rows = [grad([w[i] for w in weights]) for i in range(len(weights[0]))]
    return [
        None if columns[0] is None else torch.stack(columns)
        for columns in zip(*rows, strict=True)
    ]


def loss_gradients(
    model: nn.Module,
    source: LossHessian,
    outputs: Tensor,
    batch: Batch,
    parameters: Sequence[nn.Parameter],
) -> list[Tensor]:
    """Return the gradients of a batch's loss with their graph, zero where unused.

    Raises:
        UnsupportedOperationError: If they cannot be differentiated once more.
    """
    loss = source.total(outputs, batch)

    def rerun() -> Tensor:
        return source.total(outputs_of(model, batch.inputs), batch)

    check_hessian(loss, model, rerun, source.verified)
    grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    return [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(grads, parameters, strict=True)
    ]


def implicit_matrix(
    products: FisherProducts, preconditioner: CurvatureMatrix | None
) -> ImplicitMatrix:
    """Return the implicit matrix of some products."""
    return ImplicitMatrix(
        space_of(products.parameters),
        products,
        dtype=precision_of(products.parameters.values()),
        device=products.problem.data.device,
        preconditioner=preconditioner,
    )


class Jacobian:
    """The Jacobian of a model's outputs on some inputs, as an operator ``[n c, P]``.

    ``J @ v`` pushes a :class:`~ekfac.vectors.ParameterVector` forward to a
    :class:`~ekfac.vectors.FunctionVector`, ``J.T @ u`` pulls one back. Flat tensors
    ``[P]`` and columns ``[P, k]`` do as well. Nothing is stored but the inputs; every
    product is with the parameters as they are then, with the model in eval mode.

    Args:
        model: The model. Its outputs ``[n, *]`` are taken as ``[n, c]``.
        x: A tensor, a mapping of keyword arguments, or a tuple of arguments.
        parameters: As for :func:`ekfac.fisher`.

    Attributes:
        domain: The space of the parameters.
        codomain: The space of the outputs.
    """

    def __init__(
        self, model: nn.Module, x: Any, parameters: Iterable[str] | None = None
    ) -> None:
        self.model, self.parameters = model, choose(model, parameters)
        types = (p.dtype for p in self.parameters.values())
        self._weight = next(iter(self.parameters.values())).detach()
        self._weight = self._weight.to(reduce(torch.promote_types, types))
        with prepared(model, self.parameters):
            self.inputs = moved(x, self._weight.device)
            outputs = outputs_of(model, self.inputs)
        self.domain = space_of(self.parameters)
        n = len(outputs)
        shape = (n, outputs.numel() // n)
        self.codomain = VectorSpace({"outputs": shape}, FunctionVector)

    @property
    def shape(self) -> torch.Size:
        """``[n c, P]``."""
        return torch.Size((self.codomain.size, self.domain.size))

    @property
    def T(self) -> TransposedJacobian:
        """The transpose."""
        return TransposedJacobian(self)

    def __matmul__(self, vector: Vector | Tensor) -> Vector | Tensor:
        """Return ``J v``, a ``FunctionVector`` of a vector."""
        with twice_differentiable(self.model, self.parameters):
            rows = _rows(vector, self.domain, self._weight)
            outputs = outputs_of(self.model, self.inputs)
            params = list(self.parameters.values())
            rerun = partial(outputs_of, self.model, self.inputs)
            check_jacobian(outputs, self.model, rerun)
            parts = [
                pushed_forward(outputs, params, part).flatten(1)
                for part in rows.split(COLUMNS)
            ]
        return _like(vector, torch.cat(parts), self.codomain)

    def pull_back(self, vector: Vector | Tensor) -> Vector | Tensor:
        """Return ``J^T u``: what ``J.T @ u`` is."""
        with twice_differentiable(self.model, self.parameters):
            rows = _rows(vector, self.codomain, self._weight)
            outputs = outputs_of(self.model, self.inputs)
            params = list(self.parameters.values())
            parts = [
                back_propagated([outputs], params, [part.reshape(-1, *outputs.shape)])
                for part in rows.split(COLUMNS)
            ]
        return _like(vector, torch.cat(parts), self.domain)

    def to_dense(self) -> Tensor:
        """Return ``[n c, P]``, by as many backward passes as there are rows."""
        size = self.codomain.size
        units = torch.eye(size, dtype=self._weight.dtype, device=self._weight.device)
        rows = self.pull_back(units)
        assert isinstance(rows, Tensor)
        return rows.mT

    def __repr__(self) -> str:
        return f"Jacobian({self.shape[0]} x {self.shape[1]})"


class TransposedJacobian:
    """The transpose of a :class:`Jacobian`, ``[P, n c]``."""

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian = jacobian

    @property
    def T(self) -> Jacobian:
        """The Jacobian."""
        return self._jacobian

    @property
    def shape(self) -> torch.Size:
        """``[P, n c]``."""
        return torch.Size(reversed(self._jacobian.shape))

    def __matmul__(self, vector: Vector | Tensor) -> Vector | Tensor:
        """Return ``J^T u``."""
        return self._jacobian.pull_back(vector)

    def to_dense(self) -> Tensor:
        """Return ``[P, n c]``."""
        return self._jacobian.to_dense().mT

    def __repr__(self) -> str:
        return f"TransposedJacobian({self.shape[0]} x {self.shape[1]})"


def _rows(vector: Vector | Tensor, space: VectorSpace, like: Tensor) -> Tensor:
    """Return a vector or columns as rows ``[k, size]``."""
    if isinstance(vector, Vector):
        return space.flat(vector).unsqueeze(0).to(like.dtype)
    if vector.dim() not in (1, 2) or vector.shape[0] != space.size:
        raise StateMismatchError(
            f"A flat vector for this Jacobian has shape [{space.size}] or "
            f"[{space.size}, k], got {list(vector.shape)}."
        )
    flat: Tensor = moved(vector, vector.device)
    rows = flat.unsqueeze(0) if flat.dim() == 1 else flat.mT
    return rows.to(like.dtype)


def _like(vector: Vector | Tensor, rows: Tensor, space: VectorSpace) -> Vector | Tensor:
    """Return rows ``[k, size]`` in the form of the vector that was multiplied."""
    if isinstance(vector, Vector):
        return space.vector(rows[0])
    return rows[0] if vector.dim() == 1 else rows.mT


# Elements of gradients that exist at a time.
BUDGET = 1 << 24


def example_rows(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    outputs: Tensor,
    pseudo: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Yield ``J_n^T h_nk`` of every example ``n``, ``[K, P]``, in float32 at least.

    The model is called with one example at a time. Where that fails or gives other
    outputs (the examples of a batch see each other, an argument without examples has as
    many rows), the outputs of the whole batch are differentiated example by example.
    The ``pseudo`` are ``K`` gradients of the outputs.
    """
    size, params = len(outputs), list(parameters.values())
    if not pseudo:
        return
    h = torch.stack(list(pseudo)).detach()
    for n in range(size):
        graph, weights = outputs, torch.zeros_like(h)
        weights[:, n] = h[:, n]
        if size > 1:
            # Attention's fast kernels cannot go back through several rows at once.
            with sdpa_kernel(SDPBackend.MATH):
                single = _called_alone(model, batch, n, size)
            if single is not None and _agree(single, outputs[n : n + 1]):
                graph, weights = single, h[:, n : n + 1]
        yield _real(back_propagated([graph], params, [weights]))


def _called_alone(
    model: nn.Module, batch: Batch, index: int, size: int
) -> Tensor | None:
    """Return the outputs of one example, ``None`` if the model cannot be called on it.

    Such is a node of a graph, which has edges to others.
    """
    try:
        return outputs_of(model, example_of(batch.inputs, index, size))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None


def _agree(single: Tensor, of_batch: Tensor) -> bool:
    """Return whether two outputs are the same but for rounding."""
    if single.shape != of_batch.shape:
        return False
    largest = of_batch.detach().abs().max()
    precision = torch.finfo(of_batch.dtype).eps ** 0.5
    return bool((single - of_batch).detach().abs().max() <= precision * largest)


def back_propagated(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> Tensor:
    """Return ``J^T`` of several vectors at once, flat, ``[k, P]``.

    Each output has weights ``[k, *]``, and may be a constant.
    """
    k = len(weights[0])
    used = [i for i, output in enumerate(outputs) if output.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if used:
        sources = [outputs[i] for i in used]
        if k == 1:
            single = [weights[i][0] for i in used]
            plain = torch.autograd.grad(
                sources, inputs, single, retain_graph=True, allow_unused=True
            )
            grads = [None if g is None else g.unsqueeze(0) for g in plain]
        else:
            batched = [weights[i] for i in used]
            grads = _batched(sources, inputs, batched)
    rows = [
        x.new_zeros(k, x.numel()) if g is None else g.reshape(k, -1)
        for g, x in zip(grads, inputs, strict=True)
    ]
    return torch.cat(rows, dim=1)
