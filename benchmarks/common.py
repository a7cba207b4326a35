"""What the benchmarks share: examples as modules, labelled digits, tables, results.

Importing it needs torch and numpy alone, as on a machine with a device.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ekfac.files import write_whole
from ekfac.progress import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ekfac.curvature.options import Schedule
    from ekfac.optim.optimizer import KroneckerOptimizer

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
COLOURS = {"KFAC": "tab:red", "EKFAC": "tab:blue", "EKFAC-ra": "tab:green"}


def example(name: str) -> ModuleType:
    """Return an example script as a module, for its networks and its data."""
    qualified = f"ekfac_example_{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    path = HERE.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def has_mnist(folder: Path) -> bool:
    """Return whether the folder holds MNIST's gzipped idx files of images."""
    return any(folder.glob("*-images-idx3-ubyte.gz"))


@dataclass(frozen=True)
class Images:
    """Images ``[N, 1, H, W]`` and labels ``[N]``, for training and for testing."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def batches(self, size: int, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """Yield one epoch of shuffled training batches of equal size."""
        order = torch.randperm(len(self.x_train), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield [self.x_train[chosen], self.y_train[chosen]]


def split(x: np.ndarray, y: np.ndarray, n_train: int) -> Images:
    """Return images scaled to zero mean and unit deviation, the first for training."""
    images = torch.tensor(x, dtype=torch.float32).unsqueeze(1)
    images = (images - images[:n_train].mean()) / images[:n_train].std()
    labels = torch.tensor(y, dtype=torch.int64)
    return Images(
        images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]
    )


def digits() -> Images:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, 1,437 of them to train on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return split(x.reshape(-1, 8, 8)[order], y[order], 1437)


def mnist(folder: Path) -> Images:
    """Return MNIST from the idx files in ``folder``, else through torchvision.

    A folder with the 10,000 images of the t10k files alone gives 8,000 to train on.
    """
    read = example("quickstart").read_idx
    parts = [part for part in ("train", "t10k") if [*folder.glob(f"{part}-*.gz")]]
    if parts:
        x = [read(folder / f"{part}-images-idx3-ubyte.gz") for part in parts]
        y = [read(folder / f"{part}-labels-idx1-ubyte.gz") for part in parts]
    else:
        from torchvision.datasets import MNIST

        sets = [
            MNIST(str(folder), train=train, download=True) for train in (True, False)
        ]
        x = [part.data.numpy() for part in sets]
        y = [part.targets.numpy() for part in sets]
    n_train = len(x[0]) if len(x) == 2 else len(x[0]) * 4 // 5
    return split(np.concatenate(x), np.concatenate(y), n_train)


def set_schedule(optimizer: KroneckerOptimizer, schedule: Schedule) -> None:
    """Let an optimizer refresh by a schedule that no constructor gives.

    Args:
        optimizer: Before its first step.
        schedule: In place of the one that its options give.
    """
    options = optimizer.options
    kind = type("Scheduled", (type(options),), {"schedule": schedule})
    optimizer._collector.options = kind(**vars(options))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument(
        "--data-dir", type=Path, default=Path("data"), help="of the image sets"
    )
    result.add_argument("--output", type=Path, default=HERE / "results")
    result.add_argument("--quick", action="store_true", help="seconds, to try it")
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with equal keys as aligned text; the keys are the heading."""
    heading = list(rows[0])
    cells = [heading] + [[_text(row[key]) for key in heading] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heading))]
    left = [isinstance(rows[0][key], str) for key in heading]
    lines = [
        "  ".join(
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and the standard deviation over seeds, as records write them."""
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return f"{mean:.{digits}g} ± {deviation:.2g}"


def bar(items: Iterable[T], description: str = "runs") -> Iterator[T]:
    """Yield the items, with a bar that counts them where somebody can see it."""
    return shown(items, description, progress=sys.stderr.isatty())


def print_seconds() -> None:
    """Print the processor time of this process, imports included."""
    print(f"{time.process_time():.0f} s of processor time")


def earlier(output: Path, name: str) -> dict[str, Any]:
    """Return what a folder's ``name.json`` holds, or nothing."""
    path = output / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(output: Path, name: str, results: Mapping[str, Any], figure: Figure) -> None:
    """Write ``name.json`` and ``name.png`` into a folder and say so."""
    output.mkdir(parents=True, exist_ok=True)
    document, picture = output / f"{name}.json", output / f"{name}.png"
    write_whole(document, (json.dumps(results, indent=1) + "\n").encode())
    save_figure(figure, picture, dpi=120)
    print(f"\nresults: {document}\nfigure: {picture}")


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure, whole or not at all, and close it."""
    import matplotlib.pyplot as plt

    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix("."), dpi=dpi)
    plt.close(figure)
    write_whole(path, picture.getvalue())


class Store:
    """Results by key in a JSON file, so that an interrupted run is continued.

    Args:
        path: Of the file; written after every result. What another process has written
            into it meanwhile stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: dict[str, Any] = self._written()
        self._known = dict(self.runs)

    def _written(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        runs: dict[str, Any] = json.loads(self.path.read_text("utf-8"))["runs"]
        return runs

    def _exchange(self) -> None:
        """Take over from the file what was not changed here, and write what was."""
        known, own = self._known, self.runs
        changed = {k: v for k, v in own.items() if k not in known or known[k] != v}
        dropped = known.keys() - own.keys()
        others = {k: v for k, v in self._written().items() if k not in dropped}
        own.clear()
        own |= others | changed
        self._known = dict(own)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps({"runs": own}).encode())

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return the result of ``key``, computed if it is not known."""
        if key not in self.runs:
            self._exchange()
        if key not in self.runs:
            start = time.perf_counter()
            self.runs[key] = compute()
            print(f"{time.perf_counter() - start:6.1f} s  {key}", flush=True)
            self._exchange()
        return self.runs[key]
