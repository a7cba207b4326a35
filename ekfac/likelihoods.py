"""Likelihoods: pseudo-gradients of a network's outputs that make its Fisher matrix.

With ``p(y | f)`` the likelihood of a target under the outputs ``f`` of one example, the
Fisher matrix of the outputs is ``E_y[h h^T]``, ``h = d(-log p(y | f)) / df``. A
pseudo-gradient is such an ``h`` for a drawn ``y`` ("mc"), or one of a set whose outer
products sum to the expectation ("exact"). Back-propagated, they give the Fisher matrix
of the parameters (Martens & Grosse 2015, section 3; George 2023, eq. 2.4.13).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from ekfac.errors import warn_outside


@dataclass(frozen=True)
class TargetMask:
    """Which targets of a batch count.

    Attributes:
        size: Length of the batch dimension.
        examples: How many examples have a target that counts, 0-d: on a device nothing
            waits for it.
        terms: How many loss terms count, one per target, 0-d.
        mask: ``[N, S]``, true where a target counts, or ``None`` if all do.
    """

    size: int
    examples: Tensor
    terms: Tensor
    mask: Tensor | None

    @classmethod
    def full(cls, size: int) -> TargetMask:
        """Return that every one of ``size`` examples counts, with one target each."""
        count = torch.tensor(size)
        return cls(size, count, count, None)


class Likelihood(ABC):
    """Distribution of the targets given the network's outputs ``[N, *]``."""

    @abstractmethod
    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return one pseudo-gradient, with the shape of ``outputs``."""

    @abstractmethod
    def exact(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield pseudo-gradients whose outer products sum to the Fisher matrix.

        Each has the shape of ``outputs``.
        """

    def fitted_to_targets(self, outputs: Tensor, targets: Any) -> Likelihood:
        """Return the likelihood with the settings that a batch's targets decide.

        Raises:
            ValueError: If the targets contradict the outputs.
        """
        return self

    def fitted_to_gradient(self, outputs: Tensor, grad: Tensor) -> Likelihood:
        """Return the likelihood with the settings that the loss's gradient decides.

        Args:
            outputs: ``[N, *]``.
            grad: Gradient of the user's loss with respect to them, ``[N, *]``.
        """
        return self

    def counted(self, outputs: Tensor, grad: Tensor) -> Tensor:
        """Return ``[N, S]``, true where ``grad`` of the user's loss is not all zero.

        An ignored or padded target is one on which the loss does not depend.
        """
        touched = grad != 0
        if touched.dim() > 2:
            channel = -1 if touched.dim() == 3 else 1
            return touched.any(dim=channel).reshape(len(touched), -1)
        return touched.reshape(len(touched), -1).any(dim=1, keepdim=True)

    def masked(self, pseudo: Tensor, grad: Tensor) -> Tensor:
        """Return ``pseudo`` with zeros where a target does not count.

        Args:
            pseudo: A pseudo-gradient, in the shape of the outputs.
            grad: The loss's gradient with respect to them.
        """
        return torch.where(grad != 0, pseudo, torch.zeros_like(pseudo))

    def terms(self, outputs: Tensor, grad: Tensor) -> TargetMask:
        """Return which targets the user's loss, with gradient ``grad``, counts."""
        if not len(outputs):  # a rank without data
            none = torch.zeros((), dtype=torch.int64, device=outputs.device)
            return TargetMask(0, none, none, None)
        counted = self.counted(outputs, grad)
        examples = counted.any(dim=1).sum()
        # On a GPU the answer would have to be waited for.
        all_count = counted.device.type == "cpu" and bool(counted.all())
        mask = None if all_count else counted
        return TargetMask(len(counted), examples, self._terms(counted, examples), mask)

    def _terms(self, counted: Tensor, examples: Tensor) -> Tensor:
        """Return how many terms the loss is a mean over, 0-d."""
        return examples


