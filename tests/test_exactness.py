"""Against dense Fisher matrices from torch.func, in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from support import (
    STATISTICS,
    block_of,
    collect,
    dense_basis,
    ekfac_blocks,
    kfac_blocks,
    kron,
    relative_error,
)
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Independent,
    Normal,
    OneHotCategorical,
    Poisson,
)
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, KFAC, LayerCurvature, likelihoods
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

# -- dense Fisher matrices -------------------------------------------------------------


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``[N, K, P]``: each example's outputs by all parameters."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        # A copy: functional_call does not restore a module that has two names.
        result: Tensor = functional_call(copy.deepcopy(model), values, (one,))
        return result.flatten()

    rows = []
    for one in x.split(1):
        parts = jacrev(outputs)(values, one)
        rows.append(torch.cat([parts[name].flatten(1) for name in values], dim=1))
    return torch.stack(rows)


def softmax_fisher(f: Tensor, dim: int = -1) -> Tensor:
    """Return ``[K, K]``: ``diag(p) - p p^T`` at every position of one example."""
    place = (
        torch.arange(f.numel())
        .reshape(f.shape)
        .movedim(dim, -1)
        .reshape(-1, f.shape[dim])
    )
    H = f.new_zeros(f.numel(), f.numel())
    for where, logits in zip(place, f.flatten()[place], strict=True):
        p = logits.softmax(-1)
        H[where.unsqueeze(1), where] = p.diag() - torch.outer(p, p)
    return H


def bernoulli_fisher(f: Tensor) -> Tensor:
    p = f.flatten().sigmoid()
    return torch.diag(p * (1 - p))


def gaussian_fisher(f: Tensor) -> Tensor:
    return torch.eye(f.numel(), dtype=f.dtype)


def poisson_fisher(f: Tensor) -> Tensor:
    return torch.diag(f.flatten().exp())


OUTPUT_FISHER = {
    "categorical": softmax_fisher,
    "bernoulli": bernoulli_fisher,
    "gaussian": gaussian_fisher,
}


def dense_fisher(
    model: nn.Module, x: Tensor, output_fisher: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return ``(1/N) sum_n J_n^T H_n J_n``."""
    with torch.no_grad():
        H = torch.stack([output_fisher(f) for f in model(x)])
    J = jacobians(model, x)
    return torch.einsum("nkp,nkl,nlq->pq", J, H, J) / len(x)


