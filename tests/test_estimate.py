"""Curvature matrices from data, against torch.func and other libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import collect, dense_basis, kron, relative_error
from test_exactness import (
    NETWORKS,
    bernoulli_fisher,
    block_of,
    build,
    dense_fisher,
    gaussian_fisher,
    jacobians,
    softmax_fisher,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ekfac
from ekfac.errors import (
    CaptureError,
    NotReadyError,
    StateMismatchError,
    UnsupportedLayerError,
    UnsupportedOperationError,
)
from ekfac.estimate.build import scalings
from ekfac.estimate.functions import fisher_source
from ekfac.matrices import merge
from ekfac.vectors import ParameterVector, VectorSpace

TIGHT = 1e-10


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with at most 400 parameters, in eval mode, and 5 examples."""
    model, x = build(name, examples=5)
    assert sum(p.numel() for p in model.parameters()) <= 400
    return model.eval(), x


def uneven(x: Tensor, y: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
    """Return the examples in batches of 3 and 2."""
    if y is None:
        return [(x[:3], None), (x[3:], None)]
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def same_layer(model: nn.Module) -> Tensor:
    """Return ``[P, P]``, true where two entries belong to one module."""
    names = [n for n, p in model.named_parameters() for _ in range(p.numel())]
    owners = [layer_of(name) for name in names]
    return torch.tensor([[a == b for b in owners] for a in owners])


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_structures_equal_the_dense_fisher(name):
    model, x = network(name)
    F = dense_fisher(model, x, softmax_fisher)
    found = {
        structure: ekfac.fisher(model, uneven(x), structure).to_dense()
        for structure in ("dense", "low_rank", "implicit", "block_diagonal", "diagonal")
    }
    for structure in ("dense", "low_rank", "implicit"):
        assert relative_error(found[structure], F) < TIGHT, structure
    blocks = torch.where(same_layer(model), F, 0.0)
    assert relative_error(found["block_diagonal"], blocks) < TIGHT
    assert relative_error(found["diagonal"], F.diagonal().diag()) < TIGHT


@pytest.mark.parametrize("name", NETWORKS)
def test_quasi_diagonal_keeps_the_biases_interactions(name):
    model, x = network(name)
    F = dense_fisher(model, x, softmax_fisher)
    found = ekfac.fisher(model, uneven(x), "quasi_diagonal")
    expected = F.diagonal().diag()
    blocks = getattr(found, "blocks", {})
    for key, block in blocks.items():
        if block.kind != "quasi_diagonal":
            continue
        space = VectorSpace.of(model)
        flat = torch.arange(space.size)
        index = block.packing.pack(space.vector(flat)).flatten(0, 1)
        for row in index:
            expected[row[:-1], row[-1]] = F[row[:-1], row[-1]]
            expected[row[-1], row[:-1]] = F[row[-1], row[:-1]]
        assert index.shape[1] > 1, key
    assert blocks or "Embedding" in name or name in BIASLESS
    assert relative_error(found.to_dense(), expected) < TIGHT


BIASLESS = ("tied head", "RMSNorm")


@pytest.mark.parametrize("name", NETWORKS)
def test_ekfac_is_the_best_diagonal_in_its_basis(name):
    model, x = network(name)
    F = dense_fisher(model, x, softmax_fisher)
    found = ekfac.fisher(model, uneven(x), "ekfac", fallback="dense")
    kfac = ekfac.fisher(model, uneven(x), "kfac", fallback="dense")
    assert relative_error(found.trace(), F.trace()) < TIGHT
    blocks = torch.where(same_layer(model), F, 0.0)
    assert relative_error(found.to_dense(), blocks) <= 1e-12 + relative_error(
        kfac.to_dense(), blocks
    )
    for block in found.blocks.values():
        if block.kind == "ekfac":
            layer = block.layer
            Q = kron(dense_basis(layer, "G"), dense_basis(layer, "A"))
            inside = Q.mT @ block_of(F, model, layer) @ Q
            entries = inside.diagonal(dim1=1, dim2=2)
            assert relative_error(layer.s.flatten(1), entries) < TIGHT
        else:
            index = flat_index(model, block.space)
            assert relative_error(block.to_dense(), F[index][:, index]) < TIGHT


def test_ekfac_estimates_hold_bases_and_scalings_alone():
    """The factors, as large as the bases, are of no more use."""
    model, x = network("Conv2d")
    for block in ekfac.fisher(model, uneven(x), "ekfac").blocks.values():
        assert block.layer.A is None
        assert block.layer.G is None
        kept = sum(t.numel() for t in block.layer._tensors().values())
        needed = sum(t.numel() for t in block._factors().values())
        b, d_out, d_in = block.packed_shape
        assert kept <= needed + 2 * b * (d_out + d_in)  # eigenvalues


def flat_index(model: nn.Module, space: VectorSpace) -> Tensor:
    """Return where the entries of ``space`` stand in the flat order of the model."""
    whole = VectorSpace.of(model)
    return space.flat(whole.vector(torch.arange(whole.size)).subset(space.names))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NETWORKS)
