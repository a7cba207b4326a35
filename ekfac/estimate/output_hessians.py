"""Hessians of the loss in the outputs, as pseudo-gradients: which matrix is estimated.

Every matrix here is ``(1/N) sum_n J_n^T M_n J_n`` with ``J_n`` the Jacobian of an
example's outputs and ``M_n = sum_k h_nk h_nk^T``. A source yields the ``h_k`` of a
whole batch, and multiplies with its ``M_n`` without forming them where it can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ekfac.estimate.data import Batch
from ekfac.estimate.differentiability import check_hessian
from ekfac.estimate.losses import (
    BatchLoss,
    is_classes,
    negative_log_likelihood,
    require_targets,
)
from ekfac.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    TargetMask,
    _real,
    signed,
)
from ekfac.matrices.eigen import symmetric_eigh


def check_finite(values: Tensor, what: str, batch: Batch) -> None:
    """Raise ``ValueError`` naming the batch unless all values are finite."""
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"{what} of batch {batch.number} are not finite; leave out or repair the "
            "examples that make them so."
        )


class Source(ABC):
    """The matrices ``M_n`` of the outputs of every batch.

    Args:
        seed: Of what is random; every batch has its own numbers, always the same.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def generator(self, batch: Batch, device: torch.device) -> torch.Generator:
        """Return the generator of a batch's random numbers."""
        seed = (self.seed + 1_000_003 * batch.number) % 2**63
        return torch.Generator(device).manual_seed(seed)

    def terms(self, outputs: Tensor, batch: Batch) -> TargetMask:
        """Return which targets count."""
        n = len(outputs)
        mask = self.mask(outputs, batch)
        if mask is None:
            return TargetMask.full(n)
        touched = mask.expand(outputs.shape).reshape(n, -1).any(dim=1, keepdim=True)
        counted = mask.reshape(n, -1)
        full = bool(counted.all())
        return TargetMask(n, touched.sum(), counted.sum(), None if full else counted)

    def share(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the weight of a batch in the mean over the data, 0-d."""
        return self.terms(outputs, batch).examples

    def mask(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """Return the outputs that have a target that counts, ``None`` for all.

        The mask is true there, and has size 1 in the dimension of the classes.
        """
        return None

    @abstractmethod
    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield every ``h_k``, with the shape of ``outputs``."""

    def signed(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield every ``h_k`` to back-propagate for a whole batch.

        Where a layer's gradient sums over the examples, only its signs at random make
        the square of the sum, on average, the sum of squares.
        """
        generator = self.generator(batch, outputs.device)
        yield from signed(self.pseudo_gradients(outputs, batch), generator)

    def product(self, outputs: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
        """Return ``M_n v_n``.

        Args:
            outputs: ``[N, *]``.
            batch: The batch.
            vectors: ``[k, N, *]``.
        """
        product = torch.zeros_like(vectors)
        for h in self.pseudo_gradients(outputs, batch):
            inner = (h * vectors).flatten(2).sum(dim=2)
            product += inner.reshape(*inner.shape, *[1] * (h.dim() - 1)) * h
        return product


class _OfLikelihood(Source):
    """A matrix that a likelihood defines, zero at ignored targets."""

    def __init__(self, likelihood: Likelihood, seed: int = 0) -> None:
        super().__init__(seed)
        self.likelihood = likelihood

    def mask(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """Leave out the targets that are to be ignored, as the cross-entropy does."""
        return counted_outputs(self._fitted(outputs, batch), outputs, batch.targets)

    def _fitted(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """Return the likelihood with what the batch's targets say of it."""
        return self.likelihood.fitted_to_targets(outputs, batch.targets)

    def _kept(self, values: Tensor, outputs: Tensor, batch: Batch) -> Tensor:
        mask = self.mask(outputs, batch)
        return values if mask is None else values * mask


class ExactFisher(_OfLikelihood):
    """The expectation over the likelihood's targets."""

    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield the likelihood's exact pseudo-gradients."""
        for h in self._fitted(outputs, batch).exact(outputs):
            yield self._kept(h, outputs, batch)

    def product(self, outputs: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
        """Return ``M_n v_n``, in closed form for the three named likelihoods."""
        kind = self._fitted(outputs, batch)
        if isinstance(kind, Categorical):
            dim = kind.dim_of(outputs)
            p = _real(outputs).softmax(dim)
            inner = (p * vectors).sum(dim=dim + 1, keepdim=True)
            products = p * (vectors - inner)
        elif isinstance(kind, Bernoulli):
            p = _real(outputs).sigmoid()
            products = p * (1 - p) * vectors
        elif isinstance(kind, Gaussian):
            products = vectors
        else:
            return super().product(outputs, batch, vectors)
        return self._kept(products.to(vectors.dtype), outputs, batch)


class SampledFisher(_OfLikelihood):
    """A mean over drawn targets, the same ones for a batch every time.

    Args:
        likelihood: What is drawn from.
        samples: Draws per example.
        seed: Of the draws.
    """

    def __init__(self, likelihood: Likelihood, samples: int, seed: int) -> None:
        super().__init__(likelihood, seed)
        self.samples = samples

    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield ``samples`` sampled pseudo-gradients over the root of their number."""
        generator = self.generator(batch, outputs.device)
        likelihood = self._fitted(outputs, batch)
        for _ in range(self.samples):
            h = likelihood.sampled(outputs, generator) / self.samples**0.5
            yield self._kept(h, outputs, batch)

    def signed(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield every ``h_k`` unsigned: drawn targets are independent, of mean zero."""
        yield from self.pseudo_gradients(outputs, batch)


class EmpiricalFisher(_OfLikelihood):
    """The gradients of the loss of the data's own targets.

    Args:
        likelihood: Its negative log-likelihood is the loss if there is no other; says
            which targets count.
        loss: The loss of a batch, or ``None``.
        seed: Of the signs.
    """

    def __init__(
        self, likelihood: Likelihood, loss: BatchLoss | None, seed: int = 0
    ) -> None:
        super().__init__(likelihood, seed)
        self.loss = loss

    def _fitted(self, outputs: Tensor, batch: Batch) -> Likelihood:
        """Return the likelihood, with the loss's own targets to ignore."""
        if self.loss is None:
            return super()._fitted(outputs, batch)
        return self._classes(outputs, batch) or self.likelihood

    def _classes(self, outputs: Tensor, batch: Batch) -> Categorical | None:
        """Return the likelihood that the targets of the loss are classes of."""
        if self.loss is None or not isinstance(self.likelihood, Categorical):
            return None
        return self.loss.classes(outputs, batch, self.likelihood)

    def terms(self, outputs: Tensor, batch: Batch) -> TargetMask:
        """Count the targets that are not ignored; all where they are no classes.

        A hinge loss may have no gradient at an example that counts.
        """
        if self.loss is None or self._classes(outputs, batch) is not None:
            return super().terms(outputs, batch)
        return self.likelihood.terms(outputs, torch.ones_like(outputs))

    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield the one gradient of the examples' own losses."""
        require_targets(batch)
        f = outputs.detach().requires_grad_()
        if self.loss is None:
            kind = self._fitted(outputs, batch)
            loss = negative_log_likelihood(kind, f, batch.targets)
        else:
            loss = self.loss(f, batch)
        grad = torch.autograd.grad(loss, f)[0]
        check_finite(grad, "The gradients of the loss", batch)
        if self.loss is not None and self.loss.is_mean(outputs, batch):
            self.loss.require_even()
            if self._classes(outputs, batch) is not None:
                grad = grad * self.loss.weight(outputs, batch).to(grad.device)
            else:
                grad = grad * self.terms(outputs, batch).terms.to(grad.device)
        yield grad


class LossHessian(Source):
    """The Hessian of a convex loss with respect to each example's outputs.

    Attributes:
        verified: Autograd functions whose second derivatives were found right.
    """

    def __init__(self, loss: BatchLoss, seed: int = 0) -> None:
        super().__init__(seed)
        self.loss = loss
        self.verified: set[Any] = set()

    def mask(self, outputs: Tensor, batch: Batch) -> Tensor | None:
        """Leave out the targets that the loss ignores, as :func:`ekfac.fisher` does."""
        kind = self.loss.classes(outputs, batch)
        return None if kind is None else counted_outputs(kind, outputs, batch.targets)

    def share(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the weight of the targets of a mean; of a sum, its examples."""
        require_targets(batch)
        if self.loss.is_mean(outputs, batch):
            return self.loss.weight(outputs, batch)
        return super().share(outputs, batch)

    def total(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss summed over the targets of the batch that count."""
        loss = self.loss(outputs, batch)
        if not self.loss.is_mean(outputs, batch):
            return loss
        return loss * self.loss.weight(outputs, batch).to(loss.device)

    def _gradient(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the outputs as a leaf, and the gradient with its graph.

        In single precision at least: half has too few digits for second derivatives.
        """
        f = _real(outputs.detach()).requires_grad_()
        loss = self.total(f, batch)
        check_hessian(loss, None, partial(self.total, f, batch), self.verified)
        grad = torch.autograd.grad(loss, f, create_graph=True)[0]
        check_finite(grad, "The gradients of the loss", batch)
        return f, grad

    def product(self, outputs: Tensor, batch: Batch, vectors: Tensor) -> Tensor:
        """Return ``M_n v_n``: the gradient's derivatives along the vectors."""
        f, grad = self._gradient(outputs, batch)
        if not grad.requires_grad:
            return torch.zeros_like(vectors)
        rows = [
            torch.autograd.grad(grad, f, v, retain_graph=True, materialize_grads=True)
            for v in vectors.to(f.dtype)
        ]
        return torch.stack([row for (row,) in rows]).to(vectors.dtype)

    def pseudo_gradients(self, outputs: Tensor, batch: Batch) -> Iterator[Tensor]:
        """Yield the eigenvectors of the Hessians, scaled by the eigenvalues' roots.

        Where the loss is a sum over positions or single outputs, the Hessians have
        blocks, which are decomposed one by one.

        Raises:
            ValueError: If an eigenvalue is negative: the loss is not convex.
        """
        dtype, outputs = outputs.dtype, _real(outputs)
        layout = output_blocks(outputs, partial(self.product, outputs, batch))
        n, positions, k = layout.split(outputs).shape
        units = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
        vectors = layout.join(units[:, None, None].expand(k, n, positions, k))
        H = layout.split(self.product(outputs, batch, vectors)).permute(1, 2, 0, 3)
        values, Q = symmetric_eigh(H) if k > 1 else (H[..., 0], torch.ones_like(H))
        noise = 64 * torch.finfo(H.dtype).eps * values.abs().amax().clamp(min=1e-30)
        if bool((values < -noise).any()):
            raise ValueError(
                "The Gauss-Newton matrix needs a loss that is convex in the outputs, "
                f"one of batch {batch.number} has curvature {float(values.min()):.3g};"
                " use ekfac.hessian."
            )
        roots = Q * values.clamp(min=0).sqrt().unsqueeze(-2)
        for s, i in product(range(positions), range(k)):
            if bool((values[:, s, i] > noise).any()):
                h = torch.zeros_like(roots[..., i])
                h[:, s] = roots[:, s, :, i]
                yield layout.join(h).to(dtype)


def counted_outputs(
    likelihood: Likelihood, outputs: Tensor, targets: Any
) -> Tensor | None:
    """Return the mask of :meth:`Source.mask` for a likelihood fitted to the targets."""
    if not isinstance(likelihood, Categorical) or not is_classes(targets):
        return None
    dim, counted = likelihood.dim_of(outputs), targets != likelihood.ignore_index
    if bool(counted.all()):
        return None
    shape = [size for i, size in enumerate(outputs.shape) if i != dim]
    mask: Tensor = counted.reshape(shape).unsqueeze(dim)
    return mask


# Random halves of the outputs that are tried against each other.
PROBES = 3


@dataclass(frozen=True)
class OutputBlocks:
    """A layout of outputs ``[N, *]`` as blocks ``[N, S, C]``.

    Attributes:
        shape: Of one example's outputs.
        dim: The dimension within a block, from 1; 0: all outputs are one block;
            ``None``: every output is one.
    """

    shape: tuple[int, ...]
    dim: int | None

    def split(self, outputs: Tensor) -> Tensor:
        """Return ``[*, S, C]`` of ``[*, *shape]``."""
        lead = outputs.shape[: outputs.dim() - len(self.shape)]
        if self.dim is None:
            return outputs.reshape(*lead, -1, 1)
        if self.dim:
            outputs = outputs.movedim(len(lead) + self.dim - 1, -1)
            return outputs.reshape(*lead, -1, outputs.shape[-1])
        return outputs.reshape(*lead, 1, -1)

    def join(self, blocks: Tensor) -> Tensor:
        """Return ``[*, *shape]`` of ``[*, S, C]``: the inverse of ``split``."""
        lead = blocks.shape[:-2]
        if not self.dim:
            return blocks.reshape(*lead, *self.shape)
        others = [n for i, n in enumerate(self.shape, 1) if i != self.dim]
        moved = blocks.reshape(*lead, *others, blocks.shape[-1])
        return moved.movedim(-1, len(lead) + self.dim - 1)


def output_blocks(outputs: Tensor, product: Callable[[Tensor], Tensor]) -> OutputBlocks:
    """Return the finest layout in whose blocks a Hessian is block-diagonal.

    The products of vectors that are zero in a random half of the blocks have to be zero
    there exactly. Every example has another half.

    Args:
        outputs: ``[N, *]``.
        product: Of the examples' Hessians with ``[k, N, *]``.
    """
    shape = tuple(outputs.shape[1:])
    candidates: list[int | None] = [None]
    if len(shape) > 1:
        candidates += [len(shape), 1]
    generator = torch.Generator().manual_seed(0)
    for dim in candidates:
        layout = OutputBlocks(shape, dim)
        size = (PROBES, *layout.split(outputs).shape)
        mask = torch.rand(size[:-1], generator=generator).unsqueeze(-1) < 0.5
        vectors = torch.randn(size, generator=generator) * mask
        products = layout.split(product(layout.join(vectors.to(outputs))))
        if not bool((products * ~mask.to(outputs.device)).any()):
            return layout
    return OutputBlocks(shape, 0)
