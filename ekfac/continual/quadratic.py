"""Quadratic penalty of a plain training loop, and its Laplace posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import log, pi
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ekfac.continual.merging import Merge, check_merge
from ekfac.continual.penalty import VERSION, Mode, Penalty
from ekfac.continual.task_curvature import (
    CountedData,
    Kind,
    Request,
    Structure,
    by_block,
    check_structure,
    class_dim_of,
    fingerprint,
    from_curvature,
    from_data,
    from_weights,
    ignored_class,
)
from ekfac.continual.tasks import TaskPenalty, snapshot
from ekfac.curvature import Curvature
from ekfac.errors import (
    NotReadyError,
    StateMismatchError,
    UnsupportedOperationError,
)
from ekfac.estimate.data import choose, outputs_of, prepared, require_batches
from ekfac.estimate.products import back_propagated
from ekfac.likelihoods import Bernoulli, Categorical, resolve
from ekfac.matrices import CurvatureMatrix
from ekfac.matrices.base import MatrixField, restored
from ekfac.state_schema import (
    Choice,
    Field,
    ListOf,
    MapOf,
    Maybe,
    Number,
    Record,
    Sealed,
    TensorField,
    Text,
    sealed,
)
from ekfac.vectors import ParameterVector, named_parameters


class QuadraticPenalty(Penalty):
    """A penalty for any training loop: ``loss = criterion(model(x), y) + penalty()``.

    Its value is ``strength / 2 sum_t d_t^T F_t d_t``, with ``d_t`` the displacement
    from the solution of task ``t`` and ``F_t`` its curvature in some structure: that of
    the loss averaged over its examples. If all tasks have as many examples, and the
    loss is averaged over them, ``strength=1`` is the Laplace approximation (Ritter et
    al. 2018); otherwise the ``weight`` of a task is the ratio of its examples to those
    of the task in training.

    Structures:

    - ``"diagonal"``: elastic weight consolidation (Kirkpatrick et al. 2017), here with
      the Fisher matrix of single examples.
    - ``"kfac"``, ``"ekfac"``: Kronecker factors (Ritter et al. 2018), or their basis
      with exact scalings.
    - ``"rotated"``: another name for ``"ekfac"``. Rotated EWC (Liu et al. 2018) keeps a
      diagonal in the eigenbases of each layer's inputs and output gradients, which is
      the same matrix.
    - ``"block_diagonal"``: a dense block per layer; for small layers.
    - ``"hessian_top_k"``: the ``k`` largest eigenpairs of the Hessian of every layer
      (Haink 2023, equation 7.10); from an optimizer, the largest scalings.
    - ``"singular_directions"``: the leading singular directions of the weights, with
      their singular values in place of curvatures (Haink 2023, equation 7.11), and the
      top fifth of the Hessian of every bias.

    Args:
        model: The network.
        structure: One of the above.
        strength: Factor on the whole penalty; may be set at any time.
        mode: ``"online"`` (one anchor) or ``"separate"`` (one anchor per task), see
            :class:`Penalty`.
        decay: Factor on the matrices of earlier tasks at each new one.
        merge: How ``"online"`` merges the matrices of tasks, see
            :func:`ekfac.continual.merge_tasks`.
        layer_strengths: Layer or parameter name -> factor on ``strength`` there.
        k: For the last two structures: directions per layer, or a share as a float.
            Default: 20 of the Hessian; for singular directions, those beyond the noise.
        parameters: Names of parameters or layers to penalise. Default: what requires a
            gradient when a task is consolidated.

    Raises:
        ValueError: For a value that an option does not allow.
        UnsupportedOperationError: If the structure has no such ``merge``.
        StateMismatchError: If ``layer_strengths`` names what the model lacks.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> penalty = QuadraticPenalty(model, structure="kfac", strength=2.0)
        >>> penalty().item()
        0.0
        >>> penalty.consolidate([(torch.randn(8, 3), torch.randint(2, (8,)))])
        >>> with torch.no_grad():
        ...     _ = model.weight[0].add_(1.0)
        >>> penalty().item() > 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure = "ekfac",
        strength: float = 1.0,
        mode: Mode = "online",
        decay: float = 1.0,
        *,
        merge: Merge = "auto",
        layer_strengths: Mapping[str, float] | None = None,
        k: int | float | None = None,
        parameters: Iterable[str] | None = None,
    ) -> None:
        check_structure(structure)
        check_merge(merge, "ekfac" if structure == "rotated" else structure)
        super().__init__(
            model,
            strength=strength,
            mode=mode,
            decay=decay,
            merge=merge,
            layer_strengths=layer_strengths,
        )
        self.structure: Structure = structure
        self.k = k
        self.parameters = None if parameters is None else tuple(parameters)
        self._seen: dict[str, Tensor] = {}
        self._class_dim: int | None = None

    def consolidate(
        self,
        source: Iterable[Any] | Curvature | CurvatureMatrix | None = None,
        *,
        likelihood: Any = "categorical",
        kind: Kind | None = None,
        num_examples: int | None = None,
        weight: float = 1.0,
        scalings: Literal["live", "kronecker"] | Iterable[Any] = "live",
        loss_fn: Callable[[Tensor, Any], Tensor] | None = None,
        loss_reduction: str | None = None,
        sharing: str = "expand",
        samples: int = 1,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> None:
        """Add the task that the model was just trained on; call it once per task.

        After an error nothing has changed.

        From an optimizer the factors are copied as they are, without a pass over data.
        They are averages over the last steps, in training mode, of what the optimizer's
        ``fisher`` says (by default the empirical Fisher matrix), whereas a loader gives
        the exact Fisher matrix at the solution. The running-average scalings of
        ``EKFAC`` are the second moment of the *mean* gradient times the batch size:
        they contain the mean's own square, and what penalties add to the gradient; the
        factors do not. ``scalings`` chooses; with running averages ``"kronecker"`` did
        better (benchmarks/continual.md). Layers whose statistics did not change since
        the last task, such as another task's head, are left out.

        Args:
            source: The task's data, an iterable of batches ``(x, y)`` as for
                :func:`ekfac.fisher`; or ``optimizer.curvature``; or a curvature matrix
                over the model. Nothing for ``"singular_directions"`` of weights alone.
            likelihood: As for :func:`ekfac.fisher`.
            kind: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"hessian"`` (its positive
                part). Default: ``"hessian"`` for ``"hessian_top_k"``, else
                ``"exact"``.
            num_examples: Examples of the task, for :meth:`posterior`. Default: those of
                the data, unknown for a ``Curvature``.
            weight: Weight of the task, relative to others.
            scalings: For EKFAC from a ``Curvature``: ``"live"``, as the optimizer keeps
                them: averages over the last steps, ten with the default
                ``scaling_decay``, so noisy and small where the loss is small;
                ``"kronecker"``, the diagonal of ``G (x) A``; or data to estimate them
                on in one pass, in the optimizer's basis.
            loss_fn: ``(outputs, y) -> loss``, for ``"empirical"`` and ``"hessian"``.
                Default: the likelihood's.
            loss_reduction: As for :func:`ekfac.fisher`.
            sharing: As for :func:`ekfac.fisher`.
            samples: As for :func:`ekfac.fisher`.
            generator: Source of drawn targets and starting vectors.
            progress: Whether to show progress bars, if tqdm is installed.

        Raises:
            StateMismatchError: If the source is of another model; with its layers.
            NotReadyError: If the curvature has no new statistics, or no basis or
                scalings that the structure needs.
            UnsupportedOperationError: If the source cannot give the structure.
            TypeError: If the source is no data, curvature or matrix.
            ValueError: For a value that an argument does not allow, empty data, or a
                matrix or parameters that are not finite.
        """
        if kind is not None and kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}.")
        if not (weight > 0 and weight < float("inf")):
            raise ValueError(f"weight must be positive and finite, got {weight}.")
        default: Kind = "hessian" if self.structure == "hessian_top_k" else "exact"
        request = Request(
            structure=self.structure,
            k=self.k,
            parameters=self.parameters,
            kind=kind or default,
            likelihood=likelihood,
            loss_fn=loss_fn,
            loss_reduction=loss_reduction,
            sharing=sharing,
            samples=samples,
            generator=generator,
            progress=progress,
        )
        seen, class_dim = dict(self._seen), self._class_dim
        if isinstance(source, Curvature):
            blocks = from_curvature(self.model, source, request, scalings, seen)
            seen |= {name: fingerprint(source[name]) for name in source}
        elif isinstance(source, CurvatureMatrix):
            blocks = by_block(snapshot(source))
        elif source is None:
            blocks = from_weights(self.model, request)
        else:
            data = CountedData(_checked_data(source), ignored_class(request))
            class_dim = class_dim_of(self.model, data, request)
            blocks = from_data(self.model, data, request)
            blocks = {name: snapshot(matrix) for name, matrix in blocks.items()}
            num_examples = data.examples if num_examples is None else num_examples
        self._commit(blocks, weight, num_examples)
        self._seen, self._class_dim = seen, class_dim

    def posterior(self, prior_precision: float | Tensor = 1.0) -> LaplacePosterior:
        """Return the Laplace approximation, of which the penalty is the logarithm.

        It is over the trainable parameters, or those that ``parameters`` names.

        Args:
            prior_precision: Of an isotropic normal prior with mean zero, see
                :class:`LaplacePosterior`.

        Raises:
            NotReadyError: Before anything was consolidated, or if the tasks' numbers of
                examples are unknown or not in proportion to their weights.
            UnsupportedOperationError: If there are several anchors.
        """
        if len(self.tasks) > 1:
            raise UnsupportedOperationError(
                f"{len(self.tasks)} anchors make no normal distribution around one "
                "solution; use mode='online'."
            )
        names = None if self.parameters is None else choose(self.model, self.parameters)
        matrix = self._matrix(names)
        (task,) = self.tasks
        if task.examples is None:
            raise NotReadyError(
                "The posterior needs the numbers of examples, and weights in "
                "proportion to them: pass num_examples=N (always with a Curvature) and "
                "weight=N / N_first to consolidate()."
            )
        parameters = named_parameters(self.model)
        mean = ParameterVector(
            {
                name: task.anchor.get(name, parameters[name].detach()).to(matrix.dtype)
                for name in matrix.space.names
            }
        ).clone()
        precision = matrix * task.examples
        return LaplacePosterior(
            self.model, mean, precision, prior_precision, class_dim=self._class_dim
        )

    def _state(self) -> dict[str, Any]:
        state = super()._state()
        state["merge"], state["k"] = self.merge, self.k
        state["parameters"] = None if self.parameters is None else list(self.parameters)
        state["seen"] = {name: t.clone() for name, t in self._seen.items()}
        state["class_dim"] = self._class_dim
        return state

    def _schema(self) -> dict[str, Field]:
        return super()._schema() | {
            "merge": Choice(*get_args(Merge)),
            "k": Maybe(Number(float, minimum=0)),
            "parameters": Maybe(ListOf(Text())),
            "seen": MapOf(TensorField((4,), torch.float64)),
            "class_dim": Maybe(Number(int, minimum=1)),
        }

    def _checked(self, state: Any) -> list[TaskPenalty]:
        tasks = super()._checked(state)
        structure = "ekfac" if self.structure == "rotated" else self.structure
        try:
            check_merge(state["merge"], structure)
        except UnsupportedOperationError as error:
            actual, expected = repr(state["merge"]), f"one for {structure!r}"
            raise StateMismatchError.at("merge", actual, expected) from error
        if state["k"] == 0:
            raise StateMismatchError.at("k", "0", "positive, or None")
        if state["parameters"] is not None:
            choose(self.model, state["parameters"])
        return tasks

    def _take(self, state: Mapping[str, Any], tasks: list[TaskPenalty]) -> None:
        super()._take(state, tasks)
        self.merge, self.k = state["merge"], state["k"]
        names = state["parameters"]
        self.parameters = None if names is None else tuple(names)
        self._seen = {name: t.clone() for name, t in state["seen"].items()}
        self._class_dim = state["class_dim"]


