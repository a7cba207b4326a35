"""Pruning in the Kronecker eigenbasis: EigenDamage.

Source: Wang, Grosse, Fidler & Zhang (2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ekfac.diagnostics.hessian.landscape import Curve, Metric, metric_at
from ekfac.diagnostics.subnetworks import select_parameters
from ekfac.matrices import BlockDiagonalMatrix, CurvatureMatrix
from ekfac.matrices.kronecker import KroneckerMatrix
from ekfac.spectral.operators import result
from ekfac.vectors import ParameterVector

Score = Literal["saliency", "curvature", "magnitude"]


class KroneckerBasis:
    """Weights as coordinates ``Q_G^T W Q_A`` in the layers' Kronecker eigenbases.

    Args:
        matrix: A ``"kfac"`` or ``"ekfac"`` matrix, of one layer or of several.

    Raises:
        TypeError: If a block is of another structure.
    """

    def __init__(self, matrix: CurvatureMatrix) -> None:
        blocks = {"": matrix}
        if isinstance(matrix, BlockDiagonalMatrix):
            blocks = matrix.blocks
        self.blocks: dict[str, KroneckerMatrix] = {}
        for name, block in blocks.items():
            if not isinstance(block, KroneckerMatrix):
                raise TypeError(
                    f"Layer {name!r} has a {block.structure} block, which has no "
                    "Kronecker eigenbasis; estimate it with structure='kfac' or "
                    "'ekfac'."
                )
            self.blocks[name] = block

    def coordinates(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each layer's weights in its basis, ``[b, d_out, d_in]``."""
        coordinates = {}
        for name, block in self.blocks.items():
            vector = ParameterVector.of(weights, block.space.names)
            rows = {n: w.to(block.dtype).unsqueeze(0) for n, w in vector.items()}
            coordinates[name] = block.coordinates(rows)[0]
        return coordinates

    def curvature(self) -> dict[str, Tensor]:
        """Return each layer's eigenvalues or scalings, ``[b, d_out, d_in]``."""
        return {name: block._values() for name, block in self.blocks.items()}

    def weights(
        self, coordinates: dict[str, Tensor], like: Mapping[str, Tensor]
    ) -> ParameterVector:
        """Return the parameters with these coordinates; entries without as in ``like``.

        Args:
            coordinates: Layer -> ``[b, d_out, d_in]``.
            like: All parameters.
        """
        result = {name: tensor.detach().clone() for name, tensor in like.items()}
        before = self.coordinates(like)
        for name, block in self.blocks.items():
            change = (coordinates[name] - before[name]).unsqueeze(0)
            for parameter, rows in block._vectors(change).items():
                result[parameter] += rows[0].to(result[parameter])
        return ParameterVector(result)

    def scores(
        self, weights: Mapping[str, Tensor], score: Score = "saliency"
    ) -> Tensor:
        """Return the score of each coordinate, flat over the layers, ``[C]``.

        Args:
            weights: The trained parameters.
            score: ``"saliency"`` is ``s c^2 / 2``, the rise of the loss without the
                coordinate by the quadratic model (Wang et al. 2019, eq. 9);
                ``"curvature"`` is ``s`` alone, ``"magnitude"`` is ``|c|``.

        Raises:
            ValueError: For another ``score``.
        """
        parts = []
        for name, c in self.coordinates(weights).items():
            s = self.blocks[name]._values()
            scores = {"saliency": s * c**2 / 2, "curvature": s, "magnitude": c.abs()}
            if score not in scores:
                names = sorted(scores)
                raise ValueError(f"score must be one of {names}, got {score!r}.")
            parts.append(scores[score].flatten())
        return torch.cat(parts)

    def kept(self, weights: Mapping[str, Tensor], mask: Tensor) -> ParameterVector:
        """Return the weights with the coordinates outside ``mask`` ``[C]`` zero."""
        coordinates, start = self.coordinates(weights), 0
        for name, c in coordinates.items():
            part = mask[start : start + c.numel()].to(c.device)
            coordinates[name] = c * part.view_as(c)
            start += c.numel()
        return self.weights(coordinates, weights)


@result
class EigenPruned:
    """Weights pruned in the Kronecker eigenbasis.

    Attributes:
        value: The parameters after pruning.
        kept: Share of the coordinates that are not zero.
        predicted_increase: Rise of the loss by the quadratic model,
            ``sum s c^2 / 2`` over the pruned coordinates.
        ranks: Layer -> ``(d_out, d_in)`` left of its core; ``None`` for single entries.
    """

    value: ParameterVector
    kept: float
    predicted_increase: float
    ranks: dict[str, tuple[int, int]] | None = None


