"""
A Monitor while training, and the report after it
=================================================

``Monitor`` records the state of the curvature within a share of the time; the run
itself is unchanged. ``python -m ekfac report CHECKPOINT`` makes a page of what a
checkpoint holds.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC, Monitor
from ekfac.__main__ import main
from ekfac.diagnostics import optimizer_health

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = EKFAC(model, lr=3e-3)

# %%
with Monitor(optimizer, every=5, share=0.5) as monitor:
    for _ in range(150):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss)
print(*monitor.names()[:6], "...", sep="\n")

# %%
# The state of every layer's curvature, now.
health = optimizer_health(optimizer)
print(health)

# %%
# The page: one file, without anything from the net.
folder = Path(tempfile.mkdtemp())
torch.save(optimizer.state_dict(), folder / "checkpoint.pt")
main(["report", str(folder / "checkpoint.pt"), "-o", str(folder / "report.html")])
print(f"{(folder / 'report.html').stat().st_size / 1024:.0f} KiB")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.semilogy(*monitor.series("loss"))
left.set(xlabel="step", ylabel="loss")
for name in monitor.names():
    if name.endswith("kfac_gap"):
        layer = name.split("/")[2]
        right.plot(*monitor.series(name), label=f"layer {layer}")
right.set(xlabel="step", ylabel="distance of the scalings to K-FAC's")
right.legend()
figure.tight_layout()
