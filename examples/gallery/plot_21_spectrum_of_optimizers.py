"""
The spectrum under the spectral step, AdamW and Muon
====================================================

One network, trained by three optimizers to one loss. The steps of EKFAC and Muon have
equal size along all singular directions, those of AdamW have not: do they end at
different curvature? The left picture has the exact spectrum of the Fisher matrix, from
the dual matrix, the right one the path of its largest eigenvalue. Here the spectral
step's spectrum is the flattest, with the smallest largest eigenvalue. That depends on
the network: with two learning rates, three seeds and a transformer in
``benchmarks/spectrum_of_optimizers.py`` it holds for this kind of network at either
rate, and the contrary holds for the transformer.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import dual

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
LOSS = 0.2


def network() -> nn.Sequential:
    """Return the network at its start."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def optimizers(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return what trains the network; Muon takes matrices alone."""
    if name == "EKFAC, spectral":
        return [ekfac.EKFAC(model, lr=3e-3, direction="spectral")]
    if name == "AdamW":
        return [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    biases = [p for p in model.parameters() if p.dim() == 1]
    return [
        torch.optim.Muon(
            matrices, lr=3e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(biases, lr=3e-3, weight_decay=0.0),
    ]


# %%
# Every ten steps, the loss of all digits and the largest eigenvalue on 60 images.
names = ["EKFAC, spectral", "AdamW"] + ["Muon"] * hasattr(torch.optim, "Muon")
figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
for name in names:
    model = network()
    stepping = optimizers(name, model)
    losses, largest = [], []
    for step in range(1001):
        if step % 10 == 0:
            with torch.no_grad():
                losses.append(cross_entropy(model(x), y).item())
            largest.append(dual(model, x[:60]).spectrum().maximum)
            if losses[-1] <= LOSS:
                break
        rows = torch.randint(len(x), (64,))
        model.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        for optimizer in stepping:
            optimizer.step()
    spectrum = dual(model, x[:60]).spectrum()
    spectrum.plot(axes[0], label=f"{name}, {step} steps")
    axes[1].plot(losses, largest, "o-", ms=3, label=name)
axes[0].set_title(f"Fisher spectrum at a loss of {LOSS:g}")
axes[1].set(xlabel="loss", ylabel="largest eigenvalue", title="on the way there")
axes[1].invert_xaxis()
axes[1].legend()
