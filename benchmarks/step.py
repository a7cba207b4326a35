"""Time and memory of a step, relative to SGD, and where the time goes.

    python benchmarks/step.py                      # all networks
    python benchmarks/step.py --network autoencoder --steps 200   # the others are kept
    python benchmarks/step.py --network transformer512 --steps 10 --time-only

Networks: the deep auto-encoder of examples/autoencoder.py at batch 200, ResNet-18 for
32 x 32 images (examples/cifar.py) and the transformer of examples/transformer.py, 128
wide with 2,048 characters a batch, and one block of it 512 wide with 16,384, on random
data. After a warm-up past the first refreshes, which takes batches of at most 32
examples, single steps of all optimizers take turns, so that every ratio is between
steps of the same seconds; the mean is over whole basis intervals, so that refreshes are
amortised in. Seconds are the process's own (one thread), whatever else the machine
does. Memory is the peak resident size of a process of its own, less what it had before
the network was built (Linux). The split is that of torch's profiler, over the same
number of steps. ``--batch 1000`` is another batch size. Muon is torch's, for all
matrices, the head's included, and pytorch_optimizer's where there are convolutions;
SOAP is pytorch_optimizer's and turns its bases every 10 steps.

"natural" is ``direction="natural"``; "natural, formed" the same without the short cut
that projects a gradient as two thin factors where the batch is smaller than the layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ekfac import EKFAC, KFAC

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("capture", "factors", "basis", "scalings", "precondition")


class Formed(EKFAC):
    """EKFAC whose gradients are always formed and rotated."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        collector: Any = self._collector
        collector._thin = lambda block: False


class Pair:
    """Two optimizers that step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        """Clear the gradients of both."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Step both."""
        for optimizer in self.optimizers:
            optimizer.step()


def muon(model: nn.Module) -> Any:
    """Return Muon for all matrices, AdamW for the rest."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() == 2]
    kernels = [p for p in parameters if p.dim() > 2]
    rest = [p for p in parameters if p.dim() < 2]
    if kernels:
        from pytorch_optimizer import Muon

        groups = [
            {"params": matrices + kernels, "use_muon": True},
            {"params": rest, "use_muon": False},
        ]
        return Muon(groups, lr=LR)
    return Pair(torch.optim.Muon(matrices, lr=LR), torch.optim.AdamW(rest, lr=LR))


def soap(model: nn.Module) -> Any:
    """Return SOAP."""
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=LR, precondition_frequency=10)


LR = 1e-5
NATURAL: dict[str, Any] = {"lr": LR, "direction": "natural"}
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=LR),
    "EKFAC": lambda m: EKFAC(m, lr=LR),
    "KFAC": lambda m: KFAC(m, lr=LR),
    "per example": lambda m: EKFAC(m, lr=LR, scaling="per_example"),
    "natural": lambda m: EKFAC(m, **NATURAL),
    "natural, formed": lambda m: Formed(m, **NATURAL),
    "natural, rank 32": lambda m: EKFAC(m, rank=32, **NATURAL),
    "Muon": muon,
}
if importlib.util.find_spec("pytorch_optimizer"):
    OPTIMIZERS["SOAP"] = soap
OURS = ("EKFAC", "KFAC", "per example", "natural", "natural, rank 32")
WARM_EXAMPLES = 32

# A model, and its loss on the first examples of a random batch.
Loss = Callable[[nn.Module, int], Tensor]


def example(name: str) -> Any:
    """Return the module of one example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def autoencoder(batch: int) -> tuple[nn.Module, Loss]:
    """Return the auto-encoder and its loss."""
    module = example("autoencoder")
    x = torch.rand(batch, 784)
    return module.network(784), lambda m, n: module.reconstruction_loss(m, x[:n])


def resnet18(batch: int) -> tuple[nn.Module, Loss]:
    """Return ResNet-18 and its loss."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    model = example("cifar").network("resnet18", 64)
    return model, lambda m, n: cross_entropy(m(x[:n]), y[:n])


def transformer(batch: int, width: int = 128, depth: int = 2) -> tuple[nn.Module, Loss]:
    """Return the transformer and its loss."""
    module = example("transformer")
    codes = torch.randint(0, 80, (batch, 65))

    def loss(model: nn.Module, count: int) -> Tensor:
        part = codes[:count]
        found: Tensor = module.next_character_loss(model, part[:, :-1], part[:, 1:])
        return found

    return module.Transformer(80, 64, width, depth), loss


NETWORKS: dict[str, tuple[Callable[[int], tuple[nn.Module, Loss]], int]] = {
    "autoencoder": (autoencoder, 200),
    "resnet18": (resnet18, 32),
    "transformer": (transformer, 32),
    "transformer512": (lambda batch: transformer(batch, 512, 1), 256),
}


def stepper(
    network: str, optimizer: str, batch: int | None = None
) -> Callable[..., None]:
    """Return a function that does one training step, or one of a part of the batch."""
    torch.manual_seed(0)
    make, usual = NETWORKS[network]
    size = batch or usual
    model, loss = make(size)
    chosen = OPTIMIZERS[optimizer](model)

    def step(count: int = size) -> None:
        chosen.zero_grad()
        loss(model, count).backward()
        chosen.step()

    return step


def status(field: str) -> float:
    """Return a memory field of /proc/self/status, in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def _memory(network: str, optimizer: str, batch: int | None, answer: Any) -> None:
    torch.set_num_threads(1)
    for name in ("autoencoder", "cifar", "transformer"):
        example(name)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    step = stepper(network, optimizer, batch)
    for _ in range(3):
        step()
    answer.put(status("VmHWM") - before)


