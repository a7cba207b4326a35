"""What several test modules share: statistics of one step, dense blocks, errors."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ekfac import EKFAC, KFAC, LayerCurvature
from ekfac.errors import EkfacWarning
from ekfac.optim.optimizer import KroneckerOptimizer

# One batch, nothing forgotten, nothing changed: the statistics of this very step.
STATISTICS: dict[str, Any] = {
    "lr": 0.0,
    "factor_decay": 0.0,
    "scaling_decay": 0.0,
    "scaling": "per_example",
    "factor_interval": 1,
    "basis_interval": 1,
    "basis_tolerance": 0.0,
}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let files grow no longer than this: as on a full disc, a part is written."""
    resource = importlib.import_module("resource")  # of POSIX systems
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def benchmark(name: str) -> ModuleType:
    """Return a module of the benchmarks."""
    folder = str(Path(__file__).resolve().parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def collect(
    model: nn.Module,
    loss: Callable[[], Tensor],
    kind: type[KroneckerOptimizer] = EKFAC,
    **options: Any,
) -> KroneckerOptimizer:
    """Return an optimizer after one step with ``lr=0``, full of this batch."""
    options = {**STATISTICS, **options}
    if kind is KFAC:
        options = {k: v for k, v in options.items() if not k.startswith("scaling")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EkfacWarning)
        optimizer = kind(model, **options)
        loss().backward()
        optimizer.step()
    return optimizer


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """Return the error relative to ``expected`` (absolute where that is zero)."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    assert found.dtype == expected.dtype
    return float((found - expected).norm()) / (float(expected.norm()) or 1.0)


# -- parameters ------------------------------------------------------------------------


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients by name, of the parameters that have one."""
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Do one step and return by how much it lowered the parameters."""
    before = parameters(model)
    optimizer.step()
    after = parameters(model)
    return {name: before[name] - after[name] for name in before}


def packed(layer: LayerCurvature, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the layer's share of ``tensors`` as ``[b, d_out, d_in]``."""
    return layer.pack(tensors)


@contextmanager
def paused(optimizer: KroneckerOptimizer) -> Iterator[None]:
    """Record no forward passes."""
    with optimizer._capture.paused():
        yield


def example_gradients(
    model: nn.Module, layer: LayerCurvature, losses: Callable[[], Tensor]
) -> Tensor:
    """Return ``[N, b, d_out, d_in]`` of ``losses() -> [N]``, one backward for each."""
    named = dict(model.named_parameters())
    chosen = [named[name] for name in layer.parameter_names]
    result = []
    for loss in losses().unbind():
        grads = torch.autograd.grad(
            loss, chosen, retain_graph=True, materialize_grads=True
        )
        result.append(layer.pack(dict(zip(layer.parameter_names, grads, strict=True))))
    return torch.stack(result)


# -- blocks as dense matrices, row-major over [d_out, d_in] ----------------------------


def dense_factor(factor: Tensor | None) -> Tensor:
    """Return a dense or diagonal factor as ``[b, d, d]``."""
    assert factor is not None
    return torch.diag_embed(factor) if factor.dim() == 2 else factor


def dense_basis(layer: LayerCurvature, side: str) -> Tensor:
    """Return ``Q_A`` or ``Q_G`` as ``[b, d, d]``, the identity for diagonal factors."""
    basis = layer.Q_A if side == "A" else layer.Q_G
    if basis is not None:
        return basis.clone()
    values = layer.eigenvalues_A if side == "A" else layer.eigenvalues_G
    return torch.diag_embed(torch.ones_like(values))


def kron(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left (x) right`` block by block; a single right one serves all."""
    pairs = zip(left, right.expand(len(left), -1, -1), strict=True)
    return torch.stack([torch.kron(a, b) for a, b in pairs])


def kfac_blocks(layer: LayerCurvature) -> Tensor:
    """Return ``G (x) A`` of every block, ``[b, d_out d_in, d_out d_in]``."""
    return kron(dense_factor(layer.G), dense_factor(layer.A))


def ekfac_blocks(layer: LayerCurvature, scalings: Tensor | None = None) -> Tensor:
    """Return ``Q diag(s) Q^T`` of every block, with the layer's scalings or others."""
    scalings = layer.s if scalings is None else scalings
    assert scalings is not None
    Q = kron(dense_basis(layer, "G"), dense_basis(layer, "A"))
    return (Q * scalings.flatten(1).unsqueeze(-2)) @ Q.transpose(-1, -2)


def block_of(F: Tensor, model: nn.Module, layer: LayerCurvature) -> Tensor:
    """Return the layer's blocks ``[b, d_out d_in, d_out d_in]`` of a dense matrix."""
    start, tensors = 0, {}
    for name, p in model.named_parameters():
        tensors[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    index = layer.pack(tensors).flatten(1)
    return F[index.unsqueeze(2), index.unsqueeze(1)]
