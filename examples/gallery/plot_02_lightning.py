"""
Lightning
=========

``configure_optimizers`` returns an EKFAC as it would return an AdamW. Layers are found
in the module that is passed: the one whose ``forward`` is called in the training step.
"""

import logging
import warnings
from typing import Any

import lightning
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ekfac import EKFAC

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=UserWarning, module="lightning")

digits = load_digits()
data = TensorDataset(
    torch.from_numpy(digits.images).float().unsqueeze(1) / 16,
    torch.from_numpy(digits.target),
)


class Classifier(lightning.LightningModule):
    """A small convolutional network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """Return the loss of a batch."""
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped at every batch."""
        optimizer = EKFAC(self.network, lr=1e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 84)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


# %%
torch.manual_seed(0)
module = Classifier()
lightning.Trainer(
    max_epochs=6,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
).fit(module, DataLoader(data, batch_size=128, shuffle=True, drop_last=True))

# %%
figure, axes = plt.subplots(figsize=(6, 4))
axes.semilogy(module.losses)
axes.set(xlabel="step", ylabel="training loss", title="EKFAC in Lightning")
figure.tight_layout()
