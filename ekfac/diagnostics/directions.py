"""The directions of largest curvature: of a network, of its layers, of its weights.

Eigenpairs of the Hessian (Haink 2023, chapter 7), what share of the weights lies in
them, how they compare between layer and network and with the singular directions of
the weight matrices. From factors the same functions take ``matrix.top_eigenpairs(k)``
of a ``"kfac"`` or ``"ekfac"`` matrix: such directions live in one layer each and say
nothing of the blocks between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import pyplot
from ekfac.diagnostics.products import HessianProducts
from ekfac.errors import StateMismatchError
from ekfac.estimate.data import choose
from ekfac.estimate.layers import owner_of
from ekfac.estimate.sources import Loss
from ekfac.layers import clean, unwrap
from ekfac.matrices import CurvatureMatrix
from ekfac.spectral import Eigenpairs, SymmetricOperator, lobpcg
from ekfac.spectral.lanczos import LanczosProcess, check_count, default_tolerance
from ekfac.spectral.operators import gaussian_columns
from ekfac.vectors import Vector, VectorSpace, standard_normal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["lanczos", "lobpcg"]
Order = Literal["value", "magnitude"]


@dataclass(frozen=True)
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
        """Return eigenpairs that a matrix or a solver gave."""
        return cls(
            pairs.values,
            pairs.vectors,
            pairs.residuals,
            pairs.converged,
            pairs.num_products,
            space,
        )

    @classmethod
    def of_matrix(
        cls, matrix: CurvatureMatrix, *, order: Order = "value"
    ) -> Directions:
        """Return all eigenpairs of a matrix, formed densely.

        Args:
            matrix: Any structure, small enough for ``[P, P]``.
            order: Descending by ``"value"`` or by ``"magnitude"`` (Haink 2023, 7.4).
        """
        dense = matrix.to_dense()
        values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
        key = values if order == "value" else values.abs()
        best = key.argsort(descending=True)
        return cls.of(Eigenpairs.exact(values[best], vectors[:, best]), matrix.space)

    def __len__(self) -> int:
        return len(self.value)

    def top(self, k: int) -> Directions:
        """Return the first ``k``."""
        return Directions(
            self.value[:k],
            self.vectors[:, :k],
            self.residual[:k],
            self.converged,
            self.num_products,
            self.space,
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
        rows = space.join(
            {
                name: parts.get(name, self.vectors.new_zeros(len(self), *shape))
                for name, shape in space.shapes.items()
            }
        )
        return Directions(
            self.value,
            rows.mT,
            self.residual,
            self.converged,
            self.num_products,
            space,
        )

    def plot(self) -> Figure:
        """Return a figure of the eigenvalues and their residuals."""
        figure: Figure
        plt = pyplot()
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        index = range(1, len(self) + 1)
        axis.plot(index, self.value.abs().tolist(), "o-", ms=4, label="|eigenvalue|")
        if bool((self.residual > 0).any()):
            axis.plot(index, self.residual.tolist(), "x", color="0.5", label="residual")
        axis.set(xlabel="index", yscale="log", title="directions of largest curvature")
        axis.legend()
        axis.grid(alpha=0.3)
        return figure


def top_directions(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    k: int = 5,
    *,
    method: Method = "lanczos",
    parameters: Iterable[str] | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tolerance: float | None = None,
    max_products: int | None = None,
    loss_reduction: str | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Directions:
    """Return the Hessian's ``k`` largest eigenpairs.

    Args:
        model: Any module.
        data: Iterable of ``(x, y)`` batches; the graphs of all of them are kept.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        k: How many pairs.
        method: ``"lanczos"`` takes the fewest products, keeps ``[P, products]`` and
            starts from :meth:`HessianProducts.start`; ``"lobpcg"`` keeps ``8 P (k+2)``
            numbers and finds multiplicities.
        parameters: Names of parameters or layers, for the diagonal block of these.
        preconditioner: For ``"lobpcg"``: maps residuals ``[P, m]`` to directions, for
            example ``lambda r: F.solve(r, damping)`` of an EKFAC matrix ``F``.
        tolerance: Largest residual relative to the largest eigenvalue. Default: the
            square root of the precision. ``"lanczos"`` stops by the residuals of its
            recurrence and counts as converged if those that one product more measures
            are at most three times as large.
        max_products: The most products. Default: ``20 k + 100``.
        loss_reduction: As for :func:`ekfac.hessian`.
        generator: Source of the starting vectors.
        progress: Whether to show the products of ``"lanczos"`` in a bar, if tqdm is
            installed.

    Raises:
        ValueError: If ``k`` or ``method`` is out of range, or a preconditioner is given
            to Lanczos.
    """
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
    if method == "lanczos":
        check_count(H, k)
        start = H.start(generator)
        with _bar(progress, limit) as advance:
            pairs = _lanczos(H, k, start, tolerance, limit, generator, advance)
    else:
        pairs = lobpcg(
            H,
            k,
            preconditioner=preconditioner,
            tolerance=tolerance,
            max_iterations=max(1, limit // (k + 2)),
            generator=generator,
        )
    return Directions.of(pairs, H.space)


def _lanczos(
    operator: SymmetricOperator,
    k: int,
    start: Tensor,
    tolerance: float | None,
    max_products: int,
    generator: torch.Generator | None,
    advance: Callable[[], object],
) -> Eigenpairs:
    """Return the ``k`` largest pairs of a Lanczos process from ``start``.

    The residuals are those of the process, ``beta_m |y_m|``. In exact arithmetic they
    are the true ones; rounding over millions of parameters adds to them. One product
    with a combination of the vectors, signs at random, tells by how much: its expected
    square is the sum of the squared residuals.
    """
    threshold = default_tolerance(operator, tolerance)
    process = LanczosProcess(operator, start, max(k, max_products))
    while True:
        process.step()
        advance()
        values, vectors = process.ritz()
        residuals = process.betas[-1] * vectors[-1].abs()
        bound = threshold * float(values.abs().max())
        enough = process.steps >= k and bool((residuals[-k:] <= bound).all())
        if process.finished or enough:
            break
        if process.broke_down:
            process.restart(gaussian_columns(operator, 1, generator).squeeze(1))
    basis = process.basis[:, : process.steps]
    chosen = [-1 - i for i in range(k)]
    values, found = values[chosen], basis @ vectors[:, chosen]
    signs = standard_normal(
        (k, 1), generator=generator, dtype=operator.dtype, device=operator.device
    ).sign()
    error = operator @ (found @ signs) - found @ (values[:, None] * signs)
    excess = float(error.norm()) ** 2 - float(residuals[chosen].norm()) ** 2
    residuals = (residuals[chosen] ** 2 + max(excess, 0.0) / k).sqrt()
    # Two numbers that agree in expectation; a wrong one is off by far more.
    converged = enough and bool((residuals <= 3 * bound).all())
    return Eigenpairs(values, found, residuals, converged, process.steps + 1)


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[], object]]:
    """Yield what to call after every product."""
    if wanted:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            wanted = False
    if not wanted:
        yield lambda: None
        return
    with tqdm(total=total, desc="Hessian products", leave=False) as bar:
        yield bar.update


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
        data: Iterable of ``(x, y)`` batches, gone through once per layer.
        loss_fn: ``(outputs, y) -> loss`` of a batch.
        k: How many pairs, at most the layer's number of parameters.
        layers: Names of layers. Default: all with trained parameters of their own.
        **options: As for :func:`top_directions`.
    """
    data = data if isinstance(data, (list, tuple)) else list(data)
    found = {}
    for layer, names in layer_groups(choose(model, layers), model).items():
        size = sum(p.numel() for p in choose(model, names).values())
        found[layer] = top_directions(
            model, data, loss_fn, min(k, size), parameters=names, **options
        )
    return found


def layer_groups(
    parameters: Mapping[str, Any], model: nn.Module
) -> dict[str, list[str]]:
    """Return the names of the parameters by the layer that they belong to."""
    modules = {clean(name) for name, _ in unwrap(model).named_modules()}
    groups: dict[str, list[str]] = {}
    for name in parameters:
        groups.setdefault(owner_of(name, modules), []).append(name)
    return groups
