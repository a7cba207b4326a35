"""What must not change the curvature nor, up to the gradient's own scale, the step.

EKFAC's scalings are the diagonal in the factors' eigenbasis. Where a factor has equal
eigenvalues, zeros for instance, rounding decides on the basis, and a batch that comes
before the next refresh gets scalings that depend on it. So the batches here have enough
examples for factors of full rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import support
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC
from ekfac.curvature.eigenbasis import transport
from ekfac.optim.optimizer import KroneckerOptimizer

# The textbook step: its length follows the curvature, so the curvature's scale shows.
TEXTBOOK: dict[str, Any] = {
    "direction": "natural",
    "damping": 0.03,
    "damping_mode": "absolute",
    "grafting": None,
    "momentum": 0.0,
    "lr": 0.1,
}


@dataclass(frozen=True)
class Method:
    """An optimizer and the options that tell it from the others."""

    name: str
    optimizer: type[KroneckerOptimizer]
    options: dict[str, Any]

    def __call__(self, model: nn.Module, **options: Any) -> KroneckerOptimizer:
        return self.optimizer(model, **{**TEXTBOOK, **self.options, **options})

    def __repr__(self) -> str:
        return self.name


def methods(**kinds: Sequence[str]) -> list[Method]:
    """Return every combination of the given options with KFAC and both EKFACs."""
    found = []
    for fisher in kinds.get("fisher", ["empirical", "exact"]):
        for sharing in kinds.get("sharing", ["expand", "reduce"]):
            common = {"fisher": fisher, "sharing": sharing}
            found.append(Method(f"KFAC {fisher} {sharing}", KFAC, common))
            for scaling in ("per_example", "running_average"):
                name = f"EKFAC {scaling} {fisher} {sharing}"
                found.append(Method(name, EKFAC, {**common, "scaling": scaling}))
    return found


EVERY = methods()
PER_EXAMPLE = [m for m in EVERY if m.options.get("scaling") != "running_average"]
RUNNING = [m for m in EVERY if m.options.get("scaling") == "running_average"]
EMPIRICAL = [m for m in EVERY if m.options["fisher"] == "empirical"]
seeds = st.integers(0, 2**16)
few = settings(max_examples=8)


@dataclass(frozen=True)
class Outcome:
    """Blocks and factors after some steps, and what each step moved."""

    blocks: dict[str, Tensor]
    factors: dict[str, tuple[Tensor, Tensor]]
    moves: list[dict[str, Tensor]]

    def assert_equals(
        self, other: Outcome, *, factors: bool = True, tolerance: float = 1e-8
    ) -> None:
        for name in self.blocks:
            error = support.relative_error(self.blocks[name], other.blocks[name])
            assert error < tolerance, f"curvature of {name!r}: {error:.1e}"
            if factors:
                for mine, theirs in zip(
                    self.factors[name], other.factors[name], strict=True
                ):
                    assert support.relative_error(mine, theirs) < tolerance, name
        for step, (mine, theirs) in enumerate(
            zip(self.moves, other.moves, strict=True), start=1
        ):
            for name, move in mine.items():
                error = support.relative_error(move, theirs[name])
                assert error < tolerance, f"step {step} of {name!r}: {error:.1e}"


Backward = Callable[[nn.Module], None]


def run(
    model: nn.Module, method: Method, steps: Sequence[Backward], **options: Any
) -> Outcome:
    """Train a copy of ``model`` by ``steps``, each of which fills the gradients."""
    model = copy.deepcopy(model)
    with method(model, **options) as optimizer:
        moves = []
        for backward in steps:
            optimizer.zero_grad()
            backward(model)
            moves.append(support.step_of(model, optimizer))
        layers = optimizer.curvature.items()
        kronecker = optimizer.options.scaling is None
        block = support.kfac_blocks if kronecker else support.ekfac_blocks
        blocks = {name: block(layer) for name, layer in layers}
        factors = {
            name: (support.dense_factor(layer.A), support.dense_factor(layer.G))
            for name, layer in layers
        }
    return Outcome(blocks, factors, moves)


def mean_loss(x: Tensor, y: Tensor, share: float = 1.0) -> Backward:
    """Return a backward pass of ``share`` times the mean cross-entropy."""

    def backward(model: nn.Module) -> None:
        (share * cross_entropy(model(x), y)).backward()

    return backward


def classifier() -> nn.Module:
    """Return a network with a convolution, a norm and two linear layers."""
    return nn.Sequential(
        nn.Conv1d(2, 2, 2),
        nn.Tanh(),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.Linear(6, 3),
        nn.Tanh(),
        nn.Linear(3, 3),
    )


def data(seed: int, steps: int = 3, examples: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Seed the weights to come, and return batches for :func:`classifier`."""
    torch.manual_seed(seed)
    return [
        (torch.randn(examples, 2, 4), torch.randint(3, (examples,)))
        for _ in range(steps)
    ]


