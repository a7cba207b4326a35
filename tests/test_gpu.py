"""On a CUDA device: the same statistics as on the CPU, and steps that do not wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import relative_error
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training_cases import METHODS, Method, example_batch, small_classifier, statistics

from ekfac import EKFAC, KFAC
from ekfac.kernels.cuda import dispatch
from ekfac.optim.optimizer import KroneckerOptimizer

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


class Everything(nn.Module):
    """Equal layers, an embedding, a convolution, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8, padding_idx=0)
        self.image = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.equal = nn.ModuleList(nn.Linear(40, 40) for _ in range(4))
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 3, bias=False)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        image = self.image(x).tanh().flatten(1)
        h = torch.cat([image, self.tokens(index).mean(dim=1)], dim=1)
        for layer in self.equal:
            h = h + layer(h).tanh()
        return self.head(self.norm(h))


def everything_step(
    model: nn.Module, optimizer: KroneckerOptimizer, number: int
) -> None:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(64, 2, 4, 4, generator=generator).to(CUDA)
    index = torch.randint(0, 11, (64, 6), generator=generator).to(CUDA)
    y = torch.randint(0, 3, (64,), generator=generator).to(CUDA)
    torch.cuda.synchronize()
    optimizer.zero_grad()
    cross_entropy(model(x, index), y).backward()
    optimizer.step()


@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
@pytest.mark.parametrize("grafting", ["rms", None])
def test_kernels_and_lists_change_nothing_but_rounding(
    monkeypatch: pytest.MonkeyPatch, scaling: str, grafting: str | None
) -> None:
    """With EKFAC_KERNELS=reference every layer goes its own way."""
    results = []
    for mode in ("reference", "auto"):
        monkeypatch.setenv("EKFAC_KERNELS", mode)
        torch.manual_seed(0)
        model = Everything().to(CUDA)
        optimizer = EKFAC(
            model, 0.0, scaling=scaling, grafting=grafting, kl_clip=1.0, momentum=0.0
        )
        for number in range(3):
            everything_step(model, optimizer, number)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        before = [p.detach().clone() for p in model.parameters()]
        everything_step(model, optimizer, 3)
        steps = [p - q for p, q in zip(model.parameters(), before, strict=True)]
        state = {
            f"{name} {key}": getattr(layer, key)
            for name, layer in optimizer.curvature.items()
            for key in ("A", "G")
        }
        sums = {name: la.s.sum() for name, la in optimizer.curvature.items()}
        results.append((steps, state | sums))
    for name, value in results[0][1].items():
        assert relative_error(results[1][1][name], value) < 1e-4, name
    for found, expected in zip(results[1][0], results[0][0], strict=True):
        # Directions never seen are divided by the damping alone: rounding grows there.
        assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("scaling", ["running_average", "per_example"])
def test_a_step_of_every_kind_of_layer_does_not_wait(scaling: str) -> None:
    model = Everything().to(CUDA)
    optimizer = EKFAC(model, scaling=scaling, factor_interval=1, basis_interval=1000)
    for number in range(20):
        everything_step(model, optimizer, number)
    generator = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(64, 2, 4, 4, generator=generator, device=CUDA)
    index = torch.randint(0, 11, (64, 6), generator=generator, device=CUDA)
    y = torch.randint(0, 3, (64,), generator=generator, device=CUDA)
    optimizer.zero_grad()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        cross_entropy(model(x, index), y).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_many_layers_take_few_launches() -> None:
    cache = dispatch.kernel_cache(CUDA)
    assert cache is not None, dispatch.why_unavailable(CUDA)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(30 + i, 31 + i) for i in range(12))).to(CUDA)
    optimizer = EKFAC(model, factor_interval=1, basis_interval=1000)
    x = torch.randn(64, 30, device=CUDA)
    for number in range(18):
        before = cache.used.copy()
        optimizer.zero_grad()
        model(x + number).square().mean().backward()
        optimizer.step()
    new = cache.used - before
    assert new["gram"] <= 4  # 24 factors, in tiles of two sizes
    assert new["squares"] == new["precondition"] == 1


def test_refreshes_follow_the_old_basis_and_keep_it_orthogonal() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 10)).to(CUDA)
    optimizer = EKFAC(model, factor_interval=1, basis_interval=2)
    basis = torch.randn(300, 300, device=CUDA) * torch.logspace(0, -2, 300, device=CUDA)
    for _ in range(40):
        x = torch.randn(256, 300, device=CUDA) @ basis.T / 10
        y = torch.randint(0, 10, (256,), device=CUDA)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    print(optimizer.counters)
    assert optimizer.counters.followed > 0
    for layer in optimizer.curvature.values():
        for Q in (layer.Q_A.double(), layer.Q_G.double()):
            eye = torch.eye(Q.shape[-1], device=CUDA)
            assert float((Q.mT @ Q - eye).abs().max()) < 1e-4


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
