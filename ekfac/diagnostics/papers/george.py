"""Complexity of trained networks, and the order in which examples are learned.

George (2023): complexity along the path, Rademacher bounds and SuperNat; groups of
easy and difficult examples compared at equal loss; initialisation of residual networks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.tangent_kernel.alignment import dense
from ekfac.estimate import fisher
from ekfac.estimate.data import choose, moved, outputs_of, prepared
from ekfac.matrices import CurvatureMatrix
from ekfac.progress import shown
from ekfac.spectral.operators import result
from ekfac.state_schema import Number, Record, Sealed, TensorField
from ekfac.vectors import ParameterVector


def tangent_trace(
    model: nn.Module, x: Tensor, *, parameters: Iterable[str] | None = None
) -> float:
    """Return ``Tr K = sum_i |J(x_i)|_F^2`` of the tangent kernel.

    It is ``n`` times the trace of the outputs' metric, of which the diagonal suffices:
    neither kernel nor Jacobian is formed. EKFAC's scalings with ``kind="l2"`` have the
    same sum; scalings of a loss's gradients have another one.

    Args:
        model: In eval mode meanwhile.
        x: Inputs ``[n, ...]``, one tensor.
        parameters: Names of parameters or layers. Default: what requires a gradient.
    """
    batch = [(x, None)]
    metric = fisher(model, batch, "diagonal", kind="l2", parameters=parameters)
    return len(x) * float(metric.trace())


@result
class Complexity:
    """A complexity measure along a training run.

    Attributes:
        value: ``C = sum_t |dw_t| |Phi_t|_F`` with ``|Phi_t|_F = sqrt(Tr K_t)``.
        per_example: ``C / n``, comparable between samples of different size.
        path_length: ``sum_t |dw_t|``.
        trace: The last ``Tr K_t``.
        updates: Number of updates that it sums over.
        num_examples: ``n``.
    """

    value: float
    per_example: float
    path_length: float
    trace: float
    updates: int
    num_examples: int

    def __str__(self) -> str:
        return (
            f"C = {self.value:.4g} ({self.per_example:.4g} per example) over "
            f"{self.updates} updates of total length {self.path_length:.4g}"
        )


class ComplexityMeasure:
    """Sum ``C = sum_t |dw_t|_2 sqrt(Tr K_t)``, taken while training.

    George 2023, eq. 6.4.11: the learning-flow bound of section 6.4.2 as a heuristic for
    networks, with the actual updates and the tangent kernel on a sample.

    Args:
        model: The network, before training.
        x: The sample, ``[n, ...]``; part of the training inputs.
        every: Updates between evaluations of the trace; in between the last value is
            used. An evaluation costs as many backward passes as there are outputs.
        parameters: Names of parameters or layers. Default: what requires a gradient.

    Raises:
        ValueError: If ``every`` is less than 1.

    Example::

        measure = ComplexityMeasure(model, x[:500])
        for x, y in loader:
            ...
            optimizer.step()
            measure.update()
        print(measure.result())
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        *,
        every: int = 10,
        parameters: Iterable[str] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every!r}; it must be >= 1.")
        self.model, self.x, self.every = model, x, every
        self._parameters = choose(model, parameters)
        self._before = self._weights()
        self._trace = self._tangent_trace()
        self._value = self._length = 0.0
        self._updates = 0

    def _weights(self) -> ParameterVector:
        return ParameterVector(self._parameters).detach().clone()

    def _tangent_trace(self) -> float:
        return tangent_trace(self.model, self.x, parameters=self._parameters)

    def update(self) -> None:
        """Take in the update made since the last call; call it after every step."""
        now = self._weights()
        length = float((now - self._before).norm())
        self._value += length * self._trace**0.5
        self._length += length
        self._before = now
        self._updates += 1
        if self._updates % self.every == 0:
            self._trace = self._tangent_trace()

    def result(self) -> Complexity:
        """Return the measure so far."""
        n, value = len(self.x), self._value
        return Complexity(value, value / n, self._length, self._trace, self._updates, n)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain tensors and numbers."""
        return self._schema().write(
            {
                "before": self._before,
                "trace": self._trace,
                "value": self._value,
                "length": self._length,
                "updates": self._updates,
            }
        )

    def _schema(self) -> Record:
        number = Number(float, 0)
        weights = {
            name: TensorField(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._before.items()
        }
        fields = {"before": Record(weights), "trace": number, "value": number}
        return Sealed({**fields, "length": number, "updates": Number(int, 0)})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or change nothing and raise.

        Raises:
            StateMismatchError: If it is of other parameters, or damaged.
        """
        self._schema().check(state)
        saved = {n: state["before"][n].to(t) for n, t in self._before.items()}
        self._before = ParameterVector(saved).clone()
        self._trace, self._value = state["trace"], state["value"]
        self._length, self._updates = state["length"], state["updates"]


