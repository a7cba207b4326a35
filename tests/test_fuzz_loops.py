"""Drawn models, loops and options against algebra from single examples' gradients.

What is drawn and the algebra are in :mod:`random_loops`. Tolerances are a multiple of
the rounding error of the least precise numbers that a model computes with, or of what
the algebra itself is off by in single precision: gradients behind a norm of two
features are differences of nearly equal numbers, in whatever order they are computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from random_loops import (
    IN_PLACE,
    PENALTY,
    Case,
    Expected,
    Net,
    Parameters,
    batch_of,
    draw_case,
    expected,
    has_zero_gradients,
    packed_gradients,
    whole_gradients,
)
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ekfac import EKFAC, KFAC
from ekfac.curvature import LayerCurvature
from ekfac.likelihoods import Categorical
from ekfac.optim.optimizer import KroneckerOptimizer

LR = 0.1
# Rounding errors that a statistic may be off by, of its norm.
ERRORS = {"float64": 1e6, "float32": 1e3, "float16": 64, "bfloat16": 32}
# How many times the error of the algebra in single precision.
ROUNDED = 4


def tolerance(case: Case) -> float:
    """Return how far off a statistic may be, of its norm."""
    least = "bfloat16" if case.precision == "autocast" else str(case.dtype)[6:]
    return ERRORS[least] * case.eps


def assert_near(
    found: Tensor,
    want: Tensor,
    allowed: float,
    what: str,
    rounded: Callable[[], Tensor] | None = None,
) -> None:
    """Compare two tensors by the norm of their difference.

    Args:
        found: Of the package.
        want: Of the algebra.
        allowed: Of the norm of ``want``.
        what: Their name.
        rounded: Returns what the algebra gives in the model's own precision.
    """
    assert found.shape == want.shape, (what, found.shape, want.shape)
    gap = float((found.double() - want).norm())
    size = float(want.norm()) + 1e-3
    if gap > allowed * size and rounded is not None:
        allowed = ROUNDED * float((rounded().double() - want).norm()) / size
    assert gap <= allowed * size, f"{what} is off by {gap / size:.1e}"


# -- the loop --------------------------------------------------------------------------


class Loop:
    """A user's training loop with the case's model.

    Attributes:
        pseudo: The sampled gradients that the passes that count were sent.
        squares: AdamW's averages of squares, with their weights.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(case.seed)
        self.net = Net(case).to(case.dtype)
        if case.seed % 3 == 0:
            self.net.hook_outputs()
        make: type[KroneckerOptimizer] = KFAC if case.method == "KFAC" else EKFAC
        own: dict[str, Any] = {}
        if make is EKFAC:
            scaling = case.method.replace(" ", "_")
            own = {"scaling": scaling, "scaling_decay": 0.0}
        factors = "spatially_uncorrelated" if case.uncorrelated else "patches"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = make(
                self.net,
                lr=LR,
                momentum=0.0,
                damping=case.damping,
                damping_mode="absolute",
                grafting=None,
                factor_decay=0.0,
                direction=case.direction,
                fisher=case.fisher,
                loss_reduction=case.reduction,
                sharing=case.sharing,
                conv_factors=factors,
                factor_interval=1,
                basis_interval=case.basis_interval,
                basis_tolerance=0.0,
                precision="full",
                **own,
            )
        if case.seed % 3:
            self.net.hook_outputs(first=case.seed % 3 == 2)
        self.scaler: Any = None
        if case.precision == "scaler":
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        self.pseudo: list[Tensor] = []
        self.squares: dict[str, tuple[Tensor, float]] = {}
        self.counting = False

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.case.precision == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()

    def loss(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Return the loss of a forward pass, without the penalty."""
        with self.autocast():
            out = self.net(x)
        out = out.float() if self.case.precision == "autocast" else out
        return F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction=reduction)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Note what is sampled in the passes within."""
        self.counting = True
        try:
            yield
        finally:
            self.counting = False

    def sampled(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the likelihood's method, watched."""

        def watched(*args: Any) -> Tensor:
            h = draw(*args)
            if self.counting:
                self.pseudo.append(h.double())
            return h

        return watched

    def backward(self, x: Tensor, y: Tensor) -> None:
        """Add the gradient of one micro-batch."""
        case = self.case
        if case.loop == "penalty":
            leaf = x.clone().requires_grad_()
            loss = self.loss(leaf, y, "sum")
            slope = torch.autograd.grad(loss, leaf, create_graph=True)[0]
            loss = loss + PENALTY * slope.square().sum()
            loss = loss / y.numel() if case.reduction == "mean" else loss
        else:
            loss = self.loss(x, y, case.reduction)
        if case.reduction == "mean":
            loss = loss / case.micro
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        with self.counted():
            loss.backward(retain_graph=case.loop == "retained")

    def backward_all(self, x: Tensor, y: Tensor) -> None:
        """Make the gradients of one step."""
        case = self.case
        self.optimizer.zero_grad()
        self.pseudo.clear()
        if case.loop == "sharpness":
            self.backward(x, y)
            self.optimizer.zero_grad(set_to_none=bool(case.seed % 2))
            self.pseudo.clear()
        parts = zip(x.chunk(case.micro), y.chunk(case.micro), strict=True)
        for number, (some, target) in enumerate(parts):
            for name in case.extras:
                self.extra(name, some, target, first=number == 0)
            self.backward(some, target)
        for name in case.extras:
            self.extra(name, x, y, first=False)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Do one step."""

        def closure() -> float:
            self.backward_all(x, y)
            return 0.0

        if self.case.closure:
            self.optimizer.step(closure)
            return
        self.backward_all(x, y)
        if self.case.loop == "clipped":
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def extra(self, name: str, x: Tensor, y: Tensor, *, first: bool) -> None:
        """Do a pass that must leave no trace."""
        case, net = self.case, self.net
        params = [p for p in net.parameters() if p.requires_grad]

        def loss() -> Tensor:
            return self.loss(x, y) * 7

        if name == "grad":
            torch.autograd.grad(loss(), params)
        elif name == "grad_output":
            torch.autograd.grad(net(x).flatten()[0] * 100, params[-1])
        elif name in ("graph", "curvature product"):
            slopes = torch.autograd.grad(loss(), params, create_graph=True)
            total = sum(g.square().sum() for g in slopes)
            torch.autograd.grad(total, params, allow_unused=True)
        elif name == "eval":
            net.eval()
            torch.autograd.grad(loss(), params)
            net.train()
        elif name == "no_grad":
            with torch.no_grad():
                net(x)
        elif name == "discarded" and first:
            loss().backward()
            self.optimizer.zero_grad(set_to_none=bool(case.seed % 2))
        elif name == "deleted":
            loss()
        elif name in ("inputs", "adversarial") and x.is_floating_point():
            leaf = x.clone().requires_grad_()
            value = self.loss(leaf, y)
            if name == "inputs":
                value.backward(inputs=[leaf])
            elif first and case.seed % 2:
                value.backward()
                net.zero_grad(set_to_none=False)
            else:
                torch.autograd.grad(value, leaf)
        elif name == "paused":
            with self.optimizer.capture.paused():
                torch.autograd.grad(loss(), params)
        elif name == "functional" and case.loop != "checkpointed":
            # A checkpoint is recomputed with the model's own parameters.
            copies = {n: p.detach().clone() for n, p in net.named_parameters()}
            for copied in copies.values():
                copied.requires_grad_()
            functional_call(net, copies, (x,)).sum().backward()
        elif name == "vmap" and self.maps():
            fixed = {n: p.detach() for n, p in net.named_parameters()}
            vmap(lambda one: functional_call(net, fixed, (one[None],)))(x)

    def maps(self) -> bool:
        """Return whether torch can vmap the model."""
        case = self.case
        plain = not any(c.scaled or c.hook for c in case.layers)
        plain = plain and all(c.kind != "attention" for c in case.layers)
        in_place = any(name in IN_PLACE for name, _ in case.operations)
        return plain and not in_place and case.loop != "checkpointed"


# -- the comparison --------------------------------------------------------------------


def doubles(net: Net) -> Parameters:
    return {n: p.detach().double().clone() for n, p in net.named_parameters()}


def check(seed: int) -> None:
    """Run one case and compare it with the algebra."""
    case = draw_case(seed)
    loop = Loop(case)
    with (
        warnings.catch_warnings(),
        sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
        mock.patch.object(Categorical, "sampled", loop.sampled(Categorical.sampled)),
    ):
        warnings.simplefilter("ignore")
        for step in range(case.steps):
            check_step(loop, step)
    loop.optimizer.close()


def check_step(loop: Loop, number: int) -> None:
    """Run one step and compare it."""
    case, net = loop.case, loop.net
    x, y = batch_of(case, number)
    before = doubles(net)
    loop.step(x, y)
    exact = x.double() if x.is_floating_point() else x
    _, gradients = whole_gradients(case, before, exact, y)
    if has_zero_gradients(case, before, exact, y):
        return  # as those of targets that do not count
    allowed = tolerance(case)
    own: Parameters = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            own[name] = parameter.grad.double()
    single = {name: value.float() for name, value in before.items()}
    is_single = case.precision in ("float32", "scaler")

    @cache
    def rounded_gradients() -> Parameters:
        return whole_gradients(case, single, x, y)[1]

    if case.loop != "clipped":
        found, want = flat(own, own), flat(gradients, own)
        text = f"the gradient of {case}"
        rounded = (lambda: flat(rounded_gradients(), own)) if is_single else None
        assert_near(found, want, allowed, text, rounded)
    pseudo = None
    if case.fisher == "mc":
        assert len(loop.pseudo) == case.micro, f"{len(loop.pseudo)} draws: {case}"
        pseudo = torch.cat(loop.pseudo)
    wanted = expected(case, before, exact, y, pseudo, {**before, **own})

    @cache
    def rounded_statistics() -> dict[str, Expected]:
        given = {**single, **rounded_gradients()}
        return expected(case, single, x, y, pseudo, given)

    after = doubles(net)
    moved = {name: before[name] - after[name] for name in before}
    assert set(loop.optimizer.curvature) == set(wanted), case
    for name, want in wanted.items():
        layer = loop.optimizer.curvature[name]
        rounded = partial(lambda name: rounded_statistics()[name], name)
        compare = Comparison(case, layer, want, rounded if is_single else None)
        compare.factors()
        compare.scalings(len(x), y.numel())
        if case.direction == "natural" or is_matrix(layer):
            compare_step(case, layer, want, packed(case, name, want, moved))
    if case.direction == "spectral":
        compare_adamw(loop, own, moved)


def flat(tensors: Parameters, names: Iterable[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in names])


def compare_adamw(loop: Loop, gradients: Parameters, moved: Parameters) -> None:
    """Compare the parameters of norms and embeddings with AdamW's direction.

    Without grafting it has the gradient's norm.
    """
    matrices = {
        name
        for layer in loop.optimizer.curvature.values()
        if is_matrix(layer)
        for name in layer.parameter_names
    }
    for name in gradients.keys() - matrices:
        gradient = gradients[name]
        square, weight = loop.squares.get(name, (torch.zeros_like(gradient), 0.0))
        square = 0.999 * square + 0.001 * gradient.square()
        loop.squares[name] = square, 0.999 * weight + 0.001
        step = gradient / ((square / loop.squares[name][1]).sqrt() + 1e-8)
        step *= LR * gradient.norm() / step.norm().clamp(min=1e-30)
        gap = float((moved[name] - step).norm())
        rounding = float(torch.finfo(loop.case.dtype).eps) * 8
        bound = 1e-5 * float(step.norm()) + rounding * gradient.numel() ** 0.5
        assert gap <= bound, f"AdamW's step of {name} is off by {gap:.1e}: {loop.case}"


def packed(case: Case, name: str, want: Expected, tensors: Parameters) -> Tensor:
    """Return a block's part of tensors, ``[b, d_out, d_in]``."""
    bias_alone = name.endswith(".bias")
    weight, bias = packed_gradients(case, name.removesuffix(".bias"), tensors)
    if bias_alone:
        assert bias is not None
        return bias
    if len(want.gradient) != len(weight):  # taps
        return weight[0].unflatten(-1, (-1, len(want.gradient))).permute(2, 0, 1)
    if want.gradient.shape[-1] == weight.shape[-1]:
        return weight
    assert bias is not None
    return torch.cat([weight, bias], -1)


def dense(factor: Tensor) -> Tensor:
    return torch.diag_embed(factor) if factor.dim() == 2 else factor


def bases(layer: LayerCurvature) -> tuple[Tensor, Tensor]:
    """Return ``Q_G`` and ``Q_A`` in double precision; the identity where none is."""
    _, d_out, d_in = layer.block.shape
    found = []
    for basis, size in ((layer.Q_G, d_out), (layer.Q_A, d_in)):
        q = torch.eye(size)[None] if basis is None else basis
        found.append(q.double())
        gram = q.mT.double() @ q.double()
        assert_near(gram, torch.eye(size).double().expand_as(gram), 1e-5, "a basis")
    return found[0], found[1]


@dataclass
class Comparison:
    """A layer's factors and scalings against the algebra's.

    Attributes:
        case: The case.
        layer: Of the package.
        want: Of the algebra.
        rounded: Returns the algebra's in single precision, if the model is.
    """

    case: Case
    layer: LayerCurvature
    want: Expected
    rounded: Callable[[], Expected] | None

    def near(self, found: Tensor, of: Callable[[Expected], Tensor], what: str) -> None:
        """Compare a tensor with what a function makes of the algebra's statistics."""
        rounded = self.rounded
        single = None if rounded is None else lambda: of(rounded())
        text = f"{what} of {self.layer.name}, {self.case}"
        assert_near(found, of(self.want), tolerance(self.case), text, single)

    def factors(self) -> None:
        """Compare ``A`` and ``G``."""
        A, G = self.layer.A, self.layer.G
        assert A is not None, self.case
        assert G is not None, self.case

        def inputs(want: Expected) -> Tensor:
            if A.dim() == 2:
                return torch.diag_embed(want.A.diagonal(dim1=-2, dim2=-1))
            return want.A

        self.near(dense(A), inputs, "A")
        self.near(G, lambda want: want.G.expand(len(G), -1, -1), "G")

    def scalings(self, examples: int, terms: int) -> None:
        """Compare with squares of the algebra's gradients, in the layer's own basis."""
        case, layer = self.case, self.layer
        Q_G, Q_A = bases(layer)
        if case.method == "KFAC":
            self.eigenvalues(Q_G, Q_A)
            return

        def scalings(want: Expected) -> Tensor:
            if case.method == "per example":
                squares = (Q_G.mT @ want.examples.double() @ Q_A).square()
                return squares.sum(0).mean(0)
            scale = terms if case.reduction == "mean" else 1
            gradient = Q_G.mT @ want.gradient.double() @ Q_A
            return gradient.square() * scale**2 / examples

        assert layer.s is not None, case
        self.near(layer.s, scalings, "s")

    def eigenvalues(self, Q_G: Tensor, Q_A: Tensor) -> None:
        """Compare with the factors in the layer's own basis, which is theirs."""
        layer, allowed = self.layer, tolerance(self.case)
        s = layer.eigenvalues_G[..., None] * layer.eigenvalues_A[..., None, :]
        if self.case.basis_interval > 1:
            return
        for factor, q in ((layer.G, Q_G), (layer.A, Q_A)):
            assert factor is not None, self.case
            rotated = q.mT @ dense(factor).double() @ q
            diagonal = torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
            assert_near(rotated, diagonal, allowed, f"the basis of {layer.name}")

        def products(want: Expected) -> Tensor:
            G = Q_G.mT @ want.G.double() @ Q_G
            A = Q_A.mT @ want.A.double() @ Q_A
            ends = [m.diagonal(dim1=-2, dim2=-1) for m in (G, A)]
            return (ends[0][..., None] * ends[1][..., None, :]).expand_as(s)

        self.near(s, products, "s")


def share(s: Tensor, layer: LayerCurvature) -> Tensor:
    """Return scalings with one value for each pair of degenerate eigenspaces."""
    sides = []
    for values, basis in (
        (layer.eigenvalues_G, layer.Q_G),
        (layer.eigenvalues_A, layer.Q_A),
    ):
        size = values.shape[-1]
        if basis is None:
            sides.append(torch.eye(size).double()[None])
            continue
        equal = max(16 * float(torch.finfo(values.dtype).eps), 1e-9)
        near = values.diff(dim=-1).abs() <= equal * values.amax(-1, keepdim=True)
        space = F.pad((~near).cumsum(-1), (1, 0))
        same = (space[..., None] == space[..., None, :]).double()
        sides.append(same / same.sum(-1, keepdim=True))
    return sides[0] @ s.double() @ sides[1]


def compare_step(
    case: Case, layer: LayerCurvature, want: Expected, moved: Tensor
) -> None:
    """Compare with the textbook step of the layer's own curvature."""
    Q_G, Q_A = bases(layer)
    if case.method == "KFAC":
        s = layer.eigenvalues_G[..., None] * layer.eigenvalues_A[..., None, :]
        s = s.expand(layer.block.shape)
    else:
        assert layer.s is not None
        s = layer.s
    N = Q_G.mT @ want.gradient @ Q_A
    # A parameter rounds when it moves; a scaling when it is computed.
    allowed = max(1e-7, 64 * float(torch.finfo(layer.dtype).eps))
    rounding = float(torch.finfo(case.dtype).eps) * 8
    thin = min(layer.block.shape[1:]) <= 8
    if case.direction == "spectral" and not (thin or layer.concentrated):
        compare_polar(case, layer, N, Q_G.mT @ moved @ Q_A / LR)
        return
    denominators = share(s, layer) + case.damping
    step = LR * Q_G @ (N / denominators) @ Q_A.mT
    gap = float((moved - step).norm())
    bound = allowed * float(step.norm()) * 10 + rounding * moved.numel() ** 0.5
    # Of a rotated gradient the small entries round as the large ones do.
    eps = float(torch.finfo(layer.dtype).eps)
    bound += LR * eps * float(N.norm() / denominators.min())
    assert gap <= bound, f"the step of {layer.name} is off by {gap:.1e}: {case}"


def is_matrix(layer: LayerCurvature) -> bool:
    """Return whether a layer is none of those that spectral moves as AdamW does."""
    bases = layer.Q_A is not None and layer.Q_G is not None
    return bases and not layer.block.exact


def compare_polar(
    case: Case, layer: LayerCurvature, N: Tensor, direction: Tensor
) -> None:
    """Compare a spectral direction with what any polynomial of ``N`` keeps.

    With ``W = s^-1/2 o N`` and the direction ``s^-1/2 o p(W)``, ``p`` odd and close to
    the sign of singular values, ``W^T p(W)`` is symmetric with eigenvalues ``w p(w)``.
    """
    weights = layer.s
    if weights is None:
        weights = layer.eigenvalues_G[..., None] * layer.eigenvalues_A[..., None, :]
    shared = layer.shared(weights.clone(), pooled=True).double()
    root = (shared + case.damping).sqrt()
    W, X = N / root, direction * root
    product = W.mT @ X
    bound = max(1e-6, 1e3 * float(torch.finfo(case.dtype).eps))
    assert_near(product, product.mT, bound, f"the direction of {layer.name}, {case}")
    singular = torch.linalg.svdvals(X)
    assert float(singular.max()) < 1.3, case
    large = torch.linalg.svdvals(W)
    kept = singular[large > 0.1 * large.amax(-1, keepdim=True)]
    assert bool((kept > 0.5).all()), case


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(seed=st.integers(0, 10**6))
def test_drawn_loops(seed: int) -> None:
    note(str(draw_case(seed)))
    check(seed)


@pytest.mark.slow
def test_many_drawn_loops() -> None:
    """1,500 cases, one after the other; failures are listed together.

    Of 2,200 other seeds (11000000 to 11001499, 11002000 to 11002699) two failed, by
    roundings in single precision that tolerances did not know of, and do no longer.
    """
    failures = [text for seed in range(1500) if (text := outcome(seed))]
    assert not failures, "\n".join(failures[:20])


def outcome(seed: int) -> str:
    """Return what a case says that fails, nothing of one that does not."""
    try:
        check(seed)
    except Exception as error:
        return f"{seed}: {type(error).__name__} {str(error)[:200]}"
    return ""
