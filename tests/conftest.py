"""Shared set-up: seeds, threads, double precision, hypothesis, torchvision."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine with a device runs the tests marked gpu without it
    settings = None

SEED = 0


def _torchvision_operators_load() -> bool:
    """Return whether torchvision's compiled operators match this torch build."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        for library in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return hasattr(torch.ops.torchvision, "nms")


def _declare_torchvision_operators() -> torch.library.Library:
    """Declare the operators whose absence makes `import torchvision` fail.

    A torchvision built for CUDA cannot load its library beside a CPU build of torch,
    yet registers shape functions for these two operators all the same.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return library


# Kept alive for the whole run: a collected library takes its operators with it.
_TORCHVISION = (
    None if _torchvision_operators_load() else _declare_torchvision_operators()
)


def _usable_threads() -> int:
    """Return how many threads torch may use without oversubscribing the machine."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, min(torch.get_num_threads(), cores))


torch.set_num_threads(_usable_threads())

if settings is not None:
    settings.register_profile(
        "ekfac",
        deadline=None,
        derandomize="CI" in os.environ,
        print_blob=True,
        # The fixtures below hold nothing that one generated input could leave the next.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("ekfac")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Seed every global generator, and catch a test that leaks a default dtype."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (third-party code reads the global one)
    torch.manual_seed(SEED)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    leaked = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    assert leaked is dtype, f"the test left {leaked} as the default dtype"


@pytest.fixture
def generator() -> torch.Generator:
    """Return a seeded CPU generator of the test's own."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def float64() -> Iterator[torch.dtype]:
    """Make new tensors and modules double precision for the one test that asks."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)
