"""Preconditioning: directions from gradients in their eigenbases.

:func:`precondition` has three implementations of damping, power and length: for
stacks of layers of one shape with full bases, for a layer with a truncated basis, and
for lists of layers in a few launches on CUDA devices that have the kernels. How much
damping is added, and how two factors share it, is in :mod:`ekfac.matrices.eigen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ekfac import kernels
from ekfac.curvature import LayerCurvature
from ekfac.curvature.eigenbasis import Noise, ProjectedGradient
from ekfac.curvature.options import Grafting, Options
from ekfac.curvature.stacks import Stack
from ekfac.curvature.state import start_momentum
from ekfac.curvature.truncated import (
    collapsed,
    combine_,
    coordinates,
    norm_of,
    refined,
    spread,
)
from ekfac.layers import Block
from ekfac.matrices.eigen import (
    absolute_damping,
    cross_terms,
    damp_,
    damping_ratio,
    floor_,
    nonzero_damping,
)

OPS = torch.ops.ekfac

# Sides up to this width are too short for singular values to say much.
SMALL_SIDE = 8
POLAR_STEPS = 3
# Where gradients cancel whole, damping still bounds the step in directions never seen.
LEAST_AGREEMENT = 0.01


@dataclass
class Direction:
    """A layer's direction of update.

    Attributes:
        layer: The layer.
        matrix: ``u`` ``[b, d_out, d_in]``.
        form: ``u^T (F + damping) u``, if there is a KL clip.
        parts: The parameters' parts of the matrix, if they are known.
    """

    layer: LayerCurvature
    matrix: Tensor
    form: Tensor | None = None
    parts: list[Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        """Return what travels from the rank that computed it."""
        return [self.matrix] if self.form is None else [self.matrix, self.form]


def precondition(
    gradients: Sequence[ProjectedGradient],
    group: Mapping[str, Any],
    options: Options,
    workspace: kernels.Workspace,
) -> list[Direction]:
    """Return the directions of layers of one param group.

    Args:
        gradients: Of layers, and of stacks of layers of one treatment, in their bases;
            overwritten.
        group: Gives ``damping``, ``momentum`` and ``kl_clip``.
        options: The optimizer's.
        workspace: Holds the directions until the next step.

    Returns:
        One for each layer; without values where another rank works on the layer.
    """
    lists: dict[tuple[torch.device, Treatment], list[ProjectedGradient]] = {}
    directions: list[Direction] = []
    for one in gradients:
        layer = one.layers[0]
        if one.parts is None:
            directions.append(_elsewhere(layer, group))
        elif one.scalings_sums is not None:
            key = layer.device, treatment(layer, options)
            lists.setdefault(key, []).append(one)
        elif not layer.complete:
            directions.append(_truncated(one, group, options, workspace))
        else:
            directions += _full(one, group, options, workspace)
    for (_, kind), members in lists.items():
        implementation = _spectral_list if kind == "spectral" else _natural_list
        directions += implementation(members, group, options)
    return directions


def _elsewhere(layer: LayerCurvature, group: Mapping[str, Any]) -> Direction:
    """Return an empty direction, which another rank fills."""
    like = layer.averages["A"].weight
    form = None if group["kl_clip"] is None else like.new_empty(())
    return Direction(layer, like.new_empty(layer.block.shape), form)


# -- scalings and damping --------------------------------------------------------------


def scalings_of(
    layer: LayerCurvature, options: Options, out: Tensor | None = None
) -> Tensor:
    """Return a layer's scalings, or for K-FAC its Kronecker eigenvalues.

    Degenerate eigenspaces share one, see :meth:`LayerCurvature.share_`.
    """
    scalings = None
    if options.scaling is not None:
        scalings = layer.averages["s"].read(out)
    scalings = layer.kronecker_scalings(out) if scalings is None else scalings
    return layer.share_(scalings, pooled=treatment(layer, options) == "spectral")


def stacked_scalings(stack: Stack, options: Options, out: Tensor) -> Tensor:
    """Return :func:`scalings_of` layers of one treatment, in ``out``.

    That is ``[k b, d_out, d_in]``.
    """
    layers = stack.layers
    empty = any(layer.averages["s"].empty for layer in layers)
    if options.scaling is None or empty:
        parts = out.split(layers[0].block.shape[0])
        for layer, part in zip(layers, parts, strict=True):
            scalings_of(layer, options, part)
        return out
    with stack.average("s") as (totals, weights):
        torch.div(totals, weights, out=out)
    pooled = treatment(layers[0], options) == "spectral"
    stack.share_(out, pooled=pooled)
    return out


def added_damping(
    layers: Sequence[LayerCurvature],
    noise: Noise | None,
    squares: Tensor,
    means: Tensor,
    group: Mapping[str, Any],
    options: Options,
) -> Tensor | float:
    """Return the absolute damping of layers, which note how far gradients agree.

    Args:
        layers: ``k`` of them.
        noise: Of their gradients, if scalings are averages of their squares.
        squares: Mean squares of the averaged gradients, ``[k]``.
        means: Of the layers' scalings, ``[k]``.
        group: Gives ``damping`` and ``momentum``.
        options: The optimizer's.
    """
    mode, factor = options.damping_mode, torch.ones_like(means)
    if mode == "adaptive":
        factor = scale_factors(layers, means)
        if noise is not None:
            newest, older = squared_weights(group["momentum"], options.nesterov)
            mixed = (newest * noise.newest + older * noise.earlier).to(means)
            agreement = agreement_of(squares, means * mixed, newest + older)
            for layer, own in zip(layers, agreement.unbind(), strict=True):
                layer.agreement = own
            factor = factor * agreement
    added = absolute_damping(group["damping"], means, mode, factor)
    return nonzero_damping(added) if isinstance(added, Tensor) else added


def scale_factors(layers: Sequence[LayerCurvature], like: Tensor) -> Tensor:
    """Return what layers free of scale multiply damping by, ``[k]``; the others 1."""
    return torch.stack([layer.scale_factor for layer in layers]).to(like)


def agreement_of(squares: Tensor, independent: Tensor, share: float) -> Tensor:
    """Return how far the gradients of successive steps agree, layer by layer.

    The mean square of a layer's averaged gradient, over what averaging would leave of
    independent ones. It is 1 where gradients are mostly noise, larger (up to 10 with a
    momentum of 0.9) where they point the same way, as in the first steps, and smaller
    where they cancel: steps along the sharp directions overshoot. It is at least
    :data:`LEAST_AGREEMENT`.

    Args:
        squares: Mean squares of the averaged gradients.
        independent: What they would be of independent gradients.
        share: The sum of the squared weights of the gradients in the average; the
            agreement of gradients that are the same is its inverse.
    """
    tiny = torch.finfo(squares.dtype).tiny
    return (squares / independent.clamp(min=tiny)).clamp_(LEAST_AGREEMENT, 1 / share)


def squared_weights(momentum: float, nesterov: int) -> tuple[float, float]:
    """Return the squared weight of the newest gradient, and the sum of the others'.

    Those that gradients have in :func:`average_`: ``share (1 - momentum) momentum^k``
    of one that came ``k`` steps ago, ``share = momentum^nesterov``, and ``1 - share``
    more of the newest.
    """
    share = momentum**nesterov
    older = (share * momentum) ** 2 * (1 - momentum) / (1 + momentum)
    return (1 - share * momentum) ** 2, older


def cross_terms_of(layer: LayerCurvature, options: Options) -> Tensor | None:
    """Return a layer's cross terms of factored damping, ``None`` for exact damping."""
    if options.damping_split == "exact":
        return None
    values = layer.values("A"), layer.values("G")
    if options.scaling is not None:  # George 2023, A.4 has no pi
        return cross_terms(*values)
    # Groups of a convolution, features of a norm are blocks of their own.
    spectra = (layer.eigenvalues_A, layer.eigenvalues_G)
    means = (x.mean(dim=-1)[:, None, None] for x in spectra)
    return cross_terms(*values, damping_ratio(*means))