def test_live_factors_make_the_same_matrix(name, sharing):
    model, x = build(name, examples=5)
    optimizer = collect(
        model,
        lambda: model(x).sum(),
        fisher="exact",
        likelihood="gaussian",
        sharing=sharing,
    )
    for structure in ("kfac", "ekfac"):
        live = optimizer.curvature.matrix(structure, parameters=model)
        found = ekfac.fisher(
            model,
            uneven(x),
            structure,
            likelihood="gaussian",
            sharing=sharing,
            parameters=[
                n for la in optimizer.curvature.values() for n in la.parameter_names
            ],
        )
        index = flat_index(model, found.space)
        expected = live.to_dense()[index][:, index]
        # Bases of degenerate eigenvalues differ by rounding, and with them EKFAC.
        if structure == "kfac":
            assert relative_error(found.to_dense(), expected) < TIGHT
        assert relative_error(found.trace(), expected.trace()) < TIGHT


def test_live_matrix_before_the_first_step_and_after_another():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = ekfac.EKFAC(model, lr=0.1, basis_interval=1, factor_interval=1)
    with pytest.raises(NotReadyError):
        optimizer.curvature.matrix()
    with pytest.raises(ValueError, match=r"ekfac\.fisher"):
        optimizer.curvature.matrix("dense")
    x = torch.randn(6, 3)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    F = optimizer.curvature.matrix("ekfac")
    before = F.to_dense()
    assert F.space == VectorSpace.of(model)
    eye = torch.eye(F.size)
    derived = {
        "a multiple": (2 * F, 2 * before),
        "a sum": (F + F, 2 * before),
        "a power": (F.power(2, 0.1), torch.linalg.matrix_power(before + 0.1 * eye, 2)),
        "a conversion": (F.to(dtype=before.dtype), before),
    }
    step()
    assert not torch.equal(F.to_dense(), before)
    for what, (matrix, expected) in derived.items():
        assert relative_error(matrix.to_dense(), expected) < 1e-5, what


# -- kinds, likelihoods, losses --------------------------------------------------------

LOSSES: dict[str, Any] = {
    "categorical": (nn.CrossEntropyLoss(), softmax_fisher, 1.0),
    "bernoulli": (nn.BCEWithLogitsLoss(reduction="sum"), bernoulli_fisher, 1.0),
    # The mean over 3 outputs of the square: 2/3 of half the sum of squares.
    "gaussian": (nn.MSELoss(), gaussian_fisher, 2 / 3),
}


def targets(likelihood: str, n: int = 5, c: int = 3) -> Tensor:
    if likelihood == "categorical":
        return torch.arange(n) % c
    y = torch.randn(n, c, dtype=torch.float64)
    return (y > 0).double() if likelihood == "bernoulli" else y


