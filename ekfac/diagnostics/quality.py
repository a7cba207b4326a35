"""Quality of approximations: matrices, eigenbases, truncated bases and steps.

Each function compares what is kept with what it stands for: an approximate matrix with
the exact one, a layer's eigenbasis with its block, a truncated basis with the full one,
and the optimizer's quadratic model with the step that it took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ekfac.curvature import LayerCurvature
from ekfac.curvature.truncated import collapsed, combine_, coordinates, refined
from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.errors import NotReadyError, StateMismatchError
from ekfac.matrices import CurvatureMatrix
from ekfac.matrices.eigen import DampingMode, absolute_damping
from ekfac.spectral.operators import result, student_quantile
from ekfac.vectors import ParameterVector, named_parameters, standard_normal


@result
class Interval:
    """The mean of a quantity over random vectors, with its confidence interval.

    Attributes:
        mean: The mean.
        standard_error: Its estimated standard deviation.
        low: Lower end of the 95 % confidence interval.
        high: Upper end.
    """

    mean: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Tensor) -> Interval:
        """Return Student's interval of independent values ``[m]``, ``m >= 2``."""
        count = len(values)
        mean = float(values.mean())
        error = float(values.std()) / count**0.5
        reach = student_quantile(count - 1) * error
        return cls(mean, error, mean - reach, mean + reach)

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


