"""The tangent kernel and the Jacobian, layer by layer from the layers' calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ekfac.calls import LayerCall
from ekfac.curvature.normal_form import example_gradients, joined, normal_form
from ekfac.errors import CaptureError, listed
from ekfac.estimate.data import Batch, choose, moved, outputs_of, prepared
from ekfac.estimate.layout import Layout, Recorder, lay_out
from ekfac.estimate.output_hessians import check_finite
from ekfac.estimate.products import Jacobian, example_rows
from ekfac.layers import Block
from ekfac.likelihoods import TargetMask, _real
from ekfac.matrices import CurvatureMatrix, DenseMatrix, ImplicitMatrix
from ekfac.progress import shown
from ekfac.vectors import FunctionVector, VectorSpace

# Elements of recorded gradients that exist at a time.
RECORDED = 1 << 27


def jacobian(
    model: nn.Module, x: Any, *, parameters: Iterable[str] | None = None
) -> Jacobian:
    """Return the Jacobian of the outputs on ``x``, as an operator ``[n c, P]``.

    ``J @ v`` pushes a parameter vector forward, ``J.T @ u`` pulls a function vector
    back; ``J.to_dense()`` forms it.

    Args:
        model: The model, in eval mode while it is called.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        parameters: Names of parameters or layers. Default: what requires a gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> J = jacobian(model, torch.randn(5, 3))
        >>> J.shape
        torch.Size([10, 8])
    """
    return Jacobian(model, x, parameters)


@overload
def ntk(
    model: nn.Module,
    x: Any,
    y: None = None,
    *,
    layerwise: Literal[False] = False,
    structure: Literal["dense", "implicit"] = "dense",
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> CurvatureMatrix: ...


@overload
def ntk(
    model: nn.Module,
    x: Any,
    y: Any,
    *,
    layerwise: Literal[False] = False,
    structure: Literal["dense"] = "dense",
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> Tensor: ...


@overload
def ntk(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    layerwise: Literal[True],
    structure: Literal["dense"] = "dense",
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> dict[str, Any]: ...


def ntk(
    model: nn.Module,
    x: Any,
    y: Any = None,
    *,
    layerwise: bool = False,
    structure: Literal["dense", "implicit"] = "dense",
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> CurvatureMatrix | Tensor | dict[str, Any]:
    """Return the Gram matrix of the tangent kernel, ``J(x) J(y)^T``.

    For layers with an adapter it is computed from their inputs and output gradients, by
    ``c`` backward passes in all, without forming the Jacobian: with one position per
    example a layer's kernel is ``(a_i . a_j) (g_ik . g_jl)``. For the others the rows
    of the Jacobian are formed, one layer at a time.

    Args:
        model: The model, in eval mode while it is called; its outputs ``[n, *]`` are
            taken as ``[n, c]``.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        y: Other inputs. Default: ``x``.
        layerwise: Return a mapping from layer name to the layer's kernel; they sum to
            the whole.
        structure: ``"dense"``, or ``"implicit"``: products only, by two passes each.
        parameters: Names of parameters or layers. Default: what requires a gradient.
        progress: Whether to show a bar over the layers, if tqdm is installed.

    Returns:
        A matrix over :class:`~ekfac.vectors.FunctionVector`, in the order of its flat
        form (examples first, ``c`` entries for each); with ``y`` a tensor
        ``[n c, m c]``.

    Raises:
        ValueError: If outputs are not finite, there are no examples, or an implicit
            kernel is asked for with ``y`` or by layer.
        CaptureError: If a layer's parameters are used without calling it.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> K = ntk(model, torch.randn(5, 3))
        >>> K.shape
        torch.Size([10, 10])
    """
    if structure not in ("dense", "implicit"):
        raise ValueError(f"structure must be 'dense' or 'implicit', got {structure!r}.")
    if structure == "implicit":
        if y is not None or layerwise:
            raise ValueError(
                "An implicit tangent kernel is that of one set of inputs and of all "
                "layers; use structure='dense', or jacobian(model, x)."
            )
        return _implicit(Jacobian(model, x, parameters))
    params = choose(model, parameters)
    with prepared(model, params):
        layout = lay_out(model, params, {nn.Module: "diagonal"}, None)
        left = Side(model, params, layout, x)
        right = left if y is None else Side(model, params, layout, y)
        kernels = shown(
            _by_layer(layout, left, right),
            "tangent kernels of layers",
            progress=progress,
            total=len(layout.groups),
        )
        with closing(left), closing(right):
            grams = _by_name(kernels) if layerwise else {"": _sum(kernels, left, right)}
    results: dict[str, Any] = grams
    if y is None:
        space = VectorSpace({"outputs": (left.size, left.classes)}, FunctionVector)
        results = {name: DenseMatrix(space, kernel) for name, kernel in grams.items()}
    return results if layerwise else results[""]


def _implicit(J: Jacobian) -> ImplicitMatrix:
    def multiply(columns: Tensor) -> Tensor:
        product = J @ (J.T @ columns)
        assert isinstance(product, Tensor)
        return product.to(columns)

    weight = _real(next(iter(J.parameters.values())))
    return ImplicitMatrix(
        J.codomain, multiply, dtype=weight.dtype, device=weight.device
    )


def _by_name(kernels: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the kernels by layer; a layer with tied weights comes in several parts."""
    by_name: dict[str, Tensor] = {}
    for name, kernel in kernels:
        by_name[name] = by_name[name] + kernel if name in by_name else kernel
    return by_name