@pytest.mark.parametrize("likelihood", LOSSES)
def test_exact_fisher_is_the_gauss_newton_matrix(likelihood):
    model, x = network("Linear")
    loss, output_fisher, scale = LOSSES[likelihood]
    data = uneven(x, targets(likelihood))
    F = dense_fisher(model, x, output_fisher)
    for structure in ("dense", "implicit", "low_rank", "kfac", "ekfac", "diagonal"):
        fisher = ekfac.fisher(model, data, structure, likelihood=likelihood).to_dense()
        gauss_newton = ekfac.ggn(model, data, loss, structure).to_dense() / scale
        if structure == "ekfac":
            assert relative_error(gauss_newton.trace(), fisher.trace()) < TIGHT
        else:
            assert relative_error(gauss_newton, fisher) < TIGHT, structure
        if structure in ("dense", "implicit", "low_rank"):
            assert relative_error(fisher, F) < TIGHT


@pytest.mark.parametrize("loss_fn", [None, "mean", "sum"])
@pytest.mark.parametrize("likelihood", LOSSES)
def test_empirical_fisher(likelihood, loss_fn):
    model, x = network("Linear")
    y = targets(likelihood)
    J, f = jacobians(model, x), model(x).detach()
    if likelihood == "categorical":
        h = f.softmax(-1) - nn.functional.one_hot(y, 3)
    else:
        h = (f.sigmoid() if likelihood == "bernoulli" else f) - y
    rows = torch.einsum("nkp,nk->np", J, h)
    expected = rows.mT @ rows / len(x)

    def loss(f: Tensor, y: Tensor) -> Tensor:
        if likelihood == "categorical":
            return nn.functional.cross_entropy(f, y, reduction=loss_fn)
        if likelihood == "bernoulli":
            terms = nn.functional.binary_cross_entropy_with_logits(
                f, y, reduction="none"
            )
        else:
            terms = (f - y).square() / 2
        return terms.sum() / (len(f) if loss_fn == "mean" else 1)

    for structure in ("dense", "implicit", "diagonal", "low_rank"):
        found = ekfac.fisher(
            model,
            uneven(x, y),
            structure,
            "empirical",
            likelihood,
            loss_fn=None if loss_fn is None else loss,
            loss_reduction=loss_fn,
        ).to_dense()
        wanted = expected.diagonal().diag() if structure == "diagonal" else expected
        assert relative_error(found, wanted) < TIGHT


def test_ignored_targets_do_not_count():
    model, x = network("Linear, positions")
    y = torch.zeros(5, 4, dtype=torch.long)
    y[:, 2] = y[3] = -100
    keep = [0, 1, 3]

    def fisher_of(f: Tensor) -> Tensor:
        whole = torch.zeros(12, 12, dtype=f.dtype)
        index = torch.arange(12).reshape(4, 3)[keep].flatten()
        whole[index.unsqueeze(1), index] = softmax_fisher(f[keep])
        return whole

    examples = [0, 1, 2, 4]
    F = dense_fisher(model, x[examples], fisher_of)
    for structure in ("dense", "implicit"):
        found = ekfac.fisher(model, uneven(x, y), structure).to_dense()
        assert relative_error(found, F) < TIGHT
    trace = ekfac.fisher(model, uneven(x, y), "ekfac").trace()
    assert relative_error(trace, F.trace()) < TIGHT


def test_l2_has_no_likelihood():
    model, x = network("Linear")
    F = dense_fisher(model, x, gaussian_fisher)
    found = ekfac.fisher(model, uneven(x), "dense", "l2").to_dense()
    assert relative_error(found, F) < TIGHT


@pytest.mark.parametrize("likelihood", LOSSES)
def test_monte_carlo_converges_at_its_rate(likelihood):
    model, x = network("Linear")
    F = dense_fisher(model, x, LOSSES[likelihood][1])
    errors = []
    for samples in (16, 1024):
        found = [
            ekfac.fisher(
                model,
                uneven(x),
                "low_rank",
                "mc",
                likelihood,
                samples=samples,
                generator=torch.Generator().manual_seed(seed),
            ).to_dense()
            for seed in range(4)
        ]
        squares = [relative_error(sample, F) ** 2 for sample in found]
        errors.append((sum(squares) / len(squares)) ** 0.5)
    assert 4 < errors[0] / errors[1] < 16  # 8 = sqrt(1024 / 16)
    assert errors[1] < 0.1