pytestmark = pytest.mark.usefixtures("float64")


# -- batches ---------------------------------------------------------------------------


@few
@given(seed=seeds, method=st.sampled_from(PER_EXAMPLE))
def test_batch_repeated_twice(seed: int, method: Method) -> None:
    once = data(seed)
    twice = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in once]
    model = classifier()
    plain = run(model, method, [mean_loss(x, y) for x, y in once])
    plain.assert_equals(run(model, method, [mean_loss(x, y) for x, y in twice]))


@few
@given(seed=seeds, method=st.sampled_from(RUNNING))
def test_batch_repeated_twice_doubles_running_averages(
    seed: int, method: Method
) -> None:
    """``N`` times the squared mean gradient is of the noise of the mean, not its size.

    Its expectation is the variance of an example's gradient plus ``N`` times the
    squared mean. Repeating the batch doubles ``N`` and leaves the mean gradient: the
    variance of the mean that the product with ``N`` makes up for has not halved, since
    the repeated examples are not independent. So the scalings double, exactly; with
    damping relative to them the update halves, and with grafting it is the same.
    """
    once = data(seed)
    model = classifier()
    single = [mean_loss(x, y) for x, y in once]
    double = [mean_loss(torch.cat([x, x]), torch.cat([y, y])) for x, y in once]
    relative: dict[str, Any] = {"damping": 0.1, "damping_mode": "relative"}
    one = run(model, method, single, lr=0.1, **relative)
    two = run(model, method, double, lr=0.2, **relative)
    for name, block in one.blocks.items():
        assert support.relative_error(two.blocks[name], 2 * block) < 1e-8
    Outcome({}, one.factors, one.moves).assert_equals(two)
    for grafting in ("adaptive", "rms", "sgd"):
        one = run(model, method, single, grafting=grafting, **relative)
        two = run(model, method, double, grafting=grafting, **relative)
        Outcome({}, one.factors, one.moves).assert_equals(two)


@few
@given(seed=seeds, examples=st.integers(10, 14), method=st.sampled_from(EVERY))
def test_mean_against_sum(seed: int, examples: int, method: Method) -> None:
    def sums(x: Tensor, y: Tensor) -> Backward:
        def backward(model: nn.Module) -> None:
            cross_entropy(model(x), y, reduction="sum").backward()

        return backward

    batches = data(seed, examples=examples)
    model = classifier()
    mean = run(model, method, [mean_loss(x, y) for x, y in batches])
    total = run(
        model,
        method,
        [sums(x, y) for x, y in batches],
        loss_reduction="sum",
        lr=TEXTBOOK["lr"] / examples,
    )
    mean.assert_equals(total)


@few
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 6), min_size=3, max_size=5).filter(
        lambda sizes: sum(sizes) >= 10
    ),
    method=st.sampled_from(EVERY),
)
def test_accumulation(seed: int, sizes: list[int], method: Method) -> None:
    def accumulated(x: Tensor, y: Tensor) -> Backward:
        parts = [
            mean_loss(a, b, share=len(b) / len(y))
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
        ]

        def backward(model: nn.Module) -> None:
            for part in parts:
                part(model)

        return backward

    batches = data(seed, examples=sum(sizes))
    model = classifier()
    whole = run(model, method, [mean_loss(x, y) for x, y in batches])
    whole.assert_equals(run(model, method, [accumulated(x, y) for x, y in batches]))


