"""The Laplace approximation that a penalty stands for."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ekfac.estimate.data import outputs_of, prepared
from ekfac.estimate.products import back_propagated
from ekfac.likelihoods import Bernoulli, Categorical, resolve
from ekfac.matrices import CurvatureMatrix
from ekfac.vectors import ParameterVector, named_parameters


@dataclass(frozen=True)
class Prediction:
    """What a posterior says of some inputs.

    Attributes:
        outputs: Mean of the network's outputs, ``[n, c]``, those of one example flat.
        covariance: Of the outputs of each input, ``[n, c, c]``.
        probabilities: Of the classes or of the Bernoulli outputs, ``[n, c]``; ``None``
            for other likelihoods.
        standard_error: Of ``probabilities``, or of ``outputs`` where there are none, by
            the number of samples; ``None`` if linearised.
    """

    outputs: Tensor
    covariance: Tensor
    probabilities: Tensor | None
    standard_error: Tensor | None


class LaplacePosterior:
    """A normal distribution over the parameters, around a solution.

    Its precision is ``N F + prior_precision I``, with ``F`` the curvature of the loss
    averaged over ``N`` examples: minus the logarithm of its density is, up to a
    constant, ``N`` times an online :class:`QuadraticPenalty` of ``strength=1``, plus
    the prior, whose mean is taken to be the solution in it (MacKay 1992; Ritter et al.
    2018).

    Args:
        model: The network.
        mean: The solution.
        precision: ``N F``, without the prior.
        prior_precision: Of an isotropic normal prior with mean zero, positive. The
            gradient of :meth:`log_marginal_likelihood` flows to a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: ParameterVector,
        precision: CurvatureMatrix,
        prior_precision: float | Tensor,
    ) -> None:
        if not (prior_precision > 0 and prior_precision < float("inf")):
            raise ValueError(
                f"prior_precision must be positive and finite, got {prior_precision}."
            )
        precision.space.require(mean, "The mean")
        self.model, self.mean = model, mean
        self.precision, self._prior = precision, prior_precision

    @property
    def prior_precision(self) -> float:
        """The prior's precision."""
        return float(self._prior)

    def sample(
        self, num_samples: int = 1, generator: torch.Generator | None = None
    ) -> list[ParameterVector]:
        """Return independent draws of the parameters.

        Args:
            num_samples: How many.
            generator: Source of the numbers.
        """
        return [
            self.mean + self.precision.sample(self.prior_precision, generator)
            for _ in range(num_samples)
        ]

    def log_marginal_likelihood(self, log_likelihood: float | Tensor) -> Tensor:
        """Return the logarithm of the evidence, 0-d.

        ``log p(D | theta*) + log p(theta*) + P/2 log 2 pi - 1/2 log det(precision)``
        (MacKay 1992), exact for a normal posterior.

        Args:
            log_likelihood: Of all data at the solution, summed over the examples:
                minus ``N`` times the mean loss.
        """
        size, prior = self.precision.size, self._prior
        if isinstance(prior, Tensor):
            # Of rounding errors below zero there is no logarithm.
            spectrum = self.precision.eigenvalues().detach().clamp(min=0)
            logdet, log_scale = (spectrum + prior).log().sum(), prior.log()
        else:
            logdet = self.precision.logdet(prior)
            log_scale = torch.tensor(log(prior)).to(logdet)
        log_prior = -0.5 * prior * self.mean.dot(self.mean) + 0.5 * size * log_scale
        return log_likelihood + log_prior - 0.5 * logdet

    def predict(
        self,
        inputs: Any,
        method: Literal["linearised", "sampling"] = "linearised",
        *,
        likelihood: Any = "categorical",
        num_samples: int = 100,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        """Return the predictive distribution for some inputs.

        ``"linearised"``: the outputs are linear in the parameters around the solution
        (Immer et al. 2021), so normal, with probabilities by the probit approximation,
        ``softmax(f / sqrt(1 + pi/8 var f))`` (MacKay 1992). ``"sampling"``: the
        network's own outputs at draws of the parameters; these may be far from linear
        where the posterior is wide.

        Args:
            inputs: What the model is called with.
            method: One of the two.
            likelihood: Decides what ``probabilities`` are.
            num_samples: Draws, for ``"sampling"``, at least 2.
            generator: Their source.
        """
        kind = resolve(likelihood)
        if method == "linearised":
            return self._linearised(inputs, kind)
        if method != "sampling":
            raise ValueError(f"method must be linearised or sampling, got {method!r}.")
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}.")
        return self._sampled(inputs, kind, num_samples, generator)

    def _sampled(
        self, inputs: Any, kind: object, count: int, generator: torch.Generator | None
    ) -> Prediction:
        own = named_parameters(self.model)
        draws = []
        with prepared(self.model, []):
            for sample in self.sample(count, generator):
                tensors = {n: t.to(own[n].dtype) for n, t in sample.items()}
                call = _Functional(self.model, tensors)
                draws.append(outputs_of(call, inputs).detach())
        shape = draws[0].shape[1:]
        outputs = torch.stack([draw.reshape(len(draw), -1) for draw in draws])
        centred = outputs - outputs.mean(dim=0)
        covariance = torch.einsum("snc,snd->ncd", centred, centred) / (count - 1)
        values = _probabilities(outputs, shape, kind)
        judged = outputs if values is None else values
        return Prediction(
            outputs.mean(dim=0),
            covariance,
            None if values is None else values.mean(dim=0),
            judged.std(dim=0) / count**0.5,
        )

    def _linearised(self, inputs: Any, kind: object) -> Prediction:
        own = named_parameters(self.model)
        names = list(self.precision.space.names)
        found: list[Tensor] = []
        with prepared(self.model, names):
            call = _Functional(
                self.model,
                {n: t.to(own[n].dtype) for n, t in self.mean.clone().items()},
            )
            chosen = [call.tensors[name] for name in names]
            outputs = outputs_of(call, inputs)
            shape, outputs = outputs.shape[1:], outputs.reshape(len(outputs), -1)
            units = torch.eye(outputs.shape[1], dtype=outputs.dtype).to(outputs.device)
            for i in range(len(outputs)):
                weights = torch.zeros(len(units), *outputs.shape).to(units)
                weights[:, i] = units
                J = back_propagated([outputs], chosen, [weights])
                J = J.to(self.precision.dtype)
                found.append(J @ self.precision.solve(J.mT, self.prior_precision))
        f, covariance = outputs.detach(), torch.stack(found).to(outputs.dtype)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        shrunk = f / (1 + pi / 8 * variance).sqrt()
        values = _probabilities(shrunk, shape, kind)
        return Prediction(f, covariance.detach(), values, None)


def _probabilities(outputs: Tensor, shape: torch.Size, kind: object) -> Tensor | None:
    """Return what outputs ``[*, c]`` say, one softmax for every position.

    Args:
        outputs: The outputs of one example flat, ``c`` of them.
        shape: Of one example's outputs.
        kind: The likelihood.
    """
    if isinstance(kind, Categorical):
        examples = outputs.reshape(-1, *shape)
        return examples.softmax(dim=kind.dim_of(examples)).reshape(outputs.shape)
    return outputs.sigmoid() if isinstance(kind, Bernoulli) else None


class _Functional(nn.Module):
    """A model called with other parameters than its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        own = {id(p): name for name, p in model.named_parameters()}
        clean = named_parameters(model)
        # Wrappers add to the names that functional_call knows.
        # Predictions are recognised by depending on what has a gradient.
        self.tensors = {name: t.requires_grad_() for name, t in tensors.items()}
        self._called = {own[id(clean[name])]: name for name in tensors}
        self._model = [model]  # in a list: no submodule, whose parameters these are not

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        chosen = {full: self.tensors[name] for full, name in self._called.items()}
        return functional_call(self._model[0], chosen, args, kwargs)
