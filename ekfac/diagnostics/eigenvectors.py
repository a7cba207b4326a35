"""What eigenvectors look like: overlaps, shares of layers, concentration.

All functions take orthonormal columns ``[P, k]``. Sources: Haink (2023), sections 6.1
and 7.2 to 7.6; Ge (2025), section 4.3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ekfac.diagnostics.directions import Directions
from ekfac.diagnostics.drawing import pyplot
from ekfac.errors import StateMismatchError
from ekfac.estimate import Jacobian
from ekfac.spectral import Eigenpairs
from ekfac.spectral.singular import singular_products
from ekfac.vectors import Vector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Reading = Literal["kfac", "spatial"]


@dataclass(frozen=True)
class WeightProduct:
    """How the weights spread over the directions (Haink 2023, eq. 7.2).

    Attributes:
        value: ``c_i = (v_i . w) / |w|``, ``[k]``; the squares of a whole basis sum to
            one.
        null: Root mean square of ``c_i`` for directions independent of the weights,
            ``P^-1/2`` (ibid., eq. 7.9).
    """

    value: Tensor
    null: float

    def relative_energy(self) -> Tensor:
        """Return ``P c_i^2``, ``[k]``: one on average for independent directions."""
        return (self.value / self.null).square()

    def plot(self) -> Figure:
        """Return a figure of ``|c_i|`` by index, with the null level."""
        figure, axis = _axis("|v . w| / |w|")
        axis.plot(range(1, len(self.value) + 1), self.value.abs().tolist(), lw=0.8)
        axis.axhline(self.null, color="0.5", ls="--", label="independent")
        axis.set(xscale="log")
        axis.legend()
        return figure


def weight_product(directions: Directions, weights: Vector) -> WeightProduct:
    """Return the share of the weights in every direction.

    Args:
        directions: Of a layer or of the network.
        weights: The parameters, those of the directions among them; trained, or at
            initialisation.
    """
    w = directions.space.flat(weights.subset(directions.space.names))
    w = w.to(directions.vectors)
    return WeightProduct(directions.vectors.mT @ w / w.norm(), len(w) ** -0.5)


@dataclass(frozen=True)
class Overlap:
    """The absolute inner products of two sets of orthonormal vectors.

    Attributes:
        value: ``|a_i . b_j|``, ``[k_a, k_b]``.
        size: Dimension of the space, ``P``.
    """

    value: Tensor
    size: int

    def captured(self) -> Tensor:
        """Return the share of each ``a_i`` in the span of all ``b``, ``[k_a]``."""
        return self.value.square().sum(dim=1)

    @property
    def chance(self) -> float:
        """Expected :meth:`captured` for a random span."""
        return self.value.shape[1] / self.size

    def similarity(self) -> float:
        """Return the mean of :meth:`captured`: one for equal spans."""
        return float(self.captured().mean())

    def plot(self) -> Figure:
        """Return the matrix as an image."""
        figure, axis = _axis("second set")
        image = axis.imshow(self.value.cpu(), aspect="auto", cmap="viridis")
        figure.colorbar(image, label="|overlap|")
        axis.set(xlabel="second set", ylabel="first set")
        axis.grid(False)
        return figure


def overlap(first: Tensor, second: Tensor) -> Overlap:
    """Return the overlaps of columns ``[P, k_a]`` and ``[P, k_b]``, all of unit norm.

    Raises:
        StateMismatchError: If the spaces differ.
    """
    if first.shape[0] != second.shape[0]:
        raise StateMismatchError(
            f"The first vectors have {first.shape[0]} entries and the second "
            f"{second.shape[0]}; pad a layer's with Directions.in_space(space)."
        )
    return Overlap((first.mT @ second.to(first)).abs(), first.shape[0])


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosines of the principal angles of two spans, descending.

    Args:
        first: Orthonormal columns ``[P, a]``.
        second: Orthonormal columns ``[P, b]``.
    """
    cosines: Tensor = torch.linalg.svdvals(first.mT @ second.to(first))
    return cosines.clamp(max=1.0)


