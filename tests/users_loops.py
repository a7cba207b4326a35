"""Training loops as projects write them, and what their statistics have to be.

``EXTRAS`` are loops that do more than they need to: their step is that of the plain
loop. ``LOSSES`` are loops with a loss of their own: :class:`ByHand` takes their factors
from leaves added to the outputs of the layers, without anything of the package.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import functional as autograd_functional
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, vmap
from torch.nn import functional as F
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.rnn import pack_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ekfac import KFAC
from ekfac.optim.optimizer import KroneckerOptimizer

Loop = Callable[[Any, KroneckerOptimizer, Tensor, Tensor, float], None]
Loss = Callable[[Any, Tensor, Tensor], Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(number: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number + 1)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.arange(size) % 3


def plain(m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor, share: float) -> None:
    (share * cross_entropy(m(x), y)).backward()


# -- passes that leave no trace --------------------------------------------------------

EXTRAS: dict[str, Loop] = {}
CLEARING: set[str] = set()  # clear gradients, so they come first or not at all


def extra(loop: Loop) -> Loop:
    EXTRAS[loop.__name__] = loop
    return loop


def clearing(loop: Loop) -> Loop:
    CLEARING.add(loop.__name__)
    return extra(loop)


@extra
def weights_of_tasks_by_gradient_norms(m, o, x, y, share) -> None:
    """GradNorm: task weights are learned from norms of gradients."""
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    out = m(x)
    losses = [cross_entropy(out, y), out.square().mean()]
    norms = [
        torch.autograd.grad(w * one, m[2].weight, retain_graph=True, create_graph=True)[
            0
        ].norm()
        for w, one in zip(weights, losses, strict=True)
    ]
    torch.autograd.grad((norms[0] - norms[1].detach()).abs(), weights)
    (share * losses[0]).backward()


@extra
def weight_of_a_discriminator(m, o, x, y, share) -> None:
    """VQGAN: the ratio of two losses' gradients at the last layer."""
    out = m(x)
    one, two = cross_entropy(out, y), out.square().mean()
    last = m[2].weight
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0] for t in (one, two)]
    weight = (norms[0].norm() / norms[1].norm()).detach()
    (share * one + 0 * weight * two).backward()


@extra
def integrated_gradients(m, o, x, y, share) -> None:
    loss = share * cross_entropy(m(x), y)
    for part in (0.3, 0.6):
        z = (part * x).requires_grad_()
        torch.autograd.grad(m(z).gather(1, y[:, None]).sum(), z)
    loss.backward()


@extra
def products_with_jacobians_and_hessians(m, o, x, y, share) -> None:
    autograd_functional.jacobian(m, x[:3])
    autograd_functional.hessian(lambda a: m(a).square().sum(), x[:2])
    plain(m, o, x, y, share)
    autograd_functional.vhp(lambda a: m(a).sum(), x, torch.ones_like(x))
    autograd_functional.jacobian(m, x[:3], create_graph=True)


@extra
def transforms(m, o, x, y, share) -> None:
    fixed = {n: p.detach() for n, p in m.named_parameters()}
    vmap(grad(lambda a: functional_call(m, fixed, (a,)).sum()))(x)
    hessian(lambda a: functional_call(m, fixed, (a,)).square().sum())(x[0])
    plain(m, o, x, y, share)


@extra
def projected_gradient_attack(m, o, x, y, share) -> None:
    z = x
    for _ in range(3):
        z = z.detach().requires_grad_()
        z = z + 0.1 * torch.autograd.grad(cross_entropy(m(z), y), z)[0].sign()
    plain(m, o, x, y, share)


@extra
def attack_on_a_frozen_model(m, o, x, y, share) -> None:
    m.requires_grad_(False)
    z = x.clone().requires_grad_()
    cross_entropy(m(z), y).backward()
    m.requires_grad_(True)
    plain(m, o, x, y, share)


@clearing
def attack_in_eval_mode(m, o, x, y, share) -> None:
    m.eval()
    z = x.clone().requires_grad_()
    cross_entropy(m(z), y).backward()
    m.train()
    m.zero_grad()
    plain(m, o, x, y, share)


