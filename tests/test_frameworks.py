"""Training frameworks: each trains a small model with just another optimizer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import ProjectConfiguration
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from training_cases import (
    METHODS,
    Method,
    assert_identical,
    flattened,
    small_classifier,
    statistics,
)
from transformers.pytorch_utils import Conv1D

from ekfac.layers import override
from ekfac.layers.linear import LinearAdapter
from ekfac.optim.optimizer import KroneckerOptimizer

pytestmark = pytest.mark.filterwarnings("error::ekfac.errors.EkfacWarning")
some_methods = pytest.mark.parametrize("method", METHODS[::4], ids=lambda m: m.name)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep the frameworks from talking, reporting and writing anywhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    names = ("lightning.pytorch", "lightning.fabric", "accelerate", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for package in ("lightning", "accelerate", "transformers", "torch"):
            warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def examples(count: int = 96) -> TensorDataset:
    """Return inputs and the classes that a random linear map gives them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    return TensorDataset(x, (x @ torch.randn(6, 4, generator=generator)).argmax(dim=1))


def batches(size: int = 16) -> DataLoader[Any]:
    """Return the examples in batches, always in the same order."""
    return DataLoader(examples(), batch_size=size)


def loss_over_all(model: nn.Module) -> float:
    """Return the model's loss over all examples."""
    x, y = examples().tensors
    with torch.no_grad():
        return float(cross_entropy(model(x), y))


def assert_trained(
    model: nn.Module, before: float, optimizer: KroneckerOptimizer
) -> None:
    """Check that the loss fell and that every layer's curvature was collected."""
    assert loss_over_all(model) < 0.7 * before
    assert all(layer.ready for layer in optimizer.curvature.values())
    scaled = optimizer.options.scaling is not None
    assert len(statistics(optimizer)) == len(optimizer.curvature) * (4 + scaled)
    for value in statistics(optimizer).values():
        assert torch.isfinite(value).all()


# -- Lightning -------------------------------------------------------------------------


