"""Order parameters and feature metric of a network, exactly or from its K-FAC factors.

Karakida et al. 2020, equations 14 and 17, and section 5: ``A = E[sum_k grad_h f_k
grad_h f_k^T]`` for the vectors ``h`` that the layers see. The block of a layer is
``W^T G W`` with the layer's own K-FAC factor ``G``, an identity; the blocks between
layers are not in the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ekfac.diagnostics.drawing import axes_or_new
from ekfac.diagnostics.papers.karakida.mean_field import MeanField
from ekfac.diagnostics.spectra import Source, Spectrum
from ekfac.errors import UnsupportedOperationError
from ekfac.estimate.tangent_kernel import layer_features
from ekfac.likelihoods import resolve
from ekfac.matrices import BlockDiagonalMatrix, KFACMatrix
from ekfac.spectral.operators import result
from ekfac.vectors import named_parameters

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@result
class OrderParameters:
    """Karakida et al. 2020, equations 14 and 17, by layer.

    Forward ones are of the layer's inputs, backward ones of the derivatives of an
    output with respect to the layer's outputs; means over examples (1), over pairs of
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
            found: dict[str, float] = getattr(self, name)
            colour = f"C{i}"
            layers = range(len(self.forward_1))
            if found:
                ax.plot(layers, list(found.values()), "o", color=colour, label=name)
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
    forward: dict[str, tuple[float, float]] = {}
    backward: dict[str, tuple[float, float]] = {}
    for name, layer in layers.items():
        h = layer.features
        one, two = _moments(h.flatten(1, 2).unsqueeze(1))
        forward[name] = one / h[0, 0].numel(), two / h[0, 0].numel()
        backward[name] = _moments(layer.grads.flatten(3))
    return OrderParameters(
        {name: one for name, (one, _) in forward.items()},
        {name: two for name, (_, two) in forward.items()},
        {name: one for name, (one, _) in backward.items()},
        {name: two for name, (_, two) in backward.items()},
        source="exact",
    )


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
    """Return what Kronecker factors hold of the order parameters.

    The squares are the factors' traces; the overlap of inputs is the norm of their
    mean, which stands in the bias row of ``A``; layers without a bias have none. The
    overlap of gradients is not in the factors. The factors are to be those of
    ``kind="l2"`` on examples of one position.

    Args:
        matrix: A K-FAC matrix.
        num_examples: How many examples the factors are means over.
        num_outputs: How many outputs ``G`` sums over.

    Raises:
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    found: dict[str, dict[str, float]] = {"1": {}, "2": {}, "G": {}}
    for name, block in kfac_blocks(matrix).items():
        A, G = block.factor("A"), block.factor("G")
        has_bias = len(block.layer.parameter_names) > 1
        d_in = A.shape[-1] - has_bias
        diagonal = A.diagonal(dim1=-2, dim2=-1)[..., :d_in]
        one = float(diagonal.sum(dim=-1).mean()) / d_in
        found["1"][name] = one
        if has_bias:
            of_mean = float(A[..., -1, :-1].square().sum(dim=-1).mean()) / d_in
            n = num_examples
            found["2"][name] = (n * of_mean - one) / (n - 1)
        trace = float(G.diagonal(dim1=-2, dim2=-1).sum())
        found["G"][name] = trace / num_outputs
    return OrderParameters(found["1"], found["2"], found["G"], {}, "factors")


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
    """The metric of the layers' inputs, by layer and whole.

    Attributes:
        blocks: Layer name -> ``[b, d_in, d_in]``, the first layer's that of the inputs.
            Shared positions are moved one at a time and summed over.
        source: ``"exact"``; ``"factors"`` if made of K-FAC factors, which gives the
            same blocks.
        gradients: ``[N K, sum d_in]``, whose second moment is the whole, or ``None``.
        num_examples: ``N``, what the second moment is divided by.
    """

    blocks: dict[str, Tensor]
    source: Source
    gradients: Tensor | None = None
    num_examples: int = 0

    def layer_spectra(self) -> dict[str, Spectrum]:
        """Return the eigenvalues of every layer's block."""
        found = {}
        for name, block in self.blocks.items():
            values = torch.linalg.eigvalsh(block).flatten().sort(descending=True).values
            found[name] = Spectrum(values, len(values), "exact")
        return found

    def spectrum(self) -> Spectrum:
        """Return the eigenvalues of the whole, blocks between layers included.

        Raises:
            UnsupportedOperationError: From factors, or with shared positions.
        """
        if self.gradients is None:
            raise UnsupportedOperationError(
                "The whole metric is that of layers with one position per example, "
                "without groups, from feature_metric(model, x); Kronecker factors and "
                "convolutions give blocks: use layer_spectra()."
            )
        rows = self.gradients
        small = rows @ rows.mT if rows.shape[0] < rows.shape[1] else rows.mT @ rows
        values = torch.linalg.eigvalsh(small / self.num_examples).flip(0)
        return Spectrum(values, rows.shape[1], "exact")


def feature_metric(
    model: nn.Module, x: Any, likelihood: Any = "categorical"
) -> FeatureMetric:
    """Return the metric of inputs and features on some examples.

    Args:
        model: The model, in eval mode while it is called.
        x: Inputs: a tensor, a mapping of keyword arguments or a tuple of arguments.
        likelihood: As for :func:`ekfac.fisher`; ``"gaussian"`` is the text's metric.
    """
    outputs, layers = layer_features(model, x)
    n = len(outputs)
    pseudo = [h.flatten(1) for h in resolve(likelihood).exact(outputs)]
    weights = torch.stack(pseudo, dim=1).to(outputs.dtype)  # [N, K, C]
    blocks, whole = {}, []
    for name, layer in layers.items():
        slopes = layer.input_grads
        rows = torch.bmm(weights, slopes.flatten(2)).unflatten(2, slopes.shape[2:])
        flat = rows.flatten(0, 2).transpose(0, 1)  # [b, N K S, d_in]
        blocks[name] = flat.mT @ flat / n
        if slopes.shape[2:4] == (1, 1):
            whole.append(rows.flatten(2))
    complete = len(whole) == len(layers)
    gradients = torch.cat(whole, dim=2).flatten(0, 1) if complete else None
    return FeatureMetric(blocks, "exact", gradients, n)


def feature_metric_of_factors(
    model: nn.Module, matrix: BlockDiagonalMatrix
) -> FeatureMetric:
    """Return ``W^T G W`` of every layer of a K-FAC matrix.

    Args:
        model: The model whose weights ``W`` are.
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
