"""Health of an optimizer's curvature: quality, age and cost, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import Axes, axes_or_new
from ekfac.errors import NotReadyError
from ekfac.matrices.kronecker import Factors
from ekfac.spectral.operators import result


class LayerState(Factors, Protocol):
    """The curvature of a layer: a live ``LayerCurvature``, or one read from a file."""

    @property
    def name(self) -> str:
        """The layer's name."""

    @property
    def eigenvalues_A(self) -> Tensor:
        """Eigenvalues of ``A`` at the last refresh."""

    @property
    def eigenvalues_G(self) -> Tensor:
        """Eigenvalues of ``G`` at the last refresh."""

    @property
    def version(self) -> Mapping[str, int]:
        """Steps at which factors, basis and scalings were last refreshed."""

    @property
    def ready(self) -> bool:
        """Whether there is an eigenbasis."""

    def bytes(self) -> int:
        """Return the memory of all tensors."""


@result
class LayerHealth:
    """The state of one layer's curvature. Shares are in [0, 1].

    Attributes:
        layer: The layer's name.
        block: ``b x d_out x d_in``.
        basis_age: Steps since the basis was last refreshed, or found to fit still.
        scalings_age: Steps since the scalings were updated; -1 without any (K-FAC).
        factors_age: Steps since the factors were updated.
        off_diagonal_A: Norm of the off-diagonal part of ``Q_A^T A Q_A`` over that of
            the whole: how far the basis is from the factor's present eigenvectors.
        off_diagonal_G: Likewise of ``G``.
        drift: Relative change, since the last refresh, of the products of the factors'
            diagonals in the basis: what K-FAC's eigenvalues have missed.
        kfac_gap: Relative Frobenius distance from EKFAC's matrix to the nearest
            multiple of K-FAC's, ``A (x) G``; 0 where K-FAC's is as good. nan without
            scalings.
        trace_ratio: Trace of K-FAC's matrix over EKFAC's; nan without scalings.
        mean_scaling: Mean eigenvalue of the block.
        damping: Absolute damping, which is added to the eigenvalues.
        damped_share: Share of the eigenvalues that are below the damping.
        effective_share: ``sum_i s_i / (s_i + damping)`` over their number: the share of
            directions in which curvature, not damping, sets the step.
        condition: Largest damped eigenvalue over the smallest.
        weight_norm: Norm of the layer's parameters; nan from a file.
        update_norm: Norm of the last update; nan if the parameters before it are not
            known.
        update_share: ``update_norm / weight_norm``.
        bytes: Memory of the layer's curvature.
    """

    layer: str
    block: str
    basis_age: int
    scalings_age: int
    factors_age: int
    off_diagonal_A: float
    off_diagonal_G: float
    drift: float
    kfac_gap: float
    trace_ratio: float
    mean_scaling: float
    damping: float
    damped_share: float
    effective_share: float
    condition: float
    weight_norm: float
    update_norm: float
    update_share: float
    bytes: int


@dataclass(frozen=True)
class Norms:
    """Norms of a layer's parameters and of its last update."""

    weight: float = float("nan")
    update: float = float("nan")


def in_basis(factor: Tensor, basis: Tensor | None) -> tuple[Tensor, float]:
    """Return the diagonal of ``Q^T C Q`` ``[b, d]``, and its off-diagonal share.

    Args:
        factor: ``C`` ``[b, d, d]``, or a diagonal factor ``[b, d]``.
        basis: ``Q``, or ``None`` for a diagonal factor.

    Raises:
        ValueError: For a dense factor without its basis.
    """
    if factor.dim() == 2:
        return factor, 0.0
    if basis is None:
        raise ValueError("A dense factor needs its eigenbasis, got basis=None; pass Q.")
    image = factor @ basis
    diagonal = (basis * image).sum(dim=-2)
    squared_norm = float(image.double().square().sum())
    off_diagonal = max(0.0, squared_norm - float(diagonal.double().square().sum()))
    return diagonal, (off_diagonal / squared_norm) ** 0.5 if squared_norm > 0 else 0.0


def block_eigenvalues(layer: LayerState) -> Tensor:
    """Return the block's eigenvalues as the step uses them, ``[b, d_out, d_in]``.

    They are the scalings, or without scalings the products of the factors' eigenvalues.
    """
    s = layer.s
    if s is not None:
        return s
    return layer.eigenvalues_G.unsqueeze(-1) * layer.eigenvalues_A.unsqueeze(-2)