# -- length ----------------------------------------------------------------------------


def graft_factor(
    length: Tensor, count: float | Tensor, norm: Tensor | None, grafting: Grafting
) -> Tensor:
    """Return the factors that give directions the length that ``grafting`` asks for.

    ``"rms"``: a root mean square of 1, so that the learning rate is the change per
    weight and step. ``"adaptive"``: that too, see :func:`stretch`. ``"sgd"``: the
    gradient's norm (Agarwal et al. 2020, section 3). A direction of no length keeps
    none, though the quotient would overflow and 0 times it be NaN; nor has one any
    whose gradient's norm overflows.

    Args:
        length: Norms of the directions.
        count: How many elements each has.
        norm: Norms of the gradients; read by ``"sgd"``.
        grafting: Which of them.
    """
    target = norm if grafting == "sgd" else count**0.5
    assert target is not None
    tiny = torch.finfo(length.dtype).tiny
    if isinstance(target, Tensor):
        return torch.where(length > tiny * target, target / length, 0.0)
    factors: Tensor = target / length.clamp(min=tiny * max(1.0, target))
    return factors


# -- momentum --------------------------------------------------------------------------


def average_(
    stack: Stack, gradients: Tensor, momentum: float, options: Options
) -> Tensor | float:
    """Add gradients to the layers' momentum, and overwrite them by its averages.

    The averages are bias-corrected, and those to come if the gradient stayed: ``k``
    steps ahead ``(1 - momentum^k) P + momentum^k M`` of the newest gradient ``P`` and
    the average ``M``. With a momentum of 0 the gradients stay as they are.

    Args:
        stack: The layers.
        gradients: Of all of them, ``[k b, d_out, d_in]``, in the coordinates of their
            momentum.
        momentum: Decay of the averages.
        options: Give how many steps ahead, and the grafting.

    Returns:
        How many times longer directions are than their grafting says: ``[k]``, or 1.
    """
    if momentum == 0:
        return 1.0
    start_momentum(stack.layers)
    adaptive = options.grafting == "adaptive"
    aligned = alignment(stack, gradients) if adaptive else None
    if aligned is not None and options.damping_mode == "adaptive":
        # The longer their weights, the less a step of layers free of scale turns them.
        aligned.masked_fill_(scale_factors(stack.layers, aligned) > 1, 0)
    totals, weights = stack.add_to_momentum_(gradients, momentum)
    share = momentum**options.nesterov
    gradients.mul_(1 - share).addcdiv_(totals, weights, value=share)
    if aligned is None:
        return 1.0
    return stretch(aligned, weights.view(-1), momentum, options.nesterov)


