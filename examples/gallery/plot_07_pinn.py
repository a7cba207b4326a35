"""
A physics-informed network
==========================

``u'' = -pi^2 sin(pi x)`` with ``u(-1) = u(1) = 0`` is solved by a network whose second
derivatives stand in the loss. The statistics are those of the one backward pass that
adds to ``.grad``; the passes by which the derivatives are taken leave none.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from ekfac import EKFAC

x = torch.linspace(-1, 1, 128).unsqueeze(1)


def network() -> nn.Sequential:
    """Return the same network at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def residual(model: nn.Module, x: Tensor) -> Tensor:
    """Return ``u'' + pi^2 sin(pi x)`` at every point, ``[N, 1]``."""
    x = x.clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return curvature + math.pi**2 * torch.sin(math.pi * x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the loss of every step."""
    ends = torch.tensor([[-1.0], [1.0]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    losses = []
    for _ in range(400):
        optimizer.zero_grad()
        loss = residual(model, x).square().mean() + 10 * model(ends).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# %%
# Each at the best of 0.001, 0.003, 0.01 and 0.03.
curves, solutions = {}, {}
for name in ("AdamW", "EKFAC"):
    model = network()
    optimizer: torch.optim.Optimizer
    if name == "EKFAC":
        optimizer = EKFAC(model, lr=1e-2)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0)
    curves[name] = train(model, optimizer)
    solutions[name] = model(x).detach()

# %%
exact = torch.sin(math.pi * x)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
for name, losses in curves.items():
    left.semilogy(losses, label=name)
    right.semilogy(x, (solutions[name] - exact).abs(), label=name)
left.set(xlabel="step", ylabel="loss")
right.set(xlabel="x", ylabel="error of the solution")
left.legend()
right.legend()
figure.tight_layout()