@result
class RademacherComplexity:
    """Rademacher complexity of ``f(x) = <w, Phi(x)>`` with ``|w| <= M``, on a sample.

    Attributes:
        value: ``(M / n) E sqrt(sigma^T K sigma)``, a mean over random signs.
        standard_error: Of that mean.
        bound: ``(M / n) sqrt(Tr K)``, above the expectation (George 2023, eq. 6.4.3).
    """

    value: float
    standard_error: float
    bound: float


def rademacher_complexity(
    K: Tensor | CurvatureMatrix,
    radius: float,
    *,
    samples: int = 1000,
    generator: torch.Generator | None = None,
) -> RademacherComplexity:
    """Return the empirical Rademacher complexity of a ball in feature space.

    George 2023, section 6.4.1 and eq. B.2.9. For a ball in a rescaled norm give the
    rescaled kernel.

    Args:
        K: Gram matrix of the features, ``[n, n]``.
        radius: ``M``.
        samples: Sign vectors, at least 2.
        generator: Source of the signs.

    Raises:
        ValueError: If there are fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}.")
    K = dense(K)
    n = len(K)
    signs = torch.randint(2, (samples, n), generator=generator).to(K) * 2 - 1
    roots = (signs * (signs @ K)).sum(dim=1).clamp(min=0).sqrt() * radius / n
    return RademacherComplexity(
        float(roots.mean()),
        float(roots.std()) / samples**0.5,
        radius / n * float(K.trace().sqrt()),
    )


def multiclass_bound(
    K: Tensor | CurvatureMatrix, radius: float, *, classes: int, margin: float
) -> float:
    """Return the bound on the complexity of the margin loss of ``c`` linear functions.

    ``c^(3/2) M / (gamma n) sqrt(Tr K)`` (George 2023, theorem B.2.4).

    Args:
        K: As for :func:`rademacher_complexity`.
        radius: ``M``.
        classes: ``c``.
        margin: ``gamma``, positive.

    Raises:
        ValueError: If the margin is not positive.
    """
    K = dense(K)
    if not margin > 0:
        raise ValueError(f"Invalid margin: {margin!r}; it must be > 0.")
    bound: float = classes**1.5 * radius / (margin * len(K)) * float(K.trace().sqrt())
    return bound


def margin_loss(outputs: Tensor, y: Tensor, margin: float) -> float:
    """Return the mean ramp loss of the margins: 1 below 0, 0 above ``margin``.

    The margin of an example is its class's output minus the largest other (George 2023,
    B.2). At ``margin = 0`` it is the error rate.

    Args:
        outputs: ``[n, c]``.
        y: Classes ``[n]``.
        margin: ``gamma``, not negative.

    Raises:
        ValueError: If the margin is negative.
    """
    if not margin >= 0:
        raise ValueError(f"Invalid margin: {margin!r}; it must be >= 0.")
    target = outputs.gather(1, y[:, None]).squeeze(1)
    others = outputs.scatter(1, y[:, None], float("-inf")).amax(dim=1)
    margins = target - others
    if margin == 0:
        return float((margins <= 0).double().mean())
    return float((1 - margins.double() / margin).clamp(0, 1).mean())


def margin_bound(loss: float, complexity: float, n: int, *, delta: float) -> float:
    """Return the bound on the error that holds with probability ``1 - delta``.

    ``L_gamma + 2 R + 3 sqrt(log(2 / delta) / (2 n))`` (George 2023, eq. B.2.5).

    Args:
        loss: The margin loss on the sample, see :func:`margin_loss`.
        complexity: That of the margin loss, see :func:`multiclass_bound`.
        n: Size of the sample.
        delta: In (0, 1).

    Raises:
        ValueError: If ``delta`` is not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"Invalid delta: {delta!r}; it must be in (0, 1).")
    deviation: float = (log(2 / delta) / (2 * n)) ** 0.5
    return loss + 2 * complexity + 3 * deviation