@clearing
def virtual_adversarial_direction(m, o, x, y, share) -> None:
    with torch.no_grad():
        p = m(x).softmax(1)
    d = torch.ones_like(x)
    for _ in range(2):
        d = (d / d.norm()).detach().requires_grad_()
        F.kl_div(m(x + d).log_softmax(1), p, reduction="batchmean").backward()
        assert d.grad is not None
        d = d.grad
        m.zero_grad(set_to_none=False)
    plain(m, o, x, y, share)


@extra
def gradients_of_inputs_and_weights_at_once(m, o, x, y, share) -> None:
    z = x.clone().requires_grad_()
    plain(m, o, z, y, share)
    assert z.grad is not None


@extra
def teachers(m, o, x, y, share) -> None:
    """Copies of the model, trained and averaged."""
    twin, mean = copy.deepcopy(m), AveragedModel(m)
    sgd = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(2):
        cross_entropy(twin(x), y).backward()
        sgd.step()
    mean.update_parameters(twin)
    mean(x).sum().backward()
    plain(m, o, x, y, share)


@extra
def averaged_weights_swapped_in(m, o, x, y, share) -> None:
    own = [p.data for p in m.parameters()]
    for p in m.parameters():
        p.data = p.data * 0.5
    with torch.no_grad():
        m(x)
    for p, data in zip(m.parameters(), own, strict=True):
        p.data = data
    plain(m, o, x, y, share)


@extra
def passes_without_a_graph(m, o, x, y, share) -> None:
    with torch.inference_mode():
        m(x)
    loss = share * cross_entropy(m(x), y)
    with torch.no_grad():
        m(2 * x)
    loss.backward()
    with torch.no_grad():
        m(3 * x)


@extra
def outputs_that_are_not_used(m, o, x, y, share) -> None:
    m[0](x)
    before = m(3 * x)
    plain(m, o, x, y, share)
    after = m(2 * x)
    del before, after


@extra
def losses_kept_with_their_graphs(m, o, x, y, share) -> None:
    o.history = getattr(o, "history", [])
    loss = share * cross_entropy(m(x), y)
    o.history.append(cross_entropy(m(3 * x), y))
    loss.backward(retain_graph=True)
    o.history.append(loss)


@extra
def own_earlier_output_as_input(m, o, x, y, share) -> None:
    """Self-conditioning: an output, detached, is an input."""
    guess = m(x).detach()
    plain(m, o, x + 0 * guess[:, :1], y, share)


@extra
def backward_in_two_parts(m, o, x, y, share) -> None:
    out = m(x)
    leaf = out.detach().requires_grad_()
    plain(lambda x: leaf, o, x, y, share)
    out.backward(leaf.grad)


@extra
def cached_gradients_of_outputs(m, o, x, y, share) -> None:
    """GradCache: the loss of all outputs first, then each part once more."""
    with torch.no_grad():
        out = m(x)
    plain(lambda x: out.requires_grad_(), o, x, y, share)
    (m(x) * out.grad).sum().backward()


@extra
def losses_of_examples(m, o, x, y, share) -> None:
    weights = torch.full((len(x),), share / len(x), dtype=torch.float64)
    cross_entropy(m(x), y, reduction="none").backward(weights)


@extra
def hooks_of_all_kinds(m, o, x, y, share) -> None:
    def nothing(*args: Any) -> None:
        pass

    handles = [register_module_forward_hook(nothing)]
    for module in m.modules():
        handles.append(module.register_full_backward_hook(nothing))
        handles.append(module.register_full_backward_pre_hook(nothing))
    handles.append(m[0].weight.register_hook(nothing))
    with torch.autograd.set_detect_anomaly(True):
        plain(m, o, x, y, share)
    for handle in handles:
        handle.remove()


@extra
def saved_tensors_elsewhere(m, o, x, y, share) -> None:
    with save_on_cpu(), saved_tensors_hooks(Tensor.clone, Tensor.clone):
        loss = share * cross_entropy(m(x), y)
    loss.backward()


@extra
def gradients_cleared_after_the_forward_pass(m, o, x, y, share) -> None:
    loss = share * cross_entropy(m(x), y)
    if all(p.grad is None for p in m.parameters()):
        o.zero_grad()
    loss.backward()