def alignment(stack: Stack, gradients: Tensor) -> Tensor:
    """Return how much of new gradients lies along the averages of those before.

    With the newest gradient ``P`` and the average ``M`` of the earlier ones ``<P, M> /
    max(|P|^2, |M|^2)``, between 0 and 1. Of a mean gradient and independent noise that
    is the mean's share of the square: 1 without noise, 0 without a mean. It is 0 where
    a step has overshot and the gradient turns, and at the first step.

    Args:
        stack: ``k`` layers.
        gradients: ``[k b, d_out, d_in]``, in the coordinates of their momentum.
    """
    by_layer = len(stack), -1
    with stack.average("momentum") as (totals, weights):
        sums, newest = totals.unflatten(0, by_layer), gradients.unflatten(0, by_layer)
        products = kernels.inner_products(newest, sums)
        sizes = [torch.linalg.vector_norm(x, dim=(1, 2, 3)) for x in (newest, sums)]
        scale = weights.view(-1)
        largest = torch.maximum(sizes[0] * scale, sizes[1])
        aligned = products / largest * (scale / largest)
    # 0 / 0 of no gradient or no average, and gradients whose squares overflow.
    return aligned.nan_to_num_(0.0, 0.0, 0.0).clamp_(0, 1)


def stretch(aligned: Tensor, weights: Tensor, momentum: float, nesterov: int) -> Tensor:
    """Return how many times longer steps are than those along independent gradients.

    As AdamW's: the root mean square of ``|m| / sqrt(v)`` is that of an average over
    that of its gradients. Of gradients of a mean and independent noise it is the root
    of ``aligned + (1 - aligned) n``, with ``n`` the sum of their squared weights in the
    average; of independent ones the root of ``n``. At the first step ``n`` is 1.

    Args:
        aligned: See :func:`alignment`; ``[k]``.
        weights: Of the averages, ``1 - momentum^t`` after ``t`` steps.
        momentum: Their decay.
        nesterov: How many steps ahead they are taken.
    """
    squares = sum_of_squared_weights(momentum, nesterov, weights)
    longer: Tensor = (aligned * (1 / squares - 1) + 1).sqrt_()
    return longer


