"""
Not forgetting: the accuracy matrix
===================================

Five tasks one after another, the digits 0 to 9 with their pixels in another order each.
Row ``t`` of a matrix is the accuracy on every task after training on task ``t``. The
penalty keeps the curvature of the past tasks in the Kronecker-factored eigenbasis.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from ekfac.continual import QuadraticPenalty

digits = load_digits()
x = torch.from_numpy(digits.data).float() / 16
y = torch.from_numpy(digits.target)
held_out = torch.arange(len(x)) % 5 == 0
TASKS = 5
orders = [
    torch.randperm(64, generator=torch.Generator().manual_seed(t)) for t in range(TASKS)
]


def accuracies(strength: float) -> torch.Tensor:
    """Return the accuracy ``[tasks, tasks]`` after each task, on each task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    penalty = QuadraticPenalty(model, structure="ekfac", strength=strength)
    matrix = torch.zeros(TASKS, TASKS)
    for task, order in enumerate(orders):
        inputs, labels = x[~held_out][:, order], y[~held_out]
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            rows = torch.randint(len(inputs), (64,))
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs[rows]), labels[rows]) + penalty()
            loss.backward()
            optimizer.step()
        penalty.consolidate([(inputs, labels)])
        for past, past_order in enumerate(orders):
            guess = model(x[held_out][:, past_order]).argmax(1)
            matrix[task, past] = (guess == y[held_out]).float().mean()
    return matrix


# %%
figure, plots = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axes, strength in zip(plots, (0.0, 3.0), strict=True):
    matrix = accuracies(strength)
    image = axes.imshow(matrix, vmin=0, vmax=1)
    for row in range(TASKS):
        for column in range(row + 1):
            value = float(matrix[row, column])
            color = "black" if value > 0.6 else "white"
            text = f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=color)
    name = f"penalty, strength {strength:g}" if strength else "no penalty"
    axes.set_title(f"{name}: {matrix[-1].mean():.2f} on average at the end")
    axes.set(xlabel="task", ylabel="after training on task")
figure.colorbar(image, ax=plots, label="held-out accuracy")