def _sum(kernels: Iterator[tuple[str, Tensor]], left: Side, right: Side) -> Tensor:
    kernel_sum = left.zeros(right)
    for _, kernel in kernels:
        kernel_sum += kernel
    return kernel_sum


@dataclass
class Features:
    """The columns of one layer in the Jacobian, ``[n c, P_layer]``, thin or formed.

    Attributes:
        inputs: ``[n, S, b or 1, d_in]``, or indices ``[n, S]``.
        grads: ``[n, c, S, b, d_out]``.
        rows: ``[n c, P_layer]`` in place of the two.
    """

    inputs: Tensor | None = None
    grads: Tensor | None = None
    rows: Tensor | None = None


class Side:
    """One set of inputs: its forward pass, and every layer's columns of the Jacobian.

    Attributes:
        mixed: The blocks whose recorded gradients mix examples.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        layout: Layout,
        x: Any,
    ) -> None:
        self.model, self.parameters = model, parameters
        weight = next(iter(parameters.values()))
        self.batch = Batch(0, moved(x, weight.device), None)
        self.recorder = Recorder(model, list(layout.blocks))
        try:
            self.outputs, _, self.recorded = self.recorder.forward(model, self.batch)
            check_finite(self.outputs, "The model's outputs", self.batch)
            if not len(self.outputs):
                raise ValueError(
                    "A tangent kernel needs one example or more, got none."
                )
            blocks = self.recorder.blocks
            self.mixed = self.recorder.mixing(self.outputs, self.recorded, blocks)
        except BaseException:
            self.close()
            raise
        self.size = len(self.outputs)
        self.classes = self.outputs.numel() // self.size
        self.terms = TargetMask.full(self.size)

    def close(self) -> None:
        """Remove the hooks."""
        self.recorder.close()

    def zeros(self, other: Side) -> Tensor:
        """Return a kernel of zeros, ``[n c, m c]``."""
        shape = (self.size * self.classes, other.size * other.classes)
        return _real(self.outputs).new_zeros(shape)

    def units(self) -> Iterator[Tensor]:
        """Yield the gradients of single outputs, of all examples at once."""
        for i in range(self.classes):
            h = torch.zeros_like(self.outputs).reshape(self.size, -1)
            h[:, i] = 1
            yield h.reshape(self.outputs.shape)

    def sizes(self) -> dict[Block, int]:
        """Return how many elements the recorded gradients of each block have."""
        sizes: dict[Block, int] = {}

        def count(block: Block, pairs: Sequence[LayerCall], *_: Any) -> None:
            sizes[block] = self.classes * sum(call.grads.numel() for call in pairs)

        first = [next(self.units())]
        self.recorder.send(self.outputs, self.recorded, first, self.terms, count)
        return sizes

    def features(self, blocks: Sequence[Block]) -> dict[Block, Features]:
        """Return the columns of each block; of those that mix examples, none."""
        calls: dict[Block, list[Sequence[LayerCall]]] = {}

        def take(block: Block, pairs: Sequence[LayerCall], *_: Any) -> None:
            calls.setdefault(block, []).append(pairs)

        separate = [block for block in blocks if block not in self.mixed]
        self.recorder.send(
            self.outputs, self.recorded, self.units(), self.terms, take, separate
        )
        features = {}
        for block in separate:
            if block in calls:
                feature = self._feature(block, calls.pop(block))
                if feature is not None:
                    features[block] = feature
        return features

    def _feature(
        self, block: Block, calls: Sequence[Sequence[LayerCall]]
    ) -> Features | None:
        """Return one block's columns, from its calls for every class."""
        dtype = _real(self.outputs).dtype
        inputs: list[Tensor] = []
        grads: list[Tensor] = []
        rows: list[Tensor] = []
        for number, pairs in enumerate(calls):
            parts = list(normal_form(pairs, self.terms, dtype))
            if sum(len(uses[0].grads) for uses in parts) != self.size:
                return None
            merged = [joined(uses) for uses in parts]
            thin = [one for one in merged if one is not None]
            if block.exact or len(thin) < len(merged):
                rows.append(_formed(parts, block))
                continue
            if not number:
                inputs = [one.inputs for one in thin]
            grads.append(torch.cat([one.grads for one in thin]))
        if rows:
            return Features(rows=torch.stack(rows, dim=1).flatten(0, 1))
        return Features(torch.cat(inputs), torch.stack(grads, dim=1))

    def formed(self, names: Sequence[str]) -> Tensor:
        """Return the Jacobian with respect to some parameters, ``[n c, P']``."""
        params = {name: self.parameters[name] for name in names}
        with self.recorder.paused():
            outputs = outputs_of(self.model, self.batch.inputs)
            units = list(self.units())
            rows = example_rows(self.model, params, self.batch, outputs, units)
            return torch.cat(list(rows))


