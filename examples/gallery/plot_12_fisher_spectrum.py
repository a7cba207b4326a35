"""
The Fisher spectrum and its outliers
====================================

A few eigenvalues, about one for each class, stand above a bulk that spans many orders
of magnitude (Karakida et al. 2020). The exact spectrum comes from the dual matrix ``[N
C, N C]``; the spectra of Kronecker factors are beside it.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import dual, spectrum

digits = load_digits()
x = torch.from_numpy(digits.data).float()[:300] / 16
y = torch.from_numpy(digits.target)[:300]
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)

# %%
figure, plots = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
optimizer = ekfac.EKFAC(model, lr=3e-3)
for axes, steps, name in zip(
    plots, (0, 100), ("before training", "after"), strict=True
):
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    exact = dual(model, x).spectrum()
    estimate = spectrum(ekfac.fisher(model, [(x, y)], "ekfac"))
    kfac = spectrum(ekfac.fisher(model, [(x, y)], "kfac"))
    exact.plot(axes, label="exact")
    estimate.plot(axes, label="EKFAC")
    kfac.plot(axes, label="K-FAC").get_lines()[-1].set_linestyle("--")
    axes.set_title(
        f"{name}: ten eigenvalues hold {exact.trace_ratio(10):.0%} of the trace"
    )
    axes.legend()
figure.tight_layout()