def sum_of_squared_weights(momentum: float, nesterov: int, weights: Tensor) -> Tensor:
    """Return the sum of gradients' squared weights in averages of ``t`` steps.

    In a bias-corrected average they are ``(1 - momentum) momentum^k / (1 -
    momentum^t)`` of one that came ``k`` steps ago.

    Args:
        momentum: Decay of the averages.
        nesterov: How many steps ahead they are taken.
        weights: Their ``1 - momentum^t``.
    """
    share, newest = momentum**nesterov, (1 - momentum) / weights
    every = newest * (2 - weights) / (1 + momentum)
    return share**2 * every + (1 - share) * (1 - share + 2 * share * newest)


# -- three implementations of one function ---------------------------------------------


Treatment = Literal["spectral", "natural", "adamw"]


def moves_as_adamw(block: Block, options: Options) -> bool:
    """Return whether a block moves as AdamW moves it, whatever its statistics are.

    With ``direction="spectral"`` norms, embeddings, and convolutions with patches wider
    than ``max_dim``, whose polar factors would cost as much as the whole network.
    """
    wide = block.adapter.uneven and any(block.diagonal)
    matrix = not (block.exact or block.adapter.diagonal_input or wide)
    return options.direction == "spectral" and not matrix


def treatment(layer: LayerCurvature, options: Options) -> Treatment:
    """Return which direction a layer takes.

    With ``direction="spectral"`` that is the spectral one, but for layers that
    :func:`moves_as_adamw` names and for two kinds that take the natural one. Layers
    with up to ``SMALL_SIDE`` rows or columns have too few singular values (for a single
    row the two directions are the same). Where a few outputs hold most of ``G``, as the
    frequent ones of the words that a language model's head scores, equal steps along
    all singular vectors would be spent on outputs that hardly occur.
    """
    if moves_as_adamw(layer.block, options):
        return "adamw"
    thin = min(layer.block.shape[1:]) <= SMALL_SIDE
    return "natural" if thin or layer.concentrated else options.direction


def rounds(layer: LayerCurvature, options: Options) -> bool:
    """Return whether a layer's gradient may be rounded on the way into its basis.

    Not before the natural direction, which divides by scalings and multiplies what
    rounding adds to small coordinates by far more than the root of the spectral one.
    """
    return options.precision != "full" and treatment(layer, options) == "spectral"


def _polar(matrices: Tensor, options: Options) -> Tensor:
    """Return approximate polar factors, as precise as the options ask."""
    precise = options.precision == "full"
    return kernels.polar(matrices, POLAR_STEPS, precise=precise)


