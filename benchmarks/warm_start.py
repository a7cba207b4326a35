"""Refreshing a basis: orthogonal iteration from the old one against ``eigh``.

The auto-encoder is trained, and the factors of its layers are taken twice,
``--between`` steps apart: the old basis is that of the first, the matrix is the
second. For every factor of at least ``--smallest`` rows: what is off the diagonal in
the old basis and in the new one, how far the new one is from orthogonal, and the times
(medians of repeats) of ``ekfac.kernels.decomposition.iterated``, which stops at half of
the default ``basis_tolerance``, and of ``torch.linalg.eigh``. 'nan': the iteration gave
up, after the time shown.

One command: ``python benchmarks/warm_start.py --data-dir DIR`` with MNIST's gzipped idx
files there, else on scikit-learn's digits; ``--device cuda`` where there is one.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import bar, example, has_mnist, parser, table
from torch import Tensor

from ekfac import EKFAC
from ekfac.kernels import decomposition

BOUND = 0.005
Factors = dict[str, Tensor]


def factors(optimizer: EKFAC) -> Factors:
    """Return copies of all dense factors, with a mean eigenvalue of 1."""
    found = {}
    for name, layer in optimizer.curvature.items():
        for side in ("A", "G"):
            factor = getattr(layer, side)
            mean = factor.diagonal(dim1=-2, dim2=-1).mean()
            found[f"{side} of {name}"] = (factor + factor.mT) / (2 * mean)
    return found


def trained(args: Any, device: torch.device) -> tuple[str, Factors, Factors]:
    """Train; return the name of the data and the factors of both steps."""
    source: Any = example("autoencoder")
    real = has_mnist(args.data_dir)
    x = (source.mnist(args.data_dir) if real else source.digits())[0].to(device)
    torch.manual_seed(0)
    model = source.network(x.shape[1], args.widths).to(device)
    optimizer = EKFAC(model, lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    batches = source.batches(x.cpu(), generator)
    before: Factors = {}
    for step in bar(range(1, args.first + args.between + 1), "steps"):
        optimizer.zero_grad()
        source.reconstruction_loss(model, next(batches).to(device)).backward()
        optimizer.step()
        if step == args.first:
            before = factors(optimizer)
    return "MNIST" if real else "digits", before, factors(optimizer)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, the first not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def compare(name: str, old: Tensor, new: Tensor, repeats: int) -> dict[str, Any]:
    """Return a row of the table."""
    basis = torch.linalg.eigh(old).eigenvectors
    stale = (basis * (new @ basis)).sum(dim=-2)

    def warm() -> tuple[Tensor, Tensor] | None:
        return decomposition.iterated(new, basis, bound=BOUND)

    found = warm()
    row: dict[str, Any] = {"factor": name, "rows": new.shape[-1]}
    row["off, old"] = float(decomposition.misfit(new, stale, basis).max())
    row["off, new"] = row["skew"] = float("nan")
    if found is not None:
        row["off, new"] = float(decomposition.misfit(new, *found).max())
        row["skew"] = float(decomposition.skew(found[1]).max())
    row["iterated ms"] = 1e3 * seconds(warm, repeats)
    row["eigh ms"] = 1e3 * seconds(lambda: torch.linalg.eigh(new), repeats)
    row["eigh/iterated"] = row["eigh ms"] / row["iterated ms"]
    return row


def main() -> None:
    """Measure, print the table, write it."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--first", type=int, default=100, help="step of the old basis")
    options.add_argument("--between", type=int, default=50)
    options.add_argument("--smallest", type=int, default=500)
    options.add_argument("--widths", type=int, nargs="+", default=[1024, 512, 30])
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    if args.quick:
        args.first, args.between, args.smallest, args.repeats = 16, 2, 20, 1
        args.widths = [40, 10]
    device = torch.device(args.device)
    data, before, after = trained(args, device)
    rows = [
        compare(name, old, after[name], args.repeats)
        for name, old in before.items()
        if old.shape[-1] >= args.smallest
    ]
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = {"device": named, "threads": torch.get_num_threads(), "data": data}
    plain = [{k: None if v != v else v for k, v in row.items()} for row in rows]
    results |= {"torch": torch.__version__, "between": args.between, "rows": plain}
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "warm_start.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{named}, {data}, {args.between} steps apart, bound {BOUND}\n")
    print(table(rows))
    print(path)


if __name__ == "__main__":
    main()
