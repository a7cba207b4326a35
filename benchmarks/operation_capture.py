"""One mechanism for every layer, capture at operations: its cost, and where it holds.

    python benchmarks/operation_capture.py [--repeats 41]

The package records layers by hooks on modules, and weights that are operands of
operations by a ``TorchFunctionMode``, which is on in forward passes with statistics and
only in models that have such weights. Could the mode do all of it? Two tables:

- cost: processor time of a forward pass with a mode that looks at every operation's
  arguments for known weights, and reports those of linear layers, over one without; and
  that difference as a share of a training step (forward, backward, EKFAC's update), if
  it is on in every step and if it is on in one of ten (the default);
- conditions: how many uses of linear layers' weights it sees, of those that there are.

Writes ``operation_capture.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import bar, table
from coverage_models import MODELS, Problem, torchvision_operators
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ekfac import EKFAC
from ekfac.layers import find_blocks
from ekfac.layers.functional import OperationTap

HERE = Path(__file__).resolve().parent


def tap_of(model: nn.Module, seen: list[str]) -> OperationTap:
    """Return a mode that notes the uses of all the model's weights."""
    coverage = find_blocks(model, list(model.parameters()), 4096)
    names = {id(block.adapter): block.name for block in coverage.blocks}

    def report(adapter: Any, *_: Any) -> None:
        seen.append(names[id(getattr(adapter, "of", adapter))])

    adapters = [block.adapter for block in coverage.blocks]
    return OperationTap(model, adapters, (), {}, report)


def median(values: list[float]) -> float:
    """Return the median."""
    return sorted(values)[len(values) // 2]


def cost(make: Callable[[], Problem], repeats: int) -> dict[str, Any]:
    """Return what a mode costs in the forward pass of one model."""
    torch.manual_seed(0)
    problem = make()
    seen: list[str] = []
    plain, watched, whole = [], [], []
    tap = tap_of(problem.model, seen)
    for number in range(repeats):
        for mode, times in ((nullcontext(), plain), (tap, watched)):
            begin = time.process_time()
            with mode:
                loss = problem.loss(number)
            times.append(time.process_time() - begin)
            del loss
        tap.spread.clear()
        tap.made.clear()
    optimizer = EKFAC(problem.model, lr=1e-3)
    for number in range(repeats):
        begin = time.process_time()
        optimizer.zero_grad()
        problem.loss(number).backward()
        optimizer.step()
        whole.append(time.process_time() - begin)
    more = median(watched) - median(plain)
    training = sum(whole[1:]) / len(whole[1:])
    return {
        "forward, ms": 1e3 * median(plain),
        "with the mode": median(watched) / median(plain),
        "step, ms": 1e3 * training,
        "of a step, every step": f"{100 * more / training:.1f} %",
        "of a step, one in ten": f"{10 * more / training:.2f} %",
    }


class Net(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.saves = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, 8]``."""
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.saves else layer(x)
        return x


@contextmanager
def one_rank() -> Iterator[None]:
    """Have a process group of one process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29581")
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def uses(model: nn.Module, call: Callable[[], Any], expected: int) -> str:
    """Return how many uses a mode saw in a forward pass, of how many."""
    seen: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tap = tap_of(model, seen)
            with tap:
                call().sum().backward()
    except Exception as error:  # what broke is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return f"{len(seen)} of {expected}"


def conditions() -> dict[str, str]:
    """Return what a mode sees of layers under each condition."""
    x = torch.randn(4, 8)
    found: dict[str, str] = {}
    net = Net()
    found["plain"] = uses(net, lambda: net(x), 3)
    with torch.autocast("cpu", torch.bfloat16):
        found["autocast"] = uses(net, lambda: net(x), 3)
    net.saves = True
    found["checkpoint"] = uses(net, lambda: net(x), 3)
    net = Net()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    found["compiled before the mode is on"] = uses(net, lambda: compiled(x), 3)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    y = x[None]
    found["nn.MultiheadAttention"] = uses(attention, lambda: attention(y, y, y)[0], 4)
    lstm = nn.LSTM(8, 8)
    found["nn.LSTM"] = uses(lstm, lambda: lstm(y)[0], 2)
    with one_rank():
        net = Net()
        wrapped = nn.parallel.DistributedDataParallel(net)
        found["DistributedDataParallel"] = uses(net, lambda: wrapped(x), 3)
        from torch.distributed.fsdp import fully_shard

        net = Net()
        for layer in net.layers:
            fully_shard(layer)
        fully_shard(net)
        found["fully_shard"] = uses(net, lambda: net(x), 3)
    return found


def main() -> None:
    """Print and write both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    library = torchvision_operators()
    rows = []
    models = (
        ("torch", "NeRF"),
        ("torch", "SIREN"),
        ("torch", "Transformer"),
        ("transformers", "GPT-2"),
        ("transformers", "Mixtral"),
        ("transformers", "BERT"),
    )
    for package, name in bar(models, "models"):
        row = {"model": name, **cost(MODELS[package][name], given.repeats)}
        rows.append(row)
    del library
    print(table(rows))
    found = conditions()
    print()
    print(table([{"condition": k, "uses seen": v} for k, v in found.items()]))
    given.output.mkdir(parents=True, exist_ok=True)
    document = {"cost": rows, "conditions": found}
    target = given.output / "operation_capture.json"
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
