"""
Lottery tickets, and pruning in the Kronecker eigenbasis
========================================================

Iterative magnitude pruning with rewinding (Frankle & Carbin 2019; Ge 2025, section
3.3), and pruning of a trained network's coordinates in its eigenbasis by what they add
to the loss (EigenDamage, Wang et al. 2019) beside pruning of its weights by their size.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ekfac
from ekfac.diagnostics import accuracy_of, lottery_tickets
from ekfac.diagnostics.eigen_pruning import eigen_pruned

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
x_train, y_train = x[:1400], y[:1400]
metric = accuracy_of([(x[1400:], y[1400:])])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, mask: object) -> None:
    """Train; ``mask()`` after every step keeps pruned weights at zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        rows = torch.randint(len(x_train), (128,))
        optimizer.zero_grad()
        cross_entropy(model(x_train[rows]), y_train[rows]).backward()
        optimizer.step()
        if callable(mask):
            mask()


# %%
tickets = lottery_tickets(model, train, metric, rounds=6, fraction=0.5)

# %%
# The same network, trained once and pruned without further training.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
train(model, None)
F = ekfac.fisher(model, [(x_train, y_train)], "ekfac")
solution = ekfac.ParameterVector.from_model(model)
sizes = torch.cat([value.flatten().abs() for value in solution.values()])
fractions = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95]
in_basis, by_size = [], []
for fraction in fractions:
    pruned = eigen_pruned(solution, F, fraction)
    model.load_state_dict(dict(pruned.value))
    in_basis.append(metric(model))
    cut = sizes.quantile(fraction)
    model.load_state_dict({n: v * (v.abs() >= cut) for n, v in solution.items()})
    by_size.append(metric(model))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
tickets.plot(left)
left.set(ylabel="held-out accuracy", title="trained again after every round")
kept = [1 - fraction for fraction in fractions]
right.plot(kept, in_basis, "o-", label="eigenbasis, by predicted loss")
right.plot(kept, by_size, "s--", label="weights, by size")
right.set(xlabel="share kept", ylabel="held-out accuracy", title="not trained again")
right.invert_xaxis()
right.legend()
figure.tight_layout()
