"""Layers of other packages: factors are moments that hooks of the test measure."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import collect, relative_error
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from coverage_models import MODELS

# Package, model, kinds of modules that are linear maps.
CASES = [
    ("torch_geometric", "GCN", "Linear"),
    ("torch_geometric", "SAGE", "Linear"),
    ("torch_geometric", "GAT", "Linear"),
    ("peft", "LoRA of GPT-2", "Linear"),
    ("timm", "ViT", "Linear"),
    ("transformers", "GPT-2", "Conv1D"),
]


def measured(
    module: nn.Module, loss: Callable[[], Tensor], *, shifted: bool
) -> tuple[Tensor, Tensor]:
    """Return second moments of a module's inputs and of its outputs' gradients.

    Where labels are ``shifted``, the last position has none and no gradient.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(
        lambda m, args, out: calls.append((args[0], out))
    )
    total = loss()
    handle.remove()
    grads = torch.autograd.grad(total, [out for _, out in calls])
    rows = torch.cat([x.detach().flatten(0, -2) for x, _ in calls])
    g = torch.cat([grad.flatten(0, -2) for grad in grads])
    if getattr(module, "bias", None) is not None:
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    if shifted:
        rows = rows[(g != 0).any(1)]
    return rows.T @ rows / len(rows), g.T @ g


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("package", "name", "kind"), CASES)
def test_factors_are_moments(package: str, name: str, kind: str) -> None:
    pytest.importorskip(package)
    torch.manual_seed(0)
    problem = MODELS[package][name]()
    model = problem.model.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for path, parameter in model.named_parameters():
        if "lora_B" in path:  # zeros, with which A has no gradient
            nn.init.normal_(parameter)
    optimizer = collect(model, lambda: problem.loss(0), loss_reduction="sum")
    checked = 0
    for path, module in model.named_modules():
        state: Any = optimizer.curvature.get(path)
        if state is None or type(module).__name__ != kind or len(state.block.uses) > 1:
            continue
        a, g = measured(module, lambda: problem.loss(0), shifted="GPT" in name)
        # G is over examples: a factor, the same for every layer, is not looked at.
        for ours, expected in ((state.A, a), (state.G, g)):
            dense = ours[0] if ours.dim() == 3 else torch.diag(ours[0])
            if ours.dim() == 2:
                expected = torch.diag(expected.diagonal())
            error = dense / dense.trace() - expected / expected.trace()
            assert float(error.norm()) < 1e-10, path
        assert state.A.dim() == 2 or relative_error(state.A[0], a) < 1e-10, path
        checked += 1
    assert checked >= 2
