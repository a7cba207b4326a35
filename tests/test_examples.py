"""Every example runs with ``--quick``, and so does every Python block of the README."""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "quickstart": ("SGD", "Adam", "EKFAC"),
    "autoencoder": ("SGD", "Adam", "KFAC", "EKFAC", "EKFAC-ra", "EKFAC-32"),
    "cifar": ("SGD", "Adam", "EKFAC"),
    "transformer": ("AdamW", "EKFAC"),
    "custom_layer": ("Adam", "EKFAC"),
    "distributed": ("SGD", "EKFAC"),
}


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Return the outcome of a Python command that finds this checkout's package."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": path}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def readme_blocks() -> list[str]:
    """Return the README's Python blocks, in order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def test_every_example_is_listed() -> None:
    files = {path.stem for path in (ROOT / "examples").glob("[!_]*.py")}
    assert files == {*EXAMPLES, "continual"}  # see test_continual_scripts.py


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    script, output = str(ROOT / "examples" / f"{name}.py"), tmp_path / "output"
    result = run(script, "--quick", "--output", str(output), folder=tmp_path)
    assert result.returncode == 0, result.stderr

    rule = re.search(r"^optimizer .*train loss.*\n-+\n", result.stdout, re.MULTILINE)
    assert rule, result.stdout
    rows = result.stdout[rule.end() :].split("\n\n")[0].splitlines()
    assert tuple(row.split()[0] for row in rows) == EXAMPLES[name]
    assert "nan" not in result.stdout

    (figure,) = output.glob("*.png")
    image = matplotlib.image.imread(figure)
    assert image.shape[0] >= 300
    assert image.shape[1] >= 600
    assert image[..., :3].std() > 0.02, "the figure is blank"


def write_idx(folder: Path, part: str, count: int) -> None:
    """Write ``count`` random images and labels in MNIST's own format."""
    rng = np.random.default_rng(0)
    arrays = {
        "images-idx3": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        "labels-idx1": rng.integers(0, 10, (count,), dtype=np.uint8),
    }
    for kind, array in arrays.items():
        header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.tobytes())


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        (("t10k",), "160 training images, 40 test images"),
        (("train", "t10k"), "200 training images, 200 test images"),
    ],
    ids=["t10k alone", "train and t10k"],
)
def test_quickstart_reads_idx_files(
    parts: tuple[str, ...], counts: str, tmp_path: Path
) -> None:
    for part in parts:
        write_idx(tmp_path, part, count=200)
    script = str(ROOT / "examples" / "quickstart.py")
    options = ("--quick", "--batch-size", "32", "--data", "mnist", "--data-dir", ".")
    result = run(script, *options, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert counts in result.stdout
    assert (tmp_path / "output" / "quickstart.png").stat().st_size > 10_000


def test_cifar_reads_an_archive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 64), ("test", 16)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = rng.integers(0, 10, (count,), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_small.npz", **arrays)
    script = str(ROOT / "examples" / "cifar.py")
    options = ("--quick", "--data-dir", ".", "--model", "resnet18")
    result = run(script, *options, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "CIFAR-10: 64 training, 16 test images" in result.stdout


def test_readme_blocks(tmp_path: Path) -> None:
    """The blocks run in order, in one process, as a reader would paste them."""
    blocks = readme_blocks()
    assert blocks
    result = run("-c", "\n".join(blocks), folder=tmp_path)
    assert result.returncode == 0, result.stderr