@dataclass(frozen=True)
class Categorical(Likelihood):
    """Softmax classification, per example or per position.

    Attributes:
        class_dim: Dimension of the logits over classes. ``None``: the one that the
            targets lack, or along which the gradient of the loss sums to zero; where
            neither is known, the last of ``[N, C]`` and ``[N, S, C]``, dimension 1 of
            ``[N, C, H, W]``.
        ignore_index: The target that does not count.
    """

    class_dim: int | None = None
    ignore_index: int = -100

    def fitted_to_targets(self, outputs: Tensor, targets: Any) -> Categorical:
        """Return the likelihood with the class dimension that the targets lack.

        Class targets are integers of the outputs' shape without that dimension, or as
        many in any shape. Floating-point targets are probabilities, of the outputs'
        shape.

        Raises:
            ValueError: If the targets have another shape, or name no class.
        """
        default = self.dim_of(outputs)
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return self
        if targets.shape == outputs.shape:  # one-hot
            return self
        shape = list(outputs.shape)
        lacking = [
            d
            for d in range(1, len(shape))
            if shape[:d] + shape[d + 1 :] == list(targets.shape)
        ]
        explicit = self.class_dim is not None
        dim = default if explicit or default in lacking or not lacking else lacking[0]
        if targets.numel() * shape[dim] != outputs.numel() or (
            lacking and dim not in lacking
        ):
            raise ValueError(
                f"targets {list(targets.shape)} do not fit outputs {shape} with "
                f"classes in dimension {dim}: every example and position needs one "
                "class; pass Categorical(class_dim=...), or other targets."
            )
        if len(shape) == 3 and len(lacking) > 1 and not explicit:
            warn_outside(
                f"Outputs {shape} with targets {list(targets.shape)} have classes in "
                f"dimension 1 or 2: the last is taken. Pass likelihood=ekfac."
                "likelihoods.Categorical(class_dim=1) or (class_dim=2)."
            )
        labels = targets[targets != self.ignore_index]
        if labels.numel() and not bool(((labels >= 0) & (labels < shape[dim])).all()):
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(
                f"targets are from {low} to {high}, and the outputs {shape} have "
                f"classes 0 to {shape[dim] - 1}; targets that do not count are "
                f"{self.ignore_index}, or what Categorical(ignore_index=...) says."
            )
        return self if explicit else replace(self, class_dim=dim)

    def fitted_to_gradient(self, outputs: Tensor, grad: Tensor) -> Categorical:
        """Return the likelihood with the class dimension, where ``grad`` sums to zero.

        The gradient of a cross-entropy does so, whatever its weights and targets.
        """
        if self.class_dim is not None or grad.dim() < 3 or not grad.numel():
            return self
        g = _real(grad)
        noise = 64 * torch.finfo(grad.dtype).eps
        zero = [
            d
            for d in range(1, grad.dim())
            if grad.shape[d] > 1
            and bool((g.sum(d).abs().max() <= noise * g.abs().sum(d).max()) & g.any())
        ]
        return replace(self, class_dim=zero[0]) if len(zero) == 1 else self

    def dim_of(self, outputs: Tensor) -> int:
        """Return the class dimension of ``outputs``.

        Raises:
            ValueError: If the outputs have none.
        """
        if outputs.dim() < 2:
            raise ValueError(
                "likelihood='categorical' needs logits [N, C], [N, S, C] or [N, C, H, "
                f"W], got outputs {list(outputs.shape)}; use 'bernoulli' for one logit "
                "per example, 'gaussian' for regression."
            )
        if self.class_dim is not None:
            return self.class_dim % outputs.dim()
        return 1 if outputs.dim() > 3 else outputs.dim() - 1

    def _rows(self, outputs: Tensor) -> Tensor:
        """Return ``[N, S, C]``."""
        moved = outputs.movedim(self.dim_of(outputs), -1)
        return moved.reshape(moved.shape[0], -1, moved.shape[-1])

    def _restore(self, rows: Tensor, outputs: Tensor) -> Tensor:
        """Return ``[N, S, C]`` in the layout of ``outputs``."""
        dim = self.dim_of(outputs)
        shape = [size for i, size in enumerate(outputs.shape) if i != dim]
        return rows.reshape(*shape, rows.shape[-1]).movedim(-1, dim)

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``softmax(f) - onehot(y)`` for ``y`` drawn at every position."""
        probabilities = torch.softmax(_real(self._rows(outputs)), dim=-1)
        n, s, c = probabilities.shape
        drawn = torch.multinomial(
            probabilities.reshape(-1, c), 1, generator=generator
        ).reshape(n, s, 1)
        h = probabilities.scatter_add(
            -1, drawn, -torch.ones_like(drawn, dtype=probabilities.dtype)
        )
        return self._restore(h, outputs).to(outputs.dtype)

    def exact(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(p_c) (p - e_c)`` for every class of every position."""
        p = torch.softmax(_real(self._rows(outputs)), dim=-1)
        _, positions, classes = p.shape
        for s in range(positions):
            for c in range(classes):
                h = torch.zeros_like(p)
                h[:, s] = p[:, s]
                h[:, s, c] -= 1
                h[:, s] *= p[:, s, c : c + 1].sqrt()
                yield self._restore(h, outputs).to(outputs.dtype)

    def counted(self, outputs: Tensor, grad: Tensor) -> Tensor:
        """Return ``[N, S]``, false where the target is ignored."""
        if grad.dim() < 2:  # not classes: the user's loss is another one
            return super().counted(outputs, grad)
        rows = self._rows(grad)
        first = rows[..., 0] != 0
        if first.device.type == "cpu" and bool(first.all()):  # the usual case
            return first
        return (rows != 0).any(dim=-1)

    def masked(self, pseudo: Tensor, grad: Tensor) -> Tensor:
        """Return ``pseudo`` with zeros where a target is ignored."""
        counted = (grad != 0).any(dim=self.dim_of(grad), keepdim=True)
        return torch.where(counted, pseudo, torch.zeros_like(pseudo))

    def _terms(self, counted: Tensor, examples: Tensor) -> Tensor:
        return counted.sum()