def test_monte_carlo_is_one_matrix():
    """Every product, structure and order of a shuffling loader has the same draws."""
    model, x = network("Linear")
    dataset = torch.utils.data.TensorDataset(x, torch.zeros(5))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, shuffle=True)
    F = ekfac.fisher(model, loader, "implicit", "mc", samples=3)
    first = F.to_dense()
    torch.manual_seed(1)
    torch.randn(7)
    assert torch.equal(F.to_dense(), first)
    assert relative_error(first, first.mT) < 1e-12
    with_generator = [
        ekfac.fisher(
            model, uneven(x), s, "mc", generator=torch.Generator().manual_seed(3)
        ).to_dense()
        for s in ("dense", "implicit", "low_rank")
    ]
    for other in with_generator[1:]:
        assert relative_error(other, with_generator[0]) < TIGHT
    other = ekfac.fisher(
        model, uneven(x), "dense", "mc", generator=torch.Generator().manual_seed(4)
    )
    assert relative_error(other.to_dense(), with_generator[0]) > 1e-3


# -- Hessians --------------------------------------------------------------------------


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor, loss: Any) -> Tensor:
    """Return the Hessian row by row.

    Not by torch.func.hessian, which for a layer norm over two dimensions differs from
    finite differences by 2 % (torch 2.13).
    """
    parameters = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model(x), y)
    grads = torch.autograd.grad(value, parameters, create_graph=True)
    rows = [
        torch.autograd.grad(
            entry, parameters, retain_graph=True, materialize_grads=True
        )
        for grad in grads
        for entry in grad.flatten()
    ]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize(
    "name", ["Linear", "Conv2d groups", "LayerNorm", "attention", "tied", "BatchNorm"]
)
def test_hessian_structures_equal_the_dense_one(name):
    model, x = network(name)
    y, loss = torch.arange(5) % 2, nn.CrossEntropyLoss()
    H = dense_hessian(model, x, y, loss)
    data = uneven(x, y)
    for structure in ("implicit", "dense"):
        found = ekfac.hessian(model, data, loss, structure).to_dense()
        assert relative_error(found, H) < TIGHT, structure
    blocks = ekfac.hessian(model, data, loss, "block_diagonal").to_dense()
    assert relative_error(blocks, torch.where(same_layer(model), H, 0.0)) < TIGHT
    diagonal = ekfac.hessian(model, data, loss, "diagonal").to_dense()
    assert relative_error(diagonal, H.diagonal().diag()) < TIGHT


def test_hessian_of_relu_networks_has_the_blocks_of_gauss_newton():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4), nn.ReLU()
    )
    model.append(nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 1, 3, 3, dtype=torch.float64), torch.arange(5) % 3
    loss = nn.CrossEntropyLoss()
    H = ekfac.hessian(model, uneven(x, y), loss, "block_diagonal")
    G = ekfac.ggn(model, uneven(x, y), loss, "block_diagonal")
    assert relative_error(H.to_dense(), G.to_dense()) < TIGHT
    whole = ekfac.hessian(model, uneven(x, y), loss, "dense").to_dense()
    assert relative_error(whole, G.to_dense()) > 1e-2


# -- mappings, subsets, inputs ---------------------------------------------------------


