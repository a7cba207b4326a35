"""
The tangent kernel turns towards the labels
===========================================

The alignment of the tangent kernel with the kernel of the labels grows while a network
trains, in every layer (George 2023, section 6.3). In the lazy regime it would not
change.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.diagnostics import label_alignment

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = EKFAC(model, lr=3e-3)

# %%
records = []
for step in range(81):
    if step % 10 == 0:
        records.append((step, label_alignment(model, x[:100], y[:100])))
    rows = torch.randint(len(x), (128,))
    optimizer.zero_grad()
    cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()

# %%
figure, axes = plt.subplots(figsize=(6, 4))
steps = [step for step, _ in records]
whole = [alignment.whole.value for _, alignment in records]
axes.plot(steps, whole, "k-", lw=3, label="whole network")
for name in records[0][1].layers:
    axes.plot(steps, [r.layers[name].value for _, r in records], label=f"layer {name}")
axes.set(xlabel="step", ylabel="alignment with the labels", ylim=(0, None))
axes.legend()
figure.tight_layout()
