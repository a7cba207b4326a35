"""
Low-rank adapters (LoRA)
========================

A network trained on the digits 0 to 4 is adapted to the digits 5 to 9 through low-rank
updates of its frozen layers. The frozen weights have no statistics; every ``A`` and
``B`` is a ``Linear``, and so a Kronecker block of its own.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ekfac import EKFAC

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
first, second = y < 5, y >= 5


class LoRA(nn.Module):
    """``W x + B A x`` with ``W`` frozen."""

    def __init__(self, linear: nn.Linear, rank: int = 16) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Linear(linear.in_features, rank, bias=False)
        self.B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, out_features]``."""
        y: Tensor = self.linear(x) + self.B(self.A(x))
        return y


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    steps: int,
) -> list[float]:
    """Return the loss of every step."""
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# %%
# The network that is adapted.
torch.manual_seed(0)
base = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)
)
train(base, EKFAC(base, lr=3e-3), x[first], y[first], 100)

# %%
# Only the updates are trained.
curves = {}
for name in ("AdamW", "EKFAC"):
    torch.manual_seed(1)
    model = nn.Sequential(
        *(
            LoRA(part) if isinstance(part, nn.Linear) else part
            for part in copy.deepcopy(base)
        )
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if name == "EKFAC":
        optimizer = EKFAC(trained, model=model, lr=1e-2)
        print(optimizer.describe())
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
    curves[name] = train(model, optimizer, x[second], y[second] - 5, 120)

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name, losses in curves.items():
    axes.semilogy(losses, label=f"{name}, lr 0.01")
axes.set(xlabel="step", ylabel="training loss on the new digits")
axes.legend()
figure.tight_layout()