@clearing
def sharpness_by_hand(m, o, x, y, share) -> None:
    """SAM with no radius: the first pass is thrown away."""
    plain(m, o, 2 * x, y, share)
    o.zero_grad()
    plain(m, o, x, y, share)


@clearing
def gradients_put_aside(m, o, x, y, share) -> None:
    """Those of another loss, kept as they are to be looked at."""
    plain(m, o, 2 * x, y, share)
    o.aside = [p.grad for p in m.parameters()]
    m.zero_grad()
    plain(m, o, x, y, share)


@clearing
def closures_of_a_line_search(m, o, x, y, share) -> None:
    for factor in (1.0, 2.0, 1.0):
        o.zero_grad()
        plain(m, o, factor * x, y, share)


@clearing
def retained_and_cleared_in_place(m, o, x, y, share) -> None:
    """Each pass through a new forward, the old graphs alive."""
    out = m(3 * x)
    cross_entropy(out, y).backward(retain_graph=True)
    torch._foreach_zero_([p.grad for p in m.parameters()])
    plain(m, o, x, y, share)
    del out


@extra
def forward_that_fails(m, o, x, y, share) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    handle = m[1].register_forward_hook(fail)
    with contextlib.suppress(MemoryError):
        m(x)
    handle.remove()
    plain(m, o, x, y, share)


@clearing
def backward_that_fails(m, o, x, y, share) -> None:
    """Half of the gradients are there; the user removes them."""

    def fail(g: Tensor) -> None:
        raise MemoryError

    handle = m[0].weight.register_hook(fail)
    with contextlib.suppress(MemoryError):
        cross_entropy(m(x), y).backward()
    handle.remove()
    for p in m.parameters():
        p.grad = None
    plain(m, o, x, y, share)


@extra
def a_second_optimizer(m, o, x, y, share) -> None:
    fishers = {"empirical": "exact", "exact": "mc", "mc": "empirical"}
    o.second = getattr(o, "second", None) or KFAC(m, fisher=fishers[o.options.fisher])
    plain(m, o, x, y, share)


@extra
def backward_in_another_thread(m, o, x, y, share) -> None:
    loss = share * cross_entropy(m(x), y)
    evaluation = threading.Thread(target=lambda: m(5 * x))
    evaluation.start()
    evaluation.join()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()


@extra
def batches_without_a_loss(m, o, x, y, share) -> None:
    m(2 * x)
    plain(m, o, x, y, share)
    loss: Tensor | None = None
    if loss is not None:
        loss.backward()


@extra
def gradients_that_users_change(m, o, x, y, share) -> None:
    """Halved and doubled again as they are accumulated."""

    def change(p: Tensor) -> None:
        assert p.grad is not None
        p.grad.mul_(0.5).mul_(2)

    handles = [p.register_post_accumulate_grad_hook(change) for p in m.parameters()]
    plain(m, o, x, y, share)
    for handle in handles:
        handle.remove()


# -- losses of all kinds ---------------------------------------------------------------


class ByHand:
    """Inputs of a copied model's linear layers, and leaves added to their outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.calls: list[tuple[str, nn.Linear, Tensor, Tensor]] = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.forward = partial(self._call, name, module)  # type: ignore[method-assign]

    def _call(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        out = F.linear(x, layer.weight, layer.bias)
        leaf = torch.zeros_like(out, requires_grad=True)
        if torch.is_grad_enabled() and (out.requires_grad or x.requires_grad):
            self.calls.append((name, layer, x.detach(), leaf))
        return out + leaf

    def factors(self, loss: Tensor, examples: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``A`` and ``G`` by layer; the loss is a mean over the examples."""
        calls = list(self.calls)  # checkpoints call again in the backward pass
        leaves = [leaf for *_, leaf in calls]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        rows: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for (name, layer, x, _), g in zip(calls, gradients, strict=True):
            if g is None or not len(x):
                continue
            a = x.reshape(-1, x.shape[-1])
            if layer.bias is not None:
                a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
            inputs, grads = rows.setdefault(name, ([], []))
            inputs.append(a)
            grads.append(g.reshape(-1, g.shape[-1]) * examples)
        found = {}
        for name, (inputs, grads) in rows.items():
            a, g = torch.cat(inputs), torch.cat(grads)
            found[name] = a.T @ a / len(a), g.T @ g / examples
        return found


