"""Order parameters of random networks of great width, and the spectra they predict.

Karakida, Akaho & Amari 2020, sections 2.3 to 5, with the misprints of the text
corrected: ``kappa`` multiplies a backward with a forward parameter (Theorem 3.1), the
softmax mean has no factor of the number of classes (Theorem 3.3), the second moment of
the feature metric has one over the width and squares ``kappa_2`` (Theorem 5.1). All are
limits of width; :func:`~ekfac.diagnostics.order_parameters` measures the same numbers
on a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ekfac.diagnostics.gaussian import (
    Function,
    derivative,
    expectation,
    product_expectation,
)


@dataclass(frozen=True)
class PredictedSpectrum:
    """Statistics of a spectrum in the limit of great width.

    Attributes:
        mean: Of all eigenvalues, zeros included.
        second_moment: Mean of their squares.
        maximum: The largest, which as many eigenvectors share as there are outputs.
    """

    mean: float
    second_moment: float
    maximum: float


@dataclass(frozen=True)
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

    def kernel_element(self, which: int, layer: int) -> float:
        """Return ``K^l``: a layer's share of the dual, over ``M_{l-1} / N``.

        Args:
            which: 1 for an example with itself, 2 for two examples.
            layer: ``l``, from 1 to ``L``.
        """
        forward, backward = self._pair(which)
        return backward[layer - 1] * forward[layer - 1]

    def kappa(self, which: int) -> float:
        """Return ``alpha kappa M``, the dual's element over ``1 / N``.

        The text factors ``alpha M`` out; at finite widths the sum over the layers of
        ``M_{l-1}`` times their elements is what it stands for.
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
        return _block(
            self.kappa(1),
            self.kappa(2),
            num_examples,
            self.widths[-1],
            self.num_parameters,
        )

    def layer(self, layer: int, num_examples: int) -> PredictedSpectrum:
        """Return those of one layer's block (section 3.2).

        For the first layer the limit leaves out terms that are not small: inputs of
        different examples are orthogonal (``forward_2`` is 0 there).

        Args:
            layer: ``l``, from 1 to ``L``.
            num_examples: ``N``.
        """
        inputs, out = self.widths[layer - 1], self.widths[layer]
        return _block(
            inputs * self.kernel_element(1, layer),
            inputs * self.kernel_element(2, layer),
            num_examples,
            self.widths[-1],
            out * (inputs + 1),
        )

    def kernel(self, num_examples: int) -> PredictedSpectrum:
        """Return those of the tangent kernel in its own parametrisation (section 4.1).

        Means are over the kernel's ``C N`` eigenvalues; the text's are over ``N``.
        """
        one, two, n = self.kernel_kappa(1), self.kernel_kappa(2), num_examples
        second = (n - 1) * two**2 + one**2
        return PredictedSpectrum(one, second, (n - 1) * two + one)

    def feature_metric(self, num_examples: int) -> PredictedSpectrum:
        """Return those of the metric of inputs and features together (Theorem 5.1)."""
        variance = self.weight_variance
        size = sum(self.widths[:-1])
        return _block(
            variance * sum(self.backward_1),
            variance * sum(self.backward_2),
            num_examples,
            self.widths[-1],
            size,
        )

    def layer_metric(self, layer: int, num_examples: int) -> PredictedSpectrum:
        """Return those of the metric of the features ``h^l`` alone (appendix D.2).

        Args:
            layer: ``l``, from 0 (the inputs) to ``L - 1``.
            num_examples: ``N``.
        """
        variance = self.weight_variance
        return _block(
            variance * self.backward_1[layer],
            variance * self.backward_2[layer],
            num_examples,
            self.widths[-1],
            self.widths[layer],
        )


def _block(
    one: float, two: float, num_examples: int, outputs: int, size: int
) -> PredictedSpectrum:
    """Return the statistics of a dual with ``one`` and ``two`` over ``N`` as elements.

    ``C`` equal blocks with eigenvalues ``((N - 1) two + one) / N`` once and
    ``(one - two) / N`` otherwise, and zeros up to ``size``.
    """
    n = num_examples
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
    functions = list(activation) if isinstance(activation, Sequence) else []
    functions = functions or [activation] * (depth - 1)  # type: ignore[list-item]
    if len(functions) != depth - 1:
        raise ValueError(
            f"{depth - 1} hidden layers need as many activations, got "
            f"{len(functions)}; one function stands for all."
        )
    forward = [(1.0, 0.0)]
    slopes: list[tuple[float, float]] = []
    for phi in functions:
        a, b = (weight_variance * q + bias_variance for q in forward[-1])
        forward.append((_self(phi, a), product_expectation(phi, a, b)))
        slope = derivative(phi)
        slopes.append((_self(slope, a), product_expectation(slope, a, b)))
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


def _self(function: Function, variance: float) -> float:
    """Return ``E[function(u)^2]``."""
    return expectation(lambda u: function(u) ** 2, variance)