def _full(
    one: ProjectedGradient,
    group: Mapping[str, Any],
    options: Options,
    workspace: kernels.Workspace,
) -> list[Direction]:
    """Return the directions of layers of one stack with full bases."""
    layers, coordinates = one.layers, one.kept
    longer = average_(one.stack, coordinates, group["momentum"], options)
    scalings = stacked_scalings(
        one.stack, options, workspace.take("scalings", coordinates)
    )
    singular = _damp_(one, scalings, group, options)
    if singular is not None:  # directions never seen: 0 / 0 is 0
        coordinates.masked_fill_(singular, 0)
    if treatment(layers[0], options) == "spectral":
        root = torch.rsqrt(scalings, out=workspace.take("root", scalings))
        coordinates = _polar(coordinates.mul_(root), options).mul_(root)
    else:
        power = -options.power
        coordinates.div_(scalings if power == 1 else scalings.pow(power))
    return rotated(one, coordinates, scalings, longer, group, options, workspace)


def _damp_(
    one: ProjectedGradient,
    scalings: Tensor,
    group: Mapping[str, Any],
    options: Options,
) -> Tensor | None:
    """Damp a stack's scalings in place; see :func:`ekfac.matrices.eigen.damp_`.

    The stack's coordinates are averaged already.
    """
    layers = one.layers
    by_layer = scalings.unflatten(0, (len(layers), -1))
    squares = mean_squares(one.kept.unflatten(0, (len(layers), -1)))
    means = by_layer.mean(dim=(1, 2, 3))
    added = added_damping(layers, one.noise, squares, means, group, options)
    cross = [cross_terms_of(layer, options) for layer in layers]
    present = [terms for terms in cross if terms is not None]
    singular = damp_(
        scalings,
        added.view(-1, 1, 1) if isinstance(added, Tensor) else added,
        torch.cat(present) if present else None,
    )
    for part in by_layer:
        floor_(part, group["damping"])
    return singular


def mean_squares(by_layer: Tensor) -> Tensor:
    """Return the mean squares ``[k]`` of ``[k, b, d_out, d_in]``."""
    norms: Tensor = torch.linalg.vector_norm(by_layer, dim=(1, 2, 3))
    return norms.square_().div_(by_layer[0].numel())


def rotated(
    one: ProjectedGradient,
    coordinates: Tensor,
    scalings: Tensor,
    longer: Tensor | float,
    group: Mapping[str, Any],
    options: Options,
    workspace: kernels.Workspace,
) -> list[Direction]:
    """Return directions of the grafted length from coordinates in the layers' bases.

    Args:
        one: The gradients of a stack of layers.
        coordinates: ``[k b, d_out, d_in]``; overwritten.
        scalings: Damped, of the same shape; read for the KL clip.
        longer: What :func:`average_` returned.
        group: Gives ``kl_clip``.
        options: The optimizer's.
        workspace: Holds the result.
    """
    layers = one.layers
    by_layer = coordinates.unflatten(0, (len(layers), -1))
    if options.grafting is not None:  # the bases are orthogonal
        lengths = torch.linalg.vector_norm(by_layer, dim=(1, 2, 3))
        count = by_layer[0].numel()
        factors = graft_factor(lengths, count, one.norms, options.grafting) * longer
        by_layer.mul_(factors.view(-1, 1, 1, 1))
    forms: list[Tensor | None] = [None] * len(layers)
    if group["kl_clip"] is not None:
        squares = (coordinates.square() * scalings).unflatten(0, (len(layers), -1))
        forms = list(squares.sum(dim=(1, 2, 3)).unbind())
    result = _rotated_back(one.stack, coordinates, options, workspace)
    matrices = result.split(layers[0].block.shape[0])
    columns = zip(layers, matrices, forms, one.stack.unpack(result), strict=True)
    return [Direction(*column) for column in columns]