# ---------------------------------------------------------------- singular directions


def as_matrix(weight: Tensor, reading: Reading = "kfac") -> Tensor:
    """Return a weight as a matrix.

    Args:
        weight: ``[d_out, *]``, two dimensions or more.
        reading: ``"kfac"`` is ``[c_out, c_in k_h k_w]``; ``"spatial"`` is
            ``[k_h k_w, c_in c_out]``, in which Haink (2023, 7.3) reads a convolution's
            kernel. The same for linear layers.
    """
    if weight.dim() < 2:
        raise ValueError(
            f"A weight matrix has two dimensions or more, got {list(weight.shape)}."
        )
    if weight.dim() == 2 or reading == "kfac":
        return weight.flatten(1)
    return weight.flatten(2).permute(2, 1, 0).flatten(1)


def singular_directions(
    weight: Tensor, reading: Reading = "kfac"
) -> tuple[Tensor, Tensor]:
    """Return singular values and the directions ``vec(u_i v_i^T)`` (Haink, eq. 6.1).

    The directions are orthonormal, and with the singular values as coefficients they
    sum to the weight.

    Args:
        weight: ``[d_out, *]``.
        reading: As for :func:`as_matrix`.

    Returns:
        ``[r]``, descending, and columns ``[weight.numel(), r]`` in the weight's own
        flat order.
    """
    values, products = singular_products(as_matrix(weight, reading))
    if weight.dim() > 2 and reading == "spatial":
        c_out, c_in = weight.shape[:2]
        products = products.reshape(len(values), -1, c_in, c_out).permute(0, 3, 2, 1)
    return values, products.reshape(len(values), -1).mT


# --------------------------------------------------------------- shares of the layers


@dataclass(frozen=True)
class LayerShares:
    """Where in the network directions live (Haink 2023, eq. 7.8).

    Attributes:
        names: Layers, in order.
        value: Share of each direction's squared norm in each layer, ``[k, layers]``.
        null: The layers' shares of the parameters, ``[layers]``.
    """

    names: tuple[str, ...]
    value: Tensor
    null: Tensor

    def plot(self) -> Figure:
        """Return stacked shares by index; the null shares as lines."""
        figure, axis = _axis("share of squared norm")
        index = range(1, len(self.value) + 1)
        axis.stackplot(index, *self.value.mT.tolist(), labels=self.names)
        for level in self.null.cumsum(0)[:-1].tolist():
            axis.axhline(level, color="black", ls="--", lw=0.8)
        axis.set(ylim=(0, 1))
        axis.legend(fontsize=8)
        return figure


def layer_shares(
    directions: Directions, groups: Mapping[str, list[str]] | None = None
) -> LayerShares:
    """Return the share of every direction in every layer; they sum to one.

    Args:
        directions: Of the whole network.
        groups: Layer -> names of its parameters. Default: a layer is what precedes
            the last dot of a parameter's name.
    """
    space = directions.space
    if groups is None:
        found: dict[str, list[str]] = {}
        for name in space.names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        groups = found
    energy = {
        name: rows.flatten(1).square().sum(dim=1)
        for name, rows in space.split(directions.vectors.mT).items()
    }
    shares = [
        torch.stack([energy[n] for n in names]).sum(0) for names in groups.values()
    ]
    sizes = [sum(space.shapes[n].numel() for n in names) for names in groups.values()]
    return LayerShares(
        tuple(groups), torch.stack(shares, dim=1), torch.tensor(sizes) / space.size
    )


# ---------------------------------------------------------------------- concentration


