"""The arithmetic on the normal form ``[N, S, b, d]``, as functions of tensors.

``cuda/`` holds the kernels of ``csrc/`` that take its place on CUDA devices, and
registers ``torch.ops.ekfac``.
"""

from ekfac.kernels.cuda import operators
from ekfac.kernels.linalg import (
    Workspace,
    aligned_empty,
    inner_products,
    matmul,
    multiplies_bfloat16,
    pack_symmetric,
    packed_size,
    polar,
    rotate,
    rotate_back,
    rotate_into,
    rotate_matrix,
    rotates_rounded,
    rotation_cost,
    unpack_symmetric,
)
from ekfac.kernels.normal_form import (
    add_squared_sums_,
    diagonal_gram,
    gram,
    index_counts,
    indexed_second_moment,
    position_sum,
    rotates_vectors,
    second_moment,
    total_gradient,
)

__all__ = [
    "Workspace",
    "add_squared_sums_",
    "aligned_empty",
    "diagonal_gram",
    "gram",
    "index_counts",
    "indexed_second_moment",
    "inner_products",
    "matmul",
    "multiplies_bfloat16",
    "operators",
    "pack_symmetric",
    "packed_size",
    "polar",
    "position_sum",
    "rotate",
    "rotate_back",
    "rotate_into",
    "rotate_matrix",
    "rotates_rounded",
    "rotates_vectors",
    "rotation_cost",
    "second_moment",
    "total_gradient",
    "unpack_symmetric",
]