def _truncated(
    gradient: ProjectedGradient,
    group: Mapping[str, Any],
    options: Options,
    workspace: kernels.Workspace,
) -> Direction:
    """Return the direction of a layer with a truncated basis."""
    (layer,), parts = gradient.layers, gradient.parts
    assert parts is not None
    scalings = scalings_of(layer, options, workspace.take("scalings", parts.roots))
    longer = average_(gradient.stack, parts.gradient, group["momentum"], options)
    if group["momentum"] != 0:
        parts = coordinates(layer, parts.gradient)
    means = layer.mean(scalings).unsqueeze(0)
    squares = mean_squares(parts.gradient.unsqueeze(0))
    damping = added_damping([layer], gradient.noise, squares, means, group, options)
    if isinstance(damping, Tensor):
        damping = damping.squeeze(0)
    spectral = treatment(layer, options) == "spectral"
    cross = cross_terms_of(layer, options)
    eigenvalues, weights = scalings, None
    if not spectral:  # there the complement is a pool, as are small eigenvalues
        eigenvalues, weights = refined(layer, scalings)
        cross = None if cross is None else spread(layer, cross)
    factors = torch.ones_like(eigenvalues)
    singular = damp_(eigenvalues, damping, cross)
    floor_(eigenvalues, group["damping"])
    if singular is not None:
        factors.masked_fill_(singular, 0)
    count = parts.gradient.numel()
    norm = None if gradient.norms is None else gradient.norms[0]
    power = 0.5 if spectral else -options.power
    factors.div_(eigenvalues if power == 1 else eigenvalues.pow(power))
    multipliers = factors if weights is None else collapsed(layer, factors, weights)
    if spectral:
        whitened = _polar(combine_(layer, parts, multipliers), options)
        parts = coordinates(layer, parts.gradient.copy_(whitened))
    form = None
    if group["kl_clip"] is not None:
        squares = (multipliers * parts.roots).square_()
        if weights is not None:
            eigenvalues = collapsed(layer, eigenvalues, weights)
        squares.mul_(eigenvalues)
        form = layer.mean(squares) * count
    direction = combine_(layer, parts, multipliers)
    if options.grafting is not None:
        # Squares of the coordinates would not do: the complement's share is a
        # difference, and its multiplier would amplify the rounding error.
        length = norm_of(direction)
        factor = graft_factor(length, count, norm, options.grafting) * longer
        direction.mul_(factor)
        form = None if form is None else form * factor.square()
    return Direction(layer, direction, form)


@dataclass
class _List:
    """Layers of one device with full bases, in stacks of one shape.

    Sums and factors are vectors with an entry for each layer; nothing waits for the
    device.

    Attributes:
        stacks: The stacks.
        scalings: Of every layer in the stacks' order, times its weight.
        weights: Divisors of the scalings.
        damping: Added to the quotients.
        longer: What :func:`average_` returned, of every layer.
    """

    stacks: list[ProjectedGradient]
    scalings: list[Tensor]
    weights: Tensor
    damping: Tensor
    longer: Tensor | float

    @classmethod
    def of(
        cls,
        gradients: Sequence[ProjectedGradient],
        group: Mapping[str, Any],
        options: Options,
    ) -> _List:
        """Return a list of gradients, averaged as the group's momentum says."""
        momentum = group["momentum"]
        own = [average_(one.stack, one.kept, momentum, options) for one in gradients]
        known = [longer for longer in own if isinstance(longer, Tensor)]
        layers = [layer for one in gradients for layer in one.layers]
        projected = [part for one in gradients for part in one.by_layer()]
        sums = torch.cat([t for g in gradients if (t := g.scalings_sums) is not None])
        if options.scaling is None:
            scalings = [layer.kronecker_scalings() for layer in layers]
            weights = torch.ones_like(sums)
        else:
            averages = [layer.averages["s"] for layer in layers]
            scalings = [average.total for average in averages]
            weights = torch.stack([average.weight for average in averages])
        means = _per_element(sums / weights, projected)
        norms = torch.stack(torch._foreach_norm(projected))
        squares = _per_element(norms.square_(), projected)
        added = added_damping(
            layers, gradients[0].noise, squares, means, group, options
        )
        damping = torch.zeros_like(means) + added
        pooled = treatment(layers[0], options) == "spectral"  # as for all of them
        pairs = zip(layers, scalings, strict=True)
        scalings = [layer.shared(s, pooled=pooled) for layer, s in pairs]
        longer = torch.cat(known) if known else 1.0
        return cls(list(gradients), scalings, weights, damping, longer)

    def projected(self) -> list[Tensor]:
        """Return the layers' coordinates in the stacks' order."""
        return [part for one in self.stacks for part in one.by_layer()]

    def grafts(self, squares: Tensor, options: Options) -> Tensor:
        """Return the graft factors of directions with these sums of squares."""
        if options.grafting == "sgd":
            norms = [n for one in self.stacks if (n := one.norms) is not None]
            return graft_factor(squares.sqrt(), 1.0, torch.cat(norms), "sgd")
        length = _per_element(squares, self.projected()).sqrt()
        return graft_factor(length, 1.0, None, "rms") * self.longer

    def directions(
        self, factors: Tensor, forms: Tensor, group: Mapping[str, Any], options: Options
    ) -> list[Direction]:
        """Return the scaled coordinates, rotated back to the parameters' axes."""
        clipped, directions = group["kl_clip"] is not None, []
        sizes = [len(one.layers) for one in self.stacks]
        parts = factors.split(sizes), forms.split(sizes)
        for one, own, values in zip(self.stacks, *parts, strict=True):
            by_layer = one.kept.unflatten(0, (len(one.layers), -1))
            by_layer.mul_(own.view(-1, 1, 1, 1))
            result = _rotated_back(one.stack, one.kept, options)
            matrices = result.split(one.layers[0].block.shape[0])
            directions += [
                Direction(layer, matrix, form if clipped else None)
                for layer, matrix, form in zip(
                    one.layers, matrices, values.unbind(), strict=True
                )
            ]
        return directions


