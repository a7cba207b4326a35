"""Mean absolute gradients of single examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.curvature.normal_form import Pair, example_gradients, normal_form
from ekfac.estimate.build import Problem, _Estimate
from ekfac.estimate.data import Batch
from ekfac.estimate.layers import lay_out
from ekfac.estimate.moments import MomentSums
from ekfac.estimate.sources import Source
from ekfac.likelihoods import Terms
from ekfac.matrices import DiagonalMatrix


def output_sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    parameters: Iterable[str] | None = None,
    progress: bool = False,
) -> DiagonalMatrix:
    """Return ``E_x |d |f(x)|^2 / d theta|``, of single examples (Aljundi et al. 2018).

    The absolute value is taken of each example's gradient, not of a batch's. No targets
    are needed. The model is in eval mode meanwhile, and left as it was.

    Args:
        model: The model.
        data: Batches, as for :func:`ekfac.fisher`.
        parameters: Names of parameters or layers. Default: what requires a gradient.
        progress: Whether to show a bar, if tqdm is installed.

    Raises:
        ValueError: If the data are empty or not finite.
    """
    problem = Problem.of(model, data, _SquaredNorm(), parameters, progress)
    problem.data.first()
    layout = lay_out(model, problem.parameters, "diagonal", None)
    estimate = _AbsoluteEstimate(problem, layout, "expand", None)
    estimate.moments = {block: _AbsoluteSums(block, False) for block in layout.blocks}
    estimate.run()
    found = estimate.matrix()
    assert isinstance(found, DiagonalMatrix)
    return found


class _SquaredNorm(Source):
    """The gradient of the outputs' squared norm."""

    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield ``2 f``."""
        yield 2 * outputs


class _AbsoluteSums(MomentSums):
    """Sums over examples of absolute gradients."""

    def add(self, pairs: Sequence[Pair], terms: Terms | None) -> bool:
        """Add the calls of one backward pass, as in the base class."""
        count = 0
        for uses in normal_form(pairs, terms, self.dtype):
            if len({len(rows.grads) for rows in uses}) > 1:
                return False
            count += len(uses[0].grads)
            only = uses[0]
            if len(uses) == 1 and not only.indexed and only.grads.shape[1] == 1:
                # One position: |g a^T| = |g| |a|^T, summed by one product.
                g, a = only.grads[:, 0].abs(), only.inputs[:, 0].abs()
                a = a.expand(-1, g.shape[1], -1)
                self.squares += torch.einsum("nbo,nbi->boi", g, a)
                continue
            for gradients in example_gradients(uses, self.block.shape):
                self.add_gradients(gradients)
        return terms is None or count == terms.size

    def add_gradients(self, gradients: Tensor) -> None:
        """Add gradients of examples, ``[n, b, d_out, d_in]``."""
        self.squares += gradients.abs().sum(dim=0)


class _AbsoluteEstimate(_Estimate):
    """The pass over the data, for absolute gradients."""

    def _take_row(self, rows: Tensor) -> None:
        sizes = [
            sum(self.problem.parameters[name].numel() for name in names)
            for _, names in self.layout.groups.values()
        ]
        for name, part in zip(
            self.layout.groups, rows.split(sizes, dim=1), strict=True
        ):
            total = part.abs().sum(dim=0)
            self.sums[name] = self.sums[name] + total if name in self.sums else total
