"""The penalty as a function that torch differentiates: no graph through factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from ekfac.continual.base import Penalty


class Quadratic(torch.autograd.Function):
    """The value of a penalty, with its gradient in closed form: no graph is kept."""

    @staticmethod
    def forward(ctx: Any, penalty: Penalty, names: list[str], *tensors: Tensor) -> Any:
        """Return the value and keep the gradients."""
        parameters = dict(zip(names, tensors, strict=True))
        value, gradients = penalty._value_and_gradients(parameters)
        ctx.penalty, ctx.strength = penalty, penalty.strength
        ctx.all_names, ctx.names = names, [n for n in names if n in gradients]
        ctx.save_for_backward(*tensors, *(gradients[name] for name in ctx.names))
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        """Scale the gradients."""
        saved, count = ctx.saved_tensors, len(ctx.all_names)
        found: tuple[Tensor, ...] = saved[count:]
        if torch.is_grad_enabled():  # somebody differentiates once more
            apply: Any = _Gradient.apply
            found = apply(ctx.penalty, ctx.all_names, ctx.names, *saved[:count])
        factor = grad_output * ctx.strength
        grads = {
            name: grad * factor.to(grad)
            for name, grad in zip(ctx.names, found, strict=True)
        }
        ctx.penalty._contributed(grads)
        return None, None, *(grads.get(name) for name in ctx.all_names)


class _Gradient(torch.autograd.Function):
    """The gradient as a function of the parameters, which is linear."""

    @staticmethod
    def forward(
        ctx: Any, penalty: Penalty, names: list[str], kept: list[str], *tensors: Tensor
    ) -> Any:
        """Return the gradients of the parameters called ``kept``."""
        parameters = dict(zip(names, tensors, strict=True))
        ctx.penalty, ctx.names, ctx.kept = penalty, names, kept
        ctx.save_for_backward(*tensors)
        gradients = penalty._value_and_gradients(parameters)[1]
        return tuple(gradients[name] for name in kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        """Multiply with the matrix, which is symmetric."""
        parameters = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        given = dict(zip(ctx.kept, vectors, strict=True))
        found = ctx.penalty._products(parameters, given)
        return None, None, None, *(found.get(name) for name in ctx.names)