class Heads(nn.Module):
    """A trunk with a head for classes and one for values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.policy = nn.Linear(5, 7), nn.Linear(7, 3)
        self.value = nn.Linear(7, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.policy(h), self.value(h)


class WithLoss(nn.Module):
    """Returns its loss, alone or before the outputs."""

    def __init__(self, alone: bool = True) -> None:
        super().__init__()
        self.net, self.alone = network(), alone

    def forward(self, x: Tensor, y: Tensor) -> Any:
        out = self.net(x)
        loss = cross_entropy(out, y)
        return loss if self.alone else (loss, out)


class Coder(nn.Module):
    """A variational auto-encoder whose own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)
        self.double()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, logarithm = self.encoder(x).chunk(2, 1)
        return mean, logarithm


class Cell(nn.Module):
    """A recurrent cell as the whole model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.i, self.h = nn.Linear(5, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.i(x) + self.h(h))


class Experts(nn.Module):
    """A mixture of experts, the last of which gets no token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.head = nn.Linear(5, 3), nn.Linear(7, 3)
        self.experts = nn.ModuleList(nn.Linear(5, 7) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1)
        chosen = weights[:, :2].argmax(1)
        out = torch.zeros(len(x), 7, dtype=x.dtype)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            part = expert(x[rows]) * weights[rows, number : number + 1]
            out = out.index_add(0, rows, part)
        return self.head(torch.tanh(out))


class Depths(nn.Module):
    """Stochastic depth: every step skips other layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.middle = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for number, layer in enumerate(self.middle):
            if (number + int(x[0, 0] > 0)) % 2:
                h = h + torch.tanh(layer(h))
        return self.last(h)


class Packed(nn.Module):
    """Rows of a packed sequence are the examples that its output has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Any) -> Tensor:
        return self.net(x.data)


class Twins(nn.Module):
    """An encoder with a predictor and a target without gradient (SimSiam)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.predictor = network(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.net(x)
        return self.predictor(z), z.detach()


class Forces(nn.Module):
    """An energy and its derivative with respect to the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 1)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        energy = self.last(F.silu(self.first(x)))[:, 0]
        force = torch.autograd.grad(energy.sum(), x, create_graph=True)[0]
        return energy, force


