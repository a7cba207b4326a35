"""
Top Hessian directions and a slice of the landscape
===================================================

The Hessian's largest eigenvalues by Lanczos, the layers in which their eigenvectors
lie, and the loss along three of them beside the eigenvalue's prediction.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC
from ekfac.diagnostics import layer_shares, loss_profile, top_directions

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
)
with EKFAC(model, lr=3e-3) as optimizer:
    for _ in range(100):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()

# %%
directions = top_directions(model, [(x, y)], cross_entropy, k=12)
print(directions)

# %%
# The loss along the first, the fifth and the last of them.
steps = torch.linspace(-0.5, 0.5, 21)
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
directions.plot(left)
layer_shares(directions).plot(middle)
for index in (0, 4, 11):
    profile = loss_profile(
        model, [(x, y)], cross_entropy, directions.vector(index), steps
    )
    profile.plot(right, label=f"eigenvalue {directions.value[index]:.2f}")
figure.tight_layout()