@dataclass(frozen=True)
class Concentration:
    """How few entries carry each vector.

    Attributes:
        participation: Inverse participation ratio ``sum v^4 / (sum v^2)^2``, ``[k]``:
            ``1/P`` spread evenly, about ``3/P`` for a random vector, one for a single
            entry.
        kurtosis: Excess kurtosis of the entries (Ge 2025, eq. 4.25), about zero for a
            random vector.
        entropy: Shannon entropy of ``|v_i| / sum |v|`` (ibid., 4.26).
        size: ``P``.
    """

    participation: Tensor
    kurtosis: Tensor
    entropy: Tensor
    size: int

    @property
    def support(self) -> Tensor:
        """Effective number of entries, ``exp(entropy)``; about 0.753 P at random."""
        return self.entropy.exp()

    def plot(self) -> Figure:
        """Return the inverse participation ratios, with the random level."""
        figure, axis = _axis("inverse participation ratio")
        index = range(1, len(self.participation) + 1)
        axis.plot(index, self.participation.tolist(), ".", ms=3)
        axis.axhline(3 / self.size, color="0.5", ls="--", label="random vector")
        axis.set(yscale="log")
        axis.legend()
        return figure


def concentration(vectors: Tensor) -> Concentration:
    """Return the concentration of columns ``[P, k]``; their norms do not matter.

    Kurtosis and entropy of Kronecker eigenvectors come from their factors: see
    :func:`kronecker_concentration`.
    """
    squares = vectors.square()
    second = squares.mean(dim=0)
    centred = vectors - vectors.mean(dim=0)
    variance = centred.square().mean(dim=0)
    weights = vectors.abs() / vectors.abs().sum(dim=0)
    return Concentration(
        squares.square().sum(dim=0) / (second * len(vectors)).square(),
        centred.pow(4).mean(dim=0) / variance.square() - 3,
        -torch.special.xlogy(weights, weights).sum(dim=0),
        len(vectors),
    )


def kronecker_concentration(
    output: Tensor, inputs: Tensor, size: int | None = None
) -> Concentration:
    """Return the concentration of ``output_i (x) inputs_i``, column by column.

    Entropies add, participation ratios multiply, raw moments multiply: nothing of the
    length of the product is formed.

    Args:
        output: Columns ``[d_out, k]`` of ``Q_G``.
        inputs: Columns ``[d_in, k]`` of ``Q_A``.
        size: Dimension to which the products are padded with zeros. Default:
            ``d_out d_in``.

    Raises:
        ValueError: If ``size`` is below ``d_out d_in``.
    """
    first, second = concentration(output), concentration(inputs)
    count = len(output) * len(inputs)
    size = count if size is None else size
    if size < count:
        raise ValueError(f"size must be at least {count}, got {size}.")
    # Raw moments of the padded vector, orders one to four.
    m1, m2, m3, m4 = (
        count / size * output.pow(i).mean(dim=0) * inputs.pow(i).mean(dim=0)
        for i in (1, 2, 3, 4)
    )
    variance = m2 - m1**2
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return Concentration(
        first.participation * second.participation,
        fourth / variance**2 - 3,
        first.entropy + second.entropy,
        size,
    )


def eigenfunctions(pairs: Eigenpairs, J: Jacobian) -> Tensor:
    """Return ``u_i(x) = <v_i, grad f_k(x)> / sqrt(lambda_i)``, ``[N, C, k]``.

    Ge 2025, equation 4.24; George 2023, lemma 6.2.1. On the examples that the Fisher
    matrix of regression was taken on, ``(1/N) sum_nk u_i u_j`` is the identity.

    Args:
        pairs: Eigenpairs of a Fisher matrix.
        J: The Jacobian at the examples ``x``.
    """
    columns = J @ pairs.vectors
    assert isinstance(columns, Tensor)
    n, c = J.codomain.shapes["outputs"]
    return (columns / pairs.values.sqrt()).reshape(n, c, -1)


def _axis(label: str) -> tuple[Figure, Any]:
    figure: Figure
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.set(xlabel="index", ylabel=label)
    axis.grid(alpha=0.3)
    return figure, axis