class Bernoulli(Likelihood):
    """Independent logistic outputs."""

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return ``sigmoid(f) - y``."""
        p = torch.sigmoid(_real(outputs))
        return (p - torch.bernoulli(p, generator=generator)).to(outputs.dtype)

    def exact(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(p (1 - p))`` of one output at a time."""
        p = torch.sigmoid(_real(outputs))
        yield from _one_at_a_time((p * (1 - p)).sqrt().to(outputs.dtype))


class Gaussian(Likelihood):
    """Regression with unit variance: the loss is half the squared error."""

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return standard normal noise."""
        noise = torch.randn(
            outputs.shape,
            generator=generator,
            device=outputs.device,
            dtype=_real(outputs).dtype,
        )
        return noise.to(outputs.dtype)

    def exact(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield 1 at one output at a time."""
        yield from _one_at_a_time(torch.ones_like(outputs))


@dataclass(frozen=True)
class FromDistribution(Likelihood):
    """Any ``torch.distributions`` family.

    Attributes:
        family: From outputs ``[N, *]`` to the distribution of their targets.
    """

    family: Callable[[Tensor], Distribution]

    def sampled(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient of ``-log p(y | f)`` at a drawn ``y``."""
        with torch.enable_grad():
            f = _real(outputs.detach()).requires_grad_()
            distribution = self.family(f)
            # Distributions draw from the global generator: seed it, and restore it.
            devices = [f.device] if f.device.type == "cuda" else []
            seed = torch.randint(
                2**62, (1,), generator=generator, device=generator.device
            )
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(int(seed))
                y = distribution.sample()
            loss = -distribution.log_prob(y).sum()
            return torch.autograd.grad(loss, f)[0].to(outputs.dtype)

    def exact(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(p(y))`` times the gradient, for every value of ``y``.

        Raises:
            ValueError: If the distribution cannot enumerate its values.
        """
        drawn = self._draws(_real(outputs))
        if not drawn.has_enumerate_support:
            raise ValueError(
                f"The exact Fisher of likelihood={self.family!r} needs values that can "
                "be enumerated, and this distribution's cannot; use 'mc' in place of "
                "'exact'."
            )
        for value in drawn.enumerate_support():
            with torch.enable_grad():
                f = _real(outputs.detach()).requires_grad_()
                log_p = self._draws(f).log_prob(value)
            for weight in _one_at_a_time(log_p.detach().exp().sqrt()):
                grad = torch.autograd.grad(log_p, f, -weight, retain_graph=True)[0]
                yield grad.to(outputs.dtype)

    def _draws(self, outputs: Tensor) -> Distribution:
        """Return the distribution of single draws, of which a target may have many."""
        drawn = self.family(outputs)
        while isinstance(drawn, Independent):
            drawn = drawn.base_dist
        return drawn


def _real(x: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def find_outputs(output: Any) -> Tensor | None:
    """Return the predictions in what a model returned, ``None`` if there are none.

    They are the tensor itself, the ``logits`` of a mapping or object, or else the first
    floating-point tensor with a gradient and at least one dimension.
    """
    if isinstance(output, Tensor):
        usable = output.requires_grad and output.is_floating_point() and output.dim()
        return output if usable else None
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is not None:
        return find_outputs(logits)
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            inner = find_outputs(item)
            if inner is not None:
                return inner
    return None


def _one_at_a_time(values: Tensor) -> Iterator[Tensor]:
    """Yield ``values`` with all but one output of every example set to zero."""
    flat = values.reshape(len(values), -1)
    for i in range(flat.shape[1]):
        h = torch.zeros_like(flat)
        h[:, i] = flat[:, i]
        yield h.reshape(values.shape)


def signed(pseudo: Iterable[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield pseudo-gradients with a random sign for every example.

    Outer products stay as they are. Where the backward pass mixes examples (batch
    normalisation, a position embedding), products of different examples vanish on
    average, as they do for sampled targets.

    Args:
        pseudo: Pseudo-gradients, ``[N, *]`` each.
        generator: Source of the signs.
    """
    for h in pseudo:
        yield h * signs(len(h), generator).to(h).reshape(-1, *[1] * (h.dim() - 1))


def signs(count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` independent signs, -1 or 1."""
    bits = torch.randint(0, 2, (count,), generator=generator, device=generator.device)
    return 2 * bits - 1


def resolve(likelihood: object) -> Likelihood:
    """Return the :class:`Likelihood` that a user's argument names.

    Raises:
        ValueError: For an unknown name.
    """
    named: dict[str, type[Likelihood]] = {
        "categorical": Categorical,
        "bernoulli": Bernoulli,
        "gaussian": Gaussian,
    }
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in named:
        return named[likelihood]()
    if callable(likelihood):
        return FromDistribution(likelihood)
    raise ValueError(
        f"Invalid likelihood: {likelihood!r}; use one of {sorted(named)}, a "
        "Likelihood, or a callable that returns a torch.distributions.Distribution of "
        "the outputs."
    )