class Checkpointed(nn.Module):
    """Checkpoints within one another, which stop early or not."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.net, self.early = network(), early

    def forward(self, x: Tensor) -> Tensor:
        first, activation, last = self.net
        with set_checkpoint_early_stop(self.early):
            inner = partial(checkpoint, first, use_reentrant=False)
            return checkpoint(
                lambda x: last(activation(inner(x))), x, use_reentrant=False
            )


@dataclass
class OwnLoss:
    """A loop of its own.

    Attributes:
        loss: The loss whose gradient is in ``.grad``, of a model and a batch.
        model: Returns the model.
        loop: Makes the gradients; ``None``: the backward pass of the loss.
        passes: Over how many batches' examples the loss is counted as a mean.
        layers: The layers that are compared; ``None``: all.
    """

    loss: Loss
    model: Callable[[], nn.Module] = network
    loop: Callable[[Any, KroneckerOptimizer, Tensor, Tensor], None] | None = None
    passes: float = 1
    layers: tuple[str, ...] | None = None

    def run(self, m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
        """Make the gradients of a step."""
        if self.loop is None:
            self.loss(m, x, y).backward()
        else:
            self.loop(m, o, x, y)


def value(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return m(x)[1].square().mean()


def policy(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m(x)[0], y)


def both_heads(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return value(m, x, y) + policy(m, x, y)


def one_by_one(*losses: Loss) -> Any:
    """Return a loop of a forward and a backward pass for each loss."""

    def loop(m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
        for loss in losses:
            loss(m, x, y).backward()

    return loop


def halves(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.chunk(2), y.chunk(2), strict=True)


def in_halves(loss: Loss) -> Any:
    """Return a loop that accumulates."""

    def loop(m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
        for some, targets in halves(x, y):
            (loss(m, some, targets) / 2).backward()

    return loop


def classes(m: Any, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m(x), y)


def variational(m: Coder, x: Tensor, y: Tensor) -> Tensor:
    mean, logarithm = m.encode(x)
    z = mean + 0.1 * x[:, :2] * (logarithm / 2).exp()
    distance = (m.decoder(z) - x).square().sum(1)
    return (distance + (mean**2 + logarithm.exp() - logarithm).sum(1)).mean()


def towers(m: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m["a"](x) @ m["b"](x.flip(1)).T, torch.arange(len(x)))


def trunk_and_heads(m: Heads, x: Tensor, y: Tensor) -> Tensor:
    h = torch.tanh(m.trunk(x))
    return cross_entropy(m.policy(h), y) + m.value(h).square().mean()


def trunk_after_heads(m: Heads, o: KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
    h = torch.tanh(m.trunk(x))
    leaf = h.detach().requires_grad_()
    cross_entropy(m.policy(leaf), y).backward()
    m.value(leaf).square().mean().backward()
    h.backward(leaf.grad)


def unrolled(m: Cell, x: Tensor, y: Tensor) -> Tensor:
    h = torch.zeros(len(x), 3, dtype=x.dtype)
    for number in range(3):
        h = m(x * (number + 1), h)
    return cross_entropy(h, y)


def packed(m: Packed, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(m(pack_sequence([x[:9], x[9:14], x[14:]])), y)


def twins(m: Twins, x: Tensor, y: Tensor) -> Tensor:
    (p, z), (q, w) = m(x), m(x + 0.1)
    return -(F.cosine_similarity(p, w) + F.cosine_similarity(q, z)).mean() / 2


def distilled(m: Heads, x: Tensor, y: Tensor) -> Tensor:
    """The teacher shares the trunk."""
    with torch.no_grad():
        target = m(2 * x)[0].softmax(1)
    return F.kl_div(m(x)[0].log_softmax(1), target, reduction="batchmean")


def robust(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """TRADES: clean and attacked outputs in one loss."""
    clean, attacked = m(x), m(x + 0.1)
    apart = F.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="batchmean")
    return cross_entropy(clean, y) + apart


def slope_penalty(m: Any, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    out = m(z)
    slopes = [
        torch.autograd.grad(column.sum(), z, create_graph=True)[0]
        for column in out.unbind(1)
    ]
    return cross_entropy(out, y) + 0.1 * sum(s.square().sum(1).mean() for s in slopes)


def score_matching(m: Any, x: Tensor, y: Tensor) -> Tensor:
    z, v = x.clone().requires_grad_(), x.flip(0)[:, :3]
    score = m(z)
    product = torch.autograd.grad((score * v).sum(), z, create_graph=True)[0]
    return (product[:, :3] * v).sum(1).mean() + (score * v).sum(1).square().mean()


def energies_and_forces(m: Forces, x: Tensor, y: Tensor) -> Tensor:
    energy, force = m(x)
    return energy.square().mean() + force.square().sum(1).mean()


def contrastive_divergence(m: Any, x: Tensor, y: Tensor) -> Tensor:
    z = x.flip(0)
    for _ in range(3):
        z = z.detach().requires_grad_()
        z = z - 0.1 * torch.autograd.grad(m(z).sum(), z)[0]
    return m(x).sum(1).mean() - m(z.detach()).sum(1).mean()


def masked_actions(m: Any, x: Tensor, y: Tensor) -> Tensor:
    mask = torch.tensor([0.0, 0.0, -torch.inf], dtype=x.dtype)
    return cross_entropy(m(x) + mask, y.clamp(max=1))


def activations_penalised(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """By a forward hook of the user's."""
    seen: list[Tensor] = []
    handle = m[1].register_forward_hook(lambda *args: seen.append(args[2]))
    out = m(x)
    handle.remove()
    return cross_entropy(out, y) + 0.1 * seen[0].square().sum(1).mean()


def orthogonality(m: Any, x: Tensor, y: Tensor) -> Tensor:
    gram = m[0].weight.T @ m[0].weight
    return 0.1 * (gram - torch.eye(5, dtype=x.dtype)).square().sum()