def layer_health(
    layer: LayerState, damping: float, step: int, norms: Norms = Norms()
) -> LayerHealth:
    """Return the state of one layer with a basis.

    The cost is one product of two matrices per factor; no data are needed.

    Args:
        layer: The layer's curvature.
        damping: Absolute damping, in units of the scalings.
        step: The number of steps done, from which ages count.
        norms: Norms of parameters and update.

    Raises:
        ValueError: If the layer has no factors or basis yet.
    """
    A, G = layer.A, layer.G
    if A is None or G is None or not layer.ready:
        raise ValueError(
            f"Layer {layer.name!r} has no factors or no basis yet; do a step with "
            "statistics first."
        )
    values = block_eigenvalues(layer).double()
    a, off_A = in_basis(A, layer.Q_A)
    g, off_G = in_basis(G, layer.Q_G)
    now = (g.unsqueeze(-1) * a.unsqueeze(-2)).double()
    then = layer.eigenvalues_G.unsqueeze(-1) * layer.eigenvalues_A.unsqueeze(-2)
    gap, ratio = _gap(layer, now, A, G)
    damped = values + damping
    smallest = float(damped.min())
    version = layer.version
    return LayerHealth(
        layer=layer.name,
        block="x".join(map(str, values.shape)),
        basis_age=step - version["basis"],
        scalings_age=-1 if layer.s is None else step - version["scalings"],
        factors_age=step - version["factors"],
        off_diagonal_A=off_A,
        off_diagonal_G=off_G,
        drift=_relative(now - then.double(), now),
        kfac_gap=gap,
        trace_ratio=ratio,
        mean_scaling=float(values.mean()),
        damping=damping,
        damped_share=float((values < damping).double().mean()),
        effective_share=float(_share(values, damping).mean()),
        condition=float(damped.max()) / smallest if smallest > 0 else float("inf"),
        weight_norm=norms.weight,
        update_norm=norms.update,
        update_share=norms.update / norms.weight if norms.weight else float("nan"),
        bytes=layer.bytes(),
    )


def _gap(layer: LayerState, now: Tensor, A: Tensor, G: Tensor) -> tuple[float, float]:
    """Return the distance of EKFAC's matrix to K-FAC's, and the ratio of traces.

    EKFAC's matrix is diagonal in the basis, so the inner product of the two needs only
    K-FAC's diagonal there, ``now``.
    """
    s = layer.s
    if s is None:
        return float("nan"), float("nan")
    s = s.double()
    blocks = len(s)

    def squares(factor: Tensor) -> Tensor:
        return factor.double().square().flatten(1).sum(dim=1).expand(blocks)

    kfac = float((squares(A) * squares(G)).sum())
    ekfac, product = float(s.square().sum()), float((s * now).sum())
    if kfac <= 0 or ekfac <= 0:
        return float("nan"), float("nan")
    cosine = product**2 / (kfac * ekfac)
    return max(0.0, 1 - cosine) ** 0.5, float(now.sum()) / float(s.sum())