class Own(nn.Module):
    """A layer without adapter, between two with one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.enter(x)) * self.scale
        y: Tensor = self.leave(hidden if shift is None else hidden + shift)
        return y


def own() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Own().double(), torch.randn(5, 3, dtype=torch.float64)
    return model, x, dense_fisher(model, x, softmax_fisher)


def test_layers_without_adapter():
    model, x, F = own()
    for structure in ("kfac", "ekfac"):
        with pytest.raises(UnsupportedLayerError, match=r"scale.*fallback='diagonal'"):
            ekfac.fisher(model, uneven(x), structure)
    for choice in (
        {"fallback": "diagonal"},
        {"structure": {nn.Linear: "ekfac", nn.Module: "diagonal"}},
        {"structure": {"enter": "ekfac", "leave": "ekfac", Own: "diagonal"}},
    ):
        found = ekfac.fisher(model, uneven(x), **choice)
        kinds = {key: block.kind for key, block in found.blocks.items()}
        assert kinds == {"enter": "ekfac", "leave": "ekfac", "": "diagonal"}
        assert relative_error(found.trace(), F.trace()) < TIGHT
        entries = F.diagonal()[:4]  # a module's own parameters come first
        assert relative_error(found.diagonal()["scale"], entries) < TIGHT


def test_a_mapping_mixes_structures():
    model, x, F = own()
    choice = {"enter": "dense", "leave": "quasi_diagonal", nn.Module: "low_rank"}
    found = ekfac.fisher(model, uneven(x), choice)
    kinds = {key: block.kind for key, block in found.blocks.items()}
    assert kinds == {"enter": "dense", "leave": "quasi_diagonal", "": "low_rank"}
    D = found.to_dense()
    for part in (slice(0, 4), slice(4, 20)):
        assert relative_error(D[part, part], F[part, part]) < TIGHT
    assert relative_error(D.diagonal(), F.diagonal()) < TIGHT
    with pytest.raises(ValueError, match=r"lacks: \['exit'\]"):
        ekfac.fisher(model, uneven(x), {"exit": "kfac", nn.Module: "diagonal"})
    with pytest.raises(ValueError, match="no entry for layer 'leave'"):
        ekfac.fisher(model, uneven(x), {"enter": "kfac"})
    with pytest.raises(ValueError, match="implicit"):
        ekfac.fisher(model, uneven(x), {nn.Module: "implicit"})


@pytest.mark.parametrize("structure", ["dense", "implicit", "diagonal", "ekfac"])
def test_subsets_of_the_parameters(structure):
    model, x, F = own()
    for p in model.leave.parameters():
        p.requires_grad_(False)
    found = ekfac.fisher(
        model, uneven(x), structure, parameters=["enter", "leave.weight"]
    )
    index = torch.arange(4, 32)
    assert found.space.names == ("enter.weight", "enter.bias", "leave.weight")
    assert relative_error(found.trace(), F[index][:, index].trace()) < TIGHT
    assert not model.leave.weight.requires_grad
    default = ekfac.fisher(model, uneven(x), "diagonal")
    assert default.space.names == ("scale", "enter.weight", "enter.bias")
    with pytest.raises(StateMismatchError, match="exit"):
        ekfac.fisher(model, uneven(x), parameters=["exit"])


def test_inputs_of_several_forms():
    model, x, F = own()
    shift = torch.zeros(5, 4, dtype=torch.float64)
    forms = [
        x,
        {"x": x, "shift": shift},
        (x, shift),
    ]
    for inputs in forms:
        found = ekfac.fisher(model, [(inputs, None)], "dense").to_dense()
        assert relative_error(found, F) < TIGHT
    mappings = [{"x": x[:2]}, {"x": x[2:]}]
    for data in (mappings, iter(mappings), ((m["x"],) for m in mappings)):
        found = ekfac.fisher(model, data, "implicit", progress=True).to_dense()
        assert relative_error(found, F) < TIGHT


class Positional(nn.Module):
    """An embedding of the positions, called once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(5, 3), nn.Embedding(4, 3)
        self.leave = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.token(x) + self.position(torch.arange(x.shape[1]))
        y: Tensor = self.leave(torch.tanh(hidden).mean(1))
        return y


