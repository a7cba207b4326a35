"""
The training images that a prediction rests on
==============================================

The influence of a training image ``z`` on the loss at a test image is, to first order,
``-g_test^T F^-1 g_z`` (Koh & Liang 2017). With the EKFAC matrix the inverse is a few
small products (Grosse et al. 2023).
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
x_train, y_train, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
optimizer = ekfac.EKFAC(model, lr=3e-3, weight_decay=0.1)
for _ in range(200):
    rows = torch.randint(len(x_train), (128,))
    optimizer.zero_grad()
    cross_entropy(model(x_train[rows]), y_train[rows]).backward()
    optimizer.step()
optimizer.close()

# %%
# The Fisher matrix over the training images, and the test image with the largest loss.
F = ekfac.fisher(model, [(x_train, y_train)], "ekfac")
losses = cross_entropy(model(x_test), y_test, reduction="none")
worst = int(losses.argmax())


def gradient(x: torch.Tensor, y: torch.Tensor) -> ekfac.ParameterVector:
    """Return the gradient of the loss at one image."""
    model.zero_grad()
    cross_entropy(model(x[None]), y[None]).backward()
    return ekfac.ParameterVector.from_grad(model)


direction = F.solve(gradient(x_test[worst], y_test[worst]), damping=1e-3)
influences = torch.stack(
    [
        -direction.dot(gradient(image, label))
        for image, label in zip(x_train, y_train, strict=True)
    ]
)
order = influences.argsort()

# %%
# Left the test image; above the images that lower its loss most, below those that raise
# it.
figure, plots = plt.subplots(2, 6, figsize=(9, 3.4))
guess = int(model(x_test[worst]).argmax())
plots[0, 0].imshow(x_test[worst].view(8, 8), cmap="gray_r")
plots[0, 0].set_title(f"a {y_test[worst]}, read as {guess}", fontsize=9)
for row, indices in zip(plots, (order[:5], order.flip(0)[:5]), strict=True):
    for axes, index in zip(row[1:], indices.tolist(), strict=True):
        axes.imshow(x_train[index].view(8, 8), cmap="gray_r")
        axes.set_title(f"a {y_train[index]}: {influences[index]:+.1f}", fontsize=9)
for axes in plots.flat:
    axes.set_axis_off()
figure.tight_layout()