def eigen_pruned(
    weights: Mapping[str, Tensor],
    matrix: CurvatureMatrix,
    fraction: float,
    *,
    granularity: Literal["entry", "row_column"] = "entry",
    score: Score = "saliency",
) -> EigenPruned:
    """Return the weights with coordinates pruned by their saliency.

    In the eigenbasis the quadratic model of the loss is nearly diagonal, so the cost of
    one coordinate hardly depends on the others: the assumption of optimal brain damage,
    met by rotation (Wang et al. 2019).

    Args:
        weights: The trained parameters.
        matrix: A ``"kfac"`` or ``"ekfac"`` matrix at them, Fisher or GGN.
        fraction: Share of coordinates (or of rows and columns) to prune, all layers
            ranked together.
        granularity: ``"entry"``, or ``"row_column"``: whole rows and columns of the
            cores, which leaves a layer as ``Q_G[:, r] C[r, c] Q_A[:, c]^T``, a
            bottleneck of smaller matrices (ibid., Algorithm 1).
        score: As for :meth:`KroneckerBasis.scores`.

    Raises:
        ValueError: If the fraction or the granularity is out of range.
        TypeError: If a layer has no Kronecker eigenbasis.
    """
    if granularity not in ("entry", "row_column"):
        raise ValueError(
            f"granularity must be 'entry' or 'row_column', got {granularity!r}."
        )
    basis = KroneckerBasis(matrix)
    values = basis.scores(weights, score)
    ranks = None
    if granularity == "entry":
        mask = ~select_parameters(values, fraction)
    else:
        mask, ranks = _rows_and_columns(basis, values, fraction)
    increase = float(basis.scores(weights, "saliency")[~mask].sum())
    share = float(mask.double().mean())
    return EigenPruned(basis.kept(weights, mask), share, increase, ranks)


def _rows_and_columns(
    basis: KroneckerBasis, values: Tensor, fraction: float
) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Return the mask of the kept coordinates, and the cores' sizes.

    Every layer keeps its best row and column, since the network needs every layer.
    """
    sizes = {name: s.shape for name, s in basis.curvature().items()}
    parts = values.split([shape.numel() for shape in sizes.values()])
    lines = []
    for part, shape in zip(parts, sizes.values(), strict=True):
        score = part.view(shape)
        lines += [score.sum(dim=2).flatten(), score.sum(dim=1).flatten()]
    ranked = torch.cat(lines)
    keep = ~select_parameters(ranked, fraction)
    pieces = keep.split([len(line) for line in lines])
    masks, ranks = [], {}
    for i, (name, (b, d_out, d_in)) in enumerate(sizes.items()):
        rows, columns = pieces[2 * i].view(b, d_out), pieces[2 * i + 1].view(b, d_in)
        best_rows = lines[2 * i].view(b, d_out).argmax(dim=1, keepdim=True)
        best_columns = lines[2 * i + 1].view(b, d_in).argmax(dim=1, keepdim=True)
        rows = rows.scatter(1, best_rows, True)
        columns = columns.scatter(1, best_columns, True)
        masks.append((rows[:, :, None] & columns[:, None, :]).flatten())
        ranks[name] = (int(rows.sum()), int(columns.sum()))
    return torch.cat(masks), ranks


def kronecker_reconstruction(
    model: nn.Module,
    matrix: CurvatureMatrix,
    metric: Metric,
    fractions: Sequence[float],
    *,
    score: Score = "curvature",
    largest_first: bool = True,
    progress: bool = False,
) -> Curve:
    """Return a metric of the weights rebuilt in the Kronecker eigenbasis.

    As :func:`ekfac.diagnostics.cumulative_reconstruction`, with a basis that costs no
    eigenvectors of the Hessian.

    Args:
        model: The trained network.
        matrix: A ``"kfac"`` or ``"ekfac"`` matrix of it.
        metric: Of the model.
        fractions: Shares of all coordinates that are kept.
        score: As for :meth:`KroneckerBasis.scores`.
        largest_first: Whether the highest scores are kept, or the lowest.
        progress: Whether to show a bar, if tqdm is installed.

    Raises:
        ValueError: If a fraction or the score is out of range.
        TypeError: If a layer has no Kronecker eigenbasis.
    """
    basis = KroneckerBasis(matrix)
    weights = ParameterVector.from_model(model, matrix.space.names)
    scores = basis.scores(weights, score)
    masks = (
        select_parameters(scores, fraction, largest_first=largest_first)
        for fraction in fractions
    )
    kept = (basis.kept(weights, mask) for mask in masks)
    values = metric_at(model, metric, kept, len(fractions), progress=progress)
    label = "share of coordinates kept"
    return Curve(torch.tensor(fractions, dtype=torch.float64), values, label)
