"""K-FAC (Martens & Grosse 2015; Grosse & Martens 2016)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ekfac.curvature.options import (
    Direction,
    Fisher,
    Grafting,
    LossReduction,
    Options,
    Precision,
    Schedule,
    Sharing,
    Split,
)
from ekfac.likelihoods import resolve
from ekfac.matrices.damping import DampingMode
from ekfac.optim.optimizer import KroneckerOptimizer, Params


class KFAC(KroneckerOptimizer):
    r"""Natural gradient with Kronecker-factored curvature.

    The block of every layer is :math:`A \otimes G`, with the factors of
    :class:`EKFAC`; the step is :math:`(A \otimes G + \lambda I)^{-1}` times the
    gradient, computed through the factors' eigenvalues as of their last refresh.

    Args:
        params: As for :class:`EKFAC`, like all that is not listed here.
        direction: ``"natural"``, or ``"spectral"`` with the eigenvalues of
            :math:`A \otimes G` for scalings.
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
        nesterov: bool = True,
        weight_decay: float = 0.0,
        direction: Direction = "natural",
        damping: float = 0.1,
        damping_mode: DampingMode = "relative",
        damping_split: Split = "exact",
        grafting: Grafting | None = "rms",
        factor_decay: float = 0.95,
        factor_interval: int = 10,
        basis_interval: int = 50,
        basis_delay: int = 0,
        fisher: Fisher = "empirical",
        loss_reduction: LossReduction = "mean",
        likelihood: Any = "categorical",
        sharing: Sharing = "expand",
        power: float = -1,
        kl_clip: float | None = None,
        max_dim: int = 2048,
        basis_tolerance: float = 0.01,
        precision: Precision = "auto",
        process_group: Any = None,
        gradient_workers: float = 1.0,
    ) -> None:
        options = Options(
            direction=direction,
            damping_mode=damping_mode,
            damping_split=damping_split,
            grafting=grafting,
            factor_decay=factor_decay,
            scaling_decay=0.95,
            schedule=Schedule(factor_interval, basis_interval, 1, basis_delay),
            scaling=None,
            fisher=fisher,
            loss_reduction=loss_reduction,
            likelihood=resolve(likelihood),
            sharing=sharing,
            power=power,
            max_dim=max_dim,
            basis_tolerance=basis_tolerance,
            nesterov=nesterov,
            precision=precision,
            rank=None,
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "kl_clip": kl_clip,
        }
        super().__init__(
            params, model, options, defaults, process_group, gradient_workers
        )
