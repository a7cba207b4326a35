"""SuperNat: gradient descent in features that are rescaled at every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ekfac.diagnostics.drawing import axes_or_new


@dataclass(frozen=True)
class FeatureDescent:
    """A run of gradient descent or SuperNat on a linear model.

    Attributes:
        outputs: Predictions on the sample at the end, ``[n]``.
        loss: Mean squared error on the sample, at every step and the end, ``[T + 1]``.
        test_loss: Likewise on the test features, or ``None``.
        eigenvalues: Of the kernel at every step and the end, ``[T + 1, r]``.
        weights: ``w`` in the original features at the end, ``[P]``.
    """

    outputs: Tensor
    loss: Tensor
    test_loss: Tensor | None
    eigenvalues: Tensor
    weights: Tensor

    def plot(self, axis: Any = None) -> Any:
        """Draw the losses over the steps; return the axes.

        Args:
            axis: Of matplotlib; a new figure's if there is none.
        """
        axis = axes_or_new(axis)
        axis.semilogy(self.loss, label="sample")
        if self.test_loss is not None:
            axis.semilogy(self.test_loss, label="test")
        axis.set(xlabel="step", ylabel="mean squared error")
        axis.legend()
        return axis


def feature_descent(
    features: Tensor,
    y: Tensor,
    *,
    method: Literal["supernat", "gd"] = "supernat",
    lr: float = 0.5,
    steps: int = 300,
    test: tuple[Tensor, Tensor] | None = None,
) -> FeatureDescent:
    """Fit ``y = Phi w`` from ``w = 0`` on the mean squared error.

    SuperNat (George 2023, section 6.4.1.2 and B.2.6): after a gradient step, the
    features are divided by the ``A`` that minimises ``|dw|_A |A^-1 Phi^T|_F``, whose
    squared singular values are ``nu_j = kappa / |u_j^T grad_f L|``. The kernel keeps
    its eigenvectors, and its eigenvalues become ``lambda_j |u_j^T grad_f L| / kappa``
    (eq. 6.4.9): modes with much left to learn are learned faster. It is natural
    gradient descent with the metric ``A A^T`` that it makes on the way.

    The factor ``kappa``, which the source leaves free, is ``max_j |u_j^T grad_f L|``:
    no eigenvalue grows, so a stable ``lr`` stays so. With a constant ``kappa`` or a
    constant largest eigenvalue, modes of noise take over once the signal is fitted.

    Args:
        features: ``Phi`` ``[n, P]``.
        y: ``[n]``.
        method: ``"supernat"``, or ``"gd"``: the features stay as they are.
        lr: Times the gradient of ``|Phi w - y|^2 / n``.
        steps: How many.
        test: Other features ``[m, P]`` and targets ``[m]``.

    Raises:
        ValueError: For another ``method``.
    """
    if method not in ("supernat", "gd"):
        raise ValueError(f"method must be 'supernat' or 'gd', got {method!r}.")
    U, roots, Vh = torch.linalg.svd(features, full_matrices=False)
    kept = roots > roots[0] * torch.finfo(roots.dtype).eps * max(features.shape)
    U, roots, Vh = U[:, kept], roots[kept], Vh[kept]
    values = roots.square()
    weights = torch.zeros_like(features[0])
    losses, tests, spectra = [], [], []
    for step in range(steps + 1):
        residual = features @ weights - y
        losses.append(residual.square().mean())
        spectra.append(values)
        if test is not None:
            tests.append((test[0] @ weights - test[1]).square().mean())
        if step == steps:
            break
        slope = U.mT @ residual * (2 / len(y))
        # In the present features dw = -lr Phi_t^T grad_f; back in the original ones
        # sqrt(lambda_t / lambda_0) comes in twice.
        weights = weights - lr * Vh.mT @ (values / roots * slope)
        if method == "supernat":
            tiny = torch.finfo(slope.dtype).tiny
            values = values * slope.abs() / slope.abs().max().clamp(min=tiny)
    return FeatureDescent(
        outputs=features @ weights,
        loss=torch.stack(losses),
        test_loss=torch.stack(tests) if tests else None,
        eigenvalues=torch.stack(spectra),
        weights=weights,
    )
