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
    squares     the running average of a model's scalings, with their sums
    precondition  dividing a model's projected gradients, with its two sums
    counts      how often tokens occur; against ``index_add_``
    eigh        50 matrices; against torch.linalg.eigh. 'warm' starts from the
                eigenvectors of the matrices before a small change
    step        a training step of a network of many layers with everything above;
                against the same with EKFAC_KERNELS=reference

Medians over repetitions of both sides in turn, timed with device events. 'floor' is the
larger of bytes over the measured bandwidth (every input read once, every output written
once) and of operations over the measured rate of a large product of the same type, with
half the operations of a symmetric product; 'over floor' is the kernel's time over it.

One command: ``python benchmarks/bench_kernels.py``. Needs a CUDA device; ``--device cpu
--quick`` runs the same calls on the reference, to try the script.
"""

from __future__ import annotations

import json
import os
from math import prod

import torch
import torch.nn.functional as F
from common import parser, table
from kernel_timing import Bench, Call, ConvLayer, ceilings, distance, resnet
from torch import Tensor

from ekfac import EKFAC, kernels
from ekfac.kernels import decomposition
from ekfac.kernels.cuda import dispatch

OPS = torch.ops.ekfac


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
        for layer, x, out in zip(layers, inputs, more, strict=True):
            # As many examples as have 2^28 elements of patches.
            each = layer.positions**2 * out.shape[1]
            out.zero_()
            for part in x.split(max(1, (1 << 28) // each)):
                padded = F.pad(part, [layer.kernel // 2] * 4)
                for axis in (2, 3):
                    padded = padded.unfold(axis, layer.kernel, layer.stride)
                rows = padded.permute(0, 2, 3, 1, 4, 5).reshape(-1, out.shape[1])
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


def bench_squares(bench: Bench, what: str, shapes: list[tuple[int, int]]) -> None:
    """The running averages of all layers of a model, and their sums."""
    device = bench.machine.device
    s = [torch.rand(1, *shape, device=device) for shape in shapes]
    u = [torch.randn(1, *shape, device=device) for shape in shapes]
    more = [x.clone() for x in s]
    scales = torch.tensor([[0.9, 0.1]] * len(shapes), device=device)
    sums: list[Tensor] = []
    other: list[Tensor] = []

    def ours() -> None:
        sums[:] = [OPS.squares_(s, u, scales)]

    def theirs() -> None:
        found = []
        for x, y in zip(more, u, strict=True):
            x.mul_(0.9).addcmul_(y, y, value=0.1)
            found.append(x.sum())
        other[:] = [torch.stack(found)]

    ours()
    theirs()
    error = distance([*s, *sums], [*more, *other])
    size = sum(12 * x.numel() for x in s)
    bench.add(what, ours, theirs, size / bench.machine.bandwidth, error)


def bench_counts(bench: Bench, what: str, shape: tuple[int, int], size: int) -> None:
    """How often each of the tokens occurs."""
    device = bench.machine.device
    # A few tokens are frequent, as in text.
    index = (size * torch.rand(shape, device=device) ** 4).long()
    out, more = torch.empty(1, size, device=device), torch.empty(size, device=device)
    ones = torch.ones(index.numel(), device=device)

    def ours() -> None:
        OPS.index_counts_([out], [index], [None], [1.0], [0.0])

    def theirs() -> None:
        more.zero_().index_add_(0, index.flatten(), ones)

    ours()
    theirs()
    bytes_moved = 8 * index.numel() + 4 * size
    floor = bytes_moved / bench.machine.bandwidth
    bench.add(what, ours, theirs, floor, distance([out[0]], [more]))


def bench_step(bench: Bench, depth: int, width: int, examples: int) -> None:
    """A whole step, between two refreshes, with and without the kernels."""
    device = bench.machine.device
    x = torch.randn(examples, width, device=device)

    def network() -> tuple[torch.nn.Module, EKFAC]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, width) for _ in range(depth)]
        model = torch.nn.Sequential(*layers).to(device)
        return model, EKFAC(model, lr=1e-5, basis_interval=1000)

    def stepping(mode: str) -> Call:
        model, optimizer = network()

        def step() -> None:
            os.environ["EKFAC_KERNELS"] = mode
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()

        for _ in range(17):  # the last refresh of the start is at step 16
            step()
        step.model = model  # type: ignore[attr-defined]
        return step

    before = os.environ.get("EKFAC_KERNELS")
    ours, theirs = stepping("auto"), stepping("reference")
    try:
        models = [call.model for call in (ours, theirs)]  # type: ignore[attr-defined]
        found, expected = ([p.detach() for p in m.parameters()] for m in models)
        error = distance(found, expected)
        what = f"step: {depth} layers of {width}, {examples} examples"
        each = 6 * examples * width**2 + 8 * width**3  # both passes, two rotations
        floor = bench.machine.floor(0, depth * each, torch.float32)
        bench.add(what, ours, theirs, floor, error)
    finally:
        os.environ.pop("EKFAC_KERNELS")
        if before is not None:
            os.environ["EKFAC_KERNELS"] = before


def bench_eigh(bench: Bench, what: str, count: int, size: int) -> None:
    """A bank's decomposition; the error is our residual."""
    x = torch.randn(count, size, 2 * size, device=bench.machine.device)
    matrices = x @ x.transpose(-1, -2) / (2 * size)
    # 4 n^3 / 3 for the reduction, 4 n^3 for the vectors and as much again.
    floor = bench.machine.floor(0, count * 9 * size**3, torch.float32)
    residual = float(
        decomposition.residuals(matrices, *decomposition.eigh(matrices)).max()
    )
    theirs = lambda: torch.linalg.eigh(matrices)  # noqa: E731
    bench.add(what, lambda: decomposition.eigh(matrices), theirs, floor, residual)
    scale = torch.logspace(0, -2, size, device=x.device)
    old, new = (
        (y := scale.unsqueeze(-1) * torch.randn_like(x)) @ y.transpose(-1, -2) / size
        for _ in range(2)
    )
    basis = torch.linalg.eigh(old).eigenvectors
    changed = 0.75 * old + 0.25 * new

    def warm() -> object:
        return decomposition.iterated(changed, basis, bound=0.005)

    theirs = lambda: torch.linalg.eigh(changed)  # noqa: E731

    found = warm()
    reached = float("nan") if found is None else 1.0
    if found is not None:
        reached = float(decomposition.residuals(changed, *found).max())
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
    bench_squares(bench, "squares: transformer", shapes * depth)
    bench_precondition(bench, "precondition: transformer", shapes * depth)
    vocabulary = 100 if quick else 50_257
    what = f"counts: {examples} x {tokens} of {vocabulary} tokens"
    bench_counts(bench, what, (examples, tokens), vocabulary)
    for deep, wide in ((3, 8),) if quick else ((50, 64), (50, 256), (12, 1024)):
        bench_step(bench, deep, wide, 16 if quick else 256)
    for shape in [(8, 1024, 768, 768), (256, 49, 512, 512), (4096, 1, 512, 512)]:
        chosen = (2, min(shape[1], 9), 40, 30) if quick else shape
        bench_scalings(bench, "scalings: " + " x ".join(map(str, chosen)), chosen)
    for size in (40,) if quick else (64, 128, 256, 384, 512, 1024):
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
    cache = dispatch.kernel_cache(device)
    machine = bench.machine
    results = {
        "device": name,
        "torch": torch.__version__,
        "tf32": chosen.tf32,
        "bandwidth GB/s": machine.bandwidth / 1e9,
        "rates TFLOP/s": {str(k): v / 1e12 for k, v in machine.rates.items()},
        "kernels": None if cache is None else sorted(map(str, cache.verified)),
        "broken": None
        if cache is None
        else {str(k): v for k, v in cache.broken.items()},
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