def _formed(parts: Sequence[Any], block: Block) -> Tensor:
    """Return example gradients ``[n, b d_out d_in]`` of calls in any form."""
    gradients = [g for uses in parts for g in example_gradients(uses, block.shape)]
    return torch.cat(gradients).flatten(1)


def _by_layer(layout: Layout, left: Side, right: Side) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the kernel ``[n c, m c]`` of every layer."""
    sizes = left.sizes()
    if right is not left:
        other = right.sizes()
        sizes = {block: size + other.get(block, 0) for block, size in sizes.items()}
    mixed: list[Block] = []
    for blocks in _packed(sizes):
        lefts = left.features(blocks)
        rights = lefts if right is left else right.features(blocks)
        for block in blocks:
            if block in lefts and block in rights:
                yield block.name, _gram(block, lefts.pop(block), rights, left, right)
            else:
                mixed.append(block)
    groups = {name: names for name, (_, names) in layout.groups.items()}
    for block in mixed:
        groups.setdefault(block.name, []).extend(block.parameters)
    for name, names in groups.items():
        rows = left.formed(names)
        yield name, rows @ (rows if right is left else right.formed(names)).mT


def _packed(sizes: Mapping[Block, int]) -> Iterator[list[Block]]:
    """Yield the blocks in groups of at most ``RECORDED`` elements of gradients."""
    group: list[Block] = []
    group_size = 0
    for block, size in sizes.items():
        if group and group_size + size > RECORDED:
            yield group
            group, group_size = [], 0
        group.append(block)
        group_size += size
    if group:
        yield group


def _gram(
    block: Block,
    mine: Features,
    others: dict[Block, Features],
    left: Side,
    right: Side,
) -> Tensor:
    """Return one layer's kernel."""
    theirs = mine if right is left else others.pop(block)
    others.pop(block, None)
    if mine.rows is not None and theirs.rows is not None:
        return mine.rows @ theirs.rows.mT
    if mine.rows is not None or theirs.rows is not None:
        return left.formed(block.parameters) @ right.formed(block.parameters).mT
    kernel = left.zeros(right)
    factors = (mine.inputs, mine.grads, theirs.inputs, theirs.grads)
    a, g, other_a, other_g = (t for t in factors if t is not None)
    add = add_hadamard if by_positions(a, g) else add_products
    add(kernel, a, g, other_a, other_g)
    return kernel


# Elements of intermediate products that exist at a time.
WORK = 1 << 25


def by_positions(inputs: Tensor, grads: Tensor) -> bool:
    """Return whether Gram matrices of positions are cheaper than example gradients.

    Per pair of rows of the kernel: ``S^2 (d_in + d_out)`` against ``d_in d_out``.
    """
    _, _, s, b, d_out = grads.shape
    if inputs.dim() == 2:
        return True
    return b == 1 and s**2 * (inputs.shape[-1] + d_out) < inputs.shape[-1] * d_out


