"""The Hessian of a loss, differentiated once and multiplied many times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.diagnostics.convolution import FasterConvolutions
from ekfac.estimate.data import Data, choose, outputs_of, space_of
from ekfac.estimate.examples import back_propagated
from ekfac.estimate.products import gradients, twice_differentiable
from ekfac.estimate.sources import Loss, LossHessian, check_finite, runs_as_mean
from ekfac.vectors import standard_normal


class HessianProducts:
    """The Hessian of a loss at the present parameters, as an operator ``[P, P]``.

    ``ekfac.hessian(...)`` runs forward and backward at every product. Here the gradient
    is taken once and its graph kept, so that a product is one more backward pass
    through it: about two and a half gradient passes in place of more than three. The
    price is memory, that of the activations of all data and of their gradients. The
    products are of the parameters at construction; changing them afterwards makes
    torch refuse the next product.

    Args:
        model: Any module; in eval mode while the graph is built.
        data: Iterable of ``(x, y)`` batches.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        parameters: Names of parameters or layers, for a diagonal block. Default: all
            that require a gradient.
        loss_reduction: Whether ``loss_fn`` is a ``"mean"`` or a ``"sum"`` over the
            batch. Default: its ``reduction``, else ``"mean"``.

    Attributes:
        space: Names and shapes of the vectors.
        num_products: How many columns were multiplied so far.

    Raises:
        ValueError: If the data are empty, not finite or without targets.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        loss_fn: Loss,
        *,
        parameters: Iterable[str] | None = None,
        loss_reduction: str | None = None,
    ) -> None:
        chosen = choose(model, parameters)
        self.space = space_of(chosen)
        self.num_products = 0
        self._parameters = list(chosen.values())
        self._grads: list[list[Tensor]] = []
        self._outputs: list[Tensor] = []
        source = LossHessian(loss_fn, runs_as_mean(loss_fn, loss_reduction))
        count = 0
        batches = Data(data, self.device)
        with (
            twice_differentiable(model, chosen),
            FasterConvolutions(),
            batches.batches("graph") as items,
        ):
            for batch in items:
                outputs = outputs_of(model, batch.inputs)
                check_finite(outputs, "The model's outputs", batch)
                total = source.total(outputs, batch)
                self._grads.append(gradients(total, self._parameters))
                self._outputs.append(outputs)
                count += len(outputs)
        self._count = count

    @property
    def shape(self) -> torch.Size:
        """``[P, P]``."""
        return torch.Size((self.space.size, self.space.size))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the columns."""
        return self._parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the columns."""
        return self._parameters[0].device

    def __matmul__(self, columns: Tensor) -> Tensor:
        """Return the products with columns ``[P, k]``, one after another."""
        self.num_products += columns.shape[1]
        products = []
        for row in columns.detach().mT:
            weights = list(self.space.split(row.unsqueeze(0)).values())
            parts = [
                back_propagated(grads, self._parameters, weights)
                for grads in self._grads
            ]
            products.append(torch.stack(parts).sum(dim=0)[0] / self._count)
        return torch.stack(products, dim=1)

    def gradient(self) -> Tensor:
        """Return the gradient of the loss averaged over the examples, ``[P]``."""
        rows = [torch.cat([g.reshape(-1) for g in grads]) for grads in self._grads]
        return torch.stack(rows).sum(dim=0).detach() / self._count

    def start(self, generator: torch.Generator | None = None) -> Tensor:
        """Return ``J^T u`` ``[P]`` of random ``u``, for one backward pass.

        It has nothing of the null space of the Gauss-Newton matrix, so less of it lies
        in the bulk of the spectrum than of a random vector: two or three products less
        until the outliers have converged (benchmarks/hessian_cost.py).
        """
        total = torch.zeros(self.space.size, dtype=self.dtype, device=self.device)
        for outputs in self._outputs:
            noise = standard_normal(
                outputs.shape,
                generator=generator,
                dtype=outputs.dtype,
                device=outputs.device,
            )
            rows = back_propagated([outputs], self._parameters, [noise.unsqueeze(0)])
            total += rows[0]
        return total