def dense_empirical(model: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    """Return the second moment of the examples' gradients of ``weights . outputs``."""
    grads = torch.einsum("nkp,nk->np", jacobians(model, x), weights.flatten(1))
    return grads.t() @ grads / len(x)


# -- networks --------------------------------------------------------------------------


class Pool(nn.Module):
    """Mean over the positions of ``[N, S, d]``, or ``[N, C, *]`` with ``dim=-1``."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1) if self.dim == 1 else x.flatten(2).mean(2)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, of keys to their first features."""

    def __init__(self, kdim: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(
            4, 2, kdim=kdim, bias=bias, batch_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        keys = x if self.attention.kdim == 4 else x[..., : self.attention.kdim]
        y: Tensor = self.attention(x, keys, x, need_weights=False)[0]
        return y


class Recurrent(nn.Module):
    """A cell made of linear layers over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.state, self.leave = (
            nn.Linear(3, 8),
            nn.Linear(2, 8),
            nn.Linear(2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 2)
        for step in x.unbind(1):
            i, f, g, o = (self.enter(step) + self.state(h)).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        y: Tensor = self.leave(h)
        return y


class Language(nn.Module):
    """Next-token logits ``[N, S, V]`` with the embedding's weight in the head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=bias)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(self.embedding(x)).tanh())
        return y


class Bigrams(nn.Module):
    """Logits from the embeddings of pairs of neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.embedding(x[:, 1:]).sin() * self.embedding(x[:, :-1])
        y: Tensor = self.head(pairs.sum(1))
        return y


def tied_linear() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(3, 2))


def perceptron(*shape: int, pool: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    layers: list[nn.Module] = [nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)]
    layers += [nn.Tanh(), Pool() if pool else nn.Identity(), nn.Linear(4, 3)]
    return nn.Sequential(*layers), shape


def through(
    *layers: nn.Module, shape: tuple[int, ...]
) -> tuple[nn.Module, tuple[int, ...]]:
    """Return layers with a nonlinearity after each, and a linear layer on top."""
    parts: list[nn.Module] = []
    for layer in layers:
        parts += [layer, nn.Tanh()]
    return nn.Sequential(*parts, nn.Flatten(), nn.LazyLinear(3)), shape


Network = Callable[[], tuple[nn.Module, tuple[int, ...]]]
TOKENS = (
    "Embedding",
    "Embedding padding",
    "Embedding called twice",
    "tied head",
    "tied head with bias",
)
NETWORKS: dict[str, Network] = {
    "Linear": lambda: perceptron(3),
    "Linear, positions": lambda: perceptron(4, 3),
    "Linear, pooled": lambda: perceptron(4, 3, pool=True),
    "Linear, many positions": lambda: perceptron(12, 3, pool=True),
    "Conv1d": lambda: through(
        nn.Conv1d(2, 3, 3, padding=2, dilation=2),
        nn.Conv1d(3, 2, 2, stride=2),
        shape=(2, 6),
    ),
    "Conv2d": lambda: through(
        nn.Conv2d(2, 3, (3, 2), padding="same"),
        nn.Conv2d(3, 3, 2, bias=False),
        shape=(2, 4, 3),
    ),
    "Conv3d": lambda: through(
        nn.Conv3d(1, 2, 2, padding=1, padding_mode="circular", stride=2),
        shape=(1, 3, 2, 3),
    ),
    "Conv2d groups": lambda: through(
        nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(6, 6, 2, groups=6), shape=(4, 3, 4)
    ),
    "ConvTranspose2d": lambda: through(
        nn.ConvTranspose2d(3, 2, 2, stride=2, padding=1, output_padding=1),
        shape=(3, 2, 3),
    ),
    "ConvTranspose1d groups": lambda: through(
        nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), shape=(4, 4)
    ),
    "Embedding": lambda: through(nn.Embedding(6, 3), nn.Linear(3, 3), shape=(4,)),
    "Embedding padding": lambda: through(nn.Embedding(6, 3, padding_idx=1), shape=(4,)),
    "LayerNorm": lambda: through(
        nn.Linear(3, 4),
        nn.LayerNorm((5, 4)),
        nn.Linear(4, 3),
        nn.LayerNorm(3),
        shape=(5, 3),
    ),
    "RMSNorm": lambda: through(nn.Linear(3, 4), nn.RMSNorm(4), shape=(5, 3)),
    "GroupNorm": lambda: through(nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), shape=(2, 5)),
    "BatchNorm": lambda: through(
        nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4).eval(), shape=(2, 4, 3)
    ),
    "InstanceNorm": lambda: through(
        nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), shape=(2, 5)
    ),
    "attention": lambda: through(SelfAttention(), shape=(3, 4)),
    "separate attention": lambda: through(
        SelfAttention(kdim=3, bias=False), shape=(3, 4)
    ),
    "recurrent": lambda: (Recurrent(), (4, 3)),
    "called twice": lambda: through(*[nn.Linear(3, 3)] * 2, shape=(4, 3)),
    "attention called twice": lambda: through(*[SelfAttention()] * 2, shape=(3, 4)),
    "Embedding called twice": lambda: (Bigrams(), (4,)),
    "tied": lambda: (tied_linear(), (3,)),
    "tied head": lambda: (Language(bias=False), (4,)),
    "tied head with bias": lambda: (Language(bias=True), (4,)),
}


def build(name: str, examples: int = 4) -> tuple[nn.Module, Tensor]:
    """Return a network in double precision and a batch."""
    torch.manual_seed(0)
    model, shape = NETWORKS[name]()
    model.double()
    if name in TOKENS:
        x = torch.randint(5, (examples, *shape))
    else:
        x = torch.randn(examples, *shape, dtype=torch.float64)
    model(x)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    return model, x


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def total(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss that only says where gradients come from."""
    return model(x).sum()


# -- EKFAC -----------------------------------------------------------------------------


def in_basis(layer: LayerCurvature, block: Tensor) -> Tensor:
    """Return a block's diagonal in the layer's basis, ``[b, d_out d_in]``."""
    Q = kron(dense_basis(layer, "G"), dense_basis(layer, "A"))
    return torch.einsum("bji,bjk,bki->bi", Q, block, Q)


def check_scalings(optimizer: KroneckerOptimizer, model: nn.Module, F: Tensor) -> None:
    """Check that scalings are the blocks' diagonals, and what follows from it."""
    assert optimizer.curvature
    for layer in optimizer.curvature.values():
        block, E, K = block_of(F, model, layer), ekfac_blocks(layer), kfac_blocks(layer)
        assert layer.s is not None
        diagonal = in_basis(layer, block)
        assert relative_error(layer.s.flatten(1), diagonal) < 1e-10, layer.name
        trace = block.diagonal(dim1=1, dim2=2).sum()
        assert float(layer.s.sum()) == pytest.approx(float(trace), rel=1e-10)
        rounding = 1e-12 * block.norm()
        assert (block - E).norm() <= (block - K).norm() + rounding, layer.name
        if layer.block.exact:
            assert relative_error(K, block) < 1e-10, layer.name
            assert relative_error(E, block) < 1e-10, layer.name


def has_bias(layer: LayerCurvature) -> bool:
    """Return whether the block has a bias and gradients to it that are not all 0."""
    zero = layer.name.endswith("k_proj")  # a shift of all keys changes nothing
    return len(layer.parameter_names) == 2 and not layer.block.exact and not zero


def bias_block(F: Tensor, model: nn.Module, layer: LayerCurvature) -> Tensor:
    """Return ``[b, d_out, d_out]``: what ``G`` is with one position, or reduced."""
    size = layer.block.shape[1:]
    block = block_of(F, model, layer).unflatten(1, size)[:, :, -1]
    return block.unflatten(2, size)[..., -1]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["categorical", "gaussian", "empirical"])
@pytest.mark.parametrize("name", NETWORKS)
def test_scalings(name: str, fisher: str, sharing: str) -> None:
    """They are the diagonal of the block in the eigenbasis, and so the best one."""
    model, x = build(name)
    weights = torch.randn(model(x).shape, dtype=torch.float64)
    if fisher == "empirical":
        F = dense_empirical(model, x, weights)
        options = {"loss_reduction": "sum"}
    else:
        F = dense_fisher(model, x, OUTPUT_FISHER[fisher])
        options = {"fisher": "exact", "likelihood": fisher}
    assert len(F) < 400
    optimizer = collect(
        model, lambda: (model(x) * weights).sum(), sharing=sharing, **options
    )
    check_scalings(optimizer, model, F)
    for layer in optimizer.curvature.values():
        if sharing == "reduce" and has_bias(layer):
            assert relative_error(layer.G, bias_block(F, model, layer)) < 1e-10


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize(
    "name", ["Linear", "Conv2d", "Conv2d groups", "tied", "Embedding"]
)
def test_scalings_of_wide_layers(name: str, fisher: str) -> None:
    """A side above ``max_dim`` has a diagonal factor and the identity as its basis."""
    model, x = build(name)
    weights = torch.randn(model(x).shape, dtype=torch.float64)
    if fisher == "empirical":
        F = dense_empirical(model, x, weights)
    else:
        F = dense_fisher(model, x, softmax_fisher)
    wide = [
        collect(
            model,
            lambda: (model(x) * weights).sum(),
            fisher=fisher,
            loss_reduction="sum",
            max_dim=max_dim,
        )
        for max_dim in (3, 2048)
    ]
    check_scalings(wide[0], model, F)
    for layer_name, layer in wide[0].curvature.items():
        dense = wide[1].curvature[layer_name]
        for side, size in (("A", layer.block.shape[2]), ("G", layer.block.shape[1])):
            found, expected = getattr(layer, side), getattr(dense, side)
            if size > 3 and expected.dim() == 3:
                expected = expected.diagonal(dim1=1, dim2=2)
            assert relative_error(found, expected) < 1e-10, layer_name


class WithConstants(nn.Module):
    """Calls its layer on the batch and on rows of its own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.layer, self.rows = nn.Linear(3, 3), nn.Parameter(torch.randn(rows, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.layer(self.rows).mean(0)
        return y


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_calls_on_other_rows_than_the_batch(rows: int) -> None:
    """Their gradient arrives summed over the batch and is one example's more."""
    model, x = WithConstants(rows).double(), doubles(4, 3)
    optimizer = collect(
        model, lambda: model(x).square().sum() / 2, loss_reduction="sum"
    )
    layer, g = optimizer.curvature["layer"], model(x).detach()
    ones = torch.ones(4, 1, dtype=torch.float64)
    own = torch.einsum("ni,nj->nij", g, torch.cat([x, ones], dim=1))
    mean = torch.cat([model.rows.detach().mean(0), ones[0]])
    gradients = torch.cat([own, torch.outer(g.sum(0), mean).unsqueeze(0)])
    rotated = layer.Q_G[0].t() @ gradients @ layer.Q_A[0]
    assert relative_error(layer.s[0], rotated.square().sum(0) / 4) < 1e-10


def test_examples_that_meet_in_batch_normalisation() -> None:
    """Their pseudo-gradients are independent, of single outputs as of drawn targets."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).double()
    x = doubles(6, 3)
    outputs = model[0](x).detach()
    J = torch.autograd.functional.jacobian(model[1:], outputs)  # [N, K, M, d]
    G = torch.einsum("nkmi,nkmj->ij", J, J) / len(x)
    optimizer = EKFAC(
        model,
        fisher="exact",
        likelihood="gaussian",
        **{**STATISTICS, "factor_decay": 0.99, "basis_interval": 1000},
    )
    for _ in range(200):
        total(model, x).backward()
        optimizer.step()
    assert relative_error(optimizer.curvature["0"].G, G.unsqueeze(0)) < 0.05


# -- K-FAC is exact for deep linear networks -------------------------------------------


def linear_network(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "one position": (
        lambda: linear_network(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)),
        (3,),
        "both",
    ),
    "a loss per position": (
        lambda: linear_network(nn.Linear(3, 4), nn.Linear(4, 2)),
        (5, 3),
        "expand",
    ),
    "tokens": (
        lambda: linear_network(nn.Embedding(5, 3), nn.Linear(3, 2, bias=False)),
        (4,),
        "expand",
    ),
    "convolution": (
        lambda: linear_network(nn.Conv2d(4, 6, (3, 2), padding=1, groups=2)),
        (4, 3, 4),
        "expand",
    ),
    "1 x 1": (
        lambda: linear_network(nn.Conv1d(2, 3, 3, stride=2), nn.Conv1d(3, 2, 1)),
        (2, 6),
        "expand",
    ),
    "transposed": (
        lambda: linear_network(
            nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, output_padding=1)
        ),
        (3, 3),
        "expand",
    ),
    "pooled": (
        lambda: linear_network(nn.Linear(3, 4), nn.Linear(4, 3), Pool()),
        (5, 3),
        "reduce",
    ),
    "pooled before the head": (
        lambda: linear_network(nn.Linear(3, 4), Pool(), nn.Linear(4, 2)),
        (5, 3),
        "reduce",
    ),
    "circular, pooled": (
        lambda: linear_network(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(4, 2, 2, padding="same", padding_mode="circular", groups=2),
            Pool(-1),
            nn.Linear(2, 2),
        ),
        (2, 4, 3),
        "reduce",
    ),
}


@pytest.mark.parametrize(
    ("name", "sharing"),
    [
        (name, sharing)
        for name, (_, _, exact) in LINEAR.items()
        for sharing in ("expand", "reduce")
        if exact in (sharing, "both")
    ],
)
@pytest.mark.parametrize("kind", [KFAC, EKFAC])
def test_deep_linear_networks(
    kind: type[KroneckerOptimizer], name: str, sharing: str
) -> None:
    make, shape, _ = LINEAR[name]
    model = make()
    x = torch.randint(5, (6, *shape)) if name == "tokens" else doubles(6, *shape)
    F = dense_fisher(model, x, gaussian_fisher)
    optimizer = collect(
        model,
        partial(total, model, x),
        kind,
        fisher="exact",
        likelihood="gaussian",
        sharing=sharing,
    )
    for layer in optimizer.curvature.values():
        block = block_of(F, model, layer)
        assert relative_error(kfac_blocks(layer), block) < 1e-10, layer.name
        scalings = layer.kronecker_scalings() if layer.s is None else layer.s
        assert relative_error(ekfac_blocks(layer, scalings), block) < 1e-10, layer.name


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_one_example(likelihood: str) -> None:
    """Without shared positions, one example's block is a Kronecker product."""
    model, _ = build("Linear")
    x = doubles(1, 3)
    F = dense_fisher(model, x, OUTPUT_FISHER[likelihood])
    optimizer = collect(
        model, partial(total, model, x), fisher="exact", likelihood=likelihood
    )
    for layer in optimizer.curvature.values():
        block = block_of(F, model, layer)
        assert relative_error(kfac_blocks(layer), block) < 1e-10, layer.name


# -- likelihoods -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A likelihood, the shape of the outputs and their Fisher matrix."""

    likelihood: object
    shape: tuple[int, ...]
    fisher: Callable[[Tensor], Tensor]
    exact: bool = True


CASES: dict[str, Case] = {
    "categorical": Case("categorical", (4,), softmax_fisher),
    "categorical [N, S, C]": Case("categorical", (3, 4), softmax_fisher),
    "categorical [N, C, H, W]": Case(
        "categorical", (3, 2, 2), partial(softmax_fisher, dim=0)
    ),
    "categorical [N, C, S]": Case(
        likelihoods.Categorical(class_dim=1), (3, 4), partial(softmax_fisher, dim=0)
    ),
    "bernoulli": Case("bernoulli", (4,), bernoulli_fisher),
    "bernoulli [N, S, K]": Case("bernoulli", (2, 3), bernoulli_fisher),
    "gaussian": Case("gaussian", (4,), gaussian_fisher),
    "gaussian [N, C, H, W]": Case("gaussian", (2, 2, 2), gaussian_fisher),
    "Categorical": Case(lambda f: Categorical(logits=f), (4,), softmax_fisher),
    "Categorical [N, S, C]": Case(
        lambda f: Categorical(logits=f), (3, 4), softmax_fisher
    ),
    "Categorical [N, C, S]": Case(
        lambda f: Categorical(logits=f.movedim(1, -1)),
        (3, 3),
        partial(softmax_fisher, dim=0),
    ),
    "OneHotCategorical": Case(
        lambda f: OneHotCategorical(logits=f), (4,), softmax_fisher
    ),
    "Bernoulli": Case(lambda f: Bernoulli(logits=f), (4,), bernoulli_fisher),
    "Bernoulli [N, S, K]": Case(
        lambda f: Bernoulli(logits=f), (2, 3), bernoulli_fisher
    ),
    "Independent": Case(
        lambda f: Independent(Bernoulli(logits=f), 1), (4,), bernoulli_fisher
    ),
    "Binomial": Case(
        lambda f: Binomial(3, logits=f), (3,), lambda f: 3 * bernoulli_fisher(f)
    ),
    "Poisson": Case(lambda f: Poisson(f.exp()), (4,), poisson_fisher, exact=False),
    "Normal": Case(
        lambda f: Normal(f, 0.5), (2, 3), lambda f: 4 * gaussian_fisher(f), exact=False
    ),
}


def network_for(case: Case) -> nn.Module:
    count = math.prod(case.shape)
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, count)]
    return nn.Sequential(*layers, nn.Unflatten(1, case.shape)).double()


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].exact])
def test_exact_likelihoods(name: str) -> None:
    case = CASES[name]
    model, x = network_for(case), doubles(5, 3)
    F = dense_fisher(model, x, case.fisher)
    optimizer = collect(
        model, partial(total, model, x), fisher="exact", likelihood=case.likelihood
    )
    check_scalings(optimizer, model, F)
    for layer in optimizer.curvature.values():
        assert relative_error(layer.G, bias_block(F, model, layer)) < 1e-10, layer.name


