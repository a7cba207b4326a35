"""Times of the CUDA kernels, as ratios to PyTorch's own operations, in one run.

Models: ResNet-18 and ResNet-50 (batch 256, images of 32 and 224 pixels) and a
transformer of 12 layers (width 768, 8 x 1024 tokens).

    gram        all output-gradient factors of a ResNet, all factors of the transformer,
                in one call; against a loop over layers with a product each
    one layer   a single large layer; against its product
    patches     all input factors of a ResNet's convolutions, read in place; against
                unfolding and one product each. Memory: what either allocates
    scalings    squares of per-example gradients; against forming the gradients, some
                examples at a time, in bounded memory
    precondition  dividing a model's projected gradients, with its two sums
    eigh        50 matrices; against torch.linalg.eigh. 'warm' starts from the
                eigenvectors of the matrices before a small change

Medians over repetitions of both sides in turn, timed with device events. 'floor' is the
larger of bytes over the measured bandwidth (every input read once, every output written
once) and of operations over the measured rate of a large product of the same type, with
half the operations of a symmetric product; 'over floor' is the kernel's time over it.

One command: ``python benchmarks/bench_kernels.py``. Needs a CUDA device; ``--device cpu
--quick`` runs the same calls on the reference, to try the script.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from common import parser, table
from torch import Tensor

from ekfac import kernels
from ekfac.kernels import decomposition, dispatch
from ekfac.kernels.convolution import Convolution, unfolded

OPS = torch.ops.ekfac
Call = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """A device and its measured ceilings.

    Attributes:
        device: The device.
        bandwidth: Bytes per second, read and written.
        rates: Operations per second of a product, by type.
    """

    device: torch.device
    bandwidth: float
    rates: dict[torch.dtype, float]

    def floor(self, size: float, operations: float, dtype: torch.dtype) -> float:
        """Return the least time in seconds."""
        return max(size / self.bandwidth, operations / self.rates[dtype])


@dataclass(frozen=True)
class ConvLayer:
    """A convolution of a ResNet: channels, kernel, stride and size of the input."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int

    @property
    def positions(self) -> int:
        """Output positions along one axis."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def geometry(self) -> Convolution:
        """Return how it reads its input."""
        kernel, stride, before = self.kernel, self.stride, self.kernel // 2
        out = self.positions
        return Convolution(
            (kernel,) * 2, (stride,) * 2, (1, 1), (before,) * 2, (out,) * 2
        )


def resnet(depth: int, size: int) -> list[ConvLayer]:
    """Return the convolutions of ResNet-18 or ResNet-50 (He et al. 2016, Table 1)."""
    stem = ConvLayer(3, 64, 7, 2, size)
    layers, width, size = [stem], 64, (stem.positions + 1) // 2
    counts = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    for stage, count in enumerate(counts):
        inner = 64 * 2**stage
        outer = inner if depth == 18 else 4 * inner
        for number in range(count):
            stride = 2 if stage and not number else 1
            smaller = (size - 1) // stride + 1
            if depth == 18:
                layers.append(ConvLayer(width, inner, 3, stride, size))
                layers.append(ConvLayer(inner, inner, 3, 1, smaller))
            else:
                layers.append(ConvLayer(width, inner, 1, 1, size))
                layers.append(ConvLayer(inner, inner, 3, stride, size))
                layers.append(ConvLayer(inner, outer, 1, 1, smaller))
            if width != outer or stride > 1:
                layers.append(ConvLayer(width, outer, 1, stride, size))
            width, size = outer, smaller
    return layers


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Call, device: torch.device) -> float:
    """Return the seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def medians(calls: Sequence[Call], device: torch.device, repeats: int) -> list[float]:
    """Return the median seconds of each, run in turn after two warm-ups."""
    for call in calls:
        for _ in range(2):
            call()
    synchronize(device)
    times = [[once(call, device) for call in calls] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def ceilings(device: torch.device, quick: bool) -> Device:
    """Measure bandwidth and rates."""
    size = 1 << (20 if quick else 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    (seconds,) = medians([lambda: target.copy_(source)], device, 5)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        n = 256 if quick else 8192
        x = torch.randn(n, n, device=device).to(dtype)
        (product,) = medians([lambda x=x: x @ x], device, 5)  # type: ignore[misc]
        rates[dtype] = 2 * n**3 / product
    return Device(device, 2 * size / seconds, rates)


class Bench:
    """Collects rows of the table."""

    def __init__(self, machine: Device, repeats: int) -> None:
        self.machine, self.repeats = machine, repeats
        self.rows: list[dict[str, Any]] = []

    def add(
        self, what: str, ours: Call, theirs: Call, floor: float, error: float
    ) -> None:
        """Time both and add a row; ``error`` is the distance of their results."""
        device = self.machine.device
        own, other = medians([ours, theirs], device, self.repeats)
        peaks = [memory(call, device) for call in (ours, theirs)]
        self.rows.append(
            {
                "what": what,
                "kernel ms": own * 1e3,
                "torch ms": other * 1e3,
                "torch over kernel": other / own,
                "floor ms": floor * 1e3,
                "over floor": own / floor,
                "MiB": peaks[0],
                "torch MiB": peaks[1],
                "error": error,
            }
        )
        print(table(self.rows[-1:]), flush=True)


def memory(call: Call, device: torch.device) -> float:
    """Return what a call allocates at its peak, in MiB; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative distance of two lists of tensors."""
    pairs = zip(found, expected, strict=True)
    return max(
        float((f.double() - e.double()).norm() / e.double().norm()) for f, e in pairs
    )


def bench_grams(bench: Bench, what: str, rows: list[Tensor]) -> None:
    """All Gram matrices of a model: one call against a loop."""
    widths = [x.shape[3] for x in rows]
    outs = [
        torch.empty(1, d, d, device=x.device) for x, d in zip(rows, widths, strict=True)
    ]
    more = [torch.empty_like(out) for out in outs]
    count = len(rows)
    weights = [None] * count

    def ours() -> None:
        OPS.gram_(outs, rows, weights, [1.0] * count, [0.0] * count, [False] * count)

    def theirs() -> None:
        for x, out in zip(rows, more, strict=True):
            flat = x.reshape(-1, x.shape[3])
            out.copy_(flat.t() @ flat)

    ours()
    theirs()
    size = sum(x.numel() * x.element_size() for x in rows)
    size += sum(4 * out.numel() for out in outs)
    operations = sum(x.numel() * (x.shape[3] + 1) for x in rows)
    floor = bench.machine.floor(size, operations, rows[0].dtype)
    bench.add(what, ours, theirs, floor, distance(outs, more))


def bench_patches(bench: Bench, what: str, layers: list[ConvLayer], batch: int) -> None:
    """All input factors of a ResNet: in place against unfolding."""
    device = bench.machine.device
    convs = [layer.geometry() for layer in layers]
    inputs = [
        torch.randn(batch, la.inputs, la.size, la.size, device=device) for la in layers
    ]
    widths = [conv.features(x.shape[1]) for conv, x in zip(convs, inputs, strict=True)]
    outs = [torch.empty(1, d, d, device=device) for d in widths]
    more = [torch.empty_like(out) for out in outs]
    count = len(layers)
    flat = [number for conv in convs for number in conv.flat()]

    def ours() -> None:
        scalars = ([1.0] * count, [0.0] * count, [False] * count)
        OPS.patch_gram_(outs, inputs, [None] * count, flat, *scalars)

    def theirs() -> None:
        for x, conv, out in zip(inputs, convs, more, strict=True):
            # As many examples as have 2^28 elements of patches.
            each = prod(conv.positions) * out.shape[1]
            out.zero_()
            for part in x.split(max(1, (1 << 28) // each)):
                patches = unfolded(part.unsqueeze(2), conv.in_three())
                rows = patches.reshape(-1, out.shape[1])
                out[0].addmm_(rows.t(), rows)

    ours()
    theirs()
    size = sum(4 * x.numel() for x in inputs) + sum(4 * out.numel() for out in outs)
    operations = sum(
        batch * prod(conv.positions) * d * (d + 1)
        for conv, d in zip(convs, widths, strict=True)
    )
    floor = bench.machine.floor(size, operations, torch.float32)
    bench.add(what, ours, theirs, floor, distance(outs, more))


def bench_scalings(bench: Bench, what: str, shape: tuple[int, int, int, int]) -> None:
    """Squares of per-example gradients: in registers against formed."""
    n, s, d_out, d_in = shape
    device = bench.machine.device
    g = torch.randn(n, s, 1, d_out, device=device)
    a = torch.randn(n, s, 1, d_in, device=device)
    out = torch.empty(1, d_out, d_in, device=device)
    more = torch.empty_like(out)

    def ours() -> None:
        OPS.scalings_([out], [g], [a], [1.0], [0.0])

    def theirs() -> None:
        more.zero_()
        step = max(1, (1 << 24) // (d_out * d_in))
        for gs, inputs in zip(g.split(step), a.split(step), strict=True):
            more.add_(kernels.position_sum(gs, inputs).square().sum(dim=0))

    ours()
    theirs()
    size = 4 * (g.numel() + a.numel() + out.numel())
    floor = bench.machine.floor(size, 2 * n * s * d_out * d_in, torch.float32)
    bench.add(what, ours, theirs, floor, distance([out], [more]))


def bench_precondition(bench: Bench, what: str, shapes: list[tuple[int, int]]) -> None:
    """The division and its sums for all layers of a model."""
    device = bench.machine.device
    first = [torch.randn(1, *shape, device=device) for shape in shapes]
    u, more = [x.clone() for x in first], [x.clone() for x in first]
    s = [torch.rand(1, *shape, device=device) + 0.5 for shape in shapes]
    damping = torch.full((len(shapes),), 0.5, device=device)
    sums: list[Tensor] = []
    other: list[Tensor] = []

    def ours() -> None:
        sums[:] = [OPS.precondition_(u, s, damping, -1.0)]

    def theirs() -> None:
        found = []
        for x, scale, add in zip(more, s, damping.unbind(), strict=True):
            damped = scale + add
            x.div_(damped)
            found.append(torch.stack([(x.square() * damped).sum(), x.square().sum()]))
        other[:] = [torch.stack(found)]

    ours()
    theirs()
    error = distance([*u, *sums], [*more, *other])
    size = sum(12 * x.numel() for x in first)
    bench.add(what, ours, theirs, size / bench.machine.bandwidth, error)


def bench_eigh(bench: Bench, what: str, count: int, size: int) -> None:
    """A bank's decomposition; the error is our residual."""
    x = torch.randn(count, size, 2 * size, device=bench.machine.device)
    matrices = x @ x.transpose(-1, -2) / (2 * size)
    basis = torch.linalg.eigh(matrices).eigenvectors
    # 4 n^3 / 3 for the reduction, 4 n^3 for the vectors and as much again.
    floor = bench.machine.floor(0, count * 9 * size**3, torch.float32)
    residual = float(decomposition.residual(matrices, *decomposition.eigh(matrices)))
    theirs = lambda: torch.linalg.eigh(matrices)  # noqa: E731
    bench.add(what, lambda: decomposition.eigh(matrices), theirs, floor, residual)
    extra = torch.randn(count, size, 8, device=x.device)
    changed = matrices + 0.01 * (extra @ extra.transpose(-1, -2)) / 8
    stale = (basis * (changed @ basis)).sum(dim=-2)
    bound = float(decomposition.residual(changed, stale, basis)) / 3

    def warm() -> object:
        return decomposition.iterated(changed, basis, steps=4, bound=bound)

    found = warm()
    reached = float("nan") if found is None else 1.0
    if found is not None:
        reached = float(decomposition.residual(changed, *found))
    bench.add(f"{what}, warm", warm, theirs, floor, reached)


def run(bench: Bench, quick: bool) -> None:
    """Run everything, on small shapes if quick."""
    device = bench.machine.device
    batch, sizes = (2, (32,)) if quick else (256, (32, 224))
    for size in sizes:
        for depth in (18, 50):
            layers = resnet(depth, size)[: 4 if quick else None]
            grads = [
                torch.randn(batch, la.outputs, la.positions**2, device=device)
                for la in layers
            ]
            rows = [g.unsqueeze(1).permute(0, 3, 1, 2) for g in grads]
            name = f"ResNet-{depth}, {size} pixels"
            bench_grams(bench, f"gram: {name}", rows)
            del grads, rows
            bench_patches(bench, f"patches: {name}", layers, batch)
    tokens, width, depth = (64, 48, 2) if quick else (1024, 768, 12)
    examples = 2 if quick else 8
    shapes = [
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        rows = [
            torch.randn(examples, tokens, 1, d, device=device).to(dtype)
            for shape in shapes * depth
            for d in shape
        ]
        name = str(dtype).removeprefix("torch.")
        bench_grams(bench, f"gram: transformer, {name}", rows)
        one = torch.randn(examples * tokens, 1, 1, 4 * width, device=device).to(dtype)
        bench_grams(bench, f"one layer: {4 * width} wide, {name}", [one])
    bench_precondition(bench, "precondition: transformer", shapes * depth)
    for shape in [(8, 1024, 768, 768), (256, 49, 512, 512), (4096, 1, 512, 512)]:
        chosen = (2, min(shape[1], 9), 40, 30) if quick else shape
        bench_scalings(bench, "scalings: " + " x ".join(map(str, chosen)), chosen)
    for size in (40,) if quick else (64, 128, 256, 384, 512):
        count = 3 if quick else 50
        bench_eigh(bench, f"eigh: {count} of {size}", count, size)


def main() -> None:
    """Measure, print the table, write it."""
    options = parser(__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--repeats", type=int, default=20)
    options.add_argument("--tf32", action="store_true", help="allow TF32 on both sides")
    chosen = options.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device; --device cpu --quick tries the script"
        )
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = chosen.tf32
    bench = Bench(ceilings(device, chosen.quick), 2 if chosen.quick else chosen.repeats)
    run(bench, chosen.quick)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    shop = dispatch.workshop(device)
    machine = bench.machine
    results = {
        "device": name,
        "torch": torch.__version__,
        "tf32": chosen.tf32,
        "bandwidth GB/s": machine.bandwidth / 1e9,
        "rates TFLOP/s": {str(k): v / 1e12 for k, v in machine.rates.items()},
        "kernels": None if shop is None else sorted(map(str, shop.trusted)),
        "broken": None if shop is None else {str(k): v for k, v in shop.broken.items()},
        "rows": bench.rows,
    }
    suffix = "_tf32" if chosen.tf32 else ""
    chosen.output.mkdir(parents=True, exist_ok=True)
    path = chosen.output / f"kernels{suffix}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{name}, PyTorch {torch.__version__}, TF32 {chosen.tf32}\n")
    print(table(bench.rows))
    print(path)


if __name__ == "__main__":
    main()