def mixed(m: Any, x: Tensor, y: Tensor) -> Tensor:
    out, other = m(0.3 * x + 0.7 * x.flip(0)), y.flip(0)
    smooth = partial(cross_entropy, out, label_smoothing=0.1)
    return 0.3 * smooth(y) + 0.7 * smooth(other)


def weighted(m: Any, x: Tensor, y: Tensor) -> Tensor:
    weights = x[:, 0].abs() + 0.5
    soft = 5 * torch.tanh(m(x) / 5) / 2
    return (weights * cross_entropy(soft, y, reduction="none")).mean()


def sums_over_the_whole_count(
    m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor
) -> None:
    """The Trainer's way with micro-batches of unequal size."""
    for part in (slice(0, 5), slice(5, 16)):
        loss = cross_entropy(m(x[part]), y[part], reduction="sum")
        (loss / len(x)).backward()


def last_of_two_tasks(m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
    """Gradient surgery: gradients of the first are put aside and added again."""
    out = m(x)
    out.square().mean().backward(retain_graph=True)
    aside = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    cross_entropy(out, y).backward()
    for p, g in zip(m.parameters(), aside, strict=True):
        p.grad.add_(g)


def hooked_output(m: Any, o: KroneckerOptimizer, x: Tensor, y: Tensor) -> None:
    out = m(x)
    out.register_hook(lambda g: 3 * g)
    cross_entropy(out, y).backward()


LOSSES: dict[str, OwnLoss] = {
    "value head alone": OwnLoss(value, Heads),
    "value, then policy": OwnLoss(
        both_heads, Heads, one_by_one(value, policy), 2, ("trunk",)
    ),
    "policy, then value": OwnLoss(
        both_heads, Heads, one_by_one(policy, value), 2, ("trunk",)
    ),
    "loss inside the model": OwnLoss(lambda m, x, y: m(x, y), WithLoss),
    "loss inside the model, accumulated": OwnLoss(
        lambda m, x, y: m(x, y), WithLoss, in_halves(lambda m, x, y: m(x, y))
    ),
    "loss before the outputs": OwnLoss(
        lambda m, x, y: m(x, y)[0], lambda: WithLoss(alone=False)
    ),
    "forward by its name": OwnLoss(lambda m, x, y: cross_entropy(m.forward(x), y)),
    "methods beside forward": OwnLoss(variational, Coder),
    "two towers": OwnLoss(
        towers, lambda: nn.ModuleDict({"a": network(), "b": network()})
    ),
    "trunk after its heads": OwnLoss(trunk_and_heads, Heads, trunk_after_heads),
    "a cell unrolled": OwnLoss(unrolled, Cell, passes=3),
    "experts without tokens": OwnLoss(classes, Experts),
    "stochastic depth": OwnLoss(classes, Depths),
    "packed sequences": OwnLoss(packed, Packed),
    "two views": OwnLoss(twins, Twins, passes=2),
    "a teacher with the same trunk": OwnLoss(distilled, Heads, passes=1),
    "clean and attacked": OwnLoss(robust, passes=2),
    "a penalty on slopes": OwnLoss(slope_penalty),
    "score matching": OwnLoss(score_matching),
    "energies and forces": OwnLoss(energies_and_forces, Forces),
    "contrastive divergence": OwnLoss(contrastive_divergence, passes=2),
    "actions that are masked": OwnLoss(masked_actions),
    "a penalty on activations": OwnLoss(activations_penalised),
    "a penalty on weights first": OwnLoss(
        classes, loop=one_by_one(orthogonality, classes)
    ),
    "a penalty on weights last": OwnLoss(
        classes, loop=one_by_one(classes, orthogonality)
    ),
    "mixed and smoothed labels": OwnLoss(mixed),
    "weights and soft clipping": OwnLoss(weighted),
    "sums over the whole count": OwnLoss(classes, loop=sums_over_the_whole_count),
    "the last of two tasks": OwnLoss(classes, loop=last_of_two_tasks),
    "a hook on the output": OwnLoss(
        lambda m, x, y: 3 * cross_entropy(m(x), y), loop=hooked_output
    ),
    "checkpoints that stop early": OwnLoss(classes, lambda: Checkpointed(True)),
    "checkpoints that do not": OwnLoss(classes, lambda: Checkpointed(False)),
}
