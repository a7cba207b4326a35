"""Losses of batches: mean or sum over the examples, and the targets that count.

Everything that takes a loss reads it through :class:`BatchLoss`. What batches and
losses may be, and what is refused, is written in ``docs/batches_and_losses.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ekfac.estimate.data import Batch, doubled, examples_of
from ekfac.likelihoods import (
    Bernoulli,
    Categorical,
    FromDistribution,
    Gaussian,
    Likelihood,
    _real,
)

IGNORED = -100
Loss = Callable[[Tensor, Any], Tensor]
# Relative difference allowed between gradients of one loss on several batches.
ROUNDING = 1e-2


class BatchLoss:
    """A loss ``(outputs, y) -> number`` of a batch, and what it is a mean over.

    Whether it is a mean or a sum is measured at the first batch whose targets can be
    taken apart: in the loss of the batch twice over an example has half the gradient,
    or the same. So is whether it treats every example on its own. This takes five calls
    of the loss, and four more in every other batch show what a mean is over.

    Args:
        function: The user's.
        reduction: ``"mean"`` or ``"sum"``. Default: what is measured, else the
            function's attribute or keyword ``reduction``, else ``"mean"``.
        coupled: Whether the gradient of an example may depend on others.

    Raises:
        TypeError: If it is no function.
        ValueError: For another reduction than mean and sum.
    """

    def __init__(
        self, function: Loss, reduction: str | None = None, *, coupled: bool = False
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"loss_fn must be a function (outputs, y) -> loss, got {function!r}; "
                "pass the structure after it, or as structure=."
            )
        self.function, self.coupled = function, coupled
        self._given, self._reduction = reduction, reduction
        if reduction is None:
            self._reduction = stated_by(function, "reduction", "mean")
        if self._reduction not in ("mean", "sum"):
            raise ValueError(
                "The loss's reduction must be 'mean' or 'sum', got "
                f"{self._reduction!r}; give loss_fn or loss_reduction= one of these."
            )
        self._measured = self._by_example = False
        self._even, self._looked_at = True, -1

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a batch, 0-d.

        Raises:
            ValueError: If there are no targets, or it is not one number that depends on
                the outputs.
        """
        require_targets(batch)
        loss = self.function(outputs, batch.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            is_tensor = isinstance(loss, Tensor)
            shape = list(loss.shape) if is_tensor else type(loss).__name__
            raise ValueError(
                f"loss_fn must return one number for a batch, got {shape}; use "
                "reduction='mean' or 'sum'."
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "loss_fn returned a number that does not depend on the outputs, for "
                f"batch {batch.number}; compute it from the outputs, without detach() "
                "or item()."
            )
        return loss.reshape(())

    def is_mean(self, outputs: Tensor, batch: Batch) -> bool:
        """Return whether the loss is a mean over the batch.

        Raises:
            ValueError: If it is neither a mean nor a sum, not what ``reduction`` says,
                or couples the examples; at a second batch, if it is a mean with weights
                that are not known, by which batches would have to be weighed.
        """
        if not self._measured:
            self._measure(outputs.detach(), batch)
        if self._reduction != "mean":
            return False
        if batch.number > self._looked_at:
            self._look_at(outputs.detach(), batch)
        if batch.number > 0:
            self.require_even()
        return True

    def weight(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the denominator of the mean, 0-d: counted targets or their weights.

        Where targets are no classes it is the number of examples.
        """
        kind = self.classes(outputs, batch)
        if kind is None or self._by_example:
            return torch.tensor(len(outputs))
        y = batch.targets[batch.targets != kind.ignore_index]
        weight = stated_by(self.function, "weight")
        if isinstance(weight, Tensor) and weight.dim() == 1:
            return weight.to(y.device)[y].sum()
        return torch.tensor(y.numel())

    def classes(
        self, outputs: Tensor, batch: Batch, likelihood: Categorical | None = None
    ) -> Categorical | None:
        """Return the likelihood that the targets are classes of, ``None`` if of none.

        Args:
            outputs: ``[N, *]``.
            batch: The batch.
            likelihood: What the user says of it.
        """
        if outputs.dim() < 2 or not is_classes(batch.targets):
            return None
        kind, ignored = likelihood or Categorical(), ignored_by(self.function)
        if kind.ignore_index == IGNORED and ignored is not None:
            kind = Categorical(kind.class_dim, ignored)
        try:
            return kind.fitted_to_targets(outputs, batch.targets)
        except ValueError:  # integers that are not classes: the loss is another one
            return None

    # -- how the loss runs over the examples ------------------------------------------

    def _gradient(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """Return the gradient in some outputs, ``None`` if the loss raises."""
        f = _real(outputs).clone().requires_grad_()
        try:
            return torch.autograd.grad(self(f, Batch(0, None, targets)), f)[0]
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return None

    def _measure(self, outputs: Tensor, batch: Batch) -> None:
        """Find out whether the loss is a mean or a sum, and of single examples."""
        require_targets(batch)
        n, y = len(outputs), batch.targets
        once = self._gradient(outputs, y)
        twice = self._gradient(torch.cat([outputs, outputs]), doubled(y, n))
        if once is None or twice is None:
            self._measured = True  # such targets cannot be taken apart
            return
        if not bool(once.any()):
            return
        self._check_separate(outputs, batch, once)
        self._looked_at = batch.number
        share = _multiple(twice[:n], once)
        for reduction, expected in (("mean", 0.5), ("sum", 1.0)):
            if abs(share - expected) < ROUNDING:
                if self._given not in (None, reduction):
                    raise ValueError(
                        f"loss_reduction={self._given!r}, but loss_fn is a {reduction} "
                        f"over the examples; pass loss_reduction={reduction!r}."
                    )
                self._reduction, self._measured = reduction, True
                return
        if not self.coupled:
            raise ValueError(
                "loss_fn is neither a mean nor a sum over the examples of a batch: for "
                f"batch {batch.number} twice over its gradient is {share:.3g} times "
                "that for it alone (0.5 for a mean, 1 for a sum); divide by the number "
                "of examples, or by nothing."
            )
        self._measured = True

    def _look_at(self, outputs: Tensor, batch: Batch) -> None:
        """Check in one more batch that the mean's weights are known."""
        self._looked_at = batch.number
        grads = self._gradient(outputs, batch.targets)
        if grads is not None and bool(grads.any()):
            self._check_separate(outputs, batch, grads)

    def _check_separate(self, outputs: Tensor, batch: Batch, grads: Tensor) -> None:
        """Raise ``ValueError`` if an example's gradient depends on the others.

        It does where ``[N, 1]`` and ``[N]`` broadcast to ``[N, N]``. The loss is called
        on the halves of the batch and on the example with the largest gradient. How
        much smaller their gradients are in the whole batch shows what a mean is over.
        """
        n, y = len(outputs), batch.targets
        half = (n + 1) // 2
        peak = int(grads.reshape(n, -1).norm(dim=1).argmax())
        by_terms = by_example = mean_of_all = True
        for start, end in ((0, half), (half, n), (peak, peak + 1)) if n > 1 else ():
            single = Batch(0, None, examples_of(y, start, end, n))
            alone = self._gradient(outputs[start:end], single.targets)
            if alone is None:
                return
            share = _multiple(grads[start:end], alone)
            remainder = grads[start:end] - share * alone
            if not bool(torch.isfinite(alone).all()):  # a mean over no target
                continue
            if float(remainder.norm()) > ROUNDING * float(grads[start:end].norm()):
                self._refuse_coupling(outputs, y)
                return  # coupled, and allowed to be
            if not share:
                continue
            weight = float(self.weight(outputs[start:end], single))
            weight /= max(float(self.weight(outputs, batch)), 1e-30)
            by_terms &= abs(share - weight) < ROUNDING * share
            by_example &= abs(share - (end - start) / n) < ROUNDING * share
            mean_of_all &= abs(share - 1) < ROUNDING
        if by_example != by_terms:
            self._by_example = by_example
        self._even &= by_terms or by_example or mean_of_all

    def require_even(self) -> None:
        """Raise ``ValueError`` if the mean has weights that are not known."""
        if not self._even:
            raise ValueError(
                "loss_fn is a mean with weights, or over some of the targets, which "
                "neither single losses nor the shares of batches can be told from; "
                "pass a loss that says them (nn.CrossEntropyLoss(weight=...)), or one "
                "that is a sum over the batch."
            )

    def _refuse_coupling(self, outputs: Tensor, y: Any) -> None:
        shapes = f"outputs {list(outputs.shape)}"
        broadcasts = False
        if isinstance(y, Tensor):
            shapes += f" and targets {list(y.shape)}"
            broadcasts = y.shape != outputs.shape and y.numel() == outputs.numel()
        if not broadcasts and self.coupled:
            return
        raise ValueError(
            f"loss_fn is no mean or sum of losses of single examples: with {shapes} "
            "the gradient of an example depends on the others; "
            + (
                "give both one shape (targets.view_as(outputs), or outputs.squeeze(-1) "
                "in the model)."
                if broadcasts
                else "ekfac.hessian takes a loss of the whole batch."
            )
        )


def _multiple(of: Tensor, like: Tensor) -> float:
    """Return the number ``c`` for which ``c like`` is nearest to ``of``."""
    size = float(like.double().square().sum())
    return float((of.double() * like.double()).sum()) / size if size else 0.0


def stated_by(loss_fn: object, name: str, default: Any = None) -> Any:
    """Return a keyword of a loss that is a partial function, or an attribute."""
    keywords = getattr(loss_fn, "keywords", None)  # functools.partial
    stated = getattr(loss_fn, name, default)
    return keywords.get(name, stated) if isinstance(keywords, dict) else stated


def ignored_by(loss_fn: object) -> int | None:
    """Return the target that a loss ignores, if it says so."""
    index = stated_by(loss_fn, "ignore_index")
    return index if isinstance(index, int) else None


def is_classes(targets: Any) -> bool:
    """Return whether targets are integers."""
    return isinstance(targets, Tensor) and not targets.is_floating_point()


def require_targets(batch: Batch) -> None:
    """Raise ``ValueError`` if the batch has no targets."""
    if batch.targets is None:
        raise ValueError(
            f"batch {batch.number} has no targets, which a loss needs; let data yield "
            "pairs (x, y), or mappings with 'labels'."
        )


def negative_log_likelihood(
    likelihood: Likelihood, outputs: Tensor, targets: Any
) -> Tensor:
    """Return ``-log p(targets | outputs)`` up to a constant, summed.

    Raises:
        ValueError: If the targets do not have the shape that the outputs ask for.
    """
    if isinstance(likelihood, Categorical):
        likelihood = likelihood.fitted_to_targets(outputs, targets)
        rows = likelihood._rows(outputs).flatten(0, 1)
        if is_classes(targets) and targets.numel() == len(rows):
            return F.cross_entropy(
                rows,
                targets.reshape(-1).long(),
                reduction="sum",
                ignore_index=likelihood.ignore_index,
            )
        if isinstance(targets, Tensor) and targets.shape == outputs.shape:
            shares = likelihood._rows(targets).flatten(0, 1)
            return -(shares * rows.log_softmax(dim=-1)).sum()
        _mismatched(targets, outputs)
    if isinstance(likelihood, FromDistribution):
        drawn = likelihood.family(outputs)
        shape = drawn.batch_shape + drawn.event_shape
        if isinstance(targets, Tensor) and targets.shape != shape:
            if targets.numel() != shape.numel():
                _mismatched(targets, outputs)
            targets = targets.reshape(shape)
        log_p: Tensor = drawn.log_prob(targets)
        return -log_p.sum()
    if not isinstance(likelihood, (Bernoulli, Gaussian)):
        raise ValueError(
            f"{type(likelihood).__name__} does not say what the loss of a target is; "
            "pass loss_fn."
        )
    if not isinstance(targets, Tensor) or targets.numel() != outputs.numel():
        _mismatched(targets, outputs)
    y = targets.reshape(outputs.shape).to(outputs.dtype)
    if isinstance(likelihood, Bernoulli):
        return F.binary_cross_entropy_with_logits(outputs, y, reduction="sum")
    halved: Tensor = (outputs - y).square().sum() / 2
    return halved


def _mismatched(targets: Any, outputs: Tensor) -> NoReturn:
    shape = list(targets.shape) if isinstance(targets, Tensor) else type(targets)
    raise ValueError(
        f"targets {shape} do not fit outputs {list(outputs.shape)} under the "
        "likelihood; pass loss_fn, or another likelihood."
    )