@pytest.mark.parametrize("name", CASES)
def test_sampled_likelihoods_converge(name: str) -> None:
    """The error falls with the root of the number of draws, to what it should be."""
    case = CASES[name]
    model, x = network_for(case), doubles(4, 3)
    F = dense_fisher(model, x, case.fisher)
    errors = []
    for copies in (64, 6400):
        many = x.repeat(copies, 1)
        optimizer = collect(
            model, partial(total, model, many), fisher="mc", likelihood=case.likelihood
        )
        worst = 0.0
        for layer in optimizer.curvature.values():
            diagonal = in_basis(layer, block_of(F, model, layer))
            worst = max(worst, relative_error(layer.s.flatten(1), diagonal))
        errors.append(worst)
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 3


def test_values_that_cannot_be_listed() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"likelihood=.*enumerated.*use 'mc' in place"):
        collect(
            model,
            lambda: model(torch.ones(2, 3)).sum(),
            fisher="exact",
            likelihood=lambda f: Poisson(f.exp()),
        )


# -- losses as users write them --------------------------------------------------------


IGNORE = -100


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("ignored", ["none", "positions", "example"])
@pytest.mark.parametrize(
    "shape", [(), (3,), (2, 3)], ids=["[N]", "[N, S]", "[N, H, W]"]
)
def test_cross_entropy(
    shape: tuple[int, ...], ignored: str, fisher: str, reduction: str
) -> None:
    """The scale is that of examples' own losses; examples without targets are none."""
    spatial = len(shape) == 2
    if spatial:
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 4, 1))
    else:
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 4))
    model.double()
    x = doubles(5, 2, *shape) if spatial else doubles(5, *shape, 3)
    y = torch.randint(4, (5, *shape))
    if ignored != "none" and shape:
        y[torch.rand(y.shape) < 0.4] = IGNORE
    if ignored == "example":
        y[2] = IGNORE
    logits_first = (
        (lambda f: f) if spatial or not shape else (lambda f: f.transpose(1, 2))
    )

    def loss() -> Tensor:
        return cross_entropy(
            logits_first(model(x)), y, reduction=reduction, ignore_index=IGNORE
        )

    counted = y != IGNORE
    examples = counted.flatten(1).any(1) if shape else counted
    chosen, kept = x[examples], counted[examples]
    if fisher == "exact":
        with torch.no_grad():
            H = torch.stack(
                [softmax_fisher(f, 0 if spatial else -1) for f in model(chosen)]
            )
        keep = kept.unsqueeze(1) if spatial else kept.unsqueeze(-1)
        keep = keep.expand(len(chosen), *model(chosen).shape[1:]).flatten(1).double()
        J = jacobians(model, chosen) * keep.unsqueeze(-1)
        F = torch.einsum("nkp,nkl,nlq->pq", J, H, J) / len(chosen)
    else:
        f = model(x).detach().requires_grad_()
        grad = torch.autograd.grad(
            cross_entropy(logits_first(f), y, reduction="sum", ignore_index=IGNORE), f
        )[0]
        F = dense_empirical(model, chosen, grad[examples])
    optimizer = collect(model, loss, fisher=fisher, loss_reduction=reduction)
    check_scalings(optimizer, model, F)