@pytest.mark.parametrize("sizes", [(3, 2), (4,), (2, 2), (1, 4)])
def test_layers_called_without_a_batch(sizes):
    """Their recorded gradients are sums over the batch, so they are taken apart.

    Four positions look like four examples, or like two of two positions.
    """
    torch.manual_seed(0)
    model, x = Positional().double(), torch.randint(5, (sum(sizes), 4))
    F = dense_fisher(model, x, softmax_fisher)
    data = [(part, None) for part in x.split(sizes)]
    found = ekfac.fisher(model, data, "diagonal")
    assert relative_error(found.to_dense(), F.diagonal().diag()) < TIGHT


@pytest.fixture
def signs(monkeypatch):
    """Return a setter of the signs that all pseudo-gradients get."""

    def choose(pattern: Tensor) -> None:
        monkeypatch.setattr("ekfac.likelihoods.signs", lambda count, _: pattern)

    return choose


PATTERNS = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 3)


@pytest.mark.parametrize("matrix", ["exact", "ggn", "empirical"])
def test_signs_take_examples_apart_that_a_layer_sums(matrix, signs):
    """The mean over all their patterns is the exact factor."""
    torch.manual_seed(0)
    model, x = Positional().double(), torch.randint(5, (3, 4))
    data = [(x, torch.tensor([0, 2, 1]))]
    F = ekfac.fisher(model, data, "dense", "empirical").to_dense()
    if matrix != "empirical":
        F = dense_fisher(model, x, softmax_fisher)
    by_position = F[15:27, 15:27].reshape(4, 3, 4, 3).diagonal(dim1=0, dim2=2)
    found = []
    for pattern in PATTERNS:
        signs(pattern)
        if matrix == "ggn":
            estimate = ekfac.ggn(model, data, nn.CrossEntropyLoss(), "kfac")
        else:
            estimate = ekfac.fisher(model, data, "kfac", matrix)
        found.append(estimate.blocks["position"].factor("G")[0])
    mean = torch.stack(found).mean(0)
    assert relative_error(mean, by_position.sum(-1)) < TIGHT
    assert relative_error(found[0], by_position.sum(-1)) > 0.01  # of a sum's gradient


def test_signs_leave_scalings_without_bias(signs):
    torch.manual_seed(0)
    model, x = Positional().double(), torch.randint(5, (3, 4))
    F = dense_fisher(model, x, softmax_fisher)[15:27, 15:27].reshape(4, 3, 4, 3)
    layer = ekfac.fisher(model, [(x, None)], "ekfac").blocks["position"].layer
    found = []
    for pattern in PATTERNS:
        signs(pattern)
        source = fisher_source("exact", "categorical")
        scaled = scalings(model, [(x, None)], {"position": layer}, source)
        found.append(scaled["position"][0])
    exact = torch.einsum("oi,sosp,pi->is", layer.Q_G[0], F, layer.Q_G[0])
    assert relative_error(torch.stack(found).mean(0), exact) < TIGHT


