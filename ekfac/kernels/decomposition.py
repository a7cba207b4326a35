"""Eigenvectors of a stack of symmetric matrices, by the fastest way that holds.

On a CUDA device ``torch.linalg.eigh`` takes matrices of more than 32 rows one after the
other (PyTorch 175585; newer versions may not). Here they are taken together: small ones
by Jacobi's method in shared memory, larger ones by cuSOLVER's batched solver from the
library that PyTorch ships, and where an old basis nearly fits by orthogonal iteration,
which is made of matrix products. Every way is checked by its residual; what does not
hold is left to ``torch.linalg.eigh``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ekfac.kernels import dispatch
from ekfac.kernels.cusolver import batched_eigh

# Matrices up to this size torch takes together itself.
TOGETHER = 32
# Where Jacobi's sweeps, of n^3 operations each, still cost less than a reduction to
# tridiagonal form; and all that fits into shared memory.
JACOBI = 128
# Residual that is held, in units of eps sqrt(n): |C - Q L Q^T| / |C| and |Q^T Q - I| /
# sqrt(n). LAPACK's own is about 1.
HELD = 30.0


def residual(matrices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Return how far a decomposition is from one: one number, without waiting for it.

    Args:
        matrices: ``C`` ``[n, d, d]``.
        values: ``[n, d]``.
        vectors: ``Q`` ``[n, d, d]``, eigenvectors in columns.

    Returns:
        The largest over matrices of ``|C - Q L Q^T| / |C|`` and ``|Q^T Q - I| /
        sqrt(d)``, in Frobenius norms.
    """
    rebuilt = (vectors * values.unsqueeze(-2)) @ vectors.transpose(-1, -2)
    tiny = torch.finfo(matrices.dtype).tiny
    size = matrices.norm(dim=(-2, -1)).clamp(min=tiny)
    off = (matrices - rebuilt).norm(dim=(-2, -1)) / size
    gram = vectors.transpose(-1, -2) @ vectors
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    skew = gram.norm(dim=(-2, -1)) / matrices.shape[-1] ** 0.5
    return torch.maximum(off, skew).max()


def holds(
    matrices: Tensor, found: tuple[Tensor, Tensor] | None, bound: float | None = None
) -> bool:
    """Return whether there is a decomposition and its residual is small."""
    if found is None:
        return False
    if bound is None:
        bound = HELD * torch.finfo(matrices.dtype).eps * matrices.shape[-1] ** 0.5
    return bool(residual(matrices, *found) <= bound)


def orthonormal(matrices: Tensor) -> Tensor | None:
    """Return orthonormal columns of the same span, by Cholesky-QR done twice.

    Yamamoto et al. 2015: one pass loses digits with the square of the condition number,
    the second brings them back. Matrix products and triangular solves alone.

    Returns:
        ``[n, d, d]``, or ``None`` if a matrix is too close to singular.
    """
    for _ in range(2):
        gram = matrices.transpose(-1, -2) @ matrices
        lower, info = torch.linalg.cholesky_ex(gram)
        if bool(info.any()):
            return None
        matrices = torch.linalg.solve_triangular(
            lower.transpose(-1, -2), matrices, upper=True, left=False
        )
    return matrices


def iterated(
    matrices: Tensor, basis: Tensor, *, steps: int, bound: float
) -> tuple[Tensor, Tensor] | None:
    """Return a decomposition found from an old basis, if it gets there.

    Orthogonal iteration (Golub & Van Loan, section 8.2.4): ``Q <- orth(C Q)``.
    Directions of like eigenvalues mix slowly, those of distinct ones converge like
    their ratio, so this serves where the matrices changed little, or where ``bound``
    is that of a preconditioner.

    Args:
        matrices: ``[n, d, d]``, positive semi-definite.
        basis: ``[n, d, d]``, orthogonal.
        steps: Iterations at most.
        bound: On :func:`residual`.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors; ``None`` where ``bound``
        was not reached.
    """
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[:, None, None]
    # The shift keeps C Q far enough from singular; eigenvectors stay.
    shift = mean * torch.finfo(matrices.dtype).eps ** 0.5
    # A column is cleared of those before it: the dominant ones have to come first.
    values = (basis * (matrices @ basis)).sum(dim=-2)
    order = values.argsort(dim=-1, descending=True).unsqueeze(-2)
    basis = basis.gather(-1, order.expand_as(basis))
    for _ in range(steps):
        image = matrices @ basis + shift * basis
        # Columns at unit length: the condition number is that of their angles.
        tiny = torch.finfo(matrices.dtype).tiny
        following = orthonormal(
            image / image.norm(dim=-2, keepdim=True).clamp(min=tiny)
        )
        if following is None:
            return None
        basis = following
        values = (basis * (matrices @ basis)).sum(dim=-2)
        if holds(matrices, (values, basis), bound):
            values, order = values.sort(dim=-1)
            return values, basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
    return None


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, as ``torch.linalg.eigh`` does.

    Args:
        matrices: ``[n, d, d]``, symmetric and of about unit size.

    Returns:
        Eigenvalues ``[n, d]``, ascending, and eigenvectors in columns.

    Raises:
        RuntimeError: Where ``torch.linalg.eigh`` fails too.
    """
    size = matrices.shape[-1]
    if matrices.is_cuda and matrices.dtype == torch.float32 and size > TOGETHER:
        if size <= JACOBI:
            found = dispatch.eigenvectors(matrices)
            if found is not None and holds(matrices, found):
                return found
        if len(matrices) > 1 and dispatch.obstacle(matrices.device) is None:
            found = batched_eigh(matrices)
            if found is not None and holds(matrices, found):
                return found
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors
