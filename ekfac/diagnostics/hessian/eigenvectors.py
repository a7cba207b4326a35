"""Eigenvectors of largest curvature: their computation, overlaps and concentration.

Eigenpairs of the Hessian (Haink 2023, chapter 7), of a network or of its layers; the
share of the weights in them, the layers they lie in and how few entries carry them
(ibid., sections 6.1 and 7.2 to 7.6; Ge 2025, section 4.3.4). Eigenpairs of Kronecker
factors, ``Directions.of(F.top_eigenpairs(k), F.space)`` of a ``"kfac"`` or ``"ekfac"``
matrix, lie in one layer each and say nothing of the blocks between layers. Vectors are
orthonormal columns ``[P, k]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.diagnostics.hessian.landscape import HessianProducts
from ekfac.diagnostics.spectra import null_space
from ekfac.errors import StateMismatchError
from ekfac.estimate.data import choose
from ekfac.estimate.layout import owner_of
from ekfac.estimate.losses import Loss
from ekfac.matrices import CurvatureMatrix
from ekfac.spectral import Eigenpairs, SymmetricOperator, lobpcg
from ekfac.spectral.eigensolvers import (
    LanczosProcess,
    check_count,
    default_tolerance,
    singular_products,
)
from ekfac.spectral.operators import gaussian_columns, result, watched
from ekfac.vectors import (
    ParameterVector,
    Vector,
    VectorSpace,
    named_modules,
    standard_normal,
)

Method = Literal["lanczos", "lobpcg"]
Order = Literal["value", "magnitude"]
End = Literal["largest", "smallest", "magnitude", "both"]


@result
class Directions:
    """Eigenvalues and eigenvectors with the parameters that they belong to.

    Attributes:
        value: Eigenvalues ``[k]``, descending, or by magnitude.
        vectors: ``[P, k]``, orthonormal columns.
        residual: ``[k]``, the norms ``|H v - value v|``.
        converged: Whether every residual is within the tolerance asked for.
        num_products: Products with the Hessian that were spent.
        space: Names and shapes of the parameters.
    """

    value: Tensor
    vectors: Tensor
    residual: Tensor
    converged: bool
    num_products: int
    space: VectorSpace

    @classmethod
    def of(cls, pairs: Eigenpairs, space: VectorSpace) -> Directions:
        """Return the eigenpairs of a matrix or a solver, over ``space``."""
        spectrum = pairs.values, pairs.vectors, pairs.residuals
        return cls(*spectrum, pairs.converged, pairs.num_products, space)

    @classmethod
    def of_matrix(
        cls,
        matrix: CurvatureMatrix,
        *,
        order: Order = "value",
        cut: float | None = None,
    ) -> Directions:
        """Return the eigenpairs of a matrix outside its null space, formed densely.

        Args:
            matrix: Any structure, small enough for ``[P, P]``.
            order: Descending by ``"value"`` or by ``"magnitude"`` (Haink 2023, 7.4).
            cut: As for :func:`ekfac.diagnostics.spectra.null_space`; 0 keeps all.

        Raises:
            ValueError: For another ``order``.
        """
        if order not in get_args(Order):
            raise ValueError(f"order must be one of {get_args(Order)}, got {order!r}.")
        dense = matrix.to_dense()
        values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
        key = values if order == "value" else values.abs()
        best = key.argsort(descending=True)
        pairs = Eigenpairs.exact(values[best], vectors[:, best])
        return cls.of(pairs, matrix.space).without_null_space(cut)

    def __len__(self) -> int:
        return len(self.value)

    def top(self, k: int) -> Directions:
        """Return the first ``k``."""
        return self._selected(slice(k))

    def without_null_space(self, cut: float | None = None) -> Directions:
        """Return the directions whose eigenvalues are not zero up to rounding.

        Args:
            cut: As for :func:`ekfac.diagnostics.spectra.null_space`.
        """
        return self._selected(~null_space(self.value, cut))

    def _selected(self, index: slice | Tensor) -> Directions:
        return replace(
            self,
            value=self.value[index],
            vectors=self.vectors[:, index],
            residual=self.residual[index],
        )

    def vector(self, index: int) -> Vector:
        """Return one eigenvector as a mapping from parameter names to tensors."""
        return self.space.vector(self.vectors[:, index])

    def in_space(self, space: VectorSpace) -> Directions:
        """Return the same directions in a larger space, zero in its other parameters.

        Raises:
            StateMismatchError: If ``space`` lacks one of the parameters.
        """
        missing = [n for n, s in self.space.shapes.items() if space.shapes.get(n) != s]
        if missing:
            raise StateMismatchError(
                f"The larger space lacks {missing} or has other shapes for them; pass "
                "the space of the whole network."
            )
        parts = self.space.split(self.vectors.mT)
        for name, shape in space.shapes.items():
            parts.setdefault(name, self.vectors.new_zeros(len(self), *shape))
        return replace(self, vectors=space.join(parts).mT, space=space)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues, and residuals above rounding; return the axes."""
        ax = axes_or_new(ax)
        index = range(1, len(self) + 1)
        magnitudes = self.value.abs()
        ax.plot(index, magnitudes.tolist(), "o-", ms=4, label="|eigenvalue|")
        if bool((self.residual > 0).any()):
            rounding = torch.finfo(magnitudes.dtype).eps * magnitudes.max()
            residual = self.residual.maximum(rounding)
            ax.plot(index, residual.tolist(), "x", color="0.5", label="residual")
        ax.set(xlabel="index", yscale="log", title="directions of largest curvature")
        ax.legend()
        ax.grid(alpha=0.3)
        return ax