@few
@given(seed=seeds, method=st.sampled_from(EVERY))
def test_a_discarded_backward_leaves_no_trace(seed: int, method: Method) -> None:
    """Gradients that ``model.zero_grad()`` cleared are not counted either."""

    def with_discarded(x: Tensor, y: Tensor) -> Backward:
        def backward(model: nn.Module) -> None:
            cross_entropy(model(torch.randn_like(x)), y).backward()
            model.zero_grad()
            cross_entropy(model(x), y).backward()

        return backward

    batches = data(seed, steps=13)  # also steps that take no factors, from the 11th
    model = classifier()
    plain = run(model, method, [mean_loss(x, y) for x, y in batches])
    plain.assert_equals(run(model, method, [with_discarded(x, y) for x, y in batches]))


@few
@given(seed=seeds, scaling=st.sampled_from(["per_example", "running_average"]))
def test_a_model_that_returns_its_loss(seed: int, scaling: str) -> None:
    """Without outputs to watch, examples are counted by the layers, at every step."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = classifier()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(self.body(x), y)

    class WithOutputs(WithLoss):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            outputs: Tensor = self.body(x)
            return outputs

    batches = data(seed, steps=13)
    method = Method(scaling, EKFAC, {"scaling": scaling})
    silent, speaking = WithLoss(), WithOutputs()
    speaking.load_state_dict(silent.state_dict())

    def step(x: Tensor, y: Tensor) -> Backward:
        def backward(model: nn.Module) -> None:
            found = model(x, y)
            (found if found.dim() == 0 else cross_entropy(found, y)).backward()

        return backward

    steps = [step(x, y) for x, y in batches]
    run(silent, method, steps).assert_equals(run(speaking, method, steps))


# -- automatic mixed precision ---------------------------------------------------------


@settings(max_examples=12)
@given(
    seed=seeds,
    exponent=st.integers(-8, 24),
    unscale=st.sampled_from([None, "unscale", "clip"]),
    method=st.sampled_from(EVERY),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_loss_scale(
    seed: int, exponent: int, unscale: str | None, method: Method, dtype: torch.dtype
) -> None:
    """A power of two changes no bit, whether or not the user unscales and clips."""
    batches = [(x.to(dtype), y) for x, y in data(seed, steps=4)]
    start = nn.Sequential(*classifier(), nn.Linear(3, 3)).to(dtype)
    parts = []
    for scale in (1.0, 2.0**exponent):
        model = copy.deepcopy(start)
        optimizer = method(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x, y in batches:
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            if unscale is not None:
                scaler.unscale_(optimizer)
            if unscale == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update(scale)
        parts.append((model, optimizer))
        optimizer.close()
    (plain, one), (scaled, other) = parts
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(p, q)
    for mine, theirs in zip(one.curvature.banks, other.curvature.banks, strict=True):
        assert torch.equal(mine, theirs)


# -- targets that do not count ---------------------------------------------------------

IGNORED = -100


@few
@given(seed=seeds, kept=st.integers(10, 13), method=st.sampled_from(EVERY))
def test_ignored_examples_against_their_absence(
    seed: int, kept: int, method: Method
) -> None:
    batches, hidden, dropped = data(seed, examples=14), [], []
    for x, y in batches:
        ignored = torch.randperm(14)[kept:]
        masked = y.clone()
        masked[ignored] = IGNORED
        hidden.append(mean_loss(x, masked))
        dropped.append(mean_loss(x[masked != IGNORED], y[masked != IGNORED]))
    model = classifier()
    run(model, method, dropped).assert_equals(run(model, method, hidden))


class TwoHeads(nn.Module):
    """Two outputs, whose gradients arrive last one first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.body(x))
        return self.first(x), self.second(x)


