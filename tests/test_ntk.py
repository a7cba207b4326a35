"""The Jacobian as an operator and the tangent kernel, in double precision."""

from __future__ import annotations

import pytest
import torch
from support import relative_error
from test_estimate import Own, Positional, network, uneven
from test_exactness import NETWORKS, jacobians
from torch import Tensor, nn

import ekfac
from ekfac import FunctionVector, ParameterVector
from ekfac.errors import CaptureError, StateMismatchError
from ekfac.estimate.tangent_kernel import layer_features

TIGHT = 1e-10


def dense_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``[n c, P]``."""
    return jacobians(model, x).flatten(0, 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_equal_those_of_the_dense_jacobian(name):
    model, x = network(name)
    J = dense_jacobian(model, x)
    K = ekfac.ntk(model, x)
    assert K.space.vector_type is FunctionVector
    assert relative_error(K.to_dense(), J @ J.mT) < TIGHT
    y = x[1:4]
    cross = ekfac.ntk(model, x, y)
    assert relative_error(cross, J @ dense_jacobian(model, y).mT) < TIGHT
    implicit = ekfac.ntk(model, x, structure="implicit")
    assert relative_error(implicit.to_dense(), J @ J.mT) < TIGHT


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LayerNorm", "Embedding"])
def test_layers_kernels_are_those_of_their_parameters(name):
    model, x = network(name)
    layers = ekfac.ntk(model, x, layerwise=True)
    modules = dict(model.named_modules())
    for key, kernel in layers.items():
        names = [f"{key}.{n}" for n, _ in modules[key].named_parameters()]
        own = ekfac.jacobian(model, x, parameters=names).to_dense()
        assert relative_error(kernel.to_dense(), own @ own.mT) < TIGHT


@pytest.mark.parametrize("name", NETWORKS)
def test_no_part_of_a_layer_is_lost(name):
    model, x = network(name)
    layers = ekfac.ntk(model, x, layerwise=True)
    total = sum(kernel.to_dense() for kernel in layers.values())
    assert relative_error(total, ekfac.ntk(model, x).to_dense()) < TIGHT


@pytest.mark.parametrize("work", [1, 100, 1 << 25])
@pytest.mark.parametrize("name", ["Linear", "Linear, many positions", "Conv1d"])
def test_pieces_of_any_size_give_the_same_kernel(name, work, monkeypatch):
    monkeypatch.setattr("ekfac.estimate.tangent_kernel.WORK", work)
    monkeypatch.setattr("ekfac.estimate.tangent_kernel.RECORDED", work)
    model, x = network(name)
    J = dense_jacobian(model, x)
    assert relative_error(ekfac.ntk(model, x).to_dense(), J @ J.mT) < TIGHT


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("examples", [5, 4])
def test_layers_without_adapter_or_batch_dimension(positional, examples):
    """Four positions of a position embedding look like as many examples."""
    torch.manual_seed(0)
    model = (Positional() if positional else Own()).double()
    x = torch.randn(examples, 3).double()
    if positional:
        x = torch.randint(5, (examples, 4))
    J = dense_jacobian(model, x)
    assert relative_error(ekfac.ntk(model, x).to_dense(), J @ J.mT) < TIGHT
    cross = ekfac.ntk(model, x, x[:2])
    assert relative_error(cross, J @ J[:6].mT) < TIGHT


@pytest.mark.parametrize("name", NETWORKS)
def test_the_operator_is_the_dense_jacobian(name):
    model, x = network(name)
    D, J = dense_jacobian(model, x), ekfac.jacobian(model, x)
    assert J.shape == D.shape
    assert relative_error(J.to_dense(), D) < TIGHT
    assert relative_error(J.T.to_dense(), D.mT) < TIGHT
    generator = torch.Generator().manual_seed(0)
    v = ParameterVector.from_model(model).random_like(generator)
    pushed = J @ v
    assert isinstance(pushed, FunctionVector)
    assert relative_error(pushed.flat(), D @ v.flat()) < TIGHT
    pulled = J.T @ pushed
    assert isinstance(pulled, ParameterVector)
    assert relative_error(pulled.flat(), D.mT @ D @ v.flat()) < TIGHT
    columns = torch.randn(J.shape[1], 20, generator=generator, dtype=torch.float64)
    assert relative_error(J @ columns, D @ columns) < TIGHT
    assert relative_error(J @ columns[:, 0], D @ columns[:, 0]) < TIGHT
    assert relative_error(J.T @ (J @ columns), D.mT @ D @ columns) < TIGHT


@pytest.mark.parametrize("structure", ["dense", "low_rank", "implicit"])
def test_fisher_and_kernel_share_their_spectrum(structure):
    """The non-zero eigenvalues of ``J^T J`` and ``J J^T`` are the same."""
    model, x = network("Conv2d")
    F = ekfac.fisher(model, uneven(x), structure, "l2")
    if structure == "implicit":
        F.dense_limit = F.size
    K = ekfac.ntk(model, x) / len(x)
    ours, theirs = F.eigenvalues().flip(0)[:15], K.eigenvalues().flip(0)[:15]
    assert relative_error(ours, theirs) < TIGHT
    assert float(F.eigenvalues()[:-15].abs().max()) < 1e-12


def test_matrices_of_function_space_have_the_algebra():
    model, x = network("Linear")
    K = ekfac.ntk(model, x)
    u = FunctionVector(torch.ones(5, 3, dtype=torch.float64))
    assert isinstance(K @ u, FunctionVector)
    expected = (ekfac.jacobian(model, x).T @ u).norm() ** 2
    assert relative_error(K.quadratic(u), expected) < TIGHT


def test_errors_say_what_to_do():
    model, x = network("Linear")
    J = ekfac.jacobian(model, x)
    with pytest.raises(StateMismatchError, match="another model"):
        J @ ParameterVector.from_model(nn.Linear(2, 2).double())
    with pytest.raises(StateMismatchError, match="has shape"):
        J @ torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        ekfac.ntk(model, x * torch.nan)
    with pytest.raises(ValueError, match="jacobian"):
        ekfac.ntk(model, x, x, structure="implicit")
    with pytest.raises(ValueError, match="structure must be"):
        ekfac.ntk(model, x, structure="kfac")


class PositionsFirst(nn.Module):
    """Its first layer sees ``[S, N, 3]``; rows meet in it where ``centred``."""

    def __init__(self, *, centred: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(3, 4), nn.Linear(4, 2)
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x.transpose(0, 1)))
        h = h - h.mean(dim=1, keepdim=True) if self.centred else h
        y: Tensor = self.leave(h.mean(dim=0))
        return y


def test_features_of_layers_with_positions_first_make_the_jacobian():
    model = PositionsFirst().double()
    x = torch.randn(4, 4, 3, dtype=torch.float64)  # as many positions as examples
    outputs, layers = layer_features(model, x)
    assert torch.equal(outputs, model(x))
    for name, layer in layers.items():
        rows = torch.einsum("ncsbo,nsbi->ncboi", layer.grads, layer.inputs).squeeze(2)
        weight = ekfac.jacobian(model, x, parameters=[f"{name}.weight"]).to_dense()
        assert relative_error(rows[..., :-1].flatten(2).flatten(0, 1), weight) < TIGHT


def test_features_of_a_layer_that_mixes_examples_are_refused():
    model = PositionsFirst(centred=True).double()
    with pytest.raises(CaptureError, match=r"'enter'.*parameters="):
        layer_features(model, torch.randn(4, 5, 3, dtype=torch.float64))


def test_an_embedding_that_all_examples_share_is_left_out_of_the_features():
    model = Positional().double()
    layers = layer_features(model, torch.randint(5, (3, 4)))[1]
    assert list(layers) == ["leave"]
