"""K-FAC (Martens & Grosse 2015; Grosse & Martens 2016)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ekfac.optim.optimizer import KroneckerOptimizer, Params


class KFAC(KroneckerOptimizer):
    r"""Natural gradient with Kronecker-factored curvature.

    The block of every layer is :math:`A \otimes G`, with the factors of
    :class:`EKFAC`; the step is :math:`(A \otimes G + \lambda I)^{-1}` times the
    gradient, computed through the factors' eigenvalues as of their last refresh.

    Args:
        params: As for :class:`EKFAC`, like all that is not listed here.
        damping_split: ``"exact"``: added to the eigenvalues of the block.
            ``"factored"``: ``(A + pi sqrt(damping) I) (x) (G + sqrt(damping)/pi I)``
            with the trace ratio ``pi`` (Martens & Grosse 2015, section 6.3).

    Raises:
        TypeError: If parameters are given without their model.
        ValueError: For a value that an option does not allow.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        model: nn.Module | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 0.03,
        damping_mode: str = "relative",
        damping_split: str = "exact",
        grafting: str | None = "rms",
        factor_decay: float = 0.95,
        factor_interval: int = 10,
        basis_interval: int = 50,
        basis_delay: int = 0,
        fisher: str = "empirical",
        loss_reduction: str = "mean",
        likelihood: Any = "categorical",
        sharing: str = "expand",
        power: float = -1,
        kl_clip: float | None = None,
        max_dim: int = 2048,
        basis_tolerance: float = 0.01,
        precision: str = "auto",
        process_group: Any = None,
        gradient_workers: float = 1.0,
    ) -> None:
        options = {
            key: value
            for key, value in locals().items()
            if key not in ("self", "params", "model", "__class__")
        }
        options |= {"scaling": None, "scaling_decay": 0.95, "scaling_interval": 1}
        options["rank"] = None
        super().__init__(params, model, options)
