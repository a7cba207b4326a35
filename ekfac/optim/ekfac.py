"""EKFAC (George et al. 2018) and K-FAC (Martens & Grosse 2015)."""

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
    Scaling,
    Sharing,
    Split,
    check,
)
from ekfac.curvature.state import Storage
from ekfac.layers import ConvFactors
from ekfac.likelihoods import resolve
from ekfac.matrices.eigen import DampingMode
from ekfac.optim.optimizer import KroneckerOptimizer, Params


class EKFAC(KroneckerOptimizer):
    r"""Natural gradient in the Kronecker-factored eigenbasis.

    For every layer with inputs :math:`a` and output gradients :math:`g`, the factors
    :math:`A = E[a a^T]` and :math:`G = E[g g^T]` are averaged and decomposed,
    :math:`A = Q_A \Lambda_A Q_A^T`; in the basis :math:`Q_G, Q_A` the scalings
    :math:`s = E[(Q_G^T \nabla W Q_A)^2]` are tracked at every step. With the average
    :math:`N` of the gradients in that basis, the natural direction is

    .. math:: Q_G \left( \frac{N}{s + \lambda} \right) Q_A^T ,

    the steepest one under a bound on the step's Frobenius norm in the metric of the
    Fisher matrix. The spectral direction, with
    :math:`\sigma = (s + \lambda)^{-1/2}`,

    .. math:: Q_G \left( \sigma \circ \mathrm{polar}(\sigma \circ N) \right) Q_A^T ,

    is the steepest one under a bound on the spectral norm there. With equal scalings it
    is Muon's (Jordan et al. 2024), with the Frobenius norm in place of the spectral one
    EKFAC's (George et al. 2018); the combination is this package's own. Relatives are
    FISMO (2026), with Kronecker roots on both sides, and SOAP (2024), with Adam in
    Shampoo's basis and no polar factor. The polar factor is three steps of
    :func:`ekfac.kernels.polar`: singular values below a fiftieth of the largest
    stay small. Eigenvectors below a tenth of the mean eigenvalue
    share one scaling. The damping :math:`\lambda` is smaller where the gradients of
    successive steps cancel and larger where they agree. Momentum is averaged before
    the direction is taken, and nothing after it. Norms and embeddings move as with
    AdamW. The direction is the natural one for matrices with a side of at most 8, and
    where more than half of :math:`|G|^2` lies in the differences along its diagonal, as
    in the heads of language models.
    ``docs/spectral_step.md`` derives it and says what each part is worth.

    The scalings are the best diagonal in their basis (George et al. 2018, theorem 1),
    so an old basis does little harm: it is refreshed every ``basis_interval`` steps,
    and the scalings move with it.

    Args:
        params: The model, or parameters or param groups together with ``model``.
        lr: Learning rate, in AdamW's units: the root mean square of the change per
            weight and step, but for ``grafting``.
        model: The module whose forward is called; layers are found in it.
        momentum: Decay of the gradients' average, which is taken before they are
            preconditioned; AdamW's first ``beta``.
        nesterov: How many steps ahead the average is taken in layers that are
            preconditioned, as if the gradient ``P`` stayed: ``k`` steps ahead the
            average ``M`` is ``(1 - momentum^k) P + momentum^k M``. 0 is the average
            itself, 1 Nesterov's form (with any ``k`` it is the quasi-hyperbolic
            momentum of Ma & Yarats 2019).
        weight_decay: Decoupled weight decay, as in AdamW.
        direction: ``"spectral"`` or ``"natural"``, see above. With ``"spectral"``
            norms and embeddings move as AdamW moves them.
        damping: Number added to the scalings, in the units of ``damping_mode``.
        damping_mode: ``"relative"``: in units of each layer's mean scaling.
            ``"adaptive"``: the same, times two numbers. One says how far the layer's
            successive gradients agree: the mean square of their average ``N`` over what
            averaging leaves of independent ones (0.1 of their own mean square with the
            default momentum). That is 1 where gradients are mostly noise, up to 10
            where they point the same way and in first steps, and down to 0.01 where
            they cancel, since steps along sharp directions overshoot; with other
            scalings than running averages it is not known and 1. The other is 10 for
            layers whose loss does not depend on the scale of their weights, as before
            norms: their gradients are orthogonal to their weights. ``"absolute"``: in
            units of the curvature of the mean loss.
        damping_split: ``"exact"``: ``s + damping``. ``"factored"``: also the cross
            terms of damping both factors (George 2023, A.4).
        grafting: Length of a layer's direction. ``"adaptive"``: a root mean square of 1
            where gradients are noise, and longer the more of the newest one lies along
            the average of those before: up to 3.1 where all are the same, after some
            twenty steps with the default momentum, and 1 at the first. AdamW's step
            grows alike, from 0.23 of its rate to 1. Layers before norms, which
            ``damping_mode="adaptive"`` finds by their second factors, keep a length of
            1. All averages count as made with the present momentum: after it is raised
            by much in mid-run, lengths grow at once. ``"rms"``: a root mean square of
            1. ``"sgd"``: the gradient's norm. ``None``: its own; with
            ``direction="natural"`` and ``damping_mode="absolute"`` that is the textbook
            step.
        factor_decay: Decay of the factors' averages, per update.
        scaling_decay: Decay of the scalings' averages, per update. 0 with
            ``"per_example"`` is Algorithm 1 of George et al.
        factor_interval: Steps between updates of the factors.
        basis_interval: Steps between refreshes of a layer's basis; layers take turns.
        basis_delay: Steps that a worker thread has to find a new basis, which is
            adopted after them: the decomposition then costs training no time where a
            core is idle, or the device has room. 0: the step itself finds it, as it
            does in the first ``basis_interval`` steps in any case.
        scaling_interval: Steps between updates of the scalings.
        scaling: What the scalings average. ``"running_average"`` (EKFAC-ra): the
            squared mean gradient, times the batch size. ``"per_example"``: the squared
            gradients of single examples. The first estimates the variance of one
            example's gradient plus the batch size times its squared mean, the second
            the variance plus the squared mean. The running average starts at the
            eigenvalues of ``A (x) G``, scaled to the first gradient's trace.
        fisher: ``"empirical"``: statistics of the loss's own gradients. ``"mc"``: of
            gradients for targets drawn from the model. ``"exact"``: of the gradients
            for all targets, at one backward pass for each class of each position.
        loss_reduction: Whether the loss is the ``"mean"`` over its targets or their
            ``"sum"``; read by ``"empirical"``. Over several accumulated batches,
            ``"mean"`` is the mean over all of them. On several ranks, each has its own
            loss and their gradients are averaged: with ``"mean"`` every rank's loss is
            the mean over its own targets, however many; with ``"global_mean"`` it is
            ``ranks / T`` times their sum, with ``T`` the targets of all ranks, so that
            the average is the gradient of the mean over all.
        likelihood: ``"categorical"``, ``"bernoulli"``, ``"gaussian"``, a
            :class:`ekfac.likelihoods.Likelihood`, or a callable from outputs to a
            ``torch.distributions.Distribution``. ``"mc"`` and ``"exact"`` take targets
            from it. It also says what the loss is a mean over: the positions of all
            examples for ``"categorical"``, else the examples.
        sharing: ``"expand"`` or ``"reduce"`` (Eschenhagen et al. 2023): how a layer's
            positions enter its factors. The scalings are exact in both.
        power: Of the natural direction's scalings: -1, or -0.5, as Adam has it.
        kl_clip: Bound on ``lr^2 u^T (F + damping) u`` of a step's directions ``u``, or
            ``None``.
        conv_factors: Input factors of convolutions: ``"patches"``, of all that a kernel
            sees (KFC, Grosse & Martens 2016); ``"spatially_uncorrelated"``, of its
            channels alone (SUA, same paper), as if pixels of a patch were uncorrelated:
            for a 3 x 3 kernel the factor has a ninth of the rows, for less quality. A
            bias then has a block of its own. Grouped convolutions keep their patches.
        max_dim: A side of a layer wider than this gets a diagonal factor: it stays in
            its own axes. Convolutions with such patches move as with AdamW.
        max_aspect: A side more than this many times as wide as the other, and wider
            than 64, gets a diagonal factor too: its rotations would cost more than the
            polar factor. Not in convolutions, nor if ``rank`` is given.
            ``math.inf``: no side does.
        basis_tolerance: A basis is kept at its refresh if the off-diagonal part of
            ``Q^T A Q`` is below this share of its norm.
        rank: ``None``: all eigenvectors of a factor. An integer: that many. A number
            between 0 and 1: those with eigenvalues above this share of the factor's
            mean. The complement of the kept directions then has one scaling for each
            kept direction of the other side and one for the rest, measured at every
            step. For sides wider than 64; where half of the directions or more are
            wanted, all are kept. See :mod:`ekfac.curvature.truncated`.
        precision: ``"auto"``: the polar factor of a float32 step and its rotation back
            from the basis are made of products of bfloat16 matrices where the device
            has instructions for them and that is faster: errors of 2 to 4 % (of low
            rank 7 to 14 %) and 0.4 % of the step's norm, evenly over its elements. So
            is the gradient's rotation into the basis before a spectral step, but for
            what lies along the two leading eigenvectors: an error of 0.4 % of the norm
            of the rest. Where some coordinates hold most of a gradient a step differs
            by more, with the default damping by up to a fifth in the first layer of an
            auto-encoder, with little damping by more; losses do not show it.
            ``"full"``: the layer's own type.
        storage: How factors and bases are stored. ``"full"``: as they are read.
            ``"packed"``: one half of each factor, which is symmetric. ``"bfloat16"``:
            that half, and the bases in bfloat16; factors, scalings, momentum and all
            arithmetic stay in the layer's type. ``benchmarks/memory.py`` measures both.
        memory_budget: Bytes that the layers' state may take, on all ranks together
            where they divide it. Layers give up ``"full"`` for ``"packed"``, and for
            ``"bfloat16"`` where that is too much still, those that save most first;
            ``describe()`` shows which. ``None``: all are stored as ``storage`` says.
        process_group: The ranks that train together, as in
            ``DistributedDataParallel``; ``None``: all of ``torch.distributed``, if that
            is initialised. Every rank constructs the optimizer and calls ``step``.
        gradient_workers: The fraction of the ranks that keep a layer's basis and
            scalings and precondition its gradient; the others receive the result
            (Pauloski et al. 2021, KAISA). 1: all do, and only statistics travel at a
            step. One over the number of ranks: one does, for the least memory.

    Raises:
        TypeError: If parameters are given without their model, or options of other
            optimizers (``betas``, ``fused``, ...), with what to give in their place.
        ValueError: For a value that an option does not allow, for parameters sharded in
            a way that cannot be trained, or for ranks that differ.
        RankError: If a rank does not construct the optimizer.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        model: nn.Module | None = None,
        momentum: float = 0.9,
        nesterov: int = 2,
        weight_decay: float = 0.0,
        direction: Direction = "spectral",
        damping: float = 0.1,
        damping_mode: DampingMode = "adaptive",
        damping_split: Split = "exact",
        grafting: Grafting | None = "adaptive",
        factor_decay: float = 0.95,
        scaling_decay: float = 0.9,
        factor_interval: int = 20,
        basis_interval: int = 100,
        basis_delay: int = 0,
        scaling_interval: int = 1,
        scaling: Scaling = "running_average",
        fisher: Fisher = "empirical",
        loss_reduction: LossReduction = "mean",
        likelihood: Any = "categorical",
        sharing: Sharing = "expand",
        power: float = -1,
        kl_clip: float | None = None,
        conv_factors: ConvFactors = "patches",
        max_dim: int = 2048,
        max_aspect: float = 3.0,
        basis_tolerance: float = 0.01,
        rank: float | None = None,
        precision: Precision = "auto",
        storage: Storage = "full",
        memory_budget: int | None = None,
        process_group: Any = None,
        gradient_workers: float = 1.0,
    ) -> None:
        check("scaling", scaling)  # Options takes None, for K-FAC
        options = Options(
            direction=direction,
            damping_mode=damping_mode,
            damping_split=damping_split,
            grafting=grafting,
            factor_decay=factor_decay,
            scaling_decay=scaling_decay,
            factor_interval=factor_interval,
            basis_interval=basis_interval,
            scaling_interval=scaling_interval,
            basis_delay=basis_delay,
            scaling=scaling,
            fisher=fisher,
            loss_reduction=loss_reduction,
            likelihood=resolve(likelihood),
            sharing=sharing,
            power=power,
            conv_factors=conv_factors,
            max_dim=max_dim,
            max_aspect=max_aspect,
            basis_tolerance=basis_tolerance,
            nesterov=nesterov,
            precision=precision,
            rank=rank,
            storage=storage,
            memory_budget=memory_budget,
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


class KFAC(KroneckerOptimizer):
    r"""Natural gradient with Kronecker-factored curvature (Martens & Grosse 2015).

    The block of every layer is :math:`A \otimes G`, with the factors of
    :class:`EKFAC`. The natural direction is :math:`(A \otimes G + \lambda I)^{-1}`
    times the gradient, through the factors' eigenvalues at the basis's last refresh.

    Args:
        params: As for :class:`EKFAC`, like all that is not listed here.
        direction: ``"spectral"``, with the eigenvalues of :math:`A \otimes G` for
            scalings, or ``"natural"``.
        damping_split: ``"exact"``: added to the eigenvalues of the block.
            ``"factored"``: ``(A + pi sqrt(damping) I) (x) (G + sqrt(damping)/pi I)``
            with the trace ratio ``pi`` (Martens & Grosse 2015, section 6.3).

    Raises:
        TypeError: As for :class:`EKFAC`, like the other errors.
        ValueError: For a value that an option does not allow.
        RankError: If a rank does not construct the optimizer.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        model: nn.Module | None = None,
        momentum: float = 0.9,
        nesterov: int = 2,
        weight_decay: float = 0.0,
        direction: Direction = "spectral",
        damping: float = 0.1,
        damping_mode: DampingMode = "adaptive",
        damping_split: Split = "exact",
        grafting: Grafting | None = "adaptive",
        factor_decay: float = 0.95,
        factor_interval: int = 20,
        basis_interval: int = 100,
        basis_delay: int = 0,
        fisher: Fisher = "empirical",
        loss_reduction: LossReduction = "mean",
        likelihood: Any = "categorical",
        sharing: Sharing = "expand",
        power: float = -1,
        kl_clip: float | None = None,
        conv_factors: ConvFactors = "patches",
        max_dim: int = 2048,
        max_aspect: float = 3.0,
        basis_tolerance: float = 0.01,
        precision: Precision = "auto",
        storage: Storage = "full",
        memory_budget: int | None = None,
        process_group: Any = None,
        gradient_workers: float = 1.0,
    ) -> None:
        options = Options(
            direction=direction,
            damping_mode=damping_mode,
            damping_split=damping_split,
            grafting=grafting,
            factor_decay=factor_decay,
            factor_interval=factor_interval,
            basis_interval=basis_interval,
            basis_delay=basis_delay,
            fisher=fisher,
            loss_reduction=loss_reduction,
            likelihood=resolve(likelihood),
            sharing=sharing,
            power=power,
            conv_factors=conv_factors,
            max_dim=max_dim,
            max_aspect=max_aspect,
            basis_tolerance=basis_tolerance,
            nesterov=nesterov,
            precision=precision,
            storage=storage,
            memory_budget=memory_budget,
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
