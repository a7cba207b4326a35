"""Factors by their definition: loops over examples and positions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import collect, relative_error
from torch import Tensor, nn
from torch.func import functional_call

from ekfac import LayerCurvature


@dataclass
class Call:
    """One call of a layer: its inputs and the gradient of its output.

    ``features``: how many last dimensions of the output are features, or 0 for the
    channels of ``[N, C, *]``.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    grad: Tensor
    features: int = 1

    def rows(self, output: Tensor) -> Tensor:
        """Return ``[N, S, features]``."""
        if not self.features:
            return (
                output.flatten(2).transpose(1, 2)
                if output.dim() > 2
                else output[:, None]
            )
        size = output.shape[-self.features :].numel()
        return output.reshape(len(output), -1, size)

    def jacobian(self) -> Tensor:
        """Return ``[N, S, features, P]``, the output's derivatives in the parameters.

        The layer is linear in them: a column is its output with one element of them 1
        and all others 0.
        """
        module = copy.deepcopy(self.module)
        values = {n: torch.zeros_like(p) for n, p in module.named_parameters()}
        columns = []
        for flat in (value.view(-1) for value in values.values()):
            for i in range(len(flat)):
                flat[i] = 1
                with torch.no_grad():
                    output = functional_call(module, values, self.inputs)
                columns.append(self.rows(output))
                flat[i] = 0
        return torch.stack(columns, dim=-1)

    def vectors(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs ``[N, S, b, d_in]`` and gradients ``[N, S, b, d_out]``.

        ``index`` ``[b, d_out, d_in]`` says where in the layer's parameters the block's
        elements are. The input that an output sees is its derivative in its own row of
        the weight; the outputs of a block all see the same, and no other row.
        """
        b, d_out, _ = index.shape
        J = self.jacobian()
        J = J.reshape(*J.shape[:2], b, d_out, -1)
        where = index.expand(*J.shape[:2], -1, -1, -1)
        own = J.gather(-1, where)
        assert torch.equal(own, own[:, :, :, :1].expand_as(own))
        assert not J.scatter(-1, where, 0)[..., index.flatten()].any()
        return own[:, :, :, 0], self.rows(self.grad).unflatten(-1, (b, d_out))


def index_of(layer: LayerCurvature) -> Tensor:
    """Return ``[b, d_out, d_in]``: positions in the layer's flattened parameters."""
    tensors, start = {}, 0
    for name, parameter in zip(
        layer.parameter_names, layer.block.tensors(), strict=True
    ):
        count = parameter.numel()
        tensors[name] = torch.arange(start, start + count).reshape(parameter.shape)
        start += count
    return layer.pack(tensors)


def by_definition(
    calls: Sequence[Call],
    index: Tensor,
    *,
    sharing: str = "expand",
    exact: bool = False,
    ignored: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``A`` and ``G`` by loops over examples and positions.

    ``exact``: the second moment of the examples' gradients and 1. ``ignored``: an index
    of an embedding that does not count.
    """
    pairs = [call.vectors(index) for call in calls]
    b, d_out, d_in = index.shape
    N = len(pairs[0][0])
    A = pairs[0][0].new_zeros(b, d_in, d_in)
    G = A.new_zeros(b, d_out, d_out)
    positions = 0
    for n in range(N):
        example = [
            (a[n, s], g[n, s])
            for a, g in pairs
            for s in range(a.shape[1])
            if ignored is None or not a[n, s, 0, ignored]
        ]
        if exact:
            gradient = sum(g * a for a, g in example)
            A += torch.einsum("bi,bj->bij", gradient, gradient) / N
            continue
        if sharing == "reduce" and example:
            mean = sum(a for a, _ in example) / len(example)
            example = [(mean, sum(g for _, g in example))]
        for a, g in example:
            A += torch.einsum("bi,bj->bij", a, a)
            G += torch.einsum("bi,bj->bij", g, g) / N
            positions += 1
    return (A, torch.ones_like(G)) if exact else (A / positions, G)


def observe(
    model: nn.Module, modules: Sequence[nn.Module], loss: Callable[[], Tensor]
) -> list[list[tuple[tuple[Any, ...], Tensor]]]:
    """Return each module's calls: what went in and the gradient of what came out."""
    seen: list[tuple[int, tuple[Any, ...], Tensor]] = []

    def note(i: int) -> Callable[..., None]:
        return lambda module, args, output: seen.append((i, args, output))

    handles = [m.register_forward_hook(note(i)) for i, m in enumerate(modules)]
    value = loss()
    for handle in handles:
        handle.remove()
    grads = torch.autograd.grad(value, [output for _, _, output in seen])
    calls: list[list[tuple[tuple[Any, ...], Tensor]]] = [[] for _ in modules]
    for (i, args, _), grad in zip(seen, grads, strict=True):
        inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        calls[i].append((inputs, grad))
    return calls


def weighed(model: nn.Module, *inputs: Tensor) -> Callable[[], Tensor]:
    """Return a loss: a random linear functional of the output, a sum over examples."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        shape = copy.deepcopy(model)(*inputs).shape
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda: (model(*inputs) * weights).sum()


def check_factors(
    model: nn.Module,
    layer: str,
    module: nn.Module,
    inputs: Sequence[Tensor],
    features: int = 1,
    *,
    sharing: str = "expand",
    ignored: int | None = None,
) -> LayerCurvature:
    """Check the factors of one layer in a training step of ``model``."""
    loss = weighed(model, *inputs)
    (calls,) = observe(model, [module], loss)
    optimizer = collect(model, loss, loss_reduction="sum", sharing=sharing)
    found = optimizer.curvature[layer]
    A, G = by_definition(
        [Call(module, *call, features) for call in calls],
        index_of(found),
        sharing=sharing,
        exact=found.block.exact,
        ignored=ignored,
    )
    assert found.A is not None
    if found.A.dim() == 2:
        A = A.diagonal(dim1=-2, dim2=-1)
    assert relative_error(found.A, A) < 1e-10
    assert relative_error(found.G, G) < 1e-10
    return found


class Between(nn.Module):
    """A layer between nonlinearities, with a batch dimension where it has none."""

    def __init__(self, layer: nn.Module, batched: bool = True) -> None:
        super().__init__()
        self.layer, self.batched = layer, batched

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batched else x[0]
        y: Tensor = self.layer(torch.sin(x) if x.is_floating_point() else x).sin()
        return y if self.batched else y.unsqueeze(0)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Stack(nn.Sequential):
    """Modules after one another with a nonlinearity between."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x).sin()
        return x
