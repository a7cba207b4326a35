"""Zhang, Zhang, Luo & Xu 2021: embedding of narrow networks in wide ones."""

from ekfac.diagnostics.papers.zhang.embedding import (
    Embedding,
    EmbeddingCheck,
    check_embedding,
    embedded_factors,
    split,
    split_equally,
)
from ekfac.diagnostics.papers.zhang.redundant_neurons import (
    Redundancy,
    redundant_neurons,
    redundant_neurons_of_factors,
)

__all__ = [
    "Embedding",
    "EmbeddingCheck",
    "Redundancy",
    "check_embedding",
    "embedded_factors",
    "redundant_neurons",
    "redundant_neurons_of_factors",
    "split",
    "split_equally",
]
