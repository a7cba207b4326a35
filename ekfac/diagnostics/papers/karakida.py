"""Mean-field theory of wide random networks, and the Fisher spectra that it predicts.

Karakida, Akaho & Amari 2020, sections 2.3 to 5, with the misprints of the text
corrected: ``kappa`` multiplies a backward with a forward parameter (Theorem 3.1), the
softmax mean has no factor of the number of classes (Theorem 3.3; its own proof, B.4,
has none), the second moment of the feature metric has one over the width and squares
``kappa_2`` (Theorem 5.1), and Theorem 3.4 has one outlier fewer: every
``Q_n = diag(g) - g g^T`` has the constant vector in its null space, and so does their
mean. All are limits of great width; :func:`order_parameters` measures the same numbers
on a network.

Expectations over Gaussians are Gauss-Legendre sums over panels whose ends are multiples
of 1/4 (or of a finer power of two): a function with kinks or jumps there, as the common
activations have at 0, 1 and 3, is integrated as precisely as a smooth one.

The feature metric (section 5) of a network is ``A = E[sum_k grad_h f_k grad_h f_k^T]``
for the inputs ``h`` of its layers. The block of a layer is
``W^T G W`` with the layer's own K-FAC factor ``G``, an identity; the blocks between
layers are not in the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.spectra import Source, Spectrum
from ekfac.errors import UnsupportedOperationError
from ekfac.estimate.tangent_kernel import layer_features
from ekfac.likelihoods import resolve
from ekfac.matrices import BlockDiagonalMatrix, KFACMatrix
from ekfac.spectral.operators import result
from ekfac.vectors import named_parameters

Function = Callable[[Tensor], Tensor]

# Standard deviations on each side; beyond, the density is below 1e-22.
_REACH = 10.0
# Points in a panel, whose width is at most one standard deviation.
_POINTS = 12
# The widest panel.
_PANEL = 0.25
# A pair of higher correlation counts as one variable.
_SAME = 1 - 1e-9


def expectation(function: Function, variance: float) -> float:
    """Return ``E[function(u)]`` for ``u`` normal with mean 0.

    Args:
        function: Applied entry by entry in float64.
        variance: Of ``u``, 0 or more.
    """
    points, weights = _rule(variance, math.sqrt(variance))
    return float((weights * function(points)).sum())


def product_expectation(
    function: Function, variance: float, covariance: float
) -> float:
    """Return ``E[function(u) function(v)]`` for two normal variables with mean 0.

    The function ``I_phi`` of Karakida et al. 2020, equation 16: the mean, over the part
    that the two have in common, of the square of the mean over the rest.

    Args:
        function: Applied entry by entry in float64.
        variance: Of ``u`` and of ``v``.
        covariance: Of ``u`` and ``v``, from 0 to ``variance``.

    Raises:
        ValueError: If ``covariance`` is not within that range.
    """
    if not -1e-12 * variance <= covariance <= variance * (1 + 1e-12):
        raise ValueError(
            f"covariance must be between 0 and the variance {variance:g}, got "
            f"{covariance:g}."
        )
    covariance = max(covariance, 0.0)
    if covariance >= variance * _SAME:
        return expectation(lambda u: function(u) ** 2, variance)
    sd = math.sqrt(variance - covariance)
    points, weights = _rule(variance, sd, density=False)
    values = weights * function(points) / (sd * math.sqrt(2 * math.pi))
    finest = sd if covariance == 0 else min(sd, math.sqrt(covariance))
    shared, shared_weights = _rule(covariance, finest)
    expected = 0.0
    for centres, mass in zip(shared.split(128), shared_weights.split(128), strict=True):
        reach = torch.tensor([centres[0] - _REACH * sd, centres[-1] + _REACH * sd])
        first, last = torch.searchsorted(points, reach.double()).tolist()
        near = points[first:last] - centres.unsqueeze(1)
        means = torch.exp(-0.5 * (near / sd) ** 2) @ values[first:last]
        expected += float((mass * means**2).sum())
    return expected


def derivative(function: Function) -> Function:
    """Return the derivative of a function that is applied entry by entry."""

    def differentiated(points: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = points.detach().clone().requires_grad_()
            outputs = function(inputs)
            if not outputs.requires_grad:
                return torch.zeros_like(points)
            return torch.autograd.grad(outputs.sum(), inputs)[0]

    return differentiated


def _rule(
    variance: float, finest: float, *, density: bool = True
) -> tuple[Tensor, Tensor]:
    """Return points and weights of an integral against a Gaussian.

    Args:
        variance: Of the Gaussian, whose range the points cover.
        finest: Smallest standard deviation that the panels have to resolve.
        density: Whether the weights contain the Gaussian's density.
    """
    if variance == 0:
        return torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    deviation = math.sqrt(variance)
    width = min(_PANEL, 2.0 ** math.floor(math.log2(finest)))
    count = math.ceil(_REACH * deviation / width)
    nodes, masses = _legendre(_POINTS)
    starts = width * torch.arange(-count, count, dtype=torch.float64)
    points = (starts.unsqueeze(1) + width * (nodes + 1) / 2).flatten()
    weights = (masses * width / 2).repeat(2 * count)
    if density:
        scale = deviation * math.sqrt(2 * math.pi)
        weights = weights * torch.exp(-0.5 * (points / deviation) ** 2) / scale
    return points, weights


def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Legendre rule on ``[-1, 1]`` (Golub & Welsch 1969)."""
    k = torch.arange(1, count, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, 2 * vectors[0] ** 2


@result
class PredictedSpectrum:
    """Statistics of a spectrum in the limit of great width.

    Attributes:
        mean: Of all eigenvalues, zeros included.
        second_moment: Mean of their squares.
        maximum: The largest, of as many eigenvectors as there are outputs.
    """

    mean: float
    second_moment: float
    maximum: float


@result
class MeanField:
    """Order parameters of a fully connected network with random weights.

    ``L`` linear maps of widths ``M_0, ..., M_L``, weights of layer ``l`` normal with
    variance ``weight_variance / M_{l-1}``, biases with ``bias_variance``, inputs
    standard normal, linear outputs. Index 1 of an order parameter stands for one
    example with itself, 2 for two examples.

    Attributes:
        widths: ``M_0`` to ``M_L``.
        weight_variance: ``sigma_w^2``.
        bias_variance: ``sigma_b^2``.
        forward_1: ``|h^l|^2 / M_l``, for ``l`` from 0 to ``L - 1``.
        forward_2: ``h^l(n) . h^l(m) / M_l``.
        backward_1: ``|delta^l|^2`` of one output, for ``l`` from 1 to ``L``.
        backward_2: ``delta^l(n) . delta^l(m)``.
    """

    widths: tuple[int, ...]
    weight_variance: float
    bias_variance: float
    forward_1: tuple[float, ...]
    forward_2: tuple[float, ...]
    backward_1: tuple[float, ...]
    backward_2: tuple[float, ...]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the order parameters by layer; return the axes."""
        ax = axes_or_new(ax)
        for name in ("forward_1", "forward_2", "backward_1", "backward_2"):
            first = 0 if name.startswith("forward") else 1
            values = getattr(self, name)
            ax.plot(range(first, first + len(values)), values, "o-", label=name, ms=4)
        ax.set(xlabel="layer", ylabel="order parameter")
        ax.grid(alpha=0.3)
        ax.legend()
        return ax

    @property
    def depth(self) -> int:
        """Number of linear maps, ``L``."""
        return len(self.widths) - 1

    def _pair(self, which: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if which not in (1, 2):
            raise ValueError(f"which must be 1 or 2, got {which}.")
        if which == 1:
            return self.forward_1, self.backward_1
        return self.forward_2, self.backward_2

    def _check(self, layer: int, first: int, last: int) -> None:
        """Raise unless a layer's number is in the range."""
        if not first <= layer <= last:
            raise ValueError(
                f"layer must be from {first} to {last} in a network of {self.depth} "
                f"linear maps, got {layer}."
            )

    def kernel_element(self, which: int, layer: int) -> float:
        """Return ``K^l``: a layer's share of the dual, over ``M_{l-1} / N``.

        Args:
            which: 1 for an example with itself, 2 for two examples.
            layer: ``l``, from 1 to ``L``.

        Raises:
            ValueError: If ``which`` or ``layer`` is out of range.
        """
        self._check(layer, 1, self.depth)
        forward, backward = self._pair(which)
        return backward[layer - 1] * forward[layer - 1]

    def kappa(self, which: int) -> float:
        """Return ``alpha kappa M``, the dual's element over ``1 / N``.

        It is the sum of ``M_{l-1} K^l`` over the layers, from which the text factors
        ``alpha M`` out in the limit.
        """
        return sum(
            self.widths[layer - 1] * self.kernel_element(which, layer)
            for layer in range(1, self.depth + 1)
        )

    def kernel_kappa(self, which: int) -> float:
        """Return the tangent kernel's element in its own parametrisation (App. C)."""
        forward, backward = self._pair(which)
        return sum(
            b * (self.weight_variance * f + self.bias_variance)
            for f, b in zip(forward, backward, strict=True)
        )

    @property
    def num_parameters(self) -> int:
        """Weights and biases."""
        pairs = zip(self.widths[1:], self.widths[:-1], strict=True)
        return sum(out * (inputs + 1) for out, inputs in pairs)

    def fisher(self, num_examples: int) -> PredictedSpectrum:
        """Return the statistics of the Fisher matrix of regression (Theorem 3.1)."""
        size = self.num_parameters
        return self._block(self.kappa(1), self.kappa(2), num_examples, size)

    def layer(self, layer: int, num_examples: int) -> PredictedSpectrum:
        """Return the statistics of one layer's block (section 3.2).

        For the first layer the limit leaves out terms that are not small: inputs of
        different examples are orthogonal in it (``forward_2`` is 0 there).

        Args:
            layer: ``l``, from 1 to ``L``.
            num_examples: ``N``.

        Raises:
            ValueError: If there is no such layer.
        """
        self._check(layer, 1, self.depth)
        inputs, out = self.widths[layer - 1], self.widths[layer]
        one = inputs * self.kernel_element(1, layer)
        two = inputs * self.kernel_element(2, layer)
        return self._block(one, two, num_examples, out * (inputs + 1))

    def kernel(self, num_examples: int) -> PredictedSpectrum:
        """Return the statistics of the tangent kernel in its parametrisation (4.1).

        Means are over the kernel's ``C N`` eigenvalues; those of the text are over
        ``N``.
        """
        one, two, n = self.kernel_kappa(1), self.kernel_kappa(2), num_examples
        second = (n - 1) * two**2 + one**2
        return PredictedSpectrum(one, second, (n - 1) * two + one)

    def feature_metric(self, num_examples: int) -> PredictedSpectrum:
        """Return the statistics of the metric of inputs and features (Theorem 5.1)."""
        one = self.weight_variance * sum(self.backward_1)
        two = self.weight_variance * sum(self.backward_2)
        return self._block(one, two, num_examples, sum(self.widths[:-1]))

    def layer_metric(self, layer: int, num_examples: int) -> PredictedSpectrum:
        """Return the statistics of the metric of the features ``h^l`` (appendix D.2).

        Args:
            layer: ``l``, from 0 (the inputs) to ``L - 1``.
            num_examples: ``N``.

        Raises:
            ValueError: If there is no such layer.
        """
        self._check(layer, 0, self.depth - 1)
        one = self.weight_variance * self.backward_1[layer]
        two = self.weight_variance * self.backward_2[layer]
        return self._block(one, two, num_examples, self.widths[layer])

    def _block(
        self, one: float, two: float, num_examples: int, size: int
    ) -> PredictedSpectrum:
        """Return the statistics of a dual with ``one`` and ``two`` over ``N`` in it.

        ``C`` equal blocks with eigenvalues ``((N - 1) two + one) / N`` once and
        ``(one - two) / N`` otherwise, and zeros up to ``size``.
        """
        n, outputs = num_examples, self.widths[-1]
        second = (n - 1) / n * two**2 + one**2 / n
        return PredictedSpectrum(
            outputs * one / size, outputs * second / size, ((n - 1) * two + one) / n
        )


def mean_field_theory(
    activation: Function | Sequence[Function],
    widths: Sequence[int],
    *,
    weight_variance: float,
    bias_variance: float,
) -> MeanField:
    """Return the order parameters of random networks (equations 14 to 18).

    Args:
        activation: A function applied entry by entry, with kinks and jumps at multiples
            of 1/4 only, or one for each of the ``L - 1`` hidden layers.
        widths: ``M_0`` to ``M_L``: inputs, hidden layers, outputs.
        weight_variance: ``sigma_w^2``; a layer's weights have it over its inputs.
        bias_variance: ``sigma_b^2``.

    Raises:
        ValueError: If there are fewer than two widths, or not one activation for each
            hidden layer.

    Example:
        >>> import torch
        >>> theory = mean_field_theory(torch.relu, [100, 100, 1], weight_variance=2.0,
        ...                     bias_variance=0.0)
        >>> round(theory.forward_1[1], 6), round(theory.forward_2[1], 6)
        (1.0, 0.31831)
    """
    depth = len(widths) - 1
    if depth < 1:
        raise ValueError(f"widths needs inputs and outputs, got {list(widths)}.")
    if isinstance(activation, Sequence):
        functions = list(activation)
    else:
        functions = [activation] * (depth - 1)
    if len(functions) != depth - 1:
        raise ValueError(
            f"{depth - 1} hidden layers need as many activations, got "
            f"{len(functions)}; one function stands for all."
        )
    forward = [(1.0, 0.0)]
    slopes: list[tuple[float, float]] = []
    for phi in functions:
        a, b = (weight_variance * q + bias_variance for q in forward[-1])
        one, two = product_expectation(phi, a, a), product_expectation(phi, a, b)
        forward.append((one, two))
        slope = derivative(phi)
        one, two = product_expectation(slope, a, a), product_expectation(slope, a, b)
        slopes.append((one, two))
    backward = [(1.0, 1.0)]
    for slope_1, slope_2 in reversed(slopes):
        one, two = backward[0]
        scaled = weight_variance * one * slope_1, weight_variance * two * slope_2
        backward.insert(0, scaled)
    return MeanField(
        tuple(widths),
        weight_variance,
        bias_variance,
        forward_1=tuple(one for one, _ in forward),
        forward_2=tuple(two for _, two in forward),
        backward_1=tuple(one for one, _ in backward),
        backward_2=tuple(two for _, two in backward),
    )


@result
class SoftmaxMoments:
    """Moments of ``Q_n = diag(g_n) - g_n g_n^T`` over the probabilities ``g_n``.

    Attributes:
        beta_1: ``mean_n tr Q_n``.
        beta_2: ``(1 / N^2) sum_{n != m} tr Q_n Q_m``.
        beta_3: ``mean_n tr Q_n^2``.
        beta_4: The largest diagonal entry of the mean of ``Q_n``.
        mean_values: ``[C]``, eigenvalues of the mean of ``Q_n``, descending; the last
            is zero.
        maximum: The largest eigenvalue of any ``Q_n``.
    """

    beta_1: float
    beta_2: float
    beta_3: float
    beta_4: float
    mean_values: Tensor
    maximum: float


def softmax_moments(probabilities: Tensor) -> SoftmaxMoments:
    """Return the moments of probabilities ``[N, C]``.

    Raises:
        ValueError: If the rows are not probabilities.
    """
    g = probabilities
    sums = g.sum(dim=-1)
    if g.dim() != 2 or bool((g < 0).any()) or bool(((sums - 1).abs() > 1e-4).any()):
        raise ValueError(
            f"probabilities must be [N, C] with rows that sum to 1, got "
            f"{list(g.shape)} with sums from {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}; pass the softmax of the outputs."
        )
    Q = torch.diag_embed(g) - g.unsqueeze(2) * g.unsqueeze(1)
    mean = Q.mean(dim=0)
    beta_3 = float(Q.square().sum(dim=(1, 2)).mean())
    return SoftmaxMoments(
        beta_1=float(1 - g.square().sum(dim=1).mean()),
        beta_2=float(mean.square().sum()) - beta_3 / len(g),
        beta_3=beta_3,
        beta_4=float(mean.diagonal().max()),
        mean_values=torch.linalg.eigvalsh(mean).flip(0),
        maximum=float(torch.linalg.eigvalsh(Q)[:, -1].max()),
    )


@result
class SoftmaxBounds:
    """Predictions or bounds for a classifier's Fisher matrix, without forming it.

    Attributes:
        mean: The mean eigenvalue: predicted, or an upper bound.
        second_moment: The mean square, likewise.
        lower: Lower bound of the largest eigenvalue, in the limit of great width.
        upper: Upper bound of the largest eigenvalue.
        outliers: ``[C - 1]``, estimates of the largest eigenvalues.
        source: ``"exact"`` where mean, second moment and upper bound hold for the
            finite network, ``"approximation"`` for limits of great width.
    """

    mean: float
    second_moment: float
    lower: float
    upper: float
    outliers: Tensor
    source: str


def softmax_prediction(
    theory: MeanField, probabilities: Tensor, num_examples: int | None = None
) -> SoftmaxBounds:
    """Return the limit of great width (Theorem 3.3).

    The probabilities may be those of any time in training, as long as the tangent
    kernel stays what it was (section 3.4).

    Args:
        theory: Order parameters of the network.
        probabilities: ``[N, C]``.
        num_examples: ``N``. Default: that of the probabilities.

    Raises:
        ValueError: If the rows are not probabilities.
    """
    n = len(probabilities) if num_examples is None else num_examples
    moments, size = softmax_moments(probabilities), theory.num_parameters
    one, two = theory.kappa(1), theory.kappa(2)
    second = (moments.beta_2 * two**2 + moments.beta_3 * one**2 / n) / size
    largest = theory.fisher(n).maximum
    return SoftmaxBounds(
        mean=moments.beta_1 * one / size,
        second_moment=second,
        lower=moments.beta_4 * largest,
        upper=(size * second) ** 0.5,
        outliers=moments.mean_values[:-1] * largest,
        source="approximation",
    )


def softmax_bounds(linear: Spectrum, probabilities: Tensor) -> SoftmaxBounds:
    """Return bounds from the Fisher matrix of the logits as regression outputs.

    ``lambda_i(F) <= max_n lambda_max(Q_n) lambda_i(F_linear)`` holds exactly for every
    ``i`` (equation 28). The lower bound and the outliers are asymptotic, with the mean
    of the ``C`` largest eigenvalues in place of the limit's.

    Args:
        linear: The eigenvalues of the logits' Fisher matrix, ``likelihood="gaussian"``.
        probabilities: ``[N, C]``.

    Raises:
        ValueError: If the rows are not probabilities.
    """
    moments = softmax_moments(probabilities)
    classes = probabilities.shape[1]
    largest = float(linear.values[:classes].mean())
    return SoftmaxBounds(
        mean=moments.maximum * linear.mean,
        second_moment=moments.maximum**2 * linear.second_moment,
        lower=moments.beta_4 * largest,
        upper=moments.maximum * linear.maximum,
        outliers=moments.mean_values[:-1] * largest,
        source=linear.source,
    )


@result
class OrderParameters:
    """Order parameters by layer (Karakida et al. 2020, equations 14 and 17).

    Forward ones are of the layer's inputs, backward ones of the derivatives of an
    output with respect to the layer's outputs; means over examples (1) or over pairs of
    different examples (2), over positions and over outputs.

    Attributes:
        forward_1: ``|h|^2 / d_in``.
        forward_2: ``h(n) . h(m) / d_in``.
        backward_1: ``|delta|^2``.
        backward_2: ``delta(n) . delta(m)``; empty from factors, which do not hold it.
        source: ``"exact"`` or ``"factors"``.
    """

    forward_1: dict[str, float]
    forward_2: dict[str, float]
    backward_1: dict[str, float]
    backward_2: dict[str, float]
    source: Source

    def plot(self, ax: Axes | None = None, *, theory: MeanField | None = None) -> Axes:
        """Draw them by layer, beside a theory's as lines; return the axes."""
        ax = axes_or_new(ax)
        for i, name in enumerate(
            ("forward_1", "forward_2", "backward_1", "backward_2")
        ):
            values: dict[str, float] = getattr(self, name)
            colour = f"C{i}"
            layers = range(len(self.forward_1))
            if values:
                ax.plot(layers, list(values.values()), "o", color=colour, label=name)
            if theory is not None:
                ax.plot(layers, getattr(theory, name), "-", color=colour, lw=1)
        ax.set_xticks(range(len(self.forward_1)), list(self.forward_1))
        ax.set(xlabel="layer", ylabel="order parameter (lines: theory)")
        ax.grid(alpha=0.3)
        ax.legend()
        return ax


def order_parameters(model: nn.Module, x: Any) -> OrderParameters:
    """Return the order parameters of every layer on some inputs.

    Args:
        model: The model, in eval mode while it is called.
        x: At least two inputs: a tensor, a mapping of keyword arguments or a tuple.

    Raises:
        ValueError: If there is a single example.
    """
    outputs, layers = layer_features(model, x)
    if len(outputs) < 2:
        raise ValueError(f"Pairs need two examples or more, got {len(outputs)}.")
    found = OrderParameters({}, {}, {}, {}, source="exact")
    for name, layer in layers.items():
        h = layer.features
        one, two = _moments(h.flatten(1, 2).unsqueeze(1))
        found.forward_1[name] = one / h[0, 0].numel()
        found.forward_2[name] = two / h[0, 0].numel()
        found.backward_1[name], found.backward_2[name] = _moments(
            layer.grads.flatten(3)
        )
    return found


def _moments(vectors: Tensor) -> tuple[float, float]:
    """Return the mean square and the mean product of two examples.

    Args:
        vectors: ``[N, K, S, d]``; means are over ``K`` and ``S`` too.
    """
    n, k, s = vectors.shape[:3]
    square = float(vectors.square().sum()) / (n * k * s)
    of_mean = float(vectors.mean(dim=0).square().sum()) / (k * s)
    return square, (n * of_mean - square) / (n - 1)


def order_parameters_of_factors(
    matrix: BlockDiagonalMatrix, *, num_examples: int, num_outputs: int
) -> OrderParameters:
    """Return the order parameters that Kronecker factors contain.

    The squares are the factors' traces; the overlap of inputs is the norm of their
    mean, which is the bias row of ``A``; layers without a bias have none. The overlap
    of gradients is not in the factors.

    Args:
        matrix: A K-FAC matrix of ``kind="l2"``, on examples of one position.
        num_examples: Number of examples that the factors are means over.
        num_outputs: Number of outputs that ``G`` sums over.

    Raises:
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    found = OrderParameters({}, {}, {}, {}, source="factors")
    for name, block in kfac_blocks(matrix).items():
        A, G = block.factor("A"), block.factor("G")
        has_bias = len(block.layer.parameter_names) > 1
        d_in = A.shape[-1] - has_bias
        diagonal = A.diagonal(dim1=-2, dim2=-1)[..., :d_in]
        one = float(diagonal.sum(dim=-1).mean()) / d_in
        found.forward_1[name] = one
        if has_bias:
            of_mean = float(A[..., -1, :-1].square().sum(dim=-1).mean()) / d_in
            n = num_examples
            found.forward_2[name] = (n * of_mean - one) / (n - 1)
        trace = float(G.diagonal(dim1=-2, dim2=-1).sum())
        found.backward_1[name] = trace / num_outputs
    return found


def kfac_blocks(matrix: BlockDiagonalMatrix) -> Mapping[str, KFACMatrix]:
    """Return the blocks of a K-FAC matrix.

    Raises:
        UnsupportedOperationError: If a block has another structure.
    """
    blocks = {}
    for name, block in matrix.blocks.items():
        if not isinstance(block, KFACMatrix) or block.factor("A").dim() < 3:
            raise UnsupportedOperationError(
                f"The block of layer {name!r} is {block.structure}, without a dense "
                "input factor; use structure='kfac' and leave such layers out with "
                "parameters=[...]."
            )
        blocks[name] = block
    return blocks


@result
class FeatureMetric:
    """The metric of the layers' inputs, by layer and whole (Karakida et al. 2020, 5).

    Attributes:
        blocks: Layer name -> ``[b, d_in, d_in]``, a sum over shared positions.
        source: ``"exact"``; ``"factors"`` if made of K-FAC factors, which gives the
            same blocks.
        gradients: ``[N K, sum d_in]``, whose second moment is the whole, or ``None``.
        num_examples: ``N``, the divisor of the second moment.
    """

    blocks: dict[str, Tensor]
    source: Source
    gradients: Tensor | None = None
    num_examples: int = 0

    def layer_spectra(self) -> dict[str, Spectrum]:
        """Return the eigenvalues of every layer's block."""
        spectra = {}
        for name, block in self.blocks.items():
            values = torch.linalg.eigvalsh(block).flatten().sort(descending=True).values
            spectra[name] = Spectrum(values, len(values), "exact")
        return spectra

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues of the whole, blocks between layers included.

        Raises:
            UnsupportedOperationError: From factors, or with shared positions.
        """
        if self.gradients is None:
            raise UnsupportedOperationError(
                "The whole metric needs layers with one position per example, without "
                "groups, and feature_metric(model, x); Kronecker factors and "
                "convolutions give its blocks alone: use layer_spectra()."
            )
        rows = self.gradients
        small = rows @ rows.mT if rows.shape[0] < rows.shape[1] else rows.mT @ rows
        values = torch.linalg.eigvalsh(small / self.num_examples).flip(0)
        return Spectrum(values, rows.shape[1], "exact")


def feature_metric(
    model: nn.Module, x: Any, likelihood: Any = "categorical"
) -> FeatureMetric:
    """Return the metric of inputs and features on some examples.

    Karakida et al. 2020, section 5.

    Args:
        model: The model, in eval mode while it is called.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        likelihood: As for :func:`ekfac.fisher`; ``"gaussian"`` is the text's metric.
    """
    outputs, layers = layer_features(model, x)
    n = len(outputs)
    pseudo = [h.flatten(1) for h in resolve(likelihood).exact(outputs)]
    weights = torch.stack(pseudo, dim=1).to(outputs.dtype)  # [N, K, C]
    blocks, stacked = {}, []
    for name, layer in layers.items():
        slopes = layer.input_grads
        rows = torch.bmm(weights, slopes.flatten(2)).unflatten(2, slopes.shape[2:])
        flat = rows.flatten(0, 2).transpose(0, 1)  # [b, N K S, d_in]
        blocks[name] = flat.mT @ flat / n
        if slopes.shape[2:4] == (1, 1):
            stacked.append(rows.flatten(2))
    complete = len(stacked) == len(layers)
    gradients = torch.cat(stacked, dim=2).flatten(0, 1) if complete else None
    return FeatureMetric(blocks, "exact", gradients, n)


def feature_metric_of_factors(
    model: nn.Module, matrix: BlockDiagonalMatrix
) -> FeatureMetric:
    """Return the feature metric's blocks ``W^T G W`` from a K-FAC matrix.

    Args:
        model: The model with the weights ``W``.
        matrix: Its K-FAC matrix.

    Raises:
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    parameters = named_parameters(model)
    blocks = {}
    for name, block in kfac_blocks(matrix).items():
        names = block.layer.parameter_names
        tensors = {n: parameters[n].detach().to(block.dtype) for n in names}
        weight = block.layer.pack(tensors)
        if len(names) > 1:
            weight = weight[..., :-1]
        blocks[name] = weight.mT @ block.factor("G") @ weight
    return FeatureMetric(blocks, "factors")
