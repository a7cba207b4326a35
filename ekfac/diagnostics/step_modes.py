"""What a gradient step changes in the function, by modes of the tangent kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.estimate import ntk
from ekfac.estimate.data import choose, moved, outputs_of, prepared


@dataclass(frozen=True)
class StepModes:
    """A step's change of the outputs in the eigenvectors of the tangent kernel.

    Attributes:
        eigenvalues: ``lambda_j`` of ``J J^T``, descending, ``[n c]``.
        vectors: ``u_j`` in columns, ``[n c, n c]``, examples first.
        slopes: ``u_j^T grad_f L`` ``[n c]``.
        changes: ``-lr lambda_j u_j^T grad_f L`` ``[n c]``, to first order in ``lr``.
        outputs: The outputs before the step, ``[n, c]``.
        lr: The learning rate.
    """

    eigenvalues: Tensor
    vectors: Tensor
    slopes: Tensor
    changes: Tensor
    outputs: Tensor
    lr: float

    @property
    def foretold(self) -> Tensor:
        """Change of the outputs ``[n, c]``, to first order."""
        return (self.vectors @ self.changes).reshape(self.outputs.shape)

    @property
    def time_constants(self) -> Tensor:
        """Steps ``[n c]`` in which a mode's error falls to ``1/e``, kernel fixed.

        ``-1 / log(1 - lr lambda_j)`` for a squared error ``1/2 |f - y|^2`` (George
        2023, B.1.5.2, with its reciprocal); infinite where the kernel is zero, nan for
        modes that ``lr`` makes oscillate.
        """
        return -1 / torch.log1p(-self.lr * self.eigenvalues.clamp(min=0))

    def plot(self, axis: Any = None) -> Any:
        """Draw size of slopes and changes over the modes; return the axes.

        Args:
            axis: Of matplotlib; a new figure's if there is none.
        """
        axis = axes_or_new(axis)
        ranks = range(1, len(self.slopes) + 1)
        axis.loglog(ranks, self.slopes.abs(), label="gradient in the mode")
        axis.loglog(ranks, self.changes.abs(), label="change of the function")
        axis.set(xlabel="mode, by eigenvalue of the tangent kernel")
        axis.legend()
        return axis


def step_modes(
    model: nn.Module,
    x: Any,
    loss_fn: Callable[[Tensor], Tensor],
    *,
    lr: float,
    parameters: Iterable[str] | None = None,
) -> StepModes:
    """Return how a gradient step changes the outputs (George 2023, lemma 6.2.1).

    Each mode changes by its eigenvalue times its share of the loss's gradient: those
    with large eigenvalues are learned first, the local spectral bias.

    Args:
        model: In eval mode meanwhile.
        x: Inputs of ``n`` examples, as for :func:`ekfac.ntk`; the step is on these.
        loss_fn: Loss of the outputs, a number.
        lr: Learning rate of the step.
        parameters: As for :func:`ekfac.ntk`.
    """
    chosen = choose(model, parameters)
    with prepared(model, chosen):
        device = next(iter(chosen.values())).device
        outputs = outputs_of(model, moved(x, device)).detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(outputs), outputs)
    kernel: Tensor = ntk(model, x, parameters=chosen).to_dense()
    values, vectors = torch.linalg.eigh((kernel + kernel.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    slopes = vectors.mT @ slope.reshape(-1)
    return StepModes(
        eigenvalues=values,
        vectors=vectors,
        slopes=slopes,
        changes=-lr * values * slopes,
        outputs=outputs.detach().reshape(len(outputs), -1),
        lr=lr,
    )