def _checked_data(source: Any) -> Iterable[Any]:
    """Return ``source`` if it can be data; ``TypeError`` if not."""
    if isinstance(getattr(source, "curvature", None), Curvature):
        raise TypeError(
            f"consolidate takes data or a Curvature, got {type(source).__name__}; pass "
            "its .curvature."
        )
    return require_batches(source)


@dataclass(frozen=True)
class Prediction:
    """Predictive distribution of a posterior for some inputs.

    Attributes:
        outputs: Mean of the network's outputs, ``[n, c]``, those of one example flat.
        covariance: Covariance of the outputs of each input, ``[n, c, c]``.
        probabilities: Of the classes or of the Bernoulli outputs, ``[n, c]``; ``None``
            for other likelihoods.
        standard_error: Sampling error of ``probabilities``, or of ``outputs`` where
            there are none, ``[n, c]``; ``None`` if linearised.
    """

    outputs: Tensor
    covariance: Tensor
    probabilities: Tensor | None
    standard_error: Tensor | None


class LaplacePosterior:
    """A normal distribution over the parameters, around a solution.

    Its precision is ``N F + prior_precision I``, with ``F`` the curvature of the loss
    averaged over ``N`` examples. Minus the logarithm of its density is, up to a
    constant, ``N`` times an online :class:`QuadraticPenalty` of ``strength=1``, plus
    the prior as if its mean were the solution (MacKay 1992; Ritter et al. 2018).

    Args:
        model: The network.
        mean: The solution.
        precision: ``N F``, without the prior.
        prior_precision: Of an isotropic normal prior with mean zero, positive. The
            gradient of :meth:`log_marginal_likelihood` flows to a tensor.
        class_dim: Dimension of the outputs over classes, if the tasks' targets tell.

    Raises:
        ValueError: If ``prior_precision`` is not positive and finite.
        StateMismatchError: If ``mean`` and ``precision`` are over other parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: ParameterVector,
        precision: CurvatureMatrix,
        prior_precision: float | Tensor,
        *,
        class_dim: int | None = None,
    ) -> None:
        if not (prior_precision > 0 and prior_precision < float("inf")):
            raise ValueError(
                f"prior_precision must be positive and finite, got {prior_precision}."
            )
        precision.space.require(mean, "The mean")
        self.model, self.mean = model, mean
        self.precision, self._prior = precision, prior_precision
        self.class_dim = class_dim

    @property
    def prior_precision(self) -> float:
        """The prior's precision."""
        return float(self._prior)

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model as plain tensors and containers, copied."""
        return sealed(
            {
                "version": VERSION,
                "mean": {name: t.detach().clone() for name, t in self.mean.items()},
                "precision": self.precision.state_dict(),
                "prior_precision": self.prior_precision,
                "class_dim": self.class_dim,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state, or change nothing and raise.

        Raises:
            StateMismatchError: If it is over other parameters than this posterior, or
                damaged; with the entry.
        """
        mean = {n: TensorField(tuple(t.shape)) for n, t in self.mean.items()}
        Sealed(
            {
                "version": Choice(VERSION),
                "mean": Record(mean, same_dtype=[list(mean)]),
                "precision": MatrixField(),
                "prior_precision": Number(float, minimum=0),
                "class_dim": Maybe(Number(int, minimum=1)),
            }
        ).check(state)
        if state["prior_precision"] == 0:
            raise StateMismatchError.at("prior_precision", "0", "positive")
        precision = restored(state["precision"])
        self.precision.require_same_space(precision)
        device = self.precision.device
        self.precision = precision.to(device=device)
        self.mean = ParameterVector(
            {n: t.to(device).clone() for n, t in state["mean"].items()}
        )
        self._prior, self.class_dim = state["prior_precision"], state["class_dim"]

    def sample(
        self, num_samples: int = 1, generator: torch.Generator | None = None
    ) -> list[ParameterVector]:
        """Return independent draws of the parameters.

        Args:
            num_samples: How many.
            generator: Source of the random numbers.
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
            log_likelihood: Of all data at the solution, the sum over the examples:
                minus ``N`` times the mean loss.
        """
        size, prior = self.precision.size, self._prior
        if isinstance(prior, Tensor):
            # Rounding errors below zero have no logarithm.
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

        ``"linearised"``: the outputs are taken as linear in the parameters around the
        solution (Immer et al. 2021), so they are normal, with probabilities by the
        probit approximation, ``softmax(f / sqrt(1 + pi/8 var f))`` (MacKay 1992), or
        ``sigmoid`` of that. ``"sampling"``: the network's own outputs at draws of the
        parameters; where the posterior is wide these may be far from linear.

        Args:
            inputs: What the model is called with.
            method: One of the two.
            likelihood: As for :func:`ekfac.fisher`; gives the ``probabilities``. The
                class dimension is the one that the tasks' targets lacked.
            num_samples: Draws, for ``"sampling"``, at least 2.
            generator: Source of the draws.

        Raises:
            ValueError: For another ``method``, or fewer than two draws.
        """
        kind = resolve(likelihood)
        if isinstance(kind, Categorical) and kind.class_dim is None:
            kind = replace(kind, class_dim=self.class_dim)
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
        parameters = named_parameters(self.model)
        draws = []
        with prepared(self.model, []):
            for sample in self.sample(count, generator):
                tensors = {n: t.to(parameters[n].dtype) for n, t in sample.items()}
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
        named = named_parameters(self.model)
        names = list(self.precision.space.names)
        variances: list[Tensor] = []
        with prepared(self.model, names):
            call = _Functional(
                self.model,
                {n: t.to(named[n].dtype) for n, t in self.mean.clone().items()},
            )
            parameters = [call.tensors[name] for name in names]
            outputs = outputs_of(call, inputs)
            shape, outputs = outputs.shape[1:], outputs.reshape(len(outputs), -1)
            units = torch.eye(outputs.shape[1], dtype=outputs.dtype).to(outputs.device)
            for i in range(len(outputs)):
                weights = torch.zeros(len(units), *outputs.shape).to(units)
                weights[:, i] = units
                J = back_propagated([outputs], parameters, [weights])
                J = J.to(self.precision.dtype)
                variances.append(J @ self.precision.solve(J.mT, self.prior_precision))
        f, covariance = outputs.detach(), torch.stack(variances).to(outputs.dtype)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        shrunk = f / (1 + pi / 8 * variance).sqrt()
        values = _probabilities(shrunk, shape, kind)
        return Prediction(f, covariance.detach(), values, None)


def _probabilities(outputs: Tensor, shape: torch.Size, kind: object) -> Tensor | None:
    """Return the probabilities of outputs ``[*, c]``, position by position."""
    if isinstance(kind, Categorical):
        examples = outputs.reshape(-1, *shape)
        return examples.softmax(dim=kind.dim_of(examples)).reshape(outputs.shape)
    return outputs.sigmoid() if isinstance(kind, Bernoulli) else None


class _Functional(nn.Module):
    """A model called with other parameters than its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        # find_outputs looks for a tensor that depends on a trainable one.
        self.tensors = {name: t.requires_grad_() for name, t in tensors.items()}
        # functional_call needs the names that wrappers have added to.
        names = {id(p): name for name, p in model.named_parameters()}
        clean = named_parameters(model)
        self._called = {names[id(clean[name])]: name for name in tensors}
        self._model = [model]  # in a list, so that it is not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        parameters = {full: self.tensors[name] for full, name in self._called.items()}
        return functional_call(self._model[0], parameters, args, kwargs)