@few
@given(seed=seeds, method=st.sampled_from(EMPIRICAL))
def test_ignored_examples_of_a_network_with_two_heads(
    seed: int, method: Method
) -> None:
    """The second head's layer is heard of before the targets that count are known."""

    def both(x: Tensor, y: Tensor) -> Backward:
        def backward(model: nn.Module) -> None:
            first, second = model(x)
            kept = y != IGNORED
            loss = cross_entropy(first, y)
            loss = loss + cross_entropy(second, torch.where(kept, y % 2, IGNORED))
            loss.backward()

        return backward

    torch.manual_seed(seed)
    hidden, dropped = [], []
    for _ in range(3):
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        y[[0, 5]] = IGNORED
        hidden.append(both(x, y))
        dropped.append(both(x[y != IGNORED], y[y != IGNORED]))
    model = TwoHeads()
    run(model, method, dropped).assert_equals(run(model, method, hidden))


@few
@given(seed=seeds, method=st.sampled_from(EVERY))
def test_ignored_examples_of_a_network_that_is_one_layer(
    seed: int, method: Method
) -> None:
    torch.manual_seed(seed)
    hidden, dropped = [], []
    for _ in range(3):
        x, y = torch.randn(12, 4), torch.randint(3, (12,))
        y[[0, 5]] = IGNORED
        hidden.append(mean_loss(x, y))
        dropped.append(mean_loss(x[y != IGNORED], y[y != IGNORED]))
    model = nn.Linear(4, 3)
    run(model, method, dropped).assert_equals(run(model, method, hidden))


class Tagger(nn.Module):
    """Logits ``[N, S, C]`` of tokens ``[N, S]``, every position by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.norm(self.embedding(tokens))))
        logits: Tensor = self.head(x)
        return logits


class PixelTagger(nn.Module):
    """Logits ``[N, C, H, W]`` of images, every pixel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(2, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.grouped(torch.tanh(self.hidden(x))))
        logits: Tensor = self.head(x)
        return logits