@result
class ApproximationQuality:
    """Errors of an approximation ``F_hat`` of ``F`` (George 2023, section 3.4.1).

    The random vectors ``v`` are uniform on the unit sphere. All errors are relative, 0
    for a perfect approximation; cosines are 1.

    Attributes:
        structure: The structure of ``F_hat``.
        trace_error: ``|tr F_hat - tr F| / |tr F|``.
        quadratic_error: ``|v^T F_hat v - v^T F v| / |v^T F v|``.
        product_residual: ``|F_hat v - F v| / |F v|``.
        product_cosine: Between ``F_hat v`` and ``F v``.
        solve_residual: By damping ``d``, ``|v' - v|``, where
            ``v' = (F_hat + d I)^-1 (F + d I) v`` should be ``v``.
        solve_cosine: By damping, between ``v'`` and ``v``.
        num_vectors: Number of random vectors.
    """

    structure: str
    trace_error: float
    quadratic_error: Interval
    product_residual: Interval
    product_cosine: Interval
    solve_residual: dict[float, Interval]
    solve_cosine: dict[float, Interval]
    num_vectors: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the mean errors with their 95 % intervals; return the axes."""
        ax = axes_or_new(ax)
        error = self.trace_error
        rows = {
            "trace": Interval(error, 0.0, error, error),
            "quadratic form": self.quadratic_error,
            "product": self.product_residual,
            **{f"solve, d={d:.2g}": value for d, value in self.solve_residual.items()},
        }
        for i, value in enumerate(rows.values()):
            ends = [[value.mean - value.low], [value.high - value.mean]]
            ax.errorbar([value.mean], [i], xerr=ends, fmt="o", capsize=3, color="C0")
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(xlabel="relative error", title=self.structure, xlim=(0, None))
        ax.invert_yaxis()
        ax.grid(alpha=0.3)
        return ax

    def __str__(self) -> str:
        lines = [
            f"{self.structure}, {self.num_vectors} random vectors (95 % intervals)",
            f"  trace            relative error {self.trace_error:.3g}",
            f"  quadratic form   relative error {self.quadratic_error}",
            f"  product          residual {self.product_residual}, "
            f"cosine {self.product_cosine}",
        ]
        lines += [
            f"  solve, d={damping:<8.2g} residual {self.solve_residual[damping]}, "
            f"cosine {self.solve_cosine[damping]}"
            for damping in self.solve_residual
        ]
        return "\n".join(lines)


def approximation_quality(
    F_hat: CurvatureMatrix,
    F: CurvatureMatrix,
    *,
    damping: float | Sequence[float] = (1e-4, 1e-2, 1.0),
    num_vectors: int = 20,
    trace: float | None = None,
    generator: torch.Generator | None = None,
) -> ApproximationQuality:
    """Return the errors of ``F_hat`` in place of ``F``, with confidence intervals.

    The solve needs only a product with ``F``: ``(F_hat + d I)^-1 (F + d I) v`` is ``v``
    for a perfect approximation. So ``F`` may be implicit: it is multiplied once with
    each vector and asked for its trace.

    Args:
        F_hat: The approximation, of a structure that has ``solve``.
        F: The matrix itself.
        damping: One or several values of ``d``, each positive.
        num_vectors: Number of random vectors, at least 2.
        trace: The trace of ``F``, if it is known. An implicit matrix estimates it.
        generator: Source of the vectors. The same seed gives the same ones, whatever
            the matrices: comparisons of several ``F_hat`` are then paired.

    Raises:
        StateMismatchError: If the matrices are of different spaces.
        ValueError: If a damping or ``num_vectors`` is too small, or ``F`` is zero.

    Example:
        >>> from ekfac.matrices import DiagonalMatrix
        >>> from ekfac.vectors import ParameterVector
        >>> F = DiagonalMatrix(ParameterVector({"w": torch.tensor([1.0, 3.0])}))
        >>> approximation_quality(2 * F, F, damping=1.0).quadratic_error.mean
        1.0
    """
    if F_hat.space != F.space:
        raise StateMismatchError(
            f"F_hat is over {F_hat.space} and F over {F.space}; make both of the same "
            "parameters of the same model."
        )
    dampings = [damping] if isinstance(damping, (int, float)) else list(damping)
    if not all(value > 0 and isfinite(value) for value in dampings):
        raise ValueError(f"Every damping must be finite and positive, got {dampings}.")
    if num_vectors < 2:
        raise ValueError(f"num_vectors must be at least 2, got {num_vectors}.")
    v = standard_normal(
        (F.size, num_vectors), generator=generator, dtype=F.dtype, device=F.device
    )
    v = v / v.norm(dim=0)
    Fv, approximate = F @ v, F_hat @ v
    forms = (v * Fv).sum(dim=0)
    errors = (v * (approximate - Fv)).sum(dim=0)
    residuals, cosines = {}, {}
    for value in dampings:
        solved = F_hat.solve(Fv + value * v, value)
        residuals[float(value)] = Interval.of((solved - v).norm(dim=0))
        cosines[float(value)] = Interval.of(_cosine(solved, v))
    true_trace = float(F.trace()) if trace is None else trace
    if not true_trace:
        raise ValueError(
            "F has trace 0, so there are no errors relative to it; the outputs of this "
            "model do not depend on its parameters, or it fits its data exactly."
        )
    return ApproximationQuality(
        structure=F_hat.structure,
        trace_error=abs(float(F_hat.trace()) - true_trace) / abs(true_trace),
        quadratic_error=Interval.of((errors / forms).abs()),
        product_residual=Interval.of((approximate - Fv).norm(dim=0) / Fv.norm(dim=0)),
        product_cosine=Interval.of(_cosine(approximate, Fv)),
        solve_residual=residuals,
        solve_cosine=cosines,
        num_vectors=num_vectors,
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines between columns, 0 where one is zero."""
    return (_unit(a) * _unit(b)).sum(dim=0)


def _unit(columns: Tensor) -> Tensor:
    """Return columns of norm 1; zero stays zero."""
    tiny = torch.finfo(columns.dtype).tiny
    # Curvature may be so small that its squares underflow.
    columns = columns / columns.abs().amax(dim=0).clamp(min=tiny)
    norms: Tensor = columns.norm(dim=0)
    return columns / norms.clamp(min=tiny)