class LightningClassifier(lightning.LightningModule):
    """Its optimizer is given the network, or the whole module."""

    def __init__(self, method: Method, whole: bool = False) -> None:
        super().__init__()
        self.net, self.method, self.whole = small_classifier(), method, whole

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self(x) if self.whole else self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("validation", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = self.method(self if self.whole else self.net, lr=3e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def trainer(path: Path, epochs: int, **options: Any) -> lightning.Trainer:
    """Return a trainer that shows nothing."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def optimizer_of(fit: lightning.Trainer) -> KroneckerOptimizer:
    """Return the trainer's only optimizer."""
    (optimizer,) = fit.optimizers
    assert isinstance(optimizer, KroneckerOptimizer)
    return optimizer


@some_methods
@pytest.mark.parametrize("whole", [False, True], ids=["self.net", "self"])
def test_lightning(method: Method, whole: bool, tmp_path: Path) -> None:
    model = LightningClassifier(method, whole)
    before = loss_over_all(model)
    fit = trainer(tmp_path, 2, enable_checkpointing=False, gradient_clip_val=1.0)
    fit.fit(model, batches(), batches())
    assert_trained(model, before, optimizer_of(fit))
    assert optimizer_of(fit).param_groups[0]["lr"] == 3e-2 / 4
    prefix = "net." if whole else ""
    assert f"{prefix}0" in optimizer_of(fit).curvature


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lightning_precision(precision: str, tmp_path: Path) -> None:
    model = LightningClassifier(METHODS[2])
    before = loss_over_all(model)
    options = {"precision": precision, "accumulate_grad_batches": 2}
    fit = trainer(tmp_path, 4, enable_checkpointing=False, **options)
    fit.fit(model, batches(8))
    assert_trained(model.float(), before, optimizer_of(fit))
    found = statistics(optimizer_of(fit)).values()
    assert {value.dtype for value in found} == {torch.float32}


@some_methods
def test_lightning_resumes(method: Method, tmp_path: Path) -> None:
    """Two epochs are the same as one, a checkpoint, and another."""
    straight = LightningClassifier(method)
    through = trainer(tmp_path / "through", 2, enable_checkpointing=False)
    through.fit(straight, batches())

    first = trainer(tmp_path / "first", 1)
    first.fit(LightningClassifier(method), batches())
    path = tmp_path / "last.ckpt"
    first.save_checkpoint(path)
    resumed = LightningClassifier(method)
    second = trainer(tmp_path / "second", 2, enable_checkpointing=False)
    second.fit(resumed, batches(), ckpt_path=path)

    assert_identical(flattened(resumed.state_dict()), flattened(straight.state_dict()))
    found = flattened(optimizer_of(second).state_dict())
    assert_identical(found, flattened(optimizer_of(through).state_dict()))


# -- Accelerate ------------------------------------------------------------------------


def accelerated_epochs(
    accelerator: Accelerator, parts: tuple[Any, Any, Any], epochs: int
) -> None:
    """Train as Accelerate's documentation does."""
    model, optimizer, loader = parts
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()


@some_methods
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(method: Method, precision: str) -> None:
    accelerator = Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model = small_classifier()
    before = loss_over_all(model)
    optimizer = method(model, lr=2e-2)
    parts = accelerator.prepare(model, optimizer, batches(8))
    accelerated_epochs(accelerator, parts, 4)
    assert optimizer.state_dict()["progress"]["steps"] == 4 * 96 // 16
    assert_trained(accelerator.unwrap_model(parts[0]), before, optimizer)


@some_methods
def test_accelerate_resumes(method: Method, tmp_path: Path) -> None:
    def start() -> tuple[Accelerator, tuple[Any, Any, Any], KroneckerOptimizer]:
        project = ProjectConfiguration(project_dir=str(tmp_path))
        accelerator = Accelerator(cpu=True, project_config=project)
        model = small_classifier()
        optimizer = method(model)
        parts = accelerator.prepare(model, optimizer, batches())
        return accelerator, parts, optimizer

    accelerator, parts, expected = start()
    accelerated_epochs(accelerator, parts, 1)
    accelerator.save_state(str(tmp_path / "state"))
    accelerated_epochs(accelerator, parts, 1)
    plain = parts[0]
    accelerator, parts, optimizer = start()
    accelerator.load_state(str(tmp_path / "state"))
    accelerated_epochs(accelerator, parts, 1)
    assert_identical(flattened(parts[0].state_dict()), flattened(plain.state_dict()))
    found = flattened(optimizer.state_dict())
    assert_identical(found, flattened(expected.state_dict()))


# -- Hugging Face Trainer --------------------------------------------------------------

# "exact" takes a backward pass for each of 16 classes at each of 8 positions.
fast_methods = pytest.mark.parametrize(
    "method", [METHODS[0], METHODS[2], METHODS[4]], ids=lambda m: m.name
)

SEQUENCES = [
    {
        "input_ids": [(3 * i + 5 * j) % 16 for j in range(8)],
        "labels": [(3 * i + 5 * j) % 16 for j in range(8)],
    }
    for i in range(48)
]


class TransposedLinear(LinearAdapter):
    """Transformers' ``Conv1D``: a linear layer that keeps its weight transposed."""

    def pack(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().pack(weight.t(), bias)

    def unpack(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().unpack(matrix)
        return weight.t(), bias


def language_model() -> transformers.PreTrainedModel:
    """Return a tiny GPT-2 with random weights, its embedding tied to its head."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=16,
        n_positions=8,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)
    for module in model.modules():
        if isinstance(module, Conv1D):
            override(module, TransposedLinear)
    return model


def language_trainer(
    method: Method, path: Path, **options: Any
) -> tuple[transformers.Trainer, KroneckerOptimizer]:
    """Return a trainer that shows and reports nothing, and its optimizer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        **{"save_strategy": "no", **options},
    )
    model = language_model()
    optimizer = method(model, lr=2e-2)
    run = transformers.Trainer(
        model, arguments, train_dataset=SEQUENCES, optimizers=(optimizer, None)
    )
    run.remove_callback(transformers.PrinterCallback)
    return run, optimizer


def allow_shared_positions() -> None:
    """Let per-example scalings say that a position's embedding sums over examples."""
    warnings.filterwarnings("ignore", r"(?s)Which example.*\n  transformer.wpe \(torch")


@fast_methods
@pytest.mark.parametrize("accumulation", [1, 2])
def test_hugging_face(method: Method, accumulation: int, tmp_path: Path) -> None:
    allow_shared_positions()
    run, optimizer = language_trainer(
        method,
        tmp_path,
        num_train_epochs=4,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        warmup_steps=2,
    )
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged[-1] < 0.8 * logged[0]
    assert optimizer.state_dict()["progress"]["steps"] == 24 // accumulation
    assert len(optimizer.curvature) == 9
    for name, layer in optimizer.curvature.items():
        assert layer.ready, name
    uses = optimizer.curvature["transformer.wte"].block.uses
    assert [use.name for use in uses] == ["transformer.wte", "lm_head"]


@fast_methods
def test_hugging_face_resumes(method: Method, tmp_path: Path) -> None:
    allow_shared_positions()
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 6}
    through, expected = language_trainer(method, tmp_path, **options)
    through.train()
    resumed, optimizer = language_trainer(method, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    weights = flattened(resumed.model.state_dict())
    assert_identical(weights, flattened(through.model.state_dict()))
    found = flattened(optimizer.state_dict())
    assert_identical(found, flattened(expected.state_dict()))