def _natural_list(
    gradients: Sequence[ProjectedGradient], group: Mapping[str, Any], options: Options
) -> list[Direction]:
    """Return natural directions of layers of one device, in one launch."""
    listed = _List.of(gradients, group, options)
    projected = listed.projected()
    # Averages are stored times their weight, so the damping is multiplied by it.
    damping = listed.damping * listed.weights
    sums = OPS.precondition_(projected, listed.scalings, damping, options.power)
    factors = listed.weights.pow(-options.power)
    if options.grafting is not None:
        factors = listed.grafts(sums[:, 1], options)
    forms = sums[:, 0] * factors.square() / listed.weights
    return listed.directions(factors, forms, group, options)


def _spectral_list(
    gradients: Sequence[ProjectedGradient], group: Mapping[str, Any], options: Options
) -> list[Direction]:
    """Return spectral directions of layers of one device, in one call."""
    listed = _List.of(gradients, group, options)
    projected = listed.projected()
    scales = torch.stack([listed.weights, listed.damping], dim=1)
    precise = options.precision == "full"
    sums = OPS.spectral_(projected, listed.scalings, scales, POLAR_STEPS, precise)
    factors = torch.ones_like(listed.weights)
    if options.grafting is not None:
        factors = listed.grafts(sums[:, 1], options)
    return listed.directions(factors, sums[:, 0] * factors.square(), group, options)


def _per_element(sums: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return sums over tensors' elements divided by how many there are.

    The numbers of elements are not copied to the device.
    """
    sizes = [float(tensor.numel()) for tensor in tensors]
    return torch.stack(torch._foreach_div(list(sums.unbind()), sizes))


def _rotated_back(
    stack: Stack,
    coordinates: Tensor,
    options: Options,
    workspace: kernels.Workspace | None = None,
) -> Tensor:
    """Return a stack's coordinates ``[k b, d_out, d_in]`` in the parameters' axes."""
    return kernels.rotate_back(
        coordinates,
        stack.basis("G"),
        stack.basis("A"),
        precise=options.precision == "full",
        workspace=workspace,
        name=f"direction of {stack.layers[0].name}",
    )
