"""
The Hugging Face Trainer
========================

``Trainer(optimizers=(optimizer, scheduler))`` takes an EKFAC. Here a BERT with two
layers learns to say whether a sequence of brackets is balanced, beside AdamW at the
rate that is best for it among 0.001, 0.003 and 0.006.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from ekfac import EKFAC

LENGTH, STEPS = 24, 150


class Brackets(Dataset[dict[str, Tensor]]):
    """Sequences of opening (1) and closing (2) brackets; half of them are balanced."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = []
        for index in range(count):
            row, depth = [], 0
            for position in range(LENGTH):
                left = LENGTH - position
                can_open, can_close = depth < left, depth > 0
                coin = torch.rand((), generator=generator).item() < 0.5
                opens = can_open and (coin or not can_close)
                depth += 1 if opens else -1
                row.append(1 if opens else 2)
            if index % 2:  # exchange two brackets: the order is wrong, the counts right
                first = int(torch.randint(LENGTH // 2, (), generator=generator))
                row[first:] = reversed(row[first:])
            rows.append(row)
        self.rows = torch.tensor(rows)
        height = (3 - 2 * self.rows).cumsum(1)
        self.labels = (height.amin(1) >= 0).long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.labels[index]}


def losses(name: str) -> list[float]:
    """Return the mean loss of every ten steps of a run."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=3,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    optimizer: torch.optim.Optimizer
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    else:
        optimizer = EKFAC(model, lr=3e-3)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=64,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Brackets(2048),
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1 - step / STEPS)),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name in ("AdamW", "EKFAC"):
    values = [float(value) for value in losses(name)]
    axes.plot(range(10, STEPS + 1, 10), values, label=f"{name}, lr 0.003")
axes.set(xlabel="step", ylabel="training loss", ylim=(0, None))
axes.legend()
figure.tight_layout()
