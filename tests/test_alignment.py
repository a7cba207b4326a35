"""Kernel alignment against its definition with ``torch.func`` Jacobians in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import one_hot

from ekfac.diagnostics import kernel_alignment, label_alignment
from ekfac.diagnostics.tangent_kernel.alignment import centred

pytestmark = pytest.mark.usefixtures("float64")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip


def jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return ``[n c, P_layer]`` of every layer."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, p, (x,)))(named)
    layers: dict[str, list[Tensor]] = {}
    for name, J in found.items():
        layers.setdefault(name.split(".")[0], []).append(J.flatten(0, 1).flatten(1))
    return {name: torch.cat(parts, dim=1) for name, parts in layers.items()}


def centring_matrix(n: int, c: int, centring: str) -> Tensor:
    if centring == "all":
        return torch.eye(n * c) - torch.ones(n * c, n * c) / (n * c)
    if centring == "examples":
        return torch.kron(torch.eye(n) - torch.ones(n, n) / n, torch.eye(c))
    return torch.eye(n * c)


def by_definition(K: Tensor, L: Tensor, C: Tensor) -> float:
    K, L = C @ K @ C, C @ L @ C
    return float((K @ L).trace() / (K.norm() * L.norm()))


@pytest.mark.parametrize("centring", ["all", "examples", "none"])
def test_label_alignment_is_that_of_the_dense_kernels(centring: str) -> None:
    model, x, y = network(), torch.randn(8, 1, 4, 4), torch.arange(8) % 3
    layers = jacobian(model, x)
    Y = one_hot(y, 3).to(x).reshape(-1)
    C = centring_matrix(8, 3, centring)
    chosen = torch.tensor([0, 2, 5, 7])
    found = label_alignment(
        model, x, y, subsets={"some": chosen}, centring=centring  # type: ignore[arg-type]
    )  # fmt: skip
    K = sum(J @ J.mT for J in layers.values())
    assert isinstance(K, Tensor)
    labels = torch.outer(Y, Y)
    assert found.whole.value == pytest.approx(by_definition(K, labels, C), rel=1e-10)
    assert set(found.layers) == set(layers) == {"0", "3", "5"}
    for name, J in layers.items():
        expected = by_definition(J @ J.mT, labels, C)
        assert found.layers[name].value == pytest.approx(expected, rel=1e-10)
    rows = (chosen[:, None] * 3 + torch.arange(3)).reshape(-1)
    part = by_definition(
        K[rows][:, rows],
        torch.outer(Y[rows], Y[rows]),
        centring_matrix(4, 3, centring),
    )
    assert found.subsets["some"].value == pytest.approx(part, rel=1e-10)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[chosen] = True
    masked = label_alignment(
        model, x, y, subsets={"some": mask}, layerwise=False, centring=centring  # type: ignore[arg-type]
    )  # fmt: skip
    assert masked.subsets["some"] == found.subsets["some"]
    assert masked.layers == {}


@pytest.mark.parametrize("centring", ["all", "examples", "none"])
def test_centring_is_multiplication_with_the_centring_matrix(centring: str) -> None:
    K = torch.randn(12, 12)
    K = K @ K.mT
    C = centring_matrix(4, 3, centring)
    found = centred(K, 3, centring)  # type: ignore[arg-type]
    torch.testing.assert_close(found, C @ K @ C)


def test_alignment_ignores_scale_and_shifts_of_the_features() -> None:
    """George 2023, section 4, T7."""
    features, other = torch.randn(10, 6), torch.randn(10, 6)
    K, L = features @ features.mT, other @ other.mT
    shifted = features + torch.randn(6)
    value = kernel_alignment(K, L)
    assert 0 <= value <= 1
    assert kernel_alignment(K, K) == pytest.approx(1, abs=1e-12)
    assert kernel_alignment(7 * K, L) == pytest.approx(value, rel=1e-12)
    assert kernel_alignment(shifted @ shifted.mT, L) == pytest.approx(value, rel=1e-10)
    uncentred = kernel_alignment(K, L, centring="none")
    moved = kernel_alignment(shifted @ shifted.mT, L, centring="none")
    assert uncentred <= 1
    assert abs(moved - uncentred) > 1e-3


def test_standard_error_is_the_spread_over_samples() -> None:
    """The jackknife's mean is the deviation of the alignment over fresh samples."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    values, errors = [], []
    for _ in range(80):
        x = torch.randn(40, 6, generator=generator)
        y = (x[:, 0] > 0).to(x)
        found = label_alignment(model, x, y, layerwise=False).whole
        values.append(found.value)
        errors.append(found.standard_error)
    spread, claimed = float(torch.tensor(values).std()), sum(errors) / len(errors)
    assert 0.6 * spread < claimed < 1.6 * spread


def test_targets_may_be_numbers() -> None:
    model, x = network(), torch.randn(6, 1, 4, 4)
    y = torch.randint(3, (6,))
    numbers = label_alignment(model, x, one_hot(y, 3).to(x))
    assert numbers == label_alignment(model, x, y)
    text, axis = str(numbers), numbers.plot()
    assert "all layers" in text
    assert len(axis.patches) == 4


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (torch.tensor([0, 1, 3, 0]), "classes from 0 to 3, but the model has 3"),
        (torch.randn(4, 2), r"n c = 12 outputs, got \[4, 2\]"),
    ],
)
def test_targets_that_do_not_fit(y: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        label_alignment(network(), torch.randn(4, 1, 4, 4), y)


def test_errors() -> None:
    x, y = torch.randn(4, 1, 4, 4), torch.zeros(4, dtype=torch.long)
    empty = {"none yet": torch.zeros(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="'none yet' has no examples"):
        label_alignment(network(), x, y, subsets=empty)
    with pytest.raises(ValueError, match="got 'both'"):
        centred(torch.eye(4), 1, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \[2, 2\] and \[3, 3\]"):
        kernel_alignment(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"got \[4, 4\]"):
        centred(torch.eye(4), 3)
    assert str(kernel_alignment(torch.ones(3, 3), torch.eye(3))) == "nan"