def memory(network: str, optimizer: str, batch: int | None) -> float:
    """Return the peak memory of training, in MiB, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    arguments = (network, optimizer, batch, answer)
    process = context.Process(target=_memory, args=arguments)
    process.start()
    found = float(answer.get())
    process.join()
    return found


def times(
    network: str, names: list[str], warm: int, steps: int, batch: int | None
) -> dict[str, float]:
    """Return each optimizer's mean seconds per step, taking turns."""
    steppers = {name: stepper(network, name, batch) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in tqdm(range(warm + steps), desc=f"{network} steps", unit="round"):
        for name, step in steppers.items():
            if i < warm:
                step(WARM_EXAMPLES)
                continue
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.fmean(values) for name, values in seconds.items()}


def split(
    network: str, name: str, warm: int, steps: int, batch: int | None
) -> dict[str, float]:
    """Return each stage's share of the step, in percent."""
    step = stepper(network, name, batch)
    for _ in range(warm):
        step(WARM_EXAMPLES)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.process_time()
        for _ in range(steps):
            step()
        total = time.process_time() - start
    found = {e.key: e.cpu_time_total / 1e6 for e in profiler.key_averages()}
    stages = {stage: found.get(f"ekfac::{stage}", 0.0) for stage in STAGES}
    # What capture spends beyond the statistics that are taken inside it.
    inside = sum(
        e.cpu_time_total / 1e6
        for e in profiler.events()
        if e.name in ("ekfac::factors", "ekfac::scalings")
        and e.cpu_parent is not None
        and e.cpu_parent.name == "ekfac::capture"
    )
    stages["capture"] -= inside
    return {stage: 100 * value / total for stage, value in stages.items()}


def lines_of(networks: dict[str, Any]) -> list[str]:
    """Return the table of all networks that have been measured."""
    head = f"{'network':14s} {'optimizer':16s} {'ms':>9s} {'x SGD':>6s} "
    head += f"{'MiB':>7s} {'x SGD':>6s}"
    lines = [head + "".join(f"{s + ' %':>13s}" for s in STAGES)]
    for network, rows in networks.items():
        for name, row in rows.items():
            shares = row["percent"]
            numbers = "".join(f"{shares.get(s, 0):13.0f}" for s in STAGES)
            lines.append(
                f"{network:14s} {name:16s} {row['milliseconds']:9.1f} "
                f"{row['time ratio']:6.2f} {row.get('MiB', math.nan):7.0f} "
                f"{row.get('memory ratio', math.nan):6.2f}{numbers if shares else ''}"
            )
    return lines


def ratios(networks: dict[str, Any]) -> list[str]:
    """Return time and memory over the first optimizer's, networks side by side."""
    names = dict.fromkeys(name for rows in networks.values() for name in rows)
    heads = [f"{network:>14s} {'memory':>8s}" for network in networks]
    lines = [f"{'x SGD':16s}" + "".join(heads)]
    for name in names:
        cells = []
        for rows in networks.values():
            row = rows.get(name)
            both = (
                []
                if row is None
                else [row["time ratio"], row.get("memory ratio", math.nan)]
            )
            text = [f"{value:.2f}" for value in both] or ["-", "-"]
            cells.append(f"{text[0]:>14s} {text[1]:>8s}")
        lines.append(f"{name:16s}" + "".join(cells))
    return lines


def main() -> None:
    """Measure, print the table, write it as JSON beside networks measured before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--warm", type=int, default=50)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, help="examples in a batch")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--time-only", action="store_true", help="no memory, no split")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suffix = f"-{args.batch}" if args.batch else ""
    networks = list(NETWORKS) if args.network == "all" else [args.network]
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"step{suffix}.json"
    results: dict[str, Any] = {"networks": {}}
    if file.exists():
        results = json.loads(file.read_text())
    results["threads"] = torch.get_num_threads()
    for network in networks:
        seconds = times(network, args.optimizers, args.warm, args.steps, args.batch)
        sizes = {}
        if not args.time_only:
            sizes = {n: memory(network, n, args.batch) for n in args.optimizers}
        rows = results["networks"].setdefault(network, {})
        for name in args.optimizers:
            shares = {}
            if name in OURS and not args.time_only:
                shares = split(network, name, args.warm, args.steps, args.batch)
            first = args.optimizers[0]
            rows[name] = {
                "milliseconds": 1e3 * seconds[name],
                "time ratio": seconds[name] / seconds[first],
                "percent": shares,
            }
            if sizes:
                rows[name]["MiB"] = sizes[name]
                rows[name]["memory ratio"] = sizes[name] / sizes[first]
        file.write_text(json.dumps(results, indent=1) + "\n")
    found = results["networks"]
    print("", *lines_of(found), "", *ratios(found), sep="\n")


if __name__ == "__main__":
    main()
