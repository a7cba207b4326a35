"""Local spectral bias, and layers' eigenbases beside exact blocks, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from common import set_schedule
from sklearn.datasets import load_digits
from support import (
    STATISTICS,
    block_of,
    dense_basis,
    ekfac_blocks,
    example_gradients,
    kfac_blocks,
    kron,
)
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import avg_pool2d, cross_entropy

import ekfac
from ekfac.curvature.options import Schedule
from ekfac.diagnostics import basis_quality, step_modes
from ekfac.errors import NotReadyError

pytestmark = pytest.mark.usefixtures("float64")


def test_changes_are_those_of_the_linearised_step() -> None:
    """George 2023, lemma 6.2.1 (T8), and that it is the first order of a real step."""
    model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    named = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, p, (x,)))(named)
    J = torch.cat([j.flatten(0, 1).flatten(1) for j in found.values()], dim=1)
    outputs = model(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(outputs, y), outputs)
    distances = []
    for lr in (1e-2, 1e-3):
        modes = step_modes(model, x, lambda f: cross_entropy(f, y), lr=lr)
        expected = -lr * (J @ (J.mT @ slope.reshape(-1))).reshape(7, 3)
        torch.testing.assert_close(modes.foretold, expected)
        torch.testing.assert_close(modes.outputs, outputs.detach())
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        grads = torch.autograd.grad(cross_entropy(model(x), y), model.parameters())
        moved = {
            n: w - lr * g for (n, w), g in zip(weights.items(), grads, strict=True)
        }
        change = functional_call(model, moved, (x,)) - outputs.detach()
        distances.append(float((change - expected).norm() / change.norm()))
    assert distances[1] < 0.15 * distances[0] < 0.01
    assert len(modes.plot().lines) == 2
    assert bool((modes.eigenvalues.diff() <= 1e-12).all())


def test_linear_regression_converges_by_its_modes() -> None:
    """George 2023, proposition B.1.6: ``f*_j + (1 - lr lambda_j)^t (f_j0 - f*_j)``."""
    x, y = torch.randn(5, 8), torch.randn(5, 1)
    model = nn.Linear(8, 1, bias=False)
    lr = 0.5 / float(torch.linalg.matrix_norm(x, 2)) ** 2
    modes = step_modes(model, x, lambda f: (f - y).square().sum() / 2, lr=lr)
    start = modes.vectors.mT @ (modes.outputs - y)[:, 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for step in range(1, 31):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 2).backward()
        optimizer.step()
        now = modes.vectors.mT @ (model(x) - y)[:, 0]
        expected = (1 - lr * modes.eigenvalues) ** step * start
        torch.testing.assert_close(now.detach(), expected)
    decay = torch.exp(-1 / modes.time_constants)
    torch.testing.assert_close(decay, 1 - lr * modes.eigenvalues)


# -- eigenbases ------------------------------------------------------------------------


def exact_block(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    F = ekfac.fisher(model, [(x, y)], "dense", kind="empirical", parameters=[name])
    return F.to_dense()


def test_basis_quality_is_that_of_the_dense_matrices() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    optimizer = ekfac.EKFAC(model, **STATISTICS)
    x, y = torch.randn(30, 2, 3, 3), torch.randint(3, (30,))
    cross_entropy(model(x), y).backward()
    optimizer.step()
    for name, layer in optimizer.curvature.items():
        found = basis_quality(layer, exact_block(model, x, y, name))
        whole = ekfac.fisher(model, [(x, y)], "dense", kind="empirical").to_dense()
        F = block_of(whole, model, layer)
        gradients = example_gradients(
            model, layer, lambda: cross_entropy(model(x), y, reduction="none")
        ).flatten(2)
        torch.testing.assert_close(
            F, torch.einsum("nbi,nbj->bij", *[gradients] * 2) / 30
        )
        for M, error in (
            (kfac_blocks(layer), found.kfac_error),
            (ekfac_blocks(layer), found.ekfac_error),
        ):
            assert error == pytest.approx(float((F - M).norm() / F.norm()))
        assert found.ekfac_error <= found.kfac_error + 1e-10  # theorem 2
        spectra = [torch.linalg.eigvalsh(M).flatten().sort().values for M in (
            F, kfac_blocks(layer), ekfac_blocks(layer)
        )]  # fmt: skip
        for spectrum, distance in zip(
            spectra[1:], (found.kfac_spectrum, found.ekfac_spectrum), strict=True
        ):
            expected = (spectrum - spectra[0]).norm() / spectra[0].norm()
            assert distance == pytest.approx(float(expected), rel=1e-6)
        Q = kron(dense_basis(layer, "G"), dense_basis(layer, "A"))
        for C, value in (
            (F, found.correlation),
            (Q.mT @ F @ Q, found.basis_correlation),
        ):
            means = []
            for block in C:
                # The gradients of a softmax's inputs add up to zero: one direction of
                # the basis has no variance, and no correlation.
                kept = [i for i in range(len(block)) if block[i, i] > 1e-14]
                pairs = [(i, j) for i in kept for j in kept if i != j]
                R = [block[i, j] / (block[i, i] * block[j, j]).sqrt() for i, j in pairs]
                means.append(float(torch.stack(R).abs().mean()))
            assert value == pytest.approx(sum(means) / len(means), rel=1e-6)


def test_basis_quality_errors() -> None:
    model = nn.Linear(3, 2)
    optimizer = ekfac.EKFAC(model)
    (layer,) = optimizer.curvature.values()
    with pytest.raises(NotReadyError, match="no basis yet"):
        basis_quality(layer, torch.eye(8))
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"8 parameters.*got \[7, 7\]"):
        basis_quality(layer, torch.eye(7))


class Never(Schedule):
    """Refreshes no basis after the first."""

    def basis_due(self, step: int, index: int, layers: int) -> bool:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("seed", [40, 41, 42])
def test_the_basis_decorrelates_and_tracks(seed: int) -> None:
    """George 2023, section 4, T13 to T15, with scikit-learn's digits.

    The network is 64-20-15-15-15-10 with sigmoids, the block that of its second layer;
    the basis is that of step 0 throughout, the scalings are those of one batch of 200.
    Set on seeds 30 to 32. The digits give a smaller difference than MNIST: the mean is
    asserted, not that EKFAC is closer at 80 % of the points (9 of 12 on seed 40).
    """
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images).reshape(-1, 1, 8, 8)
    x = (avg_pool2d(x, 1).flatten(1) - 4.9) / 6
    y = torch.tensor(labels)
    widths = (64, 20, 15, 15, 15, 10)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(a, b)] + ([nn.Sigmoid()] if i < 4 else [])
    model = nn.Sequential(*layers)
    frozen = ekfac.EKFAC(model, **STATISTICS)
    set_schedule(frozen, Never(1, 1, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    ratios, spectra, correlations = [], [], []
    for step in range(601):
        chosen = torch.randperm(len(x))[:200]
        sgd.zero_grad()
        frozen.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        frozen.step()  # lr=0: statistics alone
        sgd.step()
        if step % 50 == 0:
            layer = frozen.curvature["2"]
            with frozen.capture.paused():
                block = exact_block(model, x, y, "2")
            found = basis_quality(layer, block)
            correlations.append(found.basis_correlation / found.correlation)
            if step:
                ratios.append(found.ekfac_error / found.kfac_error)
                spectra.append(found.ekfac_spectrum / found.kfac_spectrum)
    print(correlations, ratios, spectra)
    assert correlations[0] < 0.3
    assert sum(ratios) / len(ratios) < 1
    assert sum(spectra) / len(spectra) < 1