def test_signs_are_those_of_the_generator():
    torch.manual_seed(0)
    model, x = Positional().double(), torch.randint(5, (3, 4))

    def estimate(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        found = ekfac.fisher(model, [(x, None)], "kfac", generator=generator)
        return found.blocks["position"].factor("G")

    assert torch.equal(estimate(1), estimate(1))
    assert len({float(estimate(seed).sum()) for seed in range(8)}) > 1


# -- other libraries -------------------------------------------------------------------


def small_networks() -> dict[str, tuple[nn.Sequential, Tensor]]:
    torch.manual_seed(0)
    linear = nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    conv = nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, stride=2)
    )
    conv.extend([nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)])
    return {
        "linear": (linear.double(), torch.randn(8, 4, dtype=torch.float64)),
        "conv": (conv.double(), torch.randn(8, 2, 4, 4, dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_equals_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    model, x = small_networks()[name]
    y, loss = torch.arange(8) % 3, nn.CrossEntropyLoss()
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    parameters = list(model.parameters())
    eye = torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64)
    options: dict[str, Any] = {
        "separate_weight_and_bias": False,
        "check_deterministic": False,
    }
    for structure, operator in (
        ("kfac", curvlinops.KFACLinearOperator),
        ("ekfac", curvlinops.EKFACLinearOperator),
    ):
        for kind, theirs in (("exact", "type-2"), ("empirical", "empirical")):
            K = operator(model, loss, parameters, data, fisher_type=theirs, **options)
            found = ekfac.fisher(model, data, structure, kind).to_dense()
            assert relative_error(found, K @ eye) < 1e-9, (structure, kind)
    G = curvlinops.GGNLinearOperator(
        model, loss, parameters, data, check_deterministic=False
    )
    assert relative_error(ekfac.ggn(model, data, loss, "dense").to_dense(), G @ eye) < (
        TIGHT
    )


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_equals_nngeometry(name, float64):
    metrics = pytest.importorskip("nngeometry.metrics")
    objects = pytest.importorskip("nngeometry.object")
    model, x = small_networks()[name]
    data = torch.utils.data.TensorDataset(x, torch.arange(8) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    for structure, representation in (
        ("kfac", objects.PMatKFAC),
        ("ekfac", objects.PMatEKFAC),
        ("diagonal", objects.PMatDiag),
        ("block_diagonal", objects.PMatBlockDiag),
    ):
        F = metrics.FIM(model, loader, representation, variant="classif_logits")
        if structure == "ekfac":
            F.update_diag(loader)
        dense = F.to_torch()
        found = ekfac.fisher(model, loader, structure).to_dense()
        assert relative_error(found, dense) < 1e-9, structure


# -- as it was found -------------------------------------------------------------------


def test_everything_is_left_as_it_was_found():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    model.train()
    model[1].eval()
    model[3].bias.requires_grad_(False)
    x, y = torch.randn(6, 3), torch.arange(6) % 3
    model(x).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: None if g is None else g.clone() for n, g in grads.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    order = torch.Generator().manual_seed(0)
    dataset = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, shuffle=True, generator=order
    )
    states = torch.get_rng_state(), order.get_state()
    loss = nn.CrossEntropyLoss()
    v = torch.ones(sum(p.numel() for p in model.parameters() if p.requires_grad))
    with torch.no_grad():
        for structure in ("ekfac", "kfac", "diagonal", "dense", "low_rank"):
            ekfac.fisher(model, loader, structure, "mc")
        ekfac.fisher(model, loader, "implicit", "mc") @ v
        ekfac.hessian(model, loader, loss) @ v
        ekfac.hessian(model, loader, loss, "diagonal")
        ekfac.ggn(model, loader, loss)
        J = ekfac.jacobian(model, x)
        J.T @ (J @ v)
        ekfac.ntk(model, x)
        with pytest.raises(ValueError, match="not finite"):
            ekfac.fisher(model, [(x, y), (x / 0, y)], parameters=["3"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(order.get_state(), states[1])
    assert model.training
    assert [m.training for m in model] == [True, False, True, True]
    assert not model[3].bias.requires_grad
    for name, p in model.named_parameters():
        assert p.grad is grads[name]
        assert p.grad is None or torch.equal(p.grad, copies[name])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -- errors ----------------------------------------------------------------------------


def test_errors_say_what_to_do():
    model, x, _ = own()
    y = torch.arange(5) % 3
    fallback: dict[str, Any] = {"fallback": "diagonal"}
    for data in ([], iter([])):
        with pytest.raises(ValueError, match="no batches"):
            ekfac.fisher(model, data, **fallback)
    with pytest.raises(ValueError, match="no batches"):
        ekfac.hessian(model, [], nn.CrossEntropyLoss())
    for structure in ("ekfac", "dense", "diagonal"):
        with pytest.raises(ValueError, match="batch 1 are not finite"):
            ekfac.fisher(model, [(x, y), (x * torch.nan, y)], structure, **fallback)
    with pytest.raises(ValueError, match="batch 0 are not finite"):
        ekfac.fisher(model, [(x * torch.inf, y)], "implicit").trace()
    with pytest.raises(TypeError, match=r"\[\(x, y\)\]"):
        ekfac.fisher(model, (x, y), **fallback)
    with pytest.raises(ValueError, match="structure must be one of"):
        ekfac.fisher(model, [(x, y)], "tridiagonal")
    with pytest.raises(ValueError, match="structure must be one of"):
        ekfac.hessian(model, [(x, y)], nn.CrossEntropyLoss(), "kfac")
    with pytest.raises(ValueError, match="kind must be one of"):
        ekfac.fisher(model, [(x, y)], kind="true", **fallback)
    with pytest.raises(ValueError, match="has no targets"):
        ekfac.fisher(model, [(x, None)], kind="empirical", **fallback)
    loss = nn.CrossEntropyLoss(reduction="none")
    with pytest.raises(ValueError, match="one number for a batch"):
        ekfac.ggn(model, [(x, y)], loss, loss_reduction="sum", **fallback)
    with pytest.raises(ValueError, match=r"ekfac\.hessian"):
        ekfac.ggn(model, [(x, y)], lambda f, y: -f.square().sum(), **fallback)
    F = ekfac.fisher(model, [(x, y)], "diagonal")
    with pytest.raises(ValueError, match="preconditioner"):
        ekfac.fisher(model, [(x, y)], "dense", preconditioner=F)
    with pytest.raises(ValueError, match="do not fit outputs"):
        ekfac.fisher(model, [(x, y[:3])], kind="empirical", **fallback)


def test_vectors_and_operations_that_do_not_fit():
    model, x, _ = own()
    F = ekfac.fisher(model, [(x, None)], "quasi_diagonal")
    other = ParameterVector.from_model(nn.Linear(3, 2).double())
    with pytest.raises(StateMismatchError, match="another model"):
        F @ other
    with pytest.raises(UnsupportedOperationError, match="block_diagonal"):
        F.power(-0.5, 1.0)


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


class Elementwise(Functional):
    """Uses the weight in operations of which no block is known."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * self.layer.weight).sum(-1) + self.layer.bias


def test_weights_that_a_known_operation_uses_have_a_block_without_a_call():
    model, x = Functional(), torch.randn(4, 3)
    F = ekfac.fisher(model, [(x, None)], "ekfac")
    dense = ekfac.fisher(model, [(x, None)], "dense")
    # The scalings of all directions add up to the trace of the exact blocks.
    assert float(F.trace()) == pytest.approx(float(dense.trace()), rel=1e-5)


def test_layers_that_are_not_called():
    model, x = Elementwise(), torch.randn(4, 3)
    with pytest.raises(CaptureError, match="'layer' was not called"):
        ekfac.fisher(model, [(x, None)], "ekfac")
    choice = {"layer": "dense", nn.Module: "ekfac"}
    found = ekfac.fisher(model, [(x, None)], choice)
    whole = ekfac.fisher(model, [(x, None)], "dense")
    assert relative_error(found.to_dense(), whole.to_dense()) < 1e-6
    assert not found.diagonal()["spare.weight"].any()  # nothing depends on it


def test_an_implicit_matrix_solves_with_a_preconditioner():
    model, x = network("Linear")
    P = ekfac.fisher(model, uneven(x), "ekfac")
    F = ekfac.fisher(model, uneven(x), "implicit", preconditioner=P)
    v = ParameterVector.from_model(model)
    found = F.solve(v, 1e-2)
    expected = ekfac.fisher(model, uneven(x), "dense").solve(v, 1e-2)
    assert relative_error(found.flat(), expected.flat()) < 1e-8


def test_merging_loaders_is_exact():
    model, x = network("Linear")
    whole = ekfac.fisher(model, uneven(x), "kfac")
    parts = [ekfac.fisher(model, [(part, None)], "kfac") for part in (x[:3], x[3:])]
    merged = merge(parts, [3, 2])
    assert relative_error(merged.to_dense(), whole.to_dense()) < TIGHT
