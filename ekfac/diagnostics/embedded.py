"""Kronecker factors of a wide network from those of the narrow one it embeds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ekfac.diagnostics.embedding import Embedding, Split
from ekfac.diagnostics.overlaps import kfac_blocks
from ekfac.estimate.data import choose, prepared, space_of
from ekfac.estimate.layers import lay_out
from ekfac.estimate.moments import packing_of
from ekfac.matrices import BlockDiagonalMatrix, KFACMatrix, KroneckerFactors


def embedded_factors(
    embedding: Embedding, model: nn.Module, matrix: BlockDiagonalMatrix
) -> BlockDiagonalMatrix:
    """Return the K-FAC matrix of the wide network, without data.

    ``A' = P A P^T`` repeats the row and column of the neuron's outputs, ``G' = S G
    S^T`` shares those of its gradient out. Exactly what an estimate on the same data
    gives; ranks stay, so that every split adds a null vector to ``A`` of the layers
    that read the neuron and one to ``G`` of its own. Scalings in an eigenbasis do not
    carry over: the repeated rows change the basis.

    Args:
        embedding: An embedding of the model.
        model: The narrow network.
        matrix: Its K-FAC matrix.

    Raises:
        UnsupportedOperationError: If a block is not a K-FAC block.
    """
    factors = {
        name: (block.factor("A"), block.factor("G"))
        for name, block in kfac_blocks(matrix).items()
    }
    for split in embedding.splits:
        readers = {name.rpartition(".")[0] for name in split.wiring.inputs}
        for name, (A, G) in factors.items():
            if name in readers:
                A = _repeated(A, split)
            if name == split.wiring.layer:
                G = split.scaled(split.scaled(G, 1), 2)
            factors[name] = A, G
    wide = embedding.model(model)
    chosen = choose(wide, matrix.space.names)
    with prepared(wide, chosen):
        layout = lay_out(wide, chosen, "kfac", None)
    space = space_of(chosen)
    blocks = {}
    for block in layout.blocks:
        A, G = factors[block.name]
        layer = KroneckerFactors(packing_of(block), A=A, G=G)
        blocks[block.name] = KFACMatrix(layer, space.subspace(block.parameters))
    return BlockDiagonalMatrix(space, blocks)


def _repeated(A: Tensor, split: Split) -> Tensor:
    """Return ``[b, d, d]`` with the neuron's rows and columns repeated.

    The bias's, where there is one, stays last.
    """
    width = split.wiring.width
    block = A.shape[-1] // width
    index = split.wiring.expanded(split.index(A), block)
    index = torch.cat([index, torch.arange(block * width, A.shape[-1]).to(index)])
    return A.index_select(1, index).index_select(2, index)