def top_directions(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    k: int = 5,
    *,
    method: Method = "lanczos",
    order: End = "largest",
    parameters: Iterable[str] | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    loss_reduction: str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Directions:
    """Return ``k`` of the Hessian's eigenpairs, the largest unless told otherwise.

    Args:
        model: Any module.
        data: Iterable of ``(x, y)`` batches; the graphs of all of them are kept.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        k: How many pairs.
        method: ``"lanczos"`` takes the fewest products, keeps ``[P, products]`` and
            starts from :meth:`HessianProducts.start`; ``"lobpcg"`` keeps ``8 P (k+2)``
            numbers and finds multiplicities.
        order: Which pairs, and in which order: the ``"largest"``, descending; the
            ``"smallest"``, ascending, so the most negative first; those of largest
            ``"magnitude"``, descending by it; or half of ``k`` from ``"both"`` ends
            (one more of the largest if ``k`` is odd), descending.
        parameters: Names of parameters or layers, for the diagonal block of these.
        preconditioner: For ``"lobpcg"``: maps residuals ``[P, m]`` to directions, for
            example ``lambda r: F.solve(r, damping)`` of an EKFAC matrix ``F``.
        tolerance: Largest residual relative to the largest eigenvalue. Default: the
            square root of the precision. ``"lanczos"`` stops by the residuals of its
            recurrence; it counts as converged if a further product measures residuals
            at most three times as large.
        max_products: The most products. Default: ``20 k + 100``. ``"lobpcg"`` makes at
            most ``max_products // (k + 2)`` iterations at each end that it searches.
        loss_reduction: As for :func:`ekfac.hessian`.
        generator: Source of the starting vectors.
        progress: Whether to show a bar over the products, if tqdm is installed.

    Raises:
        ValueError: If ``k``, ``method`` or ``order`` is out of range, or a
            preconditioner is given to Lanczos.
    """
    if order not in get_args(End):
        raise ValueError(f"order must be one of {get_args(End)}, got {order!r}.")
    if method not in ("lanczos", "lobpcg"):
        raise ValueError(f"method must be 'lanczos' or 'lobpcg', got {method!r}.")
    if preconditioner is not None and method == "lanczos":
        raise ValueError(
            "method='lanczos' takes no preconditioner; pass method='lobpcg' with it."
        )
    H = HessianProducts(
        model, data, loss_fn, parameters=parameters, loss_reduction=loss_reduction
    )
    limit = 20 * k + 100 if max_products is None else max_products
    with watched(H, limit, "Hessian products", progress=progress) as operator:
        if method == "lanczos":
            check_count(H, k)
            start = H.start(generator)
            pairs = _lanczos(operator, k, order, start, tolerance, limit, generator)
        else:
            options: dict[str, Any] = {
                "preconditioner": preconditioner,
                "tolerance": tolerance,
                "max_iterations": max(1, limit // (k + 2)),
            }
            solve = partial(lobpcg, operator, generator=generator, **options)
            pairs = _of_ends(solve, k, order, operator.shape[0])
    return Directions.of(pairs, H.space)


def _chosen(values: Tensor, k: int, order: End) -> Tensor:
    """Return the indices, in ascending values, of the ``k`` that an order asks for."""
    index = torch.arange(len(values), device=values.device)
    if order == "magnitude":
        return values.abs().argsort(descending=True, stable=True)[:k]
    if order == "smallest":
        return index[:k]
    if order == "both":
        return torch.cat([index[: k // 2], index[-((k + 1) // 2) :]]).flip(0)
    return index.flip(0)[:k]


def _of_ends(
    solve: Callable[..., Eigenpairs], k: int, order: End, size: int
) -> Eigenpairs:
    """Return the pairs of a solver that knows one end of the spectrum at a time."""
    if order in ("largest", "smallest"):
        return solve(k, which=order)
    counts = (k, k) if order == "magnitude" else (k // 2, (k + 1) // 2)
    if sum(counts) > size:
        raise ValueError(
            f"method='lobpcg' looks for {counts[0]} and {counts[1]} pairs at the ends "
            f"of {size}; use method='lanczos' for so many."
        )
    ends = [
        solve(count, which=which)
        for count, which in zip(counts, ("smallest", "largest"), strict=True)
        if count
    ]
    values = torch.cat([end.values for end in ends])
    ascending = values.argsort()
    best = ascending[_chosen(values[ascending], k, order)]
    return Eigenpairs(
        values[best],
        torch.cat([end.vectors for end in ends], dim=1)[:, best],
        torch.cat([end.residuals for end in ends])[best],
        all(end.converged for end in ends),
        sum(end.num_products for end in ends),
    )


def _lanczos(
    operator: SymmetricOperator,
    k: int,
    order: End,
    start: Tensor,
    tolerance: float | None,
    max_products: int,
    generator: torch.Generator | None,
) -> Eigenpairs:
    """Return ``k`` pairs of a Lanczos process from ``start``.

    The residuals are those of the process, ``beta_m |y_m|``. In exact arithmetic they
    are the true ones; rounding over millions of parameters adds to them. One product
    with a combination of the vectors, with random signs, tells by how much: the
    expected square of its error is the sum of the squared residuals.
    """
    threshold = default_tolerance(operator, tolerance)
    process = LanczosProcess(operator, start, max(k, max_products))
    while True:
        process.step()
        values, vectors = process.ritz()
        residuals = process.betas[-1] * vectors[-1].abs()
        bound = threshold * float(values.abs().max())
        indices = _chosen(values, k, order)
        enough = process.steps >= k and bool((residuals[indices] <= bound).all())
        if process.finished or enough:
            break
        if process.broke_down:
            process.restart(gaussian_columns(operator, 1, generator).squeeze(1))
    basis = process.basis[:, : process.steps]
    values, ritz_vectors = values[indices], basis @ vectors[:, indices]
    signs = standard_normal(
        (k, 1), generator=generator, dtype=operator.dtype, device=operator.device
    ).sign()
    error = operator @ (ritz_vectors @ signs) - ritz_vectors @ (values[:, None] * signs)
    excess = float(error.norm()) ** 2 - float(residuals[indices].norm()) ** 2
    residuals = (residuals[indices] ** 2 + max(excess, 0.0) / k).sqrt()
    # The two bounds agree in expectation only; a wrong pair is off by far more.
    converged = enough and bool((residuals <= 3 * bound).all())
    return Eigenpairs(values, ritz_vectors, residuals, converged, process.steps + 1)


def layer_directions(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    k: int = 5,
    *,
    layers: Iterable[str] | None = None,
    **options: Any,
) -> dict[str, Directions]:
    """Return the ``k`` largest eigenpairs of every layer's block of the Hessian.

    In a network of ReLUs with cross-entropy these blocks are the Fisher's (the network
    is piecewise linear in one layer's parameters), which K-FAC approximates.

    Args:
        model: Any module.
        data: Iterable of ``(x, y)`` batches, read once for each layer.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        k: How many pairs, at most the layer's number of parameters.
        layers: Names of layers. Default: all with trained parameters of their own.
        **options: As for :func:`top_directions`.
    """
    data = data if isinstance(data, (list, tuple)) else list(data)
    directions = {}
    for layer, names in layer_groups(choose(model, layers), model).items():
        size = sum(p.numel() for p in choose(model, names).values())
        directions[layer] = top_directions(
            model, data, loss_fn, min(k, size), parameters=names, **options
        )
    return directions


def layer_groups(
    parameters: Mapping[str, Any], model: nn.Module
) -> dict[str, list[str]]:
    """Return the names of the parameters by the layer that they belong to."""
    modules = named_modules(model)
    groups: dict[str, list[str]] = {}
    for name in parameters:
        groups.setdefault(owner_of(name, modules), []).append(name)
    return groups


Reading = Literal["kfac", "spatial"]


@result
class WeightProduct:
    """Coefficients of the weights in the directions (Haink 2023, eq. 7.2).

    Attributes:
        value: ``c_i = (v_i . w) / |w|``, ``[k]``.
        outside: The share of ``|w|^2`` outside these directions, with that in the null
            space: one less the sum of the squares.
        null: Root mean square of ``c_i`` for directions independent of the weights,
            ``P^-1/2`` (ibid., eq. 7.9).
    """

    value: Tensor
    outside: float
    null: float

    def relative_energy(self) -> Tensor:
        """Return ``P c_i^2``, ``[k]``: one on average for independent directions."""
        return (self.value / self.null).square()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw ``|c_i|`` by index, with the null level; return the axes."""
        ax = _indexed(ax, "|v . w| / |w|")
        ax.plot(range(1, len(self.value) + 1), self.value.abs().tolist(), lw=0.8)
        ax.axhline(self.null, color="0.5", ls="--", label="independent")
        ax.set(xscale="log")
        ax.legend()
        return ax


def weight_product(
    directions: Directions, weights: Mapping[str, Tensor]
) -> WeightProduct:
    """Return the weights' coefficient in every direction outside the null space.

    Args:
        directions: Of a layer or of the network.
        weights: The parameters, those of the directions among them; trained, or at
            initialisation.
    """
    w = directions.space.flat(ParameterVector.of(weights, directions.space.names))
    w = w.to(directions.vectors)
    shares = columns(directions).mT @ w / w.norm()
    outside = 1 - float(shares.square().sum())
    return WeightProduct(shares, outside, len(w) ** -0.5)


def columns(vectors: Tensor | Directions) -> Tensor:
    """Return vectors as columns ``[P, k]``, directions without their null space."""
    if isinstance(vectors, Directions):
        return vectors.without_null_space().vectors
    return vectors


@result
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

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the matrix as an image; return the axes."""
        ax = _indexed(ax, "second set")
        image = ax.imshow(self.value.tolist(), aspect="auto", cmap="viridis")
        ax.figure.colorbar(image, ax=ax, label="|overlap|")
        ax.set(xlabel="second set", ylabel="first set")
        ax.grid(False)
        return ax


def overlap(first: Tensor | Directions, second: Tensor | Directions) -> Overlap:
    """Return the overlaps of columns ``[P, k_a]`` and ``[P, k_b]``, all of unit norm.

    Directions are taken without their null space.

    Raises:
        StateMismatchError: If the spaces differ.
    """
    first, second = columns(first), columns(second)
    if first.shape[0] != second.shape[0]:
        raise StateMismatchError(
            f"The first vectors have {first.shape[0]} entries and the second "
            f"{second.shape[0]}; pad a layer's with Directions.in_space(space)."
        )
    return Overlap((first.mT @ second.to(first)).abs(), first.shape[0])


# ---------------------------------------------------------------- singular directions


def as_matrix(weight: Tensor, reading: Reading = "kfac") -> Tensor:
    """Return a weight as a matrix.

    Args:
        weight: ``[d_out, *]``, two dimensions or more.
        reading: ``"kfac"`` is ``[c_out, c_in k_h k_w]``; ``"spatial"`` is
            ``[k_h k_w, c_in c_out]``, in which Haink (2023, 7.3) reads a convolution's
            kernel. The same for linear layers.

    Raises:
        ValueError: For a vector, or another ``reading``.
    """
    if reading not in get_args(Reading):
        raise ValueError(
            f"reading must be one of {get_args(Reading)}, got {reading!r}."
        )
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
    """Return singular values and the directions ``vec(u_i v_i^T)``.

    The directions are orthonormal, and with the singular values as coefficients they
    sum to the weight (Haink 2023, eq. 6.1).

    Args:
        weight: ``[d_out, *]``.
        reading: As for :func:`as_matrix`, which raises.

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


@result
class LayerShares:
    """Shares of the layers in each direction (Haink 2023, eq. 7.8).

    Attributes:
        names: Layers, in order.
        value: Share of each direction's squared norm in each layer, ``[k, layers]``.
        null: The layers' shares of the parameters, ``[layers]``.
    """

    names: tuple[str, ...]
    value: Tensor
    null: Tensor

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw stacked shares by index; the null shares as lines; return the axes."""
        ax = _indexed(ax, "share of squared norm")
        index = range(1, len(self.value) + 1)
        ax.stackplot(index, *self.value.mT.tolist(), labels=self.names)
        for i, level in enumerate(self.null.cumsum(0)[:-1].tolist()):
            label = None if i else "shares of the parameters"
            ax.axhline(level, color="black", ls="--", lw=0.8, label=label)
        ax.set(ylim=(0, 1))
        ax.legend(fontsize=8)
        return ax


def layer_shares(
    directions: Directions, groups: Mapping[str, list[str]] | None = None
) -> LayerShares:
    """Return the share of every direction in every layer; they sum to one.

    Directions of the null space are left out.

    Args:
        directions: Of the whole network.
        groups: Layer -> names of its parameters. Default: a layer is what precedes
            the last dot of a parameter's name.
    """
    directions = directions.without_null_space()
    space = directions.space
    if groups is None:
        by_layer: dict[str, list[str]] = {}
        for name in space.names:
            by_layer.setdefault(name.rpartition(".")[0], []).append(name)
        groups = by_layer
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


@result
class Concentration:
    """Concentration of each vector on few entries.

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

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the inverse participation ratios by index; return the axes."""
        ax = _indexed(ax, "inverse participation ratio")
        index = range(1, len(self.participation) + 1)
        ax.plot(index, self.participation.tolist(), "o", ms=3)
        ax.axhline(3 / self.size, color="0.5", ls="--", label="random vector")
        ax.set(yscale="log")
        ax.legend()
        return ax


def concentration(vectors: Tensor | Directions) -> Concentration:
    """Return the concentration of columns ``[P, k]``; their norms do not matter.

    Directions are taken without their null space, where the basis is the eigensolver's
    choice and the concentration depends on it. Leave it out of bare columns yourself.
    """
    vectors = columns(vectors)
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


def _indexed(ax: Axes | None, label: str) -> Axes:
    """Return axes over an index."""
    ax = axes_or_new(ax)
    ax.set(xlabel="index", ylabel=label)
    ax.grid(alpha=0.3)
    return ax