def add_hadamard(
    kernel: Tensor, a: Tensor, g: Tensor, other_a: Tensor, other_g: Tensor
) -> None:
    """Add ``sum_st (a_is . a_jt) (g_iks . g_jlt)``, a few examples at a time."""
    n, c, s, _, _ = g.shape
    m, d, t = other_g.shape[:3]
    columns = other_g.squeeze(3).reshape(m * d * t, -1)
    step = max(1, WORK // (c * s * m * d * t))
    for start in range(0, n, step):
        rows = g[start : start + step].squeeze(3)
        part = a[start : start + step]
        k = len(part)
        if a.dim() == 2:
            inner = (part.reshape(-1, 1) == other_a.reshape(1, -1)).to(g.dtype)
        else:
            inner = part.reshape(k * s, -1) @ other_a.reshape(m * t, -1).mT
        outer = rows.reshape(k * c * s, -1) @ columns.mT
        outer = outer.reshape(k, c, s, m, d, t)
        outer *= inner.reshape(k, 1, s, m, 1, t)
        product = outer.sum(dim=(2, 5)).reshape(k * c, m * d)
        kernel[start * c : start * c + k * c] += product


def add_products(
    kernel: Tensor, a: Tensor, g: Tensor, other_a: Tensor, other_g: Tensor
) -> None:
    """Add the inner products of example gradients, some of a layer's rows at a time."""
    _, _, _, b, d_out = g.shape
    same = other_g is g
    width = max(1, WORK // (len(kernel) * b * a.shape[-1]))
    for start in range(0, d_out, width):
        rows = _weight_gradients(a, g[..., start : start + width])
        others = rows
        if not same:
            others = _weight_gradients(other_a, other_g[..., start : start + width])
        kernel += rows @ others.mT


def _weight_gradients(a: Tensor, g: Tensor) -> Tensor:
    """Return ``sum_s g_s a_s^T`` as ``[n c, b d_out d_in]``, see :class:`Features`."""
    n, c, s, b, d_out = g.shape
    grads = g.permute(0, 3, 1, 4, 2).reshape(n, b, c * d_out, s)
    product = grads @ a.permute(0, 2, 1, 3)
    gradients = product.reshape(n, b, c, d_out, -1).transpose(1, 2)
    return gradients.reshape(n * c, -1)


@dataclass(frozen=True)
class LayerFeatures:
    """One layer in the normal form, for a set of inputs of the model.

    Attributes:
        inputs: ``[N, S, b or 1, d_in]``; with a bias the last feature is 1.
        grads: ``[N, C, S, b, d_out]``, derivatives of the model's outputs with respect
            to the layer's.
        weight: ``[b, d_out, d_in]``, with the bias in the last column.
        has_bias: Whether there is that column.
    """

    inputs: Tensor
    grads: Tensor
    weight: Tensor
    has_bias: bool

    @property
    def features(self) -> Tensor:
        """The inputs without the bias's ones."""
        return self.inputs[..., :-1] if self.has_bias else self.inputs

    @property
    def input_grads(self) -> Tensor:
        """Derivatives with respect to ``features``, ``[N, C, S, b, d_in]``."""
        weight = self.weight[..., :-1] if self.has_bias else self.weight
        return torch.einsum("ncsbo,boi->ncsbi", self.grads, weight)


def layer_features(
    model: nn.Module, x: Any, *, parameters: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, LayerFeatures]]:
    """Return the outputs and every layer's inputs and output derivatives.

    Layers are those with Kronecker factors and vectors as inputs, in the order of the
    model; others (norms, embeddings, bare parameters) are left out. It takes ``C``
    backward passes.

    Args:
        model: The model, in eval mode while it is called. Its outputs ``[N, *]`` have
            ``C`` elements for each example.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        parameters: Names of parameters or layers. Default: what requires a gradient.

    Returns:
        The outputs ``[N, *]``, and layer name -> :class:`LayerFeatures`.

    Raises:
        ValueError: If outputs are not finite, or there are no examples.
        CaptureError: If the rows of a layer depend on several examples.
    """
    params = choose(model, parameters)
    with prepared(model, params):
        layout = lay_out(model, params, {nn.Module: "diagonal"}, None)
        blocks = [
            block
            for block in layout.blocks
            if not (block.exact or block.mixed or block.adapter.diagonal_input)
        ]
        side = Side(model, params, layout, x)
        with closing(side):
            if mixed := [block.name for block in blocks if block in side.mixed]:
                raise CaptureError(
                    f"Layers {listed(mixed)} have rows that depend on several examples "
                    "of the batch, so they have no inputs and derivatives of single "
                    "examples; leave them out with parameters=[...], or give one "
                    "example at a time."
                )
            features = side.features(blocks)
            outputs = side.outputs.detach()
    result = {}
    for block in blocks:
        parts = features.get(block)
        if parts is None or parts.inputs is None or parts.inputs.dim() < 4:
            continue
        assert parts.grads is not None
        has_bias = block.adapter.bias is not None
        weight = block.pack([tensor.detach() for tensor in block.tensors()]).detach()
        result[block.name] = LayerFeatures(
            parts.inputs.detach(), parts.grads.detach(), weight, has_bias
        )
    return outputs, result