@result
class OptimalRescaling:
    """The rescaled norm in which interpolating the targets costs least.

    Attributes:
        nu: ``[r]``, by which the kernel's squared singular values are divided.
        bound: ``(1 / n) sum_j |u_j^T y|``, the complexity bound in that norm.
        euclidean: ``(1 / n) |w| sqrt(Tr K)``, the bound in the Euclidean norm.
        eigenvalues: ``[r]``, of the kernel, descending; zero ones are left out.
    """

    nu: Tensor
    bound: float
    euclidean: float
    eigenvalues: Tensor


def optimal_rescaling(
    K: Tensor | CurvatureMatrix, y: Tensor, *, tolerance: float | None = None
) -> OptimalRescaling:
    """Return the best norm ``|A_nu^T w|`` for the least-norm fit of the targets.

    George 2023, proposition B.2.5: ``nu_j = lambda_j / |u_j^T y|`` (to a factor)
    minimises ``|w|_A sqrt(Tr K_A)``, where ``|w|_A^2 = sum_j nu_j (u_j^T y)^2 /
    lambda_j`` and ``Tr K_A = sum_j lambda_j / nu_j``; the minimum is
    ``sum_j |u_j^T y|`` by the inequality of Cauchy and Schwarz.

    Args:
        K: Gram matrix of the features, ``[n, n]``.
        y: Targets ``[n]``; their part outside the features' span cannot be fitted and
            is left out.
        tolerance: Eigenvalues below this share of the largest are zero. Default: ``n``
            times the rounding unit.
    """
    K = dense(K)
    n = len(K)
    values, vectors = torch.linalg.eigh((K + K.mT) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    cut = n * torch.finfo(K.dtype).eps if tolerance is None else tolerance
    nonzero = values > cut * values[0]
    values, parts = values[nonzero], (vectors[:, nonzero].mT @ y.to(K)).abs()
    tiny = torch.finfo(K.dtype).tiny
    norm = (parts.square() / values).sum().sqrt()
    return OptimalRescaling(
        nu=values / parts.clamp(min=tiny),
        bound=float(parts.sum()) / n,
        euclidean=float(norm * values.sum().sqrt()) / n,
        eigenvalues=values,
    )


@result
class FeatureDescent:
    """A run of gradient descent or SuperNat on a linear model.

    Attributes:
        outputs: Predictions on the sample at the end, ``[n]``.
        loss: Mean squared error on the sample, at every step and the end, ``[T + 1]``.
        test_loss: Likewise on the test features, or ``None``.
        eigenvalues: Of the kernel at every step and the end, ``[T + 1, r]``.
        weights: ``w`` in the original features at the end, ``[P]``.
    """

    outputs: Tensor
    loss: Tensor
    test_loss: Tensor | None
    eigenvalues: Tensor
    weights: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses over the steps; return the axes."""
        ax = axes_or_new(ax)
        ax.semilogy(self.loss.tolist(), label="sample")
        if self.test_loss is not None:
            ax.semilogy(self.test_loss.tolist(), label="test")
        ax.set(xlabel="step", ylabel="mean squared error")
        ax.legend()
        return ax


def feature_descent(
    features: Tensor,
    y: Tensor,
    *,
    method: Literal["supernat", "gd"] = "supernat",
    lr: float = 0.5,
    steps: int = 300,
    test: tuple[Tensor, Tensor] | None = None,
) -> FeatureDescent:
    """Fit ``y = Phi w`` from ``w = 0`` on the mean squared error.

    SuperNat (George 2023, section 6.4.1.2 and B.2.6): after a gradient step, the
    features are divided by the ``A`` that minimises ``|dw|_A |A^-1 Phi^T|_F``, whose
    squared singular values are ``nu_j = kappa / |u_j^T grad_f L|``. The kernel keeps
    its eigenvectors, and its eigenvalues become ``lambda_j |u_j^T grad_f L| / kappa``
    (eq. 6.4.9): modes with much left to learn are learned faster. It is natural
    gradient descent in the metric ``A A^T``.

    The factor ``kappa``, which the source leaves free, is ``max_j |u_j^T grad_f L|``:
    no eigenvalue grows, so a stable ``lr`` stays stable. With a constant ``kappa`` or a
    constant largest eigenvalue, modes of noise take over once the signal is fitted.

    Args:
        features: ``Phi`` ``[n, P]``.
        y: ``[n]``.
        method: ``"supernat"``, or ``"gd"``: the features stay as they are.
        lr: Learning rate of ``|Phi w - y|^2 / n``.
        steps: Number of steps.
        test: Other features ``[m, P]`` and targets ``[m]``.

    Raises:
        ValueError: For another ``method``.
    """
    if method not in ("supernat", "gd"):
        raise ValueError(f"method must be 'supernat' or 'gd', got {method!r}.")
    U, roots, Vh = torch.linalg.svd(features, full_matrices=False)
    nonzero = roots > roots[0] * torch.finfo(roots.dtype).eps * max(features.shape)
    U, roots, Vh = U[:, nonzero], roots[nonzero], Vh[nonzero]
    values = roots.square()
    weights = torch.zeros_like(features[0])
    losses, tests, spectra = [], [], []
    for step in range(steps + 1):
        residual = features @ weights - y
        losses.append(residual.square().mean())
        spectra.append(values)
        if test is not None:
            tests.append((test[0] @ weights - test[1]).square().mean())
        if step == steps:
            break
        slope = U.mT @ residual * (2 / len(y))
        # dw = -lr Phi_t^T grad_f in the present features; in the original ones
        # sqrt(lambda_t / lambda_0) enters twice.
        weights = weights - lr * Vh.mT @ (values / roots * slope)
        if method == "supernat":
            tiny = torch.finfo(slope.dtype).tiny
            values = values * slope.abs() / slope.abs().max().clamp(min=tiny)
    return FeatureDescent(
        outputs=features @ weights,
        loss=torch.stack(losses),
        test_loss=torch.stack(tests) if tests else None,
        eigenvalues=torch.stack(spectra),
        weights=weights,
    )


Fit = Callable[[Tensor], Tensor]
# Examples of one forward pass.
BATCH = 1000


def consistency_scores(
    fit: Fit,
    num_examples: int,
    sizes: Sequence[int],
    *,
    repeats: int = 8,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Return each example's probability to be predicted from the others, ``[n]``.

    The C-score (Jiang et al. 2021; George 2023, section 5.3.2): the share of networks,
    trained on random sets without the example, that get it right; a mean over the sizes
    of the sets. nan for an example that was in every set; more repeats make that rare.

    Args:
        fit: Trains on the examples of the given indices ``[k]`` and returns, for all
            ``n``, whether the prediction is right (or its probability).
        num_examples: ``n``.
        sizes: Sizes ``k`` of the training sets, each between 1 and ``n - 1``.
        repeats: Training sets per size.
        generator: Source of the training sets.
        progress: Whether to show a bar over the trainings, if tqdm is installed.

    Raises:
        ValueError: If a size is out of range.
    """
    wrong = [size for size in sizes if not 0 < size < num_examples]
    if wrong or not sizes:
        raise ValueError(
            f"Every size must be between 1 and {num_examples - 1}, got {list(sizes)}."
        )
    correct = torch.zeros(len(sizes), num_examples)
    count = torch.zeros_like(correct)
    runs = [i for i in range(len(sizes)) for _ in range(repeats)]
    for i in shown(runs, "trainings", progress=progress):
        order = torch.randperm(num_examples, generator=generator)
        chosen, left = order[: sizes[i]], order[sizes[i] :]
        correct[i, left] += fit(chosen).to(correct)[left]
        count[i, left] += 1
    return (correct / count).nanmean(dim=0)


def difficulty_groups(scores: Tensor, count: int = 10) -> dict[str, Tensor]:
    """Return ``count`` groups of nearly equal size, the most difficult first.

    Args:
        scores: ``[n]``, high for easy examples.
        count: 10 for the deciles of George 2023, section 5.3.2.1.

    Returns:
        ``"1/10"``, ... -> indices.

    Raises:
        ValueError: If there are fewer examples than groups, or a score is nan.

    Example:
        >>> difficulty_groups(torch.tensor([0.9, 0.1, 0.8, 0.2]), 2)
        {'1/2': tensor([1, 3]), '2/2': tensor([2, 0])}
    """
    if not 0 < count <= len(scores) or bool(scores.isnan().any()):
        raise ValueError(
            f"{count} groups need as many examples with a score, got {len(scores)}, "
            f"{int(scores.isnan().sum())} of them nan."
        )
    parts = scores.argsort(stable=True).tensor_split(count)
    return {f"{i}/{count}": part for i, part in enumerate(parts, 1)}


def example_losses(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the loss ``[n]`` of every example, in eval mode.

    Args:
        model: Left as it was.
        x: Inputs ``[n, ...]``.
        y: Targets ``[n, ...]``.
        loss_fn: ``(outputs, targets) -> [k]``, such as
            ``partial(cross_entropy, reduction="none")``.

    Raises:
        ValueError: If the loss is not one number for each example.
    """
    parameters = choose(model, None)
    device = next(iter(parameters.values())).device
    parts = []
    with prepared(model, ()):
        for inputs, targets in zip(x.split(BATCH), y.split(BATCH), strict=True):
            outputs = outputs_of(model, moved(inputs, device)).detach()
            losses = loss_fn(outputs, moved(targets, device)).detach().cpu()
            if losses.shape != (len(inputs),):
                raise ValueError(
                    f"loss_fn must return one loss for each of {len(inputs)} examples, "
                    f"got {list(losses.shape)}; use reduction='none'."
                )
            parts.append(losses)
    return torch.cat(parts)


@result
class GroupCurves:
    """Losses of groups of examples over training, and the loss that measures progress.

    Attributes:
        steps: ``[T]``.
        progress: ``[T]``, the loss that says how far training is.
        losses: Name of the group -> its mean loss ``[T]``.
    """

    steps: Tensor
    progress: Tensor
    losses: dict[str, Tensor]

    def at(self, level: float) -> dict[str, float]:
        """Return every group's loss when ``progress`` first falls to ``level``.

        Between two records it is interpolated; nan if the level is not reached, or
        the first record is below it.
        """
        below = (self.progress <= level).nonzero()
        if len(below) == 0 or float(self.progress[0]) < level:
            return dict.fromkeys(self.losses, float("nan"))
        after = int(below[0])
        if after == 0:
            return {name: float(losses[0]) for name, losses in self.losses.items()}
        high, low = self.progress[after - 1], self.progress[after]
        weight = (high - level) / (high - low)
        between = {
            n: v[after - 1].lerp(v[after], weight) for n, v in self.losses.items()
        }
        return {name: float(loss) for name, loss in between.items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the groups' losses against progress; return the axes."""
        ax = axes_or_new(ax)
        for name, values in self.losses.items():
            ax.plot(self.progress.tolist(), values.tolist(), label=name)
        ax.invert_xaxis()
        ax.set(xlabel="loss that measures progress", ylabel="loss of the group")
        ax.legend(fontsize="small")
        return ax


class GroupRecorder:
    """Collects :class:`GroupCurves` while training.

    Args:
        groups: Name -> indices into the examples.
        reference: The group whose mean loss measures progress, such as that of clean
            examples. Default: the mean of all examples.

    Raises:
        ValueError: If a group is empty or the reference is none of the groups.
    """

    def __init__(
        self, groups: Mapping[str, Tensor], *, reference: str | None = None
    ) -> None:
        sizes = {name: len(indices) for name, indices in groups.items()}
        if not sizes or not all(sizes.values()):
            raise ValueError(f"Groups need examples, got groups of sizes {sizes}.")
        if reference is not None and reference not in groups:
            raise ValueError(
                f"reference must be None or one of {list(groups)}, got {reference!r}."
            )
        self.groups, self.reference = dict(groups), reference
        self._steps: list[int] = []
        self._progress: list[float] = []
        self._losses: dict[str, list[float]] = {name: [] for name in groups}

    def record(self, step: int, losses: Tensor) -> None:
        """Add the losses ``[n]`` of all examples, see :func:`example_losses`."""
        for name, indices in self.groups.items():
            self._losses[name].append(float(losses[indices].mean()))
        reference = self.reference
        mean = (
            float(losses.mean()) if reference is None else self._losses[reference][-1]
        )
        self._steps.append(step)
        self._progress.append(mean)

    def curves(self) -> GroupCurves:
        """Return the losses so far."""
        return GroupCurves(
            torch.tensor(self._steps),
            torch.tensor(self._progress, dtype=torch.float64),
            {n: torch.tensor(v, dtype=torch.float64) for n, v in self._losses.items()},
        )


@result
class EqualLoss:
    """Two runs compared at equal progress (George 2023, section 5.3.1).

    Attributes:
        levels: Losses at which they are compared, ``[k]``.
        first: Group -> its losses in the first run, ``[k]``; nan where not reached.
        second: Group -> its losses in the second run, likewise.
        difference: Group -> first minus second.
    """

    levels: Tensor
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    difference: dict[str, Tensor]

    def __str__(self) -> str:
        width = max(len(name) for name in self.difference)
        lines = ["group".ljust(width) + "".join(f"{v:>9.3g}" for v in self.levels)]
        lines += [
            name.ljust(width) + "".join(f"{float(v):>+9.3f}" for v in values)
            for name, values in self.difference.items()
        ]
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the differences against the level; return the axes."""
        ax = axes_or_new(ax)
        for name, values in self.difference.items():
            ax.plot(self.levels.tolist(), values.tolist(), "o-", label=name, ms=3)
        ax.axhline(0, color="black", lw=0.8)
        ax.invert_xaxis()
        ax.set(xlabel="loss that measures progress", ylabel="difference of the loss")
        ax.legend(fontsize="small")
        return ax


def compare_at_equal_loss(
    first: GroupCurves, second: GroupCurves, levels: Sequence[float]
) -> EqualLoss:
    """Return the groups' losses in two runs at equal progress.

    Args:
        first: One run, such as the network's.
        second: Another with the same groups, such as its linearisation's.
        levels: Values of ``progress``.

    Raises:
        ValueError: If the groups differ.
    """
    if set(first.losses) != set(second.losses):
        raise ValueError(
            f"Both runs need the same groups, got {sorted(first.losses)} and "
            f"{sorted(second.losses)}."
        )
    a, b = (
        {n: torch.tensor([run_losses[n] for run_losses in runs]) for n in first.losses}
        for runs in ([run.at(v) for v in levels] for run in (first, second))
    )
    return EqualLoss(
        torch.tensor(levels), a, b, {name: a[name] - b[name] for name in a}
    )


# -- residual networks without normalisation ------------------------------------------

_LAYERS = (nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d)


class _Rectified(TorchFunctionMode):
    """Records of every weight whether all inputs of its layer are non-negative."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the function; record the inputs of linear layers and convolutions."""
        if func in _LAYERS and len(args) > 1:
            rectified = bool((args[0] >= 0).all())
            before = self.seen.get(id(args[1]), True)
            self.seen[id(args[1])] = before and rectified
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def initialise_residual_(
    model: nn.Module,
    inputs: Tensor,
    *,
    last: Collection[str] = (),
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Initialise a network without normalisation so that its outputs keep their scale.

    George 2023, A.3, for fan-in ``n``: layers after a ReLU get weights of variance
    ``2 / n``, other layers ``1 / n``, and the last layer of each residual branch
    ``0.2 / n``; biases become zero. Which layers come after a ReLU is seen in one
    forward pass, of noise: their inputs are non-negative, also behind pooling.

    Args:
        model: Its linear layers and convolutions are initialised in place.
        inputs: An example of its inputs, ``[N, *]``; only shape, type and device count.
        last: Names of the last layers of residual branches.
        generator: Of the noise and the weights.

    Returns:
        The variance of every layer's weights by layer name.

    Raises:
        ValueError: If ``last`` names a module that is no linear layer or convolution
            of the forward pass; nothing has changed then.
    """
    noise = torch.empty_like(inputs).normal_(generator=generator)
    training = model.training
    model.eval()
    try:
        with _Rectified() as mode:
            model(noise)
    finally:
        model.train(training)
    layers = {
        name: module
        for name, module in model.named_modules()
        if id(getattr(module, "weight", None)) in mode.seen
    }
    unknown = [name for name in last if name not in layers]
    if unknown:
        raise ValueError(
            f"last names {unknown}, which are no linear layers or convolutions of the "
            f"forward pass; those are {list(layers)}."
        )
    variances = {}
    for name, layer in layers.items():
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        scale = 2.0 if mode.seen[id(weight)] else 1.0
        variances[name] = (0.2 if name in last else scale) / weight[0].numel()
        weight.normal_(std=variances[name] ** 0.5, generator=generator)
        if isinstance(bias, Tensor):
            bias.zero_()
    return variances
