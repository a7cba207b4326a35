"""
A plain loop: AdamW's line exchanged
====================================

An auto-encoder for 8 x 8 images of digits, 64-48-24-8 and back, in a loop of six lines.
The second run differs from the first in the constructor alone, the learning rate
included.
"""

import itertools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ekfac import EKFAC

images = torch.from_numpy(load_digits().data).float() / 16


def autoencoder() -> nn.Sequential:
    """Return the same network at every call."""
    torch.manual_seed(0)
    widths = (64, 48, 24, 8, 24, 48, 64)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the loss of every step."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(300):
        batch = images[torch.randint(len(images), (128,), generator=generator)]
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %%
# The two runs. Of 0.003, 0.006, 0.01, 0.02 and 0.04, 0.02 is the best rate for both.
curves = {}
model = autoencoder()
curves["AdamW, lr 0.02"] = train(model, torch.optim.AdamW(model.parameters(), lr=2e-2))
model = autoencoder()
optimizer = EKFAC(model, lr=2e-2)
curves["EKFAC, lr 0.02"] = train(model, optimizer)

# %%
# What every layer is preconditioned by, and why:
print(optimizer.describe())

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name, losses in curves.items():
    axes.plot(losses, label=f"{name}: {sum(losses[-20:]) / 20:.4f} at the end")
axes.set(xlabel="step", ylabel="training loss")
axes.legend()
figure.tight_layout()
