"""On a CUDA device: the same statistics as on the CPU, and steps that do not wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import relative_error
from torch import nn
from torch.nn.functional import cross_entropy
from training_cases import METHODS, Method, example_batch, small_classifier, statistics

from ekfac import EKFAC, KFAC
from ekfac.optim.base import KroneckerOptimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """Multiply in float32 as the CPU does, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def step(
    model: nn.Module, optimizer: KroneckerOptimizer, number: int, device: torch.device
) -> None:
    """Do one step on a batch large enough for factors of full rank."""
    x, y = (t.to(device) for t in example_batch(number, 64))
    optimizer.zero_grad()
    cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "method", [m for m in METHODS if "mc" not in m.name], ids=lambda m: m.name
)
def test_statistics_equal_those_of_the_cpu(
    method: Method, float64: torch.dtype
) -> None:
    """Before the first refresh nothing depends on the eigenvectors' signs."""
    on_cpu, on_gpu = small_classifier(), small_classifier().to(CUDA)
    expected, found = method(on_cpu), method(on_gpu)
    step(on_cpu, expected, 0, torch.device("cpu"))
    step(on_gpu, found, 0, CUDA)
    for name, layer in expected.curvature.items():
        other = found.curvature[name]
        assert other.A.device.type == other.G.device.type == "cuda"
        assert relative_error(other.A.cpu(), layer.A) < 1e-10
        assert relative_error(other.G.cpu(), layer.G) < 1e-10
        for kind in ("eigenvalues_A", "eigenvalues_G"):
            values = getattr(other, kind).cpu()
            assert relative_error(values, getattr(layer, kind)) < 1e-8
        if layer.s is not None:
            assert relative_error(other.s.sum().cpu(), layer.s.sum()) < 1e-8


@pytest.mark.parametrize("kind", [KFAC, EKFAC])
@pytest.mark.parametrize("due", ["nothing", "factors"])
@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
def test_step_without_refresh_does_not_wait(
    kind: type[KroneckerOptimizer], due: str, scaling: str
) -> None:
    """Nothing between two refreshes asks the device for a number."""
    options = {} if kind is KFAC else {"scaling": scaling}
    interval = 1000 if due == "nothing" else 1
    model = small_classifier().to(CUDA)
    optimizer = kind(
        model, kl_clip=1.0, factor_interval=interval, basis_interval=1000, **options
    )
    for number in range(20):  # the last refresh of the start is at step 16
        step(model, optimizer, number, CUDA)
    x, y = (t.to(CUDA) for t in example_batch(20, 64))
    optimizer.zero_grad()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        cross_entropy(model(x), y).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_state_moves_between_devices() -> None:
    model = small_classifier()
    optimizer = EKFAC(model)
    for number in range(2):
        step(model, optimizer, number, torch.device("cpu"))
    state = optimizer.state_dict()
    moved = small_classifier().to(CUDA)
    moved.load_state_dict(model.state_dict())
    loaded = EKFAC(moved)
    loaded.load_state_dict(state)
    for name, value in statistics(optimizer).items():
        assert statistics(loaded)[name].device.type == "cuda"
        assert torch.equal(statistics(loaded)[name].cpu(), value)
    step(moved, loaded, 2, CUDA)


def test_a_model_that_is_moved_takes_its_curvature_along() -> None:
    model = small_classifier()
    optimizer = EKFAC(model, momentum=0.0)
    model.to(CUDA)
    for number in range(3):
        step(model, optimizer, number, CUDA)
    assert {v.device.type for v in statistics(optimizer).values()} == {"cuda"}


def test_gradient_scaler_in_half_precision() -> None:
    """An overflowed step leaves every average as it was."""
    model = small_classifier().to(CUDA)
    optimizer = EKFAC(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for number, factor in ((0, 1.0), (1, 1e30), (2, 1.0)):
        x, y = (t.to(CUDA) for t in example_batch(number, 64))
        before = {name: v.clone() for name, v in statistics(optimizer).items()}
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model(x), y)
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != 1.0:
            for name, value in statistics(optimizer).items():
                assert torch.equal(value, before[name])
    for value in statistics(optimizer).values():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