def _relative(difference: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    return float(difference.norm()) / norm if norm > 0 else 0.0


def _share(values: Tensor, damping: float) -> Tensor:
    """Return ``s / (s + damping)``; 0 / 0 is 0."""
    damped = values + damping
    return torch.where(damped > 0, values / damped.clamp(min=1e-300), 0.0)


# Columns of the table: heading -> attribute of LayerHealth.
COLUMNS = {
    "layer": "layer",
    "block": "block",
    "basis age": "basis_age",
    "off-diag. A": "off_diagonal_A",
    "off-diag. G": "off_diagonal_G",
    "drift": "drift",
    "gap to K-FAC": "kfac_gap",
    "trace ratio": "trace_ratio",
    "mean scaling": "mean_scaling",
    "damping": "damping",
    "damped": "damped_share",
    "effective": "effective_share",
    "update": "update_share",
    "KiB": "bytes",
}


@result
class Health:
    """The state of an optimizer's curvature; printing it shows a table.

    Attributes:
        steps: Steps done.
        layers: One entry for each layer with a basis, in the model's order.
        waiting: Layers without a basis yet.
        counters: Counts of what the decompositions did, see ``optimizer.counters``;
            empty if they are not known.
        bytes: Memory of all curvature.
        findings: What deserves attention, in words.
    """

    steps: int
    layers: tuple[LayerHealth, ...]
    waiting: tuple[str, ...]
    counters: dict[str, int]
    bytes: int
    findings: tuple[str, ...]

    def __str__(self) -> str:
        head = f"curvature after {self.steps} steps, {self.bytes / 2**20:.1f} MiB"
        counted = ", ".join(f"{name} {count}" for name, count in self.counters.items())
        lines = [head, *_table(self.layers)]
        if counted:
            lines.append(f"decompositions: {counted}")
        return "\n".join([*lines, *(f"- {finding}" for finding in self.findings)])

    def by_layer(self, attribute: str) -> dict[str, float]:
        """Return an attribute of every layer, by the layer's name."""
        return {layer.layer: getattr(layer, attribute) for layer in self.layers}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the most telling shares of every layer as bars; return the axes."""
        shown = {
            "off_diagonal_A": "off-diagonal share of A in its basis",
            "off_diagonal_G": "off-diagonal share of G in its basis",
            "kfac_gap": "EKFAC: relative distance to K-FAC",
            "effective_share": "share of directions above the damping",
        }
        ax = axes_or_new(ax)
        rows, height = torch.arange(len(self.layers)), 0.8 / len(shown)
        for i, (attribute, label) in enumerate(shown.items()):
            shares = list(self.by_layer(attribute).values())
            ax.barh((rows + (i - 1.5) * height).tolist(), shares, height, label=label)
        ax.set_yticks(rows.tolist(), [layer.layer for layer in self.layers])
        ax.set(xlim=(0, 1), xlabel="share")
        ax.invert_yaxis()
        ax.legend(fontsize="small")
        return ax


def _table(layers: tuple[LayerHealth, ...]) -> list[str]:
    """Return the lines of the table."""
    rows = [list(COLUMNS)]
    for layer in layers:
        values = (getattr(layer, attribute) for attribute in COLUMNS.values())
        cells = zip(values, COLUMNS, strict=True)
        rows.append([_text(value, name) for value, name in cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _text(value: float | int | str, column: str) -> str:
    if column == "KiB":
        return f"{float(value) / 1024:.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def optimizer_health(
    optimizer: Any, before: Mapping[str, Tensor] | None = None
) -> Health:
    """Return the state of a K-FAC or EKFAC optimizer's curvature.

    Nothing is changed and no data are needed. The cost is one product of two matrices
    per factor, far less than a decomposition.

    Args:
        optimizer: A ``KFAC`` or ``EKFAC``, or an object with their ``curvature``,
            ``dampings()``, ``steps`` and, optionally, ``counters``.
        before: The parameters before the last step, by name; without them norms of
            updates are nan.

    Raises:
        NotReadyError: If no layer has a basis yet.

    Example:
        >>> import ekfac
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ekfac.EKFAC(model)
        >>> model(torch.randn(8, 3)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer_health(optimizer).layers[0].block
        '1x2x4'
    """
    dampings = {la.name: float(damping) for la, damping, _ in optimizer.dampings()}
    counters = getattr(optimizer, "counters", None)
    counted = {} if counters is None else asdict(counters)
    with torch.no_grad():
        health = assemble(
            optimizer.curvature, dampings, optimizer.steps, counted, before
        )
    if not health.layers:
        raise NotReadyError(
            "No layer has a basis yet: the optimizer has done no step with statistics. "
            f"Layers that wait: {list(health.waiting)}."
        )
    return health


def assemble(
    layers: Mapping[str, LayerState],
    dampings: Mapping[str, float],
    steps: int,
    counters: dict[str, int],
    before: Mapping[str, Tensor] | None = None,
) -> Health:
    """Return the health of an optimizer from its layers' states.

    Args:
        layers: All layers, by name.
        dampings: Absolute damping of every layer whose state is wanted.
        steps: Steps done.
        counters: Counts of what the decompositions did.
        before: As for :func:`optimizer_health`.
    """
    states, waiting = [], []
    for name, layer in layers.items():
        if layer.ready and name in dampings:
            norms = _norms(layer, before)
            states.append(layer_health(layer, dampings[name], steps, norms))
        else:
            waiting.append(name)
    findings = tuple(_findings(states, waiting, counters))
    num_bytes = sum(layer.bytes() for layer in layers.values())
    return Health(steps, tuple(states), tuple(waiting), counters, num_bytes, findings)


def _norms(layer: Any, before: Mapping[str, Tensor] | None) -> Norms:
    """Return the norms of a layer's parameters and last change; none from a file."""
    block = getattr(layer, "block", None)
    if block is None:
        return Norms()
    tensors = [tensor.detach() for tensor in block.tensors()]
    now = dict(zip(block.parameters, tensors, strict=True))
    weight = float(layer.pack(now).double().norm())
    if before is None:
        return Norms(weight)
    change = {name: t - before[name].to(t) for name, t in now.items()}
    return Norms(weight, float(layer.pack(change).double().norm()))


def _findings(
    layers: list[LayerHealth], waiting: list[str], counters: Mapping[str, int]
) -> Iterator[str]:
    """Yield what deserves attention."""
    if waiting:
        yield f"no basis yet: {', '.join(waiting)}; diagonal second moment until then"
    if counters.get("kept", 0):
        yield (
            f"{counters['kept']} decompositions failed and the old basis was kept: "
            "raise the damping, or look for exploding gradients"
        )
    if counters.get("rejected", 0):
        yield (
            f"the statistics of {counters['rejected']} layers' batches were not finite "
            "and were left out"
        )
    rules: tuple[tuple[str, Callable[[LayerHealth], bool]], ...] = (
        (
            "the basis is far from the factors' eigenvectors (off-diagonal share above "
            "0.5); a smaller basis_interval or a larger factor_decay keeps it closer",
            lambda x: max(x.off_diagonal_A, x.off_diagonal_G) > 0.5,
        ),
        (
            "damping sets the step in over 95 % of the directions; the layer is "
            "trained almost as by gradient descent",
            lambda x: x.effective_share < 0.05,
        ),
        (
            "curvature is zero; the layer gets no gradient",
            lambda x: x.mean_scaling == 0,
        ),
    )
    for text, rule in rules:
        names = [layer.layer for layer in layers if rule(layer)]
        if names:
            yield f"{', '.join(names)}: {text}"