def token_loss(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """Return the loss of ``[N, S, C]`` or ``[N, C, H, W]``."""
    logits = logits.transpose(1, 2) if logits.dim() == 3 else logits
    return cross_entropy(logits, y, ignore_index=IGNORED, reduction=reduction)


def padded(x: Tensor, y: Tensor) -> Backward:
    """Return a backward pass over all positions, some of them ignored."""

    def backward(model: nn.Module) -> None:
        token_loss(model(x), y).backward()

    return backward


def ragged(x: Tensor, y: Tensor) -> Backward:
    """Return a backward pass over the positions that count, example by example."""
    total = (y != IGNORED).sum()

    def backward(model: nn.Module) -> None:
        for inputs, targets in zip(x, y, strict=True):
            keep = (targets != IGNORED).flatten()  # of a text, or a row of pixels
            if keep.any():
                a, b = inputs[..., keep][None], targets[..., keep][None]
                (token_loss(model(a), b, "sum") / total).backward()

    return backward


def hide(y: Tensor, share: float) -> Tensor:
    """Return targets of which some do not count; of eight examples the first does."""
    flat = y.flatten(1)
    hidden = torch.where(torch.rand(flat.shape) < share, IGNORED, flat)
    hidden[:8, 0] = flat[:8, 0]
    return hidden.reshape(y.shape)


@settings(max_examples=16)
@given(
    seed=seeds,
    share=st.floats(0.0, 0.9),
    image=st.booleans(),
    method=st.sampled_from(EVERY),
)
def test_ignored_positions_against_their_absence(
    seed: int, share: float, image: bool, method: Method
) -> None:
    torch.manual_seed(seed)
    model: nn.Module = PixelTagger() if image else Tagger()
    with_padding, without = [], []
    for _ in range(3):
        x = torch.randn(10, 2, 1, 3) if image else torch.randint(7, (10, 3))
        y = hide(torch.randint(3, (10, 1, 3) if image else (10, 3)), share)
        with_padding.append(padded(x, y))
        without.append(ragged(x, y))
    run(model, method, without).assert_equals(run(model, method, with_padding))


@few
@given(seed=seeds, padding=st.integers(1, 3), method=st.sampled_from(EVERY))
def test_padded_batch_against_a_shorter_one(
    seed: int, padding: int, method: Method
) -> None:
    torch.manual_seed(seed)
    model, long, short = Tagger(), [], []
    for _ in range(3):
        x, y = torch.randint(7, (9, 2)), torch.randint(3, (9, 2))
        junk = torch.randint(7, (9, padding))
        nothing = torch.full((9, padding), IGNORED)
        long.append(padded(torch.cat([x, junk], 1), torch.cat([y, nothing], 1)))
        short.append(padded(x, y))
    run(model, method, short).assert_equals(run(model, method, long))


@few
@given(seed=seeds, method=st.sampled_from(EVERY))
def test_ignored_images_against_their_absence(seed: int, method: Method) -> None:
    """Segmentation with neighbourhoods: whole images do not count."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 2, (3, 1), padding="same"),
        nn.Tanh(),
        nn.Conv2d(2, 2, (1, 3), padding="same"),
    )
    hidden, dropped = [], []
    for _ in range(3):
        x, y = torch.randn(14, 1, 2, 3), torch.randint(2, (14, 2, 3))
        dropped.append(padded(x[1:-2], y[1:-2]))
        y = y.clone()
        y[0] = y[-2:] = IGNORED
        hidden.append(padded(x, y))
    run(model, method, dropped).assert_equals(run(model, method, hidden))


# -- layers and bases ------------------------------------------------------------------


SIZES = {"first": (5, 4), "second": (4, 4), "third": (4, 4), "last": (4, 3)}


class Named(nn.Module):
    """The same function, whatever the order in which its layers are defined."""

    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        for name in order:
            setattr(self, name, nn.Linear(*SIZES[name]))

    def forward(self, x: Tensor) -> Tensor:
        for name in SIZES:
            x = torch.tanh(getattr(self, name)(x))
        return x


@few
@given(
    seed=seeds,
    order=st.permutations(list(SIZES)),
    method=st.sampled_from(EVERY),
)
def test_order_of_layers(seed: int, order: list[str], method: Method) -> None:
    torch.manual_seed(seed)
    model, other = Named(list(SIZES)), Named(order)
    other.load_state_dict(model.state_dict())
    steps = [mean_loss(torch.randn(9, 5), torch.randint(3, (9,))) for _ in range(5)]
    run(model, method, steps).assert_equals(run(other, method, steps), tolerance=1e-12)


def continued(
    model: nn.Module,
    optimizer: KroneckerOptimizer,
    batches: Sequence[tuple[Tensor, Tensor]],
) -> list[dict[str, Tensor]]:
    """Return what further steps move."""
    moves = []
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        moves.append(support.step_of(model, optimizer))
    return moves


def assert_same_moves(
    mine: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]
) -> None:
    for a, b in zip(mine, theirs, strict=True):
        for name, move in a.items():
            assert support.relative_error(move, b[name]) < 1e-8, name


@few
@given(
    seed=seeds,
    split=st.sampled_from(["exact", "factored"]),
    method=st.sampled_from(EVERY),
)
def test_signs_and_order_of_eigenvectors(seed: int, split: str, method: Method) -> None:
    """Put into the basis, with eigenvalues and scalings that follow it."""
    batches = data(seed, steps=6)
    model = classifier()
    optimizer = method(model, damping_split=split)
    continued(model, optimizer, batches[:2])
    twin, other = copy.deepcopy((model, optimizer))
    for layer in other.curvature.values():
        turns: dict[str, Tensor | None] = {"A": None, "G": None}
        for side in turns:
            basis = layer.basis(side)
            if basis is None:
                continue
            size = basis.shape[-1]
            signs = 2.0 * torch.randint(2, (size,)) - 1
            turn = torch.eye(size)[:, torch.randperm(size)] * signs
            basis.copy_(basis @ turn)
            values = layer.eigenvalues_A if side == "A" else layer.eigenvalues_G
            values.copy_(values @ turn.square())
            turns[side] = turn.expand_as(basis)
        s = layer.averages["s"].total
        s.copy_(transport(s, turns["G"], turns["A"]))
    # The third step uses the turned bases, the fourth refreshes them.
    expected = continued(model, optimizer, batches[2:])
    assert_same_moves(expected, continued(twin, other, batches[2:]))


@few
@given(
    seed=seeds,
    split=st.sampled_from(["exact", "factored"]),
    method=st.sampled_from([m for m in EVERY if m.optimizer is KFAC]),
)
def test_rotation_in_a_degenerate_eigenspace(
    seed: int, split: str, method: Method
) -> None:
    """Of K-FAC: the eigenvectors of equal eigenvalues are not determined.

    EKFAC is another matter: its scalings are the diagonal in the very basis.
    """
    torch.manual_seed(seed)
    sizes = torch.tensor([2.0, 2.0, 2.0, 1.0, 0.5, 0.5])
    x = torch.linalg.qr(torch.randn(8, 6)).Q * sizes
    x = x @ torch.linalg.qr(torch.randn(6, 6)).Q.t()
    y = torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
    optimizer = method(model, damping_split=split)
    continued(model, optimizer, [(x, y)] * 2)
    twin, other = copy.deepcopy((model, optimizer))
    layer = other.curvature["0"]
    assert layer.Q_A is not None
    found = layer.eigenvalues_A[0]
    torch.testing.assert_close(found, sizes.flip(0).square() / 8)
    turn = torch.block_diag(
        torch.linalg.qr(torch.randn(2, 2)).Q,
        torch.eye(1),
        torch.linalg.qr(torch.randn(3, 3)).Q,
    )
    layer.Q_A.copy_(layer.Q_A @ turn)
    expected = continued(model, optimizer, [(x, y)] * 3)
    assert_same_moves(expected, continued(twin, other, [(x, y)] * 3))


# -- images ----------------------------------------------------------------------------


def pooled_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular", bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )


# Not EKFAC with "reduce": under circular padding every tap of a kernel has the same
# mean input, so that factor has a null space in which the basis is not determined.
TILED = [
    m for m in EVERY if (m.optimizer is EKFAC) == (m.options["sharing"] == "expand")
]


@few
@given(
    seed=seeds,
    tiles=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    method=st.sampled_from(TILED),
)
def test_tiled_image(seed: int, tiles: tuple[int, int], method: Method) -> None:
    torch.manual_seed(seed)
    model, small, large = pooled_network(), [], []
    for _ in range(3):
        x, y = torch.randn(9, 1, 4, 4), torch.randint(3, (9,))
        small.append(mean_loss(x, y))
        large.append(mean_loss(x.tile(1, 1, *tiles), y))
    one, other = run(model, method, small), run(model, method, large)
    # With "expand" the factor of the gradients is smaller by the number of tiles; its
    # eigenvectors, all that EKFAC takes of it, are the same.
    one.assert_equals(other, factors=method.options["sharing"] == "reduce")


@few
@given(seed=seeds, tiles=st.tuples(st.integers(1, 3), st.integers(1, 2)))
def test_tiled_image_with_expanded_factors(seed: int, tiles: tuple[int, int]) -> None:
    """K-FAC's "expand" takes positions for independent: its blocks shrink by tiles.

    Each of ``T`` times as many positions has a ``T``-th of the gradient, so the sum of
    the squares is a ``T``-th, though the layer computes the same function.
    """
    torch.manual_seed(seed)
    model, count = pooled_network(), tiles[0] * tiles[1]
    x, y = torch.randn(9, 1, 4, 4), torch.randint(3, (9,))
    method = Method("KFAC", KFAC, {})
    one = run(model, method, [mean_loss(x, y)])
    other = run(model, method, [mean_loss(x.tile(1, 1, *tiles), y)])
    for name, block in one.blocks.items():
        shrunk = block if name == "6" else block / count
        assert support.relative_error(other.blocks[name], shrunk) < 1e-8
