"""Layers of other packages: factors are moments that hooks of the test measure.

And scalings are the second moments of the gradients of single examples, of every block.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import collect, relative_error
from torch import Tensor, nn

from ekfac import LayerCurvature

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from coverage_models import BATCH, MODELS, Problem
from further_models import FURTHER

# Whose examples do not meet -> blocks of tables that are used once for all of them.
MODELS_OF_EXAMPLES = {
    "transformers": {
        "GPT-2": ["transformer.wpe"],
        "Llama": [],
        "Mistral": [],
        "Gemma": [],
        "OPT": [],
        "Mixtral": [],
        "Qwen2-MoE": [],
        "Mamba": [],
        "T5": [
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
            for side in ("encoder", "decoder")
        ],
        "Whisper": [],
        "ViT": [],
        "BEiT": [],
        "XLNet": [],
        "WavLM": ["wavlm.encoder.layers.0.attention.rel_attn_embed"],
    },
    "peft": {"LoRA of GPT-2": []},
    "timm": {
        "ConvNeXt": [],
        "ViT": [],
        "Swin": [
            f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(2)
        ],
        "MLP-Mixer": [],
    },
}
QUICK = {
    "Llama",
    "Mixtral",
    "Mamba",
    "T5",
    "Swin",
    "ConvNeXt",
    "LoRA of GPT-2",
    "XLNet",
}
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


def certain(package: str, name: str) -> Problem:
    """Return a problem in double precision, without dropout and without zeros."""
    torch.manual_seed(0)
    problem = {**MODELS[package], **FURTHER.get(package, {})}[name]()
    model = problem.model.double()
    if hasattr(model, "config"):  # a kernel for float32 otherwise
        model.config._experts_implementation = "eager"
    for module in model.modules():
        for option in ("p", "dropout", "attention_dropout", "drop_prob"):
            if isinstance(getattr(module, option, None), float):
                setattr(module, option, 0.0)
    for parameter in model.parameters():
        if not parameter.any():  # of LoRA, heads and biases: others have no gradient
            nn.init.normal_(parameter, std=0.1)
    return problem


def moment(layer: LayerCurvature, gradients: list[dict[str, Tensor]]) -> Tensor:
    """Return what scalings, or the factor of exact blocks, are by definition."""
    every = torch.stack([layer.pack(gradient) for gradient in gradients])
    if layer.block.exact:
        return torch.einsum("nboi,nboj->bij", every, every) / len(every)
    left = torch.eye(every.shape[-2]) if layer.Q_G is None else layer.Q_G
    right = torch.eye(every.shape[-1]) if layer.Q_A is None else layer.Q_A
    return (left.mT @ every @ right).square().mean(0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("package", "name"),
    [
        pytest.param(
            package, name, marks=[] if name in QUICK else [pytest.mark.slow], id=name
        )
        for package, models in MODELS_OF_EXAMPLES.items()
        for name in models
    ],
)
@pytest.mark.filterwarnings("ignore:The given buffer")
def test_scalings_are_those_of_the_gradients_of_examples(
    package: str, name: str
) -> None:
    """Of every block, up to one factor: the square of how many targets there are."""
    pytest.importorskip(package)
    problem = certain(package, name)
    model = problem.model
    curvature = collect(model, lambda: problem.loss(0)).curvature
    own = dict(model.named_parameters())
    gradients = []
    for n in range(BATCH):
        model.zero_grad()
        problem.loss(0, slice(n, n + 1)).backward()
        gradients.append(
            {
                key: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for key, p in own.items()
            }
        )
    summed = MODELS_OF_EXAMPLES[package][name]
    factors = []
    for path, layer in curvature.items():
        if path in summed or path.endswith("A_log"):
            continue
        expected = moment(layer, gradients)
        result = layer.A if layer.block.exact else layer.s
        if result is None:  # nothing uses it
            names = layer.parameter_names
            assert not any(g[name].any() for g in gradients for name in names), path
            continue
        factor = float((result * expected).sum() / expected.square().sum())
        # Mamba's own bias is in single precision.
        assert relative_error(result, factor * expected) < 1e-7, path
        factors.append(factor)
    assert len(factors) > 10
    assert max(factors) / min(factors) - 1 < 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("package", "name", "kind"), CASES)
def test_factors_are_moments(package: str, name: str, kind: str) -> None:
    pytest.importorskip(package)
    torch.manual_seed(0)
    problem = certain(package, name)
    model = problem.model
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
