"""
A narrow network inside a wide one
==================================

Splitting a neuron in two, with its outgoing weights shared between the copies, keeps
outputs and loss, and a critical point stays critical (Zhang et al. 2021). Its Hessian
gains directions of zero curvature, and may gain negative ones: a minimum becomes a
saddle.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

import ekfac
from ekfac.diagnostics import inertia, spectrum
from ekfac.diagnostics.papers.zhang import check_embedding, split

torch.manual_seed(0)
x = torch.linspace(-2, 2, 40, dtype=torch.float64).unsqueeze(1)
y = torch.exp(-(x**2)) + 0.3 * x
model = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)).double()
optimizer = torch.optim.LBFGS(
    model.parameters(),
    max_iter=500,
    tolerance_grad=1e-11,
    tolerance_change=0,
    history_size=20,
    line_search_fn="strong_wolfe",
)


def closure() -> torch.Tensor:
    """Return the loss after its backward pass."""
    optimizer.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    return loss


optimizer.step(closure)

# %%
embedding = split(model, "0", neuron=0, alpha=0.4)
wide = embedding.model(model)
print(check_embedding(model, embedding, x, y, mse_loss))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
left.plot(x, y, ".", label="data")
left.plot(x, model(x).detach(), lw=5, alpha=0.4, label="1 neuron")
left.plot(x, wide(x).detach(), "k", lw=1, label="2 neurons, by splitting it")
left.legend()
for name, network, mark in (("1 neuron", model, "o"), ("2 neurons", wide, "x")):
    H = ekfac.hessian(network, [(x, y)], mse_loss, structure="dense")
    print(name, inertia(H), sep="\n")
    values = spectrum(H).values
    right.plot(range(1, len(values) + 1), values, mark, label=name)
right.set(xlabel="index", ylabel="eigenvalue of the Hessian", yscale="symlog")
right.set_yscale("symlog", linthresh=1e-6)
right.legend()
figure.tight_layout()