@result
class BasisQuality:
    """A layer's factors, basis and scalings beside its exact block ``F``.

    George et al. 2018, Figures 2 and 4; George 2023, section 4.4. Numbers are over all
    ``b`` blocks of the layer; errors are relative.

    Attributes:
        correlation: Mean ``|F_ij| / sqrt(F_ii F_jj)`` off the diagonal, over pairs of
            parameters.
        basis_correlation: The same over pairs of coordinates in the eigenbasis.
        kfac_error: ``|F - A (x) G|_F / |F|_F``.
        ekfac_error: ``|F - Q diag(s) Q^T|_F / |F|_F``; nan without scalings.
        kfac_spectrum: ``|spec(A (x) G) - spec(F)| / |spec(F)|``, both sorted.
        ekfac_spectrum: The same of the scalings; nan without scalings.
    """

    correlation: float
    basis_correlation: float
    kfac_error: float
    ekfac_error: float
    kfac_spectrum: float
    ekfac_spectrum: float

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw both correlations and the errors of both matrices; return the axes."""
        ax = axes_or_new(ax)
        bars = {
            "correlation of parameters": (self.correlation, "C2"),
            "correlation in the basis": (self.basis_correlation, "C2"),
            "K-FAC: matrix": (self.kfac_error, "C0"),
            "EKFAC: matrix": (self.ekfac_error, "C1"),
            "K-FAC: spectrum": (self.kfac_spectrum, "C0"),
            "EKFAC: spectrum": (self.ekfac_spectrum, "C1"),
        }
        lengths, colours = zip(*bars.values(), strict=True)
        ax.barh(list(bars), lengths, color=colours)
        ax.set(xlabel="mean correlation, or relative error")
        ax.invert_yaxis()
        return ax


def basis_quality(layer: LayerCurvature, block: Tensor) -> BasisQuality:
    """Return the errors of a layer's curvature in place of the exact block.

    K-FAC's matrix has the factors' eigenvalues at the last refresh of the basis, as the
    optimizer's steps use them.

    Args:
        layer: A layer with factors and basis, of :attr:`ekfac.EKFAC.curvature`.
        block: ``F``, ``[P, P]`` over the layer's parameters in their order:
            ``ekfac.fisher(model, data, "dense", kind, parameters=layer.parameter_names)
            .to_dense()``.

    Raises:
        NotReadyError: If the layer has no basis yet.
        ValueError: If ``block`` is of another size.
    """
    if not layer.ready:
        raise NotReadyError(f"Layer {layer.name!r} has no basis yet; do a step first.")
    b, d_out, d_in = layer.block.shape
    if block.shape != (size := b * d_out * d_in, size):
        raise ValueError(
            f"Layer {layer.name!r} has {size} parameters, so its block is [{size}, "
            f"{size}]; got {list(block.shape)}."
        )
    index = _packed_index(layer)
    F = block.double()[index.unsqueeze(2), index.unsqueeze(1)]
    Q = _basis(layer).to(F)
    turned = Q.mT @ F @ Q
    values = layer.eigenvalues_G.unsqueeze(-1) * layer.eigenvalues_A.unsqueeze(-2)
    kronecker = values.flatten(1).to(F)
    s = layer.s
    scalings = None if s is None else s.flatten(1).to(F)
    exact = torch.linalg.eigvalsh(F).flatten()
    return BasisQuality(
        correlation=_correlation(F),
        basis_correlation=_correlation(turned),
        kfac_error=_error(turned, kronecker),
        ekfac_error=float("nan") if scalings is None else _error(turned, scalings),
        kfac_spectrum=_spectrum(exact, kronecker),
        ekfac_spectrum=float("nan") if scalings is None else _spectrum(exact, scalings),
    )


def _packed_index(layer: LayerCurvature) -> Tensor:
    """Return the indices among the parameters of the entries ``[b, d_out d_in]``."""
    start, tensors = 0, {}
    for name, tensor in zip(layer.parameter_names, layer.block.tensors(), strict=True):
        count = tensor.numel()
        tensors[name] = torch.arange(start, start + count).reshape(tensor.shape)
        start += count
    return layer.pack(tensors).flatten(1)


def _basis(layer: LayerCurvature) -> Tensor:
    """Return ``Q_G (x) Q_A`` of every block, row-major over ``[d_out, d_in]``."""
    b, d_out, d_in = layer.block.shape
    sides = []
    for Q, size in ((layer.Q_G, d_out), (layer.Q_A, d_in)):
        eye = torch.eye(size, device=layer.eigenvalues_A.device)
        sides.append((eye.expand(1, -1, -1) if Q is None else Q).double())
    left, right = (Q.expand(b, -1, -1) for Q in sides)
    return torch.einsum("bij,bkl->bikjl", left, right).reshape(b, d_out * d_in, -1)


def _correlation(C: Tensor) -> float:
    """Return the mean absolute correlation; coordinates without variance left out."""
    means = []
    for block in C:
        variance = block.diagonal()
        active = variance > 1e-12 * variance.max()
        part = block[active][:, active]
        if len(part) < 2:
            continue
        root = part.diagonal().sqrt()
        correlation = (part / root / root[:, None]).abs()
        off = correlation.sum() - correlation.diagonal().sum()
        means.append(float(off) / (len(part) * (len(part) - 1)))
    return sum(means) / len(means) if means else float("nan")


def _error(turned: Tensor, diagonal: Tensor) -> float:
    """Return ``|F - Q diag(d) Q^T| / |F|`` from ``Q^T F Q``."""
    return float((turned - torch.diag_embed(diagonal)).norm() / turned.norm())


def _spectrum(exact: Tensor, values: Tensor) -> float:
    ordered = values.flatten().sort().values
    return float((ordered - exact.sort().values).norm() / exact.norm())


@result
class TruncationError:
    """Error of a layer's direction from its truncated basis, against a full basis.

    Attributes:
        layer: Name of the layer.
        rank_G: Number of kept directions of the output side, of ``d_out``.
        rank_A: Likewise of the input side, of ``d_in``.
        outside: Share of the gradient's square outside both sides' kept directions.
        error: ``|u - u_full| / |u_full|``, before grafting.
        cosine: Between ``u`` and ``u_full``.
    """

    layer: str
    rank_G: int
    rank_A: int
    outside: float
    error: float
    cosine: float


@torch.no_grad()
def truncation_error(
    layer: LayerCurvature,
    gradient: Tensor,
    damping: float,
    *,
    mode: DampingMode = "adaptive",
    power: float = -1,
) -> TruncationError:
    """Return the distance of a truncated step from that of the full eigenbasis.

    The full basis is that of the layer's present factors. No scalings were measured in
    it: where both directions are kept they are the layer's, and elsewhere the measured
    mean over the complement is spread like the eigenvalues of ``A (x) G``. The error is
    that of the truncation if K-FAC is right about the complement.

    Args:
        layer: A layer with factors and scalings, of :attr:`ekfac.EKFAC.curvature`.
        gradient: ``[b, d_out, d_in]``: ``layer.pack`` of the parameters' gradients.
        damping: As in :class:`ekfac.EKFAC`.
        mode: The ``damping_mode`` of :class:`ekfac.EKFAC`.
        power: -1 or -0.5.

    Raises:
        NotReadyError: Before the layer has a basis and scalings.
        ValueError: If the layer's basis is not truncated, or the gradient has another
            shape than the layer.
    """
    if not layer.truncated:
        raise ValueError(
            f"Layer {layer.name!r} has a full basis, so there is nothing to compare; "
            "EKFAC(..., rank=...) truncates sides wider than 64."
        )
    scalings = layer.averages["s"].read()
    if not layer.ready or scalings is None:
        raise NotReadyError(f"Layer {layer.name!r} has no scalings yet; do a step.")
    if tuple(gradient.shape) != tuple(layer.block.shape):
        raise ValueError(
            f"Layer {layer.name!r} has gradients of shape {list(layer.block.shape)}, "
            f"got {list(gradient.shape)}; pass layer.pack of its parameters' gradients."
        )
    gradient = gradient.to(scalings, copy=True)
    added = absolute_damping(damping, layer.mean(scalings), mode, layer.damping_factor)
    parts = coordinates(layer, gradient)
    finer, weights = refined(layer, scalings)
    multipliers = collapsed(layer, (finer + added).pow(power), weights)
    Q_G, Q_A, s = _full(layer)
    full = Q_G @ ((Q_G.mT @ gradient @ Q_A) * (s + added).pow(power)) @ Q_A.mT
    squared_norm = gradient.square().sum()
    step = combine_(layer, parts, multipliers)
    tiny = torch.finfo(full.dtype).tiny
    size = full.norm().clamp(min=tiny)
    inside = parts.kept.square().sum() / squared_norm.clamp(min=tiny)
    cosine = (step * full).sum() / (size * step.norm().clamp(min=tiny))
    ranks = [gradient.shape[i] - layer.complement(s) for i, s in ((1, "G"), (2, "A"))]
    return TruncationError(
        layer.name,
        ranks[0],
        ranks[1],
        1 - float(inside),
        float((step - full).norm() / size),
        float(cosine),
    )


def _full(layer: LayerCurvature) -> tuple[Tensor, Tensor, Tensor]:
    """Return the completed bases, diagonal in the complement, and their scalings."""
    s = layer.s
    assert s is not None
    bases = []
    for side, dim in (("G", -2), ("A", -1)):
        Q = layer.Q_G if side == "G" else layer.Q_A
        factor = layer.averages[side].read()
        assert Q is not None
        assert factor is not None
        rest = layer.complement(side)
        if rest:
            others = Q[..., :rest]
            inner = others.mT @ factor @ others
            values, turn = torch.linalg.eigh((inner + inner.mT) / 2)
            values = values.clamp(min=0)
            mean = values.mean(dim=-1, keepdim=True)
            shape = torch.where(mean > 0, values / mean, 1.0)
            Q = torch.cat([others @ turn, Q[..., rest:]], dim=-1)
            ones = torch.ones_like(Q[..., 0, rest:])
            shape = torch.cat([shape, ones], dim=-1)
            s = s * shape.unsqueeze(-1 if dim == -2 else -2)
        bases.append(Q)
    return bases[0], bases[1], s


@result
class StepQuality:
    """Agreement of the optimizer's quadratic model with its last step.

    Attributes:
        ratio: ``actual / predicted``: near 1 where the model is good; nan if no
            decrease was predicted.
        actual: Change of the loss.
        predicted: ``linear + quadratic``.
        linear: ``grad . delta``.
        quadratic: ``1/2 delta^T F delta``.
    """

    ratio: float
    actual: float
    predicted: float
    linear: float
    quadratic: float


def step_quality(
    optimizer: Any,
    closure: Callable[[], Tensor],
    before: Mapping[str, Tensor],
    *,
    examples_per_term: float = 1.0,
) -> StepQuality:
    """Return the reduction ratio of the last step (Martens & Grosse 2015, 6.5).

    The quadratic model has the curvature of the optimizer, without damping;
    :class:`ekfac.optim.LevenbergMarquardt` uses the exact Gauss-Newton matrix instead.
    The loss is evaluated twice and differentiated once. The optimizer does not record
    it; random numbers, ``.grad``, buffers and parameters are left as they were.

    Args:
        optimizer: A K-FAC or EKFAC optimizer, after the step.
        closure: Returns the loss on the step's batch, without calling ``backward``.
        before: The parameters before the step, by name.
        examples_per_term: Number of examples over the number of terms that a mean loss
            is over, where they differ (tokens, pixels): the curvature is that of the
            loss averaged over examples.
    """
    parameters = named_parameters(optimizer.model)
    named = {name: p for name, p in parameters.items() if name in before}
    after = {name: p.detach().clone() for name, p in named.items()}
    step = ParameterVector({n: after[n] - before[n].to(after[n]) for n in named})
    scaled = all(layer.s is not None for layer in optimizer.curvature.values())
    structure = "ekfac" if scaled else "kfac"
    F = optimizer.curvature.matrix(structure, parameters=named)
    with torch.enable_grad():
        try:
            with optimizer.undisturbed():
                new = float(closure().detach())
            _set_(named, before)
            with optimizer.undisturbed():
                loss = closure()
                inputs = list(named.values())
                grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
        finally:
            _set_(named, after)
    linear = float(ParameterVector(dict(zip(named, grads, strict=True))).dot(step))
    quadratic = float(F.quadratic(step)) / 2 * examples_per_term
    predicted, actual = linear + quadratic, new - float(loss.detach())
    ratio = actual / predicted if predicted < 0 else float("nan")
    return StepQuality(ratio, actual, predicted, linear, quadratic)


@torch.no_grad()
def _set_(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        parameter.copy_(values[name])
