"""
Accelerate, with gradient accumulation
======================================

``accelerator.prepare`` takes an EKFAC as it takes an AdamW. Over accumulated batches
the curvature is that of all of them: two batches of 64 make the same step as one of
128.
"""

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ekfac import EKFAC

digits = load_digits()
data = TensorDataset(
    torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target)
)


def losses(batch_size: int, accumulate: int) -> list[float]:
    """Return the loss of every step, the mean over its batches."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    loader = DataLoader(data, batch_size=batch_size, drop_last=True)
    optimizer = EKFAC(model, lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    values: list[float] = []
    for _ in range(4):
        for index, (x, y) in enumerate(loader):
            with accelerator.accumulate(model):
                loss = cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if index % accumulate == 0:
                values.append(0.0)
            values[-1] += loss.item() / accumulate
    return values


# %%
whole, halves = losses(128, 1), losses(64, 2)
largest = max(abs(a - b) for a, b in zip(whole, halves, strict=True))
print(f"largest difference of the two losses over {len(whole)} steps: {largest:.1e}")

# %%
figure, axes = plt.subplots(figsize=(6, 4))
axes.plot(whole, lw=4, alpha=0.4, label="batches of 128")
axes.plot(halves, lw=1, color="black", label="two batches of 64, accumulated")
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
figure.tight_layout()
